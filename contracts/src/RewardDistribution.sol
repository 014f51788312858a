// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {ReentrancyGuard} from "@openzeppelin/contracts/utils/ReentrancyGuard.sol";
import {BlockMeta, BlockPublisher} from "./BlockPublisher.sol";
import {HealChainEscrow} from "./HealChainEscrow.sol";
import {pay} from "./Payment.sol";
import {OnlyContract, PPM, Task, taskKeyOf} from "./Task.sol";

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
    /// The reward is credited.
    bool isSettled;
    uint64 publisherRevealEnd;
    uint64 aggregatorRevealEnd;
    /// Zero while the outcome is pending.
    uint64 scoreRevealEnd;
    uint32 revealedCount;
    uint256 scoreSum;
}

/// @title Reveals, and what everyone is owed (M7).
/// @notice The reward of a task moves here from the escrow when it is credited. Everyone withdraws its own balance.
contract RewardDistribution is ReentrancyGuard {
    struct State {
        Outcome outcome;
        bool isShareForfeited;
        bool isSettled;
        uint64 scoreRevealEnd;
        uint32 revealedCount;
        /// 200 scores of 128 bits fit in 136.
        uint136 scoreSum;
    }

    struct Score {
        bool isRevealed;
        uint128 value;
    }

    /// @notice The escrow of this deployment.
    HealChainEscrow public immutable escrow;
    /// @notice The block publisher of this deployment.
    BlockPublisher public immutable blockPublisher;

    /// @notice Wei that an account can withdraw.
    mapping(address account => uint256) public balanceOf;

    mapping(bytes32 taskKey => State) private _states;
    mapping(bytes32 taskKey => mapping(address miner => Score)) private _scores;

    event AccuracyRevealed(
        bytes32 indexed taskKey, address indexed revealer, uint256 accuracyPpm, Outcome outcome, uint64 scoreRevealEnd
    );
    event ScoresOpened(bytes32 indexed taskKey, uint64 scoreRevealEnd);
    event ScoreRevealed(bytes32 indexed taskKey, address indexed miner, uint256 score);
    event RewardCredited(bytes32 indexed taskKey, address indexed account, uint256 amount);
    event Distributed(
        bytes32 indexed taskKey, address indexed aggregator, uint256 reward, uint256 aggregatorShare, uint256 scoreSum
    );
    event Withdrawn(address indexed account, address indexed recipient, uint256 amount);

    error NoBlock(string taskID);
    error NotEntitled(string taskID, address caller);
    error AccuracyAlreadyRevealed(string taskID);
    error InvalidReveal(string taskID, address caller);
    error RevealTooEarly(uint64 opensAfter, uint256 timestamp);
    error RevealTooLate(uint64 end, uint256 timestamp);
    error OutcomePending(uint64 aggregatorRevealEnd, uint256 timestamp);
    error RequirementUnmet(string taskID);
    error ScoresAlreadyOpen(string taskID);
    error NotParticipant(string taskID, address caller);
    error ScoreAlreadyRevealed(string taskID, address miner);
    error ScoreTooLarge(uint256 score, uint128 maxScore);
    error ScoresStillOpen(uint64 scoreRevealEnd, uint256 timestamp);
    error AlreadyDistributed(string taskID);
    error NothingToWithdraw(address account);
    error InvalidRecipient(address recipient);

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

    /// @notice Opens the accuracy commitment of a task. The publisher may within its window after the block; after that the
    /// aggregator may within its own. Below the requirement, the publisher is credited with the reward; otherwise the miners'
    /// window to reveal scores starts now.
    /// @dev An accuracy above 1 cannot be a requirement: the publisher may not reveal it ({InvalidReveal}); from the aggregator it
    /// proves a commitment in bad faith and counts as met. Emits {AccuracyRevealed}, and {RewardCredited} when unmet. Reverts
    /// with {NoBlock}, {AccuracyAlreadyRevealed}, {NotEntitled}, {RevealTooEarly}, {RevealTooLate} or {InvalidReveal}.
    /// @param accuracyPpm The required accuracy in parts per million.
    /// @param salt The random part of the commitment.
    function revealAccuracy(string calldata taskID, uint256 accuracyPpm, bytes32 salt) external nonReentrant {
        bytes32 key = taskKeyOf(taskID);
        Task memory task = escrow.getTask(taskID);
        BlockMeta memory meta = _blockOf(taskID);
        State storage state = _states[key];

        if (state.outcome != Outcome.Pending) revert AccuracyAlreadyRevealed(taskID);
        uint64 publisherEnd = meta.publishedAt + task.terms.publisherRevealWindow_s;
        uint64 aggregatorEnd = publisherEnd + task.terms.aggregatorRevealWindow_s;
        bool isPublisher = msg.sender == task.publisher;
        if (!isPublisher && msg.sender != meta.aggregator) revert NotEntitled(taskID, msg.sender);
        if (!isPublisher && block.timestamp <= publisherEnd) revert RevealTooEarly(publisherEnd, block.timestamp);
        uint64 end = isPublisher ? publisherEnd : aggregatorEnd;
        if (block.timestamp > end) revert RevealTooLate(end, block.timestamp);
        bool isImpossible = accuracyPpm > PPM;
        if (
            keccak256(abi.encodePacked(accuracyPpm, salt)) != task.accuracyCommit || (isPublisher && isImpossible)
        ) {
            revert InvalidReveal(taskID, msg.sender);
        }

        // Products of 32-bit counts and at most a million: no overflow.
        if (isImpossible || meta.correct * PPM >= accuracyPpm * meta.total) {
            state.outcome = Outcome.Met;
            state.scoreRevealEnd = uint64(block.timestamp) + task.terms.scoreRevealWindow_s;
            emit AccuracyRevealed(key, msg.sender, accuracyPpm, Outcome.Met, state.scoreRevealEnd);
        } else {
            state.outcome = Outcome.Unmet;
            state.isSettled = true;
            emit AccuracyRevealed(key, msg.sender, accuracyPpm, Outcome.Unmet, 0);
            _credit(key, task.publisher, task.reward);
            escrow.releaseReward(taskID);
        }
    }

    /// @notice Records that publisher and aggregator both stayed silent: the block, which a quorum accepted, counts as good
    /// enough, and the aggregator forfeits its share. Anyone may call it; revealScore and distribute do the same by themselves.
    /// The window for scores does not depend on this call: it is the scoreRevealWindow_s after the aggregator's.
    /// @dev Emits {ScoresOpened}. Reverts with {NoBlock}, {OutcomePending}, {RequirementUnmet} or {ScoresAlreadyOpen}.
    function openScores(string calldata taskID) external {
        bytes32 key = taskKeyOf(taskID);
        if (_states[key].outcome == Outcome.Met) revert ScoresAlreadyOpen(taskID);
        _requireMet(taskID, key, escrow.getTask(taskID), _blockOf(taskID));
    }

    /// @notice Opens the sender's own score commitment, once, within the window.
    /// @dev Emits {ScoreRevealed}, after {ScoresOpened} when it is the first after silence. Reverts with {NoBlock},
    /// {OutcomePending}, {RequirementUnmet}, {NotParticipant}, {ScoreAlreadyRevealed}, {RevealTooLate}, {ScoreTooLarge} or
    /// {InvalidReveal}.
    /// @param score The score, at most the task's maxScore.
    /// @param salt The random part of the commitment keccak256(abi.encodePacked(score, salt, taskID, msg.sender)).
    function revealScore(string calldata taskID, uint256 score, bytes32 salt) external {
        bytes32 key = taskKeyOf(taskID);
        Task memory task = escrow.getTask(taskID);
        State storage state = _requireMet(taskID, key, task, _blockOf(taskID));
        Score storage revealed = _scores[key][msg.sender];
        (bool isParticipant, bytes32 commit,) = blockPublisher.scoreCommitOf(taskID, msg.sender);

        if (!isParticipant) revert NotParticipant(taskID, msg.sender);
        if (revealed.isRevealed) revert ScoreAlreadyRevealed(taskID, msg.sender);
        if (block.timestamp > state.scoreRevealEnd) revert RevealTooLate(state.scoreRevealEnd, block.timestamp);
        if (score > task.terms.maxScore) revert ScoreTooLarge(score, task.terms.maxScore);
        if (keccak256(abi.encodePacked(score, salt, taskID, msg.sender)) != commit) {
            revert InvalidReveal(taskID, msg.sender);
        }

        revealed.isRevealed = true;
        revealed.value = uint128(score);
        state.revealedCount += 1;
        state.scoreSum += uint136(score);
        emit ScoreRevealed(key, msg.sender, score);
    }

    /// @notice Credits the reward of a task, once, when all participants have revealed or their window has passed. Anyone may.
    /// The aggregator gets its share; the rest is split by revealed score, in equal parts among those who revealed when all
    /// these scores are zero, in equal parts among all participants when nobody revealed. The rounding residue goes to the
    /// aggregator, or, when its share is forfeited, to the first miner with a part.
    /// @dev Emits {RewardCredited} per amount above zero, and {Distributed}. Reverts with {NoBlock}, {OutcomePending},
    /// {RequirementUnmet}, {AlreadyDistributed} or {ScoresStillOpen}.
    function distribute(string calldata taskID) external nonReentrant {
        bytes32 key = taskKeyOf(taskID);
        Task memory task = escrow.getTask(taskID);
        BlockMeta memory meta = _blockOf(taskID);
        State storage state = _requireMet(taskID, key, task, meta);
        address[] memory participants = blockPublisher.getParticipants(taskID);

        if (state.isSettled) revert AlreadyDistributed(taskID);
        if (state.revealedCount < participants.length && block.timestamp <= state.scoreRevealEnd) {
            revert ScoresStillOpen(state.scoreRevealEnd, block.timestamp);
        }

        state.isSettled = true;
        uint256 share = state.isShareForfeited ? 0 : task.reward * task.terms.aggregatorSharePpm / PPM;
        (uint256[] memory amounts, uint256 residue) = _split(key, participants, task.reward - share, state);
        if (!state.isShareForfeited) {
            share += residue;
            _credit(key, meta.aggregator, share);
        }
        for (uint256 i = 0; i < participants.length; i++) _credit(key, participants[i], amounts[i]);
        emit Distributed(key, meta.aggregator, task.reward, share, state.scoreSum);

        escrow.releaseReward(taskID);
    }

    /// @notice Pays the sender its whole balance.
    /// @dev Emits {Withdrawn}. Reverts with {NothingToWithdraw} or TransferFailed.
    function withdraw() external nonReentrant {
        _withdraw(msg.sender);
    }

    /// @notice Pays the sender's whole balance to a recipient of its choice: for a contract that cannot receive ether itself.
    /// @dev Emits {Withdrawn}. Reverts with {InvalidRecipient}, {NothingToWithdraw} or TransferFailed.
    function withdrawTo(address recipient) external nonReentrant {
        if (recipient == address(0)) revert InvalidRecipient(recipient);
        _withdraw(recipient);
    }

    /// @notice How far a task is settled, at the time of the call. Reverts with {NoBlock}.
    function getSettlement(string calldata taskID) external view returns (Settlement memory settlement) {
        State storage state = _states[taskKeyOf(taskID)];
        Task memory task = escrow.getTask(taskID);
        settlement.publisherRevealEnd = _blockOf(taskID).publishedAt + task.terms.publisherRevealWindow_s;
        settlement.aggregatorRevealEnd = settlement.publisherRevealEnd + task.terms.aggregatorRevealWindow_s;
        settlement.outcome = state.outcome;
        settlement.isShareForfeited = state.isShareForfeited;
        settlement.isSettled = state.isSettled;
        settlement.scoreRevealEnd = state.scoreRevealEnd;
        settlement.revealedCount = state.revealedCount;
        settlement.scoreSum = state.scoreSum;
        if (state.outcome == Outcome.Pending && block.timestamp > settlement.aggregatorRevealEnd) {
            settlement.outcome = Outcome.Met;
            settlement.isShareForfeited = true;
            settlement.scoreRevealEnd = settlement.aggregatorRevealEnd + task.terms.scoreRevealWindow_s;
        }
    }

    /// @notice Whether a miner revealed its score, and the score.
    function scoreOf(string calldata taskID, address miner) external view returns (bool isRevealed, uint256 score) {
        Score storage revealed = _scores[taskKeyOf(taskID)][miner];
        return (revealed.isRevealed, revealed.value);
    }

    function _blockOf(string calldata taskID) private view returns (BlockMeta memory meta) {
        meta = blockPublisher.getBlockMeta(taskID);
        if (meta.publishedAt == 0) revert NoBlock(taskID);
    }

    /// @dev The state of a task whose outcome is Met, which it becomes by silence of publisher and aggregator.
    function _requireMet(string calldata taskID, bytes32 key, Task memory task, BlockMeta memory meta)
        private
        returns (State storage state)
    {
        state = _states[key];
        if (state.outcome == Outcome.Unmet) revert RequirementUnmet(taskID);
        if (state.outcome == Outcome.Pending) {
            uint64 silenceEnd =
                meta.publishedAt + task.terms.publisherRevealWindow_s + task.terms.aggregatorRevealWindow_s;
            if (block.timestamp <= silenceEnd) revert OutcomePending(silenceEnd, block.timestamp);
            state.outcome = Outcome.Met;
            state.isShareForfeited = true;
            state.scoreRevealEnd = silenceEnd + task.terms.scoreRevealWindow_s;
            emit ScoresOpened(key, state.scoreRevealEnd);
        }
    }

    /// @dev What each participant gets of an amount, rounded down, and the residue. When the aggregator's share is forfeited,
    /// the first miner with a part gets the residue too. amount * score fits in 256 bits: see InvalidTerms("maxScore").
    function _split(bytes32 key, address[] memory participants, uint256 amount, State storage state)
        private
        view
        returns (uint256[] memory amounts, uint256 residue)
    {
        amounts = new uint256[](participants.length);
        uint256 total = 0;
        if (state.scoreSum > 0) total = state.scoreSum;
        else if (state.revealedCount > 0) total = state.revealedCount;
        else total = participants.length;
        residue = amount;
        uint256 first = participants.length;
        for (uint256 i = 0; i < participants.length; i++) {
            uint256 parts = _parts(_scores[key][participants[i]], state);
            if (parts > 0 && first == participants.length) first = i;
            amounts[i] = amount * parts / total;
            residue -= amounts[i];
        }
        if (state.isShareForfeited) amounts[first] += residue;
    }

    /// @dev A score counts as it is; when all revealed ones are zero, each of them counts one; without any, everybody does.
    function _parts(Score memory score, State storage state) private view returns (uint256) {
        if (state.scoreSum > 0) return score.value;
        return score.isRevealed || state.revealedCount == 0 ? 1 : 0;
    }

    function _credit(bytes32 key, address account, uint256 amount) private {
        if (amount == 0) return;
        balanceOf[account] += amount;
        emit RewardCredited(key, account, amount);
    }

    function _withdraw(address recipient) private {
        uint256 amount = balanceOf[msg.sender];
        if (amount == 0) revert NothingToWithdraw(msg.sender);

        balanceOf[msg.sender] = 0;
        emit Withdrawn(msg.sender, recipient, amount);

        pay(recipient, amount);
    }
}
