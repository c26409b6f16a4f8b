"""Memory: peaks of a process that has the input, and what a forward pass adds to it."""

import numpy as np

import ce_fast
from ce_fast import measure, workloads

from . import shape_of


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
    """Bytes that one call takes beyond its input and its results: ours, and whom we compare with."""

    params = tuple(
        f"{w.name} / {who}"
        for w in workloads.WORKLOADS
        if w.memory
        for who in (workloads.OURS, *(bar.peer for bar in w.memory))
    )
    param_names = ("work / who",)
    unit = "bytes"
    timeout = 600

    def setup(self, pair):
        name, who = pair.split(" / ")
        if who not in workloads.BY_NAME[name].who():
            raise NotImplementedError(f"{who} is not installed")

    def track_growth(self, pair):
        name, who = pair.split(" / ")
        growth = measure.growth(name, who, shape_of(workloads.BY_NAME[name]))
        return np.nan if growth is None else growth
