"""Arithmetic of secp256k1 on arrays: the portable backend, compiled with numba.

    symbol      meaning
    p, n        the field's prime 2**256 - 2**32 - 977, and the order of the group
    element     four uint64 limbs, little-endian; any representative below 2**256 (`normal` gives the canonical one)
    point       row of eight uint64: canonical x (4 limbs), canonical y (4 limbs); the all-zero row is infinity
    reference   int32 naming a signed row of a table: 0 nothing, +r row r - 1, -r the negative of row r - 1

The public kernels at the end of this file take and return arrays. For those on points, `add_rows`, `first_invalid`,
`search` and `decode_pairs`, `backend` asks `ifma` first where that runs, which gives the same bits; the exceptional
additions and pairs that it leaves are done here. Arguments are C-contiguous, inputs may be read-only; kernels trust their
arguments and release the GIL.

All compiled code is in this one file on purpose: numba's cache is keyed on the file of the kernel, so an intrinsic
edited in another file would leave the old machine code in use. Kernels index tables by secrets and branch on them:
they are not constant time.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

Words = npt.NDArray[np.uint64]
Element = tuple[np.uint64, np.uint64, np.uint64, np.uint64]
_F = TypeVar("_F", bound=Callable[..., Any])

P = 2**256 - 2**32 - 977
ORDER = 0xFFFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFE_BAAEDCE6_AF48A03B_BFD25E8C_D0364141

_FOLD = 2**256 - P  # 33 bits: 2**256 = _FOLD mod p
_ORDER_FOLD = 2**256 - ORDER  # 129 bits: 2**256 = _ORDER_FOLD mod n
_BATCH = 1024  # points that share one inversion; 64 KiB of tree stays in the second-level cache


def limbs(value: int) -> Element:
    """The four little-endian limbs of 0 <= value < 2**256."""
    a, b, c, d = (np.uint64(value >> shift & 2**64 - 1) for shift in (0, 64, 128, 192))
    return a, b, c, d


def compiled(function: _F) -> _F:
    """A function for kernels to call; it is compiled into them."""
    return cast(_F, njit(function))


def kernel(signature: Any) -> Callable[[_F], _F]:
    """A kernel on arrays, compiled when this module is first imported and cached on disk from then on."""
    return cast(Callable[[_F], _F], njit(signature, cache=True, nogil=True))


def operation(function: Callable[..., Any]) -> Any:
    """An operation that writes its own LLVM instructions."""
    return intrinsic(function)


_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_TWO = np.uint64(2)
_ALL_ONES = np.uint64(2**64 - 1)
STEP_BITS = np.uint64(30)  # of an entry of the table of baby steps
STEP_MASK = np.uint64(2**30 - 1)
BUCKET_BITS = np.uint64(3)  # eight entries, a cache line
_ZERO_ELEMENT = limbs(0)
_ONE_ELEMENT = limbs(1)
_SEVEN_ELEMENT = limbs(7)
_HALF_ELEMENT = limbs((P + 1) // 2)
_UNITY = limbs(pow(2, (P - 1) // 3, P))  # a cube root of 1, not 1: 2 is no cube mod p
_P_LIMBS = limbs(P)
_ORDER_LIMBS = limbs(ORDER)
_WINDOW, _WINDOWS = 16, 16  # of a scalar: bits, number
_TILE = 64  # scalars recoded together
_DIGIT = np.uint64(2**16 - 1)
_FULL, _HALF = 2**16, 2**15  # rows of window 0, which has all digits, and of the others, which have positive ones

# --- field elements: LLVM integers of 128 and 256 bits, which become mul / add / adc ---------------------------

_ELEMENT = types.UniTuple(types.uint64, 4)
_I1, _I64, _I128, _I256 = ir.IntType(1), ir.IntType(64), ir.IntType(128), ir.IntType(256)


def _unpack(builder: Any, element: Any) -> list[Any]:
    return [builder.extract_value(element, i) for i in range(4)]


def _join(builder: Any, words: list[Any]) -> Any:
    """One 256-bit integer from four limbs."""
    value = builder.zext(words[0], _I256)
    for i in range(1, 4):
        value = builder.or_(value, builder.shl(builder.zext(words[i], _I256), _I256(64 * i)))
    return value


def _element(builder: Any, value: Any) -> Any:
    """The element with the limbs of one 256-bit integer."""
    words = [builder.trunc(builder.lshr(value, _I256(64 * i)), _I64) for i in range(4)]
    return cgutils.pack_array(builder, words)


def _if(builder: Any, condition: Any, value: int) -> Any:
    return builder.select(condition, _I256(value), _I256(0))


def _product(builder: Any, a: list[Any], b: list[Any]) -> list[Any]:
    """The limbs of a * b, operand scanning.

    Each step a_i b_j + r + carry is at most (2**64 - 1)**2 + 2 (2**64 - 1) = 2**128 - 1.
    """
    result = [_I64(0)] * (len(a) + len(b))
    for i, a_i in enumerate(a):
        carry = _I128(0)
        for j, b_j in enumerate(b):
            step = builder.mul(builder.zext(a_i, _I128), builder.zext(b_j, _I128))
            step = builder.add(builder.add(step, builder.zext(result[i + j], _I128)), carry)
            result[i + j] = builder.trunc(step, _I64)
            carry = builder.lshr(step, _I128(64))
        result[i + len(b)] = builder.trunc(carry, _I64)
    return result


@operation
def mul(typingctx: Any, a: Any, b: Any) -> Any:
    """a * b mod p, below 2**256."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = _product(builder, _unpack(builder, arguments[0]), _unpack(builder, arguments[1]))
        # First fold: low + high * _FOLD < 2**256 + 2**289, so the carry out stays below 2**34.
        carry, low = _I128(0), []
        for i in range(4):
            step = builder.mul(builder.zext(wide[4 + i], _I128), _I128(_FOLD))
            step = builder.add(builder.add(step, builder.zext(wide[i], _I128)), carry)
            low.append(builder.trunc(step, _I64))
            carry = builder.lshr(step, _I128(64))
        # Second fold: carry * _FOLD < 2**67. If that overflows 2**256, what is left is below 2**67: no third carry.
        second = builder.zext(builder.mul(carry, _I128(_FOLD)), _I256)
        value = _join(builder, low)
        folded = builder.add(value, second)
        overflow = builder.icmp_unsigned("<", folded, second)
        folded = builder.add(folded, _if(builder, overflow, _FOLD))
        return _element(builder, folded)

    return _ELEMENT(_ELEMENT, _ELEMENT), generate


