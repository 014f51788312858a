// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {accountOf, stakeIn} from "../src/Cohort.sol";
import {vm} from "./Vm.sol";
import {World} from "./World.sol";
import {NaiveStakes} from "./naive/NaiveStakes.sol";

/// @title What choosing names, stakes or blocks is worth in a draw.
/// @notice Statistics over 2 000 draws each. Bounds are such that fair draws pass them with a probability of at most one in a million;
/// the hashes of the test chain's blocks are fixed, so a test that passes passes always. Each draw comes after the end of the task
/// before, so that the stakes are free again.
contract DrawTest is World {
    uint256 private constant DRAWS = 2000;
    /// @dev More than this of 2 000 at 1 %: probability below 10^-6 (binomial).
    uint256 private constant MOST_WINS = 44;

    address private attacker;
    NaiveStakes private naive;

    function setUp() public {
        deploy();
        naive = new NaiveStakes();
    }

    /// @dev Three miners; the attacker has one in a hundred of all stakes.
    function hireAttacker() private {
        hire(3, 0);
        attacker = vm.addr(keys[1]);
        deposit(vm.addr(keys[0]), 49 ether);
        deposit(attacker, 1 ether);
        deposit(vm.addr(keys[2]), 50 ether);
        for (uint256 i = 0; i < 3; i++) {
            address who = vm.addr(keys[i]);
            vm.deal(who, registry.stakeOf(who) + 1 ether);
            vm.prank(who);
            naive.deposit{value: who.balance - 1 ether}();
        }
    }

    function nameOf(uint256 i, uint256 j) private pure returns (string memory) {
        return string.concat(vm.toString(i), ".", vm.toString(j));
    }

    /// @dev Who would win if the seed were made of what is known when registration closes.
    function guess(string memory id, bytes32[] memory cohort) private view returns (address) {
        uint256 total = 0;
        for (uint256 i = 0; i < cohort.length; i++) total += stakeIn(cohort[i]);
        bytes32 known = blockhash(vm.getBlockNumber() - 1);
        uint256 point = uint256(keccak256(abi.encodePacked(id, known))) % total;
        uint256 upTo = 0;
        for (uint256 i = 0; i < cohort.length; i++) {
            upTo += stakeIn(cohort[i]);
            if (point < upTo) return accountOf(cohort[i]);
        }
        return address(0);
    }

    // Grinding works where the seed is known

    function test_naive_namesWinEveryDraw() public {
        hireAttacker();
        for (uint256 i = 0; i < 5; i++) {
            mine(1);
            uint256 j = 0;
            while (naive.draw(nameOf(i, j)) != attacker) j++;
            vm.assertEq(naive.draw(nameOf(i, j)), attacker, "wins");
        }
    }

    function test_naive_topUpsWinEveryDraw() public {
        hireAttacker();
        for (uint256 i = 0; i < 5; i++) {
            mine(1);
            while (naive.draw(vm.toString(i)) != attacker) {
                vm.prank(attacker);
                naive.deposit{value: 1}();
            }
        }
        vm.assertLt(naive.stakeOf(attacker), 1 ether + 10_000, "for a few wei");
    }

    function test_naive_waitingForABlockWinsEveryDraw() public {
        hireAttacker();
        for (uint256 i = 0; i < 5; i++) {
            uint256 waited = 0;
            while (naive.draw(vm.toString(i)) != attacker && waited++ < 5000) mine(1);
            vm.assertEq(naive.draw(vm.toString(i)), attacker, "wins");
        }
    }

    // And is worth nothing here

    function test_namesAreWorthNothing() public {
        hireAttacker();
        uint256 wins = 0;
        bytes32[] memory cohort = cohortOf(applicationsOf("any", keys));
        for (uint256 i = 0; i < DRAWS; i++) {
            pass(11 days);
            uint256 j = 0;
            while (j < 30 && guess(nameOf(i, j), cohort) != attacker) j++;
            publish(nameOf(i, j), 1);
            draw(nameOf(i, j), keys);
            if (aggregatorOf(nameOf(i, j)) == attacker) wins++;
        }
        vm.assertLe(wins, MOST_WINS, "names");
    }

    function test_topUpsAreWorthNothing() public {
        hireAttacker();
        vm.deal(attacker, 1 ether);
        uint256 wins = 0;
        for (uint256 i = 0; i < DRAWS; i++) {
            pass(11 days);
            string memory id = vm.toString(i);
            bytes32[] memory cohort = cohortOf(applicationsOf("any", keys));
            for (uint256 j = 1; j <= 30 && guess(id, cohort) != attacker; j++) cohort[1] = bytes32(uint256(cohort[1]) + 1);
            uint256 more = stakeIn(cohort[1]) - registry.stakeOf(attacker);
            if (more > 0) {
                vm.prank(attacker);
                registry.depositStake{value: more}();
            }
            publish(id, 1);
            draw(id, keys);
            if (aggregatorOf(id) == attacker) wins++;
        }
        vm.assertLe(wins, MOST_WINS, "top-ups");
    }

    /// @dev Whenever it is called, by whomever, in the 256 blocks: the same one.
    function test_theCallersBlockIsWorthNothing() public {
        hireAttacker();
        publish("t", 1);
        bytes32[] memory cohort = close("t", keys);
        (uint40 seedBlock,,,,) = registry.getDraw(keccak256("t"));
        vm.roll(seedBlock + 1);
        bytes32 seed = keccak256(abi.encodePacked("t", blockhash(seedBlock)));
        uint16[3] memory waits = [1, 100, 256];
        for (uint256 i = 0; i < 3; i++) {
            uint256 state = vm.snapshotState();
            vm.roll(seedBlock + waits[i]);
            vm.prank(i == 0 ? attacker : outsider);
            registry.drawAggregator("t", cohort);
            (, bytes32 kept,,,) = registry.getDraw(keccak256("t"));
            vm.assertEq(kept, seed, "seed");
            vm.revertToState(state);
        }
    }

    /// @dev Stakes 1 : 2 : 3 : 4 win as often as they weigh: chi-square with three degrees of freedom, 10^-6 at 30.66. And the
    /// first replacement among those left, given who was first: pooled over the first ones, against its expectation.
    function test_winsAreByStake() public {
        hire(4, 0);
        for (uint256 i = 0; i < 4; i++) deposit(vm.addr(keys[i]), (i + 1) * 1 ether);
        uint256[4] memory first;
        uint256[4] memory second;
        for (uint256 i = 0; i < DRAWS; i++) {
            pass(11 days);
            string memory id = vm.toString(i);
            publish(id, 1);
            bytes32[] memory cohort = draw(id, keys);
            first[placeOf(cohort, aggregatorOf(id))]++;
            vm.prank(aggregatorOf(id));
            registry.resignAggregator(id);
            registry.replaceAggregator(id, cohort);
            second[placeOf(cohort, aggregatorOf(id))]++;
        }
        // P(second = j) = w_j sum over i != j of w_i / (10 - w_i); times 2 000, rounded.
        vm.assertLt(chiSquare(first, [uint256(200), 400, 600, 800]), 30_660, "first");
        vm.assertLt(chiSquare(second, [uint256(269), 483, 617, 632]), 30_660, "second");
    }

    function placeOf(bytes32[] memory cohort, address account) private pure returns (uint256 position) {
        while (accountOf(cohort[position]) != account) position++;
    }

    /// @dev In thousandths.
    function chiSquare(uint256[4] memory seen, uint256[4] memory expected) private pure returns (uint256 sum) {
        for (uint256 i = 0; i < 4; i++) {
            uint256 distance = seen[i] > expected[i] ? seen[i] - expected[i] : expected[i] - seen[i];
            sum += distance * distance * 1000 / expected[i];
        }
    }
}
