"""Logits whose classes are split over processes: the loss and the gradients of the whole, in each of three."""

import math
import os
import warnings

import numpy as np
import pytest

from ce_fast.measure import MIB, peak_growth

torch = pytest.importorskip("torch")
adapter = pytest.importorskip("ce_fast.adapters.torch")
dist = pytest.importorskip("torch.distributed")
F, loss_of = torch.nn.functional, adapter.vocab_parallel_cross_entropy
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo to talk by"
)
INF, NAN = math.inf, math.nan
N, N_PROCESSES, IGNORED = 6, 3, 2
CLOSE = {"rtol": 1e-12, "atol": 1e-15}  # of float64: a few operations on numbers of the order of 1
ULP = 8  # of narrower dtypes: some of the compute dtype, and 16 bits are rounded at most twice


def case(widths=(7, 0, 4), scale=1.0, dtype="float64", edit="", targets=None, ranks=(0, 1, 2), upstream=1.0, **options):
    return {"widths": widths, "scale": scale, "dtype": dtype, "edit": edit, "targets": targets, "ranks": ranks,
            "upstream": upstream, "options": options}  # fmt: skip


OPTIONS = {
    f"{reduction}-{smoothing}-{ignore}": {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": ignore}
    for reduction in ("mean", "sum", "none")
    for smoothing in (0.0, 0.1, 1.0)
    for ignore in (-100, IGNORED)
}
CASES = {name: case((7, 0, 4) if i % 2 else (3, 5, 3), **options) for i, (name, options) in enumerate(OPTIONS.items())}
CASES |= {
    "defaults": case(),
    "two of three": case((7, 4), ranks=(0, 2), label_smoothing=0.1, ignore_index=IGNORED),
    "scaled": case(upstream=-3.0, label_smoothing=0.1),
    "spread": case(scale=300.0),
    "spread smoothed": case(scale=300.0, label_smoothing=0.1),
    "far": case(edit="logits += 1e4"),
    "padded": case((4, 4, 3), edit="logits[:, 7:] = -INF", targets=7),
    "a shard of nothing": case((4, 4, 3), edit="logits[:2, :4] = -INF; target[:2] = torch.tensor([3, 5])"),
    "ignored NaN": case(edit="logits[1] = NAN; logits[2] = INF; target[1:3] = 5", ignore_index=5),
    "NaN": case(edit="logits[1, 8] = NAN"),
    "columns": case(edit="logits = logits.T.contiguous().T", label_smoothing=0.1),
    "uint8": case(edit="target = target.to(torch.uint8)"),
    "nothing": case(edit="target[:] = -100", label_smoothing=0.1),
    "no rows": case(edit="logits, target = logits[:0], target[:0]", reduction="sum"),
    "too large": case(edit="target[4] = 11"),
    "negative": case(edit="target[3] = -2"),
    **{f"{dtype} {eps}": case(scale=3.0, dtype=dtype, label_smoothing=eps, reduction=reduction)
       for dtype in ("float32", "float16", "bfloat16") for eps, reduction in ((0.0, "mean"), (0.1, "none"))},
    "confident": case((2, 1, 1), dtype="float32", reduction="none",
                      edit="logits = torch.tensor([[20.0, 0, 0, 0], [0, 0, 0, 30.0]])"
                      "[[0, 1] * 3]; target = torch.tensor([0, 3] * 3)"),
}  # fmt: skip
REFUSED = ("too large", "negative")
FINITE = [name for name, made in CASES.items() if made["dtype"] == "float64" and name not in (*REFUSED, "NaN")]


def make(case):
    """The whole logits and the targets of a case, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    n_classes = sum(case["widths"])
    logits = case["scale"] * torch.randn(N, n_classes, generator=generator, dtype=torch.float64)
    target = torch.randint(case["targets"] or n_classes, (N,), generator=generator)
    target[:2] = torch.tensor([IGNORED, 0])
    given = {"logits": logits, "target": target, "torch": torch, "NAN": NAN, "INF": INF}
    exec(case["edit"], given)
    return given["logits"].to(getattr(torch, case["dtype"])), given["target"]


def backward(loss, upstream):
    loss.backward(torch.full_like(loss, upstream))


def of_shard(case, group):
    """(loss, gradient) of this process, or the text of what it raised."""
    logits, target = make(case)
    rank = dist.get_rank(group)
    shard = logits.split(case["widths"], 1)[rank].requires_grad_()
    try:
        loss = loss_of(shard, target, group, **case["options"])
    except IndexError as error:
        return str(error)
    backward(loss, case["upstream"])
    return loss.detach(), shard.grad


def of_loss_parallel(reduction):
    """(ours, torch's): loss and gradient of this process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.parallel import loss_parallel

    logits, target = make(case((4, 4, 4)))
    target[3] = -100
    shard = logits.split(4, 1)[dist.get_rank()].contiguous()
    own, theirs = shard.clone().requires_grad_(), shard.clone().requires_grad_()
    loss = loss_of(own, target, reduction=reduction)
    loss.sum().backward()
    mesh = init_device_mesh("cpu", (N_PROCESSES,))
    with loss_parallel():
        whole = F.cross_entropy(DTensor.from_local(theirs, mesh, [Shard(1)]), target, reduction=reduction)
        whole.sum().backward()
    return loss.detach(), own.grad, whole.full_tensor().detach(), theirs.grad


def growth():
    """(bytes of the first process's logits, by how much a forward and a backward grow it beyond the gradient)."""

    def call(shard):
        target = torch.zeros(len(shard), dtype=torch.int64)
        return torch.autograd.grad(loss_of(shard, target, label_smoothing=0.1), shard)

    shard = torch.randn(512, 40_000 if dist.get_rank() == 0 else 1, requires_grad=True)
    call(shard[:2].detach().requires_grad_())  # libraries and threads come once
    return shard.nbytes, peak_growth(lambda: call(shard))


def unequal():
    shape = (3 if dist.get_rank() == 1 else 2, 4)
    with pytest.raises(ValueError) as error:
        loss_of(torch.zeros(shape), torch.zeros(shape[0], dtype=torch.int64))
    return str(error.value)


def work(rank, folder):
    """What one of the processes finds, for the tests below."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), N_PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=N_PROCESSES)
    pair = dist.new_group([0, 2])
    found = {}
    for name, made in CASES.items():
        if rank in made["ranks"]:
            found[name] = of_shard(made, None if len(made["ranks"]) == N_PROCESSES else pair)
    found["loss_parallel"] = {reduction: of_loss_parallel(reduction) for reduction in ("mean", "sum", "none")}
    found["growth"], found["unequal"] = growth(), unequal()
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of each process, what it found."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (str(folder),), N_PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(N_PROCESSES)]


def results(found, name):
    """(the loss of the first process, the gradients of all put together)."""
    own = [found[rank][name] for rank in CASES[name]["ranks"]]
    assert all(torch.equal(own[0][0].nan_to_num(), loss.nan_to_num()) for loss, _ in own), "losses differ"
    return own[0][0], torch.cat([grad for _, grad in own], 1)


def expected(name):
    """Torch's loss of the whole logits, in float64."""
    logits, target = make(CASES[name])
    logits = logits.double().requires_grad_()
    loss = F.cross_entropy(logits, target.long(), **CASES[name]["options"])
    backward(loss, CASES[name]["upstream"])
    return loss.detach(), logits.grad


@pytest.mark.parametrize("name", FINITE)
def test_loss_and_gradients_are_those_of_the_whole_logits(found, name):
    for mine, theirs in zip(results(found, name), expected(name), strict=True):
        if name == "ignored NaN":  # where torch's gradient is 0 times NaN
            theirs = theirs.nan_to_num(nan=0.0)
        torch.testing.assert_close(mine, theirs, **CLOSE, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in CASES if name.split()[0] in ("float32", "float16", "bfloat16")])
def test_narrow_logits_have_the_dtypes_of_torch_and_are_rounded_at_the_end(found, name):
    dtype = getattr(torch, CASES[name]["dtype"])
    eps = torch.finfo(dtype).eps * (ULP if dtype == torch.float32 else 1)
    for mine, theirs in zip(results(found, name), expected(name), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), theirs, rtol=eps, atol=eps * theirs.abs().max().item() / 8)


