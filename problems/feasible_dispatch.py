"""Dispatch of generators for uncertain loads: a network inside the grid's limits, and its rivals (reference 33)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor, nn

from convexlearn.errors import OptionError
from convexlearn.evaluate import evaluate
from convexlearn.networks import mlp
from convexlearn.objectives import squared_error
from convexlearn.problems import feasible_dispatch_figures as drawing
from convexlearn.problems.catalogue import Budget, Contender, ProblemEntry, Reference, Result, Study
from convexlearn.problems.fitting import Grid as Search
from convexlearn.problems.fitting import gradient
from convexlearn.problems.power_grid import ieee30
from convexlearn.randomness import make_generator
from convexlearn.rules.affine import AffineRule
from convexlearn.rules.convex import ConvexRule
from convexlearn.rules.feasible import FeasibleRule
from convexlearn.simulate.base import Trajectory
from convexlearn.simulate.pairs import Pairs

GRID = ieee30()

PENALTIES = (6.0, 10.0, 20.0, 50.0, 100.0)
"""Weights ($/MWh) of the penalty baseline; marginal costs of generation lie between 1 and 7.25 $/MWh."""

SPARE = 1e-3
"""Share by which the grid could serve more of every load vector that is drawn."""

VIOLATED = 1e-6
"""Largest excess (MW) of a constraint that counts as kept."""


@dataclass(frozen=True)
class Setting:
    """Options. level: mean of all loads, relative to the grid's own; common, own: largest deviations, relative to it,
    of all loads together and of each by itself; train, test: numbers of load vectors; steps: gradient steps.
    """

    level: float = 1.1
    common: float = 0.2
    own: float = 0.3
    train: int = 4096
    test: int = 1000
    steps: int = 2000

    def __post_init__(self) -> None:
        if self.common < 0 or self.own < 0 or not self.common + self.own < self.level:
            raise OptionError(f"loads must stay positive: level > common + own >= 0, got {self}")


class Dispatcher(nn.Module):
    """Loads `(B, 20)` -> wished generation `(B, g)` in MW by an inner map of standardized loads to shares of capacity.

    first: the first generator that it gives; the balance gives those before.
    """

    mean: Tensor
    spread: Tensor
    capacity: Tensor

    def __init__(self, inner: nn.Module, setting: Setting, first: int = 0) -> None:
        super().__init__()
        self.inner = inner
        demand, largest = torch.as_tensor(GRID.demand), torch.as_tensor(GRID.largest[first:])
        self.register_buffer("mean", setting.level * demand, persistent=False)
        self.register_buffer("spread", (setting.common + setting.own) * demand, persistent=False)
        self.register_buffer("capacity", largest, persistent=False)

    def forward(self, load: Tensor) -> Tensor:
        """Half of the capacity, plus that half times what the inner map gives."""
        return 0.5 * self.capacity * (1 + self.inner((load - self.mean) / self.spread))


def declare() -> ConvexRule:
    """The optimal dispatch: minimize the cost of p (MW), subject to the grid's constraints on p and angles (rad)."""
    p, load, constraints = _declared()
    return ConvexRule(cp.Problem(cp.Minimize(GRID.cost_of(p)), constraints), context=[load], decision=p)


def _declared() -> tuple[Any, Any, list[Any]]:
    """Generation, loads, and the constraints that the grid puts on them."""
    p, angle = cp.Variable(len(GRID.largest), name="p"), cp.Variable(GRID.buses, name="angle")
    load = cp.Parameter(len(GRID.demand), name="load")
    return p, load, GRID.constraints(p, angle, load)


def projected(network: nn.Module) -> FeasibleRule:
    """The network's generation, moved to the nearest that the grid can take."""
    p, load, constraints = _declared()
    return FeasibleRule(network, constraints, p, [load])


def completed(network: nn.Module, *, limits: bool = True) -> FeasibleRule:
    """The network gives all generators but the first, the balance gives that; with or without the limits kept."""
    p, load, constraints = _declared()
    return FeasibleRule(network, constraints if limits else constraints[:2], p, [load], free=p[1:])


def cost(trajectory: Trajectory) -> Tensor:
    """Cost `(B,)` of the generation, in $/h."""
    return GRID.cost(trajectory.decision)


def gap(trajectory: Trajectory) -> Tensor:
    """|cost / least cost - 1| `(B,)` in percent, the target being the optimum; without its limits one costs less."""
    least: Any = trajectory.target
    return 100 * (cost(trajectory) / GRID.cost(least) - 1).abs()


def violation(trajectory: Trajectory) -> Tensor:
    """Largest excess `(B,)` of a constraint, in MW."""
    return GRID.excess(trajectory.decision, trajectory.context).amax(-1)


def violated(trajectory: Trajectory) -> Tensor:
    """1 where a constraint is broken by over VIOLATED MW, else 0, `(B,)`."""
    return (violation(trajectory) > VIOLATED).to(trajectory.decision.dtype)


def penalised(weight: float) -> Callable[[Trajectory], Tensor]:
    """Cost plus `weight` ($/MWh) times the sum of what the constraints are broken by, `(B,)`: an exact penalty."""
    return lambda t: cost(t) + weight * GRID.excess(t.decision, t.context).sum(-1)


def draw(seed: int, setting: Setting) -> tuple[Pairs, Pairs, Pairs]:
    """Training, validation and test loads with their optimal dispatch; what the grid cannot serve is drawn anew.

    It must serve SPARE more, since the multipliers of a projection on nearly a point are huge.
    """
    optimal, test = declare(), setting.test
    return (
        _feasible(optimal, setting, setting.train, make_generator(seed, "train")),
        _feasible(optimal, setting, test, make_generator(seed, "validation")),
        _feasible(optimal, setting, test, make_generator(seed, "test")),
    )


