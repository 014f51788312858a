"""Whom the gateway lets in, and what it keeps and tells. What an admitted host gets is in test_joining."""

import asyncio
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account
from fastapi import HTTPException, Request
from fastapi.testclient import TestClient
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from pydantic import SecretStr
from typer.testing import CliRunner

from blocks.artifacts import ArtifactStore
from blocks.chain import Chain
from blocks.identity import Identity, create_home
from contracts.messages import Domain, Membership
from infra import gateway, membership
from infra.cli import app
from infra.membership import APPLICATION, Application, Invitation

# Nothing listens there: what is refused is refused before a service is asked.
NOWHERE = "http://127.0.0.1:1"
CHAIN = Chain(
    rpc=NOWHERE,
    chain_id=31337,
    escrow_address="0x" + "1" * 40,
    stakes_address="0x" + "2" * 40,
    publisher_address="0x" + "3" * 40,
    rewards_address="0x" + "4" * 40,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "gateway"


@pytest.fixture
def host(tmp_path: Path) -> Identity:
    return create_home(tmp_path / "home")


def settings() -> gateway.Settings:
    store = ArtifactStore(root=f"{NOWHERE}/bucket", access_key="administrator", secret_key=SecretStr("a secret key"))
    return gateway.Settings(store, f"{NOWHERE}/api", "operator:password", store.root, ("0x" + "7" * 40,))


def client(folder: Path, address: str = "10.0.0.1") -> TestClient:
    create_home(folder)
    return TestClient(gateway.service(gateway.Gateway(folder, settings(), CHAIN)), client=(address, 1))


def sealed(
    invitation: Invitation, me: Identity, *, domain: Domain = CHAIN.domain, age_s: float = 0, **changes: Any
) -> bytes:
    fields = {"name": invitation.name, "address": me.address, "encryption_key": me.encryption_key, **changes}
    wanted = Membership(moment_ms=int(1000 * (time.time() - age_s)), **fields)
    application = Application(
        secret="0x" + invitation.secret.hex(), membership=wanted, signature=me.sign(wanted, domain)
    )
    return membership.seal(application, invitation.gateway_key, APPLICATION)


def answer(asked: TestClient, body: bytes) -> tuple[int, str]:
    found = asked.post("/members", content=body)
    return found.status_code, found.json()["detail"]


def test_of_an_invitation_only_a_hash_is_kept(folder: Path) -> None:
    invitation = gateway.invite(folder, "hospital-a", 72)
    assert len(invitation.secret) == 32
    assert Invitation.read(f" {invitation}\n") == invitation
    assert gateway.invite(folder, "hospital-a", 72).secret != invitation.secret
    kept = [path for path in folder.rglob("*") if path.is_file()]
    for path in kept:
        assert not any(part in path.read_bytes() for part in (invitation.secret, str(invitation).encode()[:40]))
        assert invitation.secret.hex() not in path.read_text() + path.name
    modes = {stat.S_IMODE(path.stat().st_mode) for path in kept if path.name != "lock"}
    assert modes == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert str(invitation)[:20] not in repr(invitation)


@pytest.mark.parametrize("name", ["", "Hospital", "a b", "-a", "x" * 33, "a/../b", "publisher", "default"])
def test_a_name_that_cannot_be_a_queue_is_refused(name: str, folder: Path) -> None:
    with pytest.raises(ValueError, match="name"):
        gateway.invite(folder, name, 1)
    assert list(folder.glob("invitations/*")) == []


@pytest.mark.parametrize("text", ["", "hospital-a", "A" * 86 + ".a", "A" * 87, "A" * 87 + ".A", "é" * 87 + ".a"])
def test_what_is_no_invitation_is_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match="expected what `healchain invite` printed") as caught:
        Invitation.read(text)
    assert text == "" or text not in str(caught.value)


