"""The NumPy API: one function a loss, the short way to its value; array-likes in, Python floats and arrays out.

`logits` (or `log_probs`), `target`, `sample_weight`, `class_axis` and `n_threads` are what `ce_fast.CrossEntropyLoss`
says of them; errors likewise.
"""

import math

import numpy as np

from ce_fast import engine, inputs
from ce_fast.losses import CrossEntropyLoss, NLLLoss


def cross_entropy(
    logits,
    target,
    weight=None,
    *,
    sample_weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    class_axis=None,
    n_threads=None,
):
    """Cross-entropy of logits against class indices or class probabilities, in nats.

    The options are those of `CrossEntropyLoss`, which has some more and gives the gradient.

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
    loss = CrossEntropyLoss(
        weight, ignore_index, reduction, label_smoothing, class_axis=class_axis, n_threads=n_threads
    )
    return loss(logits, target, sample_weight)


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
    """Negative log-likelihood of log-probabilities at the targets, in nats.

    The options are those of `NLLLoss`.

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
