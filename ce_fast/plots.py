"""Plots of an evaluation, and of the losses: plotly figures, or the same in a matplotlib Axes that is given.

Every plot is described once, as a `Plot` of `Trace`s; `_draw` alone knows plotly and matplotlib, and imports them to
draw, not before.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ce_fast.losses import CrossEntropyLoss, FocalLoss

__all__ = [
    "focal_curves",
    "kl_histogram",
    "label_smoothing_curves",
    "loss_by_group",
    "loss_by_position",
    "loss_curve",
    "nll_histogram",
    "reliability_diagram",
    "top_k_curve",
]

COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf")
REFERENCE = "#555555"  # of what is not data
MOST_GROUPS = 50  # more names on an axis cannot be read
N_TOP_K = 200  # points of the top-k curve, evenly on a logarithmic axis: a vocabulary has 100 000
PROBABILITY = "probability of the target"


@dataclass(frozen=True, slots=True)
class Trace:
    """One line, row of points or of bars; `stderr` is a band around a line, and error bars on points and bars (none
    where it is NaN)."""

    kind: str  # "line", "points", "bars"
    x: np.ndarray
    y: np.ndarray
    name: str
    stderr: np.ndarray | None = None
    width: np.ndarray | None = None  # of bars, in units of x
    color: str = COLORS[0]
    dash: bool = False

    def error(self) -> np.ndarray | None:
        return None if self.stderr is None else np.where(np.isfinite(self.stderr), self.stderr, 0.0)


@dataclass(frozen=True, slots=True)
class Plot:
    """What to draw, whoever draws it."""

    title: str
    x_title: str
    y_title: str
    traces: tuple[Trace, ...]
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    x_names: tuple[str, ...] = ()  # of x = 0, 1, 2, ..., in place of numbers
    log_x: bool = False


# --- Of a report ------------------------------------------------------------------------------------------------------


def reliability_diagram(report, ax=None):
    """How often the top label is right, over the confidence in it.

    Bars are the frequencies of bins of confidence, points stand at the mean confidence of each: on the diagonal a
    model is calibrated, below it too sure. The narrow bars are the shares of the weight in each bin.

    Parameters
    ----------
    report : EvalReport
        Its `calibration` is drawn.
    ax : matplotlib Axes, optional
        Draw into this.

    Returns
    -------
    plotly.graph_objects.Figure, or `ax`

    Raises
    ------
    ImportError
        Without plotly (without matplotlib if `ax` is given).

    References
    ----------
    Guo et al., "On calibration of modern neural networks", arXiv:1706.04599, figure 1.

    Examples
    --------
    >>> import ce_fast as ce
    >>> from ce_fast import plots
    >>> evaluator = ce.Evaluator(n_bins=5)
    >>> _ = evaluator.update([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], [0, 1])
    >>> figure = plots.reliability_diagram(evaluator.compute())
    >>> figure.data[0].name, figure.data[0].y.tolist()
    ('frequency', [1.0, 1.0])
    """
    bins = report.calibration
    full = bins["weight"] > 0
    middle, width = (bins["lower"] + bins["upper"]) / 2, bins["upper"] - bins["lower"]
    share = bins["weight"] / max(bins["weight"].sum(), np.finfo(float).tiny)
    frequency, ends = bins["frequency"][full], np.array([0.0, 1.0])
    traces = (
        Trace("bars", middle[full], frequency, "frequency", width=width[full] * 0.9, color="#9ecae1"),
        Trace("bars", middle[full], share[full], "share of the rows", width=width[full] * 0.3, color=REFERENCE),
        Trace("line", ends, ends, "perfectly calibrated", color=REFERENCE, dash=True),
        Trace("points", bins["confidence"][full], frequency, "at the mean confidence", color=COLORS[1]),
    )
    error = report.calibration_error.value
    title = f"Reliability: calibration error {error:.3g}"
    return _draw(Plot(title, "confidence in the top label", "frequency of right ones", traces, (0, 1), (0, 1.02)), ax)


def nll_histogram(report, ax=None):
    """Histogram of the negative log-likelihood of the rows, in nats.

    Parameters
    ----------
    report : EvalReport
        Its `nll_histogram` is drawn, as shares of the weight; the last bar holds all that lies beyond.
    ax : matplotlib Axes, optional
        Draw into this.

    Returns
    -------
    plotly.graph_objects.Figure, or `ax`

    Raises
    ------
    ImportError
        Without plotly (without matplotlib if `ax` is given).

    Examples
    --------
    >>> import ce_fast as ce
    >>> from ce_fast import plots
    >>> evaluator = ce.Evaluator()
    >>> _ = evaluator.update([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], [0, 1])
    >>> float(plots.nll_histogram(evaluator.compute()).data[0].y.sum())
    1.0
    """
    return _draw(_histogram("Loss of the rows", "negative log-likelihood (nats)", report.nll_histogram), ax)


def kl_histogram(report, ax=None):
    """Histogram of KL(base || other) of the rows, in nats.

    Parameters
    ----------
    report : ComparisonReport
        Its `kl_histogram` is drawn, as shares of the weight; the first and the last bar hold all that lies beyond.
    ax : matplotlib Axes, optional
        Draw into this.

    Returns
    -------
    plotly.graph_objects.Figure, or `ax`

    Raises
    ------
    ImportError
        Without plotly (without matplotlib if `ax` is given).

    Examples
    --------
    >>> import ce_fast as ce
    >>> from ce_fast import plots
    >>> comparison = ce.Comparison()
    >>> _ = comparison.update([[2.0, 0.0, -1.0]], [[1.5, 0.0, -1.0]], [0])
    >>> float(plots.kl_histogram(comparison.compute()).data[0].y.sum())
    1.0
    """
    return _draw(_histogram("Divergence of the rows", "KL(base || other) (nats)", report.kl_histogram, log_x=True), ax)


def _histogram(title: str, x_title: str, histogram: dict, log_x: bool = False) -> Plot:
    """Shares of the weight, from the first to the last bin that holds some. A bin without an end (0 on a logarithmic
    axis, infinity) is as wide as the one beside it."""
    edges, weight = np.array(histogram["edges"], float), np.asarray(histogram["weight"], float)
    if log_x:
        edges[0] = edges[1] ** 2 / edges[2]
    edges[-1] = edges[-2] ** 2 / edges[-3] if log_x else 2 * edges[-2] - edges[-3]
    full = np.flatnonzero(weight)
    first, last = (full[0] if log_x else 0, full[-1]) if full.size else (0, 0)
    if log_x and first == 0:
        x_title += f"; first bar: all up to {edges[1]:.3g}"
    if last == len(weight) - 1:
        x_title += f"; last bar: all from {edges[-2]:.3g} on"
    edges, share = edges[first : last + 2], weight[first : last + 1] / max(weight.sum(), np.finfo(float).tiny)
    bars = Trace("bars", (edges[1:] + edges[:-1]) / 2, share, "share of the rows", width=np.diff(edges))
    return Plot(title, x_title, "share of the rows", (bars,), log_x=log_x)


def loss_by_position(report, ax=None):
    """Mean loss over the position in a sequence, in nats, with a band of one standard error to either side.

    Parameters
    ----------
    report : EvalReport
        Its `by_position` is drawn.
    ax : matplotlib Axes, optional
        Draw into this.

    Returns
    -------
    plotly.graph_objects.Figure, or `ax`

    Raises
    ------
    ValueError
        If the logits were never beyond two dimensions: there are no positions then.
    ImportError
        Without plotly (without matplotlib if `ax` is given).

    Examples
    --------
    >>> import ce_fast as ce
    >>> from ce_fast import plots
    >>> evaluator = ce.Evaluator(class_axis=-1)
    >>> _ = evaluator.update([[[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]]], [[0, 1]])
    >>> plots.loss_by_position(evaluator.compute()).data[0].y.round(3).tolist()
    [0.17, 0.551]
    """
    by = report.by_position
    if not by:
        raise ValueError("the report has no loss by position; expected one of logits of more than two dimensions")
    seen = by["weight"] > 0
    line = Trace("line", by["position"][seen], by["nll"][seen], "mean loss", by["stderr"][seen])
    return _draw(Plot("Loss by position", "position", "mean loss (nats)", (line,)), ax)


def loss_by_group(report, ax=None):
    """Mean loss of each group, in nats, with error bars of one standard error.

    Parameters
    ----------
    report : EvalReport
        Its `groups` are drawn; of more than 50 those of the largest weights.
    ax : matplotlib Axes, optional
        Draw into this.

    Returns
    -------
    plotly.graph_objects.Figure, or `ax`

    Raises
    ------
    ValueError
        If the report has no groups.
    ImportError
        Without plotly (without matplotlib if `ax` is given).

    Examples
    --------
    >>> import ce_fast as ce
    >>> from ce_fast import plots
    >>> evaluator = ce.Evaluator()
    >>> _ = evaluator.update([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], [0, 1], group=["news", "code"])
    >>> figure = plots.loss_by_group(evaluator.compute())
    >>> dict(zip(figure.layout.xaxis.ticktext, figure.data[0].y.round(3).tolist())) == {"news": 0.17, "code": 0.551}
    True
    """
    if not report.groups:
        raise ValueError("the report has no groups; expected one of an Evaluator whose update() was given group=")
    largest = set(sorted(report.groups, key=lambda label: -report.groups[label].weight)[:MOST_GROUPS])
    shown = {label: metrics for label, metrics in report.groups.items() if label in largest}
    nll = np.array([metrics.nll for metrics in shown.values()]).reshape(-1, 2)
    names = tuple(f"{label}{' (infinite)' if np.isinf(of.nll.value) else ''}" for label, of in shown.items())
    x, few = np.arange(len(shown)), len(shown) < len(report.groups)
    bars = Trace("bars", x, nll[:, 0], "mean loss", nll[:, 1], np.full(len(x), 0.8))
    title = "Loss by group" + (f": the {MOST_GROUPS} of the largest weights" if few else "")
    return _draw(Plot(title, "group", "mean loss (nats)", (bars,), x_names=names), ax)


def top_k_curve(report, ax=None):
    """Share of the rows whose target is one of the k classes of the largest logits, over k, with its standard error.

    Parameters
    ----------
    report : EvalReport
        Its `top_k` is drawn, up to the k that holds every target.
    ax : matplotlib Axes, optional
        Draw into this.

    Returns
    -------
    plotly.graph_objects.Figure, or `ax`

    Raises
    ------
    ImportError
        Without plotly (without matplotlib if `ax` is given).

    Examples
    --------
    >>> import ce_fast as ce
    >>> from ce_fast import plots
    >>> evaluator = ce.Evaluator()
    >>> _ = evaluator.update([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], [1, 1])
    >>> plots.top_k_curve(evaluator.compute()).data[0].y.tolist()
    [0.5, 1.0]
    """
    n = int(np.max(np.flatnonzero(report.rank_weight), initial=0)) + 1
    k = np.unique(np.geomspace(1, n, N_TOP_K).round().astype(int))
    accuracy = np.array([report.top_k(int(i)) for i in k]).reshape(-1, 2)
    line = Trace("line", k, accuracy[:, 0], "top-k accuracy", accuracy[:, 1])
    return _draw(Plot("Top-k accuracy", "k", "share of the rows", (line,), y_range=(0, 1.02), log_x=True), ax)


# --- Of the losses ----------------------------------------------------------------------------------------------------


def loss_curve(ax=None):
    """The cross-entropy -log p, in nats, over the probability p of the target.

    Parameters
    ----------
    ax : matplotlib Axes, optional
        Draw into this.

    Returns
    -------
    plotly.graph_objects.Figure, or `ax`

    Raises
    ------
    ImportError
        Without plotly (without matplotlib if `ax` is given).

    Examples
    --------
    >>> from ce_fast import plots
    >>> line = plots.loss_curve().data[0]
    >>> line.x[99].round(6), line.y[99].round(6)
    (np.float64(0.5), np.float64(0.693147))
    """
    loss = CrossEntropyLoss(reduction="none")
    return _draw(_curves("Cross-entropy", {"-log p": loss}, n_classes=2), ax)


def label_smoothing_curves(smoothing: Sequence[float] = (0, 0.1, 0.2), n_classes: int = 10, ax=None):
    """The cross-entropy with label smoothing, in nats, over the probability of the target; the other classes share the
    rest equally.

    Parameters
    ----------
    smoothing : sequence of float in [0, 1], default=(0, 0.1, 0.2)
        A curve each; its least loss is where the target has probability 1 - smoothing + smoothing / n_classes.
    n_classes : int, default=10
        At least 2.
    ax : matplotlib Axes, optional
        Draw into this.

    Returns
    -------
    plotly.graph_objects.Figure, or `ax`

    Raises
    ------
    ValueError
        If there are fewer than two classes, or a smoothing is outside [0, 1].
    ImportError
        Without plotly (without matplotlib if `ax` is given).

    References
    ----------
    Szegedy et al., "Rethinking the inception architecture for computer vision", arXiv:1512.00567, section 7.

    Examples
    --------
    >>> from ce_fast import plots
    >>> line = plots.label_smoothing_curves((0.2,), n_classes=4).data[0]
    >>> line.x[line.y.argmin()].round(6)
    np.float64(0.85)
    """
    losses = {f"smoothing {s:g}": CrossEntropyLoss(reduction="none", label_smoothing=s) for s in smoothing}
    return _draw(_curves(f"Label smoothing, {n_classes} classes", losses, n_classes), ax)


def focal_curves(gamma: Sequence[float] = (0, 0.5, 1, 2, 5), ax=None):
    r"""The focal loss :math:`-(1 - p)^\gamma \log p`, in nats, over the probability p of the target.

    Parameters
    ----------
    gamma : sequence of float, default=(0, 0.5, 1, 2, 5)
        A curve each; 0 is the cross-entropy.
    ax : matplotlib Axes, optional
        Draw into this.

    Returns
    -------
    plotly.graph_objects.Figure, or `ax`

    Raises
    ------
    ValueError
        If a gamma is negative.
    ImportError
        Without plotly (without matplotlib if `ax` is given).

    References
    ----------
    Lin et al., "Focal loss for dense object detection", arXiv:1708.02002, figure 1.

    Examples
    --------
    >>> from ce_fast import plots
    >>> line = plots.focal_curves((2,)).data[0]
    >>> line.y[99].round(6)  # of p = 0.5: a quarter of log 2
    np.float64(0.173287)
    """
    losses = {f"gamma {g:g}": FocalLoss(reduction="none", gamma=g) for g in gamma}
    return _draw(_curves("Focal loss", losses, n_classes=2), ax)


def _curves(title: str, losses: dict[str, Any], n_classes: int) -> Plot:
    """Each loss over the probability of the target; the rest of the mass is shared equally."""
    if n_classes < 2:
        raise ValueError(f"n_classes is {n_classes}; expected at least 2")
    p = np.arange(1, 200) / 200
    logits = np.tile(np.log((1 - p) / (n_classes - 1)), (n_classes, 1)).T
    logits[:, 0] = np.log(p)
    target = np.zeros(len(p), np.int64)
    traces = tuple(
        Trace("line", p, loss(logits, target), name, color=COLORS[i % len(COLORS)])
        for i, (name, loss) in enumerate(losses.items())
    )
    return Plot(title, PROBABILITY, "loss (nats)", traces, x_range=(0, 1))


# --- The two that draw ------------------------------------------------------------------------------------------------


def _draw(plot: Plot, ax: Any):
    """The one place that chooses a library. An infinite loss leaves a gap."""
    traces = [replace(trace, y=np.where(np.isfinite(trace.y), trace.y, np.nan)) for trace in plot.traces]
    plot = replace(plot, traces=tuple(traces))
    return _plotly(plot) if ax is None else _matplotlib(plot, ax)


def _plotly(plot: Plot):
    try:
        import plotly.graph_objects as go
    except ImportError as missing:
        raise ImportError("plots without ax= need plotly: pip install 'ce_fast[eval]'") from missing
    figure = go.Figure()
    for trace in plot.traces:
        error = trace.error()
        band = trace.kind == "line" and error is not None
        error_bars = None if error is None or band else {"array": error, "color": REFERENCE}
        common = {"x": trace.x, "y": trace.y, "name": trace.name, "error_y": error_bars}
        if trace.kind == "bars":
            figure.add_bar(**common, width=trace.width, marker={"color": trace.color})
            continue
        mode = "markers" if trace.kind == "points" else "lines"
        style = {"color": trace.color, "dash": "dash" if trace.dash else "solid"}
        figure.add_scatter(**common, mode=mode, line=style, marker={"color": trace.color, "size": 8})
        if band:  # there and back again
            x, y = np.r_[trace.x, trace.x[::-1]], np.r_[trace.y - error, (trace.y + error)[::-1]]
            fill = {"fill": "toself", "fillcolor": trace.color, "opacity": 0.25, "line": {"width": 0}, "mode": "lines"}
            figure.add_scatter(x=x, y=y, **fill, name="standard error", hoverinfo="skip")
    x_axis: dict[str, Any] = {"title": plot.x_title, "range": plot.x_range, "type": "log" if plot.log_x else "linear"}
    x_axis["exponentformat"] = "power"  # not 10n for 1e-8
    if plot.x_names:  # plotly reads tags in them
        x_axis |= {"tickvals": list(range(len(plot.x_names))), "ticktext": list(map(html.escape, plot.x_names))}
    return figure.update_layout(
        title=plot.title,
        template="plotly_white",
        barmode="overlay",
        bargap=0,
        xaxis=x_axis,
        yaxis={"title": plot.y_title, "range": plot.y_range},
        showlegend=len(figure.data) > 1,
    )


def _matplotlib(plot: Plot, ax: Any):
    """Without pyplot: the Axes has a figure of its own."""
    for trace in plot.traces:
        error = trace.error()
        style = {"label": trace.name, "color": trace.color}
        if trace.kind == "bars":
            ax.bar(trace.x, trace.y, width=trace.width, yerr=error, alpha=0.8, ecolor=REFERENCE, **style)
        elif trace.kind == "points":
            ax.errorbar(trace.x, trace.y, yerr=error, fmt="o", **style)
        else:
            ax.plot(trace.x, trace.y, linestyle="--" if trace.dash else "-", **style)
            if error is not None:
                ax.fill_between(trace.x, trace.y - error, trace.y + error, color=trace.color, alpha=0.25, linewidth=0)
    ax.set(title=plot.title, xlabel=plot.x_title, ylabel=plot.y_title)
    if plot.x_range:
        ax.set_xlim(plot.x_range)
    if plot.y_range:
        ax.set_ylim(plot.y_range)
    if plot.log_x:
        ax.set_xscale("log")
    if plot.x_names:
        ax.set_xticks(range(len(plot.x_names)), plot.x_names)
    if len(plot.traces) > 1:
        ax.legend()
    return ax
