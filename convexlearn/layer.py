"""ConvexLayer: a parametrized CVXPY problem and a solver as one autograd node; drop-in for CvxpyLayer."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convexlearn.errors import InaccurateWarning, LimitWarning, OptionError, ShapeError, SolverError, suggest
from convexlearn.failures import collector
from convexlearn.layer_arguments import (
    as_tensor,
    batch_shape,
    check_declaration,
    check_value,
    concatenate,
    count_text,
    failure_text,
    fallback_rows,
    is_limited,
    read_options,
    result_type,
)
from convexlearn.program.compiler import Compiled, compile_problem
from convexlearn.program.data_map import DataMap, SparseMap
from convexlearn.program.declaration import Declaration, quiet
from convexlearn.program.program import Solution, Status
from convexlearn.program.self_check import self_check
from convexlearn.solvers import choose, find
from convexlearn.solvers.base import Options, Solver

POLICIES = ("raise", "nan", "fallback")


@dataclass(frozen=True, eq=False)
class LayerSolution:
    """What `ConvexLayer.solve` returns; the batch shape is () for unbatched parameters.

    variables: tuple of tensors (*batch, *shape), differentiable; ok and status: (*batch,);
    iterations and residual (relative KKT residual): (*batch,). `status` holds values of Status.
    `limited` says that the caller set an iteration or time limit.
    """

    variables: tuple[Tensor, ...]
    ok: Tensor
    status: Tensor
    iterations: Tensor
    residual: Tensor
    solution: Solution
    limited: bool = False

    def detach(self) -> "LayerSolution":
        """The same without the autograd graph, to be kept for a warm start."""
        return replace(self, variables=tuple(v.detach() for v in self.variables))


class ConvexLayer(nn.Module):
    """Solve a parametrized convex problem for a batch of parameter values, differentiably.

    problem: a DPP `cvxpy.Problem` (parametric `quad_form(x, P)` in the objective is fine).
    parameters: its parameters, in the order of the arguments of forward. variables: what forward
    returns: variables, dual variables (`constraint.dual_variables[0]`) or affine expressions.
    solver: None, a name in `convexlearn.solvers.SOLVERS`, or a Solver. solver_args: options of the
    solver. on_failure: "raise", "nan" (NaN rows, zero gradient) or "fallback" (rows of `fallback`,
    zero gradient). check: compare the compiled problem with CVXPY's own data on one instance.

    Raises CompileError for problems that are not DPP, OptionError for unknown options. Reference:
    Agrawal, Amos, Barratt, Boyd, Diamond, Kolter, Differentiable convex optimization layers (2019).

    >>> import cvxpy as cp, torch
    >>> x, target = cp.Variable(2), cp.Parameter(2, name="target")
    >>> problem = cp.Problem(cp.Minimize(cp.sum_squares(x - target)), [x >= 0])
    >>> layer = ConvexLayer(problem, [target], [x])
    >>> layer(torch.tensor([1.0, -1.0]))[0].abs()
    tensor([1., 0.])
    """

    def __init__(
        self,
        problem: Any,
        parameters: Sequence[Any],
        variables: Sequence[Any],
        solver: str | Solver | None = None,
        gp: bool = False,
        verbose: bool = False,
        canon_backend: str | None = None,
        solver_args: dict[str, Any] | None = None,
        on_failure: str = "raise",
        fallback: Any = None,
        *,
        check: bool = True,
    ) -> None:
        super().__init__()
        check_declaration(problem, parameters, variables)
        if on_failure not in POLICIES:
            raise OptionError(f"on_failure='{on_failure}': {suggest(on_failure, POLICIES)}")
        self.on_failure, self.gp = on_failure, gp
        self._declaration = Declaration.of(problem, parameters, variables)
        self._compiled, self._solver = _compile(self._declaration, solver, gp, canon_backend)
        if check:
            self_check(self._compiled, self._declaration, gp, self._solver.native_objective)
        self._options = read_options(self._solver, self._solver.options(verbose=verbose), solver_args or {})
        self._explicit_limit = is_limited(solver_args or {})
        self._outputs = tuple(SparseMap(r.matrix) for r in self._compiled.outputs)
        self._maps: dict[tuple[bool, ...], DataMap] = {}
        self._last: LayerSolution | None = None
        self._fallback = fallback_rows(fallback, self._compiled, on_failure)

    def forward(
        self,
        *params: Any,
        solver_args: dict[str, Any] | None = None,
        warm_start: "LayerSolution | bool" = False,
        **by_name: Any,
    ) -> tuple[Tensor, ...]:
        """Optimal values (*batch, *shape) of the variables, one tensor each.

        params: tensors, arrays or numbers (*batch, *shape), in order or by CVXPY name; parameters
        without leading dimensions are shared by the batch. The result has their dtype and device.
        Raises ShapeError, DomainError, MissingParameterError, and SolverError by `on_failure`.
        """
        result = self._run(params, by_name, solver_args, warm_start)
        self.judge(result)
        return result.variables

    def solve(
        self,
        *params: Any,
        solver_args: dict[str, Any] | None = None,
        warm_start: "LayerSolution | bool" = False,
        **by_name: Any,
    ) -> LayerSolution:
        """As forward, with status per sample; never raises on a status (failed rows are NaN or `fallback`)."""
        return self._run(params, by_name, solver_args, warm_start)

    def judge(self, result: LayerSolution) -> None:
        """Raise SolverError or warn by the statuses of a result of `solve`, as forward does."""
        status = result.solution.status
        if not bool((status != Status.SOLVED).any()):
            return
        stopped = (status == Status.FAILED) & torch.isfinite(result.solution.x).all(1) & result.limited
        failed = ~result.solution.ok & ~stopped
        shape = result.status.shape
        if bool(stopped.any()):
            text = f"{count_text(stopped, shape)} stopped at the limit that was set; the last iterate is returned"
            warnings.warn(text, LimitWarning, stacklevel=3)
        if bool((status == Status.INACCURATE).any()):
            inaccurate = status == Status.INACCURATE
            worst = float(result.solution.residual[inaccurate].max())
            warnings.warn(
                f"{count_text(inaccurate, shape)} solved to a relative KKT residual of {worst:.1e} only; scale the "
                "problem's data, or try another solver",
                InaccurateWarning,
                stacklevel=3,
            )
        if bool(failed.any()) and self.on_failure == "raise" and collector() is None:
            raise SolverError(failure_text(failed, status, shape))

    @property
    def solver(self) -> Solver:
        """The solver that this layer uses."""
        return self._solver

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """CVXPY names of the parameters, in the order of forward's arguments."""
        return tuple(p.name for p in self._compiled.parameters)

    def problem(self, **values: Any) -> Any:
        """A fresh copy of the CVXPY problem, parameters set by name to `values`."""
        copy = self._declaration.copy()
        for parameter in copy.parameters:
            if parameter.name() in values:
                value = values.pop(parameter.name())
                with quiet():
                    parameter.value = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        for name in values:
            raise OptionError(f"no parameter named '{name}'; {suggest(name, self.parameter_names)}")
        return copy.problem

    def extra_repr(self) -> str:
        """Parameters, outputs, solver and sizes."""
        program = self._compiled.program
        inputs = ", ".join(f"{p.name} {p.shape} {p.domain.describe()}" for p in self._compiled.parameters)
        outputs = ", ".join(f"{o.name} {o.shape}" for o in self._compiled.outputs)
        return (
            f"parameters: {inputs or 'none'}\nreturns: {outputs}\n"
            f"solver: {self._solver.name}, {program.n} variables, {program.m} rows, on_failure={self.on_failure!r}"
        )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_last": None}

    def _run(
        self, params: tuple, by_name: dict, solver_args: dict | None, warm_start: LayerSolution | bool
    ) -> LayerSolution:
        values = self._bind(params, by_name)
        batch, batched = batch_shape(self._compiled, values)
        dtype = result_type(values)
        size = int(np.prod(batch, dtype=int))
        flat = tuple(
            v.reshape(size if b else 1, int(np.prod(p.shape, dtype=int))).to(torch.float64)
            for v, b, p in zip(values, batched, self._compiled.parameters)
        )
        for spec, value in zip(self._compiled.parameters, values):
            check_value(spec, value.detach())
        options = self._options if not solver_args else read_options(self._solver, self._options, solver_args)
        limited = self._explicit_limit or is_limited(solver_args or {})
        call = _Call(self, self._map(batched), batched, size, options, limited, self._warm(warm_start, size))
        raw = _Solve.apply(call, *flat)
        variables = tuple(r.to(dtype).reshape((*batch, *o.shape)) for r, o in zip(raw, self._compiled.outputs))
        s = call.solution
        result = LayerSolution(
            variables, s.ok.reshape(batch), s.status.reshape(batch), s.iterations.reshape(batch),
            s.residual.reshape(batch), s, limited,
        )  # fmt: skip
        if warm_start is True:
            self._last = result.detach()
        return result

    def _bind(self, params: tuple, by_name: dict[str, Any]) -> list[Tensor]:
        """Arguments by position, then by name, as tensors on one device."""
        names = self.parameter_names
        given = dict(zip(names, params))
        for name, value in by_name.items():
            if name not in names:
                raise OptionError(f"no parameter named '{name}'; {suggest(name, names)}")
            if name in given:
                raise OptionError(f"parameter '{name}' is given twice, by position and by name")
            given[name] = value
        if len(params) > len(names) or len(given) != len(names):
            missing = [n for n in names if n not in given]
            raise ShapeError(
                f"A tensor must be provided for each CVXPY parameter; received {len(params) + len(by_name)} "
                f"tensors, expected {len(names)}" + (f"; missing: {', '.join(missing)}" if missing else "")
            )
        return [as_tensor(n, given[n]) for n in names]

    def _map(self, batched: tuple[bool, ...]) -> DataMap:
        key = tuple(batched[f.index] for f in self._compiled.features)
        if key not in self._maps:
            sizes = [int(np.prod(p.shape, dtype=int)) for p in self._compiled.parameters]
            widths = tuple(sizes[f.index] for f in self._compiled.features)
            self._maps[key] = DataMap(self._compiled, widths, key)
        return self._maps[key]

    def _warm(self, warm_start: LayerSolution | bool, size: int) -> Solution | None:
        last = self._last if warm_start is True else warm_start
        if isinstance(last, LayerSolution) and last.solution.program is self._compiled.program:
            return last.solution if len(last.solution.x) == size else None
        return None

    def _filler(self, failed: Tensor, raw: list[Tensor]) -> list[Tensor]:
        """Rows of failed samples replaced by NaN, the fallback, or zeros while a simulator collects failures."""
        active = collector()
        if active is not None and self.on_failure == "raise":
            active.add(failed)
            rows: list[Tensor] = [r.new_zeros(r.shape[1]) for r in raw]
        elif self.on_failure == "fallback":
            rows = [f.to(r) for f, r in zip(self._fallback, raw)]
        else:
            rows = [r.new_full((r.shape[1],), torch.nan) for r in raw]
        return [torch.where(failed[:, None], row, r) for row, r in zip(rows, raw)]


