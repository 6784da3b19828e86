"""Time unfolded layers against converged solvers: python -m benchmarks.unfolding [--layers K] [--plot DIR].

Sparse recovery of `admm-recovery` (24 measurements, 48 unknowns, noise 0.05). The lasso's rho is tuned on training
data, the network (ISTA with freed matrices, Eq. 22) is trained on the same; all are judged on the same 1024 test
samples. Both converged methods are also shown stopped as soon as their mean error stays within 1 % of the converged
one. Passes of all rules take turns, so that a slow moment of the machine strikes all of them.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

import convexlearn as cl
from convexlearn.objectives import squared_error
from convexlearn.problems import admm_recovery
from convexlearn.problems.catalogue import Budget
from convexlearn.problems.fitting import gradient
from convexlearn.report import Estimate, format_table, new_axes, save
from convexlearn.simulate.pairs import Pairs

RHO_GRID = np.geomspace(0.02, 0.3, 25)
CLOSE = 0.01
"""A stopped method has arrived once its error stays within this fraction of the converged one."""

LONGEST = 2000
"""Iterations among which the stopped methods look for theirs."""


@dataclass
class Row:
    """A rule with its number of iterations, its error, and milliseconds per decision by batch size."""

    rule: Callable[[Tensor], Tensor]
    iterations: str
    error: Estimate
    times: dict[int, list[float]] = field(default_factory=dict)

    def milliseconds(self, batch: int) -> float:
        """Median of the passes."""
        return 1e3 * statistics.median(self.times[batch])


def lasso(H: Tensor, rho: float) -> cl.ConvexRule:
    """minimize 1/2 |x - H s|^2 + rho |s|_1."""
    x, s = cp.Parameter(H.shape[0], name="x"), cp.Variable(H.shape[1], name="s")
    weight = cp.Parameter(nonneg=True, name="rho", value=rho)
    fit = 0.5 * cp.sum_squares(x - cp.Constant(H.numpy(), name="H") @ s)
    return cl.ConvexRule(cp.Problem(cp.Minimize(fit + weight * cp.norm1(s))), context=[x], decision=s, learn=[])


def tuned_rho(H: Tensor, train: Pairs) -> float:
    """The value of the grid with the least error on the training data."""
    errors = [cl.evaluate(lasso(H, rho), train, squared_error).mean for rho in RHO_GRID]
    return float(RHO_GRID[int(np.argmin(errors))])


def trained(parts: Any, layers: int, steps: int, data: dict[str, Pairs]) -> cl.Unfolded:
    """LISTA with matrices and thresholds of its own in each layer."""
    net = cl.Unfolded(cl.ISTA(parts).free("W1", "W2"), layers, untie=["W1", "W2", "threshold"])
    rates = {"W1": 2e-3, "W2": 2e-3, "threshold": 2e-2}
    gradient(
        data["train"], squared_error, steps=steps, learning_rate=rates, batch_size=128, validation=data["validation"]
    )(net, Budget())
    return net


def stopped(iteration: Any, converged: float, test: Pairs) -> int:
    """The number of iterations after which the error stays within CLOSE of the converged one."""
    with torch.no_grad():
        errors = (cl.Unfolded(iteration, LONGEST).iterates(test.x) - test.s).square().sum(-1).mean(1)
    late = (errors > (1 + CLOSE) * converged).nonzero()
    return min(LONGEST, int(late[-1]) + 1)


def rows(layers: int, steps: int) -> dict[str, Row]:
    """All rules with their errors on the test data."""
    setting = admm_recovery.Setting()
    H, data = admm_recovery.draw(0, setting)
    test = data["test"]
    rho = tuned_rho(H, data["train"].subset(torch.arange(1024)))
    layer = lasso(H, rho)
    parts = cl.split(layer)
    found: dict[str, Row] = {}

    def add(name: str, rule: Any, iterations: str) -> float:
        outcome = cl.evaluate(rule, test, squared_error)
        found[name] = Row(rule, iterations, Estimate(outcome.mean, outcome.standard_error))
        return outcome.mean

    add(f"unfolded, K = {layers}", trained(parts, layers, steps, data), str(layers))
    for kind in (cl.ISTA, cl.FISTA):
        name, iteration = kind.__name__, kind(parts)
        rule = cl.Converged(iteration, tol=1e-6, learn=[])
        with torch.no_grad():
            most = int(rule.solve(test.x).iterations.max())
        error = add(f"{name}, converged", rule, f"up to {most}")
        count = stopped(iteration, error, test)
        add(f"{name}, stopped", cl.Unfolded(iteration, count), str(count))
    add("convex layer", layer, "")
    return found


def clock(found: dict[str, Row], x: Tensor, batch: int, repetitions: int) -> None:
    """Time all rules in turns on batches of contexts x."""
    for repetition in range(repetitions + 1):
        first = repetition * batch % (len(x) - batch + 1)
        for row in found.values():
            start = time.perf_counter()
            with torch.no_grad():
                row.rule(x[first : first + batch])
            if repetition:  # the first pass warms up
                row.times.setdefault(batch, []).append((time.perf_counter() - start) / batch)


def table(found: dict[str, Row], batches: Sequence[int]) -> str:
    """Error, iterations, and for each batch size milliseconds per decision and their ratio to the network's."""
    network = next(iter(found.values()))
    header = ["rule", "squared error", "iterations"]
    header += [text for b in batches for text in (f"ms, batch {b}", "ratio")]
    lines = []
    for name, row in found.items():
        cells = [name, row.error.text(), row.iterations]
        for batch in batches:
            cells += [f"{row.milliseconds(batch):.4f}", f"{row.milliseconds(batch) / network.milliseconds(batch):.1f}"]
        lines.append(cells)
    return format_table(header, lines, left=2)


def plot(found: dict[str, Row], batches: Sequence[int]) -> Any:
    """Error against milliseconds per decision, one panel for each batch size; returns the Axes."""
    grid = new_axes(1, len(batches), (4.5 * len(batches), 3.6))
    for ax, batch in zip(grid.flat if len(batches) > 1 else [grid], batches):
        for name, row in found.items():
            ax.errorbar(
                row.milliseconds(batch), row.error.mean, row.error.standard_error, fmt="o", capsize=3, label=name
            )
        ax.set(xscale="log", xlabel="ms per decision", ylabel="squared error", title=f"batch {batch}")
        ax.grid(alpha=0.3)
    first = grid.flat[0] if len(batches) > 1 else grid
    first.legend(fontsize=7)
    return first


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unfolding", description=__doc__)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1500, help="training steps of the network")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 1024])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--plot", type=Path, metavar="DIR", help="save the picture unfolding.png there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = rows(options.layers, options.steps)
    _, data = admm_recovery.draw(0, admm_recovery.Setting())
    for batch in options.batch:
        clock(found, data["test"].x, batch, options.repetitions)
    print(table(found, options.batch))
    if options.plot is not None:
        options.plot.mkdir(parents=True, exist_ok=True)
        save(plot(found, options.batch), options.plot / "unfolding.png")


if __name__ == "__main__":
    main()
