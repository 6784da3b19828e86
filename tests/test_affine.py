import numpy as np
import pytest
import torch
from contracts import RuleContract

from convexlearn.errors import ShapeError
from convexlearn.rules.affine import AffineRule
from convexlearn.rules.base import Role


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    return torch.tensor(rng.normal(size=(30, 4))), torch.tensor(rng.normal(size=(30, 3)))


class TestAffineRule(RuleContract):
    @pytest.fixture
    def rule(self):
        W = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)
        return AffineRule(W, torch.ones(2, dtype=torch.float64))

    @pytest.fixture
    def context(self, pairs):
        return pairs[0][:4]


class TestAffineImages(RuleContract):
    @pytest.fixture
    def rule(self):
        return AffineRule(torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(4, 5), shape=(2, 2))

    @pytest.fixture
    def context(self, pairs):
        return pairs[0][:4].reshape(4, 2, 2), pairs[1][:4, 0]


def test_equals_the_formula(pairs):
    W, b = pairs[1][:2, :3], pairs[1][2, :2]
    x = pairs[1][5:9]
    rule = AffineRule(W, b)
    torch.testing.assert_close(rule(x).detach(), x @ W.mT + b, rtol=1e-14, atol=1e-14)
    assert rule.count_parameters() == {Role.OBJECTIVE: 8, Role.HYPER: 0, Role.NETWORK: 0}


def test_fit_is_least_squares(pairs):
    x, s = pairs
    rule = AffineRule.fit(x, s)
    X = np.column_stack([x.numpy(), np.ones(len(x))])
    solution = np.linalg.lstsq(X, s.numpy(), rcond=None)[0]
    np.testing.assert_allclose(rule.W.detach().numpy(), solution[:-1].T, rtol=0, atol=1e-12)
    np.testing.assert_allclose(rule.b.detach().numpy(), solution[-1], rtol=0, atol=1e-12)


def test_fit_without_intercept_and_underdetermined(pairs):
    x, s = pairs[0][:2], pairs[1][:2]
    rule = AffineRule.fit(x, s, intercept=False)
    solution = np.linalg.lstsq(x.numpy(), s.numpy(), rcond=None)[0]  # smallest norm
    np.testing.assert_allclose(rule.W.detach().numpy(), solution.T, rtol=0, atol=1e-12)
    assert rule.learned == ("W",)


def test_fit_with_ridge_is_stationary(pairs):
    x, s = pairs
    rule, ridge = AffineRule.fit(x, s, ridge=0.3), 0.3
    loss = (rule(x) - s).square().sum() / len(x) + ridge * rule.W.square().sum()
    for gradient in torch.autograd.grad(loss, list(rule.parameters())):
        assert gradient.abs().max() < 1e-12


def test_fit_keeps_shape_and_dtype_of_decisions(pairs):
    x, s = pairs[0].float().reshape(30, 2, 2), pairs[1].float().reshape(30, 3, 1)
    rule = AffineRule.fit((x, x[:, 0, 0]), s)
    out = rule(x, x[:, 0, 0])
    assert out.shape == s.shape
    assert rule.W.dtype == out.dtype == torch.float32


def test_bad_shapes(pairs):
    with pytest.raises(ShapeError, match=r"W must have shape"):
        AffineRule(torch.ones(3))
    with pytest.raises(ShapeError, match=r"b must have shape \(2,\)"):
        AffineRule(torch.ones(2, 3), torch.ones(3))
    with pytest.raises(ShapeError, match=r"x has 2 entries.*takes 3"):
        AffineRule(torch.ones(2, 3))(torch.ones(1, 2))
    with pytest.raises(ShapeError, match="has not the 2 entries"):
        AffineRule(torch.ones(2, 3), shape=(3,))
    with pytest.raises(ShapeError, match="as many contexts x as decisions s"):
        AffineRule.fit(pairs[0], pairs[1][:3])
