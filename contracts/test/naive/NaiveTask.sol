// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

/// @title A task contract as sketches of this protocol often have it. For the tests of attacks only.
/// @notice Anyone publishes the result; the publisher may call everything off; scores are taken as they come; everybody is paid in one
/// loop by sending.
contract NaiveTask {
    struct Task {
        address publisher;
        uint256 reward;
        address winner;
        bytes32 model;
        bool isOver;
        address[] miners;
        uint256[] scores;
    }

    mapping(string taskID => Task) private _tasks;

    function publishTask(string calldata taskID) external payable {
        _tasks[taskID].publisher = msg.sender;
        _tasks[taskID].reward = msg.value;
    }

    /// @dev No draw, no votes: the first is believed.
    function publishModel(string calldata taskID, bytes32 model) external {
        require(_tasks[taskID].winner == address(0), "published");
        _tasks[taskID].winner = msg.sender;
        _tasks[taskID].model = model;
    }

    /// @dev Scores are not committed to and have no bound.
    function revealScore(string calldata taskID, uint256 score) external {
        _tasks[taskID].miners.push(msg.sender);
        _tasks[taskID].scores.push(score);
    }

    /// @dev At any time, whatever was published and revealed.
    function refund(string calldata taskID) external {
        Task storage task = _tasks[taskID];
        require(msg.sender == task.publisher && !task.isOver, "refund");
        task.isOver = true;
        payable(msg.sender).transfer(task.reward);
    }

    /// @dev A tenth for the winner, the rest by score; the required accuracy is not looked at.
    function distribute(string calldata taskID) external {
        Task storage task = _tasks[taskID];
        require(!task.isOver, "over");
        task.isOver = true;
        uint256 sum = 0;
        for (uint256 i = 0; i < task.scores.length; i++) sum += task.scores[i];
        send(task.winner, task.reward / 10);
        uint256 pool = task.reward - task.reward / 10;
        for (uint256 i = 0; i < task.miners.length; i++) send(task.miners[i], pool * task.scores[i] / sum);
    }

    function send(address account, uint256 amount) private {
        (bool ok,) = account.call{value: amount}("");
        require(ok, "not paid");
    }
}
