"""What the command ce-fast shows: a progress bar, and tables of numbers with their standard errors."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from ce_fast.evaluation import EvalReport
from ce_fast.passes import Data

MOST_GROUPS = 200  # lines; the JSON output holds all


@contextlib.contextmanager
def progress(data: Data, done: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A function that is told how many rows are done, and shows it if a person looks at standard error."""
    if quiet or not sys.stderr.isatty():
        yield lambda rows: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.fields[unit]}  {task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=data.n_rows, completed=done, speed="", unit=data.unit)
        first, started = done, time.perf_counter()

        def advance(rows: int) -> None:
            rate = (rows - first) / (time.perf_counter() - started)
            bar.update(task, completed=rows, speed=f"{rate:,.0f} {data.unit}/s  {rate * data.row_bytes / 1e9:.2f} GB/s")

        yield advance


def show(report) -> None:
    """Print a report: drawn for a person, in plain columns for all else."""
    if isinstance(report, EvalReport):
        _table(("", "value", "standard error"), _evaluation(report))
        if report.groups:
            _table(("group", "rows", "nll", "standard error", "perplexity", "accuracy"), _groups(report))
    else:
        _table(("", "value", "standard error"), _lines(report, report.n_rows))
        percentiles = (report.kl_percentiles, report.target_prob_change_percentiles)
        lines = [(f"{p:g} %", f"{kl:.6g}", f"{percentiles[1][p]:.6g}") for p, kl in percentiles[0].items()]
        _table(("percentile", "KL (nats)", "change of p(target)"), lines)


def _table(header: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    seen = sys.stdout.isatty()
    table = Table(box=box.SIMPLE_HEAD if seen else None, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    console = Console(file=sys.stdout, width=None if seen else 400, markup=False, highlight=False, emoji=False)
    with console.capture() as text:  # rich would end the process, with status 1, where a pipe is closed
        console.print(table)
    shown, encoding = "\n".join(line.rstrip() for line in text.get().splitlines()), sys.stdout.encoding or "utf-8"
    sys.stdout.write(shown.encode(encoding, "backslashreplace").decode(encoding) + "\n\n")


def _line(name: str, of) -> tuple[str, str, str]:
    """Of an Estimate."""
    return name, f"{of.value:.6g}", f"{of.stderr:.2g}"


def _count(name: str, n: int) -> list[tuple[str, str, str]]:
    return [(name, str(n), "")] if n else []


def _lines(report, n_rows: int) -> list[tuple[str, str, str]]:
    ignored, invalid = _count("rows ignored", report.n_ignored), _count("rows without a softmax", report.n_invalid)
    numbers = [_line(name, of) for name, of in report.estimates().items()]
    return [("rows", str(n_rows), ""), *ignored, *invalid, *numbers]


def _evaluation(report: EvalReport) -> list[tuple[str, str, str]]:
    lines = _lines(report, report.overall.n_rows)
    if report.temperatures is not None:
        best = "none" if report.best_temperature is None else f"{report.best_temperature:g}"
        lines += [("best temperature", best, "")]
        lines += [
            (f"nll at temperature {t:g}", f"{nll:.6g}", f"{stderr:.2g}")
            for t, nll, stderr in zip(*report.temperatures.values(), strict=True)
        ]
    if report.sequences:
        lines += [("sequences", str(len(report.sequences["id"])), "")]
        lines += [("sequences, all tokens the argmax", str(int(report.sequences["is_greedy"].sum())), "")]
    return lines


def _groups(report: EvalReport) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [
        (str(label), str(m.n_rows), *_line("", m.nll)[1:], f"{m.perplexity.value:.6g}", f"{m.accuracy.value:.6g}")
        for label, m in list(report.groups.items())[:MOST_GROUPS]
    ]
    more = len(report.groups) - len(lines)
    return [*lines, (f"and {more} more", *[""] * 5)] if more else lines
