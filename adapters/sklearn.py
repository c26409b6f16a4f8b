"""Cross-entropy in scikit-learn's words: a drop-in `log_loss`, the same from decision values, and scorers.

    log_loss = -sum_i w_i log clip(p[i, y_i]) / sum_i w_i

needs one probability of each row. So labels become column numbers, and the pass that checks the probabilities picks
the one that counts: no one-hot matrix, no logarithm of the others.
"""

import itertools
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.metrics import log_loss as _host_log_loss
from sklearn.utils import check_array, check_consistent_length, column_or_1d
from sklearn.utils.metadata_routing import MetadataRequest

from ce_fast import inputs
from ce_fast.losses import CrossEntropyLoss

__all__ = ["cross_entropy_from_logits", "log_loss", "make_cross_entropy_scorer", "neg_cross_entropy_scorer"]

RESPONSE_METHODS = ("predict_proba", "predict_log_proba", "decision_function")
FLOATS = (np.float64, np.float32, np.float16)  # what scikit-learn keeps; all else it reads as float64
BLOCK = 65536  # probabilities: 512 KiB stay in L2 for the check, the sums and the pick; whole passes take twice as long

Labels = np.ndarray | list[str]  # int64 (bools and integral floats too), or strings


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
        losses, weights, sums_to_one = _host_losses(y_true, y_proba, normalize, sample_weight, labels)
    except (TypeError, ValueError):  # scikit-learn's own answer, or its own error
        return _host_log_loss(y_true, y_proba, normalize=normalize, sample_weight=sample_weight, labels=labels)
    _warn_unless(sums_to_one)
    if normalize:
        return float(np.average(losses, weights=weights))
    return float(losses.sum() if weights is None else np.dot(losses, weights))


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
    known = _read_labels(y_true, "y_true")
    classes = _classes_in(known) if labels is None else _read_classes(labels, "labels")
    if labels is None and len(classes) < 2:
        raise ValueError(f"y_true contains only one label ({classes[0]!s}); give all labels through labels=")
    codes = _encode(known, classes, "y_true", "labels")
    logits = _read_logits(y_score, classes, "y_score")
    check_consistent_length(logits, codes, sample_weight)
    return _not_nan(loss(logits, codes, _read_weights(sample_weight, len(codes))), "y_score")


def make_cross_entropy_scorer(*, response_method="predict_proba", label_smoothing=0.0, class_weight=None):
    """A scorer ``scorer(estimator, X, y, sample_weight=None)``: minus the cross-entropy, so greater is better.

    Columns are aligned to `estimator.classes_`, so a fold whose `y` lacks a class scores right, where
    "neg_log_loss" gives NaN. Picklable; for ``scoring=`` of `GridSearchCV`, `cross_validate` and their like, alone or
    in a dict.

    Parameters
    ----------
    response_method : {"predict_proba", "predict_log_proba", "decision_function"}, default="predict_proba"
        Probabilities are clipped as `log_loss` does, and the score is that of "neg_log_loss". Log-probabilities and
        decision values are taken as logits, not clipped; that suits only estimators whose decision values are
        logits, such as `LogisticRegression`. One-dimensional decision values z are the logits [0, z].
    label_smoothing : float in [0, 1], default=0.0
        Mixes the labels with the uniform distribution. Probabilities are then clipped and turned into the logits
        log p, whose softmax is p divided by its sum.
    class_weight : dict {label: weight}, optional
        A label without an entry has weight 1. The score is divided by the sum of the weights of the rows' labels.

    Returns
    -------
    scorer : callable
        With ``set_score_request(sample_weight=True)``, for metadata routing. It changes the scorer: make one of your
        own rather than change `neg_cross_entropy_scorer`.

    Raises
    ------
    ValueError, TypeError
        If an option does not fit; when scoring, if `y` holds a label that is not in `estimator.classes_`, an entry
        of `class_weight` is no class while some class has no entry, or the estimator's answer does not fit.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.model_selection import cross_val_score
    >>> from ce_fast.adapters.sklearn import make_cross_entropy_scorer
    >>> X, y = load_iris(return_X_y=True)
    >>> scorer = make_cross_entropy_scorer(label_smoothing=0.1)
    >>> cross_val_score(LogisticRegression(max_iter=1000), X, y, scoring=scorer).round(2)
    array([-0.6 , -0.55, -0.61, -0.59, -0.52])
    """
    return _CrossEntropyScorer(response_method, label_smoothing, class_weight)


