"""ISTA, FISTA and their freed forms."""

import cvxpy as cp
import numpy as np
import pytest
import torch

from convexlearn.errors import CompileError, OptionError
from convexlearn.iterations.proximal_gradient import FISTA, ISTA
from convexlearn.prox import hard_threshold, soft_threshold
from convexlearn.rules.iterative import Converged, Unfolded
from convexlearn.splitting import split
from tests.iteration_contract import IterationContract, M, N, contexts, lasso


class TestISTA(IterationContract):
    hyper = ("step",)
    untie = ("step", "threshold")
    free = (("W1", "W2"), ("W1",), ("W2",))

    def make(self, parts):
        return ISTA(parts)


class TestFISTA(IterationContract):
    hyper = ("step",)
    untie = ("step", "threshold")
    free = (("W1", "W2"), ("W1",), ("W2",))

    def make(self, parts):
        return FISTA(parts)


class TestConstantMomentum(TestFISTA):
    """Converges for a fixed momentum below 1."""

    def make(self, parts):
        return FISTA(parts, restart=False, momentum=0.6)


@pytest.fixture
def ista():
    problem, x, s = lasso()
    return ISTA(split(problem, [x], s))


def test_ista_is_eq_15(ista):
    x, instance = contexts(), ista.split.nominal()
    H, rho = ista.split.parameters["H"].value, 0.4
    step, s = 1 / instance.L, torch.zeros(3, N, dtype=torch.float64)
    for _ in range(4):
        s = soft_threshold(s + step * (x - s @ H.mT) @ H, step * rho)
    torch.testing.assert_close(Unfolded(ista, 4)(x), s, rtol=0, atol=1e-14)


@pytest.mark.parametrize("freed", [("W1", "W2"), ("W1",), ("W2",)])
@pytest.mark.parametrize("base", [None, 0.05])
def test_freed_matrices_start_as_ista(ista, freed, base):
    iteration = ista if base is None else ista.replace(step=base)
    net = Unfolded(iteration.free(*freed), 6, untie=[*freed, "threshold", "step"])
    torch.testing.assert_close(net(contexts()), Unfolded(iteration, 6)(contexts()), rtol=0, atol=1e-12)
    assert net.step.tolist() == pytest.approx([1.0] * 6)
    assert net.value(freed[0]).shape == ((6, N, M) if freed[0] == "W1" else (6, N, N))


def test_lista_is_eq_22(ista):
    net = Unfolded(ista.free("W1", "W2"), 2, untie=["W1", "W2", "threshold", "step"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64))
    x, s = contexts(), torch.zeros(3, N, dtype=torch.float64)
    for k in range(2):
        s = soft_threshold(x @ net.W1[k].mT + net.step[k] * (s @ net.W2[k].mT), net.threshold[k])
    torch.testing.assert_close(net(x), s, rtol=0, atol=1e-14)


def test_tied_freed_matrices_are_shared_by_the_layers(ista):
    net = Unfolded(ista.free("W1", "W2"), 5, untie=["threshold"])
    assert net.W1.shape == (N, M)
    assert net.threshold.shape == (5,)


def test_momentum_can_be_untied_but_not_with_convergence_beyond_one():
    problem, x, s = lasso()
    plain = FISTA(split(problem, [x], s), restart=False)
    net = Unfolded(plain, 5, untie=["momentum"])
    torch.testing.assert_close(net.iterates(contexts()), Unfolded(plain, 5).iterates(contexts()), rtol=0, atol=1e-12)
    assert net.momentum[:2].tolist() == [0.0, 0.0]  # exact, since in a network it may have either sign
    with pytest.raises(OptionError, match=r"'momentum' is .* only known to converge up to 1;"):
        Converged(plain.replace(momentum=1.2))


def test_a_module_takes_the_place_of_the_prox(ista):
    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, v):
            return self.factor * v

    net = Unfolded(ista.replace(prox=Half()), 3, untie=["prox"])
    assert [name for name, _ in net.named_parameters()] == [f"prox.{k}.factor" for k in range(3)]
    net(contexts()).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_modules_in_the_matrix_slots_see_natural_shapes():
    image, x = cp.Variable((4, 5), name="image"), cp.Parameter((4, 5), name="x")
    parts = split(cp.Problem(cp.Minimize(0.5 * cp.sum_squares(image - x) + 0.1 * cp.sum(cp.abs(image)))), [x], image)

    class Conv(torch.nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False, dtype=torch.float64)
            with torch.no_grad():
                self.conv.weight.zero_()[0, 0, 1, 1] = scale

        def forward(self, v):
            return self.conv(v[:, None])[:, 0]

    x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = ISTA(parts, step=0.5)
    net = Unfolded(plain.replace(W1=Conv(0.5), W2=Conv(0.5), step=1.0, threshold=0.05), 4, untie=["W1", "W2"])
    torch.testing.assert_close(net(x), Unfolded(plain, 4)(x), rtol=0, atol=1e-14)


def test_the_hard_threshold_is_a_named_slot(ista):
    net = Unfolded(ista.replace(prox="norm0"), 1)
    instance = ista.bind(contexts())
    v = instance.A.adjoint(instance.y) / instance.L
    torch.testing.assert_close(net(contexts()), hard_threshold(v, 0.4 / instance.L))


def test_slots_out_of_place_are_refused(ista):
    with pytest.raises(OptionError, match="did you mean 'threshold'"):
        ista.replace(treshold=0.1)
    with pytest.raises(OptionError, match="no matrix"):
        ista.free("step")
    with pytest.raises(OptionError, match="must be positive, got -1"):
        ista.replace(step=-1.0)
    with pytest.raises(OptionError, match="only known to converge up to"):
        Converged(ista.replace(step=10.0))
    Unfolded(ista.replace(step=10.0), 2)
    with pytest.raises(OptionError, match="no proximal map 'norm3'"):
        ista.replace(prox="norm3")


def test_a_smooth_part_is_needed():
    x, s = cp.Parameter(3, name="x"), cp.Variable(3, name="s")
    with pytest.raises(CompileError, match="needs a sum of squares"):
        ISTA(split(cp.Problem(cp.Minimize(cp.norm1(s)), [s == x]), [x], s))


def test_terms_without_closed_form_go_through_a_convex_layer():
    rng = np.random.default_rng(1)
    H, x, s = rng.normal(size=(M, 4)), cp.Parameter(M, name="x"), cp.Variable(4, name="s")
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(H @ s - x) + 0.3 * cp.norm1(s)), [cp.sum(s) == 1, s >= -1])
    parts = split(problem, [x], s)
    assert "joint prox by a ConvexLayer" in str(parts)
    xs = contexts(2)
    found = Converged(FISTA(parts), tol=1e-9, learn=[])(xs)
    for row, decision in zip(xs, found):
        x.value = row.numpy()
        problem.solve(solver="CLARABEL")
        np.testing.assert_allclose(decision.detach().numpy(), s.value, atol=1e-6)
