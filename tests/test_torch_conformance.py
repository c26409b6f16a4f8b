"""Torch's own samples, modules and errors; what autograd promises; gradients in the memory of the logits."""

import copy
import functools
import pickle
import sys
import threading
import types
import unittest
import warnings

import pytest

torch = pytest.importorskip("torch")
adapter = pytest.importorskip("ce_fast.adapters.torch")
torch_kl = pytest.importorskip("ce_fast.adapters.torch_kl")

F = torch.nn.functional
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NARROW = (torch.float16, torch.bfloat16)
K = 4

pytestmark = pytest.mark.filterwarnings("ignore:reduction", "ignore:.*K-dimensional", "ignore:.*is deprecated")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(7)


# ---------------------------------------------------------------------------------------------------- torch's own tests


def _internal(module):
    with pytest.MonkeyPatch.context() as patch:
        if "expecttest" not in sys.modules:  # which torch's tests derive their TestCase from; the samples need none
            patch.setitem(sys.modules, "expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
        return pytest.importorskip(f"torch.testing._internal.{module}")


MODULES = ["CrossEntropyLoss", "NLLLoss", "BCEWithLogitsLoss", "BCELoss", "KLDivLoss", "LinearCrossEntropyLoss"]
FUNCTIONS = [
    "cross_entropy", "nll_loss", "binary_cross_entropy_with_logits", "binary_cross_entropy", "kl_div",
    "linear_cross_entropy",
]  # fmt: skip


@functools.cache
def module_infos(name):
    if not hasattr(torch.nn, name):
        pytest.skip(f"this torch has no {name}")
    infos = _internal("common_modules").module_db
    return next(info for info in infos if info.module_cls is getattr(torch.nn, name))


def module_inputs(name, dtype):
    info = module_infos(name)
    cases = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True)
    return cases[:: 1 + len(cases) // 150]  # of some 900 of linear_cross_entropy


def made(name, given):
    """(our module, torch's), with the same parameters."""
    args, options = given.constructor_input.args, given.constructor_input.kwargs
    ours, own = (getattr(place, name)(*args, **options) for place in (adapter, torch.nn))
    ours.load_state_dict(own.state_dict())
    return ours, own


def called(module, given, dtype=None):
    """(loss, gradients by the input and the parameters)"""
    input, target = (
        t.detach().to(dtype) if t.is_floating_point() and dtype else t.detach() for t in given.forward_input.args
    )
    if getattr(module, "log_target", False) and module.reduction != "none":
        input, target = (t.nan_to_num(-1.0) for t in (input, target))  # NaN makes a row of the kernels NaN
    leaves = [input.requires_grad_(), *module.parameters()]
    loss = module(input, target)
    return loss.detach(), *torch.autograd.grad(loss, leaves, torch.ones_like(loss))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_modules_give_what_torchs_modules_do_for_torchs_own_inputs(name, dtype):
    given = module_inputs(name, dtype)
    for case in given:
        ours, own = made(name, case)
        expected = called(own, case)
        torch.testing.assert_close(called(ours, case), expected, equal_nan=True)
        small = case.forward_input.args[0].numel() < 100  # torch's references loop over elements
        if case.reference_fn is not None and dtype == torch.float64 and small:
            by_reference = case.reference_fn(ours, *(t.detach() for t in case.forward_input.args))
            torch.testing.assert_close(expected[0], by_reference, equal_nan=True, check_dtype=False)
    assert len(given) >= 6


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_shown_saved_copied_and_moved_as_torchs_are(name):
    seen = set()
    for case in module_inputs(name, torch.float64):
        args, options = case.constructor_input.args, case.constructor_input.kwargs
        if (
            kind := (args, tuple((k, v if isinstance(v, (str, int, float)) else type(v)) for k, v in options.items()))
        ) in seen:
            continue
        seen.add(kind)
        ours, own = made(name, case)
        assert repr(ours) == repr(own)
        assert {k: v.dtype for k, v in ours.state_dict().items()} == {k: v.dtype for k, v in own.state_dict().items()}
        expected = called(ours, case)
        for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            torch.testing.assert_close(called(copied, case), expected, rtol=0, atol=0, equal_nan=True)
            assert all(a.data_ptr() != b.data_ptr() for a, b in zip(copied.buffers(), ours.buffers(), strict=True))
        for dtype in (torch.float32, torch.bfloat16):
            moved, own_moved = copy.deepcopy(ours).to(dtype), copy.deepcopy(own).to(dtype)
            assert all(t.dtype == dtype for t in moved.state_dict().values())
            results, of_torch = called(moved, case, dtype), called(own_moved, case, dtype)
            assert [t.dtype for t in results] == [t.dtype for t in of_torch]


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "NLLLoss", "LinearCrossEntropyLoss"])
def test_modules_refuse_what_torchs_modules_do_with_the_same_kind_of_error(name):
    info = module_infos(name)
    n_refused = 0
    for grad in (False, True):
        for case in info.module_error_inputs_func(info, "cpu", torch.float32, grad, True):
            given = case.module_error_input
            args, options = given.constructor_input.args, given.constructor_input.kwargs
            try:
                module = getattr(adapter, name)(*args, **options)
            except ValueError:  # options are checked here, and of that kind
                assert "label_smoothing" in options or "weight" in options
                continue
            with pytest.raises(case.error_type) as caught:
                module(*given.forward_input.args)
            assert caught.type is case.error_type, (case.error_regex, caught.value)
            n_refused += 1
    assert n_refused >= 2


