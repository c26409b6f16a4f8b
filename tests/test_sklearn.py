"""Values, errors and warnings of `log_loss` are scikit-learn's; `cross_entropy_from_logits` is the formula."""

import functools
import inspect
import itertools
import re
import subprocess
import sys
import tracemalloc
import warnings

import numpy as np
import pytest

sklearn = pytest.importorskip("sklearn")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from sklearn.datasets import load_iris  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.metrics import log_loss as host_log_loss  # noqa: E402
from sklearn.metrics import make_scorer  # noqa: E402
from sklearn.model_selection import cross_validate  # noqa: E402

from ce_fast import backends, threads  # noqa: E402
from ce_fast.adapters import sklearn_inputs, sklearn_loss  # noqa: E402
from ce_fast.adapters.sklearn import (  # noqa: E402
    cross_entropy_from_logits,
    log_loss,
    make_cross_entropy_scorer,
    neg_cross_entropy_scorer,
)
from ce_fast.plan import BLOCK_LOGITS  # noqa: E402
from labelled import LABELS, LETTERS, Fixed, cross_entropy_by_hand, sample  # noqa: E402
from tolerances import assert_loss_close  # noqa: E402

pd = pytest.importorskip("pandas")
pl = pytest.importorskip("polars")

pytestmark = pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")

VERSION = tuple(int(part) for part in sklearn.__version__.split(".")[:2])
needs_1_9 = pytest.mark.skipif(VERSION < (1, 9), reason="the words of the errors and warnings are those of 1.9")

PROBABILITIES = {
    "float64": lambda p: p,
    "float32": lambda p: p.astype(np.float32),
    "float16": lambda p: p.astype(np.float16),
    "longdouble": lambda p: p.astype(np.longdouble),
    "big-endian": lambda p: p.astype(">f4"),
    "list": lambda p: p.tolist(),
    "DataFrame": lambda p: pd.DataFrame(p),
    "float32 DataFrame": lambda p: pd.DataFrame(p.astype(np.float32)),
    "nullable DataFrame": lambda p: pd.DataFrame(p, dtype="Float64"),
    "polars": lambda p: pl.DataFrame(p),
    "Fortran": np.asfortranarray,
    "reversed": lambda p: p[::-1, ::-1],
    "sliced": lambda p: np.repeat(np.repeat(p, 2, axis=0), 3, axis=1)[::2, ::3],
    "one-hot int": lambda p: (p == p.max(axis=1, keepdims=True)).astype(int),
    "one-hot bool": lambda p: p == p.max(axis=1, keepdims=True),
    "negative zero": lambda p: np.where(p == p.max(axis=1, keepdims=True), 1.0, -0.0),
}
WEIGHTS = {
    "none": lambda w: None,
    "float64": lambda w: w,
    "float32": lambda w: w.astype(np.float32),
    "int": lambda w: (4 * w).astype(int) + 1,
    "mask": lambda w: w >= np.median(w),
    "list": lambda w: w.tolist(),
    "Series": lambda w: pd.Series(w),
    "polars": lambda w: pl.Series(w),
    "negative": lambda w: w - 0.1,
}
BAD_LABELS = {
    "continuous": lambda y: y + 0.5,
    "NaN": lambda y: np.where(y > 0, np.nan, y.astype(float)),
    "inf": lambda y: np.where(y > 0, np.inf, y.astype(float)),
    "huge float": lambda y: y * 1e300,
    "object int": lambda y: y.astype(object),
    "None among str": lambda y: np.where(y > 0, "x", None),
    "int among str": lambda y: ["a", *y.tolist()[1:]],
    "str among int": lambda y: [0] * (len(y) - 1) + ["a"],
    "bytes": lambda y: y.astype("S"),
    "indicator": lambda y: np.eye(3, dtype=int)[y % 3],
    "list of lists": lambda y: y[:, None].tolist(),
    "one label": lambda y: np.zeros_like(y),
    "a string": lambda y: "abc",
    "None": lambda y: None,
    "a number": lambda y: 3,
    "empty": lambda y: [],
    "three dimensions": lambda y: y.reshape(-1, 1, 1),
    "too few": lambda y: y[1:],
}
BAD_PROBABILITIES = {
    "twice": lambda p: p * 2,
    "nine tenths": lambda p: p * 0.9,  # a warning
    "nine tenths, float32": lambda p: (p * 0.9).astype(np.float32),
    "negative": lambda p: p - 0.5,
    "NaN": lambda p: np.where(p == p.max(), np.nan, p),
    "inf": lambda p: np.where(p == p.max(), np.inf, p),
    "-inf": lambda p: np.where(p == p.max(), -np.inf, p),
    "a row too few": lambda p: p[1:],
    "a column too few": lambda p: p[:, 1:],
    "no columns": lambda p: p[:, :0],
    "no rows": lambda p: p[:0],
    "three dimensions": lambda p: p[..., None],
    "a number": lambda p: 0.5,
    "None": lambda p: None,
    "a string": lambda p: "abc",
    "strings": lambda p: np.full(p.shape, "a"),
    "complex": lambda p: p.astype(complex),
    "matrix": np.asmatrix,
}
BAD_WEIGHTS = {
    "zeros": lambda w: w * 0,
    "NaN": lambda w: w * np.nan,
    "too many": lambda w: np.append(w, w),
    "column": lambda w: w[:, None],
    "a number": lambda w: 2.0,
    "strings": lambda w: ["a"] * len(w),
    "sum of zero": lambda w: np.where(np.arange(len(w)) == 0, 1.0, np.where(np.arange(len(w)) == 1, -1.0, 0.0)),
}
GIVEN_LABELS = {
    "none": lambda u: None,
    "sorted": lambda u: u,
    "list": lambda u: u.tolist(),
    "tuple": lambda u: tuple(u.tolist()),
    "Series": lambda u: pd.Series(u),
    "one more": lambda u: np.append(u, u[-1:] + u[-1:]),
    "reversed": lambda u: u[::-1],  # a warning
    "one too few": lambda u: u[:-1],
    "one twice": lambda u: np.append(u, u[-1:]),
    "only one": lambda u: u[:1],
    "a set": lambda u: set(u.tolist()),
    "of another kind": lambda u: ["x", "y", "z"],
    "objects": lambda u: u.astype(object),
}
NORMALIZE = [True, False, np.True_, 1, "yes", None]


