"""Inputs -> plan -> backend -> reduction: the only place that knows the order."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ce_fast import backends, inputs, reduction, threads
from ce_fast.backends import ElementJob, Job, Rows
from ce_fast.inputs import Logits
from ce_fast.plan import LANES, Plan, make_plan

if TYPE_CHECKING:
    from ce_fast.distillation import DistillationLoss
    from ce_fast.losses import KLDivLoss, NLLLoss, _BinaryLoss, _Loss, _SoftmaxLoss

Arrays = dict[str, np.ndarray | None]
Fields = dict[str, Any]  # of a Job


@dataclass(frozen=True, slots=True)
class Ask:
    """What is wanted beside the value."""

    gradient: bool = False
    hessian: bool = False
    out: object = None
    upstream: object = None


VALUE, GRADIENT = Ask(), Ask(gradient=True)


@dataclass(frozen=True, slots=True)
class Call:
    """The data of a call, checked."""

    logits: Logits
    rows: Rows
    soft: np.ndarray | None


def make_call_plan(logits: Logits, n_threads: int | None, *, wide: bool = False) -> Plan:
    resolved = threads.resolve(n_threads, logits.rows.size, backends.active().max_threads)
    return make_plan(logits.outer_shape, logits.n_classes, logits.rows.dtype, resolved, wide=wide, lanes=LANES)


def count(loss: "_Loss | KLDivLoss | DistillationLoss", logits: Logits, rows: Rows) -> float:
    """The divisor of the mean; IndexError at the first target that is no class."""
    n_rows = logits.rows.size // logits.n_classes
    return _divisor(loss, logits, rows, *backends.active().scan_targets(rows, n_rows, logits.n_classes))


def _divisor(loss, logits: Logits, rows: Rows, bad: int, counted: int, weight_sum: float) -> float:
    inputs.check_target_found(bad, rows, logits)
    n_rows = logits.rows.size // logits.n_classes
    return reduction.divisor(loss.reduction, loss.denominator, n_rows, counted, weight_sum)


def check_call(loss: "_Loss", logits: Logits, target, sample_weight) -> Call:
    inputs.check_weight(loss.weight, logits)
    indices, soft = inputs.as_targets(target, logits)
    if soft is not None and loss.check_target:
        inputs.check_distribution(soft)
    rows = Rows(indices, loss.ignore_index, loss.weight, inputs.as_sample_weight(sample_weight, logits))
    return Call(logits, rows, soft)


def as_upstream(upstream, how: str, logits: Logits) -> tuple[float, np.ndarray | None]:
    """(a factor of all rows, a factor of each): of the reduced loss, or of each row's."""
    if upstream is None:
        return 1.0, None
    if how == "none":
        return 1.0, inputs.as_row_values(upstream, logits, "upstream")
    return _as_number(upstream, how), None


def _as_number(upstream, how: str) -> float:
    scalar = inputs.as_array(upstream, "upstream")
    if scalar.shape != () or not (inputs.is_float(scalar.dtype) or scalar.dtype.kind in "iu"):
        raise ValueError(
            f"upstream has shape {scalar.shape} and dtype {scalar.dtype}; expected one number, for "
            f"reduction={how!r} gives one"
        )
    return float(scalar)


def softmax_fields(loss: "_SoftmaxLoss", call: Call) -> Fields:
    on, off = loss.masses(call.logits.n_classes, call.soft is not None)
    weight = loss.mass_weight(call.logits)
    return {
        "logits": call.logits.rows,
        "rows": call.rows if weight is call.rows.weight else replace(call.rows, weight=weight),
        "soft": call.soft,
        "rule": loss.rule,
        "parameter": loss.parameter,
        "on": on,
        "off": off,
        "z_loss": loss.z_loss,
        "temperature": loss.temperature,
        "softcap": loss.softcap,
    }


def softmax_loss(loss: "_SoftmaxLoss", logits, target, sample_weight, ask: Ask = VALUE):
    """(value, gradient or None, Hessian or None) of a softmax loss."""
    if loss.common and sample_weight is None and (ask is VALUE or ask is GRADIENT):
        done = backends.active().small_call(logits, target, loss.ignore_index, ask is GRADIENT)
        if done is not None:
            return *done, None
    checked = inputs.as_logits(logits, loss.class_axis, target=target)
    call = check_call(loss, checked, target, sample_weight)
    inputs.warn_if_probabilities(checked)
    return _run_rows(loss, softmax_fields(loss, call), call.rows, checked, ask)


