import math

import pytest
import torch
from torch import nn

from convexlearn.errors import OptionError, ShapeError
from convexlearn.flows import Affine, AffineCoupling, Flow, real_nvp
from convexlearn.networks import mlp


@pytest.fixture
def flow():
    """A RealNVP away from its start."""
    generator = torch.Generator().manual_seed(0)
    base = Affine(torch.eye(5) + 0.3 * torch.randn(5, 5, generator=generator), torch.randn(5, generator=generator))
    flow = real_nvp(5, couplings=4, hidden=(8,), base=base, seed=1).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return flow


def latents(count, size):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_the_inverse_undoes_the_flow_both_ways(flow):
    z = latents(7, 5)
    torch.testing.assert_close(flow.inverse(flow(z)), z)
    torch.testing.assert_close(flow(flow.inverse(z)), z)


def test_the_log_determinant_is_that_of_the_jacobian(flow):
    z = latents(4, 5)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda row: flow(row[None])[0]))(z)
    torch.testing.assert_close(flow.push(z)[1], torch.linalg.slogdet(jacobians).logabsdet)


def test_the_potential_is_minus_the_log_density_of_the_signal(flow):
    z = latents(4, 5)
    torch.testing.assert_close(flow.potential(z), -flow.log_density(flow(z)))


def test_a_density_integrates_to_one():
    flow = real_nvp(2, couplings=2, hidden=(4,), seed=0).double()
    with torch.no_grad():
        for k, parameter in enumerate(flow.parameters()):
            parameter.add_(0.3 * torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape) * (-1) ** k)
    axis = torch.linspace(-12, 12, 601, dtype=torch.float64)
    s = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    total = flow.log_density(s).exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(total.item() - 1) < 1e-4


def test_an_affine_flow_has_the_density_of_a_normal_distribution():
    A, b = torch.tensor([[2.0, 0.0], [1.0, 0.5]], dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
    s = latents(3, 2)
    expected = torch.distributions.MultivariateNormal(b, A @ A.mT).log_prob(s)
    torch.testing.assert_close(Flow([Affine(A, b)]).log_density(s), expected)


def test_the_fitted_affine_map_has_mean_and_covariance_of_the_samples():
    s = latents(50, 3) @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64) + 2
    layer = Affine.fit(s, floor=0.1)
    expected = torch.cov(s.mT, correction=0)
    torch.testing.assert_close(layer.b, s.mean(0))
    torch.testing.assert_close((layer.A @ layer.A.mT)[:2, :2], expected[:2, :2])
    assert layer.A[2, 2].item() == pytest.approx(0.1)  # no variance along the third axis


def test_a_fresh_real_nvp_is_its_base_and_depends_on_the_seed():
    base = Affine(2 * torch.eye(4), torch.ones(4))
    z = torch.ones(1, 4)
    torch.testing.assert_close(real_nvp(4, base=base)(z), torch.full((1, 4), 3.0))
    first = [real_nvp(4, seed=seed).layers[0].network[0].weight for seed in (0, 0, 1)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_couplings_move_every_entry():
    flow = real_nvp(5, couplings=2)
    assert sorted(flow.layers[0].moved + flow.layers[1].moved) == [0, 1, 2, 3, 4]


def test_log_scales_are_bounded():
    network = nn.Linear(1, 2, bias=True)
    with torch.no_grad():
        network.bias.fill_(1e6)
        network.weight.zero_()
    _, change = AffineCoupling(2, [1], network, bound=1.5).push(torch.zeros(1, 2))
    assert math.isclose(change.item(), 1.5, rel_tol=1e-6)


def test_wrong_shapes_and_entries_are_named():
    with pytest.raises(ShapeError, match=r"A \(n, n\) and b \(n,\)"):
        Affine(torch.eye(3), torch.ones(2))
    for moved in ([0, 1], [], [0, 0], [5]):
        with pytest.raises(OptionError, match="moved must name some"):
            AffineCoupling(2, moved, mlp(1, 2))
