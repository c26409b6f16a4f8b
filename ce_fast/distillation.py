"""Knowledge distillation: a divergence from a teacher and a cross-entropy, block by block into one gradient."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, replace

import numpy as np

from ce_fast import engine, inputs, reduction
from ce_fast.backends import Rows
from ce_fast.inputs import Logits
from ce_fast.losses import CrossEntropyLoss, KLDivLoss, _Options
from ce_fast.plan import row_blocks
from ce_fast.top_k import TopK, TopKTeacher

TAILS = ("bucket", "renormalize")
BLOCK_BYTES = 1 << 22  # of each of the two gradients that are added: small beside the one that was asked for


@dataclass(frozen=True, eq=False)
class DistillationLoss(_Options):
    r"""Distillation of a teacher's distribution into a student's, in nats.

    .. math:: l_i = \alpha\, T^2\, KL(q_T \,\|\, p_T) + (1 - \alpha)\, CE(p_1, \text{target})

    with q_T and p_T the softmax of the teacher's and the student's logits divided by T. Hinton et al., "Distilling the
    knowledge in a neural network", arXiv:1503.02531.

    Parameters
    ----------
    temperature : float, default=2.0
        T.
    alpha : float in [0, 1], optional
        None is 0.5 with a target and 1 without.
    direction : {"forward", "reverse"}, default="forward"
        KL(q || p), or KL(p || q).
    tail : {"bucket", "renormalize"}, default="bucket"
        For a `TopKTeacher`: its other classes are one bucket, of the probability that is left, against the student's
        probability of those classes; or its k probabilities are made to sum to 1 (forward only).
    weight, ignore_index, label_smoothing
        Of the cross-entropy, as in `CrossEntropyLoss`; rows of the target `ignore_index` do not count in either term.
    reduction, denominator, class_axis, n_threads
        As in `CrossEntropyLoss`. Each term is divided by its own denominator: with "weight" the first by the sum of
        sample weights.
    softcap : float, optional
        Of the student's logits, as in `CrossEntropyLoss`.

    Raises
    ------
    ValueError, TypeError
        If an option is out of its range or of the wrong type.

    Notes
    -----
    No softmax is made. A gradient needs two blocks of some MiB beside itself.

    Examples
    --------
    >>> import ce_fast as ce
    >>> loss = ce.DistillationLoss(temperature=2.0, alpha=0.9)
    >>> round(loss([[2.0, 0.0, -1.0]], [[1.0, 1.0, -2.0]], [0]), 6)
    0.431952
    >>> top2 = ce.TopKTeacher([[0, 1]], [[-0.79, -0.79]])
    >>> round(ce.DistillationLoss(temperature=2.0)([[2.0, 0.0, -1.0]], top2), 6)
    0.478663
    """

    temperature: float = 2.0
    alpha: float | None = None
    _: KW_ONLY
    direction: str = "forward"
    tail: str = "bucket"
    weight: np.ndarray | None = None
    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    softcap: float | None = None
    denominator: str | float = "weight"
    class_axis: int | None = None
    n_threads: int | None = None
    soft: KLDivLoss = field(init=False, repr=False)
    hard: CrossEntropyLoss = field(init=False, repr=False)

    def __post_init__(self) -> None:
        common = {name: getattr(self, name) for name in ("softcap", "denominator", "class_axis", "n_threads")}
        common["reduction"] = self.reduction
        soft = KLDivLoss(direction=self.direction, temperature=self.temperature, **common)
        hard = CrossEntropyLoss(self.weight, self.ignore_index, label_smoothing=self.label_smoothing, **common)
        self._set(
            soft=soft,
            hard=hard,
            weight=hard.weight,
            alpha=None if self.alpha is None else inputs.check_option("alpha", self.alpha, 0.0, 1.0),
            tail=inputs.check_choice("tail", self.tail, TAILS),
        )
        if self.direction == "reverse" and self.tail == "renormalize":
            raise ValueError("tail='renormalize' leaves classes without probability: KL(p || q) would be infinite")

    def __call__(self, student_logits, teacher_logits, target=None, sample_weight=None):
        """The loss.

        Parameters
        ----------
        student_logits : array_like
            As logits in `CrossEntropyLoss`.
        teacher_logits : array_like or TopKTeacher
            Of the shape of the student's and any floating dtype; or the teacher's largest probabilities.
        target : array_like, optional
            Class indices or class probabilities, as in `CrossEntropyLoss`.
        sample_weight : array_like, optional
            As in `CrossEntropyLoss`; a boolean array is a mask.

        Returns
        -------
        float or ndarray
            As in `CrossEntropyLoss`.

        Raises
        ------
        IndexError
            If a target is neither a class nor `ignore_index`, or an index of a `TopKTeacher` is no class.
        ValueError, TypeError
            If a shape, dtype or value does not fit.
        """
        return _distill(self, student_logits, teacher_logits, target, sample_weight, engine.VALUE)[0]

    def value_and_grad(
        self, student_logits, teacher_logits, target=None, sample_weight=None, *, out=None, upstream=None
    ):
        """The loss and its gradient by the student's logits; arguments and results as in `CrossEntropyLoss`."""
        ask = engine.Ask(True, False, out, upstream)
        return _distill(self, student_logits, teacher_logits, target, sample_weight, ask)

    def grad_and_hess(self, student_logits, teacher_logits, target=None, sample_weight=None):
        """NotImplementedError: `KLDivLoss` and `CrossEntropyLoss` have one each, where it is positive."""
        self._refuse_hessian("take those of KLDivLoss and CrossEntropyLoss, and add them")


