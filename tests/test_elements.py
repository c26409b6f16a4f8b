"""The binary losses: logits, probabilities, focal; every backend, instruction set and dtype against the oracle."""

import dataclasses
import math
import warnings

import mpmath as mp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ce_fast as ce
import reference_elements as reference
from conftest import DTYPES, VARIANTS, use
from test_inputs import LAYOUTS
from tolerances import TOLERANCES, assert_grad_close, assert_loss_close

INF, NAN = math.inf, math.nan
# either side of the vectors (4 to 16) and the tiles (1024) of the kernels; two dimensions and more, and none
SHAPES = [(), (1,), (5,), (31,), (33,), (1023,), (1024,), (2100,), (9, 1), (1, 9), (7, 37), (3, 4, 5), (2, 3, 4, 5)]
GAMMAS = [0.0, 0.3, 1.0, 2.0, 5.0]
ORACLES = {
    ce.BCEWithLogitsLoss: reference.binary_cross_entropy_with_logits,
    ce.BCELoss: reference.binary_cross_entropy,
    ce.SigmoidFocalLoss: reference.sigmoid_focal,
}
KINDS = [pytest.param(kind, id=kind.__name__) for kind in ORACLES]
LOGIT_KINDS = [pytest.param(kind, id=kind.__name__) for kind in ORACLES if kind is not ce.BCELoss]


def inputs(kind, rng, shape, dtype, spread=4.0):
    """(logits or probabilities, targets with some 0 and some 1), exact in the dtype."""
    x = rng.standard_normal(shape) * spread
    if kind is ce.BCELoss:  # down to what has a gradient that float16 holds, up to what bfloat16 tells from 1
        x = np.minimum(2 ** (-13 * rng.random(shape) ** 3), 1 - 2.0**-8)
    y = np.clip(rng.random(shape) * 1.8 - 0.4, 0, 1)
    return np.asarray(x, dtype), np.asarray(y, dtype)


def positive(rng, shape, dtype):
    """Weights that the compute dtype holds: what rounding them costs is no error of the loss."""
    return (rng.random(shape) + 0.1).astype(np.float64 if dtype == np.float64 else np.float32)


def check(kind, x, y, *, sample_weight=None, upstream=None, in_place=False, n_threads=None, **options):
    """Value, gradient and Hessian equal the oracle's; every way to call gives the same value."""
    loss = kind(**options, **({} if n_threads is None else {"n_threads": n_threads}))
    expected = ORACLES[kind](x, y, sample_weight=sample_weight, upstream=upstream, **options)
    reduction, dtype, before = options.get("reduction", "mean"), x.dtype, np.array(x)
    value = loss(x, y, sample_weight)
    if kind is not ce.BCELoss and upstream is None:
        grad, hess = loss.grad_and_hess(x, y, sample_weight)
        assert hess.shape == x.shape and hess.dtype == dtype
        assert_grad_close(grad, expected.grad, expected.terms, dtype)
        if kind is not ce.SigmoidFocalLoss or np.isin(np.asarray(y, float), (0, 1)).all():
            assert_grad_close(hess, expected.hess, expected.hess_terms, dtype)
    same, grad = loss.value_and_grad(x, y, sample_weight, out=x if in_place else None, upstream=upstream)
    np.testing.assert_array_equal(np.asarray(value), np.asarray(same))
    if in_place:
        assert grad is x
    else:
        np.testing.assert_array_equal(np.asarray(x, float), before.astype(float))
        assert grad.shape == x.shape and grad.dtype == dtype
    if reduction == "none":
        assert value.shape == x.shape and value.dtype == (np.float64 if dtype == np.float64 else np.float32)
    else:
        assert isinstance(value, float)
    assert_loss_close(value, expected.value(reduction), dtype, expected.terms_of_value(reduction))
    assert_grad_close(grad, expected.grad, expected.terms, dtype)


# the oracle


def exact_binary(y, w, pos_weight, eps):
    def loss(z):
        up = (1 - mp.mpf(eps)) * mp.mpf(y) + mp.mpf(eps) / 2
        return w * ((1 - up) * mp.log1p(mp.exp(z)) + pos_weight * up * mp.log1p(mp.exp(-z)))

    return loss


def exact_focal(y, alpha, gamma):
    def loss(z):
        up, p, q = mp.mpf(y), 1 / (1 + mp.exp(-z)), 1 / (1 + mp.exp(z))
        c = 1 if alpha is None else mp.mpf(alpha) * up + (1 - mp.mpf(alpha)) * (1 - up)
        cross = (1 - up) * mp.log1p(mp.exp(z)) + up * mp.log1p(mp.exp(-z))
        return c * (up * q + (1 - up) * p) ** mp.mpf(gamma) * cross

    return loss


def assert_equals_mpmath(got, z, exact):
    """Value and slope, within 1e-17 of their terms."""
    with mp.workdps(60):
        value, slope = exact(mp.mpf(z)), mp.diff(exact, mp.mpf(z))
        for actual, expected, terms in ((got.rows, value, got.row_terms), (got.grad, slope, got.terms)):
            size = max(abs(expected), mp.mpf(str(terms)))
            assert abs(mp.mpf(str(actual)) - expected) <= mp.mpf("1e-17") * size + mp.mpf("1e-300")


