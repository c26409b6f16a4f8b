"""The fallback: the rows, elements and rules of `csrc/` in jitted loops.

Serial kernels that release the GIL, over blocks of rows in a thread pool: Numba's own thread pools do not survive a
fork (omp) or two Python threads (workqueue). Rows of class indices are read and written where they are; what needs more
(class probabilities, a softcap, a Hessian, odd strides) is copied block by block by NumPy, so that nothing of the
logits' size is made.
"""

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numba
import numpy as np

from ce_fast.backends import RULES, ElementJob, Job, ProbabilityJob, Rows
from ce_fast.backends.numba_columns import MOST_CLASSES, STRIP
from ce_fast.backends.numba_columns import columns as _columns
from ce_fast.backends.numba_elements import elements as _elements
from ce_fast.backends.numba_math import BFLOAT16, FLOAT16, NATIVE, add, jit, make_temperature
from ce_fast.backends.numba_measure import measure_rows as _measure_rows
from ce_fast.backends.numba_rows import divergence_rows as _divergence_rows
from ce_fast.backends.numba_rows import rows as _rows
from ce_fast.plan import Plan

_EMPTY = np.empty(0)
_EMITS = (None, "gradient", "log_softmax")
MOST_BLOCKS = 16  # of a piece of work, which costs some 50 us of Python
_idle_pools: dict[int, list[ThreadPoolExecutor]] = {}  # by threads
_HELD = {"bfloat16": BFLOAT16, "float16": FLOAT16}


def empty_like(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return np.empty_like(array, dtype, subok=False)


def small_call(logits, target, ignore_index: int, gradient: bool) -> None:
    return None  # the general way


def small_call_at(*what) -> None:
    return None


def max_threads() -> int:
    limit = int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]  # set when numba is imported
    omp = os.environ.get("OMP_NUM_THREADS", "")
    return min(limit, int(omp)) if omp.isdigit() else limit


def config() -> dict:
    return {"isa": numba.config.CPU_NAME or "native", "isas": (), "openmp": False}  # type: ignore[attr-defined]


@jit
def _sum_in_order(values):
    total, lost = 0.0, 0.0
    for value in values:
        total, lost = add(total, lost, value)
    return total


@jit
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
        total, lost = add(total, lost, s)
    return -1, counted, total


def scan_targets(rows: Rows, n_rows: int, n_classes: int) -> tuple[int, int, float]:
    has_target = rows.target is not None
    return _scan(
        _int64(rows.target), has_target, rows.ignore_index, _or_empty(rows.weight), _or_empty(rows.sample_weight),
        n_rows, n_classes,
    )  # fmt: skip


