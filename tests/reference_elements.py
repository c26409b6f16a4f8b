"""The oracle of the binary losses: their formulas element by element, in NumPy's widest float, checked in its test.

softplus(z) = log(1 + exp(z)) is minus the log of 1 - p, softplus(-z) of p; what pulls z up and what pulls it down are
added apart, so nothing cancels.
"""

import numpy as np

from reference import WIDE, Result


def softplus(z):
    return np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z)))


def sigmoid(z):
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, 1, e) / (1 + e)


def times(a, b):
    """Products in which 0 * inf is 0; NaN stays."""
    with np.errstate(invalid="ignore"):
        return np.where(((a == 0) & ~np.isnan(b)) | ((b == 0) & ~np.isnan(a)), 0, a * b)


def wide(given):
    return np.asarray(given).astype(WIDE)


def unit_of_float64(dtype):
    """What a unit of float64 is in units of the compute dtype: losses of other dtypes may be computed in float64."""
    return WIDE(1 if dtype == np.float64 else 2.0**-29)


def _result(logits, loss, grad, hess, sample_weight, reduction, upstream, loss_terms, terms, hess_terms, *weights):
    """The elements weighted and reduced; what does not count is 0."""
    factors = (sample_weight, upstream, reduction == "mean" or None, *weights)
    rounded = 1 + sum(factor is not None for factor in factors) / WIDE(6)  # half an ulp, of 3, for each
    s = np.ones(loss.shape, WIDE)
    if sample_weight is not None:
        given = wide(sample_weight)
        s = s * given.reshape(given.shape + (1,) * (loss.ndim - given.ndim))
    divisor = WIDE(1)
    if reduction == "mean":
        divisor = WIDE(loss.size) if sample_weight is None else s.sum()
    counts = s != 0
    share = s / divisor if divisor else s * 0
    scale = share * (1 if upstream is None else wide(upstream))
    floor = 2.0**-24 if np.asarray(logits).dtype == np.float16 else 1e-16

    def counted(array, factor):
        with np.errstate(invalid="ignore"):
            return np.where(counts, factor * array, 0)

    return Result(
        counted(loss, s),
        counted(loss_terms * rounded, s),
        divisor,
        counted(grad, scale),
        counted(terms * rounded, np.abs(scale)),
        np.where(counts, np.maximum(share * hess, floor), 0),
        counted(hess_terms * rounded, share),
    )


def binary_cross_entropy_with_logits(
    logits,
    target,
    *,
    weight=None,
    pos_weight=None,
    sample_weight=None,
    label_smoothing=0.0,
    reduction="mean",
    upstream=None,
):
    """w [(1 - y') softplus(z) + pos_weight y' softplus(-z)], with y' = (1 - eps) y + eps / 2."""
    z, y, eps = wide(logits), wide(target), WIDE(label_smoothing)
    down = (1 if weight is None else wide(weight)) * ((1 - eps) * (1 - y) + eps / 2)
    up = (1 if weight is None else wide(weight)) * ((1 - eps) * y + eps / 2)
    up = up * (1 if pos_weight is None else wide(pos_weight))
    p, q = sigmoid(z), sigmoid(-z)
    loss = times(down, softplus(z)) + times(up, softplus(-z))
    hess = (down + up) * p * q
    return _result(
        logits,
        loss,
        down * p - up * q,
        hess,
        sample_weight,
        reduction,
        upstream,
        loss,
        np.maximum(down * p, up * q),
        hess,
        weight,
        pos_weight,
        label_smoothing or None,
    )


def binary_cross_entropy(probs, target, *, weight=None, sample_weight=None, reduction="mean", upstream=None):
    """Of probabilities x: logs no less than -100, the gradient (x - y) / max(x (1 - x), 1e-12), as torch has them."""
    x, y = wide(probs), wide(target)
    w = np.broadcast_to(WIDE(1) if weight is None else wide(weight), x.shape)
    with np.errstate(divide="ignore"):
        high, low = np.minimum(-np.log1p(-x), 100), np.minimum(-np.log(x), 100)
    loss, width = w * ((1 - y) * high + y * low), np.maximum(x * (1 - x), WIDE(1e-12))
    up, down = w * y * (1 - x) / width, w * (1 - y) * x / width
    none = np.zeros(x.shape, WIDE)
    return _result(probs, loss, down - up, none, sample_weight, reduction, upstream, loss, np.maximum(up, down), none)


def sigmoid_focal(logits, target, *, alpha=0.25, gamma=2.0, sample_weight=None, reduction="mean", upstream=None):
    """c u^gamma [(1 - y) softplus(z) + y softplus(-z)],  u = y (1 - p) + (1 - y) p,  c = alpha y + (1 - alpha) (1 - y).

    Its positive Hessian is that of the two-class softmax focal loss: the square of du/dz in place of its slope.
    """
    z, y, gamma = wide(logits), wide(target), WIDE(gamma)
    p, q = sigmoid(z), sigmoid(-z)
    c = 1 if alpha is None else WIDE(alpha) * y + (1 - WIDE(alpha)) * (1 - y)
    cross = times(1 - y, softplus(z)) + times(y, softplus(-z))
    u = times(y, q) + times(1 - y, p)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.where(y == 1, p, np.where(y == 0, q, p * q / u))  # p (1 - p) / u, and its limit where u is 0
        powers = np.where(u > 0, -np.log(u), 0)
    weight, by_factor = c * u**gamma, gamma * times(cross, spread) * (1 - 2 * y)
    unit = unit_of_float64(np.asarray(logits).dtype)
    rounding = 1 + unit * gamma * (1 + powers)  # u^gamma has gamma times the error of log u
    loss, hess = times(weight, cross), weight * (p * q + gamma * times(cross, spread * spread) * (1 - 2 * y) ** 2)
    return _result(
        logits,
        loss,
        weight * ((1 - y) * p - y * q + by_factor),
        hess,
        sample_weight,
        reduction,
        upstream,
        loss * rounding,
        weight * ((1 - y) * p + y * q + np.abs(by_factor)) * rounding,
        hess * rounding,
    )
