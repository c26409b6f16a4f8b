"""How many times as long as ours a peer takes: the workloads of `python -m ce_fast.bench`, each measured in turns."""

from ce_fast import bench, workloads

PAIRS = {f"{w.name} / {peer.name}": (w, peer.name) for w in workloads.WORKLOADS for peer in w.peers}


class Ratio:
    params = tuple(PAIRS)
    param_names = ("work / peer",)
    unit = "ratio"
    timeout = 600

    def setup(self, pair):
        workload, peer = PAIRS[pair]
        self.n_threads = bench.thread_count(workload.shape)
        calls = workload.setup(workload.shape, self.n_threads)
        if not {workloads.OURS, peer} <= set(calls):
            raise NotImplementedError(f"{peer}, or what ours needs, is not installed")
        self.peer, self.calls = peer, {name: calls[name] for name in (workloads.OURS, peer)}

    def track_ratio(self, pair):
        with bench.torch_threads(self.n_threads):
            seconds = bench.medians(self.calls, repeats=5)
        return seconds[self.peer] / seconds[workloads.OURS]
