"""The losses: frozen options, checked once; value, gradient, Hessian.

Each class holds the options of one loss and is what every adapter uses underneath.
"""

from dataclasses import KW_ONLY, dataclass, field
from numbers import Real
from typing import Any, ClassVar

import numpy as np

from ce_fast import engine, inputs
from ce_fast.engine import Ask
from ce_fast.inputs import Logits
from ce_fast.reduction import DENOMINATORS, REDUCTIONS

SMOOTHINGS = ("uniform", "others")
DIRECTIONS = ("forward", "reverse")


class _Options:
    """Frozen dataclasses that replace what they were given by what was checked."""

    _no_hessian: ClassVar[str] = "its second derivatives may be negative"

    def _set(self, **checked) -> None:
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # frozen from here on

    def _refuse_hessian(self, why: str | None = None):
        raise NotImplementedError(f"{type(self).__name__} has no positive diagonal Hessian: {why or self._no_hessian}")


def _check_denominator(denominator) -> str | float:
    if isinstance(denominator, str):
        return inputs.check_choice("denominator", denominator, DENOMINATORS)
    return inputs.check_option("denominator", denominator, 0.0, above=True)


def _check_temperature(temperature) -> float:
    return inputs.check_option("temperature", temperature, 1e-30, 1e30)


def _check_softcap(softcap) -> float | None:
    return None if softcap is None else inputs.check_option("softcap", softcap, 1e-30, 1e30)


@dataclass(frozen=True, eq=False)
class _Loss(_Options):
    """The options every loss over classes has, and their checks."""

    weight: np.ndarray | None = None
    ignore_index: int = -100
    reduction: str = "mean"
    _: KW_ONLY
    denominator: str | float = "weight"
    class_axis: int | None = None
    _negative_weight: ClassVar[bool] = False
    check_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._set(
            weight=inputs.as_class_weight(self.weight, negative=self._negative_weight),
            ignore_index=inputs.check_ignore_index(self.ignore_index),
            reduction=inputs.check_choice("reduction", self.reduction, REDUCTIONS),
            denominator=_check_denominator(self.denominator),
            class_axis=inputs.check_class_axis(self.class_axis),
        )


