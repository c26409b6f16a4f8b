"""Metrics in scikit-learn's words against its own and plain NumPy; the reliability display against its bins."""

import math
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("sklearn")
pd = pytest.importorskip("pandas")

from sklearn.calibration import calibration_curve  # noqa: E402
from sklearn.datasets import load_iris  # noqa: E402
from sklearn.exceptions import UndefinedMetricWarning  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.metrics import brier_score_loss, d2_log_loss_score, make_scorer  # noqa: E402
from sklearn.model_selection import cross_val_score  # noqa: E402

import ce_fast.calibration as core  # noqa: E402
from ce_fast.adapters import sklearn_metrics  # noqa: E402
from ce_fast.adapters.sklearn_display import ReliabilityDisplay  # noqa: E402
from ce_fast.adapters.sklearn_metrics import brier_score, calibration_error, d2_log_loss  # noqa: E402
from labelled import LABELS, LETTERS, sample  # noqa: E402
from test_calibration import KINDS, NORMS, STRATEGIES, loop_curve, loop_error  # noqa: E402
from test_sklearn import BAD_LABELS, BAD_PROBABILITIES, PROBABILITIES  # noqa: E402

METRICS = {"calibration_error": calibration_error, "brier_score": brier_score, "d2_log_loss": d2_log_loss}
HOSTS = {"brier_score": (brier_score, brier_score_loss), "d2_log_loss": (d2_log_loss, d2_log_loss_score)}
RTOL = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-2}  # the host adds in the dtype of the probabilities

pytestmark = pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_calibration_error_is_that_of_loops_over_bins(strategy, norm, kind):
    options = {"strategy": strategy, "norm": norm, "kind": kind}
    for seed, (n_rows, n_classes) in enumerate([(40, 2), (200, 4), (25, 9)]):
        y, p, w = sample(seed, n_rows, n_classes)
        w = (8 * w).astype(int)  # some of them 0; no rounding puts a sum on the other side of a quantile
        for weight in (None, w):
            expected = loop_error(p.tolist(), y, weight, n_bins=6, **options)
            actual = calibration_error(LETTERS[y] if n_classes < 9 else y, p, n_bins=6, sample_weight=weight, **options)
            assert actual == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_logits_is_that_of_their_softmax(rng, kind):
    logits, y = rng.normal(size=(200, 4)), np.r_[np.arange(4), rng.integers(4, size=196)]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert calibration_error(y, p, kind=kind) == pytest.approx(core.calibration_error(logits, y, kind=kind), rel=1e-11)


def test_the_curve_of_a_class_is_scikit_learns(rng):
    y, p, _ = sample(3, 500, 2)
    bins = sklearn_metrics.bins_of(sklearn_metrics.read(y, p, None, None), core.Binning(8, "uniform", "class_wise"))
    prob_true, prob_pred = calibration_curve(y, p[:, 1], n_bins=8)
    points = bins.curve(1).points()
    np.testing.assert_allclose(points[0], prob_pred, rtol=1e-13)
    np.testing.assert_allclose(points[1], prob_true, rtol=1e-13)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("dtype", RTOL)
def test_the_value_is_scikit_learns(name, dtype):
    ours, host = HOSTS[name]
    for seed, (n_rows, n_classes) in enumerate([(30, 2), (200, 4), (60, 20), (3000, 3)]):
        y, p, w = sample(seed, n_rows, n_classes)
        p = p.astype(dtype)
        for weight in (None, w, (4 * w).astype(int) + 1, w > 0.5, w - 0.1):
            expected = host(y, p, sample_weight=weight)
            assert ours(y, p, sample_weight=weight) == pytest.approx(expected, rel=RTOL[dtype], abs=RTOL[dtype] / 100)


