"""Arithmetic of secp256k1 on arrays with AVX-512 IFMA: eight field elements at a time, compiled with numba.

    lanes       eight uint64 in one register; lane i of a block belongs to row 8 * block + i
    limbs       five lanes l_0 .. l_4, radix 2**52: sum l_j 2**(52 j). IFMA multiplies the low 52 bits of each lane
    tight       limbs 0 to 3 below 2**52, limb 4 below 2**48 + 2**8: the value is below 2**256 + 2**216
    wet         as tight, but limbs 0 to 3 keep what was carried out of them above bit 52: fit to be multiplied only
    block       x and y of eight points, ten lanes, 640 bytes

The kernels are those of `field` with the same names, and give the same bits. They take the common path only: a batch in
which an addition is exceptional (equal x, infinity) is named in `failed` and left as it was, and the caller gives it to
`field`. Tables, references, points: as in `field`. Not constant time: rows are loaded by secret references.

An addition has one inversion in 5 multiplications and a squaring (see `field.add_rows`). With slope s, for the point
(x1, y1) and the row (x2, y2):

    N = K - x1, K = 4 p in limbs so large that no difference below ever is negative
    pass 1      dx = x2 + N, prefix products of dx in four chains; one inversion for the batch
    pass 2      e = y2 - y1, s = e / dx, x3 = s**2 + 2 N - dx, d = x3 + N, -y3 = s d + y1

The sign of y changes with every addition, which costs nothing: the sign of the next row is chosen to fit. Pass 2 goes
over 16 blocks with one multiplication, then with the next one, and both passes take two blocks at a time, whose
instructions alternate: there are always independent ones for the processor.

Everything is emitted in this file: numba's cache is keyed on the file of a kernel, so an emitter edited in another file
would leave the old machine code in use. For the same reason the inversion of `field` is called by its address.
"""

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils

from tasks.crypto.field import BUCKET_BITS, STEP_BITS, STEP_MASK, P, Words, compiled, count_zeros, kernel, operation

LANES = 8
LIMBS = 5
ELEMENT = 8 * LANES * LIMBS  # bytes of one field element in lanes
BLOCK = 2 * ELEMENT  # bytes of x and y
ROW = 64  # bytes of a point in an array
BATCH = 384  # blocks that share an inversion: 3072 points, 480 KiB with their dx and prefix products, in the L2 cache
_NEAR = 6  # blocks whose rows are on their way from the second-level cache to the first
_AHEAD = 16  # points whose slots are on their way
_CHAINS = 4  # of prefix products, so that four multiplications never wait for one another
_GROUP = 16  # blocks that go through a stage together; their intermediate values stay in the L1 cache

_I1, _I32, _I64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_I64, LANES)
_HALF = ir.VectorType(_I64, 4)

_C = 2**256 - P  # 33 bits
_FOLD = 16 * _C  # 2**260 = _FOLD mod p, 37 bits
_LOW52, _LOW48 = 2**52 - 1, 2**48 - 1
# 4 p with 2**54 added to limbs 0 to 3 and taken off the next: limb by limb above 2 tight elements and a carry.
_K = (2**54 + 2**52 - 4 * _C, *[2**54 + 2**52 - 5] * 3, 2**50 - 5)
assert sum(limb << 52 * j for j, limb in enumerate(_K)) == 4 * P


# --- emitters: lists of five vectors -------------------------------------------------------------------------------

Lanes = list[Any]


def _all(value: int) -> Any:
    return ir.Constant(_VECTOR, [value & 2**64 - 1] * LANES)


def _madd(builder: Any, half: str, accumulator: Any, a: Any, b: Any) -> Any:
    """accumulator + the low ("l") or high ("h") 52 bits of the product of the low 52 bits of a and b."""
    name = f"llvm.x86.avx512.vpmadd52{half}.uq.512"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), name)
    return builder.call(function, [accumulator, a, b])


def _carry(builder: Any, element: Lanes, *, signed: bool = False, dry: bool = False) -> Lanes:
    """Carry bits above 52 from limb to limb; the result is wet, or tight if dry. signed: limbs may be negative."""
    limbs, shift = list(element), builder.ashr if signed else builder.lshr
    for j in range(4):
        limbs[j + 1] = builder.add(limbs[j + 1], shift(limbs[j], _all(52)))
    return [builder.and_(limb, _all(_LOW52)) for limb in limbs[:4]] + limbs[4:] if dry else limbs


def _reduce(builder: Any, columns: Lanes, *, dry: bool = False) -> Lanes:
    """Ten columns, each below 2**59, the upper five a number below 2**258, as an element, wet or tight.

    The upper five times 2**260 mod p come down: below 2**53 more in each lower column, and below 2**35 in a new fifth.
    What limb 4 has above 48 bits, below 2**12, and that fifth column times 16, make t < 2**39; t (2**256 mod p) comes
    down to limbs 0 and 1. So limb 4 is below 2**48 before the carry, and the carry adds less than 2**8.
    """
    high = _carry(builder, columns[5:])
    low, fold = list(columns[:5]), _all(_FOLD)
    for j in range(5):
        low[j] = _madd(builder, "l", low[j], high[j], fold)
    for j in range(4):
        low[j + 1] = _madd(builder, "h", low[j + 1], high[j], fold)
    fifth = _madd(builder, "h", _all(0), high[4], fold)
    t = builder.add(builder.lshr(low[4], _all(48)), builder.shl(fifth, _all(4)))
    low[4] = builder.and_(low[4], _all(_LOW48))
    low[0] = _madd(builder, "l", low[0], t, _all(_C))
    low[1] = _madd(builder, "h", low[1], t, _all(_C))
    return _carry(builder, low, dry=dry)


def _multiply(builder: Any, a: Lanes, b: Lanes, initial: Lanes | None = None, *, dry: bool = False) -> Lanes:
    """a b + initial. Limbs 4 below 2**52 and values below 2**259; limbs of initial in [0, 2**58): columns < 2**59."""
    columns = list(initial or [_all(0)] * LIMBS) + [_all(0)] * LIMBS
    for i in range(LIMBS):
        for j in range(LIMBS):
            columns[i + j] = _madd(builder, "l", columns[i + j], a[i], b[j])
        for j in range(LIMBS):
            columns[i + j + 1] = _madd(builder, "h", columns[i + j + 1], a[i], b[j])
    return _reduce(builder, columns, dry=dry)


def _square(builder: Any, a: Lanes, n: Lanes | None = None, less: Lanes | None = None, *, dry: bool = False) -> Lanes:
    """a**2 + 2 n - less; a wet, its limb 4 below 2**51, its value below 2**259; limbs of 2 n - less in [0, 2**58).

    The products of two different limbs, in columns 1 to 8, and n are doubled at the end.
    """
    columns = [*(n or [_all(0)] * LIMBS), *[_all(0)] * LIMBS]
    for i in range(LIMBS):
        for j in range(i + 1, LIMBS):
            columns[i + j] = _madd(builder, "l", columns[i + j], a[i], a[j])
        for j in range(i + 1, LIMBS):
            columns[i + j + 1] = _madd(builder, "h", columns[i + j + 1], a[i], a[j])
    columns = [*(builder.add(column, column) for column in columns[:9]), columns[9]]
    if less:
        columns[:LIMBS] = [builder.sub(c, l) for c, l in zip(columns, less, strict=False)]
    for i in range(LIMBS):
        columns[2 * i] = _madd(builder, "l", columns[2 * i], a[i], a[i])
        columns[2 * i + 1] = _madd(builder, "h", columns[2 * i + 1], a[i], a[i])
    return _reduce(builder, columns, dry=dry)


def _pack64(builder: Any, limbs: Lanes) -> Lanes:
    """Four lanes of 64 bits from a canonical element."""
    l0, l1, l2, l3, l4 = limbs
    pairs = ((l0, 0, l1, 52), (l1, 12, l2, 40), (l2, 24, l3, 28), (l3, 36, l4, 16))
    return [builder.or_(builder.lshr(a, _all(right)), builder.shl(b, _all(left))) for a, right, b, left in pairs]