@operation
def add(typingctx: Any, a: Any, b: Any) -> Any:
    """a + b mod p, below 2**256."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, right = (_join(builder, _unpack(builder, argument)) for argument in arguments)
        total = builder.add(left, right)
        carry = builder.icmp_unsigned("<", total, left)
        once = builder.add(total, _if(builder, carry, _FOLD))
        # Both operands may be non-canonical: 2 (2**256 - 1) - 2**256 + _FOLD can pass 2**256 a second time.
        again = builder.and_(carry, builder.icmp_unsigned("<", once, _I256(_FOLD)))
        return _element(builder, builder.add(once, _if(builder, again, _FOLD)))

    return _ELEMENT(_ELEMENT, _ELEMENT), generate


@operation
def sub(typingctx: Any, a: Any, b: Any) -> Any:
    """a - b mod p, below 2**256; b must be canonical."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, right = (_join(builder, _unpack(builder, argument)) for argument in arguments)
        difference = builder.sub(left, right)
        borrow = builder.icmp_unsigned("<", left, right)
        # After a borrow a - b + 2**256 > 2**256 - p = _FOLD, because b < p: taking _FOLD off adds p, without a borrow.
        return _element(builder, builder.sub(difference, _if(builder, borrow, _FOLD)))

    return _ELEMENT(_ELEMENT, _ELEMENT), generate


@operation
def normal(typingctx: Any, a: Any) -> Any:
    """The canonical representative, below p. One subtraction is enough: 2**256 < 2 p."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = _join(builder, _unpack(builder, arguments[0]))
        excess = builder.icmp_unsigned(">=", value, _I256(P))
        return _element(builder, builder.sub(value, _if(builder, excess, P)))

    return _ELEMENT(_ELEMENT), generate


@operation
def negate_if(typingctx: Any, condition: Any, a: Any) -> Any:
    """-a mod p if the condition holds, without a branch: signs of references are random. a canonical, 0 stays 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = _join(builder, _unpack(builder, arguments[1]))
        flip = builder.and_(arguments[0], builder.icmp_unsigned("!=", value, _I256(0)))
        value = builder.select(flip, builder.sub(_I256(P), value), value)
        return _element(builder, value)

    return _ELEMENT(types.boolean, _ELEMENT), generate


@operation
def _prefetch(typingctx: Any, array: Any, row: Any) -> Any:
    """Ask for the cache line where a row of an array begins."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        table = context.make_array(signature.args[0])(context, builder, arguments[0])
        stride = cgutils.unpack_tuple(builder, table.strides)[0]
        place = builder.gep(
            builder.bitcast(table.data, ir.IntType(8).as_pointer()), [builder.mul(arguments[1], stride)]
        )
        pointer = builder.bitcast(place, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, ir.IntType(32), ir.IntType(32), ir.IntType(32)])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(prefetch, [pointer, *(ir.IntType(32)(flag) for flag in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@operation
def less(typingctx: Any, a: Any, b: Any) -> Any:
    """a < b as 256-bit integers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, right = (_join(builder, _unpack(builder, argument)) for argument in arguments)
        return builder.icmp_unsigned("<", left, right)

    return types.boolean(_ELEMENT, _ELEMENT), generate


