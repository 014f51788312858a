"""A simulation for people: a page with plots, and a summary for the terminal. Both read the report of `virtual_task`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.table import Table

from infra.bench import draw_accuracies
from infra.population import CHARACTERS
from infra.report import ABSENT, duration_text, exact_eth, plural

Report = Mapping[str, Any]

COLOURS = dict(zip(CHARACTERS, ("#1d4ed8", "#6b7280", "#c2410c", "#a16207", "#be185d", "#0f766e"), strict=True))
WIDTH, HEIGHT = 480, 320  # of a plot
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 28, 44  # distances of its axes from its edges
MEASURES = {
    "samples": "number of samples",
    "weight": "weight in the sum",
    "label_balance": "balance of its labels",
    "right_labels": "share of right labels",
    "rounds": "rounds that counted",
}


def render_html(report: Report) -> str:
    """The page, with its plots inside; it loads nothing."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"eth": exact_eth, "number": number, "percent": percent}
    economics = report["economics"]
    return environment.get_template("simulation.html.j2").render(
        report=report,
        sentence=sentence(report),
        facts=facts(report),
        characters=CHARACTERS,
        colours=COLOURS,
        measures=MEASURES,
        correlations=economics["correlations_of_reward"],
        accuracy=draw_accuracies({"validation": [row["accuracy"] for row in report["rounds"]]})
        if report["rounds"]
        else "",
        rewards=draw_rewards(report["miners"]) if economics["lorenz"] else "",
        lorenz=draw_lorenz(economics["lorenz"]) if economics["lorenz"] else "",
        duration=duration_text(sum(report["measured"]["seconds"].values())),
    )


def sentence(report: Report) -> str:
    """How the task ended."""
    task, rounds = report["task"], report["rounds"]
    reached = (
        f"{percent(rounds[-1]['accuracy'])} after {plural(len(rounds), 'round')}" if rounds else "no round was finished"
    )
    end = "the miners are paid" if task["status"] == "PAID" else f"the publisher is refunded ({task['reason']})"
    return f"{reached}; {percent(report['required_accuracy'])} required: {end}."


def facts(report: Report) -> dict[str, str]:
    settings, data, rounds = report["settings"], report["data"], report["rounds"]
    sampling = "divided among them" if data["is_divided"] else "drawn with replacement"
    stored = sum(row[name] for row in rounds for name in ("ciphertext_bytes", "key_bytes", "opening_bytes"))
    votes = report["votes"]
    return {
        "miners": f"{len(report['miners']):,} admitted, {report['refused']:,} refused",
        "samples": f"{data['shared_samples']:,}, {sampling}, Dirichlet alpha {settings['alpha']:g}",
        "vanish": f"{percent(settings['dropout'])} a round, {percent(settings['unrevealed'])} never reveal",
        "stakes": settings["stakes"],
        "aggregator": report["aggregator"],
        "votes": ", ".join(f"{count} {name}" for name, count in votes.items()) or ABSENT,
        "stored by all": f"{stored / 1e6:,.1f} MB",
        "sums": "encrypted" if settings["encrypt"] else "plain",
        "Gini of rewards": number(report["economics"]["gini_of_rewards"]),
        "seed": str(report["task"]["seed"]),
    }


def number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3f}"


def percent(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.2f} %"


def print_summary(report: Report, console: Console, folder: Path) -> None:
    console.print(sentence(report))
    for name, fact in facts(report).items():
        console.print(f"  {name:16} {fact}")
    table = Table("character", "miners", "ether", "of the rewards", "times an even share")
    for name, row in report["economics"]["characters"].items():
        times = number(row["times_an_even_share"])
        table.add_row(
            name, f"{row['miners']:,}", exact_eth(int(row["reward_wei"])), percent(row["share_of_rewards"]), times
        )
    console.print(table)
    console.print("correlation of an honest miner's reward with " + ", ".join(_correlations(report)))
    if report["is_beyond_contracts"]:
        console.print("more miners than the contracts admit: the same rules, beyond their limit of 200")
    console.print(f"money adds up to {report['money_wei']['sum']} wei; {folder / 'simulation.html'}, simulation.json")


def _correlations(report: Report) -> Iterable[str]:
    found = report["economics"]["correlations_of_reward"]["honest"]
    return (f"{text} {number(found[name])}" for name, text in MEASURES.items())


# ── plots ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def draw_rewards(miners: Iterable[Mapping[str, Any]]) -> str:
    """An SVG: each miner's reward, in even shares, over its number of samples, coloured by character."""
    shown = list(miners)
    total = sum(int(miner["reward_wei"]) for miner in shown)
    rewards = [int(miner["reward_wei"]) * len(shown) / total for miner in shown]
    most, highest = max(miner["samples"] for miner in shown), max(rewards)
    shapes = _axes((0, most), (0, highest), "samples", "reward, in even shares")
    for miner, reward in zip(shown, rewards, strict=True):
        x, y = _x(miner["samples"] / most), _y(reward / highest)
        shapes.append(f'<circle cx="{x}" cy="{y}" r="2.5" fill="{COLOURS[miner["character"]]}" fill-opacity="0.6"/>')
    return _picture("Reward and samples", shapes)


def draw_lorenz(curve: list[float]) -> str:
    """An SVG: the share of the rewards that the poorest part of the miners has; the straight line is even."""
    points = " ".join(f"{_x(i / (len(curve) - 1))},{_y(share)}" for i, share in enumerate(curve))
    shapes = _axes((0, 1), (0, 1), "poorest part of the miners", "its part of the rewards")
    even = f'<line x1="{_x(0)}" y1="{_y(0)}" x2="{_x(1)}" y2="{_y(1)}" stroke="#6b7280" stroke-dasharray="6 4"/>'
    line = f'<polyline points="{points}" fill="none" stroke="{COLOURS["honest"]}" stroke-width="2"/>'
    return _picture("Lorenz curve of the rewards", [*shapes, even, line])


def _x(share: float) -> float:
    return round(LEFT + (WIDTH - LEFT - RIGHT) * share, 1)


def _y(share: float) -> float:
    return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, 1)


def _axes(across: tuple[float, float], up: tuple[float, float], x_name: str, y_name: str) -> list[str]:
    """Five grid lines each way with their numbers, and the names of the axes."""
    shapes = []
    for step in range(5):
        x, y, share = _x(step / 4), _y(step / 4), step / 4
        shapes.append(f'<line x1="{_x(0)}" x2="{_x(1)}" y1="{y}" y2="{y}" stroke="#d8dbe0"/>')
        shapes.append(
            f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{up[0] + share * (up[1] - up[0]):.3g}</text>'
        )
        value = f"{across[0] + share * (across[1] - across[0]):.3g}"
        shapes.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value}</text>')
    shapes.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{x_name}</text>')
    return [*shapes, f'<text x="{LEFT}" y="{TOP - 10}">{y_name}</text>']


def _picture(title: str, shapes: list[str]) -> str:
    drawn = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12" '
        f'role="img" fill="#374151"><title>{title}</title>\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n{drawn}\n</svg>\n'
    )
