"""Matrix equations, Newton's method and chains with sound inputs, and arguments that none of them can take."""

import math
from collections.abc import Callable
from typing import Any

import torch
from fuzz_functions import Function, maker
from fuzz_subjects import normal
from torch import Tensor

from convexlearn import block_tridiagonal, newton, riccati
from convexlearn.chain import ChainFactors, best_path, log_marginals
from convexlearn.inputs import as_floating

NAN = math.nan
A, B, C = 0.5 * normal(3, 2, 2, seed=21).tanh(), normal(3, 2, 1, seed=22), normal(3, 1, 2, seed=23)
Q = normal(3, 2, 2, seed=24)
Q = Q @ Q.mT + torch.eye(2, dtype=torch.float64)
R = Q[:, :1, :1]
DIAGONAL, BELOW, RIGHT = 3 * Q[:, None].repeat(1, 4, 1, 1), 0.3 * normal(3, 3, 2, 2, seed=25), normal(3, 4, 2, seed=26)
PAIRS, SEEN, FIRST = normal(3, 5, 2, 2, seed=27), normal(3, 5, 2, seed=28), normal(3, 2, seed=29)
Z, X = normal(3, 2, seed=30), normal(3, 2, seed=31)


def quartic(z: Tensor, x: Tensor) -> Tensor:
    """Convex, of each sample its own."""
    x = as_floating("x", x)
    return ((z - x) ** 4 / 4 + (z - x) ** 2 + z**2).sum(1)


def minimum(z: Tensor, x: Tensor) -> Tensor:
    """Where Newton's method converged."""
    found = newton.minimize(quartic, z, (x,))
    return torch.where(found.converged[:, None], found.point, torch.nan)


def algebra_functions() -> dict[str, Callable[[], Function]]:
    """riccati.py, newton.py, block_tridiagonal.py, chain.py."""
    lead: dict[str, Any] = {"leading": True, "batches": True}
    chain: dict[str, Any] = {"leading": True, "batches": True, "lengths": True, "tolerance": 1e-6}
    return {
        "filter_covariance": maker(riccati.filter_covariance, A, C, Q, R, **lead),
        "filter_gain": maker(riccati.filter_gain, A, C, Q, R, **lead),
        "lqr_recursion": maker(lambda a, b, q, r: riccati.lqr_recursion(a, b, q, r, 3), A, B, Q, R, **lead),
        "lqr_recursion to a terminal cost": maker(
            lambda a, b, q, r, p: riccati.lqr_recursion(a, b, q, r, 3, terminal=p), A, B, Q, R, Q, optional=(4,), **lead
        ),
        "kalman_recursion": maker(
            lambda a, c, v, w, p: tuple(riccati.kalman_recursion(a, c, v, w, p, horizon=3)), A, C, Q, R, Q, **lead
        ),
        "kalman_update": maker(riccati.kalman_update, Q, C, R, **lead),
        "block_tridiagonal.solve": maker(block_tridiagonal.solve, DIAGONAL, BELOW, RIGHT),
        "log_marginals": maker(
            lambda p, u, i: log_marginals(ChainFactors(p, u), i), PAIRS, SEEN, FIRST, optional=(1, 2), **chain
        ),
        "log_marginals max": maker(
            lambda p, u: log_marginals(ChainFactors(p, u), semiring="max"), PAIRS, SEEN, optional=(1,), **chain
        ),
        "best_path": maker(
            lambda p, u, i: best_path(ChainFactors(p, u), i), PAIRS, SEEN, FIRST, optional=(1, 2), **chain
        ),
        "minimize": maker(minimum, Z, X, tolerance=1e-6, lengths=True),
        "derivatives": maker(lambda z, x: newton.derivatives(quartic, z, (x,)), Z, X, lengths=True),
        "attach_implicit_gradient": maker(
            lambda z, x: newton.attach_implicit_gradient(quartic, z, (x,)), Z, X, lengths=True, gaps=True
        ),
    }


