"""ConvexLayer: a parametrized CVXPY problem and a solver as one autograd node; drop-in for CvxpyLayer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from convexlearn.checks import FLAG, checked, shown, word
from convexlearn.errors import OptionError, ShapeError, suggest
from convexlearn.failures import collector
from convexlearn.inputs import as_tensor
from convexlearn.layer_arguments import (
    batch_shape,
    check_declaration,
    fallback_rows,
    is_limited,
    judge,
    read_options,
    result_type,
)
from convexlearn.layer_node import Call, Node, Plan, Solve
from convexlearn.layer_transforms import outputs, transformed
from convexlearn.operators import Prepared, Settings
from convexlearn.program.absent_rows import without_absent_rows
from convexlearn.program.compiler import Compiled, compile_problem
from convexlearn.program.data_map import DataMap, SparseMap
from convexlearn.program.declaration import Declaration, quiet
from convexlearn.program.program import Solution
from convexlearn.program.self_check import self_check
from convexlearn.solvers import choose, find
from convexlearn.solvers.base import Options, Solver

POLICIES = ("raise", "nan", "fallback")
BACKENDS = ("COO", "CPP", "NUMPY", "RUST", "SCIPY")  # of CVXPY's canonicalization
MOST_PLANS = 64  # layouts kept, one for each combination of shapes and dtypes that was seen


@dataclass(frozen=True, eq=False)
class LayerSolution:
    """What `ConvexLayer.solve` returns; the batch shape is () for unbatched parameters.

    variables: tuple of tensors (*batch, *shape), differentiable; ok and status: (*batch,);
    iterations and residual (relative KKT residual): (*batch,). `status` holds values of Status.
    `limited` says that the caller set an iteration or time limit.
    """

    variables: tuple[Tensor, ...]
    solution: Solution
    batch: tuple[int, ...]
    limited: bool = False

    @property
    def ok(self) -> Tensor:
        """(*batch,) True where the sample is solved, maybe inaccurately."""
        return self.solution.ok.reshape(self.batch)

    @property
    def status(self) -> Tensor:
        """(*batch,) values of Status."""
        return self.solution.status.reshape(self.batch)

    @property
    def iterations(self) -> Tensor:
        """(*batch,) iterations of the solver."""
        return self.solution.iterations.reshape(self.batch)

    @property
    def residual(self) -> Tensor:
        """(*batch,) relative KKT residual."""
        return self.solution.residual.reshape(self.batch)

    def detach(self) -> "LayerSolution":
        """The same without the autograd graph, to be kept for a warm start."""
        return replace(self, variables=tuple(v.detach() for v in self.variables))


class ConvexLayer(nn.Module):
    """Solve a parametrized convex problem for a batch of parameter values, differentiably.

    problem: a DPP `cvxpy.Problem` (parametric `quad_form(x, P)` in the objective is fine).
    parameters: its parameters, in the order of the arguments of forward. variables: what forward
    returns: variables, dual variables (`constraint.dual_variables[0]`) or affine expressions.
    solver: None, a name in `convexlearn.solvers.SOLVERS`, or a Solver. Names of CVXPY's solvers (ECOS, SCS, ...)
    stand for None: a solver of our own does the work, and `layer.solver` and the layer's representation
    name it. solver_args: options of the solver. on_failure: "raise", "nan" (NaN rows, zero gradient)
    or "fallback" (rows of `fallback`, zero gradient). check: compare the compiled problem with
    CVXPY's own data on one instance.

    Raises CompileError for problems that are not DPP, OptionError for unknown options. Reference:
    Agrawal, Amos, Barratt, Boyd, Diamond, Kolter, Differentiable convex optimization layers (2019).

    >>> import cvxpy as cp, torch
    >>> x, target = cp.Variable(2), cp.Parameter(2, name="target")
    >>> problem = cp.Problem(cp.Minimize(cp.sum_squares(x - target)), [x >= 0])
    >>> layer = ConvexLayer(problem, [target], [x])
    >>> layer(torch.tensor([1.0, -1.0]))[0].abs()
    tensor([1., 0.])
    """

    compiles_when_called: ClassVar[bool] = True
    """The first call may compile kernels, which is no part of the time of a decision."""

    @checked(gp=FLAG, verbose=FLAG, check=FLAG, canon_backend=word(BACKENDS), on_failure=word(POLICIES))
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
        self.on_failure, self.gp = on_failure, gp
        self._instead_of = solver if isinstance(solver, str) and find(solver) is None else None
        self._declaration = Declaration.of(problem, parameters, variables)
        self._compiled, self._solver = _compile(self._declaration, solver, gp, canon_backend)
        if check:
            self_check(self._compiled, self._declaration, gp, self._solver.native_objective)
        self._compiled = without_absent_rows(self._compiled)
        self._prepared = Prepared.of(self._compiled, self._solver)
        self._options = read_options(self._solver, self._solver.options(verbose=verbose), solver_args or {})
        self._explicit_limit = is_limited(solver_args or {})
        self._names = tuple(p.name for p in self._compiled.parameters)
        self._bounded = tuple(k for k, p in enumerate(self._compiled.parameters) if p.domain.checked)
        self._maps: dict[tuple[bool, ...], DataMap] = {}
        self._plans: dict[tuple, Plan] = {}
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
        return self.judged(*params, solver_args=solver_args, warm_start=warm_start, **by_name).variables

    def solve(
        self,
        *params: Any,
        solver_args: dict[str, Any] | None = None,
        warm_start: "LayerSolution | bool" = False,
        **by_name: Any,
    ) -> LayerSolution:
        """As forward, with status per sample; never raises on a status (failed rows are NaN or `fallback`)."""
        return self._run(params, by_name, solver_args, warm_start)

    def judged(
        self,
        *params: Any,
        solver_args: dict[str, Any] | None = None,
        warm_start: "LayerSolution | bool" = False,
        **by_name: Any,
    ) -> LayerSolution:
        """As solve, but raises SolverError or warns by the statuses, as forward does."""
        result = self._run(params, by_name, solver_args, warm_start, quiet=False)
        if not transformed():  # else the operator has done it
            judge(result.solution, result.batch, result.limited, self.on_failure)
        return result

    @property
    def solver(self) -> Solver:
        """The solver that this layer uses."""
        return self._solver

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """CVXPY names of the parameters, in the order of forward's arguments."""
        return self._names

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
        solver = self._solver.name + (f" (in place of {self._instead_of})" if self._instead_of else "")
        return (
            f"parameters: {inputs or 'none'}\nreturns: {outputs}\n"
            f"solver: {solver}, {program.n} variables, {program.m} rows, on_failure={self.on_failure!r}"
        )

    def __getstate__(self) -> dict:
        state = {**self.__dict__, "_last": None, "_plans": {}}
        state.pop("_node", None)  # holds a method of this layer, not of the copy
        return state

    def _run(
        self,
        params: tuple,
        by_name: dict,
        solver_args: dict | None,
        warm_start: LayerSolution | bool,
        quiet: bool = True,
    ) -> LayerSolution:
        values = self._bind(params, by_name)
        if transformed():
            return self._by_operators(values, self._settings(quiet, **(solver_args or {})))
        key = tuple([(v.shape, v.dtype, v.device) for v in values])
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            plan = self._plans.setdefault(key, Plan.of(self._node, self._maps, values))
        for k in self._bounded:
            spec = self._compiled.parameters[k]
            spec.domain.check(spec.name, values[k].detach())
        options, limited = self._options, self._explicit_limit
        if solver_args:
            options = read_options(self._solver, options, solver_args)
            limited = limited or is_limited(solver_args)
        if warm_start is not False and not isinstance(warm_start, bool | LayerSolution | None):
            raise OptionError(f"warm_start must be a LayerSolution, or True for the last one; got {shown(warm_start)}")
        call = Call(plan, options, limited, self._warm(warm_start, plan.size) if warm_start else None)
        variables = Solve.apply(call, *values)
        result = LayerSolution(variables, call.solution, plan.batch, limited)
        if warm_start is True:
            self._last = result.detach()
        return result

    def _by_operators(self, values: list[Tensor], settings: str) -> LayerSolution:
        """Through PyTorch's dispatcher: under transforms, compiled or exported; a warm start has no effect there."""
        batch, batched = batch_shape(self._compiled, values)
        size, prepared = math.prod(batch), self._prepared
        widths = prepared.layout.widths
        flat = [v.reshape(size if k else 1, w).to(torch.float64) for v, k, w in zip(values, batched, widths)]
        *found, x, z, status, iterations, residual = outputs(
            prepared.layout, prepared.structure, settings, list(self._fallback), *flat
        )
        dtype = result_type(values)
        shaped = [y.to(dtype).reshape((*batch, *r.shape)) for y, r in zip(found, self._compiled.outputs)]
        none: Any = None  # the data stay inside the operator
        solution = Solution(self._compiled.program, none, x, z, status, iterations, residual)
        return LayerSolution(tuple(shaped), solution, batch)

    @torch.compiler.assume_constant_result
    def _settings(self, quiet: bool, **solver_args: Any) -> str:
        options = read_options(self._solver, self._options, solver_args)
        limited = self._explicit_limit or is_limited(solver_args)
        return Settings(options, self.on_failure, quiet, limited).text()

    def _bind(self, params: tuple, by_name: dict[str, Any]) -> list[Tensor]:
        """Arguments by position, then by name, as tensors on one device."""
        names = self.parameter_names
        if not by_name and len(params) == len(names):
            return [as_tensor(name, value) for name, value in zip(names, params)]
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

    @cached_property
    def _node(self) -> Node:
        compiled = self._compiled
        outputs = tuple(SparseMap(r.matrix) for r in compiled.outputs)
        sizes = tuple(math.prod(p.shape) for p in compiled.parameters)
        return Node(compiled, self._solver, outputs, sizes, self._filler, self._again)

    def _again(self, values: Sequence[Tensor], options: Options, limited: bool) -> tuple[Tensor, ...]:
        """The same outputs by the operators, for gradients that are differentiated themselves."""
        return self._by_operators(list(values), Settings(options, self.on_failure, True, limited).text()).variables

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


def _compile(
    declaration: Declaration, solver: str | Solver | None, gp: bool, canon_backend: str | None
) -> tuple[Compiled, Solver]:
    """Compile with a quadratic objective, or again without one where the chosen solver takes none."""
    chosen = find(solver)
    native = chosen is None or chosen.native_objective
    compiled = compile_problem(declaration, gp=gp, native_objective=native, canon_backend=canon_backend)
    chosen = choose(compiled.program) if chosen is None else chosen
    if native and not chosen.native_objective:
        compiled = compile_problem(declaration, gp=gp, native_objective=False, canon_backend=canon_backend)
    reason = chosen.supports(compiled.program)
    if reason is not None:
        raise OptionError(f"solver '{chosen.name}' does not take this problem: {reason}; leave solver=None")
    return compiled, chosen
