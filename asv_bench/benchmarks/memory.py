"""Memory: peaks of a process that has the input, and what a forward pass adds to it."""

import numpy as np

import ce_fast
from ce_fast import bench, workloads


class Peak:
    """The input alone is there to compare with."""

    params = ("input alone", "forward", "value and grad", "in place")
    param_names = ("work",)

    def setup(self, work):
        self.logits, self.target = workloads.make_logits((1024, 50257))

    def peakmem_float32(self, work):
        if work == "input alone":
            return
        loss = ce_fast.CrossEntropyLoss()
        if work == "forward":
            loss(self.logits, self.target)
            return
        loss.value_and_grad(self.logits, self.target, out=self.logits if work == "in place" else None)


class Growth:
    params = (workloads.OURS, workloads.TORCH)
    param_names = ("who",)
    unit = "bytes"

    def setup(self, who):
        if who == workloads.TORCH and not workloads.installed("torch"):
            raise NotImplementedError("torch is not installed")

    def track_forward_growth(self, who):
        growth = bench.forward_growth(who)
        return np.nan if growth is None else growth
