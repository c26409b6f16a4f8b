"""Means and their standard errors from sums that add up; how they are written down.

Sums of two parts of the data are those of the whole, whatever the order: that is all an evaluation keeps.
"""

import base64
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from numbers import Integral
from typing import NamedTuple

import numpy as np

from ce_fast import inputs
from ce_fast.config import __version__

SCHEMA = 1
FEW = 10  # row numbers that are named
NAN_POLICIES = ("omit", "raise")


class Estimate(NamedTuple):
    """A weighted mean, or what is made of one, and its standard error: NaN where there are fewer than two rows."""

    value: float
    stderr: float

    def scaled(self, factor: float) -> "Estimate":
        return Estimate(self.value * factor, self.stderr * factor)

    def exp(self) -> "Estimate":
        """By the delta method."""
        with np.errstate(all="ignore"):
            value = float(np.exp(self.value))
        return Estimate(value, value * self.stderr)

    def sqrt(self) -> "Estimate":
        """By the delta method; of a mean square, which is 0 where all rows are."""
        value = math.sqrt(self.value)
        return Estimate(value, self.stderr / (2 * value) if value else self.stderr)


class Moments:
    """Sums of rows with weights w and values v of some metrics, one line of `sums` a group:

        n, sum w, sum w^2;   of each metric sum w v, sum w^2 (v - m), sum w^2 (v - m)^2,   m = sum w v / sum w

    The second ones are about the group's mean, which moves as sums are added: of values that nearly agree, a difference
    of sums about 0 would leave no digits.
    """

    def __init__(self, sums: np.ndarray) -> None:
        self.sums = sums  # (n_groups, 3 + 3 n_metrics)

    @classmethod
    def empty(cls, n_groups: int, n_metrics: int) -> "Moments":
        return cls(np.zeros((n_groups, 3 + 3 * n_metrics)))

    @classmethod
    def of(cls, values, weight: np.ndarray, group: np.ndarray | None = None) -> tuple[np.ndarray, "Moments"]:
        """(the groups that there are, rising; their moments) of (n_metrics, n_rows) values; without `group`, of one.
        Sums are NumPy's pairwise ones: sequential ones of a million weights of 0.1 miss by 1e-11."""
        values = np.asarray(values)
        if weight.size == 0:
            return np.empty(0, np.int64), cls.empty(0, len(values))
        if group is None:
            group = np.zeros(weight.size, np.int64)
        else:
            order = np.argsort(group, kind="stable")
            values, weight, group = values[:, order], weight[order], group[order]
        first = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
        times = np.diff(first, append=weight.size)

        def total(x):
            return np.add.reduceat(x, first, axis=-1)

        with np.errstate(all="ignore"):
            mass, sums = total(weight), total(weight * values)
            off, square = values - np.repeat(sums / mass, times, axis=-1), weight * weight
            table = np.vstack([times, mass, total(square), sums, total(square * off), total(square * off * off)])
        return group[first], cls(np.ascontiguousarray(table.T))

    def __len__(self) -> int:
        return len(self.sums)

    @property
    def n_rows(self) -> np.ndarray:
        return self.sums[:, 0]

    @property
    def weight(self) -> np.ndarray:
        return self.sums[:, 1]

    def of_metrics(self, i: int) -> np.ndarray:
        """(n_groups, n_metrics) sums of w v (i = 0), or of w^2 (v - m)^i."""
        n = (self.sums.shape[1] - 3) // 3
        return self.sums[:, 3 + i * n : 3 + (i + 1) * n]

    @property
    def means(self) -> np.ndarray:
        """(n_groups, n_metrics); NaN of no rows."""
        with np.errstate(all="ignore"):
            return self.of_metrics(0) / self.sums[:, 1:2]

    @property
    def stderrs(self) -> np.ndarray:
        """sqrt(n / (n - 1) sum w^2 (v - m)^2) / sum w; NaN of fewer than two rows, or where every w^2 is less than
        float64 holds."""
        n, mass, square = (self.sums[:, i : i + 1] for i in range(3))
        with np.errstate(all="ignore"):
            found = np.sqrt(n / (n - 1) * np.maximum(self.of_metrics(2), 0)) / mass
            return np.where((n > 1) & (square > 0), found, np.nan)

    def estimates(self, group: int = 0) -> list[Estimate]:
        """Of each metric."""
        one = Moments(self.sums[group : group + 1])
        return [Estimate(*pair) for pair in zip(one.means[0].tolist(), one.stderrs[0].tolist(), strict=True)]

    def reserve(self, n_groups: int, *, exactly: bool = True) -> None:
        """Room for so many groups, or for twice as many as before: growing by one at a time costs no squares."""
        if n_groups > len(self):
            size = n_groups if exactly else max(n_groups, 2 * len(self))
            self.sums = np.vstack([self.sums, np.zeros((size - len(self), self.sums.shape[1]))])

    def add(self, group: np.ndarray, other: "Moments") -> None:
        """Add to each of the groups, all different, a line of the other's."""
        parts = Moments(self.sums[group]), other
        with np.errstate(all="ignore"):
            both = Moments(parts[0].sums + other.sums)
            first, second = np.zeros_like(both.of_metrics(1)), np.zeros_like(both.of_metrics(2))
            for part in parts:
                square = part.sums[:, 2:3]
                shift = np.where(square > 0, part.means - both.means, 0.0)
                first += part.of_metrics(1) + shift * square
                second += part.of_metrics(2) + 2 * shift * part.of_metrics(1) + shift * shift * square
        both.of_metrics(1)[:], both.of_metrics(2)[:] = first, second
        self.sums[group] = both.sums

    def add_all(self, other: "Moments") -> None:
        """Group k to group k, however many there are."""
        self.reserve(len(other))
        self.add(np.arange(len(other)), other)


