"""Random QPs and LPs of one structure as CVXPY problems, kinds of hard data, and checks that share no code with us."""

from dataclasses import dataclass, field

import clarabel
import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch
from scipy.optimize import linprog

from convexlearn import ConvexLayer

KINDS = ("plain", "integer", "redundant", "duplicate", "fixed", "weak", "scaled", "units", "mixed")


@dataclass(eq=False)
class Family:
    """min 1/2 |Fx|^2 + q'x + w'|x|  s.t.  Ax = b, Gx <= h, l <= x <= u; every letter but x is a parameter."""

    n: int
    rank: int = 0
    eq: int = 0
    ineq: int = 0
    bounds: bool = True
    norm1: bool = False
    options: dict = field(default_factory=dict)
    solver: str | None = None

    def __post_init__(self):
        n, x = self.n, cp.Variable(self.n, name="x")
        shapes = {"q": n}
        shapes |= {"F": (self.rank, n)} if self.rank else {}
        shapes |= {"w": n} if self.norm1 else {}
        shapes |= {"A": (self.eq, n), "b": self.eq} if self.eq else {}
        shapes |= {"G": (self.ineq, n), "h": self.ineq} if self.ineq else {}
        shapes |= {"l": n, "u": n} if self.bounds else {}
        p = {k: cp.Parameter(s, name=k, nonneg=k == "w") for k, s in shapes.items()}
        cost, constraints = p["q"] @ x, {}
        if self.rank:
            cost += 0.5 * cp.sum_squares(p["F"] @ x)
        if self.norm1:
            cost += p["w"] @ cp.abs(x)
        if self.eq:
            constraints["y"] = p["A"] @ x == p["b"]
        if self.ineq:
            constraints["z"] = p["G"] @ x <= p["h"]
        if self.bounds:
            constraints |= {"lower": x >= p["l"], "upper": x <= p["u"]}
        self.names, self.outputs = list(p), ["x", *constraints]
        variables = [x, *(c.dual_variables[0] for c in constraints.values())]
        problem = cp.Problem(cp.Minimize(cost), list(constraints.values()))
        options = self.options or None
        self.layer = ConvexLayer(
            problem, list(p.values()), variables, solver=self.solver, on_failure="nan", solver_args=options
        )

    def tensors(self, data, grad=False):
        return [torch.tensor(data[k], dtype=torch.float64).requires_grad_(grad) for k in self.names]

    def solve(self, data, **keywords):
        return self.layer.solve(*self.tensors(data), **keywords)

    def objective(self, d, x):
        value = d["q"] @ x
        value += 0.5 * np.sum((d["F"] @ x) ** 2) if self.rank else 0.0
        return value + (d["w"] @ np.abs(x) if self.norm1 else 0.0)


def sample(data, k):
    return {name: v[k] for name, v in data.items()}


def draw(family, rng, batch, kind):
    """Data (batch, ...) of a kind; feasible but for "mixed", bounded where the structure allows it."""
    n, whole = family.n, kind == "integer"

    def normal(*shape):
        shape = (batch, *shape)
        return rng.integers(-2, 3, shape).astype(float) if whole else rng.standard_normal(shape)

    def positive(*shape):
        return np.abs(normal(*shape))

    x, d = normal(n), {"q": normal(n)}
    if family.rank:
        d["F"] = normal(family.rank, n)
    if family.norm1:
        d["w"] = 0.5 * positive(n)
    if family.eq:
        d["A"] = normal(family.eq, n)
        if kind == "redundant" and family.eq > 1:
            d["A"][:, -1] = 2 * d["A"][:, 0]
        d["b"] = np.einsum("bij,bj->bi", d["A"], x)
    if family.ineq:
        d["G"], half = normal(family.ineq, n), family.ineq // 2
        slack = positive(family.ineq) * (rng.random((batch, family.ineq)) < 0.5)
        if kind == "duplicate":
            d["G"][:, half : 2 * half], slack[:, half : 2 * half] = d["G"][:, :half], slack[:, :half]
        d["h"] = np.einsum("bij,bj->bi", d["G"], x) + slack
    if family.bounds:
        d["l"], d["u"] = x - positive(n), x + positive(n)
        if kind == "fixed":
            fixed = rng.random((batch, n)) < 0.4
            d["l"], d["u"] = np.where(fixed, x, d["l"]), np.where(fixed, x, d["u"])
    if kind == "weak":
        _make_weakly_active(family, rng, d, x)
    if kind in ("scaled", "units"):
        _rescale(rng, d, kind == "scaled")
    if kind == "mixed":
        _spoil(rng, d)
    return d


