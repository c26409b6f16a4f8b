"""The oracle: the losses as their formulas say, in NumPy's widest float (64-bit mantissa on x86), with no eye on speed.

Checked against mpmath in test_reference.py. Every function returns longdouble arrays.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

WIDE = np.longdouble


@dataclass
class Result:
    rows: np.ndarray  # (outer...) loss of each row
    row_terms: np.ndarray  # (outer...) what its error is measured by: the terms of the loss, the errors of lse in them
    divisor: float  # of the mean; 1 for other reductions
    grad: np.ndarray  # logits' shape, of the reduced loss
    terms: np.ndarray  # logits' shape: what its error is measured by, the larger of a p_k and mass_k s_k
    hess: np.ndarray  # logits' shape: the positive diagonal, of the reduced loss, with its floor
    hess_terms: np.ndarray  # logits' shape: what its error is measured by

    def terms_of_value(self, reduction):
        return self.row_terms if reduction == "none" else self.row_terms.sum() / WIDE(self.divisor or 1)

    def value(self, reduction):
        if reduction == "none":
            return self.rows
        return self.rows.sum() / WIDE(self.divisor) if self.divisor else WIDE("nan")  # a mean over nothing


def log_softmax(x, temperature=1.0):
    """z - lse of z = x / temperature over the last axis, the largest class by log1p of the sum of the others."""
    x = np.asarray(x, WIDE)
    top = x.argmax(-1)[..., None]
    with np.errstate(invalid="ignore"):
        d = (x - np.take_along_axis(x, top, -1)) / WIDE(temperature)
        e = np.exp(d)
        np.put_along_axis(e, top, 0, -1)
        return d - np.log1p(e.sum(-1, keepdims=True))


def logsumexp(x, temperature=1.0):
    x = np.asarray(x, WIDE)
    m = x.max(-1, keepdims=True)
    return m[..., 0] / WIDE(temperature) + np.log(np.exp((x - m) / WIDE(temperature)).sum(-1))


def one_minus_softmax(x, temperature=1.0):
    """1 - p_k, free of cancellation: the sum of the other exponentials over the whole sum."""
    x = np.asarray(x, WIDE)
    p = np.exp(log_softmax(x, temperature))
    result = 1 - p
    top = x.argmax(-1)[..., None]
    others = p.copy()
    np.put_along_axis(others, top, 0, -1)
    np.put_along_axis(result, top, others.sum(-1, keepdims=True), -1)
    return result


def rule_of(rule, param, n):
    """(f, s, what the rounding of f is measured by, and of s): f(n) of a class with n = lse - z = -log p, s = df/dn."""
    p, rest = np.exp(-n), -np.expm1(-n)
    if rule == "cross_entropy":
        return n, np.ones_like(n), n, np.zeros_like(n)
    if rule == "focal":  # (1-p)^gamma n; n p / (1-p) = n / (e^n - 1) is 1 at n = 0; a power multiplies errors by gamma
        with np.errstate(over="ignore", invalid="ignore"):
            near = np.clip(n, np.finfo(WIDE).tiny, 11000)
            f, s = rest**param * n, rest**param * (1 + param * near / np.expm1(near))
        return f, s, (1 + param) * f, (1 + param) * s
    if rule == "poly":
        return n + param * rest, 1 + param * p, n + abs(param) * rest, 1 + abs(param) * p
    assert rule == "generalized"  # (1 - p^q) / q
    f, s = -np.expm1(-param * n) / param, np.exp(-param * n)
    return f, s, f, s


def spread(rule, param, n, error):
    """How far f and s move when n moves by `error`, which takes it to 0 at the least."""
    here, low, high = (rule_of(rule, param, m)[:2] for m in (n, np.maximum(n - error, 0), n + error))
    moves = [np.maximum(abs(b - a), abs(c - a)) for a, b, c in zip(here, low, high, strict=True)]
    return np.where(error > 0, moves, 0)


def errors(row, z_weight, double, softcap, rule, param):
    """What the errors of row losses, gradients and Hessians are measured by: times eps of the compute dtype.

    float64 logits with a softcap are rounded once they are capped, which moves each z by itself, and x / softcap; other
    dtypes are capped in float64, and feel nothing of it.
    """
    mass, b, n, p, rest, lse, heaviest = row.mass, row.b, row.n, row.p, row.rest, row.lse, row.heaviest
    rounded = double and softcap is not None
    capped = np.abs(row.z).max(-1, keepdims=True) if rounded else np.zeros_like(lse)[..., None]  # of z
    bent = 2 * np.abs(row.x / softcap) if rounded else 0  # of dz/dx, relative, beside its roundings
    # Of n: relative for the heaviest; for others lse - z_k, with the error of a sum of exponentials in lse, and where a
    # rule needs each class for itself, with those of lse and z_k in float64.
    apart = np.abs(row.z) + np.abs(lse)[..., None] if double and rule != "cross_entropy" else 0
    error = np.where(heaviest, np.minimum(n, 1 + apart), 1 + apart) + capped * rest
    unit = WIDE(np.finfo(np.float64 if double else np.float32).eps)
    with np.errstate(invalid="ignore"):
        f_moves, df_moves = spread(rule, param, n, unit * np.where(np.isfinite(n), error, 0)) / unit
        by_class = np.where(heaviest, np.maximum(row.f_terms, f_moves), row.f_terms + f_moves)
        by_class = np.where(mass == 0, 0, mass * by_class)
        slopes = np.where(mass == 0, 0, mass * (row.df_terms + df_moves))
    # lse is the sum of these, and may be near 0 where they are not; it is the log of a sum that has an error of its own
    top = row.z.max(-1)
    lse_terms = np.maximum(np.abs(top) + np.abs(lse - top), 1) + capped[..., 0]
    loss = by_class.sum(-1) + z_weight * (lse**2 + 2 * np.abs(lse) * lse_terms)

    magnitude = (np.abs(b).sum(-1) + 2 * z_weight * lse_terms)[..., None]
    careful = np.maximum(magnitude * np.minimum(p, rest), np.minimum(np.abs(b), np.abs(row.others)))
    combined = np.where(heaviest, careful, np.maximum(magnitude * p, np.abs(b)))
    all_slopes, off_heaviest = slopes.sum(-1, keepdims=True), np.where(heaviest, 0, slopes).sum(-1, keepdims=True)
    by_slopes = np.where(heaviest, p * off_heaviest + rest * slopes, p * all_slopes + slopes)
    grad = ((1 + capped) * np.maximum(combined, np.abs(row.by_z)) + by_slopes) * (1 + bent) * row.slope

    near = np.where(heaviest, np.minimum(p, rest), p)
    twice = 1 if softcap is None else 2  # dz/dx is squared, and so are its roundings
    total = np.abs(b.sum(-1, keepdims=True))
    hess = ((1 + capped) * total + all_slopes) * near * (1 + bent) * twice * row.slope**2
    return loss, grad, hess


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
    temperature=1.0,
    softcap=None,
    z_loss=0.0,
    denominator="weight",
    class_axis=-1,
    upstream=None,
    rule="cross_entropy",
    param=0.0,
    alpha=None,
):
    """sum_k mass_k f(lse - z_k) + row_weight z_loss lse^2 of each row, z = softcap tanh(x / softcap) / temperature."""
    dtype = np.asarray(logits).dtype
    x = np.moveaxis(np.asarray(logits).astype(WIDE), class_axis, -1)
    target = np.asarray(target)
    outer, n_classes = x.shape[:-1], x.shape[-1]
    w = np.ones(n_classes, WIDE) if weight is None else np.asarray(weight, WIDE)
    wa = w * (1 if alpha is None else np.asarray(alpha, WIDE))
    s = np.ones(outer, WIDE) if sample_weight is None else np.asarray(sample_weight).astype(WIDE)
    eps, param, temperature = WIDE(label_smoothing), WIDE(param), WIDE(temperature)
    indices = target.dtype.kind in "iu"
    if indices:
        counts = (s != 0) & (target != ignore_index)
        t = np.where(counts, target, 0).astype(np.int64)
        onehot = np.zeros(x.shape, WIDE)
        np.put_along_axis(onehot, t[..., None], 1, -1)
        mean_weight, row_weight = w[t], wa[t]
        off = eps / n_classes if smoothing == "uniform" else eps / (n_classes - 1)
        q = (1 - eps) * onehot + off * (1 if smoothing == "uniform" else 1 - onehot)
    else:
        counts = s != 0
        mean_weight = row_weight = np.ones(outer, WIDE)
        q = (1 - eps) * np.moveaxis(target.astype(WIDE), class_axis, -1) + eps / n_classes
    mass = wa * q
    y, slope = x, 1 / temperature  # z = y / temperature, dz/dx
    if softcap is not None:
        with np.errstate(over="ignore"):
            y, slope = WIDE(softcap) * np.tanh(x / softcap), 1 / (np.cosh(x / softcap) ** 2 * temperature)
    lse, n, rest = logsumexp(y, temperature), -log_softmax(y, temperature), one_minus_softmax(y, temperature)
    p = np.exp(-n)
    f, df, f_terms, df_terms = rule_of(rule, param, n)
    with np.errstate(invalid="ignore"):
        by_class = np.where((mass == 0) & ~np.isnan(n), 0, mass * f)
    z = WIDE(z_loss) * row_weight * lse if z_loss else np.zeros(outer, WIDE)
    rows = np.where(counts, s * (by_class.sum(-1) + (z * lse if z_loss else 0)), 0)

    b = mass * df
    total = b.sum(-1)
    heaviest = np.zeros(x.shape, bool)  # the class that keeps its digits: the target, or that of the largest mass
    np.put_along_axis(heaviest, mass.argmax(-1)[..., None] if not indices else t[..., None], True, -1)
    # p_k total - b_k, with 1 - p_k in place of p_k where b_k is most of the total
    off_heaviest = np.where(heaviest, 0, b).sum(-1, keepdims=True)
    others = np.where(heaviest, off_heaviest, total[..., None] - b)
    direct = total[..., None] * p - b
    turned = others - total[..., None] * rest
    by_z = np.where(np.abs(b) > np.abs(others), turned, direct) + 2 * z[..., None] * p
    grad = by_z * slope
    hess = total[..., None] * p * rest * slope**2

    z_weight = WIDE(z_loss) * np.abs(row_weight)
    row = SimpleNamespace(x=x, z=y / temperature, lse=lse, n=n, p=p, rest=rest, slope=slope, f_terms=f_terms)
    row.mass, row.df_terms, row.b, row.others, row.heaviest, row.by_z = mass, df_terms, b, others, heaviest, by_z
    loss_terms, terms, hess_terms = errors(row, z_weight, dtype == np.float64, softcap, rule, param)
    row_terms = np.where(counts, s * loss_terms, 0)

    divisor = WIDE(1)
    if reduction == "mean":
        kinds = {"weight": (s * mean_weight)[counts].sum(), "count": counts.sum(), "total": counts.size}
        divisor = WIDE(kinds[denominator] if isinstance(denominator, str) else denominator)
    share = s / divisor if divisor else s * 0
    scale = share * (1 if upstream is None else np.asarray(upstream, WIDE))
    floor = 2.0**-24 if dtype == np.float16 else 1e-16

    def given(array, factor, least=None):
        scaled = factor[..., None] * array
        scaled = scaled if least is None else np.maximum(scaled, least)
        return np.moveaxis(np.where(counts[..., None], scaled, 0), -1, class_axis)

    return Result(
        rows,
        row_terms,
        divisor,
        given(grad, scale),
        given(terms, np.abs(scale)),
        given(hess, share, floor),
        given(hess_terms, share),
    )


def row_measures(x, target=None, temperature=1.0):
    """What `ce_fast.row_stats` says of each row of (n_rows, n_classes), and the Brier score."""
    x = np.asarray(x, WIDE)
    log_p, rest = log_softmax(x, temperature), one_minus_softmax(x, temperature)
    p, rows = np.exp(log_p), np.arange(len(x))
    squares = np.where(np.isneginf(x), 0, p * p)
    with np.errstate(invalid="ignore"):
        found = {
            "lse": logsumexp(x, temperature),
            "max": x.max(-1) / WIDE(temperature),
            "argmax": x.argmax(-1),
            "entropy": -np.where(p == 0, 0, p * log_p).sum(-1),
            "sum_sq_prob": squares.sum(-1),
        }
    if target is None:
        return found
    x_t = x[rows, target][:, None]
    before = (x > x_t) | ((x == x_t) & (np.arange(x.shape[1]) < np.asarray(target)[:, None]))
    others = squares.copy()
    others[rows, target] = 0
    return found | {
        "log_prob": log_p[rows, target],
        "rank": before.sum(-1),
        "brier": rest[rows, target] ** 2 + others.sum(-1),
    }
