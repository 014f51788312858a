"""An actor's home: its keys are made once and leave it nowhere; its private state is whole after every kill."""

import json
import os
import pickle
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blocks.artifacts import ArtifactStore
from blocks.chain import Chain
from blocks.identity import InvalidHome, WrongPassphrase, create_home
from contracts.messages import Attestation, Domain, signer_of
from tasks.crypto import ecies
from tasks.crypto.ndd_fe import Label
from tasks.records import Station

DOMAIN = Domain(chain_id=1, verifying_contract="0x" + "11" * 20)
LABEL = Label(domain=b"\1" * 32, task_id="a-task", round_number=1)
SALT = "0x" + "07" * 16


@pytest.fixture
def me(tmp_path):
    return create_home(tmp_path / "me")


@pytest.fixture
def peer(tmp_path):
    return create_home(tmp_path / "peer")


def snapshot(home: Path) -> dict[str, bytes]:
    return {str(path.relative_to(home)): path.read_bytes() for path in sorted(home.rglob("*")) if path.is_file()}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# The home


def test_a_home_is_made_once(tmp_path):
    first = create_home(tmp_path / "me")
    made = snapshot(tmp_path / "me")
    second = create_home(tmp_path / "me")
    assert snapshot(tmp_path / "me") == made
    assert set(made) == {"passphrase", "keystore/wallet.json", "keystore/encryption.json"}
    assert (second.address, second.encryption_key) == (first.address, first.encryption_key)


def test_a_home_that_was_half_made_is_completed(tmp_path):
    whole = create_home(tmp_path / "me")
    wallet = whole.address
    (tmp_path / "me" / "keystore" / "encryption.json").unlink()
    assert create_home(tmp_path / "me").address == wallet
    assert whole.encryption_key


def test_two_homes_and_the_two_keys_of_one_are_different(me, peer):
    keys = [me.account.key, peer.account.key, me._scalar.to_bytes(32, "big"), peer._scalar.to_bytes(32, "big")]
    assert len({bytes(key) for key in keys}) == 4
    assert me.address != peer.address


def test_only_the_owner_may_read_the_home(me):
    home = Path(me.home)
    me.claim("a-task/residual", b"secret")
    assert mode(home) == 0o700
    for name in ("passphrase", "keystore/wallet.json", "keystore/encryption.json", "private/a-task/residual"):
        assert mode(home / name) == 0o600, name


def test_the_modes_do_not_depend_on_the_umask(tmp_path):
    before = os.umask(0)
    try:
        me = create_home(tmp_path / "me")
        me.claim("x", b"secret")
    finally:
        os.umask(before)
    assert {mode(path) for path in Path(me.home).rglob("*") if path.is_file()} == {0o600}
    assert mode(Path(me.home)) == 0o700


def test_a_wrong_passphrase_is_named(me):
    assert me.address
    (Path(me.home) / "passphrase").write_text("wrong")
    with pytest.raises(WrongPassphrase, match=r"passphrase does not open .*wallet.json"):
        _ = me.address
    with pytest.raises(WrongPassphrase, match=r"encryption\.json"):
        _ = me.encryption_key


@pytest.mark.parametrize("name", ["passphrase", "keystore/wallet.json", "keystore/encryption.json"])
def test_a_missing_file_is_named(me, name):
    (Path(me.home) / name).unlink()
    with pytest.raises(InvalidHome, match=f"{name} is missing: restore it"):
        _ = (me.address, me.encryption_key)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"version": 3}', "null"])
def test_a_keystore_that_is_none_is_named(me, text):
    (Path(me.home) / "keystore" / "wallet.json").write_text(text)
    with pytest.raises((InvalidHome, WrongPassphrase), match=r"wallet\.json"):
        _ = me.address


def test_a_keystore_that_was_changed_does_not_open(me):
    path = Path(me.home) / "keystore" / "wallet.json"
    keystore = json.loads(path.read_text())
    text = keystore["crypto"]["ciphertext"]
    keystore["crypto"]["ciphertext"] = ("0" if text[0] != "0" else "1") + text[1:]
    path.write_text(json.dumps(keystore))
    with pytest.raises(WrongPassphrase):
        _ = me.address


# Its data


def test_the_data_is_the_file_in_the_home_or_what_the_link_names(me, tmp_path):
    with pytest.raises(InvalidHome, match=r"data\.npz: no such file or folder"):
        me.data_path()
    (Path(me.home) / "data.npz").write_bytes(b"x")
    assert me.data_path() == Path(me.home) / "data.npz"
    (Path(me.home) / "data.link").write_text(f"{tmp_path / 'scans'}\n")
    with pytest.raises(InvalidHome, match="scans: no such file or folder"):
        me.data_path()
    (tmp_path / "scans").mkdir()
    assert me.data_path() == tmp_path / "scans"


# What the keys do


def test_a_signature_is_recovered(me, peer):
    verdict = Attestation(task_id="a-task", round_number=1, candidate="0x" + "22" * 32, accepted=True, reason="")
    assert signer_of(verdict, DOMAIN, me.sign(verdict, DOMAIN)) == me.address
    assert signer_of(verdict, DOMAIN, peer.sign(verdict, DOMAIN)) != me.address


def sealed_to(key: str, context: bytes = b"delivery") -> bytes:
    return ecies.seal(b"the salt", bytes.fromhex(key[2:]), ephemeral_seed=os.urandom(48), context=context)


