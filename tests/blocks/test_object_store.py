"""A bucket on a real server: who may do what, what a server that is away or lies can do, and that nothing leaks."""

import io
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partialmethod
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from minio import Minio, MinioAdmin
from minio.commonconfig import CopySource
from minio.credentials.providers import StaticProvider
from minio.error import MinioAdminException, S3Error
from pydantic import SecretStr, ValidationError

from blocks import object_store
from blocks.artifacts import AlreadyPosted, ArtifactStore, MissingArtifact, TamperedArtifact, sha256_hex
from blocks.object_store import Bucket, StoreUnavailable, parse_url
from infra import bench_store
from infra.object_store import expel, gateway_environment, wait_until_ready
from tests.blocks.object_server import ObjectServer

ME = "0x" + "ab" * 20
OTHER = "0x" + "cd" * 20
PATH = "a-task/00001/Submission.json"
SECRET = "a-secret-key-that-nobody-may-see"
URL = "http://127.0.0.1:9/bucket"


@pytest.fixture(scope="module")
def root(object_server: ObjectServer) -> ArtifactStore:
    return object_server.store()


@pytest.fixture(scope="module")
def mine(object_server: ObjectServer, root: ArtifactStore) -> ArtifactStore:
    return object_server.account(root, ME)


@pytest.fixture(scope="module")
def others(object_server: ObjectServer, root: ArtifactStore) -> ArtifactStore:
    return object_server.account(root, OTHER)


def client(store: ArtifactStore) -> Minio:
    """MinIO's own client with the store's keys: what somebody would use who does not keep to the store's verbs."""
    _, endpoint, _ = parse_url(store.root)
    return Minio(endpoint, store.access_key, store.secret_key.get_secret_value(), secure=False)


def write(store: ArtifactStore, name: str, data: bytes = b"x") -> None:
    client(store).put_object(
        bucket_name=parse_url(store.root)[2], object_name=name, data=io.BytesIO(data), length=len(data)
    )


def read(store: ArtifactStore, name: str) -> bytes:
    return client(store).get_object(bucket_name=parse_url(store.root)[2], object_name=name).data


def listed(store: ArtifactStore, prefix: str) -> list[str]:
    found = client(store).list_objects(bucket_name=parse_url(store.root)[2], prefix=prefix, recursive=True)
    return [one.object_name for one in found]


# Settings


def test_a_store_on_a_server_needs_both_keys_and_a_directory_neither():
    assert ArtifactStore(root="/a/directory").access_key is None
    assert ArtifactStore(root="https://s3.example.org/a-bucket", access_key=ME, secret_key=SECRET).patience_s == 60
    for given in ({}, {"access_key": ME}, {"secret_key": SECRET}, {"access_key": "", "secret_key": SECRET}):
        with pytest.raises(ValidationError, match="needs both"):
            ArtifactStore(root=URL, **given)
    with pytest.raises(ValidationError, match="secret_key: a directory takes none"):
        ArtifactStore(root="/a/directory", secret_key=SECRET)


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http://host",
        "http://host:9000",
        "http://host:9000/",
        "http://host:9000/a/b",
        "http://host:9000/B",
        "http://host:9000/bucket?x=1",
        f"http://me:{SECRET}@host:9000/bucket",
        "s3://host/bucket",
        "file:///tmp/bucket",
        "http://host:9000/bucket\n",
    ],
)
def test_an_address_that_is_none_is_refused_without_repeating_it(url):
    with pytest.raises(ValidationError, match="http://HOST:PORT/BUCKET") as refused:
        ArtifactStore(root=url, access_key=ME, secret_key=SECRET)
    assert SECRET not in str(refused.value)


def test_wrong_settings_are_refused_without_repeating_the_key():
    for wrong in ({"patience_s": -1}, {"root": "/a/directory"}, {"access_key": None}):
        with pytest.raises(ValidationError) as refused:
            ArtifactStore(**{"root": URL, "access_key": ME, "secret_key": SECRET} | wrong)
        assert SECRET not in str(refused.value)