@dataclass(frozen=True, eq=False)
class _SoftmaxLoss(_Loss):
    """sum_k mass_k f(lse - z_k) of each row, f being the rule: what all losses of that form share."""

    label_smoothing: float = 0.0
    _: KW_ONLY
    smoothing: str = "uniform"
    temperature: float = 1.0
    softcap: float | None = None
    z_loss: float = 0.0
    n_threads: int | None = None
    common: bool = field(init=False, repr=False)
    rule: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(
            label_smoothing=inputs.check_option("label_smoothing", self.label_smoothing, 0.0, 1.0),
            smoothing=inputs.check_choice("smoothing", self.smoothing, SMOOTHINGS),
            temperature=_check_temperature(self.temperature),
            softcap=_check_softcap(self.softcap),
            z_loss=inputs.check_option("z_loss", self.z_loss, 0.0),
            n_threads=inputs.check_n_threads(self.n_threads),
        )
        self._set(common=self._is_common())

    def _is_common(self) -> bool:
        """Whether nothing but `ignore_index` is asked for: small calls are then quicker."""
        plain = self.rule == "cross_entropy" and self.weight is None and self.label_smoothing == 0 and self.z_loss == 0
        mean = self.reduction == "mean" and self.denominator in ("weight", "count")
        return plain and mean and self.softcap is None and self.temperature == 1 and self.class_axis in (None, -1, 1)

    @property
    def parameter(self) -> float:
        """The number of the rule."""
        return 0.0

    @property
    def wide(self) -> bool:
        """Whether float32 logits are computed in float64: a softcap rounds z, which exp magnifies."""
        return self.softcap is not None

    def mass_weight(self, logits: Logits) -> np.ndarray | None:
        """What multiplies the target distribution, class by class."""
        return self.weight

    def masses(self, n_classes: int, soft: bool) -> tuple[float, float]:
        """(on, off): the target distribution is on * q + off, q one-hot for class indices."""
        eps = self.label_smoothing
        if self.smoothing == "uniform":
            return 1.0 - eps, eps / n_classes
        if soft:
            raise ValueError("smoothing='others' with class probabilities: they name no target to leave out")
        if n_classes == 1:
            raise ValueError("smoothing='others' needs at least 2 classes; logits have 1")
        off = eps / (n_classes - 1)
        return (1.0 - eps) - off, off

    def __call__(self, logits, target, sample_weight=None):
        """The loss.

        Parameters
        ----------
        logits : array_like
            Shape (n_rows, n_classes), or any shape with `class_axis`; any strides.
        target : array_like
            Class indices, of any integer dtype and logits' shape without the class axis; or class probabilities, of a
            floating dtype and logits' shape.
        sample_weight : array_like, optional
            Of the shape of the class indices, finite and not negative; a boolean array is a mask.

        Returns
        -------
        float or ndarray
            In nats; for reduction="none" an array of the compute dtype (float64 for float64 logits, else float32).

        Raises
        ------
        IndexError
            If a target is neither a class nor `ignore_index`.
        ValueError, TypeError
            If a shape, dtype or value does not fit.

        Warns
        -----
        UserWarning
            If the logits look like probabilities.
        """
        return engine.softmax_loss(self, logits, target, sample_weight)[0]

    def value_and_grad(self, logits, target, sample_weight=None, *, out=None, upstream=None):
        """The loss and its gradient by the logits, in one pass.

        Parameters
        ----------
        logits, target, sample_weight
            As in a call.
        out : ndarray, optional
            Takes the gradient, and is returned. Of logits' shape and dtype; may be `logits` itself (in place), and
            must not overlap any other argument.
        upstream : array_like, optional
            The gradient of something by this loss: a number, or for reduction="none" one value a row. The result is
            then the vector-Jacobian product.

        Returns
        -------
        value : float or ndarray
            As in a call.
        grad : ndarray
            Of logits' shape and dtype: the gradient of the reduced loss, or for reduction="none" of the sum.

        Raises
        ------
        IndexError, ValueError, TypeError
            As in a call, and if `out` or `upstream` does not fit.
        """
        ask = engine.GRADIENT if out is None and upstream is None else Ask(True, False, out, upstream)
        return engine.softmax_loss(self, logits, target, sample_weight, ask)[:2]

    def grad_and_hess(self, logits, target, sample_weight=None):
        r"""The gradient and a positive diagonal Hessian of the reduced loss by the logits, for gradient boosting.

        Parameters
        ----------
        logits, target, sample_weight
            As in a call.

        Returns
        -------
        grad, hess : ndarray
            Of logits' shape and dtype. With :math:`s_k` the derivative of the loss of class k by its :math:`-\log p_k`,
            hess is :math:`\sum_j mass_j s_j \, p_k (1 - p_k)\, (dz_k/dx_k)^2`: the exact diagonal where all
            :math:`s_k` are constant (cross-entropy), elsewhere without what curves downwards. At least 1e-16 (2^-24
            for float16) in rows that count, 0 in others.

        Raises
        ------
        NotImplementedError
            With options for which it is not positive.
        IndexError, ValueError, TypeError
            As in a call.
        """
        if self.z_loss:
            self._refuse_hessian("z_loss adds terms of the sign of lse")
        return engine.softmax_loss(self, logits, target, sample_weight, Ask(True, True))[1:]


