"""The ratio table: how much faster than its peers ce_fast is, here and now.

    python -m ce_fast.bench [--quick] [--json FILE] [--repeats N] [--check] [--markdown] [NAME ...]

The workloads are those of `ce_fast.workloads`, for the asv suite and the demo too. Ours and every installed
peer work on the same input, in one process, with the same number of threads, and take turns, so that what disturbs
the machine disturbs all of them.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ce_fast
from ce_fast.threads import SERIAL_LOGITS
from ce_fast.workloads import BY_NAME, FORWARD, LONG, OURS, TORCH, WORKLOADS, Call, Calls, Shape, Workload, installed

MEMORY = "memory"  # the name of the line about it
MIB = 2**20
MEMORY_BAR = MIB  # bytes beyond the input; torch takes the logits' size once more
SHORTEST = 0.005  # seconds; a quicker call is made again until its turn lasts that long
PAUSE = 0.01  # seconds before a turn; the threads of the one before spin for some milliseconds before they sleep


@dataclass(frozen=True)
class Row:
    """What was measured of one workload against one peer; None where one of them is not installed."""

    name: str
    work: str
    shape: Shape
    peer: str
    ours_seconds: float | None
    peer_seconds: float | None
    at_least: float | None
    goal: float | None

    @property
    def ns_per_logit(self) -> float | None:
        return None if self.ours_seconds is None else 1e9 * self.ours_seconds / math.prod(self.shape)

    @property
    def ratio(self) -> float | None:
        if self.ours_seconds is None or self.peer_seconds is None:
            return None
        return self.peer_seconds / self.ours_seconds

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None without a bar or a measurement."""
        return None if self.at_least is None or self.ratio is None else self.ratio >= self.at_least


@dataclass(frozen=True)
class Memory:
    """Bytes by which the process grew during a call, beyond its input, by who made the call."""

    work: str
    growth: dict[str, int | None]
    at_most: int = MEMORY_BAR

    @property
    def met(self) -> bool | None:
        ours = self.growth.get(OURS)
        return None if ours is None else ours < self.at_most


# --- Time -------------------------------------------------------------------------------------------------------------


def _config() -> dict:
    return ce_fast.show_config(mode="dicts") or {}


def thread_count(shape: Shape = LONG) -> int:
    """The number of threads that ours uses for logits of this shape; its peers get as many."""
    return 1 if math.prod(shape) < SERIAL_LOGITS else _config()["threads"]


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
    """Seconds of single calls: one, or as many as fill `SHORTEST`."""
    seconds: list[float] = []
    until = time.perf_counter() + SHORTEST
    while not seconds or time.perf_counter() < until:
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return seconds


def medians(calls: Calls, repeats: int) -> dict[str, float]:
    """Seconds that each call takes, measured in turns.

    Parameters
    ----------
    calls : dict of str to callable
    repeats : int
        Rounds; each gives every call one turn, every other round in reverse order.

    Returns
    -------
    dict of str to float
        The medians over the single calls of all rounds: the mean of small calls would be that of the few that had to
        wait for a busy core.
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
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def measure(workload: Workload, shape: Shape | None = None, repeats: int = 7) -> list[Row]:
    """Time a workload against all its peers.

    Parameters
    ----------
    workload : Workload
    shape : tuple of int, optional
        Of the input; the workload's own by default.
    repeats : int, default=7

    Returns
    -------
    list of Row
        One for each peer.
    """
    shape = workload.shape if shape is None else shape
    n_threads = thread_count(shape)
    with torch_threads(n_threads):
        made = workload.setup(shape, n_threads)
        wanted = (OURS, *(peer.name for peer in workload.peers))
        seconds = medians({name: made[name] for name in wanted if name in made}, repeats)
    ours, work = seconds.get(OURS), f"{workload.work} {list(shape)}"
    return [
        Row(workload.name, work, shape, peer.name, ours, seconds.get(peer.name), peer.at_least, peer.goal)
        for peer in workload.peers
    ]


# --- Memory -----------------------------------------------------------------------------------------------------------


def _status(key: str) -> int:
    """A size in /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


