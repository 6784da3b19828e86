"""How the cost grows: log-log slopes over batch and horizon, and peak memory of a large batch."""

import statistics
import subprocess
import sys
import time

import numpy as np
import torch

from benchmarks import peers
from benchmarks.workloads import WORKLOADS, Workload, box_mpc

BATCHES = (128, 256, 512, 1024)
HORIZONS = (10, 20, 40, 80)
MEMORY_PROGRAM = """
import resource, torch
from benchmarks import peers
from benchmarks.workloads import WORKLOADS
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
import convexlearn.layer
before = peak()
workload = WORKLOADS["W1"]
layer = peers.convexlearn(workload)
values = workload.values(1024)
workload.run(layer, values).square().sum().backward()
print(peak() - before)
"""


def seconds(workload: Workload, batch: int, repetitions: int = 7) -> float:
    """Median seconds of forward plus backward of this package."""
    layer, values = peers.convexlearn(workload), workload.values(batch)
    times = []
    for repetition in range(repetitions + 1):
        start = time.perf_counter()
        torch.autograd.grad(workload.run(layer, values).square().sum(), values)
        if repetition:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def slope(sizes: tuple[int, ...], times: list[float]) -> float:
    """Least-squares slope of log(times) over log(sizes)."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def slopes_report() -> str:
    """Slopes over the batch (W1) and over the horizon (n=4, m=2, batch 32)."""
    batch = [seconds(WORKLOADS["W1"], b) for b in BATCHES]
    horizon = [seconds(box_mpc("W1", 4, 2, t, (32,)), 32) for t in HORIZONS]
    lines = []
    for title, sizes, times in (("batch", BATCHES, batch), ("horizon", HORIZONS, horizon)):
        shown = "  ".join(f"{s}: {1e3 * t:.1f} ms" for s, t in zip(sizes, times))
        lines.append(f"{title:<8} slope {slope(sizes, times):.2f}   {shown}")
    return "\n".join(lines)


def memory_report() -> str:
    """Peak memory of W1 at batch 1024 above the imported process, measured in a process of its own."""
    run = subprocess.run([sys.executable, "-c", MEMORY_PROGRAM], capture_output=True, text=True, check=True)
    return f"W1, batch 1024: {float(run.stdout):.0f} MB above the imported process"