def _feasible(optimal: ConvexRule, setting: Setting, count: int, generator: torch.Generator) -> Pairs:
    demand, found, missing = torch.as_tensor(GRID.demand), [], count
    while missing > 0:
        common, own = (2 * torch.rand(missing, k, generator=generator).double() - 1 for k in (1, len(demand)))
        load = demand * (setting.level + setting.common * common + setting.own * own)
        served = load[optimal.layer.solve((1 + SPARE) * load).ok]
        found.append((served, optimal(served).detach()))
        missing -= len(served)
    load, p = (torch.cat(parts) for parts in zip(*found))
    return Pairs(load, p)


@dataclass(frozen=True)
class Networks:
    """Start values of the networks: (loads, generators) perceptrons that wish half of the capacity at first."""

    seed: int
    setting: Setting

    def __call__(self, first: int = 0) -> Dispatcher:
        """One that gives all generators from the number `first`."""
        inner = mlp(len(GRID.demand), len(GRID.largest) - first, hidden=(64, 64), seed=self.seed).double()
        last: Any = inner[-1]
        with torch.no_grad():
            last.weight.mul_(0.1)
        return Dispatcher(inner, self.setting, first)


def build(seed: int, setting: Setting) -> Study:
    """Draw the loads from `seed` and set up the rules at their start values."""
    train, valid, test = draw(seed, setting)
    network, steps = Networks(seed, setting), setting.steps

    def descend(objective: Callable[[Trajectory], Tensor], steps: int) -> Callable[[Any, Budget], Any]:
        return gradient(train, objective, steps=steps, learning_rate=3e-3, batch_size=128, clip=None)

    zeros = torch.zeros(len(GRID.largest), len(GRID.demand), dtype=torch.float64)
    affine = Dispatcher(AffineRule(zeros, zeros[:, 0]), setting)
    # a step without projection takes a quarter of the time of one with it
    penalties = {w: Contender(network(), descend(penalised(w), 4 * steps)) for w in PENALTIES}
    imitation = Contender(network(), descend(squared_error, 4 * steps))
    contenders = {
        "optimum": Contender(declare()),
        **{f"penalties, {w:g} $/MWh": contender for w, contender in penalties.items()},
        "penalties, then projected": Contender(projected(network()), least_projected(penalties, valid)),
        "imitation": imitation,
        "imitation, then projected": Contender(projected(network()), least_projected({0.0: imitation}, valid)),
        "completed, penalties": Contender(completed(network(1), limits=False), descend(penalised(20.0), 2 * steps)),
        "affine, projected": Contender(projected(affine), descend(cost, steps)),
        "network, projected": Contender(projected(network()), descend(cost, steps)),
        "network, completed": Contender(completed(network(1)), descend(cost, steps)),
    }
    measures = {"gap": gap, "violation": violation, "violated": violated}
    return Study(declare().problem(), contenders, test, measures)


def least_projected(sources: Mapping[float, Contender], validation: Pairs) -> Callable[[Any, Budget], Search]:
    """Take over the weights of the network, trained before without projection, whose gap is least when projected."""

    def fit(rule: Any, budget: Budget) -> Search:
        outcomes = []
        for source in sources.values():
            rule.network.load_state_dict(source.rule.state_dict())
            outcomes.append(evaluate(rule, validation, gap, seed=budget.seed))
        means, errors = (np.array([getattr(o, name) for o in outcomes]) for name in ("mean", "standard_error"))
        found = Search(np.array(list(sources)), means, errors)
        rule.network.load_state_dict(sources[found.best].rule.state_dict())
        return found

    return fit


def misses(result: Result) -> list[str]:
    """What should hold and does not: see ENTRY.reference."""
    missed, best = [], result.record("network, projected").measure("gap")
    for name in drawing.INSIDE:
        worst = drawing.worst(result, name)["violation"]
        if worst > VIOLATED:
            missed.append(f"{name} breaks a constraint by {worst:.1e} MW")
    for record in result.records:
        if "penalties" not in record.name and "imitation" not in record.name:
            continue
        other = record.measure("gap")
        if best.mean + 2 * math.hypot(best.standard_error, other.standard_error) >= other.mean:
            missed.append(f"network, projected has a gap of {best.text()} %, {record.name} one of {other.text()} %")
    return missed


ENTRY = ProblemEntry(
    name="feasible-dispatch",
    summary="generators dispatched for uncertain loads by networks that keep the grid's limits",
    source="Reference 33 of the paper, Eq. 6; DC optimal power flow on the IEEE 30-bus grid",
    shapes="""\
x: context, loads (B, 20); MW
s: decision, generation p (B, 6) in MW; networks are trained on its cost in $/h, not on the optimum, but for imitation
angle: voltage angles (30,) of the buses; rad
gap: |cost / least cost - 1| in percent (an infeasible dispatch may cost less than the optimum)
violation: largest excess over all constraints (balance, 41 line limits, generator limits); MW, 1 p.u. = 100 MW""",
    reference=Reference(
        "with projection or completion no constraint is broken by over 1e-6 MW (1e-8 p.u.) on any held-out load; the "
        "network trained through its projection has a smaller gap than the same network trained with penalties of any "
        "weight, by imitation, or projected only afterwards, by over two standard errors",
        misses,
    ),
    setting=Setting(),
    build=build,
    figures=drawing.figures,
    tables=drawing.tables,
)
