"""Arrays in files, a batch of rows at a time: what is mapped is given back with the batch, and nothing is read whole.

A source has `shape`, `dtype`, `name` and `paths`, and `some(start, stop)`: the rows from `start` on, at least one and
at most `stop - start` of them, where they lie if they lie in memory or in a mapped file.
"""

import bisect
import contextlib
import glob
import itertools
import json
import math
import mmap
import os
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

BATCH = 1 << 26  # bytes: 64 MiB of logits are some 10 ms, against which what a batch costs beside is nothing
STREAMED = 1 << 23  # of what is decoded: parquet's lists of 384 MB in one row group took 54 MiB, at 64 MiB a piece 534
KEY = "::"
BFLOAT16 = np.dtype("V2")  # what numpy.save makes of the bfloat16 of ml_dtypes
SAFETENSORS = {
    "F64": "f8", "F32": "f4", "F16": "f2", "BF16": "V2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1",
    "U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip


class Source(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def paths(self) -> tuple[str, ...]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def some(self, start: int, stop: int) -> np.ndarray: ...


@contextlib.contextmanager
def _told(name: str, what: str = "damaged") -> Iterator[None]:
    """Damaged bytes make a reader raise anything (tokenize.TokenError, NotImplementedError, zlib.error, ArrowInvalid,
    MemoryError of a length that none has): what does not name the file already is a ValueError that does."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        if isinstance(error, (OSError, ValueError)) and (name in str(error) or getattr(error, "filename", None)):
            raise
        what += ", or larger than memory" if isinstance(error, MemoryError) else ""
        raise ValueError(f"{name}: {what}: {str(error) or type(error).__name__}") from error


def row_bytes(source: Source) -> int:
    """Of one step along the first axis; 1 of an array without any."""
    return max(1, source.dtype.itemsize * math.prod(source.shape[1:]))


def rows(source: Source, start: int, stop: int) -> np.ndarray:
    """The rows from `start` up to `stop`, all of them; a copy where they do not lie together."""
    parts = [source.some(start, stop)] if start < stop else [np.empty((0, *source.shape[1:]), source.dtype)]
    while (start := start + len(parts[-1])) < stop:
        parts.append(source.some(start, stop))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


@dataclass(frozen=True, slots=True)
class Mapped:
    """An array as it lies in a file. Each batch is a mapping of its own, and unmapped with it: pages and page tables of
    what was read go at once, and 50 GB leave nothing behind."""

    name: str
    path: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    stored: np.dtype  # what numpy.memmap maps, seen as `dtype`
    fortran: bool = False

    def __post_init__(self) -> None:
        size, end = os.path.getsize(self.path), self.offset + self.stored.itemsize * math.prod(self.shape)
        if size < end:
            raise ValueError(
                f"{self.name}: truncated: the file has {size} bytes, and shape {self.shape} of {self.dtype}, which its "
                f"header promises, ends at byte {end}"
            )

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,)

    def some(self, start: int, stop: int) -> np.ndarray:
        if self.fortran:
            return self._map(self.offset, self.shape, "F")[start:stop]
        return self._map(self.offset + start * row_bytes(self), (stop - start, *self.shape[1:]), "C")

    def _map(self, offset: int, shape: tuple[int, ...], order) -> np.ndarray:
        mapped = np.memmap(self.path, self.stored, "r", offset, shape, order)
        return mapped.view(np.ndarray).view(self.dtype)


@dataclass(slots=True)
class Stream:
    """An array that is read from its beginning on; going back begins again."""

    name: str
    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    stored: np.dtype
    open: Callable[[], Iterator[np.ndarray]]  # pieces of some rows
    _pieces: Iterator[np.ndarray] = field(default_factory=lambda: iter(()))
    _piece: np.ndarray | None = None
    _at: int = 0  # the row at which _piece begins

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,)

    def some(self, start: int, stop: int) -> np.ndarray:
        if self._piece is None or start < self._at:
            self._pieces, self._piece, self._at = self.open(), np.empty((0, *self.shape[1:]), self.stored), 0
        while start >= self._at + len(self._piece):
            self._at += len(self._piece)
            self._piece = None  # no two pieces in memory
            with _told(self.name):
                self._piece = next(self._pieces, None)
            if self._piece is None:
                raise ValueError(f"{self.name}: truncated: {self._at} rows; expected {self.shape[0]}")
        return self._piece[start - self._at : stop - self._at].view(self.dtype)


@dataclass(frozen=True, slots=True)
class Joined:
    """Several files one after the other."""

    name: str
    parts: tuple[Source, ...]
    ends: list[int]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(path for part in self.parts for path in part.paths)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.ends[-1], *self.parts[0].shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def some(self, start: int, stop: int) -> np.ndarray:
        i = bisect.bisect_right(self.ends, start)
        first = self.ends[i - 1] if i else 0
        return self.parts[i].some(start - first, min(stop, self.ends[i]) - first)


def _join(name: str, parts: list[Source]) -> Source:
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    for part in parts[1:]:
        alike = part.dtype == first.dtype or (part.dtype.kind == first.dtype.kind and part.dtype.kind in "iuU")
        if part.shape[1:] != first.shape[1:] or not alike:
            raise ValueError(
                f"{part.name} has shape {part.shape} and dtype {part.dtype}, {first.name} shape {first.shape} and "
                f"dtype {first.dtype}; files that are joined along rows agree in all but the rows"
            )
    return Joined(name, tuple(parts), list(itertools.accumulate(part.shape[0] for part in parts)))


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Write a text file: whole, or not at all. A link stays one, and a pipe or a device is written to."""
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return
    path = os.path.realpath(path)
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)


def open_source(spec: str, key: str | None = None, dtype: str | None = None) -> Source:
    """The array of a file, or of all files of a pattern joined along their rows.

    Parameters
    ----------
    spec : str
        A path, or a pattern as of `glob`, whose files come in natural order (2 before 10); then perhaps "::" and the
        key of an array. ``.npy``; ``.npz``; ``.safetensors``; ``.parquet``, and ``.arrow`` or ``.feather`` (Arrow IPC),
        whose keys are columns: of numbers, or of lists of one length.
    key : str, optional
        Where `spec` has none; needed if a file holds several arrays.
    dtype : {"bfloat16", "float16"}, optional
        What 16-bit values without a name of their own are: integers, and what numpy.save makes of bfloat16. What the
        file calls a float is what it says.

    Returns
    -------
    Source

    Raises
    ------
    ValueError
        If the file is damaged or truncated, holds pickled objects, has no such key, or if joined files do not fit.
    OSError, ImportError

    Examples
    --------
    >>> import os, tempfile
    >>> import numpy as np
    >>> from ce_fast import files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for i in (2, 10):
    ...         np.save(os.path.join(folder, f"part{i}.npy"), np.full((3, 4), i))
    ...     source = files.open_source(os.path.join(folder, "part*.npy"))
    ...     print(source.shape, files.rows(source, 2, 4)[:, 0])
    (6, 4) [ 2 10]
    """
    pattern, separator, own = spec.rpartition(KEY)
    if not separator or os.path.exists(spec):
        pattern, own = spec, ""
    found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True), key=_natural)
    if not found:
        what = "no file matches" if glob.has_magic(pattern) else "no such file"
        raise FileNotFoundError(f"{pattern}: {what}")
    key = own or key
    return _join(pattern + (KEY + key if key else ""), [_open(path, key, dtype) for path in found])


