"""Deep priors: the decision is the image of the best latent under a generative network or a flow (Eqs. 27, 28)."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convexlearn import newton
from convexlearn.checks import FUNCTION, NAMES, SEED, checked, count, instance, number, word
from convexlearn.domains import Domain
from convexlearn.errors import LimitWarning, OptionError, ShapeError, listed, suggest
from convexlearn.failures import collector
from convexlearn.inputs import as_contexts, as_floating, flattened
from convexlearn.randomness import make_generator
from convexlearn.rules.base import DecisionRule, Role

NONNEGATIVE = Domain.from_attributes((), {"nonneg": True})


class LatentSolution(NamedTuple):
    """Outcome of the search for the latent.

    decision `(B, ...)`, latent `(B, k)`, and for each sample `(B,)`: the objective, converged, the steps taken, the
    last relative step; all of the best restart.
    """

    decision: Tensor
    latent: Tensor
    objective: Tensor
    converged: Tensor
    iterations: Tensor
    residual: Tensor


class DeepPrior(DecisionRule):
    """s = g(z), z = argmin 1/2 |x - H g(z)|^2 + weight penalty(z) (Example 21): x `(B, m)` -> s `(B, ...)`.

    generator: the network g, latents `(N, k)` to signals `(N, ...)` of n entries; twice differentiable (SiLU, not
    ReLU), samples independent. H `(m, n)`: the measurements. latent: k. penalty: latents to `(N,)`. By default it is
    |z|^2 / 2, so that the rule is Eq. 28 with lambda = weight / 2 (Bora et al. 2017); with a Flow and its `potential`
    it is Eq. 27 with sigma^2 = weight.

    The latent is found by Newton's method from `restarts` starts, zero and standard normal draws of `seed`, the same
    for all samples; the least objective wins. gradient: "implicit" (at the stationary point) or "unroll" (through the
    steps of the best start, exact even if max_iterations ends them early). learn: which of "weight" (default) and "H"
    are trained; the generator's weights are where they require gradients (`freeze("generator")`). A sample whose x or
    objective is not finite has a decision of NaN with zero gradient.

    >>> g = nn.Linear(1, 2, bias=False)
    >>> g.weight = nn.Parameter(torch.tensor([[1.0], [1.0]]))
    >>> DeepPrior(g, torch.tensor([[1.0, 0.0]]), 1, weight=1.0)(torch.tensor([[3.0]])).detach()
    tensor([[1.5000, 1.5000]])
    """

    @checked(
        generator=instance(nn.Module, "an nn.Module"), latent=count(), weight=number(least=0), penalty=FUNCTION,
        restarts=count(), seed=SEED, gradient=word(("implicit", "unroll")), tol=number(above=0),
        max_iterations=count(), learn=NAMES,
    )  # fmt: skip
    def __init__(
        self,
        generator: nn.Module,
        H: Any,
        latent: int,
        *,
        weight: float = 0.1,
        penalty: Callable[[Tensor], Tensor] | None = None,
        restarts: int = 1,
        seed: int = 0,
        gradient: str = "implicit",
        tol: float = 1e-9,
        max_iterations: int = 200,
        learn: Sequence[str] = ("weight",),
    ) -> None:
        super().__init__()
        for name in learn:
            if name not in ("weight", "H"):
                raise OptionError(f"DeepPrior: cannot learn '{name}'; {suggest(name, ('weight', 'H'))}")
        self.generator, self.penalty = generator, penalty
        self.latent, self.restarts, self.seed = latent, restarts, seed
        self.gradient, self.tol, self.max_iterations = gradient, tol, max_iterations
        self.declare("weight", torch.as_tensor(weight, dtype=torch.float64), NONNEGATIVE, learned="weight" in learn)
        self.declare("H", as_floating("H", H), role=Role.OBJECTIVE, learned="H" in learn)
        if self.H.ndim != 2:
            raise ShapeError(f"H must have shape (m, n), got {tuple(self.H.shape)}")

    def objective(self, z: Tensor, x: Tensor) -> Tensor:
        """1/2 |x - H g(z)|^2 + weight penalty(z) `(N,)` for latents z `(N, k)` and measurements x `(N, m)`."""
        s = self.generator(z).flatten(1)
        if s.shape[1] != self.H.shape[1]:
            raise ShapeError(
                f"the generator makes {s.shape[1]} entries per sample, but H {tuple(self.H.shape)} takes n"
            )
        penalty = z.square().sum(1) / 2 if self.penalty is None else self.penalty(z)
        return (x - s @ self.H.to(s).mT).square().sum(1) / 2 + self.weight.to(s) * penalty

    def starts(self) -> Tensor:
        """The latents `(restarts, k)` from which the search starts, float64."""
        generator = make_generator(self.seed, "restarts")
        starts = torch.randn(self.restarts, self.latent, generator=generator, dtype=torch.float64)
        starts[0] = 0.0
        return starts

    def solve(self, *x: Tensor) -> LatentSolution:
        """Decision, latent and, for each sample, whether and how the search converged; in the generator's dtype."""
        weights = [p for p in self.generator.parameters() if p.is_floating_point()]
        flat = flattened(type(self).__name__, x)
        flat = flat.to(weights[0].dtype if weights else flat.dtype)
        if flat.shape[1] != self.H.shape[0]:
            raise ShapeError(f"x has {flat.shape[1]} entries per sample, but H {tuple(self.H.shape)} gives m")
        finite = torch.isfinite(flat.detach()).all(1)
        flat = torch.where(finite[:, None], flat, 0.0)
        wants = torch.is_grad_enabled() and (flat.requires_grad or any(p.requires_grad for p in self.parameters()))
        start, run = self._search(flat.detach())
        sound = finite & torch.isfinite(run.value)
        flat, z = torch.where(sound[:, None], flat, 0.0), torch.where(sound[:, None], run.point, 0.0)
        if wants and self.gradient == "unroll":
            run = self._minimize(start, flat)
            z = run.point
        elif wants:
            z = newton.attach_implicit_gradient(self.objective, z, (flat,))
        _report(~sound)
        s = self.generator(z)
        s = torch.where(sound.reshape(-1, *[1] * (s.ndim - 1)), s, torch.nan)
        value = torch.where(sound, run.value.detach(), torch.nan)
        return LatentSolution(s, z, value, run.converged & sound, run.iterations, run.residual)

    def forward(self, *x: Tensor) -> Tensor:
        """The decision s `(B, ...)` in the dtype of x; a LimitWarning names the samples that did not converge."""
        found = self.solve(*x)
        lost = (~found.converged & torch.isfinite(found.objective)).nonzero().flatten().tolist()
        if lost and self.gradient == "implicit":
            warnings.warn(
                f"the latent of {len(lost)} of {len(found.converged)} samples ({listed(lost)}) did not converge within "
                f"{self.max_iterations} steps to tol = {self.tol:g}; raise max_iterations or tol, "
                "compute in float64, or take a smooth generator",
                LimitWarning,
                stacklevel=3,
            )
        return found.decision.to(as_contexts(type(self).__name__, x)[0].dtype)

    def _search(self, x: Tensor) -> tuple[Tensor, newton.Minimum]:
        """For each sample the start `(B, k)` that led to the least objective, and where it led."""
        starts, B = self.starts().to(x), len(x)
        with torch.no_grad():
            every = starts.repeat(B, 1)
            run = self._minimize(every, x.repeat_interleave(self.restarts, 0))
            value = torch.where(torch.isnan(run.value), torch.inf, run.value).reshape(B, self.restarts)
            rows = torch.arange(B, device=x.device) * self.restarts + value.argmin(1)
        return every[rows], newton.Minimum(*(part[rows] for part in run))

    def _minimize(self, start: Tensor, x: Tensor) -> newton.Minimum:
        return newton.minimize(self.objective, start, (x,), tol=self.tol, max_iterations=self.max_iterations)


def _report(failed: Tensor) -> None:
    """Tell a simulator which samples have no decision, and why."""
    active = collector()
    if active is not None and bool(failed.any()):
        active.add(failed)
        active.name(["the context or the objective of the latent is not finite" if f else "" for f in failed.tolist()])