def _unpack64(builder: Any, words: Lanes, flip: Any = None) -> Lanes:
    """Canonical limbs from four lanes of 64 bits; where flip is all ones, 2**256 - 1 minus the number."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), "llvm.fshr.v8i64"
    )

    def bits(low: int, shift: int) -> Any:
        return builder.call(function, [words[low + 1], words[low], _all(shift)])

    limbs = [words[0], bits(0, 52), bits(1, 40), bits(2, 28), builder.lshr(words[3], _all(16))]
    if flip is not None:
        limbs = [builder.xor(limb, flip) for limb in limbs]
    return [builder.and_(limb, _all(_LOW52 if j < 4 else _LOW48)) for j, limb in enumerate(limbs)]


def _canonical(builder: Any, element: Lanes) -> Lanes:
    """The number below p: of limbs below 2**60 whose limb 4 is below 2**56."""
    limbs = _carry(builder, element, dry=True)
    top = builder.lshr(limbs[4], _all(48))
    limbs[4] = builder.and_(limbs[4], _all(_LOW48))
    limbs[0] = _madd(builder, "l", limbs[0], top, _all(_C))  # top < 2**9
    limbs = _carry(builder, limbs, dry=True)  # below 2**256 + 2**42
    more = _carry(builder, [builder.add(limbs[0], _all(_C)), *limbs[1:]], dry=True)
    reaches = builder.icmp_unsigned(">", more[4], _all(_LOW48))  # limbs + _C >= 2**256, thus limbs >= p
    more[4] = builder.and_(more[4], _all(_LOW48))
    return [builder.select(reaches, a, b) for a, b in zip(more, limbs, strict=True)]


def _is_multiple_of_p(builder: Any, element: Lanes) -> Any:
    """The lanes where a tight element is 0 mod p: below 2**256 + 2**216 that are 0 and p only, each in one way."""
    found = None
    for value in (0, P):
        different = _all(0)
        for j, limb in enumerate(element):
            different = builder.or_(different, builder.xor(limb, _all(value >> 52 * j & _LOW52)))
        same = builder.icmp_unsigned("==", different, _all(0))
        found = same if found is None else builder.or_(found, same)
    return found


def _from_k(builder: Any, element: Lanes) -> Lanes:
    """K - element, limbs in (2**53, 2**55), limb 4 in (0, 2**50): of a tight element."""
    return [builder.sub(k, limb) for k, limb in zip(_four_p(), element, strict=True)]


def _four_p() -> Lanes:
    """K."""
    return [_all(limb) for limb in _K]


# --- emitters: memory -----------------------------------------------------------------------------------------------


def _load(builder: Any, address: Any, place: int = 0) -> Lanes:
    """The element at an address, `place` elements on."""
    pointer = builder.inttoptr(address, _VECTOR.as_pointer())
    return [_aligned(builder.load(builder.gep(pointer, [_I64(LIMBS * place + j)]))) for j in range(LIMBS)]


def _store(builder: Any, address: Any, element: Lanes, place: int = 0) -> None:
    pointer = builder.inttoptr(address, _VECTOR.as_pointer())
    for j, limb in enumerate(element):
        _aligned(builder.store(limb, builder.gep(pointer, [_I64(LIMBS * place + j)])))


def _aligned(access: Any) -> Any:
    """numpy gives memory at multiples of 16 bytes; a wrong promise would end the process."""
    access.align = 8
    return access


def _shuffle(builder: Any, a: Any, b: Any, places: Sequence[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(places)), list(places)))


def _gather(builder: Any, rows: Lanes, offset: int) -> Lanes:
    """Four lanes of 64 bits: words offset / 8 .. of eight rows at these addresses. 4 inserts and 8 shuffles."""

    def half(row: Any) -> Any:
        return _aligned(builder.load(builder.inttoptr(builder.add(row, _I64(offset)), _HALF.as_pointer())))

    halves = [_shuffle(builder, half(rows[i]), half(rows[i + 2]), range(8)) for i in (0, 1, 4, 5)]
    even, odd = (0, 8, 2, 10, 4, 12, 6, 14), (1, 9, 3, 11, 5, 13, 7, 15)
    first, second = (0, 1, 4, 5, 8, 9, 12, 13), (2, 3, 6, 7, 10, 11, 14, 15)
    pairs = [_shuffle(builder, halves[i], halves[i + 1], places) for places in (even, odd) for i in (0, 2)]
    return [_shuffle(builder, pairs[2 * j], pairs[2 * j + 1], places) for places in (first, second) for j in (0, 1)]


def _scatter(builder: Any, rows: Lanes, last: Any, words: Lanes) -> None:
    """Write eight lanes of 64 bits (x, then y) to rows at these addresses; only rows up to `last`."""
    pairs = [
        _shuffle(builder, words[i], words[i + 1], places)
        for places in ((0, 8, 2, 10, 4, 12, 6, 14), (1, 9, 3, 11, 5, 13, 7, 15))
        for i in (0, 2, 4, 6)
    ]
    for lane, row in enumerate(rows):
        four = pairs[4 * (lane & 1) : 4 * (lane & 1) + 4]
        place = lane & 6
        left = _shuffle(builder, four[0], four[1], (place, place + 1, place + 8, place + 9))
        right = _shuffle(builder, four[2], four[3], (place, place + 1, place + 8, place + 9))
        whole = _shuffle(builder, left, right, range(8))
        with builder.if_then(builder.icmp_signed("<=", _I64(lane), last)):
            _aligned(builder.store(whole, builder.inttoptr(row, _VECTOR.as_pointer())))


def _at_offsets(builder: Any, base: Any, offsets: Any) -> Lanes:
    """Addresses of the rows at eight offsets, which `_name` has written."""
    pointer = builder.inttoptr(offsets, _I64.as_pointer())
    return [builder.add(base, builder.load(builder.gep(pointer, [_I64(lane)]))) for lane in range(LANES)]


def _references(builder: Any, references: Any) -> Any:
    """Eight references as 64-bit lanes."""
    kind = ir.VectorType(_I32, LANES)
    eight = builder.load(builder.inttoptr(references, kind.as_pointer()))
    eight.align = 4
    return builder.sext(eight, _VECTOR)


def _note(builder: Any, exceptions: Any, here: Any) -> None:
    """Remember that the condition held in some lane: exceptions is the address of one vector."""
    pointer = builder.inttoptr(exceptions, _VECTOR.as_pointer())
    before = _aligned(builder.load(pointer))
    _aligned(builder.store(builder.select(here, _all(-1), before), pointer))


def _memory_operation(emit: Callable[..., None]) -> Any:
    """What `emit` writes from a builder and addresses or numbers (all int64), as an operation of kernels."""

    def typed(typingctx: Any, *given: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            emit(builder, *values)
            return context.get_dummy_value()

        return types.void(*[types.int64] * len(given)), generate

    names = list(inspect.signature(emit).parameters)[1:]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in ["typingctx", *names]]
    typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    typed.__name__ = emit.__name__
    return operation(typed)


def _alternate(builder: Any, *streams: Callable[[], None]) -> None:
    """What the streams write, one instruction of each in turns. None may read what another one writes.

    The columns of a product are chains of nine IFMA of four cycles each. The processor looks some hundred instructions
    ahead, one product, and finds too few that can start; two products in turns keep both of its ports busy.
    """
    instructions = builder.block.instructions
    written = []
    for stream in streams:
        begin = len(instructions)
        stream()
        written.append(instructions[begin:])
        del instructions[begin:]
    instructions.extend(each for turn in itertools.zip_longest(*written) for each in turn if each is not None)


def _pair_operation(emit: Callable[..., None]) -> Any:
    """`emit` at two places in turns: an operation that takes all arguments of the one, then all of the other.

    Both may be the same place, where one is left over: all that `emit` reads, it reads before it writes there.
    """
    names = list(inspect.signature(emit).parameters)[1:]

    def both(builder: Any, *values: Any) -> None:
        one, other = values[: len(names)], values[len(names) :]
        _alternate(builder, lambda: emit(builder, *one), lambda: emit(builder, *other))

    every = ["builder", *names, *(f"{name}_too" for name in names)]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in every]
    both.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    both.__name__ = emit.__name__
    return _memory_operation(both)


# --- operations of kernels: addresses in, nothing out ----------------------------------------------------------------
#
#   state       a block: N = K - x, and S = y or -y (the kernel counts which)
#   base        address of the row before the first of a table, or of the first of eight rows in order
#   chain       an element: product of every fourth dx so far, and in pass 2 the inverse of that product


@_memory_operation
def _begin(builder: Any, state: Any, base: Any, offsets: Any, exceptions: Any) -> None:
    """state = the rows at eight offsets."""
    _begin_with(builder, state, _at_offsets(builder, base, offsets), exceptions)


@_memory_operation
def _order(builder: Any, offsets: Any, last: Any) -> None:
    """Write the offsets of eight rows that follow one another; behind row `last`, of that one again."""
    places = ir.Constant(_VECTOR, list(range(LANES)))
    uniform = _uniform(builder, last)
    clamped = builder.select(builder.icmp_signed("<", places, uniform), places, uniform)
    _aligned(builder.store(builder.shl(clamped, _all(6)), builder.inttoptr(offsets, _VECTOR.as_pointer())))


def _uniform(builder: Any, number: Any) -> Any:
    """A number in all lanes."""
    one = builder.insert_element(_all(0), number, _I32(0))
    return _shuffle(builder, one, one, [0] * LANES)


@_memory_operation
def _name(builder: Any, offsets: Any, references: Any, exceptions: Any) -> None:
    """Write the offsets of eight rows from the address before row 0. Reference 0 is noted, and becomes row 0."""
    lanes = _references(builder, references)
    nothing = builder.icmp_unsigned("==", lanes, _all(0))
    _note(builder, exceptions, nothing)
    size = builder.select(builder.icmp_signed("<", lanes, _all(0)), builder.sub(_all(0), lanes), lanes)
    size = builder.select(nothing, _all(1), size)
    _aligned(builder.store(builder.shl(size, _all(6)), builder.inttoptr(offsets, _VECTOR.as_pointer())))


@_memory_operation
def _fetch(builder: Any, base: Any, offsets: Any, lane: Any) -> None:
    """Ask for one of eight rows."""
    offset = builder.load(builder.gep(builder.inttoptr(offsets, _I64.as_pointer()), [lane]))
    _prefetch(builder, builder.add(base, offset))


def _prefetch(builder: Any, address: Any, locality: int = 2) -> None:
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(prefetch, [builder.inttoptr(address, pointer), _I32(0), _I32(locality), _I32(1)])


@_memory_operation
def _fetch_rows(builder: Any, base: Any, offsets: Any) -> None:
    """Ask for eight rows, from the second-level cache to the first."""
    for row in _at_offsets(builder, base, offsets):
        _prefetch(builder, row, 3)


@_memory_operation
def _fetch_line(builder: Any, address: Any) -> None:
    """Ask for a cache line."""
    _prefetch(builder, address)


@_memory_operation
def _begin_named(builder: Any, state: Any, base: Any, offsets: Any, references: Any, exceptions: Any) -> None:
    """state = the named rows; the sign of S is that of a kernel that has added nothing yet."""
    signs = _references(builder, references)
    _begin_with(builder, state, _at_offsets(builder, base, offsets), exceptions, builder.ashr(signs, _all(63)))


def _begin_with(builder: Any, state: Any, rows: Lanes, exceptions: Any | None, flip: Any = None) -> None:
    x = _gather(builder, rows, 0)
    # Infinity is the zero row. No other point has x = 0; one in 2**64 has a zero word, and goes the slow way for nothing.
    if exceptions is not None:
        _note(builder, exceptions, builder.icmp_unsigned("==", x[0], _all(0)))
    y = _unpack64(builder, _gather(builder, rows, 32))
    if flip is not None:
        y = [
            builder.select(builder.icmp_signed("<", flip, _all(0)), n, p)
            for n, p in zip(_minus(builder, y), y, strict=True)
        ]
    _store(builder, state, _from_k(builder, _unpack64(builder, x)))
    _store(builder, state, y, 1)


def _minus(builder: Any, element: Lanes) -> Lanes:
    """4 p - element, of a canonical element: limbs 0 to 3 below 2**52, limb 4 below 2**50, so it is not tight."""
    return _carry(builder, _from_k(builder, element), dry=True)


@_memory_operation
def _finish(builder: Any, points: Any, last: Any, state: Any, negative: Any) -> None:
    """Write a block to eight rows in order, canonical; negative: S is -y."""
    x = _canonical(builder, _from_k(builder, _load(builder, state)))
    s = _load(builder, state, 1)
    opposite = builder.icmp_signed("!=", negative, _I64(0))
    y = [builder.select(opposite, n, p) for n, p in zip(_from_k(builder, s), s, strict=True)]
    words = _pack64(builder, x) + _pack64(builder, _canonical(builder, y))
    _scatter(builder, [builder.add(points, _I64(ROW * lane)) for lane in range(LANES)], last, words)


def _prefix(builder: Any, dx: Lanes, dx_out: Any, prefixes: Any, chain: Any) -> None:
    """Store dx and the product of the chain before it; multiply the chain."""
    product = _load(builder, chain)
    _store(builder, dx_out, dx)
    _store(builder, prefixes, product)
    _store(builder, chain, _multiply(builder, product, dx))


def _difference(builder: Any, x2: Lanes, state: Any) -> Lanes:
    """x2 - x1 + 4 p = x2 + N, tight but for limb 4 below 2**51."""
    n = _load(builder, state)
    return _carry(builder, [builder.add(a, b) for a, b in zip(x2, n, strict=True)], dry=True)


@_pair_operation
def _compare_rows(
    builder: Any, state: Any, base: Any, offsets: Any, dx: Any, prefixes: Any, chain: Any, exceptions: Any
) -> None:
    """Pass 1 of an addition of the rows at eight offsets."""
    x = _gather(builder, _at_offsets(builder, base, offsets), 0)
    _note(builder, exceptions, builder.icmp_unsigned("==", x[0], _all(0)))
    _prefix(builder, _difference(builder, _unpack64(builder, x), state), dx, prefixes, chain)


@_pair_operation
def _compare_states(builder: Any, state: Any, other: Any, dx: Any, prefixes: Any, chain: Any) -> None:
    """Pass 1 of an addition of another state."""
    x2 = _from_k(builder, _load(builder, other))
    _prefix(builder, _difference(builder, x2, state), dx, prefixes, chain)


@_pair_operation
def _compare_self(builder: Any, state: Any, dx: Any, prefixes: Any, chain: Any) -> None:
    """Pass 1 of a doubling: 2 S in the place of dx. No point of the curve has y = 0."""
    s = _load(builder, state, 1)
    _prefix(builder, _carry(builder, [builder.add(a, a) for a in s], dry=True), dx, prefixes, chain)


@_memory_operation
def _divide(builder: Any, out: Any, dx: Any, prefixes: Any, chain: Any) -> None:
    """Pass 2: out = 1 / dx; the chain loses this dx."""
    inverse = _load(builder, chain)
    _alternate(
        builder,
        lambda: _store(builder, out, _multiply(builder, inverse, _load(builder, prefixes))),
        lambda: _store(builder, chain, _multiply(builder, inverse, _load(builder, dx))),
    )


def _slope(builder: Any, quotient: Any, y2: Lanes, state: Any, excess: Any = None) -> None:
    """quotient = (y2 - S) * quotient. excess: what y2 has too much of in limb 0."""
    e = [builder.sub(a, b) for a, b in zip(y2, _load(builder, state, 1), strict=True)]
    take = _all(4 * _C) if excess is None else builder.add(excess, _all(4 * _C))
    # + 4 p: positive, below 2**259, also where S is 4 p - y.
    e[0], e[4] = builder.sub(e[0], take), builder.add(e[4], _all(2**50))
    _store(builder, quotient, _multiply(builder, _carry(builder, e, signed=True), _load(builder, quotient)))


@_pair_operation
def _slope_named(
    builder: Any, quotient: Any, state: Any, base: Any, offsets: Any, references: Any, negative: Any
) -> None:
    """Pass 2: the slope to the named rows."""
    sign = builder.ashr(_references(builder, references), _all(63))
    flip = builder.xor(sign, _uniform(builder, builder.neg(negative)))
    y2 = _unpack64(builder, _gather(builder, _at_offsets(builder, base, offsets), 32), flip)
    # Where flipped, y2 is 2**256 - 1 - y = -y + (_C - 1) mod p.
    _slope(builder, quotient, y2, state, builder.and_(flip, _all(_C - 1)))


@_pair_operation
def _slope_rows(builder: Any, quotient: Any, state: Any, base: Any, offsets: Any, negative: Any) -> None:
    """Pass 2: the slope to rows that all have the sign given."""
    flip = _uniform(builder, builder.neg(negative))
    y2 = _unpack64(builder, _gather(builder, _at_offsets(builder, base, offsets), 32), flip)
    _slope(builder, quotient, y2, state, builder.and_(flip, _all(_C - 1)))


@_pair_operation
def _slope_states(builder: Any, quotient: Any, state: Any, other: Any, negative: Any) -> None:
    """Pass 2: the slope to another state; negative: the S of the two have different signs."""
    _slope(builder, quotient, _signed(builder, _load(builder, other, 1), negative), state)


def _signed(builder: Any, y: Lanes, negative: Any) -> Lanes:
    opposite = builder.icmp_signed("!=", negative, _I64(0))
    return [builder.select(opposite, n, p) for n, p in zip(_from_k(builder, y), y, strict=True)]


@_pair_operation
def _slope_self(builder: Any, quotient: Any, state: Any) -> None:
    """Pass 2 of a doubling: 3 x**2 / (2 S)."""
    x = _carry(builder, _from_k(builder, _load(builder, state)))
    square = _square(builder, x, dry=True)
    triple = _carry(builder, [builder.mul(limb, _all(3)) for limb in square])
    _store(builder, quotient, _multiply(builder, triple, _load(builder, quotient)))


def _abscissa(builder: Any, slope: Any, state: Any, dx: Lanes | None) -> None:
    n = _load(builder, state)
    x3 = _square(builder, _load(builder, slope), n, dx, dry=True)
    _store(builder, slope, _carry(builder, [builder.add(a, b) for a, b in zip(x3, n, strict=True)]), _GROUP)
    _store(builder, state, _from_k(builder, x3))


@_pair_operation
def _abscissa_chord(builder: Any, slope: Any, state: Any, dx: Any) -> None:
    """Pass 2: x3 = s**2 + 2 N - dx; d = x3 + N goes behind the group's slopes.

    2 N - dx: limbs 0 to 3 in (2**54, 2**56), limb 4 above 2**50 - 2**49 - 2**10.
    """
    _abscissa(builder, slope, state, _load(builder, dx))


@_pair_operation
def _abscissa_self(builder: Any, slope: Any, state: Any) -> None:
    """Pass 2 of a doubling: x3 = s**2 + 2 N."""
    _abscissa(builder, slope, state, None)


@_pair_operation
def _ordinate(builder: Any, slope: Any, state: Any) -> None:
    """Pass 2: S = s d + S."""
    s = _multiply(builder, _load(builder, slope), _load(builder, slope, _GROUP), _load(builder, state, 1), dry=True)
    _store(builder, state, s, 1)


@_memory_operation
def _product(builder: Any, out: Any, a: Any, b: Any) -> None:
    _store(builder, out, _multiply(builder, _load(builder, a), _load(builder, b)))


@_memory_operation
def _rotate(builder: Any, out: Any, a: Any, lanes: Any) -> None:
    """Lane i of out is lane i + lanes of a, around; lanes is 1, 2 or 4."""
    limbs = _load(builder, a)
    turned = []
    for limb in limbs:
        one, two, four = (_shuffle(builder, limb, limb, [(i + by) % LANES for i in range(LANES)]) for by in (1, 2, 4))
        is_one, is_two = (builder.icmp_signed("==", lanes, _I64(by)) for by in (1, 2))
        turned.append(builder.select(is_one, one, builder.select(is_two, two, four)))
    _store(builder, out, turned)


@_memory_operation
def _first_lane(builder: Any, words: Any, element: Any) -> None:
    """Write lane 0, canonical, as four words."""
    pointer = builder.inttoptr(words, _I64.as_pointer())
    for j, word in enumerate(_pack64(builder, _canonical(builder, _dry(builder, _load(builder, element))))):
        builder.store(builder.extract_element(word, _I32(0)), builder.gep(pointer, [_I64(j)]))


def _dry(builder: Any, wet: Lanes) -> Lanes:
    return [builder.and_(limb, _all(_LOW52)) for limb in wet]


@_memory_operation
def _in_all_lanes(builder: Any, out: Any, words: Any) -> None:
    """The element of four words, in every lane."""
    pointer = builder.inttoptr(words, _I64.as_pointer())
    lanes = [_uniform(builder, builder.load(builder.gep(pointer, [_I64(j)]))) for j in range(4)]
    _store(builder, out, _unpack64(builder, lanes))


@_memory_operation
def _call(builder: Any, function: Any, argument: Any) -> None:
    """Call a C function of one pointer."""
    pointer = _I64.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer])
    builder.call(builder.inttoptr(function, kind.as_pointer()), [builder.inttoptr(argument, pointer)])


@_memory_operation
def _one(builder: Any, out: Any) -> None:
    """The element 1 in every lane."""
    _store(builder, out, [_all(1), *[_all(0)] * 4])


@_memory_operation
def _clear(builder: Any, exceptions: Any) -> None:
    """No exceptions: two vectors, for the two blocks of a pair note theirs apart."""
    pointer = builder.inttoptr(exceptions, _VECTOR.as_pointer())
    for place in range(2):
        _aligned(builder.store(_all(0), builder.gep(pointer, [_I64(place)])))


@_memory_operation
def _copy(builder: Any, out: Any, state: Any) -> None:
    """One block."""
    for place in range(2):
        _store(builder, out, _load(builder, state, place), place)


@_memory_operation
def _move(builder: Any, out: Any, element: Any) -> None:
    _store(builder, out, _load(builder, element))


@_memory_operation
def _note_zero(builder: Any, exceptions: Any, words: Any) -> None:
    """Remember that four words are 0."""
    pointer = builder.inttoptr(words, _I64.as_pointer())
    together = _I64(0)
    for j in range(4):
        together = builder.or_(together, builder.load(builder.gep(pointer, [_I64(j)])))
    here = builder.icmp_unsigned("==", together, _I64(0))
    one = builder.insert_element(_all(0), builder.sext(here, _I64), _I32(0))
    _note(builder, exceptions, builder.icmp_unsigned("!=", one, _all(0)))


@_memory_operation
def _flag(builder: Any, flag: Any, exceptions: Any) -> None:
    """Set a byte to 1 if an exception was noted in any lane of either vector, or to 0."""
    pointer = builder.inttoptr(exceptions, _VECTOR.as_pointer())
    lanes = builder.or_(*(_aligned(builder.load(builder.gep(pointer, [_I64(place)]))) for place in range(2)))
    mask = builder.bitcast(builder.icmp_unsigned("!=", lanes, _all(0)), ir.IntType(8))
    any_lane = builder.zext(builder.icmp_unsigned("!=", mask, ir.IntType(8)(0)), ir.IntType(8))
    builder.store(any_lane, builder.inttoptr(flag, ir.IntType(8).as_pointer()))


@_memory_operation
def _begin_one(builder: Any, state: Any, row: Any) -> None:
    """state = one row in all lanes."""
    _begin_with(builder, state, [row] * LANES, None)


@_pair_operation
def _compare_giant(builder: Any, giant: Any, base: Any, offsets: Any, dx: Any, prefixes: Any, chain: Any) -> None:
    """Pass 1 of a giant step: x of eight points, less x of the giant step's state."""
    x = _unpack64(builder, _gather(builder, _at_offsets(builder, base, offsets), 0))
    _prefix(builder, _difference(builder, x, giant), dx, prefixes, chain)


