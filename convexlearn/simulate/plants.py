"""Plants: torch functions z+ = f(z, u, w) with explicit noise, batch first, and their units.

Each plant is a frozen dataclass that is called as `plant(z, u, w)` and has the functions that
`ClosedLoop` takes: `noise(batch, t, generator)`, `initial(batch, generator)`, and where the source
fixes them `observe(z, t, w)` and `stage_cost(z, u)`. Quantities without a unit are dimensionless.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convexlearn.checks import FUNCTION, GENERATOR, checked, count, number, require_that, shown, word
from convexlearn.errors import MissingParameterError, ShapeError
from convexlearn.inputs import check_rows, check_step
from convexlearn.simulate.linear_gaussian import LinearGaussian, Noise, random_linear

__all__ = [
    "CartPole",
    "LinearGaussian",
    "Lorenz",
    "Noise",
    "Pendulum",
    "SupplyChain",
    "Vehicle",
    "VehicleNoise",
    "linearize",
    "random_linear",
]

DOUBLE = torch.float64
BOUNDS = ("torque", "speed")
"""Fields of plants that may be infinite, for no bound."""


class VehicleNoise(NamedTuple):
    """Standard normal eps `(B, 3)`; where the curvature or the wanted speed is redrawn, and to what `(B,)`."""

    eps: Tensor
    turns: Tensor
    curvature: Tensor
    changes: Tensor
    speed: Tensor


@dataclass(frozen=True, kw_only=True)
class Vehicle:
    """Lane keeping (Agrawal and others, section 5.3): z = (e, psi, v, v_wanted, kappa), u = (a, s).

    e distance from the lane [m], psi heading error [rad], v speed and v_wanted [m/s], kappa curvature of the
    road [1/m]; a acceleration [m/s^2], s = tan(steering angle) - L kappa. step h [s], wheelbase L [m]. The model
    has a pole at e kappa = 1.

    >>> road = Vehicle()
    >>> z = road.initial(1, torch.Generator())
    >>> road.stage_cost(z, torch.zeros(1, 2))
    tensor([2.5100], dtype=torch.float64)
    """

    step: float = 0.2
    wheelbase: float = 2.8

    def __post_init__(self) -> None:
        _check_fields(self, positive=("step", "wheelbase"))

    def predict(self, z: Tensor, u: Tensor) -> Tensor:
        """z+ `(B, 5)` without noise."""
        check_step("Vehicle", z, 5, u, 2)
        e, psi, v, wanted, kappa = z.unbind(-1)
        a, s = u.unbind(-1)
        turn = kappa + s / self.wheelbase - kappa * torch.cos(psi) / (1 - e * kappa)
        moved = (e + self.step * v * torch.sin(psi), psi + self.step * v * turn, v + self.step * a)
        return torch.stack([*moved, wanted, kappa], -1)

    def __call__(self, z: Tensor, u: Tensor, w: Any) -> Tensor:
        """z+ `(B, 5)` for z `(B, 5)`, u `(B, 2)` and VehicleNoise w."""
        if not isinstance(w, tuple) or len(w) != 5:
            raise MissingParameterError(f"Vehicle: w must be VehicleNoise, got {shown(w)}")
        moved, wanted, kappa = self.predict(z, u)[..., :3], z[..., 3], z[..., 4]
        for name, part, like in zip(VehicleNoise._fields, w, (moved, *[wanted] * 4)):
            if not isinstance(part, Tensor) or part.shape != like.shape or part.is_complex():
                got = shown(part)
                raise ShapeError(f"Vehicle: w.{name} must be a real tensor {tuple(like.shape)}, got {got}")
        eps, turns, curvature, changes, speed = w
        scale = eps.new_tensor([0.1, 0.01, 0.1])
        wanted, kappa = torch.where(changes, speed, wanted), torch.where(turns, curvature, kappa)
        return torch.cat([moved + scale * eps, wanted[..., None], kappa[..., None]], -1)

    def stage_cost(self, z: Tensor, u: Tensor) -> Tensor:
        """(v - v_wanted)^2 + e^2 + psi^2 + 10 a^2 + 10 s^2, `(B,)`."""
        check_step("Vehicle", z, 5, u, 2)
        e, psi, v, wanted, _ = z.unbind(-1)
        return (v - wanted).square() + e.square() + psi.square() + 10 * u.square().sum(-1)

    @checked(batch=count(0), generator=GENERATOR)
    def initial(self, batch: int, generator: torch.Generator) -> Tensor:
        """z_0 = (0.5, 0.1, 3, 4.5, 0) `(batch, 5)`."""
        return torch.tensor([0.5, 0.1, 3.0, 4.5, 0.0], dtype=DOUBLE).expand(batch, 5)

    @checked(batch=count(0), generator=GENERATOR)
    def noise(self, batch: int, t: int, generator: torch.Generator) -> VehicleNoise:
        """With probability 0.05 a new curvature 0.1 N(0, 1), with 0.02 a new wanted speed U(3, 6)."""
        normal = torch.randn(batch, 4, generator=generator, dtype=DOUBLE)
        uniform = torch.rand(batch, 3, generator=generator, dtype=DOUBLE)
        turns, changes = uniform[:, 0] < 0.05, uniform[:, 1] < 0.02
        return VehicleNoise(normal[:, :3], turns, 0.1 * normal[:, 3], changes, 3 + 3 * uniform[:, 2])


@dataclass(frozen=True, kw_only=True)
class SupplyChain:
    """Four warehouses, two suppliers, two consumers (Agrawal and others, section 5.4).

    z = (h, p, d) `(B, 8)`: stock h (4), prices p of the suppliers (2), demands d of the consumers (2). u `(B, 8)`:
    amounts moved along supplier 1 to 1, supplier 2 to 2, 1 to 3, 1 to 4, 2 to 4, 4 to 3, 3 to consumer 1, 4 to
    consumer 2. A rule keeps 0 <= u <= 2, leaving @ u <= h, h+ <= 3 and sales u[6:] <= d; the plant does not check.
    Stock in units of goods, one price unit buys one of them at ln p = 0.

    >>> chain = SupplyChain()
    >>> chain.entering.sum(0), chain.leaving.sum(0)
    (tensor([1., 1., 1., 1., 1., 1., 0., 0.]), tensor([0., 0., 1., 1., 1., 1., 1., 1.]))
    """

    moving: float = 0.05
    storing: float = 0.01
    revenue: float = 1.3

    def __post_init__(self) -> None:
        _check_fields(self)

    @property
    def entering(self) -> Tensor:
        """`(4, 8)`: 1 where a link ends in a warehouse."""
        return _incidence((0, 1, 2, 3, 3, 2, None, None))

    @property
    def leaving(self) -> Tensor:
        """`(4, 8)`: 1 where a link starts in a warehouse."""
        return _incidence((None, None, 0, 0, 1, 3, 2, 3))

    def __call__(self, z: Tensor, u: Tensor, w: Tensor) -> Tensor:
        """z+ `(B, 8)`; w `(B, 4)` are the next prices and demands."""
        check_step("SupplyChain", z, 8, u, 8)
        check_rows("SupplyChain", "w", w, 4)
        if len(w) != len(z):
            raise ShapeError(f"SupplyChain: w must have shape ({len(z)}, 4), got {tuple(w.shape)}")
        change = (self.entering - self.leaving).to(u)
        return torch.cat([z[..., :4] + u @ change.mT, w], -1)

    def stage_cost(self, z: Tensor, u: Tensor) -> Tensor:
        """Purchases and moves less sales, plus storage 0.01 (h + h^2), `(B,)`."""
        check_step("SupplyChain", z, 8, u, 8)
        stock, prices = z[..., :4], z[..., 4:6]
        bought, moved, sold = u[..., :2], u[..., 2:6], u[..., 6:]
        trade = (prices * bought).sum(-1) + self.moving * moved.sum(-1) - self.revenue * sold.sum(-1)
        return trade + self.storing * (stock + stock.square()).sum(-1)

    @checked(batch=count(0), generator=GENERATOR)
    def initial(self, batch: int, generator: torch.Generator) -> Tensor:
        """h_0 ~ U(0, 3), prices and demands as in `noise`."""
        stock = 3 * torch.rand(batch, 4, generator=generator, dtype=DOUBLE)
        return torch.cat([stock, self.noise(batch, 0, generator)], -1)

    @checked(batch=count(0), generator=GENERATOR)
    def noise(self, batch: int, t: int, generator: torch.Generator) -> Tensor:
        """Prices and demands `(batch, 4)`: ln p ~ N((0, 0.1), 0.04 I), ln d ~ N((0, 0.4), 0.04 I)."""
        normal = torch.randn(batch, 4, generator=generator, dtype=DOUBLE)
        return torch.exp(normal.new_tensor([0.0, 0.1, 0.0, 0.4]) + 0.2 * normal)


@dataclass(frozen=True, kw_only=True)
class Pendulum:
    """A rod to swing up: z = (angle [rad], 0 upright; speed [rad/s]), u torque `(B, 1)` [N m], w `(B, 2)` is added.

    Step [s], gravity [m/s^2], mass [kg], length [m]; torque and speed are clipped: Gymnasium's Pendulum-v1.

    >>> Pendulum()(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 1), 0.0)
    tensor([[0.0500, 1.0000]])
    """

    step: float = 0.05
    gravity: float = 10.0
    mass: float = 1.0
    length: float = 1.0
    torque: float = 2.0
    speed: float = 8.0

    def __post_init__(self) -> None:
        _check_fields(self, positive=("step", "mass", "length", "torque", "speed"))

    def __call__(self, z: Tensor, u: Tensor, w: Any) -> Tensor:
        """z+ `(B, 2)`."""
        check_step("Pendulum", z, 2, u, 1, w)
        angle, speed = z.unbind(-1)
        torque = u[..., 0].clamp(-self.torque, self.torque)
        push = 3 * self.gravity / (2 * self.length) * torch.sin(angle) + 3 / (self.mass * self.length**2) * torque
        speed = (speed + self.step * push).clamp(-self.speed, self.speed)
        return torch.stack([angle + self.step * speed, speed], -1) + w

    def observe(self, z: Tensor, t: int, w: Any) -> Tensor:
        """(cos angle, sin angle, speed) `(B, 3)`."""
        check_rows("Pendulum", "z", z, 2)
        return torch.stack([torch.cos(z[..., 0]), torch.sin(z[..., 0]), z[..., 1]], -1)

    def stage_cost(self, z: Tensor, u: Tensor) -> Tensor:
        """angle^2 + 0.1 speed^2 + 0.001 torque^2 `(B,)`, the angle brought into [-pi, pi)."""
        check_step("Pendulum", z, 2, u, 1)
        angle = torch.remainder(z[..., 0] + math.pi, 2 * math.pi) - math.pi
        torque = u[..., 0].clamp(-self.torque, self.torque)
        return angle.square() + 0.1 * z[..., 1].square() + 0.001 * torque.square()

    @checked(batch=count(0), generator=GENERATOR)
    def initial(self, batch: int, generator: torch.Generator) -> Tensor:
        """Angle U(-pi, pi), speed U(-1, 1)."""
        uniform = 2 * torch.rand(batch, 2, generator=generator, dtype=DOUBLE) - 1
        return uniform * uniform.new_tensor([math.pi, 1.0])


@dataclass(frozen=True, kw_only=True)
class CartPole:
    """A pole on a cart: z = (place [m], speed [m/s], angle [rad], 0 upright, angular speed [rad/s]).

    u `(B, 1)` is the force in units of `force` [N], clipped to [-1, 1]; half_length [m] is half the pole's. The
    equations of Gymnasium's CartPole-v1, whose two actions are u = -1 and 1; w `(B, 4)` is added to the state.

    >>> CartPole()(torch.zeros(1, 4), torch.ones(1, 1), 0.0)[0, 1].item() > 0
    True
    """

    step: float = 0.02
    gravity: float = 9.8
    cart: float = 1.0
    pole: float = 0.1
    half_length: float = 0.5
    force: float = 10.0

    def __post_init__(self) -> None:
        _check_fields(self, positive=("step", "cart", "pole", "half_length"))

    def __call__(self, z: Tensor, u: Tensor, w: Any) -> Tensor:
        """z+ `(B, 4)`."""
        check_step("CartPole", z, 4, u, 1, w)
        _, speed, angle, turning = z.unbind(-1)
        sin, cos, total = torch.sin(angle), torch.cos(angle), self.cart + self.pole
        arm = self.pole * self.half_length
        push = (self.force * u[..., 0].clamp(-1, 1) + arm * turning.square() * sin) / total
        spin = (self.gravity * sin - cos * push) / (self.half_length * (4 / 3 - self.pole * cos.square() / total))
        rates = torch.stack([speed, push - arm * spin * cos / total, turning, spin], -1)
        return z + self.step * rates + w

    def stage_cost(self, z: Tensor, u: Tensor) -> Tensor:
        """place^2 + 10 angle^2 + 0.1 (speed^2 + angular speed^2) + 0.01 u^2 `(B,)`."""
        check_step("CartPole", z, 4, u, 1)
        weights = z.new_tensor([1.0, 0.1, 10.0, 0.1])
        return (weights * z.square()).sum(-1) + 0.01 * u[..., 0].square()

    @checked(batch=count(0), generator=GENERATOR)
    def initial(self, batch: int, generator: torch.Generator) -> Tensor:
        """All four U(-0.05, 0.05)."""
        return 0.1 * torch.rand(batch, 4, generator=generator, dtype=DOUBLE) - 0.05


@dataclass(frozen=True, kw_only=True)
class Lorenz:
    """The Lorenz attractor z' = F(z) z, sampled every `step` time units; the last figures of the paper.

    method "rk4": `substeps` classical Runge-Kutta steps; "taylor": exp(F(z) step) z with the exponential cut
    after `order` terms and F frozen over the step, the model of KalmanNet's filters (order 5 for the classical
    ones, 2 for KalmanNet). There is no input: u, for instance a rule's estimate, is ignored; w is added.

    >>> Lorenz()(torch.ones(1, 3), None, 0.0).round(decimals=3)
    tensor([[1.0490, 1.5240, 0.9730]])
    """

    sigma: float = 10.0
    rho: float = 28.0
    beta: float = 8 / 3
    step: float = 0.02
    method: str = "rk4"
    substeps: int = 4
    order: int = 5

    def __post_init__(self) -> None:
        require_that("Lorenz", "method", word(("rk4", "taylor")), self.method)
        require_that("Lorenz", "substeps", count(), self.substeps)
        require_that("Lorenz", "order", count(), self.order)
        _check_fields(self, positive=("step",))

    def matrix(self, z: Tensor) -> Tensor:
        """F(z) `(B, 3, 3)` = [-sigma, sigma, 0; rho - z3, -1, 0; z2, 0, -beta]."""
        check_rows("Lorenz", "z", z, 3)
        a, b, c = z.unbind(-1)
        one, none = torch.ones_like(a), torch.zeros_like(a)
        rows = [-self.sigma * one, self.sigma * one, none, self.rho - c, -one, none, b, none, -self.beta * one]
        return torch.stack(rows, -1).unflatten(-1, (3, 3))

    def rate(self, z: Tensor) -> Tensor:
        """z' `(B, 3)`."""
        check_rows("Lorenz", "z", z, 3)
        return self._rate(z)

    def _rate(self, z: Tensor) -> Tensor:
        a, b, c = z.unbind(-1)
        return torch.stack([self.sigma * (b - a), a * (self.rho - c) - b, a * b - self.beta * c], -1)

    def __call__(self, z: Tensor, u: Any, w: Any) -> Tensor:
        """z+ `(B, 3)`."""
        check_step("Lorenz", z, 3, z, 3, w)
        return (self._taylor(z) if self.method == "taylor" else self._runge_kutta(z)) + w

    def _taylor(self, z: Tensor) -> Tensor:
        F, term, total = self.step * self.matrix(z), z, z
        for k in range(1, self.order + 1):
            term = (F @ term[..., None])[..., 0] / k
            total = total + term
        return total

    def _runge_kutta(self, z: Tensor) -> Tensor:
        h = self.step / self.substeps
        for _ in range(self.substeps):
            k1 = self._rate(z)
            k2 = self._rate(z + h / 2 * k1)
            k3 = self._rate(z + h / 2 * k2)
            k4 = self._rate(z + h * k3)
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return z