@operation
def minus(typingctx: Any, a: Any, b: Any) -> Any:
    """a - b as 256-bit integers, for a >= b."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, right = (_join(builder, _unpack(builder, argument)) for argument in arguments)
        return _element(builder, builder.sub(left, right))

    return _ELEMENT(_ELEMENT, _ELEMENT), generate


@operation
def reduce_wide(typingctx: Any, low: Any, high: Any) -> Any:
    """(low + high * 2**256) mod n, canonical; high is one limb."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = _join(builder, _unpack(builder, arguments[0]))
        fold = [_I64(_ORDER_FOLD >> 64 * i & 2**64 - 1) for i in range(3)]
        # high * _ORDER_FOLD < 2**193. If adding it overflows, what is left is below 2**193: no second overflow.
        folded = _join(builder, _product(builder, [arguments[1]], fold))
        total = builder.add(value, folded)
        overflow = builder.icmp_unsigned("<", total, value)
        total = builder.add(total, _if(builder, overflow, _ORDER_FOLD))
        excess = builder.icmp_unsigned(">=", total, _I256(ORDER))  # 2**256 < 2 n
        return _element(builder, builder.sub(total, _if(builder, excess, ORDER)))

    return _ELEMENT(_ELEMENT, types.uint64), generate


@operation
def odd_digits(typingctx: Any, k: Any, negative: Any) -> Any:
    """(k + 2**256 - 1) / 2 mod n, or (-k + 2**256 - 1) / 2 mod n; k below n."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = _join(builder, _unpack(builder, arguments[0]))
        opposite = builder.sub(_I256(ORDER), value)
        is_zero = builder.icmp_unsigned("==", value, _I256(0))
        value = builder.select(builder.and_(arguments[1], builder.not_(is_zero)), opposite, value)
        value = builder.add(value, _I256(_ORDER_FOLD - 1))  # k + 2**256 - 1 - n < 2**256
        excess = builder.icmp_unsigned(">=", value, _I256(ORDER))
        value = builder.sub(value, _if(builder, excess, ORDER))
        # Halved: an odd number takes n, which is odd, along; (v + n) / 2 = v // 2 + n // 2 + 1.
        odd = builder.trunc(value, _I1)
        value = builder.lshr(value, _I256(1))
        return _element(builder, builder.add(value, _if(builder, odd, ORDER // 2 + 1)))

    return _ELEMENT(_ELEMENT, types.boolean), generate


@operation
def mul_add(typingctx: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """(low, high) limbs of a * b + c + d, which is at most 2**128 - 1."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide_a, wide_b, wide_c, wide_d = (builder.zext(argument, _I128) for argument in arguments)
        step = builder.add(builder.add(builder.mul(wide_a, wide_b), wide_c), wide_d)
        words = [builder.trunc(step, _I64), builder.trunc(builder.lshr(step, _I128(64)), _I64)]
        return cgutils.pack_array(builder, words)

    return types.UniTuple(types.uint64, 2)(*[types.uint64] * 4), generate


@compiled
def _is_zero(a: Element) -> bool:
    """For canonical elements only."""
    return (a[0] | a[1] | a[2] | a[3]) == _ZERO


@compiled
def _equal(a: Element, b: Element) -> bool:
    """For canonical elements only."""
    return ((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3])) == _ZERO


@compiled
def _load(array: Words, row: int, column: int) -> Element:
    i = np.uint64(row)  # unsigned: no test for indices from the end
    return array[i, column], array[i, column + 1], array[i, column + 2], array[i, column + 3]


@compiled
def _store(array: Words, row: int, column: int, a: Element) -> None:
    i = np.uint64(row)
    array[i, column] = a[0]
    array[i, column + 1] = a[1]
    array[i, column + 2] = a[2]
    array[i, column + 3] = a[3]


# --- inversion by divsteps (Bernstein and Yang 2019), numbers as five signed limbs of 62 bits ------------------------

_SIGNED = types.UniTuple(types.int64, 5)
_LOW62 = np.uint64(2**62 - 1)
_P_INVERSE62 = pow(P, -1, 2**62)


@operation
def count_zeros(typingctx: Any, a: Any) -> Any:
    """Trailing zero bits of a nonzero word."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], _I1(1))

    return types.int64(types.uint64), generate


def _transformed(builder: Any, a: list[Any], b: list[Any], x: Any, y: Any, correction: Any | None) -> list[Any]:
    """Limbs of (a x + b y + correction p) / 2**62, which is exact; |x| + |y| <= 2**62, |correction| < 2**62.

    A step sums three products below 2**62 * 2**62 and a carry below 2**64: below 2**126.
    """
    modulus = {0: -_FOLD, 4: 2**8}  # p = 2**8 * 2**248 - _FOLD
    carry, limbs = _I128(0), []
    for i in range(5):
        terms = [(a[i], x), (b[i], y)]
        if correction is not None and i in modulus:
            terms.append((_I64(modulus[i]), correction))
        for left, right in terms:
            carry = builder.add(carry, builder.mul(builder.sext(left, _I128), builder.sext(right, _I128)))
        if i:
            limbs.append(builder.and_(builder.trunc(carry, _I64), _I64(2**62 - 1)))
        carry = builder.ashr(carry, _I128(62))
    return [*limbs, builder.trunc(carry, _I64)]


@operation
def _transform(typingctx: Any, f: Any, g: Any, u: Any, v: Any) -> Any:
    """(f u + g v) / 2**62."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        f, g = ([builder.extract_value(argument, i) for i in range(5)] for argument in arguments[:2])
        return cgutils.pack_array(builder, _transformed(builder, f, g, arguments[2], arguments[3], None))

    return _SIGNED(_SIGNED, _SIGNED, types.int64, types.int64), generate