@dataclass(frozen=True, eq=False)
class CrossEntropyLoss(_SoftmaxLoss):
    r"""Cross-entropy of logits against class indices or class probabilities.

    With z = logits / temperature (of logits capped by `softcap`), :math:`lse_i = \log\sum_k e^{z_{ik}}`, class weights
    :math:`w`, sample weights :math:`s`, smoothing :math:`\epsilon` and K classes, the loss of row i with target t is,
    in nats,

    .. math::

        l_i = s_i \Big[(1-\epsilon) w_t (lse_i - z_{it}) + \frac{\epsilon}{K} \sum_k w_k (lse_i - z_{ik})
              + \lambda w_t\, lse_i^2 \Big]

    and for class probabilities q, with :math:`q' = (1-\epsilon) q + \epsilon/K`,

    .. math:: l_i = s_i \Big[\sum_k w_k q'_{ik} (lse_i - z_{ik}) + \lambda\, lse_i^2\Big].

    Parameters
    ----------
    weight : array_like of shape (n_classes,), optional
        Class weights w, finite and not negative.
    ignore_index : int, default=-100
        Rows with this target do not count: loss 0, gradient 0, whatever their logits hold.
    reduction : {"mean", "sum", "none"}, default="mean"
        "mean" divides the sum by `denominator`; "none" gives an array of the shape of the class indices.
    label_smoothing : float in [0, 1], default=0.0
        :math:`\epsilon`.
    smoothing : {"uniform", "others"}, default="uniform"
        "uniform" spreads :math:`\epsilon` over all K classes, as torch does. "others" gives
        :math:`\epsilon/(K-1)` to each class but the target; it needs class indices and K > 1.
    temperature : float, default=1.0
        Divides the logits.
    softcap : float, optional
        z = softcap * tanh(logits / softcap), before the temperature (Gemma 2, arXiv:2408.00118, section 2).
    z_loss : float, default=0.0
        :math:`\lambda`, the weight of the squared log-partition (PaLM, arXiv:2204.02311, section 5).
    denominator : {"weight", "count", "total"} or float, default="weight"
        What a mean divides by: the sum of :math:`s_i w_t` over the rows that count (torch), their number, the number
        of all rows, or a positive number (for gradient accumulation). With class probabilities "weight" is the sum
        of :math:`s_i`.
    class_axis : int, optional
        The axis of the classes. None is the last one, for logits of at most two dimensions.
    n_threads : int, optional
        None obeys OMP_NUM_THREADS, threadpoolctl, CPU affinity and the control group; a number is taken as given.

    Raises
    ------
    ValueError, TypeError
        If an option is out of its range or of the wrong type.

    Notes
    -----
    Logits are float64, float32, float16 or bfloat16 (`ml_dtypes.bfloat16`); 16-bit logits are read as they are and
    computed in float32, with a softcap in float64. A row whose sample weight is 0 is not read. A mean over nothing is
    NaN, its gradient 0.

    Examples
    --------
    >>> import numpy as np
    >>> import ce_fast as ce
    >>> logits = np.array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    >>> loss = ce.CrossEntropyLoss(label_smoothing=0.1)
    >>> round(loss(logits, [0, 1]), 6)
    0.477312
    >>> value, grad = loss.value_and_grad(logits, [0, 1])
    >>> grad.round(3)
    array([[-0.045,  0.04 ,  0.004],
           [ 0.089, -0.179,  0.089]])
    """

    rule = "cross_entropy"


@dataclass(frozen=True, eq=False)
class FocalLoss(_SoftmaxLoss):
    r"""Focal loss over classes: :math:`l_i = s_i\, \alpha_t w_t (1 - p_t)^\gamma (-\log p_t)`, in nats.

    With class probabilities or smoothing it is :math:`\sum_k \alpha_k w_k q'_k (1 - p_k)^\gamma (-\log p_k)`. Lin et
    al., "Focal loss for dense object detection", arXiv:1708.02002; with gamma=0 it is the cross-entropy.

    Parameters
    ----------
    gamma : float, default=2.0
        At least 0.
    alpha : float or array_like of shape (n_classes,), optional
        Multiplies the class weights, but is not in the denominator of a mean. Finite and not negative.
    **options
        All those of `CrossEntropyLoss`, in the same order.

    Raises
    ------
    ValueError, TypeError
        If an option is out of its range or of the wrong type.

    Notes
    -----
    Computed from -log p, p and 1 - p of the target, each free of cancellation: loss and gradient are finite for all
    finite logits and every gamma.

    Examples
    --------
    >>> import ce_fast as ce
    >>> round(ce.FocalLoss(gamma=2.0)([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], [0, 1]), 6)
    0.051613
    """

    _: KW_ONLY
    gamma: float = 2.0
    alpha: float | np.ndarray | None = None
    rule = "focal"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(gamma=inputs.check_option("gamma", self.gamma, 0.0))
        if isinstance(self.alpha, Real):
            self._set(alpha=inputs.check_option("alpha", self.alpha, 0.0))
        else:
            self._set(alpha=inputs.as_class_weight(self.alpha, name="alpha"))

    @property
    def parameter(self) -> float:
        return self.gamma

    def mass_weight(self, logits: Logits) -> np.ndarray | None:
        if self.alpha is None:
            return self.weight
        alpha = np.full(logits.n_classes, self.alpha) if isinstance(self.alpha, float) else self.alpha
        inputs.check_weight(alpha, logits, "alpha")
        weight = alpha if self.weight is None else self.weight * alpha
        inputs.check_weight(weight, logits, "alpha * weight")
        return weight