@_memory_operation
def _giant_step(builder: Any, out: Any, inverse: Any, giant: Any, base: Any, offsets: Any, dx: Any) -> None:
    """Pass 2 of a giant step: the first two words of x of E - Q and of E + Q.

    Slopes (y_E +- y_Q) / (x_E - x_Q), x = slope**2 - x_E - x_Q. An x at or above p, one in 2**40, is left as it is, and
    its tag is not the table's: who relies on the answer must search such points again.
    """
    y = _unpack64(builder, _gather(builder, _at_offsets(builder, base, offsets), 32))
    n, q = _load(builder, giant), _load(builder, giant, 1)
    quotient, less = _load(builder, inverse), _load(builder, dx)
    pointer = builder.inttoptr(out, _VECTOR.as_pointer())

    def side(place: int, term: Lanes) -> None:
        numerator = _carry(builder, [builder.add(a, b) for a, b in zip(y, term, strict=True)])
        slope = _multiply(builder, numerator, quotient)
        x = _pack64(builder, _square(builder, slope, n, less, dry=True))
        for j in range(2):
            _aligned(builder.store(x[j], builder.gep(pointer, [_I64(2 * place + j)])))

    _alternate(builder, lambda: side(0, q), lambda: side(1, _from_k(builder, q)))


@_pair_operation
def _check(builder: Any, base: Any, offsets: Any, bad: Any) -> None:
    """Write one vector: all ones in the lanes whose rows are no canonical points, or infinity."""
    rows = _at_offsets(builder, base, offsets)
    words = [_gather(builder, rows, offset) for offset in (0, 32)]
    wrong = None
    for w in words:
        # p has ones in all words but the first.
        top = builder.and_(builder.and_(w[1], w[2]), w[3])
        excess = builder.and_(
            builder.icmp_unsigned("==", top, _all(-1)), builder.icmp_unsigned(">=", w[0], _all(2**64 - _C))
        )
        wrong = excess if wrong is None else builder.or_(wrong, excess)
    x, y = (_unpack64(builder, w) for w in words)
    cube = _multiply(builder, _square(builder, x), x, [_all(7), *[_all(0)] * 4], dry=True)
    difference = _square(builder, y, _four_p(), cube, dry=True)
    wrong = builder.or_(wrong, builder.not_(_is_multiple_of_p(builder, difference)))
    lanes = builder.select(wrong, _all(-1), _all(0))
    _aligned(builder.store(lanes, builder.inttoptr(bad, _VECTOR.as_pointer())))


