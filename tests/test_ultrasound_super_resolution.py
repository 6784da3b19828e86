"""Bubbles in vessels: counts, places and movies are as stated."""

import pytest
import torch

from convexlearn.errors import OptionError
from convexlearn.problems import find
from convexlearn.problems.ultrasound_super_resolution import MISMATCH, WIDTHS, Setting, flow, scenes, vessels


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_map_shows_vessels_on_both_sides():
    mask = vessels()
    assert mask.shape == (705, 705)
    for half in (mask[:, :352], mask[:, 352:]):
        assert 0.02 < half.double().mean() < 0.15
    assert not mask[0].any()


def test_bubbles_lie_in_vessels_and_have_the_stated_number_and_size():
    setting = Setting(fewest=2, most=5)
    train = scenes(setting)[0]
    x, s = train.draw(64, generator())
    fields = train.fields(64, generator())  # the first thing that draw draws
    assert x.shape == (64, 12, 12)
    assert not s[~fields].any()
    counts = (s > 0).sum((1, 2))
    assert counts.min() >= 1
    assert counts.max() == 5
    assert s[s > 0].min() >= 0.5
    assert s.max() <= 1.5


def test_without_noise_and_jitter_the_picture_is_the_model_within_half_a_pixel():
    """A bubble away from its pixel's centre by (a, b) changes the picture by at most |a| max|g'| + |b| max|h'|."""
    bubbles = scenes(Setting(noise=0.0, jitter=0.0, most=6))[1]
    x, s = bubbles.draw(32, generator())
    V, H = (axis.float() for axis in bubbles.optics.axes())
    steepest = sum(0.5 * 0.61 / width for width in WIDTHS)
    assert (x - V @ s @ H.mT).abs().max() < 6 * 1.5 * (steepest + 0.003)
    assert (x - V @ s @ H.mT).abs().mean() < 0.1 * x.mean()


def test_noise_has_its_deviation():
    places, amplitudes = torch.full((400, 1, 2), 20.0), torch.zeros(400, 1)
    x = scenes(Setting(noise=0.2))[0].expose(places, amplitudes, generator())
    assert x.std().item() == pytest.approx(0.2, rel=0.02)


def test_the_mismatched_scenes_are_the_same_bubbles_seen_wider():
    setting = Setting(tests=4)
    study = find("ultrasound-super-resolution").build(0, setting)
    wide = study.simulators["f1_wide"]
    assert torch.equal(wide.s, study.test.s)
    assert wide.x.sum() / study.test.x.sum() == pytest.approx(MISMATCH**2, rel=0.1)


def test_flow_follows_a_straight_vessel():
    field = torch.zeros(40, 40, dtype=torch.bool)
    field[18:22] = True
    direction, nearest = flow(field)
    assert direction[19:21, 10:30, 1].abs().min() > 0.99
    assert nearest[0, 7].tolist() == [18.0, 7.0]


def test_bubbles_of_a_movie_stay_in_the_field_and_move_on():
    bubbles = scenes(Setting(noise=0.0))[1]
    x, s = bubbles.movie(30, generator())
    assert x.shape == (30, 12, 12)
    assert ((s > 0).sum((1, 2)) <= 7).all()
    assert ((s > 0).sum((1, 2)) >= 4).all()
    field = max(bubbles.fields(64, generator()), key=lambda window: float(window.sum()))
    assert not s.sum(0)[~field].any()
    assert (s[1:] != s[:-1]).flatten(1).any(1).all()


def test_bad_settings_are_refused():
    with pytest.raises(OptionError, match="fewest <= most"):
        Setting(fewest=5, most=4)
    with pytest.raises(OptionError, match="8 <= pixels"):
        Setting(pixels=4)
