"""The default layer on random, degenerate, badly scaled and mixed batches, judged by code that is not ours."""

import threading
import warnings
from functools import cache

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_programs import (
    KINDS,
    Family,
    clarabel_verdict,
    draw,
    highs_finds_a_ray,
    highs_says_infeasible,
    optimality_error,
    sample,
)

from convexlearn import ConvexLayer, Status
from convexlearn.errors import AdjointWarning

STRUCTURES = (
    {"n": 1, "rank": 1, "ineq": 12, "bounds": False},
    {"n": 5, "rank": 2, "eq": 2, "ineq": 5},
    {"n": 7, "eq": 3, "ineq": 5},
    {"n": 6, "rank": 6, "eq": 1, "bounds": False},
    {"n": 6, "rank": 3, "eq": 2, "bounds": False, "norm1": True},
    {"n": 8, "rank": 1, "ineq": 12, "norm1": True},
    {"n": 4, "rank": 6},
    {"n": 6, "ineq": 12, "bounds": False},
    {"n": 5, "rank": 5, "bounds": False},
)

structure = st.integers(0, len(STRUCTURES) - 1)
seed = st.integers(0, 2**31)


@cache
def family(k, path="auto"):
    return Family(**STRUCTURES[k], options={} if path == "auto" else {"path": path})


def judge(of, d, status, point, comparable=True):
    """Compare the verdict on one sample with the conditions, Clarabel and HiGHS; the objection as text, or None.

    comparable: Clarabel's objective value can be trusted, which it can't with variables or rows of all sizes.
    """
    verdict, objective = clarabel_verdict(of, d)
    if status == Status.SOLVED:
        error = optimality_error(d, point)
        if not error < 1e-8:
            return f"solved, but with an error of {error}"
        ours = of.objective(d, point["x"])
        if comparable and verdict == "Solved" and abs(ours - objective) > 1e-5 * (1 + abs(objective)):
            return f"solved with {ours}, Clarabel's objective is {objective}"
        return None if "Infeasible" not in verdict else f"solved, Clarabel says {verdict}"
    if status == Status.INFEASIBLE and (verdict == "PrimalInfeasible" or highs_says_infeasible(of, d)):
        return None
    if status == Status.UNBOUNDED and (verdict == "DualInfeasible" or highs_finds_a_ray(of, d)):
        return None
    return f"{Status(status).name}, Clarabel says {verdict}"


def campaign(of, kind, rng, batch):
    """Objections to a batch, and whether its gradients are finite."""
    data = draw(of, rng, batch, kind)
    leaves = of.tensors(data, grad=True)
    result = of.layer.solve(*leaves)
    arrays = [v.detach().numpy() for v in result.variables]
    objections = []
    for k in range(batch):
        point = {name: v[k] for name, v in zip(of.outputs, arrays)}
        objections.append(judge(of, sample(data, k), int(result.status[k]), point, kind not in ("scaled", "units")))
    generator = torch.Generator().manual_seed(0)
    parts = [torch.where(result.ok[:, None], v, 0.0) for v in result.variables]
    weights = (torch.randn(v.shape, generator=generator, dtype=torch.float64) for v in parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdjointWarning)
        sum((v * w).sum() for v, w in zip(parts, weights)).backward()
    finite = all(bool(v.grad.isfinite().all()) for v in leaves)
    return [(kind, k, text) for k, text in enumerate(objections) if text], finite


@settings(max_examples=40, deadline=None)
@given(structure, st.sampled_from(KINDS), seed)
def test_verdicts_on_random_batches(k, kind, number):
    objections, finite = campaign(family(k), kind, np.random.default_rng(number), 6)
    assert not objections
    assert finite


