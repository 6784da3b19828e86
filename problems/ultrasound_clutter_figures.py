"""Pictures of the clutter study: maximum-intensity projections as in Fig. 6, error against layers as in Fig. 6d."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from convexlearn.problems.catalogue import Result
from convexlearn.problems.ultrasound_movies import Movies
from convexlearn.randomness import make_generator
from convexlearn.report import new_axes, plot_records

TILES = 3
"""The projections show a movie of TILES x TILES pieces, each decided on its own."""

SHOWN = 4
"""Test movies over which the error after each layer is averaged."""


def figures(result: Result) -> dict[str, Any]:
    """Axes by file name."""
    return {
        "projections": plot_projections(result),
        "layers": plot_layers(result),
        "blood": plot_records(result.records, "blood"),
    }


def plot_projections(result: Result) -> Any:
    """Largest modulus over time: the movie, the true blood flow, and every rule's; returns the first Axes."""
    movies: Movies = result.study.test.movies
    pixels = movies.pixels
    D, (_, S) = replace(movies, pixels=TILES * pixels).draw(1, make_generator(result.seed, "projections"))
    pictures = {"observed": D, "blood": S}
    pieces = cut(D, pixels)
    scale = pieces.abs().amax((1, 2), keepdim=True)
    with torch.no_grad():
        for name, rule in result.rules.items():
            pictures[name] = join(scale * rule(pieces / scale)[1], pixels)
    grid = new_axes(2, 4, (12.0, 6.6))
    for ax in grid.flat:
        ax.set_axis_off()
    top = S.abs().max().item()
    for ax, (name, movie) in zip(grid.flat, pictures.items()):
        side = TILES * pixels
        image = movie[0].abs().amax(1).reshape(side, side).numpy()
        ax.imshow(image, cmap="hot", vmin=0, vmax=image.max() if name == "observed" else top)
        ax.set_title(name)
    return grid[0, 0]


def plot_layers(result: Result) -> Any:
    """Mean of |S - S_true|^2 after each layer or iteration (Fig. 6d)."""
    ax, test = new_axes(), result.study.test
    D, true = test.x[:SHOWN], test.s[:SHOWN, 1]
    for name, rule in result.rules.items():
        if not hasattr(rule, "iterates"):
            with torch.no_grad():
                level = (rule(D)[1] - true).abs().square().mean().item()
            ax.axhline(level, label=name, color="gray", linestyle="--" if name == "network" else ":")
            continue
        with torch.no_grad():
            errors = (rule.iterates(D)[1][1:] - true).abs().square().mean((1, 2, 3))  # pyright: ignore
        ax.plot(range(1, len(errors) + 1), errors.numpy(), marker=".", label=name)
    ax.set(xlabel="layer or iteration", ylabel="mean squared error of the blood part", xscale="log", yscale="log")
    ax.legend(fontsize=8)
    return ax


def cut(movie: Tensor, pixels: int) -> Tensor:
    """Pieces `(t t, pixels^2, q)` of a movie `(1, (t pixels)^2, q)`, row by row."""
    t = round(movie.shape[1] ** 0.5) // pixels
    pieces = movie.reshape(t, pixels, t, pixels, -1).transpose(1, 2)
    return pieces.reshape(t * t, pixels * pixels, -1)


def join(pieces: Tensor, pixels: int) -> Tensor:
    """The movie `(1, (t pixels)^2, q)` of its pieces, the inverse of `cut`."""
    t = round(len(pieces) ** 0.5)
    movie = pieces.reshape(t, t, pixels, pixels, -1).transpose(1, 2)
    return movie.reshape(1, (t * pixels) ** 2, -1)
