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

/// @notice A participant's place in a block, proved against the block's contributionsRoot.
struct Place {
    /// Index among the participants.
    uint256 position;
    bytes32 scoreCommit;
    bytes32[] proof;
}

/// @notice A participant's part of one task's reward.
struct Claim {
    string taskID;
    Place place;
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
        /// 200 scores of 62 bits fit in 70.
        uint72 scoreSum;
    }

    /// @dev What the participants have not withdrawn yet. One slot, and the token's.
    struct Pool {
        uint88 remaining;
        /// Parts of those who have not withdrawn yet: a score, or one each; see {_partsOf}.
        uint72 parts;
        address token;
    }

    uint256 private constant SCORES_PER_WORD = 4;
    uint256 private constant SCORE_BITS = 64;
    /// Above a score plus one, which is zero while it is not revealed.
    uint64 private constant IS_PAID = 1 << 63;

    /// @notice The escrow of this deployment.
    HealChainEscrow public immutable escrow;
    /// @notice The block publisher of this deployment.
    BlockPublisher public immutable blockPublisher;

    /// @notice What an account can withdraw beside its claims: refunds, shares. In wei for token zero, or in the token's unit.
    mapping(address token => mapping(address account => uint256)) public balanceOf;

    mapping(bytes32 taskKey => State) private _states;
    mapping(bytes32 taskKey => bytes32) private _contributionsRoots;
    mapping(bytes32 taskKey => Pool) private _pools;
    /// @dev Four scores a word, by position.
    mapping(bytes32 taskKey => mapping(uint256 word => uint256)) private _scores;

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
    event RewardClaimed(bytes32 indexed taskKey, address indexed miner, uint256 amount);
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
    error NotDistributed(string taskID);
    error AlreadyClaimed(string taskID, address miner);
    error WrongToken(string taskID, address token);
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
    /// {OutcomePending}, {RequirementUnmet}, {NotParticipant}, {ScoreAlreadyRevealed}, {RevealTooLate}, {ScoreTooLarge} or
    /// {InvalidReveal}.
    /// @param score The score, at most the task's maxScore.
    /// @param salt The random part of the commitment keccak256(abi.encodePacked(score, salt, taskID, msg.sender)).
    /// @param position The sender's index among the participants.
    /// @param proof From the leaf {position, sender, commitment} to the block's contributionsRoot.
    function revealScore(
        string calldata taskID,
        uint256 score,
        bytes32 salt,
        uint256 position,
        bytes32[] calldata proof
    ) external {
        bytes32 key = taskKeyOf(taskID);
        State memory state = _requireMet(taskID, key);

        if (block.timestamp > state.scoreRevealEnd) revert RevealTooLate(state.scoreRevealEnd, block.timestamp);
        if (score > state.maxScore) revert ScoreTooLarge(score, state.maxScore);
        bytes32 commit = keccak256(abi.encodePacked(score, salt, taskID, msg.sender));
        _checkPlace(taskID, key, position, commit, proof);
        if (_scoreWord(key, position) != 0) revert ScoreAlreadyRevealed(taskID, msg.sender);

        _setScoreWord(key, position, uint64(score) + 1);
        state.revealedCount += 1;
        state.scoreSum += uint72(score);
        _states[key] = state;
        emit ScoreRevealed(key, msg.sender, position, score);
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

    /// @notice Pays the sender all that it is owed in one token, or in ether: its balance, and its parts of the tasks it names.
    /// @dev A part is what is left of the pool, times the sender's parts, by the parts of all who have not claimed yet, rounded
    /// down: whoever claims last takes the rest, so that nothing stays behind. Emits {RewardClaimed} per claim and {Withdrawn}.
    /// Reverts with {NotDistributed}, {WrongToken}, {NotParticipant}, {AlreadyClaimed}, {NothingToWithdraw}, InvalidRecipient,
    /// TransferFailed or the token's refusal.
    /// @param token The ERC-20 contract, or zero for ether.
    /// @param recipient Who gets it: the sender itself, or another account if it cannot receive.
    /// @param claims The sender's places in blocks of tasks that are rewarded in this token; may be empty.
    function withdrawTo(address token, address recipient, Claim[] calldata claims) external nonReentrant {
        uint256 amount = balanceOf[token][msg.sender];
        if (amount > 0) balanceOf[token][msg.sender] = 0;
        for (uint256 i = 0; i < claims.length; i++) amount += _claim(claims[i], token);
        // A claim of nothing counts: were it refused, members whose parts round to zero would hold back each other's rest.
        if (amount == 0 && claims.length == 0) revert NothingToWithdraw(msg.sender);
        emit Withdrawn(msg.sender, recipient, token, amount);

        if (amount > 0) pay(token, recipient, amount);
    }

    // Views

    /// @notice How far a task is settled, at the time of the call. Reverts with {NoBlock}.
    function getSettlement(string calldata taskID) external view returns (Settlement memory settlement) {
        bytes32 key = taskKeyOf(taskID);
        State storage state = _states[key];
        Terms memory terms = escrow.getTask(key).terms;
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
        settlement.remaining = _pools[key].remaining;
        settlement.remainingParts = _pools[key].parts;
        if (state.outcome == Outcome.Pending && block.timestamp > settlement.aggregatorRevealEnd) {
            settlement.outcome = Outcome.Met;
            settlement.isShareForfeited = true;
            settlement.scoreRevealEnd = settlement.aggregatorRevealEnd + terms.scoreRevealWindow_s;
        }
    }

    /// @notice Whether the participant at a position revealed its score, the score, and whether it claimed its part.
    /// @param taskKey keccak256(bytes(taskID)).
    function getScore(bytes32 taskKey, uint256 position)
        external
        view
        returns (bool isRevealed, uint256 score, bool isClaimed)
    {
        uint64 word = _scoreWord(taskKey, position);
        isClaimed = word & IS_PAID != 0;
        word &= ~IS_PAID;
        return (word != 0, word == 0 ? 0 : word - 1, isClaimed);
    }

    /// @notice What the participant at a position would be paid for its claim now; zero before distribution and after the claim.
    /// @param taskKey keccak256(bytes(taskID)).
    function claimable(bytes32 taskKey, uint256 position) external view returns (uint256) {
        State memory state = _states[taskKey];
        uint64 word = _scoreWord(taskKey, position);
        Pool storage pool = _pools[taskKey];
        if (position >= state.participantCount || pool.parts == 0 || word & IS_PAID != 0) return 0;
        return pool.remaining * _partsOf(word, state) / pool.parts;
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
            Terms memory terms = escrow.getTask(key).terms;
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
        uint256 parts = state.scoreSum;
        if (parts == 0) parts = state.revealedCount > 0 ? state.revealedCount : state.participantCount;

        _pools[key] = Pool(uint88(task.reward - share), uint72(parts), task.token);
        emit Distributed(key, aggregator, task.reward, share, task.reward - share, parts);
        if (share > 0) _credit(key, aggregator, task.token, share);
    }

    function _credit(bytes32 key, address account, address token, uint256 amount) private {
        balanceOf[token][account] += amount;
        emit RewardCredited(key, account, token, amount);
    }

    /// @dev Takes the sender's part out of the pool. remaining (88 bits) times parts (72 bits) fits.
    function _claim(Claim calldata claim, address token) private returns (uint256 amount) {
        bytes32 key = taskKeyOf(claim.taskID);
        State memory state = _states[key];
        Pool memory pool = _pools[key];
        Place calldata place = claim.place;

        if (!state.isDistributed || state.outcome != Outcome.Met) revert NotDistributed(claim.taskID);
        if (pool.token != token) revert WrongToken(claim.taskID, pool.token);
        _checkPlace(claim.taskID, key, place.position, place.scoreCommit, place.proof);
        uint64 word = _scoreWord(key, place.position);
        if (word & IS_PAID != 0) revert AlreadyClaimed(claim.taskID, msg.sender);

        uint256 parts = _partsOf(word, state);
        amount = parts == 0 ? 0 : pool.remaining * parts / pool.parts;
        _setScoreWord(key, place.position, word | IS_PAID);
        _pools[key].remaining = uint88(pool.remaining - amount);
        _pools[key].parts = uint72(pool.parts - parts);
        emit RewardClaimed(key, msg.sender, amount);
    }

    /// @dev A score counts as it is; when all revealed ones are zero, each of them counts one; without any, everybody does.
    function _partsOf(uint64 word, State memory state) private pure returns (uint256) {
        if (state.scoreSum > 0) return word == 0 ? 0 : word - 1;
        return word != 0 || state.revealedCount == 0 ? 1 : 0;
    }

    function _checkPlace(
        string calldata taskID,
        bytes32 key,
        uint256 position,
        bytes32 scoreCommit,
        bytes32[] calldata proof
    ) private view {
        bytes32 leaf = contributionLeaf(position, msg.sender, scoreCommit);
        if (MerkleProof.processProofCalldata(proof, leaf) != _contributionsRoots[key]) {
            revert NotParticipant(taskID, msg.sender);
        }
    }

    /// @dev Zero, or a score plus one; and IS_PAID.
    function _scoreWord(bytes32 key, uint256 position) private view returns (uint64) {
        return uint64(_scores[key][position / SCORES_PER_WORD] >> (position % SCORES_PER_WORD * SCORE_BITS));
    }

    function _setScoreWord(bytes32 key, uint256 position, uint64 word) private {
        uint256 shift = position % SCORES_PER_WORD * SCORE_BITS;
        uint256 others = _scores[key][position / SCORES_PER_WORD] & ~(uint256(type(uint64).max) << shift);
        _scores[key][position / SCORES_PER_WORD] = others | (uint256(word) << shift);
    }
}