@pytest.mark.slow
@pytest.mark.parametrize("path", ["auto", "lanes", "sparse"])
def test_fuzz(path):
    """About 13,000 samples of all structures and kinds; a path that is forced may give up, but is never wrong.

    Not "units" by "sparse": rows 1e12 apart in size need the equilibrated polish of the lanes, since the residual that
    decides a status is relative to all rows together.
    """
    rng, wrong, undecided, infinite, samples = np.random.default_rng(11), [], [], 0, 0
    for k in range(len(STRUCTURES)):
        for kind in KINDS:
            if (kind, path) == ("units", "sparse"):
                continue
            for _ in range(8 if path == "auto" else 4):
                found, finite = campaign(family(k, path), kind, rng, 20)
                for objection in found:
                    gave_up = objection[2].startswith(("FAILED", "INACCURATE"))
                    (undecided if gave_up else wrong).append((k, *objection))
                infinite, samples = infinite + (not finite), samples + 20
    print(f"{path}: {samples} samples, {len(wrong)} wrong, {len(undecided)} undecided")
    assert not wrong
    assert not infinite
    assert path != "auto" or not undecided


@settings(max_examples=15, deadline=None)
@given(structure, seed, st.sampled_from(["auto", "lanes"]))
def test_other_samples_do_not_matter(k, number, path):
    """In a batch with infeasible, unbounded and degenerate samples every sample is as if it were alone.

    Twice, since matrices of a batch of one are common to the batch, which "auto" solves in another way.
    """
    of = family(k, path)
    data = draw(of, np.random.default_rng(number), 5, "mixed")
    together = of.solve(data)
    for i in range(5):
        alone = of.solve({name: v[[i, i]] for name, v in data.items()})
        assert alone.status[0] == together.status[i]
        for ours, theirs in zip(alone.variables, together.variables):
            torch.testing.assert_close(ours[0], theirs[i], rtol=1e-12, atol=1e-12, equal_nan=True)


def directional(of, data, directions, weights, step):
    """The weighted x (batch,) along a direction; NaN where it is not solved."""
    moved = of.solve({name: v + step * directions[name] for name, v in data.items()})
    value = (moved.variables[0] * weights).sum(1).numpy()
    return np.where(moved.status.numpy() == Status.SOLVED, value, np.nan)


@settings(max_examples=25, deadline=None)
@given(structure, st.sampled_from(["plain", "integer", "duplicate", "fixed", "scaled", "weak"]), seed)
def test_gradients_where_the_solution_is_differentiable(k, kind, number):
    """Where the two one-sided derivatives agree, degenerate or not, the gradient is theirs."""
    of, rng = family(k), np.random.default_rng(number)
    data = draw(of, rng, 6, kind)
    directions = {name: rng.standard_normal(v.shape) * np.minimum(1, np.abs(v)) for name, v in data.items()}
    if kind in ("fixed", "weak") and "l" in data:
        directions["u"] = np.where(data["l"] == data["u"], directions["l"], directions["u"])
    leaves = of.tensors(data, grad=True)
    result = of.layer.solve(*leaves)
    weights = torch.tensor(rng.standard_normal((6, of.n)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (torch.where(result.ok[:, None], result.variables[0], 0.0) * weights).sum().backward()
    slopes = [(v.grad.numpy() * directions[name]).reshape(6, -1).sum(1) for name, v in zip(of.names, leaves)]
    step = 1e-5
    behind, here, ahead = (directional(of, data, directions, weights, s * step) for s in (-1, 0, 1))
    left, right = (here - behind) / step, (ahead - here) / step
    size = 1 + np.abs(left) + np.abs(right)
    smooth = np.abs(right - left) < 1e-3 * size  # false where either is NaN
    smooth &= size < 1e3  # a jump between many solutions
    wrong = smooth & (np.abs(sum(slopes) - (left + right) / 2) > 2e-3 * size)
    assert not wrong.any() or caught


STRICTLY_CONVEX = (
    {"n": 4, "rank": 6},
    {"n": 6, "rank": 6, "eq": 1, "bounds": False},
    {"n": 6, "rank": 7, "eq": 2, "ineq": 3},
    {"n": 5, "rank": 6, "ineq": 3, "bounds": False, "norm1": True},
)
OTHERS = (("dense", {}, 1e-9, 1e-7), ("diffcp", {"tolerance": 1e-12}, 1e-6, 1e-4))


@cache
def strictly_convex(k, solver=None, options=()):
    return Family(**STRICTLY_CONVEX[k], solver=solver, options=dict(options))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, len(STRICTLY_CONVEX) - 1), seed)
