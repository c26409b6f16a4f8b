"""The kernels as operations of torch, for what records or transforms a call: `torch.compile`, `torch.export`,
`torch.func`.

`ce_fast::loss` and `ce_fast::loss_gradient` are all there is to see of a loss in a graph. They differentiate by
`torch.library`, which `torch.func` cannot read: there, nodes of the autograd graph with the same backward call them,
and make rows of the batches of `torch.vmap`. The gradient is computed in the backward pass, with its upstream gradient.
"""

import ast
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from ce_fast.adapters import torch_autograd as autograd

RECORDED = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
_TRANSFORMS = {torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Vmap}  # that nodes know
_N_TENSORS = 6  # that an operation takes: the data of a loss, then its weights, then None


class Call(NamedTuple):
    """What is no tensor, in types that operations take."""

    kind: str  # a loss of torch_autograd
    reduction: str
    options: str  # the literal of a dict of those that are not numbers
    names: Sequence[str]  # of the tensors but the first, "" for data; then of the numbers
    numbers: Sequence[int | float]  # apart, for a graph need not be compiled again for each value
    dtype: torch.dtype


_TENSORS = "Tensor input, Tensor target, Tensor? a, Tensor? b, Tensor? c, Tensor? d"
_SCHEMA = (
    f"{_TENSORS}, str kind, str reduction, str options, str[] names, Scalar[] numbers, ScalarType dtype) -> Tensor"
)

_literal = functools.lru_cache(maxsize=128)(ast.literal_eval)


def _parts(tensors: Sequence, call: Call) -> tuple[Any, tuple, dict[str, Tensor], dict[str, Any]]:
    """(kind, data, weights, other options)"""
    n_others = len(call.names) - len(call.numbers)
    numbers = dict(zip(call.names[n_others:], call.numbers, strict=True))
    weights = {name: t for name, t in zip(call.names[:n_others], tensors[1:], strict=False) if name}
    data = tuple(tensors[: n_others + 1 - len(weights)])
    return (
        getattr(autograd, call.kind),
        data,
        weights,
        {"reduction": call.reduction, **_literal(call.options), **numbers},
    )


def _split(args: Sequence) -> tuple[tuple, Call]:
    return tuple(args[:_N_TENSORS]), Call(*args[_N_TENSORS:])


# ------------------------------------------------------------------------------------------ operations


def _loss_of(args: Sequence):
    kind, data, weights, options = _parts(*_split(args))
    return autograd.loss_of(kind, data[0], weights, options), autograd._arrays(data)


@torch.library.custom_op("ce_fast::loss", mutates_args=(), device_types="cpu", schema=f"({_SCHEMA}")
def _loss(*args):
    loss, data = _loss_of(args)
    return autograd._tensor(loss(*data), args[-1]).contiguous()


@_loss.register_fake
def _(input, *args):
    tensors, call = _split((input, *args))
    kind, _, _, options = _parts(tensors, call)
    if all(type(number) in (int, float) for number in call.numbers):  # not those of a graph for any number
        autograd.make_once(kind, **options)  # checks the options
    return input.new_empty(_rows_shape(input, call) if call.reduction == "none" else (), dtype=call.dtype)


@torch.library.custom_op(
    "ce_fast::loss_gradient", mutates_args=(), device_types="cpu", schema=f"(Tensor upstream, {_SCHEMA}"
)
def _loss_gradient(upstream, input, *args):
    loss, data = _loss_of((input, *args))
    factor = autograd._array(upstream) if loss.reduction == "none" else upstream.item()
    gradient = autograd._gradient_tensor(loss.value_and_grad(*data, upstream=factor)[1])
    strides = torch.empty_like(input, device="meta").stride()
    if all(n < 2 or own == given for n, own, given in zip(input.shape, gradient.stride(), strides, strict=True)):
        return gradient.as_strided(input.shape, strides)  # NumPy and torch differ where an axis has one element
    return torch.empty_like(input).copy_(gradient)


@_loss_gradient.register_fake
def _(upstream, input, *args):
    return torch.empty_like(input)


def _by_class(call: Call) -> bool:
    return "class_axis" in getattr(autograd, call.kind).__dataclass_fields__


def _rows_shape(input: Tensor, call: Call) -> tuple:
    if not _by_class(call):
        return tuple(input.shape)
    return (*input.shape[:1], *input.shape[2:]) if input.ndim > 1 else ()


# ------------------------------------------------------------------------------------------ formulas


