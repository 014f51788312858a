// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

/// @title Votes as sketches often count them. For the tests of attacks only.
/// @notice The signed message is the model's hash alone, and a vote is new when its bytes are.
contract NaiveVotes {
    mapping(address voter => bool) public isMember;
    mapping(bytes32 voteHash => bool) private _isUsed;
    uint256 public accepted;

    function admit(address voter) external {
        isMember[voter] = true;
    }

    function vote(bytes32 model, uint8 v, bytes32 r, bytes32 s) external {
        require(isMember[ecrecover(model, v, r, s)], "stranger");
        bytes32 used = keccak256(abi.encodePacked(model, v, r, s));
        require(!_isUsed[used], "twice");
        _isUsed[used] = true;
        accepted += 1;
    }

    /// @dev Counts a list of votes without asking whether one comes twice.
    function count(bytes32 model, uint8[] calldata v, bytes32[] calldata r, bytes32[] calldata s)
        external
        view
        returns (uint256 votes)
    {
        for (uint256 i = 0; i < v.length; i++) {
            if (isMember[ecrecover(model, v[i], r[i], s[i])]) votes += 1;
        }
    }
}
