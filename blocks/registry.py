"""What happened, quickly answered: an index over chain and store, in SQL. It decides nothing and can be rebuilt.

Recording the same thing twice changes nothing. Amounts in wei and digests are text: no database integer holds them.
"""

import json
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from prefect.blocks.core import Block
from pydantic import Field as BlockField
from sqlalchemy import Engine, event
from sqlalchemy.pool import NullPool
from sqlmodel import Field, Session, SQLModel, col, create_engine, select

from contracts.messages import Message

_write_lock = threading.Lock()


class ActorRow(SQLModel, table=True):
    """A party that can be asked: its name, its address, and the role of its queue."""

    __tablename__ = "actors"
    name: str = Field(primary_key=True)
    address: str = Field(index=True)
    role: str = Field(index=True)


class TaskRow(SQLModel, table=True):
    """A published task. It exists here only once its escrow was read back from the chain."""

    __tablename__ = "tasks"
    task_id: str = Field(primary_key=True)
    publisher: str
    spec_hash: str
    terms: str
    status: str
    reason: str = ""


class RecordRow(SQLModel, table=True):
    """A signed record: who said what about which round, and the digest of its bytes in the store."""

    __tablename__ = "records"
    task_id: str = Field(primary_key=True)
    round_number: int = Field(primary_key=True)
    kind: str = Field(primary_key=True)
    signer: str = Field(primary_key=True)
    path: str = Field(primary_key=True)
    sha256: str
    message: str


class RefusalRow(SQLModel, table=True):
    """What was refused, in which step, and why."""

    __tablename__ = "refusals"
    task_id: str = Field(primary_key=True)
    round_number: int = Field(primary_key=True)
    step: str = Field(primary_key=True)
    actor: str = Field(primary_key=True)
    reason: str


class StepRow(SQLModel, table=True):
    """One run of an actor's step: when, how long, and how it ended."""

    __tablename__ = "steps"
    id: int | None = Field(default=None, primary_key=True)
    task_id: str = Field(index=True)
    round_number: int
    step: str
    actor: str
    started_s: float
    seconds: float
    outcome: str
    detail: str = ""


class Registry(Block):
    """The database of tasks, rounds, records and refusals."""

    _block_type_name = "HealChain registry"
    _block_type_slug = "healchain-registry"
    _description = "SQL index over chain and store."

    url: str = BlockField(description="SQLAlchemy URL, e.g. sqlite:////path/registry.sqlite")

    def record_actor(self, name: str, address: str, role: str) -> None:
        self._merge(ActorRow(name=name, address=address, role=role))

    def actors(self, role: str | None = None) -> list[ActorRow]:
        with self._session() as session:
            query = select(ActorRow).order_by(ActorRow.name)
            found = session.exec(query if role is None else query.where(ActorRow.role == role)).all()
        return sorted(found, key=lambda row: (len(row.name), row.name))

    def find_actor(self, name_or_address: str) -> ActorRow:
        """The actor of this name or address. Raises LookupError."""
        for row in self.actors():
            if name_or_address in (row.name, row.address):
                return row
        raise LookupError(f"no actor {name_or_address!r} is known here: register it first")

    def record_task(self, task_id: str, publisher: str, spec_hash: str, terms: str) -> None:
        """An escrow that was read back makes a task OPEN; a task that is further along stays where it is."""
        if self.find_task(task_id) is None:
            self._merge(TaskRow(task_id=task_id, publisher=publisher, spec_hash=spec_hash, terms=terms, status="OPEN"))

    def find_task(self, task_id: str) -> TaskRow | None:
        with self._session() as session:
            return session.get(TaskRow, task_id)

    def mark_task(self, task_id: str, status: str, reason: str = "") -> None:
        with _write_lock, self._session() as session:
            row = session.get(TaskRow, task_id)
            if row is None:
                return  # an escrow that never was has no task to mark
            row.status, row.reason = status, reason
            session.add(row)
            session.commit()

    def record(self, message: Message, *, signer: str, path: str, sha256: str) -> None:
        self._merge(
            RecordRow(
                task_id=message.task_id,
                round_number=message.round_number,
                kind=type(message).__name__,
                signer=signer,
                path=path,
                sha256=sha256,
                message=json.dumps(message.model_dump(mode="json"), sort_keys=True),
            )
        )

    def records(self, task_id: str, kind: str) -> Sequence[RecordRow]:
        with self._session() as session:
            query = select(RecordRow).where(RecordRow.task_id == task_id, RecordRow.kind == kind)
            return session.exec(query.order_by(col(RecordRow.round_number), col(RecordRow.signer))).all()

    def record_refusal(self, task_id: str, round_number: int, step: str, actor: str, reason: str) -> None:
        """`actor` is an address. The first reason stays."""
        with _write_lock, self._session() as session:
            if session.get(RefusalRow, (task_id, round_number, step, actor)) is None:
                session.add(
                    RefusalRow(task_id=task_id, round_number=round_number, step=step, actor=actor, reason=reason)
                )
                session.commit()

    def refusals(self, task_id: str) -> Sequence[RefusalRow]:
        with self._session() as session:
            query = select(RefusalRow).where(RefusalRow.task_id == task_id)
            return session.exec(
                query.order_by(col(RefusalRow.round_number), col(RefusalRow.step), col(RefusalRow.actor))
            ).all()

    def record_step(self, **fields: Any) -> None:
        with _write_lock, self._session() as session:
            session.add(StepRow(**fields))
            session.commit()

    def steps(self, task_id: str) -> Sequence[StepRow]:
        with self._session() as session:
            return session.exec(
                select(StepRow).where(StepRow.task_id == task_id).order_by(col(StepRow.started_s))
            ).all()

    def _merge(self, row: SQLModel) -> None:
        with _write_lock, self._session() as session:
            session.merge(row)
            session.commit()

    def _session(self) -> Session:
        return Session(_engine(self.url), expire_on_commit=False)


@lru_cache(maxsize=32)
def _engine(url: str) -> Engine:
    engine = create_engine(url, poolclass=NullPool) if url.startswith("sqlite") else create_engine(url)
    if url.startswith("sqlite"):
        event.listen(engine, "connect", _survive_a_kill)
    SQLModel.metadata.create_all(engine)
    return engine


def _survive_a_kill(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA busy_timeout=30000")
