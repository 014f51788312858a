// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";
import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";
import {Hashes} from "@openzeppelin/contracts/utils/cryptography/Hashes.sol";
import {accountOf, contributionLeaf} from "./Cohort.sol";
import {HealChainEscrow} from "./HealChainEscrow.sol";
import {StakeRegistry} from "./StakeRegistry.sol";
import {DeadlinePast, NotAscending, PPM, Status, Terms, WrongStatus, taskKeyOf} from "./Task.sol";

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

/// @notice A member's EIP-712 signature of its Attestation, in the compact form of EIP-2098.
struct Vote {
    bytes32 r;
    bytes32 vs;
}

/// @notice What the chain keeps of a published block; publishedAt is zero when there is none. Four storage slots.
struct BlockMeta {
    address aggregator;
    uint40 publishedAt;
    uint32 roundNumber;
    uint16 votes;
    uint32 correct;
    uint32 total;
    uint16 participantCount;
    uint64 blockNumber;
    bytes32 candidateHash;
    /// Merkle root over the participants and their score commitments; see {BlockPublisher.contributionsRoot}.
    bytes32 contributionsRoot;
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

    event BlockPublished(
        bytes32 indexed taskKey,
        address indexed aggregator,
        bytes32 candidateHash,
        bytes32 modelSha256,
        string modelUri,
        uint32 correct,
        uint32 total,
        uint32 roundNumber,
        bytes32 contributionsRoot
    );
    event EquivocationReported(
        bytes32 indexed taskKey, address indexed aggregator, address indexed reporter, bytes32 first, bytes32 second
    );

    error NotAggregator(string taskID, address account, address aggregator);
    error TooFewParticipants(uint256 count, uint16 minMiners);
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

    /// @notice Publishes the block of a task. Only the aggregator whose turn it is may, once, until the deadline, with the votes of
    /// a quorum. A block below the required accuracy may be published too: the publisher is then refunded, and nobody loses.
    /// @dev Emits {BlockPublished}. Reverts with {WrongStatus}, {DeadlinePast}, {NotAggregator}, {InvalidAccuracy},
    /// {TooFewParticipants}, {LengthMismatch}, {NotAscending}, {NotInCohort}, {InvalidVote}, {AggregatorVote}, {QuorumNotReached}
    /// or StakeRegistry's WrongCohort. A signature for anything else (another candidate, round, task, chain or contract, or a
    /// rejection) recovers an address that is not in the cohort.
    /// @param candidate The block. Participants strictly ascending and in the cohort, with one score commitment each.
    /// @param votes Signatures of the Attestation {task_id, round_number, candidate hash, accepted: true, reason: ""},
    /// in the ascending order of their signers.
    /// @param cohort As in StakeRegistry's {RegistrationClosed}.
    function publishBlock(Candidate calldata candidate, Vote[] calldata votes, bytes32[] calldata cohort) external {
        bytes32 key = taskKeyOf(candidate.taskID);
        (, Status status, Terms memory terms) = escrow.getTerms(key);
        address aggregator = stakeRegistry.aggregatorAmong(candidate.taskID, cohort);

        if (status != Status.Locked) revert WrongStatus(candidate.taskID, status);
        if (block.timestamp > terms.deadline) revert DeadlinePast(terms.deadline, block.timestamp);
        if (msg.sender != aggregator) revert NotAggregator(candidate.taskID, msg.sender, aggregator);
        if (candidate.aggregator != aggregator) {
            revert NotAggregator(candidate.taskID, candidate.aggregator, aggregator);
        }
        if (candidate.total == 0 || candidate.correct > candidate.total) {
            revert InvalidAccuracy(candidate.correct, candidate.total);
        }
        _checkParticipants(candidate, cohort, terms.minMiners);
        bytes32 hash = candidateHash(candidate);
        _checkVotes(candidate, votes, hash, cohort, _requiredVotes(cohort.length, terms));

        _record(key, candidate, hash, votes.length);

        escrow.markPublished(candidate.taskID);
    }

