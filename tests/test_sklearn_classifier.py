"""SoftmaxClassifier: scikit-learn's checks, scikit-learn's coefficients, and optima that the oracle confirms."""

import doctest
import pickle
import tracemalloc
import warnings

import numpy as np
import pytest

pytest.importorskip("sklearn")

from scipy import sparse
from scipy.optimize import approx_fprime
from sklearn import config_context
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_digits, load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_validate
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.estimator_checks import check_estimator
from threadpoolctl import threadpool_limits

import ce_fast.adapters.sklearn_classifier as adapter
import reference
import reference_divergences
from ce_fast.adapters.sklearn import make_cross_entropy_scorer
from ce_fast.adapters.sklearn_classifier import SoftmaxClassifier
from tolerances import assert_loss_close

COEFFICIENTS = 1e-4  # two solvers of one problem, each as far as rounding lets it go
PRECISE = {"tol": 1e-9, "max_iter": 10_000}
LOSSES = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "focal": {"gamma": 2.0},
    "smoothed focal": {"label_smoothing": 0.2, "gamma": 1.5},
    "balanced": {"class_weight": "balanced", "label_smoothing": 0.1},
    "distilled": {"alpha": 0.7, "temperature": 3.0, "label_smoothing": 0.1},
    "without intercept": {"label_smoothing": 0.1, "fit_intercept": False},
}
DATA = {"iris": load_iris, "digits": load_digits, "breast cancer": load_breast_cancer}

pytestmark = pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")


@pytest.fixture(autouse=True, scope="module")
def blas_on_one_thread():
    """Small products on several threads take 20 times as long where another process has one of the cores."""
    with threadpool_limits(1, user_api="blas"):
        yield


def scaled(name):
    X, y = DATA[name](return_X_y=True)
    return StandardScaler().fit_transform(X), y


def problem(rng, n_classes, options, n_rows=60):
    """(X, labels, what a fit takes beside them); labels are strings, so that their numbers are the adapter's work."""
    X = rng.normal(size=(n_rows, 5)) * [1, 2, 0.5, 1, 1]
    y = np.array(list("abcdefgh"))[np.r_[np.arange(n_classes), rng.integers(0, n_classes, n_rows - n_classes)]]
    fit = {"sample_weight": rng.uniform(0, 2, n_rows)}
    if "alpha" in options:
        fit["teacher_logits"] = rng.normal(size=(n_rows, n_classes))
    return X, y, fit


def oracle(flat, X, y, options, sample_weight, teacher_logits=None, C=1.0):
    """(objective, gradient) in the widest float, from the definition."""
    options = {"fit_intercept": True, **options}
    labels, codes = np.unique(y, return_inverse=True)
    n_columns = 1 if len(labels) == 2 else len(labels)
    table = np.asarray(flat, np.longdouble).reshape(-1, n_columns)
    X = np.column_stack([np.asarray(X, np.longdouble), *([np.ones(len(X))] if options["fit_intercept"] else [])])
    logits = X @ table
    if n_columns == 1:
        logits = np.column_stack([np.zeros(len(X), np.longdouble), logits])
    s = sample_weight
    if "class_weight" in options:
        s = s * compute_class_weight("balanced", classes=labels, y=y, sample_weight=sample_weight)[codes]
    common = {"sample_weight": s, "denominator": s.sum(), "label_smoothing": options.get("label_smoothing", 0)}
    if teacher_logits is not None:
        given = {name: options[name] for name in ("alpha", "temperature")}
        result = reference_divergences.distillation(logits, teacher_logits, codes, **given, **common)
    else:
        rule = ("focal", options["gamma"]) if "gamma" in options else ("cross_entropy", 0)
        result = reference.cross_entropy(logits, codes, rule=rule[0], param=rule[1], **common)
    penalised = table[:-1] if options["fit_intercept"] else table
    grad = X.T @ result.grad[:, -n_columns:]
    grad[: len(penalised)] += penalised / (C * s.sum())
    return result.value("mean") + (penalised**2).sum() / (2 * C * s.sum()), grad.ravel()


