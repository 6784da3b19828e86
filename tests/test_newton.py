import math

import pytest
import torch

from convexlearn import newton


def test_a_quadratic_takes_one_step_and_ends_at_the_solution():
    A = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, 2.0], [-4.0, 0.5]], dtype=torch.float64)
    found = newton.minimize(lambda z, b: ((z @ A) * z).sum(1) / 2 - (b * z).sum(1), torch.zeros_like(b), (b,))
    torch.testing.assert_close(found.point, torch.linalg.solve(A, b.mT).mT)
    assert found.converged.all()
    assert found.iterations.tolist() == [2, 2]  # the second one sees that nothing moves


def test_rosenbrock_from_the_usual_start():
    def rosenbrock(z):
        return 100 * (z[:, 1] - z[:, 0] ** 2) ** 2 + (1 - z[:, 0]) ** 2

    start = torch.tensor([[-1.2, 1.0], [1.0, 1.0]], dtype=torch.float64)
    found = newton.minimize(rosenbrock, start)
    torch.testing.assert_close(found.point, torch.ones_like(start), atol=1e-9, rtol=0)
    assert found.converged.all()
    assert found.iterations[0] > found.iterations[1] == 1


def test_an_indefinite_start_ends_in_a_minimum_and_never_at_the_saddle():
    found = newton.minimize(
        lambda z: z[:, 0] ** 4 / 4 - z[:, 0] ** 2 / 2 + z[:, 1] ** 2, _rows([[0.1, 3.0], [-1e-6, 0.0]])
    )
    torch.testing.assert_close(found.point, _rows([[1.0, 0.0], [-1.0, 0.0]]), atol=1e-9, rtol=0)


def test_derivatives_equal_those_of_autograd():
    generator = torch.Generator().manual_seed(0)
    z, x = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))

    def function(z, x):
        return (z.sin() * x.exp()).prod(1) + (z**3).sum(1)

    gradient, hessian = newton.derivatives(function, z, (x,))
    for i in range(3):

        def one(v, i=i):
            return function(v[None], x[i : i + 1])[0]

        torch.testing.assert_close(gradient[i], torch.func.grad(one)(z[i]))
        torch.testing.assert_close(hessian[i], torch.autograd.functional.hessian(one, z[i]))


def test_derivatives_in_closed_form_replace_those_of_autograd():
    c = _rows([[1.0, -2.0, 0.5], [0.2, 0.1, 3.0]])
    calls = []

    def derivatives(z, c):
        calls.append(len(z))
        return z.exp() - c.exp(), torch.diag_embed(z.exp())

    found = newton.minimize(
        lambda z, c: (z.exp() - c.exp() * z).sum(1), torch.zeros_like(c), (c,), closed_form=derivatives
    )
    torch.testing.assert_close(found.point, c, atol=1e-9, rtol=0)
    assert found.converged.all()
    assert len(calls) == found.iterations.max()


def test_blocks_change_nothing(monkeypatch):
    z = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(6, 2)
    whole = newton.derivatives(lambda z: (z**4).sum(1), z)
    monkeypatch.setattr(newton, "BLOCK", 4)
    for a, b in zip(newton.derivatives(lambda z: (z**4).sum(1), z), whole):
        assert torch.equal(a, b)


def test_a_sample_that_is_not_finite_or_has_no_minimum_leaves_the_others_alone():
    def function(z, c):
        return (c * (z**4 / 4 - z)).sum(1)

    c = torch.tensor([[1.0], [math.nan], [-1.0]], dtype=torch.float64)
    found = newton.minimize(function, torch.full((3, 1), 2.0, dtype=torch.float64), (c,), max_iterations=50)
    assert found.converged.tolist() == [True, False, False]
    assert abs(found.point[0].item() - 1) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_follows_the_start(dtype):
    found = newton.minimize(lambda z: z.exp().sum(1) - 2 * z.sum(1), torch.zeros(1, 1, dtype=dtype))
    assert found.point.dtype == dtype
    assert found.converged.all()
    assert abs(found.point.item() - math.log(2)) < 10 * torch.finfo(dtype).eps


def test_the_implicit_gradient_is_that_of_the_closed_form():
    c = _rows([[0.5], [2.0]]).requires_grad_()
    found = newton.minimize(
        lambda z, c: (z.exp() - c * z).sum(1), torch.zeros(2, 1, dtype=torch.float64), (c.detach(),)
    )
    z = newton.attach_implicit_gradient(lambda z, c: (z.exp() - c * z).sum(1), found.point, (c,))
    torch.testing.assert_close(z, c.log())
    torch.testing.assert_close(torch.autograd.grad(z.sum(), c)[0], 1 / c.detach())


def test_a_singular_hessian_gives_no_gradient_instead_of_a_wrong_one():
    c = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    z = newton.attach_implicit_gradient(
        lambda z, c: (c * z[:, :1]).sum(1), torch.zeros(1, 2, dtype=torch.float64), (c,)
    )
    assert torch.autograd.grad(z.sum(), c)[0].item() == 0


def _rows(values):
    return torch.tensor(values, dtype=torch.float64)