@functools.cache
def op_infos(name):
    db = _internal("common_methods_invocations").op_db
    return [op for op in db if op.name == f"nn.functional.{name}"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_refuse_torchs_own_error_inputs_with_the_same_kind_of_error(name):
    function, n_refused = getattr(adapter, name), 0
    for op in op_infos(name):
        if op.error_inputs_func is None:
            continue
        for case in op.error_inputs("cpu"):
            sample = case.sample_input
            with pytest.raises(case.error_type) as caught:
                function(sample.input, *sample.args, **sample.kwargs)
            assert caught.type is case.error_type, caught.value
            n_refused += 1
    assert n_refused >= 6 or name != "linear_cross_entropy"


def differentiable(values):
    return [v for v in values if isinstance(v, torch.Tensor) and v.requires_grad]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_linear_cross_entropy_gives_torchs_results_for_torchs_own_samples(dtype):
    if not op_infos("linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    n_taken = 0
    for op in op_infos("linear_cross_entropy")[:1]:
        for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
            results = []
            for function in (adapter.linear_cross_entropy, F.linear_cross_entropy):
                loss = function(sample.input, *sample.args, **sample.kwargs)
                leaves = differentiable([sample.input, *sample.args, *sample.kwargs.values()])
                grads = torch.autograd.grad(loss, leaves, torch.ones_like(loss), allow_unused=True)
                results.append((loss, *(g for g in grads if g is not None)))
            torch.testing.assert_close(*results, equal_nan=True)
            n_taken += 1
    assert n_taken > 10


def test_linear_cross_entropy_passes_gradcheck_twice_on_torchs_own_samples():
    if not op_infos("linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    samples = list(op_infos("linear_cross_entropy")[0].sample_inputs("cpu", torch.float64, requires_grad=True))
    for sample in samples[:: max(1, len(samples) // 20)]:

        def f(x, w, sample=sample):
            return adapter.linear_cross_entropy(x, w, *sample.args[1:], **sample.kwargs)

        given = sample.input, sample.args[0]
        if f(*given).isfinite().all():
            assert torch.autograd.gradcheck(f, given, fast_mode=True)
            assert torch.autograd.gradgradcheck(f, given, fast_mode=True)


# ---------------------------------------------------------------------------------------------------- kl_div

KL_LAYOUTS = {
    "vector": lambda: torch.randn(K),
    "rows": lambda: torch.randn(6, K),
    "in_pieces": lambda: torch.randn(5, 7, 4001),
    "long_row": lambda: torch.randn(1, 150_000),
    "transposed": lambda: torch.randn(300, 700).t(),
    "sliced": lambda: torch.randn(12, 3 * K)[1::2, ::3],
    "expanded": lambda: torch.randn(1, 300).expand(500, 300),
    "channels_last": lambda: torch.randn(2, K, 3, 5).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("layout", KL_LAYOUTS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_kl_div_gives_torchs_float64_results_rounded_once(reduction, layout, log_target, dtype):
    x = KL_LAYOUTS[layout]().log_softmax(-1).to(dtype) if layout != "expanded" else KL_LAYOUTS[layout]().to(dtype)
    y = KL_LAYOUTS[layout]().softmax(-1)
    if not log_target:
        y[..., 0] = 0.0
    y = (y.log() if log_target else y).to(dtype)
    leaf, wide = x.detach().requires_grad_(), x.double().requires_grad_()
    expected = F.kl_div(wide, y.double(), reduction=reduction, log_target=log_target)
    upstream = (torch.rand(expected.shape) + 0.5).to(dtype)
    loss = adapter.kl_div(leaf, y, reduction=reduction, log_target=log_target)
    assert loss.dtype == dtype and loss.shape == expected.shape
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    rounding = torch.finfo(dtype).eps / 2 if dtype in NARROW else 0.0
    terms = float((y.double().exp() if log_target else y.double()).mul(x.double().abs() + 20).max())
    terms *= 1 if reduction == "none" else max(1.0, float(expected.detach().abs()) / terms)
    floor = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    bound = {"rtol": rounding + 16 * eps, "atol": 16 * eps * terms + floor}
    torch.testing.assert_close(loss.detach().double(), expected.detach(), **bound)
    (grad,) = torch.autograd.grad(loss, leaf, upstream)
    (expected_grad,) = torch.autograd.grad(expected, wide, upstream.double())
    assert grad.dtype == dtype and (grad.stride() == leaf.stride() or layout in ("sliced", "expanded"))
    torch.testing.assert_close(grad.double(), expected_grad, rtol=rounding + 8 * eps, atol=floor)
    with torch.no_grad():
        torch.testing.assert_close(
            adapter.kl_div(x, y, reduction=reduction, log_target=log_target), loss.detach(), rtol=0, atol=0
        )


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_kl_div_passes_gradcheck_twice_and_keeps_to_torchs_nan_and_inf(reduction, log_target):
    x = torch.randn(3, K, dtype=torch.float64, requires_grad=True)
    y = torch.rand(3, K, dtype=torch.float64)

    def f(x):
        return adapter.kl_div(x, y, reduction=reduction, log_target=log_target)

    assert torch.autograd.gradcheck(f, (x,), check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x,), fast_mode=True)
    strange = torch.tensor([torch.nan, torch.inf, -torch.inf, -1.0, 0.0, 1.0], dtype=torch.float64)
    x, y = (t.reshape(-1).contiguous() for t in torch.meshgrid(strange, strange, indexing="ij"))
    options = {"reduction": "none", "log_target": log_target}
    torch.testing.assert_close(adapter.kl_div(x, y, **options), F.kl_div(x, y, **options), equal_nan=True)


def test_kl_div_does_not_keep_its_input_and_notices_a_changed_target():
    leaf, y = torch.randn(3, K, requires_grad=True), torch.rand(3, K)
    x = leaf * 1
    loss = adapter.kl_div(x, y, reduction="sum")
    x.mul_(0)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf, retain_graph=True)[0], -y)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------------------------------------------- in place

IN_PLACE = {
    "cross_entropy": lambda x, t, **o: adapter.cross_entropy(x, t, **o),
    "soft": lambda x, t, **o: adapter.cross_entropy(x, F.one_hot(t, x.shape[1]).movedim(-1, 1).to(x.dtype), **o),
    "all": lambda x, t, **o: adapter.cross_entropy(
        x, t, torch.ones(x.shape[1]).to(x.dtype), ignore_index=1, label_smoothing=0.1, z_loss=0.01, softcap=5.0, **o
    ),
    "focal": lambda x, t, **o: adapter.focal_loss(x, t, gamma=1.5, **o),
    "poly": lambda x, t, **o: adapter.poly_loss(x, t, temperature=2.0, **o),
    "generalized": lambda x, t, **o: adapter.generalized_cross_entropy(x, t, **o),
    "module": lambda x, t, **o: adapter.FocalLoss(gamma=0.5, **o)(x, t),
}
BASES = {  # name -> (leaf, what the logits are of a copy of it)
    "rows": ((6, K), lambda base: base),
    "wide": ((3, 5000), lambda base: base),
    "transposed": ((K, 6), lambda base: base.t()),
    "sliced": ((12, 3 * K), lambda base: base[1::2, ::3]),
    "shifted": ((3, 6, K), lambda base: base[:, :-1].movedim(-1, 1)),
    "channels_last": ((2, 3, 5, K), lambda base: base.movedim(-1, 1)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_in_place_gradients_have_the_same_bits_and_lie_where_the_logits_were(reduction, name, dtype):
    for shape, view in BASES.values():
        leaf, results = torch.randn(shape).to(dtype).requires_grad_(), []
        for in_place in (False, True):
            whole = leaf * 2
            logits, around = view(whole), whole.detach().clone()
            target = (logits.detach().float().argmax(1) + 1) % logits.shape[1]
            places: list[int] = []
            logits.register_hook(lambda grad, places=places: places.append(grad.data_ptr()))  # before: torch's rule
            loss = IN_PLACE[name](logits, target, reduction=reduction, inplace_backward=in_place)
            upstream = torch.linspace(0.5, 3, loss.numel()).reshape(loss.shape).to(loss.dtype)
            (grad,) = torch.autograd.grad(loss, leaf, upstream)
            assert (places == [logits.data_ptr()]) == (whole._version > 0) == in_place
            results.append((loss.detach(), grad))
        view(around).copy_(view(grad / 2))
        assert torch.equal(around, whole.detach())  # nothing outside of the logits has changed
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def in_place_loss(leaf, **options):
    logits = leaf * 1
    return logits, adapter.cross_entropy(logits, torch.tensor([0, 1, 2]), inplace_backward=True, **options)


LATE = [  # (dtype, reduction) whose logits are overwritten in backward, and not at once
    (torch.float32, "none"), (torch.float16, "mean"), (torch.bfloat16, "sum"),
]  # fmt: skip
AT_ONCE = [(torch.float64, "mean"), (torch.float32, "sum")]


@pytest.mark.parametrize("dtype, reduction", [*AT_ONCE, *LATE], ids=str)
def test_in_place_a_second_backward_raises(dtype, reduction):
    _, loss = in_place_loss(torch.randn(3, K, dtype=dtype, requires_grad=True), reduction=reduction)
    loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.sum().backward()


@pytest.mark.parametrize("dtype, reduction", AT_ONCE, ids=str)
def test_in_place_gradients_of_gradients_raise(dtype, reduction):
    leaf = torch.randn(3, K, dtype=dtype, requires_grad=True)
    _, loss = in_place_loss(leaf, reduction=reduction)
    with pytest.raises(RuntimeError, match="inplace_backward"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    _, loss = in_place_loss(leaf, reduction=reduction)
    with pytest.raises(RuntimeError, match="inplace_backward"):
        torch.autograd.grad(loss, leaf, torch.ones(2, dtype=dtype), is_grads_batched=True)


@pytest.mark.parametrize("dtype, reduction", LATE, ids=str)
def test_logits_that_are_still_there_have_gradients_of_gradients(dtype, reduction):
    leaf = torch.randn(3, K, dtype=dtype, requires_grad=True)
    logits, loss = in_place_loss(leaf, reduction=reduction)
    assert torch.equal(logits, leaf) and logits._version == 0
    plain = adapter.cross_entropy(leaf, torch.tensor([0, 1, 2]), reduction=reduction)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), leaf, create_graph=True)[0] for x in (loss, plain)))


@pytest.mark.parametrize("dtype, reduction", [*AT_ONCE, *LATE], ids=str)
def test_other_uses_of_logits_that_were_overwritten_raise_in_backward(dtype, reduction):
    leaf = torch.randn(3, K, dtype=dtype, requires_grad=True)
    logits = leaf.tanh()  # whose backward reads its result
    other = logits.pow(2).sum()
    loss = adapter.cross_entropy(logits, torch.tensor([0, 1, 2]), reduction=reduction, inplace_backward=True).sum()
    torch.autograd.grad(loss, logits, retain_graph=True)
    for changed in (loss, other):
        with pytest.raises(RuntimeError, match="inplace"):
            changed.backward(retain_graph=True)
    logits = leaf.tanh()
    loss = adapter.cross_entropy(logits, torch.tensor([0, 1, 2]), reduction=reduction, inplace_backward=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_refuses_leaves_their_views_and_expanded_logits():
    leaf, target = torch.randn(3, K, requires_grad=True), torch.tensor([0, 1, 2])
    for logits, what in (
        (leaf, "leaf"), (leaf.view(3, K), "leaf"), (leaf[:, 1:], "leaf"), ((leaf * 1)[:1].expand(3, K), "expanded")
    ):  # fmt: skip
        before = logits.detach().clone()
        with pytest.raises(RuntimeError, match=what):
            adapter.cross_entropy(logits, target, inplace_backward=True)
        assert torch.equal(logits.detach(), before)
    logits = leaf.softmax(1)
    with pytest.raises(ValueError, match="overlaps"):
        adapter.cross_entropy(logits, logits.detach(), inplace_backward=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_in_place_changes_nothing_where_no_gradient_is_needed_or_the_call_is_recorded(reduction):
    leaf, target = torch.randn(3, K, requires_grad=True), torch.tensor([0, 1, 2])

    def f(x):
        return adapter.cross_entropy(x, target, reduction=reduction, inplace_backward=True).sum()

    logits = leaf * 1
    with torch.no_grad():
        f(logits)
    f(logits.detach())
    torch.func.grad(f)(logits.detach())
    torch.func.vmap(f)(logits.detach()[None])
    value = torch.compile(f, backend="eager")(logits)
    (grad,) = torch.autograd.grad(value, leaf)
    assert torch.equal(logits, leaf) and logits._version == 0
    torch.testing.assert_close(grad, torch.autograd.grad(f(leaf * 1), leaf)[0])


def test_refused_targets_leave_the_logits_as_they_were():
    leaf = torch.randn(3, K, requires_grad=True)
    logits = leaf * 1
    with pytest.raises(IndexError, match=r"target\[2\] is 4"):
        adapter.cross_entropy(logits, torch.tensor([0, 1, K]), inplace_backward=True)
    assert torch.equal(logits, leaf)


def test_in_place_modules_say_so():
    assert repr(adapter.CrossEntropyLoss(inplace_backward=True)) == "CrossEntropyLoss(inplace_backward=True)"
    assert repr(adapter.PolyLoss()) == "PolyLoss()"


# ---------------------------------------------------------------------------------------------------- autograd

LOSSES = {  # of logits or probabilities (0, 1), and class indices
    "cross_entropy": lambda x, t: adapter.cross_entropy(x, t),
    "focal": lambda x, t: adapter.focal_loss(x, t),
    "nll": lambda x, t: adapter.nll_loss(x, t),
    "bce_logits": lambda x, t: adapter.binary_cross_entropy_with_logits(x, torch.ones_like(x)),
    "bce": lambda x, t: adapter.binary_cross_entropy(x, torch.ones_like(x)),
    "kl_div": lambda x, t: adapter.kl_div(x, torch.ones_like(x) / K, reduction="sum"),
    "kl_div_none": lambda x, t: adapter.kl_div(x, torch.ones_like(x) / K, reduction="none").sum(),
    "in_place": lambda x, t: adapter.cross_entropy(x * 1, t, inplace_backward=True),
    "linear": lambda x, t: adapter.linear_cross_entropy(x, torch.ones(3, K, dtype=x.dtype), t),
}


@pytest.mark.parametrize("name", LOSSES)
def test_anomaly_mode_finds_a_nan_in_our_node_and_raises_no_false_alarm(name):
    x, t = torch.rand(3, K, requires_grad=True), torch.tensor([0, 1, 2])
    with warnings.catch_warnings(), torch.autograd.detect_anomaly(check_nan=True):
        warnings.simplefilter("ignore")
        LOSSES[name](x, t).backward()
        assert x.grad.isfinite().all()
        with pytest.raises(RuntimeError, match=r"'(_Kernels|_Node|Sum)Backward0?' returned nan"):
            LOSSES[name](x, t).backward(torch.tensor(torch.nan))


@pytest.mark.parametrize("name", LOSSES)
def test_retain_grad_and_hooks_see_what_reaches_the_input(name):
    leaf, t, seen = torch.rand(3, K, requires_grad=True), torch.tensor([0, 1, 2]), []
    x = leaf * 1
    x.retain_grad()
    x.register_hook(lambda grad: seen.append(grad.clone()))
    LOSSES[name](x, t).backward()
    (expected,) = torch.autograd.grad(LOSSES[name](leaf, t), leaf)
    assert len(seen) == 1
    for grad in (seen[0], x.grad, leaf.grad):
        assert torch.equal(grad, expected)
    handle = leaf.register_hook(lambda grad: 2 * grad)  # a hook may replace it
    assert torch.equal(torch.autograd.grad(LOSSES[name](leaf * 1, t), leaf)[0], 2 * expected)
    handle.remove()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradient(name, use_reentrant):
    x, t = torch.rand(3, K, requires_grad=True), torch.tensor([0, 1, 2])

    def f(x):
        return LOSSES[name](2 * x / 2, t)

    torch.utils.checkpoint.checkpoint(f, x, use_reentrant=use_reentrant).backward()
    (expected,) = torch.autograd.grad(f(x), x)
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("name", ["cross_entropy", "kl_div_none"])
def test_saved_tensors_can_be_kept_elsewhere(name):
    x, t = torch.rand(3, K, requires_grad=True), torch.tensor([0, 1, 2])
    with torch.autograd.graph.save_on_cpu():
        loss = LOSSES[name](x, t)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(torch.autograd.grad(loss, x)[0], first)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 1])
def test_micro_batches_with_a_number_for_denominator_add_up_to_one_batch(ignore_index, in_place):
    layer, x = torch.nn.Linear(5, K).double(), torch.randn(12, 5, dtype=torch.float64)
    t = torch.randint(K, (12,))
    options = {"ignore_index": ignore_index, "inplace_backward": in_place}
    F.cross_entropy(layer(x), t, ignore_index=ignore_index).backward()
    expected = [p.grad for p in layer.parameters()]
    layer.zero_grad()
    count = float((t != ignore_index).sum())
    total = 0.0
    for rows, target in zip(x.split(3), t.split(3), strict=True):
        loss = adapter.cross_entropy(layer(rows), target, denominator=count, **options)
        loss.backward()
        total += loss.item()
    torch.testing.assert_close([p.grad for p in layer.parameters()], expected)
    torch.testing.assert_close(total, F.cross_entropy(layer(x), t, ignore_index=ignore_index).item())


@pytest.mark.parametrize("in_place", [False, True])
def test_a_grad_scaler_saves_float16_gradients_that_would_be_0(in_place):
    leaf = torch.randn(64, K).half().requires_grad_()
    t, scaler = torch.randint(K, (64,)), torch.amp.GradScaler("cpu", init_scale=2.0**14)
    options = {"denominator": 2.0**26, "inplace_backward": in_place}  # gradients below 2^-25
    adapter.cross_entropy(leaf * 1, t, **options).backward()
    assert (leaf.grad == 0).all()
    leaf.grad = None
    scaler.scale(adapter.cross_entropy(leaf * 1, t, **options).double()).backward()
    wide = leaf.detach().double().requires_grad_()
    (F.cross_entropy(wide, t, reduction="sum") * 2.0**-12).backward()
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=0.51 * torch.finfo(torch.float16).eps, atol=2.0**-25)


# ---------------------------------------------------------------------------------------------------- strange tensors

CALLS = {
    "cross_entropy": ("cross_entropy", "index", {}),
    "cross_entropy_soft": ("cross_entropy", "same", {}),
    "cross_entropy_none": ("cross_entropy", "index", {"reduction": "none"}),
    "nll_loss": ("nll_loss", "index", {}),
    "bce_logits": ("binary_cross_entropy_with_logits", "same", {}),
    "bce": ("binary_cross_entropy", "same", {}),
    "kl_div": ("kl_div", "same", {"reduction": "batchmean"}),
    "kl_div_log": ("kl_div", "same", {"reduction": "sum", "log_target": True}),
    "kl_div_none": ("kl_div", "same", {"reduction": "none"}),
}
STRANGE = {
    "channels_last_3d": lambda: torch.rand(2, K, 2, 3, 5).to(memory_format=torch.channels_last_3d),
    "negative_bit": lambda: torch._neg_view(-torch.rand(6, K)),
    "imaginary_part_of_a_conjugate": lambda: torch.complex(torch.zeros(6, K), -torch.rand(6, K)).conj().imag,
    "real_part_of_a_conjugate": lambda: torch.complex(torch.rand(6, K), torch.rand(6, K)).conj().real,
    "flipped": lambda: torch.rand(6, K).flip(0),
    "unfolded": lambda: torch.rand(9).unfold(0, K, 1),
    "strided": lambda: torch.rand(40).as_strided((6, K), (5, 1), 3),
    "one_row": lambda: torch.rand(1, K),
    "one_class": lambda: torch.rand(6, 1),
    "vector": lambda: torch.rand(K),
    "number": lambda: torch.rand(()),
    "no_rows": lambda: torch.rand(0, K),
    "no_classes": lambda: torch.rand(6, 0),
    "no_pixels": lambda: torch.rand(2, K, 0),
    "complex": lambda: torch.rand(6, K, dtype=torch.complex64),
    "conjugate": lambda: torch.rand(6, K, dtype=torch.complex64).conj(),
    "integer": lambda: torch.ones(6, K, dtype=torch.int64),
    "bool": lambda: torch.ones(6, K, dtype=torch.bool),
    "float8": lambda: torch.rand(6, K).to(torch.float8_e4m3fn),
    "sparse": lambda: torch.rand(6, K).to_sparse(),
    "sparse_csr": lambda: torch.rand(6, K).to_sparse_csr(),
    "meta": lambda: torch.rand(6, K, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.rand(6, K), 0.1, 0, torch.quint8),
    "mkldnn": lambda: torch.rand(6, K).to_mkldnn(),
    "parameter": lambda: torch.nn.Parameter(torch.rand(6, K)),
    "inference": lambda: torch.inference_mode()(torch.rand)(6, K),
}
NO_LEAF = ("complex", "conjugate", "integer", "bool", "quantized", "inference")  # of which none has a gradient here
ERRORS = (RuntimeError, ValueError, TypeError, IndexError)


def outcome(function, input, target, options, leaf):
    """What a call gives: (loss, gradient if the input is to have one), or the kind of error."""
    if leaf:
        input = input.detach().requires_grad_()
    try:
        loss = function(input, target, **options)
        return loss, *(torch.autograd.grad(loss.sum(), input) if leaf else ())
    except ERRORS as error:
        return type(error)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "strange, leaf", [*((name, False) for name in STRANGE), *((name, True) for name in STRANGE if name not in NO_LEAF)]
)
@pytest.mark.parametrize("name", CALLS)
def test_strange_tensors_give_what_torch_gives_or_the_same_kind_of_error(name, strange, leaf):
    function, kind, options = CALLS[name]
    try:
        input = STRANGE[strange]()
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this torch makes no such tensor: {error}")
    shape = input.shape[:1] + input.shape[2:] if input.ndim > 1 else ()
    index = torch.zeros(shape, dtype=torch.long, device="meta" if input.is_meta else "cpu")
    target = index if kind == "index" else input.detach().clone()
    ours, expected = (outcome(getattr(place, function), input, target, options, leaf) for place in (adapter, F))
    if strange == "no_classes" and kind == "same" and function == "cross_entropy":
        assert ours is ValueError  # where torch's loss is NaN
    elif isinstance(expected, type) or isinstance(ours, type):
        assert ours is expected
    elif strange == "meta":
        assert [(t.shape, t.dtype, t.device) for t in ours] == [(t.shape, t.dtype, t.device) for t in expected]
    else:
        torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.parametrize("name", CALLS)
def test_views_of_a_leaf_that_requires_grad_pass_their_gradient_on(name):
    function, kind, options = CALLS[name]
    leaf = torch.rand(2, 9, 2 * K, requires_grad=True)
    results = []
    for place in (adapter, F):
        input = leaf[:, 1:-1, ::2].flatten(0, 1)[1:]
        target = torch.zeros(len(input), dtype=torch.long) if kind == "index" else input.detach()
        loss = getattr(place, function)(input, target, **options)
        results.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n in CALLS if n != "bce"])  # which torch forbids under autocast
