"""BCJR and Viterbi as decision rules: against all sequences, and through training that goes wrong."""

import itertools
import math

import pytest
import torch
from contracts import RuleContract
from torch import nn

from convexlearn.chain import ChainFactors
from convexlearn.errors import NonFiniteError, OptionError, ShapeError
from convexlearn.networks import mlp
from convexlearn.objectives import cross_entropy, error_rate
from convexlearn.rules.channel_factors import ChannelFactor, LearnedFactor, Trellis
from convexlearn.rules.sum_product import SumProduct
from convexlearn.simulate.channel import Channel, decaying_taps
from convexlearn.simulate.pairs import Pairs
from convexlearn.tune import NonFiniteWarning, tune

DOUBLE = torch.float64
TAPS = torch.tensor([1.0, 0.6, -0.3], dtype=DOUBLE)
TRELLIS = Trellis(2, 3)


def blocks(count=3, length=6, deviation=0.8, seed=0, **options):
    channel = Channel(taps=TAPS, length=length, deviation=deviation, **options)
    return channel.draw(count, torch.Generator().manual_seed(seed))[0]


def receiver(deviation=0.8, **options):
    return SumProduct(ChannelFactor(TAPS, deviation), labels=TRELLIS.labels, **options)


def network_receiver(seed=0):
    network = mlp(1, TRELLIS.size, hidden=(8,), seed=seed).double()
    return SumProduct(LearnedFactor(network, TRELLIS), labels=TRELLIS.labels)


class TestModelBased(RuleContract):
    @pytest.fixture
    def rule(self):
        return receiver()

    @pytest.fixture
    def context(self):
        return blocks().x


class TestLearned(RuleContract):
    @pytest.fixture
    def rule(self):
        return network_receiver()

    @pytest.fixture
    def context(self):
        return blocks().x


class TestMaximum(RuleContract):
    @pytest.fixture
    def rule(self):
        return receiver(semiring="max", initial=torch.linspace(-1, 1, 8, dtype=DOUBLE))

    @pytest.fixture
    def context(self):
        return blocks().x


class TestStates(RuleContract):
    @pytest.fixture
    def rule(self):
        return SumProduct(ChannelFactor(TAPS, 0.8))

    @pytest.fixture
    def context(self):
        return blocks().x


def likelihoods(x, deviation):
    """Log likelihood of x `(T,)` for all sequences of symbols, of which memory - 1 come before the block."""
    sequences = torch.tensor(list(itertools.product((0, 1), repeat=len(x) + len(TAPS) - 1)))
    sent = 2.0 * sequences.double() - 1
    means = torch.nn.functional.conv1d(sent[:, None], TAPS.flip(0)[None, None])[:, 0]
    return sequences[:, len(TAPS) - 1 :], -0.5 * ((x - means) / deviation).square().sum(-1)


@pytest.mark.parametrize("deviation", [0.3, 0.8, 3.0])
def test_bcjr_equals_maximum_a_posteriori_over_all_sequences(deviation):
    pairs = blocks(20, 7, deviation)
    decisions, wrong, least = receiver(deviation)(pairs.x).detach(), 0.0, 0.0
    for x, symbols, decision in zip(pairs.x, pairs.s, decisions):
        sequences, values = likelihoods(x, deviation)
        posterior = torch.stack([(values.softmax(0) * s).sum() for s in sequences.T])  # of symbol 1
        torch.testing.assert_close(decision[:, 1].exp(), posterior, rtol=0, atol=1e-12)
        wrong += (decision.argmax(-1) != symbols).double().mean().item()
        least += ((posterior > 0.5) != symbols).double().mean().item()
    assert wrong == least


@pytest.mark.parametrize("deviation", [0.3, 0.8, 3.0])
def test_viterbi_equals_the_most_probable_of_all_sequences(deviation):
    pairs = blocks(20, 7, deviation, seed=1)
    for x, path in zip(pairs.x, receiver(deviation).path(pairs.x)):
        sequences, values = likelihoods(x, deviation)
        assert path.tolist() == sequences[values.argmax()].tolist()


def test_max_marginals_decide_like_viterbi():
    pairs = blocks(50, 30)
    rule = receiver(semiring="max")
    assert torch.equal(rule(pairs.x).argmax(-1), rule.path(pairs.x))


def test_noiseless_symbols_are_found_far_beyond_underflow():
    """At a deviation of 1e-4 a wrong symbol costs 1e8 in the exponent."""
    pairs = blocks(2, 5000, 1e-4)
    rule = receiver(1e-4).freeze()
    decision = rule(pairs.x)
    assert not torch.isnan(decision).any()
    assert bool((decision.amax(-1) == 0).all())
    # the first two symbols share their observations with what came before the block
    assert torch.equal(decision.argmax(-1)[:, 2:], pairs.s[:, 2:])
    assert torch.equal(rule.path(pairs.x)[:, 2:], pairs.s[:, 2:])


def test_fifty_thousand_symbols_are_finite_with_their_gradient():
    pairs = blocks(1, 50_000)
    for rule in (receiver(), network_receiver()):
        decision = rule(pairs.x)
        assert bool(torch.isfinite(decision).all())
        cross_entropy(Pairs(pairs.x, pairs.s)(rule)).sum().backward()
        assert all(bool(torch.isfinite(p.grad).all()) for p in rule.parameters())


def test_gradients_of_the_cross_entropy_agree_with_finite_differences():
    pairs = blocks(2, 5)

    def loss(taps, deviation):
        unary = ChannelFactor(TAPS, 1.0).freeze()
        mean = taps @ unary.points.mT
        scores = torch.distributions.Normal(mean, deviation).log_prob(pairs.x[..., None])
        rule = SumProduct(lambda x: ChainFactors(TRELLIS.transitions.double(), scores), labels=TRELLIS.labels)
        return cross_entropy(pairs(rule))

    deviation = torch.tensor(0.8, dtype=DOUBLE)
    assert torch.autograd.gradcheck(loss, (TAPS.clone().requires_grad_(), deviation.requires_grad_()))


