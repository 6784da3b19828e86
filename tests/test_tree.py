import copy
import pickle

import pytest
import torch
from contracts import RuleContract

from convexlearn.errors import OptionError, ShapeError
from convexlearn.objectives import squared_error
from convexlearn.rules.base import Role
from convexlearn.rules.tree import TreeRule
from convexlearn.simulate.pairs import Pairs
from convexlearn.tune import tune

LEVELS = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
X = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class TestOblique(RuleContract):
    @pytest.fixture
    def rule(self):
        return TreeRule(LEVELS, 3, depth=2)

    @pytest.fixture
    def context(self):
        return X[:4]


class TestAxisWithLearnedDecisions(TestOblique):
    @pytest.fixture
    def rule(self):
        return TreeRule(LEVELS, 3, splits="axis", learn_decisions=True, seed=1)

    @pytest.fixture
    def context(self):
        return X[:4, :2], X[:4, 2]


class TestScalarDecisions(TestOblique):
    @pytest.fixture
    def rule(self):
        return TreeRule(LEVELS[:, 0], 3, depth=1)


class TestHardened(TestOblique):
    @pytest.fixture
    def rule(self):
        return TreeRule(LEVELS, 3, depth=2, learn_decisions=True).harden()

    def test_gradients_reach_every_trainable_parameter(self, rule, context):
        rule(context).sum().backward()
        assert rule.free["decisions"].grad.abs().sum() > 0
        assert rule.free["weights"].grad is None


@pytest.mark.parametrize("splits", ["oblique", "axis"])
def test_hard_tree_equals_nested_conditions(splits):
    rule = TreeRule(LEVELS, 3, depth=3, splits=splits, seed=2).eval()
    rule.thresholds = torch.linspace(-0.5, 0.5, 7, dtype=torch.float64)

    def walk(x, node=0):
        if node >= 7:
            return LEVELS[rule.choices[node - 7].argmax()]
        w = rule.weights[node]
        score = x[w.argmax()] if splits == "axis" else w @ x
        return walk(x, 2 * node + (2 if score > rule.thresholds[node] else 1))

    assert torch.equal(rule(X), torch.stack([walk(x) for x in X]))
    assert set(map(tuple, rule(X).tolist())) <= set(map(tuple, LEVELS.tolist()))


@pytest.mark.parametrize("splits", ["oblique", "axis"])
def test_soft_tree_tends_to_the_hard_one(splits):
    rule = TreeRule(LEVELS, 3, depth=3, splits=splits, seed=3)
    hard = copy.deepcopy(rule).harden()(X)
    gaps = []
    for temperature in (1.0, 0.1, 1e-6):
        rule.temperature = temperature
        gaps.append((rule(X) - hard).abs().mean().item())
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-9


def test_a_context_with_nan_has_no_decision():
    rule, x = TreeRule(LEVELS, 3, depth=2), X[:4].clone()
    x[1, 2] = torch.nan
    for tree in (rule.train(), rule.eval()):
        lost = torch.isnan(tree(x)).all(1)
        assert lost.tolist() == [False, True, False, False]
        assert torch.isfinite(tree(x)[~lost]).all()


def test_leaf_probabilities_sum_to_one_and_match_brute_force():
    rule = TreeRule(LEVELS, 3, depth=2, temperature=0.7)
    p = rule._leaf_probabilities(X)
    c = torch.sigmoid((X @ rule.weights.mT - rule.thresholds) / 0.7)
    left, right = 1 - c[:, 0], c[:, 0]
    expected = torch.stack([left * (1 - c[:, 1]), left * c[:, 1], right * (1 - c[:, 2]), right * c[:, 2]], 1)
    torch.testing.assert_close(p, expected, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(p.sum(1), torch.ones(60, dtype=torch.float64), rtol=1e-14, atol=0)


def test_tuning_recovers_a_tree():
    target = torch.where(X[:, 0] > 0.3, 1.0, torch.where(X[:, 1] > 0, 0.0, -1.0)).double()
    rule = TreeRule(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64), 3, depth=2, seed=0)
    tune(rule, Pairs(X, target), squared_error, steps=300, learning_rate=0.1, progress=False,
         callback=lambda record: rule.anneal(0.985))  # fmt: skip
    wrong = (rule.eval()(X) != target).double().mean()
    assert wrong < 0.07


def test_hardness_survives_copies():
    rule = TreeRule(LEVELS, 3, depth=2).harden()
    for twin in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert twin.hard
        assert torch.equal(twin(X), rule(X))
    assert not TreeRule(LEVELS, 3).hard
    assert TreeRule(LEVELS, 3).eval().hard
    rule.temperature = 0.5
    rule.anneal(0.5)
    rule.anneal(1e-9)
    assert float(rule.temperature) == 1e-3


def test_seed_roles_and_description():
    assert torch.equal(TreeRule(LEVELS, 3, seed=1).weights, TreeRule(LEVELS, 3, seed=1).weights)
    assert not torch.equal(TreeRule(LEVELS, 3, seed=1).weights, TreeRule(LEVELS, 3, seed=2).weights)
    counts = TreeRule(LEVELS, 3, depth=2).count_parameters()
    assert counts == {Role.OBJECTIVE: 3 * 3 + 3 + 4 * 3, Role.HYPER: 0, Role.NETWORK: 0}
    text = TreeRule(LEVELS, 3, depth=2, splits="axis").describe()
    assert text.count("if 1 x") == 3
    assert text.count("s = (") == 4


def test_mistakes_are_named():
    with pytest.raises(OptionError, match="splits is 'oblique'"):
        TreeRule(LEVELS, 3, splits="diagonal")
    with pytest.raises(OptionError, match="depth must be an integer of at least 1, got 0"):
        TreeRule(LEVELS, 3, depth=0)
    with pytest.raises(ShapeError, match=r"decisions must have shape \(N, \.\.\.\)"):
        TreeRule(1.0, 3)
    with pytest.raises(ShapeError, match="x has 2 entries per sample, but the tree takes 3"):
        TreeRule(LEVELS, 3)(X[:, :2])
