"""Photographs bundled with scikit-image, split by image, and the camera that makes them low-resolution."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexlearn.extras import require
from convexlearn.report import new_axes

TRAIN = ("brick", "cell", "clock_motion", "gravel", "motorcycle_left", "page", "retina", "text")
VALIDATION = ("coffee", "moon")
TEST = ("astronaut", "camera", "chelsea", "coins", "grass", "hubble_deep_field", "ihc", "rocket")

FACTOR = 2
"""High-resolution pixels per low-resolution pixel, in each direction."""

RIM = 2
"""High-resolution pixels that the point-spread function sees beyond each side of a low-resolution pixel."""

LUMINANCE = (0.2125, 0.7154, 0.0721)
"""Weights of red, green and blue (ITU-R BT.709)."""


@cache
def photograph(name: str) -> Tensor:
    """A photograph of scikit-image's wheel, grey, intensities in [0, 1], float64 `(height, width)`.

    Blocks of 2x2 pixels are averaged, which removes most of the photograph's own noise. The file is
    read from the installed package; nothing is downloaded.
    """
    folder = Path(require("skimage", "imaging").__path__[0]) / "data"
    matches = sorted(folder.glob(f"{name}.*"))
    if not matches:
        raise FileNotFoundError(
            f"photograph '{name}' is not in {folder}; install a release of scikit-image with bundled "
            "images: pip install 'convexlearn[imaging]'"
        )
    pixels = require("skimage.io", "imaging").imread(matches[0]) / 255.0
    grey = pixels[..., :3] @ np.array(LUMINANCE) if pixels.ndim == 3 else pixels
    height, width = (side // 2 for side in grey.shape)
    return torch.tensor(grey[: 2 * height, : 2 * width].reshape(height, 2, width, 2).mean((1, 3)))


def downsampling(pixels: int, blur: float) -> Tensor:
    """Gaussian blur and decimation along one axis: float64 `(pixels, FACTOR * pixels + 2 * RIM)`.

    `blur` is the standard deviation of the point-spread function in high-resolution pixels. Row i
    weighs the high-resolution pixels FACTOR * i, ..., FACTOR * i + FACTOR + 2 * RIM - 1, whose middle
    two lie beneath low-resolution pixel i; each row sums to one.
    """
    taps = FACTOR + 2 * RIM
    distance = torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2
    kernel = torch.exp(-(distance**2) / (2 * blur**2))
    matrix = torch.zeros(pixels, FACTOR * pixels + 2 * RIM, dtype=torch.float64)
    for i in range(pixels):
        matrix[i, FACTOR * i : FACTOR * i + taps] = kernel / kernel.sum()
    return matrix


@dataclass(frozen=True)
class Camera:
    """Eq. 3, x = H s + w: blur (standard deviation in pixels), decimation by FACTOR, noise (intensities).

    A picture x shows `margin` low-resolution pixels more on each side than the decision s that is asked
    for, so that every rule sees what lies around its decision.
    """

    blur: float
    noise: float
    margin: int

    def shoot(
        self, photo: Tensor, corner: tuple[int, int], side: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Low-resolution picture x and the truth s beneath it, float32.

        `corner` and `side` are those of the high-resolution window that x shows: x is `(h, h)` with
        h = (side - 2 * RIM) / FACTOR, s is `(n, n)` with n = FACTOR * (h - 2 * margin).
        """
        top, left = corner
        window = photo[top : top + side, left : left + side]
        matrix = downsampling((side - 2 * RIM) // FACTOR, self.blur)
        clean = matrix @ window @ matrix.T
        x = clean + self.noise * torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
        edge = RIM + FACTOR * self.margin
        return x.float(), window[edge:-edge, edge:-edge].float()

    def window(self, size: int) -> int:
        """Side of the high-resolution window that a decision of `size` x `size` pixels needs."""
        return size + 2 * (RIM + FACTOR * self.margin)

    def random_crops(
        self, names: tuple[str, ...], count: int, size: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """`count` pictures at random places, the photographs in turn: x `(count, h, h)`, s `(count, size, size)`."""
        side, shots = self.window(size), []
        for k in range(count):
            photo = photograph(names[k % len(names)])
            corner = [int(torch.randint(n - side + 1, (), generator=generator)) for n in photo.shape]
            shots.append(self.shoot(photo, (corner[0], corner[1]), side, generator))
        x, s = zip(*shots)
        return torch.stack(x), torch.stack(s)

    def central_crops(self, names: tuple[str, ...], size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The centre of each photograph: x `(len(names), h, h)`, s `(len(names), size, size)`."""
        side, shots = self.window(size), []
        for photo in map(photograph, names):
            corner = ((photo.shape[0] - side) // 2, (photo.shape[1] - side) // 2)
            shots.append(self.shoot(photo, corner, side, generator))
        x, s = zip(*shots)
        return torch.stack(x), torch.stack(s)


def picture_grid(columns: Mapping[str, Tensor], note: Callable[[str, int], str]) -> Any:
    """Axes `(rows, columns)` of grey pictures `(rows, h, w)` in [0, 1], the column's name above and a note below."""
    rows = len(next(iter(columns.values())))
    grid = new_axes(rows, len(columns), (1.9 * len(columns), 2.1 * rows))
    for j, (name, pictures) in enumerate(columns.items()):
        for i, picture in enumerate(pictures):
            ax = grid[i, j]
            ax.imshow(picture.clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            ax.set_title(name if i == 0 else "", fontsize=10)
            ax.set_xlabel(note(name, i), fontsize=9)
    return grid
