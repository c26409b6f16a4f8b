"""Log loss of probabilities, a drop-in for scikit-learn's, and cross-entropy of decision values.

    log_loss = -sum_i w_i log clip(p[i, y_i]) / sum_i w_i

needs one probability of each row. So the pass that checks the probabilities picks the one in the column of the label:
no one-hot matrix, no logarithm of the others.
"""

import math
import warnings

import numpy as np
from sklearn.metrics import log_loss as _host_log_loss
from sklearn.utils import check_consistent_length

from ce_fast import backends, inputs, threads
from ce_fast.adapters.sklearn_inputs import (
    EPS,
    Columns,
    Strings,
    check_unit_interval,
    classes_in,
    encode,
    increasing,
    label_range,
    numbers,
    one_column,
    read_classes,
    read_labels,
    read_logits,
    read_probabilities,
    read_weights,
)
from ce_fast.backends import ProbabilityJob
from ce_fast.losses import CrossEntropyLoss
from ce_fast.plan import make_plan


def log_loss(
    y_true,
    y_proba=None,
    *,
    normalize=True,
    sample_weight=None,
    labels=None,
    y_pred="deprecated",
):
    r"""Log loss of probabilities: a drop-in for `sklearn.metrics.log_loss`.

    With sample weights :math:`w` and probabilities clipped to :math:`[\epsilon, 1 - \epsilon]`, where
    :math:`\epsilon` is the machine precision of their dtype,

    .. math:: L = -\frac{\sum_i w_i \log p_{i, y_i}}{\sum_i w_i}.

    Parameters
    ----------
    y_true : array-like of shape (n_samples,)
        Labels: integers, bools, strings or integral floats.
    y_proba : array-like of shape (n_samples, n_classes) or (n_samples,)
        Probabilities, columns in the sorted order of the labels; one column is that of the second of two labels.
    normalize : bool, default=True
        Whether to give the mean, or the sum.
    sample_weight : array-like of shape (n_samples,), optional
    labels : array-like, optional
        All labels, sorted; by default those in `y_true`.
    y_pred : array-like
        The old name of `y_proba`.

    Returns
    -------
    float

    Raises
    ------
    ValueError, TypeError
        As `sklearn.metrics.log_loss`, which is asked in every case that is not plainly right; warnings likewise.

    Examples
    --------
    >>> from ce_fast.adapters.sklearn import log_loss
    >>> round(log_loss(["spam", "ham", "ham", "spam"], [[0.1, 0.9], [0.9, 0.1], [0.8, 0.2], [0.35, 0.65]]), 6)
    0.216162
    """
    if not (isinstance(y_pred, str) and y_pred == "deprecated"):
        if y_proba is not None:
            raise ValueError("Cannot use both `y_pred` and `y_proba`. `y_pred` is deprecated, use `y_proba` instead.")
        warnings.warn(
            "`y_pred` was renamed to `y_proba` in version 1.9 and will be removed in 1.11. Use `y_proba` instead.",
            FutureWarning,
            stacklevel=2,
        )
        y_proba = y_pred
    try:
        loss, sums_to_one = _plain_log_loss(y_true, y_proba, normalize, sample_weight, labels)
    except (TypeError, ValueError):  # scikit-learn's own answer, or its own error
        return _host_log_loss(y_true, y_proba, normalize=normalize, sample_weight=sample_weight, labels=labels)
    warn_unless(sums_to_one)
    return loss


def cross_entropy_from_logits(
    y_true, y_score, *, labels=None, sample_weight=None, label_smoothing=0.0, normalize=True
) -> float:
    r"""Cross-entropy of logits, such as the decision values of a linear classifier or a neural network.

    With :math:`lse_i = \log\sum_k e^{z_{ik}}`, sample weights :math:`w` and smoothing :math:`\epsilon` over K classes,

    .. math:: L = \frac{1}{\sum_i w_i} \sum_i w_i
              \Big[(1-\epsilon)(lse_i - z_{i, y_i}) + \frac{\epsilon}{K} \sum_k (lse_i - z_{ik})\Big].

    Nothing is clipped: the loss of a row is exact however large or small it is.

    Parameters
    ----------
    y_true : array-like of shape (n_samples,)
        Labels: integers, bools, strings or integral floats.
    y_score : array-like of shape (n_samples, n_classes) or (n_samples,)
        Logits; a single column z is the logit of the second of two labels, as if the columns were [0, z].
    labels : array-like of shape (n_classes,), optional
        The label of each column, in the order of the columns; by default the sorted labels in `y_true`.
    sample_weight : array-like of shape (n_samples,), optional
        Finite and not negative.
    label_smoothing : float in [0, 1], default=0.0
    normalize : bool, default=True
        Whether to give the mean, or the sum.

    Returns
    -------
    float
        In nats.

    Raises
    ------
    ValueError, TypeError
        If a shape or value does not fit, a label is not among `labels`, or the loss is NaN.

    Examples
    --------
    >>> from ce_fast.adapters.sklearn import cross_entropy_from_logits
    >>> round(cross_entropy_from_logits(["b", "a"], [[0.0, 2.0, -1.0], [1.0, 0.0, 0.0]], labels=["a", "b", "c"]), 6)
    0.360645
    >>> round(cross_entropy_from_logits([True, False], [3.0, -1.0]), 6)
    0.180925
    """
    loss = CrossEntropyLoss(reduction="mean" if normalize else "sum", label_smoothing=label_smoothing)
    known = read_labels(y_true, "y_true")
    classes = classes_in(known) if labels is None else read_classes(labels, "labels")
    if labels is None and len(classes) < 2:
        raise ValueError(f"y_true contains only one label ({classes[0]!s}); give all labels through labels=")
    codes = numbers(encode(known, classes, "y_true", "labels"))
    logits = read_logits(y_score, classes, "y_score")
    check_consistent_length(logits, codes, sample_weight)
    return not_nan(loss(logits, codes, read_weights(sample_weight, len(codes))), "y_score")


