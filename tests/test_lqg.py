import numpy as np
import pytest
import scipy.linalg
import torch
from contracts import RuleContract

from convexlearn.errors import DomainError, OptionError, ShapeError
from convexlearn.riccati import dare
from convexlearn.rules.base import Role
from convexlearn.rules.lqg import LQG, LQR

n, m, p = 3, 2, 2


def draw(seed=0):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(n, n))
    A *= 1.05 / np.abs(np.linalg.eigvals(A)).max()
    B, C = rng.normal(size=(n, m)), rng.normal(size=(p, n))
    V, W = rng.normal(size=(n, n)), rng.normal(size=(p, p))
    return A, B, C, np.eye(n), np.eye(m), V @ V.T + 0.1 * np.eye(n), W @ W.T + 0.1 * np.eye(p)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestLQG(RuleContract):
    @pytest.fixture
    def rule(self):
        return LQG(*draw())

    @pytest.fixture
    def context(self):
        return randn(1, 4, 5, p)


class TestFiniteLQG(TestLQG):
    @pytest.fixture
    def rule(self):
        return LQG(*draw(), horizon=5, terminal=2 * np.eye(n), covariance=np.eye(n)).learn("Q", "terminal")


class TestLQR(RuleContract):
    @pytest.fixture
    def rule(self):
        A, B, _, Q, R, *_ = draw()
        return LQR(A, B, Q, R).learn("Q", "R")

    @pytest.fixture
    def context(self):
        return randn(1, 4, n)


class TestFiniteLQR(TestLQR):
    @pytest.fixture
    def rule(self):
        A, B, _, Q, R, *_ = draw()
        return LQR(A, B, Q, R, horizon=6)

    @pytest.fixture
    def context(self):
        return randn(1, 4, 5, n)


def test_gains_equal_scipy():
    A, B, C, Q, R, V, W = draw()
    P, S = scipy.linalg.solve_discrete_are(A, B, Q, R), scipy.linalg.solve_discrete_are(A.T, C.T, V, W)
    rule = LQG(*draw())
    K = np.linalg.solve(R + B.T @ P @ B, B.T @ P @ A)
    L = S @ C.T @ np.linalg.inv(C @ S @ C.T + W)
    np.testing.assert_allclose(rule.control_gain.detach().numpy(), K, rtol=0, atol=1e-8)
    np.testing.assert_allclose(rule.filter_gain.detach().numpy(), L, rtol=0, atol=1e-8)


def test_follows_the_filter_with_the_input_in_both_predictions():
    A, B, C, *_ = draw()
    rule, x = LQG(*draw()), randn(1, 1, 6, p)
    K, L = rule.control_gain.detach().numpy(), rule.filter_gain.detach().numpy()
    prior, s = np.zeros(n), rule(x)[0].detach().numpy()
    for t in range(6):
        z = prior + L @ (x[0, t].numpy() - C @ prior)
        np.testing.assert_allclose(s[t], -K @ z, rtol=0, atol=1e-12)
        prior = A @ z + B @ s[t]


def test_average_cost_is_the_separation_formula():
    """tr(P V) + tr(K'(R + B'PB)K S), S the filtered covariance; exact for the optimal gains."""
    A, B, C, Q, R, V, W = draw()
    P, S = scipy.linalg.solve_discrete_are(A, B, Q, R), scipy.linalg.solve_discrete_are(A.T, C.T, V, W)
    S = S - S @ C.T @ np.linalg.inv(C @ S @ C.T + W) @ C @ S
    K = np.linalg.solve(R + B.T @ P @ B, B.T @ P @ A)
    expected = np.trace(P @ V) + np.trace(K.T @ (R + B.T @ P @ B) @ K @ S)
    assert abs(LQG(*draw()).average_cost().item() / expected - 1) < 1e-9
    assert abs(LQR(A, B, Q, R).average_cost(torch.tensor(V)).item() / np.trace(P @ V) - 1) < 1e-9


def test_gradient_vanishes_at_the_true_covariances():
    *_, V, W = draw()
    rule = LQG(*draw())
    rule.average_cost(V, W).backward()
    at_truth = {name: free.grad.abs().max().item() for name, free in rule.free.items()}
    rule.W = 10 * W
    rule.zero_grad()
    rule.average_cost(V, W).backward()
    assert max(at_truth.values()) < 1e-9
    assert min(free.grad.abs().max().item() for free in rule.free.values()) > 1e-3


def test_gradient_of_the_average_cost_against_central_differences():
    *_, V, W = draw()
    rule = LQG(*draw()).learn()
    rule.V, rule.Q = 3 * rule.V, 2 * rule.Q
    rule.average_cost(V, W).backward()
    for parameter in rule.free.values():
        for index in np.ndindex(*parameter.shape):
            with torch.no_grad():
                kept, values = parameter[index].clone(), []
                for step in (1e-5, -1e-5):
                    parameter[index] = kept + step
                    values.append(rule.average_cost(V, W).item())
                parameter[index] = kept
            difference = (values[0] - values[1]) / 2e-5
            assert abs(parameter.grad[index].item() - difference) < 1e-6 * max(1.0, abs(difference))


