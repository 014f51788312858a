// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {Candidate} from "../src/BlockPublisher.sol";
import {InvalidRecipient} from "../src/Payment.sol";
import {Opening, Outcome, RewardDistribution, Settlement} from "../src/RewardDistribution.sol";
import {OnlyContract, Terms} from "../src/Task.sol";
import {MannerToken} from "./Tokens.sol";
import {vm} from "./Vm.sol";
import {World} from "./World.sol";

contract RewardsTest is World {
    bytes32 private constant KEY = keccak256("t");
    Candidate private c;

    function setUp() public {
        deploy();
        hire(5, 10 ether);
    }

    /// @dev A block with these scores, nothing revealed.
    function blockWith(uint256[] memory scores) private {
        (Candidate memory made,) = block_("t", 1000, scores);
        c = made;
    }

    function no(address who, bytes memory data, bytes4 why) private {
        refused(who, address(rewards), data, why);
    }

    function opening(uint256 accuracy, bytes32 salt) private view returns (bytes memory) {
        return abi.encodeCall(rewards.revealAccuracy, ("t", accuracy, salt));
    }

    function distributing() private view returns (bytes memory) {
        return abi.encodeCall(rewards.distribute, ("t"));
    }

    function scoreOf(uint256 position, uint256 score) private view returns (bytes memory) {
        return abi.encodeCall(rewards.revealScore, ("t", openingOf(c, position, score)));
    }

    function claiming(address token, Opening memory opened) private view returns (bytes memory) {
        return abi.encodeCall(rewards.claimTo, ("t", token, address(0xCAFE), opened));
    }

    function outcomeIs(Outcome expected) private view {
        vm.assertEq(uint256(rewards.getSettlement("t").outcome), uint256(expected), "outcome");
    }

    /// @dev What the five and the aggregator get.
    function takeAll(uint256 score) private returns (uint256 sum) {
        for (uint256 i = 0; i < 5; i++) sum += claim(c, i, score);
        sum += withdraw(c.aggregator, address(0));
    }

    // The requirement

    function test_nothingWithoutABlock() public {
        publish("t", 1);
        bytes4 why = RewardDistribution.NoBlock.selector;
        no(publisher, opening(ACCURACY_PPM, SALT), why);
        no(outsider, distributing(), why);
        no(outsider, abi.encodeCall(rewards.openScores, ("t")), why);
        no(outsider, abi.encodeCall(rewards.getSettlement, ("t")), why);
        no(outsider, abi.encodeCall(rewards.revealScore, ("t", Opening(1, SALT, 0, new bytes32[](0)))), why);
        refused(outsider, address(rewards), 1, "", OnlyContract.selector);
    }

    function test_thePublishersWindow() public {
        blockWith(same(1, 5));
        no(outsider, opening(ACCURACY_PPM, SALT), RewardDistribution.NotEntitled.selector);
        no(c.aggregator, opening(ACCURACY_PPM, SALT), RewardDistribution.RevealTooEarly.selector);
        no(publisher, opening(ACCURACY_PPM - 1, SALT), RewardDistribution.InvalidReveal.selector);
        no(publisher, opening(ACCURACY_PPM, 0), RewardDistribution.InvalidReveal.selector);
        vm.warp(time() + 1 hours);
        no(c.aggregator, opening(ACCURACY_PPM, SALT), RewardDistribution.RevealTooEarly.selector);
        accepted(publisher, address(rewards), opening(ACCURACY_PPM, SALT));
        outcomeIs(Outcome.Met);
        no(publisher, opening(ACCURACY_PPM, SALT), RewardDistribution.AccuracyAlreadyRevealed.selector);
        no(outsider, abi.encodeCall(rewards.openScores, ("t")), RewardDistribution.ScoresAlreadyOpen.selector);
    }

    function test_theAggregatorsWindow() public {
        blockWith(same(1, 5));
        vm.warp(time() + 1 hours + 1);
        no(publisher, opening(ACCURACY_PPM, SALT), RewardDistribution.RevealTooLate.selector);
        vm.warp(time() + 2 hours - 1);
        no(outsider, distributing(), RewardDistribution.OutcomePending.selector);
        no(outsider, abi.encodeCall(rewards.openScores, ("t")), RewardDistribution.OutcomePending.selector);
        accepted(c.aggregator, address(rewards), opening(ACCURACY_PPM, SALT));
        vm.assertEq(rewards.getSettlement("t").scoreRevealEnd, time() + 3 hours, "window of the scores");
        vm.assertFalse(rewards.getSettlement("t").isShareForfeited, "share");
    }

    function test_silenceOpensTheScoresByItself() public {
        blockWith(same(1, 5));
        uint256 end = time() + 3 hours;
        vm.warp(end + 1);
        no(c.aggregator, opening(ACCURACY_PPM, SALT), RewardDistribution.RevealTooLate.selector);
        outcomeIs(Outcome.Met);
        vm.assertTrue(rewards.getSettlement("t").isShareForfeited, "seen before it is recorded");
        accepted(outsider, address(rewards), abi.encodeCall(rewards.openScores, ("t")));
        Settlement memory s = rewards.getSettlement("t");
        vm.assertTrue(s.isShareForfeited, "share");
        vm.assertEq(s.scoreRevealEnd, end + 3 hours, "the window does not wait for the call");
        accepted(c.participants[0], address(rewards), scoreOf(0, 1));
        vm.warp(s.scoreRevealEnd + 1);
        no(c.participants[1], scoreOf(1, 1), RewardDistribution.RevealTooLate.selector);
        accepted(outsider, address(rewards), distributing());
        vm.assertEq(claim(c, 0, 1), 1000, "all to the one who revealed");
    }

    function test_theFirstScoreAfterSilenceOpensTheScores() public {
        blockWith(same(1, 5));
        vm.warp(time() + 3 hours + 1);
        accepted(c.participants[2], address(rewards), scoreOf(2, 1));
        outcomeIs(Outcome.Met);
    }

    function test_belowTheRequirementThePublisherIsRefunded() public {
        Terms memory t = terms();
        vm.deal(publisher, 1000);
        vm.prank(publisher);
        escrow.publishTask{value: 1000}("t", commitOf(950_001), 0, address(0), 1000, t);
        (Candidate memory made,) = blockOf("t", same(1, 5));
        c = made;
        accepted(publisher, address(rewards), opening(950_001, SALT));
        outcomeIs(Outcome.Unmet);
        no(c.participants[0], scoreOf(0, 1), RewardDistribution.RequirementUnmet.selector);
        no(outsider, abi.encodeCall(rewards.openScores, ("t")), RewardDistribution.RequirementUnmet.selector);
        no(publisher, opening(950_001, SALT), RewardDistribution.AccuracyAlreadyRevealed.selector);
        accepted(outsider, address(rewards), distributing());
        no(outsider, distributing(), RewardDistribution.AlreadyDistributed.selector);
        no(c.participants[0], claiming(address(0), openingOf(c, 0, 1)), RewardDistribution.NotDistributed.selector);
        vm.assertEq(withdraw(publisher, address(0)), 1000, "refund");
    }

    /// @dev correct / total is compared with the requirement without rounding.
    function testFuzz_theRequirementToThePart(uint32 correct, uint32 total, uint256 required) public {
        total = total % 4_000_000 + 1;
        correct = correct % (total + 1);
        required = required % 1_000_001;
        vm.deal(publisher, 10);
        vm.prank(publisher);
        escrow.publishTask{value: 10}("t", commitOf(required), 0, address(0), 10, terms());
        bytes32[] memory cohort = draw("t", keys);
        Candidate memory made = candidateOf("t", keys, same(1, 5));
        (made.correct, made.total) = (correct, total);
        bytes memory publication = abi.encodeCall(blocks.publishBlock, (made, votesOf(made, keys), cohort));
        accepted(made.aggregator, address(blocks), publication);
        accepted(publisher, address(rewards), opening(required, SALT));
        bool isMet = uint256(correct) * 1e6 >= required * total;
        outcomeIs(isMet ? Outcome.Met : Outcome.Unmet);
    }

    function test_anImpossibleRequirement() public {
        uint256[2] memory impossible = [uint256(1_000_001), type(uint256).max];
        for (uint256 i = 0; i < 2; i++) {
            restock(10 ether);
            vm.deal(publisher, 1000);
            vm.prank(publisher);
            string memory id = i == 0 ? "t" : "u";
            escrow.publishTask{value: 1000}(id, commitOf(impossible[i]), 0, address(0), 1000, terms());
            (Candidate memory made,) = blockOf(id, same(1, 5));
            bytes memory open = abi.encodeCall(rewards.revealAccuracy, (id, impossible[i], SALT));
            no(publisher, open, RewardDistribution.InvalidReveal.selector);
            pass(1 hours + 1);
            accepted(made.aggregator, address(rewards), open);
            vm.assertEq(uint256(rewards.getSettlement(id).outcome), uint256(Outcome.Met), "counts as met");
        }
    }

    // Scores

    function test_scoresAreOpenedOnceAsCommitted() public {
        blockWith(same(1_000_000, 5));
        no(c.participants[0], scoreOf(0, 1_000_000), RewardDistribution.OutcomePending.selector);
        reveal("t");
        no(c.participants[0], scoreOf(0, 999_999), RewardDistribution.NotParticipant.selector);
        no(c.participants[0], scoreOf(0, 1_000_001), RewardDistribution.ScoreTooLarge.selector);
        no(c.participants[1], scoreOf(0, 1_000_000), RewardDistribution.NotParticipant.selector);
        no(outsider, scoreOf(0, 1_000_000), RewardDistribution.NotParticipant.selector);
        accepted(c.participants[0], address(rewards), scoreOf(0, 1_000_000));
        no(c.participants[0], scoreOf(0, 1_000_000), RewardDistribution.ScoreAlreadyRevealed.selector);
        (bool isRevealed, bool isClaimed) = rewards.isRevealed(KEY, 0);
        vm.assertTrue(isRevealed && !isClaimed, "revealed");
        vm.assertEq(rewards.getSettlement("t").scoreSum, 1_000_000, "score");
        (isRevealed,) = rewards.isRevealed(KEY, 1);
        vm.assertFalse(isRevealed, "not revealed");
        no(outsider, distributing(), RewardDistribution.ScoresStillOpen.selector);
        vm.warp(rewards.getSettlement("t").scoreRevealEnd);
        accepted(c.participants[1], address(rewards), scoreOf(1, 1_000_000));
        no(outsider, distributing(), RewardDistribution.ScoresStillOpen.selector);
        vm.warp(time() + 1);
        no(c.participants[2], scoreOf(2, 1_000_000), RewardDistribution.RevealTooLate.selector);
        accepted(outsider, address(rewards), distributing());
    }

    function test_allRevealedEndsTheWindow() public {
        blockWith(same(1, 5));
        settle(c, same(1, 5));
        vm.assertEq(takeAll(1), 1000, "everybody");
    }

    function test_zeroScoresShareEqually() public {
        blockWith(same(0, 5));
        reveal("t");
        revealScore(c, 1, 0);
        revealScore(c, 4, 0);
        pass(3 hours + 1);
        rewards.distribute("t");
        vm.assertEq(rewards.claimable(KEY, address(0), 0, 0), 0, "not revealed");
        vm.assertEq(rewards.claimable(KEY, address(0), 1, 0), 450, "half of the pool");
        vm.assertEq(rewards.claimable(KEY, address(0), 9, 0), 0, "no such place");
        vm.assertEq(takeAll(0), 1000, "pool and share");
        vm.assertEq(address(rewards).balance, 0, "left behind");
    }

    function test_nobodyReveals() public {
        blockWith(same(7, 5));
        reveal("t");
        pass(3 hours + 1);
        vm.assertEq(rewards.claimable(KEY, address(0), 0, 7), 0, "before the distribution");
        rewards.distribute("t");
        vm.assertEq(rewards.claimable(KEY, address(0), 3, 7), 180, "a fifth of the pool");
        vm.assertEq(takeAll(7), 1000, "pool and share");
    }

    /// @dev The bits of reveals and claims at the first, the last and the next to the last place of the largest cohort.
    function test_everyPlaceHasItsOwnBits() public {
        hire(195, 1 ether);
        uint256[] memory scores = same(1, 200);
        blockWith(scores);
        reveal("t");
        uint256[3] memory places = [uint256(0), 198, 199];
        for (uint256 k = 0; k < 3; k++) revealScore(c, places[k], 1);
        pass(3 hours + 1);
        rewards.distribute("t");
        for (uint256 k = 0; k < 3; k++) {
            vm.assertEq(claim(c, places[k], 1), 300, "a third of the pool");
            no(c.participants[places[k]], claiming(address(0), openingOf(c, places[k], 1)), k == 2
                ? RewardDistribution.NotDistributed.selector
                : RewardDistribution.AlreadyClaimed.selector);
        }
        uint256 count = 0;
        for (uint256 i = 0; i < 256; i++) {
            (bool isRevealed, bool isClaimed) = rewards.isRevealed(KEY, i);
            vm.assertTrue(isRevealed == isClaimed, "another place");
            if (isClaimed) count++;
        }
        vm.assertEq(count, 3, "three bits");
    }

    /// @dev Nobody revealed: all may claim, the score that the commitment holds may even be above the bound.
    function test_claimsAmongAllNeedTheCommitmentOnly() public {
        uint256[] memory scores = same(7, 5);
        scores[2] = type(uint256).max;
        blockWith(scores);
        reveal("t");
        no(c.participants[2], scoreOf(2, scores[2]), RewardDistribution.ScoreTooLarge.selector);
        pass(3 hours + 1);
        rewards.distribute("t");
        no(c.participants[2], claiming(address(0), openingOf(c, 2, 7)), RewardDistribution.NotParticipant.selector);
        vm.assertEq(claim(c, 2, scores[2]), 180, "a fifth");
        no(c.participants[2], claiming(address(0), openingOf(c, 2, scores[2])), RewardDistribution.AlreadyClaimed.selector);
        no(c.participants[1], scoreOf(1, 7), RewardDistribution.RevealTooLate.selector);
    }

    /// @dev One revealed: the others' claims are worth nothing, and do not touch the pool.
    function test_claimsWithoutARevealGetNothing() public {
        blockWith(same(7, 5));
        reveal("t");
        revealScore(c, 4, 7);
        pass(3 hours + 1);
        rewards.distribute("t");
        for (uint256 i = 0; i < 4; i++) vm.assertEq(claim(c, i, 7), 0, "not revealed");
        vm.assertEq(claim(c, 4, 7), 900, "all of the pool");
    }

    // Claims

    function test_claimsThatAreRefused() public {
        blockWith(same(1, 5));
        address first = c.participants[0];
        bytes memory claim_ = claiming(address(0), openingOf(c, 0, 1));
        no(first, claim_, RewardDistribution.NotDistributed.selector);
        reveal("t");
        no(first, claim_, RewardDistribution.NotDistributed.selector);
        for (uint256 i = 0; i < 5; i++) revealScore(c, i, 1);
        rewards.distribute("t");
        no(outsider, claim_, RewardDistribution.NotParticipant.selector);
        no(c.participants[1], claim_, RewardDistribution.NotParticipant.selector);
        no(first, claiming(address(0), openingOf(c, 0, 2)), RewardDistribution.NotParticipant.selector);
        no(first, claiming(address(0x7), openingOf(c, 0, 1)), RewardDistribution.NotDistributed.selector);
        bytes memory toZero = abi.encodeCall(rewards.claimTo, ("t", address(0), address(0), openingOf(c, 0, 1)));
        no(first, toZero, InvalidRecipient.selector);
        accepted(first, address(rewards), claim_);
        no(first, claim_, RewardDistribution.AlreadyClaimed.selector);
        vm.assertEq(rewards.claimable(KEY, address(0), 0, 1), 0, "paid");
        bytes memory withdrawal = abi.encodeCall(rewards.withdrawTo, (address(0), outsider));
        no(outsider, withdrawal, RewardDistribution.NothingToWithdraw.selector);
    }

    /// @dev Balances of all tasks come at once, in one token at a time.
    function test_theBalanceOfAllTasks() public {
        MannerToken token = new MannerToken();
        token.mint(publisher, 1000);
        vm.prank(publisher);
        token.approve(address(escrow), 1000);
        uint256 shares = 0;
        for (uint256 k = 0; k < 3; k++) {
            string memory id = vm.toString(k);
            publish(id, k == 2 ? address(token) : address(0), 1000, terms());
            (Candidate memory made,) = blockOf(id, same(1, 5));
            settle(made, same(1, 5));
            restock(10 ether);
            if (k < 2) shares += made.aggregator == vm.addr(keys[0]) ? 100 : 0;
            else vm.assertEq(withdraw(made.aggregator, address(token)), 100, "in tokens");
        }
        uint256 paid = 0;
        for (uint256 i = 0; i < 5; i++) {
            address who = vm.addr(keys[i]);
            uint256 owed = rewards.balanceOf(address(0), who);
            if (owed > 0) vm.assertEq(withdraw(who, address(0)), owed, "in ether");
            if (i == 0) vm.assertEq(owed, shares, "of both tasks");
            paid += owed;
        }
        vm.assertEq(paid, 200, "both shares");
    }

    function test_tokensThatRefuseForAWhile() public {
        MannerToken token = new MannerToken();
        token.mint(publisher, 1000);
        vm.prank(publisher);
        token.approve(address(escrow), 1000);
        publish("t", address(token), 1000, terms());
        (Candidate memory made,) = blockOf("t", same(1, 5));
        reveal("t");
        for (uint256 i = 0; i < 5; i++) revealScore(made, i, 1);
        token.behave(MannerToken.Manner.Paused);
        no(outsider, distributing(), bytes4(keccak256("Error(string)")));
        token.behave(MannerToken.Manner.Good);
        rewards.distribute("t");
        token.behave(MannerToken.Manner.False);
        bytes memory claim = claiming(address(token), openingOf(made, 0, 1));
        no(made.participants[0], claim, bytes4(keccak256("SafeERC20FailedOperation(address)")));
        vm.assertEq(rewards.claimable(KEY, address(token), 0, 1), 180, "kept");
        token.behave(MannerToken.Manner.Silent);
        accepted(made.participants[0], address(rewards), claim);
        vm.assertGe(token.balanceOf(address(0xCAFE)), 180, "paid");
    }
}
