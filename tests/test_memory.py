"""Nothing of the logits' size is allocated that nobody asked for."""

import subprocess
import sys

import pytest

MEASURE = """
import sys, resource
import numpy as np, ml_dtypes
import ce_fast as ce
dtype, axis = sys.argv[1], int(sys.argv[2])
shape = (1024, 50257) if axis == -1 else (2, 500, 160, 160)
logits = np.zeros(shape, dtype)
logits.view(np.uint8).reshape(-1)[::4096] = 0  # every page is there
target = np.zeros(np.delete(shape, axis), np.int64)
loss = ce.CrossEntropyLoss(class_axis=axis, n_threads=2)
loss(logits[:2], target[:2])
loss.value_and_grad(logits[:2], target[:2])
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
before = peak()
if sys.argv[3] == "forward":
    loss(logits, target)
else:
    loss.value_and_grad(logits, target, out=logits)
print((peak() - before) * 1024, logits.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("call", ["forward", "in_place"])
@pytest.mark.parametrize("dtype, axis", [("float32", -1), ("bfloat16", -1), ("float32", 1)])
def test_forward_and_in_place_grow_the_process_by_less_than_one_mebibyte(dtype, axis, call):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, dtype, str(axis), call], capture_output=True, text=True, timeout=300, check=True
    )
    grown, size = map(int, done.stdout.split())
    assert size > 90 * 2**20 and grown < 2**20
