"""Denoisers in the prox slot: plug-and-play equals the algorithm with the exact prox, and failures are told."""

import copy
import pickle

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import nn

import convexlearn as cl
from convexlearn.denoisers import Denoiser, DnCNN
from convexlearn.errors import NonFiniteError, OptionError, ShapeError
from convexlearn.objectives import mean_squared_error
from convexlearn.prox import soft_threshold
from tests.iteration_contract import M, N, contexts, lasso

RHO = 0.4  # of `lasso`


class Exact(nn.Module):
    """The prox of t |v|_1 as a denoiser: sigma^2 = t."""

    def forward(self, v, sigma):
        return soft_threshold(v, sigma.square())


class Recorder(nn.Module):
    """With the signature of deepinv's denoisers; remembers the noise levels."""

    def __init__(self):
        super().__init__()
        self.gain, self.seen = nn.Parameter(torch.tensor(0.5)), []

    def forward(self, x, sigma, **kwargs):
        assert x.ndim == 4
        self.seen.append(sigma.detach().clone())
        return self.gain * x


def parts():
    problem, x, s = lasso()
    return cl.split(problem, [x], s)


def pictures(side=4, scale=0.5):
    """1/2 |scale s - x|^2 of images."""
    s, x = cp.Variable((side, side), name="s"), cp.Parameter((side, side), name="x")
    return cl.split(cp.Problem(cp.Minimize(0.5 * cp.sum_squares(scale * s - x))), [x], s)