# The rows of a block: (index into the outer axes, the rows in C order, where the gradient goes or None) -> row losses.
Run = Callable[[tuple, slice, np.ndarray | None], np.ndarray]


@dataclass(frozen=True, slots=True)
class Term:
    """One term of the loss."""

    factor: float
    divisor: float  # of its mean
    run: Run


def _distill(loss: DistillationLoss, student, teacher, target, sample_weight, ask: engine.Ask):
    """(value, gradient or None)."""
    logits = inputs.as_logits(student, loss.class_axis, "student_logits", () if target is None else target)
    alpha = loss.alpha if loss.alpha is not None else (1.0 if target is None else 0.5)
    if target is None and alpha < 1:
        raise ValueError(f"alpha is {alpha} and target is None; expected a target, or alpha=1")
    inputs.warn_if_probabilities(logits)
    upstream = engine.as_upstream(ask.upstream, loss.reduction, logits)
    call = _check(loss, logits, target, sample_weight)
    others: engine.Arrays = {
        "target": call.rows.target if call.soft is None else call.soft,
        "sample_weight": call.rows.sample_weight,
        "upstream": upstream[1],
    }
    terms = []
    if alpha:  # 0 * inf is 0 here
        term, read = _soft_term(loss, call, teacher, alpha * loss.temperature**2, upstream)
        terms.append(term)
        others |= read
    if alpha < 1:
        terms.append(_hard_term(loss, call, 1 - alpha, upstream))
    grad = inputs.as_out(ask.out, logits, others, "student_logits") if ask.gradient else None
    losses = _run_terms(terms, logits, grad)
    if loss.reduction == "none":
        total = np.sum([term.factor * rows for term, rows in zip(terms, losses, strict=True)], 0)
        return engine.result_rows(total, logits), grad
    parts = zip(terms, losses, strict=True)
    return sum(term.factor * reduction.reduced(reduction.summed(rows), term.divisor) for term, rows in parts), grad


def _check(loss: DistillationLoss, logits: Logits, target, sample_weight) -> engine.Call:
    """The call of the cross-entropy, or without a target one that has rows alone."""
    if target is not None:
        return engine.check_call(loss.hard, logits, target, sample_weight)
    rows = Rows(sample_weight=inputs.as_sample_weight(sample_weight, logits))
    return engine.Call(logits, rows, None)


