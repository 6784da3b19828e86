"""Stacks of networks against one network at a time, and the recurrent ones against torch's."""

import pytest
import torch
from contracts import RuleContract
from torch import nn

from convexlearn.errors import OptionError, ShapeError
from convexlearn.objectives import cross_entropy, error_rate
from convexlearn.rules.neural import NeuralRule
from convexlearn.simulate.pairs import Pairs
from convexlearn.stacked_networks import SkipConnection, SlidingBiLSTM, StackedLinear, stacked_mlp
from convexlearn.tune import tune

DOUBLE = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


class TestSliding(RuleContract):
    @pytest.fixture
    def rule(self):
        return NeuralRule(SlidingBiLSTM(2, hidden=4, layers=2, length=5, stride=2).double().eval())

    @pytest.fixture
    def context(self):
        return draw(3, 12)


class TestStackedSliding(RuleContract):
    @pytest.fixture
    def rule(self):
        return NeuralRule(SlidingBiLSTM(2, hidden=4, layers=1, length=5, stride=2, stack=3).double().eval())

    @pytest.fixture
    def context(self):
        return draw(3, 3, 12)


class TestStackedPerceptrons(RuleContract):
    @pytest.fixture
    def rule(self):
        return NeuralRule(stacked_mlp(3, 2, 4, hidden=(5, 6), activations=[nn.Sigmoid, nn.ReLU]).double())

    @pytest.fixture
    def context(self):
        return draw(4, 3, 7, 2)


def test_each_network_of_a_stack_is_a_perceptron_of_its_own():
    stack = stacked_mlp(3, 2, 4, hidden=(5,)).double()
    x, first, last = draw(6, 3, 2), stack[0], stack[2]
    for c in range(3):
        hidden = torch.relu(x[:, c] @ first.weight[c] + first.bias[c])
        torch.testing.assert_close(stack(x)[:, c], hidden @ last.weight[c] + last.bias[c])


def test_a_skip_connection_adds_a_linear_map_and_starts_as_it():
    network = SkipConnection(StackedLinear(3, 2, 4), stacked_mlp(3, 2, 4, hidden=(5,), zero=True)).double()
    x = draw(6, 3, 2)
    for c in range(3):
        linear = x[:, c] @ network.linear.weight[c] + network.linear.bias[c]
        torch.testing.assert_close(network(x)[:, c], linear)
    with torch.no_grad():
        network.network[-1].weight.copy_(draw(3, 5, 4, seed=1))
    torch.testing.assert_close(network(x), network.linear(x) + network.network(x))
    assert not torch.allclose(network(x), network.linear(x))


def test_a_skip_connections_network_learns_what_the_linear_map_lacks():
    """Two classes of equal means and unequal variances, among which linear scores only guess (0.5)."""
    labels = torch.arange(400)[:, None] % 2
    x = draw(400, 1, 1).float() * torch.where(labels == 1, 3.0, 0.6)[..., None]
    network = SkipConnection(StackedLinear(1, 1, 2), stacked_mlp(1, 1, 2, hidden=(16,), zero=True))
    tune(network, Pairs(x, labels), cross_entropy, steps=200, learning_rate=0.03, progress=False)
    with torch.no_grad():
        assert error_rate(Pairs(x, labels)(network)).mean() < 0.27


def torch_lstm(rule, network=0):
    """torch's LSTM with the weights of one network; both directions, one layer per entry of `rule.layers`."""
    hidden, count = rule.layers[0].hidden, rule.stack or 1
    twin = nn.LSTM(1, hidden, len(rule.layers), batch_first=True, bidirectional=True, dtype=DOUBLE)
    with torch.no_grad():
        for k, layer in enumerate(rule.layers):
            for suffix, where in (("", network), ("_reverse", count + network)):
                getattr(twin, f"weight_ih_l{k}{suffix}").copy_(layer.enter[where].mT)
                getattr(twin, f"weight_hh_l{k}{suffix}").copy_(layer.repeat[where].mT)
                getattr(twin, f"bias_ih_l{k}{suffix}").copy_(layer.bias[where, 0])
                getattr(twin, f"bias_hh_l{k}{suffix}").zero_()
    return twin


