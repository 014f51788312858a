// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {BlockPublisher} from "../../src/BlockPublisher.sol";
import {HealChainEscrow} from "../../src/HealChainEscrow.sol";
import {RewardDistribution} from "../../src/RewardDistribution.sol";
import {StakeRegistry} from "../../src/StakeRegistry.sol";
import {vm} from "../Vm.sol";
import {Handler} from "./Handler.sol";

struct FuzzSelector {
    address addr;
    bytes4[] selectors;
}

/// @title After every act of a random history all checks hold; at its end nothing is left behind.
contract InvariantsTest {
    Handler private handler;
    mapping(bytes4 selector => uint256) private total;

    function setUp() public {
        handler = new Handler();
    }

    function targetContracts() external view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(handler);
    }

    /// @dev The acts; {Handler.finish} is not one.
    function targetSelectors() external view returns (FuzzSelector[] memory targets) {
        targets = new FuzzSelector[](1);
        targets[0] = FuzzSelector(address(handler), acts());
    }

    /// @dev Random histories make every call of the contracts succeed: without that, checks would be about nothing.
    function test_historiesReachEveryCall() external {
        bytes4[] memory all = acts();
        bytes32 chance = keccak256("histories");
        for (uint256 run = 0; run < 20; run++) {
            for (uint256 i = 0; i < 100; i++) {
                chance = keccak256(abi.encode(chance));
                bytes4 selector = all[uint256(chance) % all.length];
                (bool ok,) = address(handler).call(bytes.concat(selector, words(chance)));
                vm.assertTrue(ok, "an act reverted");
            }
            handler.finish();
            handler.checkNoBreach();
            count();
        }
        bytes4[] memory calls = callsOfPeople();
        for (uint256 i = 0; i < calls.length; i++) {
            vm.assertGt(total[calls[i]], 0, string.concat("never reached: call ", vm.toString(i)));
        }
    }

    function words(bytes32 chance) private pure returns (bytes memory) {
        bytes32 a = keccak256(abi.encode(chance, 0));
        return abi.encode(a, keccak256(abi.encode(a)), ~a, keccak256(abi.encode(~a)), a >> 128);
    }

    function count() private {
        bytes4[] memory calls = callsOfPeople();
        for (uint256 i = 0; i < calls.length; i++) total[calls[i]] += handler.reached(calls[i]);
        handler = new Handler();
    }

    function callsOfPeople() private pure returns (bytes4[] memory list) {
        bytes4[19] memory calls = [
            HealChainEscrow.publishTask.selector,
            HealChainEscrow.refundPublisher.selector,
            StakeRegistry.depositStake.selector,
            StakeRegistry.requestWithdrawal.selector,
            StakeRegistry.withdrawStake.selector,
            StakeRegistry.withdrawCredit.selector,
            StakeRegistry.releaseStake.selector,
            StakeRegistry.closeRegistration.selector,
            StakeRegistry.drawAggregator.selector,
            StakeRegistry.moveSeed.selector,
            StakeRegistry.resignAggregator.selector,
            StakeRegistry.replaceAggregator.selector,
            StakeRegistry.creditSlashed.selector,
            BlockPublisher.publishBlock.selector,
            BlockPublisher.reportEquivocation.selector,
            RewardDistribution.revealAccuracy.selector,
            RewardDistribution.openScores.selector,
            RewardDistribution.revealScore.selector,
            RewardDistribution.distribute.selector
        ];
        list = new bytes4[](calls.length + 2);
        for (uint256 i = 0; i < calls.length; i++) list[i] = calls[i];
        list[calls.length] = RewardDistribution.claimTo.selector;
        list[calls.length + 1] = RewardDistribution.withdrawTo.selector;
    }

    function acts() private pure returns (bytes4[] memory all) {
        bytes4[27] memory list = [
            Handler.advance.selector,
            Handler.behaveToken.selector,
            Handler.behaveHostile.selector,
            Handler.donate.selector,
            Handler.depositStake.selector,
            Handler.requestWithdrawal.selector,
            Handler.withdrawStake.selector,
            Handler.withdrawCredit.selector,
            Handler.releaseStake.selector,
            Handler.publishTask.selector,
            Handler.publishWithFee.selector,
            Handler.closeRegistration.selector,
            Handler.drawAggregator.selector,
            Handler.moveSeed.selector,
            Handler.resign.selector,
            Handler.replaceAggregator.selector,
            Handler.publishBlock.selector,
            Handler.equivocate.selector,
            Handler.creditSlashed.selector,
            Handler.revealAccuracy.selector,
            Handler.openScores.selector,
            Handler.revealScore.selector,
            Handler.distribute.selector,
            Handler.claimTo.selector,
            Handler.withdrawTo.selector,
            Handler.refund.selector,
            Handler.drive.selector
        ];
        all = new bytes4[](list.length);
        for (uint256 i = 0; i < list.length; i++) all[i] = list[i];
    }

    /// @dev One campaign for all checks: each of them after the same acts.
    function invariant_all() external view {
        handler.checkEscrowSolvency();
        handler.checkRewardsSolvency();
        handler.checkRegistrySolvency();
        handler.checkStakeConservation();
        handler.checkTaskConservation();
        handler.checkOneBlock();
        handler.checkQuorum();
        handler.checkMonotone();
        handler.checkScores();
        handler.checkDraw();
        handler.checkPools();
        handler.checkNoBreach();
        handler.checkRecordedStakes();
        handler.checkEveryTaskCanTake();
        handler.checkBits();
    }

    /// @dev 13: nothing is stranded.
    function afterInvariant() external {
        handler.finish();
        handler.checkNoBreach();
    }
}
