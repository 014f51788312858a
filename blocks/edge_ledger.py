"""What happened in rounds over edge devices, durable: experiments, rounds, updates, devices, model versions.

The tables are in the registry's database; what is large is in the artifact store, named by its SHA-256. A round is changed in
one transaction that holds its row, so that of several who would close it exactly one does, and a version is allocated where it
is written: versions count up, are written once and never given twice, whoever restarts. The head is the version of the round that
was opened last: a round that is combined later than its followers makes a version, and not the one from which training goes on.

Bytes that nothing names any longer are removed; what a kill leaves between the store and the database stays.

What is received here was read and judged before (tasks.edge.wire, tasks.edge.rounds). Moments are arguments.

Errors: UnknownRound, UnknownModel, AlreadyWritten; TamperedArtifact for bytes that are not what was written.
"""

import hashlib
import json
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar
from uuid import NAMESPACE_URL, uuid5

from sqlalchemy import delete, func, or_, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import defer
from sqlmodel import Session, SQLModel, col, select

from blocks.artifacts import ArtifactStore, TamperedArtifact
from blocks.registry import Registry
from blocks.tables import (
    EdgeBlobRow,
    EdgeDeviceRow,
    EdgeDroppedRow,
    EdgeExperimentRow,
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
# PostgreSQL's advisory locks: of whoever allocates a version, takes names of rounds, names or removes bytes of the store.
VERSIONS_LOCK, NAMES_LOCK, BYTES_LOCK = 0x45646765, 0x45646766, 0x45646767
DROPPED_MAX = 8  # remembered of one device in one round
WRITES = 4  # attempts, when another process writes a row of the same key at the same moment
PENDING, RUNNING, DONE, BROKEN = 0, 2, 3, 4  # states of a task
BODY: Any = EdgeModelRow.body  # of a version: many megabytes together, so listings leave it out
R = TypeVar("R", bound=SQLModel)
T = TypeVar("T")


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

    def record_experiment(
        self,
        experiment_id: str,
        request: str,
        at: datetime,
        *,
        first_round: str = "",
        rounds: int = 1,
        series: str = "",
    ) -> None:
        """Remember a request, and that the names of its rounds are taken; the same again changes nothing.

        first_round: the experiment's own name unless given; the others are it with their number. Raises AlreadyWritten for
        another request of this name, and for a name of a round that another experiment has or will have.
        """
        digest = hashlib.sha256(request.encode()).hexdigest()
        asked: dict[str, Any] = {"experiment_id": experiment_id, "digest": digest, "request": request, "created_at": at}
        asked |= {"first_round": first_round or experiment_id, "rounds": rounds, "series": series}

        def write(session: Session) -> tuple[str, str]:
            _take_turn(session, NAMES_LOCK)
            found = session.get(EdgeExperimentRow, experiment_id)
            if found is not None:
                return found.digest, ""
            row = EdgeExperimentRow(**asked)
            if rival := _rival(session, row):
                return digest, rival
            session.add(row)
            return digest, ""

        written, rival = self._change(write)
        if rival:
            raise AlreadyWritten(
                f"round {asked['first_round']}, or one that follows it, is of experiment {rival}: give it another round_id"
            )
        if written != digest:
            raise AlreadyWritten(f"experiment {experiment_id} was configured otherwise before: give it another id")

    def experiment(self, experiment_id: str) -> EdgeExperimentRow | None:
        return self.registry.read(lambda session: session.get(EdgeExperimentRow, experiment_id))

    def series(self, name: str) -> list[EdgeExperimentRow]:
        """The experiments that a schedule of this name has asked for, in order."""
        found = self._all(select(EdgeExperimentRow).where(EdgeExperimentRow.series == name))
        return sorted(found, key=lambda row: (row.created_at, row.experiment_id))

    def unended(self) -> list[str]:
        """Experiments that have begun, and whose run has not said that they are over."""
        begun = col(EdgeExperimentRow.experiment_id).in_(select(EdgeRoundRow.experiment_id))
        under_way = col(EdgeExperimentRow.ended_at).is_(None)
        return sorted(self._all(select(EdgeExperimentRow.experiment_id).where(under_way, begun)))

    def end_experiment(self, experiment_id: str, at: datetime) -> None:
        """Nothing conducts it from here on. The first moment stays."""

        def write(session: Session) -> None:
            row = session.get(EdgeExperimentRow, experiment_id)
            if row is not None and row.ended_at is None:
                row.ended_at = at

        self._change(write)

    def newest_experiments(self, most: int) -> list[str]:
        """Those whose rounds were opened last."""
        newest = func.max(EdgeRoundRow.opened_at).desc()
        query = select(EdgeRoundRow.experiment_id).group_by(col(EdgeRoundRow.experiment_id)).order_by(newest)
        return self._all(query.limit(most))

    def open_round(self, row: EdgeRoundRow) -> EdgeRoundRow:
        """Open a round; the one that was opened before under this name, where there is one. Raises AlreadyWritten."""

        def write(session: Session) -> EdgeRoundRow:
            found = session.get(EdgeRoundRow, row.round_id)
            if found is None:
                session.add(found := EdgeRoundRow(**row.model_dump()))
                session.flush()
            return _free(session, found)

        found = self._change(write)
        if (found.experiment_id, found.number) != (row.experiment_id, row.number):
            raise AlreadyWritten(f"round {row.round_id} is of experiment {found.experiment_id}: give it another id")
        return found

    def start_clock(self, round_id: str, at: datetime) -> EdgeRoundRow:
        """Have the deadline count from here; a clock that runs already stays. Raises UnknownRound."""

        def write(session: Session) -> EdgeRoundRow:
            round_ = _lock(session, round_id)
            if round_.started_at is None:
                round_.started_at, round_.deadline_at = at, at + timedelta(seconds=round_.timeout_s)
            return _free(session, round_)

        return self._change(write)

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

    def count_rounds(self) -> dict[str, int]:
        """Rounds by how they stand."""
        return dict(self._all(select(EdgeRoundRow.status, func.count()).group_by(EdgeRoundRow.status)))

    def head(self, experiment_id: str | None = None) -> EdgeRoundRow | None:
        """Of the rounds that made a version the one that was opened last; of one experiment, or of all."""
        return self.registry.read(lambda session: _head(session, experiment_id))

    def receive(self, row: EdgeUpdateRow, body: bytes | None) -> Received:
        """Take an update into its round, in place of an earlier one of its sender; the k-th closes the round.

        Of one that comes after the closing, or that is replaced, only that it was there is kept; one that was taken before
        and comes again is not late. Raises UnknownRound.
        """
        if body is not None and len(body) > SMALL_BYTES:
            row.sha256 = _sha256(body)
            if self.close_if_due(row.round_id, row.received_at).status == OPEN:
                self.store.put(self.owner, body)  # others wait for the transaction, which finds it there
        elif body is not None:
            row.body = body.decode()

        def write(session: Session) -> tuple[Received, str | None]:
            round_ = _lock(session, row.round_id)
            _close_if_due(round_, row.received_at)
            before = session.get(EdgeUpdateRow, (row.round_id, row.proplet_id))
            kind = _kind_of(round_, before, row)
            if kind == "late":
                _drop(session, row, kind, _sha256(body) if body is not None else "", len(body or b""))
            if kind != "accepted":
                return Received(kind, _count(session, row.round_id), _free(session, round_)), row.sha256
            if before is not None:
                _drop(session, before, "replaced", *self._measure(before))
            left = None if before is None else before.sha256
            if row.sha256 is not None:
                self._hold(session, row.sha256, body or b"")
            session.merge(EdgeUpdateRow(**row.model_dump()))
            session.flush()
            count = _count(session, row.round_id)
            if count >= round_.k_of_n:
                _close(round_, "k", row.received_at, row.proplet_id)
            return Received("accepted", count, _free(session, round_)), left

        received, left = self._change(write)
        self.discard(left)
        return received

    def close_if_due(self, round_id: str, now: datetime, closer: str = "") -> EdgeRoundRow:
        """Close a round whose deadline has passed; the round as it stands then. Raises UnknownRound."""
        if not _is_due(seen := self.round(round_id), now):
            return seen

        def write(session: Session) -> EdgeRoundRow:
            round_ = _lock(session, round_id)
            _close_if_due(round_, now, closer)
            return _free(session, round_)

        return self._change(write)

    def updates(self, round_id: str) -> list[EdgeUpdateRow]:
        """By sender, those with an error among them."""
        return sorted(
            self._all(select(EdgeUpdateRow).where(EdgeUpdateRow.round_id == round_id)), key=lambda row: row.proplet_id
        )

    def answered(self, round_id: str) -> set[str]:
        """Who has sent an update, or an error."""
        return set(self._all(select(EdgeUpdateRow.proplet_id).where(EdgeUpdateRow.round_id == round_id)))

    def measured(self, round_id: str) -> list[tuple[int, str]]:
        """The samples and the metrics (JSON) of each update without an error, by sender."""
        query = select(EdgeUpdateRow.proplet_id, EdgeUpdateRow.num_samples, EdgeUpdateRow.metrics)
        found = self._all(query.where(EdgeUpdateRow.round_id == round_id, EdgeUpdateRow.error == ""))
        return [(samples, metrics) for _, samples, metrics in sorted(tuple(one) for one in found)]

    def dropped(self, round_id: str) -> list[EdgeDroppedRow]:
        """What came late or was replaced; of each device the last DROPPED_MAX."""
        return self._all(select(EdgeDroppedRow).where(EdgeDroppedRow.round_id == round_id))

    def count(self, round_id: str) -> int:
        """Updates without an error."""
        return self.registry.read(lambda session: _count(session, round_id))

    def body_of(self, row: EdgeUpdateRow) -> bytes:
        """The model of an update, as it was put. Raises TamperedArtifact."""
        return row.body.encode() if row.body is not None else self.store.get(self.owner, row.sha256 or "")

    def end_round(self, round_id: str, status: str, detail: str, at: datetime) -> EdgeRoundRow:
        """A round without a version: FAILED, or COMPLETED_WITH_WARNING. One that has ended well stays as it is.

        One that is open is closed by it: it was abandoned.
        """

        def write(session: Session) -> EdgeRoundRow:
            round_ = _lock(session, round_id)
            if round_.status == OPEN:
                _close(round_, "abandoned", at, "")
            if round_.version is None:
                round_.status, round_.detail, round_.completed_at = status, detail[:2000], at
            return _free(session, round_)

        return self._change(write)

    def complete(self, model: EdgeModelRow, data: bytes, topic: str, notice: Mapping[str, Any]) -> EdgeRoundRow:
        """Write the version of a closed round, end the round, and leave a notice to be published: all of it, once.

        The version is the next free one. The notice gets it as new_model_version, and how the round ended. A round that has a
        version keeps it.
        """
        row = self._placed(model, data)

        def write(session: Session) -> EdgeRoundRow:
            round_ = _lock(session, row.round_id or "")
            if round_.version is not None:
                return _free(session, round_)
            if round_.status == OPEN:
                raise ValueError(f"round {row.round_id} is open: close it first")
            _take_turn(session, VERSIONS_LOCK)  # before that of the bytes, as everywhere
            self._hold_model(session, row, data)
            version = _add_version(session, row)
            round_.status, round_.version, round_.completed_at = COMPLETED, version, row.created_at
            session.flush()
            said = {**notice, **_ending(session, round_)}
            round_.detail = said["detail"]
            session.add(EdgeMessageRow(topic=topic, payload=json.dumps(said, sort_keys=True), made_at=row.created_at))
            return _free(session, round_)

        return self._change(write)

    # Model versions

    def put_model(self, row: EdgeModelRow, data: bytes, *, version: int | None = None) -> int:
        """Write a version that no round made; the next free one where none is given. Raises AlreadyWritten.

        The same bytes under the same version change nothing.
        """
        placed = self._placed(row, data)

        def write(session: Session) -> tuple[int, str]:
            _take_turn(session, VERSIONS_LOCK)
            found = None if version is None else session.get(EdgeModelRow, version)
            if found is not None:
                return found.version, found.sha256
            self._hold_model(session, placed, data)
            return _add_version(session, placed, version), placed.sha256

        written, sha256 = self._change(write)
        if sha256 != placed.sha256:
            self.discard(placed.sha256 if placed.body is None else None)
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

    def described(self, version: int) -> EdgeModelRow:
        """As `model`, without the body, which may be large."""
        found = self._all(_bodiless().where(EdgeModelRow.version == version)) if 0 <= version < 2**31 else []
        if not found:
            raise UnknownModel("Model not found")
        row: EdgeModelRow = found[0]
        return row

    def models(self) -> list[EdgeModelRow]:
        """Without their bodies."""
        return self._all(_bodiless().order_by(col(EdgeModelRow.version)))

    def versions(self) -> list[int]:
        return self._all(select(EdgeModelRow.version).order_by(col(EdgeModelRow.version)))

    def newest_version(self) -> int | None:
        return self.registry.read(lambda session: session.exec(select(func.max(EdgeModelRow.version))).one())

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
        kept = self.described(version).state_sha256
        return None if kept is None else self.store.get(self.owner, kept)

    def pin(self, name: str, version: int, at: datetime) -> EdgeModelRow:
        """Let a name stand for a version; what it stood for before is kept for `roll_back`. Raises UnknownModel."""
        found = self.model(version)
        if (standing := self._pins(name)) and standing[-1].version == _pinned_name(version):
            return found
        row = PinRow(name=PIN_FOLDER + name, version=_pinned_name(version), pinned_at=at)
        self._change(lambda session: session.add(row))
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
        self._change(lambda session: session.execute(undone) and None)
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

    def _hold_model(self, session: Session, row: EdgeModelRow, data: bytes) -> None:
        if row.body is None:
            self._hold(session, row.sha256, data)

    # Bytes in the store

    def discard(self, sha256: str | None) -> None:
        """Remove bytes that nothing names any longer. A store that does not let them go keeps them."""

        def remove(session: Session) -> None:
            _take_turn(session, BYTES_LOCK)
            if sha256 and not _is_named(session, sha256):
                with suppress(OSError):
                    self.store.remove(self.owner, sha256)

        if sha256:
            self._change(remove)

    def _hold(self, session: Session, sha256: str, data: bytes) -> None:
        """Have bytes in the store that the transaction is about to name; nobody removes them before it has."""
        _take_turn(session, BYTES_LOCK)
        if self.store.size(self.owner, sha256) is None:
            self.store.put(self.owner, data)

    def _measure(self, row: EdgeUpdateRow) -> tuple[str, int]:
        """Digest and size of an update's model."""
        if row.body is not None:
            return _sha256(row.body.encode()), len(row.body.encode())
        return row.sha256 or "", (self.store.size(self.owner, row.sha256) or 0) if row.sha256 else 0

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

        self._change(write)

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

        return self._change(write) if tasks else 0

    def put_task(self, row: EdgeTaskRow, messages: Iterable[tuple[str, str]] = ()) -> None:
        """Write a task as it stands, and leave messages to be published."""

        def write(session: Session) -> None:
            session.merge(EdgeTaskRow(**row.model_dump()))
            session.add_all(
                EdgeMessageRow(topic=topic, payload=said, made_at=row.changed_at) for topic, said in messages
            )

        self._change(write)

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

    def waiting(self, upto: int | None = None) -> int:
        """How many messages nobody has published; upto: those that were there when it was `last_message`."""
        query = select(func.count()).select_from(EdgeMessageRow).where(col(EdgeMessageRow.sent_at).is_(None))
        query = query if upto is None else query.where(col(EdgeMessageRow.id) <= upto)
        return int(self.registry.read(lambda session: session.exec(query).one()))

    def last_message(self) -> int:
        return self.registry.read(lambda session: session.exec(select(func.max(EdgeMessageRow.id))).one()) or 0

    def leave(self, topic: str, payload: str, at: datetime) -> None:
        """Leave a message to be published."""
        row = EdgeMessageRow(topic=topic, payload=payload, made_at=at)
        self._change(lambda session: session.add(row))

    def mark_sent(self, ids: Sequence[int], at: datetime) -> None:
        """So that what the broker has taken is not published again."""
        done = update(EdgeMessageRow).where(col(EdgeMessageRow.id).in_(ids)).values(sent_at=at)
        self._change(lambda session: session.execute(done) and None)

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
        """Keep bytes under a name, in place of earlier ones, which are removed."""
        sha256 = self.store.put(self.owner, data).sha256

        def write(session: Session) -> tuple[EdgeBlobRow, str | None]:
            before = session.get(EdgeBlobRow, (kind, name))
            left = None if before is None or before.sha256 == sha256 else before.sha256
            self._hold(session, sha256, data)
            row = EdgeBlobRow(kind=kind, name=name, sha256=sha256, size_bytes=len(data))
            return _free(session, session.merge(row)), left

        row, left = self._change(write)
        self.discard(left)
        return row

    def blob(self, kind: str, name: str) -> EdgeBlobRow | None:
        return self.registry.read(lambda session: session.get(EdgeBlobRow, (kind, name)))

    def blobs(self, kind: str) -> list[EdgeBlobRow]:
        return sorted(self._all(select(EdgeBlobRow).where(EdgeBlobRow.kind == kind)), key=lambda row: row.name)

    def blob_bytes(self, row: EdgeBlobRow) -> bytes:
        """Raises MissingArtifact or TamperedArtifact."""
        return self.store.get(self.owner, row.sha256)

    def _all(self, query: Any) -> list[Any]:
        return self.registry.read(lambda session: list(session.exec(query).all()))

    def _change(self, work: Callable[[Session], T]) -> T:
        """Do the work in one transaction; again where another process has just written a row of the same key.

        SQLite lets one writer in after the other. On PostgreSQL two that both found no row would both insert it; the second
        one finds it when it does its work again.
        """
        for _ in range(1, WRITES):
            with suppress(IntegrityError):
                return self.registry.change(work)
        return self.registry.change(work)


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


def _is_due(round_: EdgeRoundRow, now: datetime) -> bool:
    return round_.status == OPEN and round_.started_at is not None and now >= round_.deadline_at


def _close_if_due(round_: EdgeRoundRow, now: datetime, closer: str = "") -> None:
    if _is_due(round_, now):
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


def _kind_of(round_: EdgeRoundRow, before: EdgeUpdateRow | None, row: EdgeUpdateRow) -> str:
    if before is not None and before.digest == row.digest:
        return "repeated"
    return "accepted" if round_.status == OPEN else "late"


def _drop(session: Session, row: EdgeUpdateRow, reason: str, sha256: str, size_bytes: int) -> None:
    """Remember of an update that it was there; of each device the last ones, so that nobody fills the disk."""
    known = {name: getattr(row, name) for name in ("round_id", "proplet_id", "digest", "num_samples", "received_at")}
    session.merge(EdgeDroppedRow(**known, sha256=sha256, size_bytes=size_bytes, reason=reason))
    session.flush()
    of_device = (EdgeDroppedRow.round_id == row.round_id, EdgeDroppedRow.proplet_id == row.proplet_id)
    newest = select(EdgeDroppedRow).where(*of_device).order_by(col(EdgeDroppedRow.received_at).desc())
    for old in session.exec(newest.offset(DROPPED_MAX)).all():
        session.delete(old)


def _head(session: Session, experiment_id: str | None = None) -> EdgeRoundRow | None:
    query = select(EdgeRoundRow).where(col(EdgeRoundRow.version).is_not(None))
    query = query if experiment_id is None else query.where(EdgeRoundRow.experiment_id == experiment_id)
    order = [col(one).desc() for one in (EdgeRoundRow.opened_at, EdgeRoundRow.number, EdgeRoundRow.version)]
    return session.exec(query.order_by(*order).limit(1)).first()


def _ending(session: Session, round_: EdgeRoundRow) -> dict[str, Any]:
    """What the notice of a new version says of it. head: the version from which training goes on, of the same experiment."""
    count, head = _count(session, round_.round_id), _head(session, round_.experiment_id) or round_
    remarks = [f"{count} of {round_.k_of_n} updates came"] if count < round_.k_of_n else []
    if head.round_id != round_.round_id:
        remarks.append(f"round {head.round_id} trained without it, and training goes on from version {head.version}")
    return {
        "new_model_version": round_.version,
        "model_uri": f"fl/models/global_model_v{round_.version}",
        "num_updates": count,
        "k_of_n": round_.k_of_n,
        "partial": count < round_.k_of_n,
        "head": head.version,
        "detail": "; ".join(remarks),
    }


def _rival(session: Session, row: EdgeExperimentRow) -> str | None:
    """Another experiment that has, or will have, a round of one of the names of this one's."""
    stem, _, _ = row.first_round.rpartition(".")
    theirs, others = col(EdgeExperimentRow.first_round), col(EdgeExperimentRow.experiment_id) != row.experiment_id
    near = or_(theirs.in_([row.first_round, stem]), theirs.startswith(row.first_round + ".", autoescape=True))
    for other in session.exec(select(EdgeExperimentRow).where(others, near)).all():
        follows = _follows(row.first_round, other) or _follows(other.first_round, row)
        if follows or other.first_round == row.first_round:
            return other.experiment_id
    return None


def _follows(name: str, row: EdgeExperimentRow) -> bool:
    """Whether a round of this name is a later one of the experiment."""
    stem, _, number = name.rpartition(".")
    return (
        stem == row.first_round and number.isdecimal() and str(int(number)) == number and 2 <= int(number) <= row.rounds
    )


def _is_named(session: Session, sha256: str) -> bool:
    """Whether bytes of the store belong to anything here."""
    named = (EdgeUpdateRow.sha256, EdgeModelRow.sha256, EdgeModelRow.state_sha256, EdgeBlobRow.sha256)
    return any(session.exec(select(one).where(col(one) == sha256).limit(1)).first() is not None for one in named)


def _bodiless() -> Any:
    return select(EdgeModelRow).options(defer(BODY, raiseload=True))


def _take_turn(session: Session, lock: int) -> None:
    """Until the end of the transaction nobody else has this turn; on SQLite one writes at a time anyway."""
    if session.get_bind().dialect.name == "postgresql":
        session.connection().execute(text(f"SELECT pg_advisory_xact_lock({lock})"))


def _add_version(session: Session, row: EdgeModelRow, version: int | None = None) -> int:
    _take_turn(session, VERSIONS_LOCK)
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
