"""What happened in rounds over edge devices, durable: experiments, rounds, updates, devices, model versions.

The tables are in the registry's database; what is large is in the artifact store, named by its SHA-256. A round is changed in
one transaction that holds its row, so that of several who would close it exactly one does, and a version is allocated where it
is written: versions count up, are written once and never given twice, whoever restarts.

What is received here was read and judged before (tasks.edge.wire, tasks.edge.rounds). Moments are arguments.

Errors: UnknownRound, UnknownModel, AlreadyWritten; TamperedArtifact for bytes that are not what was written.
"""

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar
from uuid import NAMESPACE_URL, uuid5

from sqlalchemy import delete, func, or_, text, update
from sqlmodel import Session, SQLModel, col, select

from blocks.artifacts import ArtifactStore, TamperedArtifact
from blocks.registry import Registry
from blocks.tables import (
    EdgeBlobRow,
    EdgeDeviceRow,
    EdgeExperimentRow,
    EdgeLateRow,
    EdgeMessageRow,
    EdgeModelRow,
    EdgeRoundRow,
    EdgeTaskRow,
    EdgeUpdateRow,
    PinRow,
)

OPEN, CLOSED, COMPLETED, FAILED = "OPEN", "CLOSED", "COMPLETED", "FAILED"
WARNING = "COMPLETED_WITH_WARNING"
ENDED = (COMPLETED, WARNING, FAILED)
SMALL_BYTES = 2**20  # a model or an update of more is an artifact
KEY_BYTES = 32
KEPT_S, KEPT_SENT = 86_400, 10_000  # of messages that were published: how long, and at most how many
# Of those that wait: longer than the longest round, and more than the starts of many rounds of the largest experiment.
WAITING_S, KEPT_WAITING = 31 * 86_400, 1_000_000
PBKDF2_ROUNDS = 101  # a key has 256 random bits: stretching it adds nothing
PIN_FOLDER = "edge/"
LOCK = 0x45646765  # PostgreSQL's advisory lock of whoever allocates a version
PENDING, RUNNING, DONE, BROKEN = 0, 2, 3, 4  # states of a task
R = TypeVar("R", bound=SQLModel)


class UnknownRound(LookupError):
    """No round has this name."""


class UnknownModel(LookupError):
    """No model has this version, and no pin this name."""


class AlreadyWritten(ValueError):
    """Something else is written under this name or version, and it is written once."""


@dataclass(frozen=True)
class Received:
    """What became of an update. kind: accepted, repeated or late; count: updates without an error in the round."""

    kind: str
    count: int
    round: EdgeRoundRow


