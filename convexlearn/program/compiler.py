"""cvxpy.Problem -> Program: CVXPY's canonicalization, copied into sparse maps from parameters to data."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
from cvxpy.constraints import PSD, SOC, ExpCone, NonNeg, PowCone3D, PowConeND, SvecPSD, Zero
from cvxpy.lin_ops.lin_op import CONSTANT_ID
from cvxpy.reductions.dgp2dcp.dgp2dcp import Dgp2Dcp
from cvxpy.settings import PARAM_PROB
from cvxpy.utilities import scopes

from convexlearn.domains import Domain
from convexlearn.errors import CompileError
from convexlearn.program.declaration import Declaration, quiet, require_dpp
from convexlearn.program.program import Cones, Program, Sparsity

CANONICAL_SOLVER = "SCS"  # takes every cone, and a quadratic objective natively
CONE_ORDER = (Zero, NonNeg, SOC, SvecPSD, ExpCone, PowCone3D)


@dataclass(frozen=True, eq=False)
class ParameterSpec:
    """A parameter as the caller sees it: CVXPY name, shape and domain."""

    name: str
    shape: tuple[int, ...]
    domain: Domain


@dataclass(frozen=True, eq=False)
class Feature:
    """A block of the vector theta that the maps multiply: parameter `index`, flattened row by row, maybe its log."""

    index: int
    log: bool


@dataclass(frozen=True, eq=False)
class Recovery:
    """One output: matrix @ x + offset (or matrix @ z for a dual), row by row in `shape`; exp for GP."""

    name: str
    shape: tuple[int, ...]
    matrix: sp.csr_array
    offset: np.ndarray
    dual: bool
    exp: bool

    @cached_property
    def shifted(self) -> bool:
        """Whether the offset is not zero."""
        return bool(self.offset.any())


@dataclass(frozen=True, eq=False)
class Compiled:
    """A compiled problem: `maps[field] @ [theta, 1]` are the entries of ProgramData's field."""

    program: Program
    parameters: tuple[ParameterSpec, ...]
    features: tuple[Feature, ...]
    maps: dict[str, sp.csr_array]
    outputs: tuple[Recovery, ...]

    def __deepcopy__(self, memo: dict) -> "Compiled":
        return self


@dataclass(frozen=True, eq=False)
class Canonical:
    """CVXPY's canonical form of a problem and how its objects map into it."""

    declaration: Declaration
    problem: cp.Problem
    chain: Any
    inverse: list
    data: dict
    gp: Any
    variable_ids: dict[int, int]
    parameter_ids: dict[int, int]
    constraint_ids: dict[int, int]


def compile_problem(
    declaration: Declaration,
    *,
    gp: bool = False,
    native_objective: bool = True,
    canon_backend: str | None = None,
) -> Compiled:
    """Compile a declared problem; `native_objective=False` turns squares into second-order cones.

    Raises CompileError, naming the subexpression, where the problem is not DPP. Reference: Agrawal,
    Amos, Barratt, Boyd, Diamond, Kolter, Differentiable convex optimization layers (2019).
    """
    require_dpp(declaration.problem, gp, native_objective)
    canonical = canonicalize(declaration, gp, native_objective, canon_backend)
    parametric = canonical.data[PARAM_PROB]
    features, theta = _theta_map(canonical, parametric)
    n = parametric.x.size
    m = parametric.A.shape[0] // (n + 1)
    A, a_map, b_map = _constraint_maps(parametric, theta, n, m)
    P, p_map = _quadratic_map(parametric, theta, n)
    q_map = (sp.csr_array(parametric.q) @ theta)[:n]
    maps = {"P": p_map, "q": sp.csr_array(q_map), "A": a_map, "b": b_map}
    fixed = tuple(fixed_values(maps[f]) for f in ("P", "q", "A", "b"))
    program = Program(n, m, _cones(parametric.cone_dims), P, A, fixed)
    specs = tuple(_specification(p) for p in declaration.parameters)
    outputs = tuple(_recovery(o, canonical, parametric) for o in declaration.outputs)
    return Compiled(program, specs, features, maps, outputs)


