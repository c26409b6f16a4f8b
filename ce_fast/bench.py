"""The ratio table: how much faster than its peers ce_fast is, and how much less memory it takes, here and now.

    python -m ce_fast.bench [--quick] [--repeats N] [--check] [--markdown] [--sweep] [--json FILE] [--plot FILE]
                            [--readme FILE] [NAME ...]

The workloads are those of `ce_fast.workloads`, for the asv suite and the demo too. Ours and every installed
peer work on the same input, in one process, with the same number of threads, and take turns, so that what disturbs
the machine disturbs all of them. Memory is measured in a fresh process for each.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ce_fast
from ce_fast import sweep
from ce_fast.measure import MIB, config, growth, medians, thread_count, torch_threads
from ce_fast.workloads import BY_NAME, OURS, READ, WORKLOADS, Shape, Workload

MEMORY = "memory"  # names the lines about it
PAGE = 4096  # bytes; nobody grows by less
MARKS = "<!-- bench -->", "<!-- /bench -->"  # around the tables in the README


@dataclass(frozen=True)
class Row:
    """The time of one workload against one peer; None where one of them is not installed."""

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
class MemoryRow:
    """Bytes by which one call of a workload grows the process, beyond its input and its results."""

    name: str
    work: str
    peer: str
    ours_bytes: int | None
    peer_bytes: int | None
    under: int | None  # bytes of ours
    at_least: float | None
    goal: float | None

    @property
    def ratio(self) -> float | None:
        if self.ours_bytes is None or self.peer_bytes is None:
            return None
        return self.peer_bytes / max(self.ours_bytes, PAGE)

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None without a bar or a measurement."""
        if self.under is not None:
            return None if self.ours_bytes is None else self.ours_bytes < self.under
        return None if self.at_least is None or self.ratio is None else self.ratio >= self.at_least


# --- Measuring --------------------------------------------------------------------------------------------------------


def title(workload: Workload, shape: Shape) -> str:
    """Work and shape, as the tables name them."""
    return f"{workload.work} {list(shape)}"


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
    ours, work = seconds.get(OURS), title(workload, shape)
    return [
        Row(workload.name, work, shape, peer.name, ours, seconds.get(peer.name), peer.at_least, peer.goal)
        for peer in workload.peers
    ]


def measure_memory(workload: Workload, shape: Shape | None = None) -> list[MemoryRow]:
    """The memory of a workload against each of its peers in memory, every call in a fresh process.

    Parameters
    ----------
    workload : Workload
    shape : tuple of int, optional
        Of the input; the workload's own by default.

    Returns
    -------
    list of MemoryRow
    """
    shape = workload.shape if shape is None else shape
    if not workload.memory:
        return []
    names = {OURS, *(bar.peer for bar in workload.memory)} & workload.who()
    grown = {name: growth(workload.name, name, shape) for name in names}
    work, ours = title(workload, shape), grown.get(OURS)
    return [
        MemoryRow(workload.name, work, bar.peer, ours, grown.get(bar.peer), bar.under, bar.at_least, bar.goal)
        for bar in workload.memory
    ]


# --- The report -------------------------------------------------------------------------------------------------------

DISTRIBUTIONS = ("numpy", "torch", "scikit-learn", "numba", "jax", "ml_dtypes", "xgboost", "xgboost-cpu", "lightgbm")
HEADER = ("name", "work", "ours ms", "ns/logit", "peer", "peer ms", "ratio", "bar", "goal", "")
MEMORY_HEADER = ("name", "memory beyond input and results", "ours MiB", "peer", "peer MiB", "ratio", "bar", "goal", "")
LEFT = {"name", "work", MEMORY_HEADER[1], "peer", ""}  # the others are numbers


def machine() -> dict:
    """The processor, its cores, the threads used, the backend and the versions."""
    found = config()
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    versions = {"ce_fast": ce_fast.__version__, "python": platform.python_version()}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"cpu": model, "cores": os.cpu_count(), **{k: found[k] for k in ("threads", "backend", "isa")}, **versions}


