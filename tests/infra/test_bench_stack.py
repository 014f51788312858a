"""What the stack's benchmark computes from what it saw, and stacks whose miners share a worker."""

import os
from pathlib import Path

import pytest
from rich.console import Console

from blocks.tables import StepRow
from infra import bench_stack, stack_usage
from infra.bench_stack import Bench, phases, rounds_of, step_rows
from infra.devstack import ready_parts
from infra.rows import END, Row, marked, refreshed
from infra.stack_plan import SHARED_STEPS, Plan, open_plan, worker_program
from infra.stack_usage import Process, Table, Usage

STATES = [("Scheduled", 10.5), ("Pending", 11.0), ("Running", 11.25), ("Completed", 13.25)]


def step(name: str, round_number: int, started_s: float, seconds: float) -> StepRow:
    return StepRow(
        task_id="a-task",
        round_number=round_number,
        step=name,
        actor="miner-1",
        started_s=started_s,
        seconds=seconds,
        outcome="ok",
    )


def usage(at_s: float, seconds: dict[str, float], **tables: Table) -> Usage:
    return Usage(at_s, seconds, {("prefect", name): table for name, table in tables.items()})


def plan(miners: int, hosts: int) -> Plan:
    return Plan(Path("/stack"), {}, miners, "digits", "a", "b", "c", hosts)


# Times


def test_a_round_lasts_until_something_else_is_asked_for():
    first = [
        step("publish", 0, 0, 4),
        step("contribute", 1, 5, 9),
        step("contribute", 1, 6, 2),
        step("aggregate", 1, 15, 3),
    ]
    second = [step("contribute", 2, 18.5, 1), step("aggregate", 2, 20, 2), step("attest", 2, 22.25, 1)]
    assert rounds_of([*first, *second]) == [(5, 18.5), (18.5, 22.25)]


def test_a_round_that_was_not_aggregated_is_none():
    assert rounds_of([step("contribute", 1, 5, 9)]) == []
    assert rounds_of([step("contribute", 1, 5, 9), step("aggregate", 1, 15, 3)]) == [(5, 18)]


def test_the_phases_of_a_step_add_up():
    found = phases(10.0, STATES, 13.5)
    assert list(found.values()) == [0.5, 0.5, 0.25, 2.0, 0.25]
    assert found["the step"] == 2.0
    assert phases(10.0, [STATES[0], ("Late", 10.75), *STATES[1:]], 13.5) == found


@pytest.mark.parametrize(
    "states", [STATES[:3], [*STATES[:2], ("Scheduled", 11.1), *STATES[2:]], [*STATES[:3], ("Failed", 13.25)]]
)
def test_a_run_that_went_another_way_is_not_measured(states):
    with pytest.raises(ValueError, match="a run went through"):
        phases(10.0, states, 13.5)


def test_the_overhead_is_all_but_the_step_itself():
    rows = {
        row.name.removeprefix("a dispatched step on a warm host: "): row
        for row in step_rows([phases(10.0, STATES, 13.5)])
    }
    assert rows["overhead"].value == 1.5
    assert rows["overhead"].shortfall() is None
    assert rows["the step, begun to ended"].value == 2.0
    assert sum(row.value for name, row in rows.items() if name.startswith("of it")) == 1.5


# What was used


def test_what_a_part_started_is_counted_with_it_and_nothing_else():
    table = {1: Process(0, 1.0), 2: Process(1, 1.0), 3: Process(2, 1.0), 4: Process(1, 1.0), 5: Process(4, 1.0)}
    assert stack_usage.family(2, table) == {2, 3}
    assert stack_usage.family(1, table) == {1, 2, 3, 4, 5}
    assert stack_usage.family(9, table) == set()


def test_this_process_descends_from_its_parent_and_has_used_time():
    table = stack_usage.processes()
    assert os.getpid() in stack_usage.family(os.getppid(), table)
    assert table[os.getpid()].seconds > 0


def test_seconds_are_those_between_two_looks():
    first, last = usage(0, {"chain": 5.0, "store": 1.0}), usage(10, {"chain": 6.0, "store": 4.0, "PostgreSQL": 2.0})
    assert list(stack_usage.spent(first, last).items()) == [("store", 3.0), ("PostgreSQL", 2.0), ("chain", 1.0)]


def test_the_look_nearest_to_a_moment_is_taken():
    seen = [usage(at_s, {}) for at_s in (0.0, 2.0, 4.0)]
    assert [stack_usage.moment(seen, at_s).at_s for at_s in (-1, 0.9, 2.9, 3.1, 9)] == [0, 0, 2, 4, 4]


