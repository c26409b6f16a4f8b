"""What the Numba kernels share: exp that LLVM vectorizes, sums, and 16-bit floats. See `csrc/vecmath.h`.

Numba's cache knows a kernel by its own file alone: after a change here, touch the files that import this one.
"""

import math
from fractions import Fraction
from functools import lru_cache

import numba
import numpy as np
from numba import types
from numba.extending import overload

jit = numba.njit(cache=True, nogil=True, error_model="numpy")
TILE = 1024  # logits at a time: 4 KiB of float32
RUN = 128  # terms added in the compute dtype, in lanes; a tile is padded to whole runs
LEAD = 23.0  # a reference is so many ln 2 below a large logit: terms 2^-23 under the smallest normal still count
BASE_LIMIT = 4096.0

_LN2 = Fraction(float.fromhex("0x1.62e42fefa39efp-1")) + Fraction(float.fromhex("0x1.abc9e3b39803fp-56"))
VALUE, LOG2E, HIGH, LOW, PART_A, PART_B, PART_C, BIAS, MAGIC = range(9)


def _leading(value: Fraction, bits: int) -> float:
    """The first bits of a positive number."""
    _, exponent = math.frexp(float(value))
    unit = Fraction(2) ** (exponent - bits)
    return float(value // unit * unit)


@lru_cache(maxsize=64)
def make_temperature(value: float, dtype: np.dtype) -> tuple[float, ...]:
    """(T, log2 e / T, T ln 2 in two parts and, for `exp` of the dtype, in three; exponent bias, magic number)"""
    ln2 = Fraction(value) * _LN2
    high = _leading(ln2, 32)
    low = float(ln2 - Fraction(high))
    fixed = (value, 1.4426950408889634 / value, high, low)
    if dtype == np.float64:
        return (*fixed, high, low, 0.0, 1023.0, 1.5 * 2.0**52)
    a = _leading(ln2, 11)
    b = _leading(ln2 - Fraction(a), 11)
    return (*fixed, a, b, float(ln2 - Fraction(a) - Fraction(b)), 127.0, 1.5 * 2.0**23)


@jit
def exp_args(base, n, t, like):
    """What `exp` takes for exp((x - base) / T) 2^-n, in the dtype of the array `like`."""
    real = like.dtype.type
    cutoff = (n - t[BIAS] + 2) * (t[HIGH] + t[LOW])  # below it the result would be subnormal, and is 0
    magic = t[MAGIC] + t[BIAS] - n  # adding it rounds to an integer, whose low bits are then the exponent's
    return (
        real(base), real(cutoff), real(t[LOG2E]), real(magic), real(t[PART_A]), real(t[PART_B]), real(t[PART_C]),
        real(1 / t[VALUE]),
    )  # fmt: skip


def exp(x, args):
    """exp((x - base) / T) 2^-n in x's dtype; NaN passes, -inf gives 0. For jitted code alone."""
    raise NotImplementedError


def _coefficients(real, *values):
    return tuple(real(float.fromhex(value)) for value in values)


A5, A4, A3, A2, A1, _ONE = _coefficients(
    np.float32, "0x1.6a22bap-10", "0x1.123a98p-7", "0x1.5558f6p-5", "0x1.555490p-3", "0x1.fffffcp-2", "1"
)
B10, B9, B8, B7, B6, B5, B4, B3, B2, B1 = _coefficients(
    np.float64,
    "0x1.ad7fab91606afp-26", "0x1.28adef591de38p-22", "0x1.71df25f5aabe7p-19", "0x1.a019998a28c10p-16",
    "0x1.a01a0129b33e0p-13", "0x1.6c16c1845839ap-10", "0x1.1111111127eddp-7", "0x1.55555555507b3p-5",
    "0x1.55555555554f9p-3", "0x1.000000000000ap-1",
)  # fmt: skip


@overload(exp, jit_options={"error_model": "numpy", "fastmath": {"contract"}})  # FMA where the CPU has it
def _exp_overload(x, args):
    def exp32(x, args):
        base, cutoff, log2e, magic, ln2_a, ln2_b, ln2_c, inverse = args
        d = x - base
        shifted = d * log2e + magic
        k = shifted - magic
        r = (((d - k * ln2_a) - k * ln2_b) - k * ln2_c) * inverse
        p = (((A5 * r + A4) * r + A3) * r + A2) * r + A1
        p = (p * r + _ONE) * r + _ONE
        power = np.uint32(np.float32(shifted).view(np.uint32) << np.uint32(23)).view(np.float32)
        return np.float32(0) if d < cutoff else p * power

    def exp64(x, args):
        base, cutoff, log2e, magic, ln2_a, ln2_b, _, inverse = args
        d = x - base
        shifted = d * log2e + magic
        k = shifted - magic
        r = ((d - k * ln2_a) - k * ln2_b) * inverse
        p = ((((((((B10 * r + B9) * r + B8) * r + B7) * r + B6) * r + B5) * r + B4) * r + B3) * r + B2) * r + B1
        p = (p * r + 1.0) * r + 1.0
        power = np.uint64(np.float64(shifted).view(np.uint64) << np.uint64(52)).view(np.float64)
        return 0.0 if d < cutoff else p * power

    return exp32 if x == types.float32 else exp64


def twice_atanh(s):
    """2 atanh(s) for |s| <= 1/3, by its series. For jitted code alone."""
    raise NotImplementedError


@overload(twice_atanh, jit_options={"error_model": "numpy", "fastmath": {"contract"}})
def _twice_atanh_overload(s):
    real, terms = (np.float32, 8) if s == types.float32 else (np.float64, 17)

    def series(s):
        v = s * s
        total = real(0)
        for i in range(terms):
            total = (total + real(1) / real(2 * (terms - i) + 1)) * v
        return real(2) * (s + s * total)

    return series


def log1p(e):
    """log(1 + e) for 0 <= e <= 1, exact also where e is tiny. For jitted code alone."""
    raise NotImplementedError


@overload(log1p)
def _log1p_overload(e):
    two = np.float32(2) if e == types.float32 else np.float64(2)
    return lambda e: twice_atanh(e / (two + e))


@jit
def exp_scaled(d, n, t):
    """exp(d / T) 2^-n in double precision, for the few scalars of a row"""
    if not d > -1e5 * t[VALUE]:  # zero, and NaN passes
        return d if d != d else 0.0
    k = math.floor(d * t[LOG2E] + 0.5)
    r = ((d - k * t[HIGH]) - k * t[LOW]) / t[VALUE]
    return math.ldexp(math.exp(r), int(k - n))


# --- Sums and maxima --------------------------------------------------------------------------------------------------


@jit
def add(total, lost, term):
    """Kahan's sum: one by one, 150,000 float64 terms would lose some 60 ulp."""
    term -= lost
    new = total + term
    return new, ((new - total) - term) if math.isfinite(new) else 0.0


@numba.njit(fastmath={"reassoc"})  # of a run alone: in as many lanes as the CPU has
def plus(a, b):
    return a + b


def rank(x):
    """An integer that is ordered as the floats are, NaN least: its maximum vectorizes. For jitted code alone."""
    raise NotImplementedError


def unrank(rank):
    """The float of a rank that is not NaN's."""
    raise NotImplementedError


@overload(rank)
def _rank_overload(x):
    def rank32(x):
        bits = np.float32(x).view(np.int32)
        return np.int32(bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))) if x == x else np.int32(-0x80000000)

    def rank64(x):
        bits = np.float64(x).view(np.int64)
        return bits ^ ((bits >> 63) & np.int64(0x7FFFFFFFFFFFFFFF)) if x == x else np.int64(-0x8000000000000000)

    return rank32 if x == types.float32 else rank64


