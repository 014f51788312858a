// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

/// @title Stakes behind tasks as a sketch may have them. For the tests of attacks only.
/// @notice A record is forgotten when all tasks are over, but its release is not; a requested withdrawal still backs tasks.
contract NaiveHolds {
    struct Hold {
        uint256 amount;
        uint256 end;
        bool isReleased;
    }

    mapping(address miner => uint256) public stakeOf;
    mapping(address miner => uint256) public recordedOf;
    mapping(address miner => uint256) public requestedOf;
    mapping(address miner => uint256) private _heldUntil;
    mapping(bytes32 task => mapping(address miner => Hold)) private _holds;

    function deposit() external payable {
        stakeOf[msg.sender] += msg.value;
    }

    /// @dev Neither takes the amount out of the stake nor asks what tasks hold.
    function request(uint256 amount) external {
        require(amount <= stakeOf[msg.sender], "stake");
        requestedOf[msg.sender] = amount;
    }

    function withdraw() external {
        uint256 amount = requestedOf[msg.sender];
        require(amount <= stakeOf[msg.sender], "stake");
        requestedOf[msg.sender] = 0;
        stakeOf[msg.sender] -= amount;
        payable(msg.sender).transfer(amount);
    }

    /// @dev A new period begins when all tasks are over: nothing is recorded then.
    function hold(bytes32 task, address miner, uint256 amount, uint256 end) external {
        if (block.timestamp > _heldUntil[miner]) recordedOf[miner] = 0;
        require(stakeOf[miner] - recordedOf[miner] >= amount, "not available");
        recordedOf[miner] += amount;
        if (end > _heldUntil[miner]) _heldUntil[miner] = end;
        _holds[task][miner] = Hold(amount, end, false);
    }

    /// @dev Does not ask whether what it gives back was recorded in this period.
    function release(bytes32 task, address miner) external {
        Hold storage held = _holds[task][miner];
        require(block.timestamp > held.end && !held.isReleased, "not yet, or twice");
        held.isReleased = true;
        recordedOf[miner] -= held.amount;
    }
}
