"""Mistakes people make, and what they are told: softmax twice, a class axis in the wrong place, binary targets."""

import warnings

import numpy as np
import pytest

import ce_fast as ce

SOFTMAX_LOSSES = [ce.CrossEntropyLoss, ce.FocalLoss, ce.PolyLoss, ce.GeneralizedCrossEntropyLoss]
KINDS = [pytest.param(kind, id=kind.__name__) for kind in SOFTMAX_LOSSES]


def messages(call, *args, **kwargs):
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*args, **kwargs)
    return [(w.category, str(w.message)) for w in caught]


def probabilities(rng, shape, dtype=np.float64, axis=-1):
    e = np.exp(rng.standard_normal(shape))
    return (e / e.sum(axis, keepdims=True)).astype(dtype)


# logits that were through a softmax already


def assert_warned_once(found):
    (category, message), *more = found
    assert category is UserWarning and not more
    assert "logits look like probabilities" in message and "warnings.filterwarnings" in message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_classes", [2, 3, 1000])
def test_logits_that_look_like_probabilities_warn_once_a_call(backend, dtype, kind, n_classes, rng):
    p, target = probabilities(rng, (9, n_classes), dtype), rng.integers(0, n_classes, 9)
    for reduction in ("mean", "none"):
        loss = kind(reduction=reduction)
        for call in (loss, loss.value_and_grad):
            assert_warned_once(messages(call, p, target))
            assert_warned_once(messages(call, p, p.copy()))
    if kind is not ce.PolyLoss:
        assert_warned_once(messages(kind().grad_and_hess, p, target))


def test_probabilities_along_any_axis_and_at_both_ends_of_a_divergence_warn(backend, rng):
    p = probabilities(rng, (2, 5, 4), axis=1)
    assert_warned_once(messages(ce.CrossEntropyLoss(class_axis=1), p, np.zeros((2, 4), int)))
    assert not messages(ce.CrossEntropyLoss(class_axis=-1), p, np.zeros((2, 5), int))
    assert_warned_once(messages(ce.KLDivLoss(class_axis=1), p, rng.standard_normal(p.shape)))
    assert_warned_once(messages(ce.DistillationLoss(class_axis=1), p, rng.standard_normal(p.shape)))


@pytest.mark.parametrize(
    "call",
    [
        lambda p, t: ce.cross_entropy(p, t),
        lambda p, t: ce.cross_entropy(p.tolist(), t.tolist()),
        lambda p, t: ce.cross_entropy(np.asfortranarray(p), t, label_smoothing=0.1),
        lambda p, t: ce.CrossEntropyLoss().value_and_grad(p, t, out=p.copy()),
        lambda p, t: ce.focal_loss(p, t),
        lambda p, t: ce.poly_loss(p, t),
        lambda p, t: ce.generalized_cross_entropy(p, t),
        lambda p, t: ce.perplexity(p, t),
    ],
)
def test_functions_warn_of_probabilities_too(call, rng):
    assert_warned_once(messages(call, probabilities(rng, (9, 4)), rng.integers(0, 4, 9)))


@pytest.mark.parametrize(
    "call",
    [
        lambda p, t: ce.NLLLoss()(p, t),
        lambda p, t: ce.nll_loss(np.log(p), t),
        lambda p, t: ce.softmax(p),
        lambda p, t: ce.log_softmax(p),
        lambda p, t: ce.logsumexp(p),
        lambda p, t: ce.binary_cross_entropy_with_logits(p, p),
        lambda p, t: ce.kl_div(np.log(p), np.log(p), log_probs=True),
    ],
)
def test_what_takes_no_logits_of_classes_does_not_warn(call, rng):
    assert not messages(call, probabilities(rng, (9, 4)), rng.integers(0, 4, 9))


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_logits_do_not_warn(backend, dtype, kind, rng):
    p = probabilities(rng, (9, 4), dtype)
    some, negative, near = p.copy(), p.copy(), p.copy()
    some[::2] = rng.standard_normal((5, 4))
    negative[:, 0], negative[:, 1] = -p[:, 0], p[:, 1] + 2 * p[:, 0]  # rows that sum to 1 all the same
    near *= 1.25
    for logits in (rng.standard_normal((9, 4)).astype(dtype), some, negative, near, np.zeros((9, 4), dtype), -p):
        assert not messages(kind(), logits, rng.integers(0, 4, 9))


@pytest.mark.parametrize("kind", KINDS)
def test_one_class_one_odd_row_and_no_rows_do_not_warn(backend, kind, rng):
    assert not messages(kind(), np.ones((9, 1)), np.zeros(9, int))
    assert not messages(kind(reduction="sum"), np.zeros((0, 4)), np.zeros(0, int))
    for odd in (0, 1, 4, 8):
        logits = probabilities(rng, (9, 4))
        logits[odd, 2] += 1
        assert not messages(kind(), logits, np.zeros(9, int))


