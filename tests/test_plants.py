import math

import numpy as np
import pytest
import torch

from convexlearn.errors import OptionError
from convexlearn.riccati import lqr_gain
from convexlearn.simulate.closed_loop import ClosedLoop
from convexlearn.simulate.plants import (
    CartPole,
    LinearGaussian,
    Lorenz,
    Pendulum,
    SupplyChain,
    Vehicle,
    linearize,
    random_linear,
)

EYE = torch.eye(4, dtype=torch.float64)
PLANTS = {
    "linear": (LinearGaussian(*random_linear(0, 4, 2), V=0.25 * EYE), 2),
    "partial": (LinearGaussian(*random_linear(0, 4, 2), V=0.25 * EYE, C=EYE[:3], W=EYE[:3, :3]), 2),
    "box": (LinearGaussian(*random_linear(1, 8, 2), V=torch.eye(8).double() / 4, limit=0.1), 2),
    "vehicle": (Vehicle(), 2),
    "supply chain": (SupplyChain(), 8),
    "pendulum": (Pendulum(), 1),
    "cart and pole": (CartPole(), 1),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise_of(plant, batch, seed=1):
    return plant.noise(batch, 0, generator(seed)) if hasattr(plant, "noise") else torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize("name", PLANTS)
def test_shapes_batches_and_gradients(name):
    plant, m = PLANTS[name]
    before = torch.get_rng_state()
    z, w = plant.initial(5, generator()), noise_of(plant, 5)
    assert torch.equal(before, torch.get_rng_state())
    u = (0.01 * torch.randn(5, m, generator=generator(2), dtype=torch.float64)).requires_grad_()
    following = plant(z, u, w)
    assert following.shape == z.shape
    assert following.dtype == torch.float64
    (gradient,) = torch.autograd.grad(following.sum() + plant.stage_cost(z, u).sum(), u)
    assert torch.isfinite(gradient).all()
    one = plant.noise(5, 0, generator(1)) if hasattr(plant, "noise") else w
    single = [part[2:3] if part.ndim else part for part in ((one,) if isinstance(one, torch.Tensor) else one)]
    alone = plant(z[2:3], u[2:3], single[0] if len(single) == 1 else tuple(single))
    torch.testing.assert_close(alone, following[2:3], rtol=1e-13, atol=1e-13)
    assert plant.stage_cost(z, u).shape == (5,)


@pytest.mark.parametrize("name", PLANTS)
def test_runs_in_a_closed_loop(name):
    plant, m = PLANTS[name]
    options = {key: getattr(plant, key) for key in ("noise", "observe") if hasattr(plant, key)}
    loop = ClosedLoop(plant, 4, initial=plant.initial, stage_cost=plant.stage_cost, **options)
    rollout = loop(lambda x: x.new_zeros(len(x), m), 3, generator())
    assert rollout.cost.shape == (3, 4)
    assert not rollout.failed.any()


def test_vehicle_equations():
    z = torch.tensor([[0.5, 0.1, 3.0, 4.5, 0.02]], dtype=torch.float64)
    u = torch.tensor([[1.0, 0.3]], dtype=torch.float64)
    e, psi, v, _, kappa = z[0].tolist()
    turn = kappa + 0.3 / 2.8 - kappa * math.cos(psi) / (1 - e * kappa)
    expected = [e + 0.2 * v * math.sin(psi), psi + 0.2 * v * turn, v + 0.2, 4.5, kappa]
    np.testing.assert_allclose(Vehicle().predict(z, u)[0], expected, rtol=1e-14)
    w = Vehicle().noise(20000, 0, generator())
    assert abs(w.turns.double().mean() - 0.05) < 0.005
    assert abs(w.changes.double().mean() - 0.02) < 0.003
    moved = Vehicle()(z.expand(20000, 5), u.expand(20000, 2), w)
    assert torch.equal(moved[w.changes, 3], w.speed[w.changes])
    assert torch.equal(moved[~w.turns, 4], z[0, 4].expand(int((~w.turns).sum())))


def test_supply_chain_conserves_goods():
    chain = SupplyChain()
    z = chain.initial(6, generator())
    u = torch.rand(6, 8, generator=generator(1), dtype=torch.float64)
    following = chain(z, u, chain.noise(6, 0, generator(2)))
    change = following[:, :4].sum(1) - z[:, :4].sum(1)
    torch.testing.assert_close(change, u[:, :2].sum(1) - u[:, 6:].sum(1))
    logs = chain.noise(100000, 0, generator()).log()
    torch.testing.assert_close(logs.mean(0), torch.tensor([0.0, 0.1, 0.0, 0.4]).double(), rtol=0, atol=0.003)
    torch.testing.assert_close(logs.var(0), torch.full((4,), 0.04).double(), rtol=0.02, atol=0)
    h, p = z[0, :4], z[0, 4:6]
    cost = p @ u[0, :2] + 0.05 * u[0, 2:6].sum() - 1.3 * u[0, 6:].sum() + 0.01 * (h + h**2).sum()
    torch.testing.assert_close(chain.stage_cost(z, u)[0], cost)


def test_swinging_conserves_energy_in_the_limit():
    plant = Pendulum(step=1e-4, speed=1e3)
    z = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    first = 15 * math.cos(2.0)  # speed^2 / 2 + 3 g / (2 l) cos(angle)
    for _ in range(3000):
        z = plant(z, torch.zeros(1, 1, dtype=torch.float64), 0.0)
    assert abs(z[0, 1] ** 2 / 2 + 15 * torch.cos(z[0, 0]) - first) < 5e-3
    assert plant.stage_cost(torch.tensor([[2 * math.pi + 0.1, 0.0]]), torch.zeros(1, 1)).item() < 0.011


def test_cart_and_pole_follow_the_equations_of_motion():
    """The spin solves the pair of Newton's equations without friction."""
    plant = CartPole()
    z = torch.tensor([[0.3, -0.2, 0.4, 0.7]], dtype=torch.float64)
    rate = ((plant(z, torch.tensor([[0.5]], dtype=torch.float64), 0.0) - z) / plant.step)[0]
    angle, turning = 0.4, 0.7
    m, M, half = 0.1, 1.1, 0.5
    system = np.array([[M, m * half * math.cos(angle)], [math.cos(angle), 4 / 3 * half]])
    right = np.array([5.0 + m * half * turning**2 * math.sin(angle), 9.8 * math.sin(angle)])
    np.testing.assert_allclose(rate[[1, 3]], np.linalg.solve(system, right), rtol=1e-10)


def test_lorenz_integrators_agree():
    z = torch.tensor([[1.0, 1.0, 1.0], [3.0, -4.0, 20.0]], dtype=torch.float64)
    torch.testing.assert_close((Lorenz().matrix(z) @ z[..., None])[..., 0], Lorenz().rate(z), rtol=1e-14, atol=1e-12)
    fine = Lorenz(substeps=64)(z, None, 0.0)
    assert (Lorenz()(z, None, 0.0) - fine).abs().max() < 1e-5
    for method in ("rk4", "taylor"):
        small = Lorenz(step=1e-4, method=method)(z, None, 0.0)
        torch.testing.assert_close((small - z) / 1e-4, Lorenz().rate(z), rtol=1e-2, atol=0.1)
    frozen = torch.linalg.matrix_exp(0.02 * Lorenz().matrix(z)) @ z[..., None]
    torch.testing.assert_close(Lorenz(method="taylor", order=12)(z, None, 0.0), frozen[..., 0], rtol=1e-12, atol=1e-12)


def test_linearization_stabilizes_the_pendulum():
    plant = Pendulum()
    A, B = linearize(plant, torch.zeros(2).double(), torch.zeros(1).double())
    K = lqr_gain(A, B, torch.eye(2).double(), torch.eye(1).double())
    loop = ClosedLoop(plant, 100, initial=torch.tensor([0.05, 0.0]).double(), stage_cost=plant.stage_cost)
    assert loop(lambda x: -x @ K.mT, 1).state[0, -1].abs().max() < 1e-3


def test_mistakes_are_named():
    with pytest.raises(OptionError, match="method must be one of 'rk4', 'taylor'"):
        Lorenz(method="euler")
