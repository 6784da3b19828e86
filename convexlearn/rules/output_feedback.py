"""Control from observations: a filter estimates the state, and any policy of the state acts on the estimate."""

from typing import Any, NamedTuple

from torch import Tensor

from convexlearn.errors import OptionError
from convexlearn.rules.base import DecisionRule, as_rule, as_tuple, kept
from convexlearn.rules.kalman import Belief, KalmanFilter


class EstimateMemory(NamedTuple):
    """The filter's belief before the next observation, and the policy's memory, None before its first decision."""

    belief: Belief
    policy: Any = None
    step: int = 0


class OutputFeedback(DecisionRule):
    """s_t = policy(z_t) with z_t filtered from the observations up to t (Examples 8 and 13; MPC from observations).

    estimator: a KalmanFilter with B, also one with an own gain or features. policy: a rule of the state `(B, n)`,
    for instance from `mpc` or `adp`, or of the state and further contexts. Observations x `(B, T, p)`, NaN where
    missing, and the further contexts `(B, T, ...)` -> s `(B, T, m)`. The filter predicts with the input that the
    policy has chosen. Both parts are tuned where `requires_grad` says so. With LQR as the policy this is LQG.

    >>> import torch
    >>> from convexlearn.rules.policies import mpc
    >>> one = torch.ones(1, 1)
    >>> limited = mpc(one, one, one, 2 * one, 3, input_limit=0.1)
    >>> rule = OutputFeedback(KalmanFilter(one, one, one, one, 2 * one), limited)
    >>> rule(torch.tensor([[[2.0], [torch.nan], [0.0]]])).flatten().detach()
    tensor([-0.1000, -0.1000, -0.1000])
    """

    def __init__(self, estimator: KalmanFilter, policy: Any) -> None:
        super().__init__()
        if not isinstance(estimator, KalmanFilter):
            raise OptionError(f"OutputFeedback: estimator must be a KalmanFilter, got {type(estimator).__name__}")
        if "B" not in estimator._declared:
            raise OptionError("OutputFeedback: the policy's inputs move the state; build the KalmanFilter with B")
        self.estimator, self.policy = estimator, as_rule(policy)

    @property
    def recursive(self) -> bool:
        """True: x is a sequence."""
        return True

    def start(self, x: Any, state: Tensor | None = None, covariance: Tensor | None = None) -> EstimateMemory:
        """The filter's belief before the first observation; state and covariance as in `KalmanFilter.start`."""
        return EstimateMemory(self.estimator.start(x, state, covariance))

    def decide(self, x: Any, memory: EstimateMemory | None = None) -> tuple[Tensor, EstimateMemory]:
        """s `(B, m)` after the observation x `(B, p)`, or a tuple of it and further contexts of the policy."""
        memory = self.start(x) if memory is None else kept(self, memory, EstimateMemory)
        observation, *rest = as_tuple(x)
        mean, belief = self.estimator.decide(observation, memory.belief)
        context = (mean, *rest) if rest else mean
        inner = memory.policy if memory.step else self.policy.start(context)
        s, inner = self.policy.decide(context, inner)
        belief = belief._replace(prior=self.estimator.transition(mean, s))
        return s, EstimateMemory(belief, inner, memory.step + 1)
