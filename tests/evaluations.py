"""Batches to evaluate, and the comparison of what evaluations found."""

import numpy as np
import pytest

from ce_fast.evaluation import Evaluator

WEIGHTS = ["unweighted", "weighted"]
OPTIONS = {"class_axis": -1, "temperatures": (0.5, 1.0, 2.0, 4.0), "top_k": (1, 2, 5)}


def batch(rng, shape=(6, 20), n_classes=11, dtype=np.float32, weights="weighted"):
    """Logits, targets (some ignored) and update's other arguments, for rows in sequences along the last axis."""
    logits = (2 * rng.normal(size=(*shape, n_classes))).astype(dtype)
    target = np.where(rng.random(shape) < 0.3, logits.argmax(-1), rng.integers(n_classes, size=shape))
    target[rng.random(shape) < 0.1] = -100
    more = {
        "sample_weight": None if weights == "unweighted" else np.round(4 * rng.random(shape)) / 4,
        "group": np.array(["a", "b", "long one"])[rng.integers(3, size=shape)],
        "sequence": rng.integers(4, size=shape[0]),
        "n_bytes": 70,
        "n_characters": 60,
    }
    return logits, target, more


def batches(rng, n, **options):
    """Uneven ones, some of no rows."""
    return [batch(rng, (int(rng.integers(4)), int(rng.integers(1, 9))), **options) for _ in range(n)]


def evaluated(parts, **options):
    evaluator = Evaluator(**(OPTIONS | options))
    for logits, target, more in parts:
        evaluator.update(logits, target, **more)
    return evaluator


def flat(value, name=""):
    """(name, number) of all that a report holds."""
    if isinstance(value, dict):
        return [pair for key, each in value.items() for pair in flat(each, f"{name}.{key}")]
    if isinstance(value, list):
        return [pair for i, each in enumerate(value) for pair in flat(each, f"{name}[{i}]")]
    return [(name, value)]


def assert_close(actual, expected, rel, but=()):
    actual, expected = (
        {name: value for name, value in flat(r.to_dict()) if not name.startswith(tuple(but))}
        for r in (actual, expected)
    )
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name] == (value if isinstance(value, str | None) else pytest.approx(value, rel=rel, abs=1e-15)), (
            name
        )