def test_tables_that_grew_are_named_the_largest_first():
    first = usage(0, {}, log=Table(5, 8192), flow=Table(1, 8192))
    last = usage(9, {}, log=Table(9, 16384), flow=Table(1, 8192), events=Table(3, 65536))
    growth = stack_usage.grown(first, last, "prefect")
    assert growth == {"events": Table(3, 65536), "log": Table(4, 8192)}
    assert list(growth) == ["events", "log"]
    assert stack_usage.in_all(growth.values()) == Table(7, 73728)
    assert stack_usage.grown(first, last, "healchain") == {}


def test_the_bottleneck_is_the_busiest_part_or_waiting():
    assert "store: 60%" in stack_usage.bottleneck({"store": 9.0, "chain": 6.0}, 10.0, 2)
    assert stack_usage.bottleneck({"store": 9.0, "chain": 6.0}, 10.0, 2).startswith("the processor, 75% of 2 cores")
    assert stack_usage.bottleneck({"store": 9.0}, 10.0, 2).startswith("waiting")


# The benchmark


def test_a_part_that_fails_is_told_and_the_others_still_run():
    console = Console(record=True, quiet=True)
    bench = Bench(console)

    def fails(_: object) -> list[Row]:
        raise bench_stack.PartFailed("the store is away")

    assert not bench.part("the first", fails)
    assert bench.part("the second", lambda _: [Row("a figure", 1.0, "s")])
    assert bench.failed == ["the first"]
    assert [row.name for row in bench.rows] == ["a figure"]
    assert "Could not be measured: the first" in bench_stack.report(bench)


def test_a_command_that_fails_is_told_with_what_it_printed():
    with pytest.raises(bench_stack.PartFailed, match="no such file, and no ready task"):
        bench_stack.healchain("check", "no-task")


def test_the_light_task_has_samples_for_a_hundred_miners():
    file = bench_stack.light_task(100)
    parts = ready_parts(file.dataset, 100, file.seed)
    assert len(parts) == 101
    assert min(len(part) for part in parts.values()) >= file.dataset.samples_min
    assert file.participants.miners_min == file.participants.miners_max == 100


def test_a_document_has_a_block_of_figures_for_each_benchmark():
    document = "\n".join(f"{marked(one)}\n\nold {one}\n\n{END}" for one in ("bench-crypto", "bench-stack"))
    written = refreshed(document, bench_stack.START, "new")
    assert "old bench-crypto" in written
    assert "old bench-stack" not in written
    assert written.endswith(f"{bench_stack.START}\n\nnew\n\n{END}")


def test_a_block_without_its_end_does_not_reach_into_the_next():
    with pytest.raises(ValueError, match="once each"):
        refreshed(f"{bench_stack.START}\n{marked('bench-crypto')}\n{END}", bench_stack.START, "new")


# Hosts


def test_every_miner_has_a_worker_of_its_own_unless_hosts_are_given():
    assert plan(2, 0).workers == {"publisher": ["publisher"], "miner-1": ["miner-1"], "miner-2": ["miner-2"]}
    assert "HEALCHAIN_HOME" not in worker_program(plan(2, 0), "miner-1", ["miner-1"]).environment


def test_miners_are_dealt_out_among_the_hosts():
    dealt = plan(5, 2).workers
    assert dealt == {
        "publisher": ["publisher"],
        "host-1": ["miner-1", "miner-3", "miner-5"],
        "host-2": ["miner-2", "miner-4"],
    }
    assert len(plan(2, 9).workers) == 3


def test_a_shared_worker_serves_the_queues_of_its_miners_from_the_folder_of_homes():
    program = worker_program(plan(5, 2), "host-2", ["miner-2", "miner-4"])
    queues = [
        value for flag, value in zip(program.command, program.command[1:], strict=False) if flag == "--work-queue"
    ]
    assert queues == ["miner-2", "miner-4"]
    assert program.command[program.command.index("--limit") + 1] == str(SHARED_STEPS)
    assert program.environment["HEALCHAIN_HOME"] == "/stack/actors"
    assert program.environment["PREFECT_HOME"] == "/stack/actors/miner-2/prefect"


def test_the_number_of_hosts_is_kept(tmp_path):
    assert open_plan(tmp_path, {}, 4, hosts=2).hosts == 2
    assert open_plan(tmp_path, {}, 4).hosts == 2
