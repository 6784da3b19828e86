"""The rules of the localisation problems: the declaration is the convolution, the unfolded one starts as FISTA."""

import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from contracts import RuleContract

from convexlearn.evaluate import evaluate
from convexlearn.iterations.proximal_gradient import FISTA
from convexlearn.networks import ImageNetwork
from convexlearn.problems.catalogue import Budget
from convexlearn.problems.localisation import LEVELS, Optics, Scenes, draw_image, f1, spread, spread_error
from convexlearn.problems.localisation_rules import (
    Data,
    Localiser,
    Plan,
    Remainder,
    Scaled,
    contenders,
    declare,
    descend,
    search,
    unfold,
)
from convexlearn.problems.microscopy import SmoothThreshold
from convexlearn.rules.iterative import Converged, Unfolded
from convexlearn.simulate.pairs import Pairs

OPTICS = Optics((1.5, 2.2), 4)


@pytest.fixture(scope="module")
def declared():
    return declare(OPTICS)


@pytest.fixture
def x():
    places = 15 * torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return OPTICS.render(places, torch.ones(3, 4, dtype=torch.float64))


def test_the_declaration_is_the_convolution(declared):
    _, parts = declared
    s = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernel = OPTICS.kernel()
    padding = tuple((size - 4) // 2 for size in kernel.shape)
    expected = torch.nn.functional.conv2d(s.unsqueeze(1), kernel[None, None], stride=4, padding=padding)
    A = parts.nominal().A
    torch.testing.assert_close(A(s.flatten(1)), expected.flatten(1), rtol=0, atol=1e-13)


def test_the_remainder_is_one_minus_the_normal_matrix(declared):
    _, parts = declared
    A = parts.nominal().A.dense()
    s = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        found = Remainder(OPTICS.kernel() / math.sqrt(parts.L))(s).flatten(1)
    torch.testing.assert_close(found, s.flatten(1) - s.flatten(1) @ A.mT @ A / parts.L, rtol=0, atol=1e-13)


def test_the_unfolded_rule_starts_as_iterations_of_fista(declared, x):
    _, parts = declared
    net, fista = unfold(parts, OPTICS, 10), Unfolded(FISTA(parts, restart=False), 10)
    with torch.no_grad():
        torch.testing.assert_close(net.iterates(x), fista.iterates(x), rtol=0, atol=1e-12)
    assert net.threshold.shape == (10,)


def test_converged_rules_solve_the_declared_problem(declared, x):
    problem, parts = declared
    with torch.no_grad():
        decisions = Converged(FISTA(parts), tol=1e-10)(x)
    by_name = {p.name(): p for p in problem.parameters()}
    for picture, s in zip(x, decisions):
        by_name["x"].value = picture.numpy()
        problem.solve(solver=cp.CLARABEL)
        fit = picture - parts.nominal().A(s.reshape(1, -1)).reshape(4, 4)
        assert 0.5 * fit.square().sum() + 0.2 * s.sum() == pytest.approx(problem.value, rel=1e-7)


def test_search_finds_rho_and_level():
    """With rho the identity's gain and targets of size one beside clutter of 0.3, only levels between them are best."""

    class Gain(torch.nn.Module):
        rho = 0.0

        def forward(self, x):
            return self.rho * x

    s = torch.zeros(4, 8, 8)
    s[:, 2, 2] = 1.0
    x = s.clone()
    x[:, 5, 5] = 0.3
    rule = Localiser(Gain())
    found = search(Pairs(x, s), [1e-3, 1.0, 1e-4])(rule, Budget())
    assert rule.rule.rho == found.best == 1.0
    assert found.means.tolist() == [0.0, -1.0, 0.0]
    assert 0.3 < rule.level.item() <= 1.0
    assert rule.level.item() in LEVELS
    assert f1(Pairs(x, s)(rule)).tolist() == [1.0] * 4
    assert search(Pairs(x, s), [1e-3, 1.0, 1e-4])(rule, Budget(steps=2)).values.tolist() == [1e-3, 1e-4]


class Points(Scenes):
    """A point or two on a small field."""

    def draw(self, count, generator):
        places = 15 * torch.rand(count, 2, 2, generator=generator)
        amplitudes = torch.ones(count, 2)
        return OPTICS.render(places, amplitudes), draw_image(16, places, amplitudes)


def test_training_lowers_the_loss_and_adapting_starts_from_the_source(declared):
    _, parts = declared
    pairs = Pairs(*Points().draw(16, torch.Generator().manual_seed(5)))
    data = Data(Points(), Points(), pairs, pairs)
    rules = contenders(parts, OPTICS, data, Plan(3, np.array([0.1, 0.2])), 0)
    trained = rules["unfolded"].rule
    before = evaluate(trained.rule, pairs, spread_error)
    descend(Points(), pairs, 60, {"W1": 2e-4, "W2": 2e-3})(trained, Budget())
    gain = before - evaluate(trained.rule, pairs, spread_error)
    assert gain.mean > 3 * gain.standard_error
    adapted = rules["unfolded, adapted"]
    adapted.fit(adapted.rule, Budget(steps=1))
    kernels = zip(trained.parameters(), adapted.rule.parameters())
    assert all((a - b).abs().max() < 0.03 for a, b in kernels if a.requires_grad)
    assert list(rules) == [
        "hand-set FISTA", "short FISTA", "FISTA 100", "FISTA converged", "network", "unfolded", "unfolded, adapted"
    ]  # fmt: skip


def test_the_plain_network_starts_at_the_scale_of_the_points():
    pairs = Pairs(*Points().draw(16, torch.Generator().manual_seed(5)))
    network = ImageNetwork(upsample=4)
    scaled = Scaled(network, pairs)

    def error(gain):
        return spread(gain * network(pairs.x) - pairs.s).square().sum().item()

    gain = scaled.gain.item()
    assert error(gain) < min(error(0.999 * gain), error(1.001 * gain))
    assert torch.equal(scaled(pairs.x), scaled.gain * network(pairs.x))


class TestLocaliser(RuleContract):
    @pytest.fixture
    def rule(self, declared):
        return Localiser(unfold(declared[1], OPTICS, 2), 0.01)

    @pytest.fixture
    def context(self, x):
        return x


class TestSmoothRule(RuleContract):
    """With LSPARCOM's shrinkage in the prox slot."""

    @pytest.fixture
    def rule(self, declared):
        return unfold(declared[1], OPTICS, 2, prox=SmoothThreshold())

    @pytest.fixture
    def context(self, x):
        return x