def test_tuning_recovers_the_taps_and_the_noise():
    train = blocks(20, 200, 0.5, seed=2)
    factor = ChannelFactor([0.7, 0.9, 0.1], 1.0)
    rule = SumProduct(factor, labels=TRELLIS.labels)
    tune(rule, train, cross_entropy, steps=150, learning_rate=0.05, progress=False)
    torch.testing.assert_close(factor.taps.detach(), TAPS, rtol=0, atol=0.05)
    assert abs(factor.deviation.item() - 0.5) < 0.05


def test_a_learned_factor_graph_comes_close_to_bcjr():
    train, test = blocks(10, 300, 0.5, seed=3), blocks(10, 2000, 0.5, seed=4)
    rule = network_receiver()
    tune(rule, train, cross_entropy, steps=200, learning_rate=0.03, progress=False)
    with torch.no_grad():
        found, least = (error_rate(test(r)).mean().item() for r in (rule, receiver(0.5)))
    assert found < 1.15 * least


def test_labels_without_a_possible_state_have_no_probability_and_a_finite_gradient():
    unary = torch.tensor([[[0.0, -math.inf, -math.inf]]], dtype=DOUBLE).requires_grad_()
    rule = SumProduct(lambda x: ChainFactors(torch.zeros(3, 3, dtype=DOUBLE), x), labels=[0, 1, 1])
    decision = rule(unary)
    assert decision.tolist() == [[[0.0, -math.inf]]]
    decision[..., 0].sum().backward()
    assert bool(torch.isfinite(unary.grad).all())


def test_a_block_without_a_possible_path_fails_alone():
    pairs = blocks()
    x = pairs.x.clone()
    x[1, 2] = math.nan
    trajectory = Pairs(x, pairs.s)(receiver())
    assert trajectory.failed.tolist() == [False, True, False]
    assert receiver().path(x)[1].tolist() == [-1] * 6


@pytest.mark.parametrize("rate", [1e200, math.inf])
def test_training_that_blows_up_ends_with_the_last_good_weights(rate):
    """The message says which parameter and which step; before it, training went well."""
    pairs = blocks(5, 20)
    rule = network_receiver()

    def schedule(step):
        return 1e-3 if step < 3 else rate

    with pytest.warns(NonFiniteWarning, match=r"tune, step \d: .*'?factor\.network\.\d\.(weight|bias).*restored"):
        history = tune(rule, pairs, cross_entropy, steps=20, learning_rate=schedule, batch_size=2, progress=False)
    assert history.stopped.startswith("step ")
    assert all(bool(torch.isfinite(p).all()) for p in rule.parameters())
    assert all(math.isfinite(record["loss"]) for record in history)
    assert bool(torch.isfinite(rule(pairs.x)).all())


def test_a_gradient_of_any_size_is_clipped():
    """An observation far off makes a likelihood whose gradient is huge."""
    pairs = blocks(4, 20)
    x = pairs.x.clone()
    x[0, 3] = 1e12
    rule = receiver()
    history = tune(rule, Pairs(x, pairs.s), cross_entropy, steps=3, learning_rate=1e-3, batch_size=1, progress=False)
    assert len(history) == 3
    assert max(record["gradient_norm"] for record in history) > 1e3
    assert all(bool(torch.isfinite(p).all()) for p in rule.parameters())


def test_data_that_is_not_finite_is_an_error_at_the_first_step():
    pairs = blocks(4, 20)
    with pytest.raises(NonFiniteError, match=r"step 0: all decisions became NaN or infinite while tuning factor\.taps"):
        tune(receiver(), Pairs(pairs.x * math.nan, pairs.s), cross_entropy, steps=3, progress=False)


class WithGap(nn.Module):
    """Finite values whose gradient is not, from the third step on."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=DOUBLE))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        zero = (self.scale - self.scale.detach()) ** 2 if self.calls > 2 else self.scale.square()
        return ChainFactors(torch.zeros(2, 2, dtype=DOUBLE), torch.stack([x, -x], -1) * self.scale + zero.sqrt())


def test_a_gradient_that_is_not_finite_names_parameter_and_step():
    x = blocks(4, 20).x
    rule = SumProduct(WithGap())
    with pytest.warns(NonFiniteWarning, match=r"step 2: the gradient of parameter 'factor\.scale' became NaN"):
        tune(rule, Pairs(x, (x > 0).long()), cross_entropy, steps=9, learning_rate=0.01, batch_size=4, progress=False)
    assert 0.9 < rule.factor.scale.item() < 1.1


def test_wrong_arguments_are_refused():
    with pytest.raises(OptionError, match="did you mean 'max'"):
        SumProduct(lambda x: x, semiring="maxx")
    with pytest.raises(OptionError, match="each of 0 to M - 1"):
        SumProduct(lambda x: x, labels=[0, 2])
    with pytest.raises(ShapeError, match="2 labels for 8 states"):
        SumProduct(ChannelFactor(TAPS, 1.0), labels=[0, 1])(blocks().x)
    with pytest.raises(TypeError, match="function or module"):
        SumProduct(torch.zeros(3, 3))
    assert "8 states, 2 labels" in repr(receiver())


def test_decaying_taps_fit_the_published_channel():
    taps = decaying_taps(4, [0.1, 2.0])
    assert taps.shape == (2, 4)
    torch.testing.assert_close(taps[1], torch.exp(torch.tensor([0.0, -2.0, -4.0, -6.0], dtype=DOUBLE)))