def objective_of(monkeypatch, model, X, y, **fit):
    """The function that a fit hands to scipy, and where it starts."""
    found = []

    def spy(fun, start, **options):
        found.append((fun, start))
        return minimize(fun, start, **options)

    minimize = adapter.minimize
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        patch.setattr(adapter, "minimize", spy)
        clone(model).set_params(max_iter=1).fit(X, y, **fit)
    return found[0]


def coefficients(model):
    """As the objective takes them."""
    return np.vstack([model.coef_.T, model.intercept_] if model.fit_intercept else [model.coef_.T]).ravel()


# --- scikit-learn's own checks ----------------------------------------------------------------------------------------


class Student(SoftmaxClassifier):
    """Makes its own teacher, for checks that know none."""

    def fit(self, X, y, sample_weight=None):
        teacher = SoftmaxClassifier().fit(X, y, sample_weight)
        return super().fit(X, y, sample_weight, teacher.decision_function(X))


# without an intercept one check fails, with LogisticRegression too: it wants a class preferred by its weight alone
CHECKED = {name: SoftmaxClassifier(**LOSSES[name]) for name in LOSSES if name not in ("distilled", "without intercept")}
CHECKED["distilled"] = Student(**LOSSES["distilled"])


@pytest.mark.parametrize("loss", CHECKED)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_every_check_of_an_estimator_passes(loss):
    results = check_estimator(CHECKED[loss], on_skip=None, on_fail=None)
    failed = [f"{result['check_name']}: {result['exception']}" for result in results if result["status"] == "failed"]
    assert failed == [] and len(results) > 40


# --- The same coefficients as LogisticRegression ----------------------------------------------------------------------


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("options", [{}, {"C": 0.05}, {"fit_intercept": False}, {"class_weight": "balanced"}], ids=str)
def test_coefficients_equal_those_of_logistic_regression(name, options):
    X, y = scaled(name)
    theirs = LogisticRegression(**PRECISE, **options).fit(X, y)
    ours = SoftmaxClassifier(**PRECISE, **options).fit(X, y)
    assert ours.coef_.shape == theirs.coef_.shape and ours.intercept_.shape == theirs.intercept_.shape
    assert ours.n_iter_.shape == theirs.n_iter_.shape and ours.n_iter_.dtype == theirs.n_iter_.dtype
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=COEFFICIENTS, rtol=0)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, atol=COEFFICIENTS, rtol=0)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=COEFFICIENTS, rtol=0)
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))


@pytest.mark.parametrize("name", DATA)
def test_coefficients_equal_those_of_logistic_regression_with_weights_of_rows_and_classes(name, rng):
    X, y = scaled(name)
    options = PRECISE | {"class_weight": {0: 3.0, 1: 0.5}}
    sample_weight = rng.integers(0, 4, len(y)) * 0.5
    theirs = LogisticRegression(**options).fit(X, y, sample_weight)
    ours = SoftmaxClassifier(**options).fit(X, y, sample_weight)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=COEFFICIENTS, rtol=0)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, atol=COEFFICIENTS, rtol=0)


@pytest.mark.parametrize(
    "make", [sparse.csr_array, sparse.csr_matrix, sparse.coo_array], ids=lambda make: make.__name__
)
@pytest.mark.parametrize("name", DATA)
def test_sparse_rows_give_the_coefficients_of_dense_ones(name, make):
    X, y = scaled(name)
    X = np.where(np.abs(X) < 0.5, 0, X)
    theirs = LogisticRegression(**PRECISE).fit(X, y)
    ours = SoftmaxClassifier(**PRECISE).fit(make(X), y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=COEFFICIENTS, rtol=0)
    np.testing.assert_allclose(ours.predict_proba(make(X)), theirs.predict_proba(X), atol=COEFFICIENTS, rtol=0)


