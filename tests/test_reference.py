"""The oracle against mpmath, whose gradients are its own derivatives."""

import mpmath as mp
import numpy as np
import pytest

import reference

ROWS = [[20.0, 0.0, 0.0], [1.5, -2.25, 0.75], [700.0, -700.0, 699.5], [0.0], [1e4, 1e4 + 1, 1e4 - 30]]

DIGITS = 360  # 60 are left of 1 - p, down to what a float64 may be

RULES = {
    "cross_entropy": lambda n, _: n,
    "focal": lambda n, gamma: (-mp.expm1(-n)) ** gamma * n,
    "poly": lambda n, epsilon: n - epsilon * mp.expm1(-n),
    "generalized": lambda n, q: -mp.expm1(-q * n) / q,
}


def exact(row, mass, row_weight, rule="cross_entropy", param=0.0, temperature=1.0, softcap=None, z_loss=0.0):
    """(loss, gradient, Hessian) of a row, the class probabilities times class weights being mass."""
    f = RULES[rule]

    def capped(x):
        return (x if softcap is None else softcap * mp.tanh(x / softcap)) / mp.mpf(temperature)

    def parts(x):
        z = [capped(v) for v in x]
        e = [mp.exp(v) for v in z]
        rest = [mp.fsum(e[:k] + e[k + 1 :]) for k in range(len(e))]
        return mp.log(mp.fsum(e)), [mp.log1p(r / v) for r, v in zip(rest, e, strict=True)]

    def loss(*x):
        lse, n = parts(x)
        by_class = [m * f(v, mp.mpf(param)) for m, v in zip(mass, n, strict=True) if m]
        return mp.fsum(by_class) + row_weight * mp.mpf(z_loss) * lse**2

    with mp.workdps(DIGITS):
        x, mass = [mp.mpf(v) for v in row], [mp.mpf(str(v)) for v in mass]
        row_weight = mp.mpf(str(row_weight))
        grad = [mp.diff(loss, tuple(x), tuple(int(j == k) for j in range(len(x)))) for k in range(len(x))]
        _, n = parts(x)
        slopes = [mp.diff(lambda v: f(v, mp.mpf(param)), v) if v else 0 for v in n]
        a = mp.fsum(m * s for m, s in zip(mass, slopes, strict=True))
        hess = [a * mp.exp(-v) * -mp.expm1(-v) * mp.diff(capped, u) ** 2 for u, v in zip(x, n, strict=True)]
        return loss(*x), grad, hess


def assert_equal(actual, expected, terms=0):
    """Within 1e-17 of itself or of the terms it is the sum of; what no float64 holds is 0."""
    with mp.workdps(60):
        bound = mp.mpf("1e-17") * max(abs(expected), mp.mpf(str(terms))) + mp.mpf("1e-300")
        assert abs(mp.mpf(str(actual)) - expected) <= bound


def check(row, eps=0.0, alpha=None, **options):
    """Every class as target; float32 logits, whose terms are the strictest, but with a softcap, which rounds z."""
    k = len(row)
    w = np.linspace(0.5, 1.5, k)
    wa = w if alpha is None else w * alpha
    logits = np.array([row], np.float64 if options.get("softcap") else np.float32)
    by_terms = options.get("softcap") or options.get("param", 0) < 0
    for target in range(k):
        got = reference.cross_entropy(
            logits, np.array([target]), weight=w, alpha=alpha, label_smoothing=eps, reduction="sum", **options
        )
        q = (1 - reference.WIDE(eps)) * np.eye(k)[target] + reference.WIDE(eps) / k
        loss, grad, hess = exact(logits[0].tolist(), wa * q, wa[target], **options)
        assert_equal(got.rows[0], loss, got.row_terms[0] if by_terms else 0)
        for j in range(k):
            assert_equal(got.grad[0, j], grad[j], got.terms[0, j])
            if options.get("param", 0) >= -1:
                assert_equal(got.hess[0, j], max(hess[j], 1e-16), got.hess_terms[0, j])


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("eps, z", [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-3), (0.25, 1e-2)])
def test_oracle_equals_mpmath(row, eps, z):
    check(row, eps, z_loss=z)


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize(
    "rule, param",
    [
        *(("focal", gamma) for gamma in (0.0, 0.5, 1.0, 2.0, 5.0)),
        *(("poly", epsilon) for epsilon in (-2.0, -1.0, 0.0, 1.0, 3.5)),
        *(("generalized", q) for q in (1e-3, 0.7, 1.0)),
    ],
)
def test_oracle_of_a_rule_equals_mpmath(row, rule, param):
    check(row, rule=rule, param=param)
    check(row, 0.3, rule=rule, param=param, z_loss=1e-2, alpha=np.linspace(2, 0, len(row)))


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("temperature, softcap", [(0.5, None), (0.07, None), (3.7, 30.0), (1.0, 2.0), (0.07, 500.0)])
@pytest.mark.parametrize(
    "options",
    [{}, {"eps": 0.1, "z_loss": 1e-2}, {"rule": "focal", "param": 1.5, "eps": 0.1}],
    ids=["plain", "smoothed", "focal"],
)
def test_oracle_with_temperature_and_softcap_equals_mpmath(row, temperature, softcap, options):
    check(row, temperature=temperature, softcap=softcap, **options)


@pytest.mark.parametrize("rule, param", [("cross_entropy", 0.0), ("focal", 2.0), ("generalized", 0.7)])
def test_oracle_of_class_probabilities_equals_mpmath(rule, param):
    row, q = [2.0, -1.0, 0.5], np.array([0.25, 0.5, 0.25])
    got = reference.cross_entropy(np.float32([row]), q[None], reduction="sum", rule=rule, param=param, temperature=2.0)
    loss, grad, _ = exact(row, q, 1, rule, param, temperature=2.0)
    assert_equal(got.rows[0], loss)
    for j in range(3):
        assert_equal(got.grad[0, j], grad[j], got.terms[0, j])


def test_terms_are_at_least_what_they_measure():
    """A tolerance relative to them is never tighter than one relative to the result."""
    x = np.linspace(-5, 5, 12).reshape(3, 4)
    for rule, param in (("cross_entropy", 0.0), ("focal", 0.5), ("poly", -1.0), ("generalized", 0.3)):
        for softcap in (None, 3.0):
            got = reference.cross_entropy(
                x, np.arange(3), label_smoothing=0.2, rule=rule, param=param, softcap=softcap, reduction="none"
            )
            assert (got.row_terms >= np.abs(got.rows)).all()
            assert (got.hess_terms >= got.hess * 0.999).all()
