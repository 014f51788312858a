// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {BlockMeta} from "../../src/BlockPublisher.sol";
import {accountOf, stakeIn} from "../../src/Cohort.sol";
import {Outcome, Settlement} from "../../src/RewardDistribution.sol";
import {StakeRegistry} from "../../src/StakeRegistry.sol";
import {Status} from "../../src/Task.sol";
import {vm} from "../Vm.sol";
import {Records} from "./Records.sol";

/// @title What must be true at every moment. Each check stands for one invariant.
abstract contract Checks is Records {
    /// @notice 1. The escrow holds the rewards of all open tasks, and what was forced on it: per token, to the wei.
    function checkEscrowSolvency() external view {
        for (uint256 k = 0; k < 3; k++) {
            uint256 sum = donated[address(escrow)][tokens[k]];
            for (uint256 t = 0; t < records.length; t++) {
                Status status = escrow.getTask(records[t].key).status;
                bool isHere = status == Status.Locked || status == Status.Published;
                if (isHere && records[t].token == tokens[k]) sum += records[t].reward;
            }
            vm.assertEq(held(tokens[k], address(escrow)), sum, "escrow solvency");
        }
    }

    /// @notice 2. RewardDistribution holds all balances and all pools: per token, to the wei.
    function checkRewardsSolvency() external view {
        for (uint256 k = 0; k < 3; k++) {
            uint256 sum = donated[address(rewards)][tokens[k]];
            for (uint256 i = 0; i < people.length; i++) sum += rewards.balanceOf(tokens[k], people[i]);
            for (uint256 t = 0; t < records.length; t++) {
                if (records[t].token == tokens[k] && records[t].blocks > 0) {
                    sum += rewards.getSettlement(records[t].id).remaining;
                }
            }
            vm.assertEq(held(tokens[k], address(rewards)), sum, "rewards solvency");
        }
    }

    /// @notice 3. StakeRegistry holds all stakes, requested withdrawals, credits and what is taken but not credited yet.
    function checkRegistrySolvency() external view {
        uint256 sum = donated[address(registry)][address(0)] + unallocated;
        for (uint256 i = 0; i < people.length; i++) {
            (uint256 requested,) = registry.getWithdrawal(people[i]);
            sum += registry.stakeOf(people[i]) + requested + registry.creditOf(people[i]);
        }
        vm.assertEq(address(registry).balance, sum, "registry solvency");
    }

    /// @notice 4. A stake is what was deposited, less requested and paid withdrawals and slashes; what is recorded is within it.
    function checkStakeConservation() external view {
        for (uint256 i = 0; i < people.length; i++) {
            address who = people[i];
            uint256 stake = registry.stakeOf(who);
            (uint256 requested,) = registry.getWithdrawal(who);
            (uint256 recorded,) = registry.getHold(who);
            vm.assertEq(stake + requested + withdrawn[who] + slashed[who], deposited[who], "stake conservation");
            vm.assertLe(recorded, stake, "recorded within the stake");
            vm.assertEq(registry.availableStake(who), stake - recorded, "available");
        }
    }

    /// @notice 5. A reward is in one place: escrow, refunded, or credited + claimed + left in the pool.
    function checkTaskConservation() external view {
        for (uint256 t = 0; t < records.length; t++) {
            Record storage r = records[t];
            Status status = escrow.getTask(r.key).status;
            uint256 pool = r.blocks > 0 ? rewards.getSettlement(r.id).remaining : 0;
            uint256 gone = r.credited + r.claimed + pool;
            vm.assertEq(gone, status == Status.Settled ? r.reward : 0, "task conservation");
            vm.assertEq(r.refunds, status == Status.Refunded ? 1 : 0, "refunds");
        }
    }

    /// @notice 6. At most one block per task; a block excludes a refund.
    function checkOneBlock() external view {
        for (uint256 t = 0; t < records.length; t++) {
            Record storage r = records[t];
            vm.assertLe(r.blocks + r.refunds, 1, "one block, or one refund");
            bool isOnChain = blocks.getBlockMeta(r.key).publishedAt != 0;
            vm.assertEq(isOnChain ? 1 : 0, r.blocks, "block on chain");
        }
    }

    /// @notice 7. Every block has its quorum: of the others of the cohort, less the fault rate, rounded up.
    function checkQuorum() external view {
        for (uint256 t = 0; t < records.length; t++) {
            Record storage r = records[t];
            if (r.blocks == 0) continue;
            BlockMeta memory meta = blocks.getBlockMeta(r.key);
            uint256 most = (r.cohort.length - 1) * 1_000_000;
            vm.assertGe(meta.votes * 1_000_000 + (r.cohort.length - 1) * r.terms.faultRatePpm, most, "quorum");
            vm.assertEq(meta.candidateHash, blocks.candidateHash(r.candidate), "the block that was voted on");
        }
    }

    /// @notice 8. Status and outcome only move forward; see {Handler.note}. The escrow's facts about a task never change.
    function checkMonotone() external view {
        for (uint256 t = 0; t < records.length; t++) {
            Record storage r = records[t];
            vm.assertEq(uint256(escrow.getTask(r.key).status), uint256(r.status), "status as noted");
            vm.assertEq(escrow.getTask(r.key).reward, r.reward, "reward fixed");
            vm.assertEq(escrow.getTask(r.key).publisher, r.publisher, "publisher fixed");
        }
    }

    /// @notice 9. Scores are bounded, counted once, and add up.
    function checkScores() external view {
        for (uint256 t = 0; t < records.length; t++) {
            Record storage r = records[t];
            if (r.blocks == 0) continue;
            Settlement memory s = rewards.getSettlement(r.id);
            vm.assertEq(s.scoreSum, r.scoreSum, "sum of scores");
            vm.assertEq(s.revealedCount, r.revealed, "count of scores");
            vm.assertLe(s.revealedCount, s.participantCount, "more scores than participants");
            vm.assertLe(s.scoreSum, uint256(s.revealedCount) * r.terms.maxScore, "scores within the bound");
        }
    }

    /// @notice 10. The turns follow from seed and cohort, and nobody has two.
    function checkDraw() external view {
        for (uint256 t = 0; t < records.length; t++) {
            Record storage r = records[t];
            uint256 excluded = 0;
            for (uint256 i = 0; i < r.turns.length; i++) {
                bytes32 seed = i == 0 ? r.seed : keccak256(abi.encodePacked(r.seed, excluded));
                uint256 position = drawn(r.cohort, excluded, uint256(seed));
                vm.assertEq(r.turns[i], accountOf(r.cohort[position]), "draw recomputed");
                excluded |= 1 << position;
            }
            (, bytes32 kept,, uint256 replaced,) = registry.getDraw(r.key);
            vm.assertEq(kept, r.seed, "seed fixed");
            vm.assertEq(replaced & ~excluded, 0, "replaced without a turn");
        }
    }

    /// @notice 11. Pools: parts left are those of who has not claimed; no parts left means nothing left.
    function checkPools() external view {
        for (uint256 t = 0; t < records.length; t++) {
            Record storage r = records[t];
            if (r.status != Status.Settled || r.outcome != Outcome.Met) continue;
            Settlement memory s = rewards.getSettlement(r.id);
            uint256 parts = 0;
            for (uint256 i = 0; i < r.scores.length; i++) {
                if (r.claimedBits >> i & 1 == 0) parts += partsOf(r, i);
            }
            vm.assertEq(parts, s.remainingParts, "parts of a pool");
            if (parts == 0) vm.assertEq(s.remaining, 0, "left in an empty pool");
        }
    }

    /// @dev What a participant's claim weighs: its score, or one.
    function partsOf(Record storage r, uint256 position) internal view returns (uint256) {
        if (r.revealed == 0) return 1;
        if (r.revealedBits >> position & 1 == 0) return 0;
        return r.scoreSum == 0 ? 1 : r.scores[position];
    }

    /// @notice 12. Nothing forbidden succeeded: acts of strangers, invented votes, early withdrawals, second payments, calls back.
    function checkNoBreach() external view {
        vm.assertTrue(bytes(breach).length == 0, breach);
        vm.assertEq(hostile.reentered(), 0, "a call back succeeded");
    }

    /// @notice 14. What tasks recorded since none held anything, less what was taken or released, is what the registry says: a
    /// release of an old period frees nothing of a new one. The part of tasks that are not over is there in any case.
    function checkRecordedStakes() external view {
        for (uint256 i = 0; i < people.length; i++) {
            Hold[] storage all = holds[people[i]];
            uint256 sum = 0;
            uint256 needed = 0;
            uint256 end = 0;
            for (uint256 k = 0; k < all.length; k++) {
                uint256 amount = all[k].isReleased ? 0 : neededBy(records[all[k].task], people[i]);
                sum += amount;
                if (time() <= all[k].end) needed += amount;
                if (all[k].end > end) end = all[k].end;
            }
            (uint256 recorded, uint40 heldUntil) = registry.getHold(people[i]);
            vm.assertEq(recorded, isHeld(people[i]) ? sum : 0, "recorded, task by task");
            vm.assertEq(heldUntil, end, "held until the latest end");
            vm.assertLe(needed, registry.stakeOf(people[i]), "recorded stakes are there");
        }
    }

    /// @notice 15. The same from the tasks' side, without periods: whatever a task that is not over recorded, it can still take.
    function checkEveryTaskCanTake() external view {
        for (uint256 i = 0; i < people.length; i++) {
            uint256 needed = 0;
            for (uint256 t = 0; t < records.length; t++) {
                if (time() <= latestEnd(records[t].terms)) needed += neededBy(records[t], people[i]);
            }
            (uint256 recorded,) = registry.getHold(people[i]);
            vm.assertLe(needed, recorded, "held for tasks that are not over");
        }
    }

    /// @notice 16. The bits of reveals and claims are those of who did it, and no others.
    function checkBits() external view {
        for (uint256 t = 0; t < records.length; t++) {
            Record storage r = records[t];
            for (uint256 i = 0; i <= r.scores.length; i++) {
                (bool isRevealed, bool isClaimed) = rewards.isRevealed(r.key, i);
                vm.assertTrue(isRevealed == (r.revealedBits >> i & 1 != 0), "revealed");
                vm.assertTrue(isClaimed == (r.claimedBits >> i & 1 != 0), "claimed");
            }
        }
    }

    function neededBy(Record storage r, address who) internal view returns (uint256) {
        for (uint256 i = 0; i < r.cohort.length; i++) {
            if (accountOf(r.cohort[i]) != who) continue;
            return stakeIn(r.cohort[i]) - registry.getSlash(r.key, i, StakeRegistry.Offence.Silence).amount
                - registry.getSlash(r.key, i, StakeRegistry.Offence.Equivocation).amount;
        }
        return 0;
    }

    /// @dev A second way to walk: cumulative sums, the first that exceeds the point.
    function drawn(bytes32[] storage cohort, uint256 excluded, uint256 seed) internal view returns (uint256 position) {
        uint256[] memory upTo = new uint256[](cohort.length);
        uint256 sum = 0;
        for (uint256 i = 0; i < cohort.length; i++) {
            if (excluded & (1 << i) == 0) sum += stakeIn(cohort[i]);
            upTo[i] = sum;
        }
        while (upTo[position] <= seed % sum) position++;
    }
}