def test_the_secret_key_is_shown_nowhere(root):
    store = ArtifactStore(root=URL, access_key=ME, secret_key=SECRET, patience_s=0)
    with pytest.raises(StoreUnavailable) as failed:
        store.find(ME, PATH)
    shown = [repr(store), str(store), str(store.model_dump()), store.model_dump_json(), str(failed.value)]
    shown += [repr(Bucket(URL, ME, SECRET)), repr(failed.value.__cause__)]
    assert not [text for text in shown if SECRET in text]


def test_prefect_gives_the_secret_key_to_who_loads_the_block_and_shows_it_to_nobody_else():
    from prefect.client.orchestration import get_client

    ArtifactStore(root=URL, access_key=ME, secret_key=SECRET).save("secret-store", overwrite=True)
    with get_client(sync_client=True) as prefect:
        shown = prefect.read_block_document_by_name("secret-store", "healchain-artifacts", include_secrets=False)
    assert shown.data["access_key"] == ME
    assert SECRET not in shown.model_dump_json()
    assert ArtifactStore.load("secret-store").secret_key == SecretStr(SECRET)


# Who may do what


def test_an_actor_reads_what_others_stored_and_writes_below_its_own_address_only(mine, others):
    reference = others.put(OTHER, b"ciphertext")
    others.post(OTHER, PATH, b"{}")
    assert mine.get(OTHER, reference.sha256) == b"ciphertext"
    assert mine.find(OTHER, PATH) == b"{}"
    assert mine.owners_of(PATH) == others.owners_of(PATH)
    assert mine.list_records(OTHER) == [PATH]
    for attempt in (
        lambda: mine.put(OTHER, b"another's"),
        lambda: mine.post(OTHER, "t/forged.json", b"{}"),
        lambda: mine.put("0x" + "00" * 20, b"nobody's"),
    ):
        with pytest.raises(PermissionError, match="only below its own address"):
            attempt()
    with pytest.raises(AlreadyPosted):
        mine.post(OTHER, PATH, b"forged")
    blob = f"{OTHER}/blobs/{reference.sha256[2:4]}/{reference.sha256[2:]}"
    assert listed(others, OTHER) == [blob, f"{OTHER}/records/{PATH}"]


def test_a_client_of_its_own_gets_an_actor_no_further(root, mine, others):
    """Past the store's verbs: overwriting, deleting, copying, other buckets, listings."""
    bucket, theirs = parse_url(root.root)[2], f"{OTHER}/records/theirs.json"
    write(others, theirs, b"theirs")
    ours = client(mine)
    for attempt in (
        lambda: write(mine, theirs, b"forged"),
        lambda: ours.remove_object(bucket_name=bucket, object_name=theirs),
        lambda: ours.copy_object(bucket_name=bucket, object_name=theirs, source=CopySource(bucket, theirs)),
        lambda: write(mine, "elsewhere/x"),
        lambda: write(mine, f"{ME}x/y"),
        lambda: write(mine, ME.upper().replace("0X", "0x") + "/y"),
        lambda: ours.remove_bucket(bucket_name=bucket),
        lambda: ours.make_bucket(bucket_name="another-bucket"),
        lambda: ours.delete_bucket_policy(bucket_name=bucket),
        lambda: ours.set_bucket_policy(bucket_name=bucket, policy=json.dumps({"Version": "2012-10-17"})),
        lambda: listed(mine, ""),
        lambda: listed(mine, "p"),
        ours.list_buckets,
    ):
        with pytest.raises(S3Error, match="AccessDenied"):
            attempt()
    assert read(root, theirs) == b"theirs"


def test_in_private_an_actor_sees_its_own_folder_only(root, mine, others):
    bucket = parse_url(root.root)[2]
    write(mine, f"private/{ME}/backup", b"mine")
    assert read(mine, f"private/{ME}/backup") == b"mine"
    assert listed(mine, f"private/{ME}/") == [f"private/{ME}/backup"]
    source = CopySource(bucket, f"private/{ME}/backup")
    for attempt in (
        lambda: read(others, f"private/{ME}/backup"),
        lambda: write(others, f"private/{ME}/backup", b"forged"),
        lambda: write(others, "private/x"),
        lambda: client(others).remove_object(bucket_name=bucket, object_name=f"private/{ME}/backup"),
        lambda: client(others).copy_object(bucket_name=bucket, object_name=f"{OTHER}/stolen", source=source),
        lambda: listed(others, f"private/{ME}/"),
        lambda: listed(others, "private/"),
    ):
        with pytest.raises(S3Error, match="AccessDenied"):
            attempt()
    assert read(mine, f"private/{ME}/backup") == b"mine"


