import pytest
import torch
from torch import nn

from convexlearn.errors import OptionError, ShapeError
from convexlearn.gain_networks import GainSignals, RecurrentGain, gain_features

n, p, B = 3, 2, 4


def signals(seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (p, p, p, n, n, n, n)
    return GainSignals(*(torch.randn(B, size, generator=generator, dtype=torch.float64) for size in sizes))


def test_features_are_the_four_differences_at_unit_length():
    s = signals()
    found = gain_features(s)
    pairs = [
        (s.observation, s.observation_before), (s.observation, s.predicted),
        (s.mean, s.mean_before), (s.mean, s.prior_before),
    ]  # fmt: skip
    for value, (a, b) in zip(found, pairs):
        torch.testing.assert_close(value, nn.functional.normalize(a - b))


def test_features_of_equal_signals_are_zero_with_a_finite_slope():
    zero = torch.zeros(1, 2, requires_grad=True)
    value = gain_features(GainSignals(zero, zero, zero, zero, zero, zero, zero.detach())).innovation
    value.sum().backward()
    assert torch.equal(value, torch.zeros(1, 2))
    assert torch.isfinite(zero.grad).all()


@pytest.mark.parametrize("architecture", [1, 2])
def test_starts_near_the_wanted_gain(architecture):
    start = torch.tensor([[1.0, 2.0], [3.0, -4.0], [0.0, 5.0]])
    L, memory = RecurrentGain(n, p, architecture=architecture, start=start)(signals())
    assert L.dtype == torch.float64
    assert (L - start).abs().max() < 0.15
    default, _ = RecurrentGain(n, p, architecture=architecture)(signals())
    assert (default - 0.3 * torch.eye(n, p)).abs().max() < 0.15
    again, _ = RecurrentGain(n, p, architecture=architecture, start=start)(signals(), memory)
    assert not torch.equal(again, L)


def count(inputs, outputs):
    return (inputs + 1) * outputs


def unit(inputs, hidden):
    return 3 * hidden * (inputs + hidden + 2)


def test_sizes_are_the_published_ones():
    """Architecture 2 with three states and observations: the gain head is 18 -> 720 -> 9."""
    network = RecurrentGain(3, 3).network
    assert [layer.in_features for layer in (network.leave[0], network.head)] == [18, 720]
    layers = count(3, 15) * 2 + count(6, 30) + count(9, 9) + count(18, 720) + count(720, 9) + 2 * count(18, 9)
    assert sum(w.numel() for w in network.parameters()) == layers + unit(15, 9) + unit(24, 9) + unit(39, 9)
    one = RecurrentGain(3, 2, architecture=1).network
    assert one.unit.hidden_size == 10 * (9 + 4)


def test_the_units_stand_for_covariances_at_the_start():
    network = RecurrentGain(n, p).network
    Q, P, S = network.start(torch.zeros(2, p))
    torch.testing.assert_close(Q.unflatten(-1, (n, n)), torch.eye(n).expand(2, n, n))
    torch.testing.assert_close(S.unflatten(-1, (p, p)), torch.eye(p).expand(2, p, p))
    assert not P.any()


def test_weights_come_from_the_seed_alone():
    before = torch.get_rng_state()
    a, b, c = (RecurrentGain(n, p, seed=seed)(signals())[0] for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_mistakes_are_named():
    with pytest.raises(OptionError, match="architecture must be 1 or 2, got 3"):
        RecurrentGain(n, p, architecture=3)
    with pytest.raises(ShapeError, match=r"start must be \(3, 2\), got \(2, 3\)"):
        RecurrentGain(n, p, start=torch.zeros(2, 3))
