"""Ask an actor to do its step: named actor in, signed record out. The only way from one actor to another.

`ask` and `ask_each` run the actor's flow, on the actor's own host through its work queue, or in this process, and then
read the record that it posted: from the store, under its agreed name, with its signature checked. Nothing that a
scheduler says is believed, and nothing large or secret passes through it. Whoever asks is the conductor of a task, its
publisher: its own steps run in its own process.

Errors: TaskAborted (the actor gave the task up, signed), NotYet (come back at a moment of chain time), StepFailed,
BadRecord, and whatever stopped a step in this process.
"""

import contextvars
import importlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from prefect import Flow, tags
from prefect.client.schemas.objects import StateType
from prefect.context import TagsContext
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from blocks import pools
from blocks.artifacts import MissingArtifact, sha256_hex
from blocks.chain import NotYet
from blocks.connections import connections_of
from blocks.pools import StepRun
from blocks.registry import Registry
from blocks.tables import ActorRow
from contracts import messages
from contracts.bindings import Status
from contracts.messages import Abort, AbortReason, Message, TaskId
from contracts.sending import FeesTooHigh
from contracts.task_spec import TaskSpec
from tasks import show
from tasks.conductors import hold, next_in_series
from tasks.index import ENDED, catch_up, declare_over, refuse, remember
from tasks.records import RecordRef, Station, check_record, record_path, station

POLL_S = 0.3
OVERDUE_POLL_S = 20.0  # how often a long wait asks the chain whether the task can still end well
SOON_S = 30.0  # a run that begins later than this is waited for by coming back, not by standing by
IN_VAIN = frozenset({StateType.FAILED, StateType.CRASHED, StateType.CANCELLED})
# Runs of one step that ended in vain, under this conductor, retried, or earlier ones. Each of them begins one more: a step
# that failed whenever it was retried can still be asked for when its cause is mended.
ATTEMPTS = 200


class TaskAborted(RuntimeError):
    """The task ends without a block: an actor gave it up, or its rounds are used up."""


class StepFailed(RuntimeError):
    """A step on another host ended without an answer; the message is what its host said of it."""


class NotSettled(RuntimeError):
    """All steps were asked, and the task's money is still locked: the publisher's own last step did not come through."""


MENDED_BY_WAITING = (OSError, pools.PoolsUnavailable, StepFailed, NotSettled, FeesTooHigh)
"""What a conductor is begun again for, a little later. OSError: node, store, registry and disk."""


@dataclass(frozen=True)
class Step:
    """One step of the protocol: its module (M1..M7), the flow that does it, and the record that answers it.

    about: what the record's name adds to its kind: of receipts, the step that they are for.
    """

    module: str
    entrypoint: str
    answer: type[Message]
    about: str | None = None

    @property
    def pool(self) -> str:
        """The work pool whose workers do it."""
        return POOLS[self.entrypoint.split(".")[1]]


POOLS = {"publisher": "publisher", "miner": "miners", "aggregator": "aggregators"}
"""Work pool by the module of flows whose steps it does."""

STEPS = {
    "publish": Step("M1", "flows.publisher.publish", messages.Announcement),
    "register": Step("M2", "flows.miner.register", messages.Registration),
    "challenge": Step("M2", "flows.publisher.challenge", messages.Receipt, "challenge"),
    "prove-dataset": Step("M2", "flows.miner.prove_dataset", messages.ChallengeAnswer),
    "form-cohort": Step("M2", "flows.publisher.form_cohort", messages.Cohort),
    "contribute": Step("M3", "flows.miner.contribute", messages.Submission),
    "collect": Step("M4", "flows.aggregator.collect", messages.Collection),
    "grant-audit": Step("M4", "flows.publisher.grant_audit", messages.AuditGrant),
    "audit": Step("M4", "flows.aggregator.audit", messages.KeyRequest),
    "derive-key": Step("M4", "flows.publisher.derive_key", messages.KeyGrant),
    "aggregate": Step("M4", "flows.aggregator.aggregate", messages.RoundResult),
    "open-validation": Step("M5", "flows.publisher.open_validation", messages.Receipt, "open-validation"),
    "attest": Step("M5", "flows.miner.attest", messages.Attestation),
    "publish-block": Step("M6", "flows.aggregator.publish_block", messages.Receipt, "publish-block"),
    "reveal-accuracy": Step("M7", "flows.publisher.reveal_accuracy", messages.Receipt, "reveal-accuracy"),
    "reveal-accuracy-instead": Step(
        "M7", "flows.aggregator.reveal_accuracy_instead", messages.Receipt, "reveal-accuracy"
    ),
    "reveal-score": Step("M7", "flows.miner.reveal_score", messages.Receipt, "reveal-score"),
    "withdraw": Step("M7", "flows.miner.withdraw", messages.Receipt, "withdraw"),
    "refund": Step("M7", "flows.publisher.refund", messages.Receipt, "refund"),
    "resign": Step("M7", "flows.aggregator.resign", messages.Receipt, "resign"),
    "compensation": Step("M7", "flows.miner.compensation", messages.Receipt, "compensation"),
}


