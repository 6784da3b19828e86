"""Time one whole tuning run: python -m benchmarks.tuning [--iterations N] [--layers NAME ...].

Box LQR with an ADP policy as in Agrawal, Barratt, Boyd, Stellato (2020): batch 6, horizon 100, gradient descent
through the rollout. All layers run the same loop, so that the times differ by the layer alone; they take turns
block by block, so that a slow moment of the machine strikes all of them. A layer that is SLOW times slower than the
fastest cvxpylayers back end in a first iteration is not run to the end: its total is extrapolated and marked "~".
With --tune, the same policy is also tuned by `cl.tune` on a `ClosedLoop`, as a user of this package would.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from scipy.linalg import solve_discrete_are, sqrtm
from torch import Tensor

import convexlearn as cl
from benchmarks import peers
from benchmarks.workloads import Declared, Layer, Workload, one_call

STATES, INPUTS, LIMIT, HORIZON, BATCH = 8, 2, 0.1, 100, 6
BLOCK = 5  # iterations of one layer before the next one's turn
SLOW = 3.0
OURS = "convexlearn"


def plant() -> tuple[np.ndarray, np.ndarray]:
    """A `(8, 8)` of spectral radius 1 and B `(8, 2)`, as published."""
    rng = np.random.RandomState(1)
    A = rng.randn(STATES, STATES)
    return A / np.abs(np.linalg.eigvals(A)).max(), rng.randn(STATES, INPUTS)


def declare() -> Declared:
    """min |u|^2 + |S y|^2 + q'y, y = A x + B u, |u| <= 0.1."""
    A, B = plant()
    x, S, q = cp.Parameter(STATES, name="x"), cp.Parameter((STATES, STATES), name="S"), cp.Parameter(STATES, name="q")
    u, y = cp.Variable(INPUTS), cp.Variable(STATES)
    cost = cp.sum_squares(u) + cp.sum_squares(S @ y) + q @ y
    return Declared(cp.Problem(cp.Minimize(cost), [y == A @ x + B @ u, cp.abs(u) <= LIMIT]), [S, q, x], [u])


WORKLOAD = Workload("box-lqr", "tuning box LQR", declare, lambda batch: [], (BATCH,), one_call)


@dataclass
class Run:
    """A tuning run in progress: the layer, its parameters, seconds of each block. Published test loss: 13.014."""

    layer: Layer
    S: Tensor
    q: Tensor
    seconds: list[float] = field(default_factory=list)
    done: int = 0

    def rollout(self, seed: int) -> Tensor:
        """Mean cost of a batch of rollouts with the random numbers of `seed`."""
        A, B = (torch.tensor(M).T for M in plant())
        generator = torch.Generator().manual_seed(seed)
        normal = 0.5 * torch.randn(HORIZON + 1, BATCH, STATES, generator=generator, dtype=torch.float64)
        x, states, inputs = normal[0], [], []
        for w in normal[1:]:
            (u,) = self.layer(self.S, self.q, x)
            states.append(x)
            inputs.append(u)
            x = torch.addmm(torch.addmm(w, x, A), u, B)
        total = torch.stack(states).square().sum() + torch.stack(inputs).square().sum()
        return total / (HORIZON * BATCH)

    def advance(self, count: int) -> None:
        """`count` gradient steps, timed."""
        start = time.perf_counter()
        for k in range(self.done, self.done + count):
            gradients = torch.autograd.grad(self.rollout(k + 1), [self.S, self.q])
            rate = 0.1 if k < 51 else 0.01
            with torch.no_grad():
                for parameter, gradient in zip((self.S, self.q), gradients):
                    parameter -= rate * gradient
        self.done += count
        self.seconds.append(time.perf_counter() - start)

    def loss(self) -> float:
        """Test loss: that of seed 0."""
        with torch.no_grad():
            return self.rollout(0).item()


