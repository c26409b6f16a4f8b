"""Calibration: whether classes come true as often as their probabilities say, and the temperature that sees to it.

Sums over bins of confidences are all that is kept, and those of parts of the data add up to those of the whole.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ce_fast import engine, inputs
from ce_fast.backends import Rows
from ce_fast.inputs import Logits
from ce_fast.losses import CrossEntropyLoss
from ce_fast.plan import row_blocks

KINDS = ("top_label", "class_wise")
STRATEGIES = ("uniform", "quantile")
NORMS = ("l1", "l2", "max")
BLOCK = 1 << 18  # confidences at a time: 2 MiB of float64
MOST_LOG_T = math.log(1e30)  # what a loss takes as its temperature


@dataclass(frozen=True, slots=True)
class Bins:
    """What falls into each bin, of shape (n_curves, n_bins): one curve of the top labels, or one for each class."""

    weight: np.ndarray  # sum of the sample weights
    confidence: np.ndarray  # of weight times confidence
    correct: np.ndarray  # of the weights of the samples that are of the class

    def __add__(self, other: "Bins") -> "Bins":
        if self.weight.shape != other.weight.shape:
            raise ValueError(f"bins have shapes {self.weight.shape} and {other.weight.shape}; expected the same")
        return Bins(self.weight + other.weight, self.confidence + other.confidence, self.correct + other.correct)

    def curve(self, k: int) -> "Bins":
        """Curve k alone."""
        return Bins(self.weight[k : k + 1], self.confidence[k : k + 1], self.correct[k : k + 1])

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean confidence, frequency) of the bins that are not empty, in the order of the bins."""
        full = self.weight > 0
        return self.confidence[full] / self.weight[full], self.correct[full] / self.weight[full]

    def error(self, norm: str) -> float:
        """The calibration error; NaN of nothing."""
        mass = self.weight[self.weight > 0]
        if not mass.size:
            return math.nan
        confidence, frequency = self.points()
        gap = np.abs(frequency - confidence)
        if norm == "max":
            return float(gap.max())
        share = mass / mass.sum()
        return float(share @ gap) if norm == "l1" else math.sqrt(share @ gap**2)