@dataclass(frozen=True)
class EdgeLedger:
    """The tables, the store, and the address in whose folder of the store everything is."""

    registry: Registry
    store: ArtifactStore
    owner: str

    # Experiments and rounds

    def record_experiment(self, experiment_id: str, request: str, at: datetime) -> None:
        """Remember a request; the same again changes nothing. Raises AlreadyWritten for another one of this name."""
        digest = hashlib.sha256(request.encode()).hexdigest()

        def write(session: Session) -> str:
            found = session.get(EdgeExperimentRow, experiment_id)
            if found is None:
                row = EdgeExperimentRow(experiment_id=experiment_id, digest=digest, request=request, created_at=at)
                session.add(row)
                return digest
            return found.digest

        if self.registry.change(write) != digest:
            raise AlreadyWritten(f"experiment {experiment_id} was configured otherwise before: give it another id")

    def experiment(self, experiment_id: str) -> EdgeExperimentRow | None:
        return self.registry.read(lambda session: session.get(EdgeExperimentRow, experiment_id))

    def open_round(self, row: EdgeRoundRow) -> EdgeRoundRow:
        """Open a round; the one that was opened before under this name, where there is one. Raises AlreadyWritten."""

        def write(session: Session) -> EdgeRoundRow:
            found = session.get(EdgeRoundRow, row.round_id)
            if found is None:
                session.add(found := EdgeRoundRow(**row.model_dump()))
                session.flush()
            return _free(session, found)

        found = self.registry.change(write)
        if (found.experiment_id, found.number) != (row.experiment_id, row.number):
            raise AlreadyWritten(f"round {row.round_id} is of experiment {found.experiment_id}: give it another id")
        return found

    def round(self, round_id: str) -> EdgeRoundRow:
        """Raises UnknownRound."""
        found = self.registry.read(lambda session: session.get(EdgeRoundRow, round_id))
        if found is None:
            raise UnknownRound(f"round {round_id[:128]!r} is unknown: ask for an experiment with it first")
        return found

    def rounds(self, experiment_id: str | None = None) -> list[EdgeRoundRow]:
        """In the order of their opening."""
        query = select(EdgeRoundRow)
        query = query if experiment_id is None else query.where(EdgeRoundRow.experiment_id == experiment_id)
        return sorted(self._all(query), key=lambda row: (row.opened_at, row.number))

    def open_rounds(self) -> list[EdgeRoundRow]:
        return sorted(self._all(select(EdgeRoundRow).where(EdgeRoundRow.status == OPEN)), key=lambda row: row.opened_at)

    def last_completed(self) -> EdgeRoundRow | None:
        """The round that made the newest version."""
        query = select(EdgeRoundRow).where(col(EdgeRoundRow.version).is_not(None))
        found = self._all(query.order_by(col(EdgeRoundRow.version).desc()).limit(1))
        return found[0] if found else None

    def receive(self, row: EdgeUpdateRow, body: bytes | None) -> Received:
        """Take an update into its round, in place of an earlier one of its sender; the k-th closes the round.

        One that comes after the closing is remembered beside it; one that was taken before and comes again is not late.
        Raises UnknownRound.
        """
        if body is not None and len(body) > SMALL_BYTES:
            row.sha256 = self.store.put(self.owner, body).sha256
        elif body is not None:
            row.body = body.decode()

        def write(session: Session) -> Received:
            round_ = _lock(session, row.round_id)
            _close_if_due(round_, row.received_at)
            before = session.get(EdgeUpdateRow, (row.round_id, row.proplet_id))
            if before is not None and before.digest == row.digest:
                return Received("repeated", _count(session, row.round_id), _free(session, round_))
            if round_.status != OPEN:
                late = {name: getattr(row, name) for name in EdgeLateRow.model_fields}
                session.merge(EdgeLateRow(**late))
                return Received("late", _count(session, row.round_id), _free(session, round_))
            session.merge(EdgeUpdateRow(**row.model_dump()))
            session.flush()
            count = _count(session, row.round_id)
            if count >= round_.k_of_n:
                _close(round_, "k", row.received_at, row.proplet_id)
            return Received("accepted", count, _free(session, round_))

        return self.registry.change(write)

    def close_if_due(self, round_id: str, now: datetime, closer: str = "") -> EdgeRoundRow:
        """Close a round whose deadline has passed; the round as it stands then. Raises UnknownRound."""
        if (seen := self.round(round_id)).status != OPEN or now < seen.deadline_at:
            return seen

        def write(session: Session) -> EdgeRoundRow:
            round_ = _lock(session, round_id)
            _close_if_due(round_, now, closer)
            return _free(session, round_)

        return self.registry.change(write)

    def updates(self, round_id: str) -> list[EdgeUpdateRow]:
        """By sender, those with an error among them."""
        return sorted(
            self._all(select(EdgeUpdateRow).where(EdgeUpdateRow.round_id == round_id)), key=lambda row: row.proplet_id
        )

    def late_updates(self, round_id: str) -> list[EdgeLateRow]:
        return self._all(select(EdgeLateRow).where(EdgeLateRow.round_id == round_id))

    def count(self, round_id: str) -> int:
        """Updates without an error."""
        return self.registry.read(lambda session: _count(session, round_id))

    def body_of(self, row: EdgeUpdateRow) -> bytes:
        """The model of an update, as it was put. Raises TamperedArtifact."""
        return row.body.encode() if row.body is not None else self.store.get(self.owner, row.sha256 or "")

    def end_round(self, round_id: str, status: str, detail: str, at: datetime) -> EdgeRoundRow:
        """A closed round without a version: FAILED, or COMPLETED_WITH_WARNING. One that has ended well stays as it is."""

        def write(session: Session) -> EdgeRoundRow:
            round_ = _lock(session, round_id)
            if round_.version is None:
                round_.status, round_.detail, round_.completed_at = status, detail[:2000], at
            return _free(session, round_)

        return self.registry.change(write)

    def complete(self, model: EdgeModelRow, data: bytes, topic: str, notice: Mapping[str, Any]) -> EdgeRoundRow:
        """Write the version of a closed round, end the round, and leave a notice to be published: all of it, once.

        The version is the next free one; the notice gets it as new_model_version. A round that has one keeps it.
        """
        row = self._placed(model, data)
        round_id = row.round_id or ""

        def write(session: Session) -> EdgeRoundRow:
            round_ = _lock(session, round_id)
            if round_.version is not None:
                return _free(session, round_)
            if round_.status == OPEN:
                raise ValueError(f"round {round_id} is open: close it first")
            version = _add_version(session, row)
            round_.status, round_.version, round_.detail, round_.completed_at = COMPLETED, version, "", row.created_at
            said = {**notice, "new_model_version": version, "model_uri": f"fl/models/global_model_v{version}"}
            session.add(EdgeMessageRow(topic=topic, payload=json.dumps(said, sort_keys=True), made_at=row.created_at))
            return _free(session, round_)

        return self.registry.change(write)

    # Model versions

    def put_model(self, row: EdgeModelRow, data: bytes, *, version: int | None = None) -> int:
        """Write a version that no round made; the next free one where none is given. Raises AlreadyWritten.

        The same bytes under the same version change nothing.
        """
        placed = self._placed(row, data)

        def write(session: Session) -> tuple[int, str]:
            _take_turn(session)
            found = None if version is None else session.get(EdgeModelRow, version)
            if found is not None:
                return found.version, found.sha256
            return _add_version(session, placed, version), placed.sha256

        written, sha256 = self.registry.change(write)
        if sha256 != placed.sha256:
            raise AlreadyWritten(
                f"version {written} is another model: versions are written once, store it under the next"
            )
        return written

    def model(self, version: int) -> EdgeModelRow:
        """Raises UnknownModel."""
        found = self.registry.read(lambda session: session.get(EdgeModelRow, version)) if 0 <= version < 2**31 else None
        if found is None:
            raise UnknownModel("Model not found")
        return found

    def models(self) -> list[EdgeModelRow]:
        return self._all(select(EdgeModelRow).order_by(col(EdgeModelRow.version)))

    def model_bytes(self, row: EdgeModelRow) -> bytes:
        """As they were written, in the form that the row names. Raises TamperedArtifact."""
        if row.body is None:
            return self.store.get(self.owner, row.sha256)
        data = row.body.encode()
        if _sha256(data) != row.sha256:
            raise TamperedArtifact(
                f"version {row.version} has digest {_sha256(data)}, not {row.sha256}: it was changed"
            )
        return data

    def state_bytes(self, version: int) -> bytes | None:
        """What the rule kept with this version."""
        kept = self.model(version).state_sha256
        return None if kept is None else self.store.get(self.owner, kept)

    def pin(self, name: str, version: int, at: datetime) -> EdgeModelRow:
        """Let a name stand for a version; what it stood for before is kept for `roll_back`. Raises UnknownModel."""
        found = self.model(version)
        if (standing := self._pins(name)) and standing[-1].version == _pinned_name(version):
            return found
        row = PinRow(name=PIN_FOLDER + name, version=_pinned_name(version), pinned_at=at)
        self.registry.change(lambda session: session.add(row))
        return found

    def pinned(self, name: str) -> EdgeModelRow:
        """The version that a name stands for. Raises UnknownModel."""
        if not (standing := self._pins(name)):
            raise UnknownModel(f"no pin {name[:80]!r}: pin a version first")
        return self.model(int(standing[-1].version.removeprefix(PIN_FOLDER)))

    def roll_back(self, name: str, at: datetime) -> EdgeModelRow:
        """Undo the newest pin of a name; the version before it holds again. Raises UnknownModel when there is none before."""
        standing = self._pins(name)
        if len(standing) < 2:
            raise UnknownModel(
                f"pin {name[:80]!r} was set {len(standing)} times: there is no version before to go back to"
            )
        undone = update(PinRow).where(col(PinRow.id) == standing[-1].id).values(undone_at=at)
        self.registry.change(lambda session: session.execute(undone) and None)
        return self.pinned(name)

    def _pins(self, name: str) -> list[PinRow]:
        held = (PinRow.name == PIN_FOLDER + name, col(PinRow.undone_at).is_(None))
        return self._all(select(PinRow).where(*held).order_by(col(PinRow.id)))

    def _placed(self, row: EdgeModelRow, data: bytes) -> EdgeModelRow:
        """With its bytes in the row or in the store, as their form says."""
        found = EdgeModelRow(**row.model_dump())
        found.sha256 = _sha256(data) if found.form == "json" else self.store.put(self.owner, data).sha256
        found.body = data.decode() if found.form == "json" else None
        return found

    # Devices

    def register(self, proplet_id: str, details: Mapping[str, Any], at: datetime, *, namespace: str = "default") -> str:
        """Give a device a key, in place of an earlier one; only its digests are kept."""
        key = secrets.token_urlsafe(KEY_BYTES)
        fields = {"key_sha256": _key_digest(key), "mqtt_hash": mosquitto_hash(key), "namespace": namespace}
        # What was sealed with an earlier key is void, and a device that lost its home counts anew.
        counters = {"words_counter": 0, "updates_counter": 0}
        self._change_device(proplet_id, at, **fields, **counters, details=json.dumps(details))
        return key

    def beat(
        self,
        proplet_id: str,
        health: str,
        at: datetime,
        details: Mapping[str, Any] | None = None,
        counter: int | None = None,
    ) -> None:
        """What a device said of itself, and the counter of that word, where it was sealed.

        One that nobody registered gets a row without a key, which opens nothing.
        """
        said: dict[str, Any] = {} if details is None else {"details": json.dumps(details)}
        said |= {} if counter is None else {"words_counter": counter}
        self._change_device(proplet_id, at, health=health, last_beat_at=at, **said)

    def note_counter(self, proplet_id: str, name: str, counter: int) -> None:
        """The counter of a sealed message of a registered device that was taken. name: words_counter or updates_counter."""
        noted = update(EdgeDeviceRow).where(col(EdgeDeviceRow.proplet_id) == proplet_id).values({name: counter})
        self.registry.change(lambda session: session.execute(noted) and None)

    def device(self, proplet_id: str) -> EdgeDeviceRow | None:
        return self.registry.read(lambda session: session.get(EdgeDeviceRow, proplet_id))

    def devices(self) -> list[EdgeDeviceRow]:
        return sorted(self._all(select(EdgeDeviceRow)), key=lambda row: row.proplet_id)

    def device_with_key(self, key: str) -> EdgeDeviceRow | None:
        """The device that this key belongs to."""
        found = self._all(select(EdgeDeviceRow).where(EdgeDeviceRow.key_sha256 == _key_digest(key)))
        return found[0] if found else None

    def _change_device(self, proplet_id: str, at: datetime, **fields: Any) -> None:
        def write(session: Session) -> None:
            row = session.get(EdgeDeviceRow, proplet_id) or EdgeDeviceRow(proplet_id=proplet_id, registered_at=at)
            for name, value in fields.items():
                setattr(row, name, value)
            session.add(row)

        self.registry.change(write)

    # Tasks and messages

    def start_tasks(self, tasks: Sequence[EdgeTaskRow], topic: str, notices: Sequence[tuple[str, str]] = ()) -> int:
        """Remember tasks and leave the messages that start them; those that are known are left alone. How many were new."""

        def write(session: Session) -> int:
            known = _known(session, [task.task_id for task in tasks])
            fresh = [EdgeTaskRow(**task.model_dump()) for task in tasks if task.task_id not in known]
            if not fresh:
                return 0
            at = fresh[0].created_at
            if not known and not _has_tasks(session, fresh[0].round_id):
                session.add_all(EdgeMessageRow(topic=name, payload=payload, made_at=at) for name, payload in notices)
            session.add_all(EdgeMessageRow(topic=topic, payload=task.start, made_at=at) for task in fresh)
            many = len(fresh)
            session.add_all(fresh)
            return many

        return self.registry.change(write) if tasks else 0

    def put_task(self, row: EdgeTaskRow, messages: Iterable[tuple[str, str]] = ()) -> None:
        """Write a task as it stands, and leave messages to be published."""

        def write(session: Session) -> None:
            session.merge(EdgeTaskRow(**row.model_dump()))
            session.add_all(
                EdgeMessageRow(topic=topic, payload=said, made_at=row.changed_at) for topic, said in messages
            )

        self.registry.change(write)

    def task(self, task_id: str) -> EdgeTaskRow | None:
        return self.registry.read(lambda session: session.get(EdgeTaskRow, task_id))

    def tasks(self, round_id: str) -> list[EdgeTaskRow]:
        return sorted(
            self._all(select(EdgeTaskRow).where(EdgeTaskRow.round_id == round_id)), key=lambda row: row.proplet_id
        )

    def unsent(self, most: int = 200) -> list[EdgeMessageRow]:
        """The oldest messages that nobody has published."""
        waiting = select(EdgeMessageRow).where(col(EdgeMessageRow.sent_at).is_(None))
        return self._all(waiting.order_by(col(EdgeMessageRow.id)).limit(most))

    def leave(self, topic: str, payload: str, at: datetime) -> None:
        """Leave a message to be published."""
        row = EdgeMessageRow(topic=topic, payload=payload, made_at=at)
        self.registry.change(lambda session: session.add(row))

    def mark_sent(self, ids: Sequence[int], at: datetime) -> None:
        """So that what the broker has taken is not published again."""
        done = update(EdgeMessageRow).where(col(EdgeMessageRow.id).in_(ids)).values(sent_at=at)
        self.registry.change(lambda session: session.execute(done) and None)

    def prune_messages(self, now: datetime) -> None:
        """Forget messages that were published, but for the newest; and those that nobody could publish for a month."""
        made, place = col(EdgeMessageRow.made_at), col(EdgeMessageRow.id)

        def write(session: Session) -> None:
            newest = int(session.exec(select(func.max(place))).one() or 0)
            for is_open, age_s, many in ((True, WAITING_S, KEPT_WAITING), (False, KEPT_S, KEPT_SENT)):
                is_over = or_(made < now - timedelta(seconds=age_s), place <= newest - many)
                whose = col(EdgeMessageRow.sent_at).is_(None) if is_open else col(EdgeMessageRow.sent_at).is_not(None)
                session.execute(delete(EdgeMessageRow).where(whose, is_over))

        self.registry.change(write)

    # Modules and data sets

    def put_blob(self, kind: str, name: str, data: bytes) -> EdgeBlobRow:
        """Keep bytes under a name, in place of earlier ones."""
        sha256 = self.store.put(self.owner, data).sha256
        row = EdgeBlobRow(kind=kind, name=name, sha256=sha256, size_bytes=len(data))
        return self.registry.change(lambda session: _free(session, session.merge(row)))

    def blob(self, kind: str, name: str) -> EdgeBlobRow | None:
        return self.registry.read(lambda session: session.get(EdgeBlobRow, (kind, name)))

    def blobs(self, kind: str) -> list[EdgeBlobRow]:
        return sorted(self._all(select(EdgeBlobRow).where(EdgeBlobRow.kind == kind)), key=lambda row: row.name)

    def blob_bytes(self, row: EdgeBlobRow) -> bytes:
        """Raises MissingArtifact or TamperedArtifact."""
        return self.store.get(self.owner, row.sha256)

    def _all(self, query: Any) -> list[Any]:
        return self.registry.read(lambda session: list(session.exec(query).all()))