@pytest.mark.parametrize("layers", [1, 3])
def test_one_window_is_torchs_lstm(layers):
    rule = SlidingBiLSTM(2, hidden=4, layers=layers, length=9, stack=2).double().eval()
    x = draw(3, 2, 9)
    for c in range(2):
        out, _ = torch_lstm(rule, c)(x[:, c, :, None])
        expected = (out @ rule.head.weight[c] + rule.head.bias[c]).log_softmax(-1)
        torch.testing.assert_close(rule(x)[:, c], expected)


@pytest.mark.parametrize(("stride", "starts"), [(1, range(8)), (3, [0, 3, 6, 7]), (5, [0, 5, 7])])
def test_windows_slide_and_their_probabilities_are_averaged(stride, starts):
    rule = SlidingBiLSTM(3, hidden=4, layers=1, length=5, stride=stride).double().eval()
    x, sums, counts = draw(2, 12), torch.zeros(2, 12, 3, dtype=DOUBLE), torch.zeros(12, 1)
    for start in starts:
        own = slice(start, start + 5)
        sums[:, own] += rule(x[:, own]).exp()
        counts[own] += 1
    torch.testing.assert_close(rule(x).exp(), sums / counts)


def test_a_sequence_shorter_than_a_window_is_one_window():
    rule = SlidingBiLSTM(2, hidden=4, layers=1, length=50).double().eval()
    assert rule(draw(2, 7)).shape == (2, 7, 2)


def test_dropout_acts_in_training_only():
    rule, x = SlidingBiLSTM(2, hidden=16, layers=1, length=5).double(), draw(1, 12)
    assert torch.equal(rule.eval()(x), rule.eval()(x))
    rule.train()
    with torch.random.fork_rng(devices=[]):
        assert not torch.equal(rule(x), rule(x))


def test_both_directions_are_learned():
    """Each symbol depends on the observation before and on the one after it."""
    x = torch.randn(40, 20, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(40, 1)
    before, after = torch.cat([nothing, x[:, :-1]], 1), torch.cat([x[:, 1:], nothing], 1)
    pairs = Pairs(x, ((before > 0) & (after > 0)).long())
    rule = SlidingBiLSTM(2, hidden=8, layers=1, length=10, stride=5, dropout=0.0)
    tune(rule, pairs, cross_entropy, steps=120, learning_rate=0.03, progress=False)
    with torch.no_grad():
        assert error_rate(pairs(rule)).mean() < 0.06  # always 0 would miss a quarter


def test_seeds_determine_the_weights():
    for make in (lambda seed: SlidingBiLSTM(2, hidden=4, seed=seed), lambda seed: stacked_mlp(2, 1, 2, seed=seed)):
        same, other = make(0).state_dict(), make(1).state_dict()
        for name, weight in make(0).state_dict().items():
            assert torch.equal(weight, same[name])
            assert "bias" in name or not torch.equal(weight, other[name])


def test_wrong_arguments_are_refused():
    with pytest.raises(ShapeError, match=r"x must be \(B, 3, ..., 2\)"):
        StackedLinear(3, 2, 4)(torch.zeros(5, 2, 2))
    with pytest.raises(OptionError, match="1 activations for 2 hidden"):
        stacked_mlp(2, 1, 2, hidden=(3, 3), activations=[nn.ReLU])
    with pytest.raises(OptionError, match="stride must be at most length"):
        SlidingBiLSTM(2, length=4, stride=5)
    with pytest.raises(ShapeError, match=r"x must be \(B, 3, T\)"):
        SlidingBiLSTM(2, stack=3)(torch.zeros(2, 5))
