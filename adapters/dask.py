"""Dask: the Evaluator over arrays in chunks, on any scheduler. Lazy: nothing is read before `.compute()`.

    rows in chunks                  block -> Evaluator; the Evaluators are merged in order, as a tree
    the vocabulary in chunks too    block -> some numbers a row; these are merged, then as above

What goes from one worker to another is states and numbers a row, never logits. No task changes what another made: one
that is run again, after its worker died, gives what it gave.
"""

import contextlib
import functools
from dataclasses import dataclass

import numpy as np

from ce_fast import calibration, engine, inputs, moments
from ce_fast.backends import Rows
from ce_fast.evaluation import Evaluator
from ce_fast.losses import CrossEntropyLoss
from ce_fast.rows import RowValues, merge_parts, part_values

try:
    import dask
    import dask.array as da
    from dask.delayed import Delayed, delayed
except ImportError as missing:
    raise ImportError("ce_fast.adapters.dask needs Dask: pip install 'ce_fast[dask]'") from missing

__all__ = ["evaluate", "evaluator"]

FAN_IN = 8  # states merged by one task: a state of a vocabulary of 128 000 takes up to 2 MB


def evaluate(
    logits, targets, sample_weight=None, *, groups=None, sequences=None, n_bytes=0, n_characters=0, **options
) -> Delayed:
    """The `Evaluator`'s report on logits in chunks.

    Parameters
    ----------
    logits : dask.array.Array of shape (n_rows, n_classes)
        In chunks of any sizes, of the classes too.
    targets : dask.array.Array or array_like of shape (n_rows,)
        Class indices; in other chunks than the logits' rows they are rechunked.
    sample_weight, groups, sequences : dask.array.Array or array_like of shape (n_rows,), optional
        Likewise; as `sample_weight`, `group` and `sequence` of `Evaluator.update`.
    n_bytes, n_characters : int, default=0
        Of the text that all rows predict.
    **options
        Of `Evaluator`. `n_threads` is 1 by default: Dask runs a task on each core.

    Returns
    -------
    dask.delayed.Delayed
        Its `.compute()` gives the `EvalReport`.

    See Also
    --------
    evaluator : The `Evaluator` itself, to merge with others or to keep.

    Raises
    ------
    TypeError, ValueError
        At once, if `logits` is no Dask array of two dimensions, a shape does not fit, the size of a chunk is unknown,
        or an option is wrong. What is wrong with the data itself is an error of `.compute()`, as of
        `Evaluator.update`; a note on it says in which rows.

    Notes
    -----
    On Dask's dashboard the tasks are named evaluate-block, evaluate-part (of the vocabulary), evaluate-merge and
    evaluate-report. `EvalReport.invalid_rows` are rows of the whole array.

    Rows in one chunk of classes give what the `Evaluator` does, up to the order of sums; with float32 and 16-bit
    logits rows in several give it to about 1e-7, for their sums are computed in float32 and merged in double.

    Examples
    --------
    >>> import dask.array as da
    >>> from ce_fast.adapters.dask import evaluate
    >>> logits = da.from_array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0], [3.0, 0.0, 0.0]], chunks=(2, 3))
    >>> report = evaluate(logits, [0, 1, 1]).compute()
    >>> report.overall.n_rows, round(report.overall.nll.value, 6)
    (3, 1.272071)
    """
    state = evaluator(
        logits,
        targets,
        sample_weight,
        groups=groups,
        sequences=sequences,
        n_bytes=n_bytes,
        n_characters=n_characters,
        **options,
    )
    return delayed(Evaluator.compute)(state, dask_key_name=f"evaluate-report-{state.key}")


