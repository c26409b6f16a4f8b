"""The PyTorch adapter: torch's results, signatures and errors, its autograd, and what goes to torch's own function."""

import copy
import doctest
import gc
import warnings
import weakref

import numpy as np
import pytest

import ce_fast as ce
from ce_fast import backends
from ce_fast.threads import SERIAL_LOGITS

torch = pytest.importorskip("torch")
adapter = pytest.importorskip("ce_fast.adapters.torch")

CrossEntropyLoss, cross_entropy = adapter.CrossEntropyLoss, adapter.cross_entropy
autograd = pytest.importorskip("ce_fast.adapters.torch_autograd")
F, forward_ad = torch.nn.functional, torch.autograd.forward_ad
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NARROW = (torch.float16, torch.bfloat16)
WEIGHT = torch.tensor([0.5, 2.0, 0.25, 1.0])  # exact in every dtype
K = len(WEIGHT)
EXTRA = ("z_loss", "temperature", "softcap", "smoothing", "denominator", "sample_weight")
# in units of the compute dtype's eps times the largest |x| or |result|: some ulp of ours, and of torch's float64
# results, which cancel lse - x; 16-bit results are rounded once more
ULP = 8

TORCH_OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "ignore": {"ignore_index": 1},
    "ignore_none": {"ignore_index": 1, "reduction": "none"},
    "smoothing": {"label_smoothing": 0.2},
    "weight": {"weight": WEIGHT},
    "weight_smoothing_ignore": {"weight": WEIGHT, "label_smoothing": 0.2, "ignore_index": 2},
    "weight_smoothing_none": {"weight": WEIGHT, "label_smoothing": 0.2, "reduction": "none"},
    "negative_weight": {"weight": WEIGHT * torch.tensor([1, -1, 1, -1]), "reduction": "sum"},
}
EXTRA_OPTIONS = {
    "z_loss": {"z_loss": 0.01},
    "z_loss_weight_ignore": {"z_loss": 0.01, "weight": WEIGHT, "ignore_index": 1},
    "temperature": {"temperature": 0.5, "label_smoothing": 0.1},
    "softcap": {"softcap": 2.0, "temperature": 1.5, "z_loss": 0.01},
    "others": {"smoothing": "others", "label_smoothing": 0.3},
    "sample_weight": {"sample_weight": True, "weight": WEIGHT},
    "sample_weight_none": {"sample_weight": True, "reduction": "none", "z_loss": 0.01, "label_smoothing": 0.1},
    "count": {"denominator": "count", "weight": WEIGHT, "ignore_index": 1, "sample_weight": True},
    "total": {"denominator": "total", "ignore_index": 1, "sample_weight": True},
    "number": {"denominator": 7.0, "z_loss": 0.01},
}
OPTIONS = TORCH_OPTIONS | EXTRA_OPTIONS
CASES = [
    pytest.param(name, soft, id=f"{name}-{'soft' if soft else 'indices'}")
    for name in OPTIONS
    for soft in (False, True)
    if not (soft and name == "others")  # class probabilities name no target to leave out
]
SHAPES = {"1d": (K,), "2d": (6, K), "3d": (3, K, 5), "4d": (2, K, 3, 2)}


def outer_shape(shape):
    return shape[:1] + shape[2:] if len(shape) > 1 else ()


def make_target(shape, soft=False, dtype=torch.float64):
    if soft:
        return torch.rand(shape, dtype=torch.float64).softmax(min(1, len(shape) - 1)).to(dtype)
    return torch.randint(K, outer_shape(shape))


def fit(options, shape, dtype=torch.float64, soft=False):
    """The options for logits of this shape and dtype."""
    options = dict(options)
    if options.get("weight") is not None:
        options["weight"] = options["weight"].to(dtype)
    if options.get("sample_weight"):
        options["sample_weight"] = torch.randint(3, outer_shape(shape)) * 0.5
    if soft:
        options.pop("ignore_index", None)
    return options


