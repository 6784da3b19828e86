"""How far a layer's solution and gradient can be trusted at given parameters, in numbers and in sentences."""

import math
import warnings
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import LinearOperator, onenormest, splu
from torch import Tensor

from convexlearn.checks import SEED, checked, instance, number
from convexlearn.domains import Domain
from convexlearn.errors import ConvexLearnWarning
from convexlearn.layer import ConvexLayer
from convexlearn.program.program import Cones, Program, ProgramData, Solution, Sparsity, Status
from convexlearn.solvers import choose
from convexlearn.solvers.base import product, symmetric_product, transposed_product
from convexlearn.solvers.cones import Projection, groups, matrix_of, psd_order, split, triangle_of

DENSE = 300  # order up to which the condition number is exact
ILL_CONDITIONED = 1e10
WEAK = 1e-6  # relative size from which s and z count as zero
NEAR = 1e-4  # relative change of the constraints from which infeasibility is near
INEXACT = 1e-6
DISAGREEMENT = 1e-3
SPREAD = 1e6


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What `diagnose` finds; every tensor has the batch shape of the parameters, () for unbatched ones.

    status: values of Status. residual: relative KKT residual. condition: condition number of the
    equilibrated adjoint system (an estimate in the 1-norm beyond order 300), inf where it is singular.
    gap: strict complementarity, the smallest of max(s_i, z_i) over the constraints (cones: the smallest
    eigenvalue of s + z), relative to the largest of s and z. weakly_active: how many constraints have a
    relative gap below 1e-6. margin: the distance to infeasibility, by how much all inequalities can be
    tightened at once relative to their data (row of A and b), negative where there is no feasible point.
    adjoint_residual: relative residual of the backward linear solve. disagreement: relative difference of
    the gradient and central differences along a random direction. spread: largest by smallest nonzero
    magnitude in the program's data. advice: sentences.
    """

    solver: str
    status: Tensor
    residual: Tensor
    condition: Tensor
    gap: Tensor
    weakly_active: Tensor
    margin: Tensor
    adjoint_residual: Tensor
    disagreement: Tensor
    spread: Tensor
    advice: tuple[str, ...]

    def __str__(self) -> str:
        count = max(self.status.numel(), 1) if self.status.dim() else 1
        names = ", ".join(f"{int((self.status == s).sum())} {s.name}" for s in Status if bool((self.status == s).any()))
        lines = [f"{count} sample{'s' * (count != 1)} by solver '{self.solver}': {names or 'none'}"]
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor) and f.name != "status" and value.numel():
                known = value[~value.isnan()].double()
                text = f"{_number(known.min())} to {_number(known.max())}" if len(known.unique()) > 1 else None
                text = text or (_number(known.reshape(-1)[0]) if known.numel() else "not available")
                lines.append(f"  {f.name.replace('_', ' ')}: {text}")
        return "\n".join([*lines, *self.advice])


@checked(layer=instance(ConvexLayer, "a ConvexLayer"), step=number(above=0), seed=SEED)
def diagnose(layer: ConvexLayer, *params: Any, step: float = 1e-5, seed: int = 0, **by_name: Any) -> Diagnosis:
    """Look at the solution and the gradient of `layer` at parameters given as to `layer.forward`.

    It solves the problem five times: as it is, for central differences along a random direction (`seed`) of
    length `step`, for the derivative along it, and for the distance to infeasibility. Reference for the
    latter: Renegar, Some perturbation theory for linear programming (1994).

    >>> import cvxpy as cp
    >>> x, low = cp.Variable(), cp.Parameter(name="low")
    >>> layer = ConvexLayer(cp.Problem(cp.Minimize(cp.square(x)), [x >= low]), [low], [x])
    >>> int(diagnose(layer, torch.tensor([0.0, 1.0, -1.0])).weakly_active[0])
    1
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvexLearnWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.script")  # of PyTorch's own forward mode
        values = layer._bind(params, by_name)
        found = layer.solve(*values)
        solution, smoothing = found.solution, float(getattr(layer._options, "smoothing", 0.0))
        point = _Point.of(solution, smoothing)
        gap, weak = point.gaps()
        measured = {
            "status": solution.status,
            "residual": solution.residual,
            "condition": point.conditions(),
            "gap": gap,
            "weakly_active": weak,
            "margin": _margin(solution),
            "adjoint_residual": _adjoint_residual(layer, solution, seed),
            "disagreement": _disagreement(layer, values, step, seed),
            "spread": _spread(solution.data),
        }
    tensors = {k: torch.as_tensor(v).reshape(found.batch) for k, v in measured.items()}
    smoothable = hasattr(layer._options, "smoothing") and not smoothing
    remedy = "set solver_args={'smoothing': 1e-3}" if smoothable else "add a small quadratic term to the objective"
    return Diagnosis(layer.solver.name, **tensors, advice=_advice(tensors, remedy))


