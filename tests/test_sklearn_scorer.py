"""Scorers: against the formula, plain loops over folds, and scikit-learn's own scorer."""

import itertools
import os
import pickle
import warnings

import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn
from joblib import Parallel, delayed
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits, load_iris
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import AdaBoostClassifier, HistGradientBoostingClassifier
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, RidgeClassifier, SGDClassifier
from sklearn.metrics import accuracy_score, make_scorer
from sklearn.metrics import log_loss as host_log_loss
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    KFold,
    RandomizedSearchCV,
    cross_val_score,
    cross_validate,
)
from sklearn.multiclass import OneVsRestClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.tree import DecisionTreeClassifier

import ce_fast
from ce_fast.adapters.sklearn import make_cross_entropy_scorer, neg_cross_entropy_scorer
from labelled import LABELS, LETTERS, Fixed, cross_entropy_by_hand, sample


@pytest.fixture
def routing():
    with sklearn.config_context(enable_metadata_routing=True):
        yield


def test_the_scorer_finds_the_parameters_that_neg_log_loss_finds():
    X, y = load_digits(return_X_y=True)
    X, y = X[:600] / 16, y[:600]
    searches = [
        GridSearchCV(LogisticRegression(max_iter=200), {"C": [0.01, 0.1, 1.0]}, scoring=scoring, cv=3).fit(X, y)
        for scoring in (neg_cross_entropy_scorer, "neg_log_loss")
    ]
    ours, theirs = searches
    assert ours.best_params_ == theirs.best_params_
    for key in ("mean_test_score", "split0_test_score", "split1_test_score", "split2_test_score"):
        np.testing.assert_allclose(ours.cv_results_[key], theirs.cv_results_[key], rtol=1e-12)
    assert ours.score(X, y) == pytest.approx(theirs.score(X, y), rel=1e-12)


