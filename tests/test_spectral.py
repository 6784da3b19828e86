"""Functions of singular values and eigenvalues: derivatives, also where values coincide."""

import pytest
import torch

from convexlearn.spectral import positive_part, shrink_singular_values


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3, 5), (2, 3, 3)])
def test_shrinking_has_the_right_derivative(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
    t = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(shrink_singular_values, (X, t))


def test_repeated_singular_values_do_no_harm():
    X = (2 * torch.eye(3, dtype=torch.float64)).requires_grad_()
    torch.autograd.gradcheck(lambda X: shrink_singular_values(X, 0.5), (X,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_relative_shrinking_follows_the_largest_singular_value(dtype):
    X = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=dtype).requires_grad_()
    t = torch.tensor([0.2, 0.4], dtype=torch.float64, requires_grad=True)
    largest = torch.linalg.matrix_norm(X, 2).detach()
    torch.testing.assert_close(shrink_singular_values(X, t, relative=True), shrink_singular_values(X, t * largest))
    torch.autograd.gradcheck(lambda X, t: shrink_singular_values(X, t, relative=True), (X, t))


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("rank", [4, 2])
def test_tall_matrices_in_single_precision(relative, rank):
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(2, n, rank, generator=generator, dtype=torch.complex128) for n in (40, 4)]
    X, weight = factors[0] @ factors[1].mH, torch.randn(2, 40, 4, generator=generator, dtype=torch.complex128)
    results = []
    for dtype in (torch.complex64, torch.complex128):
        x = X.to(dtype).requires_grad_()
        value = shrink_singular_values(x, torch.tensor(0.3), relative=relative)
        results.append((value, *torch.autograd.grad((value * weight.to(dtype)).real.sum(), x)))
    for single, double in zip(*results):
        torch.testing.assert_close(single.to(double.dtype), double, rtol=1e-5, atol=1e-5 * double.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_positive_part_has_the_right_derivative(dtype):
    X = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
    torch.autograd.gradcheck(positive_part, (X.requires_grad_(),))
    repeated = torch.diag(torch.tensor([1.0, 1.0, -2.0, -2.0], dtype=torch.float64)).to(dtype).requires_grad_()
    torch.autograd.gradcheck(positive_part, (repeated,))
