"""The registry's content from chain and store: followed while a task runs, or built again from nothing.

Both ways end in the same rows (blocks.derived): a running task's records are remembered as they are answered, and when it is
concluded, what nobody was asked for (a late submission, a stranger's registration) is read from the store as a rebuild reads it.
A registry holds the tasks of its publishers: the actors of that role.

Errors: BadRecord.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

from eth_utils.address import to_checksum_address
from pydantic import SecretStr

from blocks.artifacts import ArtifactStore, MissingArtifact, TamperedArtifact, sha256_hex
from blocks.chain import Chain
from blocks.derived import members
from blocks.registry import Registry
from contracts import bindings, messages
from contracts.messages import Address, Announcement, Cohort, Message, Receipt, Refusal, Registration
from contracts.task_spec import PublishedTask
from tasks.records import BadRecord, Station, brief, check_record, give_up, parse_json, record_path, terms_path

MAX_ROUND = 10_000  # of any task (contracts.task_spec)
MAX_REASON = 2000
ENDED = ("PAID", "REFUNDED")

Progress = Callable[[int, int, str], None]
"""Told how many of how many tasks are done, and which one comes next."""


# While a task runs


def remember(
    registry: Registry, chain: Chain, store: ArtifactStore, message: Message, reference: dict[str, str]
) -> None:
    """Remember an actor's answer, a checked record, and what it did on chain. Raises BadRecord when it is not named as agreed."""
    check_name(message, reference["path"])
    if isinstance(message, Announcement | Cohort | Receipt):
        follow_chain(registry, chain)
    if isinstance(message, Announcement):
        _index_terms(registry, store, message.task_id)
    registry.record(
        message, signer=to_checksum_address(reference["owner"]), path=reference["path"], sha256=reference["sha256"]
    )


def refuse(
    st: Station, registry: Registry, task_id: str, round_number: int, step: str, address: Address, reason: str
) -> None:
    """The publisher goes on without an actor: say so, signed, and remember it. The first reason for a step stays."""
    about = f"{step}-{address}"
    refusal = st.mine(Refusal, task_id, round_number, about=about) or Refusal(
        task_id=task_id,
        round_number=round_number,
        publisher=st.address,
        step=step,
        actor=address,
        reason=reason[:MAX_REASON],
    )
    remember(registry, st.chain, st.store, refusal, st.post(refusal, about=about))


def declare_over(st: Station, registry: Registry, task_id: str, reason: messages.AbortReason, detail: str) -> None:
    """The publisher ends a task that nobody else gave up, signed."""
    reference = give_up(st, task_id, 0, "run-task", reason, detail[:MAX_REASON])
    said = st.mine(messages.Abort, task_id)
    if said is not None:
        remember(registry, st.chain, st.store, said, reference)


def catch_up(registry: Registry, chain: Chain, store: ArtifactStore, task_id: str) -> str | None:
    """Remember all that chain and store say about a task; return where it stands, None when the chain has no such task."""
    follow_chain(registry, chain)
    if registry.find_task(task_id) is None:
        return None
    index_task(registry, chain, store, task_id)
    task = registry.find_task(task_id)
    return None if task is None else task.status


# From nothing


def reindex(
    registry: Registry, chain: Chain, store: ArtifactStore, publisher: Address, progress: Progress
) -> dict[str, int]:
    """Build the index again and put it in the place of the old one, at once; tasks by status.

    Names of actors, times of steps and pins stay as they are. What happened while this took its time is caught up with.
    """
    if publisher not in [row.address for row in registry.actors("publisher")]:
        registry.record_actor(publisher, publisher, "publisher")
    with tempfile.TemporaryDirectory(prefix="healchain-reindex-") as folder:
        rebuilt = Registry(url=SecretStr(f"sqlite:///{Path(folder) / 'index.sqlite'}"))
        for row in registry.actors():
            rebuilt.record_actor(row.name, row.address, row.role)
        follow_chain(rebuilt, chain)
        tasks = rebuilt.tasks()
        for number, task in enumerate(tasks):
            progress(number, len(tasks), task.task_id)
            index_task(rebuilt, chain, store, task.task_id)
        registry.replace_index(rebuilt)
    progress(len(tasks), len(tasks), "")
    follow_chain(registry, chain)
    standing: dict[str, int] = {}
    for task in registry.tasks():
        status = task.status if task.status in ENDED else catch_up(registry, chain, store, task.task_id) or task.status
        standing[status] = standing.get(status, 0) + 1
    return standing


