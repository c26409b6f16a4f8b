"""Arrays in: every check of data and every error message about it.

Nothing of the logits' size is copied, except what no kernel can read where it lies: a misaligned or byte-swapped
array, and integers in place of floats.
"""

import math
import operator
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real

import numpy as np

from ce_fast import backends

PIECE = 1 << 16  # values checked at a time
FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Logits:
    given: np.ndarray  # the array as the caller shaped it
    rows: np.ndarray  # the same data (outer..., n_classes): class axis last, aligned, native byte order
    axis: int  # the class axis of `given`

    @property
    def outer_shape(self) -> tuple[int, ...]:
        return self.rows.shape[:-1]

    @property
    def n_classes(self) -> int:
        return self.rows.shape[-1]


def as_array(value, name: str) -> np.ndarray:
    """What `np.asarray` takes, and CPU arrays that speak DLPack without a copy."""
    if isinstance(value, np.ndarray):
        if type(value) is not np.ndarray and np.ma.is_masked(value):
            raise TypeError(f"{name} is a masked array; expected a plain one, with its mask as sample_weight")
        return value if type(value) is np.ndarray else value.view(np.ndarray)
    device = getattr(value, "__dlpack_device__", None)
    if device is not None and not hasattr(value, "__array_interface__"):
        kind, _ = device()
        if int(kind) != 1:
            raise TypeError(f"{name} lies on device {kind} (DLPack); expected an array in CPU memory")
        try:
            return np.from_dlpack(value)
        except (BufferError, TypeError, RuntimeError):  # a dtype or flag that DLPack to NumPy refuses
            pass
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        kind, hint = type(value), ""
        if "BFloat16" in str(error):
            hint = "; a bfloat16 tensor t is t.view(torch.int16).numpy().view(ml_dtypes.bfloat16), without a copy"
        raise TypeError(
            f"{name} is a {kind.__module__}.{kind.__name__} that NumPy cannot read: {error}{hint}"
        ) from error


@lru_cache(maxsize=64)  # the name of a dtype costs a microsecond
def is_float(dtype: np.dtype) -> bool:
    return dtype.name in FLOATS


def epsilon(dtype: np.dtype) -> float:
    """The spacing of a floating dtype at 1."""
    return 2.0**-7 if dtype.name == "bfloat16" else float(np.finfo(dtype).eps)


def is_index(dtype: np.dtype) -> bool:
    return dtype.kind in "iu"


def readable(array: np.ndarray) -> np.ndarray:
    """The array itself, or a copy of it that kernels can read."""
    if not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    if not array.flags.aligned:
        return array.copy()
    return array


def as_float_array(value, name: str) -> np.ndarray:
    array = as_array(value, name)
    if is_index(array.dtype):
        array = array.astype(np.float64)
    if not is_float(array.dtype):
        saved = " (bfloat16 that numpy.save wrote: view it as ml_dtypes.bfloat16)" if array.dtype == "V2" else ""
        raise TypeError(f"{name} has dtype {array.dtype}{saved}; expected one of {', '.join(FLOATS)}")
    return array


def warn_if_probabilities(logits: Logits) -> None:
    """The commonest mistake: softmax's output where its input belongs. Looks at some rows, of ordinary logits at one at
    most: nearly all of those leave by their first or last element, after 0.2 us."""
    rows = logits.rows
    if rows.size == 0 or not (0 <= rows.item(0) <= 1 and 0 <= rows.item(-1) <= 1) or logits.n_classes < 2:
        return
    outer = logits.outer_shape
    n_rows, slack = math.prod(outer), 2e-2 if rows.itemsize == 2 else 1e-3
    for i in np.linspace(0, n_rows - 1, min(n_rows, 16)).astype(int):
        row = rows[np.unravel_index(i, outer)] if outer else rows
        with np.errstate(all="ignore"):
            if not (row.min() >= 0 and row.max() < 1 and abs(float(row.sum(dtype=np.float64)) - 1) <= slack):
                return
    warn(
        "logits look like probabilities: rows are non-negative and sum to 1. Losses of logits apply softmax "
        "themselves; pass the logits, or the logarithms of the probabilities. If these are logits, silence this by "
        "warnings.filterwarnings('ignore', message='logits look like probabilities')"
    )


def warn(message: str) -> None:
    """A UserWarning at the line that called the package."""
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "ce_fast":
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=depth)


