"""Rules that see a pendulum in pictures: features before a Kalman filter, a recurrent network, features alone."""

import torch
from torch import Tensor, nn

from convexlearn.problems.pendulum_pictures import FREQUENCY, SIDE, SPREAD, linear_model, swing
from convexlearn.rules.base import DecisionRule
from convexlearn.rules.extended_kalman import ExtendedKalmanFilter
from convexlearn.rules.kalman import KalmanFilter
from convexlearn.rules.state_filter import Moments
from convexlearn.simulate.pairs import Pairs

FEATURES, WIDE, UNITS = 32, 69, 16
"""What the pictures' network says of one; hidden units after it of the angle, and of the recurrent network.

WIDE and UNITS give filter and recurrent network as many parameters but for one in a hundred.
"""


def encoder() -> nn.Sequential:
    """Pictures `(N, SIDE, SIDE)` -> `(N, FEATURES)`."""
    return nn.Sequential(
        nn.Unflatten(1, (1, SIDE)),
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(SIDE * SIDE, FEATURES),
        nn.ReLU(),
    )


class AngleNetwork(nn.Module):
    """The angle [rad] in a picture `(N, SIDE, SIDE)`, and its relative variance, `(N, 1)` each.

    The logarithm of the variance stays between -8 and 8.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = encoder()
            self.head = nn.Sequential(nn.Linear(FEATURES, WIDE), nn.ReLU(), nn.Linear(WIDE, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Angles and relative variances."""
        angle, doubt = self.head(self.encoder(x)).split(1, -1)
        return angle, torch.exp(8 * torch.tanh(doubt / 8))


class AngleOnly(nn.Module):
    """The angle of an AngleNetwork, for a filter that believes all pictures alike."""

    def __init__(self, network: AngleNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Angles `(N, 1)`."""
        return self.network(x)[0]


class FeaturesFilter(DecisionRule):
    """A Kalman filter for small swings behind features of pictures (Example 19): x `(B, T, ...)` -> `(B, T, 2)`.

    features None: x `(B, T, 1)` are angles themselves. The state before the first picture has mean zero and the
    covariance of the beginning times `scale`, as have V and W after `calibrate`.
    """

    scale: Tensor

    def __init__(self, features: nn.Module | None, step: float, push: float, noise: float) -> None:
        super().__init__()
        G = torch.tensor([[step], [1.0]], dtype=torch.float64)
        V = push**2 * G @ G.mT + 1e-6 * torch.eye(2, dtype=torch.float64)
        C = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        W = torch.full((1, 1), noise**2, dtype=torch.float64)
        self.estimator = KalmanFilter(linear_model(step), None, C, V, W, features=features)
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    @property
    def recursive(self) -> bool:
        """True: x is a sequence."""
        return True

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Filtered means."""
        return self.estimator(x, covariance=self.first_covariance())

    def moments(self, x: Tensor) -> Moments:
        """Filtered means and covariances."""
        return self.estimator.moments(x, covariance=self.first_covariance())

    def first_covariance(self) -> Tensor:
        """Covariance `(2, 2)` before the first picture."""
        return self.scale * torch.diag(torch.tensor(SPREAD, dtype=torch.float64).square())

    def calibrate(self, pairs: Pairs) -> None:
        """Multiply all covariances so that on `pairs` the squared error in their units is 2 on average.

        The gains stay: they depend on ratios of the covariances only, which is why training them says nothing of
        their size.
        """
        with torch.no_grad():
            moments = self.moments(*pairs.x)
            error = (torch.as_tensor(pairs.s) - moments.mean).double()
            P = moments.gains.posterior.expand(len(error), *moments.gains.posterior.shape[1:])
            factor = (error * torch.linalg.solve(P, error[..., None])[..., 0]).sum(-1).mean() / 2
            self.scale.mul_(factor)
            for name in ("V", "W"):
                setattr(self.estimator, name, factor * self.estimator.value(name))


class RecurrentPictures(DecisionRule):
    """The same pictures' network, a gated recurrent unit and a linear head: x `(B, T, SIDE, SIDE)` -> `(B, T, 2)`."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = encoder()
            self.unit = nn.GRU(FEATURES, UNITS, batch_first=True)
            self.head = nn.Linear(UNITS, 2)

    @property
    def recursive(self) -> bool:
        """True: x is a sequence."""
        return True

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Estimates; the speed in units in which its variance is about that of the angle."""
        out, _ = self.unit(self.encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
        return self.head(out) * out.new_tensor([1.0, FREQUENCY])


class Differences(DecisionRule):
    """Angles by the network from each picture alone, speeds as their differences: no filter."""

    def __init__(self, features: AngleNetwork, step: float) -> None:
        super().__init__()
        self.features, self.step = AngleOnly(features), step

    @property
    def recursive(self) -> bool:
        """True: x is a sequence."""
        return True

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Angles and speeds `(B, T, 2)`; the first speed is zero."""
        angle = self.features(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        speed = torch.cat([torch.zeros_like(angle[:, :1]), angle.diff(dim=1) / self.step], 1)
        return torch.cat([angle, speed], -1)


class TrueAngles(DecisionRule):
    """The extended Kalman filter of the true motion that sees the angles themselves, x `(B, T, 1)` -> `(B, T, 2)`."""

    def __init__(self, step: float, push: float) -> None:
        super().__init__()
        G = torch.tensor([[step], [1.0]], dtype=torch.float64)
        eye = torch.eye(2, dtype=torch.float64)
        V = push**2 * G @ G.mT + 1e-9 * eye
        self.estimator = ExtendedKalmanFilter(lambda z: swing(z, 0.0, step), _angle, V, 1e-8 * eye[:1, :1]).freeze()

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Filtered means."""
        return self.estimator(x, covariance=torch.diag(torch.tensor(SPREAD, dtype=torch.float64).square()))


def _angle(z: Tensor) -> Tensor:
    return z[..., :1]