def canonicalize(declaration: Declaration, gp: bool, native_objective: bool, canon_backend: str | None) -> Canonical:
    """CVXPY's reduction chain applied to the declaration's private problem."""
    problem, dgp = declaration.problem, None
    if gp:
        dgp = Dgp2Dcp(problem)
        problem, _ = dgp.apply(problem)
    problem: Any = cp.Problem(problem.objective, problem.constraints)
    with scopes.quad_form_dpp_scope(), quiet():
        options = {"canon_backend": canon_backend, "solver_opts": {"use_quad_obj": native_objective}}
        try:
            data, chain, inverse = problem.get_problem_data(CANONICAL_SOLVER, **options)
        except cp.SolverError as error:
            raise CompileError(
                f"CVXPY cannot canonicalize this problem ({error}); a linear objective needs at least one constraint"
            ) from error
    unread = [k for k in ("dir_cones", "lower_bounds", "upper_bounds") if data.get(k) is not None]
    parametric = data[PARAM_PROB]
    if unread or parametric.dir_cones or parametric.constr_map[PowConeND]:
        raise CompileError(
            f"CVXPY canonicalized into parts that convexlearn does not read ({unread or 'power cones of order n'}); "
            "state the bounds and cones as constraints"
        )
    variable_ids = {k: v[0] for k, v in chain.compose_var_id_map().items()}
    if dgp is not None:
        logs = {k: v[0] for k, v in dgp.var_id_map.items()}
        variable_ids = {k: variable_ids.get(v, v) for k, v in logs.items()}
    parameter_ids = {k: v[0] for k, v in chain.compose_param_id_map().items()}
    return Canonical(
        declaration,
        problem,
        chain,
        inverse,
        data,
        dgp,
        variable_ids,
        parameter_ids,
        chain.compose_constr_id_map(),
    )


def _specification(parameter: Any) -> ParameterSpec:
    domain = Domain.from_attributes(parameter.shape, parameter.attributes, parameter.sparse_idx)
    return ParameterSpec(parameter.name(), parameter.shape, domain)


def _theta_map(canonical: Canonical, parametric: Any) -> tuple[tuple[Feature, ...], sp.csr_array]:
    """Features, and the matrix from [theta, 1] to CVXPY's parameter vector (last entry 1)."""
    columns = parametric.param_id_to_col
    logs = canonical.gp.canon_methods._parameters if canonical.gp is not None else {}
    features, blocks, start = [], [], []
    for index, parameter in enumerate(canonical.declaration.parameters):
        for log, source in ((False, parameter), (True, logs.get(parameter))):
            if source is None:
                continue
            column = columns.get(canonical.parameter_ids.get(source.id, source.id))
            if column is not None:
                features.append(Feature(index, log))
                blocks.append(_lowering(parameter))
                start.append(column)
    rows, cols, values, offset = [], [], [], 0
    for block, first in zip(blocks, start):
        entries = block.tocoo()
        rows.append(entries.row + first)
        cols.append(entries.col + offset)
        values.append(entries.data)
        offset += block.shape[1]
    size = parametric.total_param_size
    rows.append(np.array([columns[CONSTANT_ID]]))
    cols.append(np.array([offset]))
    values.append(np.ones(1))
    matrix = sp.csr_array(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(cols))), shape=(size + 1, offset + 1)
    )
    return tuple(features), matrix


def _column_major(shape: tuple[int, ...]) -> np.ndarray:
    """Row-major positions of the entries in column-major order."""
    return np.arange(int(np.prod(shape, dtype=int))).reshape(shape).ravel(order="F")


def _lowering(parameter: Any) -> sp.csr_array:
    """Matrix from a parameter flattened row by row to CVXPY's (reduced) vector; symmetrises."""
    size, attributes = parameter.size, parameter.attributes
    if any(attributes[a] for a in ("symmetric", "PSD", "NSD", "hermitian")):
        if len(parameter.shape) > 2:
            raise CompileError(f"parameter '{parameter.name()}': symmetric arrays of more than two dimensions")
        n = parameter.shape[0]
        i, j = np.triu_indices(n)
        k = np.arange(len(i))
        rows, cols = np.concatenate([k, k]), np.concatenate([i * n + j, j * n + i])
        return sp.csr_array((np.full(2 * len(i), 0.5), (rows, cols)), shape=(len(i), size))
    if attributes["diag"]:
        source = np.arange(parameter.shape[0]) * (parameter.shape[0] + 1)
    elif attributes["sparsity"]:
        source = np.ravel_multi_index(parameter.sparse_idx, parameter.shape)
    else:
        source = _column_major(parameter.shape)
    return _selection(source, size)


