"""Error against the number of training samples: each rule is fitted anew on the first 1, 2, ... of them (Fig. 4)."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from convexlearn.evaluate import evaluate
from convexlearn.objectives import Objective
from convexlearn.problems.catalogue import Budget, Result
from convexlearn.report import Estimate, format_table, new_axes
from convexlearn.simulate.pairs import Pairs

Fit = Callable[[Any, Budget], Any]


@dataclass(frozen=True)
class SampleCurve:
    """Trace of a rule fitted on several numbers of samples: errors on the test data, and the trace of the last fit."""

    counts: tuple[int, ...]
    errors: tuple[Estimate, ...]
    trace: Any = None

    @property
    def stopped(self) -> str:
        """Why the last fit ended early, or nothing."""
        return str(getattr(self.trace, "stopped", ""))


@dataclass(frozen=True)
class Samples:
    """Training and validation data, and how often to fit with less of them.

    counts: numbers of training samples, beside all. With n of N training samples go n of N validation samples, but at
    least four. The test data only judge.
    """

    train: Pairs
    validation: Pairs
    test: Pairs
    objective: Objective
    counts: Sequence[int] = ()

    def fit(self, make: Callable[[Pairs, Pairs], Fit]) -> Fit:
        """A fit on each number of samples; `make(train, validation)` gives the one on those."""

        def run(rule: Any, budget: Budget) -> SampleCurve:
            start, counts, errors = copy.deepcopy(rule), [], []
            trace: Any = None
            for count in (*(c for c in self.counts if c < len(self.train)), len(self.train)):
                last = count == len(self.train)
                fitted = rule if last else copy.deepcopy(start)
                trace = make(*self.first(count))(fitted, budget)
                if str(getattr(trace, "stopped", "")).startswith("interrupted"):
                    break
                counts.append(count)
                outcome = evaluate(fitted, self.test, self.objective)
                errors.append(Estimate(outcome.mean, outcome.standard_error))
            return SampleCurve(tuple(counts), tuple(errors), trace)

        return run

    def first(self, count: int) -> tuple[Pairs, Pairs]:
        """The first samples for training, and their share of the validation samples."""
        share = min(len(self.validation), max(4, round(count * len(self.validation) / len(self.train))))
        return self.train.subset(torch.arange(count)), self.validation.subset(torch.arange(share))


def curves(result: Result) -> dict[str, SampleCurve]:
    """The rules that were fitted on several numbers of samples."""
    return {name: trace for name, trace in result.traces.items() if isinstance(trace, SampleCurve) and trace.counts}


def traces(result: Result) -> dict[str, Any]:
    """Traces of the fits on all samples."""
    return {name: trace.trace if isinstance(trace, SampleCurve) else trace for name, trace in result.traces.items()}


def efficiency(result: Result) -> str:
    """A table: rules by numbers of training samples."""
    found = curves(result)
    counts = sorted({count for curve in found.values() for count in curve.counts})
    rows = []
    for name, curve in found.items():
        cells: Mapping[int, Estimate] = dict(zip(curve.counts, curve.errors))
        rows.append([name, *(cells[c].text() if c in cells else "" for c in counts)])
    return format_table(["rule", *map(str, counts)], rows)


def plot_efficiency(result: Result, measure: str, untrained: Sequence[str] = ()) -> Any:
    """Error against the number of training samples, `untrained` rules as horizontal lines; returns the Axes."""
    ax = new_axes()
    for name, curve in curves(result).items():
        means, errors = zip(*((e.mean, e.standard_error) for e in curve.errors))
        ax.errorbar(curve.counts, means, errors, fmt=".-", capsize=3, label=name)
    for name, style in zip(untrained, ("--", ":", "-.")):
        ax.axhline(result.record(name).measure(measure).mean, color="0.5", linestyle=style, label=name)
    ax.set(xscale="log", yscale="log", xlabel="training samples", ylabel=measure)
    ax.legend(fontsize=8)
    return ax