@pytest.mark.parametrize("scale_by_half", [True, False, "auto", np.True_])
def test_the_brier_score_is_halved_as_scikit_learn_does(scale_by_half):
    for n_classes in (2, 3):
        y, p, _ = sample(1, 50, n_classes)
        expected = brier_score_loss(y, p, scale_by_half=scale_by_half)
        assert brier_score(y, p, scale_by_half=scale_by_half) == pytest.approx(expected, rel=1e-13)
    y, p, _ = sample(1, 50, 2)
    expected = brier_score_loss(y, p[:, 1], scale_by_half=scale_by_half)
    assert brier_score(y, p[:, 1], scale_by_half=scale_by_half) == pytest.approx(expected, rel=1e-13)


def test_a_brier_score_near_0_keeps_its_digits():
    p = np.tile([1 - 1e-9, 1e-9], (4, 1))
    assert brier_score([1, 0, 0, 0], np.vstack([p[:1, ::-1], p[1:]])) == pytest.approx(1e-18, rel=1e-6)


@pytest.mark.parametrize("name", METRICS)
def test_labels_that_do_not_occur_are_given_by_labels(name):
    metric, (y, p, _) = METRICS[name], sample(5, 60, 4)
    kept = y != 2
    with pytest.raises(ValueError, match="labels"):
        metric(LETTERS[y][kept], p[kept])
    value = metric(LETTERS[y][kept], p[kept], labels=list("abcd"))
    if name == "calibration_error":
        expected = loop_error(p[kept].tolist(), y[kept])
    else:
        expected = HOSTS[name][1](y[kept], p[kept], labels=range(4))
    assert value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("labels", LABELS)
def test_labels_of_any_kind_give_the_same_number(name, labels):
    y, p, w = sample(2, 40, 2 if "bool" in labels else 5)
    expected = METRICS[name](y, p, sample_weight=w)
    assert METRICS[name](LABELS[labels](y), p, sample_weight=w) == pytest.approx(expected, rel=1e-13)


@pytest.mark.filterwarnings("ignore:The y_prob values do not sum to one")  # float16 to float64
@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("probabilities", PROBABILITIES)
def test_probabilities_of_any_kind_are_read(name, probabilities):
    y, p, _ = sample(4, 40, 3)
    given = PROBABILITIES[probabilities](p)
    if name == "calibration_error":
        expected, rel = calibration_error(y, np.ascontiguousarray(np.asarray(given, np.float64))), 1e-12
    else:
        expected, rel = HOSTS[name][1](y, given), 1e-2 if "16" in probabilities else 1e-5
    assert METRICS[name](y, given) == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("labels", ["int", "bool", "str", "negative"])
def test_one_column_is_that_of_the_second_label(name, labels):
    y, p, w = sample(6, 60, 2)
    p[:, 0] = 1 - p[:, 1]
    y_true = LABELS[labels](y)
    expected = METRICS[name](y_true, p, sample_weight=w)
    for column in (p[:, 1], p[:, 1:], p[:, 1].tolist(), pd.Series(p[:, 1])):
        assert METRICS[name](y_true, column, sample_weight=w) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_count_as_copies_and_0_as_none(kind):
    y, p, _ = sample(7, 60, 3)
    times = np.random.default_rng(0).integers(0, 4, 60)
    copies = np.repeat(np.arange(60), times)
    for name, metric in METRICS.items():
        options = {"kind": kind, "strategy": "quantile"} if name == "calibration_error" else {}
        expected = metric(y[copies], p[copies], labels=range(3), **options)
        assert metric(y, p, sample_weight=times, labels=range(3), **options) == pytest.approx(expected, rel=1e-12)


def test_blocks_of_rows_make_no_difference(monkeypatch):
    y, p, w = sample(8, 500, 3)
    expected = [brier_score(y, p, sample_weight=w), calibration_error(y, p), calibration_error(y, p, kind="class_wise")]
    for module in (core, sklearn_metrics):
        monkeypatch.setattr(module, "BLOCK", 600)
    got = [brier_score(y, p, sample_weight=w), calibration_error(y, p), calibration_error(y, p, kind="class_wise")]
    assert got == expected


