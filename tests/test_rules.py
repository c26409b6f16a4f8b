"""The rules over classes against the oracle: focal, poly, generalized cross-entropy; and every rule's Hessian."""

import math

import numpy as np
import pytest

import ce_fast as ce
from test_losses import check, normal, oracle, probabilities
from tolerances import assert_grad_close

INF, NAN = math.inf, math.nan
RULES = [
    *((ce.FocalLoss, {"gamma": gamma}) for gamma in (0.0, 0.5, 1.0, 2.0, 5.0)),
    *((ce.PolyLoss, {"epsilon": epsilon}) for epsilon in (-2.0, -1.0, 0.0, 1.0, 3.5)),
    *((ce.GeneralizedCrossEntropyLoss, {"q": q}) for q in (1e-3, 0.3, 0.7, 1.0)),
]
CONVEX = [(ce.CrossEntropyLoss, {}), *(rule for rule in RULES if rule[1].get("epsilon", 0) >= -1)]


def by_name(rule):
    return rule[0].__name__ + "".join(f"-{value}" for value in rule[1].values())


@pytest.fixture(params=RULES, ids=by_name)
def rule(request):
    return {"loss_class": request.param[0], **request.param[1]}


@pytest.fixture(params=CONVEX, ids=by_name)
def convex(request):
    return {"loss_class": request.param[0], **request.param[1]}


def made(*, loss_class, **options):
    return loss_class(**options)


def check_hess(logits, target, *, loss_class, sample_weight=None, **options):
    """The gradient is the one of `value_and_grad`, the Hessian the oracle's."""
    expected = oracle(logits, target, loss_class=loss_class, sample_weight=sample_weight, **options)
    grad, hess = loss_class(**options).grad_and_hess(logits, target, sample_weight)
    assert grad.dtype == hess.dtype == logits.dtype and grad.shape == hess.shape == logits.shape
    assert_grad_close(grad, expected.grad, expected.terms, logits.dtype)
    assert_grad_close(hess, expected.hess, expected.hess_terms, logits.dtype)
    return hess


def test_rule_equals_the_oracle(variant, dtype, rule, rng):
    for n_classes in (1, 2, 3, 17, 33, 1025):
        logits, target = normal(rng, (5, n_classes), dtype), rng.integers(0, n_classes, 5)
        check(logits, target, reduction="none", **rule)
        check(logits, target, in_place=True, **rule)


def test_smoothing_mixes_the_terms_of_the_classes(variant, dtype, rule, rng):
    for n_classes, smoothing in ((1, "uniform"), (3, "others"), (33, "uniform"), (1025, "uniform"), (1025, "others")):
        for eps in (0.2, 1.0):
            check(
                normal(rng, (5, n_classes), dtype),
                rng.integers(0, n_classes, 5),
                weight=rng.random(n_classes) + 0.1,
                label_smoothing=eps,
                smoothing=smoothing,
                reduction="none",
                **rule,
            )


def test_class_probabilities_mix_the_terms_of_the_classes(variant, dtype, rule, rng):
    for n_classes in (1, 3, 33, 1025):
        for eps in (0.0, 0.3):
            shape = (5, n_classes)
            check(
                normal(rng, shape, dtype),
                probabilities(rng, shape, dtype),
                weight=rng.random(n_classes) + 0.1,
                sample_weight=rng.random(5) + 0.1,
                label_smoothing=eps,
                reduction="sum",
                **rule,
            )


@pytest.mark.parametrize("denominator", ["weight", "count", "total", 7.5])
def test_rows_that_do_not_count_and_denominators_equal_the_oracle(variant, dtype, rule, denominator, rng):
    target = rng.integers(0, 11, 40)
    target[::7] = -100
    check(
        normal(rng, (40, 11), dtype),
        target,
        weight=rng.random(11),
        sample_weight=rng.integers(0, 3, 40),
        denominator=denominator,
        label_smoothing=0.1,
        z_loss=1e-3,
        **rule,
    )


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("temperature", [0.07, 3.7])
def test_temperature_and_softcap_of_a_rule_equal_the_oracle(variant, dtype, rule, temperature, softcap, rng):
    logits, target = normal(rng, (5, 40), dtype), rng.integers(0, 40, 5)
    for eps in (0.0, 0.1):
        check(logits, target, temperature=temperature, softcap=softcap, label_smoothing=eps, **rule)


