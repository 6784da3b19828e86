import numpy as np
import pytest
import torch
from contracts import SimulatorContract
from torch import nn

from convexlearn.errors import DomainError, OptionError, ShapeError
from convexlearn.evaluate import evaluate
from convexlearn.objectives import cost
from convexlearn.rules.base import DecisionRule
from convexlearn.simulate.backtest import Backtest, Holdings, Portfolio, growth
from convexlearn.tune import tune


def prices(periods=13, n=3, seed=0):
    steps = 0.05 * torch.randn(periods, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.exp(steps.cumsum(0))


START = torch.tensor([0.5, 0.3, 0.1], dtype=torch.float64)


class Reversion(nn.Module):
    """Trades toward learned weights, more of what has fallen."""

    def __init__(self):
        super().__init__()
        self.target = nn.Parameter(torch.tensor([0.4, 0.9, -0.4], dtype=torch.float64))
        self.slope = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, weights, past):
        return self.target - weights - self.slope * (past[:, -1] - 1)


class TestBacktest(SimulatorContract):
    @pytest.fixture
    def simulator(self):
        return Backtest(prices(20), 3, stride=2, lookback=2, trading=0.01, shorting=0.02, start=START)

    @pytest.fixture
    def rule(self):
        return Reversion()


def test_equals_a_ledger_kept_in_money():
    """Positions and cash in numpy, window by window: trades, costs, shorts, interest, returns."""
    record, rule = prices(12), Reversion()
    backtest = Backtest(record, 4, lookback=1, trading=0.01, shorting=0.02, interest=0.003, start=START)
    assert len(backtest) == 2
    with torch.no_grad():
        rollout = backtest(rule)
    table = record.numpy()
    for window, begin in enumerate((1, 5)):
        held, cash = START.numpy().copy(), 1 - float(START.sum())
        for t in range(begin, begin + 4):
            wealth = held.sum() + cash
            past = torch.tensor(table[t] / table[t - 1])[None, None]
            with torch.no_grad():
                trade = rule(torch.tensor(held / wealth)[None], past)[0].numpy() * wealth
            held = held + trade
            cash = cash - trade.sum() - 0.01 * np.abs(trade).sum() - 0.02 * np.maximum(-held, 0).sum()
            held, cash = held * table[t + 1] / table[t], 1.003 * cash
            after = held.sum() + cash
            assert rollout.state.wealth[window, t - begin + 1].item() == pytest.approx(after, rel=1e-12)
            assert rollout.cost[window, t - begin].item() == pytest.approx(1 - after / wealth, rel=1e-9)
            np.testing.assert_allclose(rollout.state.weights[window, t - begin + 1], held / after, rtol=1e-10)


def test_the_rule_never_sees_the_future():
    """Prices changed from some period on change no earlier decision."""
    record, changed = prices(11), prices(11)
    changed[7:] *= 2
    seen, other = (Backtest(p, 5, stride=1, lookback=2, start=START)(Reversion()) for p in (record, changed))
    for window in range(len(seen)):
        known = max(0, 7 - (2 + window))  # steps whose whole past lies before period 7
        torch.testing.assert_close(seen.decision[window, :known], other.decision[window, :known], rtol=0, atol=0)
    assert not torch.equal(seen.decision, other.decision)


def test_holding_without_trades_earns_what_the_prices_earn():
    record = prices(7)
    wealth = Backtest(record, 6, start=START)(torch.zeros_like).state.wealth[0]
    torch.testing.assert_close(wealth, (record / record[0]) @ START + 0.1)


def test_gradient_against_central_differences():
    rule, backtest = Reversion(), Backtest(prices(10), 4, stride=2, lookback=1, trading=0.01, shorting=0.02)

    def value():
        return backtest(rule).cost.sum(1).mean()

    value().backward()
    for parameter in rule.parameters():
        flat = parameter.data.view(-1)
        for i in range(len(flat)):
            values = []
            for step in (1e-6, -2e-6, 1e-6):
                flat[i] += step
                values.append(value().item())
            difference = (values[0] - values[1]) / 2e-6
            assert abs(parameter.grad.view(-1)[i].item() - difference) < 1e-7


