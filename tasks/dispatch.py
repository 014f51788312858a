"""Ask an actor to do its step: named actor in, signed record out. The only way from one actor to another.

`ask` and `ask_each` run the actor's flow and take back the reference of the record it posted; the record is fetched from
the store, its signature is checked, and it is remembered in the registry. References and scalars go in, a reference
comes out: nothing large or secret passes through the scheduler. Here the actors take turns in this process, each step
on a thread of its own, so that a timeout ends the wait for one that hangs.

Errors: TaskAborted (the actor gave the task up, signed), BadRecord, and whatever stopped the step itself.
"""

import contextvars
import importlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from prefect.logging import get_run_logger

from blocks.chain import NotYet
from blocks.registry import Registry
from contracts.bindings import Status
from contracts.messages import Abort, AbortReason, Message
from tasks.index import catch_up, declare_over, refuse, remember
from tasks.records import Station, load_chain, load_record, load_store, station


def load_registry() -> Registry:
    return cast(Registry, Registry.load("registry"))


@dataclass(frozen=True)
class Step:
    """One step of the protocol: its module (M1..M7) and the flow that does it, as a dotted entrypoint."""

    module: str
    entrypoint: str


STEPS = {
    "publish": Step("M1", "flows.publisher.publish"),
    "register": Step("M2", "flows.miner.register"),
    "challenge": Step("M2", "flows.publisher.challenge"),
    "prove-dataset": Step("M2", "flows.miner.prove_dataset"),
    "form-cohort": Step("M2", "flows.publisher.form_cohort"),
    "contribute": Step("M3", "flows.miner.contribute"),
    "collect": Step("M4", "flows.aggregator.collect"),
    "grant-audit": Step("M4", "flows.publisher.grant_audit"),
    "audit": Step("M4", "flows.aggregator.audit"),
    "derive-key": Step("M4", "flows.publisher.derive_key"),
    "aggregate": Step("M4", "flows.aggregator.aggregate"),
    "open-validation": Step("M5", "flows.publisher.open_validation"),
    "attest": Step("M5", "flows.miner.attest"),
    "publish-block": Step("M6", "flows.aggregator.publish_block"),
    "reveal-accuracy": Step("M7", "flows.publisher.reveal_accuracy"),
    "reveal-accuracy-instead": Step("M7", "flows.aggregator.reveal_accuracy_instead"),
    "reveal-score": Step("M7", "flows.miner.reveal_score"),
    "withdraw": Step("M7", "flows.miner.withdraw"),
    "refund": Step("M7", "flows.publisher.refund"),
    "resign": Step("M7", "flows.aggregator.resign"),
    "compensation": Step("M7", "flows.miner.compensation"),
}


class TaskAborted(RuntimeError):
    """The task ends without a block: an actor gave it up, or its rounds are used up."""


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


def ask(actor: str, step: str, *, task_id: str, round_number: int = 0, **references: Any) -> Any:
    """Run one actor's step and return its signed record. `actor`: its name or address."""
    registry = load_registry()
    name = registry.find_actor(actor).name
    try:
        return _run(registry, name, step, task_id, round_number, references)
    except TaskAborted:
        raise
    except Exception as error:
        error.add_note(f"task {task_id}, round {round_number}, step {step} of {name}")
        raise


def ask_each(
    actors: Sequence[str], step: str, *, task_id: str, timeout_s: float, round_number: int = 0, **references: Any
) -> list[Any]:
    """Run the step of several actors; return the records of those who did it within `timeout_s` each.

    One that fails, or does not answer in time, is refused with the reason, and the others go on: whether enough are
    left is for the next step to judge.
    """
    registry = load_registry()
    answers = []
    for actor in actors:
        row = registry.find_actor(actor)

        answer = _Answer(registry, row.name, step, task_id, round_number, references)
        answer.start()
        answer.join(timeout_s)
        if answer.is_alive():
            late = f"no answer within {timeout_s:g} s"
            _refuse(registry, task_id, round_number, step, row.address, late)
            watch.tell(StepEvent("refused", step, row.name, task_id, round_number, timeout_s, "no answer in time"))
        elif answer.error is None:
            answers.append(answer.record)
        else:
            _refuse(registry, task_id, round_number, step, row.address, _reason(answer.error))
    return answers


