"""The same bits for any number of threads; limits obeyed; a fork survived."""

import multiprocessing
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import ce_fast as ce
from ce_fast import threads
from ce_fast.plan import make_plan

SHAPES = [(1000, 50), (7, 20000), (1, 5000), (200000, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_equal_for_1_2_3_and_7_threads(variant, dtype, shape, rng):
    if variant == "numba" and shape[0] > 10000 and dtype.itemsize > 4:
        shape = (40000, 2)
    logits, target = rng.standard_normal(shape).astype(dtype), rng.integers(0, shape[1], shape[0])
    target[1::5] = -100
    sample_weight, weight = rng.random(shape[0]), rng.random(shape[1])
    results = []
    for n_threads in (1, 2, 3, 7):
        loss = ce.CrossEntropyLoss(weight, label_smoothing=0.1, n_threads=n_threads)
        value, grad = loss.value_and_grad(logits, target, sample_weight)
        lse = ce.logsumexp(logits, n_threads=n_threads)
        results.append((value, loss(logits, target, sample_weight), grad.tobytes(), lse.tobytes()))
    assert all(result == results[0] for result in results)


def test_threads_follow_the_work_and_the_limits():
    limit = min(2, threads.available())
    assert threads.resolve(None, threads.SERIAL_LOGITS - 1, lambda: 64) == 1
    assert threads.resolve(None, threads.SERIAL_LOGITS, lambda: 2) == limit
    assert threads.resolve(None, 10**9, lambda: 1) == 1
    assert threads.resolve(7, 10, lambda: 1) == 7  # a number is taken as given
    assert threads.available() <= len(os.sched_getaffinity(0))


def test_a_plan_never_has_more_threads_than_blocks():
    plan = make_plan((40,), 50257, np.dtype(np.float32), 64)
    assert plan.block_rows == 1 and plan.part_classes == 0 and plan.n_threads == 40


@pytest.mark.parametrize("quota, period, expected", [("150000", "100000", 1.5), ("max", "100000", float("inf"))])
def test_cgroup_quota_is_read(monkeypatch, quota, period, expected):
    monkeypatch.setattr(threads.Path, "read_text", lambda self: f"{quota} {period}\n")
    assert threads._cgroup_limit.__wrapped__() == expected


def run_python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )


def test_omp_num_threads_is_obeyed():
    code = "import ce_fast as ce; print(ce.show_config(mode='dicts')['threads'])"
    for backend in ("compiled", "numba"):
        assert run_python(code, OMP_NUM_THREADS="1", CE_FAST_BACKEND=backend).stdout.strip() == "1"


def test_threadpoolctl_is_obeyed():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    with ce.use_backend("compiled"):
        ce.show_config(mode="dicts")  # the extension is loaded: its OpenMP can be found
        with threadpoolctl.threadpool_limits(1):
            assert ce.show_config(mode="dicts")["threads"] == 1


def _forked_child(queue):
    logits = np.ones((100, 1000), np.float32)
    queue.put(ce.CrossEntropyLoss(n_threads=2)(logits, np.zeros(100, int)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_forked_child_of_a_threaded_parent_does_not_hang(backend):
    logits, target = np.ones((100, 1000), np.float32), np.zeros(100, int)
    expected = ce.CrossEntropyLoss(n_threads=2)(logits, target)  # a parallel region in the parent
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_forked_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == expected
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()


def test_python_threads_may_call_at_once(backend, rng):
    logits, target = rng.standard_normal((300, 1000)), rng.integers(0, 1000, 300)
    expected = ce.CrossEntropyLoss().value_and_grad(logits, target)
    failures = []

    def work():
        with ce.use_backend(backend):
            for _ in range(5):
                value, grad = ce.CrossEntropyLoss(n_threads=2).value_and_grad(logits, target)
                if value != expected[0] or not np.array_equal(grad, expected[1]):
                    failures.append(value)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
