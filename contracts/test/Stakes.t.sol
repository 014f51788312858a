// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {SafeCast} from "@openzeppelin/contracts/utils/math/SafeCast.sol";
import {accountOf, memberWord} from "../src/Cohort.sol";
import {InvalidRecipient, TransferFailed} from "../src/Payment.sol";
import {Application, StakeRegistry} from "../src/StakeRegistry.sol";
import {DeadlinePast, NotAscending, NotPublisher, OnlyContract, Terms, WrongStatus} from "../src/Task.sol";
import {Hostile} from "./Hostile.sol";
import {vm} from "./Vm.sol";
import {World} from "./World.sol";

contract StakesTest is World {
    address private miner;
    bytes32 private constant KEY = keccak256("t");

    function setUp() public {
        deploy();
        hire(5, 10 ether);
        miner = vm.addr(keys[0]);
    }

    function call(bytes memory data, bytes4 why) private {
        refused(outsider, address(registry), data, why);
    }

    // Stakes

    function test_depositsAndRequests() public {
        refused(miner, address(registry), abi.encodeCall(registry.depositStake, ()), StakeRegistry.ZeroAmount.selector);
        bytes4 why = SafeCast.SafeCastOverflowedUintDowncast.selector;
        refused(miner, address(registry), 2 ** 88, abi.encodeCall(registry.depositStake, ()), why);
        bytes memory tooMuch = abi.encodeCall(registry.requestWithdrawal, (10 ether + 1));
        refused(miner, address(registry), tooMuch, StakeRegistry.InsufficientStake.selector);
        accepted(miner, address(registry), abi.encodeCall(registry.requestWithdrawal, (4 ether)));
        vm.assertEq(registry.availableStake(miner), 6 ether, "available");
        vm.assertEq(registry.stakeOf(miner), 10 ether, "stake");
        pass(DELAY_S - 1);
        accepted(miner, address(registry), abi.encodeCall(registry.requestWithdrawal, (3 ether)));
        (uint256 amount, uint40 withdrawableAt,) = registry.getWithdrawal(miner);
        vm.assertEq(amount, 3 ether, "replaced");
        vm.assertEq(withdrawableAt, time() + DELAY_S, "waits anew");
    }

    function test_withdrawalAfterTheDelay() public {
        bytes memory withdrawal = abi.encodeCall(registry.withdrawStake, (miner));
        refused(miner, address(registry), withdrawal, StakeRegistry.NothingToWithdraw.selector);
        accepted(miner, address(registry), abi.encodeCall(registry.requestWithdrawal, (4 ether)));
        vm.warp(time() + DELAY_S - 1);
        refused(miner, address(registry), withdrawal, StakeRegistry.WithdrawalTooEarly.selector);
        vm.warp(time() + 1);
        bytes memory toZero = abi.encodeCall(registry.withdrawStake, (address(0)));
        refused(miner, address(registry), toZero, InvalidRecipient.selector);
        Hostile hostile = new Hostile();
        hostile.behave(Hostile.Manner.Refuse, "");
        bytes memory toHostile = abi.encodeCall(registry.withdrawStake, (address(hostile)));
        refused(miner, address(registry), toHostile, TransferFailed.selector);
        accepted(miner, address(registry), withdrawal);
        vm.assertEq(miner.balance, 4 ether, "paid");
        refused(miner, address(registry), withdrawal, StakeRegistry.NothingToWithdraw.selector);
        refused(miner, address(registry), abi.encodeCall(registry.withdrawCredit, (miner)), StakeRegistry.NothingToWithdraw.selector);
    }

    function test_aCohortHoldsStakesToTheLatestEnd() public {
        accepted(miner, address(registry), abi.encodeCall(registry.requestWithdrawal, (4 ether)));
        publish("t", 1);
        uint40 end = uint40(time() + 10 days + 6 hours);
        close("t", keys);
        (,, uint40 lockedUntil) = registry.getWithdrawal(miner);
        vm.assertEq(lockedUntil, end, "held");
        // A task that ends earlier does not shorten it.
        Terms memory t = terms();
        t.deadline = uint40(time() + 1 days);
        publish("u", address(0), 1, t);
        for (uint256 i = 0; i < 5; i++) deposit(vm.addr(keys[i]), 1);
        close("u", keys);
        (,, lockedUntil) = registry.getWithdrawal(miner);
        vm.assertEq(lockedUntil, end, "still held");
        vm.warp(end);
        bytes memory withdrawal = abi.encodeCall(registry.withdrawStake, (miner));
        refused(miner, address(registry), withdrawal, StakeRegistry.StakeLocked.selector);
        vm.warp(end + 1);
        accepted(miner, address(registry), withdrawal);
    }

    // Cohort

    function closing(Application[] memory applications) private view returns (bytes memory) {
        return abi.encodeCall(registry.closeRegistration, ("t", applications));
    }

    function test_whoMayCloseRegistrationAndWhen() public {
        Application[] memory all = applicationsOf("t", keys);
        refused(publisher, address(registry), closing(all), WrongStatus.selector);
        publish("t", 1);
        refused(outsider, address(registry), closing(all), NotPublisher.selector);
        close("t", keys);
        refused(publisher, address(registry), closing(all), StakeRegistry.RegistrationIsClosed.selector);
    }

    function test_noCohortAfterTheDeadline() public {
        publish("t", 1);
        Application[] memory all = applicationsOf("t", keys);
        pass(10 days + 1);
        refused(publisher, address(registry), closing(all), DeadlinePast.selector);
    }

    function test_whatMakesACohort() public {
        Terms memory t = terms();
        (t.minMiners, t.maxMiners, t.minStake) = (4, 4, 10 ether);
        publish("t", address(0), 1, t);
        uint256[] memory four = new uint256[](4);
        for (uint256 i = 0; i < 4; i++) four[i] = keys[i];
        bytes4 size = StakeRegistry.CohortSize.selector;
        refused(publisher, address(registry), closing(applicationsOf("t", keys)), size);
        refused(publisher, address(registry), closing(applicationsOf("t", three(keys[0], keys[1], keys[2]))), size);
        Application[] memory all = applicationsOf("t", four);
        (all[1], all[2]) = (all[2], all[1]);
        refused(publisher, address(registry), closing(all), NotAscending.selector);
        all = applicationsOf("t", four);
        all[1] = all[0];
        refused(publisher, address(registry), closing(all), NotAscending.selector);
        all = applicationsOf("u", four);
        refused(publisher, address(registry), closing(all), StakeRegistry.InvalidApplication.selector);
        all = applicationsOf("t", four);
        all[3].encryptionKeyHash = 0;
        refused(publisher, address(registry), closing(all), StakeRegistry.InvalidApplication.selector);
        accepted(miner, address(registry), abi.encodeCall(registry.requestWithdrawal, (1)));
        refused(publisher, address(registry), closing(applicationsOf("t", four)), StakeRegistry.InsufficientStake.selector);
        accepted(miner, address(registry), abi.encodeCall(registry.requestWithdrawal, (0)));
        accepted(publisher, address(registry), closing(applicationsOf("t", four)));
    }

    function test_thePublisherIsNotAMinerOfItsTask() public {
        address former = publisher;
        publisher = vm.addr(keys[1]);
        publish("t", 1);
        bytes4 why = StakeRegistry.PublisherCannotMine.selector;
        refused(publisher, address(registry), closing(applicationsOf("t", keys)), why);
        publisher = former;
    }

    function test_aCohortWithoutStake() public {
        for (uint256 i = 0; i < 3; i++) {
            accepted(vm.addr(keys[i]), address(registry), abi.encodeCall(registry.requestWithdrawal, (10 ether)));
        }
        publish("t", 1);
        Application[] memory poor = applicationsOf("t", three(keys[0], keys[1], keys[2]));
        refused(publisher, address(registry), closing(poor), StakeRegistry.CohortWithoutStake.selector);
    }

    // Draw

    function drawing(bytes32[] memory cohort) private view returns (bytes memory) {
        return abi.encodeCall(registry.drawAggregator, ("t", cohort));
    }

    function test_whenTheDrawIsPossible() public {
        bytes32[] memory none = new bytes32[](0);
        bytes memory move = abi.encodeCall(registry.moveSeed, ("t"));
        call(drawing(none), WrongStatus.selector);
        publish("t", 1);
        call(drawing(none), StakeRegistry.RegistrationIsOpen.selector);
        call(move, StakeRegistry.RegistrationIsOpen.selector);
        bytes32[] memory cohort = close("t", keys);
        call(drawing(cohort), StakeRegistry.SeedNotMined.selector);
        call(move, StakeRegistry.SeedNotMined.selector);
        mine(1);
        call(drawing(cohort), StakeRegistry.SeedNotMined.selector);
        mine(1);
        call(drawing(none), StakeRegistry.WrongCohort.selector);
        call(move, StakeRegistry.SeedAvailable.selector);
        accepted(outsider, address(registry), drawing(cohort));
        call(drawing(cohort), StakeRegistry.AlreadyDrawn.selector);
        call(move, StakeRegistry.AlreadyDrawn.selector);
    }

    function test_theSeedExpiresAndMoves() public {
        publish("t", 1);
        bytes32[] memory cohort = close("t", keys);
        uint256 last = vm.getBlockNumber() + 257;
        vm.roll(last);
        call(abi.encodeCall(registry.moveSeed, ("t")), StakeRegistry.SeedAvailable.selector);
        vm.roll(last + 1);
        call(drawing(cohort), StakeRegistry.SeedExpired.selector);
        accepted(outsider, address(registry), abi.encodeCall(registry.moveSeed, ("t")));
        (uint40 seedBlock,,,,) = registry.getDraw(KEY);
        vm.assertEq(seedBlock, last + 2, "next block");
        call(drawing(cohort), StakeRegistry.SeedNotMined.selector);
        mine(2);
        accepted(outsider, address(registry), drawing(cohort));
        (, bytes32 seed,,,) = registry.getDraw(KEY);
        vm.assertEq(seed, keccak256(abi.encodePacked("t", blockhash(seedBlock))), "seed");
    }

    function test_noDrawAfterTheDeadline() public {
        publish("t", 1);
        bytes32[] memory cohort = close("t", keys);
        mine(2);
        vm.warp(time() + 10 days + 1);
        call(drawing(cohort), DeadlinePast.selector);
    }

    /// @dev A member without stake is never drawn, whatever the seed.
    function test_membersWithoutStakeAreNotDrawn() public {
        for (uint256 i = 0; i < 4; i++) {
            accepted(vm.addr(keys[i]), address(registry), abi.encodeCall(registry.requestWithdrawal, (10 ether)));
        }
        publish("t", 1);
        bytes32[] memory cohort = draw("t", keys);
        vm.assertEq(aggregatorOf("t"), vm.addr(keys[4]), "the one with a stake");
        pass(1 days + 1);
        accepted(outsider, address(registry), abi.encodeCall(registry.replaceAggregator, ("t", cohort)));
        vm.assertEq(aggregatorOf("t"), address(0), "nobody is left");
        bytes memory again = abi.encodeCall(registry.replaceAggregator, ("t", cohort));
        call(again, StakeRegistry.NotDrawn.selector);
    }

    // Turns

    function test_resignation() public {
        publish("t", 1);
        bytes memory resign = abi.encodeCall(registry.resignAggregator, ("t"));
        refused(miner, address(registry), abi.encodeCall(registry.resignAggregator, ("u")), WrongStatus.selector);
        refused(miner, address(registry), resign, StakeRegistry.NotTheTurn.selector);
        bytes32[] memory cohort = draw("t", keys);
        bytes memory replace = abi.encodeCall(registry.replaceAggregator, ("t", cohort));
        address first = aggregatorOf("t");
        call(resign, StakeRegistry.NotTheTurn.selector);
        call(replace, StakeRegistry.TurnNotOver.selector);
        accepted(first, address(registry), resign);
        vm.assertEq(aggregatorOf("t"), address(0), "nobody may publish");
        vm.assertEq(registry.aggregatorAmong("t", cohort), address(0), "nobody may publish");
        refused(first, address(registry), resign, StakeRegistry.NotTheTurn.selector);
        accepted(outsider, address(registry), replace);
        vm.assertEq(registry.stakeOf(first), 10 ether, "loses nothing");
        address second = aggregatorOf("t");
        vm.assertTrue(second != first && second != address(0), "the next");
        (,,,, uint40 turnEnd) = registry.getDraw(KEY);
        vm.warp(turnEnd + 1);
        refused(second, address(registry), resign, StakeRegistry.TurnOver.selector);
    }

    function test_silenceCostsTheAnnouncedPart() public {
        publish("t", 1);
        bytes memory replace = abi.encodeCall(registry.replaceAggregator, ("t", new bytes32[](0)));
        call(replace, StakeRegistry.NotDrawn.selector);
        bytes32[] memory cohort = draw("t", keys);
        address first = aggregatorOf("t");
        (,,,, uint40 turnEnd) = registry.getDraw(KEY);
        vm.warp(turnEnd);
        call(abi.encodeCall(registry.replaceAggregator, ("t", cohort)), StakeRegistry.TurnNotOver.selector);
        vm.warp(turnEnd + 1);
        call(replace, StakeRegistry.WrongCohort.selector);
        accepted(outsider, address(registry), abi.encodeCall(registry.replaceAggregator, ("t", cohort)));
        vm.assertEq(registry.stakeOf(first), 7.5 ether, "a quarter");
        StakeRegistry.Slash memory slash = registry.getSlash(KEY, place(cohort, first), StakeRegistry.Offence.Silence);
        vm.assertEq(slash.amount, 2.5 ether, "taken");
        vm.assertTrue(aggregatorOf("t") != first, "replaced");
    }

    /// @dev All five have their turn, each once; then nobody is left, and the publisher is refunded.
    function test_theLastOneIsSilentToo() public {
        Terms memory t = terms();
        t.publishWindow_s = 1 hours;
        publish("t", address(0), 7, t);
        bytes32[] memory cohort = draw("t", keys);
        uint256 seen = 0;
        for (uint256 i = 0; i < 5; i++) {
            uint256 bit = 1 << place(cohort, aggregatorOf("t"));
            vm.assertEq(seen & bit, 0, "a second turn");
            seen |= bit;
            pass(1 hours + 1);
            accepted(outsider, address(registry), abi.encodeCall(registry.replaceAggregator, ("t", cohort)));
        }
        vm.assertEq(seen, 31, "all had a turn");
        vm.assertEq(aggregatorOf("t"), address(0), "nobody is left");
        pass(10 days);
        accepted(publisher, address(escrow), abi.encodeCall(escrow.refundPublisher, ("t", publisher)));
        vm.assertEq(publisher.balance, 7, "refund");
    }

    /// @dev A turn that ended before the deadline is punished after it too, before and after the refund; nobody follows.
    function test_silentPastTheDeadline() public {
        publish("t", 1);
        bytes32[] memory cohort = draw("t", keys);
        address first = aggregatorOf("t");
        pass(10 days + 5 hours);
        accepted(publisher, address(escrow), abi.encodeCall(escrow.refundPublisher, ("t", publisher)));
        accepted(outsider, address(registry), abi.encodeCall(registry.replaceAggregator, ("t", cohort)));
        vm.assertEq(registry.stakeOf(first), 7.5 ether, "a quarter");
        vm.assertEq(aggregatorOf("t"), address(0), "nobody follows");
    }

    /// @dev Registration closed, or the turn begun, too late for a whole turn: silence costs nothing. A whole turn to the second does.
    function test_aTurnThatTheDeadlineCutsShortCostsNothing() public {
        for (uint256 late = 0; late < 2; late++) {
            string memory id = late == 0 ? "whole" : "short";
            Terms memory t = terms();
            t.publishWindow_s = 1 hours;
            publish(id, address(0), 1, t);
            vm.warp(t.deadline - 1 hours + late);
            bytes32[] memory cohort = draw(id, keys);
            address first = aggregatorOf(id);
            uint256 stake = registry.stakeOf(first);
            vm.warp(t.deadline + 1);
            accepted(outsider, address(registry), abi.encodeCall(registry.replaceAggregator, (id, cohort)));
            vm.assertEq(registry.stakeOf(first), late == 0 ? stake - stake / 4 : stake, "stake");
        }
    }

    function test_noReplacementAfterTheBlock() public {
        (, bytes32[] memory cohort) = block_("t", 1, same(1, 5));
        pass(2 days);
        call(abi.encodeCall(registry.replaceAggregator, ("t", cohort)), WrongStatus.selector);
        refused(aggregatorOf("t"), address(registry), abi.encodeCall(registry.resignAggregator, ("t")), WrongStatus.selector);
    }

    // Slashed parts

    function test_slashingIsForBlockPublisherAlone() public {
        publish("t", 1);
        bytes32[] memory cohort = draw("t", keys);
        address first = aggregatorOf("t");
        address other = accountOf(cohort[place(cohort, first) == 0 ? 1 : 0]);
        bytes memory slash = abi.encodeCall(registry.slashEquivocation, ("t", first, cohort));
        call(slash, OnlyContract.selector);
        bytes4 why = StakeRegistry.WrongCohort.selector;
        refused(address(blocks), address(registry), abi.encodeCall(registry.slashEquivocation, ("t", first, new bytes32[](0))), why);
        why = StakeRegistry.NotTheTurn.selector;
        refused(address(blocks), address(registry), abi.encodeCall(registry.slashEquivocation, ("t", other, cohort)), why);
        refused(address(blocks), address(registry), abi.encodeCall(registry.slashEquivocation, ("t", outsider, cohort)), why);
        accepted(address(blocks), address(registry), slash);
        vm.assertEq(registry.stakeOf(first), 0, "all of it");
        refused(address(blocks), address(registry), slash, StakeRegistry.AlreadySlashed.selector);
    }

    /// @dev 10^18 + 3 wei among four: the first of the others gets the residue too.
    function test_partsOfASlashAndTheirResidue() public {
        Terms memory t = terms();
        t.silencePenaltyPpm = 1_000_000;
        for (uint256 i = 0; i < 5; i++) deposit(vm.addr(keys[i]), 3);
        publish("t", address(0), 1, t);
        bytes32[] memory cohort = draw("t", keys);
        uint256 culprit = place(cohort, aggregatorOf("t"));
        pass(1 days + 1);
        accepted(outsider, address(registry), abi.encodeCall(registry.replaceAggregator, ("t", cohort)));
        StakeRegistry.Offence silence = StakeRegistry.Offence.Silence;
        bytes4 why = StakeRegistry.NotEntitled.selector;
        call(abi.encodeCall(registry.creditSlashed, ("t", cohort, culprit, silence, culprit)), why);
        call(abi.encodeCall(registry.creditSlashed, ("t", cohort, culprit, silence, 5)), why);
        call(abi.encodeCall(registry.creditSlashed, ("t", cohort, (culprit + 1) % 5, silence, culprit)), why);
        call(abi.encodeCall(registry.creditSlashed, ("t", cohort, culprit, StakeRegistry.Offence.Equivocation, 0)), why);
        call(
            abi.encodeCall(registry.creditSlashed, ("t", new bytes32[](0), culprit, silence, 0)),
            StakeRegistry.WrongCohort.selector
        );
        uint256 sum = 0;
        for (uint256 i = 0; i < 5; i++) {
            if (i == culprit) continue;
            bytes memory credit = abi.encodeCall(registry.creditSlashed, ("t", cohort, culprit, silence, i));
            accepted(outsider, address(registry), credit);
            call(credit, why);
            uint256 part = registry.creditOf(accountOf(cohort[i]));
            vm.assertEq(part, 2.5 ether + (i == (culprit == 0 ? 1 : 0) ? 3 : 0), "part");
            sum += part;
            accepted(accountOf(cohort[i]), address(registry), abi.encodeCall(registry.withdrawCredit, (outsider)));
        }
        vm.assertEq(sum, 10 ether + 3, "all of it");
        vm.assertEq(outsider.balance, sum, "paid");
    }

    /// @dev A slash takes from the requested part too, and a request never exceeds what is left.
    function test_aRequestDoesNotSaveAStake() public {
        publish("t", 1);
        bytes32[] memory cohort = draw("t", keys);
        address first = aggregatorOf("t");
        accepted(first, address(registry), abi.encodeCall(registry.requestWithdrawal, (9 ether)));
        accepted(address(blocks), address(registry), abi.encodeCall(registry.slashEquivocation, ("t", first, cohort)));
        (uint256 requested,,) = registry.getWithdrawal(first);
        vm.assertEq(requested, 0, "request");
        vm.assertEq(registry.availableStake(first), 0, "available");
    }

    function place(bytes32[] memory cohort, address account) private pure returns (uint256 position) {
        while (accountOf(cohort[position]) != account) position++;
    }

    /// @dev Words ascend as accounts do, and give back what was put in.
    function testFuzz_memberWords(address a, address b, uint96 x, uint96 y) public pure {
        vm.assume(a < b);
        vm.assertLt(uint256(memberWord(a, x)), uint256(memberWord(b, y)), "order");
        vm.assertEq(accountOf(memberWord(a, x)), a, "account");
    }
}
