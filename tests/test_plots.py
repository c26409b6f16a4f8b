"""Plots: what they draw against plain NumPy, and matplotlib's against plotly's."""

import subprocess
import sys

import numpy as np
import pytest

import ce_fast as ce
from ce_fast import plots

pytest.importorskip("plotly")
pytest.importorskip("scipy")
from scipy.special import log_softmax, softmax

N_ROWS, N_POSITIONS, N_CLASSES, N_BINS = 80, 5, 12, 10
GROUPS = np.array(["news", "code", "r&d <b>"])


class Case:
    """Logits and what an evaluation says of them; `log_prob` and the like are flat, by plain NumPy."""

    def __init__(self):
        rng = np.random.default_rng(3)
        logits = rng.normal(size=(N_ROWS, N_POSITIONS, N_CLASSES)) * 2
        target = rng.integers(N_CLASSES, size=(N_ROWS, N_POSITIONS))
        weight = rng.integers(0, 3, (N_ROWS, N_POSITIONS)).astype(float)
        group = GROUPS[rng.integers(3, size=(N_ROWS, N_POSITIONS))]
        evaluator = ce.Evaluator(n_bins=N_BINS, class_axis=-1)
        evaluator.update(logits, target, weight, group)
        self.report = evaluator.compute()
        self.weight, self.group = weight.ravel(), group.ravel()
        self.position = np.tile(np.arange(N_POSITIONS), N_ROWS)
        flat, t = logits.reshape(-1, N_CLASSES), target.ravel()
        self.nll = -np.take_along_axis(log_softmax(flat, 1), t[:, None], 1)[:, 0]
        self.rank = (np.argsort(-flat, 1, kind="stable") == t[:, None]).argmax(1)
        self.confidence = softmax(flat, 1).max(1)
        other = logits + 0.3 * rng.normal(size=logits.shape)
        comparison = ce.Comparison(class_axis=-1)
        comparison.update(logits, other, target, weight)
        self.comparison = comparison.compute()
        p, q = log_softmax(flat, 1), log_softmax(other.reshape(flat.shape), 1)
        self.kl = (np.exp(p) * (p - q)).sum(1)

    def mean(self, values, where=True):
        weight = self.weight * where
        return (weight * values).sum() / weight.sum()

    def stderr(self, values, where=True):
        weight, n = self.weight * where, np.count_nonzero(self.weight * where)
        return np.sqrt(n / (n - 1) * (weight**2 * (values - self.mean(values, where)) ** 2).sum()) / weight.sum()


@pytest.fixture(scope="module")
def case():
    return Case()


OF_REPORTS = ("reliability_diagram", "nll_histogram", "loss_by_position", "loss_by_group", "top_k_curve")
OF_LOSSES = ("loss_curve", "label_smoothing_curves", "focal_curves")


def draw(case, name, **options):
    if name in OF_LOSSES:
        return getattr(plots, name)(**options)
    return getattr(plots, name)(case.comparison if name == "kl_histogram" else case.report, **options)


def trace(figure, name):
    (found,) = [one for one in figure.data if one.name == name]
    return found


# --- Of reports -------------------------------------------------------------------------------------------------------


def test_reliability_bars_are_the_frequencies_of_the_bins_and_their_shares(case):
    figure = plots.reliability_diagram(case.report)
    number = np.minimum(np.ceil(case.confidence * N_BINS).astype(int) - 1, N_BINS - 1)
    full = [b for b in range(N_BINS) if (case.weight * (number == b)).sum()]
    frequency, share, point = (trace(figure, n) for n in ("frequency", "share of the rows", "at the mean confidence"))
    hit = (case.rank == 0).astype(float)
    np.testing.assert_allclose(frequency.x, [(b + 0.5) / N_BINS for b in full])
    np.testing.assert_allclose(frequency.y, [case.mean(hit, number == b) for b in full], atol=1e-12)
    np.testing.assert_allclose(share.y, [case.mean(number == b) for b in full], atol=1e-12)
    np.testing.assert_allclose(point.x, [case.mean(case.confidence, number == b) for b in full], atol=1e-12)
    np.testing.assert_array_equal(point.y, frequency.y)
    diagonal = trace(figure, "perfectly calibrated")
    np.testing.assert_array_equal(diagonal.x, diagonal.y)


@pytest.mark.parametrize(("name", "values"), [("nll_histogram", "nll"), ("kl_histogram", "kl")])
def test_histograms_are_the_shares_of_the_weight_between_the_edges(case, name, values):
    figure, values = draw(case, name), getattr(case, values)
    (bars,) = figure.data
    lower, upper = bars.x - bars.width / 2, bars.x + bars.width / 2
    np.testing.assert_allclose(upper[:-1], lower[1:], rtol=1e-12)
    shares = [case.mean((values >= a) & (values < b)) for a, b in zip(lower, upper, strict=True)]
    np.testing.assert_allclose(bars.y, shares, atol=1e-12)
    assert bars.y.sum() == pytest.approx(1) and bars.y[-1] > 0
    assert "bar: all" not in figure.layout.xaxis.title.text


