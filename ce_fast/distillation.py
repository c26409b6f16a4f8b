"""Knowledge distillation: a divergence from a teacher and a cross-entropy, block by block into one gradient."""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ce_fast import engine, inputs, reduction
from ce_fast.backends import Rows
from ce_fast.inputs import Logits
from ce_fast.losses import CrossEntropyLoss, KLDivLoss, _Options
from ce_fast.plan import row_blocks

TAILS = ("bucket", "renormalize")
BLOCK_BYTES = 1 << 22  # of each of the two gradients that are added: small beside the one that was asked for


class TopKTeacher(NamedTuple):
    """The k largest probabilities of a teacher, in place of its logits.

    Parameters
    ----------
    indices : array_like of int
        Of the shape of the logits, with k classes along the class axis; no class twice in a row.
    log_probs : array_like
        Of the same shape: the logarithms of the teacher's probabilities, at the temperature of the loss.
    """

    indices: object
    log_probs: object


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


# One term of the loss on the rows of a block: (index into the outer axes, the rows in C order, where the gradient goes
# or None) -> losses of the rows, float64.
Term = Callable[[tuple, slice, np.ndarray | None], np.ndarray]


def _distill(loss: DistillationLoss, student, teacher, target, sample_weight, ask: engine.Ask):
    """(value, gradient or None)."""
    logits = inputs.as_logits(student, loss.class_axis, "student_logits")
    alpha = loss.alpha if loss.alpha is not None else (1.0 if target is None else 0.5)
    if target is None and alpha < 1:
        raise ValueError(f"alpha is {alpha} and target is None; expected a target, or alpha=1")
    inputs.warn_if_probabilities(logits)
    factor, row_factors = engine.as_upstream(ask.upstream, loss.reduction, logits)
    call, counted = _check(loss, logits, target, sample_weight)
    n_rows = logits.rows.size // logits.n_classes
    soft_divisor = reduction.divisor(loss.reduction, loss.denominator, n_rows, *counted)
    soft_factor, hard_factor = alpha * loss.temperature**2, 1 - alpha
    soft_rows = Rows(sample_weight=_counted_weight(call.rows, n_rows))
    up = factor * soft_factor * reduction.gradient_scale(soft_divisor) / loss.temperature
    others: engine.Arrays = {"target": call.soft, "upstream": row_factors, "sample_weight": call.rows.sample_weight}
    if isinstance(teacher, TopKTeacher):
        top = _as_top_k(teacher, logits, loss, soft_rows.sample_weight)
        terms = [(soft_factor, soft_divisor, _top_k_term(loss, logits, soft_rows, top, row_factors, up))]
    else:
        other = inputs.as_distribution(teacher, logits, "teacher_logits")
        others["teacher_logits"] = other
        fields = engine.divergence_fields(loss.soft, logits, soft_rows, other)
        terms = [(soft_factor, soft_divisor, _job_term(loss, fields, row_factors, up, wide=True))]
    if not soft_factor:  # 0 * inf is 0 here
        terms = []
    if hard_factor:
        up = factor * hard_factor * reduction.gradient_scale(call.divisor)
        fields = engine.softmax_fields(loss.hard, call)
        terms.append((hard_factor, call.divisor, _job_term(loss, fields, row_factors, up, wide=loss.hard.wide)))
    grad = inputs.as_out(ask.out, logits, others) if ask.gradient else None
    losses = _run_terms([term for _, _, term in terms], logits, grad)
    if loss.reduction == "none":
        total = [factor * rows for (factor, _, _), rows in zip(terms, losses, strict=True)]
        return engine.result_rows(np.sum(total, 0), logits), grad
    sums = [math.fsum(rows) if np.isfinite(rows).all() else float(rows.sum()) for rows in losses]
    parts = zip(terms, sums, strict=True)
    return sum(factor * reduction.reduced(total, divisor) for (factor, divisor, _), total in parts), grad


def _check(loss: DistillationLoss, logits: Logits, target, sample_weight) -> tuple[engine.Call, tuple[int, float]]:
    """The call of the cross-entropy; (rows that count, sum of their sample weights)."""
    if target is not None:
        call = engine.check_call(loss.hard, logits, target, sample_weight)
        return call, inputs.check_targets(replace(call.rows, weight=None), logits)
    rows = Rows(sample_weight=inputs.as_sample_weight(sample_weight, logits))
    return engine.Call(logits, rows, None, 1.0), inputs.check_targets(rows, logits)


