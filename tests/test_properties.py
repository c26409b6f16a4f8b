"""Laws that hold whatever the numbers are."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import ce_fast as ce
from tolerances import assert_grad_close

pytestmark = pytest.mark.filterwarnings("ignore:logits look like probabilities")  # as rows of zeros and a one do

ROWS = hnp.arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(2, 40)), elements=st.floats(-30, 30))

# a class with the options that make it a rule of its own
RULES = [
    ce.CrossEntropyLoss,
    *(partial(ce.FocalLoss, gamma=gamma) for gamma in (0.0, 0.5, 1.0, 2.0, 5.0)),
    *(partial(ce.PolyLoss, epsilon=epsilon) for epsilon in (-1.0, 0.0, 2.5)),
    *(partial(ce.GeneralizedCrossEntropyLoss, q=q) for q in (0.01, 0.7, 1.0)),
]


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


@given(ROWS, st.sampled_from(RULES), st.floats(0, 1), st.sampled_from([0.25, 1.0, 3.0]))
def test_no_rule_changes_along_a_constant(logits, rule, eps, temperature):
    loss = rule(label_smoothing=eps, temperature=temperature, reduction="none")
    _, grad = loss.value_and_grad(logits, targets(logits))
    np.testing.assert_allclose(grad.sum(-1), 0, atol=1e-12 / temperature)


@given(ROWS, st.floats(0, 1))
def test_one_hot_class_probabilities_equal_indices(logits, eps):
    t = targets(logits)
    loss = ce.CrossEntropyLoss(label_smoothing=eps)
    by_index, by_probability = loss.value_and_grad(logits, t), loss.value_and_grad(logits, np.eye(logits.shape[1])[t])
    assert by_probability[0] == pytest.approx(by_index[0], rel=1e-14, abs=1e-300)
    mass = (1 - eps) * np.eye(logits.shape[1])[t] + eps / logits.shape[1]
    terms = np.maximum(ce.softmax(logits), mass) / len(logits)  # which cancel where p is what it should be
    assert_grad_close(by_probability[1], by_index[1], terms, np.float64)


@given(ROWS, st.sampled_from([{}, {"label_smoothing": 0.2}, {"z_loss": 0.01}, {"reduction": "sum"}]))
def test_finite_differences_agree_with_the_gradient(logits, options):
    loss, t, h = ce.CrossEntropyLoss(**options), targets(logits), 1e-5
    _, grad = loss.value_and_grad(logits, t)
    for i, k in np.ndindex(logits.shape):
        step = np.zeros_like(logits)
        step[i, k] = h
        assert (loss(logits + step, t) - loss(logits - step, t)) / (2 * h) == pytest.approx(grad[i, k], abs=2e-8)


@given(
    ROWS,
    st.sampled_from(RULES),
    st.sampled_from([{}, {"label_smoothing": 0.2}, {"temperature": 0.5}, {"softcap": 5.0}, {"z_loss": 0.01}]),
)
def test_finite_differences_agree_with_the_gradient_of_every_rule(logits, rule, options):
    loss, t, h = rule(**options), targets(logits), 1e-5
    _, grad = loss.value_and_grad(logits, t)
    for i, k in np.ndindex(logits.shape):
        step = np.zeros_like(logits)
        step[i, k] = h
        assert (loss(logits + step, t) - loss(logits - step, t)) / (2 * h) == pytest.approx(grad[i, k], abs=5e-8)


@given(ROWS, st.sampled_from([0.5, 1.0, 4.0]), st.sampled_from([0.0, 0.2]))
def test_the_hessian_of_cross_entropy_is_the_derivative_of_its_gradient(logits, temperature, eps):
    loss, t, h = ce.CrossEntropyLoss(temperature=temperature, label_smoothing=eps), targets(logits), 1e-5
    _, hess = loss.grad_and_hess(logits, t)
    for k in range(logits.shape[1]):
        step = np.zeros_like(logits)
        step[:, k] = h
        high, low = (loss.value_and_grad(logits + sign * step, t)[1][:, k] for sign in (1, -1))
        np.testing.assert_allclose((high - low) / (2 * h), hess[:, k], atol=1e-8)


@given(ROWS, st.sampled_from(RULES), st.floats(0, 1))
def test_one_hot_class_probabilities_equal_indices_for_every_rule(logits, rule, eps):
    t = targets(logits)
    loss = rule(label_smoothing=eps)
    by_index, by_probability = loss.value_and_grad(logits, t), loss.value_and_grad(logits, np.eye(logits.shape[1])[t])
    assert by_probability[0] == pytest.approx(by_index[0], rel=1e-12, abs=1e-300)
    np.testing.assert_allclose(by_probability[1], by_index[1], rtol=1e-11, atol=1e-15)


@given(ROWS, st.sampled_from(RULES), st.randoms())
def test_permuting_classes_permutes_the_gradient_of_every_rule(logits, rule, random):
    order = list(range(logits.shape[1]))
    random.shuffle(order)
    t, loss = targets(logits), rule(label_smoothing=0.1, temperature=2.0)
    value, grad = loss.value_and_grad(logits, t)
    value2, grad2 = loss.value_and_grad(logits[:, order], np.argsort(order)[t])
    assert value2 == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(grad2, grad[:, order], rtol=1e-10, atol=1e-15)


@given(ROWS, st.sampled_from([partial(ce.FocalLoss, gamma=0.0), partial(ce.PolyLoss, epsilon=0.0)]), st.floats(0, 1))
def test_a_rule_that_modifies_nothing_is_cross_entropy(logits, rule, eps):
    t = targets(logits)
    value, grad = rule(label_smoothing=eps).value_and_grad(logits, t)
    expected, expected_grad = ce.CrossEntropyLoss(label_smoothing=eps).value_and_grad(logits, t)
    assert value == pytest.approx(expected, rel=1e-14, abs=1e-300)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-12, atol=1e-16)


@given(ROWS, st.sampled_from([1e-3, 1e-6, 1e-12]))
def test_generalized_cross_entropy_tends_to_cross_entropy(logits, q):
    """n - q n^2 / 2 <= (1 - exp(-q n)) / q <= n, for n = -log p_t."""
    t = targets(logits)
    n = ce.CrossEntropyLoss(reduction="none")(logits, t)
    loss, grad = ce.GeneralizedCrossEntropyLoss(q=q, reduction="none").value_and_grad(logits, t)
    assert (loss <= n * (1 + 1e-14)).all() and (loss >= (n - q * n**2 / 2) * (1 - 1e-14)).all()
    _, expected = ce.CrossEntropyLoss(reduction="none").value_and_grad(logits, t)
    np.testing.assert_allclose(grad, expected * np.exp(-q * n)[:, None], rtol=1e-12, atol=1e-300)


@given(ROWS)
def test_generalized_cross_entropy_at_one_is_the_probability_of_an_error(logits):
    t = targets(logits)
    wrong = 1 - np.take_along_axis(ce.softmax(logits), t[:, None], -1)[:, 0]
    np.testing.assert_allclose(ce.GeneralizedCrossEntropyLoss(q=1.0, reduction="none")(logits, t), wrong, atol=1e-15)


@given(ROWS, st.sampled_from(RULES), st.sampled_from([0.125, 0.5, 4.0]))
def test_a_temperature_divides_the_logits(logits, rule, temperature):
    """By a power of 2, so that the quotient is exact."""
    t = targets(logits)
    value, grad = rule(label_smoothing=0.1, z_loss=1e-3, temperature=temperature).value_and_grad(logits, t)
    expected, expected_grad = rule(label_smoothing=0.1, z_loss=1e-3).value_and_grad(logits / temperature, t)
    assert value == pytest.approx(expected, rel=1e-14)
    np.testing.assert_allclose(grad, expected_grad / temperature, rtol=1e-12, atol=1e-15 / temperature)


@given(ROWS, st.sampled_from(RULES))
def test_a_large_softcap_tends_to_none(logits, rule):
    t = targets(logits)
    value, grad = rule(softcap=1e6).value_and_grad(logits, t)
    expected, expected_grad = rule().value_and_grad(logits, t)
    assert value == pytest.approx(expected, abs=1e-7)
    np.testing.assert_allclose(grad, expected_grad, atol=1e-7)


@given(ROWS, st.sampled_from([1.0, 5.0, 20.0]))
def test_a_softcap_bends_the_logits(logits, softcap):
    t = targets(logits)
    bent = softcap * np.tanh(logits / softcap)
    value, grad = ce.CrossEntropyLoss(softcap=softcap).value_and_grad(logits, t)
    expected, expected_grad = ce.CrossEntropyLoss().value_and_grad(bent, t)
    assert value == pytest.approx(expected, rel=1e-13)
    np.testing.assert_allclose(grad, expected_grad / np.cosh(logits / softcap) ** 2, rtol=1e-11, atol=1e-16)


@given(ROWS)
def test_alpha_is_a_class_weight_that_no_mean_divides_by(logits):
    t, alpha = targets(logits), np.linspace(0.25, 2, logits.shape[1])
    value, grad = ce.FocalLoss(alpha=alpha).value_and_grad(logits, t)
    expected, expected_grad = ce.FocalLoss(weight=alpha, denominator="count").value_and_grad(logits, t)
    assert value == pytest.approx(expected, rel=1e-14, abs=1e-300)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-12, atol=1e-300)
    assert ce.FocalLoss(alpha=0.25)(logits, t) == pytest.approx(ce.FocalLoss()(logits, t) / 4, rel=1e-14, abs=1e-300)


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
