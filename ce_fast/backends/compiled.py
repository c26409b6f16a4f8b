"""The Cython kernels, on the best instruction set of this CPU or the one that CE_FAST_ISA names."""

import os
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np

from ce_fast import _kernels
from ce_fast.backends import ElementJob, Job, ProbabilityJob
from ce_fast.plan import Plan

ISAS: tuple[str, ...] = _kernels.ISAS
max_threads = _kernels.max_threads
scan_targets = _kernels.scan_targets
empty_like = _kernels.empty_like


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


def small_call(logits, target, ignore_index: int, gradient: bool) -> tuple[float, np.ndarray | None] | None:
    if type(logits) is not np.ndarray or type(target) is not np.ndarray:
        return None
    return _kernels.small_call(_isa.get(), logits, target, ignore_index, gradient)


def small_call_at(*what) -> tuple[np.ndarray, np.ndarray | None] | None:
    return _kernels.small_call_at(_isa.get(), *what)


def run(job: Job, plan: Plan) -> tuple[float, int, int, float]:
    return _kernels.run_rows(_isa.get(), plan, job)


def measure(job: Job, plan: Plan, values, target_logit: np.ndarray | None) -> int:
    return _kernels.measure(_isa.get(), plan, job, values, target_logit)


def run_elements(job: ElementJob, plan: Plan) -> tuple[float, bool]:
    return _kernels.run_elements(_isa.get(), plan, job)


def label_range(labels: np.ndarray, n_threads: int) -> tuple[int, int]:
    return _kernels.label_range(_isa.get(), labels, n_threads)


def number_strings(strings: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    n_slots = 1 << min(16, (2 * len(strings)).bit_length())
    first, number = np.empty(n_slots // 2, np.int64), np.empty(len(strings), np.int32)
    found = _kernels.number_strings(strings, number, first, np.zeros(n_slots, np.int32))
    return None if found < 0 else (first[:found], number)


def run_probabilities(job: ProbabilityJob, plan: Plan) -> tuple[float, bool, bool, bool]:
    return _kernels.run_probabilities(_isa.get(), plan, job)


def config() -> dict:
    version = _kernels.openmp_version()
    return {"isa": ISAS[_isa.get()], "isas": ISAS, "openmp": version or False}
