// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {BlockMeta, BlockPublisher} from "../src/BlockPublisher.sol";
import {contributionLeaf} from "../src/Cohort.sol";
import {HealChainEscrow} from "../src/HealChainEscrow.sol";
import {Opening, RewardDistribution} from "../src/RewardDistribution.sol";
import {Status, Task, Terms} from "../src/Task.sol";
import {vm} from "./Vm.sol";

/// @dev Escrow and block publisher in one, which know one settled task of any reward and any aggregator's share.
contract AnyTask {
    Task private _task;
    BlockMeta private _meta;

    function set(Task memory task, BlockMeta memory meta) external {
        _task = task;
        _meta = meta;
    }

    function getTask(bytes32) external view returns (Task memory) {
        return _task;
    }

    function getBlockMeta(bytes32) external view returns (BlockMeta memory) {
        return _meta;
    }

    function releaseReward(string calldata) external {
        (bool ok,) = msg.sender.call{value: _task.reward}("");
        assert(ok);
    }
}

/// @title For every reward, share and score, by symbolic execution (halmos), what fuzz tries for some.
contract SymbolicTest {
    AnyTask private any;
    RewardDistribution private rewards;
    address private constant FIRST = address(0x1001);
    address private constant SECOND = address(0x1002);
    bytes32 private constant SALT = keccak256("salt");

    function setUp() public {
        any = new AnyTask();
        rewards = new RewardDistribution(HealChainEscrow(address(any)), BlockPublisher(address(any)));
    }

    function commit(address who, uint256 score) private pure returns (bytes32) {
        return keccak256(abi.encodePacked(score, SALT, "t", who));
    }

    /// @dev A task with two participants, met by its publisher's and its aggregator's silence.
    function open(uint88 reward, uint256 a, uint256 b) private {
        bytes32 left = contributionLeaf(0, FIRST, commit(FIRST, a));
        bytes32 right = contributionLeaf(1, SECOND, commit(SECOND, b));
        Task memory task;
        task.reward = reward;
        task.status = Status.Published;
        (task.terms.publisherRevealWindow_s, task.terms.aggregatorRevealWindow_s) = (1, 1);
        (task.terms.scoreRevealWindow_s, task.terms.maxScore) = (100, type(uint64).max);
        BlockMeta memory meta;
        (meta.publishedAt, meta.participantCount, meta.aggregator) = (1, 2, FIRST);
        meta.contributionsRoot = left < right
            ? keccak256(abi.encodePacked(left, right))
            : keccak256(abi.encodePacked(right, left));
        any.set(task, meta);
        vm.deal(address(any), reward);
        vm.warp(10);
    }

    function proof(address other, uint256 position, uint256 score) private pure returns (bytes32[] memory list) {
        list = new bytes32[](1);
        list[0] = contributionLeaf(position, other, commit(other, score));
    }

    function opening(uint256 position, uint256 score, address other, uint256 otherScore) private pure returns (Opening memory) {
        return Opening(score, SALT, position, proof(other, 1 - position, otherScore));
    }

    function reveal(uint256 a, uint256 b) private {
        must(FIRST, abi.encodeCall(rewards.revealScore, ("t", opening(0, a, SECOND, b))));
        must(SECOND, abi.encodeCall(rewards.revealScore, ("t", opening(1, b, FIRST, a))));
        must(FIRST, abi.encodeCall(rewards.distribute, ("t")));
    }

    /// @dev A call that reverts, for whatever reason, is a failure.
    function must(address who, bytes memory data) private {
        vm.prank(who);
        (bool ok,) = address(rewards).call(data);
        assert(ok);
    }

    function claim(address who, Opening memory opened) private {
        must(who, abi.encodeCall(rewards.claimTo, ("t", address(0), who, opened)));
    }

    /// @dev Nothing in the life of a pool reverts, and the claims are all of it: no overflow, no division by zero, no residue.
    function check_claimsAreThePool(uint88 reward, uint64 a, uint64 b) public {
        vm.assume(reward > 0);
        open(reward, a, b);
        reveal(a, b);
        claim(FIRST, opening(0, a, SECOND, b));
        // A score of zero finds an empty pool once the other has claimed.
        if (b > 0 || a == 0) claim(SECOND, opening(1, b, FIRST, a));
        assert(address(rewards).balance == 0);
        assert(FIRST.balance + SECOND.balance == reward);
    }

    /// @dev The same by fuzz, so that forge too runs what halmos does.
    function testFuzz_claimsAreThePool(uint88 reward, uint64 a, uint64 b) public {
        vm.assume(reward > 0);
        check_claimsAreThePool(reward, a, b);
    }
}
