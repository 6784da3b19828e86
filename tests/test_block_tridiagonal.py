import pytest
import torch

from convexlearn.block_tridiagonal import solve
from convexlearn.errors import DomainError


def system(batch, steps=5, n=3):
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(batch, steps * n, steps * n, generator=generator, dtype=torch.float64)
    H = roots @ roots.mT / (steps * n) + torch.eye(steps * n).double()
    blocks = H.reshape(batch, steps, n, steps, n)
    diagonal = torch.stack([blocks[:, t, :, t] for t in range(steps)], 1)
    below = 0.3 * blocks[:, range(1, steps), :, range(steps - 1)].movedim(0, 1)
    return diagonal, below, torch.randn(4, steps, n, generator=generator, dtype=torch.float64)


def dense(diagonal, below):
    batch, steps, n, _ = diagonal.shape
    H = torch.zeros(batch, steps, n, steps, n, dtype=torch.float64)
    for t in range(steps):
        H[:, t, :, t] = diagonal[:, t]
    for t in range(steps - 1):
        H[:, t + 1, :, t] = below[:, t]
        H[:, t, :, t + 1] = below[:, t].mT
    return H.reshape(batch, steps * n, steps * n)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("steps", [1, 5])
def test_equals_the_dense_solution(batch, steps):
    diagonal, below, right = system(batch, steps)
    expected = torch.linalg.solve(dense(diagonal, below), right.flatten(1)[..., None])[..., 0]
    torch.testing.assert_close(solve(diagonal, below, right).flatten(1), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("batch", [1, 4])
def test_first_and_second_derivatives(batch):
    diagonal, below, right = (part.requires_grad_() for part in system(batch, 3, 2))

    def function(diagonal, below, right):  # the diagonal blocks are symmetric
        return solve((diagonal + diagonal.mT) / 2, below, right)

    assert torch.autograd.gradcheck(function, (diagonal, below, right))
    assert torch.autograd.gradgradcheck(function, (diagonal, below, right))


def test_a_matrix_that_is_not_definite_names_element_and_block():
    diagonal, below, right = system(4)
    diagonal[2, 3] = -diagonal[2, 3]
    with pytest.raises(DomainError, match="batch element 2 is not positive definite at block 3"):
        solve(diagonal, below, right)
