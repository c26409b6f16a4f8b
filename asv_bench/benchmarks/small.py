"""Small calls, where the overhead is everything."""

import numpy as np

import ce_fast
from ce_fast import workloads


class Small:
    def setup(self):
        self.logits, self.target = workloads.make_logits((32, 10))
        self.loss = ce_fast.CrossEntropyLoss()
        self.grad = np.empty_like(self.logits)

    def time_cross_entropy(self):
        ce_fast.cross_entropy(self.logits, self.target)

    def time_loss_class(self):
        self.loss(self.logits, self.target)

    def time_value_and_grad(self):
        self.loss.value_and_grad(self.logits, self.target, out=self.grad)


class SmallTorch:
    params = ("ce_fast", "torch")
    param_names = ("who",)

    def setup(self, who):
        if not workloads.installed("torch"):
            raise NotImplementedError("torch is not installed")
        import torch

        if who == "ce_fast":
            from ce_fast.adapters.torch import cross_entropy
        else:
            from torch.nn.functional import cross_entropy
        logits, target = workloads.make_logits((32, 10))
        self.cross_entropy = cross_entropy
        self.input, self.target = torch.from_numpy(logits), torch.from_numpy(target)
        self.leaf = self.input.clone().requires_grad_()

    def time_forward(self, who):
        self.cross_entropy(self.input, self.target)

    def time_loss_and_backward(self, who):
        self.leaf.grad = None
        self.cross_entropy(self.leaf, self.target).backward()