def test_upstream_and_class_axis_of_a_rule_equal_the_oracle(variant, dtype, rule, rng):
    logits, upstream = normal(rng, (3, 5, 4), dtype), rng.standard_normal((3, 4))
    target = rng.integers(0, 5, (3, 4))
    for eps in (0.0, 0.1):
        check(logits, target, class_axis=1, upstream=upstream, reduction="none", label_smoothing=eps, **rule)
    check(logits, probabilities(rng, logits.shape, dtype, 1), class_axis=1, upstream=-2.5, **rule)


@pytest.mark.parametrize("alpha", [0.25, "by_class"])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_alpha_weighs_the_focal_loss_of_classes(variant, dtype, alpha, soft, rng):
    logits = normal(rng, (20, 7), dtype)
    target = probabilities(rng, (20, 7), dtype) if soft else rng.integers(0, 7, 20)
    alpha = np.append(rng.random(6), 0.0) if alpha == "by_class" else alpha
    for options in ({}, {"label_smoothing": 0.2, "z_loss": 1e-2}, {"weight": rng.random(7)}, {"denominator": "count"}):
        check(logits, target, loss_class=ce.FocalLoss, gamma=1.5, alpha=alpha, **options)


def test_gamma_0_is_cross_entropy_to_the_ulp(variant, dtype, rng):
    logits, target = normal(rng, (9, 100), dtype), rng.integers(0, 100, 9)
    for eps in (0.0, 0.1):
        options = {"label_smoothing": eps, "reduction": "none"}
        value, grad = ce.FocalLoss(gamma=0.0, **options).value_and_grad(logits, target)
        expected = oracle(logits, target, **options)
        assert_grad_close(grad, expected.grad, expected.terms, dtype)
        plain = ce.CrossEntropyLoss(**options)(logits, target)
        np.testing.assert_allclose(value, plain, rtol=2 * float(np.finfo(plain.dtype).eps))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("smoothed", [False, True], ids=["hard", "smoothed"])
def test_confident_rows_have_finite_losses_and_gradients(variant, dtype, rule, smoothed):
    """Where p is 0 or 1 to every digit: 0^gamma, its derivative at gamma < 1, and 0 log 0."""
    far = float(np.finfo(dtype).max) / 8
    rows = [[200, 0, 0], [-200, 0, 0], [0, 200, 0], [0, 0, 1e4], [-1e4, 0, 1e4], [far, 0, 0], [-far, far, 0]]
    options = {"label_smoothing": 0.1} if smoothed else {}
    for row in np.array(rows, dtype):
        value, grad = made(**rule, **options).value_and_grad(row[None], [0])
        assert np.isfinite(value) and np.isfinite(grad).all(), row
        check(row[None], np.array([0]), **rule, **options)
        check(row[None], np.array([[0.5, 0.25, 0.25]], dtype), **rule, **options)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_tiny_losses_of_a_rule_keep_their_digits(variant, dtype, rule):
    for row in ([20.0, 0.0, 0.0], [60.0, 0.0, 0.0], [3.0, 1.0, -50.0]):
        check(np.array([row], dtype), np.array([0]), **rule)
        check(np.array([row], dtype) / 8, np.array([0]), temperature=0.125, **rule)


def test_large_offsets_change_no_digit_of_a_hard_target(variant, rule, rng):
    base, target = rng.integers(-30, 1, (8, 50)).astype(np.float64), rng.integers(0, 50, 8)
    for offset in (5000.0, -70000.0, 1e6):
        for dtype in (np.float64, np.float32):
            check((base + offset).astype(dtype), target, reduction="none", **rule)
            check((base + offset).astype(dtype), target, reduction="none", label_smoothing=0.1, **rule)