@dataclass(frozen=True, eq=False)
class PolyLoss(_SoftmaxLoss):
    r"""Poly-1 loss: :math:`l_i = s_i w_t [-\log p_t + \epsilon_1 (1 - p_t)]`, in nats.

    With class probabilities or smoothing, the sum over classes of that times :math:`w_k q'_k`. Leng et al.,
    "PolyLoss: a polynomial expansion perspective of classification loss functions", arXiv:2204.12511.

    Parameters
    ----------
    epsilon : float, default=1.0
        :math:`\epsilon_1`, of any sign; 0 gives the cross-entropy.
    **options
        All those of `CrossEntropyLoss`, in the same order.

    Raises
    ------
    ValueError, TypeError
        If an option is out of its range or of the wrong type.

    Examples
    --------
    >>> import ce_fast as ce
    >>> round(ce.PolyLoss(epsilon=1.0)([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], [0, 1]), 6)
    0.65069
    """

    _: KW_ONLY
    epsilon: float = 1.0
    rule = "poly"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(epsilon=inputs.check_option("epsilon", self.epsilon, -1e30, 1e30))

    @property
    def parameter(self) -> float:
        return self.epsilon

    def grad_and_hess(self, logits, target, sample_weight=None):
        """As `CrossEntropyLoss.grad_and_hess`; epsilon must be at least -1."""
        if self.epsilon < -1:
            self._refuse_hessian(f"epsilon is {self.epsilon}, and 1 + epsilon p may be negative")
        return super().grad_and_hess(logits, target, sample_weight)


@dataclass(frozen=True, eq=False)
class GeneralizedCrossEntropyLoss(_SoftmaxLoss):
    r"""Generalized cross-entropy: :math:`l_i = s_i w_t (1 - p_t^q) / q`, robust against wrong labels.

    With class probabilities or smoothing, the sum over classes of that times :math:`w_k q'_k`. Zhang and Sabuncu,
    "Generalized cross entropy loss for training deep neural networks with noisy labels", arXiv:1805.07836.

    Parameters
    ----------
    q : float in (0, 1], default=0.7
        Towards 0 it is the cross-entropy, at 1 the mean absolute error 1 - p_t.
    **options
        All those of `CrossEntropyLoss`, in the same order.

    Raises
    ------
    ValueError, TypeError
        If an option is out of its range or of the wrong type.

    Examples
    --------
    >>> import ce_fast as ce
    >>> round(ce.GeneralizedCrossEntropyLoss(q=0.7)([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], [0, 1]), 6)
    0.30881
    """

    _: KW_ONLY
    q: float = 0.7
    rule = "generalized"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(q=inputs.check_option("q", self.q, 0.0, 1.0, above=True))

    @property
    def parameter(self) -> float:
        return self.q


