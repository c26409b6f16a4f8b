"""The Evaluator over Dask arrays: against itself on the whole, on threads and on processes one of which is killed."""

import itertools
import logging
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import ce_fast as ce

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
ml_dtypes = pytest.importorskip("ml_dtypes")

from dask.delayed import Delayed  # noqa: E402

from ce_fast.adapters import dask as adapter  # noqa: E402
from ce_fast.adapters.dask import evaluate  # noqa: E402

N_ROWS, N_CLASSES = 257, 300
ROWS, CLASSES = (1, 100, 0, 37, 90, 29), (130, 20, 150)
GROUPS = np.array(["news", "code", "r&d"])
OPTIONS = {"temperatures": (0.5, 1, 2), "top_k": (1, 3, 10), "n_bins": 7}


@pytest.fixture(autouse=True)
def scheduler():
    with dask.config.set(scheduler="threads", num_workers=2):
        yield


def sample(dtype=np.float64, n_rows=N_ROWS):
    """(logits, targets, weights, groups) with rows that do not count, and some that have no softmax."""
    rng = np.random.default_rng(11)
    logits = (rng.normal(size=(n_rows, N_CLASSES)) * 3).astype(dtype)
    targets = np.where(rng.random(n_rows) < 0.5, logits.argmax(1), rng.integers(N_CLASSES, size=n_rows))
    weights = rng.integers(0, 4, n_rows) / 2
    targets[::17], logits[5::40, 140], logits[3::19, :131] = -100, np.nan, -np.inf
    return logits, targets, weights, GROUPS[rng.integers(3, size=n_rows)]


def on_one_machine(logits, targets, weights=None, groups=None, **options):
    evaluator = ce.Evaluator(**options)
    evaluator.update(logits, targets, weights, groups)
    return evaluator.compute()


