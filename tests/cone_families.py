"""Random programs with second-order cones, and Clarabel's answers, for the tests of the solver `socp`."""

import clarabel
import numpy as np
import scipy.sparse as sp
import torch

from convexlearn.program.program import Cones, Program, ProgramData, Sparsity


def sparsity(mask: np.ndarray) -> Sparsity:
    """Stored entries of a mask, by column."""
    cols, rows = np.nonzero(mask.T)
    return Sparsity(rows.astype(np.int32), cols.astype(np.int32), mask.shape)


def inside(rng: np.random.Generator, batch: int, cones: Cones, edge: float) -> np.ndarray:
    """Random points of K (B, rows after the zero cone): in each cone inside, or with chance `edge` on its boundary."""
    parts = [rng.exponential(size=(batch, cones.nonneg)) * (rng.random((batch, cones.nonneg)) > edge)]
    for d in cones.soc:
        tail = rng.normal(size=(batch, d - 1))
        norm = np.linalg.norm(tail, axis=1, keepdims=True)
        parts.append(np.hstack([norm + rng.exponential(size=(batch, 1)) * (rng.random((batch, 1)) > edge), tail]))
    return np.hstack(parts)


def family(
    seed: int, n: int = 8, cones: Cones | None = None, *, batch: int = 5, linear: bool = False, density: float = 0.7
) -> tuple[Program, ProgramData]:
    """Feasible programs with strictly feasible duals, all data batched; generic, so that solutions are unique.

    A point s and a dual z inside their cones are drawn, then b and q fitted to them.
    """
    cones = cones or Cones(zero=2, nonneg=4, soc=(3, 5))
    rng, m = np.random.default_rng(seed), cones.size
    rank = 0 if linear else max(1, n // 2)
    P = sparsity(np.triu(np.ones((n, n))) * (rank > 0))
    A = sparsity((rng.random((m, n)) < density) | (np.arange(m)[:, None] % n == np.arange(n)))
    program = Program(n, m, cones, P, A)
    root = rng.normal(size=(batch, rank, n))
    full = np.einsum("bri,brj->bij", root, root) / np.sqrt(n)
    a, x = rng.normal(size=(batch, A.nnz)), rng.normal(size=(batch, n))
    s = np.hstack([np.zeros((batch, cones.zero)), inside(rng, batch, cones, 0.0)])
    z = np.hstack([rng.normal(size=(batch, cones.zero)), inside(rng, batch, cones, 0.0)])
    matrix = A.dense(torch.from_numpy(a)).numpy()
    b = np.einsum("bij,bj->bi", matrix, x) + s
    q = -np.einsum("bij,bj->bi", full, x) - np.einsum("bji,bj->bi", matrix, z)
    values = (full[:, P.rows, P.cols], q, a, b)
    return program, ProgramData(*(torch.from_numpy(np.ascontiguousarray(v)) for v in values), batch=batch)


def clarabel_solution(program: Program, data: ProgramData, k: int) -> tuple[str, np.ndarray, np.ndarray]:
    """Clarabel's status, x and z of sample k at 1e-10."""
    P, q, A, b = (f[k if len(f) > 1 else 0].numpy() for f in data.fields())
    cones = program.cones
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-10
    kinds = [clarabel.ZeroConeT(cones.zero), clarabel.NonnegativeConeT(cones.nonneg)]
    kinds += [clarabel.SecondOrderConeT(d) for d in cones.soc]
    found = clarabel.DefaultSolver(
        sp.csc_matrix(program.P.matrix(P)), q, sp.csc_matrix(program.A.matrix(A)), b, kinds, settings
    ).solve()
    return str(found.status), np.array(found.x), np.array(found.z)


def objective(program: Program, data: ProgramData, k: int, x: np.ndarray) -> float:
    """The objective of sample k at x."""
    upper = program.P.dense(data.P)[k].numpy()
    return float(0.5 * x @ (upper + upper.T - np.diag(np.diag(upper))) @ x + data.q[k].numpy() @ x)


def kkt_error(program: Program, data: ProgramData, k: int, x: np.ndarray, z: np.ndarray) -> float:
    """Largest violation of the optimality conditions of sample k, computed densely and independently."""
    upper, A = program.P.dense(data.P)[k].numpy(), program.A.dense(data.A)[k].numpy()
    P = upper + upper.T - np.diag(np.diag(upper))
    s = data.b[k].numpy() - A @ x
    errors = [np.abs(P @ x + data.q[k].numpy() + A.T @ z).max(), abs(s @ z)]
    first = program.cones.zero + program.cones.nonneg
    errors.append(np.abs(s[: program.cones.zero]).max(initial=0.0))
    errors += [-v[program.cones.zero : first].min(initial=0.0) for v in (s, z)]
    for d in program.cones.soc:
        errors += [np.linalg.norm(v[first + 1 : first + d]) - v[first] for v in (s, z)]
        first += d
    return max(errors)