def unsound_algebra() -> list[tuple[str, Callable[[], Any]]]:
    """Options, masks, functions and factors."""
    horizons = (0, -1, 1.5, None, "x", True, NAN)
    masks = (1.0, "x", torch.ones(3, 4, 1), torch.ones(3, 4, 2).bool(), torch.ones(3, 5, 1).bool(), torch.tensor(True))
    masks = (*masks, torch.ones(7, 4, 1).bool(), [True])
    filtering = (A, C, Q, R, Q)
    flat = (1.0, None, "x", Z[0], 1j * Z, Z[:, :0], Z[None], object())
    functions = (None, "x", 3, lambda z: 1.0, lambda z: None, lambda z: z, lambda z: z.sum())
    squares = lambda z: z.square().sum(1)  # noqa: E731
    numbers, counts = ("x", NAN, 1j, torch.ones(2), 0.0, -1.0, None), (0, -1, 1.5, None, "x", True, NAN)
    data = (3, "x", (None,), (Z[:2],), (torch.tensor(1.0),), ("x",))
    return [
        *[("horizon", lambda h=h: riccati.lqr_recursion(A, B, Q, R, h)) for h in horizons],
        *[("horizon", lambda h=h: riccati.kalman_recursion(*filtering, horizon=h)) for h in horizons],
        *[("observed", lambda m=m: riccati.kalman_recursion(*filtering, horizon=4, observed=m)) for m in masks],
        *[("observed", lambda m=m: riccati.kalman_update(Q, C, R, m)) for m in masks],
        *[("Q", lambda M=M: riccati.check_psd("Q", M)) for M in (None, "x", Q[0, 0], C, NAN * Q, 1j * Q, -Q)],
        *[("terminal", lambda M=M: riccati.lqr_recursion(A, B, Q, R, 2, terminal=M)) for M in ("x", C, -Q, NAN * Q)],
        *[("P", lambda M=M: riccati.kalman_update(M, C, R)) for M in (None, "x", C, NAN * Q, 1j * Q)],
        *[("start", lambda z=z: newton.minimize(squares, z)) for z in flat],
        *[("z", lambda z=z: newton.derivatives(squares, z)) for z in flat],
        *[("point", lambda z=z: newton.attach_implicit_gradient(squares, z)) for z in flat],
        *[("function", lambda f=f: newton.minimize(f, Z)) for f in functions],
        *[("function", lambda f=f: newton.derivatives(f, Z)) for f in functions],
        *[("tol", lambda t=t: newton.minimize(squares, Z, tol=t)) for t in numbers],
        *[("max_iterations", lambda k=k: newton.minimize(squares, Z, max_iterations=k)) for k in counts],
        *[("data", lambda d=d: newton.minimize(quartic, Z, d)) for d in data],
        *[("diagonal", lambda d=d: block_tridiagonal.solve(d, BELOW, RIGHT)) for d in (None, "x", Q, DIAGONAL[..., 0])],
        *[("below", lambda b=b: block_tridiagonal.solve(DIAGONAL, b, RIGHT)) for b in (None, "x", DIAGONAL, BELOW[:2])],
        *[("right", lambda r=r: block_tridiagonal.solve(DIAGONAL, BELOW, r)) for r in (None, "x", BELOW, RIGHT[:, :2])],
        *[("semiring", lambda s=s: log_marginals(PAIRS, semiring=s)) for s in (None, "x", 3, "product")],
        *[("initial", lambda i=i: log_marginals(PAIRS, i)) for i in ("x", torch.ones(3), torch.ones(7, 2), 1j)],
        *[("factors", lambda f=f: log_marginals(f)) for f in ((PAIRS,), (PAIRS, SEEN, FIRST), ())],
        *[("pairwise", lambda f=f: best_path(f)) for f in (None, "x", Q[0], PAIRS[..., :1], 1j * PAIRS, (None, SEEN))],
        *[("unary", lambda u=u: best_path(ChainFactors(PAIRS, u))) for u in ("x", SEEN[:, :2], 1j * SEEN)],
    ]  # fmt: skip
