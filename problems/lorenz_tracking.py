"""Tracking the Lorenz attractor with models that differ from the truth: Table 1 and Fig. 10."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import torch
from torch import Tensor, nn

from convexlearn.errors import OptionError
from convexlearn.extras import require
from convexlearn.gain_networks import RecurrentGain
from convexlearn.objectives import mean_squared_error
from convexlearn.problems import tracking
from convexlearn.problems.catalogue import Contender, ProblemEntry, Reference, Result, Study
from convexlearn.problems.fitting import gradient, histories
from convexlearn.randomness import make_generator
from convexlearn.rules.extended_kalman import ExtendedKalmanFilter
from convexlearn.simulate.pairs import Pairs
from convexlearn.simulate.plants import Lorenz
from convexlearn.tune import History

I = torch.eye(3, dtype=torch.float64)
STEP = 0.02
SETTLING = 1000
"""Steps before a trajectory is recorded, after which it has forgotten where it began."""

PIECE = 60
"""Steps of a training sequence, started at the true state before it."""

PUBLISHED = {"EKF": -6.432, "UKF": -5.683, "PF": -5.337, "KalmanNet": -11.284, "RNN": 17.355}
"""Mean squared errors of Table 1 in dB."""

RANGES = {"EKF": (-6.54, -5.94), "KalmanNet": (float("-inf"), -9.5), "EKF, RK4, tuned": (float("-inf"), -15.0)}
"""Where the errors in dB should be; the EKF's is -6.24 recomputed."""


@dataclass(frozen=True)
class Setting:
    """Options. trajectories, length: test trajectories and their steps of 0.02 (10 and 3000 in Table 1); train: how
    many trajectories of 600 steps the rules are fitted to.
    """

    trajectories: int = 20
    length: int = 300
    train: int = 20

    def __post_init__(self) -> None:
        if min(self.trajectories, self.train) < 2 or self.length < PIECE:
            raise OptionError(f"need two trajectories to train and to test on, and a length of at least {PIECE}")


class Flow(nn.Module):
    """The state one step later as a filter believes it: z `(B, 3)` -> `(B, 3)`."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.plant = Lorenz(step=STEP, **options)

    def forward(self, z: Tensor) -> Tensor:
        """z+ `(B, 3)`."""
        return self.plant(z, None, 0.0)


def identity(z: Tensor) -> Tensor:
    """All states are observed."""
    return z


def draw(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The state before, states `(count, length, 3)` and observations x = z + N(0, I), without process noise."""
    z = 1 + torch.randn(count, 3, generator=generator, dtype=torch.float64)
    truth, states = Flow(substeps=4), []
    for _ in range(SETTLING + length):
        z = truth(z)
        states.append(z)
    kept = torch.stack(states[SETTLING:], 1)
    noise = torch.randn(kept.shape, generator=generator, dtype=torch.float64)
    return states[SETTLING - 1], kept, kept + noise


def extended(process: float, **flow: Any) -> tracking.Started:
    """The extended Kalman filter with V = process I and W = I."""
    return tracking.Started(ExtendedKalmanFilter(Flow(**flow), identity, process * I, I))


def declare() -> cp.Problem:
    """One step of the filters as least squares: the estimate between prediction and observation."""
    x, prior = cp.Parameter(3, name="x"), cp.Parameter(3, name="prior")
    S, z = cp.Parameter((3, 3), name="S"), cp.Variable(3, name="z")
    return cp.Problem(cp.Minimize(cp.sum_squares(S @ (z - prior)) + cp.sum_squares(x - z)))


