"""Objectives and metrics for gradient boosting: their values, and what both libraries make of them."""

import dataclasses
import os
import pickle
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest

import ce_fast as ce
import reference
import reference_elements
from ce_fast.adapters.boosting import Metric, SigmoidObjective, SoftmaxObjective
from tolerances import assert_grad_close, assert_loss_close

pytestmark = [
    pytest.mark.filterwarnings("ignore:Cannot compute class probabilities:UserWarning"),
    pytest.mark.filterwarnings("ignore:The argument 'eval_set' is deprecated"),
]

SOFTMAX = {
    "cross-entropy": {},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"class_weight": (1.0, 3.0, 0.5, 2.0)},
    "focal": {"gamma": 2.0},
    "all": {"label_smoothing": 0.1, "gamma": 1.5, "class_weight": [0.5, 1.0, 2.0, 1.0]},
}
SIGMOID = {
    "cross-entropy": {},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"pos_weight": 3.0},
    "focal": {"gamma": 2.0, "alpha": 0.25},
    "focal without alpha": {"gamma": 0.5},
    "alpha alone": {"alpha": 0.7},
}
LAYOUTS = {"C": np.ascontiguousarray, "F": np.asfortranarray, "every other row": lambda a: np.repeat(a, 2, axis=0)[::2]}
NAMES = {"softmax": SoftmaxObjective, "sigmoid": SigmoidObjective}


class Data:
    """What the native interfaces pass in place of labels: a Dataset, or by the method `num_row` a DMatrix."""

    def __init__(self, label, weight):
        self.get_label, self.get_weight = lambda: label, lambda: weight


class DMatrix(Data):
    def num_row(self):
        return len(self.get_label())


def softmax_reference(logits, labels, label_smoothing=0.0, gamma=0.0, class_weight=None, **more):
    rule = {"rule": "focal", "param": gamma} if gamma else {}
    return reference.cross_entropy(
        logits, labels, weight=class_weight, label_smoothing=label_smoothing, **rule, **{"reduction": "sum"} | more
    )


def sigmoid_reference(logits, labels, label_smoothing=0.0, pos_weight=None, gamma=0.0, alpha=None, **more):
    more = {"reduction": "sum"} | more
    if gamma or alpha is not None:
        return reference_elements.sigmoid_focal(logits, labels, alpha=alpha, gamma=gamma, **more)
    options = {"label_smoothing": label_smoothing, "pos_weight": pos_weight}
    return reference_elements.binary_cross_entropy_with_logits(logits, labels, **options, **more)


def draw(rng, n_rows=60, n_classes=4, dtype=np.float64):
    return (3 * rng.standard_normal((n_rows, n_classes))).astype(dtype), rng.integers(0, n_classes, n_rows)


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("options", SOFTMAX.values(), ids=SOFTMAX)
def test_softmax_gradient_and_hessian_are_those_of_the_formula_in_the_layout_of_the_scores(options, dtype, layout, rng):
    scores, labels = draw(rng, dtype=dtype)
    weight = rng.integers(0, 4, len(labels)).astype(np.float32)
    given = LAYOUTS[layout](scores)
    before = given.copy()
    grad, hess = SoftmaxObjective(hessian_scale=1, **options)(labels.astype(np.float32), given, sample_weight=weight)
    wanted = softmax_reference(scores, labels, sample_weight=weight, **options)
    assert_grad_close(grad, wanted.grad, wanted.terms, dtype)
    assert_grad_close(hess, wanted.hess, wanted.hess_terms, dtype)
    assert (hess[weight > 0] > 0).all()
    assert grad.dtype == hess.dtype == dtype and (given == before).all()
    assert grad.flags.f_contiguous == hess.flags.f_contiguous == (layout == "F")


