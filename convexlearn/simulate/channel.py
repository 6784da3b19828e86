"""Communication channels with finite memory, and what a receiver knows of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from convexlearn.checks import GENERATOR, checked, count, instance, number, require_that, shown, word
from convexlearn.errors import DomainError, OptionError, ShapeError
from convexlearn.inputs import as_tensor
from convexlearn.simulate.base import Trajectory
from convexlearn.simulate.pairs import Pairs

NOISES = ("gaussian", "poisson")
CHECKS = {
    "taps": instance(Tensor, "a tensor (*chains, L)"),
    "length": count(),
    "noise": word(NOISES),
    "background": number(least=0),
    "drift": number(least=0),
    "estimate": number(least=0),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Channel:
    """Blocks of equiprobable symbols sent through a causal stationary channel with finite memory.

    x_t = sum_l taps_l a_{t-l} + noise: "gaussian" with standard deviation `deviation`, or "poisson": counts with
    mean sum_l taps_l a_{t-l} + background. taps `(L,)`, or `(*chains, L)` for several channels side by side, with
    deviation broadcastable to `(*chains,)`. Symbols a come from the constellation, also those before the block.
    The rule sees x `(B, *chains, T)`; the target are the symbols' numbers `(B, *chains, T)`, int64; the state of
    the trajectory are the taps `(B, *chains, L)` of each block.

    Imperfect channel state information: `drift` is the relative deviation of a block's own taps from `taps`, each
    times 1 + drift N(0, 1); with `estimate` the rule gets (x, taps estimated), the block's taps each times
    1 + estimate N(0, 1). Source: Shlezinger, Farsad, Eldar, Goldsmith, Learned factor graphs (2021).

    >>> channel = Channel(taps=torch.tensor([1.0, 0.5]), length=3, deviation=0.0)
    >>> channel(lambda x: x, 1, torch.Generator().manual_seed(0)).decision.abs().unique()
    tensor([0.5000, 1.5000])
    """

    taps: Tensor
    length: int
    deviation: Any = None
    noise: str = "gaussian"
    background: float = 1.0
    constellation: Sequence[float] = (-1.0, 1.0)
    drift: float = 0.0
    estimate: float | None = None

    def __post_init__(self) -> None:
        for name, check in CHECKS.items():
            if getattr(self, name) is not None or name != "estimate":
                require_that("Channel", name, check, getattr(self, name))
        if (self.deviation is None) != (self.noise == "poisson"):
            raise OptionError("Channel: give the deviation of gaussian noise; poisson noise has none")
        taps = self.taps
        if not taps.ndim or not taps.shape[-1] or not taps.is_floating_point() or not bool(torch.isfinite(taps).all()):
            raise ShapeError(f"Channel: taps must be floating and finite, (*chains, L) with L > 0, got {shown(taps)}")
        symbols = as_tensor("constellation", self.constellation, "Channel:")
        if symbols.ndim != 1 or not len(symbols) or not bool(torch.isfinite(symbols).all()):
            raise ShapeError("Channel: constellation must hold finite numbers, one per symbol")
        if self.deviation is not None:
            deviation = as_tensor("deviation", self.deviation, "Channel:").to(taps.dtype)
            chains = taps.shape[:-1]
            if torch.broadcast_shapes(deviation.shape[-len(chains) :] if chains else (), chains) != chains or (
                deviation.ndim > len(chains)
            ):
                raise ShapeError(f"Channel: deviation must broadcast to {tuple(chains)}, got {tuple(deviation.shape)}")
            if not bool((deviation >= 0).all()):
                raise DomainError("Channel: deviation is the standard deviation of noise, nonnegative")
            object.__setattr__(self, "deviation", deviation)

    @checked(batch=count(0), generator=GENERATOR)
    def draw(self, batch: int, generator: torch.Generator | None = None) -> tuple[Pairs, Tensor]:
        """Pairs of contexts and symbols' numbers, and the taps of each block `(batch, *chains, L)`."""
        chains, memory = self.taps.shape[:-1], self.taps.shape[-1]
        given: dict[str, Any] = {"generator": generator, "dtype": self.taps.dtype}
        sent = torch.randint(len(self.constellation), (batch, *chains, self.length + memory - 1), generator=generator)
        taps = self.taps.expand(batch, *chains, memory)
        taps = taps * (1 + self.drift * torch.randn(taps.shape, **given)) if self.drift else taps
        a = self.taps.new_tensor(self.constellation)[sent]
        mean = (a.unfold(-1, memory, 1) * taps.flip(-1)[..., None, :]).sum(-1)
        if self.noise == "gaussian":
            x = mean + self.deviation[..., None] * torch.randn(mean.shape, **given)
        else:
            rate = mean + self.background
            if not bool((rate >= 0).all()):
                raise DomainError(
                    f"Channel: a Poisson rate of {rate.min().item():.4g}; raise background, lower drift, "
                    "or use a nonnegative constellation and taps"
                )
            x = torch.poisson(rate, generator=generator)
        if self.estimate is None:
            return Pairs(x, sent[..., memory - 1 :]), taps
        guess = taps * (1 + self.estimate * torch.randn(taps.shape, **given))
        return Pairs((x, guess), sent[..., memory - 1 :]), taps

    @checked(batch_size=count(0), generator=GENERATOR)
    def __call__(
        self, rule: Any, batch_size: int | None = None, generator: torch.Generator | None = None
    ) -> Trajectory:
        """The rule's decisions on `batch_size` fresh blocks, one by default."""
        pairs, taps = self.draw(1 if batch_size is None else batch_size, generator)
        return replace(pairs(rule), state=taps)

    def part(self, rule: Any, rows: Tensor, batch_size: int | None, generator: torch.Generator) -> Trajectory:
        """The blocks `rows` of the `batch_size` that a call gives."""
        pairs, taps = self.draw(1 if batch_size is None else batch_size, generator)
        return replace(pairs.subset(rows)(rule), state=taps[rows])


@checked(memory=count())
def decaying_taps(memory: int, decays: Sequence[float] | Tensor) -> Tensor:
    """h_l = exp(-gamma l), l = 0, ..., memory - 1, for each gamma of `decays` `(k,)`: taps `(k, memory)`, float64.

    >>> decaying_taps(3, [0.5])
    tensor([[1.0000, 0.6065, 0.3679]], dtype=torch.float64)
    """
    gamma = as_tensor("decays", decays, "decaying_taps:").double()
    if not bool(torch.isfinite(gamma).all()):
        raise DomainError("decaying_taps: decays must be finite")
    return torch.exp(-gamma[..., None] * torch.arange(memory))
