"""Values and gradients against the oracle, over every backend, instruction set and dtype."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ce_fast as ce
import reference
from conftest import DTYPES, VARIANTS, use
from tolerances import assert_grad_close, assert_loss_close

# either side of the vectors (4 to 16), of the padding (32) and of the tiles (1024) of the kernels
WIDTHS = [1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 64, 100, 1023, 1024, 1025, 2100]

# class -> the oracle's name of its rule, and its own of the rule's parameter
RULES = {
    ce.CrossEntropyLoss: ("cross_entropy", None),
    ce.FocalLoss: ("focal", "gamma"),
    ce.PolyLoss: ("poly", "epsilon"),
    ce.GeneralizedCrossEntropyLoss: ("generalized", "q"),
}


def oracle(logits, target, *, loss_class=ce.CrossEntropyLoss, **options):
    """What the oracle says of a loss class and its options."""
    rule, param = RULES[loss_class]
    options.pop("n_threads", None)
    if options.get("class_axis") is None:
        options["class_axis"] = -1
    return reference.cross_entropy(logits, target, rule=rule, param=options.pop(param, 0.0), **options)


def check(
    logits, target, *, loss_class=ce.CrossEntropyLoss, sample_weight=None, upstream=None, in_place=False, **options
):
    """Value and gradient equal the oracle's; a call without a gradient gives the same value."""
    loss = loss_class(**options)
    expected = oracle(logits, target, loss_class=loss_class, sample_weight=sample_weight, upstream=upstream, **options)
    reduction = options.get("reduction", "mean")
    before = logits.copy()
    value = loss(logits, target, sample_weight)
    out = logits if in_place else None
    value_again, grad = loss.value_and_grad(logits, target, sample_weight, out=out, upstream=upstream)
    np.testing.assert_array_equal(np.asarray(value), np.asarray(value_again))
    if in_place:
        assert grad is logits
    else:
        np.testing.assert_array_equal(logits.astype(float), before.astype(float))
        assert grad.dtype == logits.dtype and grad.shape == logits.shape
    assert_loss_close(value, expected.value(reduction), logits.dtype, expected.terms_of_value(reduction))
    assert_grad_close(grad, expected.grad, expected.terms, logits.dtype)


def normal(rng, shape, dtype, spread=3.0):
    return (rng.standard_normal(shape) * spread).astype(dtype)


def probabilities(rng, shape, dtype, axis=-1):
    q = rng.random(shape) ** 4
    return (q / q.sum(axis, keepdims=True)).astype(dtype)


@pytest.mark.parametrize("n_classes", WIDTHS)
@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in_place"])
def test_plain_cross_entropy_equals_the_oracle(variant, dtype, n_classes, in_place, rng):
    check(normal(rng, (9, n_classes), dtype), rng.integers(0, n_classes, 9), reduction="none", in_place=in_place)


@pytest.mark.parametrize(
    "n_classes, smoothing", [(1, "uniform"), *((n, s) for n in (3, 33, 1025) for s in ("uniform", "others"))]
)
def test_smoothed_weighted_loss_equals_the_oracle(variant, dtype, n_classes, smoothing, rng):
    check(
        normal(rng, (9, n_classes), dtype),
        rng.integers(0, n_classes, 9),
        weight=rng.random(n_classes) + 0.1,
        label_smoothing=0.2,
        smoothing=smoothing,
        reduction="none",
    )


@pytest.mark.parametrize("n_classes", [1, 3, 33, 1025])
@pytest.mark.parametrize("eps", [0.0, 0.3, 1.0])
def test_class_probability_targets_equal_the_oracle(variant, dtype, n_classes, eps, rng):
    shape = (9, n_classes)
    check(
        normal(rng, shape, dtype),
        probabilities(rng, shape, dtype),
        weight=rng.random(n_classes) + 0.1,
        sample_weight=rng.random(9) + 0.1,
        label_smoothing=eps,
        reduction="sum",
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("denominator", ["weight", "count", "total", 7.5])
def test_reductions_and_denominators_equal_the_oracle(variant, dtype, reduction, denominator, rng):
    target = rng.integers(0, 11, 40)
    target[::7] = -100
    check(
        normal(rng, (40, 11), dtype),
        target,
        weight=rng.random(11),
        sample_weight=rng.integers(0, 3, 40),
        reduction=reduction,
        denominator=denominator,
        z_loss=1e-3,
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_multiplies_the_gradient(variant, dtype, reduction, rng):
    upstream = rng.standard_normal(20) if reduction == "none" else -2.5
    check(normal(rng, (20, 40), dtype), rng.integers(0, 40, 20), reduction=reduction, upstream=upstream)


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -3])
def test_any_class_axis_equals_the_oracle(variant, dtype, axis, rng):
    shape = (3, 5, 4, 6)
    outer = np.delete(shape, axis)
    logits = normal(rng, shape, dtype)
    check(logits, rng.integers(0, shape[axis], outer), class_axis=axis, reduction="none", label_smoothing=0.1)
    check(logits, probabilities(rng, shape, dtype, axis), class_axis=axis)


