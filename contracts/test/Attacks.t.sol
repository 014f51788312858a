// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {BlockPublisher, Candidate, Vote} from "../src/BlockPublisher.sol";
import {accountOf} from "../src/Cohort.sol";
import {HealChainEscrow} from "../src/HealChainEscrow.sol";
import {Opening, RewardDistribution} from "../src/RewardDistribution.sol";
import {Application, StakeRegistry} from "../src/StakeRegistry.sol";
import {NotAscending, Terms, WrongStatus} from "../src/Task.sol";
import {Hostile} from "./Hostile.sol";
import {MannerToken} from "./Tokens.sol";
import {vm} from "./Vm.sol";
import {World} from "./World.sol";
import {NaiveHolds} from "./naive/NaiveHolds.sol";
import {NaivePool, Token} from "./naive/NaivePool.sol";
import {NaiveStakes} from "./naive/NaiveStakes.sol";
import {NaiveTask} from "./naive/NaiveTask.sol";
import {NaiveVotes} from "./naive/NaiveVotes.sol";

/// @title Every attack twice: test_naive_* shows that it works on a contract that does not defend itself, test_* that it fails here.
contract AttacksTest is World {
    NaiveTask private naive;
    NaiveVotes private ballot;
    NaivePool private pool;
    NaiveStakes private stakes;
    NaiveHolds private holds;
    bytes32[] private cohort;
    Candidate private c;

    function setUp() public {
        deploy();
        hire(5, 10 ether);
        naive = new NaiveTask();
        ballot = new NaiveVotes();
        pool = new NaivePool();
        stakes = new NaiveStakes();
        holds = new NaiveHolds();
        vm.deal(publisher, 2000);
        vm.prank(publisher);
        naive.publishTask{value: 1000}("t");
    }

    function miner(uint256 i) private view returns (address) {
        return vm.addr(keys[i]);
    }

    function naiveScore(address who, uint256 score) private {
        vm.prank(who);
        naive.revealScore("t", score);
    }

    /// @dev Task "t" with an aggregator, and its candidate.
    function drawn() private {
        publish("t", 1000);
        cohort = draw("t", keys);
        c = candidateOf("t", keys, same(1, 5));
    }

    function published() private {
        published(same(1, 5));
    }

    function published(uint256[] memory scores) private {
        (Candidate memory made, bytes32[] memory members) = block_("t", 1000, scores);
        (c, cohort) = (made, members);
    }

    function publication(Vote[] memory votes) private view returns (bytes memory) {
        return abi.encodeCall(blocks.publishBlock, (c, votes, cohort));
    }

    // A stranger publishes first and is paid

    function test_naive_strangerPublishesFirst() public {
        vm.prank(outsider);
        naive.publishModel("t", "rubbish");
        naiveScore(miner(0), 1);
        naive.distribute("t");
        vm.assertEq(outsider.balance, 100, "paid");
    }

    function test_strangerPublishesFirst() public {
        drawn();
        bytes memory data = publication(votesOf(c, keys));
        refused(outsider, address(blocks), data, BlockPublisher.NotAggregator.selector);
        c.aggregator = outsider;
        data = publication(votesOf(c, keys));
        refused(outsider, address(blocks), data, BlockPublisher.NotAggregator.selector);
    }

    // The publisher refunds itself after everybody revealed

    function test_naive_refundAfterReveals() public {
        naive.publishModel("t", "model");
        naiveScore(miner(0), 1);
        uint256 before = publisher.balance;
        vm.prank(publisher);
        naive.refund("t");
        vm.assertEq(publisher.balance - before, 1000, "model and money");
    }

    function test_refundAfterReveals() public {
        published();
        bytes memory refund = abi.encodeCall(escrow.refundPublisher, ("t", publisher));
        pass(400 days);
        refused(publisher, address(escrow), refund, WrongStatus.selector);
        rewards.distribute("t");
        refused(publisher, address(escrow), refund, WrongStatus.selector);
        vm.assertEq(rewards.balanceOf(address(0), publisher), 0, "nothing for the publisher");
    }

    // One huge score

    function test_naive_hugeScoreBricks() public {
        naive.publishModel("t", "model");
        naiveScore(miner(0), 1);
        naiveScore(miner(1), type(uint256).max);
        vm.expectRevert();
        naive.distribute("t");
    }

    function test_naive_hugeScoreDrowns() public {
        vm.prank(outsider);
        naive.publishModel("t", "model");
        naiveScore(miner(0), 10);
        naiveScore(miner(1), 1e30);
        naive.distribute("t");
        vm.assertEq(miner(0).balance, 0, "drowned");
    }

    function test_hugeScore() public {
        uint256[] memory scores = same(10, 5);
        scores[1] = type(uint256).max;
        scores[2] = 1_000_001;
        published(scores);
        reveal("t");
        bytes4 why = RewardDistribution.ScoreTooLarge.selector;
        for (uint256 i = 1; i <= 2; i++) {
            bytes memory data = abi.encodeCall(rewards.revealScore, ("t", openingOf(c, i, scores[i])));
            refused(c.participants[i], address(rewards), data, why);
        }
        revealScore(c, 0, 10);
        pass(3 hours + 1);
        rewards.distribute("t");
        vm.assertEq(rewards.claimable(keccak256("t"), address(0), 0, 10), 900, "all to the honest one");
    }

    /// @dev All five at the largest bound: sums and products stay within their words.
    function test_largestScoresAndReward() public {
        Terms memory t = terms();
        t.maxScore = type(uint64).max;
        publish("t", address(0), type(uint88).max, t);
        (Candidate memory made,) = blockOf("t", same(type(uint64).max, 5));
        settle(made, same(type(uint64).max, 5));
        for (uint256 i = 0; i < 5; i++) claim(made, i, type(uint64).max);
        withdraw(made.aggregator, address(0));
        vm.assertEq(address(rewards).balance, 0, "all of it");
    }

    // One recipient that refuses, burns gas or answers with a bomb

    function test_naive_refusingRecipientBricks() public {
        for (uint256 manner = 1; manner <= 3; manner += 2) {
            Hostile hostile = new Hostile();
            hostile.behave(Hostile.Manner(manner), "");
            naiveScore(address(hostile), 1);
        }
        naive.publishModel("t", "model");
        naiveScore(miner(0), 1);
        (bool ok,) = address(naive).call{gas: 3_000_000}(abi.encodeCall(naive.distribute, ("t")));
        vm.assertFalse(ok, "nobody is paid");
    }

    /// @dev The publisher, the only payee that need not have a key, is hostile in every manner; the others are paid as ever.
    function test_hostileRecipient() public {
        for (uint256 manner = 1; manner <= 4; manner++) {
            Hostile hostile = new Hostile();
            hostile.behave(Hostile.Manner(manner), "");
            publisher = address(hostile);
            restock(10 ether);
            string memory id = vm.toString(manner);
            (Candidate memory made,) = block_(id, 1000, same(1, 5));
            settle(made, same(1, 5));
            withdraw(made.aggregator, address(0));
            // Paid to the hostile one: only this call fails, and can be made again to another recipient.
            Opening memory opened = openingOf(made, 0, 1);
            vm.prank(made.participants[0]);
            (bool ok,) = address(rewards).call{gas: 3_000_000}(
                abi.encodeCall(rewards.claimTo, (id, address(0), address(hostile), opened))
            );
            vm.assertTrue(ok == (manner == 2 || manner == 4), "harms its own payment only");
            for (uint256 i = ok ? 1 : 0; i < 5; i++) claim(made, i, 1);
            vm.assertEq(address(rewards).balance, 0, "everybody is paid");
        }
    }

    // Payment below the requirement

    function test_naive_paidBelowTheRequirement() public {
        vm.prank(outsider);
        naive.publishModel("t", "a model that guesses");
        naiveScore(miner(0), 1);
        naive.distribute("t");
        vm.assertEq(miner(0).balance, 900, "paid");
    }

    function test_paidBelowTheRequirement() public {
        drawn();
        c.correct = 89;
        accepted(c.aggregator, address(blocks), publication(votesOf(c, keys)));
        reveal("t");
        rewards.distribute("t");
        vm.assertEq(rewards.balanceOf(address(0), publisher), 1000, "refunded");
        bytes memory data = abi.encodeCall(rewards.claimTo, ("t", address(0), miner(0), openingOf(c, 0, 1)));
        refused(miner(0), address(rewards), data, RewardDistribution.NotDistributed.selector);
    }

    // An insider withdraws before it is punished

    function test_naive_withdrawBeforeTheSlash() public {
        vm.deal(miner(0), 5);
        vm.startPrank(miner(0));
        stakes.deposit{value: 5}();
        stakes.withdraw();
        vm.stopPrank();
        vm.assertEq(stakes.slash(miner(0)), 0, "nothing to take");
    }

    function test_withdrawBeforeTheSlash() public {
        // Asked long before, so that the delay is over: what was asked for backs no task, the rest does not leave.
        for (uint256 i = 0; i < 5; i++) {
            accepted(miner(i), address(registry), abi.encodeCall(registry.requestWithdrawal, (9 ether)));
        }
        pass(DELAY_S);
        drawn();
        bytes memory request = abi.encodeCall(registry.requestWithdrawal, (9 ether + 1));
        refused(c.aggregator, address(registry), request, StakeRegistry.InsufficientStake.selector);
        accepted(c.aggregator, address(registry), abi.encodeCall(registry.withdrawStake, (c.aggregator)));
        Candidate memory other = c;
        other.modelUri = "s3://models/other";
        Vote memory first = signed(keyOf[c.aggregator], blocks.candidateHash(c));
        Vote memory second = signed(keyOf[c.aggregator], blocks.candidateHash(other));
        blocks.reportEquivocation(c, first, other, second, cohort);
        vm.assertEq(registry.stakeOf(c.aggregator), 0, "what the task recorded is taken");
        StakeRegistry.Offence offence = StakeRegistry.Offence.Equivocation;
        vm.assertEq(registry.getSlash(keccak256("t"), placeIn(cohort), offence).amount, 1 ether, "all of it");
    }

    /// @dev An old request is kept until a task holds the stake, and then taken.
    function test_naive_requestBacksATaskToo() public {
        vm.deal(miner(0), 5);
        vm.startPrank(miner(0));
        holds.deposit{value: 5}();
        holds.request(5);
        holds.hold("t", miner(0), 5, time() + 10);
        holds.withdraw();
        vm.stopPrank();
        vm.assertEq(holds.recordedOf(miner(0)), 5, "recorded");
        vm.assertEq(holds.stakeOf(miner(0)), 0, "and gone");
    }

    function test_requestBacksNoTask() public {
        publish("t", 1);
        Application[] memory all = applicationsOf("t", keys);
        accepted(miner(0), address(registry), abi.encodeCall(registry.requestWithdrawal, (1)));
        bytes memory closing = abi.encodeCall(registry.closeRegistration, ("t", all));
        refused(publisher, address(registry), closing, StakeRegistry.InsufficientStake.selector);
    }

    // What an old task recorded is given back out of what a new one did

    function test_naive_releaseOfAnOldTask() public {
        vm.deal(miner(0), 5);
        vm.prank(miner(0));
        holds.deposit{value: 5}();
        holds.hold("old", miner(0), 5, time() + 10);
        vm.warp(time() + 11);
        holds.hold("new", miner(0), 5, time() + 10);
        holds.release("old", miner(0));
        holds.hold("another", miner(0), 5, time() + 10);
        vm.assertEq(holds.stakeOf(miner(0)), 5, "one stake behind two tasks");
    }

    function test_releaseOfAnOldTask() public {
        publish("old", 1);
        bytes32[] memory members = close("old", keys);
        pass(10 days + 6 hours + 1);
        drawn();
        bytes memory release = abi.encodeCall(registry.releaseStake, ("old", members, placeIn(members)));
        refused(c.aggregator, address(registry), release, StakeRegistry.NotEntitled.selector);
        bytes memory request = abi.encodeCall(registry.requestWithdrawal, (1));
        refused(c.aggregator, address(registry), request, StakeRegistry.InsufficientStake.selector);
    }

    // An insider lets accomplices take its stake before evidence does

    /// @dev A task of the insider's own with two accomplices, of which only the insider can be drawn; silence costs everything.
    function ownTask(uint40 deadline, uint256 insider) private returns (uint256[] memory who) {
        hire(2, 0);
        who = new uint256[](3);
        uint256 count = 0;
        for (uint256 i = 0; i < keys.length; i++) {
            if (keys[i] == insider || registry.stakeOf(miner(i)) == 0) who[count++] = keys[i];
        }
        Terms memory t = terms();
        (t.deadline, t.silencePenaltyPpm, t.publishWindow_s) = (deadline, 1_000_000, 1);
        publish("own", address(0), 1, t);
    }

    function twoCandidates(string memory id, uint256 key) private view returns (Candidate memory, Vote memory, Candidate memory, Vote memory) {
        Candidate memory a = candidateOf(id, three(keys[0], keys[1], keys[2]), same(1, 3));
        Candidate memory b = candidateOf(id, three(keys[0], keys[1], keys[2]), same(2, 3));
        a.aggregator = b.aggregator = vm.addr(key);
        return (a, signed(key, blocks.candidateHash(a)), b, signed(key, blocks.candidateHash(b)));
    }

    function report(string memory id, uint256 key, bytes32[] memory members) private returns (bytes4) {
        (Candidate memory a, Vote memory x, Candidate memory b, Vote memory y) = twoCandidates(id, key);
        (bool ok, bytes memory answer) =
            address(blocks).call(abi.encodeCall(blocks.reportEquivocation, (a, x, b, y, members)));
        return ok ? bytes4(0) : bytes4(answer);
    }

    function test_selfSlashInAnotherTask() public {
        drawn();
        uint256 insider = keyOf[c.aggregator];
        uint256[] memory gang = ownTask(uint40(time() + 1 days), insider);
        Application[] memory applications = applicationsOf("own", gang);
        bytes memory closing = abi.encodeCall(registry.closeRegistration, ("own", applications));
        refused(publisher, address(registry), closing, StakeRegistry.CohortWithoutStake.selector);
        // With more stake the gang can take from it what is more, and no part of what backs the first task.
        deposit(c.aggregator, 1 ether);
        bytes32[] memory members = draw("own", gang);
        pass(2);
        registry.replaceAggregator("own", members);
        vm.assertEq(registry.stakeOf(c.aggregator), 10 ether, "only the top-up");
        vm.assertEq(bytes32(report("t", insider, cohort)), 0, "reported");
        vm.assertEq(registry.stakeOf(c.aggregator), 0, "all that the task recorded");
        vm.assertEq(registry.getSlash(keccak256("t"), placeIn(cohort), StakeRegistry.Offence.Equivocation).amount, 10 ether, "taken");
    }

    function placeIn(bytes32[] memory members) private view returns (uint256 position) {
        while (accountOf(members[position]) != c.aggregator) position++;
    }

    /// @dev Evidence about a task that is over is worth nothing: the stake backs other tasks since.
    function test_selfSlashInAnOldTask() public {
        uint256 insider = keys[0];
        uint256[] memory honest = keys;
        uint256[] memory gang = ownTask(uint40(time() + 1 hours), insider);
        keys = honest;
        bytes32[] memory members = draw("own", gang);
        pass(1 hours + 6 hours + 1);
        publish("t", 1);
        cohort = close("t", keys);
        vm.assertEq(bytes32(report("own", insider, members)), StakeRegistry.EvidenceTooLate.selector, "too late");
        registry.replaceAggregator("own", members);
        vm.assertEq(registry.stakeOf(vm.addr(insider)), 10 ether, "untouched");
    }

    /// @dev Silence and equivocation in one task take what it recorded, and nothing of a later top-up.
    function test_twoOffencesTakeTheRecordedStakeOnce() public {
        drawn();
        deposit(c.aggregator, 100 ether);
        pass(1 days + 1);
        registry.replaceAggregator("t", cohort);
        vm.assertEq(bytes32(report("t", keyOf[c.aggregator], cohort)), 0, "reported");
        vm.assertEq(registry.stakeOf(c.aggregator), 100 ether, "the top-up");
    }

    // Votes

    function test_naive_voteReplayedForAnotherTask() public {
        ballot.admit(miner(0));
        NaiveVotes another = new NaiveVotes();
        another.admit(miner(0));
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(keys[0], "model");
        ballot.vote("model", v, r, s);
        another.vote("model", v, r, s);
        vm.assertEq(another.accepted(), 1, "one signature, two elections");
    }

    function test_naive_doubledVote() public {
        ballot.admit(miner(0));
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(keys[0], "model");
        uint8[] memory vs = new uint8[](3);
        bytes32[] memory rs = new bytes32[](3);
        bytes32[] memory ss = new bytes32[](3);
        for (uint256 i = 0; i < 3; i++) (vs[i], rs[i], ss[i]) = (v, r, s);
        vm.assertEq(ballot.count("model", vs, rs, ss), 3, "one voter, three votes");
    }

    /// @dev (r, n - s) with the other v is a signature of the same message by the same key.
    function test_naive_malleableVote() public {
        ballot.admit(miner(0));
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(keys[0], "model");
        ballot.vote("model", v, r, s);
        ballot.vote("model", v == 27 ? 28 : 27, r, bytes32(ORDER - uint256(s)));
        vm.assertEq(ballot.accepted(), 2, "one voter, two votes");
    }

    uint256 private constant ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141;

    /// @dev Each replaced vote makes the whole list worthless.
    function test_votesReplayedOrInvented() public {
        drawn();
        bytes32 hash = blocks.candidateHash(c);
        Candidate memory other = c;
        other.modelUri = "s3://models/other";
        worthless(attestationOf("u", c.roundNumber, hash, true));
        worthless(attestationOf("t", c.roundNumber + 1, hash, true));
        worthless(attestationOf("t", c.roundNumber, blocks.candidateHash(other), true));
        worthless(attestationOf(c, false));
    }

    /// @dev All vote for something else.
    function worthless(bytes32 struct_) private {
        Vote[] memory votes = votesOf(c, keys);
        uint256 count = 0;
        for (uint256 i = 0; i < 5; i++) {
            if (miner(i) != c.aggregator) votes[count++] = signed(keys[i], struct_);
        }
        vm.prank(c.aggregator);
        (bool ok,) = address(blocks).call(publication(votes));
        vm.assertFalse(ok, "a vote for something else");
    }

    function test_voteFromAnotherChainOrDeployment() public {
        drawn();
        vm.chainId(2);
        Vote[] memory votes = votesOf(c, keys);
        vm.chainId(31337);
        vm.prank(c.aggregator);
        (bool ok,) = address(blocks).call(publication(votes));
        vm.assertFalse(ok, "votes of another chain");
        BlockPublisher here = blocks;
        blocks = new BlockPublisher(escrow, registry);
        votes = votesOf(c, keys);
        blocks = here;
        vm.prank(c.aggregator);
        (ok,) = address(blocks).call(publication(votes));
        vm.assertFalse(ok, "votes of another deployment");
        accepted(c.aggregator, address(blocks), publication(votesOf(c, keys)));
    }

    function test_doubledVote() public {
        drawn();
        Vote[] memory votes = votesOf(c, keys);
        for (uint256 i = 1; i < 4; i++) votes[i] = votes[0];
        refused(c.aggregator, address(blocks), publication(votes), NotAscending.selector);
    }

    /// @dev The compact form has no room for most high s; the few that fit are refused.
    function test_malleableVote() public {
        drawn();
        Vote[] memory votes = votesOf(c, keys);
        votes[0].vs = bytes32(ORDER - (uint256(votes[0].vs) & (2 ** 255 - 1)));
        vm.prank(c.aggregator);
        (bool ok,) = address(blocks).call(publication(votes));
        vm.assertFalse(ok, "the other signature");
        votes[0].vs = bytes32(ORDER / 2 + 1);
        refused(c.aggregator, address(blocks), publication(votes), BlockPublisher.InvalidVote.selector);
    }

    function test_applicationFromAnotherTaskOrDeployment() public {
        publish("t", 1);
        Application[] memory all = applicationsOf("u", keys);
        bytes4 why = StakeRegistry.InvalidApplication.selector;
        refused(publisher, address(registry), abi.encodeCall(registry.closeRegistration, ("t", all)), why);
        BlockPublisher here = blocks;
        blocks = new BlockPublisher(escrow, registry);
        all = applicationsOf("t", keys);
        blocks = here;
        refused(publisher, address(registry), abi.encodeCall(registry.closeRegistration, ("t", all)), why);
    }

    // Re-entrancy

    function test_naive_reentrancy() public {
        Hostile hostile = new Hostile();
        hostile.behave(Hostile.Manner.Reenter, abi.encodeCall(stakes.withdraw, ()));
        vm.deal(address(this), 100);
        stakes.deposit{value: 50}();
        vm.deal(address(hostile), 10);
        hostile.forward(address(stakes), 10, abi.encodeCall(stakes.deposit, ()));
        // Calls back until nothing is left; the last call fails, which the hostile account does not mind.
        (bool ok,) = address(hostile).call(
            abi.encodeCall(hostile.forward, (address(stakes), 0, abi.encodeCall(stakes.withdraw, ())))
        );
        vm.assertTrue(ok && address(hostile).balance > 10, "more than its own");
    }

    /// @dev On each of the four functions that pay; the call back is the same call, and another paying one.
    function test_reentrancy() public {
        Hostile hostile = new Hostile();
        address self = address(hostile);
        publisher = self;
        // A second deposit and a second task, from which a call back could steal.
        deposit(self, 10);
        accepted(self, address(registry), abi.encodeCall(registry.requestWithdrawal, (5)));
        publish("gone", 7);
        publish("kept", 7);
        pass(11 days);
        payOnce(hostile, address(registry), abi.encodeCall(registry.withdrawStake, (self)), 5);
        payOnce(hostile, address(escrow), abi.encodeCall(escrow.refundPublisher, ("gone", self)), 7);
        drawn();
        c.correct = 1;
        accepted(c.aggregator, address(blocks), publication(votesOf(c, keys)));
        reveal("t");
        rewards.distribute("t");
        bytes memory withdrawal = abi.encodeCall(rewards.withdrawTo, (address(0), self));
        payOnce(hostile, address(rewards), withdrawal, 1000);
    }

    /// @dev Claims too belong to members; the contract that is paid may call back for a balance of its own, in the same call.
    function test_reentrancyOfClaims() public {
        Hostile hostile = new Hostile();
        publisher = address(hostile);
        drawn();
        c.correct = 1;
        accepted(c.aggregator, address(blocks), publication(votesOf(c, keys)));
        reveal("t");
        rewards.distribute("t");
        restock(10 ether);
        (Candidate memory made,) = block_("u", 1000, same(1, 5));
        settle(made, same(1, 5));
        hostile.behave(Hostile.Manner.Reenter, abi.encodeCall(rewards.withdrawTo, (address(0), address(hostile))));
        Opening memory opened = openingOf(made, 0, 1);
        bytes memory data = abi.encodeCall(rewards.claimTo, ("u", address(0), address(hostile), opened));
        accepted(made.participants[0], address(rewards), data);
        vm.assertEq(address(hostile).balance, 180, "the claim alone");
        vm.assertEq(hostile.reentered(), 0, "called back");
        vm.assertEq(rewards.balanceOf(address(0), address(hostile)), 1000, "its balance is kept");
    }

    /// @dev Credits belong to members, which have keys; the contract is the recipient, and calls back for the member's sake.
    function test_reentrancyOfCredits() public {
        drawn();
        Hostile hostile = new Hostile();
        pass(1 days + 1);
        uint256 position = c.aggregator == miner(0) ? 1 : 0;
        uint256 culprit = 0;
        while (miner(culprit) != c.aggregator) culprit++;
        registry.replaceAggregator("t", cohort);
        registry.creditSlashed("t", cohort, culprit, StakeRegistry.Offence.Silence, position);
        hostile.behave(Hostile.Manner.Reenter, abi.encodeCall(registry.withdrawCredit, (address(hostile))));
        accepted(miner(position), address(registry), abi.encodeCall(registry.withdrawCredit, (address(hostile))));
        vm.assertEq(address(hostile).balance, 2.5 ether / 4, "its part");
        vm.assertEq(hostile.reentered(), 0, "called back");
    }

    function payOnce(Hostile hostile, address payer, bytes memory data, uint256 amount) private {
        hostile.behave(Hostile.Manner.Reenter, data);
        uint256 before = address(hostile).balance;
        hostile.forward(payer, 0, data);
        vm.assertEq(address(hostile).balance - before, amount, "paid once");
        vm.assertEq(hostile.reentered(), 0, "called back");
    }

    // Tokens that keep a fee or answer false

    function test_naive_feeOnTransferTakesFromOthers() public {
        MannerToken token = new MannerToken();
        address[2] memory savers = [miner(0), miner(1)];
        token.behave(MannerToken.Manner.Fee);
        for (uint256 i = 0; i < 2; i++) {
            token.mint(savers[i], 1000);
            vm.startPrank(savers[i]);
            token.approve(address(pool), 1000);
            pool.deposit(Token(address(token)), 1000);
            vm.stopPrank();
        }
        vm.prank(savers[0]);
        pool.withdraw(Token(address(token)));
        vm.prank(savers[1]);
        vm.expectRevert();
        pool.withdraw(Token(address(token)));
    }

    function test_naive_falseReturningTokenIsBelieved() public {
        MannerToken token = new MannerToken();
        token.mint(address(pool), 1000);
        token.behave(MannerToken.Manner.False);
        pool.deposit(Token(address(token)), 1000);
        token.behave(MannerToken.Manner.Good);
        pool.withdraw(Token(address(token)));
        vm.assertEq(token.balanceOf(address(this)), 1000, "others' tokens");
    }

    function test_feeOrFalseTokenIsRefused() public {
        MannerToken token = new MannerToken();
        token.mint(address(escrow), 1000);
        bytes memory data =
            abi.encodeCall(escrow.publishTask, ("t", bytes32("c"), 0, address(token), 1000, terms()));
        token.behave(MannerToken.Manner.False);
        refused(publisher, address(escrow), data, bytes4(keccak256("SafeERC20FailedOperation(address)")));
        token.behave(MannerToken.Manner.Fee);
        token.mint(publisher, 1000);
        vm.prank(publisher);
        token.approve(address(escrow), 1000);
        refused(publisher, address(escrow), data, HealChainEscrow.FeeOnTransfer.selector);
    }

    // Proofs and claims

    function test_naive_innerNodeAsLeaf() public view {
        bytes32[4] memory leaves = [keccak256("a"), keccak256("b"), keccak256("c"), keccak256("d")];
        bytes32 left = pair(leaves[0], leaves[1]);
        bytes32 root = pair(left, pair(leaves[2], leaves[3]));
        bytes32[] memory proof = new bytes32[](1);
        proof[0] = pair(leaves[2], leaves[3]);
        (bytes32 a, bytes32 b) = leaves[0] < leaves[1] ? (leaves[0], leaves[1]) : (leaves[1], leaves[0]);
        vm.assertTrue(pool.isProved(root, a, b, proof), "no leaf, yet proved");
    }

    function test_proofTricks() public {
        published();
        settle(c, same(1, 5));
        address first = c.participants[0];
        uint256[5] memory positions = [uint256(1), 4, 5, 256, type(uint256).max];
        for (uint256 i = 0; i < 5; i++) {
            Opening memory other = openingOf(c, 0, 1);
            other.position = positions[i];
            refusedClaim(first, other);
        }
        // A shorter proof, from a leaf to an inner node; none at all; and one that is too long.
        Opening memory opened = openingOf(c, 0, 1);
        bytes32[] memory proof = opened.proof;
        opened.proof = new bytes32[](2);
        (opened.proof[0], opened.proof[1]) = (proof[1], proof[2]);
        refusedClaim(first, opened);
        opened.proof = new bytes32[](0);
        refusedClaim(first, opened);
        opened.proof = new bytes32[](4);
        for (uint256 i = 0; i < 3; i++) opened.proof[i] = proof[i];
        refusedClaim(first, opened);
        // Another's place, another's name, another score and another salt.
        refusedClaim(first, openingOf(c, 1, 1));
        refusedClaim(outsider, openingOf(c, 0, 1));
        refusedClaim(first, openingOf(c, 0, 2));
        opened = openingOf(c, 0, 1);
        opened.salt = 0;
        refusedClaim(first, opened);
    }

    function refusedClaim(address who, Opening memory opened) private {
        bytes memory data = abi.encodeCall(rewards.claimTo, ("t", address(0), who, opened));
        refused(who, address(rewards), data, RewardDistribution.NotParticipant.selector);
    }

    function test_naive_sameClaimTwiceInOneCall() public {
        vm.deal(address(pool), 100);
        bytes32[] memory leaves = new bytes32[](2);
        (leaves[0], leaves[1]) = (keccak256("leaf"), keccak256("leaf"));
        uint256 before = address(this).balance;
        pool.claim(leaves, 10);
        vm.assertEq(address(this).balance - before, 20, "paid twice");
    }

    function test_sameClaimTwice() public {
        published();
        settle(c, same(1, 5));
        bytes memory data = abi.encodeCall(rewards.claimTo, ("t", address(0), miner(0), openingOf(c, 0, 1)));
        accepted(miner(0), address(rewards), data);
        refused(miner(0), address(rewards), data, RewardDistribution.AlreadyClaimed.selector);
    }

    function test_naive_claimInAnotherToken() public {
        (MannerToken good, MannerToken poor) = (new MannerToken(), new MannerToken());
        good.mint(address(pool), 1000);
        poor.mint(address(this), 1000);
        poor.approve(address(pool), 1000);
        pool.fund(Token(address(poor)), "t", miner(0), 1000);
        vm.prank(miner(0));
        pool.claimIn(Token(address(good)), "t");
        vm.assertEq(good.balanceOf(miner(0)), 1000, "others' tokens");
    }

    /// @dev A task rewarded in a worthless token has no pool in ether or in another token; nor is a balance of one in another.
    function test_claimInAnotherToken() public {
        (MannerToken good, MannerToken poor) = (new MannerToken(), new MannerToken());
        good.mint(address(rewards), 1e18);
        vm.deal(address(rewards), 1e18);
        poor.mint(publisher, 1e18);
        vm.prank(publisher);
        poor.approve(address(escrow), 1e18);
        publish("t", address(poor), 1e18, terms());
        (Candidate memory cheap,) = blockOf("t", same(1, 5));
        settle(cheap, same(1, 5));
        address[2] memory tokens = [address(0), address(good)];
        for (uint256 i = 0; i < 2; i++) {
            bytes memory data = abi.encodeCall(rewards.claimTo, ("t", tokens[i], miner(0), openingOf(cheap, 0, 1)));
            refused(miner(0), address(rewards), data, RewardDistribution.NotDistributed.selector);
            vm.assertEq(rewards.claimable(keccak256("t"), tokens[i], 0, 1), 0, "no pool");
            data = abi.encodeCall(rewards.withdrawTo, (tokens[i], cheap.aggregator));
            refused(cheap.aggregator, address(rewards), data, RewardDistribution.NothingToWithdraw.selector);
        }
        vm.assertEq(claim(cheap, 0, 1), 0.18 ether, "in the worthless one");
    }

    // A score that was not revealed counts at the claim

    function test_naive_claimOfAnUnrevealedScore() public {
        // A pool of 1000 for one revealed score of 10, beside 4000 of other tasks.
        vm.deal(address(pool), 5000);
        vm.prank(miner(1));
        pool.claimByScore(1000, 50, 10);
        vm.assertEq(miner(1).balance, 5000, "the pool, and others'");
    }

    function test_claimOfAnUnrevealedScore() public {
        uint256[] memory scores = same(10, 5);
        scores[1] = 1_000_000;
        published(scores);
        reveal("t");
        revealScore(c, 0, 10);
        pass(3 hours + 1);
        rewards.distribute("t");
        vm.assertEq(claim(c, 1, 1_000_000), 0, "not revealed");
        vm.assertEq(claim(c, 0, 10), 900, "all to the one that revealed");
    }
}