def _make_weakly_active(family, rng, d, x):
    """A cost for which x is optimal with half the active constraints' multipliers zero."""
    batch, n = x.shape
    q = -np.einsum("brn,brm,bm->bn", d["F"], d["F"], x) if family.rank else np.zeros((batch, n))
    if family.eq:
        q -= np.einsum("bin,bi->bn", d["A"], rng.standard_normal((batch, family.eq)))
    if family.ineq:
        active = d["h"] - np.einsum("bij,bj->bi", d["G"], x) < 1e-12
        z = active * (rng.random(active.shape) < 0.5) * rng.random(active.shape)
        q -= np.einsum("bin,bi->bn", d["G"], z)
    if family.bounds:
        at = rng.random((batch, n)) < 0.4
        d["l"] = np.where(at, x, d["l"])
        q += at * (rng.random((batch, n)) < 0.5) * rng.random((batch, n))
    d["q"] = q


def _rescale(rng, d, variables):
    """Rows in other units, and variables (1e-3..1e3) or the cost (1e-6..1e6)."""
    batch, n = d["q"].shape
    for matrix, right in (("A", "b"), ("G", "h")):
        if matrix in d:
            width = 3 if variables else 6
            rows = 10.0 ** rng.uniform(-width, width, d[right].shape)
            d[matrix], d[right] = d[matrix] * rows[:, :, None], d[right] * rows
    column = 10.0 ** rng.uniform(-3, 3, (batch, n)) if variables else np.ones((batch, n))
    cost = np.ones((batch, 1)) if variables else 10.0 ** rng.uniform(-6, 6, (batch, 1))
    for name in d.keys() & {"A", "G", "F"}:
        d[name] = d[name] * column[:, None, :] * (np.sqrt(cost)[:, :, None] if name == "F" else 1.0)
    for name in d.keys() & {"q", "w"}:
        d[name] = d[name] * column * cost
    for name in d.keys() & {"l", "u"}:
        d[name] = d[name] / column


def _spoil(rng, d):
    """A quarter each: as it is, made infeasible, other right-hand sides, a steeper and flatter cost."""
    for k in range(len(d["q"])):
        change = rng.integers(4)
        if change == 1 and "l" in d:
            i = rng.integers(d["q"].shape[1])
            d["l"][k, i] = d["u"][k, i] + 0.1 + rng.random()
        elif change == 1 and "G" in d and d["G"].shape[1] > 1:
            d["G"][k, 1], d["h"][k, 1] = -d["G"][k, 0], -d["h"][k, 0] - 0.5
        elif change == 2:
            for name in d.keys() & {"b", "h"}:
                d[name][k] = 2 * rng.standard_normal(d[name][k].shape)
        elif change == 3:
            d["q"][k] *= 5
            if "F" in d and rng.random() < 0.5:
                d["F"][k] = 0


def optimality_error(d, s):
    """Relative violation of the optimality conditions of one sample d at the point and multipliers s.

    Rows are judged in their own units, so that small ones count as much as large ones.
    """
    x, terms, primal, sizes, gaps, signs = s["x"], [d["q"]], [0.0], [1.0, np.abs(s["x"]).max()], [0.0], [0.0]
    parts = [d["q"]]
    rows = [(d["A"], d["b"], np.abs)] if "A" in d else []
    rows += [(d["G"], d["h"], lambda v: v.clip(min=0))] if "G" in d else []
    own = [positive(_units(M, M @ x - v)) / (sizes[0] + sizes[1] + np.abs(_units(M, v))) for M, v, positive in rows]
    if "F" in d:
        terms.append(d["F"].T @ (d["F"] @ x))
        parts.append(np.abs(d["F"]).T @ (np.abs(d["F"]) @ np.abs(x)))
    if "A" in d:
        terms.append(d["A"].T @ s["y"])
        primal.append(np.abs(d["A"] @ x - d["b"]).max())
        sizes.append(np.abs(d["b"]).max())
    inequalities = [("z", "h", d["G"] @ x, 1)] if "G" in d else []
    inequalities += [("lower", "l", x, -1), ("upper", "u", x, 1)] if "l" in d else []
    for dual, limit, value, sign in inequalities:
        slack, z = sign * (d[limit] - value), s[dual]
        terms.append(d["G"].T @ z if dual == "z" else sign * z)
        primal.append(-slack.min())
        gaps.append(np.abs(slack * z).max())
        signs.append(-z.min())
        sizes += [np.abs(d[limit]).max(), np.abs(value).max()]
    pull, scale = -np.sum(terms, 0), 1 + max(np.abs(t).max() for t in [*terms, *parts])
    if "w" in d:
        v = np.clip(pull, -d["w"], d["w"])
        pull = pull - v
        gaps.append(np.abs(d["w"] * np.abs(x) - v * x).max())
    worst = max((v[np.abs(M).max(1) > 0].max(initial=0.0) for v, (M, _, _) in zip(own, rows)), default=0.0)
    return max(
        worst, max(primal) / max(sizes), np.abs(pull).max() / scale, max(signs) / scale, max(gaps) / max(sizes) / scale
    )