def peak_growth(call: Call) -> int | None:
    """Bytes by which the resident set of this process, at its peak during `call`, exceeds what it was before.

    Returns
    -------
    int or None
        Where the kernel does not let the peak be reset, the peak of the whole process counts: an upper bound. None
        without /proc.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc kept would hide what the call takes
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # peak := now
    try:
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def _growth_here(name: str, who: str, shape: Shape) -> int | None:
    workload, n_threads = BY_NAME[name], thread_count()
    with torch_threads(n_threads):
        workload.setup((64, 1024), n_threads)[who]()  # libraries and threads come once, not with every call
        return peak_growth(workload.setup(shape, n_threads)[who])


def forward_growth(who: str = OURS, shape: Shape = LONG, name: str = FORWARD.name) -> int | None:
    """`peak_growth` of one call of a workload, in a fresh process that has its input and has made a small call.

    Parameters
    ----------
    who : str
        `OURS`, or a peer that is installed.
    shape : tuple of int
        Of the logits, two dimensions.
    name : str
        The workload.

    Returns
    -------
    int or None
        In bytes; None where it cannot be measured.
    """
    code = f"from ce_fast import bench; print(bench._growth_here({name!r}, {who!r}, {tuple(shape)!r}))"
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    return None if answer == "None" else int(answer)


def measure_memory(shape: Shape = LONG) -> Memory:
    """What a forward pass takes beyond its input: ours, and torch's if it is installed."""
    who = [OURS, TORCH] if installed("torch") else [OURS]
    work = f"{FORWARD.work} {list(shape)}, memory beyond the input"
    return Memory(work, {name: forward_growth(name, shape) for name in who})


# --- The report -------------------------------------------------------------------------------------------------------

DISTRIBUTIONS = ("numpy", "torch", "scikit-learn", "numba", "jax", "ml_dtypes")
HEADER = ("work", "ours ms", "ns/logit", "peer", "peer ms", "ratio", "at least", "goal", "")


def machine() -> dict:
    """The processor, its cores, the threads used, the backend and the versions."""
    config = _config()
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    versions = {"ce_fast": ce_fast.__version__, "python": platform.python_version()}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"cpu": model, "cores": os.cpu_count(), **{k: config[k] for k in ("threads", "backend", "isa")}, **versions}


def _number(value: float | None, scale: float = 1.0, unit: str = "") -> str:
    if value is None:
        return "-"
    value *= scale
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1}f}{unit}"


def _bar(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}x"


def _verdict(met: bool | None) -> str:
    return {True: "met", False: "MISSED", None: ""}[met]


