"""The operators of the dispatcher: PyTorch's own checks, and several right-hand sides."""

import pytest
import torch
from reference import close
from transform_cases import CASES, normal

from convexlearn.operators import Recipe, Settings, recipe_of


@pytest.fixture(params=CASES)
def call(request):
    case = CASES[request.param]()
    prepared = case.layer._prepared
    flat = [v.reshape(-1 if k == 0 else 1, w) for k, (v, w) in enumerate(zip(case.values, prepared.layout.widths))]
    return case, prepared, flat, case.layer._settings(False)


def test_opcheck_of_solve(call):
    _, prepared, flat, settings = call
    layout = prepared.layout
    torch.library.opcheck(torch.ops.convexlearn.solve.default, (prepared.structure, flat, layout.n, layout.m, settings))


def test_opcheck_of_adjoint(call):
    _, prepared, flat, settings = call
    n, m = prepared.layout.n, prepared.layout.m
    x, *_ = torch.ops.convexlearn.solve(prepared.structure, flat, n, m, settings)
    right = normal(2, 3, n), normal(2, 3, m, seed=1)
    torch.library.opcheck(torch.ops.convexlearn.adjoint.default, (prepared.structure, flat, x, *right, settings))


def test_adjoint_is_symmetric_and_linear_in_several_right_hand_sides(call):
    _, prepared, flat, settings = call
    n, m = prepared.layout.n, prepared.layout.m
    x, *_ = torch.ops.convexlearn.solve(prepared.structure, flat, n, m, settings)
    rx, rz = normal(2, 2, n), normal(2, 2, m, seed=1)
    apply = lambda a, b: torch.ops.convexlearn.adjoint(prepared.structure, flat, x, a, b, settings)  # noqa: E731
    wx, wz = apply(rx, rz)
    close((wx[:, 0] * rx[:, 1]).sum(1) + (wz[:, 0] * rz[:, 1]).sum(1),
          (wx[:, 1] * rx[:, 0]).sum(1) + (wz[:, 1] * rz[:, 0]).sum(1), 1e-6)  # fmt: skip
    sums = apply(rx.sum(1, keepdim=True), rz.sum(1, keepdim=True))
    for found, expected in zip(sums, (wx, wz)):
        close(found[:, 0], expected.sum(1), 1e-7)


def test_adjoint_without_the_solution_solves_again(call):
    """A clone of x is another tensor, for which no solution is kept."""
    _, prepared, flat, settings = call
    n, m = prepared.layout.n, prepared.layout.m
    x, *_ = torch.ops.convexlearn.solve(prepared.structure, flat, n, m, settings)
    right = normal(2, 1, n), normal(2, 1, m, seed=1)
    kept = torch.ops.convexlearn.adjoint(prepared.structure, flat, x, *right, settings)
    again = torch.ops.convexlearn.adjoint(prepared.structure, flat, x.clone(), *right, settings)
    for a, b in zip(kept, again):
        close(a, b, 1e-7)


def test_solutions_are_kept_as_long_as_x_lives(call):
    _, prepared, flat, settings = call
    layout = prepared.layout
    solve = lambda: torch.ops.convexlearn.solve(prepared.structure, flat, layout.n, layout.m, settings)  # noqa: E731
    first = solve()
    assert len(prepared.recipe.states) == 1
    del first
    second = solve()
    assert len(prepared.recipe.states) == 1
    assert second[0].data_ptr() in prepared.recipe.states


def test_a_structure_alone_solves(call):
    """A copy decoded from the tensor, as in another process, solves the same problem."""
    case, prepared, flat, settings = call
    from convexlearn.program.structure import decode
    from convexlearn.solvers import SOLVERS

    compiled, name = decode(prepared.structure)
    recipe = Recipe(compiled, SOLVERS[name]())
    solver_settings = Settings.read(settings, recipe.solver)
    found = recipe.solver.solve(compiled.program, recipe.data(flat), solver_settings.options)
    close(found.x, case.layer.solve(*case.values).solution.x, 1e-9)
    assert recipe_of(prepared.structure) is prepared.recipe
