"""Few rows of many classes, whose parts threads share: the same bits, and what whole rows give."""

import math

import numpy as np
import pytest

import ce_fast as ce
import reference
from ce_fast.plan import FEW_ROWS, PART_CLASSES, TILE, make_plan
from test_losses import check, normal, probabilities
from tolerances import assert_grad_close

INF, NAN = math.inf, math.nan
SHAPES = [(1, 32768), (1, 32769), (3, 33000), (6, 50000), (1, 152064)]
N_CLASSES = 33000
PART = make_plan((1,), N_CLASSES, np.dtype(np.float32), 1).part_classes
ENDS = [k for first in range(0, N_CLASSES, PART) for k in (first, min(first + PART, N_CLASSES) - 1)]
FIRSTS = ENDS[::2]


def test_parts_follow_from_the_shape_alone():
    for n_rows, n_classes in SHAPES:
        plans = [make_plan((n_rows,), n_classes, np.dtype(np.float32), n) for n in (1, 2, 5, 1000)]
        part = plans[0].part_classes
        n_parts = -(-n_classes // part)
        assert all(plan.part_classes == part for plan in plans)
        assert part % TILE == 0 and part <= PART_CLASSES and n_parts >= 2
        assert [plan.n_threads for plan in plans] == [min(n, n_rows * n_parts) for n in (1, 2, 5, 1000)]
    for n_rows, n_classes in ((1, 2 * PART_CLASSES - 1), (FEW_ROWS + 1, 152064)):
        assert make_plan((n_rows,), n_classes, np.dtype(np.float32), 8).part_classes == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_equal_for_1_2_3_and_5_threads(variant, dtype, shape, rng):
    logits, target, weight = normal(rng, shape, dtype), rng.integers(0, shape[1], shape[0]), rng.random(shape[1])
    target[2:3] = -100
    results = []
    for n_threads in (1, 2, 3, 5):
        plain = ce.CrossEntropyLoss(n_threads=n_threads)
        smoothed = ce.CrossEntropyLoss(weight, label_smoothing=0.1, reduction="sum", n_threads=n_threads)
        value, grad = smoothed.value_and_grad(logits, target)
        in_place = logits.copy()
        plain.value_and_grad(in_place, target, out=in_place)
        p = ce.softmax(logits, n_threads=n_threads)
        results.append((plain(logits, target), value, grad.tobytes(), in_place.tobytes(), p.tobytes()))
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("shape", [(1, 32768), (3, 33000), (1, 152064)], ids=str)
def test_plain_cross_entropy_equals_the_oracle(variant, dtype, shape, rng):
    target = rng.integers(0, shape[1], shape[0])
    check(normal(rng, shape, dtype), target, reduction="none", in_place=shape[0] > 1, n_threads=2)


def test_a_target_in_any_part_equals_the_oracle(variant, dtype, rng):
    logits = normal(rng, (len(ENDS), N_CLASSES), dtype)
    check(logits, np.array(ENDS), reduction="none", n_threads=2)
    check(logits, np.array(ENDS), in_place=True, n_threads=2)


@pytest.mark.parametrize(
    "loss_class, options",
    [
        (ce.CrossEntropyLoss, {"label_smoothing": 0.2, "z_loss": 1e-3, "temperature": 1.7}),
        (ce.CrossEntropyLoss, {"label_smoothing": 0.2, "smoothing": "others", "temperature": 0.3}),
        (ce.CrossEntropyLoss, {"z_loss": 1e-3, "denominator": "count"}),
        (ce.FocalLoss, {"gamma": 2.0}),
        (ce.PolyLoss, {"epsilon": 1.5}),
        (ce.GeneralizedCrossEntropyLoss, {"q": 0.7}),
        (ce.FocalLoss, {"gamma": 2.0, "label_smoothing": 0.1}),  # this one and the next go by whole rows
        (ce.CrossEntropyLoss, {"softcap": 20.0}),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else str(v),
)
def test_options_equal_the_oracle(variant, dtype, loss_class, options, rng):
    weight, sample_weight, upstream = rng.random(N_CLASSES) + 0.1, rng.random(3) + 0.1, rng.standard_normal(3)
    check(
        normal(rng, (3, N_CLASSES), dtype),
        rng.integers(0, N_CLASSES, 3),
        loss_class=loss_class,
        weight=weight,
        sample_weight=sample_weight,
        upstream=upstream,
        reduction="none",
        n_threads=2,
        **options,
    )


def test_class_probability_targets_equal_the_oracle(variant, dtype, rng):
    shape = (2, N_CLASSES)
    check(normal(rng, shape, dtype), probabilities(rng, shape, dtype), reduction="none", n_threads=2)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("levels", [(0, 60, -40), (60, 0, -60), (-700, -640, -660), (5000, 5040, 4000)], ids=str)
def test_parts_far_from_each_other_equal_the_oracle(variant, dtype, levels, options, rng):
    logits, target = rng.standard_normal((3, N_CLASSES)), np.array([0, PART + 1, N_CLASSES - 1])
    for first, level in zip(FIRSTS, levels, strict=True):
        logits[:, first : first + PART] += level
    check(logits.astype(dtype), target, reduction="none", n_threads=2, **options)


def test_softmax_equals_the_oracle(variant, dtype, rng):
    logits = normal(rng, (3, N_CLASSES), dtype)
    logits[1, :PART] = -INF
    expected = np.exp(reference.log_softmax(logits.astype(np.longdouble)))
    assert_grad_close(ce.softmax(logits, n_threads=2), expected, expected, dtype)


@pytest.mark.parametrize("n_classes", [3000, N_CLASSES])
def test_tiles_of_minus_infinity_before_very_low_logits_leave_no_nan(variant, n_classes):
    for dtype in (np.float32, np.float64):
        logits = np.full((1, n_classes), -INF, dtype)
        logits[0, -100:] = -3000
        expected = np.where(np.isfinite(logits), 0.01, 0)
        assert_grad_close(ce.softmax(logits), expected, expected, dtype)
        value, grad = ce.CrossEntropyLoss().value_and_grad(logits, np.array([0]))
        expected[0, 0] = -1
        assert value == INF
        assert_grad_close(grad, expected, np.abs(expected), dtype)


@pytest.mark.parametrize("at", ENDS)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_nan_or_plus_infinity_in_any_part_fills_its_row_alone(variant, dtype, at, bad, rng):
    logits = normal(rng, (3, N_CLASSES), dtype)
    logits[1, at] = bad
    target = np.array([1, 20000, 2])
    loss, grad = ce.CrossEntropyLoss(reduction="none", n_threads=2).value_and_grad(logits, target)
    assert np.isnan(loss).tolist() == [False, True, False]
    assert np.isnan(grad.astype(float)).all(-1).tolist() == [False, True, False]
    assert not np.isnan(grad[[0, 2]].astype(float)).any()
    p = ce.softmax(logits, n_threads=2).astype(float)
    assert np.isnan(p[1]).all() and not np.isnan(p[[0, 2]]).any()
    target[1] = at
    assert np.isnan(ce.CrossEntropyLoss(reduction="none", n_threads=2)(logits, target)).tolist() == [False, True, False]


@pytest.mark.parametrize("at", ENDS)
def test_minus_infinity_has_its_limits_in_any_part(variant, dtype, at, rng):
    logits = normal(rng, (1, N_CLASSES), dtype)
    logits[0, at] = -INF
    check(logits, np.array([20000]), reduction="none", n_threads=2)
    loss, grad = ce.CrossEntropyLoss(reduction="none", n_threads=2).value_and_grad(logits, np.array([at]))
    assert loss[0] == INF and grad[0, at] == -1 and np.isfinite(grad.astype(float)).all()
    loss = ce.CrossEntropyLoss(reduction="none", n_threads=2, label_smoothing=0.1)(logits, np.array([20000]))
    assert loss[0] == INF
    logits[:] = -INF
    loss, grad = ce.CrossEntropyLoss(reduction="none", n_threads=2).value_and_grad(logits, np.array([at]))
    assert np.isnan(loss).all() and np.isnan(grad.astype(float)).all()


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in_place"])
def test_rows_that_do_not_count_leak_nothing(variant, dtype, in_place, rng):
    clean = normal(rng, (4, N_CLASSES), dtype)
    for target, sample_weight in (
        ([-100, 40, -100, 32999], None),
        ([1, 40, 2, 32999], [0.0, 1.0, 0.0, 1.0]),
        ([99999, 40, -3, 32999], [False, True, False, True]),
    ):
        logits = clean.copy()
        logits[0], logits[2, PART] = NAN, INF
        out = logits if in_place else None
        loss = ce.CrossEntropyLoss(reduction="none", n_threads=2)
        value, grad = loss.value_and_grad(logits, np.array(target), sample_weight, out=out)
        expected = reference.cross_entropy(clean[[1, 3]], np.array(target)[[1, 3]], reduction="none")
        assert (value[[0, 2]] == 0).all() and (grad[[0, 2]] == 0).all()
        assert_grad_close(grad[[1, 3]], expected.grad, expected.terms, dtype)


def test_a_target_that_is_no_class_is_named(variant):
    logits = np.zeros((3, N_CLASSES), np.float32)
    for bad in (N_CLASSES, -1):
        with pytest.raises(IndexError, match=rf"target\[1\] is {bad}"):
            ce.CrossEntropyLoss(n_threads=2)(logits, np.array([0, bad, bad]))
        with pytest.raises(IndexError, match=rf"target\[1\] is {bad}"):
            ce.CrossEntropyLoss(n_threads=2).value_and_grad(logits, np.array([0, bad, bad]), out=logits)
    assert (logits == 0).all()


def test_one_dimension_and_a_strided_class_axis_equal_the_oracle(variant, dtype, rng):
    check(normal(rng, (N_CLASSES,), dtype), np.array(20000), reduction="none", n_threads=2)
    for shape, outer in (((N_CLASSES, 3), (3,)), ((N_CLASSES, 2, 2), (2, 2))):
        target = rng.integers(0, N_CLASSES, outer)
        logits = normal(rng, shape, dtype)
        check(logits, target, class_axis=0, label_smoothing=0.1, n_threads=2)
        check(logits, target, class_axis=0, in_place=True, n_threads=2)
    check(normal(rng, (3, 2 * N_CLASSES), dtype)[:, ::-2], rng.integers(0, N_CLASSES, 3), n_threads=2)


def test_without_its_hessian_a_gradient_by_parts_is_that_by_rows(variant, dtype, rng):
    logits, target = normal(rng, (2, N_CLASSES), dtype), rng.integers(0, N_CLASSES, 2)
    expected = reference.cross_entropy(logits, target, reduction="sum")
    grad, hess = ce.CrossEntropyLoss(reduction="sum", n_threads=2).grad_and_hess(logits, target)
    assert_grad_close(grad, expected.grad, expected.terms, dtype)
    assert_grad_close(hess, expected.hess, expected.hess_terms, dtype)
