"""Calibration errors against plain loops over bins; temperatures against closed forms, SciPy and scikit-learn."""

import math
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ce_fast as ce
from ce_fast.calibration import BLOCK, Binning, Bins, calibration_error, fit_temperature

pytest.importorskip("scipy")
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

STRATEGIES, NORMS, KINDS = ("uniform", "quantile"), ("l1", "l2", "max"), ("top_label", "class_wise")


def sample(rng, n_rows=400, n_classes=5, sharp=3.0):
    logits = rng.normal(size=(n_rows, n_classes)) * sharp
    return logits, rng.integers(n_classes, size=n_rows)


# --- The oracle: lists, loops, and the definitions --------------------------------------------------------------------


def loop_edges(confidence, weight, n_bins, strategy):
    """Upper edges of all bins but the last."""
    if strategy == "uniform":
        return [float(edge) for edge in np.linspace(0, 1, n_bins + 1)[1:-1]]
    pairs, total, edges = sorted(zip(confidence, weight, strict=True)), math.fsum(weight), []
    for b in range(1, n_bins):
        mass, at = 0.0, -1
        while mass < b * total / n_bins:
            at += 1
            mass += pairs[at][1]
        edges.append(pairs[at][0])
    return edges


def loop_curve(confidence, correct, weight, n_bins, strategy):
    """[mass, mean confidence, frequency] of the bins that are not empty."""
    edges, found = loop_edges(confidence, weight, n_bins, strategy), [[] for _ in range(n_bins)]
    for c, hit, w in zip(confidence, correct, weight, strict=True):
        found[sum(c > edge for edge in edges)].append((c, hit, w))
    curve = []
    for members in found:
        mass = math.fsum(w for _, _, w in members)
        if mass > 0:
            mean = math.fsum(w * c for c, _, w in members) / mass
            curve.append((mass, mean, math.fsum(w * hit for _, hit, w in members) / mass))
    return curve


def loop_error(proba, target, weight=None, *, n_bins=15, strategy="uniform", norm="l1", kind="top_label"):
    weight = [1.0] * len(proba) if weight is None else [float(w) for w in weight]
    rows = [(list(map(float, p)), int(t), w) for p, t, w in zip(proba, target, weight, strict=True) if w > 0]
    weight = [w for _, _, w in rows]
    if kind == "top_label":
        given = [([max(p) for p, _, _ in rows], [p.index(max(p)) == t for p, t, _ in rows])]
    else:
        given = [([p[k] for p, _, _ in rows], [t == k for _, t, _ in rows]) for k in range(len(proba[0]))]
    errors = []
    for confidence, correct in given:
        curve = loop_curve(confidence, correct, weight, n_bins, strategy)
        total = math.fsum(mass for mass, _, _ in curve)
        power = 2 if norm == "l2" else 1
        gaps = [abs(frequency - mean) ** power for _, mean, frequency in curve]
        shares = [mass / total for mass, _, _ in curve]
        errors.append(max(gaps) if norm == "max" else math.fsum(s * g for s, g in zip(shares, gaps, strict=True)))
    if norm == "max":
        return max(errors)
    mean = math.fsum(errors) / len(errors)
    return math.sqrt(mean) if norm == "l2" else mean


# --- The calibration error --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_error_is_that_of_loops_over_bins(rng, strategy, norm, kind):
    options = {"strategy": strategy, "norm": norm, "kind": kind}
    for n_rows, n_classes, n_bins in [(1, 3, 4), (50, 2, 15), (300, 4, 7), (120, 1, 5), (200, 11, 1), (30, 3, 100)]:
        logits, target = sample(rng, n_rows, n_classes)
        weight = rng.integers(0, 4, n_rows) + (n_rows == 1)
        for w in (None, weight):
            actual = calibration_error(logits, target, n_bins=n_bins, sample_weight=w, **options)
            expected = loop_error(softmax(logits, 1).tolist(), target, w, n_bins=n_bins, **options)
            assert actual == pytest.approx(expected, rel=1e-11, abs=1e-14)


