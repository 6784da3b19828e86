"""Symbol detection on channels with memory: BCJR, a learned factor graph, and a recurrent network (Fig. 9)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import cvxpy as cp
import torch
from torch import Tensor, nn

from convexlearn.chain import ChainFactors
from convexlearn.errors import OptionError
from convexlearn.evaluate import evaluate
from convexlearn.objectives import Objective, cross_entropy, error_rate
from convexlearn.problems.catalogue import Budget, Contender, ProblemEntry, Reference, Result, Study
from convexlearn.problems.fitting import gradient, histories
from convexlearn.randomness import make_generator
from convexlearn.report import Estimate, format_table, new_axes
from convexlearn.rules.channel_factors import ChannelFactor, LearnedFactor, Trellis
from convexlearn.rules.sum_product import SumProduct
from convexlearn.simulate.base import Trajectory
from convexlearn.simulate.channel import Channel, decaying_taps
from convexlearn.simulate.pairs import Pairs
from convexlearn.softmax_regression import softmax_regression
from convexlearn.stacked_networks import SkipConnection, SlidingBiLSTM, StackedLinear, stacked_mlp
from convexlearn.tune import History

TRELLIS = Trellis(2, 4)

FRAMES, FRAME = 10, 500
"""Training blocks of each channel, and symbols in one."""

UNCERTAINTY = math.sqrt(0.1)
"""Relative deviation of uncertain taps."""

KNOWN = {-6: 0.296, -2: 0.207, 2: 0.103, 6: 0.0195, 10: 0.0004}
"""Symbol error rates of BCJR by signal-to-noise ratio in dB, from KNOWN_SYMBOLS symbols each."""

KNOWN_SYMBOLS = 120_000

MOST = 1.15
"""Most errors of the learned factor graph relative to BCJR."""

UNCERTAIN = "{}, uncertain CSI"

BATCH = 2
"""Blocks of all channels that a rule gets at once."""


@dataclass(frozen=True)
class Setting:
    """Options. spacing: of the signal-to-noise ratios from -6 to 10 dB (2: those of Fig. 9); channels: how many
    decays gamma, evenly from 0.1 to 2; blocks, length: test blocks of each channel and symbols in one; hidden,
    layers: units and layers of the recurrent network (80 and 3 in the published one).
    """

    spacing: int = 4
    channels: int = 20
    blocks: int = 8
    length: int = 300
    hidden: int = 24
    layers: int = 1

    def __post_init__(self) -> None:
        if min(self.spacing, self.channels, self.length, self.hidden, self.layers) < 1 or self.blocks < 2:
            raise OptionError("need spacing, channels, length, hidden and layers of at least 1 and two blocks")

    @property
    def ratios(self) -> list[int]:
        """Signal-to-noise ratios in dB."""
        return list(range(-6, 11, self.spacing))

    @property
    def names(self) -> list[str]:
        """The same, as measures are named."""
        return [f"{ratio} dB" for ratio in self.ratios]

    def channel(self, length: int, **options: Any) -> Channel:
        """All channels side by side, `(ratios x channels,)`: those of one ratio follow each other."""
        taps = decaying_taps(TRELLIS.memory, torch.linspace(0.1, 2.0, self.channels, dtype=torch.float64))
        deviation = 10 ** (-torch.tensor(self.ratios, dtype=torch.float64) / 20)
        stack = (len(self.ratios), self.channels)
        taps, deviation = taps.expand(*stack, -1).flatten(0, 1), deviation[:, None].expand(stack).flatten()
        return Channel(taps=taps, length=length, deviation=deviation, **options)


class OwnTaps(ChannelFactor):
    """A model that trusts its own taps, not the estimates that come with a block."""

    def forward(self, x: Tensor, *estimates: Tensor) -> ChainFactors:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Log potentials for x `(B, C, T)`."""
        return super().forward(x)


class MostProbableSequence(nn.Module):
    """The most probable sequence instead of the most probable symbols."""

    def __init__(self, rule: SumProduct) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, *x: Tensor) -> Tensor:
        """Symbols' numbers `(B, C, T)`."""
        return self.rule.path(*x)


