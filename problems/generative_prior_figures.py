"""Tables and pictures of the compressed-sensing study: errors by measurements, digits, samples of the priors."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convexlearn.problems.catalogue import Result
from convexlearn.problems.digits import SIDE, pictures
from convexlearn.report import Estimate, format_table, new_axes, plot_history, plot_records
from convexlearn.rules.deep_prior import DeepPrior
from convexlearn.tune import History

SHOWN = 8
"""Number of digits in a picture."""

SEARCHED = 32
"""Number of test pictures on which the search for the latent is described."""


@dataclass(frozen=True)
class Sweep:
    """Trace of a rule fitted at several ratios of measurements to pixels: errors on the test pictures, main trace."""

    ratios: tuple[float, ...]
    errors: tuple[Estimate, ...]
    trace: Any = None

    @property
    def stopped(self) -> str:
        """Why the main fit ended early, or nothing."""
        return str(getattr(self.trace, "stopped", ""))


def tables(result: Result) -> dict[str, str]:
    """How the searches for latents went; errors by ratio of measurements where that was asked."""
    shown = {f"search for the latent on the first {SEARCHED} test pictures": _searches(result)}
    sweeps = _sweeps(result)
    if sweeps:
        ratios = next(iter(sweeps.values())).ratios
        rows = [[name, *(e.text() for e in sweep.errors)] for name, sweep in sweeps.items()]
        shown["mse by measurements per pixel"] = format_table(["rule", *(f"{r:.0%}" for r in ratios)], rows)
    return shown


def figures(result: Result) -> dict[str, Any]:
    """Axes by file name: records, reconstructions, samples of the priors, and what the traces of a run allow."""
    axes = {"mse": plot_records(result.records, "mse"), "digits": plot_digits(result), "samples": plot_samples(result)}
    histories = {n: t.trace for n, t in result.traces.items() if isinstance(getattr(t, "trace", None), History)}
    if histories:
        axes["histories"] = ax = new_axes()
        for name, history in histories.items():
            plot_history(history, ["validation"], ax, name)
        ax.set(xscale="log", yscale="log", ylabel="mse on validation pictures")
    if _sweeps(result):
        axes["measurements"] = plot_sweep(result)
    return axes


def plot_digits(result: Result) -> Any:
    """Truth and every rule's decision, one digit a column; returns the first Axes."""
    pairs = result.study.test.subset(torch.arange(SHOWN))
    with torch.no_grad():
        rows = {"truth": pairs.s} | {name: pairs(rule).decision for name, rule in result.rules.items()}
    return _mosaic(rows, f"Held-out digits from {pairs.x.shape[1]} noisy measurements of {SIDE**2} pixels")


def plot_samples(result: Result) -> Any:
    """Digits of the training data, and what the priors make of standard normal latents; returns the first Axes."""
    generator = torch.Generator().manual_seed(0)
    rows = {"training data": pictures("train")[:SHOWN]}
    for name, rule in _deep(result).items():
        z = torch.randn(SHOWN, rule.latent, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            rows[name] = rule.generator(z)
    return _mosaic(rows, "Samples of the priors")


def plot_sweep(result: Result) -> Any:
    """Error against the number of measurements per pixel; returns the Axes."""
    ax = new_axes()
    for name, sweep in _sweeps(result).items():
        means, errors = zip(*((e.mean, e.standard_error) for e in sweep.errors))
        ax.errorbar(sweep.ratios, means, errors, fmt=".-", capsize=3, label=name)
    ax.set(xscale="log", yscale="log", xlabel="measurements per pixel", ylabel="mse on held-out digits")
    ax.legend(fontsize=8)
    return ax


def _searches(result: Result) -> str:
    rows = []
    for name, rule in _deep(result).items():
        with torch.no_grad():
            found = rule.solve(result.study.test.x[:SEARCHED])
        steps, share = found.iterations.double().mean().item(), found.converged.double().mean().item()
        rows.append([name, f"{rule.weight.item():.3g}", str(rule.restarts), f"{steps:.1f}", f"{share:.1%}"])
    return format_table(["rule", "weight", "restarts", "Newton steps", "converged"], rows)


def _mosaic(rows: dict[str, Tensor], title: str) -> Any:
    grid = new_axes(len(rows), SHOWN, (1.0 * SHOWN + 1.5, 1.0 * len(rows) + 0.5))
    for i, (name, row) in enumerate(rows.items()):
        for j, picture in enumerate(row):
            ax = grid[i, j]
            ax.imshow(picture.reshape(SIDE, SIDE).clamp(0, 1).numpy(), cmap="gray_r", vmin=0, vmax=1)
            ax.set_xticks([])
            ax.set_yticks([])
        grid[i, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    grid[0, 0].figure.suptitle(title, fontsize=11)
    return grid[0, 0]


def _deep(result: Result) -> dict[str, DeepPrior]:
    return {name: rule for name, rule in result.rules.items() if isinstance(rule, DeepPrior)}


def _sweeps(result: Result) -> dict[str, Sweep]:
    return {name: trace for name, trace in result.traces.items() if isinstance(trace, Sweep) and trace.ratios}
