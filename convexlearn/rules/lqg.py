"""LQR and LQG control: the optimal rules of a linear Gaussian plant with quadratic cost."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from convexlearn.checks import checked, count, shown
from convexlearn.errors import DomainError, OptionError, ShapeError
from convexlearn.inputs import as_contexts, as_tensor, start_state
from convexlearn.riccati import (
    check_psd,
    dlyap,
    filter_covariance,
    filter_gain,
    kalman_recursion,
    lqr_gain,
    lqr_recursion,
)
from convexlearn.rules.base import DecisionRule, kept
from convexlearn.rules.kalman import declare_model


class FeedbackMemory(NamedTuple):
    """Memory of LQR in a loop: -K' `(1 or T, n, m)`, computed once, and the number of the step."""

    feedback: Tensor
    step: int = 0


class ControlMemory(NamedTuple):
    """Memory of LQG in a loop: what the first step computed for all, and the state `(B, n)` predicted for the next.

    feedback -K' `(1 or T, n, m)`, filter L' `(1 or T, p, n)`, moved (A - B K)' `(1 or T, n, n)`, observe C' `(n, p)`.
    """

    prior: Tensor
    step: int
    feedback: Tensor
    filter: Tensor
    moved: Tensor
    observe: Tensor


class LQR(DecisionRule):
    """s = -K z with the gain of the infinite horizon, or of a finite one (Eq. 12 of the paper).

    A `(n, n)`, B `(n, m)`, Q `(n, n)` PSD, R `(m, m)` positive definite: objective parameters, fixed until
    `learn("Q", "R")`. With `horizon` T the rule is recursive and has gains K_t for T steps (`terminal`
    weighs the last state, default Q); without, it is static: z `(B, n)` -> s `(B, m)`.

    >>> one = torch.ones(1, 1)
    >>> LQR(one, one, one, 2 * one)(torch.tensor([[2.0]]))
    tensor([[-1.]])
    """

    A: Tensor
    B: Tensor
    Q: Tensor
    R: Tensor

    @checked(horizon=count())
    def __init__(self, A: Any, B: Any, Q: Any, R: Any, *, horizon: int | None = None, terminal: Any = None) -> None:
        super().__init__()
        declare_model(self, {"A": A, "B": B})
        _declare_weights(self, Q, R, horizon, terminal)

    @property
    def recursive(self) -> bool:
        """True with a finite horizon, whose gain depends on time."""
        return self.horizon is not None

    @property
    def control_gain(self) -> Tensor:
        """K `(m, n)`, or `(T, m, n)` with a horizon; differentiable in the learned parameters."""
        return _control_gain(self)

    def average_cost(self, V: Tensor) -> Tensor:
        """Long-run average of z'Qz + s'Rs under process noise of covariance V `(n, n)`: tr(PV) when optimal."""
        _needs_stationary(self)
        A, B, Q, R = (M.double() for M in (self.A, self.B, self.Q, self.R))
        V = _covariance("V", V, A)
        K = self.control_gain.double()
        return _trace(dlyap(A - B @ K, V), Q + K.mT @ R @ K)

    def start(self, x: Tensor) -> FeedbackMemory:
        """The gains, computed once per rollout."""
        x = _state(self, "z", x, len(self.A))
        return FeedbackMemory(-_stacked(self.control_gain).to(x.dtype).mT)

    def decide(self, x: Tensor, memory: FeedbackMemory | None = None) -> tuple[Tensor, FeedbackMemory]:
        """s `(B, m)` for the state x `(B, n)`."""
        memory = self.start(x) if memory is None else kept(self, memory, FeedbackMemory)
        x = _state(self, "z", x, memory.feedback.shape[1])
        t = _position(self, memory.step)
        return x @ memory.feedback[t], memory._replace(step=memory.step + 1)

    def forward(self, *x: Tensor) -> Tensor:
        """s `(B, m)` for the state x `(B, n)`; `(B, T, ...)` with a finite horizon."""
        if self.recursive:
            return super().forward(*x)
        (z,) = as_contexts(type(self).__name__, x, most=1)
        return self.decide(z)[0]


