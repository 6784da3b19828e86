"""Published tuning runs, step by step: plain gradient descent on the authors' random numbers."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convexlearn.problems.catalogue import Budget
from convexlearn.simulate.base import Trajectory

TEST_SEED = 0


@dataclass(frozen=True)
class Run:
    """A published run: learning rate by step, batch sizes of training and test, bound on the gradient's norm.

    `clip` None for no bound. Step k of training draws with seed k + 1, the test with TEST_SEED, always.
    Source: the notebooks to Agrawal, Barratt, Boyd, Stellato, Learning convex optimization control policies.
    """

    steps: int
    learning_rate: float
    batch_size: int
    test_size: int
    clip: float | None = None


def descend(
    simulator: Any, objective: Callable[[Trajectory], Tensor], run: Run
) -> Callable[[nn.Module, Budget], list[dict[str, float]]]:
    """Fit by the published run; the trace holds "step" and the "test loss" before each step and after the last.

    The simulator draws from `torch.Generator().manual_seed(seed)` in the order of the published code.
    """

    def loss(rule: nn.Module, count: int, seed: int) -> Tensor:
        return objective(simulator(rule, count, torch.Generator().manual_seed(seed))).mean()

    def fit(rule: nn.Module, budget: Budget) -> list[dict[str, float]]:
        trained = [p for p in rule.parameters() if p.requires_grad]
        optimizer, trace = torch.optim.SGD(trained, lr=run.learning_rate), []
        for step in range(budget.limit(run.steps) + 1):
            with torch.no_grad():
                trace.append({"step": step, "test loss": loss(rule, run.test_size, TEST_SEED).item()})
            if step < budget.limit(run.steps):
                optimizer.zero_grad()
                loss(rule, run.batch_size, step + 1).backward()
                if run.clip is not None:
                    nn.utils.clip_grad_norm_(trained, run.clip)
                optimizer.step()
        return trace

    return fit


def departures(trace: Iterable[dict[str, float]], figures: dict[int, float], tolerance: float) -> list[str]:
    """Sentences on the steps whose test loss differs from the published figure by more than `tolerance`."""
    losses = {int(record["step"]): record["test loss"] for record in trace}
    return [
        f"published run: test loss {losses[step]:.5f} before step {step}, published {figure}"
        for step, figure in figures.items()
        if step in losses and abs(losses[step] - figure) > tolerance
    ]
