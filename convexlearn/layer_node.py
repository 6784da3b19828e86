"""The autograd node of a layer: parameters -> data -> solution -> outputs, and the adjoint back."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from convexlearn.errors import OptionError
from convexlearn.layer_arguments import batch_shape, check_finite, result_type
from convexlearn.program.compiler import Compiled
from convexlearn.program.data_map import DataMap, SparseMap
from convexlearn.program.program import ProgramData, Solution, Status, as_tensor
from convexlearn.solvers.base import Options, Solver

SMALL = 4096  # entries up to which a dot product tells fastest whether all are finite


@dataclass(frozen=True, eq=False)
class Node:
    """What stays the same over the forward passes of a layer."""

    compiled: Compiled
    solver: Solver
    outputs: tuple[SparseMap, ...]
    sizes: tuple[int, ...]
    fill: Callable[[Tensor, list[Tensor]], list[Tensor]]
    again: Callable[[Sequence[Tensor], Options, bool], tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False)
class Piece:
    """Where the values of parameter `index` stand among the shared or batched features; maybe their logarithms."""

    index: int
    start: int
    stop: int
    batched: bool
    log: bool


@dataclass(frozen=True, eq=False)
class Plan:
    """What stays the same over calls whose parameters have the same shapes, dtypes and device."""

    node: Node
    map: DataMap
    batch: tuple[int, ...]
    size: int
    dtype: torch.dtype
    host: bool
    pieces: tuple[Piece, ...]
    widths: tuple[int, int]  # of the shared and the batched features
    shapes: tuple[tuple[int, ...], ...]  # of the outputs
    exponential: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "exponential", any(r.exp for r in self.node.compiled.outputs))

    @classmethod
    def of(cls, node: Node, maps: dict[tuple[bool, ...], DataMap], values: list[Tensor]) -> "Plan":
        """Check the shapes of the parameters and lay out their values; `maps` keeps the maps made so far."""
        compiled = node.compiled
        batch, batched = batch_shape(compiled, values)
        pieces, widths = [], [0, 0]
        for f in compiled.features:
            kind, width = batched[f.index], node.sizes[f.index]
            pieces.append(Piece(f.index, widths[kind], widths[kind] + width, kind, f.log))
            widths[kind] += width
        key = tuple(p.batched for p in pieces)
        if key not in maps:
            maps[key] = DataMap(compiled, tuple(node.sizes[p.index] for p in pieces), key)
        host = all(v.device.type == "cpu" and v.dtype != torch.bfloat16 for v in values)  # numpy has none
        shapes = tuple((*batch, *r.shape) for r in compiled.outputs)
        size = math.prod(batch)
        return cls(
            node, maps[key], batch, size, result_type(values), host, tuple(pieces), (widths[0], widths[1]), shapes
        )

    def data(self, params: Sequence[Tensor]) -> ProgramData:
        """The program's data; DomainError for an entry that is NaN, infinite, or without the logarithm it needs."""
        if not self.host:
            features = self.features(params)
            if not all(bool(torch.isfinite(f).all()) for f in features):
                self.explain(params)
            return self.map(*features, self.size)
        theta, features = np.empty(self.widths[0] + 1), np.empty((self.size, self.widths[1]))
        theta[-1] = 1.0
        for p in self.pieces:
            value = params[p.index].detach().numpy()
            if p.batched:
                features[:, p.start : p.stop] = value.reshape(self.size, p.stop - p.start)
            else:
                theta[p.start : p.stop] = value.reshape(-1)
            if p.log:
                part = features[:, p.start : p.stop] if p.batched else theta[p.start : p.stop]
                with np.errstate(divide="ignore", invalid="ignore"):  # explained below
                    np.log(part, out=part)
        if not (_all_finite(theta) and _all_finite(features)):
            self.explain(params)
        return self.map.on_host(theta, features, self.size)

    def explain(self, params: Sequence[Tensor]) -> None:
        """DomainError that names the first entry that makes a feature NaN or infinite, if there is one."""
        logs = {p.index for p in self.pieces if p.log}
        check_finite(self.node.compiled.parameters, params, logs)

    def features(self, params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Shared features and a final 1 (1, k + 1), and batched features (B, l), float64, in torch operations."""
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for p in self.pieces:
            value = params[p.index].reshape(self.size if p.batched else 1, p.stop - p.start).to(torch.float64)
            parts[p.batched].append(value.log() if p.log else value)
        device = params[0].device if params else torch.device("cpu")
        parts[False].append(torch.ones(1, 1, dtype=torch.float64, device=device))
        empty = torch.zeros(self.size, 0, dtype=torch.float64, device=device)
        return torch.cat(parts[False], 1), torch.cat([empty, *parts[True]], 1)

    def outputs(self, solution: Solution) -> list[Tensor]:
        """Outputs (B, size) of a solution; one view of an array each where they merely pick variables."""
        if not self.host or self.exponential:
            return self.flat_outputs(solution.x, solution.z)
        x, z = solution.arrays
        result = []
        for recovery, matrix in zip(self.node.compiled.outputs, self.node.outputs):
            y = matrix.on_host(z if recovery.dual else x)
            result.append(torch.from_numpy(y + recovery.offset if recovery.shifted else y))
        return result

    def flat_outputs(self, x: Tensor, z: Tensor) -> list[Tensor]:
        """Outputs (B, size) from the canonical solution."""
        result = []
        for recovery, matrix in zip(self.node.compiled.outputs, self.node.outputs):
            y = matrix(z if recovery.dual else x)
            if recovery.shifted:
                y = y + torch.as_tensor(recovery.offset, device=y.device)
            result.append(y.exp() if recovery.exp else y)
        return result

    def shaped(self, flat: list[Tensor]) -> tuple[Tensor, ...]:
        """Outputs (*batch, *shape) in the caller's dtype."""
        if self.dtype != torch.float64:
            flat = [y.to(self.dtype) for y in flat]
        return tuple([y.view(shape) for y, shape in zip(flat, self.shapes)])

    def flattened(self, gradient: Tensor, k: int) -> Tensor:
        """The gradient of output k as (B, size) float64."""
        return gradient.reshape(self.size, self.node.outputs[k].shape[0]).to(torch.float64)

    def gradients(self, data: ProgramData) -> Callable[[Piece], Any]:
        """From the gradient of the data a function: the values (rows, size) of a piece's gradient, None for zero.

        Arrays on the host, where slices of tensors would cost more than a small solve.
        """
        shared, varying = self.map.gradient_on_host(data) if self.host else self.map.gradient(data)
        if self.host:
            shared = shared[None]

        def part(piece: Piece) -> Any:
            source = varying if piece.batched else shared
            return None if source is None else source[:, piece.start : piece.stop]

        return part


@dataclass(eq=False)
class Call:
    """One forward pass: its plan and options, and the solution it leaves behind."""

    plan: Plan
    options: Options
    limited: bool
    warm: Solution | None
    solution: Any = None


class Solve(torch.autograd.Function):
    """Parameters (*batch, *shape) -> outputs (*batch, *shape); backward is the adjoint of the optimality conditions."""

    @staticmethod
    def forward(ctx: Any, call: Call, *params: Tensor) -> tuple[Tensor, ...]:
        plan, node = call.plan, call.plan.node
        solution = node.solver.solve(node.compiled.program, plan.data(params), call.options, call.warm)
        call.solution = solution
        raw = plan.outputs(solution)
        ctx.usable = None  # all samples
        if not solution.all_solved:
            usable = solution.ok
            if call.limited:
                usable = usable | ((solution.status == Status.FAILED) & torch.isfinite(solution.x).all(1))
            if not bool(usable.all()):
                raw = node.fill(~usable, raw)
            ctx.usable = usable
        ctx.call, ctx.raw = call, raw if plan.exponential else None
        ctx.save_for_backward(*params)
        return plan.shaped(raw)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or any(map(is_legacy_batchedtensor, grads)):
            return None, *_by_operators(ctx, grads)
        call, params = ctx.call, ctx.saved_tensors
        plan, solution = call.plan, call.solution
        dx, dz = _upstream(ctx, grads)
        if ctx.usable is not None:
            status = torch.where(ctx.usable, solution.status.clamp(max=Status.INACCURATE), Status.FAILED)
            solution = solution.replaced(status=status)
        if not getattr(plan.node.solver, "takes_arrays", False):
            dx, dz = as_tensor(dx), as_tensor(dz)
        part = plan.gradients(plan.node.solver.adjoint(solution, dx, dz))
        result: list[Tensor | None] = [None] * len(params)
        for p in plan.pieces:
            if ctx.needs_input_grad[p.index + 1]:
                g = _gradient(part(p), params[p.index], p.log)
                result[p.index] = g if result[p.index] is None else result[p.index] + g
        return None, *result


def _gradient(values: Any, parameter: Tensor, log: bool) -> Tensor:
    """A parameter's gradient from that of its feature, the parameter itself or its logarithm."""
    if values is None:
        return torch.zeros_like(parameter)
    if isinstance(values, np.ndarray):
        g = torch.from_numpy(values.reshape(parameter.shape))
    else:
        g = values.reshape(parameter.shape)
    g = g if g.dtype == parameter.dtype else g.to(parameter.dtype)
    return g / parameter if log else g


def _all_finite(value: np.ndarray) -> bool:
    """False with a NaN or inf, and maybe where the sum overflows; check_finite then looks again."""
    if value.size <= SMALL:
        flat = value.reshape(-1)
        return math.isfinite(flat.dot(flat))
    with np.errstate(all="ignore"):
        return math.isfinite(value.sum())


def _upstream(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """Gradients to the canonical x (B, n) and z (B, m), arrays on the host; zero where there is no solution."""
    plan = ctx.call.plan
    total: dict[bool, Any] = {False: None, True: None}
    for k, (recovery, matrix) in enumerate(zip(plan.node.compiled.outputs, plan.node.outputs)):
        if plan.host and ctx.usable is None and not recovery.exp:
            g = grads[k].numpy().reshape(plan.size, matrix.shape[0])
            g = matrix.on_host(g if g.dtype == np.float64 else g.astype(np.float64), True)
        else:
            g = plan.flattened(grads[k], k)
            g = g * ctx.raw[k] if recovery.exp else g
            g = g if ctx.usable is None else torch.where(ctx.usable[:, None], g, 0.0)
            g = matrix.on_host(g.numpy(), True) if plan.host else matrix.transposed(g)
        total[recovery.dual] = g if total[recovery.dual] is None else total[recovery.dual] + g
    program, like = plan.node.compiled.program, grads[0]
    for dual, width in ((False, program.n), (True, program.m)):
        if total[dual] is None:
            shape = plan.size, width
            total[dual] = np.zeros(shape) if plan.host else like.new_zeros(shape, dtype=torch.float64)
    return total[False], total[True]


def _by_operators(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The gradient as a differentiable function of the parameters: through the operators, which can all orders."""
    if any(map(is_legacy_batchedtensor, grads)):
        raise OptionError(
            "batched gradients of torch.autograd (is_grads_batched=True, vectorize=True) do not reach solvers; use "
            "torch.func.jacrev, torch.func.vmap, or vectorize=False"
        )
    call, params = ctx.call, ctx.saved_tensors
    with torch.enable_grad():
        found = call.plan.node.again(params, call.options, call.limited)
    needed = [k for k in range(len(params)) if ctx.needs_input_grad[k + 1]]
    gradients = torch.autograd.grad(
        found, [params[k] for k in needed], grads, create_graph=torch.is_grad_enabled(), allow_unused=True
    )
    result: list[Tensor | None] = [None] * len(params)
    for k, g in zip(needed, gradients):
        result[k] = g
    return tuple(result)
