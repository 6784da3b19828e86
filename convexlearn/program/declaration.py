"""Independent copies of CVXPY problems, and sentences about what is not DPP in them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
from cvxpy.atoms.affine.binary_operators import DivExpression, MulExpression, multiply
from cvxpy.atoms.affine.promote import Promote
from cvxpy.atoms.affine.unary_operators import NegExpression
from cvxpy.atoms.quad_form import QuadForm
from cvxpy.constraints import Equality, Inequality
from cvxpy.utilities import scopes

from convexlearn.errors import CompileError


@dataclass(frozen=True, eq=False)
class Declaration:
    """A private copy of a CVXPY problem with fresh ids, and where the caller's objects went.

    `outputs` are the copies of the requested variables, dual variables and expressions. Pickling
    keeps the copy; unpickling makes one with fresh ids, since a new process counts ids from 1.
    """

    problem: cp.Problem
    parameters: tuple[cp.Parameter, ...]
    outputs: tuple[Any, ...]

    @classmethod
    def of(cls, problem: cp.Problem, parameters: Any, outputs: Any) -> "Declaration":
        """Copy `problem`; nothing of the caller's is kept or changed."""
        leaves = {id(leaf): _fresh_leaf(leaf) for leaf in [*problem.variables(), *problem.parameters()]}
        for old in problem.variables():
            _copy_bounds(old, leaves)
        objective = problem.objective.tree_copy(id_objects=leaves)
        constraints = [c.tree_copy(id_objects=leaves) for c in problem.constraints]
        duals = {
            old.id: new
            for c, copy in zip(problem.constraints, constraints)
            for old, new in zip(c.dual_variables, copy.dual_variables)
        }
        for top in [objective, *constraints]:
            _copy_hidden(top, leaves)
        copied = tuple(_copy_output(o, leaves, duals) for o in outputs)
        return cls(cp.Problem(objective, constraints), tuple(leaves[id(p)] for p in parameters), copied)

    def copy(self) -> "Declaration":
        """Another independent copy."""
        return Declaration.of(self.problem, self.parameters, self.outputs)

    def __deepcopy__(self, memo: dict) -> "Declaration":
        return self

    def __reduce__(self) -> tuple:
        return Declaration.of, (self.problem, self.parameters, self.outputs)


def _copy_output(output: Any, leaves: dict, duals: dict) -> Any:
    if isinstance(output, cp.Variable) and output.id in duals:
        return duals[output.id]
    return output.tree_copy(id_objects=leaves)


def _fresh_leaf(leaf: Any) -> Any:
    attributes = {k: v for k, v in leaf.attributes.items() if v is not None and v is not False}
    attributes.pop("bounds", None)
    copy = type(leaf)(leaf.shape, name=leaf.name(), **attributes)
    copy.bounds = copy.attributes["bounds"] = leaf.attributes["bounds"]
    copy._value = leaf._value
    return copy


def _copy_bounds(old: cp.Variable, leaves: dict) -> None:
    bounds = old.attributes["bounds"]
    if bounds is not None:
        copied = [b.tree_copy(id_objects=leaves) if isinstance(b, cp.Expression) else b for b in bounds]
        leaf = leaves[id(old)]
        leaf.bounds = leaf.attributes["bounds"] = copied


def _copy_hidden(node: Any, leaves: dict) -> None:
    """Replace parameters that an atom keeps beside its arguments (an exponent, huber's M): tree_copy leaves them."""
    for name, value in list(vars(node).items()):
        if isinstance(value, cp.Expression) and value.parameters():
            setattr(node, name, value.tree_copy(id_objects=leaves))
    for arg in node.args:
        _copy_hidden(arg, leaves)


@contextmanager
def quiet() -> Iterator[None]:
    """Within it CVXPY doesn't warn of dense values of sparse leaves, nor of the backend that it chooses itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*a sparse CVXPY expression via", RuntimeWarning)
        warnings.filterwarnings("ignore", ".*Defaulting to the .* backend", UserWarning)
        yield


def value_of(leaf: Any) -> Any:
    """The leaf's value as a dense array, or None."""
    with quiet():
        value = leaf.value
    return value.toarray() if hasattr(value, "toarray") else value


def set_values(parameters: tuple[cp.Parameter, ...], values: list[np.ndarray]) -> None:
    """Set parameter values without CVXPY's projection check (the layer's own domain check is looser)."""
    for parameter, value in zip(parameters, values):
        value = np.array(value, dtype=float)
        if parameter.attributes["diag"]:
            parameter.save_value(sp.dia_array(np.diag(np.diag(value))))
        else:
            parameter.save_value(value)


