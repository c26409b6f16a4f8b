"""The fallback: the rows, elements and rules of `csrc/` in plain loops, jitted.

Serial kernels that release the GIL, over blocks of rows in a thread pool: Numba's own thread pools do not survive a
fork (omp) or two Python threads (workqueue). What Numba cannot read (16-bit floats, a strided class axis) is copied
block by block by NumPy, so that nothing of the logits' size is made.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np

from ce_fast.backends import RULES, ElementJob, Job, ProbabilityJob, Rows
from ce_fast.plan import Plan

_jit = numba.njit(cache=True, nogil=True, error_model="numpy")
_EMPTY = np.empty(0)
CROSS_ENTROPY, FOCAL, POLY, GENERALIZED, KL_FORWARD, KL_REVERSE, BINARY, BINARY_PROBABILITY, BINARY_FOCAL = range(9)


def empty_like(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return np.empty_like(array, dtype, subok=False)


def max_threads() -> int:
    limit = int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]  # set when numba is imported
    omp = os.environ.get("OMP_NUM_THREADS", "")
    return min(limit, int(omp)) if omp.isdigit() else limit


def config() -> dict:
    return {"isa": numba.config.CPU_NAME or "native", "isas": (), "openmp": False}  # type: ignore[attr-defined]


@_jit
def _add(total, lost, term):
    """Kahan's sum: one by one, 150,000 float64 terms would lose some 60 ulp."""
    term -= lost
    new = total + term
    return new, ((new - total) - term) if math.isfinite(new) else 0.0


@_jit
def _sum_in_order(values):
    total, lost = 0.0, 0.0
    for value in values:
        total, lost = _add(total, lost, value)
    return total


@_jit
def _scan(target, has_target, ignore_index, weight, sample_weight, n_rows, n_classes):
    counted, total, lost = 0, 0.0, 0.0
    for i in range(n_rows):
        s = sample_weight[i] if sample_weight.size else 1.0
        if s == 0:
            continue
        if has_target:
            t = target[i]
            if t == ignore_index:
                continue
            if t < 0 or t >= n_classes:
                return i, counted, total
            if weight.size:
                s *= weight[t]
        counted += 1
        total, lost = _add(total, lost, s)
    return -1, counted, total


def scan_targets(rows: Rows, n_rows: int, n_classes: int) -> tuple[int, int, float]:
    has_target = rows.target is not None
    return _scan(
        _int64(rows.target), has_target, rows.ignore_index, _or_empty(rows.weight), _or_empty(rows.sample_weight),
        n_rows, n_classes,
    )  # fmt: skip


@_jit
def _product_error(a, b, product):
    """What the rounding of a * b lost (Dekker): 2^27 + 1 splits a double into halves."""
    high_a, high_b = a * 134217729.0, b * 134217729.0
    high_a, high_b = high_a - (high_a - a), high_b - (high_b - b)
    low_a, low_b = a - high_a, b - high_b
    return ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b


@_jit
def _exp_minus(x, m, temperature):
    """exp((x - m) / temperature) without the roundings of x - m and of the quotient, which at 20 would cost 8 ulp."""
    d = x - m
    v = d / temperature
    if not math.isfinite(v):
        return math.exp(v)
    b = d - x
    lost = (x - (d - b)) - (m + b)  # Knuth's TwoSum
    if temperature != 1 and v > -800:
        lost -= (v * temperature - d) + _product_error(v, temperature, v * temperature)
    return math.exp(v) * (1.0 + lost / temperature)


@_jit
def _mass(q, k, weight, on, off):
    share = on * q[k] + off if q.size else off
    return share * weight[k] if weight.size else share


@_jit
def _argmax(x, q, weight, on, off):
    """The first class of the largest mass, or without class probabilities of the largest logit."""
    at, best = 0, -np.inf
    for k in range(x.size):
        value = _mass(q, k, weight, on, off) if q.size else float(x[k])
        if value > best:
            at, best = k, value
    return at


@_jit
def _statistics(x, t, temperature):
    """(m, rest, infinite): m = max_k x_k, or 0 if none is finite; rest = sum_{k != t} exp((x_k - m) / temperature)."""
    m, infinite = -np.inf, False
    for k in range(x.size):
        if x[k] > m:
            m = float(x[k])
    if not math.isfinite(m):
        infinite = m > 0
        m = 0.0
    rest, lost = 0.0, 0.0
    for k in range(x.size):
        if k != t:
            rest, lost = _add(rest, lost, _exp_minus(float(x[k]), m, temperature))
    return m, rest, infinite


