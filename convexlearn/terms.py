"""Terms of a CVXPY problem: quadratics of affine expressions, linear terms, and terms with a proximal map."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import cvxpy as cp
import numpy as np
from cvxpy.atoms.affine.add_expr import AddExpression
from cvxpy.atoms.affine.binary_operators import DivExpression, MulExpression, multiply
from cvxpy.atoms.affine.promote import Promote
from cvxpy.atoms.affine.sum import Sum
from cvxpy.atoms.affine.unary_operators import NegExpression
from cvxpy.atoms.elementwise.huber import huber
from cvxpy.atoms.elementwise.power import Power
from cvxpy.atoms.norm1 import norm1
from cvxpy.atoms.norm_inf import norm_inf
from cvxpy.atoms.norm_nuc import normNuc
from cvxpy.atoms.pnorm import Pnorm
from cvxpy.atoms.quad_form import QuadForm
from cvxpy.atoms.quad_over_lin import quad_over_lin
from cvxpy.constraints import PSD, SOC, Equality, Inequality, NonNeg, NonPos, Zero

from convexlearn.affine_maps import AffineMap, affine_map
from convexlearn.errors import CompileError
from convexlearn.expression_text import leading_sign, pretty


@dataclass(frozen=True, eq=False)
class Weight:
    """Nonnegative factor of a term: a number, or entries `(rows,)`; `absolute` where it multiplied inside a norm."""

    map: AffineMap
    absolute: bool = False


@dataclass(frozen=True, eq=False)
class Quadratic:
    """weight/2 |map|^2; flip: read it as |A z - y|^2 with the map's sign reversed."""

    map: AffineMap
    weight: Weight | None
    text: str
    flip: bool = False


@dataclass(frozen=True, eq=False)
class Bound:
    """One side of a box: entries of the map divided by scale."""

    map: AffineMap
    scale: float


@dataclass(frozen=True, eq=False)
class ProxTerm:
    """weight * kind(map; data), `kind` a key of PROXIMABLE, or "program" for one without closed form.

    data: constants or maps of constants by name. source: the CVXPY objective (scalar expression) and
    constraints that the term stands for; dropped once the split is built.
    """

    kind: str
    map: AffineMap
    text: str
    weight: Weight | None = None
    data: dict[str, Any] = field(default_factory=dict)
    source: tuple[Any, tuple] = (None, ())

    @property
    def scaled(self) -> bool:
        """True when a weight matters: false for indicators."""
        return self.kind in ("norm1", "norm0", "norm2", "group", "nuclear", "huber", "total_variation", "norm_inf")


Term = Quadratic | AffineMap | ProxTerm


