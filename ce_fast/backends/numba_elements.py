"""The sigmoid family of `csrc/elements_tpl.h` for Numba: an element in place of a row."""

import math

import numpy as np

from ce_fast.backends import RULES
from ce_fast.backends.numba_math import TILE, add, exp, exp_args, jit, log1p, make_temperature, plus

BINARY, BINARY_PROBABILITY, BINARY_FOCAL = map(RULES.index, ("binary", "binary_probability", "binary_focal"))
Z, Y, UP, DOWN, S, UPSTREAM, LOSS, GRAD, HESS = (i * TILE for i in range(9))
ONE32, ONE64 = (make_temperature(1.0, np.dtype(real)) for real in (np.float32, np.float64))


@jit
def _product_error(a, b, product):
    """What the rounding of a * b lost (Dekker): 2^27 + 1 splits a double into halves."""
    high_a, high_b = a * 134217729.0, b * 134217729.0
    high_a, high_b = high_a - (high_a - a), high_b - (high_b - b)
    low_a, low_b = a - high_a, b - high_b
    return ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b


@jit
def _modulation(mix, size, log1p_e, gamma):
    """u^gamma of u = mix / (1 + e), or of e / (1 + e) if mix is 0, in parts whose errors gamma does not magnify."""
    if gamma == 0:
        return 1.0
    near = math.exp(-gamma * log1p_e)
    if mix != 0:
        return math.pow(mix, gamma) * near
    product = gamma * size
    if product == 0 or product > 800:
        return near if product == 0 else 0.0
    return near * math.exp(-product) * (1.0 - _product_error(gamma, size, product))


@jit
def _softplus_parts(z):
    """(log1p(e), sigmoid(z), sigmoid(-z), softplus(z), softplus(-z)) with e = exp(-|z|)"""
    e = math.exp(-abs(z))
    log1p_e, most = math.log1p(e), 1.0 / (1.0 + e)
    p, q = (most, e * most) if z >= 0 else (e * most, most)
    if math.isnan(z):
        p = q = z
    return log1p_e, p, q, (z if z > 0 else 0.0) + log1p_e, (-z if z < 0 else 0.0) + log1p_e


@jit
def _times(mass, value):
    """mass * value, where 0 * inf is 0 and NaN stays."""
    return 0.0 if mass == 0 and value == value else mass * value


@jit
def _binary_probability(x, down, up):
    high, low = -math.log1p(-x), -math.log(x)
    high, low = 100.0 if high > 100 else high, 100.0 if low > 100 else low
    return down * high + up * low, (x * down - (1 - x) * up) / max(x * (1 - x), 1e-12), 0.0


@jit
def _binary_focal(z, y, gamma, alpha):
    log1p_e, p, q, above, below = _softplus_parts(z)
    e, size = math.exp(-abs(z)), abs(z)
    loss = _times(1 - y, above) + _times(y, below)
    a, b = (1 - y, y) if z < 0 else (y, 1 - y)
    mix = a * e + b
    factor = _modulation(0.0 if b == 0 else mix, size, log1p_e, gamma)
    c = 1.0 if alpha < 0 else alpha * y + (1 - alpha) * (1 - y)
    if (factor == 0 or c == 0) and loss == loss:
        return 0.0, 0.0, 0.0
    most = 1.0 / (1.0 + e)
    spread = most if b == 0 else e * most / mix  # p (1 - p) / u
    turn = 0.0 if loss == 0 or spread == 0 else gamma * loss * spread * (1 - 2 * y)
    slope = 1.0 + (0.0 if turn == 0 else turn * (1 - 2 * y) / (y * q + (1 - y) * p))
    return c * factor * loss, c * factor * ((1 - y) * p - y * q + turn), c * factor * slope * (p * q)


@jit
def _read(array, first, n, tile):
    """tile <- array[first : first + n], or 1 where there is no array"""
    for k in range(n):
        tile[k] = array[first + k] if array.size else 1


