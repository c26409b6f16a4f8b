"""The sigmoid family of `csrc/elements_tpl.h` for Numba: an element in place of a row."""

import math

from ce_fast.backends.numba_math import add, jit

BINARY, BINARY_PROBABILITY, BINARY_FOCAL = range(6, 9)


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
def _binary(z, down, up):
    """(loss, gradient, Hessian): see `csrc/elements_tpl.h`, as for the others."""
    _, p, q, above, below = _softplus_parts(z)
    return _times(down, above) + _times(up, below), down * p - up * q, (down + up) * (p * q)


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
def elements(z, y, weight, pos_weight, sample_weight, upstream, rule, gamma, alpha, on, off, scale, hess_scale, floor,
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
        total, lost = add(total, lost, s * f)
    return total, bad
