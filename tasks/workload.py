"""The training step of a task as a WebAssembly module: where its bytes are, what it may use, and one round of it.

The publisher puts the module into its own folder of the store, beside the terms that name its digest; a miner takes no other.
The terms say what a round may use, and each miner's host has ceilings of its own, which they cannot pass.

Errors: MissingArtifact, TamperedArtifact, BadRecord, NoRuntime, ModuleFailed, InvalidAnswer; ValueError for a wrong file of
ceilings.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from blocks import wasm_runner
from blocks.artifacts import MissingArtifact, TamperedArtifact
from blocks.identity import Identity
from blocks.wasm_runner import MAX_MODULE_BYTES, MIB, Limits, ModuleFailed, NoRuntime
from contracts.messages import Address
from contracts.task_spec import TaskSpec, WorkloadLimits
from tasks.global_model import GlobalModel, build_network
from tasks.learning.datasets import Dataset
from tasks.learning.models import Floats
from tasks.learning.workload import environment, trained_parameters
from tasks.records import BadRecord, Station

CEILINGS = Limits(fuel=10**12, memory_bytes=1024 * MIB, wall_clock_s=600.0)
"""What this host gives a module of a task, where HOME/workload-limits.json does not say otherwise."""
CEILINGS_FILE = "workload-limits.json"
SHORTEST_S = 0.001  # of a run whose time is over


@dataclass(frozen=True)
class Workload:
    """A module as this host runs it. kept: the folder of its machine code."""

    module: bytes
    limits: Limits
    kept: Path


def workload_of(spec: TaskSpec, st: Station, publisher: Address) -> Workload | None:
    """What the terms name, or None. Raises MissingArtifact or TamperedArtifact, naming the field, or BadRecord."""
    if (module := _module_of(spec, st, publisher)) is None:
        return None
    return Workload(module, limits_of(spec, st.me), _kept(st.me))


def limits_of(spec: TaskSpec, me: Identity) -> Limits:
    """What a round may use here: as the terms say. Raises BadRecord naming a field that is beyond this host's ceiling.

    Neither compiling nor running takes longer than the miners have for a contribution.
    """
    path, asked = Path(me.home) / CEILINGS_FILE, spec.workload_limits or WorkloadLimits()
    ceilings = wasm_runner.read_limits(path, CEILINGS)
    for name, value in asked.model_dump().items():
        if value > getattr(ceilings, name):
            raise BadRecord(
                f"workload_limits.{name} = {value}: this host gives a module at most {getattr(ceilings, name)}: "
                f"leave this task to others, or write a higher {name} into {path}"
            )
    due_s = spec.rounds.contribution_timeout_s
    limits = replace(ceilings, **asked.model_dump())
    return replace(limits, wall_clock_s=min(limits.wall_clock_s, due_s), compile_s=min(limits.compile_s, due_s))


def check_workload(spec: TaskSpec, st: Station, publisher: Address, limits: Limits = CEILINGS) -> None:
    """Return if this host can run what the terms name. Raises also BadRecord for what is no module, and NoRuntime."""
    module = _module_of(spec, st, publisher)
    if module is None:
        return
    try:
        wasm_runner.compiled(module, limits, kept=_kept(st.me))
    except ModuleFailed as error:
        raise BadRecord(f"workload = {spec.workload}: {error}") from error
    except NoRuntime as error:
        raise NoRuntime(f"workload = {spec.workload}: {error}") from error


def _module_of(spec: TaskSpec, st: Station, publisher: Address) -> bytes | None:
    if spec.workload_sha256 is None:
        return None
    try:
        return st.store.get(publisher, spec.workload_sha256, max_bytes=MAX_MODULE_BYTES)
    except (MissingArtifact, TamperedArtifact) as error:
        raise type(error)(f"workload = {spec.workload}: {error}") from error


def _kept(me: Identity) -> Path:
    return Path(me.home) / "compiled"


def train_by_module(
    spec: TaskSpec, workload: Workload, model: GlobalModel, dataset: Dataset, round_number: int, *, sample_order: int
) -> tuple[Floats, float | None]:
    """New parameters (d,), and the loss that the module reports, if it does.

    Compiling, which is mostly done already, and running end before the contribution is due.
    """
    ends_s = time.monotonic() + spec.rounds.contribution_timeout_s
    network, rules = build_network(spec), spec.training
    hyperparameters = {"epochs": rules.local_epochs, "lr": rules.learning_rate, "batch_size": rules.batch_size}
    optional = {"mu": rules.proximal, "momentum": rules.momentum, "weight_decay": rules.weight_decay}
    given = environment(
        network,
        model.parameters,
        dataset,
        hyperparameters | {name: value for name, value in optional.items() if value},
        round_id=f"{spec.name}-{round_number}",
        model_uri=f"model:{model.sha256}",
        seed=sample_order,
    )
    wasm_runner.compiled(workload.module, workload.limits, kept=workload.kept)
    left_s = max(SHORTEST_S, ends_s - time.monotonic())
    limits = replace(workload.limits, wall_clock_s=min(workload.limits.wall_clock_s, left_s))
    result = wasm_runner.run(workload.module, given, limits, kept=workload.kept)
    metrics = result.answer.get("metrics")
    loss = metrics.get("loss") if isinstance(metrics, dict) else None
    return trained_parameters(result.answer, network), loss if isinstance(loss, float) else None