def follow_chain(registry: Registry, chain: Chain) -> None:
    """Remember the final events since the newest that is remembered: those of the publishers' tasks and of their parties."""
    publishers = {row.address for row in registry.actors("publisher")}
    task_ids = {bindings.task_key(task.task_id): task.task_id for task in registry.tasks()}
    parties = publishers | registry.parties()
    newest = registry.last_event()
    for found in chain.history(newest[0]):
        if (found.block_number, found.log_index) <= newest:
            continue
        event = found.event
        if isinstance(event, bindings.TaskPublished) and event.publisher in publishers:
            task_ids[event.task_key] = event.task_id
        task_id = task_ids.get(getattr(event, "task_key", ""))
        if task_id is not None or (not hasattr(event, "task_key") and _account_of(event) in parties):
            registry.record_event(found, task_id)
        if task_id is not None and isinstance(event, bindings.RegistrationClosed):
            parties |= set(members(event))


def _account_of(event: object) -> Address:
    """Whose stake or balance an event is about that is about no task."""
    return str(getattr(event, "miner", "") or getattr(event, "account", ""))


def index_task(registry: Registry, chain: Chain, store: ArtifactStore, task_id: str) -> None:
    """Remember every signed record about a task that is not remembered yet; one that cannot be believed is refused."""
    task = registry.find_task(task_id)
    if task is None:
        raise ValueError(f"task {task_id!r} is not known here: follow the chain first")
    if not task.terms:
        try:
            _index_terms(registry, store, task_id)
        except (BadRecord, MissingArtifact) as error:
            registry.record_refusal(task_id, 0, "record terms", task.publisher, brief(error))
    known = {(row.signer, row.path) for row in registry.records(task_id)}
    applicants = store.owners_of(record_path(Registration, task_id, 0))
    for owner in dict.fromkeys([task.publisher, *applicants]):
        for path in store.list_records(owner):
            if path.startswith(f"{task_id}/") and path != terms_path(task_id) and (owner, path) not in known:
                _index_record(registry, chain, store, owner, path)


def _index_record(registry: Registry, chain: Chain, store: ArtifactStore, owner: Address, path: str) -> None:
    task_id, _, rest = path.partition("/")
    folder, _, name = rest.partition("/")
    number = int(folder) if folder.isdigit() and len(folder) == 5 else 0
    try:
        kind = _kind_of(name)
        data = store.find(owner, path) or b""
        message, _ = check_record(kind, data, chain.domain, owner, task_id, number)
        check_name(message, path)
        registry.record(message, signer=owner, path=path, sha256=sha256_hex(data))
    except (BadRecord, TamperedArtifact) as error:
        registry.record_refusal(task_id, min(number, MAX_ROUND), f"record {name}", owner, brief(error))


def _kind_of(name: str) -> type[Message]:
    """The kind of record that a file's name announces. Raises BadRecord."""
    kind = getattr(messages, name.removesuffix(".json").partition("-")[0], None)
    if not (isinstance(kind, type) and issubclass(kind, Message)):
        raise BadRecord(f"{name!r} names no kind of record")
    return kind


def check_name(message: Message, path: str) -> None:
    """Raise BadRecord unless a record is under its agreed name: under another one it would be a second word on the same."""
    agreed = record_path(type(message), message.task_id, message.round_number, _about(message))
    if path != agreed or message.round_number > MAX_ROUND:
        raise BadRecord(
            f"{type(message).__name__} of round {message.round_number} is posted as {path}, agreed is {agreed}"
        )


def _about(message: Message) -> str | None:
    """What distinguishes records of one kind by one signer in one round."""
    match message:
        case messages.Challenge():
            return message.miner
        case messages.Delivery():
            return message.recipient
        case messages.Receipt():
            return message.step
        case messages.Refusal():
            return f"{message.step}-{message.actor}"
    return None


def _index_terms(registry: Registry, store: ArtifactStore, task_id: str) -> None:
    """Remember the terms that the chain has the hash of. Raises BadRecord or MissingArtifact."""
    task = registry.find_task(task_id)
    if task is None:
        raise BadRecord(f"task {task_id} is not on chain as one of this registry's publishers")
    data = store.find(task.publisher, terms_path(task_id))
    if data is None:
        raise MissingArtifact(f"the terms of {task_id} are not in the store of its publisher {task.publisher}")
    try:
        terms = PublishedTask.model_validate(parse_json(data))
    except ValueError as error:
        raise BadRecord(f"the terms of {task_id} cannot be read: {brief(error)}") from error
    if terms.spec_hash() != task.spec_hash:
        raise BadRecord(f"the terms of {task_id} hash to {terms.spec_hash()}, on chain it is {task.spec_hash}")
    start = terms.spec.model.start
    registry.record_terms(task_id, terms.encode().decode(), None if start is None else start.sha256)
