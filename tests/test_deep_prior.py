"""Deep priors: closed forms for linear generators, CVXPY, brute force, and gradients against central differences."""

import math
import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch
from contracts import RuleContract
from torch import nn

from convexlearn.errors import LimitWarning, OptionError, ShapeError
from convexlearn.flows import Affine, AffineCoupling, Flow, real_nvp
from convexlearn.networks import mlp
from convexlearn.rules.deep_prior import DeepPrior
from convexlearn.rules.parameters import Role
from convexlearn.simulate.pairs import Pairs


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decoder(latent=2, size=5, seed=0):
    return mlp(latent, size, hidden=(6,), activation=nn.SiLU, seed=seed).double()


def shaken_flow(size=4, couplings=2):
    flow = real_nvp(size, couplings=couplings, hidden=(5,), seed=0).double()
    with torch.no_grad():
        for k, parameter in enumerate(flow.parameters()):
            parameter.add_(0.2 * normal(*parameter.shape, seed=k))
    return flow


class TestGenerative(RuleContract):
    tolerance = 1e-8

    @pytest.fixture
    def rule(self):
        generator = nn.Sequential(decoder(), nn.Unflatten(1, (5, 1)))
        return DeepPrior(generator, normal(3, 5, seed=1), 2, weight=0.3, restarts=3, learn=["weight", "H"])

    @pytest.fixture
    def context(self):
        return normal(4, 3, seed=2)


class TestBijective(RuleContract):
    tolerance = 1e-8

    @pytest.fixture
    def rule(self):
        flow = shaken_flow()
        return DeepPrior(flow, normal(2, 4, seed=1), 4, weight=0.3, penalty=flow.potential)

    @pytest.fixture
    def context(self):
        return normal(3, 2, seed=2)


class TestUnrolled(RuleContract):
    tolerance = 1e-8

    @pytest.fixture
    def rule(self):
        return DeepPrior(decoder(), normal(3, 5, seed=1), 2, gradient="unroll", max_iterations=4)

    @pytest.fixture
    def context(self):
        return normal(3, 3, seed=2)


def test_a_linear_decoder_gives_ridge_regression():
    """Closed form: z = argmin 1/2 |x - H b - H A z|^2 + weight / 2 |z|^2."""
    A, b, H, x = normal(7, 3), normal(7, seed=1), normal(4, 7, seed=2), normal(6, 4, seed=3)
    linear = nn.Linear(3, 7, dtype=torch.float64)
    linear.weight, linear.bias = nn.Parameter(A), nn.Parameter(b)
    M = H @ A
    z = torch.linalg.solve(M.mT @ M + 0.2 * torch.eye(3, dtype=torch.float64), M.mT @ (x - H @ b).mT).mT
    s = DeepPrior(linear, H, 3, weight=0.2, restarts=4)(x)
    torch.testing.assert_close(s, z @ A.mT + b, atol=1e-10, rtol=0)


def linear_flow(size=4):
    """A linear map made of couplings whose shifts are linear and whose scales are constant, and a matrix."""
    couplings = []
    for moved, seed in (([0, 1], 0), ([2, 3], 1), ([1, 2], 2)):
        network = nn.Linear(2, 4, dtype=torch.float64)
        with torch.no_grad():
            network.weight.copy_(normal(4, 2, seed=seed))
            network.weight[2:] = 0.0
            network.bias.copy_(normal(4, seed=10 + seed))
        couplings.append(AffineCoupling(size, moved, network))
    return Flow([*couplings, Affine(normal(size, size, seed=5) + 2 * torch.eye(size), normal(size, seed=6))])


