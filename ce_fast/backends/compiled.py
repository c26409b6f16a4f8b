"""The Cython kernels, on the best instruction set of this CPU or the one that CE_FAST_ISA names."""

import os
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import numpy as np

from ce_fast import _kernels
from ce_fast.backends import Job, Rows
from ce_fast.plan import Plan

ISAS: tuple[str, ...] = _kernels.ISAS
max_threads = _kernels.max_threads


def _isa_index(name: str, source: str) -> int:
    if name not in ISAS:
        raise ValueError(f"{source} is {name!r}; this CPU and build have {ISAS}")
    return ISAS.index(name)


_best = _isa_index(os.environ.get("CE_FAST_ISA") or ISAS[-1], "CE_FAST_ISA")
_isa: ContextVar[int] = ContextVar("ce_fast_isa", default=_best)


@contextmanager
def _use_isa(name: str):
    """For tests: run on another instruction set within this process."""
    token = _isa.set(_isa_index(name, "isa"))
    try:
        yield
    finally:
        _isa.reset(token)


@lru_cache(maxsize=64)  # the name of a dtype costs a microsecond
def _code(dtype: np.dtype) -> int:
    return {**_kernels.DTYPES, **_kernels.INDEX_TYPES}[dtype.name]


def _dtype(array: np.ndarray | None) -> int:
    return 0 if array is None else _code(array.dtype)


def scan_targets(rows: Rows, n_rows: int, n_classes: int) -> tuple[int, int, float]:
    return _kernels.scan_targets(
        rows.target, _dtype(rows.target), rows.ignore_index, n_rows, n_classes, rows.weight, rows.sample_weight
    )


def run(job: Job, plan: Plan) -> float:
    rows = job.rows
    return _kernels.run_rows(
        _isa.get(), plan.compute_dtype.itemsize == 8, plan.n_rows, plan.block_rows, plan.chunk_blocks, plan.n_threads,
        job.logits, _dtype(job.logits), job.soft, _dtype(job.soft), job.out, _kernels.EMIT[job.emit],
        rows.target, _dtype(rows.target), rows.ignore_index,
        rows.weight, rows.sample_weight, job.upstream,
        job.on, job.off, job.z_loss, job.scale, job.loss, job.lse,
    )  # fmt: skip


def config() -> dict:
    version = _kernels.openmp_version()
    return {"isa": ISAS[_isa.get()], "isas": ISAS, "openmp": version or False}
