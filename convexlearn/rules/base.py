"""The contract of decision rules: context x to decision s, batch first."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from convexlearn.checks import FUNCTION, shown
from convexlearn.errors import OptionError, ShapeError
from convexlearn.inputs import as_contexts
from convexlearn.rules.parameters import LearnedParameters, Role, count_parameters

__all__ = ["Context", "DecisionRule", "ModuleRule", "Role", "as_rule", "as_tuple"]

M = TypeVar("M")

Context = Tensor | tuple[Tensor, ...]
"""A context: one tensor `(B, ...)`, or a tuple of them for a rule of several arguments."""


class DecisionRule(LearnedParameters):
    """A decision rule f: x -> s ("Decision Rule Types" in the paper), static or recursive.

    A static rule overrides `forward(*x)`: x `(B, ...)` -> s `(B, ...)`. A recursive rule overrides `start`
    and `decide`; its `forward` runs through x `(B, T, ...)` and returns s `(B, T, ...)`.

    >>> class Average(DecisionRule):
    ...     def start(self, x):
    ...         return torch.zeros_like(x), 0
    ...     def decide(self, x, memory):
    ...         total, count = memory[0] + x, memory[1] + 1
    ...         return total / count, (total, count)
    >>> Average()(torch.tensor([[1.0, 3.0, 2.0]]))
    tensor([[1., 2., 2.]])
    """

    @property
    def recursive(self) -> bool:
        """True when `forward` takes a sequence, time being axis 1, and makes one decision per step."""
        return type(self).forward is DecisionRule.forward

    def start(self, x: Any) -> Any:
        """Memory before the first decision, whose context is x `(B, ...)`; None without memory."""
        return None

    def decide(self, x: Any, memory: Any = None) -> tuple[Any, Any]:
        """One decision s `(B, ...)` for x `(B, ...)` (or a tuple of them), and the memory after it."""
        return self(*as_tuple(x)), memory

    def forward(self, *x: Tensor) -> Any:
        """Decisions s `(B, T, ...)` for contexts x `(B, T, ...)`, one step after the other."""
        if type(self).decide is DecisionRule.decide:
            raise NotImplementedError(f"{type(self).__name__} must override forward, or start and decide")
        x = as_contexts(type(self).__name__, x)
        if any(part.ndim < 2 or part.shape[1] == 0 for part in x):
            raise ShapeError(f"x must have shape (B, T, ...) with T > 0, got {[tuple(p.shape) for p in x]}")
        steps = [parts[0] if len(x) == 1 else parts for parts in zip(*(part.unbind(1) for part in x))]
        memory, decisions = self.start(steps[0]), []
        for step in steps:
            s, memory = self.decide(step, memory)
            decisions.append(s)
        return torch.stack(decisions, 1)

    def count_parameters(self) -> dict[Role, int]:
        """Number of trainable entries by role."""
        return count_parameters(self)


class ModuleRule(DecisionRule):
    """A plain module or function x -> s as a rule; trainable weights have the role NETWORK."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: Tensor) -> Any:
        """function(*x)."""
        return self.function(*x)


def as_rule(rule: Callable[..., Any]) -> DecisionRule:
    """A DecisionRule as it is; a plain nn.Module or function x -> s wrapped into one.

    >>> as_rule(torch.nn.Identity()).decide(torch.ones(1))
    (tensor([1.]), None)
    """
    if isinstance(rule, DecisionRule):
        return rule
    if not FUNCTION.fits(rule):
        raise OptionError(f"a rule is a DecisionRule, an nn.Module or a function x -> s, got {shown(rule)}")
    return ModuleRule(rule)


def kept(rule: DecisionRule, memory: Any, kind: type[M]) -> M:
    """The memory, which has to be one that this kind of rule has returned."""
    if not isinstance(memory, kind):
        raise OptionError(
            f"{type(rule).__name__}: memory must be None or what start or the last decide returned, got {shown(memory)}"
        )
    return memory


def as_tuple(x: Any) -> tuple:
    """The arguments of a rule: x itself when it is a tuple, else (x,)."""
    return x if isinstance(x, tuple) else (x,)
