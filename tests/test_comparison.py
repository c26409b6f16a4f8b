"""A comparison's numbers against torch's float64 softmaxes and NumPy's percentiles; its sums against those of parts."""

import json
import math
import warnings

import numpy as np
import pytest

import ce_fast as ce
from ce_fast.comparison import KL_EDGES, PERCENTS, Comparison, percentiles
from evaluations import WEIGHTS, assert_close

ml_dtypes = pytest.importorskip("ml_dtypes")
torch = pytest.importorskip("torch")

DTYPES = [(np.float64, np.float64), (np.float32, np.float32), (ml_dtypes.bfloat16, np.float32)]


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def batch(rng, shape=(300,), n_classes=9, dtypes=DTYPES[1], weights="weighted", noise=0.3):
    base = (2 * rng.normal(size=(*shape, n_classes))).astype(dtypes[0]).astype(np.float64)
    other = (base + noise * rng.normal(size=base.shape)).astype(dtypes[1])
    target = rng.integers(n_classes, size=shape)
    target[rng.random(shape) < 0.1] = -100
    weight = None if weights == "unweighted" else np.round(4 * rng.random(shape)) / 4
    return base.astype(dtypes[0]), other, target, weight


def compared(parts, **options):
    comparison = Comparison(**options)
    for part in parts:
        comparison.update(*part)
    return comparison


# --- Every number -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("temperature", "noise"), [(1.0, 0.3), (1.7, 0.3), (1.0, 0.001)])
def test_every_number_is_that_of_float64_softmaxes(rng, dtypes, weights, temperature, noise):
    base, other, target, weight = batch(rng, dtypes=dtypes, weights=weights, noise=noise)
    comparison = Comparison(temperature=temperature)
    rows, report = comparison.update(base, other, target, weight), comparison.compute()
    kept = (target != -100) & (True if weight is None else weight > 0)
    w, t = np.ones(kept.sum()) if weight is None else weight[kept], torch.from_numpy(target[kept])
    a, b = (torch.log_softmax(torch.from_numpy(x.astype(np.float64)[kept] / temperature), 1) for x in (base, other))
    kl = torch.nn.functional.kl_div(b, a, reduction="none", log_target=True).sum(1).numpy()  # KL(base || other)
    own_a, own_b = (x.gather(1, t[:, None])[:, 0].numpy() for x in (a, b))
    change, same = np.exp(own_b) - np.exp(own_a), (a.argmax(1) == b.argmax(1)).numpy()

    def mean(v):
        m, n = (w @ v) / w.sum(), len(w)
        return pytest.approx((m, math.sqrt(n / (n - 1) * (w**2 @ (v - m) ** 2)) / w.sum()), rel=1e-6)

    assert report.kl == mean(kl) and report.same_top == mean(same) and report.target_prob_change == mean(change)
    assert report.nll_difference == mean(own_a - own_b)
    ratio = math.exp(report.nll_difference.value)
    assert report.perplexity_ratio == pytest.approx((ratio, ratio * report.nll_difference.stderr), rel=1e-12)
    assert ratio == pytest.approx(report.other.perplexity.value / report.base.perplexity.value, rel=1e-9)
    for found, log_p, own in ((report.base, a, own_a), (report.other, b, own_b)):
        assert found.nll == mean(-own) and found.accuracy == mean((log_p.argmax(1) == t).numpy())
        assert found.perplexity.value == pytest.approx(math.exp(found.nll.value), rel=1e-12)
    rms = math.sqrt(w @ change**2 / w.sum())
    assert report.target_prob_change_rms.value == pytest.approx(rms, rel=1e-6)
    assert mean(change**2) == (rms**2, 2 * rms * report.target_prob_change_rms.stderr)
    for found, values in ((report.kl_percentiles, kl), (report.target_prob_change_percentiles, change)):
        assert found == pytest.approx(percentiles(values, w), rel=1e-6, abs=1e-14)
    np.testing.assert_allclose(report.kl_histogram["weight"], np.histogram(kl, KL_EDGES, weights=w)[0])
    assert (report.n_rows, report.weight, report.n_ignored) == (len(w), w.sum(), (~kept).sum())
    for name, values in (("kl", kl), ("base_log_prob", own_a), ("other_log_prob", own_b)):
        np.testing.assert_allclose(rows[name][kept], values, rtol=1e-6, atol=1e-14)
        assert np.isnan(rows[name][~kept]).all()
    np.testing.assert_array_equal(rows["same_top"][kept], same)


def test_the_standard_error_of_the_ratio_is_the_spread_over_bootstrap_samples(rng):
    part = batch(rng, (1000,), dtypes=DTYPES[0])
    comparison = Comparison()
    rows, found = comparison.update(*part), []
    kept = ~np.isnan(rows["kl"])
    w, difference = part[3][kept], (rows["base_log_prob"] - rows["other_log_prob"])[kept]
    change = np.exp(rows["other_log_prob"][kept]) - np.exp(rows["base_log_prob"][kept])
    for _ in range(1000):
        i = rng.integers(len(w), size=len(w))
        mass = w[i].sum()
        found.append([math.exp(w[i] @ difference[i] / mass), math.sqrt(w[i] @ change[i] ** 2 / mass)])
    report = comparison.compute()
    ours = [report.perplexity_ratio.stderr, report.target_prob_change_rms.stderr]
    assert ours == pytest.approx(np.std(found, axis=0), rel=0.1)
    assert report.nll_difference.stderr < report.base.nll.stderr / 3  # paired