class LQG(DecisionRule):
    """Kalman filter, then state feedback: optimal control from partial observations (Examples 6, 8 and 13).

    z+ = A z + B s + v, x = C z + w, v ~ N(0, V), w ~ N(0, W), cost z'Qz + s'Rs. A rule with memory:
    observations x `(B, T, p)` -> inputs s `(B, T, m)`, each from the observations up to its time:
    z_t = A z_{t-1} + B s_{t-1} + L (x_t - C (A z_{t-1} + B s_{t-1})), s_t = -K z_t (the paper's Eq. 11 drops
    the input from the first prediction). Missing (NaN) entries of x contribute no innovation.

    V `(n, n)` and W `(p, p)` are learned in the PSD cone. L depends on their ratio only, so that one scale
    is free: freeze one, or report ratios. A, B, C, Q, R are fixed until `learn`. horizon: None for the
    stationary gains; T for K_t and L_t of T steps, with `terminal` the weight of the last state (default Q)
    and `covariance` that of the first state before its observation (default: stationary, and then L_t is).

    >>> one = torch.ones(1, 1)
    >>> rule = LQG(one, one, one, one, 2 * one, one, 2 * one)
    >>> rule.control_gain.item(), round(rule.filter_gain.item(), 4)
    (0.5, 0.5)
    """

    A: Tensor
    B: Tensor
    C: Tensor
    Q: Tensor
    R: Tensor
    V: Tensor
    W: Tensor

    @checked(horizon=count())
    def __init__(
        self,
        A: Any,
        B: Any,
        C: Any,
        Q: Any,
        R: Any,
        V: Any,
        W: Any,
        *,
        horizon: int | None = None,
        terminal: Any = None,
        covariance: Any = None,
    ) -> None:
        super().__init__()
        declare_model(self, {"A": A, "B": B, "C": C})
        _declare_weights(self, Q, R, horizon, terminal)
        for name, value, size in (("V", V, len(self.A)), ("W", W, len(self.C))):
            self.declare_psd(name, value, size)
        if covariance is not None:
            _needs_horizon("covariance", horizon)
            self.declare_psd("covariance", covariance, len(self.A), learned=False)

    @property
    def recursive(self) -> bool:
        """True: x is a sequence."""
        return True

    @property
    def control_gain(self) -> Tensor:
        """K `(m, n)`, or `(T, m, n)` with a horizon; differentiable in the learned parameters."""
        return _control_gain(self)

    @property
    def filter_gain(self) -> Tensor:
        """L `(n, p)`, or `(T, n, p)` with a horizon; differentiable in the learned parameters."""
        model = self.A, self.C, self.V, self.W
        if self.horizon is None:
            return filter_gain(*model)
        start = self.value("covariance") if "covariance" in self._declared else filter_covariance(*model)
        return kalman_recursion(*model, start, horizon=self.horizon).gain

    def average_cost(self, V: Any = None, W: Any = None) -> Tensor:
        """Long-run average of z'Qz + s'Rs when the noise truly has covariances V and W (default: the rule's own).

        From the Lyapunov equation of the closed loop in the state and its estimation error, and
        differentiable in the rule: its gradient vanishes where the rule's V, W are the true ones.
        """
        _needs_stationary(self)
        A, B, C, Q, R = (M.double() for M in (self.A, self.B, self.C, self.Q, self.R))
        V = _covariance("V", self.V if V is None else V, A)
        W = _covariance("W", self.W if W is None else W, C)
        K, L = self.control_gain.double(), self.filter_gain.double()
        kept = torch.eye(len(A), dtype=A.dtype, device=A.device) - L @ C
        # filtered mean m and error e = z - m: m+ = (A - B K) m + L y, e+ = kept (A e + v) - L w
        F = torch.cat([torch.cat([A - B @ K, L @ C @ A], 1), torch.cat([torch.zeros_like(A), kept @ A], 1)])
        from_v, from_w = torch.cat([L @ C, kept]), torch.cat([L, -L])
        S = dlyap(F, from_v @ V @ from_v.mT + from_w @ W @ from_w.mT)
        both = torch.cat([torch.eye(len(A), dtype=A.dtype, device=A.device)] * 2, 1)
        mean = S[: len(A), : len(A)]
        return _trace(both @ S @ both.mT, Q) + _trace(K @ mean @ K.mT, R)

    def start(self, x: Tensor, state: Tensor | None = None) -> ControlMemory:
        """The gains, computed once per rollout, and the state `(B, n)` expected before the first observation."""
        A, B, C = self.A, self.B, self.C
        x = _state(self, "x", x, len(C))
        K, L = _stacked(self.control_gain), _stacked(self.filter_gain)
        constants = (M.to(x.dtype).mT for M in (-K, L, A - B @ K, C))
        prior = start_state(type(self).__name__, state, x, len(A))
        return ControlMemory(prior, 0, *constants)

    def decide(self, x: Tensor, memory: ControlMemory | None = None) -> tuple[Tensor, ControlMemory]:
        """s `(B, m)` after the observation x `(B, p)`; the memory predicts the next state with it."""
        memory = self.start(x) if memory is None else kept(self, memory, ControlMemory)
        x = _state(self, "x", x, memory.observe.shape[1])
        t = _position(self, memory.step)
        innovation = torch.addmm(x, memory.prior, memory.observe, alpha=-1)
        missing = torch.isnan(x)
        if bool(missing.any()):
            innovation = torch.where(missing, 0.0, innovation)
        mean = torch.addmm(memory.prior, innovation, memory.filter[t])
        return mean @ memory.feedback[t], memory._replace(prior=mean @ memory.moved[t], step=memory.step + 1)


