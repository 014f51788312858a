// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {BlockMeta, BlockPublisher, Candidate, Vote} from "../src/BlockPublisher.sol";
import {accountOf, contributionLeaf, memberWord} from "../src/Cohort.sol";
import {HealChainEscrow} from "../src/HealChainEscrow.sol";
import {Opening, Outcome, RewardDistribution, Settlement} from "../src/RewardDistribution.sol";
import {Application, StakeRegistry} from "../src/StakeRegistry.sol";
import {PPM, Status, Task, Terms, taskKeyOf} from "../src/Task.sol";
import {vm} from "./Vm.sol";

/// @title A deployment, people with keys, and the steps of a task.
/// @notice Steps are done by who may do them; a test that wants somebody else writes the call itself.
abstract contract World {
    uint40 internal constant DELAY_S = 1 days;
    uint256 internal constant ACCURACY_PPM = 900_000;
    bytes32 internal constant SALT = keccak256("salt");

    HealChainEscrow internal escrow;
    StakeRegistry internal registry;
    BlockPublisher internal blocks;
    RewardDistribution internal rewards;

    address internal publisher = address(0xB0B);
    address internal outsider = address(0xBAD);
    /// @dev Keys of the miners, in the ascending order of their addresses.
    uint256[] internal keys;
    mapping(address account => uint256) internal keyOf;

    receive() external payable {}

    function deploy() internal {
        uint64 nonce = vm.getNonce(address(this));
        address toBlocks = vm.computeCreateAddress(address(this), nonce + 2);
        address toRewards = vm.computeCreateAddress(address(this), nonce + 3);
        if (vm.isContext(2)) {
            escrow = new HealChainEscrow(toBlocks, toRewards);
            registry = new StakeRegistry(escrow, BlockPublisher(toBlocks), DELAY_S);
            blocks = new BlockPublisher(escrow, registry);
            rewards = new RewardDistribution(escrow, blocks);
        } else {
            escrow = HealChainEscrow(create("HealChainEscrow", abi.encode(toBlocks, toRewards)));
            registry = StakeRegistry(create("StakeRegistry", abi.encode(escrow, toBlocks, DELAY_S)));
            blocks = BlockPublisher(create("BlockPublisher", abi.encode(escrow, registry)));
            rewards = RewardDistribution(payable(create("RewardDistribution", abi.encode(escrow, blocks))));
        }
        vm.assertEq(address(rewards), toRewards, "addresses of the deployment");
    }

    /// @dev The committed build, so that the tests run what is deployed; only coverage needs a build of its own.
    function create(string memory name, bytes memory arguments) private returns (address account) {
        bytes memory code = bytes.concat(vm.getCode(string.concat("build/", name, ".json")), arguments);
        assembly {
            account := create(0, add(code, 32), mload(code))
        }
        vm.assertTrue(account != address(0), string.concat(name, " was not created"));
    }

    /// @dev Gives count miners a key and a stake each.
    function hire(uint256 count, uint256 stake) internal {
        for (uint256 i = 0; i < count; i++) {
            uint256 key = uint256(keccak256(abi.encode("miner", keys.length))) >> 8;
            address miner = vm.addr(key);
            keyOf[miner] = key;
            keys.push(key);
            for (uint256 j = keys.length - 1; j > 0 && vm.addr(keys[j - 1]) > miner; j--) {
                (keys[j], keys[j - 1]) = (keys[j - 1], keys[j]);
            }
            if (stake > 0) deposit(miner, stake);
        }
    }

    /// @dev Stakes for another task: what one task recorded backs no other.
    function restock(uint256 stake) internal {
        for (uint256 i = 0; i < keys.length; i++) deposit(vm.addr(keys[i]), stake);
    }

    function deposit(address account, uint256 amount) internal {
        vm.deal(account, account.balance + amount);
        vm.prank(account);
        registry.depositStake{value: amount}();
    }

    // Time

    function time() internal view returns (uint256) {
        return vm.getBlockTimestamp();
    }

    function pass(uint256 seconds_) internal {
        vm.warp(time() + seconds_);
        mine(1);
    }

    function mine(uint256 count) internal {
        vm.roll(vm.getBlockNumber() + count);
    }

    // A task, step by step

    function terms() internal view returns (Terms memory) {
        return Terms({
            deadline: uint40(time() + 10 days),
            publishWindow_s: 1 days,
            publisherRevealWindow_s: 1 hours,
            aggregatorRevealWindow_s: 2 hours,
            scoreRevealWindow_s: 3 hours,
            minMiners: 3,
            maxMiners: 200,
            faultRatePpm: 333_334,
            aggregatorSharePpm: 100_000,
            silencePenaltyPpm: 250_000,
            maxScore: 1_000_000,
            minStake: 0
        });
    }

    function commitOf(uint256 accuracyPpm) internal pure returns (bytes32) {
        return keccak256(abi.encodePacked(accuracyPpm, SALT));
    }

    function publish(string memory id, uint88 reward) internal {
        publish(id, address(0), reward, terms());
    }

    function publish(string memory id, address token, uint88 reward, Terms memory t) internal {
        uint256 value = token == address(0) ? reward : 0;
        vm.deal(publisher, publisher.balance + value);
        vm.prank(publisher);
        escrow.publishTask{value: value}(id, commitOf(ACCURACY_PPM), keccak256("spec"), token, reward, t);
    }

    /// @dev All of the available stake.
    function applicationOf(string memory id, uint256 key) internal view returns (Application memory) {
        return applicationOf(id, key, uint88(registry.availableStake(vm.addr(key))));
    }

    function applicationOf(string memory id, uint256 key, uint88 stake) internal view returns (Application memory a) {
        a = Application(vm.addr(key), keccak256("key"), keccak256("proof"), stake, 0, 0);
        bytes32 struct_ = keccak256(
            abi.encode(
                registry.REGISTRATION_TYPEHASH(),
                keccak256(bytes(id)),
                uint32(0),
                a.miner,
                a.encryptionKeyHash,
                a.datasetProofSha256,
                uint96(stake)
            )
        );
        (a.r, a.vs) = vm.signCompact(key, digestOf(struct_));
    }

    function applicationsOf(string memory id, uint256[] memory who) internal view returns (Application[] memory all) {
        all = new Application[](who.length);
        for (uint256 i = 0; i < who.length; i++) all[i] = applicationOf(id, who[i]);
    }

    /// @dev The words that registration records of these applications.
    function cohortOf(Application[] memory applications) internal pure returns (bytes32[] memory cohort) {
        cohort = new bytes32[](applications.length);
        for (uint256 i = 0; i < cohort.length; i++) cohort[i] = memberWord(applications[i].miner, applications[i].stake);
    }

    function close(string memory id, uint256[] memory who) internal returns (bytes32[] memory cohort) {
        return close(id, applicationsOf(id, who));
    }

    function close(string memory id, Application[] memory applications) internal returns (bytes32[] memory) {
        vm.prank(publisher);
        registry.closeRegistration(id, applications);
        return cohortOf(applications);
    }

    /// @dev The aggregator's turn begins.
    function draw(string memory id, uint256[] memory who) internal returns (bytes32[] memory cohort) {
        cohort = close(id, who);
        mine(2);
        registry.drawAggregator(id, cohort);
    }

    function aggregatorOf(string memory id) internal view returns (address) {
        return registry.aggregatorOf(keccak256(bytes(id)));
    }

    function scoreCommit(string memory id, address miner, uint256 score) internal pure returns (bytes32) {
        return keccak256(abi.encodePacked(score, SALT, id, miner));
    }

    /// @dev A candidate with an accuracy of 95 %; each participant commits to its score.
    function candidateOf(string memory id, uint256[] memory who, uint256[] memory scores)
        internal
        view
        returns (Candidate memory c)
    {
        c.taskID = id;
        c.roundNumber = 7;
        c.modelSha256 = keccak256("model");
        c.modelUri = "s3://models/1";
        c.correct = 95;
        c.total = 100;
        c.aggregator = aggregatorOf(id);
        c.participants = new address[](who.length);
        c.scoreCommits = new bytes32[](who.length);
        for (uint256 i = 0; i < who.length; i++) {
            c.participants[i] = vm.addr(who[i]);
            c.scoreCommits[i] = scoreCommit(id, c.participants[i], scores[i]);
        }
    }

    function digestOf(bytes32 struct_) internal view returns (bytes32) {
        return keccak256(abi.encodePacked(hex"1901", blocks.domainSeparator(), struct_));
    }

    function attestationOf(Candidate memory c, bool isAccepted) internal view returns (bytes32) {
        return attestationOf(c.taskID, c.roundNumber, blocks.candidateHash(c), isAccepted);
    }

    function attestationOf(string memory id, uint32 round, bytes32 hash, bool isAccepted)
        internal
        view
        returns (bytes32)
    {
        return keccak256(
            abi.encode(blocks.ATTESTATION_TYPEHASH(), keccak256(bytes(id)), round, hash, isAccepted, keccak256(""))
        );
    }

    function signed(uint256 key, bytes32 struct_) internal view returns (Vote memory v) {
        (v.r, v.vs) = vm.signCompact(key, digestOf(struct_));
    }

    /// @dev Votes of all but the aggregator, in order.
    function votesOf(Candidate memory c, uint256[] memory who) internal view returns (Vote[] memory votes) {
        bytes32 struct_ = attestationOf(c, true);
        votes = new Vote[](others(who, c.aggregator));
        uint256 count = 0;
        for (uint256 i = 0; i < who.length; i++) {
            if (vm.addr(who[i]) != c.aggregator) votes[count++] = signed(who[i], struct_);
        }
    }

    function others(uint256[] memory who, address one) internal pure returns (uint256 count) {
        for (uint256 i = 0; i < who.length; i++) {
            if (vm.addr(who[i]) != one) count++;
        }
    }

    /// @dev From publication to a block of all miners, each with the score given.
    function block_(string memory id, uint88 reward, uint256[] memory scores)
        internal
        returns (Candidate memory c, bytes32[] memory cohort)
    {
        publish(id, reward);
        return blockOf(id, scores);
    }

    function blockOf(string memory id, uint256[] memory scores)
        internal
        returns (Candidate memory c, bytes32[] memory cohort)
    {
        cohort = draw(id, keys);
        c = candidateOf(id, keys, scores);
        Vote[] memory votes = votesOf(c, keys);
        vm.prank(c.aggregator);
        blocks.publishBlock(c, votes, cohort);
    }

    function reveal(string memory id) internal {
        vm.prank(publisher);
        rewards.revealAccuracy(id, ACCURACY_PPM, SALT);
    }

    function openingOf(Candidate memory c, uint256 position, uint256 score) internal pure returns (Opening memory) {
        return Opening(score, SALT, position, proofOf(c.participants, c.scoreCommits, position));
    }

    function revealScore(Candidate memory c, uint256 position, uint256 score) internal {
        vm.prank(c.participants[position]);
        rewards.revealScore(c.taskID, openingOf(c, position, score));
    }

    /// @dev Everybody reveals and the reward is there to be claimed.
    function settle(Candidate memory c, uint256[] memory scores) internal {
        reveal(c.taskID);
        for (uint256 i = 0; i < scores.length; i++) revealScore(c, i, scores[i]);
        rewards.distribute(c.taskID);
    }

    /// @dev What the participant gets.
    function claim(Candidate memory c, uint256 position, uint256 score) internal returns (uint256) {
        address token = escrow.getTask(keccak256(bytes(c.taskID))).token;
        address account = c.participants[position];
        uint256 before = held(token, account);
        vm.prank(account);
        rewards.claimTo(c.taskID, token, account, openingOf(c, position, score));
        return held(token, account) - before;
    }

    /// @dev What the account gets of its balance.
    function withdraw(address account, address token) internal returns (uint256) {
        uint256 before = held(token, account);
        vm.prank(account);
        rewards.withdrawTo(token, account);
        return held(token, account) - before;
    }

    function held(address token, address account) internal view returns (uint256) {
        if (token == address(0)) return account.balance;
        (, bytes memory answer) = token.staticcall(abi.encodeWithSignature("balanceOf(address)", account));
        return abi.decode(answer, (uint256));
    }

    // The tree, written a second time from its description: level by level, a lone last node rises as it is

    function proofOf(address[] memory participants, bytes32[] memory commits, uint256 position)
        internal
        pure
        returns (bytes32[] memory proof)
    {
        bytes32[] memory level = new bytes32[](participants.length);
        for (uint256 i = 0; i < level.length; i++) level[i] = contributionLeaf(i, participants[i], commits[i]);
        bytes32[] memory found = new bytes32[](16);
        uint256 count = 0;
        while (level.length > 1) {
            uint256 sibling = position ^ 1;
            if (sibling < level.length) found[count++] = level[sibling];
            level = parents(level);
            position /= 2;
        }
        proof = new bytes32[](count);
        for (uint256 i = 0; i < count; i++) proof[i] = found[i];
    }

    function parents(bytes32[] memory level) internal pure returns (bytes32[] memory up) {
        up = new bytes32[]((level.length + 1) / 2);
        for (uint256 i = 0; i < up.length; i++) {
            up[i] = 2 * i + 1 == level.length ? level[2 * i] : pair(level[2 * i], level[2 * i + 1]);
        }
    }

    function pair(bytes32 a, bytes32 b) internal pure returns (bytes32) {
        return a < b ? keccak256(abi.encodePacked(a, b)) : keccak256(abi.encodePacked(b, a));
    }

    // What is refused

    /// @dev The call must revert with this error.
    function refused(address who, address target, bytes memory data, bytes4 why) internal {
        refused(who, target, 0, data, why);
    }

    function refused(address who, address target, uint256 value, bytes memory data, bytes4 why) internal {
        if (value > 0) vm.deal(who, who.balance + value);
        vm.prank(who);
        (bool ok, bytes memory answer) = target.call{value: value}(data);
        vm.assertFalse(ok, "not refused");
        vm.assertEq(bytes32(bytes4(answer)), bytes32(why), "refused for another reason");
    }

    /// @dev The call must succeed.
    function accepted(address who, address target, bytes memory data) internal returns (bytes memory answer) {
        bool ok;
        vm.prank(who);
        (ok, answer) = target.call(data);
        if (ok) return answer;
        assembly {
            revert(add(answer, 32), mload(answer))
        }
    }

    // Small lists

    function same(uint256 value, uint256 count) internal pure returns (uint256[] memory list) {
        list = new uint256[](count);
        for (uint256 i = 0; i < count; i++) list[i] = value;
    }

    function three(uint256 a, uint256 b, uint256 c) internal pure returns (uint256[] memory list) {
        list = new uint256[](3);
        (list[0], list[1], list[2]) = (a, b, c);
    }
}