def outcome(function, *args, **kwargs):
    """(value or type and message of the error, categories and messages of the warnings)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            result = type(error), str(error)
    return result, [(w.category, str(w.message)) for w in caught]


def assert_same_outcome(*args, **kwargs):
    (expected, expected_warnings), (got, got_warnings) = (
        outcome(f, *args, **kwargs) for f in (host_log_loss, log_loss)
    )
    assert got_warnings == expected_warnings
    if not isinstance(expected, float):
        assert got == expected
        return
    assert type(got) is float
    # the same clip and log of the same numbers, the same mean: one ulp is for another NumPy's choice of loops
    ulp = np.spacing(abs(np.asarray(expected, np.asarray(args[1]).dtype if hasattr(args[1], "dtype") else float)))
    assert abs(got - expected) <= ulp or (np.isnan(got) and np.isnan(expected))


@pytest.fixture
def no_host(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("handed to scikit-learn")

    monkeypatch.setattr(sklearn_loss, "_host_log_loss", refuse)


# log_loss


@pytest.mark.parametrize("probabilities", PROBABILITIES)
@pytest.mark.parametrize("labels", LABELS)
def test_log_loss_is_scikit_learns(labels, probabilities):
    for seed, (n_rows, n_classes) in enumerate([(7, 2), (40, 3), (300, 5)]):
        n_classes = 2 if "bool" in labels else n_classes
        y, p, w = sample(seed, n_rows, n_classes)
        y_true, y_proba = LABELS[labels](y), PROBABILITIES[probabilities](p)
        assert_same_outcome(y_true, y_proba)
        assert_same_outcome(y_true, y_proba, sample_weight=w, normalize=False)


@pytest.mark.parametrize("shape", ["1-D", "one column", "list", "Series"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "bool"])
def test_log_loss_of_one_column_is_scikit_learns(dtype, shape):
    for seed in range(5):
        y, p, w = sample(seed, 50, 2)
        positive = np.round(p[:, 1]).astype(dtype) if dtype in ("int64", "bool") else p[:, 1].astype(dtype)
        column = {"1-D": positive, "one column": positive[:, None], "list": positive.tolist()}.get(shape)
        column = pd.Series(positive) if column is None else column
        for labels in ("int", "bool", "str", "negative"):
            assert_same_outcome(LABELS[labels](y), column)
            assert_same_outcome(LABELS[labels](y), column, sample_weight=w)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_weights_of_any_kind_give_scikit_learns_value(dtype, weights):
    for normalize in (True, False, np.True_):
        y, p, w = sample(3, 60, 4)
        assert_same_outcome(y, p.astype(dtype), sample_weight=WEIGHTS[weights](w), normalize=normalize)


@pytest.mark.parametrize("n_classes", [2, 3, 10, 1000, 70000])  # 70000: a row is longer than a block
def test_block_edges_do_not_change_the_value(n_classes, no_host):
    for n_rows in {1, 2, BLOCK_LOGITS // n_classes, BLOCK_LOGITS // n_classes + 1} - {0}:
        rng = np.random.default_rng(n_rows)
        p = rng.random((n_rows, n_classes)) + 0.01
        p /= p.sum(axis=1, keepdims=True)
        y = rng.integers(0, n_classes, n_rows)
        assert log_loss(y, p, labels=np.arange(n_classes)) == pytest.approx(
            -np.log(p[np.arange(n_rows), y]).mean(), rel=1e-14
        )


@needs_1_9
@pytest.mark.parametrize("labels", BAD_LABELS)
def test_bad_labels_give_scikit_learns_errors(labels):
    for seed, n_classes in enumerate([2, 3]):
        y, p, w = sample(seed, 12, n_classes)
        assert_same_outcome(BAD_LABELS[labels](y), p)
        assert_same_outcome(BAD_LABELS[labels](y), p, sample_weight=w, labels=np.arange(n_classes))
        assert_same_outcome(BAD_LABELS[labels](y), np.ones((12, 1)))


@needs_1_9
@pytest.mark.parametrize("probabilities", BAD_PROBABILITIES)
def test_bad_probabilities_give_scikit_learns_errors_and_warnings(probabilities):
    for seed, n_classes in enumerate([2, 3]):
        y, p, w = sample(seed, 12, n_classes)
        assert_same_outcome(y, BAD_PROBABILITIES[probabilities](p))
        assert_same_outcome(LETTERS[y], BAD_PROBABILITIES[probabilities](p), sample_weight=w)
        assert_same_outcome(y > 0, BAD_PROBABILITIES[probabilities](p[:, 0]) if p.ndim == 1 else p[:, 0] + 0.9)


@needs_1_9
@pytest.mark.parametrize("factor", [0.9, 1.1, 1 - 1e-7, 1 + 1e-7, 1 - 1e-9, 1 + 1e-9])
@pytest.mark.parametrize("row", [0, 29_999, 59_999])  # in the first block, another, the last
def test_one_row_that_does_not_sum_to_one_warns_as_in_scikit_learn(row, factor):
    p = np.full((60_000, 3), [0.25, 0.25, 0.5])
    p[row] *= factor
    assert_same_outcome(np.arange(60_000) % 3, p)


@needs_1_9
@pytest.mark.parametrize("weights", BAD_WEIGHTS)
def test_bad_weights_give_scikit_learns_errors(weights):
    y, p, w = sample(0, 12, 3)
    for normalize in (True, False):
        assert_same_outcome(y, p, sample_weight=BAD_WEIGHTS[weights](w), normalize=normalize)


@needs_1_9
@pytest.mark.parametrize("given_labels", GIVEN_LABELS)
@pytest.mark.parametrize("labels", ["int", "negative", "gaps", "float", "uint8", "str", "object str", "list of str"])
def test_labels_given_mean_what_they_mean_to_scikit_learn(labels, given_labels):
    y, p, _ = sample(1, 20, 3)
    y_true = LABELS[labels](y)
    for y_some in (y_true, LABELS[labels](np.minimum(y, 1))):  # every label occurs, or one does not
        assert_same_outcome(y_some, p, labels=GIVEN_LABELS[given_labels](np.unique(y_true)))


@needs_1_9
@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_classes=st.integers(2, 4),
    labels=st.sampled_from(sorted(LABELS) + sorted(BAD_LABELS)),
    probabilities=st.sampled_from(sorted(PROBABILITIES) + sorted(BAD_PROBABILITIES)),
    weights=st.sampled_from(["none"] * 6 + sorted(WEIGHTS) + sorted(BAD_WEIGHTS)),
    given_labels=st.sampled_from(["none"] * 6 + sorted(GIVEN_LABELS)),
    normalize=st.sampled_from([True] * 4 + NORMALIZE),
)
def test_anything_whatever_gives_scikit_learns_outcome(
    seed, n_classes, labels, probabilities, weights, given_labels, normalize
):
    y, p, w = sample(seed, 9, n_classes)
    y_true = (LABELS | BAD_LABELS)[labels](y)
    used = y if np.ndim(y_true) != 1 or not np.size(y_true) else np.asarray(y_true)
    try:
        named = GIVEN_LABELS[given_labels](np.unique(used))
    except TypeError:  # None among strings has no order
        named = None
    assert_same_outcome(
        y_true,
        (PROBABILITIES | BAD_PROBABILITIES)[probabilities](p),
        sample_weight=(WEIGHTS | BAD_WEIGHTS)[weights](w),
        labels=named,
        normalize=normalize,
    )


@needs_1_9
def test_the_signature_is_scikit_learns():
    assert inspect.signature(log_loss) == inspect.signature(host_log_loss)


@needs_1_9
def test_y_pred_is_deprecated_as_in_scikit_learn():
    y, p, _ = sample(0, 12, 3)
    for arguments in [{"y_pred": p}, {"y_pred": p, "y_proba": p}, {"y_proba": None}, {}]:
        assert outcome(log_loss, y, **arguments) == outcome(host_log_loss, y, **arguments)


def test_warnings_point_at_the_caller():
    y, p, _ = sample(0, 12, 3)
    for arguments in [{"y_proba": p / 2}, {"y_pred": p}]:
        with pytest.warns((UserWarning, FutureWarning)) as caught:
            log_loss(y, **arguments)
        assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize("labels", LABELS)
def test_ordinary_input_is_not_handed_to_scikit_learn(labels, no_host):
    n_classes = 2 if "bool" in labels else 3
    y, p, w = sample(0, 30, n_classes)
    y_true = LABELS[labels](y)
    expected = -np.log(p[np.arange(30), y].clip(np.finfo(float).eps)) @ w / w.sum()
    assert log_loss(y_true, PROBABILITIES["negative zero"](np.eye(n_classes)[y])) < 1e-15
    for probabilities in ("float64", "list", "DataFrame", "Fortran", "nullable DataFrame"):
        y_proba = PROBABILITIES[probabilities](p)
        assert log_loss(y_true, y_proba, sample_weight=w) == pytest.approx(expected, rel=1e-14)
        assert log_loss(y_true, y_proba, sample_weight=w, labels=np.unique(y_true)) == pytest.approx(
            expected, rel=1e-14
        )


def test_nothing_of_the_probabilities_size_is_allocated(no_host):
    y, p, _ = sample(0, 20_000, 200)  # 32 MB
    for y_true in (y, LETTERS[y % 8] + y.astype(str)):
        tracemalloc.start()
        log_loss(y_true, p, labels=np.unique(y_true))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < p.nbytes / 4


PLUGIN = """
import functools
import sys