@_jit
def _log_parts(m, rest, x_t, temperature):
    """(nll, p_t, p_rest, lse, lse - m / temperature), each from the form that does not cancel."""
    e_t = _exp_minus(x_t, m, temperature)
    if e_t >= rest:
        odds = rest / e_t
        nll = math.log1p(odds)
        return nll, 1.0 / (1.0 + odds), odds / (1.0 + odds), x_t / temperature + nll, (x_t - m) / temperature + nll
    odds = e_t / rest
    log_sum = math.log(rest) + math.log1p(odds)
    nll = (m - x_t) / temperature + log_sum
    return nll, odds / (1.0 + odds), 1.0 / (1.0 + odds), m / temperature + log_sum, log_sum


@_jit
def _term(rule, parameter, nll, p, rest):
    """(f, df/dnll) of a class: the rules of `csrc/rules.h`."""
    if rule == FOCAL:  # (1 - p)^gamma nll
        factor = math.exp(parameter * math.log1p(-p)) if p < 0.5 else math.pow(rest, parameter)
        ratio = nll / rest if rest > 0 else 1.0
        slope = factor * (1.0 + (parameter * p * ratio if p > 0 else 0.0))
        return (factor if factor == 0 else factor * nll), slope
    if rule == POLY:  # nll + epsilon (1 - p)
        return nll + parameter * rest, 1.0 + parameter * p if p < 0.5 else (1.0 + parameter) - parameter * rest
    if rule == GENERALIZED:  # (1 - p^q) / q
        slope = math.pow(p, parameter) if p > 1e-300 else math.exp(-parameter * nll)
        return -math.expm1(-parameter * nll) / parameter, slope
    return nll, 1.0


@_jit
def _class_term(rule, parameter, nll):
    """`_term` of a class that is not the target."""
    nll = 0.0 if nll < 0 else nll  # by rounding, where p is 1
    if rule == CROSS_ENTROPY:
        return nll, 1.0
    return _term(rule, parameter, nll, math.exp(-nll), -math.expm1(-nll))


@_jit
def _combine(loss_t, slope_t, p_t, p_rest, lse, mass_t, loss_rest, slope_rest, row_weight, z_loss):
    """(loss, a, g_t, h) of loss = sum_k mass_k f_k + row_weight z_loss lse^2."""
    z = 0.0 if z_loss == 0 else z_loss * row_weight * lse
    own = 0.0 if mass_t == 0 and loss_t == loss_t else mass_t * loss_t
    slope = mass_t * slope_t
    g_t = slope_rest * p_t - slope * p_rest + 2 * z * p_t
    return own + loss_rest + (0.0 if z == 0 else z * lse), slope + slope_rest + 2 * z, g_t, slope + slope_rest


@_jit
def _rest_terms(x, q, t, m, lse_minus_m, weight, on, off, temperature, rule, parameter):
    """sums over k != t of mass_k f_k and mass_k s_k; mass 0 against -inf contributes 0."""
    loss, loss_lost, slope, slope_lost = 0.0, 0.0, 0.0, 0.0
    for k in range(x.size):
        mass = _mass(q, k, weight, on, off)
        if k != t and mass != 0:
            f, s = _class_term(rule, parameter, (m - x[k]) / temperature + lse_minus_m)
            loss, loss_lost = _add(loss, loss_lost, mass * f)
            slope, slope_lost = _add(slope, slope_lost, mass * s)
    return loss, slope


@_jit
def _write_gradient(x, q, out, hess, t, m, lse_minus_m, sums, scales, g_t, h_t, weight, on, off, rule, parameter,
                    temperature, tiny, floor):  # fmt: skip
    inverse_sum, a, h = sums
    scale, hess_scale = scales
    for k in range(x.size):
        p = _exp_minus(float(x[k]), m, temperature) * inverse_sum
        g = p * (scale * a)
        if abs(g) < tiny:
            g = 0.0
        if k == t:
            g = scale * g_t
        elif off != 0 or q.size:
            _, slope = _class_term(rule, parameter, (m - x[k]) / temperature + lse_minus_m)
            mass = _mass(q, k, weight, on, off)
            g -= scale * mass * slope if mass != 0 else 0.0
        out[k] = math.nan if math.isnan(lse_minus_m) else g
        if hess.size:
            curve = h_t if k == t else p * (1.0 - p)
            hess[k] = math.nan if math.isnan(lse_minus_m) else max(hess_scale * h * curve, floor)