@dataclass(frozen=True, eq=False)
class KLDivLoss(_Options):
    r"""Kullback-Leibler divergence between softmax distributions, in nats.

    With p = softmax(z) of the logits and q = softmax of the target's, both divided by the temperature,

    .. math:: l_i = s_i \sum_k q_k (\log q_k - \log p_k) \quad\text{("forward")},\qquad
              l_i = s_i \sum_k p_k (\log p_k - \log q_k) \quad\text{("reverse")}.

    Parameters
    ----------
    reduction : {"mean", "sum", "none"}, default="mean"
        Over rows: "mean" is torch's "batchmean"; "none" gives one value a row.
    direction : {"forward", "reverse"}, default="forward"
        KL(q || p), or KL(p || q).
    log_probs : bool, default=False
        Both arrays are log-probabilities, taken as they are: nothing is normalised, and the gradient is by the
        log-probabilities (torch's `kl_div` with `log_target=True`).
    temperature : float, default=1.0
        Divides both; the loss is not multiplied by its square (`DistillationLoss` does that).
    softcap : float, optional
        Of `logits` only, as in `CrossEntropyLoss`.
    denominator, class_axis, n_threads
        As in `CrossEntropyLoss`.

    Raises
    ------
    ValueError, TypeError
        If an option is out of its range or of the wrong type.

    Notes
    -----
    Computed in float64 whatever the dtype, for its terms nearly cancel where p is close to q. Neither softmax is made.
    A class with q = 0 (forward) or p = 0 (reverse) contributes 0. The target gets no gradient.

    Examples
    --------
    >>> import ce_fast as ce
    >>> round(ce.KLDivLoss()([[2.0, 0.0]], [[0.0, 0.0]]), 6)
    0.433781
    >>> ce.KLDivLoss(direction="reverse").value_and_grad([[2.0, 0.0]], [[0.0, 0.0]])[1].round(6)
    array([[ 0.209987, -0.209987]])
    """

    reduction: str = "mean"
    _: KW_ONLY
    direction: str = "forward"
    log_probs: bool = False
    temperature: float = 1.0
    softcap: float | None = None
    denominator: str | float = "weight"
    class_axis: int | None = None
    n_threads: int | None = None
    wide: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._set(
            reduction=inputs.check_choice("reduction", self.reduction, REDUCTIONS),
            direction=inputs.check_choice("direction", self.direction, DIRECTIONS),
            temperature=_check_temperature(self.temperature),
            softcap=_check_softcap(self.softcap),
            denominator=_check_denominator(self.denominator),
            class_axis=inputs.check_class_axis(self.class_axis),
            n_threads=inputs.check_n_threads(self.n_threads),
        )
        if not isinstance(self.log_probs, bool):
            raise TypeError(f"log_probs is {self.log_probs!r}; expected True or False")
        if self.log_probs and (self.temperature != 1 or self.softcap is not None):
            raise ValueError("log_probs=True takes them as they are; temperature and softcap are for logits")

    @property
    def rule(self) -> str:
        return f"kl_{self.direction}"

    def __call__(self, logits, target, sample_weight=None):
        """The divergence.

        Parameters
        ----------
        logits, target : array_like
            Of one shape and any floating dtypes: logits of p and of q, or their logarithms with `log_probs`.
        sample_weight : array_like, optional
            Of logits' shape without the class axis; a boolean array is a mask.

        Returns
        -------
        float or ndarray
            As in `CrossEntropyLoss`.

        Raises
        ------
        ValueError, TypeError
            If a shape, dtype or value does not fit.
        """
        return engine.divergence_loss(self, logits, target, sample_weight)[0]

    def value_and_grad(self, logits, target, sample_weight=None, *, out=None, upstream=None):
        """The divergence and its gradient by `logits`; arguments and results as in `CrossEntropyLoss`."""
        return engine.divergence_loss(self, logits, target, sample_weight, Ask(True, False, out, upstream))[:2]

    def grad_and_hess(self, logits, target, sample_weight=None):
        """The gradient and the diagonal Hessian p (1 - p); the forward divergence of logits alone has one."""
        if self.direction == "reverse" or self.log_probs:
            self._refuse_hessian("that of KL(p || q) has no sign" if self.direction == "reverse" else "it is 0")
        return engine.divergence_loss(self, logits, target, sample_weight, Ask(True, True))[1:]


