"""The NumPy API: one function a loss, the short way to its value; array-likes in, Python floats and arrays out.

`logits` (or `log_probs`), `target`, `sample_weight`, `class_axis` and `n_threads` are what the loss classes of
`ce_fast`, `CrossEntropyLoss` above all, say of them; options and errors likewise. The classes have some more options,
and give gradients.
"""

import functools
import math

import numpy as np

from ce_fast import engine, inputs
from ce_fast.distillation import DistillationLoss
from ce_fast.linear import LinearCrossEntropyLoss
from ce_fast.losses import (
    BCELoss,
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    FocalLoss,
    GeneralizedCrossEntropyLoss,
    KLDivLoss,
    NLLLoss,
    PolyLoss,
    SigmoidFocalLoss,
)


def _make(*options, **more) -> CrossEntropyLoss:
    """The loss of these options: of the last ones, made once."""
    try:
        return _made(*options, **more)
    except TypeError:  # an option that has no hash, of which the loss itself complains
        return CrossEntropyLoss(*options, **more)


_made = functools.lru_cache(maxsize=64, typed=True)(CrossEntropyLoss)


def cross_entropy(
    logits,
    target,
    weight=None,
    *,
    sample_weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    temperature=1.0,
    softcap=None,
    z_loss=0.0,
    class_axis=None,
    n_threads=None,
):
    """Cross-entropy of logits against class indices or class probabilities, in nats: `CrossEntropyLoss`.

    Returns
    -------
    float or ndarray
        An array for reduction="none".

    Examples
    --------
    >>> import ce_fast as ce
    >>> round(ce.cross_entropy([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], [0, 1]), 6)
    0.360645
    """
    make = _make if weight is None else CrossEntropyLoss
    loss = make(
        weight,
        ignore_index,
        reduction,
        label_smoothing,
        temperature=temperature,
        softcap=softcap,
        z_loss=z_loss,
        class_axis=class_axis,
        n_threads=n_threads,
    )
    return loss(logits, target, sample_weight)


def linear_cross_entropy(
    hidden,
    classifier,
    target,
    *,
    bias=None,
    sample_weight=None,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    temperature=1.0,
    softcap=None,
    z_loss=0.0,
    n_threads=None,
):
    """Cross-entropy of hidden @ classifier.T + bias, without all these logits, in nats: `LinearCrossEntropyLoss`.

    Returns
    -------
    float or ndarray
        An array for reduction="none".

    Examples
    --------
    >>> import ce_fast as ce
    >>> round(ce.linear_cross_entropy([[1.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], [0, 1]), 6)
    0.275269
    """
    loss = LinearCrossEntropyLoss(
        weight,
        ignore_index,
        reduction,
        label_smoothing,
        temperature=temperature,
        softcap=softcap,
        z_loss=z_loss,
        n_threads=n_threads,
    )
    return loss(hidden, classifier, target, bias, sample_weight)


def focal_loss(
    logits,
    target,
    weight=None,
    *,
    gamma=2.0,
    alpha=None,
    sample_weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    class_axis=None,
    n_threads=None,
):
    """Focal loss over classes, (1 - p_t)^gamma times the cross-entropy, in nats: `FocalLoss`.

    Returns
    -------
    float or ndarray
        An array for reduction="none".

    Examples
    --------
    >>> import ce_fast as ce
    >>> round(ce.focal_loss([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], [0, 1], gamma=2.0), 6)
    0.051613
    """
    loss = FocalLoss(
        weight,
        ignore_index,
        reduction,
        label_smoothing,
        gamma=gamma,
        alpha=alpha,
        class_axis=class_axis,
        n_threads=n_threads,
    )
    return loss(logits, target, sample_weight)


def poly_loss(
    logits,
    target,
    weight=None,
    *,
    epsilon=1.0,
    sample_weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    class_axis=None,
    n_threads=None,
):
    """Poly-1 loss, the cross-entropy plus epsilon (1 - p_t), in nats: `PolyLoss`.

    Returns
    -------
    float or ndarray
        An array for reduction="none".

    Examples
    --------
    >>> import ce_fast as ce
    >>> round(ce.poly_loss([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], [0, 1]), 6)
    0.65069
    """
    loss = PolyLoss(
        weight,
        ignore_index,
        reduction,
        label_smoothing,
        epsilon=epsilon,
        class_axis=class_axis,
        n_threads=n_threads,
    )
    return loss(logits, target, sample_weight)


