import copy
import pickle

import cvxpy as cp
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from contracts import RuleContract
from reference import assert_gradients_match_differences, close, tensor
from safetensors.torch import load_file, save_file
from torch import nn

from convexlearn import ConvexRule, Role
from convexlearn.errors import CompileError, DomainError, MissingParameterError, OptionError, ShapeError, SolverError

RHO = 0.5


def shrinkage(rho=RHO, **attributes):
    """s = sign(x) max(|x| - rho w, 0), for the learned rho >= 0 and w."""
    s, x = cp.Variable(3, name="s"), cp.Parameter(3, name="x")
    rho = cp.Parameter(nonneg=True, name="rho", value=rho)
    offset = cp.Parameter(3, name="offset", value=np.zeros(3))
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(s - x - offset) + rho * cp.norm1(s)))
    return problem, x, s, rho, offset


def threshold(x, rho):
    return x.sign() * (x.abs() - rho).clamp(min=0)


def rule_of(**options):
    problem, x, s, *_ = shrinkage()
    return ConvexRule(problem, context=[x], decision=s, **options)


@pytest.mark.parametrize("learn", ["rho", ["rho"]])
def test_one_parameter_to_learn_needs_no_list(learn):
    x, s, rho = cp.Parameter(2, name="x"), cp.Variable(2), cp.Parameter(nonneg=True, name="rho", value=0.3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(s - x) + rho * cp.norm1(s)))
    assert [name for name, _ in ConvexRule(problem, x, s, learn=learn).named_parameters()] == ["free.rho"]
    assert [name for name, _ in ConvexRule(problem, x, s, learn=rho).named_parameters()] == ["free.rho"]
    with pytest.raises(CompileError, match="context must be parameters of the problem themselves, got 'x'"):
        ConvexRule(problem, ["x"], s)
    with pytest.raises(CompileError, match=r"must be a cvxpy\.Problem, got Minimize"):
        ConvexRule(problem.objective, [x], s)


def double(x):
    return 2 * x


@pytest.fixture
def x():
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class TestContract(RuleContract):
    tolerance = 1e-9

    @pytest.fixture
    def rule(self):
        return rule_of()

    @pytest.fixture
    def context(self):
        return torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3)


class TestContractWithPart(RuleContract):
    """Two contexts, an expression as decision, a network as features."""

    tolerance = 1e-9

    @pytest.fixture
    def rule(self):
        torch.manual_seed(0)
        problem, x, s, _, offset = shrinkage()
        features = Pair()
        return ConvexRule(problem, [x, offset], s[1:] + 1, features=features)

    @pytest.fixture
    def context(self):
        t = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3)
        return t, t.flip(0) / 2


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, x, y):
        return self.linear(x.to(self.linear.weight.dtype)).to(x.dtype), y


