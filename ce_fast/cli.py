"""The command ce-fast: evaluating a model from its logits on disk, in one pass and little memory.

Exit status: 0 all is well; 1 the data or a file is not; 2 the command line is not; 130 interrupted.
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence

import numpy as np

from ce_fast import files, passes, tables
from ce_fast.comparison import Comparison
from ce_fast.config import __version__, show_config
from ce_fast.evaluation import Evaluator

SAVE_EVERY, SAVE_SHARE = 5.0, 0.05  # seconds, or less often: of the time, for a state of many rows is large
OPTIONAL = ("rich", "plotly", "pyarrow", "safetensors", "ml_dtypes", "dask", "numba", "scikit-learn", "torch")
DONE, FAILED, INTERRUPTED, PIPE_CLOSED = 0, 1, 130, 141
PER_ROW = {
    "eval": ("lse", "log_prob", "max", "argmax", "rank", "entropy", "sum_sq_prob"),
    "compare": ("kl", "base_log_prob", "other_log_prob", "same_top"),
}
EXAMPLES = """\
examples:
  ce-fast eval logits.npy targets.npy
  ce-fast eval 'logits-*.safetensors::logits' ids.npy --shift --bytes 1290590 --json result.json --html result.html
  ce-fast eval run.npz run.npz --logits-key logits --targets-key labels --group meta.parquet::subject
  ce-fast compare bf16.npy int4.npy ids.npy --shift --per-row kl.parquet
  ce-fast eval 'shards/*.npy' targets.npy --resume state.json     # Ctrl-C, and the same again to go on
