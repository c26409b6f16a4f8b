"""The oracle of the losses between two distributions, in NumPy's widest float, checked in test_divergences.py.

With d = log q - log p, KL(q || p) is sum q d, whose terms cancel where p is close to q. As p and q have the same sum,
it is also sum q (d + exp(-d) - 1): no term is negative, and none loses its digits.
"""

import math

import numpy as np

import reference
from reference import WIDE, Result
from reference_elements import times, unit_of_float64, wide


class Distribution:
    """softmax over the last axis of z = softcap tanh(x / softcap) / temperature; or log-probabilities as they are."""

    def __init__(self, x, temperature=1.0, softcap=None, log_probs=False):
        temperature, self.slope, self.bent = WIDE(temperature), 1 / WIDE(temperature), 0
        if softcap is not None:
            ratio = x / WIDE(softcap)
            with np.errstate(over="ignore"):
                x, self.slope = softcap * np.tanh(ratio), 1 / (np.cosh(ratio) ** 2 * temperature)
            self.bent = 2 * np.abs(ratio)  # errors of the slope, relative, in float64
        self.y, self.temperature = x, temperature
        self.z = x / temperature
        self.log_p = x if log_probs else reference.log_softmax(x, temperature)
        self.p = np.exp(self.log_p)
        self.rest = reference.one_minus_softmax(x, temperature)  # 1 - p
        with np.errstate(invalid="ignore"):  # of log p, in float64: those of z and of lse
            self.error = np.nan_to_num(1 if log_probs else 1 + np.abs(self.z) + np.abs(self.z - self.log_p), posinf=1)


def log_ratio(q, p):
    """log q - log p: by the differences u of logits, less that of the heaviest class, where all are small."""
    with np.errstate(invalid="ignore", over="ignore"):
        u = (p.y - q.y) - np.take_along_axis(p.y - q.y, q.log_p.argmax(-1)[..., None], -1)
        u = u / p.temperature
        near = (np.abs(u) < 1).all(-1, keepdims=True)
        shift = np.log1p((q.p * np.expm1(np.where(near, u, 0))).sum(-1, keepdims=True))
        return np.where(near, shift - u, q.log_p - p.log_p)


def excess(q, p, d):
    """q (d + exp(-d) - 1), with p for q exp(-d)."""
    small = np.where(np.abs(d) < 0.5, d, 0)
    series = sum((-small) ** n / math.factorial(n) for n in range(20, 1, -1))
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(d) < 0.5, q * series, np.where((q == 0) & ~np.isnan(d), p, q * d + (p - q)))


