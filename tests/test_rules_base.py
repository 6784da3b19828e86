import copy
import io
import pickle

import numpy as np
import pytest
import torch
from contracts import RuleContract
from torch import nn

from convexlearn.domains import Domain
from convexlearn.errors import DomainError, MissingParameterError, OptionError, ShapeError
from convexlearn.rules.base import DecisionRule, ModuleRule, Role, as_rule
from convexlearn.rules.parameters import LearnedParameters, count_parameters, trainable

NONNEG = Domain.from_attributes((), {"nonneg": True})
PSD = Domain.from_attributes((2, 2), {"PSD": True})


class Shrink(DecisionRule):
    """Static: s = P x - rho, P fixed at the start."""

    def __init__(self, rho=0.5, *, P=None, features=None):
        super().__init__()
        self.declare("rho", rho, NONNEG, Role.HYPER)
        self.declare("P", np.eye(2) if P is None else P, PSD, Role.OBJECTIVE, learned=False)
        self.features = features

    def forward(self, *x):
        z = x[0] if self.features is None else self.features(x[0])
        return z @ self.P.to(z.dtype).mT - self.rho.to(z.dtype)


class Smooth(DecisionRule):
    """Recursive: s_t = gain x_t + (1 - gain) s_{t-1}, s_0 = 0; two contexts are summed."""

    def __init__(self):
        super().__init__()
        self.declare("gain", 0.25, Domain.from_attributes((), {"bounds": [0, 1]}), Role.OBJECTIVE)

    def start(self, x):
        return torch.zeros_like(x[0] + x[1])

    def decide(self, x, memory):
        gain = self.gain.to(x[0].dtype)
        s = gain * (x[0] + x[1]) + (1 - gain) * memory
        return s, s


@pytest.fixture
def x():
    return torch.linspace(-1, 2, 6, dtype=torch.float64).reshape(3, 2)


class TestStatic(RuleContract):
    @pytest.fixture
    def rule(self):
        return Shrink(features=nn.Linear(2, 2, dtype=torch.float64), P=[[2.0, 0.5], [0.5, 1.0]]).learn("P")

    @pytest.fixture
    def context(self, x):
        return x

    @pytest.mark.skip("its network is float64 throughout")
    def test_dtype_follows_input(self):
        pass


class TestRecursive(RuleContract):
    @pytest.fixture
    def rule(self):
        return Smooth()

    @pytest.fixture
    def context(self):
        first = torch.linspace(0, 1, 24, dtype=torch.float64).reshape(3, 4, 2)
        return first, first.flip(1)


class TestAdapter(RuleContract):
    @pytest.fixture
    def rule(self):
        return as_rule(nn.Linear(2, 3, dtype=torch.float64))

    @pytest.fixture
    def context(self, x):
        return x

    @pytest.mark.skip("a plain module does not cast")
    def test_dtype_follows_input(self):
        pass


def test_learned_parameters_appear_in_their_domain():
    rule = Shrink(0.1)
    assert rule.rho.item() == pytest.approx(0.1, rel=1e-12)
    assert rule.learned == ("rho",)
    assert list(rule.state_dict()) == ["free.rho"]
    with torch.no_grad():
        rule.free["rho"].fill_(-30.0)
    assert 0 < rule.rho.item() < 1e-12


def test_learn_and_freeze_keep_the_value():
    rule = Shrink(0.1, P=[[2.0, 0.5], [0.5, 1.0]])
    before = rule.P
    assert rule.learn("P") is rule
    torch.testing.assert_close(rule.P.detach(), before, rtol=1e-12, atol=0)
    assert list(trainable(rule)) == ["rho", "P"]
    assert rule.count_parameters() == {Role.OBJECTIVE: 3, Role.HYPER: 1, Role.NETWORK: 0}
    rule.freeze("rho")
    assert rule.rho.item() == pytest.approx(0.1, rel=1e-12)
    assert not rule.rho.requires_grad
    assert list(rule.state_dict()) == ["free.P"]
    rule.freeze()
    assert not list(rule.parameters())
    assert list(trainable(rule.learn())) == ["rho", "P"]


def test_learn_and_freeze_reach_networks_and_nested_rules():
    outer = Shrink(features=nn.Sequential(nn.Linear(2, 2), Shrink(0.3)))
    assert list(trainable(outer)) == ["rho", "features.0.weight", "features.0.bias", "features.1.rho"]
    assert outer.count_parameters() == {Role.OBJECTIVE: 0, Role.HYPER: 2, Role.NETWORK: 6}
    outer.freeze("features")
    assert list(trainable(outer)) == ["rho"]
    outer.learn("features.1.P", "features.0.bias")
    assert list(trainable(outer)) == ["rho", "features.0.bias", "features.1.P"]
    with pytest.raises(OptionError, match=r"no parameter 'features\.1\.Q'; did you mean 'features\.1\.P'"):
        outer.learn("features.1.Q")