@pytest.mark.parametrize("as_given", [np.asarray, sparse.csr_array], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", DATA)
def test_float32_stays_float32_and_comes_as_near_as_that_of_logistic_regression(name, as_given):
    X, y = scaled(name)
    narrow = X.astype(np.float32)
    exact = LogisticRegression(**PRECISE).fit(narrow.astype(np.float64), y)
    theirs, ours = LogisticRegression(), SoftmaxClassifier()
    for model in (theirs, ours):
        model.fit(as_given(narrow), y)
    assert ours.coef_.dtype == ours.intercept_.dtype == np.float32
    assert ours.predict_proba(narrow).dtype == ours.predict_log_proba(narrow).dtype == np.float32
    gap = max(COEFFICIENTS, 2 * np.abs(theirs.coef_ - exact.coef_).max())
    np.testing.assert_allclose(ours.coef_, exact.coef_, atol=gap, rtol=0)


# --- The objective, against its definition ----------------------------------------------------------------------------


@pytest.mark.parametrize("as_given", [np.asarray, sparse.csr_array], ids=["dense", "sparse"])
@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_objective_is_that_of_the_oracle_and_its_gradient_that_of_finite_differences(
    loss, n_classes, as_given, rng, monkeypatch
):
    options = LOSSES[loss]
    X, y, fit = problem(rng, n_classes, options, n_rows=101)
    monkeypatch.setattr(adapter, "BLOCK_LOGITS", 1)  # 3 blocks, the last one shorter
    objective, start = objective_of(monkeypatch, SoftmaxClassifier(**options), as_given(X), y, **fit)
    at = rng.normal(size=start.shape)
    value, grad = objective(at)
    expected, expected_grad = oracle(at, X, y, options, **fit)
    assert_loss_close(value, expected, np.float64, terms=20 * expected)
    np.testing.assert_allclose(grad, expected_grad.astype(float), rtol=1e-11, atol=1e-13)
    slopes = approx_fprime(at, lambda flat: objective(flat)[0], 1e-6)
    np.testing.assert_allclose(grad, slopes, atol=2e-5)


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("loss", LOSSES)
def test_at_the_optimum_the_gradient_of_the_oracle_is_zero(loss, n_classes, rng):
    options = LOSSES[loss]
    X, y, fit = problem(rng, n_classes, options)
    model = SoftmaxClassifier(**options, **PRECISE).fit(X, y, **fit)
    _, grad = oracle(coefficients(model), X, y, options, **fit)
    assert np.abs(grad).max() < 1e-6
    _, untrained = oracle(0 * coefficients(model), X, y, options, **fit)
    assert np.abs(untrained).max() > 1e-3


def test_the_penalty_weighs_less_as_C_grows_and_nothing_without_it(rng):
    X, y, fit = problem(rng, 3, {})
    norms = [np.abs(SoftmaxClassifier(C, **PRECISE).fit(X, y, **fit).coef_).sum() for C in (0.01, 1.0, 100.0, np.inf)]
    assert norms == sorted(norms)


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_integer_weights_equal_repeated_rows(loss, n_classes, rng):
    X, y, fit = problem(rng, n_classes, LOSSES[loss])
    counts = np.r_[np.full(n_classes, 1), rng.integers(0, 4, len(y) - n_classes)]
    fit.pop("sample_weight")
    repeated = {name: np.repeat(values, counts, axis=0) for name, values in fit.items()}
    model = SoftmaxClassifier(**LOSSES[loss], **PRECISE)
    weighted = clone(model).fit(X, y, sample_weight=counts, **fit)
    np.testing.assert_allclose(
        weighted.coef_, model.fit(X.repeat(counts, 0), y.repeat(counts), **repeated).coef_, atol=COEFFICIENTS, rtol=0
    )


def test_rows_of_weight_0_are_not_read(rng):
    X, y, fit = problem(rng, 3, LOSSES["distilled"])
    fit["sample_weight"][::7] = 0
    counts = fit["sample_weight"] > 0
    other = X.copy(), fit["teacher_logits"].copy()
    for array in other:
        array[~counts] = 1e9
    model = SoftmaxClassifier(**LOSSES["distilled"])
    first = clone(model).fit(X, y, **fit)
    second = clone(model).fit(other[0], y, fit["sample_weight"], other[1])
    np.testing.assert_allclose(second.coef_, first.coef_, rtol=1e-6)


# --- Distillation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [2, 4])
def test_a_teacher_of_weight_0_changes_nothing(n_classes, rng):
    X, y, fit = problem(rng, n_classes, LOSSES["distilled"])
    model = SoftmaxClassifier(alpha=0.0, label_smoothing=0.1, **PRECISE).fit(X, y, **fit)
    plain = SoftmaxClassifier(label_smoothing=0.1, **PRECISE).fit(X, y, fit["sample_weight"])
    np.testing.assert_allclose(model.coef_, plain.coef_, atol=1e-6)


@pytest.mark.parametrize("temperature", [None, 1.0, 4.0])
@pytest.mark.parametrize("n_classes", [2, 4])
def test_a_student_of_linear_logits_alone_finds_the_coefficients_of_the_teacher(n_classes, temperature, rng):
    X, y, _ = problem(rng, n_classes, {}, n_rows=300)
    coef, intercept = rng.normal(size=(n_classes, X.shape[1])), rng.normal(size=n_classes)
    student = SoftmaxClassifier(C=1e9, alpha=1.0, temperature=temperature, **PRECISE)
    student.fit(X, y, teacher_logits=X @ coef.T + intercept)
    # softmax knows logits up to a number a row: differences from the first class, or from the mean of all
    base = 0 if n_classes == 2 else slice(None)
    expected = coef - coef[base].mean(0) if n_classes > 2 else coef[1:] - coef[:1]
    expected_intercept = intercept - intercept[base].mean() if n_classes > 2 else intercept[1:] - intercept[:1]
    np.testing.assert_allclose(student.coef_, expected, atol=1e-3)
    np.testing.assert_allclose(student.intercept_, expected_intercept, atol=1e-3)


def test_decision_values_of_two_classes_teach_as_two_columns_do(rng):
    X, y, _ = problem(rng, 2, {})
    z = rng.normal(size=len(y))
    one = SoftmaxClassifier().fit(X, y, teacher_logits=z)
    two = SoftmaxClassifier().fit(X, y, teacher_logits=np.column_stack([np.zeros_like(z), z]))
    np.testing.assert_array_equal(one.coef_, two.coef_)


def test_probabilities_as_teacher_logits_are_warned_of(rng):
    X, y, _ = problem(rng, 3, {})
    proba = SoftmaxClassifier().fit(X, y).predict_proba(X)
    with pytest.warns(UserWarning, match="look like probabilities"):
        SoftmaxClassifier().fit(X, y, teacher_logits=proba)


def test_a_grid_search_routes_weights_and_teacher_to_the_rows_of_each_fold(rng):
    options = LOSSES["distilled"]
    X, y, fit = problem(rng, 3, options, n_rows=90)
    grid, cv = [0.0, 0.1, 0.4], StratifiedKFold(3)
    model, scorer = SoftmaxClassifier(**options), make_cross_entropy_scorer()
    with config_context(enable_metadata_routing=True):
        routed = SoftmaxClassifier(**options).set_fit_request(sample_weight=True, teacher_logits=True)
        search = GridSearchCV(
            routed, {"label_smoothing": grid}, cv=cv, scoring=scorer.set_score_request(sample_weight=True)
        ).fit(X, y, **fit)
        validated = cross_validate(
            routed, X, y, cv=cv, params=fit, scoring=scorer.set_score_request(sample_weight=True), return_estimator=True
        )
    for fold, (train, test) in enumerate(cv.split(X, y)):
        own = {name: values[train] for name, values in fit.items()}
        for k, label_smoothing in enumerate(grid):
            expected = clone(model).set_params(label_smoothing=label_smoothing).fit(X[train], y[train], **own)
            score = scorer(expected, X[test], y[test], fit["sample_weight"][test])
            np.testing.assert_allclose(search.cv_results_[f"split{fold}_test_score"][k], score, rtol=1e-12)
        expected = clone(model).fit(X[train], y[train], **own)
        np.testing.assert_allclose(validated["estimator"][fold].coef_, expected.coef_, rtol=1e-12)
        plain = SoftmaxClassifier(label_smoothing=0.1).fit(X[train], y[train], own["sample_weight"])
        assert np.abs(expected.coef_ - plain.coef_).max() > 0.01


def test_docstring_examples_give_what_they_say():
    result = doctest.testmod(adapter)
    assert result.attempted > 5 and result.failed == 0


# --- Predictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [2, 5])
def test_probabilities_are_the_softmax_of_the_decision_values(n_classes, rng):
    X, y, fit = problem(rng, n_classes, {})
    model = SoftmaxClassifier().fit(X, y, **fit)
    scores = model.decision_function(X)
    assert scores.shape == ((len(X),) if n_classes == 2 else (len(X), n_classes))
    logits = np.column_stack([np.zeros(len(X)), scores]) if n_classes == 2 else scores
    log_p = reference.log_softmax(logits)
    assert_loss_close(-model.predict_log_proba(X), -log_p, np.float64)
    np.testing.assert_allclose(model.predict_proba(X), np.exp(log_p).astype(float), rtol=1e-14)
    np.testing.assert_array_equal(model.predict(X), model.classes_[logits.argmax(1)])


def test_logarithms_of_probabilities_that_round_to_0_and_1_are_exact(rng):
    X, y, fit = problem(rng, 2, {})
    model = SoftmaxClassifier().fit(X, y, **fit)
    far = X[:4] * 1e4
    z = model.decision_function(far)
    assert (np.abs(z) > 1000).any() and (model.predict_proba(far) == 0).any()
    log_p = reference.log_softmax(np.column_stack([np.zeros(4), z]))
    assert_loss_close(-model.predict_log_proba(far), -log_p, np.float64)


def test_a_pickled_model_predicts_the_same(rng):
    X, y, fit = problem(rng, 3, {})
    model = SoftmaxClassifier(label_smoothing=0.1).fit(X, y, **fit)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict_proba(X), model.predict_proba(X))


