"""An evaluator's numbers against plain loops over rows of torch's float64 softmax; its sums against those of parts."""

import json
import math
import warnings

import numpy as np
import pytest

import ce_fast as ce
from ce_fast.evaluation import Estimate, Evaluator
from ce_fast.moments import Moments

ml_dtypes = pytest.importorskip("ml_dtypes")
torch = pytest.importorskip("torch")

DTYPES = [np.float64, np.float32, ml_dtypes.bfloat16]
WEIGHTS = ["unweighted", "weighted"]
OPTIONS = {"class_axis": -1, "temperatures": (0.5, 1.0, 2.0, 4.0), "top_k": (1, 2, 5)}


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def batch(rng, shape=(6, 20), n_classes=11, dtype=np.float32, weights="weighted"):
    """Logits, targets (some ignored) and update's other arguments, for rows in sequences along the last axis."""
    logits = (2 * rng.normal(size=(*shape, n_classes))).astype(dtype)
    target = np.where(rng.random(shape) < 0.3, logits.argmax(-1), rng.integers(n_classes, size=shape))
    target[rng.random(shape) < 0.1] = -100
    more = {
        "sample_weight": None if weights == "unweighted" else np.round(4 * rng.random(shape)) / 4,
        "group": np.array(["a", "b", "long one"])[rng.integers(3, size=shape)],
        "sequence": rng.integers(4, size=shape[0]),
        "n_bytes": 70,
        "n_characters": 60,
    }
    return logits, target, more


def batches(rng, n, **options):
    """Uneven ones, some of no rows."""
    return [batch(rng, (int(rng.integers(4)), int(rng.integers(1, 9))), **options) for _ in range(n)]


def evaluated(parts, **options):
    evaluator = Evaluator(**(OPTIONS | options))
    for logits, target, more in parts:
        evaluator.update(logits, target, **more)
    return evaluator


def flat(value, name=""):
    """(name, number) of all that a report holds."""
    if isinstance(value, dict):
        return [pair for key, each in value.items() for pair in flat(each, f"{name}.{key}")]
    if isinstance(value, list):
        return [pair for i, each in enumerate(value) for pair in flat(each, f"{name}[{i}]")]
    return [(name, value)]


def assert_close(actual, expected, rel, but=()):
    actual, expected = (
        {name: value for name, value in flat(r.to_dict()) if not name.startswith(tuple(but))}
        for r in (actual, expected)
    )
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name] == (value if isinstance(value, str | None) else pytest.approx(value, rel=rel)), name


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


# --- Parts and the whole ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("n_parts", [1, 7, 100])
def test_parts_merged_in_any_order_are_the_whole(rng, n_parts, weights):
    data = batches(rng, 100, weights=weights)
    whole = evaluated(data).compute()
    for _ in range(2):
        cuts = np.sort(rng.integers(101, size=n_parts - 1))
        order, merged = rng.permutation(n_parts), Evaluator(**OPTIONS)
        parts = [evaluated([data[i] for i in piece]) for piece in np.split(np.arange(100), cuts)]
        for i in order:
            assert merged.merge(parts[i]) is merged
        assert merged.n_rows_seen == sum(target.size for _, target, _ in data)
        assert_close(merged.compute(), whole, 1e-12)


def test_merging_leaves_the_other_as_it_was_and_takes_itself(rng):
    data = batches(rng, 6)
    first, second = evaluated(data[:3]), evaluated(data[3:])
    before = second.to_dict()
    first.merge(second).update(*data[0][:2], **data[0][2])
    assert second.to_dict() == before
    twice = evaluated(data[:3] * 2)
    itself = evaluated(data[:3])
    assert_close(itself.merge(itself).compute(), twice.compute(), 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(rng, dtype):
    data = [batch(rng, (40, 30), 50, dtype), *batches(rng, 3, n_classes=50, dtype=dtype)]
    states = []
    for n_threads in (1, 2, 3):
        state = evaluated(data, n_threads=n_threads).to_dict()
        state["options"].pop("n_threads")
        states.append(json.dumps(state))
    assert states[0] == states[1] == states[2]


def test_a_state_written_down_and_read_goes_on_to_the_bit(rng):
    data = batches(rng, 8)
    data[0][0].reshape(-1, 11)[:1] = np.nan
    data[1][0].reshape(-1, 11)[:] = -np.inf
    data[1][0].reshape(-1, 11)[:, 0] = 0
    for half in (0, 2, 8):
        before = evaluated(data[:half])
        after = Evaluator.from_dict(json.loads(json.dumps(before.to_dict(), allow_nan=False)))
        assert after.to_dict() == before.to_dict() and after.options == before.options
        for evaluator in (before, after):
            for logits, target, more in data[half:]:
                evaluator.update(logits, target, **more)
        assert json.dumps(after.compute().to_dict()) == json.dumps(before.compute().to_dict())
        assert after.to_dict() == before.to_dict()
        assert after.n_rows_seen == before.n_rows_seen == sum(target.size for _, target, _ in data)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", (1, 3)),
        ("n_bins", 4),
        ("temperature", 2.0),
        ("temperatures", (1.0, 2.0)),
        ("nan_policy", "raise"),
        ("ignore_index", -1),
    ],
)
def test_evaluators_of_other_options_do_not_merge(rng, name, value):
    evaluator = Evaluator()
    state = evaluator.to_dict()
    with pytest.raises(ValueError, match=f"^{name} is"):
        evaluator.merge(Evaluator(**{name: value}))
    assert evaluator.to_dict() == state
    evaluator.merge(Evaluator(class_axis=1, n_threads=1))
    with pytest.raises(TypeError, match="expected a Evaluator"):
        evaluator.merge(ce.Comparison())


