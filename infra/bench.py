"""What learning under encryption costs, and what it gives up: measured here and now, never asserted by a test.

run         the small ready tasks over several seeds: accuracy after the last round, encrypted and sparse, and the same run
            in plaintext and dense
run_model   fashion-mnist, 409 034 parameters, ten miners: accuracy of every round in plaintext and encrypted, dense and
            sparse, and where the time of a round goes

Every encrypted round encrypts, audits, sums, recovers and verifies every coordinate for real, from bytes to bytes. What
the chain, the store and the scheduler take is not in it.
"""

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from contracts.task_spec import TaskSpec, load_task_file
from infra.simulate import Stopwatch, simulate, simulate_dense
from tasks.crypto import ndd_fe
from tasks.global_model import initial_model
from tasks.learning.compression import density_of_round
from tasks.learning.training import Evaluation

Integers = npt.NDArray[np.int64]

TASKS = ("breast-cancer", "digits")
MODEL, MODEL_MINERS = "fashion-mnist", 10
DENSITIES = {"encrypted, dense": 1.0, "encrypted, 90 % sparse": 0.1, "encrypted, 99 % sparse": 0.01}
PLAIN = "plaintext, dense"

# Parts of a round, by who does them: each miner the first three, publisher and aggregator together the audit, the publisher
# the key, the aggregator the next three, each of the others the last.
PARTS = (
    "training", "compressing", "encrypting", "auditing", "key", "opening", "stepping", "evaluating", "verifying"
)  # fmt: skip
OF_A_MINER = ("training", "compressing", "encrypting")
CRYPTOGRAPHY = ("encrypting", "auditing", "key", "opening", "verifying")


def run(out: Path, seeds: int, console: Console) -> dict[str, Any]:
    """Measure the small tasks, print a table, write `out`. Takes some minutes."""
    torch.set_num_threads(1)
    learnt = [
        learning(name, seed) for name in TASKS for seed in track(range(seeds), f"learning {name}", console=console)
    ]
    result = {"machine": machine(), "learning": learnt}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1))
    _print(result, console)
    return result


def run_model(out: Path, console: Console, rounds: int | None = None) -> list[dict[str, Any]]:
    """Measure fashion-mnist, print the tables, write `out` and beside it a plot `.svg`; one row for each run and round.

    rounds: of each run; the task's own number without it. One thread for training, so that seconds are those of a core.
    """
    torch.set_num_threads(1)
    spec = load_task_file(_ready(MODEL)).spec()
    rows = _play(PLAIN, spec, rounds, console)
    for name, density in DENSITIES.items():
        rows += _play(name, _at_density(spec, density), rounds, console)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=1))
    out.with_suffix(".svg").write_text(draw_accuracies(accuracies(rows)))
    _print_model(rows, console)
    return rows


def _play(name: str, spec: TaskSpec, rounds: int | None, console: Console) -> list[dict[str, Any]]:
    """One run of the model: a row for each round with its accuracy and the seconds of each part and party."""
    watch = Stopwatch()
    rows: list[dict[str, Any]] = []
    dimension, rules = initial_model(spec).parameters.size, spec.compression

    def record(evaluation: Evaluation) -> None:
        number = len(rows) + 1
        share = 1.0 if name == PLAIN else density_of_round(number, rules.density, rules.warmup_rounds)
        row: dict[str, Any] = {
            "run": name,
            "round": number,
            "parameters": dimension,
            "coordinates": math.ceil(dimension * share),
            "miners": MODEL_MINERS,
            "accuracy": evaluation.correct / evaluation.total,
            "seconds": {part: [round(spent, 4) for spent in entries] for part, entries in watch.take().items()},
        }
        rows.append(row)
        console.print(
            f"{name}, round {number}: {100 * row['accuracy']:.2f} %, {sum_of_parties(row, PARTS):.1f} s of work"
        )

    if name == PLAIN:
        simulate_dense(spec, miners=MODEL_MINERS, rounds=rounds, watch=watch, on_round=record)
    else:
        combine = encrypted_sum(spec, watch)
        simulate(spec, miners=MODEL_MINERS, rounds=rounds, combine=combine, watch=watch, on_round=record)
    return rows


def _at_density(spec: TaskSpec, density: float) -> TaskSpec:
    """The same task with another density; a dense one has nothing to warm up to."""
    rules = spec.compression
    changed = {"density": density, "warmup_rounds": 0 if density == 1 else rules.warmup_rounds}
    return spec.model_copy(update={"compression": rules.model_copy(update=changed)})


def _ready(name: str) -> str:
    return (files("deployments") / "ready" / f"{name}.toml").read_text()


