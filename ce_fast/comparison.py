"""Two models on the same data: what quantization, pruning or distillation changed, batch by batch."""

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from ce_fast import backends, engine, inputs, moments
from ce_fast.calibration import check_call
from ce_fast.evaluation import has_softmax, wide_nll
from ce_fast.inputs import Logits
from ce_fast.losses import CrossEntropyLoss, KLDivLoss
from ce_fast.moments import Estimate, Moments, RowCount
from ce_fast.rows import row_values

PERCENTS = (0, 0.1, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9, 100)
KL_EDGES = np.r_[0.0, 10 ** (np.arange(-32, 9) / 4), np.inf]  # nats: four bins a decade from 1e-8 to 100
NAMES = (
    "base_nll", "other_nll", "base_accuracy", "other_accuracy", "kl", "same_top", "nll_difference",
    "target_prob_change", "target_prob_change_squared",
)  # fmt: skip


class ModelMetrics(NamedTuple):
    """Of one of the two models, over the rows that count."""

    nll: Estimate
    perplexity: Estimate
    accuracy: Estimate


@dataclass(frozen=True, slots=True, eq=False)
class ComparisonReport:
    """What a `Comparison` has found; its docstring has the formulas.

    Attributes
    ----------
    n_rows, weight
        How many rows count and have both softmaxes; the sum of their sample weights.
    base, other : ModelMetrics
        nll, perplexity, accuracy of each model.
    kl : Estimate
        KL(base || other), in nats.
    kl_percentiles, target_prob_change_percentiles : dict
        Of the rows' values, at 0, 0.1, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9 and 100 percent.
    kl_histogram : dict of ndarray
        edges, in nats (0, then four a decade from 1e-8 to 100, then +inf); weight between them.
    same_top : Estimate
        How often the two models' largest logits are of the same class.
    nll_difference, perplexity_ratio : Estimate
        Of other - base, row by row; exp of that.
    target_prob_change, target_prob_change_rms : Estimate
        Mean and root of the mean square of p_other - p_base of the target.
    n_ignored, n_invalid, invalid_rows
        As in `EvalReport`; a row is invalid if either model's logits have no softmax.
    """

    n_rows: int
    weight: float
    base: ModelMetrics
    other: ModelMetrics
    kl: Estimate
    kl_percentiles: dict[float, float]
    kl_histogram: dict[str, np.ndarray]
    same_top: Estimate
    nll_difference: Estimate
    perplexity_ratio: Estimate
    target_prob_change: Estimate
    target_prob_change_rms: Estimate
    target_prob_change_percentiles: dict[float, float]
    n_ignored: int
    n_invalid: int
    invalid_rows: list[int]

    def estimates(self) -> dict[str, Estimate]:
        """By the names that tables show, in their order."""
        return {
            "KL(base || other) (nats)": self.kl,
            "same top class": self.same_top,
            "nll of base (nats)": self.base.nll,
            "nll of other": self.other.nll,
            "nll, other - base": self.nll_difference,
            "perplexity of base": self.base.perplexity,
            "perplexity of other": self.other.perplexity,
            "perplexity, other / base": self.perplexity_ratio,
            "accuracy of base": self.base.accuracy,
            "accuracy of other": self.other.accuracy,
            "change of p(target), mean": self.target_prob_change,
            "change of p(target), root mean square": self.target_prob_change_rms,
        }

    def to_dict(self) -> dict:
        """For JSON: numbers, strings, lists and dicts. What is not finite is None."""
        return moments.header("comparison") | moments.plain(self)


def percentiles(values: np.ndarray, weight: np.ndarray) -> dict[float, float]:
    """At `PERCENTS`, interpolated between rows, each at the middle of its weight, the first at 0 and the last at 100 %:
    with equal weights `numpy.percentile`."""
    if not values.size:
        return dict.fromkeys(PERCENTS, math.nan)
    order = np.argsort(values, kind="stable")
    values, weight = values[order], weight[order]
    middle = np.cumsum(weight) - weight / 2
    at = middle[0] + np.array(PERCENTS) / 100 * (middle[-1] - middle[0])
    upper = np.searchsorted(middle, at).clip(1).clip(max=len(values) - 1)
    lower = np.maximum(upper - 1, 0)
    with np.errstate(all="ignore"):
        share = np.nan_to_num((at - middle[lower]) / (middle[upper] - middle[lower])).clip(0, 1)
        between = values[lower] + share * (values[upper] - values[lower])
    found = np.where((share == 0) | (values[lower] == values[upper]), values[lower], between)
    return dict(zip(PERCENTS, np.where(share == 1, values[upper], found).tolist(), strict=True))


