"""Super-resolution of photographs: sparse coding of patches with tuned penalties (Examples 1, 3, 5, 10, 11)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from scipy.fft import idct
from torch import Tensor, nn

from convexlearn.errors import OptionError
from convexlearn.networks import ImageNetwork
from convexlearn.objectives import mean_squared_error, psnr
from convexlearn.problems import super_resolution_figures as drawing
from convexlearn.problems.catalogue import Budget, Contender, ProblemEntry, Reference, Result, Study
from convexlearn.problems.fitting import gradient, grid
from convexlearn.problems.images import FACTOR, RIM, TEST, TRAIN, VALIDATION, Camera, downsampling
from convexlearn.randomness import make_generator
from convexlearn.rules.affine import AffineRule
from convexlearn.rules.convex import ConvexRule
from convexlearn.rules.neural import NeuralRule
from convexlearn.simulate.pairs import Pairs
from convexlearn.tune import History

PATCH = 6
"""Side of a context patch, in low-resolution pixels; the decision is what lies beneath it."""

MARGIN = PATCH // 2
"""Low-resolution pixels that a picture shows on each side beyond the decision."""

SIDE = FACTOR * PATCH + 2 * RIM
"""Side of the unknown patch, in high-resolution pixels: all that the context's pixels see."""

TRAINING_SIZE = 32
"""Side of a training decision, in high-resolution pixels."""

RHO_GRID = np.geomspace(3e-4, 1e-1, 20)
"""Values that the oracle tries on the test pictures."""


@dataclass(frozen=True)
class Setting:
    """Options. blur: standard deviation of the point-spread function (high-resolution pixels); noise:
    standard deviation (intensities); crop: side of a test decision (high-resolution pixels); stride:
    step between neighbouring patches (low-resolution pixels); weights: also tune one rho per coefficient.
    """

    blur: float = 1.4
    noise: float = 0.02
    crop: int = 96
    stride: int = 4
    weights: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= PATCH or TRAINING_SIZE % (FACTOR * self.stride):
            raise OptionError(f"stride must be 1, 2 or 4 low-resolution pixels, got {self.stride}")
        if self.crop < 1 or self.crop % (FACTOR * self.stride):
            raise OptionError(
                f"crop must be a multiple of {FACTOR * self.stride} pixels at stride {self.stride}, got {self.crop}"
            )


class Mosaic(nn.Module):
    """A rule for patches, applied to overlapping patches of a picture; where decisions overlap, their mean.

    x `(B, h, w)` -> s `(B, FACTOR (h - 2 MARGIN), FACTOR (w - 2 MARGIN))`; `rule` maps contexts
    `(N, PATCH^2)` to decisions `(N, (FACTOR PATCH)^2)`.
    """

    def __init__(self, rule: nn.Module, stride: int) -> None:
        super().__init__()
        self.rule, self.stride = rule, stride

    def forward(self, x: Tensor) -> Tensor:
        """The decision for whole pictures."""
        contexts = patches(x, PATCH, self.stride)
        decisions = self.rule(contexts.flatten(0, 1)).reshape(*contexts.shape[:2], -1).mT
        size, step = FACTOR * PATCH, FACTOR * self.stride
        shape = (FACTOR * x.shape[1], FACTOR * x.shape[2])
        total = nn.functional.fold(decisions, shape, size, stride=step)
        count = nn.functional.fold(torch.ones_like(decisions[:1]), shape, size, stride=step)
        edge = FACTOR * MARGIN
        return (total / count)[:, 0, edge:-edge, edge:-edge]


class Bicubic(nn.Module):
    """Bicubic interpolation (Keys 1981, a = -1/2): x `(B, h, w)` -> s as Mosaic."""

    def forward(self, x: Tensor) -> Tensor:
        """The decision for whole pictures."""
        return interpolate(x)


