// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

/// @title An account that is a contract and misbehaves when it is paid.
contract Hostile {
    enum Manner {
        Accept,
        Refuse,
        /// Calls back with `again`.
        Reenter,
        /// Burns all gas.
        Burn,
        /// Answers with a hundred kilobytes.
        Bomb
    }

    Manner public manner;
    bytes public again;
    /// @dev Times that a call back succeeded.
    uint256 public reentered;
    uint256 private _sink;

    function behave(Manner manner_, bytes calldata again_) external {
        manner = manner_;
        again = again_;
    }

    function forward(address target, uint256 value, bytes calldata data) external payable returns (bytes memory) {
        (bool ok, bytes memory answer) = target.call{value: value}(data);
        if (ok) return answer;
        assembly {
            revert(add(answer, 32), mload(answer))
        }
    }

    receive() external payable {
        if (manner == Manner.Refuse) revert("not today");
        if (manner == Manner.Burn) {
            while (true) _sink += 1;
        }
        if (manner == Manner.Bomb) {
            assembly {
                return(0, 102400)
            }
        }
        if (manner == Manner.Reenter) {
            (bool ok,) = msg.sender.call(again);
            if (ok) reentered += 1;
        }
    }
}
