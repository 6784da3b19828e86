import numpy as np
import pytest
import torch
from contracts import RuleContract

from convexlearn.errors import DomainError, OptionError, ShapeError
from convexlearn.objectives import known_squared_error
from convexlearn.optimizers import ProximalGradient, ProximalTerm
from convexlearn.rules.kalman import KalmanFilter
from convexlearn.rules.smoother import KalmanSmoother
from convexlearn.simulate.pairs import Pairs
from convexlearn.tune import tune

n, p, T = 3, 2, 7
NAN = float("nan")


def draw(seed=0):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(n, n))
    A *= 0.95 / np.abs(np.linalg.eigvals(A)).max()
    C, V, W = rng.normal(size=(p, n)), rng.normal(size=(n, n)), rng.normal(size=(p, p))
    return A, C, V @ V.T + 0.1 * np.eye(n), W @ W.T + 0.1 * np.eye(p)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_gaps(x):
    x = x.clone()
    x[0, 2], x[1, 0, 1], x[1, 4], x[2, 3, 0], x[2, -1] = NAN, NAN, NAN, NAN, NAN
    return x


class TestSmoother(RuleContract):
    @pytest.fixture
    def rule(self):
        return KalmanSmoother(*draw())

    @pytest.fixture
    def context(self):
        return with_gaps(randn(1, 4, T, p))


class TestWithPrior(TestSmoother):
    @pytest.fixture
    def rule(self):
        return KalmanSmoother(*draw(), state=np.ones(n), covariance=np.eye(n), decision="observation")


def rauch_tung_striebel(x, state, covariance):
    """Backward recursion over the filter's moments, as in the textbook."""
    A, C, V, W = draw()
    moments = KalmanFilter(A, None, C, V, W).moments(
        x[None], state=torch.tensor(state), covariance=torch.tensor(covariance)
    )
    mean = moments.mean[0].detach().numpy()
    posterior, prior = (M[0].detach().numpy() for M in (moments.gains.posterior, moments.gains.prior))
    smoothed = mean.copy()
    for t in range(len(x) - 2, -1, -1):
        J = posterior[t] @ A.T @ np.linalg.inv(prior[t + 1])
        smoothed[t] = mean[t] + J @ (smoothed[t + 1] - A @ mean[t])
    return smoothed


@pytest.mark.parametrize("length", [1, 2, T, 200])
def test_equals_rauch_tung_striebel(length):
    x, state, covariance = randn(1, 3, length, p), np.array([1.0, -2.0, 0.5]), 2 * np.eye(n)
    if length >= T:
        x = with_gaps(x)
    z = KalmanSmoother(*draw(), state=state, covariance=covariance)(x).detach()
    for i in range(3):
        expected = rauch_tung_striebel(x[i], state, covariance)
        np.testing.assert_allclose(z[i].numpy(), expected, rtol=0, atol=1e-8)


def test_without_a_prior_it_is_the_least_squares_problem():
    """Missing entries as variables, everything in one dense least-squares problem (Barratt and Boyd, Eq. 2)."""
    A, C, V, W = draw()
    x = with_gaps(randn(1, 3, T, p))
    z = KalmanSmoother(A, C, V, W)(x).detach().numpy()
    dynamics = np.kron(np.eye(T - 1, T, 1), np.eye(n)) - np.kron(np.eye(T - 1, T), A)
    root_v, root_w = (np.linalg.inv(np.linalg.cholesky(M)) for M in (V, W))
    for i in range(3):
        known = ~np.isnan(x[i].numpy().ravel())
        free = np.eye(T * p)[:, ~known]  # x = known part + free missing entries
        top = np.hstack([np.kron(np.eye(T - 1), root_v) @ dynamics, np.zeros(((T - 1) * n, free.shape[1]))])
        big = np.kron(np.eye(T), root_w)
        bottom = np.hstack([-big @ np.kron(np.eye(T), C), big @ free])
        right = np.concatenate([np.zeros((T - 1) * n), -big @ np.nan_to_num(x[i].numpy().ravel())])
        solution = np.linalg.lstsq(np.vstack([top, bottom]), right, rcond=None)[0]
        np.testing.assert_allclose(z[i], solution[: T * n].reshape(T, n), rtol=0, atol=1e-9)
        filled = KalmanSmoother(A, C, V, W, decision="observation")(x[i : i + 1]).detach().numpy()[0]
        np.testing.assert_allclose(filled, z[i] @ C.T, rtol=0, atol=1e-12)


