"""How many threads a call may use."""

import math
import os
from functools import lru_cache
from pathlib import Path

SERIAL_LOGITS = 32768  # below this, starting threads costs more than they save

_forked = False


def _mark_forked() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_forked)


@lru_cache(maxsize=1)
def _cgroup_limit() -> float:
    """CPUs that the control group grants (v2 `cpu.max`, v1 `cpu.cfs_quota_us`); inf where it sets no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        folder = Path("/sys/fs/cgroup/cpu")
        v1_quota = int((folder / "cpu.cfs_quota_us").read_text())
        return v1_quota / int((folder / "cpu.cfs_period_us").read_text()) if v1_quota > 0 else math.inf
    except (OSError, ValueError):
        return math.inf


def available() -> int:
    """CPUs this process may run on: its affinity, bounded by its control group."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(affinity, _cgroup_limit())))


def resolve(n_threads: int | None, n_logits: int, backend_limit) -> int:
    """Threads for a call over `n_logits` logits.

    None: 1 for little work, else what the process may use and `backend_limit()` (OMP_NUM_THREADS, threadpoolctl)
    allows. A number is taken as given. A forked child always runs on one thread: the OpenMP runtime of its parent
    does not survive the fork, and a parallel region would hang.
    """
    if _forked:
        return 1
    if n_threads is not None:
        return n_threads
    if n_logits < SERIAL_LOGITS:
        return 1
    return max(1, min(available(), backend_limit()))
