"""From the plaintext models of several senders to one: rules by name, on named tensors of any shape.

Under encryption only a weighted sum can be opened (tasks.learning.aggregation). Senders of plaintext, such as edge devices,
may also be compared with each other, which is what the robust rules do.

    fedavg         mean weighted by samples (McMahan et al., AISTATS 2017)
    fedprox        the same combination; `mu` reaches the device with its hyperparameters (Li et al., MLSys 2020)
    fedadam        Adam on the difference of that mean to the base (Reddi et al., ICLR 2021, algorithm 2)
    median         of each coordinate (Yin et al., ICML 2018)
    trimmed_mean   of each coordinate, without its floor(trim n) smallest and largest (the same paper)
    krum           the one nearest to its n - f - 2 closest (Blanchard et al., NeurIPS 2017)
    multi_krum     mean of the `selected` with the best scores of Krum, at most n - f - 2 of them (the same paper)

fedavg, fedprox and fedadam weigh by samples; the robust ones count each sender once, for a liar chooses its own weight.
What is sent is a full model, not a difference. All sums run in float64 and in the order of the senders' names, so that the
same parts give the same bits in whatever order they came.

Errors: InvalidRule (a name or an option), NotCombinable (the parts), both ValueError.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Tensors = dict[str, Floats]
FIRST, SECOND = "first/", "second/"  # FedAdam's moments of a tensor, by its name
LARGEST_EXPONENT = 1023  # of a finite float64


class InvalidRule(ValueError):
    """No rule has this name, or it takes other options; the message says which and what it takes."""


class NotCombinable(ValueError):
    """These parts have no combination by this rule: too few, of different shapes, or not finite."""


@dataclass(frozen=True, eq=False)
class Part:
    """What one sender brings: its whole model, trained on so many samples."""

    sender: str
    samples: int
    tensors: Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Option:
    """A number that a rule takes. low <= value <= high; is_whole: an integer. default None: it must be given, or is derived."""

    default: float | None
    low: float
    high: float
    is_whole: bool = False


@dataclass(frozen=True)
class Rule:
    """combine: (base, parts in order, state, options) -> (model, next state)."""

    combine: Callable[[Tensors, Sequence[Part], Tensors, Mapping[str, Any]], tuple[Tensors, Tensors]]
    options: Mapping[str, Option]
    fewest: Callable[[Mapping[str, Any]], int] = lambda options: 1


def combine(
    rule: str,
    base: Mapping[str, npt.NDArray[Any]],
    parts: Sequence[Part],
    state: Mapping[str, npt.NDArray[Any]] | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Tensors, Tensors]:
    """The next model and the next state of the rule, empty for all but fedadam. Raises InvalidRule or NotCombinable."""
    chosen = checked_options(rule, options or {})
    start = _floats("base", base)
    ordered = _in_order(parts, start)
    check_enough(rule, chosen, len(ordered))
    kept = _state(state or {}, start) if rule == "fedadam" else {}
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        model, after = RULES[rule].combine(start, ordered, kept, chosen)
    for name, tensor in {**model, **after}.items():
        if not np.isfinite(tensor).all():
            raise NotCombinable(f"{name}: the numbers of rule {rule} overflow; lower the learning rate of the devices")
    return model, after


def checked_options(rule: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with their defaults. Raises InvalidRule."""
    if rule not in RULES:
        raise InvalidRule(f"rule {rule!r}: expected one of {', '.join(RULES)}")
    known = RULES[rule].options
    if unknown := sorted(set(options) - set(known)):
        raise InvalidRule(f"rule_options.{unknown[0]}: rule {rule} takes {', '.join(known) or 'no options'}")
    chosen = {name: options.get(name, option.default) for name, option in known.items()}
    for name, option in known.items():
        if name in options or option.default is not None:
            _check_option(rule, name, chosen[name], option)
    return chosen


def check_enough(rule: str, options: Mapping[str, Any], count: int) -> None:
    """Raises NotCombinable when the rule needs more parts than these."""
    needed = RULES[rule].fewest(options)
    if count < needed:
        shown = ", ".join(f"{name}={value}" for name, value in options.items() if value is not None)
        raise NotCombinable(f"rule {rule} needs at least {needed} updates with {shown or 'its options'}, got {count}")


