"""ADMM for sparse recovery, from the plain solver to an abstract network (Examples 9, 14, 15, 16; Figs. 4, 5)."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import cvxpy as cp
import torch
from torch import Tensor

from convexlearn.errors import OptionError
from convexlearn.iterations.admm import ADMM
from convexlearn.networks import mlp
from convexlearn.objectives import squared_error
from convexlearn.problems import sample_efficiency, spectrum
from convexlearn.problems.catalogue import Budget, Contender, ProblemEntry, Reference, Result, Study
from convexlearn.problems.fitting import gradient
from convexlearn.problems.sample_efficiency import Samples
from convexlearn.randomness import make_generator
from convexlearn.report import new_axes, plot_history, plot_records
from convexlearn.rules.affine import AffineRule
from convexlearn.rules.iterative import Converged, Unfolded
from convexlearn.rules.neural import NeuralRule
from convexlearn.simulate.pairs import Pairs
from convexlearn.splitting import Split, split

COUNTS = {"train": 4096, "validation": 512, "test": 1024}


@dataclass(frozen=True)
class Setting:
    """Options. measurements, unknowns: lengths of x and s; nonzeros: of s; noise: deviation; layers: K; mismatch:
    relative change of the true H for the measure `mismatched`; curves: also fit on fewer training samples.
    """

    measurements: int = 24
    unknowns: int = 48
    nonzeros: int = 4
    noise: float = 0.05
    layers: int = 6
    mismatch: float = 0.1
    curves: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.nonzeros <= self.measurements <= self.unknowns or self.layers < 1:
            raise OptionError(
                "need 0 < nonzeros <= measurements <= unknowns and layers >= 1, got "
                f"{self.nonzeros}, {self.measurements}, {self.unknowns}, {self.layers}"
            )


def draw(seed: int, setting: Setting) -> tuple[Tensor, dict[str, Pairs]]:
    """H with columns of norm one, and pairs x = H s + w with standard normal nonzeros at random places (Eq. 3).

    The part "mismatched" has the vectors and the noise of the part "test", but another H.
    """
    generator, shape = make_generator(seed, "H"), (setting.measurements, setting.unknowns)
    H = torch.randn(shape, generator=generator, dtype=torch.float64)
    H = H / H.norm(dim=0)
    change = torch.randn(shape, generator=generator, dtype=torch.float64)
    other = H + setting.mismatch * H.norm() * change / change.norm()
    parts = {part: _pairs(H, count, setting, make_generator(seed, part)) for part, count in COUNTS.items()}
    return H, parts | {"mismatched": _pairs(other, COUNTS["test"], setting, make_generator(seed, "test"))}


def _pairs(H: Tensor, count: int, setting: Setting, generator: torch.Generator) -> Pairs:
    places = torch.rand(count, H.shape[1], generator=generator).argsort(1)[:, : setting.nonzeros]
    values = torch.randn(count, setting.nonzeros, generator=generator, dtype=H.dtype)
    s = torch.zeros(count, H.shape[1], dtype=H.dtype).scatter_(1, places, values)
    noise = setting.noise * torch.randn(count, H.shape[0], generator=generator, dtype=H.dtype)
    return Pairs(s @ H.mT + noise, s)


def declare(H: Tensor, rho: float) -> tuple[cp.Problem, Split]:
    """minimize 1/2 |x - H s|^2 + rho |s|_1: Eq. 4 with phi the 1-norm."""
    x, s = cp.Parameter(H.shape[0], name="x"), cp.Variable(H.shape[1], name="s")
    penalty = cp.Parameter(nonneg=True, name="rho", value=rho)
    fit = 0.5 * cp.sum_squares(x - cp.Constant(H.numpy(), name="H") @ s)
    problem = cp.Problem(cp.Minimize(fit + penalty * cp.norm1(s)))
    return problem, split(problem, context=[x], decision=s)


def build(seed: int, setting: Setting) -> Study:
    """Draw H and the data from `seed` and set up the rules at their start values."""
    H, data = draw(seed, setting)
    rho = setting.noise * math.sqrt(2 * math.log(setting.unknowns))  # the universal choice, Donoho 1994
    problem, parts = declare(H, rho)
    admm, K = ADMM(parts), setting.layers
    counts = (16, 256) if setting.curves else ()
    samples = Samples(data["train"], data["validation"], data["test"], squared_error, counts)

    def fit(steps: int, learning_rate: float) -> Any:
        return samples.fit(
            lambda train, valid: gradient(
                train, squared_error, steps=steps, learning_rate=learning_rate, batch_size=128, validation=valid
            )
        )

    affine = AffineRule(torch.zeros_like(H.mT), torch.zeros_like(H[0]))
    network = NeuralRule(mlp(*H.shape, hidden=(256, 256), seed=seed).double())
    contenders = {
        "converged": Contender(Converged(admm, learn=[])),
        "converged, rho tuned": Contender(Converged(admm, learn=["rho"], tol=1e-6), fit(40, 0.1)),
        f"{K} iterations": Contender(Unfolded(admm, K)),
        "lambda, mu tuned": Contender(Unfolded(admm, K, learn=["penalty", "step"]), fit(300, 0.05)),
        "lambda_k, mu_k tuned": Contender(Unfolded(admm, K, untie=["penalty", "step"]), fit(600, 0.05)),
        "W_k, lambda_k, mu_k tuned": Contender(
            Unfolded(admm.free("W1", "W2"), K, untie=["W1", "W2", "penalty", "step"]), fit(1500, 5e-3)
        ),
        "affine": Contender(affine, samples.fit(lambda train, _: least_squares(train))),
        "network": Contender(network, fit(3000, 2e-3)),
    }
    shifted = {"mismatched": data["mismatched"]}
    measures = {"squared_error": squared_error, "mismatched": squared_error}
    return Study(problem, contenders, data["test"], measures, simulators=shifted)


def least_squares(train: Pairs) -> Any:
    """Fit an affine rule in closed form."""

    def fit(rule: Any, budget: Budget) -> None:
        rule.load_state_dict(AffineRule.fit(train.x, train.s).state_dict())  # pyright: ignore[reportArgumentType]

    return fit


def misses(result: Result) -> list[str]:
    """What training should reach and did not: see ENTRY.reference."""
    names = [n for n in result.rules if not n.startswith(("converged", "affine", "network"))]
    errors = [result.record(n).measure("squared_error") for n in names]
    return [
        f"{names[k + 1]} has {b.text()}, no better than {names[k]} with {a.text()}"
        for k, (a, b) in enumerate(pairwise(errors))
        if b.mean >= a.mean
    ]


def figures(result: Result) -> dict[str, Any]:
    """Errors of the rules, also against parameters and training samples, and error after each layer (as Fig. 6d)."""
    axes = new_axes()
    for measure in result.study.measures:
        plot_records(result.records, measure, ax=axes)
    axes.legend(list(result.study.measures), fontsize=8)
    axes.set_xlabel("squared error")
    drawn = {"errors": axes, "parameters": spectrum.plot_parameters(result, "squared_error")}
    drawn["layers"] = plot_layers(result)
    if sample_efficiency.curves(result):
        drawn["efficiency"] = sample_efficiency.plot_efficiency(result, "squared_error", ["converged"])
    history = sample_efficiency.traces(result).get("lambda_k, mu_k tuned")
    if history:
        drawn["history"] = plot_history(history, ["loss"])
    return drawn


def plot_layers(result: Result) -> Any:
    """Error after each layer; ADMM runs on for four times as many iterations."""
    ax, test = new_axes(), result.study.test
    for name, rule in result.rules.items():
        if not isinstance(rule, Unfolded):
            continue
        trained = name in result.traces
        shown = rule if trained else Unfolded(rule.iteration, 4 * rule.layers)
        with torch.no_grad():
            errors = (shown.iterates(test.x) - test.s).square().sum(-1).mean(1)
        ax.plot(errors.numpy(), marker=".", label=name if trained else "ADMM, nothing tuned")
    for name, style in (("converged", "--"), ("converged, rho tuned", ":")):
        ax.axhline(result.record(name).measure("squared_error").mean, color="0.5", linestyle=style, label=name)
    ax.set(yscale="log", xlabel="layer or iteration", ylabel="squared error")
    ax.legend(fontsize=8)
    return ax


def tables(result: Result) -> dict[str, str]:
    """Time of a decision that is alone in its batch, and error by number of training samples."""
    shown = {"one decision at a time": spectrum.alone(result, "squared_error")}
    if sample_efficiency.curves(result):
        shown["squared error on the test data after training on so many samples"] = sample_efficiency.efficiency(result)
    return shown


ENTRY = ProblemEntry(
    name="admm-recovery",
    summary="sparse recovery by ADMM: the solver, its hyperparameters learned, unfolded, and as a network",
    source="Examples 9, 14, 15, 16; Algorithm 1; Eqs. 4, 18 to 21; Figs. 4 and 5",
    shapes="""\
x: context, measurements (B, 24); no unit
s: decision, a vector (B, 48) with 4 nonzeros of variance one; no unit
H: measurement matrix (24, 48) with columns of norm one; no unit
rho: weight () of the 1-norm; penalty (lambda), step (mu): hyperparameters (), or (K,) one for each layer; no unit
W1, W2: matrices (K, 48, 24) and (K, 48, 48) of Eq. 20; no unit
squared_error: |s - s_true|^2; mismatched: the same where the true H differs by 10 % from that of the rules""",
    reference=Reference(
        "at K iterations each strategy of Fig. 5 improves on the one before: tuned lambda and mu on hand-set ones, "
        "one pair for each layer on one pair, learned matrices on derived ones",
        misses,
    ),
    setting=Setting(),
    build=build,
    figures=figures,
    tables=tables,
)
