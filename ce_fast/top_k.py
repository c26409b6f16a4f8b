"""A teacher of which the k largest probabilities of each row are known: its divergence, and the student's gradient.

The other classes are one more class, the bucket, or there are none. With d = log p - log q of a class or of the
bucket, the gradient by z is p - q (forward) or p (d - KL) (reverse), and each class of the bucket has its share of the
bucket's. The student's bucket is the sum over its classes alone, and so exact however small.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ce_fast import engine, inputs
from ce_fast.inputs import Logits

if TYPE_CHECKING:
    from ce_fast.distillation import DistillationLoss


class TopKTeacher(NamedTuple):
    """The k largest probabilities of a teacher, in place of its logits.

    Parameters
    ----------
    indices : array_like of int
        Of the shape of the logits, with k classes along the class axis; no class twice in a row.
    log_probs : array_like
        Of the same shape: the logarithms of the teacher's probabilities, at the temperature of the loss.
    """

    indices: object
    log_probs: object


class TopK:
    """A `TopKTeacher`, checked, against a student: `run` is the term of the loss."""

    def __init__(
        self,
        loss: "DistillationLoss",
        logits: Logits,
        teacher: TopKTeacher,
        weight: np.ndarray | None,  # (n_rows,) rows of weight 0 are not read
        upstream: np.ndarray | None,  # (n_rows,)
        scale: float,  # of the gradient by z / temperature
    ):
        n_rows = math.prod(logits.outer_shape)
        self.loss, self.logits, self.upstream, self.scale = loss, logits, upstream, scale
        self.weight = np.ones(n_rows) if weight is None else weight
        indices, log_probs = _as_arrays(teacher, logits)
        indices = _as_indices(indices, logits, self.weight != 0)
        order = np.argsort(indices, axis=1)
        self.indices = np.take_along_axis(indices, order, 1)
        self.log_probs = np.take_along_axis(log_probs.astype(np.float64), order, 1)
        # what the sum of probabilities may miss 1 by; the bucket of KL(p || q) has that at least, or it were infinite
        self.slack = inputs.epsilon(log_probs.dtype) if loss.direction == "reverse" else 0.0
        self._check_rows()

    def _check_rows(self) -> None:
        twice = (self.indices[:, 1:] == self.indices[:, :-1]).any(1)
        if twice.any():
            raise ValueError(
                f"teacher.indices of row {np.argmax(twice)} name a class twice; expected each at most once"
            )
        with np.errstate(all="ignore"):
            sums = np.exp(self.log_probs).sum(1)
            over = (self.weight != 0) & (sums > 1 + 1e-2)
        if self.loss.tail == "bucket" and over.any():
            row = int(np.argmax(over))
            raise ValueError(
                f"teacher.log_probs of row {row} sum to {sums[row]:.6g} as probabilities; expected at most 1"
            )

    def run(self, index: tuple, rows: slice, out: np.ndarray | None) -> np.ndarray:
        x, chosen, s = self.logits.rows[index], self.indices[rows], self.weight[rows]
        with np.errstate(all="ignore"):
            log_p, slope = self._student(x, chosen)
            kl, slopes = _divergence(log_p, self._teacher(rows), self.loss.direction == "forward")
            up = s * self.scale * (1.0 if self.upstream is None else self.upstream[rows])
            slopes = np.where((s == 0)[:, None], 0.0, np.where(np.isnan(kl)[:, None], np.nan, slopes * up[:, None]))
            if out is not None:
                tail = {"upstream": np.ascontiguousarray(slopes[:, -1])}
                engine.run_block(self._others(x, chosen) | tail, out, self.loss.n_threads, wide=True)
                flat = out.reshape(-1, out.shape[-1])
                flat[s == 0] = 0
                np.put_along_axis(flat, chosen, np.where(slopes[:, :-1] == 0, 0.0, slopes[:, :-1] * slope), 1)
            return np.where(s == 0, 0.0, s * kl)

    def _others(self, x: np.ndarray, chosen: np.ndarray) -> engine.Fields:
        """A job over the classes that are not chosen."""
        loss = self.loss
        return {"logits": x, "left_out": chosen, "temperature": loss.temperature, "softcap": loss.softcap}

    def _student(self, x: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, k + 1) log-probabilities of the chosen classes and the bucket; the softcap's derivative at the chosen."""
        lse = np.empty(len(chosen))
        engine.run_block(self._others(x, chosen) | {"lse": lse}, None, self.loss.n_threads, wide=True)
        z = np.take_along_axis(x, chosen.reshape(*x.shape[:-1], -1), -1).reshape(chosen.shape).astype(np.float64)
        slope, cap = np.ones_like(z), self.loss.softcap
        if cap is not None:
            slope, z = np.cosh(z / cap) ** -2.0, cap * np.tanh(z / cap)
        return _normalized(np.concatenate([z / self.loss.temperature, lse[:, None]], 1)), slope

    def _teacher(self, rows: slice) -> np.ndarray:
        """(n, k + 1) log-probabilities of the chosen classes and the bucket, made to sum to 1 beyond any rounding."""
        log_q = self.log_probs[rows]
        left = 1 - np.exp(log_q).sum(1, keepdims=True)
        left = np.maximum(np.where(left < 2.0**-49, 0.0, left), self.slack)
        if self.loss.tail == "renormalize" or log_q.shape[1] == self.logits.n_classes:
            left = np.zeros_like(left)
        return _normalized(np.concatenate([log_q, np.log(left)], 1))


