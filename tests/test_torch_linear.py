"""linear_cross_entropy of the PyTorch adapter: torch's results, signature and errors, in bounded memory."""

import copy
import inspect
import itertools
import pickle
import subprocess
import sys

import numpy as np
import pytest

import ce_fast as ce
from ce_fast import linear
from test_linear import CASES, MIB, ONE_ROW, check_case, make

torch = pytest.importorskip("torch")
adapter = pytest.importorskip("ce_fast.adapters.torch")
autograd = pytest.importorskip("ce_fast.adapters.torch_autograd")
F, linear_cross_entropy = torch.nn.functional, adapter.linear_cross_entropy
needs_torchs_own = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy"
)
N, C, D = 9, 5, 4
# of float64: products and sums of a few numbers of the order of 1
CLOSE = {"rtol": 1e-12, "atol": 1e-14}


def tensor(array, grad=False):
    if array is None:
        return None
    made = autograd._gradient_tensor(np.array(array))
    return made.requires_grad_(grad)


def by_torch(hidden, classifier, target, bias, sample_weight, *, upstream, **options):
    """Value and gradients, by way of the autograd graph; without one the value is the same."""
    exact = ce.LinearCrossEntropyLoss(**options)(hidden, classifier, target, bias, sample_weight)
    layer = [tensor(array, grad=True) for array in (hidden, classifier, bias)]
    if "weight" in options:
        options["weight"] = torch.tensor(options["weight"], dtype=layer[0].dtype)
    options |= {"linear_bias": layer[2], "sample_weight": tensor(sample_weight)}
    if target.dtype.kind == "f":  # or torch's result would have its dtype
        target = target.astype(hidden.dtype)
    value = linear_cross_entropy(layer[0], layer[1], tensor(target), **options)
    with torch.no_grad():
        again = linear_cross_entropy(layer[0], layer[1], tensor(target), **options)
    assert torch.equal(value.detach(), again) and not again.requires_grad
    assert type(value.grad_fn).__name__ == "_NodeBackward"
    value.backward(torch.ones_like(value) if upstream is None else torch.tensor(upstream, dtype=value.dtype))
    grads = linear.LinearGradients(*(None if t is None else autograd._array(t.grad) for t in layer))
    if hidden.dtype.itemsize > 2:
        return value.detach().numpy(), grads
    assert torch.equal(value.detach(), autograd._tensor(exact, value.dtype))  # rounded, as torch's results are
    return exact, grads


@pytest.mark.parametrize("sizes", [{}, ONE_ROW], ids=["one_block", "one_row"])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_those_of_the_logits(name, sizes, dtype, rng, monkeypatch):
    for constant, n_bytes in sizes.items():
        monkeypatch.setattr(linear, constant, n_bytes)
    check_case(rng, dtype, name, by_torch)


def layer_of(rng, dtype=torch.float64, bias=True, **more):
    hidden, classifier, target, biases, _ = make(rng, np.float64, (N,), C, D, bias=bias, **more)
    layer = [tensor(array).to(dtype).requires_grad_() for array in (hidden, classifier, biases) if array is not None]
    target = tensor(target)
    return (*layer, target.to(dtype) if target.is_floating_point() else target)


def by_logits(hidden, classifier, bias, target, **options):
    return adapter.cross_entropy(F.linear(hidden, classifier, bias), target, **options)