def test_a_linear_flow_gives_the_map_rule_of_equation_4():
    """Eq. 27 against Eq. 4 in CVXPY: phi(s) = 1/2 |A^-1 (s - b)|^2 + log |det A| + const, and its closed form."""
    flow, H, x, weight = linear_flow(), normal(2, 4, seed=7), normal(3, 2, seed=8), 0.4
    b = flow(torch.zeros(1, 4, dtype=torch.float64))[0].detach()
    A = (flow(torch.eye(4, dtype=torch.float64)).detach() - b).mT
    s = DeepPrior(flow, H, 4, weight=weight, penalty=flow.potential, restarts=2)(x).detach()
    covariance = A @ A.mT
    gain = covariance @ H.mT @ torch.linalg.inv(H @ covariance @ H.mT + weight * torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(s, b + (x - H @ b) @ gain.mT, atol=1e-9, rtol=0)
    for i in range(len(x)):
        v = cp.Variable(4)
        phi = cp.sum_squares(np.linalg.inv(A.numpy()) @ (v - b.numpy())) / 2
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x[i].numpy() - H.numpy() @ v) / 2 + weight * phi))
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
        np.testing.assert_allclose(s[i].numpy(), v.value, atol=1e-6)


def test_a_flow_minimizes_equation_4_over_the_signals_themselves():
    """At g(z) the gradient of 1/2 |x - H s|^2 - weight log p(s) to s vanishes."""
    flow, H, x = shaken_flow(), normal(2, 4, seed=1), normal(3, 2, seed=2)
    s = DeepPrior(flow, H, 4, weight=0.3, penalty=flow.potential)(x).detach().requires_grad_()
    objective = (x - s @ H.mT).square().sum() / 2 - 0.3 * flow.log_density(s).sum()
    assert torch.autograd.grad(objective, s)[0].abs().max() < 1e-7