def _as_arrays(teacher: TopKTeacher, logits: Logits) -> tuple[np.ndarray, np.ndarray]:
    """(indices, log-probabilities) of shape (n_rows, k)."""
    given, axis, n_classes = logits.given.shape, logits.axis, logits.n_classes
    arrays = [inputs.as_array(value, f"teacher.{name}") for name, value in teacher._asdict().items()]
    if not inputs.is_index(arrays[0].dtype):
        raise TypeError(f"teacher.indices has dtype {arrays[0].dtype}; expected an integer dtype")
    if not inputs.is_float(arrays[1].dtype):
        raise TypeError(f"teacher.log_probs has dtype {arrays[1].dtype}; expected a floating one")
    k = arrays[0].shape[axis] if arrays[0].ndim == len(given) else 0
    for name, array in zip(teacher._fields, arrays, strict=True):
        if array.shape != (*given[:axis], k, *given[axis + 1 :]) or not 1 <= k <= n_classes:
            wanted = ", ".join("k" if i == axis else str(n) for i, n in enumerate(given))
            raise ValueError(f"teacher.{name} has shape {array.shape}; expected ({wanted}) with 1 <= k <= {n_classes}")
    indices, log_probs = (inputs.class_last(array, axis).reshape(-1, k) for array in arrays)
    return indices, log_probs


def _as_indices(indices: np.ndarray, logits: Logits, counts: np.ndarray) -> np.ndarray:
    """int64; IndexError at the first in a row that counts that is no class. Other rows get the first k classes."""
    bad = counts[:, None] & ((indices < 0) | (indices >= logits.n_classes))
    if bad.any():
        row, place = np.unravel_index(int(np.argmax(bad)), bad.shape)
        value = indices[row, place]
        raise IndexError(f"teacher.indices of row {row} hold {value}; expected 0 <= index < {logits.n_classes}")
    return np.where(counts[:, None], indices.astype(np.int64), np.arange(indices.shape[1]))


def _normalized(z: np.ndarray) -> np.ndarray:
    """z - lse of each row."""
    top = z.max(1, keepdims=True)
    return (z - top) - np.log(np.exp(z - top).sum(1, keepdims=True))


def _divergence(log_p: np.ndarray, log_q: np.ndarray, forward: bool) -> tuple[np.ndarray, np.ndarray]:
    """(KL of each row, its gradient by z)"""
    p, q = np.exp(log_p), np.exp(log_q)
    mass, against, d = (q, p, log_q - log_p) if forward else (p, q, log_p - log_q)
    plain = np.where((mass == 0) & ~np.isnan(p + q), 0.0, mass * d) + (against - mass)  # mass 0 contributes 0
    kl = np.where(np.abs(d) <= 0.5, mass * _bregman(d), plain).sum(1)
    return kl, p - q if forward else np.where(p == 0, 0.0, p * (d - kl[:, None]))


def _bregman(d: np.ndarray) -> np.ndarray:
    """d + exp(-d) - 1 for |d| <= 0.5, by its series: no term of a divergence is negative, for p and q both sum to 1."""
    total = np.ones_like(d)
    for i in range(16, 2, -1):
        total = 1.0 - total * (d / i)
    return total * d * d / 2
