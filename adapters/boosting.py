"""Cross-entropy for gradient boosting: objectives and evaluation metrics for XGBoost and LightGBM.

One object serves all four interfaces. How each calls it tells which one it is:

    XGBClassifier    (y_true, y_pred[, sample_weight=w])    grad, hess; of a metric the value
    xgboost.train    (y_pred, DMatrix)                      grad, hess; of a metric (name, value)
    LGBMClassifier   (y_true, y_pred, w, group)             grad, hess; of a metric (name, value, False)
    lightgbm.train   (y_pred, Dataset)                      grad, hess; of a metric (name, value, False)

`False` says that smaller is better. No library multiplies the gradients of a custom objective by sample weights, so
that is done here, once. Neither is imported here.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import numpy as np

from ce_fast import inputs
from ce_fast.adapters.numpy import softmax
from ce_fast.losses import BCEWithLogitsLoss, CrossEntropyLoss, FocalLoss, SigmoidFocalLoss

__all__ = ["Metric", "SigmoidObjective", "SoftmaxObjective"]


class Call(NamedTuple):
    """What a library passed, under one name each."""

    y_true: np.ndarray
    y_pred: np.ndarray
    sample_weight: np.ndarray | None
    lightgbm: bool
    native: bool  # not by way of a scikit-learn estimator


def _read_call(y_true, y_pred, weight_and_group: tuple, sample_weight) -> Call:
    native, lightgbm = hasattr(y_pred, "get_label"), bool(weight_and_group)
    if native:
        y_true, y_pred, data = y_pred.get_label(), y_true, y_pred
        sample_weight, lightgbm = data.get_weight(), not hasattr(data, "num_row")
    elif lightgbm:
        sample_weight = weight_and_group[0]
    if sample_weight is not None:
        sample_weight = np.asarray(sample_weight)
        sample_weight = sample_weight if sample_weight.size else None  # what XGBoost has for no weights
    labels, scores = np.asarray(y_true), inputs.as_float_array(y_pred, "y_pred")
    if labels.dtype.kind not in "biuf":
        raise TypeError(f"y_true has dtype {labels.dtype}; expected numbers")
    return Call(labels, scores, sample_weight, lightgbm, native)


def _check_labels(labels: np.ndarray, good: np.ndarray, wanted: str) -> None:
    if not good.all():
        at = np.unravel_index(int(np.argmin(good)), good.shape)
        raise ValueError(f"y_true[{', '.join(map(str, at))}] is {labels[at]}; expected {wanted}")


@dataclass(frozen=True)
class Metric:
    """The mean loss that an objective minimizes, as an evaluation metric of raw scores.

    For ``eval_metric=`` of XGBClassifier and of ``LGBMClassifier.fit``, ``custom_metric=`` of `xgboost.train` and
    ``feval=`` of `lightgbm.train`, for models trained on an objective of this module: only then do the libraries pass
    raw scores. It is made by `SoftmaxObjective.metric` and `SigmoidObjective.metric`; ``SoftmaxObjective().metric``
    is the log loss, whatever the model was trained on.

    Parameters
    ----------
    objective : SoftmaxObjective or SigmoidObjective

    Notes
    -----
    LGBMClassifier adds a metric of its own, which takes the raw scores of a custom objective for probabilities. Give
    it ``metric="none"``, or early stopping would look at that one too.
    """

    objective: "SoftmaxObjective | SigmoidObjective"

    @property
    def __name__(self) -> str:
        """The name of the metric; XGBClassifier asks for it here."""
        return self.objective._name

    def __call__(self, y_true, y_pred, *weight_and_group, sample_weight=None):
        """The mean loss in nats, in the form that the calling library wants; arguments as those of the objective."""
        call = _read_call(y_true, y_pred, weight_and_group, sample_weight)
        labels, scores = self.objective._fit(call)
        value = float(self.objective._loss("mean")(scores, labels, call.sample_weight))
        if call.lightgbm:
            return self.__name__, value, False
        return (self.__name__, value) if call.native else value


@dataclass(frozen=True)
class _Objective:
    def __post_init__(self) -> None:
        self._loss("sum")  # checks the options

    def _loss(self, reduction: str) -> Any:
        raise NotImplementedError

    def _fit(self, call: Call) -> tuple[np.ndarray, np.ndarray]:
        """Labels and raw scores as the loss takes them, checked."""
        raise NotImplementedError

    def _hessian_scale(self, call: Call, scores: np.ndarray) -> float:
        return 1.0

    @property
    def metric(self) -> Metric:
        """The mean of the loss that this objective minimizes, as an evaluation metric."""
        return Metric(self)  # type: ignore[arg-type]

    def __call__(self, y_true, y_pred, *weight_and_group, sample_weight=None):
        """Gradient and Hessian of the loss by the raw scores, row by row.

        Parameters
        ----------
        y_true, y_pred, *weight_and_group, sample_weight
            Whatever XGBoost and LightGBM pass: see the module. Read, never written to.

        Returns
        -------
        grad, hess : ndarray
            Of the shape, dtype and memory layout of the raw scores; not divided by anything.

        Raises
        ------
        ValueError, TypeError
            If a shape or dtype does not fit, or a label is out of range.
        """
        call = _read_call(y_true, y_pred, weight_and_group, sample_weight)
        labels, scores = self._fit(call)
        grad, hess = self._loss("sum").grad_and_hess(scores, labels, call.sample_weight)
        scale = self._hessian_scale(call, scores)
        if scale != 1:
            hess *= scale
        if grad.ndim != call.y_pred.ndim:
            return grad.ravel(order="F"), hess.ravel(order="F")
        return grad, hess


@dataclass(frozen=True)
class SoftmaxObjective(_Objective):
    r"""Cross-entropy of K classes, smoothed, weighted or focal, as an objective of XGBoost and LightGBM.

    With :math:`p = softmax(z)` of the raw scores of a row, its label t, smoothing :math:`\epsilon` and class weights
    w, the loss is, in nats,

    .. math:: \sum_k w_k q_k (1 - p_k)^\gamma (-\log p_k), \qquad q_k = (1-\epsilon) [k = t] + \epsilon / K,

    times the sample weight. A frozen, picklable object, to be passed unchanged to ``XGBClassifier(objective=...)``,
    ``xgboost.train(..., obj=...)``, ``LGBMClassifier(objective=...)`` or ``lightgbm.train({"objective": ...}, ...)``.

    Parameters
    ----------
    label_smoothing : float in [0, 1], default=0.0
        :math:`\epsilon`.
    gamma : float, default=0.0
        Of the focal loss (arXiv:1708.02002); 0 is the cross-entropy.
    class_weight : array_like of shape (n_classes,), optional
        Weights of the classes 0, 1, ..., finite and not negative.
    hessian_scale : float, optional
        Multiplies the Hessian. None is what the library that calls has in its own softmax: 2 for XGBoost, K / (K - 1)
        for LightGBM. A smaller Hessian makes larger steps.
    n_threads : int, optional
        As in `CrossEntropyLoss`.

    Raises
    ------
    ValueError, TypeError
        If an option is out of its range or of the wrong type.

    Notes
    -----
    The Hessian is the diagonal, :math:`p_k (1 - p_k)` for the cross-entropy; with gamma it leaves out what curves
    downwards (see `CrossEntropyLoss.grad_and_hess`). It is at least 1e-16, as XGBoost's own, before it is scaled, and
    0 in rows of sample weight 0.

    Labels are 0 to K - 1. The scikit-learn estimators use one column of raw scores for two classes: take
    `SigmoidObjective` then.

    Both libraries start from other raw scores with an objective of their own than with a custom one, which starts at
    one constant: set ``base_score`` (XGBoost) or ``boost_from_average=False`` (LightGBM) to compare.

    Of XGBoost's models, XGBClassifier predicts labels and probabilities, and that of `xgboost.train` probabilities
    with ``"objective": "multi:softprob"`` beside ``obj=``. Those of LightGBM predict raw scores, by ``predict`` and
    ``predict_proba`` of LGBMClassifier too: `probabilities` turns them into probabilities, the largest of which is
    that of the label ``model.classes_[...]``. In a grid search score them by
    ``make_cross_entropy_scorer(response_method="decision_function")`` of `ce_fast.adapters.sklearn`.

    Examples
    --------
    >>> import numpy as np
    >>> from ce_fast.adapters.boosting import SoftmaxObjective
    >>> grad, hess = SoftmaxObjective(hessian_scale=1)([0, 2], np.zeros((2, 3)))
    >>> grad.round(3)
    array([[-0.667,  0.333,  0.333],
           [ 0.333,  0.333, -0.667]])
    >>> hess.round(3)
    array([[0.222, 0.222, 0.222],
           [0.222, 0.222, 0.222]])
    >>> round(SoftmaxObjective().metric([0, 2], np.zeros((2, 3))), 6)
    1.098612
    """

    _: KW_ONLY
    label_smoothing: float = 0.0
    gamma: float = 0.0
    class_weight: tuple[float, ...] | None = None
    hessian_scale: float | None = None
    n_threads: int | None = None

    def __post_init__(self) -> None:
        weight = inputs.as_class_weight(self.class_weight, name="class_weight")
        if weight is not None:  # a tuple: objectives are equal if their options are
            object.__setattr__(self, "class_weight", tuple(weight.tolist()))
        if self.hessian_scale is not None:
            inputs.check_option("hessian_scale", self.hessian_scale, 0.0, above=True)
        inputs.check_option("gamma", self.gamma, 0.0)
        super().__post_init__()

    @property
    def _name(self) -> str:
        return "focal_loss" if self.gamma else "cross_entropy"

    def _loss(self, reduction: str) -> CrossEntropyLoss | FocalLoss:
        options: dict[str, Any] = {
            "weight": self.class_weight,
            "label_smoothing": self.label_smoothing,
            "reduction": reduction,
            "n_threads": self.n_threads,
        }
        return FocalLoss(gamma=self.gamma, **options) if self.gamma else CrossEntropyLoss(**options)

    def _fit(self, call: Call) -> tuple[np.ndarray, np.ndarray]:
        labels, scores = call.y_true, call.y_pred
        n_rows = labels.size
        if labels.ndim != 1:
            raise ValueError(f"y_true has shape {labels.shape}; expected (n_samples,), a class each")
        if scores.ndim == 1 and n_rows and scores.size % n_rows == 0:
            scores = scores.reshape((n_rows, -1), order="F")  # flat, class by class
        if scores.ndim != 2 or len(scores) != n_rows:
            raise ValueError(f"y_pred has shape {scores.shape}; expected ({n_rows}, n_classes), for {n_rows} labels")
        n_classes = scores.shape[1]
        if n_classes < 2:
            raise ValueError(
                f"y_pred has shape {call.y_pred.shape}, one raw score a row; expected one for each class. Take "
                f"SigmoidObjective for two classes, or tell the library num_class"
            )
        with np.errstate(invalid="ignore"):
            classes = labels.astype(np.int64)
        good = (classes == labels) & (classes >= 0) & (classes < n_classes)
        _check_labels(labels, good, f"a class, 0 to {n_classes - 1}")
        return classes, scores

    def _hessian_scale(self, call: Call, scores: np.ndarray) -> float:
        if self.hessian_scale is not None:
            return self.hessian_scale
        n_classes = scores.shape[1]
        return n_classes / (n_classes - 1) if call.lightgbm else 2.0

    def probabilities(self, y_pred) -> np.ndarray:
        """Probabilities of raw scores of shape (n_samples, n_classes), in that shape."""
        scores = inputs.as_float_array(y_pred, "y_pred")
        if scores.ndim != 2:
            raise ValueError(f"y_pred has shape {scores.shape}; expected (n_samples, n_classes)")
        return softmax(scores)


@dataclass(frozen=True)
class SigmoidObjective(_Objective):
    r"""Binary cross-entropy, smoothed, weighted or focal, as an objective of XGBoost and LightGBM.

    With :math:`p = \sigma(z)` of a raw score and its label y, the loss is, in nats,

    .. math:: -\pi y' \log p - (1 - y') \log(1 - p), \qquad y' = (1-\epsilon) y + \epsilon / 2,

    or with `gamma` or `alpha` the focal loss :math:`[\alpha y + (1 - \alpha)(1 - y)]\, u^\gamma\, BCE(z, y)` with
    :math:`u = y (1 - p) + (1 - y) p`, times the sample weight. A frozen, picklable object, to be passed unchanged to
    the four interfaces that `SoftmaxObjective` names.

    Parameters
    ----------
    label_smoothing : float in [0, 1], default=0.0
        :math:`\epsilon`.
    pos_weight : float, default=1.0
        :math:`\pi`, the weight of positive labels (the libraries' own `scale_pos_weight` does not reach a custom
        objective). At least 0.
    gamma : float, default=0.0
        Of the focal loss (arXiv:1708.02002). At least 0.
    alpha : float in [0, 1], optional
        Of the focal loss; None for no weights.
    n_threads : int, optional
        As in `CrossEntropyLoss`.

    Raises
    ------
    ValueError, TypeError
        If an option is out of its range or of the wrong type, or options of both losses are given.

    Notes
    -----
    The Hessian is that of XGBoost and LightGBM, :math:`p (1 - p)`, for the cross-entropy; with gamma it leaves out
    what curves downwards. It is at least 1e-16, and 0 in rows of sample weight 0.

    Labels are 0 and 1, or any number between. Raw scores of shape (n_samples, n_outputs) with labels of that shape
    are those of a multi-label problem.

    Predictions and starting scores are as in `SoftmaxObjective`; the objective to name beside ``obj=`` of
    `xgboost.train` is "binary:logistic".

    Examples
    --------
    >>> from ce_fast.adapters.boosting import SigmoidObjective
    >>> grad, hess = SigmoidObjective()([1, 0], [0.0, 2.0])
    >>> grad.round(3), hess.round(3)
    (array([-0.5  ,  0.881]), array([0.25 , 0.105]))
    >>> SigmoidObjective().probabilities([0.0, 2.0]).round(3)
    array([[0.5  , 0.5  ],
           [0.119, 0.881]])
    """

    _: KW_ONLY
    label_smoothing: float = 0.0
    pos_weight: float = 1.0
    gamma: float = 0.0
    alpha: float | None = None
    n_threads: int | None = None

    def __post_init__(self) -> None:
        inputs.check_option("pos_weight", self.pos_weight, 0.0)
        inputs.check_option("gamma", self.gamma, 0.0)
        if self._focal and (self.label_smoothing or self.pos_weight != 1):
            raise ValueError(
                f"gamma={self.gamma} and alpha={self.alpha} are of the focal loss, which has no label_smoothing "
                f"(given {self.label_smoothing}) and no pos_weight (given {self.pos_weight}): alpha weighs its labels"
            )
        super().__post_init__()

    @property
    def _focal(self) -> bool:
        return self.gamma != 0 or self.alpha is not None

    @property
    def _name(self) -> str:
        return "focal_loss" if self._focal else "cross_entropy"

    def _loss(self, reduction: str) -> BCEWithLogitsLoss | SigmoidFocalLoss:
        if self._focal:
            return SigmoidFocalLoss(self.alpha, self.gamma, reduction, n_threads=self.n_threads)
        pos_weight = None if self.pos_weight == 1 else self.pos_weight
        return BCEWithLogitsLoss(
            reduction=reduction,
            pos_weight=pos_weight,  # type: ignore[arg-type]
            label_smoothing=self.label_smoothing,
            n_threads=self.n_threads,
        )

    def _fit(self, call: Call) -> tuple[np.ndarray, np.ndarray]:
        labels, scores = call.y_true, call.y_pred
        if labels.size == scores.size:
            labels = labels.reshape(scores.shape)
        if labels.shape != scores.shape:
            raise ValueError(f"y_pred has shape {scores.shape}; expected {labels.shape}, that of y_true")
        _check_labels(labels, (labels >= 0) & (labels <= 1), "0, 1 or a number between")
        return labels, scores

    def probabilities(self, y_pred) -> np.ndarray:
        """Probabilities of both classes, of shape (n_samples, 2), of raw scores of shape (n_samples,)."""
        scores = inputs.as_float_array(y_pred, "y_pred")
        if scores.ndim != 1:
            raise ValueError(f"y_pred has shape {scores.shape}; expected (n_samples,)")
        return softmax(np.stack([np.zeros_like(scores), scores], axis=1))
