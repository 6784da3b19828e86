"""Times on the CPU and on a GPU, where torch finds one: `python -m benchmarks.device`."""

import argparse
import copy
import time
from collections.abc import Callable

import cvxpy as cp
import numpy as np
import torch

import convexlearn as cl
from convexlearn.report import format_table


def cases(batch: int) -> list[tuple[str, torch.nn.Module, torch.Tensor]]:
    """Rules with a context of `batch` samples."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    s, x = cp.Variable(100, name="s"), cp.Parameter(50, name="x")
    H, rho = np.random.default_rng(0).normal(size=(50, 100)) / 7, cp.Parameter(nonneg=True, name="rho", value=0.1)
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - H @ s) + rho * cp.norm1(s)))
    split, eye = cl.split(problem, [x], s), torch.eye(4, dtype=torch.float64)
    small, u = cp.Parameter(10, name="x"), cp.Variable(10, name="u")
    box = cp.Problem(cp.Minimize(cp.sum_squares(u - small) + rho * cp.sum(u)), [cp.abs(u) <= 1, cp.sum(u) == 1])
    return [
        ("dense QP, 10 variables", cl.ConvexRule(box, [small], u, solver="dense"), draw(batch, 10)),
        ("unfolded ISTA, 20 layers", cl.Unfolded(cl.ISTA(split), 20, untie=["step", "threshold"]), draw(batch, 50)),
        ("Kalman filter, 100 steps", cl.KalmanFilter(0.9 * eye, None, eye, 0.1 * eye, eye), draw(batch, 100, 4)),
        ("sum-product, 1000 symbols", cl.SumProduct(cl.ChannelFactor(draw(4).abs(), 0.3)), draw(batch, 1000)),
    ]


def seconds(run: Callable[[], object], device: str, repeats: int = 5) -> float:
    """Median of `repeats` runs after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[repeats // 2]


def step(rule: torch.nn.Module, x: torch.Tensor) -> None:
    """Decision and gradient."""
    rule(x).square().sum().backward()


def main() -> None:
    """Print the table; without a GPU, the column of the CPU and a line that says so."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1000)
    batch = parser.parse_args().batch
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = []
    for name, rule, x in cases(batch):
        row = [name]
        for device in devices:
            moved, there = copy.deepcopy(rule).to(device), x.to(device)
            row.append(f"{1e3 * seconds(lambda m=moved, v=there: step(m, v), device):.3g}")
        rows.append(row)
    print(format_table([f"forward and backward, batch {batch}", *(f"{d} ms" for d in devices)], rows, 1))
    name = torch.cuda.get_device_name() if len(devices) > 1 else "no GPU here: torch.cuda.is_available() is False"
    print(f"\n{name}; {torch.get_num_threads()} CPU threads, float64")


if __name__ == "__main__":
    main()
