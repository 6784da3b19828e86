"""States and likelihoods of channels with memory against enumeration and scipy."""

import itertools

import pytest
import torch
from scipy import stats

from convexlearn.errors import DomainError, OptionError, ShapeError
from convexlearn.networks import mlp
from convexlearn.rules.channel_factors import ChannelFactor, LearnedFactor, Trellis
from convexlearn.rules.sum_product import SumProduct
from convexlearn.simulate.channel import Channel

DOUBLE = torch.float64


@pytest.mark.parametrize(("symbols", "memory"), [(2, 1), (2, 4), (3, 2), (4, 3)])
def test_transitions_shift_the_symbols(symbols, memory):
    trellis = Trellis(symbols, memory)
    digits = trellis.digits.tolist()
    assert len({tuple(d) for d in digits}) == trellis.size == symbols**memory
    for i, j in itertools.product(range(trellis.size), repeat=2):
        assert (trellis.transitions[i, j] == 0) == (digits[j][1:] == digits[i][:-1])
    assert trellis.labels.tolist() == [d[0] for d in digits]


def test_states_of_a_sequence_hold_its_last_symbols():
    trellis, labels = Trellis(3, 2), torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1]])
    states = trellis.states(labels)
    assert states.shape == (2, 3)
    for row, own in zip(labels, states):
        assert trellis.digits[own].tolist() == [[int(row[t]), int(row[t - 1])] for t in (1, 2, 3)]
    assert bool((trellis.transitions[states[:, :-1], states[:, 1:]] == 0).all())


def test_gaussian_likelihood():
    taps = torch.tensor([1.0, -0.5, 0.2], dtype=DOUBLE)
    channel = Channel(taps=taps, length=6, deviation=0.3)
    x = channel.draw(2, torch.Generator().manual_seed(0))[0].x
    factor = ChannelFactor(taps, 0.3)
    for s, digits in enumerate(factor.trellis.digits):
        mean = float((taps * (2.0 * digits - 1)).sum())
        expected = torch.tensor(stats.norm.logpdf(x.numpy(), mean, 0.3))
        torch.testing.assert_close(factor(x).unary[..., s].detach(), expected)


def test_poisson_likelihood():
    taps = torch.tensor([3.0, 1.0], dtype=DOUBLE)
    options = {"noise": "poisson", "constellation": (0.0, 1.0)}
    x = Channel(taps=taps, length=6, **options).draw(2, torch.Generator().manual_seed(0))[0].x
    factor = ChannelFactor(taps, **options, background=0.5)
    for s, digits in enumerate(factor.trellis.digits):
        expected = torch.tensor(stats.poisson.logpmf(x.numpy(), float((taps * digits).sum()) + 0.5))
        torch.testing.assert_close(factor(x).unary[..., s].detach(), expected)


def test_several_channels_side_by_side_equal_each_by_itself():
    taps = torch.tensor([[1.0, 0.5], [1.0, -0.5], [0.2, 1.0]], dtype=DOUBLE)
    deviation = torch.tensor([0.5, 1.0, 0.2], dtype=DOUBLE)
    x = Channel(taps=taps, length=7, deviation=deviation).draw(4, torch.Generator().manual_seed(0))[0].x
    assert x.shape == (4, 3, 7)
    labels = Trellis(2, 2).labels
    joint = SumProduct(ChannelFactor(taps, deviation), labels=labels)(x)
    for c in range(3):
        alone = SumProduct(ChannelFactor(taps[c], deviation[c]), labels=labels)(x[:, c])
        torch.testing.assert_close(joint[:, c], alone)


def test_taps_of_a_sample_take_the_place_of_the_factors_own():
    taps = torch.tensor([[1.0, 0.5], [0.3, 2.0]], dtype=DOUBLE)
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    given = ChannelFactor(torch.zeros(2, dtype=DOUBLE), 1.0)(x, taps).unary
    for b in range(2):
        torch.testing.assert_close(given[b], ChannelFactor(taps[b], 1.0)(x[b : b + 1]).unary[0])


def test_a_learned_factor_ignores_estimates_and_keeps_the_dtype():
    factor = LearnedFactor(mlp(1, 4, hidden=(3,)), Trellis(2, 2))
    x = torch.zeros(2, 5, dtype=DOUBLE)
    unary = factor(x, torch.ones(2, 2)).unary
    assert unary.dtype == DOUBLE
    torch.testing.assert_close(unary, factor(x).unary)
    torch.testing.assert_close(unary.exp().sum(-1), torch.ones(2, 5, dtype=DOUBLE), rtol=0, atol=1e-6)
    with pytest.raises(ShapeError, match="3 outputs for 4 states"):
        LearnedFactor(mlp(1, 3), Trellis(2, 2))(x)


def test_wrong_arguments_are_refused():
    with pytest.raises(OptionError, match="did you mean 'poisson'"):
        ChannelFactor([1.0], noise="poison")
    with pytest.raises(OptionError, match="deviation of gaussian noise"):
        ChannelFactor([1.0])
    with pytest.raises(OptionError, match="poisson noise has none"):
        ChannelFactor([1.0], 1.0, noise="poisson")
    with pytest.raises(OptionError, match="at least 2"):
        Trellis(1, 2)
    with pytest.raises(DomainError, match="'deviation' must be"):
        ChannelFactor([1.0], -1.0)
    with pytest.raises(DomainError, match=r"Poisson rate is -1 .*raise background"):
        ChannelFactor([2.0], noise="poisson")(torch.ones(1, 3))
    with pytest.raises(ShapeError, match="taps must have 2"):
        ChannelFactor([1.0, 2.0], 1.0)(torch.ones(1, 3), torch.ones(1, 3))