@dataclass(frozen=True, eq=False)
class _Point:
    """Solutions x (B, n), z (B, m), slacks s (B, m), and the projection at z - s; unsolved samples are NaN."""

    solution: Solution
    z: np.ndarray
    s: np.ndarray
    projection: Projection
    smoothing: float

    @classmethod
    def of(cls, solution: Solution, smoothing: float) -> "_Point":
        program, data = solution.program, solution.data
        s = (data.b - product(program, data.A, solution.x)).cpu().numpy()
        z = solution.z.cpu().numpy()
        ok = solution.ok.cpu().numpy()[:, None]
        s, z = np.where(ok, s, np.nan), np.where(ok, z, np.nan)
        return cls(solution, z, s, split(program.cones, np.nan_to_num(z - s)), smoothing)

    def gaps(self) -> tuple[np.ndarray, np.ndarray]:
        """(B,) relative strict complementarity gap and number of weakly active constraints."""
        cones = self.solution.program.cones
        start, others = groups(cones)
        signs = slice(cones.zero, start)
        parts = [np.maximum(self.s[:, signs], self.z[:, signs])]
        for group in others:
            total = (self.s + self.z)[:, group.rows]
            if group.kind == "soc":
                parts.append(total[..., 0] - np.linalg.norm(total[..., 1:], axis=-1))
            elif group.kind == "psd":
                matrices = matrix_of(np.nan_to_num(total))
                parts.append(np.where(np.isnan(total).any(-1), np.nan, np.linalg.eigvalsh(matrices)[..., 0]))
        found = np.concatenate(parts, 1)
        scale = np.concatenate([np.abs(self.s), np.abs(self.z), np.full((len(found), 1), 1e-300)], 1).max(1)
        relative = found / scale[:, None]
        gap = relative.min(1) if found.shape[1] else np.where(np.isnan(scale), np.nan, np.inf)
        return gap, (relative < WEAK).sum(1)

    def conditions(self) -> np.ndarray:
        """(B,) condition numbers of [P, A'; V A, -(1 - V)], rows and columns equilibrated."""
        ok = self.solution.ok.tolist()
        return np.array([self._condition(i) if ok[i] else np.nan for i in range(len(ok))])

    def _condition(self, i: int) -> float:
        program = self.solution.program
        P, _, A, _ = (f[0] if len(f) == 1 else f[i] for f in self.solution.data.arrays)
        P, A = program.P.matrix(P), program.A.matrix(A)
        P = P + sp.triu(P, 1).T
        V = self._derivative(i)
        K = sp.csc_array(sp.block_array([[P, A.T], [V @ A, V - sp.eye_array(program.m)]]))
        return _condition_number(_equilibrated(K))

    def _derivative(self, i: int) -> sp.csc_array:
        """V of one sample: the projection's derivative, on the central path that of its smoothed version."""
        program = self.solution.program
        zero, m = program.cones.zero, program.m
        if self.smoothing:
            ratio = self.z[i] / (self.z[i] + self.s[i])
            ratio[:zero] = 1.0
            return sp.csc_array(sp.diags_array(ratio))
        one = split(program.cones, np.nan_to_num(self.z[i : i + 1] - self.s[i : i + 1]))
        plain, others = groups(program.cones)
        blocks = sp.lil_array((m, m))
        blocks.setdiag(np.where(np.arange(m) < plain, one.slope[0], 0.0))
        for rows in (r for group in others for r in group.rows):
            for k in rows:
                unit = np.zeros((1, m))
                unit[0, k] = 1.0
                blocks[rows, [k]] = one.derivative(unit)[0][rows]
        return sp.csc_array(blocks)


def _equilibrated(K: sp.csc_array) -> sp.csc_array:
    """Rows and columns scaled so that their largest entries are near 1 (Ruiz, 2001)."""
    for _ in range(10):
        size = abs(K)
        rows, cols = (np.asarray(size.max(axis=a).todense()).ravel() for a in (1, 0))
        left, right = (1 / np.sqrt(np.where(v > 0, v, 1.0)) for v in (rows, cols))
        K = sp.csc_array(sp.diags_array(left) @ K @ sp.diags_array(right))
    return K


def _condition_number(K: sp.csc_array) -> float:
    if K.shape[0] <= DENSE:
        values = np.linalg.svd(K.toarray(), compute_uv=False)
        return float(values[0] / values[-1]) if values[-1] > np.finfo(float).eps * values[0] else math.inf
    try:
        factor = splu(K)
    except RuntimeError:  # exactly singular
        return math.inf
    inverse = LinearOperator(K.shape, factor.solve, rmatvec=lambda v: factor.solve(v, "T"), dtype=float)
    return float(abs(K).sum(0).max() * onenormest(inverse))