def formula(
    x,
    target,
    weight=None,
    *,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    z_loss=0.0,
    temperature=1.0,
    softcap=None,
    smoothing="uniform",
    denominator="weight",
    sample_weight=None,
):
    """The loss as its definition says, in torch's own operations."""
    x = x.movedim(min(1, x.ndim - 1), -1)
    x = (softcap * torch.tanh(x / softcap) if softcap else x) / temperature
    n_classes = x.shape[-1]
    soft = target.is_floating_point()
    w = torch.ones(n_classes, dtype=x.dtype) if weight is None else weight.to(x.dtype)
    s = torch.ones(x.shape[:-1], dtype=x.dtype) if sample_weight is None else sample_weight.to(x.dtype)
    counts = (s != 0) if soft else (s != 0) & (target != ignore_index)
    t = torch.zeros(counts.shape, dtype=torch.long) if soft else torch.where(counts, target, 0).long()
    q = target.movedim(min(1, target.ndim - 1), -1).to(x.dtype) if soft else F.one_hot(t, n_classes).to(x.dtype)
    if smoothing == "others":
        q = (1 - label_smoothing) * q + label_smoothing / (n_classes - 1) * (1 - q)
    else:
        q = (1 - label_smoothing) * q + label_smoothing / n_classes
    w_t = torch.ones_like(s) if soft else w[t]
    rows = -(w * q * x.log_softmax(-1)).sum(-1) + z_loss * w_t * x.logsumexp(-1) ** 2
    rows = torch.where(counts, s * rows, 0)
    if reduction != "mean":
        return rows if reduction == "none" else rows.sum()
    divisors = {"weight": (s * w_t)[counts].sum(), "count": counts.sum(), "total": counts.numel()}
    return rows.sum() / divisors.get(denominator, denominator)


def oracle(input, target, **options):
    """torch in float64 on the inputs as rounded; the formula for what torch does not have."""
    options = {k: v.double() if k == "weight" else v for k, v in options.items()}
    target = target.double() if target.is_floating_point() else target.long()
    if any(name in options for name in EXTRA):
        return formula(input, target, **options)
    return F.cross_entropy(input, target, **options)


def assert_close(actual, expected, largest_input):
    compute = torch.float64 if actual.dtype == torch.float64 else torch.float32
    unit = ULP * torch.finfo(compute).eps + (torch.finfo(actual.dtype).eps if actual.dtype in NARROW else 0)
    error = (actual.double() - expected).abs().max() if actual.numel() else 0
    bound = unit * max(largest_input, float(expected.abs().max()) if expected.numel() else 0)
    bound += torch.finfo(actual.dtype).smallest_normal
    assert actual.shape == expected.shape
    assert error <= bound, f"off by {error / bound:.3g} of its bound"


def check(input, target, **options):
    """Loss and gradient equal the oracle's, with an upstream gradient, and without a graph."""
    leaf = input.detach()
    wide = leaf.double().requires_grad_()
    expected = oracle(wide, target, **options)
    upstream = torch.rand(expected.shape, dtype=torch.float64) if expected.ndim else torch.tensor(0.75).double()
    (expected_grad,) = torch.autograd.grad(expected, wide, upstream.to(input.dtype).double())

    leaf.requires_grad_()
    loss = cross_entropy(leaf, target, **options)
    (grad,) = torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))
    assert grad.dtype == input.dtype
    largest = float(input.detach().double().abs().max())
    assert_close(loss.detach(), expected.detach(), largest)
    assert_close(grad, expected_grad, 1.0)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(leaf, target, **options), loss.detach(), rtol=0, atol=0)


LAYOUTS = {
    "1d": lambda: torch.randn(K),
    "2d": lambda: torch.randn(6, K),
    "one_row": lambda: torch.randn(1, K),
    "transposed": lambda: torch.randn(K, 6).t(),
    "sliced": lambda: torch.randn(12, 3 * K)[1::2, ::3],
    "rows_expanded": lambda: torch.randn(1, K).expand(6, K),
    "classes_expanded": lambda: torch.randn(6, 1).expand(6, K),
    "shifted": lambda: torch.randn(3, 6, K)[:, :-1].movedim(-1, 1),
    "3d": lambda: torch.randn(3, K, 5),
    "4d": lambda: torch.randn(2, K, 3, 2),
    "channels_last": lambda: torch.randn(2, K, 3, 5).to(memory_format=torch.channels_last),
    "5d": lambda: torch.randn(2, K, 1, 3, 2),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(7)


@pytest.fixture
def torch_calls(monkeypatch):
    """The calls that went to torch's own function."""
    calls, own = [], F.cross_entropy

    def spy(*args, **kwargs):
        calls.append(args)
        return own(*args, **kwargs)

    monkeypatch.setattr(adapter.own, "cross_entropy", spy)
    return calls


# ---------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "soft"])
def test_loss_and_gradient_equal_torch_in_float64_for_every_layout(dtype, layout, soft):
    made = LAYOUTS[layout]()
    input = made.to(dtype)  # keeps the strides
    if 0 in made.stride():
        input = made[tuple(slice(0, 1) if n == 0 else slice(None) for n in made.stride())].to(dtype).expand_as(made)
    check(input, make_target(input.shape, soft, dtype), label_smoothing=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, soft", CASES)
@pytest.mark.parametrize("shape", ["2d", "3d"])
def test_loss_and_gradient_equal_torch_in_float64_for_every_option(dtype, name, shape, soft):
    shape = SHAPES[shape]
    check(torch.randn(shape).to(dtype) * 3, make_target(shape, soft, dtype), **fit(OPTIONS[name], shape, dtype, soft))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_classes_on_all_threads_equal_torch_in_float64(dtype):
    input = torch.randn(40, 3001).to(dtype)
    check(input, torch.randint(3001, (40,)), reduction="sum")
    check(input, torch.randint(3001, (40,)), reduction="none")


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64], ids=str
)
def test_targets_of_any_integer_dtype_and_stride_are_read(dtype):
    input, target = torch.randn(6, K), torch.randint(K, (6,))
    strided = torch.stack([target, target], 1).to(dtype)[:, 0]
    assert cross_entropy(input, strided) == cross_entropy(input, target)
    assert cross_entropy(input, target[:1].to(dtype).expand(6)) == cross_entropy(input, target[:1].expand(6))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", [None, *DTYPES, torch.int64], ids=str)
