"""PyTorch: the losses as torch and torchvision have them, on CPU tensors, loss and gradient in one pass.

`torch.compile`, `torch.export`, `torch.func.grad` and `vmap` see an operation that runs the kernels. What these do not
do (other devices, forward mode, tensor subclasses, targets or weights that need a gradient) goes to torch's own
function, and where torch has none, or an option of ours is in use, to the loss's formula in torch's operations.
`torch.get_num_threads()` is obeyed and never set.

Losses over classes take (C), (N, C) or (N, C, d1, ..., dK), as `torch.nn.functional.cross_entropy` does. Results and
gradients have the dtypes that torch gives; 16-bit tensors are computed in float32 and rounded once.
"""

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ce_fast.adapters import torch_autograd as autograd
from ce_fast.adapters import torch_kl, torch_linear
from ce_fast.adapters.torch_parallel import vocab_parallel_cross_entropy
from ce_fast.adapters.torch_patch import own, patch

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "DistillationLoss",
    "FocalLoss",
    "GeneralizedCrossEntropyLoss",
    "KLDivLoss",
    "KLDivWithLogitsLoss",
    "LinearCrossEntropyLoss",
    "NLLLoss",
    "PolyLoss",
    "SigmoidFocalLoss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "distillation_loss",
    "focal_loss",
    "generalized_cross_entropy",
    "kl_div",
    "kl_div_with_logits",
    "linear_cross_entropy",
    "nll_loss",
    "patch",
    "poly_loss",
    "sigmoid_focal_loss",
    "vocab_parallel_cross_entropy",
]

# ------------------------------------------------------------------------------------------ losses over classes


@autograd.overridable
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
    smoothing: str = "uniform",
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    denominator: str | float = "weight",
    sample_weight: Tensor | None = None,
    inplace_backward: bool = False,
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
    smoothing, temperature, softcap, z_loss, denominator
        As in `ce_fast.CrossEntropyLoss`.
    sample_weight : Tensor, optional
        Of the shape of the class indices, finite and not negative; a boolean tensor is a mask.
    inplace_backward : bool, default=False
        Gradients take the memory of `input`, so that loss and backward need less than 2 MiB more. `input` must be the
        result of an operation, and from this call on is the loss's own: a mean or sum overwrites it at once, 16-bit
        logits and reduction="none" in backward. Other uses before are then errors in backward, as is a second backward;
        uses after the call read the gradient.
        Does nothing where no gradient is needed or `torch.compile` or `torch.func` see the call.

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

    Notes
    -----
    Rows that do not count have loss 0 and gradient 0 whatever their logits hold. If `input` needs a gradient, a mean or
    sum computes it along with the loss. Gradients of gradients, of any order, are exact. The kernels read tensors by
    `Tensor.numpy`, after which torch does not resize their storage. All this holds for every loss of this module.

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
    ours = (
        z_loss
        or smoothing != "uniform"
        or temperature != 1
        or softcap is not None
        or denominator != "weight"
        or sample_weight is not None
    )
    plain = weight is None and size_average is None and reduce is None and reduction == "mean" and not label_smoothing
    if plain and not ours and not inplace_backward:
        mean = autograd.mean_cross_entropy(input, target, ignore_index)
        if mean is not None:
            return mean
    unseen = autograd.is_unseen(input, target, weight, sample_weight, by_operation=True)
    if not ours and (unseen or (not target.is_floating_point() and autograd.only_torch_reads(input, target, weight))):
        return own.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    reduction = autograd.reduction_name(reduction, size_average, reduce)
    options = ignore_index, reduction, label_smoothing, smoothing, temperature, softcap, z_loss, denominator
    return autograd.class_loss(
        autograd.CrossEntropy,
        (input, target, sample_weight),
        {"weight": weight},
        *options,
        unseen=unseen,
        in_place=inplace_backward,
    )


