"""Super-resolution microscopy in the correlation domain: blinking emitters, variances, unfolding (Fig. 8)."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convexlearn.errors import OptionError
from convexlearn.problems import localisation_figures as drawing
from convexlearn.problems.catalogue import ProblemEntry, Reference, Result, Study
from convexlearn.problems.localisation import MEASURES, Optics, Scenes, draw_image, f1, spread
from convexlearn.problems.localisation_rules import REFERENCE, Data, Plan, contenders, declare, misses
from convexlearn.randomness import make_generator
from convexlearn.simulate.pairs import Pairs

WIDTHS = (4.0, 4.0)
"""Standard deviation of the point-spread function, high-resolution pixels of 25 nm: half its peak at 235 nm across."""

MISMATCH = 1.3
"""Factor on the width in the second test, of which model and training know nothing."""

RHO_GRID = np.geomspace(0.02, 2.0, 8)


@dataclass(frozen=True)
class Setting:
    """Options. pixels: side of x; filaments: in a field; spacing: mean distance of emitters along them (high-resolution
    pixels); frames: in a stack; duty: share of frames in which an emitter shines; noise: of a pixel in a frame, in
    units of an emitter's deviation; layers: K; tests: number of test fields; smooth: also train LSPARCOM's shrinkage.
    """

    pixels: int = 12
    filaments: int = 2
    spacing: float = 6.0
    frames: int = 350
    duty: float = 0.05
    noise: float = 0.3
    layers: int = 10
    tests: int = 128
    smooth: bool = True

    def __post_init__(self) -> None:
        if not 8 <= self.pixels <= 64 or min(self.filaments, self.layers, self.tests) < 1 or self.frames < 2:
            raise OptionError(
                "need 8 <= pixels <= 64, at least one filament, layer and test field, and two frames, got "
                f"{self.pixels}, {self.filaments}, {self.layers}, {self.tests}, {self.frames}"
            )
        if self.spacing <= 0 or not 0 < self.duty < 1 or self.noise < 0:
            raise OptionError(
                f"need spacing > 0, 0 < duty < 1, noise >= 0, got {self.spacing}, {self.duty}, {self.noise}"
            )


@dataclass(frozen=True, eq=False)
class Emitters(Scenes):
    """Blinking emitters along filaments, as on tubulins; see Setting."""

    optics: Optics
    setting: Setting

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Temporal variances x `(count, h, w)` of new stacks, and those of the emitters s `(count, n, n)`, float32."""
        places, deviations = self.emitters(count, generator)
        stack = self.stack(places, deviations, generator)
        return self.correlate(stack), draw_image(self.optics.side, places, deviations.square())

    def emitters(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Places `(count, N, 2)` and deviations `(count, N)` of the intensity; zero for those outside of the field."""
        n, setting = self.optics.side, self.setting
        curves = self.filaments(count * setting.filaments, generator)
        chosen = torch.rand(curves.shape[:2], generator=generator) * setting.spacing < 1
        inside = ((curves > -0.5) & (curves < n - 0.5)).all(-1) & chosen
        places = curves.reshape(count, -1, 2)
        variances = 0.5 + torch.rand(inside.shape, generator=generator)
        deviations = (variances.sqrt() * inside).reshape(count, -1)
        kept = deviations.topk(max(1, int((deviations > 0).sum(1).max())), 1).indices
        places = places.gather(1, kept.unsqueeze(-1).expand(-1, -1, 2))
        places = places + torch.rand(places.shape, generator=generator) - 0.5
        return places.clamp(-0.5, n - 0.51), deviations.gather(1, kept)

    def filaments(self, count: int, generator: torch.Generator) -> Tensor:
        """Smooth curves `(count, M, 2)` through the field, one point each pixel of length."""
        n = self.optics.side
        steps = 2 * n
        start = n * (0.2 + 0.6 * torch.rand(count, 1, 2, generator=generator))
        angle = 2 * math.pi * torch.rand(count, 1, generator=generator)
        bends = 0.15 * torch.randn(count, steps, generator=generator) / math.sqrt(n / 48)
        angles = angle + torch.nn.functional.avg_pool1d(bends.cumsum(1).unsqueeze(1), 9, 1, 4)[:, 0]
        angles = angles - angles[:, steps // 2, None] + angle
        path = torch.stack([angles.sin(), angles.cos()], -1).cumsum(1)
        return start + path - path[:, steps // 2, None]

    def stack(self, places: Tensor, deviations: Tensor, generator: torch.Generator) -> Tensor:
        """Frames `(B, T, h, w)`: an emitter shines in a share of them, such that its intensity has its deviation."""
        B, N = deviations.shape
        T, duty = self.setting.frames, self.setting.duty
        shining = (torch.rand(B, T, N, generator=generator) < duty).float()
        intensity = shining * (deviations / math.sqrt(duty * (1 - duty))).unsqueeze(1)
        vertical, horizontal = self.optics.profiles(places)
        pictures = torch.einsum("bni,bnj->bnij", vertical, horizontal).flatten(2)
        frames = (intensity @ pictures).reshape(B, T, self.optics.pixels, self.optics.pixels)
        return frames + self.setting.noise * torch.randn(frames.shape, generator=generator)

    def correlate(self, stack: Tensor) -> Tensor:
        """Variances over time `(B, h, w)` of a stack `(B, T, h, w)`, the camera's own noise taken off."""
        return stack.var(1) - self.setting.noise**2


class SmoothThreshold(nn.Module):
    """LSPARCOM's shrinkage v_+ / (1 + exp(-slope (|v| - theta))) (Dardikman-Yoresh, Eldar 2020), of v `(B, n, n)`.

    theta and slope are in units of the picture: with p and q the first and last percentile of v, theta is
    p + level (q - p), and slope is divided by q - p. level and slope are trained.
    """

    def __init__(self, level: float = 0.1, slope: float = 30.0) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(level))
        self.log_slope = nn.Parameter(torch.tensor(math.log(slope)))

    def forward(self, v: Tensor) -> Tensor:
        """Nonnegative pictures of the same shape; not a proximal map."""
        low, high = percentiles(v)
        size = (high - low).clamp(min=1e-12)
        return v.clamp(min=0) * torch.sigmoid(self.log_slope.exp() / size * (v.abs() - low - self.level * size))


