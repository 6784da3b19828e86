"""The spectrum of rules on one control problem: fits that count rollouts, a plant that differs, tables and figures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cvxpy as cp
import torch
from torch import Tensor, nn

from convexlearn.errors import OptionError
from convexlearn.evaluate import evaluate
from convexlearn.objectives import cost
from convexlearn.problems.catalogue import Budget, Contender, Result, Study
from convexlearn.problems.fitting import gradient
from convexlearn.report import format_table, new_axes, plot_records
from convexlearn.rules.tree import TreeRule
from convexlearn.simulate.closed_loop import ClosedLoop
from convexlearn.simulate.plants import LinearGaussian

WATCHED = 128
"""Rollouts on which the cost is judged while a rule is fitted; the same ones for all rules and steps."""

CLOSE = 0.01
"""A fit has arrived once its cost stays within this fraction of the last."""


_TITLE = f"cost ({WATCHED} rollouts, the same for all) after so many training rollouts, and when it has arrived"


@dataclass(frozen=True)
class Setting:
    """What the studies have in common: steps of a rollout, how many judge a rule, relative change of the true A."""

    horizon: int = 100
    rollouts: int = 256
    mismatch: float = 0.1

    def __post_init__(self) -> None:
        if self.horizon < 1 or self.rollouts < 2:
            raise OptionError("horizon must be at least 1, rollouts at least 2")


@dataclass(frozen=True)
class Curve:
    """Cost of a rule while it was fitted: `costs[k]` after `rollouts[k]` training rollouts."""

    rollouts: list[int]
    costs: list[float]

    @property
    def arrival(self) -> int:
        """Training rollouts after which the cost stays within CLOSE of the last."""
        late = [k for k, value in enumerate(self.costs) if value > (1 + CLOSE) * self.costs[-1]]
        return self.rollouts[late[-1] + 1 if late else 0]


class Limited(nn.Module):
    """A rule whose decision is clipped to [-limit, limit]."""

    def __init__(self, rule: nn.Module, limit: float) -> None:
        super().__init__()
        self.rule, self.limit = rule, limit

    def forward(self, *x: Tensor) -> Tensor:
        """The clipped decision `(B, m)`."""
        return self.rule(*x).clamp(-self.limit, self.limit)


def loop(plant: LinearGaussian, horizon: int) -> ClosedLoop:
    """The closed loop around a linear plant."""
    return ClosedLoop(
        plant,
        horizon,
        initial=plant.initial,
        noise=plant.noise,
        observe=plant.observe,
        stage_cost=plant.stage_cost,
    )


def departed(plant: LinearGaussian, size: float) -> LinearGaussian:
    """The plant with A changed at random by `size` in relative Frobenius norm, scaled back to its spectral radius."""
    A = plant.A
    change = torch.randn(A.shape, generator=torch.Generator().manual_seed(0), dtype=A.dtype)
    changed = A + size * torch.linalg.norm(A) * change / torch.linalg.norm(change)
    radius, before = (torch.linalg.eigvals(M).abs().max() for M in (changed, A))
    return replace(plant, A=changed * before / radius)


def study(
    problem: cp.Problem, contenders: dict[str, Contender], true: LinearGaussian, setting: Setting, **bounds: float
) -> Study:
    """The contenders, judged on the true plant and on one whose A has departed from it."""
    other = loop(departed(true, setting.mismatch), setting.horizon)
    return Study(
        problem,
        contenders,
        loop(true, setting.horizon),
        {"cost": cost, "mismatched": cost},
        bounds=bounds,
        samples=setting.rollouts,
        simulators={"mismatched": other},
    )


def descend(
    train: ClosedLoop, *, steps: int, learning_rate: float, batch_size: int, halvings: float = 0.0, **options: Any
) -> Callable[[Any, Budget], Curve]:
    """Fit the cost by `tune`, the learning rate falling to zero along half a cosine; the trace is a Curve.

    The best weights on `train` are kept, by fresh rollouts that are always the same; they are not counted.
    halvings: by how many powers of two the temperature of a TreeRule falls meanwhile. options: those of `tune`.
    """

    def fit(rule: Any, budget: Budget) -> Curve:
        total, curve = budget.limit(steps), Curve([], [])
        factor = 0.5 ** (halvings / total)

        def watch(record: dict[str, Any]) -> None:
            taken = record["step"] + 1
            if taken < total and (taken & (taken - 1) == 0 or taken % max(1, total // 8) == 0):
                _look(rule, train, curve, taken * batch_size, budget.seed)
            for part in rule.modules() if halvings else ():
                if isinstance(part, TreeRule):
                    part.anneal(factor)

        _look(rule, train, curve, 0, budget.seed)
        given = {"learning_rate": learning_rate, "batch_size": batch_size, "validation": train, "callback": watch}
        gradient(train, cost, steps=steps, **given, **options)(rule, budget)
        _look(rule, train, curve, total * batch_size, budget.seed)
        return curve

    return fit


def _look(rule: Any, train: ClosedLoop, curve: Curve, rollouts: int, seed: int) -> None:
    curve.rollouts.append(rollouts)
    curve.costs.append(evaluate(rule, train, cost, samples=WATCHED, seed=seed).mean)


def tables(result: Result) -> dict[str, str]:
    """Time of a decision that is alone in its batch, and the cost against the number of training rollouts."""
    shown = {"one decision at a time, as a controller makes them": alone(result, "cost")}
    curves = _curves(result)
    return shown | ({_TITLE: _efficiency(curves)} if curves else {})


def alone(result: Result, measure: str) -> str:
    """A table of the milliseconds that a decision takes which is alone in its batch."""
    objective, rows = result.study.measures[measure], []
    for name, rule in result.rules.items():
        found = [evaluate(rule, result.study.test, objective, samples=1, seed=k) for k in range(3)]
        rows.append([name, f"{1e3 * sorted(f.seconds_per_decision for f in found)[1]:.3f}"])
    return format_table(["rule", "ms"], rows)


def _efficiency(curves: dict[str, Curve]) -> str:
    counts = (0, 10, 100, 1000, 10000, 100000)
    shown = [c for c in counts if any(c <= curve.rollouts[-1] for curve in curves.values())]
    rows = [
        [name, *(_at(curve, c) for c in shown), f"{curve.costs[-1]:.4g}", str(curve.rollouts[-1]), str(curve.arrival)]
        for name, curve in curves.items()
    ]
    header = ["rule", *(f"{c}" for c in shown), "last", "rollouts", f"within {CLOSE:.0%}"]
    return format_table(header, rows)


def _at(curve: Curve, rollouts: int) -> str:
    """The cost at the last look with at most so many rollouts; nothing beyond the end."""
    known = [value for count, value in zip(curve.rollouts, curve.costs) if count <= rollouts]
    return f"{known[-1]:.4g}" if rollouts <= curve.rollouts[-1] else ""


def figures(result: Result, lines: Sequence[tuple[float, str]] = ()) -> dict[str, Any]:
    """Costs of the rules on the plant and the departed one, and data efficiency; `lines` are (cost, label)."""
    axes = new_axes()
    for measure in result.records[0].measures:
        plot_records(result.records, measure, ax=axes)
    for value, label in lines:
        axes.axvline(value, color="0.5", linestyle="--", label=label)
    axes.legend([*result.records[0].measures, *(label for _, label in lines)], fontsize=8)
    axes.set_xlabel("cost")
    drawn = {"costs": axes, "parameters": plot_parameters(result, "cost")}
    if _curves(result):
        drawn["efficiency"] = _plot_efficiency(result, lines)
    return drawn


def plot_parameters(result: Result, measure: str) -> Any:
    """A measure against the number of trained parameters, the axis of Fig. 4 of the paper."""
    ax = new_axes()
    for record in result.records:
        estimate, count = record.measure(measure), sum(record.parameters.values())
        ax.errorbar(max(count, 0.5), estimate.mean, estimate.standard_error, fmt="o", capsize=3, label=record.name)
    ax.set(xscale="log", xlabel="trained parameters (0 drawn at 0.5)", ylabel=measure)
    ax.legend(fontsize=8)
    return ax


def _plot_efficiency(result: Result, lines: Sequence[tuple[float, str]]) -> Any:
    ax = new_axes()
    for name, curve in _curves(result).items():
        ax.plot([max(1, count) for count in curve.rollouts], curve.costs, ".-", label=name)
    for value, label in lines:
        ax.axhline(value, color="0.5", linestyle="--", label=label)
    ax.set(xscale="log", yscale="log", xlabel="training rollouts (0 drawn at 1)", ylabel="cost")
    ax.legend(fontsize=8)
    return ax


def _curves(result: Result) -> dict[str, Curve]:
    return {name: trace for name, trace in result.traces.items() if isinstance(trace, Curve)}