@autograd.overridable
def focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    gamma: float = 2.0,
    alpha: float | Tensor | None = None,
    smoothing: str = "uniform",
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    denominator: str | float = "weight",
    sample_weight: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """Focal loss over classes: the cross-entropy of each class times (1 - p)^gamma and `alpha`, in nats.

    Parameters
    ----------
    gamma, alpha
        As in `ce_fast.FocalLoss`; `alpha` is a number or a Tensor of shape (C).
    input, target, sample_weight and all other options
        As in `cross_entropy`, and likewise the result and the errors.

    Examples
    --------
    >>> import torch
    >>> from ce_fast.adapters.torch import focal_loss
    >>> focal_loss(torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]]), torch.tensor([0, 1]))
    tensor(0.0516)
    """
    options = ignore_index, reduction, label_smoothing, smoothing, temperature, softcap, z_loss, denominator
    return autograd.class_loss(
        autograd.Focal,
        (input, target, sample_weight),
        {"weight": weight, "alpha": alpha},
        *options,
        gamma=gamma,
        in_place=inplace_backward,
    )


@autograd.overridable
def poly_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    epsilon: float = 1.0,
    smoothing: str = "uniform",
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    denominator: str | float = "weight",
    sample_weight: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """Poly-1 loss: the cross-entropy of each class plus epsilon (1 - p).

    Parameters
    ----------
    epsilon
        As in `ce_fast.PolyLoss`.
    input, target, sample_weight and all other options
        As in `cross_entropy`, and likewise the result and the errors.

    Examples
    --------
    >>> import torch
    >>> from ce_fast.adapters.torch import poly_loss
    >>> poly_loss(torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]]), torch.tensor([0, 1]))
    tensor(0.6507)
    """
    options = ignore_index, reduction, label_smoothing, smoothing, temperature, softcap, z_loss, denominator
    return autograd.class_loss(
        autograd.Poly,
        (input, target, sample_weight),
        {"weight": weight},
        *options,
        epsilon=epsilon,
        in_place=inplace_backward,
    )


@autograd.overridable
def generalized_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    q: float = 0.7,
    smoothing: str = "uniform",
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    denominator: str | float = "weight",
    sample_weight: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """Generalized cross-entropy, (1 - p^q) / q of each class: robust against wrong labels.

    Parameters
    ----------
    q
        As in `ce_fast.GeneralizedCrossEntropyLoss`.
    input, target, sample_weight and all other options
        As in `cross_entropy`, and likewise the result and the errors.

    Examples
    --------
    >>> import torch
    >>> from ce_fast.adapters.torch import generalized_cross_entropy
    >>> generalized_cross_entropy(torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]]), torch.tensor([0, 1]))
    tensor(0.3088)
    """
    options = ignore_index, reduction, label_smoothing, smoothing, temperature, softcap, z_loss, denominator
    return autograd.class_loss(
        autograd.GeneralizedCrossEntropy,
        (input, target, sample_weight),
        {"weight": weight},
        *options,
        q=q,
        in_place=inplace_backward,
    )


