"""The fallback: the rows of `csrc/rows_tpl.h` and the rule of `csrc/rules.h` in plain loops, jitted.

Serial kernels that release the GIL, over blocks of rows in a thread pool: Numba's own thread pools do not survive a
fork (omp) or two Python threads (workqueue). What Numba cannot read (16-bit floats, a strided class axis) is copied
block by block by NumPy, so that nothing of the logits' size is made.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

from ce_fast.backends import Job, Rows
from ce_fast.plan import Plan

_jit = numba.njit(cache=True, nogil=True, error_model="numpy")
_EMPTY = np.empty(0)


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
def _exp_minus(x, m):
    """exp(x - m) without the rounding of x - m, which at a distance of 20 would cost 8 ulp (Knuth's TwoSum)."""
    d = x - m
    if not math.isfinite(d):
        return math.exp(d)
    b = d - x
    return math.exp(d) * (1.0 + ((x - (d - b)) - (m + b)))


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
def _statistics(x, t):
    """(m, rest, infinite): m = max_k x_k, or 0 if none is finite; rest = sum_{k != t} exp(x_k - m)."""
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
            rest, lost = _add(rest, lost, _exp_minus(float(x[k]), m))
    return m, rest, infinite


@_jit
def _log_parts(m, rest, x_t):
    """(nll, p_t, p_rest, lse, lse - m), each from the form that does not cancel."""
    e_t = _exp_minus(x_t, m)
    if e_t >= rest:
        odds = rest / e_t
        nll = math.log1p(odds)
        return nll, 1.0 / (1.0 + odds), odds / (1.0 + odds), x_t + nll, (x_t - m) + nll
    odds = e_t / rest
    log_sum = math.log(rest) + math.log1p(odds)
    return (m - x_t) + log_sum, odds / (1.0 + odds), 1.0 / (1.0 + odds), m + log_sum, log_sum


@_jit
def _cross_entropy_rule(nll, lse, p_t, p_rest, mass_t, mass_rest, cross_rest, row_weight, z_loss):
    """(loss, a, g_t) of loss = sum_k mass_k (lse - x_k) + row_weight z_loss lse^2."""
    z = 0.0 if z_loss == 0 else z_loss * row_weight * lse
    own = 0.0 if mass_t == 0 and nll == nll else mass_t * nll
    loss = own + cross_rest + (0.0 if z == 0 else z * lse)
    mass = mass_t + mass_rest
    g_t = mass_rest - mass * p_rest if mass_t > mass_rest else mass * p_t - mass_t
    return loss, mass + 2 * z, g_t + 2 * z * p_t


@_jit
def _cross_rest(x, q, t, m, lse_minus_m, weight, on, off):
    """(sum_{k != t} mass_k, sum_{k != t} mass_k (lse - x_k)); mass 0 against -inf contributes 0."""
    mass_rest, mass_lost, cross, cross_lost = 0.0, 0.0, 0.0, 0.0
    for k in range(x.size):
        mass = _mass(q, k, weight, on, off)
        if k != t and mass != 0:
            mass_rest, mass_lost = _add(mass_rest, mass_lost, mass)
            cross, cross_lost = _add(cross, cross_lost, mass * ((m - x[k]) + lse_minus_m))
    return mass_rest, cross


@_jit
def _write_gradient(x, q, out, t, m, lse, a_over_sum, scale, g_t, weight, on, off, tiny):
    for k in range(x.size):
        e = _exp_minus(float(x[k]), m)
        g = e * a_over_sum
        if abs(g) < tiny:
            g = 0.0
        if k == t:
            g = g_t
        elif off != 0 or q.size:
            g -= scale * _mass(q, k, weight, on, off)
        out[k] = math.nan if math.isnan(lse) else g


@_jit
def _row(x, q, out, target, weight, on, off, z_loss, s, scale, emit, tiny):
    """(loss, lse) of a row that counts; target -1: none."""
    t = target
    if t < 0 and (q.size or emit != 1):
        t = _argmax(x, q, weight, on, off)
    m, rest, infinite = _statistics(x, t)
    if t < 0:
        lse = math.nan if infinite else m + math.log(rest)
        _write_gradient(x, q, out, -1, m, lse, 1.0 / rest, 0.0, 0.0, weight, on, 0.0, tiny)
        return 0.0, lse
    x_t = float(x[t])
    nll, p_t, p_rest, lse, lse_minus_m = _log_parts(m, rest, x_t)
    if infinite:
        nll = p_t = p_rest = lse = lse_minus_m = math.nan
    if emit == 2:
        for k in range(x.size):
            out[k] = (x[k] - x_t) - nll
        return 0.0, lse
    w_t = weight[t] if weight.size else 1.0
    mass_t = w_t * (on * (q[t] if q.size else 1.0) + off)
    mass_rest, cross_rest = 0.0, 0.0
    if off != 0 or q.size:
        mass_rest, cross_rest = _cross_rest(x, q, t, m, lse_minus_m, weight, on, off)
    row_weight = 1.0 if q.size else w_t
    loss, a, g_t = _cross_entropy_rule(nll, lse, p_t, p_rest, mass_t, mass_rest, cross_rest, row_weight, z_loss)
    if emit == 1:
        a_over_sum = scale * s * a / (rest + _exp_minus(x_t, m))
        _write_gradient(x, q, out, t, m, lse, a_over_sum, scale * s, scale * s * g_t, weight, on, off, tiny)
    return s * loss, lse


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
def _rows(x, q, out, target, has_target, ignore_index, weight, sample_weight, upstream,
          on, off, z_loss, scale, emit, tiny, loss, lse):  # fmt: skip
    total, lost = 0.0, 0.0
    for i in range(x.shape[0]):
        s = sample_weight[i] if sample_weight.size else 1.0
        t = target[i] if has_target else -1
        if s == 0 or (has_target and t == ignore_index):
            if loss.size:
                loss[i] = 0
            if emit:
                out[i, :] = 0
            continue
        u = scale * (upstream[i] if upstream.size else 1.0)
        row_loss, row_lse = _row(x[i], q[i], out[i], t, weight, on, off, z_loss, s, u, emit, tiny)
        total, lost = _add(total, lost, row_loss)
        if loss.size:
            loss[i] = row_loss
        if lse.size:
            lse[i] = _limit_lse(x[i]) if math.isnan(row_lse) else row_lse
    return total


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


def _run_block(job: Job, plan: Plan, first: int) -> float:
    last = min(first + plan.block_rows, plan.n_rows)
    dtype = plan.compute_dtype
    x = _block(job.logits, dtype, first, last)
    emit = (None, "gradient", "log_softmax").index(job.emit)
    out = np.empty((last - first, plan.n_classes if emit else 0), dtype)

    def part(array):
        return _EMPTY if array is None else array[first:last]

    total = _rows(
        x, _block(job.soft, dtype, first, last), out,
        _int64(None if job.rows.target is None else part(job.rows.target)), job.rows.target is not None,
        job.rows.ignore_index, _or_empty(job.rows.weight), part(job.rows.sample_weight), part(job.upstream),
        job.on, job.off, job.z_loss, job.scale, emit, float(np.finfo(dtype).tiny),
        np.empty(0, dtype) if job.loss is None else job.loss[first:last],
        np.empty(0, dtype) if job.lse is None else job.lse[first:last],
    )  # fmt: skip
    if job.out is not None:
        with np.errstate(over="ignore", invalid="ignore"):  # a float16 gradient may overflow to inf, NaN stays NaN
            job.out[_index(job.out, first, last)] = out
    return total


def run(job: Job, plan: Plan) -> float:
    starts = range(0, plan.n_rows, plan.block_rows)
    if plan.n_threads == 1:
        sums = [_run_block(job, plan, first) for first in starts]
    else:
        with ThreadPoolExecutor(plan.n_threads) as pool:
            sums = list(pool.map(lambda first: _run_block(job, plan, first), starts))
    return _sum_in_order(np.array(sums, np.float64))
