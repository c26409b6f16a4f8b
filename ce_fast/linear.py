"""Cross-entropy of hidden @ classifier.T + bias: the logits of some rows at a time, never all of them."""

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import ClassVar, NamedTuple

import numpy as np

from ce_fast import backends, engine, inputs, reduction, threads
from ce_fast.backends import Rows
from ce_fast.inputs import Logits
from ce_fast.losses import CrossEntropyLoss, _Options

# Seconds of the processor for loss and gradients of [2048, 512] x [32000, 512] in float32, one thread, by the MiB of
# BLOCK_BYTES: 20 1.65, 26 1.55, 32 1.49, 48 1.51 (torch's linear and cross_entropy: 1.67). Half or twice the
# CLASS_BYTES change nothing.
BLOCK_BYTES = 32 << 20  # logits of the rows at hand, with their hidden states and the gradients by them
CLASS_BYTES = 4 << 20  # of the classifier: what is widened at a time, and added at a time to its gradient


class LinearGradients(NamedTuple):
    """Gradients by the arrays that make the logits; None for one that was not asked for, or is not there."""

    hidden: np.ndarray | None = None
    classifier: np.ndarray | None = None
    bias: np.ndarray | None = None


class Products:
    """Products of matrices, by NumPy's BLAS; `add` needs a place of the size of its result."""

    def __init__(self) -> None:
        self._place = np.empty(0)

    def put(self, out: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
        """out = a @ b"""
        np.matmul(a, b, out=out)

    def add(self, out: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
        """out += a @ b"""
        if self._place.size < out.size or self._place.dtype != out.dtype:
            self._place = np.empty(out.size, out.dtype)
        place = self._place[: out.size].reshape(out.shape)
        np.matmul(a, b, out=place)
        np.add(out, place, out=out)


@dataclass(frozen=True, eq=False)
class LinearCrossEntropyLoss(_Options):
    r"""Cross-entropy of the logits :math:`x = h W^T + b`, of which only those of some rows exist at a time.

    With hidden states :math:`h_i`, a classifier W of a row per class, and l the loss of `CrossEntropyLoss`,

    .. math::

        L = \sum_i l(W h_i + b, t_i) / d, \quad
        \frac{\partial L}{\partial h_i} = W^T g_i, \quad
        \frac{\partial L}{\partial W} = \sum_i g_i h_i^T, \quad
        \frac{\partial L}{\partial b} = \sum_i g_i, \quad
        g_i = \frac{1}{d} \frac{\partial l}{\partial x_i}

    in nats, d being the denominator of the mean, or 1.

    Parameters
    ----------
    weight, ignore_index, reduction, label_smoothing, smoothing, temperature, softcap, z_loss, denominator, n_threads
        As in `CrossEntropyLoss`. `n_threads` is that of the loss, by default half of those there are; the products obey
        the limits of NumPy's BLAS.

    Raises
    ------
    ValueError, TypeError
        If an option is out of its range or of the wrong type.

    Notes
    -----
    Beside the arrays given and the gradients it takes some 40 MiB, or for a large classifier a sixteenth of it; as much
    again for class probabilities. A 16-bit classifier is read and widened in pieces, products are of float32 (float64
    if any array is), and its gradient is added up in that and rounded once. A classifier may be a read-only
    `numpy.memmap`. Rows that do not count are not read.

    Examples
    --------
    >>> import numpy as np
    >>> import ce_fast as ce
    >>> hidden, classifier = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    >>> loss = ce.LinearCrossEntropyLoss()
    >>> round(loss(hidden, classifier, [0, 1]), 6)
    0.275269
    >>> value, grads = loss.value_and_grad(hidden, classifier, [0, 1])
    >>> grads.classifier.round(3)
    array([[-0.167,  0.117],
           [ 0.122, -0.133],
           [ 0.045,  0.016]])
    """

    weight: np.ndarray | None = None
    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    _: KW_ONLY
    smoothing: str = "uniform"
    temperature: float = 1.0
    softcap: float | None = None
    z_loss: float = 0.0
    denominator: str | float = "weight"
    n_threads: int | None = None
    of_logits: CrossEntropyLoss = field(init=False, repr=False)
    _kind: ClassVar[type[CrossEntropyLoss]] = CrossEntropyLoss

    def __post_init__(self) -> None:
        names = [option.name for option in fields(self) if option.init]
        checked = self._kind(**{name: getattr(self, name) for name in names})
        self._set(of_logits=checked, **{name: getattr(checked, name) for name in names})

    def __call__(self, hidden, classifier, target, bias=None, sample_weight=None):
        """The loss.

        Parameters
        ----------
        hidden : array_like of shape (..., n_features)
            Float64, float32, float16 or bfloat16, of any strides, as are the classifier and the bias.
        classifier : array_like of shape (n_classes, n_features)
        target : array_like
            Class indices, of any integer dtype and of hidden's shape without its last axis; or class probabilities,
            of a floating dtype and shape (..., n_classes).
        bias : array_like of shape (n_classes,), optional
        sample_weight : array_like, optional
            Of the shape of the class indices, finite and not negative; a boolean array is a mask.

        Returns
        -------
        float or ndarray
            As in `CrossEntropyLoss`.

        Raises
        ------
        IndexError
            If a target is neither a class nor `ignore_index`; nothing was computed then.
        ValueError, TypeError
            If a shape, dtype or value does not fit.
        """
        return run(self, hidden, classifier, target, bias, sample_weight)[0]

    def value_and_grad(self, hidden, classifier, target, bias=None, sample_weight=None, *, upstream=None):
        """The loss and its gradients by `hidden`, `classifier` and `bias`, in one pass over blocks of rows.

        Parameters
        ----------
        hidden, classifier, target, bias, sample_weight
            As in a call.
        upstream : array_like, optional
            As in `CrossEntropyLoss.value_and_grad`.

        Returns
        -------
        value : float or ndarray
            As in a call.
        grads : (hidden, classifier, bias)
            Named; each of the shape and dtype of its array, None without a bias. Of the reduced loss, or for
            reduction="none" of the sum.

        Raises
        ------
        IndexError, ValueError, TypeError
            As in a call, and if `upstream` does not fit.
        """
        return run(self, hidden, classifier, target, bias, sample_weight, upstream=upstream, wanted=(True, True, True))

    def grad_and_hess(self, *args, **options):
        """NotImplementedError: a diagonal Hessian is one by logits, which `CrossEntropyLoss` has."""
        self._refuse_hessian("one by the logits has CrossEntropyLoss")


def run(
    loss: LinearCrossEntropyLoss,
    hidden,
    classifier,
    target,
    bias=None,
    sample_weight=None,
    *,
    upstream=None,
    wanted: tuple[bool, bool, bool] = (False, False, False),
    rounded: bool = True,
    products: Products | None = None,
) -> tuple[float | np.ndarray, LinearGradients]:
    """(value, those gradients by hidden, classifier and bias that are wanted).

    Gradients have the dtypes of their arrays, or unless they are `rounded` that of the products.
    """
    h, w, b = _check(hidden, classifier, bias)
    dtype = np.dtype(np.float64 if "float64" in {a.dtype.name for a in (h, w, b) if a is not None} else np.float32)
    nowhere = np.broadcast_to(np.empty((), dtype), (*h.shape[:-1], len(w)))  # says what fits the logits; is never read
    logits = Logits(nowhere, nowhere, h.ndim - 1)
    call = engine.check_call(loss.of_logits, logits, target, sample_weight)
    divisor = engine.count(loss.of_logits, logits, call.rows)
    factor, row_factors = engine.as_upstream(upstream, loss.reduction, logits)
    job = engine.softmax_fields(loss.of_logits, call) | {"upstream": row_factors}
    job["scale"] = factor * reduction.gradient_scale(divisor) / loss.temperature
    sums = LinearGradients(
        np.zeros(h.shape, _native(h) if rounded else dtype) if wanted[0] else None,
        np.zeros(w.shape, dtype) if wanted[1] else None,
        np.zeros(b.shape, dtype) if wanted[2] and b is not None else None,
    )
    with np.errstate(all="ignore"):
        losses = _run_blocks(loss, job, h, w, b, sums, products or Products())
        if rounded:
            sums = LinearGradients(sums.hidden, _rounded(sums.classifier, w), _rounded(sums.bias, b))
    if loss.reduction == "none":
        return engine.result_rows(losses, logits), sums
    return reduction.reduced(reduction.summed(losses), divisor), sums


def _run_blocks(
    loss: LinearCrossEntropyLoss,
    job: engine.Fields,
    h: np.ndarray,
    w: np.ndarray,
    b: np.ndarray | None,
    sums: LinearGradients,
    products: Products,
) -> np.ndarray:
    """The row losses; the gradients to `sums`."""
    dtype, h, given = job["logits"].dtype, _rows_first(h), job["rows"]
    soft = None if job["soft"] is None else _rows_first(job["soft"])
    losses = np.zeros(math.prod(h.shape[:-1]))
    live = _counting(given, losses.size)
    most = _block_rows(live.size, w, dtype)
    place = np.empty((most, len(w)), dtype)
    differentiates = any(array is not None for array in sums)
    # By default half the threads: those of BLAS stay awake between products. On two cores, [1024, 512] x [32000, 512]
    # took 0.42 s with one thread here, and 0.45 s with two.
    default = threads.resolve(None, place.size, backends.active().max_threads) // 2
    n_threads = loss.n_threads or max(1, default)
    for first in range(0, live.size, most):
        rows = live[first : first + most]
        index = np.unravel_index(rows, h.shape[:-1])
        x, some = place[: rows.size], h[index].astype(dtype, copy=False)
        _put_logits(x, some, w, b, products)
        own = {"logits": x, "soft": _part(soft, index), "upstream": _part(job["upstream"], rows)}
        own["rows"] = replace(given, target=_part(given.target, rows), sample_weight=_part(given.sample_weight, rows))
        out = x if differentiates else None
        losses[rows] = engine.run_block(job | own, out, n_threads, wide=loss.of_logits.wide)
        _add(sums, index, x, some, w, products)
    return losses


def _check(hidden, classifier, bias) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    h, w = inputs.as_float_array(hidden, "hidden"), inputs.as_float_array(classifier, "classifier")
    if h.ndim == 0:
        raise ValueError("hidden is a scalar; expected an array of shape (..., n_features)")
    if w.ndim != 2 or w.shape[0] == 0 or w.shape[1] != h.shape[-1]:
        raise ValueError(
            f"classifier has shape {w.shape}; expected (n_classes, {h.shape[-1]}) with at least 1 class, "
            f"for hidden of shape {h.shape}"
        )
    b = None if bias is None else inputs.as_float_array(bias, "bias")
    if b is not None and b.shape != (len(w),):
        raise ValueError(f"bias has shape {b.shape}; expected {(len(w),)}, a value a class")
    return h, w, b


def _native(array: np.ndarray) -> np.dtype:
    return array.dtype.newbyteorder("=")


def _rounded(total: np.ndarray | None, like: np.ndarray | None) -> np.ndarray | None:
    return None if total is None or like is None else total.astype(_native(like), copy=False)


def _rows_first(array: np.ndarray) -> np.ndarray:
    """One row as an array of rows."""
    return array[None] if array.ndim == 1 else array


def _part(array: np.ndarray | None, index) -> np.ndarray | None:
    return None if array is None else array[index]


def _counting(rows: Rows, n_rows: int) -> np.ndarray:
    """The rows that count. Others are left out of every product: 0 * NaN would leak."""
    counts = np.ones(n_rows, bool) if rows.sample_weight is None else rows.sample_weight != 0
    if rows.target is not None:
        counts &= rows.target != rows.ignore_index
    return np.flatnonzero(counts)


def _block_rows(n_rows: int, w: np.ndarray, dtype: np.dtype) -> int:
    """Rows a block, in blocks of like size. The gradient by a large classifier is read and written with every block,
    which m rows pay for with 6 m operations an element: blocks grow with it, to a sixteenth of its size."""
    n_classes, n_features = w.shape
    n_bytes = max(BLOCK_BYTES, w.size * dtype.itemsize // 16)
    most = max(1, n_bytes // ((n_classes + 2 * n_features) * dtype.itemsize))
    return max(1, -(-n_rows // max(1, -(-n_rows // most))))


def _slices(w: np.ndarray, dtype: np.dtype) -> Iterator[slice]:
    """Classes, some at a time."""
    step = max(1, CLASS_BYTES // (max(1, w.shape[1]) * dtype.itemsize))
    for first in range(0, len(w), step):
        yield slice(first, first + step)


def _pieces(w: np.ndarray, dtype: np.dtype) -> Iterator[tuple[slice, np.ndarray]]:
    """The classifier as BLAS reads it: whole, or widened piece by piece, each in the place of the one before."""
    if w.dtype == dtype and w.flags.aligned and (w.flags.c_contiguous or w.flags.f_contiguous):
        yield slice(None), w
        return
    place: np.ndarray | None = None
    for classes in _slices(w, dtype):
        piece = w[classes]
        place = np.empty(piece.shape, dtype) if place is None else place[: len(piece)]
        np.copyto(place, piece)
        yield classes, place


def _put_logits(x: np.ndarray, some: np.ndarray, w: np.ndarray, b: np.ndarray | None, products: Products) -> None:
    for classes, piece in _pieces(w, x.dtype):
        products.put(x[:, classes], some, piece.T)
    if b is not None:
        np.add(x, b, out=x)


def _add(sums: LinearGradients, index, g: np.ndarray, some: np.ndarray, w: np.ndarray, products: Products) -> None:
    """What the gradient g by the logits of some rows adds to the others."""
    if sums.hidden is not None:
        by_some = np.zeros(some.shape, g.dtype)
        for classes, piece in _pieces(w, g.dtype):
            products.add(by_some, g[:, classes], piece)
        _rows_first(sums.hidden)[index] = by_some
    if sums.classifier is not None:
        for classes in _slices(w, g.dtype):
            products.add(sums.classifier[classes], g[:, classes].T, some)
    if sums.bias is not None:
        np.add(sums.bias, g.sum(0), out=sums.bias)
