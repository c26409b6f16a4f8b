"""scikit-learn: fits of a linear classifier; ours and LogisticRegression."""

import numpy as np

from ce_fast import workloads


class Fit:
    params = (("digits", "50000x50x10", "50000x50x2"), ("ce_fast", "sklearn"))
    param_names = ("data", "who")

    def setup(self, data, who):
        if not workloads.installed("sklearn"):
            raise NotImplementedError("scikit-learn is not installed")
        from sklearn.datasets import load_digits
        from sklearn.linear_model import LogisticRegression

        from ce_fast.adapters.sklearn_classifier import SoftmaxClassifier

        if data == "digits":
            X, self.y = load_digits(return_X_y=True)
            self.X = X / 16
        else:
            n_rows, n_features, n_classes = map(int, data.split("x"))
            rng = np.random.default_rng(0)
            self.X = rng.normal(size=(n_rows, n_features))
            scores = self.X @ rng.normal(size=(n_features, n_classes)) + rng.gumbel(size=(n_rows, n_classes))
            self.y = scores.argmax(axis=1)
        self.model = (SoftmaxClassifier if who == "ce_fast" else LogisticRegression)(max_iter=1000)

    def time_fit(self, data, who):
        self.model.fit(self.X, self.y)
