"""What the losses of `ce_fast.adapters.torch` share: their formulas in torch's operations, the node of the autograd
graph, and which way a call goes.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

import ce_fast
from ce_fast import backends, threads
from ce_fast.adapters.torch_patch import own

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_PLAIN = (Tensor, torch.nn.Parameter)
_CLASS_OPTIONS = (
    "ignore_index",
    "reduction",
    "label_smoothing",
    "smoothing",
    "temperature",
    "softcap",
    "z_loss",
    "denominator",
)

# ------------------------------------------------------------------------------------------ formulas
# Each loss in torch's operations, for what differentiates twice, batches, traces or compiles it. Tensors of a floating
# dtype all have the first one's compute dtype here. Elements that do not count are taken out before any computation.


def _reduced(losses: Tensor, reduction: str, divisor: float | Tensor) -> Tensor:
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    divisor = torch.as_tensor(divisor, dtype=losses.dtype, device=losses.device)
    mean = losses.sum() / torch.where(divisor == 0, 1, divisor)
    return torch.where(divisor == 0, torch.nan, mean)  # NaN over nothing, its gradient 0


def _finite(cost: Tensor, mass: Tensor) -> Tensor:
    """The cost, but any number where it is infinite and the mass that multiplies it is 0, which wins."""
    return torch.where((mass == 0) & cost.isinf(), 1, cost)


def _power(base: Tensor, exponent: float) -> Tensor:
    """base ** exponent, whose derivatives at 0 are finite: they are multiplied by 0 here."""
    return torch.where(base == 0, torch.finfo(base.dtype).tiny, base) ** exponent if exponent else torch.ones_like(base)


def _capped(x: Tensor, softcap: float | None, temperature: float) -> Tensor:
    return (x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature


def _class_axis(input: Tensor) -> int:
    return 1 if input.ndim > 1 else 0


class _Rows:
    """The rows of logits: which of them count, with which sample weight."""

    def __init__(self, input: Tensor, sample_weight: Tensor | None, counts: Tensor | None = None):
        self.axis = _class_axis(input)
        x = input.movedim(self.axis, -1)
        s = torch.ones_like(x[..., 0]) if sample_weight is None else sample_weight.to(x.dtype)
        self.counts = s != 0 if counts is None else counts & (s != 0)
        self.sample_weight = torch.where(self.counts, s, 0)
        self.logits = self.read(input)

    def read(self, values: Tensor) -> Tensor:
        """The values, class axis last, 0 in rows that do not count: NaN there stays there."""
        return torch.where(self.counts.unsqueeze(-1), values.movedim(self.axis, -1), 0)

    def reduced(self, losses: Tensor, reduction: str, denominator: str | float, weight: Tensor | float = 1.0) -> Tensor:
        s = self.sample_weight
        divisors: dict[Any, Any] = {"weight": (s * weight).sum(), "count": self.counts.sum(), "total": s.numel()}
        divisor = divisors.get(denominator, denominator)
        return _reduced(torch.where(self.counts, s * losses, 0), reduction, divisor)


def _class_formula(
    term: Callable[[Tensor], Tensor],
    input: Tensor,
    target: Tensor,
    sample_weight: Tensor | None,
    *,
    weight: Tensor | None,
    alpha: Any = None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    smoothing: str = "uniform",
    temperature: float = 1.0,
    softcap: float | None,
    z_loss: float = 0.0,
    denominator: str | float,
) -> Tensor:
    """s [sum_k mass_k term(lse - z_k) + z_loss w_t lse^2], mass_k = w_k (on q_k + off)."""
    soft = target.is_floating_point()
    rows = _Rows(input, sample_weight, None if soft else target != ignore_index)
    n_classes = rows.logits.shape[-1]
    if smoothing == "others" and (soft or n_classes == 1):
        raise ValueError("smoothing='others' needs class indices, and at least 2 classes")
    if soft:
        q = rows.read(target)
    else:
        t = torch.where(rows.counts, target, 0).long().unsqueeze(-1)
        q = torch.zeros_like(rows.logits).scatter(-1, t, 1.0)
    off = label_smoothing / (n_classes if smoothing == "uniform" else n_classes - 1)
    on = 1 - label_smoothing - (0 if smoothing == "uniform" else off)
    w = rows.logits.new_ones(n_classes) if weight is None else weight
    scaled = w if alpha is None else w * alpha
    z = _capped(rows.logits, softcap, temperature)
    mass = scaled * (on * q + off)
    losses = (mass * term(_finite(-z.log_softmax(-1), mass))).sum(-1)
    if z_loss:
        losses = losses + z_loss * (1 if soft else (scaled * q).sum(-1)) * z.logsumexp(-1) ** 2
    return rows.reduced(losses, reduction, denominator, 1.0 if soft else (w * q).sum(-1))


def _divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """sum_k q_k (log q_k - log p_k), 0 where q_k is 0."""
    return (log_q.exp() * torch.where(log_q == -torch.inf, 0, log_q - log_p)).sum(-1)


def _top_k(log_p: Tensor, indices: Tensor, log_probs: Tensor, tail: str) -> tuple[Tensor, Tensor]:
    """(log p, log q) of the classes that the teacher lists, and of all others, if any, as one more class."""
    picked = log_p.gather(-1, indices)
    if tail == "renormalize":
        return picked, log_probs.log_softmax(-1)
    if picked.shape == log_p.shape:
        return picked, log_probs
    sum_q = log_probs.exp().sum(-1, keepdim=True)
    below = sum_q < 1
    rest_q = torch.where(below, torch.log1p(-torch.where(below, sum_q, 0)), -torch.inf)
    rest_p = log_p.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([picked, rest_p], -1), torch.cat([log_probs, rest_q], -1)


def _softplus(x: Tensor) -> Tensor:
    return -F.logsigmoid(-x)  # which is exact also past F.softplus's threshold


def _element_formula(
    cost: Callable[[Tensor, Tensor], Tensor],
    input: Tensor,
    target: Tensor,
    sample_weight: Tensor | None,
    weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """s w cost(z, y) of each element; a sample weight may be one a row."""
    if sample_weight is None:
        s = torch.ones_like(input)
    else:
        s = sample_weight.to(input.dtype).reshape(sample_weight.shape + (1,) * (input.ndim - sample_weight.ndim))
        s = s.expand(input.shape)
    losses = cost(torch.where(s == 0, 0, input), torch.where(s == 0, 0, target))
    losses = torch.where(s == 0, 0, s * (losses if weight is None else weight * losses))
    return _reduced(losses, reduction, s.sum())


# ------------------------------------------------------------------------------------------ kernels and formulas


class CrossEntropy(ce_fast.CrossEntropyLoss):
    _negative_weight: ClassVar[bool] = True  # which torch allows

    @staticmethod
    def formula(*data, **options):
        return _class_formula(lambda n: n, *data, **options)


class Focal(ce_fast.FocalLoss):
    @staticmethod
    def formula(*data, gamma, **options):
        return _class_formula(lambda n: n * _power(-torch.expm1(-n), gamma), *data, **options)


class Poly(ce_fast.PolyLoss):
    @staticmethod
    def formula(*data, epsilon, **options):
        return _class_formula(lambda n: n - epsilon * torch.expm1(-n), *data, **options)


class GeneralizedCrossEntropy(ce_fast.GeneralizedCrossEntropyLoss):
    @staticmethod
    def formula(*data, q, **options):
        return _class_formula(lambda n: -torch.expm1(-q * n) / q, *data, **options)


class NLL(ce_fast.NLLLoss):
    _negative_weight: ClassVar[bool] = True

    @staticmethod
    def formula(input, target, **options):
        return own.nll_loss(input, target, **options)


class BCEWithLogits(ce_fast.BCEWithLogitsLoss):
    _negative_weight: ClassVar[bool] = True
    check_target: ClassVar[bool] = False

    @staticmethod
    def formula(input, target, sample_weight, *, weight, pos_weight, reduction, label_smoothing):
        def cost(z, y):
            y = (1 - label_smoothing) * y + label_smoothing / 2
            on, off = y if pos_weight is None else pos_weight * y, 1 - y
            return on * _finite(_softplus(-z), on) + off * _finite(_softplus(z), off)

        return _element_formula(cost, input, target, sample_weight, weight, reduction)


class BCE(ce_fast.BCELoss):
    _negative_weight: ClassVar[bool] = True

    @staticmethod
    def formula(input, target, **options):
        return own.binary_cross_entropy(input, target, **options)


class SigmoidFocal(ce_fast.SigmoidFocalLoss):
    check_target: ClassVar[bool] = False

    def __init__(self, alpha, *args, **options):
        super().__init__(None if alpha == -1 else alpha, *args, **options)

    @staticmethod
    def formula(input, target, sample_weight, *, alpha, gamma, reduction):
        def cost(z, y):
            entropy = y * _finite(_softplus(-z), y) + (1 - y) * _finite(_softplus(z), 1 - y)
            share = 1 if alpha is None or alpha == -1 else alpha * y + (1 - alpha) * (1 - y)
            return share * entropy * _power(y * torch.sigmoid(-z) + (1 - y) * torch.sigmoid(z), gamma)

        return _element_formula(cost, input, target, sample_weight, None, reduction)


class KLDiv(ce_fast.KLDivLoss):
    @staticmethod
    def formula(input, target, *, reduction, denominator, **_):
        sum_ = own.kl_div(input, target, reduction="sum", log_target=True)
        return sum_ if reduction == "sum" else sum_ / denominator


class KLDivWithLogits(ce_fast.KLDivLoss):
    @staticmethod
    def formula(input, target, sample_weight, *, direction, temperature, softcap, reduction, denominator):
        rows = _Rows(input, sample_weight)
        log_p = _capped(rows.logits, softcap, temperature).log_softmax(-1)
        log_q = (rows.read(target) / temperature).log_softmax(-1)
        losses = _divergence(log_q, log_p) if direction == "forward" else _divergence(log_p, log_q)
        return rows.reduced(losses, reduction, denominator)


class Distillation(ce_fast.DistillationLoss):
    def __call__(self, student, teacher, log_probs, target, sample_weight):  # type: ignore[override]
        teacher = teacher if log_probs is None else ce_fast.TopKTeacher(teacher, log_probs)
        return super().__call__(student, teacher, target, sample_weight)

    def value_and_grad(self, student, teacher, log_probs, target, sample_weight, **given):  # type: ignore[override]
        teacher = teacher if log_probs is None else ce_fast.TopKTeacher(teacher, log_probs)
        return super().value_and_grad(student, teacher, target, sample_weight, **given)

    @staticmethod
    def formula(
        student,
        teacher,
        log_probs,
        target,
        sample_weight,
        *,
        temperature,
        alpha,
        direction,
        tail,
        ignore_index,
        softcap,
        reduction,
        denominator,
        **options,
    ):
        if alpha is None:
            alpha = 1.0 if target is None else 0.5
        if target is None and alpha < 1:
            raise ValueError(f"alpha is {alpha}, which needs a target")
        indices = target is not None and not target.is_floating_point()
        rows = _Rows(student, sample_weight, target != ignore_index if indices else None)
        log_p = _capped(rows.logits, softcap, temperature).log_softmax(-1)
        if log_probs is None:
            log_q = (rows.read(teacher) / temperature).log_softmax(-1)
        else:
            log_p, log_q = _top_k(log_p, rows.read(teacher).long(), rows.read(log_probs), tail)
        losses = _divergence(log_q, log_p) if direction == "forward" else _divergence(log_p, log_q)
        loss = alpha * temperature**2 * rows.reduced(losses, reduction, denominator)
        if target is None or alpha == 1:
            return loss
        options |= {"softcap": softcap, "ignore_index": ignore_index, "reduction": reduction}
        entropy = CrossEntropy.formula(student, target, sample_weight, denominator=denominator, **options)
        return loss + (1 - alpha) * entropy


# ------------------------------------------------------------------------------------------ tensors and arrays


def _array(tensor: Tensor) -> np.ndarray:
    """The tensor's own memory as an array, whatever its strides."""
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().resolve_neg().view(torch.int16).numpy().view(_BFLOAT16)
    if tensor.is_neg():
        return tensor.numpy(force=True)
    plain = tensor.detach() if tensor.requires_grad else tensor  # as force does, by two operations in place of five
    return plain.numpy()


