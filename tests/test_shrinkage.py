"""Shrinkages in units of the data: values, derivatives, and their place in the slots."""

import pytest
import torch

from convexlearn.iterations.proximal_gradient import ISTA
from convexlearn.iterations.robust_pca import RobustPCA, robust_pca
from convexlearn.prox import singular_value_threshold, soft_threshold
from convexlearn.rules.iterative import Unfolded
from convexlearn.shrinkage import SHRINKAGES, relative_power_threshold
from convexlearn.splitting import split
from tests.iteration_contract import contexts, lasso

KINDS = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])


def draw(dtype):
    return torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)


@KINDS
@pytest.mark.parametrize("name", SHRINKAGES)
def test_thresholds_scale_with_the_data(name, dtype):
    v, t = draw(dtype), torch.tensor(0.7, dtype=torch.float64)
    shrink = SHRINKAGES[name]
    torch.testing.assert_close(shrink(3 * v, t), 3 * shrink(v, t))
    torch.testing.assert_close(shrink(v[:1], t), shrink(v, t)[:1])  # each sample has its own scale
    assert (shrink(v, torch.tensor(0.0, dtype=torch.float64)) - v).abs().max() < 1e-12
    assert torch.autograd.gradcheck(shrink, (v.requires_grad_(), t.requires_grad_()))


@KINDS
def test_they_are_the_proximal_maps_at_a_threshold_that_follows_the_data(dtype):
    v, t = draw(dtype), torch.tensor(0.4, dtype=torch.float64)
    largest = torch.linalg.matrix_norm(v, 2)[:, None, None]
    torch.testing.assert_close(SHRINKAGES["relative_nuclear"](v, t), singular_value_threshold(v, t * largest))
    mean = v.abs().mean((1, 2), keepdim=True)
    torch.testing.assert_close(SHRINKAGES["relative_norm1"](v, t), soft_threshold(v, t * mean))


@KINDS
def test_the_power_threshold_entry_by_entry(dtype):
    v = draw(dtype)
    for sample, result in zip(v, relative_power_threshold(v, 0.7)):
        level = 0.7 * sum(abs(z) ** 2 for z in sample.flatten().tolist()) / sample.numel()
        for z, found in zip(sample.flatten().tolist(), result.flatten().tolist()):
            assert found == pytest.approx(max(0.0, 1 - level / abs(z) ** 2) * z, abs=1e-14)


def test_zero_stays_zero_with_a_finite_gradient():
    v = torch.zeros(1, 4, 2, dtype=torch.complex128, requires_grad=True)
    for shrink in SHRINKAGES.values():
        result = shrink(v, torch.tensor(0.5))
        assert result.abs().max() == 0
        assert torch.isfinite(torch.autograd.grad(result.real.sum(), v)[0]).all()


def test_named_in_the_slots():
    problem, x, s = lasso()
    net = Unfolded(ISTA(split(problem, [x], s), prox="relative_norm1", threshold=0.5), 2, untie=["threshold"])
    v = net.iterates(contexts())[1]
    instance = net.bind(contexts())
    start = instance.gradient(instance.zeros()) / -instance.L
    torch.testing.assert_close(v, SHRINKAGES["relative_norm1"](start, torch.tensor(0.5)))
    parts = robust_pca((5, 3), 0.1, 0.1, is_complex=True)
    named = {"low_rank_prox": "relative_nuclear", "sparse_prox": "relative_power"}
    net = Unfolded(RobustPCA(parts, threshold=[0.2, 0.6], **named), 1, untie=["threshold"])
    D = draw(torch.complex128)
    L, S = net(D)
    torch.testing.assert_close(L, SHRINKAGES["relative_nuclear"](D / 2, torch.tensor(0.2)))
    torch.testing.assert_close(S, SHRINKAGES["relative_power"](D / 2, torch.tensor(0.6)))
