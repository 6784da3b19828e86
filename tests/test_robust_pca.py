"""Robust PCA: recovery, complex data, and the form with a slot for every product."""

import pytest
import torch

from convexlearn.errors import CompileError, OptionError
from convexlearn.iterations.admm import ADMM
from convexlearn.iterations.proximal_gradient import FISTA, ISTA
from convexlearn.iterations.robust_pca import PRODUCTS, RobustPCA, principal_component_pursuit, robust_pca
from convexlearn.rules.iterative import Converged, Unfolded
from convexlearn.splitting import split
from tests.iteration_contract import lasso


def test_principal_component_pursuit_recovers_planted_parts():
    n, generator = 60, torch.Generator().manual_seed(0)
    factors = [torch.randn(1, n, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    low_rank = factors[0] @ factors[1].mT
    chosen = torch.rand(1, n, n, generator=generator) < 0.1
    sparse = chosen * (20 * torch.rand(1, n, n, generator=generator, dtype=torch.float64) - 10)
    D = low_rank + sparse
    penalty = n * n / (8 * D.abs().sum().item())
    iteration = ADMM(principal_component_pursuit((n, n)), penalty=penalty)
    L, S = Converged(iteration, tol=1e-8, max_iterations=1000, learn=[])(D)
    assert (L - low_rank).norm() / low_rank.norm() < 1e-5
    assert (S - sparse).norm() / sparse.norm() < 1e-5


@pytest.fixture
def complex_case():
    generator = torch.Generator().manual_seed(1)
    D = torch.randn(2, 6, 4, generator=generator, dtype=torch.complex128)
    return robust_pca((6, 4), 0.5, 0.3, grouped=True, is_complex=True), D


def test_named_products_equal_proximal_gradient_on_complex_data(complex_case):
    parts, D = complex_case
    expected = Unfolded(ISTA(parts), 5)(D)
    found = Unfolded(RobustPCA(parts), 5, untie=["step", "threshold"])(D)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.detach(), b, rtol=0, atol=1e-12)


def test_the_converged_pair_is_optimal_on_complex_data(complex_case):
    parts, D = complex_case
    L, S = Converged(FISTA(parts), tol=1e-12, learn=[])(D)
    residual = D - L - S  # in the subdifferential of both penalties
    assert torch.linalg.matrix_norm(residual, 2).max() < 0.5 + 1e-9
    assert residual.norm(dim=2).max() < 0.3 + 1e-9
    inner = (residual.conj() * L).real.sum((1, 2))
    torch.testing.assert_close(inner, 0.5 * torch.linalg.matrix_norm(L, "nuc"), atol=1e-8, rtol=0)
    torch.testing.assert_close((residual.conj() * S).real.sum((1, 2)), 0.3 * S.norm(dim=2).sum(1), atol=1e-8, rtol=0)


def test_real_and_imaginary_parts_give_a_gradient(complex_case):
    parts, D = complex_case
    rule = Converged(FISTA(parts), tol=1e-12)
    L, _ = rule(D)
    L.abs().square().sum().backward()
    got = rule.free["low_rank"].grad.item()

    def value(change):
        twin = Converged(FISTA(parts), tol=1e-12, learn=[])
        twin.low_rank = 0.5 + change
        return twin(D)[0].abs().square().sum().item()

    slope = torch.autograd.grad(rule.low_rank, rule.free["low_rank"])[0].item()
    assert got / slope == pytest.approx((value(1e-5) - value(-1e-5)) / 2e-5, rel=1e-4)


@pytest.mark.parametrize("boundary", ["zero", "circular"])
def test_convolutions_in_the_product_slots_start_as_proximal_gradient(complex_case, boundary):
    parts, D = complex_case
    iteration = RobustPCA(parts).convolve(*PRODUCTS, image=(2, 3), size=3, boundary=boundary)
    net = Unfolded(iteration, 3, untie=["step", "threshold", *PRODUCTS])
    for a, b in zip(net(D), Unfolded(ISTA(parts), 3)(D)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    L, S = net(D)
    (L.abs().sum() + S.abs().sum()).backward()
    assert net.W5[2].weight.grad[..., 1].abs().max() > 0  # pyright: ignore
    assert net.W1[0].kernel.is_complex()  # pyright: ignore


def test_convolutions_need_the_shape_of_a_frame(complex_case):
    with pytest.raises(OptionError, match="rows are the 6 pixels of frames"):
        RobustPCA(complex_case[0]).convolve("W1", image=(2, 2))
    with pytest.raises(OptionError, match="no product"):
        RobustPCA(complex_case[0]).convolve("step", image=(2, 3))


def test_other_problems_are_refused():
    problem, x, s = lasso()
    with pytest.raises(CompileError, match="RobustPCA takes"):
        RobustPCA(split(problem, [x], s))