@overload(unrank)
def _unrank_overload(rank):
    def float32(rank):
        return np.int32(rank ^ ((rank >> 31) & np.int32(0x7FFFFFFF))).view(np.float32)

    def float64(rank):
        return np.int64(rank ^ ((rank >> 63) & np.int64(0x7FFFFFFFFFFFFFFF))).view(np.float64)

    return float32 if rank == types.int32 else float64


@jit
def largest(x):
    """max_k x_k, passing over NaN; -inf if there is no other"""
    top = rank(x.dtype.type(-np.inf))
    for k in range(x.size):
        at = rank(x[k])
        top = at if at > top else top
    return unrank(top)


@jit
def _exp_run(x, args):
    total = x.dtype.type(0)
    for k in range(x.size):
        x[k] = exp(x[k], args)
        total = plus(total, x[k])
    return total


@jit
def exp_tile(x, args):
    """x <- exp(z - m), and their sum: in runs, whose sums are added in float64"""
    total = 0.0
    for j in range(0, x.size, RUN):
        total += _exp_run(x[j : j + RUN], args)
    return total


# --- Storage ----------------------------------------------------------------------------------------------------------

NATIVE, BFLOAT16, FLOAT16 = range(3)  # what an array holds; 16-bit floats come as uint16, for Numba has none


