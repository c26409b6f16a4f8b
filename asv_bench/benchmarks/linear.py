"""Hidden states and a classifier: loss and gradients, ours and torch's, with as many threads."""

import ce_fast
from ce_fast import measure, workloads

WHO = {  # the workload and the call
    "ce_fast": ("linear", workloads.OURS),
    "ce_fast, torch": ("linear-torch", workloads.OURS),
    "torch": ("linear", workloads.TORCH),
    "torch, chunked": ("linear", workloads.CHUNKED),
}
SHAPE = (1024, 32000)


class Linear:
    params = tuple(WHO)
    param_names = ("who",)

    def setup(self, who):
        name, called = WHO[who]
        calls = workloads.BY_NAME[name].setup(SHAPE, measure.thread_count())
        if called not in calls:
            raise NotImplementedError("torch, or a function of it, is not installed")
        if workloads.installed("torch"):
            import torch

            torch.set_num_threads(measure.thread_count())
        self.call = calls[called]

    def time_loss_and_gradients(self, who):
        self.call()

    def peakmem_loss_and_gradients(self, who):
        self.call()


class Loss:
    params = ("float32", "bfloat16")
    param_names = ("dtype",)

    def setup(self, dtype):
        if not workloads.installed("ml_dtypes"):
            raise NotImplementedError("ml_dtypes is not installed")
        import ml_dtypes

        dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
        hidden, classifier, self.target = workloads.make_linear(SHAPE)
        self.hidden, self.classifier = hidden.astype(dtype), classifier.astype(dtype)

    def time_loss(self, dtype):
        ce_fast.linear_cross_entropy(self.hidden, self.classifier, self.target)

    def peakmem_loss(self, dtype):
        ce_fast.linear_cross_entropy(self.hidden, self.classifier, self.target)
