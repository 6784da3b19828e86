"""What ADMM and the primal-dual method share: all terms stacked, g(K z + b)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convexlearn.split_instance import BoundTerm, Instance


@dataclass(frozen=True, eq=False)
class Blocks:
    """The stacked image K z + b `(B, rows)` of the terms; without terms, z itself."""

    instance: Instance
    terms: Sequence[BoundTerm]

    @property
    def sizes(self) -> list[int]:
        """Rows of each term."""
        return [t.map.rows for t in self.terms] or [self.instance.split.size]

    def image(self, z: Tensor) -> Tensor:
        """K z + b."""
        return torch.cat([t.image(z) for t in self.terms], -1) if self.terms else z

    def adjoint(self, v: Tensor) -> Tensor:
        """K' v."""
        if not self.terms:
            return v
        total: Any = 0
        for t, part in zip(self.terms, v.split(self.sizes, -1)):
            total = total + t.map.adjoint(part)
        return total

    def offset(self) -> Tensor:
        """b `(B, rows)`."""
        rows = [t.offset.expand(self.instance.batch, t.map.rows) for t in self.terms]
        return torch.cat(rows, -1) if rows else self.instance.zeros()

    def prox(self, v: Tensor, thresholds: Sequence[Any]) -> Tensor:
        """Proximal maps of the terms at their thresholds, side by side."""
        parts = zip(self.terms, v.split(self.sizes, -1), thresholds)
        return torch.cat([t.prox(part, s) for t, part, s in parts], -1) if self.terms else v

    def dense(self) -> Tensor:
        """K `(rows, n)` or `(B, rows, n)`."""
        if not self.terms:
            return torch.eye(self.instance.split.size, dtype=self.instance.like.dtype, device=self.instance.like.device)
        matrices = [t.map.dense().to(self.instance.like) for t in self.terms]
        lead = max((m.shape[:-2] for m in matrices), key=len)
        return torch.cat([m.expand(*lead, *m.shape[-2:]) for m in matrices], -2)

    @property
    def gram_scale(self) -> float | None:
        """k where K'K = k I: selections that cover each entry of z once; else None."""
        if not self.terms:
            return 1.0
        if any(t.map.index is None for t in self.terms):
            return None
        index = torch.cat([t.map.index for t in self.terms])  # pyright: ignore
        scales = {t.map.scale**2 for t in self.terms}
        size = self.instance.split.size
        return scales.pop() if len(scales) == 1 and len(index) == size == len(index.unique()) else None

    def norm_squared(self) -> Tensor:
        """An upper bound of the largest eigenvalue of K'K: exact for one term or disjoint ones."""
        if self.gram_scale is not None:
            return self.instance.like.real.new_tensor(self.gram_scale)
        if len(self.terms) == 1:
            return self.terms[0].map.norm_squared().to(self.instance.like.real)
        norms = [t.map.norm_squared().to(self.instance.like.real) for t in self.terms]
        if self.instance.split.size > 2000:
            return torch.stack(norms).sum(0)
        return torch.linalg.matrix_norm(self.dense(), 2).square()