@pytest.mark.parametrize("options", SOFTMAX.values(), ids=SOFTMAX)
def test_flat_scores_are_read_class_by_class_and_answered_so(options, rng):
    scores, labels = draw(rng)
    flat = scores.ravel(order="F")
    for one, other in zip(
        SoftmaxObjective(**options)(labels, flat),
        SoftmaxObjective(**options)(labels, np.asfortranarray(scores)),
        strict=True,
    ):
        assert one.shape == flat.shape
        np.testing.assert_array_equal(one, other.ravel(order="F"))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("options", SIGMOID.values(), ids=SIGMOID)
def test_sigmoid_gradient_and_hessian_are_those_of_the_formula(options, dtype, rng):
    scores = (3 * rng.standard_normal(80)).astype(dtype)
    labels, weight = (rng.random(80) < 0.3).astype(np.float32), rng.integers(0, 4, 80).astype(np.float32)
    grad, hess = SigmoidObjective(**options)(labels, scores, sample_weight=weight)
    wanted = sigmoid_reference(scores, labels, sample_weight=weight, **options)
    assert_grad_close(grad, wanted.grad, wanted.terms, dtype)
    assert_grad_close(hess, wanted.hess, wanted.hess_terms, dtype)
    assert grad.dtype == hess.dtype == dtype and (hess[weight > 0] > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_the_slope_of_the_metric(name, rng):
    scores, labels = draw(rng, 5)
    all_options = SOFTMAX if name == "softmax" else SIGMOID
    if name == "sigmoid":
        scores, labels = scores[:, 0], labels % 2
    for options in all_options.values():
        objective, step = NAMES[name](**options), 1e-5
        divisor = np.sum(np.asarray(options.get("class_weight", np.ones(4)))[labels])
        slopes = np.empty(scores.shape)
        for at in np.ndindex(scores.shape):
            moved = [scores.copy(), scores.copy()]
            moved[0][at] += step
            moved[1][at] -= step
            high, low = (objective.metric(labels, z) for z in moved)
            slopes[at] = divisor * (high - low) / (2 * step)
        # the differences of two losses of about 1 have an error of 1e-16 / 1e-5, their truncation one of step squared
        np.testing.assert_allclose(objective(labels, scores)[0], slopes, rtol=1e-7, atol=1e-9)


def test_a_softmax_over_no_score_and_one_is_a_sigmoid(rng):
    z, labels = 3 * rng.standard_normal(50), rng.integers(0, 2, 50)
    two = np.stack([np.zeros(50), z], axis=1)
    for softmax, sigmoid in (({}, {}), ({"label_smoothing": 0.2},) * 2, ({"gamma": 2.0},) * 2):
        grad, hess = SoftmaxObjective(hessian_scale=1, **softmax)(labels, two)
        for one, other in zip((grad, hess), SigmoidObjective(**sigmoid)(labels, z), strict=True):
            np.testing.assert_allclose(one[:, 1], other, rtol=1e-12)


def test_the_hessian_is_scaled_as_the_library_that_calls_scales_its_own(rng):
    scores, labels = draw(rng)
    grad, hess = SoftmaxObjective(hessian_scale=1)(labels, scores)
    objective = SoftmaxObjective()
    calls = {
        2: [objective(labels, scores), objective(scores, DMatrix(labels, np.empty(0)))],
        4 / 3: [objective(labels, scores, None, None), objective(scores, Data(labels, None))],
        0.5: [SoftmaxObjective(hessian_scale=0.5)(labels, scores, None, None)],
    }
    for scale, results in calls.items():
        for result in results:
            np.testing.assert_array_equal(result[0], grad)
            np.testing.assert_allclose(result[1], scale * hess, rtol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_four_ways_to_call_give_one_gradient_and_one_loss(name, rng):
    objective = NAMES[name](**({"hessian_scale": 1} if name == "softmax" else {}))
    scores, labels = draw(rng, n_classes=4 if name == "softmax" else 2)
    scores = scores if name == "softmax" else scores[:, 0]
    weight = rng.random(len(labels))
    oracle = softmax_reference if name == "softmax" else sigmoid_reference
    for w, none in ((weight, False), (None, True)):
        native = (np.empty(0) if none else w, None if none else w)
        calls = {
            "XGBClassifier": ((labels, scores), {} if none else {"sample_weight": w}),
            "xgboost": ((scores, DMatrix(labels, native[0])), {}),
            "LGBMClassifier": ((labels, scores, w, None), {}),
            "lightgbm": ((scores, Data(labels.tolist(), native[1])), {}),
        }
        expected = objective(labels, scores, sample_weight=w)
        wanted = oracle(scores, labels, sample_weight=w, reduction="mean")
        for how, (args, named) in calls.items():
            for one, other in zip(objective(*args, **named), expected, strict=True):
                np.testing.assert_array_equal(one, other)
            given = objective.metric(*args, **named)
            value = given if how == "XGBClassifier" else given[1]
            assert_loss_close(value, wanted.value("mean"), np.float64, wanted.terms_of_value("mean"))
            assert type(value) is float
            if how == "xgboost":
                assert given == ("cross_entropy", value)
            elif how != "XGBClassifier":
                assert given == ("cross_entropy", value, False)


def test_a_metric_has_the_name_of_its_loss():
    names = {SoftmaxObjective(): "cross_entropy", SoftmaxObjective(gamma=1): "focal_loss"}
    names |= {SigmoidObjective(label_smoothing=0.1): "cross_entropy", SigmoidObjective(alpha=0.5): "focal_loss"}
    assert all(objective.metric.__name__ == name for objective, name in names.items())


def test_multi_label_scores_take_labels_of_their_shape_and_weights_of_their_rows(rng):
    scores, labels = 3 * rng.standard_normal((30, 4)), rng.integers(0, 2, (30, 4))
    weight = rng.random(30)
    grad, hess = SigmoidObjective()(labels, scores, sample_weight=weight)
    for k in range(4):
        one = SigmoidObjective()(labels[:, k], scores[:, k], sample_weight=weight)
        np.testing.assert_allclose((grad[:, k], hess[:, k]), one, rtol=1e-15)
    flat = SigmoidObjective()(scores, DMatrix(labels.ravel(), weight))  # XGBoost keeps labels row by row
    np.testing.assert_array_equal(flat[0], grad)


def test_probabilities_are_those_of_both_classes_or_all(rng):
    scores, _ = draw(rng)
    exact = np.exp(reference.log_softmax(scores))
    np.testing.assert_allclose(SoftmaxObjective().probabilities(scores), exact.astype(float), rtol=1e-14)
    z = np.array([-800.0, -40.0, 0.0, 40.0])
    p = SigmoidObjective().probabilities(z)
    np.testing.assert_allclose(p[:, 1], reference_elements.sigmoid(z.astype(np.longdouble)).astype(float), rtol=1e-14)
    np.testing.assert_array_equal(p[:, 0], SigmoidObjective().probabilities(-z)[:, 1])


def test_flat_scores_have_no_probabilities():
    with pytest.raises(ValueError, match=r"y_pred has shape \(6,\); expected \(n_samples, n_classes\)"):
        SoftmaxObjective().probabilities(np.zeros(6))


@pytest.mark.parametrize("n_classes", [1, 2, 7, 32, 33, 97])
@pytest.mark.parametrize("loss", [ce.CrossEntropyLoss(reduction="sum"), ce.FocalLoss(reduction="sum", gamma=1.5)])
def test_hessians_of_many_rows_are_those_of_each(variant, dtype, loss, n_classes, rng):
    """Rows go together: the sure, the wrong, those that do not count, and in another layout."""
    logits = (4 * rng.standard_normal((300, n_classes))).astype(dtype)
    target, weight = rng.integers(0, n_classes, 300), rng.random(300)
    logits[::7, 0], logits[3::7, -1] = 25, -np.inf if n_classes > 2 else -20
    target[3::7], target[5::11], weight[::13] = 0, -100, 0
    logits[5::11] = np.nan
    rule = {"rule": loss.rule, "param": loss.parameter}
    wanted = reference.cross_entropy(logits, target, sample_weight=weight, reduction="sum", **rule)
    for layout in (np.ascontiguousarray, np.asfortranarray):
        grad, hess = loss.grad_and_hess(layout(logits), target, weight)
        assert_grad_close(grad, wanted.grad, wanted.terms, dtype)
        assert_grad_close(hess, wanted.hess, wanted.hess_terms, dtype)
    logits[4, 0] = np.nan  # takes all rows near it out of the fast way
    again = loss.grad_and_hess(logits, target, weight)[1]
    assert_grad_close(np.delete(again, 4, 0), np.delete(wanted.hess, 4, 0), np.delete(wanted.hess_terms, 4, 0), dtype)


def test_any_number_of_threads_gives_the_same_bits(rng):
    scores, labels = draw(rng, 20_000, 7)
    expected = SoftmaxObjective(n_threads=1)(labels, scores)
    for n_threads in (2, 3):
        np.testing.assert_array_equal(SoftmaxObjective(n_threads=n_threads)(labels, scores), expected)


# --- Objects ----------------------------------------------------------------------------------------------------------


def test_objectives_are_frozen_equal_by_their_options_and_picklable():
    made = SoftmaxObjective(class_weight=np.array([1, 2]), gamma=1.0)
    assert made == SoftmaxObjective(class_weight=[1.0, 2.0], gamma=1.0) != SoftmaxObjective(gamma=1.0)
    assert "class_weight=(1.0, 2.0)" in repr(made)
    for thing in (made, SigmoidObjective(alpha=0.25), made.metric):
        again = pickle.loads(pickle.dumps(thing))
        assert again == thing and hash(again) == hash(thing)
        with pytest.raises(dataclasses.FrozenInstanceError):
            thing.gamma = 2.0


def test_the_module_imports_no_host():
    code = (
        "import sys, ce_fast.adapters.boosting; "
        "print([m for m in ('xgboost', 'lightgbm', 'sklearn', 'scipy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options", "error", "words"),
    [
        (SoftmaxObjective, {"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5"),
        (SoftmaxObjective, {"gamma": -1}, ValueError, "gamma is -1"),
        (SoftmaxObjective, {"class_weight": [1, -1]}, ValueError, r"class_weight\[1\] is -1"),
        (SoftmaxObjective, {"class_weight": "balanced"}, TypeError, "class_weight has dtype"),
        (SoftmaxObjective, {"hessian_scale": 0}, ValueError, "hessian_scale > 0"),
        (SoftmaxObjective, {"n_threads": 0}, ValueError, "n_threads is 0"),
        (SigmoidObjective, {"pos_weight": -1.0}, ValueError, "pos_weight is -1"),
        (SigmoidObjective, {"alpha": 2.0}, ValueError, "alpha is 2"),
        (SigmoidObjective, {"gamma": float("nan")}, ValueError, "gamma is nan"),
        (SigmoidObjective, {"gamma": 1, "pos_weight": 2}, ValueError, "no pos_weight .given 2."),
        (SigmoidObjective, {"alpha": 0.5, "label_smoothing": 0.1}, ValueError, "no label_smoothing .given 0.1."),
    ],
)
def test_bad_options_are_refused_when_the_objective_is_made(make, options, error, words):
    with pytest.raises(error, match=words):
        make(**options)


@pytest.mark.parametrize("call", [lambda o: o, lambda o: o.metric], ids=["objective", "metric"])
@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1, 4], r"y_true\[2\] is 4; expected a class, 0 to 3"),
        ([0, -1, 1], r"y_true\[1\] is -1"),
        ([-100, 0, 0], r"y_true\[0\] is -100"),
        ([0.0, 0.5, 1.0], r"y_true\[1\] is 0.5"),
        ([np.nan, 0, 0], r"y_true\[0\] is nan"),
        ([0, np.inf, 0], r"y_true\[1\] is inf"),
        ([0, 1e30, 0], r"y_true\[1\] is 1e\+30"),
    ],
)
def test_a_label_that_is_no_class_is_an_error_that_says_where(call, labels, words):
    with pytest.raises(ValueError, match=words):
        call(SoftmaxObjective())(labels, np.zeros((3, 4)))