def test_results_under_autocast_have_the_dtypes_of_torch(name, dtype, autocast):
    function, kind, options = CALLS[name]
    input = torch.rand(6, K).to(dtype)
    target = torch.zeros(6, dtype=torch.long) if kind == "index" else torch.rand(6, K).to(dtype)
    with torch.autocast("cpu", dtype=autocast):
        ours, expected = (outcome(getattr(place, function), input, target, options, True) for place in (adapter, F))
    assert [t.dtype for t in ours] == [t.dtype for t in expected]
    assert ours[0].dtype == torch.promote_types(dtype, torch.float32)


def test_logits_are_overwritten_by_one_loss():
    logits, target = torch.randn(6, K, requires_grad=True) * 1, torch.randint(K, (6,))
    adapter.cross_entropy(logits, target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="taken already"):
        adapter.cross_entropy(logits, target, inplace_backward=True)
    with torch.no_grad():
        logits.normal_()  # new ones in the same memory
    assert adapter.cross_entropy(logits, target, inplace_backward=True).isfinite()


@pytest.mark.parametrize("log_target", [False, True])
def test_kl_div_of_many_elements_runs_in_inference_mode(log_target):
    input, target = torch.randn(400, 300).log_softmax(1), torch.randn(400, 300).softmax(1)
    input, target = input.bfloat16(), (target.log() if log_target else target).bfloat16()
    with torch.inference_mode():
        ours, torchs = (place.kl_div(input, target, reduction="none", log_target=log_target) for place in (adapter, F))
    torch.testing.assert_close(ours, torchs, rtol=2e-2, atol=2e-3)  # torch rounds every operation


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_threads_of_kl_div_record_no_graph(context, monkeypatch):
    recorded, losses_of = [], torch_kl._losses

    def losses_seen(input, target, ctx):
        recorded.append((torch.is_grad_enabled(), threading.get_ident()))
        return losses_of(input, target, ctx)

    monkeypatch.setattr(torch_kl, "_losses", losses_seen)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    input = torch.randn(400, 300).log_softmax(1).requires_grad_()
    with context():
        adapter.kl_div(input, torch.randn(400, 300), reduction="none", log_target=True)
    assert {grad for grad, _ in recorded} == {False}
    assert threading.get_ident() not in {thread for _, thread in recorded}
