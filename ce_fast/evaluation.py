"""Evaluating a model from its logits, batch by batch: sums are kept, no rows, and sums of parts are those of the whole.

>>> import numpy as np
>>> from ce_fast.evaluation import Evaluator
>>> rng, parts = np.random.default_rng(0), [Evaluator(), Evaluator()]
>>> for part in parts:
...     _ = part.update(rng.normal(size=(100, 8)), rng.integers(8, size=100))
>>> parts[0].merge(parts[1]).compute().overall.n_rows
200
"""

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from ce_fast import calibration, engine, inputs, moments
from ce_fast.backends import Rows
from ce_fast.inputs import Logits
from ce_fast.losses import CrossEntropyLoss
from ce_fast.metrics import EvalReport, Metrics
from ce_fast.moments import Estimate, Moments, RowCount, Table
from ce_fast.rows import RowValues, row_values

__all__ = ["Estimate", "EvalReport", "Evaluator", "Metrics"]

NLL_EDGES = np.r_[np.linspace(0, 32, 129), np.inf]  # nats; the last bin takes what a model holds for impossible
NAMES = ("nll", "accuracy", "mean_reciprocal_rank", "brier_score", "entropy")  # then accuracy in the top k


def _check_top_k(value) -> tuple[int, ...]:
    if not isinstance(value, Iterable):
        value = (value,)
    ks = sorted({inputs.check_integer("top_k", k) for k in value})
    if ks and ks[0] < 1:
        raise ValueError(f"top_k holds {ks[0]}; expected at least 1")
    return tuple(ks)


def _check_temperatures(value) -> tuple[float, ...] | None:
    if value is None:
        return None
    if not isinstance(value, Iterable):
        raise TypeError(f"temperatures is {value!r}; expected some numbers, or None")
    grid = sorted({CrossEntropyLoss(temperature=t).temperature for t in value})
    if not grid:
        raise ValueError("temperatures is empty; expected at least one, or None")
    return tuple(grid)


def has_softmax(values: RowValues) -> np.ndarray:
    return ~np.isnan(values.log_prob)


def wide_nll(logits: Logits, rows: Rows, used: np.ndarray, temperature: float, n_threads: int | None) -> np.ndarray:
    """(n_rows,) -log p of the targets, in float64 whatever the dtype; 0 of rows that are not used."""
    own = Rows(rows.target, rows.ignore_index, sample_weight=used.astype(np.float64))
    fields = {"logits": logits.rows, "rows": own, "temperature": temperature}
    return engine.run_block(fields, None, n_threads, wide=True)


def _check_amount(name: str, value) -> int:
    if inputs.check_integer(name, value) < 0:
        raise ValueError(f"{name} is {value}; expected at least 0")
    return int(value)


