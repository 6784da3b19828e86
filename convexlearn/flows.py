"""Normalizing flows: bijections g from a standard normal latent z to signals s, with their densities."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convexlearn.checks import checked, count, instance, number, require_that
from convexlearn.errors import DomainError, OptionError, ShapeError
from convexlearn.inputs import as_floating
from convexlearn.networks import mlp
from convexlearn.randomness import as_generator


class Bijection(nn.Module):
    """An invertible map on vectors `(N, n)`; `push` and `pull` give image and log |det| of their Jacobian `(N,)`."""

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """From the latent's side to the signal's."""
        raise NotImplementedError

    def pull(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `push`."""
        raise NotImplementedError

    def vectors(self, name: str, v: Any, size: int, like: Tensor | None = None) -> Tensor:
        """v as vectors `(N, size)`, in the dtype of `like`; anything else is refused."""
        v = as_floating(name, v, f"{type(self).__name__}: argument")
        if v.ndim != 2 or v.shape[1] != size:
            raise ShapeError(f"{type(self).__name__}: {name} must have shape (N, {size}), got {tuple(v.shape)}")
        return v if like is None else v.to(like.dtype)


class Affine(Bijection):
    """s = A z + b with an invertible matrix A `(n, n)` and b `(n,)`, both trained.

    >>> layer = Affine(torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([0.0, 3.0]))
    >>> layer.pull(layer.push(torch.tensor([[1.0, 5.0]]))[0])[0].detach()
    tensor([[1., 5.]])
    """

    def __init__(self, A: Tensor, b: Tensor) -> None:
        super().__init__()
        A, b = (as_floating(name, value, "Affine: argument") for name, value in (("A", A), ("b", b)))
        if A.ndim != 2 or A.shape[0] != A.shape[1] or b.shape != A.shape[:1]:
            raise ShapeError(f"Affine takes A (n, n) and b (n,), got {tuple(A.shape)} and {tuple(b.shape)}")
        if not bool(torch.isfinite(A).all() & torch.isfinite(b).all()):
            raise DomainError("Affine: A and b must not have NaN or infinite entries")
        if torch.linalg.slogdet(A.detach()).sign == 0:
            raise DomainError("Affine: A must be invertible, but its determinant is zero")
        self.A, self.b = nn.Parameter(A.detach().clone()), nn.Parameter(b.detach().to(A.dtype).clone())

    @classmethod
    def fit(cls, s: Tensor, *, floor: float = 1e-3) -> "Affine":
        """The map whose image of a standard normal z has mean and covariance of the samples s `(N, n)`.

        A is symmetric; standard deviations along the principal directions are at least `floor`, in the unit of s.
        """
        s = as_floating("s", s, "Affine.fit: samples")
        require_that("Affine.fit", "floor", number(above=0), floor)
        if s.ndim != 2 or 0 in s.shape or not bool(torch.isfinite(s).all()):
            raise ShapeError(f"Affine.fit: s must be finite samples (N, n), N and n positive, got {tuple(s.shape)}")
        mean = s.mean(0)
        variances, directions = torch.linalg.eigh((s - mean).mT @ (s - mean) / len(s))
        return cls((directions * variances.clamp(min=floor**2).sqrt()) @ directions.mT, mean)

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """A z + b."""
        z = self.vectors("z", z, len(self.b), self.A)
        return z @ self.A.mT + self.b, self._log_determinant(z)

    def pull(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """A^-1 (s - b)."""
        s = self.vectors("s", s, len(self.b), self.A)
        try:
            return torch.linalg.solve(self.A, (s - self.b).mT).mT, -self._log_determinant(s)
        except torch.linalg.LinAlgError as error:
            raise DomainError("Affine: A must be invertible, but its determinant is zero") from error

    def _log_determinant(self, like: Tensor) -> Tensor:
        return torch.linalg.slogdet(self.A).logabsdet.expand(len(like))


class AffineCoupling(Bijection):
    """One layer of RealNVP (Dinh et al. 2017): entries at `moved` are scaled and shifted by functions of the others.

    The network maps the other entries to as many shifts and then log-scales, which lie in (-bound, bound).
    """

    @checked(size=count(2), network=instance(nn.Module, "an nn.Module"), bound=number(above=0))
    def __init__(self, size: int, moved: Sequence[int], network: nn.Module, *, bound: float = 2.0) -> None:
        super().__init__()
        if not isinstance(moved, list | tuple | range) or not all(type(k) is int for k in moved):
            raise OptionError(f"AffineCoupling: moved must be a list of integers, got {moved!r}")
        self.moved = sorted(set(moved))
        self.kept = [i for i in range(size) if i not in set(moved)]
        if len(self.moved) != len(moved) or not 0 < len(moved) < size or not set(moved) < set(range(size)):
            raise OptionError(
                f"AffineCoupling: moved must name some, not all, of the entries 0, ..., {size - 1}, each once; "
                f"got {moved}"
            )
        self.bound, self.network = bound, network
        self._order = torch.tensor([*self.kept, *self.moved]).argsort().tolist()

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """exp(scale) z + shift at the moved entries."""
        z = self.vectors("z", z, len(self._order))
        shift, scale = self._maps(z[:, self.kept])
        return self._join(z[:, self.kept], z[:, self.moved] * scale.exp() + shift), scale.sum(1)

    def pull(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """exp(-scale) (s - shift) at the moved entries."""
        s = self.vectors("s", s, len(self._order))
        shift, scale = self._maps(s[:, self.kept])
        return self._join(s[:, self.kept], (s[:, self.moved] - shift) * (-scale).exp()), -scale.sum(1)

    def _maps(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        weight = next(self.network.parameters(), kept)
        found = self.network(kept.to(weight.dtype))
        wanted = (len(kept), 2 * len(self.moved))
        if not isinstance(found, Tensor) or found.shape != wanted:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ShapeError(f"AffineCoupling: the network must return shape {wanted}, got {got}")
        shift, scale = found.to(kept.dtype).split(len(self.moved), 1)
        return shift, self.bound * torch.tanh(scale / self.bound)

    def _join(self, kept: Tensor, moved: Tensor) -> Tensor:
        return torch.cat([kept, moved], 1)[:, self._order]


class Flow(nn.Module):
    """The bijection g of Eq. 27 as a chain of layers, from the latent to the signal: z `(N, n)` -> s `(N, n)`.

    With z standard normal it is a model of signals: `log_density` is what maximum likelihood maximizes.

    >>> flow = Flow([Affine(2 * torch.eye(2), torch.ones(2))])
    >>> flow(torch.zeros(1, 2)).detach(), flow.inverse(torch.ones(1, 2)).abs().detach()
    (tensor([[1., 1.]]), tensor([[0., 0.]]))
    """

    def __init__(self, layers: Iterable[Bijection]) -> None:
        super().__init__()
        layers = list(layers) if isinstance(layers, Iterable) else [layers]
        for layer in layers:
            require_that("Flow", "layers", instance(Bijection, "a list of Bijections"), layer)
        self.layers = nn.ModuleList(layers)

    def forward(self, z: Tensor) -> Tensor:
        """g(z)."""
        return self.push(z)[0]

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """g(z) and log |det dg/dz| `(N,)`."""
        z = _batch("z", z)
        total = z.new_zeros(len(z))
        for layer in self.layers:
            z, change = layer.push(z)  # pyright: ignore[reportCallIssue]
            total = total + change
        return z, total

    def inverse(self, s: Tensor) -> Tensor:
        """g^-1(s) `(N, n)`."""
        return self._pull(s)[0]

    def log_density(self, s: Tensor) -> Tensor:
        """log p(s) `(N,)` in nats: the standard normal density of g^-1(s), times |det dg^-1/ds|."""
        z, change = self._pull(s)
        return change - _normal(z)

    def potential(self, z: Tensor) -> Tensor:
        """phi(g(z)) = -log p(g(z)) `(N,)`: the prior term of Eq. 27, as a function of the latent."""
        z = _batch("z", z)
        return _normal(z) + self.push(z)[1]

    def _pull(self, s: Tensor) -> tuple[Tensor, Tensor]:
        s = _batch("s", s)
        total = s.new_zeros(len(s))
        for layer in reversed(self.layers):
            s, change = layer.pull(s)  # pyright: ignore[reportCallIssue]
            total = total + change
        return s, total


def real_nvp(
    size: int, *, couplings: int = 6, hidden: Sequence[int] = (64,), base: Affine | None = None, seed: int = 0
) -> Flow:
    """A RealNVP on vectors of `size` entries: affine couplings that move one random half after the other, then `base`.

    Couplings start as the identity, so that the flow starts as `base` (default: the identity map).

    >>> real_nvp(4, couplings=2)(torch.ones(1, 4)).detach()
    tensor([[1., 1., 1., 1.]])
    """
    require_that("real_nvp", "size", count(2), size)
    require_that("real_nvp", "couplings", count(0), couplings)
    base = Affine(torch.eye(size), torch.zeros(size)) if base is None else base
    require_that("real_nvp", "base", instance(Affine, "an Affine"), base)
    base.vectors("base: b", base.b[None], size)
    generator = as_generator("real_nvp", seed)
    layers: list[Bijection] = []
    order = list(range(size))
    for k in range(couplings):
        if k % 2 == 0:
            order = torch.randperm(size, generator=generator).tolist()
        half = order[: size // 2] if k % 2 == 0 else order[size // 2 :]
        network = mlp(size - len(half), 2 * len(half), hidden=hidden, activation=nn.SiLU, seed=generator)
        with torch.no_grad():
            network[-1].weight.zero_()  # pyright: ignore[reportCallIssue]
        layers.append(AffineCoupling(size, half, network))
    return Flow([*layers, base])


def _batch(name: str, v: Any) -> Tensor:
    v = as_floating(name, v, "Flow: argument")
    if v.ndim != 2:
        raise ShapeError(f"Flow: {name} must have shape (N, n), got {tuple(v.shape)}")
    return v


def _normal(z: Tensor) -> Tensor:
    """-log density of the standard normal distribution `(N,)`."""
    return z.square().sum(1) / 2 + 0.5 * z.shape[1] * math.log(2 * math.pi)
