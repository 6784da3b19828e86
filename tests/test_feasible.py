import copy
import pickle

import cvxpy as cp
import numpy as np
import pytest
import torch
from contracts import RuleContract
from reference import assert_gradients_match_differences, close, cvxpy_values, tensor
from torch import nn

import convexlearn as cl
from convexlearn import AffineRule, FeasibleRule, Role
from convexlearn.errors import CompileError, DomainError, MissingParameterError, OptionError, ShapeError, SolverError
from convexlearn.networks import mlp
from convexlearn.objectives import squared_error
from convexlearn.simulate.pairs import Pairs

SPREAD = np.array([[1.0, 0.5, -0.3], [0.2, -1.0, 0.7]])


def supply(network, **options):
    """Supplies s (3,) of a demand x (2,): 1's = 1'x, |M s| <= 1.5, 0 <= s <= 1.2."""
    s, x = cp.Variable(3, name="s"), cp.Parameter(2, name="x")
    constraints = [cp.sum(s) == cp.sum(x), cp.abs(SPREAD @ s) <= 1.5, s >= 0, s <= 1.2]
    if options.pop("completed", False):
        options["free"] = s[1:]
    return FeasibleRule(network, constraints, s, [x], **options)


def demand(batch=6):
    return torch.rand(batch, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.3


def doubled(n_out=3):
    return mlp(2, n_out, hidden=(8,), seed=0).double()


def shrink(x):
    return 0.4 * torch.stack([x[:, 0], x[:, 1], x.sum(1)], 1)


def assert_feasible(s, x, tolerance=1e-9):
    flows = (s @ tensor(SPREAD).mT).abs()
    assert float((s.sum(1) - x.sum(1)).abs().max()) < tolerance
    assert float((flows - 1.5).max()) < tolerance
    assert float(s.min()) > -tolerance
    assert float((s - 1.2).max()) < tolerance


class TestContract(RuleContract):
    tolerance = 1e-9

    @pytest.fixture
    def rule(self):
        return supply(doubled())

    @pytest.fixture
    def context(self):
        return demand()


class TestContractCompletion(RuleContract):
    """Free variables, a network in float32, a list of decisions, weights, features that leave one context out."""

    tolerance = 1e-5  # of the network

    @pytest.fixture
    def rule(self):
        s, t, x = cp.Variable(3, name="s"), cp.Variable((2, 1), name="t"), cp.Parameter(2, name="x")
        constraints = [cp.sum(s) == cp.sum(x), s >= -2, t[:, 0] == s[:2] - x]
        return FeasibleRule(
            Joined(), constraints, [s, t], [x], free=s[1:], weight=[1.0, 3.0], features=first
        )  # fmt: skip

    @pytest.fixture
    def context(self):
        return demand(), demand().flip(0)


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp(4, 2, hidden=(8,), seed=1)

    def forward(self, x, y):
        return self.layers(torch.cat([x, y], 1))


def first(x, y):
    return x


class TestProjection:
    def test_box_is_clamp(self):
        s, x = cp.Variable(3), cp.Parameter(name="x", nonneg=True)
        rule = FeasibleRule(lambda x: x[:, None] * tensor([1.0, -1.0, 5.0]), [cp.abs(s) <= x], s, x)
        x = tensor([0.5, 2.0])
        close(rule(x), x[:, None] * tensor([1.0, -1.0, 1.0]), 1e-10)

    def test_simplex(self):
        """Sorted thresholds: (y - tau)_+ with tau such that it sums to x."""
        s, x = cp.Variable(5), cp.Parameter(name="x")
        y = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        rule = FeasibleRule(lambda _: y, [cp.sum(s) == x, s >= 0], s, x)
        x = torch.linspace(0.5, 3.0, 7, dtype=torch.float64)
        ordered = y.sort(1, descending=True).values
        candidates = (ordered.cumsum(1) - x[:, None]) / torch.arange(1.0, 6.0, dtype=torch.float64)
        tau = candidates.gather(1, ((ordered > candidates).sum(1, keepdim=True) - 1))
        close(rule(x), (y - tau).clamp(min=0), 1e-10)

    @pytest.mark.parametrize("weight", [None, (1.0, 4.0, 0.25)])
    def test_equals_cvxpy(self, weight):
        x, rule = demand(), supply(shrink, weight=weight)
        found = rule(x)
        assert_feasible(found, x)
        s, d, y = cp.Variable(3), cp.Parameter(2), cp.Parameter(3)
        w = np.ones(3) if weight is None else np.array(weight)
        constraints = [cp.sum(s) == cp.sum(d), cp.abs(SPREAD @ s) <= 1.5, s >= 0, s <= 1.2]
        problem = cp.Problem(cp.Minimize(w @ cp.square(s - y)), constraints)
        for k in range(len(x)):
            d.value, y.value = x[k].numpy(), shrink(x)[k].numpy()
            close(found[k], cvxpy_values(problem, [s])[0], 1e-8)

    def test_leaves_a_feasible_output_alone(self):
        x = demand()
        inside = supply(shrink)(x).detach()
        close(supply(lambda _: inside)(x), inside, 1e-10)

    @pytest.mark.parametrize("options", [{}, {"completed": True}, {"weight": (1.0, 4.0, 0.25)}])
    def test_gradients(self, options):
        network = doubled(2 if "completed" in options else 3)
        rule = supply(network, **options)

        def run(x, weight):
            return (torch.func.functional_call(rule, {"network.2.weight": weight}, (x,)),)

        weight = dict(rule.named_parameters())["network.2.weight"].detach()
        assert_gradients_match_differences(run, [demand(), weight], step=1e-6, tolerance=1e-6)


class TestCompletion:
    def test_equalities_alone_give_the_rest(self):
        x, y = demand(), torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        s, d = cp.Variable(3), cp.Parameter(2, name="d")
        rule = FeasibleRule(lambda _: y, [cp.sum(s) == cp.sum(d)], s, d, free=s[1:])
        close(rule(x), torch.cat([(x.sum(1) - y.sum(1))[:, None], y], 1), 1e-10)

    def test_inequalities_move_the_free_variables_as_little_as_they_can(self):
        x, rule = demand(), supply(lambda x: shrink(x)[:, 1:], completed=True)
        found = rule(x)
        assert_feasible(found, x)
        s, d, y = cp.Variable(3), cp.Parameter(2), cp.Parameter(2)
        constraints = [cp.sum(s) == cp.sum(d), cp.abs(SPREAD @ s) <= 1.5, s >= 0, s <= 1.2]
        problem = cp.Problem(cp.Minimize(cp.sum_squares(s[1:] - y)), constraints)
        for k in range(len(x)):
            d.value, y.value = x[k].numpy(), shrink(x)[k, 1:].numpy()
            close(found[k], cvxpy_values(problem, [s])[0], 1e-8)

    def test_too_few_free_variables(self):
        s, x = cp.Variable(4), cp.Parameter(name="x")
        with pytest.raises(CompileError, match="leave 2 dimensions of the decision open"):
            FeasibleRule(nn.Identity(), [cp.sum(s) == x, s >= 0], s, x, free=s[0])
        FeasibleRule(nn.Identity(), [cp.sum(s) == x, s >= 0], s, x, free=s[:3])


class TestAsRule:
    def test_tunes_and_evaluates(self):
        x = demand(64)
        best = supply(lambda x: shrink(x) + 0.2)(x).detach()
        rule, pairs = supply(doubled()), Pairs(x, best)
        before = cl.evaluate(rule, pairs, squared_error).mean
        cl.tune(rule, pairs, squared_error, steps=60, learning_rate=1e-2, progress=False)
        after = cl.evaluate(rule, pairs, squared_error)
        assert after.mean < 0.1 * before
        assert_feasible(rule(x).detach(), x)

    def test_in_a_larger_model(self):
        x = demand()
        model = nn.Sequential(supply(doubled()), nn.Linear(3, 1, dtype=torch.float64))
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            close(twin(x), model(x), 1e-10)

    def test_counts_by_role(self):
        rule = supply(AffineRule(torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)))
        assert rule.count_parameters() == {Role.OBJECTIVE: 9, Role.HYPER: 0, Role.NETWORK: 0}
        assert supply(doubled()).count_parameters()[Role.NETWORK] == 51

    def test_other_parameters_keep_their_values_or_are_learned_by_name(self):
        s, x = cp.Variable(2), cp.Parameter(name="x")
        margin = cp.Parameter(nonneg=True, name="margin", value=0.25)
        rule = FeasibleRule(lambda x: -x[:, None].expand(-1, 2), [s >= x + margin], s, x)
        close(rule(tensor([1.0])), tensor([[1.25, 1.25]]), 1e-10)
        assert not list(rule.parameters())
        rule.learn("projection.margin")
        rule(tensor([1.0])).sum().backward()
        assert rule.count_parameters()[Role.OBJECTIVE] == 1

    def test_problem_is_the_projection(self):
        rule = supply(shrink)
        problem, x = rule.problem(), demand(1)
        values = {"x": x[0].numpy(), "network_output": shrink(x)[0].numpy()}
        for p in problem.parameters():
            p.value = values[p.name()]
        found = cvxpy_values(problem, problem.variables())
        assert any(v.shape == (3,) and torch.allclose(v, rule(x)[0], atol=1e-8) for v in found)