@dataclass(frozen=True, eq=False)
class NLLLoss(_Loss):
    r"""Negative log-likelihood of log-probabilities: :math:`l_i = -s_i w_t \log p_{it}`, in nats.

    Parameters
    ----------
    weight, ignore_index, reduction, denominator, class_axis
        As in `CrossEntropyLoss`.

    Examples
    --------
    >>> import numpy as np
    >>> import ce_fast as ce
    >>> round(ce.NLLLoss()(np.log([[0.5, 0.5], [0.25, 0.75]]), [0, 1]), 6)
    0.490415
    """

    _no_hessian: ClassVar[str] = "it is linear in the log-probabilities"

    def __call__(self, log_probs, target, sample_weight=None):
        """The loss of log-probabilities against class indices; arguments, result and errors as in `CrossEntropyLoss`.

        Class probabilities as target are a TypeError.
        """
        return engine.picked_loss(self, log_probs, target, sample_weight)[0]

    def value_and_grad(self, log_probs, target, sample_weight=None, *, out=None, upstream=None):
        """The loss and its gradient by `log_probs`; arguments, results and errors as in `CrossEntropyLoss`."""
        return engine.picked_loss(self, log_probs, target, sample_weight, Ask(True, False, out, upstream))

    def grad_and_hess(self, log_probs, target, sample_weight=None):
        """NotImplementedError: the loss is linear."""
        self._refuse_hessian()


