"""Laws that hold whatever the numbers are."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import ce_fast as ce

ROWS = hnp.arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(2, 40)), elements=st.floats(-30, 30))


def targets(logits):
    return np.arange(logits.shape[0]) * 7 % logits.shape[1]


@given(ROWS, st.integers(-1000, 1000))
def test_adding_a_constant_to_a_row_keeps_the_loss(logits, constant):
    logits = np.round(logits * 64) / 64  # so that the sum is exact
    t = targets(logits)
    assert ce.cross_entropy(logits + constant, t) == pytest.approx(ce.cross_entropy(logits, t), rel=1e-14, abs=1e-300)


@given(ROWS, st.randoms())
def test_permuting_classes_permutes_the_gradient(logits, random):
    order = list(range(logits.shape[1]))
    random.shuffle(order)
    t = targets(logits)
    loss = ce.CrossEntropyLoss(label_smoothing=0.1)
    value, grad = loss.value_and_grad(logits, t)
    value2, grad2 = loss.value_and_grad(logits[:, order], np.argsort(order)[t])
    assert value2 == pytest.approx(value, rel=1e-14)
    np.testing.assert_allclose(grad2, grad[:, order], rtol=1e-12, atol=1e-16)


@given(ROWS, st.floats(0, 1), st.floats(0, 0.1))
def test_gradient_rows_sum_to_the_slope_of_the_z_loss(logits, eps, z_loss):
    """Cross-entropy does not change along a constant; z_loss lse^2 changes by 2 z_loss lse."""
    _, grad = ce.CrossEntropyLoss(label_smoothing=eps, z_loss=z_loss, reduction="none").value_and_grad(
        logits, targets(logits)
    )
    slope = 2 * z_loss * ce.logsumexp(logits)
    np.testing.assert_allclose(grad.sum(-1), slope, rtol=1e-12, atol=1e-13)


@given(ROWS, st.floats(0, 1))
def test_one_hot_class_probabilities_equal_indices(logits, eps):
    t = targets(logits)
    loss = ce.CrossEntropyLoss(label_smoothing=eps)
    by_index, by_probability = loss.value_and_grad(logits, t), loss.value_and_grad(logits, np.eye(logits.shape[1])[t])
    assert by_probability[0] == pytest.approx(by_index[0], rel=1e-14, abs=1e-300)
    np.testing.assert_allclose(by_probability[1], by_index[1], rtol=1e-13, atol=1e-17)


@given(ROWS, st.sampled_from([{}, {"label_smoothing": 0.2}, {"z_loss": 0.01}, {"reduction": "sum"}]))
def test_finite_differences_agree_with_the_gradient(logits, options):
    loss, t, h = ce.CrossEntropyLoss(**options), targets(logits), 1e-5
    _, grad = loss.value_and_grad(logits, t)
    for i, k in np.ndindex(logits.shape):
        step = np.zeros_like(logits)
        step[i, k] = h
        assert (loss(logits + step, t) - loss(logits - step, t)) / (2 * h) == pytest.approx(grad[i, k], abs=2e-8)


@given(ROWS)
def test_softmax_and_its_relatives_agree(logits):
    np.testing.assert_allclose(ce.softmax(logits).sum(-1), 1, rtol=1e-14)
    np.testing.assert_allclose(np.log(ce.softmax(logits)), ce.log_softmax(logits), rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(logits - ce.log_softmax(logits), ce.logsumexp(logits)[:, None] + 0 * logits, atol=1e-13)
    t = targets(logits)
    assert ce.nll_loss(ce.log_softmax(logits), t) == pytest.approx(ce.cross_entropy(logits, t), rel=1e-14, abs=1e-300)
    assert ce.perplexity(logits, t) == pytest.approx(np.exp(ce.cross_entropy(logits, t)), rel=1e-14)


def test_a_million_equal_rows_have_the_mean_of_one(backend):
    """Their roundings all go one way: plain float64 additions would lose thousands of ulp."""
    rows = np.zeros((1_000_000, 3), np.float32)
    weight = np.full(1_000_000, 0.1)
    assert ce.cross_entropy(rows, np.zeros(1_000_000, int), sample_weight=weight) == pytest.approx(np.log(3), rel=1e-15)


@given(ROWS)
def test_boolean_sample_weight_is_a_mask(logits):
    t, mask = targets(logits), np.arange(logits.shape[0]) % 2 == 0
    assert ce.cross_entropy(logits, t, sample_weight=mask) == pytest.approx(ce.cross_entropy(logits[mask], t[mask]))
