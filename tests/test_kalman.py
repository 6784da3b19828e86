import numpy as np
import pytest
import torch
from contracts import RuleContract
from torch import nn

from convexlearn.errors import DomainError, MissingParameterError, OptionError, ShapeError
from convexlearn.networks import mlp
from convexlearn.rules.base import Role
from convexlearn.rules.kalman import KalmanFilter

n, m, p, T = 3, 2, 2, 6
NAN = float("nan")


def draw(seed=0):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(n, n))
    A *= 0.95 / np.abs(np.linalg.eigvals(A)).max()
    B, C = rng.normal(size=(n, m)), rng.normal(size=(p, n))
    V, W = rng.normal(size=(n, n)), rng.normal(size=(p, p))
    return A, B, C, V @ V.T + 0.1 * np.eye(n), W @ W.T + 0.1 * np.eye(p)


def build(**options):
    return KalmanFilter(*draw(), **options)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_gaps(x):
    x = x.clone()
    x[0, 2], x[1, 0, 1], x[1, 4], x[2, 3, 0] = NAN, NAN, NAN, NAN
    return x


class SmallGain(nn.Module):
    """A gain network with memory, which sees all signals."""

    def __init__(self):
        super().__init__()
        self.network = mlp(2 * p + n + p, n * p, hidden=(5,), seed=0).double()

    def forward(self, signals, memory):
        memory = torch.zeros_like(signals.observation) if memory is None else memory
        change = signals.observation - signals.observation_before
        seen = [change, signals.observation - signals.predicted, signals.mean - signals.prior_before, memory]
        dtype = signals.prior.dtype
        L = self.network(torch.cat(seen, -1).double()).to(dtype).reshape(-1, n, p)
        return 0.1 * L, memory + change


class TestRiccatiGain(RuleContract):
    @pytest.fixture
    def rule(self):
        return build()

    @pytest.fixture
    def context(self):
        return randn(1, 4, T, p), randn(2, 4, T, m)


class TestMissing(TestRiccatiGain):
    @pytest.fixture
    def context(self):
        return with_gaps(randn(1, 4, T, p))


class TestConstantGain(TestRiccatiGain):
    @pytest.fixture
    def rule(self):
        return build(gain=0.3 * draw()[2].T)

    @pytest.fixture
    def context(self):
        return with_gaps(randn(1, 4, T, p)), randn(2, 4, T, m)


class TestGainNetwork(TestConstantGain):
    @pytest.fixture
    def rule(self):
        return build(gain=SmallGain())


class TestFeatures(TestMissing):
    @pytest.fixture
    def rule(self):
        return build(features=nn.Sequential(nn.Linear(p, p), nn.Tanh()).double())

    def test_dtype_follows_input(self, context):
        rule = build(features=nn.Tanh())
        assert rule(context.float()).dtype == torch.float32


def dense_posterior(x, inputs, state, covariance):
    """Means of z_t given the entries of x_0 .. x_t that are there, from the joint Gaussian of everything."""
    A, B, C, V, W = draw()
    T = len(x)
    mean, F = [state], [np.eye(n, n + T * n)]  # z_t = mean_t + F_t (z_0 - state, v_0, v_1, ...)
    for t in range(T - 1):
        mean.append(A @ mean[-1] + B @ inputs[t])
        step = A @ F[-1]
        step[:, (t + 1) * n : (t + 2) * n] += np.eye(n)
        F.append(step)
    prior = np.kron(np.diag([0.0] + [1.0] * T), V)
    prior[:n, :n] = covariance
    out, covariances = [], []
    for t in range(T):
        rows = [(k, i) for k in range(t + 1) for i in range(p) if not np.isnan(x[k, i])]
        z = F[t] @ prior @ F[t].T
        if not rows:
            out.append(mean[t])
            covariances.append(z)
            continue
        H = np.stack([C[i] @ F[k] for k, i in rows])
        noise = np.array([[W[i, j] * (k == r) for r, j in rows] for k, i in rows])
        residual = np.array([x[k, i] - C[i] @ mean[k] for k, i in rows])
        gain = F[t] @ prior @ H.T @ np.linalg.inv(H @ prior @ H.T + noise)
        out.append(mean[t] + gain @ residual)
        covariances.append(z - gain @ H @ prior @ F[t].T)
    return np.stack(out), np.stack(covariances)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_equals_the_dense_posterior(gaps, per_sample):
    x, inputs = randn(1, 3, T, p), randn(2, 3, T - 1, m)
    x = with_gaps(x) if gaps else x
    start = randn(3, 3, n) if per_sample else randn(3, n)
    root = randn(4, 3, n, n) if per_sample else randn(4, n, n)
    P0 = root @ root.mT
    moments = build().moments(x, inputs, state=start, covariance=P0)
    means = build()(x, inputs, state=start, covariance=P0)
    for i in range(3):
        row = i if per_sample else slice(None)
        mean, covariance = dense_posterior(x[i].numpy(), inputs[i].numpy(), start[row].numpy(), P0[row].numpy())
        np.testing.assert_allclose(means[i].detach().numpy(), mean, rtol=0, atol=1e-10)
        posterior = moments.gains.posterior.expand(3, T, n, n)[i].detach().numpy()
        np.testing.assert_allclose(posterior, covariance, rtol=0, atol=1e-10)
    torch.testing.assert_close(moments.mean, means, rtol=1e-14, atol=1e-14)


