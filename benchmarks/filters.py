"""Kalman filters side by side, ours and torch-kf, in turns; with --lorenz the rows of Table 1.

python -m benchmarks.filters [--lorenz [FILE]]; torch-kf and filterpy come with the extra `tracking`. FILE is what
`convexlearn tune lorenz-tracking --save FILE` wrote; without it the learned rules are fitted first.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.lorenz_filters import particle, unscented
from convexlearn import KalmanFilter
from convexlearn.problems import find, lorenz_tracking, tracking
from convexlearn.problems.catalogue import Result
from convexlearn.report import Estimate, format_table
from convexlearn.simulate.plants import random_linear

BATCH, STEPS, STATES, SEEN = 1000, 100, 4, 2
ROUNDS = 15


def model(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A, C, V, W, covariance before the first observation, and observations `(B, T, 2)`."""
    A = 0.95 * random_linear(0, STATES, SEEN)[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, STEPS, SEEN, generator=generator, dtype=torch.float64)
    C, V, W = torch.eye(SEEN, STATES), 0.25 * torch.eye(STATES), torch.eye(SEEN)
    return tuple(M.to(dtype) for M in (A, C, V, W, torch.eye(STATES), x))


def peers(dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Functions that return filtered means `(B, T, 4)`; torch-kf's covariances one per sequence, or shared."""
    import torch_kf

    A, C, V, W, P, x = model(dtype)
    ours = KalmanFilter(A, None, C, V, W).freeze()
    other = torch_kf.KalmanFilter(A, C, V, W)
    columns = x.transpose(0, 1)[..., None].contiguous()  # (T, B, 2, 1), as it wants them

    def theirs(covariance: Tensor) -> Tensor:
        start = torch_kf.GaussianState(x.new_zeros(BATCH, STATES, 1), covariance)
        return other.filter(start, columns, return_all=True).mean[..., 0].transpose(0, 1)

    return {
        "convexlearn": lambda: ours(x, covariance=P),
        "torch-kf": lambda: theirs(P.expand(BATCH, STATES, STATES).contiguous()),
        "torch-kf, shared covariance": lambda: theirs(P[None]),
    }


def speed() -> str:
    """Microseconds of one step of the whole batch: medians of rounds in turn, and the largest difference of means."""
    rows = []
    for dtype in (torch.float32, torch.float64):
        functions, seconds = peers(dtype), {}
        with torch.no_grad():
            means = {name: function() for name, function in functions.items()}
            for _ in range(ROUNDS):
                for name, function in functions.items():
                    start = perf_counter()
                    function()
                    seconds.setdefault(name, []).append(perf_counter() - start)
        for name, times in seconds.items():
            ratio = statistics.median(b / a for a, b in zip(seconds["convexlearn"], times))
            gap = float((means[name] - means["convexlearn"]).abs().max())
            micro = 1e6 * statistics.median(times) / STEPS
            rows.append([name, str(dtype).removeprefix("torch."), f"{micro:.1f}", f"{ratio:.2f}", f"{gap:.1e}"])
    return format_table(["filter", "dtype", "us per step of 1000", "ratio", "difference"], rows, 2)


def table_one(file: Path | None) -> str:
    """The rules of the catalogue on ten trajectories of 3000 steps, with UKF and particle filter beside."""
    entry, options = find("lorenz-tracking"), {"trajectories": 10, "length": 3000}
    state = None if file is None else torch.load(file, weights_only=True)
    result = entry.tune(0, **options) if state is None else entry.evaluate(0, state, **options)
    rows = [[r.name, r.measure("mse"), steps_of(result) * (r.seconds_per_decision or 0.0)] for r in result.records]
    (x, before), z = (tuple(M.numpy() for M in result.study.test.x), result.study.test.s.numpy())
    others: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"UKF": unscented, "PF": particle}
    for name, function in others.items():
        start = perf_counter()
        errors = np.array([np.square(function(*one) - truth).mean() for *one, truth in zip(x, before, z)])
        spent = (perf_counter() - start) / len(x)
        rows.append([name, Estimate(errors.mean(), errors.std(ddof=1) / math.sqrt(len(x))), spent])
    cells = []
    for name, error, spent in rows:
        found, known = tracking.decibels(error), lorenz_tracking.PUBLISHED.get(name)
        cells.append([name, f"{found.mean:.2f} ± {found.standard_error:.2f}", f"{known or ''}", f"{spent:.3g}"])
    return format_table(["rule", "mse [dB]", "published [dB]", "seconds per trajectory"], cells, 2)


def steps_of(result: Result) -> int:
    """Steps of a test trajectory."""
    return result.study.test.s.shape[1]


def main(argv: Any = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.filters", description=__doc__)
    parser.add_argument("--lorenz", nargs="?", const="", metavar="FILE", help="the rows of Table 1")
    arguments = parser.parse_args(argv)
    print(speed())
    if arguments.lorenz is not None:
        print(table_one(Path(arguments.lorenz) if arguments.lorenz else None))


if __name__ == "__main__":
    main()
