"""Pictures of a swinging pendulum: noisy, drowned in noise for a while, unevenly lit, or hidden behind a square."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from convexlearn.simulate.plants import Pendulum, linearize

SIDE = 16
PIVOT, ROD, RADIUS, WIDTH = -0.5, 1.0, 0.2, 0.06
"""Height of the pivot, length of the rod, size of the bob and of the rod; the picture is [-1, 1] x [-1, 1]."""

SPREAD = (0.35, 1.35)
"""Standard deviations of angle [rad] and speed [rad/s] at the beginning."""

FRICTION = 0.5
"""Share of the speed lost per second."""

FREQUENCY = math.sqrt(15.0)
"""Of small swings [rad/s]: speeds over it are angles in size."""

CLEAR = 5
"""So many pictures of a film are seen before the first fades."""

DOUBLE = torch.float64


class Recording(NamedTuple):
    """Pictures `(N, T, SIDE, SIDE)`, float32, and states `(N, T, 2)`: angle [rad], 0 hanging, and speed [rad/s]."""

    pictures: Tensor
    states: Tensor


@dataclass(frozen=True)
class Camera:
    """noise: standard deviation of a pixel, where the bob has a brightness of 1; hidden: share of the pictures with a
    square of half the picture's side in front, somewhere; light: how much brightness and background differ from film
    to film (0 to 1); fading: how far the share of the scene in a picture may move to the next one, see `visibility`.
    """

    noise: float = 0.5
    hidden: float = 0.0
    light: float = 0.0
    fading: float = 0.0

    def shoot(self, angles: Tensor, generator: torch.Generator) -> Tensor:
        """Pictures `(N, T, SIDE, SIDE)` at angles `(N, T)`; light and its gradient differ between the N films."""
        N, T = angles.shape
        dark, slope = self.light * torch.rand(2, N, 2, generator=generator, dtype=DOUBLE)
        x, y = _grid()
        slope = 0.8 * (slope - self.light / 2)[..., None, None]
        clean = (1 - 0.4 * dark[:, :1, None, None]) * render(angles) + (slope[:, 0] * x + slope[:, 1] * y)[:, None]
        corner = 2 * torch.rand(2, N, T, 1, 1, generator=generator, dtype=DOUBLE) - 1.5
        inside = (x - corner[0]).abs().maximum((y - corner[1]).abs()) < 0.5
        behind = inside & (torch.rand(N, T, 1, 1, generator=generator, dtype=DOUBLE) < self.hidden)
        noise = torch.randn(clean.shape, generator=generator, dtype=DOUBLE)
        seen = torch.where(behind, 0.0, clean)
        if self.fading > 0:
            share = visibility(N, T, self.fading, generator)[..., None, None]
            seen = share * seen + (1 - share) * torch.rand(clean.shape, generator=generator, dtype=DOUBLE)
        return (seen + self.noise * noise).float()


def _grid() -> tuple[Tensor, Tensor]:
    """Coordinates x to the right and y downwards of the pixels, `(SIDE, SIDE)` each."""
    places = (torch.arange(SIDE, dtype=DOUBLE) + 0.5) * 2 / SIDE - 1
    y, x = torch.meshgrid(places, places, indexing="ij")
    return x, y


def visibility(count: int, length: int, change: float, generator: torch.Generator) -> Tensor:
    """Share `(count, length)` of the scene in each picture, the rest being noise: 0 or 1 for several pictures in a row.

    A walk in [0, 1] by U(-change, change) a picture, stretched so that it is 0 below a level from U(0, 0.25) of the
    film's own and 1 above one from U(0.75, 1); the first CLEAR pictures have 1 (Becker and others, Recurrent Kalman
    Networks, 2019, whose change is 0.2).
    """
    uniform = torch.rand(count, length + 2, generator=generator, dtype=DOUBLE)
    walk = [uniform[:, 2]]
    for draw in uniform[:, 3:].unbind(1):
        walk.append((walk[-1] + change * (2 * draw - 1)).clamp(0, 1))
    low, high = uniform[:, :1] / 4, 0.75 + uniform[:, 1:2] / 4
    share = ((torch.stack(walk, 1) - low) / (high - low)).clamp(0, 1)
    share[:, :CLEAR] = 1
    return share


def render(angles: Tensor) -> Tensor:
    """Pictures `(..., SIDE, SIDE)` without noise at angles `(...)`: a rod and a bob with soft edges.

    >>> picture = render(torch.tensor(0.0))
    >>> bool(torch.allclose(picture, picture.flip(-1)))
    True
    """
    x, y = _grid()
    y = y - PIVOT
    sin, cos = (f(angles)[..., None, None] for f in (torch.sin, torch.cos))
    along, across = x * sin + y * cos, x * cos - y * sin
    bob = torch.exp(-((along - ROD).square() + across.square()) / (2 * RADIUS**2))
    rod = 0.5 * torch.exp(-across.square() / (2 * WIDTH**2)) * ((along > 0) & (along < ROD))
    return torch.maximum(bob, rod)


def swing(z: Tensor, kick: Tensor | float, step: float) -> Tensor:
    """The state `(N, 2)` after `step` seconds: the plant Pendulum seen from its lower rest, with friction.

    kick `(N,)`: added to the speed [rad/s] before the pendulum moves on.
    """
    rest = z.new_tensor([math.pi, 0.0])
    change = kick - step * FRICTION * z[..., 1]
    w = torch.stack([step * change, change], -1)
    return Pendulum(step=step, speed=math.inf)(z + rest, z.new_zeros(len(z), 1), w) - rest


def linear_model(step: float) -> Tensor:
    """A `(2, 2)` of small swings: `swing` linearized at rest."""
    rest, none = torch.zeros(2, dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE)
    return linearize(lambda z, u, w: swing(z, 0.0, step), rest, none)[0]


def record(
    count: int, length: int, generator: torch.Generator, *, step: float, push: float, camera: Camera
) -> Recording:
    """`count` films of `length` pictures every `step` seconds; the speed is pushed by N(0, push^2) [rad/s] a step."""
    z = torch.randn(count, 2, generator=generator, dtype=DOUBLE) * torch.tensor(SPREAD, dtype=DOUBLE)
    kicks, states = push * torch.randn(count, length, generator=generator, dtype=DOUBLE), [z]
    for kick in kicks[:, 1:].unbind(1):
        z = swing(z, kick, step)
        states.append(z)
    path = torch.stack(states, 1)
    return Recording(camera.shoot(path[..., 0], generator), path)
