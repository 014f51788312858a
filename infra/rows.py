"""Figures of a benchmark: rows with goals, as JSON, as a table, and as a block of a document that is written again."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

FIGURES, END = "<!-- figures:", "<!-- end of figures -->"


@dataclass(frozen=True)
class Row:
    """One figure, and a peer's for the same work. A name that has several peers has several rows."""

    name: str
    value: float
    unit: str
    goal: str | None = None
    peer: str | None = None
    peer_value: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times better than the peer."""
        if self.peer_value is None:
            return None
        return self.value / self.peer_value if self.unit in ("M/s", "x") else self.peer_value / self.value

    def shortfall(self) -> float | None:
        """By what share of the goal it is missed, or None: nothing is asked, or it is reached."""
        if self.goal is None:
            return None
        subject, sign, limit = parse_goal(self.goal)
        measured = self.ratio if subject == "ratio" else self.value
        if measured is None:
            raise ValueError(f"{self.name}: the goal {self.goal!r} needs a peer's figure")
        missing = (limit - measured) / limit if sign == ">=" else (measured - limit) / limit
        return missing if missing > 0 else None

    def record(self) -> dict[str, Any]:
        """The row as it is written to JSON: counts exact, else four significant digits; null where there is no peer or goal."""
        return {
            "name": self.name,
            "value": significant(self.value),
            "unit": self.unit,
            "goal": self.goal,
            "peer": self.peer,
            "peer_value": significant(self.peer_value),
            "ratio": significant(self.ratio),
        }


def parse_goal(goal: str) -> tuple[str, str, float]:
    """What a goal speaks of ("value" or "ratio"), its sign and its limit. Raises ValueError for another form."""
    found = re.fullmatch(r"(ratio )?(>=|<=) ([0-9.]+)", goal)
    if found is None:
        raise ValueError(f"goal {goal!r}: expected for example '>= 3.3', '<= 50' or 'ratio >= 1'")
    return ("ratio" if found[1] else "value"), found[2], float(found[3])


def significant(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.4g}")


def figure(value: float | None) -> str:
    """Three significant digits; thousands apart, without an exponent."""
    if value is None:
        return ""
    return f"{value:,.0f}".replace(",", " ") if abs(value) >= 1000 else f"{value:.3g}"


def verdict(row: Row) -> str:
    if row.goal is None:
        return ""
    missing = row.shortfall()
    return "reached" if missing is None else f"missed by {100 * missing:.0f} %"


def cells(row: Row) -> tuple[str, ...]:
    """A row as text: name, value, goal, verdict, peer, the peer's value, ratio."""
    times = "" if row.ratio is None else f"{figure(row.ratio)}x"
    beside = "" if row.peer_value is None else f"{figure(row.peer_value)} {row.unit}"
    return row.name, f"{figure(row.value)} {row.unit}", row.goal or "", verdict(row), row.peer or "", beside, times


COLUMNS = ("what", "ours", "goal", "", "beside it", "theirs", "times better")


def markdown(rows: Iterable[Row]) -> str:
    return table(COLUMNS, [cells(row) for row in rows])


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ("---",) * len(header), *lines))


def marked(command: str) -> str:
    """The line of a document after which the figures of this benchmark are."""
    return f"{FIGURES} healchain {command} --markdown writes between these two lines -->"


def refreshed(document: str, start: str, block: str) -> str:
    """The document with `block` between this mark and the END after it. Raises ValueError without both, once each."""
    before, found, rest = document.partition(start)
    old, end, after = rest.partition(END)
    if not (found and end) or start in rest or FIGURES in old:
        raise ValueError(f"the document needs the two lines {start!r} and {END!r}, once each, in this order")
    return f"{before}{start}\n\n{block}\n\n{END}{after}"


def show(rows: Iterable[Row], console: Console) -> None:
    """One line a row, in columns; what misses its goal in yellow."""
    widths = (58, 16, 12, 14, 42, 16, 0)
    for line, style in [(COLUMNS, "bold"), *((cells(row), row_style(row)) for row in rows)]:
        text = " ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        console.print(text.rstrip(), style=style, soft_wrap=True, markup=False)


def row_style(row: Row) -> str | None:
    return "yellow" if row.shortfall() is not None else None
