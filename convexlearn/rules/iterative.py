"""T4: rules that run an iteration, to convergence (learned optimizers) or for K steps (deep unfolding)."""

import copy
import math
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convexlearn.adjoints import attach_implicit_gradient, converge
from convexlearn.checks import NAMES, checked, count, instance, number, word
from convexlearn.domains import Domain
from convexlearn.errors import ConvexLearnWarning, LimitWarning, OptionError, ShapeError, listed, suggest
from convexlearn.inputs import as_floating
from convexlearn.iterations.base import Iteration, Slot
from convexlearn.rules.base import DecisionRule, Role
from convexlearn.split_instance import Instance

POSITIVE = 1e-6
"""Slots are declared positive by a softplus, whose start must lie at least this far above zero."""


ITERATION = instance(Iteration, "an iteration, as cl.ISTA(cl.split(problem, context, decision))")


class HyperparameterWarning(ConvexLearnWarning):
    """An implicit gradient of a hyperparameter was asked for: it is zero, so that tuning changes nothing."""


class Convergence(NamedTuple):
    """Outcome of a run to convergence.

    decision `(B, ...)`, and for each sample `(B,)`: converged, the steps taken, the last relative change.
    """

    decision: Any
    converged: Tensor
    iterations: Tensor
    residual: Tensor


class IterativeRule(DecisionRule):
    """What Converged and Unfolded share: the problem's parameters and the iteration's slots as learned parameters.

    A parameter of the problem appears under its CVXPY name in its domain; a slot under its own name once it is
    learned, a module slot always.
    """

    def __init__(self, iteration: Iteration, layers: int | None, untie: Sequence[str], learn: Sequence[str]) -> None:
        super().__init__()
        self.iteration = iteration
        self._layers = layers
        self._slots: dict[str, bool] = {}  # name -> untied
        names = {s.name for s in iteration.slots}
        for name in (*untie, *learn):
            if name not in names | iteration.split.parameters.keys() or (name in untie and name not in names):
                valid = names if name in untie else names | iteration.split.parameters.keys()
                raise OptionError(f"{type(self).__name__}: no slot or parameter '{name}'; {suggest(name, valid)}")
        for name, slot in iteration.split.parameters.items():
            if not slot.value.is_complex():
                self.declare(name, slot.value, slot.domain, Role.OBJECTIVE, learned=name in learn)
        for slot in iteration.slots:
            value = iteration.values.get(slot.name)
            wanted = slot.name in untie or slot.name in learn or slot.name in iteration.freed
            if isinstance(value, nn.Module) or wanted:
                self._add_slot(slot.name, slot.name in untie)

    def _add_slot(self, name: str, untied: bool) -> None:
        slot, value = self.iteration.slot(name), self.iteration.values.get(name)
        self._slots[name] = untied
        if isinstance(value, nn.Module):
            copies = [copy.deepcopy(value) for _ in range(self._layers or 1)] if untied else []
            self.add_module(name, nn.ModuleList(copies) if untied else value)
            return
        if callable(value):
            raise OptionError(f"slot '{name}' holds a plain function, which cannot be learned; give an nn.Module")
        if not untied and name in self.iteration.scheduled(0):
            raise OptionError(f"slot '{name}' holds a schedule; untie it to learn a value per layer, or give a number")
        starts = [self.iteration.initial(name, k) for k in range(self._layers or 1)]
        start = torch.stack(starts) if untied else starts[0]
        role = Role.OBJECTIVE if slot.objective else Role.HYPER
        domain = self._domain(slot, starts[0])
        if slot.kind in ("positive", "threshold"):
            start = start.clamp(min=POSITIVE * float(start.max().clamp(min=1.0)) if untied else POSITIVE)
        self.declare(name, start, domain, role)

    def _domain(self, slot: Slot, start: Tensor) -> Domain:
        positive = slot.kind in ("positive", "threshold")
        return Domain.from_attributes(tuple(start.shape), {"pos": True} if positive else {})

    def learn(self, *names: str) -> Any:
        """Let `tune` train these (default: all that is declared); a slot not yet learned is declared, tied."""
        slots = {s.name for s in self.iteration.slots}
        for name in names:
            if isinstance(name, str) and name in slots and name not in self._slots:
                self._add_slot(name, False)
                arguments, keywords = self._arguments
                known = keywords.get("learn")
                known = [n for n in self._declared if n not in slots and n in self.free] if known is None else known
                self._arguments = (arguments, {**keywords, "learn": [*known, name]})
        return super().learn(*names)

    def bind(self, *x: Tensor, detach: bool = False) -> Instance:
        """The problem's numbers for contexts x at the present parameter values."""
        names = [n for n in self.iteration.split.parameters if n in self._declared]
        values = {n: self.value(n).detach() if detach else self.value(n) for n in names}
        return self.iteration.bind(*x, values=values)

    def slots(self, k: int, instance: Instance, detach: bool = False) -> dict[str, Any]:
        """Values of the slots at step k."""
        found = self._at(k, self._stacked())
        found = {n: v.to(instance.like.real) for n, v in self.iteration.scheduled(k).items()} | found
        return {n: v.detach() if detach and isinstance(v, Tensor) else v for n, v in found.items()}

    def _stacked(self) -> dict[str, Any]:
        """Values of the slots, all layers of untied ones together."""
        return {name: self.value(name) if name in self._declared else getattr(self, name) for name in self._slots}

    def _at(self, k: int, stacked: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value[k] if self._slots[name] else value for name, value in stacked.items()}