class _BinaryLoss(_Options):
    """A loss of each element, target between 0 and 1: what they share."""

    reduction: str
    n_threads: int | None
    rule: ClassVar[str]
    wide: ClassVar[bool] = False
    input_name: ClassVar[str] = "logits"
    check_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._set(
            reduction=inputs.check_choice("reduction", self.reduction, REDUCTIONS),
            n_threads=inputs.check_n_threads(self.n_threads),
        )

    def fields(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """The options of an `ElementJob` on logits of this shape."""
        raise NotImplementedError

    def __call__(self, logits, target, sample_weight=None):
        """The loss.

        Parameters
        ----------
        logits : array_like
            Of any shape and strides (probabilities for `BCELoss`).
        target : array_like
            Of logits' shape and any real or boolean dtype, between 0 and 1.
        sample_weight : array_like, optional
            Of logits' shape or of its leading axes, finite and not negative; a boolean array is a mask.

        Returns
        -------
        float or ndarray
            In nats. A mean is over all elements, with sample weights divided by their sum; reduction="none" gives an
            array of logits' shape (float64 for float64 logits, else float32).

        Raises
        ------
        ValueError, TypeError
            If a shape, dtype or value does not fit.
        """
        return engine.element_loss(self, logits, target, sample_weight)[0]

    def value_and_grad(self, logits, target, sample_weight=None, *, out=None, upstream=None):
        """The loss and its gradient by `logits`; arguments and results as in `CrossEntropyLoss`, element by element."""
        return engine.element_loss(self, logits, target, sample_weight, Ask(True, False, out, upstream))[:2]

    def grad_and_hess(self, logits, target, sample_weight=None):
        """The gradient and a positive Hessian of each element, floored as in `CrossEntropyLoss`."""
        return engine.element_loss(self, logits, target, sample_weight, Ask(True, True))[1:]


@dataclass(frozen=True, eq=False)
class _BinaryEntropy(_BinaryLoss):
    """Binary cross-entropy, of logits or of probabilities."""

    weight: np.ndarray | None = None
    reduction: str = "mean"
    pos_weight: np.ndarray | None = None
    _: KW_ONLY
    label_smoothing: float = 0.0
    n_threads: int | None = None
    _negative_weight: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(
            weight=inputs.as_binary_weight(self.weight, "weight", negative=self._negative_weight),
            pos_weight=inputs.as_binary_weight(self.pos_weight, "pos_weight", negative=self._negative_weight),
            label_smoothing=inputs.check_option("label_smoothing", self.label_smoothing, 0.0, 1.0),
        )

    def fields(self, shape: tuple[int, ...]) -> dict[str, Any]:
        return {
            "weight": inputs.as_operand(self.weight, shape, "weight"),
            "pos_weight": inputs.as_operand(self.pos_weight, shape, "pos_weight"),
            "on": 1 - self.label_smoothing,
            "off": self.label_smoothing / 2,
        }


@dataclass(frozen=True, eq=False)
class BCEWithLogitsLoss(_BinaryEntropy):
    r"""Binary cross-entropy of logits, for binary and multi-label targets, of any shape.

    .. math::

        l = s\, w\, [(1 - y')\, \mathrm{softplus}(z) + \pi\, y'\, \mathrm{softplus}(-z)],
        \qquad y' = (1-\epsilon) y + \epsilon / 2

    with :math:`\pi` = `pos_weight` and softplus(z) = log(1 + exp(z)), in nats.

    Parameters
    ----------
    weight : array_like, optional
        w; broadcasts to the shape of the logits. Finite and not negative.
    reduction : {"mean", "sum", "none"}, default="mean"
        A mean is over elements; w is not in its denominator, sample weights are.
    pos_weight : array_like, optional
        :math:`\pi`, a number or one a class (the last axis); broadcasts to the shape of the logits.
    label_smoothing : float in [0, 1], default=0.0
        :math:`\epsilon`.
    n_threads : int, optional
        As in `CrossEntropyLoss`.

    Raises
    ------
    ValueError, TypeError
        If an option is out of its range or of the wrong type.

    Notes
    -----
    Exact at both ends: a logit of +inf with y = 1, or of -inf with y = 0, has loss 0.

    Examples
    --------
    >>> import ce_fast as ce
    >>> round(ce.BCEWithLogitsLoss(pos_weight=3.0)([2.0, -1.0, 0.5], [1, 0, 1]), 6)
    0.705426
    """

    rule = "binary"


@dataclass(frozen=True, eq=False)
class BCELoss(_BinaryEntropy):
    r"""Binary cross-entropy of probabilities: :math:`l = -s\,w\,[y \log x + (1 - y) \log(1 - x)]`, in nats.

    Where there are logits, `BCEWithLogitsLoss` is exact; here the digits of a probability near 1 are gone, and so
    logarithms are kept at -100 or above and the gradient divides by x (1 - x) of at least 1e-12, as torch does.

    Parameters
    ----------
    weight, reduction, pos_weight, label_smoothing, n_threads
        As in `BCEWithLogitsLoss`.

    Raises
    ------
    ValueError, TypeError
        If an option is out of its range or of the wrong type; in a call, if a probability is outside [0, 1].

    Examples
    --------
    >>> import ce_fast as ce
    >>> round(ce.BCELoss()([0.9, 0.2], [1, 0]), 6)
    0.164252
    """

    rule = "binary_probability"
    input_name = "probs"

    def grad_and_hess(self, logits, target, sample_weight=None):
        """NotImplementedError: boosting works on logits; `BCEWithLogitsLoss` has both."""
        self._refuse_hessian("take BCEWithLogitsLoss, of logits")


@dataclass(frozen=True, eq=False)
class SigmoidFocalLoss(_BinaryLoss):
    r"""Focal loss of binary and multi-label targets, in nats (Lin et al., arXiv:1708.02002; torchvision's definition).

    .. math::

        l = s\, [\alpha y + (1 - \alpha)(1 - y)]\, u^\gamma\, \mathrm{BCE}(z, y),
        \qquad u = y (1 - p) + (1 - y) p,\quad p = \sigma(z)

    Parameters
    ----------
    alpha : float in [0, 1], optional, default=0.25
        None for no weights.
    gamma : float, default=2.0
        At least 0; with gamma=0 and alpha=None it is the binary cross-entropy.
    reduction, n_threads
        As in `BCEWithLogitsLoss`.

    Raises
    ------
    ValueError, TypeError
        If an option is out of its range or of the wrong type.

    Notes
    -----
    Computed in float64 and from log u: finite for every finite logit and every gamma.

    Examples
    --------
    >>> import ce_fast as ce
    >>> round(ce.SigmoidFocalLoss()([2.0, -1.0, 0.5], [1, 0, 1]), 6)
    0.011446
    """

    alpha: float | None = 0.25
    gamma: float = 2.0
    reduction: str = "mean"
    _: KW_ONLY
    n_threads: int | None = None
    rule = "binary_focal"
    wide = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(
            alpha=None if self.alpha is None else inputs.check_option("alpha", self.alpha, 0.0, 1.0),
            gamma=inputs.check_option("gamma", self.gamma, 0.0),
        )

    def fields(self, shape: tuple[int, ...]) -> dict[str, Any]:
        return {"alpha": self.alpha, "gamma": self.gamma}