class _Answer(threading.Thread):
    """One actor's step on a daemon thread: one that hangs does not keep the process alive."""

    def __init__(self, *work: Any) -> None:
        super().__init__(daemon=True, name=f"{work[2]} of {work[1]}")
        self._work = work
        self._context = contextvars.copy_context()
        self.record: Any = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.record = self._context.run(_run, *self._work)
        except Exception as error:
            self.error = error


def _run(registry: Registry, name: str, step: str, task_id: str, round_number: int, references: Any) -> Message:
    """Run the flow, fetch and check the record it names, remember it and how long it took."""
    module, _, function = STEPS[step].entrypoint.rpartition(".")
    flow = getattr(importlib.import_module(module), function)
    started_s = time.time()
    watch.tell(StepEvent("started", step, name, task_id, round_number))
    token = _current.set((step, name, task_id, round_number))
    outcome, detail = "failed", ""
    try:
        reference = flow(task_id=task_id, round_number=round_number, actor=name, **references)
        chain = load_chain()
        record = load_record(load_store(), chain.domain, reference)
        remember(registry, chain, load_store(), record, reference)
        outcome, detail = ("aborted", record.reason) if isinstance(record, Abort) else ("ok", _headline(record))
    except Exception as error:
        detail = _reason(error)
        raise
    finally:
        _current.reset(token)
        seconds = time.time() - started_s
        registry.record_step(
            task_id=task_id,
            round_number=round_number,
            step=step,
            actor=name,
            started_s=started_s,
            seconds=seconds,
            outcome=outcome,
            detail=detail,
        )
        watch.tell(StepEvent(outcome, step, name, task_id, round_number, seconds, detail))
        where = f"round {round_number}, " if round_number else ""
        get_run_logger().info(
            "%s %s: %s, %s%s, %.1f s. %s", STEPS[step].module, step, name, where, outcome, seconds, detail
        )
    if isinstance(record, Abort):
        raise TaskAborted(f"{record.reason}: {record.detail}")
    return record


def _refuse(registry: Registry, task_id: str, round_number: int, step: str, address: str, reason: str) -> None:
    """Go on without an actor, in its publisher's name."""
    refuse(_publisher(registry, task_id), registry, task_id, round_number, step, address, reason)


def _publisher(registry: Registry, task_id: str) -> Station:
    """The station of a task's publisher, in whose name the task is run."""
    task = registry.find_task(task_id)
    if task is None:
        raise LookupError(f"task {task_id} is not known here: it was not published")
    return station(registry.find_actor(task.publisher).name)


def report_progress(fraction: float, what: str) -> None:
    """Tell the watchers how far the current step is; 0 <= fraction <= 1."""
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
        if not _is_overdue(task_id):
            raise
        registry = load_registry()
        declare_over(_publisher(registry, task_id), registry, task_id, AbortReason.DEADLINE_PASSED, _reason(error))


def _is_overdue(task_id: str) -> bool:
    """Whether the task's reward is still locked after its deadline."""
    chain = load_chain()
    on_chain = chain.contracts().escrow.get_task(task_id)
    return on_chain.status is Status.LOCKED and chain.now_s() > on_chain.terms.deadline_s


def give_up_after(task_id: str, rounds: int) -> None:
    """End a task whose rounds are used up, in its publisher's name. Raises TaskAborted."""
    registry, detail = load_registry(), f"task {task_id} had {rounds}"
    declare_over(_publisher(registry, task_id), registry, task_id, AbortReason.MAX_ROUNDS, detail)
    raise TaskAborted(f"{AbortReason.MAX_ROUNDS}: {detail}")


def reachable(role: str) -> list[str]:
    """Names of the actors with this role that can be asked."""
    return [row.name for row in load_registry().actors(role)]


def conclude(task_id: str) -> str:
    """Where the task stands by chain and signed records: PAID, REFUNDED, PUBLISHED or REFUNDABLE; FAILED when there is none."""
    return catch_up(load_registry(), load_chain(), load_store(), task_id) or "FAILED"


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
