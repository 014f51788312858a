"""M6 and M7. Publish the block with its votes; reveal, distribute, withdraw; or refund.

Algorithms 6 and 7 of the protocol. Every step asks the chain first whether it is done, so that a retry sends nothing a
second time.
"""

from collections.abc import Callable

from prefect import task
from prefect.cache_policies import NO_CACHE

from contracts.bindings import Outcome, Settlement, StakeSlashed, Status
from contracts.contributions import Opening, Place
from contracts.messages import ZERO32, AbortReason, Attestation, Candidate, Cohort, struct_hash
from contracts.sending import InsufficientFunds, Reverted
from tasks.cohort import trusted_cohort
from tasks.contribute import read_prepared, score_at
from tasks.delivery import delivered_requirement
from tasks.publish import published_task, secrets_of
from tasks.records import BadRecord, Station, brief, give_up, station


@task(persist_result=False, cache_policy=NO_CACHE)
def publish_voted_block(task_id: str, round_number: int, actor: str) -> dict[str, str]:
    """M6, the aggregator: the block with the accepting votes, once; or the reason why there is none."""
    st = station(actor)
    contracts = st.chain.contracts(st.me)
    if contracts.publisher.get_block_meta(task_id) is not None:
        return st.receipt(task_id, round_number, "publish-block", _sent(st, task_id, "publishBlock"))
    cohort = trusted_cohort(st, task_id)
    candidate = st.need(Candidate, st.address, task_id, round_number)
    votes, verdicts = collect_votes(st, cohort, candidate)
    on_chain = contracts.stakes.get_cohort(task_id)
    required = contracts.publisher.required_votes(task_id, len(on_chain.miners))
    if len(votes) < required:
        detail = f"{len(votes)} accepting votes, {required} are required: {verdicts}"
        return give_up(st, task_id, round_number, "publish-block", AbortReason.CANDIDATE_REJECTED, detail[:2000])
    try:
        done = contracts.publisher.publish_block(candidate, votes, on_chain)
    except (Reverted, InsufficientFunds) as error:
        late = isinstance(error, Reverted) and error.error == "DeadlinePast"
        reason = AbortReason.DEADLINE_PASSED if late else AbortReason.PUBLISH_FAILED
        return give_up(st, task_id, round_number, "publish-block", reason, str(error))
    return st.receipt(task_id, round_number, "publish-block", done.transaction)


def collect_votes(st: Station, cohort: Cohort, candidate: Candidate) -> tuple[list[str], dict[str, str]]:
    """Signatures of the accepting votes of others in address order, and every verdict as a sentence."""
    name = struct_hash(candidate)
    signatures, verdicts = [], {}
    for miner in cohort.miners:
        try:
            found = st.find_signed(Attestation, miner, candidate.task_id, candidate.round_number)
        except BadRecord as error:
            verdicts[miner] = f"refused: {brief(error)}"
            continue
        if found is None:
            verdicts[miner] = "no vote"
            continue
        vote, signature = found
        if vote.candidate != name:
            verdicts[miner] = "refused: for another candidate"
        elif not vote.accepted:
            verdicts[miner] = f"INVALID: {vote.reason[:200]}"
        elif miner == cohort.aggregator:
            verdicts[miner] = "VALID (its own candidate, not counted)"
        else:
            verdicts[miner] = "VALID"
            signatures.append(signature)
    return signatures, verdicts


@task(persist_result=False, cache_policy=NO_CACHE)
def open_accuracy(task_id: str, actor: str) -> dict[str, str]:
    """M7, the publisher: open its commitment. Silence would gain nothing: the aggregator may open it instead."""
    st = station(actor)
    fields = secrets_of(st, task_id)
    return _reveal_accuracy(st, task_id, fields["accuracy_ppm"], fields["salt"])


