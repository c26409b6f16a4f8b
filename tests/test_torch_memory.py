"""In torch too nothing of the logits' size is allocated but results and gradients."""

import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("ce_fast.adapters.torch")

MEASURE = """
import sys
import torch
from ce_fast import measure
from ce_fast.adapters import torch as ours
dtype, call = getattr(torch, sys.argv[1]), sys.argv[2]
def make(n_rows, n_classes):
    scale = torch.ones((), dtype=dtype, requires_grad=True)
    logits = torch.full((n_rows, n_classes), -11.0, dtype=dtype).mul_(scale)
    return logits, torch.zeros(n_rows, dtype=torch.long), logits.detach()
def backward(loss):
    return torch.autograd.grad(loss, logits)
for shape in (64, 1024), (1024, 50257):  # libraries and threads come with the first
    logits, index, probabilities = make(*shape)
    grown = measure.peak_growth(lambda: eval(call))
print(grown, logits.nbytes)
"""
MIB = 2**20
CALLS = {
    "gradient": ("float32", "backward(ours.cross_entropy(logits, index))"),
    "in_place": ("float32", "len(backward(ours.cross_entropy(logits, index, inplace_backward=True) * 0.3))"),
    "in_place_16_bit": ("bfloat16", "len(backward(ours.cross_entropy(logits, index, inplace_backward=True) * 0.3))"),
    "autocast": (
        "bfloat16",
        "torch.autocast('cpu').__call__(lambda: backward(ours.cross_entropy(logits, index)))()",
    ),
    "kl_div_of_elements": (
        "float32",
        "(loss := ours.kl_div(logits, probabilities, reduction='none')), backward(loss.sum())",
    ),
}


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", CALLS)
def test_loss_and_backward_allocate_results_and_gradients_and_less_than_2_mebibytes(name):
    command = [sys.executable, "-c", MEASURE, *CALLS[name]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    grown, size = map(int, done.stdout.split())
    assert size > 90 * MIB
    assert grown < 2 * MIB
