import numpy as np
import pytest
import torch
from contracts import RuleContract

from convexlearn.errors import OptionError, ShapeError
from convexlearn.objectives import cost
from convexlearn.riccati import dare, lqr_gain
from convexlearn.rules.kalman import KalmanFilter
from convexlearn.rules.lqg import LQG, LQR
from convexlearn.rules.output_feedback import OutputFeedback
from convexlearn.rules.policies import adp, mpc
from convexlearn.simulate.closed_loop import ClosedLoop
from convexlearn.simulate.plants import LinearGaussian, random_linear
from convexlearn.tune import tune

n, m, p = 4, 2, 2
A, B = random_linear(0, n, m)
EYE, SMALL = torch.eye(n, dtype=torch.float64), torch.eye(m, dtype=torch.float64)
C, V, W = EYE[:p], 0.25 * EYE, 0.1 * EYE[:p, :p]


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def observer(**options):
    return KalmanFilter(A, B, C, V, W, **options)


def loop_of(plant, horizon, **options):
    given = {"initial": plant.initial, "noise": plant.noise, "observe": plant.observe, "stage_cost": plant.stage_cost}
    return ClosedLoop(plant, horizon, **given | options)


class TestWithADP(RuleContract):
    tolerance = 1e-9

    @pytest.fixture
    def rule(self):
        root = torch.linalg.cholesky(dare(A, B, EYE, SMALL)).mT
        return OutputFeedback(observer(), adp(A, B, SMALL, root, limit=0.3))

    @pytest.fixture
    def context(self):
        return randn(1, 3, 5, p)


class TestWithForecast(TestWithADP):
    @pytest.fixture
    def rule(self):
        return OutputFeedback(observer(gain=0.5 * C.mT), mpc(A, B, EYE, SMALL, 2, forecast=EYE, learn=("Q",)))

    @pytest.fixture
    def context(self):
        return randn(1, 3, 4, p), randn(2, 3, 4, 2, n)


@pytest.mark.parametrize("gaps", [False, True])
def test_with_lqr_it_is_lqg(gaps):
    x = randn(1, 3, 12, p)
    if gaps:
        x[1, 4:7], x[2, 3, 0] = torch.nan, torch.nan
    ours = OutputFeedback(observer(), LQR(A, B, EYE, SMALL))(x)
    theirs = LQG(A, B, C, EYE, SMALL, V, W)(x)
    if gaps:  # the filter's covariance grows over a gap, LQG's gain is stationary
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-9)
        assert (ours[1] - theirs[1]).abs().max() > 1e-3
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_equals_the_equations():
    """A limited policy on the estimate, step by step in numpy; a gap of two steps."""
    K, limit = lqr_gain(A, B, EYE, SMALL).numpy(), 0.2
    rule = OutputFeedback(observer(), lambda z: (-z @ torch.tensor(K).mT).clamp(-limit, limit))
    x = randn(3, 1, 9, p)
    x[0, 3:5] = torch.nan
    a, b, c = A.numpy(), B.numpy(), C.numpy()
    P = dare(A.mT, C.mT, V, W).numpy()
    prior, expected = np.zeros(n), []
    for y in x[0].numpy():
        mean, after = prior, P
        if not np.isnan(y).any():
            L = P @ c.T @ np.linalg.inv(c @ P @ c.T + W.numpy())
            mean, after = prior + L @ (y - c @ prior), P - L @ c @ P
        expected.append(np.clip(-K @ mean, -limit, limit))
        prior, P = a @ mean + b @ expected[-1], a @ after @ a.T + V.numpy()
    np.testing.assert_allclose(rule(x)[0].detach(), expected, atol=1e-9)


def test_filter_and_policy_are_tuned_together():
    """From a W a hundred times too large; both parts move, and the cost falls."""
    plant = LinearGaussian(A, B, V=V, C=C, W=W, limit=0.5)
    wrong = KalmanFilter(A, B, C, V, 100 * W).freeze("V")
    root = torch.linalg.cholesky(dare(A, B, EYE, SMALL)).mT
    rule, loop = OutputFeedback(wrong, adp(A, B, SMALL, root, limit=0.5)), loop_of(plant, 15)
    before = {name: value.clone() for name, value in rule.state_dict().items()}
    history = tune(rule, loop, cost, steps=12, learning_rate=0.1, batch_size=12, progress=False, validation=loop)
    assert history.best["value"] < 0.98 * history.start
    assert all(not torch.equal(before[name], value) for name, value in rule.state_dict().items())


def test_mistakes_are_named():
    with pytest.raises(OptionError, match="inputs move the state; build the KalmanFilter with B"):
        OutputFeedback(KalmanFilter(A, None, C, V, W), LQR(A, B, EYE, SMALL))
    with pytest.raises(TypeError, match="estimator must be a KalmanFilter, got LQR"):
        OutputFeedback(LQR(A, B, EYE, SMALL), LQR(A, B, EYE, SMALL))
    with pytest.raises(ShapeError, match="x must have 2 entries per time"):
        OutputFeedback(observer(), LQR(A, B, EYE, SMALL)).decide(randn(0, 3, 3))