class Reader:
    """Reads a problem term by term with respect to its variables, stacked in the given order."""

    def __init__(self, variables: Sequence[Any]) -> None:
        self.variables = variables

    def objective(self, expression: Any, factors: tuple = ()) -> Iterator[Term]:
        """Terms of the product of constant factors and a scalar expression that is minimized."""
        if expression.is_constant():
            return
        if expression.is_affine():
            yield self.map(_product(factors, expression))
        elif isinstance(expression, AddExpression):
            for part in expression.args:
                yield from self.objective(part, factors)
        elif isinstance(expression, NegExpression):
            yield from self.objective(expression.args[0], (*factors, cp.Constant(-1.0)))
        elif isinstance(expression, DivExpression) and expression.args[1].is_constant():
            yield from self.objective(expression.args[0], (*factors, 1 / expression.args[1]))
        elif isinstance(expression, multiply | MulExpression) and _constant_factor(expression) is not None:
            k = _constant_factor(expression)
            factor, rest = expression.args[k], expression.args[1 - k]
            if rest.size == 1:
                yield from self.objective(rest, (*factors, factor))
            else:
                yield self.total(multiply(factor, rest), factors, expression)
        elif isinstance(expression, Promote) or (isinstance(expression, Sum) and expression.args[0].size == 1):
            yield from self.objective(expression.args[0], factors)
        elif isinstance(expression, Sum) and expression.axis is None and isinstance(expression.args[0], AddExpression):
            for part in expression.args[0].args:
                yield from self.objective(cp.sum(part), factors)
        elif isinstance(expression, Sum) and expression.axis is None:
            yield self.total(expression.args[0], factors, expression)
        else:
            yield self.total(expression, factors, expression)

    def total(self, inner: Any, factors: tuple, whole: Any) -> Term:
        """The term: sum over the entries of `inner`, which may carry a weight for each entry."""
        entries: tuple = ()
        while isinstance(inner, multiply) and _constant_factor(inner) is not None:
            k = _constant_factor(inner)
            entries, inner = (*entries, inner.args[k]), inner.args[1 - k]
        quadratic = _squared(inner)
        if quadratic is not None:
            argument, factor = quadratic
            if entries:
                argument, entries = multiply(_root(entries, whole), argument), ()
            weight = self.weight((*factors, cp.Constant(factor)))
            sign = leading_sign(argument)
            text = _weighted(factors, f"|{pretty(argument, sign)}|^2", factor / 2)
            return Quadratic(self.map(argument), weight, text, sign < 0)
        for part in factors:
            if not part.is_nonneg():
                return self.program(_product(factors, whole), whole)
        found = self.atom(inner)
        if found is None:
            return self.program(_product(factors, whole), whole)
        kind, argument, data, absolute, text = found
        weight = self.weight((*factors, *entries, *absolute), bool(absolute))
        source = (_product(factors, whole), ())
        return ProxTerm(kind, self.map(argument), _weighted((*factors, *entries), text), weight, data, source)

    def atom(self, inner: Any) -> tuple[str, Any, dict, tuple, str] | None:
        """Kind, affine argument, data, factors taken out of the argument, and text of a proximable atom."""
        argument = inner.args[0] if inner.args else inner
        if isinstance(inner, norm1) and _row_norms(argument):
            inner, argument = argument, argument.args[0]
        if not argument.is_affine():
            return None
        text = pretty(argument)
        if isinstance(inner, norm1 | cp.abs):
            outside: tuple = ()
            while isinstance(argument, multiply) and (k := _constant_factor(argument)) is not None:
                outside, argument = (*outside, argument.args[k]), argument.args[1 - k]
            if not outside and (signal := _differences(argument)) is not None:
                return "total_variation", signal, {}, (), f"TV({pretty(signal)})"
            return "norm1", argument, {}, outside, f"|{text}|_1"
        if isinstance(inner, Pnorm) and inner.p == 2:
            axis: Any = inner.axis
            if axis is None:
                return "norm2", argument, {}, (), f"|{text}|_2"
            return "group", argument, {"axis": axis}, (), f"|{text}|_{{1,2}}"
        if isinstance(inner, norm_inf) and inner.axis is None:
            return "norm_inf", argument, {}, (), f"|{text}|_inf"
        if isinstance(inner, normNuc):
            return "nuclear", argument, {}, (), f"|{text}|_*"
        if isinstance(inner, huber) and inner.M.value is not None and inner.M.size == 1:
            return "huber", argument, {"M": float(inner.M.value)}, (), f"huber({text})"
        return None

    def constraint(self, c: Any) -> ProxTerm:
        """The indicator of one constraint."""
        text, source = str(c), (None, (c,))
        if isinstance(c, Equality | Zero):
            difference = c.args[0] - c.args[1] if len(c.args) > 1 else c.args[0]
            return ProxTerm("zero", self.map(difference), _zero_text(c), source=source)
        if isinstance(c, PSD):
            symmetric = all(v.is_symmetric() for v in c.variables())
            return ProxTerm("psd_cone", self.map(c.args[0]), text, data={"symmetric": symmetric}, source=source)
        if isinstance(c, SOC) and c.args[0].size == 1 and c.args[1].ndim <= 1:
            stacked = cp.hstack([cp.reshape(c.args[0], (1,), order="C"), cp.reshape(c.args[1], (-1,), order="C")])
            return ProxTerm("second_order_cone", self.map(stacked), text, source=source)
        if isinstance(c, NonNeg | NonPos):
            return self.nonnegative(c.args[0] if isinstance(c, NonNeg) else -c.args[0], text, source)
        if isinstance(c, Inequality):
            left, right = c.args
            if (right - left).is_affine():
                return self.nonnegative(right - left, text, source)
            ball = self.ball(left, right)
            if ball is not None:
                kind, argument, data = ball
                return ProxTerm(kind, self.map(argument), text, data=data, source=source)
        return self.program(None, c)

    def ball(self, left: Any, right: Any) -> tuple[str, Any, dict] | None:
        """A norm that is at most a constant."""
        if not right.is_constant() or right.size != 1:
            return None
        squared = _squared(left)
        if squared is not None and right.is_nonneg() and not right.parameters():
            argument, factor = squared
            return "ball", argument, {"radius": self.map(cp.Constant(np.sqrt(2 * right.value / factor)))}
        argument = left.args[0] if left.args else left
        if not argument.is_affine() or getattr(left, "axis", None) is not None:
            return None
        radius = self.map(right)
        if isinstance(left, Pnorm) and left.p == 2:
            return "ball", argument, {"radius": radius}
        if isinstance(left, norm1):
            return "norm1_ball", argument, {"radius": radius}
        if isinstance(left, norm_inf):
            return "box", argument, {"lower": [Bound(radius, -1.0)], "upper": [Bound(radius, 1.0)]}
        return None

    def nonnegative(self, expression: Any, text: str, source: tuple) -> ProxTerm:
        """expression >= 0, as a box on entries of the variables where it is one."""
        mapped = self.map(expression)
        linear = mapped.fixed
        if linear is not None and linear.index is not None:
            side = Bound(replace(mapped, fixed=None), -linear.scale)
            unit = replace(linear_part(mapped), shape=(mapped.rows,))
            data = {"lower": [side], "upper": []} if linear.scale > 0 else {"lower": [], "upper": [side]}
            return ProxTerm("box", unit, text, data=data, source=source)
        return ProxTerm("nonnegative", mapped, text, source=source)

    def attributes(self, variable: Any) -> Iterator[ProxTerm]:
        """Indicators of what a variable's attributes say."""
        given = {k for k, v in variable.attributes.items() if v is not None and v is not False}
        known = {"nonneg", "nonpos", "pos", "neg", "bounds", "PSD", "NSD", "symmetric", "complex"}
        if given - known:
            raise CompileError(
                f"variable '{variable.name()}' is {', '.join(sorted(given - known))}, which has no proximal map here; "
                "declare it without that attribute and state a convex constraint"
            )
        name = variable.name()
        if given & {"nonneg", "pos"}:
            yield self.nonnegative(variable, f"{name} >= 0", (None, (variable >= 0,)))
        if given & {"nonpos", "neg"}:
            yield self.nonnegative(-variable, f"{name} <= 0", (None, (variable <= 0,)))
        if "bounds" in given:
            for bound, sign, relation in zip(variable.bounds, (1, -1), (">=", "<=")):
                if bound is not None and np.all(np.isfinite(bound)):
                    constraint = variable >= bound if sign > 0 else variable <= bound
                    yield self.nonnegative(
                        sign * (variable - bound), f"{name} {relation} {_short(bound)}", (None, (constraint,))
                    )
        if given & {"PSD", "NSD"}:
            signed = variable if "PSD" in given else -variable
            yield ProxTerm(
                "psd_cone", self.map(signed), f"{name} PSD", data={"symmetric": True}, source=(None, (signed >> 0,))
            )
        elif "symmetric" in given:
            yield ProxTerm("symmetric", self.map(variable), f"{name} symmetric", source=(None, ()))

    def program(self, objective: Any, culprit: Any) -> ProxTerm:
        """A term without closed form, on the variables in it."""
        if culprit.variables() and any(v.is_complex() for v in culprit.variables()):
            raise CompileError(
                f"cannot split the term {culprit}: it has no proximal map in closed form, and one by a "
                "ConvexLayer needs real variables; write it in real and imaginary parts"
            )
        own = [v for v in self.variables if any(v.id == u.id for u in culprit.variables())]
        stacked = cp.hstack([cp.reshape(v, (v.size,), order="C") for v in own])
        constraints = () if objective is not None else (culprit,)
        return ProxTerm("program", self.map(stacked), str(culprit), source=(objective, constraints))

    def map(self, expression: Any) -> AffineMap:
        """The affine expression in the stacked variables."""
        return affine_map(expression, self.variables)

    def weight(self, factors: tuple, absolute: bool = False) -> Weight | None:
        """The product of constant factors; None for 1."""
        if not factors:
            return None
        product = _product(factors, cp.Constant(1.0))
        return None if _is_one(product) else Weight(affine_map(product, []), absolute)


