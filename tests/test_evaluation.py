"""An evaluator's numbers against plain loops over rows of torch's float64 softmax, scikit-learn and mpmath."""

import math
import warnings

import numpy as np
import pytest

import ce_fast as ce
from ce_fast.evaluation import Estimate, Evaluator
from ce_fast.moments import Moments
from evaluations import OPTIONS, WEIGHTS, assert_close, batch, evaluated

ml_dtypes = pytest.importorskip("ml_dtypes")
torch = pytest.importorskip("torch")

DTYPES = [np.float64, np.float32, ml_dtypes.bfloat16]


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --- The oracle: one row at a time, and the definitions ---------------------------------------------------------------


class Oracle:
    """The rows that count."""

    def __init__(self, logits, target, weight, temperature=1.0):
        x = logits.astype(np.float64).reshape(-1, logits.shape[-1]) / temperature
        target = target.reshape(-1)
        weight = np.ones(target.size) if weight is None else weight.reshape(-1)
        self.kept = (target != -100) & (weight > 0)
        x, self.target, self.w = x[self.kept], target[self.kept], weight[self.kept]
        log_p = torch.log_softmax(torch.from_numpy(x), 1).numpy()
        p = np.exp(log_p)
        self.nll = -log_p[np.arange(len(x)), self.target]
        order = np.argsort(-x, axis=1, kind="stable").tolist()
        self.rank = np.array([row.index(t) for row, t in zip(order, self.target, strict=True)], int)
        self.brier = ((p - np.eye(x.shape[1])[self.target]) ** 2).sum(1)
        self.entropy = -(p * log_p).sum(1)
        self.confidence = p.max(1)

    def mean(self, values, rows=slice(None)):
        v, w = np.asarray(values, float)[rows], self.w[rows]
        if not w.size:
            return Estimate(math.nan, math.nan)
        m, n = math.fsum(w * v) / math.fsum(w), len(w)
        return Estimate(m, math.sqrt(n / (n - 1) * math.fsum((w * (v - m)) ** 2)) / math.fsum(w) if n > 1 else math.nan)

    def assert_metrics(self, found, rows=slice(None)):
        near = {"rel": 1e-6, "abs": 1e-9, "nan_ok": True}
        nll = self.mean(self.nll, rows)
        perplexity = Estimate(math.exp(nll.value), math.exp(nll.value) * nll.stderr)
        expected = {
            "nll": nll,
            "bits": Estimate(*np.array(nll) / math.log(2)),
            "perplexity": perplexity,
            "accuracy": self.mean(self.rank == 0, rows),
            "mean_reciprocal_rank": self.mean(1 / (1 + self.rank), rows),
            "brier_score": self.mean(self.brier, rows),
            "entropy": self.mean(self.entropy, rows),
        }
        for name, value in expected.items():
            assert getattr(found, name) == pytest.approx(value, **near), name
        for k, value in found.top_k_accuracy.items():
            assert value == pytest.approx(self.mean(self.rank < k, rows), **near)
        assert (found.n_rows, found.weight) == (self.w[rows].size, pytest.approx(self.w[rows].sum()))


