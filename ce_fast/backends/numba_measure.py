"""What evaluation asks of a row, for Numba: `csrc/measure_tpl.h`, in double precision and three passes over a row.

e_k = exp(z_k - z_top);  rest, moment, squares: sums over k != top of e_k, e_k (z_k - z_top), e_k^2
"""

import math

import numpy as np

from ce_fast.backends.numba_math import RUN, VALUE, add, exp_args, exp_scaled, exp_tile, jit, plus
from ce_fast.backends.numba_rows import _reference


@jit
def _before(x, k, x_t, t):
    """Whether class k comes before class t of logit x_t; NaN is above all."""
    if x[k] == x_t or (math.isnan(x[k]) and math.isnan(x_t)):
        return k < t
    return k != t and (x[k] > x_t or math.isnan(x[k]))


@jit
def _top(x):
    top = 0
    for k in range(x.size):
        if math.isnan(x[k]):
            return k
        if x[k] > x[top]:
            top = k
    return top


@jit
def _products(e, x, x_top):
    """(sum of e_k (x_k - x_top), sum of e_k^2) of a run; -inf adds nothing"""
    moment, squares = 0.0, 0.0
    for k in range(x.size):
        moment = plus(moment, e[k] * (x[k] - x_top) if e[k] > 0 else 0.0)
        squares = plus(squares, e[k] * e[k])
    return moment, squares


@jit
def _sums(x, top, temperature, buffer):
    """(rest, moment, squares) of a row whose largest class is `top`, finite."""
    x_top = x[top]
    base, n = _reference(x_top, temperature)  # no rounded x - x_top enters exp
    args, e_top = exp_args(base, n, temperature, buffer), exp_scaled(x_top - base, n, temperature)
    rest, rest_lost, moment, moment_lost, squares, squares_lost = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for j in range(0, x.size, RUN):
        count = min(RUN, x.size - j)
        buffer[:count] = x[j : j + count]
        buffer[count:] = -np.inf
        if j <= top < j + count:
            buffer[top - j] = -np.inf
        rest, rest_lost = add(rest, rest_lost, exp_tile(buffer, args))
        run_moment, run_squares = _products(buffer, x[j : j + count], x_top)
        moment, moment_lost = add(moment, moment_lost, run_moment)
        squares, squares_lost = add(squares, squares_lost, run_squares)
    return rest / e_top, moment / e_top / temperature[VALUE], squares / e_top / e_top


@jit
def measure_rows(x, counts, target, has_target, target_logit, temperature, lse, log_prob, most, entropy, sum_sq_prob,
                 brier, argmax, rank):  # fmt: skip
    """Fill the values of the rows that count, of logits (n_rows, n_classes) in double precision."""
    buffer = np.empty(RUN)
    for i in range(x.shape[0]):
        if not counts[i]:
            continue
        row, t, top = x[i], target[i] if has_target else -1, _top(x[i])
        inside = 0 <= t < row.size
        x_top, x_t = row[top], target_logit[i] if target_logit.size else (row[t] if inside else 0.0)
        argmax[i], most[i] = top, x_top / temperature[VALUE]
        if has_target:
            above = 0
            for k in range(row.size):
                above += _before(row, k, x_t, t)
            rank[i] = above
        if not math.isfinite(x_top):
            lse[i] = x_top
            for k in range(row.size):  # NaN comes before +inf
                lse[i] = row[k] if math.isnan(row[k]) else lse[i]
            continue
        rest, moment, squares = _sums(row, top, temperature, buffer)
        total = 1.0 + rest
        lse[i] = x_top / temperature[VALUE] + math.log1p(rest)
        entropy[i] = math.log1p(rest) - moment / total
        sum_sq_prob[i] = (1.0 + squares) / total**2
        brier[i] = sum_sq_prob[i]
        if inside and t == top:
            log_prob[i] = -math.log1p(rest)
            brier[i] = (rest**2 + squares) / total**2
        elif inside:
            below = (x_t - x_top) / temperature[VALUE]
            log_prob[i], p = below - math.log1p(rest), math.exp(below) / total
            brier[i] = (1.0 - p) ** 2 + (sum_sq_prob[i] - p * p)
