"""The mathematics of the control entries: declarations against CVXPY, published figures at their seeds."""

from itertools import pairwise

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import nn

from convexlearn.errors import OptionError
from convexlearn.objectives import cost
from convexlearn.problems import find, markowitz, mpc_weights, published, supply_chain, vehicle
from convexlearn.problems.baselines import gentle_network
from convexlearn.problems.catalogue import Budget, Contender, Study, judge
from convexlearn.problems.prices import ASSETS, monthly
from convexlearn.rules.affine import AffineRule
from convexlearn.simulate.closed_loop import ClosedLoop
from convexlearn.simulate.pairs import Pairs
from convexlearn.simulate.plants import SupplyChain, Vehicle
from convexlearn.tune import tune


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# published runs


def vehicle_at_their_seeds():
    plant = Vehicle()
    return ClosedLoop(
        plant, 100, initial=plant.initial, noise=vehicle.noise_as_published, stage_cost=plant.stage_cost
    )  # fmt: skip


def chain_at_their_seeds():
    chain = SupplyChain()
    given = {"noise": chain.noise, "stage_cost": chain.stage_cost}
    return ClosedLoop(chain, 20, initial=supply_chain.first_as_published, **given)


def test_the_first_steps_of_the_published_runs_are_repeated():
    runs = [
        (vehicle, vehicle_at_their_seeds(), cost, {0: 3.512, 4: 1.765}, 6e-4),
        (supply_chain, chain_at_their_seeds(), supply_chain.cost_as_published, {0: -0.27864, 4: -0.28614}, 2e-4),
    ]
    for problem, simulator, objective, figures, tolerance in runs:
        trace = published.descend(simulator, objective, problem.PUBLISHED)(problem.declare(), Budget(steps=4))
        assert [record["step"] for record in trace] == list(range(5))
        assert published.departures(trace, figures, tolerance) == []
        assert len(published.departures(trace, {0: 1.0}, tolerance)) == 1


def test_the_published_validation_errors_of_mpc_are_repeated():
    theirs = mpc_weights.decisions(mpc_weights.VALIDATION_SEED, mpc_weights.NOISE)
    assert (theirs.clean - theirs.noisy).square().mean().item() == pytest.approx(0.0656, abs=5e-5)
    ones = mpc_weights.declare(torch.ones(10, dtype=torch.float64))
    with torch.no_grad():
        assert mpc_weights.validation_error(ones, 0, mpc_weights.NOISE) == pytest.approx(0.0728, abs=5e-5)


@pytest.mark.slow
def test_the_published_runs_end_where_they_ended():
    for problem, simulator, objective, tolerance in (
        (vehicle, vehicle_at_their_seeds(), cost, 6e-4),
        (supply_chain, chain_at_their_seeds(), supply_chain.cost_as_published, 1e-3),
    ):
        trace = published.descend(simulator, objective, problem.PUBLISHED)(problem.declare(), Budget())
        assert published.departures(trace, problem.PUBLISHED_LOSSES, tolerance) == []


# declarations against CVXPY and against the equations


def test_the_vehicle_policy_predicts_with_the_plant_and_equals_cvxpy():
    plant, rng = Vehicle(), np.random.default_rng(0)
    z = torch.tensor([[0.4, -0.2, 4.0, 5.0, 0.05], [-0.3, 0.1, 3.2, 4.0, -0.1]], dtype=torch.float64)
    S, q = np.eye(4) + 0.2 * rng.standard_normal((4, 4)), 0.3 * rng.standard_normal(4)
    rule = vehicle.declare(S)
    with torch.no_grad():
        rule.q = torch.tensor(q)
        decisions = rule(z)
    for state, decision in zip(z, decisions):
        u = cp.Variable(2)
        e, psi, v, wanted, kappa = state.tolist()
        y1 = e + 0.2 * v * np.sin(psi)
        psi0 = psi + 0.2 * v * (kappa - kappa * np.cos(psi) / (1 - e * kappa))
        y = cp.hstack([
            y1,
            psi0 + 0.2 * v * u[1] / 2.8,
            v + 0.2 * u[0] - 0.98 * wanted - 0.09,
            y1 + 0.2 * v * np.sin(psi0) + 0.04 * v**2 * u[1] / 2.8,
        ])  # fmt: skip
        limits = [cp.abs(u[0]) <= 2, cp.abs(u[1] + 2.8 * kappa) <= 0.68]
        cp.Problem(cp.Minimize(10 * cp.sum_squares(u) + cp.sum_squares(S @ y) + q @ y), limits).solve(solver="CLARABEL")
        np.testing.assert_allclose(decision, u.value, atol=1e-6)
        moved = plant.predict(state[None], decision[None])[0]
        assert moved[1].item() == pytest.approx(psi0 + 0.2 * v * decision[1].item() / 2.8, rel=1e-9)