@autograd.overridable
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    smoothing: str = "uniform",
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    denominator: str | float = "weight",
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the logits of a linear layer, without ever holding all of them; a drop-in for torch 2.13's own.

    Parameters
    ----------
    input : Tensor of shape (D) or (N, D)
        Of a dtype of logits, as are `linear_weight` and `linear_bias`.
    linear_weight : Tensor of shape (C, D), or (C, d1, ..., dK, D)
        With the latter, as with all that the kernels do not see, the logits are made as a whole.
    target : Tensor of shape (), (N) or (N, d1, ..., dK), or of the logits' shape (C), (N, C) or (N, C, d1, ..., dK)
        Class indices of any integer dtype; or class probabilities of a floating one.
    linear_bias : Tensor of shape (C) or (C, d1, ..., dK), optional
    weight, reduction, label_smoothing
        As in `cross_entropy`.
    ignore_index : int, optional
        None is -100 for class indices; class probabilities have none to ignore.
    options : torch.nn.LinearCrossEntropyOptions, optional
        Used where a call goes to torch's own function; the kernels have no need of them.
    smoothing, temperature, softcap, z_loss, denominator, sample_weight
        As in `cross_entropy`.

    Returns
    -------
    Tensor
        As in `cross_entropy`.

    Raises
    ------
    RuntimeError
        If shapes of the layer do not fit, or class probabilities come with an `ignore_index`.
    IndexError, ValueError, TypeError
        As in `cross_entropy`.

    Notes
    -----
    A mean or sum computes those gradients that are needed along with the loss; reduction="none" computes them in the
    backward pass, from the logits made once more. 16-bit tensors are widened in pieces, and their gradients added up
    in float32 and rounded once. Gradients of gradients are exact, of logits as a whole.

    Examples
    --------
    >>> import torch
    >>> from ce_fast.adapters.torch import linear_cross_entropy
    >>> input = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> linear_weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], requires_grad=True)
    >>> loss = linear_cross_entropy(input, linear_weight, torch.tensor([0, 1]))
    >>> loss.backward()
    >>> round(loss.item(), 6)
    0.275269
    >>> linear_weight.grad
    tensor([[-0.1674,  0.1173],
            [ 0.1224, -0.1332],
            [ 0.0450,  0.0159]])
    """
    shape = torch_linear.logits_shape(input, linear_weight, linear_bias)
    if ignore_index is not None and target.shape == shape:
        raise RuntimeError(f"ignore_index is {ignore_index}; class probabilities have none to ignore")
    common: dict[str, Any] = {"weight": weight, "reduction": reduction, "label_smoothing": label_smoothing}
    ours: dict[str, Any] = {"smoothing": smoothing, "temperature": temperature, "softcap": softcap, "z_loss": z_loss}
    ours |= {"denominator": denominator, "sample_weight": sample_weight}
    index = -100 if ignore_index is None else ignore_index
    if torch_linear.is_seen(input, linear_weight, linear_bias, target, weight, sample_weight):
        return torch_linear.run(input, linear_weight, linear_bias, target, ignore_index=index, **common, **ours)
    if options is not None and sample_weight is None and ours.items() >= torch_linear.PLAIN.items():
        common |= {"linear_bias": linear_bias, "ignore_index": ignore_index, "options": options}
        return own.linear_cross_entropy(input, linear_weight, target, **common)
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = F.linear(input, linear_weight.flatten(0, -2), bias).reshape(shape)
    return cross_entropy(logits, target, ignore_index=index, **common, **ours)


@autograd.overridable
def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Negative log-likelihood of log-probabilities at class indices: a drop-in for torch's own.

    Parameters
    ----------
    input, target, weight, size_average, ignore_index, reduce, reduction
        As in `torch.nn.functional.nll_loss`; the indices may be of any integer dtype.

    Examples
    --------
    >>> import torch
    >>> from ce_fast.adapters.torch import nll_loss
    >>> nll_loss(torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log(), torch.tensor([0, 1]))
    tensor(0.4904)
    """
    unseen = autograd.is_unseen(input, target, weight, by_operation=True)
    if unseen or target.is_floating_point() or autograd.only_torch_reads(input, target, weight):
        return own.nll_loss(input, target, weight, size_average, ignore_index, reduce, reduction)
    name = autograd.reduction_name(reduction, size_average, reduce)
    return autograd.run(
        autograd.NLL, (input, target), {"weight": weight}, unseen=unseen, ignore_index=ignore_index, reduction=name
    )


# ------------------------------------------------------------------------------------------ losses over elements


@autograd.overridable
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy of logits against probabilities: a drop-in for torch's own.

    Parameters
    ----------
    input, target, weight, size_average, reduce, reduction, pos_weight
        As in `torch.nn.functional.binary_cross_entropy_with_logits`.
    label_smoothing
        As in `ce_fast.BCEWithLogitsLoss`.
    sample_weight : Tensor, optional
        Of input's shape or of its leading axes, finite and not negative; the mean is over its sum.

    Examples
    --------
    >>> import torch
    >>> from ce_fast.adapters.torch import binary_cross_entropy_with_logits
    >>> binary_cross_entropy_with_logits(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0]))
    tensor(0.2201)
    """
    unseen = autograd.is_unseen(input, target, weight, pos_weight, sample_weight, by_operation=True)
    ours = label_smoothing or sample_weight is not None
    if (unseen and not ours) or (isinstance(target, Tensor) and not target.is_floating_point()):
        return own.binary_cross_entropy_with_logits(input, target, weight, size_average, reduce, reduction, pos_weight)
    return autograd.run(
        autograd.BCEWithLogits,
        (input, target, sample_weight),
        {"weight": weight, "pos_weight": pos_weight},
        unseen=unseen,
        dtype_of=(target,),
        reduction=autograd.reduction_name(reduction, size_average, reduce),
        label_smoothing=label_smoothing,
    )


@autograd.overridable
def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Binary cross-entropy of probabilities, whose logarithms are at least -100: a drop-in for torch's own.

    Parameters
    ----------
    input, target, weight, size_average, reduce, reduction
        As in `torch.nn.functional.binary_cross_entropy`.

    Examples
    --------
    >>> import torch
    >>> from ce_fast.adapters.torch import binary_cross_entropy
    >>> binary_cross_entropy(torch.tensor([0.9, 0.25]), torch.tensor([1.0, 0.0]))
    tensor(0.1965)
    """
    unseen = autograd.is_unseen(input, target, weight)
    if unseen or autograd.wide(target.dtype) != autograd.wide(input.dtype):
        return own.binary_cross_entropy(input, target, weight, size_average, reduce, reduction)
    name = autograd.reduction_name(reduction, size_average, reduce)
    try:
        return autograd.run(
            autograd.BCE, (input, target), {"weight": weight}, unseen=unseen, dtype_of=(input,), reduction=name
        )
    except ValueError:  # as of probabilities outside [0, 1], for which torch has an error of its own
        return own.binary_cross_entropy(input, target, weight, None, None, name)


