"""Cross-entropy in scikit-learn's words: a drop-in `log_loss`, the same from decision values, and scorers.

    log_loss = -sum_i w_i log clip(p[i, y_i]) / sum_i w_i

needs one probability of each row. So the pass that checks the probabilities picks the one in the column of the label:
no one-hot matrix, no logarithm of the others.
"""

import itertools
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import log_loss as _host_log_loss
from sklearn.utils import check_array, check_consistent_length, column_or_1d
from sklearn.utils.metadata_routing import MetadataRequest

from ce_fast import backends, inputs, threads
from ce_fast.backends import ProbabilityJob
from ce_fast.losses import CrossEntropyLoss
from ce_fast.plan import MOST_THREADS, make_plan

__all__ = ["cross_entropy_from_logits", "log_loss", "make_cross_entropy_scorer", "neg_cross_entropy_scorer"]

RESPONSE_METHODS = ("predict_proba", "predict_log_proba", "decision_function")
FLOATS = (np.float64, np.float32, np.float16)  # what scikit-learn keeps; all else it reads as float64
EPS = {np.dtype(kind): float(np.finfo(kind).eps) for kind in FLOATS}


@dataclass(frozen=True, slots=True)
class Strings:
    """Labels that are strings: label i is names[number[i]]."""

    names: list[str]  # distinct, in the order of their first appearance
    number: np.ndarray

    def __len__(self) -> int:
        return len(self.number)


Labels = np.ndarray | Strings  # an array of bools or any integers but uint64 (integral floats are read as int64)
Classes = np.ndarray | list[str]  # an array of int64
Columns = tuple[np.ndarray, int]  # labels and that of the first column; their differences are the columns' numbers


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
    _warn_unless(sums_to_one)
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
    known = _read_labels(y_true, "y_true")
    classes = _classes_in(known) if labels is None else _read_classes(labels, "labels")
    if labels is None and len(classes) < 2:
        raise ValueError(f"y_true contains only one label ({classes[0]!s}); give all labels through labels=")
    codes = _numbers(_encode(known, classes, "y_true", "labels"))
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
        columns = _encode(_read_labels(y, "y"), classes, "y", "the estimator's classes")
        response = getattr(estimator, self.response_method)(X)
        check_consistent_length(response, columns[0], sample_weight)
        return -self._loss(response, columns, classes, _read_weights(sample_weight, len(columns[0])))

    def _loss(self, response, columns, classes, sample_weight) -> float:
        class_weight = _weight_of_each(classes, self.class_weight)
        weights = sample_weight
        if class_weight is not None:
            weights = class_weight[_numbers(columns)] * (1 if weights is None else weights)
            _check_not_all_zero(weights)
        if self.response_method == "predict_proba" and self.label_smoothing == 0:
            proba = _read_probabilities(response)
            proba = proba.reshape(-1) if _one_column(proba, classes, "y_proba") else proba
            mean, sums_to_one, _ = _clipped_loss(proba, columns, weights)
            _warn_unless(sums_to_one)
            return mean
        read = _log_of_probabilities if self.response_method == "predict_proba" else _read_logits
        logits = read(response, classes, self.response_method)
        loss = CrossEntropyLoss(class_weight, label_smoothing=self.label_smoothing)
        return _not_nan(loss(logits, _numbers(columns), sample_weight), self.response_method)

    def _accept_sample_weight(self):
        return True  # scikit-learn asks the scorers of a dict without looking whether they can answer

    def get_metadata_routing(self):
        """What this scorer asks of scikit-learn's metadata routing."""
        return self._request

    def set_score_request(self, *, sample_weight):
        """Ask for `sample_weight` when metadata routing is on: True, False, None, or the name to pass it by."""
        self._request.score.add_request(param="sample_weight", alias=sample_weight)
        return self


def _plain_log_loss(y_true, y_proba, normalize, sample_weight, labels) -> tuple[float, bool]:
    """(log loss, whether rows sum to one); an error for all that scikit-learn may see otherwise."""
    if not isinstance(normalize, (bool, np.bool_)):
        raise TypeError("normalize is not a bool")
    known, proba = _read_labels(y_true, "y_true"), _read_probabilities(y_proba)
    if proba.ndim == 0 or len(proba) != len(known):
        raise ValueError("y_true and y_proba differ in length")
    weights = _read_weights(sample_weight, len(known))
    if labels is None and not isinstance(known, Strings):
        low, high = _range(known)
        if proba.ndim == 2 and proba.shape[1] == 1:
            proba = proba[:, 0]
        if proba.shape[1:] == (high - low + 1,) or (proba.ndim == 1 and high - low == 1):  # no gaps, if all occur
            loss, sums_to_one, complete = _clipped_loss(proba, (known, low), weights, bool(normalize))
            if not complete:
                raise ValueError("y_proba has columns of labels that do not occur")
            return loss, sums_to_one
    classes = _classes_in(known) if labels is None else _read_classes(labels, "labels")
    if len(classes) < 2 or not _increasing(classes):
        raise ValueError("labels are not two or more in order")
    proba = proba.reshape(-1) if _one_column(proba, classes, "y_proba") else proba
    return _clipped_loss(proba, _encode(known, classes, "y_true", "labels"), weights, bool(normalize))[:2]


