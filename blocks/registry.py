"""What happened, quickly answered: an index over chain and store, in SQL. It decides nothing and can be rebuilt.

    url   sqlite:////path/registry.sqlite   one host
          postgresql+psycopg://...          a server; one that restarts is waited for

Recording the same thing twice changes nothing. What an event of the chain says replaces what is there; what a record says fills
only what is empty. Opening a database brings its schema to this version (blocks.schema).

Errors: UnknownSchema, UnknownVersion, RegistryUnavailable, LookupError (an actor).
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, TypeVar

from prefect.blocks.core import Block
from pydantic import Field as BlockField
from pydantic import SecretStr
from sqlalchemy import Engine, Table, delete, event, func, insert, text, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool
from sqlmodel import Session, SQLModel, col, create_engine, select

from blocks.derived import rows_of_event, rows_of_record
from blocks.schema import bring_up_to_date, is_away
from blocks.tables import (
    INDEX,
    ActorRow,
    EventRow,
    ModelVersionRow,
    PinRow,
    RecordRow,
    RefusalRow,
    RegistrationRow,
    StepRow,
    TaskRow,
)
from contracts.bindings import Logged, TaskPublished
from contracts.messages import Abort, Address, Announcement, Message
from contracts.task_spec import Start

PATIENCE_S = 60.0  # longest wait for a database that restarts
RETRY_S = 0.2
CONNECT_S = 5
BATCH_ROWS = 500
INSERT: Mapping[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
_write_lock = threading.Lock()
_opening = threading.Lock()
T = TypeVar("T")


class RegistryUnavailable(ConnectionError):
    """The database cannot be reached or opened; the message says which one."""


class UnknownVersion(LookupError):
    """No model version, and no pin, has this name."""


class Registry(Block):
    """The database of tasks, rounds, records, model versions and refusals."""

    _block_type_name = "HealChain registry"
    _block_type_slug = "healchain-registry"
    _description = "SQL index over chain and store."

    url: SecretStr = BlockField(
        description="SQLAlchemy URL, e.g. sqlite:////path/registry.sqlite; it may hold a password"
    )

    patience_s: float = BlockField(default=PATIENCE_S, ge=0, description="longest wait for a database that restarts")

    # Who can be asked

    def record_actor(self, name: str, address: str, role: str) -> None:
        self._write(lambda session: _put(session, ActorRow(name=name, address=address, role=role), replaces=True))

    def actors(self, role: str | None = None) -> list[ActorRow]:
        query = select(ActorRow)
        found = self._all(query if role is None else query.where(ActorRow.role == role))
        return sorted(found, key=lambda row: (len(row.name), row.name))

    def find_actor(self, name_or_address: str) -> ActorRow:
        """The actor of this name or address. Raises LookupError."""
        for row in self.actors():
            if name_or_address in (row.name, row.address):
                return row
        raise LookupError(f"no actor {name_or_address!r} is known here: register it first")

    # What happened

    def record_event(self, found: Logged, task_id: str | None) -> None:
        """Remember an event of the chain; task_id: None for one about an account alone."""

        def write(session: Session) -> None:
            task = None if task_id is None else session.get(TaskRow, task_id)
            if task_id is not None and task is None and not isinstance(found.event, TaskPublished):
                return  # a task is known from its publication on
            for row in rows_of_event(found, task):
                _put(session, row, replaces=True)
            if task_id is not None:
                _settle_status(session, task_id)

        self._write(write)

    def record(self, message: Message, *, signer: str, path: str, sha256: str) -> None:
        """Remember a record whose signature was checked."""

        def write(session: Session) -> None:
            task = session.get(TaskRow, message.task_id)
            for row in rows_of_record(message, signer, path, sha256, task):
                _put(session, row)
            if isinstance(message, Announcement | Abort):
                _settle_status(session, message.task_id)

        self._write(write)

    def record_terms(self, task_id: str, terms: str, start_sha256: str | None) -> None:
        """Remember a task's published terms, which hash to what the chain has, and the model that it starts from."""
        start = None if start_sha256 is None else self._version_with(start_sha256)
        values = {"terms": _storable(terms), "start": start}
        self._write(
            lambda session: session.exec(update(TaskRow).where(col(TaskRow.task_id) == task_id).values(**values))
        )

    def record_refusal(self, task_id: str, round_number: int, step: str, actor: str, reason: str) -> None:
        """`actor` is an address. The first reason stays."""
        row = RefusalRow(task_id=task_id, round_number=round_number, step=step, actor=actor, reason=reason)
        self._write(lambda session: _put(session, row))

    def record_step(self, **fields: Any) -> None:
        self._write(
            lambda session: _put(
                session, StepRow(**fields), key=("task_id", "round_number", "step", "actor", "started_s")
            )
        )

    # What is known

    def find_task(self, task_id: str) -> TaskRow | None:
        return self._read(lambda session: session.get(TaskRow, task_id))

    def tasks(self) -> list[TaskRow]:
        """In the order of the chain; those that an older program recorded without their block come first."""
        return sorted(self._all(select(TaskRow)), key=lambda row: (row.block_number or 0, row.task_id))

    def records(self, task_id: str, kind: str | None = None) -> list[RecordRow]:
        """By round and signer. kind: None for all."""
        query = select(RecordRow).where(RecordRow.task_id == task_id)
        found = self._all(query if kind is None else query.where(RecordRow.kind == kind))
        # Sorted here: databases differ in how they order capitals.
        return sorted(found, key=lambda row: (row.round_number, row.signer, row.path))

    def refusals(self, task_id: str) -> list[RefusalRow]:
        found = self._all(select(RefusalRow).where(RefusalRow.task_id == task_id))
        return sorted(found, key=lambda row: (row.round_number, row.step, row.actor))

    def steps(self, task_id: str) -> list[StepRow]:
        return self._all(select(StepRow).where(StepRow.task_id == task_id).order_by(col(StepRow.started_s)))

    def about(self, table: type[SQLModel], task_id: str) -> list[Any]:
        """The rows of an indexed table about a task, in the order of its key."""
        keys = [column.name for column in _table(table).primary_key]
        found = self._all(select(table).where(_table(table).c.task_id == task_id))
        return sorted(found, key=lambda row: [getattr(row, name) for name in keys])

    def last_event(self) -> tuple[int, int]:
        """(block number, log index) of the newest event here; (0, -1) when there is none."""
        newest = select(EventRow).order_by(col(EventRow.block_number).desc(), col(EventRow.log_index).desc()).limit(1)
        found = self._all(newest)
        return (found[0].block_number, found[0].log_index) if found else (0, -1)

    def parties(self) -> set[Address]:
        """Publishers and admitted miners."""
        admitted = self._all(select(RegistrationRow.miner).where(col(RegistrationRow.is_admitted)))
        return {*admitted, *self._all(select(TaskRow.publisher))}

    # Model versions

    def versions(self, task_id: str | None = None) -> list[ModelVersionRow]:
        """In the order of the chain's tasks and of their rounds."""
        order = {task.task_id: place for place, task in enumerate(self.tasks())}
        query = select(ModelVersionRow)
        found = self._all(query if task_id is None else query.where(ModelVersionRow.task_id == task_id))
        return sorted(found, key=lambda row: (order.get(row.task_id, -1), row.task_id, row.round_number))

    def find_version(self, name: str) -> ModelVersionRow:
        """The version of this name (TASK/ROUND), or that a pin of this name holds. Raises UnknownVersion."""
        pinned = self.pinned(name)
        version = pinned.version if pinned is not None else name
        found = self._read(lambda session: session.get(ModelVersionRow, version))
        if found is None:
            raise UnknownVersion(f"{name!r} is no model version and no pin: `healchain models list` shows them")
        return found

    def start_from(self, name: str) -> Start:
        """What a task's terms say to start from a version or a pin. Raises UnknownVersion."""
        version = self.find_version(name)
        return Start(uri=version.uri, sha256=version.sha256)

    def pin(self, name: str, version: str) -> ModelVersionRow:
        """Let a name stand for a model version; what it stood for before is kept for `unpin`. Raises UnknownVersion."""
        if "/" in name or not name:
            raise ValueError(f"pin {name!r}: a name without '/', which would read like a version TASK/ROUND")
        found = self.find_version(version)
        current = self.pinned(name)
        if current is None or current.version != found.version:
            row = PinRow(name=name, version=found.version, pinned_at=datetime.now(UTC))
            self._write(lambda session: _put(session, row))
        return found

    def pinned(self, name: str) -> PinRow | None:
        """The pin that holds for a name."""
        found = self._all(select(PinRow).where(PinRow.name == name, col(PinRow.undone_at).is_(None)))
        return max(found, key=lambda row: row.id or 0, default=None)

    def pins(self) -> list[PinRow]:
        """Every pin that was ever set, in order."""
        return self._all(select(PinRow).order_by(col(PinRow.id)))

    def roll_back(self, name: str) -> ModelVersionRow:
        """Undo the newest pin of a name; the version before it holds again. Raises UnknownVersion when there is none before."""
        standing = [row for row in self.pins() if row.name == name and row.undone_at is None]
        if len(standing) < 2:
            raise UnknownVersion(
                f"pin {name!r} was set {len(standing)} times: there is no version before to go back to"
            )
        undone = update(PinRow).where(col(PinRow.id) == standing[-1].id).values(undone_at=datetime.now(UTC))
        self._write(lambda session: session.exec(undone))
        return self.find_version(standing[-2].version)

    def _version_with(self, sha256: str) -> str | None:
        """The version that this digest names; of several equal ones the first that was published."""
        found = [row for row in self.versions() if row.sha256 == sha256]
        return min(found, key=lambda row: not row.is_published).version if found else None

    # The index as a whole

    def rows(self, table: type[SQLModel]) -> list[dict[str, Any]]:
        """Every row of a table, in the order of its key."""
        keys = [column.name for column in _table(table).primary_key]
        found: Sequence[Any] = self._all(select(table))
        return sorted((row.model_dump() for row in found), key=lambda row: [str(row[name]) for name in keys])

    def replace_index(self, rebuilt: "Registry") -> None:
        """Take over the index of another registry in one transaction: a reader sees the old one or the new one."""

        def write(session: Session) -> None:
            if session.get_bind().dialect.name == "postgresql":
                names = ", ".join(_table(table).name for table in INDEX)
                session.connection().execute(text(f"LOCK TABLE {names} IN EXCLUSIVE MODE"))
            for table in INDEX:
                session.exec(delete(table))
                for batch in rebuilt._batches(table):
                    session.connection().execute(insert(table), batch)

        self._write(write)

    def _batches(self, table: type[SQLModel]) -> Iterator[list[dict[str, Any]]]:
        with self._session() as session:
            for part in session.exec(select(table).execution_options(yield_per=BATCH_ROWS)).partitions():
                yield [row.model_dump() for row in part]

    # The database

    def read(self, work: Callable[[Session], T]) -> T:
        """What the work finds; for those who keep tables of their own here (blocks.edge_ledger)."""
        return self._read(work)

    def change(self, work: Callable[[Session], T]) -> T:
        """Do the work in one transaction that no other writer is in the middle of; again, when the server went away."""

        def run() -> T:
            with _write_lock, self._session() as session:
                if session.get_bind().dialect.name == "sqlite":
                    # Otherwise a transaction that has read could not write once another process has.
                    session.connection().exec_driver_sql("BEGIN IMMEDIATE")
                found = work(session)
                session.commit()
                return found

        return self._patiently(run)

    def _all(self, query: Any) -> list[Any]:
        return self._read(lambda session: list(session.exec(query).all()))

    def _read(self, work: Callable[[Session], T]) -> T:
        def run() -> T:
            with self._session() as session:
                return work(session)

        return self._patiently(run)

    def _write(self, work: Callable[[Session], Any]) -> None:
        """Do the work in one transaction; again, when the server went away in between: all of it, once, is the same as twice."""

        def run() -> None:
            with _write_lock, self._session() as session:
                work(session)
                session.commit()

        self._patiently(run)

    def _patiently(self, run: Callable[[], T]) -> T:
        """Try again while the database server is away, for at most patience_s. Raises RegistryUnavailable."""
        give_up_s = time.monotonic() + self.patience_s
        while True:
            try:
                return run()
            except OperationalError as error:
                if not is_away(error) or time.monotonic() > give_up_s:
                    where = make_url(self.url.get_secret_value()).render_as_string(hide_password=True)
                    said = " ".join(str(error.orig).split())[:300]
                    raise RegistryUnavailable(
                        f"registry {where}: {said}. Is it running, and is registry.url right?"
                    ) from error
            time.sleep(RETRY_S)

    @contextmanager
    def _session(self) -> Iterator[Session]:
        with Session(_open(self.url.get_secret_value()), expire_on_commit=False) as session:
            yield session


