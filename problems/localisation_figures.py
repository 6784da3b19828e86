"""Pictures and tables of the two localisation problems: reconstructions, layers, mismatch."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from convexlearn.problems.catalogue import Result
from convexlearn.problems.localisation import f1, spread, spread_error
from convexlearn.report import Estimate, format_table, new_axes, plot_records
from convexlearn.rules.iterative import Unfolded
from convexlearn.simulate.base import Trajectory

SHOWN = ("FISTA 100", "FISTA converged", "network", "unfolded")
"""Rules whose pictures are drawn."""


def figures(result: Result) -> dict[str, Any]:
    """Axes by file name: what both problems draw."""
    axes = {"reconstructions": plot_reconstructions(result), "layers": plot_layers(result)}
    return {**axes, "f1": plot_records(result.records, "f1"), "f1_wide": plot_records(result.records, "f1_wide")}


def plot_reconstructions(result: Result, samples: Sequence[int] = (0, 1, 2)) -> Any:
    """What the camera shows, the truth and the rules' pictures with the found points circled; the first Axes."""
    test = result.study.test.subset(torch.tensor(samples))
    grid = new_axes(len(samples), 2 + len(SHOWN), (2.1 * (2 + len(SHOWN)), 2.3 * len(samples)))
    for i in range(len(samples)):
        _show(grid[i, 0], test.x[i], "camera" if i == 0 else "")
        _show(grid[i, 1], spread(test.s[i : i + 1])[0], "truth" if i == 0 else "")
    for j, name in enumerate(SHOWN):
        rule: Any = result.rules[name]
        with torch.no_grad():
            pictures, points = rule.rule(test.x), rule(test.x)
        scores = f1(Trajectory(test.x, points, target=test.s))
        for i in range(len(samples)):
            ax = grid[i, 2 + j]
            _show(ax, spread(pictures[i : i + 1])[0], name if i == 0 else "")
            rows, columns = points[i].nonzero().T.numpy()
            ax.scatter(columns, rows, s=18, facecolors="none", edgecolors="C1", linewidths=0.6)
            ax.set_xlabel(f"F1 {scores[i]:.2f}", fontsize=8)
    return grid[0, 0]


def plot_layers(result: Result) -> Any:
    """Error of the blurred picture after each layer or iteration, as Fig. 6d; returns the Axes."""
    ax, test = new_axes(), result.study.test
    for name in ("FISTA 100", "unfolded"):
        rule: Any = result.rules[name]
        inner: Unfolded = rule.rule
        with torch.no_grad():
            iterates = inner.iterates(test.x)
        errors = [spread_error(Trajectory(test.x, s, target=test.s)).mean().item() for s in iterates[1:]]
        ax.plot(range(1, len(errors) + 1), errors, marker=".", label=name)
    ax.set(xscale="log", yscale="log", xlabel="layer or iteration", ylabel="squared error of the blurred picture")
    ax.legend(fontsize=8)
    return ax


def plot_maps(pictures: dict[str, Tensor], titles: dict[str, str] | None = None) -> Any:
    """Pictures side by side, on a square-root scale; returns the first Axes."""
    grid = new_axes(1, len(pictures), (2.7 * len(pictures), 3.0))[0]
    for ax, (name, picture) in zip(grid, pictures.items()):
        _show(ax, picture.clamp(min=0).sqrt(), name)
        ax.set_xlabel((titles or {}).get(name, ""), fontsize=8)
    return grid[0]


def mismatch_table(result: Result) -> dict[str, str]:
    """F1 as modelled, with the wider point-spread function, and what is lost, by rule."""
    rows = []
    for record in result.records:
        own, wide = record.measure("f1"), record.measure("f1_wide")
        error = math.hypot(own.standard_error, wide.standard_error)
        lost = Estimate(own.mean - wide.mean, error)
        rows.append([record.name, own.text(), wide.text(), lost.text(), f"{1 - wide.mean / max(own.mean, 1e-12):.0%}"])
    header = ["rule", "F1 as modelled", "F1 at 1.3 x width", "lost", "share lost"]
    return {"point-spread function 1.3 times wider than modelled": format_table(header, rows, 4)}


def _show(ax: Any, picture: Tensor, title: str) -> None:
    ax.imshow(picture.numpy(), cmap="inferno", interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title(title, fontsize=9)