class Evaluator:
    r"""Metrics of a model, from its logits batch by batch, with standard errors.

    With :math:`w_i` the sample weights, :math:`p_i` = softmax(logits / temperature), :math:`t_i` the target and
    :math:`r_i` its rank (0: it has the largest logit; of equal logits that of the lower index comes first), every
    metric is a mean :math:`m = \sum_i w_i v_i / \sum_i w_i` over the n rows that count, of

    .. math::

        \text{nll}: -\log p_{it}, \quad \text{accuracy}: [r_i = 0], \quad \text{top k}: [r_i < k], \quad
        \text{reciprocal rank}: \frac{1}{1 + r_i}, \quad \text{entropy}: -\sum_k p_{ik} \log p_{ik}, \quad
        \text{Brier}: (1 - p_{it})^2 + \sum_{k \ne t} p_{ik}^2

    (Brier, "Verification of forecasts expressed in terms of probability", 1950), with the standard error

    .. math:: s = \sqrt{\tfrac{n}{n - 1} \textstyle\sum_i w_i^2 (v_i - m)^2} \Big/ \textstyle\sum_i w_i ,

    which takes rows to be independent. Bits are nats / log 2; the perplexity is :math:`e^m` of the nll, with
    :math:`e^m s`. Bits per byte are :math:`\sum_i w_i\,\text{nll}_i / (\log 2 \cdot \text{bytes})`, per character
    likewise, the number of rows and of bytes taken as given; they are NaN if rows have no softmax.

    The calibration error is that of Guo et al., arXiv:1706.04599, in bins of the same width: with
    :math:`d_i = [r_i = 0] - \max_k p_{ik}` and :math:`d_b` its mean in bin b of the confidences, :math:`w_b` the share
    of the bin in the weights,

    .. math:: ECE = \sum_b w_b |d_b| = \frac{\sum_i w_i \operatorname{sign}(d_{b(i)})\, d_i}{\sum_i w_i}, \qquad
              MCE = \max_b |d_b| ;

    their standard errors are those of that mean over the rows, the signs taken as given, and of :math:`d_b`. (ECE is
    never negative: where a model is calibrated, it is of the size of its standard error.)

    Parameters
    ----------
    top_k : int or sequence of int, default=(1, 5)
        Of the accuracies in the top k that `Metrics` hold; `EvalReport.top_k` gives those of all rows for any k.
    n_bins : int, default=15
        Bins of confidences.
    temperature : float, default=1.0
        Divides the logits.
    temperatures : sequence of float, optional
        Temperatures at each of which the mean NLL of logits / T is found too: one pass each. The best one is the best
        of these; `fit_temperature` finds the best of all.
    nan_policy : {"omit", "raise"}, default="omit"
        What becomes of rows that count, but have no softmax: they are left out of every mean and counted, or an error.
    ignore_index, class_axis, n_threads
        As in `CrossEntropyLoss`.

    Attributes
    ----------
    options : dict
        The options, as checked.
    n_rows_seen : int
        All rows so far, those that do not count too.

    Raises
    ------
    ValueError, TypeError
        If an option is out of its range or of the wrong type.

    Notes
    -----
    Nothing of the logits' size is made. What is kept: a few numbers a group, position, rank and bin, and nine a
    sequence; no rows. Rows that do not count (ignored, or of weight 0) are not read. The same batches in the same order
    give the same bits for any number of threads; parts merged in another order agree to rounding. Threads that update
    at the same time take an evaluator each, and merge.

    Examples
    --------
    >>> import ce_fast as ce
    >>> evaluator = ce.Evaluator()
    >>> _ = evaluator.update([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [0, 2], group=["easy", "hard"])
    >>> _ = evaluator.update([[0.0, 0.0, 3.0]], [2], group="easy")
    >>> report = evaluator.compute()
    >>> report.overall.n_rows, round(report.overall.nll.value, 6), round(report.overall.nll.stderr, 6)
    (3, 0.628637, 0.463289)
    >>> report.overall.accuracy.value == 2 / 3, report.groups["easy"].accuracy.value, report.top_k(3).value
    (True, 1.0, 1.0)
    """

    same = ("top_k", "n_bins", "temperature", "temperatures", "nan_policy", "ignore_index")  # of what is merged

    def __init__(
        self,
        *,
        top_k=(1, 5),
        n_bins=15,
        temperature=1.0,
        temperatures=None,
        nan_policy="omit",
        ignore_index=-100,
        class_axis=None,
        n_threads=None,
    ) -> None:
        self._loss = loss = CrossEntropyLoss(
            ignore_index=ignore_index, temperature=temperature, class_axis=class_axis, n_threads=n_threads
        )
        self.options: dict[str, Any] = {
            "top_k": _check_top_k(top_k),
            "n_bins": calibration.Binning(n_bins).n_bins,
            "temperature": loss.temperature,
            "temperatures": _check_temperatures(temperatures),
            "nan_policy": inputs.check_choice("nan_policy", nan_policy, moments.NAN_POLICIES),
            "ignore_index": loss.ignore_index,
            "class_axis": loss.class_axis,
            "n_threads": loss.n_threads,
        }
        self._rows = RowCount()
        self._amounts = {"n_bytes": 0, "n_characters": 0}
        self._overall = Moments.empty(1, self._n_metrics)
        self._groups = Table(self._n_metrics)
        self._bins = Moments.empty(self.options["n_bins"], 3)  # confidence, right, and the difference
        self._positions = Moments.empty(0, 1)
        self._temperatures = Moments.empty(1, len(self.options["temperatures"] or ()))
        self._sequences = Table(2)  # nll, and whether it is not the argmax; unweighted
        self._nll_bins = Moments.empty(len(NLL_EDGES) - 1, 0)  # of no metric: n, and the sums of w and w^2
        self._ranks = Moments.empty(0, 0)

    @property
    def _n_metrics(self) -> int:
        return len(NAMES) + len(self.options["top_k"])

    @property
    def n_rows_seen(self) -> int:
        """All rows, those that do not count too."""
        return self._rows.seen

    def update(
        self, logits, target, sample_weight=None, group=None, *, sequence=None, n_bytes=0, n_characters=0
    ) -> RowValues:
        """Add a batch.

        Parameters
        ----------
        logits, target, sample_weight : array_like
            As in `CrossEntropyLoss`, target of class indices.
        group : int, str or array_like of these, optional
            Labels of the groups that get metrics of their own: one for the batch, or an array of target's shape, or of
            its leading axes ([B] for logits [B, T, V]: one a sequence), or one with as many axes that broadcasts.
        sequence : int, str or array_like of these, optional
            Likewise, which sequence rows are of. Over its rows that count, in all updates, the log-likelihood is
            summed, unweighted; it is NaN if one of them has no softmax.
        n_bytes, n_characters : int, default=0
            Of the text that the batch predicts, for bits per byte, per character.

        Returns
        -------
        RowValues
            Of the batch; NaN and -1 in rows that do not count.

        Raises
        ------
        IndexError
            If a target is neither a class nor `ignore_index`.
        ValueError
            If rows that count have no softmax and `nan_policy` is "raise"; or, as TypeError, if a shape, a dtype or a
            value does not fit. The evaluator is then what it was.

        Warns
        -----
        UserWarning
            If the logits look like probabilities.
        """
        amounts = {name: _check_amount(name, n) for name, n in (("n_bytes", n_bytes), ("n_characters", n_characters))}
        call = calibration.check_call(self._loss, logits, target, sample_weight)
        outer = call.logits.outer_shape
        labels = None if group is None else moments.as_labels(group, outer, "group")
        ids = None if sequence is None else moments.as_labels(sequence, outer, "sequence")
        values = row_values(call.logits, call.rows, temperature=self._loss.temperature, n_threads=self._loss.n_threads)
        by_temperature = self._temperature_rows(call, engine._pick(call.rows)[0] & has_softmax(values))
        self._add(call.rows, outer, values, by_temperature, labels, ids, amounts)
        return values

    def _add(
        self,
        rows: Rows,
        outer: tuple[int, ...],
        values: RowValues,
        by_temperature: np.ndarray,  # (n_temperatures, n_rows)
        labels: tuple[list, np.ndarray] | None = None,
        ids: tuple[list, np.ndarray] | None = None,
        amounts: dict[str, int] | None = None,
    ) -> None:
        """An update by what was found of its logits, which may lie elsewhere, in parts."""
        counts, _, weight = engine._pick(rows)
        used = counts & has_softmax(values)
        seen = self._rows + RowCount.of(counts, used)
        seen.check(self.options["nan_policy"])

        self._rows = seen
        self._amounts = {name: n + (amounts or {}).get(name, 0) for name, n in self._amounts.items()}
        if ids is not None:
            self._add_sequences(*ids, values, counts, used)
        self._add_rows(values, weight[used], used, labels)
        if len(outer) > 1:
            place = np.broadcast_to(np.arange(outer[-1]), outer).reshape(-1)[used]
            self._positions.reserve(outer[-1])
            self._positions.add(*Moments.of(0.0 - values.log_prob[None, used], weight[used], place))
        self._temperatures.add(*Moments.of(by_temperature[:, used], weight[used]))

    def _temperature_rows(self, call: engine.Call, used: np.ndarray) -> np.ndarray:
        """(n_temperatures, n_rows) of -log p of softmax(logits / T)."""
        grid = self.options["temperatures"] or ()
        found = [wide_nll(call.logits, call.rows, used, t, self._loss.n_threads) for t in grid]
        return np.array(found).reshape(len(grid), used.size)

    @np.errstate(all="ignore")
    def _add_rows(self, values: RowValues, weight: np.ndarray, used: np.ndarray, labels) -> None:
        """To all that is by rank, NLL and confidence; of the rows used alone."""
        nll, rank, confidence = (
            0.0 - values.log_prob[used],
            values.rank[used],
            np.exp(values.max[used] - values.lse[used]),
        )
        right = rank == 0
        top = [rank < k for k in self.options["top_k"]]
        metrics = np.stack([nll, right, 1 / (1.0 + rank), values.brier[used], values.entropy[used], *top])
        self._overall.add(*Moments.of(metrics, weight))
        if labels is not None:
            found, part = Moments.of(metrics, weight, labels[1][used])
            self._groups.add([labels[0][i] for i in found], part)
        number = calibration.uniform_bin(confidence, self.options["n_bins"])
        self._bins.add(*Moments.of(np.stack([confidence, right, right - confidence]), weight, number))
        number = np.minimum(4 * nll, len(self._nll_bins) - 1).astype(np.int64)
        self._nll_bins.add(*Moments.of(metrics[:0], weight, number))
        self._ranks.reserve(1 + int(rank.max(initial=-1)))
        self._ranks.add(*Moments.of(metrics[:0], weight, rank))

    def _add_sequences(self, ids: list, number: np.ndarray, values: RowValues, counts, used) -> None:
        rows = np.stack([0.0 - values.log_prob, ~used | (values.rank != 0)])[:, counts]
        found, part = Moments.of(rows, np.ones(rows.shape[1]), number[counts])
        self._sequences.add([ids[i] for i in found], part)

    def merge(self, other: "Evaluator") -> "Evaluator":
        """Add what another has seen, its rows after our own.

        Returns
        -------
        Evaluator
            This one.

        Raises
        ------
        ValueError
            If an option that says what the numbers are differs: all but `class_axis` and `n_threads`.
        TypeError
            If `other` is no Evaluator.
        """
        moments.check_mergeable(self, other)
        self._rows += other._rows
        self._amounts = {name: n + other._amounts[name] for name, n in self._amounts.items()}
        for mine, its in zip(self._moments().values(), other._moments().values(), strict=True):
            mine.add_all(its)
        for ours, theirs in ((self._groups, other._groups), (self._sequences, other._sequences)):
            ours.add(list(theirs.place), theirs.filled())
        return self

    def _moments(self) -> dict[str, Moments]:
        return {
            "overall": self._overall,
            "bins": self._bins,
            "positions": self._positions,
            "temperatures": self._temperatures,
            "nll_bins": self._nll_bins,
            "ranks": self._ranks,
        }

    @np.errstate(all="ignore")
    def compute(self) -> EvalReport:
        """The report on what was seen so far; NaN where nothing was."""
        overall, groups = self._metrics(self._overall, 0), self._groups.filled()
        curve, error, largest = self._calibration()
        by_temperature, best = self._temperature_curve()
        # rows left out predict bytes too, of which nobody knows how many
        total = overall.nll.scaled(math.nan if self._rows.invalid else overall.weight / math.log(2))
        per = {name: total.scaled(1 / n) if n else None for name, n in self._amounts.items()}
        return EvalReport(
            overall=overall,
            groups={label: self._metrics(groups, i) for label, i in self._groups.in_order()},
            n_ignored=self._rows.ignored,
            n_invalid=self._rows.invalid,
            invalid_rows=list(self._rows.first_invalid),
            bits_per_byte=per["n_bytes"],
            bits_per_character=per["n_characters"],
            calibration_error=error,
            max_calibration_error=largest,
            calibration=curve,
            nll_histogram={"edges": NLL_EDGES.copy(), "weight": self._nll_bins.weight.copy()},
            by_position=self._position_curve(),
            rank_weight=self._ranks.weight.copy(),
            rank_weight_squared=self._ranks.sums[:, 2].copy(),
            temperatures=by_temperature,
            best_temperature=best,
            sequences=self._sequence_table(),
        )

    def _metrics(self, of: Moments, i: int) -> Metrics:
        means = of.estimates(i)
        named = dict(zip(NAMES, means[: len(NAMES)], strict=True))
        top = dict(zip(self.options["top_k"], means[len(NAMES) :], strict=True))
        bits, perplexity = named["nll"].scaled(1 / math.log(2)), named["nll"].exp()
        n, weight = int(of.n_rows[i]), float(of.weight[i])
        return Metrics(n, weight, bits=bits, perplexity=perplexity, top_k_accuracy=top, **named)

    def _calibration(self) -> tuple[dict[str, np.ndarray], Estimate, Estimate]:
        """The curve, ECE, MCE."""
        bins, weight = self._bins, self._bins.weight
        edges = np.linspace(0, 1, len(bins) + 1)
        confidence, frequency, gap = bins.means.T
        names = ("lower", "upper", "weight", "confidence", "frequency")
        curve = dict(zip(names, (edges[:-1], edges[1:], weight.copy(), confidence, frequency), strict=True))
        n, total = bins.n_rows.sum(), weight.sum()
        if not n:
            return curve, Estimate(math.nan, math.nan), Estimate(math.nan, math.nan)
        size = np.where(weight > 0, np.abs(gap), 0.0)
        error = float(weight @ size / total)
        # sum w^2 (s d - ECE)^2 of a bin, s the sign of its gap, from the sums about that gap
        square, (first, second) = bins.sums[:, 2], (bins.of_metrics(i)[:, 2] for i in (1, 2))
        away = size - error
        spread = float((second + 2 * np.sign(np.nan_to_num(gap)) * away * first + away**2 * square).sum())
        stderr = math.sqrt(n / (n - 1) * max(spread, 0.0)) / total if n > 1 else math.nan
        worst = int(np.argmax(size))
        return curve, Estimate(error, float(stderr)), Estimate(float(size[worst]), float(bins.stderrs[worst, 2]))

    def _temperature_curve(self) -> tuple[dict[str, np.ndarray] | None, float | None]:
        grid = self.options["temperatures"]
        if grid is None:
            return None, None
        nll, stderr = self._temperatures.means[0], self._temperatures.stderrs[0]
        best = None if np.isnan(nll).all() else grid[int(np.nanargmin(nll))]
        return {"temperature": np.array(grid), "nll": nll, "stderr": stderr}, best

    def _position_curve(self) -> dict[str, np.ndarray]:
        of = self._positions
        if not len(of):
            return {}
        return {
            "position": np.arange(len(of)),
            "weight": of.weight.copy(),
            "nll": of.means[:, 0],
            "stderr": of.stderrs[:, 0],
        }

    def _sequence_table(self) -> dict[str, np.ndarray]:
        if not len(self._sequences):
            return {}
        names, order = zip(*self._sequences.in_order(), strict=True)
        ids = np.array(names)
        if isinstance(names[0], str) != isinstance(names[-1], str) or ids.dtype.kind == "f":  # beyond 64 bits
            ids = np.array(names, object)
        sums = Moments(self._sequences.filled().sums[list(order)])
        nll, missed = sums.of_metrics(0).T
        return {
            "id": ids,
            "log_likelihood": 0.0 - nll,
            "n_rows": sums.n_rows.astype(np.int64),
            "is_greedy": missed == 0,
        }

    def to_dict(self) -> dict:
        """The state, for JSON: `from_dict` of it goes on where this one is, to the bit."""
        return moments.header("evaluation_state") | {
            "options": {k: list(v) if isinstance(v, tuple) else v for k, v in self.options.items()},
            "rows": asdict(self._rows),
            "amounts": self._amounts,
            "moments": {name: moments.pack(each.sums) for name, each in self._moments().items()},
            "groups": moments.pack_table(self._groups),
            "sequences": moments.pack_table(self._sequences),
        }

    @classmethod
    def from_dict(cls, state: dict) -> "Evaluator":
        """The evaluator that `to_dict` wrote down.

        Raises
        ------
        ValueError
            If it is not a state of this schema, or damaged.
        """
        return moments.read_state("evaluation_state", state, lambda: cls._read(state))

    @classmethod
    def _read(cls, state: dict) -> "Evaluator":
        new = cls(**state["options"])
        new._rows = RowCount(**state["rows"])
        new._amounts = {name: _check_amount(name, state["amounts"][name]) for name in new._amounts}
        for name, each in new._moments().items():
            sums = moments.unpack(state["moments"][name], each.sums.shape[1])
            if name not in ("positions", "ranks") and len(sums) != len(each):
                raise ValueError(f"{name} has {len(sums)} lines; expected {len(each)}")
            each.sums = sums
        new._groups = moments.unpack_table(state["groups"], new._n_metrics)
        new._sequences = moments.unpack_table(state["sequences"], 2)
        return new