def _number(value: float | None, scale: float = 1.0, unit: str = "") -> str:
    if value is None:
        return "-"
    value *= scale
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1 if value < 1000 else 0}f}{unit}"


def _bars(row: Row | MemoryRow) -> tuple[str, str, str, str]:
    """Ratio, bar, goal and verdict. Of a floor, how many times as long as it ours takes."""
    ratios = (row.ratio, row.at_least, row.goal)
    if row.peer == READ:
        cells = ["-" if ratio is None else f"{1 / ratio:.3g} of it" for ratio in ratios]
    else:
        cells = [_number(row.ratio, unit="x"), *("-" if bar is None else f"{bar:g}x" for bar in ratios[1:])]
    if isinstance(row, MemoryRow) and row.under is not None:
        cells[1] = f"under {row.under / MIB:g} MiB"
    return cells[0], cells[1], cells[2], {True: "met", False: "MISSED", None: ""}[row.met]


def _times(rows: Iterable[Row]) -> Iterable[Sequence[str]]:
    last = None
    for row in rows:
        ours = (row.name, row.work, _number(row.ours_seconds, 1e3), _number(row.ns_per_logit))
        yield (*(("",) * 4 if row.name == last else ours), row.peer, _number(row.peer_seconds, 1e3), *_bars(row))
        last = row.name


def _memories(rows: Iterable[MemoryRow]) -> Iterable[Sequence[str]]:
    for row in rows:
        ours, theirs = (_number(size, 1 / MIB) for size in (row.ours_bytes, row.peer_bytes))
        yield (MEMORY, row.work, ours, row.peer, theirs, *_bars(row))


def _plain(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table for the terminal."""
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = (
        "  ".join(c.ljust(w) if h in LEFT else c.rjust(w) for h, c, w in zip(header, line, widths, strict=True))
        for line in (header, *cells)
    )
    return "\n".join(line.rstrip() for line in lines)


def _github(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table for GitHub."""
    rule = ["---" if name in LEFT else "---:" for name in header]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *cells))


@dataclass(frozen=True)
class Report:
    """The rows of one run, the points of a sweep, and the machine."""

    rows: tuple[Row, ...]
    memory: tuple[MemoryRow, ...]
    machine: dict
    points: tuple[sweep.Point, ...] = ()

    def _where(self, met: bool | None) -> list[str]:
        """The lines with a bar whose verdict is `met`."""
        lines = []
        rows: tuple[Row | MemoryRow, ...] = (*self.rows, *self.memory)
        for row in rows:
            ratio, bar, _, _ = _bars(row)
            if bar != "-" and row.met is met:
                what = "memory of " if isinstance(row, MemoryRow) else ""
                lines.append(f"{what}{row.work} against {row.peer}: {ratio}, wanted {bar}")
        return lines

    def missed(self) -> list[str]:
        """The bars that were measured and not met."""
        return self._where(False)

    def unmeasured(self) -> list[str]:
        """The bars that could not be measured here."""
        return self._where(None)

    def to_dict(self) -> dict:
        """Of the types JSON knows."""

        def rows(found: Iterable[Row | MemoryRow], *derived: str) -> list[dict]:
            return [dataclasses.asdict(row) | {name: getattr(row, name) for name in derived} for row in found]

        return {
            "machine": self.machine,
            "rows": [row | {"shape": list(row["shape"])} for row in rows(self.rows, "ns_per_logit", "ratio", "met")],
            "memory": rows(self.memory, "ratio", "met"),
            "sweep": [dataclasses.asdict(point) for point in self.points],
        }

    def to_json(self) -> str:
        """`to_dict`, a line for each row and point, so that a diff shows which."""
        parts = {
            key: "[\n" + ",\n".join(map(json.dumps, part)) + "\n]" if isinstance(part, list) else json.dumps(part)
            for key, part in self.to_dict().items()
        }
        return "{\n" + ",\n".join(f"{json.dumps(key)}: {part}" for key, part in parts.items()) + "\n}\n"

    def text(self, markdown: bool = False) -> str:
        """The tables and the machine, for the terminal or for GitHub."""
        table = _github if markdown else _plain
        m = self.machine
        names = ", ".join(f"{name} {m[name]}" for name in ("ce_fast", "python", *DISTRIBUTIONS) if name in m)
        parts = [
            table(HEADER, list(_times(self.rows))) if self.rows else "",
            table(MEMORY_HEADER, list(_memories(self.memory))) if self.memory else "",
            f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['isa']} ({m['backend']} backend); {names}.",
        ]
        return "\n\n".join(part for part in parts if part)


