"""Certificates for samples that the interior point left undecided, from two feasible strictly convex problems.

Infeasible: min 1/2 |Ax - b|^2 + 1/2 |max(Gx - h, 0)|^2 within the bounds has the duals y = Ax - b,
z = max(Gx - h, 0), a Farkas certificate unless they vanish. Unbounded: the minimizer of q'd + w'|d| + d'Pd / 2
+ rho |d|^2 / 2 over the recession cone of the constraints is a ray of descent unless it vanishes; for P = 0
with rho = 1, else with a small rho, since Pd = 0 holds up to rho. Both have the program's KKT pattern.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from convexlearn.program.program import Status
from convexlearn.program.reduce import BoxProgram

CERTIFIED = 1e-6
SMALL_PENALTY = 1e-7


def decide(box: BoxProgram, data: Any, samples: np.ndarray, run: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Status (k,) and rows (k, x y z lower upper v) of undecided samples; FAILED where no certificate is found.

    `run(data, batch, penalty_x, penalty_y)` solves the program with quadratic penalties on x or on (y, z).
    """
    batch = len(samples)
    picked = data._make(f if len(f) == 1 else f[samples] for f in data)
    zeros = {name: np.zeros_like(getattr(picked, name)) for name in ("P", "q", "w")}
    rows = run(picked._replace(**zeros), batch, 0.0, 1.0)
    error, value = farkas_error(box, picked, rows)
    status = np.full(batch, int(Status.FAILED))
    status[error <= CERTIFIED] = Status.INFEASIBLE
    rows = rows / np.where(value > 0, value, 1.0)[:, None]
    open_ = np.flatnonzero(status == Status.FAILED)
    if len(open_):
        cone = {k: np.where(np.isfinite(v), 0.0, v) for k, v in zip("bhlu", (picked.b, picked.h, picked.l, picked.u))}
        penalty = SMALL_PENALTY if np.any(picked.P) else 1.0
        rays = run(picked._replace(**cone), batch, penalty, 0.0)
        error, value = ray_error(box, picked, rays)
        unbounded = (error <= CERTIFIED) & (status == Status.FAILED)
        status[unbounded] = Status.UNBOUNDED
        rows[unbounded] = rays[unbounded] / value[unbounded, None]
    return status, rows


def farkas_error(box: BoxProgram, data: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Error of the duals in `rows` as a Farkas certificate, and -b'y - h'z + l'lower - u'upper, each (k,).

    Both relative to their terms, as in base.primal_infeasible; the error is divided by the relative value.
    """
    _, y, z, lower, upper = parts(box, rows)
    pull = np.zeros((len(rows), box.n))
    _add(pull, box.A.cols, data.A * y[:, box.A.rows])
    _add(pull, box.G.cols, data.G * z[:, box.G.rows])
    pull[:, box.lower] -= lower
    pull[:, box.upper] += upper
    limits = [(data.b, y, -1), (data.h, z, -1), (data.l, lower, 1), (data.u, upper, -1)]
    terms = np.concatenate([sign * np.where(np.isfinite(v), v, 0.0) * d for v, d, sign in limits], 1)
    weights = [np.abs(y) * _row_sizes(box.A, data.A), z * _row_sizes(box.G, data.G), lower, upper]
    inequalities = np.concatenate(weights[1:], 1)
    return _relative([np.abs(pull), -inequalities], np.concatenate([weights[0], inequalities], 1), terms)


def ray_error(box: BoxProgram, data: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Error of x in `rows` as a ray of unbounded descent, and -(q'x + w'|x|), each (k,).

    Both relative to their terms, as in base.dual_infeasible; the error is divided by the relative value.
    """
    x = parts(box, rows)[0]
    terms = np.concatenate([-data.q * x, -np.maximum(data.w, 0) * np.abs(x[:, box.absolute])], 1)
    Px, Ax, Gx = np.zeros_like(x), np.zeros((len(x), box.A.shape[0])), np.zeros((len(x), box.G.shape[0]))
    off = box.P.rows != box.P.cols
    _add(Px, box.P.rows, data.P * x[:, box.P.cols])
    _add(Px, box.P.cols[off], data.P[:, off] * x[:, box.P.rows[off]])
    _add(Ax, box.A.rows, data.A * x[:, box.A.cols])
    _add(Gx, box.G.rows, data.G * x[:, box.G.cols])
    Gx = np.where(np.isfinite(data.h), Gx, 0.0)
    below = np.where(np.isfinite(data.l), -x[:, box.lower], 0.0)
    above = np.where(np.isfinite(data.u), x[:, box.upper], 0.0)
    Px, Ax = np.abs(Px) / _row_sizes(box.P, data.P, symmetric=True), np.abs(Ax) / _row_sizes(box.A, data.A)
    return _relative([Px, Ax, Gx / _row_sizes(box.G, data.G), below, above], x, terms)


def parts(box: BoxProgram, rows: np.ndarray) -> list[np.ndarray]:
    """x, y, z, lower, upper of solution rows."""
    lengths = [box.n, box.A.shape[0], box.G.shape[0], len(box.lower), len(box.upper)]
    return np.split(rows, np.cumsum(lengths), axis=1)[:5]


def _add(out: np.ndarray, columns: Any, values: np.ndarray) -> None:
    index: Any = (slice(None), columns)
    np.add.at(out, index, values)  # columns may repeat


def _row_sizes(pattern: Any, values: np.ndarray, symmetric: bool = False) -> np.ndarray:
    """The largest magnitude (k, rows) in every row, 1 for empty rows."""
    sizes = np.zeros((len(values), pattern.shape[0]))
    for index in (pattern.rows, pattern.cols) if symmetric else (pattern.rows,):
        np.maximum.at(sizes, (slice(None), index), np.abs(values))
    return np.where(sizes > 0, sizes, 1.0)


def _relative(errors: list[np.ndarray], weights: np.ndarray, terms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    worst = np.max([e.max(axis=1, initial=0.0) for e in errors], axis=0)
    value, size, largest = terms.sum(1), np.abs(weights).max(1, initial=0.0), np.abs(terms).max(1, initial=0.0)
    safe = np.where(value > 0, value * size, 1.0)
    with np.errstate(over="ignore"):
        return np.where((value > 0) & np.isfinite(worst), worst * largest / safe, np.inf), value
