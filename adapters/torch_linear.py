"""The cross-entropy of a linear layer's logits as a node of the autograd graph: products by torch, block by block."""

import functools
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ce_fast import linear, threads
from ce_fast.adapters import torch_autograd as autograd


class LinearCrossEntropy(linear.LinearCrossEntropyLoss):
    _kind: ClassVar[type] = autograd.CrossEntropy


class _Products(linear.Products):
    """By torch, whose addition into a matrix needs no other one."""

    def put(self, out: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
        torch.mm(torch.from_numpy(a), torch.from_numpy(b), out=torch.from_numpy(out))

    def add(self, out: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
        torch.from_numpy(out).addmm_(torch.from_numpy(a), torch.from_numpy(b))


PLAIN = {"smoothing": "uniform", "temperature": 1.0, "softcap": None, "z_loss": 0.0, "denominator": "weight"}


def logits_shape(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> tuple[int, ...]:
    """The shape of the logits; RuntimeError, as torch's, if there is none."""
    outer = tuple(linear_weight.shape[:-1])
    if not (
        0 < input.ndim < 3
        and outer
        and linear_weight.shape[-1] == input.shape[-1]
        and (input.ndim == 2 or len(outer) == 1)
        and (linear_bias is None or tuple(linear_bias.shape) == outer)
    ):
        bias = "" if linear_bias is None else f" and linear_bias of shape {tuple(linear_bias.shape)}"
        raise RuntimeError(
            f"input of shape {tuple(input.shape)}, linear_weight of shape {tuple(linear_weight.shape)}{bias} do not "
            f"fit; expected (N, D) or (D), (C, D), and (C); or (N, D), (C, d1, ..., dK, D), and (C, d1, ..., dK)"
        )
    return (*input.shape[:-1], *outer)


def is_seen(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target, weight, sample_weight) -> bool:
    """Whether the kernels can do the call."""
    layer = [tensor for tensor in (input, linear_weight, linear_bias) if tensor is not None]
    return (
        not any(autograd.is_unseen(tensor, target, weight, sample_weight) for tensor in layer)
        and linear_weight.ndim == 2
        and len({autograd.wide(tensor.dtype) for tensor in layer}) == 1
        and (target.is_floating_point() or not autograd.only_torch_reads(input, target, weight))
    )


def run(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target, *, weight, sample_weight, **options
) -> Tensor:
    """The loss, of tensors that the kernels see."""
    dtype = autograd.wide(input.dtype)
    if target.is_floating_point():
        dtype = functools.reduce(
            torch.promote_types, [autograd.wide(t.dtype) for t in (target, weight) if t is not None], dtype
        )
    options["reduction"] = autograd.reduction_name(options["reduction"], None, None)
    n_threads = 1 if target.numel() * len(linear_weight) < threads.SERIAL_LOGITS else torch.get_num_threads()
    loss = LinearCrossEntropy(None if weight is None else autograd._array(weight), n_threads=n_threads, **options)
    tensors = input, linear_weight, linear_bias, target, sample_weight, weight
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors[:3]):
        return _Node.apply(loss, functools.partial(_formula, **options), dtype, *tensors)
    return autograd._tensor(_run(loss, tensors)[0], dtype)


def _run(loss: LinearCrossEntropy, tensors, **how):
    hidden, classifier, bias, target, sample_weight = autograd._arrays(tensors[:5])
    with torch.autocast("cpu", enabled=False):  # products are of float32, as the loss is
        given = hidden, classifier, target, bias, sample_weight
        return linear.run(loss, *given, rounded=False, products=_Products(), **how)


def _formula(input, linear_weight, linear_bias, target, sample_weight, weight, **options) -> Tensor:
    logits = F.linear(input, linear_weight, linear_bias)
    return autograd.CrossEntropy.formula(logits, target, sample_weight, weight=weight, **options)


class _Node(torch.autograd.Function):
    """As the node of the other losses: gradients that a mean or sum needs come along with it, and are given away."""

    @staticmethod
    def forward(ctx, loss, formula, dtype, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.loss, ctx.formula, ctx.gradients = loss, formula, None
        if loss.reduction == "none":
            return autograd._tensor(_run(loss, tensors)[0], dtype)
        value, ctx.gradients = _run(loss, tensors, wanted=ctx.needs_input_grad[3:6])
        return autograd._tensor(value, dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor):  # type: ignore[override]
        ways = _formula_gradients if autograd._is_differentiated(upstream) else _kernel_gradients
        return None, None, None, *ways(ctx, upstream), None, None, None


def _formula_gradients(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    create_graph, tensors, wanted = torch.is_grad_enabled(), ctx.saved_tensors, ctx.needs_input_grad[3:6]
    with torch.enable_grad():
        seen = autograd._compute(tensors)
        seen[:3] = [t.view_as(t) if want else t for t, want in zip(seen[:3], wanted, strict=True)]
        value = ctx.formula(*seen)
        by = [t for t, want in zip(seen[:3], wanted, strict=True) if want]
        found = iter(torch.autograd.grad(value, by, upstream.to(value.dtype), create_graph=create_graph))
    return [next(found).to(t.dtype) if want else None for t, want in zip(tensors[:3], wanted, strict=True)]


def _kernel_gradients(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    gradients, ctx.gradients = ctx.gradients, None  # no reference stays: autograd may add to them in place
    factor = autograd._array(upstream) if ctx.loss.reduction == "none" else upstream.item()
    tensors = ctx.saved_tensors
    if gradients is None:
        gradients, factor = _run(ctx.loss, tensors, upstream=factor, wanted=ctx.needs_input_grad[3:6])[1], 1.0
    found: list[Tensor | None] = []
    for gradient, tensor in zip(gradients, tensors[:3], strict=True):
        given = None if gradient is None else autograd._gradient_tensor(gradient)
        # scaled before it is rounded, or a loss scale would come too late for small ones of 16 bits
        found.append(None if given is None else (given if factor == 1 else given.mul_(factor)).to(tensor.dtype))
    return found
