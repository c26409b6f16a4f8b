"""Short rows of class indices for Numba: a strip of rows at a time, class by class, so that rows fill the lanes.

The same statistics, rule and gradient as in `numba_rows`, for rows of a few classes, whatever the strides.
"""

import math

import numpy as np

from ce_fast.backends.numba_math import (
    BASE_LIMIT,
    BIAS,
    HIGH,
    LEAD,
    LOG2E,
    LOW,
    MAGIC,
    VALUE,
    add,
    exp,
    exp_args,
    jit,
    load,
    log1p,
    store,
    twice_atanh,
)  # fmt: skip
from ce_fast.backends.numba_rows import _combine, _term

MOST_CLASSES = 64
STRIP = 256  # rows: with 10 classes of float32 10 KiB
BASE, N, REST, X_T, NLL, P_T, P_REST, LSE, SUM = (i * STRIP for i in range(9))  # of one array, so that none overlap


@jit
def _read_strip(x, holds, z, n):
    """z (n_classes, STRIP) <- x (rows, n_classes) with rows along the lanes, padded with 0"""
    for k in range(z.shape[0]):
        load(x[:, k], holds, z[k, :n])
        z[k, n:] = 0


@jit
def _top(z, top):
    """The largest logit of each row, passing over NaN"""
    top[:] = -np.inf
    for k in range(z.shape[0]):
        row = z[k]
        for i in range(STRIP):
            top[i] = row[i] if row[i] > top[i] else top[i]


@jit
def _references(top, work, lanes, t):
    """BASE and N of each row, and what `exp` of the compute dtype takes of them to lanes"""
    ln2 = t[HIGH] + t[LOW]
    for i in range(STRIP):
        x = float(top[i])
        near = abs(x) < BASE_LIMIT * t[VALUE]
        base = 0.0 if near or not math.isfinite(x) else x
        n = (math.floor(x * t[LOG2E] + 0.5) if near else 0.0) - LEAD
        work[BASE + i], work[N + i] = base, n
        lanes[0, i], lanes[1, i], lanes[2, i] = base, (n - t[BIAS] + 2) * ln2, t[MAGIC] + t[BIAS] - n


@jit
def _log(v):
    """(k, log f) of a normal number v = 2^k f, 0.7 < f < 1.42"""
    bits = np.float64(v).view(np.int64)
    k = (bits - 0x3FE6A09E667F3BCD) >> 52
    f = np.int64(bits - (k << 52)).view(np.float64)
    return float(k), twice_atanh((f - 1.0) / (f + 1.0))


@jit
def _log_parts_strip(work, t):
    """`_log_parts` of each row: REST and X_T in; NLL, P_T, P_REST, LSE, SUM out"""
    value, log2e, high, low = t[VALUE], t[LOG2E], t[HIGH], t[LOW]
    for i in range(STRIP):
        base, n, rest, x_t = work[BASE + i], work[N + i], work[REST + i], work[X_T + i]
        magic, cutoff = 1.5 * 2.0**52 + 1023.0 - n, (n - 1021.0) * (high + low)
        e_t = exp(x_t, (base, cutoff, log2e, magic, high, low, 0.0, 1.0 / value))
        near = e_t >= rest
        odds = (rest if near else e_t) / (e_t if near else rest)
        tail, most = log1p(odds), 1.0 / (1.0 + odds)
        k, log_f = _log(rest)
        k += n  # against 0, or against base
        log_sum = log_f + tail
        from_t = ((base - x_t) + k * high) + k * low  # k * high is exact
        from_0 = (base + k * high) + k * low
        work[NLL + i] = tail if near else from_t / value + log_sum
        work[LSE + i] = x_t / value + tail if near else from_0 / value + log_sum
        work[P_T + i] = most if near else odds * most
        work[P_REST + i] = odds * most if near else most
        work[SUM + i] = rest + e_t


@jit
def _exp_strip(z, lanes, args, work):
    """z <- exp(z - m), and their sums to REST"""
    work[REST : REST + STRIP] = 0
    _, _, log2e, _, ln2_a, ln2_b, ln2_c, inverse = args
    base, cutoff, magic = lanes[0], lanes[1], lanes[2]
    for k in range(z.shape[0]):
        row = z[k]
        for i in range(STRIP):
            e = exp(row[i], (base[i], cutoff[i], log2e, magic[i], ln2_a, ln2_b, ln2_c, inverse))
            row[i] = e
            work[REST + i] += e


@jit
def _scale_strip(z, factor, tiny):
    """z_k <- factor z_k, rounded once; what would be subnormal is 0"""
    for k in range(z.shape[0]):
        row = z[k]
        for i in range(STRIP):
            v = row[i] * factor[i]
            row[i] = 0.0 if abs(v) < tiny else v


@jit
def columns(x, holds, out, out_holds, real, target, ignore_index, weight, sample_weight, upstream, z_loss, scale, emit,
            rule, parameter, temperature, tiny, loss):  # fmt: skip
    """The sum of the row losses; x, out (rows, n_classes) of any strides."""
    n_classes = x.shape[1]
    z = np.empty((n_classes, STRIP), real.dtype)
    top, lanes = np.empty(STRIP, real.dtype), np.empty((3, STRIP), real.dtype)
    work, factor, g_t = np.zeros(9 * STRIP), np.empty(STRIP), np.empty(STRIP)
    args = exp_args(0.0, 0.0, temperature, real)
    counts = np.empty(STRIP, np.bool_)
    total, lost = 0.0, 0.0
    for j in range(0, x.shape[0], STRIP):
        n = min(STRIP, x.shape[0] - j)
        _read_strip(x[j : j + n], holds, z, n)
        for i in range(n):
            counts[i] = target[j + i] != ignore_index and not (sample_weight.size and sample_weight[j + i] == 0)
            if not counts[i]:
                z[:, i] = 0
        _top(z, top)
        _references(top, work, lanes, temperature)
        for i in range(n):
            if counts[i]:
                work[X_T + i] = z[target[j + i], i]
                z[target[j + i], i] = -np.inf
        _exp_strip(z, lanes, args, work)
        _log_parts_strip(work, temperature)
        factor[:] = 0
        for i in range(n):
            row_loss = 0.0
            if counts[i]:
                w_t = weight[target[j + i]] if weight.size else 1.0
                nll, p_t, p_rest, lse = work[NLL + i], work[P_T + i], work[P_REST + i], work[LSE + i]
                if top[i] == np.inf:
                    nll = p_t = p_rest = lse = math.nan
                loss_t, slope_t = _term(rule, parameter, nll, p_t, p_rest)
                row_loss, a, g, _ = _combine(loss_t, slope_t, p_t, p_rest, lse, w_t, 0.0, 0.0, w_t, z_loss)
                s = sample_weight[j + i] if sample_weight.size else 1.0
                u = s * scale * (upstream[j + i] if upstream.size else 1.0)
                row_loss *= s
                factor[i] = math.nan if math.isnan(lse) else u * a / work[SUM + i]
                g_t[i] = math.nan if math.isnan(lse) else u * g
            total, lost = add(total, lost, row_loss)
            if loss.size:
                loss[j + i] = row_loss
        if emit:
            _scale_strip(z, factor, tiny)
            for i in range(n):
                if counts[i]:
                    z[target[j + i], i] = g_t[i]
            for k in range(n_classes):
                store(z[k, :n], out_holds, out[j : j + n, k])
    return total