"""
FILE_HELP = """\
LOGITS and TARGETS are .npy, .npz, .safetensors, .parquet, .arrow or .feather files, or patterns in quotes, whose files
are joined along rows in natural order; FILE::KEY names an array, tensor or column of a file that holds several.
"""


def _number(kind: Callable, least: float, *, above: bool = False) -> Callable:
    def parse(text: str):
        value = kind(text)
        if not (value > least if above else value >= least) or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text}; expected a number {'>' if above else '>='} {least:g}")
        return value

    parse.__name__ = kind.__name__  # what argparse says of text that is no number
    return parse


def _list(parse: Callable) -> Callable:
    def parse_all(text: str) -> tuple:
        return tuple(parse(part) for part in text.split(","))

    parse_all.__name__ = f"list of {parse.__name__}"
    return parse_all


def _row_file(path: str) -> str:
    path = os.path.realpath(path)  # of a link what it points to is replaced, not the link
    if not path.endswith((".parquet", ".npz")):
        raise argparse.ArgumentTypeError(f"{path}; expected a name that ends in .parquet or .npz")
    return path


_count, _positive = _number(int, 1), _number(float, 0, above=True)


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--logits-key", metavar="KEY", help="of the logits, where the file holds several arrays")
    add("--targets-key", metavar="KEY", help="of the targets")
    add("--dtype", choices=("bfloat16", "float16"), help="what 16-bit values without a name of their own are")
    add("--shift", action="store_true", help="targets are token ids, each predicted by the logits before it")
    add("--ignore-index", type=int, default=-100, metavar="I", help="the target of rows that do not count (-100)")
    add("--sample-weight", metavar="FILE", help="a weight each row, or each sequence")
    add("--sequence", metavar="FILE", help="ids of sequences: --shift predicts in them alone; eval: how likely each is")
    add("--temperature", type=_positive, default=1.0, metavar="T", help="divides the logits (1)")
    add("--strict", action="store_true", help="fail at logits without a softmax (NaN, +inf), which are else left out")
    add("--json", metavar="FILE", help="write all numbers, with inputs, options and time; - for standard output")
    add("--html", metavar="FILE", help="write a page with tables and plots")
    add("--per-row", type=_row_file, metavar="FILE", help="write what is known of each row, as .parquet or .npz")
    add("--resume", metavar="FILE", help="keep the state in FILE every few seconds; go on from it if it is there")
    add("--threads", type=_count, metavar="N", help="all by default")
    add("--batch-rows", type=_count, metavar="N", help="rows, of [B, T, V] sequences, at a time (64 MiB of logits)")
    add("--quiet", action="store_true", help="no progress, no warnings")


def _parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "ce-fast", description=__doc__, epilog=f"{FILE_HELP}\n{EXAMPLES}", formatter_class=layout, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"ce-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=text, description=f"{text}\n\n{FILE_HELP}", formatter_class=layout, allow_abbrev=False
        )

    one = command("eval", "perplexity, accuracy, calibration and more of logits against targets")
    one.add_argument("logits", metavar="LOGITS", help="[N, V] or [B, T, V]")
    one.add_argument("targets", metavar="TARGETS", help="[N] or [B, T] class indices; may be in the same file")
    _add_common(one)
    one.add_argument("--top-k", type=_list(_count), default=(1, 5), metavar="K,...", help="top-k accuracies (1,5)")
    one.add_argument("--bins", type=_count, default=15, metavar="N", help="of the calibration error (15)")
    one.add_argument("--temperatures", type=_list(_positive), metavar="T,...", help="find the best of these")
    one.add_argument("--bytes", type=_number(int, 0), default=0, metavar="N", help="of the text, for bits per byte")
    one.add_argument("--characters", type=_number(int, 0), default=0, metavar="N", help="for bits per character")
    one.add_argument("--group", metavar="FILE", help="labels of rows, or of sequences: the numbers of each group too")
    two = command("compare", "what changed from a model to another: KL divergence, perplexity, agreement")
    two.add_argument("logits", metavar="BASE", help="[N, V] or [B, T, V]")
    two.add_argument("other", metavar="OTHER", help="logits of the same shape")
    two.add_argument("targets", metavar="TARGETS", help="[N] or [B, T] class indices")
    _add_common(two)
    command("info", "the backend, threads and versions")
    command("demo", "the main jobs of the package, on real data")
    command("bench", "how fast, against others; options as of python -m ce_fast.bench")
    return parser


def _check_outputs(args: argparse.Namespace, data: passes.Data) -> None:
    """What would fail at the end fails before the run."""
    taken = {os.path.realpath(path) for source in data.sources().values() for path in source.paths}
    for option in ("json", "html", "per_row", "resume"):
        path = getattr(args, option)
        if path is None or (option == "json" and path == "-"):
            continue
        real, name = os.path.realpath(path), f"--{option.replace('_', '-')} {path}"
        folder, there = os.path.dirname(real), os.path.exists(path)
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{name}: there is no directory {folder}")
        replaced = os.path.isfile(path) or not there  # by a file made beside it; a pipe or device is written itself
        needed = [folder] * replaced + [path] * there
        if os.path.isdir(path) or not all(os.access(each, os.W_OK) for each in needed):
            raise PermissionError(f"{name}: cannot be written")
        if option in ("per_row", "resume") and not replaced:
            raise ValueError(f"{name} is a pipe or device; expected a file, or the name of a new one")
        if real in taken:
            raise ValueError(f"{name} would overwrite an input, or what another option writes")
        taken.add(real)
    _need("rich")
    if args.html:
        _need("plotly")
    if args.per_row and args.per_row.endswith(".parquet"):
        _need("pyarrow")


def _need(module: str) -> None:
    try:
        __import__(module)
    except ImportError as error:
        raise ImportError(f"{module} cannot be imported: pip install 'ce_fast[eval]'") from error


def _open_data(args: argparse.Namespace) -> passes.Data:
    specs = [args.logits] if args.command == "eval" else [args.logits, args.other]
    labels = {what: getattr(args, what, None) for what in ("group", "sequence", "sample_weight")}
    return passes.Data(
        tuple(files.open_source(spec, args.logits_key, args.dtype) for spec in specs),
        files.open_source(args.targets, args.targets_key),
        {what: files.open_source(spec) for what, spec in labels.items() if spec},
        args.shift,
        args.ignore_index,
    )


class _Task:
    """What eval and compare do apart."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.columns = args, PER_ROW[args.command]
        self.kind: type[Evaluator] | type[Comparison] = Evaluator if args.command == "eval" else Comparison
        self.amounts: dict[str, int] = {}
        self.labels: tuple[str, ...] = ("sample_weight",)  # that an update takes
        self.options = {
            "temperature": args.temperature,
            "ignore_index": args.ignore_index,
            "nan_policy": "raise" if args.strict else "omit",
        }
        if args.command == "eval":
            self.options |= {"top_k": args.top_k, "n_bins": args.bins, "temperatures": args.temperatures}
            self.labels += ("group", "sequence")
            self.amounts = {"n_bytes": args.bytes, "n_characters": args.characters}

    def begin(self, state: dict | None):
        """The Evaluator or Comparison, new or of a state."""
        threads = {"n_threads": self.args.threads}
        if state is None:
            return self.kind(class_axis=-1, **self.options, **threads)
        return self.kind.from_dict(state | {"options": state["options"] | threads})

    def settings(self) -> dict:
        """All that the numbers depend on, beside the files."""
        return {"command": self.args.command, "shift": self.args.shift, **self.options, **self.amounts}

    def update(self, evaluator, batch: passes.Batch, last: bool) -> dict[str, np.ndarray]:
        """What is known of each row."""
        labels = {what: label for what, label in batch.labels.items() if what in self.labels}
        values = evaluator.update(*batch.logits, batch.target, **labels, **(self.amounts if last else {}))
        return values if isinstance(values, dict) else {name: getattr(values, name) for name in self.columns}