@pytest.mark.parametrize("target", [torch.int64, *DTYPES], ids=str)
def test_result_and_gradient_have_the_dtypes_of_torch(autocast, dtype, weight, target, torch_calls):
    input = torch.randn(6, K).to(dtype)
    t = make_target(input.shape, target.is_floating_point, target)
    w = None if weight is None else torch.tensor([1, 2, 3, 4], dtype=weight)

    def dtypes(f):
        x = input.clone().requires_grad_()
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = f(x, t, weight=w)
        loss.backward()
        return loss.dtype, x.grad.dtype

    try:
        expected = dtypes(F.cross_entropy)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            dtypes(cross_entropy)
        return
    torch_calls.clear()
    assert dtypes(cross_entropy) == expected
    assert not torch_calls


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0, K), (2, K, 0), (0, K, 3)], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "soft"])
def test_empty_batches_give_what_torch_gives(reduction, shape, soft):
    input, target = torch.randn(shape, requires_grad=True), make_target(shape, soft, torch.float32)
    loss = cross_entropy(input, target, reduction=reduction)
    torch.testing.assert_close(loss, F.cross_entropy(input, target, reduction=reduction), equal_nan=True)
    loss.sum().backward()
    assert input.grad.shape == input.shape


@pytest.mark.parametrize("by", ["ignore_index", "sample_weight", "sample_weight_soft"])
def test_a_row_that_does_not_count_has_loss_and_gradient_0_whatever_it_holds(by):
    input = torch.tensor([[1.0, 2.0], [float("nan"), 0.0]], requires_grad=True)
    target = torch.eye(2) if by == "sample_weight_soft" else torch.tensor([0, -100 if by == "ignore_index" else 1])
    sample_weight = None if by == "ignore_index" else torch.tensor([True, False])
    loss = cross_entropy(input, target, reduction="none", sample_weight=sample_weight)
    assert loss[1] == 0
    for create_graph in (False, True):
        (grad,) = torch.autograd.grad(loss.sum(), input, retain_graph=True, create_graph=create_graph)
        assert (grad[1] == 0).all() and grad[0].isfinite().all()
    (second,) = torch.autograd.grad(grad.pow(2).sum(), input)
    assert (second[1] == 0).all() and second[0].isfinite().all()


def test_mean_over_nothing_is_nan_and_its_gradient_0():
    input = torch.randn(3, K, requires_grad=True)
    loss = cross_entropy(input, torch.full((3,), -100))
    loss.backward()
    assert loss.isnan() and (input.grad == 0).all()


@pytest.mark.parametrize("dtype, size", [(torch.float16, 6e4), (torch.float32, 2e38)], ids=str)
def test_a_sum_past_the_largest_number_is_inf_as_in_torch(dtype, size):
    input, target = torch.tensor([[-size, size], [-size / 2, size]], dtype=dtype), torch.tensor([0, 0])
    assert cross_entropy(input, target, reduction="sum") == F.cross_entropy(input, target, reduction="sum") == torch.inf


def test_a_weight_changed_in_place_counts_from_the_next_call_on():
    input, target, weight = torch.randn(K, K), torch.arange(K), WEIGHT.clone()
    cross_entropy(input, target, weight)
    weight[0] = 5.0
    assert cross_entropy(input, target, weight) == cross_entropy(input, target, weight.clone())


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_deprecated_options_choose_the_reduction_and_warn_as_torch(size_average, reduce):
    input, target = torch.randn(6, K), torch.randint(K, (6,))
    with warnings.catch_warnings(record=True) as of_torch:
        warnings.simplefilter("always")
        expected = F.cross_entropy(input, target, None, size_average, -100, reduce)
    with warnings.catch_warnings(record=True) as ours:
        warnings.simplefilter("always")
        torch.testing.assert_close(cross_entropy(input, target, None, size_average, -100, reduce), expected)
    assert [str(w.message) for w in ours] == [str(w.message) for w in of_torch]


