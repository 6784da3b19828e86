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
def test_positive_part_has_the_right_derivative(dtype):
    X = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
    torch.autograd.gradcheck(positive_part, (X.requires_grad_(),))
    repeated = torch.diag(torch.tensor([1.0, 1.0, -2.0, -2.0], dtype=torch.float64)).to(dtype).requires_grad_()
    torch.autograd.gradcheck(positive_part, (repeated,))