class Network(nn.Module):
    """A convolutional network on the whole picture (T5), trimmed to the decision: shapes as Mosaic."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.network = NeuralRule(ImageNetwork(width=32, depth=4, upsample=FACTOR, seed=seed))

    def forward(self, x: Tensor) -> Tensor:
        """The decision for whole pictures."""
        edge = FACTOR * MARGIN
        return self.network(x)[:, edge:-edge, edge:-edge]


def interpolate(x: Tensor) -> Tensor:
    """Bicubic interpolation of x `(B, h, w)`, trimmed to the decision."""
    edge = FACTOR * MARGIN
    # `antialias` changes nothing when enlarging, except that torch then takes a = -1/2, which is more accurate
    large = nn.functional.interpolate(x[:, None], scale_factor=FACTOR, mode="bicubic", antialias=True)
    return large[:, 0, edge:-edge, edge:-edge]


def patches(x: Tensor, size: int, stride: int) -> Tensor:
    """Overlapping patches of pictures x `(B, h, w)`: `(B, number of patches, size * size)`."""
    return nn.functional.unfold(x[:, None], size, stride=stride).mT


def model(blur: float) -> tuple[np.ndarray, np.ndarray]:
    """H Psi `(PATCH^2, SIDE^2)` of Eq. 5, and the rows of Psi `((FACTOR PATCH)^2, SIDE^2)` beneath the context.

    Psi is the orthonormal two-dimensional DCT basis; coefficient 0 is the patch's mean.
    """
    basis = idct(np.eye(SIDE), axis=0, norm="ortho")
    seen = downsampling(PATCH, blur).numpy() @ basis
    seen[abs(seen) < 1e-12] = 0.0  # one frequency falls between the samples: zero, but for rounding
    beneath = basis[RIM:-RIM]
    return np.kron(seen, seen), np.kron(beneath, beneath)


def declare(blur: float, rho: float | np.ndarray, *, learned: bool = True) -> ConvexRule:
    """The rule of Examples 5 and 10 with r unknown and s = Psi r decided: minimize 1/2 |x - H Psi r|^2 + rho |r|_1.

    x: context `(PATCH^2,)`, intensities; r: coefficients `(SIDE^2,)`. The mean r_0 is not penalised.
    rho is a number, or a vector `(SIDE^2 - 1,)` with a weight for each coefficient.
    """
    H_Psi, Psi = model(blur)
    x, r = cp.Parameter(PATCH**2, name="x"), cp.Variable(SIDE**2, name="r")
    penalty = cp.Parameter(np.shape(rho), nonneg=True, name="rho", value=rho)
    sparsity = penalty * cp.norm1(r[1:]) if np.ndim(rho) == 0 else penalty @ cp.abs(r[1:])
    fit = 0.5 * cp.sum_squares(x - cp.Constant(H_Psi, name="HPsi") @ r)
    problem = cp.Problem(cp.Minimize(fit + sparsity))
    return ConvexRule(problem, context=[x], decision=Psi @ r, learn=[penalty] if learned else [])


def universal_rho(setting: Setting) -> float:
    """sigma sqrt(2 log n) max_j |a_j|, a_j the columns of H Psi: the usual choice by theory (Donoho 1994)."""
    H_Psi, _ = model(setting.blur)
    return setting.noise * math.sqrt(2 * math.log(H_Psi.shape[1])) * float(np.linalg.norm(H_Psi, axis=0).max())


def fit_affine(train: Any, stride: int) -> Callable[[Any, Budget], None]:
    """Least squares over all training patches, in closed form."""
    contexts = patches(train.x[:, MARGIN:-MARGIN, MARGIN:-MARGIN], PATCH, stride)
    truth = patches(train.s, FACTOR * PATCH, FACTOR * stride)

    def fit(rule: Any, budget: Budget) -> None:
        fitted = AffineRule.fit(contexts.flatten(0, 1), truth.flatten(0, 1))
        rule.rule.load_state_dict(fitted.state_dict())

    return fit


def untie(tied: Any, fit: Callable[[Any, Budget], History]) -> Callable[[nn.Module, Budget], History]:
    """`fit`, started at the value of `tied`, which an earlier contender has tuned, for every coefficient."""

    def untied(rule: Any, budget: Budget) -> History:
        inner = rule.rule
        inner.rho = tied.rule.rho.detach().expand_as(inner.rho)
        return fit(rule, budget)

    return untied


def draw(seed: int, setting: Setting) -> tuple[Pairs, Pairs, Pairs]:
    """Training, validation and test pictures, from different photographs."""
    camera = Camera(setting.blur, setting.noise, MARGIN)
    return (
        Pairs(*camera.random_crops(TRAIN, 1024, TRAINING_SIZE, make_generator(seed, "train"))),
        Pairs(*camera.random_crops(VALIDATION, 16, TRAINING_SIZE, make_generator(seed, "validation"))),
        Pairs(*camera.central_crops(TEST, setting.crop, make_generator(seed, "test"))),
    )


def build(seed: int, setting: Setting) -> Study:
    """Draw the pictures from `seed` and set up the rules at their start values."""
    train, valid, test = draw(seed, setting)
    start = universal_rho(setting)

    def sparse(rho: float | np.ndarray, learned: bool = True) -> Mosaic:
        return Mosaic(declare(setting.blur, rho, learned=learned), setting.stride)

    def inner(rule: Any) -> Any:
        return rule.rule

    mse = mean_squared_error
    size = (FACTOR * PATCH) ** 2
    affine = AffineRule(torch.zeros(size, PATCH**2), torch.zeros(size))
    tuned = sparse(start)
    contenders = {
        "bicubic": Contender(Bicubic()),
        "hand-set rho": Contender(sparse(start, learned=False)),
        "tuned rho": Contender(tuned, gradient(train, mse, steps=60, learning_rate=0.1, batch_size=8)),
        "oracle rho": Contender(sparse(start), grid(test, mse, inner, "rho", RHO_GRID)),
        "tuned weights": Contender(
            sparse(np.full(SIDE**2 - 1, start)),
            untie(tuned, gradient(train, mse, steps=60, learning_rate=0.05, batch_size=8)),
        ),
        "affine": Contender(Mosaic(affine, setting.stride), fit_affine(train, setting.stride)),
        "network": Contender(
            Network(seed),
            gradient(train, mse, steps=600, learning_rate=2e-3, batch_size=32, validation=valid),
        ),
    }
    if not setting.weights:
        del contenders["tuned weights"]
    problem = contenders["tuned rho"].rule.rule.problem()
    return Study(problem, contenders, test, {"mse": mse, "psnr": psnr(1.0)})


def misses(result: Result) -> list[str]:
    """What tuning should reach and did not: see ENTRY.reference."""
    tuned, oracle, bicubic = (result.record(n).measure("mse") for n in ("tuned rho", "oracle rho", "bicubic"))
    missed = []
    if tuned.mean > oracle.mean + oracle.standard_error:
        missed.append(f"tuned rho has mse {tuned.text()}, over one standard error above the oracle's {oracle.text()}")
    if tuned.mean >= bicubic.mean:
        missed.append(f"tuned rho has mse {tuned.text()}, no better than bicubic's {bicubic.text()}")
    return missed


ENTRY = ProblemEntry(
    name="super-resolution",
    summary="photographs from blurred, decimated, noisy ones: sparse coding of patches against its rivals",
    source="Examples 1, 3, 5, 10, 11; Eqs. 3 and 5 with the 1-norm",
    shapes=f"""\
x: context, a low-resolution picture (B, h, w), or {PATCH}x{PATCH} of its pixels for one patch; intensities in [0, 1]
s: decision, the picture at twice the resolution (B, 2(h-{2 * MARGIN}), 2(w-{2 * MARGIN})); intensities in [0, 1]
r: DCT coefficients ({SIDE**2},) of the {SIDE}x{SIDE} pixels that a patch sees; intensities
rho: weight () of the 1-norm, or one for each coefficient ({SIDE**2 - 1},); intensities
mse: mean squared error over the pixels of a picture, intensities squared; psnr: dB
a decision is one {Setting().crop}x{Setting().crop} picture; its patches overlap and are averaged""",
    reference=Reference(
        "tuned rho lies within one standard error of the best of a 20-point grid searched on the test "
        "pictures themselves, and beats bicubic interpolation",
        misses,
    ),
    setting=Setting(),
    build=build,
    figures=drawing.figures,
)
