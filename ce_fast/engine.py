"""Inputs -> plan -> backend -> reduction: the only place that knows the order."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ce_fast import backends, inputs, reduction, threads
from ce_fast.backends import Job, Rows
from ce_fast.inputs import Logits
from ce_fast.plan import Plan, make_plan

if TYPE_CHECKING:
    from ce_fast.losses import CrossEntropyLoss, NLLLoss, _Loss


@dataclass(frozen=True, slots=True)
class Call:
    """The data of a call, checked."""

    logits: Logits
    rows: Rows
    soft: np.ndarray | None
    divisor: float


def _plan(logits: Logits, n_threads: int | None) -> Plan:
    resolved = threads.resolve(n_threads, logits.rows.size, backends.active().max_threads)
    return make_plan(logits.outer_shape, logits.n_classes, logits.rows.dtype, resolved)


def _check(loss: "_Loss", logits: Logits, target, sample_weight) -> Call:
    inputs.check_weight(loss.weight, logits)
    indices, soft = inputs.as_targets(target, logits)
    rows = Rows(indices, loss.ignore_index, loss.weight, inputs.as_sample_weight(sample_weight, logits))
    counted, weight_sum = inputs.check_targets(rows, logits)
    n_rows = logits.rows.size // logits.n_classes
    return Call(logits, rows, soft, reduction.divisor(loss.reduction, loss.denominator, n_rows, counted, weight_sum))


def _as_upstream(upstream, loss: "_Loss", logits: Logits) -> tuple[float, np.ndarray | None]:
    """(a factor of all rows, a factor of each): of the reduced loss, or of each row's."""
    if upstream is None:
        return 1.0, None
    if loss.reduction == "none":
        return 1.0, inputs.as_row_values(upstream, logits, "upstream")
    scalar = inputs.as_array(upstream, "upstream")
    if scalar.shape != () or not (inputs.is_float(scalar.dtype) or scalar.dtype.kind in "iu"):
        raise ValueError(
            f"upstream has shape {scalar.shape} and dtype {scalar.dtype}; expected one number, for "
            f"reduction={loss.reduction!r} gives one"
        )
    return float(scalar), None


def softmax_loss(loss: "CrossEntropyLoss", logits, target, sample_weight, *, gradient=False, out=None, upstream=None):
    """(value, gradient or None) of a softmax loss."""
    checked = inputs.as_logits(logits, loss.class_axis)
    call = _check(loss, checked, target, sample_weight)
    on, off = loss.masses(checked.n_classes, call.soft is not None)
    factor, row_factors = _as_upstream(upstream, loss, checked)
    grad = None
    if gradient:
        grad = inputs.as_out(out, checked, _read(call, row_factors))
    plan = _plan(checked, loss.n_threads)
    row_losses = np.empty(plan.n_rows, plan.compute_dtype) if loss.reduction == "none" else None
    job = Job(
        checked.rows,
        call.rows,
        soft=call.soft,
        on=on,
        off=off,
        z_loss=loss.z_loss,
        upstream=row_factors,
        scale=factor * reduction.gradient_scale(call.divisor),
        loss=row_losses,
    )
    loss_sum = _emit(job, plan, "gradient", grad, checked.axis)
    if row_losses is not None:
        return row_losses.reshape(checked.outer_shape), grad
    return reduction.reduced(loss_sum, call.divisor), grad


def _read(call: Call, row_factors: np.ndarray | None) -> dict[str, np.ndarray | None]:
    """The arrays that are read while a gradient is written, by name."""
    rows, target = call.rows, call.soft if call.soft is not None else call.rows.target
    return {"target": target, "weight": rows.weight, "sample_weight": rows.sample_weight, "upstream": row_factors}


def _emit(job: Job, plan: Plan, what: str, out: np.ndarray | None, axis: int) -> float:
    """Run the job with its output in `out`, if any; by way of a copy where kernels cannot write to it."""
    if out is None:
        return backends.active().run(job, plan)
    fit = out.dtype.isnative and out.flags.aligned
    place = out if fit else np.empty(out.shape, job.logits.dtype)
    job = replace(job, out=inputs.class_last(place, axis), emit=what)
    loss_sum = backends.active().run(job, plan)
    if not fit:
        out[...] = place
    return loss_sum


def transform(what: str, logits, *, class_axis, n_threads, out=None) -> np.ndarray:
    """softmax ("gradient" of logsumexp) or log_softmax, in logits' shape and dtype."""
    checked = inputs.as_logits(logits, class_axis)
    result = inputs.as_out(out, checked, {})
    _emit(Job(checked.rows), _plan(checked, n_threads), what, result, checked.axis)
    return result


def logsumexp(logits, *, class_axis, n_threads) -> np.ndarray:
    """log sum_k exp(x_k) of each row, in the compute dtype."""
    checked = inputs.as_logits(logits, class_axis)
    plan = _plan(checked, n_threads)
    lse = np.empty(plan.n_rows, plan.compute_dtype)
    backends.active().run(Job(checked.rows, lse=lse), plan)
    return lse.reshape(checked.outer_shape)


def picked_loss(loss: "NLLLoss", log_probs, target, sample_weight, *, gradient=False, out=None, upstream=None):
    """(value, gradient or None) of -w_t log_probs_t: no statistics, only the target's element of each row."""
    checked = inputs.as_logits(log_probs, loss.class_axis, "log_probs")
    call = _check(loss, checked, target, sample_weight)
    if call.rows.target is None:
        raise TypeError("target holds class probabilities; nll_loss takes class indices (an integer dtype)")
    factor, row_factors = _as_upstream(upstream, loss, checked)
    grad = inputs.as_out(out, checked, _read(call, row_factors)) if gradient else None
    counts, picked, weights = _pick(call.rows)
    place = picked.reshape(*checked.outer_shape, 1)
    values = -np.take_along_axis(checked.rows, place, -1).reshape(-1).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        nothing = ~counts | ((weights == 0) & ~np.isnan(values))  # 0 * inf is 0 here, and NaN stays NaN
        row_losses = np.where(nothing, 0.0, weights * values)
        if grad is not None:
            slope = -weights * (factor * reduction.gradient_scale(call.divisor))
            slope = np.where(counts, slope if row_factors is None else slope * row_factors, 0.0)
            grad[...] = 0
            np.put_along_axis(inputs.class_last(grad, checked.axis), place, slope.reshape(place.shape), -1)
    if loss.reduction == "none":
        dtype = np.float64 if checked.rows.dtype == np.float64 else np.float32
        return row_losses.astype(dtype).reshape(checked.outer_shape), grad
    return reduction.reduced(float(row_losses.sum()), call.divisor), grad


def _pick(rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(whether each row counts; its target, or 0; s_i w_t, or 0), flat."""
    assert rows.target is not None
    counts = rows.target != rows.ignore_index
    weights = np.ones(counts.shape) if rows.sample_weight is None else rows.sample_weight
    counts &= weights != 0
    picked = np.where(counts, rows.target, 0).astype(np.int64)
    weights = np.where(counts, weights if rows.weight is None else weights * rows.weight[picked], 0.0)
    return counts, picked, weights