def divergence_loss(loss: "KLDivLoss", logits, target, sample_weight, ask: Ask = VALUE):
    """(value, gradient or None, Hessian or None) of KL(q || p) or KL(p || q)."""
    checked = inputs.as_logits(logits, loss.class_axis)
    other = inputs.as_distribution(target, checked)
    rows = Rows(sample_weight=inputs.as_sample_weight(sample_weight, checked))
    if not loss.log_probs:
        inputs.warn_if_probabilities(checked)
    return _run_rows(loss, divergence_fields(loss, checked, rows, other), rows, checked, ask)


def divergence_fields(loss: "KLDivLoss", logits: Logits, rows: Rows, other: np.ndarray) -> Fields:
    return {
        "logits": logits.rows,
        "rows": rows,
        "soft": other,
        "rule": loss.rule,
        "log_probs": loss.log_probs,
        "temperature": loss.temperature,
        "softcap": loss.softcap,
    }


def _run_rows(loss: "_SoftmaxLoss | KLDivLoss", fields: Fields, rows: Rows, logits: Logits, ask: Ask):
    """A job with what is asked for, run and reduced. A gradient is scaled as it is made, so targets are counted before;
    for a value alone the same pass counts them."""
    factor, row_factors = as_upstream(ask.upstream, loss.reduction, logits)
    scale = factor * reduction.gradient_scale(count(loss, logits, rows)) if ask.gradient else 1.0
    plan = make_call_plan(logits, loss.n_threads, wide=loss.wide)
    row_losses = np.empty(plan.n_rows, plan.compute_dtype) if loss.reduction == "none" else None
    fields |= {"upstream": row_factors, "loss": row_losses, "scale": scale / loss.temperature}
    grad = hess = None
    if ask.gradient:
        grad = inputs.as_out(ask.out, logits, _read(fields))
    if ask.hessian:
        hess = inputs.as_out(None, logits, {})
        fields |= {"hess": inputs.class_last(hess, logits.axis), "floor": _hess_floor(hess.dtype)}
        fields["hess_scale"] = scale / loss.temperature**2
    loss_sum, bad, counted, weight_sum = emit(fields, plan, "gradient", grad, logits.axis)
    weighted = fields["rows"] is rows  # else by more than what a mean divides by: alpha
    divisor = _divisor(loss, logits, rows, bad, counted, weight_sum) if weighted else count(loss, logits, rows)
    if row_losses is not None:
        return result_rows(row_losses, logits), grad, hess
    return reduction.reduced(loss_sum, divisor), grad, hess


def _hess_floor(dtype: np.dtype) -> float:
    """The least Hessian of a row that counts: boosting divides by sums of them."""
    return 2.0**-24 if dtype == np.float16 else 1e-16


def result_rows(row_losses: np.ndarray, logits: Logits) -> np.ndarray:
    """Row losses in the result's dtype and shape."""
    dtype = np.float64 if logits.rows.dtype == np.float64 else np.float32
    with np.errstate(over="ignore", under="ignore"):
        return row_losses.astype(dtype, copy=False).reshape(logits.outer_shape)


def _read(fields: Fields) -> Arrays:
    """The arrays that are read while a gradient is written, by name."""
    rows, soft = fields["rows"], fields["soft"]
    target = rows.target if soft is None else soft
    return {
        "target": target,
        "weight": rows.weight,
        "sample_weight": rows.sample_weight,
        "upstream": fields["upstream"],
    }


def emit(fields: Fields, plan: Plan, what: str, out: np.ndarray | None, axis: int) -> tuple[float, int, int, float]:
    """Run a job with its output in `out`, if any; by way of a copy where kernels cannot write to it."""
    if out is None:
        return backends.active().run(Job(**fields), plan)
    place = _writable(out)
    result = backends.active().run(Job(**fields, out=inputs.class_last(place, axis), emit=what), plan)
    if place is not out:
        out[...] = place
    return result