def generalized_cross_entropy(
    logits,
    target,
    weight=None,
    *,
    q=0.7,
    sample_weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    class_axis=None,
    n_threads=None,
):
    """Generalized cross-entropy, (1 - p_t^q) / q: `GeneralizedCrossEntropyLoss`.

    Returns
    -------
    float or ndarray
        An array for reduction="none".

    Examples
    --------
    >>> import ce_fast as ce
    >>> round(ce.generalized_cross_entropy([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], [0, 1]), 6)
    0.30881
    """
    loss = GeneralizedCrossEntropyLoss(
        weight,
        ignore_index,
        reduction,
        label_smoothing,
        q=q,
        class_axis=class_axis,
        n_threads=n_threads,
    )
    return loss(logits, target, sample_weight)


def binary_cross_entropy_with_logits(
    logits,
    target,
    weight=None,
    *,
    pos_weight=None,
    sample_weight=None,
    reduction="mean",
    label_smoothing=0.0,
    n_threads=None,
):
    """Binary cross-entropy of logits, for binary and multi-label targets of any shape, in nats: `BCEWithLogitsLoss`.

    Returns
    -------
    float or ndarray
        An array of logits' shape for reduction="none".

    Examples
    --------
    >>> import ce_fast as ce
    >>> round(ce.binary_cross_entropy_with_logits([2.0, -1.0, 0.5], [1, 0, 1]), 6)
    0.304756
    """
    loss = BCEWithLogitsLoss(weight, reduction, pos_weight, label_smoothing=label_smoothing, n_threads=n_threads)
    return loss(logits, target, sample_weight)


def binary_cross_entropy(probs, target, weight=None, *, sample_weight=None, reduction="mean", n_threads=None):
    """Binary cross-entropy of probabilities, logarithms kept at -100 or above, in nats: `BCELoss`.

    Returns
    -------
    float or ndarray
        An array of the shape of `probs` for reduction="none".

    Examples
    --------
    >>> import ce_fast as ce
    >>> round(ce.binary_cross_entropy([0.9, 0.2], [1, 0]), 6)
    0.164252
    """
    return BCELoss(weight, reduction, n_threads=n_threads)(probs, target, sample_weight)


def sigmoid_focal_loss(logits, target, *, alpha=0.25, gamma=2.0, sample_weight=None, reduction="mean", n_threads=None):
    """Focal loss of binary and multi-label targets, in nats: `SigmoidFocalLoss`.

    Returns
    -------
    float or ndarray
        An array of logits' shape for reduction="none".

    Examples
    --------
    >>> import ce_fast as ce
    >>> round(ce.sigmoid_focal_loss([2.0, -1.0, 0.5], [1, 0, 1]), 6)
    0.011446
    """
    return SigmoidFocalLoss(alpha, gamma, reduction, n_threads=n_threads)(logits, target, sample_weight)


def kl_div(
    logits,
    target,
    *,
    sample_weight=None,
    direction="forward",
    log_probs=False,
    temperature=1.0,
    reduction="mean",
    class_axis=None,
    n_threads=None,
):
    """Divergence between the distributions of two arrays of logits, or of log-probabilities, in nats: `KLDivLoss`.

    Returns
    -------
    float or ndarray
        An array, one value a row, for reduction="none".

    Examples
    --------
    >>> import ce_fast as ce
    >>> round(ce.kl_div([[2.0, 0.0]], [[0.0, 0.0]]), 6)
    0.433781
    """
    loss = KLDivLoss(
        reduction,
        direction=direction,
        log_probs=log_probs,
        temperature=temperature,
        class_axis=class_axis,
        n_threads=n_threads,
    )
    return loss(logits, target, sample_weight)


def distillation_loss(
    student_logits,
    teacher_logits,
    *,
    temperature=2.0,
    alpha=None,
    target=None,
    sample_weight=None,
    direction="forward",
    tail="bucket",
    ignore_index=-100,
    reduction="mean",
    class_axis=None,
    n_threads=None,
):
    """A teacher's distribution into a student's, and a target's, in nats: `DistillationLoss`.

    Returns
    -------
    float or ndarray
        An array for reduction="none".

    Examples
    --------
    >>> import ce_fast as ce
    >>> round(ce.distillation_loss([[2.0, 0.0, -1.0]], [[1.0, 1.0, -2.0]], target=[0]), 6)
    0.315461
    """
    loss = DistillationLoss(
        temperature,
        alpha,
        direction=direction,
        tail=tail,
        ignore_index=ignore_index,
        reduction=reduction,
        class_axis=class_axis,
        n_threads=n_threads,
    )
    return loss(student_logits, teacher_logits, target, sample_weight)