POINTS = [-700.0, -50.0, -3.0, -1e-3, 0.0, 0.25, 2.0, 40.0, 700.0]


@pytest.mark.parametrize("z", POINTS)
@pytest.mark.parametrize("y", [0.0, 0.3, 1.0 - 2**-30, 1.0])
def test_oracle_of_elements_equals_mpmath(z, y):
    one = np.array(z, np.float32), np.array(y)
    for w, pos_weight, eps in ((1, 1, 0), (0.5, 3, 0), (2, 0.25, 0.125)):
        got = reference.binary_cross_entropy_with_logits(
            *one, weight=w, pos_weight=pos_weight, label_smoothing=eps, reduction="sum"
        )
        assert_equals_mpmath(got, float(one[0]), exact_binary(y, w, pos_weight, eps))
    for gamma in (0.0, 0.5, 1.0, 2.0, 5.0):
        for alpha in (None, 0.25):
            got = reference.sigmoid_focal(*one, alpha=alpha, gamma=gamma, reduction="sum")
            assert_equals_mpmath(got, float(one[0]), exact_focal(y, alpha, gamma))


@pytest.mark.parametrize("x", [2.0**-60, 1e-3, 0.3, 0.5, 1 - 2.0**-20])
@pytest.mark.parametrize("y", [0.0, 0.3, 1.0])
def test_oracle_of_probabilities_equals_mpmath(x, y):
    got = reference.binary_cross_entropy(np.array(x), np.array(y), weight=2.0, reduction="sum")
    if x * (1 - x) > 1e-12:
        assert_equals_mpmath(got, x, lambda x: -2 * (mp.mpf(y) * mp.log(x) + (1 - mp.mpf(y)) * mp.log1p(-x)))
    clamped = reference.binary_cross_entropy(np.array([0.0, 1.0]), np.array([1.0, 0.0]), reduction="none")
    np.testing.assert_array_equal(clamped.rows, [100, 100])
    np.testing.assert_allclose(clamped.grad.astype(float), [-1e12, 1e12])


def test_hessian_of_the_oracle_is_that_of_two_class_softmax_focal():
    z = np.linspace(-30, 30, 41).astype(np.longdouble)
    for y in (0, 1):
        got = reference.sigmoid_focal(z, np.full(41, y), alpha=None, gamma=2.0, reduction="sum")
        wrong = z if y == 0 else -z
        n, u, p = reference.softplus(wrong), reference.sigmoid(wrong), reference.sigmoid(-wrong)
        hess = (u**2 + 2 * u * p * n) * u * p  # ds/dn and the softmax
        np.testing.assert_allclose(got.hess.astype(float), np.maximum(hess, 1e-16).astype(float), rtol=1e-15)


# values and gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in_place"])
def test_elements_of_any_shape_equal_the_oracle(variant, dtype, kind, shape, in_place, rng):
    check(kind, *inputs(kind, rng, shape, dtype), reduction="none", in_place=in_place)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("sample_weight", ["none", "elements", "rows", "planes", "mask", "mask of rows"])
def test_elements_are_reduced_over_what_counts(variant, dtype, kind, reduction, sample_weight, rng):
    shape = (6, 5, 7)
    weights = {
        "none": None,
        "elements": positive(rng, shape, dtype),
        "rows": positive(rng, shape[:2], dtype),
        "planes": positive(rng, shape[:1], dtype),
        "mask": rng.random(shape) < 0.5,
        "mask of rows": rng.random(shape[:2]) < 0.5,
    }
    check(kind, *inputs(kind, rng, shape, dtype), sample_weight=weights[sample_weight], reduction=reduction)


