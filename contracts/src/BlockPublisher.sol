// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";
import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";
import {HealChainEscrow} from "./HealChainEscrow.sol";
import {StakeRegistry} from "./StakeRegistry.sol";
import {DeadlinePast, NotAscending, PPM, Status, Task, Terms, WrongStatus, taskKeyOf} from "./Task.sol";

/// @notice The block proposed for the chain. The same struct as contracts/messages.py, field by field.
struct Candidate {
    string taskID;
    uint32 roundNumber;
    bytes32 modelSha256;
    string modelUri;
    uint32 correct;
    uint32 total;
    address aggregator;
    address[] participants;
    bytes32[] scoreCommits;
    bytes32 openingSha256;
}

/// @notice What the chain keeps of a published block. publishedAt is zero when there is none.
struct BlockMeta {
    bytes32 candidateHash;
    bytes32 modelSha256;
    address aggregator;
    uint64 publishedAt;
    uint32 roundNumber;
    uint32 correct;
    uint32 total;
    uint32 votes;
    uint64 blockNumber;
}

/// @title Puts a candidate on chain when the quorum of the cohort signed for it, and punishes an aggregator that signed two (M6).
/// @notice The address of this contract is the verifyingContract of every message of a deployment.
contract BlockPublisher is EIP712 {
    /// @notice Type hash of the EIP-712 struct Candidate.
    bytes32 public constant CANDIDATE_TYPEHASH = keccak256(
        "Candidate(string task_id,uint32 round_number,bytes32 model_sha256,string model_uri,uint32 correct,uint32 total,address aggregator,address[] participants,bytes32[] score_commits,bytes32 opening_sha256)"
    );
    /// @notice Type hash of the EIP-712 struct Attestation.
    bytes32 public constant ATTESTATION_TYPEHASH =
        keccak256("Attestation(string task_id,uint32 round_number,bytes32 candidate,bool accepted,string reason)");

    /// @notice The escrow of this deployment.
    HealChainEscrow public immutable escrow;
    /// @notice The stake registry of this deployment.
    StakeRegistry public immutable stakeRegistry;

    mapping(bytes32 taskKey => BlockMeta) private _blocks;
    mapping(bytes32 taskKey => address[]) private _participants;
    mapping(bytes32 taskKey => bytes32[]) private _scoreCommits;

    event BlockPublished(
        bytes32 indexed taskKey,
        address indexed aggregator,
        bytes32 candidateHash,
        bytes32 modelSha256,
        string modelUri,
        uint32 correct,
        uint32 total,
        uint32 roundNumber
    );
    event EquivocationReported(
        bytes32 indexed taskKey, address indexed aggregator, address indexed reporter, bytes32 first, bytes32 second
    );

    error NotAggregator(string taskID, address account, address aggregator);
    error TooFewParticipants(uint256 count, uint32 minMiners);
    error LengthMismatch(uint256 participants, uint256 scoreCommits);
    error NotInCohort(string taskID, address account);
    error InvalidAccuracy(uint32 correct, uint32 total);
    error InvalidVote(uint256 index);
    error AggregatorVote(uint256 index, address aggregator);
    error QuorumNotReached(uint256 votes, uint256 required);
    error NoEquivocation(string reason);

    /// @param escrow_ HealChainEscrow of this deployment.
    /// @param stakeRegistry_ StakeRegistry of this deployment.
    constructor(HealChainEscrow escrow_, StakeRegistry stakeRegistry_) EIP712("HealChain", "1") {
        escrow = escrow_;
        stakeRegistry = stakeRegistry_;
    }

    /// @notice Publishes the block of a task. Only the drawn aggregator may, once, until the deadline, with the votes of a quorum.
    /// @dev Emits {BlockPublished}. Reverts with {WrongStatus}, {DeadlinePast}, {NotAggregator}, {InvalidAccuracy},
    /// {TooFewParticipants}, {LengthMismatch}, {NotAscending}, {NotInCohort}, {InvalidVote}, {AggregatorVote} or
    /// {QuorumNotReached}. A signature for anything else (another candidate, round, task, chain or contract, or a rejection)
    /// recovers an address that is not in the cohort.
    /// @param candidate The block. Participants strictly ascending and in the cohort, with one score commitment each.
    /// @param votes Signatures of the Attestation {task_id, round_number, candidate hash, accepted: true, reason: ""},
    /// in the ascending order of their signers.
    function publishBlock(Candidate calldata candidate, bytes[] calldata votes) external {
        Task memory task = escrow.getTask(candidate.taskID);
        if (task.status != Status.Locked) revert WrongStatus(candidate.taskID, task.status);
        if (block.timestamp > task.terms.deadline) revert DeadlinePast(task.terms.deadline, block.timestamp);
        address aggregator = stakeRegistry.aggregatorOf(candidate.taskID);
        if (msg.sender != aggregator) revert NotAggregator(candidate.taskID, msg.sender, aggregator);
        if (candidate.aggregator != aggregator) {
            revert NotAggregator(candidate.taskID, candidate.aggregator, aggregator);
        }
        if (candidate.total == 0 || candidate.correct > candidate.total) {
            revert InvalidAccuracy(candidate.correct, candidate.total);
        }
        (address[] memory cohort,) = stakeRegistry.getCohort(candidate.taskID);
        _checkParticipants(candidate, cohort, task.terms.minMiners);
        bytes32 hash = candidateHash(candidate);
        _checkVotes(candidate, votes, hash, cohort, _requiredVotes(cohort.length, task.terms));

        _record(candidate, hash, uint32(votes.length));

        escrow.markPublished(candidate.taskID);
    }

    /// @notice Proves that the aggregator of a task signed two different candidates of one round; its stake is slashed.
    /// Anyone may report, before or after publication, once per task.
    /// @dev Emits {EquivocationReported}. Reverts with {NoEquivocation} or the errors of StakeRegistry.slashStake.
    /// @param a A candidate. @param sigA The aggregator's EIP-712 signature of it.
    /// @param b Another candidate of the same task and round. @param sigB The aggregator's signature of that one.
    function reportEquivocation(Candidate calldata a, bytes calldata sigA, Candidate calldata b, bytes calldata sigB)
        external
    {
        bytes32 key = taskKeyOf(a.taskID);
        if (key != taskKeyOf(b.taskID)) revert NoEquivocation("two tasks");
        if (a.roundNumber != b.roundNumber) revert NoEquivocation("two rounds");
        bytes32 first = candidateHash(a);
        bytes32 second = candidateHash(b);
        if (first == second) revert NoEquivocation("one candidate");
        address aggregator = stakeRegistry.aggregatorOf(a.taskID);
        if (aggregator == address(0)) revert NoEquivocation("no aggregator drawn");
        if (_signerOf(first, sigA) != aggregator) revert NoEquivocation("first signature");
        if (_signerOf(second, sigB) != aggregator) revert NoEquivocation("second signature");

        emit EquivocationReported(key, aggregator, msg.sender, first, second);

        stakeRegistry.slashStake(a.taskID);
    }

    /// @notice EIP-712 hashStruct of a candidate: what the attestations name.
    function candidateHash(Candidate calldata candidate) public pure returns (bytes32) {
        // Two halves of the words of one abi.encode, which would need too many stack slots at once.
        return keccak256(
            bytes.concat(
                abi.encode(
                    CANDIDATE_TYPEHASH,
                    keccak256(bytes(candidate.taskID)),
                    candidate.roundNumber,
                    candidate.modelSha256,
                    keccak256(bytes(candidate.modelUri))
                ),
                abi.encode(
                    candidate.correct,
                    candidate.total,
                    candidate.aggregator,
                    keccak256(abi.encodePacked(candidate.participants)),
                    keccak256(abi.encodePacked(candidate.scoreCommits)),
                    candidate.openingSha256
                )
            )
        );
    }

    /// @notice Accepting votes that a block of this task needs: the others of the cohort (the aggregator has no vote on its own
    /// candidate), less the task's fault rate, rounded up. Zero while registration is open.
    function requiredVotes(string calldata taskID) external view returns (uint256) {
        (address[] memory cohort,) = stakeRegistry.getCohort(taskID);
        if (cohort.length == 0) return 0;
        return _requiredVotes(cohort.length, escrow.getTask(taskID).terms);
    }

    /// @notice What the chain keeps of a task's block; publishedAt is zero when there is none.
    function getBlockMeta(string calldata taskID) external view returns (BlockMeta memory) {
        return _blocks[taskKeyOf(taskID)];
    }

    /// @notice The miners whose updates are in the block, in address order.
    function getParticipants(string calldata taskID) external view returns (address[] memory) {
        return _participants[taskKeyOf(taskID)];
    }

    /// @notice The score commitments of the participants, in their order.
    function getScoreCommits(string calldata taskID) external view returns (bytes32[] memory) {
        return _scoreCommits[taskKeyOf(taskID)];
    }

    /// @notice The score commitment of one miner, whether it is a participant, and the number of participants.
    function scoreCommitOf(string calldata taskID, address miner)
        external
        view
        returns (bool isParticipant, bytes32 scoreCommit, uint256 participantCount)
    {
        bytes32 key = taskKeyOf(taskID);
        address[] storage participants = _participants[key];
        participantCount = participants.length;
        // Binary search: the first index whose address is not below the miner's.
        uint256 low = 0;
        uint256 high = participantCount;
        while (low < high) {
            uint256 middle = (low + high) / 2;
            if (participants[middle] < miner) low = middle + 1;
            else high = middle;
        }
        if (low < participantCount && participants[low] == miner) {
            return (true, _scoreCommits[key][low], participantCount);
        }
    }

    function _requiredVotes(uint256 cohortSize, Terms memory terms) private pure returns (uint256) {
        return Math.max(1, Math.ceilDiv((cohortSize - 1) * (PPM - terms.faultRatePpm), PPM));
    }

    /// @dev Both lists ascend, so that one walk through the cohort finds all.
    function _checkParticipants(Candidate calldata candidate, address[] memory cohort, uint32 minMiners) private pure {
        address[] calldata participants = candidate.participants;
        if (participants.length < minMiners) revert TooFewParticipants(participants.length, minMiners);
        if (participants.length != candidate.scoreCommits.length) {
            revert LengthMismatch(participants.length, candidate.scoreCommits.length);
        }
        uint256 position = 0;
        for (uint256 i = 0; i < participants.length; i++) {
            if (i > 0 && participants[i] <= participants[i - 1]) revert NotAscending(i, participants[i]);
            position = _find(candidate.taskID, cohort, position, participants[i]) + 1;
        }
    }

    function _checkVotes(
        Candidate calldata candidate,
        bytes[] calldata votes,
        bytes32 hash,
        address[] memory cohort,
        uint256 required
    ) private view {
        if (votes.length < required) revert QuorumNotReached(votes.length, required);
        bytes32 attestation = keccak256(
            abi.encode(
                ATTESTATION_TYPEHASH,
                keccak256(bytes(candidate.taskID)),
                candidate.roundNumber,
                hash,
                true,
                keccak256("")
            )
        );
        address previous = address(0);
        uint256 position = 0;
        for (uint256 i = 0; i < votes.length; i++) {
            address voter = _signerOf(attestation, votes[i]);
            if (voter == address(0)) revert InvalidVote(i);
            if (voter == candidate.aggregator) revert AggregatorVote(i, voter);
            if (voter <= previous) revert NotAscending(i, voter);
            position = _find(candidate.taskID, cohort, position, voter) + 1;
            previous = voter;
        }
    }

    function _record(Candidate calldata candidate, bytes32 hash, uint32 votes) private {
        bytes32 key = taskKeyOf(candidate.taskID);
        _blocks[key] = BlockMeta({
            candidateHash: hash,
            modelSha256: candidate.modelSha256,
            aggregator: candidate.aggregator,
            publishedAt: uint64(block.timestamp),
            roundNumber: candidate.roundNumber,
            correct: candidate.correct,
            total: candidate.total,
            votes: votes,
            blockNumber: uint64(block.number)
        });
        _participants[key] = candidate.participants;
        _scoreCommits[key] = candidate.scoreCommits;
        emit BlockPublished(
            key,
            candidate.aggregator,
            hash,
            candidate.modelSha256,
            candidate.modelUri,
            candidate.correct,
            candidate.total,
            candidate.roundNumber
        );
    }

    /// @dev The index of an account in the ascending cohort, at or after a position. Reverts with {NotInCohort}.
    function _find(string calldata taskID, address[] memory cohort, uint256 position, address account)
        private
        pure
        returns (uint256)
    {
        while (position < cohort.length && cohort[position] < account) position++;
        if (position == cohort.length || cohort[position] != account) revert NotInCohort(taskID, account);
        return position;
    }

    /// @dev Zero for a malformed signature.
    function _signerOf(bytes32 structHash, bytes calldata signature) private view returns (address signer) {
        (signer,,) = ECDSA.tryRecover(_hashTypedDataV4(structHash), signature);
    }
}
