"""How long a call takes, in turns with others, and how much memory, in a process of its own."""

import contextlib
import ctypes
import gc
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import ce_fast
from ce_fast.threads import SERIAL_LOGITS
from ce_fast.workloads import BY_NAME, FORWARD, LONG, OURS, Call, Calls, Shape, installed

MIB = 2**20
SHORTEST = 0.02  # seconds; a quicker call is made again until its turn lasts that long
PAUSE = 0.01  # seconds before a turn; the threads of the one before spin for some milliseconds before they sleep


# --- Time -------------------------------------------------------------------------------------------------------------


def config() -> dict:
    """What `ce_fast.show_config` prints, as a dict."""
    return ce_fast.show_config(mode="dicts") or {}


def thread_count(shape: Shape = LONG) -> int:
    """The number of threads that ours uses for logits of this shape; its peers get as many."""
    return 1 if math.prod(shape) < SERIAL_LOGITS else config()["threads"]


@contextlib.contextmanager
def torch_threads(n_threads: int) -> Iterator[None]:
    """Give torch, if it is installed, `n_threads` threads for a block."""
    if not installed("torch"):
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _turn(call: Call) -> list[float]:
    """Seconds of single calls: one, or as many as fill `SHORTEST`; none of the first, whose threads have to wake up."""
    seconds: list[float] = []
    call()
    until = time.perf_counter() + SHORTEST
    while not seconds or time.perf_counter() < until:
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return seconds


def turns(calls: Calls, repeats: int) -> dict[str, list[float]]:
    """Seconds of the single calls of each, measured in turns.

    Parameters
    ----------
    calls : dict of str to callable
    repeats : int
        Rounds; each gives every call one turn, every other round in reverse order.

    Returns
    -------
    dict of str to list of float
    """
    for call in calls.values():
        call()  # compiles, starts threads
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for i in range(repeats):
            for name in list(calls)[:: -1 if i % 2 else 1]:
                time.sleep(PAUSE)
                times[name].extend(_turn(calls[name]))
    finally:
        gc.enable()
    return times


def medians(calls: Calls, repeats: int) -> dict[str, float]:
    """The medians of `turns`: the mean of small calls would be that of the few that had to wait for a busy core."""
    return {name: statistics.median(seconds) for name, seconds in turns(calls, repeats).items()}


# --- Memory -----------------------------------------------------------------------------------------------------------


def _status(key: str) -> int:
    """A size in /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


def _result_bytes(result: object) -> int:
    """Size of the arrays and tensors that a call returned."""
    if isinstance(result, Iterable) and not hasattr(result, "nbytes"):
        return sum(map(_result_bytes, result))
    return getattr(result, "nbytes", 0)


def peak_growth(call: Call) -> int | None:
    """Bytes by which the resident set of this process, at its peak during `call`, exceeds what it was before.

    Returns
    -------
    int or None
        Without the arrays that the call returned, which must be new ones. Where the kernel does not let the peak be
        reset, the peak of the whole process counts: an upper bound. None without /proc.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc kept would hide what the call takes
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # peak := now
    try:
        before = _status("VmRSS")
        result = call()
        return max(0, _status("VmHWM") - before - _result_bytes(result))
    except OSError:
        return None


def _growth_here(name: str, who: str, shape: Shape) -> int | None:
    workload, n_threads = BY_NAME[name], thread_count(shape)
    small = tuple(min(n, 1024) for n in shape)
    with torch_threads(n_threads):
        workload.setup(small, n_threads)[who]()  # libraries and threads come once, not with every call
        return peak_growth(workload.setup(shape, n_threads)[who])


def growth(name: str = FORWARD.name, who: str = OURS, shape: Shape | None = None) -> int | None:
    """`peak_growth` of one call of a workload, in a fresh process that has its input and has made a small call.

    Parameters
    ----------
    name : str
        The workload.
    who : str
        `OURS`, or a peer that is installed.
    shape : tuple of int, optional
        Of the input; the workload's own by default.

    Returns
    -------
    int or None
        In bytes; None where it cannot be measured.
    """
    shape = BY_NAME[name].shape if shape is None else shape
    code = f"from ce_fast import measure; print(measure._growth_here({name!r}, {who!r}, {tuple(shape)!r}))"
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    return None if answer == "None" else int(answer)