def evaluator(
    logits, targets, sample_weight=None, *, groups=None, sequences=None, n_bytes=0, n_characters=0, **options
) -> Delayed:
    """What `evaluate` computes its report of; arguments and errors are the same.

    Returns
    -------
    dask.delayed.Delayed
        Its `.compute()` gives the `Evaluator`, whose state (`to_dict`) may be kept, or merged with that of other data.

    Examples
    --------
    >>> import dask.array as da
    >>> from ce_fast.adapters.dask import evaluator
    >>> logits = da.from_array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], chunks=(1, 3))
    >>> january, february = (evaluator(logits, targets).compute() for targets in ([0, 1], [0, 0]))
    >>> january.merge(february).compute().overall.accuracy.value
    0.75
    """
    options = {"n_threads": 1} | options
    _check(logits, Evaluator(**options).options["class_axis"])
    given = {"target": targets, "sample_weight": sample_weight, "group": groups, "sequence": sequences}
    rows = {name: _like_rows(name, value, logits) for name, value in given.items() if value is not None}
    first = Evaluator(**options)
    first.update(np.empty((0, 1)), np.empty(0, np.int64), n_bytes=n_bytes, n_characters=n_characters)
    token = dask.base.tokenize(logits, rows, options, n_bytes, n_characters)
    whole = len(logits.chunks[1]) == 1
    states = _states_of_rows(logits, rows, options, token) if whole else _states_of_parts(logits, rows, options, token)
    return _merged(options, [delayed(first), *states], token)


def _check(logits, class_axis: int | None) -> None:
    if not isinstance(logits, da.Array):
        kind = type(logits)
        raise TypeError(
            f"logits is a {kind.__module__}.{kind.__name__}; expected a dask.array.Array (ce_fast.Evaluator takes what "
            f"is in memory)"
        )
    if logits.ndim != 2:
        raise ValueError(f"logits has shape {logits.shape}; expected (n_rows, n_classes): reshape it")
    if class_axis not in (None, 1, -1):
        raise ValueError(f"class_axis is {class_axis}; expected the last one of (n_rows, n_classes): transpose it")
    _check_known("logits", logits)


def _check_known(name: str, array: da.Array) -> None:
    if np.isnan(np.concatenate([np.array(sizes, float) for sizes in array.chunks])).any():
        raise ValueError(
            f"{name} has chunks of unknown size: shape {array.shape}; call its compute_chunk_sizes() first, or "
            f"give the sizes where it is made"
        )


def _like_rows(name: str, value, logits: da.Array) -> da.Array:
    """An array a number a row, in the chunks of the logits' rows."""
    array = value if isinstance(value, da.Array) else da.from_array(inputs.as_array(value, name), chunks=-1)
    if name == "target" and array.size and not inputs.is_index(array.dtype):
        raise TypeError(f"target has dtype {array.dtype}; expected class indices (an integer dtype)")
    _check_known(name, array)
    if array.shape != logits.shape[:1]:
        raise ValueError(f"{name} has shape {array.shape}; expected {logits.shape[:1]} for logits {logits.shape}")
    return array.rechunk((logits.chunks[0],))


def _starts(sizes: tuple[int, ...]) -> da.Array:
    """The number of the first row, or class, of each chunk."""
    return da.from_array(np.cumsum((0, *sizes[:-1])), chunks=1)


def _blocks(function, name: str, axes: str, *arguments) -> da.Array:
    """A task for each block along the axes; what it gives may be any object. Arguments: array, its axes, ..."""
    nothing = np.empty((0,) * len(axes), object)
    return da.blockwise(function, axes, *arguments, name=name, dtype=object, meta=nothing, align_arrays=False)


# --- Rows in chunks ---------------------------------------------------------------------------------------------------


def _states_of_rows(logits: da.Array, rows: dict[str, da.Array], options: dict, token: str) -> list[Delayed]:
    by_rows = [part for array in (_starts(logits.chunks[0]), *rows.values()) for part in (array, "i")]
    update = functools.partial(_update, options, tuple(rows))
    return _blocks(update, f"evaluate-block-{token}", "ij", logits, "ij", *by_rows).to_delayed()[:, 0]


def _update(options: dict, names: tuple[str, ...], logits: np.ndarray, first, *rows: np.ndarray) -> Evaluator:
    """What an Evaluator makes of one block."""
    evaluator = Evaluator(**options)
    with _rows_named(first, len(logits)):
        evaluator.update(logits, **dict(zip(names, rows, strict=True)))
    return evaluator


# --- The vocabulary in chunks too: i goes over blocks of rows, j over blocks of classes -------------------------------


