"""Who takes part in a simulated task: virtual miners with data, stakes and characters, all drawn from one seed.

A virtual miner has no home, no key and no model of its own: its samples are indices into a data set that all share.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from eth_utils.address import to_checksum_address
from eth_utils.crypto import keccak

from contracts.messages import ZERO32, Address, Registration
from contracts.task_spec import MAX_RECOVERY_BOUND, TaskFile, TaskSpec
from tasks.cohort import Applicant
from tasks.learning.datasets import Dataset, dirichlet_partition

Integers = npt.NDArray[np.int64]

HONEST = "honest"
CHARACTERS = {
    HONEST: "trains, sends its update, claims its score",
    "zero": "does not train, sends zeros",
    "noise": "does not train, sends random numbers of the largest norm that is allowed",
    "replay": "does not train, sends the last round's public mean again, at the largest norm that is allowed",
    "inflate": "as an honest miner, but claims the largest score that the contract accepts",
    "silent": "as an honest miner, but answers nothing when it is drawn as aggregator",
}
STAKES = ("equal", "uniform", "pareto")
MAX_MINERS = 100_000
MAX_STAKE_WEI = 2**88 - 1
PARETO_SHAPE = 1.16  # a fifth of the miners holds four fifths of the stake
# Streams of random numbers, so that none depends on how many another one gave.
OF_DATA, OF_LABELS, OF_STAKES, OF_CHARACTERS, OF_ABSENCE, OF_NOISE, OF_REVEALS = range(7)


class InvalidSetting(ValueError):
    """A setting of the simulation is out of range; the message names it, its value and what would be right."""


@dataclass(frozen=True)
class Settings:
    """What a simulation is asked for beside the task. Shares and probabilities are in [0, 1].

    miners apply, `admitted` of them at most are admitted (None: all). samples: of a miner on the average; None: the data set
    divided, where it has enough. alpha: of the Dirichlet distribution of classes, small is skewed. label_noise: the largest
    share of wrong labels a miner may have. dropout: probability that a miner vanishes for a round, or for the vote. unrevealed:
    probability that a participant never reveals its score. cheats: share of the miners by character. all_rounds: propose a
    block after the last round only.
    """

    miners: int
    admitted: int | None = None
    rounds: int | None = None
    required_accuracy: float | None = None
    alpha: float = 0.5
    samples: int | None = None
    label_noise: float = 0.0
    dropout: float = 0.0
    unrevealed: float = 0.0
    stakes: str = "equal"
    cheats: Mapping[str, float] = field(default_factory=dict)
    all_rounds: bool = False
    encrypt: bool = False

    def __post_init__(self) -> None:
        _check("miners", self.miners, 1, MAX_MINERS)
        for name in ("label_noise", "dropout", "unrevealed"):
            _check(name, getattr(self, name), 0, 1)
        if not 0 < self.alpha < math.inf:
            raise InvalidSetting(f"alpha = {self.alpha}: give a positive number; 0.1 is very skewed, 100 nearly even")
        if self.required_accuracy is not None:
            _check("required_accuracy", self.required_accuracy, 1e-6, 1)
        if self.stakes not in STAKES:
            raise InvalidSetting(f"stakes = {self.stakes!r}: one of {', '.join(STAKES)}")
        for name, share in self.cheats.items():
            if name not in CHARACTERS or name == HONEST:
                others = ", ".join(character for character in CHARACTERS if character != HONEST)
                raise InvalidSetting(f"cheats: {name!r} is no character: one of {others}")
            _check(f"cheats {name}", share, 0, 1)
        if sum(self.cheats.values()) > 1:
            raise InvalidSetting(f"cheats: their shares add up to {sum(self.cheats.values()):g}: at most 1")


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # NaN too
        raise InvalidSetting(f"{name} = {value}: give a number from {low} to {high}")


@dataclass(frozen=True, eq=False)
class VirtualMiner:
    """indices, labels: (n,) of its samples in the shared data set; labels as the miner has them, some of them wrong."""

    name: str
    address: Address
    character: str
    stake_wei: int
    indices: Integers
    labels: Integers

    @property
    def encryption_key(self) -> str:
        """Stands where a real miner's public key does; nobody encrypts with it."""
        return "0x02" + keccak(text=self.address).hex()

    def dataset(self, shared: Dataset) -> Dataset:
        return Dataset(shared.features[self.indices], self.labels, shared.classes)

    def label_balance(self, classes: int) -> float:
        """Entropy of its labels, as a share of the largest: 0 for one class, 1 for all classes equally."""
        counts = np.bincount(self.labels, minlength=classes)
        shares = counts[counts > 0] / len(self.labels)
        return float(max(0.0, -(shares * np.log(shares)).sum()) / math.log(classes))

    def right_labels(self, shared: Dataset) -> float:
        return float((self.labels == shared.labels[self.indices]).mean())


