"""Channels with memory: their statistics, and what a receiver is told."""

import pytest
import torch
from contracts import SimulatorContract

from convexlearn.errors import DomainError, OptionError
from convexlearn.evaluate import evaluate
from convexlearn.objectives import error_rate
from convexlearn.rules.channel_factors import ChannelFactor, Trellis
from convexlearn.rules.sum_product import SumProduct
from convexlearn.simulate.channel import Channel

DOUBLE = torch.float64
TAPS = torch.tensor([1.0, 0.5, -0.2], dtype=DOUBLE)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def receiver(deviation=0.5):
    return SumProduct(ChannelFactor(TAPS, deviation), labels=Trellis(2, 3).labels)


class TestChannel(SimulatorContract):
    @pytest.fixture
    def simulator(self):
        return Channel(taps=TAPS, length=6, deviation=0.5)

    @pytest.fixture
    def rule(self):
        return receiver()


class TestEstimatedChannel(SimulatorContract):
    @pytest.fixture
    def simulator(self):
        return Channel(taps=TAPS, length=6, deviation=0.5, drift=0.1, estimate=0.1)

    @pytest.fixture
    def rule(self):
        return receiver()


def test_without_noise_observations_are_the_convolution():
    pairs, _ = Channel(taps=TAPS, length=50, deviation=0.0).draw(2, generator())
    sent = 2.0 * pairs.s.double() - 1
    expected = TAPS[0] * sent[:, 2:] + TAPS[1] * sent[:, 1:-1] + TAPS[2] * sent[:, :-2]
    torch.testing.assert_close(pairs.x[:, 2:], expected)


def test_noise_and_symbols_have_their_moments():
    length = 200_000
    pairs, _ = Channel(taps=TAPS, length=length, deviation=0.5).draw(1, generator())
    assert abs(pairs.s.double().mean().item() - 0.5) < 4 * 0.5 / length**0.5
    total = TAPS.square().sum().item() + 0.25
    assert abs(pairs.x.var().item() - total) < 0.02


def test_poisson_counts_have_their_mean_in_every_state():
    taps, trellis = torch.tensor([4.0, 2.0], dtype=DOUBLE), Trellis(2, 2)
    channel = Channel(taps=taps, length=40_000, noise="poisson", constellation=(0.0, 1.0), background=1.5)
    pairs, _ = channel.draw(1, generator())
    states = trellis.states(pairs.s)[0]
    for s, digits in enumerate(trellis.digits):
        counts, rate = pairs.x[0, 1:][states == s], 1.5 + float((taps * digits).sum())
        assert bool((counts == counts.round()).all())
        assert abs(counts.mean().item() - rate) < 5 * (rate / len(counts)) ** 0.5
        assert abs(counts.var().item() / rate - 1) < 0.1


def test_bcjr_on_a_poisson_channel_beats_deciding_each_count_by_itself():
    taps = torch.tensor([4.0, 3.0], dtype=DOUBLE)
    options = {"noise": "poisson", "constellation": (0.0, 1.0)}
    rule = SumProduct(ChannelFactor(taps, **options), labels=Trellis(2, 2).labels)
    channel = Channel(taps=taps, length=200, **options)
    joint = evaluate(rule, channel, error_rate, samples=50)
    alone = evaluate(lambda x: (x > 4).long(), channel, error_rate, samples=50)
    assert (alone - joint).mean > 5 * (alone - joint).standard_error


def test_drift_moves_the_channel_and_estimate_what_is_told():
    def spread(**options):
        pairs, taps = Channel(taps=TAPS, length=1, deviation=0.1, **options).draw(20_000, generator())
        told = pairs.x[1] if isinstance(pairs.x, tuple) else None
        return taps, told

    taps, told = spread()
    assert told is None
    assert torch.equal(taps, TAPS.expand(20_000, 3))
    taps, told = spread(drift=0.3)
    torch.testing.assert_close((taps / TAPS).std(0), torch.full((3,), 0.3, dtype=DOUBLE), rtol=0.03, atol=0)
    taps, told = spread(estimate=0.2)
    assert torch.equal(taps, TAPS.expand(20_000, 3))
    torch.testing.assert_close((told / taps).std(0), torch.full((3,), 0.2, dtype=DOUBLE), rtol=0.03, atol=0)
    taps, told = spread(estimate=0.0)
    assert torch.equal(told, taps)


def test_the_taps_of_each_block_are_the_state():
    trajectory = Channel(taps=TAPS, length=6, deviation=0.0, drift=0.5)(lambda x: x, 3, generator())
    sent = 2.0 * trajectory.target.double() - 1
    expected = (sent.unfold(-1, 3, 1) * trajectory.state.flip(-1)[:, None]).sum(-1)
    torch.testing.assert_close(trajectory.decision[:, 2:], expected)


def test_wrong_arguments_are_refused():
    with pytest.raises(OptionError, match="did you mean 'poisson'"):
        Channel(taps=TAPS, length=3, noise="poison")
    with pytest.raises(OptionError, match="deviation of gaussian noise"):
        Channel(taps=TAPS, length=3)
    with pytest.raises(OptionError, match="length must be an integer of at least 1"):
        Channel(taps=TAPS, length=0, deviation=1.0)
    with pytest.raises(DomainError, match="a Poisson rate of"):
        Channel(taps=TAPS, length=30, noise="poisson").draw(1, generator())