@_jit
def _row(x, q, out, hess, target, weight, on, off, z_loss, s, scale, hess_scale, emit, rule, parameter, temperature,
         sparse, tiny, floor):  # fmt: skip
    """(loss, lse) of a row that counts; target -1: none; sparse: some classes are left out, as -inf."""
    t = target
    if t < 0 and (q.size or emit != 1):
        t = _argmax(x, q, weight, on, off)
    m, rest, infinite = _statistics(x, t, temperature)
    if t < 0:
        log_sum = math.nan if infinite else math.log(rest)
        inverse = 0.0 if sparse and rest == 0 else 1.0 / rest
        _write_gradient(x, q, out, hess, -1, m, log_sum, (inverse, 1.0, 0.0), (scale, 0.0), 0.0, 0.0, weight, on, 0.0,
                        rule, parameter, temperature, tiny, floor)  # fmt: skip
        return 0.0, m / temperature + log_sum
    x_t = float(x[t])
    nll, p_t, p_rest, lse, lse_minus_m = _log_parts(m, rest, x_t, temperature)
    if infinite:
        nll = p_t = p_rest = lse = lse_minus_m = math.nan
    if emit == 2:
        for k in range(x.size):
            out[k] = (x[k] - x_t) - nll
        return 0.0, lse
    w_t = weight[t] if weight.size else 1.0
    mass_t = w_t * (on * (q[t] if q.size else 1.0) + off)
    loss_rest, slope_rest = 0.0, 0.0
    if off != 0 or q.size:
        loss_rest, slope_rest = _rest_terms(
            x, q, t, m, lse_minus_m, weight, on, off, temperature, rule, parameter
        )  # fmt: skip
    loss_t, slope_t = _term(rule, parameter, nll, p_t, p_rest)
    row_weight = 1.0 if q.size else w_t
    loss, a, g_t, h = _combine(
        loss_t, slope_t, p_t, p_rest, lse, mass_t, loss_rest, slope_rest, row_weight, z_loss
    )  # fmt: skip
    if emit == 1:
        inverse = 1.0 / (rest + _exp_minus(x_t, m, temperature))
        _write_gradient(x, q, out, hess, t, m, lse_minus_m, (inverse, a, h), (scale * s, hess_scale * s), g_t,
                        p_t * p_rest, weight, on, off, rule, parameter, temperature, tiny, floor)  # fmt: skip
    return s * loss, lse


@_jit
def _distribution(x, temperature, log_probs):
    """(t, m, lse - m / temperature, 1 / sum, nll_t, p_t) with t the largest class."""
    if log_probs:
        return -1, 0.0, 0.0, 1.0, 0.0, 0.0
    t = _argmax(x, _EMPTY, _EMPTY, 0.0, 0.0)
    m, rest, infinite = _statistics(x, t, temperature)
    nll, p_t, _, _, lse_minus_m = _log_parts(m, rest, float(x[t]), temperature)
    if infinite:
        nll = p_t = lse_minus_m = math.nan
    return t, m, lse_minus_m, 1.0 / (rest + _exp_minus(float(x[t]), m, temperature)), nll, p_t


@_jit
def _log_prob(x, k, d, temperature):
    """(log p_k, p_k)"""
    t, m, lse_minus_m, inverse_sum, nll, p_t = d
    if k == t:
        return -nll, p_t
    return (x[k] - m) / temperature - lse_minus_m, _exp_minus(float(x[k]), m, temperature) * inverse_sum


@_jit
def _pair(x, y, k, model, other, temperature):
    """(p_k, q_k, log q_k - log p_k); without another distribution log q is 0."""
    log_p, p = _log_prob(x, k, model, temperature)
    if not y.size:
        return p, 0.0, -log_p
    log_q, q = _log_prob(y, k, other, temperature)
    return p, q, log_q - log_p


@_jit
def _bregman(d):
    """d + exp(-d) - 1 for |d| <= 0.5, by its series."""
    total = 1.0
    for i in range(16, 2, -1):
        total = 1.0 - total * (d / i)
    return total * d * d / 2


