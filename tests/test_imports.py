"""Arrows between the rooms of the house point down: what a module may import, read from the sources, not by running them."""

import ast
import importlib
import sys
from pathlib import Path

import pytest
from prefect import Flow

from tasks.dispatch import STEPS

ROOT = Path(__file__).parent.parent
ROOMS = ("flows", "tasks", "blocks", "contracts", "deployments", "infra")

# A room, and the rooms below that its modules may import. The room of a module is the longest name here that it begins
# with; `tasks` alone is the step modules. A module may always import its own room. Flows are asked by dotted name.
MAY_IMPORT = {
    "contracts.messages": (),
    "contracts.task_spec": ("contracts.messages",),
    "contracts.journal": ("contracts.messages",),
    "contracts.node": (),
    "contracts.sending": ("contracts.messages", "contracts.journal", "contracts.node"),
    "contracts.contributions": ("contracts.messages",),
    "contracts.bindings": ("contracts.messages", "contracts.contributions", "contracts.sending"),
    "contracts": (),
    "tasks.crypto": (),
    "tasks.learning": (),
    "tasks.edge.names": (),
    "tasks.edge.seal": (),
    "tasks.edge.wire": ("tasks.edge.names", "tasks.learning"),
    "tasks.edge.rounds": ("tasks.edge.names", "tasks.edge.wire", "tasks.learning"),
    "tasks.edge.combiner": ("tasks.edge.wire", "tasks.learning"),
    "blocks": ("contracts", "tasks.crypto", "tasks.learning"),
    "tasks": (
        "blocks",
        "contracts",
        "tasks.crypto",
        "tasks.learning",
        "tasks.edge.names",
        "tasks.edge.seal",
        "tasks.edge.wire",
        "tasks.edge.rounds",
        "tasks.edge.combiner",
    ),
    "flows": ("tasks", "contracts.messages", "contracts.task_spec"),
    "deployments": ("blocks",),
    "infra": (
        "deployments",
        "tasks",
        "blocks",
        "contracts",
        "tasks.crypto",
        "tasks.learning",
        "tasks.edge.names",
        "tasks.edge.seal",
        "tasks.edge.wire",
        "tasks.edge.rounds",
        "tasks.edge.combiner",
    ),
    # The two that start flows: all of a task in this process, and a step on its actor's host.
    "infra.cli": ("infra", "flows", "tasks", "blocks", "contracts"),
    "infra.step_process": ("infra", "flows", "tasks", "blocks"),
    "infra.step_warmth": ("infra.step_process", "tasks.crypto"),
}
PURE = (
    "contracts.messages",
    "contracts.contributions",
    "contracts.task_spec",
    "tasks.crypto",
    "tasks.learning",
    "tasks.edge.names",
    "tasks.edge.seal",
    "tasks.edge.wire",
    "tasks.edge.rounds",
)
# Read once, at import: which kernels run. That is a matter of the machine; the bits they make are the same.
READS_THE_ENVIRONMENT = {"tasks.crypto.backend": ["os.environ"]}
IMPURE = {
    "prefect",
    "os",
    "time",
    "random",
    "secrets",
    "logging",
    "pathlib",
    "datetime",
    "uuid",
    "socket",
    "subprocess",
}


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            if "node_modules" not in path.parts:
                found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def is_within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def room_of(module: str) -> str:
    return max((room for room in MAY_IMPORT if is_within(module, room)), key=len)


