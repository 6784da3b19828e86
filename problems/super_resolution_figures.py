"""Pictures of the super-resolution study: reconstructions, the oracle's grid, learned weights, histories."""

import math
from typing import Any

import torch
from torch import Tensor

from convexlearn.problems import sample_efficiency, spectrum
from convexlearn.problems.catalogue import Result
from convexlearn.problems.images import TEST, picture_grid
from convexlearn.report import new_axes, plot_history, plot_records
from convexlearn.rules.iterative import Unfolded

SHOWN = ("astronaut", "camera", "chelsea")
"""Test photographs in the picture of reconstructions."""

LEFT_OUT = ("oracle rho", "FISTA, tuned rho")
"""Rules that look like another one in the picture."""


def figures(result: Result) -> dict[str, Any]:
    """Axes by file name: reconstructions, records, layers, and what the traces of a tuning run allow."""
    axes = {"reconstructions": plot_reconstructions(result), "psnr": plot_records(result.records, "psnr")}
    axes["psnr"].set_xlabel("PSNR on held-out photographs (dB), mean and standard error")
    axes["layers"] = plot_layers(result)
    axes["parameters"] = spectrum.plot_parameters(result, "mse")
    if "oracle rho" in result.traces:
        axes["rho"] = plot_rho(result)
    if "tuned weights" in result.rules:
        axes["weights"] = plot_weights(result)
    if any(len(curve.counts) > 1 for curve in sample_efficiency.curves(result).values()):
        axes["efficiency"] = sample_efficiency.plot_efficiency(result, "mse", ["bicubic", "hand-set rho"])
    histories = {n: t for n, t in sample_efficiency.traces(result).items() if isinstance(t, list)}
    if histories:
        axes["histories"] = plot_histories(histories)
    return axes


def plot_histories(histories: dict[str, Any]) -> Any:
    """Loss and validation error of every fit by gradient steps, side by side; returns the first Axes."""
    grid = new_axes(1, len(histories), (4.0 * len(histories), 3.0))
    for ax, (name, history) in zip(grid.flat if len(histories) > 1 else [grid], histories.items()):
        keys = [k for k in ("loss", "validation") if any(k in step for step in history)]
        plot_history(history, keys, ax=ax).set_title(name)
        ax.set_yscale("log")
        ax.set_ylabel("mean squared error")
    return grid.flat[0] if len(histories) > 1 else grid


def plot_layers(result: Result) -> Any:
    """Error after each layer (as Fig. 6d), and of four times as many iterations of FISTA at the tuned rho."""
    ax, test = new_axes(), result.study.test
    shown = {name: rule for name, rule in result.rules.items() if isinstance(getattr(rule, "rule", None), Unfolded)}
    learned: Any = result.rules["FISTA, tuned rho"]
    longer = Unfolded(learned.rule.iteration, 4 * max(rule.rule.layers for rule in shown.values()))  # pyright: ignore
    longer.assign("rho", learned.rule.rho.detach())
    shown["FISTA, tuned rho"] = type(learned)(longer, learned.stride, learned.precision)
    for name, rule in shown.items():
        with torch.no_grad():
            errors = (rule.iterates(test.x) - test.s).square().flatten(2).mean((1, 2))  # pyright: ignore
        ax.plot(range(1, len(errors)), errors[1:].numpy(), marker=".", label=name)
    ax.axhline(
        result.record("tuned rho").measure("mse").mean, color="0.5", linestyle="--", label="tuned rho, converged"
    )
    ax.set(yscale="log", xlabel="layer or iteration", ylabel="mean squared error")
    ax.legend(fontsize=8)
    return ax


def tables(result: Result) -> dict[str, str]:
    """Time of a decision that is alone in its batch, and error by number of training pictures where that was asked."""
    shown = {"one picture at a time": spectrum.alone(result, "mse")}
    if any(len(curve.counts) > 1 for curve in sample_efficiency.curves(result).values()):
        shown["mse on the test pictures after training on so many"] = sample_efficiency.efficiency(result)
    return shown


def plot_reconstructions(result: Result) -> Any:
    """Truth, picture and every rule's decision, one photograph a row, with PSNR; returns the first Axes."""
    rules = {name: rule for name, rule in result.rules.items() if name not in LEFT_OUT}
    test = result.study.test.subset(torch.tensor([TEST.index(name) for name in SHOWN]))
    columns = {"truth": test.s, "low-resolution": _trimmed(test.x, test.s)}
    with torch.no_grad():
        columns.update({name: test(rule).decision for name, rule in rules.items()})

    def note(name: str, i: int) -> str:
        picture = columns[name][i]
        is_decision = name != "truth" and picture.shape == test.s[i].shape
        return f"PSNR {_psnr(picture, test.s[i]):.1f} dB" if is_decision else ""

    grid = picture_grid(columns, note)
    title = "Super-resolution of held-out photographs: twice the resolution from blurred, decimated, noisy pictures"
    grid[0, 0].figure.suptitle(title, fontsize=13)
    for i, name in enumerate(SHOWN):
        grid[i, 0].set_ylabel(name, fontsize=11)
    return grid[0, 0]


def plot_rho(result: Result) -> Any:
    """The test error over the oracle's grid, with the hand-set and the tuned value marked; returns the Axes."""
    found, ax = result.traces["oracle rho"], new_axes()
    ax.fill_between(
        found.values,
        found.means - found.standard_errors,
        found.means + found.standard_errors,
        alpha=0.2,
        label="one standard error",
    )
    ax.plot(found.values, found.means, "o-", markersize=3, label="grid searched on the test photographs")
    for name, style in (("hand-set rho", ":"), ("tuned rho", "-")):
        value = result.rules[name].rule.rho.item()  # pyright: ignore
        ax.axvline(value, color="C3", linestyle=style, label=f"{name} = {value:.2g}")
    bicubic = result.record("bicubic").measure("mse").mean
    ax.axhline(bicubic, color="0.5", linestyle="--", label="bicubic")
    ax.set(xscale="log", yscale="log", xlabel="rho (intensity)", ylabel="mean squared error")
    ax.set_title("Error on held-out photographs by the weight of the 1-norm")
    ax.legend(fontsize=8)
    return ax


def plot_weights(result: Result) -> Any:
    """The tuned rho_i of each DCT coefficient, by vertical and horizontal frequency; returns the Axes."""
    rho = result.rules["tuned weights"].rule.rho.detach()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    side = math.isqrt(len(rho) + 1)
    values = torch.cat([rho.new_full((1,), math.nan), rho]).reshape(side, side)
    ax = new_axes()
    image = ax.imshow(values.numpy(), cmap="viridis")
    ax.figure.colorbar(image, ax=ax, label="rho_i (intensity)")
    ax.set(xlabel="horizontal frequency", ylabel="vertical frequency", title="Tuned weight of each DCT coefficient")
    return ax


def _trimmed(x: Tensor, s: Tensor) -> Tensor:
    """The part of the pictures x that lies beneath the decisions s."""
    margin = (x.shape[1] - s.shape[1] // 2) // 2
    return x[:, margin:-margin, margin:-margin]


def _psnr(picture: Tensor, truth: Tensor) -> float:
    return -10 * math.log10(float((picture - truth).square().mean()))
