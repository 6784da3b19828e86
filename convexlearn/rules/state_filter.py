"""One step of a Kalman-type filter, shared by linear and nonlinear models: predict, gain, update, correct."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convexlearn.checks import FUNCTION, require_that
from convexlearn.domains import Domain
from convexlearn.errors import DomainError, MissingParameterError, OptionError, ShapeError
from convexlearn.gain_networks import GainSignals
from convexlearn.inputs import as_floating, refuse_not_finite, start_state
from convexlearn.riccati import FilterGains, check_psd, kalman_update
from convexlearn.rules.base import DecisionRule, as_tuple, kept


class Belief(NamedTuple):
    """Memory between two steps: predicted state `(B, n)` and covariance, and what the modules in slots keep.

    covariance: `(n, n)` shared by the batch, `(B, n, n)`, or None with an own gain.
    """

    prior: Tensor
    covariance: Tensor | None = None
    signals: GainSignals | None = None
    gain: Any = None
    correction: Any = None


class Moments(NamedTuple):
    """Filtered means `(B, T, n)`, and the gains and covariances `(B or 1, T, ...)` behind them."""

    mean: Tensor
    gains: FilterGains


class Observations(NamedTuple):
    """What the filter sees, NaN where missing, and where features say it the relative variances of their errors.

    values, ratios: `(B, p)` of one time, `(B, T, p)` of a sequence.
    """

    values: Tensor
    ratios: Tensor | None = None

    def at(self, t: int) -> "Observations":
        """Those of time t of a sequence."""
        return Observations(self.values[:, t], None if self.ratios is None else self.ratios[:, t])


class Update(NamedTuple):
    """One step: decision `(B, n)`, gain, and with the Riccati gain the covariance after the observation."""

    decision: Tensor
    gain: Tensor
    posterior: Tensor | None = None


class StateFilter(DecisionRule):
    """What the filters have in common; a subclass says how the state moves and how it is observed.

    Slots. gain: None for the Riccati gain; a tensor `(n, p)`, learned; or a module called at each step as
    `gain(signals, memory) -> (L (B, n, p), memory)` with GainSignals and memory None at first. features: a
    module applied to x of one time that gives observations `(B, p)`, or a pair of them and positive `(B, p)`, the
    relative variances r of their errors: the covariance of the noise is then diag(r)^1/2 W diag(r)^1/2 (Haarnoja
    and others, Backprop KF, 2016). correction: a module in parallel, `correction(signals, mean, memory) ->
    (d (B, n), memory)`, whose d is added to the filtered mean; the filter goes on from the mean without it.
    """

    V: Tensor
    W: Tensor
    gain: Any
    features: Any
    correction: Any

    def fill_slots(self, V: Any, W: Any, gain: Any, features: Any, correction: Any) -> None:
        """Declare V, W and the gain, and keep the modules; after `n` and `p` can be asked for."""
        owner = type(self).__name__
        for name, value, size in (("V", V, self.n), ("W", W, self.p)):
            if value is None and gain is None:
                raise MissingParameterError(f"{owner}: {name} ({size}, {size}) is needed for the Riccati gain")
            if value is not None:
                self.declare_psd(name, value, size, learned=gain is None)
        if gain is None or isinstance(gain, nn.Module):
            self.gain = gain
        else:
            self.declare("gain", gain, Domain((self.n, self.p)))
            self.check_dimensions("gain", 2)
        for name, module in (("features", features), ("correction", correction)):
            if module is not None:
                require_that(owner, name, FUNCTION, module)
        self.features, self.correction = features, correction

    @property
    def n(self) -> int:
        """Number of states."""
        raise NotImplementedError

    @property
    def p(self) -> int:
        """Number of observations, after the features."""
        raise NotImplementedError

    @property
    def recursive(self) -> bool:
        """True: x is a sequence."""
        return True

    def transition(self, z: Tensor, s: Tensor | None = None) -> Tensor:
        """Predicted next state `(B, n)` from z `(B, n)` and input s."""
        raise NotImplementedError

    def measure(self, z: Tensor) -> Tensor:
        """Predicted observation `(B, p)`."""
        raise NotImplementedError

    def linear_transition(self, z: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor]:
        """`transition`, and its Jacobian `(n, n)` or `(B, n, n)`."""
        raise NotImplementedError

    def linear_measure(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """`measure`, and its Jacobian `(p, n)` or `(B, p, n)`."""
        raise NotImplementedError

    def start_covariance(self, covariance: Tensor | None, batch: int) -> Tensor:
        """The covariance before the first observation, float64."""
        if covariance is None:
            return self.default_covariance()
        covariance = as_floating("covariance", covariance, f"{type(self).__name__}: argument")
        if tuple(covariance.shape) not in {(self.n, self.n), (batch, self.n, self.n)}:
            shapes = f"({self.n}, {self.n}) or ({batch}, {self.n}, {self.n})"
            raise ShapeError(f"covariance must be {shapes}, got {tuple(covariance.shape)}")
        refuse_not_finite("covariance", covariance)
        covariance = covariance.double()
        check_psd("covariance", (covariance + covariance.mT) / 2)
        return covariance

    def default_covariance(self) -> Tensor:
        """The covariance before the first observation where none is given."""
        raise NotImplementedError

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
        the first observation, before it; by default zero and `default_covariance()`.
        """
        return self._filtered(*self._sequence(x, inputs, state), covariance)

    def moments(
        self,
        x: Tensor,
        inputs: Tensor | None = None,
        state: Tensor | None = None,
        covariance: Tensor | None = None,
    ) -> Moments:
        """Means with gains and covariances; arguments as in `forward`. Those of an own gain are read from it.

        Reading takes W and an observation matrix of full column rank: see `covariances_of_gain`.
        """
        return self._moments(*self._sequence(x, inputs, state), covariance)

    def start(self, x: Any, state: Tensor | None = None, covariance: Tensor | None = None) -> Belief:
        """The belief before the first observation; x `(B, ...)` gives the batch; zero state by default."""
        y = self._features(self._observed(x)).values
        return self._start(self._start_state(state, y), covariance)

    def decide(self, x: Any, memory: Belief | None = None) -> tuple[Tensor, Belief]:
        """Filtered mean `(B, n)` after x `(B, p)`; a tuple (x, s) predicts the next state with input s `(B, m)`."""
        first = self._observed(x)
        belief = self.start(first) if memory is None else kept(self, memory, Belief)
        y = self._features(first)
        s = x[1] if isinstance(x, tuple) and len(x) > 1 else None
        if s is not None:
            self._accept(s)
            s = as_floating("s", s, f"{type(self).__name__}: input").to(y.values.dtype)
            if s.ndim != 2 or len(s) != len(first) or s.shape[1] != (self._inputs or s.shape[1]):
                raise ShapeError(f"s must have shape ({len(first)}, {self._inputs or 'm'}), got {tuple(s.shape)}")
        update, belief = self._step(belief, y, s, self._covariances(y.ratios))
        return update.decision, belief

    def _observed(self, x: Any) -> Tensor:
        """The observations of one time, the first part of a tuple."""
        parts = as_tuple(x)
        return as_floating("x", parts[0] if parts else None, f"{type(self).__name__}: context")

    def _accept(self, inputs: Tensor | None) -> None:
        """Refuse inputs that the model has no place for."""

    def _start(self, prior: Tensor, covariance: Tensor | None) -> Belief:
        return Belief(prior, self.start_covariance(covariance, len(prior)) if self.gain is None else None)

    def _noise(self, ratios: Tensor | None) -> Tensor:
        """W, or the covariances `(..., p, p)` with relative variances `(..., p)`; float64."""
        if ratios is None:
            return self.W.double()
        root = ratios.double().sqrt()
        return root[..., None] * self.W.double() * root[..., None, :]

    def _covariances(self, ratios: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """V, and W or one `(..., p, p)` per relative variances, float64; None with an own gain, which needs neither."""
        return None if self.gain is not None else (self.V.double(), self._noise(ratios))

    def _step(
        self,
        belief: Belief,
        seen: Observations,
        s: Tensor | None,
        noise: tuple[Tensor, Tensor] | None,
        last: bool = False,
    ) -> tuple[Update, Belief]:
        """The update by the observation of one time, and the belief after input s; no prediction after the last.

        noise: `_covariances` at this time.
        """
        y = seen.values
        posterior = covariance = signals = kept = corrected = None
        riccati = noise is not None
        predicted, C = self.linear_measure(belief.prior) if riccati else (self.measure(belief.prior), None)
        observed = ~torch.isnan(y)
        innovation = torch.where(observed, y - predicted, 0.0)
        if isinstance(self.gain, nn.Module) or self.correction is not None:
            signals = _signals(belief, predicted + innovation, predicted)
        if isinstance(self.gain, nn.Module):
            L, kept = self.gain(signals, belief.gain)
        elif noise is None:
            L = self.gain
        else:
            P = self.start_covariance(None, len(y)) if belief.covariance is None else belief.covariance
            mask = None if bool(observed.all()) else observed
            L, posterior = kalman_update(P, C.double(), noise[1], mask)  # pyright: ignore[reportOptionalMemberAccess]
        mean = decision = belief.prior + torch.einsum("...np,...p->...n", L.to(y.dtype), innovation)
        if self.correction is not None:
            change, corrected = self.correction(signals, mean, belief.correction)
            decision = mean + change.to(mean.dtype)
        if last:
            prior = mean
        elif posterior is None or noise is None:
            prior = self.transition(mean, s)
        else:
            prior, A = self.linear_transition(mean, s)
            A = A.double()
            covariance = A @ posterior @ A.mT + noise[0]
        if signals is not None:
            signals = signals._replace(mean=mean, mean_before=signals.mean)
        return Update(decision, L, posterior), Belief(prior, covariance, signals, kept, corrected)

    def _updates(self, y: Observations, drive: Tensor | None, belief: Belief) -> tuple[list[Update], list[Belief]]:
        """All updates of a sequence, and the belief before each."""
        updates, beliefs, steps = [], [], y.values.shape[1]
        noise = self._covariances(y.ratios)
        for t in range(steps):
            s = None if drive is None or t >= drive.shape[1] else drive[:, t]
            now = noise if noise is None or y.ratios is None else (noise[0], noise[1][:, t])
            beliefs.append(belief)
            update, belief = self._step(belief, y.at(t), s, now, last=t == steps - 1)
            updates.append(update)
        return updates, beliefs

    def _filtered(self, seen: Observations, drive: Tensor | None, prior: Tensor, covariance: Tensor | None) -> Tensor:
        """Means `(B, T, n)` step by step."""
        updates, _ = self._updates(seen, drive, self._start(prior, covariance))
        return torch.stack([update.decision for update in updates], 1)

    def _moments(self, seen: Observations, drive: Tensor | None, prior: Tensor, covariance: Tensor | None) -> Moments:
        """Means, gains and covariances step by step; those of an own gain are read from it."""
        updates, beliefs = self._updates(seen, drive, self._start(prior, covariance))

        def every(matrices: list[Any]) -> Tensor:
            return torch.stack([matrix.double().expand(len(seen.values), -1, -1) for matrix in matrices], 1)

        mean = torch.stack([update.decision for update in updates], 1)
        L = every([update.gain for update in updates])
        if self.gain is None:
            priors, posteriors = [b.covariance for b in beliefs], [update.posterior for update in updates]
            return Moments(mean, FilterGains(L, every(priors), every(posteriors)))
        if "W" not in self._declared:
            raise OptionError("moments: covariances are read from an own gain and W; give the filter W")
        with torch.no_grad():
            priors = torch.cat([belief.prior for belief in beliefs])
            C = self.linear_measure(priors)[1].double()
        C = C.unflatten(0, (len(beliefs), -1)).transpose(0, 1) if C.ndim == 3 else C
        return Moments(mean, covariances_of_gain(L, C, self._noise(seen.ratios)))

    def _start_state(self, state: Tensor | None, y: Tensor) -> Tensor:
        return start_state(type(self).__name__, state, y, self.n)

    def _features(self, x: Tensor) -> Observations:
        """Observations `(B, p)` of one time, NaN where missing."""
        ratios = None
        if self.features is not None:
            rows = torch.isnan(x).reshape(len(x), x[:1].numel() if len(x) else 1).any(-1)
            y = self.features(torch.nan_to_num(x, nan=0.0))
            y, ratios = y if isinstance(y, tuple) else (y, None)
            x = torch.where(rows.reshape(-1, *[1] * (y.ndim - 1)), torch.nan, y)
        if x.ndim != 2 or x.shape[-1] != self.p:
            what = "features(x)" if self.features is not None else "x"
            raise ShapeError(f"{what} must have {self.p} entries per time, as C has rows; got {tuple(x.shape)}")
        if ratios is not None:
            _check_ratios(ratios, x)
        return Observations(x, ratios)

    def _sequence(
        self, x: Tensor, inputs: Tensor | None, state: Tensor | None
    ) -> tuple[Observations, Tensor | None, Tensor]:
        """Observations `(B, T, p)`, inputs `(B, T - 1, m)` or None, and the first prior `(B, n)`; all checked."""
        x = as_floating("x", x, f"{type(self).__name__}: context")
        if x.ndim < 2 or x.shape[1] == 0 or (self.features is None and x.ndim != 3):
            raise ShapeError(f"x must have shape (B, T, {self.p}) with T > 0, got {tuple(x.shape)}")
        batch, steps = x.shape[:2]
        seen = self._features(x.flatten(0, 1))
        y = seen.values.unflatten(0, (batch, steps))
        seen = Observations(y, None if seen.ratios is None else seen.ratios.unflatten(0, (batch, steps)))
        infinite = torch.isinf(y)
        if bool(infinite.any()):
            i, t, _ = torch.nonzero(infinite)[0].tolist()
            raise DomainError(f"x is infinite in batch element {i} at time {t}; mark missing observations by NaN")
        prior = self._start_state(state, y)
        if inputs is None:
            return seen, None, prior
        self._accept(inputs)
        inputs = as_floating("inputs", inputs, f"{type(self).__name__}: argument")
        m = self._inputs or (inputs.shape[-1] if inputs.ndim else 1)
        if tuple(inputs.shape) not in {(batch, steps, m), (batch, steps - 1, m)}:
            raise ShapeError(f"inputs must have shape ({batch}, {steps}, {m}), got {tuple(inputs.shape)}")
        refuse_not_finite("inputs", inputs)
        return seen, inputs[:, : steps - 1].to(y.dtype), prior

    @property
    def _inputs(self) -> int | None:
        """Number of inputs, None where the model does not say."""
        return None


def covariances_of_gain(L: Tensor, C: Tensor, W: Tensor) -> FilterGains:
    """Covariances that make L `(..., n, p)` the Kalman gain of C `(..., p, n)` and W `(p, p)`, float64.

    A Kalman gain is L = P C' W^-1 with P the covariance after the observation, so that P = L W C (C'C)^-1, of
    which the symmetric part is taken, and (I - L C) prior = P; Klein and others, Uncertainty in data-driven
    Kalman filtering (2022). C must have full column rank, or the observations say nothing about some states.

    >>> one = torch.ones(1, 1, dtype=torch.float64)
    >>> covariances_of_gain(0.5 * one, one, 2 * one).prior
    tensor([[2.]], dtype=torch.float64)
    """
    p, n = C.shape[-2:]
    if p < n or bool((torch.linalg.matrix_rank(C.detach()) < n).any()):
        raise OptionError(
            f"moments: C ({p}, {n}) must have full column rank for covariances to be read from a gain; "
            "use the Riccati gain, or observe every state"
        )
    P = L @ W @ torch.linalg.pinv(C).mT
    P = (P + P.mT) / 2
    eye = torch.eye(n, dtype=L.dtype, device=L.device)
    prior = torch.linalg.solve(eye - L @ C, P)
    return FilterGains(L, (prior + prior.mT) / 2, P)


def _signals(belief: Belief, y: Tensor, predicted: Tensor) -> GainSignals:
    """What a module sees now, from what it saw last (whose means are already those after it)."""
    prior, last = belief.prior, belief.signals
    if last is None:
        return GainSignals(y, y, predicted, prior, prior, prior, prior)
    return GainSignals(y, last.observation, predicted, prior, last.prior, last.mean, last.mean_before)


def _check_ratios(ratios: Tensor, y: Tensor) -> None:
    if ratios.shape != y.shape:
        raise ShapeError(
            f"features(x) gave relative variances {tuple(ratios.shape)} for observations {tuple(y.shape)}; "
            "they must have the same shape"
        )
    bad = ~((ratios.detach() > 0) & torch.isfinite(ratios.detach()))
    if bool(bad.any()):
        where = tuple(torch.nonzero(bad)[0].tolist())
        raise DomainError(
            f"relative variances of features(x) must be positive and finite, got {float(ratios[where]):.4g} at index "
            f"{where}; let the network end in exp or softplus"
        )
