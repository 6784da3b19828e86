"""Arguments of a layer: options, tensors, batch shapes, each checked and named in errors."""

import logging
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from functools import reduce
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from convexlearn.checks import number, shown
from convexlearn.errors import (
    CompileError,
    DomainError,
    InaccurateWarning,
    LimitWarning,
    OptionError,
    ShapeError,
    SolverError,
    suggest,
)
from convexlearn.failures import collector
from convexlearn.inputs import as_tensor
from convexlearn.program.compiler import Compiled, ParameterSpec
from convexlearn.program.program import Solution, Status
from convexlearn.solvers.base import Options, Solver

logger = logging.getLogger(__name__)

ALIASES = {"eps": "tolerance", "tol": "tolerance", "max_iters": "max_iterations"}
IGNORED = ("acceleration_lookback", "solve_method", "mode")


def check_declaration(problem: Any, parameters: Any, variables: Any) -> None:
    if not isinstance(problem, cp.Problem):
        raise CompileError(f"the layer's problem must be a cvxpy.Problem, got {shown(problem)}")
    if not isinstance(parameters, list | tuple):
        raise CompileError("The layer's parameters must be provided as a list or tuple")
    if not isinstance(variables, list | tuple):
        raise CompileError("The layer's variables must be provided as a list or tuple")
    for p in parameters:
        if not isinstance(p, cp.Parameter):
            raise CompileError(f"The layer's parameters must be CVXPY parameters, got {shown(p)}")
    declared, given = ({p.id: p.name() for p in ps} for ps in (problem.parameters(), parameters))
    if declared.keys() != given.keys() or len(parameters) != len(given):
        missing = [name for i, name in declared.items() if i not in given]
        extra = [name for i, name in given.items() if i not in declared]
        raise CompileError(
            f"The layer's parameters must exactly match problem.parameters; missing: {missing}, not in the "
            f"problem: {extra}"
        )
    names = [p.name() for p in parameters]
    if len(set(names)) != len(names):
        raise CompileError(f"parameter names must be unique, got {names}; give each parameter name='...'")
    known = {v.id for v in problem.variables()} | {d.id for c in problem.constraints for d in c.dual_variables}
    for output in variables:
        leaves = [output] if not hasattr(output, "variables") or not output.args else output.variables()
        if any(getattr(v, "id", None) not in known for v in leaves):
            raise CompileError(
                f"Variable {output} must be a subset of problem.variables, a dual variable "
                "(constraint.dual_variables[0]), or an affine expression of variables"
            )


def read_options(solver: Solver, base: Options, given: dict[str, Any]) -> Options:
    """`base` with the given options; names of other layers are translated or ignored with a debug log."""
    if not isinstance(given, Mapping):
        raise OptionError(f"solver_args must be a dict of solver options, got {shown(given)}")
    valid = {f.name for f in fields(base)}
    changes = {}
    for name, value in given.items():
        if name in valid:
            changes[name] = value
        elif name in ALIASES:
            # statuses have fixed thresholds, so a looser tolerance would only turn into warnings
            tolerance = ALIASES[name] == "tolerance" and number().fits(value)
            changes[ALIASES[name]] = min(value, base.tolerance) if tolerance else value
            logger.debug("solver option '%s' is read as '%s'", name, ALIASES[name])
        elif name in IGNORED:
            logger.debug("solver option '%s' does not apply to solver '%s' and is ignored", name, solver.name)
        else:
            names = valid | set(ALIASES) | set(IGNORED)
            raise OptionError(f"solver '{solver.name}': unknown option '{name}'; {suggest(name, names)}")
    return replace(base, **changes)


def is_limited(given: dict[str, Any]) -> bool:
    return any(given.get(k) is not None for k in ("max_iterations", "max_iters", "time_limit"))


def result_type(values: list[Tensor]) -> torch.dtype:
    """torch.result_type over the tensors, so scalars yield to arrays; integers count as the default dtype."""
    arrays, scalars = ([v.dtype for v in values if v.is_floating_point() and bool(v.dim()) == d] for d in (True, False))
    if not arrays and any(v.dim() for v in values):
        scalars.append(torch.get_default_dtype())
    return reduce(torch.promote_types, arrays or scalars or [torch.get_default_dtype()])


