"""What a backend is asked to do, and which one does it.

A backend is a module with

    max_threads() -> int                                            its own limit, for n_threads=None
    scan_targets(rows, n_rows, n_classes) -> (bad, counted, weight_sum)
    empty_like(array, dtype) -> ndarray                             for a gradient
    small_call(logits, target, ignore_index, gradient)              (mean, gradient), or None: not the common case
    small_call_at(logits, wide, n_rows, n_classes, target, ignore_index, gradient)
                                                                    the same, of contiguous memory at these addresses;
                                                                    the mean as an array
    run(job, plan) -> (loss_sum, bad, counted, weight_sum)          bad rows are not read
    measure(job, plan, values, target_logit) -> bad                 to `RowValues` of rows.py; target_logit: of targets
                                                                    that may be in other parts of a row, or None
    run_elements(job, plan) -> (float, bool)                        the sum of the losses; whether a target is bad
    label_range(labels, n_threads) -> (int, int)                    the least and the greatest
    number_strings(strings) -> (first, number) or None              distinct ones by first appearance, and which of them
                                                                    each is; None: too many for this way
    run_probabilities(job, plan) -> (float, bool, bool, bool)       the sum of the losses; whether a probability is not
                                                                    in [0, 1], every row's sum is 1, every column is
                                                                    that of some label
    config() -> dict                                                for `ce_fast.show_config`
"""

import importlib
import importlib.util
import os
from contextvars import ContextVar, Token
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import numpy as np

NAMES = ("compiled", "numba")  # in the order of choice
RULES = (  # in the order of ce_rule in csrc/ce_fast.h
    "cross_entropy", "focal", "poly", "generalized", "kl_forward", "kl_reverse",
    "binary", "binary_probability", "binary_focal",
)  # fmt: skip
_choice: ContextVar[str | None] = ContextVar("ce_fast_backend", default=None)


@dataclass(frozen=True, slots=True)
class Rows:
    """What is known of each row beside its logits: contiguous, in C order over the outer shape."""

    target: np.ndarray | None = None  # (n_rows,) class indices of any native integer dtype
    ignore_index: int = -100
    weight: np.ndarray | None = None  # (n_classes,) float64
    sample_weight: np.ndarray | None = None  # (n_rows,) float64


@dataclass(frozen=True, slots=True)
class Job:
    """One pass over logits x. Arrays of logits' shape are views with the class axis last, of any strides.

    z = softcap tanh(x / softcap) / temperature;  n = lse - z = -log p;  mass_k = weight_k (on * q_k + off)

    loss_i = s_i [sum_k mass_k f(n_k) + w z_loss lse^2]      f: the rule;  w = weight_target, 1 for soft
    loss_i = s_i KL(q || p) or s_i KL(p || q)                rule="kl_forward", "kl_reverse"; soft: logits of q
    out_i  = upstream_i scale dloss_i/dx, hess_i likewise    emit="gradient"; softmax if there is no target
    out_i  = z - lse                                         emit="log_softmax"
    """

    logits: np.ndarray  # IN (outer..., n_classes)
    rows: Rows = Rows()  # IN
    soft: np.ndarray | None = None  # IN (outer..., n_classes) class probabilities; for kl the logits of q
    out: np.ndarray | None = None  # OUT (outer..., n_classes); may be logits itself
    hess: np.ndarray | None = None  # OUT (outer..., n_classes) diagonal Hessian, with emit="gradient"
    emit: str | None = None  # None | "gradient" | "log_softmax"
    upstream: np.ndarray | None = None  # IN (n_rows,) float64
    left_out: np.ndarray | None = None  # IN (n_rows, k) int64, in rising order: classes that are not there
    rule: str = "cross_entropy"  # "focal" | "poly" | "generalized" | "kl_forward" | "kl_reverse"
    parameter: float = 0.0  # of the rule: gamma, epsilon, q
    on: float = 1.0
    off: float = 0.0
    z_loss: float = 0.0
    temperature: float = 1.0
    softcap: float | None = None
    log_probs: bool = False  # kl: logits and soft are log-probabilities, which no lse follows
    scale: float = 1.0  # of the gradient by z / temperature
    hess_scale: float = 1.0
    floor: float = 0.0  # of the Hessian, in rows that count
    loss: np.ndarray | None = None  # OUT (n_rows,) of the compute dtype
    lse: np.ndarray | None = None  # OUT (n_rows,) of the compute dtype