def _writable(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """As kernels take it, copied where it is not so: a read-only array would be one more type to compile for."""
    if array.dtype == dtype and array.flags.carray:
        return array
    return np.require(array, dtype, ("C", "A", "W"))


def _or_empty(array: np.ndarray | None) -> np.ndarray:
    return _EMPTY if array is None else _writable(array, array.dtype)


def _int64(target: np.ndarray | None) -> np.ndarray:
    """Class indices as int64; what does not fit is no class and no ignore_index either."""
    if target is None:
        return np.empty(0, np.int64)
    if target.dtype == np.uint64:
        target = np.minimum(target, np.uint64(np.iinfo(np.int64).max))
    return _writable(target, np.dtype(np.int64))


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
    return _writable(array[_index(array, first, last)], dtype)


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


def _storage(array: np.ndarray) -> tuple[np.ndarray, int]:
    """An array as Numba reads it, and what it holds."""
    held = NATIVE if array.itemsize > 2 else _HELD[array.dtype.name]
    return (array if held == NATIVE else array.view(np.uint16)), held


def _readable(array: np.ndarray | None, dtype: np.dtype) -> bool:
    """Whether kernels can work on the array where it is, in the compute dtype given."""
    if array is None:
        return True
    known = array.dtype == dtype or (dtype == np.float32 and array.dtype.isnative and array.dtype.name in _HELD)
    return known and array.flags.aligned and array.flags.writeable


def _in_place(job: Job, plan: Plan) -> bool:
    """Whether the kernels can read the logits where they are, and write the gradient, but for strides."""
    dtype = plan.compute_dtype
    plain = job.soft is None and job.off == 0 and job.hess is None and job.left_out is None and job.softcap is None
    return plain and not job.rule.startswith("kl_") and _readable(job.logits, dtype) and _readable(job.out, dtype)


def _contiguous_rows(array: np.ndarray | None) -> bool:
    return array is None or (array.ndim == 2 and array.flags.c_contiguous)


def _groups(array: np.ndarray) -> np.ndarray | None:
    """An array (outer..., n_classes) as (groups, rows, n_classes), where that is a view."""
    outer, strides = array.shape[:-1], array.strides
    if any(strides[d] != strides[d + 1] * outer[d + 1] for d in range(1, len(outer) - 1)):
        return None
    n_groups = outer[0] if len(outer) > 1 else 1
    return array.reshape(n_groups, math.prod(outer[1:]) if len(outer) > 1 else math.prod(outer), array.shape[-1])


def _are_columns(job: Job, plan: Plan) -> bool:
    """Whether rows of class indices are better taken many at a time."""
    strided = job.logits.strides[-1] != job.logits.itemsize
    most = MOST_CLASSES * (8 if strided else 1)
    asked = job.rows.target is not None and job.lse is None and job.emit != "log_softmax"
    arrays = [job.logits] if job.out is None else [job.logits, job.out]
    few = plan.n_classes <= most and plan.n_rows >= STRIP
    return few and asked and all(_groups(array) is not None for array in arrays)


def _run_columns(job: Job, plan: Plan, first: int, last: int) -> float:
    logits = _groups(job.logits)
    out = None if job.out is None else _groups(job.out)
    assert logits is not None and job.rows.target is not None
    dtype, n_group, total = plan.compute_dtype, logits.shape[1], 0.0

    def part(array, start, stop):
        return _or_empty(None if array is None else array[start:stop])

    while first < last:
        group, row = divmod(first, n_group)
        n = min(n_group - row, last - first)
        x, stop = logits[group, row : row + n], first + n
        total += _columns(
            *_storage(x), *_storage(np.empty((n, 0), dtype) if out is None else out[group, row : row + n]),
            np.empty(0, dtype), _int64(part(job.rows.target, first, stop)), job.rows.ignore_index,
            _or_empty(job.rows.weight), part(job.rows.sample_weight, first, stop), part(job.upstream, first, stop),
            job.z_loss, job.scale, out is not None, RULES.index(job.rule), job.parameter,
            make_temperature(job.temperature, dtype), float(np.finfo(dtype).tiny),
            np.empty(0, dtype) if job.loss is None else job.loss[first:stop],
        )  # fmt: skip
        first = stop
    return total


def _run_block(job: Job, plan: Plan, first: int, last: int, in_place: bool) -> float:
    dtype, emit = plan.compute_dtype, _EMITS.index(job.emit)
    n, n_classes = last - first, plan.n_classes
    slope = None
    if in_place:
        x = job.logits[first:last]
        out = np.empty((n, 0), dtype) if job.out is None else job.out[first:last]
    else:
        x, slope = _logits_block(job, dtype, first, last)
        out = np.empty((n, n_classes if emit else 0), dtype)
    hess = np.empty((n, 0 if job.hess is None else n_classes), dtype)
    loss = np.empty(0, dtype) if job.loss is None else job.loss[first:last]
    lse = np.empty(0, dtype) if job.lse is None else job.lse[first:last]

    def part(array):
        return _or_empty(None if array is None else array[first:last])

    temperature = make_temperature(job.temperature, dtype)
    q = _block(job.soft, dtype, first, last)
    rule = RULES.index(job.rule)
    if job.rule.startswith("kl_"):
        total = _divergence_rows(
            x, q, out, hess, part(job.rows.sample_weight), part(job.upstream), job.scale, job.hess_scale, emit, rule,
            temperature, job.log_probs, job.floor, loss,
        )  # fmt: skip
    else:
        store_there = in_place and emit == 1 and out.dtype == dtype
        e = out if store_there else np.empty((1, n_classes if emit == 1 else 0), dtype)
        has_target = job.rows.target is not None
        total = _rows(
            *_storage(x), q, *_storage(out), hess, e, np.empty(0, dtype),
            _int64(part(job.rows.target) if has_target else None), has_target, job.rows.ignore_index,
            _or_empty(job.rows.weight), part(job.rows.sample_weight), part(job.upstream), job.on, job.off, job.z_loss,
            job.scale, job.hess_scale, emit, rule, job.parameter, temperature, job.left_out is not None,
            float(np.finfo(dtype).tiny), job.floor, loss, lse,
        )  # fmt: skip
    if in_place:
        return total
    with np.errstate(all="ignore"):  # a float16 gradient may overflow to inf, NaN stays NaN
        if slope is not None:  # rows that do not count, whatever they hold, have 0
            out = np.where(out == 0, 0, out * slope) if out.size else out
            hess = np.where(hess > 0, np.maximum(hess * slope**2, job.floor), hess) if hess.size else hess
        for given, made in (job.out, out), (job.hess, hess):
            if given is not None:
                given[_index(given, first, last)] = made
    return total


@contextmanager
def _pool(n_threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads of this call alone: those of an earlier one that has ended, for starting two took 130 us.

    A forked child, where they are gone, never asks: it runs on one thread.
    """
    idle = _idle_pools.setdefault(n_threads, [])
    try:
        pool = idle.pop()
    except IndexError:
        pool = ThreadPoolExecutor(n_threads, "ce_fast")
    try:
        yield pool
    finally:
        idle.append(pool)


def _each_block(plan: Plan, work: Callable[[int, int], Any], most: int = 1) -> list:
    """The results of pieces of up to `most` blocks, in order; cut by the shape alone, so that the bits are."""
    n_blocks = -(-plan.n_rows // plan.block_rows)
    step = plan.block_rows * max(1, min(most, n_blocks // 32))
    pieces = [(first, min(first + step, plan.n_rows)) for first in range(0, plan.n_rows, step)]
    if plan.n_threads == 1 or len(pieces) == 1:
        return [work(*piece) for piece in pieces]
    with _pool(plan.n_threads) as pool:
        return list(pool.map(lambda piece: work(*piece), pieces))


def run(job: Job, plan: Plan) -> tuple[float, int, int, float]:
    bad, counted, weight_sum = scan_targets(job.rows, plan.n_rows, plan.n_classes)
    if bad >= 0:
        return math.nan, bad, counted, weight_sum
    in_place = _in_place(job, plan)
    if in_place and _are_columns(job, plan):
        sums = _each_block(plan, lambda first, last: _run_columns(job, plan, first, last), MOST_BLOCKS)
    else:
        in_place = in_place and _contiguous_rows(job.logits) and _contiguous_rows(job.out)
        most = MOST_BLOCKS if in_place else 1
        sums = _each_block(plan, lambda first, last: _run_block(job, plan, first, last, in_place), most)
    return _sum_in_order(np.array(sums, np.float64)), bad, counted, weight_sum


def measure(job: Job, plan: Plan, values, target_logit: np.ndarray | None) -> int:
    rows, dtype = job.rows, np.dtype(np.float64)
    counts = np.ones(plan.n_rows, bool) if rows.sample_weight is None else rows.sample_weight != 0
    if target_logit is None:
        bad, _, _ = scan_targets(rows, plan.n_rows, plan.n_classes)
        if bad >= 0:
            return bad
        counts &= True if rows.target is None else rows.target != rows.ignore_index
    target, has_target = _int64(rows.target), rows.target is not None
    names = ("lse", "log_prob", "max", "entropy", "sum_sq_prob", "brier", "argmax", "rank")

    def work(first, last):
        part = slice(first, last)
        _measure_rows(
            _block(job.logits, dtype, first, last), counts[part], target[part], has_target,
            _EMPTY if target_logit is None else target_logit[part], make_temperature(job.temperature, dtype),
            *(getattr(values, name)[part] for name in names),
        )  # fmt: skip

    _each_block(plan, work)
    return -1


def _run_elements_block(job: ElementJob, dtype: np.dtype, first: int, last: int) -> tuple[float, bool]:
    place: Any = slice(first, last)
    if job.logits.ndim > 1:
        place = np.unravel_index(np.arange(first, last), job.logits.shape)

    def part(array):
        return np.empty(0, dtype) if array is None else _writable(array[place], dtype)

    def room(array):
        """Where the kernel may write: the array itself, if it can."""
        if array is None:
            return np.empty(0, dtype)
        there = array.ndim == 1 and array.dtype == dtype and array.flags.c_contiguous
        return array[place] if there else np.empty(last - first, dtype)

    made = [room(array) for array in (job.loss, job.out, job.hess)]
    found = _elements(
        part(job.logits), part(job.target), part(job.weight), part(job.pos_weight), part(job.sample_weight),
        part(job.upstream), RULES.index(job.rule), job.gamma, -1.0 if job.alpha is None else job.alpha, job.on, job.off,
        job.scale, job.hess_scale, job.floor, *made,
    )  # fmt: skip
    with np.errstate(all="ignore"):
        for given, result in zip((job.loss, job.out, job.hess), made, strict=True):
            if given is not None and not np.may_share_memory(given, result):
                given[place] = result
    return found


def run_elements(job: ElementJob, plan: Plan) -> tuple[float, bool]:
    dtype = plan.compute_dtype if job.rule == "binary" else np.dtype(np.float64)
    found = _each_block(plan, lambda first, last: _run_elements_block(job, dtype, first, last), 4)
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


def _run_probabilities_block(job: ProbabilityJob, seen: np.ndarray, first: int, last: int) -> tuple[float, bool, bool]:
    rows = slice(first, last)
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
    found = _each_block(plan, lambda first, last: _run_probabilities_block(job, seen, first, last))
    sums, outside, sums_to_one = zip(*found, strict=True)
    return _sum_in_order(np.array(sums)), any(outside), all(sums_to_one), bool(seen.all())