@_memory_operation
def _confirm(
    builder: Any, bad: Any, base: Any, order: Any, table: Any, first: Any, second: Any, signs: Any, other_signs: Any
) -> None:
    """Write one vector: zero in the lanes where the point E is the sum of two named rows A and B that differ in x.

    The formulas of a chord without their division, for D = x_B - x_A and N = y_B - y_A:

        (x_E + x_A + x_B) D**2 = N**2        (y_E + y_A) D = N (x_A - x_E)

    Rows have signs a and b, u = a b. With n = y_B - u y_A = b N, of the rows' own y, the second times b is
    (b y_E + u y_A) D + n (x_E - x_A) = 0. All factors are below 8 p < 2**259 and at most 2**51 in limb 4; n, which is
    squared, is below 5 p + 2**256.
    """
    rows = [_at_offsets(builder, base, order), *(_at_offsets(builder, table, at) for at in (first, second))]
    (xe, ye), (xa, ya), (xb, yb) = (
        [_unpack64(builder, _gather(builder, each, offset)) for offset in (0, 32)] for each in rows
    )
    a, b = (_references(builder, at) for at in (signs, other_signs))
    b_negative = builder.icmp_signed("<", b, _all(0))
    u_negative = builder.icmp_signed("<", builder.xor(a, b), _all(0))

    def plus(left: Lanes, right: Lanes) -> Lanes:
        return [builder.add(i, j) for i, j in zip(left, right, strict=True)]

    def signed(negative: Any, y: Lanes) -> Lanes:
        return [builder.select(negative, n, p) for n, p in zip(_from_k(builder, y), y, strict=True)]

    dx, across = (_carry(builder, plus(x, _from_k(builder, xa))) for x in (xb, xe))
    u_ya = signed(u_negative, ya)
    n = _carry(builder, plus(yb, signed(builder.not_(u_negative), ya)))
    rise = _carry(builder, plus(signed(b_negative, ye), u_ya))
    total = _carry(builder, plus(plus(xe, xa), xb))
    differences: list[Lanes] = []

    def abscissa() -> None:
        left = _multiply(builder, total, _square(builder, dx), dry=True)
        differences.append(_square(builder, n, _four_p(), left, dry=True))

    def ordinate() -> None:
        differences.append(_multiply(builder, across, n, _multiply(builder, rise, dx, dry=True), dry=True))

    _alternate(builder, abscissa, ordinate)
    holds = builder.and_(*(_is_multiple_of_p(builder, difference) for difference in differences))
    lanes = builder.select(holds, _all(0), _all(-1))
    _aligned(builder.store(lanes, builder.inttoptr(bad, _VECTOR.as_pointer())))


