"""Deblurring of photographs: total variation, plug-and-play with a small DnCNN, and both unfolded (Example 20)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import cvxpy as cp
import numpy as np
from torch import nn

from convexlearn.denoisers import DnCNN
from convexlearn.errors import OptionError
from convexlearn.evaluate import evaluate
from convexlearn.iterations.admm import ADMM
from convexlearn.iterations.proximal_gradient import ISTA
from convexlearn.networks import ImageNetwork
from convexlearn.objectives import mean_squared_error, psnr
from convexlearn.problems import deblurring
from convexlearn.problems import plug_and_play_figures as drawing
from convexlearn.problems.catalogue import Budget, Contender, ProblemEntry, Reference, Result, Study
from convexlearn.problems.deblurring import Camera, NoisyPatches, circulant, relative_error
from convexlearn.problems.fitting import gradient
from convexlearn.problems.images import TEST, VALIDATION
from convexlearn.randomness import make_generator
from convexlearn.rules.iterative import Converged, Unfolded
from convexlearn.rules.neural import NeuralRule
from convexlearn.simulate.pairs import Pairs
from convexlearn.splitting import Split, split

WIDTH, DEPTH = 24, 5
"""Channels and layers of the DnCNN, and of the network without model."""

EDGE = 0.08
"""Size of an edge, the difference of neighbouring pixels, from which ADMM for total variation takes its penalty."""

RHO_GRID = np.geomspace(2e-4, 6.4e-3, 6)
"""Weights of the total variation that are tried."""

SIGMA_GRID = np.array([5.0, 10.0, 20.0, 40.0]) / 255
"""Noise levels of the denoiser that are tried; intensities."""

STEPS = 500
"""Gradient steps of the unfolded networks; the network without model gets one for each of their layers."""

PENALTY_GRID = np.array([0.003, 0.01, 0.03, 0.1])
"""Penalties of ADMM that are tried."""


@dataclass(frozen=True)
class Setting:
    """Options. deviation: of the Gaussian kernel (pixels); noise: standard deviation (intensities); side: of a picture
    (pixels); layers: K of the unfolded networks; iterations: of plug-and-play ADMM; gradient_steps: of plug-and-play
    proximal gradient.

    Kernel and noise are those of Zhang et al. 2017, "Learning deep CNN denoiser prior for image restoration".
    """

    deviation: float = 1.6
    noise: float = 2 / 255
    side: int = 64
    layers: int = 8
    iterations: int = 12
    gradient_steps: int = 16

    def __post_init__(self) -> None:
        if not 2 * deblurring.TAPS <= self.side <= 150:
            raise OptionError(f"side must lie between {2 * deblurring.TAPS} and 150 pixels, got {self.side}")


@cache
def declare(side: int, deviation: float, isotropic: bool = True) -> tuple[cp.Problem, Split]:
    """minimize 1/2 |x - C s C'|^2 + rho TV(s), x: context, s: decision, both `(side, side)`, C the blur along one axis.

    TV sums 2-norms (isotropic, as cp.tv) or 1-norms of the differences to the pixels below and to the right, without
    the last row and column. These differences are written round the circle, with weight zero for the last ones, so that
    ADMM solves its linear system by Fourier transforms.
    """
    C, D = deblurring.blurring(side, deviation), circulant(side, {0: -1.0, 1: 1.0})
    s, x = cp.Variable((side, side), name="s"), cp.Parameter((side, side), name="x")
    rho = cp.Parameter(nonneg=True, name="rho", value=1e-4)
    inside = np.ones((side, side))
    inside[-1], inside[:, -1] = 0, 0
    down, right = D @ s, s @ D.T
    if isotropic:
        both = cp.vstack([cp.vec(down, order="C"), cp.vec(right, order="C")])
        variation = cp.sum(cp.multiply(inside.ravel(), cp.norm(both, 2, axis=0)))
    else:
        variation = cp.sum(cp.multiply(inside, cp.abs(down))) + cp.sum(cp.multiply(inside, cp.abs(right)))
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - C @ s @ C.T) + rho * variation))
    return problem, split(problem, context=[x], decision=s)


@cache
def fidelity(side: int, deviation: float) -> Split:
    """minimize 1/2 |x - C s C'|^2, whose prior is plugged in."""
    C = deblurring.blurring(side, deviation)
    s, x = cp.Variable((side, side), name="s"), cp.Parameter((side, side), name="x")
    return split(cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - C @ s @ C.T))), context=[x], decision=s)


