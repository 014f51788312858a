"""Flower's secure aggregation, Flower's own code from end to end: SecAggPlusWorkflow on the server, secaggplus_mod on
every client, with their default quantisation (2**22 levels in +-8, sums mod 2**32).

Messages are handed over in this process: no network, no protobuf. A client's time is what the mod takes over the four
stages, without the training; the server's is the workflow's, without the time in clients. The sum is checked.

num_shares, threshold: as SecAggPlusWorkflow names them; num_shares = clients is SecAgg's complete graph.
"""

import copy
import os
import random
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

import numpy as np
from answering import answer
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitIns, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.compat.common.recorddict_compat import fitres_to_recorddict, parameters_to_arrayrecord
from flwr.server import SimpleClientManager
from flwr.server.compat import LegacyContext
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.supercore.task_identity import TaskIdentity

NO_MODEL = Parameters([], "numpy.ndarray")
CLIPPING = 8.0
LEVELS = 2**22
WEIGHT = 1000  # examples a client: the workflow's default max_weight, so parameters are quantised as they are

TaskIdentity.run_id = TaskIdentity.task_id = 1
TaskIdentity.node_id = 0  # the server


@dataclass(frozen=True)
class Named:
    """A client as far as the workflow asks."""

    node_id: int


class Everybody:
    """The strategy: selects all clients, sends no model, and takes the sum as the workflow hands it over."""

    def __init__(self, clients: Iterable[int]) -> None:
        self.clients = list(clients)
        self.result: np.ndarray | None = None

    def configure_fit(self, server_round: int, parameters: Parameters, client_manager: Any) -> Any:
        return [(Named(client), FitIns(NO_MODEL, {})) for client in self.clients]

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        if failures:
            raise AssertionError(f"clients failed: {failures[:2]}")
        self.result = parameters_to_ndarrays(results[0][1].parameters)[0]
        return None, {}


class Federation:
    """Clients in this process, as the workflow's grid: those in `dropped` answer the first two stages only."""

    def __init__(self, dimension: int, clients: int, dropped: list[int]) -> None:
        self.dimension, self.dropped = dimension, set(dropped)
        self.contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in range(1, clients + 1)}
        self.seconds = dict.fromkeys(self.contexts, 0.0)
        self.sent_bytes = dict.fromkeys(self.contexts, 0)
        self.inside_s = 0.0
        self.training_s = 0.0
        self.stage = 0
        self.total = np.zeros(dimension)

    def send_and_receive(self, messages: list[Message], *, timeout: float | None = None) -> list[Message]:
        started = time.perf_counter()
        self.stage += 1
        reached = [m for m in messages if self.stage < 3 or m.metadata.dst_node_id not in self.dropped]
        replies = [self.deliver(message) for message in reached]
        self.inside_s += time.perf_counter() - started
        return replies

    def deliver(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        # A mod removes fields from what it received: each client has a copy of its own.
        received = Message(
            copy.deepcopy(message.content), node, message.metadata.message_type, group_id=message.metadata.group_id
        )
        self.training_s = 0.0
        started = time.perf_counter()
        reply = secaggplus_mod(received, self.contexts[node], self.train)
        self.seconds[node] += time.perf_counter() - started - self.training_s
        self.sent_bytes[node] += sum(_bytes_of(record) for record in reply.content.config_records.values())
        return reply

    def train(self, message: Message, context: Context) -> Message:
        started = time.perf_counter()
        update = np.random.default_rng(context.node_id).uniform(-1, 1, self.dimension).astype(np.float32)
        self.total += update
        result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([update]), WEIGHT, {})
        reply = Message(fitres_to_recorddict(result, keep_input=False), reply_to=message)
        self.training_s = time.perf_counter() - started
        return reply


def _bytes_of(record: ConfigRecord) -> int:
    values = [value if isinstance(value, list) else [value] for value in record.values()]
    return sum(len(item) if isinstance(item, bytes) else 8 for value in values for item in value)


def aggregate(dimension: int, clients: int, num_shares: int, threshold: int, dropped: int) -> dict[str, Any]:
    """One secure sum. client_s: median of the clients that answer to the end; server_s; bytes a parameter sent."""
    random.seed(1)  # the workflow's ring of neighbours
    gone = [1 + index * clients // max(1, dropped) for index in range(dropped)]
    federation, strategy = Federation(dimension, clients, gone), Everybody(range(1, clients + 1))
    state = RecordDict()
    state.config_records["config"] = ConfigRecord({"current_round": 1})
    state.array_records["parameters"] = parameters_to_arrayrecord(NO_MODEL, keep_input=True)
    context = LegacyContext(Context(1, 0, {}, state, {}), strategy=strategy, client_manager=SimpleClientManager())
    workflow = SecAggPlusWorkflow(num_shares if num_shares < clients else 1.0, threshold)
    started = time.perf_counter()
    workflow(federation, context)
    whole = time.perf_counter() - started
    if strategy.result is None:
        raise AssertionError("the workflow halted: too many dropped clients for its threshold")
    answered = [node for node in federation.contexts if node not in federation.dropped]
    worst = np.abs(strategy.result - federation.total / len(answered)).max()
    if worst > 4 * CLIPPING / LEVELS:
        raise AssertionError(f"Flower's mean is off by {worst}")
    return {
        "client_s": statistics.median(federation.seconds[node] for node in answered),
        "server_s": whole - federation.inside_s,
        "bytes": statistics.median(federation.sent_bytes[node] for node in answered) / dimension,
    }


answer({"aggregate": aggregate})
