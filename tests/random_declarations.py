"""Random convex problems as a user would declare them: sums of atoms, constraints of all cones, DPP parameters."""

from dataclasses import dataclass, field

import cvxpy as cp
import numpy as np


@dataclass(eq=False)
class Declared:
    """A feasible, strongly convex problem; its parameters have values. `kinds` names atoms and constraints."""

    problem: cp.Problem
    variables: list
    parameters: list
    kinds: list[str] = field(default_factory=list)


class Draw:
    """Draws a problem in x `(n,)` around a point x0 that stays strictly feasible."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.n = int(self.rng.integers(2, 6))
        self.x = cp.Variable(self.n, name="x")
        self.x0 = self.rng.standard_normal(self.n)
        self.parameters: list[cp.Parameter] = []

    def parameter(self, value, **attributes):
        """A parameter of this value, one in four times a constant instead."""
        value = np.asarray(value, dtype=float)
        if self.rng.random() < 0.25:
            return cp.Constant(value)
        p = cp.Parameter(value.shape, name=f"p{len(self.parameters)}", value=value, **attributes)
        self.parameters.append(p)
        return p

    def weight(self):
        return self.parameter(self.rng.uniform(0.1, 2.0), nonneg=True)

    def map(self, rows=None):
        """A x - b `(m,)`, both parameters."""
        m = int(self.rng.integers(1, 5)) if rows is None else rows
        return self.parameter(self.rng.standard_normal((m, self.n))) @ self.x - self.parameter(
            self.rng.standard_normal(m)
        )


def _weighted(atom, rows=None):
    """A convex function of a map, times a weight: one of both is a parameter, for DPP does not allow their product."""

    def term(d):
        if d.rng.random() < 0.5:
            m = int(d.rng.integers(1, 5)) if rows is None else rows
            inner = d.rng.standard_normal((m, d.n)) @ d.x - d.rng.standard_normal(m)
            return d.weight() * atom(inner)
        return float(d.rng.uniform(0.1, 2.0)) * atom(d.map(rows))

    return term


TERMS = {
    "least squares": lambda d: 0.5 * cp.sum_squares(d.map()),
    "weighted 1-norm": lambda d: d.parameter(d.rng.uniform(0, 2, d.n), nonneg=True) @ cp.abs(d.x),
    "maximum": lambda d: cp.sum(cp.maximum(d.map(2), d.map(2))),
    "total variation": lambda d: d.weight() * cp.sum(cp.abs(cp.diff(d.x))),
    "linear": lambda d: d.parameter(d.rng.standard_normal(d.n)) @ d.x,
    "quadratic form": lambda d: cp.quad_form(d.x, np.diag(d.rng.uniform(0, 1, d.n))),
    "exponential": lambda d: d.weight() * cp.sum(cp.exp(0.3 * d.x)),
    "square over linear": lambda d: cp.quad_over_lin(d.map(), 8.0 + d.x[0]),
    "1-norm": _weighted(cp.norm1),
    "2-norm": _weighted(cp.norm2),
    "max-norm": _weighted(cp.norm_inf),
    "huber": _weighted(lambda v: cp.sum(cp.huber(v, 0.7))),
    "hinge": _weighted(lambda v: cp.sum(cp.pos(v))),
    "largest": _weighted(cp.max),
    "two largest": _weighted(lambda v: cp.sum_largest(v, 2), 3),
    "logistic": _weighted(lambda v: cp.sum(cp.logistic(v))),
    "log-sum-exp": _weighted(cp.log_sum_exp, 3),
    "power": _weighted(lambda v: cp.sum(cp.power(v, 4))),
}


def _equalities(d):
    A = d.rng.standard_normal((1, d.n))
    return d.parameter(A) @ d.x == d.parameter(A @ d.x0)


def _halfspaces(d):
    m = int(d.rng.integers(1, 4))
    A = d.rng.standard_normal((m, d.n))
    return d.parameter(A) @ d.x <= d.parameter(A @ d.x0 + d.rng.uniform(0.05, 1.0, m))


CONSTRAINTS = {
    "equality": _equalities,
    "halfspaces": _halfspaces,
    "lower bounds": lambda d: d.x >= d.parameter(d.x0 - d.rng.uniform(0.05, 1, d.n)),
    "upper bounds": lambda d: d.x <= d.parameter(d.x0 + d.rng.uniform(0.05, 1, d.n)),
    "ball": lambda d: cp.norm(d.x) <= d.parameter(np.linalg.norm(d.x0) + d.rng.uniform(0.05, 1), nonneg=True),
    "diamond": lambda d: cp.norm1(d.x) <= d.parameter(np.abs(d.x0).sum() + d.rng.uniform(0.05, 1), nonneg=True),
    "ellipsoid": lambda d: cp.sum_squares(d.x) <= d.parameter(d.x0 @ d.x0 + d.rng.uniform(0.05, 1), nonneg=True),
    "exponentials": lambda d: cp.sum(cp.exp(d.x)) <= d.parameter(np.exp(d.x0).sum() + d.rng.uniform(0.05, 1)),
    "logarithm": lambda d: cp.sum(cp.log(d.x + 8.0)) >= d.parameter(np.log(d.x0 + 8.0).sum() - d.rng.uniform(0.05, 1)),
}


def _chosen(d, table, count):
    return [str(name) for name in d.rng.choice(list(table), size=int(count), replace=False)]


def declare(seed: int) -> Declared:
    """A problem of one to three terms and up to three constraints."""
    d = Draw(seed)
    terms = _chosen(d, TERMS, d.rng.integers(1, 4))
    limits = _chosen(d, CONSTRAINTS, d.rng.integers(0, 4))
    strong = 0.5 * d.rng.uniform(0.2, 2.0) * cp.sum_squares(d.x)
    cost = sum((TERMS[name](d) for name in terms), strong)
    constraints = [CONSTRAINTS[name](d) for name in limits]
    if not d.parameters:
        d.parameters.append(cp.Parameter(d.n, name="p", value=d.rng.standard_normal(d.n)))
        cost += d.parameters[0] @ d.x
    return Declared(cp.Problem(cp.Minimize(cost), constraints), [d.x], d.parameters, [*terms, *limits])
