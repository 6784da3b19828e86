"""Recipes: control policies that are convex problems, as ConvexRules (Examples 7 and 12 of the paper).

A recipe only declares the CVXPY problem; `rule.problem()` shows it. The matrices that `learn` names are
learned parameters of the rule, in their domain; the others are constants of the problem.
"""

from collections.abc import Callable, Sequence
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from cvxpy.constraints.constraint import Constraint
from torch import Tensor

from convexlearn.checks import FUNCTION, NAMES, checked, number, shown
from convexlearn.domains import Domain
from convexlearn.errors import DomainError, OptionError, ShapeError, suggest
from convexlearn.inputs import as_tensor
from convexlearn.riccati import dare
from convexlearn.rules.convex import ConvexRule


@checked(constraints=FUNCTION, learn=NAMES)
def adp(
    A: Any,
    B: Any,
    R: Any,
    S: Any,
    q: Any = None,
    *,
    limit: Any = None,
    constraints: Callable[[Any, Any], Sequence[Any]] | None = None,
    learn: Sequence[str] = ("S", "q"),
    **options: Any,
) -> ConvexRule:
    """Approximate dynamic programming: s = argmin u'Ru + |S y|^2 + q'y with y = A x + B u, |u| <= limit.

    |S y|^2 + q'y stands for the value of the next state y. A `(n, n)`, B `(n, m)`, R `(m, m)` PSD, S `(k, n)`,
    q `(n,)` (zero by default). limit: a number, `(m,)`, or a pair (low, high) of such; None for no limit.
    constraints: function of (u, y), CVXPY expressions, giving more constraints. learn: which of A, B, R, S, q
    are learned. options: those of ConvexRule. State x `(B, n)` -> input s `(B, m)`.

    With S'S the solution of the Riccati equation, q = 0 and no limit this is LQR. Source: Agrawal, Barratt,
    Boyd, Stellato, Learning convex optimization control policies (2020).

    >>> one = torch.ones(1, 1)
    >>> adp(one, one, 2 * one, 2**0.5 * one, limit=0.7)(torch.tensor([[1.0], [2.0]])).detach().flatten()
    tensor([-0.5000, -0.7000])
    """
    given = {"A": A, "B": B, "R": R, "S": S, "q": np.zeros(_columns("A", A)) if q is None else q}
    n, m = _check_model("adp", given, {"A": "nn", "B": "nm", "R": "mm", "S": "kn", "q": "n"})
    terms = _Terms("adp", given, learn)
    x, u, y = cp.Parameter(n, name="x"), cp.Variable(m, name="u"), cp.Variable(n, name="y")
    cost = terms.quadratic(u, "R") + cp.sum_squares(terms["S"] @ y)
    if q is not None or "q" in learn:
        cost += terms["q"] @ y
    declared = [y == terms["A"] @ x + terms["B"] @ u, *_within("limit", u, limit, m)]
    declared += [] if constraints is None else _constraints(constraints(u, y))
    return ConvexRule(cp.Problem(cp.Minimize(cost), declared), context=x, decision=u, learn=list(learn), **options)


@checked(learn=NAMES, soft=number(above=0))
def mpc(
    A: Any,
    B: Any,
    Q: Any,
    R: Any,
    horizon: int,
    *,
    terminal: Any = None,
    input_limit: Any = None,
    state_limit: Any = None,
    soft: float | None = None,
    forecast: Any = None,
    learn: Sequence[str] = (),
    **options: Any,
) -> ConvexRule:
    """Model predictive control: the first input of the plan with the least cost over `horizon` steps T.

    minimize sum_{t<T} z_t'Q z_t + u_t'R u_t + z_T' terminal z_T, z_0 = x, z_{t+1} = A z_t + B u_t + E d_t, within
    `input_limit` (t < T) and `state_limit` (1 <= t <= T): a number, a vector, or a pair (low, high) of such.
    terminal: weight `(n, n)` of the last state, by default the Riccati solution, with which an unconstrained
    plan of any length is LQR's. soft: None, or the weight of the 1-norm of how far states lie outside; the
    plan then exists from every state, and keeps the limits wherever that is possible if the weight is large.
    forecast: E `(n, k)`; the rule then has a second context d `(B, T, k)`. learn: which of A, B, Q, R, terminal,
    forecast are learned. options: those of ConvexRule. x `(B, n)` (and d) -> s `(B, m)`.

    Source: Example 7 and Eq. 13 of the paper.

    >>> one = torch.ones(1, 1)
    >>> rule = mpc(one, one, one, 2 * one, 3, input_limit=0.7)
    >>> rule(torch.tensor([[1.0], [9.0]])).flatten()
    tensor([-0.5000, -0.7000])
    """
    given = {"A": A, "B": B, "Q": Q, "R": R, "terminal": terminal, "forecast": forecast}
    shapes = {"A": "nn", "B": "nm", "Q": "nn", "R": "mm", "terminal": "nn", "forecast": "nk"}
    given = {k: value for k, value in given.items() if value is not None or k not in ("terminal", "forecast")}
    n, m = _check_model("mpc", given, {name: shapes[name] for name in given})
    if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
        raise OptionError(f"mpc: horizon must be a positive number of steps, got {horizon!r}")
    if soft is not None and state_limit is None:
        raise OptionError(f"mpc: soft is the positive weight of leaving state_limit, got {soft!r} and {state_limit!r}")
    if terminal is None:
        given["terminal"] = dare(*(_tensor(name, given[name]) for name in ("A", "B", "Q", "R"))).numpy()
    terms = _Terms("mpc", given, learn)
    x, u, z = cp.Parameter(n, name="x"), cp.Variable((horizon, m), name="u"), cp.Variable((horizon + 1, n), name="z")
    context, drift = [x], 0
    declared: list[Any] = [z[0] == x]
    if forecast is not None:
        d = cp.Parameter((horizon, _columns("forecast", forecast)), name="d")
        ahead = cp.Variable(d.shape, name="ahead")  # DPP forbids a product of two parameters
        context.append(d)
        declared.append(ahead == d)
        drift = ahead @ terms["forecast"].T
    declared.append(z[1:] == z[:-1] @ terms["A"].T + u @ terms["B"].T + drift)
    declared += _within("input_limit", u, input_limit, m)
    cost = sum(terms.quadratic(z[t], "Q") + terms.quadratic(u[t], "R") for t in range(horizon))
    cost += terms.quadratic(z[horizon], "terminal")
    slack = 0
    if soft is not None:
        slack = cp.Variable((horizon, n), nonneg=True, name="slack")
        cost += soft * cp.sum(slack)
    declared += _within("state_limit", z[1:], state_limit, n, slack)
    return ConvexRule(cp.Problem(cp.Minimize(cost), declared), context, u[0], learn=list(learn), **options)


