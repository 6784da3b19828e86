"""Recurrent networks that fill the gain slot of a filter (KalmanNet, Example 18 of the paper)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convexlearn.checks import SEED, Check, checked, count, shown
from convexlearn.errors import DomainError, MissingParameterError, ShapeError
from convexlearn.inputs import as_tensor

START = 0.3
"""Diagonal of the gain that an untrained network gives by default."""

HEAD_SCALE = 0.1
"""Factor on the first weights of the gain head; with torch's own the error often grows without bound."""

WIDTH = 5
"""Units per signal of the layers in front of the cells."""


ARCHITECTURE = Check("1 or 2", lambda v: type(v) is int and v in (1, 2))


class GainSignals(NamedTuple):
    """What a gain module sees at time t, batch first; at t = 0 the earlier values repeat the first ones.

    observation x_t and observation_before x_{t-1} `(B, p)` (missing entries replaced by their prediction),
    predicted `(B, p)`, the predicted observation; prior and prior_before `(B, n)`, the predicted states at t and
    t-1; mean and mean_before `(B, n)`, the filtered states at t-1 and t-2.
    """

    observation: Tensor
    observation_before: Tensor
    predicted: Tensor
    prior: Tensor
    prior_before: Tensor
    mean: Tensor
    mean_before: Tensor


class GainFeatures(NamedTuple):
    """The four inputs of KalmanNet, each of length one (or zero): see `gain_features`."""

    observation_change: Tensor
    innovation: Tensor
    state_change: Tensor
    state_update: Tensor


def gain_features(signals: GainSignals) -> GainFeatures:
    """x_t - x_{t-1} and x_t - predicted `(B, p)`; mean_{t-1} - mean_{t-2} and mean_{t-1} - prior_{t-1} `(B, n)`.

    Differences F1 to F4 of Revach and others (KalmanNet, 2022), scaled to unit length.

    >>> one = torch.ones(1, 2)
    >>> gain_features(GainSignals(5 * one, 2 * one, one, one, one, one, one)).innovation
    tensor([[0.7071, 0.7071]])
    """
    return GainFeatures(
        _unit(signals.observation - signals.observation_before),
        _unit(signals.observation - signals.predicted),
        _unit(signals.mean - signals.mean_before),
        _unit(signals.mean - signals.prior_before),
    )


class RecurrentGain(nn.Module):
    """A gain L `(B, n, p)` computed by gated recurrent units from GainSignals: KalmanNet's two architectures.

    n states, p observations. architecture 1: one unit with 10 (n^2 + p^2) states between two layers; 2: three
    units of n^2, n^2 and p^2 states, which stand for the covariances of process noise, prediction and innovation.
    start `(n, p)`: the gain at the beginning, 0.3 on the diagonal by default; a Riccati gain of a guessed model is
    a better one. Weights are float32 and drawn from `seed`; the gain has the dtype of the signals.

    >>> network, one = RecurrentGain(3, 2), torch.zeros(5, 2)
    >>> signals = GainSignals(one, one, one, *[torch.zeros(5, 3)] * 4)
    >>> network(signals, None)[0].shape
    torch.Size([5, 3, 2])
    """

    @checked(n=count(), p=count(), architecture=ARCHITECTURE, seed=SEED)
    def __init__(self, n: int, p: int, *, architecture: int = 2, start: Any = None, seed: int = 0) -> None:
        super().__init__()
        first = (
            START * torch.eye(n, p) if start is None else as_tensor("start", start, "RecurrentGain:").detach().float()
        )
        if tuple(first.shape) != (n, p):
            raise ShapeError(f"RecurrentGain: start must be ({n}, {p}), got {tuple(first.shape)}")
        if not bool(torch.isfinite(first).all()):
            raise DomainError("RecurrentGain: start has NaN or infinite entries")
        self.shape = (n, p)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = OneUnit(n, p) if architecture == 1 else ThreeUnits(n, p)
        with torch.no_grad():
            head = self.network.head
            head.weight.mul_(HEAD_SCALE)
            head.bias.copy_(first.flatten())

    def forward(self, signals: GainSignals, memory: Any = None) -> tuple[Tensor, Any]:
        """Gain `(B, n, p)` and the memory, tensors `(B, ...)`, before the next observation."""
        self._check(signals)
        dtype = signals.prior.dtype
        features = GainFeatures(*(f.to(self.network.head.weight.dtype) for f in gain_features(signals)))
        L, memory = self.network(features, memory)
        return L.unflatten(-1, self.shape).to(dtype), memory

    def _check(self, signals: GainSignals) -> None:
        """Signals of one batch `(B, p)` and `(B, n)`; numbers and other shapes would be broadcast."""
        if not isinstance(signals, GainSignals):
            raise MissingParameterError(f"RecurrentGain: signals must be GainSignals, got {shown(signals)}")
        n, p = self.shape
        batch = len(signals.prior) if isinstance(signals.prior, Tensor) and signals.prior.ndim else 0
        for name, value, size in zip(GainSignals._fields, signals, (p, p, p, n, n, n, n)):
            if not isinstance(value, Tensor) or value.shape != (batch, size) or not value.is_floating_point():
                got = shown(value)
                raise ShapeError(
                    f"RecurrentGain: signals.{name} must be a floating tensor ({batch}, {size}), got {got}"
                )


