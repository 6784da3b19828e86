"""Function nodes for channels with finite memory: from the channel's model, or a network."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convexlearn.chain import ChainFactors
from convexlearn.domains import Domain
from convexlearn.errors import DomainError, OptionError, ShapeError, suggest
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
        if self.symbols < 2 or self.memory < 1:
            raise OptionError(f"Trellis: symbols must be at least 2 and memory 1, got {self.symbols}, {self.memory}")

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
        if noise not in NOISES:
            raise OptionError(f"ChannelFactor: noise '{noise}': {suggest(noise, NOISES)}")
        if (deviation is None) != (noise == "poisson"):
            raise OptionError("ChannelFactor: give the deviation of gaussian noise; poisson noise has none")
        self.noise = noise
        self.declare("taps", taps)
        name, level = ("deviation", deviation) if noise == "gaussian" else ("background", background)
        level = torch.as_tensor(level, dtype=self.taps.dtype)
        self.declare(name, level, Domain.from_attributes(tuple(level.shape), {"pos": True}))
        self.trellis = Trellis(len(constellation), self.taps.shape[-1])
        points = torch.tensor(constellation, dtype=torch.float64)[self.trellis.digits]
        self.register_buffer("points", points, persistent=False)
        self.register_buffer("transitions", self.trellis.transitions, persistent=False)

    def forward(self, x: Tensor, taps: Tensor | None = None) -> ChainFactors:
        """Log potentials for x `(B, T)` or `(B, *chains, T)`."""
        h = (self.taps if taps is None else taps).to(x.dtype)
        if h.shape[-1] != self.trellis.memory:
            raise ShapeError(
                f"ChannelFactor: taps must have {self.trellis.memory} in the last axis, got {tuple(h.shape)}"
            )
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

    def __init__(self, network: nn.Module, trellis: Trellis) -> None:
        super().__init__()
        self.network, self.trellis = network, trellis
        self.register_buffer("transitions", trellis.transitions, persistent=False)

    def scores(self, x: Tensor) -> Tensor:
        """Scores `(B, *chains, T, S)` of the states given x alone, for training it as a classifier."""
        weight = next(self.network.parameters(), x)
        return self.network(x[..., None].to(weight.dtype)).to(x.dtype)

    def forward(self, x: Tensor, *ignored: Any) -> ChainFactors:
        """Log potentials for x `(B, T)` or `(B, *chains, T)`."""
        unary = torch.log_softmax(self.scores(x), -1)
        if unary.shape[-1] != self.trellis.size:
            raise ShapeError(f"LearnedFactor: the network has {unary.shape[-1]} outputs for {self.trellis.size} states")
        return ChainFactors(self.transitions.to(x.dtype), unary)