@settings(max_examples=100)
@given(data=st.data(), strategy=st.sampled_from(STRATEGIES), kind=st.sampled_from(KINDS), norm=st.sampled_from(NORMS))
def test_ties_and_edges_are_where_the_loops_have_them(data, strategy, kind, norm):
    """Confidences that are eighths: many are equal, many on an edge of uniform bins."""
    n_rows, n_classes, n_bins = (data.draw(st.integers(1, most)) for most in (12, 4, 9))
    eighths = st.lists(st.integers(0, 8), min_size=n_classes, max_size=n_classes)
    proba = np.array(data.draw(st.lists(eighths, min_size=n_rows, max_size=n_rows))) / 8
    target = np.array(data.draw(st.lists(st.integers(0, n_classes - 1), min_size=n_rows, max_size=n_rows)))
    weight = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n_rows, max_size=n_rows)), float)
    weight[0] += 1
    actual = Binning(n_bins, strategy, kind).bins(proba, target, weight).error(norm)
    options = {"n_bins": n_bins, "strategy": strategy, "norm": norm, "kind": kind}
    assert actual == pytest.approx(loop_error(proba.tolist(), target, weight, **options), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_each_backend_and_dtype_gives_the_same_error(backend, dtype, kind, rng):
    logits, target = sample(rng, 3000, 6)
    logits = logits.astype(dtype)
    expected = calibration_error(logits.astype(np.float64), target, kind=kind)
    assert calibration_error(logits, target, kind=kind) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_calibrated_has_an_error_of_the_size_of_the_sampling(rng, kind):
    n_rows, n_bins = 100_000, 10
    logits = rng.normal(size=(n_rows, 4))
    target = (softmax(logits, 1).cumsum(1) < rng.random((n_rows, 1))).sum(1)
    # each of n bins misses its mean by sqrt(c (1 - c) / n_b): the sum of n_b / N of these is at most sqrt(n / N) / 2
    bound = math.sqrt(n_bins / n_rows) / 2
    for strategy in STRATEGIES:
        options = {"n_bins": n_bins, "strategy": strategy, "kind": kind}
        assert calibration_error(logits, target, **options) < 1.5 * bound
        assert calibration_error(3 * logits, target, **options) > 10 * bound


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_rows_changes_nothing(rng, kind, strategy):
    logits, target = sample(rng)
    order = rng.permutation(len(target))
    options = {"kind": kind, "strategy": strategy}
    expected = calibration_error(logits, target, **options)
    assert calibration_error(logits[order], target[order], **options) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_a_number_of_copies(rng, kind, strategy):
    logits, target = sample(rng, 90)
    times = rng.integers(0, 4, 90)
    for norm in NORMS:
        options = {"kind": kind, "strategy": strategy, "norm": norm, "n_bins": 6}
        copies = calibration_error(np.repeat(logits, times, 0), np.repeat(target, times), **options)
        assert calibration_error(logits, target, sample_weight=times, **options) == pytest.approx(copies, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_bins_of_parts_add_up_to_those_of_the_whole(rng, kind):
    proba, target = softmax(rng.normal(size=(500, 4)), 1), rng.integers(4, size=500)
    weight, binning = rng.random(500), Binning(9, kind=kind)
    parts = [binning.bins(proba[i], target[i], weight[i]) for i in (slice(130), slice(130, 131), slice(131, None))]
    whole, merged = binning.bins(proba, target, weight), parts[0] + parts[1] + parts[2]
    for name in ("weight", "confidence", "correct"):
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-13)
    assert merged.error("l1") == pytest.approx(whole.error("l1"), rel=1e-12)
    with pytest.raises(ValueError, match="shapes"):
        whole + Binning(8, kind=kind).bins(proba, target, weight)


def test_confidences_on_an_edge_are_in_the_bin_under_it():
    proba = np.array([[0.0, 1.0], [1.0, 0.0], [0.25, 0.75], [0.5, 0.5]])
    bins = Binning(4, kind="class_wise").bins(proba, np.zeros(4, int), np.ones(4))
    np.testing.assert_array_equal(bins.weight, [[2, 1, 0, 1], [1, 1, 1, 1]])
    assert calibration_error([[800.0, 0.0]], [0]) == 0 and calibration_error([[800.0, 0.0]], [1]) == 1


@pytest.mark.parametrize("n_bins", [3, 5, 10])
@pytest.mark.parametrize("weight", [0.1, 0.3, 1 / 40])
def test_equal_weights_are_no_weights_to_quantile_bins(weight, n_bins):
    confidence = np.linspace(0.51, 0.99, 40)
    logits = np.c_[np.log(confidence / (1 - confidence)), np.zeros(40)]
    target, options = (np.arange(40) % 3 == 0).astype(int), {"strategy": "quantile", "n_bins": n_bins}
    expected = calibration_error(logits, target, **options)
    actual = calibration_error(logits, target, sample_weight=np.full(40, weight), **options)
    assert actual == pytest.approx(expected, rel=1e-12)


def test_equal_confidences_share_a_quantile_bin():
    confidence = np.array([0.5, 0.5, 0.5, 0.5, 0.7, 0.8])[:, None]
    bins = Binning(3, "quantile", "class_wise").bins(confidence, np.zeros(6, int), np.ones(6))
    np.testing.assert_array_equal(bins.weight, [[4, 0, 2]])
    distinct = Binning(5, "quantile", "class_wise").bins(
        np.linspace(0, 1, 20)[::-1, None], np.zeros(20, int), np.ones(20)
    )
    np.testing.assert_array_equal(distinct.weight, [[4] * 5])


def test_logits_divided_by_t_are_those_at_the_temperature_t(rng):
    logits, target = sample(rng)
    for t in (0.3, 2.0, 7.7):
        for kind in KINDS:
            expected = calibration_error(logits / t, target, kind=kind)
            assert calibration_error(logits, target, kind=kind, temperature=t) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_no_unit_and_no_constant_of_the_logits_matters(rng, kind):
    logits, target = sample(rng)
    logits = np.round(logits, 3)
    expected = calibration_error(logits, target, kind=kind, temperature=1.7)
    for unit in (2.0**-60, 2.0**60, 2.0**90):
        actual = calibration_error(unit * logits, target, kind=kind, temperature=unit * 1.7)
        assert actual == pytest.approx(expected, rel=1e-12)
    logits = np.round(logits * 2**10) / 2**10
    expected = calibration_error(logits, target, kind=kind, temperature=1.7)
    for constant in (2.0**20, 2.0**40):
        actual = calibration_error(logits + constant, target, kind=kind, temperature=1.7)
        assert actual == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_that_do_not_count_are_as_if_not_there(rng, strategy, kind):
    logits, target = sample(rng, 60)
    options = {"kind": kind, "strategy": strategy}
    expected = calibration_error(logits[20:], target[20:], **options)
    logits[:20] = np.nan
    ignored = np.where(np.arange(60) < 20, -100, target)
    assert calibration_error(logits, ignored, **options) == pytest.approx(expected, rel=1e-13)
    mask = np.arange(60) >= 20
    wild = np.where(mask, target, 99)  # nor is their target read
    assert calibration_error(logits, wild, sample_weight=mask, **options) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_gives_the_same_error(rng, kind):
    flat, target = sample(rng, 60, 4)
    expected = calibration_error(flat, target, kind=kind)
    image = np.ascontiguousarray(flat.reshape(3, 5, 4, 4).transpose(0, 3, 1, 2))  # (batch, classes, height, width)
    for logits, axis, t in [
        (np.asfortranarray(flat), None, target),
        (flat.T, 0, target),
        (flat.astype(">f8"), None, target),
        (image, 1, target.reshape(3, 5, 4)),
        (flat[::-1], None, target[::-1]),
    ]:
        assert calibration_error(logits, t, class_axis=axis, kind=kind) == pytest.approx(expected, rel=1e-12)
    one = calibration_error(flat[:1], target[:1], kind=kind)
    assert calibration_error(flat[0], target[0], kind=kind) == pytest.approx(one, rel=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_error_of_nothing_or_of_nan_is_nan(strategy, kind):
    options = {"kind": kind, "strategy": strategy}
    assert math.isnan(calibration_error(np.zeros((0, 3)), np.zeros(0, int), **options))
    assert math.isnan(calibration_error(np.zeros((2, 3)), [-100, -100], **options))
    for bad in (np.nan, np.inf):
        for norm in NORMS:
            assert math.isnan(calibration_error([[bad, 0.0], [1.0, 0.0]], [0, 1], norm=norm, **options))
    assert all(math.isnan(Bins(*np.zeros((3, 1, 4))).error(norm)) for norm in NORMS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_class_has_no_confidence(kind):
    logits = np.array([[0.0, -np.inf, 0.5], [1.0, -np.inf, 0.0]])
    expected = loop_error(softmax(logits, 1).tolist(), [0, 2], kind=kind)
    assert calibration_error(logits, [0, 2], kind=kind) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_memory_is_some_numbers_a_row_and_a_block(rng, strategy, kind):
    logits, target = rng.normal(size=(4000, 3000)).astype(np.float32), rng.integers(3000, size=4000)
    calibration_error(logits[:9], target[:9], kind=kind, strategy=strategy)
    tracemalloc.start()
    calibration_error(logits, target, kind=kind, strategy=strategy)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * 8 * BLOCK + 200 * len(target) < logits.nbytes


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"n_bins": 0}, ValueError, "n_bins is 0; expected at least 1"),
        ({"n_bins": 2.5}, TypeError, "n_bins is 2.5; expected an integer"),
        ({"strategy": "even"}, ValueError, "strategy is 'even'; expected one of"),
        ({"norm": "l3"}, ValueError, "norm is 'l3'; expected one of"),
        ({"kind": "marginal"}, ValueError, "kind is 'marginal'; expected one of"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({"sample_weight": [1.0, -1.0]}, ValueError, r"sample_weight\[1\] is -1"),
        ({"target": [0, 3]}, IndexError, r"target\[1\] is 3; expected 0 <= target < 3"),
        ({"target": [0, 1, 2]}, ValueError, "target of class indices has shape"),
        ({"target": np.full((2, 3), 1 / 3)}, TypeError, "target holds class probabilities"),
        ({"logits": "what"}, TypeError, "logits has dtype"),
    ],
)
def test_what_does_not_fit_is_named(change, error, words):
    given = {"logits": [[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], "target": [0, 1]} | change
    logits, target = given.pop("logits"), given.pop("target")
    with pytest.raises(error, match=words):
        calibration_error(logits, target, **given)


def test_probabilities_in_place_of_logits_give_a_warning(rng):
    proba, target = softmax(rng.normal(size=(30, 3)), 1), rng.integers(3, size=30)
    with pytest.warns(UserWarning, match="look like probabilities"):
        calibration_error(proba, target)
    with pytest.warns(UserWarning, match="look like probabilities"):
        fit_temperature(proba, target * 0 + proba.argmax(1) * (np.arange(30) > 3))


# --- The temperature --------------------------------------------------------------------------------------------------


def drawn(rng, n_rows, n_classes, t):
    """Logits, and targets sampled from softmax(logits / t)."""
    logits = rng.normal(size=(n_rows, n_classes)) * 3
    return logits, (softmax(logits / t, 1).cumsum(1) < rng.random((n_rows, 1))).sum(1)


def mean_loss(logits, target, t, weight=None):
    rows = -log_softmax(np.asarray(logits, np.float64) / t, 1)[np.arange(len(target)), target]
    return np.average(rows, weights=weight)


@pytest.mark.parametrize("t", [0.02, 0.7, 1.0, 3.0, 50.0])
def test_the_temperature_that_targets_were_drawn_at_is_found_again(rng, t):
    logits, target = drawn(rng, 40_000, 5, t)
    if t < 0.1:
        logits, target = drawn(rng, 40_000, 5, 1.0)
        logits = logits * t
    error = 0.1 if t > 10 else 0.02  # Fisher information: the variance of logits / T under the model, times n_rows
    assert fit_temperature(logits, target) == pytest.approx(t, rel=error)


@pytest.mark.parametrize("right", [0.501, 0.51, 0.6, 0.9, 0.999])
def test_two_classes_of_one_margin_have_a_closed_form(right):
    """p = sigmoid(m / T) is the frequency of the larger: T = m / logit(frequency)."""
    n, margin = 1000, 4.0
    logits, target = np.tile([margin, 0.0], (n, 1)), (np.arange(n) >= round(right * n)).astype(int)
    assert fit_temperature(logits, target) == pytest.approx(margin / math.log(right / (1 - right)), rel=1e-9)
    weight = np.array([right, 1 - right])
    found = fit_temperature(logits[[0, -1]] + 1e4, target[[0, -1]], sample_weight=weight)  # and no constant matters
    assert found == pytest.approx(margin / math.log(right / (1 - right)), rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_no_other_temperature_has_a_smaller_loss(seed):
    rng = np.random.default_rng(seed)
    logits, target = drawn(rng, 200, int(rng.integers(2, 40)), float(rng.uniform(0.3, 4)))
    weight = rng.random(200)
    found = fit_temperature(logits, target, sample_weight=weight)
    best = minimize_scalar(
        lambda s: mean_loss(logits, target, math.exp(s), weight),
        bracket=(math.log(found) - 0.5, math.log(found) + 0.4),
        tol=1e-12,
    )
    assert found == pytest.approx(math.exp(best.x), rel=1e-6)  # a minimum is flat: SciPy knows it to sqrt(eps)
    assert mean_loss(logits, target, found, weight) <= best.fun * (1 + 1e-15)
    beta = 1 / found  # the derivative, in float64
    p = softmax(beta * logits, 1)
    slope = ((p * logits).sum(1) - logits[np.arange(200), target]) @ weight / weight.sum()
    assert abs(slope) < 1e-11 * np.abs(logits).max()


def test_each_backend_dtype_and_layout_gives_the_temperature(backend, dtype, rng):
    logits, target = drawn(rng, 300, 6, 1.7)
    logits = logits.astype(dtype)
    expected = fit_temperature(logits.astype(np.float64), target)
    assert fit_temperature(logits, target) == pytest.approx(expected, rel=1e-10)
    assert fit_temperature(np.asfortranarray(logits), target) == pytest.approx(expected, rel=1e-10)
    image = np.ascontiguousarray(logits.reshape(10, 30, 6).transpose(0, 2, 1))
    assert fit_temperature(image, target.reshape(10, 30), class_axis=1) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1.0, 1e9, 1e20])