def _arrays(tensors: Iterable[Tensor | None]) -> list[np.ndarray | None]:
    return [None if tensor is None else _array(tensor) for tensor in tensors]


def _gradient_tensor(array: np.ndarray) -> Tensor:
    """The array's own memory. NumPy allocates in huge pages: 25 ms less for [1024, 50257] than `torch.empty_like`."""
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _tensor(value: float | np.ndarray, dtype: torch.dtype) -> Tensor:
    if dtype is torch.float32 and type(value) is float and 1e-37 < value < 1e38:  # no conversion by torch: 2 us less
        return torch.from_numpy(np.array(value, np.float32))
    return torch.from_numpy(np.asarray(value)).to(dtype)


def _compute(tensors: Iterable[Any]) -> list[Any]:
    """All floating tensors in the compute dtype of the first."""
    first, *rest = tensors
    first = first.to(torch.promote_types(first.dtype, torch.float32))
    return [first, *(t.to(first.dtype) if t is not None and t.is_floating_point() else t for t in rest)]


def wide(dtype: torch.dtype) -> torch.dtype:
    """Autocast runs losses in float32."""
    narrow = dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled("cpu")
    return torch.float32 if narrow else dtype


class _Kernels(torch.autograd.Function):
    """A loss as a node of the autograd graph.

    A mean or sum has one upstream gradient u, and d(u l)/dx = u dl/dx: dl/dx is computed along with l in one pass,
    and given away at the first backward. A later backward, and reduction "none", compute it from the logits. The last
    `names` of the tensors are options of the formula; `done` is (l, dl/dx), as arrays, where both are known already.

    In place it takes the memory of the logits, from which nothing can be computed any more; that of 16-bit logits only
    in backward, where the factor is known that must come before the rounding.
    """

    @staticmethod
    def forward(ctx, call, done, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.call, ctx.gradient, ctx.overwritten = call, None, False
        if done is not None:
            ctx.gradient = torch.from_numpy(done[1])
            return torch.from_numpy(done[0])
        loss, _, names, dtype, in_place = call
        ctx.overwritten = in_place and loss.reduction != "none" and tensors[0].itemsize > 2
        given = _arrays(tensors[: len(tensors) - len(names)])
        if loss.reduction == "none" or (in_place and not ctx.overwritten):
            return _tensor(loss(*given), dtype)
        value, gradient = loss.value_and_grad(*given, out=given[0] if in_place else None)
        if in_place:
            increment_version(tensors[0])
        ctx.gradient = _gradient_tensor(gradient)
        return _tensor(value, dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor):  # type: ignore[override]
        gradient = (_formula_gradient if _is_differentiated(upstream) else _kernel_gradient)(ctx, upstream)
        return None, None, gradient, *_NO_GRADIENTS


_NO_GRADIENTS = (None,) * 16  # more than there are tensors, of which autograd takes as many as it needs


def _check_not_overwritten(ctx: Any) -> None:
    if ctx.overwritten:
        raise RuntimeError(
            "inplace_backward=True: the logits are overwritten by their gradient, of which there is "
            "no second one, and no gradient of a gradient"
        )


# Function.apply without what it does for torch.func, which does not come here: it took a tenth of a small call's time
_apply_kernels = super(torch.autograd.Function, _Kernels).apply


def _is_differentiated(upstream: Tensor) -> bool:
    """Whether a backward is itself differentiated, batched or transformed."""
    return torch.is_grad_enabled() or _is_batched(upstream) or _recorded()


def _formula_gradient(ctx: Any, upstream: Tensor) -> Tensor:
    _check_not_overwritten(ctx)
    _, formula, names, _, _ = ctx.call
    create_graph, tensors = torch.is_grad_enabled(), ctx.saved_tensors
    with torch.enable_grad():
        input, *others = _compute(tensors)
        input = input.view_as(input)  # whose hooks are not those of the logits, which run once
        n_given = len(others) - len(names)
        value = formula(input, *others[:n_given], **dict(zip(names, others[n_given:], strict=True)))
        (gradient,) = torch.autograd.grad(value, input, upstream.to(value.dtype), create_graph=create_graph)
    return gradient.to(tensors[0].dtype)


def _kernel_gradient(ctx: Any, upstream: Tensor) -> Tensor:
    gradient, ctx.gradient = ctx.gradient, None  # no reference stays: autograd may add to it in place
    factor = _array(upstream) if gradient is None and ctx.call[0].reduction == "none" else upstream.item()
    if gradient is not None and factor == 1:
        return gradient
    # 16-bit gradients are scaled before they are rounded, or a loss scale would come too late for small ones
    if gradient is not None and gradient.itemsize > 2:
        return gradient.mul_(factor)
    if gradient is None:
        _check_not_overwritten(ctx)
    loss, _, names, _, in_place = ctx.call
    tensors = ctx.saved_tensors
    given = _arrays(tensors[: len(tensors) - len(names)])
    out = None if gradient is None else _array(gradient)
    if in_place:
        out, ctx.overwritten = given[0], True
        increment_version(tensors[0])
    return _gradient_tensor(loss.value_and_grad(*given, out=out, upstream=factor)[1])


# ------------------------------------------------------------------------------------------ which way a call goes


def _recorded() -> bool:
    """Whether something records or transforms torch's operations just now, and would not see ours."""
    return (
        _is_compiling()
        or _are_transforms_active()
        or forward_ad._current_level >= 0
        or _n_dispatch_modes() > 0
        or _is_tracing()
    )


# by names of their own, as what is asked of every call: a microsecond of two in a small one
_is_compiling, _is_tracing = torch.compiler.is_compiling, torch._C._is_tracing
_are_transforms_active = torch._C._are_functorch_transforms_active
_n_dispatch_modes = torch._C._len_torch_dispatch_stack


def is_unseen(input, target, *others, by_operation: bool = False) -> bool:
    """Whether the kernels cannot do the call on these tensors, of which only input may need a gradient.

    By an operation of torch they also do it where it is recorded.
    """
    types = _PLAIN
    if _recorded():
        if not (by_operation and torch_ops.record()):
            return True
        types = torch_ops.RECORDED
    if _foreign(input, types) or input.dtype not in _FLOATS:
        return True
    rest = [target, *(other for other in others if other is not None and type(other) not in (float, int))]
    return any(_foreign(tensor, types) or (tensor.requires_grad and torch.is_grad_enabled()) for tensor in rest)


def _foreign(tensor, types: tuple[type, ...]) -> bool:
    if type(tensor) not in types or not tensor.is_cpu or tensor.layout != torch.strided:
        return True
    if types is not _PLAIN:
        return False
    return _is_batched(tensor) or (tensor.numel() > 0 and not tensor.data_ptr())  # whose memory is freed, or all zeros


_is_batched = torch._C._functorch.is_legacy_batchedtensor  # by autograd.grad(is_grads_batched=True)


def _make(kind, **options):
    return kind(**options)


make_once = functools.lru_cache(maxsize=128, typed=True)(_make)  # a training loop's options stay the same


def run(
    kind,
    data: tuple,
    weights: dict[str, Any],
    *,
    unseen: bool | None = None,
    dtype_of: tuple[Tensor, ...] | None = None,
    in_place: bool = False,
    **options,
) -> Tensor:
    """A loss of the data by kernels, or by the formula; `in_place` is for kernels alone.

    The result has the dtype of `dtype_of`: by default of the first tensor, promoted by a second one of a floating dtype
    and then by the weights.
    """
    if unseen is None:
        unseen = is_unseen(*data, *weights.values(), by_operation=True)
    tensors = {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}
    options |= {name: weight for name, weight in weights.items() if name not in tensors}
    input, target = data[:2]
    if unseen:
        for tensor in (input, target, *(other for other in data[2:] if other is not None)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"got a {type(tensor).__name__} where a Tensor was expected")
        if not input.is_floating_point():
            raise TypeError(f"input has dtype {input.dtype}; expected a floating dtype")
    if dtype_of is None:
        dtype_of = (input, target, *tensors.values()) if target.is_floating_point() else (input,)
    dtype = functools.reduce(torch.promote_types, [wide(tensor.dtype) for tensor in dtype_of])
    recorded = _recorded()
    if (unseen or recorded) and not torch.compiler.is_compiling():
        make_once(kind, **options)  # checks the options
    if unseen:
        return by_formula(kind, data, tensors, options).to(dtype)
    if recorded:
        return torch_ops.run(kind, dtype, data, tensors, options)
    loss = loss_of(kind, input, tensors, options)
    if input.requires_grad and torch.is_grad_enabled():
        if in_place:
            _check_overwritable(input)
        call = loss, functools.partial(kind.formula, **options), tuple(tensors), dtype, in_place
        result = _apply_kernels(call, None, *data, *tensors.values())
        if in_place:
            input._ce_fast_version = input._version  # type: ignore[attr-defined]  # so that no other loss takes it
        return result
    return _tensor(loss(*_arrays(data)), dtype)


def by_formula(kind, data: tuple, tensors: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    seen = _compute((*data, *tensors.values()))
    named = dict(zip(tensors, seen[len(data) :], strict=True))
    return kind.formula(*seen[: len(data)], **named, **options)


def loss_of(kind, input: Tensor, tensors: dict[str, Tensor], options: dict[str, Any]):
    """The loss that the kernels compute for this input, with weights as arrays."""
    fields, more = kind.__dataclass_fields__, {}
    if "class_axis" in fields and "class_axis" not in options:
        more["class_axis"] = _class_axis(input)
    if "n_threads" in fields:
        more["n_threads"] = 1 if input.numel() < threads.SERIAL_LOGITS else torch.get_num_threads()
    arrays: dict[str, Any] = {name: _array(tensor) for name, tensor in tensors.items()}
    return (_make if tensors else make_once)(kind, **arrays, **more, **options)


@functools.lru_cache(maxsize=16)
def _common(ignore_index: int, n_threads: int, dtype: torch.dtype) -> tuple:
    """What a node is called with."""
    loss = CrossEntropy(ignore_index=ignore_index, n_threads=n_threads)
    options = {name: getattr(loss, name) for name in ("weight", *_CLASS_OPTIONS)}
    return loss, functools.partial(CrossEntropy.formula, **options), (), dtype, False


def mean_cross_entropy(input: Tensor, target: Tensor, ignore_index: int) -> Tensor | None:
    """The call that is made most: of plain tensors of rows of logits and of their class indices, which the kernels see.
    None of any other. (32, 10) takes 5 us, `run` 30."""
    if type(input) is not Tensor or type(target) is not Tensor or _recorded():
        return None
    dtype, shape = input.dtype, input.shape
    if not ((dtype is torch.float32 or dtype is torch.float64) and target.dtype is torch.int64):
        return None
    if len(shape) != 2 or target.ndim != 1 or not (input.is_cpu and target.is_cpu):
        return None
    try:
        x, t = input.data_ptr(), target.data_ptr()
    except RuntimeError:  # sparse, or batched by torch
        return None
    if not (x and t):  # freed, or all zeros
        return None
    n_rows, n_classes = shape
    needs_gradient, done = input.requires_grad and torch.is_grad_enabled(), None
    small, plain = n_rows * n_classes < threads.SERIAL_LOGITS, input.is_contiguous() and target.is_contiguous()
    if small and plain and not (input.is_neg() or target.is_neg()) and target.numel() == n_rows:
        wide = dtype is torch.float64
        done = backends.active().small_call_at(x, wide, n_rows, n_classes, t, ignore_index, needs_gradient)
        if done is not None and not needs_gradient:
            return torch.from_numpy(done[0])
    call = _common(ignore_index, 1 if small else torch.get_num_threads(), dtype)
    if needs_gradient:
        return _apply_kernels(call, done, input, target, None)
    return _tensor(call[0](_array(input), _array(target)), dtype)


def _check_overwritable(input: Tensor) -> None:
    """Of the kind of errors that torch's own operations in place raise."""
    if getattr(input, "_ce_fast_version", None) == input._version:
        raise RuntimeError("inplace_backward=True of logits that another such loss has taken already")
    if input.is_leaf or (input._base is not None and input._base.is_leaf and input._base.requires_grad):
        raise RuntimeError(
            "inplace_backward=True of a leaf that requires grad, or a view of one: its values would be lost; "
            "expected the result of an operation"
        )
    if 0 in (stride for stride, n in zip(input.stride(), input.shape, strict=True) if n > 1):
        raise RuntimeError(f"inplace_backward=True of an expanded tensor, of strides {input.stride()}: clone it first")


_Function = TypeVar("_Function", bound=Callable[..., Tensor])


def overridable(function: _Function) -> _Function:
    """Torch function modes see the call, and not what happens inside, where a default device would do harm."""

    @functools.wraps(function)
    def call(*args, **options):
        if has_torch_function_variadic(None):  # asks for modes alone
            return handle_torch_function(call, (), *args, **options)
        try:
            return function(*args, **options)
        except (TypeError, ValueError) as refused:
            if torch.compiler.is_compiling():
                raise
            raise _as_torch(refused, function, args, options) from None

    return call  # type: ignore[return-value]


def _as_torch(refused: Exception, function: Callable, args: tuple, options: dict[str, Any]) -> Exception:
    """What was refused, as the kind of error that torch's own function raises, if there is one and it does."""
    torchs, defaults = getattr(own, function.__name__, None), inspect.signature(function).parameters
    if torchs is None:
        return refused
    ours = options.keys() - inspect.signature(torchs).parameters.keys()
    if any(name not in defaults or options[name] is not defaults[name].default for name in ours):
        return refused
    options = {name: value for name, value in options.items() if name not in ours}
    try:
        torchs(*args, **options)
    except (RuntimeError, TypeError, ValueError, IndexError) as theirs:
        if not isinstance(refused, type(theirs)):
            return type(theirs)(str(refused))
    return refused


def reduction_name(reduction: str, size_average: bool | None, reduce: bool | None) -> str:
    """The reduction that torch's old options and names choose."""
    if size_average is not None or reduce is not None:
        return _Reduction.legacy_get_string(size_average, reduce)
    return ("none", "mean", "sum")[_Reduction.get_enum(reduction)]


def only_torch_reads(input: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """Class indices that torch refuses, or takes with a shape of their own."""
    return input.ndim == 1 == target.ndim or (weight is not None and wide(weight.dtype) != wide(input.dtype))


def check_ignore_index(ignore_index: int, target: Any) -> None:
    if isinstance(target, Tensor) and target.is_floating_point() and ignore_index >= 0:
        raise ValueError(f"ignore_index is {ignore_index}; class probabilities have none to ignore")


def class_loss(kind, data: tuple, weights: dict[str, Any], *options, **more) -> Tensor:
    named: dict[str, Any] = dict(zip(_CLASS_OPTIONS, options, strict=True))
    check_ignore_index(named["ignore_index"], data[1])
    return run(kind, data, weights, **named, **more)


from ce_fast.adapters import torch_ops  # noqa: E402  its nodes need the losses above, and the ways above need it
