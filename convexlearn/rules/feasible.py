"""FeasibleRule: a network whose output is moved into a feasible set that CVXPY constraints declare."""

from collections.abc import Callable, Sequence
from typing import Any

import cvxpy as cp
import numpy as np
from cvxpy.constraints.constraint import Constraint
from cvxpy.constraints.zero import Equality, Zero
from torch import Tensor, nn

from convexlearn.affine_maps import affine_map
from convexlearn.checks import FUNCTION, checked, shown, word
from convexlearn.errors import CompileError, OptionError, ShapeError
from convexlearn.inputs import as_contexts, as_tensor
from convexlearn.layer import POLICIES
from convexlearn.program.declaration import Declaration
from convexlearn.rules.base import DecisionRule, ModuleRule, as_tuple
from convexlearn.rules.convex import ConvexRule, Memory
from convexlearn.rules.neural import run_network
from convexlearn.solvers.base import Solver

OUTPUT = "network_output"
"""Name of the parameter that stands for the network's output in the projection."""


class FeasibleRule(DecisionRule):
    """A network inside a feasible set: s = argmin |free(s) - network(x)|^2 subject to constraints with parameters x.

    network: a module, rule or function x `(B, ...)` -> `(B, n)`. constraints: CVXPY constraints, convex and DPP.
    decision: a variable, an affine expression of variables, or a list of them; the constraints may have other
    variables too. context: the parameters that are fed at call time, in order; the network gets the same x.
    Other parameters keep their values; `learn("projection.NAME")` trains one.

    free: the affine expression of n entries that the network's output stands for. By default the decision:
    its Euclidean projection. With fewer entries it is completion: the network gives the free variables, the
    equalities give the others, and where inequalities bind the free variables move as little as they can; pass the
    equalities alone for completion without that. weight: positive weights `(n,)` of the squares, 1 by default.
    features: a function or module from x to the values of the context parameters; the network still gets x.
    solver, on_failure, fallback and further options as in ConvexRule. The network's weights have the role NETWORK.

    Raises SolverError, by `on_failure`, for a context without feasible decision, naming the batch element. Sources:
    reference 33 of the paper; Donti, Rolnick, Kolter, DC3 (2021), for completion.

    >>> import torch
    >>> s, budget = cp.Variable(2, name="s"), cp.Parameter(name="budget")
    >>> wish = lambda x: x[:, None] * x.new_tensor([0.5, -3.0])
    >>> rule = FeasibleRule(wish, [cp.sum(s) == budget, s >= 0], decision=s, context=[budget])
    >>> rule(torch.tensor([1.0, 2.0])).abs()
    tensor([[1., 0.],
            [2., 0.]])
    """

    @checked(network=FUNCTION, features=FUNCTION, on_failure=word(POLICIES))
    def __init__(
        self,
        network: Callable[..., Any],
        constraints: Sequence[Any],
        decision: Any,
        context: Any,
        *,
        free: Any = None,
        weight: Any = None,
        features: Callable[..., Any] | None = None,
        solver: str | Solver | None = None,
        on_failure: str = "raise",
        fallback: Any = None,
        **solver_args: Any,
    ) -> None:
        super().__init__()
        fed = list(context) if isinstance(context, list | tuple) else [context]
        outputs = list(decision) if isinstance(decision, list | tuple) else [decision]
        if not outputs:
            raise OptionError("FeasibleRule: decision is an empty list; name a variable or an affine expression")
        _check_constraints(constraints, fed)
        target = _stacked(outputs) if free is None else _stacked([free])
        if free is not None:
            _check_completion(constraints, outputs, free)
        problem, output = _projection(constraints, target, weight)
        declared = Declaration.of(problem, problem.parameters(), [*outputs, *([] if free is None else [free])])
        own = {p.name(): p for p in declared.parameters}
        outputs = list(declared.outputs[: len(outputs)])
        fed = [own[p.name()] for p in fed]
        self.width = target.size
        self._single = not isinstance(decision, list | tuple)
        self.network = network if isinstance(network, nn.Module) else ModuleRule(network)
        self.features = features if isinstance(features, nn.Module) or features is None else ModuleRule(features)
        chosen = outputs[0] if self._single else outputs
        options: dict[str, Any] = {"solver": solver, "on_failure": on_failure, "fallback": fallback, **solver_args}
        self.projection = ConvexRule(declared.problem, [own[output.name()], *fed], chosen, learn=[], **options)
        # pickled from the private copy, which the caller can neither solve nor change
        freed = None if free is None else declared.outputs[-1]
        options |= {"free": freed, "weight": weight, "features": features}
        self._arguments = ((network, declared.problem.constraints, chosen, fed), options)

    def network_output(self, *x: Any) -> Tensor:
        """What the network wishes, before it is made feasible, `(B, n)`."""
        return self._output(as_contexts(type(self).__name__, x))

    def _output(self, x: tuple[Tensor, ...]) -> Tensor:
        output = run_network(self.network, x)
        if output.ndim < 1 or output.shape[:1].numel() * self.width != output.numel():
            raise ShapeError(
                f"the network gives {tuple(output.shape)}, but what it stands for has {self.width} entries: it must "
                f"return (B, {self.width}); set its last layer, or free=, accordingly"
            )
        return output.reshape(len(output), self.width)

    def forward(self, *x: Any) -> Any:
        """Feasible decision s (B, ...) for the contexts x, one argument each (B, ...); a tuple for a list."""
        return self.decide(x if len(x) != 1 else x[0])[0]

    def decide(self, x: Any, memory: Memory | None = None) -> tuple[Any, Memory]:
        """One decision, warm-started by the memory of the last one."""
        parts = as_contexts(type(self).__name__, as_tuple(x))
        output = self._output(parts)
        values = parts if self.features is None else as_tuple(self.features(*parts))
        if len(values) != len(self.projection.context_names) - 1:
            names = ", ".join(self.projection.context_names[1:]) or "none"
            raise ShapeError(f"the constraints' context parameters are {names}; got {len(values)} values")
        return self.projection.decide((output, *values), memory)

    def problem(self) -> Any:
        """A copy of the CVXPY problem that makes `network_output` feasible; context has no values."""
        return self.projection.problem()


