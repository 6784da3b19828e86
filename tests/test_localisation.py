"""What the localisation problems share: optics against convolution, matching against brute force, measures by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from contracts import SimulatorContract

from convexlearn.errors import OptionError
from convexlearn.problems.localisation import (
    FACTOR,
    MEASURES,
    REACH,
    TOLERANCE,
    Optics,
    Scenes,
    draw_image,
    f1,
    match,
    peaks,
    precision,
    recall,
    rmse,
    spread,
    spread_error,
)
from convexlearn.simulate.base import Trajectory


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def correlate(s, kernel):
    """Correlation with the kernel, zeros around s, kept at every fourth pixel."""
    padding = tuple((size - FACTOR) // 2 for size in kernel.shape)
    return torch.nn.functional.conv2d(s.unsqueeze(1), kernel[None, None], stride=FACTOR, padding=padding)[:, 0]


@pytest.mark.parametrize("widths", [(2.4, 3.6), (2.8, 2.8), (0.9, 5.0)])
def test_the_two_axes_are_the_convolution_kept_at_every_fourth_pixel(widths):
    optics = Optics(widths, 6)
    s = torch.randn(3, 24, 24, generator=generator(), dtype=torch.float64)
    V, H = optics.axes()
    torch.testing.assert_close(V @ s @ H.mT, correlate(s, optics.kernel()), rtol=0, atol=1e-13)


def test_a_rendered_point_is_what_the_model_says_up_to_where_it_is_cut_off():
    optics = Optics((2.4, 3.6), 6)
    places = torch.tensor([[[5.0, 9.0], [0.0, 20.0]]], dtype=torch.float64)
    amplitudes = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    V, H = optics.axes()
    x, s = optics.render(places, amplitudes), draw_image(24, places, amplitudes)
    torch.testing.assert_close(x, V @ s @ H.mT, rtol=0, atol=3 * math.exp(-(REACH**2) / 2))


def test_a_point_at_the_centre_of_a_pixel_shows_there_as_one():
    x = Optics((2.0, 3.0), 4).render(torch.tensor([[[5.5, 9.5]]]), torch.ones(1, 1))
    assert x[0, 1, 2] == 1.0
    torch.testing.assert_close(x[0, 1, 3], torch.tensor(math.exp(-16 / 18)))
    torch.testing.assert_close(x[0, 2, 2], torch.tensor(math.exp(-16 / 8)))


def test_squared_optics_are_those_of_variances():
    places = torch.rand(1, 1, 2, generator=generator()) * 20
    optics = Optics((3.0, 4.0), 6)
    torch.testing.assert_close(
        optics.squared().render(places, torch.ones(1, 1)), optics.render(places, torch.ones(1, 1)).square()
    )


def test_jitter_stretches_the_width():
    places, one = torch.rand(1, 1, 2, generator=generator()) * 20, torch.ones(1, 1)
    torch.testing.assert_close(
        Optics((2.0, 3.0), 6).render(places, one, 1.3 * one), Optics((2.0, 3.0), 6).widened(1.3).render(places, one)
    )


def test_bad_optics_are_refused():
    with pytest.raises(OptionError, match="widths and pixels must be positive"):
        Optics((0.0, 1.0), 4)


def test_images_hold_the_amplitudes_in_the_nearest_pixels():
    image = draw_image(4, torch.tensor([[[0.6, 2.4], [1.4, 1.6], [3.4, -0.4]]]), torch.tensor([[1.0, 2.0, 4.0]]))
    assert image.sum() == 7.0
    assert image[0, 1, 2] == 3.0
    assert image[0, 3, 0] == 4.0


def test_peaks_are_local_maxima():
    s = torch.randn(2, 9, 11, generator=generator())
    found = peaks(s, 0.3)
    for b, i, j in itertools.product(range(2), range(9), range(11)):
        window = s[b, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
        value = s[b, i, j]
        assert found[b, i, j] == (value if value >= 0.3 and value == window.max() else 0.0)


@pytest.mark.parametrize("seed", range(20))
def test_matching_finds_most_pairs_and_among_these_the_nearest(seed):
    rng = np.random.default_rng(seed)
    found, true = rng.uniform(0, 4, (rng.integers(1, 5), 2)), rng.uniform(0, 4, (rng.integers(1, 5), 2))
    small, large = sorted((found, true), key=len)
    best = (0, 0.0)
    for chosen in itertools.permutations(range(len(large)), len(small)):
        lengths = np.linalg.norm(small - large[list(chosen)], axis=1)
        near = lengths[lengths <= 1.5]
        best = max(best, (len(near), -float((near**2).sum())))
    distances = match(found, true, 1.5)
    assert len(distances) == best[0]
    assert (distances**2).sum() == pytest.approx(-best[1])


def test_matching_without_points_pairs_nothing():
    assert len(match(np.zeros((0, 2)), np.ones((3, 2)), 1.0)) == 0


def test_measures_on_a_case_by_hand():
    decision, target = torch.zeros(4, 8, 8), torch.zeros(4, 8, 8)
    decision[0, 1, 1], decision[0, 5, 5], decision[0, 0, 7] = 1.0, 0.1, 2.0  # two of three found, one a pixel off
    target[0, 1, 1], target[0, 5, 6], target[0, 7, 0], target[0, 7, 7] = 1.0, 1.0, 1.0, 1.0
    decision[1, 2, 2] = 1.0  # nothing there
    target[2, 2, 2] = 1.0  # not found
    t = Trajectory(torch.zeros(4, 1), decision, target=target)
    assert precision(t).tolist() == [2 / 3, 0.0, 1.0, 1.0]
    assert recall(t).tolist() == [0.5, 1.0, 0.0, 1.0]
    assert f1(t).tolist() == pytest.approx([4 / 7, 0.0, 0.0, 1.0])
    assert rmse(t).tolist() == pytest.approx([math.sqrt(0.5), TOLERANCE, TOLERANCE, TOLERANCE])
    assert all(m(Trajectory(torch.zeros(1, 1), target[:1], target=target[:1])).item() == 1.0 for m in (f1, recall))
    assert set(MEASURES) == {"f1", "precision", "recall", "rmse"}


def test_two_found_points_cannot_share_a_true_one():
    decision, target = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    decision[0, 1, 0] = decision[0, 1, 2] = target[0, 1, 1] = 1.0
    assert precision(Trajectory(torch.zeros(1, 1), decision, target=target)).item() == 0.5


def test_blur_keeps_the_sum_and_has_its_width():
    s = torch.zeros(1, 21, 21, dtype=torch.float64)
    s[0, 10, 10] = 2.0
    blurred = spread(s, 1.5)
    offsets = torch.arange(21, dtype=torch.float64) - 10
    assert blurred.sum().item() == pytest.approx(2.0)
    assert (blurred[0].sum(1) * offsets**2).sum().item() / 2 == pytest.approx(1.5**2, rel=0.05)
    t = Trajectory(torch.zeros(1, 1), s, target=torch.zeros_like(s))
    assert spread_error(t).item() == pytest.approx(spread(s).square().sum().item())


class TestScenes(SimulatorContract):
    class Dots(Scenes):
        def draw(self, count, generator):
            s = torch.rand(count, 8, 8, generator=generator)
            return s[:, ::FACTOR, ::FACTOR], s

    @pytest.fixture
    def simulator(self):
        return self.Dots()

    @pytest.fixture
    def rule(self):
        class Enlarge(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.factor = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

            def forward(self, x):
                return self.factor * x.repeat_interleave(FACTOR, 1).repeat_interleave(FACTOR, 2)

        return Enlarge()