@operation
def _transform_mod_p(typingctx: Any, d: Any, e: Any, u: Any, v: Any) -> Any:
    """(d u + e v) / 2**62 mod p, in (-2 p, p) for d and e in (-2 p, p)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        d, e = ([builder.extract_value(argument, i) for i in range(5)] for argument in arguments[:2])
        u, v = arguments[2:]
        # p for each negative one first, then what makes the lowest 62 bits zero, taken from (-2**62, 0].
        start = _I64(0)
        for number, factor in ((d, u), (e, v)):
            start = builder.add(start, builder.and_(factor, builder.ashr(number[4], _I64(63))))
        low = builder.add(builder.mul(d[0], u), builder.mul(e[0], v))
        excess = builder.add(builder.mul(low, _I64(_P_INVERSE62)), start)
        correction = builder.sub(start, builder.and_(excess, _I64(2**62 - 1)))
        return cgutils.pack_array(builder, _transformed(builder, d, e, u, v, correction))

    return _SIGNED(_SIGNED, _SIGNED, types.int64, types.int64), generate


@operation
def _to_signed(typingctx: Any, a: Any) -> Any:
    """An element as five limbs of 62 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = _join(builder, _unpack(builder, arguments[0]))
        limbs = [builder.trunc(builder.lshr(value, _I256(62 * i)), _I64) for i in range(5)]
        return cgutils.pack_array(builder, [builder.and_(limb, _I64(2**62 - 1)) for limb in limbs])

    return _SIGNED(_ELEMENT), generate