@dataclass(frozen=True, slots=True)
class ElementJob:
    """One pass over elements. Arrays have the shape of logits, with strides of 0 where they are broadcast.

    y' = on y + off;  p = sigmoid(z)
    loss = s w [(1 - y') softplus(z) + pos_weight y' softplus(-z)]            rule="binary"
    loss = s w [-(1 - y') log(1 - x) - pos_weight y' log x], x = logits       rule="binary_probability"
    loss = s c u^gamma ["binary"], u = y (1 - p) + (1 - y) p                  rule="binary_focal"
           c = alpha y + (1 - alpha) (1 - y), or 1
    out  = upstream scale dloss/dz, hess likewise
    """

    logits: np.ndarray  # IN
    target: np.ndarray  # IN, of any real dtype
    rule: str = "binary"
    weight: np.ndarray | None = None  # IN, these of any real dtype
    pos_weight: np.ndarray | None = None  # IN
    sample_weight: np.ndarray | None = None  # IN
    upstream: np.ndarray | None = None  # IN
    out: np.ndarray | None = None  # OUT; may be logits itself
    hess: np.ndarray | None = None  # OUT
    loss: np.ndarray | None = None  # OUT
    gamma: float = 0.0
    alpha: float | None = None
    on: float = 1.0
    off: float = 0.0
    scale: float = 1.0
    hess_scale: float = 1.0
    floor: float = 0.0


@dataclass(frozen=True, slots=True)
class ProbabilityJob:
    """One pass over probabilities p, aligned, of the dtypes of scikit-learn: float64, float32, float16.

    picked_i = clip(p[i, labels_i - low], eps, 1 - eps), or the sum of -weight_i log of them
    """

    proba: np.ndarray  # IN (n_rows, n_classes), or (n_rows,): of label low + 1, and 1 - p of label low
    labels: np.ndarray  # IN (n_rows,) of bools or any integers but uint64; labels - low are columns
    low: int
    eps: float
    tolerance: float  # of a row's sum from 1
    weight: np.ndarray | None = None  # IN (n_rows,) contiguous float64
    picked: np.ndarray | None = None  # OUT (n_rows,) contiguous, of the dtype of proba; in place of the sum


def _missing(name: str) -> str | None:
    """Why a backend cannot be used here, or None. Imports nothing."""
    if name == "compiled" and importlib.util.find_spec("ce_fast._kernels") is None:
        return "this installation has no compiled kernels; reinstall ce_fast where a C compiler is present"
    if name == "numba" and importlib.util.find_spec("numba") is None:
        return "numba is not installed: pip install 'ce_fast[numba]'"
    return None


def _check_name(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} is {name!r}; expected one of {NAMES}")
    if reason := _missing(name):
        raise ImportError(f"{source} is {name!r}, but {reason}")
    return name


@lru_cache(maxsize=1)
def _default_name() -> str:
    if forced := os.environ.get("CE_FAST_BACKEND"):
        return _check_name(forced, "CE_FAST_BACKEND")
    for name in NAMES:
        if _missing(name) is None:
            return name
    raise ImportError("ce_fast has no backend: " + "; or ".join(f"{name}: {_missing(name)}" for name in NAMES))


@lru_cache(maxsize=len(NAMES))
def _load(name: str) -> ModuleType:
    return importlib.import_module(f"ce_fast.backends.{name}")


def active_name() -> str:
    """The backend that a call made now would use."""
    return _choice.get() or _default_name()


def active() -> ModuleType:
    return _load(active_name())


class use_backend:
    """Choose the backend: ``use_backend("numba")`` for good, ``with use_backend("numba"):`` for a block.

    The choice is a context variable: another thread, or another asyncio task, keeps its own.

    Parameters
    ----------
    name : {"compiled", "numba"} or None
        None goes back to the default: ``CE_FAST_BACKEND``, else the first that is there.

    Raises
    ------
    ValueError
        If there is no such backend.
    ImportError
        If it is not installed here; the message says what to install.

    Examples
    --------
    >>> import ce_fast as ce
    >>> with ce.use_backend("numba"):
    ...     ce.show_config(mode="dicts")["backend"]
    'numba'
    """

    def __init__(self, name: str | None):
        self._name = None if name is None else _check_name(name, "backend")
        self._token: Token | None = _choice.set(self._name)

    def __enter__(self) -> None:
        if self._token is None:  # entered again
            self._token = _choice.set(self._name)

    def __exit__(self, *exc) -> None:
        if self._token is not None:
            _choice.reset(self._token)
            self._token = None
