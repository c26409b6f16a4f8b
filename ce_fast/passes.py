"""One pass over logits and targets in files: the batches, what is kept of each row, and where to go on from."""

import contextlib
import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ce_fast import files, inputs
from ce_fast.config import __version__
from ce_fast.files import Source

SCHEMA = 1
ROW_VALUES = 512  # bytes a row: RowValues, its metrics and their copies take 300
ROWS_WRITTEN = 1 << 18  # of a parquet row group: some 14 MiB


@dataclass(frozen=True, slots=True)
class Batch:
    """Arrays of the same rows, those from `start` up to `stop`."""

    start: int
    stop: int
    logits: tuple[np.ndarray, ...]
    target: np.ndarray
    labels: dict[str, np.ndarray]


@dataclass(frozen=True)
class Data:
    """Logits [N, V] or [B, T, V] of one model or of two, targets [N] or [B, T], and labels: of rows, shaped as targets,
    or [B] of sequences. With `shift` the targets are the tokens themselves, each predicted by the logits before it."""

    logits: tuple[Source, ...]
    target: Source
    labels: dict[str, Source] = field(default_factory=dict)  # by what they are: group, sequence, sample_weight
    shift: bool = False
    ignore_index: int = -100

    def __post_init__(self) -> None:
        first, *others = self.logits
        for other in others:
            if other.shape != first.shape:
                raise ValueError(
                    f"logits of {first.name} have shape {first.shape}, those of {other.name} {other.shape}; "
                    f"expected the same"
                )
        if len(first.shape) not in (2, 3):
            raise ValueError(f"logits of {first.name} have shape {first.shape}; expected [N, V] or [B, T, V]")
        for source in self.logits:
            if not inputs.is_float(source.dtype):
                raise TypeError(f"logits of {source.name} have dtype {source.dtype}; expected a floating one")
        if self.target.shape != first.shape[:-1]:
            raise ValueError(
                f"logits of {first.name} have shape {first.shape}, targets of {self.target.name} {self.target.shape}; "
                f"expected targets of shape {first.shape[:-1]}"
            )
        if not inputs.is_index(self.target.dtype):
            raise TypeError(
                f"targets of {self.target.name} have dtype {self.target.dtype}; expected an integer one (class indices)"
            )
        for what, label in self.labels.items():
            if label.shape not in (first.shape[:-1], first.shape[:1]):
                raise ValueError(
                    f"{what} of {label.name} has shape {label.shape}, logits of {first.name} {first.shape}; "
                    f"expected {first.shape[:-1]}" + (f" or {first.shape[:1]}" if len(first.shape) > 2 else "")
                )
        if min(*first.shape, first.shape[-2] - self.shift) < 1:
            raise ValueError(
                f"logits of {first.name} have shape {first.shape}: no rows" + (" to shift" if self.shift else "")
            )

    @property
    def _along_rows(self) -> bool:
        """Whether the shift is along the first axis."""
        return self.shift and len(self.logits[0].shape) == 2

    @property
    def n_rows(self) -> int:
        """Steps along the first axis that a pass takes."""
        return self.logits[0].shape[0] - self._along_rows

    @property
    def row_bytes(self) -> int:
        return sum(files.row_bytes(source) for source in self.logits)

    @property
    def batch_rows(self) -> int:
        """How many make a batch of 64 MiB; of few classes fewer, for what is known of a row counts too."""
        return max(1, files.BATCH // (self.row_bytes + ROW_VALUES * math.prod(self.target.shape[1:])))

    @property
    def unit(self) -> str:
        """What is counted along the first axis."""
        return "rows" if len(self.logits[0].shape) == 2 else "sequences"

    def position(self, row: int) -> list[int]:
        """Of a row by its number in C order: its index in the logits, or batch and time."""
        shape = self.logits[0].shape
        return [row] if len(shape) == 2 else list(divmod(row, shape[1] - self.shift))

    def batches(self, start: int, size: int) -> Iterator[Batch]:
        """All rows from `start` on, `size` at a time or fewer: as many as lie together."""
        while start < self.n_rows:
            stop = min(start + size, self.n_rows)
            logits: tuple[np.ndarray, ...] = ()
            for source in self.logits:
                logits += (source.some(start, stop),)
                stop = start + len(logits[-1])
            yield self._batch(start, stop, tuple(part[: stop - start] for part in logits))
            del logits  # unmapped before the next are mapped
            start = stop

    def _batch(self, start: int, stop: int, logits: tuple[np.ndarray, ...]) -> Batch:
        later = int(self._along_rows)
        target = files.rows(self.target, start, stop + later)
        labels = {what: files.rows(source, start, stop + later) for what, source in self.labels.items()}
        within = np.ones(1, bool)
        if self.shift:  # along the last axis
            ids = labels.get("sequence")
            if ids is not None and ids.ndim == target.ndim:
                within = ids[..., 1:] == ids[..., :-1]
            labels = {what: label[..., 1:] if label.ndim == target.ndim else label for what, label in labels.items()}
            target, logits = target[..., 1:], logits if later else tuple(part[:, :-1] for part in logits)
        self._check(target, labels, within, (start + later, int(self.shift)))
        if not within.all():  # the last of a sequence does not predict the first of the next
            target = np.where(within, target.astype(np.int64), self.ignore_index)
        for what, label in labels.items():
            labels[what] = label if label.ndim == target.ndim else np.broadcast_to(label[:, None], target.shape)
        return Batch(start, stop, logits, target, labels)

    def _check(self, target: np.ndarray, labels: dict[str, np.ndarray], counts: np.ndarray, first: tuple) -> None:
        """What the evaluators say of a batch too, but not where in which file, of which `first` is the first index."""
        weight = labels.get("sample_weight")
        if weight is not None and (inputs.is_float(weight.dtype) or weight.dtype.kind in "iu"):
            bad = ~(np.isfinite(weight) & (weight >= 0))
            _refuse(bad, "sample weight", self.labels["sample_weight"], weight, first, "finite values of at least 0")
            counts = counts & (weight.reshape(weight.shape + (1,) * (target.ndim - weight.ndim)) != 0)
        n_classes = self.logits[0].shape[-1]
        bad = counts & (target != self.ignore_index) & ((target < 0) | (target >= n_classes))
        expected = f"0 <= target < {n_classes} or ignore_index={self.ignore_index}"
        _refuse(bad, "target", self.target, target, first, expected, IndexError)

    def sources(self) -> dict[str, Source]:
        names = ("logits",) if len(self.logits) == 1 else ("base", "other")
        return {**dict(zip(names, self.logits, strict=True)), "target": self.target, **self.labels}

    def describe(self) -> dict:
        """The files, with what tells whether they have changed."""
        return {
            what: {
                "name": _readable(source.name),
                "key": _readable(source.name.rpartition(files.KEY)[2] if files.KEY in source.name else ""),
                "shape": list(source.shape),
                "dtype": source.dtype.name,
                "files": [
                    {
                        "path": _readable(os.path.abspath(path)),
                        "bytes": (stat := os.stat(path)).st_size,
                        "mtime_ns": stat.st_mtime_ns,
                    }
                    for path in source.paths
                ],
            }
            for what, source in self.sources().items()
        }


def _readable(name: str) -> str:
    """Of a file: what is not UTF-8 in it is escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def _refuse(
    bad: np.ndarray, what: str, source: Source, values: np.ndarray, first: tuple, expected: str, kind=ValueError
) -> None:
    """An error that names the first bad value by its index in the file."""
    if not bad.any():
        return
    at = tuple(int(i) for i in np.argwhere(bad)[0])
    index = ", ".join(str(i + begin) for i, begin in zip(at, first, strict=False))
    raise kind(f"{what} [{index}] of {source.name} is {values[at]}; expected {expected}")


@dataclass(frozen=True)
class Checkpoint:
    """A file that says how far a pass has come, for the same pass over the same files."""

    path: str
    what: dict  # kind, inputs, options

    def load(self) -> dict | None:
        """What `save` was last given; None where there is no file. ValueError if it is of another pass."""
        try:
            with open(self.path, encoding="utf-8") as file:
                found = json.load(file)
            saved, state = found["what"], found["state"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is no state that ce-fast saved") from error
        if differing := sorted(_leaves(self._what()) ^ _leaves(saved)):
            raise ValueError(
                f"{self.path} is the state of another run: {differing[0][0]} differs; name another file, or remove it "
                f"to begin again"
            )
        return state

    def save(self, state: dict) -> None:
        files.write_whole(self.path, json.dumps({"what": self._what(), "state": state}))

    def _what(self) -> dict:
        return json.loads(json.dumps({"schema": SCHEMA, "version": __version__, **self.what}))


def _leaves(value, name: str = "") -> set[tuple[str, str]]:
    """(where, what) of all that is in nested dictionaries and lists."""
    if not isinstance(value, dict | list):
        return {(name, repr(value))}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {leaf for key, part in items for leaf in _leaves(part, f"{name} {key}".strip())}


class RowFile:
    """A table of what is known of each row. It grows in FILE.part, 8 bytes a value, so that no memory does and an
    interrupted pass can go on; `finish` makes a parquet or npz file of it."""

    def __init__(self, path: str, columns: tuple[str, ...], n_done: int = 0) -> None:
        whole = ("argmax", "rank", "same_top")
        self.path, self.part = path, path + ".part"
        self.dtype = np.dtype([(name, np.int64 if name in whole else np.float64) for name in columns])
        if n_done:
            if not os.path.exists(self.part) or os.path.getsize(self.part) < n_done * self.dtype.itemsize:
                raise ValueError(f"{self.part} has not the {n_done} rows that were done before; begin again")
            os.truncate(self.part, n_done * self.dtype.itemsize)
        self.file = open(self.part, "ab" if n_done else "wb")  # noqa: SIM115

    @staticmethod
    def is_finished(path: str) -> bool:
        """Of rows that are done: a file of that name may be an older one, beside which they wait."""
        return os.path.exists(path) and not os.path.exists(path + ".part")

    def write(self, values: dict[str, np.ndarray]) -> None:
        records = np.empty(len(values[self.dtype.names[0]]), self.dtype)  # type: ignore[index]
        for name in self.dtype.names or ():
            records[name] = values[name]
        self.file.write(records.tobytes())

    def n_rows(self) -> int:
        """Rows that are safe on disk."""
        self.file.flush()
        return self.file.tell() // self.dtype.itemsize

    def close(self, keep: bool) -> None:
        try:
            self.file.close()
        finally:
            if not keep:
                _remove(self.part)

    def finish(self) -> None:
        self.file.close()
        records, whole = np.memmap(self.part, self.dtype, "r"), self.path + ".tmp"
        try:
            if self.path.endswith(".npz"):
                with open(whole, "wb") as file:
                    np.savez(file, **{name: records[name] for name in self.dtype.names or ()})  # type: ignore[arg-type]
            else:
                _write_parquet(whole, records)
            os.replace(whole, self.path)
        finally:
            _remove(whole)
        _remove(self.part)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def _write_parquet(path: str, records: np.ndarray) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = records.dtype.names or ()
    schema = pa.schema([(name, pa.from_numpy_dtype(records.dtype[name])) for name in names])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(records), ROWS_WRITTEN):
            block = records[start : start + ROWS_WRITTEN]
            writer.write_table(pa.table([np.ascontiguousarray(block[name]) for name in names], schema=schema))


@contextlib.contextmanager
def interrupts() -> Iterator[list[bool]]:
    """A list that is no longer empty once Ctrl-C was pressed: the batch at hand is finished first, for half of one is
    in no state to go on from. Pressed again, it interrupts at once."""
    asked: list[bool] = []

    def ask(number, frame) -> None:
        asked.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread, which alone has signals
        yield asked
        return
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
