"""scikit-learn: log_loss, and the scorer in a grid search; ours and scikit-learn's own."""

from ce_fast import workloads


def _need_sklearn():
    if not workloads.installed("sklearn"):
        raise NotImplementedError("scikit-learn is not installed")


class LogLoss:
    params = (("1000x3", "100000x10"), ("ce_fast", "sklearn"))
    param_names = ("shape", "who")

    def setup(self, shape, who):
        _need_sklearn()
        if who == "ce_fast":
            from ce_fast.adapters.sklearn import log_loss
        else:
            from sklearn.metrics import log_loss
        self.log_loss = log_loss
        self.probabilities, self.labels = workloads.make_probabilities(tuple(map(int, shape.split("x"))))
        self.names = self.labels.astype(str)

    def time_int_labels(self, shape, who):
        self.log_loss(self.labels, self.probabilities)

    def time_string_labels(self, shape, who):
        self.log_loss(self.names, self.probabilities)


class GridSearch:
    """Of a model that costs little, so that the scorer shows."""

    params = ("ce_fast", "sklearn")
    param_names = ("who",)

    def setup(self, who):
        _need_sklearn()
        from sklearn.datasets import load_digits
        from sklearn.metrics import get_scorer
        from sklearn.model_selection import GridSearchCV
        from sklearn.naive_bayes import GaussianNB

        if who == "ce_fast":
            from ce_fast.adapters.sklearn import neg_cross_entropy_scorer as scorer
        else:
            scorer = get_scorer("neg_log_loss")
        self.search = GridSearchCV(GaussianNB(), {"var_smoothing": [1e-9, 1e-6, 1e-3]}, scoring=scorer, cv=5)
        self.data = load_digits(return_X_y=True)
        self.model = GaussianNB().fit(*self.data)
        self.scorer = scorer

    def time_search(self, who):
        self.search.fit(*self.data)

    def time_score(self, who):
        self.scorer(self.model, *self.data)