def _states_of_parts(logits: da.Array, rows: dict[str, da.Array], options: dict, token: str) -> list[Delayed]:
    first_row, first_class = _starts(logits.chunks[0]), _starts(logits.chunks[1])
    by_rows = [part for array in (first_row, *rows.values()) for part in (array, "i")]
    check = functools.partial(_checked, options, tuple(rows), logits.shape[1])
    checked = _blocks(check, f"evaluate-targets-{token}", "i", *by_rows)
    own = _blocks(_own_logit, f"evaluate-target-logit-{token}", "ij", logits, "ij", first_class, "j", checked, "i")
    owns = _blocks(sum, f"evaluate-target-logits-{token}", "i", own, "ij")
    arguments = (logits, "ij", first_class, "j", checked, "i", owns, "i")
    parts = _blocks(functools.partial(_parts, options), f"evaluate-part-{token}", "ij", *arguments)
    add = functools.partial(_add, options)
    states = _blocks(add, f"evaluate-block-{token}", "i", parts, "ij", checked, "i", first_row, "i")
    return states.to_delayed()  # Dask does not fuse over j: the blocks of a row of them stay where they are


@dataclass(frozen=True, slots=True)
class Checked:
    """What is known of a block of rows without its logits."""

    rows: Rows
    counts: np.ndarray
    target: np.ndarray  # int64; 0 in rows that do not count
    labels: tuple | None  # of groups,
    ids: tuple | None  # and of sequences


def _checked(options: dict, names: tuple[str, ...], n_classes: int, first, *rows: np.ndarray) -> Checked:
    given = dict(zip(names, rows, strict=True))
    with _rows_named(first, len(given["target"])):
        shape_alone = np.broadcast_to(0.0, (len(given["target"]), n_classes))
        loss = CrossEntropyLoss(ignore_index=options.get("ignore_index", -100))
        call = calibration.check_call(loss, shape_alone, given["target"], given.get("sample_weight"))
        counts, target, _ = engine._pick(call.rows)
        bad = (target < 0) | (target >= n_classes)
        inputs.check_target_found(int(bad.argmax()) if bad.any() else -1, call.rows, call.logits)
        labels, ids = (
            moments.as_labels(given[name], target.shape, name) if name in given else None
            for name in ("group", "sequence")
        )
    return Checked(call.rows, counts, target, labels, ids)


def _own_logit(logits: np.ndarray, first_class, checked: Checked) -> np.ndarray:
    """(n_rows,) float64: of the target, where it is one of these classes, else 0."""
    at = checked.target - first_class[0]
    here = np.flatnonzero(checked.counts & (at >= 0) & (at < logits.shape[1]))
    own = np.zeros(len(logits))
    own[here] = logits[here, at[here]]
    return own


def _parts(options: dict, logits: np.ndarray, first_class, checked: Checked, own: np.ndarray) -> list[RowValues]:
    """At the temperature, and at each of the temperatures."""
    own_options = Evaluator(**options).options
    grid = (own_options["temperature"], *(own_options["temperatures"] or ()))
    arguments = (logits, int(first_class[0]), checked.target, own, checked.counts)
    return [part_values(*arguments, temperature=t, n_threads=own_options["n_threads"]) for t in grid]


def _add(options: dict, parts: list[list[RowValues]], checked: Checked, first) -> Evaluator:
    evaluator = Evaluator(**options)
    values, *by_temperature = [merge_parts(of_one) for of_one in zip(*parts, strict=True)]
    nll = np.array([0.0 - of_one.log_prob for of_one in by_temperature]).reshape(
        len(by_temperature), checked.target.size
    )
    with _rows_named(first, checked.target.size):
        evaluator._add(checked.rows, checked.target.shape, values, nll, checked.labels, checked.ids)
    return evaluator


# --- Both -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _rows_named(first: np.ndarray, n: int):
    """Errors say where the block is: they number rows from its first."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in rows {first[0]} to {first[0] + n - 1} of the Dask array, where rows count from 0")
        raise


def _merge(options: dict, states: list[Evaluator]) -> Evaluator:
    """Of new ones: a task that is run again finds its input as it was."""
    return functools.reduce(Evaluator.merge, states, Evaluator(**options))


def _merged(options: dict, states: list[Delayed], token: str) -> Delayed:
    """The states merged in order, as a tree."""
    level = 0
    while len(states) > 1:
        parts = [states[i : i + FAN_IN] for i in range(0, len(states), FAN_IN)]
        keys = [f"evaluate-merge-{token}-{level}-{i}" for i in range(len(parts))]
        states = [delayed(_merge)(options, part, dask_key_name=key) for part, key in zip(parts, keys, strict=True)]
        level += 1
    return states[0]