def batch_shape(compiled: Compiled, values: list[Tensor]) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """The leading shape that all batched parameters have in common, and which are batched."""
    batch: tuple[int, ...] = ()
    found: list[str] = []
    batched = []
    for k, (spec, value) in enumerate(zip(compiled.parameters, values)):
        extra = value.dim() - len(spec.shape)
        if extra < 0 or tuple(value.shape[extra:]) != spec.shape:
            kind = "shape" if extra in (0, 1) else "dimensionality"
            raise ShapeError(
                f"Invalid parameter {kind} for parameter {k} ('{spec.name}'). Expected: {spec.shape}, with any "
                f"leading batch dimensions. Got: {tuple(value.shape)}"
            )
        leading = tuple(value.shape[:extra])
        batched.append(extra > 0)
        if extra and found and leading != batch:
            kind = f"Invalid parameter dimensionality for parameter {k}. " if len(leading) != len(batch) else ""
            raise ShapeError(
                f"{kind}Inconsistent batch sizes. Expected all batched parameters to have the same leading dimensions, "
                f"but parameter '{found[-1]}' has {batch} and parameter '{spec.name}' has {leading}; a parameter "
                f"without any is shared by the batch"
            )
        if extra:
            batch = leading
            found.append(spec.name)
    return batch, tuple(batched)


def fallback_rows(fallback: Any, compiled: Compiled, on_failure: str) -> tuple[Tensor, ...]:
    """One flat row per output."""
    if on_failure != "fallback":
        if fallback is not None:
            raise OptionError(f"fallback is given but on_failure={on_failure!r}; set on_failure='fallback'")
        return ()
    if fallback is None:
        raise OptionError("on_failure='fallback' needs fallback=: a value for each variable")
    values = fallback if isinstance(fallback, list | tuple) else [fallback] * len(compiled.outputs)
    if len(values) != len(compiled.outputs):
        raise OptionError(f"fallback must hold {len(compiled.outputs)} values, got {len(values)}")
    rows = []
    for value, output in zip(values, compiled.outputs):
        try:
            row = as_tensor("fallback", value, "option").to(torch.float64).expand(output.shape)
        except RuntimeError as error:
            raise ShapeError(f"fallback of '{output.name}' must have shape {output.shape}") from error
        rows.append(row.reshape(-1))
    return tuple(rows)


def judge(solution: Solution, shape: tuple[int, ...], limited: bool, on_failure: str) -> None:
    """Raise SolverError or warn by the statuses of a batch of this shape."""
    if solution.all_solved:
        return
    status = solution.status
    stopped = (status == Status.FAILED) & torch.isfinite(solution.x).all(1) & limited
    failed = ~solution.ok & ~stopped
    if bool(stopped.any()):
        text = f"{count_text(stopped, shape)} stopped at the limit that was set; the last iterate is returned"
        warnings.warn(text, LimitWarning, stacklevel=4)
    inaccurate = status == Status.INACCURATE
    if bool(inaccurate.any()):
        worst = float(solution.residual[inaccurate].max())
        warnings.warn(
            f"{count_text(inaccurate, shape)} solved to a relative KKT residual of {worst:.1e} only; scale the "
            "problem's data, or try another solver",
            InaccurateWarning,
            stacklevel=4,
        )
    if bool(failed.any()) and on_failure == "raise":
        active = collector()
        if active is None:
            raise SolverError(failure_text(failed, status, shape))
        active.name([Status(k).name if lost else "" for k, lost in zip(status.tolist(), failed.tolist())])


def count_text(mask: Tensor, shape: tuple[int, ...]) -> str:
    return f"{int(mask.sum())} of {max(1, int(np.prod(shape)))} samples"


def failure_text(failed: Tensor, status: Tensor, shape: tuple[int, ...], most: int = 8) -> str:
    where = torch.nonzero(failed)[:, 0].tolist()
    names = []
    for k in where[:most]:
        index = tuple(int(i) for i in np.unravel_index(k, shape)) if shape else ()
        label = "the only sample" if not index else f"sample {index[0] if len(index) == 1 else index}"
        names.append(f"{label} is {Status(int(status[k])).name}")
    more = f", and {len(where) - most} more" if len(where) > most else ""
    return (
        f"{count_text(failed, shape)} failed: {', '.join(names)}{more}; check their parameters, soften the "
        "constraints, or set on_failure='nan' or 'fallback' (solve() returns the statuses)"
    )


def check_finite(specs: Sequence[ParameterSpec], values: Sequence[Tensor], logs: Collection[int] = ()) -> None:
    """Raise DomainError, naming parameter and batch element, for the first NaN, infinite or (in `logs`) zero entry."""
    for k, (spec, value) in enumerate(zip(specs, values)):
        found = torch.nonzero(~torch.isfinite(value.log() if k in logs else value))
        if not len(found):
            continue
        where = found[0].tolist()
        leading = where[: value.dim() - len(spec.shape)]
        element = f" in batch element {leading[0] if len(leading) == 1 else tuple(leading)}" if leading else ""
        entry = value[tuple(where)].item()
        if k in logs and math.isfinite(entry):
            raise DomainError(
                f"parameter '{spec.name}' of a geometric program must be positive, but has the entry {entry:.6g}"
                f"{element}"
            )
        raise DomainError(
            f"parameter '{spec.name}' has a NaN or infinite entry {entry}{element}; "
            "correct the value or leave that sample out"
        )
