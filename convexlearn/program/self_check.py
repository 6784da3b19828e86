"""A check of a compiled problem against CVXPY: data at one instance, and the inversion of one point."""

from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from convexlearn.errors import CompileError
from convexlearn.program.compiler import Compiled, canonicalize
from convexlearn.program.declaration import Declaration, quiet, set_values, value_of


def self_check(compiled: Compiled, declaration: Declaration, gp: bool, native_objective: bool) -> None:
    """Raise CompileError unless the compiled maps agree with CVXPY's own apply and invert.

    The instance is at the declared parameter values where all are set, else at a draw from their
    domains; the point is arbitrary, so nothing is solved. It guards against changes in CVXPY's
    canonicalization: a permuted matrix or a dropped cone becomes an error at construction.
    """
    copy = declaration.copy()
    values = _instance(copy, compiled)
    set_values(copy.parameters, values)
    canonical = canonicalize(copy, gp, native_objective, None)
    theta = np.concatenate(
        [np.log(values[f.index]).ravel() if f.log else values[f.index].ravel() for f in compiled.features]
        + [np.ones(1)]
    )
    program, data = compiled.program, canonical.data
    ours = {name: compiled.maps[name] @ theta for name in ("P", "q", "A", "b")}
    P = program.P.matrix(ours["P"]).toarray() if program.n <= 2000 else None
    mismatch = [
        _differs(program.A.matrix(ours["A"]) - data["A"]),
        _differs(ours["q"] - data["c"]),
        _differs(np.subtract(ours["b"], data["b"], where=ours["b"] != data["b"], out=np.zeros(program.m))),
    ]
    if P is not None and "P" in data:
        theirs = np.asarray(data["P"].todense())
        mismatch.append(_differs(P + np.triu(P, 1).T - (theirs + theirs.T) / 2))
    if any(mismatch):
        raise CompileError(
            "the compiled problem disagrees with CVXPY's own data; please report it with this problem "
            f"and cvxpy {version('cvxpy')} (check=False skips this test)"
        )
    _check_inversion(compiled, copy, canonical)


def _differs(difference: Any) -> bool:
    values = difference.data if hasattr(difference, "tocoo") else np.asarray(difference)
    return bool(values.size and not np.abs(values).max() <= 1e-9 * 1e3)


def _instance(copy: Declaration, compiled: Compiled) -> list[np.ndarray]:
    """Declared values where every parameter has one, else a reproducible draw from the domains."""
    declared = [value_of(p) for p in copy.parameters]
    if all(v is not None for v in declared):
        return [np.asarray(v, dtype=float) for v in declared]
    generator = torch.Generator().manual_seed(0)
    values = []
    for spec in compiled.parameters:
        free = spec.domain.to_free(torch.zeros(spec.shape, dtype=torch.float64))
        free = torch.randn(free.shape, generator=generator, dtype=torch.float64)
        values.append(spec.domain.from_free(free).numpy())
    return values


def _unreadable(variable: Any, output: Any) -> bool:
    """True where CVXPY projects the arbitrary value, or can't evaluate an expression of a sparse one."""
    attributes = variable.attributes
    structured = attributes["diag"] or attributes["sparsity"]
    return bool(attributes["nonpos"] or attributes["neg"] or attributes["bounds"] or (structured and output.args))


def _check_inversion(compiled: Compiled, copy: Declaration, canonical: Any) -> None:
    """Unpack an arbitrary canonical point with CVXPY and with our recovery matrices."""
    program = compiled.program
    generator = np.random.default_rng(0)
    x, z = generator.uniform(0.1, 1.0, program.n), generator.uniform(0.1, 1.0, program.m)
    info = {"status_val": 1, "solve_time": 0.0, "setup_time": 0.0, "iter": 0, "pobj": 0.0}
    with quiet():
        solution = canonical.chain.invert({"x": x, "y": z, "s": z, "info": info}, canonical.inverse)
        canonical.problem.unpack(solution)
    if canonical.gp is not None:
        return
    for output, recovery in zip(copy.outputs, compiled.outputs):
        ours = (recovery.matrix @ (z if recovery.dual else x) + recovery.offset).reshape(recovery.shape)
        if any(_unreadable(v, output) for v in output.variables()) or (theirs := value_of(output)) is None:
            continue
        if _differs(ours - np.reshape(theirs, recovery.shape)):
            raise CompileError(
                f"reading off '{recovery.name}' disagrees with CVXPY; please report it with this problem and "
                f"cvxpy {version('cvxpy')} (check=False skips this test)"
            )