def test_values_are_assigned_in_the_domain():
    rule = Shrink(0.1)
    rule.rho, rule.P = 0.7, 2 * np.eye(2)
    assert rule.rho.item() == pytest.approx(0.7, rel=1e-12)
    assert torch.equal(rule.P, 2 * torch.eye(2, dtype=torch.float64))
    with pytest.raises(DomainError, match="'rho' must be nonnegative, but its value is -1"):
        rule.rho = -1.0
    with pytest.raises(ShapeError, match="'rho' has shape"):
        rule.rho = [1.0, 2.0]


def test_gradients_flow_through_the_domain(x):
    rule = Shrink(0.5).learn("P")
    free = {f"free.{name}": parameter.detach().requires_grad_() for name, parameter in rule.free.items()}

    def run(*values):
        return torch.func.functional_call(rule, dict(zip(free, values)), (x,))

    assert torch.autograd.gradcheck(run, tuple(free.values()))


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("my rho", 0.1, OptionError, "no Python identifier"),
        ("lambda", 0.1, OptionError, "no Python identifier"),
        ("rho", 0.1, OptionError, "two parameters"),
        ("forward", 0.1, OptionError, "is taken"),
        ("items", 0.1, OptionError, "is taken"),
        ("mu", None, MissingParameterError, "'mu' has no value"),
        ("mu", [0.1, 0.2], ShapeError, r"'mu' must have shape \(\), got \(2,\)|must have shape"),
        ("mu", np.nan, DomainError, "'mu' must be finite"),
        ("mu", -1.0, DomainError, "'mu' must be nonnegative, but its value is -1"),
    ],
)
def test_bad_declarations(name, value, error, message):
    rule = Shrink()
    domain = NONNEG if np.ndim(value) == 0 else PSD
    with pytest.raises(error, match=message):
        rule.declare(name, value, domain)


def test_stacks_of_values_share_a_domain():
    module = LearnedParameters()
    module.declare("steps", torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), NONNEG)
    module.declare("covariances", torch.eye(2).expand(3, 2, 2), PSD)
    assert module.free["covariances"].shape == (3, 3)
    torch.testing.assert_close(module.covariances.detach(), torch.eye(2).expand(3, 2, 2))
    torch.testing.assert_close(module.steps.detach(), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))


def test_copies_keep_what_changed_after_construction(x):
    rule = Shrink(0.1, features=nn.Linear(2, 2)).learn("P").freeze("rho", "features")
    rule.rho = 0.9
    rule.to(torch.float32).eval()
    for twin in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert twin.learned == ("P",)
        assert twin.rho.item() == pytest.approx(0.9)
        assert not twin.training
        assert {p.dtype for p in twin.parameters()} == {torch.float32}
        assert list(trainable(twin)) == ["P"]
        assert torch.equal(twin(x.float()), rule(x.float()))


def test_a_pickle_draws_nothing_from_the_global_generator():
    class_with_network = pickle.dumps(Shrink(features=nn.Linear(2, 2)))
    before = torch.get_rng_state()
    pickle.loads(class_with_network)
    assert torch.equal(before, torch.get_rng_state())


def test_averaged_model_and_safe_loading(x):
    rule = Shrink(0.1)
    average = torch.optim.swa_utils.AveragedModel(rule)
    average.update_parameters(rule)
    rule.rho = 0.3
    average.update_parameters(rule)
    assert 0.1 < average.module.rho.item() < 0.3
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    fresh = Shrink(0.1)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(x), rule(x))


def test_recursive_rule_by_hand():
    x = torch.tensor([[1.0, 3.0, 0.0]], dtype=torch.float64)
    s = Smooth()(x, 0 * x)
    expected = torch.tensor([[0.25, 0.9375, 0.703125]], dtype=torch.float64)
    torch.testing.assert_close(s.detach(), expected, rtol=1e-12, atol=0)
    assert Smooth().recursive
    assert not Shrink().recursive


def test_bad_sequences_and_rules():
    with pytest.raises(ShapeError, match="T > 0"):
        Smooth()(torch.zeros(2, 0), torch.zeros(2, 0))
    with pytest.raises(NotImplementedError, match="must override forward, or start and decide"):
        DecisionRule()(torch.zeros(2, 1))
    with pytest.raises(MissingParameterError, match="context"):
        Smooth()()
    with pytest.raises(TypeError, match="or a function x"):
        as_rule(3)
    with pytest.raises(TypeError, match="or a function x"):
        as_rule(Shrink)


def test_as_rule():
    rule = Shrink()
    assert as_rule(rule) is rule
    assert isinstance(as_rule(torch.relu), ModuleRule)
    assert as_rule(torch.relu)(torch.tensor([-1.0])).item() == 0
    assert count_parameters(nn.Linear(2, 3))[Role.NETWORK] == 9


def test_repr_shows_the_parameters():
    text = repr(Shrink(0.1))
    assert "rho: () nonnegative, learned hyper parameter" in text
    assert "P: (2, 2) positive semidefinite, fixed" in text