def test_an_all_missing_step_is_pure_prediction():
    x, inputs = randn(1, 2, T, p), randn(2, 2, T, m)
    x[:, 3] = NAN
    A, B = (torch.tensor(M) for M in draw()[:2])
    for rule in (build(), build(gain=0.3 * draw()[2].T), build(gain=SmallGain())):
        mean = rule(x, inputs).detach()
        torch.testing.assert_close(mean[:, 3], mean[:, 2] @ A.mT + inputs[:, 2] @ B.mT, rtol=0, atol=1e-14)
    x[:, 0] = NAN
    state = randn(5, n)
    torch.testing.assert_close(build()(x, state=state)[:, 0].detach(), state.expand(2, n), rtol=0, atol=1e-14)


def test_gradients_against_central_differences():
    x, inputs = with_gaps(randn(1, 3, T, p)), randn(2, 3, T, m)
    target = randn(3, 3, T, n)
    P0 = torch.eye(n, dtype=torch.float64)
    rule = build(features=nn.Linear(p, p).double())

    def loss():
        return (rule(x, inputs, covariance=P0) - target).square().mean()

    rule.zero_grad()
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
            assert abs(parameter.grad[index].item() - difference) < 1e-6 * max(1.0, abs(difference))


def test_only_the_ratio_of_the_covariances_matters():
    x, rule, scaled = randn(1, 2, T, p), build(), build()
    scaled.V, scaled.W = 7 * rule.V, 7 * rule.W
    torch.testing.assert_close(rule(x), scaled(x), rtol=1e-9, atol=1e-10)


def test_long_sequences_stay_stationary_and_positive():
    x = randn(1, 1, 400, p)
    x[0, 50] = NAN
    moments = build().moments(x, covariance=10 * torch.eye(n).double())
    torch.testing.assert_close(moments.mean[:, -1], build()(x[:, 51:])[:, -1], rtol=1e-10, atol=1e-10)
    assert torch.linalg.eigvalsh(moments.gains.posterior).min() > 0


def test_roles_and_counts():
    assert build().count_parameters()[Role.OBJECTIVE] == 6 + 3
    assert build(gain=np.zeros((n, p))).learned == ("gain",)
    counts = build(gain=SmallGain()).count_parameters()
    assert counts[Role.OBJECTIVE] == 0
    assert counts[Role.NETWORK] == sum(w.numel() for w in SmallGain().parameters())
    assert build().freeze("W").learned == ("V",)


def test_mistakes_are_named():
    A, B, C, V, W = draw()
    x = randn(1, 2, T, p)
    with pytest.raises(ShapeError, match=r"takes A \(n, n\), B \(n, m\) and C \(p, n\), got"):
        KalmanFilter(A, B, C.T, V, W)
    with pytest.raises(DomainError, match="parameter 'W' must be positive semidefinite"):
        KalmanFilter(A, B, C, V, -W)
    with pytest.raises(MissingParameterError, match=r"V \(3, 3\) is needed for the Riccati gain"):
        KalmanFilter(A, B, C)
    with pytest.raises(ShapeError, match=r"x must have 2 entries per time"):
        build()(x[:, :, :1])
    with pytest.raises(ShapeError, match=rf"x must have shape \(B, T, 2\) with T > 0, got \({T}, 2\)"):
        build()(x[0])
    with pytest.raises(ShapeError, match="inputs must have shape"):
        build()(x, randn(1, 2, T, m + 1))
    inputs = randn(1, 2, T, m)
    inputs[0, 1, 0] = NAN
    with pytest.raises(DomainError, match=r"inputs is NaN or infinite at index \(0, 1, 0\)"):
        build()(x, inputs)
    x[1, 2, 0] = torch.inf
    with pytest.raises(DomainError, match="x is infinite in batch element 1 at time 2"):
        build()(x)
    with pytest.raises(OptionError, match="inputs were given, but B is None"):
        KalmanFilter(A, None, C, V, W)(randn(1, 2, T, p), randn(1, 2, T, m))
    with pytest.raises(ShapeError, match="state must have shape"):
        build()(randn(1, 2, T, p), state=torch.zeros(3, n))
    with pytest.raises(ShapeError, match="covariance must be"):
        build()(randn(1, 2, T, p), covariance=torch.zeros(n))
    with pytest.raises(DomainError, match="not detectable"):
        KalmanFilter(1.1 * np.eye(n), B, 0 * C, V, W)(randn(1, 2, T, p))
    with pytest.raises(OptionError, match="full column rank"):
        build(gain=np.zeros((n, p))).moments(randn(1, 2, T, p))