def test_sample_weight_of_a_square_has_one_a_row(variant):
    """Not one a column, which NumPy's broadcasting would make of it."""
    z, y = np.zeros((3, 3)), np.zeros((3, 3))
    got = ce.BCEWithLogitsLoss(reduction="none")(z, y, [1.0, 0.0, 2.0])
    np.testing.assert_allclose(got, np.outer([1, 0, 2], np.full(3, math.log(2))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_upstream_multiplies_the_gradient_of_elements(variant, dtype, kind, reduction, rng):
    upstream = positive(rng, (7, 37), dtype) - 0.6 if reduction == "none" else -2.5
    check(kind, *inputs(kind, rng, (7, 37), dtype), reduction=reduction, upstream=upstream)


@pytest.mark.parametrize("wide", [(), (1,), (5,), (4, 1), (4, 5), (1, 4, 1), (3, 1, 1), (3, 4, 5)], ids=str)
def test_weight_and_pos_weight_broadcast_to_the_logits(variant, dtype, wide, rng):
    x, y = inputs(ce.BCEWithLogitsLoss, rng, (3, 4, 5), dtype)
    weight = positive(rng, wide, dtype)
    check(ce.BCEWithLogitsLoss, x, y, weight=weight, reduction="none")
    check(ce.BCEWithLogitsLoss, x, y, pos_weight=weight)
    check(ce.BCELoss, *inputs(ce.BCELoss, rng, (3, 4, 5), dtype), weight=weight)


@pytest.mark.parametrize("eps", [0.0, 2.0**-10, 0.1, 1.0])
def test_smoothed_targets_keep_the_digits_of_what_is_left(variant, dtype, eps, rng):
    """1 - y' is (1 - eps) (1 - y) + eps / 2, not 1 less a rounded y'."""
    x, y = inputs(ce.BCEWithLogitsLoss, rng, (300,), dtype)
    check(ce.BCEWithLogitsLoss, x, y, label_smoothing=eps, reduction="none")
    check(ce.BCEWithLogitsLoss, x, (y > 0.5).astype(dtype), label_smoothing=eps, pos_weight=4.0, reduction="none")


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("alpha", [None, 0.0, 0.25, 1.0])
def test_sigmoid_focal_equals_the_oracle(variant, dtype, gamma, alpha, rng):
    x, y = inputs(ce.SigmoidFocalLoss, rng, (300,), dtype)
    check(ce.SigmoidFocalLoss, x, y, alpha=alpha, gamma=gamma, reduction="none")
    check(ce.SigmoidFocalLoss, x, (y > 0.5).astype(dtype), alpha=alpha, gamma=gamma)


@pytest.mark.parametrize("kind", LOGIT_KINDS)
def test_confident_elements_keep_their_digits(variant, dtype, kind):
    """log1p(exp(-z)) down to where it is no longer normal, and the gradient with it."""
    z = np.linspace(0, 80, 161)
    z = np.concatenate([z, -z]).astype(dtype)
    for y in (np.zeros_like(z), np.ones_like(z)):
        check(kind, z, y, reduction="none")


@pytest.mark.parametrize("target", [bool, np.int8, np.uint8, np.int64, ">i4", np.float16, np.float32, np.float64])
def test_targets_of_any_dtype_are_read(variant, dtype, target, rng):
    for kind in ORACLES:
        x, y = inputs(kind, rng, (4, 9), dtype)
        y = y > 0.5
        expected, got = kind().value_and_grad(x, y.astype(dtype)), kind().value_and_grad(x, y.astype(target))
        assert got[0] == expected[0]
        np.testing.assert_array_equal(got[1], expected[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_layout_of_elements_changes_no_bit(backend, dtype, kind, layout, rng):
    loss, change = kind(reduction="none"), LAYOUTS[layout]
    for shape in ((6, 9), (2, 4, 3), (3, 1030)):
        x, y = inputs(kind, rng, shape, dtype)
        s = rng.random(shape[:1])
        plain, other = loss.value_and_grad(x, y, s), loss.value_and_grad(change(x), change(y), change(s))
        np.testing.assert_array_equal(plain[0], other[0])
        np.testing.assert_array_equal(plain[1].astype(float), np.asarray(other[1]).astype(float))
        place = np.array(x) if layout == "read-only" or layout == "broadcast" else change(x)
        assert loss.value_and_grad(place, y, s, out=place)[1] is place
        np.testing.assert_array_equal(plain[1].astype(float), np.asarray(place).astype(float))


def test_weights_of_any_strides_are_read(backend, rng):
    x, y = inputs(ce.BCEWithLogitsLoss, rng, (3, 4, 5), np.float64)
    w = rng.random((3, 4, 5))
    expected = ce.BCEWithLogitsLoss(w, "none", w)(x, y)
    for change in (np.asfortranarray, LAYOUTS["negative strides"], LAYOUTS["every third"], LAYOUTS["misaligned"]):
        np.testing.assert_array_equal(ce.BCEWithLogitsLoss(change(w), "none", change(w))(x, y), expected)
    column = np.broadcast_to(w[:, :1, :1], w.shape)
    expected = ce.BCEWithLogitsLoss(column.copy(), "none")(x, y)
    np.testing.assert_array_equal(ce.BCEWithLogitsLoss(column, "none")(x, y), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_no_elements_have_a_nan_mean_and_a_zero_sum(variant, dtype, kind):
    for shape in ((0,), (0, 4), (4, 0)):
        empty = np.zeros(shape, dtype)
        value, grad = kind().value_and_grad(empty, empty)
        assert math.isnan(value) and grad.shape == shape
        assert kind(reduction="sum")(empty, empty) == 0
        assert kind(reduction="none")(empty, empty).shape == shape


def test_lists_and_numbers_go_in(backend):
    assert ce.binary_cross_entropy_with_logits([0.0, 0.0], [0, 1]) == pytest.approx(math.log(2), rel=1e-15)
    assert ce.binary_cross_entropy_with_logits(0.0, 1) == pytest.approx(math.log(2), rel=1e-15)
    assert ce.binary_cross_entropy([0.5, 0.25], [True, False]) == pytest.approx(
        (math.log(2) - math.log(0.75)) / 2, rel=1e-15
    )
    assert isinstance(ce.sigmoid_focal_loss([1, -1], [1, 0]), float)
    assert ce.BCEWithLogitsLoss(reduction="none")(0.5, 1.0).shape == ()


def test_functions_are_the_losses(backend, rng):
    x, y = inputs(ce.BCEWithLogitsLoss, rng, (4, 5), np.float64)
    w, s = rng.random(5), rng.random(4)
    for reduction in ("mean", "sum", "none"):
        np.testing.assert_array_equal(
            ce.binary_cross_entropy_with_logits(
                x, y, w, pos_weight=w, sample_weight=s, reduction=reduction, label_smoothing=0.1, n_threads=1
            ),
            ce.BCEWithLogitsLoss(w, reduction, w, label_smoothing=0.1)(x, y, s),
        )
        np.testing.assert_array_equal(
            ce.sigmoid_focal_loss(x, y, alpha=0.4, gamma=1.5, sample_weight=s, reduction=reduction, n_threads=1),
            ce.SigmoidFocalLoss(0.4, 1.5, reduction)(x, y, s),
        )
        p = ce.softmax(x)
        np.testing.assert_array_equal(
            ce.binary_cross_entropy(p, y, w, sample_weight=s, reduction=reduction, n_threads=1),
            ce.BCELoss(w, reduction)(p, y, s),
        )
    assert ce.sigmoid_focal_loss(x, y) == ce.SigmoidFocalLoss()(x, y)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_no_bit_of_elements(backend, kind, rng):
    x, y = inputs(kind, rng, (300, 1030), np.float32)
    one, two = (kind(n_threads=n).value_and_grad(x, y) for n in (1, 2))
    assert one[0] == two[0]
    np.testing.assert_array_equal(one[1], two[1])


# limits


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_sigmoid_focal_is_finite_at_any_finite_logit(variant, dtype, gamma, alpha):
    z = np.array([0, 1e-30, 1, 10, 50, 88, 100, 700, 750, 1e3, 1e4])
    z = np.concatenate([z, -z]).astype(dtype)
    for y in (0.0, 2.0**-7, 0.5, 1 - 2.0**-7, 1.0):
        target = np.full(z.shape, y, dtype)
        loss = ce.SigmoidFocalLoss(alpha, gamma, "none")
        with np.errstate(all="raise"):
            value, grad = loss.value_and_grad(z, target)
            grad_again, hess = loss.grad_and_hess(z, target)
        assert np.isfinite(value).all() and (value >= 0).all()
        for array in (grad, grad_again, hess):
            assert np.isfinite(array.astype(float)).all()
        assert (hess.astype(float) > 0).all()
        check(ce.SigmoidFocalLoss, z, target, alpha=alpha, gamma=gamma, reduction="none")


def test_sigmoid_focal_without_gamma_and_alpha_is_binary_cross_entropy(variant, dtype, rng):
    x, y = inputs(ce.BCEWithLogitsLoss, rng, (40, 50), dtype)
    value, grad = ce.SigmoidFocalLoss(None, 0.0, "none").value_and_grad(x, y)
    expected = reference.binary_cross_entropy_with_logits(x, y, reduction="none")
    assert_loss_close(value, expected.rows, dtype)
    assert_grad_close(grad, expected.grad, expected.terms, dtype)
    plain = ce.BCEWithLogitsLoss(reduction="none")(x, y)
    np.testing.assert_allclose(value, plain, rtol=2 * TOLERANCES[dtype.name].loss_ulp * TOLERANCES[dtype.name].eps)


@pytest.mark.parametrize("kind", LOGIT_KINDS)
def test_infinite_logits_have_the_true_limits(variant, dtype, kind):
    z = np.array([INF, -INF, INF, -INF, 1.0], dtype)
    y = np.array([1, 0, 0, 1, 1])
    options = {"alpha": None} if kind is ce.SigmoidFocalLoss else {}
    loss, grad = kind(reduction="none", **options).value_and_grad(z, y)
    np.testing.assert_array_equal(loss[:4], [0, 0, INF, INF])
    np.testing.assert_array_equal(grad[:4].astype(float), [0, 0, 1, -1])
    assert np.isfinite(loss[4]) and np.isfinite(grad[4])
    assert kind(**options)(z[:2], y[:2]) == 0 and kind(**options)(z, y) == INF


def test_infinite_logits_with_soft_targets_lose_infinitely_and_keep_a_gradient(variant, dtype):
    z, y = np.array([INF, -INF, INF], dtype), np.array([0.5, 0.5, 1.0])
    loss, grad = ce.BCEWithLogitsLoss(reduction="none").value_and_grad(z, y)
    np.testing.assert_array_equal(loss, [INF, INF, 0])
    np.testing.assert_array_equal(grad.astype(float), [0.5, -0.5, 0])
    assert ce.BCEWithLogitsLoss(reduction="none", label_smoothing=0.1)(z, y)[2] == INF


def test_weight_zero_against_an_infinite_loss_contributes_nothing(variant, dtype):
    z = np.array([INF, -INF], dtype)
    y = np.array([0, 1])
    np.testing.assert_array_equal(ce.BCEWithLogitsLoss(0.0, "none")(z, y), [0, 0])
    np.testing.assert_array_equal(ce.BCEWithLogitsLoss(None, "none", 0.0)(z, y), [INF, 0])
    np.testing.assert_array_equal(ce.SigmoidFocalLoss(1.0, 2.0, "none")(z, y), [0, INF])


@pytest.mark.parametrize("kind", LOGIT_KINDS)
def test_nan_stays_in_its_element(variant, dtype, kind):
    for size in (3, 40, 1500):
        for at in (0, 1, size - 1):
            z, y = np.zeros(size, dtype), np.zeros(size)
            z[at] = NAN
            loss, grad = kind(reduction="none").value_and_grad(z, y)
            assert np.flatnonzero(np.isnan(loss)).tolist() == [at]
            assert np.flatnonzero(np.isnan(grad.astype(float))).tolist() == [at]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_masked_leaks_nothing(variant, dtype, kind, rng):
    """NaN, infinities and targets of any value in elements, rows and planes that do not count."""
    for mask_shape in ((6, 5, 4), (6, 5), (6,)):
        x, y = inputs(kind, rng, (6, 5, 4), dtype)
        mask = rng.random(mask_shape) < 0.6
        full = np.broadcast_to(mask.reshape(mask_shape + (1,) * (3 - mask.ndim)), x.shape)
        bad_x, bad_y = x.copy(), y.copy()
        bad_x[~full] = np.resize([NAN, INF, -INF, 2.0], (~full).sum())
        bad_y[~full] = np.resize([NAN, 7.0, -1.0, 0.5], (~full).sum())
        for reduction in ("mean", "sum", "none"):
            loss = kind(reduction=reduction)
            value, grad = loss.value_and_grad(bad_x, bad_y, mask)
            expected, expected_grad = loss.value_and_grad(x, y, mask)
            np.testing.assert_array_equal(value, expected)
            np.testing.assert_array_equal(grad.astype(float), expected_grad.astype(float))
            assert (grad[~full] == 0).all() and np.isfinite(value).all()
        assert kind()(bad_x, bad_y, mask) == pytest.approx(kind()(x[full], y[full]), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_mean_over_elements_that_do_not_count_is_nan(variant, kind):
    x, y = np.full((2, 3), 0.5), np.zeros((2, 3))
    value, grad = kind().value_and_grad(x, y, np.zeros((2, 3), bool))
    assert math.isnan(value) and (grad == 0).all()
    assert kind(reduction="sum")(x, y, np.zeros(2)) == 0


def test_probabilities_are_clamped_as_in_torch(variant, dtype):
    x = np.array([0.0, 1.0, 0.0, 1.0], dtype)
    y = np.array([0, 1, 1, 0])
    loss, grad = ce.BCELoss(reduction="none").value_and_grad(x, y)
    np.testing.assert_array_equal(loss, [0, 0, 100, 100])
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(grad.astype(float), np.array([0, 0, -1e12, 1e12], dtype).astype(float))


@pytest.mark.parametrize("kind", LOGIT_KINDS)
def test_hessian_is_positive_where_an_element_counts_and_zero_elsewhere(variant, dtype, kind, rng):
    x, y = inputs(kind, rng, (9, 50), dtype, spread=300.0)
    mask = rng.random((9, 50)) < 0.7
    grad, hess = kind().grad_and_hess(x, y, mask)
    assert (hess[mask].astype(float) > 0).all() and (hess[~mask] == 0).all()
    np.testing.assert_array_equal(grad.astype(float), kind().value_and_grad(x, y, mask)[1].astype(float))


def test_hessian_of_probabilities_is_refused():
    with pytest.raises(NotImplementedError):
        ce.BCELoss().grad_and_hess(np.full(3, 0.5), np.ones(3))


# one formula, whatever the way to the operands


def assert_same_bits(loss, other, x, y, *, sample_weight=(None, None), upstream=(None, None)):
    for one, two in zip(
        loss.value_and_grad(x, y, sample_weight[0], upstream=upstream[0]),
        other.value_and_grad(x, y, sample_weight[1], upstream=upstream[1]),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(one, float), np.asarray(two, float))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_one_change_no_bit(variant, dtype, kind, rng):
    x, y = inputs(kind, rng, (3, 700), dtype, spread=20.0)
    ones, plain = np.ones(x.shape), kind(reduction="none")
    assert_same_bits(plain, plain, x, y, sample_weight=(None, ones), upstream=(None, ones))
    for reduction in ("mean", "sum"):
        assert kind(reduction=reduction)(x, y, ones) == kind(reduction=reduction)(x, y)
    if kind is not ce.SigmoidFocalLoss:
        assert_same_bits(plain, kind(1.0, "none", 1.0), x, y)
        assert_same_bits(plain, kind(ones, "none", ones[0]), x, y)


@pytest.mark.parametrize(
    "shape", [(1300, 1), (700, 2), (90, 3), (60, 20), (3, 511), (3, 512), (3, 513), (5, 7, 30)], ids=str
)
def test_weights_that_repeat_give_the_bits_of_those_written_out(variant, shape, rng):
    x, y = inputs(ce.BCEWithLogitsLoss, rng, shape, np.float32)
    for wide in ((), shape[-1:], shape[1:], shape[:1] + (1,) * (len(shape) - 1), (*shape[:-1], 1)):
        w = positive(rng, wide, np.float32)
        full = np.broadcast_to(w, shape).copy()
        assert_same_bits(ce.BCEWithLogitsLoss(w, "none", w), ce.BCEWithLogitsLoss(full, "none", full), x, y)
        rows = full.reshape(shape[0], -1)[:, 0].copy()
        spread = np.broadcast_to(rows.reshape((-1,) + (1,) * (len(shape) - 1)), shape).copy()
        loss = ce.BCEWithLogitsLoss(reduction="none")
        assert_same_bits(loss, loss, x, y, sample_weight=(rows, spread))


@pytest.mark.parametrize("name", ["float64", "float32"])
@pytest.mark.parametrize("compiled", [variant for variant in VARIANTS if variant != "numba"])
def test_compiled_gradients_under_the_smallest_normal_number_are_zero(compiled, name, rng):
    """And so are losses: arithmetic on subnormals is 20 to 700 times slower."""
    with use(compiled):
        check_flushed(name, rng)


def check_flushed(name, rng):
    tiny = np.finfo(name).tiny
    x = (rng.standard_normal((4, 3000)) * (200 if name == "float32" else 1500)).astype(name)
    y = (rng.random(x.shape) < 0.5).astype(name)
    for kind in LOGIT_KINDS:
        for sample_weight in (None, positive(rng, x.shape, x.dtype) * 1e-6):
            loss = kind.values[0]
            _, grad = loss().value_and_grad(x, y, sample_weight)
            rows = loss(reduction="none")(x, y, sample_weight)
            for array in (grad, rows):
                size = np.abs(array)
                assert not ((size > 0) & (size < tiny)).any()
                assert (size > 0).any() and (size == 0).any()
        check(loss, x, y)


@pytest.mark.parametrize("name", ["float64", "float32"])
def test_logarithms_of_probabilities_keep_their_digits(variant, name):
    """Beside 0 and 1, and down to the subnormal numbers."""
    info = np.finfo(name)
    ends = np.array([info.smallest_subnormal, info.tiny / 3, info.tiny, 1e-30, info.eps / 4, info.eps], name)
    near = 1 - np.arange(1, 40, dtype=name) * info.epsneg
    dense = np.concatenate([2.0 ** -np.linspace(0.01, 30, 3000), np.linspace(0.001, 0.999, 3001)]).astype(name)
    x = np.concatenate([ends, near, dense, 1 - dense[dense < 0.5]])
    for y in (0.0, 0.3, 1.0):
        loss = ce.BCELoss(reduction="none")(x, np.full_like(x, y))
        expected = reference.binary_cross_entropy(x, np.full_like(x, y), reduction="none")
        assert_loss_close(loss, expected.rows, x.dtype)
    check(ce.BCELoss, dense, (dense * 0 + 1), reduction="none")
    check(ce.BCELoss, dense, dense * 0, reduction="none")


def test_dense_logits_are_right_to_the_stated_ulp(variant, dtype):
    z = np.linspace(-20, 20, 20001).astype(dtype)
    for y in (0.0, 0.25, 1.0):
        check(ce.BCEWithLogitsLoss, z, np.full_like(z, y), reduction="none")
        for gamma in (2.0, 1.7):
            check(ce.SigmoidFocalLoss, z, np.full_like(z, y), gamma=gamma, reduction="none")


def test_square_of_the_focal_factor_is_its_power(variant, rng):
    """gamma = 2 has no logarithm, the gamma beside it has."""
    x, y = inputs(ce.SigmoidFocalLoss, rng, (5000,), np.float64, spread=30.0)
    for target in (y, (y > 0.5).astype(float)):
        two, beside = (
            ce.SigmoidFocalLoss(0.25, g, "none").value_and_grad(x, target) for g in (2.0, np.nextafter(2, 3))
        )
        np.testing.assert_allclose(two[0], beside[0], rtol=1e-13, atol=1e-300)
        np.testing.assert_allclose(two[1], beside[1], rtol=1e-12, atol=1e-15)


# errors

X, Y = np.zeros((4, 3)), np.zeros((4, 3))


def spoiled(array, at, value):
    array = np.array(array, float)
    array[at] = value
    return array


BAD_DATA = [
    (ValueError, r"target\[2, 1\] is 1.5", lambda f: f(X, spoiled(Y, (2, 1), 1.5))),
    (ValueError, r"target\[0, 2\] is -0.25", lambda f: f(X, spoiled(Y, (0, 2), -0.25))),
    (ValueError, r"target\[3, 0\] is 2", lambda f: f(X, spoiled(Y, (3, 0), 2).astype(int))),
    (ValueError, r"target.* \(3, 4\).* \(4, 3\)", lambda f: f(X, Y.T)),
    (ValueError, r"target.* \(4,\).* \(4, 3\)", lambda f: f(X, Y[:, 0])),
    (ValueError, r"target.* \(4, 1\).* \(4, 3\)", lambda f: f(X, Y[:, :1])),
    (TypeError, r"target has dtype <U1", lambda f: f(X, np.full((4, 3), "a"))),
    (TypeError, r"dtype complex128", lambda f: f(X + 0j, Y)),
    (TypeError, r"dtype object", lambda f: f(X.astype(object), Y)),
    (ValueError, r"sample_weight.* \(3,\)", lambda f: f(X, Y, np.ones(3))),
    (ValueError, r"sample_weight.* \(1, 3\)", lambda f: f(X, Y, np.ones((1, 3)))),
    (ValueError, r"sample_weight\[1\] is -1", lambda f: f(X, Y, [1, -1, 0, 0])),
    (ValueError, r"sample_weight\[3\] is nan", lambda f: f(X, Y, [1, 1, 0, NAN])),
    (TypeError, r"sample_weight has dtype complex128", lambda f: f(X, Y, np.ones(4) + 0j)),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error, message, call", BAD_DATA, ids=[m for _, m, _ in BAD_DATA])
@pytest.mark.parametrize("gradient", [False, True])
def test_bad_elements_get_an_error_that_says_what_came(backend, kind, error, message, call, gradient):
    with pytest.raises(error, match=message):
        call(kind().value_and_grad if gradient else kind())


def test_bad_target_of_elements_leaves_logits_alone(backend):
    z = np.zeros(5000)
    with pytest.raises(ValueError, match=r"target\[4999\] is 2"):
        ce.BCEWithLogitsLoss().value_and_grad(z, spoiled(z, 4999, 2.0), out=z)
    assert (z == 0).all()


def test_bad_target_is_named_with_its_gradient_elsewhere(backend):
    z = np.zeros(5000)
    with pytest.raises(ValueError, match=r"target\[4999\] is -1e-320"):
        ce.BCEWithLogitsLoss().value_and_grad(z, spoiled(z, 4999, -1e-320), out=np.empty(5000))
    assert (z == 0).all()


@pytest.mark.parametrize("bad", [-0.25, 1.5])
def test_probabilities_out_of_range_are_named(backend, bad):
    with pytest.raises(ValueError, match=rf"\[1, 2\] is {bad}"):
        ce.binary_cross_entropy(spoiled(X, (1, 2), bad), Y)


@pytest.mark.parametrize("kind", KINDS)
def test_out_and_upstream_that_do_not_fit_are_refused(kind):
    x = np.full((4, 3), 0.5)
    for out, message in ((np.zeros((3, 4)), "out has shape"), (np.zeros((4, 3), np.float32), "float32")):
        with pytest.raises(ValueError, match=message):
            kind().value_and_grad(x, Y, out=out)
    with pytest.raises(ValueError, match="out overlaps"):
        kind().value_and_grad(x, out := np.zeros((4, 3)), out=out)
    with pytest.raises(ValueError, match=r"upstream has shape \(4,\)"):
        kind(reduction="none").value_and_grad(x, Y, upstream=np.ones(4))
    with pytest.raises(ValueError, match="upstream"):
        kind().value_and_grad(x, Y, upstream=np.ones((4, 3)))


BAD_OPTIONS = [
    (ValueError, "reduction is 'avg'", {"reduction": "avg"}, tuple(ORACLES)),
    (ValueError, "label_smoothing is 1.5", {"label_smoothing": 1.5}, (ce.BCEWithLogitsLoss,)),
    (ValueError, r"pos_weight.* -1", {"pos_weight": [-1.0, 1.0, 1.0]}, (ce.BCEWithLogitsLoss,)),
    (ValueError, r"pos_weight.* inf", {"pos_weight": INF}, (ce.BCEWithLogitsLoss,)),
    (ValueError, r"weight.* -1", {"weight": [1.0, -1.0, 1.0]}, (ce.BCEWithLogitsLoss, ce.BCELoss)),
    (ValueError, r"weight.* nan", {"weight": NAN}, (ce.BCEWithLogitsLoss, ce.BCELoss)),
    (TypeError, "weight has dtype <U1", {"weight": ["a"]}, (ce.BCEWithLogitsLoss, ce.BCELoss)),
    (ValueError, "alpha is 1.5", {"alpha": 1.5}, (ce.SigmoidFocalLoss,)),
    (ValueError, "alpha is -1", {"alpha": -1}, (ce.SigmoidFocalLoss,)),
    (ValueError, "gamma is -1", {"gamma": -1}, (ce.SigmoidFocalLoss,)),
    (ValueError, "gamma is inf", {"gamma": INF}, (ce.SigmoidFocalLoss,)),
    (ValueError, "n_threads is 0", {"n_threads": 0}, (ce.BCEWithLogitsLoss, ce.SigmoidFocalLoss)),
]


@pytest.mark.parametrize("error, message, options, kinds", BAD_OPTIONS, ids=[m for _, m, _, _ in BAD_OPTIONS])
def test_bad_options_of_elements_raise_when_the_loss_is_made(error, message, options, kinds):
    for kind in kinds:
        with pytest.raises(error, match=message):
            kind(**options)


def test_weights_that_do_not_broadcast_are_refused():
    for options in ({"weight": np.ones(2)}, {"pos_weight": np.ones((4, 2))}, {"weight": np.ones((2, 4, 3))}):
        with pytest.raises(ValueError, match=r"weight .*\(4, 3\)"):
            ce.BCEWithLogitsLoss(**options)(X, Y)


# options together

COMBINED = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(list(ORACLES)),
        "shape": st.sampled_from([*SHAPES, (0, 3)]),
        "dtype": st.sampled_from(DTYPES),
        "hard": st.booleans(),
        "weight": st.sampled_from([None, "number", "last axis", "first axis", "elements", "some zero"]),
        "pos_weight": st.sampled_from([None, "number", "last axis", "elements"]),
        "sample_weight": st.sampled_from([None, "elements", "rows", "mask", "mask of rows", "nothing"]),
        "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        "alpha": st.sampled_from([None, 0.0, 0.25, 1.0]),
        "gamma": st.sampled_from(GAMMAS),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "upstream": st.booleans(),
        "layout": st.sampled_from(["fortran", "negative strides", "every third", "outer gap", "misaligned"]),
        "in_place": st.booleans(),
        "spread": st.sampled_from([0.1, 4.0, 50.0]),
        "seed": st.integers(0, 2**32 - 1),
    }
)


@settings(max_examples=3 * settings.default.max_examples, suppress_health_check=list(HealthCheck))
@given(o=COMBINED)
def test_options_of_elements_combined_equal_the_oracle(variant, o):
    rng, kind, shape, dtype = np.random.default_rng(o["seed"]), o["kind"], o["shape"], o["dtype"]
    x, y = inputs(kind, rng, shape, dtype, o["spread"])
    y = (y > 0.5).astype(dtype) if o["hard"] else y
    shapes = {"number": (), "last axis": shape[-1:], "first axis": shape[:1] + (1,) * (len(shape) - 1)}
    weights = {
        name: None if o[name] is None else positive(rng, shapes.get(o[name], shape), dtype)
        for name in ("weight", "pos_weight")
    }
    if o["weight"] == "some zero":
        weights["weight"] = weights["weight"] * (rng.random(shape) < 0.5)
    sample_weight = {
        None: None,
        "elements": positive(rng, shape, dtype),
        "rows": positive(rng, shape[:1], dtype),
        "mask": rng.random(shape) < 0.7,
        "mask of rows": rng.random(shape[:1]) < 0.7,
        "nothing": np.zeros(shape),
    }[o["sample_weight"]]
    options = {
        ce.BCEWithLogitsLoss: {"label_smoothing": o["label_smoothing"], **weights},
        ce.BCELoss: {"weight": weights["weight"]},
        ce.SigmoidFocalLoss: {"alpha": o["alpha"], "gamma": o["gamma"]},
    }[kind]
    upstream = None
    if o["upstream"]:
        upstream = positive(rng, shape, dtype) - 0.6 if o["reduction"] == "none" else -0.75
    place = LAYOUTS[o["layout"]] if shape and math.prod(shape) else np.array
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(
            kind,
            place(x),
            place(y),
            sample_weight=sample_weight,
            upstream=upstream,
            in_place=o["in_place"],
            reduction=o["reduction"],
            **options,
        )


@given(st.floats(-40, 40), st.floats(0, 1), st.sampled_from(GAMMAS))
def test_finite_differences_agree_with_the_gradient_of_an_element(z, y, gamma):
    for loss in (ce.BCEWithLogitsLoss(pos_weight=3.0, label_smoothing=0.1), ce.SigmoidFocalLoss(0.25, gamma)):
        _, grad = loss.value_and_grad(z, y)
        h = 1e-5
        assert (loss(z + h, y) - loss(z - h, y)) / (2 * h) == pytest.approx(float(grad), abs=3e-8)


@given(st.lists(st.floats(-700, 700), min_size=1, max_size=30), st.data())
def test_flipping_logits_and_targets_changes_nothing(logits, data):
    """softplus(z) and softplus(-z) change places."""
    z, y = np.array(logits), np.array(data.draw(st.lists(st.booleans(), min_size=len(logits), max_size=len(logits))))
    value, grad = ce.BCEWithLogitsLoss(reduction="none").value_and_grad(z, y)
    other, other_grad = ce.BCEWithLogitsLoss(reduction="none").value_and_grad(-z, ~y)
    np.testing.assert_array_equal(value, other)
    np.testing.assert_array_equal(grad, -other_grad)


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=20))
def test_binary_cross_entropy_is_that_of_two_softmax_classes(logits):
    z = np.array(logits)
    y = np.arange(z.size) % 2
    two = ce.CrossEntropyLoss(reduction="none")(np.stack([-z / 2, z / 2], -1), y)
    np.testing.assert_allclose(ce.BCEWithLogitsLoss(reduction="none")(z, y), two, rtol=2e-15, atol=1e-300)
    focal = ce.FocalLoss(gamma=2.0, reduction="none")(np.stack([-z / 2, z / 2], -1), y)
    np.testing.assert_allclose(ce.SigmoidFocalLoss(None, 2.0, "none")(z, y), focal, rtol=1e-13, atol=1e-300)


@pytest.mark.parametrize("name", ["weight", "pos_weight", "sample_weight"])
def test_weights_beyond_float32_need_float64_logits(name):
    for bad in (1e39, 1e-46):
        options, given = ({}, [bad, 1.0]) if name == "sample_weight" else ({name: [bad, 1.0]}, None)
        loss = ce.BCEWithLogitsLoss(**options)
        assert np.isfinite(loss([0.5, -0.5], [1, 0], given))
        with pytest.raises(ValueError, match=rf"{name}\[0\] is .*; logits that are not float64 take 0, or magnitudes"):
            loss(np.float32([0.5, -0.5]), [1, 0], given)


@pytest.mark.parametrize("gamma", [50.0, 1100.0, 1810.0, 1e308])
def test_any_gamma_gives_finite_sigmoid_focal_losses_of_soft_targets(variant, gamma):
    z, y = np.meshgrid([-30.0, -1.0, 0.0, 0.3, 30.0], [0.0, 0.26, 0.7, 1.0])
    value, grad = ce.SigmoidFocalLoss(None, gamma, "none").value_and_grad(z, y)
    assert np.isfinite(value).all() and np.isfinite(grad).all()
    if gamma == 1100:
        assert value[1, 4] == pytest.approx(3.1713536784666703e-143, rel=1e-9)


def test_options_can_be_replaced():
    loss = dataclasses.replace(ce.SigmoidFocalLoss(), gamma=1.0)
    assert (loss.alpha, loss.gamma, loss.reduction) == (0.25, 1.0, "mean")
