"""Reliability diagrams in the manner of scikit-learn's displays, for any number of classes. matplotlib is imported to
plot, and not before."""

import numpy as np

from ce_fast import inputs
from ce_fast.adapters.sklearn_inputs import plain
from ce_fast.adapters.sklearn_loss import warn_unless
from ce_fast.adapters.sklearn_metrics import bins_of, read
from ce_fast.calibration import NORMS, Binning, Bins

__all__ = ["ReliabilityDisplay"]

ERRORS = {"l1": "ECE", "l2": "RMSCE", "max": "MCE"}
REFERENCE = "Perfectly calibrated"


class ReliabilityDisplay:
    """How often classes come true, over the confidence in them: a reliability diagram.

    Make one by `from_estimator` or `from_predictions`. Over the mean confidence of each bin stands the frequency with
    which its samples are of the class; under the curve the share of samples with such a confidence; in the legend the
    calibration error, of the same bins.

    Parameters
    ----------
    bins : ce_fast.calibration.Bins
        The sums of each curve's bins.
    shares : ndarray of shape (n_curves, n_bars)
        Of each curve's samples, by confidence, in bars of the same width from 0 to 1.
    norm : {"l1", "l2", "max"}, default="l1"
        Of the error in the legend: ECE, RMSCE or MCE.
    classes : list, optional
        The class of each curve; None for one curve of the top labels.
    estimator_name : str, optional
        What the legend begins with.

    Attributes
    ----------
    prob_pred, prob_true : list of ndarray
        The points of each curve: mean confidences, frequencies.
    errors : list of float
        The calibration error of each curve.
    line_ : matplotlib Line2D, or list of them
        The curve of the top labels, or one for each class; of the last plot, as the others below.
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure

    See Also
    --------
    calibration_error : The number.
    sklearn.calibration.CalibrationDisplay : Of binary problems, without weights.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.linear_model import LogisticRegression
    >>> from ce_fast.adapters.sklearn import ReliabilityDisplay
    >>> X, y = load_iris(return_X_y=True)
    >>> model = LogisticRegression(C=0.01, max_iter=1000).fit(X[::2], y[::2])
    >>> display = ReliabilityDisplay.from_estimator(model, X[1::2], y[1::2], n_bins=5)
    >>> round(display.errors[0], 3)
    0.363
    """

    def __init__(self, bins: Bins, shares, *, norm="l1", classes=None, estimator_name=None):
        self.bins, self.shares, self.classes = bins, shares, classes
        self.norm, self.estimator_name = inputs.check_choice("norm", norm, NORMS), estimator_name
        curves = [bins.curve(k) for k in range(len(bins.weight))]
        self.prob_pred, self.prob_true = map(list, zip(*(curve.points() for curve in curves), strict=True))
        self.errors = [curve.error(norm) for curve in curves]

    @classmethod
    def from_estimator(cls, estimator, X, y, *, labels=None, name=None, **options):
        """Plot the reliability of a classifier's `predict_proba`.

        Parameters
        ----------
        estimator : fitted classifier
        X : array-like of shape (n_samples, n_features)
        y : array-like of shape (n_samples,)
            Its labels.
        labels : array-like, optional
            By default `estimator.classes_`.
        name : str, optional
            By default the name of the estimator's class.
        **options
            Those of `from_predictions`.

        Returns
        -------
        ReliabilityDisplay
        """
        labels = getattr(estimator, "classes_", None) if labels is None else labels
        name = type(estimator).__name__ if name is None else name
        return cls.from_predictions(y, estimator.predict_proba(X), labels=labels, name=name, **options)

    @classmethod
    def from_predictions(
        cls,
        y_true,
        y_proba,
        *,
        n_bins=15,
        strategy="uniform",
        norm="l1",
        kind="top_label",
        sample_weight=None,
        labels=None,
        name=None,
        ax=None,
        ref_line=True,
        histogram=True,
        **kwargs,
    ):
        """Plot the reliability of probabilities.

        Parameters
        ----------
        y_true, y_proba, n_bins, strategy, norm, kind, sample_weight, labels
            As in `calibration_error`; "top_label" gives one curve, "class_wise" one for each class.
        name, ax, ref_line, histogram, **kwargs
            As in `plot`.

        Returns
        -------
        ReliabilityDisplay

        Raises
        ------
        ValueError, TypeError
            As `calibration_error`.
        ImportError
            Without matplotlib.
        """
        binning = Binning(n_bins, strategy, kind)
        given = read(y_true, y_proba, sample_weight, labels)
        warn_unless(given.sums_to_one)
        bins = bins_of(given, binning)
        bars = bins if strategy == "uniform" else bins_of(given, Binning(n_bins, "uniform", kind))
        shares = bars.weight / bars.weight.sum(1, keepdims=True)
        classes = plain(given.classes) if kind == "class_wise" else None
        display = cls(bins, shares, norm=norm, classes=classes, estimator_name=name)
        return display.plot(ax=ax, ref_line=ref_line, histogram=histogram, **kwargs)

    def plot(self, *, ax=None, name=None, ref_line=True, histogram=True, **kwargs):
        """Draw the curves.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            By default that of a new figure.
        name : str, optional
            In place of `estimator_name`.
        ref_line : bool, default=True
            Whether to draw the diagonal, once.
        histogram : bool, default=True
            Whether to draw the shares of samples.
        **kwargs
            For `Axes.plot` of the curves.

        Returns
        -------
        ReliabilityDisplay
            This one.

        Raises
        ------
        ImportError
            Without matplotlib.
        """
        import matplotlib.pyplot as plt
        from matplotlib.cbook import normalize_kwargs
        from matplotlib.lines import Line2D

        if ax is None:
            _, ax = plt.subplots()
        style = {"marker": "s", "markersize": 4, "linestyle": "-"} | normalize_kwargs(kwargs, Line2D)
        name = self.estimator_name if name is None else name
        if ref_line and REFERENCE not in ax.get_legend_handles_labels()[1]:
            ax.plot([0, 1], [0, 1], "k:", label=REFERENCE)
        lines, top = [], self.classes is None
        for k, error in enumerate(self.errors):
            of = "" if top else f" {self.classes[k]}"
            label = f"{'' if name is None else name}{of} ({ERRORS[self.norm]} {error:.3f})".lstrip()
            lines += ax.plot(self.prob_pred[k], self.prob_true[k], **{"label": label} | style)
            if histogram:
                edges = np.linspace(0, 1, len(self.shares[k]) + 1)
                ax.stairs(self.shares[k], edges, fill=True, alpha=0.2, color=lines[-1].get_color())
        ax.set(
            xlabel="Mean largest probability" if top else "Mean predicted probability of the class",
            ylabel=("Fraction of right ones" if top else "Fraction of the class")
            + ("; bars: share of samples" if histogram else ""),
            xlim=(-0.02, 1.02),
            ylim=(-0.02, 1.02),
        )
        ax.legend(loc="upper left")
        self.line_ = lines[0] if top else lines
        self.ax_, self.figure_ = ax, ax.figure
        return self
