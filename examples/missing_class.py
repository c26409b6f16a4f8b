"""Cross-validation where folds lack a class: the wines in the order of their cultivars, class by class.

    python examples/missing_class.py

scikit-learn's "neg_log_loss" has no score for a fold whose labels are not those of the model. Here the columns are
those of the model, whatever the fold holds, and what is done with a label that the model has never seen is an option.
"""

import warnings

import numpy as np
from sklearn.datasets import load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ce_fast.adapters.sklearn import make_cross_entropy_scorer, neg_cross_entropy_scorer

SCORING = {
    "neg_log_loss": "neg_log_loss",
    "cross-entropy": neg_cross_entropy_scorer,
    "of logits": make_cross_entropy_scorer(response_method="auto"),
    "balanced": make_cross_entropy_scorer(class_weight="balanced"),
    "focal": make_cross_entropy_scorer(gamma=2.0),
}


def main() -> None:
    X, y = load_wine(return_X_y=True)
    model = make_pipeline(StandardScaler(), LogisticRegression())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Scoring failed")  # of neg_log_loss, as said above
        scores = cross_validate(model, X, y, scoring=SCORING, cv=KFold(5))
    print(f"{'fold':<20}", *range(5), sep="     ")
    for name in SCORING:
        print(f"{name:<20}", *(f"{score:6.3f}" for score in scores[f"test_{name}"]))
    assert np.isnan(scores["test_neg_log_loss"]).any()
    assert all(np.isfinite(scores[f"test_{name}"]).all() for name in list(SCORING)[1:])
    np.testing.assert_allclose(scores["test_cross-entropy"], scores["test_of logits"], rtol=1e-9)

    seen = y < 2  # a model of two cultivars meets a third
    two = make_pipeline(StandardScaler(), LogisticRegression()).fit(X[seen], y[seen])
    for unseen in ("ignore", "clip"):
        score = make_cross_entropy_scorer(unseen=unseen)(two, X, y)
        print(f"two cultivars known, unseen={unseen!r}: {score:.3f}")


if __name__ == "__main__":
    main()