@operation
def _from_signed(typingctx: Any, a: Any, negate: Any) -> Any:
    """A number in (-2 p, p), or its negative, mod p and canonical."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = ir.IntType(320)
        value = wide(0)
        for i in range(5):
            limb = builder.sext(builder.extract_value(arguments[0], i), wide)
            value = builder.add(value, builder.shl(limb, wide(62 * i)))
        value = builder.select(arguments[1], builder.sub(wide(0), value), value)  # in (-2 p, 2 p)
        for modulus in (2 * P, P):
            negative = builder.icmp_signed("<", value, wide(0))
            value = builder.add(value, builder.select(negative, wide(modulus), wide(0)))
            excess = builder.icmp_signed(">=", value, wide(P))
            value = builder.sub(value, builder.select(excess, wide(P), wide(0)))
        return _element(builder, builder.trunc(value, _I256))

    return _ELEMENT(_SIGNED, types.boolean), generate


@compiled
def inverse(a: Element) -> Element:
    """1 / a mod p, canonical, and 0 for 0. Variable time: about 9 rounds of 62 division steps.

    f and g begin as p and a, and become +-1 and 0; d a = f and e a = g mod p throughout. A round finds, from the low words
    of f and g alone, the matrix (u v, q r) / 2**62 that 62 steps amount to, then applies it to both pairs.
    """
    f, g = _to_signed(_P_LIMBS), _to_signed(normal(a))
    d, e = _to_signed(_ZERO_ELEMENT), _to_signed(_ONE_ELEMENT)
    eta = -1  # minus the delta of the paper
    while (g[0] | g[1] | g[2] | g[3] | g[4]) != 0:
        u, v, q, r = 1, 0, 0, 1
        low_f, low_g = (
            np.uint64(f[0]) | np.uint64(f[1]) << np.uint64(62),
            np.uint64(g[0]) | np.uint64(g[1]) << np.uint64(62),
        )
        left = 62
        while True:
            # Steps that only halve g; a bit above the last step ends the count.
            zeros = count_zeros(low_g | (_ALL_ONES << np.uint64(left)))
            low_g >>= np.uint64(zeros)
            u <<= zeros
            v <<= zeros
            eta -= zeros
            left -= zeros
            if left == 0:
                break
            if eta < 0:
                eta = -eta
                low_f, low_g = low_g, _ZERO - low_f
                u, q = q, -u
                v, r = r, -v
            # Add a multiple w of f to g that clears as many low bits as steps may follow without another swap, at most 4.
            bits = min(min(eta + 1, left), 4)
            mask = (_ONE << np.uint64(bits)) - _ONE
            w = low_f + (((low_f + _ONE) & np.uint64(4)) << _ONE)  # 1 / f mod 16
            w = ((_ZERO - w) * low_g) & mask
            low_g += low_f * w
            multiple = int(w)
            q += u * multiple
            r += v * multiple
        f, g = _transform(f, g, u, v), _transform(f, g, q, r)
        d, e = _transform_mod_p(d, e, u, v), _transform_mod_p(d, e, q, r)
    return _from_signed(d, f[4] < 0)


@cfunc(types.void(types.CPointer(types.uint64)), cache=True)
def invert_at(words: Any) -> None:
    """`inverse` as a C function, in place on four words: other backends call it by its address."""
    inverted = inverse((words[0], words[1], words[2], words[3]))
    for j in range(4):
        words[j] = inverted[j]


@compiled
def _invert_leaves(tree: Words, size: int) -> None:
    """Replace tree[size : 2 size], all nonzero, by their inverses: one inversion, 3 (size - 1) multiplications.

    Montgomery's trick as a heap: node i is the product of nodes 2i and 2i + 1. Within a level the multiplications do
    not wait for one another, which a running product would.
    """
    for i in range(size - 1, 0, -1):
        _store(tree, i, 0, mul(_load(tree, 2 * i, 0), _load(tree, 2 * i + 1, 0)))
    _store(tree, 1, 0, inverse(_load(tree, 1, 0)))
    for i in range(1, size):
        up = _load(tree, i, 0)
        left = _load(tree, 2 * i, 0)
        right = _load(tree, 2 * i + 1, 0)
        _store(tree, 2 * i, 0, mul(up, right))
        _store(tree, 2 * i + 1, 0, mul(up, left))


@compiled
def _row(table: Words, reference: int) -> tuple[Element, Element]:
    """The point named by a reference, (0, 0) for infinity."""
    if reference == 0:
        return _ZERO_ELEMENT, _ZERO_ELEMENT
    row = abs(reference) - 1
    return _load(table, row, 0), negate_if(reference < 0, _load(table, row, 4))


# What an addition amounts to; only _CHORD is common.
_CHORD, _TANGENT, _KEEP, _TAKE, _CANCEL = range(5)


@compiled
def _kind(x1: Element, y1: Element, x2: Element, y2: Element) -> int:
    # No point of the curve has y = 0 (the order is odd), so y tells infinity.
    if _is_zero(y2):
        return _KEEP
    if _is_zero(y1):
        return _TAKE
    if not _equal(x1, x2):
        return _CHORD
    return _TANGENT if _equal(y1, y2) else _CANCEL


# --- the kernels on arrays: the interface of a backend --------------------------------------------------------------

_in_words = types.Array(types.uint64, 2, "C", readonly=True)
_out_words = types.Array(types.uint64, 2, "C")
_in_longs = types.Array(types.int64, 1, "C", readonly=True)
_out_longs = types.Array(types.int64, 1, "C")
_out_bytes = types.Array(types.uint8, 1, "C")
_in_references = types.Array(types.int32, 2, "C", readonly=True)
_out_references = types.Array(types.int32, 2, "C")
_out_slots = types.Array(types.uint64, 1, "C")
_in_slots = types.Array(types.uint64, 1, "C", readonly=True)
_in_signs = types.Array(types.int8, 2, "C", readonly=True)


@kernel(types.void(_out_words, _in_words, _in_references))
def add_rows(points: Words, table: Words, references: npt.NDArray[np.int32]) -> None:
    """points[i] += sum over w of the row references[w, i] of the table. Correct for every input, infinity included.

    points (m, 8) in place, table (rows, 8), references (w, m). Affine addition, EFD: lambda = (y2 - y1) / (x2 - x1) or
    3 x1**2 / (2 y1), x3 = lambda**2 - x1 - x2, y3 = lambda (x1 - x3) - y1. A batch goes through all w additions before
    the next batch starts and shares one inversion for each: about 5 multiplications and a squaring an addition.
    """
    tree = np.empty((2 * _BATCH, 4), np.uint64)
    kinds = np.empty(_BATCH, np.uint8)
    for first in range(0, len(points), _BATCH):
        size = min(_BATCH, len(points) - first)
        for w in range(len(references)):
            divisions = 0
            for i in range(size):
                x1, y1 = _load(points, first + i, 0), _load(points, first + i, 4)
                x2, y2 = _row(table, references[w, first + i])
                kind = _kind(x1, y1, x2, y2)
                kinds[i] = kind
                if kind == _CHORD:
                    _store(tree, size + i, 0, sub(x2, x1))
                    divisions += 1
                elif kind == _TANGENT:
                    _store(tree, size + i, 0, add(y1, y1))
                    divisions += 1
                else:
                    _store(tree, size + i, 0, _ONE_ELEMENT)
            if divisions > 0:  # none when sums begin at infinity
                _invert_leaves(tree, size)
            for i in range(size):
                if w + 1 < len(references):  # the next row arrives while this one is computed
                    _prefetch(table, max(0, abs(references[w + 1, first + i]) - 1))
                kind = kinds[i]
                if kind == _KEEP:
                    continue
                if kind == _CANCEL:
                    _store(points, first + i, 0, _ZERO_ELEMENT)
                    _store(points, first + i, 4, _ZERO_ELEMENT)
                    continue
                x2, y2 = _row(table, references[w, first + i])
                if kind == _TAKE:
                    _store(points, first + i, 0, x2)
                    _store(points, first + i, 4, y2)
                    continue
                x1, y1 = _load(points, first + i, 0), _load(points, first + i, 4)
                if kind == _CHORD:
                    numerator = sub(y2, y1)
                else:
                    square = mul(x1, x1)
                    numerator = add(add(square, square), square)
                slope = mul(numerator, _load(tree, size + i, 0))
                x3 = normal(sub(sub(mul(slope, slope), x1), x2))
                y3 = normal(sub(mul(slope, sub(x1, x3)), y1))
                _store(points, first + i, 0, x3)
                _store(points, first + i, 4, y3)


@compiled
def _signed_row(first: np.int32, digit: np.int32) -> np.int32:
    """Reference to the row of the odd digit 2 U - 2**16 + 1; rows of 1, 3, 5, ... begin at `first`."""
    half = np.int32(_HALF)
    return digit + (first - half + np.int32(1)) if digit >= half else digit - (first + half)


@kernel(types.void(_in_words, types.boolean, _out_references))
def recode(scalars: Words, negative: bool, references: npt.NDArray[np.int32]) -> None:
    """Odd signed digits of scalars, or of their negatives, as references to the rows of `curve.Commitments`.

    u = (k + 2**256 - 1) / 2 mod n has sixteen digits U_j of 16 bits, and k = sum of (2 U_j - 2**16 + 1) 2**(16 j) mod n:
    every digit is odd, so nothing is ever skipped. Window 0 has a row for each U_0, the others for positive digits only.
    references (16 or more, m); scalars below n.
    """
    tile = np.empty(
        (4, _TILE), np.uint64
    )  # words of many scalars side by side, so that the last loop is one of vectors
    for first in range(0, len(scalars), _TILE):
        size = min(_TILE, len(scalars) - first)
        for i in range(size):
            tile[0, i], tile[1, i], tile[2, i], tile[3, i] = odd_digits(_load(scalars, first + i, 0), negative)
        for j in range(_WINDOWS):
            words, shift, row = tile[j >> 2], np.uint64(_WINDOW * (j & 3)), references[j, first : first + size]
            if j == 0:
                for i in range(size):
                    row[i] = np.int32(words[i] & _DIGIT) + np.int32(1)
            else:
                start = np.int32(_FULL + (j - 1) * _HALF)
                for i in range(size):
                    row[i] = _signed_row(start, np.int32((words[i] >> shift) & _DIGIT))


@kernel(types.void(_in_longs, types.int64, _out_references))
def recode_exponents(values: npt.NDArray[np.int64], first: int, references: npt.NDArray[np.int32]) -> None:
    """Odd signed digits of 2 x + 1, as references to rows of odd multiples of G / 2 from `first` on: see `recode`.

    references (windows, m) for windows of 16 bits, and -2**(16 windows - 1) <= x < 2**(16 windows - 1).
    """
    windows = len(references)
    offset = _ONE << np.uint64(_WINDOW * windows - 1)
    for j in range(windows):  # many values side by side: a loop of vectors
        shift, start, row = np.uint64(_WINDOW * j), np.int32(first + j * _HALF), references[j]
        for i in range(len(values)):
            row[i] = _signed_row(start, np.int32(((np.uint64(values[i]) + offset) >> shift) & _DIGIT))


@kernel(types.void(_out_words, _in_words, types.uint64))
def accumulate(sums: Words, scalars: Words, weight: np.uint64) -> None:
    """sums[i] += weight * scalars[i] as plain integers: sums (m, 5), scalars (m, 4), reduced or not.

    The caller keeps the sum of the weights below 2**64, so that a sum stays below 2**320.
    """
    for i in range(len(scalars)):
        carry = _ZERO
        for j in range(4):
            low, carry = mul_add(weight, scalars[i, j], sums[i, j], carry)
            sums[i, j] = low
        sums[i, 4] += carry


@kernel(types.void(_in_words, _out_words))
def reduce_scalars(sums: Words, scalars: Words) -> None:
    """scalars[i] = sums[i] mod n, canonical: sums (m, 5), scalars (m, 4)."""
    for i in range(len(sums)):
        _store(scalars, i, 0, reduce_wide(_load(sums, i, 0), sums[i, 4]))


@kernel(types.void(_in_words, _in_signs, _out_words))
def project(scalars: Words, signs: npt.NDArray[np.int8], sums: Words) -> None:
    """sums[k] += sum over i of signs[k, i] * scalars[i]: scalars (d, 4) below n, signs (K, d) of +-1, sums (K, 5)."""
    for k in range(len(signs)):
        for i in range(len(scalars)):
            term = _load(scalars, i, 0)
            if signs[k, i] < 0:
                term = minus(_ORDER_LIMBS, term)
            carry = _ZERO
            for j in range(4):
                low, carry = mul_add(_ONE, term[j], sums[k, j], carry)
                sums[k, j] = low
            sums[k, 4] += carry


@kernel(types.int64(_in_words))
def first_invalid(points: Words) -> int:
    """Index of the first row that is not a canonical affine point (infinity included), or -1."""
    for i in range(len(points)):
        x, y = _load(points, i, 0), _load(points, i, 4)
        if not (less(x, _P_LIMBS) and less(y, _P_LIMBS)):
            return i
        if not _equal(normal(mul(y, y)), normal(add(mul(mul(x, x), x), _SEVEN_ELEMENT))):
            return i
    return -1


@kernel(types.void(_in_words, _in_words, _out_bytes))
def compare_rows(a: Words, b: Words, equal: npt.NDArray[np.uint8]) -> None:
    """equal[i] = 1 where rows a[i] and b[i] are the same, else 0: a and b (m, width)."""
    for i in range(len(a)):
        difference = _ZERO
        for j in range(a.shape[1]):
            difference |= a[i, j] ^ b[i, j]
        equal[i] = difference == _ZERO


@compiled
def _tag(word: np.uint64) -> np.uint64:
    """The tag of a point whose x has this second word, at its place in an entry."""
    return word << STEP_BITS


@kernel(types.void(_out_slots, _in_words, types.int64))
def insert_tags(slots: npt.NDArray[np.uint64], points: Words, first: int) -> None:
    """Put points (2 first - 1) G / 2, (2 first + 1) G / 2, ... into the hash table of baby steps.

    slots (2**k,), k >= 3: 34 bits of x, then 2 j + (y mod 2) for the point (2 j - 1) G / 2 in 30 bits; 0 is a free slot.
    The low word of x names the bucket of eight slots where to begin; from there on, the first free one.
    """
    mask = np.uint64(len(slots) - 1)
    for i in range(len(points)):
        slot = (points[i, 0] << BUCKET_BITS) & mask
        while slots[slot] != _ZERO:
            slot = (slot + _ONE) & mask
        slots[slot] = _tag(points[i, 1]) | (np.uint64(first + i) << _ONE) | (points[i, 4] & _ONE)


@compiled
def _look_up(slots: npt.NDArray[np.uint64], low: np.uint64, high: np.uint64, skip: int) -> tuple[np.uint64, int]:
    """The step of the (skip + 1)-th entry with the tag or 0, and how many matches are still to be skipped.

    low, high: the first two words of x.
    """
    mask, tag = np.uint64(len(slots) - 1), _tag(high)
    slot = (low << BUCKET_BITS) & mask
    while slots[slot] != _ZERO:
        if (slots[slot] ^ tag) <= STEP_MASK:
            if skip == 0:
                return slots[slot] & STEP_MASK, 0
            skip -= 1
        slot = (slot + _ONE) & mask
    return _ZERO, skip


@compiled
def _exponent(step: np.uint64, y: Element) -> int:
    """j or 1 - j: m with (m - 1/2) G the point that has the step's x, and the parity of this y."""
    j = int(step >> _ONE)
    return j if ((step ^ y[0]) & _ONE) == _ZERO else 1 - j