@pytest.mark.parametrize("labels", ["int", "negative", "float", "str", "object str", "Series", "Series of str"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_the_scorer_is_minus_log_loss_over_the_classes_of_the_estimator(labels, dtype):
    y, p, w = sample(0, 60, 4)
    p = p.astype(dtype)
    y_true = LABELS[labels](y)
    model = Fixed(np.unique(y_true)).fit(p)
    for weights in (None, w, w.tolist(), pd.Series(w)):
        expected = -host_log_loss(y_true, p, sample_weight=weights)
        assert neg_cross_entropy_scorer(model, p, y_true, weights) == expected
        assert neg_cross_entropy_scorer(model, p, y_true, sample_weight=weights) == expected
    some = y < 2
    assert neg_cross_entropy_scorer(model, p[some], y_true[some]) == -host_log_loss(
        y_true[some], p[some], labels=np.unique(y_true)
    )


def test_classes_in_any_order_are_the_columns():
    y, p, _ = sample(0, 60, 3)
    for order in itertools.permutations(range(3)):
        for labels in (LETTERS[:3], np.array([4, 5, 6]), np.array([-7, 2, 30])):
            got = neg_cross_entropy_scorer(Fixed(labels[list(order)]).fit(p), p[:, order], labels[y])
            assert got == -host_log_loss(y, p)


def test_a_fold_that_misses_a_class_scores_as_a_loop_by_hand():
    X, y = load_iris(return_X_y=True)
    order = np.r_[np.r_[0:20, 50:70, 100:120].reshape(3, 20).T.ravel(), 20:40, 70:90]
    X, y = X[order], LETTERS[y[order]]  # the last two folds of five miss class "c", or "b" and "c"
    model, folds = GaussianNB(), KFold(5)
    by_hand = []
    for train, test in folds.split(X):
        fitted = clone(model).fit(X[train], y[train])
        p = np.clip(fitted.predict_proba(X[test]), np.finfo(float).eps, 1 - np.finfo(float).eps)
        by_hand.append(
            np.mean([np.log(row[list(fitted.classes_).index(t)]) for row, t in zip(p, y[test], strict=True)])
        )
    scores = cross_val_score(model, X, y, scoring=neg_cross_entropy_scorer, cv=folds, error_score="raise")
    np.testing.assert_allclose(scores, by_hand, rtol=1e-13)
    assert np.isfinite(scores).all()
    with pytest.warns(UserWarning, match="Scoring failed"):
        assert np.isnan(cross_val_score(model, X, y, scoring="neg_log_loss", cv=folds)).any()


@pytest.mark.parametrize("labels, unseen", [("int", "3"), ("str", "'d'"), ("negative", "2"), ("gaps", "12")])
def test_a_label_the_estimator_has_not_seen_is_an_error_that_names_it_and_the_classes(labels, unseen):
    _, p, _ = sample(0, 8, 3)
    classes = LABELS[labels](np.arange(3))
    y_true = LABELS[labels](np.array([0, 1, 2, 3, 0, 1, 2, 3]))
    with pytest.raises(
        ValueError, match=f"y has the label {unseen}; expected one of the estimator's classes "
    ) as error:
        neg_cross_entropy_scorer(Fixed(classes).fit(p), p, y_true)
    assert str(classes.tolist()) in str(error.value)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("class_weight", [None, {"a": 3.0, "c": 0.5}])
@pytest.mark.parametrize("method", ["predict_proba", "predict_log_proba", "decision_function", "auto"])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_every_response_method_gives_the_formula(n_classes, method, class_weight, smoothing):
    X, y = load_iris(return_X_y=True)
    X, y = X[y < n_classes] + np.random.default_rng(0).normal(size=(50 * n_classes, 4)), y[y < n_classes]
    w = np.random.default_rng(1).random(len(y))
    class_weight = class_weight and {
        label: class_weight[label] for label in LETTERS[:n_classes] if label in class_weight
    }
    scorer = make_cross_entropy_scorer(response_method=method, label_smoothing=smoothing, class_weight=class_weight)
    model = LogisticRegression(max_iter=500).fit(X, LETTERS[y])
    per_class = [1.0 if class_weight is None else class_weight.get(label, 1.0) for label in LETTERS[:n_classes]]
    for weights in (None, w):
        expected = -cross_entropy_by_hand(model.predict_log_proba(X), y, weights, smoothing, per_class)
        assert scorer(model, X, LETTERS[y], weights) == pytest.approx(expected, rel=1e-11)


def test_the_binary_columns_may_be_one():
    y, p = sample(0, 40, 2)[0], np.random.default_rng(0).dirichlet([2, 2], 40)
    for smoothing in (0.0, 0.1):
        scorer = make_cross_entropy_scorer(label_smoothing=smoothing)
        expected = scorer(Fixed([0, 1]).fit(p), p, y)
        for answer in (p[:, 1], p[:, 1:]):
            assert scorer(Fixed([0, 1], answer).fit(p), p, y) == pytest.approx(expected, rel=1e-12)


def test_an_estimator_of_one_class_is_sure():
    X = np.zeros((4, 1))
    model = DummyClassifier().fit(X, ["a"] * 4)
    assert neg_cross_entropy_scorer(model, X, ["a"] * 4) == pytest.approx(0.0, abs=1e-15)


def test_probabilities_of_zero_are_clipped_as_log_loss_clips_them():
    X, y = load_iris(return_X_y=True)
    X = X[:, :1]
    model = DecisionTreeClassifier().fit(X[::2], y[::2])
    assert neg_cross_entropy_scorer(model, X, y) == -host_log_loss(y, model.predict_proba(X))
    smoothed = make_cross_entropy_scorer(label_smoothing=0.1)(model, X, y)
    p = model.predict_proba(X).clip(np.finfo(float).eps, 1 - np.finfo(float).eps)
    assert smoothed == pytest.approx(-cross_entropy_by_hand(np.log(p), y, None, 0.1), rel=1e-12)


def test_rows_that_do_not_sum_to_one_warn():
    y, p, _ = sample(0, 40, 3)
    with pytest.warns(UserWarning, match="do not sum to one"):
        neg_cross_entropy_scorer(Fixed([0, 1, 2]).fit(p), p * 0.5, y)


@pytest.mark.parametrize("spoil", [np.nan, np.inf, -0.5, 1.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_values_that_are_no_probabilities_are_errors(spoil, smoothing):
    y, p, _ = sample(0, 40, 3)
    p[7, 1] = spoil
    with pytest.raises(ValueError, match="expected 0 <= y_proba <= 1"):
        make_cross_entropy_scorer(label_smoothing=smoothing)(Fixed([0, 1, 2]).fit(p), p, y)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"response_method": "predict"}, ValueError, "response_method is 'predict'"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5"),
        ({"label_smoothing": "a"}, TypeError, "label_smoothing is 'a'"),
        ({"class_weight": "even"}, ValueError, "class_weight is 'even'; expected None, \"balanced\" or a dict"),
        ({"gamma": -1.0}, ValueError, "gamma is -1"),
        ({"unseen": "drop"}, ValueError, "unseen is 'drop'"),
        ({"class_weight": [1, 2]}, ValueError, "class_weight is"),
        ({"class_weight": {"a": -1}}, ValueError, r"class_weight\['a'\] is -1"),
        ({"class_weight": {"a": "x"}}, TypeError, r"class_weight\['a'\] is 'x'"),
        ({"class_weight": {"a": np.nan}}, ValueError, r"class_weight\['a'\] is nan"),
    ],
)
def test_bad_options_are_refused_when_the_scorer_is_made(options, error, message):
    with pytest.raises(error, match=message):
        make_cross_entropy_scorer(**options)


def test_class_weights_for_labels_that_are_no_classes():
    y, p, _ = sample(0, 40, 3)
    model = Fixed(LETTERS[:3]).fit(p)
    with pytest.raises(
        ValueError, match=r"class_weight has the label 'z'; the estimator's classes are \['a', 'b', 'c'\]"
    ):
        make_cross_entropy_scorer(class_weight={"a": 2.0, "z": 1.0})(model, p, LETTERS[y])
    full = {"a": 2.0, "b": 1.0, "c": 0.5}
    more = make_cross_entropy_scorer(class_weight=full | {"z": 9.0})  # a fold may lack a class that has a weight
    assert more(model, p, LETTERS[y]) == make_cross_entropy_scorer(class_weight=full)(model, p, LETTERS[y])
    with pytest.raises(ValueError, match="at least one non-zero"):
        make_cross_entropy_scorer(class_weight={"a": 0.0})(model, p[y == 0], LETTERS[y[y == 0]])


def test_what_is_no_fitted_classifier_is_refused():
    y, p, _ = sample(0, 40, 3)
    with pytest.raises(ValueError, match="LogisticRegression has no classes_"):
        neg_cross_entropy_scorer(LogisticRegression(), p, y)
    with pytest.raises(ValueError, match=r"y_proba has shape \(40, 3\); expected \(n_samples, 2\)"):
        neg_cross_entropy_scorer(Fixed([0, 1]).fit(p), p, y % 2)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        neg_cross_entropy_scorer(Fixed([0, 1, 2], p[1:]).fit(p), p, y)
    with pytest.raises(ValueError, match=r"decision_function has shape \(40, 3\)"):
        make_cross_entropy_scorer(response_method="decision_function")(Fixed([0, 1]).fit(p), p, y % 2)


def test_the_repr_makes_the_scorer():
    scorer = make_cross_entropy_scorer(label_smoothing=0.1, class_weight={"a": 2})
    assert repr(scorer) == (
        "make_cross_entropy_scorer(response_method='predict_proba', label_smoothing=0.1, gamma=0.0, "
        "class_weight={'a': 2.0}, unseen='raise')"
    )
    assert repr(eval(repr(scorer))) == repr(scorer)


def test_scorers_survive_pickle_clone_and_processes(routing):
    y, p, w = sample(0, 40, 3)
    model = Fixed([0, 1, 2]).fit(p)
    scorer = make_cross_entropy_scorer(label_smoothing=0.1, class_weight={1: 2.0}).set_score_request(sample_weight=True)
    copies = [
        pickle.loads(pickle.dumps(scorer)),
        clone(scorer, safe=False),
        clone(GridSearchCV(model, {}, scoring=scorer)).scoring,
    ]
    for copy in copies:
        assert copy is not scorer
        assert repr(copy) == repr(scorer)
        assert copy(model, p, y, w) == scorer(model, p, y, w)
        assert copy.get_metadata_routing().score.requests == {"sample_weight": True}
    X, y = load_iris(return_X_y=True)
    alone, together = (
        cross_val_score(LogisticRegression(max_iter=300), X, y, scoring=neg_cross_entropy_scorer, n_jobs=n)
        for n in (1, 2)
    )
    np.testing.assert_array_equal(alone, together)
    in_processes = Parallel(n_jobs=2, backend="loky")(
        delayed(scorer)(model, p, sample(0, 40, 3)[0], w) for _ in range(2)
    )
    assert in_processes == [scorer(model, p, sample(0, 40, 3)[0], w)] * 2


def _weighted_by_hand(X, y, w, folds, fit_weighted=True):
    scores = []
    for train, test in folds.split(X):
        fitted = LogisticRegression(max_iter=500).fit(
            X[train], y[train], sample_weight=w[train] if fit_weighted else None
        )
        log_p = np.log(fitted.predict_proba(X[test])[np.arange(len(test)), np.searchsorted(fitted.classes_, y[test])])
        scores.append(np.sum(w[test] * log_p) / np.sum(w[test]))
    return scores


def test_metadata_routing_brings_the_weights(routing):
    X, y = load_iris(return_X_y=True)
    w = np.random.default_rng(0).random(len(y)) ** 4
    folds = KFold(3, shuffle=True, random_state=0)
    scorer = make_cross_entropy_scorer().set_score_request(sample_weight=True)
    model = LogisticRegression(max_iter=500).set_fit_request(sample_weight=True)
    by_hand = _weighted_by_hand(X, y, w, folds)
    assert not np.allclose(by_hand, _weighted_by_hand(X, y, np.ones(len(y)), folds), rtol=1e-3)

    params = {"sample_weight": w}
    single = cross_validate(model, X, y, scoring=scorer, cv=folds, params=params, error_score="raise")
    np.testing.assert_allclose(single["test_score"], by_hand, rtol=1e-12)
    several = cross_validate(model, X, y, scoring={"ce": scorer}, cv=folds, params=params, error_score="raise")
    np.testing.assert_allclose(several["test_ce"], by_hand, rtol=1e-12)
    search = GridSearchCV(model, {"C": [1.0]}, scoring=scorer, cv=folds, error_score="raise").fit(X, y, sample_weight=w)
    np.testing.assert_allclose([search.cv_results_[f"split{k}_test_score"][0] for k in range(3)], by_hand, rtol=1e-12)
    piped = make_pipeline(StandardScaler(with_mean=False, with_std=False).set_fit_request(sample_weight=False), model)
    through = cross_val_score(piped, X, y, scoring=scorer, cv=folds, params=params, error_score="raise")
    np.testing.assert_allclose(through, by_hand, rtol=1e-12)


def test_metadata_routing_obeys_what_the_scorer_asks_for(routing):
    X, y = load_iris(return_X_y=True)
    w = np.random.default_rng(0).random(len(y)) ** 4
    folds = KFold(3, shuffle=True, random_state=0)
    model = LogisticRegression(max_iter=500).set_fit_request(sample_weight=True)
    with pytest.raises(ValueError, match=r"sample_weight.*make_cross_entropy_scorer"):
        cross_val_score(model, X, y, scoring=neg_cross_entropy_scorer, cv=folds, params={"sample_weight": w})
    without = make_cross_entropy_scorer().set_score_request(sample_weight=False)
    scores = cross_val_score(model, X, y, scoring=without, cv=folds, params={"sample_weight": w}, error_score="raise")
    for (train, test), score in zip(folds.split(X), scores, strict=True):
        fitted = LogisticRegression(max_iter=500).fit(X[train], y[train], sample_weight=w[train])
        assert score == pytest.approx(-host_log_loss(y[test], fitted.predict_proba(X[test])), rel=1e-12)
    named = make_cross_entropy_scorer().set_score_request(sample_weight="test_weight")
    plain = LogisticRegression(max_iter=500).set_fit_request(sample_weight=False)
    scores = cross_val_score(plain, X, y, scoring=named, cv=folds, params={"test_weight": w}, error_score="raise")
    np.testing.assert_allclose(scores, _weighted_by_hand(X, y, w, folds, fit_weighted=False), rtol=1e-12)


def test_scorers_work_beside_others():
    X, y = load_iris(return_X_y=True)
    scoring = {
        "ours": neg_cross_entropy_scorer,
        "theirs": "neg_log_loss",
        "accuracy": "accuracy",
        "logits": make_cross_entropy_scorer(response_method="decision_function"),
    }
    search = GridSearchCV(LogisticRegression(max_iter=500), {"C": [0.1, 1.0]}, scoring=scoring, refit="ours", cv=3)
    results = search.fit(X, y, sample_weight=np.ones(len(y))).cv_results_
    np.testing.assert_allclose(results["mean_test_ours"], results["mean_test_theirs"], rtol=1e-12)
    np.testing.assert_allclose(results["mean_test_logits"], results["mean_test_theirs"], rtol=1e-9)


def test_logistic_regression_cv_takes_the_scorer():
    X, y = load_iris(return_X_y=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = (
            LogisticRegressionCV(Cs=[0.1, 1.0], cv=3, max_iter=500, scoring=scoring).fit(X, y)
            for scoring in (neg_cross_entropy_scorer, "neg_log_loss")
        )
    np.testing.assert_array_equal(ours.C_, theirs.C_)
    assert ours.score(X, y) == pytest.approx(theirs.score(X, y), rel=1e-12)


def noisy_iris(n_classes, seed=0):
    X, y = load_iris(return_X_y=True)
    X, y = X[y < n_classes], y[y < n_classes]
    return X + np.random.default_rng(seed).normal(size=X.shape), LETTERS[y]


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize(
    "model, method",
    [
        (LogisticRegression(max_iter=500), "decision_function"),
        (LinearDiscriminantAnalysis(), "decision_function"),
        (HistGradientBoostingClassifier(max_iter=5), "decision_function"),
        (GaussianNB(), "predict_proba"),
        (OneVsRestClassifier(LogisticRegression()), {2: "decision_function", 3: "predict_proba"}),
        (AdaBoostClassifier(n_estimators=5), {2: "decision_function", 3: "predict_proba"}),
        (SGDClassifier(loss="modified_huber", random_state=0), "predict_proba"),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "fit") else "",
)
def test_auto_takes_decision_values_only_if_they_are_logits(model, method, n_classes):
    X, y = noisy_iris(n_classes)
    fitted = clone(model).fit(X, y)
    method = method if isinstance(method, str) else method[n_classes]
    auto, named = (make_cross_entropy_scorer(response_method=name) for name in ("auto", method))
    assert auto(fitted, X, y) == named(fitted, X, y)


@pytest.mark.parametrize("model", [LinearSVC(), RidgeClassifier(), SGDClassifier(loss="hinge"), SVC()])
def test_auto_refuses_a_decision_function_that_is_no_logit_and_says_why(model):
    X, y = noisy_iris(3)
    fitted = clone(model).fit(X, y)
    scorer = make_cross_entropy_scorer(response_method="auto")
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no predict_proba.*hinge.*CalibratedClassifierCV"):
        scorer(fitted, X, y)
    assert np.isfinite(scorer(CalibratedClassifierCV(clone(model), cv=2).fit(X, y), X, y))


@pytest.mark.parametrize("method", ["predict_proba", "predict_log_proba", "decision_function", "auto"])
@pytest.mark.parametrize("smoothing, class_weight", [(0.0, None), (0.0, {"a": 3.0, "c": 0.5}), (0.3, None)])
def test_gamma_gives_the_focal_loss(method, smoothing, class_weight):
    X, y = noisy_iris(3)
    model = LogisticRegression(max_iter=500).fit(X, y)
    s, w = np.random.default_rng(1).random(len(y)), np.array([(class_weight or {}).get(c, 1.0) for c in "abc"])
    log_p, codes = model.predict_log_proba(X), np.searchsorted(model.classes_, y)
    q = (1 - smoothing) * np.eye(3)[codes] + smoothing / 3
    by_hand = (s[:, None] * w * q * (1 - np.exp(log_p)) ** 1.5 * log_p).sum() / (s * w[codes]).sum()
    scorer = make_cross_entropy_scorer(
        response_method=method, gamma=1.5, label_smoothing=smoothing, class_weight=class_weight
    )
    assert scorer(model, X, y, s) == pytest.approx(by_hand, rel=1e-11)


@pytest.mark.parametrize("method", ["predict_proba", "decision_function"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"gamma": 2.0}])
def test_balanced_is_the_mean_over_labels_of_their_means(method, options):
    X, y = noisy_iris(3)
    few = np.r_[0:50, 50:60, 100:103]  # the fold
    model, s = LogisticRegression(max_iter=500).fit(X, y), np.random.default_rng(1).random(len(few))
    plain, balanced = (
        make_cross_entropy_scorer(response_method=method, class_weight=weight, **options)
        for weight in (None, "balanced")
    )
    if "label_smoothing" not in options:  # which counts a class by its own weight
        means = [plain(model, X[few][y[few] == c], y[few][y[few] == c], s[y[few] == c]) for c in "abc"]
        assert balanced(model, X[few], y[few], s) == pytest.approx(np.mean(means), rel=1e-12)
    mass = np.array([s[y[few] == c].sum() for c in "abc"])
    weights = dict(zip("abc", mass.sum() / 3 / mass, strict=True))
    by_dict = make_cross_entropy_scorer(response_method=method, class_weight=weights, **options)
    assert balanced(model, X[few], y[few], s) == pytest.approx(by_dict(model, X[few], y[few], s), rel=1e-12)
    only = y == "a"  # labels that do not occur have no mass to balance
    assert balanced(model, X[only], y[only]) == pytest.approx(plain(model, X[only], y[only]), rel=1e-12)


@pytest.mark.parametrize("labels", ["int", "gaps", "str"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("class_weight", [None, "balanced", {0: 2.0, 3: 0.5}])
def test_an_unseen_label_is_a_probability_of_zero_clipped_or_a_row_that_does_not_count(labels, dtype, class_weight):
    y, p, s = sample(0, 60, 5)
    p = p[:, :3].astype(dtype) / p[:, :3].sum(1, keepdims=True).astype(dtype)  # 3 and 4 are unseen
    names = LABELS[labels](np.arange(5))
    model, y_true = Fixed(names[:3]).fit(p), LABELS[labels](y)
    weight = class_weight
    if isinstance(class_weight, dict):  # a class of weight 1 by its entry: all classes have one, so 3 may too
        weight = {names[k].item(): class_weight.get(k, 1.0) for k in range(4)}
    options = {"class_weight": weight}
    with pytest.raises(ValueError, match="y has the label"):
        make_cross_entropy_scorer(**options)(model, p, y_true, s)

    def by_hand(counts):
        per_class = np.array([class_weight.get(k, 1.0) if isinstance(class_weight, dict) else 1.0 for k in range(5)])
        if class_weight == "balanced":
            per_class = 1 / np.bincount(y[counts], s[counts], 5)
        wide = np.c_[p, np.zeros((len(p), 2), dtype)]
        w = s * per_class[y]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return -host_log_loss(y[counts], wide[counts], sample_weight=w[counts], labels=range(5))

    with np.errstate(divide="ignore"):
        clipped, ignored = by_hand(y < 5), by_hand(y < 3)
    rel = 1e-12 if dtype == np.float64 else 1e-5
    assert make_cross_entropy_scorer(unseen="clip", **options)(model, p, y_true, s) == pytest.approx(clipped, rel=rel)
    assert make_cross_entropy_scorer(unseen="ignore", **options)(model, p, y_true, s) == pytest.approx(ignored, rel=rel)


def test_a_score_of_nothing_but_unseen_labels():
    y, p, _ = sample(0, 20, 3)
    model = Fixed(["a", "b", "c"]).fit(p)
    for method in ("predict_proba", "decision_function"):
        clip, ignore = (make_cross_entropy_scorer(response_method=method, unseen=word) for word in ("clip", "ignore"))
        assert clip(model, p, ["z"] * 20) == pytest.approx(np.log(np.finfo(float).eps), rel=1e-15)
        with pytest.raises(ValueError, match=r"no row of y counts; expected one .*\['a', 'b', 'c'\]"):
            ignore(model, p, ["z"] * 20)
        with pytest.raises(ValueError, match="y has the label 1; expected one of"):  # a slip, not a label unseen
            clip(model, p, y)


@pytest.mark.parametrize("unseen", ["clip", "ignore"])
def test_weights_of_labels_that_may_be_unseen_are_taken_whether_or_not_a_fold_holds_them(unseen):
    y, p, _ = sample(0, 30, 2)
    model = Fixed([0, 1]).fit(p)
    weighted, plain = (make_cross_entropy_scorer(unseen=unseen, class_weight=w) for w in ({2: 5.0}, None))
    assert weighted(model, p, y) == pytest.approx(plain(model, p, y), rel=1e-14)
    with_one = np.where(np.arange(30) == 7, 2, y)
    clipped = -np.log(np.finfo(float).eps)
    rest = plain(model, np.delete(p, 7, 0), np.delete(y, 7))
    expected = rest if unseen == "ignore" else (29 * rest - 5 * clipped) / 34
    assert weighted(model, p, with_one) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("unseen", ["clip", "ignore"])
def test_answers_for_unseen_labels_are_checked_too(unseen):
    scorer = make_cross_entropy_scorer(unseen=unseen)
    with pytest.raises(ValueError, match=r"predict_proba has shape \(3, 7\); expected \(n_samples, 3\)"):
        scorer(Fixed([0, 1, 2], np.full((3, 7), 1 / 7)).fit(None), None, [0, 5, 6])
    for wrong in (9.0, -0.1):
        with pytest.raises(ValueError, match="expected 0 <= y_proba <= 1"):
            scorer(Fixed([0, 1], np.array([[0.5, 0.5], [wrong, 0.5]])).fit(None), None, [0, 6])


def test_a_scorers_warning_points_at_the_caller():
    y, p, _ = sample(0, 30, 3)
    with pytest.warns(UserWarning, match="do not sum to one") as caught:
        neg_cross_entropy_scorer(Fixed([0, 1, 2]).fit(p), p * 0.9, y)
    assert caught[0].filename == __file__


def test_a_search_with_a_missing_class_weights_two_jobs_and_many_metrics_is_a_loop_by_hand(routing):
    rng = np.random.default_rng(0)
    X, y = noisy_iris(3)
    order = np.r_[np.r_[0:30, 50:80, 100:130].reshape(3, 30).T.ravel(), 30:50, 80:100]
    X, y, s = X[order], y[order], rng.random(len(order)) ** 3  # the last fold of five has no "c"
    folds = KFold(5)
    assert set(y[-26:]) == {"a", "b"}
    model = LogisticRegression(max_iter=500).set_fit_request(sample_weight=True)
    scoring = {
        "ce": make_cross_entropy_scorer().set_score_request(sample_weight=True),
        "smooth": make_cross_entropy_scorer(label_smoothing=0.1, response_method="auto").set_score_request(
            sample_weight=True
        ),
        "balanced": make_cross_entropy_scorer(class_weight="balanced").set_score_request(sample_weight=False),
        "accuracy": make_scorer(accuracy_score).set_score_request(sample_weight=False),
    }
    grid = {"C": [0.01, 1.0]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search = GridSearchCV(model, grid, scoring=scoring, refit="ce", cv=folds, n_jobs=2, error_score="raise")
        search.fit(X, y, sample_weight=s)
    for i, C in enumerate(grid["C"]):
        for k, (train, test) in enumerate(folds.split(X)):
            fitted = LogisticRegression(max_iter=500, C=C).fit(X[train], y[train], sample_weight=s[train])
            log_p, codes = fitted.predict_log_proba(X[test]), np.searchsorted(fitted.classes_, y[test])
            own = log_p[np.arange(len(test)), codes]
            expected = {
                "ce": np.average(own, weights=s[test]),
                "smooth": np.average(0.9 * own + 0.1 * log_p.mean(axis=1), weights=s[test]),
                "balanced": np.mean([own[codes == c].mean() for c in np.unique(codes)]),
                "accuracy": fitted.score(X[test], y[test]),
            }
            for name, value in expected.items():
                assert search.cv_results_[f"split{k}_test_{name}"][i] == pytest.approx(value, rel=1e-9)
    assert search.best_index_ == np.argmax(search.cv_results_["mean_test_ce"])


@pytest.mark.parametrize("search", [HalvingGridSearchCV, RandomizedSearchCV])
def test_other_searches_take_the_scorer(search):
    X, y = load_digits(return_X_y=True)
    options = {"cv": 3, "random_state": 0} | ({"n_iter": 2} if search is RandomizedSearchCV else {"min_resources": 300})
    ours, theirs = (
        search(LogisticRegression(max_iter=200), {"C": [0.01, 0.1, 1.0]}, scoring=scoring, **options).fit(X / 16, y)
        for scoring in (neg_cross_entropy_scorer, "neg_log_loss")
    )
    assert ours.best_params_ == theirs.best_params_
    assert ours.best_score_ == pytest.approx(theirs.best_score_, rel=1e-12)


def threads_of_a_worker():
    return ce_fast.show_config(mode="dicts")["threads"], os.environ.get("OMP_NUM_THREADS")


def test_jobs_share_the_processors():
    """Joblib gives each of its workers its part of them through OMP_NUM_THREADS."""
    found = Parallel(n_jobs=2, backend="loky")(delayed(threads_of_a_worker)() for _ in range(4))
    assert all(limit is not None and threads <= max(int(limit), 1) for threads, limit in found)
    assert all(2 * threads <= max(joblib.cpu_count(), 2) for threads, _ in found)
