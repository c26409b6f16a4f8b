"""What evaluation asks of each row of logits, in one pass: `row_stats`, and the same of a row in parts."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from ce_fast import backends, engine, inputs
from ce_fast.backends import Job, Rows
from ce_fast.inputs import Logits


@dataclass(frozen=True, slots=True)
class RowStats:
    """Of each row of logits z, an array each of their shape without the class axis.

    Attributes
    ----------
    lse : ndarray of float
        log sum_k exp(z_k).
    log_prob : ndarray of float, or None
        z_t - lse of the target t, in nats.
    max, argmax : ndarray of float, and of int64
        The largest z, and the first class that has it.
    rank : ndarray of int64, or None
        How many classes come before the target: those of larger z, or of equal z and a lower index. 0 where the target
        is the argmax; it is among the k likeliest where rank < k.
    entropy : ndarray of float
        sum_k p_k (lse - z_k), in nats.
    sum_sq_prob : ndarray of float
        sum_k p_k^2.
    """

    lse: np.ndarray
    log_prob: np.ndarray | None
    max: np.ndarray
    argmax: np.ndarray
    rank: np.ndarray | None
    entropy: np.ndarray
    sum_sq_prob: np.ndarray


@dataclass(frozen=True, slots=True)
class RowValues:
    """The same in double precision, (n_rows,) each in C order over the outer axes; NaN and -1 where a row is not read.

    brier: (1 - p_t)^2 + sum_{k != t} p_k^2. Without a target log_prob is NaN, and rank -1.
    """

    lse: np.ndarray
    log_prob: np.ndarray
    max: np.ndarray
    argmax: np.ndarray
    rank: np.ndarray
    entropy: np.ndarray
    sum_sq_prob: np.ndarray
    brier: np.ndarray


def _unread(n_rows: int) -> RowValues:
    return RowValues(
        *(np.full(n_rows, -1 if f.name in ("argmax", "rank") else np.nan) for f in fields(RowValues))
    )  # fmt: skip


def row_values(
    logits: Logits,
    rows: Rows,
    *,
    temperature: float = 1.0,
    n_threads: int | None = None,
    target_logit: np.ndarray | None = None,  # (n_rows,) float64, see `part_values`
) -> RowValues:
    """IndexError if a target is no class."""
    plan = engine.make_call_plan(logits, n_threads)
    values = _unread(plan.n_rows)
    bad = backends.active().measure(Job(logits.rows, rows, temperature=temperature), plan, values, target_logit)
    inputs.check_target_found(bad, rows, logits)
    return values


def part_values(
    logits: np.ndarray,  # (n_rows, n) the classes [first, first + n) of each row
    first: int,
    target: np.ndarray,  # (n_rows,) int64, already checked
    target_logit: np.ndarray,  # (n_rows,) float64, the logit of the target, in this part or in another
    counts: np.ndarray,  # (n_rows,) whether a row is to be read
    *,
    temperature: float = 1.0,
    n_threads: int | None = None,
) -> RowValues:
    """What `merge_parts` takes of some of the classes: log_prob is NaN where the target is in another part, and rank
    counts those of these classes that come before it."""
    checked = inputs.as_logits(logits, -1)
    rows = Rows(target - first, sample_weight=counts.astype(np.float64))
    values = row_values(checked, rows, temperature=temperature, n_threads=n_threads, target_logit=target_logit)
    values.argmax[values.argmax >= 0] += first
    return values


def merge_parts(parts: Sequence[RowValues]) -> RowValues:
    """Those of whole rows, of parts in the order of their classes: some numbers a row are all that is brought together.

    With P_b the share of part b in a row's sum, entropy = sum_b P_b (H_b - log P_b), and sums of squares add as P_b^2.
    """
    part = {f.name: np.stack([getattr(values, f.name) for values in parts]) for f in fields(RowValues)}
    lse, n = part["lse"], np.arange(part["lse"].shape[1])
    read, top = part["argmax"][0] >= 0, lse.argmax(0)
    with np.errstate(all="ignore"):
        gap = lse - lse[top, n]
        rest = np.where(np.arange(len(parts))[:, None] == top, 0.0, np.exp(gap)).sum(0)
        whole = np.where(np.isinf(lse[top, n]), lse[top, n], lse[top, n] + np.log1p(rest))
        log_share = gap - np.log1p(rest)
        share, has_softmax = np.exp(log_share), np.isfinite(whole)

        def total(values):  # a part of nothing but -inf has none, and no share
            return np.where(has_softmax, np.where(share == 0, 0.0, values).sum(0), np.nan)

        own = part["log_prob"] + log_share
        log_prob = np.where(np.isnan(own), -np.inf, own).max(0)  # in one part, unless that is nothing but -inf
        with_own = np.where(np.isnan(own), 0.0, np.expm1(part["log_prob"]) ** 2)
        entropy = total(share * (part["entropy"] - log_share))
        sum_sq_prob, others = total(share**2 * part["sum_sq_prob"]), total(share**2 * (part["brier"] - with_own))
        log_prob = np.where(has_softmax, log_prob, np.nan)
        brier = others + np.expm1(log_prob) ** 2
    best = part["max"].argmax(0)
    rank = np.where(read, part["rank"].sum(0), -1)
    return RowValues(
        whole, log_prob, part["max"][best, n], part["argmax"][best, n], rank, entropy, sum_sq_prob, brier
    )  # fmt: skip


def row_stats(logits, target=None, *, temperature=1.0, ignore_index=-100, class_axis=None, n_threads=None) -> RowStats:
    """Log-sum-exp, log-probability and rank of the target, largest class, entropy and sum of squares of each row.

    One pass over the logits, whatever their dtype, layout and class axis, with nothing of their size made.

    Parameters
    ----------
    logits : array-like of float64, float32, float16 or bfloat16
    target : array-like of int, optional
        Class indices, of logits' shape without the class axis. Without them `log_prob` and `rank` are None.
    temperature : float, default=1.0
        Divides the logits: z = logits / temperature.
    ignore_index : int, default=-100
        Rows of this target are not read: NaN, and -1 for `argmax` and `rank`.
    class_axis : int, optional
        The last of one or two dimensions; beyond them it must be given.
    n_threads : int, optional

    Returns
    -------
    RowStats
        Arrays of logits' shape without the class axis: float64 for float64 logits, else float32, and int64. A row that
        holds NaN or +inf, or nothing but -inf, has no softmax: its `log_prob`, `entropy` and `sum_sq_prob` are NaN, its
        `lse`, `max` and `argmax` what `logsumexp`, `numpy.max` and `numpy.argmax` give.

    Raises
    ------
    IndexError
        If a target is neither a class nor `ignore_index`.
    ValueError, TypeError
        If an option, a shape or a dtype does not fit.

    See Also
    --------
    Evaluator : The means of these over a data set, and their errors.

    Examples
    --------
    >>> import ce_fast as ce
    >>> stats = ce.row_stats([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], [0, 2])
    >>> stats.log_prob.round(6)
    array([-0.169846, -1.551445])
    >>> stats.rank
    array([0, 2])
    >>> stats.entropy.round(6)
    array([0.524267, 0.975328])
    """
    temperature = inputs.check_option("temperature", temperature, 1e-30, 1e30)
    ignore_index, n_threads = inputs.check_ignore_index(ignore_index), inputs.check_n_threads(n_threads)
    checked = inputs.as_logits(logits, inputs.check_class_axis(class_axis), target=() if target is None else target)
    rows = Rows()
    if target is not None:
        indices, soft = inputs.as_targets(target, checked)
        if soft is not None:
            raise TypeError("target holds class probabilities; row_stats takes class indices (an integer dtype)")
        rows = Rows(indices, ignore_index)
    values = row_values(checked, rows, temperature=temperature, n_threads=n_threads)

    def shaped(array: np.ndarray) -> np.ndarray:
        if array.dtype == np.int64:
            return array.reshape(checked.outer_shape)
        return engine.result_rows(array, checked)

    stats = RowStats(**{f.name: shaped(getattr(values, f.name)) for f in fields(RowStats)})
    return stats if target is not None else replace(stats, log_prob=None, rank=None)
