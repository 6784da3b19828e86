"""The catalogue's symbol detection: its channels, its declaration, and its fits in a small setting."""

import math

import pytest
import torch

from convexlearn.chain import ChainFactors, best_path, log_marginals
from convexlearn.errors import OptionError
from convexlearn.problems import find, symbol_detection
from convexlearn.problems.catalogue import Budget
from convexlearn.report import Estimate, Record

SMALL = {"spacing": 8, "channels": 2, "blocks": 4, "length": 100, "hidden": 8}
TRELLIS = symbol_detection.TRELLIS


@pytest.fixture(scope="module")
def study():
    entry = find("symbol-detection")
    return entry.build(0, entry.configure(**SMALL))


def test_channels_are_the_published_ones():
    channel = symbol_detection.Setting(spacing=2).channel(1)
    assert channel.taps.shape == (9 * 20, 4)
    for k, ratio in enumerate(range(-6, 11, 2)):
        for i in range(20):
            own, gamma = k * 20 + i, 0.1 * (i + 1)
            expected = torch.tensor([math.exp(-gamma * lag) for lag in range(4)], dtype=torch.float64)
            torch.testing.assert_close(channel.taps[own], expected)
            assert channel.deviation[own].item() ** 2 == pytest.approx(10 ** (-ratio / 10))


def test_the_declared_problem_is_the_most_probable_sequence():
    """The shortest path by CVXPY's LP costs what Viterbi's path costs."""
    generator = torch.Generator().manual_seed(0)
    unary = torch.randn(3, TRELLIS.size, generator=generator, dtype=torch.float64)
    problem = symbol_detection.declare(3)
    for parameter in problem.parameters():
        own = -unary[int(parameter.name().removeprefix("cost"))]
        parameter.value = own.expand(TRELLIS.size, -1).numpy()
    problem.solve(solver="CLARABEL")
    path = best_path(ChainFactors(TRELLIS.transitions, unary))
    flows = {v.name(): torch.as_tensor(v.value) for v in problem.variables()}
    assert [int(flows[f"flow{t}"].sum(0).argmax()) for t in range(3)] == path.tolist()
    assert problem.value == pytest.approx(-unary.gather(1, path[:, None]).sum().item(), abs=1e-6)


def test_measures_are_error_rates_of_their_own_channels(study):
    trajectory = study.test(study.contenders["BCJR"].rule)
    wrong = (trajectory.decision.argmax(-1) != trajectory.target).double().mean(-1)  # (B, C)
    rates = torch.stack([measure(trajectory) for measure in study.measures.values()], 1).double()
    torch.testing.assert_close(rates, wrong.unflatten(1, (3, 2)).mean(-1))


def test_receivers_differ_in_what_they_know(study):
    x, estimates = study.test.x
    exact, told = study.contenders["BCJR"].rule, study.contenders["BCJR, uncertain CSI"].rule
    assert torch.equal(exact(x, estimates), exact(x, 2 * estimates))
    assert not torch.equal(told(x, estimates), told(x, 2 * estimates))
    true = exact.factor.taps
    torch.testing.assert_close(told(x, true.expand(len(x), -1, -1)), exact(x, estimates))


def test_viterbi_decides_on_the_sequence(study):
    decision = study.contenders["Viterbi"].rule(*study.test.x)
    factors = study.contenders["BCJR"].rule.factor(*study.test.x)
    marginals = log_marginals(factors, semiring="max")
    assert torch.equal(decision, TRELLIS.labels[marginals.argmax(-1)])


def test_a_classifier_learns_states_and_serves_as_the_likelihood(study):
    name = "learned factor graph"
    contender, exact = study.contenders[name], study.contenders["BCJR"].rule
    contender.fit(contender.rule, Budget(steps=250))
    with torch.no_grad():
        found, least = (
            (rule(*study.test.x).argmax(-1) != study.test.s).double().mean().item() for rule in (contender.rule, exact)
        )
    assert found < 1.15 * least


def test_the_linear_part_starts_at_the_maximum_of_likelihood(monkeypatch):
    """Before the gradient steps the residual network is the softmax regression of the training blocks' states."""
    entry = find("symbol-detection")
    fresh = entry.build(1, entry.configure(**SMALL)).contenders["learned factor graph"]
    train = entry.configure(**SMALL).channel(50).draw(4, torch.Generator().manual_seed(1))[0]
    assert not any(fresh.rule.factor.scores(train.x).flatten())
    monkeypatch.setattr(symbol_detection, "gradient", lambda *data, **options: lambda rule, budget: None)
    symbol_detection.classify(train)(fresh.rule, Budget())
    for c in range(train.x.shape[1]):
        x = train.x[:, c, 3:].flatten()
        states = TRELLIS.states(train.s[:, c]).flatten()
        found = torch.softmax(fresh.rule.factor.scores(train.x)[:, c, 3:].reshape(-1, TRELLIS.size), -1)
        sent = torch.nn.functional.one_hot(states, TRELLIS.size).double()
        for feature in (torch.ones_like(x), x):  # the likelihood's gradient to biases and weights
            assert ((found - sent) * feature[:, None]).mean(0).abs().max() < 1e-4


