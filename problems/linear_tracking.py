"""Tracking a linear system: a learned gain against the Kalman filter, with the right model and a rotated one."""

import math
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import torch
from torch import Tensor

from convexlearn.errors import OptionError
from convexlearn.gain_networks import RecurrentGain
from convexlearn.objectives import mean_squared_error
from convexlearn.problems import tracking
from convexlearn.problems.catalogue import Contender, ProblemEntry, Reference, Result, Study
from convexlearn.problems.fitting import gradient, histories
from convexlearn.randomness import make_generator
from convexlearn.report import format_table, new_axes
from convexlearn.riccati import kalman_recursion
from convexlearn.rules.kalman import KalmanFilter
from convexlearn.simulate.pairs import Pairs

F = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
I = torch.eye(2, dtype=torch.float64)
LONGER = 10
"""The second measure is on sequences so many times longer than those of the training."""

MEASURES = ("T", f"{LONGER} T")


@dataclass(frozen=True)
class Setting:
    """Options. horizon: T of the training and of the first measure; process, observation: variances q^2 and r^2;
    degrees: by which the true H = I is rotated from the wrong one; sequences: for training; tests: to judge on.
    """

    horizon: int = 20
    process: float = 0.01
    observation: float = 0.01
    degrees: float = 10.0
    sequences: int = 1000
    tests: int = 1000

    def __post_init__(self) -> None:
        if min(self.horizon, self.sequences, self.tests) < 2 or min(self.process, self.observation) <= 0:
            raise OptionError("horizon, sequences and tests must be at least 2, process and observation positive")

    @property
    def wrong(self) -> Tensor:
        """H rotated back."""
        angle = -math.radians(self.degrees)
        c, s = math.cos(angle), math.sin(angle)
        return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)

    def draw(self, count: int, horizon: int, generator: torch.Generator) -> Pairs:
        """Pairs ((x, z_0 = 0), z) of z+ = F z + v, x = z + w."""
        v, w = torch.randn(2, count, horizon, 2, generator=generator, dtype=torch.float64)
        z, states = torch.zeros(count, 2, dtype=torch.float64), []
        for step in v.unbind(1):
            z = z @ F.mT + math.sqrt(self.process) * step
            states.append(z)
        target = torch.stack(states, 1)
        return Pairs((target + math.sqrt(self.observation) * w, torch.zeros_like(z)), target)

    def bound(self, horizon: int) -> float:
        """Mean squared error of the Kalman filter: the average of tr(P_t) / 2 after the observations."""
        V = self.process * I
        P = kalman_recursion(F, I, V, self.observation * I, V, horizon=horizon).posterior
        return float(P.diagonal(dim1=-2, dim2=-1).mean())


def declare(setting: Setting) -> cp.Problem:
    """One step of the filter as least squares: the estimate between prediction and observation."""
    x, prior = cp.Parameter(2, name="x"), cp.Parameter(2, name="prior")
    S, z = cp.Parameter((2, 2), name="S"), cp.Variable(2, name="z")
    return cp.Problem(cp.Minimize(cp.sum_squares(S @ (z - prior)) + cp.sum_squares(x - z) / setting.observation))