def test_missing_steps_at_the_end_are_pure_prediction():
    x = randn(1, 2, T, p)
    x[:, 4:] = NAN
    rule = KalmanSmoother(*draw(), covariance=np.eye(n))
    z, A = rule(x).detach(), rule.A.detach()
    for t in (4, 5, 6):
        torch.testing.assert_close(z[:, t], z[:, t - 1] @ A.mT, rtol=0, atol=1e-10)
    torch.testing.assert_close(z[:, :4], rule(x[:, :4]).detach(), rtol=0, atol=1e-10)


def test_gradients_against_central_differences():
    x, target = with_gaps(randn(1, 3, T, p)), randn(3, 3, T, n)
    rule = KalmanSmoother(*draw(), covariance=np.eye(n)).learn()

    def loss():
        return (rule(x) - target).square().mean()

    loss().backward()
    assert set(rule.free) == {"A", "C", "V", "W", "state", "covariance"}
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


def test_proximal_gradient_lowers_the_error_on_hidden_entries():
    """A penalty keeps A near its start (Barratt and Boyd, section 6); the test entries were never seen."""
    A, C, V, W = draw()
    generator = torch.Generator().manual_seed(0)
    z, rows = torch.zeros(6, n, dtype=torch.float64), []
    for _ in range(60):
        noise = torch.randn(6, n + p, generator=generator, dtype=torch.float64)
        z = z @ torch.tensor(A.T) + noise[:, :n] @ torch.tensor(np.linalg.cholesky(V).T)
        rows.append(z @ torch.tensor(C.T) + noise[:, n:] @ torch.tensor(np.linalg.cholesky(W).T))
    y = torch.stack(rows, 1)
    lot = torch.rand(y.shape, generator=generator)
    hidden, test = lot < 0.2, lot > 0.8
    x = torch.where(hidden | test, NAN, y)
    pairs = {name: Pairs(x, torch.where(mask, y, NAN)) for name, mask in (("fit", hidden), ("test", test))}
    rule = KalmanSmoother(
        0.3 * np.eye(n), C, np.eye(n), 5 * np.eye(p), covariance=9 * np.eye(n), decision="observation"
    )
    start = rule.A.detach().clone()
    near = ProximalTerm(
        lambda M: 1e-3 * (M - start).square().sum(), lambda M, t: (M + 2e-3 * t * start) / (1 + 2e-3 * t)
    )
    before = known_squared_error(pairs["test"](rule)).mean().item()
    history = tune(
        rule, pairs["fit"], known_squared_error, steps=25, learning_rate=1.0, clip=None, progress=False,
        optimizer=lambda groups: ProximalGradient(groups, terms={rule.free["A"]: near}),
    )  # fmt: skip
    losses = history.column("loss")
    assert losses[-1] < losses[0]
    assert known_squared_error(pairs["test"](rule)).mean().item() < 0.9 * before


def test_mistakes_are_named():
    A, C, V, W = draw()
    x = randn(1, 2, T, p)
    with pytest.raises(OptionError, match="decision must be one of 'observation', 'state'"):
        KalmanSmoother(A, C, V, W, decision="input")
    with pytest.raises(OptionError, match="give its covariance too"):
        KalmanSmoother(A, C, V, W, state=np.zeros(n))
    with pytest.raises(DomainError, match="parameter 'W' must be positive semidefinite"):
        KalmanSmoother(A, C, V, -W)
    with pytest.raises(DomainError, match="covariance must be positive definite, but it has the eigenvalue"):
        KalmanSmoother(A, C, V, W, covariance=np.diag([1.0, 1.0, 0.0]))(x)
    with pytest.raises(ShapeError, match=r"x must have shape \(B, T, 2\) with T > 0"):
        KalmanSmoother(A, C, V, W)(x[:, :, :1])
    with pytest.raises(DomainError, match="batch element 1 is not positive definite at block"):
        KalmanSmoother(A, C, V, W)(torch.where(torch.arange(2)[:, None, None] == 1, NAN, x))
    x[1, 2, 0] = torch.inf
    with pytest.raises(DomainError, match="x is infinite in batch element 1 at time 2"):
        KalmanSmoother(A, C, V, W)(x)