def test_expected_errors_average_to_counted_ones(study):
    """Errors expected given the observations are those counted, over fresh blocks, within four standard errors."""
    exact, sequence = study.contenders["BCJR"].rule, study.contenders["Viterbi"].rule
    setting = find("symbol-detection").configure(**SMALL)
    blocks = setting.channel(200, estimate=0.0).draw(40, torch.Generator().manual_seed(2))[0]
    known = symbol_detection.with_posteriors(exact, blocks)
    for rule in (exact, sequence):
        for counted, expected in zip(
            symbol_detection.measures(setting.names, 2).values(),
            symbol_detection.measures(setting.names, 2, symbol_detection.expected_error_rate).values(),
        ):
            with torch.no_grad():
                gap = (counted(blocks(rule)) - expected(known(rule))).double()
            assert abs(gap.mean()) < 4 * gap.std() / math.sqrt(len(gap))
    ratios = symbol_detection.expected(sequence, exact, known, setting.names)
    assert all(ratio.mean >= 1 for ratio in ratios.values())  # no decision expects fewer errors than BCJR's
    same = symbol_detection.expected(exact, exact, known, setting.names)
    assert [(ratio.mean, ratio.standard_error) for ratio in same.values()] == [(1.0, 0.0)] * 3


def test_excesses_name_the_ratios_at_which_a_rule_errs_more():
    setting = find("symbol-detection").configure(**SMALL)
    exact = symbol_detection.build(0, setting).contenders["BCJR"].rule
    options = {"blocks": 4, "length": 200}
    assert symbol_detection.excesses(symbol_detection.excess(exact, exact, setting.names, 0, **options)) == []
    worse = symbol_detection.build(0, setting).contenders["BCJR"].rule
    worse.factor.taps = worse.factor.taps * torch.tensor([1.0, 1.0, 0.3])[:, None, None].expand(3, 2, 4).flatten(0, 1)
    found = symbol_detection.excesses(symbol_detection.excess(worse, exact, setting.names, 0, **options))
    assert len(found) == 1
    assert "expected error at 10 dB, over 1.15" in found[0]


def test_bcjr_has_the_known_error_rates():
    setting = symbol_detection.Setting()
    rule = symbol_detection.build(0, setting).contenders["BCJR"].rule
    assert symbol_detection.departures(setting, rule, 1, blocks=8, length=500) == []
    with torch.no_grad():
        rule.factor.deviation = 1.1 * rule.factor.deviation
    rule.factor.taps = 0.8 * rule.factor.taps
    assert len(symbol_detection.departures(setting, rule, 1, blocks=8, length=500)) >= 1


def test_failures_name_what_is_missing():
    entry = find("symbol-detection")
    setting = entry.configure(**{**SMALL, "spacing": 4})
    study = entry.build(0, setting)
    known = list(symbol_detection.KNOWN.values())

    def row(name, factors):
        rates = {m: Estimate(f * rate, 0.001 * rate) for m, f, rate in zip(study.measures, factors, known)}
        return Record(name, rates)

    def result(changes):
        good = {
            "BCJR": [1.0] * 5, "Viterbi": [1.0] * 5, "learned factor graph": [1.1] * 5, "SBRNN": [1.2] * 5,
            "BCJR, uncertain CSI": [1.0, 1.05, 1.2, 2.0, 30.0], "tuned BCJR, uncertain CSI": [1.0] * 5,
            "learned factor graph, uncertain CSI": [1.1, 1.1, 1.1, 1.2, 1.5], "SBRNN, uncertain CSI": [1.3] * 5,
        }  # fmt: skip
        records = tuple(row(name, factors) for name, factors in (good | changes).items())
        return symbol_detection.Result(entry, study, 0, records)

    assert symbol_detection.failures(result({})) == []
    for name, factors, sentence in (
        ("learned factor graph", [1.2] * 5, "on average"),
        ("learned factor graph, uncertain CSI", [1.0, 1.0, 1.0, 1.5, 1.5], "uncertain channels it has 0.750"),
        ("SBRNN", [1.0] * 5, "SBRNN is no worse than learned factor graph"),
    ):
        assert any(sentence in text for text in symbol_detection.failures(result({name: factors}))), sentence


def test_tables_and_figures_of_a_small_run():
    entry = find("symbol-detection")
    result = entry.tune(0, 1, **SMALL)
    texts = entry.tables(result)
    assert list(texts) == [
        "expected error rate relative to BCJR",
        "expected error rate relative to BCJR with uncertain taps",
        "expected error rate relative to BCJR on 50 more blocks of 1000 symbols of each channel",
    ]
    drawn = entry.figures(result)
    assert len(drawn["errors"].containers) == len(result.records)
    assert drawn["errors"].get_yscale() == "log"
    assert len(drawn["history"].lines) == 5


def test_wrong_options_are_refused():
    with pytest.raises(OptionError, match="two blocks"):
        symbol_detection.Setting(blocks=1)
