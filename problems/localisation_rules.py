"""The rules that both localisation problems compare: FISTA, its unfolding with convolutions, a network."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor, nn

from convexlearn.convolution import Convolution
from convexlearn.history import History
from convexlearn.iterations.proximal_gradient import FISTA
from convexlearn.networks import ImageNetwork
from convexlearn.problems.catalogue import Budget, Contender, Result
from convexlearn.problems.fitting import Grid
from convexlearn.problems.localisation import FACTOR, LEVELS, Optics, f1, peaks, spread, spread_error
from convexlearn.rules.base import DecisionRule
from convexlearn.rules.iterative import Converged, Unfolded
from convexlearn.rules.neural import NeuralRule
from convexlearn.simulate.base import Trajectory
from convexlearn.simulate.pairs import Pairs
from convexlearn.splitting import Split, split
from convexlearn.tune import tune

RHO = 0.2
"""Weight of the 1-norm that unfolded networks start from."""


def declare(optics: Optics) -> tuple[cp.Problem, Split]:
    """minimize 1/2 |x - V s H'|^2 + rho |s|_1 subject to s >= 0 (Eq. 14 with a nonnegative decision).

    V s H' is the correlation of s with `optics.kernel()`, kept at every fourth pixel: what
    `torch.nn.functional.conv2d` computes with stride 4 and zeros around s, and `Remainder` undoes.
    """
    V, H = (axis.numpy() for axis in optics.axes())
    x, s = cp.Parameter((optics.pixels,) * 2, name="x"), cp.Variable((optics.side,) * 2, name="s")
    rho = cp.Parameter(nonneg=True, name="rho", value=RHO)
    fit = 0.5 * cp.sum_squares(x - cp.Constant(V, name="V") @ s @ cp.Constant(H.T, name="H'"))
    problem = cp.Problem(cp.Minimize(fit + rho * cp.norm1(s)), [s >= 0])
    return problem, split(problem, context=[x], decision=s)


class Localiser(DecisionRule):
    """The peaks of a rule's picture: x `(B, h, w)` -> amplitudes at found points `(B, n, n)`, zero elsewhere.

    level: amplitude from which a local maximum counts as found; chosen by `search`, since peaks have no gradient in it.
    """

    def __init__(self, rule: nn.Module, level: float = 0.1) -> None:
        super().__init__()
        self.rule = rule
        self.level = nn.Parameter(torch.tensor(level, dtype=torch.float64), requires_grad=False)

    def forward(self, *x: Tensor) -> Tensor:
        """The points."""
        return peaks(self.rule(*x), self.level.item())


class Remainder(nn.Module):
    """s - up(down s) + near s: I - step A'A from the kernel `(p, q)` of sqrt(step) A, the slot W2 of images.

    A'A is no convolution of the fine picture, since A keeps every fourth pixel. Both kernels act on the 16 coarse
    pictures that hold the pixels of equal phase: `down` (1, 16, p/4, q/4) and `up` (16, 1, p/4, q/4).
    `near` (16, 16, 3, 3), at first zero, lets neighbouring fine pixels compete, which no A does.
    """

    def __init__(self, kernel: Tensor) -> None:
        super().__init__()
        blocks = [2 * math.ceil((size - FACTOR) / (2 * FACTOR)) + 1 for size in kernel.shape]
        margins = [(FACTOR * n - size) // 2 for n, size in zip(blocks, kernel.shape)]
        padded = nn.functional.pad(kernel, (margins[1],) * 2 + (margins[0],) * 2)
        self.down = nn.Parameter(nn.functional.pixel_unshuffle(padded.unsqueeze(0), FACTOR).unsqueeze(0))
        self.up = nn.Parameter(self.down.detach().transpose(0, 1).flip(2, 3))
        self.near = nn.Parameter(kernel.new_zeros(FACTOR**2, FACTOR**2, 3, 3))

    def forward(self, s: Tensor) -> Tensor:
        """Pictures of the same size."""
        B, h, w = len(s), s.shape[1] // FACTOR, s.shape[2] // FACTOR
        padding = (self.down.shape[2] // 2, self.down.shape[3] // 2)
        phases = s.reshape(B, h, FACTOR, w, FACTOR).permute(0, 2, 4, 1, 3).reshape(B, FACTOR**2, h, w)
        low = nn.functional.conv2d(phases, self.down.to(s), padding=padding)
        change = nn.functional.conv2d(phases, self.near.to(s), padding=1)
        change = change - nn.functional.conv2d(low, self.up.to(s), padding=padding)
        return s + change.reshape(B, FACTOR, FACTOR, h, w).permute(0, 3, 1, 4, 2).reshape(s.shape)


class Scaled(nn.Module):
    """gain * network(x), with the gain that brings the untrained network's pictures closest to those of `pairs`.

    Intensities of the camera are hundreds of times those of the spread points; without it training only learns that.
    """

    def __init__(self, network: nn.Module, pairs: Pairs) -> None:
        super().__init__()
        self.network = network
        with torch.no_grad():
            drawn, true = (spread(picture) for picture in (network(pairs.x), torch.as_tensor(pairs.s)))
        self.gain = nn.Parameter((drawn * true).sum() / drawn.square().sum())

    def forward(self, x: Tensor) -> Tensor:
        """Pictures of the network's size."""
        return self.gain * self.network(x)