def test_gradients_are_those_of_dense_and_diffcp(k, number):
    """diffcp as far as the residuals of its first-order solver allow."""
    rng = np.random.default_rng(number)
    data, weights = (
        draw(strictly_convex(k), rng, 3, "plain"),
        torch.tensor(rng.standard_normal((3, STRICTLY_CONVEX[k]["n"]))),
    )
    results = []
    for solver, options, *_ in ((None, {}), *OTHERS):
        of = strictly_convex(k, solver, tuple(options.items()))
        leaves = of.tensors(data, grad=True)
        x = of.layer.solve(*leaves).variables[0]
        (x * weights).sum().backward()
        results.append((x.detach(), [v.grad for v in leaves]))
    (x, gradients), *others = results
    for (y, expected), (_, _, value, slope) in zip(others, OTHERS, strict=True):
        assert float((x - y).abs().max()) <= value * (1 + float(y.abs().max()))
        for g, e in zip(gradients, expected):
            assert float((g - e).abs().max()) <= slope * (1 + float(e.abs().max()))


def mpc(horizon=5, bound=0.5):
    A, B = np.array([[1.0, 0.3, 0], [0, 0.9, 0.2], [0.1, 0, 1.0]]), np.array([[0, 0], [1.0, 0], [0, 1.0]])
    x, u, x0 = cp.Variable((horizon + 1, 3)), cp.Variable((horizon, 2)), cp.Parameter(3, name="x0")
    weight = cp.Parameter(nonneg=True, name="weight")
    cost = cp.sum_squares(x) + weight * cp.sum_squares(u)
    dynamics = [x[t + 1] == A @ x[t] + B @ u[t] for t in range(horizon)]
    constraints = [x[0] == x0, *dynamics, cp.abs(u) <= bound]
    return cp.Problem(cp.Minimize(cost), constraints), [x0, weight], [u, x]


@pytest.mark.parametrize("path", ["auto", "lanes"])
def test_ten_thousand_samples_without_a_failure(path):
    layer = ConvexLayer(*mpc(), solver_args={"path": path})
    x0 = 2 * torch.randn(10_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = layer.solve(x0, torch.tensor(0.3, dtype=torch.float64))
    assert (result.status == Status.SOLVED).all()
    assert result.residual.max() < 1e-12  # only an exact active set gets there
    u = result.variables[0]
    assert ((u.abs() - 0.5) < 1e-12).all()


def test_smoothing_is_the_central_path_and_its_derivative():
    """Products of slacks and multipliers are mu; gradients are those of central differences, LPs included."""
    for k in (1, 2, 7):
        of, rng, mu = Family(**STRUCTURES[k], options={"smoothing": 1e-2}), np.random.default_rng(k), 1e-2
        data = draw(of, rng, 3, "plain")
        if "h" in data:
            data["h"] = data["h"] + 0.5
        if not of.rank and not of.bounds:  # a bounded LP
            data["q"] = -np.einsum("bij,bi->bj", data["G"], rng.random((3, of.ineq)) + 0.1)
        leaves = of.tensors(data, grad=True)
        result = of.layer.solve(*leaves)
        assert result.ok.all()
        found = {name: v.detach().numpy() for name, v in zip(of.outputs, result.variables)}
        if "h" in data:
            slack = data["h"] - np.einsum("bij,bj->bi", data["G"], found["x"])
            np.testing.assert_allclose(slack * found["z"], mu, rtol=1e-6)
        if "l" in data:
            np.testing.assert_allclose((found["x"] - data["l"]) * found["lower"], mu, rtol=1e-6)
            np.testing.assert_allclose((data["u"] - found["x"]) * found["upper"], mu, rtol=1e-6)
        weights = torch.tensor(rng.standard_normal((3, of.n)))
        (result.variables[0] * weights).sum().backward()
        directions = {name: rng.standard_normal(v.shape) for name, v in data.items()}
        slope = sum((v.grad.numpy() * directions[name]).reshape(3, -1).sum(1) for name, v in zip(of.names, leaves))
        ahead, behind = (of.solve({n: v + s * directions[n] for n, v in data.items()}) for s in (1e-6, -1e-6))
        expected = ((ahead.variables[0] - behind.variables[0]) * weights).sum(1).numpy() / 2e-6
        np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-4)
        assert np.abs(slope).min() > 1e-6


