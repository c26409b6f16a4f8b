"""How far a result may be from the exact one, and why. No test has a tolerance of its own."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tolerance:
    eps: float  # unit of the bounds below: the spacing of the compute dtype at 1
    loss_ulp: float  # of a row's loss
    grad_ulp: float  # of a gradient, against the largest of its own terms
    storage_eps: float  # of the gradient's dtype; 16-bit gradients are rounded once from the compute dtype
    floor: float  # magnitudes that may be flushed to 0


_FLUSH = 2.0  # results under the smallest normal are 0: arithmetic on subnormals is 20 to 40 times slower
# float32 and float64: exp within 1 to 1.5 ulp, its sum, one division, one rounding of the result
_FLOAT32, _FLOAT64 = 2.0**-23, 2.0**-52
TOLERANCES = {
    "float64": Tolerance(_FLOAT64, 4, 4, 0, _FLUSH * float(np.finfo(np.float64).tiny)),
    "float32": Tolerance(_FLOAT32, 3, 3, 0, _FLUSH * float(np.finfo(np.float32).tiny)),
    "float16": Tolerance(_FLOAT32, 3, 3, 2.0**-10, 2.0**-24),
    "bfloat16": Tolerance(_FLOAT32, 3, 3, 2.0**-7, _FLUSH * float(np.finfo(np.float32).tiny)),
}


def assert_loss_close(actual, expected, dtype, terms=None):
    """Row losses (or a sum of them) within loss_ulp of themselves or `terms`; equal where they are not finite."""
    tol = TOLERANCES[np.dtype(dtype).name]
    actual, expected = np.asarray(actual, np.longdouble), np.asarray(expected, np.longdouble)
    assert actual.shape == expected.shape
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.asarray(actual[~finite], float), np.asarray(expected[~finite], float))
    magnitude = np.abs(expected if terms is None else np.asarray(terms))[finite]
    error, bound = np.abs(actual - expected)[finite], tol.loss_ulp * tol.eps * magnitude + tol.floor
    assert (error <= bound).all(), f"loss off by {float((error / bound).max()) * tol.loss_ulp:.3g} ulp"


def assert_grad_close(actual, expected, terms, dtype):
    """Elements within grad_ulp of the largest of their terms, and half a unit of a 16-bit dtype; NaN where NaN."""
    tol = TOLERANCES[np.dtype(dtype).name]
    actual, expected = np.asarray(actual).astype(np.longdouble), np.asarray(expected, np.longdouble)
    assert actual.shape == expected.shape
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    error = np.abs(actual - expected)[~nan]
    magnitude = np.maximum(np.asarray(terms, np.longdouble), np.abs(expected))[~nan]
    bound = tol.grad_ulp * tol.eps * magnitude + 0.5 * tol.storage_eps * magnitude + tol.floor
    assert (error <= bound).all(), f"gradient off by {float((error / bound).max()):.3g} of its bound"


def assert_product_close(actual, expected, terms, n_terms, dtype):
    """Sums of n_terms gradients times exact numbers, in any order: each has its own error, and each addition another
    half unit of the sum of their magnitudes; half a unit of a 16-bit dtype, once, for all of them."""
    tol = TOLERANCES[np.dtype(dtype).name]
    actual, expected = np.asarray(actual).astype(np.longdouble), np.asarray(expected, np.longdouble)
    assert actual.shape == expected.shape
    error, terms = np.abs(actual - expected), np.maximum(np.asarray(terms, np.longdouble), np.abs(expected))
    bound = (tol.grad_ulp + n_terms / 2) * tol.eps * terms + 0.5 * tol.storage_eps * np.abs(expected)
    bound += (n_terms + 1) * tol.floor
    assert (error <= bound).all(), f"product off by {float((error / bound).max()):.3g} of its bound"
