"""Metrics of probabilities in scikit-learn's words: the calibration error, the Brier score, the share of the log loss
that is explained. Each is for `make_scorer(..., response_method="predict_proba")`; none makes a one-hot matrix.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.utils import check_consistent_length

from ce_fast import inputs
from ce_fast.adapters.sklearn_inputs import (
    Classes,
    classes_in,
    encode,
    increasing,
    numbers,
    one_column,
    read_classes,
    read_labels,
    read_probabilities,
    read_weights,
    shown,
    two_columns,
)
from ce_fast.adapters.sklearn_loss import clipped_loss, warn_unless
from ce_fast.calibration import BLOCK, NORMS, Binning, Bins

__all__ = ["brier_score", "calibration_error", "d2_log_loss"]


class Given(NamedTuple):
    """What came, checked."""

    proba: np.ndarray  # (n_samples, n_classes)
    column: np.ndarray  # (n_samples,) that of the label
    classes: Classes  # sorted
    weight: np.ndarray | None
    sums_to_one: bool


def read(y_true, y_proba, sample_weight, labels) -> Given:
    """ValueError and TypeError about everything that does not fit."""
    known, proba = read_labels(y_true, "y_true"), read_probabilities(y_proba)
    check_consistent_length(proba, known, sample_weight)
    classes = classes_in(known) if labels is None else read_classes(labels, "labels")
    if not increasing(classes):  # scikit-learn sorts them, and warns that the columns may be meant otherwise
        raise ValueError(f"labels is {shown(classes)}; expected sorted labels, the columns of y_proba in their order")
    if len(classes) < 2:
        given = "y_true contains" if labels is None else "labels is"
        raise ValueError(f"{given} only one label ({classes[0]!s}); give all labels through labels=")
    if one_column(proba, classes, "y_proba"):
        proba = proba.reshape(-1)
    columns = encode(known, classes, "y_true", "labels")
    sums_to_one = clipped_loss(proba, columns, None)[1]  # the pass of `log_loss`, for its checks
    proba = two_columns(proba, 1 - proba) if proba.ndim == 1 else proba
    return Given(proba, numbers(columns), classes, read_weights(sample_weight, len(proba)), sums_to_one)


def bins_of(given: Given, binning: Binning) -> Bins:
    """What falls into each bin; ValueError for a negative weight."""
    weight = np.ones(len(given.proba)) if given.weight is None else given.weight.astype(np.float64)
    return binning.bins(given.proba, given.column, inputs.check_weights(weight, "sample_weight"))


def calibration_error(
    y_true,
    y_proba,
    *,
    n_bins=15,
    strategy="uniform",
    norm="l1",
    kind="top_label",
    sample_weight=None,
    labels=None,
) -> float:
    r"""How far probabilities are from how often they come true: ECE and its like.

    With :math:`w_b` the share of bin b in the sample weights, :math:`c_b` the mean confidence in it and :math:`a_b`
    the frequency with which its samples are of the class,

    .. math::

        l1 = \sum_b w_b |a_b - c_b|, \qquad l2 = \Big[\sum_b w_b (a_b - c_b)^2\Big]^{1/2}, \qquad
        max = \max_b |a_b - c_b|.

    Parameters
    ----------
    y_true : array-like of shape (n_samples,)
        Labels: integers, bools, strings or integral floats.
    y_proba : array-like of shape (n_samples, n_classes) or (n_samples,)
        Probabilities, columns in the sorted order of the labels; one column is that of the second of two labels.
    n_bins : int, default=15
    strategy : {"uniform", "quantile"}, default="uniform"
        Bins of the same width, with their upper edges, as in `sklearn.calibration.calibration_curve`; or of the same
        sample weight, as far as equal confidences, which are in the same bin, let them.
    norm : {"l1", "l2", "max"}, default="l1"
        l1 is the expected calibration error, max the maximum calibration error.
    kind : {"top_label", "class_wise"}, default="top_label"
        "top_label": the largest probability of each sample, right where it is that of its label. "class_wise": the
        probabilities of each class have bins of their own, and each class the same share in the error.
    sample_weight : array-like of shape (n_samples,), optional
        Not negative.
    labels : array-like, optional
        All labels, sorted; by default those in `y_true`.

    Returns
    -------
    float
        Between 0 and 1; less is better.

    Raises
    ------
    ValueError, TypeError
        If an option, a shape or a value does not fit, or a label is not among `labels`.

    Warns
    -----
    UserWarning
        If there are rows that do not sum to one.

    See Also
    --------
    ce_fast.calibration.calibration_error : The same of logits, and where it comes from.

    Examples
    --------
    >>> from ce_fast.adapters.sklearn import calibration_error
    >>> y_proba = [[0.1, 0.9], [0.9, 0.1], [0.8, 0.2], [0.35, 0.65]]
    >>> round(calibration_error(["spam", "ham", "ham", "ham"], y_proba), 6)
    0.2625
    """
    binning = Binning(n_bins, strategy, kind)
    inputs.check_choice("norm", norm, NORMS)
    given = read(y_true, y_proba, sample_weight, labels)
    warn_unless(given.sums_to_one)
    return bins_of(given, binning).error(norm)


def brier_score(y_true, y_proba, *, sample_weight=None, labels=None, scale_by_half="auto") -> float:
    r"""Mean squared difference between the probabilities and what came: `sklearn.metrics.brier_score_loss`.

    .. math:: B = \frac{1}{\sum_i w_i} \sum_i w_i \sum_k (p_{ik} - [y_i = k])^2, \text{ or half of it.}

    The value is scikit-learn's. A single column is always that of the second of two labels, strings included, where
    scikit-learn has `pos_label`; sums are of float64 whatever the dtype.

    Parameters
    ----------
    y_true, y_proba, sample_weight, labels
        As in `calibration_error`; weights of any sign.
    scale_by_half : bool or "auto", default="auto"
        Whether to give half of it, in [0, 1] in place of [0, 2]; "auto" does so for two classes.

    Returns
    -------
    float
        Less is better.

    Raises
    ------
    ValueError, TypeError
        If a shape or value does not fit, or a label is not among `labels`.

    Warns
    -----
    UserWarning
        If there are rows that do not sum to one.

    Examples
    --------
    >>> from ce_fast.adapters.sklearn import brier_score
    >>> round(brier_score(["spam", "ham", "ham", "spam"], [0.9, 0.1, 0.25, 0.5]), 6)
    0.083125
    """
    if not (scale_by_half == "auto" or isinstance(scale_by_half, bool | np.bool_)):
        raise ValueError(f"scale_by_half is {scale_by_half!r}; expected True, False or 'auto'")
    given = read(y_true, y_proba, sample_weight, labels)
    warn_unless(given.sums_to_one)
    n_samples, n_classes = given.proba.shape
    squares, step = np.empty(n_samples), max(1, BLOCK // n_classes)
    for first in range(0, n_samples, step):
        rows = slice(first, first + step)
        wrong = given.proba[rows].astype(np.float64)
        wrong[np.arange(len(wrong)), given.column[rows]] -= 1
        squares[rows] = np.einsum("ik,ik->i", wrong, wrong)
    halve = n_classes == 2 if isinstance(scale_by_half, str) else scale_by_half
    return float(np.average(squares, weights=given.weight)) * (0.5 if halve else 1.0)


def d2_log_loss(y_true, y_proba, *, sample_weight=None, labels=None) -> float:
    r"""The share of the log loss that the probabilities explain: `sklearn.metrics.d2_log_loss_score`.

    With :math:`f_k` the frequency of class k in `y_true`, by sample weight,

    .. math:: D^2 = 1 - \frac{\sum_i w_i \log p_{i, y_i}}{\sum_i w_i \log f_{y_i}}.

    Parameters
    ----------
    y_true, y_proba, sample_weight, labels
        As in `calibration_error`; weights of any sign. Probabilities are clipped as `log_loss` of
        `ce_fast.adapters.sklearn` does.

    Returns
    -------
    float
        1 is the best; 0 is that of the frequencies, whatever the sample; there is no worst. NaN of less than two
        samples.

    Raises
    ------
    ValueError, TypeError
        If a shape or value does not fit, or a label is not among `labels`.

    Warns
    -----
    UndefinedMetricWarning
        If there are less than two samples.
    UserWarning
        If there are rows that do not sum to one.

    Examples
    --------
    >>> from ce_fast.adapters.sklearn import d2_log_loss
    >>> round(d2_log_loss(["spam", "ham", "ham", "spam"], [0.9, 0.1, 0.2, 0.65]), 6)
    0.688144
    """
    check_consistent_length(y_true, y_proba, sample_weight)
    if len(y_true) < 2:
        message = "D^2 score is not well-defined with less than two samples."
        warnings.warn(message, UndefinedMetricWarning, stacklevel=2)
        return math.nan
    given = read(y_true, y_proba, sample_weight, labels)
    warn_unless(given.sums_to_one)
    loss = clipped_loss(given.proba, (given.column, 0), given.weight, normalize=False)[0]
    mass = np.bincount(given.column, given.weight, len(given.classes))
    eps = np.finfo(np.float64).eps  # clipped as the probabilities are
    return float(1 + loss / (mass @ np.log(np.clip(mass / mass.sum(), eps, 1 - eps))))
