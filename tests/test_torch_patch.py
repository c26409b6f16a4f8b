"""patch(): torch's own functions by our kernels, and then torch's again; what it leaves alone; a Hugging Face model."""

import copy
import inspect
import itertools
import pickle
import subprocess
import sys
import threading

import pytest
from test_torch_family import WRONG

torch = pytest.importorskip("torch")
adapter = pytest.importorskip("ce_fast.adapters.torch")

from torch.nn.functional import cross_entropy as bound_by_name  # noqa: E402

from ce_fast.adapters import torch_autograd, torch_linear, torch_patch  # noqa: E402

F, patch, own = torch.nn.functional, adapter.patch, torch_patch.own
NAMES = list(vars(own))
K = 5
MADE_BEFORE = torch.nn.CrossEntropyLoss(label_smoothing=0.1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(3)


def state():
    functions = {name: (f, f.__code__, dict(vars(f))) for name in NAMES for f in [getattr(F, name)]}
    return functions, {name for name in vars(F) if not name.startswith("__")}


@pytest.fixture(autouse=True)
def nothing_is_left_patched():
    before = state()
    yield
    assert state() == before and not torch_patch._active


@pytest.fixture
def kernel_calls(monkeypatch):
    """The losses that our nodes of the autograd graph computed."""
    calls = []

    def spied(forward):
        return lambda ctx, loss, *rest: (calls.append(loss), forward(ctx, loss, *rest))[1]

    for node in (torch_autograd._Kernels, torch_linear._Node):
        monkeypatch.setattr(node, "forward", staticmethod(spied(node.forward)))
    return calls


def arguments(name, dtype=torch.float32):
    """(input, the other arguments, options) of a call that the kernels do."""
    x, t, q = torch.randn(6, K, dtype=dtype), torch.randint(K, (6,)), torch.rand(6, K, dtype=dtype)
    log_x, log_q = x.log_softmax(1), q.log_softmax(1)
    return {
        "cross_entropy": (x, (t,), {"label_smoothing": 0.1}),
        "nll_loss": (log_x, (t,), {"reduction": "sum"}),
        "binary_cross_entropy_with_logits": (x, (q,), {"pos_weight": torch.ones(K, dtype=dtype) * 2}),
        "binary_cross_entropy": (x.sigmoid(), (q,), {}),
        "kl_div": (log_x, (log_q,), {"reduction": "batchmean", "log_target": True}),
        "linear_cross_entropy": (x, (torch.randn(9, K, dtype=dtype), t), {}),
    }[name]


def loss_and_gradient(function, input, args, options):
    input = input.detach().requires_grad_()
    loss = function(input, *args, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), input)


# ---------------------------------------------------------------------------------------------------- by kernels


@pytest.mark.parametrize("name", NAMES)
def test_torchs_function_is_ours_under_a_patch_and_torchs_after(name, kernel_calls):
    call = arguments(name)
    expected = loss_and_gradient(getattr(own, name), *call)
    with patch():
        ours = loss_and_gradient(getattr(F, name), *call)
    assert len(kernel_calls) == 1
    torch.testing.assert_close(ours, expected)
    after = loss_and_gradient(getattr(F, name), *call)
    assert len(kernel_calls) == 1 and all(map(torch.equal, after, expected))


def test_modules_whenever_made_and_names_bound_before_are_patched(kernel_calls):
    x, t = torch.randn(6, K, requires_grad=True), torch.randint(K, (6,))
    q, rows = torch.rand(6, K), x.log_softmax(1)
    with patch():
        MADE_BEFORE(x, t)
        made_inside = torch.nn.CrossEntropyLoss()
        made_inside(x, t)
        bound_by_name(x, t)
        torch.nn.NLLLoss()(rows, t)
        torch.nn.BCEWithLogitsLoss()(x, q)
        torch.nn.BCELoss()(x.sigmoid(), q)
        torch.nn.KLDivLoss(reduction="batchmean", log_target=True)(rows, q)
        assert len(kernel_calls) == 7
    made_inside(x, t)
    assert len(kernel_calls) == 7


def test_every_thread_is_patched(kernel_calls):
    x, t = torch.randn(6, K, requires_grad=True), torch.randint(K, (6,))
    with patch():
        thread = threading.Thread(target=F.cross_entropy, args=(x, t))
        thread.start()
        thread.join()
    assert len(kernel_calls) == 1


# ---------------------------------------------------------------------------------------------------- its end


def is_patched():
    return F.cross_entropy.__code__ is not own.cross_entropy.__code__


def test_patches_end_in_any_order_and_a_second_end_does_nothing():
    for inner_first in (True, False):
        outer, inner = patch(), patch()
        first, second = (inner, outer) if inner_first else (outer, inner)
        first.undo()
        first.undo()
        assert is_patched() and "undone" in repr(first) and "active" in repr(second)
        second.undo()
        assert not is_patched()
    with patch():
        with patch() as inner:
            inner.undo()
            assert is_patched()
        assert is_patched()
    assert not is_patched()