@_jit
def _divergence_row(x, y, out, hess, s, scale, hess_scale, emit, rule, temperature, log_probs, floor):
    """s KL(q || p) or s KL(p || q) of a row: see `csrc/divergence_tpl.h`."""
    reverse, plain = rule == KL_REVERSE, log_probs or not y.size
    model = _distribution(x, temperature, log_probs)
    other = _distribution(y, temperature, log_probs) if y.size else model
    loss, lost = 0.0, 0.0
    for k in range(x.size):
        p, q, d = _pair(x, y, k, model, other, temperature)
        mass, against, ratio = (p, q, -d) if reverse else (q, p, d)
        if not plain and abs(ratio) <= 0.5:
            term = mass * _bregman(ratio)
        else:
            term = 0.0 if mass == 0 and not math.isnan(against) else mass * ratio
            term += 0.0 if plain else against - mass
        loss, lost = _add(loss, lost, term)
    if emit == 0:
        return s * loss
    shift = -1.0 if log_probs else loss
    for k in range(x.size):
        p, q, d = _pair(x, y, k, model, other, temperature)
        g = (0.0 if log_probs else p) - q
        if reverse:
            g = 0.0 if p == 0 else -p * (d + shift)
        out[k] = math.nan if math.isnan(loss) else scale * s * g
        if hess.size:
            hess[k] = math.nan if math.isnan(loss) else max(hess_scale * s * p * (1.0 - p), floor)
    return s * loss


@_jit
def _limit_lse(x):
    """logsumexp where the formula is NaN: it alone has limits where a loss has none."""
    limit = -math.inf
    for k in range(x.size):
        if math.isnan(x[k]):
            return math.nan
        if x[k] == math.inf:
            limit = math.inf
    return limit


@_jit
def _rows(x, q, out, hess, target, has_target, ignore_index, weight, sample_weight, upstream, on, off, z_loss, scale,
          hess_scale, emit, rule, parameter, temperature, sparse, log_probs, tiny, floor, loss, lse):  # fmt: skip
    total, lost = 0.0, 0.0
    for i in range(x.shape[0]):
        s = sample_weight[i] if sample_weight.size else 1.0
        t = target[i] if has_target else -1
        if s == 0 or (has_target and t == ignore_index):
            if loss.size:
                loss[i] = 0
            if emit:
                out[i, :] = 0
                hess[i, :] = 0
            continue
        u = upstream[i] if upstream.size else 1.0
        row_lse = 0.0
        if rule in (KL_FORWARD, KL_REVERSE):
            row_loss = _divergence_row(x[i], q[i], out[i], hess[i], s, u * scale, u * hess_scale, emit, rule,
                                       temperature, log_probs, floor)  # fmt: skip
        else:
            row_loss, row_lse = _row(x[i], q[i], out[i], hess[i], t, weight, on, off, z_loss, s, u * scale,
                                     u * hess_scale, emit, rule, parameter, temperature, sparse, tiny,
                                     floor)  # fmt: skip
        total, lost = _add(total, lost, row_loss)
        if loss.size:
            loss[i] = row_loss
        if lse.size:
            lse[i] = _limit_lse(x[i]) if math.isnan(row_lse) else row_lse
    return total


@_jit
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


@_jit
def _softplus_parts(z):
    """(log1p(e), sigmoid(z), sigmoid(-z), softplus(z), softplus(-z)) with e = exp(-|z|)"""
    e = math.exp(-abs(z))
    log1p_e, most = math.log1p(e), 1.0 / (1.0 + e)
    p, q = (most, e * most) if z >= 0 else (e * most, most)
    if math.isnan(z):
        p = q = z
    return log1p_e, p, q, (z if z > 0 else 0.0) + log1p_e, (-z if z < 0 else 0.0) + log1p_e


@_jit
def _times(mass, value):
    """mass * value, where 0 * inf is 0 and NaN stays."""
    return 0.0 if mass == 0 and value == value else mass * value


@_jit
def _binary(z, down, up):
    """(loss, gradient, Hessian): see `csrc/elements_tpl.h`, as for the others."""
    _, p, q, above, below = _softplus_parts(z)
    return _times(down, above) + _times(up, below), down * p - up * q, (down + up) * (p * q)


@_jit
def _binary_probability(x, down, up):
    high, low = -math.log1p(-x), -math.log(x)
    high, low = 100.0 if high > 100 else high, 100.0 if low > 100 else low
    return down * high + up * low, (x * down - (1 - x) * up) / max(x * (1 - x), 1e-12), 0.0


@_jit
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