@dataclass(eq=False)
class _Call:
    """One forward pass: what the autograd node needs, and the solution it leaves behind."""

    layer: ConvexLayer
    map: DataMap
    batched: tuple[bool, ...]
    size: int
    options: Options
    limited: bool
    warm: Solution | None
    solution: Any = None

    def features(self, params: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """(shared features and a final 1, batched features) from the flat parameters."""
        shared, batched = [], []
        for f in self.layer._compiled.features:
            value = params[f.index].log() if f.log else params[f.index]
            (batched if self.batched[f.index] else shared).append(value)
        like = params[0] if params else torch.zeros(1, 0, dtype=torch.float64)
        shared.append(like.new_ones(1, 1))
        return concatenate(shared), concatenate(batched) if batched else like.new_zeros(self.size, 0)

    def outputs(self, x: Tensor, z: Tensor, differentiable: bool = False) -> list[Tensor]:
        """Flat outputs (B, size) from the canonical solution."""
        apply = SparseMap.differentiable if differentiable else SparseMap.__call__
        result = []
        for recovery, matrix in zip(self.layer._compiled.outputs, self.layer._outputs):
            y = apply(matrix, z if recovery.dual else x)
            if recovery.offset.any():
                y = y + torch.as_tensor(recovery.offset, device=y.device)
            result.append(y.exp() if recovery.exp else y)
        return result


class _Solve(torch.autograd.Function):
    """Parameters (1 or B, k) -> outputs (B, size); backward is the adjoint of the optimality conditions."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *params: Tensor) -> tuple[Tensor, ...]:
        data = call.map(*call.features(params), call.size)
        layer, program = call.layer, call.layer._compiled.program
        solution = layer._solver.solve(program, data, call.options, call.warm)
        call.solution = solution
        usable = solution.ok
        if call.limited:
            usable = usable | ((solution.status == Status.FAILED) & torch.isfinite(solution.x).all(1))
        raw = call.outputs(solution.x, solution.z)
        if not bool(usable.all()):
            raw = layer._filler(~usable, raw)
        ctx.call, ctx.usable, ctx.raw = call, usable, raw if layer.gp else None
        ctx.save_for_backward(*params)
        return tuple(raw)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return None, *_second_order(ctx, grads)
        call, params = ctx.call, ctx.saved_tensors
        solution = call.solution
        complete = bool(ctx.usable.all())
        dx = dz = None
        for k, (recovery, matrix) in enumerate(zip(call.layer._compiled.outputs, call.layer._outputs)):
            g = grads[k] * ctx.raw[k] if recovery.exp else grads[k]
            g = matrix.transposed((g if complete else torch.where(ctx.usable[:, None], g, 0.0)).contiguous())
            if recovery.dual:
                dz = g if dz is None else dz + g
            else:
                dx = g if dx is None else dx + g
        dx, dz = _or_zeros(dx, solution.x), _or_zeros(dz, solution.z)
        if not complete or call.limited:
            status = torch.where(ctx.usable, solution.status.clamp(max=Status.INACCURATE), Status.FAILED)
            solution = replace(solution, status=status)
        gradient = call.layer._solver.adjoint(solution, dx, dz)
        shared, varying = call.map.gradient(gradient)
        result: list[Tensor | None] = [None] * len(params)
        offset = {False: 0, True: 0}
        for f in call.layer._compiled.features:
            kind, width = call.batched[f.index], params[f.index].shape[1]
            start = offset[kind]
            offset[kind] = start + width
            if not ctx.needs_input_grad[f.index + 1]:
                continue
            source = varying if kind else shared
            g = torch.zeros_like(params[f.index]) if source is None else source[:, start : start + width]
            g = g / params[f.index] if f.log else g
            result[f.index] = g if result[f.index] is None else result[f.index] + g
        return None, *result


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    if gradient is None:  # numpy's zeros cost nothing until they are read, torch's start its threads
        gradient = torch.from_numpy(np.zeros(like.shape)) if like.device.type == "cpu" else torch.zeros_like(like)
    return gradient


def _second_order(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The gradient as a differentiable function, on the active set that the solution found."""
    call, params = ctx.call, ctx.saved_tensors
    solver = call.layer._solver
    if not hasattr(solver, "differentiable"):
        raise OptionError(f"second derivatives need a solver for QPs and LPs; '{solver.name}' has none")
    data = call.map(*call.features(params), call.size, differentiable=True)
    usable = ctx.usable[:, None]
    x, z = solver.differentiable(call.solution, data)
    raw = call.outputs(x, z, differentiable=True)
    raw = [torch.where(usable, r, 0.0) for r in raw]
    needed = [k for k in range(len(params)) if ctx.needs_input_grad[k + 1]]
    masked = [torch.where(usable, g, 0.0) for g in grads]
    found = torch.autograd.grad(raw, [params[k] for k in needed], masked, create_graph=True, allow_unused=True)
    result: list[Tensor | None] = [None] * len(params)
    for k, g in zip(needed, found):
        result[k] = g
    return tuple(result)


def _compile(
    declaration: Declaration, solver: str | Solver | None, gp: bool, canon_backend: str | None
) -> tuple[Compiled, Solver]:
    """Compile with a quadratic objective, or again without one where the chosen solver takes none."""
    chosen = find(solver) if solver is not None else None
    native = chosen is None or chosen.native_objective
    compiled = compile_problem(declaration, gp=gp, native_objective=native, canon_backend=canon_backend)
    chosen = choose(compiled.program) if chosen is None else chosen
    if native and not chosen.native_objective:
        compiled = compile_problem(declaration, gp=gp, native_objective=False, canon_backend=canon_backend)
    reason = chosen.supports(compiled.program)
    if reason is not None:
        raise OptionError(f"solver '{chosen.name}' does not take this problem: {reason}; leave solver=None")
    return compiled, chosen