def test_a_state_of_another_schema_or_a_damaged_one_is_refused(rng):
    state = evaluated(batches(rng, 2)).to_dict()
    for bad in ({}, [], None, state | {"schema": 0}, state | {"kind": "evaluation"}, ce.Comparison().to_dict()):
        with pytest.raises(ValueError, match="expected schema 1 of kind 'evaluation_state'"):
            Evaluator.from_dict(bad)
    changes = [
        {"options": {"k": 1}},
        {"options": state["options"] | {"n_bins": 3}},
        {"options": state["options"] | {"top_k": [1]}},
        {"options": state["options"] | {"temperatures": None}},
        {"moments": {}},
        {"rows": {"seen": 3, "lost": 1}},
        {"nll_weight": {"shape": [2], "float64": "AAAA"}},
        {"nll_weight": state["rank_weight"]},
        {"groups": state["groups"] | {"labels": []}},
        {"amounts": {}},
    ]
    for change in changes:
        with pytest.raises(ValueError, match="is damaged"):
            Evaluator.from_dict(state | change)


# --- Rows that do not count, rows without a softmax -------------------------------------------------------------------


def test_rows_that_do_not_count_leave_nothing_whatever_they_hold(rng):
    logits, target, more = batch(rng)
    clean = evaluated([(logits, target, more)]).compute()
    off = (target == -100) | (more["sample_weight"] == 0)
    assert off.sum() > 10
    logits[off] = rng.choice([np.nan, np.inf, -np.inf], size=(off.sum(), 11))
    target[(target != -100) & off] = 99  # no class, but not read
    more["group"] = np.where(off, "none", more["group"])
    report = evaluated([(logits, target, more)]).compute()
    assert_close(report, clean, 0)


def test_rows_without_a_softmax_are_left_out_and_counted(rng):
    logits, target, more = batch(rng, weights="unweighted")
    target[target == -100] = 0
    bad = rng.random(target.shape) < 0.2
    without = evaluated([(logits, np.where(bad, -100, target), more)]).compute()
    logits[bad, 3] = rng.choice([np.nan, np.inf], size=bad.sum())
    logits[np.nonzero(bad)[0][0], np.nonzero(bad)[1][0]] = -np.inf
    report = evaluated([(logits, target, more)]).compute()
    assert_close(report, without, 0, but=(".n_i", ".invalid", ".sequences"))
    assert report.n_invalid == bad.sum() > 10 and report.n_ignored == 0
    assert report.invalid_rows == np.flatnonzero(bad)[:10].tolist()
    broken = np.isin(report.sequences["id"], more["sequence"][bad.any(1)])
    np.testing.assert_array_equal(np.isnan(report.sequences["log_likelihood"]), broken)
    assert not report.sequences["is_greedy"][broken].any()


def test_numbers_of_rows_go_on_over_updates_and_merges():
    def part(*bad, n=5):
        logits = np.zeros((n, 3))
        logits[list(bad)] = np.nan
        evaluator = Evaluator()
        evaluator.update(logits, np.zeros(n, int))
        return evaluator

    evaluator = part(1, 4)
    evaluator.update([[np.inf, 0, 0]], [0])
    evaluator.update(np.zeros((0, 3)), [])
    assert evaluator.merge(part(0)).merge(part(2, n=3)).compute().invalid_rows == [1, 4, 5, 6, 13]
    for _ in range(2):
        evaluator.merge(part(0, 1, 2, 3, 4))
    report = evaluator.compute()
    assert report.invalid_rows == [1, 4, 5, 6, 13, 14, 15, 16, 17, 18] and report.n_invalid == 15
    assert evaluator.n_rows_seen == 24