def test_a_model_compared_with_itself_differs_in_nothing(rng):
    base, _, target, weight = batch(rng)
    report = compared([(base, base, target, weight)]).compute()
    assert report.kl == report.nll_difference == report.target_prob_change == report.target_prob_change_rms == (0, 0)
    assert report.same_top == report.perplexity_ratio == (1, 0)
    assert set(report.kl_percentiles.values()) == {0.0} and report.base == report.other


@pytest.mark.parametrize("n", [1, 2, 3, 10, 999, 1000])
def test_percentiles_of_equal_weights_are_those_of_numpy(rng, n):
    for values in (rng.normal(size=n), rng.integers(3, size=n).astype(float)):
        expected = np.percentile(values, PERCENTS)
        for weight in (1.0, 2.5):
            found = percentiles(values, np.full(n, weight))
            assert list(found) == list(PERCENTS)
            np.testing.assert_allclose(list(found.values()), expected, rtol=1e-12, atol=1e-14)


def test_weighted_percentiles_lie_between_rows_at_the_middle_of_their_weight():
    found = percentiles(np.array([10.0, 0.0, 20.0]), np.array([2.0, 1.0, 1.0]))  # middles 0.5, 2, 3.5: 0, 50, 100 %
    assert (found[0], found[25], found[50], found[75], found[100]) == (0, 5, 10, 15, 20)
    found = percentiles(np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 6.0]))  # 0.5, 1.5, 5: 1.5 is at 22.2 %
    assert found[50] == pytest.approx(1 + (0.5 * 4.5 - 1) / 3.5)
    found = percentiles(np.array([1.0, 2.0, np.inf, np.inf]), np.ones(4))
    assert (found[0], found[25], found[75], found[100]) == (1, 1.75, np.inf, np.inf) and found[50] == np.inf


# --- Parts and the whole ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("n_parts", [1, 7, 100])
def test_parts_merged_in_any_order_are_the_whole(rng, n_parts, weights):
    data = [batch(rng, (int(rng.integers(9)),), weights=weights) for _ in range(100)]
    whole = compared(data).compute()
    cuts = np.sort(rng.integers(101, size=n_parts - 1))
    parts = [compared([data[i] for i in piece]) for piece in np.split(np.arange(100), cuts)]
    merged = Comparison()
    for i in rng.permutation(n_parts):
        before = parts[i].to_dict()
        assert merged.merge(parts[i]) is merged and parts[i].to_dict() == before
    assert_close(merged.compute(), whole, 1e-12)
    assert merged.n_rows_seen == sum(len(target) for _, _, target, _ in data)


def test_any_number_of_threads_gives_the_same_bits(rng):
    data, states = [batch(rng, (500,), 60), batch(rng, (3,), 60)], []
    for n_threads in (1, 2, 3):
        state = compared(data, n_threads=n_threads).to_dict()
        state["options"].pop("n_threads")
        states.append(json.dumps(state))
    assert states[0] == states[1] == states[2]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_state_written_down_and_read_goes_on_to_the_bit(rng, weights):
    data = [batch(rng, (20,), weights=weights) for _ in range(4)]
    data[1][0][3:5] = np.nan
    data[0][1][7, 1:] = -np.inf
    for half in (0, 2, 4):
        before = compared(data[:half])
        after = Comparison.from_dict(json.loads(json.dumps(before.to_dict(), allow_nan=False)))
        for comparison in (before, after):
            for part in data[half:]:
                comparison.update(*part)
        assert after.to_dict() == before.to_dict() and after.n_rows_seen == 80
        assert json.dumps(after.compute().to_dict()) == json.dumps(before.compute().to_dict())


@pytest.mark.parametrize(("name", "value"), [("temperature", 2.0), ("nan_policy", "raise"), ("ignore_index", -1)])
def test_comparisons_of_other_options_do_not_merge(name, value):
    with pytest.raises(ValueError, match=f"^{name} is"):
        Comparison().merge(Comparison(**{name: value}))
    with pytest.raises(TypeError, match="expected a Comparison"):
        Comparison().merge(ce.Evaluator())
    Comparison().merge(Comparison(class_axis=1, n_threads=1))


def test_a_state_of_another_schema_or_a_damaged_one_is_refused(rng):
    state = compared([batch(rng)]).to_dict()
    for bad in ({}, None, state | {"schema": 2}, ce.Evaluator().to_dict(), Comparison().compute().to_dict()):
        with pytest.raises(ValueError, match="expected schema 1 of kind 'comparison_state'"):
            Comparison.from_dict(bad)
    for change in ({"options": {"n_bins": 1}}, {"sums": state["kept"]}, {"kept": state["sums"]}, {"rows": None}):
        with pytest.raises(ValueError, match="is damaged"):
            Comparison.from_dict(state | change)