@pytest.mark.parametrize("softcap", [None, 0.5, 30.0, 1e4])
@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.5, 3.7, 1e3])
def test_temperature_and_softcap_equal_the_oracle(variant, dtype, temperature, softcap, rng):
    for n_classes in (1, 3, 33, 1025):
        logits, target = normal(rng, (5, n_classes), dtype), rng.integers(0, n_classes, 5)
        check(logits, target, temperature=temperature, softcap=softcap, reduction="none")
        check(
            logits,
            target,
            temperature=temperature,
            softcap=softcap,
            weight=rng.random(n_classes) + 0.1,
            label_smoothing=0.2,
            z_loss=1e-3,
            in_place=True,
        )


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_class_probabilities_with_temperature_and_softcap_equal_the_oracle(variant, dtype, softcap, rng):
    for n_classes in (1, 3, 33, 1025):
        shape = (5, n_classes)
        check(
            normal(rng, shape, dtype),
            probabilities(rng, shape, dtype),
            temperature=0.3,
            softcap=softcap,
            label_smoothing=0.1,
            sample_weight=rng.random(5) + 0.1,
        )


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_any_class_axis_with_temperature_and_softcap_equals_the_oracle(variant, dtype, axis, rng):
    shape = (4, 5, 6)
    target = rng.integers(0, shape[axis], np.delete(shape, axis))
    for softcap in (None, 8.0):
        logits = normal(rng, shape, dtype)
        check(logits, target, class_axis=axis, temperature=0.7, softcap=softcap, reduction="none", in_place=True)


@pytest.mark.parametrize("temperature", [0.07, 0.5, 3.7])
def test_temperature_keeps_every_digit_far_from_the_origin(variant, temperature, rng):
    """Logits around 1e6 are a multiple of the temperature away: only their differences are divided by it."""
    base = rng.integers(-30, 1, (8, 50)).astype(np.float64)
    for offset in (0.0, 5000.0, -70000.0, 1e6):
        for dtype in (np.float64, np.float32):
            check((base + offset).astype(dtype), rng.integers(0, 50, 8), temperature=temperature, reduction="none")


@pytest.mark.parametrize("order", ["rising", "falling", "one_late_peak"])
def test_a_moving_reference_keeps_every_digit_at_any_temperature(variant, dtype, order, rng):
    row = {"rising": np.linspace(-60, 30, 3000), "falling": np.linspace(30, -60, 3000)}.get(order)
    if row is None:
        row = rng.standard_normal(3000)
        row[-3] = 40.0
    logits, target = np.tile(row, (3, 1)).astype(dtype), np.array([0, 1500, 2999])
    for temperature, softcap in ((0.07, None), (3.7, None), (1.0, 20.0), (0.5, 50.0)):
        check(logits, target, temperature=temperature, softcap=softcap, reduction="none", label_smoothing=0.1)


def test_large_offsets_change_nothing(variant, rng):
    """Exact also for logits around 1e6 and -1e30, where x - max is all that is left."""
    base = rng.integers(-30, 1, (8, 50)).astype(np.float64)
    target = rng.integers(0, 50, 8)
    for offset in (0.0, 5000.0, -70000.0, 1e6):
        check(base + offset, target, reduction="none", label_smoothing=0.1)
        check((base + offset).astype(np.float32), target, reduction="none")
    same = np.full((2, 5), -1e30, np.float32)
    value, grad = ce.CrossEntropyLoss().value_and_grad(same, [0, 1])
    assert value == pytest.approx(np.log(5), rel=1e-7)
    np.testing.assert_allclose(grad[0], [-0.4, 0.1, 0.1, 0.1, 0.1], rtol=1e-6)