def test_what_is_sealed_to_me_i_open(me):
    assert me.open_sealed(sealed_to(me.encryption_key), b"delivery") == b"the salt"


@pytest.mark.parametrize("position", [0, 1, 33, -1])
def test_a_sealed_message_that_was_changed_does_not_open(me, position):
    data = bytearray(sealed_to(me.encryption_key))
    data[position] ^= 1
    with pytest.raises(ecies.Unopenable):
        me.open_sealed(bytes(data), b"delivery")


@pytest.mark.parametrize("length", [0, 32, 33, 48])
def test_a_truncated_sealed_message_does_not_open(me, length):
    with pytest.raises(ecies.Unopenable):
        me.open_sealed(sealed_to(me.encryption_key)[:length], b"delivery")


def test_nobody_else_opens_it_nor_for_another_purpose(me, peer):
    with pytest.raises(ecies.Unopenable):
        peer.open_sealed(sealed_to(me.encryption_key), b"delivery")
    with pytest.raises(ecies.Unopenable):
        me.open_sealed(sealed_to(me.encryption_key), b"another purpose")


def test_a_mask_key_is_shared_by_two_and_no_third(me, peer, tmp_path):
    third = create_home(tmp_path / "third")
    shared = me.mask_key(peer.encryption_key, "publisher", LABEL, SALT)
    assert shared == peer.mask_key(me.encryption_key, "publisher", LABEL, SALT)
    others = [
        third.mask_key(peer.encryption_key, "publisher", LABEL, SALT),
        third.mask_key(me.encryption_key, "publisher", LABEL, SALT),
        me.mask_key(peer.encryption_key, "aggregator", LABEL, SALT),
        me.mask_key(peer.encryption_key, "publisher", LABEL, "0x" + "08" * 16),
        me.mask_key(peer.encryption_key, "publisher", Label(LABEL.domain, "a-task", 2), SALT),
        me.mask_key(peer.encryption_key, "publisher", Label(LABEL.domain, "b-task", 1), SALT),
        me.mask_key(peer.encryption_key, "publisher", Label(b"\2" * 32, "a-task", 1), SALT),
    ]
    assert shared not in others
    assert len(set(others)) == len(others)


# What shows of them


def test_nothing_that_is_shown_or_stored_holds_a_key(me, tmp_path):
    shown_by = Station(me, Chain(rpc=f"local:{tmp_path / 'chain'}"), ArtifactStore(root=str(tmp_path)))
    keys = [bytes(me.account.key), me._scalar.to_bytes(32, "big")]
    secrets = [key.hex() for key in keys] + [str(int.from_bytes(key, "big")) for key in keys]
    secrets.append((Path(me.home) / "passphrase").read_text())
    shown = [repr(me), str(me), str(me.model_dump()), me.model_dump_json(), str(vars(me)), str(pickle.dumps(me))]
    shown += [repr(shown_by), str(shown_by), str(vars(shown_by)), repr(me.account), str(me.account)]
    for text in shown:
        assert not any(secret in text for secret in secrets)
        assert not any(key in text.encode("latin-1", "replace") for key in keys)
    assert me.model_dump()["home"] == me.home
    assert not any(secret in str(snapshot(Path(me.home) / "keystore")) for secret in secrets)


# Private state


def test_what_is_claimed_first_stays(me):
    assert me.read_private("a-task/residual") is None
    assert me.claim("a-task/residual", b"first") == b"first"
    assert me.claim("a-task/residual", b"second") == b"first"
    assert me.read_private("a-task/residual") == b"first"
    assert [path.name for path in (Path(me.home) / "private" / "a-task").iterdir()] == ["residual"]


def test_of_many_claims_at_once_all_get_the_same(me):
    with ThreadPoolExecutor(16) as pool:
        kept = list(pool.map(lambda number: me.claim("t/key-for", b"%d" % number), range(64)))
    assert len(set(kept)) == 1
    assert me.read_private("t/key-for") == kept[0]


KILLED = """
import os, signal, sys, time
from pathlib import Path
from blocks.identity import create_home

def killed_after(seconds, work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)

def claim_forever():
    for number in range(10**6):
        me.claim(f"t/{attempt}-{number}", b"a" * 300_000)

folder = Path(sys.argv[1])
me = create_home(folder / "me")
for attempt in range(25):
    killed_after(0.01 + 0.003 * attempt, claim_forever)
    kept = [path for path in (folder / "me" / "private" / "t").glob("[0-9]*")]
    print(all(path.read_bytes() == b"a" * 300_000 for path in kept))
for attempt in range(12):
    home = folder / f"home-{attempt}"
    killed_after(0.01 + 0.02 * attempt, lambda: create_home(home))
    made = create_home(home)
    print(bool(made.address and made.encryption_key))
"""


def test_a_kill_leaves_whole_claims_or_none_and_a_home_that_can_be_completed(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 37


def test_a_claim_that_the_system_cuts_short_is_none(me):
    me.claim("t/other", b"old")
    script = (
        "import resource, signal, sys\nfrom blocks.identity import Identity\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "me = Identity(home=sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    me.claim('t/state', b'x' * 5000)\nexcept OSError as error:\n    print(error.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, me.home], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "27"  # EFBIG
    assert me.read_private("t/state") is None
    assert [path.name for path in (Path(me.home) / "private" / "t").iterdir()] == ["other"]