def test_an_actor_administers_nothing(mine):
    keys = StaticProvider(mine.access_key, mine.secret_key.get_secret_value())
    admin = MinioAdmin(endpoint=parse_url(mine.root)[1], credentials=keys, secure=False)
    for attempt in (
        admin.user_list,
        admin.policy_list,
        lambda: admin.user_add("mallory", "a-long-password"),
        lambda: admin.user_add(OTHER, "a-long-password"),
        lambda: admin.policy_set("consoleAdmin", user=ME),
        lambda: admin.user_remove(OTHER),
    ):
        with pytest.raises(MinioAdminException, match="AccessDenied"):
            attempt()


def test_an_actor_of_one_bucket_has_no_access_to_another(object_server, mine):
    elsewhere = object_server.store()
    elsewhere.post(ME, PATH, b"{}")
    stranger = mine.model_copy(update={"root": elsewhere.root})
    for attempt in (lambda: stranger.find(ME, PATH), lambda: stranger.put(ME, b"x"), lambda: stranger.owners_of(PATH)):
        with pytest.raises(PermissionError):
            attempt()


def every_verb(store: ArtifactStore) -> list[Callable[[], object]]:
    return [
        lambda: store.put(ME, b"x"),
        lambda: store.get(ME, sha256_hex(b"x")),
        lambda: store.post(ME, PATH, b"x"),
        lambda: store.find(ME, PATH),
        lambda: store.list_records(ME),
        lambda: store.owners_of(PATH),
    ]


def test_a_wrong_key_is_refused_at_once(mine):
    wrong = mine.model_copy(update={"secret_key": SecretStr("not-the-secret-key")})
    started = time.monotonic()
    for attempt in every_verb(wrong):
        with pytest.raises(PermissionError, match="secret_key is not the one"):
            attempt()
    assert time.monotonic() - started < 5


def test_who_is_unknown_is_refused(mine, monkeypatch):
    monkeypatch.setattr(object_store, "STARTING_S", 0.2)
    unknown = mine.model_copy(update={"access_key": "0x" + "99" * 20})
    for attempt in every_verb(unknown):
        with pytest.raises(PermissionError, match="ask the publisher to admit"):
            attempt()


def test_without_a_signature_nothing_is_answered(root):
    _, endpoint, bucket = parse_url(root.root)
    root.post(ME, "public.json", b"x")
    nobody = Minio(endpoint=endpoint, secure=False)
    for attempt in (
        lambda: nobody.get_object(bucket_name=bucket, object_name=f"{ME}/records/public.json"),
        lambda: list(nobody.list_objects(bucket_name=bucket, prefix="0x")),
        lambda: nobody.put_object(bucket_name=bucket, object_name=f"{ME}/x", data=io.BytesIO(b"x"), length=1),
    ):
        with pytest.raises(S3Error, match="AccessDenied"):
            attempt()


def test_admitted_again_an_actor_has_another_key_and_expelled_none(object_server, root, monkeypatch):
    monkeypatch.setattr(object_store, "STARTING_S", 0.1)
    address = "0x" + "Ee" * 20
    first = object_server.account(root, address)
    reference = first.put(address, b"kept")
    second = object_server.account(root, address)
    assert second.get(address, reference.sha256) == b"kept"
    with pytest.raises(PermissionError, match="the one that was handed out last"):
        first.get(address, reference.sha256)
    expel(root, address)
    expel(root, address)
    with pytest.raises(PermissionError, match="admit"):
        second.get(address, reference.sha256)
    assert root.get(address, reference.sha256) == b"kept"


def test_accounts_are_for_addresses_and_on_servers_only(root):
    with pytest.raises(ValueError, match="40 hex digits"):
        expel(root, "miner-1")
    with pytest.raises(ValueError, match="only a store on a server has accounts"):
        expel(ArtifactStore(root="/a/directory"), ME)


