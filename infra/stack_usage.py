"""What a running stack uses: processor time by part, memory, rows and bytes of its databases.

part       a program of the stack with everything that it started; the workers of all miners are one part
seconds    of processor time, user and system; what has ended counts, as soon as its parent has waited for it
rows       inserted and not deleted, by PostgreSQL's statistics, which are behind by up to a second
"""

import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from infra import postgres, supervision
from infra.stack_plan import DATABASES, Plan

TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
EVERY_S = 2.0
PARTS = {
    "prefect": "Prefect server",
    "postgres": "PostgreSQL",
    "store": "store",
    "chain": "chain",
    "worker-publisher": "publisher's worker",
}
MINERS = "miners' workers"
TABLES = """
SELECT relname, n_tup_ins - n_tup_del, pg_total_relation_size(relid) FROM pg_stat_user_tables
"""


@dataclass(frozen=True)
class Process:
    """A process of this machine. seconds: its own, and those of the children that it has waited for."""

    parent: int
    seconds: float


@dataclass(frozen=True)
class Table:
    """What a table holds; bytes with its indexes."""

    rows: int
    size: int


@dataclass(frozen=True)
class Usage:
    """A stack at one moment. at_s: Unix seconds; seconds: by part; tables: by database and name."""

    at_s: float
    seconds: Mapping[str, float]
    tables: Mapping[tuple[str, str], Table]


class Watch(threading.Thread):
    """Looks at a stack every EVERY_S while it is entered."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(daemon=True, name="usage of a stack")
        self._plan, self._ended = plan, threading.Event()
        self.seen: list[Usage] = []

    def run(self) -> None:
        while not self._ended.is_set():
            self.seen.append(look(self._plan))
            self._ended.wait(EVERY_S)

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()
        self.seen.append(look(self._plan))


def look(plan: Plan) -> Usage:
    table = processes()
    seconds: defaultdict[str, float] = defaultdict(float)
    for one in supervision.statuses(plan.folder):
        seconds[PARTS.get(one.name, MINERS)] += sum(table[pid].seconds for pid in family(one.pid, table))
    return Usage(time.time(), dict(seconds), tables(plan))


def processes() -> dict[int, Process]:
    """Every process of this machine, by pid."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended while it was looked at
            # After the name, which may hold anything: state, parent, ..., utime, stime, cutime, cstime (proc(5)).
            fields = stat.read_text().rpartition(")")[2].split()
            found[int(stat.parent.name)] = Process(int(fields[1]), sum(map(int, fields[11:15])) / TICKS_A_SECOND)
    return found


def family(root: int, table: Mapping[int, Process]) -> set[int]:
    """A process and all that descend from it; none where it does not run."""
    found, fresh = set(), {root} & table.keys()
    while fresh:
        found |= fresh
        fresh = {pid for pid, one in table.items() if one.parent in fresh} - found
    return found


def memory_mib(plan: Plan, program: str) -> float:
    """Memory of a program and all that it started; pages that several share count once, in equal parts (PSS)."""
    root = next(one.pid for one in supervision.statuses(plan.folder) if one.name == program)
    total_kib = 0
    for pid in family(root, processes()):
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total_kib += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total_kib / 1024


def tables(plan: Plan) -> dict[tuple[str, str], Table]:
    found = {}
    for database in DATABASES:
        with postgres.connect(plan.ports["postgres"], plan.postgres_password, database) as connection:
            for name, rows, size in connection.execute(TABLES):
                found[database, str(name)] = Table(int(str(rows)), int(str(size)))
    return found


def moment(seen: Sequence[Usage], at_s: float) -> Usage:
    """The look that was nearest to a moment. Raises ValueError when there was none."""
    return min(seen, key=lambda one: abs(one.at_s - at_s))


def spent(first: Usage, last: Usage) -> dict[str, float]:
    """Processor seconds of each part between two looks, the busiest first."""
    between = {part: last.seconds[part] - first.seconds.get(part, 0.0) for part in last.seconds}
    return dict(sorted(between.items(), key=lambda item: -item[1]))


def grown(first: Usage, last: Usage, database: str) -> dict[str, Table]:
    """What each table of a database grew by between two looks, the most bytes first; only those that did."""
    nothing = Table(0, 0)
    by_name = {}
    for (where, name), now in last.tables.items():
        before = first.tables.get((where, name), nothing)
        if where == database and now != before:
            by_name[name] = Table(now.rows - before.rows, now.size - before.size)
    return dict(sorted(by_name.items(), key=lambda item: -item[1].size))


def in_all(growth: Iterable[Table]) -> Table:
    each = list(growth)
    return Table(sum(one.rows for one in each), sum(one.size for one in each))


def bottleneck(seconds: Mapping[str, float], elapsed_s: float, cores: int) -> str:
    """What a stretch of time was spent on: the part that used most, or waiting when half of the processor was idle."""
    busy = sum(seconds.values()) / (elapsed_s * cores)
    if busy < 0.5:
        return f"waiting: the stack used {busy:.0%} of {cores} cores"
    part = max(seconds, key=lambda name: seconds[name])
    return f"the processor, {busy:.0%} of {cores} cores, most of it the {part}: {seconds[part] / sum(seconds.values()):.0%}"
