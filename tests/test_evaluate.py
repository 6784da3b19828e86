import math
import time

import pytest
import torch
from torch import nn

from convexlearn.errors import FailureWarning, OptionError, ShapeError, SolverError
from convexlearn.evaluate import FEW, SAMPLES, Evaluation, evaluate
from convexlearn.failures import collect_failures, collector
from convexlearn.objectives import cost, known_squared_error, squared_error
from convexlearn.rules.base import DecisionRule
from convexlearn.simulate.base import Trajectory
from convexlearn.simulate.pairs import Pairs

X = torch.arange(6, dtype=torch.float64).reshape(6, 1)
PAIRS = Pairs(X, 0 * X)


def noisy(rule, batch_size, generator):
    """A simulator without length: x is noise, the cost is |s| per step."""
    x = torch.randn(batch_size, 3, generator=generator, dtype=torch.float64)
    s = rule(x)
    return Trajectory(x, s, cost=s.abs())


def failing(x):
    return torch.where(x == 4, torch.nan, x)


def test_mean_and_standard_error_by_hand():
    result = evaluate(nn.Identity(), PAIRS, squared_error)
    assert result.values.tolist() == [0, 1, 4, 9, 16, 25]
    assert result.mean == pytest.approx(55 / 6)
    assert result.standard_error == pytest.approx(result.values.std().item() / math.sqrt(6))
    assert result.failures == 0
    assert repr(result).startswith("9.167 ± 3.98, ")
    assert "ms per decision (6 samples)" in repr(result)


@pytest.mark.parametrize("batch_size", [1, 4, 6, 100])
def test_batches_give_the_same(batch_size):
    result = evaluate(nn.Identity(), PAIRS, squared_error, batch_size=batch_size)
    assert result.values.tolist() == [0, 1, 4, 9, 16, 25]


def test_several_objectives_on_one_simulation():
    results = evaluate(nn.Identity(), noisy, {"cost": cost, "energy": lambda t: t.decision.square().sum(1)}, samples=5)
    again = evaluate(nn.Identity(), noisy, cost, samples=5)
    assert list(results) == ["cost", "energy"]
    assert torch.equal(results["cost"].values, again.values)


def test_samples_and_seed():
    assert len(evaluate(nn.Identity(), noisy, cost).values) == SAMPLES
    a, b, c = (evaluate(nn.Identity(), noisy, cost, samples=7, batch_size=3, seed=s) for s in (0, 0, 1))
    assert len(a.values) == 7
    assert torch.equal(a.values, b.values)
    assert not torch.equal(a.values, c.values)
    some = evaluate(nn.Identity(), PAIRS, squared_error, samples=3)
    assert set(some.values.tolist()) < {0, 1, 4, 9, 16, 25}
    assert len(some.values) == 3


def test_failed_samples_are_left_out_and_named():
    with pytest.warns(FailureWarning, match="1 of 6 samples failed: 4; they are left out"):
        result = evaluate(failing, PAIRS, squared_error, batch_size=4)
    assert result.mean == pytest.approx(39 / 5)
    assert (result.failures, result.failed) == (1, (4,))
    assert result.values.isnan().tolist() == [False] * 4 + [True, False]
    assert "1 failed" in repr(result)


def test_over_half_failed_is_an_error():
    with pytest.raises(SolverError, match="4 of 6 samples failed: 2, 3, 4, 5"):
        evaluate(lambda x: torch.where(x >= 2, torch.nan, x), PAIRS, squared_error)


def test_the_rule_is_in_eval_mode_and_left_as_it_was():
    network = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(1)).double()
    network[1].eval()
    state = torch.get_rng_state()
    evaluate(network, PAIRS, squared_error)
    assert [part.training for part in network.modules()] == [True, True, False]
    assert torch.equal(state, torch.get_rng_state())


def test_time_is_spent_in_the_rule_only():
    def simulator(rule, batch_size, generator):
        time.sleep(0.05)
        x = torch.zeros(batch_size, 4, 2)
        memory = rule.start(x[:, 0])
        for t in range(4):
            s, memory = rule.decide(x[:, t], memory)
        return Trajectory(x, s, cost=s.sum(1))

    class Slow(DecisionRule):
        def decide(self, x, memory):
            time.sleep(0.005)
            return x, memory

    seconds = evaluate(Slow(), simulator, cost, samples=2).seconds_per_decision
    assert 0.0025 <= seconds < 0.05 / 8 + 0.0025
    sequences = Pairs(torch.zeros(2, 4, 1), torch.zeros(2, 4, 1))
    assert evaluate(Slow(), sequences, squared_error).seconds_per_decision >= 0.0025


class Compiling(DecisionRule):
    """Slow at its first call, random, and without a decision for x > 4; counts its calls."""

    compiles_when_called = True

    def __init__(self):
        super().__init__()
        self.sizes = []

    def decide(self, x, memory=None):
        if not self.sizes and self.compiles_when_called:
            time.sleep(0.3)
        self.sizes.append(len(x))
        collector().add(x[:, 0] > 4)
        return x + torch.rand(len(x), 1, dtype=x.dtype), memory


