"""The training step of a task as a WebAssembly module: where its bytes are, and one round of it.

The publisher puts the module into its own folder of the store, beside the terms that name its digest; a miner takes no other.

Errors: MissingArtifact, TamperedArtifact, BadRecord, NoRuntime, ModuleFailed, InvalidAnswer.
"""

from blocks import wasm_runner
from blocks.artifacts import ArtifactStore, MissingArtifact, TamperedArtifact
from blocks.wasm_runner import MAX_MODULE_BYTES, Limits, ModuleFailed, NoRuntime
from contracts.messages import Address
from contracts.task_spec import TaskSpec, WorkloadLimits
from tasks.global_model import GlobalModel, build_network
from tasks.learning.datasets import Dataset
from tasks.learning.models import Floats
from tasks.learning.workload import environment, trained_parameters
from tasks.records import BadRecord


def workload_of(spec: TaskSpec, store: ArtifactStore, publisher: Address) -> bytes | None:
    """The module that the terms name, or None. Raises MissingArtifact or TamperedArtifact, naming the field."""
    if spec.workload_sha256 is None:
        return None
    try:
        return store.get(publisher, spec.workload_sha256, max_bytes=MAX_MODULE_BYTES)
    except (MissingArtifact, TamperedArtifact) as error:
        raise type(error)(f"workload = {spec.workload}: {error}") from error


def check_workload(spec: TaskSpec, store: ArtifactStore, publisher: Address) -> None:
    """Return if this host can run what the terms name. Raises also BadRecord for what is no module, and NoRuntime."""
    module = workload_of(spec, store, publisher)
    if module is None:
        return
    try:
        wasm_runner.check_module(module)
    except ModuleFailed as error:
        raise BadRecord(f"workload = {spec.workload}: {error}") from error
    except NoRuntime as error:
        raise NoRuntime(f"workload = {spec.workload}: {error}") from error


def train_by_module(
    spec: TaskSpec, module: bytes, model: GlobalModel, dataset: Dataset, round_number: int, *, sample_order: int
) -> tuple[Floats, float | None]:
    """New parameters (d,), and the loss that the module reports, if it does."""
    network, rules, limits = build_network(spec), spec.training, spec.workload_limits or WorkloadLimits()
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
    result = wasm_runner.run(module, given, Limits(limits.fuel, limits.memory_bytes, limits.wall_clock_s))
    metrics = result.answer.get("metrics")
    loss = metrics.get("loss") if isinstance(metrics, dict) else None
    return trained_parameters(result.answer, network), loss if isinstance(loss, float) else None