def sum_of_parties(row: dict[str, Any], parts: Sequence[str]) -> float:
    """Seconds of all parties together in a round. Verifying is measured once, and every other miner does it."""
    entries = {**row["seconds"], "verifying": row["seconds"].get("verifying", []) * (row["miners"] - 1)}
    return math.fsum(second for part in parts for second in entries.get(part, []))


def in_parallel(row: dict[str, Any], parts: Sequence[str]) -> float:
    """Seconds of the given parts on the way from a round's start to its end, each party on a machine of its own.

    Miners work side by side and the slowest is waited for; what the others do follows one after another, the verifying by
    all of them at once.
    """
    seconds = row["seconds"]
    miners = [dict(zip(OF_A_MINER, times, strict=True)) for times in _by_miner(seconds)]
    slowest = max(miners, key=lambda spent: math.fsum(spent.values()))
    after = [second for part in PARTS if part not in OF_A_MINER and part in parts for second in seconds.get(part, [])]
    return math.fsum([slowest[part] for part in OF_A_MINER if part in parts] + after)


def _by_miner(seconds: dict[str, list[float]]) -> list[tuple[float, ...]]:
    nothing = [0.0] * len(seconds["training"])
    return list(zip(*(seconds.get(part, nothing) for part in OF_A_MINER), strict=True))