def assert_same(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("wanted", [w for w in itertools.product([False, True], repeat=3) if any(w)])
def test_gradients_that_nobody_needs_are_not_computed(wanted, reduction, rng, monkeypatch):
    *layer, target = layer_of(rng)
    for part, want in zip(layer, wanted, strict=True):
        part.requires_grad_(want)
    asked, run = [], linear.run
    monkeypatch.setattr(linear, "run", lambda *a, **k: asked.append(k.get("wanted")) or run(*a, **k))
    h, w, b = layer
    linear_cross_entropy(h, w, target, linear_bias=b, reduction=reduction).sum().backward()
    assert asked[-1] == wanted
    of_need = [part for part in layer if part.requires_grad]
    assert all(part.grad is None for part in layer if not part.requires_grad)
    expected = torch.autograd.grad(by_logits(h, w, b, target, reduction=reduction).sum(), of_need)
    assert_same([part.grad for part in of_need], expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "none"}, {"softcap": 3.0, "z_loss": 0.01}, {"label_smoothing": 0.2, "ignore_index": 1}, "soft"],
    ids=str,
)
def test_gradients_of_first_and_second_order_pass_gradcheck(options, rng):
    *layer, target = layer_of(rng, soft=options == "soft")
    options = {} if options == "soft" else options

    def f(h, w, b):
        return linear_cross_entropy(h, w, target, linear_bias=b, **options)

    assert torch.autograd.gradcheck(f, layer, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, layer, fast_mode=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_second_backward_gives_the_same_and_a_factor_multiplies(dtype, reduction, rng):
    h, w, b, target = layer_of(rng, dtype)
    loss = linear_cross_entropy(h, w, target, linear_bias=b, reduction=reduction)
    first, second = (torch.autograd.grad(loss.sum(), (h, w, b), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    loss = linear_cross_entropy(h, w, target, linear_bias=b, reduction=reduction)
    for again in range(2):
        scaled = torch.autograd.grad(4 * loss.sum(), (h, w, b), retain_graph=True)
        assert all(torch.equal(a, 4 * b) for a, b in zip(scaled, first, strict=True)), again


def test_a_16_bit_gradient_is_scaled_before_it_is_rounded():
    w = torch.tensor([[0.0], [-20.0]], dtype=torch.float16, requires_grad=True)
    linear_cross_entropy(torch.ones(1, 1, dtype=torch.float16), w, torch.tensor([0])).mul(2.0**15).backward()
    p = np.exp(-20.0)  # float16 has nothing so near to 0
    assert w.grad.flatten().tolist() == pytest.approx([-p * 2**15, p * 2**15], rel=2.0**-10)


# ------------------------------------------------------------------------------------------ torch's own function


@needs_torchs_own
def test_signature_starts_with_torchs_own():
    mine, theirs = (inspect.signature(f).parameters for f in (linear_cross_entropy, F.linear_cross_entropy))
    kept = [(p.name, p.kind, p.default) for p in mine.values()][: len(theirs)]
    assert kept == [(p.name, p.kind, p.default) for p in theirs.values()]
    mine, theirs = (
        inspect.signature(c).parameters for c in (adapter.LinearCrossEntropyLoss, torch.nn.LinearCrossEntropyLoss)
    )
    kept = [(p.name, p.kind, p.default) for p in mine.values()][: len(theirs)]
    assert kept == [(p.name, p.kind, p.default) for p in theirs.values()]


@needs_torchs_own
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_torchs_own_function(bias, reduction, chunked, rng):
    *layer, target = layer_of(rng, bias=bias)
    options = {"reduction": reduction, "linear_bias": layer[2] if bias else None, "ignore_index": 1}
    options["weight"] = torch.tensor([0.5, 2, 0.25, 1, 1.5], dtype=torch.float64)
    if chunked:
        options["options"] = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=4)
    mine, theirs = (f(*layer[:2], target, **options) for f in (linear_cross_entropy, F.linear_cross_entropy))
    upstream = torch.linspace(-1, 2, N, dtype=torch.float64) if reduction == "none" else torch.tensor(2.0).double()
    assert_same([mine], [theirs])
    assert_same(*(torch.autograd.grad(loss, layer, upstream) for loss in (mine, theirs)))


SHAPES = {  # of input, linear_weight, target, and whether there is a bias
    "one_row": ((D,), (C, D), (), True),
    "one_row_soft": ((D,), (C, D), (C,), True),
    "soft": ((N, D), (C, D), (N, C), False),
    "k_dimensional": ((N, D), (C, 3, 2, D), (N, 3, 2), True),
    "k_dimensional_soft": ((N, D), (C, 3, D), (N, C, 3), False),
    "no_rows": ((0, D), (C, D), (0,), True),
}


@needs_torchs_own
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_that_torch_takes_gives_the_same(name):
    of_input, of_weight, of_target, bias = SHAPES[name]
    torch.manual_seed(0)
    h, w = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in (of_input, of_weight))
    b = torch.randn(of_weight[:-1], dtype=torch.float64, requires_grad=True) if bias else None
    soft = of_target == (*of_input[:-1], *of_weight[:-1])
    target = torch.rand(of_target, dtype=torch.float64) if soft else torch.randint(C, of_target)
    layer = [part for part in (h, w, b) if part is not None]
    for reduction in ("sum", "none"):
        mine, theirs = (
            f(h, w, target, linear_bias=b, reduction=reduction) for f in (linear_cross_entropy, F.linear_cross_entropy)
        )
        assert_same([mine], [theirs])
        assert_same(*(torch.autograd.grad(loss.sum(), layer) for loss in (mine, theirs)))


@pytest.mark.parametrize(
    "change",
    [
        {"input": torch.zeros(2, N, D)},
        {"input": torch.tensor(1.0)},
        {"input": torch.zeros(N, D + 1)},
        {"input": torch.zeros(D), "linear_weight": torch.zeros(C, 2, D)},
        {"linear_weight": torch.zeros(D)},
        {"linear_bias": torch.zeros(D)},
        {"target": torch.zeros(N, C), "ignore_index": -100},
    ],
    ids=lambda change: "-".join(change),
)
def test_what_does_not_fit_is_torchs_error(change):
    given = {"input": torch.zeros(N, D), "linear_weight": torch.zeros(C, D), "target": torch.zeros(N).long()} | change
    functions = [linear_cross_entropy, *([F.linear_cross_entropy] if hasattr(F, "linear_cross_entropy") else [])]
    for function in functions:
        with pytest.raises(RuntimeError):
            function(**given)


def test_bad_targets_and_dtypes_are_errors():
    h, w = torch.zeros(N, D), torch.zeros(C, D)
    with pytest.raises(IndexError, match=r"target\[0\] is 5"):
        linear_cross_entropy(h, w, torch.full((N,), C))
    with pytest.raises(RuntimeError, match="dtype"):
        linear_cross_entropy(h, w.double(), torch.zeros(N).long())
    with pytest.raises((RuntimeError, ValueError), match="label_smoothing"):
        linear_cross_entropy(h, w, torch.zeros(N).long(), label_smoothing=2.0)
    with pytest.raises(ValueError, match="max"):
        linear_cross_entropy(h, w, torch.zeros(N).long(), reduction="max")


# ------------------------------------------------------------------------------------------ what the kernels do not see


@pytest.mark.parametrize("extra", [{}, {"z_loss": 0.1, "softcap": 4.0}], ids=["plain", "ours"])
def test_transforms_see_the_formula(extra, rng):
    h, w, b, target = (part.detach() for part in layer_of(rng))

    def f(h, w, b):
        return linear_cross_entropy(h, w, target, linear_bias=b, **extra)

    expected = torch.func.grad(lambda h, w, b: by_logits(h, w, b, target, **extra), argnums=(0, 1, 2))(h, w, b)
    assert_same(torch.func.grad(f, argnums=(0, 1, 2))(h, w, b), expected)
    value, tangent = torch.func.jvp(f, (h, w, b), (torch.ones_like(h), w, b))
    assert_same([value], [f(h, w, b)])
    products = zip(expected, (torch.ones_like(h), w, b), strict=True)
    assert_same([tangent], [sum((grad * along).sum() for grad, along in products)])
    compiled = torch.compile(f, backend="eager", fullgraph=True)
    assert_same([compiled(h, w, b)], [f(h, w, b)])


def test_meta_tensors_and_weights_that_need_a_gradient_go_by_the_logits(rng):
    h, w, b, target = layer_of(rng)
    meta = linear_cross_entropy(*(part.detach().to("meta") for part in (h, w)), target.to("meta"), reduction="none")
    assert meta.is_meta and meta.shape == (N,)
    weight = torch.ones(C, dtype=torch.float64, requires_grad=True)
    options = {"weight": weight, "reduction": "sum", "z_loss": 0.1}
    loss, expected = linear_cross_entropy(h, w, target, linear_bias=b, **options), by_logits(h, w, b, target, **options)
    assert_same(torch.autograd.grad(loss, (h, weight)), torch.autograd.grad(expected, (h, weight)))


@needs_torchs_own
def test_options_go_to_torchs_own_function_where_the_kernels_do_not(monkeypatch):
    h, w, target = torch.zeros(N, D, device="meta"), torch.zeros(C, D, device="meta"), torch.zeros(N).long()
    seen = []
    monkeypatch.setattr(adapter.own, "linear_cross_entropy", lambda *a, **k: seen.append(k["options"]) or a[0].sum())
    chosen = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=3)
    linear_cross_entropy(h, w, target.to("meta"), options=chosen)
    linear_cross_entropy(h, w, target.to("meta"), options=chosen, z_loss=0.1)
    linear_cross_entropy(torch.zeros(N, D), torch.zeros(C, D), target, options=chosen)
    assert seen == [chosen]