class _Run:
    """A pass over the files, from where a state left off to the end or to Ctrl-C."""

    def __init__(self, args: argparse.Namespace, data: passes.Data) -> None:
        self.args, self.data, self.task = args, data, _Task(args)
        self.inputs, self.settings = data.describe(), self.task.settings()
        what = {  # of the inputs not as what they were named
            "inputs": {of: found | {"name": ""} for of, found in self.inputs.items()},
            "options": self.settings,
            "per_row": args.per_row,
        }
        self.checkpoint = passes.Checkpoint(args.resume, what) if args.resume else None
        state = (self.checkpoint.load() if self.checkpoint else None) or {
            "rows": 0, "written": 0, "seconds": 0.0, "evaluator": None,
        }  # fmt: skip
        self.evaluator = self.task.begin(state["evaluator"])
        self.done, self.written, self.before = state["rows"], state["written"], state["seconds"]
        self.row_file = None
        if args.per_row and not (self.done == data.n_rows and passes.RowFile.is_finished(args.per_row)):
            self.row_file = passes.RowFile(args.per_row, self.task.columns, self.written)
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.started

    def save(self) -> None:
        if self.checkpoint:
            self.checkpoint.save(
                {
                    "rows": self.done,
                    "written": self.row_file.n_rows() if self.row_file else self.written,
                    "seconds": self.seconds,
                    "evaluator": self.evaluator.to_dict(),
                }
            )

    @contextlib.contextmanager
    def _rows_kept(self):
        """For a state to go on from; without one, no part of a file is left behind."""
        try:
            yield
        finally:
            if self.row_file:
                self.row_file.close(keep=self.checkpoint is not None)

    def go(self) -> bool:
        """Whether the end was reached."""
        with self._rows_kept():
            self._pass()
            self.save()
            finished = self.done == self.data.n_rows
            if self.row_file and finished:
                self.row_file.finish()
        return finished

    def _pass(self) -> None:
        size = self.args.batch_rows or self.data.batch_rows
        due = 0.0  # the first state comes with the first batch: that it can be written is known at once
        with (
            passes.interrupts() as interrupted,
            tables.progress(self.data, self.done, self.args.quiet) as advance,
        ):
            for batch in self.data.batches(self.done, size):
                values = self.task.update(self.evaluator, batch, batch.stop == self.data.n_rows)
                if self.row_file:
                    self.row_file.write(values)
                self.done = batch.stop
                del batch, values
                advance(self.done)
                if interrupted:
                    break
                if self.checkpoint and (now := time.perf_counter()) > due:
                    self.save()
                    due = now + max(SAVE_EVERY, (time.perf_counter() - now) / SAVE_SHARE)

    def to_dict(self, report) -> dict:
        """The report, and what it is of."""
        return report.to_dict() | {
            "invalid_positions": [self.data.position(row) for row in report.invalid_rows],
            "inputs": self.inputs,
            "options": {name: list(v) if isinstance(v, tuple) else v for name, v in self.settings.items()},
            "seconds": self.seconds,
        }


def _evaluate(args: argparse.Namespace) -> int:
    data = _open_data(args)
    _check_outputs(args, data)
    run = _Run(args, data)
    finished = run.go()
    report = run.evaluator.compute()
    if not args.quiet and report.n_invalid:
        first = "; ".join(", ".join(map(str, data.position(row))) for row in report.invalid_rows)
        more = ", the first of them" if report.n_invalid > len(report.invalid_rows) else ""
        bits = "; without their losses there are no bits per byte or character" * any(run.task.amounts.values())
        _say(f"warning: {report.n_invalid} rows have no softmax (NaN or +inf) and are left out{more}: {first}{bits}")
    if not finished:
        kept = f"; the same command goes on from {args.resume}" if args.resume else ""
        _say(f"interrupted after {run.done} of {data.n_rows} {data.unit}, whose numbers these are{kept}")
        tables.show(report)
        return INTERRUPTED
    if args.json:
        _write_json(args.json, run.to_dict(report))
    if args.html:
        from ce_fast.report import write_html

        names = [of["name"] for what, of in run.inputs.items() if what not in data.labels]
        write_html(report, args.html, title=f"ce-fast {args.command}", source=", ".join(names))
    if args.json != "-":
        tables.show(report)
    return DONE


def _write_json(path: str, found: dict) -> None:
    lines = (f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in found.items())
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    if path == "-":
        sys.stdout.write(text)
        return
    files.write_whole(path, text)


def _info() -> int:
    show_config()
    for name in OPTIONAL:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{name:>12}: {version}")
    return DONE


def _say(text: str) -> None:
    print("ce-fast: " + " ".join(text.split()), file=sys.stderr)


def _run(argv: Sequence[str]) -> int:
    if argv[:1] == ["bench"]:  # which has options of its own
        from ce_fast import bench

        return bench.main(argv[1:])
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest:
        hint = "" if rest[0].startswith("-") else " (the shell expands a pattern that is not in quotes)"
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if args.command == "compare" and args.sequence and not args.shift:
        parser.error("--sequence says within what compare shifts; expected --shift with it")
    if args.command == "info":
        return _info()
    if args.command == "demo":
        from ce_fast import demo

        return demo.main()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: None if args.quiet else _say(f"warning: {message}")
        return _evaluate(args)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments, without the name of the command; those of the process by default.

    Returns
    -------
    int
        0 all is well; 1 the data or a file is not; 130 interrupted; 141 whoever read the output has gone.

    Raises
    ------
    SystemExit
        With 2, if the command line is wrong.
    """
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # what is still in the buffer goes nowhere, and says nothing at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except (OSError, ValueError, TypeError, LookupError, ImportError, MemoryError) as error:
        _say(f"error: {error or type(error).__name__}")
        return FAILED
