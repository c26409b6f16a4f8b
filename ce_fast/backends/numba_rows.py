"""Rows, rules and divergences of `csrc/` for Numba: statistics -> rule -> gradient.

rest = sum_{k != t} exp(z_k - m)     tile by tile; m moves only when a tile exceeds it (lazy max)
nll  = lse - z_t = log1p(rest / e_t)
g    = a p - mass s                  p_k = exp(z_k - m) / sum, of the exponentials that the first pass has left
"""

import math

import numpy as np

from ce_fast.backends.numba_math import (
    BASE_LIMIT,
    HIGH,
    LEAD,
    LOG2E,
    LOW,
    RUN,
    TILE,
    VALUE,
    add,
    exp_args,
    exp_scaled,
    exp_tile,
    jit,
    largest,
    load,
    store,
)  # fmt: skip

CROSS_ENTROPY, FOCAL, POLY, GENERALIZED, KL_FORWARD, KL_REVERSE = range(6)


@jit
def _mass(q, k, weight, on, off):
    share = on * q[k] + off if q.size else off
    return share * weight[k] if weight.size else share


@jit
def _argmax_mass(q, weight, on, off):
    """The first class of the largest mass."""
    at, best = 0, -np.inf
    for k in range(q.size):
        value = _mass(q, k, weight, on, off)
        if value > best:
            at, best = k, value
    return at


@jit
def _tile(x, holds, j, t, buffer):
    """Logits [j, j + TILE) without the class t, in the buffer, padded with -inf to whole runs."""
    n = min(TILE, x.size - j)
    padded = (n + RUN - 1) // RUN * RUN
    load(x[j : j + n], holds, buffer[:n])
    if j <= t < j + n:
        buffer[t - j] = -np.inf
    buffer[n:padded] = -np.inf
    return buffer[:padded], n


@jit
def _argmax(x, holds, buffer):
    """The first class of the largest logit; 0 if there is none but NaN"""
    at, best = 0, -np.inf
    for j in range(0, x.size, TILE):
        tile, _ = _tile(x, holds, j, -1, buffer)
        top = largest(tile)
        if top > best:
            best = top
            at = j
            while tile[at - j] != top:
                at += 1
    return at


# --- Statistics -------------------------------------------------------------------------------------------------------


@jit
def _reference(x, t):
    """(base, n): m = base + n T ln 2, LEAD ln 2 below z"""
    if abs(x) < BASE_LIMIT * t[VALUE]:
        return 0.0, math.floor(x * t[LOG2E] + 0.5) - LEAD
    return x, -LEAD


@jit
def _reference_minus(base, n, x, t):
    """(m + LEAD ln 2) - z, exact until the last addition: base or n + LEAD is 0, and that times HIGH is exact"""
    n += LEAD
    return (((base - x) + n * t[HIGH]) + n * t[LOW]) / t[VALUE]


