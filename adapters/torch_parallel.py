"""The cross-entropy of logits whose classes are split over processes: what a shard knows, and what is exchanged."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ce_fast import backends, engine, threads
from ce_fast.adapters import torch_autograd as autograd
from ce_fast.backends import Rows


@autograd.overridable
def vocab_parallel_cross_entropy(
    input_shard: Tensor,
    target: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Cross-entropy of logits against class indices, each process of a group holding some of the columns.

    Every process calls it, and gets the loss of the whole logits and the gradient by its own columns. With
    :math:`m_s, S_s` the logsumexp and the columns of shard s, :math:`m = \max_s m_s`, and T the shard of target t,

    .. math::

        -\log p_t = (m_T - z_t) + \log\Big(1 + \frac{\sum_{s \ne T} e^{m_s - m}}{e^{m_T - m}}\Big), \qquad
        \frac{\partial l}{\partial z_k} = e^{m_s - lse}\, \mathrm{softmax}_s(z)_k - q_k, \quad k \in S_s

    in nats, with :math:`q_k = (1 - \epsilon) [k = t] + \epsilon / K`.

    Parameters
    ----------
    input_shard : Tensor of shape (N, K_s)
        Columns of the logits, in the order of the ranks; float64, float32, float16 or bfloat16, on the CPU. Their
        number may differ from process to process, and be 0.
    target : Tensor of shape (N)
        Classes of the whole logits, the same in all processes, of any integer dtype.
    group : torch.distributed.ProcessGroup, optional
        Whose collectives take CPU tensors (gloo); by default that of all processes.
    ignore_index, reduction, label_smoothing
        As in `ce_fast.adapters.torch.cross_entropy`, the same in all processes.

    Returns
    -------
    Tensor
        As in `cross_entropy`, the same in all processes.

    Raises
    ------
    IndexError
        If a target is neither a class nor `ignore_index`, in all processes alike.
    ValueError, TypeError
        If a shape, dtype or option does not fit, or the numbers of rows differ. An error of one process alone leaves
        the others waiting, as with all collectives.
    NotImplementedError
        If the gradient is to be differentiated in turn (`create_graph=True`).

    Notes
    -----
    A call sends two integers a process, then the maximum of one and the sum of three float64 a row, four with
    `label_smoothing`; the backward pass sends nothing, and computes the gradient from the logits. Nothing else of the
    shard's size is made. Each process must go on with the same function of the loss, for its gradient is not summed.
    `torch.compile` and DTensors are refused.

    Examples
    --------
    One process that holds all of the columns:

    >>> import tempfile, torch
    >>> from ce_fast.adapters.torch import vocab_parallel_cross_entropy
    >>> place = tempfile.TemporaryDirectory()
    >>> store = torch.distributed.FileStore(place.name + "/store", 1)
    >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    >>> input = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], requires_grad=True)
    >>> loss = vocab_parallel_cross_entropy(input, torch.tensor([0, 1]))
    >>> loss.backward()
    >>> round(loss.item(), 6)
    0.360645
    >>> input.grad
    tensor([[-0.0781,  0.0571,  0.0210],
            [ 0.1060, -0.2119,  0.1060]])
    >>> torch.distributed.destroy_process_group()
    """
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    autograd.make_once(autograd.CrossEntropy, **options)  # checks them
    _check_shard(input_shard, target)
    first, n_classes = _place(input_shard, group)
    index = target.long()
    counts = index != ignore_index
    _check_range(target, counts & ((index < 0) | (index >= n_classes)), n_classes, ignore_index)
    losses = _Node.apply(input_shard, torch.where(counts, index - first, -1), counts, n_classes, label_smoothing, group)
    if reduction == "sum":
        losses = losses.sum()
    elif reduction == "mean":
        losses = losses.sum() / counts.sum()  # NaN over nothing; the node gives rows that do not count no gradient
    return losses.to(autograd.wide(input_shard.dtype))


