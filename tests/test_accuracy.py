"""Errors in ulp on hard rows against mpmath, over spreads of 0.1 to 1000, and never larger than torch's."""

import numpy as np
import pytest

from accuracy import DTYPES, errors, hard_rows, ours, torchs
from tolerances import TOLERANCES

CLASSES = {"short": [2, 10, 1000], "long": [50257], "longest": [152064]}


@pytest.fixture(scope="module")
def rows():
    made = {}

    def get(length, name):
        if (length, name) not in made:
            made[length, name] = [row for k in CLASSES[length] for row in hard_rows(k, DTYPES[name])]
        return made[length, name]

    return get


@pytest.mark.parametrize(
    "name, length", [(name, "short") for name in DTYPES] + [("float32", "longest"), ("float64", "long")]
)
def test_hard_rows_are_right_to_the_stated_ulp(variant, rows, name, length):
    tol = TOLERANCES[name]
    found = errors(rows(length, name), ours, DTYPES[name])
    assert found["loss"] <= tol.loss_ulp
    assert found["gradient at the target"] <= tol.grad_ulp
    assert found["gradient elsewhere"] <= tol.grad_ulp


@pytest.mark.parametrize("name", DTYPES)
def test_largest_error_is_no_larger_than_that_of_torch(rows, name):
    pytest.importorskip("torch")
    mine, other = (errors(rows("short", name), function, DTYPES[name]) for function in (ours, torchs))
    assert all(mine[what] <= other[what] for what in mine), (mine, other)


def test_sixteen_bit_gradients_are_the_exact_ones_rounded_once(variant, rows):
    """To nearest, ties to even: at most a compute ulp beyond half a unit of the storage dtype."""
    for name in ("float16", "bfloat16"):
        tol = TOLERANCES[name]
        for row in rows("short", name):
            _, grad = ours(row.logits, row.target)
            expected = row.p.copy()
            expected[row.target] = -row.rest
            normal = np.abs(expected) > tol.floor / tol.storage_eps
            error = np.abs(grad.astype(np.longdouble) - expected)[normal] / np.abs(expected)[normal]
            assert (error <= 0.5 * tol.storage_eps + tol.grad_ulp * tol.eps).all()