def _check_option(rule: str, name: str, value: Any, option: Option) -> None:
    kind = int if option.is_whole else (int, float)
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if not is_number or not option.low <= value <= option.high:
        what = "an integer" if option.is_whole else "a number"
        raise InvalidRule(
            f"rule_options.{name} = {value!r}: rule {rule} takes {what} from {option.low:g} to {option.high:g}"
        )


def _in_order(parts: Sequence[Part], base: Tensors) -> list[Part]:
    """By sender, as float64, each with exactly the tensors of the base."""
    ordered = sorted(parts, key=lambda part: part.sender)
    if len({part.sender for part in ordered}) != len(ordered):
        raise NotCombinable("a sender has two parts: one of each is combined")
    found = []
    for part in ordered:
        if not isinstance(part.samples, int) or part.samples < 1:
            raise NotCombinable(f"samples of {part.sender} = {part.samples!r}: expected an integer of at least 1")
        tensors = _floats(f"part of {part.sender}", part.tensors)
        if {name: one.shape for name, one in tensors.items()} != {name: one.shape for name, one in base.items()}:
            raise NotCombinable(f"part of {part.sender}: its tensors are not those of the base, by name and shape")
        found.append(Part(part.sender, part.samples, tensors))
    return found


def _floats(what: str, tensors: Mapping[str, npt.NDArray[Any]]) -> Tensors:
    found = {name: np.asarray(tensors[name], dtype=np.float64) for name in sorted(tensors)}
    for name, tensor in found.items():
        if not np.isfinite(tensor).all():
            raise NotCombinable(f"{what}, {name}: NaN or infinite, expected finite numbers")
    return found


def _state(state: Mapping[str, npt.NDArray[Any]], base: Tensors) -> Tensors:
    """FedAdam's moments; zero at first."""
    names = {prefix + name: tensor.shape for prefix in (FIRST, SECOND) for name, tensor in base.items()}
    if not state:
        return {name: np.zeros(shape) for name, shape in names.items()}
    found = _floats("state", state)
    if {name: one.shape for name, one in found.items()} != names:
        raise NotCombinable("the state of fedadam has not the tensors of the base: it is of another model")
    return found


# Rules


def _fedavg(base: Tensors, parts: Sequence[Part], _: Tensors, options: Mapping[str, Any]) -> tuple[Tensors, Tensors]:
    return weighted_mean(base, parts, [part.samples for part in parts]), {}


def _fedadam(
    base: Tensors, parts: Sequence[Part], state: Tensors, options: Mapping[str, Any]
) -> tuple[Tensors, Tensors]:
    """m = beta1 m + (1 - beta1) D;  v = beta2 v + (1 - beta2) D^2;  W = W + learning_rate m / (sqrt(v) + tau)

    tasks.learning.aggregation has the same step for the flat float32 parameters that miners recompute to the bit.
    """
    beta1, beta2 = options["beta1"], options["beta2"]
    mean = weighted_mean(base, parts, [part.samples for part in parts])
    model, after = {}, {}
    for name, W in base.items():
        D = mean[name] - W
        m = beta1 * state[FIRST + name] + (1 - beta1) * D
        v = beta2 * state[SECOND + name] + (1 - beta2) * (D * D)
        model[name] = np.asarray(W + options["learning_rate"] * m / (np.sqrt(v) + options["tau"]))
        after[FIRST + name], after[SECOND + name] = np.asarray(m), np.asarray(v)
    return model, after


def _median(base: Tensors, parts: Sequence[Part], _: Tensors, options: Mapping[str, Any]) -> tuple[Tensors, Tensors]:
    low, high = (len(parts) - 1) // 2, len(parts) // 2
    model = {}
    for name in base:
        ordered = np.sort(_stacked(parts, name), axis=0)
        both = ordered[low] + ordered[high]
        # Two halves of huge numbers do not overflow; of tiny ones they would lose a bit.
        model[name] = np.asarray(np.where(np.isfinite(both), both / 2, ordered[low] / 2 + ordered[high] / 2))
    return model, {}


def _trimmed_mean(
    base: Tensors, parts: Sequence[Part], _: Tensors, options: Mapping[str, Any]
) -> tuple[Tensors, Tensors]:
    cut = int(options["trim"] * len(parts))
    model = {}
    for name in base:
        kept = np.sort(_stacked(parts, name), axis=0)[cut : len(parts) - cut]
        model[name] = _mean(list(kept), [1] * len(kept))
    return model, {}


