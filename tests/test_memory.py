"""Nothing of the logits' size is allocated that nobody asked for."""

import subprocess
import sys

import pytest

MEASURE = """
import sys
import numpy as np, ml_dtypes
import ce_fast as ce
dtype, axis, loss, target, call = sys.argv[1:]
axis = int(axis)
shape = (1024, 50257) if axis == -1 else (2, 500, 160, 160)
logits = np.zeros(shape, dtype)
logits.view(np.uint8).reshape(-1)[::4096] = 0  # every page is there
loss, target = eval(loss), eval(target)
loss(logits[:2], target[:2])
loss.value_and_grad(logits[:2], target[:2])
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
before = peak()
if call == "forward":
    loss(logits, target)
else:
    loss.value_and_grad(logits, target, out=logits)
print((peak() - before) * 1024, logits.nbytes)
"""
INDICES = "np.zeros(np.delete(shape, axis), np.int64)"
MIB = 2**20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


def growth(dtype, axis, loss, target, call):
    """Bytes by which a call grows the process."""
    command = [sys.executable, "-c", MEASURE, dtype, str(axis), loss, target, call]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    grown, size = map(int, done.stdout.split())
    assert size > 90 * MIB
    return grown


@pytest.mark.parametrize("call", ["forward", "in_place"])
@pytest.mark.parametrize("dtype, axis", [("float32", -1), ("bfloat16", -1), ("float32", 1)])
def test_forward_and_in_place_grow_the_process_by_less_than_one_mebibyte(dtype, axis, call):
    assert growth(dtype, axis, "ce.CrossEntropyLoss(class_axis=axis, n_threads=2)", INDICES, call) < MIB


@pytest.mark.parametrize("call", ["forward", "in_place"])
@pytest.mark.parametrize(
    "loss, target",
    [
        ("ce.FocalLoss(softcap=30.0, temperature=2.0, label_smoothing=0.1)", INDICES),
        ("ce.KLDivLoss()", "np.ones(shape, np.float32)"),
        ("ce.BCEWithLogitsLoss(pos_weight=np.full(shape[-1], 2.0))", "np.zeros(shape, bool)"),
        ("ce.SigmoidFocalLoss()", "np.zeros(shape, np.int8)"),
    ],
    ids=lambda value: value.partition("(")[0],
)
def test_other_losses_grow_it_by_no_more(loss, target, call):
    assert growth("float32", -1, loss, target, call) < MIB


@pytest.mark.parametrize("call, most", [("forward", MIB), ("in_place", 10 * MIB)])
def test_distillation_grows_it_by_two_blocks_for_a_gradient(call, most):
    assert growth("float32", -1, "ce.DistillationLoss()", "np.ones(shape, np.float32)", call) < most
