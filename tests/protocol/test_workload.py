"""A task whose training step is a WebAssembly module: paid like any other, and nobody runs another module than the terms name."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wasmtime
from typer import Exit

from blocks import wasm_runner
from blocks.artifacts import MissingArtifact, TamperedArtifact
from blocks.identity import Identity
from blocks.wasm_runner import ModuleFailed, NoRuntime
from contracts.bindings import Status
from contracts.messages import Candidate, Collection
from contracts.task_spec import TaskFile, TaskSpec, load_task_file
from infra import cli
from infra.edge_modules import build
from infra.simulate import shares
from tasks.contribute import local_round, order_of_samples, read_prepared
from tasks.global_model import build_network, initial_model
from tasks.learning import compression
from tasks.learning.compression import Memory
from tasks.learning.datasets import Dataset
from tasks.learning.workload import environment
from tasks.publish import DepositFailed
from tasks.records import BadRecord
from tasks.samples import load_samples
from tasks.workload import CEILINGS, limits_of
from tests.infra.test_edge_modules import plain
from tests.protocol.world import MINERS, TASK_ID, World

TASK = build.ROOT / "logistic" / "task.toml"
MODULE = build.module_path("logistic").read_bytes()
LOOPING = bytes(wasmtime.wat2wasm('(module (memory (export "memory") 1) (func (export "_start") (loop $a (br $a))))'))


def file_for(module: bytes, **limits: Any) -> TaskFile:
    text = TASK.read_text()
    fields = load_task_file(text).model_dump(mode="json")
    fields |= {"workload": "wasm:" + hashlib.sha256(module).hexdigest(), "required_accuracy": 0.7}
    fields["workload_limits"] |= limits
    # One round is all of these tests; its model may be worse for a miner whose samples are nearly all of one class.
    fields["voting"]["tolerance"] = 0.5
    return TaskFile.model_validate(fields)


@pytest.fixture
def world_of(tmp_path: Path) -> Any:
    """A world before its task is published; the module, if any, is in the publisher's store."""
    worlds: list[World] = []

    def make(file: TaskFile, module: bytes | None) -> World:
        world = World(tmp_path / "run", file)
        worlds.append(world)
        if module is not None:
            world.store.put(world.address("publisher"), module)
        return world

    yield make
    for world in worlds:
        world.close()


Make = Callable[[TaskFile, bytes | None], World]


