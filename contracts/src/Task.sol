// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

// The vocabulary of a task, shared by the four contracts: its terms, its states, its key, and the errors about them.

/// @dev Parts per million: the unit of accuracies, rates and shares.
uint256 constant PPM = 1_000_000;

/// @dev The largest cohort. Bounds every loop of the contracts.
uint256 constant MAX_MINERS = 200;

/// @notice Where a task's reward is.
/// None: unknown task. Locked: in the escrow, no block yet. Published: in the escrow, a block is on chain.
/// Settled: handed to RewardDistribution. Refunded: back with the publisher.
enum Status {
    None,
    Locked,
    Published,
    Settled,
    Refunded
}

/// @notice What the publisher fixes for the whole task. Three storage slots.
struct Terms {
    /// Unix seconds: the last moment at which a block may be published; the reward is refundable after it.
    uint64 deadline;
    uint32 minMiners;
    uint32 maxMiners;
    /// Share of the voters that may be missing or disagree, in parts per million.
    uint32 faultRatePpm;
    /// The aggregator's share of the reward, in parts per million.
    uint32 aggregatorSharePpm;
    uint64 publisherRevealWindow_s;
    uint64 aggregatorRevealWindow_s;
    uint64 scoreRevealWindow_s;
    /// The largest score that can be revealed.
    uint128 maxScore;
    /// The available stake in wei that a miner needs.
    uint128 minStake;
}

/// @notice A task as the escrow keeps it.
struct Task {
    address publisher;
    Status status;
    /// Wei. Stays readable after the reward has left.
    uint256 reward;
    bytes32 accuracyCommit;
    bytes32 specHash;
    Terms terms;
}

error WrongStatus(string taskID, Status status);
error DeadlinePast(uint64 deadline, uint256 timestamp);
error NotPublisher(string taskID, address caller);
error NotAscending(uint256 index, address account);
error OnlyContract(address caller, address expected);

/// @dev The storage key of a task, and the first indexed topic of every event about it.
function taskKeyOf(string calldata taskID) pure returns (bytes32) {
    return keccak256(bytes(taskID));
}
