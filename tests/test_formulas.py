"""Formulas of other libraries, written out here in float64 as their sources say, and matched by ours.

torchvision: torchvision/ops/focal_loss.py. optax: optax/losses/_classification.py and _smoothing.py. torch: the
documentation of torch.nn.functional, which is called itself where it is installed.
"""

import numpy as np
import pytest

import ce_fast as ce

CLOSE = {"rtol": 1e-6, "atol": 1e-9}
N, K = 40, 12


def log_sigmoid(z):
    return -np.logaddexp(0, -z)


def log_softmax(z):
    return z - np.logaddexp.reduce(z, axis=-1, keepdims=True)


@pytest.fixture
def logits(rng):
    return rng.standard_normal((N, K)) * 3


@pytest.fixture
def index(rng):
    return rng.integers(0, K, N)


@pytest.fixture
def one_hot(index):
    return np.eye(K)[index]


@pytest.fixture
def probabilities(rng):
    return np.exp(log_softmax(rng.standard_normal((N, K)) * 2))


@pytest.fixture
def binary(rng):
    """Multi-label targets: 0, 1 and what is between."""
    return np.clip(rng.random((N, K)) * 2 - 0.5, 0, 1)


# the sigmoid family


@pytest.mark.parametrize("alpha", [0.25, 0.6, -1])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_sigmoid_focal_loss_is_that_of_torchvision(variant, logits, binary, alpha, gamma, reduction):
    p = 1 / (1 + np.exp(-logits))
    cross = np.maximum(logits, 0) - logits * binary + np.log1p(np.exp(-np.abs(logits)))
    p_t = p * binary + (1 - p) * (1 - binary)
    loss = cross * (1 - p_t) ** gamma
    if alpha >= 0:  # theirs takes -1 for no weighting, ours None
        loss = (alpha * binary + (1 - alpha) * (1 - binary)) * loss
    expected = {"none": loss, "mean": loss.mean(), "sum": loss.sum()}[reduction]
    got = ce.sigmoid_focal_loss(logits, binary, alpha=None if alpha < 0 else alpha, gamma=gamma, reduction=reduction)
    np.testing.assert_allclose(got, expected, **CLOSE)


@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_sigmoid_focal_loss_is_that_of_optax(variant, logits, binary, alpha, gamma):
    cross = -binary * log_sigmoid(logits) - (1 - binary) * log_sigmoid(-logits)
    with np.errstate(divide="ignore"):
        log_one_minus_p_t = np.logaddexp(
            np.log(1 - binary) + log_sigmoid(logits), np.log(binary) + log_sigmoid(-logits)
        )
    loss = cross * np.exp(gamma * log_one_minus_p_t)
    loss = loss if alpha is None else (alpha * binary + (1 - alpha) * (1 - binary)) * loss
    got = ce.sigmoid_focal_loss(logits, binary, alpha=alpha, gamma=gamma, reduction="none")
    np.testing.assert_allclose(got, loss, **CLOSE)


def test_sigmoid_binary_cross_entropy_is_that_of_optax(variant, logits, binary):
    expected = -binary * log_sigmoid(logits) - (1 - binary) * log_sigmoid(-logits)
    np.testing.assert_allclose(ce.binary_cross_entropy_with_logits(logits, binary, reduction="none"), expected, **CLOSE)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weight", [(), (K,), (N, 1), (N, K)], ids=str)
@pytest.mark.parametrize("pos_weight", [None, (), (K,), (N, K)], ids=str)
def test_binary_cross_entropy_with_logits_is_that_of_torch(variant, logits, binary, reduction, weight, pos_weight, rng):
    torch = pytest.importorskip("torch")
    weight, pos_weight = rng.random(weight) + 0.1, None if pos_weight is None else rng.random(pos_weight) * 3
    x = torch.tensor(logits, requires_grad=True)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        x,
        torch.tensor(binary),
        torch.as_tensor(weight),
        pos_weight=None if pos_weight is None else torch.as_tensor(pos_weight),
        reduction=reduction,
    )
    expected.sum().backward()
    value, grad = ce.BCEWithLogitsLoss(weight, reduction, pos_weight).value_and_grad(logits, binary)
    np.testing.assert_allclose(value, expected.detach().numpy(), **CLOSE)
    np.testing.assert_allclose(grad, x.grad.numpy(), **CLOSE)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_binary_cross_entropy_is_that_of_torch(variant, probabilities, binary, reduction, rng):
    torch = pytest.importorskip("torch")
    probabilities[0, :4], binary[0, :4] = [0, 1, 0, 1], [0, 1, 1, 0]  # the clamps
    weight, x = rng.random((N, 1)), torch.tensor(probabilities, requires_grad=True)
    expected = torch.nn.functional.binary_cross_entropy(
        x, torch.tensor(binary), torch.tensor(weight).expand(N, K), reduction=reduction
    )
    expected.sum().backward()
    value, grad = ce.BCELoss(weight, reduction).value_and_grad(probabilities, binary)
    np.testing.assert_allclose(value, expected.detach().numpy(), **CLOSE)
    np.testing.assert_allclose(grad, x.grad.numpy(), **CLOSE)


# the softmax family


def test_softmax_cross_entropy_is_that_of_optax(variant, logits, probabilities, one_hot):
    for labels in (probabilities, one_hot):
        expected = -(labels * log_softmax(logits)).sum(-1)
        np.testing.assert_allclose(ce.cross_entropy(logits, labels, reduction="none"), expected, **CLOSE)


def test_softmax_cross_entropy_with_integer_labels_is_that_of_optax(variant, logits, index):
    expected = np.logaddexp.reduce(logits, axis=-1) - logits[np.arange(N), index]
    np.testing.assert_allclose(ce.cross_entropy(logits, index, reduction="none"), expected, **CLOSE)


