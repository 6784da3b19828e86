"""Random box QPs and dense references for the tests of the solver in lanes."""

import numpy as np
import scipy.sparse as sp

from convexlearn.program.program import Sparsity
from convexlearn.program.reduce import BoxProgram
from convexlearn.solvers.quadratic.lanes import BoxData, LanesResult

PARTS = ("x", "y", "z", "lower", "upper", "subgradient")


def sparsity(mask: np.ndarray) -> Sparsity:
    """Stored entries of a mask, by column."""
    coo = sp.coo_array(np.asarray(mask, dtype=float))
    order = np.lexsort((coo.row, coo.col))
    return Sparsity(coo.row[order].astype(np.int32), coo.col[order].astype(np.int32), coo.shape)


def family(
    seed: int,
    n: int = 8,
    rows: int = 2,
    inequalities: int = 4,
    *,
    batch: int = 5,
    linear: bool = False,
    absolute: int = 0,
    bounds: int | None = None,
    density: float = 0.7,
) -> tuple[BoxProgram, BoxData]:
    """A feasible, bounded random box QP (or LP), all data batched, generic: active constraints are strictly so."""
    rng = np.random.default_rng(seed)
    count = n if bounds is None else bounds
    limited = np.sort(rng.permutation(n)[:count])
    kinks = np.sort(rng.permutation(n)[:absolute])
    P = sparsity(np.triu(np.ones((n, n))) * (not linear))
    A, G = sparsity(rng.random((rows, n)) < density), sparsity(rng.random((inequalities, n)) < density)
    box = BoxProgram(n, P, A, G, limited, limited, kinks)
    root = rng.normal(size=(batch, n, n)) / np.sqrt(n)
    full = np.einsum("bri,brj->bij", root, root) + 0.1 * np.eye(n)
    x, a, g = (rng.normal(size=(batch, k)) for k in (n, A.nnz, G.nnz))
    h = product(G, g, x) + 0.1 + rng.random((batch, inequalities))
    l, u = x[:, limited] - 0.1 - rng.random((batch, count)), x[:, limited] + 0.1 + rng.random((batch, count))
    q, w = rng.normal(size=(batch, n)), 0.1 + rng.random((batch, absolute))
    return box, BoxData(full[:, P.rows, P.cols], q, w, a, product(A, a, x), g, h, l, u)


def product(pattern: Sparsity, values: np.ndarray, x: np.ndarray) -> np.ndarray:
    out = np.zeros((len(x), pattern.shape[0]))
    np.add.at(out, (slice(None), pattern.rows), values * x[:, pattern.cols])
    return out


def dense(box: BoxProgram, data: BoxData, k: int) -> BoxData:
    """Data of sample k with dense P (symmetric), A and G."""
    row = BoxData(*(f[k if len(f) > 1 else 0] for f in data))

    def matrix(pattern: Sparsity, values: np.ndarray) -> np.ndarray:
        out = np.zeros(pattern.shape)
        out[pattern.rows, pattern.cols] = values
        return out

    upper = matrix(box.P, row.P)
    P = upper + upper.T - np.diag(np.diag(upper))
    return row._replace(P=P, A=matrix(box.A, row.A), G=matrix(box.G, row.G))


def kkt_error(box: BoxProgram, data: BoxData, result: LanesResult, k: int) -> float:
    """Largest violation of the optimality conditions of sample k, computed densely and independently."""
    d = dense(box, data, k)
    x, y, z, lower, upper, v = (getattr(result, name)[k] for name in PARTS)
    gradient = d.P @ x + d.q + d.A.T @ y + d.G.T @ z
    gradient[box.lower] -= lower
    gradient[box.upper] += upper
    gradient[box.absolute] += v
    slack, below, above = d.h - d.G @ x, x[box.lower] - d.l, d.u - x[box.upper]
    w, kinks = np.maximum(d.w, 0), x[box.absolute]
    finite = np.nan_to_num(np.concatenate([slack, below, above]), posinf=0.0)
    duals = np.concatenate([z, lower, upper])
    errors = [np.abs(gradient), np.abs(d.A @ x - d.b), -finite, -duals, np.abs(finite * duals)]
    errors += [np.abs(v) - w, w * np.abs(kinks) - v * kinks]
    return max(e.max(initial=0.0) for e in errors)


def objective(box: BoxProgram, data: BoxData, result: LanesResult, k: int) -> float:
    d, x = dense(box, data, k), result.x[k]
    return x @ d.P @ x / 2 + d.q @ x + np.maximum(d.w, 0) @ np.abs(x[box.absolute])


def clarabel_solution(box: BoxProgram, data: BoxData, k: int) -> tuple[str, float]:
    """Clarabel's status and objective for sample k."""
    import clarabel

    d, na, unit = dense(box, data, k), len(box.absolute), np.eye(box.n)
    below, above = np.isfinite(d.l), np.isfinite(d.u)
    kinks, t = unit[box.absolute], np.eye(na)
    blocks = [(d.A, 0), (d.G, 0), (-unit[box.lower][below], 0), (unit[box.upper][above], 0), (kinks, -t), (-kinks, -t)]
    rows = [np.hstack([m, np.zeros((len(m), na)) if isinstance(e, int) else e]) for m, e in blocks]
    right = np.concatenate([d.b, d.h, -d.l[below], d.u[above], np.zeros(2 * na)])
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-10
    P = sp.csc_matrix(sp.block_diag([sp.csc_matrix(np.triu(d.P)), sp.csc_matrix((na, na))]))
    q = np.concatenate([d.q, np.maximum(d.w, 0)])
    cones = [clarabel.ZeroConeT(len(d.b)), clarabel.NonnegativeConeT(len(right) - len(d.b))]
    solution = clarabel.DefaultSolver(P, q, sp.csc_matrix(np.vstack(rows)), right, cones, settings).solve()
    return str(solution.status), solution.obj_val
