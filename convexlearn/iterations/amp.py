"""Approximate message passing for sparse recovery (Donoho, Maleki, Montanari 2009), a baseline without training."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convexlearn.errors import CompileError
from convexlearn.iterations.base import Iteration, Layer, Slot, require_smooth
from convexlearn.prox import PROXIMABLE
from convexlearn.split_instance import Instance


class State(NamedTuple):
    """z `(B, n)` and the corrected residual r `(B, m)`."""

    z: Tensor
    r: Tensor


class AMP(Iteration):
    """r+ = y - A z + |z|_0/m r, z+ = soft threshold of z + A'r+ at threshold |r+|/sqrt(m).

    For A with independent entries of variance 1/m. The weight of the 1-norm does not enter: the threshold is
    in units of the noise that the residual shows. Slots: threshold (1.4), W1 in place of A' (learned AMP,
    Borgerding, Schniter, Rangan 2017). Not a solver of the convex problem: nothing is guaranteed for another A.
    """

    slots = (Slot("threshold", "positive"), Slot("W1", "matrix", objective=True))

    def check_split(self) -> None:
        """1/2 |A z - y|^2 and a 1-norm of z, nothing else."""
        require_smooth(self.split, "AMP")
        terms = self.split.terms
        if (
            len(terms) != 1
            or terms[0].kind != "norm1"
            or terms[0].map.fixed is None
            or not terms[0].map.fixed.is_identity
        ):
            raise CompileError(f"AMP is for 1/2 |A z - y|^2 + weight |z|_1 only, but the split is: {self.split}")

    def start(self, instance: Instance) -> State:
        """All zero."""
        assert instance.A is not None
        return State(instance.zeros(), instance.like.new_zeros(instance.batch, instance.A.rows))

    def layer(self, instance: Instance, slots: Mapping[str, Any] | None = None) -> Layer:
        """One step."""
        given = self.given(slots, instance)
        alpha, W1, A = (
            given.get("threshold", self.initial("threshold").to(instance.like.real)),
            given.get("W1"),
            instance.A,
        )
        assert A is not None
        shrink = PROXIMABLE["norm1"].bare

        def advance(state: State) -> State:
            share = (state.z != 0).sum(-1, keepdim=True).to(instance.like.real) / A.rows
            r = instance.y - A(state.z) + share * state.r
            moved = A.adjoint(r) if W1 is None else self.apply_matrix(W1, r, instance.y_shape)
            noise = torch.linalg.vector_norm(r, dim=-1, keepdim=True) / math.sqrt(A.rows)
            return State(shrink(state.z + moved, alpha * noise), r)

        return advance

    def decision(self, state: State) -> Tensor:
        """z."""
        return state.z

    def core(self, state: State) -> Tensor:
        """z and r."""
        return torch.cat([state.z, state.r], 1)

    def resume(self, core: Tensor, instance: Instance) -> State:
        """State at z and r."""
        return State(core[:, : instance.split.size], core[:, instance.split.size :])

    def initial(self, name: str, k: int = 0) -> Tensor:
        """Start value of a slot."""
        self.slot(name)
        if name in self.values:
            return self.values[name]
        if name == "threshold":
            return torch.tensor(1.4, dtype=torch.float64)
        A = self.nominal(name).A
        assert A is not None
        return A.dense().mH