@dataclass(frozen=True, slots=True)
class Binning:
    """How confidences are put into bins: options, checked once."""

    n_bins: int = 15
    strategy: str = "uniform"
    kind: str = "top_label"

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_bins", inputs.check_integer("n_bins", self.n_bins))
        if self.n_bins < 1:
            raise ValueError(f"n_bins is {self.n_bins}; expected at least 1")
        inputs.check_choice("strategy", self.strategy, STRATEGIES)
        inputs.check_choice("kind", self.kind, KINDS)

    def bins(
        self,
        values: np.ndarray,  # (outer..., n_classes) what rises with the confidence in a class
        target: np.ndarray,  # (n_rows,) the class
        weight: np.ndarray,  # (n_rows,) at least 0; rows of weight 0 do not count
        confidence: Callable[[np.ndarray], np.ndarray] = np.asarray,  # of (n_rows, n) values
        top: tuple[np.ndarray, np.ndarray] | None = None,  # `largest` of the values, if it is known
    ) -> Bins:
        """The sums; a block of classes at a time."""
        counts: slice | np.ndarray = slice(None) if weight.all() else weight != 0
        target, weight = target[counts], weight[counts]
        if self.kind == "top_label":
            best, value = largest(values) if top is None else top
            return self._sums(confidence(value[:, None])[counts], (best[counts] == target)[:, None], weight)
        n_classes, parts = values.shape[-1], []
        step = max(1, BLOCK // math.prod((1, *values.shape[:-1]))) if values.size else n_classes
        for first in range(0, n_classes, step):
            classes = np.arange(first, min(first + step, n_classes))
            block = values[..., first : first + step].reshape(-1, len(classes))
            parts.append(self._sums(confidence(block)[counts], target[:, None] == classes, weight))
        return Bins(*(np.concatenate([getattr(p, f) for p in parts]) for f in ("weight", "confidence", "correct")))

    def _sums(self, confidence: np.ndarray, correct: np.ndarray, weight: np.ndarray) -> Bins:
        """Of (n, n_curves) confidences."""
        n, n_curves = self.n_bins, confidence.shape[1]
        if self.strategy == "uniform":
            number = uniform_bin(confidence, n)
        else:
            number = np.empty(confidence.shape, np.int64)
            for k in range(n_curves):
                number[:, k] = np.searchsorted(_quantiles(confidence[:, k], weight, n), confidence[:, k])
        number = (number + n * np.arange(n_curves)).reshape(-1)

        def total(values):
            return np.bincount(number, values.reshape(-1), n * n_curves).reshape(n_curves, n)

        mass = weight[:, None]
        return Bins(total(np.broadcast_to(mass, confidence.shape)), total(mass * confidence), total(mass * correct))


def uniform_bin(confidence: np.ndarray, n: int) -> np.ndarray:
    """The number of the bin, from 0, of n of the same width; an edge is in the bin under it."""
    return np.searchsorted(np.linspace(0, 1, n + 1)[1:-1], confidence)


def largest(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(class, value) of the largest of each row, the first of equal ones. In blocks, for NumPy copies what it does not
    find contiguous."""
    n_classes, n_rows = values.shape[-1], math.prod(values.shape[:-1])
    best, value = np.empty(n_rows, np.int64), np.empty(n_rows, values.dtype)
    for index, rows in row_blocks(values.shape[:-1], max(1, BLOCK // n_classes)):
        x = values[index].reshape(-1, n_classes)
        best[rows] = x.argmax(1)
        value[rows] = x[np.arange(len(x)), best[rows]]
    return best, value


def _quantiles(values: np.ndarray, weight: np.ndarray, n: int) -> np.ndarray:
    """The n - 1 least values that i/n of the weight, i = 1, 2, ..., do not exceed."""
    if not values.size:
        return np.empty(0)
    order = np.argsort(values)
    mass = np.cumsum(weight[order])
    edges = np.arange(1, n) * (mass[-1] / n) * (1 - 1e-12)  # sums of equal weights that round do not pass an edge
    return values[order[np.searchsorted(mass, edges)]]


def calibration_error(
    logits,
    target,
    *,
    n_bins=15,
    strategy="uniform",
    norm="l1",
    kind="top_label",
    temperature=1.0,
    sample_weight=None,
    ignore_index=-100,
    class_axis=None,
    n_threads=None,
) -> float:
    r"""How far the confidences softmax(logits / temperature) are from how often they come true.

    Samples are put into bins by their confidence. With :math:`w_b` the share of bin b in the sample weights,
    :math:`c_b` its mean confidence and :math:`a_b` the frequency with which its samples are of the class,

    .. math::

        l1 = \sum_b w_b |a_b - c_b|, \qquad l2 = \Big[\sum_b w_b (a_b - c_b)^2\Big]^{1/2}, \qquad
        max = \max_b |a_b - c_b|.

    l1 and max of the top label are the expected and the maximum calibration error, ECE and MCE, of Guo et al., "On
    calibration of modern neural networks", arXiv:1706.04599; l2 and the class-wise error are those of Kumar et al.,
    "Verified uncertainty calibration", arXiv:1909.10155.

    Parameters
    ----------
    logits, target, sample_weight, ignore_index, class_axis, n_threads
        As in `CrossEntropyLoss`, target of class indices. Rows that do not count are in no bin.
    n_bins : int, default=15
    strategy : {"uniform", "quantile"}, default="uniform"
        "uniform": bins of the same width, ((b - 1)/n, b/n]; 0 is in the first, and 1 in the last. "quantile": bins of
        the same sample weight, as far as may be: equal confidences are in the same bin, and a bin may be empty.
    norm : {"l1", "l2", "max"}, default="l1"
    kind : {"top_label", "class_wise"}, default="top_label"
        "top_label": the largest confidence of each row (the first of equal ones), right where it is that of the
        target. "class_wise": the confidence in each class has bins of its own, and each class the same share in the
        error.
    temperature : float, default=1.0
        Divides the logits.

    Returns
    -------
    float
        Between 0 and 1. NaN if no row counts, or one that does has logits without a softmax (NaN, +inf).

    Raises
    ------
    IndexError
        If a target is neither a class nor `ignore_index`.
    ValueError, TypeError
        If an option, a shape, a dtype or a value does not fit.

    Warns
    -----
    UserWarning
        If the logits look like probabilities.

    Notes
    -----
    No softmax of the logits' size is made: beside some numbers a row, a block of some MiB.

    Examples
    --------
    >>> import ce_fast as ce
    >>> logits = [[2.0, 0.0, -1.0], [0.0, 1.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 1.5]]
    >>> round(ce.calibration_error(logits, [0, 1, 1, 2]), 6)
    0.449523
    >>> round(ce.calibration_error(logits, [0, 1, 1, 2], kind="class_wise", norm="l2"), 6)
    0.427411
    """
    binning = Binning(n_bins, strategy, kind)
    inputs.check_choice("norm", norm, NORMS)
    loss = CrossEntropyLoss(
        ignore_index=ignore_index, temperature=temperature, class_axis=class_axis, n_threads=n_threads
    )
    call = _check(loss, logits, target, sample_weight)
    _, picked, weight = engine._pick(call.rows)
    values = call.logits.rows
    best, top = largest(values)
    nll = engine.run_block(  # of the largest: -log p of the others is that and a difference of logits, however large
        {"logits": values, "rows": Rows(best), "temperature": loss.temperature}, None, loss.n_threads, wide=True
    )

    def confidence(x: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return np.exp((x - top[:, None].astype(np.float64)) / loss.temperature - nll[:, None])

    return binning.bins(values, picked, weight, confidence, (best, top)).error(norm)


def check_call(loss: CrossEntropyLoss, logits, target, sample_weight) -> engine.Call:
    """The data of a call, of class indices; whether they are classes is not known yet."""
    checked = inputs.as_logits(logits, loss.class_axis, target=target)
    call = engine.check_call(loss, checked, target, sample_weight)
    if call.soft is not None:
        raise TypeError("target holds class probabilities; expected class indices (an integer dtype)")
    inputs.warn_if_probabilities(checked)
    return call


def _check(loss: CrossEntropyLoss, logits, target, sample_weight) -> engine.Call:
    call = check_call(loss, logits, target, sample_weight)
    engine.count(loss, call.logits, call.rows)  # that every target is a class
    return call


def fit_temperature(logits, target, *, sample_weight=None, ignore_index=-100, class_axis=None, n_threads=None) -> float:
    r"""The temperature T > 0 with the least mean cross-entropy of logits / T: temperature scaling.

    With p = softmax(logits / T), and L and H the means over the rows of the cross-entropy and of the entropy of p,

    .. math:: \frac{dL}{d(1/T)} = T (L - H),

    which falls as T rises, for L is convex in 1/T: so the T at which it is 0 is found by bracketing (Brent). Guo et
    al., "On calibration of modern neural networks", arXiv:1706.04599, section 4.2.

    Parameters
    ----------
    logits, target, sample_weight, ignore_index, class_axis, n_threads
        As in `CrossEntropyLoss`, target of class indices; of data that the model was not trained on.

    Returns
    -------
    float
        Above 1 where the model is too sure of itself. `temperature` of the losses and of `calibration_error`.

    Raises
    ------
    ValueError
        If there is no such T, or none from 1e-30 to 1e30: every target has the largest logit of its row (T would be
        0), or on average a logit no larger than the mean of its row (T would be infinite); if no row counts; if logits
        that count have no softmax (NaN, +inf), or the one of a target is -inf.
    IndexError, ValueError, TypeError
        As in `calibration_error`.
    ImportError
        Without SciPy.

    See Also
    --------
    sklearn.calibration.CalibratedClassifierCV : With method="temperature", the same for estimators of scikit-learn.

    Notes
    -----
    Some ten evaluations, each of two passes over the logits in float64, with nothing of their size beside them. T is
    exact to some 1e-15 times its square, in units of the logits' spread: far above that spread the loss is flat.

    Examples
    --------
    >>> import numpy as np
    >>> import ce_fast as ce
    >>> logits = np.array([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
    >>> T = ce.fit_temperature(logits, [0, 0, 0, 1])  # three of four are right
    >>> round(T, 6)
    3.640957
    >>> ce.softmax(logits[:1] / T).round(6)
    array([[0.75, 0.25]])
    """
    from scipy.optimize import brentq

    loss = CrossEntropyLoss(ignore_index=ignore_index, class_axis=class_axis, n_threads=n_threads)
    call = _check(loss, logits, target, sample_weight)
    counts, picked, weight = engine._pick(call.rows)
    if not counts.any():
        raise ValueError("no row counts: every target is ignored or has weight 0; expected one at least")
    position = math.log(_least_temperature(call.logits, picked, weight, counts))
    cross_entropy = engine.softmax_fields(loss, call)
    minus_entropy = {"logits": call.logits.rows, "rows": Rows(sample_weight=weight), "rule": "kl_reverse"}

    @functools.cache
    def slope(log_t: float) -> float:
        at = {"temperature": math.exp(log_t)}
        rows = engine.run_block(cross_entropy | at, None, loss.n_threads, wide=True)
        rows += engine.run_block(minus_entropy | at, None, loss.n_threads, wide=True)
        return at["temperature"] * float(rows.sum())

    step = math.copysign(1.0, slope(position))
    while True:
        following = min(max(position + step, -MOST_LOG_T), MOST_LOG_T)
        if following == position:
            raise ValueError("the mean cross-entropy has no least value at temperatures from 1e-30 to 1e30")
        if np.sign(slope(following)) != np.sign(slope(position)):
            return math.exp(brentq(slope, position, following, xtol=1e-15))
        position, step = following, 2 * step


def _least_temperature(logits: Logits, target: np.ndarray, weight: np.ndarray, counts: np.ndarray) -> float:
    """Where to begin: dL/d(1/T) as T goes to 0, in the logits' own unit. ValueError if L has no minimum, which is where
    that is 0, or the one as T goes to infinity not negative."""
    n_classes, cold, hot = logits.n_classes, 0.0, 0.0
    for index, rows in row_blocks(logits.outer_shape, max(1, BLOCK // n_classes)):
        numbers = rows.start + np.flatnonzero(counts[rows])
        x = logits.rows[index].reshape(-1, n_classes)[counts[rows]].astype(np.float64)
        top, own = x.max(1), x[np.arange(len(x)), target[numbers]]
        for bad, what in (
            (~np.isfinite(top), "hold NaN, +inf, or nothing but -inf: they have no softmax"),
            (np.isneginf(own), "hold -inf for the target: the loss is infinite at every temperature"),
        ):
            if bad.any():
                row = np.unravel_index(numbers[np.argmax(bad)], logits.outer_shape)
                raise ValueError(f"logits of row [{', '.join(map(str, row))}] {what}")
        cold += weight[numbers] @ (top - own)
        there = ~np.isneginf(x)  # masked classes have no part in any temperature's softmax
        below = np.where(there, x - top[:, None], 0).sum(1) / there.sum(1)
        hot += weight[numbers] @ (below - (own - top))
    if cold == 0:
        raise ValueError(
            "every target has the largest logit of its row: the loss falls as the temperature goes to 0, and none is "
            "best; expected some rows where the model is wrong"
        )
    if hot >= 0:
        raise ValueError(
            "targets have on average no larger a logit than the mean of their rows: the loss falls as the temperature "
            "rises without end, and none is best; expected logits that tell something of the targets"
        )
    return min(max(cold / weight.sum(), 1e-30), 1e30)