# --- Scorers, errors, warnings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METRICS)
def test_a_scorer_is_the_metric_of_predict_proba(name):
    X, y = load_iris(return_X_y=True)
    for target in (y, np.array(["a", "b", "c"])[y], y == 1):
        scorer = make_scorer(METRICS[name], response_method="predict_proba", labels=np.unique(target).tolist())
        model = LogisticRegression(max_iter=1000).fit(X, target)
        expected = METRICS[name](target, model.predict_proba(X))
        assert scorer(model, X, target) == pytest.approx(expected, rel=1e-12)
        assert np.isfinite(cross_val_score(model, X, target, scoring=scorer, cv=3)).all()


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("bad", [*BAD_LABELS])
def test_labels_that_do_not_fit_raise(name, bad):
    y, p, _ = sample(1, 20, 3)
    with pytest.raises((ValueError, TypeError), match=r"\w+ \w+"):
        METRICS[name](BAD_LABELS[bad](y), p)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("bad", sorted(set(BAD_PROBABILITIES) - {"nine tenths", "nine tenths, float32", "matrix"}))
def test_probabilities_that_do_not_fit_raise(name, bad):
    y, p, _ = sample(1, 20, 3)
    with pytest.raises((ValueError, TypeError), match=r"\w+ \w+"):
        METRICS[name](y, BAD_PROBABILITIES[bad](p))


@pytest.mark.parametrize("name", METRICS)
def test_rows_that_do_not_sum_to_one_give_a_warning(name):
    y, p, _ = sample(1, 20, 3)
    with pytest.warns(UserWarning, match="do not sum to one") as caught:
        METRICS[name](y, p * 0.9)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("metric", "change", "error", "words"),
    [
        (calibration_error, {"n_bins": 0}, ValueError, "n_bins is 0"),
        (calibration_error, {"strategy": "even"}, ValueError, "strategy is 'even'"),
        (calibration_error, {"norm": "l3"}, ValueError, "norm is 'l3'"),
        (calibration_error, {"kind": "binary"}, ValueError, "kind is 'binary'"),
        (calibration_error, {"sample_weight": [1.0, -1.0, 1.0]}, ValueError, r"sample_weight\[1\] is -1.0"),
        (calibration_error, {"sample_weight": [0.0, 0.0, 0.0]}, ValueError, "at least one non-zero"),
        (calibration_error, {"sample_weight": [1.0, 1.0]}, ValueError, "inconsistent numbers of samples"),
        (calibration_error, {"labels": ["c", "b", "a"]}, ValueError, r"labels is \['c', 'b', 'a'\]; expected sorted"),
        (calibration_error, {"labels": ["a", "b", "d"]}, ValueError, "y_true has the label 'c'"),
        (calibration_error, {"labels": ["a"]}, ValueError, "labels is only one label"),
        (calibration_error, {"y_true": ["a", "a", "a"]}, ValueError, "y_true contains only one label"),
        (calibration_error, {"y_proba": [0.5, 0.5, 0.5]}, ValueError, r"y_proba has shape \(3,\); expected"),
        (brier_score, {"labels": ["a", "b", "b"]}, ValueError, "expected each label once"),
        (brier_score, {"scale_by_half": "yes"}, ValueError, "scale_by_half is 'yes'"),
        (brier_score, {"scale_by_half": 2}, ValueError, "scale_by_half is 2"),
    ],
)
def test_what_does_not_fit_is_named(metric, change, error, words):
    given = {"y_true": ["a", "b", "c"], "y_proba": np.full((3, 3), 1 / 3)} | change
    with pytest.raises(error, match=words):
        metric(given.pop("y_true"), given.pop("y_proba"), **given)


def test_one_sample_has_no_d2():
    with pytest.warns(UndefinedMetricWarning, match="less than two samples"):
        assert math.isnan(d2_log_loss(["a"], [[0.5, 0.5]], labels=["a", "b"]))
    with pytest.raises(ValueError, match="inconsistent"):
        d2_log_loss(["a"], [[0.5, 0.5], [0.5, 0.5]], labels=["a", "b"])


# --- The display ------------------------------------------------------------------------------------------------------


