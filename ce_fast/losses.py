"""The losses: frozen options, checked once; value and gradient.

Each class holds the options of one loss and is what every adapter uses underneath.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ce_fast import engine, inputs
from ce_fast.reduction import DENOMINATORS, REDUCTIONS

SMOOTHINGS = ("uniform", "others")


@dataclass(frozen=True, eq=False)
class _Loss:
    """The options every loss over classes has, and their checks."""

    weight: np.ndarray | None = None
    ignore_index: int = -100
    reduction: str = "mean"
    denominator: str | float = "weight"
    class_axis: int | None = None
    _negative_weight: ClassVar[bool] = False

    def _set(self, **checked) -> None:
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # frozen from here on

    def _check_common(self, denominator, class_axis) -> None:
        if isinstance(denominator, str):
            inputs.check_choice("denominator", denominator, DENOMINATORS)
        else:
            denominator = inputs.check_option("denominator", denominator, 0.0, above=True)
        self._set(
            weight=inputs.as_class_weight(self.weight, negative=self._negative_weight),
            ignore_index=inputs.check_ignore_index(self.ignore_index),
            reduction=inputs.check_choice("reduction", self.reduction, REDUCTIONS),
            denominator=denominator,
            class_axis=inputs.check_class_axis(class_axis),
        )


@dataclass(frozen=True, eq=False)
class CrossEntropyLoss(_Loss):
    r"""Cross-entropy of logits against class indices or class probabilities.

    With :math:`lse_i = \log\sum_k e^{z_{ik}}`, class weights :math:`w`, sample weights :math:`s`, smoothing
    :math:`\epsilon` and K classes, the loss of row i with target t is, in nats,

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
    computed in float32. A row whose sample weight is 0 is not read. A mean over nothing is NaN, its gradient 0.

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

    label_smoothing: float = 0.0
    smoothing: str = "uniform"
    z_loss: float = 0.0
    n_threads: int | None = None

    def __init__(
        self,
        weight=None,
        ignore_index=-100,
        reduction="mean",
        label_smoothing=0.0,
        *,
        smoothing="uniform",
        z_loss=0.0,
        denominator="weight",
        class_axis=None,
        n_threads=None,
    ):
        self._set(weight=weight, ignore_index=ignore_index, reduction=reduction)
        self._check_common(denominator, class_axis)
        self._set(
            label_smoothing=inputs.check_option("label_smoothing", label_smoothing, 0.0, 1.0),
            smoothing=inputs.check_choice("smoothing", smoothing, SMOOTHINGS),
            z_loss=inputs.check_option("z_loss", z_loss, 0.0),
            n_threads=inputs.check_n_threads(n_threads),
        )

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
        """
        value, _ = engine.softmax_loss(self, logits, target, sample_weight)
        return value

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
        return engine.softmax_loss(self, logits, target, sample_weight, gradient=True, out=out, upstream=upstream)


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

    def __init__(self, weight=None, ignore_index=-100, reduction="mean", *, denominator="weight", class_axis=None):
        self._set(weight=weight, ignore_index=ignore_index, reduction=reduction)
        self._check_common(denominator, class_axis)

    def __call__(self, log_probs, target, sample_weight=None):
        """The loss of log-probabilities against class indices; arguments, result and errors as in `CrossEntropyLoss`.

        Class probabilities as target are a TypeError.
        """
        value, _ = engine.picked_loss(self, log_probs, target, sample_weight)
        return value

    def value_and_grad(self, log_probs, target, sample_weight=None, *, out=None, upstream=None):
        """The loss and its gradient by `log_probs`; arguments, results and errors as in `CrossEntropyLoss`."""
        return engine.picked_loss(self, log_probs, target, sample_weight, gradient=True, out=out, upstream=upstream)
