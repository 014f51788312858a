"""Which run conducts a task, and which task of a series is the latest: decided in the publisher's home, one at a time.

    private/<task>/spec.json          the public terms, for whoever conducts the task later
    private/<task>/conductors/<n>     the id of the run that conducted it as the nth; the last one conducts it
    private/series/<name>/<n>         the nth task that a schedule began; the last one holds the series

Each is written before anything is done on it. A conductor lives while its run is open on the server (at work, waiting, paused,
to be begun again), or while its process is: a run may be deleted or cancelled under a process that goes on.

Errors: StillConducted, LookupError, those of blocks.pools and of the chain.
"""

import fcntl
import json
from pathlib import Path
from typing import TextIO
from uuid import UUID

from blocks import pools
from blocks.identity import Identity
from blocks.registry import Registry
from blocks.tables import TaskRow
from contracts.bindings import Status
from contracts.messages import TaskId
from contracts.task_spec import Start, TaskSpec
from tasks.index import ENDED, catch_up, follow_chain
from tasks.records import Station

_held: dict[Path, TextIO] = {}
"""Locks of the tasks that this process conducts, until it ends."""


class StillConducted(BlockingIOError):
    """An earlier process of this run is at work on the task: come back."""


def keep_terms(me: Identity, task_id: TaskId, spec: TaskSpec) -> TaskSpec:
    """The terms that were first kept for this task: these, or earlier ones."""
    return TaskSpec.model_validate_json(me.claim(f"{task_id}/spec.json", spec.model_dump_json().encode()))


def terms_of(me: Identity, registry: Registry, task_id: TaskId) -> TaskSpec:
    """The terms of a task that was begun earlier: as kept in the home, or as published. Raises LookupError."""
    kept, row = me.read_private(f"{task_id}/spec.json"), registry.find_task(task_id)
    if kept is not None:
        return TaskSpec.model_validate_json(kept)
    if row is None or not row.terms:
        raise LookupError(f"task {task_id!r}: its terms are not in {me.home}: name a task of this publisher")
    return TaskSpec.model_validate(json.loads(row.terms)["spec"])


def who_conducts(me: Identity, task_id: TaskId, run_id: str = "") -> str:
    """Why the task has a conductor beside this run, in a sentence; an empty string when it has none."""
    _, holder = _last(me, f"{task_id}/conductors")
    if holder in ("", run_id):
        return ""
    found = pools.look([UUID(holder)]).get(UUID(holder))
    if found is not None and not found.has_ended:
        return f"task {task_id} is conducted by run {holder}, which is {found.state}"
    if (lock := _try_lock(me, task_id)) is None:
        return f"task {task_id} is conducted by run {holder}, whose process is at work though the run has ended"
    lock.close()
    return ""


def hold(me: Identity, task_id: TaskId, run_id: str) -> str:
    """Make a run the conductor of a task, inside `me.exclusively()`. Why it cannot be, or an empty string.

    Raises StillConducted while an earlier process of the same run has not ended.
    """
    if reason := who_conducts(me, task_id, run_id):
        return reason
    path = _lock_path(me, task_id)
    if path not in _held:
        if (lock := _try_lock(me, task_id)) is None:
            raise StillConducted(f"an earlier process of run {run_id} is at work on task {task_id}")
        _held[path] = lock
    _append(me, f"{task_id}/conductors", run_id)
    return ""


def next_in_series(
    st: Station, registry: Registry, run_id: str, task_id: TaskId, spec: TaskSpec
) -> tuple[TaskId, TaskSpec, str]:
    """What a scheduled run conducts, and its terms, inside `me.exclusively()`; or no task, and the reason.

    An unfinished task of this name whose conductor is gone comes first, to its end. Otherwise `task_id` begins, from the
    last published model, and holds the series.
    """
    follow_chain(registry, st.chain)
    _, latest = _last(st.me, f"series/{spec.name}")
    open_ones = [row.task_id for row in registry.tasks() if _is_open(st, registry, row, spec.name)]
    for other in dict.fromkeys([*open_ones, *filter(None, [latest])]):
        if other == task_id:
            continue
        if reason := who_conducts(st.me, other, run_id):
            return "", spec, reason
        if not _is_over(st, registry, other):
            return other, terms_of(st.me, registry, other), hold(st.me, other, run_id)
    _append(st.me, f"series/{spec.name}", task_id)
    # Decided once: a conductor that takes over must come to the same terms.
    spec = keep_terms(st.me, task_id, _from_last_model(registry, task_id, spec))
    return task_id, spec, hold(st.me, task_id, run_id)


def _is_open(st: Station, registry: Registry, row: TaskRow, name: str) -> bool:
    """Whether a task is this publisher's, of this name, and not known to be over."""
    if row.publisher != st.address or row.status in ENDED:
        return False
    try:
        return terms_of(st.me, registry, row.task_id).name == name
    except LookupError:  # locked from another home, and never announced
        return False


def _is_over(st: Station, registry: Registry, task_id: TaskId) -> bool:
    """Whether nothing of a task without a conductor is left to do. What its account had sent is brought to its end first."""
    status = st.chain.contracts(st.me).escrow.get_task(task_id).status
    if status is Status.NONE:  # nothing was locked: there is no task
        return True
    return catch_up(registry, st.chain, st.store, task_id) in ENDED


def _from_last_model(registry: Registry, task_id: TaskId, spec: TaskSpec) -> TaskSpec:
    """The terms with the last published model of the tasks of this name as their start."""
    series = [row for row in registry.tasks() if row.task_id != task_id and row.terms]
    named = [row for row in series if json.loads(row.terms)["spec"]["name"] == spec.name]
    last = [one for row in named for one in registry.versions(row.task_id) if one.is_published][-1:]
    if not last:
        return spec
    start = Start(uri=last[0].uri, sha256=last[0].sha256)
    return spec.model_copy(update={"model": spec.model.model_copy(update={"start": start})})


def _last(me: Identity, folder: str) -> tuple[int, str]:
    """How many claims there are in a folder, and the last one's text; empty when there is none."""
    count, last = 0, ""
    while (found := me.read_private(f"{folder}/{count}")) is not None:
        count, last = count + 1, found.decode()
    return count, last


def _append(me: Identity, folder: str, text: str) -> None:
    """Claim the next place, unless the last one says the same."""
    count, last = _last(me, folder)
    if last != text:
        me.claim(f"{folder}/{count}", text.encode())


def _lock_path(me: Identity, task_id: TaskId) -> Path:
    return Path(me.home) / "private" / task_id / "conductor.lock"


def _try_lock(me: Identity, task_id: TaskId) -> TextIO | None:
    """The lock of a task's conducting process, or None while another process has it. A kill gives it back."""
    path = _lock_path(me, task_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path in _held:
        return path.open("a")  # this process has it
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
