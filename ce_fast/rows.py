"""What is known of each row of logits: one pass, some numbers a row."""

from dataclasses import dataclass

import numpy as np

from ce_fast import inputs
from ce_fast.backends import Rows
from ce_fast.inputs import Logits


@dataclass(frozen=True, slots=True)
class RowValues:
    """Of (n_rows,) rows, in C order over the outer axes; NaN and -1 of rows that do not count."""

    lse: np.ndarray
    log_prob: np.ndarray
    max: np.ndarray
    argmax: np.ndarray
    rank: np.ndarray
    entropy: np.ndarray
    sum_sq_prob: np.ndarray
    brier: np.ndarray


def row_values(logits: Logits, rows: Rows, *, temperature: float = 1.0, n_threads: int | None = None) -> RowValues:
    n_classes = logits.n_classes
    z = logits.rows.reshape(-1, n_classes).astype(np.float64) / temperature
    n = len(z)
    target = np.full(n, -1) if rows.target is None else rows.target.astype(np.int64)
    counts = np.ones(n, bool) if rows.target is None else target != rows.ignore_index
    if rows.sample_weight is not None:
        counts &= rows.sample_weight != 0
    bad = counts & (rows.target is not None) & ((target < 0) | (target >= n_classes))
    inputs.check_target_found(int(np.argmax(bad)) if bad.any() else -1, rows, logits)
    values = {name: np.full(n, np.nan) for name in ("lse", "log_prob", "max", "entropy", "sum_sq_prob", "brier")}
    values |= {name: np.full(n, -1) for name in ("argmax", "rank")}
    for i in np.flatnonzero(counts):
        x = z[i]
        top = x.max()
        with np.errstate(all="ignore"):
            lse = top + np.log(np.exp(x - top).sum())
            p = np.exp(x - lse)
            values["lse"][i], values["max"][i], values["argmax"][i] = lse, top, int(x.argmax())
            values["entropy"][i] = np.where(p > 0, p * (lse - x), 0 * p).sum()
            values["sum_sq_prob"][i] = (p * p).sum()
            if rows.target is None:
                continue
            t = target[i]
            values["log_prob"][i] = x[t] - lse
            values["rank"][i] = (x > x[t]).sum() + (x[:t] == x[t]).sum()
            values["brier"][i] = np.expm1(x[t] - lse) ** 2 + (p * p).sum() - p[t] ** 2
    return RowValues(**values)