def test_the_temperature_has_the_unit_of_the_logits(rng, scale):
    logits, target = drawn(rng, 300, 4, 1.3)
    assert fit_temperature(scale * logits, target) == pytest.approx(scale * fit_temperature(logits, target), rel=1e-10)


def test_the_temperature_is_that_of_scikit_learn(rng):
    sklearn_calibration = pytest.importorskip("sklearn.calibration")
    from sklearn.datasets import make_classification
    from sklearn.frozen import FrozenEstimator
    from sklearn.linear_model import LogisticRegression

    X, y = make_classification(3000, 20, n_informative=6, n_classes=4, flip_y=0.2, random_state=0)
    model = LogisticRegression(C=100.0, max_iter=1000).fit(X[:60], y[:60])  # too sure of itself
    weight = rng.random(2940)
    host = sklearn_calibration.CalibratedClassifierCV(FrozenEstimator(model), method="temperature")
    with pytest.warns(UserWarning, match="sample weights will only be used for the calibration"):
        host.fit(X[60:], y[60:], sample_weight=weight)
    betas = [c.calibrators[0].beta_ for c in host.calibrated_classifiers_]
    found = fit_temperature(model.decision_function(X[60:]), y[60:], sample_weight=weight)
    assert found > 1.5
    assert found == pytest.approx(1 / betas[0], rel=1e-6)  # its minimum, to sqrt(eps)