@dataclass(frozen=True)
class StepEvent:
    """What a watcher of this process is told. kind: started, progress, ok, refused, failed, aborted or ended."""

    kind: str
    step: str
    actor: str
    task_id: str
    round_number: int
    seconds: float = 0.0
    detail: str = ""
    fraction: float = 0.0


@dataclass
class Watch:
    """Who is told of steps in this process (a terminal, a test that kills it)."""

    listeners: list[Callable[[StepEvent], None]] = field(default_factory=list)

    def tell(self, event: StepEvent) -> None:
        for listener in self.listeners:
            listener(event)


watch = Watch()
_current: contextvars.ContextVar[tuple[str, str, str, int] | None] = contextvars.ContextVar(
    "current_step", default=None
)


@dataclass(frozen=True)
class Conductor:
    """Who asks: the publisher of a task, with its index, and whether the others have hosts of their own."""

    name: str
    st: Station
    registry: Registry
    uses_pools: bool

    def is_here(self, actor: ActorRow) -> bool:
        """Whether the actor's step runs in this process."""
        return not self.uses_pools or actor.name == self.name


@dataclass(frozen=True)
class Asked:
    """One step asked of one actor."""

    actor: ActorRow
    step: str
    task_id: TaskId
    round_number: int
    references: dict[str, Any]

    @property
    def parameters(self) -> dict[str, Any]:
        return {
            "task_id": self.task_id,
            "round_number": self.round_number,
            "actor": self.actor.name,
            **self.references,
        }

    @property
    def flow(self) -> Flow[..., Any]:
        module, _, function = STEPS[self.step].entrypoint.rpartition(".")
        found: Flow[..., Any] = getattr(importlib.import_module(module), function)
        return found

    @property
    def run_name(self) -> str:
        """What the flow will call its run when it begins, from the moment when it is asked for."""
        return str(self.flow.flow_run_name).format(**self.parameters)

    @property
    def tags(self) -> list[str]:
        where = [f"round:{self.round_number}"] if self.round_number else []
        return [f"task:{self.task_id}", *where, f"actor:{self.actor.name}", STEPS[self.step].module]


_conductor: contextvars.ContextVar[Conductor] = contextvars.ContextVar("conductor")


def conduct(publisher: str, task_id: str, spec: TaskSpec, *, follow_on: bool = False) -> tuple[TaskId, TaskSpec]:
    """Ask from here on as this publisher; return the task's id and its terms. A run that was given no id makes one from its own.

    follow_on: an unfinished task of this name whose conductor is gone, or the next one, from the last published model. No id
    while another run conducts the task, or with follow_on one of its name.
    """
    st = station(publisher)
    pinned = connections_of(st.me)
    if pinned.registry is None:
        raise ValueError(f"{publisher} has no registry in its connections: only a publisher conducts a task")
    _conductor.set(Conductor(publisher, st, pinned.registry, pinned.uses_pools))
    run_id, reason = str(flow_run.get_id()), ""
    task_id = task_id or _task_of_this_run(spec)
    if follow_on:
        with st.me.exclusively():
            task_id, spec, reason = next_in_series(st, pinned.registry, run_id, task_id, spec)
    elif pinned.uses_pools:  # otherwise one process is all of the task
        with st.me.exclusively():
            reason = hold(st.me, task_id, run_id)
    if reason:
        get_run_logger().warning("skipped: %s", reason)
        return "", spec
    show.tag_run(task_id, f"task:{task_id}", f"actor:{publisher}")
    return task_id, spec


def run_name() -> str:
    """How a run of the protocol is called: by its task."""
    given = flow_run.get_parameters()
    return str(given.get("task_id") or _task_of_this_run(given["spec"]))


def _task_of_this_run(spec: TaskSpec) -> TaskId:
    return f"{spec.name}-{str(flow_run.get_id()).replace('-', '')[-12:]}"


