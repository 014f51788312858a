"""bindings.py: everything in the ABI has its Python, errors say what to do, and nothing is spent on a refusal."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from eth_account import Account
from eth_tester.exceptions import TransactionFailed
from eth_utils import keccak
from web3.exceptions import ContractCustomError, ContractPanicError

from contracts import bindings, sending
from contracts.bindings import (
    CONTRACTS,
    EVENTS,
    HINTS,
    INTERFACES,
    BlockPublished,
    HealChainEscrow,
    InvalidDeployment,
    Mined,
    Offence,
    StakeRegistry,
    Token,
    account_events,
    check_deployment,
    connect,
    find_events,
    load_build,
    task_events,
)
from contracts.messages import accuracy_commit, sign
from contracts.sending import InsufficientFunds, Reverted, Sender, Sending, Unconfirmed
from tests.contracts.tokens import funded
from tests.contracts.world import (
    ACCURACY,
    AGGREGATOR_WINDOW,
    DELAY,
    PUBLISHER_WINDOW,
    REWARD,
    SALT,
    SCORE_WINDOW,
    SPEC,
    TASK,
    World,
    named,
)

# Called by the other contracts only, part of another method (get_score, get_task), or not needed: limits, the domain itself.
WITHOUT_METHOD = {
    "markPublished",
    "releaseReward",
    "slashEquivocation",
    "aggregatorAmong",
    "isRevealed",
    "getTerms",
    "eip712Domain",
    "MAX_DURATION_S",
    "MAX_WINDOW_S",
}


def entries(kind: str) -> list[dict]:
    return [entry for name in (*CONTRACTS, *INTERFACES) for entry in load_build(name)["abi"] if entry["type"] == kind]


def snake(name: str) -> str:
    return name.lower() if name.isupper() else re.sub("(?<!^)(?<!_)(?=[A-Z])", "_", name).lower()


def test_every_function_has_a_method() -> None:
    for contract in CONTRACTS:
        methods = set(dir(getattr(bindings, contract)))
        functions = {entry["name"] for entry in load_build(contract)["abi"] if entry["type"] == "function"}
        assert {snake(name) for name in functions - WITHOUT_METHOD} <= methods


def test_every_event_has_a_dataclass_with_as_many_fields() -> None:
    ours = {kind.__name__: len(fields(kind)) for kind in EVENTS}
    solidity = {
        entry["name"]: len(entry["inputs"]) for entry in entries("event") if entry["name"] != "EIP712DomainChanged"
    }
    assert ours == solidity


def test_every_error_has_a_hint_and_every_hint_an_error() -> None:
    errors = {entry["name"] for entry in entries("error")}
    assert errors | {"Error", "Panic", "UnknownError", "TransactionReverted"} == set(HINTS)


def test_one_name_is_one_error() -> None:
    signatures: dict[str, set[str]] = {}
    for entry in entries("error"):
        signatures.setdefault(entry["name"], set()).add(",".join(field["type"] for field in entry["inputs"]))
    # Who is not entitled is named by its address, or among a cohort by its position.
    assert {name: found for name, found in signatures.items() if len(found) > 1} == {
        "NotEntitled": {"string,address", "string,uint256"}
    }


# Events


def test_every_event_is_decoded(empty: World) -> None:
    """A long story in which each of them happens."""
    seen: list[object] = []

    def tell(mined: Mined) -> None:
        assert mined.event in mined.events
        seen.extend(mined.events)

    world, stranger = empty, empty.as_(empty.stranger)
    commit, escrow = accuracy_commit(ACCURACY, SALT), empty.as_(empty.publisher).escrow
    for miner in world.cohort:
        tell(world.as_(miner).stakes.deposit_stake(amount_wei=100))
    token = funded(world)
    tell(token.approve(world.deployment.escrow, REWARD))
    tell(escrow.publish_task("in-tokens", commit, SPEC, world.terms(), reward_wei=REWARD, token=token.address))

    tell(escrow.publish_task(TASK, commit, SPEC, world.terms(), reward_wei=REWARD))
    tell(world.close(world.cohort))
    world.tester.mine_blocks(260)
    tell(stranger.stakes.move_seed(TASK))
    world.tester.mine_block()
    tell(stranger.stakes.draw_aggregator(TASK))
    first = world.aggregator
    pair = [world.candidate(correct=correct) for correct in (1, 2)]
    signatures = [sign(candidate, world.domain, first.key) for candidate in pair]
    tell(world.as_(first).stakes.resign_aggregator(TASK))
    tell(stranger.stakes.replace_aggregator(TASK))
    cohort = world.cohort_on_chain
    tell(stranger.publisher.report_equivocation(pair[0], signatures[0], pair[1], signatures[1], cohort))
    other = world.others[0] if world.others[0] != first else world.others[1]
    tell(stranger.stakes.credit_slashed(TASK, first.address, Offence.EQUIVOCATION, other.address))
    tell(world.as_(other).stakes.withdraw_credit())
    candidate = world.candidate()
    tell(world.as_(world.aggregator).publisher.publish_block(candidate, world.votes(candidate), cohort))
    world.at(world.now() + PUBLISHER_WINDOW + 1)
    tell(world.as_(world.aggregator).rewards.reveal_accuracy(TASK, ACCURACY, SALT))
    miner = world.cohort[0]
    tell(world.as_(miner).rewards.reveal_score(TASK, world.opening(miner)))
    world.at(world.now() + SCORE_WINDOW + 1)
    tell(stranger.rewards.distribute(TASK))
    tell(world.claim(miner))
    tell(world.withdraw(world.aggregator))

    held_until = world.views.stakes.get_hold(other.address).held_until_s
    world.publish("silent", deadline_s=held_until + 1000)
    world.deposit(world.cohort, [100] * 4)
    world.close_and_draw([m for m in world.cohort if m != first], "silent")
    quiet = world.candidate("silent", aggregator=world.aggregator_of("silent").address)
    kept = [i for i, m in enumerate(world.cohort) if m != first]
    quiet = quiet.model_copy(
        update={name: tuple(getattr(quiet, name)[i] for i in kept) for name in ("participants", "score_commits")}
    )
    world.publish_block(quiet, [world.cohort[i] for i in kept if world.cohort[i].address != quiet.aggregator])
    world.at(world.now() + PUBLISHER_WINDOW + AGGREGATOR_WINDOW + 1)
    tell(stranger.rewards.open_scores("silent"))
    world.at(held_until + 1)
    tell(stranger.stakes.release_stake(TASK, other.address))
    tell(escrow.refund_publisher("in-tokens"))
    tell(world.as_(other).stakes.request_withdrawal(1))
    world.at(world.now() + DELAY)
    tell(world.as_(other).stakes.withdraw_stake())
    assert {type(event) for event in seen} == set(EVENTS)


# Errors


# Reached by no call: the first two would be a wrong build; OpenZeppelin's tokens say these of the zero address only.
UNREACHABLE = {"InvalidShortString", "StringTooLong"} | {
    f"ERC20Invalid{who}" for who in ("Approver", "Receiver", "Sender", "Spender")
}


def test_every_error_is_reached_by_a_test_of_this_folder() -> None:
    """Each is named where a test expects it, in quotes."""
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    errors = {entry["name"] for entry in entries("error")} - UNREACHABLE
    assert {name for name in errors if f'match="{name}' not in sources and f'"{name}")' not in sources} == set()


def test_a_refusal_costs_nothing_and_says_what_to_do(locked: World) -> None:
    account = locked.stranger
    before = locked.balance(account.address), locked.web3.eth.get_transaction_count(account.address)
    with pytest.raises(Reverted) as refused:
        locked.as_(account).escrow.refund_publisher(TASK)
    assert (refused.value.error, refused.value.arguments) == ("NotPublisher", (TASK, account.address))
    assert refused.value.hint == HINTS["NotPublisher"]
    assert str(refused.value) == f"NotPublisher({TASK}, {account.address}): {HINTS['NotPublisher']}"
    assert before == (locked.balance(account.address), locked.web3.eth.get_transaction_count(account.address))


SELECTOR = "0x" + keccak(text="SeedNotMined(uint40,uint256)")[:4].hex()
DATA = SELECTOR + (7).to_bytes(32, "big").hex() + (8).to_bytes(32, "big").hex()
PANIC = "0x4e487b71" + (0x11).to_bytes(32, "big").hex()


@pytest.mark.parametrize(
    ("raised", "error", "arguments"),
    [
        (ContractCustomError(DATA, data=DATA), "SeedNotMined", (7, 8)),
        (ContractCustomError("execution reverted", data={"data": DATA}), "SeedNotMined", (7, 8)),
        (TransactionFailed(f"execution reverted: {bytes.fromhex(DATA[2:])!r}"), "SeedNotMined", (7, 8)),
        (ContractPanicError("overflow", data=PANIC), "Panic", (0x11,)),
        (ContractCustomError("0x12345678", data="0x12345678"), "UnknownError", ("0x12345678",)),
        (ContractCustomError(SELECTOR, data=SELECTOR), "UnknownError", (SELECTOR,)),
    ],
)
def test_every_provider_gives_the_same_error(
    locked: World, monkeypatch: pytest.MonkeyPatch, raised: Exception, error: str, arguments: tuple
) -> None:
    def refuse(*_: object) -> int:
        raise raised

    monkeypatch.setattr(locked.web3.eth, "estimate_gas", refuse)
    with pytest.raises(Reverted) as refused:
        locked.as_(locked.stranger).stakes.draw_aggregator(TASK)
    assert (refused.value.error, refused.value.arguments) == (error, arguments)


def test_a_broken_connection_is_not_a_refusal(locked: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise ConnectionError("no route to the node")

    monkeypatch.setattr(locked.web3.eth, "estimate_gas", refuse)
    sender = Sender(locked.web3, locked.stranger, rules=Sending(timeout_s=0.1, poll_s=0.05))
    with pytest.raises(ConnectionError):
        connect(locked.web3, locked.deployment, sender).stakes.draw_aggregator(TASK)


def test_a_refusal_after_simulation_is_reported(locked: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locked.web3.eth, "estimate_gas", lambda *_: 100_000)
    with pytest.raises(Reverted, match="TransactionReverted") as refused:
        locked.as_(locked.stranger).escrow.refund_publisher(TASK)
    assert locked.web3.eth.get_transaction_receipt(refused.value.arguments[0])["status"] == 0


def test_an_account_without_ether_is_told_what_it_needs(empty: World) -> None:
    poor = named("poor")
    with pytest.raises(InsufficientFunds) as refused:
        connect(empty.web3, empty.deployment, Sender(empty.web3, poor)).stakes.deposit_stake(amount_wei=10)
    assert (refused.value.account, refused.value.balance_wei) == (poor.address, 0)
    # That is for the cheapest gas, the least any transaction costs; the second answer is for the gas of this one.
    giver = Sender(empty.web3, empty.stranger)
    giver.send(b"", to=poor.address, value_wei=refused.value.needed_wei)
    with pytest.raises(InsufficientFunds) as refused:
        connect(empty.web3, empty.deployment, Sender(empty.web3, poor)).stakes.deposit_stake(amount_wei=10)
    missing = refused.value.needed_wei - refused.value.balance_wei
    giver.send(b"", to=poor.address, value_wei=missing)
    connect(empty.web3, empty.deployment, Sender(empty.web3, poor)).stakes.deposit_stake(amount_wei=10)
    assert empty.views.stakes.stake_of(poor.address) == 10


def test_without_an_account_only_views_work(locked: World) -> None:
    assert locked.views.escrow.get_task(TASK).reward_wei > 0
    with pytest.raises(ValueError, match="bind the contract to an account"):
        locked.views.stakes.move_seed(TASK)
    with pytest.raises(ValueError, match="name a recipient, or bind the contract"):
        locked.views.escrow.refund_publisher(TASK)


# Transactions


def test_transactions_are_signed_here_for_this_chain(empty: World) -> None:
    mined = empty.as_(empty.stranger).stakes.deposit_stake(amount_wei=3)
    found = empty.web3.eth.get_transaction(mined.transaction)
    assert (found["type"], found["chainId"]) == (2, empty.deployment.chain_id)
    assert (found["from"], found["to"], found["value"]) == (empty.stranger.address, empty.deployment.stakes, 3)
    receipt = empty.web3.eth.get_transaction_receipt(mined.transaction)
    assert (mined.block_number, mined.gas_used) == (receipt["blockNumber"], receipt["gasUsed"])
    assert mined.events == (mined.event,)


def test_the_real_estimate_is_enough() -> None:
    world = World(6, is_gas_estimated=True)
    world.stage("published")
    world.reveal_accuracy()
    world.reveal_scores()
    world.distribute()
    for miner in world.cohort:
        world.claim(miner)
    world.withdraw(world.aggregator)
    assert world.balance(world.deployment.rewards) == 0


def test_confirmations_are_waited_for(empty: World, monkeypatch: pytest.MonkeyPatch) -> None:
    sender = Sender(empty.web3, empty.stranger, rules=Sending(confirmations=3, timeout_s=0.3, poll_s=0.1))
    stakes = StakeRegistry(empty.web3, empty.deployment.stakes, sender)
    with pytest.raises(Unconfirmed, match="fewer than 3 confirmations"):
        stakes.deposit_stake(amount_wei=1)
    monkeypatch.setattr(sending.time, "sleep", lambda _: empty.tester.mine_block())
    mined = stakes.deposit_stake(amount_wei=1)
    assert empty.web3.eth.block_number == mined.block_number + 2
    assert empty.views.stakes.stake_of(empty.stranger.address) == 1


# Deployment


def test_a_deployment_is_checked(world: World) -> None:
    good = world.deployment
    check_deployment(world.web3, good)
    with pytest.raises(InvalidDeployment, match="connected to chain"):
        check_deployment(world.web3, replace(good, chain_id=1))
    with pytest.raises(InvalidDeployment, match="not this build of HealChainEscrow"):
        check_deployment(world.web3, replace(good, escrow=world.stranger.address))
    with pytest.raises(InvalidDeployment, match="not this build of StakeRegistry"):
        check_deployment(world.web3, replace(good, stakes=good.rewards))


def test_an_account_without_code_is_no_token(empty: World) -> None:
    with pytest.raises(InvalidDeployment, match="no IERC20 at"):
        Token(empty.web3, named("nobody").address).balance_of(empty.stranger.address)


def test_contracts_of_two_deployments_do_not_mix(empty: World) -> None:
    second = bindings.deploy(Sender(empty.web3, empty.stranger))
    with pytest.raises(InvalidDeployment, match=r"escrow\.rewardDistribution"):
        check_deployment(empty.web3, replace(empty.deployment, rewards=second.rewards))
    assert connect(empty.web3, second).stakes.withdrawal_delay_s() == 3600


def test_an_address_without_a_contract_is_named(world: World) -> None:
    with pytest.raises(InvalidDeployment, match="no HealChainEscrow at"):
        HealChainEscrow(world.web3, Account.create().address).get_task(TASK)


# What happened


def test_all_transactions_of_a_task_are_found(published: World) -> None:
    published.publish("another")
    published.reveal_accuracy()
    published.reveal_scores()
    published.distribute()
    last = published.claim(published.cohort[0])
    records = task_events(published.web3, published.deployment, TASK)
    assert [record.kind for record in records] == [
        "publishTask",
        "closeRegistration",
        "drawAggregator",
        "publishBlock",
        "revealAccuracy",
        *["revealScore"] * 4,
        "distribute",
        "claimTo",
    ]
    assert [record.sender for record in records[5:9]] == [miner.address for miner in published.cohort]
    assert [record.block_number for record in records] == sorted(record.block_number for record in records)
    final = records[-1]
    assert (final.transaction, final.gas_used) == (last.transaction, last.gas_used)
    assert final.timestamp_s == published.now()
    assert [record.kind for record in task_events(published.web3, published.deployment, "another")] == ["publishTask"]
    assert task_events(published.web3, published.deployment, "nobody-knows") == []


def test_logs_are_asked_for_in_pieces(published: World, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = task_events(published.web3, published.deployment, TASK)
    monkeypatch.setattr(bindings, "LOG_BLOCKS", 3)
    assert task_events(published.web3, published.deployment, TASK) == whole


def test_the_published_block_is_found_with_its_link(published: World) -> None:
    (event,) = find_events(published.web3, published.deployment, TASK, BlockPublished)
    assert event.model_uri == published.candidate().model_uri


def test_deposits_and_withdrawals_of_accounts_are_found(published: World) -> None:
    first, second = published.cohort[:2]
    published.as_(first).stakes.request_withdrawal(0)
    records = account_events(published.web3, published.deployment, [first.address])
    assert [(record.kind, record.sender) for record in records] == [
        ("depositStake", first.address),
        ("requestWithdrawal", first.address),
    ]
    both = account_events(published.web3, published.deployment, [first.address, second.address])
    assert [record.kind for record in both] == ["depositStake", "depositStake", "requestWithdrawal"]
    assert account_events(published.web3, published.deployment, []) == []