def test_autocast_computes_in_float32_and_gives_it(rng):
    h, w, b, target = layer_of(rng, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = linear_cross_entropy(h.bfloat16(), w, target, linear_bias=b)  # as after a layer in bfloat16
        loss = linear_cross_entropy(h, w, target, linear_bias=b)
        grads = torch.autograd.grad(loss, (h, w, b))
    plain = linear_cross_entropy(h, w, target, linear_bias=b)
    assert loss.dtype == mixed.dtype == torch.float32 and torch.equal(loss, plain) and torch.equal(mixed, plain)
    assert all(map(torch.equal, grads, torch.autograd.grad(plain, (h, w, b))))


def test_function_modes_see_the_call():
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list = []
    with Mode():
        linear_cross_entropy(torch.zeros(N, D), torch.zeros(C, D), torch.zeros(N).long())
    assert linear_cross_entropy in seen


# ------------------------------------------------------------------------------------------ the module


def test_module_is_the_function_with_its_own_layer(rng):
    weight, more = torch.rand(C), {"reduction": "sum", "label_smoothing": 0.1, "ignore_index": 2, "z_loss": 0.1}
    module = adapter.LinearCrossEntropyLoss(D, C, bias=True, weight=weight, **more)
    h, target, some = torch.randn(N, D), torch.randint(C, (N,)), torch.rand(N)
    layer = {"linear_bias": module.linear.bias, "weight": weight}
    expected = linear_cross_entropy(h, module.linear.weight, target, sample_weight=some, **layer, **more)
    fresh = adapter.LinearCrossEntropyLoss(D, C, bias=True, weight=weight * 0, **more)
    fresh.load_state_dict(module.state_dict())
    for made in (module, fresh, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(made(h, target, some), expected)
        assert made.double()(h.double(), target).dtype == torch.float64
    assert repr(module).startswith("LinearCrossEntropyLoss(\n  in_features=4, num_classes=5,")
    assert "z_loss=0.1" in repr(module)
    expected.backward()


@needs_torchs_own
@pytest.mark.parametrize("out_features", [(), (3, 2)])
def test_module_is_torchs_own(out_features):
    given = {"out_features": out_features, "bias": True, "dtype": torch.float64, "ignore_index": 1}
    mine, theirs = (m(D, C, **given) for m in (adapter.LinearCrossEntropyLoss, torch.nn.LinearCrossEntropyLoss))
    theirs.load_state_dict(mine.state_dict())
    assert isinstance(mine, torch.nn.LinearCrossEntropyLoss) and vars(mine).keys() >= vars(theirs).keys()
    assert repr(mine) == repr(theirs)
    h, target = torch.randn(N, D, dtype=torch.float64), torch.randint(C, (N, *out_features))
    assert_same([mine(h, target)], [theirs(h, target)])


@pytest.mark.parametrize(
    "options", [{"label_smoothing": 2.0}, {"reduction": "max"}, {"temperature": 0.0}, {"weight": torch.ones(C + 1)}]
)
def test_module_checks_its_options_when_it_is_made(options):
    with pytest.raises((ValueError, RuntimeError)):
        adapter.LinearCrossEntropyLoss(D, C, **options)


# ------------------------------------------------------------------------------------------ memory

GROWTH = """
import torch
from ce_fast import measure
from ce_fast.adapters.torch import linear_cross_entropy
torch.set_num_threads(2)
def made(n_rows, n_classes, n_features):
    layer = [torch.randn(n, n_features, requires_grad=True) for n in (n_rows, n_classes)]
    target = torch.randint(n_classes, (n_rows,))
    return lambda: linear_cross_entropy(*layer, target).backward()
made(64, 64, 32)()
print(measure.peak_growth(made(4096, 20000, 128)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_beyond_gradients_it_takes_a_block_of_rows():
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    gradients, mkl = (4096 + 20000) * 128 * 4, 16 * MIB  # places of its own
    assert int(done.stdout) < linear.BLOCK_BYTES + gradients + mkl < 4096 * 20000 * 4 / 3