# --- Every number -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_metrics_of_all_rows_and_of_groups_are_those_of_loops_over_rows(rng, dtype, weights, temperature):
    logits, target, more = batch(rng, dtype=dtype, weights=weights)
    report = evaluated([(logits, target, more)], temperature=temperature).compute()
    oracle = Oracle(logits, target, more["sample_weight"], temperature)
    oracle.assert_metrics(report.overall)
    labels = more["group"].reshape(-1)[oracle.kept]
    assert list(report.groups) == ["a", "b", "long one"]
    for label, metrics in report.groups.items():
        oracle.assert_metrics(metrics, labels == label)
    assert report.n_ignored == target.size - oracle.kept.sum() and report.n_invalid == 0
    for k in range(1, 14):
        assert report.top_k(k) == pytest.approx(oracle.mean(oracle.rank < k), rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(report.rank_weight, np.bincount(oracle.rank, oracle.w))
    for name, n in (("bits_per_byte", 70), ("bits_per_character", 60)):
        bits = np.array(report.overall.bits) * report.overall.weight
        assert getattr(report, name) == pytest.approx(bits / n, rel=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_curves_and_tables_are_those_of_loops_over_rows(rng, dtype, weights):
    logits, target, more = batch(rng, dtype=dtype, weights=weights)
    report, oracle = evaluated([(logits, target, more)]).compute(), Oracle(logits, target, more["sample_weight"])
    at = np.broadcast_to(np.arange(20), (6, 20)).reshape(-1)[oracle.kept]
    by = report.by_position
    np.testing.assert_array_equal(by["position"], np.arange(20))
    for i in range(20):
        expected = oracle.mean(oracle.nll, at == i)
        assert (by["nll"][i], by["stderr"][i]) == pytest.approx(expected, rel=1e-6, nan_ok=True)
        assert by["weight"][i] == pytest.approx(oracle.w[at == i].sum())
    edges, weight = report.nll_histogram.values()
    np.testing.assert_array_equal(edges, [*(i / 4 for i in range(129)), math.inf])
    np.testing.assert_allclose(weight, np.histogram(oracle.nll, edges, weights=oracle.w)[0])
    which = np.repeat(more["sequence"], 20)[oracle.kept]
    np.testing.assert_array_equal(report.sequences["id"], np.unique(which))
    for name, value in (("log_likelihood", -oracle.nll), ("n_rows", 1 + 0 * oracle.nll)):
        expected = [math.fsum(value[which == i]) for i in report.sequences["id"]]
        np.testing.assert_allclose(report.sequences[name], expected, rtol=1e-6)
    assert report.temperatures is not None
    np.testing.assert_array_equal(report.temperatures["temperature"], OPTIONS["temperatures"])
    for i, t in enumerate(OPTIONS["temperatures"]):
        own = Oracle(logits, target, more["sample_weight"], t)
        found = report.temperatures["nll"][i], report.temperatures["stderr"][i]
        assert found == pytest.approx(own.mean(own.nll), rel=1e-6)
    assert report.best_temperature == OPTIONS["temperatures"][np.argmin(report.temperatures["nll"])]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_calibration_is_that_of_loops_over_bins(rng, dtype, weights):
    logits, target, more = batch(rng, (500,), 4, dtype, weights)
    more.pop("sequence")
    report = evaluated([(logits, target, more)], n_bins=10).compute()
    oracle, weight = Oracle(logits, target, more["sample_weight"]), more["sample_weight"]
    number = np.ceil(10 * oracle.confidence).astype(int) - 1
    gaps, mce, signs = [], Estimate(-1, 0), np.zeros(len(oracle.w))
    difference = (oracle.rank == 0) - oracle.confidence
    for b in range(10):
        rows = number == b
        found = {name: column[b] for name, column in report.calibration.items()}
        assert (found["lower"], found["upper"]) == pytest.approx((b / 10, (b + 1) / 10))
        assert found["weight"] == pytest.approx(oracle.w[rows].sum())
        for name, values in (("confidence", oracle.confidence), ("frequency", oracle.rank == 0)):
            assert found[name] == pytest.approx(oracle.mean(values, rows).value, rel=1e-6, nan_ok=True)
        if rows.any():
            gap = oracle.mean(difference, rows)
            signs[rows] = np.sign(gap.value)
            gaps.append(abs(gap.value) * oracle.w[rows].sum() / oracle.w.sum())
            mce = max(mce, Estimate(abs(gap.value), gap.stderr))
    assert report.calibration_error == pytest.approx(oracle.mean(signs * difference), rel=1e-6)
    assert report.calibration_error.value == pytest.approx(math.fsum(gaps), rel=1e-6)
    assert report.max_calibration_error == pytest.approx(mce, rel=1e-6)
    for norm, error in (("l1", report.calibration_error), ("max", report.max_calibration_error)):
        expected = ce.calibration_error(logits, target, n_bins=10, norm=norm, sample_weight=weight)
        assert error.value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_metrics_are_those_of_scikit_learn(rng, weights):
    metrics = pytest.importorskip("sklearn.metrics")
    logits, target = rng.normal(size=(300, 5)), rng.integers(5, size=300)
    weight = None if weights == "unweighted" else rng.random(300)
    evaluator = Evaluator(top_k=(1, 3))
    evaluator.update(logits, target, weight)
    found, proba = evaluator.compute().overall, ce.softmax(logits)
    options = {"sample_weight": weight}
    assert found.nll.value == pytest.approx(metrics.log_loss(target, proba, **options), rel=1e-9)
    assert found.accuracy.value == pytest.approx(metrics.accuracy_score(target, proba.argmax(1), **options), rel=1e-12)
    for k, value in found.top_k_accuracy.items():
        assert value.value == pytest.approx(metrics.top_k_accuracy_score(target, logits, k=k, **options), rel=1e-12)
    brier = metrics.brier_score_loss(target, proba, scale_by_half=False, **options)
    assert found.brier_score.value == pytest.approx(brier, rel=1e-9)


def test_nll_and_perplexity_are_those_of_mpmath():
    mpmath = pytest.importorskip("mpmath")
    logits, target = [[30.0, 0.0, -5.0], [0.25, 0.5, 0.125], [-700.0, 40.0, 1.0]], [0, 1, 2]
    evaluator = Evaluator()
    evaluator.update(logits, target)
    nll = [mpmath.log(sum(mpmath.exp(x) for x in row)) - row[t] for row, t in zip(logits, target, strict=True)]
    found = evaluator.compute().overall
    assert found.nll.value == pytest.approx(float(sum(nll) / 3), rel=1e-14)
    assert found.perplexity.value == pytest.approx(float(mpmath.exp(sum(nll) / 3)), rel=1e-13)


def test_an_nll_is_in_the_bin_of_its_size_up_to_32_and_beyond():
    nll = np.linspace(0.01, 40, 997)  # of the target 1 of logits [0, -z], z = log(exp(nll) - 1)
    evaluator = Evaluator()
    evaluator.update(np.stack([0 * nll, -np.log(np.expm1(nll))], 1), np.ones(997, int))
    histogram = evaluator.compute().nll_histogram
    np.testing.assert_array_equal(histogram["weight"], np.histogram(nll, histogram["edges"])[0])


def test_the_best_temperature_is_the_one_that_the_targets_were_drawn_at(rng):
    logits = 2 * rng.normal(size=(4000, 5))
    target = (ce.softmax(logits).cumsum(1) < rng.random((4000, 1))).sum(1)
    evaluator = Evaluator(temperatures=[4, 0.5, 3, 1, 2])
    evaluator.update(3 * logits, target)
    assert evaluator.compute().best_temperature == 3
    assert ce.fit_temperature(3 * logits, target) == pytest.approx(3, rel=0.1)


def test_a_sequence_is_greedy_if_all_of_its_rows_that_count_are_the_argmax():
    evaluator = Evaluator(class_axis=-1)
    logits = np.eye(3)[[[0, 1], [2, 2], [1, 0]]] * 5
    evaluator.update(logits, [[0, 1], [2, 1], [-100, 0]], sequence=["x", "y", "z"])
    evaluator.update(logits[:1], [[0, 2]], sequence="x")
    table = evaluator.compute().sequences
    assert table["id"].tolist() == ["x", "y", "z"] and table["n_rows"].tolist() == [4, 2, 1]
    assert table["is_greedy"].tolist() == [False, False, True]
    assert np.all(np.diff(table["log_likelihood"]) > 0)


@pytest.mark.parametrize("class_axis", [0, 1, 2, -1])
def test_the_class_axis_may_be_any(rng, class_axis):
    logits, target, more = batch(rng)
    evaluator = Evaluator(**(OPTIONS | {"class_axis": class_axis}))
    evaluator.update(np.moveaxis(logits, -1, class_axis), target, **more)
    assert_close(evaluator.compute(), evaluated([(logits, target, more)]).compute(), 1e-6)


def test_one_row_has_no_standard_error_and_no_position():
    evaluator = Evaluator()
    values = evaluator.update([1.0, 2.0, 0.0], 2)
    report = evaluator.compute()
    assert report.overall.nll.value == -values.log_prob[0] and math.isnan(report.overall.nll.stderr)
    assert math.isnan(report.calibration_error.stderr) and math.isnan(report.top_k(1).stderr)
    assert report.top_k(2).value == 0 and report.top_k(3).value == 1 and report.by_position == {}


def test_update_returns_what_is_known_of_the_rows_and_changes_no_array(rng):
    logits, target, more = batch(rng)
    arrays = [logits, target, more["sample_weight"], more["group"], more["sequence"]]
    before = [array.copy() for array in arrays]
    values = Evaluator(class_axis=-1).update(logits, target, **more)
    oracle = Oracle(logits, target, more["sample_weight"])
    np.testing.assert_allclose(-values.log_prob[oracle.kept], oracle.nll, rtol=1e-6)
    assert np.isnan(values.log_prob[~oracle.kept]).all() and (values.rank[~oracle.kept] == -1).all()
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)


# --- Standard errors --------------------------------------------------------------------------------------------------


def test_without_weights_the_standard_error_is_that_of_a_mean(rng):
    logits, target = rng.normal(size=(400, 6)), rng.integers(6, size=400)
    evaluator = Evaluator()
    values = evaluator.update(logits, target)
    found = evaluator.compute().overall
    for estimate, rows in ((found.nll, -values.log_prob), (found.brier_score, values.brier)):
        assert estimate.stderr == pytest.approx(rows.std(ddof=1) / 20, rel=1e-12)
    p = found.accuracy.value
    assert found.accuracy.stderr == pytest.approx(math.sqrt(p * (1 - p) / 399), rel=1e-12)


def test_standard_errors_are_the_spread_over_bootstrap_samples(rng):
    logits, weight = 2 * rng.normal(size=(1500, 3)), rng.random(1500)
    target = np.where(rng.random(1500) < 0.5, logits.argmax(1), rng.integers(3, size=1500))
    evaluator = Evaluator(n_bins=3)
    values = evaluator.update(logits, target, weight)
    report = evaluator.compute()
    confidence, right = np.exp(values.max - values.lse), values.rank == 0
    number, found = np.ceil(3 * confidence).astype(int) - 1, []
    for _ in range(1000):
        i = rng.integers(1500, size=1500)
        w = weight[i]
        gaps = np.bincount(number[i], w * (right - confidence)[i])
        nll = -w @ values.log_prob[i] / w.sum()
        found.append([nll, math.exp(nll), w @ right[i] / w.sum(), np.abs(gaps).sum() / w.sum()])
    ours = [report.overall.nll, report.overall.perplexity, report.overall.accuracy, report.calibration_error]
    assert [estimate.stderr for estimate in ours] == pytest.approx(np.std(found, axis=0), rel=0.1)


def test_values_that_nearly_agree_keep_the_digits_of_their_spread(rng):
    spread, weight = rng.normal(size=2000), rng.random(2000)
    exact = Moments.of([spread], weight)[1].estimates()[0].stderr
    parts = np.split(np.arange(2000), [3, 70, 71, 900])
    moments = Moments.empty(1, 1)
    for i in parts:
        moments.add(*Moments.of([1000 + 1e-6 * spread[i]], weight[i]))
    assert moments.estimates()[0].stderr == pytest.approx(1e-6 * exact, rel=1e-6)


def test_top_k_of_many_classes_is_torchs_for_any_k(rng):
    torch = pytest.importorskip("torch")
    logits, target = rng.normal(size=(400, 2000)), rng.integers(0, 2000, 400)
    evaluator = Evaluator()
    evaluator.update(logits, target)
    report = evaluator.compute()
    for k in (1, 30, 500, 1700, 2000):
        chosen = torch.from_numpy(logits).topk(k).indices
        assert report.top_k(k).value == (chosen == torch.from_numpy(target)[:, None]).any(1).double().mean().item()