    /// @notice Proves that an aggregator of a task, present or former, signed two different candidates of one round; its stake is
    /// slashed. Anyone may report, before or after publication, once per aggregator and task.
    /// @dev Emits {EquivocationReported}. Reverts with {NoEquivocation} or the errors of StakeRegistry.slashEquivocation.
    /// @param a A candidate.
    /// @param first The aggregator's EIP-712 signature of it.
    /// @param b Another candidate of the same task, round and aggregator.
    /// @param second The aggregator's signature of that one.
    /// @param cohort As in StakeRegistry's {RegistrationClosed}.
    function reportEquivocation(
        Candidate calldata a,
        Vote calldata first,
        Candidate calldata b,
        Vote calldata second,
        bytes32[] calldata cohort
    ) external {
        bytes32 key = taskKeyOf(a.taskID);
        if (key != taskKeyOf(b.taskID)) revert NoEquivocation("two tasks");
        if (a.roundNumber != b.roundNumber) revert NoEquivocation("two rounds");
        if (a.aggregator != b.aggregator) revert NoEquivocation("two aggregators");
        bytes32 firstHash = candidateHash(a);
        bytes32 secondHash = candidateHash(b);
        if (firstHash == secondHash) revert NoEquivocation("one candidate");
        if (_signerOf(firstHash, first) != a.aggregator) revert NoEquivocation("first signature");
        if (_signerOf(secondHash, second) != a.aggregator) revert NoEquivocation("second signature");

        emit EquivocationReported(key, a.aggregator, msg.sender, firstHash, secondHash);

        stakeRegistry.slashEquivocation(a.taskID, a.aggregator, cohort);
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

    /// @notice Merkle root over a block's contributions, each {position, participant, score commitment}. Pairs are hashed in
    /// ascending order, so that a proof needs no directions; a last node without a partner rises as it is.
    /// @dev Reverts with {LengthMismatch}.
    function contributionsRoot(address[] calldata participants, bytes32[] calldata scoreCommits)
        public
        pure
        returns (bytes32)
    {
        uint256 count = participants.length;
        if (count != scoreCommits.length) revert LengthMismatch(count, scoreCommits.length);
        bytes32[] memory nodes = new bytes32[](count);
        for (uint256 i = 0; i < count; i++) nodes[i] = contributionLeaf(i, participants[i], scoreCommits[i]);
        while (count > 1) {
            uint256 pairs = count / 2;
            for (uint256 i = 0; i < pairs; i++) {
                nodes[i] = Hashes.commutativeKeccak256(nodes[2 * i], nodes[2 * i + 1]);
            }
            if (count % 2 == 1) nodes[pairs] = nodes[count - 1];
            count = pairs + count % 2;
        }
        return nodes[0];
    }

    /// @notice Accepting votes that a block of this task needs: the others of the cohort (the aggregator has no vote on its own
    /// candidate), less the task's fault rate, rounded up.
    /// @param cohortSize Members of the cohort.
    function requiredVotes(string calldata taskID, uint256 cohortSize) external view returns (uint256) {
        (,, Terms memory terms) = escrow.getTerms(taskKeyOf(taskID));
        return _requiredVotes(cohortSize, terms);
    }

    /// @notice What the chain keeps of a task's block; publishedAt is zero when there is none.
    /// @param taskKey keccak256(bytes(taskID)).
    function getBlockMeta(bytes32 taskKey) external view returns (BlockMeta memory) {
        return _blocks[taskKey];
    }

    /// @notice The EIP-712 domain separator of every message of this deployment.
    function domainSeparator() external view returns (bytes32) {
        return _domainSeparatorV4();
    }

    function _requiredVotes(uint256 cohortSize, Terms memory terms) private pure returns (uint256) {
        return Math.max(1, Math.ceilDiv((cohortSize - 1) * (PPM - terms.faultRatePpm), PPM));
    }

    /// @dev Both lists ascend, so that one walk through the cohort finds all.
    function _checkParticipants(Candidate calldata candidate, bytes32[] calldata cohort, uint16 minMiners) private pure {
        address[] calldata participants = candidate.participants;
        if (participants.length < minMiners) revert TooFewParticipants(participants.length, minMiners);
        uint256 position = 0;
        for (uint256 i = 0; i < participants.length; i++) {
            if (i > 0 && participants[i] <= participants[i - 1]) revert NotAscending(i, participants[i]);
            position = _find(candidate.taskID, cohort, position, participants[i]) + 1;
        }
    }

    function _checkVotes(
        Candidate calldata candidate,
        Vote[] calldata votes,
        bytes32 hash,
        bytes32[] calldata cohort,
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

    function _record(bytes32 key, Candidate calldata candidate, bytes32 hash, uint256 votes) private {
        bytes32 root = contributionsRoot(candidate.participants, candidate.scoreCommits);
        _blocks[key] = BlockMeta({
            aggregator: candidate.aggregator,
            publishedAt: uint40(block.timestamp),
            roundNumber: candidate.roundNumber,
            votes: uint16(votes),
            correct: candidate.correct,
            total: candidate.total,
            participantCount: uint16(candidate.participants.length),
            blockNumber: uint64(block.number),
            candidateHash: hash,
            contributionsRoot: root
        });
        emit BlockPublished(
            key,
            candidate.aggregator,
            hash,
            candidate.modelSha256,
            candidate.modelUri,
            candidate.correct,
            candidate.total,
            candidate.roundNumber,
            root
        );
    }

    /// @dev The index of an account in the ascending cohort, at or after a position. Reverts with {NotInCohort}.
    function _find(string calldata taskID, bytes32[] calldata cohort, uint256 position, address account)
        private
        pure
        returns (uint256)
    {
        while (position < cohort.length && accountOf(cohort[position]) < account) position++;
        if (position == cohort.length || accountOf(cohort[position]) != account) revert NotInCohort(taskID, account);
        return position;
    }

    /// @dev Zero for a malformed signature.
    function _signerOf(bytes32 structHash, Vote calldata signature) private view returns (address signer) {
        (signer,,) = ECDSA.tryRecover(_hashTypedDataV4(structHash), signature.r, signature.vs);
    }
}
