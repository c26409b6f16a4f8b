"""The loss family in torch: kernels against each loss's formula, torch's own samples and errors, modules."""

import copy
import functools
import inspect
import itertools
import pickle
import sys
import types
import unittest
import warnings

import pytest

import ce_fast as ce

torch = pytest.importorskip("torch")
adapter = pytest.importorskip("ce_fast.adapters.torch")
torch_ops = pytest.importorskip("ce_fast.adapters.torch_ops")

F = torch.nn.functional
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NARROW = (torch.float16, torch.bfloat16)
K, SHAPE = 4, (3, 4, 2)
WEIGHT, ALPHA = torch.tensor([0.5, 2.0, 0.25, 1.0]), torch.tensor([1.0, 0.5, 0.0, 2.0])  # exact in every dtype
# in units of the compute dtype's eps times the largest logit or result, which the formula's float64 also cancels
ULP = 16


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(7)


# ---------------------------------------------------------------------------------------------------- cases
# name -> (function, what makes its arguments besides the logits: (shape, dtype) -> positional, keyword)


def outer(shape):
    return shape[:1] + shape[2:] if len(shape) > 1 else ()


def row_weights(shape):
    weights = torch.randint(3, shape) * 0.5
    weights.view(-1)[0] = 0.5  # so that a row counts
    return weights


def indices(shape):
    target = torch.randint(K, outer(shape))
    target.view(-1)[0] = 0
    return target


def exact(tensor):
    """Rounded so that every dtype holds it."""
    return (tensor * 16).round() / 16


def by_class(function, *, soft=False, sample_weight=False, **options):
    def make(shape, dtype):
        given = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        if sample_weight:
            given["sample_weight"] = row_weights(outer(shape))
        if soft:
            return (exact(torch.rand(shape)).to(dtype),), given
        return (indices(shape),), given

    return function, make


def by_element(function, *, pos_weight=False, weight=False, sample_weight=None, **options):
    def make(shape, dtype):
        given = dict(options)
        if pos_weight:
            given["pos_weight"] = exact(torch.rand(shape[-1:]) * 3).to(dtype)
        if weight:
            given["weight"] = exact(torch.rand(shape)).to(dtype)
        if sample_weight:
            given["sample_weight"] = row_weights(shape if sample_weight == "element" else shape[:2])
        return (exact(torch.rand(shape)).to(dtype),), given

    return function, make


def by_teacher(function, *, target=None, top=None, sample_weight=False, **options):
    def make(shape, dtype):
        given = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        teacher = exact(torch.randn(shape)).to(dtype)
        axis = min(1, len(shape) - 1)
        if top:
            log_probs, classes = (2 * teacher.float()).log_softmax(axis).topk(top, axis)
            teacher = classes, exact(log_probs - 1 / 16).to(dtype)
        if target:
            given["target"] = indices(shape) if target == "indices" else exact(torch.rand(shape)).to(dtype)
        if sample_weight:
            given["sample_weight"] = row_weights(outer(shape))
        return (teacher,), given

    return function, make


ALL = {"weight": WEIGHT, "label_smoothing": 0.2, "z_loss": 0.01, "temperature": 1.5, "softcap": 3.0}
CLASS = {
    "": {},
    "_soft": {"soft": True},
    "_all": {**ALL, "ignore_index": 1},
    "_all_soft": {**ALL, "soft": True, "reduction": "none"},
    "_sample_weight": {"sample_weight": True, "weight": WEIGHT, "reduction": "none"},
    "_others_count": {"smoothing": "others", "label_smoothing": 0.3, "denominator": "count", "sample_weight": True},
    "_total": {"denominator": "total", "ignore_index": 2, "temperature": 0.5},
    "_sum": {"reduction": "sum", "weight": WEIGHT},
}
CASES = {
    **{f"cross_entropy{k}": by_class(adapter.cross_entropy, **v) for k, v in CLASS.items()},
    **{f"focal{k}": by_class(adapter.focal_loss, **v) for k, v in CLASS.items()},
    **{f"focal_alpha{k}": by_class(adapter.focal_loss, gamma=0.5, alpha=ALPHA, **v) for k, v in CLASS.items()},
    "focal_one_alpha": by_class(adapter.focal_loss, alpha=0.25, gamma=0.0, weight=WEIGHT),
    **{f"poly{k}": by_class(adapter.poly_loss, **v) for k, v in CLASS.items()},
    "poly_negative": by_class(adapter.poly_loss, epsilon=-2.0),
    **{f"generalized{k}": by_class(adapter.generalized_cross_entropy, **v) for k, v in CLASS.items()},
    "generalized_1": by_class(adapter.generalized_cross_entropy, q=1.0),
    "nll": by_class(adapter.nll_loss, weight=WEIGHT),
    "nll_none": by_class(adapter.nll_loss, ignore_index=2, reduction="none"),
    "bce_logits": by_element(adapter.binary_cross_entropy_with_logits),
    "bce_logits_none": by_element(adapter.binary_cross_entropy_with_logits, pos_weight=True, reduction="none"),
    "bce_logits_all": by_element(
        adapter.binary_cross_entropy_with_logits,
        weight=True,
        pos_weight=True,
        label_smoothing=0.1,
        sample_weight="row",
    ),
    "bce_logits_sum": by_element(
        adapter.binary_cross_entropy_with_logits, sample_weight="element", label_smoothing=1.0, reduction="sum"
    ),
    "sigmoid_focal": by_element(adapter.sigmoid_focal_loss),
    "sigmoid_focal_plain": by_element(adapter.sigmoid_focal_loss, alpha=-1, gamma=0.5, reduction="mean"),
    "sigmoid_focal_weight": by_element(adapter.sigmoid_focal_loss, gamma=0, reduction="mean", sample_weight="row"),
    "kl": by_teacher(adapter.kl_div_with_logits),
    "kl_reverse": by_teacher(adapter.kl_div_with_logits, direction="reverse", temperature=2.0, reduction="none"),
    "kl_softcap": by_teacher(adapter.kl_div_with_logits, softcap=3.0, sample_weight=True),
    "kl_reverse_softcap": by_teacher(
        adapter.kl_div_with_logits, direction="reverse", softcap=3.0, sample_weight=True, denominator="total"
    ),
    "distillation": by_teacher(adapter.distillation_loss),
    "distillation_none": by_teacher(adapter.distillation_loss, target="indices", reduction="none", weight=WEIGHT),
    "distillation_soft": by_teacher(adapter.distillation_loss, target="soft", alpha=0.25, direction="reverse"),
    "distillation_all": by_teacher(
        adapter.distillation_loss,
        target="indices",
        weight=WEIGHT,
        ignore_index=2,
        label_smoothing=0.1,
        softcap=3.0,
        sample_weight=True,
    ),
    "distillation_hard": by_teacher(adapter.distillation_loss, target="indices", alpha=0.0, denominator="count"),
    "distillation_top": by_teacher(adapter.distillation_loss, top=2, target="indices", ignore_index=1),
    "distillation_top_reverse": by_teacher(adapter.distillation_loss, top=2, direction="reverse", softcap=3.0),
    "distillation_top_none": by_teacher(adapter.distillation_loss, top=3, reduction="none", sample_weight=True),
    "distillation_renormalized": by_teacher(adapter.distillation_loss, top=3, tail="renormalize", temperature=1.0),
}


