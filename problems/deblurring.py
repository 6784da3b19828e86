"""Photographs of three packages, blurred circularly by a known kernel, and noisy patches to train denoisers on."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from convexlearn.extras import require
from convexlearn.problems import images
from convexlearn.rules.base import as_rule
from convexlearn.simulate.base import Trajectory
from convexlearn.simulate.pairs import Pairs

MORE = ("ascent", "aero", "grace_hopper")
"""Training photographs of PyWavelets and matplotlib; PyWavelets' camera is a test photograph of scikit-image."""

TRAIN = (*images.TRAIN, *MORE)

TAPS = 9
"""Side of the kernel, in pixels."""

NOISE_LEVELS = (1 / 255, 40 / 255)
"""Range of sigma on which a denoiser is trained, drawn uniformly in its logarithm; intensities."""


@cache
def photograph(name: str) -> Tensor:
    """A grey photograph, 2x2 pixels averaged, intensities in [0, 1], float64 `(height, width)`, from a package."""
    if name not in MORE:
        return images.photograph(name)
    if name == "grace_hopper":
        folder = Path(require("matplotlib", "imaging").get_data_path()) / "sample_data"
        pixels = require("skimage.io", "imaging").imread(folder / "grace_hopper.jpg") @ np.array(images.LUMINANCE)
    else:
        pixels = getattr(require("pywt.data", "imaging"), name)()
    height, width = (side // 2 for side in pixels.shape)
    cut = pixels[: 2 * height, : 2 * width] / 255.0
    return torch.tensor(cut.reshape(height, 2, width, 2).mean((1, 3)))


def blurring(side: int, deviation: float) -> sp.csr_array:
    """Circular convolution with a Gaussian of TAPS pixels along one axis, `(side, side)`; rows sum to one."""
    offsets = np.arange(TAPS) - TAPS // 2
    taps = np.exp(-(offsets**2) / (2 * deviation**2))
    return circulant(side, dict(zip(offsets.tolist(), taps / taps.sum())))


def circulant(side: int, taps: dict[int, float]) -> sp.csr_array:
    """The matrix `(side, side)` whose row i weighs entry i + k, round the circle, by taps[k]."""
    matrix = np.zeros((side, side))
    for offset, weight in taps.items():
        matrix[np.arange(side), (np.arange(side) + offset) % side] += weight
    return sp.csr_array(matrix)


@dataclass(frozen=True)
class Camera:
    """Eq. 3, x = H s + w: deviation of the Gaussian kernel (pixels), noise (intensities), side of pictures (pixels)."""

    deviation: float
    noise: float
    side: int

    def shoot(self, s: Tensor, generator: torch.Generator) -> Pairs:
        """Blurred, noisy pictures of s `(N, side, side)`, float32."""
        C = torch.tensor(blurring(self.side, self.deviation).toarray())
        clean = C @ s @ C.T
        x = clean + self.noise * torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
        return Pairs(x.float(), s.float())

    def random_crops(self, names: tuple[str, ...], count: int, generator: torch.Generator) -> Pairs:
        """`count` pictures at random places, the photographs in turn."""
        return self.shoot(random_windows(names, count, self.side, generator), generator)

    def central_crops(self, names: tuple[str, ...], generator: torch.Generator) -> Pairs:
        """The centre of each photograph."""
        windows = []
        for photo in map(photograph, names):
            top, left = ((n - self.side) // 2 for n in photo.shape)
            windows.append(photo[top : top + self.side, left : left + self.side])
        return self.shoot(torch.stack(windows), generator)


def random_windows(names: tuple[str, ...], count: int, side: int, generator: torch.Generator) -> Tensor:
    """Windows of the photographs in turn, `(count, side, side)`, float64, each turned and mirrored at random."""
    windows = []
    for k in range(count):
        photo = photograph(names[k % len(names)])
        top, left = (int(torch.randint(n - side + 1, (), generator=generator)) for n in photo.shape)
        window = photo[top : top + side, left : left + side]
        turns, mirrored = (int(torch.randint(high, (), generator=generator)) for high in (4, 2))
        window = torch.rot90(window, turns)
        windows.append(window.T if mirrored else window)
    return torch.stack(windows)


class NoisyPatches:
    """Simulator for denoisers (x, sigma) -> s: clean patches `(N, h, w)`, white noise of a random level drawn anew."""

    def __init__(self, clean: Tensor) -> None:
        self.clean = clean.float()

    def __call__(
        self, rule: object, batch_size: int | None = None, generator: torch.Generator | None = None
    ) -> Trajectory:
        """Decisions on `batch_size` patches; the trajectory's context is (x, sigma)."""
        count = batch_size or 16
        s = self.clean[torch.randint(len(self.clean), (count,), generator=generator)]
        low, high = (float(np.log(level)) for level in NOISE_LEVELS)
        sigma = (low + (high - low) * torch.rand(count, generator=generator)).exp()
        x = s + sigma[:, None, None] * torch.randn(s.shape, generator=generator)
        return Trajectory((x, sigma), as_rule(rule)(x, sigma), target=s)  # pyright: ignore[reportArgumentType]


def relative_error(trajectory: Trajectory) -> Tensor:
    """Mean squared error over that of the noisy patch itself, `(B,)`, so that all noise levels count alike."""
    _, sigma = trajectory.context  # pyright: ignore
    return (trajectory.decision - trajectory.target).square().mean((1, 2)) / sigma.square()