def _counted_weight(rows: Rows, n_rows: int) -> np.ndarray | None:
    """Sample weights, 0 where the target is ignored."""
    if rows.target is None:
        return rows.sample_weight
    counts = rows.target != rows.ignore_index
    return counts.astype(np.float64) if rows.sample_weight is None else np.where(counts, rows.sample_weight, 0.0)


def _run_terms(terms: list[Term], logits: Logits, grad: np.ndarray | None) -> list[np.ndarray]:
    """The row losses of each term; their gradients, added in the compute dtype and rounded once, to `grad`."""
    n_rows = logits.rows.size // logits.n_classes
    losses = [np.empty(n_rows) for _ in terms]
    dtype = np.float64 if logits.rows.dtype == np.float64 else np.float32
    most = n_rows if grad is None else max(1, BLOCK_BYTES // (logits.n_classes * np.dtype(dtype).itemsize))
    out = None if grad is None else inputs.class_last(grad, logits.axis)
    for index, rows in row_blocks(logits.outer_shape, most):
        shape = logits.rows[index].shape
        parts: list[Any] = [None if grad is None else np.empty(shape, dtype) for _ in terms]
        for values, term, part in zip(losses, terms, parts, strict=True):
            values[rows] = term(index, rows, part)
        if out is not None:
            with np.errstate(all="ignore"):
                out[index] = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return losses


def _part(array: np.ndarray | None, rows) -> np.ndarray | None:
    return None if array is None else array[rows]


def _job_term(loss: DistillationLoss, fields: engine.Fields, row_factors, scale: float, *, wide: bool) -> Term:
    """A job on the rows of a block."""
    given: Rows = fields["rows"]

    def term(index, rows, out):
        own = replace(given, target=_part(given.target, rows), sample_weight=_part(given.sample_weight, rows))
        part = {"logits": fields["logits"][index], "soft": _part(fields["soft"], index), "rows": own}
        part |= {"upstream": _part(row_factors, rows), "scale": scale}
        return _run(loss, fields | part, out, wide)

    return term


def _run(loss: DistillationLoss, fields: engine.Fields, out: np.ndarray | None, wide: bool) -> np.ndarray:
    """The row losses; the gradient to `out`, if any."""
    x = fields["logits"]
    plan = engine.make_call_plan(Logits(x, x, x.ndim - 1), loss.n_threads, wide=wide)
    losses = np.empty(plan.n_rows, plan.compute_dtype)
    engine.emit(fields | {"loss": losses}, plan, "gradient", out, x.ndim - 1)
    return losses


def _as_top_k(
    teacher: TopKTeacher, logits: Logits, loss: DistillationLoss, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(n_rows, k) indices in rising order, and their log-probabilities; rows of weight 0 are not read."""
    indices, log_probs = (inputs.as_array(teacher[i], f"teacher.{teacher._fields[i]}") for i in (0, 1))
    if not inputs.is_index(indices.dtype):
        raise TypeError(f"teacher.indices has dtype {indices.dtype}; expected an integer dtype")
    if not inputs.is_float(log_probs.dtype):
        raise TypeError(f"teacher.log_probs has dtype {log_probs.dtype}; expected a floating one")
    k = indices.shape[logits.axis] if indices.ndim == logits.given.ndim else 0
    shape = tuple(k if axis == logits.axis else n for axis, n in enumerate(logits.given.shape))
    for name, array in ("indices", indices), ("log_probs", log_probs):
        if array.shape != shape or not 1 <= k <= logits.n_classes:
            wanted = tuple("k" if axis == logits.axis else n for axis, n in enumerate(logits.given.shape))
            raise ValueError(f"teacher.{name} has shape {array.shape}; expected {wanted}, 1 <= k <= {logits.n_classes}")
    counts = np.ones(math.prod(logits.outer_shape), bool) if weight is None else weight != 0
    flat = np.where(counts[:, None], inputs.class_last(indices, logits.axis).reshape(-1, k), np.arange(k))
    if flat.size and not (flat.min() >= 0 and flat.max() < logits.n_classes):
        bad = flat.min() if flat.min() < 0 else flat.max()
        raise IndexError(f"teacher.indices holds {bad}; expected 0 <= index < {logits.n_classes}")
    order = np.argsort(flat, axis=1)
    flat = np.take_along_axis(flat, order, 1).astype(np.int64)
    if (flat[:, 1:] == flat[:, :-1]).any():
        row = int(np.argmax((flat[:, 1:] == flat[:, :-1]).any(1)))
        raise ValueError(f"teacher.indices names a class twice in row {row}; expected each at most once")
    values = np.take_along_axis(inputs.class_last(log_probs, logits.axis).reshape(-1, k).astype(np.float64), order, 1)
    with np.errstate(all="ignore"):
        over = counts & (np.exp(values).sum(1) > 1 + 1e-2)
    if loss.tail == "bucket" and over.any():
        row = int(np.argmax(over))
        raise ValueError(f"teacher.log_probs of row {row} sum to {np.exp(values[row]).sum():.6g}; expected at most 1")
    return np.ascontiguousarray(flat), values


def _top_k_term(loss, logits: Logits, rows: Rows, top, row_factors, scale: float) -> Term:
    """KL between the k classes and the bucket of all others, of teacher and student.

    The student's bucket is the sum over the other classes alone, and so exact however small. With d = log p - log q,
    of a class or of the bucket, the gradient is p - q (forward), or p (d - KL) (reverse); each class of the bucket has
    its share of the bucket's.
    """
    indices, log_probs = top
    forward = loss.direction == "forward"

    def term(index, part, out):
        x, chosen = logits.rows[index], indices[part]
        s = np.ones(len(chosen)) if rows.sample_weight is None else rows.sample_weight[part]
        up = s * scale * (1.0 if row_factors is None else row_factors[part])
        log_p, slope = _student(loss, x, chosen)
        log_q = _teacher(loss, log_probs[part], logits.n_classes)
        with np.errstate(all="ignore"):
            p, q = np.exp(log_p), np.exp(log_q)
            mass, d = (q, log_q - log_p) if forward else (p, log_p - log_q)
            kl = np.where((mass == 0) & ~np.isnan(p + q), 0.0, mass * d).sum(1)
            slopes = p * q.sum(1, keepdims=True) - q if forward else np.where(p == 0, 0.0, p * (d - kl[:, None]))
            slopes = np.where((s == 0)[:, None], 0.0, np.where(np.isnan(kl)[:, None], np.nan, slopes * up[:, None]))
        if out is not None:
            tail = {"upstream": np.ascontiguousarray(slopes[:, -1])}
            _run(loss, _others(loss, x, chosen) | tail, out, True)
            flat = out.reshape(-1, out.shape[-1])
            flat[s == 0] = 0
            np.put_along_axis(flat, chosen, np.where(slopes[:, :-1] == 0, 0.0, slopes[:, :-1] * slope), 1)
        return np.where(s == 0, 0.0, s * kl)

    return term


def _others(loss, x: np.ndarray, chosen: np.ndarray) -> engine.Fields:
    """A job over the classes that are not chosen."""
    return {"logits": x, "left_out": chosen, "temperature": loss.temperature, "softcap": loss.softcap}


def _student(loss, x: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, k + 1) log-probabilities of the chosen classes and of the bucket; the softcap's derivative at the chosen."""
    plan = engine.make_call_plan(Logits(x, x, x.ndim - 1), loss.n_threads, wide=True)
    lse = np.empty(plan.n_rows)
    engine.emit(_others(loss, x, chosen) | {"lse": lse}, plan, "gradient", None, x.ndim - 1)
    z = np.take_along_axis(x, chosen.reshape(*x.shape[:-1], -1), -1).reshape(chosen.shape).astype(np.float64)
    slope = np.ones_like(z)
    if loss.softcap is not None:
        slope = 1 / np.cosh(z / loss.softcap) ** 2
        z = loss.softcap * np.tanh(z / loss.softcap)
    parts = np.concatenate([z / loss.temperature, lse[:, None]], 1)
    with np.errstate(all="ignore"):
        top = parts.max(1, keepdims=True)
        return (parts - top) - np.log(np.exp(parts - top).sum(1, keepdims=True)), slope


def _teacher(loss, log_probs: np.ndarray, n_classes: int) -> np.ndarray:
    """(n, k + 1) log-probabilities of the chosen classes and of the bucket."""
    with np.errstate(all="ignore"):
        if loss.tail == "renormalize":
            top = log_probs.max(1, keepdims=True)
            log_probs = (log_probs - top) - np.log(np.exp(log_probs - top).sum(1, keepdims=True))
            rest = np.full((len(log_probs), 1), -np.inf)
        else:
            left = 1 - np.exp(log_probs).sum(1, keepdims=True)
            none = (left < 2.0**-49) | (log_probs.shape[1] == n_classes)  # rounding of the sum leaves that much
            rest = np.log(np.where(none, 0.0, left))
        return np.concatenate([log_probs, rest], 1)