class TestFailures:
    """A demand above 3.6 cannot be met."""

    x = torch.cat([demand(3), tensor([[2.0, 2.0]])])

    def test_an_infeasible_context_is_named(self):
        with pytest.raises(SolverError, match=r"1 of 4 samples failed: sample 3 is INFEASIBLE"):
            supply(shrink)(self.x)

    def test_policies(self):
        found = supply(shrink, on_failure="nan")(self.x)
        assert torch.isnan(found[3]).all()
        assert_feasible(found[:3], self.x[:3])
        found = supply(shrink, on_failure="fallback", fallback=1.2)(self.x)
        close(found[3], torch.full((3,), 1.2, dtype=torch.float64))

    def test_a_simulation_marks_it(self):
        trajectory = Pairs(self.x)(supply(shrink))
        assert trajectory.failed.tolist() == [False, False, False, True]


class TestErrors:
    def test_width(self):
        with pytest.raises(ShapeError, match=r"the network gives \(6, 2\), but .* must return \(B, 3\)"):
            supply(doubled(2))(demand())

    def test_output_that_is_no_number(self):
        with pytest.raises(DomainError, match=r"'network_output' has a NaN or infinite entry nan in batch element 1"):
            supply(lambda x: shrink(x) * tensor([[1.0], [torch.nan], [1.0]]))(demand(3))

    def test_parameters(self):
        s, x, price = cp.Variable(2), cp.Parameter(name="x"), cp.Parameter(name="price")
        with pytest.raises(MissingParameterError, match="'price' is neither context nor has it a value"):
            FeasibleRule(nn.Identity(), [s >= x, s <= price], s, x)
        with pytest.raises(CompileError, match="'price' is in no constraint; they have"):
            FeasibleRule(nn.Identity(), [s >= x], s, [x, price])
        taken = cp.Parameter(2, name="network_output")
        with pytest.raises(OptionError, match="rename it"):
            FeasibleRule(nn.Identity(), [s >= taken], s, taken)

    def test_number_of_contexts(self):
        with pytest.raises(ShapeError, match="context parameters are x; got 2 values"):
            supply(lambda x, y: shrink(x))(demand(), demand())

    def test_constraints(self):
        s, x = cp.Variable(2), cp.Parameter(name="x")
        with pytest.raises(OptionError, match="constraints must be a list"):
            FeasibleRule(nn.Identity(), s >= x, s, x)
        with pytest.raises(OptionError, match="constraint 1 is True, no CVXPY constraint"):
            FeasibleRule(nn.Identity(), [s >= x, True], s, x)
        with pytest.raises(CompileError, match=r"constraint 0, .* is not convex"):
            FeasibleRule(nn.Identity(), [cp.norm(s) >= x], s, x)
        with pytest.raises(CompileError, match="must be a variable or an affine expression"):
            FeasibleRule(nn.Identity(), [s >= x], cp.abs(s), x)
        with pytest.raises(OptionError, match="weight must be positive"):
            FeasibleRule(nn.Identity(), [s >= x], s, x, weight=[1.0, 0.0])
