// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {MessageHashUtils} from "@openzeppelin/contracts/utils/cryptography/MessageHashUtils.sol";
import {Math} from "@openzeppelin/contracts/utils/math/Math.sol";
import {SafeCast} from "@openzeppelin/contracts/utils/math/SafeCast.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import {BlockPublisher} from "./BlockPublisher.sol";
import {accountOf, cohortHashOf, memberWord, stakeIn} from "./Cohort.sol";
import {HealChainEscrow} from "./HealChainEscrow.sol";
import {pay} from "./Payment.sol";
import {
    DeadlinePast,
    NotAscending,
    NotPublisher,
    OnlyContract,
    PPM,
    Status,
    Task,
    Terms,
    WrongStatus,
    taskKeyOf
} from "./Task.sol";

/// @notice A signed Registration, as far as the contract needs it: its struct hash can be recomputed from these fields.
struct Application {
    address miner;
    /// keccak256 of the encryption key (33 bytes).
    bytes32 encryptionKeyHash;
    bytes32 datasetProofSha256;
    /// Wei that the miner puts behind the task.
    uint88 stake;
    /// The miner's EIP-712 signature of the Registration, in the compact form of EIP-2098.
    bytes32 r;
    bytes32 vs;
}

/// @title Stakes, cohorts, the stake-weighted draw of the aggregator and of those who replace it (M2, 2.1).
/// @notice A miner signs how much stake it puts behind a task. That part backs this task alone until the task's latest end: else a
/// member could let a task of its own, with accomplices, take it before evidence about another does. It is taken only for what
/// the chain itself shows: two signed candidates, or a turn that passed without a block. What is taken goes to the other members
/// of the cohort, in equal parts. Nobody owns this contract.
contract StakeRegistry is ReentrancyGuardTransient {
    using SafeCast for uint256;

    /// @dev One slot. 88 bits of wei are 309 million ether.
    struct Account {
        uint88 stake;
        /// Part of the stake that tasks recorded since heldSince; counts until heldUntil, the latest end of all these tasks.
        uint88 recorded;
        uint40 heldSince;
        uint40 heldUntil;
    }

    /// @dev A part that left the stake and waits for the delay to pass. No task can record or take it.
    struct Withdrawal {
        uint88 amount;
        uint40 withdrawableAt;
    }

    struct Draw {
        /// Whose turn it is; zero before the draw, and when nobody is left.
        address aggregator;
        /// Unix seconds until which the aggregator cannot be replaced.
        uint40 turnEnd;
        /// Zero while registration is open.
        uint40 seedBlock;
        bool hasResigned;
        /// The deadline left the aggregator less than the task's publishWindow_s: its silence costs nothing.
        bool isCutShort;
        bytes32 cohortHash;
        bytes32 seed;
        /// A bit per position in the cohort: who was replaced.
        uint256 replaced;
        /// A bit per position in the cohort: whose recorded stake was given back by releaseStake.
        uint256 released;
    }

    /// @notice What was taken from one member of a cohort for one offence, and who of the others has had its part.
    struct Slash {
        bool isDone;
        uint88 amount;
        /// A bit per position in the cohort.
        uint256 credited;
    }

    /// @notice Why a stake is taken: a turn without a block, or two signed candidates of one round.
    enum Offence {
        Silence,
        Equivocation
    }

    /// @notice Type hash of the EIP-712 struct Registration.
    bytes32 public constant REGISTRATION_TYPEHASH = keccak256(
        "Registration(string task_id,uint32 round_number,address miner,bytes encryption_key,bytes32 dataset_proof_sha256,uint96 stake_wei)"
    );

    /// @notice The escrow of this deployment.
    HealChainEscrow public immutable escrow;
    /// @notice The contract that may slash for equivocation; its EIP-712 domain is that of every message.
    BlockPublisher public immutable blockPublisher;
    /// @notice Seconds between requesting and taking a withdrawal.
    uint40 public immutable withdrawalDelay_s;

    /// @notice Wei that a miner can take with withdrawCredit: its parts of slashed stakes.
    mapping(address miner => uint256) public creditOf;

    mapping(address miner => Account) private _accounts;
    mapping(address miner => Withdrawal) private _withdrawals;
    mapping(bytes32 taskKey => Draw) private _draws;
    mapping(bytes32 taskKey => mapping(uint256 position => mapping(Offence => Slash))) private _slashes;

    event StakeDeposited(address indexed miner, uint256 amount, uint256 stake);
    event WithdrawalRequested(address indexed miner, uint256 amount, uint40 withdrawableAt);
    event StakeWithdrawn(address indexed miner, address indexed recipient, uint256 amount);
    event CreditWithdrawn(address indexed miner, address indexed recipient, uint256 amount);
    event RegistrationClosed(bytes32 indexed taskKey, bytes32[] cohort, bytes32[] registrations, uint40 seedBlock);
    event AggregatorDrawn(
        bytes32 indexed taskKey, address indexed aggregator, uint40 seedBlock, bytes32 blockHash, bytes32 seed, uint40 turnEnd
    );
    event AggregatorResigned(bytes32 indexed taskKey, address indexed aggregator);
    event AggregatorReplaced(
        bytes32 indexed taskKey, address indexed former, address indexed aggregator, uint40 turnEnd
    );
    event SeedMoved(bytes32 indexed taskKey, uint40 expiredBlock, uint40 seedBlock);
    event StakeReleased(bytes32 indexed taskKey, address indexed miner, uint256 amount);
    event StakeSlashed(
        bytes32 indexed taskKey, address indexed aggregator, Offence offence, uint256 position, uint256 amount
    );
    event CreditAdded(bytes32 indexed taskKey, address indexed miner, uint256 amount);

    error ZeroAmount();
    error InsufficientStake(address miner, uint256 stake, uint256 needed);
    error NothingToWithdraw(address account);
    error WithdrawalTooEarly(uint40 withdrawableAt, uint256 timestamp);
    error StakeHeld(uint40 heldUntil, uint256 timestamp);
    error PublisherCannotMine(string taskID, address publisher);
    error InvalidApplication(uint256 index, address miner);
    error RegistrationIsClosed(string taskID);
    error RegistrationIsOpen(string taskID);
    error CohortSize(uint256 size, uint16 minMiners, uint16 maxMiners);
    error CohortWithoutStake(string taskID);
    error WrongCohort(string taskID);
    error AlreadyDrawn(string taskID);
    error NotDrawn(string taskID);
    error SeedNotMined(uint40 seedBlock, uint256 blockNumber);
    error SeedExpired(uint40 seedBlock, uint256 blockNumber);
    error SeedAvailable(uint40 seedBlock, uint256 blockNumber);
    error EvidenceTooLate(uint40 latestEnd, uint256 timestamp);
    error NotTheTurn(string taskID, address caller, address aggregator);
    error TurnNotOver(uint40 turnEnd, uint256 timestamp);
    error TurnOver(uint40 turnEnd, uint256 timestamp);
    error AlreadySlashed(string taskID, address aggregator);
    error NotEntitled(string taskID, uint256 position);

    /// @param escrow_ HealChainEscrow of this deployment.
    /// @param blockPublisher_ BlockPublisher of this deployment.
    /// @param withdrawalDelay_s_ Seconds between requesting and taking a withdrawal.
    constructor(HealChainEscrow escrow_, BlockPublisher blockPublisher_, uint40 withdrawalDelay_s_) {
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
        account.stake = stake.toUint88();
        emit StakeDeposited(msg.sender, msg.value, stake);
    }

    /// @notice Takes part of the sender's available stake out of it; it is paid out after the delay. Replaces an earlier request,
    /// whose amount goes back into the stake first; zero cancels it.
    /// @dev Emits {WithdrawalRequested}. Reverts with {InsufficientStake}, or SafeCastOverflowedUintDowncast above 2^88 - 1 wei.
    /// @param amount Wei, at most what is available then.
    function requestWithdrawal(uint256 amount) external {
        Account storage account = _accounts[msg.sender];
        Withdrawal storage withdrawal = _withdrawals[msg.sender];
        uint256 available = uint256(_available(account)) + withdrawal.amount;
        if (amount > available) revert InsufficientStake(msg.sender, available, amount);

        uint40 withdrawableAt = (block.timestamp + withdrawalDelay_s).toUint40();
        account.stake = (uint256(account.stake) + withdrawal.amount - amount).toUint88();
        withdrawal.amount = uint88(amount);
        withdrawal.withdrawableAt = withdrawableAt;
        emit WithdrawalRequested(msg.sender, amount, withdrawableAt);
    }

    /// @notice Pays what the sender requested to withdraw, after the delay.
    /// @dev Emits {StakeWithdrawn}. Reverts with {NothingToWithdraw}, {WithdrawalTooEarly}, InvalidRecipient or TransferFailed.
    /// @param recipient Who gets it: the sender itself, or another account if it cannot receive.
    function withdrawStake(address recipient) external nonReentrant {
        Withdrawal storage withdrawal = _withdrawals[msg.sender];
        uint88 amount = withdrawal.amount;
        if (amount == 0) revert NothingToWithdraw(msg.sender);
        if (block.timestamp < withdrawal.withdrawableAt) {
            revert WithdrawalTooEarly(withdrawal.withdrawableAt, block.timestamp);
        }

        withdrawal.amount = 0;
        emit StakeWithdrawn(msg.sender, recipient, amount);

        pay(address(0), recipient, amount);
    }

    /// @notice Makes the stake that a task recorded of a member available again, once its latest end has passed. Anyone may call it,
    /// for anyone. Only needed while other tasks hold some of the member's stake: when none does, all of it is available.
    /// @dev Emits {StakeReleased}. Reverts with {StakeHeld}, {WrongCohort} or {NotEntitled}: there is no such member, or nothing of
    /// it is recorded for this task any more.
    /// @param cohort As in {RegistrationClosed}.
    /// @param position Position in the cohort.
    function releaseStake(string calldata taskID, bytes32[] calldata cohort, uint256 position) external {
        bytes32 key = taskKeyOf(taskID);
        Draw storage draw = _draws[key];
        uint40 end = _latestEnd(escrow.getTask(key).terms);

        _checkCohort(taskID, draw, cohort);
        if (block.timestamp <= end) revert StakeHeld(end, block.timestamp);
        if (position >= cohort.length || (draw.released >> position) & 1 != 0) revert NotEntitled(taskID, position);
        address miner = accountOf(cohort[position]);
        Account storage account = _accounts[miner];
        // What was recorded before heldSince is available since then, and is not part of what is recorded now.
        if (!_isHeld(account) || end < account.heldSince) revert NotEntitled(taskID, position);

        uint256 amount = stakeIn(cohort[position]) - _slashes[key][position][Offence.Silence].amount
            - _slashes[key][position][Offence.Equivocation].amount;
        draw.released |= 1 << position;
        account.recorded -= uint88(amount);
        emit StakeReleased(key, miner, amount);
    }

    /// @notice Pays what the sender was credited from slashed stakes. No delay, no lock.
    /// @dev Emits {CreditWithdrawn}. Reverts with {NothingToWithdraw}, InvalidRecipient or TransferFailed.
    /// @param recipient Who gets it: the sender itself, or another account if it cannot receive.
    function withdrawCredit(address recipient) external nonReentrant {
        uint256 amount = creditOf[msg.sender];
        if (amount == 0) revert NothingToWithdraw(msg.sender);

        creditOf[msg.sender] = 0;
        emit CreditWithdrawn(msg.sender, recipient, amount);

        pay(address(0), recipient, amount);
    }

    // Cohort and draw

    /// @notice Fixes the cohort of a task, once. Only its publisher may. Every member applied by a signed Registration for this
    /// task. The stakes that they signed for are recorded for the draw and held until the task's latest possible end; the draw is
    /// seeded by the next block.
    /// @dev Emits {RegistrationClosed}, whose cohort is what later calls have to bring along. Reverts with {WrongStatus},
    /// {DeadlinePast}, {RegistrationIsClosed}, {NotPublisher}, {CohortSize}, {NotAscending}, {PublisherCannotMine},
    /// {InvalidApplication}, {InsufficientStake} or {CohortWithoutStake}.
    /// @param applications In the strictly ascending order of their miners.
    function closeRegistration(string calldata taskID, Application[] calldata applications) external {
        bytes32 key = taskKeyOf(taskID);
        Task memory task = escrow.getTask(key);

        _checkLocked(taskID, task);
        if (_draws[key].seedBlock != 0) revert RegistrationIsClosed(taskID);
        if (msg.sender != task.publisher) revert NotPublisher(taskID, msg.sender);
        if (applications.length < task.terms.minMiners || applications.length > task.terms.maxMiners) {
            revert CohortSize(applications.length, task.terms.minMiners, task.terms.maxMiners);
        }

        bytes32[] memory registrations = _checkApplications(taskID, key, applications, task.publisher);
        bytes32[] memory cohort = _holdStakes(taskID, applications, task.terms);

        uint40 seedBlock = (block.number + 1).toUint40();
        _draws[key].seedBlock = seedBlock;
        _draws[key].cohortHash = cohortHashOf(cohort);
        emit RegistrationClosed(key, cohort, registrations, seedBlock);
    }

    /// @notice Draws the aggregator with probability proportional to the recorded stakes. Anyone may call it, once, in the 256
    /// blocks after the seed block; who calls and when makes no difference to the result.
    /// @dev seed = keccak256(taskID ‖ hash of the seed block); see {_memberAt}. Emits {AggregatorDrawn}. Reverts with
    /// {WrongStatus}, {DeadlinePast}, {RegistrationIsOpen}, {AlreadyDrawn}, {SeedNotMined}, {SeedExpired} or {WrongCohort}.
    /// @param cohort As in {RegistrationClosed}.
    function drawAggregator(string calldata taskID, bytes32[] calldata cohort) external {
        bytes32 key = taskKeyOf(taskID);
        Task memory task = escrow.getTask(key);
        Draw storage draw = _draws[key];
        uint40 seedBlock = draw.seedBlock;

        _checkLocked(taskID, task);
        bytes32 blockHash = _seedHash(taskID, draw);
        if (blockHash == 0) revert SeedExpired(seedBlock, block.number);
        _checkCohort(taskID, draw, cohort);

        bytes32 seed = keccak256(abi.encodePacked(taskID, blockHash));
        address aggregator = _memberAt(cohort, 0, uint256(seed));
        draw.seed = seed;
        uint40 turnEnd = _beginTurn(draw, task.terms, aggregator);
        emit AggregatorDrawn(key, aggregator, seedBlock, blockHash, seed, turnEnd);
    }

    /// @notice Seeds the draw anew by the next block, when nobody drew while the chain remembered the old seed block's hash.
    /// @dev Emits {SeedMoved}. Reverts with {RegistrationIsOpen}, {AlreadyDrawn}, {SeedNotMined} or {SeedAvailable}.
    function moveSeed(string calldata taskID) external {
        bytes32 key = taskKeyOf(taskID);
        Draw storage draw = _draws[key];
        uint40 expired = draw.seedBlock;
        if (_seedHash(taskID, draw) != 0) revert SeedAvailable(expired, block.number);

        uint40 seedBlock = (block.number + 1).toUint40();
        draw.seedBlock = seedBlock;
        emit SeedMoved(key, expired, seedBlock);
    }

    /// @notice The aggregator gives up its turn, before the turn is over, and loses nothing: for one that cannot get enough
    /// contributions or votes. It can publish no more; the next is drawn when somebody calls replaceAggregator.
    /// @dev Emits {AggregatorResigned}. Reverts with {WrongStatus}, {NotTheTurn} or {TurnOver}.
    function resignAggregator(string calldata taskID) external {
        bytes32 key = taskKeyOf(taskID);
        Draw storage draw = _draws[key];
        Status status = escrow.getTask(key).status;

        if (status != Status.Locked) revert WrongStatus(taskID, status);
        if (draw.hasResigned || msg.sender != draw.aggregator) revert NotTheTurn(taskID, msg.sender, draw.aggregator);
        if (block.timestamp > draw.turnEnd) revert TurnOver(draw.turnEnd, block.timestamp);

        draw.hasResigned = true;
        emit AggregatorResigned(key, msg.sender);
    }

    /// @notice Ends the turn of an aggregator that resigned, or whose turn passed without a block, and draws the next by the same
    /// seed among the members that had no turn yet, as long as the deadline has not passed. Anyone may call it. The silent one
    /// loses the part of its recorded stake that the task announced, unless the deadline had cut its turn short (else a publisher
    /// that closes registration seconds before the deadline could take the stakes of miners that cannot react in time), or the
    /// task's latest end has passed.
    /// @dev Emits {StakeSlashed} for silence, and {AggregatorReplaced} with aggregator zero when nobody follows. Reverts with
    /// {NotDrawn}, {WrongStatus}, {TurnNotOver} or {WrongCohort}.
    /// @param cohort As in {RegistrationClosed}.
    function replaceAggregator(string calldata taskID, bytes32[] calldata cohort) external {
        bytes32 key = taskKeyOf(taskID);
        Task memory task = escrow.getTask(key);
        Draw storage draw = _draws[key];
        address former = draw.aggregator;

        if (former == address(0)) revert NotDrawn(taskID);
        if (task.status != Status.Locked && task.status != Status.Refunded) revert WrongStatus(taskID, task.status);
        if (!draw.hasResigned && block.timestamp <= draw.turnEnd) revert TurnNotOver(draw.turnEnd, block.timestamp);
        _checkCohort(taskID, draw, cohort);

        uint256 position = _positionOf(cohort, former);
        if (!draw.hasResigned && !draw.isCutShort && block.timestamp <= _latestEnd(task.terms)) {
            uint256 part = stakeIn(cohort[position]) * task.terms.silencePenaltyPpm / PPM;
            _slash(taskID, key, cohort[position], position, Offence.Silence, part);
        }
        uint256 replaced = draw.replaced | (1 << position);
        address next = address(0);
        if (task.status == Status.Locked && block.timestamp <= task.terms.deadline) {
            next = _memberAt(cohort, replaced, uint256(keccak256(abi.encodePacked(draw.seed, replaced))));
        }
        draw.replaced = replaced;
        draw.hasResigned = false;
        uint40 turnEnd = _beginTurn(draw, task.terms, next);
        emit AggregatorReplaced(key, former, next, turnEnd);
    }

    // Slashing

    /// @notice Takes the whole recorded stake of a present or former aggregator, less what its silence cost it already. Once per
    /// aggregator and task, until the task's latest end. Only BlockPublisher, which checked the proof.
    /// @dev Emits {StakeSlashed}. Reverts with {OnlyContract}, {WrongCohort}, {NotTheTurn}, {EvidenceTooLate} or {AlreadySlashed}.
    /// @param cohort As in {RegistrationClosed}.
    function slashEquivocation(string calldata taskID, address aggregator, bytes32[] calldata cohort) external {
        bytes32 key = taskKeyOf(taskID);
        Draw storage draw = _draws[key];

        if (msg.sender != address(blockPublisher)) revert OnlyContract(msg.sender, address(blockPublisher));
        _checkCohort(taskID, draw, cohort);
        uint256 position = _positionOf(cohort, aggregator);
        if (position == cohort.length || (aggregator != draw.aggregator && (draw.replaced >> position) & 1 == 0)) {
            revert NotTheTurn(taskID, aggregator, draw.aggregator);
        }
        uint40 end = _latestEnd(escrow.getTask(key).terms);
        if (block.timestamp > end) revert EvidenceTooLate(end, block.timestamp);

        _slash(taskID, key, cohort[position], position, Offence.Equivocation, stakeIn(cohort[position]));
    }

    /// @notice Credits one member of a cohort with its part of what was taken from another: all get equal parts, the first of them
    /// in address order also the rounding residue. Anyone may call it, for anyone, once per member; there is no last day.
    /// @dev Emits {CreditAdded}. Reverts with {WrongCohort} or {NotEntitled}: nothing was taken, or the member is the culprit, had
    /// its part, or does not exist.
    /// @param cohort As in {RegistrationClosed}.
    /// @param culprit Position in the cohort of the one whose stake was taken.
    /// @param position Position in the cohort of the one to be credited.
    function creditSlashed(
        string calldata taskID,
        bytes32[] calldata cohort,
        uint256 culprit,
        Offence offence,
        uint256 position
    ) external {
        bytes32 key = taskKeyOf(taskID);
        Slash storage slash = _slashes[key][culprit][offence];

        _checkCohort(taskID, _draws[key], cohort);
        if (
            slash.amount == 0 || position >= cohort.length || position == culprit || (slash.credited >> position) & 1 != 0
        ) {
            revert NotEntitled(taskID, position);
        }

        slash.credited |= 1 << position;
        uint256 others = cohort.length - 1;
        uint256 part = slash.amount / others;
        if (position == (culprit == 0 ? 1 : 0)) part += slash.amount % others;
        address miner = accountOf(cohort[position]);
        creditOf[miner] += part;
        emit CreditAdded(key, miner, part);
    }

    // Views

    /// @notice The stake of a miner in wei, what tasks recorded included and requested withdrawals not.
    function stakeOf(address miner) external view returns (uint256) {
        return _accounts[miner].stake;
    }

    /// @notice The stake of a miner that no task holds: what it can put behind another, or withdraw.
    function availableStake(address miner) external view returns (uint256) {
        return _available(_accounts[miner]);
    }

    /// @notice Until when tasks hold part of a miner's stake, in unix seconds, and how much they recorded.
    function getHold(address miner) external view returns (uint256 recorded, uint40 heldUntil) {
        Account storage account = _accounts[miner];
        return (_isHeld(account) ? account.recorded : 0, account.heldUntil);
    }

    /// @notice The requested withdrawal of a miner.
    /// @return amount Wei requested.
    /// @return withdrawableAt Unix seconds when the delay ends.
    function getWithdrawal(address miner) external view returns (uint256 amount, uint40 withdrawableAt) {
        Withdrawal storage withdrawal = _withdrawals[miner];
        return (withdrawal.amount, withdrawal.withdrawableAt);
    }

    /// @notice What anyone needs to recompute the draw, and whose turn it is.
    /// @param taskKey keccak256(bytes(taskID)).
    /// @return seedBlock The block whose hash seeds the draw; zero while registration is open.
    /// @return seed keccak256(taskID ‖ block hash); zero before the draw.
    /// @return cohortHash keccak256 of the cohort's words; zero while registration is open.
    /// @return replaced A bit per position in the cohort: who had a turn before.
    /// @return turnEnd Unix seconds until which the aggregator cannot be replaced.
    function getDraw(bytes32 taskKey)
        external
        view
        returns (uint40 seedBlock, bytes32 seed, bytes32 cohortHash, uint256 replaced, uint40 turnEnd)
    {
        Draw storage draw = _draws[taskKey];
        return (draw.seedBlock, draw.seed, draw.cohortHash, draw.replaced, draw.turnEnd);
    }

    /// @notice Who may publish a block; zero before the draw, after a resignation, and when nobody is left.
    /// @param taskKey keccak256(bytes(taskID)).
    function aggregatorOf(bytes32 taskKey) external view returns (address) {
        Draw storage draw = _draws[taskKey];
        return draw.hasResigned ? address(0) : draw.aggregator;
    }

    /// @notice The same, for a caller that brings the cohort along and wants to know that it is the cohort.
    /// @dev Reverts with {WrongCohort}.
    function aggregatorAmong(string calldata taskID, bytes32[] calldata cohort) external view returns (address) {
        Draw storage draw = _draws[taskKeyOf(taskID)];
        _checkCohort(taskID, draw, cohort);
        return draw.hasResigned ? address(0) : draw.aggregator;
    }

    /// @notice What was taken from a member of a cohort, and a bit per position of those who have had their part.
    /// @param taskKey keccak256(bytes(taskID)).
    function getSlash(bytes32 taskKey, uint256 culprit, Offence offence) external view returns (Slash memory) {
        return _slashes[taskKey][culprit][offence];
    }

    function _checkLocked(string calldata taskID, Task memory task) private view {
        if (task.status != Status.Locked) revert WrongStatus(taskID, task.status);
        if (block.timestamp > task.terms.deadline) revert DeadlinePast(task.terms.deadline, block.timestamp);
    }

    /// @dev The struct hashes of the Registrations. A signature for another task, chain, contract or content recovers a stranger.
    function _checkApplications(
        string calldata taskID,
        bytes32 key,
        Application[] calldata applications,
        address publisher
    ) private view returns (bytes32[] memory registrations) {
        bytes32 domain = blockPublisher.domainSeparator();
        registrations = new bytes32[](applications.length);
        for (uint256 i = 0; i < applications.length; i++) {
            Application calldata a = applications[i];
            if (a.miner <= (i == 0 ? address(0) : applications[i - 1].miner)) revert NotAscending(i, a.miner);
            if (a.miner == publisher) revert PublisherCannotMine(taskID, a.miner);
            registrations[i] = keccak256(
                abi.encode(
                    REGISTRATION_TYPEHASH, key, uint32(0), a.miner, a.encryptionKeyHash, a.datasetProofSha256, a.stake
                )
            );
            bytes32 digest = MessageHashUtils.toTypedDataHash(domain, registrations[i]);
            (address signer,,) = ECDSA.tryRecover(digest, a.r, a.vs);
            if (signer != a.miner) revert InvalidApplication(i, a.miner);
        }
    }

    /// @dev Records the stakes that were signed for, and holds them until no evidence about this task can matter any more.
    function _holdStakes(string calldata taskID, Application[] calldata applications, Terms memory terms)
        private
        returns (bytes32[] memory cohort)
    {
        uint40 latestEnd = _latestEnd(terms);
        uint256 total = 0;
        cohort = new bytes32[](applications.length);
        for (uint256 i = 0; i < applications.length; i++) {
            uint88 stake = applications[i].stake;
            _hold(applications[i].miner, stake, terms.minStake, latestEnd);
            cohort[i] = memberWord(applications[i].miner, stake);
            total += stake;
        }
        if (total == 0) revert CohortWithoutStake(taskID);
    }

    function _hold(address miner, uint88 stake, uint88 minStake, uint40 latestEnd) private {
        Account memory account = _accounts[miner];
        if (stake < minStake) revert InsufficientStake(miner, stake, minStake);
        if (block.timestamp > account.heldUntil) {
            account.recorded = 0;
            account.heldSince = uint40(block.timestamp);
        }
        uint256 available = account.stake - account.recorded;
        if (stake > available) revert InsufficientStake(miner, available, stake);
        account.recorded += stake;
        if (latestEnd > account.heldUntil) account.heldUntil = latestEnd;
        _accounts[miner] = account;
    }

    function _isHeld(Account storage account) private view returns (bool) {
        return block.timestamp <= account.heldUntil;
    }

    /// @dev What is recorded is never more than the stake.
    function _available(Account storage account) private view returns (uint88) {
        return _isHeld(account) ? account.stake - account.recorded : account.stake;
    }

    /// @dev The last second in which anything about a task can matter.
    function _latestEnd(Terms memory terms) private pure returns (uint40) {
        return terms.deadline + terms.publisherRevealWindow_s + terms.aggregatorRevealWindow_s + terms.scoreRevealWindow_s;
    }

    function _checkCohort(string calldata taskID, Draw storage draw, bytes32[] calldata cohort) private view {
        if (cohortHashOf(cohort) != draw.cohortHash) revert WrongCohort(taskID);
    }

    /// @dev Zero when the chain has forgotten the hash (after 256 blocks).
    function _seedHash(string calldata taskID, Draw storage draw) private view returns (bytes32) {
        if (draw.seedBlock == 0) revert RegistrationIsOpen(taskID);
        if (draw.seed != 0) revert AlreadyDrawn(taskID);
        if (block.number <= draw.seedBlock) revert SeedNotMined(draw.seedBlock, block.number);
        return blockhash(draw.seedBlock);
    }

    /// @dev Nobody's turn ends at zero.
    function _beginTurn(Draw storage draw, Terms memory terms, address aggregator) private returns (uint40 turnEnd) {
        uint256 end = block.timestamp + terms.publishWindow_s;
        turnEnd = aggregator == address(0) ? 0 : uint40(Math.min(end, terms.deadline));
        draw.aggregator = aggregator;
        draw.turnEnd = turnEnd;
        draw.isCutShort = end > terms.deadline;
    }

    /// @dev Where seed mod (the sum of the stakes) falls, walking in address order and passing over the excluded positions; zero
    /// when nobody else has a stake.
    function _memberAt(bytes32[] calldata cohort, uint256 excluded, uint256 seed) private pure returns (address) {
        uint256 total = 0;
        for (uint256 i = 0; i < cohort.length; i++) {
            if ((excluded >> i) & 1 == 0) total += stakeIn(cohort[i]);
        }
        if (total == 0) return address(0);
        uint256 point = seed % total;
        for (uint256 i = 0; i < cohort.length; i++) {
            if ((excluded >> i) & 1 != 0) continue;
            uint256 stake = stakeIn(cohort[i]);
            if (point < stake) return accountOf(cohort[i]);
            point -= stake;
        }
        assert(false);
        return address(0);
    }

    /// @dev The length of the cohort for a stranger.
    function _positionOf(bytes32[] calldata cohort, address account) private pure returns (uint256 position) {
        while (position < cohort.length && accountOf(cohort[position]) != account) position++;
    }

    /// @dev Both offences together take at most what the task recorded, which is there until its latest end.
    function _slash(
        string calldata taskID,
        bytes32 key,
        bytes32 member,
        uint256 position,
        Offence offence,
        uint256 most
    ) private {
        Slash storage slash = _slashes[key][position][offence];
        address culprit = accountOf(member);
        if (slash.isDone) revert AlreadySlashed(taskID, culprit);

        Account storage account = _accounts[culprit];
        Offence other = offence == Offence.Silence ? Offence.Equivocation : Offence.Silence;
        uint88 amount = uint88(Math.min(stakeIn(member) - _slashes[key][position][other].amount, most));
        account.stake -= amount;
        account.recorded -= amount;
        slash.isDone = true;
        slash.amount = amount;
        emit StakeSlashed(key, culprit, offence, position, amount);
    }
}
