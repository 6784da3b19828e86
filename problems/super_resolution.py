"""Super-resolution of photographs: sparse coding of patches, tuned and unfolded, and its rivals (Fig. 4)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from scipy.fft import idct
from torch import Tensor, nn

from convexlearn.errors import OptionError
from convexlearn.iterations.base import Iteration
from convexlearn.iterations.proximal_gradient import FISTA, ISTA
from convexlearn.networks import ImageNetwork
from convexlearn.objectives import mean_squared_error, psnr
from convexlearn.problems import super_resolution_figures as drawing
from convexlearn.problems.catalogue import Budget, Contender, ProblemEntry, Reference, Result, Study
from convexlearn.problems.fitting import gradient, grid
from convexlearn.problems.images import FACTOR, RIM, TEST, TRAIN, VALIDATION, Camera, downsampling
from convexlearn.problems.sample_efficiency import Samples
from convexlearn.randomness import make_generator
from convexlearn.rules.affine import AffineRule
from convexlearn.rules.convex import ConvexRule
from convexlearn.rules.iterative import Converged, Unfolded
from convexlearn.rules.neural import NeuralRule
from convexlearn.simulate.pairs import Pairs
from convexlearn.splitting import split
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
    step between neighbouring patches (low-resolution pixels); weights: also tune one rho per coefficient;
    layers: K of the unfolded networks; mismatch: factor on the true blur for the measure `mismatched`; curves: also
    fit on fewer training pictures.
    """

    blur: float = 1.4
    noise: float = 0.02
    crop: int = 96
    stride: int = 4
    weights: bool = True
    layers: int = 10
    mismatch: float = 1.3
    curves: bool = False

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
    `(N, PATCH^2)` to decisions `(N, (FACTOR PATCH)^2)`, in its own `precision` where one is given.
    """

    def __init__(self, rule: nn.Module, stride: int, precision: torch.dtype | None = None) -> None:
        super().__init__()
        self.rule, self.stride, self.precision = rule, stride, precision

    def forward(self, x: Tensor) -> Tensor:
        """The decision for whole pictures."""
        return self.assemble(self.rule(self.contexts(x)), x)

    def iterates(self, x: Tensor) -> Tensor:
        """Decisions after each layer of an unfolded rule, `(K + 1, B, ...)`."""
        return torch.stack([self.assemble(part, x) for part in self.rule.iterates(self.contexts(x))])  # pyright: ignore

    def contexts(self, x: Tensor) -> Tensor:
        """The patches of all pictures, in the rule's precision."""
        return patches(x, PATCH, self.stride).flatten(0, 1).to(self.precision or x.dtype)

    def assemble(self, decisions: Tensor, x: Tensor) -> Tensor:
        """Pictures of the decisions for their patches."""
        columns = decisions.to(x.dtype).reshape(len(x), -1, (FACTOR * PATCH) ** 2).mT
        size, step = FACTOR * PATCH, FACTOR * self.stride
        shape = (FACTOR * x.shape[1], FACTOR * x.shape[2])
        total = nn.functional.fold(columns, shape, size, stride=step)
        count = nn.functional.fold(torch.ones_like(columns[:1]), shape, size, stride=step)
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


@dataclass(frozen=True)
class Fits:
    """How each kind of rule is fitted to pictures."""

    samples: Samples
    stride: int

    def tuned(self, learning_rate: float) -> Callable[[Any, Budget], Any]:
        """A learned optimizer: few numbers, few steps."""
        return self.samples.fit(
            lambda train, _: gradient(train, mean_squared_error, steps=60, learning_rate=learning_rate, batch_size=8)
        )

    def unfolded(self, steps: int, learning_rate: float | dict[str, float]) -> Callable[[Any, Budget], Any]:
        """A network of K layers."""
        return self.samples.fit(
            lambda train, valid: gradient(
                train, mean_squared_error, steps=steps, learning_rate=learning_rate, batch_size=16, validation=valid
            )
        )

    def affine(self) -> Callable[[Any, Budget], Any]:
        """Least squares."""
        return self.samples.fit(lambda train, _: fit_affine(train, self.stride))

    def network(self) -> Callable[[Any, Budget], Any]:
        """A network without model."""
        return self.samples.fit(
            lambda train, valid: gradient(
                train, mean_squared_error, steps=600, learning_rate=2e-3, batch_size=32, validation=valid
            )
        )


