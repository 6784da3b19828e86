"""Runs to convergence and the linear solver of the implicit gradient."""

import torch

from convexlearn.adjoints import converge, gmres
from convexlearn.iterations.proximal_gradient import ISTA
from convexlearn.splitting import split
from tests.iteration_contract import contexts, lasso


def test_gmres_solves_each_sample():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.complex128):
        A = torch.eye(9) + 0.3 * torch.randn(4, 9, 9, generator=generator, dtype=dtype)
        b = torch.randn(4, 9, generator=generator, dtype=dtype)
        found = gmres(lambda w, A=A: (A @ w.unsqueeze(-1)).squeeze(-1), b)
        torch.testing.assert_close(found, torch.linalg.solve(A, b))


def test_gmres_solves_singular_consistent_systems():
    A = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    b = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(gmres(lambda w: w @ A, b), torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(gmres(lambda w: w @ A, 0 * b), 0 * b)


def test_a_converged_sample_stays_as_it_is():
    problem, x, s = lasso()
    iteration, xs = ISTA(split(problem, [x], s)), contexts(3) * torch.tensor([[0.0], [1.0], [3.0]])
    ends = []
    for chosen in (slice(0, 3), slice(1, 2)):
        instance = iteration.bind(xs[chosen])
        run = converge(iteration, iteration.layer(instance), iteration.start(instance), tol=1e-6, max_iterations=5000)
        ends.append(run)
    assert len(set(ends[0].iterations.tolist())) == 3
    assert ends[0].iterations[1] == ends[1].iterations[0]
    torch.testing.assert_close(ends[0].state.z[1:2], ends[1].state.z, rtol=0, atol=1e-12)
