"""What scikit-learn hands over: labels of any kind, the columns they name, weights, probabilities, decision values."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.utils import check_array, column_or_1d

from ce_fast import backends, inputs, threads
from ce_fast.plan import MOST_THREADS

FLOATS = (np.float64, np.float32, np.float16)  # what scikit-learn keeps; all else it reads as float64
EPS = {np.dtype(kind): float(np.finfo(kind).eps) for kind in FLOATS}


@dataclass(frozen=True, slots=True)
class Strings:
    """Labels that are strings: label i is names[number[i]]."""

    names: list[str]  # distinct, in the order of their first appearance
    number: np.ndarray

    def __len__(self) -> int:
        return len(self.number)


Labels = np.ndarray | Strings  # an array of bools or any integers but uint64 (integral floats are read as int64)
Classes = np.ndarray | list[str]  # an array of int64
Columns = tuple[np.ndarray, int]  # labels and that of the first column; their differences are the columns' numbers


def read_labels(values, name: str) -> Labels:
    listed = isinstance(values, list | tuple)
    if listed and len(values) and isinstance(values[0], str):
        return _number(list(values), name)  # not by way of NumPy, which makes strings of ["a", 1]
    array = np.asarray(values) if listed or type(values) is np.ndarray else column_or_1d(values)
    if array.ndim != 1 and not listed:
        array = column_or_1d(array)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}; expected (n_samples,), and not empty")
    if array.dtype.kind == "U" and not listed:
        array = plain_memory(array)
        if found := backends.active().number_strings(array):
            return Strings(array[found[0]].tolist(), found[1])
    if array.dtype.kind in "UO":
        return _number(list(values) if listed else array.tolist(), name)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} has dtype {array.dtype}; expected integers, bools, strings or integral floats")
    if array.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            whole = array.astype(np.int64)
        wrong = not np.array_equal(whole, array)
    else:
        whole = plain_memory(array)
        wrong = whole.dtype == np.uint64 and bool((whole > np.iinfo(np.int64).max).any())
    if wrong:
        raise ValueError(f"{name} holds numbers that are not integers of 64 bits; expected labels of classes")
    return whole.view(np.int64) if whole.dtype == np.uint64 else whole


def plain_memory(array: np.ndarray) -> np.ndarray:
    """What a kernel can read: aligned, in native byte order."""
    return array if array.flags.aligned and array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _number(labels: list, name: str) -> Strings:
    names = list(dict.fromkeys(labels))
    for label in names:
        if not isinstance(label, str):
            raise ValueError(f"{name} holds {label!r} beside strings or as an object; expected labels of one kind")
    position = {label: k for k, label in enumerate(names)}
    return Strings(names, np.fromiter(map(position.__getitem__, labels), np.int64, len(labels)))


def classes_in(labels: Labels) -> Classes:
    """The labels that occur, sorted."""
    if isinstance(labels, Strings):
        return sorted(labels.names)
    low, high = label_range(labels)
    if high - low > len(labels):
        return np.unique(labels).astype(np.int64)
    # counts in 1 ms what sorting does in 15 (1e6 labels)
    return low + np.flatnonzero(np.bincount(numbers((labels, low))))


def label_range(labels: np.ndarray) -> tuple[int, int]:
    """The least and the greatest label."""
    backend = backends.active()
    n_threads = min(threads.resolve(None, len(labels), backend.max_threads), MOST_THREADS)
    return backend.label_range(labels, n_threads)


def read_classes(values, name: str) -> Classes:
    labels = read_labels(values, name)
    if isinstance(labels, Strings):
        classes: Classes = [labels.names[k] for k in labels.number]
    else:
        classes = labels.astype(np.int64, copy=False)
    if len(set(plain(classes))) != len(classes):
        raise ValueError(f"{name} is {shown(classes)}; expected each label once")
    return classes


def with_others(classes: Classes, labels: Labels) -> Classes:
    """The classes, and after them the labels that are none of them; of another kind of label none is taken."""
    if isinstance(labels, Strings) and isinstance(classes, list):
        seen = set(classes)
        return classes + [name for name in labels.names if name not in seen]
    if isinstance(labels, Strings) or isinstance(classes, list):
        return classes
    return np.append(classes, np.setdiff1d(classes_in(labels), classes))


def encode(labels: Labels, classes: Classes, name: str, known: str) -> Columns:
    """The position of each label in `classes`."""
    if isinstance(labels, Strings) and isinstance(classes, list):
        position = {label: k for k, label in enumerate(classes)}
        for label in labels.names:
            if label not in position:
                raise _unseen(label, classes, name, known)
        return np.array([position[label] for label in labels.names])[labels.number], 0
    if isinstance(labels, Strings) or isinstance(classes, list):
        raise _unseen(labels.names[0] if isinstance(labels, Strings) else int(labels[0]), classes, name, known)
    low, high = int(classes.min()), int(classes.max())
    for end in label_range(labels):
        if not low <= end <= high:
            raise _unseen(end, classes, name, known)
    if high - low == len(classes) - 1 and increasing(classes):
        return labels, low
    if high - low <= max(len(labels), len(classes)):  # a table takes a fifth of the time of a search
        table = np.full(high - low + 1, -1)
        table[classes - low] = np.arange(len(classes))
        codes = table[numbers((labels, low))]
        strange = codes < 0
    else:
        order = np.argsort(classes)
        codes = order[np.searchsorted(classes, labels, sorter=order)]
        strange = classes[codes] != labels
    if strange.any():
        raise _unseen(int(labels[strange][0]), classes, name, known)
    return codes, 0


def numbers(columns: Columns) -> np.ndarray:
    labels, low = columns
    labels = labels.astype(np.int64, copy=False)
    return labels - low if low else labels


def _unseen(label, classes: Classes, name: str, known: str) -> ValueError:
    return ValueError(f"{name} has the label {label!r}; expected one of {known} {shown(classes)}")


def plain(classes: Classes) -> list:
    return classes if isinstance(classes, list) else classes.tolist()


def increasing(classes: Classes) -> bool:
    if isinstance(classes, list):
        return all(a < b for a, b in itertools.pairwise(classes))
    return bool((classes[1:] > classes[:-1]).all())


def shown(classes: Classes) -> str:
    first = ", ".join(map(repr, plain(classes[:20])))
    return f"[{first}]" if len(classes) <= 20 else f"[{first}, ...]"


def read_weights(sample_weight, n_samples: int) -> np.ndarray | None:
    if sample_weight is None:
        return None
    weights = sample_weight
    if type(weights) is not np.ndarray or weights.dtype.kind not in "biuf" or not np.isfinite(weights).all():
        weights = check_array(weights, ensure_2d=False, dtype=None, input_name="sample_weight")
    if weights.dtype.kind not in "biuf" or weights.shape != (n_samples,):
        raise ValueError(
            f"sample_weight has dtype {weights.dtype} and shape {weights.shape}; expected numbers, shape {(n_samples,)}"
        )
    check_not_all_zero(weights)
    return weights


def check_not_all_zero(weights: np.ndarray) -> None:
    if not weights.any():
        raise ValueError("Sample weights must contain at least one non-zero number.")


def read_class_weight(class_weight) -> dict[Any, float] | str | None:
    if class_weight is None or (isinstance(class_weight, str) and class_weight == "balanced"):
        return class_weight
    if not isinstance(class_weight, Mapping):
        raise ValueError(f'class_weight is {class_weight!r}; expected None, "balanced" or a dict {{label: weight}}')
    return {
        label: inputs.check_option(f"class_weight[{label!r}]", weight, 0.0) for label, weight in class_weight.items()
    }


def weight_of_each(classes: Classes, class_weight: Mapping[Any, float] | None, unseen: bool) -> np.ndarray | None:
    """The weights in the order of the classes; others may be given if labels may be unseen, or no class lacks one."""
    if class_weight is None:
        return None
    names = plain(classes)
    strange = [label for label in class_weight if label not in names]
    if strange and not unseen and not all(label in class_weight for label in names):  # a slip
        raise ValueError(f"class_weight has the label {strange[0]!r}; the estimator's classes are {shown(classes)}")
    return np.array([class_weight.get(label, 1.0) for label in names])


def read_probabilities(y_proba) -> np.ndarray:
    if type(y_proba) is not np.ndarray or y_proba.dtype not in EPS:  # else the kernel finds NaN and infinity
        y_proba = np.asarray(check_array(y_proba, ensure_2d=False, dtype=FLOATS))
    return plain_memory(y_proba)


def one_column(scores: np.ndarray, classes: Classes, name: str) -> bool:
    """Whether `scores` has one column for two classes; an error if it has neither that nor one for each."""
    if len(classes) == 2 and (scores.ndim == 1 or scores.shape[1:] == (1,)):
        return True
    if scores.shape[1:] != (len(classes),):
        raise ValueError(
            f"{name} has shape {scores.shape}; expected (n_samples, {len(classes)}), "
            f"a column for each of the labels {shown(classes)}"
        )
    return False


def two_columns(scores: np.ndarray, first: np.ndarray) -> np.ndarray:
    return np.stack([first.reshape(-1), scores.reshape(-1)], axis=1)


def read_logits(y_score, classes: Classes, name: str) -> np.ndarray:
    scores = np.asarray(y_score)
    return two_columns(scores, np.zeros_like(scores)) if one_column(scores, classes, name) else scores


def log_of_probabilities(y_proba, classes: Classes, name: str) -> np.ndarray:
    proba = read_probabilities(y_proba)
    check_unit_interval(proba)
    if one_column(proba, classes, name):
        proba = two_columns(proba, 1 - proba)
    eps = EPS[proba.dtype]
    return np.log(np.clip(proba, eps, 1 - eps))


def check_unit_interval(proba: np.ndarray) -> None:
    low, high = proba.min(), proba.max()
    if not (low >= 0 and high <= 1):  # -0.0 is right, NaN is not
        raise ValueError(f"y_proba holds values from {low} to {high}; expected 0 <= y_proba <= 1")