class Unfolded(IterativeRule):
    """K steps of an iteration as the layers of a network (deep unfolding; Examples 15 to 17).

    untie: slots with own values in each layer; they are learned, as are freed matrices and modules. learn: parameters
    of the problem and slots that are learned with one value for all layers (Example 14 at fixed K). The rest stays
    at the values that derive from the problem, so that the network starts as K iterations. Learned numbers are
    positive, not more: steps beyond 2/L are what makes a short network good.

    >>> import cvxpy as cp
    >>> from convexlearn.iterations.proximal_gradient import ISTA
    >>> from convexlearn.splitting import split
    >>> s, x = cp.Variable(2, name="s"), cp.Parameter(2, name="x")
    >>> problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(s - x) + 0.5 * cp.norm1(s)))
    >>> net = Unfolded(ISTA(split(problem, context=[x], decision=s)), 3, untie=["step", "threshold"])
    >>> net(torch.tensor([[2.0, 0.1]])).detach()
    tensor([[1.5000, 0.0000]])
    """

    @checked(iteration=ITERATION, layers=count(), untie=NAMES, learn=NAMES)
    def __init__(
        self, iteration: Iteration, layers: int, *, untie: Sequence[str] = (), learn: Sequence[str] = ()
    ) -> None:
        super().__init__(iteration, layers, untie, learn)

    @property
    def layers(self) -> int:
        """The number of layers K."""
        return self._layers or 0

    def forward(self, *x: Tensor) -> Any:
        """Decision after K steps."""
        instance, states = self._states(x)
        last = deque(states, maxlen=1).pop()
        return self.iteration.split.decide(self.iteration.decision(last), instance)

    def iterates(self, *x: Tensor) -> Any:
        """Decisions after 0, ..., K steps, `(K + 1, B, ...)`: for layer-wise losses and curves as Fig. 6d."""
        instance, states = self._states(x)
        split = self.iteration.split
        decisions = [split.decide(self.iteration.decision(state), instance) for state in states]
        return torch.stack(decisions) if split.single else tuple(torch.stack(parts) for parts in zip(*decisions))

    @checked(layers=count())
    def truncated(self, layers: int) -> "Unfolded":
        """The first `layers` layers as a rule that shares their parameters, for training layer by layer."""
        if not 1 <= layers <= self.layers:
            raise OptionError(f"truncated: layers must lie between 1 and {self.layers}, got {layers}")
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)  # a shallow copy: copy.copy would rebuild the module
        twin.__dict__["_layers"] = layers
        return twin

    def _states(self, x: tuple) -> Any:
        instance = self.bind(*x)

        def states() -> Any:
            state = self.iteration.start(instance)
            yield state
            stacked, fixed = self._stacked(), self.iteration.scheduled(0).keys() <= self._slots.keys()
            layer = self.iteration.layer(instance, stacked) if fixed and not any(self._slots.values()) else None
            for k in range(self.layers):
                own = {**self.iteration.scheduled(k), **self._at(k, stacked)}
                step = layer or self.iteration.layer(instance, own)
                state = step(state)
                yield state

        return instance, states()