def ask(actor: str, step: str, *, task_id: str, round_number: int = 0, **references: Any) -> Any:
    """Run one actor's step and return its signed record. `actor`: its name or address."""
    me = _conductor.get()
    asked = Asked(me.registry.find_actor(actor), step, task_id, round_number, references)
    try:
        if me.is_here(asked.actor):
            return _run(me, asked)
        started_s = time.time()
        run = _wait({actor: _started(me, asked, IN_VAIN)}, _until_overdue(me, task_id))[actor]
        return _answer(me, asked, run, started_s)
    except TaskAborted:
        raise
    except Exception as error:
        error.add_note(f"task {task_id}, round {round_number}, step {step} of {asked.actor.name}")
        raise
    finally:
        show.tell(me.registry, step, task_id, round_number)


def ask_each(
    actors: Sequence[str], step: str, *, task_id: str, timeout_s: float, round_number: int = 0, **references: Any
) -> list[Any]:
    """Run the step of several actors; return the records of those who did it within `timeout_s`.

    One that fails, or does not answer in time, is refused with the reason, and the others go on: whether enough are
    left is for the next step to judge. On their own hosts all work at once. Raises NotYet, when all others are done,
    for those that have to wait for a later moment of chain time.
    """
    me = _conductor.get()
    asked = [Asked(me.registry.find_actor(one), step, task_id, round_number, references) for one in actors]
    here = [one for one in asked if me.is_here(one.actor)]
    answers = _ask_far(me, [one for one in asked if one not in here], timeout_s)
    later = []
    for one in here:
        thread = _Answer(me, one)
        thread.start()
        thread.join(timeout_s)
        if thread.is_alive():
            _go_on_without(me, one, timeout_s)
        elif isinstance(thread.error, NotYet):
            later.append(thread.error)
        elif thread.error is not None:
            _refuse(me, one, _reason(thread.error))
        else:
            answers[one.actor.name] = thread.record
    later += [one for one in answers.values() if isinstance(one, NotYet)]
    show.tell(me.registry, step, task_id, round_number)
    if later:
        raise min(later, key=lambda one: one.moment_s)
    return [answers[one.actor.name] for one in asked if one.actor.name in answers]


def _ask_far(me: Conductor, asked: Sequence[Asked], timeout_s: float) -> dict[str, Any]:
    """Answers by actor of those with hosts of their own; a NotYet for one whose run begins again later."""
    started_s = time.time()
    # Whoever was refused for silence stays refused, should this conductor be a later one.
    taken = {one.actor.name: _started(me, one, IN_VAIN - {StateType.CANCELLED}) for one in asked}
    ends = time.monotonic() + timeout_s
    runs = _wait(taken, lambda: time.monotonic() > ends)
    answers: dict[str, Any] = {}
    for one in asked:
        run = runs[one.actor.name]
        try:
            if not run.has_ended and run.due_in_s <= SOON_S:
                pools.take_back(run, _go_on_without(me, one, timeout_s))
            else:
                answers[one.actor.name] = _answer(me, one, run, started_s)
        except NotYet as wait:
            answers[one.actor.name] = wait
        except (TaskAborted, StepFailed, ValueError, LookupError) as error:
            _refuse(me, one, _reason(error))
    return answers


def _started(me: Conductor, asked: Asked, in_vain: Set[StateType]) -> StepRun:
    """The run of a step on its actor's host. What an earlier conductor began is taken up, what ended in vain is begun anew."""
    step = STEPS[asked.step]
    watch.tell(StepEvent("started", asked.step, asked.actor.name, asked.task_id, asked.round_number))
    for attempt in range(ATTEMPTS):
        run = pools.start(
            f"{asked.step}/{step.pool}",
            asked.actor.name,
            asked.parameters,
            key=f"{me.st.address}/{asked.task_id}/{asked.round_number}/{asked.step}/{asked.actor.name}/{attempt}",
            name=asked.run_name,
            tags=asked.tags,
        )
        if run.kind not in in_vain:
            break
    return run


def _wait(runs: dict[str, StepRun], is_over: Callable[[], bool]) -> dict[str, StepRun]:
    """The runs when all have ended, or begin again much later, or `is_over`."""
    while True:
        seen = pools.look(run.id for run in runs.values())
        runs = {actor: seen.get(run.id, run) for actor, run in runs.items()}
        open_ones = [run for run in runs.values() if not run.has_ended and run.due_in_s <= SOON_S]
        if not open_ones or is_over():
            return runs
        time.sleep(POLL_S)


