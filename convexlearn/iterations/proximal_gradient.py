"""Proximal gradient: ISTA (Eq. 15), FISTA (Beck, Teboulle 2009), and with freed matrices LISTA (Eq. 22)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convexlearn.checks import FLAG, count, require_that
from convexlearn.errors import OptionError
from convexlearn.iterations.base import Iteration, Layer, require_smooth
from convexlearn.iterations.slots import SIGMA, Slot
from convexlearn.split_instance import Instance
from convexlearn.splitting import Split

FORWARD = (Slot("step", "positive"), Slot("threshold", "threshold"))
MATRICES = (Slot("W1", "matrix", objective=True), Slot("W2", "matrix", objective=True), Slot("prox", "prox", True))


class State(NamedTuple):
    """z `(B, n)`."""

    z: Tensor


class Momentum(NamedTuple):
    """z and the one before `(B, n)`; the sequence t and the momentum that follows from it `(B, 1)`."""

    z: Tensor
    previous: Tensor
    t: Tensor
    momentum: Tensor


class ISTA(Iteration):
    """z+ = prox_{step g}(z - step (A'(A z - y) + q)) on a split problem (Example 10).

    Slots: step (1/L), threshold (step times the weights of the terms), prox (that of all terms together), the sigma
    of a denoiser there, W1 and W2. With W1 and W2 the step is prox(W1 y + step W2 z), Eq. 22, and step starts at 1:
    `free("W1", "W2")` gives LISTA, equal to ISTA at the start, W1 = step A' and W2 = I - step A'A. With W1 alone it
    is prox(z + step W1 (y - A z)), the coupled form of LISTA-CP and ALISTA (Chen et al. 2018, Liu et al. 2019).
    """

    slots = (*FORWARD, *MATRICES, SIGMA)

    def __init__(self, split: Split, **values: Any) -> None:
        self.base: Tensor | None = None
        super().__init__(split, **values)

    def check_split(self) -> None:
        """A smooth part is needed, and a joint proximal map of all terms."""
        require_smooth(self.split, type(self).__name__)

    def replaced(self, values: Mapping[str, Any], freed: Any = ()) -> "Iteration":
        """A copy with other values; freeing a matrix turns the step into the gain of Eq. 22, which starts at 1."""
        twin = super().replaced(values, freed)
        if freed and isinstance(twin, ISTA) and "step" in twin.values:
            twin.base = twin.values.pop("step")
        return twin

    def start(self, instance: Instance) -> Any:
        """z = 0."""
        return State(instance.zeros())

    def layer(self, instance: Instance, slots: Mapping[str, Any] | None = None) -> Layer:
        """One step."""
        forward, backward = self.halves(instance, self.given(slots, instance))
        return lambda state: State(backward(forward(state.z)))

    def halves(self, instance: Instance, given: Mapping[str, Any]) -> tuple[Any, Any]:
        """The gradient step and the proximal step, both z -> z."""
        W1, W2 = given.get("W1"), given.get("W2")
        base = self.base.to(instance.like.real) if self.base is not None else 1 / instance.L
        if W1 is None and W2 is None:
            step = base = given.get("step", base)
            forward = lambda z: z - step * instance.gradient(z)  # noqa: E731
        else:
            forward = self.freed_forward(instance, W1, W2, given.get("step", 1.0), base)
        thresholds = instance.thresholds(base)
        if given.get("threshold") is not None:
            thresholds = self.split_threshold(given["threshold"], thresholds)
        prox = given.get("prox")
        if prox is None:
            return forward, lambda v: instance.prox(v, thresholds, base)
        t = next((t for t, term in zip(thresholds, instance.terms) if term.scaled), base)
        return forward, lambda v: self.apply_prox(prox, v, t, given.get("sigma"))

    def freed_forward(self, instance: Instance, W1: Any, W2: Any, gain: Any, base: Any) -> Any:
        """Eq. 22 before its threshold, or the coupled form."""
        A, y, shape = instance.A, instance.y, instance.y_shape
        assert A is not None
        y = y if y.ndim == 2 else y.expand(instance.batch, -1)
        linear = 0.0 if instance.q is None else base * instance.q
        if W2 is None:
            return lambda z: z + gain * self.apply_matrix(W1, y - A(z), shape) - linear
        drive = (base * A.adjoint(y) if W1 is None else self.apply_matrix(W1, y, shape)) - linear
        return lambda z: drive + gain * self.apply_matrix(W2, z)

    def decision(self, state: Any) -> Tensor:
        """z."""
        return state.z

    def core(self, state: Any) -> Tensor:
        """z."""
        return state.z

    def resume(self, core: Tensor, instance: Instance) -> Any:
        """State at z."""
        return State(core)

    def initial(self, name: str, k: int = 0) -> Tensor:
        """Start value of a slot."""
        self.slot(name)
        if name in self.values and name != "sigma":
            return self.values[name]
        if name == "prox":
            raise OptionError("slot 'prox' has no free values; give it a module, as in replace(prox=denoiser)")
        coupled = {"W1", "W2"} & self.values.keys()
        if name == "step" and coupled:
            return torch.tensor(1.0, dtype=torch.float64)
        nominal = self.nominal(name)
        base = self.base if self.base is not None else self.values.get("step")
        base = 1 / nominal.L if base is None or (coupled and self.base is None) else base
        if name == "step":
            return base
        if name == "threshold":
            return self.initial_threshold(base)
        if name == "sigma":
            return self.initial_sigma(base, k)
        assert nominal.A is not None
        A = nominal.A.dense()
        if name == "W1":
            return base * A.mH
        return torch.eye(A.shape[-1], dtype=A.dtype) - base * (A.mH @ A)

    def limits(self, instance: Instance) -> dict[str, Any]:
        """step < 2/L."""
        return {} if {"W1", "W2"} & self.values.keys() else {"step": 2 / instance.L}


class FISTA(ISTA):
    """ISTA from an extrapolated point (Beck, Teboulle 2009), restarted where the momentum points uphill.

    Slot momentum: by default (t_k - 1)/t_{k+1}; restart: O'Donoghue, Candes 2015, where momentum is not learned. With a
    fixed momentum below 1 and step <= 1/L, objective + |z - previous|^2/(2 step) falls, so that it converges.
    """

    slots = (*FORWARD, Slot("momentum", "number"), *MATRICES, SIGMA)

    def __init__(self, split: Split, *, restart: bool = True, **values: Any) -> None:
        require_that("FISTA", "restart", FLAG, restart)
        self.restart = restart
        super().__init__(split, **values)

    def start(self, instance: Instance) -> Any:
        """z = 0 without momentum."""
        return self.resume(instance.zeros(), instance)

    def layer(self, instance: Instance, slots: Mapping[str, Any] | None = None) -> Layer:
        """One step."""
        given = self.given(slots, instance)
        forward, backward = self.halves(instance, given)
        momentum = given.get("momentum")

        def advance(state: Momentum) -> Momentum:
            y = state.z + (state.momentum if momentum is None else momentum) * (state.z - state.previous)
            z = backward(forward(y))
            t = (1 + (1 + 4 * state.t.square()).sqrt()) / 2
            follows = (state.t - 1) / t
            if self.restart:
                uphill = ((y - z).conj() * (z - state.z)).real.sum(-1, keepdim=True) > 0
                t, follows = torch.where(uphill, 1.0, t), torch.where(uphill, 0.0, follows)
            return Momentum(z, state.z, t, follows)

        return advance

    def resume(self, core: Tensor, instance: Instance) -> Any:
        """State at z without momentum."""
        one = core.real.new_ones(len(core), 1)
        return Momentum(core, core, one, torch.zeros_like(one))

    def initial(self, name: str, k: int = 0) -> Tensor:
        """Start value of a slot; momentum follows the sequence t_k."""
        self.slot(name)
        if name != "momentum" or name in self.values:
            return super().initial(name, k)
        require_that("FISTA.initial", "k", count(0), k)
        t, momentum = 1.0, 0.0
        for _ in range(k):
            following = (1 + (1 + 4 * t * t) ** 0.5) / 2
            t, momentum = following, (t - 1) / following
        return torch.tensor(momentum, dtype=torch.float64)

    def limits(self, instance: Instance) -> dict[str, Any]:
        """step <= 1/L, momentum < 1."""
        if {"W1", "W2"} & self.values.keys():
            return {}
        return {"step": 1 / instance.L, "momentum": instance.L.new_tensor(1.0)}