def test_mass_on_a_certain_class_that_is_not_the_target_is_no_nan(variant, dtype, rule, rng):
    """lse - z_k of that class may come out under 0, of which no power is taken."""
    for gap in (5.0, 8.0, 10.0, 16.0, 20.0, 36.0, 40.0, 100.0):
        logits = normal(rng, (20, 40), dtype, 0.3)
        logits[:, 7] = (gap + rng.random(20)).astype(dtype)
        weight = np.ones(40)
        weight[3] = 0
        check(logits, np.full(20, 3), label_smoothing=0.5, weight=weight, reduction="none", **rule)


def test_minus_infinity_is_probability_zero_for_a_rule(variant, rule):
    bounded = rule["loss_class"] is ce.GeneralizedCrossEntropyLoss
    at_zero = 1 / rule["q"] if bounded else INF
    rows = np.array([[-INF, 1.0, 1.0], [1.0, -INF, 1.0]], np.float32)

    def run(**options):
        return made(reduction="none", **rule, **options).value_and_grad(rows, [0, 0])

    loss, grad = run()
    assert loss[0] == pytest.approx(at_zero, rel=1e-6) and np.isfinite(loss[1])
    np.testing.assert_allclose(grad[0], [0, 0, 0] if bounded else [-1, 0.5, 0.5], rtol=1e-6)
    assert grad[1, 1] == 0 and np.isfinite(grad[1]).all()
    loss, grad = run(label_smoothing=0.1)
    assert (np.isfinite(loss) if bounded else loss == INF).all() and np.isfinite(grad).all()
    loss, grad = run(label_smoothing=0.1, weight=[0.0, 0.0, 1.0])
    assert np.isfinite(loss).all() and np.isfinite(grad).all()  # mass 0 there contributes nothing


def test_nan_and_plus_infinity_are_nan_for_a_rule_in_their_row_only(variant, rule):
    rows = np.array([[NAN, 0.0, 1.0], [1.0, 0.0, 2.0], [INF, 0.0, 1.0], [-INF, -INF, -INF], [NAN, INF, 0.0]])
    for eps in (0.0, 0.1):
        loss = made(reduction="none", label_smoothing=eps, **rule)
        value, grad = loss.value_and_grad(rows, [0, 0, 1, 0, -100])
        assert np.isnan(value).tolist() == [True, False, True, True, False] and value[4] == 0
        assert np.isnan(grad).all(-1).tolist() == [True, False, True, True, False] and (grad[4] == 0).all()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_rows_that_do_not_count_leak_nothing_into_a_rule(variant, convex, softcap):
    rows = np.array([[NAN, INF, 1.0], [1.0, 2.0, 3.0], [NAN, NAN, NAN]])
    for target, sample_weight in (([-100, 0, -100], None), ([1, 0, 2], [0.0, 1.0, 0.0])):
        loss = made(softcap=softcap, label_smoothing=0.1, temperature=0.5, **convex)
        value, grad = loss.value_and_grad(rows, target, sample_weight)
        assert np.isfinite(value) and np.isfinite(grad).all() and (grad[[0, 2]] == 0).all()
        assert (loss.grad_and_hess(rows, target, sample_weight)[1][[0, 2]] == 0).all()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "temperature": 0.5}], ids=["plain", "smoothed"])
def test_infinities_under_a_softcap_are_at_the_cap_with_gradient_zero(variant, convex, options):
    rows = np.array([[INF, 0.0, 1.0], [-INF, 2.0, -INF], [0.5, -INF, INF], [-INF, -INF, -INF]], np.float32)
    target = np.array([0, 0, 1, 2])
    check(rows, target, softcap=5.0, reduction="none", **convex, **options)
    _, grad = made(softcap=5.0, reduction="none", **convex, **options).value_and_grad(rows, target)
    assert (grad[np.isinf(rows)] == 0).all()