@pytest.mark.parametrize("bad", [-0.5, 2.0, np.nan, np.inf])
def test_a_binary_label_outside_0_and_1_is_an_error_that_says_where(bad):
    for objective in (SigmoidObjective(), SigmoidObjective(gamma=1.0)):
        with pytest.raises(ValueError, match=rf"y_true\[1\] is {bad}; expected 0, 1 or a number between"):
            objective([0, bad, 1], np.zeros(3))


@pytest.mark.parametrize(
    ("objective", "labels", "scores", "error", "words"),
    [
        (SoftmaxObjective(), [0, 1], np.zeros((3, 4)), ValueError, r"y_pred has shape \(3, 4\); expected \(2, n_cl"),
        (SoftmaxObjective(), [0, 1], np.zeros(5), ValueError, r"y_pred has shape \(5,\); expected \(2, n_classes\)"),
        (SoftmaxObjective(), [0, 1], np.zeros(2), ValueError, "one raw score a row.*SigmoidObjective"),
        (SoftmaxObjective(), [0, 1], np.zeros((2, 1)), ValueError, "one raw score a row.*num_class"),
        (SoftmaxObjective(), [[0], [1]], np.zeros((2, 3)), ValueError, r"y_true has shape \(2, 1\)"),
        (SoftmaxObjective(), ["a", "b"], np.zeros((2, 3)), TypeError, "y_true has dtype"),
        (SoftmaxObjective(), [0, 1], np.zeros((2, 3), complex), TypeError, "y_pred has dtype complex128"),
        (SoftmaxObjective(class_weight=[1, 1]), [0, 1], np.zeros((2, 3)), ValueError, "weight has 2 values"),
        (SigmoidObjective(), [0, 1], np.zeros((2, 3)), ValueError, r"y_pred has shape \(2, 3\); expected \(2,\)"),
        (SigmoidObjective(), [None, 1], np.zeros(2), TypeError, "y_true has dtype object"),
    ],
)
def test_a_wrong_shape_or_dtype_is_an_error_that_says_what_came(objective, labels, scores, error, words):
    for call in (objective, objective.metric):
        with pytest.raises(error, match=words):
            call(labels, scores)


