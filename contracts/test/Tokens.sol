// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

/// @title A token whose manners a test chooses while it runs.
contract MannerToken {
    enum Manner {
        Good,
        /// Keeps one part in a hundred of every transfer.
        Fee,
        /// Answers false and moves nothing.
        False,
        /// Reverts.
        Paused,
        /// Answers nothing, as the oldest tokens do.
        Silent
    }

    Manner public manner;
    mapping(address account => uint256) public balanceOf;
    mapping(address owner => mapping(address spender => uint256)) public allowance;

    function behave(Manner manner_) external {
        manner = manner_;
    }

    function mint(address account, uint256 amount) external {
        balanceOf[account] += amount;
    }

    function approve(address spender, uint256 amount) external returns (bool) {
        allowance[msg.sender][spender] = amount;
        return true;
    }

    function transfer(address to, uint256 amount) external returns (bool) {
        return _move(msg.sender, to, amount);
    }

    function transferFrom(address from, address to, uint256 amount) external returns (bool) {
        if (manner != Manner.False) allowance[from][msg.sender] -= amount;
        return _move(from, to, amount);
    }

    function _move(address from, address to, uint256 amount) private returns (bool) {
        require(manner != Manner.Paused, "paused");
        if (manner == Manner.False) return false;
        balanceOf[from] -= amount;
        balanceOf[to] += manner == Manner.Fee ? amount - amount / 100 : amount;
        if (manner == Manner.Silent) {
            assembly {
                return(0, 0)
            }
        }
        return true;
    }
}
