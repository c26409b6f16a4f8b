"""The oracle: the losses as their formulas say, in NumPy's widest float (64-bit mantissa on x86), with no eye on speed.

Checked against mpmath in test_reference.py. Every function returns longdouble arrays.
"""

from dataclasses import dataclass

import numpy as np

WIDE = np.longdouble


@dataclass
class Result:
    rows: np.ndarray  # (outer...) loss of each row
    row_terms: (
        np.ndarray
    )  # (outer...) what its error is measured by: the loss, the mass off the heaviest class, lse's terms
    divisor: float  # of the mean; 1 for other reductions
    grad: np.ndarray  # logits' shape, of the reduced loss
    terms: np.ndarray  # logits' shape: what its error is measured by, the larger of a p_k and mass_k

    def terms_of_value(self, reduction):
        return self.row_terms if reduction == "none" else self.row_terms.sum() / WIDE(self.divisor or 1)

    def value(self, reduction):
        if reduction == "none":
            return self.rows
        return self.rows.sum() / WIDE(self.divisor) if self.divisor else WIDE("nan")  # a mean over nothing


def log_softmax(x):
    """x - lse over the last axis, the largest class by log1p of the sum of the others."""
    x = np.asarray(x, WIDE)
    top = x.argmax(-1)[..., None]
    m = np.take_along_axis(x, top, -1)
    with np.errstate(invalid="ignore"):
        e = np.exp(x - m)
        np.put_along_axis(e, top, 0, -1)
        nll = np.log1p(e.sum(-1, keepdims=True))
        return (x - m) - nll


def logsumexp(x):
    x = np.asarray(x, WIDE)
    m = x.max(-1, keepdims=True)
    return m[..., 0] + np.log(np.exp(x - m).sum(-1))


def one_minus_softmax(x):
    """1 - p_k, free of cancellation: the sum of the other exponentials over the whole sum."""
    x = np.asarray(x, WIDE)
    p = np.exp(log_softmax(x))
    result = 1 - p
    top = x.argmax(-1)[..., None]
    others = p.copy()
    np.put_along_axis(others, top, 0, -1)
    np.put_along_axis(result, top, others.sum(-1, keepdims=True), -1)
    return result


def cross_entropy(
    logits,
    target,
    *,
    weight=None,
    sample_weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    smoothing="uniform",
    z_loss=0.0,
    denominator="weight",
    class_axis=-1,
    upstream=None,
):
    x = np.moveaxis(np.asarray(logits).astype(WIDE), class_axis, -1)
    target = np.asarray(target)
    outer, n_classes = x.shape[:-1], x.shape[-1]
    w = np.ones(n_classes, WIDE) if weight is None else np.asarray(weight, WIDE)
    s = np.ones(outer, WIDE) if sample_weight is None else np.asarray(sample_weight).astype(WIDE)
    eps = WIDE(label_smoothing)
    indices = target.dtype.kind in "iu"
    if indices:
        counts = (s != 0) & (target != ignore_index)
        t = np.where(counts, target, 0).astype(np.int64)
        onehot = np.zeros(x.shape, WIDE)
        np.put_along_axis(onehot, t[..., None], 1, -1)
        row_weight = w[t]
        off = eps / n_classes if smoothing == "uniform" else eps / (n_classes - 1)
        q = (1 - eps) * onehot + off * (1 if smoothing == "uniform" else 1 - onehot)
    else:
        counts = s != 0
        row_weight = np.ones(outer, WIDE)
        q = (1 - eps) * np.moveaxis(target.astype(WIDE), class_axis, -1) + eps / n_classes
    mass = w * q
    log_p, lse, p, rest = log_softmax(x), logsumexp(x), np.exp(log_softmax(x)), one_minus_softmax(x)
    with np.errstate(invalid="ignore"):
        cross = np.where((mass == 0) & ~np.isnan(log_p), 0, -mass * log_p).sum(-1)
    z = WIDE(z_loss) * row_weight * lse if z_loss else np.zeros(outer, WIDE)
    rows = np.where(counts, s * (cross + (z * lse if z_loss else 0)), 0)

    total = mass.sum(-1)
    heaviest = np.zeros(x.shape, bool)  # the class that keeps its digits: the target, or that of the largest mass
    np.put_along_axis(heaviest, mass.argmax(-1)[..., None] if not indices else t[..., None], True, -1)
    # p_k total - mass_k, with 1 - p_k in place of p_k where mass_k is most of the total
    off_heaviest = np.where(heaviest, 0, mass).sum(-1, keepdims=True)
    others = np.where(heaviest, off_heaviest, total[..., None] - mass)
    top = x.max(-1)
    lse_terms = np.abs(top) + np.abs(lse - top)  # lse is their sum, and may be near 0 where they are not
    slope = WIDE(z_loss) * np.abs(row_weight)
    row_terms = np.where(counts, rows + s * (off_heaviest[..., 0] + 2 * slope * np.abs(lse) * lse_terms), 0)
    direct = total[..., None] * p - mass
    turned = others - total[..., None] * rest
    grad = np.where(mass > others, turned, direct) + 2 * z[..., None] * p
    magnitude = (total + 2 * slope * lse_terms)[..., None]
    careful = np.maximum(magnitude * np.minimum(p, rest), np.minimum(mass, np.abs(others)))
    terms = np.where(heaviest, careful, np.maximum(magnitude * p, mass))
    divisor = WIDE(1)
    if reduction == "mean":
        kinds = {"weight": (s * row_weight)[counts].sum(), "count": counts.sum(), "total": counts.size}
        divisor = WIDE(kinds[denominator] if isinstance(denominator, str) else denominator)
    scale = (s / divisor if divisor else s * 0) * (1 if upstream is None else np.asarray(upstream, WIDE))
    grad = np.where(counts[..., None], scale[..., None] * grad, 0)
    terms = np.where(counts[..., None], np.abs(scale)[..., None] * terms, 0)
    return Result(rows, row_terms, divisor, np.moveaxis(grad, -1, class_axis), np.moveaxis(terms, -1, class_axis))