@pytest.mark.parametrize("weight", [[1.0, -1.0], [1.0, np.nan], [1.0], [[1.0, 1.0]]])
def test_bad_sample_weights_are_errors(weight):
    for objective, scores in ((SoftmaxObjective(), np.zeros((2, 3))), (SigmoidObjective(), np.zeros(2))):
        for args in (([0, 1], scores, weight, None), (scores, Data([0, 1], weight))):
            with pytest.raises(ValueError, match="sample_weight"):
                objective(*args)


# --- The four interfaces ----------------------------------------------------------------------------------------------

ROUNDS = 12
HOSTS = ("xgboost.train", "XGBClassifier", "lightgbm.train", "LGBMClassifier")
XGBOOST = {"max_depth": 3, "learning_rate": 0.3, "base_score": 0.5, "tree_method": "hist", "n_jobs": 1}
LIGHTGBM = {
    "num_leaves": 8, "max_depth": 3, "learning_rate": 0.3, "boost_from_average": False, "min_data_in_leaf": 0,
    "min_data_in_bin": 1, "feature_pre_filter": False, "force_col_wise": True, "num_threads": 1, "verbosity": -1,
}  # fmt: skip
RENAMED = {"min_data_in_leaf": "min_child_samples", "num_threads": "n_jobs"}
SKLEARN = {RENAMED.get(name, name): value for name, value in LIGHTGBM.items()}
OWN = {"xgb": ("binary:logistic", "multi:softprob"), "lgb": ("binary", "multiclass")}