def _declare_weights(rule: Any, Q: Any, R: Any, horizon: int | None, terminal: Any) -> None:
    n, m = rule.B.shape
    rule.horizon = horizon
    weights = {"Q": (Q, n), "R": (R, m)}
    if terminal is not None:
        _needs_horizon("terminal", horizon)
        weights["terminal"] = (terminal, n)
    for name, (value, size) in weights.items():
        rule.declare_psd(name, value, size, learned=False)


def _control_gain(rule: Any) -> Tensor:
    model = rule.A, rule.B, rule.Q, rule.R
    if rule.horizon is None:
        return lqr_gain(*model)
    terminal = rule.value("terminal") if "terminal" in rule._declared else None
    return lqr_recursion(*model, rule.horizon, terminal=terminal)[0]


def _stacked(gain: Tensor) -> Tensor:
    return gain if gain.ndim == 3 else gain[None]


def _position(rule: Any, step: int) -> int:
    """Where the gains of this step are."""
    if rule.horizon is None:
        return 0
    if step >= rule.horizon:
        raise OptionError(
            f"{type(rule).__name__} was built for horizon={rule.horizon}, but a decision at step {step} was asked for; "
            "build it with the horizon of the simulation"
        )
    return step


def _state(rule: DecisionRule, name: str, x: Any, size: int) -> Tensor:
    """x `(B, size)`, floating: a gain in the dtype of integers would be rounded."""
    if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] != size or x.is_complex():
        shape = tuple(x.shape) if isinstance(x, Tensor) and not x.is_complex() else shown(x)
        got = f"{len(x)} contexts" if isinstance(x, tuple) else shape
        raise ShapeError(f"{type(rule).__name__}: {name} must have shape (B, {size}) per step, got {got}")
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def _needs_horizon(name: str, horizon: int | None) -> None:
    if horizon is None:
        raise OptionError(f"'{name}' has a meaning with a finite horizon only; give horizon=T")


def _needs_stationary(rule: Any) -> None:
    if rule.horizon is not None:
        raise OptionError("average_cost is that of the stationary rule; build it with horizon=None")


def _covariance(name: str, value: Any, like: Tensor) -> Tensor:
    """The covariance in float64; it must be PSD and as large as `like` has rows."""
    M, n = as_tensor(name, value, "average_cost:").to(like.dtype), len(like)
    if tuple(M.shape) != (n, n):
        raise ShapeError(f"average_cost: {name} must have shape ({n}, {n}), got {tuple(M.shape)}")
    if not bool(torch.isfinite(M).all()):
        raise DomainError(f"average_cost: {name} has NaN or infinite entries")
    check_psd(name, (M + M.mT) / 2)
    return M


def _trace(S: Tensor, weight: Tensor) -> Tensor:
    """tr(S weight) for a symmetric weight."""
    return (S * weight).sum()