def test_windows_batches_and_evaluation():
    backtest = Backtest(prices(13), 4)
    assert len(backtest) == 3
    assert len(backtest.subset(torch.tensor([2]))) == 1
    last = backtest.subset(torch.tensor([2]))(torch.zeros_like)
    torch.testing.assert_close(last.cost[0], backtest(torch.zeros_like).cost[2])
    assert len(evaluate(torch.zeros_like, backtest, cost).values) == 3
    assert backtest.fingerprint() == Backtest(prices(13), 4).fingerprint()
    assert backtest.fingerprint() != Backtest(prices(13, seed=1), 4).fingerprint()
    utility = Backtest(prices(13), 4, start=START, stage_cost=lambda r: -torch.log(r))
    rollout = utility(torch.zeros_like)
    torch.testing.assert_close(rollout.cost.sum(1), -rollout.state.wealth[:, -1].log())
    torch.testing.assert_close(growth(rollout).prod(1), rollout.state.wealth[:, -1])


def test_rules_with_memory_keep_it():
    class Once(DecisionRule):
        def start(self, x):
            return True

        def decide(self, x, memory):
            return (0.5 if memory else 0.0) * torch.ones_like(x), False

    decisions = Backtest(prices(7), 3)(Once()).decision
    assert decisions[:, :, 0].tolist() == [[0.5, 0.0, 0.0]] * 2


def test_ruin_is_one_failed_sample():
    record = torch.tensor([[1.0], [3.0], [1.0], [1.0], [1.0]], dtype=torch.float64)
    short = nn.Linear(1, 1).double()
    with torch.no_grad():
        short.weight.zero_()
        short.bias.fill_(-1.0)
    rollout = Backtest(record, 2)(short)
    assert rollout.failed.tolist() == [True, False]
    assert rollout.explain().startswith("sample 0 failed at step 0: the state diverged")
    rollout.cost[~rollout.failed].sum().backward()
    assert torch.isfinite(short.bias.grad).all()


def test_tuning_finds_the_asset_that_rises():
    record = torch.stack([1.02 ** torch.arange(9.0), torch.ones(9)], 1).double()

    class Mix(nn.Module):
        def __init__(self):
            super().__init__()
            self.share = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, weights):
            share = self.share.clamp(0, 1)
            return torch.stack([share, 1 - share]) - weights

    rule = Mix()
    tune(rule, Backtest(record, 4), cost, steps=30, learning_rate=0.05, progress=False)
    assert rule.share.item() > 0.95


def test_costs_of_the_plant():
    plant = Portfolio(trading=0.1, shorting=1.0)
    z = Holdings(torch.tensor([[0.5, 0.5]]), torch.ones(1))
    assert plant.cost(z.weights, torch.tensor([[-1.0, 0.0]])).item() == pytest.approx(0.1 + 0.5)


def test_mistakes_are_named():
    record = prices(6)
    record[3, 1] = torch.nan
    with pytest.raises(DomainError, match="asset B has nan in period 3"):
        Backtest(record, 2, names=["A", "B", "C"])
    with pytest.raises(DomainError, match="asset number 0 has -1"):
        Backtest(-torch.ones(4, 2), 2)
    with pytest.raises(ShapeError, match="prices must be floating"):
        Backtest(torch.ones(4), 2)
    with pytest.raises(ShapeError, match="2 names for 3 assets"):
        Backtest(prices(), 2, names=["A", "B"])
    with pytest.raises(OptionError, match="fewer than lookback"):
        Backtest(prices(6), 5, lookback=1)
    with pytest.raises(OptionError, match="stride must be an integer of at least 1"):
        Backtest(prices(), 2, stride=0)
    with pytest.raises(OptionError, match="trading must be a number of at least 0"):
        Backtest(prices(), 2, trading=-0.1)
    with pytest.raises(OptionError, match="batch_size must lie between 0 and 6"):
        Backtest(prices(), 2)(torch.zeros_like, 7)
    with pytest.raises(ShapeError, match=r"a weight per asset, \(3,\), got \(2,\)"):
        Backtest(prices(), 2, start=torch.ones(2))(torch.zeros_like)
