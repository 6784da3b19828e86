"""What a layer costs beside its solver: one step of W5, forward and backward, against an empty autograd.Function."""

import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads import WORKLOADS
from convexlearn import ConvexLayer

STEPS = 2000


class Trivial(torch.autograd.Function):
    """Keeps its inputs and returns the right shapes."""

    @staticmethod
    def forward(ctx: Any, S: Tensor, x: Tensor) -> Tensor:
        """A copy of x."""
        ctx.save_for_backward(S, x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros, and the gradient itself."""
        S, _ = ctx.saved_tensors
        return torch.zeros_like(S), g.clone()


class _Timed:
    """A solver that sums up the seconds spent in it."""

    def __init__(self, solver: Any) -> None:
        self._solver, self.seconds = solver, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._solver, name)

    def _call(self, function: Callable, arguments: tuple) -> Any:
        start = perf_counter()
        result = function(*arguments)
        self.seconds += perf_counter() - start
        return result

    def solve(self, *arguments: Any) -> Any:
        """The solver's solve."""
        return self._call(self._solver.solve, arguments)

    def adjoint(self, *arguments: Any) -> Any:
        """The solver's adjoint."""
        return self._call(self._solver.adjoint, arguments)


def overhead_report() -> str:
    """One line: microseconds of the layer, of the solver in it, of the empty function, and what is left; medians."""
    workload = WORKLOADS["W5"]
    declared = workload.declare()
    S, x = workload.values(1)
    layers = [ConvexLayer(declared.problem, declared.parameters, declared.variables) for _ in range(2)]
    timed = _Timed(layers[1].solver)
    layers[1]._solver = timed  # type: ignore[assignment]
    plain, within, empty = [], [], []
    for _ in range(STEPS):
        plain.append(_step(lambda: layers[0](S, x)[0], (S, x)))
        timed.seconds = 0.0
        _step(lambda: layers[1](S, x)[0], (S, x))
        within.append(timed.seconds)
        empty.append(_step(lambda: Trivial.apply(S, x), (S, x)))
    step, solver, trivial = (1e6 * statistics.median(v) for v in (plain, within, empty))
    left = step - solver - trivial
    return f"W5 step {step:.0f} us = solver {solver:.0f} + empty autograd.Function {trivial:.0f} + overhead {left:.0f}"


def _step(function: Callable[[], Tensor], leaves: tuple[Tensor, Tensor]) -> float:
    start = perf_counter()
    y = function()
    torch.autograd.grad(y, leaves, torch.ones_like(y))
    return perf_counter() - start
