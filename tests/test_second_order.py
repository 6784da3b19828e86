"""The solver `socp`: solutions, statuses and gradients against Clarabel, optimality conditions and differences."""

import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch
from cone_families import clarabel_solution, family, kkt_error, objective
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import close, tensor

from convexlearn import ConvexLayer
from convexlearn.errors import AdjointWarning, OptionError
from convexlearn.program.program import Cones, ProgramData, Status
from convexlearn.solvers import choose
from convexlearn.solvers.second_order import lanes
from convexlearn.solvers.second_order.solver import SecondOrder, SecondOrderOptions

SOLVER = SecondOrder()
MIXED = Cones(zero=2, nonneg=5, soc=(3, 1, 6))


def solve(program, data, **options):
    return SOLVER.solve(program, data, SecondOrderOptions(**options))


def normal(like, seed):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 14), st.booleans(), st.lists(st.integers(1, 9), max_size=4), st.data())
def test_agrees_with_clarabel(seed, n, linear, soc, draw):
    zero, nonneg = draw.draw(st.integers(0, n // 2)), draw.draw(st.integers(0, 2 * n))
    cones = Cones(zero=zero, nonneg=nonneg, soc=tuple(soc))
    if cones.size == 0:
        return
    program, data = family(seed, n, cones, linear=linear, batch=3)
    solution = solve(program, data)
    assert solution.status.tolist() == [Status.SOLVED] * 3
    assert solution.residual.max() <= 1e-10
    assert solution.private.result.polished.all()
    for k in range(3):
        status, x, _ = clarabel_solution(program, data, k)
        if status == "Solved":
            expected = objective(program, data, k, x)
            assert objective(program, data, k, solution.x[k].numpy()) == pytest.approx(expected, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("seed", range(12))
def test_solutions_and_duals(seed):
    program, data = family(seed, 7, MIXED, linear=seed % 2 == 0)
    solution = solve(program, data)
    for k in range(5):
        x, z = solution.x[k].numpy(), solution.z[k].numpy()
        assert kkt_error(program, data, k, x, z) < 1e-9 * (1 + abs(x).max() + abs(z).max())
        _, x_, z_ = clarabel_solution(program, data, k)
        np.testing.assert_allclose(x, x_, atol=1e-4 * (1 + abs(x).max()))
        np.testing.assert_allclose(z, z_, atol=1e-4 * (1 + abs(z).max()))


@pytest.mark.parametrize("seed", range(8))
def test_gradients_against_central_differences(seed):
    program, data = family(seed, 6, MIXED, linear=seed % 2 == 0)
    solution = solve(program, data)
    wx, wz = normal(solution.x, seed), normal(solution.z, seed + 1)
    found = SOLVER.adjoint(solution, wx, wz)
    for k, (field, gradient) in enumerate(zip(data.fields(), found.fields())):
        direction = normal(field, seed + 2)
        slopes = []
        for h in (2e-5, 1e-5):
            ahead, behind = (
                solve(
                    program,
                    ProgramData(
                        *(f + s * h * direction if j == k else f for j, f in enumerate(data.fields())), batch=5
                    ),
                )
                for s in (1, -1)
            )
            change = (wx * (ahead.x - behind.x)).sum(1) + (wz * (ahead.z - behind.z)).sum(1)
            slopes.append(change / (2 * h))
        expected = (4 * slopes[1] - slopes[0]) / 3
        close((gradient * direction).sum(1), expected, 1e-6)


def test_polish_goes_on_while_it_gains():
    program, data = family(136096, 5, Cones(zero=0, nonneg=8, soc=(1, 3, 2, 5)), linear=False, batch=3)
    assert solve(program, data).residual.max() < 1e-12


@pytest.mark.parametrize("batch", [1, 2, 8, 9, 17])
def test_lanes_do_not_touch_each_other(batch):
    program, data = family(0, cones=MIXED, batch=batch)
    together = solve(program, data)
    for k in range(batch):
        alone = solve(program, ProgramData(*(f[k : k + 1] for f in data.fields()), batch=1))
        np.testing.assert_allclose(together.x[k], alone.x[0], atol=1e-10)
        np.testing.assert_allclose(together.z[k], alone.z[0], atol=1e-10)


def test_threads_give_the_same_bits():
    program, data = family(1, cones=MIXED, batch=100)
    data = ProgramData(data.P[:1], data.q, data.A[:1], data.b, batch=100)
    found = []
    for threads in (1, 2):
        solution = solve(program, data, threads=threads)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AdjointWarning)
            found.append((solution.x, solution.z, *SOLVER.adjoint(solution, solution.x, solution.z).fields()))
    for one, two in zip(*found):
        np.testing.assert_array_equal(one, two)


def margin(cones, v):
    """How far v is inside K without its zero cone: negative outside."""
    first, parts = cones.zero + cones.nonneg, [v[cones.zero : cones.zero + cones.nonneg].min()]
    for d in cones.soc:
        parts.append(v[first] - v[first + 1 : first + d].norm())
        first += d
    return min(parts)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("wanted", [Status.INFEASIBLE, Status.UNBOUNDED])
def test_infeasible_and_unbounded_members(seed, wanted):
    """b or q of some samples moved far away: every claim has a certificate, and Clarabel agrees."""
    infeasible = wanted == Status.INFEASIBLE
    cones = Cones(zero=1, nonneg=6, soc=(3, 4)) if infeasible else Cones(zero=1, nonneg=3, soc=(4,))
    program, data = family(seed, 6, cones, linear=True, batch=12)
    b, q = data.b.clone(), data.q.clone()
    moved = b if infeasible else q
    moved[::2] += 20 * normal(moved[::2], seed)
    data = ProgramData(data.P, q, data.A, b, batch=12)
    solution, A = solve(program, data), program.A.dense(data.A)
    names = {"Solved": 0, "AlmostSolved": 0, "PrimalInfeasible": 2, "DualInfeasible": 3}
    expected = [names.get(clarabel_solution(program, data, k)[0]) for k in range(12)]
    assert sum(status is not None for status in expected) >= 9
    assert all(status in (None, int(found)) for status, found in zip(expected, solution.status))
    claimed = np.flatnonzero(solution.status == wanted)
    assert len(claimed) >= 2
    for k in claimed:
        if infeasible:
            z = solution.z[k]
            errors, inside, value = A[k].mT @ z, margin(cones, z), b[k] @ z
        else:
            s = -A[k] @ solution.x[k]
            errors, inside, value = s[:1], margin(cones, s), q[k] @ solution.x[k]
        assert errors.abs().max() < 1e-6
        assert inside > -1e-6
        assert float(value) == pytest.approx(-1, abs=1e-6)


def test_a_failed_sample_leaves_the_others_alone():
    program, data = family(2, cones=MIXED, batch=6)
    q, b = data.q.clone(), data.b.clone()
    q[1, 0] = np.nan
    b[4, :2] += 1e3 * torch.tensor([1.0, -1.0], dtype=torch.float64)
    mixed = ProgramData(data.P, q, data.A, b, batch=6)
    reference, solution = solve(program, data), solve(program, mixed)
    assert solution.status[1] == Status.FAILED
    found = SOLVER.adjoint(solution, torch.ones_like(solution.x), torch.zeros_like(solution.z))
    for k in (0, 2, 3, 5):
        assert solution.status[k] == Status.SOLVED
        np.testing.assert_allclose(solution.x[k], reference.x[k], atol=1e-10)
    for gradient in found.fields():
        assert torch.isfinite(gradient).all()
        assert not gradient[~solution.ok].any()


@pytest.mark.parametrize("scale", [1e-5, 1e-2, 1e2, 1e5])
@pytest.mark.parametrize("kind", ["objective", "limits"])
def test_badly_scaled_data(kind, scale):
    program, data = family(4, cones=MIXED)
    reference = solve(program, data)
    if kind == "objective":
        data, factor = ProgramData(scale * data.P, scale * data.q, data.A, data.b, batch=5), 1.0
    else:  # x scales with the limits when the linear term does
        data, factor = ProgramData(data.P, scale * data.q, data.A, scale * data.b, batch=5), scale
    solution = solve(program, data)
    assert (solution.status == Status.SOLVED).all()
    np.testing.assert_allclose(solution.x, factor * reference.x, rtol=1e-7, atol=1e-7 * factor)


def test_warm_start_needs_no_interior_point():
    program, data = family(5, cones=MIXED)
    first = solve(program, data)
    again = SOLVER.solve(program, data, SecondOrderOptions(), first)
    assert again.iterations.tolist() == [0] * 5
    close(again.x, first.x, 1e-11)
    moved = ProgramData(data.P, data.q + 1e-3, data.A, data.b, batch=5)
    warm = SOLVER.solve(program, moved, SecondOrderOptions(), first)
    close(warm.x, solve(program, moved).x, 1e-9)


def test_limits_return_the_iterate():
    program, data = family(6, cones=MIXED)
    solution = solve(program, data, max_iterations=2)
    assert solution.iterations.max() <= 2
    assert torch.isfinite(solution.x).all()
    late = solve(program, data, time_limit=1e-9)
    assert (late.status == Status.FAILED).all()
    with pytest.raises(OptionError, match="threads must be an integer of at least 1"):
        SecondOrderOptions(threads=0)


def test_inequalities_without_a_limit_are_absent():
    program, data = family(7, cones=Cones(nonneg=4, soc=(4,)))
    b = data.b.clone()
    b[::2, 1] = np.inf
    solution = solve(program, ProgramData(data.P, data.q, data.A, b, batch=5))
    b[::2, 1] = 1e6
    reference = solve(program, ProgramData(data.P, data.q, data.A, b, batch=5))
    assert solution.status.tolist() == reference.status.tolist()
    ok = solution.ok
    close(solution.x[ok], reference.x[ok], 1e-9)
    assert not solution.z[::2, 1].any()


def test_large_cones_keep_a_sparse_factor():
    """A norm of 200 sparse terms: the factor stays linear in the dimension."""
    x, t = cp.Variable(200), cp.Parameter(200, name="t")
    D = np.eye(200) - np.eye(200, k=1)
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.norm2(D @ x)), [cp.abs(x - t) <= 0.5]), [t], [x], solver="socp")
    targets = 2 * normal(torch.empty(3, 200), 0)
    assert layer.solve(targets).status.tolist() == [Status.SOLVED] * 3
    plan = lanes.analyse(layer._compiled.program)
    assert plan.offset["N_L"] < 20 * plan.offset["N_K"]


