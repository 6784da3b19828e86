"""Time one whole tuning run: python -m benchmarks.tuning [--iterations N] [--layers NAME ...].

Box LQR with an ADP policy as in Agrawal, Barratt, Boyd, Stellato (2020): batch 6, horizon 100, gradient descent
through the rollout. All layers run the same loop, so that the times differ by the layer alone; passes are
interleaved block by block, so that a slow moment of the machine strikes all of them.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import torch
from scipy.linalg import solve_discrete_are, sqrtm
from torch import Tensor

from benchmarks import peers
from benchmarks.workloads import Declared, Layer, Workload, one_call

STATES, INPUTS, LIMIT, HORIZON, BATCH = 8, 2, 0.1, 100, 6
BLOCK = 5  # iterations of one layer before the next one's turn


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
    """A tuning run in progress: the layer, its parameters, seconds so far. Published test loss after it: 13.014."""

    layer: Layer
    S: Tensor
    q: Tensor
    seconds: float = 0.0

    def rollout(self, seed: int) -> Tensor:
        """Mean cost of a batch of rollouts with the random numbers of `seed`."""
        A, B = (torch.tensor(M) for M in plant())
        generator = torch.Generator().manual_seed(seed)
        normal = 0.5 * torch.randn(HORIZON + 1, BATCH, STATES, generator=generator, dtype=torch.float64)
        x, cost = normal[0], torch.zeros((), dtype=torch.float64)
        for w in normal[1:]:
            (u,) = self.layer(self.S, self.q, x)
            cost = cost + (x.square().sum() + u.square().sum()) / (HORIZON * BATCH)
            x = x @ A.T + u @ B.T + w
        return cost

    def advance(self, iterations: range) -> None:
        """Some gradient steps, timed."""
        start = time.perf_counter()
        for k in iterations:
            gradients = torch.autograd.grad(self.rollout(k + 1), [self.S, self.q])
            rate = 0.1 if k < 51 else 0.01
            with torch.no_grad():
                for parameter, gradient in zip((self.S, self.q), gradients):
                    parameter -= rate * gradient
        self.seconds += time.perf_counter() - start


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


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description=__doc__)
    names = ("convexlearn", *peers.CVXPYLAYERS)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--layers", nargs="*", choices=names, default=names)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    runs = {name: run for name in options.layers if (run := start(name)) is not None}
    for first in range(0, options.iterations, BLOCK):
        block = range(first, min(first + BLOCK, options.iterations))
        for run in runs.values():
            run.advance(block)
    theirs = min((run.seconds for name, run in runs.items() if name in peers.CVXPYLAYERS), default=float("nan"))
    print(f"{options.iterations} iterations of {BATCH} rollouts of {HORIZON} steps; ratio to the fastest cvxpylayers")
    print(f"{'layer':<16}{'seconds':>10}{'ms/iteration':>14}{'ratio':>8}{'test loss':>12}")
    for name, run in runs.items():
        each = 1e3 * run.seconds / options.iterations
        with torch.no_grad():
            loss = run.rollout(0).item()
        print(f"{name:<16}{run.seconds:>10.2f}{each:>14.1f}{theirs / run.seconds:>8.1f}{loss:>12.4f}")


if __name__ == "__main__":
    main()