def test_an_exception_ends_the_patch_and_passes_through():
    with pytest.raises(KeyError, match="mine"), patch():
        assert is_patched()
        raise KeyError("mine")
    assert not is_patched()


def test_a_patch_that_is_undone_is_not_entered():
    ended = patch()
    ended.undo()
    with pytest.raises(RuntimeError, match="undone"), ended:
        pass
    assert not is_patched()


def test_another_patch_of_the_attribute_ends_before_or_after_ours(monkeypatch, kernel_calls):
    x, t = torch.randn(6, K, requires_grad=True), torch.randint(K, (6,))
    torchs, seen = F.cross_entropy, []

    def theirs(*args, **options):
        seen.append(args)
        return torchs(*args, **options)

    ours = patch()
    monkeypatch.setattr(F, "cross_entropy", theirs)
    F.cross_entropy(x, t)
    assert len(seen) == len(kernel_calls) == 1
    ours.undo()
    F.cross_entropy(x, t)
    assert len(seen) == 2 and len(kernel_calls) == 1
    with patch():
        monkeypatch.undo()
        assert F.cross_entropy is torchs and is_patched()


def test_the_adapter_put_in_place_of_the_attribute_still_falls_back_on_torch(monkeypatch):
    call = torch.randn(K), torch.tensor([0])  # of shapes that only torch reads
    monkeypatch.setattr(F, "cross_entropy", adapter.cross_entropy)
    expected = own.cross_entropy(*call)
    assert torch.equal(F.cross_entropy(*call), expected)
    with patch():
        assert torch.equal(F.cross_entropy(*call), expected)


FOREIGN = """
import functools
import torch
F = torch.nn.functional
x, t = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
cross_entropy, nll_loss, seen = F.cross_entropy, F.nll_loss, []

def replaced(function):  # with a closure, as many a patch
    def theirs(*args, **options):
        seen.append("cross_entropy")
        return function(*args, **options)
    return theirs

theirs = replaced(cross_entropy)

@functools.wraps(nll_loss)
def wrapped(*args, **options):
    seen.append("nll_loss")
    return nll_loss(*args, **options)

F.cross_entropy, F.nll_loss = theirs, wrapped
from ce_fast.adapters import torch as adapter

unseen = x[0], t[:1]
with adapter.patch() as patched:
    for function in (F.cross_entropy, F.nll_loss, adapter.cross_entropy, adapter.nll_loss):
        function(x, t), function(*unseen)
    assert F.cross_entropy is theirs and F.nll_loss is wrapped
    code = cross_entropy.__code__, nll_loss.__code__
assert seen == ["cross_entropy"] * 2 + ["nll_loss"] * 2 + ["cross_entropy"]  # the last one: ours has no other
assert code[0] is cross_entropy.__code__ and code[1] is not nll_loss.__code__
"""


def test_what_somebody_replaced_before_our_import_is_left_to_them():
    subprocess.run([sys.executable, "-c", FOREIGN], check=True)


# ---------------------------------------------------------------------------------------------------- what is torch's


class Tagged(torch.Tensor):
    pass


STRANGERS = {
    "meta": lambda f, x: f(x.to("meta")).device.type == "meta" and x.sum(),
    "subclass": lambda f, x: f(x.as_subclass(Tagged)),
    "func_grad": lambda f, x: torch.func.grad(f)(x),
    "hessian": lambda f, x: torch.autograd.functional.hessian(f, x),
    "vmap": lambda f, x: torch.vmap(f)(x.expand(2, 6, K)),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "trace": lambda f, x: torch.jit.trace(f, (x,))(x),
    "eager": lambda f, x: torch.compile(f, backend="eager", fullgraph=True)(x),
    "aot_eager": lambda f, x: torch.compile(f, backend="aot_eager", fullgraph=True)(x),
    "fx": lambda f, x: torch.fx.symbolic_trace(f)(x),
}
CASES = [
    (name, stranger)
    for name, stranger in itertools.product(NAMES, STRANGERS)
    if (name, stranger) != ("linear_cross_entropy", "fx")  # torch compares shapes, which fx does not know
    and (stranger != "aot_eager" or name in ("cross_entropy", "linear_cross_entropy"))  # 1 s each
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name, stranger", CASES)
def test_what_kernels_do_not_see_is_torchs_under_a_patch(name, stranger):
    input, args, options = arguments(name)

    def f(x):
        placed = [arg.to(x.device) for arg in args] if stranger == "meta" else args
        weights = {k: v.to(x.device) if torch.is_tensor(v) and stranger == "meta" else v for k, v in options.items()}
        return getattr(F, name)(x, *placed, **weights)

    torch._dynamo.reset()
    expected = STRANGERS[stranger](f, input)
    torch._dynamo.reset()
    with patch():
        ours = STRANGERS[stranger](f, input)
    assert type(ours) is type(expected)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_torchs_error_word_for_word(name):
    function, args, options = WRONG[name]
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)) as torchs:
        getattr(F, function)(*args, **options)
    with pytest.raises(torchs.type) as ours, patch():
        getattr(F, function)(*args, **options)
    assert ours.type is torchs.type and str(ours.value) == str(torchs.value)