def linear_part(mapped: AffineMap) -> AffineMap:
    """The map without offset, scaled to unit entries: for a selection of variables."""
    linear = mapped.fixed
    assert linear is not None
    unit = linear.scaled(1 / linear.scale)
    return replace(mapped, fixed=unit, offsets=(), constant=mapped.constant * 0)


def _product(factors: tuple, expression: Any) -> Any:
    for factor in factors:
        if not _is_one(factor):
            expression = (
                multiply(factor, expression) if factor.size == 1 or expression.size > 1 else factor * expression
            )
    return expression


def _is_one(e: Any) -> bool:
    return not e.parameters() and e.size == 1 and float(np.real(e.value)) == 1.0


def _constant_factor(e: Any) -> Any:
    """0 or 1: the constant argument of a product, else None."""
    return next((k for k in (0, 1) if e.args[k].is_constant()), None)


def _squared(expression: Any) -> tuple[Any, float] | None:
    """(a, w) where the sum over the entries is w/2 |a|^2 for an affine a."""
    e, kind = expression, type(expression)
    if issubclass(kind, quad_over_lin) and e.args[0].is_affine() and not e.args[1].parameters() and e.axis is None:
        return e.args[0], 2.0 / float(e.args[1].value)
    if issubclass(kind, Power) and float(e.p.value if hasattr(e.p, "value") else e.p) == 2:
        inner = e.args[0]
        if inner.is_affine():
            return inner, 2.0
        if isinstance(inner, Pnorm) and inner.p == 2 and inner.axis is None and inner.args[0].is_affine():
            return inner.args[0], 2.0
    if issubclass(kind, QuadForm) and e.args[0].is_affine():
        if e.args[1].parameters():
            raise CompileError(
                f"cannot split the term {e}: its matrix is a parameter; write sum_squares(P_sqrt @ x) with a "
                "parameter P_sqrt"
            )
        P = e.args[1].value
        values, vectors = np.linalg.eigh(np.asarray(P.todense() if hasattr(P, "todense") else P, dtype=float))
        return cp.Constant(np.sqrt(values.clip(min=0))[:, None] * vectors.T) @ e.args[0], 2.0
    return None


