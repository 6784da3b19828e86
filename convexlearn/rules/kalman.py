"""Kalman filter with learned noise covariances, missing observations, and slots for gain, features, correction."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from convexlearn.errors import OptionError, ShapeError
from convexlearn.gain_networks import GainSignals
from convexlearn.riccati import FilterGains, filter_covariance, filter_gain, kalman_recursion
from convexlearn.rules.base import DecisionRule
from convexlearn.rules.state_filter import Belief, Moments, Observations, StateFilter

__all__ = ["Belief", "GainSignals", "KalmanFilter", "Moments", "declare_model"]


class KalmanFilter(StateFilter):
    """Filtered means of z+ = A z + B s + v, x = C z + w, v ~ N(0, V), w ~ N(0, W) (Examples 8 and 13).

    A `(n, n)`, B `(n, m)` or None, C `(p, n)`; V `(n, n)` and W `(p, p)` are objective parameters, learned in
    the PSD cone through a Cholesky factor. The gain depends on their ratio only: freeze one of them, or
    report ratios. x `(B, T, p)` -> means `(B, T, n)`; NaN entries of x are missing.

    gain: None for the Riccati gain; a tensor `(n, p)`, learned; or a module such as RecurrentGain, called at
    each step as `gain(signals, memory) -> (L (B, n, p), memory)` with GainSignals and memory None at first
    (Example 18). V and W may be None with an own gain. features: a module applied to x `(B, ...)` of one time,
    of which a sample with a missing entry is missing altogether (Example 19); it may add the relative variances
    `(B, p)` of its errors, see StateFilter. correction: a module called as
    `correction(signals, mean, memory) -> (d (B, n), memory)`, in parallel with the filter; d is added to the
    filtered mean (reference 9: Satorras, Akata, Welling 2019).

    The paper's Eqs. 11, 23 and 25 drop the input from one of two predictions; here it is in both.

    >>> one = torch.ones(1, 1)
    >>> KalmanFilter(one, None, one, one, 2 * one)(torch.tensor([[[1.0], [torch.nan], [1.0]]])).flatten()
    tensor([0.5000, 0.5000, 0.8000], grad_fn=<ViewBackward0>)
    """

    A: Tensor
    B: Tensor
    C: Tensor

    def __init__(
        self,
        A: Any,
        B: Any,
        C: Any,
        V: Any = None,
        W: Any = None,
        gain: Any = None,
        features: Callable[..., Tensor] | None = None,
        correction: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        declare_model(self, {"A": A, "C": C} | ({} if B is None else {"B": B}))
        self.fill_slots(V, W, gain, features, correction)

    @property
    def n(self) -> int:
        """Number of states."""
        return self.C.shape[1]

    @property
    def p(self) -> int:
        """Number of observations, after the features."""
        return self.C.shape[0]

    def _filtered(self, seen: Observations, drive: Tensor | None, prior: Tensor, covariance: Tensor | None) -> Tensor:
        """At once where all gains are known beforehand."""
        varies = seen.ratios is not None and self.gain is None
        if varies or isinstance(self.gain, nn.Module) or self.correction is not None:
            return super()._filtered(seen, drive, prior, covariance)
        y = seen.values
        missing = torch.isnan(y)
        L = self._gains(missing, covariance).to(y.dtype)
        return self._means(L, torch.where(missing, 0.0, y), drive, prior)

    def _moments(self, seen: Observations, drive: Tensor | None, prior: Tensor, covariance: Tensor | None) -> Moments:
        """At once with the Riccati gain alone."""
        if seen.ratios is not None or self.gain is not None or self.correction is not None:
            return super()._moments(seen, drive, prior, covariance)
        y = seen.values
        missing = torch.isnan(y)
        gains = self._recursion(missing, self.start_covariance(covariance, len(y)))
        return Moments(self._means(gains.gain.to(y.dtype), torch.where(missing, 0.0, y), drive, prior), gains)

    def transition(self, z: Tensor, s: Tensor | None = None) -> Tensor:
        """Predicted next state `(B, n)`."""
        prior = z @ self.A.to(z.dtype).mT
        return prior if s is None else prior + s @ self.B.to(z.dtype).mT

    def measure(self, z: Tensor) -> Tensor:
        """Predicted observation `(B, p)`."""
        return z @ self.C.to(z.dtype).mT

    def linear_transition(self, z: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor]:
        """Predicted next state, and A."""
        return self.transition(z, s), self.A

    def linear_measure(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted observation, and C."""
        return self.measure(z), self.C

    def default_covariance(self) -> Tensor:
        """The stationary covariance `(n, n)` before an observation."""
        return filter_covariance(*(M.double() for M in (self.A, self.C, self.V, self.W)))

    def _accept(self, inputs: Tensor | None) -> None:
        if inputs is not None and "B" not in self._declared:
            raise OptionError("KalmanFilter: inputs were given, but B is None")

    @property
    def _inputs(self) -> int | None:
        return self.B.shape[1]

    def _means(self, L: Tensor, y: Tensor, drive: Tensor | None, prior: Tensor) -> Tensor:
        """z_t = (I - L C)(A z_{t-1} + B s_{t-1}) + L y_t, all gains L `(B or 1, T or 1, n, p)` being known."""
        A, C = self.A.to(y.dtype), self.C.to(y.dtype)
        kept = torch.eye(len(A), dtype=y.dtype, device=y.device) - L @ C
        offset = _apply(L, y)
        first = _apply(kept[:, :1], prior[:, None])
        if drive is not None and y.shape[1] > 1:
            pushed = _apply(kept[:, 1:] if kept.shape[1] > 1 else kept, drive @ self.B.to(y.dtype).mT)
            first = torch.cat([first, pushed], 1)
            offset = offset + first
        else:
            offset = torch.cat([offset[:, :1] + first, offset[:, 1:]], 1)
        shared, moved = len(L) == 1, (kept @ A).unbind(1)
        steps = offset.unbind(1)
        means = [steps[0]]
        for t in range(1, len(steps)):
            M = moved[t if len(moved) > 1 else 0]
            if shared:
                means.append(torch.addmm(steps[t], means[-1], M[0].mT))
            else:
                means.append(torch.baddbmm(steps[t][..., None], M, means[-1][..., None])[..., 0])
        return torch.stack(means, 1)

    def _gains(self, missing: Tensor, covariance: Tensor | None) -> Tensor:
        """L `(B or 1, T or 1, n, p)`; its columns are zero where an observation is missing."""
        gap = bool(missing.any())
        if self.gain is not None:
            return torch.where(missing[:, :, None], 0.0, self.gain) if gap else self.gain[None, None]
        if covariance is None and not gap:
            return filter_gain(*(M.double() for M in (self.A, self.C, self.V, self.W)))[None, None]
        return self._recursion(missing, self.start_covariance(covariance, len(missing))).gain

    def _recursion(self, missing: Tensor, covariance: Tensor) -> FilterGains:
        """The recursion once per pattern of missing entries, not once per sample: it sees no data otherwise."""
        batch, steps, which = len(missing), missing.shape[1], None
        observed = None
        if bool(missing.any()):
            observed = ~missing
            if covariance.ndim == 2:
                patterns, which = torch.unique(observed.reshape(batch, -1), dim=0, return_inverse=True)
                observed = patterns.reshape(len(patterns), *missing.shape[1:])
        P = covariance if covariance.ndim == 3 else covariance[None]
        A, C, V, W = (M.double() for M in (self.A, self.C, self.V, self.W))
        gains = kalman_recursion(A, C, V, W, P, horizon=steps, observed=observed)
        if which is None or len(gains.gain) == 1:
            return gains
        return FilterGains(*(part[which] for part in gains))


def declare_model(rule: DecisionRule, matrices: dict[str, Any]) -> None:
    """Declare the matrices A `(n, n)`, B `(n, m)`, C `(p, n)` of a state-space model, fixed until `learn`."""
    for name, value in matrices.items():
        rule.declare(name, value, learned=False)
    shapes = {name: tuple(rule.value(name).shape) for name in matrices}
    n = shapes["A"][0] if shapes["A"] else 0
    fits = all(len(shape) == 2 for shape in shapes.values()) and shapes["A"] == (n, n)
    if not fits or shapes.get("B", (n,))[0] != n or shapes.get("C", (0, n))[1] != n:
        got = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ShapeError(f"{type(rule).__name__} takes A (n, n), B (n, m) and C (p, n), got {got}")


def _apply(M: Tensor, x: Tensor) -> Tensor:
    """M x over `(B, T)`, M `(B or 1, T or 1, k, n)`."""
    if len(M) == 1 and M.shape[1] == 1:
        return x @ M[0, 0].mT
    return (M @ x[..., None])[..., 0]
