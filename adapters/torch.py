"""PyTorch: `cross_entropy` and `CrossEntropyLoss` as torch has them, on CPU tensors, loss and gradient in one pass.

What the kernels do not do (other devices, `torch.compile`, `torch.func`, tensor subclasses, targets or weights that
need a gradient) goes to `torch.nn.functional.cross_entropy`. `torch.get_num_threads()` is obeyed and never set.
"""

import functools
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

import ce_fast
from ce_fast import reduction as reductions
from ce_fast import threads

__all__ = ["CrossEntropyLoss", "cross_entropy"]

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_PLAIN = (Tensor, torch.nn.Parameter)


class _Loss(ce_fast.CrossEntropyLoss):
    """Torch allows negative class weights."""

    _negative_weight: ClassVar[bool] = True


def _make_loss(weight, ignore_index, reduction, label_smoothing, z_loss, smoothing, denominator, axis, n_threads):
    reduction = ("none", "mean", "sum")[_Reduction.get_enum(reduction)]  # which knows an old name of the mean
    return _Loss(
        None if weight is None else _array(weight),
        ignore_index,
        reduction,
        label_smoothing,
        smoothing=smoothing,
        z_loss=z_loss,
        denominator=denominator,
        class_axis=axis,
        n_threads=n_threads,
    )


_make_loss_once = functools.lru_cache(maxsize=128, typed=True)(_make_loss)  # a training loop's options stay the same


def _array(tensor: Tensor) -> np.ndarray:
    """The tensor's own memory as an array, whatever its strides."""
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().resolve_neg().view(torch.int16).numpy().view(_BFLOAT16)
    return tensor.numpy(force=True)  # force: of a tensor that needs a gradient too


def _gradient_tensor(array: np.ndarray) -> Tensor:
    """The array's own memory. NumPy allocates in huge pages: 25 ms less for [1024, 50257] than `torch.empty_like`."""
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _arrays(input: Tensor, target: Tensor, sample_weight: Tensor | None) -> tuple:
    return _array(input), _array(target), None if sample_weight is None else _array(sample_weight)


def _class_axis(input: Tensor) -> int:
    return 1 if input.ndim > 1 else 0


def _tensor(value: float | np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.asarray(value)).to(dtype)


class _CrossEntropy(torch.autograd.Function):
    """The loss as a node of the autograd graph.

    A mean or sum has one upstream gradient u, and d(u l)/dx = u dl/dx: dl/dx is computed along with l in one pass,
    and given away at the first backward. A later backward, and reduction "none", compute it from the logits.
    """

    @staticmethod
    def forward(ctx, input, target, sample_weight, loss, dtype):
        ctx.save_for_backward(input, target, sample_weight)
        ctx.loss, ctx.gradient = loss, None
        given = _arrays(input, target, sample_weight)
        if loss.reduction == "none":
            return _tensor(loss(*given), dtype)
        value, gradient = loss.value_and_grad(*given)
        ctx.gradient = _gradient_tensor(gradient)
        return _tensor(value, dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor):  # type: ignore[override]
        batched = torch._C._functorch.is_legacy_batchedtensor(upstream)  # by autograd.grad(is_grads_batched=True)
        if torch.is_grad_enabled() or batched or _recorder():
            input, target, sample_weight = ctx.saved_tensors
            return _gradient(ctx.loss, input, target, sample_weight, upstream), None, None, None, None
        gradient, ctx.gradient = ctx.gradient, None  # no reference stays: autograd may add to it in place
        factor = _array(upstream) if ctx.loss.reduction == "none" else upstream.item()
        # 16-bit gradients are scaled before they are rounded, or a loss scale would come too late for small ones
        if gradient is None or (factor != 1 and gradient.itemsize == 2):
            input, target, sample_weight = ctx.saved_tensors
            given, out = _arrays(input, target, sample_weight), None if gradient is None else _array(gradient)
            gradient = _gradient_tensor(ctx.loss.value_and_grad(*given, out=out, upstream=factor)[1])
        elif factor != 1:
            gradient.mul_(factor)
        return gradient, None, None, None, None