def _margin(solution: Solution) -> Tensor:
    """(B,) the largest t <= 1 with b - Ax - t w in K: w lies inside K and has the size of each constraint's data."""
    program, data = solution.program, solution.data.expanded()
    inside = _interior(program.cones)
    if not inside.any():
        return torch.where(solution.ok, torch.inf, -torch.inf)
    rows = torch.as_tensor(program.A.rows).long()
    size = torch.zeros(data.batch, program.m, dtype=torch.float64).index_add_(1, rows, data.A.cpu().square())
    size = torch.maximum(size.sqrt(), data.b.cpu().abs()).clamp(min=1e-12)
    for group in groups(program.cones)[1]:
        for members in group.rows:
            size[:, members] = size[:, members].amax(1, keepdim=True)
    wide, widened = _with_margin(program, data, size * torch.as_tensor(inside))
    solver = choose(wide)
    found = solver.solve(wide, widened, solver.options())
    best = torch.where(found.ok, found.x[:, -1], torch.nan)
    return torch.where(found.status == Status.INFEASIBLE, -torch.inf, best)


def _interior(cones: Cones) -> np.ndarray:
    """(m,) a point inside every cone, zero on equality rows."""
    inside = np.zeros(cones.size)
    inside[cones.zero : cones.zero + cones.nonneg] = 1.0
    for group in groups(cones)[1]:
        if group.kind == "soc":
            inside[group.rows[:, 0]] = 1.0
        elif group.kind == "psd":
            inside[group.rows] = triangle_of(np.eye(psd_order(group.rows.shape[1])))
        else:
            inside[group.rows] = (0.0, 1.0, 2.0) if group.kind == "exp" else (1.0, 1.0, 0.0)
    return inside


def _with_margin(program: Program, data: ProgramData, weight: Tensor) -> tuple[Program, ProgramData]:
    """maximize t subject to Ax + t weight + s = b, s in K, t <= 1: one more variable and sign row."""
    n, m, cones = program.n, program.m, program.cones
    place = cones.zero + cones.nonneg  # of the new row
    rows = np.where(program.A.rows >= place, program.A.rows + 1, program.A.rows)
    others = np.where(np.arange(m) >= place, np.arange(m) + 1, np.arange(m))
    new_rows = np.sort(np.append(others, place))
    A = Sparsity(
        np.concatenate([rows, new_rows]).astype(np.int32),
        np.concatenate([program.A.cols, np.full(m + 1, n)]).astype(np.int32),
        (m + 1, n + 1),
    )
    empty = np.zeros(0, np.int32)
    wide = Cones(cones.zero, cones.nonneg + 1, cones.soc, cones.psd, cones.exp, cones.power)
    one = torch.ones(data.batch, 1, dtype=torch.float64)
    column, right = (
        torch.cat([v[:, :place], one, v[:, place:]], 1) for v in (weight, data.b.cpu().expand(data.batch, -1))
    )
    q = torch.zeros(data.batch, n + 1, dtype=torch.float64)
    q[:, -1] = -1.0
    values = ProgramData(q[:, :0].clone(), q, torch.cat([data.A.cpu(), column], 1), right.contiguous(), data.batch)
    return Program(n + 1, m + 1, wide, Sparsity(empty, empty, (n + 1, n + 1)), A), values


def _disagreement(layer: ConvexLayer, values: list[Tensor], step: float, seed: int) -> Tensor:
    """Difference of derivative and central differences along a random direction, relative to the latter."""
    generator = torch.Generator().manual_seed(seed)
    values = [v.detach().to(torch.float64, copy=True).contiguous() for v in values]  # of expanded ones no duals exist
    specs = layer._compiled.parameters
    directions = tuple(_direction(p.domain, v, 10 * step, generator) for p, v in zip(specs, values))

    def flat(*moved: Tensor) -> Tensor:
        result = layer.solve(*moved)
        return torch.cat([v.flatten(len(result.batch)) for v in (v[..., None] for v in result.variables)], -1)

    ahead, behind = (flat(*(v + sign * step * d for v, d in zip(values, directions))) for sign in (1, -1))
    difference = (ahead - behind) / (2 * step)
    exact: Any = torch.func.jvp(flat, tuple(values), directions)[1]
    return (exact - difference).abs().amax(-1) / difference.abs().amax(-1).clamp(min=1e-6)