def _writable(out: np.ndarray) -> np.ndarray:
    if out.dtype.isnative and out.flags.aligned:
        return out
    return np.empty(out.shape, out.dtype.newbyteorder("="))


def run_block(fields: Fields, out: np.ndarray | None, n_threads: int | None, *, wide: bool) -> np.ndarray:
    """The row losses of a job on some rows; its gradient to `out`, if any, of logits' shape."""
    x = fields["logits"]
    plan = make_call_plan(Logits(x, x, x.ndim - 1), n_threads, wide=wide)
    losses = np.empty(plan.n_rows, plan.compute_dtype)
    emit(fields | {"loss": losses}, plan, "gradient", out, x.ndim - 1)
    return losses


def transform(what: str, logits, *, class_axis, n_threads, out=None) -> np.ndarray:
    """softmax ("gradient" of logsumexp) or log_softmax, in logits' shape and dtype."""
    checked = inputs.as_logits(logits, class_axis)
    result = inputs.as_out(out, checked, {})
    emit({"logits": checked.rows}, make_call_plan(checked, n_threads), what, result, checked.axis)
    return result


def logsumexp(logits, *, class_axis, n_threads) -> np.ndarray:
    """log sum_k exp(x_k) of each row, in the compute dtype."""
    checked = inputs.as_logits(logits, class_axis)
    plan = make_call_plan(checked, n_threads)
    lse = np.empty(plan.n_rows, plan.compute_dtype)
    backends.active().run(Job(checked.rows, lse=lse), plan)
    return lse.reshape(checked.outer_shape)


def entropy(logits, *, class_axis, temperature, n_threads) -> np.ndarray:
    """sum_k p_k (lse - z_k) of each row: minus the divergence from a distribution whose log is 0."""
    checked = inputs.as_logits(logits, class_axis)
    plan = make_call_plan(checked, n_threads, wide=True)
    values = np.empty(plan.n_rows, plan.compute_dtype)
    backends.active().run(Job(checked.rows, rule="kl_reverse", temperature=temperature, loss=values), plan)
    return result_rows(0.0 - values, checked)  # and no entropy of -0


def element_loss(loss: "_BinaryLoss", logits, target, sample_weight, ask: Ask = VALUE):
    """(value, gradient or None, Hessian or None) of a loss of elements: binary, multi-label."""
    given = inputs.as_float_array(logits, loss.input_name)
    job, divisor = _element_job(loss, given, target, sample_weight, ask)
    losses = grad = hess = None
    if loss.reduction == "none":
        losses = np.empty(given.shape, np.float64 if job.logits.dtype == np.float64 else np.float32)
    if ask.gradient:
        names = ("target", "weight", "pos_weight", "sample_weight", "upstream")
        others = {name: getattr(job, name) for name in names}
        grad = inputs.as_out(ask.out, Logits(given, job.logits, 0), others, loss.input_name)
    if ask.hessian:
        hess = np.empty(given.shape, job.logits.dtype)
    place = None if grad is None else _writable(grad)
    job = replace(job, out=place, hess=hess, loss=losses, floor=_hess_floor(job.logits.dtype))
    n_threads = threads.resolve(loss.n_threads, given.size, backends.active().max_threads)
    plan = make_plan((given.size,), 1, job.logits.dtype, n_threads, wide=loss.wide)
    loss_sum, bad_target = backends.active().run_elements(_flat(job), plan)
    if bad_target and loss.check_target:
        inputs.check_unit_interval("target", job.target, job.sample_weight)
    if grad is not None and place is not grad:
        grad[...] = place
    return (reduction.reduced(loss_sum, divisor) if losses is None else losses), grad, hess


