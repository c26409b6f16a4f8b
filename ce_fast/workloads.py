"""The workloads of the ratio table: what ours and its peers do on the same input. Each is defined once, here."""

import importlib.util
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

import ce_fast
from ce_fast.threads import SERIAL_LOGITS

OURS = "ce_fast"
FEATURES = 512  # of hidden states and classifiers
TORCH, COMPILED, SKLEARN, JAX = "torch eager", "torch.compile", "scikit-learn", "jax jit"
CHUNKED = "torch chunked"
XGBOOST, LIGHTGBM = "XGBoost's own", "LightGBM's own"
ROUNDS = 5  # of boosting
READ = "read once (amax)"  # no peer but the floor: its bars say how many times as long ours may take at most

Shape = tuple[int, ...]
Call = Callable[[], object]
Calls = dict[str, Call]


@dataclass(frozen=True)
class Peer:
    """Whom to measure against. Bar and goal are of the ratio peer / ours; None where there is none."""

    name: str
    at_least: float | None = None
    goal: float | None = None


@dataclass(frozen=True)
class Memory:
    """Whose memory to compare, beyond the input and the results. The bars are of ours: bytes, and peer / ours."""

    peer: str
    under: int | None = None
    at_least: float | None = None
    goal: float | None = None


@dataclass(frozen=True)
class Workload:
    """One piece of work that ours and its peers do on the same input.

    `setup(shape, n_threads)` makes the input and returns a callable by name for whatever is installed: `OURS` and
    the peers. Calls that compute (all but `READ`) return the same value, or (value, gradient, ...).
    """

    name: str
    work: str
    shape: Shape
    setup: Callable[[Shape, int], Calls]
    peers: tuple[Peer, ...]
    memory: tuple[Memory, ...] = ()

    @property
    def quick_shape(self) -> Shape:
        """A quarter of the rows, and all the columns; a small call stays as it is."""
        rows, *rest = self.shape
        return (max(1, rows // 4), *rest) if math.prod(self.shape) >= SERIAL_LOGITS else self.shape

    def who(self) -> set[str]:
        """Ours and the peers, those that are installed."""
        return set(self.setup(tuple(min(n, 16) for n in self.shape), 1))


def installed(module: str) -> bool:
    """Whether `module` could be imported; imports nothing."""
    return importlib.util.find_spec(module) is not None


def has_compiler() -> bool:
    """Whether there is the C++ compiler that torch.compile needs."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def make_logits(shape: Shape, dtype: str = "float32", class_axis: int = -1) -> tuple[np.ndarray, np.ndarray]:
    """Random logits and class indices, the same at every call.

    Parameters
    ----------
    shape : tuple of int
    dtype : {"float32", "float64", "bfloat16"}
        bfloat16 needs `ml_dtypes`.
    class_axis : int

    Returns
    -------
    logits : ndarray of shape `shape`
        Normal, of standard deviation 3.
    target : int64 ndarray of shape `shape` without the class axis
    """
    rng = np.random.default_rng(0)
    drawn = np.float64 if dtype == "float64" else np.float32
    logits = rng.standard_normal(shape, dtype=drawn)
    logits *= 3
    rows = list(shape)
    target = rng.integers(rows.pop(class_axis), size=rows)
    if dtype != "bfloat16":
        return logits, target
    import ml_dtypes

    return logits.astype(ml_dtypes.bfloat16), target


def as_tensor(array: np.ndarray):
    """A torch tensor that shares the memory of `array`; torch.from_numpy does not know bfloat16."""
    import torch

    if array.dtype.name != "bfloat16":
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def _read(logits: np.ndarray) -> Call:
    """Read an array once; NumPy's own maximum has one thread."""
    if not installed("torch"):
        return partial(np.max, logits)
    import torch

    return partial(torch.amax, as_tensor(logits))


def _jax(logits: np.ndarray, target: np.ndarray, gradient: bool = False) -> Call:
    import jax

    def loss(x, y):
        picked = jax.numpy.take_along_axis(x, y[:, None], axis=1)[:, 0]
        return (jax.nn.logsumexp(x, axis=1) - picked).mean()

    compiled = jax.jit(jax.value_and_grad(loss) if gradient else loss)
    x, y = jax.numpy.asarray(logits), jax.numpy.asarray(target)
    return lambda: jax.block_until_ready(compiled(x, y))


def _compiled(logits: np.ndarray, target: np.ndarray) -> Call:
    """torch.compile of the cross-entropy; its first call compiles, for the threads that torch has then."""
    import torch

    x, y = as_tensor(logits), torch.from_numpy(target)

    def loss(x, y):
        return torch.nn.functional.cross_entropy(x, y)

    @cache
    def program():
        torch._dynamo.reset()  # another shape is another program, and from the ninth on Dynamo would not compile it
        return torch.compile(loss, fullgraph=True, dynamic=False)

    return lambda: program()(x, y)


def forward_calls(
    logits: np.ndarray, target: np.ndarray, *, class_axis=None, backend=None, compiled=False, **options
) -> Calls:
    """The value: ours and, of what is installed, reading once, torch, JAX, and torch.compile if asked for."""

    ours = partial(ce_fast.cross_entropy, logits, target, class_axis=class_axis, **options)

    def ours_by_backend():
        with ce_fast.use_backend(backend):
            return ours()

    calls: Calls = {OURS: ours if backend is None else ours_by_backend, READ: _read(logits)}
    if installed("torch"):
        import torch

        cross_entropy = torch.nn.functional.cross_entropy
        calls[TORCH] = partial(cross_entropy, as_tensor(logits), torch.from_numpy(target), **options)
        if compiled and has_compiler():
            calls[COMPILED] = _compiled(logits, target)
    if installed("jax") and logits.ndim == 2 and not options:
        calls[JAX] = _jax(logits, target)
    return calls


def _forward(shape: Shape, n_threads: int, *, dtype="float32", class_axis=None, backend=None, **options) -> Calls:
    if (dtype == "bfloat16" and not installed("ml_dtypes")) or (backend is not None and not installed(backend)):
        return {}
    logits, target = make_logits(shape, dtype, -1 if class_axis is None else class_axis)
    return forward_calls(logits, target, class_axis=class_axis, backend=backend, **options)


def _torch_step(function, logits: np.ndarray, target: np.ndarray) -> Call:
    """Loss and backward, as a training step does them: on a leaf of its own, whose last gradient it frees."""
    import torch

    x, y = torch.from_numpy(logits).requires_grad_(), torch.from_numpy(target)

    def step():
        x.grad = None
        loss = function(x, y)
        loss.backward()
        return loss.detach(), x.grad

    return step


def gradient_calls(logits: np.ndarray, target: np.ndarray, *, class_axis=None) -> Calls:
    """The value and a new gradient: ours and, of what is installed, torch and JAX."""
    calls: Calls = {OURS: partial(ce_fast.CrossEntropyLoss(class_axis=class_axis).value_and_grad, logits, target)}
    if installed("torch"):
        import torch

        calls[TORCH] = _torch_step(torch.nn.functional.cross_entropy, logits, target)
    if installed("jax") and logits.ndim == 2:
        calls[JAX] = _jax(logits, target, gradient=True)
    return calls


def _gradient(shape: Shape, n_threads: int, *, class_axis=None) -> Calls:
    logits, target = make_logits(shape, class_axis=-1 if class_axis is None else class_axis)
    return gradient_calls(logits, target, class_axis=class_axis)


def _binary(shape: Shape, n_threads: int, *, focal: bool = False) -> Calls:
    """Against torch's function, and the formula of torchvision in torch's operations."""
    logits, _ = make_logits(shape)
    target = (np.arange(logits.size) % 3 == 0).astype(np.float32).reshape(shape)
    loss = ce_fast.SigmoidFocalLoss() if focal else ce_fast.BCEWithLogitsLoss()
    calls: Calls = {OURS: partial(loss.value_and_grad, logits, target)}
    if not installed("torch"):
        return calls
    import torch

    entropy = torch.nn.functional.binary_cross_entropy_with_logits

    def sigmoid_focal(x, y):
        p = torch.sigmoid(x)
        losses = entropy(x, y, reduction="none") * (1 - (p * y + (1 - p) * (1 - y))) ** 2
        return ((0.25 * y + 0.75 * (1 - y)) * losses).mean()

    return calls | {TORCH: _torch_step(sigmoid_focal if focal else entropy, logits, target)}


def _distillation(shape: Shape, n_threads: int) -> Calls:
    logits, target = make_logits(shape)
    teacher = np.roll(logits, 1, axis=0) / 2 + logits / 2
    loss = ce_fast.DistillationLoss(2.0, 0.5)
    calls: Calls = {OURS: partial(loss.value_and_grad, logits, teacher, target)}
    if not installed("torch"):
        return calls
    import torch
    import torch.nn.functional as F

    y = torch.from_numpy(teacher)

    def distillation(x, target):
        log_p, log_q = torch.log_softmax(x / 2, -1), torch.log_softmax(y / 2, -1)
        soft = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        return 0.5 * 4 * soft + 0.5 * F.cross_entropy(x, target)

    return calls | {TORCH: _torch_step(distillation, logits, target)}


def _autograd(shape: Shape, n_threads: int) -> Calls:
    if not installed("torch"):
        return {}
    import torch

    from ce_fast.adapters import torch as adapter

    logits, target = make_logits(shape)
    return {
        OURS: _torch_step(adapter.cross_entropy, logits, target),
        TORCH: _torch_step(torch.nn.functional.cross_entropy, logits, target),
    }


def _no_grad(shape: Shape, n_threads: int) -> Calls:
    if not installed("torch"):
        return {}
    import torch

    from ce_fast.adapters import torch as adapter

    logits, target = (torch.from_numpy(array) for array in make_logits(shape))

    def under_no_grad(function):
        with torch.no_grad():
            return function(logits, target)

    functions = {OURS: adapter.cross_entropy, TORCH: torch.nn.functional.cross_entropy}
    return {name: partial(under_no_grad, function) for name, function in functions.items()}


def make_linear(shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(hidden states, classifier, class indices) whose logits have this shape and a standard deviation of 3."""
    rng = np.random.default_rng(0)
    hidden, classifier = (rng.standard_normal((n, FEATURES), dtype=np.float32) for n in shape)
    hidden *= 3 / math.sqrt(FEATURES)
    return hidden, classifier, rng.integers(shape[1], size=shape[0])


def _linear(shape: Shape, n_threads: int, *, through_torch: bool = False) -> Calls:
    """The shape is that of the logits."""
    hidden, classifier, target = make_linear(shape)

    def ours():
        value, grads = ce_fast.LinearCrossEntropyLoss().value_and_grad(hidden, classifier, target)
        return value, grads.hidden, grads.classifier

    calls: Calls = {} if through_torch else {OURS: ours}
    if not installed("torch"):
        return calls
    import torch
    import torch.nn.functional as F

    h, w = torch.from_numpy(hidden).requires_grad_(), torch.from_numpy(classifier).requires_grad_()
    y = torch.from_numpy(target)

    def step(function):
        h.grad = w.grad = None
        loss = function(h, w, y)
        loss.backward()
        return loss.detach(), h.grad, w.grad

    calls[TORCH] = partial(step, lambda h, w, y: F.cross_entropy(F.linear(h, w), y))
    if through_torch:
        from ce_fast.adapters.torch import linear_cross_entropy

        calls[OURS] = partial(step, linear_cross_entropy)
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        calls[CHUNKED] = partial(step, partial(F.linear_cross_entropy, options=options))
    return calls


def make_probabilities(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities, labels): float64 rows that sum to 1, and labels of which every class has some."""
    rng = np.random.default_rng(0)
    probabilities = rng.random(shape)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return probabilities, rng.permutation(shape[0]) % shape[1]


def _log_loss(shape: Shape, n_threads: int, *, strings: bool = False) -> Calls:
    if not installed("sklearn"):
        return {}
    from sklearn.metrics import log_loss

    from ce_fast.adapters import sklearn as adapter

    probabilities, labels = make_probabilities(shape)
    labels = np.char.add("class ", labels.astype(str)) if strings else labels
    return {OURS: partial(adapter.log_loss, labels, probabilities), SKLEARN: partial(log_loss, labels, probabilities)}


def _multinomial(shape: Shape, n_threads: int) -> Calls:
    logits, target = make_logits(shape, "float64")
    calls: Calls = {OURS: partial(ce_fast.CrossEntropyLoss(reduction="none").value_and_grad, logits, target)}
    if not installed("sklearn"):
        return calls
    try:  # it is private: another release may have renamed or changed it
        from sklearn._loss.loss import HalfMultinomialLoss

        loss_gradient = HalfMultinomialLoss(n_classes=shape[1]).loss_gradient
        loss_gradient(y_true=target[:1].astype(float), raw_prediction=logits[:1].copy(), n_threads=n_threads)
    except (ImportError, AttributeError, TypeError, ValueError):
        return calls
    y_true = target.astype(float)
    calls[SKLEARN] = partial(loss_gradient, y_true=y_true, raw_prediction=logits, n_threads=n_threads)
    return calls


def make_table(shape: Shape, n_features: int) -> tuple[np.ndarray, np.ndarray]:
    """(features, labels) of a classification problem whose raw scores have this shape."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((shape[0], n_features), dtype=np.float32)
    scores = table @ rng.standard_normal((n_features, shape[1]), dtype=np.float32)
    return table, (scores + 3 * rng.standard_normal(shape, dtype=np.float32)).argmax(axis=1)


def _evaluate(shape: Shape, n_threads: int) -> Calls:
    """NLL, and accuracy, mean reciprocal rank, Brier score, entropy: some numbers a row, and their means."""
    logits, target = make_logits(shape, "bfloat16")

    def ours():
        evaluator = ce_fast.Evaluator(n_threads=n_threads)
        evaluator.update(logits, target)
        found = evaluator.compute().overall
        others = found.accuracy, found.mean_reciprocal_rank, found.brier_score, found.entropy
        return found.nll.value, np.array([mean.value for mean in others])

    calls: Calls = {OURS: ours, READ: _read(logits)}
    if not installed("torch"):
        return calls
    import torch

    x, t, classes = as_tensor(logits), torch.from_numpy(target)[:, None], torch.arange(shape[1])

    def torchs():
        log_p = x.float().log_softmax(-1)
        own, p = log_p.gather(-1, t), log_p.exp()
        x_t = x.gather(-1, t)
        rank = ((x > x_t) | ((x == x_t) & (classes < t))).sum(-1)
        brier = p.square().sum(-1) - 2 * own.exp()[:, 0] + 1
        rows = (rank == 0).float(), 1 / (1 + rank), brier, -(p * log_p).sum(-1)
        return -own.mean().item(), np.array([values.mean().item() for values in rows])

    return calls | {TORCH: torch.no_grad()(torchs)}


def _xgboost(shape: Shape, n_threads: int, *, n_features: int) -> Calls:
    """Training on our objective, and on the one of the library; the shape is that of the raw scores."""
    if not installed("xgboost"):
        return {}
    import xgboost

    from ce_fast.adapters.boosting import SoftmaxObjective

    data = xgboost.QuantileDMatrix(*make_table(shape, n_features), nthread=n_threads)
    params = {"objective": "multi:softprob", "num_class": shape[1], "base_score": 0.5, "nthread": n_threads}
    log_loss = SoftmaxObjective().metric

    def train(objective):
        scores = xgboost.train(params, data, ROUNDS, obj=objective).predict(data, output_margin=True)
        return log_loss(scores, data)[1], scores

    return {OURS: partial(train, SoftmaxObjective(n_threads=n_threads)), XGBOOST: partial(train, None)}


def _lightgbm(shape: Shape, n_threads: int, *, n_features: int) -> Calls:
    if not installed("lightgbm"):
        return {}
    import lightgbm

    from ce_fast.adapters.boosting import SoftmaxObjective

    table, labels = make_table(shape, n_features)
    how = {"num_threads": n_threads, "verbosity": -1}
    params = how | {"num_class": shape[1], "boost_from_average": False}
    data = lightgbm.Dataset(table, labels, params=how).construct()
    log_loss = SoftmaxObjective().metric

    def train(objective):
        model = lightgbm.train(params | {"objective": objective}, data, ROUNDS)
        scores = model.predict(table, raw_score=True)
        return log_loss(scores, data)[1], scores

    return {OURS: partial(train, SoftmaxObjective(n_threads=n_threads)), LIGHTGBM: partial(train, "multiclass")}


LONG, SHORT, PIXELS, ELEMENTS = (1024, 50257), (1_000_000, 10), (8, 21, 512, 512), (4_000_000,)
LINEAR = (4096, 32000)
FORWARD = Workload(
    "forward",
    "forward float32",
    LONG,
    partial(_forward, compiled=True),
    (Peer(TORCH, 5, 10), Peer(COMPILED, 1.5, 2.5), Peer(READ, 1 / 1.8, 1 / 1.2), Peer(JAX)),
    (Memory(TORCH, under=2**20),),
)
WORKLOADS = (
    FORWARD,
    Workload("bfloat16", "forward bfloat16", LONG, partial(_forward, dtype="bfloat16"), (Peer(TORCH, 3, 6),)),
    Workload("evaluate", "evaluation, bfloat16", LONG, _evaluate, (Peer(TORCH), Peer(READ))),
    Workload("smoothing", "forward, label smoothing", LONG, partial(_forward, label_smoothing=0.1), (Peer(TORCH),)),
    Workload("numba", "forward, Numba backend", LONG, partial(_forward, backend="numba"), (Peer(TORCH, 2, 4),)),
    Workload("autograd", "torch: loss and backward", LONG, _autograd, (Peer(TORCH, 7, 15),), (Memory(TORCH),)),
    Workload("ten", "forward, 10 classes", SHORT, _forward, (Peer(TORCH, 12, 30),)),
    Workload("ten-gradient", "loss and gradient, 10 classes", SHORT, _gradient, (Peer(TORCH, 10, 20), Peer(JAX))),
    Workload("two", "forward, 2 classes", (1_000_000, 2), _forward, (Peer(TORCH, 10, 20),)),
    Workload("pixels", "forward, class axis 1", PIXELS, partial(_forward, class_axis=1), (Peer(TORCH, 8, 15),)),
    Workload(
        "pixels-gradient",
        "loss and gradient, class axis 1",
        PIXELS,
        partial(_gradient, class_axis=1),
        (Peer(TORCH, 7, 12),),
    ),
    Workload("binary", "binary, loss and gradient", ELEMENTS, _binary, (Peer(TORCH, 5, 10),)),
    Workload("focal", "sigmoid focal, loss and gradient", ELEMENTS, partial(_binary, focal=True), (Peer(TORCH),)),
    Workload("distillation", "distillation, loss and gradient", (256, 50257), _distillation, (Peer(TORCH),)),
    Workload(
        "linear",
        f"linear of {FEATURES}, loss and gradients",
        LINEAR,
        _linear,
        (Peer(TORCH, 1, 1.3), Peer(CHUNKED)),
        (Memory(TORCH, at_least=8, goal=50), Memory(CHUNKED)),
    ),
    Workload(
        "linear-torch",
        f"torch: linear of {FEATURES}, loss and backward",
        LINEAR,
        partial(_linear, through_torch=True),
        (Peer(TORCH), Peer(CHUNKED)),
    ),
    Workload("log-loss", "log_loss, float64", SHORT, _log_loss, (Peer(SKLEARN, 25, 60),)),
    Workload(
        "strings", "log_loss, labels are strings", SHORT, partial(_log_loss, strings=True), (Peer(SKLEARN, 5, 10),)
    ),
    Workload("fold", "log_loss of a small fold", (1000, 3), _log_loss, (Peer(SKLEARN, 10, 30),)),
    Workload("multinomial", "loss and gradient, float64", (100_000, 100), _multinomial, (Peer(SKLEARN, 5, 10),)),
    *(
        Workload(
            f"{name}-{host}",
            f"{who}: train, {ROUNDS} rounds, {n_features} features",
            shape,
            partial(setup, n_features=n_features),
            (Peer(peer),),
        )
        for name, shape, n_features in (("digits", (1797, 10), 64), ("table", (50_000, 7), 54))
        for host, who, setup, peer in (
            ("xgboost", "XGBoost", _xgboost, XGBOOST),
            ("lightgbm", "LightGBM", _lightgbm, LIGHTGBM),
        )
    ),
    Workload("small", "one small call, one thread", (32, 10), _forward, (Peer(TORCH, 2, 5),)),
    Workload("small-torch", "torch: one small call under no_grad", (32, 10), _no_grad, (Peer(TORCH),)),
    Workload("small-autograd", "torch: a small loss and backward", (32, 10), _autograd, (Peer(TORCH),)),
)
BY_NAME = {workload.name: workload for workload in WORKLOADS}
