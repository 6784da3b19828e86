"""A layer under PyTorch's transforms: autograd.Functions over the operators, differentiable to any order.

Both modes and every order come from one symmetric linear map S, the inverse of the differentiated
optimality conditions (`operators.adjoint`): with r = (-dq - dP x - dA'z, db - dA x),

    forward   (dx, dz) = S r            reverse   (wx, wz) = S (gradient to x, to z), then products of w, x, z

S itself is differentiated through its system: dS r = S (dr - (change of the system) S r). What is not
linear in it is V, the derivative of the projection on the dual cone at z - s (`solvers/curvature.py`).
"""

import json
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from convexlearn.operators import batch_of
from convexlearn.program.structure import Layout
from convexlearn.solvers.curvature import curvature, is_flat


def transformed() -> bool:
    """Whether a transform, a tracer or forward-mode differentiation is at work; a fraction of a microsecond."""
    return (
        torch.compiler.is_compiling()
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


def outputs(
    layout: Layout, structure: Tensor, settings: str, fallback: list[Tensor], *params: Tensor
) -> tuple[Tensor, ...]:
    """Raw parameters (1 or B, k) -> outputs (B, size), then x, z, status, iterations, residual.

    Rows of samples that are not usable are those of `fallback`, one for each output, if there are any.
    """
    x, z, status, iterations, residual, usable, collected = Optimum.apply(layout, settings, structure, *params)  # type: ignore
    result = []
    structure = structure.to(x.device)
    for k, output in enumerate(layout.outputs):
        ends = [output.start + i * output.nnz for i in range(4)]
        rows, cols, bits = (structure[a:b] for a, b in pairwise(ends))
        offset = structure[ends[3] : ends[3] + output.size].view(torch.float64)
        y = _multiply(z if output.dual else x, cols, rows, bits, output.size) + offset
        y = y.exp() if output.exp else y
        row = fallback[k].to(y) if fallback else torch.where(collected, 0.0, torch.nan)[:, None]
        result.append(torch.where(usable[:, None], y, row))
    return *result, x, z, status, iterations, residual


def nested(rule: Callable[..., tuple]) -> Callable[..., tuple]:
    """A jvp rule(ctx, saved, *tangents) that an outer forward mode differentiates again.

    PyTorch calls jvp with forward mode switched off for the levels around it too, which loses their tangents
    without an error. Here it is on, and the saved tensors are stripped of the tangents of this level.
    """

    def jvp(ctx: Any, *tangents: Any) -> tuple:
        with forward_ad._set_fwd_grad_enabled(True):
            return rule(ctx, [forward_ad.unpack_dual(v, level=0).primal for v in ctx.saved_tensors], *tangents)

    return jvp


class Optimum(torch.autograd.Function):
    """(layout, settings, structure, *parameters) -> what `operators.solve` returns; x and z are differentiable."""

    @staticmethod
    def forward(layout: Layout, settings: str, structure: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.convexlearn.solve(structure, list(params), layout.n, layout.m, settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.layout, ctx.settings, *tensors = inputs
        x, z, *rest = output
        ctx.mark_non_differentiable(*rest)
        ctx.save_for_backward(*tensors, rest[3], x, z)
        ctx.save_for_forward(*tensors, rest[3], x, z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        structure, *params, usable, x, z = ctx.saved_tensors
        point = (ctx.layout, ctx.settings, structure, usable, x, z)
        w = Adjoint.apply(*point, grads[0][:, None], grads[1][:, None], *params)
        entries = _data_gradient(_Index.of(ctx.layout, structure, x), (x[:, None], z[:, None]), w, True)
        return None, None, None, *_pull_back(ctx.layout, structure, params, entries)

    @staticmethod
    @nested
    def jvp(ctx: Any, saved: list[Tensor], *tangents: Any) -> tuple[Tensor | None, ...]:
        structure, *params, usable, x, z = saved
        point = (ctx.layout, ctx.settings, structure, usable, x, z)
        index, moved = _Index.of(ctx.layout, structure, x), _push_forward(ctx.layout, structure, params, tangents[3:])
        dP, dq, dA, db = moved.split(ctx.layout.entries, 1)
        rx = -dq - index.symmetric(dP, x) - index.transposed(dA, z)
        rz = db - index.product(dA, x)
        dx, dz = Adjoint.apply(*point, rx[:, None], rz[:, None], *params)
        return dx[:, 0], dz[:, 0], None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        layout, settings, structure, *params = args
        params = _folded(params, in_dims[3:], info.batch_size)
        found = Optimum.apply(layout, settings, structure, *params)
        size = info.batch_size
        return tuple(v.reshape(size, v.shape[0] // size, *v.shape[1:]) for v in found), (0,) * len(found)


class Adjoint(torch.autograd.Function):
    """(layout, settings, structure, usable, x, z, rx, rz, *parameters) -> S (rx, rz), as `operators.adjoint`."""

    @staticmethod
    def forward(
        layout: Layout, settings: str, structure: Tensor, usable: Tensor, x: Tensor, z: Tensor, *rest: Tensor
    ) -> tuple[Tensor, Tensor]:
        rx, rz, *params = rest
        return torch.ops.convexlearn.adjoint(structure, params, x, rx, rz, settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.layout, ctx.settings, *tensors = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        structure, usable, x, z, _, rz, *params, wx, wz = ctx.saved_tensors
        layout = ctx.layout
        index = _Index.of(layout, structure, x)
        ux, uz = Adjoint.apply(layout, ctx.settings, structure, usable, x, z, *grads, *params)
        _, _, A, b = _entries(layout, structure, params).split(layout.entries, 1)
        gradient = _data_gradient(index, (wx, wz), (ux, uz), False)
        gx, gz = torch.zeros_like(x), torch.zeros_like(z)
        if not _flat(layout, ctx.settings):
            v = z - b + index.product(A, x)
            left, right = (q + index.product(A[:, None], p) - r for p, q, r in ((ux, uz, grads[1]), (wx, wz, rz)))
            bend = _bend(layout, ctx.settings, v, left, right, usable)
            gz = -bend.sum(1)
            gx = index.transposed(A, gz)
            gradient = gradient + _slack_gradient(index, gz, x)
        return None, None, None, None, gx, gz, ux, uz, *_pull_back(layout, structure, params, gradient)

    @staticmethod
    @nested
    def jvp(ctx: Any, saved: list[Tensor], *tangents: Any) -> tuple[Tensor, Tensor]:
        structure, usable, x, z, rx, rz, *params, wx, wz = saved
        layout = ctx.layout
        _, _, _, _, dx, dz, drx, drz, *rest = tangents
        pairs = (dx, x), (dz, z), (drx, rx), (drz, rz)
        dx, dz, drx, drz = (torch.zeros_like(v) if t is None else t for t, v in pairs)
        index = _Index.of(layout, structure, x)
        dP, _, dA, db = _push_forward(layout, structure, params, rest).split(layout.entries, 1)
        dP, dA_ = dP[:, None], dA[:, None]
        drx = drx - index.symmetric(dP, wx) - index.transposed(dA_, wz)
        drz = drz - index.product(dA_, wx)
        bend = torch.zeros_like(drz)
        if not _flat(layout, ctx.settings):
            _, _, A, b = _entries(layout, structure, params).split(layout.entries, 1)
            v = z - b + index.product(A, x)
            dv = dz - db + index.product(dA, x) + index.product(A, dx)
            right = wz + index.product(A[:, None], wx) - rz
            bend = _bend(layout, ctx.settings, v, dv[:, None].expand_as(right), right, usable)
            drx, drz = drx - index.transposed(A[:, None], bend), drz - bend
        dwx, dwz = Adjoint.apply(layout, ctx.settings, structure, usable, x, z, drx, drz, *params)
        return dwx, dwz + bend

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        layout, settings, structure, usable, x, z, rx, rz, *params = args
        size, (_, _, _, *dims) = info.batch_size, in_dims
        if all(d is None for k, d in enumerate(dims) if k not in (3, 4)):  # right-hand sides only
            rx, rz = (_front(r, d, size).movedim(0, 1).flatten(1, 2) for r, d in ((rx, dims[3]), (rz, dims[4])))
            found = Adjoint.apply(layout, settings, structure, usable, x, z, rx, rz, *params)
            return tuple(w.unflatten(1, (size, w.shape[1] // size)) for w in found), (1, 1)  # type: ignore
        usable, x, z, rx, rz = (_front(v, d, size).flatten(0, 1) for v, d in zip((usable, x, z, rx, rz), dims))
        if all(d is None for d in dims[5:]):  # nothing may stay shared where x is not
            params = [p.expand(len(x) // size, -1) for p in params]
        params = _folded(params, dims[5:], size)
        found = Adjoint.apply(layout, settings, structure, usable, x, z, rx, rz, *params)
        return tuple(w.unflatten(0, (size, w.shape[0] // size)) for w in found), (0, 0)  # type: ignore


class _Index:
    """Positions of the stored entries, and products with matrices given by them; leading dimensions broadcast."""

    def __init__(self, layout: Layout, structure: Tensor) -> None:
        self.layout, at = layout, layout.slices()
        self.P = structure[at["P.rows"]], structure[at["P.cols"]]
        self.A = structure[at["A.rows"]], structure[at["A.cols"]]

    @classmethod
    def of(cls, layout: Layout, structure: Tensor, like: Tensor) -> "_Index":
        return cls(layout, structure.to(like.device))

    def symmetric(self, P: Tensor, x: Tensor) -> Tensor:
        """P x for the symmetric matrix with the upper triangle P."""
        i, j = self.P
        off = (i != j).to(x.dtype)
        return _sum_at(P * x[..., j], i, self.layout.n) + _sum_at(P * off * x[..., i], j, self.layout.n)

    def product(self, A: Tensor, x: Tensor) -> Tensor:
        """A x."""
        i, j = self.A
        return _sum_at(A * x[..., j], i, self.layout.m)

    def transposed(self, A: Tensor, z: Tensor) -> Tensor:
        """A'z."""
        i, j = self.A
        return _sum_at(A * z[..., i], j, self.layout.n)


def _data_gradient(index: _Index, point: tuple, w: tuple, vectors: bool) -> Tensor:
    """Gradients of [P, q, A, b] (B, entries): products of a point and its adjoint w (B, k, .), summed over k.

    vectors: the point is (x, z), which q and b move as well; else it solves the system for another
    right-hand side.
    """
    (x, z), (wx, wz) = point, w
    i, j = index.P
    gP = -(wx[..., i] * x[..., j] + wx[..., j] * x[..., i]) * torch.where(i == j, 0.5, 1.0).to(x.dtype)
    i, j = index.A
    gA = -(z[..., i] * wx[..., j] + wz[..., i] * x[..., j])
    gq, gb = (-wx, wz) if vectors else (torch.zeros_like(wx), torch.zeros_like(wz))
    return torch.cat([gP, gq, gA, gb], -1).sum(1)


def _slack_gradient(index: _Index, gv: Tensor, x: Tensor) -> Tensor:
    """Gradients of [P, q, A, b] (B, entries) through v = z - b + Ax, given that to v (B, m)."""
    i, j = index.A
    layout = index.layout
    return torch.cat([gv.new_zeros(len(gv), layout.P + layout.n), gv[:, i] * x[:, j], -gv], 1)


def _bend(layout: Layout, settings: str, v: Tensor, a: Tensor, b: Tensor, usable: Tensor) -> Tensor:
    """The curvature term (B, k, m), zero where there is no solution."""
    found = curvature(v[:, None].expand_as(a), a, b, layout.cones, _smoothing(settings))
    return torch.where(usable[:, None, None], found, 0.0)


def _flat(layout: Layout, settings: str) -> bool:
    return is_flat(layout.cones, _smoothing(settings))


@cache
def _smoothing(settings: str) -> float:
    return float(json.loads(settings)["options"].get("smoothing", 0.0))


def _map(layout: Layout, structure: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    at = layout.slices()
    return structure[at["map.rows"]], structure[at["map.cols"]], structure[at["map.values"]]


def _entries(layout: Layout, structure: Tensor, params: list[Tensor]) -> Tensor:
    """[P, q, A, b] (B, entries) from raw parameters (1 or B, k)."""
    batch, parts = batch_of(params), []
    for k, log in layout.features:
        parts.append((params[k].log() if log else params[k]).expand(batch, -1))
    one = torch.ones(batch, 1, dtype=torch.float64, device=params[0].device if params else structure.device)
    rows, cols, bits = _map(layout, structure.to(one.device))
    return _multiply(torch.cat([*parts, one], 1), cols, rows, bits, sum(layout.entries))


def _push_forward(layout: Layout, structure: Tensor, params: list[Tensor], tangents: Any) -> Tensor:
    """Tangent of [P, q, A, b] (B, entries)."""
    batch, parts = batch_of(params), []
    for k, log in layout.features:
        tangent = torch.zeros_like(params[k]) if tangents[k] is None else tangents[k]
        parts.append((tangent / params[k] if log else tangent).expand(batch, -1))
    parts.append(params[0].new_zeros(batch, 1))
    rows, cols, bits = _map(layout, structure.to(params[0].device))
    return _multiply(torch.cat(parts, 1), cols, rows, bits, sum(layout.entries))


def _pull_back(layout: Layout, structure: Tensor, params: list[Tensor], gradient: Tensor) -> list[Tensor | None]:
    """Gradients of the raw parameters (1 or B, k) from that of [P, q, A, b] (B, entries)."""
    rows, cols, bits = _map(layout, structure.to(gradient.device))
    sizes = [params[k].shape[1] for k, _ in layout.features]
    found = _multiply(gradient, rows, cols, bits, sum(sizes) + 1)
    result: list[Tensor | None] = [None] * len(params)
    for (k, log), g in zip(layout.features, found.split([*sizes, 1], 1)):
        g = g.sum(0, keepdim=True) if params[k].shape[0] == 1 else g
        g = g / params[k] if log else g
        earlier = result[k]
        result[k] = g if earlier is None else earlier + g
    return result


def _multiply(v: Tensor, source: Tensor, target: Tensor, bits: Tensor, size: int) -> Tensor:
    """(B, size): entries `source` of v times float64 values, summed at `target`."""
    return _sum_at(v[..., source] * bits.view(torch.float64), target, size)


def _sum_at(v: Tensor, target: Tensor, size: int) -> Tensor:
    """(..., size) with the entries of v (..., k) added up at the positions `target`."""
    return v.new_zeros(*v.shape[:-1], size).index_add(-1, target, v)


def _front(v: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped dimension in front, expanded where v has none."""
    return v.expand(size, *v.shape) if dim is None else v.movedim(dim, 0)


def _folded(params: list[Tensor], dims: Sequence[int | None], size: int) -> list[Tensor]:
    """Parameters (1 or B, k), some mapped over `size`, as (1 or size B, k); what all share stays shared."""
    moved = [p if d is None else p.movedim(d, 0) for p, d in zip(params, dims)]
    batch = batch_of([p if d is None else p[0] for p, d in zip(moved, dims)])
    result = []
    for p, d in zip(moved, dims):
        if d is None and p.shape[0] == 1:
            result.append(p)
        else:
            result.append((p if d is not None else p[None]).expand(size, batch, -1).reshape(-1, p.shape[-1]))
    return result


torch.compiler.allow_in_graph(outputs)
