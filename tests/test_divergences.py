"""KL divergence, entropy and distillation: every backend, instruction set and dtype against the oracle."""

import math

import mpmath as mp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import ce_fast as ce
import reference_divergences as reference
from conftest import DTYPES
from reference import WIDE
from test_inputs import LAYOUTS
from tolerances import assert_grad_close, assert_loss_close

pytestmark = pytest.mark.filterwarnings("ignore:logits look like probabilities")  # where an example happens to

INF, NAN = math.inf, math.nan
# either side of the vectors (4 to 16) and the tiles (1024) of the kernels
WIDTHS = [1, 2, 3, 5, 8, 16, 17, 31, 33, 100, 1023, 1024, 1025, 2100]
DIRECTIONS = ["forward", "reverse"]
TAILS = [("bucket", "forward"), ("bucket", "reverse"), ("renormalize", "forward")]


def normal(rng, shape, dtype, spread=3.0):
    return (rng.standard_normal(shape) * spread).astype(dtype)


def top_k(rng, shape, k, axis=-1, temperature=1.0, dtype=np.float64):
    """A teacher that names k classes of each row, in no order, with at most 0.95 of the probability."""
    log_probs = np.array(ce.log_softmax(rng.standard_normal(shape) * 2 / temperature, axis))
    indices = rng.permuted(np.broadcast_to(np.arange(shape[axis]), [*np.delete(shape, axis), shape[axis]]), axis=-1)
    indices = np.moveaxis(indices[..., :k], -1, axis)
    picked = np.take_along_axis(log_probs, indices, axis)
    return ce.TopKTeacher(indices, np.minimum(picked, math.log(0.95 / k)).astype(dtype))


def check(loss, expected, reduction, logits, *args, upstream=None, in_place=False, **kwargs):
    """Value and gradient equal the oracle's; every way to call gives the same value."""
    before, dtype = np.array(logits), logits.dtype
    value = loss(logits, *args, **kwargs)
    out = logits if in_place else None
    same, grad = loss.value_and_grad(logits, *args, out=out, upstream=upstream, **kwargs)
    np.testing.assert_array_equal(np.asarray(value), np.asarray(same))
    if in_place:
        assert grad is logits
    else:
        np.testing.assert_array_equal(logits.astype(float), before.astype(float))
        assert grad.shape == logits.shape and grad.dtype == dtype
    if reduction == "none":
        assert value.dtype == (np.float64 if dtype == np.float64 else np.float32)
    else:
        assert isinstance(value, float)
    assert_loss_close(value, expected.value(reduction), dtype, expected.terms_of_value(reduction))
    assert_grad_close(grad, expected.grad, expected.terms, dtype)
    return grad


def check_kl(logits, target, *, sample_weight=None, upstream=None, in_place=False, **options):
    options.setdefault("class_axis", -1)
    expected = reference.kl_div(logits, target, sample_weight=sample_weight, upstream=upstream, **options)
    loss, logits_again = ce.KLDivLoss(**options), np.array(logits)
    args = (target, sample_weight)
    grad = check(loss, expected, options.get("reduction", "mean"), logits, *args, upstream=upstream, in_place=in_place)
    if options.get("direction") != "reverse" and not options.get("log_probs") and upstream is None:
        same, hess = loss.grad_and_hess(logits_again, *args)
        np.testing.assert_array_equal(same.astype(float), np.asarray(grad).astype(float))
        assert_grad_close(hess, expected.hess, expected.hess_terms, logits.dtype)


def check_distillation(student, teacher, target=None, *, sample_weight=None, upstream=None, in_place=False, **options):
    options.setdefault("class_axis", -1)
    expected = reference.distillation(
        student, teacher, target, sample_weight=sample_weight, upstream=upstream, **options
    )
    loss, kwargs = ce.DistillationLoss(**options), {} if target is None else {"target": target}
    if sample_weight is not None:
        kwargs["sample_weight"] = sample_weight
    reduction = options.get("reduction", "mean")
    check(loss, expected, reduction, student, teacher, upstream=upstream, in_place=in_place, **kwargs)


# the oracle

ROWS = [
    ([20.0, 0.0, 0.0], [19.0, 1.0, 0.5]),
    ([1.5, -2.25, 0.75], [1.5, -2.25, 0.75 + 2**-20]),
    ([300.0, -300.0, 299.5], [0.0, 1.0, -2.0]),
    ([0.0], [3.0]),
    ([1e3, 1e3 + 1, 1e3 - 30], [0.0, 1.0 + 2**-12, -30.0]),
    ([0.5, 0.25, 0.0, -0.25], [60.0, 0.0, 0.0, 30.0]),
]


def exact_softmax(x, temperature=1.0):
    e = [mp.exp(v / mp.mpf(temperature)) for v in x]
    return [v / mp.fsum(e) for v in e]


def exact_kl(q, p):
    return mp.fsum(a * mp.log(a / b) for a, b in zip(q, p, strict=True))


def assert_equals_mpmath(value, terms, grad, grad_terms, x, exact):
    """exact, a function of a row x of logits, and its derivatives, to 1e-17 of their terms."""
    with mp.workdps(400):
        point = tuple(mp.mpf(float(v)) for v in x)
        slopes = [mp.diff(lambda *v: exact(v), point, tuple(int(j == k) for j in range(len(x)))) for k in range(len(x))]
        for actual, wanted, size in zip((value, *grad), (exact(point), *slopes), (terms, *grad_terms), strict=True):
            bound = mp.mpf("1e-17") * max(abs(wanted), mp.mpf(str(size))) + mp.mpf("1e-300")
            assert abs(mp.mpf(str(actual)) - wanted) <= bound