class _CrossEntropyScorer:
    def __init__(self, response_method, label_smoothing, class_weight):
        self.response_method = inputs.check_choice("response_method", response_method, RESPONSE_METHODS)
        self.label_smoothing = inputs.check_option("label_smoothing", label_smoothing, 0.0, 1.0)
        self.class_weight = _read_class_weight(class_weight)
        self._request = MetadataRequest(owner=repr(self))
        self._request.score.add_request(param="sample_weight", alias=None)

    def __repr__(self):
        return (
            f"make_cross_entropy_scorer(response_method={self.response_method!r}, "
            f"label_smoothing={self.label_smoothing!r}, class_weight={self.class_weight!r})"
        )

    def __call__(self, estimator, X, y, sample_weight=None) -> float:
        if getattr(estimator, "classes_", None) is None:
            raise ValueError(f"{type(estimator).__name__} has no classes_; expected a fitted classifier")
        classes = _read_classes(estimator.classes_, "classes_")
        codes = _encode(_read_labels(y, "y"), classes, "y", "the estimator's classes")
        response = getattr(estimator, self.response_method)(X)
        check_consistent_length(response, codes, sample_weight)
        return -self._loss(response, codes, classes, _read_weights(sample_weight, len(codes)))

    def _loss(self, response, codes, classes, sample_weight) -> float:
        class_weight = _weight_of_each(classes, self.class_weight)
        weights = sample_weight
        if class_weight is not None:
            weights = class_weight[codes] if weights is None else weights * class_weight[codes]
            _check_not_all_zero(weights)
        if self.response_method == "predict_proba" and self.label_smoothing == 0:
            losses, sums_to_one = _clipped_losses(_read_probabilities(response), codes, classes)
            _warn_unless(sums_to_one)
            return float(np.average(losses, weights=weights))
        read = _log_of_probabilities if self.response_method == "predict_proba" else _read_logits
        logits = read(response, classes, self.response_method)
        loss = CrossEntropyLoss(class_weight, label_smoothing=self.label_smoothing)
        return _not_nan(loss(logits, codes, sample_weight), self.response_method)

    def _accept_sample_weight(self):
        return True  # scikit-learn asks the scorers of a dict without looking whether they can answer

    def get_metadata_routing(self):
        """What this scorer asks of scikit-learn's metadata routing."""
        return self._request

    def set_score_request(self, *, sample_weight):
        """Ask for `sample_weight` when metadata routing is on: True, False, None, or the name to pass it by."""
        self._request.score.add_request(param="sample_weight", alias=sample_weight)
        return self


def _host_losses(y_true, y_proba, normalize, sample_weight, labels):
    """(loss of each row, weights, whether rows sum to one); an error for all that scikit-learn may see otherwise."""
    if not isinstance(normalize, (bool, np.bool_)):
        raise TypeError("normalize is not a bool")
    known = _read_labels(y_true, "y_true")
    classes = _classes_in(known) if labels is None else _read_classes(labels, "labels")
    if len(classes) < 2 or not _increasing(classes):
        raise ValueError("labels are not two or more in order")
    codes = _encode(known, classes, "y_true", "labels")
    proba = _read_probabilities(y_proba)
    if len(proba) != len(codes):
        raise ValueError("y_true and y_proba differ in length")
    weights = _read_weights(sample_weight, len(codes))
    losses, sums_to_one = _clipped_losses(proba, codes, classes)
    return losses, weights, sums_to_one


def _read_labels(values, name: str) -> Labels:
    listed = isinstance(values, list | tuple)
    if listed and len(values) and isinstance(values[0], str):
        return _check_strings(list(values), name)  # not by way of NumPy, which makes strings of ["a", 1]
    array = np.asarray(values) if listed or type(values) is np.ndarray else column_or_1d(values)
    if array.ndim != 1 and not listed:
        array = column_or_1d(array)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}; expected (n_samples,), and not empty")
    if array.dtype.kind == "U" and not listed:
        return array.tolist()
    if array.dtype.kind in "UO":
        return _check_strings(list(values) if listed else array.tolist(), name)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} has dtype {array.dtype}; expected integers, bools, strings or integral floats")
    with np.errstate(invalid="ignore"):
        whole = array.astype(np.int64, copy=False)
    if whole is not array and not np.array_equal(whole, array):
        raise ValueError(f"{name} holds numbers that are not integers of 64 bits; expected labels of classes")
    return whole


