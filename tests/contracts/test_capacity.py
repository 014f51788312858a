"""The largest cohort: with 200 miners every transaction still fits in a block."""

from eth_account.signers.local import LocalAccount

from contracts.bindings import task_events
from contracts.messages import score_commit
from tests.contracts.world import REWARD, TASK, World, salt_of

# EIP-7825: the most gas that one transaction may use on Ethereum from the Osaka fork on.
LARGEST_TRANSACTION_GAS = 2**24


def post(world: World, sender: LocalAccount, nonce: int, data: bytes, value: int = 0) -> None:
    """A transaction to the stake registry, neither simulated nor waited for."""
    transaction = {
        "to": world.deployment.stakes,
        "value": value,
        "data": "0x" + data.hex(),
        "chainId": world.deployment.chain_id,
        "nonce": nonce,
        "gas": 200_000,
        "maxFeePerGas": 10**12,
        "maxPriorityFeePerGas": 1,
    }
    world.tester.send_raw_transaction("0x" + bytes(sender.sign_transaction(transaction).raw_transaction).hex())


def gas_of_a_task(world: World, count: int) -> dict[str, int]:
    """Carry a task with `count` miners to its end; the most gas of each kind of transaction."""
    world.stage("empty")
    stakes, miners = world.views.stakes, world.miners[:count]
    world.publish(max_miners=200, fault_rate_ppm=0)
    for i, miner in enumerate(miners):
        post(world, miner, 0, stakes._encode("depositStake"), value=10 + i)
        post(world, miner, 1, stakes._encode("register", TASK, salt_of(miner)))
    world.close_and_draw(miners)
    aggregator = world.aggregator
    candidate = world.candidate(
        participants=tuple(miner.address for miner in miners),
        score_commits=tuple(score_commit(7, salt_of(miner), TASK, miner.address) for miner in miners),
    )
    votes = world.votes(candidate, [miner for miner in miners if miner != aggregator])
    assert world.views.publisher.required_votes(TASK) == count - 1
    world.as_(aggregator).publisher.publish_block(candidate, votes)
    world.reveal_accuracy()
    snapshot = world.tester.take_snapshot()
    most = {}
    for miner in (miners[0], miners[count // 2], miners[-1]):
        most["revealScore"] = world.as_(miner).rewards.reveal_score(TASK, 7, salt_of(miner)).gas_used
    # Nobody reveals: everybody is paid, so that the distribution is as long as it can be.
    world.tester.revert_to_snapshot(snapshot)
    world.at(world.now() + 1000)
    world.as_(world.stranger).rewards.distribute(TASK)
    assert sum(world.views.rewards.balance_of(miner.address) for miner in miners) == REWARD
    for record in task_events(world.web3, world.deployment, TASK):
        most[record.kind] = max(record.gas_used, most.get(record.kind, 0))
    return most


def test_200_miners_fit() -> None:
    """Every loop is linear in the cohort, so that two sizes tell the third (measured with 200: contracts/README.md)."""
    world = World(30)
    few, many = gas_of_a_task(world, 10), gas_of_a_task(world, 30)
    for kind, gas in many.items():
        per_miner = (gas - few[kind]) / 20
        assert gas + 170 * per_miner * 1.1 < LARGEST_TRANSACTION_GAS, kind