def adapted(file: TaskFile, settings: Settings) -> TaskSpec:
    """The task's terms with the settings in them. Raises InvalidSetting for a cohort that could not be summed.

    The cohort may be larger than the contracts admit: they would refuse it, the arithmetic of the rounds does not.
    """
    spec, admitted = file.spec(), settings.miners if settings.admitted is None else settings.admitted
    _check("admitted", admitted, 1, settings.miners)
    if admitted < spec.participants.miners_min:
        raise InvalidSetting(
            f"{admitted} miners: the task asks for at least participants.miners_min = {spec.participants.miners_min}"
        )
    bound = spec.recovery_bound(admitted * spec.participants.weight_levels)
    if bound > MAX_RECOVERY_BOUND:
        raise InvalidSetting(
            f"{admitted} miners with weights up to {spec.participants.weight_levels} and {spec.compression.bits} bits allow "
            f"sums up to {bound}, beyond what recovery can search ({MAX_RECOVERY_BOUND}): lower one of them"
        )
    rounds = spec.rounds.max_rounds if settings.rounds is None else settings.rounds
    _check("rounds", rounds, 1, 10_000)
    changes = {
        "participants": spec.participants.model_copy(update={"miners_max": admitted}),
        "rounds": spec.rounds.model_copy(update={"max_rounds": rounds}),
    }
    return spec.model_copy(update=changes)


def stream(spec: TaskSpec, *purpose: int) -> np.random.Generator:
    """Random numbers for one purpose (and round, and miner): always the same for the same seed."""
    return np.random.default_rng([spec.seed, *purpose])


def populate(spec: TaskSpec, settings: Settings, shared: Dataset) -> list[VirtualMiner]:
    """All miners that apply. shared: the samples that are divided among them. Raises InvalidSetting."""
    indices = _divide(spec, settings, shared)
    characters, stakes = _characters(spec, settings), _stakes(spec, settings)
    noise = stream(spec, OF_LABELS)
    return [
        VirtualMiner(
            name=f"miner-{number + 1}",
            address=to_checksum_address(keccak(text=f"virtual miner {spec.seed} {number}")[-20:]),
            character=characters[number],
            stake_wei=stakes[number],
            indices=indices[number],
            labels=_mislabelled(shared.labels[indices[number]], shared.classes, settings.label_noise, noise),
        )
        for number in range(settings.miners)
    ]


def is_divided(spec: TaskSpec, settings: Settings, shared: Dataset) -> bool:
    """Whether every sample is with one miner only, as in a real run; otherwise they are drawn with replacement."""
    return settings.samples is None and settings.miners * spec.dataset.samples_min <= len(shared)


def _divide(spec: TaskSpec, settings: Settings, shared: Dataset) -> list[Integers]:
    """Indices of each miner's samples."""
    least, count = spec.dataset.samples_min, settings.miners
    if is_divided(spec, settings, shared):
        return dirichlet_partition(shared.labels, count, settings.alpha, spec.seed, least)
    mean = 2 * least if settings.samples is None else settings.samples
    if not least <= mean <= len(shared):
        raise InvalidSetting(
            f"samples = {mean}: give a number from {least} (dataset.samples_min) to {len(shared)}, all that there are"
        )
    rng = stream(spec, OF_DATA)
    # Many small miners and few large ones; nobody has more than all there are.
    sizes = least + np.minimum(np.rint(rng.exponential(mean - least, count)), len(shared) - least).astype(np.int64)
    pools = [np.flatnonzero(shared.labels == label) for label in np.unique(shared.labels)]
    return [_drawn(rng, int(size), pools, settings.alpha) for size in sizes]


def _drawn(rng: np.random.Generator, size: int, pools: list[Integers], alpha: float) -> Integers:
    """Indices of `size` samples, with replacement; how many of each class follows Dirichlet(alpha)."""
    counts = rng.multinomial(size, rng.dirichlet(np.full(len(pools), alpha)))
    return np.sort(np.concatenate([rng.choice(pool, n) for pool, n in zip(pools, counts, strict=True)]))


def _mislabelled(labels: Integers, classes: int, largest: float, rng: np.random.Generator) -> Integers:
    """The labels, a share of them wrong that is drawn evenly from [0, largest]."""
    wrong = rng.random(len(labels)) < rng.uniform(0, largest)
    return np.where(wrong, (labels + rng.integers(1, classes, len(labels))) % classes, labels)


def _stakes(spec: TaskSpec, settings: Settings) -> list[int]:
    """Stakes in wei, none below the task's minimum."""
    rng, count = stream(spec, OF_STAKES), settings.miners
    multiples = np.ones(count)
    if settings.stakes == "uniform":
        multiples = rng.uniform(1, 10, count)
    elif settings.stakes == "pareto":
        multiples = 1 + rng.pareto(PARETO_SHAPE, count)
    # In millionths of the minimum, as integers: an amount of wei never passes through a float.
    millionths = [int(multiple * 1_000_000) for multiple in multiples]
    return [min(spec.money.minimum_stake_wei * part // 1_000_000, MAX_STAKE_WEI) for part in millionths]


def _characters(spec: TaskSpec, settings: Settings) -> list[str]:
    cheats = [name for name, share in settings.cheats.items() for _ in range(round(share * settings.miners))]
    everybody = (cheats + [HONEST] * settings.miners)[: settings.miners]
    return [everybody[index] for index in stream(spec, OF_CHARACTERS).permutation(settings.miners)]


def application(miner: VirtualMiner, task_id: str) -> Applicant:
    """What the miner would post in M2, for `choose` to admit it."""
    registration = Registration(
        task_id=task_id,
        round_number=0,
        miner=miner.address,
        encryption_key=miner.encryption_key,
        dataset_proof_sha256=ZERO32,
        stake_wei=miner.stake_wei,
    )
    return Applicant(miner.address, registration)
