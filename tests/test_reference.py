"""The oracle against mpmath, at 60 digits."""

import mpmath as mp
import numpy as np
import pytest

import reference

ROWS = [[20.0, 0.0, 0.0], [1.5, -2.25, 0.75], [700.0, -700.0, 699.5], [0.0], [1e4, 1e4 + 1, 1e4 - 30]]


def exact(row, target, weight, eps, z):
    """(loss, gradient) of a row with class weights, uniform smoothing and z-loss."""
    with mp.workdps(60):
        x, w, k = [mp.mpf(v) for v in row], [mp.mpf(v) for v in weight], len(row)
        lse = mp.log(sum(mp.exp(v) for v in x))
        q = [(1 - mp.mpf(eps)) * (j == target) + mp.mpf(eps) / k for j in range(k)]
        loss = sum(w[j] * q[j] * (lse - x[j]) for j in range(k)) + w[target] * mp.mpf(z) * lse**2
        a = sum(w[j] * q[j] for j in range(k)) + 2 * mp.mpf(z) * w[target] * lse
        grad = [a * mp.exp(x[j] - lse) - w[j] * q[j] for j in range(k)]
        return loss, grad


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("eps, z", [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-3), (0.25, 1e-2)])
def test_oracle_equals_mpmath(row, eps, z):
    weight = np.linspace(0.5, 1.5, len(row))
    for target in range(len(row)):
        loss, grad = exact(row, target, weight, eps, z)
        got = reference.cross_entropy(
            np.array([row]), np.array([target]), weight=weight, label_smoothing=eps, z_loss=z, reduction="sum"
        )
        assert abs(mp.mpf(str(got.rows[0])) - loss) <= mp.mpf("1e-16") * abs(loss) + mp.mpf("1e-300")
        for j, g in enumerate(grad):
            term = max(abs(g), mp.mpf(float(got.terms[0, j])))
            assert abs(mp.mpf(str(got.grad[0, j])) - g) <= mp.mpf("1e-16") * term + mp.mpf("1e-300")
