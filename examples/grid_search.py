"""Which label smoothing, or which teacher's temperature? A grid search on the digits, and a calibration after it.

    python examples/grid_search.py

A linear classifier is fitted to labels, smoothed or not, and to the logits of a teacher that is not linear, softened by
a temperature. The search scores cross-entropy and accuracy together; the logits of the best model get a temperature of
their own, by data of its own. Where there is hardly a penalty, smoothing stands in for it.
"""

import numpy as np
import sklearn
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, cross_val_predict, train_test_split
from sklearn.svm import SVC

import ce_fast as ce
from ce_fast.adapters.sklearn import (
    SoftmaxClassifier,
    calibration_error,
    log_loss,
    make_cross_entropy_scorer,
)

GRID = [
    {"C": [10.0, 1000.0], "label_smoothing": [0.0, 0.01, 0.03, 0.1]},
    {"C": [10.0], "alpha": [0.5, 0.9], "temperature": [1.0, 2.0, 4.0]},
]


def search(X, y, teacher_logits) -> GridSearchCV:
    """The best of the grid; models without a teacher are not handed one."""
    results = []
    for grid, asks in zip(GRID, (False, True), strict=True):
        model = SoftmaxClassifier(max_iter=500).set_fit_request(sample_weight=False, teacher_logits=asks)
        scoring = {"cross-entropy": make_cross_entropy_scorer(response_method="auto"), "accuracy": "accuracy"}
        found = GridSearchCV(model, grid, scoring=scoring, refit="cross-entropy", cv=3, n_jobs=2)
        results.append(found.fit(X, y, **({"teacher_logits": teacher_logits} if asks else {})))
        show(found)
    return max(results, key=lambda found: found.best_score_)


def show(found: GridSearchCV) -> None:
    scores = found.cv_results_
    for i in np.argsort(scores["rank_test_cross-entropy"]):
        options = ", ".join(f"{name}={value}" for name, value in scores["params"][i].items())
        loss, accuracy = -scores["mean_test_cross-entropy"][i], scores["mean_test_accuracy"][i]
        print(f"{options:<40} cross-entropy {loss:.3f}  accuracy {accuracy:.3f}")
    print()


def main() -> None:
    X, y = load_digits(return_X_y=True)
    X = X / 16
    X, X_held, y, y_held = train_test_split(X, y, test_size=0.5, random_state=0, stratify=y)
    X_own, X_test, y_own, y_test = train_test_split(X_held, y_held, test_size=0.5, random_state=0, stratify=y_held)
    # the teacher's opinion of a sample it has not learned, in nats
    teacher = 10 * cross_val_predict(SVC(gamma=1.0), X, y, cv=5, method="decision_function")
    with sklearn.config_context(enable_metadata_routing=True):
        best = search(X, y, teacher)
    print("best:", best.best_params_)

    models = {
        "hardly penalised": SoftmaxClassifier(C=1000, max_iter=500).fit(X, y),
        "and smoothed by 0.01": SoftmaxClassifier(C=1000, label_smoothing=0.01, max_iter=500).fit(X, y),
        "the best": best.best_estimator_,
    }
    losses = {name: log_loss(y_test, model.predict_proba(X_test)) for name, model in models.items()}
    logits = best.best_estimator_.decision_function
    T = ce.fit_temperature(logits(X_own), y_own)
    losses[f"the best at T={T:.2f}"] = log_loss(y_test, ce.softmax(logits(X_test) / T))
    for name, loss in losses.items():
        print(f"{name:<24} cross-entropy {loss:.3f} on data that none has seen")
    print(f"and its expected calibration error {calibration_error(y_test, ce.softmax(logits(X_test) / T)):.3f}")
    assert losses["the best"] < losses["and smoothed by 0.01"] < losses["hardly penalised"]


if __name__ == "__main__":
    main()