class TestLearn:
    def test_default_is_all_but_context(self, x):
        rule = rule_of()
        assert set(rule.learned) == {"rho", "offset"}
        assert set(dict(rule.named_parameters())) == {"free.rho", "free.offset"}
        close(rule(x).detach(), threshold(x, RHO), 1e-9)

    @pytest.mark.parametrize("names", [True, False])
    def test_explicit_choice(self, x, names):
        problem, context, s, rho, _ = shrinkage()
        rule = ConvexRule(problem, [context], s, learn=["rho" if names else rho])
        assert rule.learned == ("rho",)
        assert set(rule.state_dict()) == {"free.rho"}
        assert not rule.offset.requires_grad
        assert torch.equal(rule.offset, torch.zeros(3, dtype=torch.float64))
        assert "offset" in dict(rule.named_buffers())

    def test_nothing(self, x):
        rule = rule_of(learn=[])
        assert not list(rule.parameters())
        close(rule(x), threshold(x, RHO), 1e-9)
        assert not rule(x).requires_grad

    def test_learn_and_freeze(self, x):
        rule = rule_of(learn=["rho"]).freeze("rho")
        assert not list(rule.parameters())
        close(rule.rho, tensor(RHO), 1e-12)
        rule.learn("offset")
        assert rule.learned == ("offset",)
        rule(x).sum().backward()
        close(rule.free["offset"].grad, (threshold(x, RHO) != 0).double().sum(0), 1e-8)

    def test_wrong_names(self):
        problem, x, s, *_ = shrinkage()
        with pytest.raises(OptionError, match="no parameter named 'roh'; did you mean 'rho'"):
            ConvexRule(problem, [x], s, learn=["roh"])
        with pytest.raises(OptionError, match="'x' is context"):
            ConvexRule(problem, [x], s, learn=[x])
        with pytest.raises(CompileError, match="context parameter 'y' is not in the problem"):
            ConvexRule(problem, [cp.Parameter(3, name="y")], s)
        with pytest.raises(OptionError, match="has no parameter 'roh'"):
            rule_of().learn("roh")

    def test_names_are_needed(self):
        s, x, rho = cp.Variable(3), cp.Parameter(3, name="x"), cp.Parameter(nonneg=True, value=1.0)
        problem = cp.Problem(cp.Minimize(cp.sum_squares(s - x) + rho * cp.norm1(s)))
        with pytest.raises(OptionError, match=r"needs a name: cp\.Parameter"):
            ConvexRule(problem, [x], s)
        with pytest.raises(OptionError, match="no Python identifier"):
            self.named("my rho")
        with pytest.raises(OptionError, match="is taken"):
            self.named("forward")

    def named(self, name):
        s, x, rho = cp.Variable(3), cp.Parameter(3, name="x"), cp.Parameter(nonneg=True, value=1.0, name=name)
        return ConvexRule(cp.Problem(cp.Minimize(cp.sum_squares(s - x) + rho * cp.norm1(s))), [x], s)

    def test_values_are_needed(self):
        problem, x, s, rho, _ = shrinkage()
        rho._value = None
        with pytest.raises(MissingParameterError, match="'rho' is neither context nor has it a value"):
            ConvexRule(problem, [x], s)

    def test_sparse_and_diagonal_parameters(self, x):
        s, context = cp.Variable(3), cp.Parameter(3, name="x")
        D = cp.Parameter((3, 3), diag=True, name="D")
        D.value = np.diag([1.0, 2.0, 4.0])
        rule = ConvexRule(cp.Problem(cp.Minimize(cp.sum_squares(D @ s - context))), [context], s)
        close(rule(x).detach(), x / tensor([1.0, 2.0, 4.0]), 1e-9)
        assert rule.count_parameters()[Role.OBJECTIVE] == 3
        S = cp.Parameter((3, 3), sparsity=(np.arange(3), np.arange(3)), name="S")
        S.value_sparse = sp.coo_array((np.array([1.0, 2.0, 4.0]), (np.arange(3), np.arange(3))), shape=(3, 3))
        sparse = ConvexRule(cp.Problem(cp.Minimize(cp.sum_squares(S @ s - context))), [context], s)
        close(sparse(x).detach(), x / tensor([1.0, 2.0, 4.0]), 1e-9)


class TestDomain:
    def test_kept_under_optimizer_steps(self, x):
        rule = rule_of()
        optimizer = torch.optim.SGD(rule.parameters(), lr=5.0)
        for _ in range(15):
            optimizer.zero_grad()
            (rule(x) - 2 * x).square().sum().backward()
            optimizer.step()
            assert rule.rho >= 0
        assert rule.rho < 1e-3

    def test_psd_parameters(self, x):
        s, context = cp.Variable(3), cp.Parameter(3, name="x")
        P = cp.Parameter((3, 3), PSD=True, name="P", value=np.eye(3))
        rule = ConvexRule(cp.Problem(cp.Minimize(0.5 * cp.quad_form(s, P) - context @ s)), [context], s)
        optimizer = torch.optim.SGD(rule.parameters(), lr=0.01)
        for _ in range(10):
            optimizer.zero_grad()
            rule(x).square().sum().backward()
            optimizer.step()
            assert torch.linalg.eigvalsh(rule.P.detach()).min() >= 0
        close(rule(x).detach(), torch.linalg.solve(rule.P, x.mT).mT.detach(), 1e-8)

    def test_assignment(self, x):
        rule = rule_of()
        rule.rho = 0.25
        close(rule(x).detach(), threshold(x, 0.25), 1e-9)
        with pytest.raises(DomainError, match="'rho' must be nonnegative"):
            rule.rho = -1.0

    def test_gradient_of_a_boundary_value_is_not_zero(self, x):
        problem, context, s, rho, _ = shrinkage(rho=0.0)
        rule = ConvexRule(problem, [context], s, learn=[rho])
        rule(x).square().sum().backward()
        assert rule.free["rho"].grad.abs() > 1e-5
        assert 0 < rule.rho < 1e-2


