"""From row losses to a number: mean, sum, none, and what a mean divides by."""

import math

import numpy as np

REDUCTIONS = ("mean", "sum", "none")
DENOMINATORS = ("weight", "count", "total")


def divisor(reduction: str, denominator: str | float, n_rows: int, n_counted: int, weight_sum: float) -> float:
    """What the sum of the row losses is divided by: 1 unless the reduction is a mean.

    n_counted: rows whose target is not ignored and whose sample weight is not 0.
    weight_sum: sum over those rows of sample weight times class weight of the target.
    """
    if reduction != "mean":
        return 1.0
    if isinstance(denominator, str):
        return float({"weight": weight_sum, "count": n_counted, "total": n_rows}[denominator])
    return float(denominator)


def summed(row_losses: np.ndarray) -> float:
    return math.fsum(row_losses) if np.isfinite(row_losses).all() else float(row_losses.sum())


def reduced(loss_sum: float, divisor: float) -> float:
    """NaN where nothing counts, as a mean over nothing is."""
    return loss_sum / divisor if divisor else float("nan")


def gradient_scale(divisor: float) -> float:
    """The factor of every row's gradient; 0 where nothing counts."""
    return 1.0 / divisor if divisor else 0.0
