"""Sum-product on a chain with function nodes of any kind: BCJR, its max version, and the Viterbi path."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from convexlearn.chain import SEMIRINGS, ChainFactors, best_path, log_marginals
from convexlearn.checks import FUNCTION, checked, shown, word
from convexlearn.errors import OptionError, ShapeError
from convexlearn.inputs import as_contexts, as_tensor
from convexlearn.rules.base import DecisionRule


class SumProduct(DecisionRule):
    """Log marginals of the states of a chain given all observations ("Digital Communications" in the paper).

    factor: a module or function of x that returns the log potentials of the function nodes, `(B, T, S, S)` as
    [state at t - 1, state at t] or ChainFactors; model-based (ChannelFactor) or a network (LearnedFactor), and
    then the rule is a learned factor graph (Shlezinger, Farsad, Eldar, Goldsmith 2021). x `(B, T, ...)` -> log
    marginals `(B, T, S)`; axes between B and T are chains of their own.

    labels `(S,)`: states with the same label, of 0 to M - 1, are taken together; the decision is then
    `(B, T, M)`, to be tuned on `cross_entropy` against labels. initial `(S,)`: log potentials of the state before
    the first. semiring "max": max-marginals, as in `chain.log_marginals`; `path` decides on a whole sequence.

    >>> rule = SumProduct(lambda x: torch.stack([-x, x], -1)[..., None, :].expand(*x.shape, 2, 2))
    >>> rule(torch.tensor([[0.0, 1.0]])).exp()
    tensor([[[0.5000, 0.5000],
             [0.1192, 0.8808]]])
    >>> rule.path(torch.tensor([[0.5, 1.0]]))
    tensor([[1, 1]])
    """

    labels: Tensor | None
    initial: Tensor | None

    @checked(factor=FUNCTION, semiring=word(SEMIRINGS))
    def __init__(
        self,
        factor: Callable[..., ChainFactors | Tensor],
        *,
        labels: Sequence[int] | Tensor | None = None,
        initial: Any = None,
        semiring: str = "sum",
    ) -> None:
        super().__init__()
        self.factor, self.semiring = factor, semiring
        numbers = None if labels is None else _numbers(labels)
        if numbers is not None and (numbers.ndim != 1 or sorted(set(numbers.tolist())) != list(range(_top(numbers)))):
            raise OptionError(f"SumProduct: labels must use each of 0 to M - 1, one per state; got {labels}")
        start = None if initial is None else as_tensor("initial", initial, "SumProduct:")
        if start is not None and (start.ndim != 1 or bool(torch.isnan(start).any())):
            raise ShapeError(f"SumProduct: initial must be log potentials (S,) without NaN, got {shown(start)}")
        self.register_buffer("labels", numbers, persistent=False)
        self.register_buffer("initial", start, persistent=False)

    def forward(self, *x: Any) -> Tensor:
        """Log marginals `(B, T, S)`, or `(B, T, M)` with labels; NaN for a sample without a possible path."""
        states = log_marginals(self._factors(x), self.initial, self.semiring)
        if self.labels is None:
            return states
        if len(self.labels) != states.shape[-1]:
            raise ShapeError(f"SumProduct: {len(self.labels)} labels for {states.shape[-1]} states of the factor")
        return torch.stack([self._together(states, m) for m in range(_top(self.labels))], -1)

    def _factors(self, x: tuple[Any, ...]) -> ChainFactors | Tensor:
        return self.factor(*as_contexts(type(self).__name__, x))

    def path(self, *x: Any) -> Tensor:
        """The most probable sequence `(B, T)` of states, or of their labels, by the Viterbi algorithm.

        With labels it is that of the most probable path of states; -1 where no path is possible.
        """
        states = best_path(self._factors(x), self.initial)
        if self.labels is None:
            return states
        return torch.where(states < 0, states, self.labels.to(states.device)[states])

    def extra_repr(self) -> str:
        """The semiring, and the number of labels."""
        merged = "" if self.labels is None else f"{len(self.labels)} states, {_top(self.labels)} labels\n"
        return f"{merged}semiring: {self.semiring}" + f"\n{super().extra_repr()}".rstrip()

    def _together(self, states: Tensor, label: int) -> Tensor:
        """Log marginal `(*batch, T)` of a label."""
        assert self.labels is not None
        parts = states[..., self.labels.to(states.device) == label]
        if self.semiring == "max":
            return parts.amax(-1)
        impossible = parts.amax(-1) == -math.inf  # logsumexp has no gradient there
        return torch.logsumexp(parts.masked_fill(impossible[..., None], 0.0), -1).masked_fill(impossible, -math.inf)


def _numbers(labels: Any) -> Tensor:
    numbers = as_tensor("labels", labels, "SumProduct:")
    if numbers.is_floating_point():  # a list of numbers is read so, too
        numbers = torch.where(numbers == numbers.round(), numbers, -1.0).long()
    return numbers


def _top(labels: Tensor) -> int:
    return int(labels.max()) + 1 if len(labels) else 0