def _stacked(family, d):
    """P, q, equality and inequality rows over (x, t) with |x| <= t."""
    n, t, eye = family.n, family.n if family.norm1 else 0, np.eye(family.n)
    P = sp.block_diag([d["F"].T @ d["F"] if family.rank else np.zeros((n, n)), np.zeros((t, t))], format="csc")
    q = np.concatenate([d["q"], d["w"] if t else []])
    equal = (np.hstack([d["A"], np.zeros((family.eq, t))]), d["b"]) if family.eq else (np.zeros((0, n + t)), [])
    rows = [(d["G"], d["h"])] if family.ineq else []
    rows += [(-eye, -d["l"]), (eye, d["u"])] if family.bounds else []
    left = [np.hstack([r, np.zeros((len(r), t))]) for r, _ in rows]
    right = [h for _, h in rows]
    if t:
        left += [np.hstack([eye, -eye]), np.hstack([-eye, -eye])]
        right += [np.zeros(n), np.zeros(n)]
    G = np.vstack([np.zeros((0, n + t)), *left])
    return P, q, *equal, G, np.concatenate([np.zeros(0), *right])


def clarabel_verdict(family, d):
    """Clarabel's status and objective value for one sample, whose rows and cost it gets in comparable units."""
    P, q, A, b, G, h = _stacked(family, d)
    settings = clarabel.DefaultSettings()
    settings.verbose, settings.presolve_enable = False, False
    settings.tol_feas = settings.tol_gap_abs = settings.tol_gap_rel = 1e-9
    cones = [clarabel.ZeroConeT(len(b)), clarabel.NonnegativeConeT(len(h))]
    cones = [c for c, k in zip(cones, (len(b), len(h))) if k]
    unit = max(np.abs(q).max(), abs(P).max(), 1e-300)
    upper, rows = sp.csc_matrix(sp.triu(P) / unit), sp.csc_matrix(np.vstack([_unit(A), _unit(G)]))
    right = np.concatenate([_units(A, b), _units(G, h)])
    found = clarabel.DefaultSolver(upper, q / unit, rows, right, cones, settings).solve()
    return str(found.status), found.obj_val * unit


def highs_says_infeasible(family, d):
    """Whether HiGHS finds no feasible point."""
    _, q, A, b, G, h = _stacked(family, d)
    return linprog(0 * q, _unit(G), _units(G, h), _unit(A), _units(A, b), bounds=(None, None)).status == 2


def highs_finds_a_ray(family, d):
    """Whether HiGHS finds a direction of unbounded descent."""
    _, q, A, _, G, _ = _stacked(family, d)
    curved = np.hstack([d["F"], np.zeros((family.rank, len(q) - family.n))]) if family.rank else A[:0]
    curved = _unit(np.vstack([A, curved]))
    G = _unit(G)
    found = linprog(q / np.abs(q).max(), G, np.zeros(len(G)), curved, np.zeros(len(curved)), bounds=(-1, 1))
    return found.status == 0 and found.fun < -1e-8


def _sizes(rows):
    return np.maximum(np.abs(rows).max(1, initial=0.0), 1e-300)


def _unit(rows):
    return rows / _sizes(rows)[:, None]


def _units(rows, right):
    return np.asarray(right) / _sizes(rows)
