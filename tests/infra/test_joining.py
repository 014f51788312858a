"""A host joins a consortium of real parts, and what it is told when something is not as it should be."""

import json
import os
import re
import shlex
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from minio.error import S3Error
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType

from blocks import pools
from blocks.artifacts import ArtifactStore
from blocks.connections import connections_of
from blocks.identity import Identity, create_home
from blocks.object_store import Bucket
from infra import gateway, joining
from infra.joining import CannotJoin, Wish
from infra.membership import Versions, Welcome, seal
from tests.contracts.anvil import Anvil
from tests.infra.consortium import PUBLISHER, Consortium, Process, Told, surroundings, wait_until

NOWHERE = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    opened = Consortium(tmp_path_factory.mktemp("consortium"))
    yield opened
    opened.close()


def refused(wish: Wish) -> Told:
    """What was told to a host that cannot join; nothing is pinned in its home, but by an earlier joining."""
    told, before = Told(), _pinned(wish.home)
    with pytest.raises(CannotJoin, match="the same command completes it"):
        joining.join(wish, told)
    assert _pinned(wish.home) == before
    return told


def _pinned(home: Path) -> str | None:
    path = home / "connections.json"
    return path.read_text() if path.exists() else None


def secret_of(store: ArtifactStore) -> str:
    assert store.secret_key is not None
    return store.secret_key.get_secret_value()


def bucket_of(store: ArtifactStore) -> Bucket:
    return Bucket(store.root, store.access_key or "", secret_of(store), 3)


