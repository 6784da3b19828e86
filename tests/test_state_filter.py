import pytest
import torch
from torch import nn

from convexlearn.errors import DomainError, NonFiniteError, OptionError, ShapeError
from convexlearn.gain_networks import RecurrentGain
from convexlearn.objectives import mean_squared_error
from convexlearn.riccati import kalman_recursion
from convexlearn.rules.extended_kalman import ExtendedKalmanFilter
from convexlearn.rules.kalman import KalmanFilter
from convexlearn.rules.state_filter import covariances_of_gain
from convexlearn.simulate.pairs import Pairs
from convexlearn.tune import NonFiniteWarning, tune

A = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
C = torch.tensor([[1.0, 0.5], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
V = torch.tensor([[0.5, 0.1], [0.1, 0.3]], dtype=torch.float64)
W = torch.diag(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_covariances_are_read_back_from_riccati_gains():
    gains = kalman_recursion(A, C, V, W, torch.eye(2).double(), horizon=6)
    found = covariances_of_gain(gains.gain, C, W)
    torch.testing.assert_close(found.posterior, gains.posterior, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.prior, gains.prior, rtol=1e-10, atol=1e-10)


def test_moments_of_an_own_gain():
    L = kalman_recursion(A, C, V, W, V, horizon=40)
    rule = KalmanFilter(A, None, C, None, W, gain=L.gain[-1])
    x = randn(0, 2, 4, 3)
    moments = rule.moments(x)
    torch.testing.assert_close(moments.mean, rule(x))
    torch.testing.assert_close(moments.gains.posterior, L.posterior[-1].expand(2, 4, 2, 2), rtol=1e-6, atol=1e-8)
    network = KalmanFilter(A, None, C, None, W, gain=RecurrentGain(2, 3))
    assert network.moments(x).gains.prior.shape == (2, 4, 2, 2)
    with pytest.raises(OptionError, match="give the filter W"):
        KalmanFilter(A, None, C, gain=L.gain[-1]).moments(x)
    with pytest.raises(OptionError, match=r"C \(1, 2\) must have full column rank"):
        KalmanFilter(A, None, C[:1], None, W[:1, :1], gain=L.gain[-1][:, :1]).moments(x[..., :1])


def test_a_correction_adds_to_the_decision_and_leaves_the_filter_alone():
    x = randn(0, 3, 5, 3)

    def corrected(signals, mean, memory):
        torch.testing.assert_close(signals.predicted, signals.prior @ C.mT)
        t = 0 if memory is None else memory
        return torch.full_like(mean, t), t + 1

    alone = KalmanFilter(A, None, C, V, W)
    found = KalmanFilter(A, None, C, V, W, correction=corrected)(x) - alone(x)
    torch.testing.assert_close(found, torch.arange(5.0).double()[None, :, None].expand(3, 5, 2))


class Poisoned(nn.Module):
    """A gain that turns NaN in training after three sequences of ten."""

    def __init__(self):
        super().__init__()
        self.gain = RecurrentGain(2, 2)
        self.calls = 0

    def forward(self, signals, memory):
        L, memory = self.gain(signals, memory)
        self.calls += 1
        return (L * float("nan") if self.calls > 3 * 10 else L), memory


def test_training_of_a_recurrent_gain_survives_a_nan():
    """Three good steps, then NaN: the weights whose loss and gradient were last known to be good come back."""
    x, z = randn(0, 8, 10, 2), randn(1, 8, 10, 2)
    eye = torch.eye(2, dtype=torch.float64)
    healthy, rule = (KalmanFilter(A, None, eye, gain=gain) for gain in (RecurrentGain(2, 2), Poisoned()))
    with pytest.warns(NonFiniteWarning, match=r"step 3: all decisions became NaN or infinite while tuning gain"):
        history = tune(rule, Pairs(x, z), mean_squared_error, steps=10, batch_size=4, progress=False)
    assert len(history) == 3
    assert history.stopped.startswith("step 3")
    tune(healthy, Pairs(x, z), mean_squared_error, steps=2, batch_size=4, progress=False)
    kept = dict(healthy.gain.named_parameters())
    assert all(torch.equal(value, kept[name]) for name, value in rule.gain.gain.named_parameters())


def test_a_gain_that_blows_up_is_named():
    """A far too large gain overflows: at the first step that is an error, which names the parameters."""
    x, z = randn(0, 2, 400, 2), randn(1, 2, 400, 2)
    eye = torch.eye(2, dtype=torch.float64)
    rule = KalmanFilter(A, None, eye, gain=RecurrentGain(2, 2, start=1e3 * torch.eye(2)))
    with pytest.raises(NonFiniteError, match=r"tune, step 0: .* gain"):
        tune(rule, Pairs(x, z), mean_squared_error, steps=1, progress=False)


class Doubtful(nn.Module):
    """Observations and their relative variances side by side: x `(B, 2 p)`."""

    def forward(self, x):
        return tuple(x.chunk(2, -1))


def conditional(y, ratios, start):
    """Mean and covariance of the last state given all y `(T, p)`, from the joint normal distribution."""
    T, n = len(y), len(A)
    powers = [torch.linalg.matrix_power(A, t) for t in range(T)]
    P, marginal = torch.zeros(T * n, T * n, dtype=torch.float64), start
    for t in range(T):
        for k in range(T - t):
            block = powers[k] @ marginal
            P[(t + k) * n : (t + k + 1) * n, t * n : (t + 1) * n] = block
            P[t * n : (t + 1) * n, (t + k) * n : (t + k + 1) * n] = block.mT
        marginal = A @ marginal @ A.mT + V
    H = torch.block_diag(*[C] * T)
    noise = torch.block_diag(*(torch.diag(r.sqrt()) @ W @ torch.diag(r.sqrt()) for r in ratios))
    L = torch.linalg.solve(H @ P @ H.mT + noise, H @ P).mT
    return (L @ y.flatten())[-n:], (P - L @ H @ P)[-n:, -n:]


@pytest.mark.parametrize("extended", [False, True])
def test_features_with_variances_give_the_conditional_mean(extended):
    y, r = randn(1, 2, 5, 3), randn(2, 2, 5, 3).exp()
    if extended:
        rule = ExtendedKalmanFilter(lambda z: z @ A.mT, lambda z: z @ C.mT, V, W, features=Doubtful())
    else:
        rule = KalmanFilter(A, None, C, V, W, features=Doubtful())
    x = torch.cat([y, r], -1)
    means, moments = rule(x, covariance=V), rule.moments(x, covariance=V)
    torch.testing.assert_close(moments.mean, means)
    for i in range(2):
        mean, covariance = conditional(y[i], r[i], V)
        torch.testing.assert_close(means[i, -1], mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(moments.gains.posterior[i, -1], covariance, rtol=1e-9, atol=1e-9)
    memory = rule.start(x[:, 0], covariance=V)
    for t in range(5):
        decision, memory = rule.decide(x[:, t], memory)
        torch.testing.assert_close(decision, means[:, t])


def test_variances_of_features_are_differentiated_and_a_missing_sample_stays_missing():
    y, r = randn(3, 1, 4, 3), randn(4, 1, 4, 3).exp().requires_grad_()
    rule = KalmanFilter(A, None, C, V, W, features=Doubtful()).freeze()
    assert torch.autograd.gradcheck(lambda r: rule(torch.cat([y, r], -1)), (r,))
    gap = y.clone()
    gap[0, 1] = torch.nan
    torch.testing.assert_close(
        rule(torch.cat([gap, torch.ones_like(r)], -1)), KalmanFilter(A, None, C, V, W)(gap), rtol=1e-10, atol=1e-10
    )


def test_variances_of_features_must_be_positive_and_of_the_right_shape():
    rule, x = KalmanFilter(A, None, C, V, W, features=Doubtful()), torch.ones(2, 3, 6, dtype=torch.float64)
    x[1, 2, 4] = -1
    with pytest.raises(DomainError, match=r"relative variances of features\(x\) must be positive.*-1 at index \(5, 1"):
        rule(x)
    with pytest.raises(ShapeError, match=r"relative variances \(6, 2\) for observations \(6, 3\)"):
        KalmanFilter(A, None, C, V, W, features=lambda x: (x[:, :3], x[:, :2].exp()))(x)