class OneUnit(nn.Module):
    """Architecture 1: a layer, one gated recurrent unit, two layers."""

    def __init__(self, n: int, p: int) -> None:
        super().__init__()
        self.hidden = 10 * (n * n + p * p)
        self.enter = nn.Sequential(nn.Linear(2 * (n + p), 80 * (n + p)), nn.ReLU())
        self.unit = nn.GRUCell(80 * (n + p), self.hidden)
        self.leave = nn.Sequential(nn.Linear(self.hidden, 40 * n * p), nn.ReLU())
        self.head = nn.Linear(40 * n * p, n * p)

    def forward(self, features: GainFeatures, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """Entries of the gain `(B, n p)`, and the state of the unit."""
        x = torch.cat(features, -1)
        h = self.unit(self.enter(x), x.new_zeros(len(x), self.hidden) if memory is None else memory)
        return self.head(self.leave(h)), h


class ThreeUnits(nn.Module):
    """Architecture 2: three units in a row, and layers that feed the gain back into the second."""

    def __init__(self, n: int, p: int) -> None:
        super().__init__()
        self.n, self.p = n, p
        self.process = nn.GRUCell(WIDTH * n, n * n)
        self.covariance = nn.GRUCell(n * n + WIDTH * n, n * n)
        self.innovation = nn.GRUCell(p * p + 2 * WIDTH * p, p * p)
        self.change = _layer(n, WIDTH * n)
        self.update = _layer(n, WIDTH * n)
        self.observed = _layer(2 * p, 2 * WIDTH * p)
        self.project = _layer(n * n, p * p)
        self.leave = _layer(n * n + p * p, 40 * (n * n + p * p))
        self.head = nn.Linear(40 * (n * n + p * p), n * p)
        self.back = _layer(p * p + n * p, n * n)
        self.posterior = _layer(2 * n * n, n * n)

    def start(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The states of the units before the first observation: I, 0, I."""
        eyes = [torch.eye(k, dtype=x.dtype, device=x.device).flatten().expand(len(x), -1) for k in (self.n, self.p)]
        return eyes[0], torch.zeros_like(eyes[0]), eyes[1]

    def forward(self, features: GainFeatures, memory: Any) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Entries of the gain `(B, n p)`, and the states of the units."""
        Q, P, S = self.start(features.innovation) if memory is None else memory
        Q = self.process(self.change(features.state_change), Q)
        P = self.covariance(torch.cat([Q, self.update(features.state_update)], -1), P)
        seen = self.observed(torch.cat([features.observation_change, features.innovation], -1))
        S = self.innovation(torch.cat([self.project(P), seen], -1), S)
        L = self.head(self.leave(torch.cat([P, S], -1)))
        P = self.posterior(torch.cat([P, self.back(torch.cat([S, L], -1))], -1))
        return L, (Q, P, S)


def _layer(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU())


def _unit(v: Tensor) -> Tensor:
    """v over its length, with a bounded slope at zero."""
    return v * torch.rsqrt(v.square().sum(-1, keepdim=True) + 1e-12)