def task_id_of(round_id: str, proplet_id: str) -> str:
    """The task of a device in a round: the same, whoever starts it again."""
    return str(uuid5(NAMESPACE_URL, f"{round_id}/{proplet_id}"))


def is_alive(row: EdgeDeviceRow, now: datetime, within_s: float) -> bool:
    """Whether a device has said within this time that it is well."""
    return (
        row.health == "alive" and row.last_beat_at is not None and now - row.last_beat_at <= timedelta(seconds=within_s)
    )


def mosquitto_hash(key: str) -> str:
    """A line's hash in mosquitto's password file: PBKDF2 with SHA-512 ($7$)."""
    from base64 import b64encode

    salt = secrets.token_bytes(12)
    derived = hashlib.pbkdf2_hmac("sha512", key.encode(), salt, PBKDF2_ROUNDS)
    return f"$7${PBKDF2_ROUNDS}${b64encode(salt).decode()}${b64encode(derived).decode()}"


def _key_digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _sha256(data: bytes) -> str:
    return "0x" + hashlib.sha256(data).hexdigest()


def _pinned_name(version: int) -> str:
    return f"{PIN_FOLDER}{version}"


def _lock(session: Session, round_id: str) -> EdgeRoundRow:
    """The round, which until the end of the transaction nobody else changes. Raises UnknownRound."""
    query = select(EdgeRoundRow).where(EdgeRoundRow.round_id == round_id).with_for_update()
    found = session.exec(query).first()
    if found is None:
        raise UnknownRound(f"round {round_id[:128]!r} is unknown: ask for an experiment with it first")
    return found


