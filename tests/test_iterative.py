"""Converged and Unfolded as rules: contract, reports, training."""

import warnings

import pytest
import torch

import convexlearn as cl
from convexlearn.errors import LimitWarning, OptionError
from convexlearn.iterations.admm import ADMM
from convexlearn.iterations.proximal_gradient import FISTA, ISTA
from convexlearn.objectives import squared_error
from convexlearn.rules.iterative import Converged, HyperparameterWarning, Unfolded, iterate_loss
from convexlearn.rules.parameters import Role
from convexlearn.simulate.pairs import Pairs
from convexlearn.splitting import split
from tests.contracts import RuleContract
from tests.iteration_contract import N, contexts, lasso


def parts():
    problem, x, s = lasso()
    return split(problem, [x], s)


class TestUnfolded(RuleContract):
    @pytest.fixture
    def rule(self):
        return Unfolded(ISTA(parts()), 4, untie=["step", "threshold"])

    @pytest.fixture
    def context(self):
        return contexts()


class TestLISTA(TestUnfolded):
    @pytest.fixture
    def rule(self):
        return Unfolded(ISTA(parts()).free("W1", "W2"), 3, untie=["W1", "W2", "threshold"])


class TestPlugAndPlay(TestUnfolded):
    @pytest.fixture
    def rule(self):
        denoiser = torch.nn.Linear(N, N, dtype=torch.float64)
        return Unfolded(ADMM(parts(), prox=denoiser), 3, untie=["penalty"])

    def test_dtype_follows_input(self):
        pytest.skip("a network in a slot has a dtype of its own")


class TestConverged(TestUnfolded):
    @pytest.fixture
    def rule(self):
        return Converged(FISTA(parts()), tol=1e-10)

    def test_dtype_follows_input(self):
        rule = Converged(FISTA(parts()), tol=1e-5)
        assert rule(contexts().float()).dtype == torch.float32


def test_counts_by_role():
    counts = Unfolded(ISTA(parts()).free("W1"), 3, untie=["W1", "threshold"]).count_parameters()
    assert counts == {Role.OBJECTIVE: 3 * N * 5, Role.HYPER: 3, Role.NETWORK: 0}


def test_the_report_is_per_sample():
    xs = contexts() * torch.tensor([[0.0], [1.0], [1.0]])
    rule = Converged(ISTA(parts()), max_iterations=20, learn=[])
    result = rule.solve(xs)
    assert result.converged.tolist() == [True, False, False]
    assert result.iterations.tolist() == [1, 20, 20]
    with pytest.warns(LimitWarning, match=r"2 of 3 samples \(1, 2\) did not converge within 20 steps"):
        rule(xs)


def test_learning_a_hyperparameter_of_a_converged_solution_is_answered():
    rule = Converged(ISTA(parts()), learn=["rho"])
    with pytest.warns(HyperparameterWarning, match=r"implicit gradient is zero; train it at a fixed number of steps"):
        rule.learn("step")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Converged(ISTA(parts(), prox=torch.nn.Identity()), learn=["step"])
        Converged(ISTA(parts()), learn=["step"], gradient="unroll")
        Unfolded(ISTA(parts()), 3, learn=["step"])


def test_example_14_at_fixed_k_learns_hyperparameters():
    target = Converged(FISTA(parts()), learn=[])(contexts(16))
    net = Unfolded(ADMM(parts()), 4, learn=["penalty", "step"])
    history = cl.tune(net, Pairs(contexts(16), target), squared_error, steps=30, learning_rate=0.1, progress=False)
    assert net.penalty.shape == net.step.shape == ()
    assert history.best["value"] < 0.8 * history[0]["loss"]


def test_unfolded_steps_may_exceed_the_convergent_range():
    net = Unfolded(ISTA(parts()), 2, untie=["step"])
    net.step = torch.tensor([3.0, 5.0], dtype=torch.float64)
    assert net.step.tolist() == pytest.approx([3.0, 5.0])


def test_layer_wise_losses():
    xs, net = contexts(), Unfolded(ISTA(parts()), 3, untie=["step", "threshold"])
    target = torch.zeros(3, N, dtype=torch.float64)
    errors = net.iterates(xs)[1:].square().sum(-1)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) / 6
    torch.testing.assert_close(iterate_loss(net, xs, target), weights @ errors)
    first = net.truncated(1)(xs).square().sum()
    first.backward()
    gradient = net.free["step"].grad
    assert gradient[0] != 0
    assert gradient[1:].tolist() == [0, 0]


def test_unknown_names_are_refused():
    with pytest.raises(OptionError, match="did you mean 'step'"):
        Unfolded(ISTA(parts()), 3, untie=["stepp"])
    with pytest.raises(OptionError, match="at least 1"):
        Unfolded(ISTA(parts()), 0)
    with pytest.raises(OptionError, match="did you mean 'unroll'"):
        Converged(ISTA(parts()), gradient="unrolled")
    with pytest.raises(OptionError, match="layers must lie between 1 and 3"):
        Unfolded(ISTA(parts()), 3).truncated(4)