def _natural(path: str) -> list:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]


def _open(path: str, key: str | None, dtype: str | None) -> Source:
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isdir(path):
        raise ValueError(
            f"{path} is a directory; expected a file, or a pattern such as '{os.path.join(path, '*.npy')}'"
        )
    if suffix not in OPENERS:
        raise ValueError(f"{path}: unknown kind of file {suffix!r}; expected one of {', '.join(OPENERS)}")
    with _told(path, "damaged, or of a format that is not read"):
        source = OPENERS[suffix](path, key, dtype)
    if not source.shape:
        raise ValueError(f"{source.name} is a scalar; expected an array with rows")
    return source


def _choose(path: str, key: str | None, keys: list[str]) -> str:
    if key in keys:
        return key  # type: ignore[return-value]
    there = f"it has {', '.join(map(repr, keys)) or 'none'}"
    if key is not None:
        raise ValueError(f"{path} has no key {key!r}; {there}")
    if len(keys) != 1:
        raise ValueError(f"{path} holds {len(keys)} arrays; name one, as {path}{KEY}KEY; {there}")
    return keys[0]


def _need(module: str, path: str):
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise ImportError(f"{path}: {module} cannot be imported: pip install 'ce_fast[eval]'") from error


def _seen_as(stored: np.dtype, dtype: str | None, name: str) -> np.dtype:
    """The dtype of what is stored: 16-bit values may be floats that NumPy has no name for; what has one keeps it."""
    if stored.hasobject:
        raise ValueError(f"{name}: holds pickled Python objects, which may run code; expected an array of numbers")
    if stored != BFLOAT16 and (dtype is None or stored.kind == "f"):
        return stored
    if stored not in (BFLOAT16, np.int16, np.uint16):
        raise ValueError(f"{name} has dtype {stored}, which cannot be seen as {dtype}; expected one of 16 bits")
    if dtype == "float16":
        return np.dtype(np.float16)
    return np.dtype(_need("ml_dtypes", name).bfloat16)


