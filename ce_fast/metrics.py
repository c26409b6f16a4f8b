"""What an evaluation found: means with standard errors, curves and tables."""

import math
from dataclasses import dataclass, fields

import numpy as np

from ce_fast import inputs, moments
from ce_fast.moments import Estimate


@dataclass(frozen=True, slots=True)
class Metrics:
    """Weighted means over the rows that count, all of them or a group's. In nats, but for the bits."""

    n_rows: int  # that count, and have a softmax
    weight: float  # the sum of their sample weights
    nll: Estimate
    bits: Estimate
    perplexity: Estimate
    accuracy: Estimate
    mean_reciprocal_rank: Estimate
    brier_score: Estimate
    entropy: Estimate
    top_k_accuracy: dict[int, Estimate]


@dataclass(frozen=True, slots=True, eq=False)
class EvalReport:
    """What an `Evaluator` has found; its docstring has the formulas.

    Attributes
    ----------
    overall : Metrics
    groups : dict
        Metrics of each label, integers first, in order.
    n_ignored : int
        Rows whose target is `ignore_index`, or whose weight is 0.
    n_invalid : int
        Rows that count, but whose logits have no softmax (NaN, +inf, nothing but -inf): left out of every mean.
    invalid_rows : list of int
        The numbers of the first ten of these, from 0, of all rows as they came.
    bits_per_byte, bits_per_character : Estimate or None
        None where `n_bytes`, `n_characters` were never given; NaN where rows are invalid, for they have bytes too.
    calibration_error, max_calibration_error : Estimate
    calibration : dict of ndarray
        Of each bin: lower, upper, weight, confidence (its mean), frequency (of right rows); NaN where it is empty.
    nll_histogram : dict of ndarray
        edges, in nats, the last +inf; weight between them.
    by_position : dict of ndarray
        position, weight, nll, stderr along the last outer axis; empty if logits never had two or more of these.
    rank_weight, rank_weight_squared : ndarray
        Sums of the sample weights, and of their squares, of the rows whose target has rank 0, 1, 2, ...
    temperatures : dict of ndarray, or None
        temperature, nll, stderr.
    best_temperature : float or None
        The one of the grid with the least mean NLL.
    sequences : dict of ndarray
        id, log_likelihood, n_rows, is_greedy; empty if `sequence` was never given.
    """

    overall: Metrics
    groups: dict[int | str, Metrics]
    n_ignored: int
    n_invalid: int
    invalid_rows: list[int]
    bits_per_byte: Estimate | None
    bits_per_character: Estimate | None
    calibration_error: Estimate
    max_calibration_error: Estimate
    calibration: dict[str, np.ndarray]
    nll_histogram: dict[str, np.ndarray]
    by_position: dict[str, np.ndarray]
    rank_weight: np.ndarray
    rank_weight_squared: np.ndarray
    temperatures: dict[str, np.ndarray] | None
    best_temperature: float | None
    sequences: dict[str, np.ndarray]

    @np.errstate(all="ignore")
    def top_k(self, k: int) -> Estimate:
        """How often the target is among the k classes of the largest logits, for any k."""
        if inputs.check_integer("k", k) < 1:
            raise ValueError(f"k is {k}; expected at least 1")
        n, total = self.overall.n_rows, float(self.rank_weight.sum())
        if not n:
            return Estimate(math.nan, math.nan)
        mean = float(self.rank_weight[:k].sum()) / total
        square = (1 - mean) ** 2 * self.rank_weight_squared[:k].sum() + mean**2 * self.rank_weight_squared[k:].sum()
        return Estimate(mean, math.sqrt(n / (n - 1) * square) / total if n > 1 else math.nan)

    def estimates(self) -> dict[str, Estimate]:
        """By the names that tables show, in their order."""
        m = self.overall
        named = {
            "negative log-likelihood (nats)": m.nll,
            "bits per row": m.bits,
            "perplexity": m.perplexity,
            "accuracy": m.accuracy,
            **{f"top-{k} accuracy": of for k, of in m.top_k_accuracy.items() if k > 1},
            "mean reciprocal rank": m.mean_reciprocal_rank,
            "Brier score": m.brier_score,
            "entropy (nats)": m.entropy,
            "calibration error": self.calibration_error,
            "maximum calibration error": self.max_calibration_error,
            "bits per byte": self.bits_per_byte,
            "bits per character": self.bits_per_character,
        }
        return {name: of for name, of in named.items() if of is not None}

    def to_dict(self) -> dict:
        """For JSON: numbers, strings, lists and dicts. What is not finite is None; groups are a list, each with its
        label."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rank_weight_squared"}
        groups = [{"label": label, **moments.plain(metrics)} for label, metrics in self.groups.items()]
        return moments.header("evaluation") | moments.plain(own | {"groups": []}) | {"groups": groups}
