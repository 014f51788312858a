"""A publisher that is set up again: what its home has pinned stays. Setting up on real servers is in test_stack."""

import json
from pathlib import Path

import pytest

from blocks.artifacts import ArtifactStore
from blocks.chain import Chain
from blocks.connections import Connections, connections_of
from blocks.identity import Identity, create_home
from contracts.sending import Sending
from infra import chain_deployment
from infra.gateway import Settings
from infra.publisher_home import Wish, _chain, _check, _pinned

ROOT = "http://127.0.0.1:1/bucket"
STORE = ArtifactStore(root=ROOT, access_key="administrator", secret_key="a secret key")


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """A chain with the contracts, two confirmations; another publisher's account brought them."""
    folder = tmp_path_factory.mktemp("chain")
    return chain_deployment.deploy(
        f"local:{folder / 'chain.sqlite'}", create_home(folder / "deployer"), Sending(confirmations=2), 3600
    )


@pytest.fixture
def me(deployed: Chain, tmp_path: Path) -> Identity:
    """A publisher that was set up on this chain, which Prefect's server notes."""
    me = create_home(tmp_path / "clinic")
    Connections(name="clinic", chain=deployed, store=STORE, uses_pools=True).pin(me)
    chain_deployment.note(deployed)
    return me


def elsewhere(chain: Chain) -> Chain:
    return chain.model_copy(update={"escrow_address": "0x" + "5" * 40})


def settings(*publishers: str, root: str = ROOT) -> Settings:
    return Settings(STORE.model_copy(update={"root": root}), "http://127.0.0.1:1/api", "", root, publishers)


def again(me: Identity, **wish: object) -> Chain:
    return _chain(me, Wish("clinic", **wish), _pinned(me))  # type: ignore[arg-type]


def test_what_is_pinned_stays_and_may_be_asked_for(me: Identity, deployed: Chain) -> None:
    rpc = deployed.rpc
    for wish in ({}, {"rpc": rpc}, {"chain_id": deployed.chain_id, "confirmations": 2}):
        assert again(me, **wish) == connections_of(me).chain


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"chain_id": 5}, r"--chain-id 5: this home's connections.json has chain \d+: leave it out, or"),
        ({"confirmations": 12}, r"--confirmations 12: this home's connections.json has 2: leave it out, or change"),
    ],
)
def test_what_is_asked_for_otherwise_is_refused(me: Identity, wish: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        again(me, **wish)


def test_another_chain_in_the_servers_block_moves_nobody_unasked(me: Identity, deployed: Chain) -> None:
    chain_deployment.note(elsewhere(deployed))
    with pytest.raises(ValueError, match=r"block `chain` is chain .*0x5{40}.*, this home's is .*--new-chain; if not"):
        again(me)
    Chain.delete("chain")
    assert again(me) == connections_of(me).chain  # and is noted by what follows


def test_the_chain_is_changed_on_demand(me: Identity, deployed: Chain) -> None:
    connections_of(me).model_copy(update={"chain": elsewhere(deployed)}).pin(me)
    with pytest.raises(ValueError, match="give --new-chain"):
        again(me)
    assert again(me, has_new_chain=True).escrow_address == deployed.escrow_address


def test_a_first_time_takes_the_noted_chain_and_heeds_what_is_asked(me: Identity, deployed: Chain) -> None:
    (Path(me.home) / "connections.json").unlink()
    taken = again(me, confirmations=12)
    assert (taken.escrow_address, taken.sending.confirmations) == (deployed.escrow_address, 12)
    with pytest.raises(ValueError, match=r"--chain-id 5: Prefect's block `chain` has chain \d+"):
        again(me, chain_id=5)


def test_name_store_and_publishers_are_compared(me: Identity) -> None:
    pinned = _pinned(me)
    _check(me, Wish("clinic"), settings(me.address), pinned)
    for wish, given, says in [
        (Wish("publisher"), settings(me.address), "--name publisher: this home is clinic: give --name clinic"),
        (Wish("clinic"), settings(me.address, root="http://other:9/b"), "HEALCHAIN_STORE_URL = http://other:9/b: this"),
        (Wish("clinic"), settings("0x" + "7" * 40), f"HEALCHAIN_PUBLISHERS = 0x7+: .*: add {me.address} to it"),
    ]:
        with pytest.raises(ValueError, match=says):
            _check(me, wish, given, pinned)


def test_connections_that_cannot_be_read_are_not_written_over(me: Identity) -> None:
    (Path(me.home) / "connections.json").write_text(json.dumps({"name": "clinic"}))
    with pytest.raises(ValueError, match="is not what was written: restore it"):
        _pinned(me)