def build(seed: int, setting: Setting) -> Study:
    """Trajectories drawn from `seed`, never shared by training, validation and test."""
    train = tracking.windows(*draw(setting.train, 600, make_generator(seed, "train")), PIECE)
    valid = tracking.windows(*draw(20, 600, make_generator(seed, "validation")), 2 * PIECE)
    before, z, x = draw(setting.trajectories, setting.length, make_generator(seed, "test"))

    def fit(steps: int, rate: float, **options: Any) -> Callable[..., History]:
        return gradient(train, mean_squared_error, steps=steps, learning_rate=rate, validation=valid, **options)

    taylor = {"method": "taylor", "order": 5}
    network = ExtendedKalmanFilter(
        Flow(method="taylor", order=2), identity, None, I, gain=RecurrentGain(3, 3, seed=seed)
    ).freeze("W")
    decayed = {"optimizer": lambda groups: torch.optim.Adam(groups, weight_decay=1e-6)}
    contenders = {
        "constant gain": Contender(
            tracking.Started(ExtendedKalmanFilter(Flow(**taylor), identity, gain=0.35 * I).freeze())
        ),
        "EKF": Contender(extended(0.15, **taylor).freeze()),
        "EKF, tuned": Contender(extended(0.15, **taylor), fit(40, 0.1, batch_size=20)),
        "EKF, RK4, tuned": Contender(extended(0.15, substeps=1), fit(60, 0.3, batch_size=20)),
        "KalmanNet": Contender(tracking.Started(network), fit(1200, 1e-3, batch_size=32, **decayed)),
        "RNN": Contender(tracking.Recurrent(3, 3, 64, scale=10.0, seed=seed), fit(700, 3e-3, batch_size=32)),
    }
    return Study(declare(), contenders, Pairs((x, before), z), {"mse": mean_squared_error})


def misses(result: Result) -> list[str]:
    """What a full run should show and does not: see ENTRY.reference."""
    missed = []
    for name, (low, high) in RANGES.items():
        found = tracking.decibels(result.record(name).measure("mse"))
        slack = 3 * found.standard_error if name == "EKF" else 0.0
        if not low - slack <= found.mean <= high + slack:
            missed.append(f"{name} has {found.text()} dB, expected between {low} and {high}")
    return missed


def tables(result: Result) -> dict[str, str]:
    """Table 1: decibels and run-times."""
    steps = result.study.test.s.shape[1]
    table = tracking.decibel_table(result, PUBLISHED, lambda r: steps * (r.seconds_per_decision or 0.0))
    return {f"Table 1, {steps} steps a trajectory": table}


def figures(result: Result) -> dict[str, Any]:
    """One trajectory and its estimates, as in Fig. 10, and the losses of the fits."""
    test, rules = result.study.test, result.rules
    panels = ["truth", "observations", *(n for n in ("EKF", "KalmanNet", "EKF, RK4, tuned", "RNN") if n in rules)]
    figure = require("matplotlib.figure", "plot", "a plot").Figure(figsize=(9.0, 6.0), layout="constrained")
    one = test.subset(torch.tensor([0]))
    with torch.no_grad():
        paths = {"truth": one.s, "observations": one.x[0]} | {n: rules[n](*one.x) for n in panels[2:]}
    for k, name in enumerate(panels):
        ax = figure.add_subplot(2, 3, k + 1, projection="3d")
        ax.plot(*paths[name][0].T.numpy(), linewidth=0.6)
        ax.set_title(name, fontsize=9)
        ax.tick_params(labelsize=6)
    drawn: dict[str, Any] = {"trajectory": figure.axes[0]}
    for ax in (found := histories(result)).values():
        ax.set_yscale("log")
    return drawn | found


ENTRY = ProblemEntry(
    name="lorenz-tracking",
    summary="tracking the Lorenz attractor through a crude model: EKF, tuned EKF, KalmanNet, recurrent network",
    source="Results, Table 1 and Fig. 10; Revach and others, KalmanNet (2022)",
    shapes="""\
x: context, observations (B, T, 3), the state plus N(0, I), and the state (B, 3) before the first of them; no unit
s: decision, filtered states (B, T, 3) every 0.02 time units; no unit
V, W: covariances (3, 3) of the filters' process and observation noise, tuned where the name says so; no unit
mse: squared error averaged over coordinates and time; the truth has no process noise and is integrated by RK4 in
steps of 0.005, while the filters' model freezes the matrix of the flow over a step of 0.02, but for those with RK4""",
    reference=Reference(
        "EKF -6.24 ± 0.3 dB, KalmanNet at most -9.5 dB, and the EKF with an accurate integrator (RK4) and tuned V, W "
        "at most -15 dB: the learned gain makes up for part of a crude model, a better model for all of it (a "
        "recurrent network fitted to the same data reaches about -10 dB, unlike the published one with 17.355)",
        misses,
    ),
    setting=Setting(),
    build=build,
    figures=figures,
    tables=tables,
)