@dataclass
class Pipeline:
    """The same policy, plant and steps by `cl.tune` on a `ClosedLoop`; a Run to `main`."""

    rule: Any
    loop: Any
    seconds: list[float] = field(default_factory=list)
    done: int = 0

    @classmethod
    def start(cls) -> "Pipeline":
        """At its start values, warmed up."""
        A, B = plant()
        S = np.real(sqrtm(solve_discrete_are(A, B, np.eye(STATES), np.eye(INPUTS))))
        V = torch.eye(STATES, dtype=torch.float64) / 4
        true = cl.simulate.plants.LinearGaussian(torch.tensor(A), torch.tensor(B), V=V, start=V, limit=LIMIT)
        loop = cl.simulate.ClosedLoop(true, HORIZON, initial=true.initial, noise=true.noise, stage_cost=true.stage_cost)
        run = cls(cl.adp(A, B, np.eye(INPUTS), S, limit=LIMIT), loop)
        loop(run.rule, BATCH).cost.sum().backward()
        run.rule.zero_grad()
        return run

    def advance(self, count: int) -> None:
        """`count` gradient steps, timed."""
        start, rate = time.perf_counter(), 0.1 if self.done < 51 else 0.01
        cl.tune(
            self.rule, self.loop, cl.objectives.cost, steps=count, learning_rate=rate, batch_size=BATCH,
            optimizer=torch.optim.SGD, clip=None, seed=self.done, progress=False,
        )  # fmt: skip
        self.done += count
        self.seconds.append(time.perf_counter() - start)

    def loss(self) -> float:
        """Test loss: that of seed 0 of the package's own generators."""
        with torch.no_grad():
            return self.loop(self.rule, BATCH, torch.Generator().manual_seed(0)).cost.mean().item()


def start(name: str) -> Run | None:
    """A run at its start values, warmed up by one rollout; None where the package is missing."""
    layer = peers.PEERS[name](WORKLOAD)
    if layer is None:
        return None
    A, B = plant()
    P = solve_discrete_are(A, B, np.eye(STATES), np.eye(INPUTS))
    S = torch.tensor(np.real(sqrtm(P))).requires_grad_()
    run = Run(layer, S, torch.zeros(STATES, dtype=torch.float64, requires_grad=True))
    run.rollout(0).backward()
    return run


def race(runs: dict[str, Any], iterations: int) -> str:
    """Run all in turns, the slow ones for one iteration only; the name of the fastest cvxpylayers back end, or ""."""
    for run in runs.values():
        run.advance(1)
    known = [name for name in runs if name in peers.CVXPYLAYERS]
    fastest = min((runs[name].seconds[0] for name in known), default=float("inf"))
    kept = [run for run in runs.values() if run.seconds[0] <= SLOW * fastest]
    for first in range(1, iterations, BLOCK):
        for run in kept:
            run.advance(min(BLOCK, iterations - first))
    return min(known, key=lambda name: sum(runs[name].seconds) / runs[name].done, default="")


def ratios(run: Any, other: Any) -> tuple[float, float, float]:
    """Other's time over this run's, block by block: median, least, largest."""
    pairs = sorted(theirs / ours for ours, theirs in zip(run.seconds, other.seconds))
    return statistics.median(pairs), pairs[0], pairs[-1]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description=__doc__)
    names = (OURS, *peers.CVXPYLAYERS)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--layers", nargs="*", choices=names, default=names)
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    runs: dict[str, Any] = {name: run for name in options.layers if (run := start(name)) is not None}
    if options.tune:
        runs["cl.tune"] = Pipeline.start()
    fastest = race(runs, options.iterations)
    print(f"{options.iterations} iterations of {BATCH} rollouts of {HORIZON} steps; ratios to {fastest or 'nothing'}")
    print(f"{'layer':<16}{'seconds':>10}{'ms/iteration':>14}{'ratio':>8}{'block by block':>22}{'test loss':>12}")
    for name, run in runs.items():
        whole = run.done == options.iterations
        each = sum(run.seconds) / run.done
        total = f"{'' if whole else '~'}{each * options.iterations:.2f}"
        ratio = between = ""
        if fastest:
            middle, least, most = ratios(run, runs[fastest])
            ratio = f"{sum(runs[fastest].seconds) / runs[fastest].done / each:.1f}"
            between = f"{middle:.1f} ({least:.1f} to {most:.1f})"
        loss = f"{run.loss():.4f}" if whole else ""
        print(f"{name:<16}{total:>10}{1e3 * each:>14.1f}{ratio:>8}{between:>22}{loss:>12}")


if __name__ == "__main__":
    main()
