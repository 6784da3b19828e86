"""What the two localisation problems share: the optics, scenes of points, peaks, matching, measures."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.ndimage import maximum_filter
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor, nn

from convexlearn.errors import OptionError
from convexlearn.rules.base import as_rule
from convexlearn.simulate.base import Trajectory, not_finite

FACTOR = 4
"""High-resolution pixels per low-resolution pixel, in each direction."""

REACH = 3.5
"""Standard deviations after which the model cuts the point-spread function off."""

TOLERANCE = 1.0
"""Distance (high-resolution pixels) up to which a found point counts as a true one."""

LEVELS = np.geomspace(0.02, 1.0, 18)
"""Amplitudes tried as the least one that counts as found."""


@dataclass(frozen=True)
class Optics:
    """A Gaussian point-spread function seen by coarse pixels.

    widths: standard deviations (vertical, horizontal) in high-resolution pixels; pixels: side of the
    low-resolution picture. A point of amplitude one at the centre of a low-resolution pixel shows there as one.
    """

    widths: tuple[float, float]
    pixels: int

    def __post_init__(self) -> None:
        if min(self.widths) <= 0 or self.pixels < 1:
            raise OptionError(f"widths and pixels must be positive, got {self.widths} and {self.pixels}")

    @property
    def side(self) -> int:
        """Side of the high-resolution picture."""
        return FACTOR * self.pixels

    def widened(self, factor: float) -> "Optics":
        """The same with a wider point-spread function."""
        return Optics((factor * self.widths[0], factor * self.widths[1]), self.pixels)

    def squared(self) -> "Optics":
        """The optics of variances: each point adds its variance through the squared point-spread function."""
        return self.widened(math.sqrt(0.5))

    def kernel(self) -> Tensor:
        """The point-spread function `(p, q)` that a low-resolution pixel weighs the pixels around its centre with."""
        return torch.outer(*(_taps(width) for width in self.widths))

    def axes(self) -> tuple[Tensor, Tensor]:
        """V and H' of x = V s H', float64 `(pixels, side)` both: the point-spread function is separable."""
        vertical, horizontal = (_axis(width, self.pixels) for width in self.widths)
        return vertical, horizontal

    def render(self, places: Tensor, amplitudes: Tensor, jitter: Tensor | float = 1.0) -> Tensor:
        """Pictures `(..., h, w)` of points at `places` `(..., N, 2)` (high-resolution pixels, row and column).

        amplitudes `(..., N)`; jitter, a number or `(..., N)`, stretches the width of each point. Nothing is cut off.
        """
        along = torch.einsum("...n,...ni,...nj->...ij", amplitudes, *self.profiles(places, jitter))
        return along

    def profiles(self, places: Tensor, jitter: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        """The two factors `(..., N, pixels)` of the picture of each point."""
        centres = FACTOR * torch.arange(self.pixels, dtype=places.dtype) + (FACTOR - 1) / 2
        stretch = torch.as_tensor(jitter, dtype=places.dtype).unsqueeze(-1)
        vertical, horizontal = (
            torch.exp(-0.5 * ((places[..., k, None] - centres) / (width * stretch)).square())
            for k, width in enumerate(self.widths)
        )
        return vertical, horizontal


def _taps(width: float) -> Tensor:
    reach = FACTOR // 2 * math.ceil(REACH * width / (FACTOR // 2))
    offsets = torch.arange(-reach, reach, dtype=torch.float64) + 0.5
    return torch.exp(-0.5 * (offsets / width).square())


def _axis(width: float, pixels: int) -> Tensor:
    taps, matrix = _taps(width), torch.zeros(pixels, FACTOR * pixels, dtype=torch.float64)
    for i in range(pixels):
        first = FACTOR * i + FACTOR // 2 - len(taps) // 2
        for k in range(max(0, first), min(FACTOR * pixels, first + len(taps))):
            matrix[i, k] = taps[k - first]
    return matrix


def draw_image(side: int, places: Tensor, amplitudes: Tensor) -> Tensor:
    """Pictures `(B, side, side)` with each amplitude `(B, N)` in the pixel nearest to its place `(B, N, 2)`."""
    nearest = places.round().long().clamp(0, side - 1)
    flat = amplitudes.new_zeros(len(places), side * side)
    flat.scatter_add_(1, nearest[..., 0] * side + nearest[..., 1], amplitudes)
    return flat.reshape(-1, side, side)


def peaks(s: Tensor, level: float) -> Tensor:
    """s `(B, n, n)` at its local maxima (among 3x3 pixels) of at least `level`, zero elsewhere.

    >>> peaks(torch.tensor([[[0.0, 1.0, 2.0], [0.0, 0.0, 0.0], [3.0, 0.0, 0.1]]]), 0.5)
    tensor([[[0., 0., 2.],
             [0., 0., 0.],
             [3., 0., 0.]]])
    """
    array = s.detach().cpu().numpy()
    top = maximum_filter(array, size=(1, 3, 3), mode="constant") <= array
    return torch.where(torch.as_tensor(top, device=s.device) & (s >= level) & (s > 0), s, 0.0)


def match(found: np.ndarray, true: np.ndarray, tolerance: float) -> np.ndarray:
    """Distances `(M,)` of the pairs of an assignment of points `(N, 2)` to points `(K, 2)`, none beyond `tolerance`.

    As many pairs as possible, and among such assignments the least sum of squares (scipy's linear_sum_assignment).

    >>> match(np.array([[0.0, 0.0], [5.0, 5.0]]), np.array([[0.0, 1.0], [0.0, 9.0]]), 2.0).tolist()
    [1.0]
    """
    distances = cdist(found, true)
    near = distances <= tolerance
    far = (1 + min(distances.shape, default=0)) * (1 + tolerance**2)  # dearer than all near pairs together
    rows, columns = linear_sum_assignment(np.where(near, distances**2, far))
    return distances[rows, columns][near[rows, columns]]


def matches(trajectory: Trajectory, tolerance: float = TOLERANCE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers `(B,)` of found points, of true points, of pairs, and the pairs' summed squared distances.

    Points are the pixels that are not zero, in the decision and in the target.
    """
    rows = []
    for s, target in zip(trajectory.decision.detach().cpu().numpy(), trajectory.target.cpu().numpy()):  # pyright: ignore
        found, true = np.argwhere(s), np.argwhere(target)
        distances = match(found, true, tolerance)
        rows.append((len(found), len(true), len(distances), float((distances**2).sum())))
    found, true, pairs, squares = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4).unbind(1)
    return found, true, pairs, squares


