"""How many times as long as ours a peer takes, and as much memory: the lines of `python -m ce_fast.bench`."""

from dataclasses import replace

import numpy as np

from ce_fast import bench, measure, workloads

from . import QUICK, shape_of

PAIRS = {f"{w.name} / {peer.name}": (w, peer.name) for w in workloads.WORKLOADS for peer in w.peers}
MEMORY = {
    f"{w.name} / {bar.peer}": (replace(w, memory=(bar,)), bar.peer) for w in workloads.WORKLOADS for bar in w.memory
}
REPEATS = 1 if QUICK else 5  # turns for each


class Ratio:
    params = tuple(PAIRS)
    param_names = ("work / peer",)
    unit = "ratio"
    timeout = 600

    def setup(self, pair):
        workload, self.peer = PAIRS[pair]
        if not {workloads.OURS, self.peer} <= workload.who():
            raise NotImplementedError(f"{self.peer}, or what ours needs, is not installed")
        self.n_threads = measure.thread_count(shape_of(workload))
        calls = workload.setup(shape_of(workload), self.n_threads)
        self.calls = {name: calls[name] for name in (workloads.OURS, self.peer)}

    def track_ratio(self, pair):
        with measure.torch_threads(self.n_threads):
            seconds = measure.medians(self.calls, repeats=REPEATS)
        return seconds[self.peer] / seconds[workloads.OURS]


class MemoryRatio:
    """Of what one call takes beyond its input and its results; a page counts where ours takes less."""

    params = tuple(MEMORY)
    param_names = ("work / peer",)
    unit = "ratio"
    timeout = 600

    def setup(self, pair):
        workload, peer = MEMORY[pair]
        if not {workloads.OURS, peer} <= workload.who():
            raise NotImplementedError(f"{peer}, or what ours needs, is not installed")

    def track_memory_ratio(self, pair):
        workload, _ = MEMORY[pair]
        (row,) = bench.measure_memory(workload, shape_of(workload))
        return np.nan if row.ratio is None else row.ratio