def _formula(call: Call, *tensors) -> Tensor:
    kind, data, weights, options = _parts(tensors, call)
    return autograd.by_formula(kind, data, weights, options).to(call.dtype)


def _gradient_formula(call: Call, upstream: Tensor, input: Tensor, *others) -> Tensor:
    pull = torch.func.vjp(lambda x: _formula(call, x, *others), input)[1]
    return pull(upstream.to(call.dtype))[0]


def _pull(function: Callable[..., Tensor], tensors: tuple, wanted: Sequence[bool], upstream: Tensor) -> list:
    """Gradients of the function's value by those tensors that are wanted."""
    if not any(wanted):
        return [None] * len(wanted)

    def of_wanted(*by):
        given = iter(by)
        return function(*(next(given) if want else t for t, want in zip(tensors, wanted, strict=True)))

    pull = torch.func.vjp(of_wanted, *(t for t, want in zip(tensors, wanted, strict=True) if want))[1]
    found = iter(pull(upstream))
    return [next(found) if want else None for want in wanted]


# ------------------------------------------------------------------------------------------ nodes of the autograd graph


def _apply(function, *args) -> Tensor:
    """The function: by torch.func as a node, elsewhere the operation, which has the same backward."""
    return function.apply(*args) if torch._C._are_functorch_transforms_active() else function.forward(*args)


class _Loss(torch.autograd.Function):
    """No `jvp`: forward mode goes by the formula."""

    @staticmethod
    def forward(*args):
        return torch.ops.ce_fast.loss(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, ctx.call = _split(inputs)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor):  # type: ignore[override]
        call, tensors, (by_input, *by_others) = ctx.call, ctx.saved_tensors, ctx.needs_input_grad[:_N_TENSORS]
        gradient = _apply(_Gradient, upstream, *tensors, *call) if by_input else None
        # as where a transform further out differentiates by targets or weights
        _, *rest = _pull(functools.partial(_formula, call), tensors, (False, *by_others), upstream)
        return gradient, *rest, *(None for _ in call)

    @staticmethod
    def vmap(info, in_dims, *args):
        tensors, call = _split(args)
        batch = _as_rows(info.batch_size, in_dims[:_N_TENSORS], tensors, call)
        if batch is None:
            return torch.vmap(functools.partial(_formula, call), in_dims[:_N_TENSORS])(*tensors), 0
        place, moved, of_rows, divisors = batch
        losses = _Loss.apply(*moved, *of_rows)
        if call.reduction == "none":
            return losses, place
        sums = losses.movedim(place, -1).flatten(0, -2).sum(0) if losses.ndim > 1 else losses
        if divisors is not None:
            sums = torch.where(divisors == 0, torch.nan, sums / torch.where(divisors == 0, 1, divisors))
        return sums.to(call.dtype), 0