def precision(trajectory: Trajectory) -> Tensor:
    """Share of found points that are true ones, `(B,)`; one where nothing is found."""
    found, _, pairs, _ = matches(trajectory)
    return torch.where(found > 0, pairs / found.clamp(min=1), 1.0)


def recall(trajectory: Trajectory) -> Tensor:
    """Share of true points that are found, `(B,)`; one where there are none."""
    _, true, pairs, _ = matches(trajectory)
    return torch.where(true > 0, pairs / true.clamp(min=1), 1.0)


def f1(trajectory: Trajectory) -> Tensor:
    """Harmonic mean of precision and recall `(B,)`: twice the pairs over found and true points; one without points."""
    found, true, pairs, _ = matches(trajectory)
    return torch.where(found + true > 0, 2 * pairs / (found + true).clamp(min=1), 1.0)


def rmse(trajectory: Trajectory) -> Tensor:
    """Root of the mean squared distance of found to true points `(B,)`, in high-resolution pixels.

    Over the pairs; TOLERANCE where there is none.
    """
    _, _, pairs, squares = matches(trajectory)
    return torch.where(pairs > 0, (squares / pairs.clamp(min=1)).sqrt(), TOLERANCE)


for _measure in (precision, recall, f1):
    _measure.maximize = True  # type: ignore[attr-defined]

MEASURES: dict[str, Callable[[Trajectory], Tensor]] = {"f1": f1, "precision": precision, "recall": recall, "rmse": rmse}


def spread(s: Tensor, sigma: float = 1.0) -> Tensor:
    """Gaussian blur of pictures `(B, n, n)`, standard deviation in pixels: a point that is one pixel off costs less."""
    reach = math.ceil(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=s.dtype) / sigma).square())
    taps = taps / taps.sum()
    rows = nn.functional.conv2d(s.unsqueeze(1), taps.reshape(1, 1, -1, 1), padding=(reach, 0))
    return nn.functional.conv2d(rows, taps.reshape(1, 1, 1, -1), padding=(0, reach)).squeeze(1)


def spread_error(trajectory: Trajectory) -> Tensor:
    """Squared error `(B,)` of the blurred picture: what the learned rules are trained on (Nehme et al. 2018)."""
    return spread(trajectory.decision - trajectory.target).square().sum((1, 2))


class Scenes(ABC):
    """Simulator of points seen by a camera: new ones for each call. A subclass defines `draw`."""

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Contexts x `(count, h, w)` and true pictures s `(count, n, n)`, float32."""

    def __call__(self, rule: Any, batch_size: int, generator: torch.Generator) -> Trajectory:
        """Decisions on new samples."""
        x, s = self.draw(batch_size, generator)
        decision = as_rule(rule)(x)
        return Trajectory(x, decision, target=s, failed=not_finite(decision, len(x)))
