// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

/// @title An account that is a contract: it does what its owner says, and misbehaves when it is paid. For tests only.
contract Recipient {
    enum Manner {
        Accept,
        Refuse,
        Reenter
    }

    Manner public manner;
    bytes public again;
    bool public hasReentered;

    constructor() payable {}

    /// @notice Chooses what happens on receiving ether; `again_` is the call repeated to the payer when re-entering.
    function behave(Manner manner_, bytes calldata again_) external {
        manner = manner_;
        again = again_;
    }

    /// @notice Calls a contract with value of its own.
    function forward(address target, uint256 value, bytes calldata data) external {
        (bool ok, bytes memory reason) = target.call{value: value}(data);
        if (ok) return;
        assembly {
            revert(add(reason, 32), mload(reason))
        }
    }

    receive() external payable {
        if (manner == Manner.Refuse) revert("not today");
        if (manner == Manner.Reenter) {
            (bool ok,) = msg.sender.call(again);
            if (ok) hasReentered = true;
        }
    }
}