def test_a_histogram_of_divergences_holds_those_beyond_its_axis():
    comparison = ce.Comparison()
    comparison.update(
        [[1.0, 0.0], [1e4, 0.0], [0.5, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1e4], [0.0, 0.0], [0.0, 0.0]], [0] * 4
    )
    figure = plots.kl_histogram(comparison.compute())
    (bars,) = figure.data
    assert (bars.x - bars.width / 2 > 0).all() and np.isfinite(bars.x).all(), "the axis is logarithmic"
    assert (bars.y[0], bars.y[-1], bars.y.sum()) == (0.5, 0.25, 1.0)
    assert "first bar: all up to 1e-08; last bar: all from 100 on" in figure.layout.xaxis.title.text


def test_a_histogram_says_what_its_unbounded_bar_holds():
    evaluator = ce.Evaluator()
    evaluator.update([[1e4, 0.0], [1.0, 0.0]], [1, 0])
    figure = plots.nll_histogram(evaluator.compute())
    assert "last bar: all from" in figure.layout.xaxis.title.text
    assert np.isfinite(figure.data[0].x).all() and figure.data[0].y[-1] == 0.5


def test_loss_by_position_is_the_mean_of_each_position_with_its_error(case):
    figure = plots.loss_by_position(case.report)
    line, band = trace(figure, "mean loss"), trace(figure, "standard error")
    where = [case.position == i for i in range(N_POSITIONS)]
    mean = np.array([case.mean(case.nll, w) for w in where])
    error = np.array([case.stderr(case.nll, w) for w in where])
    np.testing.assert_array_equal(line.x, np.arange(N_POSITIONS))
    np.testing.assert_allclose(line.y, mean, rtol=1e-12)
    np.testing.assert_allclose(band.y, np.r_[mean - error, (mean + error)[::-1]], rtol=1e-9)


def test_loss_by_group_is_the_mean_of_each_group_with_its_error(case):
    figure = plots.loss_by_group(case.report)
    (bars,) = figure.data
    names = figure.layout.xaxis.ticktext
    assert sorted(names) == sorted(["news", "code", "r&amp;d &lt;b&gt;"]), "plotly would read the tag"
    groups = [{"r&amp;d &lt;b&gt;": "r&d <b>"}.get(name, name) for name in names]
    np.testing.assert_allclose(bars.y, [case.mean(case.nll, case.group == g) for g in groups], rtol=1e-12)
    np.testing.assert_allclose(bars.error_y.array, [case.stderr(case.nll, case.group == g) for g in groups], rtol=1e-9)


def test_of_many_groups_those_of_the_largest_weights_are_shown():
    evaluator = ce.Evaluator()
    group = np.repeat(np.arange(60), np.arange(1, 61))
    evaluator.update(np.zeros((len(group), 2)), np.zeros(len(group), int), group=group)
    figure = plots.loss_by_group(evaluator.compute())
    assert list(figure.layout.xaxis.ticktext) == [str(g) for g in range(10, 60)]
    assert "50" in figure.layout.title.text


def test_the_top_k_curve_is_the_share_of_targets_among_the_k_largest(case):
    figure = plots.top_k_curve(case.report)
    line = trace(figure, "top-k accuracy")
    np.testing.assert_array_equal(line.x, np.arange(1, case.rank[case.weight > 0].max() + 2))
    np.testing.assert_allclose(line.y, [case.mean(case.rank < k) for k in line.x], rtol=1e-12)
    error = np.array([case.stderr((case.rank < k).astype(float)) for k in line.x])
    band = trace(figure, "standard error").y
    np.testing.assert_allclose(band[len(error) :][::-1] - line.y, error, atol=1e-9)


def test_a_top_k_curve_of_many_classes_has_few_points(rng):
    evaluator = ce.Evaluator()
    evaluator.update(rng.normal(size=(40, 5000)), rng.integers(5000, size=40))
    x = plots.top_k_curve(evaluator.compute()).data[0].x
    assert len(x) <= 200 and x[0] == 1


def test_a_report_without_positions_or_groups_is_a_clear_error():
    evaluator = ce.Evaluator()
    evaluator.update([[1.0, 0.0]], [0])
    report = evaluator.compute()
    with pytest.raises(ValueError, match="no loss by position; expected one of logits of more than two dimensions"):
        plots.loss_by_position(report)
    with pytest.raises(ValueError, match=r"no groups; expected .* group="):
        plots.loss_by_group(report)


@pytest.mark.parametrize("name", ["reliability_diagram", "nll_histogram", "top_k_curve"])
@pytest.mark.parametrize("n_rows", [0, 1])
def test_reports_of_next_to_nothing_are_drawn(name, n_rows):
    evaluator = ce.Evaluator()
    evaluator.update(np.zeros((n_rows, 3)), np.zeros(n_rows, int))
    assert getattr(plots, name)(evaluator.compute()).to_json()