class Table:
    """Moments by label, an integer or a string."""

    def __init__(self, n_metrics: int) -> None:
        self.place: dict[int | str, int] = {}
        self.moments = Moments.empty(0, n_metrics)

    def __len__(self) -> int:
        return len(self.place)

    def add(self, labels: list[int | str], other: Moments) -> None:
        where = np.array([self.place.setdefault(label, len(self.place)) for label in labels], np.int64)
        self.moments.reserve(len(self), exactly=False)
        self.moments.add(where, other)

    def filled(self) -> Moments:
        """The lines of the labels, in the order in which they came."""
        return Moments(self.moments.sums[: len(self)].copy())

    def in_order(self) -> list[tuple[int | str, int]]:
        """(label, line), integers first: the same whatever came first."""
        return sorted(self.place.items(), key=lambda item: (isinstance(item[0], str), item[0]))


def as_labels(value, outer_shape: tuple[int, ...], name: str) -> tuple[list[int | str], np.ndarray]:
    """(the labels that there are; for each row the number of its own in that list). An array has the outer shape, or
    broadcasts to it with as many axes; with fewer it has the leading ones, and a scalar is the label of all rows."""
    array = inputs.as_array(value, name)
    if array.dtype.kind not in "iuUTO" and array.size:  # an empty list has no labels to show for
        raise TypeError(f"{name} has dtype {array.dtype}; expected labels that are integers or strings")
    shape = array.shape
    if array.ndim < len(outer_shape) and shape == outer_shape[: array.ndim]:
        shape += (1,) * (len(outer_shape) - array.ndim)
    if len(shape) != len(outer_shape) or any(n not in (1, m) for n, m in zip(shape, outer_shape, strict=True)):
        raise ValueError(
            f"{name} has shape {array.shape}; expected {outer_shape}, a label a row, or its leading axes, or one label"
        )
    given = array.reshape(-1).tolist()
    for label in {type(label): label for label in given}.values():
        if not isinstance(label, str | Integral) or isinstance(label, bool):
            raise TypeError(f"{name} holds {label!r}; expected labels that are integers or strings")
    number: dict = {}
    each = [number.setdefault(label, len(number)) for label in given]
    labels = [str(label) if isinstance(label, str) else int(label) for label in number]
    codes = np.broadcast_to(np.array(each, np.int64).reshape(shape), outer_shape)
    return labels, np.ascontiguousarray(codes).reshape(-1)


