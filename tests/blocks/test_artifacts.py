"""The store gives back the bytes that were put, or says what is wrong; it never holds half of anything."""

import hashlib
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from minio import Minio

from blocks.artifacts import (
    MAX_RECORD_BYTES,
    AlreadyPosted,
    ArtifactStore,
    MissingArtifact,
    TamperedArtifact,
    sha256_hex,
)
from blocks.object_store import parse_url
from tests.blocks.object_server import ObjectServer

ME = "0x" + "aB" * 20
OTHER = "0x" + "cd" * 20
PATH = "a-task/00001/Submission.json"


@pytest.fixture
def directory(tmp_path):
    return ArtifactStore(root=str(tmp_path / "store"))


@pytest.fixture(params=["directory", "s3"])
def store(request):
    """The same store, once as a directory and once as a bucket of a real server, with its administrator's keys."""
    if request.param == "directory":
        return request.getfixturevalue("directory")
    server: ObjectServer = request.getfixturevalue("object_server")
    return server.store()


def inside(store: ArtifactStore) -> tuple[Minio, str]:
    """A client of the store's server beside it, and its bucket."""
    _, endpoint, bucket = parse_url(store.root)
    keys = {"access_key": store.access_key, "secret_key": store.secret_key.get_secret_value()}
    return Minio(endpoint=endpoint, secure=False, **keys), bucket


def files(store: ArtifactStore) -> list[str]:
    """Names of all that is stored, also of drafts."""
    if store.access_key is None:
        return sorted(str(path.relative_to(store.root)) for path in Path(store.root).rglob("*") if path.is_file())
    client, bucket = inside(store)
    return sorted(found.object_name for found in client.list_objects(bucket_name=bucket, recursive=True))


def only_file(store: ArtifactStore) -> str:
    (name,) = files(store)
    return name


def overwrite(store: ArtifactStore, name: str, data: bytes) -> None:
    """Change what is stored, behind the store's back."""
    if store.access_key is None:
        Path(store.root, name).write_bytes(data)
        return
    client, bucket = inside(store)
    client.put_object(bucket_name=bucket, object_name=name, data=io.BytesIO(data), length=len(data))


def written_at(store: ArtifactStore, name: str) -> object:
    if store.access_key is None:
        return Path(store.root, name).stat().st_mtime_ns
    client, bucket = inside(store)
    (found,) = client.list_objects(bucket_name=bucket, prefix=name)  # in milliseconds, where stat_object has seconds
    return found.last_modified


# Content by digest


@pytest.mark.parametrize("data", [b"", b"x", os.urandom(1 << 20)], ids=["empty", "one byte", "a megabyte"])
def test_what_was_put_comes_back(store, data):
    reference = store.put(ME, data)
    assert reference.sha256 == "0x" + hashlib.sha256(data).hexdigest() == sha256_hex(data)
    assert reference.size_bytes == len(data)
    assert reference.uri == f"artifact:{ME}/{reference.sha256}"
    assert store.get(ME, reference.sha256) == data


def test_putting_again_changes_nothing(store):
    first = store.put(ME, b"model")
    written = written_at(store, only_file(store))
    assert store.put(ME, b"model") == first
    assert written_at(store, only_file(store)) == written


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("left", [b"", b"mod", b"modeL", bytes(5)])
def test_putting_again_repairs_what_a_power_cut_left(store, left, durable):
    reference = store.put(ME, b"model", durable=durable)
    overwrite(store, only_file(store), left)
    assert store.put(ME, b"model", durable=durable) == reference
    assert store.get(ME, reference.sha256) == b"model"
    assert len(files(store)) == 1


def test_many_blobs_share_one_sync(directory, monkeypatch):
    """Each put of its own syncs file and folder; with durable=False none does, and one sync is for all."""
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(descriptor) or real(descriptor))
    for number in range(10):
        directory.put(ME, bytes([number]), durable=False)
    directory.sync()
    assert synced == []
    assert len(files(directory)) == 10
    directory.put(ME, b"at once")
    assert len(synced) == 2


def test_a_store_that_is_not_there_cannot_be_synced(directory):
    with pytest.raises(FileNotFoundError):
        directory.sync()


def test_each_owner_has_a_folder_of_its_own(store):
    reference = store.put(ME, b"model")
    with pytest.raises(MissingArtifact, match="is not in the store"):
        store.get(OTHER, reference.sha256)
    assert store.get(ME.lower(), reference.sha256) == b"model"


def test_an_unknown_digest_is_missing(store):
    with pytest.raises(MissingArtifact, match=sha256_hex(b"never")):
        store.get(ME, sha256_hex(b"never"))