def percentiles(v: Tensor) -> tuple[Tensor, Tensor]:
    """The 1st and 99th percentile `(B, 1, 1)` of pictures, held constant in the backward pass."""
    flat = v.detach().flatten(1)
    k = max(1, flat.shape[1] // 100)
    low, high = flat.topk(k, 1, largest=False).values[:, -1], flat.topk(k, 1).values[:, -1]
    return low[:, None, None], high[:, None, None]


def build(seed: int, setting: Setting) -> Study:
    """Draw the fields from `seed` and set up the rules at their start values."""
    optics = Optics(WIDTHS, setting.pixels)
    scenes, wide = Emitters(optics, setting), Emitters(optics.widened(MISMATCH), setting)
    tests = [Pairs(*s.draw(setting.tests, make_generator(seed, "test"))) for s in (scenes, wide)]
    tuning = (Pairs(*s.draw(96, make_generator(seed, "tuning"))) for s in (scenes, wide))
    problem, parts = declare(optics.squared())
    data, plan = Data(scenes, wide, *tuning), Plan(setting.layers, RHO_GRID)
    rules = contenders(parts, optics.squared(), data, plan, seed)
    if setting.smooth:
        smooth = Plan(setting.layers, RHO_GRID, slots={"prox": SmoothThreshold()})
        rules["LSPARCOM"] = contenders(parts, optics.squared(), data, smooth, seed)["unfolded"]
    return Study(problem, rules, tests[0], {**MEASURES, "f1_wide": f1}, simulators={"f1_wide": tests[1]})


def figures(result: Result) -> dict[str, Any]:
    """Reconstructions of fields, and one as Fig. 8: diffraction limited, truth, FISTA, unfolded."""
    test = result.study.test
    x, s = test.x[:1], test.s[:1]
    pictures = {"diffraction limited": x[0], "truth": spread(s)[0]}
    for name in drawing.SHOWN:
        with torch.no_grad():
            pictures[name] = spread(result.rules[name].rule(x))[0]  # pyright: ignore
    return {**drawing.figures(result), "field": drawing.plot_maps(pictures)}


ENTRY = ProblemEntry(
    name="microscopy",
    summary="blinking emitters localised from temporal variances: FISTA, ten learned layers, LSPARCOM, a network",
    source="Examples 10, 17; Fig. 8; Dardikman-Yoresh, Eldar 2020 (LSPARCOM), Solomon et al. 2019 (SPARCOM)",
    shapes="""\
x: context, variance over 350 frames of each pixel (B, 12, 12), pixels of 100 nm; units of a mean emitter's variance
s: decision, variances of the emitters (B, 48, 48) on pixels of 25 nm, zero without an emitter; units as x
V, H: the squared point-spread function along both axes (12, 48); no unit
rho: weight () of the 1-norm; W1, W2: kernels of each layer; threshold: (K,); variances times L
f1, precision, recall: of points within 1 fine pixel (25 nm) of a true one, one to one, per field
rmse: of the distances of these pairs, fine pixels; f1_wide: f1 where the point-spread function is 1.3 times wider""",
    reference=Reference(REFERENCE, misses),
    setting=Setting(),
    build=build,
    figures=figures,
    tables=drawing.mismatch_table,
)
