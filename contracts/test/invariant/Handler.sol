// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {BlockPublisher, Candidate, Vote} from "../../src/BlockPublisher.sol";
import {accountOf} from "../../src/Cohort.sol";
import {HealChainEscrow} from "../../src/HealChainEscrow.sol";
import {Opening, Outcome, RewardDistribution, Settlement} from "../../src/RewardDistribution.sol";
import {Application, StakeRegistry} from "../../src/StakeRegistry.sol";
import {PPM, Status, Task, Terms} from "../../src/Task.sol";
import {Hostile} from "../Hostile.sol";
import {MannerToken} from "../Tokens.sol";
import {vm} from "../Vm.sol";
import {Checks} from "./Checks.sol";

/// @title Everybody, in any order: two publishers (one a hostile contract), five miners, aggregators and former ones, an outsider.
/// @notice Every act is tried whether or not it is allowed. What succeeded is noted; what should not have is a breach.
contract Handler is Checks {
    uint256 private constant KINDS = 3;

    constructor() {
        deploy();
        hire(MINERS, 0);
        hostile = new Hostile();
        coin = new MannerToken();
        shell = new MannerToken();
        tokens = [address(0), address(coin), address(shell)];
        for (uint256 i = 0; i < MINERS; i++) people.push(vm.addr(keys[i]));
        people.push(publisher);
        people.push(address(hostile));
        people.push(outsider);
        for (uint256 i = 0; i < MINERS; i++) depositStake(i, (i + 1) * 1 ether);
    }

    /// @dev Two acts of three are preceded by a proper step of some task, one of four by hours: alone, random acts would seldom
    /// reach a task's end.
    modifier act() {
        uint256 chance = uint256(keccak256(msg.data));
        if (chance >> 128 & 3 == 0) pass((chance >> 130) % 18 hours);
        if (chance % 3 > 0) drive(chance >> 8, chance >> 16);
        _;
    }

    // Time, tokens and gifts

    function advance(uint256 seconds_, uint256 blocks_) external act {
        // Mostly within the windows; sometimes past everything, and past the 256 blocks of which hashes are known.
        uint256 most = seconds_ % 8 == 0 ? 300 days : seconds_ % 2 == 0 ? 3 hours : 1 days;
        vm.warp(time() + bound(seconds_ >> 8, 1, most));
        mine(bound(blocks_ >> 8, 1, blocks_ % 16 == 0 ? 400 : 3));
    }

    function behaveToken(uint256 which, uint256 manner) external act {
        // Fee only while publishing: see publishWithFee.
        uint8[6] memory manners = [0, 0, 0, 2, 3, 4];
        (which % 2 == 0 ? coin : shell).behave(MannerToken.Manner(manners[manner % 6]));
    }

    function behaveHostile(uint256 manner, uint256 t) external act {
        if (manner % 5 != 2) return hostile.behave(Hostile.Manner(manner % 5), "");
        address self = address(hostile);
        bytes[4] memory again = [
            abi.encodeCall(HealChainEscrow.refundPublisher, (records.length == 0 ? "" : pick(t).id, self)),
            abi.encodeCall(RewardDistribution.withdrawTo, (address(0), self)),
            abi.encodeCall(StakeRegistry.withdrawStake, (self)),
            abi.encodeCall(StakeRegistry.withdrawCredit, (self))
        ];
        hostile.behave(Hostile.Manner.Reenter, again[manner / 5 % 4]);
    }

    /// @dev Ether that a destroyed contract leaves, and tokens that nobody asked for.
    function donate(uint256 which, uint256 token, uint256 amount) external act {
        amount %= 2 ** 64;
        address[3] memory holders = [address(escrow), address(rewards), address(registry)];
        address holder = holders[which % 3];
        if (token % 3 == 0) vm.deal(holder, holder.balance + amount);
        else MannerToken(tokens[token % 3]).mint(holder, amount);
        donated[holder][tokens[token % 3]] += amount;
        forbid(try_(outsider, holder, 1, ""), "ether sent to a contract");
    }

    // Stakes

    function depositStake(uint256 who, uint256 amount) public {
        address miner = people[who % people.length];
        amount = bound(amount, 0, 100 ether);
        bool ok = try_(miner, address(registry), amount, abi.encodeCall(StakeRegistry.depositStake, ()));
        forbid(ok != (amount > 0), "an empty deposit");
        if (ok) deposited[miner] += amount;
    }

    /// @dev What no task holds, and what an earlier request took out.
    function requestWithdrawal(uint256 who, uint256 amount) external act {
        address miner = people[who % people.length];
        (uint256 earlier,) = registry.getWithdrawal(miner);
        uint256 stake = registry.stakeOf(miner);
        uint256 most = registry.availableStake(miner) + earlier;
        amount = amount % 4 == 0 ? 0 : bound(amount >> 2, 0, most + 1);
        bool ok = try_(miner, address(registry), 0, abi.encodeCall(StakeRegistry.requestWithdrawal, (amount)));
        forbid(ok != (amount <= most), "a request beyond what is available");
        if (!ok) return;
        (uint256 requested, uint40 withdrawableAt) = registry.getWithdrawal(miner);
        forbid(requested != amount || withdrawableAt != time() + DELAY_S, "another request");
        forbid(registry.stakeOf(miner) + amount != stake + earlier, "a request that changed what is there");
    }

    function withdrawStake(uint256 who, uint256 to) external act {
        address miner = people[who % people.length];
        (uint256 amount, uint40 allowedAt) = registry.getWithdrawal(miner);
        // Some wait as long as they have to.
        if (to >> 8 & 1 == 0 && amount > 0 && allowedAt > time()) vm.warp(allowedAt);
        uint256 stake = registry.stakeOf(miner);
        bytes memory call = abi.encodeCall(StakeRegistry.withdrawStake, (recipientOf(miner, to)));
        bool ok = try_(miner, address(registry), 0, call);
        bool isOwed = amount > 0 && time() >= allowedAt;
        forbid(ok && !isOwed, "a stake left before its time");
        forbid(!ok && isOwed && recipientOf(miner, to) == miner && miner != address(hostile), "a withdrawal was refused");
        if (!ok) return;
        withdrawn[miner] += amount;
        forbid(registry.stakeOf(miner) != stake, "paid out of the stake");
        forbid(try_(miner, address(registry), 0, call), "a stake left twice");
    }

    /// @dev Of any task, at any time, also with another cohort: it succeeds if and only if this is due.
    function releaseStake(uint256 t, uint256 position, uint256 trick) external act {
        if (records.length == 0) return;
        Record storage r = pick(t);
        position %= MINERS + 1;
        // Some wait for the end.
        if (trick >> 8 & 3 == 0 && time() <= latestEnd(r.terms)) vm.warp(latestEnd(r.terms) + 1);
        bytes32[] memory cohort = trick % 8 == 1 ? new bytes32[](1) : r.cohort;
        address miner = position < r.cohort.length ? accountOf(r.cohort[position]) : address(0);
        (bool isDue, uint256 i) = dueHold(t % records.length, miner);
        bytes memory call = abi.encodeCall(StakeRegistry.releaseStake, (r.id, cohort, position));
        bool ok = try_(outsider, address(registry), 0, call);
        forbid(ok != (isDue && trick % 8 != 1), "a release too early, twice, of another period, or refused");
        if (!ok) return;
        holds[miner][i].isReleased = true;
        forbid(try_(outsider, address(registry), 0, call), "released twice");
    }

    function dueHold(uint256 task, address miner) private view returns (bool isDue, uint256 i) {
        Hold[] storage all = holds[miner];
        while (i < all.length && all[i].task != task) i++;
        if (i == all.length) return (false, i);
        isDue = time() > all[i].end && !all[i].isReleased && isHeld(miner);
    }

    function withdrawCredit(uint256 who, uint256 to) external act {
        address miner = people[who % people.length];
        bytes memory call = abi.encodeCall(StakeRegistry.withdrawCredit, (recipientOf(miner, to)));
        if (!try_(miner, address(registry), 0, call)) return;
        forbid(registry.creditOf(miner) != 0 || try_(miner, address(registry), 0, call), "a credit left twice");
    }

    // From publication to the draw

    function publishTask(uint256 who, uint256 token, uint256 reward, uint256 shape) public {
        if (records.length == MOST_TASKS) return;
        Record storage r = records.push();
        r.id = string.concat("task ", vm.toString(records.length));
        r.key = keccak256(bytes(r.id));
        r.publisher = who % 3 == 0 ? address(hostile) : publisher;
        r.token = tokens[token % 3];
        r.reward = uint88(bound(reward >> 8, 1, reward % 4 == 0 ? 20 : 1e24));
        uint256[3] memory accuracies = [ACCURACY_PPM, 990_000, 1_500_000];
        r.accuracyPpm = accuracies[shape % 8 == 0 ? 2 : shape % 8 == 1 ? 1 : 0];
        r.terms = termsOf(shape >> 8);
        r.status = Status.Locked;
        if (!try_(r.publisher, address(escrow), fund(r.publisher, r.token, r.reward), publication(r))) {
            records.pop();
        }
    }

    /// @dev A token that keeps a fee cannot be a reward.
    function publishWithFee(uint256 who, uint256 token, uint256 reward, uint256 shape) external act {
        MannerToken one = MannerToken(tokens[1 + token % 2]);
        MannerToken.Manner manner = one.manner();
        one.behave(MannerToken.Manner.Fee);
        uint256 before = records.length;
        publishTask(who, 1 + token % 2, reward | 1 << 20 | 1, shape);
        // One part in a hundred of less than a hundred units is nothing.
        bool isTaken = records.length > before && records[before].reward >= 100;
        forbid(isTaken, "a token with a fee was taken");
        one.behave(manner);
    }

    /// @dev Also by the wrong publisher, with a forged application, with more stake than there is, or other than was signed.
    function closeRegistration(uint256 t, uint256 mask, uint256 trick) public {
        if (records.length == 0) return;
        Record storage r = pick(t);
        uint256[] memory who = chosen(mask);
        Application[] memory applications = signedFor(r.id, who, mask >> 24);
        trick %= 8;
        address sender = trick == 1 ? outsider : r.publisher;
        if (trick == 2) applications[0] = forged(r.id, who);
        if (trick == 3) applications[1] = applications[0];
        if (trick == 4) applications[0] = applicationOf(r.id, who[0], uint88(registry.availableStake(vm.addr(who[0])) + 1));
        if (trick == 5) applications[2].stake ^= 1;
        if (!try_(sender, address(registry), 0, abi.encodeCall(StakeRegistry.closeRegistration, (r.id, applications)))) {
            return;
        }
        forbid(trick >= 1 && trick <= 5, "a cohort that nobody agreed to");
        forbid(r.cohort.length > 0 || r.status != Status.Locked || time() > r.terms.deadline, "a second cohort, or late");
        r.who = who;
        r.cohort = cohortOf(applications);
        for (uint256 i = 0; i < who.length; i++) {
            forbid(applications[i].stake < r.terms.minStake, "less than the smallest stake");
            address miner = vm.addr(who[i]);
            if (!isHeld(miner)) delete holds[miner];
            holds[miner].push(Hold(t % records.length, latestEnd(r.terms), false));
        }
    }

    /// @dev All of what is available, half of it, the least that the others put behind it too, or nothing.
    function signedFor(string memory id, uint256[] memory who, uint256 seed) private view returns (Application[] memory all) {
        all = new Application[](who.length);
        for (uint256 i = 0; i < who.length; i++) {
            uint256 available = registry.availableStake(vm.addr(who[i]));
            uint256 choice = seed >> (4 * i) & 15;
            if (choice > 11) available /= 2;
            else if (choice > 7 && available > 0.5 ether) available = 0.5 ether;
            else if (choice == 7) available = 0;
            all[i] = applicationOf(id, who[i], uint88(available));
        }
    }

    function drawAggregator(uint256 t, uint256 trick) public {
        if (records.length == 0) return;
        Record storage r = pick(t);
        bytes32[] memory cohort = r.cohort;
        bool isLied = trick % 8 == 1;
        if (isLied && cohort.length > 0) cohort[0] = bytes32(uint256(cohort[0]) ^ 1);
        (uint40 seedBlock,,,,) = registry.getDraw(r.key);
        if (!try_(outsider, address(registry), 0, abi.encodeCall(StakeRegistry.drawAggregator, (r.id, cohort)))) return;
        forbid(isLied || r.turns.length > 0, "a second draw, or with another cohort");
        forbid(vm.getBlockNumber() > seedBlock + 256, "a seed that nobody can know");
        (, r.seed,,,) = registry.getDraw(r.key);
        forbid(r.seed != keccak256(abi.encodePacked(r.id, blockhash(seedBlock))), "another seed");
        r.turns.push(registry.aggregatorOf(r.key));
        r.isTurnShort = time() + r.terms.publishWindow_s > r.terms.deadline;
    }

    function moveSeed(uint256 t) external act {
        move(t);
    }

    function move(uint256 t) private {
        if (records.length == 0) return;
        Record storage r = pick(t);
        (uint40 seedBlock,,,,) = registry.getDraw(r.key);
        if (!try_(outsider, address(registry), 0, abi.encodeCall(StakeRegistry.moveSeed, (r.id)))) return;
        forbid(vm.getBlockNumber() <= seedBlock + 256 || r.turns.length > 0, "a seed moved that was known");
    }

    function resign(uint256 t, uint256 who) external act {
        if (records.length == 0) return;
        Record storage r = pick(t);
        address sender = who % 4 == 0 ? people[who / 4 % people.length] : registry.aggregatorOf(r.key);
        if (sender == address(0)) return;
        if (!try_(sender, address(registry), 0, abi.encodeCall(StakeRegistry.resignAggregator, (r.id)))) return;
        forbid(r.turns.length == 0 || sender != r.turns[r.turns.length - 1], "a stranger resigned");
        forbid(registry.aggregatorOf(r.key) != address(0), "resigned and still there");
    }

    function replaceAggregator(uint256 t) public {
        if (records.length == 0) return;
        Record storage r = pick(t);
        (,,,, uint40 turnEnd) = registry.getDraw(r.key);
        address former = registry.aggregatorOf(r.key);
        bytes memory call = abi.encodeCall(StakeRegistry.replaceAggregator, (r.id, r.cohort));
        uint256 before = former == address(0) ? 0 : registry.stakeOf(former);
        if (!try_(outsider, address(registry), 0, call)) return;
        forbid(r.blocks > 0, "replaced after the block");
        if (former != address(0)) {
            forbid(time() <= turnEnd, "replaced during its turn");
            uint256 taken = before - registry.stakeOf(former);
            forbid(taken > 0 && r.isTurnShort, "silence in a turn cut short");
            forbid(taken > 0 && time() > latestEnd(r.terms), "taken after the latest end");
            slashed[former] += taken;
            unallocated += taken;
        }
        address next = registry.aggregatorOf(r.key);
        forbid(next != address(0) && (time() > r.terms.deadline || r.status != Status.Locked), "a turn too late");
        if (next == address(0)) return;
        r.turns.push(next);
        r.isTurnShort = time() + r.terms.publishWindow_s > r.terms.deadline;
    }

    // Block and evidence

    /// @dev 0: as it should be. Else by a stranger, a former aggregator, or with votes that are too few, doubled, of another task,
    /// rejections, or a stranger's.
    function publishBlock(uint256 t, uint256 trick, uint256 seed) public {
        if (records.length == 0) return;
        Record storage r = pick(t);
        address aggregator = registry.aggregatorOf(r.key);
        if (aggregator == address(0)) return;
        (uint256[] memory scores, Candidate memory c) = proposal(r, seed);
        uint256 needed = blocks.requiredVotes(r.id, r.cohort.length);
        trick = trick % 16 > 8 ? 0 : trick % 16;
        address sender = trick == 1 ? outsider : trick == 2 ? r.turns[0] : aggregator;
        Vote[] memory votes = spoilt(r, c, trick, needed);
        if (!try_(sender, address(blocks), 0, abi.encodeCall(BlockPublisher.publishBlock, (c, votes, r.cohort)))) return;
        forbid(sender != aggregator || trick > 2, "a block without quorum or turn");
        forbid(time() > r.terms.deadline || r.status != Status.Locked, "a block too late");
        r.candidate = c;
        r.scores = scores;
        r.votesNeeded = needed;
        r.blocks += 1;
        r.status = Status.Published;
    }

    function equivocate(uint256 t, uint256 who, uint256 trick) external act {
        if (records.length == 0) return;
        Record storage r = pick(t);
        if (r.who.length == 0) return;
        // Mostly one that had a turn.
        bool isAnyone = who % 4 == 0 || r.turns.length == 0;
        address culprit = isAnyone ? vm.addr(r.who[who / 4 % r.who.length]) : r.turns[who / 4 % r.turns.length];
        uint256 key = keyOf[culprit];
        (, Candidate memory a) = proposal(r, trick);
        (, Candidate memory b) = proposal(r, trick);
        (a.aggregator, b.aggregator) = (culprit, culprit);
        b.modelSha256 = keccak256("another model");
        if (trick % 4 == 1) b.roundNumber += 1;
        if (trick % 4 == 2) b.modelSha256 = a.modelSha256;
        Vote memory second = signed(trick % 4 == 3 ? keys[who % MINERS] + 1 : key, blocks.candidateHash(b));
        Vote memory first = signed(key, blocks.candidateHash(a));
        uint256 before = registry.stakeOf(culprit);
        bytes memory call = abi.encodeCall(BlockPublisher.reportEquivocation, (a, first, b, second, r.cohort));
        if (!try_(outsider, address(blocks), 0, call)) return;
        forbid(trick % 4 != 0 || !hadTurn(r, culprit), "an innocent was slashed");
        forbid(time() > latestEnd(r.terms), "taken after the latest end");
        slashed[culprit] += before - registry.stakeOf(culprit);
        unallocated += before - registry.stakeOf(culprit);
        forbid(try_(outsider, address(blocks), 0, call), "slashed twice for one offence");
    }

    function creditSlashed(uint256 t, uint256 culprit, uint256 offence, uint256 position) public {
        if (records.length == 0) return;
        Record storage r = pick(t);
        StakeRegistry.Offence which = StakeRegistry.Offence(offence % 2);
        culprit %= MINERS;
        position %= MINERS + 1;
        address miner = position < r.cohort.length ? accountOf(r.cohort[position]) : address(0);
        uint256 before = registry.creditOf(miner);
        bytes memory call = abi.encodeCall(StakeRegistry.creditSlashed, (r.id, r.cohort, culprit, which, position));
        if (!try_(outsider, address(registry), 0, call)) return;
        unallocated -= registry.creditOf(miner) - before;
        forbid(culprit == position || miner == address(0), "the culprit was credited");
        forbid(try_(outsider, address(registry), 0, call), "credited twice");
    }

    // Reveals and payment

    function revealAccuracy(uint256 t, uint256 who, uint256 trick) public {
        if (records.length == 0) return;
        Record storage r = pick(t);
        address aggregator = r.blocks > 0 ? r.candidate.aggregator : outsider;
        address sender = who % 4 == 0 ? people[who / 4 % people.length] : who % 2 == 0 ? aggregator : r.publisher;
        bool isLied = trick % 8 == 1;
        uint256 accuracy = isLied ? 1 : r.accuracyPpm;
        bytes memory call = abi.encodeCall(RewardDistribution.revealAccuracy, (r.id, accuracy, SALT));
        if (!try_(sender, address(rewards), 0, call)) return;
        forbid(isLied || r.outcome != Outcome.Pending || r.blocks == 0, "an accuracy that is none");
        forbid(sender != r.publisher && sender != aggregator, "a stranger revealed");
        forbid(sender == r.publisher && r.accuracyPpm > PPM, "an impossible accuracy revealed by its publisher");
        r.outcome = r.accuracyPpm == 990_000 ? Outcome.Unmet : Outcome.Met;
        forbid(rewards.getSettlement(r.id).outcome != r.outcome, "another outcome");
    }

    function openScores(uint256 t) external act {
        if (records.length == 0) return;
        Record storage r = pick(t);
        if (!try_(outsider, address(rewards), 0, abi.encodeCall(RewardDistribution.openScores, (r.id)))) return;
        forbid(r.outcome != Outcome.Pending || r.blocks == 0, "opened twice");
        r.outcome = Outcome.Met;
    }

    /// @dev Also another score than committed to, and another's place.
    function revealScore(uint256 t, uint256 position, uint256 trick) public {
        if (records.length == 0) return;
        Record storage r = pick(t);
        if (r.blocks == 0) return;
        position %= r.scores.length;
        uint256 score = r.scores[position] + (trick % 8 == 1 ? 1 : 0);
        address sender = r.candidate.participants[trick % 8 == 2 ? (position + 1) % r.scores.length : position];
        bytes memory call = abi.encodeCall(RewardDistribution.revealScore, (r.id, openingOf(r.candidate, position, score)));
        if (!try_(sender, address(rewards), 0, call)) return;
        forbid(trick % 8 == 1 || trick % 8 == 2 || r.outcome == Outcome.Unmet, "another score");
        forbid(r.status == Status.Settled, "a score after the distribution");
        r.outcome = Outcome.Met;
        r.scoreSum += score;
        r.revealed += 1;
        r.revealedBits |= 1 << position;
        forbid(try_(sender, address(rewards), 0, call), "a score counted twice");
    }

    function distribute(uint256 t) public {
        if (records.length == 0) return;
        Record storage r = pick(t);
        bytes memory call = abi.encodeCall(RewardDistribution.distribute, (r.id));
        if (!try_(outsider, address(rewards), 0, call)) return;
        Settlement memory s = rewards.getSettlement(r.id);
        forbid(r.blocks == 0, "paid without a block");
        if (r.outcome == Outcome.Pending) r.outcome = Outcome.Met;
        forbid(r.outcome == Outcome.Met && r.revealed < r.scores.length && time() <= s.scoreRevealEnd, "paid too early");
        r.credited = r.reward - s.remaining;
        forbid(r.outcome == Outcome.Unmet && s.remaining > 0, "miners paid below the requirement");
        uint256 share = s.isShareForfeited ? 0 : uint256(r.reward) * r.terms.aggregatorSharePpm / PPM;
        forbid(r.outcome == Outcome.Met && r.credited != share, "another share");
        r.status = Status.Settled;
        forbid(try_(outsider, address(rewards), 0, call), "distributed twice");
    }

    /// @dev Anyone, of any task in any token; also others' places, and another score than committed to.
    function claimTo(uint256 who, uint256 token, uint256 t, uint256 trick, uint256 to) external act {
        if (records.length == 0) return;
        Record storage r = pick(t);
        if (r.blocks == 0) return;
        trick %= 8;
        address account = people[who % people.length];
        uint256 place = placeOf(r, account);
        bool isForeign = place == r.scores.length;
        if (isForeign) place = who % r.scores.length;
        address asset = trick == 1 ? tokens[token % 3] : r.token;
        Opening memory opening = openingOf(r.candidate, place, r.scores[place] + (trick == 2 ? 1 : 0));
        if (trick == 3) opening.position = place ^ 1;
        if (trick == 4) opening.position = place + 256;
        bool isLied = isForeign || asset != r.token || (trick >= 2 && trick <= 4);
        claimAs(r, account, asset, recipientOf(account, to), opening, isLied);
    }

    /// @dev It succeeds if and only if this is due; see {Checks.checkTaskConservation} for what is left.
    function claimAs(Record storage r, address account, address asset, address to, Opening memory opening, bool isLied)
        private
    {
        (bool isDue, uint256 amount) = dueClaim(r, opening.position, isLied);
        uint256 before = held(asset, to);
        if (!isLied) vm.assertEq(rewards.claimable(r.key, asset, opening.position, opening.score), amount, "claimable");
        bytes memory call = abi.encodeCall(RewardDistribution.claimTo, (r.id, asset, to, opening));
        bool ok = try_(account, address(rewards), 0, call);
        forbid(ok && !isDue, "a claim twice, too early, another's, or in another token");
        forbid(!ok && isDue && (amount == 0 || (to == account && isGood(asset))), "a claim was refused");
        if (!ok) return;
        r.claimedBits |= 1 << opening.position;
        r.claimed += amount;
        forbid(held(asset, to) - before != amount, "another amount than owed");
        forbid(try_(account, address(rewards), 0, call), "claimed twice");
    }

    function dueClaim(Record storage r, uint256 place, bool isLied) private view returns (bool isDue, uint256 amount) {
        Settlement memory s = rewards.getSettlement(r.id);
        isDue = !isLied && s.remainingParts > 0 && r.claimedBits >> place & 1 == 0;
        if (isDue) amount = s.remaining * partsOf(r, place) / s.remainingParts;
    }

    function isGood(address asset) private view returns (bool) {
        if (asset == address(0)) return true;
        MannerToken.Manner manner = MannerToken(asset).manner();
        return manner == MannerToken.Manner.Good || manner == MannerToken.Manner.Silent;
    }

    /// @dev Anyone, its balance in any token; mostly one that has any.
    function withdrawTo(uint256 who, uint256 token, uint256 to) external act {
        (address account, address asset) = to >> 8 & 3 == 0 ? balanceAt(who, token) : owed(who);
        uint256 balance = rewards.balanceOf(asset, account);
        address recipient = recipientOf(account, to);
        uint256 before = held(asset, recipient);
        bytes memory call = abi.encodeCall(RewardDistribution.withdrawTo, (asset, recipient));
        bool ok = try_(account, address(rewards), 0, call);
        bool isPayable = recipient == account && account != address(hostile) && isGood(asset);
        forbid(!ok && balance > 0 && isPayable, "a withdrawal was refused");
        if (!ok) return;
        forbid(balance == 0 || held(asset, recipient) - before != balance, "another amount than owed");
        forbid(try_(account, address(rewards), 0, call), "withdrawn twice");
    }

    function balanceAt(uint256 who, uint256 token) private view returns (address account, address asset) {
        return (people[who % people.length], tokens[token % 3]);
    }

    /// @dev The first, beginning anywhere, that has a balance.
    function owed(uint256 first) private view returns (address account, address asset) {
        for (uint256 i = 0; i < 3 * people.length; i++) {
            (account, asset) = balanceAt(first % people.length + i / 3, i);
            if (rewards.balanceOf(asset, account) > 0) return (account, asset);
        }
    }

    function refund(uint256 t, uint256 who, uint256 to) public {
        if (records.length == 0) return;
        Record storage r = pick(t);
        address sender = who % 4 == 0 ? people[who / 4 % people.length] : r.publisher;
        address recipient = recipientOf(sender, to);
        uint256 before = held(r.token, recipient);
        bytes memory call = abi.encodeCall(HealChainEscrow.refundPublisher, (r.id, recipient));
        if (!try_(sender, address(escrow), 0, call)) return;
        forbid(sender != r.publisher || time() <= r.terms.deadline, "a refund to a stranger, or too early");
        forbid(r.status != Status.Locked, "a refund after a block or a refund");
        forbid(held(r.token, recipient) - before != r.reward, "another amount than the reward");
        r.refunds += 1;
        r.status = Status.Refunded;
    }

    /// @notice The next step of a task, as it should be: so that random histories reach the end of tasks.
    function drive(uint256 t, uint256 seed) public {
        if (records.length == 0 || (seed % 4 == 0 && records.length < MOST_TASKS)) {
            return publishTask(seed >> 4, seed >> 8, seed >> 16, seed >> 32);
        }
        Record storage r = pick(t);
        if (r.status == Status.Locked && r.cohort.length == 0) {
            for (uint256 i = 0; i < MINERS; i++) {
                if (registry.availableStake(people[i]) < 1 ether) depositStake(i, (seed >> (8 * i)) % 5 ether + 1 ether);
            }
            return closeRegistration(t, seed >> 8, 0);
        }
        if (r.status == Status.Locked && r.turns.length == 0) {
            // Sometimes nobody draws while the seed is known.
            if (seed >> 4 & 7 == 0) mine(300);
            if (seed >> 4 & 7 == 0) move(t);
            mine(2);
            return drawAggregator(t, 0);
        }
        if (r.status == Status.Locked && seed >> 4 & 3 == 0) return driveSilence(t, seed >> 8);
        if (r.status == Status.Locked) return publishBlock(t, 0, seed >> 8);
        if (r.status == Status.Settled && r.scores.length > 0) return driveClaim(r, seed >> 4);
        if (r.status != Status.Published) return;
        if (r.outcome == Outcome.Pending) return revealAccuracy(t, 1 + seed % 2, 0);
        for (uint256 i = 0; i < r.scores.length; i++) {
            bool isRevealed = r.revealedBits >> i & 1 != 0;
            if (r.outcome == Outcome.Met && !isRevealed && seed >> 8 & 1 << i != 0) revealScore(t, i, 0);
        }
        distribute(t);
    }

    function driveClaim(Record storage r, uint256 seed) private {
        uint256 place = seed % r.scores.length;
        address account = r.candidate.participants[place];
        claimAs(r, account, r.token, account, openingOf(r.candidate, place, r.scores[place]), false);
    }

    /// @dev A turn passes without a block, and one of the others takes its part.
    function driveSilence(uint256 t, uint256 seed) private {
        Record storage r = pick(t);
        (,,,, uint40 turnEnd) = registry.getDraw(r.key);
        address former = r.turns[r.turns.length - 1];
        if (turnEnd >= time()) vm.warp(turnEnd + 1);
        replaceAggregator(t);
        for (uint256 i = 0; i < r.cohort.length; i++) {
            if (accountOf(r.cohort[i]) == former) creditSlashed(t, i, 0, (i + 1 + seed % 2) % r.cohort.length);
        }
    }

    // The end

    /// @notice All time passes, tokens behave, and everybody takes what is its own: nothing stays but gifts.
    function finish() external {
        coin.behave(MannerToken.Manner.Good);
        shell.behave(MannerToken.Manner.Good);
        hostile.behave(Hostile.Manner.Accept, "");
        vm.warp(time() + 800 days);
        mine(1);
        for (uint256 t = 0; t < records.length; t++) finishTask(t);
        for (uint256 i = 0; i < people.length; i++) finishAccount(people[i]);
        vm.assertEq(unallocated, 0, "slashed and credited to nobody");
        for (uint256 k = 0; k < 3; k++) {
            vm.assertEq(held(tokens[k], address(escrow)), donated[address(escrow)][tokens[k]], "left in the escrow");
            vm.assertEq(held(tokens[k], address(rewards)), donated[address(rewards)][tokens[k]], "left in rewards");
        }
        vm.assertEq(address(registry).balance, donated[address(registry)][address(0)], "left in the registry");
    }

    function finishTask(uint256 t) private {
        Record storage r = records[t];
        replaceAggregator(t);
        if (r.status == Status.Locked) refund(t, 1, 0);
        if (r.status == Status.Published) distribute(t);
        vm.assertTrue(r.status == Status.Refunded || r.status == Status.Settled, "a task without an end");
        for (uint256 i = 0; i < r.scores.length && r.outcome == Outcome.Met; i++) {
            // Scores of zero find an empty pool once all others have claimed.
            if (r.claimedBits >> i & 1 != 0 || rewards.getSettlement(r.id).remainingParts == 0) continue;
            claim(r.candidate, i, r.scores[i]);
        }
        for (uint256 i = 0; i < r.cohort.length; i++) {
            for (uint256 j = 0; j < r.cohort.length; j++) {
                creditSlashed(t, i, 0, j);
                creditSlashed(t, i, 1, j);
            }
        }
    }

    function finishAccount(address account) private {
        for (uint256 k = 0; k < 3; k++) {
            if (rewards.balanceOf(tokens[k], account) == 0) continue;
            vm.prank(account);
            rewards.withdrawTo(tokens[k], address(0xCAFE));
        }
        vm.startPrank(account);
        if (registry.creditOf(account) > 0) registry.withdrawCredit(address(0xCAFE));
        (uint256 requested,) = registry.getWithdrawal(account);
        uint256 all = registry.stakeOf(account) + requested;
        registry.requestWithdrawal(all);
        vm.warp(time() + DELAY_S);
        if (all > 0) registry.withdrawStake(address(0xCAFE));
        vm.stopPrank();
    }

    // Parts of the above

    function pick(uint256 t) private view returns (Record storage) {
        return records[t % records.length];
    }

    function termsOf(uint256 shape) private view returns (Terms memory t) {
        t = terms();
        t.deadline = uint40(time() + bound(shape, 1 hours, 6 days));
        t.publishWindow_s = shape >> 32 & 1 == 0 ? 1 hours : 1 days;
        uint24[4] memory penalties = [uint24(0), 250_000, 333_333, 1_000_000];
        t.silencePenaltyPpm = penalties[shape >> 34 & 3];
        uint24[4] memory shares = [uint24(0), 1, 333_333, 500_000];
        t.aggregatorSharePpm = shares[shape >> 36 & 3];
        uint24[4] memory faults = [uint24(0), 250_000, 333_334, 500_000];
        t.faultRatePpm = faults[shape >> 38 & 3];
        t.minStake = shape >> 40 & 1 == 0 ? 0 : 0.5 ether;
        uint64[4] memory scores = [uint64(1), 100, 1_000_000, type(uint64).max];
        t.maxScore = scores[shape >> 42 & 3];
    }

    /// @dev Gives the publisher what it needs; the value to send along.
    function fund(address account, address token, uint256 amount) private returns (uint256) {
        if (token == address(0)) return amount;
        MannerToken(token).mint(account, amount);
        vm.prank(account);
        MannerToken(token).approve(address(escrow), amount);
        return 0;
    }

    function publication(Record storage r) private view returns (bytes memory) {
        return abi.encodeCall(
            HealChainEscrow.publishTask,
            (r.id, commitOf(r.accuracyPpm), keccak256("spec"), r.token, r.reward, r.terms)
        );
    }

    /// @dev Three to five of the miners, ascending.
    function chosen(uint256 mask) private view returns (uint256[] memory who) {
        uint256 left = (mask >> 8) % 3;
        uint256 first = mask % MINERS;
        uint256 second = (first + 1 + (mask >> 16) % (MINERS - 1)) % MINERS;
        who = new uint256[](MINERS - left);
        uint256 count = 0;
        for (uint256 i = 0; i < MINERS; i++) {
            if ((left > 0 && i == first) || (left > 1 && i == second)) continue;
            who[count++] = keys[i];
        }
    }

    /// @dev Another member's signature under the first one's name.
    function forged(string memory id, uint256[] memory who) private view returns (Application memory a) {
        a = applicationOf(id, who[1]);
        a.miner = vm.addr(who[0]);
    }

    /// @dev All of the cohort or its first three, with scores that are zero, any, or the largest.
    function proposal(Record storage r, uint256 seed)
        private
        view
        returns (uint256[] memory scores, Candidate memory c)
    {
        uint256 count = seed % 2 == 0 ? r.who.length : 3;
        uint256[] memory who = new uint256[](count);
        scores = new uint256[](count);
        for (uint256 i = 0; i < count; i++) {
            who[i] = r.who[i];
            uint256 draw_ = uint256(keccak256(abi.encode(seed, i)));
            scores[i] = seed >> 1 & 3 == 0 ? 0 : draw_ % 4 == 0 ? r.terms.maxScore : draw_ % (uint256(r.terms.maxScore) + 1);
        }
        c = candidateOf(r.id, who, scores);
    }

    function spoilt(Record storage r, Candidate memory c, uint256 trick, uint256 needed)
        private
        view
        returns (Vote[] memory votes)
    {
        votes = votesOf(c, r.who);
        if (trick == 3) votes = firstOf(votes, needed - 1);
        if (trick == 4) votes[votes.length - 1] = votes[0];
        bytes32 struct_ = attestationOf(c, true);
        if (trick == 5) struct_ = attestationOf(c, false);
        if (trick == 6) struct_ = attestationOf("another", c.roundNumber, blocks.candidateHash(c), true);
        if (trick == 7) struct_ = attestationOf(c.taskID, c.roundNumber + 1, blocks.candidateHash(c), true);
        if (trick >= 5 && trick <= 7) votes[0] = signed(r.who[0], struct_);
        if (trick == 8) votes[0] = signed(uint256(keccak256("stranger")) >> 8, struct_);
    }

    function firstOf(Vote[] memory votes, uint256 count) private pure returns (Vote[] memory some) {
        some = new Vote[](count);
        for (uint256 i = 0; i < count; i++) some[i] = votes[i];
    }

    function hadTurn(Record storage r, address account) private view returns (bool) {
        for (uint256 i = 0; i < r.turns.length; i++) {
            if (r.turns[i] == account) return true;
        }
        return false;
    }

    /// @dev The number of participants for who is none.
    function placeOf(Record storage r, address account) private view returns (uint256 place) {
        while (place < r.scores.length && r.candidate.participants[place] != account) place++;
    }

    function recipientOf(address account, uint256 to) private view returns (address) {
        return to % 4 == 1 ? address(hostile) : to % 16 == 2 ? address(0) : account;
    }
}