@task(persist_result=False, cache_policy=NO_CACHE)
def open_accuracy_instead(task_id: str, actor: str) -> dict[str, str]:
    """M7, the aggregator: when the publisher's window has passed in silence, open its commitment."""
    st = station(actor)
    settlement = st.chain.contracts().rewards.get_settlement(task_id)
    if settlement.outcome is Outcome.PENDING:
        st.chain.wait_until(settlement.publisher_reveal_end_s + 1, "the aggregator's turn to reveal the accuracy")
    accuracy_ppm, salt = delivered_requirement(st, published_task(st, task_id))
    return _reveal_accuracy(st, task_id, accuracy_ppm, salt)


def _reveal_accuracy(st: Station, task_id: str, accuracy_ppm: int, salt: str) -> dict[str, str]:
    rewards = st.chain.contracts(st.me).rewards
    if rewards.get_settlement(task_id).outcome is Outcome.PENDING:
        rewards.reveal_accuracy(task_id, accuracy_ppm, bytes.fromhex(salt))
    return st.receipt(task_id, 0, "reveal-accuracy", _sent(st, task_id, "revealAccuracy"))


@task(persist_result=False, cache_policy=NO_CACHE)
def open_score(task_id: str, actor: str) -> dict[str, str]:
    """M7, a miner: open the score commitment that the block lists; once. Nothing to open when the publisher is refunded."""
    st = station(actor)
    contracts = st.chain.contracts(st.me)
    settlement = contracts.rewards.get_settlement(task_id)
    if settlement.outcome is Outcome.PENDING:
        st.chain.wait_until(settlement.aggregator_reveal_end_s + 1, "the end of the windows for the accuracy")
    own = contracts.publisher.place_of(task_id, st.address)
    if (
        settlement.outcome is Outcome.UNMET
        or own is None
        or contracts.rewards.get_score(task_id, own.position).is_revealed
    ):
        return st.receipt(task_id, 0, "reveal-score", _sent(st, task_id, "revealScore", by=st.address))
    done = contracts.rewards.reveal_score(task_id, own_opening(st, task_id, own))
    return st.receipt(task_id, 0, "reveal-score", done.transaction)


def own_opening(st: Station, task_id: str, own: Place) -> Opening:
    """My score and salt behind the commitment that the block lists for me. Raises BadRecord when my home has none."""
    meta = st.chain.contracts().publisher.get_block_meta(task_id)
    for number in range(meta.round_number if meta else 0, 0, -1):
        prepared = read_prepared(st, task_id, number)
        if prepared is not None and score_at(prepared, task_id, st.address) == own.score_commit:
            return Opening(prepared.score, prepared.score_salt, own)
    raise BadRecord(f"no score in {st.me.home} opens the commitment {own.score_commit} that the block lists for me")


@task(persist_result=False, cache_policy=NO_CACHE)
def distribute_and_withdraw(task_id: str, actor: str) -> dict[str, str]:
    """M7, anybody: have the contract distribute as soon as it may, then take what it owes me."""
    st = station(actor)
    contracts = st.chain.contracts(st.me)
    settlement = contracts.rewards.get_settlement(task_id)
    if not settlement.is_distributed:
        if settlement.outcome is not Outcome.UNMET and settlement.revealed_count < settlement.participant_count:
            st.chain.wait_until(last_reveal_s(st, task_id, settlement) + 1, "the end of the windows for the reveals")
        # Anybody may, and on hosts of their own several do at once.
        or_found_done(
            lambda: contracts.rewards.distribute(task_id),
            lambda: contracts.rewards.get_settlement(task_id).is_distributed,
        )
    token = contracts.escrow.get_task(task_id).token
    transaction, amount = claim_own_part(st, task_id, token)
    if contracts.rewards.balance_of(st.address, token):
        paid = contracts.rewards.withdraw_to(token=token)
        transaction, amount = paid.transaction, amount + paid.event.amount_wei
    return st.receipt(task_id, 0, "withdraw", transaction, amount)


def or_found_done(send: Callable[[], object], is_done: Callable[[], bool]) -> None:
    """Send what only the first sender can, unless another one was faster. Raises Reverted."""
    try:
        send()
    except Reverted:
        if not is_done():
            raise


