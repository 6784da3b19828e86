import pytest
import torch
from contracts import SimulatorContract
from torch import nn

from convexlearn.errors import OptionError, ShapeError
from convexlearn.failures import collect_failures, collector
from convexlearn.rules.affine import AffineRule
from convexlearn.rules.base import DecisionRule
from convexlearn.simulate.base import FiniteSimulator, Trajectory
from convexlearn.simulate.pairs import Pairs

X = torch.arange(20, dtype=torch.float64).reshape(10, 2)


class TestPairs(SimulatorContract):
    @pytest.fixture
    def simulator(self):
        return Pairs(X, X.sum(1))

    @pytest.fixture
    def rule(self):
        return AffineRule(torch.ones(1, 2, dtype=torch.float64), shape=())


class TestPairsOfSeveralContexts(SimulatorContract):
    @pytest.fixture
    def simulator(self):
        return Pairs((X, X[:, 0]))

    @pytest.fixture
    def rule(self):
        return AffineRule(torch.ones(2, 3, dtype=torch.float64))


def test_all_pairs_in_order():
    pairs = Pairs(X.numpy(), 2 * X)
    trajectory = pairs(nn.Identity())
    assert torch.equal(trajectory.context, X)
    assert torch.equal(trajectory.decision, X)
    assert torch.equal(trajectory.target, 2 * X)
    assert isinstance(pairs, FiniteSimulator)
    assert (len(pairs), repr(pairs)) == (10, "Pairs(10 samples, x (2,), s (2,))")


def test_a_batch_is_drawn_without_replacement():
    trajectory = Pairs(X, 2 * X)(nn.Identity(), 10, torch.Generator().manual_seed(0))
    assert not torch.equal(trajectory.context, X)
    assert torch.equal(trajectory.context.sort(0).values, X)
    assert torch.equal(trajectory.target, 2 * trajectory.context)


def test_subset_and_fingerprint():
    pairs = Pairs((X, X + 1), X)
    part = pairs.subset(torch.tensor([3, 1]))
    assert torch.equal(part.x[1], X[[3, 1]] + 1)
    assert torch.equal(part.s, X[[3, 1]])
    assert pairs.fingerprint() == Pairs((X, X + 1), X).fingerprint() != Pairs((X, X + 2), X).fingerprint()


def test_recursive_rules_see_sequences():
    class Sum(DecisionRule):
        def start(self, x):
            return torch.zeros_like(x)

        def decide(self, x, memory):
            return memory + x, memory + x

    assert torch.equal(Pairs(X)(Sum()).decision, X.cumsum(1))


def test_a_rule_that_reports_failures():
    def rule(x):
        collector().add(x[:, 0] == 4)
        return x

    assert Pairs(X)(rule).failed.tolist() == [i == 2 for i in range(10)]
    assert collector() is None


def test_failures_of_many_decisions_per_sample():
    with collect_failures() as failures:
        collector().add(torch.tensor([[False, True], [False, False]]))
        collector().add(torch.tensor([False, False, False, False]))
    assert failures.mask(2).tolist() == [True, False]
    assert failures.mask(3).tolist() == [True, True, True]  # two samples against three: cannot be told apart


def test_bad_input():
    with pytest.raises(ShapeError, match=r"shapes \(10, 2\), \(3, 2\)"):
        Pairs(X, X[:3])
    with pytest.raises(TypeError, match="x must be a tensor"):
        Pairs([1.0, 2.0])
    with pytest.raises(OptionError, match="batch_size must lie between 0 and 10"):
        Pairs(X)(nn.Identity(), 11)
    with pytest.raises(ShapeError, match=r"batch first: \(10, ...\), got \(2,\)"):
        Pairs(X)(lambda x: x.sum(0))


def test_trajectory_checks_and_selects():
    trajectory = Trajectory((X, X), X, state={"z": X}, cost=X[:, 0])
    assert trajectory.failed.tolist() == [False] * 10
    picked = trajectory.select(torch.tensor([True, False] * 5))
    assert len(picked) == 5
    assert torch.equal(picked.state["z"], X[::2])
    assert torch.equal(picked.context[1], X[::2])
    with pytest.raises(ShapeError, match=r"trajectory.target has shape \(3, 2\), expected batch size 10"):
        Trajectory(X, X, target=X[:3])
    with pytest.raises(TypeError, match="a decision is a tensor"):
        Trajectory(X, None)