@jit
def _bits(x):
    return np.int64(np.float32(x).view(np.uint32))


@jit
def _float(bits):
    return np.uint32(bits).view(np.float32)


@jit
def _from_float16(half):
    half = np.int64(half)
    exponent = half & 0x7C00
    bits = ((half & 0x7FFF) << 13) + (112 << 23)
    small = _bits(_float(bits + (1 << 23)) - np.float32(2.0**-14))
    bits = bits + (112 << 23) if exponent == 0x7C00 else bits  # inf, NaN
    bits = small if exponent == 0 else bits
    return _float(bits | ((half & 0x8000) << 16))


@jit
def _to_float16(x):
    """To nearest, ties to even; NaN stays NaN."""
    bits = _bits(x)
    size = bits & 0x7FFFFFFF
    half = (size - (112 << 23) + 0xFFF + ((size >> 13) & 1)) >> 13
    small = _bits(_float(size) + np.float32(0.5)) - (126 << 23)  # adding 0.5 puts 2^-24 in the last place of the sum
    half = small if size < (113 << 23) else half
    half = half if size < (143 << 23) else (0x7E00 if size > 0x7F800000 else 0x7C00)
    return np.uint16(half | ((bits >> 16) & 0x8000))


@jit
def _to_bfloat16(x):
    bits = _bits(x)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.uint16((bits >> 16) | 0x40 if (bits & 0x7FFFFFFF) > 0x7F800000 else rounded)


def load(x, holds, out):
    """out <- x, of the dtype that `holds` says. For jitted code alone."""
    raise NotImplementedError


def store(x, holds, out):
    """out <- x, rounded once to the dtype that `holds` says. For jitted code alone."""
    raise NotImplementedError


@overload(load)
def _load_overload(x, holds, out):
    def half(x, holds, out):
        if holds == BFLOAT16:
            for k in range(x.size):
                out[k] = _float(np.int64(x[k]) << 16)
        else:
            for k in range(x.size):
                out[k] = _from_float16(x[k])

    def native(x, holds, out):
        for k in range(x.size):
            out[k] = x[k]

    return half if x.dtype == types.uint16 else native


@overload(store)
def _store_overload(x, holds, out):
    def half(x, holds, out):
        if holds == BFLOAT16:
            for k in range(x.size):
                out[k] = _to_bfloat16(x[k])
        else:
            for k in range(x.size):
                out[k] = _to_float16(x[k])

    def native(x, holds, out):
        for k in range(x.size):
            out[k] = x[k]

    return half if out.dtype == types.uint16 else native