def _check_shard(input_shard: Tensor, target: Tensor) -> None:
    for name, tensor in (("input_shard", input_shard), ("target", target)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a Tensor")
    if autograd.is_unseen(input_shard, target):
        raise TypeError(
            f"input_shard is a {type(input_shard).__name__} of {input_shard.dtype} on {input_shard.device}, target a "
            f"{type(target).__name__} on {target.device}; expected plain floating Tensors on the CPU (of a DTensor "
            "to_local()), outside of torch.compile and torch.func"
        )
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target has dtype {target.dtype}; expected an integer dtype: classes of the whole logits")
    if input_shard.ndim != 2 or target.shape != input_shard.shape[:1]:
        raise ValueError(
            f"input_shard has shape {tuple(input_shard.shape)} and target {tuple(target.shape)}; expected (N, K_s), "
            "K_s being the number of this process's classes, and (N)"
        )


def _place(input_shard: Tensor, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(the shard's first class, the number of all classes)."""
    rank, own = dist.get_rank(group), torch.tensor(input_shard.shape)
    if rank < 0:
        raise ValueError("this process is not in the group; expected one of its members")
    shapes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shapes, own, group)
    n_rows, widths = torch.stack(shapes).T.tolist()
    if len(set(n_rows)) > 1:
        raise ValueError(f"input_shard has {n_rows} rows by rank; expected the same number in all processes")
    if sum(widths) == 0:
        raise ValueError("input_shard has no classes in any process; expected at least 1")
    return sum(widths[:rank]), sum(widths)


def _check_range(target: Tensor, bad: Tensor, n_classes: int, ignore_index: int) -> None:
    if bad.any():
        at = int(bad.long().argmax())
        raise IndexError(
            f"target[{at}] is {target[at].item()}; expected 0 <= target < {n_classes} or ignore_index={ignore_index}"
        )


def _n_threads(shard: Tensor) -> int:
    return 1 if shard.numel() < threads.SERIAL_LOGITS else torch.get_num_threads()


def _of_shard(shard: Tensor, target: Tensor, counts: Tensor, smoothed: bool) -> list[Tensor]:
    """By row, as if the shard were all: lse; lse - z_t, any number where it has no target; smoothed sum_k (lse - z_k).

    In float64 for all logits, for a rounding of lse would be one of every p: float32 [128, 40000] in 4.3 ms, not 2.9.
    """
    n_rows, n_classes = shard.shape
    lse = torch.full((n_rows,), -torch.inf, dtype=torch.float64)
    if n_classes == 0:
        return [lse, *(torch.zeros_like(lse) for _ in range(1 + smoothed))]
    rows = Rows(torch.where(counts, target, -1).numpy(), ignore_index=-1)
    fields = {"logits": autograd._array(shard), "rows": rows, "lse": lse.numpy()}
    fields |= {"on": 0.0, "off": 1.0} if smoothed else {}
    made = engine.run_block(fields, None, _n_threads(shard), wide=True)
    losses = torch.where(lse == -torch.inf, torch.inf, torch.from_numpy(made))
    if not smoothed:
        return [lse, losses]
    # of a smoothed loss, which is not small, no digits are lost to this difference
    nll = lse - shard.gather(1, target.unsqueeze(1)).squeeze(1)
    return [lse, torch.where(lse == -torch.inf, torch.inf, nll), losses]


class _Node(torch.autograd.Function):
    """The loss of each row, in float64. `target` counts from the shard's first class, and may lie outside."""

    @staticmethod
    def forward(ctx, shard, target, counts, n_classes, smoothing, group):
        width = shard.shape[1]
        own = counts & (target >= 0) & (target < width)
        target = torch.where(own, target, 0)
        lse, nll, *gaps = _of_shard(shard, target, counts, smoothing > 0)
        top = lse.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group)
        below = lse - top
        sent = [torch.where(own, 0, below.exp()), torch.where(own, below, 0), torch.where(own, nll, 0)]
        sent += [rows - width * below if width else rows for rows in gaps]  # sum_k (top - z_k)
        sums = torch.stack(sent)
        dist.all_reduce(sums, dist.ReduceOp.SUM, group)
        others, below_target, nll = sums[0].log(), sums[1], sums[2]
        nll = nll + torch.logaddexp(torch.zeros_like(nll), others - below_target)  # log1p of a ratio
        above = torch.logaddexp(others, below_target)  # lse of all - top
        losses = nll
        if smoothing:
            hard = (1 - smoothing) * nll if smoothing < 1 else 0  # 0 * inf is 0 here
            losses = hard + smoothing * (above + sums[3] / n_classes)
        ctx.save_for_backward(shard, target, own, counts, (below - above).exp(), nll)
        ctx.smoothing, ctx.off = smoothing, smoothing / n_classes
        return torch.where(counts, losses, 0)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor):  # type: ignore[override]
        if autograd._is_differentiated(upstream):  # or the gradient would pass for a constant
            raise NotImplementedError("vocab_parallel_cross_entropy has no gradients of gradients, nor batched ones")
        shard, target, own, counts, share, nll = ctx.saved_tensors
        array, upstream = autograd._array(shard), torch.where(counts, upstream, 0)
        made = backends.active().empty_like(array, array.dtype)
        gradient = autograd._gradient_tensor(made)
        if made.size:
            # softmax of the shard, times its share of the whole sum; rows that have none are not read
            rows = Rows(sample_weight=(counts & (share != 0)).double().numpy())
            fields = {"logits": array, "rows": rows, "upstream": (upstream * share).numpy()}
            engine.run_block(fields, made, _n_threads(shard), wide=False)
            if ctx.off:
                gradient.sub_((upstream * ctx.off).to(gradient.dtype).unsqueeze(1))  # of two dtypes it would copy
            at = own.nonzero().squeeze(1)
            of_target = upstream * (torch.expm1(-nll) + (ctx.smoothing - ctx.off))  # p_t - q_t
            gradient[at, target[at]] = of_target[at].to(gradient.dtype)
        return gradient, None, None, None, None, None
