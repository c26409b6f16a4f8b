"""Focal loss against plain log loss in XGBoost and LightGBM, where one class is rare.

    python examples/imbalanced_boosting.py

The same objective object goes to both libraries. Boosted without early stopping, both grow too sure of themselves, and
log loss makes them pay for it; a focal loss of small gamma leaves the rows alone that are already right. What the
script claims it asserts: gamma = 0.5 has a lower log loss than plain log loss, in both libraries and on all problems
but for XGBoost on the smallest, the tumours. It does not claim that more is better (gamma = 2 is too much for XGBoost's
settings here), nor that the ranking is: average precision moves a little, either way.
Needs `pip install ce_fast[sklearn,boosting]`.
"""

import lightgbm
import numpy as np
import xgboost
from sklearn.datasets import load_breast_cancer, load_digits, make_classification
from sklearn.metrics import average_precision_score
from sklearn.model_selection import train_test_split

from ce_fast.adapters.boosting import SigmoidObjective

GAMMAS = (0.0, 0.5, 2.0)
SPLITS = 3
LOG_LOSS = SigmoidObjective().metric  # of raw scores, whatever they were trained on


def rare_eights():
    """Is it an 8? A third of the eights is kept: 58 rows of 1681."""
    X, digit = load_digits(return_X_y=True)
    eights = np.flatnonzero(digit == 8)
    kept = np.setdiff1d(np.arange(len(digit)), np.setdiff1d(eights, eights[::3]))
    return X[kept], (digit[kept] == 8).astype(int)


def rare_clusters():
    """Gaussian clusters, 3 % of them of the positive class."""
    return make_classification(
        8_000,
        20,
        n_informative=8,
        n_redundant=4,
        n_clusters_per_class=4,
        weights=[0.97],
        class_sep=0.8,
        random_state=0,
    )


def rare_tumours():
    """Is a tumour of the breast malignant? A fifth of those is kept: 43 rows of 400."""
    X, benign = load_breast_cancer(return_X_y=True)
    malignant = np.flatnonzero(benign == 0)
    kept = np.setdiff1d(np.arange(len(benign)), np.setdiff1d(malignant, malignant[::5]))
    return X[kept], 1 - benign[kept]


def xgboost_scores(objective, X, y, X_test):
    model = xgboost.XGBClassifier(
        objective=objective, n_estimators=200, max_depth=4, learning_rate=0.1, base_score=0.5, n_jobs=1
    )
    return model.fit(X, y).predict(X_test, output_margin=True)


def lightgbm_scores(objective, X, y, X_test):
    model = lightgbm.LGBMClassifier(
        objective=objective, n_estimators=200, num_leaves=15, learning_rate=0.1, n_jobs=1, verbosity=-1
    )
    return model.fit(X, y).predict(X_test, raw_score=True)


def score(raw_scores, gamma, X, y):
    """(log loss, average precision) on held-out halves, means over some splits."""
    results = []
    for seed in range(SPLITS):
        X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.5, stratify=y, random_state=seed)
        raw = raw_scores(SigmoidObjective(gamma=gamma), X_train, y_train, X_test)
        results.append((LOG_LOSS(y_test, raw), average_precision_score(y_test, raw)))
    return np.mean(results, axis=0)


def main():
    for problem in (rare_eights, rare_clusters, rare_tumours):
        X, y = problem()
        print(f"\n{problem.__name__}: {y.sum()} of {len(y)} rows are positive; means over {SPLITS} splits")
        print(f"{'':12}{'gamma':>6}{'log loss':>10}{'average precision':>20}")
        for name, raw_scores in (("XGBoost", xgboost_scores), ("LightGBM", lightgbm_scores)):
            found = {gamma: score(raw_scores, gamma, X, y) for gamma in GAMMAS}
            for gamma, (log_loss, precision) in found.items():
                print(f"{name:12}{gamma:6.1f}{log_loss:10.4f}{precision:20.3f}")
            plain, focal = found[0.0], found[0.5]
            if (name, problem) != ("XGBoost", rare_tumours):
                assert focal[0] < plain[0], f"{name}: gamma = 0.5 has no lower log loss"
            assert abs(focal[1] - plain[1]) < 0.05, f"{name}: average precision moves by more than 0.05"


if __name__ == "__main__":
    main()
