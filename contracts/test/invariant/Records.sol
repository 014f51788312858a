// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {Candidate} from "../../src/BlockPublisher.sol";
import {Outcome} from "../../src/RewardDistribution.sol";
import {Status, Terms} from "../../src/Task.sol";
import {Hostile} from "../Hostile.sol";
import {MannerToken} from "../Tokens.sol";
import {vm} from "../Vm.sol";
import {World} from "../World.sol";

/// @title What the handler remembers of what it did, beside what the contracts remember.
abstract contract Records is World {
    uint256 internal constant MINERS = 5;
    uint256 internal constant MOST_TASKS = 6;

    struct Record {
        string id;
        bytes32 key;
        address publisher;
        address token;
        uint88 reward;
        uint256 accuracyPpm;
        Terms terms;
        /// Keys of the cohort, ascending by address; empty while registration is open.
        uint256[] who;
        bytes32[] cohort;
        bytes32 seed;
        /// Aggregators in the order of their turns.
        address[] turns;
        /// Empty task id while there is no block.
        Candidate candidate;
        uint256[] scores;
        uint256 votesNeeded;
        uint256 blocks;
        uint256 refunds;
        /// Sum of the revealed scores and how many.
        uint256 scoreSum;
        uint256 revealed;
        /// A bit per participant: who revealed, who claimed.
        uint256 revealedBits;
        uint256 claimedBits;
        /// The last turn is shorter than the task's window, by the deadline.
        bool isTurnShort;
        /// What went to the publisher or the aggregator's balance, and to participants by claims.
        uint256 credited;
        uint256 claimed;
        Status status;
        Outcome outcome;
    }

    struct Hold {
        uint256 task;
        uint256 end;
        bool isReleased;
    }

    Record[] internal records;
    /// @dev Miners, publishers, the hostile contract, the outsider.
    address[] internal people;
    Hostile internal hostile;
    MannerToken internal coin;
    MannerToken internal shell;
    address[3] internal tokens;

    mapping(address account => uint256) internal deposited;
    mapping(address account => uint256) internal withdrawn;
    mapping(address account => uint256) internal slashed;
    /// @dev Wei that tasks recorded of a stake, task by task, since the last time when none held any; zero once released.
    mapping(address account => Hold[]) internal holds;
    /// @dev Taken from stakes and not credited to anyone yet.
    uint256 internal unallocated;
    /// @dev Ether forced on a contract and tokens sent to it without being asked for.
    mapping(address holder => mapping(address token => uint256)) internal donated;
    /// @dev The first forbidden thing that succeeded.
    string public breach;
    /// @dev How often a call of a function succeeded.
    mapping(bytes4 selector => uint256) public reached;

    function forbid(bool happened, string memory what) internal {
        if (happened && bytes(breach).length == 0) breach = what;
    }

    function try_(address who, address target, uint256 value, bytes memory data) internal returns (bool ok) {
        if (value > 0) vm.deal(who, who.balance + value);
        vm.prank(who);
        (ok,) = target.call{value: value, gas: 30_000_000}(data);
        if (ok) reached[bytes4(data)] += 1;
    }

    /// @dev Whether any task holds stake of the account.
    function isHeld(address account) internal view returns (bool) {
        for (uint256 i = 0; i < holds[account].length; i++) {
            if (time() <= holds[account][i].end) return true;
        }
        return false;
    }

    function bound(uint256 value, uint256 low, uint256 high) internal pure returns (uint256) {
        return low + value % (high - low + 1);
    }

    function latestEnd(Terms memory t) internal pure returns (uint256) {
        return uint256(t.deadline) + t.publisherRevealWindow_s + t.aggregatorRevealWindow_s + t.scoreRevealWindow_s;
    }
}
