"""Time per logit against the number of classes and against size: ours, its peers, and one read of the array.

`python -m ce_fast.bench --plot FILE` runs and draws it. A cliff is a number of classes that costs more than half as
much again per logit as the numbers just before it.
"""

import gc
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ce_fast.measure import thread_count, torch_threads, turns
from ce_fast.workloads import COMPILED, OURS, READ, TORCH, forward_calls, gradient_calls

TOTAL = 4_000_000  # logits
EVERY = range(1, 301)  # numbers of classes, every one of them
LONGER = (
    320, 384, 448, 512, 640, 768, 1000, 1024, 1025, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32000,
    32768, 50257, 65536, 98304, 128256, 131072, 152064,
)  # fmt: skip
PEERS_AT = (1, 2, 3, 4, 6, 8, 10, 16, 21, 32, 50, 64, 100, 128, 200, 256, 300, *LONGER[3::2], LONGER[-1])
COMPILED_AT = (10, 100, 1000, 10_000, 50257)  # each takes seconds to compile
GRADIENT_AT = (
    *range(1, 18), 20, 21, 24, 28, 32, 33, 40, 48, 50, 64, 65, 80, 100, 128, 129, 200, 256, 257, 300, *LONGER
)  # fmt: skip
SIZES = (*(1000 * 2**i for i in range(18)), 200_000_000)
SIZES_OF = (1000, 50257)  # the numbers of classes that are measured against size

CLASSES, GRADIENT, SIZE = "forward", "loss and gradient", "size"  # the panels
CLIFF = 1.5
SUSPECT = 1.2  # what is this far above those before it is measured again
BUSY = 2  # so many times as long for one read of the same array: something else was running
WINDOW = 3  # points before one that it is compared with


@dataclass(frozen=True)
class Point:
    """The least time a call took: there are few calls of many, and what a busy machine adds makes peaks.

    `who` is ours or a peer; `panel` is one of `CLASSES`, `GRADIENT`, `SIZE`.
    """

    panel: str
    who: str
    n_rows: int
    n_classes: int
    seconds: float

    @property
    def n_logits(self) -> int:
        return self.n_rows * self.n_classes

    @property
    def ns_per_logit(self) -> float:
        return 1e9 * self.seconds / self.n_logits


# --- Measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """Measures points on views of one array of normal logits: what they are costs the time of none."""

    logits: np.ndarray

    def __call__(self, panel: str, n_rows: int, n_classes: int, who: Iterable[str], repeats: int = 3) -> list[Point]:
        """One point for each of `who` that is installed, measured in turns."""
        logits = self.logits[: n_rows * n_classes].reshape(n_rows, n_classes)
        target = np.arange(n_rows) * 7919 % n_classes
        n_threads = thread_count(logits.shape)
        with torch_threads(n_threads):
            if panel == GRADIENT:
                calls = gradient_calls(logits, target)
            else:
                calls = forward_calls(logits, target, compiled=COMPILED in who)
            seconds = turns({name: calls[name] for name in who if name in calls}, repeats)
        return [Point(panel, name, n_rows, n_classes, min(taken)) for name, taken in seconds.items()]