def imports(source: str, module: str) -> set[str]:
    """Dotted names that a module imports anywhere in it: ours as modules, strangers by their first part."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from tasks import settle` names a module, `from tasks.settle import open_score` a thing in one.
            names.update(full if (full := f"{base}.{alias.name}") in MODULES else base for alias in node.names)
    return {name if name.split(".")[0] in ROOMS else name.split(".")[0] for name in names}


def arrows_up(module: str, imported: set[str]) -> list[str]:
    """The imports of one module that the table does not allow."""
    room = room_of(module)
    return [
        f"{module} imports {name}"
        for name in sorted(imported)
        if name.split(".")[0] in ROOMS and room_of(name) != room and room_of(name) not in allowed_rooms(room)
    ]


def allowed_rooms(room: str) -> set[str]:
    """A room that is allowed by name is allowed with its rooms, but `tasks` means the step modules alone."""
    allowed = set(MAY_IMPORT[room])
    if "contracts" in allowed:
        allowed |= {name for name in MAY_IMPORT if is_within(name, "contracts")}
    return allowed


def impurities(module: str, imported: set[str]) -> list[str]:
    is_pure = any(is_within(module, room) for room in PURE)
    allowed = {"os"} if module in READS_THE_ENVIRONMENT else set()
    return [f"{module} imports {name}" for name in sorted(imported & IMPURE - allowed)] if is_pure else []


@pytest.mark.parametrize("module", MODULES)
def test_no_arrow_points_up(module):
    assert arrows_up(module, imports(MODULES[module].read_text(), module)) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("tasks.settle", "from flows.miner import withdraw"),
        ("tasks.settle", "from infra import facts"),
        ("tasks.crypto.merkle", "from tasks.records import station"),
        ("tasks.crypto.merkle", "from tasks import records"),
        ("tasks.crypto.merkle", "from ..records import station"),
        ("tasks.learning.models", "def late():\n    import blocks.chain"),
        ("tasks.learning.models", "from tasks.crypto import field"),
        ("blocks.chain", "from tasks.dispatch import STEPS"),
        ("blocks.chain", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from flows import miner"),
        ("contracts.messages", "from contracts.task_spec import TaskSpec"),
        ("contracts.messages", "from contracts import bindings"),
        ("flows.miner", "from blocks.chain import Chain"),
        ("flows.miner", "from tasks.crypto import ecies"),
        ("deployments.register", "from tasks.records import station"),
        ("infra.facts", "from flows.protocol import run_task"),
    ],
)
def test_an_arrow_that_points_up_is_seen(module, line):
    assert len(arrows_up(module, imports(line, module))) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("flows.miner", "from tasks import settle"),
        ("tasks.settle", "from tasks.crypto import ecies"),
        ("tasks.settle", "from contracts.bindings import Status"),
        ("blocks.chain", "from contracts import bindings"),
        ("infra.cli", "from flows.protocol import run_task"),
        ("tasks.crypto.bsgs", "from tasks.crypto import field"),
    ],
)
def test_an_arrow_that_points_down_is_allowed(module, line):
    assert arrows_up(module, imports(line, module)) == []


@pytest.mark.parametrize("module", [name for name in MODULES if any(is_within(name, room) for room in PURE)])
def test_pure_modules_reach_for_nothing_outside(module):
    source = MODULES[module].read_text()
    assert impurities(module, imports(source, module)) == []
    unseeded = [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("default_rng") and not node.args
    ]
    assert unseeded == []


@pytest.mark.parametrize(
    "line", ["import os", "from os import environ", "import time as t", "from prefect import task"]
)
def test_an_impure_import_is_seen(line):
    assert len(impurities("tasks.crypto.curve", imports(line, "tasks.crypto.curve"))) == 1
    assert impurities("tasks.settle", imports(line, "tasks.settle")) == []


@pytest.mark.parametrize(
    "module", [name for name in MODULES if room_of(name).split(".")[0] not in ("deployments", "infra")]
)
def test_the_environment_is_read_at_the_rim_only(module):
    read = [node for node in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(node, ast.Attribute)]
    found = [ast.unparse(node) for node in read if node.attr in ("environ", "getenv", "environb")]
    assert found == READS_THE_ENVIRONMENT.get(module, [])


def test_the_tasks_package_is_empty():
    """So that tasks.crypto runs where there is no Prefect."""
    assert (ROOT / "tasks" / "__init__.py").read_text() == ""


def test_no_module_is_named_like_a_standard_one():
    """Prefect can put a flow's folder first on sys.path."""
    names = {path.stem for path in MODULES.values()} - {"__init__"}
    assert names & (sys.stdlib_module_names | {"prefect", "numpy", "torch"}) == set()
    assert "select" in sys.stdlib_module_names


@pytest.mark.parametrize("step", STEPS)
def test_every_step_is_a_flow_of_its_name(step):
    module, _, function = STEPS[step].entrypoint.rpartition(".")
    flow = getattr(importlib.import_module(module), function)
    assert isinstance(flow, Flow)
    assert flow.name == step
    assert flow.persist_result is False
    assert {"task_id", "round_number", "actor"} <= set(flow.parameters.properties)


def test_every_flow_is_a_step_but_those_that_order_them():
    named = set()
    for module in (name for name in MODULES if is_within(name, "flows")):
        found = vars(importlib.import_module(module)).items()
        named |= {f"{module}.{name}" for name, value in found if isinstance(value, Flow)}
    of_edge = {f"flows.edge.{name}" for name in ("run_experiment", "retry_round", "ask_on_schedule")}
    ordering = {"flows.protocol.run_task", *of_edge}
    assert named - {step.entrypoint for step in STEPS.values()} == ordering
