// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import {pay} from "./Payment.sol";
import {
    DeadlinePast,
    MAX_MINERS,
    NotPublisher,
    OnlyContract,
    PPM,
    Status,
    Task,
    Terms,
    WrongStatus,
    taskKeyOf
} from "./Task.sol";

/// @title Holds the reward of every task from publication to settlement or refund (M1, M7).
/// @notice Nobody owns this contract. A reward leaves it on two ways only: to the publisher, after the deadline of a task
/// without a block; or to RewardDistribution, for a task with a block. The two exclude each other.
contract HealChainEscrow is ReentrancyGuardTransient {
    /// @notice The longest time between publication and deadline.
    uint256 public constant MAX_DURATION_S = 366 days;
    /// @notice The longest window.
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
        address token,
        uint256 reward,
        bytes32 accuracyCommit,
        bytes32 specHash,
        uint40 deadline
    );
    event PublisherRefunded(
        bytes32 indexed taskKey, address indexed publisher, address indexed recipient, address token, uint256 amount
    );
    event RewardReleased(bytes32 indexed taskKey, address token, uint256 amount);

    error InvalidTaskID(string taskID);
    error DuplicateTask(string taskID);
    error ZeroReward(string taskID);
    error WrongValue(uint256 sent, uint256 expected);
    error InvalidTerms(string field);
    error FeeOnTransfer(address token, uint256 expected, uint256 received);
    error DeadlineNotReached(uint40 deadline, uint256 timestamp);

    /// @param blockPublisher_ BlockPublisher of this deployment.
    /// @param rewardDistribution_ RewardDistribution of this deployment.
    constructor(address blockPublisher_, address rewardDistribution_) {
        blockPublisher = blockPublisher_;
        rewardDistribution = rewardDistribution_;
    }

    /// @notice Publishes a task and locks its whole reward: the value sent, or tokens that the sender approved to this contract.
    /// The sender becomes its publisher.
    /// @dev Emits {TaskPublished}. Reverts with {InvalidTaskID}, {DuplicateTask}, {ZeroReward}, {WrongValue}, {DeadlinePast},
    /// {InvalidTerms}, or for tokens {FeeOnTransfer} and SafeERC20FailedOperation. A task id is used once for ever, after a
    /// refund too. Tokens whose balances change by themselves are not supported: what is missing, the last to withdraw miss.
    /// @param taskID The task's name, 1 to 64 bytes.
    /// @param accuracyCommit keccak256(abi.encodePacked(uint256 accuracyPpm, bytes32 salt)), not zero.
    /// @param specHash Digest of the task's specification.
    /// @param token The ERC-20 contract of the reward, or zero for ether.
    /// @param reward In wei, or in the token's smallest unit.
    /// @param terms The rules of this task; see the struct for units.
    function publishTask(
        string calldata taskID,
        bytes32 accuracyCommit,
        bytes32 specHash,
        address token,
        uint88 reward,
        Terms calldata terms
    ) external payable nonReentrant {
        bytes32 key = taskKeyOf(taskID);

        if (bytes(taskID).length == 0 || bytes(taskID).length > 64) revert InvalidTaskID(taskID);
        if (_tasks[key].status != Status.None) revert DuplicateTask(taskID);
        if (reward == 0) revert ZeroReward(taskID);
        uint256 expected = token == address(0) ? reward : 0;
        if (msg.value != expected) revert WrongValue(msg.value, expected);
        if (terms.deadline <= block.timestamp) revert DeadlinePast(terms.deadline, block.timestamp);
        if (accuracyCommit == 0) revert InvalidTerms("accuracyCommit");
        _checkTerms(terms);

        _tasks[key] = Task(msg.sender, reward, Status.Locked, token, accuracyCommit, specHash, terms);
        emit TaskPublished(key, msg.sender, taskID, token, reward, accuracyCommit, specHash, terms.deadline);

        if (token != address(0)) _take(token, reward);
    }

    /// @notice Pays the reward back, once the deadline has passed without a block. Only the publisher may ask for it.
    /// @dev Emits {PublisherRefunded}. Reverts with {WrongStatus}, {NotPublisher}, {DeadlineNotReached}, InvalidRecipient,
    /// TransferFailed or the token's refusal.
    /// @param recipient Who gets it: the publisher itself, or another account if it cannot receive.
    function refundPublisher(string calldata taskID, address recipient) external nonReentrant {
        bytes32 key = taskKeyOf(taskID);
        Task storage task = _tasks[key];

        if (task.status != Status.Locked) revert WrongStatus(taskID, task.status);
        if (msg.sender != task.publisher) revert NotPublisher(taskID, msg.sender);
        uint40 deadline = task.terms.deadline;
        if (block.timestamp <= deadline) revert DeadlineNotReached(deadline, block.timestamp);

        task.status = Status.Refunded;
        emit PublisherRefunded(key, msg.sender, recipient, task.token, task.reward);

        pay(task.token, recipient, task.reward);
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
    /// @dev Emits {RewardReleased}. Reverts with {OnlyContract}, {WrongStatus}, TransferFailed or the token's refusal.
    function releaseReward(string calldata taskID) external nonReentrant {
        bytes32 key = taskKeyOf(taskID);
        Task storage task = _tasks[key];

        if (msg.sender != rewardDistribution) revert OnlyContract(msg.sender, rewardDistribution);
        if (task.status != Status.Published) revert WrongStatus(taskID, task.status);

        task.status = Status.Settled;
        emit RewardReleased(key, task.token, task.reward);

        pay(task.token, rewardDistribution, task.reward);
    }

    /// @notice Everything the escrow knows of a task; status None for an unknown one.
    /// @param taskKey keccak256(bytes(taskID)).
    function getTask(bytes32 taskKey) external view returns (Task memory) {
        return _tasks[taskKey];
    }

    /// @notice The part of a task that the other contracts ask for most: half of its storage slots.
    /// @param taskKey keccak256(bytes(taskID)).
    function getTerms(bytes32 taskKey) external view returns (address publisher, Status status, Terms memory terms) {
        Task storage task = _tasks[taskKey];
        return (task.publisher, task.status, task.terms);
    }

    /// @dev Takes tokens that the sender approved, and reverts unless exactly this amount arrived: a token that takes a fee would
    /// leave this contract owing more than it holds.
    function _take(address token, uint256 amount) private {
        uint256 before = IERC20(token).balanceOf(address(this));
        SafeERC20.safeTransferFrom(IERC20(token), msg.sender, address(this), amount);
        uint256 received = IERC20(token).balanceOf(address(this)) - before;
        if (received != amount) revert FeeOnTransfer(token, amount, received);
    }

    function _checkTerms(Terms calldata terms) private view {
        if (terms.deadline > block.timestamp + MAX_DURATION_S) revert InvalidTerms("deadline");
        if (terms.minMiners < 3) revert InvalidTerms("minMiners");
        if (terms.maxMiners < terms.minMiners || terms.maxMiners > MAX_MINERS) revert InvalidTerms("maxMiners");
        if (terms.faultRatePpm > 500_000) revert InvalidTerms("faultRatePpm");
        if (terms.aggregatorSharePpm > 500_000) revert InvalidTerms("aggregatorSharePpm");
        if (terms.silencePenaltyPpm > PPM) revert InvalidTerms("silencePenaltyPpm");
        if (_isOutside(terms.publishWindow_s)) revert InvalidTerms("publishWindow_s");
        if (_isOutside(terms.publisherRevealWindow_s)) revert InvalidTerms("publisherRevealWindow_s");
        if (_isOutside(terms.aggregatorRevealWindow_s)) revert InvalidTerms("aggregatorRevealWindow_s");
        if (_isOutside(terms.scoreRevealWindow_s)) revert InvalidTerms("scoreRevealWindow_s");
        if (terms.maxScore == 0) revert InvalidTerms("maxScore");
    }

    function _isOutside(uint24 window_s) private pure returns (bool) {
        return window_s == 0 || window_s > MAX_WINDOW_S;
    }
}
