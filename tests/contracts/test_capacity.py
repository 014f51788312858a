"""The largest cohort: with 200 miners every transaction still fits in a block; and the benchmark that says what it costs."""

from pathlib import Path

import pytest

from infra import bench_gas
from infra.bench_gas import (
    BY_EACH_MINER,
    ONCE_A_TASK,
    START,
    Costs,
    costs,
    first_task_extra,
    rare_paths,
    rows_of,
    slopes,
    whole_task,
)
from infra.rows import refreshed

# EIP-7825: the most gas that one transaction may use on Ethereum from the Osaka fork on.
LARGEST_TRANSACTION_GAS = 2**24
FEW, MANY = 5, 20


@pytest.fixture(scope="module")
def measured() -> tuple[Costs, Costs]:
    return costs(whole_task(FEW)), costs(whole_task(MANY))


def test_200_miners_fit(measured: tuple[Costs, Costs]) -> None:
    """Every loop is linear in the cohort, so that two sizes tell the third."""
    few, many = measured
    for kind, gas in many.gas.items():
        per_miner = max(0, gas - few.gas[kind]) / (MANY - FEW)
        assert gas + (200 - MANY) * per_miner * 1.1 < LARGEST_TRANSACTION_GAS, kind


def test_what_is_paid_once_does_not_grow(measured: tuple[Costs, Costs]) -> None:
    """Distribution and reveals do not look at the whole cohort; a proof grows by a step when the cohort doubles."""
    few, many = measured
    for kind in ("publishTask", "revealAccuracy", "distribute", "withdrawTo"):
        assert abs(many.gas[kind] - few.gas[kind]) < 100, kind
    for kind in BY_EACH_MINER:
        assert many.gas[kind] < 1.05 * few.gas[kind], kind


def test_a_task_is_all_its_transactions(measured: tuple[Costs, Costs]) -> None:
    few, _ = measured
    assert set(few.gas) == {"depositStake", *ONCE_A_TASK, *BY_EACH_MINER}
    each = sum(few.gas[kind] for kind in BY_EACH_MINER)
    assert few.total == sum(few.gas[kind] for kind in ONCE_A_TASK) + FEW * each


def test_a_cost_that_grows_with_the_cohort_misses_its_goal() -> None:
    kinds = (*ONCE_A_TASK, *BY_EACH_MINER)

    def of(size: int, each: int) -> Costs:
        return Costs(size, dict.fromkeys(kinds, 0) | {"publishTask": 1000, "closeRegistration": size * each})

    flat, steep = ([of(5, 10), of(20, 10), of(100, each)] for each in (10, 12))
    assert [slopes(sizes)[-1].shortfall() is None for sizes in (flat, steep)] == [True, False]
    assert [row.value for row in slopes(flat)[:2]] == [10, 10]


def test_the_document_gets_its_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gas, "SIZES", (3, 4, 5))
    monkeypatch.setattr(bench_gas, "RARE_SIZES", (4, 5))
    benches = [whole_task(size) for size in bench_gas.SIZES]
    rows = rows_of(benches, first_task_extra(3), dict.fromkeys(bench_gas.RARE_SIZES, rare_paths(4)))
    document = (Path(__file__).parents[2] / "contracts" / "README.md").read_text()
    written = refreshed(document, START, bench_gas.report(rows, benches[0].fork))
    for kind in (
        *ONCE_A_TASK,
        *BY_EACH_MINER,
        "moveSeed",
        "replaceAggregator, after silence",
        "releaseStake",
        "publishTask, in tokens",
    ):
        assert f"{kind}" in written
    assert {row.unit for row in rows} == {"gas", "% apart"}
    assert all(isinstance(row.record()["value"], int) for row in rows if row.unit == "gas")
