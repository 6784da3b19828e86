"""Curves of error against the number of training samples."""

import torch
from torch import nn

from convexlearn.objectives import squared_error
from convexlearn.problems.catalogue import Budget, find, judge
from convexlearn.problems.sample_efficiency import SampleCurve, Samples, curves, efficiency, plot_efficiency, traces
from convexlearn.rules.affine import AffineRule
from convexlearn.simulate.pairs import Pairs


def pairs(count, slope=2.0):
    x = torch.arange(count, dtype=torch.float64)[:, None]
    return Pairs(x, slope * x)


class Slope(nn.Module):
    """s = w x."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        return self.w * x


def test_every_fit_starts_anew_on_the_first_samples():
    seen = []

    def make(train, validation):
        def fit(rule, budget):
            seen.append((len(train), len(validation), train.x[-1].item(), rule.w.item()))
            with torch.no_grad():
                rule.w.fill_(2 - 1 / len(train))
            return "trace"

        return fit

    rule = Slope()
    samples = Samples(pairs(64), pairs(32), Pairs(torch.ones(3, 1), 2 * torch.ones(3, 1)), squared_error, (2, 8, 1000))
    curve = samples.fit(make)(rule, Budget())
    assert seen == [(2, 4, 1.0, 0.0), (8, 4, 7.0, 0.0), (64, 32, 63.0, 0.0)]
    assert curve.counts == (2, 8, 64)
    assert [e.mean for e in curve.errors] == [1 / n**2 for n in curve.counts]
    assert rule.w.item() == 2 - 1 / 64
    assert curve.trace == "trace"
    assert curve.stopped == ""


def test_an_interrupted_fit_ends_the_curve():
    class Interrupted:
        stopped = "interrupted after step 3"

    samples = Samples(pairs(8), pairs(8), pairs(8), squared_error, (2, 4))
    curve = samples.fit(lambda train, validation: lambda rule, budget: Interrupted())(Slope(), Budget())
    assert curve.counts == ()
    assert curve.stopped == "interrupted after step 3"


def test_tables_and_figures_show_the_rules_that_have_a_curve():
    entry = find("admm-recovery")
    study = entry.build(0, entry.configure(curves=False, layers=2))
    found = {}
    for name in ("affine", "lambda, mu tuned"):
        found[name] = study.contenders[name].fit(study.contenders[name].rule, Budget(steps=2))
    result = judge(entry, study, 0, {**found, "other": "no curve"})
    assert set(curves(result)) == set(found)
    assert traces(result)["other"] == "no curve"
    assert len(traces(result)["lambda, mu tuned"]) == 2
    lines = efficiency(result).splitlines()
    assert lines[0].split() == ["rule", "4096"]
    error = result.record("affine").measure("squared_error")
    assert error.text() in lines[2]
    ax = plot_efficiency(result, "squared_error", ["converged"])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["converged", *found]


def test_the_affine_rule_of_admm_recovery_is_the_least_squares_fit():
    entry = find("admm-recovery")
    study = entry.build(0, entry.configure(curves=True, layers=1))
    rule = study.contenders["affine"].rule
    curve = study.contenders["affine"].fit(rule, Budget())
    assert isinstance(curve, SampleCurve)
    assert curve.counts == (16, 256, 4096)
    means = [e.mean for e in curve.errors]
    assert means == sorted(means, reverse=True)
    assert isinstance(rule, AffineRule)
    x = study.test.x
    optimum = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), study.test.s)
    best = (torch.cat([x, torch.ones(len(x), 1)], 1) @ optimum.solution - study.test.s).square().sum(1).mean()
    assert best < means[-1] < 1.1 * best
