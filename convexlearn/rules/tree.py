"""T2: the decision tree, softened for tuning and hardened for evaluation."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexlearn.checks import FLAG, checked, count, number
from convexlearn.domains import Domain
from convexlearn.errors import OptionError, ShapeError
from convexlearn.inputs import as_floating, flattened
from convexlearn.rules.base import DecisionRule

NONNEGATIVE = Domain.from_attributes((), {"nonneg": True})


class TreeRule(DecisionRule):
    """A decision from the finite set {s_k}, chosen by nested conditions on x (type T2 of the paper).

    x `(B, ...)` with n = `inputs` entries in all -> s `(B, *out)`; decisions `(N, *out)` are the s_k, fixed or,
    with `learn_decisions`, learned. The tree has 2^depth leaves. The condition at a node is w'x > b
    (`splits="oblique"`) or x_j > b (`"axis"`); each leaf has one score per decision (`choices`).

    In training mode conditions and choices are soft: a sigmoid and a softmax at `temperature`, so that s is an
    average of decisions; lower it while tuning, as with `callback=lambda record: rule.anneal(0.98)`. In eval
    mode, or at temperature zero (`harden()`), each sample takes one path to one decision, NaN where x has a NaN;
    `evaluate`, and the validation in `tune`, judge this tree. Weights start random from `seed`, thresholds at zero.

    >>> rule = TreeRule(torch.tensor([-1.0, 1.0]), inputs=1, depth=1)
    >>> rule.weights, rule.thresholds = torch.ones(1, 1), torch.tensor([0.5])
    >>> rule.choices = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    >>> rule.eval()(torch.tensor([[0.0], [3.0]]))
    tensor([-1.,  1.])
    >>> print(rule.describe())
    if 1 x0 > 0.5:
      s = 1
    else:
      s = -1
    """

    weights: Tensor
    thresholds: Tensor
    choices: Tensor
    decisions: Tensor
    temperature: Tensor

    @checked(inputs=count(), depth=count(), temperature=number(least=0), learn_decisions=FLAG, seed=count(0))
    def __init__(
        self,
        decisions: Any,
        inputs: int,
        *,
        depth: int = 3,
        splits: str = "oblique",
        temperature: float = 1.0,
        learn_decisions: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if splits not in ("oblique", "axis"):
            raise OptionError(f"TreeRule: splits is 'oblique' (w'x > b) or 'axis' (x_j > b), got {splits!r}")
        self.depth, self.splits = depth, splits
        self.declare("decisions", decisions, learned=learn_decisions)
        if self.decisions.ndim == 0 or not len(self.decisions):
            raise ShapeError("TreeRule: decisions must have shape (N, ...), one row per decision, and one at least")
        rng, dtype = np.random.default_rng(seed), self.decisions.dtype
        leaves = 2**depth
        weights = rng.normal(size=(leaves - 1, inputs)) / np.sqrt(inputs)
        choices = rng.normal(size=(leaves, len(self.decisions)))
        self.declare("weights", torch.tensor(weights, dtype=dtype))
        self.declare("thresholds", torch.zeros(leaves - 1, dtype=dtype))
        self.declare("choices", torch.tensor(choices, dtype=dtype))
        self.declare("temperature", torch.tensor(float(temperature), dtype=dtype), NONNEGATIVE, learned=False)

    @property
    def hard(self) -> bool:
        """True when each sample takes one path: in eval mode, or at temperature zero."""
        return not self.training or float(self.temperature) == 0

    def harden(self) -> "TreeRule":
        """Set the temperature to zero, also for training mode; returns self."""
        self.assign("temperature", 0.0)
        return self

    @checked(factor=number(least=0), least=number(least=0))
    def anneal(self, factor: float, least: float = 1e-3) -> None:
        """Multiply the temperature by `factor`, but not below `least`."""
        self.assign("temperature", max(float(self.temperature) * factor, least))

    def forward(self, *x: Tensor) -> Tensor:
        """s `(B, *out)` for x `(B, ...)`, or several contexts, which are flattened and joined."""
        flat = flattened(type(self).__name__, x)
        decisions = self.decisions.to(flat.dtype)
        if flat.shape[1] != self.weights.shape[1]:
            raise ShapeError(f"x has {flat.shape[1]} entries per sample, but the tree takes {self.weights.shape[1]}")
        if self.hard:
            s = decisions[self.choices.argmax(-1)[self._leaf(flat)]]
            lost = torch.isnan(flat).any(1)  # every comparison with NaN is false: without this, a decision by chance
            return torch.where(lost.reshape(-1, *[1] * (s.ndim - 1)), torch.nan, s) if bool(lost.any()) else s
        shares = torch.softmax(self.choices.to(flat.dtype) / self.temperature.to(flat.dtype), -1)
        return torch.einsum("bl,lk,k...->b...", self._leaf_probabilities(flat), shares, decisions)

    def leaf(self, x: Tensor) -> Tensor:
        """`(B,)` number of the leaf that x `(B, n)` reaches, -1 where x has a NaN; a true condition leads right."""
        x = as_floating("x", x, "TreeRule.leaf: context")
        if x.ndim != 2 or x.shape[1] != self.weights.shape[1]:
            raise ShapeError(f"TreeRule.leaf: x must have shape (B, {self.weights.shape[1]}), got {tuple(x.shape)}")
        lost = torch.isnan(x).any(1)  # every comparison with NaN is false: without this, a leaf by chance
        return torch.where(lost, -1, self._leaf(x))

    def _leaf(self, x: Tensor) -> Tensor:
        weights = self._hard_weights().to(x.dtype)
        right = x @ weights.mT > self.thresholds.to(x.dtype)
        node = torch.zeros(len(x), dtype=torch.long, device=x.device)
        for _ in range(self.depth):
            node = 2 * node + 1 + right.gather(1, node[:, None])[:, 0].long()
        return node - (2**self.depth - 1)

    def describe(self) -> str:
        """The hardened tree as nested conditions."""
        weights, chosen = self._hard_weights().tolist(), self.choices.argmax(-1).tolist()
        decisions, thresholds = self.decisions.tolist(), self.thresholds.tolist()

        def lines(node: int, indent: str) -> list[str]:
            if node >= 2**self.depth - 1:
                return [f"{indent}s = {_text(decisions[chosen[node - (2**self.depth - 1)]])}"]
            terms = " + ".join(f"{w:.3g} x{j}" for j, w in enumerate(weights[node]) if w)
            below = indent + "  "
            right, left = lines(2 * node + 2, below), lines(2 * node + 1, below)
            return [f"{indent}if {terms or 0} > {thresholds[node]:.3g}:", *right, f"{indent}else:", *left]

        return "\n".join(lines(0, ""))

    def _hard_weights(self) -> Tensor:
        weights = self.weights.detach()
        if self.splits == "oblique":
            return weights
        return torch.nn.functional.one_hot(weights.argmax(-1), weights.shape[1]).to(weights.dtype)

    def _leaf_probabilities(self, x: Tensor) -> Tensor:
        """`(B, leaves)`: the product of the soft conditions along each path."""
        temperature = self.temperature.to(x.dtype)
        weights = self.weights.to(x.dtype)
        if self.splits == "axis":
            weights = torch.softmax(weights / temperature, -1)
        right = torch.sigmoid((x @ weights.mT - self.thresholds.to(x.dtype)) / temperature)
        reached = x.new_ones(len(x), 1)
        for level in range(self.depth):
            here = right[:, 2**level - 1 : 2 ** (level + 1) - 1]
            reached = torch.stack([reached * (1 - here), reached * here], -1).flatten(1)
        return reached


def _text(value: Any) -> str:
    return f"({', '.join(map(_text, value))})" if isinstance(value, list) else f"{value:.4g}"
