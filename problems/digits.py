"""Handwritten digits bundled with scikit-learn, and two models of them: a variational autoencoder and a flow."""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from convexlearn.extras import require
from convexlearn.flows import Affine, Flow, real_nvp
from convexlearn.networks import mlp
from convexlearn.problems.catalogue import Budget
from convexlearn.problems.fitting import gradient
from convexlearn.randomness import make_generator
from convexlearn.simulate.base import Trajectory
from convexlearn.simulate.pairs import Pairs

SIDE = 8
"""Side of a picture, in pixels."""

LEVELS = 16
"""Intensities are multiples of 1 / LEVELS."""

PARTS = {"train": slice(0, 1200), "validation": slice(1200, 1400), "test": slice(1400, 1797)}
"""Which of the pictures, in the data set's order, serve for what."""

BLUR = 0.1
"""Standard deviation of the noise that gives pictures a density, in intensities; without it flows overfit."""


@cache
def pictures(part: str) -> Tensor:
    """Digits `(N, SIDE * SIDE)` of a part of the data set, intensities in [0, 1], float64; nothing is downloaded."""
    data = require("sklearn.datasets", "imaging").load_digits().data
    return torch.tensor(data[PARTS[part]] / LEVELS)


class Autoencoder(nn.Module):
    """A variational autoencoder (Kingma, Welling 2014) with a Gaussian decoder whose variance is trained too.

    s `(B, n)` -> the negative evidence lower bound `(B,)` in nats. Latents are drawn from torch's global generator
    while training, and are their mean otherwise. `decoder` maps latents `(N, k)` to pictures; it is smooth.
    """

    def __init__(self, latent: int, seed: int, hidden: tuple[int, ...] = (64, 64)) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        network = partial(mlp, hidden=hidden, activation=nn.SiLU, seed=generator)
        self.encoder = network(SIDE**2, 2 * latent)
        self.decoder = nn.Sequential(network(latent, SIDE**2), nn.Sigmoid())
        self.log_variance = nn.Parameter(torch.tensor(-3.0))

    def forward(self, s: Tensor) -> Tensor:
        """The negative evidence lower bound."""
        mean, log_deviation = self.encoder(s).chunk(2, 1)
        z = mean + log_deviation.exp() * torch.randn_like(mean) if self.training else mean
        error = (s - self.decoder(z)).square().sum(1)
        normalisation = s.shape[1] / 2 * (self.log_variance + math.log(2 * math.pi))
        divergence = (mean.square() + (2 * log_deviation).exp() - 1).sum(1) / 2 - log_deviation.sum(1)
        return error / (2 * self.log_variance.exp()) + normalisation + divergence


class Likelihood(nn.Module):
    """s `(B, n)` -> -log p(s) `(B,)` in nats of a flow, for pictures with BLUR added while training."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, s: Tensor) -> Tensor:
        """The negative log-likelihood; noise comes from torch's global generator."""
        return -self.flow.log_density(s + BLUR * torch.randn_like(s) if self.training else s)


def decoder(latent: int, seed: int) -> nn.Module:
    """The decoder before training, float64: latents `(N, latent)` to pictures."""
    return Autoencoder(latent, seed).decoder.double()


def flow(seed: int) -> Flow:
    """The flow before training, float64: it has mean and covariance of the training pictures with BLUR added."""
    return real_nvp(SIDE**2, couplings=4, hidden=(32, 32), base=Affine.fit(_blurred("train")), seed=seed).double()


class Models:
    """The two models, trained on the training pictures when they are first asked for."""

    def __init__(self, latent: int) -> None:
        self.latent = latent
        self._trained: dict[str, Any] = {}

    def decoder(self, budget: Budget) -> nn.Module:
        """The decoder of an autoencoder with the greatest evidence lower bound."""

        def train() -> nn.Module:
            model = Autoencoder(self.latent, budget.seed)
            options = {"steps": 2000, "learning_rate": 3e-3, "batch_size": 128, "optimizer": _decaying(0.05)}
            gradient(Pairs(pictures("train").float()), _value, **options)(model, budget)
            return model.decoder.double()

        return self._once("decoder", train)

    def flow(self, budget: Budget) -> Flow:
        """The flow of maximum likelihood, stopped by the likelihood of the validation pictures."""

        def train() -> Flow:
            model = Likelihood(flow(budget.seed).float())
            options = {"steps": 600, "learning_rate": 1e-3, "batch_size": 128, "optimizer": _decaying(0.1)}
            validation = Pairs(_blurred("validation"))
            gradient(Pairs(pictures("train").float()), _value, validation=validation, **options)(model, budget)
            return model.flow.double()

        return self._once("flow", train)

    def _once(self, name: str, train: Callable[[], Any]) -> Any:
        if name not in self._trained:
            self._trained[name] = train()
        return self._trained[name]


def _blurred(part: str) -> Tensor:
    """Pictures with BLUR added, float32; the same ones each time."""
    s = pictures(part)
    return (s + BLUR * torch.randn(s.shape, generator=make_generator(0, part), dtype=s.dtype)).float()


def _value(trajectory: Trajectory) -> Tensor:
    """The objective of a module that computes its own loss."""
    return trajectory.decision


def _decaying(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    return partial(torch.optim.AdamW, weight_decay=rate)