def test_confident_rows_keep_their_digits(found):
    loss, grad = results(found, "confident")
    exact = [math.log1p(3 * math.exp(-z)) for z in (20, 30)] * 3
    np.testing.assert_allclose(loss, exact, rtol=ULP * 2**-24)
    of_target = grad[torch.arange(N), make(CASES["confident"])[1]]
    np.testing.assert_allclose(of_target, [math.expm1(-n) for n in exact], rtol=ULP * 2**-24)


def test_nan_is_that_of_its_row_in_every_process(found):
    grads = results(found, "NaN")[1]
    assert torch.equal(grads.isnan(), (torch.arange(N) == 1).unsqueeze(1).expand_as(grads))
    assert all(of_process["NaN"][0].isnan() for of_process in found)


def test_targets_that_are_no_class_of_the_whole_are_an_index_error_in_every_process(found):
    for of_process in found:
        assert of_process["too large"] == "target[4] is 11; expected 0 <= target < 11 or ignore_index=-100"
        assert of_process["negative"] == "target[3] is -2; expected 0 <= target < 11 or ignore_index=-100"


def test_different_numbers_of_rows_are_an_error_in_every_process(found):
    wanted = "input_shard has [2, 3, 2] rows by rank; expected the same number in all processes"
    assert [of_process["unequal"] for of_process in found] == [wanted] * N_PROCESSES


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_torchs_loss_parallel_gives_the_same(found, reduction):
    for of_process in found:
        loss, grad, theirs, their_grad = of_process["loss_parallel"][reduction]
        torch.testing.assert_close(loss, theirs, **CLOSE)
        torch.testing.assert_close(grad, their_grad, **CLOSE)


