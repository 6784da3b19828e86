"""CVXPY expressions as short text: Hs-x rather than (H @ s) + -x."""

from typing import Any

import cvxpy as cp
import numpy as np
from cvxpy.atoms.affine.add_expr import AddExpression
from cvxpy.atoms.affine.binary_operators import MulExpression, multiply
from cvxpy.atoms.affine.promote import Promote
from cvxpy.atoms.affine.unary_operators import NegExpression

LONGEST = 60


def pretty(e: Any, sign: int = 1) -> str:
    """`sign` times the expression, variables first where it is a sum.

    >>> H, s, x = cp.Parameter((2, 3), name="H"), cp.Variable(3, name="s"), cp.Parameter(2, name="x")
    >>> pretty(H @ s - x), pretty(x - H @ s, -1)
    ('Hs-x', 'Hs-x')
    """
    text = "".join(term if term[0] == "-" or not k else "+" + term for k, term in enumerate(_terms(e, sign)))
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def leading_sign(e: Any) -> int:
    """-1 where the first variable in a sum has a minus before it, else 1."""
    for part, sign in _parts(e, 1):
        if part.variables():
            return sign
    return 1


def _terms(e: Any, sign: int) -> list[str]:
    parts = sorted(_parts(e, sign), key=lambda p: not p[0].variables())
    return [("-" if s < 0 else "") + _factor(p) for p, s in parts]


def _parts(e: Any, sign: int) -> list[tuple[Any, int]]:
    if isinstance(e, AddExpression):
        return [p for a in e.args for p in _parts(a, sign)]
    if isinstance(e, NegExpression):
        return _parts(e.args[0], -sign)
    if isinstance(e, Promote):
        return _parts(e.args[0], sign)
    return [(e, sign)]


def _factor(e: Any) -> str:
    if isinstance(e, MulExpression | multiply):
        factors = [_atom(a) for a in e.args]
        return "".join(factors) if all(len(f) == 1 for f in factors) else " ".join(factors)
    return _atom(e)


def _atom(e: Any) -> str:
    if isinstance(e, cp.Constant):
        if e.size == 1:
            return f"{float(np.real(e.value.flat[0] if hasattr(e.value, 'flat') else e.value)):g}"
        name = e.name()
        return name if name.isidentifier() else "ABC"[0]
    if not e.args:
        return e.name()
    if isinstance(e, AddExpression | NegExpression | Promote):
        return f"({pretty(e)})"
    if isinstance(e, MulExpression | multiply):
        return _factor(e)
    return str(e) if len(str(e)) <= LONGEST else type(e).__name__ + "(...)"