@pytest.fixture
def plt():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_points_of_the_top_label_are_its_bins(plt, strategy):
    y, p, w = sample(3, 300, 4)
    w = (8 * w).astype(int) + 1
    display = ReliabilityDisplay.from_predictions(
        LETTERS[y], p, n_bins=7, strategy=strategy, sample_weight=w, name="model", norm="l2"
    )
    curve = loop_curve(p.max(1).tolist(), (p.argmax(1) == y).tolist(), w.tolist(), 7, strategy)
    np.testing.assert_allclose(display.line_.get_xdata(), [mean for _, mean, _ in curve], rtol=1e-12)
    np.testing.assert_allclose(display.line_.get_ydata(), [frequency for _, _, frequency in curve], rtol=1e-12)
    np.testing.assert_allclose(display.shares, [np.histogram(p.max(1), 7, (0, 1), weights=w)[0] / w.sum()], rtol=1e-12)
    error = calibration_error(y, p, n_bins=7, strategy=strategy, sample_weight=w, norm="l2")
    assert display.errors == [pytest.approx(error, rel=1e-12)]
    labels = [text.get_text() for text in display.ax_.get_legend().get_texts()]
    assert labels == ["Perfectly calibrated", f"model (RMSCE {error:.3f})"]
    assert display.figure_ is display.ax_.figure


def test_class_wise_there_is_a_curve_for_each_class(plt):
    y, p, _ = sample(3, 300, 3)
    display = ReliabilityDisplay.from_predictions(LETTERS[y], p, kind="class_wise", n_bins=5)
    assert display.classes == ["a", "b", "c"] and len(display.line_) == 3
    for k, line in enumerate(display.line_):
        curve = loop_curve(p[:, k].tolist(), (y == k).tolist(), [1.0] * 300, 5, "uniform")
        np.testing.assert_allclose(line.get_xydata(), [point[1:] for point in curve], rtol=1e-12)
        assert line.get_label() == f"{'abc'[k]} (ECE {display.errors[k]:.3f})"
    error = calibration_error(y, p, kind="class_wise", n_bins=5)
    assert np.mean(display.errors) == pytest.approx(error, rel=1e-12)


def test_one_column_has_scikit_learns_curve(plt):
    y, p, _ = sample(9, 200, 2)
    display = ReliabilityDisplay.from_predictions(y, p[:, 1], kind="class_wise", n_bins=6)
    prob_true, prob_pred = calibration_curve(y, p[:, 1], n_bins=6)
    np.testing.assert_allclose(display.line_[1].get_xydata(), np.stack([prob_pred, prob_true], 1), rtol=1e-13)


def test_an_estimator_gives_its_probabilities_classes_and_name(plt):
    X, y = load_iris(return_X_y=True)
    y = np.array(["a", "b", "c"])[y]
    model = LogisticRegression(max_iter=1000).fit(X, y)
    _, ax = plt.subplots()
    fold = y != "b"
    with pytest.raises(ValueError, match="y_proba has shape"):
        ReliabilityDisplay.from_predictions(y[fold], model.predict_proba(X[fold]), ax=ax)
    display = ReliabilityDisplay.from_estimator(model, X[fold], y[fold], ax=ax, kind="class_wise", color="k", lw=3)
    assert display.ax_ is ax and display.classes == ["a", "b", "c"]
    assert display.line_[0].get_label().startswith("LogisticRegression a (ECE ")
    assert {(line.get_color(), line.get_linewidth()) for line in display.line_} == {("k", 3)}
    display.plot(ax=ax, name="again", ref_line=True, histogram=False)
    assert [text.get_text() for text in ax.get_legend().get_texts()].count("Perfectly calibrated") == 1
    assert display.line_[0].get_label().startswith("again a")


def test_a_display_is_drawn_to_a_file(plt, tmp_path):
    y, p, _ = sample(3, 300, 4)
    for kind in KINDS:
        figure = ReliabilityDisplay.from_predictions(y, p, kind=kind).figure_
        figure.savefig(tmp_path / f"{kind}.png")
        pixels = plt.imread(tmp_path / f"{kind}.png")
        assert pixels[..., :3].min() < 0.5  # something is there


def test_matplotlib_is_imported_to_plot_and_not_before():
    code = "import sys, ce_fast.adapters.sklearn_display; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0
