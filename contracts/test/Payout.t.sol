// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {Candidate} from "../src/BlockPublisher.sol";
import {vm} from "./Vm.sol";
import {World} from "./World.sol";

/// @title What a pool pays, by fuzz.
contract PayoutTest is World {
    function setUp() public {
        deploy();
        hire(5, 10 ether);
    }

    /// @dev In any order of claims: each gets its exact share rounded down or up to five wei more, and together all of the pool.
    function testFuzz_claimsAddUpToThePool(uint88 reward, uint256[5] memory drawn, uint256 order) public {
        vm.assume(reward > 0);
        uint256[] memory scores = new uint256[](5);
        uint256 sum = 0;
        for (uint256 i = 0; i < 5; i++) sum += scores[i] = drawn[i] % 1_000_001;
        (Candidate memory c,) = block_("t", reward, scores);
        settle(c, scores);
        uint256 pool = reward - uint256(reward) / 10;
        uint256 paid = 0;
        uint256[] memory turns = shuffled(5, order);
        for (uint256 k = 0; k < 5; k++) {
            uint256 i = turns[k];
            uint256 share = sum == 0 ? pool / 5 : pool * scores[i] / sum;
            uint256 got = rewards.claimable(keccak256("t"), address(0), i, scores[i]);
            vm.assertGe(got, share, "less than the share");
            vm.assertLe(got, share + 5, "more than the share");
            paid += pay(c, i, scores[i]);
            vm.assertEq(c.participants[i].balance, got, "paid");
        }
        vm.assertEq(paid, pool, "the pool");
        vm.assertEq(address(rewards).balance, rewards.balanceOf(address(0), c.aggregator), "left behind");
    }

    /// @dev Fewer units than members: the first claims round to nothing, and the last three get one each.
    function test_fewerUnitsThanMembers() public {
        uint256[] memory scores = same(1, 5);
        (Candidate memory c,) = block_("t", 3, scores);
        settle(c, scores);
        for (uint256 i = 0; i < 5; i++) {
            vm.assertEq(pay(c, i, 1), i < 2 ? 0 : 1, "paid");
        }
        vm.assertEq(address(rewards).balance, 0, "left behind");
    }

    /// @dev A score of zero has nothing to claim once the pool is empty.
    function pay(Candidate memory c, uint256 position, uint256 score) private returns (uint256) {
        if (rewards.getSettlement("t").remainingParts == 0) return 0;
        return claim(c, position, score);
    }

    function shuffled(uint256 count, uint256 order) internal pure returns (uint256[] memory list) {
        list = new uint256[](count);
        for (uint256 i = 0; i < count; i++) list[i] = i;
        for (uint256 i = count - 1; i > 0; i--) {
            uint256 j = order % (i + 1);
            order /= i + 1;
            (list[i], list[j]) = (list[j], list[i]);
        }
    }
}