def _direction(domain: Domain, value: Tensor, room: float, generator: torch.Generator) -> Tensor:
    """A random direction along which `value` may move both ways by `room` and stay in its domain."""
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
    if domain.structure in ("PSD", "NSD", "diag", "sparse"):
        return value * noise[..., :1, :1]
    noise = domain.symmetrise(noise)
    for bound, sign in ((domain.lower, 1.0), (domain.upper, -1.0)):
        if bound is not None:
            free = sign * (value - torch.as_tensor(bound).to(value)) > 10 * room
            noise = torch.where(free, noise, 0.0)
    return noise


def _adjoint_residual(layer: ConvexLayer, solution: Solution, seed: int) -> Tensor:
    """(B,) of the stationarity rows P vx + A'vz = dx for a random upstream gradient dx; NaN where unsolved."""
    program, data, batch = solution.program, solution.data, len(solution.x)
    split_ = data.replaced(q=data.q.expand(batch, -1).contiguous(), b=data.b.expand(batch, -1).contiguous())
    dx = torch.randn(solution.x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    dx = torch.where(solution.ok[:, None], dx.to(solution.x), 0.0)
    found = layer.solver.adjoint(solution.replaced(data=split_), dx, torch.zeros_like(solution.z))
    vx, vz = -found.q, found.b
    terms = symmetric_product(program, data.P, vx), transposed_product(program, data.A, vz), dx
    size = torch.stack([t.abs().amax(1) for t in terms]).amax(0).clamp(min=1e-300)
    return torch.where(solution.ok, (terms[0] + terms[1] - dx).abs().amax(1) / size, torch.nan)


def _spread(data: ProgramData) -> np.ndarray:
    """(B,) largest by smallest nonzero magnitude of the entries of P, q, A and b."""
    sizes = np.abs(np.concatenate([f.cpu().numpy() for f in data.expanded().fields()], 1))
    low = np.where(sizes > 1e-14 * sizes.max(1, initial=1e-300, keepdims=True), sizes, np.inf).min(1, initial=np.inf)
    return sizes.max(1, initial=0.0) / np.where(np.isfinite(low), low, 1.0)


def _advice(values: dict[str, Tensor], remedy: str) -> tuple[str, ...]:
    """Sentences, the most serious first; `remedy` is what makes a solution smooth or unique."""
    status, condition, weak = (values[k] for k in ("status", "condition", "weakly_active"))
    solved = status <= Status.INACCURATE
    kinked = weak > 0
    rules = (
        (
            ~solved,
            "not solved; check the parameters, soften the constraints by a slack with a penalty, or set "
            "on_failure='nan' or 'fallback'.",
        ),
        (
            solved & (values["margin"] < NEAR),
            f"nearly infeasible: a change of the constraints by less than {NEAR:g} of their size may leave no feasible "
            "point, where duals and gradients are large; reformulate with a slack, or bound the parameters.",
        ),
        (
            solved & (condition == torch.inf),
            "singular adjoint system: the solution or its duals are not unique and the gradient is a least-squares "
            f"one; remove redundant constraints, or {remedy}.",
        ),
        (
            solved & (condition > ILL_CONDITIONED) & (condition < torch.inf),
            f"adjoint system of condition over {ILL_CONDITIONED:g}: digits of the gradient are lost; scale variables "
            "and constraints to similar magnitudes.",
        ),
        (
            solved & kinked,
            "weakly active constraints, slack and multiplier both zero: the solution has a kink there and the "
            f"gradient is that of one side; {remedy}.",
        ),
        (
            solved & (values["adjoint_residual"] > INEXACT),
            f"backward solve that misses its tolerance: the gradient is a least-squares one; {remedy}.",
        ),
        (
            solved & ~kinked & (values["disagreement"] > DISAGREEMENT),
            "gradient that differs from central differences: a constraint changes its activity within the step, or "
            f"the solution is inaccurate; try a smaller step=, or {remedy}.",
        ),
        (status == Status.INACCURATE, "solved inaccurately; scale the data, or try another solver."),
        (
            solved & (values["spread"] > SPREAD),
            f"data whose magnitudes span more than {SPREAD:g}; choose units in which they are alike.",
        ),
    )
    found = tuple(f"{_who(mask)}: {text}" for mask, text in rules if bool(mask.any()))
    return found or ("Nothing to object to: the solution is unique, and its gradient agrees with differences.",)


def _who(mask: Tensor) -> str:
    if not mask.dim():
        return "The problem"
    where = torch.nonzero(mask).tolist()
    names = ", ".join(str(w[0] if len(w) == 1 else tuple(w)) for w in where[:4])
    return f"{len(where)} of {mask.numel()} samples ({names}{', ...' if len(where) > 4 else ''})"


def _number(value: Tensor) -> str:
    return f"{float(value):.3g}"
