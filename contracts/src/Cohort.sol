// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

// The chain keeps one hash of a cohort and one root of a block's contributions; whoever needs the lists brings them along.

/// @dev A member of a cohort in one word: the account in the upper 160 bits, its recorded stake in wei in the lower 96.
/// Words ascend as their accounts do.
function memberWord(address account, uint96 stake) pure returns (bytes32) {
    return bytes32((uint256(uint160(account)) << 96) | stake);
}

function accountOf(bytes32 member) pure returns (address) {
    return address(uint160(uint256(member) >> 96));
}

function stakeIn(bytes32 member) pure returns (uint256) {
    return uint96(uint256(member));
}

/// @dev A leaf of a block's contributions. 96 bytes are hashed, so that no inner node (64 bytes) can pass for a leaf.
function contributionLeaf(uint256 position, address miner, bytes32 scoreCommit) pure returns (bytes32) {
    return keccak256(abi.encode(position, miner, scoreCommit));
}