def _selection(source: np.ndarray, size: int) -> sp.csr_array:
    """The matrix whose row k picks entry source[k] of a vector of length `size`."""
    rows = np.arange(len(source))
    return sp.csr_array((np.ones(len(source)), (rows, source)), shape=(len(source), size))


def _group(keys: np.ndarray, tensor: sp.coo_array, weights: np.ndarray, height: int) -> tuple[np.ndarray, Any]:
    """Add up the rows of a tensor by key: sorted unique keys, and one row for each."""
    unique, position = np.unique(keys, return_inverse=True)
    reduced = sp.csr_array((tensor.data * weights, (position, tensor.col)), shape=(len(unique), tensor.shape[1]))
    return unique, reduced


def _constraint_maps(parametric: Any, theta: sp.csr_array, n: int, m: int) -> tuple[Sparsity, Any, Any]:
    """Pattern of A, and the maps of A and b: CVXPY stores the tensor of [-A, b] column by column."""
    tensor = sp.coo_array(parametric.A)
    row, col = tensor.coords
    tensor = sp.coo_array((tensor.data, (row.astype(np.int64), col)), shape=tensor.shape)
    keys = tensor.coords[0]
    inside = keys < n * m
    entries = sp.coo_array((tensor.data[inside], (keys[inside], col[inside])), shape=tensor.shape)
    unique, a_map = _group(keys[inside], entries, -np.ones(inside.sum()), n * m)
    rest = ~inside
    b_map = sp.csr_array((tensor.data[rest], (keys[rest] - n * m, col[rest])), shape=(m, tensor.shape[1]))
    pattern = Sparsity((unique % max(m, 1)).astype(np.int32), (unique // max(m, 1)).astype(np.int32), (m, n))
    return pattern, sp.csr_array(a_map @ theta), sp.csr_array(b_map @ theta)


def _quadratic_map(parametric: Any, theta: sp.csr_array, n: int) -> tuple[Sparsity, Any]:
    """Upper-triangular pattern of the symmetrised P, and its map."""
    if parametric.P is None:
        empty = np.zeros(0, dtype=np.int32)
        return Sparsity(empty, empty, (n, n)), sp.csr_array((0, theta.shape[1]))
    tensor = sp.coo_array(parametric.P)
    keys, _ = tensor.coords
    row, col = keys % n, keys // n
    low, high = np.minimum(row, col), np.maximum(row, col)
    unique, p_map = _group(high * n + low, tensor, np.where(row == col, 1.0, 0.5), n * n)
    pattern = Sparsity((unique % n).astype(np.int32), (unique // n).astype(np.int32), (n, n))
    return pattern, sp.csr_array(p_map @ theta)


def fixed_values(matrix: sp.csr_array) -> np.ndarray:
    """The entries that only the constant 1 contributes to; NaN for the others."""
    last = matrix.shape[1] - 1
    varying = np.diff(sp.csr_array(matrix[:, :last]).indptr) > 0
    constant = matrix[:, [last]].toarray().ravel() if matrix.shape[0] else np.zeros(0)
    return np.where(varying, np.nan, constant)


def _cones(dims: Any) -> Cones:
    power = tuple(float(a) for a in dims.p3d)
    return Cones(dims.zero, dims.nonneg, tuple(dims.soc), tuple(dims.psd), dims.exp, power)


def _recovery(output: Any, canonical: Canonical, parametric: Any) -> Recovery:
    """How an output is read off the canonical solution."""
    duals: dict[Any, Any] = {
        d.id: (c, k) for c in canonical.declaration.problem.constraints for k, d in enumerate(c.dual_variables)
    }
    if isinstance(output, cp.Variable) and output.id in duals:
        constraint, which = duals[output.id]
        return _dual_recovery(output, constraint, which, canonical)
    name = output.name() if isinstance(output, cp.Variable) else str(output)
    if canonical.gp is not None and not isinstance(output, cp.Variable):
        raise CompileError(f"decision '{name}': only variables can be decisions of a geometric program")
    matrix, offset = _affine_map(output)
    stack = [_variable_matrix(v, canonical, parametric) for v in output.variables()]
    size = int(np.prod(output.shape, dtype=int))
    primal = matrix @ sp.vstack(stack) if stack else sp.csr_array((size, parametric.x.size))
    order = np.argsort(_column_major(output.shape))
    return Recovery(
        name,
        output.shape,
        sp.csr_array(sp.csr_array(primal)[order]),
        offset[order],
        False,
        canonical.gp is not None,
    )


def _affine_map(expression: Any) -> tuple[Any, np.ndarray]:
    """(M, c): the expression in column-major order is M v + c of its variables stacked column-major."""
    if isinstance(expression, cp.Variable):
        return sp.eye_array(expression.size, format="csr"), np.zeros(expression.size)
    if not isinstance(expression, cp.Expression) or not expression.is_affine() or expression.parameters():
        raise CompileError(
            f"decision '{expression}' must be a variable or an affine expression of variables without "
            "parameters; declare a variable y with the constraint y == (the expression) instead"
        )
    variables = expression.variables()
    plain = {id(v): cp.Variable(v.shape) for v in variables}
    copy = expression.tree_copy(id_objects=plain)
    data = cp.Problem(cp.Minimize(0), [copy == 0]).get_problem_data(CANONICAL_SOLVER)[0]
    columns = data[PARAM_PROB].var_id_to_col
    take = np.concatenate([columns[plain[id(v)].id] + np.arange(v.size) for v in variables])
    return sp.csr_array(data["A"])[:, take], -data["b"]


def _variable_matrix(variable: Any, canonical: Canonical, parametric: Any) -> sp.csr_array:
    """Matrix from the canonical x to the variable in column-major order."""
    start = parametric.var_id_to_col.get(canonical.variable_ids.get(variable.id, variable.id))
    if start is None:
        raise CompileError(f"variable '{variable.name()}' does not appear in the canonical problem")
    shape, attributes = variable.shape, variable.attributes
    if any(attributes[a] for a in ("symmetric", "PSD", "NSD")):
        n = shape[0]
        position = np.zeros((n, n), dtype=int)
        i, j = np.triu_indices(n)
        position[i, j] = position[j, i] = np.arange(len(i))
        return _selection(start + position.ravel(order="F"), parametric.x.size)
    if attributes["diag"] or attributes["sparsity"]:
        where = np.ravel_multi_index(
            variable.sparse_idx if attributes["sparsity"] else np.diag_indices(shape[0]), shape, order="F"
        )
        source = start + np.arange(len(where))
        return sp.csr_array((np.ones(len(where)), (where, source)), shape=(variable.size, parametric.x.size))
    return _selection(start + np.arange(variable.size), parametric.x.size)


def _constraint_rows(canonical: Canonical) -> dict[int, tuple[Any, int]]:
    """Canonical constraint id -> (constraint, first row)."""
    rows, start = {}, 0
    constraints = canonical.data[PARAM_PROB].constr_map
    for kind in CONE_ORDER:
        for constraint in constraints.get(kind, []):
            rows[constraint.id] = (constraint, start)
            start += constraint.size
    return rows


def _dual_recovery(dual: Any, constraint: Any, which: int, canonical: Canonical) -> Recovery:
    """A dual variable with CVXPY's sign and layout, one case per kind of cone."""
    key: Any = canonical.constraint_ids.get(constraint.id, constraint.id)
    _, start = _constraint_rows(canonical)[key]
    shape, scale = dual.shape, 1.0
    size = int(np.prod(shape, dtype=int))
    if isinstance(constraint, SOC):
        width = constraint._cone_size()
        cones = np.arange(size // (width - 1) if which else size)
        inner = np.arange(1, width) if which else np.zeros(1, dtype=int)
        table = cones[:, None] * width + inner
        source = (table.T if which and constraint.axis == 0 else table).ravel()
    elif isinstance(constraint, ExpCone | PowCone3D):
        source = np.empty(size, dtype=int)
        source[_column_major(shape)] = 3 * np.arange(size) + which
    elif isinstance(constraint, PSD):
        n = shape[0]
        position = np.zeros((n, n), dtype=int)
        j, i = np.triu_indices(n)
        position[i, j] = position[j, i] = np.arange(len(i))
        source = position.ravel()
        scale = np.where(np.eye(n, dtype=bool), 1.0, np.sqrt(0.5)).ravel()
    else:
        source = np.empty(size, dtype=int)
        source[_column_major(shape)] = np.arange(size)
    matrix = sp.csr_array(_selection(start + source, canonical.data["A"].shape[0]) * np.reshape(scale, (-1, 1)))
    return Recovery(f"dual of {constraint}", shape, matrix, np.zeros(size), True, False)