def _put(session: Session, row: SQLModel, *, replaces: bool = False, key: Sequence[str] = ()) -> None:
    """Insert a row; where there is one of this key, replace its fields, or fill those that are empty. Fields not set stay."""
    table = _table(type(row))
    values = {name: _storable(value) for name, value in row.model_dump(exclude_unset=True).items()}
    keys = list(key) or [column.name for column in table.primary_key]
    statement = INSERT[session.get_bind().dialect.name](table).values(**values)
    others = [name for name in values if name not in keys]
    new = statement.excluded
    changes = {name: new[name] if replaces else func.coalesce(table.c[name], new[name]) for name in others}
    done = (
        statement.on_conflict_do_update(index_elements=keys, set_=changes)
        if changes
        else statement.on_conflict_do_nothing()
    )
    session.connection().execute(done)


def _storable(value: Any) -> Any:
    """Text that every database takes: others choose what records say, and PostgreSQL keeps no zero character."""
    if not isinstance(value, str):
        return value
    return value.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def _settle_status(session: Session, task_id: str) -> None:
    """Where a task stands, from its events and from the records of those who may end it."""
    session.flush()
    task = session.get(TaskRow, task_id, populate_existing=True)
    if task is None:
        return
    kinds = set(session.exec(select(EventRow.kind).where(EventRow.task_id == task_id)).all())
    said = session.exec(select(RecordRow).where(RecordRow.task_id == task_id, col(RecordRow.kind).in_(ENDINGS))).all()
    aborts = [row for row in said if row.kind == Abort.__name__ and row.signer in (task.publisher, task.aggregator)]
    announced = any(row.kind == Announcement.__name__ and row.signer == task.publisher for row in said)
    reason = ""
    if aborts:
        first = json.loads(min(aborts, key=lambda row: (row.round_number, row.signer)).message)
        reason = f"{first['reason']}: {first['detail']}"
    changed = {"status": _status(kinds, task.outcome, announced=announced, aborted=bool(aborts)), "reason": reason}
    session.exec(update(TaskRow).where(col(TaskRow.task_id) == task_id).values(**changed))


