"""What the contracts do with a task's money, as plain functions of integers, and how evenly money falls. PURE.

    required_votes   BlockPublisher: the votes that a block needs
    pay_out          RewardDistribution: the aggregator's share, and every participant's claim
    take_stake       StakeRegistry: what a silent aggregator loses, and who gets it

A simulation of more miners than the contracts admit needs the rules without the contracts. The tests compare each with the
contracts, to the wei.
"""

from collections.abc import Sequence

import numpy as np

from contracts.task_spec import PPM


def required_votes(cohort_size: int, fault_rate_ppm: int) -> int:
    """Accepting votes of others than the aggregator that a block needs: all but the tolerated, rounded up."""
    return max(1, -(-(cohort_size - 1) * (PPM - fault_rate_ppm) // PPM))


def pay_out(reward_wei: int, aggregator_share_ppm: int, scores: Sequence[int | None]) -> tuple[int, list[int]]:
    """The aggregator's share, and what each participant is paid when they claim in this order; together the reward.

    scores: as revealed, None for a participant that did not. By score; when all revealed scores are zero, equally among those
    that revealed; when nobody did, equally among all. Every claim is rounded down, the last one takes the rest.
    """
    if not scores:
        raise ValueError("scores: none, a block has participants")
    share = reward_wei * aggregator_share_ppm // PPM
    parts = [score or 0 for score in scores]
    if not sum(parts):
        parts = [int(score is not None) for score in scores]
    if not sum(parts):
        parts = [1] * len(scores)
    claims, remaining, left = [], reward_wei - share, sum(parts)
    for part in parts:
        claim = remaining * part // left if part else 0
        claims.append(claim)
        remaining, left = remaining - claim, left - part
    return share, claims


def take_stake(stakes_wei: Sequence[int], culprit: int, penalty_ppm: int) -> list[int]:
    """What each member of a cohort gains in wei when the aggregator at position `culprit` was silent; its own loss is negative.

    The others get equal parts; the first of them also what does not divide.
    """
    taken, others = stakes_wei[culprit] * penalty_ppm // PPM, len(stakes_wei) - 1
    gains = [taken // others] * len(stakes_wei)
    gains[1 if culprit == 0 else 0] += taken % others
    gains[culprit] = -taken
    return gains


# ── how evenly ───────────────────────────────────────────────────────────────────────────────────────────────────────


def gini(amounts: Sequence[int]) -> float | None:
    """Gini coefficient of amounts of 0 or more: 0 when all are equal, 1 - 1/n when one has everything, None when nobody has."""
    total, count = sum(amounts), len(amounts)
    if not total:
        return None
    ranked = sum(rank * amount for rank, amount in enumerate(sorted(amounts), start=1))
    return (2 * ranked - (count + 1) * total) / (count * total)


def lorenz(amounts: Sequence[int], points: int = 100) -> list[float]:
    """Share of the total that the poorest 0, 1/points, ... 1 of all have; amounts of 0 or more with a positive sum.

    points: as many as there are amounts where these are fewer.
    """
    points = min(points, len(amounts))
    sums = [0]
    for amount in sorted(amounts):
        sums.append(sums[-1] + amount)
    return [sums[len(amounts) * point // points] / sums[-1] for point in range(points + 1)]


def correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's coefficient of two equally long lists, or None when one of them does not vary."""
    x, y = (np.asarray(values, dtype=np.float64) for values in (first, second))
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