@dataclass(frozen=True, slots=True)
class RowCount:
    """What became of the rows; their numbers go on from one part to the next."""

    seen: int = 0
    ignored: int = 0
    invalid: int = 0
    first_invalid: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, counts: np.ndarray, valid: np.ndarray) -> "RowCount":
        bad = np.flatnonzero(counts & ~valid)
        return cls(counts.size, counts.size - int(counts.sum()), bad.size, bad[:FEW].tolist())

    def __add__(self, other: "RowCount") -> "RowCount":
        first = self.first_invalid + [self.seen + i for i in other.first_invalid]
        return RowCount(self.seen + other.seen, self.ignored + other.ignored, self.invalid + other.invalid, first[:FEW])

    def check(self, nan_policy: str) -> None:
        if self.invalid and nan_policy == "raise":
            more = ", ..." if self.invalid > FEW else ""
            raise ValueError(
                f"logits of {self.invalid} row(s) hold NaN, +inf, or nothing but -inf, and have no softmax: "
                f"{', '.join(map(str, self.first_invalid))}{more}, counted over all updates; "
                f"nan_policy='omit' leaves such rows out"
            )


# --- Written down -----------------------------------------------------------------------------------------------------


def pack(array: np.ndarray) -> dict:
    """A float64 array for JSON. In base64: exact, NaN and inf too, and half as long as decimals."""
    array = np.ascontiguousarray(array, "<f8")
    return {"shape": list(array.shape), "float64": base64.b64encode(array.tobytes()).decode()}


def unpack(state: dict, columns: int) -> np.ndarray:
    """What was packed; ValueError if it has not so many columns."""
    array = np.frombuffer(base64.b64decode(state["float64"], validate=True), "<f8").astype(np.float64)
    array = array.reshape(state["shape"])
    if array.shape[1:] != (columns,):
        raise ValueError(f"an array has shape {array.shape}")
    return array


def pack_table(table: Table) -> dict:
    return {"labels": list(table.place), "sums": pack(table.filled().sums)}


def unpack_table(state: dict, n_metrics: int) -> Table:
    table = Table(n_metrics)
    sums = unpack(state["sums"], 3 + 3 * n_metrics)
    if len(sums) != len(state["labels"]):
        raise ValueError(f"{len(state['labels'])} labels have {len(sums)} lines")
    table.add(state["labels"], Moments(sums))
    return table


def header(kind: str) -> dict:
    return {"schema": SCHEMA, "kind": kind, "version": __version__}


def read_state(kind: str, state, read: Callable):
    """What `read` makes of a state; ValueError if it is not one of this kind."""
    found = {name: state.get(name) for name in ("schema", "kind")} if isinstance(state, dict) else type(state).__name__
    if found != {"schema": SCHEMA, "kind": kind}:
        raise ValueError(f"state is {found}; expected schema {SCHEMA} of kind {kind!r}, as to_dict() gives it")
    try:
        return read()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"state of kind {kind!r} is damaged: {type(error).__name__}: {error}") from error


def check_mergeable(mine, other) -> None:
    """That another was made with the options that say what the sums are."""
    if type(other) is not type(mine):
        raise TypeError(f"other is a {type(other).__name__}; expected a {type(mine).__name__}")
    for name in mine.same:
        if mine.options[name] != other.options[name]:
            raise ValueError(f"{name} is {mine.options[name]!r} here and {other.options[name]!r} there; expected equal")


def plain(value):
    """Numbers, strings, lists and dicts for JSON; what is not finite is None, for JSON has no word for it."""
    if hasattr(value, "_asdict"):  # of a NamedTuple
        return plain(value._asdict())
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {f"{key:g}" if isinstance(key, float) else str(key): plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and np.isfinite(value).all():
        return value.tolist()  # the weights of 150,000 ranks in 5 ms, where one by one they took 107
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(each) for each in (value.tolist() if isinstance(value, np.ndarray) else value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value