def test_rows_without_a_softmax_raise_if_so_asked_and_leave_the_evaluator_as_it_was():
    evaluator = Evaluator(nan_policy="raise")
    evaluator.update([[np.nan, 0.0], [1.0, 0.0]], [-100, 0], group="a")
    state = evaluator.to_dict()
    with pytest.raises(ValueError, match=r"2 row\(s\) .*: 3, 4, counted over all updates"):
        evaluator.update([[0.0, 0.0], [np.nan, 0.0], [0.0, np.inf]], [0, 1, 1], group="b", sequence=1, n_bytes=3)
    with pytest.raises(ValueError, match=r"12 row\(s\) .*: 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, \.\.\."):
        evaluator.update(np.full((12, 2), np.nan), np.zeros(12, int))
    assert evaluator.to_dict() == state


def test_a_target_of_probability_zero_has_an_infinite_loss_and_no_warning():
    logits = np.array([[-np.inf, 0.0, 1.0], [2.0, -np.inf, 0.0], [1.0, 0.0, 3.0]])
    evaluator, more = Evaluator(temperatures=[1.0, 2.0]), {"group": [1, 2, 2], "sequence": [5, 6, 6]}
    evaluator.update(logits, [0, 0, 2], **more)
    for _ in range(2):
        report = evaluator.compute()
        assert report.overall.nll.value == report.overall.perplexity.value == math.inf
        assert math.isnan(report.overall.nll.stderr)
        assert report.overall.accuracy.value == pytest.approx(2 / 3) and report.overall.accuracy.stderr > 0
        assert report.groups[1].nll.value == math.inf and math.isfinite(report.groups[2].nll.stderr)
        assert report.sequences["log_likelihood"][0] == -math.inf and math.isfinite(
            report.sequences["log_likelihood"][1]
        )
        assert report.nll_histogram["weight"][-1] * 3 == report.overall.weight
        assert np.isinf(report.temperatures["nll"]).all()
        written = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert written["overall"]["nll"] == {"value": None, "stderr": None}
        evaluator.merge(Evaluator.from_dict(evaluator.to_dict()))


def test_nothing_seen_is_nan():
    empty = Evaluator(class_axis=-1, temperatures=[1, 2])
    for evaluator in (empty, evaluated([]), evaluated(batches(np.random.default_rng(0), 0))):
        report = evaluator.compute()
        assert report.overall.n_rows == 0 and report.groups == report.by_position == report.sequences == {}
        assert np.isnan([*report.overall.nll, *report.calibration_error, *report.max_calibration_error]).all()
        assert np.isnan([*report.overall.perplexity, *report.top_k(1)]).all()
        assert report.best_temperature is None and report.bits_per_byte is None and report.invalid_rows == []
        json.dumps(report.to_dict(), allow_nan=False)
    empty.update(np.zeros((0, 4, 5)), np.zeros((0, 4), int), group="g", sequence="s", n_bytes=0)
    empty.update(np.zeros((2, 4, 5)), np.full((2, 4), -100), np.ones((2, 4)), "g", sequence=["s", "t"], n_bytes=7)
    report = empty.compute()
    assert (report.overall.n_rows, report.n_ignored, empty.n_rows_seen) == (0, 8, 8)
    assert report.groups == report.sequences == {} and np.isnan(report.by_position["nll"]).all()
    assert np.isnan(report.bits_per_byte).all() and report.best_temperature is None
    Evaluator.from_dict(empty.to_dict()).merge(empty).compute()


# --- Labels, and what does not fit ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["group", "sequence"])
def test_a_label_is_of_a_row_or_of_all_that_lies_under_it(rng, kind):
    logits, target = rng.normal(size=(3, 3, 4)), rng.integers(4, size=(3, 3))

    def found(label):
        evaluator = Evaluator(class_axis=-1)
        evaluator.update(logits, target, **{kind: label})
        report = evaluator.compute().to_dict()
        return report["groups"] or report["sequences"]

    by_row, by_column = np.repeat([5, 6, 5], 3).reshape(3, 3), np.tile([5, 6, 5], (3, 1))
    for label in ([5, 6, 5], np.array([[5], [6], [5]], np.uint8), np.array([5, 6, 5], object)):
        assert found(label) == found(by_row)
    assert found([[5, 6, 5]]) == found(by_column) != found(by_row)
    assert found("x") == found(np.full((3, 3), "x")) == found(np.full((3, 3), "x", object)) == found([["x"]])
    assert found(np.int32(7)) == found(7) != found("7")
    names = found(np.array([3, "b", np.str_("a")], object))
    labels = names["id"] if kind == "sequence" else [group["label"] for group in names]
    assert labels == [3, "a", "b"] and [type(label) for label in labels] == [int, str, str]
    for bad in ([0.5, 1.0, 2.0], [True, False, True], [None, 1, 2], [b"a", b"b", b"c"], [[], (), {}]):
        with pytest.raises(TypeError, match=f"{kind} .*expected labels that are integers or strings"):
            found(np.array(bad, object) if bad[0] is None or bad[0] == [] else bad)
    for shape in ((4,), (9,), (3, 2), (1, 3, 3), (3, 3, 1)):
        with pytest.raises(ValueError, match=rf"{kind} has shape .*expected \(3, 3\)"):
            found(np.zeros(shape, int))