def test_hessian_equals_the_oracle(variant, dtype, convex, rng):
    for n_classes in (1, 2, 3, 33, 1025):
        logits, target = normal(rng, (6, n_classes), dtype), rng.integers(0, n_classes, 6)
        for options in ({}, {"label_smoothing": 0.2, "weight": rng.random(n_classes) + 0.1, "reduction": "sum"}):
            check_hess(logits, target, **convex, **options)
    check_hess(logits, probabilities(rng, logits.shape, dtype), label_smoothing=0.1, **convex)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_hessian_with_temperature_and_softcap_equals_the_oracle(variant, dtype, convex, softcap, rng):
    logits, target = normal(rng, (6, 4, 5), dtype), rng.integers(0, 4, (6, 5))
    for temperature in (1.0, 0.07, 3.7):
        check_hess(logits, target, temperature=temperature, softcap=softcap, class_axis=1, **convex)


def test_hessian_is_at_least_its_floor_and_0_where_rows_do_not_count(variant, dtype, convex, rng):
    floor = 2.0**-24 if dtype == np.float16 else float(np.array(1e-16, dtype))
    logits = normal(rng, (6, 10), dtype)
    logits[:3, 4] = 300  # certain
    logits[4] = NAN
    target, sample_weight = np.array([4, 0, 3, 1, 2, -100]), np.array([1.0, 0.5, 2.0, 1.0, 0.0, 1.0])
    hess = check_hess(logits, target, sample_weight=sample_weight, **convex)
    assert (hess[:4].astype(float) >= floor).all() and (hess[4:] == 0).all() and (hess[0] == hess[0].min()).all()
    hess = check_hess(logits, target, sample_weight=sample_weight, softcap=0.5, temperature=0.5, **convex)
    assert (hess[:4].astype(float) >= floor).all() and (hess[4:] == 0).all()  # also where dz/dx is 0


def test_hessian_of_a_mean_is_divided_and_weighted_as_its_gradient(variant, rng):
    logits, target = normal(rng, (30, 8), np.float64), rng.integers(0, 8, 30)
    weight, sample_weight = rng.random(8) + 0.1, rng.random(30) + 0.1
    for denominator in ("weight", "count", 12.0):
        options = {"weight": weight, "denominator": denominator, "label_smoothing": 0.1}
        check_hess(logits, target, loss_class=ce.CrossEntropyLoss, sample_weight=sample_weight, **options)


def test_hessian_of_a_nan_row_is_nan_in_that_row_only(variant):
    rows = np.array([[NAN, 0.0, 1.0], [1.0, 0.0, 2.0]])
    grad, hess = ce.CrossEntropyLoss().grad_and_hess(rows, [0, 0])
    assert np.isnan(hess).all(-1).tolist() == np.isnan(grad).all(-1).tolist() == [True, False]


