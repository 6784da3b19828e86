"""The catalogue's tracking problems: exact errors, data, windows, coverage, and what a fit in a small setting does."""

import math

import numpy as np
import pytest
import torch

from benchmarks.lorenz_filters import flow, particle, unscented
from convexlearn.errors import OptionError
from convexlearn.objectives import mean_squared_error
from convexlearn.problems import find, linear_tracking, lorenz_tracking, tracking
from convexlearn.problems.catalogue import Budget, Result
from convexlearn.report import Estimate, Record
from convexlearn.rules.kalman import KalmanFilter
from convexlearn.simulate.pairs import Pairs

LINEAR = {"sequences": 100, "tests": 50}
LORENZ = {"trajectories": 2, "length": 60, "train": 2}


def decibel(value):
    return 10 * math.log10(value)


def test_the_exact_errors_are_the_published_ones():
    assert decibel(linear_tracking.Setting().bound(20)) == pytest.approx(-21.968, abs=1e-3)
    long = linear_tracking.Setting(observation=1.0, horizon=100)
    assert decibel(long.bound(100)) == pytest.approx(-7.322, abs=0.06)  # the published one is a simulation


def test_the_mismatched_filter_is_as_bad_as_published():
    """H rotated by 10 degrees, r^2 = 1, q^2 = 0.01, T = 100: 1.347 dB in a published simulation."""
    study = find("linear-tracking").build(0, linear_tracking.Setting(observation=1.0, horizon=100))
    rule = study.contenders["Kalman filter, wrong H"].rule
    error = mean_squared_error(study.test(rule))
    found = tracking.decibels(Estimate(error.mean().item(), error.std().item() / math.sqrt(len(error))))
    assert abs(found.mean - 1.347) < 3 * math.sqrt(2) * found.standard_error


def test_windows_start_at_the_true_state_before():
    z = torch.arange(10.0).reshape(1, 10, 1)
    pairs = tracking.windows(torch.full((1, 1), -1.0), z, 10 * z, 4)
    assert pairs.s[..., 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert torch.equal(pairs.x[0], 10 * pairs.s)
    assert pairs.x[1].flatten().tolist() == [-1, 3]


def test_regions_of_the_right_model_hold_95_percent():
    setting = linear_tracking.Setting(tests=400)
    study = find("linear-tracking").build(0, setting)
    shares = tracking.coverage(study.contenders["Kalman filter"].rule, study.test)
    assert abs(float(shares.mean()) - 0.95) < 4 * float(shares.std()) / math.sqrt(len(shares))
    timid = linear_tracking.I * setting.process
    rule = tracking.Started(KalmanFilter(linear_tracking.F, None, linear_tracking.I, timid / 100, timid / 100))
    assert float(tracking.coverage(rule, study.test).mean()) < 0.1


def test_a_short_fit_of_the_gain_comes_near_the_kalman_filter():
    study = find("linear-tracking").build(0, linear_tracking.Setting(**LINEAR))
    rule = study.contenders["KalmanNet"].rule
    exact = mean_squared_error(study.test(study.contenders["Kalman filter"].rule)).mean().item()
    before = mean_squared_error(study.test(rule)).mean().item()
    study.contenders["KalmanNet"].fit(rule, Budget(steps=40))
    after = mean_squared_error(study.test(rule)).mean().item()
    assert exact < after < before
    assert decibel(after / exact) < 0.5 * decibel(before / exact)


def test_truth_of_the_lorenz_problem_follows_the_flow():
    before, z, x = lorenz_tracking.draw(3, 5, torch.Generator().manual_seed(0))
    accurate = lorenz_tracking.Flow(substeps=200)
    torch.testing.assert_close(accurate(before), z[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(accurate(z[:, 2]), z[:, 3], rtol=0, atol=1e-5)
    assert 0.3 < float((x - z).square().mean()) < 2


def test_peers_use_the_model_of_the_filters():
    z = 10 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = lorenz_tracking.Flow(method="taylor", order=5)(z)
    np.testing.assert_allclose(flow(z.numpy()), own.numpy(), rtol=1e-12)


def test_peers_track():
    before, z, x = lorenz_tracking.draw(1, 200, torch.Generator().manual_seed(1))
    for peer in (unscented, particle):
        error = np.square(peer(x[0].numpy(), before[0].numpy()) - z[0].numpy()).mean()
        assert -7.5 < decibel(error) < -3.5


def result(entry, study, decibels):
    rows = tuple(
        Record(name, {m: Estimate(10 ** (v / 10), 1e-6) for m, v in e.items()}) for name, e in decibels.items()
    )
    return Result(entry, study, 0, rows)


def test_misses_name_what_is_missing():
    entry = find("linear-tracking")
    study = entry.build(0, entry.configure(**LINEAR))
    exact = {m: decibel(b) for m, b in study.bounds.items()}
    good = {
        "Kalman filter": exact,
        "KalmanNet": {m: v + 0.05 for m, v in exact.items()},
        "Kalman filter, wrong H": dict.fromkeys(exact, -10.0),
        "KalmanNet, wrong H": dict.fromkeys(exact, -20.0),
    }
    assert linear_tracking.misses(result(entry, study, good)) == []
    for name, value, text in (
        ("Kalman filter", -21.0, "the Kalman filter has"),
        ("KalmanNet", -21.0, "above the Kalman filter on 10 T"),
        ("KalmanNet, wrong H", -19.0, "recovers 75% of the gap"),
    ):
        found = linear_tracking.misses(result(entry, study, good | {name: dict.fromkeys(exact, value)}))
        assert any(text in miss for miss in found), found
    entry = find("lorenz-tracking")
    good = {"EKF": {"mse": -6.3}, "KalmanNet": {"mse": -10.0}, "EKF, RK4, tuned": {"mse": -17.0}}
    assert lorenz_tracking.misses(result(entry, study, good)) == []
    found = lorenz_tracking.misses(result(entry, study, good | {"KalmanNet": {"mse": -9.0}}))
    assert found == ["KalmanNet has -9.00 ± 0.00 dB, expected between -inf and -9.5"]


def test_wrong_options_are_refused():
    with pytest.raises(OptionError, match="process and observation positive"):
        linear_tracking.Setting(process=0.0)
    with pytest.raises(OptionError, match="a length of at least 60"):
        lorenz_tracking.Setting(length=10)


def test_a_recurrent_network_starts_from_the_given_state():
    rule = tracking.Recurrent(3, 3, 4)
    x, z = torch.zeros(2, 5, 3, dtype=torch.float64), torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    s = rule(x, z.double())
    assert s.shape == (2, 5, 3)
    assert s.dtype == torch.float64
    assert not torch.equal(s[0], s[1])
    assert torch.isfinite(torch.as_tensor(Pairs((x, z.double()), x)(rule).decision)).all()
