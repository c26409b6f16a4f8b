"""Scorers for grid search: minus the cross-entropy over the columns of `estimator.classes_`."""

import math
from functools import partial

import numpy as np
from sklearn.utils import _safe_indexing, check_consistent_length
from sklearn.utils.metadata_routing import MetadataRequest

from ce_fast import inputs
from ce_fast.adapters.numpy import softmax
from ce_fast.adapters.sklearn_inputs import (
    EPS,
    Classes,
    Columns,
    check_not_all_zero,
    check_unit_interval,
    encode,
    log_of_probabilities,
    numbers,
    one_column,
    read_class_weight,
    read_classes,
    read_labels,
    read_logits,
    read_probabilities,
    read_weights,
    shown,
    weight_of_each,
    with_others,
)
from ce_fast.adapters.sklearn_loss import clipped_loss, not_nan, warn_unless
from ce_fast.losses import CrossEntropyLoss, FocalLoss

__all__ = ["make_cross_entropy_scorer", "neg_cross_entropy_scorer"]

RESPONSE_METHODS = ("predict_proba", "predict_log_proba", "decision_function", "auto")
UNSEEN = ("raise", "clip", "ignore")
LOOKED_AT = 100  # rows that show "auto" whether decision values are logits


def make_cross_entropy_scorer(
    *, response_method="predict_proba", label_smoothing=0.0, gamma=0.0, class_weight=None, unseen="raise"
):
    r"""A scorer ``scorer(estimator, X, y, sample_weight=None)``: minus the cross-entropy, so greater is better.

    With probabilities :math:`p` over the K classes of the estimator, :math:`q` the smoothed one-hot label, sample
    weights :math:`s` and class weights :math:`w`,

    .. math:: -\frac{1}{\sum_i s_i w_{y_i}} \sum_i s_i \sum_k w_k q_{ik} (1 - p_{ik})^\gamma (-\log p_{ik}).

    Columns are aligned to `estimator.classes_`, so a fold whose `y` lacks a class scores right, where
    "neg_log_loss" gives NaN. Picklable; for ``scoring=`` of `GridSearchCV`, `cross_validate` and their like, alone or
    in a dict.

    Parameters
    ----------
    response_method : {"predict_proba", "predict_log_proba", "decision_function", "auto"}, default="predict_proba"
        Probabilities are clipped as `log_loss` does, and the score is that of "neg_log_loss". Log-probabilities and
        decision values are taken as logits, not clipped; that suits only estimators whose decision values are
        logits, such as `LogisticRegression`. One-dimensional decision values z are the logits [0, z].
        "auto" takes decision values if their softmax is what `predict_proba` says of the first 100 rows (and not all of
        those are certain), else probabilities; an estimator without probabilities is refused.
    label_smoothing : float in [0, 1], default=0.0
        Mixes the labels with the uniform distribution. Probabilities are then clipped and turned into the logits
        log p, whose softmax is p divided by its sum.
    gamma : float, default=0.0
        Not negative: the exponent of the focal loss, which counts what is already right for less. Probabilities are
        turned into logits likewise.
    class_weight : dict {label: weight} or "balanced", optional
        A label without an entry has weight 1. "balanced" gives every label of the scored `y` the same mass, so the
        score is the mean over labels of their mean losses. The score is divided by the sum of the weights of the
        rows' labels.
    unseen : {"raise", "clip", "ignore"}, default="raise"
        What is done with a row whose label is not in `estimator.classes_`: an error; a probability of 0 clipped to
        the machine precision of the estimator's answer, so a loss of 36 nats in float64 whatever the smoothing; or
        the row does not count.

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

    References
    ----------
    Lin, Goyal, Girshick, He, Dollár, "Focal Loss for Dense Object Detection", 2017.

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
    return _CrossEntropyScorer(response_method, label_smoothing, gamma, class_weight, unseen)


class _CrossEntropyScorer:
    def __init__(self, response_method, label_smoothing, gamma, class_weight, unseen):
        self.response_method = inputs.check_choice("response_method", response_method, RESPONSE_METHODS)
        self.label_smoothing = inputs.check_option("label_smoothing", label_smoothing, 0.0, 1.0)
        self.gamma = inputs.check_option("gamma", gamma, 0.0)
        self.class_weight = read_class_weight(class_weight)
        self.unseen = inputs.check_choice("unseen", unseen, UNSEEN)
        self._request = MetadataRequest(owner=repr(self))
        self._request.score.add_request(param="sample_weight", alias=None)

    def __repr__(self):
        return (
            f"make_cross_entropy_scorer(response_method={self.response_method!r}, "
            f"label_smoothing={self.label_smoothing!r}, gamma={self.gamma!r}, "
            f"class_weight={self.class_weight!r}, unseen={self.unseen!r})"
        )

    def __call__(self, estimator, X, y, sample_weight=None) -> float:
        if getattr(estimator, "classes_", None) is None:
            raise ValueError(f"{type(estimator).__name__} has no classes_; expected a fitted classifier")
        classes, labels = read_classes(estimator.classes_, "classes_"), read_labels(y, "y")
        known = classes if self.unseen == "raise" else with_others(classes, labels)
        columns = encode(labels, known, "y", "the estimator's classes")
        method, response = self._respond(estimator, X, classes)
        check_consistent_length(response, columns[0], sample_weight)
        weights = read_weights(sample_weight, len(columns[0]))
        class_weight = self._class_weight(known, len(classes), columns, weights)
        score = self._mean if len(known) == len(classes) else self._mean_with_unseen
        return -score(method, response, columns, classes, weights, class_weight)

    def _respond(self, estimator, X, classes: Classes) -> tuple[str, np.ndarray]:
        method = self.response_method
        if method == "auto":
            if not hasattr(estimator, "predict_proba"):
                raise ValueError(
                    f"{type(estimator).__name__} has no predict_proba, so nothing shows that its decision values are "
                    "logits (those of a hinge loss are not); calibrate it, for example by CalibratedClassifierCV, or "
                    'take them as logits all the same by response_method="decision_function"'
                )
            method = "decision_function" if _gives_logits(estimator, X, classes) else "predict_proba"
        response = getattr(estimator, method)(X)
        return method, read_probabilities(response) if method == "predict_proba" else np.asarray(response)

    def _class_weight(self, known: Classes, n_classes: int, columns: Columns, weights) -> np.ndarray | None:
        """The weight of each label, unseen ones last."""
        if self.class_weight != "balanced":
            return weight_of_each(known, self.class_weight, self.unseen != "raise")
        mass = np.bincount(numbers(columns), weights, len(known)).astype(float)
        if self.unseen == "ignore":
            mass[n_classes:] = 0
        there = mass > 0
        return np.divide(mass.sum() / there.sum(), mass, out=np.ones(len(known)), where=there)

    def _mean(self, method, response, columns, classes, weights, class_weight) -> float:
        plain = self.label_smoothing == 0 and self.gamma == 0
        if class_weight is not None:
            weight_of_row = class_weight[numbers(columns)] * (1 if weights is None else weights)
            check_not_all_zero(weight_of_row)
        if method == "predict_proba" and plain:
            proba = response.reshape(-1) if one_column(response, classes, "y_proba") else response
            mean, sums_to_one, _ = clipped_loss(proba, columns, weights if class_weight is None else weight_of_row)
            warn_unless(sums_to_one)
            return mean
        logits = (log_of_probabilities if method == "predict_proba" else read_logits)(response, classes, method)
        make = partial(FocalLoss, gamma=self.gamma) if self.gamma else CrossEntropyLoss
        loss = make(class_weight, label_smoothing=self.label_smoothing)
        return not_nan(loss(logits, numbers(columns), weights), method)

    def _mean_with_unseen(self, method, response, columns, classes, weights, class_weight) -> float:
        """The mean over rows of which some have a label without a column."""
        one_column(response, classes, method)
        if method == "predict_proba":
            check_unit_interval(response)
        codes = numbers(columns)
        seen = codes < len(classes)
        weight_of_row = np.ones(len(codes)) if weights is None else weights.astype(float)
        if class_weight is not None:
            weight_of_row = weight_of_row * class_weight[codes]
            class_weight = class_weight[: len(classes)]
        mass, unseen_mass = weight_of_row[seen].sum(), weight_of_row[~seen].sum()
        if self.unseen == "ignore":
            unseen_mass = 0.0
        if mass + unseen_mass == 0:
            raise ValueError(f"no row of y counts; expected one with a weight, of one of the classes {shown(classes)}")
        mean = 0.0
        if mass != 0:
            weights = None if weights is None else weights[seen]
            mean = self._mean(method, response[seen], (codes[seen], 0), classes, weights, class_weight)
        clipped = -math.log(EPS.get(response.dtype, EPS[np.dtype(float)]))
        return float((mean * mass + clipped * unseen_mass) / (mass + unseen_mass))

    def _accept_sample_weight(self):
        return True  # scikit-learn asks the scorers of a dict without looking whether they can answer

    def get_metadata_routing(self):
        """What this scorer asks of scikit-learn's metadata routing."""
        return self._request

    def set_score_request(self, *, sample_weight):
        """Ask for `sample_weight` when metadata routing is on: True, False, None, or the name to pass it by."""
        self._request.score.add_request(param="sample_weight", alias=sample_weight)
        return self


def _gives_logits(estimator, X, classes: Classes) -> bool:
    """Whether the softmax of decision values is what the probabilities are, of the first rows that are not certain."""
    if not hasattr(estimator, "decision_function"):
        return False
    few = _safe_indexing(X, slice(LOOKED_AT))
    values, proba = np.asarray(estimator.decision_function(few)), np.asarray(estimator.predict_proba(few))
    if values.ndim == 2 and values.shape[1] != len(classes):  # of pairs of classes, as those of SVC may be
        return False
    expected = softmax(read_logits(values, classes, "decision_function"))
    return bool((expected.max(axis=1) < 1 - 1e-6).any() and np.allclose(expected, proba, rtol=1e-4, atol=1e-6))


neg_cross_entropy_scorer = make_cross_entropy_scorer()