def _check_strings(labels: list, name: str) -> list[str]:
    for label in set(labels):
        if not isinstance(label, str):
            raise ValueError(f"{name} holds {label!r} beside strings or as an object; expected labels of one kind")
    return labels


def _classes_in(labels: Labels) -> Labels:
    """The labels that occur, sorted."""
    if isinstance(labels, list):
        return sorted(set(labels))
    low, high = int(labels.min()), int(labels.max())
    if high - low > len(labels):
        return np.unique(labels)
    return low + np.flatnonzero(np.bincount(_minus(labels, low)))  # counts in 1 ms what sorting does in 15 (1e6 labels)


def _read_classes(values, name: str) -> Labels:
    classes = _read_labels(values, name)
    if len(set(_plain(classes))) != len(classes):
        raise ValueError(f"{name} is {_shown(classes)}; expected each label once")
    return classes


def _encode(labels: Labels, classes: Labels, name: str, known: str) -> np.ndarray:
    """The position of each label in `classes`."""
    if isinstance(labels, list) or isinstance(classes, list):
        position = {label: k for k, label in enumerate(_plain(classes))}
        try:
            return np.fromiter(map(position.__getitem__, _plain(labels)), np.int64, len(labels))
        except KeyError as unseen:
            raise _unseen(unseen.args[0], classes, name, known) from None
    low, high = int(classes[0]), int(classes[-1])
    if high - low == len(classes) - 1 and _increasing(classes):
        for end in (int(labels.min()), int(labels.max())):
            if not low <= end <= high:
                raise _unseen(end, classes, name, known)
        return _minus(labels, low)
    order = np.argsort(classes)
    codes = order[np.searchsorted(classes, labels, sorter=order).clip(max=len(classes) - 1)]
    strange = classes[codes] != labels
    if strange.any():
        raise _unseen(labels[strange][0].item(), classes, name, known)
    return codes


def _unseen(label, classes: Labels, name: str, known: str) -> ValueError:
    return ValueError(f"{name} has the label {label!r}; expected one of {known} {_shown(classes)}")


def _minus(labels: np.ndarray, low: int) -> np.ndarray:
    return labels - low if low else labels


def _plain(labels: Labels) -> list:
    return labels if isinstance(labels, list) else labels.tolist()


def _increasing(classes: Labels) -> bool:
    if isinstance(classes, list):
        return all(a < b for a, b in itertools.pairwise(classes))
    return bool((classes[1:] > classes[:-1]).all())


def _shown(classes: Labels) -> str:
    first = ", ".join(map(repr, _plain(classes[:20])))
    return f"[{first}]" if len(classes) <= 20 else f"[{first}, ...]"


def _read_weights(sample_weight, n_samples: int) -> np.ndarray | None:
    if sample_weight is None:
        return None
    weights = check_array(sample_weight, ensure_2d=False, dtype=None, input_name="sample_weight")
    if weights.dtype.kind not in "biuf" or weights.shape != (n_samples,):
        raise ValueError(
            f"sample_weight has dtype {weights.dtype} and shape {weights.shape}; expected numbers, shape {(n_samples,)}"
        )
    _check_not_all_zero(weights)
    return weights


def _check_not_all_zero(weights: np.ndarray) -> None:
    if not weights.any():
        raise ValueError("Sample weights must contain at least one non-zero number.")


def _read_class_weight(class_weight) -> dict[Any, float] | None:
    if class_weight is None:
        return None
    if not isinstance(class_weight, Mapping):
        raise ValueError(f"class_weight is {class_weight!r}; expected None or a dict {{label: weight}}")
    return {
        label: inputs.check_option(f"class_weight[{label!r}]", weight, 0.0) for label, weight in class_weight.items()
    }


def _weight_of_each(classes: Labels, class_weight: dict[Any, float] | None) -> np.ndarray | None:
    if class_weight is None:
        return None
    plain = _plain(classes)
    strange = [label for label in class_weight if label not in plain]
    if strange and not all(label in class_weight for label in plain):  # a slip rather than a class this fold lacks
        raise ValueError(f"class_weight has the label {strange[0]!r}; the estimator's classes are {_shown(classes)}")
    return np.array([class_weight.get(label, 1.0) for label in plain])