def test_tuning_from_a_wrong_covariance_recovers_the_optimal_cost():
    *_, V, W = draw()
    optimum = LQG(*draw()).average_cost(V, W).item()
    rule = LQG(*draw())
    rule.W = 10 * W
    start = rule.average_cost(V, W).item()
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.1)
    for _ in range(80):
        optimizer.zero_grad()
        cost = rule.average_cost(V, W)
        cost.backward()
        optimizer.step()
    assert start > 1.01 * optimum
    assert rule.average_cost(V, W).item() < 1.001 * optimum


def test_finite_horizon_gains_equal_brute_force():
    A, B, C, Q, R, V, W = draw()
    T, start, terminal = 5, 2 * np.eye(n), 3 * np.eye(n)
    rule = LQG(*draw(), horizon=T, terminal=terminal, covariance=start)
    P, gains = terminal, []
    for _ in range(T):
        gains.append(np.linalg.inv(R + B.T @ P @ B) @ B.T @ P @ A)
        P = Q + A.T @ P @ (A - B @ gains[-1])
    np.testing.assert_allclose(rule.control_gain.detach().numpy(), gains[::-1], rtol=0, atol=1e-9)
    S = start
    for t in range(T):
        L = S @ C.T @ np.linalg.inv(C @ S @ C.T + W)
        np.testing.assert_allclose(rule.filter_gain[t].detach().numpy(), L, rtol=0, atol=1e-9)
        S = A @ (np.eye(n) - L @ C) @ S @ A.T + V


def test_finite_rule_uses_its_gains_in_order():
    A, B, _, Q, R, *_ = draw()
    rule, z = LQR(A, B, Q, R, horizon=4), randn(2, 3, 4, n)
    expected = -torch.einsum("tmn,btn->btm", rule.control_gain, z)
    torch.testing.assert_close(rule(z), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(OptionError, match="built for horizon=4, but a decision at step 4"):
        rule(randn(2, 3, 5, n))


def test_missing_observations_contribute_nothing():
    x = randn(1, 2, 6, p)
    x[0, 2] = torch.nan
    rule = LQG(*draw())
    memory = rule.start(x[:, 0])
    for t in range(3):
        before = memory.prior
        s, memory = rule.decide(x[:, t], memory)
    torch.testing.assert_close(s[0], -rule.control_gain @ before[0], rtol=1e-12, atol=1e-12)
    assert torch.isfinite(rule(x)).all()


def test_roles():
    assert LQG(*draw()).learned == ("V", "W")
    assert LQG(*draw()).count_parameters() == {Role.OBJECTIVE: 9, Role.HYPER: 0, Role.NETWORK: 0}
    A, B, _, Q, R, *_ = draw()
    assert LQR(A, B, Q, R).learned == ()


def test_learned_dynamics_have_gradients():
    rule = LQG(*draw()).learn("A", "B", "C")
    rule(randn(1, 2, 4, p)).square().sum().backward()
    assert all(rule.free[name].grad.abs().sum() > 0 for name in "ABC")


def test_mistakes_are_named():
    A, B, C, Q, R, V, W = draw()
    with pytest.raises(DomainError, match="parameter 'Q' must be positive semidefinite"):
        LQG(A, B, C, -Q, R, V, W)
    with pytest.raises(DomainError, match="R must be positive definite"):
        LQR(A, B, Q, 0 * R)(randn(1, 2, n))
    with pytest.raises(DomainError, match=r"\(A, B\) is not stabilizable"):
        LQR(A, 0 * B, Q, R)(randn(1, 2, n))
    with pytest.raises(ShapeError, match="LQR takes A"):
        LQR(A, B.T, Q, R)
    with pytest.raises(ShapeError, match=r"x must have shape \(B, 2\) per step"):
        LQG(*draw())(randn(1, 2, 4, p + 1))
    with pytest.raises(OptionError, match="'terminal' has a meaning with a finite horizon only"):
        LQR(A, B, Q, R, terminal=Q)
    with pytest.raises(ShapeError, match=r"average_cost: W must have shape \(2, 2\), got \(3, 3\)"):
        LQG(*draw()).average_cost(V, V)
    with pytest.raises(DomainError, match="average_cost: V has NaN"):
        LQR(A, B, Q, R).average_cost(V * np.nan)
    with pytest.raises(DomainError, match="W must be positive semidefinite"):
        LQG(*draw()).average_cost(V, -W)
    with pytest.raises(OptionError, match="average_cost is that of the stationary rule"):
        LQG(*draw(), horizon=3).average_cost()
    assert dare(*(torch.tensor(M) for M in (A, B, Q, R))).shape == (n, n)