def test_an_infinite_loss_is_a_gap_that_is_named():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    evaluator = ce.Evaluator(class_axis=-1)
    evaluator.update([[[0.0, -np.inf], [0.0, 0.0]]], [[1, 0]], group=[["a", "b"]])
    report = evaluator.compute()
    figure = plots.loss_by_group(report)
    assert list(figure.layout.xaxis.ticktext) == ["a (infinite)", "b"]
    np.testing.assert_allclose(figure.data[0].y, [np.nan, np.log(2)])
    np.testing.assert_allclose(plots.loss_by_position(report).data[0].y, [np.nan, np.log(2)])
    for plot in (plots.loss_by_group, plots.loss_by_position, plots.nll_histogram):
        plot(report, Figure().subplots()).figure.canvas.draw()


# --- Of losses --------------------------------------------------------------------------------------------------------


def test_the_loss_curve_is_minus_the_logarithm():
    (line,) = plots.loss_curve().data
    np.testing.assert_allclose(line.y, -np.log(line.x), rtol=1e-12)
    assert line.x.min() < 0.01 and line.x.max() > 0.99


@pytest.mark.parametrize("n_classes", [2, 10, 1000])
def test_label_smoothing_curves_mix_the_losses_of_all_classes(n_classes):
    figure = plots.label_smoothing_curves((0, 0.1, 1), n_classes)
    for line, s in zip(figure.data, (0, 0.1, 1), strict=True):
        p, other = line.x, (1 - line.x) / (n_classes - 1)
        expected = -(1 - s + s / n_classes) * np.log(p) - s * (n_classes - 1) / n_classes * np.log(other)
        np.testing.assert_allclose(line.y, expected, rtol=1e-11)
        assert line.name == f"smoothing {s:g}"


def test_focal_curves_are_the_cross_entropy_times_a_power_of_the_error():
    figure = plots.focal_curves((0, 0.5, 5))
    for line, gamma in zip(figure.data, (0, 0.5, 5), strict=True):
        np.testing.assert_allclose(line.y, -((1 - line.x) ** gamma) * np.log(line.x), rtol=1e-11)
        assert line.name == f"gamma {gamma:g}"


def test_options_of_the_curves_are_checked():
    with pytest.raises(ValueError, match="n_classes is 1; expected at least 2"):
        plots.label_smoothing_curves(n_classes=1)
    with pytest.raises(ValueError, match="label_smoothing"):
        plots.label_smoothing_curves((1.5,))
    with pytest.raises(ValueError, match="gamma"):
        plots.focal_curves((-1,))


# --- The two libraries ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*OF_REPORTS, "kl_histogram", *OF_LOSSES])
def test_matplotlib_draws_what_plotly_draws(case, name):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    assert draw(case, name, ax=axes) is axes
    figure = draw(case, name)
    bars = {c.get_label(): c for c in axes.containers if hasattr(c, "patches")}
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    points = {c.get_label(): c[0] for c in axes.containers if c.get_label() == "at the mean confidence"}
    drawn = 0
    for one in figure.data:
        if one.name in bars:
            patches = bars[one.name].patches
            np.testing.assert_allclose([b.get_x() + b.get_width() / 2 for b in patches], one.x)
            np.testing.assert_allclose([b.get_width() for b in patches], one.width)
            np.testing.assert_allclose([b.get_height() for b in patches], one.y)
            error = bars[one.name].errorbar
            if error is not None:
                ends = [segment[:, 1] for segment in error[2][0].get_segments()]
                np.testing.assert_allclose(ends, np.c_[one.y - one.error_y.array, one.y + one.error_y.array])
            assert (error is None) == (one.error_y.array is None)
        elif one.name == "standard error":
            (band,) = axes.collections
            assert {round(y, 9) for y in one.y} <= {round(y, 9) for y in band.get_paths()[0].vertices[:, 1]}
        else:
            line = (lines | points)[one.name]
            np.testing.assert_array_equal(line.get_xdata(), one.x)
            np.testing.assert_array_equal(line.get_ydata(), one.y)
        drawn += one.name != "standard error"
    assert drawn == len(bars) + len(lines) + len(points)
    assert axes.get_title() == figure.layout.title.text
    assert axes.get_xlabel() == figure.layout.xaxis.title.text
    assert axes.get_ylabel() == figure.layout.yaxis.title.text
    assert axes.get_xscale() == figure.layout.xaxis.type


def test_without_plotly_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ImportError, match=r"pip install 'ce_fast\[eval\]'"):
        plots.loss_curve()


def test_plotly_and_matplotlib_are_not_imported_before_something_is_drawn():
    code = "import sys, ce_fast.plots, ce_fast.report; print({'plotly', 'matplotlib'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
