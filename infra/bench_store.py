"""What an artifact store takes: MiB/s of large objects, milliseconds of small records. Through the store's own verbs.

A row is of the fastest of some repetitions: what is slower was disturbed by others on the machine.
"""

import secrets
import time
from collections.abc import Callable

from blocks.artifacts import ArtifactStore
from infra.rows import Row

LARGE_BYTES = 1 << 26
RECORD = b'{"fields": "' + b"0" * 700 + b'"}'
OWNERS = 100
REPEATS = 5


def measure(store: ArtifactStore, where: str, owner: str | None = None) -> list[Row]:
    """Rows of one store, named after `where` it is. `store` may write as any owner, unless `owner` is given: then as this one.

    What is written stays, 0.3 GB of it: give it a store of its own. Takes some ten seconds.
    """
    writer = owner or f"0x{secrets.token_hex(20)}"
    rows = [*_large(store, where, writer), *_records(store, where, writer)]
    return rows if owner else [*rows, _owners_of(store, where)]


def _large(store: ArtifactStore, where: str, owner: str) -> list[Row]:
    """Objects are random and each is another, so that nothing is compressed or already there; read ones are checked by digest."""
    contents = [secrets.token_bytes(LARGE_BYTES) for _ in range(REPEATS)]
    digests = []
    put_s = _fastest(lambda index: digests.append(store.put(owner, contents[index]).sha256), REPEATS)
    get_s = _fastest(lambda index: store.get(owner, digests[index]), REPEATS)
    mib = LARGE_BYTES / 1024**2
    return [
        Row(f"put 64 MiB, {where}", mib / put_s, "MiB/s"),
        Row(f"get 64 MiB, {where}", mib / get_s, "MiB/s"),
    ]


def _records(store: ArtifactStore, where: str, owner: str) -> list[Row]:
    prefix = secrets.token_hex(4)
    post_s = _fastest(lambda index: store.post(owner, f"{prefix}/{index}/R.json", RECORD), 10 * REPEATS)
    find_s = _fastest(lambda index: store.find(owner, f"{prefix}/{index}/R.json"), 10 * REPEATS)
    return [Row(f"post a record, {where}", 1000 * post_s, "ms"), Row(f"find a record, {where}", 1000 * find_s, "ms")]


def _owners_of(store: ArtifactStore, where: str) -> Row:
    path = f"{secrets.token_hex(4)}/R.json"
    for number in range(OWNERS):
        store.post(f"0x{number:040x}", path, RECORD)
    found_s = _fastest(lambda _: store.owners_of(path), REPEATS)
    return Row(f"owners of a record, {OWNERS}, {where}", 1000 * found_s, "ms")


def _fastest(work: Callable[[int], object], repeats: int) -> float:
    """Seconds of the fastest call among work(0), work(1), ..."""
    spent = []
    for index in range(repeats):
        started = time.perf_counter()
        work(index)
        spent.append(time.perf_counter() - started)
    return min(spent)