class TestDecisions:
    def test_expression(self, x):
        problem, context, s, *_ = shrinkage()
        rule = ConvexRule(problem, context, 2 * s[1:] - 1)
        close(rule(x).detach(), 2 * threshold(x, RHO)[:, 1:] - 1, 1e-9)

    def test_list(self, x):
        problem, context, s, *_ = shrinkage()
        found = ConvexRule(problem, [context], [s, cp.sum(s)])(x)
        assert isinstance(found, tuple)
        close(found[0].detach(), threshold(x, RHO), 1e-9)
        close(found[1].detach(), threshold(x, RHO).sum(1), 1e-9)
        assert isinstance(ConvexRule(problem, [context], [s])(x), tuple)

    def test_several_contexts(self, x):
        problem, context, s, _, offset = shrinkage()
        rule = ConvexRule(problem, [context, offset], s)
        close(rule(x, x / 2).detach(), threshold(1.5 * x, RHO), 1e-9)
        decision, _ = rule.decide((x, x / 2))
        close(decision, rule(x, x / 2), 0)
        swapped = ConvexRule(problem, [offset, context], s)
        close(swapped(x / 2, x), rule(x, x / 2), 1e-12)
        with pytest.raises(ShapeError, match=r"2 context parameters \(x, offset\), got 1"):
            rule(x)

    def test_dtypes_and_numpy(self, x):
        rule = rule_of()
        assert rule(x.float()).dtype == torch.float32
        close(rule(x.float()).detach(), threshold(x.float(), RHO), 1e-6)
        found = rule(x.numpy())
        assert found.dtype == torch.float64
        close(found.detach(), threshold(x, RHO), 1e-9)
        assert rule(x.numpy().astype(np.float32)).dtype == torch.float32
        rule.float()
        assert rule(x.float()).dtype == torch.float32
        assert rule(x).dtype == torch.float64

    def test_unbatched(self, x):
        close(rule_of()(x[0]).detach(), threshold(x[0], RHO), 1e-9)
        close(rule_of()(x.reshape(5, 1, 3)).detach(), threshold(x, RHO)[:, None], 1e-9)

    def test_gradients_match_differences(self, x):
        rule = rule_of()

        def decide(x, rho, offset):
            with torch.no_grad():
                assert rule.rho >= 0
            arguments = {"free.rho": rho, "free.offset": offset}
            return (torch.func.functional_call(rule, arguments, (x,)),)

        start = [x, rule.free["rho"].detach(), rule.free["offset"].detach()]
        assert_gradients_match_differences(decide, start)


class TestFeatures:
    def test_function(self, x):
        rule = rule_of(features=double)
        close(rule(x).detach(), threshold(2 * x, RHO), 1e-9)
        leaf = x.clone().requires_grad_()
        rule(leaf).sum().backward()
        close(leaf.grad, 2 * (threshold(2 * x, RHO) != 0).double(), 1e-8)
        close(pickle.loads(pickle.dumps(rule))(x), rule(x), 0)

    def test_module_is_trained(self, x):
        torch.manual_seed(0)
        network = nn.Linear(3, 3, dtype=torch.float64)
        rule = rule_of(features=network)
        assert rule.count_parameters() == {Role.OBJECTIVE: 4, Role.HYPER: 0, Role.NETWORK: 12}
        rule(x).sum().backward()
        assert network.weight.grad.abs().sum() > 0
        assert {"features.weight", "features.bias"} <= set(rule.state_dict())

    def test_what_dpp_cannot_express(self, x):
        """The ratio of two contexts, one of which is positive."""
        s, ratio = cp.Variable(3), cp.Parameter(3, name="ratio")
        rule = ConvexRule(cp.Problem(cp.Minimize(cp.sum_squares(s - ratio))), [ratio], s, features=lambda a, b: a / b)
        close(rule(x, 1 + x**2), x / (1 + x**2), 1e-9)


class TestCopies:
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
    def test_values_and_choices_survive(self, x, duplicate):
        rule = rule_of(learn=["rho"], on_failure="nan", eps=1e-10)
        rule.rho = 0.3
        rule.freeze("rho").learn("offset")
        rule.offset = torch.ones(3, dtype=torch.float64)
        other = duplicate(rule)
        assert other.learned == ("offset",)
        close(other(x), rule(x), 1e-12)
        assert other.layer.on_failure == "nan"
        other.offset = torch.zeros(3, dtype=torch.float64)
        close(rule.offset.detach(), torch.ones(3).double(), 1e-12)

    def test_the_callers_problem_may_change_later(self, x):
        problem, context, s, rho, _ = shrinkage()
        rule = ConvexRule(problem, [context], s)
        rho.value = 9.0
        close(pickle.loads(pickle.dumps(rule))(x).detach(), threshold(x, RHO), 1e-9)

    def test_problem_has_the_tuned_values(self, x):
        rule = rule_of()
        rule.rho = 0.3
        rule.offset = tensor([0.1, -0.2, 0.3])
        problem = rule.problem()
        values = {p.name(): p for p in problem.parameters()}
        assert values["x"].value is None
        assert values["rho"].value == pytest.approx(0.3)
        values["x"].value = x[0].numpy()
        problem.solve(solver="CLARABEL")
        np.testing.assert_allclose(problem.variables()[0].value, rule(x[0]).detach(), atol=1e-6)
        values["rho"].value = 5.0
        assert rule.rho.item() == pytest.approx(0.3)


