"""Sparse recovery from few noisy linear measurements, with a tuned 1-norm penalty (Examples 5 and 10)."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor, nn

from convexlearn.errors import OptionError
from convexlearn.objectives import squared_error
from convexlearn.problems.catalogue import Contender, ProblemEntry, Reference, Result, Study
from convexlearn.problems.fitting import Grid, gradient, grid
from convexlearn.randomness import make_generator
from convexlearn.report import new_axes, plot_history, plot_records
from convexlearn.rules.affine import AffineRule
from convexlearn.rules.convex import ConvexRule
from convexlearn.simulate.pairs import Pairs

RHO_GRID = np.geomspace(1e-3, 1, 20)
"""Values that the oracle tries on the test data."""


@dataclass(frozen=True)
class Setting:
    """Options. measurements, unknowns: lengths of x and s; nonzeros: of s; noise: standard deviation."""

    measurements: int = 16
    unknowns: int = 64
    nonzeros: int = 2
    noise: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.nonzeros <= self.measurements <= self.unknowns:
            raise OptionError(
                "need 0 < nonzeros <= measurements <= unknowns, got "
                f"{self.nonzeros}, {self.measurements}, {self.unknowns}"
            )


class Data(NamedTuple):
    """H `(m, n)` and pairs x `(N, m)`, s `(N, n)` with x = H s + w, for training, validation and test."""

    H: Tensor
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def draw(seed: int = 0, setting: Setting | None = None) -> Data:
    """Gaussian H with columns of norm one, s with standard normal nonzeros at random places, Eq. 3; float64."""
    setting = setting or Setting()
    generator = make_generator(seed, "H")
    H = torch.randn(setting.measurements, setting.unknowns, generator=generator, dtype=torch.float64)
    H = H / H.norm(dim=0)
    counts = {"train": 512, "validation": 128, "test": 256}
    return Data(H, *(_pairs(H, count, setting, make_generator(seed, part)) for part, count in counts.items()))


def _pairs(H: Tensor, count: int, setting: Setting, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    places = torch.rand(count, H.shape[1], generator=generator).argsort(1)[:, : setting.nonzeros]
    values = torch.randn(count, setting.nonzeros, generator=generator, dtype=H.dtype)
    s = torch.zeros(count, H.shape[1], dtype=H.dtype).scatter_(1, places, values)
    noise = setting.noise * torch.randn(count, H.shape[0], generator=generator, dtype=H.dtype)
    return s @ H.mT + noise, s


def declare(H: Tensor, rho: float, *, learned: bool = True) -> ConvexRule:
    """minimize 1/2 |x - H s|^2 + rho |s|_1 (Eq. 14): context x `(m,)`, decision s `(n,)`."""
    m, n = H.shape
    x, s = cp.Parameter(m, name="x"), cp.Variable(n, name="s")
    penalty = cp.Parameter(nonneg=True, name="rho", value=rho)
    fit = 0.5 * cp.sum_squares(x - cp.Constant(H.numpy(), name="H") @ s)
    problem = cp.Problem(cp.Minimize(fit + penalty * cp.norm1(s)))
    return ConvexRule(problem, context=[x], decision=s, learn=[penalty] if learned else [])


def known_support_error(H: Tensor, s: Tensor, noise: float) -> float:
    """Mean over s `(N, n)` of the error of least squares on the true support: noise^2 trace((H_S' H_S)^-1)."""
    traces = []
    for row in s:
        columns = H[:, row != 0]
        traces.append(torch.linalg.inv(columns.mT @ columns).trace())
    return noise**2 * torch.stack(traces).mean().item()


def build(seed: int, setting: Setting) -> Study:
    """Draw H and the data from `seed` and set up the rules at their start values."""
    data = draw(seed, setting)
    train, test = Pairs(*data.train), Pairs(*data.test)
    start = setting.noise * math.sqrt(2 * math.log(setting.unknowns))  # the universal choice, Donoho 1994
    tuned, oracle = declare(data.H, start), declare(data.H, start)
    zero = AffineRule(torch.zeros(data.H.mT.shape, dtype=data.H.dtype))
    contenders = {
        "least norm": Contender(AffineRule(torch.linalg.pinv(data.H)).freeze()),
        "affine": Contender(zero, lambda rule, budget: _fit_affine(rule, train)),
        "hand-set rho": Contender(declare(data.H, start, learned=False)),
        "tuned rho": Contender(tuned, gradient(train, squared_error, steps=60, learning_rate=0.1, batch_size=32)),
        "oracle rho": Contender(oracle, grid(test, squared_error, lambda rule: rule, "rho", RHO_GRID)),
    }
    bounds = {"squared_error": known_support_error(data.H, data.test[1], setting.noise)}
    return Study(tuned.problem(), contenders, test, {"squared_error": squared_error}, bounds)


def _fit_affine(rule: nn.Module, train: Any) -> None:
    rule.load_state_dict(AffineRule.fit(train.x, train.s, intercept=False).state_dict())


def misses(result: Result) -> list[str]:
    """What tuning should reach and did not: see ENTRY.reference."""
    tuned, oracle, least = (
        result.record(n).measure("squared_error") for n in ("tuned rho", "oracle rho", "least norm")
    )
    missed = []
    if tuned.mean > oracle.mean + oracle.standard_error:
        missed.append(f"tuned rho has {tuned.text()}, over one standard error above the oracle's {oracle.text()}")
    if tuned.mean >= least.mean:
        missed.append(f"tuned rho has {tuned.text()}, no better than the least-norm solution's {least.text()}")
    return missed


def figures(result: Result) -> dict[str, Any]:
    """Errors of the rules, the oracle's grid, the tuning history, and one recovered vector."""
    axes = {"errors": plot_records(result.records, "squared_error"), "recovery": _plot_recovery(result)}
    axes["errors"].axvline(result.study.bounds["squared_error"], color="0.5", linestyle="--")
    found, history = result.traces.get("oracle rho"), result.traces.get("tuned rho")
    if isinstance(found, Grid):
        axes["rho"] = ax = new_axes()
        ax.errorbar(found.values, found.means, found.standard_errors, capsize=2, label="grid on the test data")
        ax.axvline(result.rules["tuned rho"].rho.item(), color="C3", label="tuned rho")  # pyright: ignore
        ax.set(xscale="log", xlabel="rho", ylabel="squared error")
        ax.legend()
    if history is not None:
        axes["history"] = plot_history(history, ["loss"])
    return axes


def _plot_recovery(result: Result) -> Any:
    pairs = result.study.test.subset(torch.tensor([0]))
    ax = new_axes(size=(8.0, 3.0))
    ax.stem(pairs.s[0].numpy(), linefmt="0.7", markerfmt="ko", basefmt="0.8", label="truth")
    for name, marker in (("least norm", "C0+"), ("hand-set rho", "C1x"), ("tuned rho", "C3.")):
        with torch.no_grad():
            ax.plot(result.rules[name](pairs.x)[0].numpy(), marker, label=name)
    ax.set(xlabel="entry", ylabel="s")
    ax.legend(fontsize=8)
    return ax


ENTRY = ProblemEntry(
    name="sparse-recovery",
    summary="a sparse vector from few noisy linear measurements by the lasso",
    source="Examples 5 and 10; Eqs. 3 and 14",
    shapes="""\
x: context, measurements (B, 16); no unit
s: decision, a vector (B, 64) with 2 nonzeros of variance one; no unit
H: measurement matrix (16, 64) with columns of norm one; no unit
rho: weight () of the 1-norm; no unit
squared_error: |s - s_true|^2""",
    reference=Reference(
        "tuned rho lies within one standard error of the best of a 20-point grid searched on the test data; "
        "no rule beats least squares on the true support, noise^2 trace((H_S' H_S)^-1) on average",
        misses,
    ),
    setting=Setting(),
    build=build,
    figures=figures,
)
