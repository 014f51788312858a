// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

interface Token {
    function transfer(address to, uint256 amount) external returns (bool);
    function transferFrom(address from, address to, uint256 amount) external returns (bool);
}

/// @title A pool of ether and tokens as sketches often have it. For the tests of attacks only.
/// @notice Answers of tokens and what really arrived are not looked at; claims are leaves of 64 bytes, proved once per call.
contract NaivePool {
    mapping(Token token => mapping(address account => uint256)) public balanceOf;
    mapping(bytes32 task => mapping(address account => uint256)) public owedOf;
    mapping(bytes32 leaf => bool) private _isClaimed;

    receive() external payable {}

    function deposit(Token token, uint256 amount) external {
        token.transferFrom(msg.sender, address(this), amount);
        balanceOf[token][msg.sender] += amount;
    }

    function withdraw(Token token) external {
        uint256 amount = balanceOf[token][msg.sender];
        balanceOf[token][msg.sender] = 0;
        token.transfer(msg.sender, amount);
    }

    /// @dev The leaf is as long as an inner node, so an inner node passes for one.
    function isProved(bytes32 root, bytes32 left, bytes32 right, bytes32[] calldata proof) external pure returns (bool) {
        bytes32 node = keccak256(abi.encodePacked(left, right));
        for (uint256 i = 0; i < proof.length; i++) {
            (bytes32 a, bytes32 b) = node < proof[i] ? (node, proof[i]) : (proof[i], node);
            node = keccak256(abi.encodePacked(a, b));
        }
        return node == root;
    }

    /// @dev Knows what a task owes, and not in which token: the caller names it.
    function claimIn(Token token, bytes32 task) external {
        uint256 amount = owedOf[task][msg.sender];
        owedOf[task][msg.sender] = 0;
        token.transfer(msg.sender, amount);
    }

    function fund(Token token, bytes32 task, address account, uint256 amount) external {
        token.transferFrom(msg.sender, address(this), amount);
        owedOf[task][account] += amount;
    }

    /// @dev Counts the score that the claimer names, whether it revealed in time or not: the parts exceed the whole.
    function claimByScore(uint256 amount, uint256 score, uint256 revealedSum) external {
        payable(msg.sender).transfer(amount * score / revealedSum);
    }

    /// @dev Marks what was claimed after the loop: a leaf named twice is paid twice.
    function claim(bytes32[] calldata leaves, uint256 amount) external {
        uint256 sum = 0;
        for (uint256 i = 0; i < leaves.length; i++) {
            if (!_isClaimed[leaves[i]]) sum += amount;
        }
        for (uint256 i = 0; i < leaves.length; i++) _isClaimed[leaves[i]] = true;
        payable(msg.sender).transfer(sum);
    }
}