@pytest.mark.parametrize("order", ["rising", "falling", "one_late_peak"])
def test_a_moving_reference_keeps_every_digit(variant, dtype, order, rng):
    """The maximum moves in every tile, or only in the last: what was stored before is rescaled exactly."""
    n_classes = 6000
    row = {"rising": np.linspace(-60, 30, n_classes), "falling": np.linspace(30, -60, n_classes)}.get(order)
    if row is None:
        row = rng.standard_normal(n_classes)
        row[-3] = 40.0
    logits = np.tile(row, (3, 1)).astype(dtype)
    check(logits, np.array([0, n_classes // 2, n_classes - 1]), reduction="none")
    check(logits, np.array([0, n_classes // 2, n_classes - 1]), reduction="none", label_smoothing=0.1)


def test_confident_rows_keep_their_digits(variant):
    """Logits [20, 0, 0], target 0: the loss is log1p(2 exp(-20)), the gradient at the target minus the rest."""
    logits, target = np.array([[20.0, 0.0, 0.0]], np.float32), np.array([0])
    expected = reference.cross_entropy(logits, target)
    value, grad = ce.CrossEntropyLoss().value_and_grad(logits, target)
    assert abs(value / float(expected.rows[0]) - 1) < 3 * 2**-24
    assert abs(grad[0, 0] / float(expected.grad[0, 0]) - 1) < 3 * 2**-24


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("temperature", [0.07, 0.5, 3.0])
def test_tiny_losses_keep_their_digits_at_any_temperature(variant, dtype, temperature):
    for gap in (5.0, 20.0, 60.0):
        check(np.array([[gap * temperature, 0.0, 0.0]], dtype), np.array([0]), temperature=temperature)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("softcap", [5.0, 20.0, 30.0, 300.0])
def test_tiny_losses_and_slopes_under_a_softcap_keep_their_digits(variant, dtype, softcap):
    """The slope of a flat cap is a small number, not what 1 - 1 leaves of it."""
    logits = np.array([[300.0, 0.0, -1.0], [15.0, 120.0, -200.0]], dtype)
    check(logits, np.array([0, 1]), softcap=softcap, reduction="none")
    check(logits, np.array([0, 1]), softcap=softcap, temperature=0.5, label_smoothing=0.1)


# class and parameter; alpha of the focal loss is drawn apart
COMBINED_RULES = [
    (ce.CrossEntropyLoss, {}),
    *((ce.FocalLoss, {"gamma": gamma}) for gamma in (0.0, 0.5, 1.0, 2.0, 3.5)),
    *((ce.PolyLoss, {"epsilon": epsilon}) for epsilon in (-1.0, 0.0, 1.0, 4.0)),
    *((ce.GeneralizedCrossEntropyLoss, {"q": q}) for q in (0.01, 0.7, 1.0)),
]
OPTIONS = st.fixed_dictionaries(
    {
        "shape": st.sampled_from([(6, 1), (6, 2), (5, 7), (4, 40), (3, 1030), (2, 3, 4), (2, 5, 2, 3), (0, 4), (9,)]),
        "dtype": st.sampled_from(DTYPES),
        "variant": st.sampled_from(VARIANTS),
        "rule": st.sampled_from([COMBINED_RULES[0], *COMBINED_RULES]),
        "alpha": st.sampled_from([None, "number", "by_class"]),
        "temperature": st.sampled_from([1.0, 0.5, 0.07, 3.7]),
        "softcap": st.sampled_from([None, 30.0, 2.0]),
        "soft": st.booleans(),
        "weight": st.sampled_from([None, "positive", "some_zero"]),
        "sample_weight": st.sampled_from([None, "float", "mask"]),
        "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        "smoothing": st.sampled_from(["uniform", "others"]),
        "z_loss": st.sampled_from([0.0, 1e-4, 0.1]),
        "ignore_index": st.sampled_from([-100, 0, 255]),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "denominator": st.sampled_from(["weight", "count", "total", 3.0]),
        "layout": st.sampled_from(["plain", "reversed", "sliced", "fortran"]),
        "in_place": st.booleans(),
        "spread": st.sampled_from([0.1, 3.0, 50.0]),
        "seed": st.integers(0, 2**32 - 1),
    }
)


def laid_out(array, layout):
    """The same values in another layout."""
    if layout == "reversed":
        return array[tuple(slice(None, None, -1) for _ in array.shape)].copy()[
            tuple(slice(None, None, -1) for _ in array.shape)
        ]
    if layout == "sliced":
        wide = np.zeros([2 * n for n in array.shape], array.dtype)
        view = wide[tuple(slice(None, None, 2) for _ in array.shape)]
        view[...] = array
        return view
    return np.asfortranarray(array) if layout == "fortran" else array.copy()


@settings(max_examples=10 * settings.default.max_examples, suppress_health_check=list(HealthCheck))
@given(OPTIONS)
def test_options_combined_equal_the_oracle(o):
    rng = np.random.default_rng(o["seed"])
    shape, axis = o["shape"], (1 if len(o["shape"]) > 2 else None)
    n_classes = shape[-1 if axis is None else axis]
    outer = tuple(np.delete(shape, -1 if axis is None else axis))
    if o["smoothing"] == "others" and (o["soft"] or n_classes == 1):
        return
    logits = laid_out(normal(rng, shape, o["dtype"], o["spread"]), o["layout"])
    if o["soft"]:
        target = probabilities(rng, shape, o["dtype"], -1 if axis is None else axis)
    else:
        target = np.where(rng.random(outer) < 0.2, o["ignore_index"], rng.integers(0, n_classes, outer))
    weight = None
    if o["weight"]:
        weight = rng.random(n_classes) * (1 if o["weight"] == "positive" else rng.integers(0, 2, n_classes))
    sample_weight = {"float": rng.random(outer), "mask": rng.random(outer) < 0.7, None: None}[o["sample_weight"]]
    loss_class, rule = o["rule"]
    if loss_class is ce.FocalLoss:
        rule = rule | {"alpha": {"number": 0.25, "by_class": rng.random(n_classes), None: None}[o["alpha"]]}
    given = ("label_smoothing", "smoothing", "temperature", "softcap", "z_loss", "ignore_index", "reduction")
    with use(o["variant"]):
        check(
            logits,
            laid_out(target, o["layout"]) if target.ndim else target,
            loss_class=loss_class,
            sample_weight=sample_weight,
            in_place=o["in_place"],
            weight=weight,
            class_axis=axis,
            **rule,
            **{k: o[k] for k in (*given, "denominator")},
        )


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_confident_class_probabilities_keep_their_digits_wherever_the_mass_is(variant, dtype):
    """The largest probability has class weight 0, so all the mass is on a class whose softmax is near 1."""
    logits, q = np.array([[0.0, 25.0, -1.0]], dtype), np.array([[0.6, 0.4, 0.0]], dtype)
    check(logits, q, weight=np.array([0.0, 1.0, 1.0]), reduction="none")


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("n_classes", [32, 1000, 1024, 5000])
def test_equal_logits_share_the_probability_to_the_ulp(variant, dtype, n_classes, rng):
    """All terms of the sum are rounded alike: the worst case of a plain sum, which lost 4.5 ulp."""
    for constant in rng.uniform(-0.35, 0.35, 50):
        check(np.full((1, n_classes), constant, dtype), np.zeros(1, int))
        p = ce.softmax(np.full((1, n_classes), constant, dtype)).astype(np.longdouble)
        assert_grad_close(p, np.full((1, n_classes), 1 / np.longdouble(n_classes)), 0 * p, dtype)


@pytest.mark.parametrize("n_classes, gap", [(152064, 87.0), (1000, 90.0), (2, 87.0)])
def test_losses_are_right_down_to_the_smallest_normal_number(variant, n_classes, gap):
    """Each term of the sum is subnormal against the largest logit; together they are not."""
    logits = np.full((1, n_classes), -gap, np.float32)
    logits[0, 0] = 0
    check(logits, np.zeros(1, int), reduction="none")


def test_finite_logits_as_far_apart_as_can_be_have_an_infinite_loss_and_no_nan(variant):
    for dtype in (np.float64, np.float32):
        far = float(np.finfo(dtype).max)
        value, grad = ce.CrossEntropyLoss().value_and_grad(np.array([[-far, far]], dtype), [0])
        assert value > 1e38 and not np.isnan(grad).any()
        np.testing.assert_array_equal(grad, [[-1, 1]])