@jit
def _statistics(x, holds, t, x_t, temperature, buffer, e, moves):
    """(base, n, pivot, rest, infinite): rest = sum_{k != t} exp(z_k - m), pivot the logit that m was set by.

    e, if it is there, takes the terms, and moves[:, j] the base and n of those of tile j.
    """
    base, n, pivot = 0.0, -LEAD, -np.inf
    if t >= 0 and math.isfinite(x_t):
        base, n = _reference(x_t, temperature)
        pivot = x_t
    infinite = t >= 0 and x_t == np.inf
    args = exp_args(base, n, temperature, buffer)
    rest, lost = 0.0, 0.0
    for j in range(0, x.size, TILE):
        tile, count = _tile(x, holds, j, t, buffer)
        top = float(largest(tile))
        if top > pivot + temperature[VALUE]:
            if top == np.inf:
                infinite = True
            else:
                old_base, old_n, pivot = base, n, top
                base, n = _reference(top, temperature)
                args = exp_args(base, n, temperature, buffer)
                factor = exp_scaled(old_base - base, n - old_n, temperature) if rest != 0 else 0.0
                rest, lost = rest * factor, lost * factor
        rest, lost = add(rest, lost, exp_tile(tile, args))
        if e.size:
            e[j : j + count] = tile[:count]
            moves[0, j // TILE], moves[1, j // TILE] = base, n
    return base, n, pivot, rest, infinite


@jit
def _log_parts(base, n, pivot, rest, x_t, temperature):
    """(nll, p_t, p_rest, lse, lse - pivot / temperature, sum), each from the form that does not cancel."""
    e_t = exp_scaled(x_t - base, n, temperature)
    value = temperature[VALUE]
    if e_t >= rest:
        odds = rest / e_t
        nll = math.log1p(odds)
        return nll, 1.0 / (1.0 + odds), odds / (1.0 + odds), x_t / value + nll, (x_t - pivot) / value + nll, rest + e_t
    odds = e_t / rest
    log_sum = math.log(math.ldexp(rest, -int(LEAD))) + math.log1p(odds)
    nll = _reference_minus(base, n, x_t, temperature) + log_sum
    lse = _reference_minus(base, n, 0.0, temperature) + log_sum
    beside = _reference_minus(base, n, pivot, temperature) + log_sum
    return nll, odds / (1.0 + odds), 1.0 / (1.0 + odds), lse, beside, rest + e_t


# --- Rules ------------------------------------------------------------------------------------------------------------


@jit
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


@jit
def _class_term(rule, parameter, nll):
    """`_term` of a class that is not the target."""
    nll = 0.0 if nll < 0 else nll  # by rounding, where p is 1
    if rule == CROSS_ENTROPY:
        return nll, 1.0
    return _term(rule, parameter, nll, math.exp(-nll), -math.expm1(-nll))


@jit
def _combine(loss_t, slope_t, p_t, p_rest, lse, mass_t, loss_rest, slope_rest, row_weight, z_loss):
    """(loss, a, g_t, h) of loss = sum_k mass_k f_k + row_weight z_loss lse^2."""
    z = 0.0 if z_loss == 0 else z_loss * row_weight * lse
    own = 0.0 if mass_t == 0 and loss_t == loss_t else mass_t * loss_t
    slope = mass_t * slope_t
    g_t = slope_rest * p_t - slope * p_rest + 2 * z * p_t
    return own + loss_rest + (0.0 if z == 0 else z * lse), slope + slope_rest + 2 * z, g_t, slope + slope_rest


@jit
def _rest_terms(x, q, t, near, weight, on, off, rule, parameter):
    """sums over k != t of mass_k f_k and mass_k s_k; mass 0 against -inf contributes 0."""
    pivot, beside, value = near
    loss, loss_lost, slope, slope_lost = 0.0, 0.0, 0.0, 0.0
    for k in range(x.size):
        mass = _mass(q, k, weight, on, off)
        if k != t and mass != 0:
            f, s = _class_term(rule, parameter, (pivot - x[k]) / value + beside)
            loss, loss_lost = add(loss, loss_lost, mass * f)
            slope, slope_lost = add(slope, slope_lost, mass * s)
    return loss, slope


# --- The gradient -----------------------------------------------------------------------------------------------------


@jit
def _scale_tile(e, out, factor, tiny):
    """out = factor e, rounded once; what would be subnormal is 0"""
    for k in range(e.size):
        v = e[k] * factor
        out[k] = 0.0 if abs(v) < tiny else v


@jit
def _pull_tile(x, q, g, j, t, near, scale, weight, on, off, rule, parameter):
    """g_k -= scale mass_k s_k, for the classes beside the target"""
    pivot, beside, value = near
    for k in range(g.size):
        mass = _mass(q, j + k, weight, on, off)
        if mass != 0 and j + k != t:
            slope = 1.0
            if rule != CROSS_ENTROPY:
                _, slope = _class_term(rule, parameter, (pivot - x[j + k]) / value + beside)
            g[k] -= scale * mass * slope


@jit
def _others(x, at, near):
    """sum_{k != at} p_k"""
    pivot, beside, value = near
    total = 0.0
    for k in range(x.size):
        total += 0.0 if k == at else math.exp((x[k] - pivot) / value - beside)
    return total


@jit
def _hess_tile(x, e, hess, j, t, near, inverse_sum, h, own, floor):
    """hess_k = h p_k (1 - p_k) >= floor; 1 - p is exact also where p is near 1"""
    for k in range(e.size):
        p = e[k] * inverse_sum
        curve = p * (1.0 - p)
        if j + k == t:
            curve = own
        elif p > 0.5:
            curve = p * _others(x, j + k, near)
        hess[k] = max(h * curve, floor)


@jit
def _write_gradient(x, q, out, holds, hess, e, moves, t, m, near, sums, scales, g_t, h_t, weight, on, off, rule,
                    parameter, temperature, tiny, floor, buffer):  # fmt: skip
    inverse_sum, a, h = sums
    scale, hess_scale = scales
    with_mass = off != 0 or q.size > 0
    g = np.empty(TILE if with_mass else 0)
    for j in range(0, x.size, TILE):
        n = min(TILE, x.size - j)
        # a reference has risen, unless a tile of nothing but -inf had none
        moved = min(1.0, exp_scaled(moves[0, j // TILE] - m[0], m[1] - moves[1, j // TILE], temperature))
        inverse = inverse_sum * moved
        terms = e[j : j + n]
        if hess.size:
            _hess_tile(x, terms, hess[j : j + n], j, t, near, inverse, hess_scale * h, h_t, floor)
        if with_mass:
            _scale_tile(terms, g[:n], inverse * scale * a, tiny)
            _pull_tile(x, q, g[:n], j, t, near, scale, weight, on, off, rule, parameter)
            buffer[:n] = g[:n]
        else:
            _scale_tile(terms, buffer[:n], inverse * scale * a, tiny)
        if j <= t < j + n:
            buffer[t - j] = scale * g_t
        store(buffer[:n], holds, out[j : j + n])


@jit
def _row(x, holds, q, out, out_holds, hess, e, moves, target, weight, on, off, z_loss, s, scale, hess_scale, emit, rule,
         parameter, temperature, sparse, tiny, floor, buffer):  # fmt: skip
    """(loss, lse) of a row that counts; target -1: none; sparse: some classes are left out, as -inf."""
    t = target
    if t < 0 and (q.size or emit != 1):
        t = _argmax_mass(q, weight, on, off) if q.size else _argmax(x, holds, buffer)
    x_t = 0.0
    if t >= 0:
        load(x[t : t + 1], holds, buffer[:1])
        x_t = float(buffer[0])
    base, n, pivot, rest, infinite = _statistics(x, holds, t, x_t, temperature, buffer, e, moves)
    if t < 0:
        log_sum = math.nan if infinite else math.log(math.ldexp(rest, -int(LEAD)))
        inverse = 0.0 if sparse and rest == 0 else 1.0 / rest
        if math.isnan(log_sum):
            inverse = math.nan
        _write_gradient(x, q, out, out_holds, hess, e, moves, -1, (base, n), (pivot, log_sum, temperature[VALUE]),
                        (inverse, 1.0, 0.0), (scale, 0.0), 0.0, 0.0, weight, on, 0.0, rule, parameter, temperature,
                        tiny, floor, buffer)  # fmt: skip
        return 0.0, _reference_minus(base, n, 0.0, temperature) + log_sum
    nll, p_t, p_rest, lse, beside, total = _log_parts(base, n, pivot, rest, x_t, temperature)
    if infinite:
        nll = p_t = p_rest = lse = beside = math.nan
    if emit == 2:
        for j in range(0, x.size, TILE):
            tile, count = _tile(x, holds, j, -1, buffer)
            for k in range(count):
                tile[k] = (float(tile[k]) - x_t) - nll
            store(tile[:count], out_holds, out[j : j + count])
        return 0.0, lse
    w_t = weight[t] if weight.size else 1.0
    mass_t = w_t * (on * (q[t] if q.size else 1.0) + off)
    near = (pivot, beside, temperature[VALUE])
    loss_rest, slope_rest = 0.0, 0.0
    if off != 0 or q.size:
        loss_rest, slope_rest = _rest_terms(x, q, t, near, weight, on, off, rule, parameter)
    loss_t, slope_t = _term(rule, parameter, nll, p_t, p_rest)
    row_weight = 1.0 if q.size else w_t
    loss, a, g_t, h = _combine(
        loss_t, slope_t, p_t, p_rest, lse, mass_t, loss_rest, slope_rest, row_weight, z_loss
    )  # fmt: skip
    if emit == 1 and math.isnan(beside):
        _fill(out, out_holds, math.nan, buffer)
        hess[:] = math.nan
    elif emit == 1:
        _write_gradient(x, q, out, out_holds, hess, e, moves, t, (base, n), near, (1.0 / total, a, h),
                        (scale * s, hess_scale * s), g_t, p_t * p_rest, weight, on, off, rule, parameter, temperature,
                        tiny, floor, buffer)  # fmt: skip
    return s * loss, lse


# --- Divergences ------------------------------------------------------------------------------------------------------


@jit
def _distribution(x, temperature, log_probs, buffer):
    """(t, base, n, pivot, lse - pivot / temperature, 1 / sum, nll_t, p_t) with t the largest class."""
    if log_probs:
        return -1, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0
    t = _argmax(x, 0, buffer)
    x_t = float(x[t])
    base, n, pivot, rest, infinite = _statistics(x, 0, t, x_t, temperature, buffer, buffer[:0], np.empty((2, 0)))
    nll, p_t, _, _, beside, total = _log_parts(base, n, pivot, rest, x_t, temperature)
    if infinite:
        nll = p_t = beside = math.nan
    return t, base, n, pivot, beside, 1.0 / total, nll, p_t


@jit
def _log_prob(x, k, d, temperature):
    """(log p_k, p_k)"""
    t, base, n, pivot, beside, inverse_sum, nll, p_t = d
    if k == t:
        return -nll, p_t
    return (x[k] - pivot) / temperature[VALUE] - beside, exp_scaled(x[k] - base, n, temperature) * inverse_sum


@jit
def _pair(x, y, k, model, other, temperature):
    """(p_k, q_k, log q_k - log p_k); without another distribution log q is 0."""
    log_p, p = _log_prob(x, k, model, temperature)
    if not y.size:
        return p, 0.0, -log_p
    log_q, q = _log_prob(y, k, other, temperature)
    return p, q, log_q - log_p


@jit
def _bregman(d):
    """d + exp(-d) - 1 for |d| <= 0.5, by its series."""
    total = 1.0
    for i in range(16, 2, -1):
        total = 1.0 - total * (d / i)
    return total * d * d / 2


@jit
def _divergence_row(x, y, out, hess, s, scale, hess_scale, emit, rule, temperature, log_probs, floor, buffer):
    """s KL(q || p) or s KL(p || q) of a row: see `csrc/divergence_tpl.h`."""
    reverse, plain = rule == KL_REVERSE, log_probs or not y.size
    model = _distribution(x, temperature, log_probs, buffer)
    other = _distribution(y, temperature, log_probs, buffer) if y.size else model
    loss, lost = 0.0, 0.0
    for k in range(x.size):
        p, q, d = _pair(x, y, k, model, other, temperature)
        mass, against, ratio = (p, q, -d) if reverse else (q, p, d)
        if not plain and abs(ratio) <= 0.5:
            term = mass * _bregman(ratio)
        else:
            term = 0.0 if mass == 0 and not math.isnan(against) else mass * ratio
            term += 0.0 if plain else against - mass
        loss, lost = add(loss, lost, term)
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


# --- Rows -------------------------------------------------------------------------------------------------------------


@jit
def _limit_lse(x, holds, buffer):
    """logsumexp where the formula is NaN: it alone has limits where a loss has none."""
    limit = -math.inf
    for j in range(0, x.size, TILE):
        tile, n = _tile(x, holds, j, -1, buffer)
        for k in range(n):
            if math.isnan(tile[k]):
                return math.nan
            if tile[k] == math.inf:
                limit = math.inf
    return limit


@jit
def _fill(out, holds, value, buffer):
    """out <- value"""
    buffer[:] = value
    for j in range(0, out.size, TILE):
        n = min(TILE, out.size - j)
        store(buffer[:n], holds, out[j : j + n])


@jit
def rows(x, holds, q, out, out_holds, hess, e, real, target, has_target, ignore_index, weight, sample_weight, upstream,
         on, off, z_loss, scale, hess_scale, emit, rule, parameter, temperature, sparse, tiny, floor, loss,
         lse):  # fmt: skip
    """The sum of the row losses. e: room for the exponentials of a row, or out itself; `real` has the compute dtype."""
    buffer = np.empty(TILE, real.dtype)
    moves = np.empty((2, (x.shape[1] + TILE - 1) // TILE))
    total, lost = 0.0, 0.0
    for i in range(x.shape[0]):
        s = sample_weight[i] if sample_weight.size else 1.0
        t = target[i] if has_target else -1
        if s == 0 or (has_target and t == ignore_index):
            if loss.size:
                loss[i] = 0
            if emit:
                _fill(out[i], out_holds, 0.0, buffer)
                hess[i, :] = 0
            continue
        u = upstream[i] if upstream.size else 1.0
        row_loss, row_lse = _row(x[i], holds, q[i], out[i], out_holds, hess[i], e[i % e.shape[0]], moves, t, weight, on,
                                 off, z_loss, s, u * scale, u * hess_scale, emit, rule, parameter, temperature, sparse,
                                 tiny, floor, buffer)  # fmt: skip
        total, lost = add(total, lost, row_loss)
        if loss.size:
            loss[i] = row_loss
        if lse.size:
            lse[i] = _limit_lse(x[i], holds, buffer) if math.isnan(row_lse) else row_lse
    return total


@jit
def divergence_rows(x, q, out, hess, sample_weight, upstream, scale, hess_scale, emit, rule, temperature, log_probs,
                    floor, loss):  # fmt: skip
    """The sum of the row losses."""
    buffer = np.empty(TILE)
    total, lost = 0.0, 0.0
    for i in range(x.shape[0]):
        s = sample_weight[i] if sample_weight.size else 1.0
        u = upstream[i] if upstream.size else 1.0
        row_loss = 0.0
        if s == 0:
            out[i, :] = 0
            hess[i, :] = 0
        else:
            row_loss = _divergence_row(x[i], q[i], out[i], hess[i], s, u * scale, u * hess_scale, emit, rule,
                                       temperature, log_probs, floor, buffer)  # fmt: skip
        total, lost = add(total, lost, row_loss)
        if loss.size:
            loss[i] = row_loss
    return total