def case(name, shape=SHAPE, dtype=torch.float64):
    """(logits, the loss as a function of them)"""
    function, make = CASES[name]
    args, options = make(shape, dtype)
    input = exact(torch.randn(shape) * 2).to(dtype)
    return input, lambda x: function(x, *args, **options), (function, args, options)


def widened(value):
    if isinstance(value, tuple):
        return tuple(widened(v) for v in value)
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def by_formula(function, args, options, input, upstream=None):
    """(loss, gradient) in float64 where only torch's operations are seen."""
    args, options = widened(args), {k: widened(v) for k, v in options.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_ops, "record", lambda: False)
        loss, vjp = torch.func.vjp(lambda x: function(x, *args, **options), input.double())
        return loss, vjp(torch.ones_like(loss) if upstream is None else upstream.double())[0]


def assert_close(actual, expected, largest):
    compute = torch.float64 if actual.dtype == torch.float64 else torch.float32
    unit = ULP * torch.finfo(compute).eps + (torch.finfo(actual.dtype).eps if actual.dtype in NARROW else 0)
    bound = unit * max(largest, float(expected.abs().max())) + torch.finfo(actual.dtype).smallest_normal
    error = (actual.double() - expected).abs().max()
    assert actual.shape == expected.shape
    assert error <= bound, f"off by {error / bound:.3g} of its bound"


# ---------------------------------------------------------------------------------------------------- kernels, formulas


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [SHAPE, (6, K), (K,)], ids=str)
def test_kernels_equal_the_formula_in_float64(name, shape, dtype):
    input, loss, parts = case(name, shape, dtype)
    input.requires_grad_()
    value = loss(input)
    assert "_Kernels" in type(value.grad_fn).__name__
    upstream = exact(torch.rand(value.shape) + 0.5).to(value.dtype)
    (grad,) = torch.autograd.grad(value, input, upstream)
    expected, expected_grad = by_formula(*parts, input.detach(), upstream)
    largest = 16 if "kl" in name or "distillation" in name else 4  # T^2 times a logit
    assert_close(value.detach(), expected, largest)
    assert_close(grad, expected_grad, 1.0)
    assert grad.dtype == value.dtype == dtype
    with torch.no_grad():
        torch.testing.assert_close(loss(input), value.detach(), rtol=0, atol=0)


LAYOUTS = {
    "transposed": lambda: torch.randn(2, K, 6).transpose(0, 2),
    "sliced": lambda: torch.randn(12, 3 * K, 2)[1::2, ::3],
    "shifted": lambda: torch.randn(3, 6, K)[:, :-1].movedim(-1, 1),
    "expanded": lambda: torch.randn(1, K, 1).expand(6, K, 5),
    "channels_last": lambda: torch.randn(2, K, 3, 5).to(memory_format=torch.channels_last),
    "one_class": lambda: torch.randn(6, 1),
    "no_rows": lambda: torch.randn(0, K),
}


