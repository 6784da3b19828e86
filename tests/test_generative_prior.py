"""Compressed sensing of digits: data, models and rules of the entry."""

import socket

import numpy as np
import pytest
import torch

from convexlearn.errors import OptionError
from convexlearn.problems import digits, find, generative_prior
from convexlearn.problems.catalogue import Budget, Contender
from convexlearn.problems.generative_prior import Setting, bases, declare, draw, least_norm, measurements


def test_digits_are_bundled_and_no_test_picture_is_trained_on(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a download")

    monkeypatch.setattr(socket, "socket", refuse)
    digits.pictures.cache_clear()
    parts = {name: digits.pictures(name) for name in digits.PARTS}
    assert sum(len(part) for part in parts.values()) == 1797
    for part in parts.values():
        assert part.shape[1:] == (64,)
        assert part.min() == 0
        assert part.max() == 1
    apart = torch.cdist(parts["test"], torch.cat([parts["train"], parts["validation"]]))
    assert apart.min() > 0


def test_measurements_follow_the_model():
    data = draw(0, 0.1, Setting(noise=0.0))
    assert data.H.shape == (6, 64)
    assert len(data.train) == 4 * 1200
    for pairs in (data.train, data.validation, data.test):
        torch.testing.assert_close(pairs.x, pairs.s @ data.H.mT)
    noisy = draw(0, 0.4, Setting(noise=0.5))
    assert (noisy.train.x - noisy.train.s @ noisy.H.mT).std().item() == pytest.approx(0.5, rel=0.01)
    assert noisy.H.square().mean().item() == pytest.approx(1 / measurements(0.4), rel=0.1)


def test_bases_are_orthonormal_and_the_last_has_the_covariance_of_the_pictures():
    for name, basis in bases().items():
        expected = np.cov(digits.pictures("train").numpy().T) if name == "PCA" else np.eye(64)
        np.testing.assert_allclose(basis @ basis.T, expected, atol=1e-12)
    np.testing.assert_allclose(bases()["DCT"][:, 0], 1 / 8)
    assert len(np.unique(bases()["Haar"].round(9))) > 2


def test_a_large_penalty_decides_for_the_mean_picture_and_a_small_one_explains_the_measurements():
    data, mean = draw(0, 0.1, Setting()), digits.pictures("train").mean(0)
    x = data.test.x[:3]
    with torch.no_grad():
        strict = declare(data.H, bases()["DCT"], mean, rho=100.0)(x)
        loose = declare(data.H, bases()["DCT"], mean, rho=1e-6)(x)
        nearest = least_norm(data)(x)
    torch.testing.assert_close(strict, mean.expand(3, -1), atol=1e-6, rtol=0)
    torch.testing.assert_close(loose @ data.H.mT, x, atol=1e-3, rtol=0)
    torch.testing.assert_close(nearest @ data.H.mT, x)
    assert ((nearest - mean).norm(dim=1) <= (loose - mean).norm(dim=1) + 1e-3).all()


def test_the_evidence_lower_bound_is_that_of_the_distributions():
    model, s = digits.Autoencoder(3, 0).double().eval(), digits.pictures("test")[:4]
    mean, log_deviation = model.encoder(s).chunk(2, 1)
    normal = torch.distributions.Normal
    fit = normal(model.decoder(mean), (model.log_variance / 2).exp()).log_prob(s).sum(1)
    divergence = torch.distributions.kl_divergence(normal(mean, log_deviation.exp()), normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(model(s), divergence - fit)


def test_the_flow_starts_as_the_normal_distribution_of_the_blurred_pictures():
    flow, s = digits.flow(0), digits.pictures("train")
    z = flow.inverse(s + digits.BLUR * torch.randn(s.shape, generator=torch.Generator().manual_seed(5)))
    assert z.mean(0).abs().max() < 0.15
    assert (torch.cov(z.mT) - torch.eye(64)).abs().mean() < 0.03


def test_models_are_trained_once_and_depend_on_the_seed():
    models, budget = digits.Models(3), Budget(steps=2)
    assert models.decoder(budget) is models.decoder(budget)
    assert models.flow(budget) is models.flow(budget)
    again, other = digits.Models(3).decoder(budget), digits.Models(3).decoder(Budget(steps=2, seed=1))
    z = torch.ones(1, 3, dtype=torch.float64)
    assert torch.equal(models.decoder(budget)(z), again(z))
    assert not torch.equal(models.decoder(budget)(z), other(z))


def test_a_sweep_fits_the_rule_at_every_ratio():
    setting = Setting(pictures=8)
    others = {ratio: draw(0, ratio, setting) for ratio in (0.05, 0.4)}
    entrant = generative_prior.contender(generative_prior.affine, draw(0, 0.1, setting), others)
    assert isinstance(entrant, Contender)
    trace = entrant.fit(entrant.rule, Budget())
    assert trace.ratios == (0.05, 0.4)
    assert trace.errors[1].mean < 0.5 * trace.errors[0].mean  # more measurements help


def test_settings_out_of_range_are_errors():
    entry = find("generative_prior")
    with pytest.raises(OptionError, match="ratio must lie between"):
        entry.configure(ratio=0)
    with pytest.raises(OptionError, match="pictures must lie between 2 and 397"):
        entry.configure(pictures=398)