# --- Rows that do not count, rows without a softmax, data that does not fit -------------------------------------------


def test_rows_that_do_not_count_leave_nothing_whatever_they_hold(rng):
    base, other, target, weight = batch(rng)
    clean = compared([(base, other, target, weight)]).compute()
    off = (target == -100) | (weight == 0)
    base[off], other[off] = np.nan, -np.inf
    assert_close(compared([(base, other, target, weight)]).compute(), clean, 0)


def test_rows_where_either_has_no_softmax_are_left_out_and_counted_or_raise(rng):
    base, other, target, weight = batch(rng, weights="unweighted", dtypes=DTYPES[0])
    target[target == -100] = 0
    bad = [3, 50, 200]
    expected = compared([(*(np.delete(x, bad, 0) for x in (base, other, target)), None)]).compute()
    base[3, 0], other[50, 1], other[200] = np.nan, np.inf, -np.inf
    comparison = compared([(base, other, target, weight)])
    report = comparison.merge(compared([(base[3:4], other[3:4], target[3:4])])).compute()
    assert report.kl == pytest.approx(expected.kl, rel=1e-12) and report.n_rows == expected.n_rows == 297
    assert report.kl_percentiles == expected.kl_percentiles and report.base.nll == pytest.approx(expected.base.nll)
    assert (report.n_invalid, report.invalid_rows, comparison.n_rows_seen) == (4, [3, 50, 200, 300], 301)
    strict = Comparison(nan_policy="raise")
    state = strict.to_dict()
    with pytest.raises(ValueError, match=r"3 row\(s\) .*: 3, 50, 200, counted"):
        strict.update(base, other, target)
    assert strict.to_dict() == state


def test_what_the_other_model_holds_for_impossible_is_infinite_and_no_warning():
    base, other = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), np.array([[0.0, 1.0, -np.inf], [-np.inf, 0.0, 1.0]])
    comparison = Comparison()
    comparison.update(base, other, [0, 0])
    report = comparison.compute()
    assert report.kl.value == report.kl_percentiles[50] == report.nll_difference.value == math.inf
    assert report.perplexity_ratio.value == math.inf and math.isnan(report.kl.stderr)
    assert report.target_prob_change.value < 0 and report.target_prob_change.stderr > 0
    assert report.kl_histogram["weight"][-1] == 2
    json.dumps(report.to_dict(), allow_nan=False)


def test_nothing_seen_is_nan():
    comparison = Comparison()
    for _ in range(2):
        report = comparison.compute()
        assert report.n_rows == 0 and np.isnan([*report.kl, *report.perplexity_ratio, *report.base.perplexity]).all()
        assert np.isnan(list(report.kl_percentiles.values())).all() and report.kl_histogram["weight"].sum() == 0
        assert np.isnan([*report.target_prob_change_rms]).all()
        Comparison.from_dict(comparison.to_dict()).merge(comparison).compute()
        comparison.update(np.zeros((0, 4)), np.zeros((0, 4)), [])
        comparison.update(np.ones((1, 4)), np.ones((1, 4)), [-100])


def test_the_class_axis_may_be_any(rng):
    base, other, target, weight = batch(rng, (4, 30))
    expected = compared([(base, other, target, weight)], class_axis=-1).compute()
    moved = (np.moveaxis(base, -1, 1), np.moveaxis(other, -1, 1), target, weight)
    assert_close(compared([moved], class_axis=1).compute(), expected, 1e-6)


def test_data_that_does_not_fit_is_refused_and_leaves_the_comparison_as_it_was():
    comparison, logits = Comparison(), np.zeros((2, 3))
    state = comparison.to_dict()
    for error, match, given in (
        (IndexError, r"target\[1\] is 3", (logits, logits, [0, 3])),
        (ValueError, r"other_logits has shape \(2, 4\); expected \(2, 3\)", (logits, np.zeros((2, 4)), [0, 1])),
        (TypeError, "expected class indices", (logits, logits, np.full((2, 3), 1 / 3))),
        (ValueError, "sample_weight", (logits, logits, [0, 1], [1.0])),
    ):
        with pytest.raises(error, match=match):
            comparison.update(*given)
    assert comparison.to_dict() == state
    for options in ({"temperature": 0}, {"nan_policy": "drop"}, {"n_threads": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Comparison(**options)
    with pytest.warns(UserWarning, match="look like probabilities"):
        comparison.update([[2.0, 1.0]], [[0.25, 0.75]], [0])


def test_a_report_is_plain_json(rng):
    report = compared([batch(rng)]).compute()
    written = report.to_dict()
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    assert (written["schema"], written["kind"]) == (1, "comparison")
    assert written["kl_percentiles"]["99.9"] == report.kl_percentiles[99.9]
    assert written["base"]["nll"]["stderr"] == report.base.nll.stderr