@autograd.overridable
def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2,
    reduction: str = "none",
    *,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Focal loss of each element, as in `torchvision.ops.sigmoid_focal_loss`.

    Parameters
    ----------
    inputs : Tensor
        Logits of any shape.
    targets : Tensor of inputs' shape
        1 for the positive class, 0 for the negative one.
    alpha : float in [0, 1], or -1
        The weight of positive elements, 1 - alpha being that of negative ones; -1 for none.
    gamma, reduction
        As in `ce_fast.SigmoidFocalLoss`.
    sample_weight
        As in `binary_cross_entropy_with_logits`.

    Examples
    --------
    >>> import torch
    >>> from ce_fast.adapters.torch import sigmoid_focal_loss
    >>> sigmoid_focal_loss(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0]))
    tensor([0.0005, 0.0170])
    """
    return autograd.run(
        autograd.SigmoidFocal, (inputs, targets, sample_weight), {}, alpha=alpha, gamma=gamma, reduction=reduction
    )


# ------------------------------------------------------------------------------------------ between distributions


@autograd.overridable
def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """Kullback-Leibler divergence of log-probabilities from the target, element by element: a drop-in for torch's own.

    Nothing of input's size is made but the result of reduction="none" and the gradient.

    Parameters
    ----------
    input, target, size_average, reduce, reduction, log_target
        As in `torch.nn.functional.kl_div`.

    Examples
    --------
    >>> import torch
    >>> from ce_fast.adapters.torch import kl_div
    >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> kl_div(p, q, reduction="batchmean", log_target=True)
    tensor(0.1308)
    """
    if (
        size_average is not None
        or reduce is not None
        or reduction not in ("mean", "batchmean", "sum", "none")
        or autograd.is_unseen(input, target)
        or target.dtype not in autograd._FLOATS
        or input.shape != target.shape
        or input.ndim == 0
        or input.numel() == 0
    ):
        return own.kl_div(input, target, size_average, reduce, reduction, log_target)
    if reduction == "mean":
        warnings.warn("reduction='mean' divides by the number of elements; 'batchmean' by that of rows", stacklevel=3)
    if reduction == "none" or not log_target:
        return torch_kl.run(input, target, reduction, log_target)
    return autograd.run(
        autograd.KLDiv,
        (input, target),
        {},
        unseen=False,
        reduction="sum" if reduction == "sum" else "mean",
        denominator=float(input.numel() if reduction == "mean" else len(input)),
        log_probs=True,
        class_axis=-1,
    )


@autograd.overridable
def kl_div_with_logits(
    input: Tensor,
    target: Tensor,
    *,
    direction: str = "forward",
    temperature: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    denominator: str | float = "weight",
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Kullback-Leibler divergence between the softmax of logits and that of the logits of a target, a value a row.

    Parameters
    ----------
    input : Tensor of shape (C), (N, C) or (N, C, d1, ..., dK)
        Logits.
    target : Tensor of input's shape
        Logits of the reference distribution.
    direction, temperature, softcap, reduction, denominator
        As in `ce_fast.KLDivLoss`; a mean is torch's "batchmean".
    sample_weight
        As in `cross_entropy`.

    Examples
    --------
    >>> import torch
    >>> from ce_fast.adapters.torch import kl_div_with_logits
    >>> kl_div_with_logits(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0986]]))
    tensor(0.1308)
    """
    return autograd.run(
        autograd.KLDivWithLogits,
        (input, target, sample_weight),
        {},
        direction=direction,
        temperature=temperature,
        softcap=softcap,
        reduction=reduction,
        denominator=denominator,
    )


