"""Pictures and tables of the dispatch: cost gap against violation, and the worst that happens on test loads."""

from typing import Any

import numpy as np
import torch

from convexlearn.problems.catalogue import Result
from convexlearn.problems.fitting import histories
from convexlearn.report import format_table, new_axes, plot_records

INSIDE = (
    "optimum",
    "penalties, then projected",
    "imitation, then projected",
    "affine, projected",
    "network, projected",
    "network, completed",
)
"""Rules whose decisions keep all constraints."""

SHOWN = ("penalties, 10 $/MWh", "completed, penalties", "network, projected")
"""Rules of the histogram."""

FLOOR = 1e-14
"""Violations (MW) are drawn from here on."""

LINE = 0.17
"""Distance between two names, in decades of the gap."""


def samples(result: Result, name: str) -> dict[str, np.ndarray]:
    """The measures of one rule on every test load, `(N,)` each."""
    study = result.study
    with torch.no_grad():
        trajectory = study.test(result.rules[name])
    return {measure: function(trajectory).numpy() for measure, function in study.measures.items()}


def worst(result: Result, name: str) -> dict[str, float]:
    """The largest value of each measure over all test loads."""
    return {measure: float(values.max()) for measure, values in samples(result, name).items()}


def figures(result: Result) -> dict[str, Any]:
    """Gap against violation, the histogram of violations, gaps and tuning histories."""
    axes = {"gap_and_violation": plot_gap_and_violation(result), "violations": plot_violations(result)}
    return {**axes, "gap": plot_records(result.records, "gap"), **histories(result)}


def tables(result: Result) -> dict[str, str]:
    """The largest gap and violation over the test loads by rule."""
    rows = []
    for record in result.records:
        most = worst(result, record.name)
        excess, share = most["violation"], record.measure("violated").mean
        rows.append([record.name, f"{most['gap']:.3f}", f"{excess:.1e}", f"{excess / 100:.1e}", f"{share:.1%}"])
    header = ["rule", "gap (%)", "violation (MW)", "violation (p.u.)", "loads with a violation over 1e-6 MW"]
    return {f"the worst of {len(result.study.test)} test loads": format_table(header, rows)}


def plot_gap_and_violation(result: Result) -> Any:
    """Mean gap against mean largest violation, one point per rule; returns the Axes."""
    ax = new_axes(size=(8.0, 5.0))
    for inside, marker in ((True, "o"), (False, "x")):
        points = {
            r.name: (max(r.measure("violation").mean, FLOOR), max(r.measure("gap").mean, 1e-5))
            for r in result.records
            if (r.name in INSIDE) == inside
        }
        ax.scatter(*zip(*points.values()), color="C0" if inside else "C1", marker=marker)
        _label(ax, points)
    ax.set(xscale="log", yscale="log", xlabel="mean largest violation (MW)", ylabel="mean cost gap (%)")
    ax.margins(x=0.35, y=0.15)
    return ax


def _label(ax: Any, points: dict[str, tuple[float, float]]) -> None:
    """Names to the right of the rightmost point, by height, at least LINE apart, with a line to their point."""
    right, below = max(x for x, _ in points.values()), -np.inf
    for name, (x, y) in sorted(points.items(), key=lambda item: item[1][1]):
        below = max(np.log10(y), below + LINE)
        ax.annotate(
            name,
            (x, y),
            (4 * right, 10**below),
            fontsize=7,
            va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "0.5", "shrinkB": 2, "relpos": (0, 0.5)},
        )


def plot_violations(result: Result) -> Any:
    """Histogram over the test loads of the largest violation; returns the Axes."""
    ax, bins = new_axes(), np.arange(np.log10(FLOOR), 2.6, 0.25)
    for name in SHOWN:
        excess = samples(result, name)["violation"].clip(min=FLOOR)
        ax.hist(np.log10(excess), bins=bins, alpha=0.6, label=name)
    ax.set(xlabel="log10 of the largest violation of a load (MW)", ylabel="test loads")
    ax.legend(fontsize=8)
    return ax