def _header(stream, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, Fortran order, dtype) of the array in a stream of the format of numpy.save."""
    fmt = np.lib.format
    with _told(name):
        version = fmt.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{name}: version {version} of the format of numpy.save; expected 1.0 or 2.0")
        shape, fortran, stored = (fmt.read_array_header_1_0 if version == (1, 0) else fmt.read_array_header_2_0)(stream)
        if not all(0 <= n <= sys.maxsize for n in shape):
            raise ValueError(f"shape {shape}")
        return shape, fortran, stored


def _open_npy(path: str, key: str | None, dtype: str | None) -> Source:
    if key is not None:
        raise ValueError(f"{path} has no key {key!r}; a .npy file is one array without a name")
    with open(path, "rb") as stream:
        shape, fortran, stored = _header(stream, path)
        return Mapped(path, path, stream.tell(), shape, _seen_as(stored, dtype, path), stored, fortran)


def _open_npz(path: str, key: str | None, dtype: str | None) -> Source:
    with zipfile.ZipFile(path) as archive:
        names = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        key = _choose(path, key, list(names))
        member, name = names[key], path + KEY + key
        with archive.open(member) as stream:
            shape, fortran, stored = _header(stream, name)
            begin = stream.tell()
    if member.file_size < (end := begin + stored.itemsize * math.prod(shape)):
        raise ValueError(f"{name}: truncated: {member.file_size} bytes; shape {shape} of {stored} ends at byte {end}")
    seen = _seen_as(stored, dtype, name)
    if member.compress_type == zipfile.ZIP_STORED:
        with open(path, "rb") as file:
            file.seek(member.header_offset + 26)  # of the local header, whose lengths may differ from the directory's
            begin += member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
        return Mapped(name, path, begin, shape, seen, stored, fortran)
    if fortran and len(shape) > 1:
        raise ValueError(f"{name}: compressed in Fortran order, whose rows lie apart; save it in C order, or by savez")

    def pieces() -> Iterator[np.ndarray]:
        with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
            stream.seek(begin)
            for start in range(0, shape[0], step):
                piece = np.empty((min(step, shape[0] - start), *shape[1:]), stored)
                _fill(stream, piece, name)
                yield piece

    step = max(1, STREAMED // max(1, stored.itemsize * math.prod(shape[1:])))
    return Stream(name, path, shape, seen, stored, pieces)


def _fill(stream, array: np.ndarray, name: str) -> None:
    left = array.reshape(-1).view(np.uint8).data
    while len(left):
        if (n := stream.readinto1(left[: STREAMED >> 3])) == 0:
            raise ValueError(f"{name}: truncated: {len(left)} bytes are missing")
        left = left[n:]


def _open_safetensors(path: str, key: str | None, dtype: str | None) -> Source:
    library = _need("safetensors", path)
    try:
        with library.safe_open(path, framework="np") as file:  # which checks the header, and the size of the file
            key = _choose(path, key, list(file.keys()))
    except library.SafetensorError as error:
        raise ValueError(f"{path}: truncated or no safetensors file: {error}") from error
    with open(path, "rb") as stream:  # get_slice copies what it gives; where a tensor lies is in the header alone
        (length,) = struct.unpack("<Q", stream.read(8))
        entry = json.loads(stream.read(length))[key]
    name = path + KEY + key
    if entry["dtype"] not in SAFETENSORS:
        raise ValueError(f"{name} has dtype {entry['dtype']}; expected one of {', '.join(SAFETENSORS)}")
    stored = np.dtype(SAFETENSORS[entry["dtype"]])
    seen = _seen_as(stored, None if stored == BFLOAT16 else dtype, name)  # which safetensors has a name for
    offset = 8 + length + entry["data_offsets"][0]
    return Mapped(name, path, offset, tuple(entry["shape"]), seen, stored)


def _open_parquet(path: str, key: str | None, dtype: str | None) -> Source:
    parquet = _need("pyarrow.parquet", path)
    with parquet.ParquetFile(path) as file:
        schema, n_rows = file.schema_arrow, file.metadata.num_rows

    def batches(key: str, size: int):
        # pages as they are needed: without a buffer, or with pre_buffer, a row group is held whole
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=STREAMED >> 3) as file:
            yield from (batch.column(0) for batch in file.iter_batches(size, columns=[key], use_threads=False))

    return _open_columns(path, key, dtype, schema, n_rows, batches)


def _open_arrow(path: str, key: str | None, dtype: str | None) -> Source:
    pa = _need("pyarrow", path)

    def reader(*fields: int):
        """Of these columns, or all: no other is decompressed, but what is not compressed is copied."""
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        buffer, options = pa.BufferReader(pa.py_buffer(mapped)), pa.ipc.IpcReadOptions(included_fields=list(fields))
        try:
            opened = pa.ipc.open_file(buffer, options=options)
            return mapped, opened, (opened.get_batch(i) for i in range(opened.num_record_batches))
        except pa.ArrowInvalid:
            buffer.seek(0)
            opened = pa.ipc.open_stream(buffer, options=options)
            return mapped, opened, iter(opened)

    def batches(key: str, size: int):
        mapped, _, found = reader(*[schema.names.index(key)] if compressed else [])
        while (batch := next(found, None)) is not None:
            batch.validate(full=True)  # of which what is read below aborts the process
            column = batch.column(key)
            for start in range(0, len(column), size):
                yield column.slice(start, size)
                mapped.madvise(mmap.MADV_DONTNEED)  # unmodified pages: what still looks at them reads them again
            del batch, column  # what is compressed is held whole: one batch of one column at a time

    _, opened, _ = reader()
    schema = opened.schema
    if hasattr(opened, "count_rows"):  # not of streams, nor of pyarrow before 26
        n_rows = opened.count_rows()
    else:
        nested = [pa.types.is_nested(kind) for kind in schema.types]
        n_rows = sum(batch.num_rows for batch in reader(nested.index(min(nested)))[2])  # of no lists, if it can be
    # what lz4 does not make smaller is stored as it is, and need not be copied either
    compressed = os.path.getsize(path) < n_rows * sum(_least_bytes(kind, pa) for kind in schema.types)
    return _open_columns(path, key, dtype, schema, n_rows, batches)


def _least_bytes(kind, pa) -> int:
    """Of a value of an Arrow type; 0 where it is not always as long."""
    if pa.types.is_fixed_size_list(kind):
        return kind.list_size * _least_bytes(kind.value_type, pa)
    return kind.bit_width // 8 if pa.types.is_primitive(kind) else 0


def _open_columns(path: str, key: str | None, dtype: str | None, schema, n_rows: int, batches) -> Source:
    """A column of an Arrow schema; batches(key, size) are arrays of it, of up to `size` rows."""
    pa = _need("pyarrow", path)
    if n_rows < 0:
        raise ValueError(f"{path}: damaged: {n_rows} rows")
    key = _choose(path, key, schema.names)
    name, kind = path + KEY + key, schema.field(key).type
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and n_rows:
        kind = pa.list_(kind.value_type, len(next(batches(key, 1))[0]))  # as pandas writes them: of one length, or not
    try:
        empty = _as_numpy(pa.array([], kind), name)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise ValueError(f"{name} is a column of {kind}; expected numbers, or lists of numbers: {error}") from error
    labels = empty.dtype.hasobject  # strings, for groups
    seen = empty.dtype if labels else _seen_as(empty.dtype, dtype, name)
    shape = (n_rows, *empty.shape[1:])
    size = max(1, STREAMED // max(1, empty.dtype.itemsize * math.prod(shape[1:])))

    def piece(column) -> np.ndarray:
        try:
            return _as_numpy(column.cast(kind), name)
        except pa.ArrowInvalid as error:  # lists of another length
            raise ValueError(f"{name}: {error}") from error

    def pieces() -> Iterator[np.ndarray]:
        return map(piece, batches(key, size))  # which keeps no column, as a loop's variable does

    return Stream(name, path, shape, seen, empty.dtype, pieces)


def _as_numpy(column, name: str) -> np.ndarray:
    """Of (n_rows, list sizes...), without a copy unless the type needs one."""
    types = _need("pyarrow", name).types
    shape = [len(column)]
    while True:
        if column.null_count:
            raise ValueError(f"{name} has {column.null_count} nulls; expected a value in each row")
        if not types.is_fixed_size_list(column.type):
            break
        shape.append(column.type.list_size)
        column = column.flatten()
    if types.is_nested(column.type):
        raise ValueError(f"{name} holds {column.type}; expected numbers, or lists of one length of numbers")
    return column.to_numpy(zero_copy_only=False).reshape(shape)


OPENERS: dict[str, Callable[[str, str | None, str | None], Source]] = {
    ".npy": _open_npy,
    ".npz": _open_npz,
    ".safetensors": _open_safetensors,
    ".parquet": _open_parquet,
    ".arrow": _open_arrow,
    ".feather": _open_arrow,
}
