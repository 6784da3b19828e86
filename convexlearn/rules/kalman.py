"""Kalman filter with learned noise covariances, missing observations, and slots for gain and features."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convexlearn.domains import Domain
from convexlearn.errors import DomainError, MissingParameterError, OptionError, ShapeError
from convexlearn.riccati import FilterGains, filter_covariance, filter_gain, kalman_recursion, kalman_update
from convexlearn.rules.base import DecisionRule, as_tuple


class GainSignals(NamedTuple):
    """What a gain module sees at time t, batch first; at t = 0 the earlier values repeat the first ones.

    observation x_t and observation_before x_{t-1} `(B, p)` (missing entries replaced by their prediction),
    predicted C prior `(B, p)`; prior and prior_before `(B, n)`, the predicted states at t and t-1; mean and
    mean_before `(B, n)`, the filtered states at t-1 and t-2.
    """

    observation: Tensor
    observation_before: Tensor
    predicted: Tensor
    prior: Tensor
    prior_before: Tensor
    mean: Tensor
    mean_before: Tensor


class Belief(NamedTuple):
    """Memory between two steps: predicted state `(B, n)` and covariance, and what a gain module keeps.

    covariance: `(n, n)` shared by the batch, `(B, n, n)` after missing observations, None with an own gain.
    """

    prior: Tensor
    covariance: Tensor | None = None
    signals: GainSignals | None = None
    gain: Any = None


class Moments(NamedTuple):
    """Filtered means `(B, T, n)`, and the gains and covariances `(B or 1, T, ...)` behind them."""

    mean: Tensor
    gains: FilterGains


class KalmanFilter(DecisionRule):
    """Filtered means of z+ = A z + B s + v, x = C z + w, v ~ N(0, V), w ~ N(0, W) (Examples 8 and 13).

    A `(n, n)`, B `(n, m)` or None, C `(p, n)`; V `(n, n)` and W `(p, p)` are objective parameters, learned in
    the PSD cone through a Cholesky factor. The gain depends on their ratio only: freeze one of them, or
    report ratios. x `(B, T, p)` -> means `(B, T, n)`; NaN entries of x are missing.

    gain: None for the Riccati gain; a tensor `(n, p)`, learned; or a module called at each step as
    `gain(signals, memory) -> (L (B, n, p), memory)` with GainSignals and memory None at first (Example 18).
    V and W may be None with an own gain. features: a module applied to x `(B, ...)` of one time, of which a
    sample with a missing entry is missing altogether (Example 19).

    The paper's Eqs. 11, 23 and 25 drop the input from one of two predictions; here it is in both.

    >>> one = torch.ones(1, 1)
    >>> KalmanFilter(one, None, one, one, 2 * one)(torch.tensor([[[1.0], [torch.nan], [1.0]]])).flatten()
    tensor([0.5000, 0.5000, 0.8000], grad_fn=<ViewBackward0>)
    """

    A: Tensor
    B: Tensor
    C: Tensor
    V: Tensor
    W: Tensor
    gain: Any

    def __init__(
        self,
        A: Any,
        B: Any,
        C: Any,
        V: Any = None,
        W: Any = None,
        gain: Any = None,
        features: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        declare_model(self, {"A": A, "C": C} | ({} if B is None else {"B": B}))
        n, p = self.C.shape[1], self.C.shape[0]
        for name, value, size in (("V", V, n), ("W", W, p)):
            if value is None and gain is None:
                raise MissingParameterError(f"KalmanFilter: {name} ({size}, {size}) is needed for the Riccati gain")
            if value is not None:
                domain = Domain.from_attributes((size, size), {"PSD": True})
                self.declare(name, value, domain, learned=gain is None)
        if gain is None or isinstance(gain, nn.Module):
            self.gain = gain
        else:
            self.declare("gain", gain, Domain((n, p)))
        if features is not None and not callable(features):
            raise TypeError(f"KalmanFilter: features must be a module or function of x, got {type(features).__name__}")
        self.features = features

    @property
    def recursive(self) -> bool:
        """True: x is a sequence."""
        return True

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        inputs: Tensor | None = None,
        state: Tensor | None = None,
        covariance: Tensor | None = None,
    ) -> Tensor:
        """Filtered means `(B, T, n)` for x `(B, T, p)`, entry t given the observations up to t.

        inputs: `(B, T, m)` or `(B, T - 1, m)`; the input at t acts between the observations t and t + 1.
        state `(n,)` or `(B, n)` and covariance `(n, n)` or `(B, n, n)`: mean and covariance of the state at
        the first observation, before it; by default zero, and the stationary covariance, whose gain is constant.
        """
        y, drive, prior = self._sequence(x, inputs, state)
        if isinstance(self.gain, nn.Module):
            return self._step_by_step(y, drive, prior)
        missing = torch.isnan(y)
        L = self._gains(missing, covariance).to(y.dtype)
        return self._means(L, torch.where(missing, 0.0, y), drive, prior)

    def moments(
        self,
        x: Tensor,
        inputs: Tensor | None = None,
        state: Tensor | None = None,
        covariance: Tensor | None = None,
    ) -> Moments:
        """Means with gains and covariances of the Riccati gain; arguments as in `forward`."""
        if self.gain is not None:
            raise OptionError("moments: only the Riccati gain has covariances; build the filter with gain=None")
        y, drive, prior = self._sequence(x, inputs, state)
        missing = torch.isnan(y)
        gains = self._recursion(missing, self._start_covariance(covariance, len(y)))
        return Moments(self._means(gains.gain.to(y.dtype), torch.where(missing, 0.0, y), drive, prior), gains)

    def start(self, x: Any, state: Tensor | None = None, covariance: Tensor | None = None) -> Belief:
        """The belief before the first observation, zero and stationary by default; x `(B, ...)` gives the batch."""
        y = self._features(as_tuple(x)[0])
        prior = self._start_state(state, y)
        return Belief(prior, self._start_covariance(covariance, len(y)) if self.gain is None else None)

    def decide(self, x: Any, memory: Belief | None = None) -> tuple[Tensor, Belief]:
        """Filtered mean `(B, n)` after x `(B, p)`; a tuple (x, s) predicts the next state with input s `(B, m)`."""
        parts = as_tuple(x)
        belief = self.start(parts[0]) if memory is None else memory
        y = self._features(parts[0])
        s = parts[1] if len(parts) > 1 else None
        if s is not None and "B" not in self._declared:
            raise OptionError("KalmanFilter: inputs were given, but B is None")
        return self._step(belief, y, s)

    def transition(self, z: Tensor, s: Tensor | None = None) -> Tensor:
        """Predicted next state `(B, n)`; a filter of a nonlinear model with an own gain overrides it."""
        prior = z @ self.A.to(z.dtype).mT
        return prior if s is None else prior + s @ self.B.to(z.dtype).mT

    def measure(self, z: Tensor) -> Tensor:
        """Predicted observation `(B, p)`; a filter of a nonlinear model with an own gain overrides it."""
        return z @ self.C.to(z.dtype).mT

    def _step(self, belief: Belief, y: Tensor, s: Tensor | None) -> tuple[Tensor, Belief]:
        """Filtered mean after observation y `(B, p)`, and the belief after input s."""
        observed, predicted = ~torch.isnan(y), self.measure(belief.prior)
        innovation = torch.where(observed, y - predicted, 0.0)
        after = signals = kept = None
        if isinstance(self.gain, nn.Module):
            signals = _signals(belief, predicted + innovation, predicted)
            L, kept = self.gain(signals, belief.gain)
        elif self.gain is not None:
            L = self.gain
        else:
            A, C, V, W = (M.double() for M in (self.A, self.C, self.V, self.W))
            P = self._start_covariance(None, len(y)) if belief.covariance is None else belief.covariance
            L, after = kalman_update(P, C, W, None if bool(observed.all()) else observed)
            after = A @ after @ A.mT + V
        mean = belief.prior + torch.einsum("...np,...p->...n", L.to(y.dtype), innovation)
        if signals is not None:
            signals = signals._replace(mean=mean, mean_before=signals.mean)
        return mean, Belief(self.transition(mean, s), after, signals, kept)

    def _step_by_step(self, y: Tensor, drive: Tensor | None, prior: Tensor) -> Tensor:
        """Means with a gain module, which sees what happened before."""
        belief, means = Belief(prior), []
        for t in range(y.shape[1]):
            s = None if drive is None or t >= drive.shape[1] else drive[:, t]
            mean, belief = self._step(belief, y[:, t], s)
            means.append(mean)
        return torch.stack(means, 1)

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
        return self._recursion(missing, self._start_covariance(covariance, len(missing))).gain

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

    def _start_covariance(self, covariance: Tensor | None, batch: int) -> Tensor:
        n = len(self.A)
        if covariance is None:
            return filter_covariance(*(M.double() for M in (self.A, self.C, self.V, self.W)))
        if tuple(covariance.shape) not in {(n, n), (batch, n, n)}:
            raise ShapeError(f"covariance must be ({n}, {n}) or ({batch}, {n}, {n}), got {tuple(covariance.shape)}")
        return covariance.double()

    def _start_state(self, state: Tensor | None, y: Tensor) -> Tensor:
        batch, n = len(y), len(self.A)
        if state is None:
            return y.new_zeros(batch, n)
        if tuple(state.shape) not in {(n,), (batch, n)}:
            raise ShapeError(f"state must have shape ({n},) or ({batch}, {n}), got {tuple(state.shape)}")
        _refuse_not_finite("state", state)
        return state.to(y.dtype).expand(batch, n)

    def _features(self, x: Tensor) -> Tensor:
        """Observations `(B, p)` of one time, NaN where missing."""
        if self.features is not None:
            rows = torch.isnan(x).reshape(len(x), x[:1].numel() if len(x) else 1).any(-1)
            y = self.features(torch.nan_to_num(x, nan=0.0))
            x = torch.where(rows.reshape(-1, *[1] * (y.ndim - 1)), torch.nan, y)
        if x.ndim != 2 or x.shape[-1] != len(self.C):
            what = "features(x)" if self.features is not None else "x"
            raise ShapeError(f"{what} must have {len(self.C)} entries per time, as C has rows; got {tuple(x.shape)}")
        return x

    def _sequence(self, x: Tensor, inputs: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Observations `(B, T, p)`, inputs `(B, T - 1, m)` or None, and the first prior `(B, n)`; all checked."""
        if x.ndim < 2 or x.shape[1] == 0 or (self.features is None and x.ndim != 3):
            raise ShapeError(f"x must have shape (B, T, {len(self.C)}) with T > 0, got {tuple(x.shape)}")
        batch, steps = x.shape[:2]
        y = self._features(x.flatten(0, 1)).reshape(batch, steps, len(self.C))
        infinite = torch.isinf(y)
        if bool(infinite.any()):
            i, t, _ = torch.nonzero(infinite)[0].tolist()
            raise DomainError(f"x is infinite in batch element {i} at time {t}; mark missing observations by NaN")
        prior = self._start_state(state, y)
        if inputs is None:
            return y, None, prior
        if "B" not in self._declared:
            raise OptionError("KalmanFilter: inputs were given, but B is None")
        m = self.B.shape[1]
        if tuple(inputs.shape) not in {(batch, steps, m), (batch, steps - 1, m)}:
            raise ShapeError(f"inputs must have shape ({batch}, {steps}, {m}), got {tuple(inputs.shape)}")
        _refuse_not_finite("inputs", inputs)
        return y, inputs[:, : steps - 1].to(y.dtype), prior


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


def _signals(belief: Belief, y: Tensor, predicted: Tensor) -> GainSignals:
    """What a gain module sees now, from what it saw last (whose means are already those after it)."""
    prior, last = belief.prior, belief.signals
    if last is None:
        return GainSignals(y, y, predicted, prior, prior, prior, prior)
    return GainSignals(y, last.observation, predicted, prior, last.prior, last.mean, last.mean_before)


def _apply(M: Tensor, x: Tensor) -> Tensor:
    """M x over `(B, T)`, M `(B or 1, T or 1, k, n)`."""
    if len(M) == 1 and M.shape[1] == 1:
        return x @ M[0, 0].mT
    return (M @ x[..., None])[..., 0]


def _refuse_not_finite(name: str, value: Tensor) -> None:
    bad = ~torch.isfinite(value.detach())
    if bool(bad.any()):
        raise DomainError(
            f"{name} is NaN or infinite at index {tuple(torch.nonzero(bad)[0].tolist())}; only x may have NaN entries"
        )