@autograd.overridable
def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | tuple[Tensor, Tensor],
    target: Tensor | None = None,
    *,
    temperature: float = 2.0,
    alpha: float | None = None,
    direction: str = "forward",
    tail: str = "bucket",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    denominator: str | float = "weight",
    sample_weight: Tensor | None = None,
) -> Tensor:
    """alpha T^2 KL(teacher, student) at temperature T, plus (1 - alpha) times the cross-entropy of the target.

    Parameters
    ----------
    student_logits : Tensor of shape (C), (N, C) or (N, C, d1, ..., dK)
        The only argument that the kernels differentiate by; a teacher that needs a gradient goes by the formula.
    teacher_logits : Tensor of the same shape, or (indices, log_probs)
        A pair holds the k most probable classes of each row in place of all C, and their log-probabilities at the
        temperature.
    target : Tensor, optional
        As in `cross_entropy`.
    temperature, alpha, direction, tail, softcap, denominator
        As in `ce_fast.DistillationLoss`.
    weight, ignore_index, reduction, label_smoothing, sample_weight
        As in `cross_entropy`.

    Examples
    --------
    >>> import torch
    >>> from ce_fast.adapters.torch import distillation_loss
    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.1972]])
    >>> distillation_loss(student, teacher)
    tensor(0.5232)
    >>> distillation_loss(student, (torch.tensor([[1]]), torch.tensor([[0.75]]).log()))
    tensor(0.5232)
    """
    autograd.check_ignore_index(ignore_index, target)
    teacher, log_probs = teacher_logits if isinstance(teacher_logits, tuple) else (teacher_logits, None)
    return autograd.run(
        autograd.Distillation,
        (student_logits, teacher, log_probs, target, sample_weight),
        {"weight": weight},
        temperature=temperature,
        alpha=alpha,
        direction=direction,
        tail=tail,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        softcap=softcap,
        denominator=denominator,
    )


# ------------------------------------------------------------------------------------------ modules


class _Module(torch.nn.Module):
    """A function of this module with its options held; `weight` and all tensors are buffers, as in torch's losses.

    The options are the function's, in its order, and checked here if `kind` is the loss that takes them.
    """

    _function: ClassVar[Callable[..., Tensor]]
    _kind: ClassVar[type | None]
    _hidden: ClassVar[frozenset[str]]  # what torch's module has, and does not show either
    _defaults: ClassVar[dict[str, Any]]
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, function=None, kind=None, **rest):
        super().__init_subclass__(**rest)
        if function is not None:
            parameters = inspect.signature(function).parameters.values()
            options = [p for p in parameters if p.default is not p.empty and p.name not in ("target", "sample_weight")]
            cls._function, cls._kind, cls.__signature__ = staticmethod(function), kind, inspect.Signature(options)
            cls._defaults = {p.name: p.default for p in options}
            cls._hidden = frozenset(inspect.signature(cls.__mro__[2]).parameters)

    def __init__(self, *args, **options):
        super().__init__()
        given = self.__signature__.bind(*args, **options)
        given.apply_defaults()
        held = given.arguments
        size_average, reduce = held.pop("size_average", None), held.pop("reduce", None)
        if self._kind is not None or size_average is not None or reduce is not None:
            held["reduction"] = autograd.reduction_name(held["reduction"], size_average, reduce)
        for name, value in held.items():
            if isinstance(value, Tensor) or name in ("weight", "pos_weight"):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self._held = tuple(held)
        if self._kind is not None:
            others = {*self._buffers, "inplace_backward"}
            autograd.make_once(self._kind, **{name: value for name, value in held.items() if name not in others})

    def _options(self) -> dict[str, Any]:
        """Those that are not the function's defaults; by a module's own getattr they would take ten times as long."""
        held, defaults = self.__dict__, self._defaults
        buffers = self._buffers
        given = ((name, held[name] if name in held else buffers[name]) for name in self._held)
        return {name: value for name, value in given if value is not defaults[name]}

    def extra_repr(self) -> str:
        shown = [name for name in self._held if name not in self._hidden and name not in self._buffers]
        return ", ".join(f"{k}={v!r}" for k in shown if (v := getattr(self, k)) != self._defaults[k])

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss; arguments and result as in the function, of which some take no `sample_weight`."""
        given = {} if sample_weight is None else {"sample_weight": sample_weight}
        return self._function(input, target, **given, **self._options())


class CrossEntropyLoss(_Module, torch.nn.CrossEntropyLoss, function=cross_entropy, kind=autograd.CrossEntropy):
    """`cross_entropy` as a module: torch's own module, with the options of `ce_fast`.

    Parameters
    ----------
    options
        Those of `cross_entropy`, in the same order.

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