def test_restarts_find_the_global_minimum_of_a_grid():
    class Wave(nn.Module):
        def forward(self, z):
            return (3 * z).sin() + 0.5 * z

    rule = DeepPrior(Wave(), torch.eye(1, dtype=torch.float64), 1, weight=0.02, restarts=30)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    grid = torch.linspace(-6, 6, 20001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        values = torch.stack([rule.objective(grid, row.expand(len(grid), 1)) for row in x])
    found = rule.solve(x)
    assert (found.objective - values.min(1).values).max() < 1e-6
    single = DeepPrior(Wave(), torch.eye(1, dtype=torch.float64), 1, weight=0.02).solve(x)
    assert (single.objective > found.objective + 1e-3).any()
    assert (single.objective >= found.objective - 1e-12).all()


def perturbation(rule, x):
    """Decisions as a function of x, H, weight and one network weight, to be differentiated."""
    H, weight, first = rule.H.detach().clone(), rule.weight.detach().clone(), next(rule.generator.parameters())
    start = first.detach().clone()

    def evaluate(dx, dH, dweight, dfirst):
        with torch.no_grad():
            rule.H, rule.weight = H + dH, weight + dweight
            first.copy_(start + dfirst)
            s = rule(x + dx)
            rule.H, rule.weight = H, weight
            first.copy_(start)
        return s

    return evaluate, first


def cases():
    H, flow = normal(3, 4, seed=1), shaken_flow()
    options = {"weight": 0.3, "tol": 1e-12, "learn": ["weight", "H"]}
    return {
        "decoder": DeepPrior(decoder(2, 4), H, 2, restarts=3, **options),
        "flow": DeepPrior(flow, H, 4, penalty=flow.potential, **options),
        "unrolled": DeepPrior(decoder(2, 4), H, 2, restarts=3, gradient="unroll", **options),
        "unrolled, 3 steps": DeepPrior(decoder(2, 4), H, 2, gradient="unroll", max_iterations=3, **options),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_gradients_agree_with_central_differences(name):
    rule, x = cases()[name], normal(3, 3, seed=4).requires_grad_()
    evaluate, first = perturbation(rule, x.detach())
    s = rule(x)
    w = normal(*s.shape, seed=5)
    targets = {"x": x, "H": rule.free["H"], "weight": rule.free["weight"], "first": first}
    gradients = dict(zip(targets, torch.autograd.grad((w * s).sum(), list(targets.values()))))
    # the free coordinate of weight is not weight itself
    free = rule.free["weight"].detach().clone().requires_grad_()
    slope = torch.autograd.grad(rule._declared["weight"].domain.from_free(free), free)[0]
    gradients["weight"] = gradients["weight"] / slope
    shapes = {"x": x.shape, "H": rule.H.shape, "weight": (), "first": first.shape}
    for name, shape in shapes.items():
        direction = normal(*shape, seed=6)
        zero = {n: torch.zeros(s, dtype=torch.float64) for n, s in shapes.items()}
        ahead, behind = (evaluate(*{**zero, name: h * direction}.values()) for h in (1e-5, -1e-5))
        difference = (w * (ahead - behind)).sum().item() / 2e-5
        assert (gradients[name] * direction).sum().item() == pytest.approx(difference, rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("gradient", ["implicit", "unroll"])
def test_a_context_that_is_no_number_fails_alone(gradient):
    rule, x = DeepPrior(decoder(), normal(3, 5, seed=1), 2, gradient=gradient), normal(5, 3, seed=2)
    sound = rule(x)
    x[1, 0], x[3, 2], x[4, 1] = math.nan, math.inf, 1e200  # the last objective overflows
    s = rule(x)
    assert torch.isnan(s[[1, 3, 4]]).all()
    torch.testing.assert_close(s[[0, 2]], sound[[0, 2]])
    s[[0, 2]].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in rule.parameters())
    trajectory = Pairs(x, torch.zeros(5, 5, dtype=torch.float64))(rule)
    assert trajectory.failed.tolist() == [False, True, False, True, True]


def test_too_few_steps_are_reported_per_sample():
    rule, x = DeepPrior(decoder(), normal(3, 5, seed=1), 2, max_iterations=1), normal(2, 3, seed=2)
    with pytest.warns(LimitWarning, match=r"2 of 2 samples \(0, 1\).*raise max_iterations"):
        rule(x)
    found = DeepPrior(decoder(), normal(3, 5, seed=1), 2).solve(x)
    assert found.converged.all()
    assert (found.residual <= 1e-9).all()
    assert found.latent.shape == (2, 2)


def test_starts_depend_on_the_seed_only():
    def starts(seed):
        return DeepPrior(decoder(), normal(3, 5), 2, restarts=3, seed=seed).starts()

    assert torch.equal(starts(0), starts(0))
    assert not torch.equal(starts(0), starts(1))
    assert not starts(0)[0].any()


def test_a_float32_network_decides_in_float32():
    rule = DeepPrior(decoder().float(), normal(3, 5, seed=1), 2)
    x = normal(3, 3, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LimitWarning)
        rough = rule(x)
    assert rough.dtype == torch.float64
    torch.testing.assert_close(rough, DeepPrior(decoder(), normal(3, 5, seed=1), 2)(x), atol=1e-3, rtol=0)


def test_roles_and_names():
    rule = DeepPrior(decoder(), normal(3, 5), 2, learn=["weight", "H"])
    counts = rule.count_parameters()
    assert counts[Role.OBJECTIVE] == 16
    assert counts[Role.NETWORK] == sum(p.numel() for p in decoder().parameters())
    assert rule.freeze("generator", "H").count_parameters() == {Role.OBJECTIVE: 1, Role.HYPER: 0, Role.NETWORK: 0}


def test_errors_name_what_is_wrong():
    H = normal(3, 5)
    with pytest.raises(OptionError, match="did you mean 'implicit'"):
        DeepPrior(decoder(), H, 2, gradient="implict")
    with pytest.raises(OptionError, match="restarts must be an integer of at least 1, got 0"):
        DeepPrior(decoder(), H, 2, restarts=0)
    with pytest.raises(OptionError, match="cannot learn 'wieght'"):
        DeepPrior(decoder(), H, 2, learn=["wieght"])
    with pytest.raises(ShapeError, match=r"H must have shape \(m, n\)"):
        DeepPrior(decoder(), H[0], 2)
    with pytest.raises(ShapeError, match="x has 4 entries per sample"):
        DeepPrior(decoder(), H, 2)(normal(1, 4))
    with pytest.raises(ShapeError, match="the generator makes 6 entries"):
        DeepPrior(decoder(2, 6), H, 2)(normal(1, 3))
