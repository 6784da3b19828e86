"""Tables and pictures of the deblurring study: gains by pairs, reconstructions, PSNR by iteration."""

from typing import Any

import torch
from torch import Tensor

from convexlearn.problems.catalogue import Result
from convexlearn.problems.fitting import histories
from convexlearn.problems.images import TEST, picture_grid
from convexlearn.report import Estimate, format_table, new_axes, plot_records
from convexlearn.rules.iterative import Converged, Unfolded

SHOWN = (0, 1, 2)
"""Test pictures that are drawn."""


def trained(result: Result) -> str:
    """Name of the unfolded network whose denoiser was trained further."""
    return next(name for name in result.rules if name.startswith("PnP-ADMM, "))


def decibels(decision: Tensor, truth: Tensor) -> Tensor:
    """PSNR of each picture, `(..., B)`."""
    return -10 * (decision - truth).square().flatten(-2).mean(-1).log10()


def psnrs(result: Result) -> dict[str, Tensor]:
    """PSNR of every test picture by rule, `(B,)`; dB."""
    test = result.study.test
    with torch.no_grad():
        return {name: decibels(test(rule).decision, test.s) for name, rule in result.rules.items()}


def gain(better: Tensor, worse: Tensor) -> Estimate:
    """Mean difference of two rules' PSNR `(B,)` over the pictures, and its standard error; dB."""
    difference = better - worse
    return Estimate(float(difference.mean()), float(difference.std() / len(difference) ** 0.5))


def tables(result: Result) -> dict[str, str]:
    """Gains in PSNR, picture by picture, of the plugged-in and of the trained denoiser."""
    found, compared = psnrs(result), ("PnP-ADMM", trained(result))
    rows = [[name, *(gain(found[better], found[name]).text() for better in compared)] for name in found]
    title = "gain in PSNR over the other rules, mean and standard error of the differences by picture (dB)"
    return {title: format_table(["over", *compared], rows)}


def figures(result: Result) -> dict[str, Any]:
    """Axes by file name: reconstructions, records, PSNR by iteration, histories of the fits."""
    axes = {"reconstructions": plot_reconstructions(result), "iterations": plot_iterations(result)}
    axes["psnr"] = plot_records(result.records, "psnr")
    axes["psnr"].set_xlabel("PSNR on held-out photographs (dB), mean and standard error")
    return axes | histories(result)


def plot_iterations(result: Result) -> Any:
    """Mean PSNR after each iteration or layer; total variation as a line where it has converged."""
    ax, test = new_axes(), result.study.test
    for name, rule in result.rules.items():
        if isinstance(rule, Unfolded):
            with torch.no_grad():
                found = decibels(rule.iterates(test.x)[1:], test.s).mean(1)
            ax.plot(range(1, len(found) + 1), found.numpy(), marker=".", label=name)
        elif isinstance(rule, Converged):
            style = "--" if name.startswith("iso") else ":"
            ax.axhline(result.record(name).measure("psnr").mean, color="0.5", linestyle=style, label=name)
    ax.set(xscale="log", xlabel="iteration or layer", ylabel="PSNR (dB)", title="Held-out photographs")
    ax.legend(fontsize=8)
    return ax


def plot_reconstructions(result: Result) -> Any:
    """Truth and every rule's decision with its PSNR, one picture a row; returns the first Axes."""
    test = result.study.test.subset(torch.tensor(SHOWN))
    columns = {"truth": test.s}
    with torch.no_grad():
        columns.update({name: test(rule).decision for name, rule in result.rules.items()})
    grid = picture_grid(
        columns, lambda name, i: "" if name == "truth" else f"{decibels(columns[name][i], test.s[i]).item():.1f} dB"
    )
    for i, k in enumerate(SHOWN):
        grid[i, 0].set_ylabel(TEST[k], fontsize=11)
    grid[0, 0].figure.suptitle("Deblurring of held-out photographs", fontsize=13)
    return grid[0, 0]
