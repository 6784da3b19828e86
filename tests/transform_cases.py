"""A QP, an LP with smoothing and a second-order cone program, with values at which they are well posed."""

from collections.abc import Callable
from typing import NamedTuple

import cvxpy as cp
import torch
from torch import Tensor

from convexlearn import ConvexLayer


class Case(NamedTuple):
    layer: ConvexLayer
    values: tuple[Tensor, ...]  # the first is batched (2, .), the others are shared
    step: float  # of finite differences

    def function(self, *values: Tensor) -> tuple[Tensor, ...]:
        return self.layer(*values)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quadratic() -> Case:
    x, t, A = cp.Variable(3), cp.Parameter(3, name="t"), cp.Parameter((2, 3), name="A")
    low = cp.Parameter(nonneg=True, name="low")
    constraints = [x >= -low, cp.sum(x) <= 0.8]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - t) + 0.1 * cp.norm1(A @ x)), constraints)
    layer = ConvexLayer(problem, [t, A, low], [x, constraints[1].dual_variables[0]])
    return Case(layer, (normal(2, 3), normal(2, 3, seed=1), torch.tensor(0.3, dtype=torch.float64)), 1e-6)


def smoothed_linear() -> Case:
    x, c = cp.Variable(4), cp.Parameter(4, name="c")
    b, A = cp.Parameter(name="b"), cp.Parameter((2, 4), name="A")
    constraints = [x >= 0, cp.sum(x) == b, A @ x <= 1]
    problem = cp.Problem(cp.Minimize(c @ x), constraints)
    duals = [k.dual_variables[0] for k in constraints[1:]]
    layer = ConvexLayer(problem, [c, b, A], [x, *duals], solver_args={"smoothing": 1e-2})
    return Case(layer, (normal(2, 4), torch.tensor(1.0, dtype=torch.float64), normal(2, 4, seed=1)), 1e-6)


def second_order() -> Case:
    """Both cones are met at their boundary at the solution: the bound on |Fw|, and |w| in the objective."""
    w, mu, F = cp.Variable(3), cp.Parameter(3, name="mu"), cp.Parameter((3, 3), name="F")
    sigma = cp.Parameter(pos=True, name="sigma")
    bound = cp.norm2(F @ w) <= sigma
    problem = cp.Problem(cp.Maximize(mu @ w - 0.2 * cp.norm2(w)), [bound, cp.sum(w) == 1])
    layer = ConvexLayer(problem, [mu, F, sigma], [w, bound.dual_variables[0]])
    return Case(layer, (normal(2, 3), normal(3, 3, seed=5), torch.tensor(1.5, dtype=torch.float64)), 1e-4)


CASES: dict[str, Callable[[], Case]] = {"QP": quadratic, "smoothed LP": smoothed_linear, "SOCP": second_order}