@dataclass(frozen=True)
class Report:
    """The rows of one run, the memory line, and the machine."""

    rows: tuple[Row, ...]
    memory: Memory | None
    machine: dict

    def missed(self) -> list[str]:
        """The bars that were measured and not met."""
        found = [f"{row.work} against {row.peer}: {_number(row.ratio)}" for row in self.rows if row.met is False]
        return found + ([self._memory_line()] if self.memory and self.memory.met is False else [])

    def unmeasured(self) -> list[str]:
        """The bars that could not be measured here."""
        found = [f"{r.work} against {r.peer}" for r in self.rows if r.at_least is not None and r.ratio is None]
        return found + ([self._memory_line()] if self.memory and self.memory.met is None else [])

    def to_dict(self) -> dict:
        """Of the types JSON knows."""
        rows = [
            {**dataclasses.asdict(r), "ns_per_logit": r.ns_per_logit, "ratio": r.ratio, "met": r.met} for r in self.rows
        ]
        memory = {**dataclasses.asdict(self.memory), "met": self.memory.met} if self.memory else None
        return {"machine": self.machine, "rows": rows, "memory": memory}

    def _cells(self) -> Iterable[Sequence[str]]:
        last = None
        for row in self.rows:
            ours = (row.work, _number(row.ours_seconds, 1e3), _number(row.ns_per_logit))
            theirs = (row.peer, _number(row.peer_seconds, 1e3), _number(row.ratio, unit="x"))
            bars = (_bar(row.at_least), _bar(row.goal), _verdict(row.met))
            yield (*(("", "", "") if row.name == last else ours), *theirs, *bars)
            last = row.name

    def _memory_line(self) -> str:
        assert self.memory is not None
        sizes = (f"{name} {_number(size, 1 / MIB, ' MiB')}" for name, size in self.memory.growth.items())
        bar = f"must be under {self.memory.at_most / MIB:g} MiB"
        return f"{self.memory.work}: {', '.join(sizes)}; {bar} {_verdict(self.memory.met)}".rstrip()

    def _below(self) -> Iterable[str]:
        if self.memory is not None:
            yield self._memory_line()
        m = self.machine
        names = ", ".join(f"{name} {m[name]}" for name in ("ce_fast", "python", *DISTRIBUTIONS) if name in m)
        yield f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['isa']} ({m['backend']} backend); {names}."

    def text(self) -> str:
        """A table for the terminal."""
        cells = [HEADER, *self._cells()]
        widths = [max(len(line[i]) for line in cells) for i in range(len(HEADER))]
        left = {0, HEADER.index("peer"), len(HEADER) - 1}
        lines = (
            "  ".join(
                c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in cells
        )
        table = [line.rstrip() for line in lines] if self.rows else []
        return "\n".join([*table, *([""] if table else []), *self._below()])

    def markdown(self) -> str:
        """A table for GitHub."""
        rule = ["---" if name in ("work", "peer", "") else "---:" for name in HEADER]
        table = ["| " + " | ".join(line) + " |" for line in (HEADER, rule, *self._cells())] if self.rows else []
        return "\n\n".join(["\n".join(table), *self._below()]).lstrip()


def run(names: Sequence[str] = (), quick: bool = False, repeats: int | None = None) -> Report:
    """Measure workloads, one after the other.

    Parameters
    ----------
    names : sequence of str
        Of `WORKLOADS`, or `MEMORY`; all if empty.
    quick : bool, default=False
        A quarter of the rows and three repeats: the order of magnitude in some 20 seconds.
    repeats : int, optional
        7 by default, or 3.

    Returns
    -------
    Report
    """
    repeats = repeats or (3 if quick else 7)
    chosen = [workload for workload in WORKLOADS if not names or workload.name in names]
    rows = [row for w in chosen for row in measure(w, w.quick_shape if quick else w.shape, repeats)]
    if quick:  # the bars are those of the full size
        rows = [dataclasses.replace(row, at_least=None, goal=None) for row in rows]
    memory = None
    if not names or MEMORY in names:
        memory = measure_memory(FORWARD.quick_shape if quick else FORWARD.shape)
    return Report(tuple(rows), memory, machine())


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value}; expected at least 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ce_fast.bench", description="How ce_fast compares, here and now.")
    names = (*BY_NAME, MEMORY)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to measure, all by default: {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="a quarter of the rows, few repeats")
    parser.add_argument("--repeats", type=_positive, metavar="N", help="turns for everyone; 7 by default, quick 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file as well")
    parser.add_argument("--markdown", action="store_true", help="print the table as GitHub markdown")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is not met")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if unknown := set(args.names) - {*BY_NAME, MEMORY}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected any of {', '.join((*BY_NAME, MEMORY))}")
    report = run(args.names, args.quick, args.repeats)
    print(report.markdown() if args.markdown else report.text())
    if args.json:
        args.json.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    if not args.check:
        return 0
    for line in report.unmeasured():
        print(f"not measured: {line}", file=sys.stderr)
    for line in report.missed():
        print(f"missed: {line}", file=sys.stderr)
    return 1 if report.missed() else 0


if __name__ == "__main__":
    sys.exit(main())
