"""The autograd node of a layer: parameters -> data -> solution -> outputs, and the adjoint back."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexlearn.errors import OptionError
from convexlearn.layer_arguments import all_finite, check_finite
from convexlearn.program.compiler import Compiled
from convexlearn.program.data_map import DataMap, SparseMap
from convexlearn.program.program import Solution, Status
from convexlearn.solvers.base import Options, Solver


@dataclass(frozen=True, eq=False)
class Node:
    """What stays the same over the forward passes of a layer."""

    compiled: Compiled
    solver: Solver
    outputs: tuple[SparseMap, ...]
    sizes: tuple[int, ...]
    fill: Callable[[Tensor, list[Tensor]], list[Tensor]]


@dataclass(eq=False)
class Call:
    """One forward pass: its arguments, and the solution it leaves behind."""

    node: Node
    map: DataMap
    batch: tuple[int, ...]
    batched: tuple[bool, ...]
    size: int
    dtype: torch.dtype
    options: Options
    limited: bool
    warm: Solution | None
    solution: Any = None

    def features(self, params: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Shared features and a final 1 (1, k + 1), and batched features (B, l), float64."""
        shared, batched = [], []
        for f in self.node.compiled.features:
            kind = self.batched[f.index]
            value = params[f.index].reshape(self.size if kind else 1, self.node.sizes[f.index]).to(torch.float64)
            (batched if kind else shared).append(value.log() if f.log else value)
        device = params[0].device if params else torch.device("cpu")
        shared.append(torch.ones(1, 1, dtype=torch.float64, device=device))
        empty = torch.zeros(self.size, 0, dtype=torch.float64, device=device)
        return _concatenate(shared), _concatenate(batched) if batched else empty

    def flat_outputs(self, x: Tensor, z: Tensor, differentiable: bool = False) -> list[Tensor]:
        """Outputs (B, size) from the canonical solution."""
        apply = SparseMap.differentiable if differentiable else SparseMap.__call__
        result = []
        for recovery, matrix in zip(self.node.compiled.outputs, self.node.outputs):
            y = apply(matrix, z if recovery.dual else x)
            if recovery.offset.any():
                y = y + torch.as_tensor(recovery.offset, device=y.device)
            result.append(y.exp() if recovery.exp else y)
        return result

    def shaped(self, flat: list[Tensor]) -> tuple[Tensor, ...]:
        """Outputs (*batch, *shape) in the caller's dtype."""
        shapes = ((*self.batch, *recovery.shape) for recovery in self.node.compiled.outputs)
        return tuple(y.to(self.dtype).reshape(shape) for y, shape in zip(flat, shapes))

    def flattened(self, gradient: Tensor, k: int) -> Tensor:
        """The gradient of output k as (B, size) float64."""
        width = self.node.outputs[k].shape[0]
        return gradient.reshape(self.size, width).to(torch.float64).contiguous()


class Solve(torch.autograd.Function):
    """Parameters (*batch, *shape) -> outputs (*batch, *shape); backward is the adjoint of the optimality conditions."""

    @staticmethod
    def forward(ctx: Any, call: Call, *params: Tensor) -> tuple[Tensor, ...]:
        features = call.features(tuple(p.detach() for p in params))
        if not all(all_finite(f) for f in features):
            check_finite(call.node.compiled.parameters, params)
        data = call.map(*features, call.size)
        solution = call.node.solver.solve(call.node.compiled.program, data, call.options, call.warm)
        call.solution = solution
        raw = call.flat_outputs(solution.x, solution.z)
        ctx.usable = None  # all samples
        if bool(solution.status.any()):  # something other than SOLVED
            usable = solution.ok
            if call.limited:
                usable = usable | ((solution.status == Status.FAILED) & torch.isfinite(solution.x).all(1))
            if not bool(usable.all()):
                raw = call.node.fill(~usable, raw)
            ctx.usable = usable
        ctx.call, ctx.raw = call, raw if any(r.exp for r in call.node.compiled.outputs) else None
        ctx.save_for_backward(*params)
        return call.shaped(raw)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call, params = ctx.call, ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, *_second_order(ctx, grads)
        solution = call.solution
        dx, dz = _upstream(ctx, grads)
        if ctx.usable is not None:
            status = torch.where(ctx.usable, solution.status.clamp(max=Status.INACCURATE), Status.FAILED)
            solution = replace(solution, status=status)
        shared, varying = call.map.gradient(call.node.solver.adjoint(solution, dx, dz))
        result: list[Tensor | None] = [None] * len(params)
        offset = {False: 0, True: 0}
        for f in call.node.compiled.features:
            kind, width = call.batched[f.index], call.node.sizes[f.index]
            start = offset[kind]
            offset[kind] = start + width
            if not ctx.needs_input_grad[f.index + 1]:
                continue
            parameter, source = params[f.index], varying if kind else shared
            g = torch.zeros_like(parameter) if source is None else source[:, start : start + width]
            g = g.reshape(parameter.shape).to(parameter.dtype)
            g = g / parameter if f.log else g
            result[f.index] = g if result[f.index] is None else result[f.index] + g
        return None, *result


def _upstream(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Gradients to the canonical x (B, n) and z (B, m); zero rows where there is no solution."""
    call, total = ctx.call, {False: None, True: None}
    for k, (recovery, matrix) in enumerate(zip(call.node.compiled.outputs, call.node.outputs)):
        g = call.flattened(grads[k], k)
        g = g * ctx.raw[k] if recovery.exp else g
        g = matrix.transposed(g if ctx.usable is None else torch.where(ctx.usable[:, None], g, 0.0))
        total[recovery.dual] = g if total[recovery.dual] is None else total[recovery.dual] + g
    return _or_zeros(total[False], call.solution.x), _or_zeros(total[True], call.solution.z)


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    if gradient is None:  # numpy's zeros cost nothing until they are read, torch's start its threads
        gradient = torch.from_numpy(np.zeros(like.shape)) if like.device.type == "cpu" else torch.zeros_like(like)
    return gradient


def _concatenate(parts: list[Tensor]) -> Tensor:
    """Tensors (B, k) side by side; on the CPU by numpy, since torch's threads would spin beside the solver's."""
    if len(parts) == 1:
        return parts[0]
    if torch.is_grad_enabled() or parts[0].device.type != "cpu":
        return torch.cat(parts, 1)
    return torch.from_numpy(np.concatenate([p.numpy() for p in parts], 1))


def _second_order(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The gradient as a differentiable function, on the active set that the solution found."""
    call, params = ctx.call, ctx.saved_tensors
    solver = call.node.solver
    if not hasattr(solver, "differentiable"):
        raise OptionError(f"second derivatives need a solver for QPs and LPs; '{solver.name}' has none")
    data = call.map(*call.features(params), call.size, differentiable=True)
    raw = call.flat_outputs(*solver.differentiable(call.solution, data), differentiable=True)
    upstream = [call.flattened(g, k) for k, g in enumerate(grads)]
    if ctx.usable is not None:
        usable = ctx.usable[:, None]
        raw, upstream = ([torch.where(usable, v, 0.0) for v in vs] for vs in (raw, upstream))
    needed = [k for k in range(len(params)) if ctx.needs_input_grad[k + 1]]
    found = torch.autograd.grad(raw, [params[k] for k in needed], upstream, create_graph=True, allow_unused=True)
    result: list[Tensor | None] = [None] * len(params)
    for k, g in zip(needed, found):
        result[k] = g
    return tuple(result)