def _until_overdue(me: Conductor, task_id: str) -> Callable[[], bool]:
    """A wait for one actor that nobody can replace: it ends when the task cannot end well any more. Raises TaskAborted."""
    asked_s = time.monotonic()

    def is_over() -> bool:
        nonlocal asked_s
        if time.monotonic() - asked_s > OVERDUE_POLL_S:
            asked_s = time.monotonic()
            if _is_overdue(me, task_id):
                raise TaskAborted(f"{AbortReason.DEADLINE_PASSED}: no answer before the task's deadline")
        return False

    return is_over


def _answer(me: Conductor, asked: Asked, run: StepRun, started_s: float) -> Message:
    """The record that a run on another host has posted. Raises StepFailed, NotYet, BadRecord, TaskAborted."""
    outcome, detail = "failed", ""
    try:
        if not run.has_ended:
            raise NotYet(f"{asked.step} of {asked.actor.name}", me.st.chain.now_s() + int(run.due_in_s))
        if not run.is_done:
            raise StepFailed(f"{run.state}: {run.message[:300]}")
        record = _read_answer(me, asked)
        outcome, detail = ("aborted", record.reason) if isinstance(record, Abort) else ("ok", _headline(record))
    except Exception as error:
        detail = _reason(error)
        raise
    finally:
        _note(me, asked, started_s, run.ended_s or time.time(), outcome, detail)
    if isinstance(record, Abort):
        raise TaskAborted(f"{record.reason}: {record.detail}")
    return record


class _Answer(threading.Thread):
    """One actor's step on a daemon thread: one that hangs does not keep the process alive."""

    def __init__(self, me: Conductor, asked: Asked) -> None:
        super().__init__(daemon=True, name=f"{asked.step} of {asked.actor.name}")
        self._me, self._asked = me, asked
        self._context = contextvars.copy_context()
        self.record: Any = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.record = self._context.run(_run, self._me, self._asked)
        except Exception as error:
            self.error = error


def _run(me: Conductor, asked: Asked) -> Message:
    """Run the flow in this process, then read the record that it posted, remember it and how long it took."""
    started_s = time.time()
    watch.tell(StepEvent("started", asked.step, asked.actor.name, asked.task_id, asked.round_number))
    token = _current.set((asked.step, asked.actor.name, asked.task_id, asked.round_number))
    outcome, detail = "failed", ""
    try:
        # The heartbeats of the run around it say that this process lives; its own would cost a second.
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}), tags(*asked.tags):
            _with_untagged_tasks(asked.flow)(**asked.parameters)
        record = _read_answer(me, asked)
        outcome, detail = ("aborted", record.reason) if isinstance(record, Abort) else ("ok", _headline(record))
    except Exception as error:
        detail = _reason(error)
        raise
    finally:
        _current.reset(token)
        _note(me, asked, started_s, time.time(), outcome, detail)
    if isinstance(record, Abort):
        raise TaskAborted(f"{record.reason}: {record.detail}")
    return record


def _with_untagged_tasks(flow: Flow[..., Any]) -> Flow[..., Any]:
    """The flow, whose tasks do not inherit its run's tags: for a tag, each would ask the server for a slot of its limit."""

    @wraps(flow.fn)
    def body(*args: Any, **options: Any) -> Any:
        with TagsContext(current_tags=set()):
            return flow.fn(*args, **options)

    tagged = copy(flow)
    tagged.fn = body
    return tagged


def _read_answer(me: Conductor, asked: Asked) -> Message:
    """The actor's record of this step, or its word that it gave the task up, checked and remembered."""
    step, address = STEPS[asked.step], asked.actor.address
    for kind, about in ((step.answer, step.about), (Abort, None)):
        path = record_path(kind, asked.task_id, asked.round_number, about)
        data = me.st.store.find(address, path)
        if data is not None:
            record, _ = check_record(kind, data, me.st.domain, address, asked.task_id, asked.round_number)
            reference = RecordRef(address, kind.__name__, path, sha256_hex(data)).as_json()
            remember(me.registry, me.st.chain, me.st.store, record, reference)
            return record
    raise MissingArtifact(f"{asked.actor.name} has ended step {asked.step}, but posted no {step.answer.__name__}")