@_jit
def _elements(z, y, weight, pos_weight, sample_weight, upstream, rule, gamma, alpha, on, off, scale, hess_scale, floor,
              loss, out, hess):  # fmt: skip
    """(sum of the losses, whether a target that counts is outside [0, 1])"""
    total, lost, bad = 0.0, 0.0, False
    for i in range(z.size):
        s = sample_weight[i] if sample_weight.size else 1.0
        if s == 0:
            loss[i] = out[i] = hess[i] = 0.0
            continue
        bad = bad or y[i] < 0 or y[i] > 1
        w = weight[i] if weight.size else 1.0
        up = (pos_weight[i] if pos_weight.size else 1.0) * (w * (on * y[i] + off))
        down = w * (on * (1 - y[i]) + off)
        if rule == BINARY_FOCAL:
            f, g, h = _binary_focal(z[i], y[i], gamma, alpha)
        elif rule == BINARY_PROBABILITY:
            f, g, h = _binary_probability(z[i], down, up)
        else:
            f, g, h = _binary(z[i], down, up)
        u = upstream[i] if upstream.size else 1.0
        loss[i], out[i] = s * f, scale * s * u * g
        hess[i] = max(hess_scale * s * u * h, floor)
        total, lost = _add(total, lost, s * f)
    return total, bad


def _or_empty(array: np.ndarray | None) -> np.ndarray:
    return _EMPTY if array is None else array


def _int64(target: np.ndarray | None) -> np.ndarray:
    """Class indices as int64; what does not fit is no class and no ignore_index either."""
    if target is None:
        return np.empty(0, np.int64)
    if target.dtype == np.uint64:
        target = np.minimum(target, np.uint64(np.iinfo(np.int64).max))
    return target.astype(np.int64, copy=False)


def _index(array: np.ndarray, first: int, last: int):
    """An index of `array` (outer..., n_classes) that selects its rows [first, last)."""
    if array.ndim == 2:
        return slice(first, last)
    if array.ndim == 1:
        return np.newaxis
    return np.unravel_index(np.arange(first, last), array.shape[:-1])


def _block(array: np.ndarray | None, dtype: np.dtype, first: int, last: int) -> np.ndarray:
    if array is None:
        return np.empty((last - first, 0), dtype)
    return np.ascontiguousarray(array[_index(array, first, last)], dtype)


def _logits_block(job: Job, dtype: np.dtype, first: int, last: int) -> tuple[np.ndarray, np.ndarray | None]:
    """(logits capped, classes that are left out at -inf; the softcap's derivative)"""
    x, slope = _block(job.logits, dtype, first, last), None
    if job.softcap is not None:
        with np.errstate(all="ignore"):
            slope = np.cosh(x / job.softcap) ** -2.0
        x = job.softcap * np.tanh(x / job.softcap)
    if job.left_out is not None:
        x = x.copy()
        np.put_along_axis(x, job.left_out[first:last], -np.inf, -1)
    return x, slope


def _run_block(job: Job, plan: Plan, first: int) -> float:
    last = min(first + plan.block_rows, plan.n_rows)
    dtype = plan.compute_dtype
    x, slope = _logits_block(job, dtype, first, last)
    emit = (None, "gradient", "log_softmax").index(job.emit)
    out = np.empty((last - first, plan.n_classes if emit else 0), dtype)
    hess = np.empty((last - first, 0 if job.hess is None else plan.n_classes), dtype)

    def part(array):
        return _EMPTY if array is None else array[first:last]

    total = _rows(
        x, _block(job.soft, dtype, first, last), out, hess,
        _int64(None if job.rows.target is None else part(job.rows.target)), job.rows.target is not None,
        job.rows.ignore_index, _or_empty(job.rows.weight), part(job.rows.sample_weight), part(job.upstream),
        job.on, job.off, job.z_loss, job.scale, job.hess_scale, emit, RULES.index(job.rule), job.parameter,
        job.temperature, job.left_out is not None, job.log_probs, float(np.finfo(dtype).tiny), job.floor,
        np.empty(0, dtype) if job.loss is None else job.loss[first:last],
        np.empty(0, dtype) if job.lse is None else job.lse[first:last],
    )  # fmt: skip
    with np.errstate(all="ignore"):  # a float16 gradient may overflow to inf, NaN stays NaN
        if slope is not None:  # rows that do not count, whatever they hold, have 0
            out = np.where(out == 0, 0, out * slope) if out.size else out
            hess = np.where(hess > 0, np.maximum(hess * slope**2, job.floor), hess) if hess.size else hess
        for given, made in (job.out, out), (job.hess, hess):
            if given is not None:
                given[_index(given, first, last)] = made
    return total