def test_labels_come_back_from_json_as_what_they_were():
    evaluator = Evaluator()
    evaluator.update(
        np.eye(3), [0, 1, 2], group=np.array([1, "1", "é"], object), sequence=np.array([2, "2", 2], object)
    )
    again = Evaluator.from_dict(json.loads(json.dumps(evaluator.to_dict())))
    assert list(again.compute().groups) == [1, "1", "é"] and again.compute().sequences["id"].tolist() == [2, "2"]


def test_many_labels_have_a_line_each(rng):
    evaluator, expected = Evaluator(), {}
    for i in range(40):
        label = rng.integers(i, i + 90, size=30)
        values = evaluator.update(rng.normal(size=(30, 3)), rng.integers(3, size=30), sequence=label)
        for k, v in zip(label.tolist(), values.log_prob, strict=True):
            expected[k] = expected.get(k, 0) + v
    table = evaluator.compute().sequences
    assert table["id"].tolist() == sorted(expected)
    np.testing.assert_allclose(table["log_likelihood"], [expected[k] for k in sorted(expected)], rtol=1e-12)


def test_data_that_does_not_fit_is_refused_and_leaves_the_evaluator_as_it_was():
    evaluator = Evaluator(temperatures=[2.0])
    state, logits = evaluator.to_dict(), np.zeros((2, 3))
    cases = [
        (IndexError, r"target\[1\] is 3; expected 0 <= target < 3", (logits, [0, 3]), {}),
        (TypeError, "takes class indices", (logits, np.full((2, 3), 1 / 3)), {}),
        (ValueError, "target of class indices has shape", (logits, [0]), {}),
        (ValueError, "sample_weight", (logits, [0, 1], [1, -1]), {}),
        (ValueError, "class_axis", (np.zeros((2, 2, 3)), [[0, 1], [0, 1]]), {}),
        (ValueError, "n_bytes is -1", (logits, [0, 1]), {"n_bytes": -1}),
        (TypeError, "n_characters is 0.5", (logits, [0, 1]), {"n_characters": 0.5}),
    ]
    for error, match, given, more in cases:
        with pytest.raises(error, match=match):
            evaluator.update(*given, group="a", sequence="b", **more)
    assert evaluator.to_dict() == state
    with pytest.warns(UserWarning, match="look like probabilities"):
        evaluator.update([[0.5, 0.5]], [0])
    with pytest.raises(ValueError, match="k is 0"):
        evaluator.compute().top_k(0)


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (ValueError, {"top_k": (0, 1)}),
        (TypeError, {"top_k": (1.5,)}),
        (TypeError, {"top_k": "12"}),
        (ValueError, {"n_bins": 0}),
        (ValueError, {"temperature": 0}),
        (TypeError, {"temperatures": 1.0}),
        (ValueError, {"temperatures": []}),
        (ValueError, {"temperatures": [1, -1]}),
        (ValueError, {"nan_policy": "ignore"}),
        (TypeError, {"ignore_index": 0.5}),
        (TypeError, {"class_axis": "last"}),
        (ValueError, {"n_threads": 0}),
    ],
)
def test_options_are_checked_when_the_evaluator_is_made(error, options):
    with pytest.raises(error, match=next(iter(options)).removesuffix("s")):
        Evaluator(**options)


def test_a_report_is_plain_json(rng):
    report = evaluated(batches(rng, 5)).compute()
    written = report.to_dict()
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    assert (written["schema"], written["kind"], written["version"]) == (1, "evaluation", ce.__version__)
    assert written["overall"]["top_k_accuracy"]["5"]["value"] == report.overall.top_k_accuracy[5].value
    assert written["groups"][0]["label"] == "a" and written["nll_histogram"]["edges"][-1] is None
    assert {type(value) for _, value in flat(written)} <= {int, float, str, bool, type(None)}
