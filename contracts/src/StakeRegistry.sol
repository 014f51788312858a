// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";
import {SafeCast} from "@openzeppelin/contracts/utils/math/SafeCast.sol";
import {ReentrancyGuard} from "@openzeppelin/contracts/utils/ReentrancyGuard.sol";
import {HealChainEscrow} from "./HealChainEscrow.sol";
import {pay} from "./Payment.sol";
import {DeadlinePast, NotAscending, NotPublisher, OnlyContract, Status, Task, WrongStatus, taskKeyOf} from "./Task.sol";

/// @title Stakes, registrations, cohorts and the stake-weighted draw of the aggregator (M2, 2.1).
/// @notice One stake per miner backs all its tasks. It is held until the last of them can have ended, and taken only for a
/// proven equivocation. What is taken goes to the other members of the cohort, in equal parts.
contract StakeRegistry is ReentrancyGuard {
    using SafeCast for uint256;

    /// @dev 96 bits of wei are 79 billion ether, and let stake, request and time share one slot.
    struct Account {
        uint96 stake;
        /// Part of the stake whose withdrawal is requested.
        uint96 requested;
        /// Unix seconds from which the requested part may be withdrawn, if no task holds it.
        uint64 withdrawableAt;
        /// Unix seconds until which a task holds the whole stake.
        uint64 lockedUntil;
        /// Wei from slashed aggregators.
        uint128 credit;
    }

    struct Member {
        address account;
        uint96 stake;
    }

    struct Draw {
        address aggregator;
        /// Zero while registration is open.
        uint64 seedBlock;
        bool isSlashed;
        bytes32 seed;
        uint256 total;
    }

    /// @notice The escrow of this deployment.
    HealChainEscrow public immutable escrow;
    /// @notice The contract that may slash.
    address public immutable blockPublisher;
    /// @notice Seconds between requesting and taking a withdrawal.
    uint64 public immutable withdrawalDelay_s;

    mapping(address miner => Account) private _accounts;
    mapping(bytes32 taskKey => mapping(address miner => bytes32)) private _registrations;
    mapping(bytes32 taskKey => Member[]) private _cohorts;
    mapping(bytes32 taskKey => Draw) private _draws;

    event StakeDeposited(address indexed miner, uint256 amount, uint256 stake);
    event WithdrawalRequested(address indexed miner, uint256 amount, uint64 withdrawableAt);
    event StakeWithdrawn(address indexed miner, uint256 amount);
    event CreditWithdrawn(address indexed miner, uint256 amount);
    event Registered(bytes32 indexed taskKey, address indexed miner, bytes32 registrationHash);
    event RegistrationClosed(
        bytes32 indexed taskKey, address[] miners, uint256[] stakes, uint256 total, uint64 seedBlock
    );
    event AggregatorDrawn(
        bytes32 indexed taskKey, address indexed aggregator, uint64 seedBlock, bytes32 blockHash, bytes32 seed
    );
    event SeedMoved(bytes32 indexed taskKey, uint64 expiredBlock, uint64 seedBlock);
    event StakeSlashed(bytes32 indexed taskKey, address indexed aggregator, uint256 amount);
    event CreditAdded(bytes32 indexed taskKey, address indexed miner, uint256 amount);

    error ZeroAmount();
    error InsufficientStake(address miner, uint256 stake, uint256 needed);
    error NothingToWithdraw(address account);
    error WithdrawalTooEarly(uint64 withdrawableAt, uint256 timestamp);
    error StakeLocked(uint64 lockedUntil, uint256 timestamp);
    error PublisherCannotMine(string taskID, address publisher);
    error EmptyRegistration(string taskID);
    error AlreadyRegistered(string taskID, address miner);
    error NotRegistered(string taskID, address miner);
    error RegistrationIsClosed(string taskID);
    error RegistrationIsOpen(string taskID);
    error CohortSize(uint256 size, uint32 minMiners, uint32 maxMiners);
    error CohortWithoutStake(string taskID);
    error AlreadyDrawn(string taskID, address aggregator);
    error NotDrawn(string taskID);
    error SeedNotMined(uint64 seedBlock, uint256 blockNumber);
    error SeedExpired(uint64 seedBlock, uint256 blockNumber);
    error SeedAvailable(uint64 seedBlock, uint256 blockNumber);
    error AlreadySlashed(string taskID, address aggregator);

    /// @param escrow_ HealChainEscrow of this deployment.
    /// @param blockPublisher_ BlockPublisher of this deployment.
    /// @param withdrawalDelay_s_ Seconds between requesting and taking a withdrawal.
    constructor(HealChainEscrow escrow_, address blockPublisher_, uint64 withdrawalDelay_s_) {
        escrow = escrow_;
        blockPublisher = blockPublisher_;
        withdrawalDelay_s = withdrawalDelay_s_;
    }

    // Stakes

    /// @notice Adds the value sent to the sender's stake.
    /// @dev Emits {StakeDeposited}. Reverts with {ZeroAmount}.
    function depositStake() external payable {
        if (msg.value == 0) revert ZeroAmount();

        Account storage account = _accounts[msg.sender];
        uint256 stake = account.stake + msg.value;
        account.stake = stake.toUint96();
        emit StakeDeposited(msg.sender, msg.value, stake);
    }

    /// @notice Asks to withdraw part of the sender's stake after the delay. Replaces an earlier request; zero cancels it.
    /// The requested part no longer counts as available.
    /// @dev Emits {WithdrawalRequested}. Reverts with {InsufficientStake}.
    /// @param amount Wei, at most the stake.
    function requestWithdrawal(uint256 amount) external {
        Account storage account = _accounts[msg.sender];
        if (amount > account.stake) revert InsufficientStake(msg.sender, account.stake, amount);

        uint64 withdrawableAt = (block.timestamp + withdrawalDelay_s).toUint64();
        account.requested = amount.toUint96();
        account.withdrawableAt = withdrawableAt;
        emit WithdrawalRequested(msg.sender, amount, withdrawableAt);
    }

    /// @notice Pays the requested part of the stake to the sender, after the delay and when no task holds the stake.
    /// @dev Emits {StakeWithdrawn}. Reverts with {NothingToWithdraw}, {WithdrawalTooEarly}, {StakeLocked} or TransferFailed.
    function withdrawStake() external nonReentrant {
        Account storage account = _accounts[msg.sender];
        uint96 amount = account.requested;
        if (amount == 0) revert NothingToWithdraw(msg.sender);
        if (block.timestamp < account.withdrawableAt) {
            revert WithdrawalTooEarly(account.withdrawableAt, block.timestamp);
        }
        if (block.timestamp <= account.lockedUntil) revert StakeLocked(account.lockedUntil, block.timestamp);

        account.requested = 0;
        account.stake -= amount;
        emit StakeWithdrawn(msg.sender, amount);

        pay(msg.sender, amount);
    }

    /// @notice Pays the sender what it was credited from slashed aggregators. No delay, no lock.
    /// @dev Emits {CreditWithdrawn}. Reverts with {NothingToWithdraw} or TransferFailed.
    function withdrawCredit() external nonReentrant {
        Account storage account = _accounts[msg.sender];
        uint256 amount = account.credit;
        if (amount == 0) revert NothingToWithdraw(msg.sender);

        account.credit = 0;
        emit CreditWithdrawn(msg.sender, amount);

        pay(msg.sender, amount);
    }

    // Registration and draw

    /// @notice Registers the sender as a miner of a task, and holds its stake until the task's deadline.
    /// @dev Emits {Registered}. Reverts with {WrongStatus}, {DeadlinePast}, {RegistrationIsClosed}, {PublisherCannotMine},
    /// {EmptyRegistration}, {AlreadyRegistered} or {InsufficientStake}.
    /// @param registrationHash The hash of the signed registration message, not zero.
    function register(string calldata taskID, bytes32 registrationHash) external {
        bytes32 key = taskKeyOf(taskID);
        Task memory task = escrow.getTask(taskID);
        Account storage account = _accounts[msg.sender];

        _checkOpen(taskID, key, task);
        if (msg.sender == task.publisher) revert PublisherCannotMine(taskID, msg.sender);
        if (registrationHash == 0) revert EmptyRegistration(taskID);
        if (_registrations[key][msg.sender] != 0) revert AlreadyRegistered(taskID, msg.sender);
        _checkStake(msg.sender, account, task.terms.minStake);

        _registrations[key][msg.sender] = registrationHash;
        _hold(account, task.terms.deadline);
        emit Registered(key, msg.sender, registrationHash);
    }

    /// @notice Fixes the cohort of a task, once. Only its publisher may. The available stakes are recorded for the draw and
    /// held until the task's latest possible end; the draw is seeded by the next block.
    /// @dev Emits {RegistrationClosed}. Reverts with {WrongStatus}, {DeadlinePast}, {RegistrationIsClosed}, {NotPublisher},
    /// {CohortSize}, {NotAscending}, {NotRegistered}, {InsufficientStake} or {CohortWithoutStake}.
    /// @param cohort Registered miners, strictly ascending.
    function closeRegistration(string calldata taskID, address[] calldata cohort) external {
        bytes32 key = taskKeyOf(taskID);
        Task memory task = escrow.getTask(taskID);

        _checkOpen(taskID, key, task);
        if (msg.sender != task.publisher) revert NotPublisher(taskID, msg.sender);
        if (cohort.length < task.terms.minMiners || cohort.length > task.terms.maxMiners) {
            revert CohortSize(cohort.length, task.terms.minMiners, task.terms.maxMiners);
        }

        uint64 latestEnd = task.terms.deadline + task.terms.publisherRevealWindow_s + task.terms.aggregatorRevealWindow_s
            + task.terms.scoreRevealWindow_s;
        uint256[] memory stakes = new uint256[](cohort.length);
        uint256 total = 0;
        for (uint256 i = 0; i < cohort.length; i++) {
            address miner = cohort[i];
            if (miner <= (i == 0 ? address(0) : cohort[i - 1])) revert NotAscending(i, miner);
            if (_registrations[key][miner] == 0) revert NotRegistered(taskID, miner);
            Account storage account = _accounts[miner];
            uint96 stake = _checkStake(miner, account, task.terms.minStake);

            _hold(account, latestEnd);
            _cohorts[key].push(Member(miner, stake));
            stakes[i] = stake;
            total += stake;
        }
        if (total == 0) revert CohortWithoutStake(taskID);

        uint64 seedBlock = (block.number + 1).toUint64();
        _draws[key].seedBlock = seedBlock;
        _draws[key].total = total;
        emit RegistrationClosed(key, cohort, stakes, total, seedBlock);
    }

    /// @notice Draws the aggregator with probability proportional to the recorded stakes. Anyone may call it, once, in the 256
    /// blocks after the seed block; who calls and when makes no difference to the result.
    /// @dev seed = keccak256(taskID ‖ hash of the seed block); seed mod total falls on one member, walking in address order.
    /// Emits {AggregatorDrawn}. Reverts with {RegistrationIsOpen}, {AlreadyDrawn}, {SeedNotMined} or {SeedExpired}.
    function drawAggregator(string calldata taskID) external {
        bytes32 key = taskKeyOf(taskID);
        Draw storage draw = _draws[key];
        bytes32 blockHash = _seedHash(taskID, draw);
        if (blockHash == 0) revert SeedExpired(draw.seedBlock, block.number);

        bytes32 seed = keccak256(abi.encodePacked(taskID, blockHash));
        address aggregator = _memberAt(_cohorts[key], uint256(seed) % draw.total);
        draw.seed = seed;
        draw.aggregator = aggregator;
        emit AggregatorDrawn(key, aggregator, draw.seedBlock, blockHash, seed);
    }

    /// @notice Seeds the draw anew by the next block, when nobody drew while the chain remembered the old seed block's hash.
    /// @dev Emits {SeedMoved}. Reverts with {RegistrationIsOpen}, {AlreadyDrawn}, {SeedNotMined} or {SeedAvailable}.
    function moveSeed(string calldata taskID) external {
        bytes32 key = taskKeyOf(taskID);
        Draw storage draw = _draws[key];
        uint64 expired = draw.seedBlock;
        if (_seedHash(taskID, draw) != 0) revert SeedAvailable(expired, block.number);

        draw.seedBlock = (block.number + 1).toUint64();
        emit SeedMoved(key, expired, draw.seedBlock);
    }

    /// @notice Takes the drawn aggregator's recorded stake, or what is left of it, and credits it to the other members of the
    /// cohort in equal parts; the rounding residue goes to the first of them in address order. Once per task.
    /// @dev Only BlockPublisher, which checked the proof. Emits {StakeSlashed} and {CreditAdded} per member. Reverts with
    /// {OnlyContract}, {NotDrawn} or {AlreadySlashed}.
    function slashStake(string calldata taskID) external {
        bytes32 key = taskKeyOf(taskID);
        Draw storage draw = _draws[key];
        Member[] memory cohort = _cohorts[key];
        address aggregator = draw.aggregator;

        if (msg.sender != blockPublisher) revert OnlyContract(msg.sender, blockPublisher);
        if (aggregator == address(0)) revert NotDrawn(taskID);
        if (draw.isSlashed) revert AlreadySlashed(taskID, aggregator);

        draw.isSlashed = true;
        uint256 amount = _take(aggregator, _recordedStake(cohort, aggregator));
        emit StakeSlashed(key, aggregator, amount);
        uint256 share = amount / (cohort.length - 1);
        uint256 residue = amount - share * (cohort.length - 1);
        for (uint256 i = 0; i < cohort.length; i++) {
            address miner = cohort[i].account;
            if (miner == aggregator) continue;
            uint256 credit = share + residue;
            residue = 0;
            _accounts[miner].credit += credit.toUint128();
            emit CreditAdded(key, miner, credit);
        }
    }

    // Views

    /// @notice The whole stake of a miner in wei, requested withdrawals included.
    function stakeOf(address miner) external view returns (uint256) {
        return _accounts[miner].stake;
    }

    /// @notice The stake of a miner that counts for registrations and draws: without requested withdrawals.
    function availableStake(address miner) external view returns (uint256) {
        return _available(_accounts[miner]);
    }

    /// @notice Wei that a miner can take with withdrawCredit.
    function creditOf(address miner) external view returns (uint256) {
        return _accounts[miner].credit;
    }

    /// @notice The requested withdrawal of a miner, and the two times that it has to wait for.
    /// @return amount Wei requested.
    /// @return withdrawableAt Unix seconds when the delay ends.
    /// @return lockedUntil Unix seconds until which a task holds the stake.
    function getWithdrawal(address miner)
        external
        view
        returns (uint256 amount, uint64 withdrawableAt, uint64 lockedUntil)
    {
        Account storage account = _accounts[miner];
        return (account.requested, account.withdrawableAt, account.lockedUntil);
    }

    /// @notice The registration hash of a miner for a task; zero when it is not registered.
    function registrationOf(string calldata taskID, address miner) external view returns (bytes32) {
        return _registrations[taskKeyOf(taskID)][miner];
    }

    /// @notice The cohort in address order and the stakes recorded for the draw; empty while registration is open.
    function getCohort(string calldata taskID) external view returns (address[] memory miners, uint256[] memory stakes) {
        Member[] memory cohort = _cohorts[taskKeyOf(taskID)];
        miners = new address[](cohort.length);
        stakes = new uint256[](cohort.length);
        for (uint256 i = 0; i < cohort.length; i++) {
            miners[i] = cohort[i].account;
            stakes[i] = cohort[i].stake;
        }
    }

    /// @notice The drawn aggregator; zero before the draw.
    function aggregatorOf(string calldata taskID) external view returns (address) {
        return _draws[taskKeyOf(taskID)].aggregator;
    }

    /// @notice What anyone needs to recompute the draw.
    /// @return seedBlock The block whose hash seeds the draw; zero while registration is open.
    /// @return seed keccak256(taskID ‖ block hash); zero before the draw.
    /// @return total The sum of the recorded stakes.
    function getDraw(string calldata taskID) external view returns (uint64 seedBlock, bytes32 seed, uint256 total) {
        Draw storage draw = _draws[taskKeyOf(taskID)];
        return (draw.seedBlock, draw.seed, draw.total);
    }

    /// @notice Whether the aggregator of a task was slashed.
    function isSlashed(string calldata taskID) external view returns (bool) {
        return _draws[taskKeyOf(taskID)].isSlashed;
    }

    function _checkOpen(string calldata taskID, bytes32 key, Task memory task) private view {
        if (task.status != Status.Locked) revert WrongStatus(taskID, task.status);
        if (block.timestamp > task.terms.deadline) revert DeadlinePast(task.terms.deadline, block.timestamp);
        if (_draws[key].seedBlock != 0) revert RegistrationIsClosed(taskID);
    }

    function _checkStake(address miner, Account storage account, uint256 needed) private view returns (uint96 available) {
        available = _available(account);
        if (available < needed) revert InsufficientStake(miner, available, needed);
    }

    function _available(Account storage account) private view returns (uint96) {
        return account.stake - account.requested;
    }

    function _hold(Account storage account, uint64 until) private {
        if (until > account.lockedUntil) account.lockedUntil = until;
    }

    /// @dev Zero when the chain has forgotten the hash (after 256 blocks).
    function _seedHash(string calldata taskID, Draw storage draw) private view returns (bytes32) {
        if (draw.seedBlock == 0) revert RegistrationIsOpen(taskID);
        if (draw.aggregator != address(0)) revert AlreadyDrawn(taskID, draw.aggregator);
        if (block.number <= draw.seedBlock) revert SeedNotMined(draw.seedBlock, block.number);
        return blockhash(draw.seedBlock);
    }

    /// @dev point < the sum of the stakes, so that the walk ends inside.
    function _memberAt(Member[] storage cohort, uint256 point) private view returns (address) {
        uint256 i = 0;
        Member memory member = cohort[0];
        while (point >= member.stake) {
            point -= member.stake;
            i++;
            member = cohort[i];
        }
        return member.account;
    }

    function _recordedStake(Member[] memory cohort, address miner) private pure returns (uint256) {
        uint256 i = 0;
        while (cohort[i].account != miner) i++;
        return cohort[i].stake;
    }

    /// @dev A requested withdrawal never exceeds the stake.
    function _take(address miner, uint256 most) private returns (uint256 amount) {
        Account storage account = _accounts[miner];
        amount = Math.min(account.stake, most);
        uint256 left = account.stake - amount;
        account.stake = left.toUint96();
        account.requested = Math.min(account.requested, left).toUint96();
    }
}
