"""The deblurring study: its model against CVXPY, its camera, its split of photographs, one small run."""

import cvxpy as cp
import numpy as np
import pytest
import torch

import convexlearn as cl
from convexlearn.errors import OptionError
from convexlearn.evaluate import evaluate
from convexlearn.problems import deblurring, images
from convexlearn.problems import plug_and_play_deblurring as study
from convexlearn.problems.deblurring import Camera, NoisyPatches, relative_error

SIDE = 10


def window(seed=0, side=SIDE):
    return torch.rand(1, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_camera_convolves_round_the_circle():
    s = window()
    x = Camera(1.6, 0.0, SIDE).shoot(s, torch.Generator()).x
    weights = torch.exp(-torch.arange(-4.0, 5.0, dtype=torch.float64).square() / (2 * 1.6**2))
    kernel = torch.outer(weights, weights) / weights.sum() ** 2
    expected = sum(kernel[i + 4, j + 4] * s.roll((-i, -j), (1, 2)) for i in range(-4, 5) for j in range(-4, 5))
    torch.testing.assert_close(x, expected.float())


def test_the_isotropic_variation_is_that_of_cvxpy():
    problem, _ = study.declare(SIDE, 1.6)
    (s,), rho = problem.variables(), next(p for p in problem.parameters() if p.name() == "rho")
    s.value, rho.value = window()[0].numpy(), 1.0
    next(p for p in problem.parameters() if p.name() == "x").value = window(1)[0].numpy()
    C = deblurring.blurring(SIDE, 1.6).toarray()
    fit = 0.5 * np.square(window(1)[0].numpy() - C @ s.value @ C.T).sum()
    assert problem.objective.value - fit == pytest.approx(cp.tv(s).value)


@pytest.mark.parametrize("isotropic", [True, False])
def test_the_tuned_model_is_solved_as_by_cvxpy(isotropic):
    problem, parts = study.declare(SIDE, 1.6, isotropic)
    x, s = window(1), problem.variables()[0]
    rule = cl.Converged(cl.ADMM(parts, penalty=0.05), tol=1e-8, learn=["rho"])
    rule.rho = 0.02
    found = rule(x).detach()[0]
    next(p for p in problem.parameters() if p.name() == "rho").value = 0.02
    next(p for p in problem.parameters() if p.name() == "x").value = x[0].numpy()
    s.value = found.numpy()
    reached = problem.objective.value
    problem.solve(solver="CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    assert reached == pytest.approx(problem.objective.value, abs=1e-6)


def test_no_test_photograph_is_used_in_training():
    assert len(images.TEST) >= 8
    assert not set(images.TEST) & {*deblurring.TRAIN, *images.VALIDATION}
    held_out = [deblurring.photograph(name) for name in images.TEST]
    for name in deblurring.TRAIN:  # nor is it another one under a new name, as PyWavelets' camera
        photo = deblurring.photograph(name)
        assert photo.min() >= 0
        assert photo.max() <= 1 + 1e-12
        for other in held_out:
            if photo.shape == other.shape:
                assert torch.corrcoef(torch.stack([photo.flatten(), other.flatten()]))[0, 1] < 0.9


def test_noisy_patches_have_the_level_that_they_tell():
    patches = NoisyPatches(torch.full((3, 40, 40), 0.5))
    trajectory = patches(lambda x, sigma: x, 64, torch.Generator().manual_seed(0))
    sigma = trajectory.context[1]
    assert sigma.min() >= deblurring.NOISE_LEVELS[0]
    assert sigma.max() <= deblurring.NOISE_LEVELS[1]
    error = relative_error(trajectory)  # of the patch itself: 1 with a relative spread of sqrt(2/1600)
    assert (error - 1).abs().max() < 5 * (2 / 1600) ** 0.5
    again = patches(lambda x, sigma: x, 64, torch.Generator().manual_seed(0))
    assert torch.equal(trajectory.decision, again.decision)


def test_search_takes_the_best_combination_on_the_watched_pictures():
    setting = study.Setting(side=18, layers=1, iterations=1, gradient_steps=1)
    data = study.draw(0, setting)
    rule = study.build(0, setting).contenders["PnP-ADMM"].rule
    found = study.search(data, sigma=[0.01, 0.02], penalty=[0.001, 0.1])(rule, study.Budget())
    assert len(found.means) == 4
    assert [rule.sigma.item(), rule.penalty.item()] == pytest.approx(found.best)
    assert evaluate(rule, data.watched, study.psnr(1.0)).mean == pytest.approx(max(found.means.values()), abs=1e-4)


def test_rules_that_continue_start_at_the_trained_denoiser():
    contenders = study.build(0, study.Setting(side=18, layers=2, iterations=2, gradient_steps=2)).contenders
    source, further = contenders["PnP-ADMM"].rule, contenders["PnP-ADMM, 2 trained"].rule
    with torch.no_grad():
        source.prox.layers[-1].bias.fill_(0.5)
    study.plugged(source, lambda rule, budget: None, "penalty", "sigma")(further, study.Budget())
    x = window(side=18).float()
    torch.testing.assert_close(further(x), source(x))
    assert sum(p.requires_grad for p in source.prox.parameters()) == 0
    assert all(p.requires_grad for p in further.prox.parameters())


def test_pictures_must_fit_the_photographs():
    with pytest.raises(OptionError, match="side must lie between 18 and 150 pixels, got 151"):
        study.Setting(side=151)