# --- kernels --------------------------------------------------------------------------------------------------------

# What is added to a block: named rows of a table, rows in order, another state, itself.
_NAMED, _IN_ORDER, _STATES, _SELF = range(4)

# Scratch after the states, in bytes. Odd multiples of a cache line between them: accesses at equal places modulo 4096
# would wait for one another.
_DX = 0
_PREFIXES = _DX + BATCH * ELEMENT + 64 * 11
_GROUP_ROOM = _PREFIXES + BATCH * ELEMENT + 64 * 23
_CHAIN_ROOM = _GROUP_ROOM + 2 * _GROUP * ELEMENT + 64 * 5
_EXCEPTIONS = _CHAIN_ROOM + (_CHAINS + 10) * ELEMENT + 64
_WORDS = _EXCEPTIONS + 2 * 64
_ORDER = _WORDS + 64  # offsets of rows in order: of a whole block, and of the last one
_OFFSETS = _ORDER + 64 * 3  # of the rows of this addition and of the next one, taking turns
_SCRATCH = _OFFSETS + 2 * BATCH * ROW + 64 * 13
_STATE_STEP = BATCH * BLOCK + 64 * 7  # from the blocks of one state to those of the next


def room_words(slots: int) -> int:
    """Length of the scratch array for so many states: 0.6 MiB for one, 0.25 MiB for each more.

    Kernels work in it by address. It comes from the caller, for numba frees an array after its last use by name.
    """
    return (slots * _STATE_STEP + _SCRATCH) // 8 + 8


@compiled
def _invert_chains(chains: int, words: int, invert: int) -> None:
    """Replace the products of four chains by their inverses, if none is 0: one inversion for all 32 lanes.

    a, b, c, d the chains, q = a b c d; the lanes are multiplied by turning q by 4, 2 and 1, and taken apart again.
    """
    room = chains + _CHAINS * ELEMENT
    ab, cd, q, q4, pairs, pairs2, fours, fours1, whole, back = [room + i * ELEMENT for i in range(10)]
    _product(ab, chains, chains + ELEMENT)
    _product(cd, chains + 2 * ELEMENT, chains + 3 * ELEMENT)
    _product(q, ab, cd)
    _rotate(q4, q, 4)
    _product(pairs, q, q4)
    _rotate(pairs2, pairs, 2)
    _product(fours, pairs, pairs2)
    _rotate(fours1, fours, 1)
    _product(whole, fours, fours1)
    _first_lane(words, whole)
    _call(invert, words)
    _in_all_lanes(back, words)
    _product(back, back, fours1)
    _product(back, back, pairs2)
    _product(back, back, q4)
    _product(ab, back, ab)  # 1 / (c d)
    _product(cd, back, cd)  # 1 / (a b)
    _product(whole, cd, chains + ELEMENT)
    _product(chains + ELEMENT, cd, chains)
    _product(cd, ab, chains + 3 * ELEMENT)
    _product(chains + 3 * ELEMENT, ab, chains + 2 * ELEMENT)
    _move(chains, whole)
    _move(chains + 2 * ELEMENT, cd)


@compiled
def _chain(chains: int, b: int) -> int:
    """The chain of a block."""
    return chains + b % _CHAINS * ELEMENT


@compiled
def _order_of(scratch: int, b: int, blocks: int) -> int:
    """The offsets of a block's rows in order."""
    return scratch + _ORDER + (ROW if b == blocks - 1 else 0)


@compiled
def _fetch_ahead(kind: int, source: int, there: int, following: int, scratch: int, b: int, c: int, lane: int) -> None:
    """Ask for one row of the next addition of named rows, or of rows in order, for both blocks of a pair: see `_add`."""
    if kind == _NAMED:
        _fetch(source, there + ROW * b, lane)
        if c != b:
            _fetch(source, there + ROW * c, lane)
    elif kind == _IN_ORDER:
        _fetch(following + 8 * ROW * b, scratch + _ORDER, lane)
        if c != b:
            _fetch(following + 8 * ROW * c, scratch + _ORDER, lane)


@compiled
def _add(
    kind: int,
    states: int,
    source: int,
    references: int,
    following: int,
    offsets: int,
    blocks: int,
    negative: int,
    scratch: int,
    invert: int,
) -> None:
    """One addition to every block of a batch, both passes.

    source: a base, or the other states. following, offsets: references of the next addition of named rows, and where the
    offsets of this one are; those of the next are written to the other half of the room. following, of rows in order: the
    first row of the next addition. Rows of the next addition are fetched while this one is computed.
    """
    dx, prefixes, group = scratch + _DX, scratch + _PREFIXES, scratch + _GROUP_ROOM
    chains, exceptions = scratch + _CHAIN_ROOM, scratch + _EXCEPTIONS
    here, there = offsets, 2 * (scratch + _OFFSETS) + BATCH * ROW - offsets
    for c in range(_CHAINS):
        _one(chains + c * ELEMENT)
    for b in range(0, blocks, 2):
        c = min(b + 1, blocks - 1)  # a block that is left over is its own partner
        state, dx1, prefix1, chain1 = states + b * BLOCK, dx + b * ELEMENT, prefixes + b * ELEMENT, _chain(chains, b)
        other, dx2, prefix2, chain2 = states + c * BLOCK, dx + c * ELEMENT, prefixes + c * ELEMENT, _chain(chains, c)
        if kind == _NAMED:
            _fetch_rows(source, here + ROW * min(b + _NEAR, blocks - 1))
            _fetch_rows(source, here + ROW * min(b + _NEAR + 1, blocks - 1))
            _compare_rows(
                state, source, here + ROW * b, dx1, prefix1, chain1, exceptions,
                other, source, here + ROW * c, dx2, prefix2, chain2, exceptions + 64,
            )  # fmt: skip
            _name(there + ROW * b, following + 32 * b, exceptions)
            _name(there + ROW * c, following + 32 * c, exceptions)
        elif kind == _IN_ORDER:
            _compare_rows(
                state, source + 8 * ROW * b, _order_of(scratch, b, blocks), dx1, prefix1, chain1, exceptions,
                other, source + 8 * ROW * c, _order_of(scratch, c, blocks), dx2, prefix2, chain2, exceptions + 64,
            )  # fmt: skip
        elif kind == _STATES:
            _compare_states(
                state, source + b * BLOCK, dx1, prefix1, chain1, other, source + c * BLOCK, dx2, prefix2, chain2
            )
        else:
            _compare_self(state, dx1, prefix1, chain1, other, dx2, prefix2, chain2)
        # A few rows of the next addition in each stage: only some can be on their way at once.
        _fetch_ahead(kind, source, there, following, scratch, b, c, 0)
        _fetch_ahead(kind, source, there, following, scratch, b, c, 1)
    _invert_chains(chains, scratch + _WORDS, invert)
    _note_zero(exceptions, scratch + _WORDS)
    first = (blocks - 1) // _GROUP * _GROUP
    while first >= 0:
        last = min(first + _GROUP, blocks) - 1
        for b in range(last, first - 1, -1):
            at = b * ELEMENT
            _divide(group + (b - first) * ELEMENT, dx + at, prefixes + at, _chain(chains, b))
            _fetch_ahead(kind, source, there, following, scratch, b, b, 2)
            if kind == _NAMED:
                _fetch_rows(source, here + ROW * b)
        for b in range(first, last + 1, 2):
            c = min(b + 1, last)
            slope1, state = group + (b - first) * ELEMENT, states + b * BLOCK
            slope2, other = group + (c - first) * ELEMENT, states + c * BLOCK
            if kind == _NAMED:
                _slope_named(
                    slope1, state, source, here + ROW * b, references + 32 * b, negative,
                    slope2, other, source, here + ROW * c, references + 32 * c, negative,
                )  # fmt: skip
            elif kind == _IN_ORDER:
                _slope_rows(
                    slope1, state, source + 8 * ROW * b, _order_of(scratch, b, blocks), negative,
                    slope2, other, source + 8 * ROW * c, _order_of(scratch, c, blocks), negative,
                )  # fmt: skip
            elif kind == _STATES:
                _slope_states(slope1, state, source + b * BLOCK, negative, slope2, other, source + c * BLOCK, negative)
            else:
                _slope_self(slope1, state, slope2, other)
            _fetch_ahead(kind, source, there, following, scratch, b, c, 3)
            _fetch_ahead(kind, source, there, following, scratch, b, c, 4)
        for b in range(first, last + 1, 2):
            c = min(b + 1, last)
            slope1, state = group + (b - first) * ELEMENT, states + b * BLOCK
            slope2, other = group + (c - first) * ELEMENT, states + c * BLOCK
            if kind == _SELF:
                _abscissa_self(slope1, state, slope2, other)
            else:
                _abscissa_chord(slope1, state, dx + b * ELEMENT, slope2, other, dx + c * ELEMENT)
            _fetch_ahead(kind, source, there, following, scratch, b, c, 5)
            _fetch_ahead(kind, source, there, following, scratch, b, c, 6)
        for b in range(first, last + 1, 2):
            c = min(b + 1, last)
            _ordinate(
                group + (b - first) * ELEMENT, states + b * BLOCK, group + (c - first) * ELEMENT, states + c * BLOCK
            )
            _fetch_ahead(kind, source, there, following, scratch, b, c, 7)
        first -= _GROUP