def difference(q, p, d):
    """p - q."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(np.abs(d) < 0.5, q * np.expm1(-d), p - q)


def divergence(p, q, direction, log_probs=False):
    """(loss of each row, its errors in float64, gradient by x, its errors) of KL(q || p), or of KL(p || q)."""
    forward, error = direction == "forward", p.error + q.error
    if log_probs:
        with np.errstate(invalid="ignore"):
            d = q.log_p - p.log_p
        terms = times(q.p, d) if forward else times(p.p, -d)
        grad = -q.p if forward else times(p.p, 1 - d)
        return terms.sum(-1), np.abs(terms).sum(-1), grad, times(p.p, np.abs(d)) + q.p + p.p
    d = log_ratio(q, p)
    first, second, sign = (q, p, d) if forward else (p, q, -d)
    loss = excess(first.p, second.p, sign).sum(-1)
    loss_error = (first.p * error + times(first.p, np.abs(sign)) * first.error).sum(-1)
    if forward:
        grad, grad_error = difference(q.p, p.p, d), p.p * p.error + q.p * q.error
    else:
        with np.errstate(invalid="ignore"):
            grad = times(p.p, -d - loss[..., None])
            grad_error = p.p * (error + loss_error[..., None]) + times(p.p, np.abs(d)) * p.error
    return loss, loss_error, grad * p.slope, grad_error * p.slope * (1 + p.bent)


def close_error(p, q):
    """Errors of KL where p is close to q, if those of log p and log q enter it times p - q only."""
    return (np.abs(difference(q.p, p.p, log_ratio(q, p))) * (p.error + q.error)).sum(-1)


def bucketed(p, indices, log_q, direction):
    """As `divergence`, of the distributions over the k given classes and one bucket with all others."""
    picked = np.zeros(p.z.shape, bool)
    np.put_along_axis(picked, indices, True, -1)
    q = np.exp(log_q)
    full, p_tail = indices.shape[-1] == p.z.shape[-1], np.where(picked, 0, p.p).sum(-1)
    with np.errstate(divide="ignore"):
        tail = np.zeros(p_tail.shape, WIDE) if full else np.maximum(1 - q.sum(-1), 0)
        log_tail, log_p_tail = np.log(tail), np.log(p_tail)
    log_p, p_k = np.take_along_axis(p.log_p, indices, -1), np.take_along_axis(p.p, indices, -1)
    with np.errstate(invalid="ignore"):
        d, d_tail = log_q - log_p, np.where(full, 0, log_tail - log_p_tail)
    error = np.take_along_axis(p.error, indices, -1) + 1 + np.where(q == 0, 0, np.abs(log_q))
    worst, tail_error = p.error.max(-1), 1 + np.abs(d_tail)  # 1 - sum q has an absolute error, whatever is left
    grad, grad_error = np.zeros(p.z.shape, WIDE), np.zeros(p.z.shape, WIDE)
    if direction == "forward":
        loss = times(q, d).sum(-1) + times(tail, d_tail)
        loss_error = (q * error + times(q, np.abs(d))).sum(-1) + tail * worst + tail_error
        share = np.where(full, 0, tail / np.where(p_tail == 0, 1, p_tail))[..., None]
        grad[...] = p.p * (1 - share)
        grad_error[...] = p.p * ((1 + share) * p.error + 1 / np.where(p_tail == 0, 1, p_tail)[..., None])
        np.put_along_axis(grad, indices, p_k - q, -1)
        np.put_along_axis(grad_error, indices, p_k * error + q * error, -1)
    else:
        loss = -(times(p_k, d).sum(-1) + times(p_tail, d_tail))
        tail_error = tail_error + np.where(full | (tail == 0), 0, 1 / np.where(tail == 0, 1, tail))
        loss_error = (p_k * error * (1 + np.abs(d))).sum(-1) + p_tail * (worst + tail_error)
        grad[...] = p.p * -(d_tail + loss)[..., None]
        np.put_along_axis(grad, indices, -times(p_k, d + loss[..., None]), -1)
        apart = np.broadcast_to((np.abs(d_tail) + tail_error)[..., None], grad.shape).copy()
        np.put_along_axis(apart, indices, np.abs(d) + error, -1)
        grad_error = p.p * p.error * (apart + (np.abs(loss) + loss_error)[..., None])
    return loss, loss_error, grad * p.slope, grad_error * p.slope * (1 + p.bent)


class Rows:
    """Which rows count, how much, and what their mean divides by."""

    def __init__(self, shape, sample_weight, reduction, denominator, counts=True):
        self.s = np.ones(shape, WIDE) if sample_weight is None else wide(sample_weight)
        self.counts = (self.s != 0) & counts
        kinds = {"weight": self.s[self.counts].sum(), "count": self.counts.sum(), "total": self.counts.size}
        self.divisor = WIDE(kinds[denominator] if isinstance(denominator, str) else denominator)
        if reduction != "mean":
            self.divisor = WIDE(1)
        self.share = self.s / self.divisor if self.divisor else 0 * self.s

    def of(self, array, factor, axis=None):
        """Times a factor a row, 0 where a row does not count; per class if there is an axis."""
        counts = self.counts
        if axis is not None:
            factor, counts = factor[..., None], counts[..., None]
        with np.errstate(invalid="ignore"):
            scaled = np.where(counts, factor * array, 0)
        return scaled if axis is None else np.moveaxis(scaled, -1, axis)


def kl_div(
    logits,
    target,
    *,
    direction="forward",
    log_probs=False,
    temperature=1.0,
    softcap=None,
    sample_weight=None,
    reduction="mean",
    denominator="weight",
    class_axis=-1,
    upstream=None,
):
    dtype, unit = np.asarray(logits).dtype, unit_of_float64(np.asarray(logits).dtype)
    p = Distribution(np.moveaxis(wide(logits), class_axis, -1), temperature, softcap, log_probs)
    q = Distribution(np.moveaxis(wide(target), class_axis, -1), temperature, None, log_probs)
    loss, loss_error, grad, grad_error = divergence(p, q, direction, log_probs)
    rows = Rows(loss.shape, sample_weight, reduction, denominator)
    scale = rows.share * (1 if upstream is None else wide(upstream))
    hess, floor = p.p * p.rest * p.slope**2, 2.0**-24 if dtype == np.float16 else 1e-16
    return Result(
        rows.of(loss, rows.s),
        rows.of(np.abs(loss) + unit * loss_error, rows.s),
        rows.divisor,
        rows.of(grad, scale, class_axis),
        rows.of(np.abs(grad) + unit * grad_error, np.abs(scale), class_axis),
        np.maximum(
            rows.of(hess, rows.share, class_axis), rows.of(np.full(hess.shape, floor), 1 + 0 * rows.s, class_axis)
        ),
        rows.of(hess + unit * p.p * p.slope**2 * p.error * (1 + p.bent), rows.share, class_axis),
    )


def entropy(logits, *, temperature=1.0, class_axis=-1):
    """(-sum p log p of each row, what its error is measured by)."""
    p = Distribution(np.moveaxis(wide(logits), class_axis, -1), temperature)
    top = np.zeros(p.z.shape, bool)
    np.put_along_axis(top, p.z.argmax(-1)[..., None], True, -1)
    terms = times(p.p, -p.log_p)
    error = np.where(top, 2 * terms, terms * p.error + p.p * p.error)
    return terms.sum(-1), terms.sum(-1) + unit_of_float64(np.asarray(logits).dtype) * error.sum(-1)


def distillation(
    student,
    teacher,
    target=None,
    *,
    temperature=2.0,
    alpha=None,
    direction="forward",
    tail="bucket",
    weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    softcap=None,
    sample_weight=None,
    reduction="mean",
    denominator="weight",
    class_axis=-1,
    upstream=None,
):
    """alpha T^2 KL(teacher, student) + (1 - alpha) cross-entropy; teacher: logits, or (indices, log-probabilities)."""
    unit = unit_of_float64(np.asarray(student).dtype)
    alpha = WIDE((1 if target is None else 0.5) if alpha is None else alpha)
    p = Distribution(np.moveaxis(wide(student), class_axis, -1), temperature, softcap)
    if isinstance(teacher, tuple):
        indices, log_q = (np.moveaxis(np.asarray(a), class_axis, -1) for a in teacher)
        log_q = log_q.astype(WIDE)
    if not isinstance(teacher, tuple):
        q = Distribution(np.moveaxis(wide(teacher), class_axis, -1), temperature)
        loss, loss_error, grad, grad_error = divergence(p, q, direction)
    elif tail == "bucket":
        loss, loss_error, grad, grad_error = bucketed(p, indices, log_q, direction)
    else:
        full = np.full(p.z.shape, -np.inf, WIDE)
        np.put_along_axis(full, indices, log_q, -1)
        loss, loss_error, grad, grad_error = divergence(p, Distribution(full * p.temperature, p.temperature), direction)
    counts = True
    if target is not None and np.asarray(target).dtype.kind in "iu":
        counts = np.asarray(target) != ignore_index
    rows = Rows(loss.shape, sample_weight, reduction, denominator, counts)
    factor = alpha * WIDE(temperature) ** 2
    scale = factor * rows.share * (1 if upstream is None else wide(upstream))
    values, terms = rows.of(factor * loss, rows.s), rows.of(factor * (np.abs(loss) + unit * loss_error), rows.s)
    grad = rows.of(grad, scale, class_axis)
    grad_terms = np.abs(grad) + rows.of(unit * grad_error, np.abs(scale), class_axis)
    if reduction != "none":
        over = rows.divisor if rows.divisor else WIDE("nan")
        values, terms = values.sum() / over, terms.sum() / (rows.divisor or WIDE(1))
    if target is not None and alpha != 1:
        hard = reference.cross_entropy(
            student,
            target,
            weight=weight,
            sample_weight=sample_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            softcap=softcap,
            denominator=denominator,
            class_axis=class_axis,
            upstream=upstream,
        )
        values = values + (1 - alpha) * hard.value(reduction)
        terms = terms + (1 - alpha) * hard.terms_of_value(reduction)
        grad, grad_terms = grad + (1 - alpha) * hard.grad, grad_terms + (1 - alpha) * hard.terms
    none = np.zeros(grad.shape)
    return Result(values, terms, WIDE(1), grad, grad_terms, none, none)
