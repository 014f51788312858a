"""Which kernels run: those of `ifma` where numba compiles for a processor that has AVX-512 IFMA, those of `field` elsewhere.

    HEALCHAIN_CURVE     "ifma" or "portable" forces one; unset or empty, the fastest that works is taken

Decided once, at import; both give the same bits. numba's own target is asked, not the processor: an instruction that the
target lacks would end the process inside LLVM. `ifma` then adds a few points and is compared with plain integers; only a
backend that is right is used. What `ifma` cannot do (exceptional additions) goes to `field`, batch by batch.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba.core.registry import cpu_target

from tasks.crypto import field
from tasks.crypto.field import P, Words

ENVIRONMENT = "HEALCHAIN_CURVE"
NEEDED = ("avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512ifma")

Integers = npt.NDArray[np.int64]
Program = npt.NDArray[np.int64]
BEGIN, ADD_ARRAY, ADD_SLOT, DOUBLE, COPY = range(5)  # steps of a program, see `combine`


class WrongBackend(ValueError):
    """The environment asks for a backend that cannot run here."""


@dataclass(frozen=True)
class Choice:
    """What runs, and why. kernels: the module `ifma`, or None for the portable kernels."""

    name: str
    reason: str
    kernels: Any


def choose(wanted: str) -> Choice:
    """The backend for a value of HEALCHAIN_CURVE. Raises WrongBackend."""
    if wanted not in ("", "ifma", "portable"):
        raise WrongBackend(f"{ENVIRONMENT} = {wanted!r}: expected ifma or portable, or nothing for the fastest")
    if wanted == "portable":
        return Choice("portable", f"{ENVIRONMENT} asks for it", None)
    missing = [name for name in NEEDED if f"+{name}" not in _target_features()]
    if missing:
        return _without_ifma(wanted, f"numba's target lacks {', '.join(missing)}")
    from tasks.crypto import ifma  # compiles on first use: only where the instructions exist

    if not agrees(ifma):
        return _without_ifma(wanted, "the IFMA kernels failed their self-test on this machine")
    return Choice("ifma", f"{ENVIRONMENT} asks for it" if wanted else "numba's target has AVX-512 IFMA", ifma)


def _without_ifma(wanted: str, why: str) -> Choice:
    if wanted == "ifma":
        raise WrongBackend(f"{ENVIRONMENT} = 'ifma': {why}; unset it, or set it to portable")
    return Choice("portable", why, None)


def _target_features() -> list[str]:
    """What numba compiles for, as LLVM names it: ["+avx2", "-avx512f", ...]."""
    features: str = cpu_target.target_context.codegen().magic_tuple()[2]
    return features.split(",")


def agrees(kernels: Any) -> bool:
    """Whether a backend does as plain integers do: 9 chords, the last in a block of its own, in both signs, and 9 pairs."""
    points: list[tuple[int, int]] = []
    x = 0
    while len(points) < 18:
        x += 1
        y = pow(x**3 + 7, (P + 1) // 4, P)  # a square root, if there is one
        if (y * y - x**3 - 7) % P == 0:
            points.append((x, y))
    left, right = points[:9], points[9:]
    signs = [(-1) ** i for i in range(9)]
    references = np.ones((1, 16), np.int32)
    references[0, :9] = [(i + 1) * sign for i, sign in enumerate(signs)]
    total, failed, room = _rows(left), np.zeros(1, np.uint8), np.empty(kernels.room_words(1), np.uint64)
    kernels.add_rows(total, _rows(right), references, False, failed, room, field.invert_at.address)
    expected = _rows([_chord(a, (x, sign * y)) for a, (x, y), sign in zip(left, right, signs, strict=True)])
    added = not failed.any() and bool((total == expected).all()) and kernels.first_invalid(total) == -1
    return added and _decodes(kernels, points, room)


def _decodes(kernels: Any, points: list[tuple[int, int]], room: npt.NDArray[np.uint64]) -> bool:
    pairs = [(a[0], b[0], (a[1] + b[1]) % P) for a, b in zip(points[::2], points[1::2], strict=True)]
    decoded, failed = np.empty((len(points), 8), np.uint64), np.zeros(1, np.uint8)
    kernels.decode_pairs(_words(pairs).reshape(-1, 12), decoded, failed, room, field.invert_at.address)
    return not failed.any() and bool((decoded == _rows(points)).all())


def _chord(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    slope = (b[1] - a[1]) * pow(b[0] - a[0], -1, P)
    x = (slope * slope - a[0] - b[0]) % P
    return x, (slope * (a[0] - x) - a[1]) % P


def _rows(points: list[tuple[int, int]]) -> Words:
    return _words(points).reshape(-1, 8)


def _words(tuples: Sequence[tuple[int, ...]]) -> Words:
    """Numbers below 2**256, four words each, in one row."""
    return np.frombuffer(b"".join(c.to_bytes(32, "little") for one in tuples for c in one), "<u8").astype(np.uint64)


class _Rooms(threading.local):
    """Scratch of the IFMA kernels, one for each thread, kept from call to call: fresh memory costs more than the work."""

    room: npt.NDArray[np.uint64] = np.empty(0, np.uint64)


_ROOMS = _Rooms()


def _room(slots: int) -> npt.NDArray[np.uint64]:
    words = CHOICE.kernels.room_words(slots)
    if len(_ROOMS.room) < words:
        _ROOMS.room = np.empty(words, np.uint64)
    return _ROOMS.room


def spread(work: Callable[[slice], None], length: int, chunk: int, threads: int) -> None:
    """Call work for slices of `chunk` that cover range(length), in so many threads; kernels release the GIL.

    The first error of a chunk, in order of chunks, is raised; the chunks behind it may have been worked on or not.
    """
    if threads < 1:
        raise ValueError(f"threads = {threads}: at least 1")
    slices = [slice(first, min(first + chunk, length)) for first in range(0, length, chunk)]
    if threads == 1 or len(slices) < 2:
        for part in slices:
            work(part)
        return
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(work, part) for part in slices]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()


# --- kernels, whichever run --------------------------------------------------------------------------------------------


def add_rows(points: Words, table: Words, references: npt.NDArray[np.int32], *, fresh: bool = False) -> None:
    """points[i] += sum over w of the row references[w, i] of the table, for every input; fresh: from infinity.

    points (m, 8) in place, table (rows, 8) and references (w, m): see `field.add_rows`.
    """
    if fresh:
        points[:] = 0
    if not len(points) or not len(references):
        return
    ifma = CHOICE.kernels
    if ifma is None:
        field.add_rows(points, table, references)
        return
    columns = -(-len(points) // ifma.LANES) * ifma.LANES
    padded = references
    if references.shape[1] != columns:
        padded = np.pad(references, ((0, 0), (0, columns - references.shape[1])), mode="edge")
    failed = np.zeros(-(-columns // (ifma.BATCH * ifma.LANES)), np.uint8)
    ifma.add_rows(points, table, padded, fresh, failed, _room(1), field.invert_at.address)
    size = ifma.BATCH * ifma.LANES
    for batch in np.flatnonzero(failed):
        part = slice(int(batch) * size, (int(batch) + 1) * size)
        field.add_rows(points[part], table, np.ascontiguousarray(references[:, : len(points)][:, part]))


def combine(points: Words, arrays: list[Words], program: Program, slots: int) -> None:
    """points (m, 8) = slot 0 after a program of additions on arrays of points (m, 8), row by row.

    A step of the program is (kind, slot, other): BEGIN slot with the array `other`, ADD_ARRAY `other` to slot, ADD_SLOT
    `other` to slot, DOUBLE slot (other = slot), COPY the slot `other` to slot.
    """
    ifma = CHOICE.kernels
    if ifma is None or not len(points):
        points[:] = _combine_portable(arrays, program, slots)
        return
    blocks = ifma.BATCH if slots == 1 else ifma.BATCH // 4  # more slots: fewer blocks, to stay near the cache
    size = blocks * ifma.LANES
    failed = np.zeros(-(-len(points) // size), np.uint8)
    addresses = np.array([array.__array_interface__["data"][0] for array in arrays], np.int64)
    ifma.combine(points, addresses, program, slots, blocks, failed, _room(slots), field.invert_at.address)
    for batch in np.flatnonzero(failed):
        part = slice(int(batch) * size, (int(batch) + 1) * size)
        points[part] = _combine_portable([array[part] for array in arrays], program, slots)


def _combine_portable(arrays: list[Words], program: Program, slots: int) -> Words:
    every = np.arange(1, len(arrays[0]) + 1, dtype=np.int32)[None, :]
    held: list[Words] = [arrays[0]] * slots
    for kind, slot, other in program.tolist():
        if kind == BEGIN:
            held[slot] = arrays[other].copy()
        elif kind == COPY:
            held[slot] = held[other].copy()
        else:
            source = arrays[other] if kind == ADD_ARRAY else held[other]
            field.add_rows(held[slot], source.copy() if other == slot and kind != ADD_ARRAY else source, every)
    return held[0]


def decode_pairs(pairs: Words, points: Words) -> int:
    """Write points (2 n, 8) of pairs (n, 12); index of the first pair that encodes none, or -1: see `field.decode_pairs`."""
    ifma = CHOICE.kernels
    if ifma is None or not len(pairs):
        return int(field.decode_pairs(pairs, points))
    size = ifma.BATCH * ifma.LANES
    failed = np.zeros(-(-len(pairs) // size), np.uint8)
    ifma.decode_pairs(pairs, points, failed, _room(1), field.invert_at.address)
    for batch in np.flatnonzero(failed):
        first = int(batch) * size
        wrong = int(field.decode_pairs(pairs[first : first + size], points[2 * first : 2 * (first + size)]))
        if wrong >= 0:
            return first + wrong
    return -1


def first_invalid(points: Words) -> int:
    """Index of the first row that is not a canonical affine point (infinity included), or -1."""
    ifma = CHOICE.kernels
    return int((field if ifma is None else ifma).first_invalid(points))


def sums_hold(points: Words, table: Words, references: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """(m,) whether points (m, 8) are the sums of the rows named by references (2, m or more), which differ in x.

    Without a division: less than half of what adding the rows costs.
    """
    ifma = CHOICE.kernels
    if ifma is None:
        sums = np.zeros_like(points)
        field.add_rows(sums, table, np.ascontiguousarray(references[:, : len(points)]))
        return equal_rows(sums, points)
    holds = np.empty(len(points), np.uint8)
    ifma.sums_hold(points, table, references, holds)
    return holds.view(bool)


def search(
    slots: npt.NDArray[np.uint64],
    giants: Words,
    stride: int,
    points: Words,
    confirm: Callable[[Integers, Words], npt.NDArray[np.bool_]],
) -> tuple[Integers, npt.NDArray[np.bool_]]:
    """Exponents m of points (m - 1/2) G, and whether they were found: see `field.search`.

    confirm: whether exponents are those of points; a tag may fit by accident, so every candidate is asked for.
    """
    logs = np.zeros(len(points), np.int64)
    solved = np.zeros(len(points), bool)
    ifma = CHOICE.kernels
    if ifma is not None and len(points):
        others, found = np.zeros(len(points), np.int64), np.zeros(len(points), np.uint8)
        tags, offsets = np.empty(32 * ifma.BATCH, np.uint64), np.empty(ifma.LANES * ifma.BATCH, np.int64)
        ifma.search(
            slots, giants, stride, points, logs, others, found, tags, offsets, _room(1), field.invert_at.address
        )
        solved = (found == 1) & confirm(logs, points)
        pending = np.flatnonzero((found == 1) & ~solved & (others != logs))
        right = pending[confirm(others[pending], points[pending])]
        logs[right], solved[right] = others[right], True
    pending = np.flatnonzero(~solved)
    skips = np.zeros(len(points), np.int64)
    while len(pending):
        candidates, found = np.zeros(len(pending), np.int64), np.zeros(len(pending), np.uint8)
        field.search(slots, giants, stride, points[pending], skips[pending], candidates, found)
        right_here = (found == 1) & confirm(candidates, points[pending])
        right = pending[right_here]
        logs[right], solved[right] = candidates[right_here], True
        pending = pending[(found == 1) & ~right_here]
        skips[pending] += 1
    return logs, solved


def equal_rows(a: Words, b: Words) -> npt.NDArray[np.bool_]:
    """(m,) whether rows of (m, width) are the same."""
    equal = np.empty(len(a), np.uint8)
    field.compare_rows(a, np.ascontiguousarray(b), equal)
    return equal.view(bool)


CHOICE = choose(os.environ.get(ENVIRONMENT, ""))