@pytest.mark.parametrize("x, y", ROWS, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature, softcap", [(1.0, None), (2.5, None), (0.5, 50.0)])
def test_oracle_of_the_divergence_equals_mpmath(x, y, direction, temperature, softcap):
    def exact(row):
        capped = row if softcap is None else [softcap * mp.tanh(v / softcap) for v in row]
        p, q = exact_softmax(capped, temperature), exact_softmax(y, temperature)
        return exact_kl(q, p) if direction == "forward" else exact_kl(p, q)

    x, options = np.array([x]), {"direction": direction, "temperature": temperature, "softcap": softcap}
    got = reference.kl_div(x, [y], reduction="sum", **options)
    p = reference.Distribution(x.astype(WIDE), temperature, softcap)
    terms = got.rows[0] + reference.close_error(p, reference.Distribution(np.array([y], WIDE), temperature))[0]
    assert_equals_mpmath(got.rows[0], terms, got.grad[0], got.terms[0], x[0], exact)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_oracle_of_log_probabilities_equals_mpmath(direction):
    x, y = np.array([[-0.5, -1.25, -30.0]]), np.array([[-2.0, -0.125, -0.75]])

    def exact(row):
        a, b = (y[0].tolist(), row) if direction == "forward" else (row, y[0].tolist())
        return mp.fsum(mp.exp(v) * (v - w) for v, w in zip(a, b, strict=True))

    got = reference.kl_div(x, y, reduction="sum", direction=direction, log_probs=True)
    assert_equals_mpmath(got.rows[0], got.row_terms[0], got.grad[0], got.terms[0], x[0], exact)


@pytest.mark.parametrize("x", [row for pair in ROWS for row in pair], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_oracle_of_entropy_equals_mpmath(x, temperature):
    x = np.array([x])
    value, _ = reference.entropy(x, temperature=temperature)
    with mp.workdps(800):
        p = exact_softmax([mp.mpf(float(v)) for v in x[0]], temperature)
        exact = -mp.fsum(v * mp.log(v) for v in p)
        assert abs(mp.mpf(str(value[0])) - exact) <= mp.mpf("1e-17") * exact


@pytest.mark.parametrize("x", [[1.5, -2.25, 0.75, 0.0], [20.0, 1.0, 0.0, -1.0], [0.0, 0.0, 30.0, 1.0]], ids=str)
@pytest.mark.parametrize("tail, direction", TAILS)
@pytest.mark.parametrize("hard", [False, True], ids=["", "hard target"])
def test_oracle_of_distillation_equals_mpmath(x, tail, direction, hard):
    x, temperature, alpha = np.array([x]), 2.0, 0.25 if hard else 1.0
    indices, log_q = np.array([[2, 0]]), np.log(np.array([[0.5, 0.375]]))
    weight = [0.5, 2.0, 1.0, 3.0]

    def exact(row):
        p, q = exact_softmax(row, temperature), [mp.exp(mp.mpf(float(v))) for v in log_q[0]]
        tops = [p[2], p[0]]
        if tail == "bucket":
            q, tops = [*q, 1 - mp.fsum(q)], [*tops, p[1] + p[3]]
        else:
            q = [v / mp.fsum(q) for v in q]
        kl = exact_kl(q, tops) if direction == "forward" else exact_kl(tops, q)
        loss = mp.mpf(alpha) * temperature**2 * kl
        return loss - (1 - mp.mpf(alpha)) * 2 * mp.log(exact_softmax(row)[1]) if hard else loss

    target, options = (np.array([1]) if hard else None), {"tail": tail, "direction": direction, "weight": weight}
    got = reference.distillation(x, (indices, log_q), target, alpha=alpha, reduction="sum", **options)
    assert_equals_mpmath(got.rows, got.row_terms, got.grad[0], got.terms[0], x[0], exact)


def test_oracle_of_a_mean_divides_each_term_by_its_own_sum_of_weights():
    x, y = np.array([[1.0, 2.0], [0.5, 0.0], [3.0, 1.0]]), np.array([[0.0, 1.0], [2.0, 0.0], [1.0, 1.0]])
    s, w, t = np.array([1.0, 2.0, 4.0]), np.array([0.5, 3.0]), np.array([0, 1, -100])
    got = reference.distillation(x, y, t, temperature=1.5, alpha=0.25, weight=w, sample_weight=s)
    kl = reference.kl_div(x, y, temperature=1.5, reduction="none").rows
    nll = -ce.log_softmax(x)[[0, 1, 0], [0, 1, 0]]
    expected = 0.25 * 1.5**2 * (kl[0] + 2 * kl[1]) / 3 + 0.75 * (0.5 * nll[0] + 2 * 3 * nll[1]) / 6.5
    assert float(got.value("mean")) == pytest.approx(float(expected), rel=1e-14)


# KL divergence


@pytest.mark.parametrize("n_classes", WIDTHS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in_place"])
def test_divergence_equals_the_oracle(variant, dtype, n_classes, direction, in_place, rng):
    logits, target = normal(rng, (5, n_classes), dtype), normal(rng, (5, n_classes), dtype)
    check_kl(logits, target, direction=direction, reduction="none", in_place=in_place)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_divergence_of_log_probabilities_takes_them_as_they_are(variant, dtype, direction, rng):
    logits, target = (ce.log_softmax(normal(rng, (5, 300), np.float64)) for _ in range(2))
    for scale in (1.0, 0.5):  # normalised, or not
        x, y = (logits * scale).astype(dtype), (target * scale).astype(dtype)
        check_kl(x, y, direction=direction, log_probs=True, reduction="none")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature, softcap", [(0.5, None), (4.0, None), (1.0, 5.0), (2.0, 30.0)])
def test_temperature_and_softcap_of_a_divergence_equal_the_oracle(variant, dtype, direction, temperature, softcap, rng):
    logits, target = normal(rng, (5, 70), dtype), normal(rng, (5, 70), dtype)
    options = {"direction": direction, "temperature": temperature, "softcap": softcap}
    check_kl(logits, target, reduction="none", **options)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("denominator", ["weight", "count", "total", 7.5])
def test_divergences_are_reduced_over_rows_that_count(variant, dtype, direction, reduction, denominator, rng):
    options = {"direction": direction, "reduction": reduction, "denominator": denominator}
    logits, target = normal(rng, (20, 11), dtype), normal(rng, (20, 11), dtype)
    for sample_weight in (rng.integers(0, 3, 20), rng.random(20) < 0.5, rng.random(20)):
        check_kl(logits, target, sample_weight=sample_weight, **options)
    check_kl(logits, target, upstream=rng.standard_normal(20) if reduction == "none" else -2.5, **options)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_divergence_along_any_class_axis_equals_the_oracle(variant, dtype, axis, rng):
    for direction in DIRECTIONS:
        x, y = normal(rng, (3, 5, 4), dtype), normal(rng, (3, 5, 4), dtype)
        check_kl(x, y, direction=direction, class_axis=axis, reduction="none")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_no_bit_of_a_divergence(backend, dtype, layout, rng):
    change = LAYOUTS[layout]
    for shape, axis in (((6, 9), None), ((2, 4, 3), 1), ((3, 1030), None)):
        x, y = rng.standard_normal(shape).astype(dtype), rng.standard_normal(shape).astype(dtype)
        for loss in (
            ce.KLDivLoss("none", class_axis=axis),
            ce.KLDivLoss("none", direction="reverse", class_axis=axis),
            ce.DistillationLoss(class_axis=axis, reduction="none"),
        ):
            plain, other = loss.value_and_grad(x, y), loss.value_and_grad(change(x), change(y))
            np.testing.assert_array_equal(plain[0], other[0])
            np.testing.assert_array_equal(plain[1].astype(float), np.asarray(other[1]).astype(float))


def test_target_of_another_dtype_is_read(variant, rng):
    x, y = rng.standard_normal((5, 9)), rng.standard_normal((5, 9)).astype(np.float16)
    for a, b in ((x, y), (x.astype(np.float32), y), (y, y.astype(np.float32))):
        expected = reference.kl_div(a, b, reduction="none")
        assert_loss_close(ce.KLDivLoss("none")(a, b), expected.rows, a.dtype, expected.row_terms)
    assert ce.kl_div([[0, 2]], [[0, 2]]) == 0  # integers are numbers here, no classes


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("n_classes", [2, 9, 1500])
def test_equal_logits_have_no_divergence(variant, dtype, direction, n_classes, rng):
    x = normal(rng, (20, n_classes), dtype, 10.0)
    value, grad = ce.KLDivLoss("none", direction=direction).value_and_grad(x, x.copy())
    assert (value == 0).all() and (grad == 0).all()
    assert ce.kl_div(x, x, direction=direction) == 0


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_tiny_divergences_keep_their_digits_and_sign(variant, direction, distance, rng):
    """sum q (log q - log p) is of the second order in a distance that its terms have to the first."""
    for n_classes in (3, 50, 2000):
        y = normal(rng, (20, n_classes), np.float32)
        x = (y + distance * rng.standard_normal(y.shape)).astype(np.float32)
        expected = reference.kl_div(x, y, direction=direction, reduction="none")
        value = ce.KLDivLoss("none", direction=direction)(x, y)
        p, q = reference.Distribution(x.astype(WIDE)), reference.Distribution(y.astype(WIDE))
        terms = expected.rows + 2.0**-29 * reference.close_error(p, q)
        assert_loss_close(value, expected.rows, np.float32, terms)
        assert (value > 0).all()


PAIRS = st.tuples(st.integers(1, 4), st.integers(1, 40)).flatmap(
    lambda shape: st.tuples(*[hnp.arrays(np.float64, shape, elements=st.floats(-30, 30))] * 2)
)


@given(PAIRS, st.sampled_from([1.0, 1e-3, 1e-6, 1e-9, 0.0]), st.sampled_from(DIRECTIONS))
def test_divergence_is_never_negative(pair, distance, direction):
    x = pair[0]
    y = x + distance * pair[1]
    assert (ce.KLDivLoss("none", direction=direction)(x, y) >= 0).all()
    assert ce.kl_div(x, x, direction=direction) == 0


@given(PAIRS)
def test_cross_entropy_is_entropy_plus_divergence(pair):
    """H(p, q) = H(p) + KL(p || q)."""
    a, b = pair
    cross, divergence = ce.CrossEntropyLoss(reduction="none")(b, ce.softmax(a)), ce.kl_div(b, a, reduction="none")
    np.testing.assert_allclose(ce.entropy(a) + divergence, cross, rtol=1e-13, atol=1e-13)
    reverse = ce.kl_div(a, b, direction="reverse", reduction="none")
    np.testing.assert_allclose(reverse, divergence, rtol=1e-12, atol=1e-14)


@given(PAIRS, st.sampled_from(DIRECTIONS), st.sampled_from([0.5, 1.0, 3.0]))
def test_gradient_rows_of_a_divergence_sum_to_nothing(pair, direction, temperature):
    _, grad = ce.KLDivLoss("sum", direction=direction, temperature=temperature).value_and_grad(*pair)
    np.testing.assert_allclose(grad.sum(-1), 0, atol=1e-12)


def test_infinite_divergences_and_impossible_classes(variant, dtype):
    x = np.array([[0.0, -INF, 1.0], [0.0, -INF, 1.0], [0.0, 2.0, 1.0]], dtype)
    y = np.array([[0.0, 1.0, 1.0], [0.0, -INF, 1.0], [0.0, -INF, 1.0]], dtype)
    value, grad = ce.KLDivLoss("none").value_and_grad(x, y)
    assert value[0] == INF and value[1] == 0 and np.isfinite(value[2])
    assert np.isfinite(grad.astype(float)).all()
    p, q = ce.softmax(x.astype(float)), ce.softmax(y.astype(float))
    np.testing.assert_allclose(grad.astype(float), p - q, atol=4e-3)
    value, grad = ce.KLDivLoss("none", direction="reverse").value_and_grad(x, y)
    assert np.isfinite(value[0]) and value[1] == 0 and value[2] == INF
    assert np.isfinite(grad[:2].astype(float)).all() and grad[0, 1] == 0
    with np.errstate(divide="ignore"):
        log_p, log_q = np.log(np.array([[0.5, 0.5, 0.0]])), np.log(np.array([[1.0, 0.0, 0.0]]))
    assert ce.kl_div(log_p, log_q, log_probs=True) == pytest.approx(math.log(2))
    assert ce.kl_div(log_q, log_p, log_probs=True) == INF


@pytest.mark.parametrize("make", [ce.KLDivLoss, ce.DistillationLoss])
def test_nan_of_logits_or_target_stays_in_its_row(variant, dtype, make):
    loss = make(reduction="none")
    for bad in ("logits", "target"):
        x, y = np.zeros((3, 40), dtype), np.ones((3, 40), dtype)
        (x if bad == "logits" else y)[1, 7] = NAN
        value, grad = loss.value_and_grad(x, y)
        assert np.isnan(value).tolist() == [False, True, False]
        assert np.isnan(grad.astype(float)).any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("make", [ce.KLDivLoss, ce.DistillationLoss])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_masked_rows_leak_nothing_into_a_divergence(variant, dtype, make, direction, rng):
    x, y = normal(rng, (6, 40), dtype), normal(rng, (6, 40), dtype)
    mask = np.array([True, False, True, True, False, True])
    bad_x, bad_y = x.copy(), y.copy()
    bad_x[1], bad_y[1], bad_x[4, 3], bad_y[4] = NAN, INF, INF, -INF
    for reduction in ("mean", "sum", "none"):
        loss = make(reduction=reduction, direction=direction)
        value, grad = loss.value_and_grad(bad_x, bad_y, sample_weight=mask)
        expected, expected_grad = loss.value_and_grad(x, y, sample_weight=mask)
        np.testing.assert_array_equal(value, expected)
        np.testing.assert_array_equal(grad.astype(float), expected_grad.astype(float))
        assert (grad[~mask] == 0).all()
    only = make(direction=direction)(x[mask], y[mask])
    assert make(direction=direction)(bad_x, bad_y, sample_weight=mask) == pytest.approx(only, rel=1e-6)


@pytest.mark.parametrize("make", [ce.KLDivLoss, ce.DistillationLoss])
def test_divergence_of_no_rows_has_a_nan_mean_and_a_zero_sum(variant, dtype, make):
    empty = np.zeros((0, 4), dtype)
    value, grad = make().value_and_grad(empty, empty)
    assert math.isnan(value) and grad.shape == (0, 4)
    assert make(reduction="sum")(empty, empty) == 0
    assert make(reduction="none")(empty, empty).shape == (0,)
    nothing = make().value_and_grad(np.ones((2, 3), dtype), np.zeros((2, 3), dtype), sample_weight=np.zeros(2))
    assert math.isnan(nothing[0]) and (nothing[1] == 0).all()


# entropy


@pytest.mark.parametrize("n_classes", WIDTHS)
@pytest.mark.parametrize("spread", [0.1, 3.0, 40.0])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_entropy_equals_the_oracle(variant, dtype, n_classes, spread, temperature, rng):
    x = normal(rng, (5, n_classes), dtype, spread)
    got, (expected, terms) = ce.entropy(x, temperature=temperature), reference.entropy(x, temperature=temperature)
    assert got.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert_loss_close(got, expected, dtype, terms)


def test_entropy_of_any_shape_and_axis(backend, rng):
    x = rng.standard_normal((3, 5, 4))
    for axis in (0, 1, 2, -1, -3):
        expected, terms = reference.entropy(x, class_axis=axis)
        assert_loss_close(ce.entropy(x, axis), expected, np.float64, terms)
        assert_loss_close(
            ce.entropy(np.asfortranarray(x)[::-1], axis, n_threads=1),
            reference.entropy(x[::-1], class_axis=axis)[0],
            np.float64,
        )
    assert ce.entropy([0.0, 0.0]).shape == () and ce.entropy(np.zeros((0, 3))).shape == (0,)


def test_entropy_has_its_limits(variant, dtype):
    rows = np.array([[0, 0, -INF, -INF], [5, -INF, -INF, -INF], [-INF] * 4, [0, INF, 0, 0], [0, NAN, 0, 0]], dtype)
    got = ce.entropy(rows)
    assert got[0] == pytest.approx(math.log(2), rel=1e-6) and got[1] == 0
    assert np.isnan(got[2:]).all()
    for n in (1, 2, 1000, 5000):
        assert ce.entropy(np.full((1, n), 3.0, dtype))[0] == pytest.approx(math.log(n), rel=1e-6)


def test_entropy_of_a_confident_row_keeps_its_digits(variant):
    x = np.array([[20.0, 0.0, 0.0], [80.0, 0.0, 1.0]], np.float32)
    expected, _ = reference.entropy(x)
    assert_loss_close(ce.entropy(x), expected, np.float32)


# distillation


@pytest.mark.parametrize("n_classes", [1, 2, 17, 1030])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in_place"])
def test_distillation_equals_the_oracle(variant, dtype, n_classes, direction, in_place, rng):
    for temperature in (1.0, 2.0, 4.5):
        x, y = normal(rng, (5, n_classes), dtype), normal(rng, (5, n_classes), dtype)
        check_distillation(x, y, temperature=temperature, direction=direction, reduction="none", in_place=in_place)


@pytest.mark.parametrize("alpha", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("denominator", ["weight", "count", "total", 7.5])
def test_distillation_with_hard_targets_equals_the_oracle(variant, dtype, alpha, reduction, denominator, rng):
    target = rng.integers(0, 11, 20)
    target[::7] = -100
    weight, sample_weight = rng.random(11) + 0.1, rng.integers(0, 3, 20)
    options = {
        "alpha": alpha,
        "reduction": reduction,
        "denominator": denominator,
        "label_smoothing": 0.1,
        "weight": weight,
    }
    for direction in DIRECTIONS:
        x, y = normal(rng, (20, 11), dtype), normal(rng, (20, 11), dtype)
        upstream = rng.standard_normal(20) if reduction == "none" else -1.5
        check_distillation(x, y, target, sample_weight=sample_weight, direction=direction, **options)
        check_distillation(x, y, target, upstream=upstream, direction=direction, **options)


@pytest.mark.parametrize("tail, direction", TAILS)
@pytest.mark.parametrize("n_classes, k", [(2, 1), (9, 1), (9, 4), (40, 8), (1030, 20)])
def test_top_k_teacher_equals_the_oracle(variant, dtype, tail, direction, n_classes, k, rng):
    for temperature in (1.0, 2.0):
        x, teacher = normal(rng, (5, n_classes), dtype), top_k(rng, (5, n_classes), k)
        options = {"tail": tail, "direction": direction, "temperature": temperature}
        check_distillation(x, teacher, reduction="none", **options)
        check_distillation(x, teacher, rng.integers(0, n_classes, 5), in_place=True, **options)


def test_top_k_teacher_of_any_axis_and_dtype_equals_the_oracle(variant, dtype, rng):
    for axis in (0, 1, -1):
        x, teacher = normal(rng, (4, 5, 6), dtype), top_k(rng, (4, 5, 6), 3, axis, dtype=np.float32)
        check_distillation(x, teacher, class_axis=axis, reduction="none")
        narrow = ce.TopKTeacher(teacher.indices.astype(np.int16), teacher.log_probs)
        check_distillation(x, narrow, class_axis=axis)
    strided = ce.TopKTeacher(teacher.indices[::-1], np.asfortranarray(teacher.log_probs)[::-1])
    check_distillation(x[::-1], strided)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_top_k_of_all_classes_is_the_full_divergence(variant, direction, rng):
    x, y = rng.standard_normal((6, 9)), rng.standard_normal((6, 9))
    order = rng.permuted(np.tile(np.arange(9), (6, 1)), axis=-1)
    log_probs = np.take_along_axis(ce.log_softmax(y / 2), order, -1)
    loss = ce.DistillationLoss(2.0, direction=direction, reduction="none")
    full, full_grad = loss.value_and_grad(x, y)
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-5)):  # rounded, they do not sum to 1
        value, grad = loss.value_and_grad(x, ce.TopKTeacher(order, log_probs.astype(dtype)))
        np.testing.assert_allclose(value, full, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(grad, full_grad, rtol=tolerance, atol=tolerance)


def test_tail_of_a_confident_student_keeps_its_digits(variant, dtype):
    """The classes that the teacher does not name have 1e-13 of the student's probability: a sum, not 1 less a sum."""
    x = np.array([[30.0, 29.0, 0.0, -1.0, 0.5]], dtype)
    teacher = ce.TopKTeacher(np.array([[0, 1]]), np.log([[0.75, 0.125]]))
    for direction in DIRECTIONS:
        check_distillation(x, teacher, temperature=1.0, direction=direction, reduction="none")


def test_teacher_that_leaves_no_tail_has_none(variant):
    """Rounded log-probabilities may sum to more than 1: the bucket is empty, and not NaN."""
    x = np.array([[1.0, 0.5, -1.0]])
    for log_probs in ([[math.log(0.5), math.log(0.5) + 1e-9]], [[0.0, -INF]]):
        value, grad = ce.DistillationLoss(1.0).value_and_grad(
            x, ce.TopKTeacher(np.array([[0, 1]]), np.array(log_probs))
        )
        expected = reference.distillation(x, (np.array([[0, 1]]), np.array(log_probs)), temperature=1.0)
        assert value == pytest.approx(float(expected.value("mean")), rel=1e-8)
        np.testing.assert_allclose(grad, expected.grad.astype(float), atol=1e-8)


@pytest.mark.parametrize("ignore_index", [-100, 0, 255])
def test_ignored_rows_count_in_neither_term(variant, dtype, ignore_index, rng):
    x, y = normal(rng, (6, 12), dtype), normal(rng, (6, 12), dtype)
    target = np.array([1, ignore_index, 3, 4, ignore_index, 5])
    bad_x, bad_y = x.copy(), y.copy()
    bad_x[1], bad_y[4] = NAN, INF
    kept = target != ignore_index
    for alpha in (0.3, 1.0):
        loss = ce.DistillationLoss(alpha=alpha, ignore_index=ignore_index)
        value, grad = loss.value_and_grad(bad_x, bad_y, target)
        assert value == pytest.approx(loss(x[kept], y[kept], target[kept]), rel=1e-6)
        assert (grad[~kept] == 0).all() and np.isfinite(grad.astype(float)).all()


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("padding", [(0, 1, NAN), (-1, -1, -INF), (0, 0, 0.0)], ids=["nan", "no class", "one class"])
def test_a_teacher_of_rows_that_do_not_count_is_not_read(variant, tail, padding, rng):
    """As it is padded: with NaN, with indices that are no classes, or with one class again and again."""
    x, (indices, log_probs) = rng.standard_normal((4, 9)), top_k(rng, (4, 9), 2)
    padded = indices.copy(), log_probs.copy()
    padded[0][1], padded[1][1] = padding[:2], padding[2]
    for kwargs in ({"target": np.array([1, -100, 2, 0])}, {"sample_weight": [1, 0, 2, 1]}):
        loss = ce.DistillationLoss(tail=tail)
        value, grad = loss.value_and_grad(x, ce.TopKTeacher(*padded), **kwargs)
        expected, expected_grad = loss.value_and_grad(x, ce.TopKTeacher(indices, log_probs), **kwargs)
        assert value == expected
        np.testing.assert_array_equal(grad, expected_grad)


def test_a_term_of_weight_0_contributes_nothing_however_large(variant):
    """alpha = 0 against an infinite divergence, alpha = 1 against an infinite cross-entropy."""
    x, y = np.array([[0.0, -INF, 1.0]]), np.array([[0.0, 1.0, 2.0]])
    assert ce.DistillationLoss(alpha=0.0)(x, y, [0]) == pytest.approx(ce.cross_entropy(x, [0]))
    y[0, 1] = -INF
    assert ce.DistillationLoss(alpha=1.0)(x, y, [1]) == pytest.approx(4 * ce.kl_div(x, y, temperature=2.0))


def test_threads_change_no_bit_of_a_divergence(backend, rng):
    x, y = (normal(rng, (300, 1030), np.float32) for _ in range(2))
    teacher = top_k(rng, (300, 1030), 5)
    for make in (ce.KLDivLoss, ce.DistillationLoss):
        for other in (y, teacher)[: 1 + (make is ce.DistillationLoss)]:
            one, two = (make(n_threads=n).value_and_grad(x, other) for n in (1, 2))
            assert one[0] == two[0]
            np.testing.assert_array_equal(one[1], two[1])
    np.testing.assert_array_equal(ce.entropy(x, n_threads=1), ce.entropy(x, n_threads=2))


def test_distillation_is_what_its_terms_are(backend, rng):
    x, y, t = rng.standard_normal((8, 6)), rng.standard_normal((8, 6)), rng.integers(0, 6, 8)
    hard, soft = ce.cross_entropy(x, t), ce.kl_div(x, y, temperature=3.0)
    assert ce.distillation_loss(x, y, temperature=3.0) == pytest.approx(9 * soft, rel=1e-14)
    assert ce.distillation_loss(x, y, target=t, temperature=3.0) == pytest.approx(4.5 * soft + hard / 2, rel=1e-14)
    assert ce.distillation_loss(x, y, target=t, alpha=0.0) == pytest.approx(hard, rel=1e-14)
    assert ce.distillation_loss(x, x, temperature=3.0) == 0


def test_functions_are_the_divergence_losses(backend, rng):
    x, y, s, t = rng.standard_normal((4, 5)), rng.standard_normal((4, 5)), rng.random(4), rng.integers(0, 5, 4)
    teacher = top_k(rng, (4, 5), 2)
    for reduction in ("mean", "sum", "none"):
        np.testing.assert_array_equal(
            ce.kl_div(x, y, sample_weight=s, direction="reverse", temperature=2.0, reduction=reduction, n_threads=1),
            ce.KLDivLoss(reduction, direction="reverse", temperature=2.0)(x, y, s),
        )
        np.testing.assert_array_equal(
            ce.distillation_loss(
                x,
                teacher,
                temperature=1.5,
                alpha=0.2,
                target=t,
                sample_weight=s,
                tail="renormalize",
                reduction=reduction,
            ),
            ce.DistillationLoss(1.5, 0.2, tail="renormalize", reduction=reduction)(x, teacher, t, s),
        )
    assert isinstance(ce.kl_div(x, y), float) and isinstance(ce.distillation_loss(x, y), float)
    indices, log_probs = teacher
    assert teacher.indices is indices and teacher.log_probs is log_probs


# errors

X, Y = np.ones((4, 3)), np.zeros((4, 3))
K = ce.TopKTeacher
I2 = np.tile([0, 2], (4, 1))
L2 = np.log(np.full((4, 2), 0.25))
BAD_DATA = [
    (ValueError, r"\(3, 4\).* \(4, 3\)", ce.KLDivLoss(), (X, Y.T)),
    (ValueError, r"\(4,\).* \(4, 3\)", ce.KLDivLoss(), (X, Y[:, 0])),
    (TypeError, r"complex128", ce.KLDivLoss(), (X, Y + 0j)),
    (ValueError, r"sample_weight has shape \(3,\)", ce.KLDivLoss(), (X, Y, np.ones(3))),
    (ValueError, r"sample_weight\[1\] is -1", ce.KLDivLoss(), (X, Y, [1, -1, 0, 0])),
    (ValueError, r"class_axis", ce.KLDivLoss(), (np.zeros((2, 3, 5)), np.zeros((2, 3, 5)))),
    (ValueError, r"teacher.* \(3, 4\).* \(4, 3\)", ce.DistillationLoss(), (X, Y.T)),
    (IndexError, r"target\[2\] is 3; expected 0 <= target < 3", ce.DistillationLoss(), (X, Y, [0, 1, 3, 0])),
    (ValueError, r"alpha.*target", ce.DistillationLoss(alpha=0.5), (X, Y)),
    (ValueError, r"\(3, 2\)", ce.DistillationLoss(), (X, K(I2[:3], L2[:3]))),
    (ValueError, r"\(4, 2\)|\(4, 1\)", ce.DistillationLoss(), (X, K(I2, L2[:, :1]))),
    (TypeError, r"indices.*float64", ce.DistillationLoss(), (X, K(I2 * 1.0, L2))),
    (
        IndexError,
        r"indices.* 3",
        ce.DistillationLoss(),
        (X, K(np.where(np.arange(8).reshape(4, 2) == 7, 3, I2), L2)),
    ),
    (
        IndexError,
        r"indices.* -1",
        ce.DistillationLoss(),
        (X, K(np.where(np.arange(8).reshape(4, 2) == 0, -1, I2), L2)),
    ),
]


@pytest.mark.parametrize(
    "error, message, loss, args", BAD_DATA, ids=[f"{type(b[2]).__name__} {b[1]}" for b in BAD_DATA]
)
@pytest.mark.parametrize("gradient", [False, True])
def test_bad_data_of_a_divergence_gets_an_error_that_says_what_came(backend, error, message, loss, args, gradient):
    with pytest.raises(error, match=message):
        (loss.value_and_grad if gradient else loss)(*args)


BAD_OPTIONS = [
    (ValueError, "direction is 'both'", ce.KLDivLoss, {"direction": "both"}),
    (ValueError, "reduction is 'batchmean'", ce.KLDivLoss, {"reduction": "batchmean"}),
    (ValueError, "temperature is 0.0", ce.KLDivLoss, {"temperature": 0}),
    (ValueError, "temperature is -1.0", ce.DistillationLoss, {"temperature": -1}),
    (ValueError, "softcap is 0.0", ce.KLDivLoss, {"softcap": 0}),
    (ValueError, "denominator is 'rows'", ce.KLDivLoss, {"denominator": "rows"}),
    (ValueError, "temperature", ce.KLDivLoss, {"log_probs": True, "temperature": 2.0}),
    (ValueError, "softcap", ce.KLDivLoss, {"log_probs": True, "softcap": 30.0}),
    (ValueError, "tail is 'drop'", ce.DistillationLoss, {"tail": "drop"}),
    (ValueError, "alpha is 1.5", ce.DistillationLoss, {"alpha": 1.5}),
    (ValueError, "alpha is -0.5", ce.DistillationLoss, {"alpha": -0.5}),
    (ValueError, "direction is 'both'", ce.DistillationLoss, {"direction": "both"}),
    (ValueError, "label_smoothing is 2.0", ce.DistillationLoss, {"label_smoothing": 2}),
    (ValueError, r"weight\[1\] is -1.0", ce.DistillationLoss, {"weight": [1, -1]}),
]


@pytest.mark.parametrize(
    "error, message, kind, options", BAD_OPTIONS, ids=[f"{k.__name__} {m}" for _, m, k, _ in BAD_OPTIONS]
)
def test_bad_options_of_a_divergence_raise_when_the_loss_is_made(error, message, kind, options):
    with pytest.raises(error, match=message):
        kind(**options)


def test_reverse_divergence_from_a_renormalized_teacher_is_refused():
    """The student has probability where such a teacher has none: it would always be infinite."""
    with pytest.raises(ValueError, match="renormalize"):
        ce.DistillationLoss(direction="reverse", tail="renormalize")(X, K(I2, L2))


def test_hessian_of_a_divergence_is_refused_where_it_is_not_known_to_be_positive():
    for options in ({"direction": "reverse"}, {"log_probs": True}):
        with pytest.raises(NotImplementedError):
            ce.KLDivLoss(**options).grad_and_hess(X, Y)


@pytest.mark.parametrize("kind", [ce.KLDivLoss, ce.DistillationLoss])
def test_out_that_does_not_fit_a_divergence_is_refused(kind):
    for out, message in ((np.zeros((3, 4)), "out has shape"), (np.zeros((4, 3), np.float32), "float32")):
        with pytest.raises(ValueError, match=message):
            kind().value_and_grad(X, Y, out=out)
    with pytest.raises(ValueError, match="out overlaps"):
        kind().value_and_grad(X, out := np.zeros((4, 3)), out=out)
    with pytest.raises(ValueError, match="upstream"):
        kind().value_and_grad(X, Y, upstream=np.ones(4))


# options together

COMMON = {
    "shape": st.sampled_from([(6, 1), (6, 2), (5, 7), (4, 40), (3, 1030), (2, 3, 4), (2, 5, 2, 3), (0, 4), (9,)]),
    "dtype": st.sampled_from(DTYPES),
    "direction": st.sampled_from(DIRECTIONS),
    "temperature": st.sampled_from([1.0, 0.5, 3.0]),
    "softcap": st.sampled_from([None, None, 20.0]),
    "sample_weight": st.sampled_from([None, "float", "mask"]),
    "reduction": st.sampled_from(["mean", "sum", "none"]),
    "denominator": st.sampled_from(["weight", "count", "total", 3.0]),
    "layout": st.sampled_from(["fortran", "negative strides", "every third", "outer gap", "misaligned"]),
    "in_place": st.booleans(),
    "upstream": st.booleans(),
    "spread": st.sampled_from([0.1, 3.0, 30.0]),
    "seed": st.integers(0, 2**32 - 1),
}


def drawn(o):
    """(rng, class axis, shape of the rows, arguments, options) of an example."""
    rng, shape, axis = np.random.default_rng(o["seed"]), o["shape"], (1 if len(o["shape"]) > 2 else -1)
    outer = tuple(np.delete(shape, axis))
    place = LAYOUTS[o["layout"]] if math.prod(shape) else np.array
    x, y = (place(normal(rng, shape, o["dtype"], o["spread"])) for _ in range(2))
    upstream = (rng.standard_normal(outer) if o["reduction"] == "none" else -1.5) if o["upstream"] else None
    weights = {"float": rng.random(outer), "mask": rng.random(outer) < 0.7, None: None}[o["sample_weight"]]
    names = ("direction", "temperature", "softcap", "reduction", "denominator", "in_place")
    options = {name: o[name] for name in names} | {"class_axis": axis, "sample_weight": weights, "upstream": upstream}
    return rng, axis, outer, (x, y), options


@settings(max_examples=2 * settings.default.max_examples, suppress_health_check=list(HealthCheck))
@given(o=st.fixed_dictionaries({**COMMON, "log_probs": st.booleans()}))
def test_options_of_the_divergence_combined_equal_the_oracle(variant, o):
    _, axis, _, (x, y), options = drawn(o)
    if o["log_probs"]:
        options |= {"log_probs": True, "temperature": 1.0, "softcap": None}
        x, y = (LAYOUTS["fortran"](ce.log_softmax(a, axis)) for a in (x, y))
    check_kl(x, y, **options)


@settings(max_examples=2 * settings.default.max_examples, suppress_health_check=list(HealthCheck))
@given(
    o=st.fixed_dictionaries(
        {
            **COMMON,
            "teacher": st.sampled_from(["logits", "bucket", "renormalize"]),
            "k": st.integers(1, 5),
            "target": st.sampled_from([None, "indices", "probabilities"]),
            "alpha": st.sampled_from([None, 0.0, 0.3, 1.0]),
            "ignore_index": st.sampled_from([-100, 0]),
            "weight": st.booleans(),
            "label_smoothing": st.sampled_from([0.0, 0.2]),
        }
    )
)
def test_options_of_distillation_combined_equal_the_oracle(variant, o):
    rng, axis, outer, (x, teacher), options = drawn(o)
    n_classes, target = o["shape"][axis], None
    if o["teacher"] != "logits":
        if not math.prod(o["shape"]) or n_classes == 1:
            return
        teacher = top_k(rng, o["shape"], min(o["k"], n_classes - 1), axis)
        options["tail"] = o["teacher"]
        if o["teacher"] == "renormalize":
            options["direction"] = "forward"
    if o["target"] == "indices":
        target = np.where(rng.random(outer) < 0.2, o["ignore_index"], rng.integers(0, n_classes, outer))
    elif o["target"] == "probabilities":
        target = ce.softmax(rng.standard_normal(o["shape"]), axis).astype(o["dtype"])
    options["alpha"] = o["alpha"] if target is not None else None
    options["weight"] = rng.random(n_classes) + 0.1 if o["weight"] else None
    check_distillation(
        x, teacher, target, label_smoothing=o["label_smoothing"], ignore_index=o["ignore_index"], **options
    )


@given(PAIRS, st.sampled_from(TAILS), st.booleans())
def test_finite_differences_agree_with_the_gradient_of_distillation(pair, kind, hard):
    x, y = pair[0] / 6, pair[1] / 6
    (n, k), (tail, direction) = x.shape, kind
    target = {"target": np.arange(n) % k} if hard else {}
    teachers = [y]
    if k > 1:
        teachers = [
            y,
            ce.TopKTeacher(np.arange(k)[None, : k // 2].repeat(n, 0), np.minimum(ce.log_softmax(y), -1)[:, : k // 2]),
        ]
    for teacher in teachers:
        plain = not isinstance(teacher, ce.TopKTeacher)
        loss = ce.DistillationLoss(direction=direction, tail="bucket" if plain else tail)
        _, grad = loss.value_and_grad(x, teacher, **target)
        h = 1e-5
        for i, j in ((0, 0), (n - 1, k - 1)):
            step = np.zeros_like(x)
            step[i, j] = h
            slope = (loss(x + step, teacher, **target) - loss(x - step, teacher, **target)) / (2 * h)
            assert slope == pytest.approx(grad[i, j], abs=3e-7)


@pytest.mark.parametrize("offset", [2.0**20, -(2.0**10)])
def test_adding_a_constant_to_both_rows_keeps_the_divergence(variant, offset, rng):
    x = np.round(rng.standard_normal((5, 50)) * 1024) / 1024  # so that the sums are exact
    y = x + np.round(rng.standard_normal((5, 50)) * 4) / 1024
    for direction in ("forward", "reverse"):
        kl = ce.kl_div(x, y, direction=direction, reduction="none")
        moved = ce.kl_div(x + offset, y + offset, direction=direction, reduction="none")
        np.testing.assert_allclose(moved, kl, rtol=1e-10)
    np.testing.assert_allclose(ce.entropy(x + offset), ce.entropy(x), rtol=1e-14)


def test_log_probabilities_past_the_largest_exponential_are_infinite(variant):
    loss = ce.KLDivLoss(log_probs=True, direction="reverse")
    assert loss([[800.0, 0.0]], [[0.0, 0.0]]) == np.inf


def test_log_probs_is_a_flag():
    with pytest.raises(TypeError, match="log_probs is None; expected True or False"):
        ce.KLDivLoss(log_probs=None)


@pytest.mark.parametrize("dtype_of_teacher", [np.float64, np.float32, np.float16])
def test_a_bucket_that_rounding_leaves_nothing_of_makes_no_reverse_divergence_infinite(dtype_of_teacher, variant, rng):
    teacher = rng.standard_normal((50, 8))
    teacher[:, 5:] -= 40.0
    indices = np.tile(np.arange(5), (50, 1))
    log_probs = np.take_along_axis(ce.log_softmax(teacher), indices, 1).astype(dtype_of_teacher)
    loss = ce.DistillationLoss(1.0, direction="reverse", reduction="none")
    value, grad = loss.value_and_grad(teacher, ce.TopKTeacher(indices, log_probs))
    assert np.isfinite(grad).all() and (value >= 0).all() and (value < 0.02).all()


def test_out_may_not_overlap_the_indices_of_a_distillation():
    buffer = np.zeros(6, np.float32)
    target, out = buffer.view(np.int32)[:3], buffer.reshape(3, 2)
    with pytest.raises(ValueError, match="out overlaps target"):
        ce.DistillationLoss().value_and_grad(np.ones((3, 2), np.float32), np.ones((3, 2)), target, out=out)


def test_float16_gradients_of_what_is_computed_in_float64_are_rounded_once(variant, rng):
    x, y = (rng.standard_normal((200, 60)).astype(np.float16) for _ in range(2))
    _, grad = ce.KLDivLoss("sum").value_and_grad(x, y)
    _, wide = ce.KLDivLoss("sum").value_and_grad(x.astype(np.float64), y.astype(np.float64))
    np.testing.assert_array_equal(grad, wide.astype(np.float16))
