"""All 65,536 values of each 16-bit dtype are read exactly, and floats are rounded to them as NumPy rounds."""

import ml_dtypes
import numpy as np
import pytest

import ce_fast as ce

SIXTEEN = [np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", SIXTEEN, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("stride", [1, 2])
def test_every_16_bit_value_is_read_exactly(variant, dtype, stride):
    values = np.repeat(np.arange(2**16, dtype=np.uint16).view(dtype), stride)[::stride]
    got = ce.logsumexp(values[:, None])  # of one class: the logit itself
    np.testing.assert_array_equal(got, values.astype(np.float32))


@pytest.mark.parametrize("dtype", SIXTEEN, ids=lambda d: np.dtype(d).name)
def test_floats_are_rounded_to_16_bits_as_numpy_rounds(variant, dtype, rng):
    """The gradient of one row of two equal logits is -upstream / 2 at the target: any float32, rounded once."""
    halves = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
    halves = halves[np.isfinite(halves)]
    finite = halves[np.abs(halves) < 2.0**126]
    ties = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(ties, np.float32(side)) for side in (np.inf, -np.inf)]
    anything = (rng.standard_normal(20000) * 10.0 ** rng.integers(-12, 6, 20000)).astype(np.float32)
    values = np.concatenate([halves, ties, *beside, anything])
    values = values[np.abs(values) < 1e38]
    zeros = np.zeros((values.size, 2), dtype)
    _, grad = ce.CrossEntropyLoss(reduction="none").value_and_grad(
        zeros, np.zeros(values.size, int), upstream=-2 * values.astype(np.float64)
    )
    with np.errstate(over="ignore"):
        expected = values.astype(dtype)
    may_be_0 = (np.abs(values) < np.finfo(np.float32).tiny) & (grad[:, 0] == 0)  # as all results
    np.testing.assert_array_equal(grad[~may_be_0, 0].astype(np.float32), expected[~may_be_0].astype(np.float32))