# ---------------------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("name, soft", CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_first_and_second_order_pass_gradcheck(name, shape, soft):
    shape = SHAPES[shape]
    input, target = torch.randn(shape, dtype=torch.float64, requires_grad=True), make_target(shape, soft)
    options = fit(OPTIONS[name], shape, torch.float64, soft)
    if shape == (K,):  # one row, that must count for a mean
        options |= {"ignore_index": -1} if "ignore_index" in options else {}
        options |= {"sample_weight": torch.tensor(0.5)} if "sample_weight" in options else {}

    def f(x):
        return cross_entropy(x, target, **options)

    assert torch.autograd.gradcheck(f, (input,), check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (input,), fast_mode=True)


@pytest.mark.parametrize("name, soft", CASES)
def test_gradient_under_create_graph_equals_the_gradient_of_the_kernels(name, soft):
    shape = SHAPES["3d"]
    input, target = torch.randn(shape, dtype=torch.float64, requires_grad=True), make_target(shape, soft)
    options = fit(OPTIONS[name], shape, torch.float64, soft)
    plain, graphed = (
        torch.autograd.grad(cross_entropy(input, target, **options).sum(), input, create_graph=graph)[0]
        for graph in (False, True)
    )
    assert graphed.requires_grad and not plain.requires_grad
    torch.testing.assert_close(graphed.detach(), plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_16_bit_gradient_under_create_graph_is_rounded_once(dtype):
    input, target = torch.randn(64, K).to(dtype).requires_grad_(), torch.randint(K, (64,))
    wide = input.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(wide, target, reduction="sum"), wide)
    (grad,) = torch.autograd.grad(cross_entropy(input, target, reduction="sum"), input, create_graph=True)
    torch.testing.assert_close(grad.detach().double(), expected, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_penalty_equals_the_penalty_through_torch(dtype):
    input, target = torch.randn(6, K).to(dtype), torch.randint(K, (6,))

    def penalised(f, x):
        x = x.clone().requires_grad_()
        loss = f(x, target, label_smoothing=0.1)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + 3 * grad.pow(2).sum()).backward()
        return x.grad

    assert_close(penalised(cross_entropy, input), penalised(F.cross_entropy, input.double()), 1.0)


def test_third_order_gradients_equal_those_of_torch():
    target = torch.randint(K, (3,))

    def third(f):
        x = torch.linspace(-1, 1, 3 * K, dtype=torch.float64).reshape(3, K).requires_grad_()
        y = f(x, target)
        for _ in range(3):
            (g,) = torch.autograd.grad(y, x, create_graph=True)
            y = g.pow(2).sum()
        return g.detach()

    torch.testing.assert_close(third(cross_entropy), third(F.cross_entropy))


@pytest.mark.parametrize("vectorize", [False, True])
def test_jacobian_and_hessian_equal_those_of_torch(vectorize):
    input, target = torch.randn(3, K, dtype=torch.float64), torch.randint(K, (3,))
    for transform, reduction in (
        (torch.autograd.functional.jacobian, "none"),
        (torch.autograd.functional.hessian, "mean"),
    ):
        ours, expected = (
            transform(lambda x, f=f: f(x, target, reduction=reduction), input, vectorize=vectorize)  # noqa: B023
            for f in (cross_entropy, F.cross_entropy)
        )
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_second_backward_of_a_retained_graph_gives_the_same_bits(dtype, reduction):
    input = torch.randn(6, K).to(dtype).requires_grad_()
    loss = cross_entropy(input, torch.randint(K, (6,)), reduction=reduction)
    first, second, third = (torch.autograd.grad(loss.sum(), input, retain_graph=True)[0] for _ in range(3))
    assert first.data_ptr() != second.data_ptr()
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    torch.testing.assert_close(third, first, rtol=0, atol=0)


def test_second_backward_of_a_freed_graph_raises():
    input = torch.randn(6, K, requires_grad=True)
    loss = cross_entropy(input, torch.randint(K, (6,)))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_of_two_losses_add_up_in_one_leaf():
    input, (s, t) = torch.randn(6, K, dtype=torch.float64, requires_grad=True), torch.randint(K, (2, 6))
    expected = [torch.autograd.grad(F.cross_entropy(input, y), input)[0] for y in (s, t)]
    loss = cross_entropy(input, s)
    (loss + 2 * cross_entropy(input, t)).backward(retain_graph=True)
    torch.testing.assert_close(input.grad, expected[0] + 2 * expected[1])
    loss.backward()  # adds in place into the buffer that was handed over
    torch.testing.assert_close(input.grad, 2 * expected[0] + 2 * expected[1])