def numbers(value, name=""):
    """(name, number or string) of all that a report holds."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        return [(name, value)]
    return [pair for key, each in pairs for pair in numbers(each, f"{name}/{key}")]


def assert_same(report, expected, tolerance=1e-12):
    found, wanted = numbers(report.to_dict()), numbers(expected.to_dict())
    assert [name for name, _ in found] == [name for name, _ in wanted]
    for (name, a), (_, b) in zip(found, wanted, strict=True):
        assert a == (pytest.approx(b, rel=tolerance, abs=tolerance) if isinstance(b, float) else b), name


# --- The same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16])
def test_uneven_chunks_of_rows_give_the_report_of_the_whole(dtype):
    logits, targets, weights, groups = sample(dtype)
    lazy = evaluate(
        da.from_array(logits, chunks=(ROWS, (N_CLASSES,))),
        da.from_array(targets, chunks=50), da.from_array(weights, chunks=(200, 57)), groups=groups, **OPTIONS,
    )  # fmt: skip
    report = lazy.compute()
    expected = on_one_machine(logits, targets, weights, groups, **OPTIONS)
    assert_same(report, expected)
    assert report.invalid_rows == expected.invalid_rows and report.n_invalid > 3 and len(report.groups) == 3


# Sums of float32 are rounded in float32 within a tile, and a tile ends where a part does.
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 2e-7), (ml_dtypes.bfloat16, 2e-7)])
def test_a_vocabulary_in_three_gives_the_report_of_the_whole(dtype, tolerance):
    logits, targets, weights, groups = sample(dtype)
    x = da.from_array(logits, chunks=(ROWS, CLASSES))
    report = evaluate(x, targets, weights, groups=groups, **OPTIONS, temperature=1.5).compute()
    expected = on_one_machine(logits, targets, weights, groups, **OPTIONS, temperature=1.5)
    assert_same(report, expected, tolerance)
    np.testing.assert_allclose(report.rank_weight, expected.rank_weight, rtol=1e-12)
    assert report.invalid_rows == expected.invalid_rows


def test_every_class_of_every_part_can_be_the_target():
    logits = np.random.default_rng(2).normal(size=(N_CLASSES, N_CLASSES))
    targets = np.arange(N_CLASSES)
    report = evaluate(da.from_array(logits, chunks=(97, CLASSES)), targets).compute()
    assert_same(report, on_one_machine(logits, targets))


@pytest.mark.parametrize("classes", [(3,), (2, 1)])
@pytest.mark.parametrize("n_rows", [0, 1])
def test_no_row_and_one_row(n_rows, classes):
    logits, targets = np.arange(3.0 * n_rows).reshape(n_rows, 3), np.zeros(n_rows, int)
    report = evaluate(da.from_array(logits, chunks=((n_rows,), classes)), targets).compute()
    assert_same(report, on_one_machine(logits, targets))


def test_many_blocks_are_merged_in_order():
    logits, targets, *_ = sample()
    report = evaluate(da.from_array(logits, chunks=(2, N_CLASSES)), targets).compute()
    expected = on_one_machine(logits, targets)
    assert_same(report, expected)
    assert report.invalid_rows == expected.invalid_rows


def test_merging_again_gives_the_same_again():
    states = [ce.Evaluator() for _ in range(3)]
    for i, state in enumerate(states):
        state.update(np.eye(4) * i, np.arange(4))
    before = [state.to_dict() for state in states]
    once, again = (adapter._merge({}, states).to_dict() for _ in range(2))
    assert once == again and [state.to_dict() for state in states] == before


# --- When, and where --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_parts", [1, 3])
def test_nothing_is_read_before_compute_and_each_block_once(n_parts):
    logits, targets, *_ = sample()
    read = []

    def block(i, j):
        read.append((i, j))
        return logits[i * 100 : i * 100 + 100, j * 300 // n_parts : (j + 1) * 300 // n_parts]

    width = N_CLASSES // n_parts
    x = da.block([
        [da.from_delayed(dask.delayed(block)(i, j), (min(100, N_ROWS - 100 * i), width), float) for j in range(n_parts)]
        for i in range(3)
    ])  # fmt: skip
    lazy = evaluate(x, targets)
    assert isinstance(lazy, Delayed) and read == []
    assert_same(lazy.compute(), on_one_machine(logits, targets))
    assert sorted(read) == list(itertools.product(range(3), range(n_parts)))


@pytest.mark.parametrize("fusible", [False, True])
def test_no_task_takes_two_blocks_of_a_vocabulary_in_parts(fusible):
    logits, targets, *_ = sample()
    x = da.from_delayed(dask.delayed(lambda: logits)(), logits.shape, float).rechunk((100, CLASSES))
    x = x * 2 + 1 if fusible else x
    graph = dict(evaluate(x, targets).dask)
    blocks = {key for key in graph if isinstance(key, tuple) and key[0] == x.name}
    taken = [len(task.dependencies & blocks) for task in graph.values()]
    assert len(blocks) == 9 and max(taken) == 1 and sum(taken) == 18, "for the target's logit, and for all the rest"


def test_tasks_have_names_for_the_dashboard():
    x = da.zeros((20, 6), chunks=(1, 2))
    names = {dask.utils.key_split(key) for key in dict(evaluate(x, np.zeros(20, int)).dask)}
    assert {"evaluate-block", "evaluate-part", "evaluate-merge", "evaluate-report"} <= names


def slow_block(folder, i):
    """Leaves a file that says who computed it."""
    time.sleep(0.05)
    (folder / f"{i}-{os.getpid()}").touch()
    return np.random.default_rng(i).normal(size=(50, 40))


def test_a_worker_that_is_killed_half_way_changes_nothing(tmp_path):
    distributed = pytest.importorskip("distributed")
    n_blocks, targets = 40, np.random.default_rng(0).integers(40, size=2000)
    source = [da.from_delayed(dask.delayed(slow_block)(tmp_path, i), (50, 40), float) for i in range(n_blocks)]
    lazy = evaluate(da.concatenate(source).rechunk((50, (15, 25))), targets)
    options = {"n_workers": 2, "processes": True, "threads_per_worker": 1, "dashboard_address": None}
    with (
        distributed.LocalCluster(**options, silence_logs=logging.CRITICAL) as cluster,
        distributed.Client(cluster) as client,
    ):
        future = client.compute(lazy)
        ends = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < n_blocks // 3 and time.monotonic() < ends:
            time.sleep(0.01)
        pid = int(next(tmp_path.iterdir()).name.split("-")[1])
        assert not future.done()
        os.kill(pid, signal.SIGKILL)
        report = future.result(timeout=60)
        assert pid not in client.run(os.getpid).values()
    logits = np.concatenate([np.random.default_rng(i).normal(size=(50, 40)) for i in range(n_blocks)])
    assert_same(report, on_one_machine(logits, targets))


# --- What is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"logits": np.zeros((4, 3))}, TypeError, r"logits is a numpy.ndarray; expected a dask.array.Array"),
        ({"logits": da.zeros((2, 2, 3))}, ValueError, r"shape \(2, 2, 3\); expected \(n_rows, n_classes\)"),
        ({"targets": np.zeros(5, int)}, ValueError, r"target has shape \(5,\); expected \(4,\) for logits \(4, 3\)"),
        ({"sample_weight": da.ones((4, 1))}, ValueError, r"sample_weight has shape \(4, 1\); expected \(4,\)"),
        ({"targets": np.zeros(4)}, TypeError, "target has dtype float64; expected class indices"),
        ({"groups": ["a"]}, ValueError, r"group has shape \(1,\); expected \(4,\)"),
        ({"class_axis": 0}, ValueError, "class_axis is 0; expected the last one"),
        ({"n_bins": 0}, ValueError, "n_bins is 0"),
        ({"bins": 3}, TypeError, "bins"),
    ],
)
def test_wrong_arguments_are_errors_at_once(change, kind, message):
    arguments = {"logits": da.zeros((4, 3), chunks=2), "targets": np.zeros(4, int)} | change
    with pytest.raises(kind, match=message):
        evaluate(**arguments)


def test_chunks_of_unknown_size_are_a_clear_error():
    logits, targets = da.zeros((6, 3), chunks=2), da.arange(6, chunks=2)
    for x, t, name in [(logits[targets > 1], targets, "logits"), (logits, targets[targets > -1], "target")]:
        with pytest.raises(ValueError, match=rf"^{name} has chunks of unknown size.*compute_chunk_sizes"):
            evaluate(x, t)


@pytest.mark.parametrize("classes", [3, 2])
@pytest.mark.parametrize(
    ("targets", "options", "kind", "message"),
    [
        ([0, 1, 2, 0, 3, 0], {}, IndexError, r"target\[1\] is 3; expected 0 <= target < 3"),
        ([0] * 6, {"nan_policy": "raise"}, ValueError, "hold NaN"),
        ([0] * 6, {"sample_weight": [1, 1, 1, 1, -1, 1]}, ValueError, "sample_weight"),
    ],
)
def test_wrong_data_is_an_error_of_compute_that_says_in_which_rows(classes, targets, options, kind, message):
    logits = np.zeros((6, 3))
    logits[4, 2] = np.nan
    lazy = evaluate(da.from_array(logits, chunks=(3, classes)), targets, **options)
    with pytest.raises(kind, match=message) as caught:
        lazy.compute()
    assert caught.value.__notes__ == ["in rows 3 to 5 of the Dask array, where rows count from 0"]


def test_without_dask_the_error_says_what_to_install():
    code = "import sys; sys.modules['dask'] = None; import ce_fast.adapters.dask"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'ce_fast[dask]'" in done.stderr


# --- What goes with the rows, and the state ---------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [N_CLASSES, CLASSES])
def test_sequences_and_bytes_are_those_of_the_evaluator(classes):
    logits, targets, weights, groups = sample()
    ids = np.arange(N_ROWS) // 20
    logits[np.isnan(logits)] = 0  # rows without a softmax have bytes, of which nobody knows how many
    chunked = da.from_array(logits, chunks=(ROWS, classes))
    more = {"sequences": ids, "n_bytes": 700, "n_characters": 300}
    found = evaluate(chunked, targets, weights, groups=groups, **more).compute()
    evaluator = ce.Evaluator()
    evaluator.update(logits, targets, weights, groups, sequence=ids, n_bytes=700, n_characters=300)
    assert_same(found, evaluator.compute())
    assert found.bits_per_byte.value > 0 and len(found.sequences["id"]) == 13


def test_states_of_two_arrays_merge():
    logits, targets, _, _ = sample()
    halves = [
        adapter.evaluator(da.from_array(logits[some], chunks=(50, -1)), targets[some]).compute()
        for some in (slice(0, 100), slice(100, None))
    ]
    assert isinstance(halves[0], ce.Evaluator)
    assert_same(halves[0].merge(halves[1]).compute(), on_one_machine(logits, targets))
