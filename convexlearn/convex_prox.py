"""Proximal maps without closed form, computed by a ConvexLayer."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import cvxpy as cp
from cvxpy.constraints.constraint import Constraint
from torch import Tensor

from convexlearn.checks import shown
from convexlearn.errors import DomainError, OptionError, ShapeError
from convexlearn.inputs import as_floating
from convexlearn.layer import ConvexLayer
from convexlearn.program.declaration import Declaration


class ConvexProx:
    """argmin_z of g(z) + 1/(2 t) |z - v|^2 over the stacked `variables`, subject to `constraints` (Eq. 13).

    The layer solves c/2 |z|^2 - w'z + g(z) with c = 1/t, w = v/t, which is DPP; it is compiled when first used.
    Differentiable in v, t and the parameters of g.
    """

    def __init__(self, objective: Any, constraints: Sequence[Any], variables: Sequence[Any]) -> None:
        _check_problem(objective, constraints, variables)
        size = sum(v.size for v in variables)
        curvature, pull = cp.Parameter(nonneg=True, name="curvature_"), cp.Parameter(size, name="pull_")
        stacked = cp.hstack([cp.reshape(v, (v.size,), order="C") for v in variables])
        near = 0.5 * curvature * cp.sum_squares(stacked) - pull @ stacked
        goal = near if objective is None else near + objective
        problem = cp.Problem(cp.Minimize(goal), list(constraints))
        self.parameters = tuple(p.name() for p in problem.parameters() if p.name() not in ("curvature_", "pull_"))
        self.shapes = {p.name(): tuple(p.shape) for p in problem.parameters()}
        self.scaled = objective is not None
        self._declaration = Declaration.of(problem, problem.parameters(), [stacked])

    def __call__(self, v: Tensor, t: Any = None, **values: Tensor) -> Tensor:
        """The minimizer `(B, n)` at v `(B, n)`; t is a number or `(B, 1)`, `values` those of g's parameters."""
        v = as_floating("v", v, "ConvexProx:")
        size = self.shapes["pull_"][0]
        if v.ndim != 2 or v.shape[1] != size:
            raise ShapeError(f"ConvexProx: v must have shape (B, {size}), got {tuple(v.shape)}")
        t = as_floating("t", 1.0 if t is None or not self.scaled else t, "ConvexProx:").to(v)
        if t.numel() != 1 and tuple(t.shape) not in ((len(v), 1), (len(v),)):
            raise ShapeError(f"ConvexProx: t must be a number or have shape ({len(v)}, 1), got {tuple(t.shape)}")
        if bool((t <= 0).any()):
            raise DomainError(f"ConvexProx: t must be positive, got {t.min().item():g}")
        rate = t.reshape(-1, 1) if t.ndim else t
        curvature = (1 / rate).reshape(-1) if t.numel() != 1 else (1 / rate).reshape(())
        (z,) = self._layer(**values, curvature_=curvature, pull_=v / rate)
        return z

    @cached_property
    def _layer(self) -> ConvexLayer:
        copy = self._declaration
        return ConvexLayer(copy.problem, list(copy.parameters), list(copy.outputs))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_layer"}


def _check_problem(objective: Any, constraints: Any, variables: Any) -> None:
    if objective is not None and not (isinstance(objective, cp.Expression) and objective.is_convex()):
        raise OptionError(f"ConvexProx: objective must be a convex cvxpy.Expression or None, got {shown(objective)}")
    for name, items, kind in (
        ("constraints", constraints, Constraint),
        ("variables", variables, cp.Variable),
    ):
        if not isinstance(items, list | tuple) or not all(isinstance(item, kind) for item in items):
            raise OptionError(f"ConvexProx: {name} must be a list of cvxpy {name}, got {shown(items)}")
    if not variables:
        raise OptionError("ConvexProx: variables must name one variable at least")