class LinearCrossEntropyLoss(getattr(torch.nn, "LinearCrossEntropyLoss", torch.nn.Module)):  # type: ignore[misc]
    """`linear_cross_entropy` with a linear layer of its own: torch 2.13's module, with the options of `ce_fast`.

    Parameters
    ----------
    in_features, num_classes : int
    out_features : tuple of int, default=()
        (d1, ..., dK) of a K-dimensional loss.
    bias, device, dtype
        Of the layer, `linear`.
    weight, reduction, ignore_index, label_smoothing, options, smoothing, temperature, softcap, z_loss, denominator
        As in `linear_cross_entropy`.

    Raises
    ------
    ValueError, TypeError
        If an option is out of its range or of the wrong type.

    Examples
    --------
    >>> import torch
    >>> from ce_fast.adapters.torch import LinearCrossEntropyLoss
    >>> loss = LinearCrossEntropyLoss(8, 1000, bias=True, softcap=30.0)
    >>> loss(torch.zeros(2, 8), torch.tensor([0, 1])).shape
    torch.Size([])
    >>> loss.linear
    Linear(in_features=8, out_features=1000, bias=True)
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device=None,
        dtype=None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        smoothing: str = "uniform",
        temperature: float = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        denominator: str | float = "weight",
    ):
        if weight is not None and weight.shape != (num_classes,):
            raise ValueError(f"weight has shape {tuple(weight.shape)}; expected {(num_classes,)}")
        torch.nn.Module.__init__(self)
        ours = {"smoothing": smoothing, "temperature": temperature, "softcap": softcap, "z_loss": z_loss}
        held = {"reduction": reduction, "label_smoothing": label_smoothing, **ours, "denominator": denominator}
        autograd.make_once(autograd.CrossEntropy, **held)
        held |= {"ignore_index": ignore_index, "options": options}
        for name, value in held.items():
            setattr(self, name, value)
        self._held = tuple(held)
        self.register_buffer("weight", weight)
        self.num_classes, self.out_features = num_classes, out_features
        width = math.prod(out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, width, bias=bias, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        torchs = ("reduction", "ignore_index", "label_smoothing", "options")
        changed = [f"{name}={v!r}" for name, plain in torch_linear.PLAIN.items() if (v := getattr(self, name)) != plain]
        layer = f"in_features={self.linear.in_features}, num_classes={self.num_classes}"
        layer += f", out_features={self.out_features}, bias={self.linear.bias is not None}"
        return ", ".join([layer, *(f"{name}={getattr(self, name)}" for name in torchs), *changed])

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss; arguments and result as in `linear_cross_entropy`."""
        shape = self.num_classes, *self.out_features
        layer, held = self.linear, {name: getattr(self, name) for name in self._held}
        return linear_cross_entropy(
            input,
            layer.weight.reshape(*shape, -1),
            target,
            linear_bias=None if layer.bias is None else layer.bias.reshape(shape),
            weight=self.weight,
            sample_weight=sample_weight,
            **held,
        )


class FocalLoss(_Module, function=focal_loss, kind=autograd.Focal):
    """`focal_loss` as a module, with its options.

    Examples
    --------
    >>> import torch
    >>> from ce_fast.adapters.torch import FocalLoss
    >>> loss = FocalLoss(gamma=1.5, alpha=torch.tensor([0.5, 1.0, 1.0]))
    >>> loss
    FocalLoss(gamma=1.5)
    >>> loss(torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0]))
    tensor(0.0052)
    """


