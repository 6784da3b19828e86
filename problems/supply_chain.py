"""Running a supply chain of four warehouses with a convex control policy (Examples 2, 4 and 12)."""

from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor, nn

from convexlearn.objectives import cost
from convexlearn.problems import published
from convexlearn.problems.baselines import gentle_network
from convexlearn.problems.catalogue import Contender, ProblemEntry, Reference, Result, Study
from convexlearn.problems.fitting import gradient, histories
from convexlearn.report import new_axes, plot_records
from convexlearn.rules.affine import AffineRule
from convexlearn.rules.convex import ConvexRule
from convexlearn.simulate.base import Trajectory
from convexlearn.simulate.closed_loop import ClosedLoop
from convexlearn.simulate.plants import SupplyChain

STOCK, LINK = 3.0, 2.0
"""Largest stock of a warehouse and largest amount moved along a link in a period."""

PUBLISHED = published.Run(steps=200, learning_rate=0.05, batch_size=5, test_size=1)
PUBLISHED_LOSSES = {0: -0.27864, 1: -0.28086, 50: -0.33704, 100: -0.34331, 199: -0.34093}
"""Test loss before a step, as printed in the authors' notebook."""


@dataclass(frozen=True)
class Setting:
    """Options. horizon: periods in a rollout; rollouts: how many judge a rule."""

    horizon: int = 20
    rollouts: int = 400