@pytest.mark.parametrize(
    "loss",
    [
        ce.CrossEntropyLoss(z_loss=1e-4),
        ce.FocalLoss(z_loss=1e-4),
        ce.PolyLoss(epsilon=-1.5),
        ce.PolyLoss(z_loss=1e-4),
        ce.GeneralizedCrossEntropyLoss(z_loss=1e-4),
        ce.NLLLoss(),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_no_hessian_is_given_where_none_is_known_to_be_positive(loss):
    with pytest.raises(NotImplementedError, match=r"(?i)hessian"):
        loss.grad_and_hess(np.zeros((2, 3)), [0, 1])


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: ce.FocalLoss(gamma=-0.5), r"gamma is -0\.5"),
        (lambda: ce.FocalLoss(gamma=INF), "gamma is inf"),
        (lambda: ce.FocalLoss(alpha=-1.0), "alpha"),
        (lambda: ce.FocalLoss(alpha=[0.5, NAN]), r"alpha\[1\] is nan"),
        (lambda: ce.FocalLoss(alpha=[[0.5]]), "alpha has shape"),
        (lambda: ce.FocalLoss(alpha=[0.5, 1.0])(np.zeros((2, 3)), [0, 1]), "alpha has 2 values; expected 3"),
        (lambda: ce.PolyLoss(epsilon=NAN), "epsilon is nan"),
        (lambda: ce.GeneralizedCrossEntropyLoss(q=0.0), r"q is 0\.0"),
        (lambda: ce.GeneralizedCrossEntropyLoss(q=1.5), r"q is 1\.5"),
        (lambda: ce.CrossEntropyLoss(temperature=0.0), r"temperature is 0\.0"),
        (lambda: ce.CrossEntropyLoss(temperature=INF), "temperature is inf"),
        (lambda: ce.CrossEntropyLoss(softcap=0.0), r"softcap is 0\.0"),
        (lambda: ce.PolyLoss(softcap=-30.0), r"softcap is -30\.0"),
    ],
)
def test_an_option_out_of_its_range_says_what_came(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_functions_equal_their_classes(variant, rng):
    logits, target = normal(rng, (6, 5), np.float32), rng.integers(0, 5, 6)
    weight, s = rng.random(5), rng.random(6)
    options = {"label_smoothing": 0.1, "reduction": "sum", "ignore_index": 3}
    pairs = [
        (ce.cross_entropy, ce.CrossEntropyLoss, {"temperature": 2.0, "softcap": 20.0, "z_loss": 1e-3}),
        (ce.focal_loss, ce.FocalLoss, {"gamma": 1.5, "alpha": 0.25}),
        (ce.poly_loss, ce.PolyLoss, {"epsilon": 2.0}),
        (ce.generalized_cross_entropy, ce.GeneralizedCrossEntropyLoss, {"q": 0.5}),
    ]
    for function, loss_class, own in pairs:
        loss = loss_class(weight=weight, **own, **options)
        assert function(logits, target, weight, sample_weight=s, **own, **options) == loss(logits, target, s)
        assert function(logits, target) == loss_class()(logits, target)


def test_same_bits_for_any_number_of_threads(rule, rng):
    logits, target = normal(rng, (300, 700), np.float32), rng.integers(0, 700, 300)
    results = [made(label_smoothing=0.1, n_threads=n, **rule).value_and_grad(logits, target) for n in (1, 2, 3)]
    for value, grad in results[1:]:
        assert value == results[0][0]
        np.testing.assert_array_equal(grad, results[0][1])


def test_hessian_of_a_confidently_wrong_class_keeps_its_digits(variant, dtype):
    """p (1 - p) where p rounds to 1: what is left is the sum of the others."""
    logits = np.array([[0, 20, 0], [0, 0, 20]], dtype)
    _, hess = ce.CrossEntropyLoss(reduction="sum").grad_and_hess(logits, [0, 1])
    left = 2 * np.exp(-20.0) / (1 + 2 * np.exp(-20.0)) ** 2
    found = hess.astype(float)[[0, 1], [1, 2]]
    floor = 2.0**-24 if dtype == np.float16 else 0
    np.testing.assert_allclose(found, max(left, floor), rtol=1e-2 if dtype.itemsize == 2 else 1e-6)


def test_hessian_is_finite_at_the_smallest_temperatures(variant):
    _, hess = ce.CrossEntropyLoss(temperature=1e-20).grad_and_hess(np.float32([[1, 2, 3]]), [0])
    assert np.isfinite(hess).all()


def test_focal_factor_is_exact_where_1_minus_p_rounds_to_1(variant):
    """(1 - p)^gamma with p = e^-36: gamma magnifies what 1 - p lost."""
    p = np.exp(-36.0)
    assert ce.FocalLoss(gamma=1e16)([[0.0, 36.0]], [0]) == pytest.approx(36 * np.exp(-1e16 * p), rel=1e-9)
