// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

error TransferFailed(address account, uint256 amount);

/// @dev Sends wei and reverts when the recipient refuses. Only ever pays an account that asked for its own money.
function pay(address account, uint256 amount) {
    (bool ok,) = account.call{value: amount}("");
    if (!ok) revert TransferFailed(account, amount);
}