def test_strangers_are_refused_with_the_reason(folder: Path, tmp_path: Path, host: Identity) -> None:
    asked, invitation = client(folder), gateway.invite(folder, "hospital-a", 1)
    unknown = Invitation(b"\1" * 32, invitation.gateway_key, "hospital-a")
    late = gateway.invite(folder, "hospital-a", 1e-9)
    elsewhere = gateway.invite(tmp_path / "other", "hospital-a", 1)
    renamed = Invitation(invitation.secret, invitation.gateway_key, "hospital-b")
    cases = [
        (unknown, 403, "unknown here, or was withdrawn: ask for another"),
        (late, 403, "expired at"),
        (elsewhere, 400, "not sealed to this gateway"),
        (renamed, 403, "is for the name 'hospital-a'"),
    ]
    for shown, status, reason in cases:
        got = answer(asked, sealed(shown, host))
        assert got[0] == status
        assert reason in got[1]
    assert gateway.members(folder) == []


def test_only_the_wallet_itself_can_apply_for_its_address(folder: Path, host: Identity) -> None:
    asked, invitation = client(folder), gateway.invite(folder, "hospital-a", 1)
    other_domain = Domain(1, CHAIN.publisher_address)
    stranger = str(Account.create().address)
    no_point = "0x02" + "ff" * 32
    for body, reason in [
        (sealed(invitation, host, domain=other_domain), "not of this address, for this chain and these contracts"),
        (sealed(invitation, host, address=stranger), "not of this address"),
        (sealed(invitation, host, encryption_key=no_point), "not a point of the curve"),
    ]:
        status, said = answer(asked, body)
        assert status == 403
        assert reason in said
    unsigned = Application(
        secret="0x" + invitation.secret.hex(),
        membership=Membership(
            name="hospital-a", address=host.address, encryption_key=host.encryption_key, moment_ms=gateway._now_ms()
        ),
        signature="0x00",
    )
    assert answer(asked, membership.seal(unsigned, invitation.gateway_key, APPLICATION))[0] == 403
    assert gateway.members(folder) == []


def test_an_old_application_and_a_copy_are_refused(folder: Path, tmp_path: Path, host: Identity) -> None:
    asked, invitation = client(folder), gateway.invite(folder, "hospital-a", 1)
    assert "is old, or a copy" in answer(asked, sealed(invitation, host, age_s=400))[1]
    assert "is old, or a copy" in answer(asked, sealed(invitation, host, age_s=-400))[1]
    # Prefect is away: the invitation is used up for this address all the same, which may ask again.
    with temporary_settings({PREFECT_API_URL: f"{NOWHERE}/api", PREFECT_CLIENT_MAX_RETRIES: 0}):
        body = sealed(invitation, host)
        status, said = answer(asked, body)
        assert status == 503
        assert "cannot use Prefect's API" in said
        assert "127.0.0.1" not in said
        assert "is old, or a copy" in answer(asked, body)[1]
        assert answer(asked, sealed(invitation, host))[0] == 503
        other = create_home(tmp_path / "other")
        assert answer(asked, sealed(invitation, other)) == (
            403,
            "the invitation was used by another address: ask for another",
        )


def test_wrong_invitations_are_slowed_down_for_the_one_who_shows_them(folder: Path, host: Identity) -> None:
    asked, invitation = client(folder), gateway.invite(folder, "hospital-a", 1)
    wrong = Invitation(b"\1" * 32, invitation.gateway_key, "hospital-a")
    statuses = [answer(asked, sealed(wrong, host))[0] for _ in range(gateway.WRONG_MAX)]
    assert statuses == [403] * gateway.WRONG_MAX
    assert answer(asked, sealed(invitation, host, age_s=400)) == (
        429,
        "too many wrong invitations: try again in 10 minutes",
    )
    assert answer(client(folder, "10.0.0.2"), sealed(wrong, host))[0] == 403
    assert asked.get("/offer").status_code == 200


def test_who_shows_wrong_invitations_is_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = gateway.WrongCodes()
    for _ in range(gateway.WRONG_MAX):
        wrong.note("10.0.0.1")
    assert wrong.are_too_many("10.0.0.1")
    assert not wrong.are_too_many("10.0.0.2")
    monkeypatch.setattr(gateway, "CALLERS_MAX", 3)
    for number in range(3):
        wrong.note(f"10.0.1.{number}")
    assert len(wrong._moments) == 3
    assert not wrong.are_too_many("10.0.0.1")
    monkeypatch.setattr(gateway, "WRONG_WINDOW_S", 0.0)
    assert not wrong.are_too_many("10.0.1.1")


