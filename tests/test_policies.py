import cvxpy as cp
import numpy as np
import pytest
import scipy.linalg
import torch
from contracts import RuleContract

from convexlearn.errors import DomainError, FailureWarning, OptionError, ShapeError
from convexlearn.evaluate import evaluate
from convexlearn.objectives import cost
from convexlearn.riccati import dare, lqr_gain
from convexlearn.rules.policies import adp, mpc
from convexlearn.simulate.closed_loop import ClosedLoop
from convexlearn.simulate.plants import LinearGaussian, random_linear

n, m = 4, 2
A, B = random_linear(0, n, m)
EYE, SMALL = torch.eye(n, dtype=torch.float64), torch.eye(m, dtype=torch.float64)
P, K = dare(A, B, EYE, SMALL), lqr_gain(A, B, EYE, SMALL)
ROOT = torch.tensor(np.real(scipy.linalg.sqrtm(P.numpy())))
X = torch.randn(5, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class TestADP(RuleContract):
    tolerance = 1e-9

    @pytest.fixture
    def rule(self):
        return adp(A, B, SMALL, ROOT, torch.ones(n).double(), limit=0.4, learn=("S", "q", "R"))

    @pytest.fixture
    def context(self):
        return X


class TestMPC(TestADP):
    @pytest.fixture
    def rule(self):
        return mpc(A, B, EYE, SMALL, 3, input_limit=0.4, state_limit=2.0, soft=50.0, learn=("A", "Q", "R"))


class TestForecast(TestADP):
    @pytest.fixture
    def rule(self):
        return mpc(A, B, EYE, SMALL, 3, forecast=torch.ones(n, 1), learn=("terminal", "forecast"))

    @pytest.fixture
    def context(self):
        return X, X[:, :3, None]


def test_adp_with_the_riccati_solution_is_lqr():
    for limit in (None, 1e3, torch.full((m,), 1e3), (-1e3, 1e3)):
        torch.testing.assert_close(adp(A, B, SMALL, ROOT, limit=limit)(X).detach(), -X @ K.mT, rtol=0, atol=1e-9)


@pytest.mark.parametrize("horizon", [1, 2, 5, 20])
def test_mpc_with_the_riccati_solution_is_lqr_for_every_horizon(horizon):
    wide = {"input_limit": 1e3, "state_limit": 1e4, "soft": 1e3}
    for options in ({}, wide) if horizon < 20 else ({},):
        s = mpc(A, B, EYE, SMALL, horizon, **options)(X).detach()
        torch.testing.assert_close(s, -X @ K.mT, rtol=0, atol=1e-7)


def test_inputs_stay_inside_the_box():
    for rule in (adp(A, B, SMALL, ROOT, limit=0.2), mpc(A, B, EYE, SMALL, 4, input_limit=(-0.1, 0.2))):
        s = rule(20 * X).detach()
        assert s.max() <= 0.2 + 1e-6
        assert s.min() >= -0.2 - 1e-6
        assert (s.abs() > 0.0999).any()


def test_mpc_equals_the_problem_solved_by_cvxpy():
    terminal, E = 3 * EYE, torch.ones(n, 1, dtype=torch.float64)
    d = torch.tensor([[0.3], [-0.2], [0.5]], dtype=torch.float64)
    rule = mpc(A, B, 2 * EYE, SMALL, 3, terminal=terminal, input_limit=0.3, state_limit=1.5, soft=5.0, forecast=E)
    for x in X:
        u, z = cp.Variable((3, m)), cp.Variable((4, n))
        over = cp.sum(cp.pos(cp.abs(z[1:]) - 1.5))
        objective = cp.sum_squares(u) + 2 * cp.sum_squares(z[:3]) + 3 * cp.sum_squares(z[3]) + 5 * over
        dynamics = z[1:] == z[:-1] @ A.numpy().T + u @ B.numpy().T + d.numpy() @ E.numpy().T
        problem = cp.Problem(cp.Minimize(objective), [z[0] == x.numpy(), dynamics, cp.abs(u) <= 0.3])
        problem.solve(solver="CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
        s = rule(x[None], d[None]).detach()[0]
        np.testing.assert_allclose(s.numpy(), u.value[0], rtol=0, atol=1e-6)


def test_soft_limits_stay_feasible_and_are_kept_where_possible():
    options = {"input_limit": 0.1, "state_limit": 0.5}
    hard, soft = mpc(A, B, EYE, SMALL, 3, **options), mpc(A, B, EYE, SMALL, 3, soft=1e3, **options)
    far, near = 10 * X, 0.1 * X
    assert not hard.layer.solve(**hard._arguments_of((far,))).ok.any()
    assert soft.layer.solve(**soft._arguments_of((far,))).ok.all()
    torch.testing.assert_close(soft(near), hard(near), rtol=0, atol=1e-8)


def test_hard_limits_fail_in_mid_rollout_and_soft_ones_do_not():
    """A push that the model does not know drives two of six plants out of the feasible set."""
    push = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)[:, None] * torch.ones(n).double()
    plant = LinearGaussian(A, B, V=1e-4 * EYE)
    loop = ClosedLoop(
        plant, 6, initial=lambda b, g: 0.1 * plant.initial(b, g), stage_cost=plant.stage_cost,
        noise=lambda b, t, g: push[:b] * (t == 2),
    )  # fmt: skip
    options = {"input_limit": 0.1, "state_limit": 0.6, "learn": ("Q",)}
    rollout = loop(mpc(A, B, EYE, SMALL, 3, **options), 6, generator())
    assert rollout.failed.tolist() == [False] * 4 + [True] * 2
    assert rollout.failed_at.tolist() == [6] * 4 + [3] * 2
    assert "sample 5 failed at step 3: INFEASIBLE: the rule found no decision" in rollout.explain()
    with pytest.warns(FailureWarning, match="2 of 6 samples failed: 4, 5"):
        evaluate(mpc(A, B, EYE, SMALL, 3, **options), loop, cost, samples=6)
    assert not loop(mpc(A, B, EYE, SMALL, 3, soft=1e2, **options), 6, generator()).failed.any()


def test_a_forecast_lowers_the_cost():
    """A known disturbance wave: MPC that sees it pays less than MPC that does not."""
    E = torch.ones(n, 1, dtype=torch.float64)
    wave = torch.sin(torch.arange(30, dtype=torch.float64))[:, None]

    def run(rule, observe):
        plant = LinearGaussian(A, B, V=0.01 * EYE)
        loop = ClosedLoop(
            plant, 20, initial=plant.initial, observe=observe, stage_cost=plant.stage_cost,
            noise=lambda b, t, g: plant.noise(b, t, g) + wave[t] @ E.mT,
        )  # fmt: skip
        with torch.no_grad():
            return loop(rule, 4, generator()).cost.mean().item()

    seeing = run(
        mpc(A, B, EYE, SMALL, 5, forecast=E),
        lambda z, t, w: (z, wave[t : t + 5].expand(len(z), 5, 1)),
    )
    assert seeing < 0.95 * run(mpc(A, B, EYE, SMALL, 5), lambda z, t, w: z)


@pytest.mark.parametrize("recipe", ["adp", "mpc"])
def test_rollout_gradients_against_central_differences(recipe):
    """Through 8 steps, where no input enters or leaves its limit within the step of the difference."""
    rule = (
        adp(A, B, SMALL, ROOT, limit=0.3)
        if recipe == "adp"
        else mpc(A, B, EYE, SMALL, 3, input_limit=0.3, learn=("R",))
    )
    plant = LinearGaussian(A, B, V=0.25 * EYE)
    loop = ClosedLoop(plant, 8, initial=plant.initial, noise=plant.noise, stage_cost=plant.stage_cost)

    def value():
        return loop(rule, 3, generator(3)).cost.mean()

    value().backward()
    saturated = loop(rule, 3, generator(3)).decision.detach().abs() > 0.3 - 1e-9
    assert saturated.any()
    assert not saturated.all()
    for parameter in rule.free.values():
        for index in list(np.ndindex(*parameter.shape))[:5]:
            values = []
            for step in (1e-6, -2e-6, 1e-6):
                with torch.no_grad():
                    parameter[index] += step
                    values.append(value().item())
            difference = (values[0] - values[1]) / 2e-6
            assert abs(parameter.grad[index].item() - difference) < 1e-6 * max(1.0, abs(difference))


def test_learned_matrices_are_parameters_in_their_domain():
    rule = mpc(A, B, EYE, SMALL, 2, learn=("Q", "A"))
    assert set(rule.learned) == {"Q", "A"}
    rule.free["Q"].data += 0.3
    assert torch.linalg.eigvalsh(rule.Q.detach()).min() > 0
    assert adp(A, B, SMALL, ROOT, learn=()).learned == ()
    assert adp(A, B, SMALL, ROOT).learned == ("S", "q")
    assert "sum_squares" in str(adp(A, B, SMALL, ROOT).problem()) or adp(A, B, SMALL, ROOT).problem().is_dcp()


def test_more_constraints():
    rule = adp(A, B, SMALL, ROOT, constraints=lambda u, y: [cp.sum(u) == 0, y[0] <= 0.1])
    s = rule(X).detach()
    torch.testing.assert_close(s.sum(1), torch.zeros(5).double(), rtol=0, atol=1e-9)
    assert ((X @ A.mT + s @ B.mT)[:, 0] <= 0.1 + 1e-9).all()


def test_mistakes_are_named():
    with pytest.raises(ShapeError, match=r"adp: B does not fit: expected .*B \(n, m\).*got A \(4, 4\), B \(2, 4\)"):
        adp(A, B.mT, SMALL, ROOT)
    with pytest.raises(DomainError, match="parameter 'R' must be positive semidefinite"):
        adp(A, B, -SMALL, ROOT)
    with pytest.raises(DomainError, match="adp: S has NaN"):
        adp(A, B, SMALL, ROOT * torch.nan)
    with pytest.raises(OptionError, match="cannot learn 'P'; valid: A, B, R, S, q"):
        adp(A, B, SMALL, ROOT, learn=("P",))
    with pytest.raises(ShapeError, match=r"limit must be a number, a vector \(2,\)"):
        adp(A, B, SMALL, ROOT, limit=torch.ones(3))
    with pytest.raises(DomainError, match="the lower limit 1 exceeds the upper limit 0"):
        adp(A, B, SMALL, ROOT, limit=(1, 0))
    with pytest.raises(OptionError, match="horizon must be a positive number"):
        mpc(A, B, EYE, SMALL, 0)
    with pytest.raises(OptionError, match="soft is the positive weight of leaving state_limit"):
        mpc(A, B, EYE, SMALL, 2, soft=1.0)
    with pytest.raises(DomainError, match=r"\(A, B\) is not stabilizable"):
        mpc(1.5 * EYE, 0 * B, EYE, SMALL, 2)
    with pytest.raises(DomainError, match="Q must be positive semidefinite"):
        mpc(A, B, -EYE, SMALL, 2)
    with pytest.raises(DomainError, match=r"parameter 'x' .*NaN"):
        mpc(A, B, EYE, SMALL, 2)(X * torch.nan)