class Classifier(nn.Module):
    """The network of a learned factor alone: scores of the states."""

    def __init__(self, factor: LearnedFactor) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Scores `(B, C, T, S)`."""
        return self.factor.scores(x)


def classify(train: Pairs, epochs: int = 20, batch_size: int = 100) -> Callable[[Any, Budget], History]:
    """Fit the network of a learned factor graph as a classifier of states by cross-entropy.

    First its linear part alone, to the maximum of likelihood, which is a convex problem; then all of it, as published.
    """
    x, labels = torch.as_tensor(train.x), torch.as_tensor(train.s)
    known = x[..., TRELLIS.memory - 1 :], TRELLIS.states(labels)  # (B, C, T - memory + 1)
    x, states = (part.transpose(1, 2).flatten(0, 1) for part in known)
    pairs = Pairs(x[..., None].float(), states[..., None])

    steps = epochs * (len(pairs) // batch_size)
    descend = gradient(pairs, cross_entropy, steps=steps, learning_rate=1e-2, batch_size=batch_size)

    def fit(rule: Any, budget: Budget) -> History:
        linear = rule.factor.network.linear
        weights, biases = softmax_regression(x.T[..., None], states.T, TRELLIS.size)
        with torch.no_grad():
            linear.weight.copy_(weights)
            linear.bias.copy_(biases)
        return descend(Classifier(rule.factor), budget)

    return fit


def learned(stack: int, seed: int) -> SumProduct:
    """The learned factor graphs of all channels: the published network with a skip connection from x to the scores.

    With Gaussian noise of one variance, log-likelihoods of the states are linear in x up to a term that they share, so
    that the linear part can be exact; it still learns everything from the training blocks.
    """
    generator, layers = torch.Generator().manual_seed(seed), [nn.Sigmoid, nn.ReLU]
    options = {"hidden": (100, 50), "activations": layers, "uniform": True, "zero": True}
    network = stacked_mlp(stack, 1, TRELLIS.size, **options, seed=generator)
    linear = StackedLinear(stack, 1, TRELLIS.size, gain=0.0, generator=generator)
    return SumProduct(LearnedFactor(SkipConnection(linear, network), TRELLIS), labels=TRELLIS.labels)


def declare(length: int = 3) -> cp.Problem:
    """The most probable sequence as a shortest path, for display: flows on the transitions of a short block."""
    S = TRELLIS.size
    possible = (TRELLIS.transitions == 0).double().numpy()
    costs = [cp.Parameter((S, S), name=f"cost{t}") for t in range(length)]
    flows = [cp.Variable((S, S), name=f"flow{t}", nonneg=True) for t in range(length)]
    constraints = [cp.sum(flows[0]) == 1, *(flow <= possible for flow in flows)]
    constraints += [cp.sum(a, axis=0) == cp.sum(b, axis=1) for a, b in pairwise(flows)]
    total = sum(cp.sum(cp.multiply(c, f)) for c, f in zip(costs, flows))
    return cp.Problem(cp.Minimize(total), constraints)


def measures(ratios: Sequence[str], channels: int, rate: Objective = error_rate) -> dict[str, Objective]:
    """`rate` by signal-to-noise ratio, averaged over the channels of each, of which there are `channels`."""

    def at(k: int) -> Objective:
        mine = slice(k * channels, (k + 1) * channels)

        def own(trajectory: Trajectory) -> Tensor:
            decision, target = trajectory.decision[:, mine], trajectory.target[:, mine]
            return rate(replace(trajectory, decision=decision, target=target))

        return own

    return {ratio: at(k) for k, ratio in enumerate(ratios)}


def expected_error_rate(trajectory: Trajectory) -> Tensor:
    """Probability of a wrong symbol given the observations `(B,)`; the targets are posteriors `(B, C, T, 2)`."""
    decision, posterior = trajectory.decision, trajectory.target
    symbols = decision.argmax(-1) if decision.shape == posterior.shape else decision
    right = posterior.gather(-1, symbols[..., None])
    return (1 - right).flatten(1).mean(-1)


def build(seed: int, setting: Setting) -> Study:
    """Blocks drawn from `seed`; receivers that know the channels, know estimates, or have learned from blocks."""
    test = setting.channel(setting.length, estimate=UNCERTAINTY)
    test = test.draw(setting.blocks, make_generator(seed, "test"))[0]
    same = setting.channel(FRAME).draw(FRAMES, make_generator(seed, "train"))[0]
    varied = setting.channel(FRAME, drift=UNCERTAINTY).draw(FRAMES, make_generator(seed, "uncertain"))[0]
    channel, wrong = setting.channel(1), setting.channel(1, drift=UNCERTAINTY)
    stack, labels = len(channel.taps), TRELLIS.labels
    guess = wrong.draw(1, make_generator(seed, "guess"))[1][0]

    def descend(train: Pairs, steps: int, rate: float) -> Any:
        return gradient(train, cross_entropy, steps=steps, learning_rate=rate, batch_size=1)

    def recurrent() -> SlidingBiLSTM:
        sizes = {"hidden": setting.hidden, "layers": setting.layers, "length": 16, "stride": 8}
        return SlidingBiLSTM(2, **sizes, stack=stack, seed=seed)

    exact = SumProduct(OwnTaps(channel.taps, channel.deviation), labels=labels).freeze()
    contenders = {
        "BCJR": Contender(exact),
        "Viterbi": Contender(MostProbableSequence(exact)),
        "learned factor graph": Contender(learned(stack, seed), classify(same)),
        "SBRNN": Contender(recurrent(), descend(same, 80, 1e-2)),
        "BCJR, uncertain CSI": Contender(
            SumProduct(ChannelFactor(channel.taps, channel.deviation), labels=labels).freeze()
        ),
        "tuned BCJR, uncertain CSI": Contender(
            SumProduct(OwnTaps(guess, channel.deviation), labels=labels), descend(varied, 60, 0.05)
        ),
        "learned factor graph, uncertain CSI": Contender(learned(stack, seed), classify(varied)),
        "SBRNN, uncertain CSI": Contender(recurrent(), descend(varied, 80, 1e-2)),
    }
    return Study(declare(), contenders, test, measures(setting.names, setting.channels))


def relative(result: Result, name: str, other: str) -> dict[str, Estimate]:
    """Error rate of one rule over that of another by measure, nan where the other makes no errors."""
    found = {}
    for measure in result.study.measures:
        a, b = result.record(name).measure(measure), result.record(other).measure(measure)
        ratio = a.mean / b.mean if b.mean else math.nan
        spread = math.hypot(a.standard_error, ratio * b.standard_error) / b.mean if b.mean else math.nan
        found[measure] = Estimate(ratio, spread)
    return found


def average(result: Result, name: str) -> float:
    """Error rate over all ratios."""
    estimates = [result.record(name).measure(m).mean for m in result.study.measures]
    return sum(estimates) / len(estimates)


def with_posteriors(exact: nn.Module, blocks: Pairs) -> Pairs:
    """The blocks with the symbols' probabilities by BCJR `(B, C, T, 2)` as targets, for `expected_error_rate`."""
    with torch.no_grad():
        parts = [exact(*blocks.subset(rows).x).exp() for rows in torch.arange(len(blocks)).split(BATCH)]
    return Pairs(blocks.x, torch.cat(parts))