def test_names_of_features_are_kept(rng):
    pd = pytest.importorskip("pandas")
    X, y, fit = problem(rng, 3, {})
    frame = pd.DataFrame(X, columns=list("pqrst"))
    model = SoftmaxClassifier().fit(frame, y, **fit)
    assert model.feature_names_in_.tolist() == list("pqrst") and model.n_features_in_ == 5
    np.testing.assert_array_equal(model.coef_, SoftmaxClassifier().fit(X, y, **fit).coef_)


# --- The solver -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [2, 4])
def test_a_warm_start_takes_fewer_iterations_to_the_same_place(n_classes, rng):
    X, y, fit = problem(rng, n_classes, {})
    model = SoftmaxClassifier(warm_start=True).fit(X, y, **fit)
    cold, coef = model.n_iter_[0], model.coef_
    model.fit(X, y, **fit)
    assert cold > 3 and model.n_iter_[0] <= 1
    np.testing.assert_allclose(model.coef_, coef, atol=1e-2)
    assert SoftmaxClassifier().fit(X, y, **fit).n_iter_ == cold


def test_a_solver_that_is_stopped_early_warns_with_the_caller_s_line(rng):
    X, y, fit = problem(rng, 3, {})
    with pytest.warns(ConvergenceWarning, match=r"after 2 iterations .*Increase max_iter, which is 2") as caught:
        assert SoftmaxClassifier(max_iter=2).fit(X, y, **fit).n_iter_ == 2
    assert caught[0].filename == __file__