@pytest.mark.parametrize("path", ["auto", "lanes", "sparse"])
def test_warm_starts_of_samples_and_time_steps(path):
    """A closed loop per sample: the same inputs as from cold starts, with fewer iterations."""
    layer = ConvexLayer(*mpc(), solver_args={"path": path})
    A, B = np.array([[1.0, 0.3, 0], [0, 0.9, 0.2], [0.1, 0, 1.0]]), np.array([[0, 0], [1.0, 0], [0, 1.0]])
    A, B, weight = torch.tensor(A), torch.tensor(B), torch.tensor(0.3, dtype=torch.float64)
    z = 2 * torch.randn(7, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    warm, total_warm, total_cold = None, 0, 0
    for _ in range(6):
        cold = layer.solve(z, weight)
        warm = layer.solve(z, weight, warm_start=warm or False).detach()
        torch.testing.assert_close(warm.variables[0], cold.variables[0], rtol=0, atol=1e-11)
        total_warm, total_cold = total_warm + int(warm.iterations.sum()), total_cold + int(cold.iterations.sum())
        z = z @ A.mT + cold.variables[0][:, 0] @ B.mT
    assert total_warm < total_cold


def test_two_layers_in_two_threads():
    layers = [ConvexLayer(*mpc(bound=b)) for b in (0.5, 0.2)]
    x0 = torch.randn(64, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def work(layer):
        leaf = x0.clone().requires_grad_()
        (u, _) = layer(leaf, 0.3)
        u.square().sum().backward()
        return u.detach(), leaf.grad

    expected, found = [work(layer) for layer in layers], {}

    def repeat(k):
        found[k] = [work(layers[k]) for _ in range(8)]

    workers = [threading.Thread(target=repeat, args=(k,)) for k in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for k in range(2):
        for u, gradient in found[k]:
            assert torch.equal(u, expected[k][0])
            assert torch.equal(gradient, expected[k][1])


def test_large_linear_program():
    """A transport problem, degenerate as they are: 400 variables, 41 equalities of which one is redundant."""
    rng, rows, columns = np.random.default_rng(0), 20, 20
    x, c = cp.Variable((rows, columns)), cp.Parameter((rows, columns), name="c")
    supply = rng.integers(1, 5, rows).astype(float)
    demand = np.full(columns, supply.sum() / columns)
    constraints = [cp.sum(x, axis=1) == supply, cp.sum(x, axis=0) == demand, x >= 0]
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum(cp.multiply(c, x))), constraints), [c], [x])
    cost = torch.tensor(rng.random((4, rows, columns)), requires_grad=True)
    result = layer.solve(cost)
    assert (result.status == Status.SOLVED).all()
    for k in range(4):
        problem = layer.problem(c=cost[k].detach())
        problem.solve(solver="HIGHS")
        assert float((cost[k] * result.variables[0][k]).sum().detach()) == pytest.approx(problem.value, rel=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdjointWarning)
        result.variables[0].square().sum().backward()
    assert cost.grad.isfinite().all()
