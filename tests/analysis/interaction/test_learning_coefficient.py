"""The sampled learning coefficient against theory and against the count of free directions."""

import numpy as np
import pytest
import torch
from torch import nn

from mechatlas.analysis.interaction import learning_coefficient as sampling
from mechatlas.analysis.interaction.learning_coefficient import learning_coefficient
from mechatlas.base import NonFiniteError

from .test_degeneracy import ledger, plant, samples, stack


def curvatures(network, x):
    """Eigenvalues of the Hessian of the behavioral loss, all of them."""
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def outputs(values):
        return torch.func.functional_call(network, values, (x,)).flatten()

    jacobian = torch.func.jacrev(outputs)(parameters)
    rows = torch.cat([j.flatten(1) for j in jacobian.values()], dim=1)
    return np.linalg.eigvalsh((2 * rows.T @ rows / len(x)).numpy())


def quadratic_coefficient(curvatures, *, n_beta, gamma=1.0):
    """Learning coefficient of an exactly quadratic loss."""
    strength = n_beta * curvatures.clip(min=0)
    return float((strength / (strength + gamma)).sum() / 2)


def test_a_linear_network_has_the_coefficient_of_a_quadratic_loss():
    torch.manual_seed(0)
    network = nn.Linear(4, 2).double()
    x = samples(4, 0, n=100)
    found = learning_coefficient(network, x, n_beta=100.0, samples=100, chains=2)
    expected = quadratic_coefficient(curvatures(network, x), n_beta=100.0)
    assert found.value == pytest.approx(expected, rel=0.1)
    assert found.resolution == pytest.approx(found.value / 100)
    assert found.r_hat < 1.05
    assert found == learning_coefficient(network, x, n_beta=100.0, samples=100, chains=2)


@pytest.mark.parametrize(
    "what",
    [
        "dead units",
        "duplicated units",
        pytest.param("nothing", marks=pytest.mark.slow),
        pytest.param("null gradients", marks=pytest.mark.slow),
    ],
)
def test_sampling_finds_what_theory_says_at_a_fine_resolution(what):
    x = samples(4, 1, n=150)
    network = plant(stack([4, 6, 2], 1), x, what, 1)
    found = learning_coefficient(network, x, n_beta=1e8, gamma=1e4, samples=60, burn_in=30)
    expected = quadratic_coefficient(curvatures(network, x), n_beta=1e8, gamma=1e4)
    counted = ledger(network, x)
    assert found.value == pytest.approx(expected, rel=0.06)
    # A direction that the ledger counts may be too weak for the resolution, never the reverse.
    assert expected <= (counted.n_parameters - counted.n_free) / 2 + 1e-6
    assert found.effective_parameters > 0.9 * (counted.n_parameters - counted.n_free)
    assert found.r_hat < 1.1


def test_many_parameters_are_sampled_with_the_diagonal_alone(monkeypatch):
    monkeypatch.setattr(sampling, "MAX_HESSIAN_WIDTH", 3)
    torch.manual_seed(0)
    network = nn.Linear(4, 2).double()
    x = samples(4, 0, n=100)
    found = learning_coefficient(network, x, n_beta=100.0, samples=100, chains=2)
    expected = quadratic_coefficient(curvatures(network, x), n_beta=100.0)
    assert found.value == pytest.approx(expected, rel=0.1)


def test_outputs_that_are_not_finite_are_refused():
    network = nn.Linear(3, 2).double()
    with torch.no_grad():
        network.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="not all finite"):
        learning_coefficient(network, samples(3, 0, n=20), n_beta=100.0)