def _element_job(loss: "_BinaryLoss", given: np.ndarray, target, sample_weight, ask: Ask) -> tuple[ElementJob, float]:
    """What a loss of elements reads, checked; the divisor of the mean."""
    shape = given.shape
    job = ElementJob(
        inputs.readable(given),
        inputs.as_binary_target(target, shape, loss.input_name),
        loss.rule,
        sample_weight=inputs.as_element_weight(sample_weight, shape),
        **loss.fields(shape),
    )
    if job.logits.dtype != np.float64 and not loss.wide:
        for name in ("weight", "pos_weight", "sample_weight"):
            weight = getattr(job, name)
            inputs.check_float32(None if weight is None else _once(weight), name)
    if loss.check_target and ask.out is not None and np.may_share_memory(ask.out, given):  # before logits are lost
        inputs.check_unit_interval("target", job.target, job.sample_weight)
    if loss.rule == "binary_probability":
        inputs.check_unit_interval(loss.input_name, job.logits, job.sample_weight)
    divisor = _element_divisor(loss.reduction, job)
    factor, upstream = 1.0, None
    if ask.upstream is not None and loss.reduction == "none":
        upstream = inputs.as_operand(ask.upstream, shape, "upstream")
    elif ask.upstream is not None:
        factor = _as_number(ask.upstream, loss.reduction)
    scale = factor * reduction.gradient_scale(divisor)
    return replace(job, upstream=upstream, scale=scale, hess_scale=scale), divisor


_OPERANDS = ("logits", "target", "weight", "pos_weight", "sample_weight", "upstream", "out", "hess", "loss")


def _flat(job: ElementJob) -> ElementJob:
    """The same elements as one axis where that needs no copy, and as one at least."""
    arrays = {name: array for name in _OPERANDS if (array := getattr(job, name)) is not None}
    if job.logits.ndim == 0 or all(array.flags.c_contiguous for array in arrays.values()):
        return replace(job, **{name: array.reshape(-1) for name, array in arrays.items()})
    return job


def _element_divisor(how: str, job: ElementJob) -> float:
    """The number of elements, or the sum of their sample weights."""
    if how != "mean":
        return 1.0
    if job.sample_weight is None:
        return float(job.logits.size)
    given = _once(job.sample_weight)
    return float(given.sum(dtype=np.float64)) * (job.logits.size // given.size if given.size else 0)


def _once(array: np.ndarray) -> np.ndarray:
    """A broadcast array without its repetitions, of as many axes."""
    return array[tuple(slice(1) if stride == 0 else slice(None) for stride in array.strides)]


def picked_loss(loss: "NLLLoss", log_probs, target, sample_weight, ask: Ask = VALUE):
    """(value, gradient or None) of -w_t log_probs_t: no statistics, only the target's element of each row."""
    checked = inputs.as_logits(log_probs, loss.class_axis, "log_probs", target)
    call = check_call(loss, checked, target, sample_weight)
    if call.rows.target is None:
        raise TypeError("target holds class probabilities; nll_loss takes class indices (an integer dtype)")
    divisor = count(loss, checked, call.rows)
    factor, row_factors = as_upstream(ask.upstream, loss.reduction, checked)
    grad = None
    if ask.gradient:
        rows = call.rows
        others = {"target": rows.target, "sample_weight": rows.sample_weight, "upstream": row_factors}
        grad = inputs.as_out(ask.out, checked, others)
    counts, picked, weights = _pick(call.rows)
    place = picked.reshape(*checked.outer_shape, 1)
    values = -np.take_along_axis(checked.rows, place, -1).reshape(-1).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        nothing = ~counts | ((weights == 0) & ~np.isnan(values))  # 0 * inf is 0 here, and NaN stays NaN
        row_losses = np.where(nothing, 0.0, weights * values)
        if grad is not None:
            slope = -weights * (factor * reduction.gradient_scale(divisor))
            slope = np.where(counts, slope if row_factors is None else slope * row_factors, 0.0)
            grad[...] = 0
            np.put_along_axis(inputs.class_last(grad, checked.axis), place, slope.reshape(place.shape), -1)
    if loss.reduction == "none":
        return result_rows(row_losses, checked), grad
    return reduction.reduced(float(row_losses.sum()), divisor), grad


def _pick(rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(whether each row counts; its target, or 0; s_i w_t, or 0), flat."""
    assert rows.target is not None
    counts = rows.target != rows.ignore_index
    weights = np.ones(counts.shape) if rows.sample_weight is None else rows.sample_weight
    counts &= weights != 0
    picked = np.where(counts, rows.target, 0).astype(np.int64)
    weights = np.where(counts, weights if rows.weight is None else weights * rows.weight[picked], 0.0)
    return counts, picked, weights
