"""Errors in ulp on hard rows, against mpmath: ours and torch's on the same rows.

    python tests/accuracy.py [--classes 10 1000 50257 152064] [--markdown]

A row has logits spread over `spread`, and is asked for its largest class, its smallest and one at random. Errors are in
units in the last place of the compute dtype: of the loss; of the gradient at the target; and of the other elements of
the gradient. 16-bit logits are held against the exact loss of the logits as rounded.
"""

import argparse
from dataclasses import dataclass

import ml_dtypes
import mpmath as mp
import numpy as np

import ce_fast as ce
from ce_fast.backends import compiled

SPREADS = (0.1, 1.0, 10.0, 30.0, 100.0, 1000.0)
DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Exact:
    """One row with one target, right to more digits than any dtype here has."""

    logits: np.ndarray
    target: int
    loss: np.longdouble
    rest: np.longdouble  # 1 - p_t
    p: np.ndarray  # softmax, longdouble


def wide(x) -> np.longdouble:
    high = float(x)
    return np.longdouble(high) + np.longdouble(float(x - high))


def hard_rows(n_classes: int, dtype, seed: int = 0):
    rng = np.random.default_rng([seed, n_classes])
    for spread in SPREADS:
        x = (rng.random(n_classes) * spread + rng.choice([0.0, 5.0, -300.0])).astype(dtype)
        with mp.workdps(30):
            values = [mp.mpf(float(v)) for v in x]
            top = max(values)
            e = [mp.exp(v - top) for v in values]
            total = mp.fsum(e)
            p = np.array([wide(v / total) for v in e])
            for t in {int(x.argmax()), int(x.argmin()), int(rng.integers(n_classes))}:
                rest = mp.fsum(e[:t]) + mp.fsum(e[t + 1 :])
                loss = mp.log1p(rest / e[t]) if e[t] > 0 else top - values[t] + mp.log(total)
                yield Exact(x, t, wide(loss), wide(rest / total), p)


def ulps(actual, expected, compute) -> float:
    """Largest error in ulp, of what is not so small that it may be flushed to 0."""
    actual, expected = np.atleast_1d(actual).astype(np.longdouble), np.atleast_1d(expected)
    info = np.finfo(compute)
    kept = np.abs(expected) > 2 * float(info.tiny)
    if not kept.any():
        return 0.0
    spacing = np.spacing(np.abs(expected[kept]).astype(compute)).astype(np.longdouble)
    return float((np.abs(actual[kept] - expected[kept]) / spacing).max())


def errors(rows, function, dtype) -> dict[str, float]:
    """function(logits, target) -> (row loss, gradient) of one row; worst errors over all rows."""
    compute = np.float64 if dtype == np.float64 else np.float32
    worst = {"loss": 0.0, "gradient at the target": 0.0, "gradient elsewhere": 0.0}
    for row in rows:
        loss, grad = function(row.logits, row.target)
        found = {"loss": ulps(loss, row.loss, compute)}
        if np.dtype(dtype).itemsize > 2:  # a 16-bit gradient is rounded to 16 bits
            others = np.arange(row.p.size) != row.target
            found["gradient at the target"] = ulps(grad[row.target], -row.rest, compute)
            found["gradient elsewhere"] = ulps(grad[others], row.p[others], compute) if others.any() else 0.0
        worst = {name: max(error, found.get(name, 0.0)) for name, error in worst.items()}
    return worst


def ours(logits, target):
    loss, grad = ce.CrossEntropyLoss(reduction="none").value_and_grad(logits[None], np.array([target]))
    return loss[0], grad[0]


def torchs(logits, target):
    import torch

    bits = logits.dtype.name == "bfloat16"
    x = torch.from_numpy(logits.view(np.int16)).view(torch.bfloat16) if bits else torch.from_numpy(logits)
    x = x[None].clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x, torch.tensor([target]))
    loss.backward()
    return loss.detach().double().numpy(), x.grad[0].double().numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 1000, 50257, 152064])
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args()
    columns = [*compiled.ISAS, "numba", "torch"]
    head = ["dtype", "largest error in ulp of the", *columns]
    table = []
    for name, dtype in DTYPES.items():
        rows = [row for k in options.classes for row in hard_rows(k, dtype)]
        found = {}
        for isa in compiled.ISAS:
            with compiled._use_isa(isa):
                found[isa] = errors(rows, ours, dtype)
        with ce.use_backend("numba"):
            found["numba"] = errors(rows, ours, dtype)
        found["torch"] = errors(rows, torchs, dtype)
        for what in found["torch"]:
            if what == "loss" or np.dtype(dtype).itemsize > 2:
                table.append([name, what, *(f"{found[column][what]:.3g}" for column in columns)])
    print(f"{len(SPREADS)} spreads from {SPREADS[0]} to {SPREADS[-1]}, classes {options.classes}\n")
    if options.markdown:
        for row in [head, ["---"] * len(head), *table]:
            print("| " + " | ".join(row) + " |")
        return
    widths = [max(len(row[i]) for row in [head, *table]) for i in range(len(head))]
    for row in [head, *table]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