@pytest.mark.parametrize("changed", ["input", "target", "sample_weight"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_changing_saved_tensors_in_place_matters_only_to_a_gradient_that_is_computed_from_them(changed, reduction):
    leaf = torch.randn(6, K, requires_grad=True)
    saved = {"input": leaf * 1, "target": torch.randint(1, K, (6,)), "sample_weight": torch.rand(6)}
    expected = torch.autograd.grad(cross_entropy(**saved, reduction=reduction).sum(), leaf, retain_graph=True)[0]
    loss = cross_entropy(**saved, reduction=reduction).sum()
    saved[changed].mul_(0)
    if reduction == "mean":  # the gradient was computed along with the loss
        assert torch.equal(torch.autograd.grad(loss, leaf, retain_graph=True)[0], expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("create_graph", [False, True])
def test_hooks_run_once_and_see_the_gradient(create_graph):
    leaf, target = torch.randn(6, K, dtype=torch.float64, requires_grad=True), torch.randint(K, (6,))
    seen = []
    logits = leaf * 2
    logits.register_hook(lambda g: seen.append(g.detach().clone()))
    leaf.register_hook(lambda g: seen.append(g.detach().clone()))
    (grad,) = torch.autograd.grad(cross_entropy(logits, target), leaf, create_graph=create_graph)
    (expected,) = torch.autograd.grad(F.cross_entropy(leaf * 2, target), leaf)
    assert len(seen) == 3  # the third by the expected gradient
    torch.testing.assert_close(seen[0], expected / 2)
    torch.testing.assert_close(seen[1], expected)
    torch.testing.assert_close(grad.detach(), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradient(use_reentrant):
    input, target = torch.randn(6, K, requires_grad=True), torch.randint(K, (6,))
    torch.utils.checkpoint.checkpoint(
        lambda x: cross_entropy(2 * x, target), input, use_reentrant=use_reentrant
    ).backward()
    (expected,) = torch.autograd.grad(cross_entropy(2 * input, target), input)
    torch.testing.assert_close(input.grad, expected, rtol=0, atol=0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_no_gradient_is_computed(context, monkeypatch):
    input, target = torch.randn(6, K, requires_grad=True), torch.randint(K, (6,))
    weight = torch.rand(K, requires_grad=True)  # which in grad mode goes to torch
    monkeypatch.setattr(ce.CrossEntropyLoss, "value_and_grad", lambda *a, **k: pytest.fail("computed a gradient"))
    with context():
        loss = cross_entropy(input, target, weight, z_loss=1.0)
    assert not loss.requires_grad and loss.grad_fn is None
    assert not cross_entropy(input.detach(), target).requires_grad


def test_targets_are_checked_again_in_backward():
    input, target = torch.randn(6, K, requires_grad=True), torch.randint(K, (6,))
    loss = cross_entropy(input, target, reduction="none").sum()
    target.numpy()[3] = 10**6  # memory changes under torch's version counter
    with pytest.raises(IndexError, match=r"target\[3\] is 1000000"):
        loss.backward()


# ---------------------------------------------------------------------------------------------------- memory


@pytest.fixture
def computed(monkeypatch):
    """Where the gradients that the core computes lie."""
    pointers, own = [], ce.CrossEntropyLoss.value_and_grad

    def spy(*args, **kwargs):
        value, grad = own(*args, **kwargs)
        pointers.append(grad.ctypes.data)
        return value, grad

    backend = backends.active()
    small = backend.small_call_at

    def small_spy(*args):
        done = small(*args)
        if done is not None and done[1] is not None:
            pointers.append(done[1].ctypes.data)
        return done

    monkeypatch.setattr(ce.CrossEntropyLoss, "value_and_grad", spy)
    monkeypatch.setattr(backend, "small_call_at", small_spy)
    return pointers


@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_large_gradient_is_computed_once_and_handed_over_without_a_copy(upstream, computed):
    input, target = torch.randn(512, 50257, requires_grad=True), torch.randint(50257, (512,))
    loss = cross_entropy(input, target)
    assert len(computed) == 1  # in forward
    (loss * upstream).backward()
    assert computed == [input.grad.data_ptr()]
    assert loss.grad_fn.gradient is None
    _, expected = ce.CrossEntropyLoss(n_threads=1).value_and_grad(input.detach().numpy(), target.numpy())
    assert torch.equal(input.grad, upstream * torch.from_numpy(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["2d", "transposed", "channels_last"])
@pytest.mark.parametrize("upstream", [1.0, 0.3])
def test_gradient_buffer_becomes_the_grad_of_a_leaf_of_any_dense_layout(dtype, layout, upstream, computed):
    input = LAYOUTS[layout]().to(dtype).requires_grad_()
    loss = cross_entropy(input, make_target(input.shape))
    loss.backward(torch.tensor(upstream, dtype=dtype))
    assert set(computed) == {input.grad.data_ptr()}
    assert input.grad.stride() == input.stride() and not input.grad._is_view()


def test_gradient_buffer_is_freed_with_the_last_tensor_that_uses_it():
    input = torch.randn(6, K, requires_grad=True)
    loss = cross_entropy(input, torch.randint(K, (6,)))
    storage = weakref.ref(loss.grad_fn.gradient.untyped_storage())
    gradient = weakref.ref(loss.grad_fn.gradient)
    loss.backward()
    input.grad = None
    gc.collect()
    assert gradient() is None and storage() is None


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_loss_scale_comes_before_16_bit_gradients_are_rounded(dtype):
    input, target = torch.randn(64, K).to(dtype), torch.randint(K, (64,))
    scale, denominator = 3 * 2.0**14, 2.0**24  # unscaled gradients lie at the bottom of float16
    wide = input.double().requires_grad_()
    (F.cross_entropy(wide, target, reduction="sum") * (scale / denominator)).backward()
    input.requires_grad_()
    (cross_entropy(input, target, denominator=denominator).double() * scale).backward()
    torch.testing.assert_close(input.grad.double(), wide.grad, rtol=0.51 * torch.finfo(dtype).eps, atol=0)


# ---------------------------------------------------------------------------------------------------- threads


def test_threads_are_those_of_torch_and_1_for_small_calls(monkeypatch):
    large, small = (torch.randn(n, 2, requires_grad=True) for n in (SERIAL_LOGITS // 2, SERIAL_LOGITS // 2 - 1))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: pytest.fail("set the threads of torch"))
    n_threads = [
        cross_entropy(x, torch.zeros(len(x), dtype=torch.long)).grad_fn.call[0].n_threads for x in (large, small)
    ]
    assert n_threads == [3, 1]


def test_loss_and_gradient_have_the_same_bits_for_any_number_of_threads(monkeypatch):
    input, target = torch.randn(100, 1000, requires_grad=True), torch.randint(1000, (100,))
    results = []
    for n in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n: n)
        loss = cross_entropy(input, target)
        results.append((loss.item(), *torch.autograd.grad(loss, input)))
    assert all(r[0] == results[0][0] and torch.equal(r[1], results[0][1]) for r in results)


# ---------------------------------------------------------------------------------------------------- torch's own


class Tagged(torch.Tensor):
    pass


STRANGERS = {
    "meta": lambda x, t: cross_entropy(x.to("meta"), t.to("meta")),
    "target_grad": lambda x, t: cross_entropy(x, F.one_hot(t, K).float().requires_grad_()),
    "weight_grad": lambda x, t: cross_entropy(x, x.softmax(1), torch.ones(K, requires_grad=True)),
    "subclass": lambda x, t: cross_entropy(x.as_subclass(Tagged), t),
    "func_hessian": lambda x, t: torch.func.hessian(cross_entropy)(x, t),
    "jvp": lambda x, t: torch.func.jvp(lambda x: cross_entropy(x, t), (x,), (torch.ones_like(x),)),
    "trace": lambda x, t: torch.jit.trace(cross_entropy, (torch.zeros_like(x), t))(x, t),
    "fx": lambda x, t: torch.fx.symbolic_trace(lambda x, t: cross_entropy(x, t))(x, t),
    "target_of_shape_1": lambda x, t: cross_entropy(x[0], t[:1]),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", STRANGERS)
def test_what_kernels_cannot_do_goes_to_torch(name, torch_calls, monkeypatch):
    call, x, t = STRANGERS[name], torch.randn(6, K), torch.randint(K, (6,))
    ours = call(x, t)
    assert torch_calls
    monkeypatch.setitem(globals(), "cross_entropy", F.cross_entropy)
    expected = call(x, t)
    assert type(ours) is type(expected)
    if name == "meta":
        assert ours.device.type == "meta" and ours.shape == ()
        return
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_forward_mode_keeps_its_tangent(torch_calls):
    x, t = torch.randn(6, K), torch.randint(K, (6,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x) * torch.arange(K))
        ours, expected = (forward_ad.unpack_dual(f(dual, t)).tangent for f in (cross_entropy, F.cross_entropy))
    assert torch_calls and torch.equal(ours, expected)


def test_fake_tensors_go_to_torch():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        loss = cross_entropy(torch.randn(6, K), torch.zeros(6, dtype=torch.long))
        assert loss.fake_mode is mode and loss.shape == ()


EXTRA_CALLS = {
    "z_loss": {"z_loss": 0.1},
    "smoothing": {"smoothing": "others", "label_smoothing": 0.1},
    "denominator": {"denominator": "count"},
    "temperature": {"temperature": 2.0},
    "softcap": {"softcap": 3.0},
    "sample_weight": {"sample_weight": torch.linspace(0, 2, 6)},
}


@pytest.mark.parametrize("name", EXTRA_CALLS)
def test_options_that_torch_lacks_go_by_the_formula_where_kernels_do_not(name, torch_calls):
    x, t, extra = torch.randn(6, K, dtype=torch.float64), torch.randint(K, (6,)), EXTRA_CALLS[name]
    leaf = x.clone().requires_grad_()
    expected = cross_entropy(leaf, t, **extra)
    (grad,) = torch.autograd.grad(expected, leaf)
    tagged = cross_entropy(x.as_subclass(Tagged), t, **extra)
    assert type(tagged) is Tagged
    torch.testing.assert_close(tagged.as_subclass(torch.Tensor), expected.detach())
    torch.testing.assert_close(torch.func.grad(lambda x: cross_entropy(x, t, **extra))(x), grad)
    weight = torch.ones(K, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: cross_entropy(x, t, w, **extra), (weight,))
    with forward_ad.dual_level():
        dual = cross_entropy(forward_ad.make_dual(x, torch.ones_like(x) * torch.arange(K)), t, **extra)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, (grad * torch.arange(K)).sum())
    assert not torch_calls


def test_a_default_device_keeps_the_kernels(torch_calls):
    x, t = torch.randn(6, K, requires_grad=True), torch.randint(K, (6,))
    with torch.device("meta"):
        loss = cross_entropy(x, t, z_loss=0.1)
        loss.backward(retain_graph=True)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    assert not torch_calls and loss.device.type == x.grad.device.type == grad.device.type == "cpu"
    torch.testing.assert_close(loss, cross_entropy(x, t, z_loss=0.1), rtol=0, atol=0)


def test_torch_function_modes_see_the_call():
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x, t, weight = torch.randn(6, K), torch.randint(K, (6,)), torch.rand(6)
    options = dict(
        weight=WEIGHT, ignore_index=1, reduction="sum", label_smoothing=0.1, z_loss=0.1, sample_weight=weight
    )
    with Mode():
        loss = cross_entropy(x, t, **options)
    assert seen[-1] is cross_entropy and loss == cross_entropy(x, t, **options)


# ---------------------------------------------------------------------------------------------------- errors

X, T = torch.zeros(2, 3), torch.tensor([0, 1])
WRONG = {
    "scalar_input": (torch.tensor(1.0), torch.tensor(0)),
    "integer_input": (torch.ones(2, 3, dtype=torch.long), T),
    "complex_input": (torch.ones(2, 3, dtype=torch.complex64), T),
    "bool_target": (X, T.bool()),
    "float_target_of_index_shape": (X, T.float()),
    "integer_target_of_full_shape": (X, torch.zeros(2, 3, dtype=torch.long)),
    "more_targets_than_rows": (X, torch.zeros(3, dtype=torch.long)),
    "target_without_spatial_dimensions": (torch.zeros(2, 3, 4), T),
    "target_past_classes": (X, torch.tensor([0, 3])),
    "negative_target": (X, torch.tensor([0, -1])),
    "target_of_no_class": (torch.zeros(2, 0), T),
    "weight_of_wrong_size": (X, T, {"weight": torch.ones(4)}),
    "weight_of_wrong_shape": (X, T, {"weight": torch.ones(1, 3)}),
    "weight_of_wrong_dtype": (X, T, {"weight": torch.ones(3).double()}),
    "integer_weight": (X, T, {"weight": torch.ones(3, dtype=torch.long)}),
    "smoothing_past_1": (X, T, {"label_smoothing": 1.5}),
    "no_reduction": (X, T, {"reduction": "max"}),
    "ignore_index_of_probabilities": (X, X.softmax(1), {"ignore_index": 1}),
    "ignore_index_none": (X, T, {"ignore_index": None}),
    "no_target": (X, None),
    "lists": ([[0.0, 1.0]], [0]),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_where_torch_raises_so_do_we(name, grad):
    input, target, *rest = WRONG[name]
    options = rest[0] if rest else {}
    if grad and isinstance(input, torch.Tensor) and input.is_floating_point():
        input = input.clone().requires_grad_()
    errors = (RuntimeError, ValueError, TypeError, IndexError)
    with pytest.raises(errors) as of_torch:
        F.cross_entropy(input, target, **options)
    with pytest.raises(errors) as ours:
        cross_entropy(input, target, **options)
    if name in ("target_past_classes", "negative_target"):
        assert of_torch.type is ours.type is IndexError


# ---------------------------------------------------------------------------------------------------- module


def test_module_has_torchs_state_and_repr():
    module, of_torch = CrossEntropyLoss(WEIGHT, ignore_index=1), torch.nn.CrossEntropyLoss(WEIGHT, ignore_index=1)
    assert isinstance(module, torch.nn.CrossEntropyLoss)
    assert repr(module) == repr(of_torch) == "CrossEntropyLoss()"
    assert repr(CrossEntropyLoss(denominator="count")) == "CrossEntropyLoss(denominator='count')"
    assert list(module.state_dict()) == list(of_torch.state_dict()) == ["weight"]
    of_torch.load_state_dict(module.state_dict())
    fresh = CrossEntropyLoss(torch.zeros(K), ignore_index=1)
    fresh.load_state_dict(module.state_dict())
    input, target = torch.randn(6, K), torch.randint(K, (6,))
    assert module(input, target) == fresh(input, target)
    assert fresh.double()(input.double(), target).dtype == torch.float64


def test_module_is_the_function_with_its_options():
    input, target, weight = torch.randn(6, K), torch.randint(K, (6,)), torch.rand(6)
    options = dict(weight=WEIGHT, ignore_index=1, label_smoothing=0.1, z_loss=0.1, smoothing="others", denominator=3.0)
    for reduction in ("mean", "none"):
        expected = cross_entropy(input, target, sample_weight=weight, reduction=reduction, **options)
        for module in (made := CrossEntropyLoss(reduction=reduction, **options), copy.deepcopy(made)):
            assert torch.equal(module(input, target, weight), expected)
    with pytest.warns(UserWarning, match="size_average"):
        assert CrossEntropyLoss(size_average=False).reduction == "sum"


@pytest.mark.parametrize(
    "options",
    [{"label_smoothing": 2.0}, {"reduction": "max"}, {"z_loss": -1}, {"smoothing": "x"}, {"denominator": 0}],
    ids=str,
)
def test_module_checks_its_options_when_it_is_made(options):
    with pytest.raises(ValueError):
        CrossEntropyLoss(**options)


# ---------------------------------------------------------------------------------------------------- the rest


def test_examples_in_docstrings_run():
    result = doctest.testmod(adapter)
    assert result.attempted and not result.failed


def test_arrays_share_the_memory_of_tensors():
    for dtype in DTYPES:
        tensor = torch.randn(6, 2 * K).to(dtype).t()[::2]
        array = autograd._array(tensor)
        assert array.dtype.name == str(tensor.dtype).removeprefix("torch.")
        assert array.ctypes.data == tensor.data_ptr() and array.shape == tensor.shape
        assert np.shares_memory(array, autograd._array(tensor))


def test_input_that_is_its_own_target_gets_both_gradients():
    z = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    ours, theirs = (torch.autograd.grad(function(z, z), z)[0] for function in (cross_entropy, F.cross_entropy))
    assert torch.equal(ours, theirs)


def test_bfloat16_with_the_negative_bit_is_read():
    x = torch.randn(3, 4).bfloat16()
    assert torch.equal(
        cross_entropy(torch._neg_view(x), torch.tensor([0, 1, 2])), cross_entropy(-x, torch.tensor([0, 1, 2]))
    )


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"label_smoothing": 0.1}], ids=str)
def test_tensors_without_memory_of_their_own_are_left_to_torch(options):
    freed, target = torch.randn(4, 5), torch.arange(4)
    freed.untyped_storage().resize_(0)
    for place in (cross_entropy, F.cross_entropy):
        with pytest.raises(RuntimeError, match="not allocated"):
            place(freed, target, **options)
    zeros = torch._efficientzerotensor((4, 5))
    assert cross_entropy(zeros, target, **options) == F.cross_entropy(zeros, target, **options)


def test_logits_at_an_odd_address_are_read():
    odd = torch.frombuffer(bytearray(4 * 20 + 1), dtype=torch.float32, offset=1, count=20).view(4, 5)
    torch.testing.assert_close(cross_entropy(odd, torch.arange(4)), torch.tensor(5.0).log())