def test_large_and_malformed_applications_are_refused(folder: Path) -> None:
    asked = client(folder)
    assert answer(asked, b"x" * (gateway.LARGEST_BYTES + 1))[0] == 413
    assert answer(asked, b"")[0] == 400
    key = bytes.fromhex(create_home(folder).encryption_key[2:])
    nonsense = membership.ecies.seal(b'{"secret": 1}', key, ephemeral_seed=bytes(48), context=APPLICATION)
    status, said = answer(asked, nonsense)
    assert status == 422
    assert said.startswith("membership, secret, signature: malformed")
    assert asked.get("/openapi.json").status_code == 404


def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "BODY_S", 0.05)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        raise AssertionError

    with pytest.raises(HTTPException, match=r"did not come within 0\.05 s"):
        asyncio.run(gateway._read_body(Request({"type": "http", "method": "POST", "headers": []}, receive)))


def test_missing_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"HEALCHAIN_STORE_SECRET_KEY: of the store's administrator") as caught:
        gateway.read_settings(
            {"PREFECT_API_URL": NOWHERE, "HEALCHAIN_STORE_URL": "x", "HEALCHAIN_STORE_ACCESS_KEY": "y"}
        )
    assert "PREFECT_API_URL:" not in str(caught.value)
    assert "HEALCHAIN_PUBLISHERS: addresses in whose tasks members take part" in str(caught.value)


def test_the_publishers_that_are_offered_are_addresses() -> None:
    given = {
        "PREFECT_API_URL": f"{NOWHERE}/api",
        "HEALCHAIN_STORE_URL": f"{NOWHERE}/bucket",
        "HEALCHAIN_STORE_ACCESS_KEY": "a",
        "HEALCHAIN_STORE_SECRET_KEY": "b",
    }
    mine = Account.create().address
    found = gateway.read_settings({**given, "HEALCHAIN_PUBLISHERS": f"{mine.lower()}, 0x{'7' * 40}"})
    assert found.publishers == (mine, "0x" + "7" * 40)
    for wrong in ("publisher", f"{mine},", f"{mine} {mine}"):
        with pytest.raises(ValueError, match=f"HEALCHAIN_PUBLISHERS = {wrong}: expected addresses"):
            gateway.read_settings({**given, "HEALCHAIN_PUBLISHERS": wrong})


@pytest.mark.parametrize("amount", ["0", "-1", "nan", "inf", "1e400", "1e-19", "1 ether", "0,2"])
def test_an_amount_of_ether_that_is_none_is_refused(amount: str, folder: Path, tmp_path: Path) -> None:
    arguments = ["--server", NOWHERE, "--invitation", str(gateway.invite(folder, "hospital-a", 1))]
    arguments += ["--home", str(tmp_path / "home"), f"--most-stake={amount}"]
    result = CliRunner().invoke(app, ["join", *arguments])
    assert result.exit_code == 2
    assert f"--most-stake {amount}: expected an amount of ether above 0" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("A=1", 0o644, "others can read it: chmod 600"),
        ("A=1\nthe password is 123", 0o600, "line 2: expected NAME=VALUE"),
    ],
)
def test_a_settings_file_that_cannot_be_used_is_named(text: str, mode: int, said: str, folder: Path) -> None:
    folder.mkdir()
    (folder / "gateway.env").write_text(text)
    (folder / "gateway.env").chmod(mode)
    result = CliRunner().invoke(app, ["invite", "a", "--folder", str(folder)])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert "123" not in result.output


def test_a_chain_inside_a_process_is_not_offered(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be shared: deploy on a node"):
        gateway.pin_chain(folder, CHAIN.model_copy(update={"rpc": f"local:{tmp_path / 'chain'}"}))
    assert gateway.pinned_chain(folder) is None


def test_a_member_that_is_not_there_cannot_be_expelled(folder: Path) -> None:
    with pytest.raises(ValueError, match="no member 'hospital-a': there are none"):
        gateway.expel(folder, settings(), "hospital-a")
