import math

import numpy as np
import pytest
import torch
from contracts import RuleContract
from torch import nn

from convexlearn.errors import MissingParameterError, ShapeError
from convexlearn.gain_networks import RecurrentGain
from convexlearn.rules.extended_kalman import ExtendedKalmanFilter
from convexlearn.rules.kalman import KalmanFilter
from convexlearn.simulate.plants import Lorenz

T = 5
LORENZ = Lorenz(substeps=1)
A = torch.tensor([[0.9, 0.3], [-0.2, 0.8]], dtype=torch.float64)
B = torch.tensor([[1.0], [0.5]], dtype=torch.float64)
C = torch.tensor([[1.0, 0.5], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
V = 0.3 * torch.eye(2, dtype=torch.float64)
W = torch.diag(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
P0 = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
NAN = float("nan")


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_gaps(x):
    x = x.clone()
    x[0, 2], x[1, 0, 1], x[1, 4], x[2, 3, 0] = NAN, NAN, NAN, NAN
    return x


def swing(z, s=None):
    """A pendulum's Euler step."""
    push = 0.0 if s is None else s[:, 0]
    return torch.stack([z[:, 0] + 0.1 * z[:, 1], z[:, 1] - 0.5 * torch.sin(z[:, 0]) + push], -1)


def bob(z):
    """Where the pendulum is seen."""
    return torch.stack([torch.sin(z[:, 0]), torch.cos(z[:, 0]), z[:, 1]], -1)


def linear(z, s=None):
    return z @ A.to(z.dtype).mT + (0.0 if s is None else s @ B.to(z.dtype).mT)


def seen(z):
    return z @ C.to(z.dtype).mT


def flow(z):
    return LORENZ(z, None, 0.0)


class Shift(nn.Module):
    """A correction in parallel that remembers how often it was called."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3, 2), 0.1, dtype=torch.float64))

    def forward(self, signals, mean, memory):
        count = 1.0 if memory is None else memory + 1.0
        change = (signals.observation - signals.predicted).double() @ self.weight
        return count * change.to(mean.dtype), count


class TestRiccatiGain(RuleContract):
    tolerance = 1e-11

    @pytest.fixture
    def rule(self):
        return ExtendedKalmanFilter(swing, bob, V, W)

    @pytest.fixture
    def context(self):
        return with_gaps(randn(1, 4, T, 3)), randn(2, 4, T, 1)


class TestConstantGain(TestRiccatiGain):
    @pytest.fixture
    def rule(self):
        return ExtendedKalmanFilter(swing, bob, gain=0.2 * torch.ones(2, 3).double())


class TestKalmanNet(TestRiccatiGain):
    tolerance = 1e-5  # the network is float32

    @pytest.fixture
    def rule(self):
        return ExtendedKalmanFilter(swing, bob, gain=RecurrentGain(2, 3))


class TestCorrection(TestRiccatiGain):
    @pytest.fixture
    def rule(self):
        return ExtendedKalmanFilter(swing, bob, V, W, correction=Shift())


class TestLearnedModel(TestRiccatiGain):
    @pytest.fixture
    def rule(self):
        model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        return ExtendedKalmanFilter(model, bob, V, W)

    @pytest.fixture
    def context(self):
        return randn(1, 4, T, 3)

    def test_dtype_follows_input(self, rule, context):
        """The model itself is float64 here."""


@pytest.mark.parametrize("slot", ["riccati", "constant", "network", "correction"])
def test_on_a_linear_model_it_is_the_kalman_filter(slot):
    x, s = with_gaps(randn(1, 3, T, 3)), randn(2, 3, T, 1)
    options = {
        "riccati": {},
        "constant": {"gain": 0.2 * C.mT},
        "network": {"gain": RecurrentGain(2, 3)},
        "correction": {"correction": Shift()},
    }[slot]
    own = ExtendedKalmanFilter(linear, seen, V, W, **options)
    known = KalmanFilter(A, B, C, V, W, **options)
    given = {"state": randn(3, 3, 2), "covariance": P0}
    tolerance = 1e-5 if slot == "network" else 1e-12
    torch.testing.assert_close(own(x, s, **given), known(x, s, **given), rtol=tolerance, atol=tolerance)
    if slot == "riccati":
        for a, b in zip(own.moments(x, s, **given).gains, known.moments(x, s, **given).gains):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_equals_the_textbook_recursion_with_jacobians_by_hand():
    x = randn(1, T, 3).numpy()
    z, P, expected = np.zeros(2), P0.numpy(), []
    for t in range(T):
        h = np.array([math.sin(z[0]), math.cos(z[0]), z[1]])
        H = np.array([[math.cos(z[0]), 0.0], [-math.sin(z[0]), 0.0], [0.0, 1.0]])
        K = P @ H.T @ np.linalg.inv(H @ P @ H.T + W.numpy())
        z, P = z + K @ (x[t] - h), (np.eye(2) - K @ H) @ P
        expected.append(z)
        F = np.array([[1.0, 0.1], [-0.5 * math.cos(z[0]), 1.0]])
        z, P = np.array([z[0] + 0.1 * z[1], z[1] - 0.5 * math.sin(z[0])]), F @ P @ F.T + V.numpy()
    found = ExtendedKalmanFilter(swing, bob, V, W)(torch.tensor(x)[None], covariance=P0)[0]
    np.testing.assert_allclose(found.detach().numpy(), np.stack(expected), rtol=1e-12, atol=1e-12)


def test_jacobians_of_the_lorenz_flow():
    z = 10 * randn(0, 4, 3)
    eye = torch.eye(3, dtype=torch.float64)
    value, F = ExtendedKalmanFilter(flow, torch.clone, eye, eye).linear_transition(z, None)
    torch.testing.assert_close(value, flow(z))
    for i in range(4):
        exact = torch.autograd.functional.jacobian(lambda z: flow(z[None])[0], z[i])
        torch.testing.assert_close(F[i], exact, rtol=1e-12, atol=1e-12)


def test_gradients_against_central_differences():
    x, target = with_gaps(randn(1, 3, T, 3)), randn(2, 3, T, 2)
    rule = ExtendedKalmanFilter(swing, bob, V, W, correction=Shift())

    def loss():
        return (rule(x, covariance=P0) - target).square().mean()

    loss().backward()
    for parameter in rule.parameters():
        for index in np.ndindex(*parameter.shape):
            with torch.no_grad():
                kept, values = parameter[index].clone(), []
                for step in (1e-5, -1e-5):
                    parameter[index] = kept + step
                    values.append(loss().item())
                parameter[index] = kept
            difference = (values[0] - values[1]) / 2e-5
            assert abs(parameter.grad[index].item() - difference) < 1e-7 * max(1.0, abs(difference))


def test_a_model_that_needs_inputs_gets_them_at_every_step():
    def driven(z, s):
        return linear(z, s)

    x, s = randn(1, 3, T, 3), randn(2, 3, T - 1, 1)
    own = ExtendedKalmanFilter(driven, seen, V, W)(x, s, covariance=P0)
    torch.testing.assert_close(own, KalmanFilter(A, B, C, V, W)(x, s, covariance=P0), rtol=1e-12, atol=1e-12)


def test_mistakes_are_named():
    with pytest.raises(MissingParameterError, match=r"V \(n, n\) and W \(p, p\) are needed"):
        ExtendedKalmanFilter(swing, bob, V)
    with pytest.raises(TypeError, match=r"h must be a function or module, got a torch\.float64 tensor"):
        ExtendedKalmanFilter(swing, C, V, W)
    with pytest.raises(ShapeError, match=r"h\(z\) must be \(2, 3\) for z \(2, 2\), got \(2, 2\)"):
        ExtendedKalmanFilter(swing, torch.clone, V, W, gain=0.1 * C.mT)(randn(1, 2, T, 3))
    with pytest.raises(ShapeError, match="x must have 3 entries per time"):
        ExtendedKalmanFilter(swing, bob, V, W)(randn(1, 2, T, 2))
