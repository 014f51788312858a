// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";

/// @title A token that misbehaves when it is sent. For tests only.
contract OddToken is ERC20("Odd", "ODD") {
    enum Manner {
        Send,
        KeepAFee,
        AnswerFalse,
        CallBack,
        EmitNonsense
    }

    Manner public manner;
    address public target;
    bytes public again;

    /// @dev The topic of a log that looks like one of HealChain's and holds nothing that can be decoded.
    bytes32 private constant WITHDRAWN = keccak256("Withdrawn(address,address,address,uint256)");

    function mint(address account, uint256 amount) external {
        _mint(account, amount);
    }

    /// @notice Chooses what happens on a transfer; `again_` is the call to `target_` that CallBack makes.
    function behave(Manner manner_, address target_, bytes calldata again_) external {
        manner = manner_;
        target = target_;
        again = again_;
    }

    function transfer(address to, uint256 amount) public override returns (bool) {
        return _isSent() && super.transfer(to, _kept(amount));
    }

    function transferFrom(address from, address to, uint256 amount) public override returns (bool) {
        return _isSent() && super.transferFrom(from, to, _kept(amount));
    }

    function _kept(uint256 amount) private view returns (uint256) {
        return manner == Manner.KeepAFee ? amount - amount / 100 : amount;
    }

    function _isSent() private returns (bool) {
        if (manner == Manner.CallBack) {
            (bool ok, bytes memory reason) = target.call(again);
            assembly {
                if iszero(ok) { revert(add(reason, 32), mload(reason)) }
            }
        }
        if (manner == Manner.EmitNonsense) {
            bytes32 topic = WITHDRAWN;
            assembly {
                log1(0, 0, topic)
            }
        }
        return manner != Manner.AnswerFalse;
    }
}
