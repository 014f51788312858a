"""An in-process chain with the four contracts and funded actors, and one task carried from stage to stage.

Stages: "empty" (contracts only), "locked" (task published, miners with stake), "drawn" (cohort closed, aggregator
drawn), "published" (block on chain), "open" (requirement met, scores may be revealed) and "paid" (all scores revealed,
reward distributed). Each is built once and returned to by snapshot.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from eth.estimators.gas import binary_gas_search
from eth_account import Account
from eth_account.signers.local import LocalAccount
from eth_tester import EthereumTester, PyEVMBackend
from eth_utils import keccak
from web3 import EthereumTesterProvider, Web3

from contracts.bindings import (
    ZERO_ADDRESS,
    CohortOnChain,
    Contracts,
    Deployment,
    Distributed,
    Mined,
    RegistrationClosed,
    RewardClaimed,
    Terms,
    Withdrawn,
    connect,
    deploy,
)
from contracts.contributions import Opening, Place
from contracts.messages import (
    Address,
    Attestation,
    Bytes,
    Candidate,
    Domain,
    Registration,
    TaskId,
    accuracy_commit,
    score_commit,
    sign,
    struct_hash,
)
from contracts.sending import Sender

TASK = "chest-x-ray"
REWARD = 1_000_003
ACCURACY = 800_000
SALT = keccak(text="the publisher's salt")
SPEC = "0x" + keccak(text="specification").hex()
STAKES = (40, 10, 30, 20)
PUBLISH_WINDOW, PUBLISHER_WINDOW, AGGREGATOR_WINDOW, SCORE_WINDOW = 400, 100, 200, 300
PENALTY_PPM = 250_000
DELAY = 3600
# More than all ether, so that the limits of the amounts can be reached.
FUNDS = 2**124


def named(name: str) -> LocalAccount:
    return Account.from_key(keccak(text=name))


def number(address: str) -> int:
    return int(address, 16)


def salt_of(account: LocalAccount) -> bytes:
    return keccak(text=account.address)


class World:
    def __init__(self, miner_count: int = 8, *, is_gas_estimated: bool = False) -> None:
        # Key 1 is the account in whose name the tester reads; it has to have a balance.
        self.deployer = Account.from_key((1).to_bytes(32, "big"))
        self.publisher, self.stranger = named("publisher"), named("stranger")
        self.miners = sorted((named(f"miner {i}") for i in range(miner_count)), key=lambda m: number(m.address))
        actors = [self.deployer, self.publisher, self.stranger, *self.miners]
        state = {
            bytes.fromhex(actor.address[2:]): {"balance": FUNDS, "nonce": 0, "code": b"", "storage": {}}
            for actor in actors
        }
        self.tester = EthereumTester(PyEVMBackend(genesis_state=state))
        self.web3 = Web3(EthereumTesterProvider(self.tester))
        if not is_gas_estimated:
            # Try a transaction once, with all the gas of a block, instead of a dozen times to find out what it needs.
            self.tester.backend.chain.gas_estimator = binary_gas_search(tolerance=10**8)
        # Far ahead of the wall clock, which the tester would follow: every block is one second after the last.
        self.tester.time_travel(4_000_000_000)
        self.deployment: Deployment = deploy(Sender(self.web3, self.deployer), withdrawal_delay_s=DELAY)
        self.domain = Domain(self.deployment.chain_id, self.deployment.publisher)
        self.views = connect(self.web3, self.deployment)
        self._bound: dict[str, Contracts] = {}
        self._snapshots: dict[str, object] = {"empty": self.tester.take_snapshot()}
        self.deadline = 0

    def as_(self, account: LocalAccount) -> Contracts:
        if account.address not in self._bound:
            self._bound[account.address] = connect(self.web3, self.deployment, Sender(self.web3, account))
        return self._bound[account.address]

    # Time

    def now(self) -> int:
        return self.web3.eth.get_block("latest")["timestamp"]

    def at(self, timestamp: int) -> None:
        """The next transaction is mined at exactly this time."""
        if timestamp != self.now() + 1:
            self.tester.time_travel(timestamp)

    def balance(self, address: str) -> int:
        return self.web3.eth.get_balance(address)

    # The default task

    @property
    def cohort(self) -> list[LocalAccount]:
        return self.miners[: len(STAKES)]

    @property
    def cohort_on_chain(self) -> CohortOnChain:
        return self.views.stakes.get_cohort(TASK)

    @property
    def aggregator(self) -> LocalAccount:
        return self.aggregator_of(TASK)

    def aggregator_of(self, task_id: TaskId) -> LocalAccount:
        address = self.views.stakes.aggregator_of(task_id)
        return next(miner for miner in self.miners if miner.address == address)

    @property
    def others(self) -> list[LocalAccount]:
        return [miner for miner in self.cohort if miner != self.aggregator]

    def terms(self, **changes: int) -> Terms:
        usual = Terms(
            deadline_s=self.now() + 1000,
            publish_window_s=PUBLISH_WINDOW,
            publisher_reveal_window_s=PUBLISHER_WINDOW,
            aggregator_reveal_window_s=AGGREGATOR_WINDOW,
            score_reveal_window_s=SCORE_WINDOW,
            min_miners=3,
            max_miners=6,
            fault_rate_ppm=250_000,
            aggregator_share_ppm=100_000,
            silence_penalty_ppm=PENALTY_PPM,
            max_score=10**9,
            min_stake_wei=10,
        )
        return replace(usual, **changes)

    def publish(
        self,
        task_id: TaskId = TASK,
        *,
        reward: int = REWARD,
        accuracy_ppm: int = ACCURACY,
        token: Address = ZERO_ADDRESS,
        **terms: int,
    ) -> Terms:
        chosen = self.terms(**terms)
        commit = accuracy_commit(accuracy_ppm, SALT)
        self.as_(self.publisher).escrow.publish_task(task_id, commit, SPEC, chosen, reward_wei=reward, token=token)
        return chosen

    def deposit(self, miners: Sequence[LocalAccount], stakes: Sequence[int]) -> None:
        for miner, stake in zip(miners, stakes, strict=True):
            self.as_(miner).stakes.deposit_stake(amount_wei=stake)

    def application(
        self, miner: LocalAccount, task_id: TaskId = TASK, /, domain: Domain | None = None, **changes: object
    ) -> tuple[Registration, Bytes]:
        """The signed Registration of a miner, for all its available stake. Changes are made before it is signed."""
        usual = Registration(
            task_id=task_id,
            round_number=0,
            miner=miner.address,
            encryption_key="0x02" + salt_of(miner).hex(),
            dataset_proof_sha256="0x" + keccak(text=f"samples of {miner.address}").hex(),
            stake_wei=self.views.stakes.available_stake(miner.address),
        )
        registration = usual.model_copy(update=changes)
        return registration, sign(registration, domain or self.domain, miner.key)

    def close(self, miners: Sequence[LocalAccount], task_id: TaskId = TASK) -> Mined[RegistrationClosed]:
        applications = [self.application(miner, task_id) for miner in miners]
        return self.as_(self.publisher).stakes.close_registration(task_id, applications)

    def close_and_draw(self, miners: Sequence[LocalAccount], task_id: TaskId = TASK) -> None:
        self.close(miners, task_id)
        self.tester.mine_block()
        self.as_(self.stranger).stakes.draw_aggregator(task_id)

    def form(self, miners: Sequence[LocalAccount], **terms: Any) -> None:
        """The default task up to the draw, with other terms and ten wei of stake each."""
        self.publish(**terms)
        self.deposit(miners, [10] * len(miners))
        self.close_and_draw(miners)

    def scores(self, participants: Sequence[LocalAccount] | None = None) -> dict[str, int]:
        return {miner.address: 1000 + 111 * i for i, miner in enumerate(participants or self.cohort)}

    def candidate(self, task_id: str = TASK, **changes: object) -> Candidate:
        scores = self.scores()
        usual = Candidate(
            task_id=task_id,
            round_number=1,
            model_sha256="0x" + "ab" * 32,
            model_uri="s3://models/chest-x-ray/1",
            correct=85,
            total=100,
            aggregator=changes.get("aggregator") or self.aggregator.address,
            participants=tuple(miner.address for miner in self.cohort),
            score_commits=tuple(
                score_commit(scores[miner.address], salt_of(miner), task_id, miner.address) for miner in self.cohort
            ),
            opening_sha256="0x" + "cd" * 32,
        )
        return usual.model_copy(update=changes)

    def vote(
        self, voter: LocalAccount, candidate: Candidate, /, domain: Domain | None = None, **changes: object
    ) -> str:
        attestation = Attestation(
            task_id=candidate.task_id,
            round_number=candidate.round_number,
            candidate=struct_hash(candidate),
            accepted=True,
            reason="",
        )
        return sign(attestation.model_copy(update=changes), domain or self.domain, voter.key)

    def votes(self, candidate: Candidate, voters: Sequence[LocalAccount] | None = None) -> list[str]:
        return [self.vote(voter, candidate) for voter in (self.others if voters is None else voters)]

    def publish_block(self, candidate: Candidate | None = None, voters: Sequence[LocalAccount] | None = None) -> None:
        candidate = candidate or self.candidate()
        cohort = self.views.stakes.get_cohort(candidate.task_id)
        publisher = self.as_(self.aggregator_of(candidate.task_id)).publisher
        publisher.publish_block(candidate, self.votes(candidate, voters), cohort)

    def place(self, miner: LocalAccount, task_id: TaskId = TASK) -> Place:
        found = self.views.publisher.place_of(task_id, miner.address)
        assert found is not None
        return found

    def reveal_accuracy(self, accuracy_ppm: int = ACCURACY) -> None:
        self.as_(self.publisher).rewards.reveal_accuracy(TASK, accuracy_ppm, SALT)

    def opening(self, miner: LocalAccount, task_id: TaskId = TASK, *, score: int | None = None) -> Opening:
        """Of a miner's commitment in the block; to the usual score unless another is given."""
        score = self.scores()[miner.address] if score is None else score
        return Opening(score, salt_of(miner), self.place(miner, task_id))

    def reveal_score(self, miner: LocalAccount, score: int | None = None) -> None:
        self.as_(miner).rewards.reveal_score(TASK, self.opening(miner, score=score))

    def reveal_scores(self) -> None:
        for miner in self.cohort:
            self.reveal_score(miner)

    def distribute(self, task_id: TaskId = TASK) -> Distributed:
        """By a stranger, when the requirement was met."""
        events = self.as_(self.stranger).rewards.distribute(task_id).events
        return next(event for event in events if isinstance(event, Distributed))

    def claim(
        self,
        miner: LocalAccount,
        task_id: TaskId = TASK,
        *,
        score: int | None = None,
        token: Address = ZERO_ADDRESS,
        recipient: Address | None = None,
    ) -> Mined[RewardClaimed]:
        """The miner's part of a task's reward; score as in `opening`."""
        opening = self.opening(miner, task_id, score=score)
        return self.as_(miner).rewards.claim_to(task_id, opening, recipient, token=token)

    def withdraw(
        self, account: LocalAccount, *, token: Address = ZERO_ADDRESS, recipient: Address | None = None
    ) -> Mined[Withdrawn]:
        """The account's balance: refunds and shares, not its claims."""
        return self.as_(account).rewards.withdraw_to(recipient, token=token)

    # Stages

    def stage(self, name: str) -> "World":
        steps: dict[str, Callable[[], None]] = {
            "locked": self._build_locked,
            "drawn": self._build_drawn,
            "published": self.publish_block,
            "open": self.reveal_accuracy,
            "paid": self._build_paid,
        }
        if name not in self._snapshots:
            names = ["empty", *steps]
            self.stage(names[names.index(name) - 1])
            steps[name]()
            self._snapshots[name] = self.tester.take_snapshot()
        self._return_to(name)
        if name != "empty":
            self.deadline = self.views.escrow.get_task(TASK).terms.deadline_s
        return self

    def go_back(self, snapshot: object) -> None:
        """To a snapshot of the tester, with fresh journals: the others would send again what the chain gives up."""
        self._bound.clear()
        self.tester.revert_to_snapshot(snapshot)

    def _return_to(self, name: str) -> None:
        self.go_back(self._snapshots[name])
        # Going forward, the tester leaves numbers of blocks below the head with the branch that is given up.
        chaindb = self.tester.backend.chain.chaindb
        header = chaindb.get_canonical_head()
        while header.block_number > 0:
            chaindb._add_block_number_to_hash_lookup(chaindb.db, header)
            header = chaindb.get_block_header_by_hash(header.parent_hash)

    def _build_locked(self) -> None:
        self.publish()
        self.deposit(self.miners[:6], (*STAKES, 50, 5))

    def _build_drawn(self) -> None:
        self.close_and_draw(self.cohort)

    def _build_paid(self) -> None:
        self.reveal_scores()
        self.distribute()
