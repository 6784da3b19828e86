"""Extended Kalman filter: a nonlinear model, linearized at the estimate, with the slots of the Kalman filter."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convexlearn.checks import FUNCTION, checked
from convexlearn.errors import MissingParameterError, ShapeError
from convexlearn.inputs import as_tensor
from convexlearn.rules.state_filter import StateFilter


class ExtendedKalmanFilter(StateFilter):
    """Filtered means of z+ = f(z, s) + v, x = h(z) + w, v ~ N(0, V), w ~ N(0, W), to first order (Table 1).

    f maps z `(B, n)`, and s `(B, m)` where inputs are given, to `(B, n)`; h maps z to `(B, p)`: torch functions
    or modules, each row on its own, whose Jacobians torch.func computes. V `(n, n)` and W `(p, p)` are objective
    parameters in the PSD cone. x `(B, T, p)` -> means `(B, T, n)`; NaN entries of x are missing.

    gain, features, correction: as in KalmanFilter. With a RecurrentGain this is KalmanNet (Example 18), for
    which V and W may be None. f and h have to be module-level functions or modules for the rule to be pickled.

    >>> one = torch.ones(1, 1)
    >>> rule = ExtendedKalmanFilter(torch.sin, torch.clone, 0 * one, one).freeze()
    >>> rule(torch.tensor([[[1.0], [1.0]]]), covariance=one).flatten()
    tensor([0.5000, 0.6244])
    """

    @checked(f=FUNCTION, h=FUNCTION)
    def __init__(
        self,
        f: Callable[..., Tensor],
        h: Callable[[Tensor], Tensor],
        V: Any = None,
        W: Any = None,
        gain: Any = None,
        features: Callable[..., Tensor] | None = None,
        correction: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.f, self.h = f, h
        shape = getattr(gain, "shape", None)
        if shape is None and (V is None or W is None):
            raise MissingParameterError("ExtendedKalmanFilter: V (n, n) and W (p, p) are needed for the Riccati gain")
        if shape is None:
            shape = tuple(size for name, M in (("V", V), ("W", W)) for size in as_tensor(name, M).shape[-1:])
        self._sizes = tuple(shape)
        if len(self._sizes) != 2:
            raise ShapeError(f"ExtendedKalmanFilter: V, W must be square matrices and gain (n, p), got {self._sizes}")
        self.fill_slots(V, W, gain, features, correction)

    @property
    def n(self) -> int:
        """Number of states."""
        return self._sizes[0]

    @property
    def p(self) -> int:
        """Number of observations, after the features."""
        return self._sizes[1]

    def transition(self, z: Tensor, s: Tensor | None = None) -> Tensor:
        """f(z) or f(z, s)."""
        return self._checked("f", self.f(z) if s is None else self.f(z, s), z, self.n)

    def measure(self, z: Tensor) -> Tensor:
        """h(z)."""
        return self._checked("h", self.h(z), z, self.p)

    def linear_transition(self, z: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor]:
        """f at z, and its Jacobian `(B, n, n)`."""
        return _linearized(lambda z: self.transition(z, None if s is None else s.repeat(self.n, 1)), z, self.n)

    def linear_measure(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """h at z, and its Jacobian `(B, p, n)`."""
        return _linearized(self.measure, z, self.p)

    def default_covariance(self) -> Tensor:
        """V, as after one step from the known origin."""
        return self.V.double()

    @staticmethod
    def _checked(name: str, value: Tensor, z: Tensor, size: int) -> Tensor:
        if tuple(value.shape) != (len(z), size):
            got = f"({len(z)}, {size}) for z {tuple(z.shape)}, got {tuple(value.shape)}"
            raise ShapeError(f"ExtendedKalmanFilter: {name}(z) must be {got}")
        return value


def _linearized(function: Callable[[Tensor], Tensor], z: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """function(z) `(B, k)` and its Jacobian `(B, k, n)`: one pass back of k copies of the batch, one per entry."""
    batch = len(z)
    entries = torch.eye(size, dtype=z.dtype, device=z.device).repeat_interleave(batch, 0)
    value, pull, *_ = torch.func.vjp(function, z.repeat(size, 1))
    return value[:batch], pull(entries)[0].unflatten(0, (size, batch)).transpose(0, 1)