@pytest.mark.parametrize("name", NAMES)
def test_overrides_are_handed_torchs_own_function_once(name, kernel_calls):
    seen = []

    class Seen(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    function, (input, args, options) = getattr(F, name), arguments(name)
    input.requires_grad_()
    with patch():
        function(input.as_subclass(Seen), *args, **options)
        assert seen.count(function) == 1
        kernel_calls.clear()
        with Mode():
            function(input, *args, **options)
        assert seen.count(function) == 2 and len(kernel_calls) == 1
        with Mode(), Mode():
            function(input.as_subclass(Seen), *args, **options)
        assert seen.count(function) == 5
        assert not any("ce_fast" in getattr(func, "__module__", None) or "" for func in seen)
        kernel_calls.clear()
        with torch.device("cpu"):  # a mode too
            function(input, *args, **options)
        assert len(kernel_calls) == 1


@pytest.mark.parametrize("name", NAMES)
def test_signature_help_and_identity_stay(name):
    function = getattr(F, name)
    before = inspect.signature(function), inspect.getsource(function), function.__doc__, function.__name__
    with patch():
        assert getattr(F, name) is function and pickle.loads(pickle.dumps(function)) is function
        now = inspect.signature(function), inspect.getsource(function), function.__doc__, function.__name__
    assert now == before


def test_modules_are_pickled_copied_scripted_and_compiled_as_before(kernel_calls):
    x, t = torch.randn(6, K, requires_grad=True), torch.randint(K, (6,))
    loss = torch.nn.CrossEntropyLoss(weight=torch.rand(K))
    compiled_before = torch.compile(loss, backend="eager")
    expected = compiled_before(x, t)
    with patch():
        for same in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss), compiled_before):
            torch.testing.assert_close(same(x, t), expected)
        assert len(kernel_calls) >= 2
        scripted = torch.jit.script(torch.nn.CrossEntropyLoss(weight=loss.weight, label_smoothing=0.0))
        torch.testing.assert_close(scripted(x, t), expected)
    torch.testing.assert_close(compiled_before(x, t), expected)


# ---------------------------------------------------------------------------------------------------- Hugging Face

STEPS = 10


@pytest.fixture(scope="module")
def transformers():
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_HUB_OFFLINE", "1")
        yield pytest.importorskip("transformers")


def language_model(transformers, kind):
    sizes = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}}
    sizes["llama"] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=200, bos_token_id=0, eos_token_id=0, **sizes[kind])
    return transformers.AutoModelForCausalLM.from_config(config)


def texts(n):
    torch.manual_seed(1)
    ids = torch.randint(1, 200, (n, 16))
    return ids, ids.where(torch.arange(16) < torch.randint(4, 17, (n, 1)), -100)  # padding


def assert_same_training(ours, theirs):
    (losses, parameters), (expected_losses, expected_parameters) = ours, theirs
    assert len(losses) == STEPS and losses[-1] != losses[0]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected_losses))
    torch.testing.assert_close(parameters, expected_parameters)


def assert_same_under_a_patch(trained, kernel_calls):
    theirs = trained()
    assert not kernel_calls
    with patch():
        ours = trained()
    assert len(kernel_calls) == STEPS
    assert_same_training(ours, theirs)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_language_model_trains_as_without_a_patch(kind, transformers, kernel_calls):
    def trained():
        model, (ids, labels) = language_model(transformers, kind), texts(8)
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.3), []
        for _ in range(STEPS):  # with dropout, of the same random numbers
            loss = model(input_ids=ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, model.state_dict()

    assert_same_under_a_patch(trained, kernel_calls)


def test_a_trainer_trains_as_without_a_patch(transformers, kernel_calls, tmp_path):
    pytest.importorskip("accelerate")

    def trained():
        model = language_model(transformers, "gpt2")
        data = [{"input_ids": ids, "labels": labels} for ids, labels in zip(*texts(32), strict=True)]
        how = {"max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 0.3, "optim": "sgd", "seed": 2}
        quiet = {"logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
        arguments = transformers.TrainingArguments(str(tmp_path), **how, **quiet)
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        trainer.train()
        losses = [float(log["loss"]) for log in trainer.state.log_history if "loss" in log]
        return losses, model.state_dict()

    assert_same_under_a_patch(trained, kernel_calls)


def test_compiled_code_follows_patches_and_is_compiled_once_for_each_way():
    compiled = torch.compile(lambda x, y: F.cross_entropy(x, y), backend="eager", fullgraph=True)
    input, target = torch.tensor([[20.0, 0.0, 0.0]]), torch.tensor([0])
    for _ in range(12):  # more than torch would compile again
        with patch():
            assert compiled(input, target) > 0  # of which torch's float32 has lost all digits
        assert compiled(input, target) == 0
