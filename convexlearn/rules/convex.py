"""ConvexRule (T3): the decision is the solution of a parametrized convex problem."""

from collections.abc import Callable
from typing import Any, NamedTuple

import cvxpy as cp
import torch
from torch import Tensor, nn

from convexlearn.checks import FLAG, FUNCTION, checked, shown, word
from convexlearn.domains import Domain
from convexlearn.errors import CompileError, DomainError, MissingParameterError, OptionError, ShapeError, suggest
from convexlearn.failures import collector
from convexlearn.inputs import as_tensor
from convexlearn.layer import POLICIES, ConvexLayer, LayerSolution
from convexlearn.layer_arguments import result_type
from convexlearn.program.declaration import value_of
from convexlearn.rules.base import DecisionRule, Role, as_tuple, kept
from convexlearn.solvers.base import Solver


class Memory(NamedTuple):
    """What a ConvexRule keeps between the steps of a rollout: the last solution, without variables, and decision."""

    solution: LayerSolution
    decision: tuple[Tensor, ...]


class ConvexRule(DecisionRule):
    """s = argmin of a convex problem in which the context x and the learned parameters are parameters (T3).

    problem: a DPP `cvxpy.Problem`. context: its parameters that are fed at call time, in order.
    decision: a variable, an affine expression of variables (`u[0]`), or a list of them. learn:
    parameters (or names) to train, one or a list, default every parameter that is not context; the others keep
    their values until `learn("name")`. features: a differentiable function or module from x to the
    context values, for what DPP cannot express. on_failure: "raise", "nan", or "fallback" (the rows of
    `fallback`, or else the last decision of a rollout, at first zero; with zero gradient). Further
    keyword arguments are options of the solver.

    Learned parameters have the role OBJECTIVE and appear as attributes, always in their domain.
    Source: decision rule T3 and Examples 10 to 13 of the paper.

    >>> import cvxpy as cp, torch
    >>> s, x = cp.Variable(2), cp.Parameter(2, name="x")
    >>> rho = cp.Parameter(nonneg=True, name="rho", value=0.5)
    >>> problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(s - x) + rho * cp.norm1(s)))
    >>> rule = ConvexRule(problem, context=[x], decision=s)
    >>> rule(torch.tensor([[2.0, 0.1]])).round(decimals=4) + 0.0
    tensor([[1.5000, 0.0000]], grad_fn=<AddBackward0>)
    """

    @checked(features=FUNCTION, on_failure=word(POLICIES), gp=FLAG, check=FLAG)
    def __init__(
        self,
        problem: Any,
        context: Any,
        decision: Any,
        learn: Any = None,
        features: Callable[..., Any] | None = None,
        solver: str | Solver | None = None,
        on_failure: str = "raise",
        *,
        fallback: Any = None,
        gp: bool = False,
        check: bool = True,
        **solver_args: Any,
    ) -> None:
        super().__init__()
        context = list(context) if isinstance(context, list | tuple) else [context]
        outputs = list(decision) if isinstance(decision, list | tuple) else [decision]
        learned = _learned(problem, context, learn)
        if not outputs:
            raise OptionError("ConvexRule: decision is an empty list; name a variable or an affine expression")
        parameters = problem.parameters()
        self._single = not isinstance(decision, list | tuple)
        self._rollout = on_failure == "fallback" and fallback is None
        self.layer = ConvexLayer(
            problem, parameters, outputs, solver, gp,
            solver_args=solver_args, on_failure=on_failure, check=check,
            fallback=0.0 if self._rollout else fallback,
        )  # fmt: skip
        self.context_names = tuple(p.name() for p in context)
        self._dimensions = {p.name(): p.ndim for p in context}
        self.features = features if isinstance(features, nn.Module) or features is None else _Function(features)
        for parameter in parameters:
            if parameter.name() not in self.context_names:
                self._declare(parameter, parameter.name() in learned)
        self._keep_arguments(context, learned, features, solver, on_failure, fallback, gp, solver_args)

    def _declare(self, parameter: Any, learned: bool) -> None:
        name, value = parameter.name(), value_of(parameter)
        if learned and name == f"param{parameter.id}":
            raise OptionError(
                f"the learned parameter {name} {parameter.shape} needs a name: cp.Parameter(..., name='rho')"
            )
        if value is None:
            raise MissingParameterError(
                f"parameter '{name}' is neither context nor has it a value; set {name}.value, or add it to context"
            )
        domain = Domain.from_attributes(parameter.shape, parameter.attributes, parameter.sparse_idx)
        self.declare(name, value, domain, Role.OBJECTIVE, learned=learned)

    def _keep_arguments(self, context: list, learned: tuple[str, ...], features: Any, *rest: Any) -> None:
        """Pickle from the layer's private copy, which the caller can neither solve nor change."""
        solver, on_failure, fallback, gp, solver_args = rest
        declaration = self.layer._declaration
        by_name = {p.name(): p for p in declaration.parameters}
        outputs = declaration.outputs[0] if self._single else list(declaration.outputs)
        arguments = (
            declaration.problem,
            [by_name[p.name()] for p in context],
            outputs,
            list(learned),
            features,
        )
        keywords = {"fallback": fallback, "gp": gp, "check": False, **solver_args}
        self._arguments = ((*arguments, solver, on_failure), keywords)

    def forward(self, *x: Any) -> Any:
        """Decision s (B, ...) for the contexts x, one argument each (B, ...); a tuple for a list of decisions."""
        return self.decide(x if len(x) != 1 else x[0])[0]

    def decide(self, x: Any, memory: Memory | None = None) -> tuple[Any, Memory]:
        """One decision, warm-started by the memory of the last one."""
        arguments = self._arguments_of(as_tuple(x))
        warm = kept(self, memory, Memory).solution if memory is not None else False
        try:
            result = self._judged(arguments, warm)
        except DomainError:
            arguments = self._mended(arguments)
            result = self._judged(arguments, warm)
        dtype = result_type([as_tensor(n, arguments[n]) for n in self.context_names])
        decision = tuple(v.to(dtype) for v in result.variables)
        if self._rollout and memory is not None and not bool(result.ok.all()):
            decision = tuple(
                torch.where(
                    result.ok.reshape(*result.ok.shape, *[1] * (new.dim() - result.ok.dim())),
                    new,
                    old.detach(),
                )
                for new, old in zip(decision, memory.decision)
            )
        last = LayerSolution((), result.solution, result.batch, result.limited)  # no graph
        return decision[0] if self._single else decision, Memory(last, decision)

    def _judged(self, arguments: dict[str, Any], warm: LayerSolution | bool) -> LayerSolution:
        return self.layer.judged(*[arguments[name] for name in self.layer.parameter_names], warm_start=warm)

    def _arguments_of(self, x: tuple) -> dict[str, Any]:
        """Parameter values by name: context (through `features`) and declared parameters."""
        values = x
        if self.features is not None:
            given = [part if isinstance(part, Tensor) else as_tensor("x", part, "context") for part in x]
            values = as_tuple(self.features(*given))
        if len(values) != len(self.context_names):
            raise ShapeError(
                f"the rule has {len(self.context_names)} context parameters ({', '.join(self.context_names)}), "
                f"got {len(values)} values"
            )
        named = {name: self.value(name) for name in self._declared}
        return {**dict(zip(self.context_names, values)), **named}

    def _mended(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """In a simulation a context that is no number fails its sample alone, which gets that of a sound one."""
        active = collector()
        values = {name: as_tensor(name, arguments[name]) for name in self.context_names}
        rows = {name: v for name, v in values.items() if v.dim() == self._dimensions[name] + 1}
        if active is None or not rows:
            return arguments
        finite = torch.stack([torch.isfinite(v.detach()).flatten(1).all(1) for v in rows.values()]).all(0)
        if not bool(finite.any()) or bool(finite.all()):
            return arguments
        active.refuse(~finite)
        own = torch.arange(len(finite), device=finite.device)
        source = torch.where(finite, own, torch.nonzero(finite)[0])
        return {**arguments, **{name: v[source] for name, v in rows.items()}}

    def problem(self) -> Any:
        """A copy of the CVXPY problem whose parameters have the tuned values; context has none."""
        values = {name: self.value(name).detach() for name in self._declared}
        return self.layer.problem(**values)


class _Function(nn.Module):
    """A plain function as a module, so that it is pickled and shown with the rule."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: Any) -> Any:
        return self.function(*x)


def _learned(problem: Any, context: list, learn: Any) -> tuple[str, ...]:
    """Names of the parameters to train."""
    if not isinstance(problem, cp.Problem):
        raise CompileError(f"the first argument, problem, must be a cvxpy.Problem, got {type(problem).__name__}")
    names = {p.name(): p for p in problem.parameters()}
    for p in context:
        if not isinstance(p, cp.Parameter):
            raise CompileError(f"context must be parameters of the problem themselves, got {p!r}")
    fed = [p.name() for p in context]
    if len(set(fed)) < len(fed):
        raise OptionError(f"context names a parameter twice: {', '.join(fed)}")
    for p in context:
        if names.get(p.name()) is not p:
            raise CompileError(f"context parameter '{p.name()}' is not in the problem; it has {list(names)}")
    if learn is None:
        return tuple(n for n in names if n not in fed)
    listed = [learn] if not isinstance(learn, list | tuple | set | frozenset) else list(learn)
    for p in listed:
        if not isinstance(p, str | cp.Parameter):
            raise OptionError(f"learn takes parameters of the problem or their names, got {shown(p)}")
    chosen = [p if isinstance(p, str) else p.name() for p in listed]
    for name in chosen:
        if name not in names:
            raise OptionError(
                f"learn: no parameter named '{name}'; {suggest(name, [n for n in names if n not in fed])}"
            )
        if name in fed:
            raise OptionError(f"learn: parameter '{name}' is context, it cannot be trained as well")
    return tuple(chosen)
