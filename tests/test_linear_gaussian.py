import numpy as np
import pytest
import torch

from convexlearn.errors import DomainError, OptionError, ShapeError
from convexlearn.riccati import dare, lqr_gain
from convexlearn.simulate.closed_loop import ClosedLoop
from convexlearn.simulate.linear_gaussian import LinearGaussian, random_linear

EYE = torch.eye(4, dtype=torch.float64)
A, B = random_linear(0, 4, 2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_instances_are_those_of_numpys_legacy_seed():
    state = np.random.RandomState(1)
    A = state.randn(8, 8)
    A, B = A / np.abs(np.linalg.eigvals(A)).max(), state.randn(8, 2)
    for ours, theirs in zip(random_linear(1, 8, 2), (A, B)):
        np.testing.assert_array_equal(ours.numpy(), theirs)


def test_published_optimum_of_lqr():
    """tr(P V) = 1.80312 (Agrawal and others, LQR with seed 0)."""
    A, B = random_linear(0, 4, 2)
    P = dare(A, B, EYE, torch.eye(2, dtype=torch.float64))
    assert abs(0.25 * torch.trace(P).item() - 1.80312) < 5e-6


def test_linear_noise_has_its_covariances():
    C, W = EYE[:2], torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    V = torch.diag(torch.tensor([1.0, 0.0, 2.0, 3.0], dtype=torch.float64))  # singular
    plant = LinearGaussian(*random_linear(0, 4, 2), V=V, C=C, W=W, start=4 * V)
    v, w = plant.noise(200000, 0, generator())
    for sample, covariance in ((v, V), (w, W), (plant.initial(200000, generator(1)), 4 * V)):
        torch.testing.assert_close(sample.mT @ sample / len(sample), covariance, rtol=0.02, atol=0.03)
    z, u = plant.initial(3, generator()), torch.ones(3, 2, dtype=torch.float64)
    noise = plant.noise(3, 0, generator())
    torch.testing.assert_close(plant(z, u, noise), z @ plant.A.mT + u @ plant.B.mT + noise.process)
    torch.testing.assert_close(plant.observe(z, 0, noise), z[:, :2] + noise.observation)


def test_box_clips_the_input():
    plant = LinearGaussian(*random_linear(1, 8, 2), V=torch.eye(8).double() / 4, limit=0.1)
    z, u = torch.zeros(1, 8, dtype=torch.float64), torch.tensor([[3.0, -0.05]], dtype=torch.float64)
    expected = torch.tensor([[0.1, -0.05]], dtype=torch.float64) @ plant.B.mT
    torch.testing.assert_close(plant(z, u, torch.zeros_like(z)), expected)


def test_clipped_lqr_on_the_box_costs_the_recomputed_figure():
    """16.75 over 100 steps, from a large sample; 1500 rollouts here."""
    A, B = random_linear(1, 8, 2)
    eye = torch.eye(8, dtype=torch.float64)
    plant = LinearGaussian(A, B, V=eye / 4, start=eye / 4, limit=0.1)
    K = lqr_gain(A, B, eye, torch.eye(2, dtype=torch.float64))
    loop = ClosedLoop(plant, 100, initial=plant.initial, noise=plant.noise, stage_cost=plant.stage_cost)
    with torch.no_grad():
        cost = loop(lambda x: (-x @ K.mT).clamp(-0.1, 0.1), 1500, generator()).cost.mean(1)
    assert abs(cost.mean() - 16.75) < 3 * cost.std() / len(cost) ** 0.5 + 0.05


def test_arrays_and_lists_are_matrices_too():
    """Also of integers; without another floating type they are float64."""
    as_arrays = LinearGaussian(A.numpy(), B.tolist(), V=np.eye(4, dtype=int))
    assert torch.equal(as_arrays.A, A)
    assert torch.equal(as_arrays.B, B)
    assert as_arrays.V.dtype == torch.float64
    assert LinearGaussian(A.float(), B.float(), V=EYE.float()).initial(2, generator()).dtype == torch.float32


def test_an_asymmetric_weight_counts_by_its_symmetric_part():
    skew = torch.zeros_like(EYE)
    skew[0, 1], skew[1, 0] = 0.5, -0.5
    plain, skewed = LinearGaussian(A, B, V=EYE, Q=EYE), LinearGaussian(A, B, V=EYE + skew, Q=EYE + skew)
    z, u = plain.initial(5, generator()), torch.zeros(5, 2, dtype=torch.float64)
    torch.testing.assert_close(skewed.stage_cost(z, u), plain.stage_cost(z, u), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(skewed.noise(5, 0, generator()), plain.noise(5, 0, generator()))


def with_entry(value):
    matrix = EYE.clone()
    matrix[0, 2] = value
    return matrix


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"V": EYE[:2, :2]}, ShapeError, r"V must have shape \(4, 4\), got \(2, 2\)"),
        ({"B": B[:, 0]}, ShapeError, r"B must be a matrix, got shape \(4,\)"),
        ({"A": with_entry(torch.nan)}, DomainError, r"A has the entry nan at \(0, 2\)"),
        ({"Q": with_entry(torch.inf)}, DomainError, r"Q has the entry inf at \(0, 2\)"),
        ({"C": EYE, "W": -EYE}, DomainError, "W must be positive semidefinite, but it has the eigenvalue -1"),
        ({"Q": with_entry(4.0)}, DomainError, "Q must be positive semidefinite, but it has the eigenvalue -1"),
        ({"R": -EYE[:2, :2]}, DomainError, "R must be positive semidefinite, .* clip its eigenvalues at zero"),
        ({"start": -EYE}, DomainError, "start must be positive semidefinite"),
        ({"W": EYE}, OptionError, "W is observation noise; give C too"),
        ({"limit": -0.1}, OptionError, "limit must be a number above 0, got -0.1"),
    ],
)
def test_mistakes_are_named(given, error, message):
    with pytest.raises(error, match=f"LinearGaussian: {message}"):
        LinearGaussian(**{"A": A, "B": B, "V": EYE} | given)


def test_an_input_of_the_wrong_size_is_named():
    plant = LinearGaussian(A, B, V=EYE)
    with pytest.raises(ShapeError, match=r"u must have shape \(B, 2\), got \(3, 4\)"):
        plant(EYE[:3], EYE[:3], 0 * EYE[:3])