def paid_in_withdrawing(world: World) -> set[str]:
    """Whom the task's settlement makes richer by more than a hundredth of the reward."""
    before = {name: world.balance_wei(name) for name in MINERS}
    world.through("withdraw", after="reveal-score")
    assert world.contracts.escrow.get_task(TASK_ID).status is Status.SETTLED
    return {name for name in MINERS if world.balance_wei(name) - before[name] > world.file.money.reward_wei // 100}


def stored_module(world: World) -> Path:
    """Where the store keeps the bytes of the workload."""
    digest = (world.file.workload or "").removeprefix("wasm:")
    return world.folder / "store" / world.address("publisher").lower() / "blobs" / digest[:2] / digest


def test_the_task_file_names_the_module_that_comes_with_the_system():
    file = load_task_file(TASK.read_text())
    assert file.workload == "wasm:" + hashlib.sha256(MODULE).hexdigest()
    assert file.model.name == "binary"


def test_a_task_with_a_module_runs_from_publication_to_payment(world_of):
    world = world_of(file_for(MODULE), MODULE).through("reveal-score")
    assert paid_in_withdrawing(world) == set(MINERS)
    candidate = world.find(Candidate, world.aggregator)
    assert candidate.correct / candidate.total > 0.8
    assert world.find(Collection, world.aggregator).refused == ()


def test_what_is_sent_is_what_the_module_computed(world_of):
    world = world_of(file_for(MODULE), MODULE).through("train")
    spec, miner = world.file.spec(), world.station(MINERS[0])
    samples = load_samples(miner.me, spec.dataset, "train")
    order = np.random.default_rng(order_of_samples(spec, miner.address, 1)).permutation(len(samples))
    rules = {"epochs": spec.training.local_epochs, "lr": spec.training.learning_rate, "batch_size": 16}
    w, b = plain(samples.features[order].astype(float), samples.labels[order].astype(float), np.zeros(30), 0.0, **rules)
    moved = np.append(w, b)
    moved *= min(1.0, spec.compression.clip_norm / np.linalg.norm(moved))
    prepared = read_prepared(miner, TASK_ID, 1)
    assert prepared is not None
    sent = compression.dequantize(prepared.values, scale=spec.compression.scale)
    limited = np.clip(moved, -spec.compression.value_limit, spec.compression.value_limit)
    np.testing.assert_allclose(sent, limited, atol=1.01 / spec.compression.scale)


def test_a_module_that_loops_ends_with_its_reason(world_of):
    world = world_of(file_for(LOOPING, fuel=1_000_000), LOOPING).through("deliver")
    with pytest.raises(ModuleFailed) as failed:
        world.do("train", MINERS[0])
    assert failed.value.reason == "fuel"
    assert read_prepared(world.station(MINERS[0]), TASK_ID, 1) is None


def fuel_of(spec: TaskSpec, samples: Dataset, kept: Path) -> int:
    """What the first round of a miner with these samples burns."""
    given = environment(
        build_network(spec),
        initial_model(spec).parameters,
        samples,
        {"epochs": spec.training.local_epochs, "lr": spec.training.learning_rate, "batch_size": 16},
        round_id="breast-cancer-wasm-1",
        model_uri=f"model:{initial_model(spec).sha256}",
        seed=1,
    )
    return wasm_runner.run(MODULE, given, kept=kept).fuel_used


def test_a_miner_whose_module_fails_is_left_out_and_the_others_are_paid(world_of, tmp_path):
    """The miner with the most samples needs more fuel than the terms give."""
    spec = file_for(MODULE).spec()
    needed = dict(
        zip(MINERS, (fuel_of(spec, part, tmp_path / "compiled") for part in shares(spec, len(MINERS))[0]), strict=True)
    )
    *_, next_largest, largest = sorted(MINERS, key=lambda name: needed[name])
    assert needed[largest] > 1.02 * needed[next_largest]
    limit = (needed[largest] + needed[next_largest]) // 2
    world = world_of(file_for(MODULE, fuel=limit), MODULE).through("deliver")

    with pytest.raises(ModuleFailed, match=f"fuel: its {limit} units are used up"):
        world.do("train", largest)
    for name in (name for name in MINERS if name != largest):
        world.do("train", name)
        world.do("submit", name)
    collection = world.do("collect", world.aggregator)
    assert sorted(collection.miners) == sorted(world.address(name) for name in MINERS if name != largest)
    world.through("reveal-accuracy", after="collect")
    for name in (name for name in MINERS if name != largest):
        world.do("reveal-score", name)
    paid = paid_in_withdrawing(world)
    assert paid - {world.aggregator} == set(MINERS) - {largest, world.aggregator}


def test_a_module_with_another_digest_is_refused(world_of):
    world = world_of(file_for(MODULE), MODULE).through("deliver")
    stored_module(world).write_bytes(LOOPING)
    with pytest.raises(TamperedArtifact, match=r"workload = wasm:69bb.*truncated or changed"):
        world.do("train", MINERS[0])


def test_a_module_that_is_no_longer_there_is_named(world_of):
    world = world_of(file_for(MODULE), MODULE).through("deliver")
    stored_module(world).unlink()
    with pytest.raises(MissingArtifact, match="workload = wasm:69bb"):
        world.do("train", MINERS[0])


def test_another_partys_copy_does_not_stand_in_for_the_publishers(world_of):
    world = world_of(file_for(MODULE), None)
    world.store.put(world.address(MINERS[0]), MODULE)
    with pytest.raises(DepositFailed, match=r"workload = wasm:69bb.*Nothing was locked"):
        world.do("publish", "publisher")
    assert world.contracts.escrow.get_task(TASK_ID).status is Status.NONE


def test_a_module_that_is_none_locks_no_reward(world_of):
    world = world_of(file_for(b"\0asm not really"), b"\0asm not really")
    with pytest.raises(DepositFailed, match=r"workload = wasm:.*module: .*Nothing was locked"):
        world.do("publish", "publisher")
    assert world.contracts.escrow.get_task(TASK_ID).status is Status.NONE


def test_a_miner_without_a_runtime_says_so_before_it_stakes(world_of, monkeypatch):
    world = world_of(file_for(MODULE), MODULE).through("publish")
    monkeypatch.setitem(sys.modules, "wasmtime", None)
    with pytest.raises(NoRuntime, match=r"workload = wasm:69bb.*pip install 'healchain\[edge\]'"):
        world.do("register", MINERS[0])
    assert world.contracts.stakes.available_stake(world.address(MINERS[0])) == 0


def test_the_publisher_needs_no_runtime(world_of, monkeypatch):
    world = world_of(file_for(MODULE), MODULE)
    monkeypatch.setitem(sys.modules, "wasmtime", None)
    assert world.do("publish", "publisher")


def test_a_published_module_that_a_miner_cannot_start_is_refused_by_it(world_of, monkeypatch):
    """As one that the publisher could not check, for want of a runtime."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wasmtime", None)
        world = world_of(file_for(b"\0asm not really"), b"\0asm not really").through("publish")
    with pytest.raises(BadRecord, match="workload = wasm:"):
        world.do("register", MINERS[0])


def test_a_task_file_whose_module_is_missing_names_the_field(tmp_path, capsys):
    path = tmp_path / "task.toml"
    path.write_text(TASK.read_text().replace("69bb", "0000"))
    with pytest.raises(Exit):
        cli._workload_of(str(path), cli._load(str(path), {}))
    said = " ".join(capsys.readouterr().err.split())
    assert "workload = wasm:0000" in said
    assert "beside the task file" in said


def pinned_limits(world: World, name: str, **limits: Any) -> Path:
    path = Path(world.station(name).me.home) / "workload-limits.json"
    path.write_text(json.dumps(limits))
    return path


@pytest.mark.parametrize(
    ("field", "value", "ceiling"),
    [("fuel", 2 * 10**12, 10**12), ("memory_bytes", 2**32, 2**30), ("wall_clock_s", 299.0, 200.0)],
)
def test_terms_beyond_a_hosts_ceiling_are_refused_before_it_stakes(world_of, field, value, ceiling):
    world = world_of(file_for(MODULE, **{field: value}), MODULE).through("publish")
    path = pinned_limits(world, MINERS[0], wall_clock_s=200.0)
    with pytest.raises(BadRecord) as refused:
        world.do("register", MINERS[0])
    assert str(refused.value) == (
        f"workload_limits.{field} = {value}: this host gives a module at most {ceiling}: "
        f"leave this task to others, or write a higher {field} into {path}"
    )
    assert world.contracts.stakes.available_stake(world.address(MINERS[0])) == 0
    pinned_limits(world, MINERS[0], **{field: value})
    world.do("register", MINERS[0])


def test_a_ceiling_that_was_lowered_holds_while_a_task_runs(world_of):
    world = world_of(file_for(MODULE), MODULE).through("deliver")
    pinned_limits(world, MINERS[0], fuel=1000)
    with pytest.raises(BadRecord, match="fuel = 20000000000: this host gives a module at most 1000"):
        world.do("train", MINERS[0])


def test_a_file_of_ceilings_that_is_wrong_is_named(world_of):
    world = world_of(file_for(MODULE), MODULE).through("publish")
    path = pinned_limits(world, MINERS[0], fuel="many")
    with pytest.raises(ValueError, match=f"{path}: fuel = 'many': expected a positive integer"):
        world.do("register", MINERS[0])


def test_neither_compiling_nor_running_takes_longer_than_a_contribution(tmp_path):
    me, spec = Identity(home=str(tmp_path)), file_for(MODULE, wall_clock_s=500.0).spec()
    assert spec.rounds.contribution_timeout_s == 300
    assert limits_of(spec, me).wall_clock_s == 300
    assert limits_of(spec, me).compile_s == CEILINGS.compile_s
    assert limits_of(short_rounds(MODULE, 7.0).spec(), me).compile_s == 7


def short_rounds(module: bytes, contribution_timeout_s: float, **limits: Any) -> TaskFile:
    fields = file_for(module, **limits).model_dump(mode="json")
    fields["rounds"]["contribution_timeout_s"] = contribution_timeout_s
    return TaskFile.model_validate(fields)


def test_a_module_with_all_the_fuel_ends_before_its_contribution_is_due(world_of):
    world = world_of(short_rounds(LOOPING, 1.0, fuel=10**12), LOOPING).through("deliver")
    with pytest.raises(ModuleFailed, match=r"wall clock: it ran for more than 0\.[0-9]+ s"):
        world.do("train", MINERS[0])


def test_terms_with_a_module_and_no_bytes_train_nothing():
    spec = file_for(MODULE).spec()
    with pytest.raises(ValueError, match="workload = wasm:"):
        local_round(spec, initial_model(spec), None, Memory.zero(31), 1, sample_order=1)  # type: ignore[arg-type]


def test_the_digest_and_the_limits_are_in_the_terms(world_of):
    world = world_of(file_for(MODULE), MODULE).through("publish")
    stored = next((world.folder / "store" / world.address("publisher").lower() / "records").rglob("*terms*"))
    spec = json.loads(stored.read_text())["spec"]
    assert spec["workload"] == world.file.workload
    assert spec["workload_limits"]["fuel"] == 20_000_000_000
