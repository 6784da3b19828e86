"""The linear Gaussian plant of Eq. 7, with all states seen or some, and inputs in a box or free."""

from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from convexlearn.checks import GENERATOR, checked, count, number, require_that
from convexlearn.errors import DomainError, OptionError, ShapeError
from convexlearn.inputs import as_tensor, check_noise, check_rows, check_step
from convexlearn.riccati import check_psd


@checked(seed=count(0), n=count(), m=count())
def random_linear(seed: int, n: int, m: int) -> tuple[Tensor, Tensor]:
    """A `(n, n)` of spectral radius 1 and B `(n, m)`, as numpy's legacy generator draws them from `seed`.

    The LQR instance of Agrawal, Barratt, Boyd, Stellato (Learning convex optimization control policies) is
    (0, 4, 2), box LQR (1, 8, 2).

    >>> A, B = random_linear(0, 4, 2)
    >>> round(torch.linalg.eigvals(A).abs().max().item(), 12), B.shape
    (1.0, torch.Size([4, 2]))
    """
    rng = np.random.RandomState(seed)
    A = rng.randn(n, n)
    A /= np.abs(np.linalg.eigvals(A)).max()
    return torch.tensor(A), torch.tensor(rng.randn(n, m))


class Noise(NamedTuple):
    """Process noise `(B, n)` and observation noise `(B, p)` (None without observations)."""

    process: Tensor
    observation: Any = None


MATRICES = ("A", "B", "V", "C", "W", "start", "Q", "R")


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    """z+ = A z + B u + v, x = C z + w with v ~ N(0, V), w ~ N(0, W) (Eq. 7 of the paper).

    A `(n, n)`, B `(n, m)`, V `(n, n)`; C `(p, n)` and W `(p, p)` for partial observations, else x = z.
    z_0 ~ N(0, start) with start `(n, n)`, the identity by default. limit: the actuators clip u to
    [-limit, limit]. Q `(n, n)` and R `(m, m)` weigh the stage cost z'Qz + u'Ru, identity by default.

    >>> plant = LinearGaussian(*random_linear(0, 4, 2), V=0.25 * torch.eye(4).double())
    >>> generator = torch.Generator().manual_seed(0)
    >>> z = plant.initial(3, generator)
    >>> plant(z, torch.zeros(3, 2).double(), plant.noise(3, 0, generator)).shape
    torch.Size([3, 4])
    """

    A: Tensor
    B: Tensor
    V: Tensor
    _: KW_ONLY
    C: Tensor | None = None
    W: Tensor | None = None
    start: Tensor | None = None
    limit: float | None = None
    Q: Tensor | None = None
    R: Tensor | None = None

    def __post_init__(self) -> None:
        for name in MATRICES:
            if (value := getattr(self, name)) is not None or name in ("A", "B", "V"):
                object.__setattr__(self, name, _matrix(name, value))
        if self.W is not None and self.C is None:
            raise OptionError("LinearGaussian: W is observation noise; give C too, for instance the identity")
        if self.limit is not None:
            require_that("LinearGaussian", "limit", number(above=0, infinite=True), self.limit)
        n, m = len(self.A), self.B.shape[1]
        p = n if self.C is None else len(self.C)
        wanted = {"A": (n, n), "B": (n, m), "V": (n, n), "C": (p, n), "W": (p, p)}
        wanted |= {"start": (n, n), "Q": (n, n), "R": (m, m)}
        for name, shape in wanted.items():
            matrix = getattr(self, name)
            if matrix is not None and tuple(matrix.shape) != shape:
                raise ShapeError(f"LinearGaussian: {name} must have shape {shape}, got {tuple(matrix.shape)}")
        for name in ("V", "W", "start", "Q", "R"):
            if (matrix := getattr(self, name)) is not None:
                check_psd(f"LinearGaussian: {name}", (matrix + matrix.mT) / 2)

    def __call__(self, z: Tensor, u: Tensor, w: Any) -> Tensor:
        """z+ `(B, n)` for z `(B, n)`, u `(B, m)`; w is process noise `(B, n)` or Noise."""
        n, m = self.B.shape
        v: Any = w[0] if isinstance(w, tuple) and w else w
        check_step("LinearGaussian", z, n, u, m, v)
        if self.limit is not None:
            u = u.clamp(-self.limit, self.limit)
        A, B = self._transposed if z.dtype == self.A.dtype else (M.to(z.dtype) for M in self._transposed)
        return z @ A + u.to(z.dtype) @ B + v

    def observe(self, z: Tensor, t: int, w: Any) -> Tensor:
        """x `(B, p)`: C z plus observation noise where w is Noise."""
        check_rows("LinearGaussian", "z", z, len(self.A))
        x = z if self.C is None else z @ self.C.to(z.dtype).mT
        if not isinstance(w, tuple) or len(w) < 2 or w[1] is None:
            return x
        check_noise("LinearGaussian", w[1], x)
        return x + w[1]

    def stage_cost(self, z: Tensor, u: Tensor) -> Tensor:
        """z'Qz + u'Ru `(B,)`."""
        check_step("LinearGaussian", z, len(self.A), u, self.B.shape[1])
        return _quadratic(z, self.Q) + _quadratic(u, self.R)

    @checked(batch=count(0), generator=GENERATOR)
    def initial(self, batch: int, generator: torch.Generator) -> Tensor:
        """z_0 `(batch, n)`."""
        z = torch.randn(batch, len(self.A), generator=generator, dtype=self.A.dtype)
        return z if self.start is None else z @ self._roots["start"].mT

    @checked(batch=count(0), generator=GENERATOR)
    def noise(self, batch: int, t: int, generator: torch.Generator) -> Any:
        """v `(batch, n)`, or Noise (v, w) where W is given."""
        v, w = (
            None if M is None else torch.randn(batch, len(M), generator=generator, dtype=M.dtype) @ M.mT
            for M in (self._roots["V"], self._roots.get("W"))
        )
        return v if w is None else Noise(v, w)  # pyright: ignore[reportArgumentType]

    @cached_property
    def _transposed(self) -> tuple[Tensor, Tensor]:
        return self.A.mT, self.B.mT

    @cached_property
    def _roots(self) -> dict[str, Tensor]:
        given = ((name, getattr(self, name)) for name in ("V", "W", "start"))
        return {name: _root(matrix) for name, matrix in given if matrix is not None}


def _matrix(name: str, value: Any) -> Tensor:
    """The value as a finite matrix; float64 unless it is a floating tensor."""
    matrix = as_tensor(name, value, "LinearGaussian:")
    matrix = matrix if isinstance(value, Tensor) else matrix.to(torch.float64, copy=True)
    matrix = matrix if matrix.is_floating_point() else matrix.to(torch.float64)
    if matrix.ndim != 2:
        raise ShapeError(f"LinearGaussian: {name} must be a matrix, got shape {tuple(matrix.shape)}")
    bad = torch.nonzero(~torch.isfinite(matrix.detach()))
    if len(bad):
        i, j = bad[0].tolist()
        raise DomainError(
            f"LinearGaussian: {name} has the entry {matrix[i, j].item()} at ({i}, {j}); a model has finite entries only"
        )
    return matrix


def _root(covariance: Tensor) -> Tensor:
    """M with M M' = covariance, which may be singular."""
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    return vectors * values.clamp(min=0).sqrt()


def _quadratic(x: Tensor, weight: Tensor | None) -> Tensor:
    return x.square().sum(-1) if weight is None else ((x @ weight.to(x.dtype)) * x).sum(-1)