def nll_loss(
    log_probs,
    target,
    weight=None,
    *,
    sample_weight=None,
    ignore_index=-100,
    reduction="mean",
    class_axis=None,
):
    """Negative log-likelihood of log-probabilities at the targets, in nats: `NLLLoss`.

    Returns
    -------
    float or ndarray
        An array for reduction="none".

    Examples
    --------
    >>> import numpy as np
    >>> import ce_fast as ce
    >>> round(ce.nll_loss(np.log([[0.5, 0.5], [0.25, 0.75]]), [0, 1]), 6)
    0.490415
    """
    return NLLLoss(weight, ignore_index, reduction, class_axis=class_axis)(log_probs, target, sample_weight)


def perplexity(logits, target, *, sample_weight=None, ignore_index=-100, class_axis=None, n_threads=None) -> float:
    """exp of the mean cross-entropy: how many equally likely classes the model is as unsure as.

    Returns
    -------
    float

    Examples
    --------
    >>> import numpy as np
    >>> import ce_fast as ce
    >>> round(ce.perplexity(np.zeros((3, 8)), [0, 3, 7]), 6)
    8.0
    """
    mean = cross_entropy(
        logits,
        target,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        class_axis=class_axis,
        n_threads=n_threads,
    )
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


def logsumexp(logits, class_axis=None, *, n_threads=None) -> np.ndarray:
    """log(sum_k exp(x_k)) of each row.

    Returns
    -------
    ndarray
        Of logits' shape without the class axis; float64 for float64 logits, else float32. -inf for a row of -inf,
        +inf for a row that holds +inf.

    Examples
    --------
    >>> import ce_fast as ce
    >>> ce.logsumexp([[0.0, 0.0], [1000.0, 0.0]]).round(6)
    array([6.93147e-01, 1.00000e+03])
    """
    axis = inputs.check_class_axis(class_axis)
    return engine.logsumexp(logits, class_axis=axis, n_threads=inputs.check_n_threads(n_threads))


def entropy(logits, class_axis=None, *, temperature=1.0, n_threads=None) -> np.ndarray:
    """-sum(p_k log p_k) of each row, p = softmax(logits / temperature), in nats; log-probabilities are logits too.

    Returns
    -------
    ndarray
        Of logits' shape without the class axis; float64 for float64 logits, else float32.

    Examples
    --------
    >>> import ce_fast as ce
    >>> ce.entropy([[0.0, 0.0], [40.0, 0.0]])
    array([6.93147181e-01, 1.74182524e-16])
    """
    axis, n_threads = inputs.check_class_axis(class_axis), inputs.check_n_threads(n_threads)
    temperature = inputs.check_option("temperature", temperature, 1e-30, 1e30)
    return engine.entropy(logits, class_axis=axis, temperature=temperature, n_threads=n_threads)


def softmax(logits, class_axis=None, *, out=None, n_threads=None) -> np.ndarray:
    """exp(x_k) / sum_j exp(x_j) of each row.

    Parameters
    ----------
    out : ndarray, optional
        Takes the result, and is returned; may be `logits` itself.

    Returns
    -------
    ndarray
        Of logits' shape and dtype. NaN for a row that holds +inf, or nothing but -inf.

    Examples
    --------
    >>> import ce_fast as ce
    >>> ce.softmax([[0.0, 0.0], [1000.0, 0.0]])
    array([[0.5, 0.5],
           [1. , 0. ]])
    """
    return _transform("gradient", logits, class_axis, out, n_threads)


def log_softmax(logits, class_axis=None, *, out=None, n_threads=None) -> np.ndarray:
    """x_k - log(sum_j exp(x_j)) of each row; exact also where the probability is near 1.

    Parameters
    ----------
    out : ndarray, optional
        Takes the result, and is returned; may be `logits` itself.

    Returns
    -------
    ndarray
        Of logits' shape and dtype. NaN for a row that holds +inf, or nothing but -inf.

    Examples
    --------
    >>> import ce_fast as ce
    >>> ce.log_softmax([[0.0, 0.0], [40.0, 0.0]])
    array([[-6.93147181e-01, -6.93147181e-01],
           [-4.24835426e-18, -4.00000000e+01]])
    """
    return _transform("log_softmax", logits, class_axis, out, n_threads)


def _transform(what, logits, class_axis, out, n_threads):
    axis = inputs.check_class_axis(class_axis)
    return engine.transform(what, logits, class_axis=axis, n_threads=inputs.check_n_threads(n_threads), out=out)