@dataclass(frozen=True, eq=False)
class Search:
    """Trace of a fit over combinations: mean PSNR on the training pictures by the values of `names`, in dB."""

    names: tuple[str, ...]
    means: dict[tuple[float, ...], float]

    @property
    def best(self) -> tuple[float, ...]:
        """The combination with the largest mean."""
        return max(self.means, key=lambda key: self.means[key])


@dataclass(frozen=True, eq=False)
class Data:
    """watched: pictures of the training photographs for few parameters; train: random ones; clean: for denoisers."""

    train: Pairs
    watched: Pairs
    valid: Pairs
    test: Pairs
    clean: NoisyPatches
    clean_valid: NoisyPatches


def draw(seed: int, setting: Setting) -> Data:
    """Training, validation and test pictures, from different photographs."""
    camera, names = Camera(setting.deviation, setting.noise, setting.side), deblurring.TRAIN
    patches = [
        NoisyPatches(deblurring.random_windows(group, count, 32, make_generator(seed, text)))
        for group, count, text in ((names, 2048, "clean"), (VALIDATION, 64, "clean validation"))
    ]
    return Data(
        camera.random_crops(names, 1024, make_generator(seed, "train")),
        camera.random_crops(names, len(names), make_generator(seed, "watched")),
        camera.random_crops(VALIDATION, 16, make_generator(seed, "validation")),
        camera.central_crops(TEST, make_generator(seed, "test")),
        *patches,
    )


def search(data: Data, **values: Sequence[float]) -> Callable[[Any, Budget], Search]:
    """Fit declared parameters of a rule by trying all combinations on the watched pictures."""
    return among(data, tuple(values), list(product(*values.values())))


def among(data: Data, names: tuple[str, ...], combinations: list[tuple[float, ...]]) -> Callable[[Any, Budget], Search]:
    """Fit declared parameters of a rule by trying these combinations on the watched pictures."""

    def put(rule: Any, combination: tuple[float, ...]) -> None:
        for name, value in zip(names, combination):
            rule.assign(name, value)

    def fit(rule: Any, budget: Budget) -> Search:
        means = {}
        for combination in combinations[-budget.limit(len(combinations)) :]:
            put(rule, combination)
            means[combination] = evaluate(rule, data.watched, psnr(1.0)).mean
        found = Search(names, means)
        put(rule, found.best)
        return found

    return fit


def denoise(data: Data, fit: Callable[[Any, Budget], Search]) -> Callable[[Any, Budget], Search]:
    """Train the rule's denoiser on clean photographs alone, freeze it, then `fit`."""

    def fitted(rule: Any, budget: Budget) -> Search:
        rule.learn("prox")
        given = {"steps": 1000, "learning_rate": 2e-3, "batch_size": 10}
        gradient(data.clean, relative_error, **given)(rule.prox, budget)
        rule.freeze("prox")
        return fit(rule, budget)

    return fitted


def plugged(source: Any, fit: Callable[[Any, Budget], Any], *also: str) -> Callable[[Any, Budget], Any]:
    """`fit`, started at the denoiser of `source`, which an earlier contender trains, and at its values of `also`."""

    def fitted(rule: Any, budget: Budget) -> Any:
        rule.prox.load_state_dict(source.prox.state_dict())
        for name in also:
            rule.assign(name, source.value(name).detach().expand_as(rule.value(name)))
        return fit(rule, budget)

    return fitted


