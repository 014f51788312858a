// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {MerkleProof} from "@openzeppelin/contracts/utils/cryptography/MerkleProof.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import {BlockMeta, BlockPublisher} from "./BlockPublisher.sol";
import {contributionLeaf} from "./Cohort.sol";
import {HealChainEscrow} from "./HealChainEscrow.sol";
import {pay} from "./Payment.sol";
import {OnlyContract, PPM, Task, Terms, taskKeyOf} from "./Task.sol";

/// @notice Pending: the required accuracy is not known yet. Unmet: the publisher gets the reward back. Met: it is distributed.
enum Outcome {
    Pending,
    Unmet,
    Met
}

/// @notice How far a task with a block is settled. Times are unix seconds, each the last moment at which the act is accepted.
struct Settlement {
    Outcome outcome;
    /// Publisher and aggregator both stayed silent: the aggregator's share goes to the miners.
    bool isShareForfeited;
    /// The reward is here, and can be withdrawn.
    bool isDistributed;
    uint40 publisherRevealEnd;
    uint40 aggregatorRevealEnd;
    /// Zero while the outcome is pending.
    uint40 scoreRevealEnd;
    uint16 revealedCount;
    uint16 participantCount;
    uint256 scoreSum;
    /// What the participants have not withdrawn yet, and the parts that it is for.
    uint256 remaining;
    uint256 remainingParts;
}

/// @notice Opens a participant's score commitment in a block, and proves its place under the block's contributionsRoot.
struct Opening {
    uint256 score;
    /// The random part of the commitment keccak256(abi.encodePacked(score, salt, taskID, participant)).
    bytes32 salt;
    /// Index among the participants.
    uint256 position;
    bytes32[] proof;
}

