"""ADMM for sparse recovery, from the plain solver to an abstract network (Examples 9, 14, 15, 16; Fig. 5)."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import cvxpy as cp
import torch
from torch import Tensor

from convexlearn.errors import OptionError
from convexlearn.iterations.admm import ADMM
from convexlearn.objectives import squared_error
from convexlearn.problems.catalogue import Contender, ProblemEntry, Reference, Result, Study
from convexlearn.problems.fitting import gradient
from convexlearn.randomness import make_generator
from convexlearn.report import new_axes, plot_history, plot_records
from convexlearn.rules.iterative import Converged, Unfolded
from convexlearn.simulate.pairs import Pairs
from convexlearn.splitting import Split, split

COUNTS = {"train": 4096, "validation": 512, "test": 1024}


@dataclass(frozen=True)
class Setting:
    """Options. measurements, unknowns: lengths of x and s; nonzeros: of s; noise: deviation; layers: K."""

    measurements: int = 24
    unknowns: int = 48
    nonzeros: int = 4
    noise: float = 0.05
    layers: int = 6

    def __post_init__(self) -> None:
        if not 0 < self.nonzeros <= self.measurements <= self.unknowns or self.layers < 1:
            raise OptionError(
                "need 0 < nonzeros <= measurements <= unknowns and layers >= 1, got "
                f"{self.nonzeros}, {self.measurements}, {self.unknowns}, {self.layers}"
            )


def draw(seed: int, setting: Setting) -> tuple[Tensor, dict[str, Pairs]]:
    """H with columns of norm one, and pairs x = H s + w with standard normal nonzeros at random places (Eq. 3)."""
    H = torch.randn(setting.measurements, setting.unknowns, generator=make_generator(seed, "H"), dtype=torch.float64)
    H = H / H.norm(dim=0)
    return H, {part: _pairs(H, count, setting, make_generator(seed, part)) for part, count in COUNTS.items()}


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

    def fit(steps: int, learning_rate: float) -> Any:
        return gradient(
            data["train"], squared_error, steps=steps, learning_rate=learning_rate, batch_size=128,
            validation=data["validation"],
        )  # fmt: skip

    contenders = {
        "converged": Contender(Converged(admm, learn=[])),
        "converged, rho tuned": Contender(Converged(admm, learn=["rho"], tol=1e-6), fit(40, 0.1)),
        f"{K} iterations": Contender(Unfolded(admm, K)),
        "lambda, mu tuned": Contender(Unfolded(admm, K, learn=["penalty", "step"]), fit(300, 0.05)),
        "lambda_k, mu_k tuned": Contender(Unfolded(admm, K, untie=["penalty", "step"]), fit(600, 0.05)),
        "W_k, lambda_k, mu_k tuned": Contender(
            Unfolded(admm.free("W1", "W2"), K, untie=["W1", "W2", "penalty", "step"]), fit(1500, 5e-3)
        ),
    }
    return Study(problem, contenders, data["test"], {"squared_error": squared_error})


def misses(result: Result) -> list[str]:
    """What training should reach and did not: see ENTRY.reference."""
    names = [n for n in result.rules if not n.startswith("converged")]
    errors = [result.record(n).measure("squared_error") for n in names]
    return [
        f"{names[k + 1]} has {b.text()}, no better than {names[k]} with {a.text()}"
        for k, (a, b) in enumerate(pairwise(errors))
        if b.mean >= a.mean
    ]


def figures(result: Result) -> dict[str, Any]:
    """Errors of the rules, and error after each layer."""
    axes, test = {"errors": plot_records(result.records, "squared_error"), "layers": new_axes()}, result.study.test
    for name, rule in result.rules.items():
        if isinstance(rule, Unfolded):
            with torch.no_grad():
                errors = (rule.iterates(test.x) - test.s).square().sum(-1).mean(1)
            axes["layers"].plot(errors.numpy(), marker=".", label=name)
    axes["layers"].set(yscale="log", xlabel="layer or iteration", ylabel="squared error")
    axes["layers"].legend(fontsize=8)
    history = result.traces.get("lambda_k, mu_k tuned")
    if history is not None:
        axes["history"] = plot_history(history, ["loss"])
    return axes


ENTRY = ProblemEntry(
    name="admm-recovery",
    summary="sparse recovery by ADMM: the solver, its hyperparameters learned, unfolded, and as a network",
    source="Examples 9, 14, 15, 16; Algorithm 1; Eqs. 4, 18 to 21; Fig. 5",
    shapes="""\
x: context, measurements (B, 24); no unit
s: decision, a vector (B, 48) with 4 nonzeros of variance one; no unit
H: measurement matrix (24, 48) with columns of norm one; no unit
rho: weight () of the 1-norm; penalty (lambda), step (mu): hyperparameters (), or (K,) one for each layer; no unit
W1, W2: matrices (K, 48, 24) and (K, 48, 48) of Eq. 20; no unit
squared_error: |s - s_true|^2""",
    reference=Reference(
        "at K iterations each strategy of Fig. 5 improves on the one before: tuned lambda and mu on hand-set ones, "
        "one pair for each layer on one pair, learned matrices on derived ones",
        misses,
    ),
    setting=Setting(),
    build=build,
    figures=figures,
)