def _hard_term(loss: DistillationLoss, call: engine.Call, factor: float, upstream) -> Term:
    divisor = engine.count(loss.hard, call.logits, call.rows)
    scale = upstream[0] * factor * reduction.gradient_scale(divisor)
    run = _job_run(loss, engine.softmax_fields(loss.hard, call), upstream[1], scale, wide=loss.hard.wide)
    return Term(factor, divisor, run)


def _soft_term(
    loss: DistillationLoss, call: engine.Call, teacher, factor: float, upstream
) -> tuple[Term, engine.Arrays]:
    """The divergence from the teacher; the arrays it reads, by name."""
    logits = call.logits
    rows = Rows(sample_weight=_counted_weight(call.rows, logits.rows.size // logits.n_classes))
    divisor = engine.count(loss, logits, rows)
    scale = upstream[0] * factor * reduction.gradient_scale(divisor) / loss.temperature
    if isinstance(teacher, TopKTeacher):
        top = TopK(loss, logits, teacher, rows.sample_weight, upstream[1], scale)
        return Term(factor, divisor, top.run), {}
    other = inputs.as_distribution(teacher, logits, "teacher_logits")
    run = _job_run(loss, engine.divergence_fields(loss.soft, logits, rows, other), upstream[1], scale, wide=True)
    return Term(factor, divisor, run), {"teacher_logits": other}


def _counted_weight(rows: Rows, n_rows: int) -> np.ndarray | None:
    """Sample weights, 0 where the target is ignored."""
    if rows.target is None:
        return rows.sample_weight
    counts = rows.target != rows.ignore_index
    return counts.astype(np.float64) if rows.sample_weight is None else np.where(counts, rows.sample_weight, 0.0)


def _run_terms(terms: list[Term], logits: Logits, grad: np.ndarray | None) -> list[np.ndarray]:
    """The row losses of each term; their gradients, added in the compute dtype, to `grad`."""
    n_rows, n_classes = logits.rows.size // logits.n_classes, logits.n_classes
    losses = [np.empty(n_rows) for _ in terms]
    if grad is None:
        for values, term in zip(losses, terms, strict=True):
            values[:] = term.run((), slice(0, n_rows), None)
        return losses
    dtype = np.dtype(np.float64 if logits.rows.dtype == np.float64 else np.float32)
    most = max(1, min(n_rows, BLOCK_BYTES // (n_classes * dtype.itemsize)))
    places = [np.empty((most, n_classes), dtype) for _ in terms]
    out = inputs.class_last(grad, logits.axis)
    for index, rows in row_blocks(logits.outer_shape, most):
        shape = logits.rows[index].shape
        parts = [place[: rows.stop - rows.start].reshape(shape) for place in places]
        for values, term, part in zip(losses, terms, parts, strict=True):
            values[rows] = term.run(index, rows, part)
        with np.errstate(all="ignore"):
            if len(parts) > 1:
                np.add(parts[0], parts[1], out=parts[0])
            out[index] = parts[0]
    return losses


def _part(array: np.ndarray | None, rows) -> np.ndarray | None:
    return None if array is None else array[rows]


def _job_run(loss: DistillationLoss, fields: engine.Fields, row_factors, scale: float, *, wide: bool) -> Run:
    """A job, on the rows of a block."""
    given: Rows = fields["rows"]

    def run(index, rows, out):
        own = replace(given, target=_part(given.target, rows), sample_weight=_part(given.sample_weight, rows))
        part = {"logits": fields["logits"][index], "soft": _part(fields["soft"], index), "rows": own}
        part |= {"upstream": _part(row_factors, rows), "scale": scale}
        return engine.run_block(fields | part, out, loss.n_threads, wide=wide)

    return run