def parts(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """State z `(B, 8)` -> stock h `(B, 4)`, prices p `(B, 2)`, demands d `(B, 2)`."""
    return z[..., :4], z[..., 4:6], z[..., 6:]


def declare(S: np.ndarray | None = None, q: np.ndarray | None = None) -> ConvexRule:
    """minimize p'b + tau 1'm - r 1's + |S h+|^2 + q'h+: context z `(8,)`, decision u = (b, m, s) `(8,)`.

    h+ = h + (entering - leaving) u <= 3, 0 <= u <= 2, leaving u <= h, s <= d.
    """
    chain = SupplyChain()
    h, p, d = cp.Parameter(4, name="h"), cp.Parameter(2, name="p"), cp.Parameter(2, name="d")
    weight = cp.Parameter((4, 4), name="S", value=np.eye(4) if S is None else S)
    linear = cp.Parameter(4, name="q", value=np.full(4, -3.0) if q is None else q)
    u, after = cp.Variable(8, name="u"), cp.Variable(4, name="after")
    trade = p @ u[:2] + chain.moving * cp.sum(u[2:6]) - chain.revenue * cp.sum(u[6:])
    value = cp.sum_squares(weight @ after) + linear @ after
    problem = cp.Problem(cp.Minimize(trade + value), limits(h, d, u, after))
    return ConvexRule(problem, context=[h, p, d], decision=u, learn=[weight, linear], features=parts)


def limits(h: Any, d: Any, u: Any, after: Any) -> list[Any]:
    """What is allowed in one period, for stock h, demands d, amounts u and the stock afterwards."""
    chain = SupplyChain()
    entering, leaving = chain.entering.numpy(), chain.leaving.numpy()
    return [
        after == h + (entering - leaving) @ u, after <= STOCK, u >= 0, u <= LINK, leaving @ u <= h, u[6:] <= d,
    ]  # fmt: skip


def planned(horizon: int = 6) -> ConvexRule:
    """Model predictive control: the first period of the plan that is best if prices and demands become their means."""
    chain = SupplyChain()
    h, p, d = cp.Parameter(4, name="h"), cp.Parameter(2, name="p"), cp.Parameter(2, name="d")
    u, stock = cp.Variable((horizon, 8), name="u"), cp.Variable((horizon + 1, 4), name="stock")
    means = np.exp(np.array([0.0, 0.1, 0.0, 0.4]) + 0.02)
    objective: Any = 0
    constraints: list[Any] = [stock[0] == h]
    for t in range(horizon):
        prices, demands = (p, d) if t == 0 else (means[:2], means[2:])
        trade = prices @ u[t, :2] + chain.moving * cp.sum(u[t, 2:6]) - chain.revenue * cp.sum(u[t, 6:])
        objective += trade + chain.storing * cp.sum(stock[t + 1] + cp.square(stock[t + 1]))
        constraints += limits(stock[t], demands, u[t], stock[t + 1])
    problem = cp.Problem(cp.Minimize(objective), constraints)
    return ConvexRule(problem, context=[h, p, d], decision=u[0], features=parts)


class Wish(nn.Module):
    """z `(B, 8)` -> h, d and the amounts `(B, 8)` that a rule wishes to move."""

    def __init__(self, rule: nn.Module) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Contexts of `allowed`."""
        h, _, d = parts(z)
        return h, d, self.rule(z)


def allowed(rule: nn.Module) -> ConvexRule:
    """The allowed amounts nearest to those that a rule wishes: context z `(8,)`, decision u `(8,)`."""
    h, d, wish = cp.Parameter(4, name="h"), cp.Parameter(2, name="d"), cp.Parameter(8, name="wish")
    u, after = cp.Variable(8, name="u"), cp.Variable(4, name="after")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(u - wish)), limits(h, d, u, after))
    return ConvexRule(problem, context=[h, d, wish], decision=u, features=Wish(rule))


def first_as_published(batch: int, generator: torch.Generator) -> Tensor:
    """z_0 of SupplyChain, its stock drawn in single precision as in the authors' notebook."""
    stock = STOCK * torch.rand(batch, 4, generator=generator).double()
    return torch.cat([stock, SupplyChain().noise(batch, 0, generator)], -1)


def cost_as_published(trajectory: Trajectory) -> Tensor:
    """Mean cost `(B,)` with the stock and the prices after the period, as the authors' code charges them."""
    return SupplyChain().stage_cost(trajectory.state[:, 1:], trajectory.decision).mean(1)


def build(seed: int, setting: Setting) -> Study:
    """The rules at their start values and the chain."""
    chain = SupplyChain()
    common: dict[str, Any] = {"noise": chain.noise, "stage_cost": chain.stage_cost}
    loop = ClosedLoop(chain, setting.horizon, initial=chain.initial, **common)
    theirs = ClosedLoop(chain, 20, initial=first_as_published, **common)
    affine = AffineRule(torch.zeros(8, 8, dtype=torch.float64), torch.ones(8, dtype=torch.float64))
    network = gentle_network(8, 8, hidden=(32, 32), seed=seed, bias=1.0)
    untuned = declare().freeze()
    descent = {"batch_size": 32}
    contenders = {
        "untuned": Contender(untuned),
        "planned": Contender(planned()),
        "published": Contender(declare(), published.descend(theirs, cost_as_published, PUBLISHED)),
        "tuned": Contender(declare(), gradient(loop, cost, steps=200, learning_rate=0.05, **descent)),
        "affine": Contender(allowed(affine), gradient(loop, cost, steps=400, learning_rate=0.05, **descent)),
        "network": Contender(allowed(network), gradient(loop, cost, steps=600, learning_rate=3e-3, **descent)),
    }
    measures = {"cost": cost}
    return Study(untuned.problem(), contenders, loop, measures, samples=setting.rollouts)


def misses(result: Result) -> list[str]:
    """What does not hold of ENTRY.reference."""
    untuned, planned, theirs, tuned = (
        result.record(name).measure("cost") for name in ("untuned", "planned", "published", "tuned")
    )
    missed = published.departures(result.traces["published"], PUBLISHED_LOSSES, 1e-3)
    for name, rule in (("published", theirs), ("tuned", tuned)):
        if rule.mean > untuned.mean - 2 * untuned.standard_error:
            missed.append(f"{name} costs {rule.text()}, hardly less than untuned with {untuned.text()}")
    if tuned.mean > theirs.mean - 2 * theirs.standard_error:
        missed.append(f"tuned costs {tuned.text()}, hardly less than the published run's {theirs.text()}")
    if tuned.mean > 0.97 * planned.mean:
        missed.append(f"tuned costs {tuned.text()}, over 3 % more than planning ahead with {planned.text()}")
    return missed


def figures(result: Result) -> dict[str, Any]:
    """Costs of the rules, the published run, the tuning histories, and the stock over time."""
    axes = {"costs": plot_records(result.records, "cost"), "stock": _plot_stock(result)}
    return axes | histories(result, ["test loss"])


def _plot_stock(result: Result) -> Any:
    """Mean stock of each warehouse over the periods, untuned and tuned."""
    axes = new_axes(1, 2, size=(9.0, 3.5)).ravel()
    for ax, name in zip(axes, ("untuned", "tuned")):
        with torch.no_grad():
            stock = result.study.test(result.rules[name], 200, torch.Generator().manual_seed(1)).state[..., :4].mean(0)
        for k in range(4):
            ax.plot(stock[:, k], label=f"warehouse {k + 1}")
        ax.set(title=name, xlabel="period", ylabel="stock", ylim=(0, STOCK))
    axes[0].legend(fontsize=8)
    return axes[0]


ENTRY = ProblemEntry(
    name="supply-chain",
    summary="buying, moving and selling goods of four warehouses by a tuned convex policy",
    source="Examples 2, 4, 12; Agrawal and others, Learning convex optimization control policies, section 5.4",
    shapes="""\
x: context, the state z (B, 8): stock of four warehouses [units], prices of two suppliers,
    demands of two consumers [units]
s: decision u (B, 8): amounts moved along the links supplier 1 to 1, supplier 2 to 2, 1 to 3, 1 to 4, 2 to 4, 4 to 3,
    3 to consumer 1, 4 to consumer 2 [units]
S: root of the weight (4, 4) of the next stock
q: linear weight (4,) of the next stock
cost: mean over 20 periods of purchases, 0.05 per unit moved, less 1.3 per unit sold, plus storage 0.01 (h + h^2)""",
    reference=Reference(
        "the published run repeats its test losses, -0.27864 before the first step and -0.34093 after 199, which are "
        "on one path and charge the next period's prices; by the cost that the paper states the tuned policy beats "
        "that run and comes within 3 % of planning six periods ahead with the mean prices and demands",
        misses,
    ),
    setting=Setting(),
    build=build,
    figures=figures,
)
