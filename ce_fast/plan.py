"""How a call is cut into work: a pure function of shapes, dtype and thread count."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BLOCK_LOGITS = 32768  # logits a block: 128 KiB of float32, some 10 us of work; a block is never less than a row

LANES = 128  # rows of logits that kernels take at a time: blocks are whole ones, or the last of each is mostly empty

CHUNK_BYTES = 1 << 22  # two huge pages: threads that meet on a new one both clear it, which cost a new gradient 25 %

FEW_ROWS = 32  # at most, whose classes are cut into parts: more of them keep the threads busy, a row each
PART_CLASSES = 16384  # of a part, at most: 3.5 us, with a gradient 6; each of the two parallel regions costs 2 to 3
PART_BYTES = 1 << 20  # of a gradient, a thread at a time: exponentials still in L2, or [26, 152064] takes 15 % more
TILE = 1024  # CE_TILE of csrc/ce_fast.h: parts are whole tiles

MOST_THREADS = 256  # OpenMP ends the process when it cannot start as many as it is asked for


@dataclass(frozen=True, slots=True)
class Plan:
    """Rows are cut into fixed blocks, few long rows into fixed parts, whose sums are added in order: the same bits for
    any number of threads."""

    compute_dtype: np.dtype
    n_rows: int
    n_classes: int
    block_rows: int
    chunk_blocks: int  # neighbouring blocks that a thread takes at a time
    part_classes: int  # classes of a part of a row; 0: rows are whole
    part_rows: int  # rows whose parts threads share at a time
    n_threads: int


def make_plan(
    outer_shape: tuple[int, ...],
    n_classes: int,
    dtype: np.dtype,
    n_threads: int,
    *,
    wide: bool = False,
    lanes: int = 1,
) -> Plan:
    """wide: compute in float64 whatever the dtype, for a loss that magnifies what is rounded. lanes: rows that
    kernels take at a time."""
    n_rows = math.prod(outer_shape)
    block_rows = max(1, BLOCK_LOGITS // n_classes)
    block_rows -= block_rows % lanes if block_rows > lanes else 0
    n_blocks = -(-n_rows // block_rows)
    part_classes = _part_classes(n_rows, n_classes)
    n_units = n_rows * -(-n_classes // part_classes) if part_classes else n_blocks
    n_threads = max(1, min(n_threads, n_units, MOST_THREADS))
    fair = n_blocks // (4 * n_threads)  # no thread waits long for the last chunk of another
    chunk_blocks = max(1, min(fair, CHUNK_BYTES // (block_rows * n_classes * dtype.itemsize)))
    compute_dtype = np.dtype(np.float64 if wide or dtype == np.float64 else np.float32)
    part_rows = max(1, n_threads * PART_BYTES // (n_classes * compute_dtype.itemsize))
    return Plan(compute_dtype, n_rows, n_classes, block_rows, chunk_blocks, part_classes, part_rows, n_threads)


def _part_classes(n_rows: int, n_classes: int) -> int:
    """Parts of equal length but for the last; 0 if there are many rows, or short ones."""
    if n_rows > FEW_ROWS or n_classes < 2 * PART_CLASSES:
        return 0
    n_parts = -(-n_classes // PART_CLASSES)
    return TILE * -(-n_classes // (n_parts * TILE))


def row_blocks(outer_shape: tuple[int, ...], most: int, first: int = 0) -> Iterator[tuple[tuple, slice]]:
    """(index into the outer axes, the same rows counted in C order) of blocks of at most `most` rows, or of one."""
    if not outer_shape:
        yield (), slice(first, first + 1)
        return
    inner = math.prod(outer_shape[1:])
    if inner > most:
        for i in range(outer_shape[0]):
            for index, rows in row_blocks(outer_shape[1:], most, first + i * inner):
                yield (i, *index), rows
        return
    step = max(1, most // max(inner, 1))
    for i in range(0, outer_shape[0], step):
        last = min(i + step, outer_shape[0])
        yield (slice(i, last),), slice(first + i * inner, first + last * inner)
