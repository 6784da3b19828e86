"""Function nodes for channels with finite memory: from the channel's model, or a network."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convexlearn.chain import ChainFactors
from convexlearn.checks import checked, count, instance, require_that, shown, word
from convexlearn.domains import Domain
from convexlearn.errors import DomainError, OptionError, ShapeError
from convexlearn.inputs import as_floating, as_tensor
from convexlearn.rules.parameters import LearnedParameters

NOISES = ("gaussian", "poisson")


@dataclass(frozen=True)
class Trellis:
    """The states of a channel that remembers `memory` symbols of an alphabet of `symbols`.

    State sum_l M^l a_l has sent a_0 last and a_l l times before; a step shifts the newest symbol in.

    >>> Trellis(2, 2).digits.tolist(), Trellis(2, 2).labels.tolist()
    ([[0, 0], [1, 0], [0, 1], [1, 1]], [0, 1, 0, 1])
    """

    symbols: int
    memory: int

    def __post_init__(self) -> None:
        require_that("Trellis", "symbols", count(2), self.symbols)
        require_that("Trellis", "memory", count(), self.memory)

    @property
    def size(self) -> int:
        """Number of states."""
        return self.symbols**self.memory

    @property
    def digits(self) -> Tensor:
        """`(S, memory)`: the symbols of a state, newest first."""
        places = self.symbols ** torch.arange(self.memory)
        return torch.arange(self.size)[:, None] // places % self.symbols

    @property
    def labels(self) -> Tensor:
        """`(S,)`: the newest symbol of a state."""
        return self.digits[:, 0]

    @property
    def transitions(self) -> Tensor:
        """`(S, S)`, float32: 0 where the state before can become the state after, else minus infinity."""
        kept = torch.arange(self.size) * self.symbols % self.size
        possible = kept[:, None] == torch.arange(self.size) - self.labels
        return torch.zeros(self.size, self.size).masked_fill(~possible, -torch.inf)

    def states(self, labels: Tensor) -> Tensor:
        """The states `(..., T - memory + 1)` at the end of each `memory` successive symbols of labels `(..., T)`.

        >>> Trellis(2, 2).states(torch.tensor([0, 1, 1]))
        tensor([1, 3])
        """
        labels = as_tensor("labels", labels, "Trellis.states:")
        if labels.is_floating_point() or not labels.ndim or labels.shape[-1] < self.memory:
            raise ShapeError(
                f"Trellis.states: labels must be integers (..., T), T >= {self.memory}, got {shown(labels)}"
            )
        if bool(((labels < 0) | (labels >= self.symbols)).any()):
            raise DomainError(f"Trellis.states: labels must lie between 0 and {self.symbols - 1}")
        places = self.symbols ** torch.arange(self.memory - 1, -1, -1, device=labels.device)
        return (labels.unfold(-1, self.memory, 1) * places).sum(-1)


class ChannelFactor(LearnedParameters):
    """Likelihood of the observations of a channel with finite memory, as factors of a SumProduct.

    noise "gaussian": x_t ~ N(m_t, deviation^2); "poisson": x_t ~ Poisson(m_t + background), for photon counts.
    m_t = sum_l taps_l a_{t-l} with symbols a of the constellation. taps `(L,)` and deviation or background are
    objective parameters, learned until `freeze`; taps `(*chains, L)` for x `(B, *chains, T)`, several channels side
    by side. Called as factor(x) or factor(x, taps), with taps `(B, *chains, L)` estimated for every sample.

    >>> ChannelFactor([1.0, 0.5], 1.0).freeze()(torch.tensor([[1.5]])).unary
    tensor([[[-5.4189, -1.4189, -2.9189, -0.9189]]])
    """

    taps: Tensor
    deviation: Tensor
    background: Tensor
    transitions: Tensor
    points: Tensor

    @checked(noise=word(NOISES))
    def __init__(
        self,
        taps: Any,
        deviation: Any = None,
        *,
        noise: str = "gaussian",
        background: Any = 1.0,
        constellation: Sequence[float] = (-1.0, 1.0),
    ) -> None:
        super().__init__()
        if (deviation is None) != (noise == "poisson"):
            raise OptionError("ChannelFactor: give the deviation of gaussian noise; poisson noise has none")
        self.noise = noise
        self.declare("taps", taps)
        if not self.taps.ndim or not self.taps.shape[-1]:
            raise ShapeError(f"ChannelFactor: taps must have shape (*chains, L), got {tuple(self.taps.shape)}")
        symbols = as_tensor("constellation", constellation, "ChannelFactor:").double()
        if symbols.ndim != 1 or len(symbols) < 2 or not bool(torch.isfinite(symbols).all()):
            raise ShapeError("ChannelFactor: constellation must hold two finite numbers at least, one per symbol")
        name, level = ("deviation", deviation) if noise == "gaussian" else ("background", background)
        level = as_tensor(name, level).to(self.taps.dtype)
        if not bool((level > 0).all()):
            raise DomainError(f"ChannelFactor: parameter '{name}' must be positive, got {shown(level)}")
        self.declare(name, level, Domain.from_attributes(tuple(level.shape), {"pos": True}))
        self.trellis = Trellis(len(symbols), self.taps.shape[-1])
        points = symbols.cpu()[self.trellis.digits]
        self.register_buffer("points", points, persistent=False)
        self.register_buffer("transitions", self.trellis.transitions, persistent=False)

    def forward(self, x: Tensor, taps: Tensor | None = None) -> ChainFactors:
        """Log potentials for x `(B, T)` or `(B, *chains, T)`."""
        x = as_floating("x", x, "ChannelFactor: context")
        h = (self.taps if taps is None else as_floating("taps", taps, "ChannelFactor: context")).to(x.dtype)
        if not h.ndim or h.shape[-1] != self.trellis.memory:
            raise ShapeError(
                f"ChannelFactor: taps must have {self.trellis.memory} in the last axis, got {tuple(h.shape)}"
            )
        chains, before = h.shape[:-1], x.shape[:-1]
        if chains != (before if taps is not None else before[len(before) - len(chains) :]):
            raise ShapeError(f"ChannelFactor: taps {tuple(h.shape)} do not fit x {tuple(x.shape)}: one per sequence")
        mean = (h @ self.points.to(x.dtype).mT)[..., None, :]  # (*chains, 1, S)
        x = x[..., None]
        if self.noise == "gaussian":
            deviation = self.deviation.to(x.dtype)[..., None, None]
            unary = torch.distributions.Normal(mean, deviation, validate_args=False).log_prob(x)
        else:
            rate = mean + self.background.to(x.dtype)[..., None, None]
            if not bool((rate > 0).all()):
                raise DomainError(
                    f"ChannelFactor: the Poisson rate is {rate.min().item():.4g} for some symbols; "
                    "raise background, or use a nonnegative constellation and taps"
                )
            unary = torch.distributions.Poisson(rate, validate_args=False).log_prob(x)
        return ChainFactors(self.transitions.to(x.dtype), unary)


class LearnedFactor(nn.Module):
    """A network in place of the likelihood: scores of the states of a channel with memory, from one observation.

    network: `(B, *chains, T, 1)` -> `(B, *chains, T, S)` with S = trellis.size. As symbols are sent with equal
    probabilities, so are states, and a classifier of states serves as the likelihood up to a constant
    (learned factor graphs, Shlezinger, Farsad, Eldar, Goldsmith 2021). Further arguments, such as estimates of the
    channel, are ignored.

    >>> LearnedFactor(nn.Linear(1, 4), Trellis(2, 2))(torch.zeros(3, 5)).unary.shape
    torch.Size([3, 5, 4])
    """

    transitions: Tensor

    @checked(network=instance(nn.Module, "a module"), trellis=instance(Trellis, "a Trellis"))
    def __init__(self, network: nn.Module, trellis: Trellis) -> None:
        super().__init__()
        self.network, self.trellis = network, trellis
        self.register_buffer("transitions", trellis.transitions, persistent=False)

    def scores(self, x: Tensor) -> Tensor:
        """Scores `(B, *chains, T, S)` of the states given x alone, for training it as a classifier."""
        x = as_floating("x", x, "LearnedFactor: context")
        weight = next(self.network.parameters(), x)
        return self.network(x[..., None].to(weight.dtype)).to(x.dtype)

    def forward(self, x: Tensor, *ignored: Any) -> ChainFactors:
        """Log potentials for x `(B, T)` or `(B, *chains, T)`."""
        unary = torch.log_softmax(self.scores(x), -1)
        if unary.shape[-1] != self.trellis.size:
            raise ShapeError(f"LearnedFactor: the network has {unary.shape[-1]} outputs for {self.trellis.size} states")
        return ChainFactors(self.transitions.to(x.dtype), unary)
