// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

/// @title Stakes and a draw as sketches often have them. For the tests of attacks only.
/// @notice Stakes leave at once; the draw is seeded by what the caller can know or choose.
contract NaiveStakes {
    mapping(address miner => uint256) public stakeOf;
    address[] public miners;

    function deposit() external payable {
        if (stakeOf[msg.sender] == 0) miners.push(msg.sender);
        stakeOf[msg.sender] += msg.value;
    }

    /// @dev Without delay or lock, and paying before the books are changed.
    function withdraw() external {
        uint256 amount = stakeOf[msg.sender];
        if (amount == 0) return;
        (bool ok,) = msg.sender.call{value: amount}("");
        require(ok, "not paid");
        stakeOf[msg.sender] = 0;
    }

    function slash(address miner) external returns (uint256 amount) {
        amount = stakeOf[miner];
        stakeOf[miner] = 0;
    }

    /// @dev The seed is made of the name, of the last block and of the stakes at the time of the call.
    function draw(string calldata taskID) external view returns (address) {
        uint256 total = 0;
        bytes32 seed = keccak256(abi.encodePacked(taskID, blockhash(block.number - 1)));
        for (uint256 i = 0; i < miners.length; i++) {
            total += stakeOf[miners[i]];
            seed = keccak256(abi.encodePacked(seed, stakeOf[miners[i]]));
        }
        uint256 point = uint256(seed) % total;
        for (uint256 i = 0; i < miners.length; i++) {
            if (point < stakeOf[miners[i]]) return miners[i];
            point -= stakeOf[miners[i]];
        }
        return address(0);
    }
}