def claim_own_part(st: Station, task_id: str, token: str) -> tuple[str, int]:
    """Take my part of a distributed reward, once; the transaction and the amount, zero when there is nothing to take."""
    contracts = st.chain.contracts(st.me)
    own = contracts.publisher.place_of(task_id, st.address)
    if own is None or contracts.rewards.get_settlement(task_id).outcome is Outcome.UNMET:
        return ZERO32, 0
    score = contracts.rewards.get_score(task_id, own.position)
    # A claim that rounds to nothing is made as well: its parts leave the divisor, and no wei stays behind.
    is_owed = score.score or contracts.rewards.claimable(task_id, own.position, score.score, token)
    if score.is_claimed or not is_owed:
        return ZERO32, 0
    paid = contracts.rewards.claim_to(task_id, own_opening(st, task_id, own), token=token)
    return paid.transaction, paid.event.amount_wei


def last_reveal_s(st: Station, task_id: str, settlement: Settlement) -> int:
    """The last second of chain time in which anybody may still reveal a score."""
    window_s = st.chain.contracts().escrow.get_task(task_id).terms.score_reveal_window_s
    if settlement.outcome is Outcome.PENDING:
        return settlement.aggregator_reveal_end_s + window_s
    return settlement.score_reveal_end_s


@task(persist_result=False, cache_policy=NO_CACHE)
def take_refund(task_id: str, actor: str) -> dict[str, str]:
    """M7, the publisher: the reward back, when the deadline has passed without a block. Raises NotYet before."""
    st = station(actor)
    escrow = st.chain.contracts(st.me).escrow
    found = escrow.get_task(task_id)
    if found.status is Status.LOCKED:
        st.chain.wait_until(found.terms.deadline_s + 1, "the refund")
        escrow.refund_publisher(task_id)
    return st.receipt(task_id, 0, "refund", _sent(st, task_id, "refundPublisher"), found.reward_wei)


@task(persist_result=False, cache_policy=NO_CACHE)
def resign_turn(task_id: str, actor: str) -> dict[str, str]:
    """M7 without a block, the aggregator: give up its turn in time, which costs nothing. Silence costs a part of its stake."""
    st = station(actor)
    stakes = st.chain.contracts(st.me).stakes
    if stakes.aggregator_of(task_id) == st.address and st.chain.now_s() <= stakes.get_draw(task_id).turn_end_s:
        stakes.resign_aggregator(task_id)
    return st.receipt(task_id, 0, "resign", _sent(st, task_id, "resignAggregator", by=st.address))


@task(persist_result=False, cache_policy=NO_CACHE)
def take_compensation(task_id: str, actor: str) -> dict[str, str]:
    """M7 without a block, a miner: have the silent aggregator lose what the task announced, and take my part of it."""
    st = station(actor)
    stakes = st.chain.contracts(st.me).stakes
    silent = stakes.aggregator_of(task_id)
    is_published = st.chain.contracts().publisher.get_block_meta(task_id) is not None
    if silent not in (None, st.address) and not is_published:
        st.chain.wait_until(stakes.get_draw(task_id).turn_end_s + 1, "the end of the aggregator's turn")
        or_found_done(lambda: stakes.replace_aggregator(task_id), lambda: stakes.aggregator_of(task_id) != silent)
    for slashed in st.chain.events(task_id, StakeSlashed):
        mine = stakes.get_cohort(task_id).miners.index(st.address)
        taken = stakes.get_slash(task_id, slashed.position, slashed.offence)
        if taken.amount_wei and slashed.aggregator != st.address and not taken.credited >> mine & 1:
            stakes.credit_slashed(task_id, slashed.aggregator, slashed.offence, st.address)
    if not stakes.credit_of(st.address):
        return st.receipt(task_id, 0, "compensation", ZERO32)
    paid = stakes.withdraw_credit()
    return st.receipt(task_id, 0, "compensation", paid.transaction, paid.event.amount_wei)


def _sent(st: Station, task_id: str, kind: str, by: str | None = None) -> str:
    """The transaction of this kind about the task (by this sender), or zero when there is none."""
    for done in st.chain.transactions(task_id):
        if done.kind == kind and by in (None, done.sender):
            return done.transaction
    return ZERO32