def test_clipped_baselines_keep_the_vehicles_limits():
    z = Vehicle().initial(5, generator()) + 10 * torch.randn(5, 5, generator=generator(), dtype=torch.float64)
    rule = vehicle.Limited(AffineRule(torch.full((2, 4), 3.0, dtype=torch.float64)))
    u = rule(z)
    assert (u[:, 0].abs() <= 2).all()
    assert ((u[:, 1] + 2.8 * z[:, 4]).abs() <= 0.68 + 1e-12).all()


@pytest.mark.parametrize("kind", ["tuned", "planned", "wished"])
def test_decisions_for_the_chain_are_allowed_in_the_plant(kind):
    """Along a rollout: amounts within the links, stock within the warehouses, no more sold than wanted."""
    chain = SupplyChain()
    wish = gentle_network(8, 8, hidden=(8,), seed=0, scale=3.0)
    rule = {"tuned": supply_chain.declare, "planned": supply_chain.planned}.get(
        kind, lambda: supply_chain.allowed(wish)
    )()
    loop = ClosedLoop(chain, 12, initial=chain.initial, noise=chain.noise, stage_cost=chain.stage_cost)
    with torch.no_grad():
        rollout = loop(rule, 8, generator())
    u, z, slack = rollout.decision, rollout.state, 1e-6
    assert not rollout.failed.any()
    assert (u >= -slack).all()
    assert (u <= 2 + slack).all()
    assert (u @ chain.leaving.to(u).mT <= z[:, :-1, :4] + slack).all()
    assert (z[..., :4] <= 3 + slack).all()
    assert (z[..., :4] >= -slack).all()
    assert (u[..., 6:] <= z[:, :-1, 6:] + slack).all()


def test_wishes_that_are_allowed_are_granted():
    chain = SupplyChain()
    z = torch.cat([torch.full((1, 4), 1.5), torch.ones(1, 4)], 1).double()
    rule = supply_chain.allowed(AffineRule(torch.zeros(8, 8, dtype=torch.float64), torch.full((8,), 0.3).double()))
    torch.testing.assert_close(rule(z), torch.full((1, 8), 0.3, dtype=torch.float64), atol=1e-7, rtol=0)
    paid = 0.3 * (2 + 0.2 - 2.6) + 4 * 0.01 * (1.5 + 1.5**2)
    torch.testing.assert_close(chain.stage_cost(z, rule(z)).detach(), torch.tensor([paid], dtype=torch.float64))


def test_mpc_with_the_true_weights_is_the_controller():
    data = mpc_weights.decisions(0, mpc_weights.NOISE, noise_seed=1)
    x, u = data.x[7], cp.Variable((5, 4))
    A, B = (part.numpy() for part in mpc_weights.random_linear(0, 10, 4))
    z, w, objective = x.numpy(), mpc_weights.true_weights().numpy(), 0
    for t in range(5):
        objective += cp.sum(cp.multiply(w, cp.square(z))) + cp.sum_squares(u[t])
        z = A @ z + B @ u[t]
    cp.Problem(cp.Minimize(objective), [cp.abs(u) <= 0.5]).solve(solver="CLARABEL")
    np.testing.assert_allclose(data.clean[7], u.value[0], atol=1e-6)
    assert (data.noisy.abs() <= 0.5).all()


# markowitz


def test_prices_are_those_of_every_month():
    months, prices = monthly()
    assert prices.shape == (390, len(ASSETS)) == (len(months), 7)
    counted = [12 * int(month[:4]) + int(month[5:7]) for month in months]
    assert all(after - before == 1 for before, after in pairwise(counted))
    assert (months[0], months[-1]) == ("1990-01-01", "2022-06-01")
    assert prices[0, 5] == pytest.approx(329.08, abs=0.01)  # S&P 500, January 1990


def trader():
    setting = markowitz.Setting()
    generator_ = np.random.default_rng(0)
    root = 0.05 * generator_.standard_normal((7, 7))
    V = torch.tensor(root @ root.T + 1e-4 * np.eye(7))
    return markowitz.Markowitz(torch.tensor(1 + 0.01 * generator_.random(7)), V, setting), V


