"""What the tracking problems share: filters started at a known state, a recurrent network, decibels, coverage."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from convexlearn.problems.catalogue import Result
from convexlearn.report import Estimate, format_table
from convexlearn.rules.base import DecisionRule
from convexlearn.rules.state_filter import Moments, StateFilter
from convexlearn.simulate.pairs import Pairs

QUANTILES = {2: 5.991, 3: 7.815}
"""95 % quantiles of the chi-squared distribution by degrees of freedom."""


class Started(DecisionRule):
    """A filter that is told the state before the first observation: x `(B, T, p)`, z_0 `(B, n)` -> `(B, T, n)`."""

    def __init__(self, estimator: StateFilter) -> None:
        super().__init__()
        self.estimator = estimator

    @property
    def recursive(self) -> bool:
        """True: x is a sequence."""
        return True

    def forward(self, x: Tensor, before: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Filtered means."""
        return self.estimator(x, state=self.estimator.transition(before), covariance=self._covariance())

    def moments(self, x: Tensor, before: Tensor) -> Moments:
        """Filtered means and covariances."""
        state = self.estimator.transition(before)
        return self.estimator.moments(x, state=state, covariance=self._covariance())

    def _covariance(self) -> Tensor | None:
        """One step after a known state the covariance is V."""
        return self.estimator.V if self.estimator.gain is None else None


class Recurrent(DecisionRule):
    """A gated recurrent unit on the observations and a linear head: x `(B, T, p)`, z_0 -> `(B, T, n)`.

    scale: size of the observations, divided out. z_0 sets the first memory through a layer.
    """

    def __init__(self, p: int, n: int, units: int, *, scale: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        self.scale = scale
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Linear(n, units)
            self.unit = nn.GRU(p, units, batch_first=True)
            self.head = nn.Linear(units, n)

    @property
    def recursive(self) -> bool:
        """True: x is a sequence."""
        return True

    def forward(self, x: Tensor, before: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Estimates."""
        h = torch.tanh(self.first(before.float() / self.scale))
        out, _ = self.unit(x.float() / self.scale, h[None])
        return (self.scale * self.head(out)).to(x.dtype)


def windows(before: Tensor, states: Tensor, observations: Tensor, length: int) -> Pairs:
    """Pairs ((x, z before), z) of pieces of `length` steps, each started at the true state before it."""
    count = states.shape[1] // length
    first = torch.cat([before[:, None], states[:, length - 1 : count * length - 1 : length]], 1).flatten(0, 1)
    x, z = (part[:, : count * length].unflatten(1, (count, length)).flatten(0, 1) for part in (observations, states))
    return Pairs((x, first), z)


def decibels(estimate: Estimate) -> Estimate:
    """10 log10 of a mean, with the standard error to first order."""
    return Estimate(10 * math.log10(estimate.mean), 10 / math.log(10) * estimate.standard_error / estimate.mean)


def decibel_table(result: Result, published: Mapping[str, float], seconds: Callable[[Any], float]) -> str:
    """Mean squared errors in dB, the published ones, and seconds per trajectory."""
    header = ["rule", *(f"{m} [dB]" for m in result.study.measures), "published [dB]", "seconds per trajectory"]
    rows = []
    for record in result.records:
        errors = [f"{e.mean:.3f} ± {e.standard_error:.3f}" for e in map(decibels, record.measures.values())]
        known = f"{published[record.name]:.3f}" if record.name in published else ""
        rows.append([record.name, *errors, known, f"{seconds(record):.3g}"])
    return format_table(header, rows, 1 + len(result.study.measures))


def coverage(rule: Started, pairs: Pairs) -> Tensor:
    """Share `(N,)` of the times at which the true state lies in the 95 % region of the rule's mean and covariance."""
    with torch.no_grad():
        moments = rule.moments(*pairs.x)
    difference = (torch.as_tensor(pairs.s) - moments.mean).double()
    n = difference.shape[-1]
    P = moments.gains.posterior
    distance = (difference * torch.linalg.solve(P, difference[..., None])[..., 0]).sum(-1)
    return ((distance < QUANTILES[n]) & (torch.linalg.eigvalsh(P) > 0).all(-1)).double().mean(-1)