CALLS = {  # of logits, a tensor of their shape and class indices
    "focal": lambda x, y, t: adapter.focal_loss(x, t, gamma=1.5),
    "generalized_soft": lambda x, y, t: adapter.generalized_cross_entropy(x, y, reduction="none"),
    "nll": lambda x, y, t: adapter.nll_loss(x, t),
    "bce_logits": lambda x, y, t: adapter.binary_cross_entropy_with_logits(x, y, label_smoothing=0.1),
    "sigmoid_focal": lambda x, y, t: adapter.sigmoid_focal_loss(x, y),
    "kl": lambda x, y, t: adapter.kl_div_with_logits(x, y),
    "kl_div": lambda x, y, t: adapter.kl_div(x, y, reduction="batchmean", log_target=True),
    "distillation": lambda x, y, t: adapter.distillation_loss(x, y, t),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_any_layout_gives_what_contiguous_tensors_do(name, layout, dtype):
    x, y = (LAYOUTS[layout]().to(dtype) for _ in range(2))
    t = torch.randint(x.shape[1], outer(x.shape))
    results = []
    for change in (torch.Tensor.detach, torch.Tensor.contiguous):
        leaf = change(x).requires_grad_()
        loss = CALLS[name](leaf, change(y), t)
        results.append((loss, torch.autograd.grad(loss.sum(), leaf)[0]))
    torch.testing.assert_close(*results, rtol=0 if dtype in NARROW else 1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [SHAPE, (K,)], ids=str)
def test_gradients_of_first_and_second_order_pass_gradcheck(name, shape):
    input, loss, _ = case(name, shape)
    input.requires_grad_()
    assert torch.autograd.gradcheck(loss, (input,), check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, (input,), fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_gradient_under_create_graph_equals_the_gradient_of_the_kernels(name):
    input, loss, _ = case(name)
    input.requires_grad_()
    plain, graphed = (
        torch.autograd.grad(loss(input).sum(), input, create_graph=create_graph)[0] for create_graph in (False, True)
    )
    torch.testing.assert_close(graphed.detach(), plain, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", [n for n in CASES if "none" not in n and "soft" not in n and "sample_weight" not in n])
def test_gradients_are_computed_along_with_the_loss_and_handed_over(name):
    input, loss, (_, _, options) = case(name, dtype=torch.float32)
    if case(name)[1](input.double()).ndim:
        return  # reduction "none" computes them in backward
    input.requires_grad_()
    value = loss(input)
    pointer = value.grad_fn.gradient.data_ptr()
    value.backward(retain_graph=True)
    assert input.grad.data_ptr() == pointer and value.grad_fn.gradient is None
    assert torch.equal(torch.autograd.grad(value, input)[0], input.grad)
    if not any(isinstance(option, torch.Tensor) for option in options.values()):
        assert loss(input).grad_fn.call[0] is value.grad_fn.call[0]  # made once


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_16_bit_gradients_under_create_graph_are_rounded_once(name, dtype):
    input, loss, parts = case(name, dtype=dtype)
    input.requires_grad_()
    value = loss(input)
    (grad,) = torch.autograd.grad(value, input, torch.ones_like(value), create_graph=True)
    _, expected = by_formula(*parts, input.detach())
    torch.testing.assert_close(grad.detach().double(), expected, rtol=0.51 * torch.finfo(dtype).eps, atol=3e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", CASES)
def test_compiled_calls_are_traced_whole_and_equal(name):
    input, loss, _ = case(name)
    input.requires_grad_()
    torch._dynamo.reset()
    results = []
    for f in (loss, torch.compile(loss, backend="eager", fullgraph=True)):
        value = f(input)
        results.append((value, torch.autograd.grad(value.sum(), input)[0]))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_vmap_and_forward_mode_see_the_loss(name):
    input, loss, _ = case(name)
    inputs, tangent = torch.stack([input, -input]), torch.ones_like(input) * torch.arange(K).unsqueeze(1)
    torch.testing.assert_close(torch.vmap(loss)(inputs), torch.stack([loss(x) for x in inputs]))
    _, derivative = torch.func.jvp(loss, (input,), (tangent,))
    leaf = input.clone().requires_grad_()
    value = loss(leaf)
    if value.ndim == 0:
        (grad,) = torch.autograd.grad(value, leaf)
        torch.testing.assert_close(derivative, (grad * tangent).sum())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["focal", "poly_soft", "generalized", "sigmoid_focal", "kl", "distillation_top"])
def test_results_of_losses_that_torch_lacks_have_the_dtype_of_their_input_or_float32_under_autocast(
    name, dtype, autocast
):
    input, loss, (function, args, options) = case(name, dtype=dtype)
    input.requires_grad_()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        value = loss(input)
        seen = torch.func.vmap(lambda x: function(x, *args, **options))(input.detach().unsqueeze(0))
    value.sum().backward()
    assert value.dtype == seen.dtype == (torch.float32 if autocast and dtype in NARROW else dtype)
    assert input.grad.dtype == dtype


# ---------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("name", [name for name in CASES if "nll" not in name])
@pytest.mark.parametrize("create_graph", [False, True])
def test_what_does_not_count_has_loss_and_gradient_0_whatever_it_holds(name, create_graph):
    function, make = CASES[name]
    args, options = make((3, K), torch.float64)
    options |= {"reduction": "none", "sample_weight": torch.tensor([True, False, True])}
    input = torch.randn(3, K, dtype=torch.float64)
    input[1] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    input.requires_grad_()
    loss = function(input, *args, **options)
    (grad,) = torch.autograd.grad(loss.sum(), input, create_graph=create_graph)
    assert (loss[1] == 0).all() and (grad[1] == 0).all()
    assert loss.isfinite().all() and grad.isfinite().all()
    if create_graph:
        (second,) = torch.autograd.grad(grad.pow(2).sum(), input)
        assert (second[1] == 0).all() and second.isfinite().all()


@pytest.mark.parametrize(
    "name", ["cross_entropy", "focal", "poly", "generalized", "sigmoid_focal_plain", "kl", "distillation", "bce_logits"]
)
def test_a_mean_over_nothing_is_nan_and_its_gradient_0(name):
    function, make = CASES[name]
    args, options = make((3, K), torch.float64)
    options["sample_weight"] = torch.zeros(3)
    input = torch.randn(3, K, dtype=torch.float64, requires_grad=True)
    loss = function(input, *args, **options)
    expected, expected_grad = by_formula(function, args, options, input.detach())
    loss.backward()
    assert loss.isnan() and expected.isnan()
    assert (input.grad == 0).all() and (expected_grad == 0).all()


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_certain_rows_have_finite_gradients(gamma, create_graph):
    """p is 1 or 0 to the last bit, where powers of 1 - p have infinite derivatives."""
    x = torch.tensor([[800.0, 0.0, -torch.inf], [-800.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0, 1])
    for function, y in (
        (adapter.focal_loss, t),
        (adapter.sigmoid_focal_loss, torch.eye(2, 3, dtype=torch.float64)),
    ):
        loss = function(x, y, gamma=gamma, reduction="sum")
        (grad,) = torch.autograd.grad(loss, x, create_graph=create_graph)
        assert loss.isfinite() and grad.isfinite().all()


# ---------------------------------------------------------------------------------------------------- other gradients


def needs_gradient():
    x, q = torch.randn(3, K).double(), torch.rand(3, K).double()
    t, w, s = torch.tensor([0, 1, 2]), torch.rand(K).double() + 0.1, torch.rand(3).double() + 0.1
    top = torch.tensor([[0, 1], [1, 2], [3, 0]]), (torch.rand(3, 2).double() * 0.4 + 0.1).log()
    return {
        "cross_entropy_target": (lambda q: adapter.cross_entropy(x, q, z_loss=0.1), q),
        "cross_entropy_weight": (lambda w: adapter.cross_entropy(x, t, w, temperature=2.0), w),
        "cross_entropy_sample_weight": (lambda s: adapter.cross_entropy(x, t, w, sample_weight=s), s),
        "focal_target": (lambda q: adapter.focal_loss(x, q, label_smoothing=0.1), q),
        "focal_alpha": (lambda a: adapter.focal_loss(x, t, alpha=a), w),
        "focal_weight": (lambda w: adapter.focal_loss(x, t, w, z_loss=0.1), w),
        "poly_target": (lambda q: adapter.poly_loss(x, q), q),
        "generalized_target": (lambda q: adapter.generalized_cross_entropy(x, q), q),
        "bce_target": (lambda q: adapter.binary_cross_entropy_with_logits(x, q, pos_weight=w), q),
        "bce_smoothed_target": (lambda q: adapter.binary_cross_entropy_with_logits(x, q, label_smoothing=0.1), q),
        "bce_pos_weight": (
            lambda w: adapter.binary_cross_entropy_with_logits(x, q, pos_weight=w, sample_weight=s),
            w,
        ),
        "sigmoid_focal_target": (lambda q: adapter.sigmoid_focal_loss(x, q), q),
        "kl_div_target": (lambda y: adapter.kl_div(x, y, reduction="sum", log_target=True), q.log()),
        "kl_target": (lambda y: adapter.kl_div_with_logits(x, y, direction="reverse"), q),
        "distillation_teacher": (lambda y: adapter.distillation_loss(x, y, t), q),
        "distillation_log_probs": (lambda p: adapter.distillation_loss(x, (top[0], p)), top[1]),
    }


@pytest.mark.parametrize("name", needs_gradient())
def test_targets_teachers_and_weights_get_their_gradients(name):
    f, argument = needs_gradient()[name]
    argument.requires_grad_()
    assert torch.autograd.gradcheck(f, (argument,), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (argument,), fast_mode=True)
    with torch.no_grad():
        torch.testing.assert_close(f(argument), f(argument.detach().clone()), rtol=0, atol=0)


def test_input_that_is_its_own_target_gets_both_gradients():
    x = torch.rand(3, K, dtype=torch.float64, requires_grad=True)
    for f, own in (
        (lambda x: adapter.binary_cross_entropy_with_logits(x, x), lambda x: F.binary_cross_entropy_with_logits(x, x)),
        (lambda x: adapter.kl_div_with_logits(x, x**2), None),
        (lambda x: adapter.distillation_loss(2 * x, x), None),
    ):
        assert torch.autograd.gradcheck(f, (x,))
        if own:
            assert torch.equal(torch.autograd.grad(f(x), x)[0], torch.autograd.grad(own(x), x)[0])


@pytest.mark.parametrize("changed", [0, 1, "weight"])
def test_changing_what_was_saved_is_an_error_where_it_matters(changed):
    leaf, target, weight = torch.randn(3, K, requires_grad=True), torch.tensor([0, 1, 2]), WEIGHT.clone()
    logits = leaf * 1
    loss = adapter.focal_loss(logits, target, weight)
    {0: logits, 1: target, "weight": weight}[changed].mul_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf, create_graph=True)


# ---------------------------------------------------------------------------------------------------- laws


def test_parameters_that_turn_a_loss_into_another():
    x, t = torch.randn(6, K, dtype=torch.float64), torch.randint(K, (6,))
    y = torch.rand(6, K, dtype=torch.float64)
    options = dict(weight=WEIGHT.double(), label_smoothing=0.1, z_loss=0.01, temperature=2.0)
    expected = adapter.cross_entropy(x, t, **options)
    torch.testing.assert_close(adapter.focal_loss(x, t, gamma=0.0, **options), expected)
    torch.testing.assert_close(adapter.poly_loss(x, t, epsilon=0.0, **options), expected)
    torch.testing.assert_close(adapter.generalized_cross_entropy(x, t, q=1e-9, **options), expected)
    torch.testing.assert_close(
        adapter.sigmoid_focal_loss(x, y, -1, 0, "mean"), F.binary_cross_entropy_with_logits(x, y)
    )
    torch.testing.assert_close(adapter.distillation_loss(x, -x, t, alpha=0.0), F.cross_entropy(x, t))
    torch.testing.assert_close(
        adapter.distillation_loss(x, -x, temperature=3.0), 9 * adapter.kl_div_with_logits(x, -x, temperature=3.0)
    )
    for direction in ("forward", "reverse"):
        options = dict(temperature=3.0, direction=direction)
        log_probs, classes = (y / 3).log_softmax(1).topk(K, 1)
        torch.testing.assert_close(
            adapter.distillation_loss(x, (classes, log_probs), **options), adapter.distillation_loss(x, y, **options)
        )
    p, q = x.log_softmax(1), y.log_softmax(1)
    forward = F.kl_div(p, q, reduction="batchmean", log_target=True)
    torch.testing.assert_close(adapter.kl_div_with_logits(x, y), forward)
    torch.testing.assert_close(adapter.kl_div_with_logits(y, x, direction="reverse"), forward)


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2), (-1, 2), (0.75, 0), (1.0, 0.5)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_sigmoid_focal_loss_is_torchvisions(alpha, gamma, reduction):
    x = torch.randn(3, K, 2, dtype=torch.float64, requires_grad=True)
    for y in (torch.randint(2, x.shape).double(), torch.rand(x.shape).double()):
        p = x.sigmoid()
        p_t = p * y + (1 - p) * (1 - y)
        expected = F.binary_cross_entropy_with_logits(x, y, reduction="none") * (1 - p_t) ** gamma
        if alpha >= 0:
            expected = expected * (alpha * y + (1 - alpha) * (1 - y))
        expected = expected if reduction == "none" else getattr(expected, reduction)()
        actual = adapter.sigmoid_focal_loss(x, y, alpha, gamma, reduction)
        torch.testing.assert_close(actual, expected)
        grads = [torch.autograd.grad(loss.sum(), x)[0] for loss in (actual, expected)]
        torch.testing.assert_close(*grads)
    assert adapter.sigmoid_focal_loss(x, y).shape == x.shape  # "none" is its default


def test_binary_targets_are_not_checked_as_in_torch():
    x, y = torch.randn(3, K, requires_grad=True), torch.randn(3, K) * 3
    for f in (adapter.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits):
        loss = f(x, y)
        x.grad = None
        loss.backward()
        if f is adapter.binary_cross_entropy_with_logits:
            expected = loss.detach(), x.grad
    torch.testing.assert_close((loss.detach(), x.grad), expected)


def test_large_batches_have_the_same_bits_for_any_number_of_threads(monkeypatch):
    x, y, t = torch.randn(300, 500), torch.rand(300, 500), torch.randint(500, (300,))
    for name in ("focal", "bce_logits", "kl", "kl_div", "distillation"):
        results = []
        for n in (1, 2, 5):
            monkeypatch.setattr(torch, "get_num_threads", lambda n=n: n)
            leaf = x.clone().requires_grad_()
            loss = CALLS[name](leaf, y, t)
            assert loss.grad_fn.call[0].n_threads == n
            results.append((loss.item(), *torch.autograd.grad(loss, leaf)))
        assert all(r[0] == results[0][0] and torch.equal(r[1], results[0][1]) for r in results)


# ---------------------------------------------------------------------------------------------------- torch's own

OWN = {
    "nn.functional.cross_entropy": (adapter.cross_entropy, F.cross_entropy),
    "nn.functional.nll_loss": (adapter.nll_loss, F.nll_loss),
    "nn.functional.binary_cross_entropy_with_logits": (
        adapter.binary_cross_entropy_with_logits,
        F.binary_cross_entropy_with_logits,
    ),
    "nn.functional.binary_cross_entropy": (adapter.binary_cross_entropy, F.binary_cross_entropy),
    "nn.functional.kl_div": (adapter.kl_div, F.kl_div),
}


@functools.cache
def op_db():
    with pytest.MonkeyPatch.context() as patch:
        if "expecttest" not in sys.modules:  # which torch's tests derive their TestCase from; the samples need none
            patch.setitem(sys.modules, "expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
        db = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
    return {op.name: op for op in db if op.name in OWN}


def samples(name, dtype):
    for sample in op_db()[name].sample_inputs("cpu", dtype, requires_grad=True):
        yield sample.input, sample.args, sample.kwargs


def detached(value):
    return value.detach() if isinstance(value, torch.Tensor) else value


def differentiated(f, input, args, options):
    """(loss, gradient, gradient under create_graph, gradient of its square); targets and weights are constants."""
    args, options = [detached(a) for a in args], {k: detached(v) for k, v in options.items()}
    loss = f(input, *args, **options)
    upstream = torch.ones_like(loss)
    (plain,) = torch.autograd.grad(loss, input, upstream, retain_graph=True)
    (grad,) = torch.autograd.grad(loss, input, upstream, create_graph=True)
    again = (grad.pow(2).sum() + (grad * input).sum()) if grad.requires_grad else (grad.detach() * input).sum()
    return loss, plain, grad, torch.autograd.grad(again, input)[0]


@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", OWN)
def test_torchs_own_samples_give_torchs_results(name, dtype):
    ours, own = OWN[name]
    taken = list(samples(name, dtype))
    for input, args, options in taken:
        torch.testing.assert_close(
            differentiated(ours, input, args, options), differentiated(own, input, args, options), equal_nan=True
        )
        torch.testing.assert_close(ours(input, *args, **options), own(input, *args, **options), equal_nan=True)
    assert len(taken) > 10


@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", OWN)
def test_torchs_own_samples_in_16_bits_give_torchs_float64_results_rounded(name, dtype):
    ours, own = OWN[name]
    for input, args, options in samples(name, dtype):
        args, options = [detached(a) for a in args], {k: detached(v) for k, v in options.items()}
        loss = ours(input, *args, **options)
        (grad,) = torch.autograd.grad(loss.sum(), input)
        wide = input.detach().double().requires_grad_()
        expected = own(wide, *widened(tuple(args)), **{k: widened(v) for k, v in options.items()})
        (expected_grad,) = torch.autograd.grad(expected.sum(), wide)
        assert loss.dtype == own(input.detach(), *args, **options).dtype and grad.dtype == dtype
        expected, expected_grad = (t.detach().nan_to_num(posinf=torch.inf) for t in (expected, expected_grad))
        torch.testing.assert_close(
            loss.detach().double().nan_to_num(posinf=torch.inf),
            expected.to(dtype).double(),
            rtol=torch.finfo(dtype).eps,
            atol=1e-5,
        )
        torch.testing.assert_close(
            grad.double(), expected_grad.to(dtype).double(), rtol=torch.finfo(dtype).eps, atol=1e-5
        )


@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize("name", OWN)
def test_torchs_own_samples_pass_gradcheck(name):
    ours, _ = OWN[name]
    n_checked = 0
    for input, args, options in samples(name, torch.float64):
        args, options = [detached(a) for a in args], {k: detached(v) for k, v in options.items()}
        loss = ours(input, *args, **options)
        if input.numel() > 60 or not loss.isfinite().all():
            continue

        def f(x, args=args, options=options):
            return ours(x, *args, **options)

        assert torch.autograd.gradcheck(f, (input,), fast_mode=True)
        assert torch.autograd.gradgradcheck(f, (input,), fast_mode=True)
        n_checked += 1
    assert n_checked >= 5


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", [torch.int64, torch.bool, *DTYPES], ids=str)
@pytest.mark.parametrize("name, weight", [(n, w) for n in OWN for w in (None, *DTYPES) if not (w and "kl" in n)])
def test_result_and_gradient_have_the_dtypes_of_torch(name, weight, target, dtype, autocast):
    ours, own = OWN[name]
    x, t = torch.rand(6, K).to(dtype), torch.rand(6, K).round().to(target)
    if name.endswith(("nll_loss", "cross_entropy")) and "binary" not in name and not target.is_floating_point:
        t = t[:, 0]
    options = {} if weight is None else {"weight": torch.rand(K).to(weight)}
    if name.endswith("kl_div"):
        options = {"log_target": True, "reduction": "sum"}

    def dtypes(f):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = f(leaf, t, **options)
        loss.backward()
        return loss.dtype, leaf.grad.dtype

    try:
        expected = dtypes(own)
    except (RuntimeError, ValueError):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            dtypes(ours)
        return
    assert dtypes(ours) == expected


X, Y, T = torch.rand(2, 3), torch.rand(2, 3), torch.tensor([0, 1])
WRONG = {
    "nll_target_past_classes": ("nll_loss", (X, torch.tensor([0, 3])), {}),
    "nll_negative_target": ("nll_loss", (X, torch.tensor([0, -1])), {}),
    "nll_soft_target": ("nll_loss", (X, Y), {}),
    "nll_target_of_wrong_shape": ("nll_loss", (X, torch.zeros(3, dtype=torch.long)), {}),
    "nll_scalar": ("nll_loss", (X[0, 0], T[0]), {}),
    "nll_weight_of_wrong_size": ("nll_loss", (X, T, torch.ones(4)), {}),
    "nll_weight_of_wrong_dtype": ("nll_loss", (X, T, torch.ones(3).double()), {}),
    "nll_reduction": ("nll_loss", (X, T), {"reduction": "max"}),
    "nll_lists": ("nll_loss", ([[0.0, 1.0]], [0]), {}),
    "bce_logits_shapes": ("binary_cross_entropy_with_logits", (X, Y[:1]), {}),
    "bce_logits_indices": ("binary_cross_entropy_with_logits", (X, torch.ones(2, 3, dtype=torch.long)), {}),
    "bce_logits_weight": ("binary_cross_entropy_with_logits", (X, Y, torch.ones(4, 2, 3)), {}),
    "bce_logits_pos_weight": ("binary_cross_entropy_with_logits", (X, Y), {"pos_weight": torch.ones(2)}),
    "bce_logits_reduction": ("binary_cross_entropy_with_logits", (X, Y), {"reduction": "max"}),
    "bce_logits_integers": ("binary_cross_entropy_with_logits", (X.long(), Y.long()), {}),
    "bce_past_1": ("binary_cross_entropy", (X + 1, Y), {}),
    "bce_target_past_1": ("binary_cross_entropy", (X, Y + 1), {}),
    "bce_shapes": ("binary_cross_entropy", (X, Y[:1]), {}),
    "bce_dtypes": ("binary_cross_entropy", (X, Y.double()), {}),
    "bce_weight": ("binary_cross_entropy", (X, Y, torch.ones(4, 2, 3)), {}),
    "bce_reduction": ("binary_cross_entropy", (X, Y), {"reduction": "max"}),
    "kl_shapes": ("kl_div", (X, torch.rand(2, 4)), {"log_target": True, "reduction": "sum"}),
    "kl_integers": ("kl_div", (X, Y.long()), {"log_target": True, "reduction": "sum"}),
    "kl_reduction": ("kl_div", (X, Y), {"log_target": True, "reduction": "max"}),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_where_torch_raises_so_do_we_in_kind(name, grad):
    function, args, options = WRONG[name]
    if grad and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
        args = (args[0].clone().requires_grad_(), *args[1:])
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)) as of_torch:
        getattr(F, function)(*args, **options)
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)) as ours:
        getattr(adapter, function)(*args, **options)
    if of_torch.type is IndexError or function == "binary_cross_entropy":
        assert ours.type is of_torch.type


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
@pytest.mark.parametrize("name", ["nll_loss", "binary_cross_entropy_with_logits", "binary_cross_entropy", "kl_div"])
def test_deprecated_options_choose_the_reduction_and_warn_as_torch(name, size_average, reduce):
    target, options = (T, {}) if name == "nll_loss" else (Y, {})
    results = []
    for f in (getattr(adapter, name), getattr(F, name)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append((f(X, target, size_average=size_average, reduce=reduce, **options), len(caught)))
    torch.testing.assert_close(*results)


def test_kl_div_leaves_to_torch_only_shapes_that_differ_and_empty_ones(monkeypatch):
    p, q = torch.randn(6, K).log_softmax(1), torch.randn(6, K).log_softmax(1)
    calls, own = [], F.kl_div
    monkeypatch.setattr(adapter.own, "kl_div", lambda *args, **kwargs: calls.append(args) or own(*args, **kwargs))
    for x, y in ((p, q), (p.reshape(2, 3, K), q.reshape(2, 3, K)), (p.t(), q.t()), (p[0], q[0])):
        for reduction, log_target in itertools.product(("none", "sum", "batchmean", "mean"), (False, True)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                given = x, y if log_target else y.exp()
                ours = adapter.kl_div(*given, reduction=reduction, log_target=log_target)
                expected = own(*given, reduction=reduction, log_target=log_target)
            assert len(caught) == 2 * (reduction == "mean") and not calls
            torch.testing.assert_close(ours, expected)
    adapter.kl_div(p, q[:1], reduction="sum", log_target=True)
    adapter.kl_div(p[:0], q[:0], reduction="sum", log_target=True)
    assert len(calls) == 2


# ---------------------------------------------------------------------------------------------------- strangers


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize("name", ["focal_all", "sigmoid_focal", "kl_softcap", "distillation_top", "bce_logits_all"])
def test_subclasses_and_other_devices_go_by_the_formula(name):
    input, loss, (function, args, options) = case(name)
    tagged = loss(input.as_subclass(Tagged))
    assert type(tagged) is Tagged
    torch.testing.assert_close(tagged.as_subclass(torch.Tensor), loss(input))

    def moved(value):
        if isinstance(value, tuple):
            return tuple(moved(v) for v in value)
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    meta = function(moved(input), *moved(args), **{k: moved(v) for k, v in options.items()})
    assert meta.device.type == "meta" and meta.shape == loss(input).shape and meta.dtype == input.dtype


def test_modes_see_the_call_and_a_default_device_changes_nothing():
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    for name in ("focal_all", "bce_logits_all", "kl_softcap", "distillation_top", "nll"):
        input, loss, (function, *_) = case(name)
        with Mode():
            value = loss(input)
        assert seen[-1] is function and torch.equal(value, loss(input))
        input.requires_grad_()
        with torch.device("meta"):
            value = loss(input)
            (grad,) = torch.autograd.grad(value.sum(), input, create_graph=True)
        assert value.device.type == grad.device.type == "cpu"


@pytest.mark.parametrize(
    "call",
    [
        lambda: adapter.focal_loss([[0.0]], torch.tensor([0])),
        lambda: adapter.focal_loss(torch.ones(2, 3, dtype=torch.long), T),
        lambda: adapter.focal_loss(X, None),
        lambda: adapter.kl_div_with_logits(X, [[0.0]]),
        lambda: adapter.distillation_loss(X, X, [0, 1]),
        lambda: adapter.sigmoid_focal_loss(X, Y, alpha=2.0),
        lambda: adapter.focal_loss(X, T, gamma=-1.0),
        lambda: adapter.focal_loss(X, Y, ignore_index=1),
        lambda: adapter.distillation_loss(X, X, alpha=0.5),
        lambda: adapter.distillation_loss(X, X, Y, ignore_index=1),
        lambda: torch.vmap(lambda x: adapter.focal_loss(x, T, gamma=-1.0))(X[None]),
        lambda: torch.vmap(lambda x: adapter.distillation_loss(x, X, alpha=0.5))(X[None]),
        lambda: torch.vmap(lambda x: adapter.focal_loss(x, Y, smoothing="others", label_smoothing=0.1))(X[None]),
    ],
)
def test_what_fits_no_loss_is_refused_on_every_way(call):
    with pytest.raises((TypeError, ValueError)):
        call()


# ---------------------------------------------------------------------------------------------------- modules

MODULES = {
    "CrossEntropyLoss": ("cross_entropy", {"weight": WEIGHT, "temperature": 2.0}, "temperature=2.0"),
    "NLLLoss": ("nll_loss", {"weight": WEIGHT, "ignore_index": 1}, ""),
    "BCEWithLogitsLoss": (
        "binary_cross_entropy_with_logits",
        {"weight": WEIGHT, "pos_weight": 2 * WEIGHT, "reduction": "sum", "label_smoothing": 0.1},
        "label_smoothing=0.1",
    ),
    "BCELoss": ("binary_cross_entropy", {"weight": WEIGHT, "reduction": "none"}, ""),
    "FocalLoss": (
        "focal_loss",
        {"weight": WEIGHT, "alpha": ALPHA, "gamma": 1.5, "reduction": "sum"},
        "reduction='sum', gamma=1.5",
    ),
    "PolyLoss": ("poly_loss", {"weight": WEIGHT, "epsilon": 2.0}, "epsilon=2.0"),
    "GeneralizedCrossEntropyLoss": (
        "generalized_cross_entropy",
        {"weight": WEIGHT, "q": 0.5, "softcap": 5.0},
        "q=0.5, softcap=5.0",
    ),
    "SigmoidFocalLoss": ("sigmoid_focal_loss", {"alpha": -1, "reduction": "mean"}, "alpha=-1, reduction='mean'"),
    "KLDivLoss": ("kl_div", {"reduction": "batchmean", "log_target": True}, ""),
    "KLDivWithLogitsLoss": ("kl_div_with_logits", {"direction": "reverse"}, "direction='reverse'"),
    "DistillationLoss": ("distillation_loss", {"weight": WEIGHT, "temperature": 3.0}, "temperature=3.0"),
}


@pytest.mark.parametrize("name", MODULES)
def test_module_is_the_function_with_its_options_and_has_torchs_state(name):
    function, options, shown = MODULES[name]
    module = getattr(adapter, name)(**options)
    assert repr(module) == f"{name}({shown})"
    input = torch.rand(6, K)
    target = torch.randint(K, (6,)) if "weight" in options and "bce" not in name.lower() else torch.rand(6, K)
    if name == "DistillationLoss":
        target = torch.randn(6, K)
    expected = getattr(adapter, function)(input, target, **options)
    fresh = getattr(adapter, name)(**{k: v * 0 if isinstance(v, torch.Tensor) else v for k, v in options.items()})
    fresh.load_state_dict(module.state_dict())
    for made in (module, fresh, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(made(input, target), expected)
        assert made.double()(input.double(), widened(target)).dtype == torch.float64
    if hasattr(torch.nn, name):
        of_torch = {k: v for k, v in options.items() if k in inspect.signature(getattr(torch.nn, name)).parameters}
        own = getattr(torch.nn, name)(**of_torch)
        assert isinstance(module, type(own))
        assert list(module.state_dict()) == list(own.state_dict())
        plain = type(module)(**of_torch)
        assert repr(plain) == repr(own) and vars(plain).keys() >= vars(own).keys()
    assert list(inspect.signature(type(module)).parameters) == [
        name
        for name in inspect.signature(getattr(adapter, function)).parameters
        if name not in ("input", "inputs", "student_logits", "teacher_logits", "target", "targets", "sample_weight")
    ]


def test_modules_take_sample_weights_where_their_functions_do():
    x, y, t, s = torch.randn(6, K), torch.rand(6, K), torch.randint(K, (6,)), torch.rand(6)
    assert torch.equal(adapter.FocalLoss()(x, t, s), adapter.focal_loss(x, t, sample_weight=s))
    assert torch.equal(
        adapter.BCEWithLogitsLoss()(x, y, s), adapter.binary_cross_entropy_with_logits(x, y, sample_weight=s)
    )
    assert torch.equal(adapter.DistillationLoss()(x, y, t, s), adapter.distillation_loss(x, y, t, sample_weight=s))
    with pytest.raises(TypeError, match="sample_weight"):
        adapter.NLLLoss()(x, t, s)


@pytest.mark.parametrize(
    "make",
    [
        lambda: adapter.FocalLoss(gamma=-1.0),
        lambda: adapter.FocalLoss(alpha=-0.5),
        lambda: adapter.PolyLoss(reduction="max"),
        lambda: adapter.GeneralizedCrossEntropyLoss(q=0.0),
        lambda: adapter.SigmoidFocalLoss(alpha=1.5),
        lambda: adapter.BCEWithLogitsLoss(label_smoothing=2.0),
        lambda: adapter.KLDivWithLogitsLoss(direction="both"),
        lambda: adapter.DistillationLoss(temperature=0.0),
        lambda: adapter.DistillationLoss(tail="x"),
    ],
)
def test_module_checks_its_options_when_it_is_made(make):
    with pytest.raises(ValueError):
        make()


def test_module_can_be_derived_from():
    class Mine(adapter.FocalLoss):
        def __init__(self):
            super().__init__(gamma=3.0)

    assert repr(Mine()) == "Mine(gamma=3.0)"
    assert torch.equal(Mine()(X, T), adapter.focal_loss(X, T, gamma=3.0))


def test_the_losses_of_ce_fast_are_all_there():
    losses = {name for name in ce.__all__ if name.endswith("Loss")}
    assert losses < set(adapter.__all__)