_in_words = types.Array(types.uint64, 2, "C", readonly=True)
_out_words = types.Array(types.uint64, 2, "C")
_in_longs = types.Array(types.int64, 1, "C", readonly=True)
_in_program = types.Array(types.int64, 2, "C", readonly=True)
_out_longs = types.Array(types.int64, 1, "C")
_room = _out_slots = types.Array(types.uint64, 1, "C")
_in_slots = types.Array(types.uint64, 1, "C", readonly=True)
_in_references = types.Array(types.int32, 2, "C", readonly=True)
_out_bytes = types.Array(types.uint8, 1, "C")


@kernel(types.void(_out_words, _in_words, _in_references, types.boolean, _out_bytes, _room, types.int64))
def add_rows(
    points: Words,
    table: Words,
    references: npt.NDArray[np.int32],
    fresh: bool,
    failed: npt.NDArray[np.uint8],
    room: npt.NDArray[np.uint64],
    invert: int,
) -> None:
    """points[i] += sum over w of the row references[w, i] of the table; fresh: points are infinity, whatever they hold.

    points (m, 8), table (rows, 8), references (w, columns), where m <= columns, a multiple of eight, and the columns
    behind m name rows, too. failed: one byte for each batch of 8 BATCH points; where it becomes 1, an addition was
    exceptional and the points of the batch are as they were. room: scratch of `room_words(1)`, reused from call to call.
    invert: address of `field.invert_at`.
    """
    states = (room.ctypes.data + 63) & ~63
    scratch = states + _STATE_STEP
    base, row_bytes = table.ctypes.data - ROW, references.shape[1] * 4
    second = row_bytes * min(1, len(references) - 1)
    for batch in range(len(failed)):
        first = batch * BATCH * LANES
        count = min(len(points) - first, BATCH * LANES)
        blocks = (count + LANES - 1) // LANES
        at, names = points.ctypes.data + first * ROW, references.ctypes.data + 4 * first
        _clear(scratch + _EXCEPTIONS)
        _order(scratch + _ORDER, 7)
        _order(scratch + _ORDER + ROW, count - 1 - 8 * (blocks - 1))
        offsets = scratch + _OFFSETS
        for b in range(blocks):
            _name(offsets + ROW * b, names + 32 * b, scratch + _EXCEPTIONS)
            if fresh:
                _begin_named(
                    states + b * BLOCK, base, offsets + ROW * b, names + 32 * b, scratch + _EXCEPTIONS
                )  # fmt: skip
                _name(offsets + ROW * b, names + second + 32 * b, scratch + _EXCEPTIONS)
                for lane in range(LANES):
                    _fetch(base, offsets + ROW * b, lane)
            else:
                order = scratch + _ORDER + (ROW if b == blocks - 1 else 0)
                _begin(states + b * BLOCK, at + 8 * ROW * b, order, scratch + _EXCEPTIONS)
        done = 1 if fresh else 0
        for step in range(done, len(references)):
            odd = (step - done) & 1
            following = names + row_bytes * (step + 1)
            if step + 1 == len(references):  # the first rows of the next batch, if there is one as long
                following = names + 4 * count if first + 2 * count <= len(points) else names
            _add(
                _NAMED, states, base, names + row_bytes * step, following, offsets + odd * BATCH * ROW, blocks, odd,
                scratch, invert,
            )  # fmt: skip
        _flag(failed.ctypes.data + batch, scratch + _EXCEPTIONS)
        if failed[batch] == 0:
            for b in range(blocks):
                end = min(7, count - 1 - 8 * b)
                _finish(at + 8 * ROW * b, end, states + b * BLOCK, (len(references) - done) & 1)


# Steps of a program, see `backend.combine`.
_BEGIN, _ADD_ARRAY, _ADD_SLOT, _DOUBLE, _COPY = range(5)


@kernel(types.void(_out_words, _in_longs, _in_program, types.int64, types.int64, _out_bytes, _room, types.int64))
def combine(
    points: Words,
    arrays: npt.NDArray[np.int64],
    program: npt.NDArray[np.int64],
    slots: int,
    batch_blocks: int,
    failed: npt.NDArray[np.uint8],
    room: npt.NDArray[np.uint64],
    invert: int,
) -> None:
    """Run a program of additions on arrays of points, all (m, 8), given by their addresses: see `backend.combine`.

    batch_blocks: at most BATCH; failed has one byte for each batch of 8 batch_blocks points, as in `add_rows`. room:
    scratch of `room_words(slots)`.
    """
    states = (room.ctypes.data + 63) & ~63
    scratch = states + slots * _STATE_STEP
    turned = np.zeros(slots, np.int64)  # 1 where S is -y
    for batch in range(len(failed)):
        first = batch * batch_blocks * LANES
        count = min(len(points) - first, batch_blocks * LANES)
        blocks = (count + LANES - 1) // LANES
        _clear(scratch + _EXCEPTIONS)
        _order(scratch + _ORDER, 7)
        _order(scratch + _ORDER + ROW, count - 1 - 8 * (blocks - 1))
        turned[:] = 0
        for step in range(len(program)):
            kind, slot, other = program[step, 0], program[step, 1], program[step, 2]
            state = states + slot * _STATE_STEP
            if kind == _BEGIN:
                at = arrays[other] + first * ROW
                for b in range(blocks):
                    order = scratch + _ORDER + (ROW if b == blocks - 1 else 0)
                    _begin(state + b * BLOCK, at + 8 * ROW * b, order, scratch + _EXCEPTIONS)
            elif kind == _COPY:
                for b in range(blocks):
                    _copy(state + b * BLOCK, states + other * _STATE_STEP + b * BLOCK)
                turned[slot] = turned[other]
            else:
                how, source, negative = _SELF, state, 0
                if kind == _ADD_ARRAY:
                    how, source, negative = _IN_ORDER, int(arrays[other]) + first * ROW, int(turned[slot])
                elif kind == _ADD_SLOT:
                    how, source = _STATES, states + other * _STATE_STEP
                    negative = int(turned[slot] ^ turned[other])
                after = min(step + 1, len(program) - 1)
                following = source
                if program[after, 0] == _ADD_ARRAY:
                    following = int(arrays[program[after, 2]]) + first * ROW
                _add(how, state, source, 0, following, 0, blocks, negative, scratch, invert)
                turned[slot] ^= 1
        _flag(failed.ctypes.data + batch, scratch + _EXCEPTIONS)
        if failed[batch] == 0:
            at = points.ctypes.data + first * ROW
            for b in range(blocks):
                _finish(at + 8 * ROW * b, min(7, count - 1 - 8 * b), states + b * BLOCK, turned[0])


