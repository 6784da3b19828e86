"""Ways to fit a contender: gradient descent through the simulation, or a grid searched by evaluation."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convexlearn.evaluate import evaluate
from convexlearn.objectives import Objective
from convexlearn.problems.catalogue import Budget, Result
from convexlearn.report import new_axes, plot_history
from convexlearn.tune import History, tune


@dataclass(frozen=True, eq=False)
class Choice:
    """Outcome of several fits: the name and the history of the chosen one."""

    chosen: str
    history: History

    @property
    def stopped(self) -> str:
        """Why the chosen fit ended early, or nothing."""
        return self.history.stopped


@dataclass(frozen=True, eq=False)
class Grid:
    """Outcome of a grid search: `means` and `standard_errors` of the objective at `values`, all `(k,)`."""

    values: np.ndarray
    means: np.ndarray
    standard_errors: np.ndarray

    @property
    def best(self) -> float:
        """The value with the least mean."""
        return float(self.values[self.means.argmin()])


def gradient(
    train: Any, objective: Objective, *, steps: int, learning_rate: float | Mapping[str, float], **options: Any
) -> Callable[[Any, Budget], History]:
    """Fit by `tune`, learning rates falling to zero along half a cosine; `options` as there."""

    def fit(rule: Any, budget: Budget) -> History:
        total = budget.limit(steps)

        def falling(rate: float) -> Callable[[int], float]:
            return lambda step: rate * 0.5 * (1 + np.cos(np.pi * min(1.0, step / total)))

        rates: Any
        if isinstance(learning_rate, Mapping):
            rates = {name: falling(rate) for name, rate in learning_rate.items()}
        else:
            rates = falling(learning_rate)
        given = {"steps": total, "learning_rate": rates, "seed": budget.seed, "progress": budget.progress}
        return tune(rule, train, objective, **given, **options)

    return fit


def best_of(fits: Mapping[str, Callable[[Any, Budget], History]]) -> Callable[[Any, Budget], Choice]:
    """Fit from the same start by each of `fits`; the rule keeps the weights with the least validation error."""

    def fit(rule: Any, budget: Budget) -> Choice:
        start, found = copy.deepcopy(rule.state_dict()), []
        for name, one in fits.items():
            rule.load_state_dict(start)
            history = one(rule, budget)
            error = history.best["value"] if history.best else float("inf")
            found.append((error, copy.deepcopy(rule.state_dict()), Choice(name, history)))
            if history.stopped.startswith("interrupted"):
                return found[-1][2]
        _, weights, choice = min(found, key=lambda entry: entry[0])
        rule.load_state_dict(weights)
        return choice

    return fit


def histories(result: Result, published: Sequence[str] = ()) -> dict[str, Any]:
    """Axes "history", the losses of the rules that were tuned, and "published", these columns of a published run."""
    axes = {}
    if "published" in result.traces and published:
        axes["published"] = plot_history(result.traces["published"], published)
    tuned = {name: trace for name, trace in result.traces.items() if isinstance(trace, History)}
    if tuned:
        axes["history"] = ax = new_axes()
        for name, history in tuned.items():
            plot_history(history, ["loss"], ax, name)
    return axes


def grid(
    simulator: Any, objective: Objective, get: Callable[[Any], Any], name: str, values: np.ndarray
) -> Callable[[Any, Budget], Grid]:
    """Fit parameter `name` of the module `get(rule)` by evaluation at each of `values`.

    On the test simulator this is the oracle: no rule that may not see the test data chooses better among
    `values`. A budget of fewer steps than values leaves values out, evenly.
    """

    def fit(rule: Any, budget: Budget) -> Grid:
        count = min(len(values), budget.limit(len(values)))
        tried = values[np.linspace(0, len(values) - 1, count).round().astype(int)]
        means, errors = np.empty(count), np.empty(count)
        for k, value in enumerate(tried):
            setattr(get(rule), name, float(value))
            outcome = evaluate(rule, simulator, objective, seed=budget.seed)
            means[k], errors[k] = outcome.mean, outcome.standard_error
        found = Grid(tried, means, errors)
        setattr(get(rule), name, found.best)
        return found

    return fit