def check_class_axis(class_axis):
    if class_axis is None:
        return None
    try:
        return operator.index(class_axis)
    except TypeError:
        raise TypeError(f"class_axis is {class_axis!r}; expected an integer or None") from None


def class_last(array: np.ndarray, axis: int) -> np.ndarray:
    """A view of the array with its class axis last."""
    return array if axis == array.ndim - 1 else np.moveaxis(array, axis, -1)


def _class_axis(axis: int | None, shape: tuple[int, ...], name: str, target) -> int:
    ndim = len(shape)
    if ndim == 0:
        raise ValueError(f"{name} is a scalar; expected an array of shape (n_classes,) or (n_rows, n_classes)")
    if axis is None:
        if ndim > 2:
            raise ValueError(
                f"{name} of shape {shape} needs class_axis: class_axis=1 if it is laid out as (batch, classes, ...), "
                f"which makes {shape[1]} classes, or class_axis=-1 if as (batch, ..., classes), "
                f"which makes {shape[-1]} classes" + _fitting_axis(shape, np.shape(target))
            )
        return ndim - 1
    if not -ndim <= axis < ndim:
        raise ValueError(f"class_axis is {axis}; expected {-ndim} <= class_axis < {ndim} for {name} of shape {shape}")
    return axis % ndim


def as_logits(value, class_axis: int | None, name: str = "logits", target=()) -> Logits:
    given = as_float_array(value, name)
    axis = _class_axis(class_axis, given.shape, name, target)
    if given.shape[axis] == 0:
        raise ValueError(f"{name} of shape {given.shape} has no classes along axis {axis}; expected at least 1")
    return Logits(given, class_last(readable(given), axis), axis)


def _fitting_axis(shape: tuple[int, ...], outer: tuple[int, ...]) -> str:
    """What to say where a target of shape `outer` has the shape of the logits without one of their axes."""
    axes = [axis for axis in range(len(shape)) if shape[:axis] + shape[axis + 1 :] == outer]
    return f"; for this target class_axis={axes[0]} would fit" if axes else ""


def _binary_hint(target: np.ndarray) -> str:
    """What to say of floating targets that no softmax loss takes, and that hold labels 0 and 1."""
    if not ((target == 0) | (target == 1)).all():
        return ""
    return "; for labels 0 and 1 of a binary or multi-label problem use binary_cross_entropy_with_logits"