class Prompt(Compiling):
    compiles_when_called = False


def rolled_out(rule, batch_size, generator):
    """Three decisions for each sample."""
    x = torch.rand(batch_size, 3, 1, generator=generator, dtype=torch.float64) * 4.5
    with collect_failures() as failures:
        memory, decisions = rule.start(x[:, 0]), []
        for t in range(3):
            s, memory = rule.decide(x[:, t], memory)
            decisions.append(s)
    return Trajectory(x, torch.stack(decisions, 1), cost=sum(decisions)[:, 0], failed=failures.mask(batch_size))


SEQUENCES = Pairs(X.repeat(5, 4)[:, :, None], X.repeat(5, 4)[:, :, None])


@pytest.mark.parametrize("simulator", [rolled_out, SEQUENCES, Pairs(X[:, None], X[:, None])])
@pytest.mark.filterwarnings("ignore::convexlearn.errors.FailureWarning")
def test_the_decision_that_compiles_is_not_timed_and_leaves_no_trace(simulator):
    judge = squared_error if isinstance(simulator, Pairs) else cost
    samples = None if isinstance(simulator, Pairs) else 30
    rules = Compiling(), Prompt()
    found, expected = (evaluate(rule, simulator, judge, samples=samples) for rule in rules)
    assert torch.equal(found.values.nan_to_num(), expected.values.nan_to_num())
    assert found.failed == expected.failed != ()
    assert found.seconds_per_decision < 0.3 / 30
    ahead = [min(FEW, len(found.values))] * (2 if simulator is SEQUENCES else 1)
    assert rules[0].sizes == [*ahead, *rules[1].sizes]


def test_a_decision_ahead_of_the_clock_that_fails_is_left_to_the_one_that_counts():
    class Refusing(Compiling):
        def decide(self, x, memory=None):
            raise ShapeError(f"batch {len(x)}")

    with pytest.raises(ShapeError, match="batch 30"):
        evaluate(Refusing(), SEQUENCES, squared_error)


def test_single_sample_has_no_standard_error():
    assert math.isnan(Evaluation(torch.ones(1)).standard_error)


def test_bad_options():
    with pytest.raises(OptionError, match=r"samples=7, but .* has 6"):
        evaluate(nn.Identity(), PAIRS, squared_error, samples=7)
    with pytest.raises(OptionError, match="batch_size must be an integer of at least 1"):
        evaluate(nn.Identity(), PAIRS, squared_error, batch_size=0)


def test_median_and_its_error():
    """The error is 1.2533 sigma / sqrt(N) for a normal sample; one outlier changes nothing."""
    values = torch.randn(10_001, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    evaluation = Evaluation(values)
    assert abs(evaluation.median) < 4 * evaluation.median_error
    assert abs(evaluation.median_error / (1.2533 / 100) - 1) < 0.15
    spoilt = Evaluation(torch.cat([values[:-1], torch.tensor([1e12, math.nan]).double()]), failed=(10_001,))
    assert abs(spoilt.median - evaluation.median) < 0.01
    assert math.isnan(Evaluation(torch.ones(1)).median_error)
    difference = spoilt - Evaluation(torch.zeros(10_002), failed=(3,))
    assert difference.failed == (3, 10_001)


def test_what_is_no_simulator_or_objective():
    with pytest.raises(OptionError, match="evaluate: tuple is no simulator"):
        evaluate(nn.Identity(), (torch.ones(3, 2), torch.ones(3, 2)), squared_error)
    with pytest.raises(OptionError, match="function of a Trajectory alone"):
        evaluate(nn.Identity(), PAIRS, {"mse": nn.functional.mse_loss})


@pytest.mark.parametrize("batch_size", [None, 4])
def test_targets_that_are_no_numbers_are_named(batch_size):
    target = (0 * X).index_fill(0, torch.tensor([2, 5]), torch.nan)
    with pytest.warns(FailureWarning, match=r"'squared_error' is no number for samples 2.*whose target holds NaN"):
        result = evaluate(nn.Identity(), Pairs(X, target), squared_error, batch_size=batch_size)
    assert result.values.isnan().nonzero().flatten().tolist() == [2, 5]
    assert evaluate(nn.Identity(), Pairs(X, target), known_squared_error).values.tolist() == [0, 1, 0, 9, 16, 0]


def test_an_objective_that_is_no_number_without_cause_in_the_data():
    def logarithm(trajectory):
        return (trajectory.decision[:, 0] - 2.5).log()

    with pytest.warns(FailureWarning, match="'logarithm' is NaN for samples 0, 1, 2, although their target"):
        evaluate(nn.Identity(), PAIRS, logarithm)