def test_a_host_joins_with_two_commands_and_its_worker_takes_a_run(consortium: Consortium, tmp_path: Path) -> None:
    home = tmp_path / "hospital a"
    invitation = consortium.invite("hospital-a")
    command = [sys.executable, "-m", "infra.cli", "join", "--server", consortium.url, "--home", str(home)]
    joined = subprocess.run(
        [*command, "--store", f"http://127.0.0.1:{consortium.objects.port}", "--most-stake", "0.3"],
        env=surroundings(HEALCHAIN_INVITATION=invitation),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (joined.returncode, joined.stderr) == (0, ""), joined.stdout + joined.stderr
    marks = dict(re.findall(r"^(ok|no|--)  (\S+(?: \S+)*)", joined.stdout, re.MULTILINE))
    assert set(marks) == {"ok", "--"}, joined.stdout
    pinned = connections_of(Identity(home=str(home)))
    assert (pinned.name, pinned.registry, pinned.uses_pools) == ("hospital-a", None, False)
    assert pinned.chain.deployment == consortium.chain.deployment
    assert pinned.publishers == (PUBLISHER,)
    assert (pinned.most_stake_wei, pinned.most_deposit_wei) == (3 * 10**17, 15 * 10**17)
    assert f"publishers     stakes in tasks of {PUBLISHER}, at most 0.3 ether in one and 1.5 in all" in joined.stdout
    consortium.secrets.append(secret_of(pinned.store))
    for name in ("connections.json", "prefect/profiles.toml"):
        assert stat.S_IMODE((home / name).stat().st_mode) == 0o600

    second = joined.stdout.splitlines()[-1]
    assert second.startswith(f"PREFECT_HOME={shlex.quote(str(home / 'prefect'))} ")
    worker = Process(consortium.folder / "worker.log", ["sh", "-c", f"exec env {second}"], surroundings())
    try:
        with consortium.api():
            run = pools.start(
                "register/miners",
                "hospital-a",
                {"task_id": "no-such-task", "round_number": 0, "actor": "hospital-a"},
                key="a",
                name="a step",
                tags=[],
            )
            wait_until(lambda: pools.look([run.id])[run.id].has_ended, 120, "the step")
            ended = pools.look([run.id])[run.id]
            with get_client(sync_client=True) as client:
                (seen,) = client._client.post("/work_pools/miners/workers/filter", json={}).json()
        assert (seen["name"], seen["status"]) == ("hospital-a", "ONLINE")
        # It looked into the store with its own account, and there is no such task.
        assert (ended.kind, "no-such-task" in ended.message) == (StateType.FAILED, True), ended
        commands = [path.read_bytes() for path in _proc("cmdline")]
        assert any(b"healchain" in one and b"hospital-a" in one for one in commands)
        assert not _seen(consortium.secrets, commands)
    finally:
        worker.stop()
    assert not _seen(consortium.secrets, [path.read_bytes() for path in consortium.folder.glob("*.log")])
    assert not _seen(consortium.secrets, [(consortium.folder / "objects" / "log").read_bytes(), joined.stdout.encode()])
    assert not _seen(consortium.secrets, [_blocks(consortium).encode()])


def _proc(name: str) -> Iterator[Path]:
    return (path for path in Path("/proc").glob(f"[0-9]*/{name}") if os.access(path, os.R_OK))


def _seen(hidden: list[str], texts: list[bytes]) -> list[str]:
    assert texts
    return [one for one in hidden if any(one.encode() in text for text in texts)]


def _blocks(consortium: Consortium) -> str:
    user, _, password = consortium.auth.partition(":")
    asked = httpx.post(
        f"{consortium.api_url}/block_documents/filter", json={"include_secrets": True}, auth=(user, password)
    )
    assert '"chain"' in asked.text
    return asked.text


def test_a_member_reaches_nothing_of_another(consortium: Consortium, tmp_path: Path) -> None:
    stores: dict[str, ArtifactStore] = {}
    for name in ("alice", "mallory"):
        joining.join(consortium.wish(consortium.invite(name), tmp_path / name), Told())
        stores[name] = connections_of(Identity(home=str(tmp_path / name))).store
    alice = create_home(tmp_path / "alice").address
    put = stores["alice"].put(alice, b"ciphertext")
    stores["alice"].post(alice, "round-1/Submission.json", b"{}")
    bucket_of(stores["alice"]).hold(f"private/{alice.lower()}/backup", b"backup")
    assert stores["mallory"].get(alice, put.sha256) == b"ciphertext"  # what is public is read by all
    for attempt in (
        lambda: stores["mallory"].put(alice, b"another"),
        lambda: stores["mallory"].post(alice, "round-2/Submission.json", b"{}"),
        lambda: bucket_of(stores["mallory"]).hold(f"{alice.lower()}/records/round-1/Submission.json", b"changed"),
        lambda: bucket_of(stores["mallory"]).read(f"private/{alice.lower()}/backup", 100),
        lambda: bucket_of(stores["mallory"]).names(f"private/{alice.lower()}"),
        lambda: joining._remove(bucket_of(stores["mallory"]), f"{alice.lower()}/records/round-1/Submission.json"),
    ):
        with pytest.raises((PermissionError, S3Error), match=r"may write only below|Access Denied"):
            attempt()
    assert stores["alice"].find(alice, "round-1/Submission.json") == b"{}"


def test_joining_can_be_repeated_by_the_same_host_only(consortium: Consortium, tmp_path: Path) -> None:
    invitation, home = consortium.invite("repeat"), tmp_path / "home"
    joining.join(consortium.wish(invitation, home), Told())
    first = connections_of(Identity(home=str(home)))
    # Cut off before it pinned anything: the same invitation, another secret key.
    (home / "connections.json").unlink()
    joining.join(consortium.wish(invitation, home), Told())
    again = connections_of(Identity(home=str(home)))
    assert again.store.secret_key != first.store.secret_key
    assert joining.store_access(again.store, Identity(home=str(home))).in_order
    assert "handed out last" in joining.store_access(first.store, Identity(home=str(home))).found

    told = refused(consortium.wish(invitation, tmp_path / "thief"))
    assert told.wrong == ["gateway"]
    assert "was used by another address: ask for another" in told["gateway"].found
    told = refused(consortium.wish(consortium.invite("repeat"), tmp_path / "namesake"))
    assert "is a member named repeat: a name has one address" in told["gateway"].found
    (home / "connections.json").unlink()
    told = refused(consortium.wish(consortium.invite("other-name"), home))
    assert "is a member named repeat" in told["gateway"].found


def test_a_home_keeps_its_name_and_takes_up_what_has_changed(consortium: Consortium, tmp_path: Path) -> None:
    home = tmp_path / "home"
    joining.join(consortium.wish(consortium.invite("refreshed"), home), Told())
    assert "this home is refreshed" in refused(consortium.wish(consortium.invite("renamed"), home))["name"].found
    moved = f"http://localhost:{consortium.objects.port}"
    joining.join(consortium.wish(consortium.invite("refreshed"), home, store=moved), Told())
    assert connections_of(Identity(home=str(home))).store.root.startswith(f"{moved}/bucket-")
    (home / "connections.json").write_text("{}")
    told = Told()
    joining.join(consortium.wish(consortium.invite("refreshed"), home), told)
    assert "compare them with what the publisher told you" in told["pinned"].found


def test_another_chain_than_the_pinned_one_is_taken_on_demand_only(consortium: Consortium, tmp_path: Path) -> None:
    home = tmp_path / "home"
    joining.join(consortium.wish(consortium.invite("pinned"), home), Told())
    pinned = connections_of(Identity(home=str(home)))
    before = pinned.chain.model_copy(update={"chain_id": 1, "escrow_address": "0x" + "5" * 40})
    pinned.model_copy(update={"chain": before}).pin(Identity(home=str(home)))
    invitation = consortium.invite("pinned")
    told = refused(consortium.wish(invitation, home))
    assert told.wrong == ["pinned chain"]
    for named in ("chain 1 with 0x5555", "offered is chain 31337", consortium.chain.escrow_address, "--new-chain"):
        assert named in told["pinned chain"].found
    assert "gateway" not in told.findings  # the invitation was shown to nobody
    joining.join(consortium.wish(invitation, home, has_new_chain=True), Told())
    assert connections_of(Identity(home=str(home))).chain.deployment == consortium.chain.deployment


def test_other_publishers_than_the_pinned_ones_are_taken_on_demand_only(consortium: Consortium, tmp_path: Path) -> None:
    home, stranger = tmp_path / "home", "0x" + "5" * 40
    me = Identity(home=str(home))
    joining.join(consortium.wish(consortium.invite("agreed"), home), Told())
    pinned = connections_of(me)
    assert (pinned.publishers, pinned.most_stake_wei) == ((PUBLISHER,), joining.MOST_STAKE_WEI)
    pinned.model_copy(update={"publishers": (stranger,), "most_stake_wei": 5, "most_deposit_wei": 6}).pin(me)
    invitation = consortium.invite("agreed")
    told = refused(consortium.wish(invitation, home))
    assert told.wrong == ["pinned publishers"]
    for named in (f"pinned: {stranger}", f"offered: {PUBLISHER}", "--new-publishers"):
        assert named in told["pinned publishers"].found
    assert "gateway" not in told.findings  # the invitation was shown to nobody
    joining.join(consortium.wish(invitation, home, has_new_publishers=True), Told())
    again = connections_of(me)  # the owner's limits stay
    assert (again.publishers, again.most_stake_wei, again.most_deposit_wei) == ((PUBLISHER,), 5, 6)
    # A home from before there were publishers and limits takes up both.
    old = json.loads((home / "connections.json").read_text())
    for name in ("publishers", "most_stake_wei", "most_deposit_wei"):
        del old[name]
    (home / "connections.json").write_text(json.dumps(old))
    assert connections_of(me).publishers == ()
    joining.join(consortium.wish(invitation, home), Told())
    assert connections_of(me).model_dump(exclude={"store"}) == pinned.model_dump(exclude={"store"})


def test_what_is_away_or_wrong_is_named_with_its_remedy(
    consortium: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation, home = consortium.invite("troubled"), tmp_path / "home"
    elsewhere = Anvil(tmp_path)
    try:
        wrong_contracts = refused(consortium.wish(invitation, home, rpc=elsewhere.rpc))
    finally:
        elsewhere.stop()
    for changes, name, remedy in [
        ({"server": NOWHERE}, "gateway", "does not answer (ConnectError): is --server right"),
        ({"server": "nonsense"}, "gateway", "is --server right"),
        ({"server": consortium.api_url.removesuffix("/api")}, "gateway", "correct --server"),
        ({"rpc": f"{NOWHERE}/a-key-of-the-provider"}, "chain", "--rpc names another one"),
        ({"rpc": "ftp://x"}, "chain", "rpc cannot be used: correct --rpc"),
        ({"rpc": f"local:{tmp_path / 'chain'}"}, "chain", "give a node's address by --rpc"),
        ({"store": "127.0.0.1"}, "store", "--store: expected http(s)://HOST:PORT"),
        ({"store": NOWHERE}, "store", "--store names its address as seen from this host"),
    ]:
        told = refused(consortium.wish(invitation, home, **changes))
        assert told.wrong == [name], changes
        assert remedy in told[name].found
        assert "a-key-of-the-provider" not in told[name].found
    assert wrong_contracts.wrong == ["chain"]
    assert "is not this build of" in wrong_contracts["chain"].found
    assert "install the version that the publisher uses" in wrong_contracts["chain"].found

    with monkeypatch.context() as other:
        other.setattr(joining, "versions_here", lambda: Versions(healchain="0.0.9", prefect="3.8.8"))
        told = refused(consortium.wish(invitation, home))
    assert told.wrong == ["versions"]
    assert "healchain is 0.0.9 here and" in told["versions"].found
    for ahead_s, is_wrong in [(900, True), (-900, True), (60, False)]:
        with monkeypatch.context() as skewed:
            skewed.setattr(joining, "time", SkewedClock(ahead_s))
            told = refused(consortium.wish(invitation, home)) if is_wrong else Told()
            if not is_wrong:
                joining.join(consortium.wish(invitation, home), told)
        assert told.wrong == (["clock"] if is_wrong else [])
        assert "timedatectl set-ntp true" in told["clock"].found


class SkewedClock:
    """The module `time` of a host whose clock is off."""

    def __init__(self, ahead_s: float) -> None:
        self._ahead_s = ahead_s

    def time(self) -> float:
        return time.time() + self._ahead_s


def test_services_that_do_not_keep_members_apart_are_seen(consortium: Consortium, tmp_path: Path) -> None:
    me = create_home(tmp_path / "home")
    administered = consortium.root.model_copy(update={"access_key": consortium.objects.access_key})
    told = joining.store_access(administered, me)
    assert not told.in_order
    assert "lets a member write below another's address and read what is private to another" in told.found

    welcome = Welcome(
        api_url=consortium.api_url,
        api_auth="operator:wrong",
        store_url=consortium.root.root,
        access_key="a",
        secret_key="b",
        chain={},
        publishers=(PUBLISHER,),
    )
    told = joining.api_access(welcome, "nobody", me)
    assert "refuses the credentials (401)" in told.found
    right = welcome.model_copy(update={"api_auth": consortium.auth})
    assert "the queues of nobody are not there" in joining.api_access(right, "nobody", me).found
    away = welcome.model_copy(update={"api_url": f"{NOWHERE}/api"})
    assert "HEALCHAIN_MEMBERS_API_URL" in joining.api_access(away, "nobody", me).found


def test_a_listener_learns_nothing_and_can_put_nothing_in_place(consortium: Consortium, tmp_path: Path) -> None:
    invitation, me = consortium.invite("listened-to"), create_home(tmp_path / "home")
    wish, heard, answers = consortium.wish(invitation, tmp_path / "home"), [], []

    def between(request: httpx.Request) -> httpx.Response:
        answer = httpx.request(request.method, f"{consortium.url}{request.url.path}", content=request.read())
        heard.extend([request.content, answer.content])
        answers.append(answer.content)
        return httpx.Response(answer.status_code, content=answers[replayed] if replayed is not None else answer.content)

    replayed: int | None = None
    with httpx.Client(base_url=NOWHERE, transport=httpx.MockTransport(between)) as gateway_heard:
        offer, _ = joining.read_offer(gateway_heard)
        chain = joining.chain_of(wish, offer)
        welcome = joining.apply(wish, me, chain, offer, gateway_heard)
        hidden = [welcome.secret_key, consortium.auth.partition(":")[2], str(invitation)[:87], invitation.secret.hex()]
        assert not _seen(hidden, heard)
        # An earlier answer, in place of the one to a later application.
        replayed = 1
        later = offer.model_copy(update={"time_ms": offer.time_ms + 1000})
        with pytest.raises(ValueError, match="not from the gateway of this invitation"):
            joining.apply(wish, me, chain, later, gateway_heard)
        # Another chain in place of the one that the gateway offers.
        replayed = None
        forged = later.model_copy(update={"time_ms": offer.time_ms + 2000, "chain": {**offer.chain, "rpc": NOWHERE}})
        with pytest.raises(ValueError, match="were changed on the way"):
            joining.apply(wish, me, chain, forged, gateway_heard)
        # A stranger beside the publisher that it offers.
        both = (PUBLISHER, "0x" + "5" * 40)
        forged = later.model_copy(update={"time_ms": offer.time_ms + 3000, "publishers": both})
        with pytest.raises(ValueError, match="were changed on the way"):
            joining.apply(wish, me, chain, forged, gateway_heard)
    # Who only knows the host's key cannot make a welcome.
    own = seal(welcome, bytes.fromhex(me.encryption_key[2:]), b"HealChain welcome")
    with (
        httpx.Client(
            base_url=NOWHERE, transport=httpx.MockTransport(lambda _: httpx.Response(200, content=own))
        ) as liar,
        pytest.raises(ValueError, match="not from the gateway of this invitation"),
    ):
        joining.apply(wish, me, chain, offer, liar)


def test_an_expelled_member_loses_account_queues_and_invitations(consortium: Consortium, tmp_path: Path) -> None:
    home, spare = tmp_path / "home", consortium.invite("leaving")
    joining.join(consortium.wish(consortium.invite("leaving"), home), Told())
    me, pinned = Identity(home=str(home)), connections_of(Identity(home=str(home)))
    pinned.store.put(me.address, b"signed and public")
    with consortium.api():
        assert gateway.expel(consortium.gateway_folder, consortium.settings(), "leaving").address == me.address
        assert "leaving" not in [queue.actor for pool in gateway.POOLS for queue in pools.queues(pool)]
        with pytest.raises(ValueError, match="no member 'leaving'"):
            gateway.expel(consortium.gateway_folder, consortium.settings(), "leaving")
    assert "ask the publisher to admit this address" in joining.store_access(pinned.store, me).found
    assert "unknown here, or was withdrawn" in refused(consortium.wish(spare, home))["gateway"].found
    joining.join(consortium.wish(consortium.invite("leaving"), home), Told())
