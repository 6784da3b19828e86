"""Exact references: CVXPY's own solve to high accuracy, and central differences."""

import warnings

import numpy as np
import torch

TIGHT = {
    "CLARABEL": dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas", "tol_infeas_abs", "tol_ktratio"), 1e-12),
    "SCS": {"eps_abs": 1e-10, "eps_rel": 1e-10, "max_iters": 200_000},
}


def tensor(value) -> torch.Tensor:
    return torch.tensor(np.array(value), dtype=torch.float64)


def dense_value(leaf) -> np.ndarray:
    """Value of a CVXPY leaf or expression as a dense array."""
    value = leaf.value_sparse if getattr(leaf, "sparse_idx", None) is not None else leaf.value
    return value.toarray() if hasattr(value, "toarray") else np.asarray(value)


def cvxpy_values(problem, outputs, gp=False, solver="CLARABEL") -> list[torch.Tensor]:
    """Values of the outputs (variables, duals, expressions) after CVXPY's own solve at the parameters' values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem.solve(solver=solver, gp=gp, **TIGHT[solver])
    return [tensor(dense_value(o)) for o in outputs]


def assert_as_cvxpy(layer, problem, parameters, outputs, tolerance=1e-7, gp=False, solver="CLARABEL"):
    """The layer at the parameters' values returns what CVXPY finds, in value and shape."""
    found = layer(*(tensor(dense_value(p)) for p in parameters))
    expected = cvxpy_values(problem, outputs, gp, solver)
    assert len(found) == len(expected)
    for ours, theirs, output in zip(found, expected, outputs):
        assert tuple(ours.shape) == tuple(output.shape)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda m, o=output: f"{o}: {m}")


def close(found, expected, tolerance=1e-8):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def weights_like(outputs, seed=0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]


def weighted_sum(outputs, seed=0) -> torch.Tensor:
    return torch.stack([(w * o).sum() for w, o in zip(weights_like(outputs, seed), outputs)]).sum()


def gradients(function, values, seed=0) -> list[torch.Tensor]:
    """Gradients of a random weighting of function's outputs (a tuple) with respect to each value."""
    leaves = [v.clone().requires_grad_() for v in values]
    found = torch.autograd.grad(weighted_sum(function(*leaves), seed), leaves, allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for v, g in zip(values, found)]


def directional_difference(function, values, directions, step=1e-5, seed=0) -> float:
    """Central difference of the same weighting along the directions."""
    with torch.no_grad():
        ahead, behind = (
            weighted_sum(function(*(v + sign * step * d for v, d in zip(values, directions))), seed) for sign in (1, -1)
        )
    return float(ahead - behind) / (2 * step)


def assert_gradients_match_differences(function, values, step=1e-5, tolerance=1e-5, directions=None, seed=0):
    """Gradients against central differences, along one random direction per value at a time."""
    found = gradients(function, values, seed)
    directions = weights_like(values, seed=99) if directions is None else directions
    for k, direction in enumerate(directions):
        single = [d if j == k else torch.zeros_like(d) for j, d in enumerate(directions)]
        expected = directional_difference(function, values, single, step, seed)
        actual = float((found[k] * direction).sum())
        assert abs(actual - expected) <= tolerance * (1 + abs(expected)), f"value {k}: {actual} != {expected}"