def _root(entries: tuple, whole: Any) -> np.ndarray:
    product = np.ones(())
    for factor in entries:
        if factor.parameters():
            raise CompileError(
                f"cannot split the term {whole}: the weights of a sum of squares are parameters; multiply inside the "
                "square by a parameter for their square root"
            )
        product = product * np.asarray(factor.value)
    return np.sqrt(product)


def _row_norms(e: Any) -> bool:
    return isinstance(e, Pnorm) and e.p == 2 and e.axis is not None


def _differences(e: Any) -> Any:
    """The vector x where e is x[1:] - x[:-1] (as in cvxpy.tv), else None."""
    if not isinstance(e, AddExpression) or len(e.args) != 2 or e.ndim != 1 or not isinstance(e.args[1], NegExpression):
        return None
    later, earlier = e.args[0], e.args[1].args[0]
    sides: tuple[Any, Any] = (later, earlier)
    leaves = [a.args[0] for a in sides if type(a).__name__ == "index"]
    if len(leaves) != 2 or leaves[0] is not leaves[1] or leaves[0].ndim != 1 or leaves[0].size != e.size + 1:
        return None
    n, keys = leaves[0].size, [a.key[0] for a in sides]
    steps = [k.step in (None, 1) and (k.start or 0, n if k.stop is None else k.stop) for k in keys]
    return leaves[0] if steps == [(1, n), (0, n - 1)] else None


def _weighted(factors: tuple, text: str, number: float = 1.0) -> str:
    names = [pretty(f) for f in factors if not _is_one(f) and f.parameters()]
    for f in factors:
        if not f.parameters() and f.size == 1:
            number *= float(np.real(f.value))
        elif not f.parameters():
            names.append(pretty(f))
    front = "1/2 " if number == 0.5 else "" if number == 1.0 else f"{number:g} "
    front = front.strip() if not names and text.startswith("|") and number == 0.5 else front
    return f"{front}{' '.join(names)}{' ' if names else ''}{text}"


def _zero_text(c: Any) -> str:
    return " == ".join(pretty(a) for a in c.args) if len(c.args) > 1 else f"{pretty(c.args[0])} == 0"


def _short(bound: Any) -> str:
    bound = np.asarray(bound)
    return f"{float(bound.flat[0]):g}" if bound.size and np.all(bound == bound.flat[0]) else "bound"