def update_readme(path: Path, text: str) -> None:
    """Put `text` between the two marks of a file, which must have them.

    Raises
    ------
    ValueError
        If the file does not have each mark once, in order.
    """
    before, after = MARKS
    old = path.read_text()
    pattern = f"{re.escape(before)}.*?{re.escape(after)}"
    if old.count(before) != 1 or old.count(after) != 1 or not re.search(pattern, old, re.DOTALL):
        raise ValueError(f"{path}: expected {before} and then {after}, each once")
    path.write_text(re.sub(pattern, lambda _: f"{before}\n\n{text}\n\n{after}", old, flags=re.DOTALL))


def run(names: Sequence[str] = (), quick: bool = False, repeats: int | None = None) -> Report:
    """Measure workloads, one after the other.

    Parameters
    ----------
    names : sequence of str
        Of `WORKLOADS`, or `MEMORY`; all if empty.
    quick : bool, default=False
        A quarter of the rows and three repeats: the order of magnitude in some 30 seconds.
    repeats : int, optional
        7 by default, or 3.

    Returns
    -------
    Report
    """
    repeats = repeats or (3 if quick else 7)
    shapes = {w.name: w.quick_shape if quick else w.shape for w in WORKLOADS}
    rows = [row for w in WORKLOADS if not names or w.name in names for row in measure(w, shapes[w.name], repeats)]
    memory = [row for w in WORKLOADS if not names or MEMORY in names for row in measure_memory(w, shapes[w.name])]
    if quick:  # the ratios that are asked for are those of the full size
        rows = [dataclasses.replace(row, at_least=None, goal=None) for row in rows]
        memory = [dataclasses.replace(row, at_least=None, goal=None) for row in memory]
    return Report(tuple(rows), tuple(memory), machine())


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
    parser.add_argument("--sweep", action="store_true", help="time per logit against classes and size; lists cliffs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured to a file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the sweep, as .svg or .png; implies --sweep")
    parser.add_argument("--readme", type=Path, metavar="FILE", help=f"replace what a file has between {MARKS[0]} marks")
    parser.add_argument("--markdown", action="store_true", help="print the tables as GitHub markdown")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is not met")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if unknown := set(args.names) - {*BY_NAME, MEMORY}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected any of {', '.join((*BY_NAME, MEMORY))}")
    if args.readme and (args.names or args.quick):
        parser.error("--readme: expected neither NAME nor --quick, for the README shows all")
    report = run(args.names, args.quick, args.repeats)
    print(report.text(args.markdown), flush=True)
    if args.readme:
        update_readme(args.readme, report.text(markdown=True))
    if args.sweep or args.plot:
        report = dataclasses.replace(report, points=tuple(sweep.run()))
        print("\n" + "\n".join(sweep.cliff_lines(report.points)))
    if args.json:
        args.json.write_text(report.to_json())
    if args.plot:
        sweep.plot(report.points, args.plot)
    if not args.check:
        return 0
    for line in report.unmeasured():
        print(f"not measured: {line}", file=sys.stderr)
    for line in report.missed():
        print(f"missed: {line}", file=sys.stderr)
    return 1 if report.missed() else 0


if __name__ == "__main__":
    sys.exit(main())