def _read_labels(values, name: str) -> Labels:
    listed = isinstance(values, list | tuple)
    if listed and len(values) and isinstance(values[0], str):
        return _number(list(values), name)  # not by way of NumPy, which makes strings of ["a", 1]
    array = np.asarray(values) if listed or type(values) is np.ndarray else column_or_1d(values)
    if array.ndim != 1 and not listed:
        array = column_or_1d(array)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}; expected (n_samples,), and not empty")
    if array.dtype.kind == "U" and not listed:
        array = _plain_memory(array)
        if found := backends.active().number_strings(array):
            return Strings(array[found[0]].tolist(), found[1])
    if array.dtype.kind in "UO":
        return _number(list(values) if listed else array.tolist(), name)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} has dtype {array.dtype}; expected integers, bools, strings or integral floats")
    if array.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            whole = array.astype(np.int64)
        wrong = not np.array_equal(whole, array)
    else:
        whole = _plain_memory(array)
        wrong = whole.dtype == np.uint64 and bool((whole > np.iinfo(np.int64).max).any())
    if wrong:
        raise ValueError(f"{name} holds numbers that are not integers of 64 bits; expected labels of classes")
    return whole.view(np.int64) if whole.dtype == np.uint64 else whole


def _plain_memory(array: np.ndarray) -> np.ndarray:
    """What a kernel can read: aligned, in native byte order."""
    return array if array.flags.aligned and array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _number(labels: list, name: str) -> Strings:
    names = list(dict.fromkeys(labels))
    for label in names:
        if not isinstance(label, str):
            raise ValueError(f"{name} holds {label!r} beside strings or as an object; expected labels of one kind")
    position = {label: k for k, label in enumerate(names)}
    return Strings(names, np.fromiter(map(position.__getitem__, labels), np.int64, len(labels)))


def _classes_in(labels: Labels) -> Classes:
    """The labels that occur, sorted."""
    if isinstance(labels, Strings):
        return sorted(labels.names)
    low, high = _range(labels)
    if high - low > len(labels):
        return np.unique(labels).astype(np.int64)
    # counts in 1 ms what sorting does in 15 (1e6 labels)
    return low + np.flatnonzero(np.bincount(_numbers((labels, low))))


def _range(labels: np.ndarray) -> tuple[int, int]:
    """The least and the greatest label."""
    backend = backends.active()
    n_threads = min(threads.resolve(None, len(labels), backend.max_threads), MOST_THREADS)
    return backend.label_range(labels, n_threads)


def _read_classes(values, name: str) -> Classes:
    labels = _read_labels(values, name)
    if isinstance(labels, Strings):
        classes: Classes = [labels.names[k] for k in labels.number]
    else:
        classes = labels.astype(np.int64, copy=False)
    if len(set(_plain(classes))) != len(classes):
        raise ValueError(f"{name} is {_shown(classes)}; expected each label once")
    return classes


def _encode(labels: Labels, classes: Classes, name: str, known: str) -> Columns:
    """The position of each label in `classes`."""
    if isinstance(labels, Strings) and isinstance(classes, list):
        position = {label: k for k, label in enumerate(classes)}
        for label in labels.names:
            if label not in position:
                raise _unseen(label, classes, name, known)
        return np.array([position[label] for label in labels.names])[labels.number], 0
    if isinstance(labels, Strings) or isinstance(classes, list):
        raise _unseen(labels.names[0] if isinstance(labels, Strings) else int(labels[0]), classes, name, known)
    low, high = int(classes.min()), int(classes.max())
    for end in _range(labels):
        if not low <= end <= high:
            raise _unseen(end, classes, name, known)
    if high - low == len(classes) - 1 and _increasing(classes):
        return labels, low
    if high - low <= max(len(labels), len(classes)):  # a table takes a fifth of the time of a search
        table = np.full(high - low + 1, -1)
        table[classes - low] = np.arange(len(classes))
        codes = table[_numbers((labels, low))]
        strange = codes < 0
    else:
        order = np.argsort(classes)
        codes = order[np.searchsorted(classes, labels, sorter=order)]
        strange = classes[codes] != labels
    if strange.any():
        raise _unseen(int(labels[strange][0]), classes, name, known)
    return codes, 0