class Converged(IterativeRule):
    """An iteration run to convergence (T4; learned optimizers, Example 14).

    gradient: "implicit" (at the fixed point; memory and time do not grow with the steps) or "unroll" (through all
    steps). learn: what is trained, by default every parameter of the problem that is not context. Learned
    slots stay where convergence is guaranteed, such as step < 2/L for ISTA. For a convex problem the solution does not
    depend on them: their implicit gradient is zero, of which a HyperparameterWarning tells. A schedule of sigma is run
    through first, then its last value is kept until convergence.

    >>> import cvxpy as cp
    >>> from convexlearn.iterations.proximal_gradient import ISTA
    >>> from convexlearn.splitting import split
    >>> s, x = cp.Variable(2, name="s"), cp.Parameter(2, name="x")
    >>> problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(s - x) + 0.5 * cp.norm1(s)))
    >>> Converged(ISTA(split(problem, context=[x], decision=s)))(torch.tensor([[2.0, 0.1]]))
    tensor([[1.5000, 0.0000]])
    """

    @checked(
        iteration=ITERATION,
        tol=number(above=0),
        max_iterations=count(),
        gradient=word(("implicit", "unroll")),
        learn=NAMES,
    )
    def __init__(
        self,
        iteration: Iteration,
        *,
        tol: float = 1e-9,
        max_iterations: int = 100_000,
        gradient: str = "implicit",
        learn: Sequence[str] | None = None,
    ) -> None:
        self.__dict__["gradient"] = gradient
        chosen = [p.name for p in iteration.split.parameters.values() if p.learned] if learn is None else list(learn)
        iteration.check_convergent(chosen)
        self.__dict__["_bounds"] = _checked_limits(iteration)
        super().__init__(iteration, None, (), chosen)
        self.tol, self.max_iterations = tol, max_iterations

    def _add_slot(self, name: str, untied: bool) -> None:
        self.iteration.check_convergent({*self._slots, name})
        slot = self.iteration.slot(name)
        exact = self.iteration.values.get("prox") is None and self.iteration.split.convex and slot.name != "sigma"
        if self.gradient == "implicit" and not slot.objective and exact and slot.name != "threshold":
            warnings.warn(
                f"the converged solution of a convex problem does not move with the hyperparameter '{name}', so its "
                "implicit gradient is zero; train it at a fixed number of steps, cl.Unfolded(iteration, K, "
                f"learn=['{name}']), or on a loss over the iterates (Example 14)",
                HyperparameterWarning,
                stacklevel=4,
            )
        super()._add_slot(name, untied)

    def _domain(self, slot: Slot, start: Tensor) -> Domain:
        if slot.name not in self._bounds:
            return super()._domain(slot, start)
        return Domain.from_attributes(tuple(start.shape), {"bounds": [0.0, self._bounds[slot.name]]})

    def solve(self, *x: Tensor) -> Convergence:
        """Decision and, for each sample, whether and how it converged."""
        iteration = self.iteration
        x = tuple(p if isinstance(p, Tensor) else as_floating("x", p, "Converged: context") for p in x)
        live = self.bind(*x)
        wants = torch.is_grad_enabled() and any(p.requires_grad for p in (*self.parameters(), *x))
        unroll = self.gradient == "unroll" and wants
        instance = live if unroll else self.bind(*(p.detach() for p in x), detach=True)
        last = iteration.schedule_length - 1
        with torch.set_grad_enabled(unroll):
            state = iteration.start(instance)
            for k in range(last):
                state = iteration.layer(instance, self.slots(k, instance, detach=not unroll))(state)
            layer = iteration.layer(instance, self.slots(last, instance, detach=not unroll))
            run = converge(iteration, layer, state, tol=self.tol, max_iterations=self.max_iterations)
        state = run.state
        if wants and not unroll:
            moving = iteration.layer(live, self.slots(last, live))
            core = attach_implicit_gradient(iteration, (live, moving), layer, iteration.core(state), 1e-3 * self.tol)
            state = moving(iteration.resume(core, live))
        decision = iteration.split.decide(iteration.decision(state), live)
        return Convergence(decision, run.residual <= self.tol, run.iterations + last, run.residual)

    def forward(self, *x: Tensor) -> Any:
        """The converged decision; a LimitWarning names the samples that did not get there."""
        result = self.solve(*x)
        if not bool(result.converged.all()):
            lost = (~result.converged).nonzero().flatten().tolist()
            worst = result.residual[~result.converged].max().item()
            warnings.warn(
                f"{len(lost)} of {len(result.converged)} samples ({listed(lost)}) did not converge within "
                f"{self.max_iterations} steps, the last relative change up to {worst:.1e}, above tol = {self.tol:g}; "
                "raise max_iterations or tol, or take an accelerated iteration (FISTA, ADMM)",
                LimitWarning,
                stacklevel=3,
            )
        return result.decision

    def slots(self, k: int, instance: Instance, detach: bool = False) -> dict[str, Any]:
        """Values of the slots, in proportion to the present bounds where these depend on learned parameters."""
        found = super().slots(k, instance, detach)
        limits = self.iteration.limits(instance) if self._bounds.keys() & found.keys() else {}
        for name in self._bounds.keys() & found.keys():
            found[name] = found[name] * (limits[name] / self._bounds[name])
        return found