def settled(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rounds of one run that send as few coordinates as its last one: those after the warm-up."""
    return [row for row in rows if row["coordinates"] == rows[-1]["coordinates"]]


def accuracies(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Accuracy after each round, by run."""
    curves: dict[str, list[float]] = {}
    for row in rows:
        curves.setdefault(row["run"], []).append(row["accuracy"])
    return curves


def machine() -> dict[str, Any]:
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(names),
        "python": platform.python_version(),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def learning(name: str, seed: int) -> dict[str, Any]:
    """One task and seed, encrypted and sparse beside plaintext and dense."""
    spec = load_task_file(_ready(name), seed=seed).spec()
    started = time.perf_counter()
    encrypted = simulate(spec, combine=encrypted_sum(spec, Stopwatch()))
    seconds = time.perf_counter() - started
    dense = simulate_dense(spec)
    return {
        "task": name,
        "seed": seed,
        "rounds": len(encrypted),
        "encrypted_sparse": encrypted[-1].correct / encrypted[-1].total,
        "plaintext_dense": dense[-1].correct / dense[-1].total,
        "seconds_encrypted": round(seconds, 2),
    }


def encrypted_sum(spec: TaskSpec, watch: Stopwatch) -> Callable[[list[Integers], Sequence[int]], Integers]:
    """The scheme end to end, in place of a plain sum, as its parties do it: each from the bytes that it receives.

    watch: gets encrypting (of each miner), auditing (the publisher's and the aggregator's part), key, opening, verifying.
    """
    rng = np.random.default_rng(spec.seed)
    bound = spec.compression.bound

    def combine(vectors: list[Integers], weights: Sequence[int]) -> Integers:
        length, keys = len(vectors[0]), [(rng.bytes(32), rng.bytes(32)) for _ in vectors]
        masks = [own for _, own in keys]
        signs = rng.choice(np.array([-1, 1], np.int8), (spec.voting.audit_projections, length))

        submitted = []
        for vector, key in zip(vectors, keys, strict=True):
            with watch.measure("encrypting"):
                submitted.append(ndd_fe.encode_points(ndd_fe.encrypt(vector, *key, bound=bound)))
        with watch.measure("auditing"):
            audit_keys = [ndd_fe.derive_projection_key(shared, signs) for shared, _ in keys]
        with watch.measure("key"):
            granted = ndd_fe.encode_scalars(ndd_fe.derive_key([shared for shared, _ in keys], weights, length))

        with watch.measure("opening"):
            ciphertexts = [ndd_fe.decode_points(data) for data in submitted]
        with watch.measure("auditing"):
            for audit_key, mask, ciphertext in zip(audit_keys, masks, ciphertexts, strict=True):
                ndd_fe.open_projection(audit_key, mask, ciphertext, signs, bound=spec.projection_bound(length))
        with watch.measure("opening"):
            opened, blinding = ndd_fe.open_sum(
                ndd_fe.decode_scalars(granted), masks, ciphertexts, weights, bound=spec.recovery_bound(sum(weights))
            )
        with watch.measure("verifying"):
            received = [ndd_fe.decode_points(data) for data in submitted]
            failing = ndd_fe.failing_coordinates(received, weights, opened, blinding)
        if failing:
            raise AssertionError(f"an honest opening does not hold at coordinate {failing[0]}")
        return opened

    return combine


def _print(result: dict[str, Any], console: Console) -> None:
    table = Table("task", "seeds", "encrypted", "lowest", "plaintext", "difference", "seconds")
    table.title = "Accuracy after the last round: encrypted and 90 % sparse, plaintext and dense"
    for name in TASKS:
        runs = [one for one in result["learning"] if one["task"] == name]
        sparse, dense, seconds = (
            statistics.mean(one[key] for one in runs)
            for key in ("encrypted_sparse", "plaintext_dense", "seconds_encrypted")
        )
        lowest = min(one["encrypted_sparse"] for one in runs)
        shares = [f"{100 * share:.2f} %" for share in (sparse, lowest, dense)]
        table.add_row(name, str(len(runs)), *shares, f"{100 * (sparse - dense):+.2f} points", f"{seconds:.1f}")
    console.print(table)
    console.print(f"{result['machine']['processor']}, {result['machine']['cores']} cores")


def _print_model(rows: Sequence[dict[str, Any]], console: Console) -> None:
    curves = accuracies(rows)
    learnt = Table("round", *curves, title="Accuracy after each round")
    for number in range(max(map(len, curves.values()))):
        found = (f"{100 * curve[number]:.2f} %" if number < len(curve) else "" for curve in curves.values())
        learnt.add_row(str(number + 1), *found)
    console.print(learnt)

    spent = Table("median seconds of a round after the warm-up", *curves, title="Where the time goes, one thread")
    after = {name: settled([row for row in rows if row["run"] == name]) for name in curves}
    spent.add_row("coordinates sent", *(f"{found[0]['coordinates']:,}" for found in after.values()))
    for part in PARTS:
        seconds = (statistics.median(sum_of_parties(row, [part]) for row in found) for found in after.values())
        spent.add_row(f"{part}, all parties", *(f"{second:.2f}" for second in seconds))
    for name, of in (("all parties", sum_of_parties), ("parties in parallel", in_parallel)):
        seconds = (statistics.median(of(row, PARTS) for row in found) for found in after.values())
        spent.add_row(f"the round, {name}", *(f"{second:.2f}" for second in seconds))
        shares = (
            statistics.median(100 * of(row, CRYPTOGRAPHY) / of(row, PARTS) for row in found) for found in after.values()
        )
        spent.add_row(f"of it cryptography, {name}", *(f"{share:.1f} %" for share in shares))
    console.print(spent)
    about = machine()
    console.print(f"{about['processor']}, {about['cores']} cores")


# ── the plot ─────────────────────────────────────────────────────────────────────────────────────────────────────────

COLOURS = ("#6b7280", "#1d4ed8", "#0f8a5f", "#c2410c")
DASHES = ("6 4", "none", "none", "none")
WIDTH, HEIGHT = 720, 380  # of the picture
LEFT, RIGHT, TOP, BOTTOM = 52, 200, 16, 40  # distances of the plot from its edges


def draw_accuracies(curves: dict[str, list[float]]) -> str:
    """An SVG of accuracy over rounds, one line for each run, named at its end. Accuracies are in [0, 1]."""
    longest = max(map(len, curves.values()))
    floor = math.floor(20 * min(map(min, curves.values()))) / 20  # to the next 5 % below and above
    ceiling = max(math.ceil(20 * max(map(max, curves.values()))) / 20, floor + 0.05)

    def x(number: int) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (number - 1) / max(longest - 1, 1), 1)

    def y(accuracy: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (ceiling - accuracy) / (ceiling - floor), 1)

    shapes = []
    for level in range(round(100 * floor), round(100 * ceiling) + 1, 5):
        at = y(level / 100)
        shapes.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}" stroke="#d8dbe0"/>')
        shapes.append(f'<text x="{LEFT - 8}" y="{at + 4}" text-anchor="end">{level} %</text>')
    for number in range(1, longest + 1, -(-longest // 10)):
        shapes.append(f'<text x="{x(number)}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{number}</text>')
    shapes.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">round</text>')

    # Names stand beside the ends of their lines, in the order of the lines, a line of text apart at least.
    below = float(TOP)
    for name, curve in sorted(curves.items(), key=lambda item: -item[1][-1]):
        index = list(curves).index(name) % len(COLOURS)
        points = " ".join(f"{x(number)},{y(accuracy)}" for number, accuracy in enumerate(curve, start=1))
        line = f'fill="none" stroke="{COLOURS[index]}" stroke-width="2" stroke-dasharray="{DASHES[index]}"'
        shapes.append(f'<polyline points="{points}" {line}/>')
        below = max(below + 16, y(curve[-1]) + 4)
        label = f"{100 * curve[-1]:.2f} % {name}"
        shapes.append(f'<text x="{x(len(curve)) + 8}" y="{below}" style="fill:{COLOURS[index]}">{label}</text>')
    drawn = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12" '
        f'role="img" fill="#374151"><title>Accuracy after each round</title>\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n{drawn}\n</svg>\n'
    )
