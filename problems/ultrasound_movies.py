"""Simulated contrast-enhanced ultrasound: complex movies of slow tissue, moving microbubbles and noise."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PIXEL = 0.12
"""Side of a pixel in mm."""

INTERVAL = 0.01
"""Time between frames in s."""

WIDTHS = (0.14 / PIXEL, 0.32 / PIXEL)
"""Standard deviations of the point-spread function in pixels, down and across."""

TEXTURE = (math.hypot(3.0, WIDTHS[0]), math.hypot(3.0, WIDTHS[1]))
"""Of tissue: noise low-passed to 3 pixels, then seen through the point-spread function."""

DENSITY = 130.0
"""Most bubbles per square centimetre; a movie's own density is uniform between none and this."""

SPEED = 24.0 * INTERVAL / PIXEL
"""Unit of speed in pixels per frame: a bubble keeps its own, SPEED times N(1, 1) given that this is positive."""

RIM = 8
"""Pixels beyond each side of the picture that still matter."""


@dataclass(frozen=True)
class Movies:
    """Movies of `pixels` x `pixels`, in the units of a bubble's mean peak amplitude before each is scaled.

    tissue: root mean square amplitude. noise: standard deviation, after the point-spread function. motion: of the
    tissue in pixels, at the edge of the picture, from beginning to end. Set-up: Solomon et al. 2019 (reference 37
    of the paper); the tissue also turns, shears and shifts here, without which it would have rank one.
    """

    pixels: int = 32
    frames: int = 20
    tissue: float = 1.4
    noise: float = 0.1
    motion: float = 1.15

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """D and (L, S), complex64 `(count, pixels * pixels, frames)`: a pixel's course in time is a row.

        Each movie is divided by the largest modulus in D, L and S.
        """
        L, S = self.draw_tissue(count, generator), self.draw_bubbles(count, generator)
        side = self.pixels + 2 * RIM
        shape = (count, self.frames, side, side)
        white = torch.randn(shape, generator=generator, dtype=torch.complex64)
        noise = _blur(white, WIDTHS)[..., RIM:-RIM, RIM:-RIM]
        noise = self.noise * noise / _gain(side)
        parts = [p.flatten(2).mT for p in (L + S + noise, L, S)]
        scale = torch.stack([p.abs().amax((1, 2)) for p in parts]).amax(0)[:, None, None]
        D, L, S = (p / scale for p in parts)
        return D, (L, S)

    def draw_bubbles(self, count: int, generator: torch.Generator) -> Tensor:
        """S `(count, frames, pixels, pixels)`: bubbles on winding paths, each a Gaussian spot of complex amplitude."""
        side = self.pixels + 2 * RIM
        most = math.ceil(DENSITY * (side * PIXEL / 10) ** 2)
        share = torch.rand(count, 1, generator=generator)
        shown = torch.rand(count, most, generator=generator) < share
        start = side * torch.rand(count, most, 1, 2, generator=generator)
        above = torch.rand(count, most, 1, generator=generator, dtype=torch.float64)
        still = 0.15865525393145707  # share of N(1, 1) below zero
        speed = SPEED * (1 + torch.special.ndtri(still + (1 - still) * above)).float()
        turns = (torch.rand(count, most, self.frames, generator=generator) - 0.5) * math.pi / 3
        angle = 2 * math.pi * torch.rand(count, most, 1, generator=generator) + turns.cumsum(2)
        moves = speed.unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], -1)
        place = (start + moves.cumsum(2)) % side - RIM  # what leaves on one side enters on the other
        first = torch.randn(count, most, 1, generator=generator, dtype=torch.complex64) / math.sqrt(math.pi / 4)
        wobble = 1 + 0.2 * (torch.rand(count, most, self.frames, generator=generator) - 0.5)
        amplitude = first * shown.unsqueeze(-1) * wobble
        grid = torch.arange(self.pixels, dtype=torch.float32)
        down, across = (
            torch.exp(-((grid - place[..., k, None]) ** 2) / (2 * WIDTHS[k] ** 2)).transpose(1, 2) for k in range(2)
        )
        return (amplitude.transpose(1, 2).unsqueeze(-1) * down).mT @ across.to(torch.complex64)

    def draw_tissue(self, count: int, generator: torch.Generator) -> Tensor:
        """L `(count, frames, pixels, pixels)`: speckle under five broad envelopes, which moves slowly and pulsates."""
        side = self.pixels + 2 * RIM
        speckle = _blur(torch.randn(count, side, side, generator=generator, dtype=torch.complex64), TEXTURE)
        grid = torch.arange(side, dtype=torch.float32)
        centre, width = (torch.rand(count, 5, 2, generator=generator) for _ in range(2))
        spots = [
            torch.exp(
                -((grid - side * centre[..., k, None]) ** 2) / (2 * (side * (0.07 + 0.11 * width[..., k, None])) ** 2)
            )
            for k in range(2)
        ]
        still = speckle * (spots[0].mT @ spots[1])
        still = still / still.abs().square().mean((1, 2), keepdim=True).sqrt()
        phase = (torch.rand(count, self.frames, generator=generator) - 0.5) * math.pi / 6
        size = 0.6 + 0.4 * torch.rand(count, self.frames, generator=generator)
        pulse = self.tissue * torch.polar(size / math.sqrt(0.6533), phase)
        return pulse[..., None, None] * self._moved(still, generator)

    def _moved(self, still: Tensor, generator: torch.Generator) -> Tensor:
        """The field `(count, side, side)` turned, sheared and shifted along half a slow oscillation."""
        count, side = len(still), still.shape[1]
        reach = self.motion / (self.pixels / 2)
        size = (torch.rand(count, 1, 6, generator=generator) * 2 - 1) * reach
        rate, phase = (torch.rand(count, 1, 6, generator=generator) for _ in range(2))
        time = torch.linspace(0, 1, self.frames)[:, None]
        change = size * torch.sin(math.pi * (0.5 + rate) * time + 2 * math.pi * phase)
        change[..., 2::3] *= self.pixels / side
        affine = (torch.eye(2, 3) + change.reshape(count, self.frames, 2, 3)).flatten(0, 1)
        affine[:, :, :2] *= self.pixels / side
        where = torch.nn.functional.affine_grid(
            affine, [count * self.frames, 1, self.pixels, self.pixels], align_corners=False
        )
        parts = torch.view_as_real(still).movedim(-1, 1).repeat_interleave(self.frames, 0)
        seen = torch.nn.functional.grid_sample(parts, where, mode="bicubic", align_corners=False)
        moved = torch.view_as_complex(seen.movedim(1, -1).contiguous())
        return moved.reshape(count, self.frames, self.pixels, self.pixels)


def _blur(field: Tensor, widths: tuple[float, float]) -> Tensor:
    """Gaussian blur of `(..., side, side)`, periodic."""
    down, across = (torch.exp(-2 * (math.pi * w * torch.fft.fftfreq(field.shape[-1])) ** 2) for w in widths)
    return torch.fft.ifft2(torch.fft.fft2(field) * (down[:, None] * across))


def _gain(side: int) -> float:
    """Standard deviation of white noise of variance one after the blur by the point-spread function."""
    down, across = (torch.exp(-4 * (math.pi * w * torch.fft.fftfreq(side)) ** 2).mean() for w in WIDTHS)
    return float((down * across).sqrt())
