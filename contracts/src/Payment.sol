// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";

error TransferFailed(address account, uint256 amount);
error InvalidRecipient(address recipient);

/// @dev Sends ether (token zero) or tokens, and reverts when the recipient or the token refuses. Only ever sends what the
/// caller asked for as its own, or what one contract of the deployment hands to another.
function pay(address token, address recipient, uint256 amount) {
    if (recipient == address(0)) revert InvalidRecipient(recipient);
    if (token == address(0)) {
        (bool ok,) = recipient.call{value: amount}("");
        if (!ok) revert TransferFailed(recipient, amount);
    } else {
        SafeERC20.safeTransfer(IERC20(token), recipient, amount);
    }
}