@kernel(types.int64(_in_words))
def first_invalid(points: Words) -> int:
    """Index of the first row that is not a canonical affine point (infinity included), or -1."""
    room = np.empty(4 * LANES, np.uint64)  # what is wrong with sixteen rows, and the offsets of eight and eight of them
    bad, base = room.ctypes.data, points.ctypes.data
    order, order2 = bad + 2 * ROW, bad + 3 * ROW
    for first in range(0, len(points), 2 * LANES):
        _order(order, min(7, len(points) - 1 - first))
        second = min(first + LANES, len(points) - 1)  # with eight rows or fewer, the last one again
        _order(order2, min(7, len(points) - 1 - second))
        _check(base + ROW * first, order, bad, base + ROW * second, order2, bad + ROW)
        for row in range(min(2 * LANES, len(points) - first)):
            if room[row] != 0:
                return first + row
    return -1


@kernel(types.void(_in_words, _in_words, _in_references, _out_bytes))
def sums_hold(points: Words, table: Words, references: npt.NDArray[np.int32], holds: npt.NDArray[np.uint8]) -> None:
    """holds[i] = 1 where points[i] is the sum of the rows references[0, i] and references[1, i], else 0.

    points (m, 8), on the curve or not; references (2, columns) as in `add_rows`, none of them 0. The two rows of a point
    differ in x.
    """
    ring = 2 * _NEAR  # offsets of the rows of some blocks ahead: first rows, then second ones
    room = np.empty((2 * ring + 5) * LANES, np.uint64)
    bad = (room.ctypes.data + 63) & ~63
    order, exceptions, offsets = bad + ROW, bad + 2 * ROW, bad + 4 * ROW
    skip = (bad - room.ctypes.data) // 8
    base, signs, other = table.ctypes.data - ROW, references.ctypes.data, references.shape[1] * 4
    blocks = (len(points) + LANES - 1) // LANES
    for step in range(blocks + _NEAR):
        if step < blocks:
            at = offsets + 2 * ROW * (step % ring)
            _name(at, signs + 32 * step, exceptions)
            _name(at + ROW, signs + other + 32 * step, exceptions)
            _fetch_rows(base, at)
            _fetch_rows(base, at + ROW)
        b = step - _NEAR
        if b >= 0:
            at = offsets + 2 * ROW * (b % ring)
            first = b * LANES
            _order(order, min(7, len(points) - 1 - first))
            _confirm(
                bad, points.ctypes.data + ROW * first, order, base, at, at + ROW, signs + 32 * b, signs + other + 32 * b
            )
            for lane in range(min(LANES, len(points) - first)):
                holds[first + lane] = room[skip + lane] == 0