@pytest.mark.parametrize(("n", "cones"), [(3, Cones(soc=(7,))), (6, Cones(zero=2, nonneg=9, soc=(14, 2, 20)))])
def test_rows_of_a_large_cone_enter_as_a_gram_matrix(n, cones):
    program, data = family(60, n, cones, linear=False, density=1.0)
    assert lanes.analyse(program).offset["N_PRODUCT"] > 0
    solution = solve(program, data)
    assert (solution.status == Status.SOLVED).all()
    for k in range(5):
        x, z = solution.x[k].numpy(), solution.z[k].numpy()
        assert kkt_error(program, data, k, x, z) < 1e-9 * (1 + abs(x).max() + abs(z).max())


def test_apex_of_a_cone_is_a_face_of_its_own():
    """Groups at zero and groups that are not: the slacks of their cones vanish, or lie on the boundary."""
    x, t = cp.Variable((3, 2)), cp.Parameter((3, 2), name="t")
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - t) + cp.sum(cp.norm(x, 2, axis=1))))
    layer = ConvexLayer(problem, [t], [x], solver="socp")
    target = tensor([[[0.3, -0.4], [3.0, 4.0], [0.0, 2.0]], [[-0.1, 0.2], [0.5, 0.5], [-1.0, 3.0]]]).requires_grad_()

    def shrink(t):
        norm = t.norm(dim=-1, keepdim=True)
        return (1 - 1 / norm).clamp(min=0) * t

    close(layer(target)[0], shrink(target), 1e-9)
    weights = normal(target, 1)
    ours, exact = (torch.autograd.grad((f(target) * weights).sum(), target)[0] for f in (lambda t: layer(t)[0], shrink))
    close(ours, exact, 1e-8)
    close(ours[0, 0], torch.zeros(2, dtype=torch.float64), 1e-8)