def as_targets(value, logits: Logits) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(class indices, flat; None) or (None; class probabilities, class axis last)."""
    target = as_array(value, "target")
    outer, full = logits.outer_shape, logits.given.shape
    if target.size == 0 and target.shape == outer and not is_index(target.dtype):
        target = target.astype(np.int64)  # an empty list has no integers to show for
    if is_index(target.dtype):
        if target.shape != outer:
            raise ValueError(
                f"target of class indices has shape {target.shape}; expected {outer}, "
                f"the shape {full} of logits without its class axis {logits.axis}" + _fitting_axis(full, target.shape)
            )
        return np.ascontiguousarray(readable(target)).reshape(-1), None
    if not is_float(target.dtype):
        raise TypeError(
            f"target has dtype {target.dtype}; expected an integer dtype (class indices) "
            f"or a floating one (class probabilities)"
        )
    if target.shape != full:
        raise ValueError(
            f"target of dtype {target.dtype} has shape {target.shape}; class probabilities need the shape {full} of "
            f"logits, and class indices (shape {outer}) an integer dtype" + _binary_hint(target)
        )
    return None, class_last(readable(target), logits.axis)


def check_distribution(soft: np.ndarray) -> None:
    """ValueError for labels 0 and 1 of many samples that came as the class probabilities of one."""
    if soft.ndim == 1 and soft.sum() not in (0, 1) and (hint := _binary_hint(soft)):
        raise ValueError(f"target of shape {soft.shape} sums to {soft.sum()}: no class probabilities{hint}")


def as_distribution(value, logits: Logits, name: str = "target") -> np.ndarray:
    """The logits, or log-probabilities, of another distribution over the same classes; class axis last."""
    other = as_float_array(value, name)
    if other.shape != logits.given.shape:
        raise ValueError(f"{name} has shape {other.shape}; expected {logits.given.shape}, that of the other logits")
    return class_last(readable(other), logits.axis)


def _as_real(value, name: str) -> np.ndarray:
    array = as_array(value, name)
    if not (is_float(array.dtype) or array.dtype.kind in "iub"):
        raise TypeError(f"{name} has dtype {array.dtype}; expected a real or boolean dtype")
    return array


def as_operand(value, shape: tuple[int, ...], name: str) -> np.ndarray | None:
    """An array of real or boolean dtype, broadcast to `shape` without a copy."""
    if value is None:
        return None
    array = _as_real(value, name)
    try:
        return np.broadcast_to(readable(array), shape)
    except ValueError:
        raise ValueError(f"{name} has shape {array.shape}; expected one that broadcasts to {shape}") from None


def _first_bad(array: np.ndarray, good: Callable[[np.ndarray], np.ndarray]) -> str | None:
    """ "[position] is value" of the first value that is not good, or None; in pieces, whatever the size and strides."""
    if array.size == 0:
        return None
    first = 0
    for piece in np.nditer(array, ["external_loop", "buffered"], order="C", buffersize=PIECE):
        with np.errstate(invalid="ignore"):
            fine = good(piece)  # type: ignore[arg-type]
        if not fine.all():
            at = np.unravel_index(first + int(np.argmin(fine)), array.shape)
            return (f"[{', '.join(str(i) for i in at)}]" if at else "") + f" is {array[at]}"
        first += fine.size
    return None


def check_weights(array: np.ndarray, name: str, *, negative: bool = False) -> np.ndarray:
    if bad := _first_bad(array, lambda w: np.isfinite(w) & (negative | (w >= 0))):
        raise ValueError(f"{name}{bad}; expected finite values" + ("" if negative else " of at least 0"))
    return array


def check_float32(weight: np.ndarray | None, name: str) -> None:
    """Weights that float32 sums and products hold."""
    if weight is None or weight.dtype.kind in "iub" or weight.dtype.itemsize == 2:
        return
    if bad := _first_bad(weight, lambda w: (w == 0) | ((np.abs(w) > 1e-30) & (np.abs(w) < 1e30))):
        raise ValueError(f"{name}{bad}; logits that are not float64 take 0, or magnitudes from 1e-30 to 1e30")


def as_binary_weight(value, name: str, *, negative: bool = False) -> np.ndarray | None:
    """A read-only copy, of any shape."""
    if value is None:
        return None
    weight = check_weights(_as_real(value, name).copy(), name, negative=negative)
    weight.flags.writeable = False
    return weight


def as_binary_target(value, shape: tuple[int, ...], of: str) -> np.ndarray:
    target = _as_real(value, "target")
    if target.shape != shape:
        raise ValueError(f"target has shape {target.shape}; expected {shape}, that of {of}: a label each")
    return readable(target)


def as_element_weight(value, shape: tuple[int, ...]) -> np.ndarray | None:
    """Sample weights of elements: of their shape, or of their leading axes, one for all that lies under it."""
    if value is None:
        return None
    weight = check_weights(_as_real(value, "sample_weight"), "sample_weight")
    if weight.shape != shape[: weight.ndim]:
        raise ValueError(f"sample_weight has shape {weight.shape}; expected {shape}, or its leading axes")
    return as_operand(weight.reshape(weight.shape + (1,) * (len(shape) - weight.ndim)), shape, "sample_weight")


def check_unit_interval(name: str, values: np.ndarray, sample_weight: np.ndarray | None) -> None:
    """ValueError at the first value that counts and lies outside [0, 1]. NaN passes, for it gives NaN."""
    with np.errstate(invalid="ignore"):
        if values.size == 0 or (np.fmin.reduce(values, None) >= 0 and np.fmax.reduce(values, None) <= 1):
            return
    read = values if sample_weight is None else np.where(sample_weight == 0, 0, values)
    if bad := _first_bad(read, lambda v: ~((v < 0) | (v > 1))):
        raise ValueError(f"{name}{bad}; expected 0 <= {name} <= 1")


def as_row_values(value, logits: Logits, name: str) -> np.ndarray | None:
    """One float64 a row, flat."""
    if value is None:
        return None
    array = _as_real(value, name)
    if array.shape != logits.outer_shape:
        raise ValueError(f"{name} has shape {array.shape}; expected {logits.outer_shape}, one value a row of logits")
    return np.ascontiguousarray(readable(array), np.float64).reshape(-1)


def as_sample_weight(value, logits: Logits) -> np.ndarray | None:
    weight = as_row_values(value, logits, "sample_weight")
    if weight is None:
        return None
    check_weights(weight.reshape(logits.outer_shape), "sample_weight")
    return weight


def as_class_weight(value, *, negative: bool = False, name: str = "weight") -> np.ndarray | None:
    """A float64 copy, read-only: the options of a loss do not change under it."""
    if value is None:
        return None
    array = as_array(value, name)
    if not (is_float(array.dtype) or array.dtype.kind in "iu"):
        raise TypeError(f"{name} has dtype {array.dtype}; expected a real dtype")
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; expected (n_classes,)")
    weight = check_weights(np.array(array, np.float64), name, negative=negative)
    weight.flags.writeable = False
    return weight


def check_weight(weight: np.ndarray | None, logits: Logits, name: str = "weight") -> None:
    """The parts of a class weight's checks that need the logits."""
    if weight is None:
        return
    if weight.shape[0] != logits.n_classes:
        raise ValueError(
            f"{name} has {weight.shape[0]} values; expected {logits.n_classes}, "
            f"the classes along axis {logits.axis} of logits of shape {logits.given.shape}"
        )
    if logits.rows.dtype != np.float64:
        check_float32(weight, name)