ENDINGS = (Abort.__name__, Announcement.__name__)


def _status(kinds: set[str], outcome: str | None, *, announced: bool, aborted: bool) -> str:
    """The chain's word comes first; before a block, the word of publisher or aggregator."""
    if "PublisherRefunded" in kinds or ("RewardReleased" in kinds and outcome == "UNMET"):
        return "REFUNDED"
    if "RewardReleased" in kinds:
        return "PAID"
    if "BlockPublished" in kinds:
        return "PUBLISHED"
    if aborted:
        return "REFUNDABLE"
    if "RegistrationClosed" in kinds:
        return "TRAINING"
    return "OPEN" if announced else "LOCKED"


def _table(table: type[SQLModel]) -> Table:
    found: Table = table.__table__  # type: ignore[attr-defined]
    return found


def _open(url: str) -> Engine:
    """The database, its schema up to date; one pool of connections for each process, also for one that was forked."""
    with _opening:
        return _engine(url, os.getpid())


@lru_cache(maxsize=32)
def _engine(url: str, _process: int) -> Engine:
    if url.startswith("sqlite"):
        engine = create_engine(url, poolclass=NullPool)
        event.listen(engine, "connect", _survive_a_kill)
    else:
        # Of a host that does not answer at all: without a limit each try would take minutes.
        engine = create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": CONNECT_S})
    bring_up_to_date(engine)
    return engine


def _survive_a_kill(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA busy_timeout=30000")
