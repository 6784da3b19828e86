"""Clutter removal: the simulator's physics, the rules, the pictures' tiling."""

import math

import pytest
import torch

from convexlearn.iterations.robust_pca import RobustPCA
from convexlearn.problems import ultrasound_clutter as clutter
from convexlearn.problems.catalogue import Budget
from convexlearn.problems.ultrasound_clutter_figures import cut, join
from convexlearn.problems.ultrasound_movies import DENSITY, PIXEL, WIDTHS, Movies
from convexlearn.rules.iterative import Unfolded
from convexlearn.simulate.base import Trajectory

SMALL = clutter.Setting(pixels=8, frames=6, kernel=3, iterations=4, tests=3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_simulator_draws_new_movies_and_marks_failures():
    scanner = clutter.Scanner(Movies(pixels=8, frames=6))

    def rule(D):
        lost = torch.arange(len(D))[:, None, None] == 1
        return D, torch.where(lost, torch.nan, D)

    trajectory = scanner(rule, 3, generator())
    assert trajectory.failed.tolist() == [False, True, False]
    assert torch.equal(trajectory.context, scanner(rule, 3, generator()).context)
    assert not torch.equal(trajectory.context, scanner(rule, 3, generator(1)).context)


def test_movies_add_up_and_have_largest_modulus_one():
    movies = Movies(noise=0.0)
    D, (L, S) = movies.draw(3, generator())
    assert D.shape == (3, 1024, 20)
    torch.testing.assert_close(D, L + S)
    largest = torch.stack([part.abs().amax((1, 2)) for part in (D, L, S)]).amax(0)
    torch.testing.assert_close(largest, torch.ones(3))


def test_a_movie_s_parts_have_the_declared_power():
    movies = Movies(noise=0.3)
    D, (L, S) = movies.draw(200, generator())
    noise, tissue, blood = ((p.abs().square().mean((1, 2))) for p in (D - L - S, L, S))
    scale = tissue / movies.tissue**2  # tissue fills the field evenly on average, up to its envelopes
    assert (noise / scale).median().item() == pytest.approx(0.3**2, rel=0.35)
    spot = 4 / math.pi * math.pi * WIDTHS[0] * WIDTHS[1]  # mean square amplitude times the area of a squared spot
    expected = DENSITY / 2 * (PIXEL / 10) ** 2 * spot
    assert (blood.mean() / scale.mean()).item() == pytest.approx(expected, rel=0.35)


def test_bubbles_have_the_shape_of_the_point_spread_function():
    S = Movies(pixels=64, frames=2).draw_bubbles(200, generator())
    spectrum = torch.fft.fft2(S).abs().square().mean((0, 1))  # of white positions: that of the spot
    frequency = torch.fft.fftfreq(64)
    decay = (spectrum[4, 0] / spectrum[0, 4]).item()
    expected = math.exp(-((2 * math.pi * frequency[4].item()) ** 2) * (WIDTHS[0] ** 2 - WIDTHS[1] ** 2))
    assert decay == pytest.approx(expected, rel=0.15)


def test_tissue_has_low_rank_and_rank_one_without_motion():
    values = [torch.linalg.svdvals(Movies(motion=m).draw(8, generator())[1][0]) for m in (0.0, 0.5)]
    ratios = [(s[:, 1:] / s[:, :1]).mean(0) for s in values]
    assert ratios[0].max() < 1e-5
    assert ratios[1][0] > 0.02
    assert ratios[1][6] < 0.01


def test_the_same_generator_gives_the_same_movies():
    first, second, other = (Movies(pixels=8).draw(2, generator(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_error_levels_are_those_of_the_published_set_up():
    D, truth = Movies().draw(300, generator())
    zero = torch.zeros_like(D)
    levels = [((zero, zero), 263e-4), ((D, zero), 30e-4), (clutter.SingularValueFilter(1)(D), 19e-4)]
    for guess, level in levels:
        found = clutter.error(Trajectory(D, guess, target=torch.stack(truth, 1)))
        assert found.mean() == pytest.approx(level, rel=0.15)


def test_errors_by_hand():
    D = torch.zeros(1, 2, 2, dtype=torch.complex128)
    target = torch.stack([torch.full_like(D, 1j), torch.full_like(D, 2.0)], 1)
    trajectory = Trajectory(D, (D, D), target=target)
    assert clutter.blood_error(trajectory).tolist() == [4.0]
    assert clutter.error(trajectory).tolist() == [2.5]


def test_the_filter_keeps_the_best_approximation_of_its_rank():
    D = torch.randn(2, 9, 4, generator=generator(), dtype=torch.complex128)
    rule = clutter.SingularValueFilter()
    rule.rank = 2
    L, S = rule(D)
    torch.testing.assert_close(L + S, D)
    s = torch.linalg.svdvals(D)
    torch.testing.assert_close(torch.linalg.svdvals(S)[:, :2], s[:, 2:])
    assert rule.state_dict()["rank"].item() == 2.0


def test_the_network_starts_as_nothing_removed_and_splits_d():
    D, _ = Movies(pixels=8, frames=6).draw(2, generator())
    rule = clutter.FrameNetwork(6)
    L, S = rule(D)
    assert S.abs().max() == 0
    torch.testing.assert_close(L, D)
    torch.nn.init.normal_(rule.last.weight, generator=generator())
    L, S = rule(D)
    torch.testing.assert_close(L + S, D)
    assert S.imag.abs().max() > 0


def test_the_unfolded_network_starts_as_robust_pca():
    _, parts = clutter.declare(8, 6, grouped=False)
    net = clutter.unfolded(parts, 4, SMALL)
    plain = RobustPCA(
        parts,
        step=1.0,
        threshold=list(clutter.THRESHOLDS),
        low_rank_prox="relative_nuclear",
        sparse_prox="relative_power",
    )
    D = Movies(pixels=8, frames=6).draw(2, generator())[0].to(torch.complex128)
    for found, expected in zip(net(D), Unfolded(plain, 4)(D)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_search_moves_to_better_weights():
    study = clutter.build(0, SMALL)
    rule = study.contenders["FISTA"].rule
    trace = study.contenders["FISTA"].fit(rule, Budget())  # pyright: ignore
    best = min(trace, key=lambda record: record["error"])
    assert best["error"] < trace[0]["error"]
    assert rule.low_rank.item() == pytest.approx(best["low_rank"], rel=1e-5)
    assert rule.sparse.item() == pytest.approx(best["sparse"], rel=1e-5)
    assert len(study.contenders["FISTA"].fit(rule, Budget(steps=2))) == 2  # pyright: ignore


def test_tiles_are_put_back():
    movie = torch.randn(1, 144, 5, generator=generator(), dtype=torch.complex64)
    pieces = cut(movie, 4)
    assert pieces.shape == (9, 16, 5)
    image = movie.reshape(12, 12, 5)
    torch.testing.assert_close(pieces[5].reshape(4, 4, 5), image[4:8, 8:12])
    torch.testing.assert_close(join(pieces, 4), movie)


def test_layers_that_follow_a_stage_pass_on_what_it_has_learned():
    _, parts = clutter.declare(8, 6, grouped=False)
    rule, start = (clutter.unfolded(parts, 3, SMALL).float() for _ in range(2))
    stages = [clutter.Stage(depth=2, pixels=6, steps=3, rate=1e-2)]
    clutter.staged(Movies(pixels=8, frames=6), SMALL, stages)(rule, Budget())
    first, _, third = rule.W1  # pyright: ignore
    assert not torch.equal(first.weight, start.W1[0].weight)  # pyright: ignore
    assert third.weight.abs().max() == 0
    torch.testing.assert_close(rule.threshold[2].tolist(), list(clutter.IDLE), rtol=1e-5, atol=0)
    rule.threshold = torch.cat([rule.threshold[:2].detach(), torch.full((1, 2), 1e-6)])
    D = Movies(pixels=8, frames=6).draw(2, generator())[0]
    for found, expected in zip(rule(D), rule.truncated(2)(D)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
