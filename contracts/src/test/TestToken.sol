// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";

/// @title A token that anyone can mint. For tests only.
contract TestToken is ERC20("Test", "TEST") {
    function mint(address account, uint256 amount) external {
        _mint(account, amount);
    }
}
