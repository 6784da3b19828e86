"""Linear quadratic regulation with the state seen: every type of rule against the known optimum (Examples 2, 4, 6)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convexlearn.problems import spectrum
from convexlearn.problems.baselines import gentle_network
from convexlearn.problems.catalogue import Contender, ProblemEntry, Reference, Result, Study
from convexlearn.riccati import lqr_recursion
from convexlearn.rules.affine import AffineRule
from convexlearn.rules.lqg import LQR
from convexlearn.rules.policies import adp
from convexlearn.rules.tree import TreeRule
from convexlearn.simulate.plants import LinearGaussian, random_linear

STATES, INPUTS = 4, 2
NOISE = 0.25
"""Variance of each entry of the process noise."""

LEVEL = 0.6
"""Size of the tree's inputs."""


@dataclass(frozen=True)
class Setting(spectrum.Setting):
    """Options. horizon: steps of a rollout; rollouts: how many judge a rule; mismatch: relative change of the
    true A for the measure `mismatched`; instance: seed of (A, B), 0 as published.
    """

    instance: int = 0


def plant(instance: int = 0) -> LinearGaussian:
    """z+ = A z + B u + w, w ~ N(0, 0.25 I), z_0 ~ N(0, I), cost |z|^2 + |u|^2."""
    A, B = random_linear(instance, STATES, INPUTS)
    return LinearGaussian(A, B, V=NOISE * torch.eye(STATES, dtype=A.dtype))


def model(instance: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A `(4, 4)`, B `(4, 2)`, Q and R."""
    A, B = random_linear(instance, STATES, INPUTS)
    return A, B, torch.eye(STATES, dtype=A.dtype), torch.eye(INPUTS, dtype=A.dtype)


def optimum(instance: int, horizon: int) -> float:
    """Least expected cost per step over the horizon: (tr(P_0 start) + sum_t tr(P_{t+1} V)) / T with P_T = 0."""
    A, B, Q, R = model(instance)
    P = lqr_recursion(A, B, Q, R, horizon, terminal=0 * Q)[1]
    total = P[0].trace() + NOISE * P[1:].diagonal(dim1=-2, dim2=-1).sum()
    return float(total / horizon)


def levels(size: float) -> Tensor:
    """`(9, 2)`: decisions of a tree, each of two inputs at one of three levels."""
    level = torch.tensor([-size, 0.0, size], dtype=torch.float64)
    return torch.cartesian_prod(level, level)


def build(seed: int, setting: Setting) -> Study:
    """The rules at their start values, the plant and one that differs from it."""
    A, B, Q, R = model(setting.instance)
    true = plant(setting.instance)
    train = spectrum.loop(true, setting.horizon)
    tuned, zero = adp(A, B, R, Q), torch.zeros(INPUTS, dtype=A.dtype)
    fits = {
        "ADP": spectrum.descend(train, steps=50, learning_rate=0.5, batch_size=6, optimizer=torch.optim.SGD),
        "affine": spectrum.descend(train, steps=150, learning_rate=0.05, batch_size=6),
        "tree": spectrum.descend(train, steps=150, learning_rate=0.05, batch_size=16, halvings=5),
        "network": spectrum.descend(train, steps=400, learning_rate=3e-3, batch_size=6),
    }
    contenders = {
        "LQR": Contender(LQR(A, B, Q, R)),
        "untuned ADP": Contender(adp(A, B, R, Q, learn=())),
        "tuned ADP": Contender(tuned, fits["ADP"]),
        "affine": Contender(AffineRule(0.0 * B.mT @ A, zero), fits["affine"]),
        "tree": Contender(TreeRule(levels(LEVEL), STATES, depth=3, seed=seed), fits["tree"]),
        "network": Contender(gentle_network(STATES, INPUTS, seed=seed, bias=None), fits["network"]),
    }
    return spectrum.study(tuned.problem(), contenders, true, setting, cost=optimum(setting.instance, setting.horizon))


def misses(result: Result) -> list[str]:
    """What tuning should reach and did not: see ENTRY.reference."""
    best, missed = result.record("LQR").measure("cost"), []
    for name, share in (("tuned ADP", 0.01), ("affine", 0.01)):
        found = result.record(name).measure("cost")
        if found.mean > (1 + share) * best.mean:
            missed.append(f"{name} costs {found.text(5)}, over {share:.0%} above LQR's {best.text(5)}")
    return missed


def figures(result: Result) -> dict[str, Any]:
    """Costs, parameters, data efficiency, and the optimum."""
    return spectrum.figures(result, [(result.study.bounds["cost"], "optimum")])


ENTRY = ProblemEntry(
    name="lqr",
    summary="linear quadratic control with the state seen, by rules of all five types",
    source="Examples 2, 4 and 6, Eq. 12; Agrawal, Barratt, Boyd, Stellato (2020), LQR",
    shapes="""\
x: context, the state (B, 4); no unit
s: decision, the input (B, 2); no unit
A, B: plant matrices (4, 4) of spectral radius 1 and (4, 2); no unit
S, q: (4, 4) and (4,), the value |S y|^2 + q'y of the next state y in ADP; no unit
cost: |z|^2 + |u|^2, averaged over the steps; mismatched: the same on a plant whose A differs by 10 %""",
    reference=Reference(
        "LQR's long-run cost tr(P V) is 1.80312, optimal; tuned ADP and the affine rule come within 1 % of LQR "
        "(published: ADP exceeds LQR by 0.389 untuned, 0.001 tuned)",
        misses,
    ),
    setting=Setting(),
    build=build,
    figures=figures,
    tables=spectrum.tables,
)