def require_dpp(problem: Any, gp: bool, native_objective: bool) -> None:
    """Raise CompileError, naming the subexpression and a rewrite, unless the problem is DPP."""
    if problem.is_mixed_integer():
        names = [v.name() for v in problem.variables() if v.attributes["boolean"] or v.attributes["integer"]]
        raise CompileError(f"variables {names} are boolean or integer; a differentiable layer needs a convex problem")
    if any(leaf.is_complex() for leaf in [*problem.variables(), *problem.parameters()]):
        raise CompileError("complex variables and parameters are not supported; use real and imaginary parts")
    if gp:
        if not problem.is_dpp("dgp"):
            raise CompileError(f"Problem must be DPP for geometric programming. {_explain(problem, 'is_dgp')}")
        return
    if not problem.is_dpp(quad_form_dpp="qp" if native_objective else None):
        raise CompileError(f"Problem must be DPP. {_explain(problem, 'is_dcp')}")


def _explain(problem: cp.Problem, rule: str) -> str:
    if not getattr(problem, rule)():
        culprit = next(_culprits(problem, rule, dpp=False), problem)
        kind = rule[3:].upper()
        return f"It is not even {kind}: the subexpression {_text(culprit)} breaks its rules; {_remedy(culprit, kind)}"
    culprit = next(_culprits(problem, rule, dpp=True), None)
    if culprit is None:
        return (
            "A parametric quad_form needs a solver that takes a quadratic objective; rewrite "
            "quad_form(x, P) as sum_squares(P_sqrt @ x) with a parameter P_sqrt."
        )
    inner = culprit if isinstance(culprit, DivExpression) else next(_curved(culprit), culprit)
    return f"The subexpression {_text(inner)} is not affine in the parameters; {_rewrite(inner)}"


def _culprits(problem: cp.Problem, rule: str, dpp: bool) -> Iterator[Any]:
    """Smallest expressions that break the rule while their arguments keep it."""
    for top in [problem.objective, *problem.constraints]:
        if not getattr(top, rule)(dpp=dpp):
            yield from _smallest(top, rule, dpp)
            yield top


def _smallest(node: Any, rule: str, dpp: bool) -> Iterator[Any]:
    for arg in node.args:
        if not getattr(arg, rule)(dpp=dpp):
            yield from _smallest(arg, rule, dpp)
            yield arg


def _curved(node: Any) -> Iterator[Any]:
    """Largest subexpressions of parameters alone that are not affine in them."""
    with scopes.dpp_scope():
        if not node.parameters() or (hasattr(node, "is_affine") and node.is_affine()):
            return
    if not node.variables() and not isinstance(node, NegExpression | Promote):
        yield node
    else:
        for arg in node.args:
            yield from _curved(arg)


def _remedy(node: Any, kind: str) -> str:
    """What makes a subexpression DCP where that can be told from its form."""
    if kind == "DCP" and isinstance(node, QuadForm) and node.args[1].parameters():
        return f"declare the parameters of {_text(node.args[1])} with PSD=True (NSD=True when it is maximized)."
    if kind == "DCP" and isinstance(node, MulExpression | multiply):
        weight = next((a for a in node.args if a.parameters() and not a.variables()), None)
        if weight is not None:
            return (
                f"declare the parameters of {_text(weight)} with nonneg=True (or nonpos=True): its sign must be known."
            )
        return "a product of two expressions of variables is not convex; fix one factor, or make it a parameter."
    if kind == "DCP" and isinstance(node, Equality):
        return "both sides of an equality must be affine in the variables; write an inequality, or linearise."
    if kind == "DCP" and isinstance(node, cp.Minimize | cp.Maximize | Inequality):
        return "minimize convex and maximize concave functions; bound convex ones above and concave ones below."
    return "rewrite it with atoms whose curvature CVXPY knows."


def _rewrite(node: Any) -> str:
    """The usual rewrite of a subexpression that is DCP but not DPP."""
    parametric = [a for a in node.args if a.parameters()]
    feature = "compute it in torch and pass it in (ConvexRule: features=)"
    if isinstance(node, QuadForm) and node.args[0].parameters():
        return (
            f"declare a variable y, add the constraint y == {_text(node.args[0])}, and write y instead of "
            f"{_text(node.args[0])}."
        )
    if isinstance(node, QuadForm):
        return "write sum_squares(P_sqrt @ x) with a parameter P_sqrt instead of quad_form(x, P)."
    if isinstance(node, DivExpression):
        divisor = node.args[1].args[0] if isinstance(node.args[1], Promote) else node.args[1]
        return f"declare a parameter for the reciprocal of {_text(divisor)} and multiply by it; {feature}."
    if isinstance(node, MulExpression | multiply) and len(parametric) == 2:
        if any(a.variables() for a in parametric):
            return (
                "declare a variable y, add the constraint y == (the factor with the variable), and "
                f"multiply y by the other parameter; or declare one parameter for the product and {feature}."
            )
        return f"declare one parameter for the product of {_text(node.args[0])} and {_text(node.args[1])}; {feature}."
    with scopes.dpp_scope():
        return f"declare a parameter for the value of {_text(node)} itself; {feature}."


def _text(node: Any, limit: int = 120) -> str:
    text = str(node)
    return text if len(text) <= limit else text[: limit - 3] + "..."