/// @title Reveals, and what everyone is owed (M7).
/// @notice The reward of a task moves here from the escrow when it is distributed. Everyone withdraws its own: nobody's
/// refusal to be paid stands in another's way. Nobody owns this contract.
contract RewardDistribution is ReentrancyGuardTransient {
    /// @dev One slot.
    struct State {
        Outcome outcome;
        bool isShareForfeited;
        bool isDistributed;
        uint40 scoreRevealEnd;
        uint16 revealedCount;
        uint16 participantCount;
        uint64 maxScore;
        /// 200 scores of 64 bits fit in 72.
        uint72 scoreSum;
    }

    /// @dev What a participant's parts are: its score; or one, if it revealed; or one.
    enum Rule {
        ByScore,
        AmongRevealed,
        AmongAll
    }

    /// @dev What the participants have not claimed yet, and the parts that it is for. One slot.
    struct Pool {
        uint88 remaining;
        uint72 parts;
        Rule rule;
    }

    /// @notice The escrow of this deployment.
    HealChainEscrow public immutable escrow;
    /// @notice The block publisher of this deployment.
    BlockPublisher public immutable blockPublisher;

    /// @notice What an account can withdraw beside its claims: refunds, shares. In wei for token zero, or in the token's unit.
    mapping(address token => mapping(address account => uint256)) public balanceOf;

    mapping(bytes32 taskKey => State) private _states;
    mapping(bytes32 taskKey => bytes32) private _contributionsRoots;
    /// @dev By token as well, so that a claim in another token finds nothing.
    mapping(bytes32 taskKey => mapping(address token => Pool)) private _pools;
    /// @dev A bit per position: who revealed its score, and who claimed its part.
    mapping(bytes32 taskKey => uint256) private _revealed;
    mapping(bytes32 taskKey => uint256) private _claimed;

    event AccuracyRevealed(
        bytes32 indexed taskKey, address indexed revealer, uint256 accuracyPpm, Outcome outcome, uint40 scoreRevealEnd
    );
    event ScoresOpened(bytes32 indexed taskKey, uint40 scoreRevealEnd);
    event ScoreRevealed(bytes32 indexed taskKey, address indexed miner, uint256 position, uint256 score);
    event RewardCredited(bytes32 indexed taskKey, address indexed account, address token, uint256 amount);
    event Distributed(
        bytes32 indexed taskKey,
        address indexed aggregator,
        uint256 reward,
        uint256 aggregatorShare,
        uint256 pool,
        uint256 parts
    );
    event RewardClaimed(
        bytes32 indexed taskKey, address indexed miner, address indexed recipient, address token, uint256 amount
    );
    event Withdrawn(address indexed account, address indexed recipient, address token, uint256 amount);

    error NoBlock(string taskID);
    error NotEntitled(string taskID, address caller);
    error AccuracyAlreadyRevealed(string taskID);
    error InvalidReveal(string taskID, address caller);
    error RevealTooEarly(uint40 opensAfter, uint256 timestamp);
    error RevealTooLate(uint40 end, uint256 timestamp);
    error OutcomePending(uint40 aggregatorRevealEnd, uint256 timestamp);
    error RequirementUnmet(string taskID);
    error ScoresAlreadyOpen(string taskID);
    error NotParticipant(string taskID, address caller);
    error ScoreAlreadyRevealed(string taskID, address miner);
    error ScoreTooLarge(uint256 score, uint64 maxScore);
    error ScoresStillOpen(uint40 scoreRevealEnd, uint256 timestamp);
    error AlreadyDistributed(string taskID);
    error NotDistributed(string taskID, address token);
    error AlreadyClaimed(string taskID, address miner);
    error NothingToWithdraw(address account);

    /// @param escrow_ HealChainEscrow of this deployment.
    /// @param blockPublisher_ BlockPublisher of this deployment.
    constructor(HealChainEscrow escrow_, BlockPublisher blockPublisher_) {
        escrow = escrow_;
        blockPublisher = blockPublisher_;
    }

    /// @notice Takes released rewards from the escrow, and nothing from anyone else.
    receive() external payable {
        if (msg.sender != address(escrow)) revert OnlyContract(msg.sender, address(escrow));
    }

    // Reveals

    /// @notice Opens the accuracy commitment of a task. The publisher may within its window after the block; after that the
    /// aggregator may within its own. Below the requirement the reward is the publisher's again; otherwise the miners'
    /// window to reveal scores starts now.
    /// @dev An accuracy above 1 cannot be a requirement: the publisher may not reveal it ({InvalidReveal}); from the aggregator it
    /// proves a commitment in bad faith and counts as met. Emits {AccuracyRevealed}. Reverts with {NoBlock},
    /// {AccuracyAlreadyRevealed}, {NotEntitled}, {RevealTooEarly}, {RevealTooLate} or {InvalidReveal}.
    /// @param accuracyPpm The required accuracy in parts per million.
    /// @param salt The random part of the commitment.
    function revealAccuracy(string calldata taskID, uint256 accuracyPpm, bytes32 salt) external {
        bytes32 key = taskKeyOf(taskID);
        Task memory task = escrow.getTask(key);
        BlockMeta memory meta = _blockOf(taskID, key);

        if (_states[key].outcome != Outcome.Pending) revert AccuracyAlreadyRevealed(taskID);
        bool isPublisher = msg.sender == task.publisher;
        _checkRevealer(taskID, task, meta, isPublisher);
        bool isImpossible = accuracyPpm > PPM;
        if (
            keccak256(abi.encodePacked(accuracyPpm, salt)) != task.accuracyCommit || (isPublisher && isImpossible)
        ) {
            revert InvalidReveal(taskID, msg.sender);
        }

        // Products of 32-bit counts and at most a million: no overflow.
        if (isImpossible || meta.correct * PPM >= accuracyPpm * meta.total) {
            uint40 end = uint40(block.timestamp) + task.terms.scoreRevealWindow_s;
            _openScores(key, task.terms, meta, end, false);
            emit AccuracyRevealed(key, msg.sender, accuracyPpm, Outcome.Met, end);
        } else {
            _states[key].outcome = Outcome.Unmet;
            emit AccuracyRevealed(key, msg.sender, accuracyPpm, Outcome.Unmet, 0);
        }
    }

    /// @notice Records that publisher and aggregator both stayed silent: the block, which a quorum accepted, counts as good
    /// enough, and the aggregator forfeits its share. Anyone may call it; revealScore and distribute do the same by themselves.
    /// The window for scores does not depend on this call: it is the scoreRevealWindow_s after the aggregator's.
    /// @dev Emits {ScoresOpened}. Reverts with {NoBlock}, {OutcomePending}, {RequirementUnmet} or {ScoresAlreadyOpen}.
    function openScores(string calldata taskID) external {
        bytes32 key = taskKeyOf(taskID);
        if (_states[key].outcome == Outcome.Met) revert ScoresAlreadyOpen(taskID);
        _requireMet(taskID, key);
    }

    /// @notice Opens the sender's own score commitment, once, within the window.
    /// @dev Emits {ScoreRevealed}, after {ScoresOpened} when it is the first after silence. Reverts with {NoBlock},
    /// {OutcomePending}, {RequirementUnmet}, {RevealTooLate}, {ScoreTooLarge}, {NotParticipant} (also for another score or salt
    /// than committed, whose commitment is not in the block) or {ScoreAlreadyRevealed}.
    function revealScore(string calldata taskID, Opening calldata opening) external {
        bytes32 key = taskKeyOf(taskID);
        State memory state = _requireMet(taskID, key);
        uint256 revealed = _revealed[key];

        if (block.timestamp > state.scoreRevealEnd) revert RevealTooLate(state.scoreRevealEnd, block.timestamp);
        if (opening.score > state.maxScore) revert ScoreTooLarge(opening.score, state.maxScore);
        _checkOpening(taskID, key, opening);
        if (_bit(revealed, opening.position)) revert ScoreAlreadyRevealed(taskID, msg.sender);

        _revealed[key] = revealed | (1 << opening.position);
        state.revealedCount += 1;
        state.scoreSum += uint72(opening.score);
        _states[key] = state;
        emit ScoreRevealed(key, msg.sender, opening.position, opening.score);
    }

    // Payment

    /// @notice Brings the reward of a task here, once, when its outcome is final: unmet; or met, and all participants have revealed
    /// or their window has passed. Anyone may. Unmet, the publisher is credited with all of it; met, the aggregator with its
    /// share, and the rest is for the participants to claim.
    /// @dev Emits {RewardCredited}, and {Distributed} when met. Reverts with {NoBlock}, {OutcomePending}, {AlreadyDistributed},
    /// {ScoresStillOpen}, or the token's refusal; then it can be called again when the token pays.
    function distribute(string calldata taskID) external nonReentrant {
        bytes32 key = taskKeyOf(taskID);
        Task memory task = escrow.getTask(key);
        State memory state = _states[key].outcome == Outcome.Unmet ? _states[key] : _requireMet(taskID, key);

        if (state.isDistributed) revert AlreadyDistributed(taskID);
        if (state.revealedCount < state.participantCount && block.timestamp <= state.scoreRevealEnd) {
            revert ScoresStillOpen(state.scoreRevealEnd, block.timestamp);
        }

        _states[key].isDistributed = true;
        if (state.outcome == Outcome.Unmet) {
            _credit(key, task.publisher, task.token, task.reward);
        } else {
            _fillPool(key, task, state);
        }

        escrow.releaseReward(taskID);
    }

    /// @notice Pays the sender its part of a task's reward, once.
    /// @dev The part is what is left of the pool, times the sender's parts, by the parts of all who have not claimed yet, rounded
    /// down: whoever claims last takes the rest, so that nothing stays behind. (A part that rounds to zero can be claimed too:
    /// were it refused, participants with such parts would hold back each other's rest.) Emits {RewardClaimed}. Reverts with
    /// {NotDistributed} (also for another token than the task's), {NotParticipant}, {AlreadyClaimed}, InvalidRecipient,
    /// TransferFailed or the token's refusal.
    /// @param token The ERC-20 contract of the reward, or zero for ether.
    /// @param recipient Who gets it: the sender itself, or another account if it cannot receive.
    /// @param opening The sender's commitment in the block, revealed or not.
    function claimTo(string calldata taskID, address token, address recipient, Opening calldata opening)
        external
        nonReentrant
    {
        bytes32 key = taskKeyOf(taskID);
        Pool memory pool = _pools[key][token];
        uint256 claimed = _claimed[key];

        if (pool.parts == 0) revert NotDistributed(taskID, token);
        _checkOpening(taskID, key, opening);
        if (_bit(claimed, opening.position)) revert AlreadyClaimed(taskID, msg.sender);

        uint256 parts = _partsOf(key, pool.rule, opening.position, opening.score);
        uint256 amount = pool.remaining * parts / pool.parts;
        _claimed[key] = claimed | (1 << opening.position);
        pool.remaining -= uint88(amount);
        pool.parts -= uint72(parts);
        _pools[key][token] = pool;
        emit RewardClaimed(key, msg.sender, recipient, token, amount);

        if (amount > 0) pay(token, recipient, amount);
    }

    /// @notice Pays the sender's balance in one token, or in ether: refunds and aggregators' shares of all its tasks.
    /// @dev Emits {Withdrawn}. Reverts with {NothingToWithdraw}, InvalidRecipient, TransferFailed or the token's refusal.
    /// @param token The ERC-20 contract, or zero for ether.
    /// @param recipient Who gets it: the sender itself, or another account if it cannot receive.
    function withdrawTo(address token, address recipient) external nonReentrant {
        uint256 amount = balanceOf[token][msg.sender];
        if (amount == 0) revert NothingToWithdraw(msg.sender);

        balanceOf[token][msg.sender] = 0;
        emit Withdrawn(msg.sender, recipient, token, amount);

        pay(token, recipient, amount);
    }

    // Views

    /// @notice How far a task is settled, at the time of the call. Reverts with {NoBlock}.
    function getSettlement(string calldata taskID) external view returns (Settlement memory settlement) {
        bytes32 key = taskKeyOf(taskID);
        State storage state = _states[key];
        Task memory task = escrow.getTask(key);
        Terms memory terms = task.terms;
        BlockMeta memory meta = _blockOf(taskID, key);
        settlement.publisherRevealEnd = meta.publishedAt + terms.publisherRevealWindow_s;
        settlement.aggregatorRevealEnd = settlement.publisherRevealEnd + terms.aggregatorRevealWindow_s;
        settlement.outcome = state.outcome;
        settlement.isShareForfeited = state.isShareForfeited;
        settlement.isDistributed = state.isDistributed;
        settlement.scoreRevealEnd = state.scoreRevealEnd;
        settlement.revealedCount = state.revealedCount;
        settlement.participantCount = meta.participantCount;
        settlement.scoreSum = state.scoreSum;
        Pool storage pool = _pools[key][task.token];
        settlement.remaining = pool.remaining;
        settlement.remainingParts = pool.parts;
        if (state.outcome == Outcome.Pending && block.timestamp > settlement.aggregatorRevealEnd) {
            settlement.outcome = Outcome.Met;
            settlement.isShareForfeited = true;
            settlement.scoreRevealEnd = settlement.aggregatorRevealEnd + terms.scoreRevealWindow_s;
        }
    }

    /// @notice Whether the participant at a position revealed its score, and whether it claimed its part.
    /// @param taskKey keccak256(bytes(taskID)).
    function isRevealed(bytes32 taskKey, uint256 position) external view returns (bool revealed, bool claimed) {
        return (_bit(_revealed[taskKey], position), _bit(_claimed[taskKey], position));
    }

    /// @notice What a participant with this score at this position would be paid for its claim now; zero before distribution and
    /// after the claim.
    /// @param taskKey keccak256(bytes(taskID)).
    function claimable(bytes32 taskKey, address token, uint256 position, uint256 score) external view returns (uint256) {
        Pool storage pool = _pools[taskKey][token];
        if (pool.parts == 0 || position >= _states[taskKey].participantCount || _bit(_claimed[taskKey], position)) return 0;
        return pool.remaining * _partsOf(taskKey, pool.rule, position, score) / pool.parts;
    }

    function _blockOf(string calldata taskID, bytes32 key) private view returns (BlockMeta memory meta) {
        meta = blockPublisher.getBlockMeta(key);
        if (meta.publishedAt == 0) revert NoBlock(taskID);
    }

    function _checkRevealer(string calldata taskID, Task memory task, BlockMeta memory meta, bool isPublisher)
        private
        view
    {
        uint40 publisherEnd = meta.publishedAt + task.terms.publisherRevealWindow_s;
        uint40 end = isPublisher ? publisherEnd : publisherEnd + task.terms.aggregatorRevealWindow_s;
        if (!isPublisher && msg.sender != meta.aggregator) revert NotEntitled(taskID, msg.sender);
        if (!isPublisher && block.timestamp <= publisherEnd) revert RevealTooEarly(publisherEnd, block.timestamp);
        if (block.timestamp > end) revert RevealTooLate(end, block.timestamp);
    }

    /// @dev The state of a task whose outcome is Met, which it becomes by silence of publisher and aggregator.
    function _requireMet(string calldata taskID, bytes32 key) private returns (State memory) {
        Outcome outcome = _states[key].outcome;
        if (outcome == Outcome.Unmet) revert RequirementUnmet(taskID);
        if (outcome == Outcome.Pending) {
            (,, Terms memory terms) = escrow.getTerms(key);
            BlockMeta memory meta = _blockOf(taskID, key);
            uint40 silenceEnd =
                meta.publishedAt + terms.publisherRevealWindow_s + terms.aggregatorRevealWindow_s;
            if (block.timestamp <= silenceEnd) revert OutcomePending(silenceEnd, block.timestamp);
            _openScores(key, terms, meta, silenceEnd + terms.scoreRevealWindow_s, true);
            emit ScoresOpened(key, silenceEnd + terms.scoreRevealWindow_s);
        }
        return _states[key];
    }

    /// @dev Copies here what every reveal needs, which costs less than asking two contracts each time.
    function _openScores(bytes32 key, Terms memory terms, BlockMeta memory meta, uint40 end, bool isShareForfeited)
        private
    {
        _states[key] = State(Outcome.Met, isShareForfeited, false, end, 0, meta.participantCount, terms.maxScore, 0);
        _contributionsRoots[key] = meta.contributionsRoot;
    }

    function _fillPool(bytes32 key, Task memory task, State memory state) private {
        address aggregator = blockPublisher.getBlockMeta(key).aggregator;
        uint256 share = state.isShareForfeited ? 0 : task.reward * uint256(task.terms.aggregatorSharePpm) / PPM;
        Rule rule = state.scoreSum > 0 ? Rule.ByScore : state.revealedCount > 0 ? Rule.AmongRevealed : Rule.AmongAll;
        uint256 parts = rule == Rule.ByScore
            ? state.scoreSum
            : rule == Rule.AmongRevealed ? state.revealedCount : state.participantCount;

        _pools[key][task.token] = Pool(uint88(task.reward - share), uint72(parts), rule);
        emit Distributed(key, aggregator, task.reward, share, task.reward - share, parts);
        if (share > 0) _credit(key, aggregator, task.token, share);
    }

    function _credit(bytes32 key, address account, address token, uint256 amount) private {
        balanceOf[token][account] += amount;
        emit RewardCredited(key, account, token, amount);
    }

    /// @dev Unrevealed scores count nothing, unless nobody revealed one. remaining (88 bits) times parts (72 bits) fits.
    function _partsOf(bytes32 key, Rule rule, uint256 position, uint256 score) private view returns (uint256) {
        if (rule == Rule.AmongAll) return 1;
        if (!_bit(_revealed[key], position)) return 0;
        return rule == Rule.ByScore ? score : 1;
    }

    function _checkOpening(string calldata taskID, bytes32 key, Opening calldata opening) private view {
        bytes32 commit = keccak256(abi.encodePacked(opening.score, opening.salt, taskID, msg.sender));
        bytes32 leaf = contributionLeaf(opening.position, msg.sender, commit);
        if (MerkleProof.processProofCalldata(opening.proof, leaf) != _contributionsRoots[key]) {
            revert NotParticipant(taskID, msg.sender);
        }
    }

    function _bit(uint256 bits, uint256 position) private pure returns (bool) {
        return (bits >> position) & 1 != 0;
    }
}