class Fitted(NamedTuple):
    raw: object  # of X
    model: object
    history: list  # of the metric on the validation set
    rounds: int  # the best round


def fit(host, objective, X, y, *, weight=None, valid=None, metric=None, stop=None, rounds=ROUNDS):
    """Train one of the four interfaces on an objective, None being the library's own."""
    module = pytest.importorskip("xgboost" if "xgb" in host.lower() else "lightgbm")
    n_classes = len(np.unique(y))
    own = OWN["xgb" if module.__name__ == "xgboost" else "lgb"][n_classes > 2]
    many = {"num_class": n_classes} if n_classes > 2 else {}
    if host == "xgboost.train":
        train = module.DMatrix(X, y, weight=weight)
        history = {}
        model = module.train(
            {**XGBOOST, **many, "objective": own},
            train,
            rounds,
            obj=objective,
            custom_metric=metric,
            evals=[]
            if valid is None
            else [(module.DMatrix(*valid[:2], weight=valid[2] if valid[2:] else None), "valid")],
            evals_result=history,
            early_stopping_rounds=stop,
            verbose_eval=False,
        )
        raw = lambda X: model.predict(module.DMatrix(X), output_margin=True)  # noqa: E731
        return Fitted(raw, model, metric and history["valid"][metric.__name__], stop and model.best_iteration)
    if host == "XGBClassifier":
        model = module.XGBClassifier(
            n_estimators=rounds,
            objective=own if objective is None else objective,
            eval_metric=metric,
            early_stopping_rounds=stop,
            **XGBOOST,
        ).fit(X, y, sample_weight=weight, eval_set=None if valid is None else [valid], verbose=False)
        raw = lambda X: model.predict(X, output_margin=True)  # noqa: E731
        history = metric and model.evals_result()["validation_0"][metric.__name__]
        return Fitted(raw, model, history, stop and model.best_iteration)
    callbacks, history = [module.early_stopping(stop, verbose=False)] if stop else [], {}
    if host == "lightgbm.train":
        train = module.Dataset(X, y, weight=weight)
        model = module.train(
            {**LIGHTGBM, **many, "objective": own if objective is None else objective, "metric": "none"},
            train,
            rounds,
            feval=metric,
            valid_sets=[] if valid is None else [module.Dataset(valid[0], valid[1], train, *valid[2:])],
            valid_names=None if valid is None else ["valid"],
            callbacks=[*callbacks, module.record_evaluation(history)],
        )
        raw = lambda X: model.predict(X, raw_score=True)  # noqa: E731
        return Fitted(raw, model, metric and history["valid"][metric.__name__], stop and model.best_iteration - 1)
    model = module.LGBMClassifier(n_estimators=rounds, objective=objective, metric="none", **SKLEARN)
    evals = {"eval_set": None if valid is None else [valid], "eval_metric": metric, "callbacks": callbacks}
    model.fit(X, y, sample_weight=weight, **evals)
    raw = lambda X: model.predict(X, raw_score=True)  # noqa: E731
    history = metric and model.evals_result_["valid_0"][metric.__name__]
    return Fitted(raw, model, history, stop and model.best_iteration_ - 1)