def test_the_warning_can_be_silenced_and_made_an_error(rng):
    p, target = probabilities(rng, (9, 4)), rng.integers(0, 4, 9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message="logits look like probabilities")
        ce.cross_entropy(p, target)
    assert not caught
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="logits look like probabilities"):
        warnings.simplefilter("error")
        ce.cross_entropy(p, target)


def test_the_warning_points_at_the_line_that_called(rng):
    with pytest.warns(UserWarning, match="logits look like probabilities") as caught:
        ce.CrossEntropyLoss()(probabilities(rng, (9, 4)), rng.integers(0, 4, 9))
    assert caught[0].filename == __file__


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_warned_of_is_computed_all_the_same(kind, rng):
    p, target = probabilities(rng, (9, 4)), rng.integers(0, 4, 9)
    with pytest.warns(UserWarning):
        value = kind()(p, target)
    assert value == pytest.approx(kind()(p - 1, target), rel=1e-14)  # a constant changes nothing


# one-hot targets


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target_dtype", [np.float64, np.float32, np.float16])
def test_floating_one_hot_targets_equal_indices(variant, dtype, kind, target_dtype, rng):
    logits, index = rng.standard_normal((9, 5)).astype(dtype), rng.integers(0, 5, 9)
    one_hot = np.eye(5, dtype=target_dtype)[index]
    for options in ({}, {"label_smoothing": 0.1}, {"reduction": "none"}):
        by_index, by_one_hot = (kind(**options).value_and_grad(logits, t) for t in (index, one_hot))
        np.testing.assert_allclose(by_one_hot[0], by_index[0], rtol=1e-6 if dtype != np.float64 else 1e-14)
        np.testing.assert_allclose(by_one_hot[1].astype(float), by_index[1].astype(float), rtol=1e-2, atol=1e-6)


def test_integer_one_hot_targets_are_told_to_be_floating():
    with pytest.raises(ValueError, match=r"class indices has shape \(9, 5\); expected \(9,\)"):
        ce.cross_entropy(np.zeros((9, 5)), np.eye(5, dtype=int)[[0] * 9])


# the class axis in the wrong place

FITS = [  # shapes of logits and of indices, the class axis given, and the one that would fit
    ((8, 21, 16, 16), (8, 16, 16), -1, "class_axis=1"),
    ((8, 16, 16, 21), (8, 16, 16), 1, "class_axis=(-1|3)"),
    ((2, 7, 50), (2, 7), 1, "class_axis=(-1|2)"),
    ((2, 50, 7), (2, 7), -1, "class_axis=1"),
    ((5, 7), (7,), None, "class_axis=0"),
    ((5, 7), (7,), 1, "class_axis=0"),
    ((5, 7), (5,), 0, "class_axis=(-1|1)"),
    ((4, 5, 6), (5, 6), -1, "class_axis=0"),
]


@pytest.mark.parametrize("shape, outer, given, fits", FITS, ids=str)
@pytest.mark.parametrize("kind", [*SOFTMAX_LOSSES, ce.NLLLoss], ids=lambda kind: kind.__name__)
def test_a_class_axis_that_would_fit_the_target_is_named(kind, shape, outer, given, fits):
    loss = kind(class_axis=given)
    for call in (loss, loss.value_and_grad):
        with pytest.raises(ValueError, match=fits):
            call(np.zeros(shape), np.zeros(outer, int))


@pytest.mark.parametrize("shape, outer, fits", [((8, 21, 16, 16), (8, 16, 16), "1"), ((2, 7, 50), (2, 7), "(-1|2)")])
def test_a_missing_class_axis_is_named_by_the_shape_of_the_target(shape, outer, fits):
    with pytest.raises(ValueError, match=rf"class_axis={fits} (would fit|fits)"):
        ce.cross_entropy(np.zeros(shape), np.zeros(outer, int))


def test_a_target_that_fits_no_axis_is_told_what_was_expected():
    with pytest.raises(ValueError, match=r"\(3,\).*\(5,\)") as caught:
        ce.cross_entropy(np.zeros((5, 7)), np.zeros(3, int))
    assert "class_axis=" not in str(caught.value)


# binary targets

BINARY = "binary_cross_entropy_with_logits"


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 4)], ids=str)
@pytest.mark.parametrize("target_dtype", [np.float64, np.float32])
def test_binary_targets_are_sent_to_the_binary_loss(backend, shape, target_dtype, rng):
    target = np.array([1, 0, 1, 1, 0, 0], target_dtype)
    for call in (ce.cross_entropy, ce.focal_loss, ce.CrossEntropyLoss().value_and_grad):
        with pytest.raises((ValueError, TypeError), match=BINARY):
            call(rng.standard_normal(shape), target)


def test_class_probabilities_of_one_row_still_work(backend, rng):
    logits = rng.standard_normal(4)
    assert ce.cross_entropy(logits, np.array([0.0, 0.0, 1.0, 0.0])) == pytest.approx(ce.cross_entropy(logits, 2))
    soft = np.array([0.5, 0.0, 0.25, 0.25])
    assert ce.cross_entropy(logits, soft) == pytest.approx(-(soft * ce.log_softmax(logits)).sum())