def build(seed: int, setting: Setting) -> Study:
    """Draw the pictures from `seed` and set up the rules at their start values."""
    train, valid, test = draw(seed, setting)
    start, K = universal_rho(setting), setting.layers
    counts = (8, 64, 256) if setting.curves else ()
    fits = Fits(Samples(train, valid, test, mean_squared_error, counts), setting.stride)

    def sparse(rho: float | np.ndarray, learned: bool = True) -> Mosaic:
        return Mosaic(declare(setting.blur, rho, learned=learned), setting.stride)

    def inner(rule: Any) -> Any:
        return rule.rule

    parts = split(declare(setting.blur, start))
    ista, rates = ISTA(parts), {"rule.threshold": 0.05, "rule.W1": 1e-3, "rule.W2": 1e-3}

    def unfolded(iteration: Iteration, *untie: str) -> Mosaic:
        return Mosaic(Unfolded(iteration, K, untie=untie).float(), setting.stride)

    size = (FACTOR * PATCH) ** 2
    affine = AffineRule(torch.zeros(size, PATCH**2), torch.zeros(size))
    tuned = sparse(start)
    learned = Converged(FISTA(parts), tol=1e-5, learn=["rho"])
    contenders = {
        "bicubic": Contender(Bicubic()),
        "hand-set rho": Contender(sparse(start, learned=False)),
        "tuned rho": Contender(tuned, fits.tuned(0.1)),
        "oracle rho": Contender(sparse(start), grid(test, mean_squared_error, inner, "rho", RHO_GRID)),
        "tuned weights": Contender(
            sparse(np.full(SIDE**2 - 1, start)),
            untie(tuned, gradient(train, mean_squared_error, steps=60, learning_rate=0.05, batch_size=8)),
        ),
        "FISTA, tuned rho": Contender(Mosaic(learned, setting.stride, torch.float64), fits.tuned(0.1)),
        f"{K} iterations": Contender(unfolded(ista)),
        "steps, thresholds": Contender(unfolded(ista, "step", "threshold"), fits.unfolded(200, 0.1)),
        "LISTA": Contender(unfolded(ista.free("W1", "W2"), "threshold", "W1", "W2"), fits.unfolded(800, rates)),
        "affine": Contender(Mosaic(affine, setting.stride), fits.affine()),
        "network": Contender(Network(seed), fits.network()),
    }
    if not setting.weights:
        del contenders["tuned weights"]
    problem = tuned.rule.problem()  # pyright: ignore[reportCallIssue]
    measures = {"mse": mean_squared_error, "psnr": psnr(1.0), "mismatched": mean_squared_error}
    return Study(problem, contenders, test, measures, simulators={"mismatched": mismatched(seed, setting)})


def mismatched(seed: int, setting: Setting) -> Pairs:
    """The test pictures from a camera with another blur."""
    camera = Camera(setting.mismatch * setting.blur, setting.noise, MARGIN)
    return Pairs(*camera.central_crops(TEST, setting.crop, make_generator(seed, "test")))


def misses(result: Result) -> list[str]:
    """What tuning should reach and did not: see ENTRY.reference."""
    tuned, oracle, bicubic = (result.record(n).measure("mse") for n in ("tuned rho", "oracle rho", "bicubic"))
    missed = []
    if tuned.mean > oracle.mean + oracle.standard_error:
        missed.append(f"tuned rho has mse {tuned.text()}, over one standard error above the oracle's {oracle.text()}")
    if tuned.mean >= bicubic.mean:
        missed.append(f"tuned rho has mse {tuned.text()}, no better than bicubic's {bicubic.text()}")
    iterative = result.record("FISTA, tuned rho").measure("mse")
    if abs(iterative.mean - tuned.mean) > 0.01 * tuned.mean:
        missed.append(f"FISTA at its tuned rho has mse {iterative.text()}, the convex layer at its own {tuned.text()}")
    names = [f"{result.study.contenders['LISTA'].rule.rule.layers} iterations", "steps, thresholds", "LISTA"]  # pyright: ignore
    for before, after in pairwise(names):
        a, b = (result.record(name).measure("mse") for name in (before, after))
        if b.mean >= a.mean:
            missed.append(f"{after} has mse {b.text()}, no better than {before} with {a.text()}")
    return missed


ENTRY = ProblemEntry(
    name="super-resolution",
    summary="photographs from blurred, decimated, noisy ones: sparse coding of patches against its rivals",
    source="Examples 1, 3, 5, 10, 11, 17; Eqs. 3, 5 with the 1-norm, 15 and 22; Fig. 4",
    shapes=f"""\
x: context, a low-resolution picture (B, h, w), or {PATCH}x{PATCH} of its pixels for one patch; intensities in [0, 1]
s: decision, the picture at twice the resolution (B, 2(h-{2 * MARGIN}), 2(w-{2 * MARGIN})); intensities in [0, 1]
r: DCT coefficients ({SIDE**2},) of the {SIDE}x{SIDE} pixels that a patch sees; intensities
rho: weight () of the 1-norm, or one for each coefficient ({SIDE**2 - 1},); intensities
mse: mean squared error over the pixels of a picture, intensities squared; psnr: dB; mismatched: mse where the true
  blur is 1.3 times that of the rules
a decision is one {Setting().crop}x{Setting().crop} picture; its patches overlap and are averaged""",
    reference=Reference(
        "tuned rho lies within one standard error of the best of a 20-point grid searched on the test "
        "pictures themselves, and beats bicubic interpolation; FISTA, tuned through its fixed point, ends within 1 % "
        "of it; at K layers learned steps and thresholds improve on ISTA, and learned matrices on those",
        misses,
    ),
    setting=Setting(),
    build=build,
    figures=drawing.figures,
    tables=drawing.tables,
)
