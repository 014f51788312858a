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
        vm.assertEq(registry.stakeOf(miner), 6 ether, "out of the stake at once");
        pass(DELAY_S - 1);
        // What was requested counts again for a request that replaces it.
        refused(miner, address(registry), tooMuch, StakeRegistry.InsufficientStake.selector);
        accepted(miner, address(registry), abi.encodeCall(registry.requestWithdrawal, (7 ether)));
        (uint256 amount, uint40 withdrawableAt) = registry.getWithdrawal(miner);
        vm.assertEq(amount, 7 ether, "replaced");
        vm.assertEq(withdrawableAt, time() + DELAY_S, "waits anew");
        vm.assertEq(registry.stakeOf(miner), 3 ether, "the rest");
        accepted(miner, address(registry), abi.encodeCall(registry.requestWithdrawal, (0)));
        vm.assertEq(registry.stakeOf(miner), 10 ether, "cancelled");
        pass(DELAY_S);
        bytes memory withdrawal = abi.encodeCall(registry.withdrawStake, (miner));
        refused(miner, address(registry), withdrawal, StakeRegistry.NothingToWithdraw.selector);
    }

    /// @dev A cancelled request does not overflow the stake's word, as a deposit does not.
    function test_aCancelledRequestNeverShortensTheStake() public {
        deposit(miner, 2 ** 88 - 1 - 10 ether);
        accepted(miner, address(registry), abi.encodeCall(registry.requestWithdrawal, (2 ** 88 - 1)));
        deposit(miner, 5);
        bytes memory cancel = abi.encodeCall(registry.requestWithdrawal, (0));
        refused(miner, address(registry), cancel, SafeCast.SafeCastOverflowedUintDowncast.selector);
        vm.assertEq(registry.stakeOf(miner), 5, "stake");
        accepted(miner, address(registry), abi.encodeCall(registry.requestWithdrawal, (5)));
        vm.assertEq(registry.stakeOf(miner), 2 ** 88 - 1, "all but five");
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

    // Holds

    function holdIs(uint256 recorded, uint256 heldUntil) private view {
        (uint256 amount, uint40 until) = registry.getHold(miner);
        vm.assertEq(amount, recorded, "recorded");
        vm.assertEq(until, heldUntil, "held until");
        vm.assertEq(registry.availableStake(miner), registry.stakeOf(miner) - recorded, "available");
    }

    function stakesOf(string memory id, uint88 stake) private view returns (Application[] memory all) {
        all = new Application[](5);
        for (uint256 i = 0; i < 5; i++) all[i] = applicationOf(id, keys[i], stake);
    }

    function publishFor(string memory id, uint256 seconds_) private returns (uint40 end) {
        Terms memory t = terms();
        t.deadline = uint40(time() + seconds_);
        publish(id, address(0), 1, t);
        return t.deadline + 6 hours;
    }

    function releasing(string memory id, bytes32[] memory cohort, uint256 position) private view returns (bytes memory) {
        return abi.encodeCall(registry.releaseStake, (id, cohort, position));
    }

    function test_aCohortHoldsStakesToTheLatestEnd() public {
        uint40 end = publishFor("t", 10 days);
        close("t", stakesOf("t", 6 ether));
        holdIs(6 ether, end);
        // A task that ends earlier does not shorten it, and records of what is left.
        publishFor("u", 1 days);
        close("u", stakesOf("u", 3 ether));
        holdIs(9 ether, end);
        bytes memory tooMuch = abi.encodeCall(registry.requestWithdrawal, (1 ether + 1));
        refused(miner, address(registry), tooMuch, StakeRegistry.InsufficientStake.selector);
        vm.warp(end);
        refused(miner, address(registry), tooMuch, StakeRegistry.InsufficientStake.selector);
        vm.warp(end + 1);
        holdIs(0, end);
        accepted(miner, address(registry), abi.encodeCall(registry.requestWithdrawal, (10 ether)));
    }

    /// @dev What no task holds leaves after the delay, whatever is held; a request made before backs no task.
    function test_onlyAvailableStakeLeavesWhileOtherIsHeld() public {
        accepted(miner, address(registry), abi.encodeCall(registry.requestWithdrawal, (4 ether)));
        uint40 end = publishFor("t", 10 days);
        Application[] memory all = stakesOf("t", 6 ether + 1);
        bytes memory closing_ = abi.encodeCall(registry.closeRegistration, ("t", all));
        refused(publisher, address(registry), closing_, StakeRegistry.InsufficientStake.selector);
        close("t", stakesOf("t", 5 ether));
        pass(DELAY_S);
        accepted(miner, address(registry), abi.encodeCall(registry.withdrawStake, (miner)));
        vm.assertEq(miner.balance, 4 ether, "paid");
        holdIs(5 ether, end);
        // A request replaced while stake is held never reaches into it.
        accepted(miner, address(registry), abi.encodeCall(registry.requestWithdrawal, (1 ether)));
        bytes memory more = abi.encodeCall(registry.requestWithdrawal, (1 ether + 1));
        refused(miner, address(registry), more, StakeRegistry.InsufficientStake.selector);
        accepted(miner, address(registry), abi.encodeCall(registry.requestWithdrawal, (0)));
        holdIs(5 ether, end);
    }

    function test_theSignedStakeIsRecordedExactly() public {
        Terms memory t = terms();
        t.minStake = 2 ether;
        publish("t", address(0), 1, t);
        bytes4 why = StakeRegistry.InsufficientStake.selector;
        refused(publisher, address(registry), closing(stakesOf("t", 2 ether - 1)), why);
        refused(publisher, address(registry), closing(stakesOf("t", 10 ether + 1)), why);
        Application[] memory all = stakesOf("t", 3 ether);
        all[4].stake = 4 ether;
        refused(publisher, address(registry), closing(all), StakeRegistry.InvalidApplication.selector);
        all[4] = applicationOf("t", keys[4], 2 ether);
        bytes32[] memory cohort = close("t", all);
        (,, bytes32 cohortHash,,) = registry.getDraw(KEY);
        vm.assertEq(cohortHash, keccak256(abi.encodePacked(cohort)), "the stakes that were signed");
        (uint256 recorded,) = registry.getHold(vm.addr(keys[4]));
        vm.assertEq(recorded, 2 ether, "recorded");
        // The rest backs another task.
        publish("u", 1);
        close("u", stakesOf("u", 7 ether));
        holdIs(10 ether, time() + 10 days + 6 hours);
    }

    function test_releaseAfterTheLatestEndOnlyAndOnce() public {
        uint40 shortEnd = publishFor("t", 1 days);
        bytes32[] memory cohort = close("t", stakesOf("t", 4 ether));
        uint40 end = publishFor("u", 10 days);
        close("u", stakesOf("u", 5 ether));
        vm.warp(shortEnd);
        call(releasing("t", cohort, 0), StakeRegistry.StakeHeld.selector);
        vm.warp(shortEnd + 1);
        call(releasing("u", cohort, 0), StakeRegistry.WrongCohort.selector);
        call(releasing("unknown", new bytes32[](0), 0), StakeRegistry.WrongCohort.selector);
        call(releasing("t", cohort, 5), StakeRegistry.NotEntitled.selector);
        call(releasing("t", cohort, 256), StakeRegistry.NotEntitled.selector);
        holdIs(9 ether, end);
        accepted(outsider, address(registry), releasing("t", cohort, 0));
        holdIs(5 ether, end);
        call(releasing("t", cohort, 0), StakeRegistry.NotEntitled.selector);
        accepted(outsider, address(registry), releasing("t", cohort, 4));
        vm.warp(end + 1);
        // All of it is free already.
        call(releasing("t", cohort, 1), StakeRegistry.NotEntitled.selector);
        holdIs(0, end);
    }

    /// @dev Old and new period: a task that ended before the period frees nothing of it, however the stake was taken in between.
    function test_aReleaseOfAnOldPeriodFreesNothingOfANewOne() public {
        uint40 oldEnd = publishFor("t", 1 days);
        bytes32[] memory cohort = close("t", stakesOf("t", 4 ether));
        vm.warp(oldEnd + 1);
        uint40 end = publishFor("u", 1 days);
        bytes32[] memory second = close("u", stakesOf("u", 10 ether));
        for (uint256 i = 0; i < 5; i++) call(releasing("t", cohort, i), StakeRegistry.NotEntitled.selector);
        holdIs(10 ether, end);
        vm.warp(end + 1);
        call(releasing("u", second, 0), StakeRegistry.NotEntitled.selector);
        // A third one begins in the last second of a period: it belongs to it, and is released from it.
        publishFor("v", 1 days);
        bytes32[] memory third = close("v", stakesOf("v", 3 ether));
        vm.warp(end + 1 days + 6 hours + 1);
        uint40 last = publishFor("w", 1 days);
        close("w", stakesOf("w", 2 ether));
        holdIs(5 ether, last);
        vm.warp(time() + 1);
        accepted(outsider, address(registry), releasing("v", third, 0));
        holdIs(2 ether, last);
    }

    /// @dev What a slash took is not given back a second time.
    function test_aReleaseAfterASlash() public {
        publishFor("t", 3 days);
        publisherDraws("t", 4 ether);
        address first = aggregatorOf("t");
        bytes32[] memory cohort = cohortOf(stakesOf("t", 4 ether));
        pass(1 days + 1);
        accepted(outsider, address(registry), abi.encodeCall(registry.replaceAggregator, ("t", cohort)));
        publishFor("u", 10 days);
        close("u", stakesOf("u", 5 ether));
        accepted(address(blocks), address(registry), abi.encodeCall(registry.slashEquivocation, ("t", first, cohort)));
        vm.assertEq(registry.stakeOf(first), 6 ether, "all that was recorded");
        (uint256 recorded,) = registry.getHold(first);
        vm.assertEq(recorded, 5 ether, "the other task's");
        pass(3 days);
        accepted(outsider, address(registry), releasing("t", cohort, place(cohort, first)));
        (recorded,) = registry.getHold(first);
        vm.assertEq(recorded, 5 ether, "nothing was left to release");
        vm.assertEq(registry.availableStake(first), 1 ether, "available");
    }

    function publisherDraws(string memory id, uint88 stake) private {
        bytes32[] memory cohort = close(id, stakesOf(id, stake));
        mine(2);
        registry.drawAggregator(id, cohort);
    }

    /// @dev For any stakes and lengths of two overlapping tasks: the two are recorded, and the first alone is released.
    function testFuzz_twoHolds(uint88 stake, uint88 a, uint88 b, uint24 longer) public {
        stake = uint88(stake % 1e26 + 1);
        a = uint88(a % (uint256(stake) + 1));
        b = uint88(b % (uint256(stake) - a + 1));
        vm.assume(a > 0 && b > 0);
        for (uint256 i = 0; i < 5; i++) deposit(vm.addr(keys[i]), stake);
        uint40 first = publishFor("t", 1 days);
        bytes32[] memory cohort = close("t", stakesOf("t", a));
        uint40 end = publishFor("u", 1 days + 1 + uint256(longer));
        close("u", stakesOf("u", b));
        holdIs(uint256(a) + b, end);
        vm.warp(first + 1);
        accepted(outsider, address(registry), releasing("t", cohort, 0));
        holdIs(b, end);
        uint256 most = registry.stakeOf(miner) - b;
        bytes memory tooMuch = abi.encodeCall(registry.requestWithdrawal, (most + 1));
        refused(miner, address(registry), tooMuch, StakeRegistry.InsufficientStake.selector);
        accepted(miner, address(registry), abi.encodeCall(registry.requestWithdrawal, (most)));
        holdIs(b, end);
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
        all = applicationsOf("t", four);
        accepted(miner, address(registry), abi.encodeCall(registry.requestWithdrawal, (1)));
        refused(publisher, address(registry), closing(all), StakeRegistry.InsufficientStake.selector);
        accepted(miner, address(registry), abi.encodeCall(registry.requestWithdrawal, (0)));
        accepted(publisher, address(registry), closing(all));
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

    /// @dev What a task recorded cannot be requested, and a slash leaves nothing of it.
    function test_aRequestDoesNotSaveAStake() public {
        publish("t", 1);
        bytes32[] memory cohort = draw("t", keys);
        address first = aggregatorOf("t");
        bytes memory request = abi.encodeCall(registry.requestWithdrawal, (1));
        refused(first, address(registry), request, StakeRegistry.InsufficientStake.selector);
        accepted(address(blocks), address(registry), abi.encodeCall(registry.slashEquivocation, ("t", first, cohort)));
        (uint256 requested,) = registry.getWithdrawal(first);
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
