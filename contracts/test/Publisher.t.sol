// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {BlockMeta, BlockPublisher, Candidate, Vote} from "../src/BlockPublisher.sol";
import {StakeRegistry} from "../src/StakeRegistry.sol";
import {DeadlinePast, NotAscending, Status, Terms, WrongStatus} from "../src/Task.sol";
import {vm} from "./Vm.sol";
import {World} from "./World.sol";

contract PublisherTest is World {
    bytes32[] private cohort;
    Candidate private good;
    address private aggregator;

    function setUp() public {
        deploy();
        hire(6, 10 ether);
        // The last key belongs to somebody who is not in the cohort.
        keys.pop();
        publish("t", 100);
        cohort = draw("t", keys);
        aggregator = aggregatorOf("t");
        good = candidateOf("t", keys, same(5, 5));
    }

    function publication(Candidate memory c) private view returns (bytes memory) {
        return publication(c, votesOf(c, keys));
    }

    function publication(Candidate memory c, Vote[] memory votes) private view returns (bytes memory) {
        return abi.encodeCall(blocks.publishBlock, (c, votes, cohort));
    }

    function no(bytes memory data, bytes4 why) private {
        refused(aggregator, address(blocks), data, why);
    }

    function test_aBlock() public {
        accepted(aggregator, address(blocks), publication(good));
        BlockMeta memory meta = blocks.getBlockMeta(keccak256("t"));
        vm.assertEq(meta.aggregator, aggregator, "aggregator");
        vm.assertEq(meta.publishedAt, time(), "time");
        vm.assertEq(meta.roundNumber, 7, "round");
        vm.assertEq(meta.votes, 4, "votes");
        vm.assertEq(meta.correct, 95, "correct");
        vm.assertEq(meta.total, 100, "total");
        vm.assertEq(meta.participantCount, 5, "participants");
        vm.assertEq(meta.blockNumber, vm.getBlockNumber(), "number");
        vm.assertEq(meta.candidateHash, blocks.candidateHash(good), "hash");
        vm.assertEq(uint256(escrow.getTask(keccak256("t")).status), uint256(Status.Published), "status");
        no(publication(good), WrongStatus.selector);
    }

    function test_whoseTurnItIs() public {
        address other = good.participants[0] == aggregator ? good.participants[1] : good.participants[0];
        refused(other, address(blocks), publication(good), BlockPublisher.NotAggregator.selector);
        Candidate memory c = good;
        c.aggregator = other;
        no(publication(c), BlockPublisher.NotAggregator.selector);
        Candidate memory unknown = good;
        unknown.taskID = "u";
        no(publication(unknown), StakeRegistry.WrongCohort.selector);
        bytes memory data = abi.encodeCall(blocks.publishBlock, (good, votesOf(good, keys), new bytes32[](0)));
        no(data, StakeRegistry.WrongCohort.selector);
    }

    function test_untilTheDeadline() public {
        bytes memory data = publication(good);
        vm.warp(escrow.getTask(keccak256("t")).terms.deadline + 1);
        no(data, DeadlinePast.selector);
        vm.warp(escrow.getTask(keccak256("t")).terms.deadline);
        accepted(aggregator, address(blocks), data);
    }

    function test_accuracyIsAFraction() public {
        Candidate memory c = good;
        c.total = 94;
        no(publication(c), BlockPublisher.InvalidAccuracy.selector);
        (c.correct, c.total) = (0, 0);
        no(publication(c), BlockPublisher.InvalidAccuracy.selector);
        (c.correct, c.total) = (1, 1);
        accepted(aggregator, address(blocks), publication(c));
    }

    function test_participants() public {
        Candidate memory c = candidateOf("t", three(keys[0], keys[1], keys[2]), same(1, 3));
        (c.participants[0], c.participants[1]) = (c.participants[1], c.participants[0]);
        no(publication(c), NotAscending.selector);
        c.participants[0] = c.participants[1];
        no(publication(c), NotAscending.selector);
        c.participants = new address[](2);
        no(publication(c), BlockPublisher.TooFewParticipants.selector);
        c = good;
        c.participants[4] = address(type(uint160).max);
        no(publication(c), BlockPublisher.NotInCohort.selector);
        c = good;
        c.participants[0] = address(1);
        no(publication(c), BlockPublisher.NotInCohort.selector);
        c = good;
        c.scoreCommits = new bytes32[](4);
        no(publication(c), BlockPublisher.LengthMismatch.selector);
    }

    /// @dev Of four others a third may be missing, rounded up: three votes do, two do not.
    function test_quorumToTheVote() public {
        Vote[] memory all = votesOf(good, keys);
        Vote[] memory two = new Vote[](2);
        Vote[] memory enough = new Vote[](3);
        (two[0], two[1]) = (all[0], all[2]);
        (enough[0], enough[1], enough[2]) = (all[0], all[2], all[3]);
        vm.assertEq(blocks.requiredVotes("t", 5), 3, "required");
        no(publication(good, two), BlockPublisher.QuorumNotReached.selector);
        accepted(aggregator, address(blocks), publication(good, enough));
        vm.assertEq(blocks.getBlockMeta(keccak256("t")).votes, 3, "votes");
    }

    function test_votesOfTheWrongPeople() public {
        Vote[] memory votes = votesOf(good, keys);
        bytes32 struct_ = attestationOf(good, true);
        (votes[0], votes[1]) = (votes[1], votes[0]);
        no(publication(good, votes), NotAscending.selector);
        votes = votesOf(good, keys);
        votes[2] = signed(uint256(keccak256("stranger")) >> 8, struct_);
        vm.prank(aggregator);
        (bool ok,) = address(blocks).call(publication(good, votes));
        vm.assertFalse(ok, "a stranger's vote");
        votes = votesOf(good, keys);
        votes[1] = signed(keyOf[aggregator], struct_);
        no(publication(good, votes), BlockPublisher.AggregatorVote.selector);
        votes[1] = Vote(0, 0);
        no(publication(good, votes), BlockPublisher.InvalidVote.selector);
    }

    /// @dev max(1, ceil((n - 1)(1 - rate))): written with whole numbers in another way.
    function testFuzz_requiredVotes(uint8 size, uint24 rate) public {
        uint256 n = 3 + size % 198;
        Terms memory t = terms();
        t.faultRatePpm = rate % 500_001;
        publish("u", address(0), 1, t);
        uint256 required = blocks.requiredVotes("u", n);
        uint256 exact = (n - 1) * (1_000_000 - t.faultRatePpm);
        vm.assertGe(required * 1_000_000, exact, "too few");
        vm.assertLt((required - 1) * 1_000_000, exact, "too many");
        vm.assertLe(required, n - 1, "reachable");
        vm.assertGe(required, 1, "at least one");
    }

    // Equivocation

    function pairOf(Candidate memory a, Candidate memory b, uint256 key) private view returns (bytes memory) {
        Vote memory first = signed(key, blocks.candidateHash(a));
        Vote memory second = signed(key, blocks.candidateHash(b));
        return abi.encodeCall(blocks.reportEquivocation, (a, first, b, second, cohort));
    }

    function test_whatIsNoEquivocation() public {
        bytes4 why = BlockPublisher.NoEquivocation.selector;
        uint256 key = keyOf[aggregator];
        Candidate memory b = good;
        no(pairOf(good, b, key), why);
        b.taskID = "u";
        no(pairOf(good, b, key), why);
        b = good;
        b.roundNumber = 8;
        no(pairOf(good, b, key), why);
        b = good;
        b.aggregator = outsider;
        no(pairOf(good, b, key), why);
        b = good;
        b.modelUri = "s3://models/2";
        no(pairOf(good, b, key ^ 1), why);
        Vote memory first = signed(key, blocks.candidateHash(good));
        no(abi.encodeCall(blocks.reportEquivocation, (good, first, b, first, cohort)), why);
    }

    function test_equivocationCostsTheStake() public {
        Candidate memory b = good;
        b.modelSha256 = keccak256("another");
        bytes memory report = pairOf(good, b, keyOf[aggregator]);
        accepted(outsider, address(blocks), report);
        vm.assertEq(registry.stakeOf(aggregator), 0, "stake");
        refused(outsider, address(blocks), report, StakeRegistry.AlreadySlashed.selector);
    }

    /// @dev After its turn, after the block of another, and after the deadline; a member without a turn is not punished.
    function test_equivocationOfAFormerAggregator() public {
        Candidate memory b = good;
        b.correct = 94;
        bytes memory report = pairOf(good, b, keyOf[aggregator]);
        pass(1 days + 1);
        accepted(outsider, address(registry), abi.encodeCall(registry.replaceAggregator, ("t", cohort)));
        vm.assertEq(registry.stakeOf(aggregator), 7.5 ether, "silence");
        Candidate memory c = candidateOf("t", keys, same(5, 5));
        accepted(c.aggregator, address(blocks), publication(c));
        vm.warp(escrow.getTask(keccak256("t")).terms.deadline + 6 hours);
        accepted(outsider, address(blocks), report);
        vm.assertEq(registry.stakeOf(aggregator), 0, "the rest");
        uint256 innocent = innocentKey(c.aggregator);
        (Candidate memory x, Candidate memory y) = (good, b);
        (x.aggregator, y.aggregator) = (vm.addr(innocent), vm.addr(innocent));
        refused(outsider, address(blocks), pairOf(x, y, innocent), StakeRegistry.NotTheTurn.selector);
    }

    function innocentKey(address second) private view returns (uint256 key) {
        for (uint256 i = 0; i < 5; i++) {
            address account = vm.addr(keys[i]);
            if (account != aggregator && account != second) return keys[i];
        }
    }

    // The tree

    function test_oneCommitmentAParticipant() public {
        bytes memory data = abi.encodeCall(blocks.contributionsRoot, (new address[](2), new bytes32[](1)));
        refused(outsider, address(blocks), data, BlockPublisher.LengthMismatch.selector);
    }

    /// @dev The root equals the one that levels of their own give, for every size.
    function test_rootOfEverySize() public view {
        for (uint256 n = 1; n <= 70; n++) {
            address[] memory participants = new address[](n);
            bytes32[] memory level = new bytes32[](n);
            bytes32[] memory commits = new bytes32[](n);
            for (uint256 i = 0; i < n; i++) {
                participants[i] = address(uint160(100 + i));
                commits[i] = keccak256(abi.encode(i));
                level[i] = keccak256(abi.encode(i, participants[i], commits[i]));
            }
            while (level.length > 1) level = parents(level);
            vm.assertEq(blocks.contributionsRoot(participants, commits), level[0], "root");
        }
    }
}