@pytest.fixture(scope="module")
def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    return datasets.load_digits(return_X_y=True)


@pytest.fixture(scope="module")
def cancer():
    datasets = pytest.importorskip("sklearn.datasets")
    return datasets.load_breast_cancer(return_X_y=True)


PROBLEMS = {"digits": SoftmaxObjective(), "cancer": SigmoidObjective()}


@pytest.fixture(params=PROBLEMS)
def problem(request):
    """(objective, X, y)."""
    return PROBLEMS[request.param], *request.getfixturevalue(request.param)


def assert_same_scores(one, other):
    # float32 gradients that differ by an ulp change sums, and leaves, by some 1e-7 of their size in every round
    assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_model_is_that_of_the_librarys_own_objective(problem, host, weighted, rng):
    objective, X, y = problem
    weight = rng.integers(1, 4, len(y)).astype(float) if weighted else None
    ours, own = (fit(host, which, X, y, weight=weight).raw(X) for which in (objective, None))
    assert_same_scores(ours, own)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("options", [{}, {"gamma": 1.0}])
def test_a_weight_of_2_is_a_row_twice(problem, host, options, rng):
    objective, X, y = problem
    objective = dataclasses.replace(objective, **options)
    weight = rng.integers(1, 3, len(y))
    rows = np.repeat(np.arange(len(y)), weight)
    X = (
        X if X.max() <= 16 else X.argsort(0).argsort(0) // 20
    )  # fewer values than bins, which depend on rows, not on weights
    weighted, repeated = fit(host, objective, X, y, weight=weight), fit(host, objective, X[rows], y[rows])
    plain = fit(host, objective, X, y).raw(X)
    assert_same_scores(weighted.raw(X), repeated.raw(X))
    assert np.abs(weighted.raw(X) - plain).max() > 0.01 * np.abs(plain).max(), "weights count"