def _free(session: Session, row: R) -> R:
    """The row as it will be written, for use after the transaction."""
    session.flush()
    return type(row)(**row.model_dump())


def _close_if_due(round_: EdgeRoundRow, now: datetime, closer: str = "") -> None:
    if round_.status == OPEN and now >= round_.deadline_at:
        _close(round_, "timeout", round_.deadline_at, closer)


def _close(round_: EdgeRoundRow, reason: str, at: datetime, closer: str) -> None:
    round_.status, round_.reason, round_.closed_at, round_.closed_by = CLOSED, reason, at, closer


def _count(session: Session, round_id: str) -> int:
    good = (
        select(func.count())
        .select_from(EdgeUpdateRow)
        .where(EdgeUpdateRow.round_id == round_id, EdgeUpdateRow.error == "")
    )
    return int(session.exec(good).one())


def _take_turn(session: Session) -> None:
    """Until the end of the transaction nobody else allocates a version."""
    if session.get_bind().dialect.name == "postgresql":
        session.connection().execute(text(f"SELECT pg_advisory_xact_lock({LOCK})"))


def _add_version(session: Session, row: EdgeModelRow, version: int | None = None) -> int:
    _take_turn(session)
    if version is None:
        newest = session.exec(select(func.max(EdgeModelRow.version))).one()
        version = 0 if newest is None else int(newest) + 1
    session.add(EdgeModelRow(**{**row.model_dump(), "version": version}))
    session.flush()
    return version


def _known(session: Session, ids: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for first in range(0, len(ids), 500):
        query = select(EdgeTaskRow.task_id).where(col(EdgeTaskRow.task_id).in_(ids[first : first + 500]))
        found |= set(session.exec(query).all())
    return found


def _has_tasks(session: Session, round_id: str | None) -> bool:
    return (
        session.exec(select(EdgeTaskRow.task_id).where(EdgeTaskRow.round_id == round_id).limit(1)).first() is not None
    )
