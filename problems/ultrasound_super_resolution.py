"""Ultrasound super-resolution by localising micro-bubbles: sparse recovery unfolded (Examples 10, 16, 17; Fig. 7)."""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from convexlearn.errors import OptionError
from convexlearn.extras import require
from convexlearn.problems import localisation_figures as drawing
from convexlearn.problems.catalogue import ProblemEntry, Reference, Result, Study
from convexlearn.problems.images import photograph
from convexlearn.problems.localisation import MEASURES, Optics, Scenes, draw_image, f1, spread
from convexlearn.problems.localisation_rules import REFERENCE, Data, Plan, contenders, declare, misses
from convexlearn.randomness import make_generator
from convexlearn.simulate.pairs import Pairs

WIDTHS = (2.4, 3.6)
"""Standard deviations of the point-spread function (vertical, horizontal), high-resolution pixels of 0.05 mm."""

MISMATCH = 1.3
"""Factor on the widths in the second test, of which model and training know nothing."""

RHO_GRID = np.geomspace(0.02, 1.5, 8)

FRAMES = 256
"""Frames of the drawn movie."""


@dataclass(frozen=True)
class Setting:
    """Options. pixels: side of x; fewest, most: bubbles in a picture; noise: deviation, in units of a mean bubble's
    peak; jitter: relative change of a bubble's width; layers: K; tests: number of test pictures.
    """

    pixels: int = 12
    fewest: int = 4
    most: int = 10
    noise: float = 0.05
    jitter: float = 0.1
    layers: int = 10
    tests: int = 128

    def __post_init__(self) -> None:
        if not 0 <= self.fewest <= self.most or min(self.most, self.layers, self.tests) < 1:
            raise OptionError(
                "need 0 <= fewest <= most, and at least one bubble, layer and test, got "
                f"{self.fewest}, {self.most}, {self.layers}, {self.tests}"
            )
        if not 8 <= self.pixels <= 64 or self.noise < 0 or not 0 <= self.jitter < 1:
            raise OptionError(
                f"need 8 <= pixels <= 64, noise >= 0, 0 <= jitter < 1, got {self.pixels}, {self.noise}, {self.jitter}"
            )


@cache
def vessels() -> Tensor:
    """Where there are vessels, bool `(705, 705)`: dark ridges (Sato et al. 1998) of scikit-image's retina."""
    photo = photograph("retina")
    ridges = require("skimage.filters", "imaging").sato(photo.numpy(), sigmas=[1.5, 2.5], black_ridges=True)
    share = torch.nn.functional.avg_pool2d((photo > 0.08).double()[None], 31, 1, 15)[0]
    return (torch.tensor(ridges) > 0.02) & (share > 0.999)  # the eye's rim is a ridge too


@dataclass(frozen=True, eq=False)
class Bubbles(Scenes):
    """Micro-bubbles in random fields of a vessel map: mask bool `(height, width)`, see Setting for the rest."""

    optics: Optics
    mask: Tensor
    setting: Setting

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pictures x `(count, h, w)` and amplitudes s `(count, n, n)` of new bubbles, float32.

        A bubble lies anywhere in a vessel's pixel, with amplitude from 0.5 to 1.5.
        """
        n, most = self.optics.side, self.setting.most
        inside = self.fields(count, generator).flatten(1)
        chosen = (torch.rand(inside.shape, generator=generator) * inside).topk(most, 1).indices
        number = torch.randint(self.setting.fewest, most + 1, (count, 1), generator=generator)
        amplitudes = (0.5 + torch.rand(count, most, generator=generator)) * (torch.arange(most) < number)
        places = torch.stack([chosen // n, chosen % n], -1).float()
        places = places + torch.rand(places.shape, generator=generator) - 0.5
        return self.expose(places, amplitudes, generator), draw_image(n, places, amplitudes)

    def expose(self, places: Tensor, amplitudes: Tensor, generator: torch.Generator) -> Tensor:
        """Noisy pictures `(B, h, w)` of bubbles, the width of each a little different."""
        stretch = 1 + self.setting.jitter * (2 * torch.rand(amplitudes.shape, generator=generator) - 1)
        clean = self.optics.render(places, amplitudes, stretch)
        return clean + self.setting.noise * torch.randn(clean.shape, generator=generator)

    def fields(self, count: int, generator: torch.Generator) -> Tensor:
        """Random windows `(count, n, n)` of the map, at least a twentieth of each in vessels."""
        corners, span = self.corners, torch.arange(self.optics.side)
        corner = corners[torch.randint(len(corners), (count,), generator=generator)]
        return self.mask[(corner[:, :1] + span)[:, :, None], (corner[:, 1:] + span)[:, None, :]]

    def movie(self, frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One field over time: x `(frames, h, w)`, s `(frames, n, n)`; bubbles drift along the vessels.

        Each keeps its amplitude and speed, 0.5 to 2.5 pixels a frame; one that leaves the field enters anew,
        as does one in twenty in each frame.
        """
        n, count = self.optics.side, (self.setting.fewest + self.setting.most) // 2
        field = max(self.fields(64, generator), key=lambda window: float(window.sum()))
        direction, nearest = flow(field)
        seeds = field.nonzero()

        def enter(number: int) -> Tensor:
            return seeds[torch.randint(len(seeds), (number,), generator=generator)].float()

        places, heading = enter(count), torch.ones(count, 2)
        speeds, amplitudes = (0.5 + factor * torch.rand(count, generator=generator) for factor in (2.0, 1.0))
        history = []
        for _ in range(frames):
            history.append(places)
            at = places.round().long().clamp(0, n - 1)
            along = direction[at[:, 0], at[:, 1]]
            heading = along * torch.where((along * heading).sum(1, keepdim=True) < 0, -1.0, 1.0)
            moved = places + speeds[:, None] * heading
            gone = ((moved < -0.5) | (moved > n - 0.5)).any(1) | (torch.rand(count, generator=generator) < 0.05)
            at = moved.round().long().clamp(0, n - 1)
            stray = ~field[at[:, 0], at[:, 1]]
            moved = torch.where(stray[:, None], nearest[at[:, 0], at[:, 1]], moved)
            places = torch.where(gone[:, None], enter(count), moved)
        places, amplitudes = torch.stack(history), amplitudes.expand(frames, -1)
        return self.expose(places, amplitudes, generator), draw_image(n, places, amplitudes)

    @cached_property
    def corners(self) -> Tensor:
        """Upper left corners `(k, 2)` of the windows with at least a twentieth in vessels."""
        n = self.optics.side
        rows = torch.nn.functional.avg_pool2d(self.mask.double()[None], (n, 1), 1)
        return (torch.nn.functional.avg_pool2d(rows, (1, n), 1)[0] > 0.05).nonzero()