def test_safe_softmax_cross_entropy_is_that_of_optax(variant, logits, probabilities):
    """A label of 0 against a logit of -inf counts as 0."""
    logits[::3, 2], probabilities[::3, 2] = -np.inf, 0
    with np.errstate(invalid="ignore"):
        terms = np.where(probabilities != 0, probabilities * log_softmax(logits), 0)
    np.testing.assert_allclose(ce.cross_entropy(logits, probabilities, reduction="none"), -terms.sum(-1), **CLOSE)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_smooth_labels_are_those_of_optax(variant, logits, index, one_hot, probabilities, alpha):
    for target, labels in ((index, one_hot), (one_hot, one_hot), (probabilities, probabilities)):
        smoothed = (1 - alpha) * labels + alpha / K
        expected = -(smoothed * log_softmax(logits)).sum(-1)
        got = ce.cross_entropy(logits, target, label_smoothing=alpha, reduction="none")
        np.testing.assert_allclose(got, expected, **CLOSE)


@pytest.mark.parametrize("epsilon", [-1.0, 0.0, 2.0])
def test_poly_loss_cross_entropy_is_that_of_optax(variant, logits, index, one_hot, probabilities, epsilon):
    for target, labels in ((index, one_hot), (probabilities, probabilities)):
        one_minus_p_t = (labels * (1 - np.exp(log_softmax(logits)))).sum(-1)
        expected = -(labels * log_softmax(logits)).sum(-1) + epsilon * one_minus_p_t
        got = ce.poly_loss(logits, target, epsilon=epsilon, reduction="none")
        np.testing.assert_allclose(got, expected, **CLOSE)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_focal_loss_is_that_of_its_paper(variant, logits, index, gamma, rng):
    """FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t): Lin et al., arXiv:1708.02002, equation 5, over classes."""
    alpha, log_p_t = rng.random(K), log_softmax(logits)[np.arange(N), index]
    expected = -alpha[index] * (1 - np.exp(log_p_t)) ** gamma * log_p_t
    got = ce.focal_loss(logits, index, alpha=alpha, gamma=gamma, reduction="none")
    np.testing.assert_allclose(got, expected, **CLOSE)


@pytest.mark.parametrize("q", [0.1, 0.7, 1.0])
def test_generalized_cross_entropy_is_that_of_its_paper(variant, logits, index, q):
    """(1 - p_t^q) / q: Zhang and Sabuncu, arXiv:1805.07836, equation 6."""
    expected = (1 - np.exp(log_softmax(logits)[np.arange(N), index]) ** q) / q
    np.testing.assert_allclose(ce.generalized_cross_entropy(logits, index, q=q, reduction="none"), expected, **CLOSE)


# divergences


def test_kl_divergence_is_that_of_optax(variant, logits, probabilities):
    probabilities[::3, 2] = 0
    probabilities /= probabilities.sum(-1, keepdims=True)
    log_predictions = log_softmax(logits)
    with np.errstate(divide="ignore"):
        log_targets = np.log(probabilities)
    expected = (probabilities * (np.where(probabilities == 0, 0, log_targets) - log_predictions)).sum(-1)
    for got in (
        ce.kl_div(log_predictions, log_targets, log_probs=True, reduction="none"),
        ce.kl_div(logits, log_targets, reduction="none"),
    ):
        np.testing.assert_allclose(got, expected, **CLOSE)


def test_kl_divergence_with_log_targets_is_that_of_optax(variant, logits, probabilities):
    log_predictions, log_targets = log_softmax(logits), np.log(probabilities)
    expected = (np.exp(log_targets) * (log_targets - log_predictions)).sum(-1)
    got = ce.kl_div(log_predictions, log_targets, log_probs=True, reduction="none")
    np.testing.assert_allclose(got, expected, **CLOSE)


@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
def test_kl_div_is_that_of_torch(variant, logits, probabilities, reduction):
    """Its mean over elements divides by n_rows n_classes; its "batchmean" is our mean."""
    torch = pytest.importorskip("torch")
    log_predictions, log_targets = 0.5 * log_softmax(logits), 0.5 * np.log(probabilities)  # not normalised
    x = torch.tensor(log_predictions, requires_grad=True)
    expected = torch.nn.functional.kl_div(x, torch.tensor(log_targets), reduction=reduction, log_target=True)
    expected.backward()
    ours = ce.KLDivLoss("mean" if reduction == "batchmean" else "sum", log_probs=True)
    value, grad = ours.value_and_grad(log_predictions, log_targets)
    assert value == pytest.approx(expected.item(), rel=1e-6)
    np.testing.assert_allclose(grad, x.grad.numpy(), **CLOSE)


def test_entropy_is_that_of_torch(variant, logits):
    torch = pytest.importorskip("torch")
    expected = torch.distributions.Categorical(logits=torch.tensor(logits)).entropy()
    np.testing.assert_allclose(ce.entropy(logits), expected, **CLOSE)


@pytest.mark.parametrize("alpha", [0.1, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_that_of_its_paper(variant, logits, index, alpha, temperature, rng):
    """Soft targets times T^2 beside hard ones at temperature 1: Hinton et al., arXiv:1503.02531, section 2."""
    teacher = rng.standard_normal((N, K)) * 3
    log_p, log_q = log_softmax(logits / temperature), log_softmax(teacher / temperature)
    soft = (np.exp(log_q) * (log_q - log_p)).sum(-1).mean()
    hard = -log_softmax(logits)[np.arange(N), index].mean()
    got = ce.distillation_loss(logits, teacher, temperature=temperature, alpha=alpha, target=index)
    assert got == pytest.approx(alpha * temperature**2 * soft + (1 - alpha) * hard, rel=1e-6)
