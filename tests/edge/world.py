"""A server of edge devices in this process: home, ledger, store; and what devices would send."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import SecretStr

from blocks.artifacts import ArtifactStore
from blocks.connections import EdgeConnections
from blocks.edge_ledger import EdgeLedger
from blocks.identity import create_home, residents
from blocks.registry import Registry
from blocks.tables import EdgeModelRow, EdgeUpdateRow
from tasks.edge import wire
from tasks.edge.intake import record
from tasks.edge.server import Server, utc_now

BASE = {"b": 0.0, "w": [0.0, 0.0, 0.0]}


def make_server(folder: Path, **pinned: Any) -> Server:
    """With version 0, zeros; known to the steps of this process as `edge`."""
    me = create_home(folder / "home")
    fields: dict[str, Any] = {
        "store": ArtifactStore(root=str(folder / "store")),
        "registry": Registry(url=SecretStr(f"sqlite:///{folder / 'registry.sqlite'}")),
        "aggregation_pause_s": 0.05,
        "stalled_s": 0.0,
    }
    connections = EdgeConnections(name="edge", **{**fields, **pinned})
    connections.pin(me)
    residents["edge"] = me
    server = Server(EdgeLedger(connections.registry, connections.store, me.address), connections)
    put_model(server, BASE, 0)
    return server


def put_model(server: Server, model: Any, version: int | None = None) -> int:
    row = EdgeModelRow(version=-1, sha256="", form="json", created_at=utc_now())
    return server.ledger.put_model(row, wire.encode_model(wire.read_tensors(model, "model")), version=version)


def ask(server: Server, **fields: Any) -> str:
    """Ask for an experiment; its id."""
    asked = {"round_id": "r-1", "participants": ["a", "b", "c"], "k_of_n": 2, "timeout_s": 30, **fields}
    request = wire.read_experiment(json.dumps(asked).encode())
    record(server, request, utc_now())
    return request.name


def update(sender: str, w: Any = (1.0, 2.0, 3.0), b: float = 1.0, samples: int = 1, **fields: Any) -> dict[str, Any]:
    return {
        "round_id": "r-1",
        "proplet_id": sender,
        "base_model_uri": "fl/models/global_model_v0",
        "num_samples": samples,
        "metrics": {"loss": 0.5},
        "update": {"w": list(w), "b": b},
        **fields,
    }


def receive(server: Server, said: dict[str, Any], at: datetime | None = None) -> str:
    """Put an update into the ledger as it is, unchecked; what became of it."""
    read = wire.update_of(said)
    row = EdgeUpdateRow(
        round_id=read.round_id,
        proplet_id=read.proplet_id,
        digest=read.digest,
        num_samples=read.num_samples,
        metrics=json.dumps(read.metrics),
        error=read.error,
        transport="test",
        received_at=at or utc_now(),
    )
    return server.ledger.receive(row, None if read.error else wire.encode_model(read.update)).kind


def model_of(server: Server, version: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(server.ledger.model_bytes(server.ledger.model(version)))
    return found


def plain_mean(updates: list[dict[str, Any]]) -> dict[str, Any]:
    """FedAvg by hand."""
    counts = np.array([one["num_samples"] for one in updates], dtype=float)
    w = np.array([one["update"]["w"] for one in updates]).T @ counts / counts.sum()
    b = np.array([one["update"]["b"] for one in updates]) @ counts / counts.sum()
    return {"b": b, "w": w}