def flow(field: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors along the vessels, and the nearest vessel pixel, both `(n, n, 2)`, of a map bool `(n, n)`."""
    depth = distance_transform_edt(field.numpy())
    tensor = require("skimage.feature", "imaging").structure_tensor(np.asarray(depth), sigma=2.0, order="rc")
    rows, mixed, columns = (torch.tensor(part) for part in tensor)
    across = 0.5 * torch.atan2(2 * mixed, rows - columns)  # angle of the steepest direction, from the row axis
    direction = torch.stack([-across.sin(), across.cos()], -1).float()
    nearest = distance_transform_edt(~field.numpy(), return_distances=False, return_indices=True)
    return direction, torch.tensor(np.stack(nearest, -1)).float()  # pyright: ignore


def scenes(setting: Setting) -> tuple[Bubbles, Bubbles, Bubbles, Bubbles]:
    """Training in the left half of the retina, tests in the right half; the same two with the wider function."""
    optics, mask = Optics(WIDTHS, setting.pixels), vessels()
    middle = mask.shape[1] // 2
    left, right = mask[:, :middle], mask[:, middle:]
    train, test, train_wide, test_wide = (
        Bubbles(o, m, setting) for o in (optics, optics.widened(MISMATCH)) for m in (left, right)
    )
    return train, test, train_wide, test_wide


def build(seed: int, setting: Setting) -> Study:
    """Draw the bubbles from `seed` and set up the rules at their start values."""
    train, test, train_wide, test_wide = scenes(setting)
    pairs, wide = (Pairs(*s.draw(setting.tests, make_generator(seed, "test"))) for s in (test, test_wide))
    tuning = (Pairs(*s.draw(96, make_generator(seed, "tuning"))) for s in (train, train_wide))
    problem, parts = declare(train.optics)
    rules = contenders(parts, train.optics, Data(train, train_wide, *tuning), Plan(setting.layers, RHO_GRID), seed)
    return Study(problem, rules, pairs, {**MEASURES, "f1_wide": f1}, simulators={"f1_wide": wide})


def figures(result: Result) -> dict[str, Any]:
    """Reconstructions of frames, and the vessels that the bubbles of a movie draw, as Fig. 7."""
    test = scenes(Setting(pixels=result.study.test.x.shape[1]))[1]
    x, s = test.movie(FRAMES, make_generator(result.seed, "movie"))
    truth = spread(s.sum(0, keepdim=True), 0.7)[0]
    maps, titles = {"mean of the movie": x.mean(0), "truth": truth}, {}
    for name in drawing.SHOWN:
        with torch.no_grad():
            found = result.rules[name](x)
        maps[name] = spread(found.sum(0, keepdim=True), 0.7)[0]
        likeness = torch.corrcoef(torch.stack([maps[name].flatten(), truth.flatten()]))[0, 1].item()
        titles[name] = f"correlation with truth {likeness:.2f}"
    return {**drawing.figures(result), "vessels": drawing.plot_maps(maps, titles)}


ENTRY = ProblemEntry(
    name="ultrasound-super-resolution",
    summary="micro-bubbles localised on a grid four times finer: FISTA, ten learned layers, a network",
    source="Examples 10, 16, 17; Fig. 7; Bar-Shira et al. 2021",
    shapes="""\
x: context, an ultrasound picture (B, 12, 12) with pixels of 0.2 mm; amplitudes in units of a mean bubble's peak
s: decision, amplitudes of bubbles (B, 48, 48) on pixels of 0.05 mm, zero without a bubble; units as x
V, H: the point-spread function along both axes (12, 48); no unit
rho: weight () of the 1-norm; W1, W2: kernels of each layer; threshold: (K,); amplitudes times L
f1, precision, recall: of points within 1 fine pixel (0.05 mm) of a true one, one to one, per picture
rmse: of the distances of these pairs, fine pixels; f1_wide: f1 where the point-spread function is 1.3 times wider""",
    reference=Reference(REFERENCE, misses),
    setting=Setting(),
    build=build,
    figures=figures,
    tables=drawing.mismatch_table,
)