def test_portfolio_with_a_risk_limit():
    """max mu'w, |F w|_2 <= sigma, 1'w = 1, |w|_1 <= 1.6: closed optimality conditions, gradients by differences."""
    n = 8
    mu, F, sigma = cp.Parameter(n, name="mu"), cp.Parameter((n, n), name="F"), cp.Parameter(nonneg=True, name="sigma")
    w = cp.Variable(n)
    constraints = [cp.norm2(F @ w) <= sigma, cp.sum(w) == 1, cp.norm1(w) <= 1.6]
    layer = ConvexLayer(cp.Problem(cp.Maximize(mu @ w), constraints), [mu, F, sigma], [w])
    assert layer._solver.name == "socp"
    values = (
        normal(torch.empty(6, n), 0),
        torch.eye(n, dtype=torch.float64) + 0.1 * normal(torch.empty(n, n), 1),
        tensor(0.6),
    )
    leaves = [v.clone().requires_grad_() for v in values]
    (found,) = layer(*leaves)
    close(found.sum(1), torch.ones(6, dtype=torch.float64), 1e-10)
    assert ((found @ values[1].mT).norm(dim=1) <= 0.6 + 1e-10).all()
    assert (found.abs().sum(1) <= 1.6 + 1e-10).all()
    assert torch.autograd.gradcheck(layer, leaves, eps=1e-6, atol=1e-6, rtol=1e-6)


def test_choice_of_solver():
    assert choose(family(0, cones=Cones(nonneg=20))[0]).name == "quadratic"
    assert choose(family(0)[0]).name == "socp"
    X = cp.Variable((3, 3), symmetric=True)
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.trace(X)), [X >> np.eye(3), cp.norm(X, "fro") <= 9]), [], [X])
    assert layer._solver.name == "conic"
    with pytest.raises(OptionError, match="second-order cone constraints only"):
        ConvexLayer(cp.Problem(cp.Minimize(cp.trace(X)), [X >> np.eye(3)]), [], [X], solver="socp")
