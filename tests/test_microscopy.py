"""Blinking emitters: the variance of a long stack is the squared function's; LSPARCOM's shrinkage by its formula."""

import math

import numpy as np
import pytest
import torch

from convexlearn.errors import OptionError
from convexlearn.problems.localisation import Optics
from convexlearn.problems.microscopy import Emitters, Setting, SmoothThreshold


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def emitters(**options):
    setting = Setting(pixels=8, **options)
    return Emitters(Optics((4.0, 4.0), 8), setting)


def test_the_variance_of_a_long_stack_is_the_sum_of_variances_by_the_squared_function():
    scene = emitters(frames=40_000, duty=0.3, noise=0.2)
    places, deviations = torch.tensor([[[10.0, 12.0], [14.0, 17.5]]]), torch.tensor([[1.0, 0.7]])
    x = scene.correlate(scene.stack(places, deviations, generator()))
    expected = scene.optics.squared().render(places, deviations.square())
    error = math.sqrt(2 / 40_000) * 1.2 * 5  # five standard errors of a variance near one
    torch.testing.assert_close(x, expected, rtol=0, atol=error)


def test_emitters_lie_on_the_field_at_their_spacing():
    scene = emitters(spacing=4.0)
    places, deviations = scene.emitters(300, generator())
    shining = deviations > 0
    assert ((places > -0.51) & (places < 31.5)).all()
    assert deviations[shining].square().min() >= 0.5
    assert deviations.square().max() <= 1.5
    curves = scene.filaments(600, generator(1))
    inside = ((curves > -0.5) & (curves < 31.5)).all(-1).float().sum(1).mean()
    assert shining.sum(1).float().mean().item() == pytest.approx(2 * inside.item() / 4.0, rel=0.1)


def test_filaments_advance_by_one_pixel():
    steps = emitters().filaments(5, generator()).diff(dim=1).norm(dim=-1)
    torch.testing.assert_close(steps, torch.ones_like(steps), rtol=0, atol=1e-4)


def test_the_truth_holds_the_variances():
    x, s = emitters().draw(6, generator())
    _, deviations = emitters().emitters(6, generator())
    torch.testing.assert_close(s.sum((1, 2)), deviations.square().sum(1))
    assert x.shape == (6, 8, 8)


def test_the_smooth_threshold_is_its_formula():
    v = torch.randn(2, 20, 20, generator=generator(), dtype=torch.float64)
    with torch.no_grad():
        found = SmoothThreshold(level=0.2, slope=10.0).double()(v)
    for picture, result in zip(v.numpy(), found.numpy()):
        ordered = np.sort(picture.ravel())
        low, high = ordered[3], ordered[-4]  # the 4th of 400 from either end
        theta, tau = low + 0.2 * (high - low), 10.0 / (high - low)
        expected = np.maximum(picture, 0) / (1 + np.exp(-tau * (np.abs(picture) - theta)))
        np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_bad_settings_are_refused():
    with pytest.raises(OptionError, match="two frames"):
        Setting(frames=1)
    with pytest.raises(OptionError, match="spacing > 0"):
        Setting(spacing=0.0)