def build(seed: int, setting: Setting) -> Study:
    """Draw the pictures from `seed` and set up the rules at their start values."""
    data, K, where = draw(seed, setting), setting.layers, (setting.side, setting.deviation)

    def variation(isotropic: bool) -> Contender:
        # the penalty moves no solution, but at rho/(2 penalty) near the size of an edge ADMM is fast
        rule = Converged(
            ADMM(declare(*where, isotropic)[1]),
            tol=3e-4,
            max_iterations=2000,
            gradient="unroll",
            learn=["rho", "penalty"],
        )
        return Contender(rule, among(data, ("rho", "penalty"), [(rho, rho / (2 * EDGE)) for rho in RHO_GRID.tolist()]))

    def unfolded(iteration: Any, layers: int, **options: Any) -> Any:
        own = DnCNN(width=WIDTH, depth=DEPTH, seed=seed)
        return Unfolded(iteration.replace(prox=own, sigma=8 / 255), layers, **options)

    def descent(steps: int, rates: Any) -> Callable[[Any, Budget], Any]:
        return gradient(data.train, psnr(1.0), steps=steps, learning_rate=rates, batch_size=2)

    smooth = fidelity(*where)
    admm, ista = ADMM(smooth, penalty=0.01), ISTA(smooth, step=1.5)
    plug = unfolded(admm, setting.iterations, learn=["penalty", "sigma"]).freeze("prox")
    proximal = unfolded(ista, setting.gradient_steps, learn=["sigma"]).freeze("prox")
    further, learned = unfolded(admm, K, untie=["penalty", "sigma"]), unfolded(ista, K, learn=["step", "sigma"])
    rates = {"penalty": 0.1, "sigma": 0.05, "step": 0.02, "prox": 1e-3}
    of = lambda *names: {name: rates[name] for name in names}  # noqa: E731
    contenders = {
        "blurred": Contender(nn.Identity()),
        "isotropic TV": variation(True),
        "anisotropic TV": variation(False),
        "PnP-ADMM": Contender(
            plug, denoise(data, search(data, sigma=SIGMA_GRID.tolist(), penalty=PENALTY_GRID.tolist()))
        ),
        "PnP gradient": Contender(proximal, plugged(plug, search(data, sigma=(SIGMA_GRID / 4).tolist()))),
        f"PnP-ADMM, {K} trained": Contender(
            further, plugged(plug, descent(STEPS, of("penalty", "sigma", "prox")), "penalty", "sigma")
        ),
        f"learned prox, {K}": Contender(learned, plugged(plug, descent(STEPS, of("step", "sigma", "prox")))),
        "network": Contender(NeuralRule(ImageNetwork(width=WIDTH, depth=DEPTH, seed=seed)), descent(STEPS * K, 1e-3)),
    }
    return Study(declare(*where)[0], contenders, data.test, {"psnr": psnr(1.0), "mse": mean_squared_error})


def misses(result: Result) -> list[str]:
    """What should hold and does not: see ENTRY.reference."""
    layers, found = drawing.trained(result), drawing.psnrs(result)
    missed = []
    for better, worse in (
        *(("PnP-ADMM", name) for name in ("blurred", "isotropic TV", "anisotropic TV")),
        (layers, "PnP-ADMM"),
        (layers, "network"),
    ):
        gain = drawing.gain(found[better], found[worse])
        if gain.mean <= 2 * gain.standard_error:
            missed.append(f"{better} gains {gain.text()} dB on {worse}, not two standard errors")
    return missed


ENTRY = ProblemEntry(
    name="plug-and-play-deblurring",
    summary="photographs from blurred, noisy ones: total variation, a plugged-in denoiser, and both trained further",
    source="Examples 1, 16 and 20; Eqs. 3, 4 and 26; Fig. 5; references 33-35",
    shapes="""\
x: context, a blurred, noisy picture (B, side, side); intensities in [0, 1]
s: decision, the sharp picture (B, side, side); intensities in [0, 1]
rho: weight () of the total variation; intensities
sigma: noise level () that the denoiser is told, or one for each layer (K,); intensities
penalty: of ADMM, () or (K,), and step: of proximal gradient; without unit
psnr: dB; mse: mean squared error over the pixels of a picture, intensities squared""",
    reference=Reference(
        "on the centres of 8 photographs that no rule has seen, ADMM with the small DnCNN in its prox slot has "
        "a higher PSNR than the better tuned total variation, trained further in 8 layers a higher one again, also "
        "than a network of the same size; each by over two standard errors of the difference over the pictures",
        misses,
    ),
    setting=Setting(),
    build=build,
    figures=drawing.figures,
    tables=drawing.tables,
)