def _gradient(loss: _Loss, input: Tensor, target: Tensor, sample_weight: Tensor | None, upstream: Tensor) -> Tensor:
    """The gradient in torch's operations, for what differentiates or batches it.

    g_k = u s / divisor * [(sum_j mass_j + 2 z_loss w_t lse) p_k - mass_k],   mass_k = w_k (on q_k + off)
    """
    axis = _class_axis(input)
    x = input.movedim(axis, -1)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    n_classes, soft = x.shape[-1], target.is_floating_point()
    w = x.new_ones(n_classes) if loss.weight is None else x.new_tensor(loss.weight)
    s = x.new_ones(x.shape[:-1]) if sample_weight is None else sample_weight.to(x)
    counts = s != 0 if soft else (s != 0) & (target != loss.ignore_index)
    t = counts.long() * 0 if soft else torch.where(counts, target, 0).long()
    q = target.movedim(axis, -1).to(x) if soft else F.one_hot(t, n_classes).to(x)
    w_t = torch.ones_like(s) if soft else w[t]
    on, off = loss.masses(n_classes, soft)
    mass = w * (on * q + off)
    weight_sum = float((s * w_t * counts).sum(dtype=torch.float64))
    divisor = reductions.divisor(loss.reduction, loss.denominator, s.numel(), int(counts.sum()), weight_sum)
    slope = torch.where(counts, upstream.to(x.dtype) * s * reductions.gradient_scale(divisor), 0)
    x = torch.where(counts.unsqueeze(-1), x, 0)  # NaN in a row that does not count stays there
    total = mass.sum(-1, keepdim=True)
    if loss.z_loss:
        total = total + 2 * loss.z_loss * w_t.unsqueeze(-1) * x.logsumexp(-1, keepdim=True)
    gradient = slope.unsqueeze(-1) * (total * x.softmax(-1) - mass)
    return gradient.movedim(-1, axis).to(input.dtype)


def _recorder() -> str | None:
    """What records or transforms torch's operations just now, and would not see ours."""
    if torch.compiler.is_compiling():
        return "torch.compile"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if torch._C._len_torch_dispatch_stack():
        return "a torch dispatch mode"
    return "torch.jit.trace" if torch.jit.is_tracing() else None


