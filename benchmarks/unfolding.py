"""Inference time of unfolded layers and of solvers with the same error: python -m benchmarks.unfolding [--plot DIR].

Sparse recovery as in `lista-benchmark`, by default 100 measurements of 200 unknowns. The network is ALISTA, trained
layer by layer. ISTA and FISTA stop at the first iteration at which their error on training data has come down to the
network's, at the rho of a grid that gets there first; at the same rho they and the convex layer also run to
convergence. Times are CPU time on one thread; passes of all rules take turns.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import convexlearn as cl
from convexlearn.objectives import squared_error
from convexlearn.problems import lista_benchmark as lista
from convexlearn.problems.catalogue import Budget
from convexlearn.randomness import make_generator
from convexlearn.report import format_table, new_axes, save
from convexlearn.simulate.pairs import Pairs

RHO_GRID = np.geomspace(3e-3, 0.3, 15)
LONGEST = 3000
"""Iterations within which ISTA and FISTA look for the network's error."""


@dataclass
class Row:
    """A rule, its number of iterations, its error ratio in dB, and CPU seconds per decision of each pass by batch."""

    rule: Callable[[Tensor], Tensor]
    iterations: str
    decibels: float
    times: dict[int, list[float]] = field(default_factory=dict)

    def milliseconds(self, batch: int) -> float:
        """Median of the passes."""
        return 1e3 * statistics.median(self.times[batch])


def arrival(iteration: Any, rho: float, data: Any, goal: float, most: int) -> int | None:
    """The number of iterations, fewer than `most`, after which the squared error has come down to `goal`."""
    instance = iteration.bind(data.x, values={"rho": torch.tensor(rho, dtype=torch.float64)})
    layer, state = iteration.layer(instance), iteration.start(instance)
    for count in range(1, most):
        state = layer(state)
        if (iteration.decision(state) - data.s).square().sum(1).mean() <= goal:
            return count
    return None


def fastest(iteration: Any, data: Any, goal: float) -> tuple[float, int]:
    """The rho of the grid at which the squared error comes down to `goal` first, and the number of iterations."""
    best, count = math.nan, LONGEST
    for rho in RHO_GRID:
        found = arrival(iteration, float(rho), data, goal, count)
        if found is not None:
            best, count = float(rho), found
    if math.isnan(best):
        raise SystemExit(f"{iteration} needs more than {LONGEST} iterations; train a network of fewer --layers")
    return best, count


def rows(setting: lista.Setting, steps: int, test: Any) -> dict[str, Row]:
    """All rules with their errors on the test data."""
    A = lista.matrix(0, setting)
    simulator = lista.Sparse(A, setting.density)
    tuning = double(simulator.draw(256, make_generator(0, "grid")))
    problem, parts = lista.declare(A)
    network = lista.alista(cl.ISTA(parts), A, setting.layers).float()
    numbers = {"step": 5e-3, "threshold": 5e-3}
    lista.layer_by_layer(simulator, 1, steps, 5 * steps, numbers)(network, Budget())
    network, power, found = network.double(), test.s.square().sum(1).mean().item(), {}

    def add(name: str, rule: Any, iterations: str) -> None:
        error = cl.evaluate(rule, test, squared_error).mean
        found[name] = Row(rule, iterations, 10 * math.log10(error / power))

    add(f"ALISTA, K = {setting.layers}", network, str(setting.layers))
    goal = cl.evaluate(network, tuning, squared_error).mean
    rho = math.nan
    for kind in (cl.ISTA, cl.FISTA):
        rho, count = fastest(kind(parts), tuning, goal)
        short = cl.Unfolded(kind(parts), count, learn=["rho"])
        whole = cl.Converged(kind(parts), tol=1e-6, learn=["rho"])
        for rule in (short, whole):
            rule.assign("rho", rho)
        with torch.no_grad():
            most = int(whole.solve(test.x).iterations.max())
        add(f"{kind.__name__} to this error", short, str(count))
        add(f"{kind.__name__} converged", whole, f"up to {most}")
    layer = cl.ConvexRule(problem, context=[problem.param_dict["x"]], decision=problem.variables()[0])
    layer.rho = rho
    add("convex layer", layer, "")
    return found


def double(pairs: tuple[Tensor, Tensor]) -> Any:
    """Pairs in float64."""
    return Pairs(*(part.double() for part in pairs))


def clock(found: dict[str, Row], x: Tensor, batch: int, repetitions: int) -> None:
    """Time all rules in turns on batches of contexts x."""
    for repetition in range(repetitions + 1):
        first = repetition * batch % (len(x) - batch + 1)
        for row in found.values():
            start = time.process_time()
            with torch.no_grad():
                row.rule(x[first : first + batch])
            if repetition:  # the first pass warms up
                row.times.setdefault(batch, []).append((time.process_time() - start) / batch)


def table(found: dict[str, Row], batches: Sequence[int]) -> str:
    """Error, iterations, and for each batch size milliseconds per decision and their ratio to the network's."""
    network = next(iter(found.values()))
    header = ["rule", "ratio in dB", "iterations"]
    header += [text for b in batches for text in (f"ms, batch {b}", "times")]
    lines = []
    for name, row in found.items():
        cells = [name, f"{row.decibels:.1f}", row.iterations]
        for batch in batches:
            cells += [f"{row.milliseconds(batch):.4f}", f"{row.milliseconds(batch) / network.milliseconds(batch):.1f}"]
        lines.append(cells)
    return format_table(header, lines)


def plot(found: dict[str, Row], batches: Sequence[int]) -> Any:
    """Error against milliseconds per decision, one panel for each batch size; returns the first Axes."""
    grid = new_axes(1, len(batches), (4.5 * len(batches), 3.6))
    panels = list(grid.flat) if len(batches) > 1 else [grid]
    for ax, batch in zip(panels, batches):
        for name, row in found.items():
            ax.plot(row.milliseconds(batch), row.decibels, "o", label=name)
        ax.set(xscale="log", xlabel="CPU ms per decision", ylabel="error ratio in dB", title=f"batch {batch}")
        ax.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    return panels[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unfolding", description=__doc__)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--unknowns", type=int, default=200, help="twice the number of measurements")
    parser.add_argument(
        "--steps", type=int, default=150, help="training steps for each layer; all together take 5 times"
    )
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 256])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--plot", type=Path, metavar="DIR", help="save the picture unfolding.png there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    setting = lista.Setting(options.unknowns // 2, options.unknowns, layers=options.layers)
    test = double(lista.Sparse(lista.matrix(0, setting), setting.density).draw(256, make_generator(0, "test")))
    found = rows(setting, options.steps, test)
    for batch in options.batch:
        clock(found, test.x, min(batch, len(test)), options.repetitions)
    print(table(found, options.batch))
    if options.plot is not None:
        options.plot.mkdir(parents=True, exist_ok=True)
        save(plot(found, options.batch), options.plot / "unfolding.png")


if __name__ == "__main__":
    main()