@operation
def _bucket(typingctx: Any, bucket: Any, tag: Any) -> Any:
    """One bit for each of the eight entries at an address that has the tag, and in the next byte for each that is free."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        entries = _aligned(builder.load(builder.inttoptr(arguments[0], _VECTOR.as_pointer())))
        difference = builder.xor(entries, _uniform(builder, arguments[1]))
        matches = builder.icmp_unsigned("<=", difference, _all(int(STEP_MASK)))
        free = builder.icmp_unsigned("==", entries, _all(0))
        bits = [builder.zext(builder.bitcast(lanes, ir.IntType(8)), _I64) for lanes in (matches, free)]
        return builder.or_(bits[0], builder.shl(bits[1], _I64(8)))

    return types.int64(types.int64, types.uint64), generate


@compiled
def _find(slots: npt.NDArray[np.uint64], low: np.uint64, high: np.uint64) -> np.uint64:
    """The step of the first entry with the tag, or 0: see `field.insert_tags`. Eight entries at a time."""
    mask, tag = np.uint64(len(slots) - 1), high << STEP_BITS
    slot = (low << BUCKET_BITS) & mask
    while True:
        bits = _bucket(slots.ctypes.data + np.int64(slot) * 8, tag)
        if bits & 255:
            return slots[slot + np.uint64(count_zeros(np.uint64(bits)))] & STEP_MASK
        if bits:  # a free entry ends the chain
            return np.uint64(0)
        slot = (slot + np.uint64(LANES)) & mask


@compiled
def _fetch_buckets(slots: int, mask: np.uint64, tags: npt.NDArray[np.uint64], v: int, side: int, blocks: int) -> None:
    """Ask for the buckets of one side of a block, where there is one: only some can be on their way at once."""
    if v < blocks:
        for lane in range(LANES):
            _fetch_line(slots + 8 * np.int64((tags[32 * v + 16 * side + lane] << BUCKET_BITS) & mask))


@kernel(
    types.void(
        _in_slots,
        _in_words,
        types.int64,
        _in_words,
        _out_longs,
        _out_longs,
        _out_bytes,
        _out_slots,
        _out_longs,
        _room,
        types.int64,
    )
)
def search(
    slots: npt.NDArray[np.uint64],
    giants: Words,
    stride: int,
    points: Words,
    logs: npt.NDArray[np.int64],
    others: npt.NDArray[np.int64],
    found: npt.NDArray[np.uint8],
    tags: npt.NDArray[np.uint64],
    offsets: npt.NDArray[np.int64],
    room: npt.NDArray[np.uint64],
    invert: int,
) -> None:
    """As `field.search`, but only the first match of each point, and y is not computed: m is logs[i] or others[i].

    Where found[i] is 0 there may still be a match that was missed (see `_giant_step`, and a zero product).
    room: scratch of `room_words(1)`; tags (BATCH * 32,) and offsets (BATCH * 8,): more of it.
    """
    steps = (room.ctypes.data + 63) & ~63  # in the place of states: giant steps, one block each
    scratch = steps + _STATE_STEP
    dx, prefixes, group = scratch + _DX, scratch + _PREFIXES, scratch + _GROUP_ROOM
    chains, exceptions = scratch + _CHAIN_ROOM, scratch + _EXCEPTIONS
    flag = np.zeros(1, np.uint8)
    pending = np.empty(BATCH * LANES, np.int64)
    mask, base = np.uint64(len(slots) - 1), points.ctypes.data
    slot_base = slots.ctypes.data
    position = 0
    while position < len(points):
        count = 0
        while count < BATCH * LANES and position < len(points):
            if position + _AHEAD < len(points):
                _fetch_line(slot_base + 8 * np.int64((points[position + _AHEAD, 0] << BUCKET_BITS) & mask))
            step = _find(slots, points[position, 0], points[position, 1])
            if step != np.uint64(0):
                j = np.int64(step >> np.uint64(1))
                flip = np.int64((step ^ points[position, 4]) & np.uint64(1))
                logs[position] = (j ^ -flip) + 2 * flip  # j, or ~j + 2 = 1 - j
                others[position] = logs[position]
                found[position] = 1
            else:
                found[position] = 0
                pending[count] = position
                count += 1
            position += 1

        first = 0
        while count > 0 and first < len(giants):
            blocks = (count + LANES - 1) // LANES
            # Few points left: they take several giant steps at a time, so that the inversion stays shared by many.
            span = min(len(giants) - first, BATCH // blocks)
            for i in range(blocks * LANES):
                offsets[i] = pending[min(i, count - 1)] * ROW
            for s in range(span):
                _begin_one(steps + s * BLOCK, giants.ctypes.data + (first + s) * ROW)
            for c in range(_CHAINS):
                _one(chains + c * ELEMENT)
            for v in range(0, span * blocks, 2):
                w = min(v + 1, span * blocks - 1)
                _compare_giant(
                    steps + v // blocks * BLOCK, base, offsets.ctypes.data + ROW * (v % blocks),
                    dx + v * ELEMENT, prefixes + v * ELEMENT, _chain(chains, v),
                    steps + w // blocks * BLOCK, base, offsets.ctypes.data + ROW * (w % blocks),
                    dx + w * ELEMENT, prefixes + w * ELEMENT, _chain(chains, w),
                )  # fmt: skip
            _invert_chains(chains, scratch + _WORDS, invert)
            _clear(exceptions)
            _note_zero(exceptions, scratch + _WORDS)
            _flag(flag.ctypes.data, exceptions)
            if flag[0] != 0:
                break
            begin = (span * blocks - 1) // _GROUP * _GROUP
            while begin >= 0:
                last = min(begin + _GROUP, span * blocks) - 1
                for v in range(last, begin - 1, -1):
                    at = v * ELEMENT
                    _divide(group + (v - begin) * ELEMENT, dx + at, prefixes + at, _chain(chains, v))
                    _fetch_buckets(slot_base, mask, tags, v + _GROUP, 1, span * blocks)  # of the group before
                for v in range(begin, last + 1):
                    giant, names = steps + (v // blocks) * BLOCK, offsets.ctypes.data + ROW * (v % blocks)
                    _giant_step(
                        tags.ctypes.data + 256 * v, group + (v - begin) * ELEMENT, giant, base, names, dx + v * ELEMENT
                    )
                    _fetch_buckets(slot_base, mask, tags, v, 0, span * blocks)
                begin -= _GROUP
            for v in range(min(_GROUP, span * blocks)):
                _fetch_buckets(slot_base, mask, tags, v, 1, span * blocks)
            kept = 0
            for i in range(count):
                hit = False
                for s in range(span):
                    v, lane = s * blocks + i // LANES, i % LANES
                    for side in range(2):
                        at = 32 * v + 16 * side + lane
                        step = _find(slots, tags[at], tags[at + LANES])
                        if step != np.uint64(0):
                            j, giant = np.int64(step >> np.uint64(1)), (first + s + 1) * stride
                            giant = giant if side == 0 else -giant
                            logs[pending[i]], others[pending[i]], found[pending[i]] = giant + j, giant + 1 - j, 1
                            hit = True
                            break
                    if hit:
                        break
                if not hit:
                    pending[kept] = pending[i]
                    kept += 1
            count = kept
            first += span


# --- pairs of points on the wire --------------------------------------------------------------------------------------

_PAIR = 96  # bytes of a pair: x1, x2, y1 + y2
_CURVE_ROOM, _QUOTIENT_ROOM = 0, _GROUP * ELEMENT  # what the stages of `decode_pairs` leave to the next, of each block


@_memory_operation
def _order_pairs(builder: Any, offsets: Any, last: Any) -> None:
    """Write the offsets of eight pairs that follow one another; behind pair `last`, of that one again."""
    places = ir.Constant(_VECTOR, list(range(LANES)))
    uniform = _uniform(builder, last)
    clamped = builder.select(builder.icmp_signed("<", places, uniform), places, uniform)
    _aligned(builder.store(builder.mul(clamped, _all(_PAIR)), builder.inttoptr(offsets, _VECTOR.as_pointer())))


def _unreduced(builder: Any, words: Lanes) -> Any:
    """Where four words are p or more: p has ones in all words but the first."""
    top = builder.and_(builder.and_(words[1], words[2]), words[3])
    return builder.and_(
        builder.icmp_unsigned("==", top, _all(-1)), builder.icmp_unsigned(">=", words[0], _all(2**64 - _C))
    )


@_memory_operation
def _compare_pairs(builder: Any, base: Any, offsets: Any, dx: Any, prefixes: Any, chain: Any, exceptions: Any) -> None:
    """Pass 1 of eight pairs: 2 (y1 + y2) in the place of dx. A sum that is not canonical, or 0, is noted."""
    words = _gather(builder, _at_offsets(builder, base, offsets), 64)
    together = builder.or_(builder.or_(words[0], words[1]), builder.or_(words[2], words[3]))
    zero = builder.icmp_unsigned("==", together, _all(0))
    _note(builder, exceptions, builder.or_(zero, _unreduced(builder, words)))
    total = _unpack64(builder, words)
    _prefix(builder, _carry(builder, [builder.add(a, a) for a in total], dry=True), dx, prefixes, chain)


@_memory_operation
def _cube_pairs(builder: Any, room: Any, base: Any, offsets: Any, exceptions: Any) -> None:
    """Pass 2: c1 = x1**3 + 7 and c1 - c2, wet, to the room. An x that is not canonical is noted."""
    rows, cubes = _at_offsets(builder, base, offsets), []
    words = [_gather(builder, rows, offset) for offset in (0, 32)]
    _note(builder, exceptions, builder.or_(*(_unreduced(builder, four) for four in words)))
    xs = [_unpack64(builder, four) for four in words]
    squares = [_square(builder, x) for x in xs]
    for x, square in zip(xs, squares, strict=True):
        cubes.append(_multiply(builder, square, x, [_all(7), *[_all(0)] * 4], dry=True))
    difference = [builder.add(a, b) for a, b in zip(cubes[0], _from_k(builder, cubes[1]), strict=True)]
    _store(builder, builder.add(room, _I64(_CURVE_ROOM)), cubes[0])
    _store(builder, builder.add(room, _I64(_QUOTIENT_ROOM)), _carry(builder, difference))


@_memory_operation
def _part_pairs(builder: Any, points: Any, last: Any, room: Any, inverse: Any, base: Any, offsets: Any) -> None:
    """Pass 2: y1 and y2, the halves of (y1 + y2) +- (y1 - y2); both points to eight pairs of rows, y1 to the room."""
    place = builder.add(room, _I64(_QUOTIENT_ROOM))
    q = _multiply(builder, _load(builder, place), _load(builder, inverse), dry=True)  # (y1 - y2) / 2
    rows = _at_offsets(builder, base, offsets)
    half = _halved(builder, _unpack64(builder, _gather(builder, rows, 64)))
    ys = [
        _canonical(builder, [builder.add(a, b) for a, b in zip(half, term, strict=True)])
        for term in (q, _from_k(builder, q))
    ]
    _store(builder, place, ys[0])
    for side, y in enumerate(ys):
        out = [builder.add(points, _I64(2 * ROW * lane + ROW * side)) for lane in range(LANES)]
        _scatter(builder, out, last, _gather(builder, rows, 32 * side) + _pack64(builder, y))


def _halved(builder: Any, element: Lanes) -> Lanes:
    """Half of a canonical element mod p: limbs below 2**52 + 2**51. An odd one takes p, which is odd, along."""
    odd = builder.sub(_all(0), builder.and_(element[0], _all(1)))
    even = [
        builder.add(limb, builder.and_(odd, _all(P >> 52 * j & (_LOW52 if j < 4 else _LOW48))))
        for j, limb in enumerate(element)
    ]
    lower = [builder.lshr(limb, _all(1)) for limb in even]
    for j in range(4):
        lower[j] = builder.add(lower[j], builder.shl(builder.and_(even[j + 1], _all(1)), _all(51)))
    return lower


@_memory_operation
def _check_pairs(builder: Any, room: Any, exceptions: Any) -> None:
    """Pass 2: y1**2 that is not c1 is noted."""
    y, cube = (_load(builder, builder.add(room, _I64(place))) for place in (_QUOTIENT_ROOM, _CURVE_ROOM))
    square = _square(builder, y, dry=True)
    difference = [builder.add(a, b) for a, b in zip(_from_k(builder, cube), square, strict=True)]
    together = _all(0)
    for limb in _canonical(builder, difference):
        together = builder.or_(together, limb)
    _note(builder, exceptions, builder.icmp_unsigned("!=", together, _all(0)))


@kernel(types.void(_in_words, _out_words, _out_bytes, _room, types.int64))
def decode_pairs(
    pairs: Words, points: Words, failed: npt.NDArray[np.uint8], room: npt.NDArray[np.uint64], invert: int
) -> None:
    """Write points (2 m, 8) of pairs (m, 12), as `field.decode_pairs`.

    failed: one byte for each batch of 8 BATCH pairs; where it becomes 1, one of them is not common, or wrong, and what is
    written of the batch counts for nothing. room, invert: as in `add_rows`.
    """
    states = (room.ctypes.data + 63) & ~63  # what the stages leave, and inverses
    scratch, inverses = states + _STATE_STEP, states + 2 * _GROUP * ELEMENT
    dx, prefixes, chains = scratch + _DX, scratch + _PREFIXES, scratch + _CHAIN_ROOM
    exceptions = scratch + _EXCEPTIONS
    for batch in range(len(failed)):
        first = batch * BATCH * LANES
        count = min(len(pairs) - first, BATCH * LANES)
        blocks = (count + LANES - 1) // LANES
        base, out = pairs.ctypes.data + first * _PAIR, points.ctypes.data + 2 * first * ROW
        _clear(exceptions)
        _order_pairs(scratch + _ORDER, 7)
        _order_pairs(scratch + _ORDER + ROW, count - 1 - 8 * (blocks - 1))
        for c in range(_CHAINS):
            _one(chains + c * ELEMENT)
        for b in range(blocks):
            order, at = scratch + _ORDER + (ROW if b == blocks - 1 else 0), b * ELEMENT
            chain = chains + (b % _CHAINS) * ELEMENT
            _compare_pairs(base + 8 * _PAIR * b, order, dx + at, prefixes + at, chain, exceptions)
        _invert_chains(chains, scratch + _WORDS, invert)
        end = blocks
        while end > 0:
            begin = max(0, end - _GROUP)
            for b in range(end - 1, begin - 1, -1):
                at, chain = b * ELEMENT, chains + (b % _CHAINS) * ELEMENT
                _divide(inverses + (b - begin) * ELEMENT, dx + at, prefixes + at, chain)
            for b in range(begin, end):
                order = scratch + _ORDER + (ROW if b == blocks - 1 else 0)
                _cube_pairs(states + (b - begin) * ELEMENT, base + 8 * _PAIR * b, order, exceptions)
            for b in range(begin, end):
                order, at = scratch + _ORDER + (ROW if b == blocks - 1 else 0), (b - begin) * ELEMENT
                last = min(7, count - 1 - 8 * b)
                _part_pairs(out + 16 * ROW * b, last, states + at, inverses + at, base + 8 * _PAIR * b, order)
            for b in range(begin, end):
                _check_pairs(states + (b - begin) * ELEMENT, exceptions)
            end = begin
        _flag(failed.ctypes.data + batch, exceptions)
