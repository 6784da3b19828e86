"""The primal-dual method of Condat (2013) and Vu (2013); without a smooth part that of Chambolle and Pock (2011)."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convexlearn.errors import OptionError
from convexlearn.iterations.base import Iteration, Layer
from convexlearn.iterations.blocks import Blocks
from convexlearn.iterations.slots import SIGMA, Slot
from convexlearn.split_instance import Instance


class State(NamedTuple):
    """z `(B, n)` and the dual variable p `(B, rows)`."""

    z: Tensor
    p: Tensor


class PrimalDual(Iteration):
    """Primal-dual steps on min f(z) + g(K z + b), f smooth quadratic; needs products with A and K only.

    z+ = z - step (grad f(z) + K'p), p+ = prox_{dual_step g*}(p + dual_step (K (2 z+ - z) + b)), then both relaxed.
    Slots: step, dual_step, relaxation (1), threshold (weights/dual_step), prox (that of g, without K) and
    its sigma. Converges for
    step <= 1/(L/2 + dual_step |K|^2) at relaxation up to 1.
    """

    slots = (
        Slot("step", "positive"),
        Slot("dual_step", "positive"),
        Slot("relaxation", "positive"),
        Slot("threshold", "threshold"),
        Slot("prox", "prox", objective=True),
        SIGMA,
    )

    def start(self, instance: Instance) -> State:
        """All zero."""
        rows = sum(self.blocks(instance).sizes)
        return State(instance.zeros(), instance.like.new_zeros(instance.batch, rows))

    def blocks(self, instance: Instance) -> Blocks:
        """All terms; with a prox slot, z itself in their place."""
        return Blocks(instance, [] if "prox" in self.values else instance.terms)

    def layer(self, instance: Instance, slots: Mapping[str, Any] | None = None) -> Layer:
        """One step."""
        given = self.given(slots, instance)
        blocks = self.blocks(instance)
        tau, sigma = self._steps(instance, blocks, given)
        relaxation = given.get("relaxation", 1.0)
        thresholds = instance.thresholds(1 / sigma)
        if given.get("threshold") is not None:
            thresholds = self.split_threshold(given["threshold"], thresholds)
        prox = given.get("prox")
        t = next((t for t, term in zip(thresholds, instance.terms) if term.scaled), 1 / sigma)

        def shrink(v: Tensor) -> Tensor:
            return blocks.prox(v, thresholds) if prox is None else self.apply_prox(prox, v, t, given.get("sigma"))

        def advance(state: State) -> State:
            z = state.z - tau * (instance.gradient(state.z) + blocks.adjoint(state.p))
            w = state.p / sigma + blocks.image(2 * z - state.z)
            p = sigma * (w - shrink(w))  # Moreau's identity
            if not isinstance(relaxation, float):
                z, p = (relaxation * new + (1 - relaxation) * old for new, old in ((z, state.z), (p, state.p)))
            return State(z, p)

        return advance

    def decision(self, state: State) -> Tensor:
        """z."""
        return state.z

    def core(self, state: State) -> Tensor:
        """z and p."""
        return torch.cat([state.z, state.p], 1)

    def resume(self, core: Tensor, instance: Instance) -> State:
        """State at z and p."""
        return State(core[:, : instance.split.size], core[:, instance.split.size :])

    def initial(self, name: str, k: int = 0) -> Tensor:
        """Start value of a slot."""
        self.slot(name)
        if name in self.values and name != "sigma":
            return self.values[name]
        if name == "relaxation":
            return torch.tensor(1.0, dtype=torch.float64)
        nominal = self.nominal(name)
        tau, sigma = self._steps(nominal, self.blocks(nominal), self.given(None, nominal))
        if name == "threshold":
            return self.initial_threshold(1 / sigma.reshape(()))
        if name == "sigma":
            return self.initial_sigma(1 / sigma.reshape(()), k)
        return (tau if name == "step" else sigma).reshape(())

    def limits(self, instance: Instance) -> dict[str, Any]:
        """step at the present dual_step; dual_step at the present step where that is given; relaxation <= 1."""
        given = self.given(None, instance)
        blocks = self.blocks(instance)
        tau, _ = self._steps(instance, blocks, {k: v for k, v in given.items() if k != "step"})
        bounds = {"step": tau, "relaxation": instance.like.real.new_tensor(1.0)}
        if "step" in given:
            bounds["dual_step"] = (1 / given["step"] - instance.L / 2) / blocks.norm_squared()
        return bounds

    def check_convergent(self, learned: Collection[str]) -> None:
        """Raise OptionError where both steps are learned, since the bound of one holds at a fixed other one."""
        if {"step", "dual_step"} <= set(learned):
            raise OptionError(
                "Converged: step and dual_step of PrimalDual can't both be learned, since the bound of one holds at a "
                "fixed other one; learn one, or unfold the iteration: Unfolded takes any positive values"
            )

    def _steps(self, instance: Instance, blocks: Blocks, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """step and dual_step; by default such that L/2 and dual_step |K|^2 are alike."""
        size = blocks.norm_squared().reshape(())
        sigma = given.get("dual_step")
        if sigma is None:
            sigma = torch.where(instance.L > 0, instance.L / (2 * size), size.rsqrt())
        tau = given.get("step")
        return (1 / (instance.L / 2 + sigma * size) if tau is None else tau), sigma