def run(
    total: int = TOTAL,
    classes: Sequence[int] = (*EVERY, *LONGER, *COMPILED_AT),
    gradient: Sequence[int] = GRADIENT_AT,
    sizes: Sequence[int] = SIZES,
) -> list[Point]:
    """Measure all panels.

    Parameters
    ----------
    total : int
        Logits of a point of the panels over classes.
    classes, gradient : sequence of int
        Numbers of classes for the forward pass, and for loss and gradient.
    sizes : sequence of int
        Logits of a point of the panel over sizes.

    Returns
    -------
    list of Point
        A point that seemed to be a cliff was measured twice.
    """
    drawn = np.random.default_rng(0).standard_normal(max(total, *classes), dtype=np.float32) * 3
    measure = Measure(np.resize(drawn, max(len(drawn), *sizes)))
    measure(CLASSES, 1, max(classes), [OURS, TORCH, COMPILED], repeats=1)  # imports what there is
    gc.freeze()  # what was imported: to look through it again cost every point 0.17 s
    points = []
    for panel, counts in (CLASSES, classes), (GRADIENT, gradient):
        found = []
        for n in sorted(set(counts)):
            who = [OURS, READ, TORCH] if n in PEERS_AT or n in COMPILED_AT else [OURS]
            found += measure(panel, max(1, total // n), n, who + [COMPILED] * (n in COMPILED_AT))
        points += confirmed(found, partial(measure, panel, who=[OURS], repeats=9))
    for n in SIZES_OF:
        for size in (size for size in sizes if size >= n):
            points += measure(SIZE, size // n, n, [OURS, READ, TORCH])
    gc.unfreeze()
    return points


# --- Cliffs -----------------------------------------------------------------------------------------------------------


def cliffs(points: Iterable[Point], above: float = CLIFF) -> list[tuple[Point, float]]:
    """Ours, of one panel over classes: the points above so many times the median of the `WINDOW` before; the ratio.

    Time per logit falls with the number of classes or stays, so that a rise is a peak or a step.
    """
    ours = sorted((p for p in points if p.who == OURS), key=lambda p: p.n_classes)
    found = []
    for i in range(1, len(ours)):
        before = statistics.median(p.ns_per_logit for p in ours[max(0, i - WINDOW) : i])
        if (ratio := ours[i].ns_per_logit / before) > above:
            found.append((ours[i], ratio))
    return found


def confirmed(points: Sequence[Point], measure: Callable[[int, int], list[Point]]) -> list[Point]:
    """The points, those of ours that are suspects measured again: the quicker time counts."""
    found = {suspect for suspect, _ in cliffs(points, SUSPECT)}
    return [min(p, *measure(p.n_rows, p.n_classes), key=lambda p: p.seconds) if p in found else p for p in points]


def cliff_lines(points: Iterable[Point]) -> list[str]:
    """What to print about the cliffs of a sweep, and whether the machine was idle enough to believe in them."""
    points = list(points)
    lines = [
        f"cliff: {panel}, {point.n_classes} classes: {point.ns_per_logit:.3g} ns/logit, {ratio:.2f} of those before it"
        for panel in (CLASSES, GRADIENT)
        for point, ratio in cliffs(p for p in points if p.panel == panel)
    ] or ["no cliff"]
    reads = [p.ns_per_logit for p in points if p.panel == CLASSES and p.who == READ]
    if reads and max(reads) > BUSY * min(reads):
        lines.append(f"not to be trusted: reading the same array took {min(reads):.2g} to {max(reads):.2g} ns/logit")
    return lines


# --- The plot ---------------------------------------------------------------------------------------------------------

COLOURS = {OURS: "#0b6e4f", TORCH: "#c8553d", COMPILED: "#8a5a9e", READ: "#777777"}


def _draw(axes, points: Sequence[Point], over: str) -> None:
    """Lines of ns/logit over an attribute of the points, one for each who."""
    for who in COLOURS:
        line = sorted((getattr(p, over), p.ns_per_logit) for p in points if p.who == who)
        style = {OURS: "-", READ: "--", COMPILED: "D"}.get(who, "o-")
        if line:
            axes.plot(*zip(*line, strict=True), style, color=COLOURS[who], markersize=3, linewidth=1.3, label=who)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(True, which="major", alpha=0.3)


def plot(points: Iterable[Point], path: Path) -> None:
    """Draw a sweep: a panel over classes for the forward pass and for the gradient, one over size for each K.

    Parameters
    ----------
    points : iterable of Point
    path : Path
        Its ending is the format.

    Raises
    ------
    ImportError
        Without matplotlib.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    points = list(points)
    with rc_context({"svg.hashsalt": "ce_fast", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(10, 7.5), layout="constrained")
        panels = figure.subplots(2, 2, sharey=True).flat
        for axes, panel in zip(panels, (CLASSES, GRADIENT), strict=False):
            shown = [p for p in points if p.panel == panel]
            _draw(axes, shown, "n_classes")
            total = max((p.n_logits for p in shown), default=0)
            axes.set(title=f"{panel}, float32, {total / 1e6:.3g} million logits", xlabel="classes")
        for axes, n in zip(list(figure.axes)[2:], SIZES_OF, strict=True):
            _draw(axes, [p for p in points if p.panel == SIZE and p.n_classes == n], "n_logits")
            axes.set(title=f"forward, float32, {n} classes", xlabel="logits")
        for axes in figure.axes[::2]:
            axes.set_ylabel("ns per logit")
        figure.axes[0].legend()
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