def unfold(parts: Split, optics: Optics, layers: int, **slots: Any) -> Unfolded:
    """FISTA's layers with convolutions for matrices (Example 17): at first exactly `layers` iterations of FISTA.

    Each layer learns the kernels of its W1 and W2 and its threshold; the momentum stays FISTA's. slots: others,
    such as prox, which then brings its own threshold.
    """
    kernel = optics.kernel()
    fista = FISTA(
        parts, restart=False, W1=Convolution(kernel / parts.L, upsample=FACTOR),
        W2=Remainder(kernel / math.sqrt(parts.L)), threshold=RHO / parts.L, **slots,
    )  # fmt: skip
    return Unfolded(fista, layers, untie=["W1", "W2", *(slots or ["threshold"])])


@dataclass(frozen=True)
class Plan:
    """How much is fitted: layers K, values of rho, gradient steps of the three trained rules, slots of the unfolded."""

    layers: int
    rhos: Sequence[float]
    unfolded: int = 1200
    network: int = 4500
    adapted: int = 300
    slots: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates of the slots, in proportion to their sizes."""
        return {"W1": 2e-4, "W2": 2e-3, **(dict.fromkeys(self.slots, 2e-2) or {"threshold": 2e-2})}


@dataclass(frozen=True, eq=False)
class Data:
    """Simulators for training, as modelled and with the wider function, and Pairs to choose levels and rho on."""

    train: Any
    wide: Any
    tuning: Pairs
    wide_tuning: Pairs


def contenders(parts: Split, optics: Optics, data: Data, plan: Plan, seed: int) -> dict[str, Contender]:
    """The rules that both problems compare; "adapted" is the unfolded one, trained on under the wider function."""

    def fista(iterations: int) -> Localiser:
        return Localiser(Unfolded(FISTA(parts, restart=False), iterations, learn=["rho"]))

    def unfolded() -> Localiser:
        return Localiser(unfold(parts, optics, plan.layers, **plan.slots))

    network = NeuralRule(Scaled(ImageNetwork(width=32, depth=5, upsample=FACTOR, seed=seed), data.tuning))
    converged = Converged(FISTA(parts), learn=["rho"], tol=1e-3, max_iterations=2000)
    trained, few = unfolded(), data.tuning.subset(torch.arange(min(48, len(data.tuning))))
    entrants = {
        "hand-set FISTA": Contender(fista(100)),
        "short FISTA": Contender(fista(plan.layers), search(data.tuning, plan.rhos)),
        "FISTA 100": Contender(fista(100), search(data.tuning, plan.rhos)),
        "FISTA converged": Contender(Localiser(converged), search(few, plan.rhos)),
        "network": Contender(Localiser(network), descend(data.train, data.tuning, plan.network, {"": 5e-3})),
        "unfolded": Contender(trained, descend(data.train, data.tuning, plan.unfolded, plan.rates)),
        "unfolded, adapted": Contender(
            unfolded(), descend(data.wide, data.wide_tuning, plan.adapted, plan.rates, source=trained)
        ),
    }
    for entrant in entrants.values():
        entrant.rule.rule.float()
    return entrants


def search(pairs: Pairs, rhos: Sequence[float] | None = None) -> Callable[[Any, Budget], Grid]:
    """Choose the level, and rho among `rhos` where given, that make the F1 score on `pairs` best.

    The trace holds for each rho the best F1, negated as a Grid keeps losses. A budget leaves values out, evenly.
    """

    def fit(rule: Any, budget: Budget) -> Grid:
        values: Any = [None] if rhos is None else rhos
        count = min(len(values), budget.limit(len(values)))
        tried = [values[k] for k in np.linspace(0, len(values) - 1, count).round().astype(int)]
        best, scores, errors = (-1.0, None, 0.0), [], []
        for rho in tried:
            if rho is not None:
                rule.rule.rho = float(rho)
            with torch.no_grad():
                pictures = rule.rule(pairs.x)
            found = [f1(Trajectory(pairs.x, peaks(pictures, level), target=pairs.s)) for level in LEVELS]
            top = max(range(len(LEVELS)), key=lambda k: found[k].mean().item())
            scores.append(found[top].mean().item())
            errors.append(found[top].std().item() / math.sqrt(len(pairs)))
            best = max(best, (scores[-1], rho, LEVELS[top]), key=lambda b: b[0])
        if best[1] is not None:
            rule.rule.rho = float(best[1])
        rule.level.data.fill_(best[2])
        return Grid(np.array(tried, dtype=float), -np.array(scores), np.array(errors))

    return fit


def descend(
    train: Any, pairs: Pairs, steps: int, rates: Mapping[str, float], source: Any = None
) -> Callable[[Any, Budget], History]:
    """Train the rule inside a Localiser on new scenes, from the values of `source` on, then choose the level.

    rates: learning rates by name of the parameter, which fall along half a cosine.
    """

    def fit(rule: Any, budget: Budget) -> History:
        if source is not None:
            rule.load_state_dict(source.state_dict())
        total = budget.limit(steps)

        def falling(top: float) -> Callable[[int], float]:
            return lambda step: top * (0.01 + 0.495 * (1 + math.cos(math.pi * min(1.0, step / total))))

        history = tune(
            rule.rule, train, spread_error, steps=total, batch_size=16, clip=20.0,
            learning_rate={name: falling(top) for name, top in rates.items()},
            seed=budget.seed, progress=budget.progress,
        )  # fmt: skip
        search(pairs)(rule, budget)
        return history

    return fit


def misses(result: Result) -> list[str]:
    """What training should reach and did not: see REFERENCE."""
    unfolded, fista = (result.record(name).measure("f1") for name in ("unfolded", "FISTA 100"))
    if unfolded.mean >= fista.mean:
        return []
    return [f"unfolded has F1 {unfolded.text()}, below {fista.text()} of 100 iterations of FISTA"]


REFERENCE = "the unfolded layers localise at least as well (F1) as 100 iterations of FISTA with tuned rho and level"
