"""Loss and backward through torch: ours and torch's own, with as many threads."""

from ce_fast import measure, workloads


class Backward:
    params = (("256x50257", "100000x100"), ("float32", "bfloat16"), ("ce_fast", "torch"))
    param_names = ("shape", "dtype", "who")

    def setup(self, shape, dtype, who):
        if not (workloads.installed("torch") and workloads.installed("ml_dtypes")):
            raise NotImplementedError("torch or ml_dtypes is not installed")
        import torch

        if who == "ce_fast":
            from ce_fast.adapters.torch import cross_entropy
        else:
            from torch.nn.functional import cross_entropy
        torch.set_num_threads(measure.thread_count())
        logits, target = workloads.make_logits(tuple(map(int, shape.split("x"))), dtype)
        self.cross_entropy = cross_entropy
        self.input, self.target = workloads.as_tensor(logits).requires_grad_(), torch.from_numpy(target)

    def time_loss_and_backward(self, shape, dtype, who):
        self.input.grad = None
        self.cross_entropy(self.input, self.target).backward()

    def peakmem_loss_and_backward(self, shape, dtype, who):
        self.time_loss_and_backward(shape, dtype, who)