@checked(plant=FUNCTION)
def linearize(plant: Callable[..., Tensor], z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """A `(n, n)` and B `(n, m)` of plant(z, u, 0) at one state z `(n,)` and input u `(m,)`.

    >>> A, B = linearize(Pendulum(), torch.zeros(2), torch.zeros(1))
    >>> A
    tensor([[1.0375, 0.0500],
            [0.7500, 1.0000]])
    """
    for name, value in (("z", z), ("u", u)):
        if not isinstance(value, Tensor) or value.ndim != 1 or not value.is_floating_point():
            raise ShapeError(f"linearize: {name} must be a floating tensor of one dimension, got {shown(value)}")

    def step(z: Tensor, u: Tensor) -> Tensor:
        return plant(z[None], u[None], z.new_zeros(()))[0]

    return torch.autograd.functional.jacobian(step, (z.detach(), u.detach()))  # pyright: ignore[reportReturnType]


def _check_fields(plant: Any, positive: tuple[str, ...] = ()) -> None:
    """All numbers of a plant are finite, but that a bound may be infinite; some are positive."""
    for field in fields(plant):
        value = getattr(plant, field.name)
        if field.type in ("float", float):
            check = number(above=0, infinite=field.name in BOUNDS) if field.name in positive else number()
            require_that(type(plant).__name__, field.name, check, value)


def _incidence(ends: tuple[int | None, ...]) -> Tensor:
    return torch.tensor([[float(end == warehouse) for end in ends] for warehouse in range(4)])