def _checked_limits(iteration: Iteration) -> Mapping[str, float]:
    """Bounds of the slots at the declared values; values given outside are refused."""
    if iteration.split.varies_with_context():
        return {}
    limits = iteration.limits(iteration.split.nominal())
    bounds = {name: float(torch.as_tensor(value).min()) for name, value in limits.items()}
    for name, bound in bounds.items():
        value = iteration.values.get(name)
        if value is not None and math.isfinite(bound) and float(value.max()) > bound * (1 + 1e-9):
            raise OptionError(
                f"Converged: slot '{name}' is {float(value.max()):g}, but {type(iteration).__name__} is only known to "
                f"converge up to {bound:g}; lower it, or unfold the iteration: Unfolded takes any positive value"
            )
    return bounds


@checked(net=instance(Unfolded, "an Unfolded"))
def iterate_loss(net: Unfolded, x: Any, s: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted squared error `(B,)` of all iterates after the first, a loss that trains every layer directly.

    weights `(K,)`: by default k / sum k, which counts late layers more.
    """
    s = s if isinstance(s, Tensor) and s.is_complex() else as_floating("s", s, "iterate_loss: target")
    iterates = net.iterates(*(x if isinstance(x, tuple) else (x,)))[1:]
    if s.is_complex() and not iterates.is_complex():
        raise ShapeError(f"iterate_loss: target 's' is complex ({s.dtype}), the decisions are real")
    if iterates.shape[1:] != s.shape:
        raise ShapeError(f"iterates have shape {tuple(iterates.shape[1:])}, targets {tuple(s.shape)}; they must agree")
    K = len(iterates)
    if weights is None:
        weights = torch.arange(1, K + 1, dtype=s.real.dtype) * 2 / (K * (K + 1))
    weights = as_floating("weights", weights, "iterate_loss: option")
    if weights.shape != (K,) or not bool(torch.isfinite(weights).all()):
        raise ShapeError(f"iterate_loss: weights must be finite and have shape ({K},), got {tuple(weights.shape)}")
    errors = (iterates - s).abs().square()[..., None].flatten(2).sum(-1)
    return weights.to(errors) @ errors