def test_nothing_of_the_size_of_a_shard_is_made_but_its_gradient(found):
    size, grown = found[0]["growth"]
    if grown is None:
        pytest.skip("peak memory is read from /proc")
    assert size > 75 * MIB
    assert grown < 4 * MIB


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A group of this process alone."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("alone") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_one_process_of_all_classes_gives_what_cross_entropy_gives(alone, variant, eps, rng):
    logits, target = (
        torch.from_numpy(rng.normal(size=(9, 33))).requires_grad_(),
        torch.from_numpy(rng.integers(0, 33, 9)),
    )
    target[3] = -100
    mine, theirs = (f(logits, target, label_smoothing=eps) for f in (loss_of, adapter.cross_entropy))
    torch.testing.assert_close(mine, theirs, **CLOSE)
    for grads in zip(*(torch.autograd.grad(loss, logits) for loss in (mine, theirs)), strict=True):
        torch.testing.assert_close(*grads, **CLOSE)


def test_a_gradient_of_the_gradient_is_refused(alone):
    logits = torch.zeros(2, 3, requires_grad=True)
    loss = loss_of(logits, torch.tensor([0, 1]))
    with pytest.raises(NotImplementedError, match="no gradients of gradients"):
        torch.autograd.grad(loss, logits, create_graph=True)


LOGITS, TARGET = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    "error, text, arguments, options",
    [
        (TypeError, "input_shard is a list; expected a Tensor", ([[0.0]], TARGET), {}),
        (TypeError, "target is a list; expected a Tensor", (LOGITS, [0, 1]), {}),
        (TypeError, r"of torch.int64 on cpu.* expected plain floating Tensors on the CPU", (LOGITS.long(), TARGET), {}),
        (TypeError, "on meta, .* expected plain floating Tensors on the CPU", (LOGITS.to("meta"), TARGET), {}),
        (TypeError, "target has dtype torch.float32; expected an integer dtype", (LOGITS, torch.zeros(2)), {}),
        (TypeError, "target has dtype torch.bool; expected an integer dtype", (LOGITS, TARGET.bool()), {}),
        (ValueError, r"shape \(2, 3\) and target \(3,\); expected \(N, K_s\)", (LOGITS, torch.zeros(3).long()), {}),
        (ValueError, r"shape \(3,\) and target \(\); expected \(N, K_s\)", (LOGITS[0], TARGET[0]), {}),
        (ValueError, "no classes in any process; expected at least 1", (LOGITS[:, :0], TARGET), {}),
        (ValueError, "label_smoothing is 1.5; expected", (LOGITS, TARGET), {"label_smoothing": 1.5}),
        (ValueError, "reduction is 'all'; expected one of", (LOGITS, TARGET), {"reduction": "all"}),
        (TypeError, "ignore_index is 0.5; expected an integer", (LOGITS, TARGET), {"ignore_index": 0.5}),
    ],
)
def test_errors_say_what_came_and_what_was_wanted(alone, error, text, arguments, options):
    with pytest.raises(error, match=text):
        loss_of(*arguments, **options)


def test_processes_outside_of_the_group_and_no_group_are_errors(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda group: -1)
    with pytest.raises(ValueError, match="not in the group"):
        loss_of(LOGITS, TARGET)


@pytest.mark.parametrize("smoothed", [False, True])
def test_a_target_of_a_shard_of_nothing_but_minus_infinity_has_an_infinite_loss(smoothed):
    shard, first = torch.full((1, 2), -torch.inf), torch.tensor([0])
    from ce_fast.adapters.torch_parallel import _of_shard

    assert _of_shard(shard, first, torch.tensor([True]), smoothed)[1].item() == torch.inf
