from numpy import ndarray

DTYPES: dict[str, int]
INDEX_TYPES: dict[str, int]
EMIT: dict[str | None, int]
ISAS: tuple[str, ...]

def openmp_version() -> int: ...
def max_threads() -> int: ...
def scan_targets(
    target: ndarray | None,
    target_type: int,
    ignore_index: int,
    n_rows: int,
    n_classes: int,
    weight: ndarray | None,
    sample_weight: ndarray | None,
) -> tuple[int, int, float]: ...
def run_rows(
    isa: int,
    compute_float64: bool,
    n_rows: int,
    block_rows: int,
    chunk_blocks: int,
    n_threads: int,
    logits: ndarray,
    logits_dtype: int,
    soft: ndarray | None,
    soft_dtype: int,
    out: ndarray | None,
    emit: int,
    target: ndarray | None,
    target_type: int,
    ignore_index: int,
    weight: ndarray | None,
    sample_weight: ndarray | None,
    upstream: ndarray | None,
    on: float,
    off: float,
    z_loss: float,
    scale: float,
    loss: ndarray | None,
    lse: ndarray | None,
) -> float: ...