@pytest.mark.parametrize("stored", [b"", b"mode", b"modeL", b"model "])
def test_truncated_or_changed_content_is_refused(store, stored):
    reference = store.put(ME, b"model")
    overwrite(store, only_file(store), stored)
    with pytest.raises(TamperedArtifact, match="truncated or changed"):
        store.get(ME, reference.sha256)


def test_content_may_be_as_large_as_allowed_and_no_larger(store):
    reference = store.put(ME, b"x" * 100)
    assert len(store.get(ME, reference.sha256, max_bytes=100)) == 100
    with pytest.raises(TamperedArtifact, match="has 100 bytes, at most 99"):
        store.get(ME, reference.sha256, max_bytes=99)


def test_oversized_content_is_not_read(directory):
    """A terabyte that exists in its size only: refused by that."""
    reference = directory.put(ME, b"x")
    with Path(directory.root, only_file(directory)).open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(TamperedArtifact, match="bytes, at most"):
        directory.get(ME, reference.sha256, max_bytes=1 << 20)


# Records by name


def test_a_posted_record_is_found(store):
    store.post(ME, PATH, b'{"a": 1}')
    assert store.find(ME, PATH) == b'{"a": 1}'
    assert store.find(OTHER, PATH) is None
    assert store.find(ME, "a-task/00002/Submission.json") is None


def test_a_record_is_written_once(store):
    store.post(ME, PATH, b"first")
    store.post(ME, PATH, b"first")
    with pytest.raises(AlreadyPosted, match="written once"):
        store.post(ME, PATH, b"second")
    assert store.find(ME, PATH) == b"first"
    assert len(files(store)) == 1


def test_a_record_may_be_as_large_as_allowed_and_no_larger(store):
    store.post(ME, PATH, b"x" * MAX_RECORD_BYTES)
    with pytest.raises(ValueError, match="put it as an artifact"):
        store.post(ME, "b.json", b"x" * (MAX_RECORD_BYTES + 1))
    assert store.find(ME, "b.json") is None


def test_a_record_that_grew_in_the_store_is_refused(store):
    store.post(ME, PATH, b"x")
    overwrite(store, only_file(store), b"x" * (MAX_RECORD_BYTES + 1))
    with pytest.raises(TamperedArtifact, match="at most"):
        store.find(ME, PATH)


def test_records_are_listed_in_order_by_owner(store):
    for path in ("t/00002/B.json", "t/00001/B.json", "t/00001/A.json"):
        store.post(ME, path, b"{}")
    store.post(OTHER, "t/00001/C.json", b"{}")
    store.put(ME, b"{}")
    assert store.list_records(ME) == ["t/00001/A.json", "t/00001/B.json", "t/00002/B.json"]
    assert store.list_records("0x" + "00" * 20) == []


def test_owners_of_a_record_are_found_in_order(store):
    """Those who posted exactly this one, whatever else is stored."""
    owners = [sha256_hex(bytes([number]))[:42] for number in range(12)]
    for owner in owners[:10]:
        store.post(owner, PATH, b"{}")
    store.post(owners[10], "a-task/00002/Submission.json", b"{}")
    store.put(owners[11], b"{}")
    assert [owner.lower() for owner in store.owners_of(PATH)] == sorted(owners[:10])
    assert store.owners_of("a-task/00001/Submission") == []
    store.post(ME.lower(), "one.json", b"{}")
    assert store.owners_of("one.json") == ["0xABaBaBaBABabABabAbAbABAbABabababaBaBABaB"]


# Names that lead elsewhere: refused before it matters where the bytes are


@pytest.mark.parametrize(
    "owner",
    ["", "..", "0x", "publisher", "0x" + "ab" * 19, "0x" + "ab" * 21, f"../{ME}", f"{ME}/..", f"{ME}\n", f"{ME}\0"],
)
def test_an_owner_that_is_no_address_is_refused(directory, owner):
    for attempt in (
        lambda: directory.put(owner, b"x"),
        lambda: directory.get(owner, sha256_hex(b"x")),
        lambda: directory.post(owner, PATH, b"x"),
        lambda: directory.find(owner, PATH),
        lambda: directory.list_records(owner),
    ):
        with pytest.raises(ValueError, match="is not an address"):
            attempt()
    assert files(directory) == []


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../other.json",
        "a/../b.json",
        "a/..",
        "..",
        ".",
        "./a.json",
        "a//b.json",
        "a/",
        ".hidden",
        "a/.draft",
        "a\\b",
        "a b",
        "a\0b",
        "a.json\n",
        "ä.json",
        "~/a.json",
        "$HOME/a",
    ],
)
def test_a_path_that_could_lead_elsewhere_is_refused(directory, path):
    with pytest.raises(ValueError, match="record path"):
        directory.post(ME, path, b"x")
    with pytest.raises(ValueError, match="record path"):
        directory.find(ME, path)
    assert files(directory) == []