def _note(me: Conductor, asked: Asked, started_s: float, ended_s: float, outcome: str, detail: str) -> None:
    """Tell how a step ended: to the index, the watchers, the run's log."""
    seconds = max(0.0, ended_s - started_s)
    me.registry.record_step(
        task_id=asked.task_id,
        round_number=asked.round_number,
        step=asked.step,
        actor=asked.actor.name,
        started_s=started_s,
        seconds=seconds,
        outcome=outcome,
        detail=detail,
    )
    watch.tell(StepEvent(outcome, asked.step, asked.actor.name, asked.task_id, asked.round_number, seconds, detail))
    where = f"round {asked.round_number}, " if asked.round_number else ""
    module, name = STEPS[asked.step].module, asked.actor.name
    get_run_logger().info("%s %s: %s, %s%s, %.1f s. %s", module, asked.step, name, where, outcome, seconds, detail)


def _refuse(me: Conductor, asked: Asked, reason: str) -> None:
    """Go on without an actor, and say so."""
    refuse(me.st, me.registry, asked.task_id, asked.round_number, asked.step, asked.actor.address, reason)


def _go_on_without(me: Conductor, asked: Asked, timeout_s: float) -> str:
    """Refuse one that did not answer in time; the reason."""
    late = f"no answer within {timeout_s:g} s"
    _refuse(me, asked, late)
    watch.tell(StepEvent("refused", asked.step, asked.actor.name, asked.task_id, asked.round_number, timeout_s, late))
    return late


def report_progress(fraction: float, what: str) -> None:
    """Tell the watchers and the Prefect UI how far the current step is; 0 <= fraction <= 1."""
    show.show_progress(fraction, what)
    current = _current.get()
    if current is not None:
        step, name, task_id, number = current
        watch.tell(StepEvent("progress", step, name, task_id, number, 0.0, what, fraction))


@contextmanager
def task_states(task_id: str) -> Iterator[None]:
    """An abort ends here; so does any failure after the deadline, which the publisher then says, signed."""
    try:
        yield
    except TaskAborted as aborted:
        get_run_logger().warning("task %s: %s", task_id, aborted)
    except Exception as error:
        # Whatever went wrong, after the deadline no block can come any more: what is left is the refund.
        me = _conductor.get()
        if isinstance(error, NotYet) or not _is_overdue(me, task_id):
            raise
        declare_over(me.st, me.registry, task_id, AbortReason.DEADLINE_PASSED, _reason(error))


def _is_overdue(me: Conductor, task_id: str) -> bool:
    """Whether the task's reward is still locked after its deadline, and this publisher's."""
    on_chain = me.st.chain.contracts().escrow.get_task(task_id)
    is_locked = on_chain.status is Status.LOCKED and on_chain.publisher == me.st.address
    return is_locked and me.st.chain.now_s() > on_chain.terms.deadline_s


def give_up_after(task_id: str, rounds: int) -> None:
    """End a task whose rounds are used up, in its publisher's name. Raises TaskAborted."""
    me, detail = _conductor.get(), f"task {task_id} had {rounds}"
    declare_over(me.st, me.registry, task_id, AbortReason.MAX_ROUNDS, detail)
    raise TaskAborted(f"{AbortReason.MAX_ROUNDS}: {detail}")


def reachable(role: str) -> list[str]:
    """Names of the actors with this role that can be asked; those of a pool are the ones with a queue in it."""
    me = _conductor.get()
    if me.uses_pools:
        for queue in pools.queues(POOLS[role]):
            if not queue.is_paused and queue.address:
                me.registry.record_actor(queue.actor, queue.address, role)
    return [row.name for row in me.registry.actors(role)]


def conclude(task_id: str) -> str:
    """Where the task stands by chain and signed records: PAID, REFUNDED, PUBLISHED or REFUNDABLE; FAILED when there is none.

    Raises NotSettled, where actors have hosts of their own, for a task that is neither paid nor refunded.
    """
    me = _conductor.get()
    status = catch_up(me.registry, me.st.chain, me.st.store, task_id) or "FAILED"
    show.tell(me.registry, "run-task", task_id, 0)
    if me.uses_pools and status not in ENDED:
        raise NotSettled(
            f"task {task_id} is {status}, neither PAID nor REFUNDED: the refused steps of {me.name} say why"
        )
    return status


def _headline(record: Message) -> str:
    total = getattr(record, "total", 0)
    if total:
        return f"{getattr(record, 'correct', 0)} of {total} correct"
    accepted = getattr(record, "accepted", None)
    if accepted is not None:
        return "valid" if accepted else f"invalid: {getattr(record, 'reason', '')}"
    return ""


def _reason(error: Exception) -> str:
    if isinstance(error, NotYet | TaskAborted):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