def _check_constraints(constraints: Any, context: list[Any]) -> None:
    if not isinstance(constraints, list | tuple) or not constraints:
        raise OptionError(f"constraints must be a list of CVXPY constraints, one at least; got {constraints!r}")
    for k, constraint in enumerate(constraints):
        if not isinstance(constraint, Constraint):
            raise OptionError(
                f"constraint {k} is {constraint!r}, no CVXPY constraint; compare expressions of variables, as in s <= 1"
            )
        if not constraint.is_dcp():
            raise CompileError(
                f"constraint {k}, {constraint}, is not convex; bound convex expressions above and concave ones below, "
                "equate affine ones only"
            )
    for p in context:
        if not isinstance(p, cp.Parameter):
            raise CompileError(f"context must be parameters of the constraints themselves, got {shown(p)}")
    known = {id(p): p.name() for c in constraints for p in c.parameters()}
    if OUTPUT in known.values():
        raise OptionError(f"a parameter of the constraints is named '{OUTPUT}', which the projection needs; rename it")
    for p in context:
        if id(p) not in known:
            raise CompileError(
                f"context parameter '{p.name()}' is in no constraint; they have {sorted(set(known.values()))}. What "
                "the network alone needs is an argument of the rule without being context: features=lambda x, y: x"
            )


def _stacked(expressions: list[Any]) -> Any:
    """One vector of all entries, each expression row by row."""
    for e in expressions:
        if not isinstance(e, cp.Expression) or not e.is_affine() or not e.variables():
            raise CompileError(f"{e} must be a variable or an affine expression of variables")
    flat = [e if e.ndim == 1 else cp.reshape(e, (e.size,), order="C") for e in expressions]
    return flat[0] if len(flat) == 1 else cp.hstack(flat)


def _projection(constraints: Sequence[Any], target: Any, weight: Any) -> tuple[cp.Problem, cp.Parameter]:
    """Minimize sum_i weight_i (target_i - output_i)^2 / 2, and the parameter `output`."""
    output = cp.Parameter(target.size, name=OUTPUT)
    difference = target - output
    if weight is not None:
        given = as_tensor("weight", weight, "FeasibleRule: option").detach().cpu().double().numpy()
        if given.shape not in {(), target.shape}:
            raise ShapeError(f"weight must be one number or {target.size} of them, got shape {given.shape}")
        root = np.broadcast_to(given, target.shape)
        if not (root > 0).all() or not np.isfinite(root).all():
            raise OptionError(f"weight must be positive and finite, one number or {target.size} of them; got {weight}")
        difference = cp.multiply(np.sqrt(root), difference)
    return cp.Problem(cp.Minimize(0.5 * cp.sum_squares(difference)), list(constraints)), output


def _check_completion(constraints: Sequence[Any], outputs: list[Any], free: Any) -> None:
    """Raise CompileError where free variables and equalities leave the decision open (constant coefficients only)."""
    variables = list({v.id: v for e in [*constraints, *outputs, free] for v in e.variables()}.values())
    equalities = [c.expr for c in constraints if isinstance(c, Equality | Zero)]
    maps = [affine_map(e, variables) for e in [free, *equalities, *outputs]]
    if any(m.fixed is None for m in maps):
        return
    rows = [m.fixed.dense().reshape(m.rows, m.columns).numpy() for m in maps]  # pyright: ignore[reportOptionalMemberAccess]
    known = np.concatenate(rows[: 1 + len(equalities)])
    rank, with_decision = np.linalg.matrix_rank(known), np.linalg.matrix_rank(np.concatenate([known, *rows[1:]]))
    if rank < with_decision:
        raise CompileError(
            f"free = {free} and the equalities leave {with_decision - rank} dimensions of the decision open; let the "
            "network give more entries, or add equalities"
        )
