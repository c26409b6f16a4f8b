"""The kernels as torch's operations: what compiles, exports, batches or differentiates a call sees them whole."""

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
adapter = pytest.importorskip("ce_fast.adapters.torch")
autograd = pytest.importorskip("ce_fast.adapters.torch_autograd")
ops = pytest.importorskip("ce_fast.adapters.torch_ops")

F, func = torch.nn.functional, torch.func
K = 4
WEIGHT = torch.tensor([0.5, 2.0, 0.25, 1.0], dtype=torch.float64)
POSITIVE = torch.tensor(3.0, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(7)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def runs(monkeypatch):
    """The kinds of losses that the kernels ran for."""
    kinds, own = [], autograd.loss_of

    def spy(kind, *args):
        kinds.append(kind.__name__)
        return own(kind, *args)

    monkeypatch.setattr(autograd, "loss_of", spy)
    return kinds


def indices(*shape):
    return torch.randint(K, shape[:1] + shape[2:] if len(shape) > 1 else ())


def probabilities(*shape):
    return torch.rand(shape, dtype=torch.float64)


def logits(*shape):
    return torch.randn(shape, dtype=torch.float64)


def focal(x, t, reduction="mean"):
    n = F.cross_entropy(x, t, reduction="none")
    losses = n * (1 - torch.exp(-n)) ** 1.5
    return losses if reduction == "none" else getattr(losses, reduction)()


def sigmoid_focal(x, y, reduction="mean"):
    n, p = F.binary_cross_entropy_with_logits(x, y, reduction="none"), torch.sigmoid(x)
    losses = (0.25 * y + 0.75 * (1 - y)) * (p + y - 2 * p * y) ** 2 * n
    return losses if reduction == "none" else getattr(losses, reduction)()


def with_options(function, *args, **options):
    return lambda x, t, reduction="mean": function(x, t, *args, reduction=reduction, **options)


SOME = {"ignore_index": 1, "label_smoothing": 0.1}
# ours; torch's own, or the formula in torch's operations; what makes a target
PAIRS = {
    "indices": (adapter.cross_entropy, F.cross_entropy, indices),
    "soft": (adapter.cross_entropy, F.cross_entropy, probabilities),
    "weight": (
        with_options(adapter.cross_entropy, WEIGHT, **SOME),
        with_options(F.cross_entropy, WEIGHT, **SOME),
        indices,
    ),
    "focal": (with_options(adapter.focal_loss, gamma=1.5), focal, indices),
    "nll": (with_options(adapter.nll_loss, WEIGHT), with_options(F.nll_loss, WEIGHT), indices),
    "bce_logits": (
        with_options(adapter.binary_cross_entropy_with_logits, pos_weight=POSITIVE),
        with_options(F.binary_cross_entropy_with_logits, pos_weight=POSITIVE),
        probabilities,
    ),
    "sigmoid_focal": (with_options(adapter.sigmoid_focal_loss), sigmoid_focal, probabilities),
}
REDUCTIONS = ["mean", "sum", "none"]
pairs = pytest.mark.parametrize("name", PAIRS)


def agree(transform, name, **options):
    """What the transform makes of our loss is what it makes of torch's."""
    (ours, expected, _), how = PAIRS[name], {"rtol": 1e-11, "atol": 1e-13}
    results = [transform(lambda x, t, f=f: f(x, t, **options)) for f in (ours, expected)]
    torch.testing.assert_close(*results, **how)


# ---------------------------------------------------------------------------------------------------- operations


def arguments():
    """What calls hand to the operations."""
    x, t, y = logits(3, K, 2), indices(3, K, 2), probabilities(3, K, 2)
    s = torch.tensor([[0.0, 1.0], [0.5, 2.0], [1.0, 1.0]])
    for reduction in REDUCTIONS:
        how = {"reduction": reduction}
        yield lambda how=how: adapter.cross_entropy(x, t, WEIGHT, z_loss=0.1, sample_weight=s, **how)
        yield lambda how=how: adapter.cross_entropy(x.float(), y, label_smoothing=0.1, softcap=3.0, **how)
        yield lambda how=how: adapter.focal_loss(logits(3, 2, K).movedim(1, 2), t, alpha=WEIGHT, **how)
        yield lambda how=how: adapter.poly_loss(x[:1].expand(3, K, 2), t, **how)
        yield lambda how=how: adapter.generalized_cross_entropy(x[:1, :, :1], t[:1, :1], q=0.5, **how)
        yield lambda how=how: adapter.cross_entropy(x[0, :, 0].bfloat16(), t[0, 0], temperature=2.0, **how)
        yield lambda how=how: adapter.nll_loss(x, t.int(), WEIGHT, **how)
        yield lambda how=how: adapter.binary_cross_entropy_with_logits(x.half(), y.half(), **how)
        yield lambda how=how: adapter.sigmoid_focal_loss(x[0].t(), y[0].t(), **how)
        yield lambda how=how: adapter.kl_div_with_logits(x[::2], y[::2], **how)
        yield lambda how=how: adapter.distillation_loss(x, y, t, weight=WEIGHT, **how)


@pytest.fixture
def handed(monkeypatch):
    """What a call hands to the operation."""

    def catch(call):
        caught = []
        with monkeypatch.context() as patch:
            patch.setattr(autograd, "_recorded", lambda: True)
            patch.setattr(ops, "_apply", lambda _, *args: caught.append(args) or torch.zeros(()))
            call()
        return caught[0]

    return catch


def test_operations_pass_opcheck(handed):
    for n, call in enumerate(arguments()):
        args = handed(call)
        value = torch.ops.ce_fast.loss(*args)
        utils = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        utils = utils[: 4 if n % 11 == 3 * (n // 11) else 3]
        torch.library.opcheck(torch.ops.ce_fast.loss, args, test_utils=utils)
        torch.library.opcheck(torch.ops.ce_fast.loss_gradient, (value, *args), test_utils=utils)


def test_operations_that_are_differentiated_pass_opcheck(handed):
    x, t = logits(3, K).requires_grad_(), indices(3, K)
    args = handed(lambda: adapter.cross_entropy(x, t, WEIGHT, reduction="none"))
    torch.library.opcheck(torch.ops.ce_fast.loss, args)
    args = torch.rand(3, dtype=torch.float64, requires_grad=True), *args
    torch.library.opcheck(torch.ops.ce_fast.loss_gradient, args)


@pairs
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_operations_pass_gradcheck_to_the_second_order(name, reduction, handed):
    x, make = logits(2, K).requires_grad_(), PAIRS[name][2]
    t = make(2, K)

    def loss(x, t):
        _, _, *args = handed(lambda: PAIRS[name][0](x, t.detach(), reduction=reduction))
        return torch.ops.ce_fast.loss(x, t, *args)

    wanted = (x, t.requires_grad_()) if t.is_floating_point() else (x,)
    f = loss if t.is_floating_point() else lambda x: loss(x, t)
    assert torch.autograd.gradcheck(f, wanted, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, wanted, fast_mode=True)


# ---------------------------------------------------------------------------------------------------- torch.func


@pairs
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_derivatives_of_any_order_equal_torchs(name, reduction, runs):
    x, t = logits(3, K), PAIRS[name][2](3, K)
    by = (0, 1) if t.is_floating_point() else 0
    agree(lambda f: func.jacrev(f)(x, t), name, reduction=reduction)
    agree(lambda f: func.grad(lambda x: func.jacrev(f)(x, t).pow(2).sum())(x), name, reduction=reduction)
    assert set(runs) == {runs[0]} and len(runs) >= 4
    agree(lambda f: func.jacrev(func.jacrev(f))(x, t), name, reduction=reduction)
    agree(lambda f: func.hessian(f)(x, t), name, reduction=reduction)
    agree(lambda f: func.grad(lambda x, t: f(x, t).pow(2).sum(), by)(x, t), name, reduction=reduction)
    agree(lambda f: func.jvp(f, (x, t), (x, t)) if by else func.jvp(lambda x: f(x, t), (x,), (x,)), name)


DIMS = [(0, 0), (1, 0), (2, 1), (-1, -1), (0, None), (2, None), (None, 0), (None, 1)]


def second(f):
    return func.grad(lambda x, t: func.grad(f)(x, t).pow(2).sum())


@pytest.mark.parametrize("name", ["indices", "soft", "nll", "bce_logits"])
@pytest.mark.parametrize("shape", [(K,), (3, K), (2, K, 3)], ids=str)
def test_batches_along_any_axis_equal_torchs(name, shape, runs):
    make = PAIRS[name][2]
    xs, ts = logits(5, *shape), torch.stack([make(*shape) for _ in range(5)])
    for (of_x, of_t), transform in [*((d, func.grad) for d in DIMS), ((0, 0), second), ((None, 0), second)]:
        of_x, of_t = (d if d is None else max(-n, min(d, n - 1)) for d, n in ((of_x, xs.ndim), (of_t, ts.ndim)))
        x = xs[0] if of_x is None else xs.movedim(0, of_x)
        t = ts[0] if of_t is None else ts.movedim(0, of_t)
        for reduction in REDUCTIONS:

            def batched(f, transform=transform, x=x, t=t, dims=(of_x, of_t)):
                of_sum = transform(lambda x, t: f(x, t).sum())
                return func.vmap(lambda x, t: (f(x, t), of_sum(x, t)), dims)(x, t)

            agree(batched, name, reduction=reduction)
    assert runs


def test_batches_of_weights_equal_a_loop():
    x, t, w, s = logits(3, 4, K), torch.randint(K, (3, 4)), torch.rand(3, K).double(), torch.rand(3, 4).double()
    for reduction, denominator in (("mean", "weight"), ("mean", "count"), ("mean", "total"), ("mean", 7), ("sum", 7)):

        def loss(x, t, w, s, r=reduction, d=denominator):
            return adapter.cross_entropy(x, t, w, sample_weight=s, ignore_index=1, reduction=r, denominator=d)

        for dims in ((0, 0, None, 0), (0, 0, 0, None), (None, None, None, 0)):
            given = [v[0] if d is None else v for v, d in zip((x, t, w, s), dims, strict=True)]
            expected = [
                func.grad_and_value(loss)(*(v if d is None else v[i] for v, d in zip(given, dims, strict=True)))
                for i in range(3)
            ]
            actual = func.vmap(func.grad_and_value(loss), dims)(*given)
            torch.testing.assert_close(actual, tuple(map(torch.stack, zip(*expected, strict=True))))
    y, pos, s = probabilities(3, 4, K), torch.rand(3, K).double(), torch.rand(3, 4).double()
    for dims in ((0, 0, None, 0), (0, None, 0, None), (0, 0, None, None)):
        given = [v[0] if d is None else v for v, d in zip((x, y, pos, s), dims, strict=True)]

        def binary(x, y, pos, s):
            return adapter.binary_cross_entropy_with_logits(x, y, pos_weight=pos, sample_weight=s)

        expected = [
            func.grad(binary)(*(v if d is None else v[i] for v, d in zip(given, dims, strict=True))) for i in range(3)
        ]
        torch.testing.assert_close(func.vmap(func.grad(binary), dims)(*given), torch.stack(expected))


def test_batched_means_over_nothing_are_nan_and_their_gradients_0():
    x, t = logits(2, 3, K), torch.tensor([[0, 1, 2], [-100, -100, -100]])
    losses = func.vmap(adapter.cross_entropy)(x, t)
    assert losses[0].isfinite() and losses[1].isnan()
    grads = func.vmap(func.grad(adapter.cross_entropy))(x, t)
    assert grads[0].ne(0).all() and grads[1].eq(0).all()


def test_a_target_tracked_outside_of_a_batch_gets_its_gradient():
    x, y = logits(3, K), probabilities(3, K)
    for inner in (lambda f: f, func.grad):
        agree(lambda f, inner=inner: func.grad(lambda y: func.vmap(inner(f))(x, y).pow(2).sum())(y), "soft")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_gradients_of_batches_are_rounded_once(dtype):
    x, t = torch.randn(5, 3, K).to(dtype), torch.randint(K, (5, 3))
    losses, grads = func.vmap(adapter.cross_entropy)(x, t), func.vmap(func.grad(adapter.cross_entropy))(x, t)
    assert losses.dtype == grads.dtype == dtype
    expected = func.vmap(func.grad(F.cross_entropy))(x.double(), t)
    torch.testing.assert_close(grads.double(), expected, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- graphs


def step(f):
    def losses(x, t):
        loss = f(x, t)
        return loss, torch.autograd.grad(loss.sum(), x)[0]

    return losses


@pytest.mark.parametrize(
    "name, reduction", [("weight", "mean"), ("focal", "none"), ("nll", "sum"), ("bce_logits", "mean")]
)
def test_a_compiled_loss_runs_the_kernels_and_is_compiled_once_for_any_number_of_rows(name, reduction, runs):
    ours, expected, make = PAIRS[name]
    compiled = torch.compile(
        lambda x, t: ours(x * 2, t, reduction=reduction), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for n in (3, 5, 8):
        x, t = logits(n, K).requires_grad_(), make(n, K)
        runs.clear()
        actual = step(compiled)(x, t)
        assert len(runs) == 2
        torch.testing.assert_close(actual, step(lambda x, t: expected(x * 2, t, reduction=reduction))(x, t))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_inductor_runs_the_kernels_between_its_own(dtype, runs):
    x, t = torch.randn(6, 3, K).to(dtype).transpose(1, 2).requires_grad_(), torch.randint(K, (6, 3))

    def loss(x, t):
        return adapter.cross_entropy((x * 2).transpose(0, 0), t, label_smoothing=0.1, z_loss=0.01) * 3

    actual = step(torch.compile(loss, fullgraph=True))(x, t)
    assert runs == ["CrossEntropy"] * 2
    assert actual[0].dtype == actual[1].dtype == dtype and actual[1].stride() == x.stride()
    torch.testing.assert_close(actual, step(loss)(x, t))


def test_a_number_that_changes_is_not_compiled_again(runs):
    x, t = logits(3, K), indices(3, K)
    compiled = torch.compile(
        lambda x, t, to: adapter.cross_entropy(x, t, temperature=to), backend="eager", fullgraph=True, dynamic=True
    )
    for temperature in (2.0, 3.0, 0.5, 4.0, 5.0):
        expected = F.cross_entropy(x / temperature, t)
        torch.testing.assert_close(compiled(x, t, temperature), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_compiled_transforms_and_targets_with_gradients_equal_torchs():
    x, y = logits(3, K), probabilities(3, K)

    def compiled(f):
        torch._dynamo.reset()
        return torch.compile(f, backend="eager", fullgraph=True)

    agree(lambda f: compiled(func.vmap(func.grad(f)))(x, y), "soft")
    y.requires_grad_()
    agree(lambda f: torch.autograd.grad(compiled(f)(x, y), y), "soft")


def test_a_compiled_call_checks_options_targets_and_shapes():
    x, t = logits(3, K), indices(3, K)
    for options, message in (({"label_smoothing": 2.0}, "label_smoothing is 2"), ({"reduction": "max"}, "max")):
        with pytest.raises(Exception, match=message):
            torch.compile(with_reduction(**options), backend="eager", fullgraph=True)(x, t)
    compiled = torch.compile(adapter.cross_entropy, backend="eager", fullgraph=True)
    with pytest.raises(IndexError, match=r"target\[1\] is 9"):
        compiled(x, torch.tensor([0, 9, 0]))
    with pytest.raises(Exception, match="shape"):
        compiled(x, t[:2])


def with_reduction(**options):
    return lambda x, t: adapter.cross_entropy(x, t, **options)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, K).double()
        self.loss = adapter.CrossEntropyLoss(WEIGHT, label_smoothing=0.1, softcap=5.0)

    def forward(self, x, t):
        return self.loss(self.linear(x), t)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_module_keeps_the_loss_whole_and_can_be_trained(strict, runs):
    model, rows = Model(), torch.export.Dim("rows")
    given = logits(5, 3), torch.randint(K, (5,))
    shapes = {"x": {0: rows}, "t": {0: rows}}
    program = torch.export.export(model, given, dynamic_shapes=shapes, strict=strict)
    assert [node for node in program.graph.nodes if node.target == torch.ops.ce_fast.loss.default]
    given = logits(7, 3), torch.randint(K, (7,))
    runs.clear()
    exported = program.module()
    loss = exported(*given)
    loss.backward()
    assert runs == ["CrossEntropy"] * 2
    expected = model(*given)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(exported.linear.weight.grad, model.linear.weight.grad)
    assert program.run_decompositions().module()(*given) == loss


def test_make_fx_and_fake_tensors_see_the_operation():
    x, t = logits(3, K), indices(3, K)
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda x, t: func.grad(adapter.cross_entropy)(x, t))(x, t)
    assert any(node.target == torch.ops.ce_fast.loss_gradient.default for node in traced.graph.nodes)
    torch.testing.assert_close(traced(-x, t), func.grad(F.cross_entropy)(-x, t))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        x, t = torch.randn(6, K, 2, requires_grad=True), torch.zeros(6, 2, dtype=torch.long)
        loss = adapter.cross_entropy(x, t, reduction="none", z_loss=1.0)
        assert loss.fake_mode is mode and loss.shape == (6, 2)
        loss.sum().backward()
        assert x.grad.shape == x.shape
        with pytest.raises(ValueError, match="label_smoothing"):
            adapter.cross_entropy(x, t, label_smoothing=2.0, z_loss=1.0)


def test_the_adapter_does_not_import_dynamo():
    code = "import sys, ce_fast.adapters.torch; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0