def _numbers(columns: Columns) -> np.ndarray:
    labels, low = columns
    labels = labels.astype(np.int64, copy=False)
    return labels - low if low else labels


def _unseen(label, classes: Classes, name: str, known: str) -> ValueError:
    return ValueError(f"{name} has the label {label!r}; expected one of {known} {_shown(classes)}")


def _plain(classes: Classes) -> list:
    return classes if isinstance(classes, list) else classes.tolist()


def _increasing(classes: Classes) -> bool:
    if isinstance(classes, list):
        return all(a < b for a, b in itertools.pairwise(classes))
    return bool((classes[1:] > classes[:-1]).all())


def _shown(classes: Classes) -> str:
    first = ", ".join(map(repr, _plain(classes[:20])))
    return f"[{first}]" if len(classes) <= 20 else f"[{first}, ...]"


def _read_weights(sample_weight, n_samples: int) -> np.ndarray | None:
    if sample_weight is None:
        return None
    weights = sample_weight
    if type(weights) is not np.ndarray or weights.dtype.kind not in "biuf" or not np.isfinite(weights).all():
        weights = check_array(weights, ensure_2d=False, dtype=None, input_name="sample_weight")
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


def _weight_of_each(classes: Classes, class_weight: dict[Any, float] | None) -> np.ndarray | None:
    if class_weight is None:
        return None
    plain = _plain(classes)
    strange = [label for label in class_weight if label not in plain]
    if strange and not all(label in class_weight for label in plain):  # a slip rather than a class this fold lacks
        raise ValueError(f"class_weight has the label {strange[0]!r}; the estimator's classes are {_shown(classes)}")
    return np.array([class_weight.get(label, 1.0) for label in plain])


def _read_probabilities(y_proba) -> np.ndarray:
    if type(y_proba) is not np.ndarray or y_proba.dtype not in EPS:  # else the kernel finds NaN and infinity
        y_proba = np.asarray(check_array(y_proba, ensure_2d=False, dtype=FLOATS))
    return _plain_memory(y_proba)


def _one_column(scores: np.ndarray, classes: Classes, name: str) -> bool:
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


def _read_logits(y_score, classes: Classes, name: str) -> np.ndarray:
    scores = np.asarray(y_score)
    return _two_columns(scores, np.zeros_like(scores)) if _one_column(scores, classes, name) else scores


def _log_of_probabilities(y_proba, classes: Classes, name: str) -> np.ndarray:
    proba = _read_probabilities(y_proba)
    _check_unit_interval(proba)
    if _one_column(proba, classes, name):
        proba = _two_columns(proba, 1 - proba)
    return np.log(_clip(proba))


def _clip(proba: np.ndarray) -> np.ndarray:
    eps = np.finfo(proba.dtype).eps
    return np.clip(proba, eps, 1 - eps)


def _check_unit_interval(proba: np.ndarray) -> None:
    low, high = proba.min(), proba.max()
    if not (low >= 0 and high <= 1):  # -0.0 is right, NaN is not
        raise ValueError(f"y_proba holds values from {low} to {high}; expected 0 <= y_proba <= 1")


def _clipped_loss(
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
    job = ProbabilityJob(proba, *columns, eps, 1e-8 + math.sqrt(eps), weight, picked)
    total, outside, sums_to_one, complete = backend.run_probabilities(job, plan)
    if outside:
        _check_unit_interval(proba)
    if picked is None:
        return float(total / scale if normalize else total), sums_to_one, complete
    losses = np.negative(np.log(picked, out=picked), out=picked)
    if normalize:
        loss = np.average(losses, weights=weights)
    else:
        loss = losses.sum() if weights is None else np.dot(losses, weights)
    return float(loss), sums_to_one, complete


def _warn_unless(sums_to_one: bool) -> None:
    if not sums_to_one:
        message = "The y_prob values do not sum to one. Make sure to pass probabilities."
        warnings.warn(message, UserWarning, stacklevel=3)


def _not_nan(loss: float, name: str) -> float:
    if math.isnan(loss):
        raise ValueError(f"the loss is NaN: {name} holds a row with NaN, +inf, or nothing but -inf")
    return loss


neg_cross_entropy_scorer = make_cross_entropy_scorer()