class _Gradient(torch.autograd.Function):
    """The gradient of a loss by its input, differentiated by the formula."""

    @staticmethod
    def forward(*args):
        return torch.ops.ce_fast.loss_gradient(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        upstream, *rest = inputs
        tensors, ctx.call = _split(rest)
        ctx.save_for_backward(upstream, *tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor):  # type: ignore[override]
        formula, wanted = functools.partial(_gradient_formula, ctx.call), ctx.needs_input_grad[: 1 + _N_TENSORS]
        return *_pull(formula, ctx.saved_tensors, wanted, upstream), *(None for _ in ctx.call)

    @staticmethod
    def vmap(info, in_dims, upstream, *args):
        (tensors, call), (of_upstream, *dims) = _split(args), in_dims[: 1 + _N_TENSORS]
        batch = _as_rows(info.batch_size, dims, tensors, call)
        if batch is None:
            return torch.vmap(functools.partial(_gradient_formula, call), (of_upstream, *dims))(upstream, *tensors), 0
        place, moved, of_rows, divisors = batch
        upstream = _moved(upstream, of_upstream, place, info.batch_size)
        if call.reduction != "none":
            upstream = upstream.to(of_rows.dtype)
            if divisors is not None:
                upstream = torch.where(divisors == 0, 0, upstream / torch.where(divisors == 0, 1, divisors))
            shape = _rows_shape(moved[0], of_rows)
            upstream = upstream.reshape(-1, *(1,) * (len(shape) - 1) if place == 0 else ()).expand(shape)
        return _Gradient.apply(upstream, *moved, *of_rows), place


_loss.register_autograd(_Loss.backward, setup_context=_Loss.setup_context)
_loss_gradient.register_autograd(_Gradient.backward, setup_context=_Gradient.setup_context)


# ------------------------------------------------------------------------------------------ batches


def _moved(tensor: Tensor | None, dim: int | None, place: int, size: int) -> Any:
    """With the batch axis at the place."""
    if tensor is None:
        return None
    if dim is not None:
        return tensor.movedim(dim, place)
    return tensor.unsqueeze(place).expand(*(size,) * (place == 0), *tensor.shape, *(size,) * (place != 0))


def _as_rows(size: int, dims: Sequence, tensors: tuple, call: Call):
    """(where the batch axis is, tensors, the call of the rows of all, divisors of the means); None if none fits."""
    kind, data, weights, _ = _parts(tensors, call)
    by_class, place, n_axes = _by_class(call), 0, data[0].ndim - (dims[0] is not None)
    if any(dim is not None for dim in dims[len(data) :]) or (by_class and n_axes == 0):
        return None
    if by_class:  # (C) becomes (batch, C), and (N, C) becomes (N, C, batch)
        place = 0 if n_axes == 1 else -1
    elif any(weight.ndim > n_axes for weight in weights.values()):
        return None
    divisors = None
    if call.reduction == "mean":
        if kind is autograd.Distillation:  # which has one divisor for each term
            return None
        divisor = functools.partial(_divisor, call)
        batched = any(dim is not None for dim in dims)
        divisors = torch.vmap(divisor, tuple(dims))(*tensors) if batched else divisor(*tensors)
    moved = [_moved(tensor, dim, place, size) for tensor, dim in zip(data, dims, strict=False)]
    if not by_class and moved[2] is not None:
        moved[2] = _over_elements(moved[2], moved[0])
    dtype = call.dtype if call.reduction == "none" else torch.promote_types(call.dtype, torch.float32)
    return place, (*moved, *tensors[len(data) :]), call._replace(reduction="none", dtype=dtype), divisors


def _over_elements(sample_weight: Tensor, input: Tensor) -> Tensor:
    """One a row becomes one an element."""
    return sample_weight.reshape(sample_weight.shape + (1,) * (input.ndim - sample_weight.ndim)).expand(input.shape)


def _divisor(call: Call, *tensors) -> Tensor:
    """What the mean divides by."""
    _, (input, target, *rest), weights, options = _parts(tensors, call)
    denominator, dtype = options.get("denominator", "weight"), torch.promote_types(input.dtype, torch.float32)
    s = input.new_ones(_rows_shape(input, call), dtype=dtype)
    if rest and rest[0] is not None:
        s = s * (rest[0] if _by_class(call) else _over_elements(rest[0], input))
    if not isinstance(denominator, str):
        return torch.full_like(s.sum(), denominator)
    if denominator == "total":
        return torch.ones_like(s).sum()
    counts = s != 0
    if _by_class(call) and not target.is_floating_point():
        counts = counts & (target != options["ignore_index"])
        if weights.get("weight") is not None:
            s = s * weights["weight"].to(dtype)[torch.where(counts, target, 0).long()]
    return torch.where(counts, s if denominator == "weight" else 1.0, 0).sum()


# ------------------------------------------------------------------------------------------ calls


def record() -> bool:
    """Whether what records or transforms the call just now takes these operations."""
    if torch.jit.is_tracing() or forward_ad._current_level >= 0:
        return False
    if not torch._C._are_functorch_transforms_active():
        return True
    # by Dynamo a node cannot be transformed
    return not torch.compiler.is_dynamo_compiling() and _TRANSFORMS.issuperset(
        interpreter.key() for interpreter in torch._C._functorch.get_interpreter_stack() or ()
    )


def run(kind, dtype: torch.dtype, data: tuple, weights: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    """The loss as an operation."""
    numbers: dict[str, Any] = {k: v for k, v in options.items() if isinstance(v, _NUMBERS) and not isinstance(v, bool)}
    literal = ", ".join(f"{k!r}: {v!r}" for k, v in options.items() if k not in numbers and k != "reduction")
    names, tensors = [*[""] * (len(data) - 1), *weights, *numbers], (*data, *weights.values())
    call = Call(kind.__name__, options["reduction"], f"{{{literal}}}", names, list(numbers.values()), dtype)
    return _apply(_Loss, *tensors, *(None,) * (_N_TENSORS - len(tensors)), *call)
