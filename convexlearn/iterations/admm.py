"""The alternating direction method of multipliers (Algorithm 1), and with freed matrices ADMM-Net (Eq. 20)."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convexlearn.errors import CompileError, OptionError
from convexlearn.iterations.base import Iteration, Layer
from convexlearn.iterations.blocks import Blocks
from convexlearn.iterations.circulant import gram_spectra
from convexlearn.iterations.slots import SIGMA, Slot
from convexlearn.split_instance import BoundTerm, Instance, independent_factor

GOLDEN = (1 + math.sqrt(5)) / 2

LARGEST = 5000
"""Up to so many unknowns the normal equations are solved as a dense system."""


class State(NamedTuple):
    """s `(B, n)`, and v, u `(B, rows)` of Algorithm 1."""

    s: Tensor
    v: Tensor
    u: Tensor


class ADMM(Iteration):
    """Algorithm 1 on min 1/2 |A s - y|^2 + q's + g(K s + b), equality constraints kept exactly in the update of s.

    s+ = argmin of the smooth part + penalty |K s + b - v + u|^2; with r = relaxation (K s+ + b) + (1 - relaxation) v:
    v+ = prox_{g/(2 penalty)}(r + u), u+ = u + step (r - v+). Slots: penalty (the paper's lambda), step (its mu, 1),
    relaxation (1), threshold (weights/(2 penalty)), prox and its sigma (plug-and-play, Example 20 with Eq. 26), and W1,
    W2: s+ = W1 y + W2 (v - u), Eq. 20;
    `free("W1", "W2")` gives ADMM-Net (Yang et al. 2016), equal to ADMM at the start.

    Converges for every penalty, with step below (1 + sqrt 5)/2 at relaxation 1 or relaxation below 2 at step 1
    (Fortin, Glowinski 1983; Eckstein, Bertsekas 1992); not for any positive step, as the paper's text has it.
    """

    slots = (
        Slot("penalty", "positive"),
        Slot("step", "positive"),
        Slot("relaxation", "positive"),
        Slot("threshold", "threshold"),
        Slot("W1", "matrix", objective=True),
        Slot("W2", "matrix", objective=True),
        Slot("prox", "prox", objective=True),
        SIGMA,
    )

    def start(self, instance: Instance) -> State:
        """All zero."""
        rows = sum(self.blocks(instance).sizes)
        zeros = instance.like.new_zeros(instance.batch, rows)
        return State(instance.zeros(), zeros, zeros)

    def layer(self, instance: Instance, slots: Mapping[str, Any] | None = None) -> Layer:
        """One step."""
        given = self.given(slots, instance)
        blocks = self.blocks(instance)
        penalty = self._penalty(instance, given)
        step, relaxation = given.get("step", 1.0), given.get("relaxation", 1.0)
        update = self._update(instance, blocks, penalty, given)
        shrink = self._shrink(instance, blocks, penalty, given)

        def advance(state: State) -> State:
            s = update(state.v - state.u)
            r = blocks.image(s)
            if not isinstance(relaxation, float):
                r = relaxation * r + (1 - relaxation) * state.v
            v = shrink(r + state.u)
            return State(s, v, state.u + step * (r - v))

        return advance

    def decision(self, state: State) -> Tensor:
        """s."""
        return state.s

    def core(self, state: State) -> Tensor:
        """v and u."""
        return torch.cat([state.v, state.u], 1)

    def resume(self, core: Tensor, instance: Instance) -> State:
        """State at v and u; s is not needed by the next step."""
        v, u = core.chunk(2, 1)
        return State(instance.zeros(), v, u)

    def initial(self, name: str, k: int = 0) -> Tensor:
        """Start value of a slot."""
        self.slot(name)
        if name in self.values and name != "sigma":
            return self.values[name]
        if name in ("step", "relaxation"):
            return torch.tensor(1.0, dtype=torch.float64)
        if name == "prox":
            raise OptionError("slot 'prox' has no free values; give it a module, as in replace(prox=denoiser)")
        nominal = self.nominal(name)
        penalty = self._penalty(nominal, self.given(None, nominal))
        if name == "penalty":
            return penalty.reshape(())
        if name == "threshold":
            return self.initial_threshold(1 / (2 * penalty.reshape(())))
        if name == "sigma":
            return self.initial_sigma(1 / (2 * penalty.reshape(())), k)
        self.check_free(nominal)
        blocks = self.blocks(nominal)
        assert nominal.A is not None
        A, K = nominal.A.dense().to(nominal.like), blocks.dense()
        system = A.mH @ A + 2 * penalty.reshape(()) * (K.mH @ K)
        return torch.linalg.solve(system, A.mH if name == "W1" else 2 * penalty.reshape(()) * K.mH)

    def limits(self, instance: Instance) -> dict[str, Any]:
        """step < (1 + sqrt 5)/2, or relaxation < 2."""
        if {"W1", "W2"} & self.values.keys():
            return {}
        bounds = {"step": GOLDEN, "relaxation": 2.0}
        return {name: instance.like.real.new_tensor(bound) for name, bound in bounds.items()}

    def check_convergent(self, learned: Collection[str]) -> None:
        """Raise OptionError where step and relaxation are both away from 1."""
        pair = ("step", "relaxation")
        away = {name for name in pair if name in self.values and bool((self.values[name] != 1).any())}
        if not {"W1", "W2"} & self.values.keys() and len(away | (set(learned) & set(pair))) == 2:
            raise OptionError(
                "Converged: ADMM is only known to converge with step or relaxation at 1, not with both away from it; "
                "keep or learn one, or unfold the iteration: Unfolded takes any positive values"
            )

    def check_free(self, instance: Instance) -> None:
        """Raise OptionError where Eq. 20 is not the update of s."""
        if instance.A is None or instance.q is not None or self.equalities(instance):
            raise OptionError(
                "free: W1 and W2 of Eq. 20 stand for a sum of squares without linear terms or equalities, not for "
                f"{self.split}"
            )

    def equalities(self, instance: Instance) -> list[BoundTerm]:
        """Terms that the update of s keeps exactly."""
        return [t for t in instance.terms if t.kind == "zero"]

    def blocks(self, instance: Instance) -> Blocks:
        """The terms that go into v; with a prox slot, s itself in their place."""
        others = [t for t in instance.terms if t.kind != "zero"]
        return Blocks(instance, [] if "prox" in self.values else others)

    def _penalty(self, instance: Instance, given: Mapping[str, Any]) -> Tensor:
        """By default a twentieth of L; 1/2 without smooth part."""
        if given.get("penalty") is not None:
            return given["penalty"]
        return torch.where(instance.L > 0, instance.L / 20, 0.5)

    def _update(self, instance: Instance, blocks: Blocks, penalty: Tensor, given: Mapping[str, Any]) -> Callable:
        W1, W2 = given.get("W1"), given.get("W2")
        offset = blocks.offset()
        y = instance.y if instance.y.ndim == 2 else instance.y.expand(instance.batch, -1)
        drive = 0.0 if instance.A is None else instance.A.adjoint(y)
        drive = drive if instance.q is None else drive - instance.q
        if W1 is not None and W2 is not None:
            first = self.apply_matrix(W1, y, instance.y_shape)
            return lambda w: first + self._second(W2, w - offset)
        solve = solver(instance, blocks, penalty, self.equalities(instance))
        if W1 is not None:
            first = self.apply_matrix(W1, y, instance.y_shape)
            return lambda w: first + solve(2 * penalty * blocks.adjoint(w - offset))
        if W2 is not None:
            first = solve(drive)
            return lambda w: first + self._second(W2, w - offset)
        return lambda w: solve(drive + 2 * penalty * blocks.adjoint(w - offset))

    def _second(self, W2: Any, w: Tensor) -> Tensor:
        return self.apply_matrix(W2, w)

    def _shrink(self, instance: Instance, blocks: Blocks, penalty: Tensor, given: Mapping[str, Any]) -> Callable:
        thresholds = instance.thresholds(1 / (2 * penalty))
        if given.get("threshold") is not None:
            thresholds = self.split_threshold(given["threshold"], thresholds)
        if given.get("prox") is not None:
            t = next((t for t, term in zip(thresholds, instance.terms) if term.scaled), 1 / (2 * penalty))
            return lambda w: self.apply_prox(given["prox"], w, t, given.get("sigma"))
        kept = [t for t, term in zip(thresholds, instance.terms) if term.kind != "zero"]
        return lambda w: blocks.prox(w, kept)


def solver(instance: Instance, blocks: Blocks, penalty: Tensor, equalities: Sequence[BoundTerm]) -> Callable:
    """r -> the s with (A'A + 2 penalty K'K) s = r, subject to the equalities."""
    scale, A, n = blocks.gram_scale, instance.A, instance.split.size
    tight = None if A is None else A.tight
    simple = scale is not None and not equalities and (A is None or tight is not None)
    projecting = scale is not None and A is None and len(equalities) == 1 and equalities[0].map.tight is not None
    c: Any = None if scale is None else 2 * penalty * scale
    if simple and A is None:
        return lambda r: r / c
    if simple and A is not None and tight is not None:
        return lambda r: (r - A.adjoint(A(r)) / (tight + c)) / c
    if projecting:
        E = equalities[0]
        size: Any = E.map.tight
        return lambda r: r / c - E.map.adjoint(E.image(r / c)) / size
    spectra = None if equalities else gram_spectra(instance, blocks)
    if spectra is not None:
        return _circular_solver(instance, spectra, penalty)
    if n > LARGEST:
        raise CompileError(
            f"ADMM would factor a dense matrix of {n} unknowns for {instance.split}; use PrimalDual, which needs "
            "products only"
        )
    return _dense_solver(instance, blocks, penalty, equalities)


def _circular_solver(instance: Instance, spectra: tuple[Tensor, Tensor], penalty: Tensor) -> Callable:
    """Division in the Fourier domain, where A'A and K'K are circular convolutions."""
    shape = instance.split.variables[0].shape
    dims = tuple(range(1, len(shape) + 1))
    fidelity, terms = (spectrum.to(instance.like) for spectrum in spectra)
    system = fidelity + 2 * penalty.reshape(-1, *[1] * len(shape)) * terms
    _require_definite(instance, bool(system.min() <= 0))
    half = system[..., : shape[-1] // 2 + 1]

    def solve(r: Tensor) -> Tensor:
        image = torch.fft.rfftn(r.reshape(len(r), *shape), dim=dims) / half
        return torch.fft.irfftn(image, s=shape, dim=dims).reshape(r.shape)

    return solve


def _require_definite(instance: Instance, singular: bool) -> None:
    if singular:
        raise CompileError(
            f"ADMM: the terms do not determine all variables of {instance.split}, so that its linear system is "
            "singular; add a term, such as bounds on all variables"
        )


def _dense_solver(instance: Instance, blocks: Blocks, penalty: Tensor, equalities: Sequence[BoundTerm]) -> Callable:
    K = blocks.dense()
    per_sample = penalty.ndim == 2
    system = 2 * (penalty[:, :, None] if per_sample else penalty.reshape(-1, 1)) * (K.mH @ K)
    if instance.A is not None:
        A = instance.A.dense().to(instance.like)
        system = system + A.mH @ A
    E = torch.cat([t.map.dense().to(instance.like) for t in equalities], -2) if equalities else None
    if E is not None:  # adding E'E changes nothing where E s + e = 0, and makes the system definite
        system = system + E.mH @ E * system.diagonal(dim1=-2, dim2=-1).real.mean(-1)[..., None, None]
    bad = ~torch.isfinite(system.detach()).all(-1).all(-1)  # a matrix of NaN harms its own sample alone
    identity = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
    factor, failed = torch.linalg.cholesky_ex(torch.where(bad[..., None, None], identity, system))
    _require_definite(instance, bool((failed != 0).any()))
    factor = torch.where(bad[..., None, None], torch.nan, factor)

    def solve(r: Tensor) -> Tensor:
        return torch.cholesky_solve(r.unsqueeze(-1), factor).squeeze(-1)

    if E is None:
        return solve
    lifted = torch.cholesky_solve(E.mH, factor)
    schur = independent_factor(E @ lifted)

    def constrained(r: Tensor) -> Tensor:
        s = solve(r)
        gap = torch.cat([t.image(s) for t in equalities], -1)
        multiplier = torch.cholesky_solve(gap.unsqueeze(-1), schur)
        return s - (lifted @ multiplier).squeeze(-1)

    return constrained
