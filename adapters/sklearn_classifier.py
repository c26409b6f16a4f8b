"""A linear scikit-learn classifier whose cross-entropy may be smoothed, focal, weighted or distilled."""

import itertools
import warnings
from numbers import Integral, Real

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassifierMixin, _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from ce_fast import inputs
from ce_fast.adapters.numpy import log_softmax, softmax
from ce_fast.adapters.sklearn_inputs import two_columns
from ce_fast.distillation import DistillationLoss
from ce_fast.losses import CrossEntropyLoss, FocalLoss

__all__ = ["SoftmaxClassifier"]

# Logits of an evaluation at a time: a block is still in L2 when its gradient is multiplied, and all logits are never
# there. All at once took as long, a quarter more on the digits of scikit-learn.
BLOCK_LOGITS = 1 << 14
FLOATS = (np.float64, np.float32)  # what is kept as it is; all else is read as float64


class SoftmaxClassifier(ClassifierMixin, BaseEstimator):
    r"""Multinomial logistic regression with a smoothed, focal, class-weighted or distilled loss and an L2 penalty.

    With logits :math:`z_i = W x_i + b`, rows weighted by :math:`s_i` (sample weight times class weight of the label)
    and :math:`S = \sum_i s_i`, it minimises by L-BFGS-B

    .. math:: \frac{1}{S} \sum_i s_i\, l(z_i, y_i) + \frac{1}{2 C S} \sum_{kj} W_{kj}^2,

    what `sklearn.linear_model.LogisticRegression` minimises if l is the cross-entropy. With smoothing :math:`\epsilon`
    over K classes, focal exponent :math:`\gamma` and p = softmax(z), in nats,

    .. math:: l = \sum_k q_k (1 - p_k)^\gamma (-\log p_k), \qquad q_k = (1-\epsilon) [k = y] + \epsilon / K,

    and with logits of a teacher, whose softmax at temperature T is :math:`t_T`,

    .. math:: l = \alpha\, T^2\, KL(t_T \,\|\, p_T) + (1 - \alpha) \sum_k q_k (-\log p_k).

    Two classes have one row of coefficients: the logits are (0, z).

    Parameters
    ----------
    C : float, default=1.0
        Inverse of the strength of the penalty, which intercepts do not have; `numpy.inf` for none.
    label_smoothing : float in [0, 1], default=0.0
        :math:`\epsilon`.
    gamma : float, default=0.0
        :math:`\gamma`, at least 0. The focal loss is not convex: a minimum need not be the only one.
    class_weight : dict or "balanced", optional
        Weights of classes, as in `LogisticRegression`: they multiply the whole loss of a row, by its label.
    alpha : float in [0, 1], optional
        :math:`\alpha`, the weight of the teacher; 0.5 by default. Only with `teacher_logits`.
    temperature : float, optional
        T, 2.0 by default. Only with `teacher_logits`.
    fit_intercept : bool, default=True
    tol : float, default=1e-4
        The fit ends when no element of the gradient is larger, or the objective falls by less than 64 units in its last
        place.
    max_iter : int, default=100
    warm_start : bool, default=False
        Whether to start from the coefficients of the last fit.
    verbose : int, default=0
        Whether to print the objective after each iteration.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
    coef_ : ndarray of shape (1, n_features) or (n_classes, n_features)
        W, of X's dtype.
    intercept_ : ndarray of shape (1,) or (n_classes,)
        b; 0 with `fit_intercept=False`.
    n_iter_ : ndarray of shape (1,)
        Iterations of the solver.
    n_features_in_ : int
    feature_names_in_ : ndarray of shape (n_features_in_,)
        If X had names, all strings.

    Notes
    -----
    X is a C-ordered array or CSR, float64 or float32 (all else is copied), and computed in its dtype. Rows are taken in
    blocks, logits and gradient in one buffer: beside X, a fit needs memory for a block and some dozens of gradients.

    References
    ----------
    Szegedy et al., "Rethinking the Inception architecture for computer vision", arXiv:1512.00567 (smoothing). Lin et
    al., "Focal loss for dense object detection", arXiv:1708.02002. Hinton et al., "Distilling the knowledge in a
    neural network", arXiv:1503.02531.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from ce_fast.adapters.sklearn import SoftmaxClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> sure = SoftmaxClassifier(max_iter=200).fit(X, y)
    >>> smooth = SoftmaxClassifier(label_smoothing=0.1, max_iter=200).fit(X, y)
    >>> sure.predict_proba(X[:1]).round(3)
    array([[0.982, 0.018, 0.   ]])
    >>> smooth.predict_proba(X[:1]).round(3)
    array([[0.923, 0.076, 0.   ]])

    A student of another model's logits:

    >>> student = SoftmaxClassifier(alpha=0.9, max_iter=200).fit(X, y, teacher_logits=smooth.decision_function(X))
    >>> round(student.score(X, y), 3)
    0.96
    """

    _parameter_constraints: dict = {  # noqa: RUF012
        "C": [Interval(Real, 0, None, closed="right")],
        "label_smoothing": [Interval(Real, 0, 1, closed="both")],
        "gamma": [Interval(Real, 0, None, closed="left")],
        "class_weight": [dict, StrOptions({"balanced"}), None],
        "alpha": [Interval(Real, 0, 1, closed="both"), None],
        "temperature": [Interval(Real, 0, None, closed="neither"), None],
        "fit_intercept": ["boolean"],
        "tol": [Interval(Real, 0, None, closed="left")],
        "max_iter": [Interval(Integral, 0, None, closed="left")],
        "warm_start": ["boolean"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        C=1.0,
        *,
        label_smoothing=0.0,
        gamma=0.0,
        class_weight=None,
        alpha=None,
        temperature=None,
        fit_intercept=True,
        tol=1e-4,
        max_iter=100,
        warm_start=False,
        verbose=0,
    ):
        self.C = C
        self.label_smoothing = label_smoothing
        self.gamma = gamma
        self.class_weight = class_weight
        self.alpha = alpha
        self.temperature = temperature
        self.fit_intercept = fit_intercept
        self.tol = tol
        self.max_iter = max_iter
        self.warm_start = warm_start
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y, sample_weight=None, teacher_logits=None):
        """Fit the coefficients.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)
        y : array-like of shape (n_samples,)
            Labels of two classes or more.
        sample_weight : array-like of shape (n_samples,), optional
            Finite and not negative.
        teacher_logits : array-like of shape (n_samples, n_classes), optional
            Finite, columns in the order of `classes_`; of shape (n_samples,) for two classes, as `decision_function`
            gives them. With metadata routing, ask for them by `set_fit_request(teacher_logits=True)`.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If a parameter, shape or value does not fit, `y` has one class, options of distillation come without a
            teacher, or `gamma` with one.

        Warns
        -----
        ConvergenceWarning
            If the solver stops before `tol` is reached.
        UserWarning
            If the teacher's logits look like probabilities.
        """
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=FLOATS, order="C")
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y holds one class, {self.classes_[0]!r}; expected samples of at least 2 classes")
        weights = _row_weights(sample_weight, self.class_weight, X, self.classes_, codes)
        total = float(len(y) if weights is None else weights.sum())
        rows = (codes, weights)
        if teacher_logits is not None:
            rows = (_read_teacher(teacher_logits, len(y), self.classes_), *rows)
        loss = self._make_loss(total, teacher_logits is not None)
        start = self._start(X)
        objective = _Objective(X, rows, loss, start.shape[1], self.fit_intercept, 1 / (self.C * total))
        result = minimize(
            objective,
            start.ravel(),
            method="L-BFGS-B",
            jac=True,
            options={"maxiter": self.max_iter, "maxls": 50, "gtol": self.tol, "ftol": 64 * np.finfo(float).eps},
            callback=_printer() if self.verbose else None,
        )
        self._keep(result, start.shape, X)
        return self

    def _make_loss(self, total: float, distilled: bool):
        given = {name: getattr(self, name) for name in ("alpha", "temperature") if getattr(self, name) is not None}
        # on one thread: those of the losses and of BLAS, in turns, wait for each other (82 ms a gradient in place of 9)
        options = {"label_smoothing": self.label_smoothing, "denominator": total, "n_threads": 1}
        if distilled and self.gamma:
            raise ValueError(f"gamma is {self.gamma} with teacher_logits; expected 0, distillation has no focal loss")
        if distilled:
            return DistillationLoss(**given, **options)
        if given:
            raise ValueError(f"{' and '.join(given)} given without teacher_logits, which fit takes; expected them too")
        return FocalLoss(gamma=self.gamma, **options) if self.gamma else CrossEntropyLoss(**options)

    def _start(self, X) -> np.ndarray:
        """Coefficients of shape (n_features, n_columns), a row of intercepts below: the classes of a feature are
        neighbours, as logits = X @ coefficients have them."""
        n_columns = 1 if len(self.classes_) == 2 else len(self.classes_)
        start = np.zeros((X.shape[1] + self.fit_intercept, n_columns))
        if not (self.warm_start and hasattr(self, "coef_")):
            return start
        if self.coef_.shape != (n_columns, X.shape[1]):
            raise ValueError(
                f"warm_start=True: coef_ of the last fit has shape {self.coef_.shape}; these data need "
                f"{(n_columns, X.shape[1])}"
            )
        start[: X.shape[1]] = self.coef_.T
        if self.fit_intercept:
            start[-1] = self.intercept_
        return start

    def _keep(self, result, shape: tuple[int, int], X) -> None:
        if not result.success:
            more = f" Increase max_iter, which is {self.max_iter}, or" if result.nit >= self.max_iter else " Try to"
            warnings.warn(
                f"the solver stopped after {result.nit} iterations before tol={self.tol} was reached: "
                f"{result.message}.{more} scale the data.",
                ConvergenceWarning,
                stacklevel=4,
            )
        table = result.x.reshape(shape).astype(X.dtype)
        self.coef_ = table[: X.shape[1]].T
        self.intercept_ = table[-1].copy() if self.fit_intercept else np.zeros(shape[1], X.dtype)
        self.n_iter_ = np.array([result.nit], np.int32)

    def decision_function(self, X):
        """Logits; for two classes those of the second one, the other's being 0.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples,) or (n_samples, n_classes)
        """
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", dtype=FLOATS, reset=False)
        scores = X @ self.coef_.T
        scores += self.intercept_
        return scores[:, 0] if scores.shape[1] == 1 else scores

    def predict(self, X):
        """The class of the largest logit of each row; X as in `decision_function`."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)]

    def predict_proba(self, X):
        """Probabilities of shape (n_samples, n_classes), columns in the order of `classes_`: softmax of the logits."""
        logits = _two_columns(self.decision_function(X))
        return softmax(logits, out=logits)

    def predict_log_proba(self, X):
        """Logarithms of the probabilities, in nats: exact where those round to 0 or 1."""
        logits = _two_columns(self.decision_function(X))
        return log_softmax(logits, out=logits)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


class _Objective:
    """The penalised loss and its gradient by the coefficients, flat, block by block of rows."""

    def __init__(self, X, rows: tuple, loss, n_columns: int, fit_intercept: bool, penalty: float):
        self.loss, self.fit_intercept, self.penalty = loss, fit_intercept, penalty
        self.shape = (X.shape[1] + fit_intercept, n_columns)
        # at least 8 rows a feature: their logits take 8 gradients, the solver keeps 20; with 1 it took 20 % longer
        most = max(BLOCK_LOGITS // n_columns, 8 * X.shape[1])
        n_rows = -(-X.shape[0] // -(-X.shape[0] // most))  # of blocks of one size
        self.product = np.empty((n_rows, n_columns), X.dtype)
        self.logits = np.empty((n_rows, 2), X.dtype) if n_columns == 1 else self.product
        self.ones = np.ones(n_rows, X.dtype)  # a product with it adds rows in a third of the time of a sum
        self.blocks = []
        for first in range(0, X.shape[0], n_rows):
            block = slice(first, min(first + n_rows, X.shape[0]))
            part = [None if array is None else array[block] for array in rows]
            self.blocks.append((_rows_of(X, block), part))

    def __call__(self, flat: np.ndarray) -> tuple[float, np.ndarray]:
        given = flat.reshape(self.shape)
        table, grad = given.astype(self.product.dtype, copy=False), np.zeros(self.shape)
        value = sum(self._add_block(X, rows, table, grad) for X, rows in self.blocks)
        weights = given[: self.shape[0] - self.fit_intercept]
        grad[: len(weights)] += self.penalty * weights
        return value + self.penalty / 2 * np.vdot(weights, weights), grad.ravel()

    def _add_block(self, X, rows: list, table: np.ndarray, grad: np.ndarray) -> float:
        """The loss of some rows; their gradient goes to `grad`."""
        n_rows, n_features = X.shape
        product, logits, binary = self.product[:n_rows], self.logits[:n_rows], self.shape[1] == 1
        if issparse(X):
            product[...] = X @ table[:n_features]
        else:
            np.matmul(X, table[:n_features], out=product)
        if self.fit_intercept:
            product += table[-1]
        if binary:
            logits[:, 0], logits[:, 1] = 0, product[:, 0]
        value, _ = self.loss.value_and_grad(logits, *rows, out=logits)
        if binary:
            product[:, 0] = logits[:, 1]
        grad[:n_features] += (product.T @ X).T  # a third less time than X.T @ product where features are many
        if self.fit_intercept:
            grad[-1] += self.ones[:n_rows] @ product
        return value


def _rows_of(X, block: slice):
    """Rows of a dense or CSR array, without a copy of their values."""
    if not issparse(X):
        return X[block]
    ends = X.indptr[block.start : block.stop + 1]
    stored = slice(ends[0], ends[-1])
    return type(X)((X.data[stored], X.indices[stored], ends - ends[0]), shape=(len(ends) - 1, X.shape[1]))


def _row_weights(sample_weight, class_weight, X, classes, codes) -> np.ndarray | None:
    """Sample weight times class weight of each row; None if all are 1."""
    if sample_weight is None and class_weight is None:
        return None
    weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
    if class_weight is not None:
        with np.errstate(divide="ignore"):  # a class whose rows weigh nothing has the balanced weight inf
            each = compute_class_weight(class_weight, classes=classes, y=classes[codes], sample_weight=weights)
        for label, weight in zip(classes, each, strict=True):
            if not 0 <= weight < np.inf:
                raise ValueError(
                    f"class_weight gives the class {label!r} the weight {weight}; expected 0 <= weight < inf"
                )
        weights = weights * each[codes]
    if not weights.any():
        raise ValueError("all sample weights times class weights are 0; expected at least one that is not")
    return weights


def _read_teacher(teacher_logits, n_rows: int, classes: np.ndarray) -> np.ndarray:
    teacher = check_array(teacher_logits, dtype=FLOATS, order="C", ensure_2d=False, input_name="teacher_logits")
    if len(classes) == 2:
        teacher = _two_columns(teacher)
    if teacher.shape != (n_rows, len(classes)):
        raise ValueError(
            f"teacher_logits has shape {teacher.shape}; expected {(n_rows, len(classes))}, columns for {classes}"
        )
    inputs.warn_if_probabilities(inputs.as_logits(teacher, None, "teacher_logits"))
    return teacher


def _two_columns(scores: np.ndarray) -> np.ndarray:
    """A column z as (0, z)."""
    return scores if scores.ndim == 2 else two_columns(scores, np.zeros_like(scores))


def _printer():
    number = itertools.count(1)

    def show(intermediate_result):
        print(f"SoftmaxClassifier: iteration {next(number)}, objective {intermediate_result.fun:.6f}")

    return show