def noisy(count=3, side=4):
    return torch.rand(count, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("iteration", [cl.ADMM, cl.ISTA, cl.FISTA, cl.PrimalDual])
def test_the_exact_prox_plugged_in_gives_the_algorithm_itself(iteration):
    plain = iteration(parts())
    expected = cl.Unfolded(plain, 40).iterates(contexts())
    plugged = plain.replace(prox=Exact())
    if iteration is cl.PrimalDual:  # K = I in both, so that the steps are alike
        plugged = plugged.replace(step=plain.initial("step"), dual_step=plain.initial("dual_step"))
    found = cl.Unfolded(plugged, 40).iterates(contexts())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    learned = cl.Unfolded(plugged, 40, untie=["sigma"])
    torch.testing.assert_close(learned.iterates(contexts()).detach(), expected, rtol=0, atol=1e-10)
    if iteration is cl.ADMM:
        converged = cl.Converged(plugged, tol=1e-12, learn=[])(contexts())
        torch.testing.assert_close(converged, cl.Converged(plain, tol=1e-12, learn=[])(contexts()), rtol=0, atol=1e-10)


def test_the_gradient_passes_through_the_plugged_in_prox():
    plain, gradients = cl.ADMM(parts()), []
    for iteration in (plain, plain.replace(prox=Exact())):
        net = cl.Unfolded(iteration, 6, learn=["H", "rho"])
        net(contexts()).square().sum().backward()
        gradients.append([net.free["H"].grad, net.free["rho"].grad])
    for plain_one, plugged in zip(*gradients):
        torch.testing.assert_close(plugged, plain_one, rtol=1e-10, atol=1e-12)


def test_a_denoiser_gets_the_level_of_its_iteration():
    iteration, recorder = cl.ADMM(pictures()), Recorder()
    cl.Unfolded(iteration.replace(prox=Denoiser(recorder), sigma=[0.4, 0.2, 0.1]), 5)(noisy())
    assert [s.item() for s in recorder.seen] == pytest.approx([0.4, 0.2, 0.1, 0.1, 0.1])
    recorder.seen.clear()
    net = cl.Unfolded(iteration.replace(prox=Denoiser(recorder), sigma=[0.4, 0.2, 0.1]), 5, untie=["sigma"])
    assert net.sigma.tolist() == pytest.approx([0.4, 0.2, 0.1, 0.1, 0.1])
    net(noisy())
    assert [s.item() for s in recorder.seen] == pytest.approx([0.4, 0.2, 0.1, 0.1, 0.1])
    recorder.seen.clear()
    rule = cl.Converged(iteration.replace(prox=Denoiser(recorder), sigma=[0.4, 0.2, 0.1]), tol=1e-6, learn=[])
    with torch.no_grad():
        result = rule.solve(noisy())
    assert result.iterations.max() == len(recorder.seen)
    assert recorder.seen[0].item() == pytest.approx(0.4)
    assert all(s.item() == pytest.approx(0.1) for s in recorder.seen[2:])


def test_without_a_level_it_follows_from_the_threshold():
    recorder = Recorder()
    cl.Unfolded(cl.ADMM(pictures(), penalty=0.5).replace(prox=Denoiser(recorder)), 1)(noisy())
    cl.Unfolded(cl.ISTA(pictures(), step=0.25).replace(prox=Denoiser(recorder)), 1)(noisy())
    assert [s.item() for s in recorder.seen] == pytest.approx([1.0, 0.5])


def test_a_linear_denoiser_converges_to_its_fixed_point():
    """v = g (s + u), s = v: u = (1 - g)/g v, and the gradient of the fidelity balances 2 penalty u."""
    recorder, penalty, scale = Recorder().double(), 0.3, 0.5
    rule = cl.Converged(cl.ADMM(pictures(scale=scale), penalty=penalty, prox=Denoiser(recorder)), tol=1e-13)
    x = noisy()
    s = rule(x)
    torch.testing.assert_close(s, scale * x / (scale**2 + 2 * penalty * (1 - 0.5) / 0.5), rtol=0, atol=1e-10)
    s.sum().backward()  # the implicit gradient reaches the denoiser's weight g: d/dg of the above
    slope = (scale * x * 2 * penalty / 0.5**2 / (scale**2 + 2 * penalty) ** 2).sum()
    assert recorder.gain.grad.item() == pytest.approx(slope.item(), rel=1e-6)


def test_frozen_or_trained_further():
    data = cl.simulate.Pairs(noisy(8).float(), noisy(8).float())
    for frozen in (True, False):
        denoiser = DnCNN(width=4, depth=3)
        nn.init.normal_(denoiser.layers[-1].weight, generator=torch.Generator().manual_seed(2))
        net = cl.Unfolded(cl.ADMM(pictures()).replace(prox=denoiser, sigma=0.1), 2, untie=["sigma"])
        if frozen:
            net.freeze("prox")
        before = copy.deepcopy(net.prox.state_dict())
        cl.tune(net, data, mean_squared_error, steps=3, progress=False)
        same = all(torch.equal(a, b) for a, b in zip(before.values(), net.prox.state_dict().values()))
        assert same == frozen
        assert not torch.allclose(net.sigma, torch.full((2,), 0.1, dtype=torch.float64))
        counts = net.count_parameters()
        assert (counts[cl.Role.HYPER], counts[cl.Role.NETWORK] == 0) == (2, frozen)
        assert torch.equal(pickle.loads(pickle.dumps(net))(data.x), net(data.x))


def test_a_denoiser_that_returns_another_shape_is_named():
    class Halved(nn.Module):
        def forward(self, x, sigma):
            return x[..., ::2, ::2]

    with pytest.raises(ShapeError, match=r"Halved must return images \(3, 1, 4, 4\) .* got \(3, 1, 2, 2\)"):
        cl.Unfolded(cl.ADMM(pictures()).replace(prox=Denoiser(Halved())), 2)(noisy())
    with pytest.raises(ShapeError, match=r"variable 's' has shape \(4, 4\), but a slot returned \(2, 2\)"):
        cl.Unfolded(cl.ISTA(pictures()).replace(prox=Halved()), 2)(noisy())
    with pytest.raises(ShapeError, match=r"'prox' returned 1 samples for 3"):
        cl.Unfolded(cl.ISTA(pictures()).replace(prox=lambda v: v[:1]), 2)(noisy())
    with pytest.raises(ShapeError, match=r"images \(B, h, w\).* wrap it in Denoiser"):
        cl.Unfolded(cl.ISTA(parts()).replace(prox=DnCNN(), sigma=0.1), 2)(contexts())
    with pytest.raises(ShapeError, match=r"takes pixels \(B, 6\), got \(3, 8\)"):
        Denoiser(DnCNN(), image=(2, 3))(torch.ones(3, 8), 0.1)


class Fragile(nn.Module):
    """No number for dark pictures."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.9))

    def forward(self, v, sigma):
        dark = v.detach().mean((1, 2), keepdim=True) < 0.1
        return self.gain * torch.where(dark, torch.nan, 1.0) * v


def test_nan_names_the_samples():
    net = cl.Unfolded(cl.ISTA(pictures(), step=1.0).replace(prox=Fragile(), sigma=0.1), 3)
    x = noisy() * torch.tensor([1.0, 0.01, 1.0], dtype=torch.float64)[:, None, None]
    with pytest.raises(NonFiniteError, match=r"slot 'prox' returned NaN or infinite values for samples 1 of 3"):
        net(x)
    kept = net(x[[0, 2]])
    trajectory = cl.simulate.Pairs(x, x)(net)  # one failed sample touches no other, gradients included
    assert trajectory.failed.tolist() == [False, True, False]
    torch.testing.assert_close(trajectory.decision[[0, 2]], kept)
    trajectory.decision[[0, 2]].sum().backward()
    gradient = net.prox.gain.grad.clone()
    net.prox.gain.grad = None
    kept.sum().backward()
    torch.testing.assert_close(gradient, net.prox.gain.grad)


def test_misuse_of_sigma_is_refused():
    with pytest.raises(OptionError, match="noise level of a denoiser"):
        cl.ADMM(parts(), sigma=0.1)
    with pytest.raises(OptionError, match="noise level of a denoiser"):
        cl.Unfolded(cl.ISTA(parts()), 2, untie=["sigma"])
    with pytest.raises(OptionError, match="takes none"):
        cl.Unfolded(cl.ISTA(parts(), prox=nn.Identity(), sigma=0.1), 2)(contexts())
    with pytest.raises(OptionError, match="must be positive"):
        cl.ISTA(parts(), prox=Exact(), sigma=-0.1)
    with pytest.raises(OptionError, match="schedule"):
        cl.ISTA(parts(), prox=Exact(), sigma=torch.ones(2, 2))
    with pytest.raises(OptionError, match="untie it"):
        cl.Unfolded(cl.ISTA(parts(), prox=Exact(), sigma=[0.2, 0.1]), 2, learn=["sigma"])
    s, x = cp.Variable(N, name="s"), cp.Parameter(M, name="x")
    goal = 0.5 * cp.sum_squares(np.eye(M, N) @ s - x) + cp.sum(cp.multiply(np.arange(1.0, N + 1), cp.abs(s)))
    weighted = cl.Unfolded(cl.ISTA(cl.split(cp.Problem(cp.Minimize(goal)), [x], s), prox=Exact()), 2)
    with pytest.raises(OptionError, match="weight for each entry"):
        weighted(contexts())
    with pytest.raises(OptionError, match=r"wraps an nn\.Module"):
        Denoiser(lambda x, sigma: x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match="depth must be"):
        DnCNN(depth=1)


def test_dncnn_is_the_identity_untrained_and_equivariant_inside():
    network = DnCNN(width=4, depth=3, seed=1)
    x = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network(x, 0.1), x)
    nn.init.normal_(network.layers[-1].weight, generator=torch.Generator().manual_seed(2))
    levels = torch.tensor([0.1, 0.3])
    both = network(x, levels)
    for k in range(2):  # one level per sample
        torch.testing.assert_close(both[k], network(x[k : k + 1], levels[k])[0])
    shifted = network(x.roll(1, 2), levels).roll(-1, 2)
    torch.testing.assert_close(both[:, 3:-3, 3:-4], shifted[:, 3:-3, 3:-4])
    assert network(x.double(), 0.1).dtype == torch.float64
    colour = DnCNN(channels=3, width=4, depth=3)
    assert colour(torch.rand(2, 3, 5, 5), 0.1).shape == (2, 3, 5, 5)
    with pytest.raises(ShapeError, match=r"sigma must be a number or broadcast to \(2,\)"):
        network(x, torch.ones(3))


@pytest.mark.parametrize("image", [(2, 4), (2, 2, 2)])
def test_pixels_in_a_row_as_images(image):
    recorder = Recorder()
    v = torch.rand(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(Denoiser(recorder, image=image)(v, 0.1), 0.5 * v)
    assert recorder.seen[0].dtype == torch.float32