def test_another_server_on_the_port_is_not_taken_for_ours(root):
    with pytest.raises(PermissionError, match="not started with this administrator's keys"):
        wait_until_ready(root.model_copy(update={"secret_key": SecretStr("of-another-server")}))
    with pytest.raises(StoreUnavailable, match="is not ready after 0 s"):
        wait_until_ready(root.model_copy(update={"root": URL}), timeout_s=0.1)


def test_the_servers_own_command_shows_no_secret(object_server):
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert object_server.secret_key not in running
    assert object_server.secret_key not in (object_server.folder / "log").read_text()
    with pytest.raises(ValueError, match="secret_key of the store's administrator has 3 characters, at least 8"):
        gateway_environment(object_server.folder, "root", "abc")


# A server that is away


def test_data_and_accounts_survive_a_kill_and_the_server_is_waited_for(object_server, mine):
    reference = mine.put(ME, b"before")
    mine.post(ME, "t/before.json", b"{}")
    object_server.kill()
    waiting: list[object] = []
    threads = [threading.Thread(target=lambda: waiting.append(mine.get(ME, reference.sha256))) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    object_server.start()
    for thread in threads:
        thread.join(20)
    assert waiting == [b"before"] * 4
    assert mine.list_records(ME).count("t/before.json") == 1
    with pytest.raises(PermissionError):
        mine.put(OTHER, b"x")


def test_a_server_that_stays_away_is_waited_for_no_longer_than_asked(root):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        away = root.model_copy(update={"root": f"http://127.0.0.1:{probe.getsockname()[1]}/bucket", "patience_s": 0.2})
        for attempt in every_verb(away):
            started = time.monotonic()
            with pytest.raises(StoreUnavailable, match="is it running"):
                attempt()
            assert time.monotonic() - started < 2


def test_killed_in_the_middle_of_a_put_the_server_has_all_or_nothing(object_server, mine):
    """Killed after so many milliseconds of 64 MiB: the put ends well once the server is back, and never by halves."""
    impatient = mine.model_copy(update={"patience_s": 0})
    for after_s in (0.05, 0.25):
        data = secrets.token_bytes(1 << 26)
        digest = sha256_hex(data)
        with ThreadPoolExecutor(1) as thread:
            putting = thread.submit(impatient.put, ME, data)
            time.sleep(after_s)
            object_server.kill()
            object_server.start()
            object_server.wait()
            cut = putting.exception() is not None
        try:
            assert mine.get(ME, digest) == data
        except MissingArtifact:
            assert cut
        with ThreadPoolExecutor(1) as thread:
            again = thread.submit(mine.put, ME, data)
            time.sleep(after_s)
            object_server.kill()
            object_server.start()
            assert again.result(60).sha256 == digest
        assert mine.get(ME, digest) == data


def test_a_server_that_was_killed_at_its_start_knows_its_accounts_once_it_is_ready(object_server, mine):
    """Killed while it reads them, it leaves a lock behind, which the next one finds void after some seconds."""
    impatient = mine.model_copy(update={"patience_s": 0})
    for after_s in (0.15, 0.2, 0.25):
        object_server.kill()
        object_server.start()
        time.sleep(after_s)
        object_server.kill()
        object_server.start()
        object_server.wait()
        assert impatient.get(ME, impatient.put(ME, b"known").sha256) == b"known"


def test_a_bucket_that_is_not_there_is_named_and_not_waited_for(root):
    lost = root.model_copy(update={"root": root.root + "-lost"})
    for attempt in every_verb(lost):
        with pytest.raises(StoreUnavailable, match="no such bucket"):
            attempt()


FORKED = """
import os, sys
from blocks.object_store import Bucket
bucket = Bucket(*sys.stdin.read().split(","))
bucket.hold("0x00/parent", b"p" * 3_000_000)
children = []
for child in range(4):
    if (pid := os.fork()) == 0:
        data = bytes([child]) * 3_000_000
        bucket.hold(f"0x00/{child}", data)
        os._exit(0 if all(bucket.read(f"0x00/{child}", None) == data for _ in range(5)) else 1)
    children.append(pid)
right = all(bucket.read("0x00/parent", None) == b"p" * 3_000_000 for _ in range(10))
print(right, [os.waitpid(pid, 0)[1] for pid in children])
"""


def test_a_forked_child_has_connections_of_its_own(root):
    settings = f"{root.root},{root.access_key},{root.secret_key.get_secret_value()}"
    done = subprocess.run([sys.executable, "-c", FORKED], input=settings, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "[0,", "0,", "0,", "0]"]


# Many, large


def test_owners_and_records_are_listed_beyond_a_page(object_server, monkeypatch):
    """A listing comes in pages, of 1000 names unless less is asked for."""
    monkeypatch.setattr(Minio, "_list_objects", partialmethod(Minio._list_objects, max_keys=7))
    many = object_server.store()
    owners = [f"0x{number:040x}" for number in range(30)]
    for owner in owners:
        many.post(owner, "t/R.json", b"{}")
    records = [f"t/{number:05d}/R.json" for number in range(29)]
    for path in records:
        many.post(ME, path, b"{}")
    assert [owner.lower() for owner in many.owners_of("t/R.json")] == owners
    assert many.list_records(ME) == records


def test_a_large_object_costs_no_second_copy(mine):
    """32 MiB are put in hardly any memory, and read in that of the answer."""
    data = secrets.token_bytes(1 << 25)
    tracemalloc.start()
    try:
        reference = mine.put(ME, data)
        putting = tracemalloc.get_traced_memory()[1]
        assert mine.put(ME, data) == reference
        comparing = tracemalloc.get_traced_memory()[1]
        got = mine.get(ME, reference.sha256)
        getting = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert got == data
    assert putting < 4 << 20
    assert comparing < 8 << 20
    assert getting < 40 << 20


# A server that lies


class Liar(BaseHTTPRequestHandler):
    """Answers as the test's `reply` says; knows no secret, checks nothing."""

    protocol_version = "HTTP/1.1"
    reply: Callable[[BaseHTTPRequestHandler], None]

    def do_GET(self) -> None:
        if "location" in self.path:
            answer(self, b"<LocationConstraint/>", kind="application/xml")
        else:
            self.server.reply(self)  # type: ignore[attr-defined]

    def do_PUT(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


def answer(
    request: BaseHTTPRequestHandler,
    body: bytes,
    *,
    kind: str = "application/octet-stream",
    status: int = 200,
    length: int | None = None,
    location: str = "",
) -> None:
    """One answer with this body, whatever length it announces."""
    request.send_response(status)
    announced = len(body) if length is None else length
    for name, value in {"Content-Type": kind, "Content-Length": str(announced), "Location": location}.items():
        request.send_header(name, value)
    request.send_header("ETag", '"0"')
    request.end_headers()
    request.wfile.write(body)


@contextmanager
def lying(reply: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Liar)
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)  # what is not read yet stays with the sender
    server.reply = reply  # type: ignore[attr-defined]
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/bucket"
    server.shutdown()
    server.server_close()


def believer(url: str, patience_s: float = 0.0) -> ArtifactStore:
    return ArtifactStore(root=url, access_key=ME, secret_key=SECRET, patience_s=patience_s)


def test_what_the_server_makes_up_is_noticed():
    with lying(lambda request: answer(request, b"made up")) as url:
        with pytest.raises(TamperedArtifact, match="truncated or changed"):
            believer(url).get(ME, sha256_hex(b"true"))
        assert believer(url).get(ME, sha256_hex(b"made up")) == b"made up"


def test_a_terabyte_that_the_server_announces_is_not_read():
    with lying(lambda request: answer(request, b"", length=1 << 40)) as url:
        with pytest.raises(TamperedArtifact, match=f"{1 << 40} bytes, at most 1048576"):
            believer(url).get(ME, sha256_hex(b""), max_bytes=1 << 20)
        with pytest.raises(TamperedArtifact, match="at most"):
            believer(url).find(ME, PATH)


def test_a_server_that_does_not_say_how_much_comes_is_not_read():
    def endless(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Connection", "close")
        request.end_headers()
        with suppress(ConnectionError):
            while True:
                request.wfile.write(bytes(1 << 16))

    with lying(endless) as url, pytest.raises(StoreUnavailable, match="how large"):
        believer(url).find(ME, PATH)


def test_a_record_that_breaks_off_is_no_record():
    def broken(request: BaseHTTPRequestHandler) -> None:
        answer(request, b"half", length=8)
        request.close_connection = True

    with lying(broken) as url, pytest.raises(StoreUnavailable, match="did not read"):
        believer(url).find(ME, PATH)


def test_the_server_cannot_send_its_clients_elsewhere():
    asked: list[str] = []

    def redirect(request: BaseHTTPRequestHandler) -> None:
        answer(request, b"", status=307, location=elsewhere)

    def listen(request: BaseHTTPRequestHandler) -> None:
        asked.append(request.path)
        answer(request, b"{}")

    with lying(listen) as elsewhere, lying(redirect) as url, pytest.raises(StoreUnavailable):
        believer(url).find(ME, PATH)
    assert asked == []


@pytest.mark.parametrize("status", [200, 403, 404, 500])
@pytest.mark.parametrize(
    "body", [b"", b"<", b"<html></html>", b"<ListBucketResult><Name/><Contents/></ListBucketResult>", b"\xb8"]
)
def test_garbage_in_place_of_a_listing_is_an_error(body, status):
    with lying(lambda request: answer(request, body, status=status, kind="application/xml")) as url:
        with pytest.raises((StoreUnavailable, PermissionError)):
            believer(url).list_records(ME)
        if status != 200:
            with pytest.raises((StoreUnavailable, PermissionError)):
                believer(url).find(ME, PATH)


def test_a_server_that_says_nothing_is_given_up():
    with lying(lambda request: time.sleep(1)) as url:
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match="timed out"):
            Bucket(url, ME, SECRET, patience_s=0, silence_s=0.2).read("a", None)
        assert time.monotonic() - started < 0.9


def test_a_busy_server_is_asked_again():
    asked: list[str] = []

    def busy(request: BaseHTTPRequestHandler) -> None:
        asked.append(request.path)
        error = b"<Error><Code>SlowDown</Code><Message>later</Message></Error>"
        answer(request, error, status=503, kind="application/xml") if len(asked) < 4 else answer(request, b"{}")

    with lying(busy) as url:
        assert believer(url, patience_s=10).find(ME, PATH) == b"{}"
    assert len(asked) == 4


def test_a_slow_line_has_time_for_a_large_object(monkeypatch):
    """The limit is on silence: 16 MiB that take longer than it, but keep flowing, arrive."""
    monkeypatch.setattr(object_store, "CONNECT_S", 1.0)

    def slowly(request: BaseHTTPRequestHandler) -> None:
        for _ in range(16):
            request.rfile.read(1 << 20)
            time.sleep(0.12)
        answer(request, b"")

    with lying(slowly) as url:
        Bucket(url, ME, SECRET, patience_s=0, silence_s=1.0)._put("a", bytes(1 << 24))


def test_a_server_that_is_stopped_and_goes_on_is_waited_for(object_server, mine):
    reference = mine.put(ME, b"stopped")
    os.kill(object_server._process.pid, signal.SIGSTOP)
    threading.Timer(0.8, os.kill, (object_server._process.pid, signal.SIGCONT)).start()
    keys = (mine.access_key, mine.secret_key.get_secret_value())
    name = f"{ME}/blobs/{reference.sha256[2:4]}/{reference.sha256[2:]}"
    assert Bucket(mine.root, *keys, patience_s=20, silence_s=0.3).read(name, None) == b"stopped"


def test_a_store_is_measured_through_its_own_verbs(object_server, tmp_path, monkeypatch):
    for name, smaller in (("LARGE_BYTES", 1 << 18), ("OWNERS", 10), ("REPEATS", 2)):
        monkeypatch.setattr(bench_store, name, smaller)
    for store in (object_server.store(), ArtifactStore(root=str(tmp_path))):
        rows = bench_store.measure(store, "here")
        assert [row.unit for row in rows] == ["MiB/s", "MiB/s", "ms", "ms", "ms"]
        assert all(row.value > 0 and row.name.endswith(", here") for row in rows)