def check_target_found(bad: int, rows: backends.Rows, logits: Logits) -> None:
    """IndexError if there is a target, at position `bad`, that is no class."""
    if bad < 0:
        return
    assert rows.target is not None
    position = ", ".join(str(i) for i in np.unravel_index(bad, logits.outer_shape))
    raise IndexError(
        f"target[{position}] is {rows.target[bad]}; "
        f"expected 0 <= target < {logits.n_classes} or ignore_index={rows.ignore_index}"
    )


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.strides == b.strides
        and a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
    )


def _overlaps_itself(array: np.ndarray) -> bool:
    """Whether elements share memory; false for every slice and transposition of an ordinary array."""
    end = array.itemsize
    for stride, n in sorted((abs(stride), n) for stride, n in zip(array.strides, array.shape, strict=True)):
        if n > 1 and stride < end:
            return array.size > 0
        end += (n - 1) * stride
    return False


def as_out(out, logits: Logits, others: dict[str, np.ndarray | None], name: str = "logits") -> np.ndarray:
    """The array that takes the gradient: a new one, or `out` if it is fit."""
    given = logits.given
    if out is None:
        return backends.active().empty_like(given, given.dtype.newbyteorder("="))
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out is a {type(out).__name__}; expected a numpy.ndarray")
    if out.shape != given.shape or out.dtype != given.dtype:
        raise ValueError(
            f"out has shape {out.shape} and dtype {out.dtype}; expected shape {given.shape} and dtype {given.dtype}, "
            f"those of {name}"
        )
    if not out.flags.writeable:
        raise ValueError("out is read-only; expected an array that can be written")
    if _overlaps_itself(out):
        raise ValueError(f"out has strides {out.strides}: several elements share one place; expected one place each")
    if not _same(out, given):
        others = {name: given, **others}
    for what, other in others.items():
        if other is not None and np.shares_memory(out, other):
            raise ValueError(f"out overlaps {what}; expected memory of its own, or {name} itself")
    return out


def check_option(name: str, value, low: float, high: float = math.inf, *, above: bool = False) -> float:
    """A finite number in [low, high], or (low, high] with `above`."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected a number")
    value = float(value)
    if not math.isfinite(value) or value > high or value < low or (above and value == low):
        bounds = f"{name} {'>' if above else '>='} {low:g}" + (f" and <= {high:g}" if high < math.inf else "")
        raise ValueError(f"{name} is {value!r}; expected {bounds}")
    return value


def check_choice(name: str, value, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {choices}")
    return value


def check_integer(name: str, value) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected an integer")
    return int(value)


def check_ignore_index(value) -> int:
    value = check_integer("ignore_index", value)
    if not -(2**63) <= value < 2**63 - 1:
        raise ValueError(f"ignore_index is {value}; expected -2**63 <= ignore_index < 2**63 - 1")
    return value


def check_n_threads(value) -> int | None:
    if value is None:
        return None
    value = check_integer("n_threads", value)
    if value < 1:
        raise ValueError(f"n_threads is {value}; expected a positive integer, or None")
    return value