def _stranger(input, target, weight, sample_weight) -> str | None:
    """Which argument the kernels cannot take, or None."""
    for name, tensor in ("input", input), ("target", target), ("weight", weight), ("sample_weight", sample_weight):
        if tensor is None and name in ("weight", "sample_weight"):
            continue
        if type(tensor) not in _PLAIN:
            return f"{name} is a {type(tensor).__name__}"
        if not tensor.is_cpu or tensor.layout != torch.strided:
            return f"{name} is a {tensor.layout} tensor on {tensor.device}"
        if tensor.requires_grad and name != "input" and torch.is_grad_enabled():
            return f"{name} requires a gradient"
    if input.dtype not in _FLOATS:
        return f"input has dtype {input.dtype}"
    indices = not target.is_floating_point()
    if indices and weight is not None and _wide(weight.dtype) != _wide(input.dtype):
        return f"weight has dtype {weight.dtype} and input {input.dtype}"  # an error in torch
    if indices and input.ndim == 1 == target.ndim:
        return f"input of shape {tuple(input.shape)} has a target of shape {tuple(target.shape)}"
    return None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Autocast runs this loss in float32."""
    narrow = dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled("cpu")
    return torch.float32 if narrow else dtype


def _result_dtype(input: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype:
    """As torch: of input with class indices; with class probabilities promoted by target and weight."""
    if not target.is_floating_point():
        return _wide(input.dtype)
    return functools.reduce(torch.promote_types, [_wide(t.dtype) for t in (input, target, weight) if t is not None])


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    smoothing: str = "uniform",
    denominator: str | float = "weight",
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of logits against class indices or class probabilities, in nats: a drop-in for torch's own.

    Parameters
    ----------
    input : Tensor of shape (C), (N, C) or (N, C, d1, ..., dK)
        Logits, float64, float32, float16 or bfloat16, of any strides; 16-bit logits are not converted as a whole.
    target : Tensor of shape (), (N) or (N, d1, ..., dK), or of input's shape
        Class indices of any integer dtype; or class probabilities of a floating one.
    weight, size_average, ignore_index, reduce, reduction, label_smoothing
        As in `torch.nn.functional.cross_entropy`.
    z_loss, smoothing, denominator
        As in `ce_fast.CrossEntropyLoss`.
    sample_weight : Tensor, optional
        Of the shape of the class indices, finite and not negative; a boolean tensor is a mask.

    Returns
    -------
    Tensor
        Of the dtype that torch's function gives; of the shape of the class indices for reduction="none".

    Raises
    ------
    IndexError
        If a target is neither a class nor `ignore_index`.
    ValueError, TypeError, RuntimeError
        If a shape, dtype, value or option does not fit.
    NotImplementedError
        If the call must go to torch's function, which lacks the options that are in use.

    Notes
    -----
    Rows that do not count have loss 0 and gradient 0 whatever their logits hold. If `input` needs a gradient, a mean or
    sum computes it along with the loss. Gradients of gradients, of any order, are exact. The kernels read tensors by
    `Tensor.numpy`, after which torch does not resize their storage.

    Examples
    --------
    >>> import torch
    >>> from ce_fast.adapters.torch import cross_entropy
    >>> input = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], requires_grad=True)
    >>> loss = cross_entropy(input, torch.tensor([0, 1]))
    >>> loss.backward()
    >>> round(loss.item(), 6)
    0.360645
    >>> input.grad
    tensor([[-0.0781,  0.0571,  0.0210],
            [ 0.1060, -0.2119,  0.1060]])
    """
    if reason := _recorder() or _stranger(input, target, weight, sample_weight):
        if z_loss or smoothing != "uniform" or denominator != "weight" or sample_weight is not None:
            raise NotImplementedError(
                "z_loss, smoothing, denominator and sample_weight work on plain CPU tensors in eager mode, of one "
                f"floating dtype, of which only input needs a gradient; here: {reason}"
            )
        return F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    if has_torch_function_variadic(input, target, weight):  # of plain tensors: a mode, as torch.set_default_device
        return handle_torch_function(
            cross_entropy,
            (),
            input,
            target,
            weight,
            size_average,
            ignore_index,
            reduce,
            reduction,
            label_smoothing,
            z_loss=z_loss,
            smoothing=smoothing,
            denominator=denominator,
            sample_weight=sample_weight,
        )
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    if ignore_index >= 0 and target.is_floating_point():
        raise ValueError(f"ignore_index is {ignore_index}; class probabilities have none to ignore")
    make = _make_loss_once if weight is None else _make_loss
    n_threads = 1 if input.numel() < threads.SERIAL_LOGITS else torch.get_num_threads()
    axis = _class_axis(input)
    loss = make(weight, ignore_index, reduction, label_smoothing, z_loss, smoothing, denominator, axis, n_threads)
    dtype = _result_dtype(input, target, weight)
    if input.requires_grad and torch.is_grad_enabled():
        return _CrossEntropy.apply(input, target, sample_weight, loss, dtype)
    return _tensor(loss(*_arrays(input, target, sample_weight)), dtype)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`cross_entropy` as a module: torch's own module, with the options of `ce_fast`.

    Parameters
    ----------
    weight, size_average, ignore_index, reduce, reduction, label_smoothing
        As in `torch.nn.CrossEntropyLoss`; `weight` is a buffer.
    z_loss, smoothing, denominator
        As in `ce_fast.CrossEntropyLoss`.

    Raises
    ------
    ValueError, TypeError
        If an option is out of its range or of the wrong type.

    Examples
    --------
    >>> import torch
    >>> from ce_fast.adapters.torch import CrossEntropyLoss
    >>> loss = CrossEntropyLoss(label_smoothing=0.1, z_loss=1e-4)
    >>> loss
    CrossEntropyLoss(z_loss=0.0001)
    >>> loss(torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0]))
    tensor(0.3370)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        smoothing: str = "uniform",
        denominator: str | float = "weight",
    ):
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.smoothing, self.denominator = z_loss, smoothing, denominator
        _make_loss_once(None, ignore_index, self.reduction, label_smoothing, z_loss, smoothing, denominator, 1, 1)

    def extra_repr(self) -> str:
        defaults = {"z_loss": 0.0, "smoothing": "uniform", "denominator": "weight"}
        return ", ".join(f"{k}={getattr(self, k)!r}" for k, v in defaults.items() if getattr(self, k) != v)

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss; arguments and result as in `cross_entropy`."""
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            smoothing=self.smoothing,
            denominator=self.denominator,
            sample_weight=sample_weight,
        )