def expected(rule: Any, other: Any, blocks: Pairs, ratios: Sequence[str]) -> dict[str, Estimate]:
    """Expected error rate of one rule over that of another on the same blocks, which come `with_posteriors`.

    Its variance is far less than that of counted errors, of which there are few at high signal-to-noise ratios.
    """
    judged = measures(ratios, blocks.s.shape[1] // len(ratios), expected_error_rate)  # type: ignore[union-attr]
    a, b = (evaluate(one, blocks, judged, batch_size=BATCH) for one in (rule, other))
    found = {}
    for ratio in ratios:
        mean = a[ratio].mean / b[ratio].mean
        spread = (a[ratio].values - mean * b[ratio].values).std().item() / math.sqrt(len(blocks)) / b[ratio].mean
        found[ratio] = Estimate(mean, spread)
    return found


def departures(setting: Setting, rule: Any, seed: int, blocks: int = 20, length: int = 1000) -> list[str]:
    """Sentences on the ratios at which BCJR is over three standard errors from KNOWN, on fresh, long blocks.

    Few errors and few blocks, as in the table, would leave the standard errors themselves uncertain.
    """
    judged = measures(setting.names, setting.channels)
    found = evaluate(rule, setting.channel(length), judged, samples=blocks, batch_size=BATCH, seed=seed)
    missed = []
    for ratio, known in KNOWN.items():
        rate = found[f"{ratio} dB"]
        error = math.hypot(rate.standard_error, math.sqrt(known * (1 - known) / KNOWN_SYMBOLS))
        if abs(rate.mean - known) > 3 * error:
            missed.append(f"BCJR has {rate.mean:.4g} ± {rate.standard_error:.2g} at {ratio} dB, known {known}")
    return missed


def excess(
    rule: Any, exact: SumProduct, ratios: Sequence[str], seed: int, *, blocks: int = 50, length: int = 1000
) -> dict[str, Estimate]:
    """Expected error rate of a rule over that of BCJR on fresh, long blocks of the channels that BCJR knows."""
    factor: Any = exact.factor
    channel = Channel(taps=factor.taps, deviation=factor.deviation, length=length, estimate=UNCERTAINTY)
    drawn = channel.draw(blocks, make_generator(seed, "long"))[0]
    return expected(rule, exact, with_posteriors(exact, drawn), ratios)


def excesses(found: Mapping[str, Estimate]) -> list[str]:
    """Sentences on the ratios at which the learned factor graph expects over MOST times BCJR's errors."""
    return [
        f"the learned factor graph has {ratio.text(4)} times BCJR's expected error at {name}, over {MOST}"
        for name, ratio in found.items()
        if ratio.mean > MOST
    ]


def misses(result: Result) -> list[str]:
    """What a full run should show and does not: see ENTRY.reference."""
    known = departures(ENTRY.setting, result.rules["BCJR"], result.seed)
    return known + excesses(_graph_excess(result)) + failures(result)


def _graph_excess(result: Result) -> dict[str, Estimate]:
    exact: Any = result.rules["BCJR"]
    return excess(result.rules["learned factor graph"], exact, list(result.study.measures), result.seed)


def failures(result: Result) -> list[str]:
    """Which of the comparisons between rules come out otherwise than they should."""
    missed = []
    graph, network = "learned factor graph", "SBRNN"
    if average(result, graph) > MOST * average(result, "BCJR"):
        missed.append(f"the learned factor graph has over {MOST} times BCJR's error on average")
    for measure, ratio in relative(result, UNCERTAIN.format(graph), UNCERTAIN.format("BCJR")).items():
        if measure in ("6 dB", "10 dB") and ratio.mean > 0.7:
            missed.append(f"trained on uncertain channels it has {ratio.text()} times BCJR's error at {measure}")
    for a, b in ((graph, network), (UNCERTAIN.format(graph), UNCERTAIN.format(network))):
        if average(result, a) >= average(result, b):
            missed.append(f"{b} is no worse than {a}")
    return missed


def tables(result: Result) -> dict[str, str]:
    """Expected error rates on the test blocks relative to those of BCJR with the same knowledge."""
    shown, measured = {}, list(result.study.measures)
    blocks = with_posteriors(result.rules["BCJR"], result.study.test)
    for title, base, names in (
        ("expected error rate relative to BCJR", "BCJR", _names(result, False)),
        ("expected error rate relative to BCJR with uncertain taps", UNCERTAIN.format("BCJR"), _names(result, True)),
    ):
        other = result.rules[base]
        ratios = {n: expected(result.rules[n], other, blocks, measured) for n in names if n != base}
        rows = [[n, *(e.text() for e in found.values())] for n, found in ratios.items()]
        shown[title] = format_table(["rule", *measured], rows, 1 + len(measured))
    row = ["learned factor graph", *(e.text(4) for e in _graph_excess(result).values())]
    title = "expected error rate relative to BCJR on 50 more blocks of 1000 symbols of each channel"
    return shown | {title: format_table(["rule", *measured], [row], 1 + len(measured))}


def _names(result: Result, uncertain: bool) -> list[str]:
    return [name for name in result.rules if ("uncertain" in name) == uncertain]


def figures(result: Result) -> dict[str, Any]:
    """Symbol error rates against the signal-to-noise ratio, as in Fig. 9, and the losses of the fits."""
    return {"errors": _plot_errors(result), **histories(result)}


def _plot_errors(result: Result) -> Any:
    ax = new_axes(size=(7.0, 5.0))
    shown: Sequence[str] = list(result.study.measures)
    decibels = [float(measure.removesuffix(" dB")) for measure in shown]
    for record in result.records:
        estimates = [record.measure(m) for m in shown]
        line = "--" if "uncertain" in record.name else "-"
        errors = [e.standard_error for e in estimates]
        ax.errorbar(decibels, [e.mean for e in estimates], errors, fmt=f"o{line}", ms=4, capsize=3, label=record.name)
    ax.set(yscale="log", xlabel="signal-to-noise ratio (dB)", ylabel="symbol error rate")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    return ax


ENTRY = ProblemEntry(
    name="symbol-detection",
    summary="BPSK symbols on channels with memory: BCJR, learned factor graphs and a recurrent network",
    source="Results, Fig. 9; Shlezinger, Farsad, Eldar, Goldsmith, Learned factor graphs (2021)",
    shapes="""\
x: context, a channel's observations (B, C, T), C channels side by side, and estimates of their taps (B, C, 4)
s: decision, log probabilities (B, C, T, 2) of the symbols -1 and 1, or their numbers (B, C, T)
taps: exp(-gamma l), l = 0, ..., 3, averaged over gamma = 0.1, ..., 2; uncertain ones times 1 + sqrt(0.1) N(0, 1)
-6 dB, ...: share of wrong symbols where the noise has the variance 10^(-dB/10); times are per block of all channels
trained on 10 blocks of 500 symbols of each channel, which with uncertain CSI have taps of their own""",
    reference=Reference(
        "BCJR within three standard errors of 0.296, 0.207, 0.103, 0.0195, 0.0004 at -6, -2, 2, 6, 10 dB; the learned "
        "factor graph within 1.15 times its error at each of them (errors expected given the observations, on 50 more "
        "blocks of 1000 symbols of each channel); "
        "trained on uncertain channels at most 0.7 times that of BCJR with uncertain taps at 6 and 10 dB (0.53, 0.03; "
        "at -6, -2, 2 dB BCJR with the true taps is itself at 0.98, 0.94, 0.85 of it); SBRNN worse than the learned "
        "factor graph on average",
        misses,
    ),
    setting=Setting(),
    build=build,
    figures=figures,
    tables=tables,
)