def _each_block(plan: Plan, work: Callable[[int], Any]) -> list:
    """The results of the blocks, in order."""
    starts = range(0, plan.n_rows, plan.block_rows)
    if plan.n_threads == 1:
        return [work(first) for first in starts]
    with ThreadPoolExecutor(plan.n_threads) as pool:
        return list(pool.map(work, starts))


def run(job: Job, plan: Plan) -> tuple[float, int, int, float]:
    bad, counted, weight_sum = scan_targets(job.rows, plan.n_rows, plan.n_classes)
    if bad >= 0:
        return math.nan, bad, counted, weight_sum
    sums = _each_block(plan, lambda first: _run_block(job, plan, first))
    return _sum_in_order(np.array(sums, np.float64)), bad, counted, weight_sum


def _run_elements_block(job: ElementJob, plan: Plan, first: int) -> tuple[float, bool]:
    n = min(plan.block_rows, plan.n_rows - first)
    place: Any = slice(first, first + n)
    if job.logits.ndim > 1:
        place = np.unravel_index(np.arange(first, first + n), job.logits.shape)

    def part(array):
        return _EMPTY if array is None else array[place].astype(np.float64)

    loss, out, hess = np.empty(n), np.empty(n), np.empty(n)
    found = _elements(
        part(job.logits), part(job.target), part(job.weight), part(job.pos_weight), part(job.sample_weight),
        part(job.upstream), RULES.index(job.rule), job.gamma, -1.0 if job.alpha is None else job.alpha, job.on, job.off,
        job.scale, job.hess_scale, job.floor, loss, out, hess,
    )  # fmt: skip
    with np.errstate(all="ignore"):
        for given, made in ((job.loss, loss), (job.out, out), (job.hess, hess)):
            if given is not None:
                given[place] = made
    return found


def run_elements(job: ElementJob, plan: Plan) -> tuple[float, bool]:
    found = _each_block(plan, lambda first: _run_elements_block(job, plan, first))
    return _sum_in_order(np.array([total for total, _ in found])), any(bad for _, bad in found)


def label_range(labels: np.ndarray, n_threads: int) -> tuple[int, int]:
    return int(labels.min()), int(labels.max())


def number_strings(strings: np.ndarray) -> None:
    return None  # the dict of the caller is as fast as NumPy's sort


def _outside(proba: np.ndarray) -> bool:
    """Whether a value is not in [0, 1], in one pass: as unsigned integers, NaN and all negative numbers are above 1."""
    bits = np.dtype(f"u{proba.itemsize}")
    if proba.view(bits).max() <= np.ones((), proba.dtype).view(bits):
        return False
    return not (proba.min() >= 0 and proba.max() <= 1)  # -0.0 is right


def _run_probabilities_block(job: ProbabilityJob, plan: Plan, seen: np.ndarray, first: int) -> tuple[float, bool, bool]:
    rows = slice(first, first + plan.block_rows)
    proba, columns = np.ascontiguousarray(job.proba[rows]), np.subtract(job.labels[rows], job.low, dtype=np.int64)
    outside, sums_to_one = _outside(proba), True
    seen[columns] = True
    if proba.ndim == 1:
        picked = np.where(columns == 1, proba, 1 - proba)
    else:
        ones = np.ones(proba.shape[1], np.result_type(proba.dtype, np.float32))
        sums = proba.astype(ones.dtype, copy=False) @ ones  # a quarter of the time of sum(axis=1)
        sums_to_one = bool((abs(sums - 1) <= job.tolerance).all())
        picked = np.take_along_axis(proba, columns[:, np.newaxis], 1)[:, 0]
    eps = proba.dtype.type(job.eps)
    picked = np.clip(picked, eps, 1 - eps)
    if job.picked is not None:
        job.picked[rows] = picked
        return 0.0, outside, sums_to_one
    loss = -np.log(picked)
    return float((loss if job.weight is None else loss * job.weight[rows]).sum()), outside, sums_to_one


def run_probabilities(job: ProbabilityJob, plan: Plan) -> tuple[float, bool, bool, bool]:
    """In NumPy, block by block: its logarithm is vectorized."""
    seen = np.zeros(2 if job.proba.ndim == 1 else job.proba.shape[1], bool)
    found = _each_block(plan, lambda first: _run_probabilities_block(job, plan, seen, first))
    sums, outside, sums_to_one = zip(*found, strict=True)
    return _sum_in_order(np.array(sums)), any(outside), all(sums_to_one), bool(seen.all())