def _krum(base: Tensors, parts: Sequence[Part], _: Tensors, options: Mapping[str, Any]) -> tuple[Tensors, Tensors]:
    best = int(krum_scores(parts, options["byzantine"]).argmin())
    return {name: np.array(parts[best].tensors[name]) for name in base}, {}


def _multi_krum(
    base: Tensors, parts: Sequence[Part], _: Tensors, options: Mapping[str, Any]
) -> tuple[Tensors, Tensors]:
    most = len(parts) - options["byzantine"] - 2
    selected = most if options["selected"] is None else options["selected"]
    best = np.argsort(krum_scores(parts, options["byzantine"]), kind="stable")[:selected]
    chosen = [parts[place] for place in sorted(best.tolist())]
    return weighted_mean(base, chosen, [1] * len(chosen)), {}


def weighted_mean(base: Tensors, parts: Sequence[Part], weights: Sequence[int]) -> Tensors:
    """sum_i weights_i part_i / sum_i weights_i, for each tensor; between the smallest and the largest of each coordinate."""
    return {name: _mean([np.asarray(part.tensors[name]) for part in parts], weights) for name in base}


def _mean(tensors: Sequence[Floats], weights: Sequence[int]) -> Floats:
    total = sum(weights)
    largest = max((float(np.abs(one).max(initial=0.0)) for one in tensors), default=0.0)
    # Scaled down by a power of two, which changes no bit of a normal number, where the sum could pass 2**1024.
    shift = max(0, math.frexp(largest)[1] + total.bit_length() - LARGEST_EXPONENT)
    low, high = tensors[0], tensors[0]
    total_sum = np.zeros(tensors[0].shape)
    for tensor, weight in zip(tensors, weights, strict=True):
        total_sum = total_sum + np.ldexp(tensor, -shift) * float(weight)
        low, high = np.minimum(low, tensor), np.maximum(high, tensor)
    return np.asarray(np.clip(np.ldexp(total_sum / float(total), shift), low, high))


def krum_scores(parts: Sequence[Part], byzantine: int) -> Floats:
    """(n,): the sum of squared distances of each part to its n - f - 2 closest others, in units of the largest number."""
    rows = np.stack([np.concatenate([np.ravel(one) for one in part.tensors.values()]) for part in parts])
    largest = float(np.abs(rows).max(initial=0.0))
    rows = rows / (largest or 1.0)  # within [-1, 1]: no square overflows
    n = len(rows)
    scores = np.empty(n)
    for place in range(n):
        distances = np.square(rows - rows[place]).sum(axis=1)
        distances[place] = np.inf  # nobody is its own neighbour
        scores[place] = np.sort(distances)[: n - byzantine - 2].sum()
    return scores


def _stacked(parts: Sequence[Part], name: str) -> Floats:
    return np.stack([np.asarray(part.tensors[name]) for part in parts])


_BYZANTINE = Option(None, 0, 10**6, is_whole=True)


def _krum_needs(options: Mapping[str, Any]) -> int:
    """n >= 2f + 3, and as many as are to be selected beside the f + 2 that cannot be."""
    if options["byzantine"] is None:
        raise InvalidRule("rule_options.byzantine is missing: how many senders may lie, an integer from 0")
    return max(2 * int(options["byzantine"]) + 3, int(options["byzantine"]) + 2 + int(options.get("selected") or 0))


RULES: dict[str, Rule] = {
    "fedavg": Rule(_fedavg, {}),
    "fedprox": Rule(_fedavg, {"mu": Option(0.01, 0, 1e6)}),
    "fedadam": Rule(
        _fedadam,
        {
            "learning_rate": Option(0.01, 1e-12, 1e6),
            "beta1": Option(0.9, 0, 1 - 1e-9),
            "beta2": Option(0.99, 0, 1 - 1e-9),
            "tau": Option(1e-3, 1e-12, 1e6),
        },
    ),
    "median": Rule(_median, {}),
    "trimmed_mean": Rule(_trimmed_mean, {"trim": Option(0.1, 0, 0.499)}),
    "krum": Rule(_krum, {"byzantine": _BYZANTINE}, _krum_needs),
    "multi_krum": Rule(
        _multi_krum, {"byzantine": _BYZANTINE, "selected": Option(None, 1, 10**6, is_whole=True)}, _krum_needs
    ),
}
