"""The table of edge cases: infinities, NaN, rows that do not count, nothing at all."""

import math

import numpy as np
import pytest

import ce_fast as ce

INF, NAN = math.inf, math.nan


def run(rows, target, sample_weight=None, **options):
    """(row losses, gradient of their sum), float32."""
    loss = ce.CrossEntropyLoss(reduction="none", **options)
    return loss.value_and_grad(np.array(rows, np.float32), np.array(target), sample_weight)


def test_row_that_does_not_count_leaks_nothing(variant):
    rows = [[NAN, INF, 1.0], [1.0, 2.0, 3.0], [NAN, NAN, NAN]]
    for target, sample_weight in (
        ([-100, 0, -100], None),
        ([1, 0, 2], [0.0, 1.0, 0.0]),
        ([7, 0, -3], [False, True, False]),
    ):
        loss, grad = run(rows, target, sample_weight)
        assert loss[0] == loss[2] == 0 and np.isfinite(loss[1])
        assert (grad[[0, 2]] == 0).all() and np.isfinite(grad[1]).all()
        value, grad = ce.CrossEntropyLoss().value_and_grad(np.array(rows, np.float32), np.array(target), sample_weight)
        assert np.isfinite(value) and np.isfinite(grad).all()


def test_nan_in_a_row_that_counts_stays_in_that_row(variant, dtype):
    for n_classes in (3, 40, 1500):
        for at in (0, 1, n_classes - 1):
            logits = np.zeros((3, n_classes), dtype)
            logits[1, at] = NAN
            loss, grad = ce.CrossEntropyLoss(reduction="none").value_and_grad(logits, np.array([0, 1, 2]))
            assert np.isnan(loss).tolist() == [False, True, False]
            assert np.isnan(grad.astype(float)).all(-1).tolist() == [False, True, False]
            assert not np.isnan(grad[[0, 2]].astype(float)).any()


@pytest.mark.parametrize("n_classes", [3, 2000])
def test_minus_infinity_off_the_target_is_probability_zero(variant, dtype, n_classes):
    logits = np.zeros((1, n_classes), dtype)
    logits[0, 1] = -INF
    loss, grad = ce.CrossEntropyLoss(reduction="none").value_and_grad(logits, np.array([0]))
    assert loss[0] == pytest.approx(math.log(n_classes - 1), rel=1e-6)
    assert grad[0, 1] == 0
    loss, grad = ce.CrossEntropyLoss(reduction="none", label_smoothing=0.1).value_and_grad(logits, np.array([0]))
    assert loss[0] == INF
    assert np.isfinite(grad.astype(float)).all()


def test_minus_infinity_on_the_target_is_an_infinite_loss(variant):
    loss, grad = run([[-INF, 1.0, 1.0]], [0])
    assert loss[0] == INF
    np.testing.assert_allclose(grad[0], [-1, 0.5, 0.5], rtol=1e-6)


def test_mass_zero_against_minus_infinity_contributes_nothing(variant):
    loss, _ = run([[0.0, -INF, 0.0]], [0], weight=[1.0, 0.0, 1.0], label_smoothing=0.1)
    assert np.isfinite(loss[0])
    loss, _ = run([[0.0, -INF, 0.0]], [1], weight=[1.0, 0.0, 1.0])
    assert loss[0] == 0
    loss, grad = run([[0.0, -INF, 0.0]], [[0.5, 0.0, 0.5]])
    assert loss[0] == pytest.approx(math.log(2)) and grad[0, 1] == 0
    loss, _ = run([[0.0, -INF, 0.0]], [[0.5, 0.25, 0.25]])
    assert loss[0] == INF


@pytest.mark.parametrize(
    "row", [[INF, 0.0, 1.0], [0.0, INF, 1.0], [INF, INF, INF], [-INF, -INF, -INF], [INF, -INF, 0.0]]
)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}], ids=str)
def test_plus_infinity_or_nothing_but_minus_infinity_is_nan(variant, row, options):
    loss, grad = run([row], [0], **options)
    assert np.isnan(loss[0]) and np.isnan(grad).all()
    assert np.isnan(ce.softmax(np.array([row]))).all() and np.isnan(ce.log_softmax(np.array([row]))).all()


@pytest.mark.parametrize("n_classes", [3, 2000])
def test_logsumexp_has_its_true_limits(variant, dtype, n_classes):
    def lse(at, value, fill):
        row = np.full((1, n_classes), fill, dtype)
        row[0, at] = value
        return ce.logsumexp(row)[0]

    for at in (0, n_classes - 1):
        assert lse(at, -INF, -INF) == -INF
        assert lse(at, INF, 0.0) == INF
        assert lse(at, INF, -INF) == INF
        assert np.isnan(lse(at, INF, NAN)) and np.isnan(lse(at, NAN, 0.0))


@pytest.mark.parametrize(
    "options", [{}, {"denominator": "count"}, {"weight": np.zeros(3)}], ids=["weight", "count", "zero"]
)
def test_mean_over_nothing_is_nan_with_gradient_zero(variant, options):
    target = [-100, -100] if "weight" not in options else [0, 1]
    value, grad = ce.CrossEntropyLoss(**options).value_and_grad(np.ones((2, 3)), np.array(target))
    assert math.isnan(value) and (grad == 0).all()
    assert (
        ce.CrossEntropyLoss(reduction="sum", **{k: v for k, v in options.items() if k != "denominator"})(
            np.ones((2, 3)), np.array(target)
        )
        == 0
    )


def test_no_rows_give_nan_mean_and_zero_sum(variant, dtype):
    empty = np.zeros((0, 4), dtype)
    for target in (np.zeros(0, np.int64), []):
        value, grad = ce.CrossEntropyLoss().value_and_grad(empty, target)
        assert math.isnan(value) and grad.shape == (0, 4)
        assert ce.CrossEntropyLoss(reduction="sum")(empty, target) == 0
        assert ce.CrossEntropyLoss(reduction="none")(empty, target).shape == (0,)
    assert ce.softmax(empty).shape == ce.log_softmax(empty).shape == (0, 4)
    assert ce.logsumexp(empty).shape == (0,)


def test_one_class_is_certain(variant, dtype):
    for x in (0.0, 1000.0, -1000.0):
        value, grad = ce.CrossEntropyLoss().value_and_grad(np.full((2, 1), x, dtype), np.array([0, 0]))
        assert value == 0 and (grad == 0).all()


def test_values_far_apart_underflow_to_zero_and_raise_no_flags(variant, dtype):
    logits = np.array([[0.0, -60000.0, 60000.0]], dtype)
    with np.errstate(all="raise"):
        value, grad = ce.CrossEntropyLoss().value_and_grad(logits, np.array([2]))
    assert value == 0 and (grad == 0).all()


def test_caller_arrays_are_not_changed(variant, rng):
    logits, q = rng.standard_normal((4, 5)), rng.random((4, 5))
    weight, sample_weight = rng.random(5), rng.random(4)
    copies = [a.copy() for a in (logits, q, weight, sample_weight)]
    loss = ce.CrossEntropyLoss(weight, label_smoothing=0.1)
    loss.value_and_grad(logits, q, sample_weight)
    weight[:] = 0  # nor does the loss follow what happens to its options later
    assert loss.weight is not None and (loss.weight == copies[2]).all()
    for now, then in zip((logits, q, sample_weight), (copies[0], copies[1], copies[3]), strict=True):
        np.testing.assert_array_equal(now, then)