def _constraints(given: Any) -> list[Any]:
    """What the caller's function returned, which has to be CVXPY constraints."""
    found = list(given) if isinstance(given, list | tuple) else [given]
    for constraint in found:
        if not isinstance(constraint, Constraint):
            raise OptionError(
                f"adp: constraints(u, y) must return a list of CVXPY constraints, got {shown(constraint)}"
            )
    return found


class _Terms:
    """The matrices of a recipe by name: constants, or parameters where learned; weights are PSD."""

    def __init__(self, recipe: str, given: dict[str, Any], learn: Sequence[str]) -> None:
        for name in learn:
            if name not in given:
                raise OptionError(f"{recipe}: cannot learn '{name}'; {suggest(name, given)}")
        self.weights: dict[str, np.ndarray] = {}
        self.parameters: dict[str, Any] = {}
        for name, value in given.items():
            array = _tensor(name, value).numpy()
            if name in ("Q", "R", "terminal"):
                Domain.from_attributes(array.shape, {"PSD": True}).check(name, torch.as_tensor(array))
            self.weights[name] = array
            if name in learn:
                psd = name in ("Q", "R", "terminal")
                self.parameters[name] = cp.Parameter(array.shape, name=name, PSD=psd or None, value=array)

    def __getitem__(self, name: str) -> Any:
        return self.parameters.get(name, self.weights[name])

    def quadratic(self, v: Any, name: str) -> Any:
        """v'Mv with M the weight of that name."""
        learned = self.parameters.get(name)
        return cp.quad_form(v, cp.psd_wrap(self.weights[name]) if learned is None else learned)


def _within(name: str, v: Any, limit: Any, size: int, slack: Any = 0) -> list[Any]:
    """low - slack <= v <= high + slack, v `(size,)` or `(T, size)`; infinite bounds are left out."""
    if limit is None:
        return []
    low, high = limit if isinstance(limit, tuple | list) and len(limit) == 2 else (_negative(name, limit), limit)
    bounds = []
    for value in (low, high):
        array = np.asarray(_tensor(name, value))
        if bool(np.isnan(array).any()):
            raise DomainError(f"{name} has NaN entries; inf is no limit")
        if array.shape not in {(), (size,)}:
            raise ShapeError(f"{name} must be a number, a vector ({size},) or a pair (low, high), got {array.shape}")
        bounds.append(np.broadcast_to(array, (size,)))
    if not bool((bounds[0] <= bounds[1]).all()):
        raise DomainError(f"{name}: the lower limit {low} exceeds the upper limit {high}")
    rows = []
    for sign, bound in ((-1, bounds[0]), (1, bounds[1])):
        there = np.flatnonzero(np.isfinite(bound))
        if len(there):
            kept = slack if isinstance(slack, int) else slack[..., there]
            rows.append(sign * v[..., there] - kept <= np.broadcast_to(sign * bound[there], v[..., there].shape))
    return rows


def _negative(name: str, limit: Any) -> Any:
    return -_tensor(name, limit)


def _check_model(recipe: str, given: dict[str, Any], letters: dict[str, str]) -> tuple[int, int]:
    """(n, m); all matrices must fit and be finite."""
    sizes: dict[str, int] = {}
    for name, wanted in letters.items():
        value = _tensor(name, given.get(name))
        fits = value.ndim == len(wanted) and all(
            sizes.setdefault(k, size) == size for k, size in zip(wanted, value.shape)
        )
        if not fits:
            expected = ", ".join(f"{k} ({', '.join(v)})" for k, v in letters.items())
            got = ", ".join(f"{k} {tuple(_tensor(k, given.get(k)).shape)}" for k in letters)
            raise ShapeError(f"{recipe}: {name} does not fit: expected {expected}; got {got}")
        if not bool(torch.isfinite(value).all()):
            raise DomainError(f"{recipe}: {name} has NaN or infinite entries")
    return sizes["n"], sizes["m"]


def _columns(name: str, value: Any) -> int:
    shape = _tensor(name, value).shape
    if len(shape) != 2:
        raise ShapeError(f"{name} must be a matrix, got shape {tuple(shape)}")
    return shape[1]


def _tensor(name: str, value: Any) -> Tensor:
    return as_tensor(name, value).detach().cpu().double()
