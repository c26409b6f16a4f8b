"""How a call is cut into work: a pure function of shapes, dtype and thread count."""

from dataclasses import dataclass

import numpy as np

BLOCK_LOGITS = 32768  # logits a block: 128 KiB of float32, some 10 us of work; a block is never less than a row

CHUNK_BYTES = 1 << 22  # two huge pages: threads that meet on a new one both clear it, which cost a new gradient 25 %

MOST_THREADS = 256  # OpenMP ends the process when it cannot start as many as it is asked for


@dataclass(frozen=True, slots=True)
class Plan:
    """Rows are cut into fixed blocks, whose sums are added in order: the same bits for any number of threads."""

    compute_dtype: np.dtype
    n_rows: int
    n_classes: int
    block_rows: int
    chunk_blocks: int  # neighbouring blocks that a thread takes at a time
    n_threads: int


def make_plan(outer_shape: tuple[int, ...], n_classes: int, dtype: np.dtype, n_threads: int) -> Plan:
    n_rows = 1
    for n in outer_shape:
        n_rows *= n
    block_rows = max(1, BLOCK_LOGITS // n_classes)
    n_blocks = -(-n_rows // block_rows)
    n_threads = max(1, min(n_threads, n_blocks, MOST_THREADS))
    fair = n_blocks // (4 * n_threads)  # no thread waits long for the last chunk of another
    chunk_blocks = max(1, min(fair, CHUNK_BYTES // (block_rows * n_classes * dtype.itemsize)))
    compute_dtype = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    return Plan(compute_dtype, n_rows, n_classes, block_rows, chunk_blocks, n_threads)
