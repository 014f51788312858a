"""Rules that combine plaintext models: each beside a slow twin, and what it promises."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tasks.learning.combining import FIRST, RULES, SECOND, InvalidRule, NotCombinable, Part, combine

SHAPES = {"b": (), "layer/w": (2, 3), "w": (2,)}
numbers = st.floats(-1e6, 1e6, allow_subnormal=False)
options_of = {
    "krum": {"byzantine": 1},
    "multi_krum": {"byzantine": 1, "selected": 2},
    "trimmed_mean": {"trim": 0.25},
}


def tensors(draw, values=numbers):
    return {
        name: np.array(draw(st.lists(values, min_size=(n := math.prod(shape)), max_size=n))).reshape(shape)
        for name, shape in SHAPES.items()
    }


@st.composite
def rounds(draw, least=1, values=numbers):
    """(base, parts) of 1 to 8 senders."""
    many = draw(st.integers(least, 8))
    names = draw(st.permutations([f"device-{place}" for place in range(many)]))
    return tensors(draw, values), [Part(name, draw(st.integers(1, 10**9)), tensors(draw, values)) for name in names]


def columns(parts, name):
    """For each coordinate of a tensor, its numbers by sender."""
    ordered = sorted(parts, key=lambda part: part.sender)
    return list(zip(*[part.tensors[name].ravel().tolist() for part in ordered], strict=True))


def slow_mean(values, weights):
    return float(sum(Fraction(v) * w for v, w in zip(values, weights, strict=True)) / sum(weights))


def slow_scores(parts, f):
    """Krum's scores in rational numbers."""
    rows = [[Fraction(x) for name in sorted(SHAPES) for x in part.tensors[name].ravel().tolist()] for part in parts]
    scores = []
    for me, row in enumerate(rows):
        far = sorted(
            sum((a - b) ** 2 for a, b in zip(row, other, strict=True)) for o, other in enumerate(rows) if o != me
        )
        scores.append(sum(far[: len(rows) - f - 2]))
    return scores


@given(rounds())
def test_fedavg_and_fedprox_are_the_mean_by_samples(round_):
    base, parts = round_
    weights = [part.samples for part in sorted(parts, key=lambda part: part.sender)]
    for rule in ("fedavg", "fedprox"):
        model, state = combine(rule, base, parts)
        assert state == {}
        for name, shape in SHAPES.items():
            wanted = np.array([slow_mean(values, weights) for values in columns(parts, name)]).reshape(shape)
            assert np.allclose(model[name], wanted, rtol=1e-12, atol=1e-9)


def test_the_mean_of_whole_numbers_is_exact():
    base = {"w": np.zeros(3), "b": np.zeros(())}
    parts = [
        Part("a", 1, {"w": np.array([1.0, 2, 3]), "b": np.array(1.0)}),
        Part("b", 3, {"w": np.array([5.0, 6, 7]), "b": np.array(5.0)}),
    ]
    model, _ = combine("fedavg", base, parts)
    assert (model["w"].tolist(), model["b"].tolist()) == ([4, 5, 6], 4)


@given(rounds())
def test_the_median_is_the_middle_of_each_coordinate(round_):
    base, parts = round_
    model, _ = combine("median", base, parts)
    for name, shape in SHAPES.items():
        wanted = []
        for values in columns(parts, name):
            ordered, n = sorted(values), len(values)
            wanted.append((ordered[(n - 1) // 2] + ordered[n // 2]) / 2)
        assert (model[name] == np.array(wanted).reshape(shape)).all()


@given(rounds(), st.floats(0, 0.499))
def test_the_trimmed_mean_leaves_the_ends_out(round_, trim):
    base, parts = round_
    model, _ = combine("trimmed_mean", base, parts, options={"trim": trim})
    cut = math.floor(trim * len(parts))
    for name, shape in SHAPES.items():
        kept = [sorted(values)[cut : len(parts) - cut] for values in columns(parts, name)]
        wanted = np.array([slow_mean(values, [1] * len(values)) for values in kept]).reshape(shape)
        assert np.allclose(model[name], wanted, rtol=1e-12, atol=1e-9)


@given(rounds(least=5, values=st.integers(-1000, 1000).map(float)))
def test_krum_takes_the_one_nearest_to_its_closest(round_):
    base, parts = round_
    ordered = sorted(parts, key=lambda part: part.sender)
    scores = slow_scores(ordered, 1)
    # Scores that differ by less than float64 can tell are a draw that either may win.
    assume(len({float(score) for score in scores}) == len(scores) == len(set(scores)))
    best = sorted(range(len(scores)), key=scores.__getitem__)
    model, _ = combine("krum", base, parts, options={"byzantine": 1})
    assert all((model[name] == ordered[best[0]].tensors[name]).all() for name in SHAPES)
    model, _ = combine("multi_krum", base, parts, options={"byzantine": 1, "selected": 2})
    for name, shape in SHAPES.items():
        pairs = zip(*[ordered[place].tensors[name].ravel() for place in best[:2]], strict=True)
        assert np.allclose(model[name], np.array([(a + b) / 2 for a, b in pairs]).reshape(shape), rtol=1e-12)


@given(rounds(), rounds())
def test_fedadam_agrees_with_its_twin_over_two_rounds(first, second):
    base, state = first[0], {}
    slow = {name: base[name].ravel().tolist() for name in SHAPES}
    m = {name: [0.0] * len(slow[name]) for name in SHAPES}
    v = {name: [0.0] * len(slow[name]) for name in SHAPES}
    for parts in (first[1], second[1]):
        weights = [part.samples for part in sorted(parts, key=lambda part: part.sender)]
        base, state = combine("fedadam", base, parts, state, {"learning_rate": 0.1})
        for name in SHAPES:
            for j, values in enumerate(columns(parts, name)):
                D = slow_mean(values, weights) - slow[name][j]
                m[name][j] = 0.9 * m[name][j] + 0.1 * D
                v[name][j] = 0.99 * v[name][j] + 0.01 * D * D
                slow[name][j] += 0.1 * m[name][j] / (math.sqrt(v[name][j]) + 1e-3)
            assert np.allclose(base[name].ravel(), slow[name], rtol=1e-9, atol=1e-9)
    assert set(state) == {prefix + name for prefix in (FIRST, SECOND) for name in SHAPES}


@pytest.mark.parametrize("rule", RULES)
@given(round_=rounds(least=5))
def test_the_order_of_arrival_changes_no_bit(rule, round_):
    base, parts = round_
    models = [combine(rule, base, chosen, options=options_of.get(rule))[0] for chosen in (parts, parts[::-1])]
    assert all(models[0][name].tobytes() == models[1][name].tobytes() for name in SHAPES)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "fedadam"])
@given(round_=rounds(least=5, values=st.floats(allow_nan=False, allow_infinity=False)))
def test_no_number_is_too_large_and_each_stays_within_its_column(rule, round_):
    base, parts = round_
    model, _ = combine(rule, base, parts, options=options_of.get(rule))
    for name in SHAPES:
        for value, column in zip(model[name].ravel(), columns(parts, name), strict=True):
            assert min(column) <= value <= max(column)


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "krum", "multi_krum"])
def test_one_liar_of_seven_moves_a_robust_rule_little(rule):
    base = {"w": np.zeros(4)}
    honest = [Part(f"device-{i}", 10, {"w": np.full(4, 1 + i / 100)}) for i in range(6)]
    liar = Part("liar", 10**9, {"w": np.full(4, 1e300)})
    options = {"trimmed_mean": {"trim": 0.2}, "krum": {"byzantine": 1}, "multi_krum": {"byzantine": 1}}.get(rule)
    model, _ = combine(rule, base, [*honest, liar], options=options)
    assert (np.abs(model["w"] - 1) <= 0.06).all()
    assert combine("fedavg", base, [*honest, liar])[0]["w"].min() > 1e298