class Comparison:
    r"""How another model differs from a base on the same data: KL divergence, agreement, perplexity, paired row by row.

    With p the softmax of the base's logits / temperature, q that of the other's, t the target, and weighted means and
    standard errors as in `Evaluator`:

    .. math::

        \text{kl}: KL(p \| q) = \sum_k p_k \log \frac{p_k}{q_k}, \quad
        \text{same top}: [\arg\max p = \arg\max q], \quad
        \text{nll difference}: \log p_t - \log q_t, \quad
        \text{change}: q_t - p_t .

    The perplexity ratio is exp of the mean nll difference: perplexity of the other by that of the base. Its standard
    error, and that of the root mean square of the change, are by the delta method. Differences are of the same row, so
    their standard errors are far below those of the two models.

    Parameters
    ----------
    temperature : float, default=1.0
        Divides the logits of both.
    nan_policy : {"omit", "raise"}, default="omit"
        What becomes of rows that count where either model has no softmax: left out and counted, or an error.
    ignore_index, class_axis, n_threads
        As in `CrossEntropyLoss`.

    Raises
    ------
    ValueError, TypeError
        If an option is out of its range or of the wrong type.

    Notes
    -----
    Percentiles are exact, for which 16 bytes are kept of each row that counts (KL and change), 24 with sample weights.
    With weights, percentiles interpolate between rows, each at the middle of its weight. Nothing of the logits' size is
    made. KL is computed in float64 whatever the dtype.

    Examples
    --------
    >>> import ce_fast as ce
    >>> comparison = ce.Comparison()
    >>> rows = comparison.update([[2.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]], [0, 1])
    >>> rows["kl"].round(6)
    array([0.067131, 0.      ])
    >>> report = comparison.compute()
    >>> round(report.perplexity_ratio.value, 6), report.same_top.value, round(report.kl_percentiles[50], 6)
    (1.097645, 1.0, 0.033565)
    """

    same = ("temperature", "nan_policy", "ignore_index")  # of what is merged

    def __init__(
        self, *, temperature=1.0, nan_policy="omit", ignore_index=-100, class_axis=None, n_threads=None
    ) -> None:
        self._loss = loss = CrossEntropyLoss(
            ignore_index=ignore_index, temperature=temperature, class_axis=class_axis, n_threads=n_threads
        )
        self._kl = KLDivLoss(temperature=temperature)
        self.options: dict[str, Any] = {
            "temperature": loss.temperature,
            "nan_policy": inputs.check_choice("nan_policy", nan_policy, moments.NAN_POLICIES),
            "ignore_index": loss.ignore_index,
            "class_axis": loss.class_axis,
            "n_threads": loss.n_threads,
        }
        self._rows = RowCount()
        self._sums = Moments.empty(1, len(NAMES))
        self._kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # KL, change, weight of the rows of a batch

    @property
    def n_rows_seen(self) -> int:
        """All rows, those that do not count too."""
        return self._rows.seen

    def update(self, base_logits, other_logits, target, sample_weight=None) -> dict[str, np.ndarray]:
        """Add a batch.

        Parameters
        ----------
        base_logits, other_logits : array_like
            Of one shape, and any floating dtypes.
        target, sample_weight : array_like
            As in `CrossEntropyLoss`, target of class indices.

        Returns
        -------
        dict of ndarray
            kl, base_log_prob, other_log_prob, same_top of each row of the batch, in C order; NaN and False in rows
            that do not count, or that have not both softmaxes.

        Raises
        ------
        IndexError
            If a target is neither a class nor `ignore_index`.
        ValueError
            If rows that count have no softmax and `nan_policy` is "raise"; or, as TypeError, if a shape, a dtype or a
            value does not fit. The comparison is then what it was.

        Warns
        -----
        UserWarning
            If logits look like probabilities.
        """
        call = check_call(self._loss, base_logits, target, sample_weight)
        given = inputs.as_distribution(other_logits, call.logits, "other_logits")
        other = Logits(given, given, given.ndim - 1)
        inputs.warn_if_probabilities(other)
        base_rows, other_rows = (
            row_values(x, call.rows, temperature=self._loss.temperature, n_threads=self._loss.n_threads)
            for x in (call.logits, other)
        )
        counts, _, weight = engine._pick(call.rows)
        used = counts & has_softmax(base_rows) & has_softmax(other_rows)
        rows = self._rows + RowCount.of(counts, used)
        rows.check(self.options["nan_policy"])

        mask = backends.Rows(sample_weight=used.astype(np.float64))
        fields = engine.divergence_fields(self._kl, other, mask, call.logits.rows)
        kl = np.where(used, engine.run_block(fields, None, self._loss.n_threads, wide=True), np.nan)
        # in float64: models that nearly agree differ by less than float32 rounds; beside KL it costs a tenth
        a, b = (
            np.where(used, 0.0 - wide_nll(x, call.rows, used, self._loss.temperature, self._loss.n_threads), np.nan)
            for x in (call.logits, other)
        )
        same = used & (base_rows.argmax == other_rows.argmax)
        self._rows = rows
        with np.errstate(all="ignore"):
            change = np.exp(b) - np.exp(a)
            right = [x.rank == 0 for x in (base_rows, other_rows)]
            values = np.stack([0.0 - a, 0.0 - b, *right, kl, same, a - b, change, change**2])
        self._sums.add(*Moments.of(values[:, used], weight[used]))
        unweighted = np.broadcast_to(1.0, int(used.sum()))  # 8 bytes for all of them
        self._kept.append((kl[used], change[used], unweighted if sample_weight is None else weight[used]))
        return {"kl": kl, "base_log_prob": a, "other_log_prob": b, "same_top": same}

    def merge(self, other: "Comparison") -> "Comparison":
        """Add what another has seen, its rows after our own.

        Returns
        -------
        Comparison
            This one.

        Raises
        ------
        ValueError
            If an option that says what the numbers are differs: all but `class_axis` and `n_threads`.
        TypeError
            If `other` is no Comparison.
        """
        moments.check_mergeable(self, other)
        self._rows += other._rows
        self._sums.add_all(other._sums)
        self._kept = self._kept + other._kept
        return self

    def _row_values(self) -> list[np.ndarray]:
        """KL, change, weight of all rows."""
        return [np.concatenate([np.empty(0), *(kept[i] for kept in self._kept)]) for i in range(3)]

    def compute(self) -> ComparisonReport:
        """The report on what was seen so far; NaN where nothing was."""
        found = dict(zip(NAMES, self._sums.estimates(), strict=True))
        kl, change, weight = self._row_values()
        bins = np.histogram(kl, KL_EDGES, weights=weight)[0].astype(np.float64)
        base, other = (
            ModelMetrics(found[f"{name}_nll"], found[f"{name}_nll"].exp(), found[f"{name}_accuracy"])
            for name in ("base", "other")
        )
        return ComparisonReport(
            n_rows=int(self._sums.n_rows[0]),
            weight=float(self._sums.weight[0]),
            base=base,
            other=other,
            kl=found["kl"],
            kl_percentiles=percentiles(kl, weight),
            kl_histogram={"edges": KL_EDGES.copy(), "weight": bins},
            same_top=found["same_top"],
            nll_difference=found["nll_difference"],
            perplexity_ratio=found["nll_difference"].exp(),
            target_prob_change=found["target_prob_change"],
            target_prob_change_rms=found["target_prob_change_squared"].sqrt(),
            target_prob_change_percentiles=percentiles(change, weight),
            n_ignored=self._rows.ignored,
            n_invalid=self._rows.invalid,
            invalid_rows=list(self._rows.first_invalid),
        )

    def to_dict(self) -> dict:
        """The state, for JSON: `from_dict` of it goes on where this one is, to the bit. 33 characters a row."""
        return moments.header("comparison_state") | {
            "options": dict(self.options),
            "rows": asdict(self._rows),
            "sums": moments.pack(self._sums.sums),
            "kept": moments.pack(np.stack(self._row_values(), axis=1)),
        }

    @classmethod
    def from_dict(cls, state: dict) -> "Comparison":
        """The comparison that `to_dict` wrote down.

        Raises
        ------
        ValueError
            If it is not a state of this schema, or damaged.
        """
        return moments.read_state("comparison_state", state, lambda: cls._read(state))

    @classmethod
    def _read(cls, state: dict) -> "Comparison":
        new = cls(**state["options"])
        new._rows = RowCount(**state["rows"])
        sums = moments.unpack(state["sums"], new._sums.sums.shape[1])
        if len(sums) != 1:
            raise ValueError(f"sums has {len(sums)} lines; expected 1")
        new._sums = Moments(sums)
        kl, change, weight = np.ascontiguousarray(moments.unpack(state["kept"], 3).T)
        weight = np.broadcast_to(1.0, weight.size) if (weight == 1).all() else weight
        new._kept = [(kl, change, weight)]
        return new
