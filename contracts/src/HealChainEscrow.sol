// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {ReentrancyGuard} from "@openzeppelin/contracts/utils/ReentrancyGuard.sol";
import {pay} from "./Payment.sol";
import {DeadlinePast, MAX_MINERS, NotPublisher, OnlyContract, Status, Task, Terms, WrongStatus, taskKeyOf} from "./Task.sol";

/// @title Holds the reward of every task from publication to settlement or refund (M1, M7).
/// @notice Nobody owns this contract. A reward leaves it on two ways only: to the publisher, after the deadline of a task
/// without a block; or to RewardDistribution, for a task with a block. The two exclude each other.
contract HealChainEscrow is ReentrancyGuard {
    /// @notice The longest time between publication and deadline.
    uint256 public constant MAX_DURATION_S = 366 days;
    /// @notice The longest reveal window.
    uint256 public constant MAX_WINDOW_S = 90 days;

    /// @notice The contract that may report that a task has a block.
    address public immutable blockPublisher;
    /// @notice The contract that may take the reward of a task with a block.
    address public immutable rewardDistribution;

    mapping(bytes32 taskKey => Task) private _tasks;

    event TaskPublished(
        bytes32 indexed taskKey,
        address indexed publisher,
        string taskID,
        uint256 reward,
        bytes32 accuracyCommit,
        bytes32 specHash,
        uint64 deadline
    );
    event PublisherRefunded(bytes32 indexed taskKey, address indexed publisher, uint256 amount);
    event RewardReleased(bytes32 indexed taskKey, uint256 amount);

    error InvalidTaskID(string taskID);
    error DuplicateTask(string taskID);
    error ZeroReward(string taskID);
    error InvalidTerms(string field);
    error DeadlineNotReached(uint64 deadline, uint256 timestamp);

    /// @param blockPublisher_ BlockPublisher of this deployment.
    /// @param rewardDistribution_ RewardDistribution of this deployment.
    constructor(address blockPublisher_, address rewardDistribution_) {
        blockPublisher = blockPublisher_;
        rewardDistribution = rewardDistribution_;
    }

    /// @notice Publishes a task and locks its whole reward (the value sent). The sender becomes its publisher.
    /// @dev Emits {TaskPublished}. Reverts with {InvalidTaskID}, {DuplicateTask}, {ZeroReward}, {DeadlinePast} or
    /// {InvalidTerms}. A task id is used once for ever, after a refund too.
    /// @param taskID The task's name, 1 to 64 bytes.
    /// @param accuracyCommit keccak256(abi.encodePacked(uint256 accuracyPpm, bytes32 salt)), not zero.
    /// @param specHash Digest of the task's specification.
    /// @param terms The rules of this task; see the struct for units.
    function publishTask(string calldata taskID, bytes32 accuracyCommit, bytes32 specHash, Terms calldata terms)
        external
        payable
    {
        bytes32 key = taskKeyOf(taskID);

        if (bytes(taskID).length == 0 || bytes(taskID).length > 64) revert InvalidTaskID(taskID);
        if (_tasks[key].status != Status.None) revert DuplicateTask(taskID);
        if (msg.value == 0) revert ZeroReward(taskID);
        if (terms.deadline <= block.timestamp) revert DeadlinePast(terms.deadline, block.timestamp);
        if (accuracyCommit == 0) revert InvalidTerms("accuracyCommit");
        _checkTerms(terms, msg.value);

        _tasks[key] = Task(msg.sender, Status.Locked, msg.value, accuracyCommit, specHash, terms);
        emit TaskPublished(key, msg.sender, taskID, msg.value, accuracyCommit, specHash, terms.deadline);
    }

    /// @notice Pays the reward back to the publisher, who calls this, once the deadline has passed without a block.
    /// @dev Emits {PublisherRefunded}. Reverts with {WrongStatus}, {NotPublisher}, {DeadlineNotReached} or TransferFailed.
    function refundPublisher(string calldata taskID) external nonReentrant {
        bytes32 key = taskKeyOf(taskID);
        Task storage task = _tasks[key];

        if (task.status != Status.Locked) revert WrongStatus(taskID, task.status);
        if (msg.sender != task.publisher) revert NotPublisher(taskID, msg.sender);
        uint64 deadline = task.terms.deadline;
        if (block.timestamp <= deadline) revert DeadlineNotReached(deadline, block.timestamp);

        task.status = Status.Refunded;
        emit PublisherRefunded(key, msg.sender, task.reward);

        pay(msg.sender, task.reward);
    }

    /// @notice Records that a task has a block: from now on it cannot be refunded. Only BlockPublisher may call it.
    /// @dev Reverts with {OnlyContract} or {WrongStatus}. BlockPublisher checked the deadline and emits the event.
    function markPublished(string calldata taskID) external {
        Task storage task = _tasks[taskKeyOf(taskID)];

        if (msg.sender != blockPublisher) revert OnlyContract(msg.sender, blockPublisher);
        if (task.status != Status.Locked) revert WrongStatus(taskID, task.status);

        task.status = Status.Published;
    }

    /// @notice Hands the reward of a task with a block to RewardDistribution, which alone may call it.
    /// @dev Emits {RewardReleased}. Reverts with {OnlyContract}, {WrongStatus} or TransferFailed.
    function releaseReward(string calldata taskID) external nonReentrant {
        bytes32 key = taskKeyOf(taskID);
        Task storage task = _tasks[key];

        if (msg.sender != rewardDistribution) revert OnlyContract(msg.sender, rewardDistribution);
        if (task.status != Status.Published) revert WrongStatus(taskID, task.status);

        task.status = Status.Settled;
        emit RewardReleased(key, task.reward);

        pay(rewardDistribution, task.reward);
    }

    /// @notice Everything the escrow knows of a task; status None for an unknown one.
    function getTask(string calldata taskID) external view returns (Task memory) {
        return _tasks[taskKeyOf(taskID)];
    }

    function _checkTerms(Terms calldata terms, uint256 reward) private view {
        if (terms.deadline > block.timestamp + MAX_DURATION_S) revert InvalidTerms("deadline");
        if (terms.minMiners < 3) revert InvalidTerms("minMiners");
        if (terms.maxMiners < terms.minMiners || terms.maxMiners > MAX_MINERS) revert InvalidTerms("maxMiners");
        if (terms.faultRatePpm > 500_000) revert InvalidTerms("faultRatePpm");
        if (terms.aggregatorSharePpm > 500_000) revert InvalidTerms("aggregatorSharePpm");
        if (_isOutside(terms.publisherRevealWindow_s)) revert InvalidTerms("publisherRevealWindow_s");
        if (_isOutside(terms.aggregatorRevealWindow_s)) revert InvalidTerms("aggregatorRevealWindow_s");
        if (_isOutside(terms.scoreRevealWindow_s)) revert InvalidTerms("scoreRevealWindow_s");
        // So that reward * (the sum of all scores) fits in 256 bits.
        if (terms.maxScore == 0 || terms.maxScore > type(uint256).max / MAX_MINERS / reward) {
            revert InvalidTerms("maxScore");
        }
    }

    function _isOutside(uint64 window_s) private pure returns (bool) {
        return window_s == 0 || window_s > MAX_WINDOW_S;
    }
}
