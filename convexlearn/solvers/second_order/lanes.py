"""Batches of programs with second-order cones in SIMD lanes: the numpy interface of the compiled solver."""

import time
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from convexlearn.parallel import run
from convexlearn.program.program import Program
from convexlearn.program.reduce import Arrays
from convexlearn.solvers.quadratic.layout import Layout
from convexlearn.solvers.second_order import layout

LANES = 8  # samples side by side, and samples of one task: threads start late after a pause
REGULARIZATION = 1e-7
HAND_OVER = 1e-4  # relative residual at which the polish is tried first
POLISH_ROUNDS = 8
ITERATION_LIMIT = 100

_layouts: "weakref.WeakKeyDictionary[Program, Layout]" = weakref.WeakKeyDictionary()


def analyse(program: Program) -> Layout:
    """Symbolic analysis of a program, made once."""
    if program not in _layouts:
        _layouts[program] = layout.arrange(program)
    return _layouts[program]


@dataclass(frozen=True, eq=False)
class LanesResult:
    """x (B, n) and z (B, m), certificates in samples with code 2 (z: infeasible) and 3 (x: unbounded).

    codes and iterations: (B,); polished (B,): the optimality conditions hold up to rounding.
    """

    layout: Layout
    x: np.ndarray
    z: np.ndarray
    codes: np.ndarray
    iterations: np.ndarray
    polished: np.ndarray
    order: np.ndarray
    options: np.ndarray
    state: np.ndarray


def solve(
    program: Program,
    data: Arrays,
    batch: int,
    *,
    tolerance: float = 1e-10,
    max_iterations: int | None = None,
    warm: np.ndarray | None = None,
    threads: int | None = None,
    deadline: float = np.inf,
) -> LanesResult:
    """Solve a batch: data P, q, A, b, each (B, k) or (1, k); `warm` (B, n + m) is tried first.

    tolerance: relative KKT residual of the interior point. deadline: reading of time.monotonic() from
    which no further block of samples is started.
    """
    from convexlearn.solvers.second_order import kernels

    plan = analyse(program)
    shared = sum((len(f) == 1) << k for k, f in enumerate(data))
    fields = tuple(_plain(f).reshape(-1) for f in data)
    order = np.minimum(np.arange(-(-batch // LANES) * LANES, dtype=np.int32), batch - 1)
    limit = ITERATION_LIMIT if max_iterations is None else max_iterations
    settings = [tolerance, limit, REGULARIZATION, max(HAND_OVER, tolerance), warm is not None, POLISH_ROUNDS, 0.0]
    options = np.array(settings, dtype=np.float64)
    point = np.zeros(0) if warm is None else np.nan_to_num(warm).reshape(-1)
    out, info = np.zeros((batch, program.n + program.m)), np.zeros((batch, 4))
    state = (np.empty if deadline == np.inf else np.zeros)(len(order) * plan.state)
    flat, report = out.reshape(-1), info.reshape(-1)

    def task(start: int, stop: int, _: int) -> None:
        if time.monotonic() < deadline:
            blocks = start // LANES, -(-stop // LANES)
            kernels.solve_range(
                (0,) * LANES, plan.header, fields, shared, order, *blocks, options, point, flat, report, state
            )

    run(task, batch, threads, LANES)
    x, z = np.ascontiguousarray(out[:, : program.n]), np.ascontiguousarray(out[:, program.n :])
    codes, iterations = info[:, 0].astype(np.int64), info[:, 1].astype(np.int64)
    return LanesResult(plan, x, z, codes, iterations, info[:, 3] > 0.5, order, options, state)


def adjoint(result: LanesResult, dx: np.ndarray, dz: np.ndarray, threads: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The adjoint (vx, vz) of the optimality conditions for upstream gradients dx (B, n), dz (B, m)."""
    from convexlearn.solvers.second_order import kernels

    upper = np.concatenate([dx, dz], 1)
    out = np.empty_like(upper)
    g, flat = upper.reshape(-1), out.reshape(-1)

    def task(start: int, stop: int, _: int) -> None:
        blocks = start // LANES, -(-stop // LANES)
        kernels.adjoint_range(
            (0,) * LANES, result.layout.header, result.order, *blocks, result.options, g, result.state, flat
        )

    run(task, len(dx), threads)
    n = dx.shape[1]
    return np.ascontiguousarray(out[:, :n]), np.ascontiguousarray(out[:, n:])


def _plain(v: Any) -> np.ndarray:
    """The array itself where the kernels take it: other dtypes and orders would compile another copy."""
    flags = v.flags
    plain = v.dtype == np.float64 and flags.c_contiguous and flags.aligned and flags.writeable
    return v if plain else np.array(v, dtype=np.float64, order="C")