class TestTraining:
    def test_in_a_sequential_model(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), rule_of(), nn.Linear(3, 1))
        inputs, wanted = torch.randn(16, 4), torch.randn(16, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        losses = []
        for _ in range(40):
            optimizer.zero_grad()
            loss = (model(inputs) - wanted).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]
        assert model(inputs).dtype == torch.float32
        assert "1.free.rho" in model.state_dict()

    def test_recovers_the_threshold(self, x):
        rule = rule_of(learn=["rho"])
        optimizer = torch.optim.Adam(rule.parameters(), lr=0.05)
        for _ in range(150):
            optimizer.zero_grad()
            (rule(x) - threshold(x, 0.2)).square().sum().backward()
            optimizer.step()
        assert rule.rho.item() == pytest.approx(0.2, abs=1e-3)


def ranged(**options):
    """s nearest to x in [low, 1]: infeasible for low > 1."""
    s, x, low = cp.Variable(2), cp.Parameter(2, name="x"), cp.Parameter(name="low")
    gain = cp.Parameter(name="gain", value=1.0)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(s - x - gain)), [s >= low, s <= 1])
    return ConvexRule(problem, [x, low], s, **options)


class TestFailures:
    x = tensor([[-1.0, -0.5], [-0.2, -0.3], [-0.6, -0.7]])
    low = tensor([-5.0, 2.0, -5.0])

    def test_raise_and_nan(self):
        with pytest.raises(SolverError, match="sample 1 is INFEASIBLE"):
            ranged()(self.x, self.low)
        found = ranged(on_failure="nan")(self.x, self.low)
        assert found.isnan().all(1).tolist() == [False, True, False]

    def test_fallback_value(self):
        rule = ranged(on_failure="fallback", fallback=tensor([7.0, 8.0]))
        found = rule(self.x, self.low)
        close(found.detach(), tensor([[0.0, 0.5], [7.0, 8.0], [0.4, 0.3]]), 1e-8)
        found.sum().backward()
        assert rule.free["gain"].grad.item() == pytest.approx(4.0, abs=1e-8)

    def test_rollout_repeats_the_last_decision(self):
        rule = ranged(on_failure="fallback")
        first, memory = rule.decide((self.x, self.low), rule.start((self.x, self.low)))
        close(first.detach()[1], torch.zeros(2).double(), 0)
        good, memory = rule.decide((self.x, self.low.clamp(max=0)), memory)
        close(good.detach()[1], tensor([0.8, 0.7]), 1e-8)
        again, memory = rule.decide((2 * self.x, self.low), memory)
        close(again.detach()[1], tensor([0.8, 0.7]), 1e-8)
        close(again.detach()[0], tensor([-1.0, 0.0]), 1e-8)
        again[1].sum().backward(retain_graph=True)
        assert not rule.free["gain"].grad.any()
        again[0].sum().backward()
        assert rule.free["gain"].grad.item() == pytest.approx(2.0, abs=1e-8)
        third, _ = rule.decide((self.x, self.low), memory)
        close(third.detach()[1], tensor([0.8, 0.7]), 1e-8)

    def test_warm_start_of_a_rollout_agrees_with_cold_starts(self):
        rule = ranged()
        memory = None
        for t in range(4):
            x = self.x + 0.3 * t
            decision, memory = rule.decide((x, self.low.clamp(max=0)), memory)
            close(decision, rule(x, self.low.clamp(max=0)), 1e-9)


def test_options_reach_the_solver():
    with pytest.raises(OptionError, match="did you mean 'tolerance'"):
        rule_of(tolerence=1e-3)
    assert rule_of(solver="dense").layer.solver.name == "dense"


def test_repr_shows_learned_and_fixed():
    text = repr(rule_of(learn=["rho"]))
    for part in ("rho: () nonnegative, learned objective parameter", "offset: (3,) unconstrained, fixed", "solver:"):
        assert part in text


def test_count_parameters():
    assert rule_of().count_parameters() == {Role.OBJECTIVE: 4, Role.HYPER: 0, Role.NETWORK: 0}
    assert rule_of(learn=["rho"]).count_parameters()[Role.OBJECTIVE] == 1


def test_safetensors_round_trip(x, tmp_path):
    tuned = rule_of()
    tuned.rho = 0.2
    save_file(tuned.state_dict(), tmp_path / "rule.safetensors")
    fresh = rule_of()
    fresh.load_state_dict(load_file(tmp_path / "rule.safetensors"))
    assert torch.equal(fresh(x), tuned(x))
    assert not torch.equal(rule_of()(x), tuned(x))