def test_the_markowitz_policy_equals_cvxpy_and_pays_its_costs():
    rule, V = trader()
    mu = rule.rule.mu.detach().numpy()
    w = torch.full((1, 7), 1 / 7, dtype=torch.float64)
    trades = rule(w)[0].detach().numpy()
    u = cp.Variable(7)
    v = u + 1 / 7
    costs = 0.001 * cp.norm1(u) + 0.001 * cp.sum(cp.neg(v))
    objective = cp.Maximize(mu @ v - 15 * cp.quad_form(v, cp.psd_wrap(V.numpy())))
    cp.Problem(objective, [cp.sum(u) + costs <= 0]).solve(solver="CLARABEL")
    np.testing.assert_allclose(trades, u.value, atol=1e-5)
    after = 1 / 7 + trades
    spent = trades.sum() + 0.001 * np.abs(trades).sum() + 0.001 * np.maximum(-after, 0).sum()
    assert abs(spent) < 1e-8


def test_the_portfolio_at_the_start_solves_the_problem_without_trading_costs():
    rule, V = trader()
    v = cp.Variable(7)
    risk = 15 * cp.quad_form(v, cp.psd_wrap(V.numpy()))
    objective = cp.Maximize(rule.rule.mu.detach().numpy() @ v - risk - 0.001 * cp.sum(cp.neg(v)))
    cp.Problem(objective, [cp.sum(v) == 1]).solve(solver="CLARABEL")
    np.testing.assert_allclose(rule.holdings(), v.value, atol=1e-5)
    assert markowitz.holdings(nn.Sequential(rule)).equal(rule.holdings())


def test_targets_are_reached_as_far_as_the_costs_leave_money():
    setting = markowitz.Setting(trading=0.01, shorting=0.02)
    wished = torch.tensor([0.5, 0.7, -0.4, 0.1, 0.0, 0.1, 0.0], dtype=torch.float64)
    rule = markowitz.Target(AffineRule(torch.zeros(7, 7, dtype=torch.float64), wished), setting)
    w = torch.full((2, 7), 1 / 7, dtype=torch.float64)
    u = rule(w).detach()
    after = w + u
    torch.testing.assert_close(after / after.sum(1, keepdim=True), wished.expand(2, 7))
    torch.testing.assert_close(1 - after.sum(1), rule.plant.cost(w, u), atol=1e-12, rtol=0)
    torch.testing.assert_close(rule.holdings(), wished)


def test_simulated_returns_are_lognormal_and_the_utility_is_the_papers():
    setting = markowitz.Setting(horizon=4)
    m, V = torch.linspace(-0.01, 0.02, 7, dtype=torch.float64), 0.01 * torch.eye(7, dtype=torch.float64)
    rollout = markowitz.Market(m, V, setting)(markowitz.Hold(), 20_000, generator())
    growth = markowitz.growth(rollout)
    assert abs(growth[:, 0].mean() - torch.exp(m + 0.005).mean()) < 4 * growth[:, 0].std() / 20_000**0.5
    gain = growth - 1
    expected = torch.where(gain > 0, gain, 2 * gain).mean(1)
    torch.testing.assert_close(markowitz.utility(rollout), expected)


def test_every_parameter_has_a_learning_rate_of_its_own():
    """gamma stands still under one small rate and moves under its own."""
    rule, V = trader()
    market = markowitz.Market(torch.zeros(7, dtype=torch.float64), V, markowitz.Setting(horizon=2))
    rates = {"rule.mu": 0.0, "rule.S": 0.0, "rule.root_gamma": 0.1}
    before = {name: rule.rule.value(name).detach().clone() for name in ("mu", "S", "root_gamma")}
    tune(rule, market, markowitz.utility, steps=2, learning_rate=rates, batch_size=8, progress=False)
    after = {name: rule.rule.value(name).detach() for name in before}
    assert torch.equal(before["mu"], after["mu"])
    assert torch.equal(before["S"], after["S"])
    assert abs(before["root_gamma"] - after["root_gamma"]) > 0.01
    with pytest.raises(OptionError, match="fitted must leave months"):
        markowitz.build(0, markowitz.Setting(fitted=380))


# studies


def test_a_measure_can_be_a_median_and_can_have_its_own_simulator():
    x = torch.arange(3.0)[:, None]
    test, other = Pairs(x, torch.tensor([[0.0], [1.0], [12.0]])), Pairs(x, x + 2)
    size = lambda t: (t.decision - t.target).square().sum(1)  # noqa: E731
    measures = {"mean": size, "middle": size, "other": size}
    problem = cp.Problem(cp.Minimize(0))
    study = Study(
        problem, {"same": Contender(nn.Identity())}, test, measures, medians=["middle"], simulators={"other": other}
    )
    record = judge(find("vehicle"), study, 0, {}).records[0]
    assert [record.measure(m).mean for m in measures] == [pytest.approx(100 / 3), 0.0, 4.0]
    assert list(record.measures) == ["mean", "middle", "other"]
