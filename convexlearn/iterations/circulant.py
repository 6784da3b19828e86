"""Which maps of a split problem are circular convolutions, so that a Fourier transform diagonalises them."""

from collections.abc import Callable

import torch
from torch import Tensor

from convexlearn.checks import FUNCTION, SIZES, require_that
from convexlearn.iterations.blocks import Blocks
from convexlearn.split_instance import Instance

EXACT = 1e-10
"""A map that differs from a circular convolution by more than this, relative to its action, is none."""


def gram_spectra(instance: Instance, blocks: Blocks) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues of A'A and of K'K by frequency, each in the shape of the variable, float64; None where one is no
    circular convolution of a single real variable, or depends on a parameter. Found once for each split.
    """
    split = instance.split
    fixed = all(
        p.map.fixed is not None and (p.weight is None or not p.weight.map.parameters) for p in split.quadratics
    ) and all(t.map.fixed is not None for t in split.terms)
    if not fixed or not split.quadratics or len(split.variables) != 1 or split.variables[0].is_complex:
        return None
    known = split.__dict__.setdefault("_gram_spectra", {})
    own = bool(blocks.terms)  # else K is the identity
    if own not in known:
        known[own] = _spectra(split.nominal(), own)
    found = known[own]
    return None if found is None else (found[0].to(instance.like.device), found[1].to(instance.like.device))


def _spectra(nominal: Instance, own: bool) -> tuple[Tensor, Tensor] | None:
    shape, A = nominal.split.variables[0].shape, nominal.A
    assert A is not None
    fidelity = spectrum(lambda z: A.adjoint(A(z)), shape)
    if fidelity is None:
        return None
    blocks = Blocks(nominal, nominal.terms if own else [])
    linear = Blocks(nominal, [])

    def gram(z: Tensor) -> Tensor:
        if not own:
            return linear.image(z)
        return sum((t.map.adjoint(t.map(z)) for t in blocks.terms), torch.zeros_like(z))

    terms = spectrum(gram, shape)
    return None if terms is None else (fidelity, terms)


def spectrum(gram: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor | None:
    """Eigenvalues `shape` of a symmetric positive semidefinite map of z `(B, n)`; None where it is not circular.

    >>> spectrum(lambda z: 2 * z - z.roll(1, 1) - z.roll(-1, 1), (4,))
    tensor([0., 2., 4., 2.], dtype=torch.float64)
    """
    require_that("spectrum", "gram", FUNCTION, gram)
    require_that("spectrum", "shape", SIZES, shape)
    probes = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probes[0] = 0
    probes[0].view(-1)[0] = 1
    response, acted = gram(probes.flatten(1)).reshape(2, *shape)
    dims = tuple(range(len(shape)))
    values = torch.fft.fftn(response, dim=dims)
    expected = torch.fft.ifftn(values * torch.fft.fftn(probes[1], dim=dims), dim=dims).real
    scale = acted.abs().max()
    circular = bool(values.imag.abs().max() <= EXACT * values.abs().max())
    return values.real.clamp(min=0) if circular and bool((expected - acted).abs().max() <= EXACT * scale) else None