@compiled
def _chord(x1: Element, y1: Element, x2: Element, y2: Element, inverse: Element) -> tuple[Element, Element]:
    """Canonical x of the sum of two points, and the slope; inverse is 1 / (x2 - x1)."""
    slope = mul(sub(y2, y1), inverse)
    return normal(sub(sub(mul(slope, slope), x1), x2)), slope


@kernel(types.void(_in_slots, _in_words, types.int64, _in_words, _in_longs, _out_longs, _out_bytes))
def search(
    slots: npt.NDArray[np.uint64],
    giants: Words,
    stride: int,
    points: Words,
    skips: npt.NDArray[np.int64],
    logs: npt.NDArray[np.int64],
    found: npt.NDArray[np.uint8],
) -> None:
    """Candidates m for points (m - 1/2) G: baby step, giant step, both signs at once.

    giants (s, 8) are the multiples 1 .. s of stride * G. For each point E the order of the search is fixed: E, then
    E - g stride G and E + g stride G for g = 1, 2, ...; both need the same 1 / (x_g - x_E), and only their x unless a
    tag fits. The first skips[i] matches are passed over, so that a false one can be continued behind. found[i] is 1 and
    logs[i] the candidate, or found[i] is 0. Points are not infinity. A point that equals a giant step has no small m.

    (E -+ Q): lambda = (+-y_Q - y_E) / (x_Q - x_E), x3 = lambda**2 - x_E - x_Q, y3 = lambda (x_E - x3) - y_E.
    """
    tree = np.empty((2 * _BATCH, 4), np.uint64)
    tags = np.empty((_BATCH, 2, 2), np.uint64)
    pending = np.empty(_BATCH, np.int64)
    left = np.empty(_BATCH, np.int64)  # matches still to be skipped
    mask = np.uint64(len(slots) - 1)
    position = 0
    while position < len(points):
        count = 0
        while count < _BATCH and position < len(points):
            entry, skip = _look_up(slots, points[position, 0], points[position, 1], skips[position])
            if entry != _ZERO:
                logs[position] = _exponent(entry, _load(points, position, 4))
                found[position] = 1
            else:
                found[position] = 0
                pending[count] = position
                left[count] = skip
                count += 1
            position += 1

        first = 0
        while count > 0 and first < len(giants):
            # Few points left: they take several giant steps at a time, so that the inversion stays shared by many.
            span = min(len(giants) - first, max(1, _BATCH // count))
            size = count * span
            for i in range(count):
                x1 = _load(points, pending[i], 0)
                for s in range(span):
                    difference = normal(sub(_load(giants, first + s, 0), x1))
                    if _is_zero(difference):
                        difference = _ONE_ELEMENT
                    _store(tree, size + i * span + s, 0, difference)
            _invert_leaves(tree, size)
            for i in range(count):
                x1, y1 = _load(points, pending[i], 0), _load(points, pending[i], 4)
                for s in range(span):
                    node = i * span + s
                    x2, y2 = _load(giants, first + s, 0), _load(giants, first + s, 4)
                    for side in range(2):
                        x3, _ = _chord(x1, y1, x2, negate_if(side == 0, y2), _load(tree, size + node, 0))
                        tags[node, side, 0], tags[node, side, 1] = x3[0], x3[1]
                        _prefetch(slots, np.int64((x3[0] << BUCKET_BITS) & mask))
            kept = 0
            for i in range(count):
                target, skip = pending[i], left[i]
                hit = False
                for step in range(2 * span):
                    s, side = step >> 1, step & 1
                    node = i * span + s
                    giant = (first + s + 1) * stride
                    x1, x2 = _load(points, target, 0), _load(giants, first + s, 0)
                    if _equal(x1, x2):
                        continue
                    entry, skip = _look_up(slots, tags[node, side, 0], tags[node, side, 1], skip)
                    if entry != _ZERO:
                        y1, y2 = _load(points, target, 4), negate_if(side == 0, _load(giants, first + s, 4))
                        x3, slope = _chord(x1, y1, x2, y2, _load(tree, size + node, 0))
                        baby = _exponent(entry, normal(sub(mul(slope, sub(x1, x3)), y1)))
                        logs[target] = baby + giant if side == 0 else baby - giant
                        hit = True
                        break
                if hit:
                    found[target] = 1
                else:
                    pending[kept] = target
                    left[kept] = skip
                    kept += 1
            count = kept
            first += span


# --- pairs of points on the wire: (n, 12) rows, three elements for two points -----------------------------------------
#
#   common      x1, x2, y1 + y2; the sum is not 0
#   opposite    x1, p + k, y1 for y2 = -y1: then x2**3 = x1**3, so x2 = x1 _UNITY**k and k is 0, 1 or 2
#
# Both are unique: a canonical x2 is below p, and no point of the curve has y = 0.


@kernel(types.void(_in_words, _out_words))
def encode_pairs(points: Words, pairs: Words) -> None:
    """pairs (n, 12) of points (2 n, 8), which are canonical and on the curve."""
    for i in range(len(pairs)):
        x1, y1 = _load(points, 2 * i, 0), _load(points, 2 * i, 4)
        x2, y2 = _load(points, 2 * i + 1, 0), _load(points, 2 * i + 1, 4)
        third = normal(add(y1, y2))
        if _is_zero(third):
            power, k = x1, _ZERO
            while not _equal(power, x2):
                power, k = normal(mul(power, _UNITY)), k + _ONE
            x2, third = (_P_LIMBS[0] + k, _P_LIMBS[1], _P_LIMBS[2], _P_LIMBS[3]), y1
        _store(pairs, i, 0, x1)
        _store(pairs, i, 4, x2)
        _store(pairs, i, 8, third)


@kernel(types.int64(_in_words, _out_words))
def decode_pairs(pairs: Words, points: Words) -> int:
    """Write points (2 n, 8) of pairs (n, 12). Index of the first pair that is not the encoding of two points, or -1.

    From y1**2 - y2**2 = x1**3 - x2**3 follows y1 - y2 = (x1**3 - x2**3) / (y1 + y2); a batch shares one inversion. y1 is
    compared with the curve; y2 then is on it, too. Where an index is returned, the points are not all written.
    """
    tree = np.empty((2 * _BATCH, 4), np.uint64)
    for first in range(0, len(pairs), _BATCH):
        size = min(_BATCH, len(pairs) - first)
        for i in range(size):
            third = normal(_load(pairs, first + i, 8))
            _store(tree, size + i, 0, _ONE_ELEMENT if _is_zero(third) else third)
        _invert_leaves(tree, size)
        for i in range(size):
            x1, x2, third = _load(pairs, first + i, 0), _load(pairs, first + i, 4), _load(pairs, first + i, 8)
            if _is_zero(third) or not (less(x1, _P_LIMBS) and less(third, _P_LIMBS)):
                return first + i
            square = normal(add(mul(mul(x1, x1), x1), _SEVEN_ELEMENT))  # y1**2
            if less(x2, _P_LIMBS):
                other = normal(add(mul(mul(x2, x2), x2), _SEVEN_ELEMENT))
                y1 = normal(mul(add(third, mul(sub(square, other), _load(tree, size + i, 0))), _HALF_ELEMENT))
                y2 = normal(sub(third, y1))
            else:
                k = minus(x2, _P_LIMBS)[0]  # x2 - p is below 2**33
                if k > _TWO:
                    return first + i
                x2, y1, y2 = x1, third, negate_if(True, third)
                for _ in range(k):
                    x2 = normal(mul(x2, _UNITY))
            if not _equal(normal(mul(y1, y1)), square):
                return first + i
            _store(points, 2 * (first + i), 0, x1)
            _store(points, 2 * (first + i), 4, y1)
            _store(points, 2 * (first + i) + 1, 0, x2)
            _store(points, 2 * (first + i) + 1, 4, y2)
    return -1
