"""Proximal maps without closed form, computed by a ConvexLayer."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import cvxpy as cp
import torch
from torch import Tensor

from convexlearn.layer import ConvexLayer
from convexlearn.program.declaration import Declaration


class ConvexProx:
    """argmin_z of g(z) + 1/(2 t) |z - v|^2 over the stacked `variables`, subject to `constraints` (Eq. 13).

    The layer solves c/2 |z|^2 - w'z + g(z) with c = 1/t, w = v/t, which is DPP; it is compiled when first used.
    Differentiable in v, t and the parameters of g.
    """

    def __init__(self, objective: Any, constraints: Sequence[Any], variables: Sequence[Any]) -> None:
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
        t = torch.as_tensor(1.0 if t is None or not self.scaled else t).to(v)
        rate = t.reshape(-1, 1) if t.ndim else t
        curvature = (1 / rate).reshape(-1) if t.numel() > 1 else (1 / rate).reshape(())
        (z,) = self._layer(**values, curvature_=curvature, pull_=v / rate)
        return z

    @cached_property
    def _layer(self) -> ConvexLayer:
        copy = self._declaration
        return ConvexLayer(copy.problem, list(copy.parameters), list(copy.outputs))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_layer"}
