"""An evaluation of parts against that of the whole; rows that do not count, labels, and data that does not fit."""

import json
import math
import warnings

import numpy as np
import pytest

import ce_fast as ce
from ce_fast.evaluation import Evaluator
from ce_fast.moments import Moments
from evaluations import OPTIONS, WEIGHTS, assert_close, batch, batches, evaluated, flat

ml_dtypes = pytest.importorskip("ml_dtypes")

DTYPES = [np.float64, np.float32, ml_dtypes.bfloat16]


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


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


def test_sums_of_a_million_equal_weights_agree_with_those_of_parts():
    """0.1 is no sum of powers of 2: added one by one, a million of them miss by 1e-11."""
    values, weight, group = np.tile([1.0, 0.7], 500_000)[None], np.full(10**6, 0.1), np.tile([0, 0, 1], 333_334)[:-2]
    whole, merged = Moments.of(values, weight, group)[1], Moments.empty(2, 1)
    for part in np.array_split(np.arange(10**6), 100):
        merged.add(*Moments.of(values[:, part], weight[part], group[part]))
    for sums in (merged.sums, whole.sums):
        assert sums[:, 1] == pytest.approx(0.1 * sums[:, 0], rel=1e-13)
    np.testing.assert_allclose(merged.means, whole.means, rtol=1e-13)
    np.testing.assert_allclose(merged.stderrs, whole.stderrs, rtol=1e-12)


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
        {"moments": state["moments"] | {"ranks": {"shape": [2], "float64": "AAAA"}}},
        {"moments": state["moments"] | {"nll_bins": state["moments"]["ranks"]}},
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
    assert_close(report, without, 0, but=(".n_i", ".invalid", ".sequences", ".bits_per_"))
    assert math.isnan(report.bits_per_byte.value) and without.bits_per_byte.value > 0  # whose bytes nobody knows
    assert report.n_invalid == bad.sum() > 10 and report.n_ignored == 0
    assert report.invalid_rows == np.flatnonzero(bad)[:10].tolist()
    broken = np.isin(report.sequences["id"], more["sequence"][bad.any(1)])
    np.testing.assert_array_equal(np.isnan(report.sequences["log_likelihood"]), broken)
    assert not report.sequences["is_greedy"][broken].any()


def test_a_sequence_with_a_row_without_a_softmax_has_no_log_likelihood_and_is_not_greedy():
    evaluator = Evaluator()
    evaluator.update([[1.0, 0.0], [2.0, np.nan], [3.0, 0.0]], [0, 0, 0], sequence=[1, 1, 2])
    table = evaluator.compute().sequences
    assert math.isnan(table["log_likelihood"][0]) and table["log_likelihood"][1] == pytest.approx(
        -math.log1p(math.exp(-3))
    )
    assert table["is_greedy"].tolist() == [False, True] and table["n_rows"].tolist() == [2, 1]


@pytest.mark.parametrize("scale", [1e-100, 1e-30, 1e30, 1e100])
def test_the_size_of_the_weights_changes_nothing(rng, scale):
    logits, target, more = batch(rng)
    report = evaluated([(logits, target, more)]).compute()
    more["sample_weight"] = scale * more["sample_weight"]
    scaled = evaluated([(logits, target, more)]).compute()
    for name in ("nll", "perplexity", "accuracy", "entropy"):
        assert getattr(scaled.overall, name) == pytest.approx(getattr(report.overall, name), rel=1e-12)
    assert scaled.calibration_error == pytest.approx(report.calibration_error, rel=1e-12)
    assert scaled.top_k(3) == pytest.approx(report.top_k(3), rel=1e-12)


def test_weights_whose_squares_float64_does_not_hold_give_no_standard_error_and_no_warning(rng):
    for scale in (1e-200, 1e200):
        evaluator = Evaluator()
        evaluator.update(rng.normal(size=(9, 4)), rng.integers(4, size=9), np.full(9, scale))
        report = evaluator.compute()
        assert report.overall.nll.value > 0 and not report.overall.nll.stderr <= 1e300


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
    empty.update(np.zeros((0, 4, 5)), np.zeros((0, 4), int), group="g", sequence=[], n_bytes=0)
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
    for bad in ([0.5, 1.0, 2.0], [True, False, True], [None, 1, 2], [b"a", b"b", b"c"], [set(), {}, 1]):
        for given in (np.array(bad, object), bad):
            with pytest.raises(TypeError, match=f"{kind} .*expected labels that are integers or strings"):
                found(given)
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
        (TypeError, "expected class indices", (logits, np.full((2, 3), 1 / 3)), {}),
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


def test_options_of_numpys_integers_are_written_down(rng):
    logits, target, _ = batch(rng)
    evaluator = Evaluator(
        n_bins=np.int64(5), top_k=np.array([1, 3]), ignore_index=np.int8(-100), class_axis=np.int64(-1)
    )
    evaluator.update(logits, target)
    assert_close(Evaluator.from_dict(json.loads(json.dumps(evaluator.to_dict()))).compute(), evaluator.compute(), 0)


def test_ids_beyond_64_bits_are_kept_as_they_are():
    evaluator = Evaluator()
    for name in (-1, 2**63 + 5):
        evaluator.update([[1.0, 0.0]], [0], sequence=name)
    assert evaluator.compute().sequences["id"].tolist() == [-1, 2**63 + 5]