def _read_probabilities(y_proba) -> np.ndarray:
    if type(y_proba) is np.ndarray and y_proba.dtype in FLOATS:
        return y_proba  # NaN and infinity are found below, in the same pass as the rest
    return np.asarray(check_array(y_proba, ensure_2d=False, dtype=FLOATS))


def _one_column(scores: np.ndarray, classes: Labels, name: str) -> bool:
    """Whether `scores` has one column for two classes; an error if it has neither that nor one for each."""
    if len(classes) == 2 and (scores.ndim == 1 or scores.shape[1:] == (1,)):
        return True
    if scores.shape[1:] != (len(classes),):
        raise ValueError(
            f"{name} has shape {scores.shape}; expected (n_samples, {len(classes)}), "
            f"a column for each of the labels {_shown(classes)}"
        )
    return False


def _two_columns(scores: np.ndarray, first: np.ndarray) -> np.ndarray:
    return np.stack([first.reshape(-1), scores.reshape(-1)], axis=1)


def _read_logits(y_score, classes: Labels, name: str) -> np.ndarray:
    scores = np.asarray(y_score)
    return _two_columns(scores, np.zeros_like(scores)) if _one_column(scores, classes, name) else scores


def _log_of_probabilities(y_proba, classes: Labels, name: str) -> np.ndarray:
    proba = _read_probabilities(y_proba)
    _check_unit_interval(proba)
    if _one_column(proba, classes, name):
        proba = _two_columns(proba, 1 - proba)
    return np.log(_clip(proba))


def _clip(proba: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    eps = np.finfo(proba.dtype).eps
    return np.clip(proba, eps, 1 - eps, out=out)


def _check_unit_interval(proba: np.ndarray) -> None:
    """One pass for both ends: as unsigned integers, NaN and all negative numbers are above 1."""
    bits = np.dtype(f"u{proba.itemsize}")
    if proba.view(bits).max() <= np.ones((), proba.dtype).view(bits):
        return
    low, high = proba.min(), proba.max()
    if not (low >= 0 and high <= 1):  # -0.0 is right
        raise ValueError(f"y_proba holds values from {low} to {high}; expected 0 <= y_proba <= 1")


def _clipped_losses(proba: np.ndarray, codes: np.ndarray, classes: Labels) -> tuple[np.ndarray, bool]:
    """(-log clip(p[i, y_i]) of each row, whether every row sums to one)."""
    if _one_column(proba, classes, "y_proba"):
        _check_unit_interval(proba)
        column = proba.reshape(-1)
        picked, sums_to_one = np.where(codes == 1, column, 1 - column), True
    else:
        picked, sums_to_one = _pick(proba, codes)
    _clip(picked, out=picked)
    np.log(picked, out=picked)
    return np.negative(picked, out=picked), sums_to_one


def _pick(proba: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, bool]:
    """(p[i, y_i] of each row, whether every row sums to one): checked and picked a block at a time."""
    n_rows, n_classes = proba.shape
    step = min(n_rows, max(1, BLOCK // n_classes))
    first = np.arange(0, step * n_classes, n_classes)
    ones = np.ones(n_classes, np.result_type(proba.dtype, np.float32))  # a product with it is four times sum(axis=1)
    tolerance = 1e-8 + math.sqrt(np.finfo(proba.dtype).eps)  # scikit-learn's
    picked, sums_to_one = np.empty(n_rows, proba.dtype), True
    for start in range(0, n_rows, step):
        block = np.ascontiguousarray(proba[start : start + step])
        _check_unit_interval(block)
        sums = block.astype(ones.dtype, copy=False) @ ones
        sums_to_one &= bool(abs(sums.min() - 1) <= tolerance and abs(sums.max() - 1) <= tolerance)
        places = first[: len(block)] + codes[start : start + step]
        block.reshape(-1).take(places, out=picked[start : start + step], mode="clip")  # "raise" buffers `out`
    return picked, sums_to_one


def _warn_unless(sums_to_one: bool) -> None:
    if not sums_to_one:
        message = "The y_prob values do not sum to one. Make sure to pass probabilities."
        warnings.warn(message, UserWarning, stacklevel=3)


def _not_nan(loss: float, name: str) -> float:
    if math.isnan(loss):
        raise ValueError(f"the loss is NaN: {name} holds a row with NaN, +inf, or nothing but -inf")
    return loss


neg_cross_entropy_scorer = make_cross_entropy_scorer()