def test_rows_that_do_not_count_have_no_say_in_the_temperature(rng):
    logits, target = drawn(rng, 200, 4, 2.0)
    expected = fit_temperature(logits[50:], target[50:])
    logits[:50] = np.nan
    ignored = np.where(np.arange(200) < 50, 7, target)
    assert fit_temperature(logits, ignored, ignore_index=7) == pytest.approx(expected, rel=1e-12)
    mask = np.arange(200) >= 50
    assert fit_temperature(logits, ignored, sample_weight=mask) == pytest.approx(expected, rel=1e-12)
    doubled = np.where(np.arange(200) < 125, 2.0, 1.0) * mask
    copies = np.repeat(np.arange(200), doubled.astype(int))
    again = fit_temperature(logits[copies], target[copies])
    assert fit_temperature(logits, target, sample_weight=doubled) == pytest.approx(again, rel=1e-10)


@pytest.mark.parametrize("target", [[1, 0], [1, 1]])
def test_masked_classes_do_not_make_a_temperature_where_there_is_none(target):
    logits = np.array([[2.0, 0.0], [2.0, 0.0]])
    for those in (logits, np.c_[logits, [-np.inf] * 2]):
        with pytest.raises(ValueError, match="rises without end"):
            fit_temperature(those, target)


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 0.1, 1e300])
def test_the_unit_of_the_weights_does_not_matter_to_the_temperature(scale, rng):
    logits, target = drawn(rng, 50, 3, 2.0)
    expected = fit_temperature(logits, target)
    assert fit_temperature(logits, target, sample_weight=np.full(50, scale)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("hits, of, margin", [(3, 4, 4.0), (9, 10, 0.3), (51, 100, 7.0)])
def test_the_temperature_of_one_margin_is_known_to_the_last_digits(hits, of, margin):
    expected = margin / np.log(hits / (of - hits))
    found = fit_temperature([[margin, 0.0]] * of, (np.arange(of) >= hits).astype(int))
    assert found == pytest.approx(expected, rel=4e-15 * max(1, expected**2))


def test_masked_classes_do_not_matter(rng):
    logits, target = drawn(rng, 200, 4, 2.0)
    masked = np.concatenate([logits, np.full((200, 3), -np.inf)], 1)
    assert fit_temperature(masked, target) == pytest.approx(fit_temperature(logits, target), rel=1e-10)


def test_one_error_among_many_sure_rows_is_enough():
    """999,999 rows of margin m and one of -m: T = m / log(999999); its derivative is far below that of a wrong row."""
    weight = [999_999, 1]
    for margin in (1e-3, 1.0, 1e3):
        found = fit_temperature([[margin, 0.0], [0.0, margin]], [0, 0], sample_weight=weight)
        assert found == pytest.approx(margin / math.log(999_999), rel=1e-8)


@pytest.mark.parametrize(
    ("logits", "target", "words"),
    [
        ([[2.0, 0.0], [0.0, 1.0]], [0, 1], "every target has the largest logit"),
        ([[2.0, 2.0], [0.0, 1.0]], [0, 1], "every target has the largest logit"),
        ([[0.0, 0.0]], [0], "every target has the largest logit"),
        ([[2.0, 0.0], [0.0, 1.0]], [1, 0], "no larger a logit than the mean"),
        ([[2.0, 0.0], [2.0, 0.0]], [1, 0], "no larger a logit than the mean"),
        ([[2.0, 0.0], [2.0, 0.0]], [-100, -100], "no row counts"),
        (np.zeros((0, 2)), np.zeros(0, int), "no row counts"),
        ([[2.0, 0.0], [np.nan, 0.0]], [1, 1], r"row \[1\] hold NaN"),
        ([[2.0, 0.0], [0.0, np.inf]], [1, 1], r"row \[1\] hold NaN, \+inf"),
        ([[2.0, 0.0], [-np.inf, -np.inf]], [1, 1], r"row \[1\] hold NaN"),
        ([[2.0, 0.0], [-np.inf, 1.0]], [1, 0], r"row \[1\] hold -inf for the target"),
    ],
)
def test_logits_without_a_best_temperature_say_why(logits, target, words):
    with pytest.raises(ValueError, match=words):
        fit_temperature(logits, target)


def test_a_target_that_is_no_class_is_an_index_error():
    with pytest.raises(IndexError, match=r"target\[1\] is 2"):
        fit_temperature([[2.0, 0.0], [0.0, 1.0]], [0, 2])
    with pytest.raises(TypeError, match="class probabilities"):
        fit_temperature([[2.0, 0.0], [0.0, 1.0]], [[0.5, 0.5], [0.5, 0.5]])


def test_a_fit_takes_some_numbers_a_row_and_a_block(rng):
    logits, target = rng.normal(size=(4000, 3000)).astype(np.float32), rng.integers(3000, size=4000)
    target[::2] = logits[::2].argmax(1)
    fit_temperature(logits[:9], target[:9])
    tracemalloc.start()
    fit_temperature(logits, target)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * 8 * BLOCK + 200 * len(target) < logits.nbytes


def test_the_temperature_is_one_of_the_losses(rng):
    logits, target = drawn(rng, 500, 4, 2.5)
    t = fit_temperature(logits, target)
    best = ce.cross_entropy(logits, target, temperature=t)
    assert best < min(ce.cross_entropy(logits, target, temperature=t * f) for f in (0.99, 1.01))


def test_scipy_is_imported_to_fit_and_not_before():
    code = "import sys, ce_fast.calibration; sys.exit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0