class PolyLoss(_Module, function=poly_loss, kind=autograd.Poly):
    """`poly_loss` as a module, with its options.

    Examples
    --------
    >>> import torch
    >>> from ce_fast.adapters.torch import PolyLoss
    >>> PolyLoss(epsilon=2.0)(torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0]))
    tensor(0.4823)
    """


class GeneralizedCrossEntropyLoss(_Module, function=generalized_cross_entropy, kind=autograd.GeneralizedCrossEntropy):
    """`generalized_cross_entropy` as a module, with its options.

    Examples
    --------
    >>> import torch
    >>> from ce_fast.adapters.torch import GeneralizedCrossEntropyLoss
    >>> GeneralizedCrossEntropyLoss(q=0.5)(torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0]))
    tensor(0.1628)
    """


class NLLLoss(_Module, torch.nn.NLLLoss, function=nll_loss):
    """`nll_loss` as a module: torch's own, computed by the kernels.

    Examples
    --------
    >>> import torch
    >>> from ce_fast.adapters.torch import NLLLoss
    >>> NLLLoss()(torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log(), torch.tensor([0, 1]))
    tensor(0.4904)
    """


class BCEWithLogitsLoss(
    _Module, torch.nn.BCEWithLogitsLoss, function=binary_cross_entropy_with_logits, kind=autograd.BCEWithLogits
):
    """`binary_cross_entropy_with_logits` as a module: torch's own, with its options.

    Examples
    --------
    >>> import torch
    >>> from ce_fast.adapters.torch import BCEWithLogitsLoss
    >>> BCEWithLogitsLoss(label_smoothing=0.1)(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0]))
    tensor(0.2951)
    """


class BCELoss(_Module, torch.nn.BCELoss, function=binary_cross_entropy):
    """`binary_cross_entropy` as a module: torch's own, computed by the kernels.

    Examples
    --------
    >>> import torch
    >>> from ce_fast.adapters.torch import BCELoss
    >>> BCELoss()(torch.tensor([0.9, 0.25]), torch.tensor([1.0, 0.0]))
    tensor(0.1965)
    """


class SigmoidFocalLoss(_Module, function=sigmoid_focal_loss, kind=autograd.SigmoidFocal):
    """`sigmoid_focal_loss` as a module, with its options and their defaults.

    Examples
    --------
    >>> import torch
    >>> from ce_fast.adapters.torch import SigmoidFocalLoss
    >>> SigmoidFocalLoss(reduction="mean")(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0]))
    tensor(0.0087)
    """


class KLDivLoss(_Module, torch.nn.KLDivLoss, function=kl_div):
    """`kl_div` as a module: torch's own, computed by the kernels where they can.

    Examples
    --------
    >>> import torch
    >>> from ce_fast.adapters.torch import KLDivLoss
    >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> KLDivLoss(reduction="batchmean", log_target=True)(p, q)
    tensor(0.1308)
    """


class KLDivWithLogitsLoss(_Module, function=kl_div_with_logits, kind=autograd.KLDivWithLogits):
    """`kl_div_with_logits` as a module, with its options.

    Examples
    --------
    >>> import torch
    >>> from ce_fast.adapters.torch import KLDivWithLogitsLoss
    >>> KLDivWithLogitsLoss(direction="reverse")(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0986]]))
    tensor(0.1438)
    """


class DistillationLoss(_Module, function=distillation_loss, kind=autograd.Distillation):
    """`distillation_loss` as a module, with its options.

    Examples
    --------
    >>> import torch
    >>> from ce_fast.adapters.torch import DistillationLoss
    >>> loss = DistillationLoss(temperature=4.0, alpha=0.9)
    >>> loss
    DistillationLoss(temperature=4.0, alpha=0.9)
    >>> loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 4.3944]]), torch.tensor([1]))
    tensor(1.9530)
    """

    def forward(  # type: ignore[override]
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | tuple[Tensor, Tensor],
        target: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss; arguments and result as in `distillation_loss`."""
        return distillation_loss(student_logits, teacher_logits, target, sample_weight=sample_weight, **self._options())
