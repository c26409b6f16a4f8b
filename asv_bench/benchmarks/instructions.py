"""Instructions per logit of the AVX2 kernels on one thread, counted by callgrind: figures without noise.

This file is also the script that callgrind runs: it writes a dump at each call of getppid, before and after the calls
that count.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

import ce_fast
from ce_fast import workloads

N_LOGITS = 100_000  # of the shorter of two calls; their difference counts, for it has no cost of a call in it
MARK = "getppid"


class Case(NamedTuple):
    """A loss over (n, *row) logits."""

    row: tuple[int, ...]
    gradient: bool = False
    dtype: str = "float32"
    binary: bool = False

    @property
    def n_rows(self):
        return -(-N_LOGITS // np.prod(self.row))

    @property
    def n_logits(self):
        return int(self.n_rows * np.prod(self.row))

    def calls(self):
        """For a few rows, n_rows, and twice n_rows."""
        logits = np.random.default_rng(0).standard_normal((2 * self.n_rows, *self.row), np.float32).astype(self.dtype)
        if self.binary:
            loss, target = ce_fast.BCEWithLogitsLoss(n_threads=1), (logits > 0).astype(self.dtype)
        else:
            loss, target = ce_fast.CrossEntropyLoss(class_axis=1, n_threads=1), np.zeros(logits[:, 0].shape, np.int64)
        function = loss.value_and_grad if self.gradient else loss
        return [lambda n=n: function(logits[:n], target[:n]) for n in (1, self.n_rows, 2 * self.n_rows)]


CASES = {
    "forward, long rows": Case((50257,)),
    "forward, long rows, bfloat16": Case((50257,), dtype="bfloat16"),
    "loss and gradient, long rows": Case((50257,), gradient=True),
    "forward, 10 classes": Case((10,)),
    "loss and gradient, 10 classes": Case((10,), gradient=True),
    "forward, 2 classes": Case((2,)),
    "forward, strided class axis": Case((21, 64, 64)),
    "loss and gradient, strided class axis": Case((21, 64, 64), gradient=True),
    "binary, loss and gradient": Case((1000,), gradient=True, binary=True),
}


def run_cases():
    """What callgrind runs."""
    import ml_dtypes  # noqa: F401  NumPy learns "bfloat16"

    for case in CASES.values():
        warm_up, *counted = case.calls()
        warm_up()
        for call in counted:
            os.getppid()
            call()
            os.getppid()


def count():
    """Instructions per logit by case; None where they cannot be counted."""
    found = ce_fast.show_config(mode="dicts")
    can = shutil.which("valgrind") and "avx2" in found.get("isas", ())
    if not can or not workloads.installed("ml_dtypes"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        options = ("--tool=callgrind", f"--callgrind-out-file={out}", f"--dump-before={MARK}")
        env = {**os.environ, "CE_FAST_ISA": "avx2", "OPENBLAS_NUM_THREADS": "1"}
        command = ["valgrind", *options, sys.executable, "-P", __file__]
        subprocess.run(command, env=env, check=True, capture_output=True, timeout=250)
        dumps = sorted(Path(folder).glob("out.*"), key=lambda path: int(path.suffix[1:]))
        totals = [int(re.search(r"^totals: (\d+)", path.read_text(), re.MULTILINE)[1]) for path in dumps]
    counted = totals[-4 * len(CASES) + 1 :: 2]  # each mark ends a dump: those of odd number are calls
    pairs = zip(counted[::2], counted[1::2], strict=True)
    return {name: (b - a) / case.n_logits for (name, case), (a, b) in zip(CASES.items(), pairs, strict=True)}


class Instructions:
    params = tuple(CASES)
    param_names = ("work",)
    unit = "instructions"

    def setup_cache(self):
        return count()

    def setup(self, counts, name):
        if counts is None:
            raise NotImplementedError("valgrind, ml_dtypes or the AVX2 kernels are not there")

    def track_instructions_per_logit(self, counts, name):
        return counts[name]


if __name__ == "__main__":
    run_cases()