@jit
def _masses(work, n, on, off):
    """What pulls z up and what pulls it down, of weight in UP and pos_weight in DOWN; whether a target is bad."""
    bad, zero, one = 0, on - on, (on - on) + 1
    for k in range(n):
        y, w, pos = work[Y + k], work[UP + k], work[DOWN + k]
        bad |= ((y < zero) | (y > one)) & (work[S + k] != zero)
        work[UP + k] = pos * (w * (on * y + off))
        work[DOWN + k] = w * (on * (one - y) + off)
    return bad != 0


@jit
def _binary_tile(work, n):
    """loss = down softplus(z) + up softplus(-z);  gradient down p - up (1 - p);  Hessian (down + up) p (1 - p)"""
    real = work.dtype.type
    zero, one = real(0), real(1)
    args = exp_args(0.0, 0.0, ONE32 if work.itemsize == 4 else ONE64, work)
    for k in range(n):
        z, up, down = work[Z + k], work[UP + k], work[DOWN + k]
        e = exp(z if z < zero else -z, args)
        rest, most = log1p(e), one / (one + e)
        least = e * most
        p, q = (least, most) if z < zero else (most, least)
        above, below = (z if z > zero else zero) + rest, (-z if z < zero else zero) + rest
        high = zero if (down == zero) & (above == above) else down * above  # 0 * inf is 0 here, NaN stays
        low = zero if (up == zero) & (below == below) else up * below
        work[LOSS + k] = high + low
        work[GRAD + k] = down * p - up * q
        work[HESS + k] = (down + up) * (p * q)


@jit
def _other_tile(work, n, rule, gamma, alpha):
    for k in range(n):
        if rule == BINARY_FOCAL:
            f, g, h = _binary_focal(float(work[Z + k]), float(work[Y + k]), gamma, alpha)
        else:
            f, g, h = _binary_probability(float(work[Z + k]), float(work[DOWN + k]), float(work[UP + k]))
        work[LOSS + k], work[GRAD + k], work[HESS + k] = f, g, h


@jit
def _scale(work, n, scale, hess_scale, floor):
    """The weights, onto the results; the sum of the losses. What does not count leaks nothing."""
    total, zero = 0.0, scale - scale
    for k in range(n):
        s = work[S + k]
        h = hess_scale * s * work[UPSTREAM + k] * work[HESS + k]
        loss = zero if s == zero else s * work[LOSS + k]
        work[LOSS + k] = loss
        work[GRAD + k] = zero if s == zero else scale * s * work[UPSTREAM + k] * work[GRAD + k]
        work[HESS + k] = zero if s == zero else (floor if h < floor else h)
        total = plus(total, np.float64(loss))
    return total


@jit
def _write(tile, array, first, n):
    if array.size:
        array[first : first + n] = tile[:n]


@jit
def elements(z, y, weight, pos_weight, sample_weight, upstream, rule, gamma, alpha, on, off, scale, hess_scale, floor,
             loss, out, hess):  # fmt: skip
    """(sum of the losses, whether a target that counts is outside [0, 1])"""
    work = np.empty(9 * TILE, z.dtype)  # one array: LLVM then knows that its parts do not overlap
    real = z.dtype.type
    total, lost, bad = 0.0, 0.0, False
    for j in range(0, z.size, TILE):
        n = min(TILE, z.size - j)
        _read(z, j, n, work[Z:])
        _read(y, j, n, work[Y:])
        _read(weight, j, n, work[UP:])
        _read(pos_weight, j, n, work[DOWN:])
        _read(sample_weight, j, n, work[S:])
        _read(upstream, j, n, work[UPSTREAM:])
        bad |= _masses(work, n, real(on), real(off))
        if rule == BINARY:
            _binary_tile(work, n)
        else:
            _other_tile(work, n, rule, gamma, alpha)
        total, lost = add(total, lost, _scale(work, n, real(scale), real(hess_scale), real(floor)))
        _write(work[LOSS:], loss, j, n)
        _write(work[GRAD:], out, j, n)
        _write(work[HESS:], hess, j, n)
    return total, bad