def test_fedadam_that_overflows_is_refused():
    base = {"w": np.zeros(1)}
    with pytest.raises(NotCombinable, match="overflow"):
        combine("fedadam", base, [Part("a", 1, {"w": np.array([1e200])})])


def part(**fields):
    return Part(**{"sender": "a", "samples": 1, "tensors": {"w": np.zeros(2)}, **fields})


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([], "needs at least 1 updates"),
        ([part(), part()], "a sender has two parts"),
        ([part(samples=0)], "samples of a = 0: expected an integer of at least 1"),
        ([part(samples=1.5)], "samples of a = 1.5"),
        ([part(tensors={"w": np.zeros(3)})], "part of a: its tensors are not those of the base"),
        ([part(tensors={"v": np.zeros(2)})], "part of a: its tensors are not those of the base"),
        ([part(tensors={"w": np.zeros(2), "v": np.zeros(2)})], "not those of the base"),
        ([part(tensors={"w": np.array([0, np.nan])})], "part of a, w: NaN or infinite"),
    ],
)
def test_parts_that_cannot_be_combined_are_named(parts, said):
    with pytest.raises(NotCombinable, match=said):
        combine("fedavg", {"w": np.zeros(2)}, parts)


@pytest.mark.parametrize(
    ("rule", "options", "said"),
    [
        ("mean", {}, "rule 'mean': expected one of fedavg, fedprox"),
        ("fedavg", {"mu": 1}, "rule_options.mu: rule fedavg takes no options"),
        ("fedprox", {"mu": -1}, r"rule_options.mu = -1: rule fedprox takes a number from 0"),
        ("fedprox", {"mu": True}, "rule_options.mu = True"),
        ("fedprox", {"mu": float("nan")}, "rule_options.mu = nan"),
        ("trimmed_mean", {"trim": 0.5}, "rule_options.trim = 0.5"),
        ("krum", {}, "rule_options.byzantine is missing"),
        ("krum", {"byzantine": 1.0}, "rule_options.byzantine = 1.0: rule krum takes an integer"),
    ],
)
def test_a_wrong_rule_is_named(rule, options, said):
    with pytest.raises(InvalidRule, match=said):
        combine(rule, {"w": np.zeros(2)}, [part()], options=options)


@pytest.mark.parametrize("f", [0, 1, 2])
def test_krum_needs_2f_plus_3(f):
    parts = [part(sender=f"d{i}") for i in range(2 * f + 3)]
    combine("krum", {"w": np.zeros(2)}, parts, options={"byzantine": f})
    with pytest.raises(NotCombinable, match=f"krum needs at least {2 * f + 3} updates with byzantine={f}, got"):
        combine("krum", {"w": np.zeros(2)}, parts[1:], options={"byzantine": f})


def test_multi_krum_selects_at_most_n_minus_f_minus_2():
    parts = [part(sender=f"d{i}") for i in range(7)]
    combine("multi_krum", {"w": np.zeros(2)}, parts, options={"byzantine": 1, "selected": 4})
    with pytest.raises(NotCombinable, match="needs at least 8 updates"):
        combine("multi_krum", {"w": np.zeros(2)}, parts, options={"byzantine": 1, "selected": 5})
