"""`kl_div` of the PyTorch adapter, element by element: in pieces that stay in the cache, so that nothing of the input's
size is made but the result and the gradient.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ce_fast import threads
from ce_fast.adapters import torch_autograd as autograd

# elements, which torch does not share out among threads: one team of threads for each piece had to wait for one another
# some thousand times, which took 10 times as long as all else where other processes ran
PIECE = 2**15


def run(input: Tensor, target: Tensor, reduction: str, log_target: bool) -> Tensor:
    """t (log t - x) of each element, reduced; of tensors of one shape that the kernels see."""
    divisor = {"mean": input.numel(), "batchmean": len(input)}.get(reduction, 1) if input.ndim else 1
    return _Node.apply(input, target, reduction == "none", log_target, divisor)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape in pieces, all cut alike: along the outermost axis of the first, and then within."""
    first = tensors[0]
    if first.numel() <= PIECE:
        yield tensors
        return
    axis = max((k for k in range(first.ndim) if first.shape[k] > 1), key=first.stride)
    size = first.shape[axis]
    step = max(1, PIECE * size // first.numel())
    for start in range(0, size, step):
        yield from _pieces(*(tensor.narrow(axis, start, min(step, size - start)) for tensor in tensors))


def _each(do: Callable, *tensors: Tensor) -> list:
    """What it gives for each piece, in any order; done by as many threads as torch has."""
    n_threads = 1 if tensors[0].numel() < threads.SERIAL_LOGITS else torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()

    def share(first: int) -> list:
        # each thread has modes of its own; inference_mode(False) turns gradients on, and so comes first
        with torch.inference_mode(inference), torch.no_grad():
            return [do(*piece) for piece in itertools.islice(_pieces(*tensors), first, None, n_threads)]

    if n_threads == 1:
        return share(0)
    with ThreadPoolExecutor(n_threads) as pool:
        return list(itertools.chain.from_iterable(pool.map(share, range(n_threads))))


class _Node(torch.autograd.Function):
    """dl/dx = -t, whatever x is: the input is not kept."""

    @staticmethod
    def forward(ctx, input, target, elementwise, log_target, divisor):
        ctx.save_for_backward(target)
        ctx.log_target, ctx.divisor = log_target, divisor
        ctx.compute = torch.promote_types(torch.promote_types(input.dtype, target.dtype), torch.float32)
        ctx.like = torch.empty_like(input, device="meta")
        ctx.narrow = not input.dtype == target.dtype == ctx.compute
        dtype = torch.promote_types(autograd.wide(input.dtype), autograd.wide(target.dtype))
        if not elementwise:
            sums = _each(lambda x, t: _losses(x, t, ctx).sum(dtype=torch.float64).item(), input, target)
            return torch.tensor(_sum(sums) / divisor, dtype=torch.float64, device="cpu").to(dtype)
        if not (log_target or ctx.narrow):
            return _losses(input, target, ctx)  # makes nothing but them
        losses = torch.empty_like(input, dtype=dtype)
        _each(lambda x, t, out: out.copy_(_losses(x, t, ctx)), input, target, losses)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor):  # type: ignore[override]
        (target,) = ctx.saved_tensors
        if ctx.divisor != 1:  # of a mean, whose upstream gradient is one number
            upstream = upstream.to(ctx.compute) / ctx.divisor
        if autograd._is_differentiated(upstream):
            return -(_probabilities(target, ctx) * upstream).to(ctx.like.dtype), None, None, None, None
        gradient = torch.empty_like(ctx.like, device="cpu")
        if ctx.narrow:

            def write(t, u, out):
                out.copy_(_probabilities(t, ctx) * -u.to(ctx.compute))

            _each(write, target, upstream.expand(target.shape), gradient)
        elif ctx.log_target:
            torch.exp(target, out=gradient).mul_(upstream).neg_()
        elif upstream.ndim == 0:
            torch.mul(target, -upstream, out=gradient)
        else:
            torch.mul(target, upstream, out=gradient).neg_()
        return gradient, None, None, None, None


def _sum(values: list[float]) -> float:
    """In whatever order they came; NaN and infinities as ever."""
    total = sum(values)
    return math.fsum(values) if math.isfinite(total) else total


def _probabilities(target: Tensor, ctx: Any) -> Tensor:
    t = target.to(ctx.compute)
    return t.exp() if ctx.log_target else t


def _losses(input: Tensor, target: Tensor, ctx: Any) -> Tensor:
    x, t = input.to(ctx.compute), target.to(ctx.compute)
    return (t - x).mul_(t.exp()) if ctx.log_target else torch.xlogy(t, t).addcmul_(t, x, value=-1)