def test_verbose_prints_an_objective_that_falls(rng, capsys):
    X, y, fit = problem(rng, 3, {})
    model = SoftmaxClassifier(verbose=1).fit(X, y, **fit)
    lines = capsys.readouterr().out.splitlines()
    values = [float(line.rpartition(" ")[2]) for line in lines]
    assert len(lines) == model.n_iter_[0] and values == sorted(values, reverse=True)


@pytest.mark.parametrize("as_given", [np.asarray, sparse.csr_array], ids=["dense", "sparse"])
@pytest.mark.parametrize("loss", ["plain", "focal", "distilled"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_fit_takes_no_memory_of_the_size_of_all_logits(loss, as_given, rng):
    n_rows, n_classes = 100_000, 40
    X, y = as_given(rng.normal(size=(n_rows, 3))), np.arange(n_rows) % n_classes
    fit = {"teacher_logits": np.zeros((n_rows, n_classes))} if loss == "distilled" else {}
    model = SoftmaxClassifier(**LOSSES[loss], max_iter=1)
    tracemalloc.start()
    try:
        model.fit(X, y, **fit)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * n_rows * n_classes / 4


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, fit, message",
    [
        ({"alpha": 0.5}, {}, r"alpha given without teacher_logits"),
        ({"alpha": 0.0, "temperature": 2.0}, {}, r"alpha and temperature given without teacher_logits"),
        ({"gamma": 2.0}, {"teacher_logits": np.zeros((60, 3))}, r"gamma is 2.0 with teacher_logits"),
        ({}, {"teacher_logits": np.zeros((60, 2))}, r"shape \(60, 2\); expected \(60, 3\), columns for \['a'"),
        ({}, {"teacher_logits": np.zeros((59, 3))}, r"shape \(59, 3\); expected \(60, 3\)"),
        ({}, {"teacher_logits": np.full((60, 3), np.nan)}, r"teacher_logits contains NaN"),
        ({}, {"sample_weight": np.zeros(60)}, r"at least one non-zero"),
        ({}, {"sample_weight": -np.ones(60)}, r"Negative values"),
        ({}, {"sample_weight": np.full(60, np.inf)}, r"sample_weight contains infinity"),
        ({"class_weight": {"a": -1.0}}, {}, r"class_weight gives the class .*'a'.* the weight -1.0"),
        ({"class_weight": dict.fromkeys("abc", 0.0)}, {}, r"times class weights are 0"),
        ({"label_smoothing": 1.5}, {}, r"'label_smoothing' parameter"),
        ({"gamma": -1.0}, {}, r"'gamma' parameter"),
        ({"temperature": 0.0}, {}, r"'temperature' parameter"),
        ({"C": 0.0}, {}, r"'C' parameter"),
        ({"tol": None}, {}, r"'tol' parameter"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(options, fit, message, rng):
    X, y, _ = problem(rng, 3, {})
    with pytest.raises(ValueError, match=message):
        SoftmaxClassifier(**options).fit(X, y, **fit)


@pytest.mark.filterwarnings("error")
def test_balanced_weights_want_weight_in_every_class(rng):
    X, y, fit = problem(rng, 3, {})
    fit["sample_weight"][y == "b"] = 0
    with pytest.raises(ValueError, match=r"class_weight gives the class .*'b'.* the weight inf"):
        SoftmaxClassifier(class_weight="balanced").fit(X, y, **fit)


def test_labels_of_one_class_are_refused(rng):
    with pytest.raises(ValueError, match=r"y holds one class, .*'a'.*at least 2 classes"):
        SoftmaxClassifier().fit(rng.normal(size=(4, 2)), ["a"] * 4)


def test_a_warm_start_on_other_features_is_refused(rng):
    X, y, fit = problem(rng, 3, {})
    model = SoftmaxClassifier(warm_start=True).fit(X, y, **fit)
    with pytest.raises(ValueError, match=r"coef_ of the last fit has shape \(3, 5\); these data need \(3, 4\)"):
        model.fit(X[:, :4], y, **fit)