def build(seed: int, setting: Setting) -> Study:
    """Sequences drawn from `seed`, never shared by training, validation and test."""
    draw, T = setting.draw, setting.horizon
    train = draw(setting.sequences, T, make_generator(seed, "train"))
    valid = draw(min(setting.sequences, 500), T, make_generator(seed, "validation"))
    test = draw(setting.tests, T, make_generator(seed, "test"))
    long = draw(max(2, setting.tests // 5), LONGER * T, make_generator(seed, "long"))
    V, W = setting.process * I, setting.observation * I

    def kalman(H: Tensor) -> tracking.Started:
        return tracking.Started(KalmanFilter(F, None, H, V, W).freeze())

    def learned(H: Tensor) -> tracking.Started:
        return tracking.Started(KalmanFilter(F, None, H, None, W, gain=RecurrentGain(2, 2, seed=seed)).freeze("W"))

    options = {"batch_size": 100, "validation": valid}
    fit = gradient(train, mean_squared_error, steps=1200, learning_rate=3e-3, **options)
    rnn = gradient(train, mean_squared_error, steps=1200, learning_rate=5e-3, **options)
    contenders = {
        "Kalman filter": Contender(kalman(I)),
        "KalmanNet": Contender(learned(I), fit),
        "Kalman filter, wrong H": Contender(kalman(setting.wrong)),
        "KalmanNet, wrong H": Contender(learned(setting.wrong), fit),
        "RNN": Contender(tracking.Recurrent(2, 2, 32, seed=seed), rnn),
    }
    return Study(
        declare(setting),
        contenders,
        test,
        dict.fromkeys(MEASURES, mean_squared_error),
        bounds={"T": setting.bound(T), MEASURES[1]: setting.bound(LONGER * T)},
        simulators={MEASURES[1]: long},
    )


def recovered(result: Result, measure: str) -> float:
    """Share of the dB between mismatched and matched Kalman filter that the learned gain recovers."""
    names = ("Kalman filter", "Kalman filter, wrong H", "KalmanNet, wrong H")
    best, worst, own = (tracking.decibels(result.record(name).measure(measure)).mean for name in names)
    return (worst - own) / (worst - best)


def misses(result: Result) -> list[str]:
    """What a full run should show and does not: see ENTRY.reference."""
    missed = []
    for measure in MEASURES:
        exact = tracking.decibels(result.record("Kalman filter").measure(measure))
        bound = 10 * math.log10(result.study.bounds[measure])
        if abs(exact.mean - bound) > 4 * exact.standard_error:
            missed.append(f"the Kalman filter has {exact.text(5)} dB on {measure}, exactly {bound:.3f}")
        gap = tracking.decibels(result.record("KalmanNet").measure(measure)).mean - exact.mean
        if gap > 0.1:
            missed.append(f"KalmanNet is {gap:.3f} dB above the Kalman filter on {measure}")
    if recovered(result, "T") < 0.8:
        missed.append(f"with the wrong H the learned gain recovers {recovered(result, 'T'):.0%} of the gap")
    return missed


def tables(result: Result) -> dict[str, str]:
    """Decibels with the exact ones, and how often the 95 % regions hold the state."""
    steps = result.study.test.s.shape[1]
    exact = "\n".join(
        f"Kalman filter on {m}: exactly {10 * math.log10(b):.3f} dB" for m, b in result.study.bounds.items()
    )
    rows = []
    for name in ("Kalman filter", "KalmanNet", "Kalman filter, wrong H", "KalmanNet, wrong H"):
        shares = tracking.coverage(result.rules[name], result.study.test)  # pyright: ignore[reportArgumentType]
        rows.append([name, f"{float(shares.mean()):.3f} ± {float(shares.std()) / math.sqrt(len(shares)):.3f}"])
    return {
        "mean squared errors": tracking.decibel_table(result, {}, lambda r: steps * (r.seconds_per_decision or 0.0)),
        "exact": exact,
        "share of times with the state in the 95 % region": format_table(["rule", "share"], rows),
    }


def figures(result: Result) -> dict[str, Any]:
    """Errors in time, and the losses of the fits."""
    drawn: dict[str, Any] = {"errors": (ax := new_axes())}
    test = result.study.simulators[MEASURES[1]]
    for name, rule in result.rules.items():
        with torch.no_grad():
            error = (rule(*test.x) - test.s).square().mean((0, 2))
        ax.plot(range(1, len(error) + 1), 10 * torch.log10(error), label=name)
    ax.axvline(result.study.test.s.shape[1], color="gray", linestyle=":")
    ax.set(xlabel="step (trained up to the dotted line)", ylabel="mean squared error (dB)")
    ax.legend(fontsize=8)
    for ax in (found := histories(result)).values():
        ax.set_yscale("log")
    return drawn | found


ENTRY = ProblemEntry(
    name="linear-tracking",
    summary="tracking a linear system: learned gain against the Kalman filter, right and rotated observation matrix",
    source="Example 18; Revach and others, KalmanNet (2022), linear case",
    shapes="""\
x: context, observations (B, T, 2), and the state (B, 2) before the first of them, zero; no unit
s: decision, filtered states (B, T, 2); no unit
F: [1 1; 0 1]; H: identity, and rotated by 10 degrees in the filters with the wrong H; no unit
T, 10 T: mean squared error over coordinates and time, of sequences as in training and ten times longer""",
    reference=Reference(
        "the Kalman filter has its exact error (-21.968 dB for T = 20 and q^2 = r^2 = 0.01); the learned gain is "
        "within 0.1 dB of it on T and 10 T; with the wrong H it recovers at least 80 % of the dB between "
        "the two filters",
        misses,
    ),
    setting=Setting(),
    build=build,
    figures=figures,
    tables=tables,
)
