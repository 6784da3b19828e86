"""The pendulum in pictures: the pictures' geometry, the motion, sizes of the rules, what the filter does with doubt."""

import math

import pytest
import torch

from convexlearn.errors import OptionError
from convexlearn.evaluate import evaluate
from convexlearn.objectives import mean_squared_error
from convexlearn.problems import find, pendulum_tracking, tracking
from convexlearn.problems import pendulum_pictures as pictures
from convexlearn.problems.catalogue import Budget, Result
from convexlearn.problems.fitting import best_of, gradient
from convexlearn.problems.pendulum_rules import (
    AngleNetwork,
    AngleOnly,
    Differences,
    FeaturesFilter,
    RecurrentPictures,
    TrueAngles,
)
from convexlearn.problems.pendulum_tracking import STEP, Setting, angle_error, state_error
from convexlearn.report import Estimate, Record
from convexlearn.simulate.base import Trajectory
from convexlearn.simulate.pairs import Pairs

SMALL = Setting(sequences=8, tests=30, length=12)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_bob_is_where_the_angle_says():
    angles = torch.tensor([-0.8, 0.0, 0.5], dtype=torch.float64)
    light = pictures.render(angles)
    places = (torch.arange(pictures.SIDE, dtype=torch.float64) + 0.5) * 2 / pictures.SIDE - 1
    brightest = light.flatten(1).argmax(1)
    x, y = places[brightest % pictures.SIDE], places[brightest // pictures.SIDE]
    torch.testing.assert_close(x, pictures.ROD * angles.sin(), rtol=0, atol=2 / pictures.SIDE)
    torch.testing.assert_close(y, pictures.PIVOT + pictures.ROD * angles.cos(), rtol=0, atol=2 / pictures.SIDE)


def test_small_swings_have_the_frequency_and_lose_speed():
    step = 1e-3
    z, path = torch.tensor([[0.01, 0.0]], dtype=torch.float64), []
    for _ in range(round(2 * math.pi / pictures.FREQUENCY / step)):
        z = pictures.swing(z, 0.0, step)
        path.append(z)
    period = 2 * math.pi / pictures.FREQUENCY
    assert float(z[0, 0]) == pytest.approx(0.01 * math.exp(-pictures.FRICTION * period / 2), rel=0.01)
    small = torch.tensor([[1e-4, 2e-4]], dtype=torch.float64)
    torch.testing.assert_close(
        pictures.swing(small, 0.0, STEP), small @ pictures.linear_model(STEP).mT, rtol=1e-6, atol=1e-10
    )


def test_the_camera_hides_and_adds_noise():
    dark = pictures.Camera(noise=1e-9, hidden=1.0).shoot(torch.zeros(50, 4, dtype=torch.float64), generator())
    lit = pictures.Camera(noise=1e-9, hidden=0.0).shoot(torch.zeros(50, 4, dtype=torch.float64), generator())
    changed = (dark - lit).abs() > 1e-6
    torch.testing.assert_close(dark[changed], torch.zeros_like(dark[changed]), rtol=0, atol=1e-6)
    assert 0.05 < changed.double().mean() < 0.25
    noisy = pictures.Camera(noise=0.3, hidden=0.0).shoot(torch.zeros(50, 4, dtype=torch.float64), generator())
    assert float((noisy - lit).std()) == pytest.approx(0.3, rel=0.02)


def test_pictures_fade_for_several_steps():
    """Levels and steps of the walk as published, read from its stretched shares."""
    share = pictures.visibility(400, 60, 0.2, generator())
    assert bool((share[:, : pictures.CLEAR] == 1).all())
    rest = share[:, pictures.CLEAR :]
    between = (rest[:, 1:] > 0) & (rest[:, 1:] < 1) & (rest[:, :-1] > 0) & (rest[:, :-1] < 1)
    steps = rest.diff(dim=1)[between].abs()
    assert 0.35 < float(steps.max()) <= 0.4  # 0.2, stretched from an interval of at least 0.5 to one of 1
    dark = (rest == 0).double()
    assert 0.1 < float(dark.mean()) < 0.3
    stays = (dark[:, 1:] * dark[:, :-1]).sum() / dark[:, :-1].sum()
    assert float(stays) > 0.7
    torch.testing.assert_close(
        pictures.visibility(3, 60, 0.2, generator(1)), pictures.visibility(3, 60, 0.2, generator(1))
    )


def test_a_faded_picture_is_scene_and_uniform_noise_in_shares(monkeypatch):
    share = torch.linspace(0, 0.9, 20, dtype=torch.float64).expand(50, 20)
    monkeypatch.setattr(pictures, "visibility", lambda *args: share)
    angles = torch.full((50, 20), 0.3, dtype=torch.float64)
    faded, clean = (pictures.Camera(noise=1e-9, fading=change).shoot(angles, generator()) for change in (0.2, 0.0))
    noise = (faded - share[..., None, None] * clean) / (1 - share)[..., None, None]
    assert -1e-5 < float(noise.min()) < 0.01
    assert 0.99 < float(noise.max()) < 1 + 1e-5
    assert float(noise.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(noise.std()) == pytest.approx(1 / math.sqrt(12), rel=0.01)


def test_both_rules_have_the_same_size():
    sizes = [
        sum(p.numel() for p in rule.parameters())
        for rule in (FeaturesFilter(AngleNetwork(0), STEP, 0.1, 0.1), RecurrentPictures(0))
    ]
    assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[1]


def test_told_the_angles_only_the_speed_is_in_doubt():
    pairs = Setting(tests=30).draw(30, generator())
    told = Pairs((torch.as_tensor(pairs.s)[..., :1],), pairs.s)
    found = evaluate(TrueAngles(STEP, 0.1), told, {"state": state_error, "angle": angle_error})
    assert found["angle"].mean < 1e-6
    assert 1e-5 < found["state"].mean < 0.02


def test_errors_are_means_of_squares_in_radians():
    s = torch.zeros(2, 3, 2)
    t = Trajectory(s, s, target=torch.tensor([0.3, 0.5 * pictures.FREQUENCY]).expand(2, 3, 2))
    torch.testing.assert_close(state_error(t), torch.full((2,), (0.09 + 0.25) / 2))
    torch.testing.assert_close(angle_error(t), torch.full((2,), 0.09))


@pytest.mark.parametrize("doubtful", [False, True])
def test_calibration_keeps_the_means_and_sets_the_size_of_the_covariances(doubtful):
    pairs = SMALL.draw(20, generator())
    network = AngleNetwork(0)
    rule = FeaturesFilter(network if doubtful else AngleOnly(network), STEP, SMALL.push, 0.1)
    before = rule(*pairs.x).detach()
    rule.calibrate(pairs)
    torch.testing.assert_close(rule(*pairs.x), before, rtol=1e-4, atol=1e-5)
    moments = rule.moments(*pairs.x)
    error = (pairs.s - moments.mean).double().detach()
    P = moments.gains.posterior.detach().expand(20, -1, -1, -1)
    size = (error * torch.linalg.solve(P, error[..., None])[..., 0]).sum(-1).mean()
    assert float(size) == pytest.approx(2, rel=1e-3)


def test_a_short_fit_leaves_the_features_better_than_rest():
    setting = Setting(sequences=20, tests=40, length=12, noise=0.1, fading=0.0)
    train, test = setting.draw(20, generator(1)), setting.draw(40, generator(2))
    rule = FeaturesFilter(AngleNetwork(0), STEP, setting.push, 0.1)
    gradient(train, state_error, steps=40, learning_rate=1e-2)(rule, Budget())
    rest = state_error(Trajectory(test.x, 0 * test.s, target=test.s)).mean()
    assert evaluate(rule, test, state_error).mean < 0.5 * float(rest)
    rule.calibrate(train)
    assert 0.7 < float(tracking.coverage(rule, test).mean()) < 1  # pyright: ignore[reportArgumentType]


def test_differences_are_speeds():
    pairs = SMALL.draw(3, generator())
    network = AngleNetwork(0)
    s = Differences(network, STEP)(*pairs.x)
    angle = network(pairs.x[0][:, 4])[0]
    torch.testing.assert_close(s[:, 4, :1], angle)
    torch.testing.assert_close(s[:, 4, 1:], (angle - network(pairs.x[0][:, 3])[0]) / STEP)


def test_the_best_of_several_fits_is_kept():
    x = torch.linspace(-1, 1, 16)[:, None]
    pairs, rule = Pairs(x, 3 * x), torch.nn.Linear(1, 1)
    start = rule.weight.item()

    def at(rate):
        return gradient(pairs, mean_squared_error, steps=20, learning_rate=rate, validation=pairs)

    choice = best_of({"slow": at(1e-4), "fast": at(0.3)})(rule, Budget())
    assert choice.chosen == "fast"
    assert abs(rule.weight.item() - 3) < abs(start - 3)
    assert mean_squared_error(pairs(rule)).mean().item() == pytest.approx(choice.history.best["value"])
    again = torch.nn.Linear(1, 1)
    assert best_of({"fast": at(0.3), "slow": at(1e-4)})(again, Budget()).chosen == "fast"


def test_wrong_options_are_refused():
    with pytest.raises(OptionError, match="push and noise positive"):
        Setting(noise=0.0)
    with pytest.raises(OptionError, match="hidden, light and fading are shares"):
        find("pendulum-tracking").configure(hidden=2.0)


def test_misses_name_what_is_missing(monkeypatch):
    entry = find("pendulum-tracking")
    found = {
        name: Record(name, {"state": Estimate(error, 1e-4)})
        for name, error in (("features + Kalman", 0.005), ("RNN", 0.006), ("features alone", 0.05))
    }
    study = entry.build(0, SMALL)

    def missed(advantage, share, alone):
        rows = {**found, "features alone": Record("features alone", {"state": Estimate(alone, 1e-4)})}
        monkeypatch.setattr(pendulum_tracking, "advantage", lambda result: advantage)
        monkeypatch.setattr(pendulum_tracking, "covers", lambda result: {"features + Kalman": Estimate(share, 0.01)})
        return entry.reference.misses(Result(entry, study, 0, tuple(rows.values())))

    assert missed(Estimate(3e-4, 1e-4), 0.95, 0.05) == []
    for values, text in (
        ((Estimate(1e-4, 1e-4), 0.95, 0.05), "not above zero by two standard errors"),
        ((Estimate(-3e-4, 1e-4), 0.95, 0.05), "is -0.0003 ± 0.0001"),
        ((Estimate(1e-3, 1e-4), 0.85, 0.05), "cover 85.0%"),
        ((Estimate(1e-3, 1e-4), 0.95, 0.004), "features alone are no worse"),
    ):
        (sentence,) = missed(*values)
        assert text in sentence