import sklearn.metrics
from ce_fast.adapters.sklearn import log_loss

calls = []
theirs = sklearn.metrics.log_loss

@functools.wraps(theirs)
def ours(*args, **kwargs):
    calls.append(args)
    return log_loss(*args, **kwargs)

for name, module in list(sys.modules.items()):
    if name.startswith("sklearn.") and getattr(module, "log_loss", None) is theirs:
        module.log_loss = ours
sklearn.metrics.get_scorer("neg_log_loss")
sklearn.metrics._scorer._SCORERS["neg_log_loss"]._score_func = ours

def pytest_collection_modifyitems(items):
    assert all(getattr(item.module, "log_loss", ours) is ours for item in items)

def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"calls={len(calls)}")
"""


@pytest.mark.parametrize(
    "module, tests, calls", [("test_classification", 10, 30), ("test_common", 30, 100), ("test_score_objects", 5, 1)]
)
def test_scikit_learns_own_tests_pass(module, tests, calls, tmp_path):
    pytest.importorskip("sklearn.metrics.tests")
    module = f"sklearn.metrics.tests.{module}"
    (tmp_path / "with_ours.py").write_text(PLUGIN)
    command = ["-m", "pytest", "-q", "-p", "with_ours", "-p", "no:cacheprovider", "--pyargs", module, "-k", "log_loss"]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout)}
    assert done.returncode == 0 and set(counts) <= {"passed", "skipped"}, done.stdout
    assert counts["passed"] >= tests
    assert int(re.search(r"calls=(\d+)", done.stdout).group(1)) >= calls


# cross_entropy_from_logits


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_from_logits_is_the_formula(labels, smoothing):
    n_classes = 2 if "bool" in labels else 4
    y, _, w = sample(0, 50, n_classes)
    z = np.random.default_rng(1).normal(0, 5, (50, n_classes))
    y_true = LABELS[labels](y)
    for score in (z, z.tolist(), pd.DataFrame(z), np.asfortranarray(z)):
        for weights in (None, w, w.tolist(), pd.Series(w)):
            got = cross_entropy_from_logits(y_true, score, sample_weight=weights, label_smoothing=smoothing)
            assert type(got) is float
            assert got == pytest.approx(cross_entropy_by_hand(z, y, weights, smoothing), rel=1e-14)
    total = cross_entropy_from_logits(y_true, z, sample_weight=w, label_smoothing=smoothing, normalize=False)
    assert total == pytest.approx(w.sum() * cross_entropy_by_hand(z, y, w, smoothing), rel=1e-14)


@pytest.mark.parametrize("labels", ["int", "bool", "str", "negative"])
def test_one_column_of_decision_values_is_the_logit_of_the_second_label(labels):
    y, _, w = sample(0, 50, 2)
    z = np.random.default_rng(1).normal(0, 5, 50)
    expected = cross_entropy_by_hand(np.c_[np.zeros(50), z], y, w)
    for score in (z, z[:, None], z.tolist(), pd.Series(z)):
        got = cross_entropy_from_logits(LABELS[labels](y), score, sample_weight=w)
        assert got == pytest.approx(expected, rel=1e-14)


def test_labels_name_the_columns_in_their_order():
    y, _, _ = sample(0, 50, 4)
    z = np.random.default_rng(1).normal(0, 5, (50, 4))
    for order in itertools.permutations(range(4)):
        for labels in (LETTERS[:4], np.array([-7, 2, 30, 31]), np.array([4, 5, 6, 7]), np.array([0.0, 1.0, 2.0, 3.0])):
            got = cross_entropy_from_logits(labels[y], z[:, order], labels=labels[list(order)])
            assert got == pytest.approx(cross_entropy_by_hand(z, y), rel=1e-14)


def test_logits_are_not_clipped():
    assert cross_entropy_from_logits([0, 1], [[0.0, 100.0], [0.0, 100.0]]) == pytest.approx(50.0, rel=1e-15)
    assert cross_entropy_from_logits([True, False], [60.0, -60.0]) == pytest.approx(np.exp(-60.0), rel=1e-15)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (([0, 1, 3], np.zeros((3, 3)), {"labels": [0, 1, 2]}), ValueError, r"y_true has the label 3; .* \[0, 1, 2\]"),
        (([-1, 1, 0], np.zeros((3, 3)), {"labels": [0, 1, 2]}), ValueError, "label -1"),
        (([5, 1, 0], np.zeros((3, 3)), {"labels": [0, 9, 1]}), ValueError, r"label 5; .* \[0, 9, 1\]"),
        ((["a", "d"], np.zeros((2, 2)), {"labels": ["a", "b"]}), ValueError, r"label 'd'; .* \['a', 'b'\]"),
        ((["a", "b"], np.zeros((2, 2)), {"labels": [0, 1]}), ValueError, "label 'a'"),
        (([0, 1], np.zeros((2, 2)), {"labels": ["a", "b"]}), ValueError, "label 0"),
        (([0, 1], np.zeros((2, 3)), {}), ValueError, r"shape \(2, 3\); expected \(n_samples, 2\)"),
        (([0, 1, 2], np.zeros(3), {}), ValueError, r"shape \(3,\)"),
        (([0, 0], np.zeros((2, 2)), {}), ValueError, "only one label"),
        (([0, 1], np.zeros((2, 2)), {"labels": [0, 1, 1]}), ValueError, "each label once"),
        (([0, 1], np.zeros((3, 2)), {}), ValueError, "inconsistent numbers of samples"),
        (([0.5, 1], np.zeros((2, 2)), {}), ValueError, "not integers"),
        ((["a", 1], np.zeros((2, 2)), {}), ValueError, "holds 1 beside strings"),
        (([], np.zeros((0, 2)), {}), ValueError, "not empty"),
        (([0, 1], [[0.0, np.nan], [0, 0]], {}), ValueError, "NaN: y_score"),
        (([0, 1], [[0.0, 0], [0, 0]], {"sample_weight": [0, 0]}), ValueError, "at least one non-zero"),
        (([0, 1], [[0.0, 0], [0, 0]], {"sample_weight": [1, -1]}), ValueError, r"sample_weight\[1\] is -1"),
        (([0, 1], [[0.0, 0], [0, 0]], {"sample_weight": [1, np.nan]}), ValueError, "NaN"),
        (([0, 1], [[0.0, 0], [0, 0]], {"sample_weight": [[1], [1]]}), ValueError, r"shape \(2, 1\)"),
        (([0, 1], [[0.0, 0], [0, 0]], {"sample_weight": ["a", "b"]}), ValueError, "sample_weight has dtype"),
        (([0, 1], [[0.0, 0], [0, 0]], {"label_smoothing": 2}), ValueError, "label_smoothing is 2"),
        (([0, 1], [["a", "b"], ["a", "b"]], {}), TypeError, "dtype"),
    ],
)
def test_cross_entropy_from_logits_says_what_it_got_and_what_it_wants(arguments, error, message):
    y_true, y_score, options = arguments
    with pytest.raises(error, match=message):
        cross_entropy_from_logits(y_true, y_score, **options)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_both_functions_work_with_make_scorer(n_classes):
    X, y = load_iris(return_X_y=True)
    X, y = X[y < n_classes], LETTERS[y[y < n_classes]]
    labels = LETTERS[:n_classes].tolist()
    options = {"greater_is_better": False, "labels": labels}
    scorers = {
        "log_loss": make_scorer(log_loss, response_method="predict_proba", **options),
        "host": make_scorer(host_log_loss, response_method="predict_proba", **options),
        "logits": make_scorer(cross_entropy_from_logits, response_method="decision_function", **options),
    }
    scores = cross_validate(LogisticRegression(max_iter=500), X, y, scoring=scorers, cv=3, error_score="raise")
    np.testing.assert_allclose(scores["test_log_loss"], scores["test_host"], rtol=1e-15)
    np.testing.assert_allclose(scores["test_logits"], scores["test_host"], rtol=1e-10)


def test_read_only_and_misaligned_memmaps_are_read_right(tmp_path):
    y, p, w = sample(0, 500, 3)
    z = np.log(p + 1e-3)

    def stored(array, offset):
        path = tmp_path / f"{id(array)}-{offset}"
        path.write_bytes(b"\0" * offset + array.tobytes())
        mapped = np.memmap(path, array.dtype, "r", offset, array.shape)
        assert not mapped.flags.writeable and mapped.flags.aligned == (offset % 8 == 0)
        return mapped

    for offset in (0, 1, 3):
        args = [stored(a, offset) for a in (y, p, w, z)]
        for made in (list, functools.partial(map, np.asarray)):
            y_, p_, w_, z_ = made(args)
            assert log_loss(y_, p_, sample_weight=w_) == host_log_loss(y, p, sample_weight=w)
            assert cross_entropy_from_logits(y_, z_, sample_weight=w_) == pytest.approx(
                cross_entropy_by_hand(z, y, w), rel=1e-14
            )
            for smoothing in (0.0, 0.1):
                scorer = make_cross_entropy_scorer(label_smoothing=smoothing)
                model = Fixed([0, 1, 2]).fit(p)
                assert scorer(model, p_, y_, w_) == scorer(model, p, y, w)
                assert not p_.flags.writeable


@pytest.mark.filterwarnings("ignore:logits look like probabilities")
def test_arguments_are_left_as_they_were():
    y, p, w = sample(0, 50, 2)
    for answer in (p, p[:, 1], p[:, 1:], p.astype(np.float32)):
        before = [a.copy() for a in (y, answer, w)]
        log_loss(y, answer, sample_weight=w)
        cross_entropy_from_logits(y, answer, sample_weight=w)
        for smoothing in (0.0, 0.1):
            scorer = make_cross_entropy_scorer(label_smoothing=smoothing, class_weight={0: 2.0})
            scorer(Fixed([0, 1], answer).fit(p), p, y, w)
        for a, b in zip((y, answer, w), before, strict=True):
            np.testing.assert_array_equal(a, b)


# the pass over probabilities

DTYPES = [np.float64, np.float32, np.float16]
LAYOUTS = {
    "C": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "reversed": lambda p: np.ascontiguousarray(p[::-1, ::-1])[::-1, ::-1],
    "sliced": lambda p: np.repeat(p, 3, axis=1)[:, ::3],
}


def many(n_rows, n_classes, dtype, seed=0):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(n_classes, 0.7), n_rows).astype(dtype)
    return rng.permutation(n_rows) % n_classes, p, rng.random(n_rows) + 0.05


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(20_001, 2), (20_001, 3), (5_003, 10), (1_003, 33), (1_101, 1100)])
def test_many_rows_agree_with_scikit_learn(variant, shape, dtype, layout, no_host):
    y, p, w = many(*shape, dtype)
    rel = 1e-14 if dtype == np.float64 else 0  # these logarithms and sums are left to NumPy
    given = LAYOUTS[layout](p)
    kinds = [y, y - 5, y.astype(np.uint16), np.repeat(y, 2)[::2], *([y > 0] if shape[1] == 2 else [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sums of many rounded probabilities
        for options in ({}, {"sample_weight": w}, {"normalize": False}):
            expected = host_log_loss(y, p, **options)
            for labels in kinds:
                assert log_loss(labels, given, **options) == pytest.approx(expected, rel=rel)
        if shape[1] == 2:
            assert log_loss(y, given[:, 1]) == pytest.approx(host_log_loss(y, p[:, 1]), rel=rel)


def test_a_loss_is_the_logarithm_to_full_precision(variant):
    rng = np.random.default_rng(0)
    p = np.r_[2.0 ** -(52 * rng.random(500)), 1 - 2.0 ** -(52 * rng.random(500)), rng.uniform(0.70, 0.72, 200), 0.5]
    got = [log_loss([0], np.array([[v, 1 - v]]), labels=[0, 1]) for v in p]
    kept = p.clip(2.0**-52, 1 - 2.0**-52)
    assert_loss_close(np.array(got), -np.log(kept.astype(np.longdouble)), "float64")


@pytest.mark.parametrize("layout", ["C", "Fortran"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_classes", [2, 10, 33, 1100])
def test_what_is_no_probability_is_found_wherever_it_stands(variant, n_classes, dtype, layout):
    n_rows = 300 if n_classes < 33 else 7
    model = Fixed(np.arange(n_classes)).fit(None)
    y = np.arange(n_rows) % n_classes
    p = LAYOUTS[layout](np.eye(n_classes, dtype=dtype)[y])
    assert neg_cross_entropy_scorer(model, p, y) > -0.01
    above, below = np.nextafter(dtype(1), dtype(2)), -np.finfo(dtype).smallest_subnormal
    for row in (0, 1, n_rows // 2 + 1, n_rows - 2, n_rows - 1):
        for column in {0, n_classes // 2, n_classes - 1}:
            right = p[row, column]
            for spoil in (np.nan, np.inf, -np.inf, above, below):
                p[row, column] = spoil
                with pytest.raises(ValueError, match="expected 0 <= y_proba <= 1"):
                    neg_cross_entropy_scorer(model, p, y)
            p[row, column] = right


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_probability_is_found_in_a_single_column(variant, dtype):
    y = np.arange(1500) % 2
    p = y.astype(dtype)
    assert neg_cross_entropy_scorer(Fixed([0, 1]).fit(None), p, y) > -0.01
    for row in (0, 1, 1023, 1024, 1499):
        for spoil in (np.nan, np.inf, -np.inf, np.nextafter(dtype(1), dtype(2)), -np.finfo(dtype).smallest_subnormal):
            p[row] = spoil
            with pytest.raises(ValueError, match="expected 0 <= y_proba <= 1"):
                neg_cross_entropy_scorer(Fixed([0, 1]).fit(None), p, y)
        p[row] = y[row]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_classes", [2, 10, 33, 1100])
def test_a_row_that_does_not_sum_to_one_is_found_wherever_it_stands(variant, n_classes, dtype, layout):
    n_rows = 300 if n_classes < 33 else 7
    y = np.arange(n_rows) % n_classes
    p = LAYOUTS[layout](np.eye(n_classes, dtype=dtype)[y])
    labels = np.arange(n_classes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_loss(y, p, labels=labels)
    for row in (0, 1, n_rows // 2 + 1, n_rows - 2, n_rows - 1):
        for column in {0, n_classes - 1}:
            right = p[row, column]
            p[row, column] = 0.5  # the sum is 0.5 or 1.5
            with pytest.warns(UserWarning, match="do not sum to one"):
                log_loss(y, p, labels=labels)
            p[row, column] = right


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(50_000, 3), (3_001, 40), (7, 20_000)])
def test_log_loss_has_the_same_bits_for_any_number_of_threads(variant, shape, dtype, monkeypatch):
    y, p, w = many(*shape, dtype)
    labels = np.arange(shape[1])
    assert p.size > threads.SERIAL_LOGITS
    results = []
    for n_threads in (1, 2, 3, 7):
        monkeypatch.setattr(threads, "resolve", lambda *args, n_threads=n_threads: n_threads)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append([log_loss(y, p, labels=labels, sample_weight=weights) for weights in (None, w)])
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("kind", ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8"])
def test_the_ends_of_labels_are_found_wherever_they_stand(variant, kind):
    ends = (0, 1) if kind == "?" else (np.iinfo(kind).min, np.iinfo(kind).max)
    backend = backends.active()
    for n in (1, 2, 7, 63, 4099):
        for low_at, high_at in itertools.product({0, 1 % n, n // 2, n - 1}, repeat=2):
            middle = np.zeros(2 * n, kind) if kind == "?" else np.full(2 * n, sum(ends) // 2, kind)
            labels = middle[::2]
            labels[low_at] = ends[0]
            labels[high_at] = ends[1]
            for view, n_threads in itertools.product((labels, labels.copy(), labels[::-1]), {1, min(3, n)}):
                assert backend.label_range(view, n_threads) == (int(labels.min()), int(labels.max()))


@pytest.mark.parametrize(
    "labels",
    [
        [-(2**63), -(2**63) + 1, -(2**63) + 2],
        [2**63 - 3, 2**63 - 2, 2**63 - 1],
        [-(2**63), 0, 2**63 - 1],
        [-(2**62), -5, 7],
        [-1, 0, 5],
        [0, 2, 40_000],
    ],
)
def test_labels_of_any_distance_are_those_of_scikit_learn(variant, labels, no_host):
    y, p, w = many(30_000, 3, np.float64)
    known = np.array(labels)
    expected = host_log_loss(y, p, sample_weight=w)
    for options in ({}, {"labels": known}):
        assert log_loss(known[y], p, sample_weight=w, **options) == pytest.approx(expected, rel=1e-14)
    for order in itertools.permutations(range(3)):
        order = list(order)
        model = Fixed(known[order]).fit(None)
        assert neg_cross_entropy_scorer(model, p[:, order], known[y], w) == pytest.approx(-expected, rel=1e-14)
    strange = known[y]
    strange[-1] = 1 if labels[1] == 0 else labels[0] + 1  # between the classes, or the next one of three in a row
    if strange[-1] not in known:
        with pytest.raises(ValueError, match=f"y has the label {strange[-1]}; expected one of the estimator's classes"):
            neg_cross_entropy_scorer(Fixed(known).fit(None), p, strange, w)


@needs_1_9
@pytest.mark.parametrize("low", [0, 2**63 - 2, 2**63 - 1, 2**63, 2**64 - 3])
def test_unsigned_labels_beyond_int64_give_scikit_learns_outcome(low):
    y, p, w = sample(0, 50, 3)
    assert_same_outcome(y.astype(np.uint64) + np.uint64(low), p, sample_weight=w)


@needs_1_9
def test_a_label_that_does_not_occur_gives_scikit_learns_error():
    y, p, _ = many(40_000, 3, np.float64)
    assert_same_outcome(np.where(y == 1, 2, y), p)
    assert_same_outcome(2 * (y // 2), p[:, :1] / 2)


@pytest.mark.parametrize("n_distinct", [1, 2, 300, 32_768, 32_769, 40_000])
def test_strings_are_numbered_by_their_value(variant, n_distinct):
    rng = np.random.default_rng(0)
    names = np.array([f"{'é' * (k % 3)}{k}" for k in range(n_distinct)])
    labels = names[rng.permutation(np.r_[np.arange(n_distinct), rng.integers(0, n_distinct, 2000)])]
    for view in (labels, labels[::-2], labels.astype(labels.dtype.newbyteorder(">")), labels.astype(object)):
        read = sklearn_inputs.read_labels(view, "y")
        assert len(set(read.names)) == len(read.names)
        assert np.array(read.names)[read.number].tolist() == view.tolist()


# the module


def test_the_core_does_not_import_scikit_learn():
    program = "import sys, ce_fast; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