def split(X, y):
    return (X[::2], y[::2]), (X[1::2], y[1::2])


@pytest.mark.parametrize("host", HOSTS)
def test_training_stops_early_by_the_metric_which_is_the_log_loss(problem, host):
    objective, X, y = problem
    train, valid = split(X, y)
    fitted = fit(host, objective, *train, valid=valid, metric=objective.metric, stop=3, rounds=300)
    assert len(fitted.history) < 300
    assert fitted.rounds == int(np.argmin(fitted.history)) == len(fitted.history) - 1 - 3
    raw = fit(host, objective, *train, rounds=fitted.rounds + 1).raw(valid[0])
    p = np.asarray(objective.probabilities(raw), np.longdouble)[np.arange(len(raw)), valid[1]]
    # xgboost passes its metrics on as text, of six decimals
    np.testing.assert_allclose(fitted.history[fitted.rounds], float(-np.log(p).mean()), rtol=2e-6, atol=5e-7)


@pytest.mark.parametrize("host", HOSTS)
def test_validation_weights_reach_the_metric(cancer, host, rng):
    X, y = cancer
    weight = rng.integers(0, 3, len(y)).astype(float)
    rows = np.repeat(np.arange(len(y)), weight.astype(int))
    objective = SigmoidObjective(gamma=1.0)
    metric = SigmoidObjective().metric
    if host == "xgboost.train" or host == "lightgbm.train":
        one = fit(host, objective, X, y, valid=(X, y, weight), metric=metric).history
    else:
        name = {"XGBClassifier": "sample_weight_eval_set", "LGBMClassifier": "eval_sample_weight"}[host]
        one = fit_with_weights(host, objective, X, y, metric, {name: [weight]})
    other = fit(host, objective, X, y, valid=(X[rows], y[rows]), metric=metric).history
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def fit_with_weights(host, objective, X, y, metric, weights):
    if host == "XGBClassifier":
        xgboost = pytest.importorskip("xgboost")
        model = xgboost.XGBClassifier(n_estimators=ROUNDS, objective=objective, eval_metric=metric, **XGBOOST)
        model.fit(X, y, eval_set=[(X.copy(), y)], verbose=False, **weights)
        return model.evals_result()["validation_0"][metric.__name__]
    lightgbm = pytest.importorskip("lightgbm")
    model = lightgbm.LGBMClassifier(n_estimators=ROUNDS, objective=objective, metric="none", **SKLEARN)
    model.fit(X, y, eval_set=[(X.copy(), y)], eval_metric=metric, **weights)
    return model.evals_result_["valid_0"][metric.__name__]


@pytest.mark.parametrize("host", HOSTS)
def test_digits_are_told_apart_as_well_as_by_the_librarys_own_objective(digits, host):
    train, (X, y) = split(*digits)
    right = [(fit(host, which, *train).raw(X).argmax(1) == y).mean() for which in (SoftmaxObjective(), None)]
    assert right[0] == pytest.approx(right[1], abs=0.003) and right[0] > 0.9


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_what_the_estimators_predict(problem, gamma):
    """XGBClassifier gives probabilities and labels, LGBMClassifier raw scores."""
    objective, X, y = problem
    objective = dataclasses.replace(objective, gamma=gamma)
    for host in ("XGBClassifier", "LGBMClassifier"):
        fitted = fit(host, objective, X, y)
        p = objective.probabilities(fitted.raw(X))
        assert p.shape == (len(y), len(np.unique(y)))
        np.testing.assert_allclose(p.sum(1), 1, rtol=1e-6)
        if host == "XGBClassifier":
            np.testing.assert_allclose(fitted.model.predict_proba(X), p, rtol=1e-4, atol=1e-6)
            assert (fitted.model.predict(X) == p.argmax(1)).all()
        else:
            np.testing.assert_array_equal(fitted.model.predict_proba(X), fitted.raw(X))


