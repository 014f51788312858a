// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {HealChainEscrow} from "../src/HealChainEscrow.sol";
import {InvalidRecipient, TransferFailed} from "../src/Payment.sol";
import {DeadlinePast, NotPublisher, OnlyContract, Status, Terms, WrongStatus} from "../src/Task.sol";
import {Hostile} from "./Hostile.sol";
import {MannerToken} from "./Tokens.sol";
import {vm} from "./Vm.sol";
import {World} from "./World.sol";

contract EscrowTest is World {
    MannerToken private token;

    function setUp() public {
        deploy();
        token = new MannerToken();
        token.mint(publisher, 1000);
        vm.prank(publisher);
        token.approve(address(escrow), type(uint256).max);
    }

    function publication(string memory id, address token_, uint88 reward, Terms memory t)
        private
        view
        returns (bytes memory)
    {
        return abi.encodeCall(escrow.publishTask, (id, bytes32(uint256(1)), 0, token_, reward, t));
    }

    function test_idsAreOneTo64BytesAndUsedOnce() public {
        string memory longest = "0123456789012345678901234567890123456789012345678901234567890123";
        publish(longest, 1);
        bytes4 why = HealChainEscrow.InvalidTaskID.selector;
        refused(publisher, address(escrow), 1, publication("", address(0), 1, terms()), why);
        refused(publisher, address(escrow), 1, publication(string.concat(longest, "4"), address(0), 1, terms()), why);
        why = HealChainEscrow.DuplicateTask.selector;
        refused(outsider, address(escrow), 1, publication(longest, address(0), 1, terms()), why);
        pass(11 days);
        accepted(publisher, address(escrow), abi.encodeCall(escrow.refundPublisher, (longest, publisher)));
        refused(publisher, address(escrow), 1, publication(longest, address(0), 1, terms()), why);
    }

    function test_theValueIsTheReward() public {
        bytes4 why = HealChainEscrow.WrongValue.selector;
        refused(publisher, address(escrow), 1, publication("t", address(0), 2, terms()), why);
        refused(publisher, address(escrow), 3, publication("t", address(0), 2, terms()), why);
        refused(publisher, address(escrow), 2, publication("t", address(token), 2, terms()), why);
        refused(publisher, address(escrow), publication("t", address(0), 0, terms()), HealChainEscrow.ZeroReward.selector);
    }

    function test_termsOutsideTheirBounds() public {
        for (uint256 i = 0; i < 19; i++) {
            Terms memory t = terms();
            if (i == 0) t.deadline = uint40(time() + 366 days + 1);
            if (i == 1) t.minMiners = 2;
            if (i == 2) t.maxMiners = 201;
            if (i == 3) (t.minMiners, t.maxMiners) = (5, 4);
            if (i == 4) t.faultRatePpm = 500_001;
            if (i == 5) t.aggregatorSharePpm = 500_001;
            if (i == 6) t.silencePenaltyPpm = 1_000_001;
            if (i == 7) t.publishWindow_s = 0;
            if (i == 8) t.publishWindow_s = 90 days + 1;
            if (i == 9) t.publisherRevealWindow_s = 0;
            if (i == 10) t.publisherRevealWindow_s = 90 days + 1;
            if (i == 11) t.aggregatorRevealWindow_s = 0;
            if (i == 12) t.aggregatorRevealWindow_s = 90 days + 1;
            if (i == 13) t.scoreRevealWindow_s = 0;
            if (i == 14) t.scoreRevealWindow_s = 90 days + 1;
            if (i == 15) t.maxScore = 0;
            if (i == 16) t.minMiners = 0;
            bytes4 why = HealChainEscrow.InvalidTerms.selector;
            if (i == 17) (t.deadline, why) = (uint40(time()), DeadlinePast.selector);
            if (i == 18) (t.deadline, why) = (0, DeadlinePast.selector);
            refused(publisher, address(escrow), 1, publication("t", address(0), 1, t), why);
        }
        bytes memory uncommitted = abi.encodeCall(escrow.publishTask, ("t", 0, 0, address(0), 1, terms()));
        refused(publisher, address(escrow), 1, uncommitted, HealChainEscrow.InvalidTerms.selector);
    }

    function test_theLargestTermsAreAccepted() public {
        Terms memory t = terms();
        t.deadline = uint40(time() + 366 days);
        t.minMiners = t.maxMiners = 200;
        t.faultRatePpm = t.aggregatorSharePpm = 500_000;
        t.silencePenaltyPpm = 1_000_000;
        t.publishWindow_s = t.publisherRevealWindow_s = t.aggregatorRevealWindow_s = t.scoreRevealWindow_s = 90 days;
        t.maxScore = type(uint64).max;
        publish("t", address(0), type(uint88).max, t);
        vm.assertEq(address(escrow).balance, type(uint88).max, "locked");
    }

    function test_refundAfterTheDeadlineOnlyAndOnce() public {
        publish("t", 5);
        bytes memory call = abi.encodeCall(escrow.refundPublisher, ("t", outsider));
        uint40 deadline = escrow.getTask(keccak256("t")).terms.deadline;
        vm.warp(deadline);
        refused(publisher, address(escrow), call, HealChainEscrow.DeadlineNotReached.selector);
        vm.warp(deadline + 1);
        refused(outsider, address(escrow), call, NotPublisher.selector);
        bytes memory toZero = abi.encodeCall(escrow.refundPublisher, ("t", address(0)));
        refused(publisher, address(escrow), toZero, InvalidRecipient.selector);
        Hostile hostile = new Hostile();
        hostile.behave(Hostile.Manner.Refuse, "");
        bytes memory toHostile = abi.encodeCall(escrow.refundPublisher, ("t", address(hostile)));
        refused(publisher, address(escrow), toHostile, TransferFailed.selector);
        accepted(publisher, address(escrow), call);
        vm.assertEq(outsider.balance, 5, "paid");
        refused(publisher, address(escrow), call, WrongStatus.selector);
        bytes memory unknown = abi.encodeCall(escrow.refundPublisher, ("u", outsider));
        refused(publisher, address(escrow), unknown, WrongStatus.selector);
    }

    function test_onlyTheOtherContractsMoveATask() public {
        publish("t", 5);
        bytes memory mark = abi.encodeCall(escrow.markPublished, ("t"));
        bytes memory release = abi.encodeCall(escrow.releaseReward, ("t"));
        refused(publisher, address(escrow), mark, OnlyContract.selector);
        refused(address(rewards), address(escrow), mark, OnlyContract.selector);
        refused(publisher, address(escrow), release, OnlyContract.selector);
        refused(address(blocks), address(escrow), release, OnlyContract.selector);
        refused(address(rewards), address(escrow), release, WrongStatus.selector);
        accepted(address(blocks), address(escrow), mark);
        refused(address(blocks), address(escrow), mark, WrongStatus.selector);
        pass(11 days);
        bytes memory refund = abi.encodeCall(escrow.refundPublisher, ("t", publisher));
        refused(publisher, address(escrow), refund, WrongStatus.selector);
        accepted(address(rewards), address(escrow), release);
        refused(address(rewards), address(escrow), release, WrongStatus.selector);
    }

    function test_tokensOfEveryManner() public {
        token.behave(MannerToken.Manner.Fee);
        bytes4 why = HealChainEscrow.FeeOnTransfer.selector;
        refused(publisher, address(escrow), publication("t", address(token), 500, terms()), why);
        token.behave(MannerToken.Manner.False);
        why = SafeERC20.SafeERC20FailedOperation.selector;
        refused(publisher, address(escrow), publication("t", address(token), 500, terms()), why);
        token.behave(MannerToken.Manner.Paused);
        // The token's own reason comes through.
        refused(publisher, address(escrow), publication("t", address(token), 500, terms()), bytes4(keccak256("Error(string)")));
        // An account without code is no token.
        refused(publisher, address(escrow), publication("t", address(0x1234), 500, terms()), 0);
        token.behave(MannerToken.Manner.Silent);
        publish("t", address(token), 500, terms());
        vm.assertEq(token.balanceOf(address(escrow)), 500, "locked");
        pass(11 days);
        bytes memory refund = abi.encodeCall(escrow.refundPublisher, ("t", publisher));
        token.behave(MannerToken.Manner.False);
        refused(publisher, address(escrow), refund, SafeERC20.SafeERC20FailedOperation.selector);
        token.behave(MannerToken.Manner.Good);
        accepted(publisher, address(escrow), refund);
        vm.assertEq(token.balanceOf(publisher), 1000, "all back");
    }

    function testFuzz_whatGoesInComesBack(uint88 reward, uint256 wait) public {
        vm.assume(reward > 0);
        publish("t", reward);
        vm.warp(escrow.getTask(keccak256("t")).terms.deadline + 1 + wait % 1000 days);
        accepted(publisher, address(escrow), abi.encodeCall(escrow.refundPublisher, ("t", publisher)));
        vm.assertEq(publisher.balance, reward, "refund");
        vm.assertEq(uint256(escrow.getTask(keccak256("t")).status), uint256(Status.Refunded), "status");
    }
}