def _plain_log_loss(y_true, y_proba, normalize, sample_weight, labels) -> tuple[float, bool]:
    """(log loss, whether rows sum to one); an error for all that scikit-learn may see otherwise."""
    if not isinstance(normalize, (bool, np.bool_)):
        raise TypeError("normalize is not a bool")
    known, proba = read_labels(y_true, "y_true"), read_probabilities(y_proba)
    if proba.ndim == 0 or len(proba) != len(known):
        raise ValueError("y_true and y_proba differ in length")
    weights = read_weights(sample_weight, len(known))
    if labels is None and not isinstance(known, Strings):
        low, high = label_range(known)
        if proba.ndim == 2 and proba.shape[1] == 1:
            proba = proba[:, 0]
        if proba.shape[1:] == (high - low + 1,) or (proba.ndim == 1 and high - low == 1):  # no gaps, if all occur
            loss, sums_to_one, complete = clipped_loss(proba, (known, low), weights, bool(normalize))
            if not complete:
                raise ValueError("y_proba has columns of labels that do not occur")
            return loss, sums_to_one
    classes = classes_in(known) if labels is None else read_classes(labels, "labels")
    if len(classes) < 2 or not increasing(classes):
        raise ValueError("labels are not two or more in order")
    proba = proba.reshape(-1) if one_column(proba, classes, "y_proba") else proba
    return clipped_loss(proba, encode(known, classes, "y_true", "labels"), weights, bool(normalize))[:2]


def clipped_loss(
    proba: np.ndarray, columns: Columns, weights: np.ndarray | None, normalize: bool = True
) -> tuple[float, bool, bool]:
    """(mean or sum of -log clip(p[i, y_i]), whether every row sums to one, whether every column is that of a label)."""
    n_rows, kind = len(proba), proba.dtype
    backend = backends.active()
    n_threads = threads.resolve(None, proba.size, backend.max_threads)
    plan = make_plan((n_rows,), 1 if proba.ndim == 1 else proba.shape[1], kind, n_threads)
    scale = n_rows if weights is None or not normalize else weights.sum()
    picked = None
    if kind != np.float64 or not (weights is None or (weights.dtype == np.float64 and normalize and scale != 0)):
        picked = np.empty(n_rows, kind)  # NumPy's own logarithms and sums, with their roundings, or their error
    weight = None if weights is None or picked is not None else np.require(weights, requirements=["C", "A"])
    eps = EPS[kind]  # it, and the tolerance, are scikit-learn's
    labels, low = columns
    job = ProbabilityJob(proba, labels, low, eps, 1e-8 + math.sqrt(eps), weight, picked)
    total, outside, sums_to_one, complete = backend.run_probabilities(job, plan)
    if outside:
        check_unit_interval(proba)
    if picked is None:
        return float(total / scale if normalize else total), sums_to_one, complete
    losses = np.negative(np.log(picked, out=picked), out=picked)
    if normalize:
        loss = np.average(losses, weights=weights)
    else:
        loss = losses.sum() if weights is None else np.dot(losses, weights)
    return float(loss), sums_to_one, complete


def warn_unless(sums_to_one: bool) -> None:
    if not sums_to_one:
        message = "The y_prob values do not sum to one. Make sure to pass probabilities."
        inputs.warn(message)


def not_nan(loss: float, name: str) -> float:
    if math.isnan(loss):
        raise ValueError(f"the loss is NaN: {name} holds a row with NaN, +inf, or nothing but -inf")
    return loss