@pytest.mark.parametrize("host", ["XGBClassifier", "LGBMClassifier"])
def test_estimators_with_an_objective_are_cloned_and_pickled(cancer, host):
    clone = pytest.importorskip("sklearn.base").clone
    X, y = cancer
    objective = SigmoidObjective(gamma=1.0, alpha=0.4)
    fitted = fit(host, objective, X, y)
    again = clone(fitted.model).fit(X, y)
    assert again.get_params()["objective"] == objective
    for other in (again, pickle.loads(pickle.dumps(fitted.model))):
        np.testing.assert_array_equal(other.predict_proba(X), fitted.model.predict_proba(X))


@pytest.mark.parametrize("host", ["XGBClassifier", "LGBMClassifier"])
def test_a_grid_search_over_gamma_scores_each_objective(cancer, host):
    selection = pytest.importorskip("sklearn.model_selection")
    from ce_fast.adapters.sklearn import make_cross_entropy_scorer

    X, y = cancer
    grid = {"objective": [SigmoidObjective(gamma=gamma) for gamma in (0.0, 1.0, 4.0)]}
    scoring = (
        "neg_log_loss" if host == "XGBClassifier" else make_cross_entropy_scorer(response_method="decision_function")
    )
    model = fit(host, SigmoidObjective(), X, y).model
    search = selection.GridSearchCV(model, grid, scoring=scoring, cv=3).fit(X, y)
    scores = search.cv_results_["mean_test_score"]
    assert np.isfinite(scores).all() and len(set(scores)) == 3
    assert search.best_params_["objective"] == grid["objective"][int(np.argmax(scores))]


def test_xgboost_multi_label_is_a_model_for_each_label(cancer):
    pytest.importorskip("xgboost")
    X, y = cancer
    labels = np.stack([y, X[:, 0] > 14], axis=1).astype(int)
    import xgboost

    model = xgboost.XGBClassifier(n_estimators=5, objective=SigmoidObjective(), **XGBOOST).fit(X, labels)
    raw = model.predict(X, output_margin=True)
    for k in range(2):
        alone = xgboost.XGBClassifier(n_estimators=5, objective=SigmoidObjective(), **XGBOOST).fit(X, labels[:, k])
        assert_same_scores(raw[:, k], alone.predict(X, output_margin=True))


FORK = """
import os, numpy as np
from ce_fast.adapters.boosting import SoftmaxObjective
rng = np.random.default_rng(0)
X, y = rng.standard_normal((20000, 5)), rng.integers(0, 7, 20000)
import {host} as host
if "{host}" == "xgboost":
    host.train({{"num_class": 7, "nthread": 1}}, host.DMatrix(X, y), 2, obj=SoftmaxObjective(n_threads=2))
else:
    host.train({{"objective": SoftmaxObjective(n_threads=2), "num_class": 7, "verbosity": -1, "num_threads": 1}},
               host.Dataset(X, y), 2)
child = os.fork()
if child == 0:
    SoftmaxObjective(n_threads=2)(y, np.zeros((20000, 7)))
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
@pytest.mark.parametrize("host", ["xgboost", "lightgbm"])
def test_a_forked_child_of_a_process_that_trained_does_not_hang(host):
    pytest.importorskip(host)
    code = FORK.format(host=host)
    found = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert found.stdout.split()[-1] == "7"


def test_a_metric_names_its_objective():
    assert Metric(SoftmaxObjective()) == SoftmaxObjective().metric
