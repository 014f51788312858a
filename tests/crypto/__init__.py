"""Tests of `tasks.crypto`, and what they share: the way between its arrays and the oracle's tuples."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.crypto import curve
from tasks.crypto.curve import Point
from tasks.crypto.field import Words
from tests.oracle import Coordinates


def load(name: str) -> Any:
    return json.loads((Path(__file__).parent.parent / "vectors" / name).read_text())


def rows(points: Sequence[Coordinates]) -> Words:
    """(m, 8) rows of the oracle's points."""
    return curve.array_of([Point(*(point or (0, 0))) for point in points])


def tuples(array: Words) -> list[Coordinates]:
    """The oracle's points of (m, 8) rows."""
    return [(point.x, point.y) if point.x or point.y else None for point in curve.points_of(array)]
