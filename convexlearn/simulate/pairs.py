"""The simplest simulator: apply the rule to held-out contexts."""

import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexlearn.checks import GENERATOR, checked, count
from convexlearn.errors import MissingParameterError, OptionError, ShapeError
from convexlearn.failures import collect_failures
from convexlearn.rules.base import as_rule, as_tuple
from convexlearn.simulate.base import Trajectory, not_finite, rows_of


class Pairs:
    """Pairs of contexts x `(N, ...)` and desired decisions s `(N, ...)`: validation as in ML (Example 3).

    x may be a tuple of tensors, for a rule of several arguments; s may be left out (unsupervised).
    Called with `batch_size`, it draws that many samples without replacement; without, it takes all of
    them in order. `tune` shuffles the pairs and runs through them epoch by epoch.

    >>> pairs = Pairs(torch.arange(3.0), torch.arange(3.0) + 1)
    >>> pairs(lambda x: 2 * x).decision
    tensor([0., 2., 4.])
    """

    def __init__(self, x: Any, s: Any = None) -> None:
        self.x = tuple(_tensor(part, "x") for part in x) if isinstance(x, tuple) else _tensor(x, "x")
        self.s = None if s is None else _tensor(s, "s")
        parts = [*as_tuple(self.x), *([] if self.s is None else [self.s])]
        if not parts or any(part.ndim == 0 for part in parts) or len({len(part) for part in parts}) > 1:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise ShapeError(f"Pairs needs as many contexts as decisions along axis 0, got shapes {shapes}")

    def __len__(self) -> int:
        return len(as_tuple(self.x)[0])

    def __repr__(self) -> str:
        x = " and ".join(str(tuple(part.shape[1:])) for part in as_tuple(self.x))
        s = "no targets" if self.s is None else f"s {tuple(self.s.shape[1:])}"
        return f"Pairs({len(self)} samples, x {x}, {s})"

    def fingerprint(self) -> str:
        """A checksum of the data, by which a checkpoint knows them."""
        parts = [*as_tuple(self.x), *([] if self.s is None else [self.s])]
        arrays = [np.ascontiguousarray(part.detach().cpu().numpy()) for part in parts]
        return f"{self!r} {sum(zlib.crc32(array.tobytes()) for array in arrays):x}"

    def subset(self, indices: Tensor) -> "Pairs":
        """The pairs at `indices` (k,), in this order."""
        where = rows_of("Pairs.subset: indices", indices, len(self)).to(as_tuple(self.x)[0].device)
        x = tuple(part[where] for part in as_tuple(self.x))
        return Pairs(x if isinstance(self.x, tuple) else x[0], None if self.s is None else self.s[where])

    @checked(batch_size=count(0), generator=GENERATOR)
    def __call__(
        self, rule: Any, batch_size: int | None = None, generator: torch.Generator | None = None
    ) -> Trajectory:
        """Decisions of the rule on `batch_size` random pairs, or on all; failed samples are marked."""
        if batch_size is not None:
            if not 0 <= batch_size <= len(self):
                raise OptionError(f"batch_size must lie between 0 and {len(self)} for {self}, got {batch_size}")
            device = "cpu" if generator is None else generator.device
            order = torch.randperm(len(self), generator=generator, device=device)
            return self.subset(order[:batch_size])(rule)
        with collect_failures() as failures:
            s = as_rule(rule)(*as_tuple(self.x))
        first = s[0] if isinstance(s, tuple) else s
        if not isinstance(first, Tensor) or first.ndim == 0 or len(first) != len(self):
            got = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
            raise ShapeError(f"a rule returns decisions with the batch first: ({len(self)}, ...), got {got}")
        failed = failures.mask(len(self), first.device) | not_finite(s, len(self)).to(first.device)
        return Trajectory(self.x, s, target=self.s, failed=failed)


def _tensor(value: Any, name: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.as_tensor(value)
    got = type(value).__name__
    raise MissingParameterError(f"Pairs: {name} must be a tensor, an array or a tuple of them, got {got}")