@pytest.mark.parametrize(
    "digest",
    ["", "0x", "ab" * 32, "0x" + "ab" * 31, "0x" + "AB" * 32, "0x" + "../" * 21 + "x", "0x" + "ab" * 32 + "\n"],
)
def test_a_digest_that_is_none_is_refused(directory, digest):
    with pytest.raises(ValueError, match="hex digits"):
        directory.get(ME, digest)


# Many at once, killed, full


def at_once(work, count: int) -> list[Exception | None]:
    """Run work(i) on `count` threads that start together; what each raised."""
    gate = threading.Barrier(count)
    outcomes: list[Exception | None] = [None] * count

    def run(index: int) -> None:
        gate.wait()
        try:
            work(index)
        except Exception as error:
            outcomes[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_many_may_put_the_same_at_once(store):
    data = os.urandom(200_000)
    assert at_once(lambda _: store.put(ME, data), 16) == [None] * 16
    assert store.get(ME, sha256_hex(data)) == data
    assert len(files(store)) == 1


def test_of_many_different_records_at_once_one_stays_whole(directory):
    records = [bytes([index]) * 50_000 for index in range(16)]
    outcomes = at_once(lambda index: directory.post(ME, PATH, records[index]), 16)
    assert outcomes.count(None) == 1
    assert all(isinstance(error, AlreadyPosted) for error in outcomes if error is not None)
    assert directory.find(ME, PATH) == records[outcomes.index(None)]
    assert len(files(directory)) == 1


# The parent has used the store, and its connections, before each child does.
KILLED = """
import os, signal, sys, time
from blocks.artifacts import ArtifactStore
root, access_key, secret_key = [setting or None for setting in sys.stdin.read().split(",")]
store = ArtifactStore(root=root, access_key=access_key, secret_key=secret_key)
for attempt in range(10):
    store.post("0x" + "ab" * 20, "t/parent.json", b"x")
    pid = os.fork()
    if pid == 0:
        for number in range(10**9):
            data = number.to_bytes(8, "big") * 40_000
            store.put("0x" + "ab" * 20, data, durable=number % 2 == 0)
            store.post("0x" + "ab" * 20, f"t/{number:05d}/R.json", data[:200_000])
    time.sleep(0.05 + 0.011 * attempt)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""


def test_a_killed_writer_leaves_nothing_half_written(store):
    settings = (store.root, store.access_key or "", store.secret_key.get_secret_value() if store.secret_key else "")
    subprocess.run([sys.executable, "-c", KILLED], input=",".join(settings), text=True, check=True)
    blobs = [name for name in map(Path, files(store)) if "blobs" in name.parts and not name.name.startswith(".")]
    assert blobs
    assert all(store.get(ME, f"0x{name.name}") for name in blobs)
    posted = store.list_records(ME)
    posted.remove("t/parent.json")
    assert posted
    assert all(store.find(ME, path) == int(path[2:7]).to_bytes(8, "big") * 25_000 for path in posted)


FULL = """
import resource, signal, sys
from blocks.artifacts import ArtifactStore
store = ArtifactStore(root=sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
me, data = "0x" + "ab" * 20, b"x" * 150_000
for write in (lambda: store.put(me, data), lambda: store.post(me, "a.json", data)):
    try:
        write()
    except OSError as error:
        print(type(error).__name__, error.errno, flush=True)
store.put("0x" + "ab" * 20, b"small")
"""


def test_a_write_that_the_system_cuts_short_leaves_nothing(directory):
    """A file-size limit in place of a full disk: the write fails midway, with part of the bytes on disk."""
    done = subprocess.run([sys.executable, "-c", FULL, directory.root], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["OSError", "27"] * 2  # EFBIG
    assert Path(directory.root, only_file(directory)).read_bytes() == b"small"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB, where the tests may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting needs privileges that this machine does not give")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_nothing_half_written_and_heals(small_disk):
    store = ArtifactStore(root=str(small_disk))
    kept = store.put(ME, b"k" * 100_000)
    with pytest.raises(OSError, match="No space left"):
        store.put(ME, b"x" * 300_000)
    with pytest.raises(OSError, match="No space left"):
        store.post(ME, PATH, b"x" * 250_000)
    assert len(files(store)) == 1
    assert store.find(ME, PATH) is None
    assert store.get(ME, kept.sha256) == b"k" * 100_000
    Path(store.root, only_file(store)).unlink()
    store.post(ME, PATH, b"x" * 200_000)
    assert store.find(ME, PATH) == b"x" * 200_000


def test_a_store_without_permission_says_so(directory):
    Path(directory.root).write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        directory.put(ME, b"x")
