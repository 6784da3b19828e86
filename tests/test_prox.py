"""Every proximal map of the table against CVXPY, and Moreau's identity."""

import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch

from convexlearn.prox import PROXIMABLE, block_threshold, hard_threshold, soft_threshold

TIGHT = {"tol_gap_abs": 1e-10, "tol_gap_rel": 1e-10, "tol_feas": 1e-10}

# kind: (shape, data, objective of z, constraints on z)
CASES = {
    "norm1": ((6,), {}, lambda z: cp.norm1(z), None),
    "norm2": ((6,), {}, lambda z: cp.norm(z, 2), None),
    "group": ((4, 3), {"axis": 1}, lambda z: cp.sum(cp.norm(z, 2, axis=1)), None),
    "nuclear": ((4, 3), {}, lambda z: cp.normNuc(z), None),
    "huber": ((6,), {"M": 0.7}, lambda z: cp.sum(cp.huber(z, 0.7)), None),
    "total_variation": ((6,), {}, lambda z: cp.tv(z), None),
    "norm_inf": ((6,), {}, lambda z: cp.norm(z, "inf"), None),
    "zero": ((4,), {}, None, lambda z: [z == 0]),
    "nonnegative": ((6,), {}, None, lambda z: [z >= 0]),
    "box": ((6,), {"lower": -0.2, "upper": 0.5}, None, lambda z: [z >= -0.2, z <= 0.5]),
    "simplex": ((6,), {"radius": 1.5}, None, lambda z: [z >= 0, cp.sum(z) == 1.5]),
    "ball": ((6,), {"radius": 0.8}, None, lambda z: [cp.norm(z) <= 0.8]),
    "norm1_ball": ((6,), {"radius": 0.8}, None, lambda z: [cp.norm1(z) <= 0.8]),
    "second_order_cone": ((5,), {}, None, lambda z: [cp.SOC(z[0], z[1:])]),
    "psd_cone": ((3, 3), {}, None, lambda z: [z >> 0, z == z.T]),
    "symmetric": ((3, 3), {}, None, lambda z: [z == z.T]),
}


CONVEX = [kind for kind, entry in PROXIMABLE.items() if entry.convex]
"""All entries that the tests below go through, so that a new one fails until it has its case."""


def draw(shape, count=4, seed=0):
    return 1.5 * torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_convex_entry_is_tested():
    assert set(CASES) == set(CONJUGATES) == set(CONVEX)
    assert "not convex" in PROXIMABLE["norm0"].text


def minimizer(row, shape, objective, constraints):
    """CVXPY's minimizer of objective + 1/2 |z - row|^2."""
    z = cp.Variable(shape)
    goal = 0.5 * cp.sum_squares(z - row) + (0 if objective is None else objective(z))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "may be inaccurate" at these tolerances
        cp.Problem(cp.Minimize(goal), [] if constraints is None else constraints(z)).solve("CLARABEL", **TIGHT)
    return z.value


@pytest.mark.parametrize("kind", CONVEX)
def test_equals_cvxpy(kind):
    shape, data, objective, constraints = CASES[kind]
    v, t = draw(shape), 0.6
    found = PROXIMABLE[kind].prox(v, torch.tensor(t, dtype=torch.float64), **data)
    weighted = None if objective is None else lambda z: t * objective(z)
    for row, expected in zip(v.numpy(), found):
        np.testing.assert_allclose(expected.numpy(), minimizer(row, shape, weighted, constraints), atol=1e-6)


WEIGHTS = np.array([0.0, 0.3, 0.6, 1.2])

# kind, data, weighted objective of a matrix (4, 3) or vector (4,)
WEIGHTED = [
    ("norm1", (4,), {}, lambda z: WEIGHTS @ cp.abs(z)),
    ("huber", (4,), {"M": 0.7}, lambda z: WEIGHTS @ cp.huber(z, 0.7)),
    ("group", (4, 3), {"axis": 1}, lambda z: WEIGHTS @ cp.norm(z, 2, axis=1)),
    ("group", (3, 4), {"axis": 0}, lambda z: WEIGHTS @ cp.norm(z, 2, axis=0)),
]


@pytest.mark.parametrize(("kind", "shape", "data", "objective"), WEIGHTED)
def test_one_weight_per_entry_or_group_equals_cvxpy(kind, shape, data, objective):
    v = draw(shape)
    found = PROXIMABLE[kind].prox(v, torch.tensor(WEIGHTS), **data)
    for row, expected in zip(v.numpy(), found):
        np.testing.assert_allclose(expected.numpy(), minimizer(row, shape, objective, None), atol=1e-6)


def level(v, total, excess):
    """The number c with sum of excess(v, c) = total, excess falling in c, for each sample, by bisection."""
    low, high = v.amin(1, keepdim=True) - total, v.amax(1, keepdim=True)
    for _ in range(200):
        middle = (low + high) / 2
        above = excess(v, middle).sum(1, keepdim=True) > total
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


def prox_largest(v, t):
    """Prox of t max(v): the entries above a level are cut to it, by t altogether."""
    return torch.minimum(v, level(v, t, lambda v, c: (v - c).clamp(min=0)))


def prox_largest_magnitude(v, t):
    """Prox of t max(|v|)."""
    inside = v.abs().sum(1, keepdim=True) <= t
    return torch.where(inside, 0.0, v.sign() * prox_largest(v.abs(), t))


def project_jumps(v, t):
    """Projection on {D'u: |u| <= t}, D the differences: every choice of active bounds is tried."""
    D = torch.diff(torch.eye(v.shape[1], dtype=v.dtype), dim=0)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0], dtype=v.dtype)] * len(D))
    best, found = torch.full((len(v),), torch.inf, dtype=v.dtype), torch.zeros_like(v)
    for sign in signs:
        free = sign == 0
        u = (t * sign).repeat(len(v), 1)
        if free.any():
            u[:, free] = torch.linalg.lstsq(D[free].mT, (v - u @ D).mT).solution.mT
        distance = (v - u @ D).square().sum(1)
        better = (u.abs() <= t + 1e-12).all(1) & (distance < best)
        best, found = torch.where(better, distance, best), torch.where(better[:, None], u @ D, found)
    return found


def shrink_rows(v, t):
    return v / v.norm(dim=2, keepdim=True).clamp(min=t) * t


def clip_singular_values(v, t):
    U, S, V = torch.linalg.svd(v, full_matrices=False)
    return (U * S.clamp(max=t)[:, None]) @ V


def past_bounds(v, lower, upper):
    """Prox of the support function of a box."""
    return (v - upper).clamp(min=0) - (lower - v).clamp(min=0)


def negative_part(v):
    """Projection on the negative semidefinite matrices plus the antisymmetric ones, polar to the symmetric PSD cone."""
    values, vectors = torch.linalg.eigh((v + v.mT) / 2)
    return (vectors * values.clamp(max=0)[:, None]) @ vectors.mT + (v - v.mT) / 2


def polar_second_order(v):
    """Projection on {|x| <= -r}: of the points on its rays through x, the nearest by calculus."""
    r, x = v[:, :1], v[:, 1:]
    size = x.norm(dim=1, keepdim=True)
    height = ((size - r) / 2).clamp(min=0)
    edge = torch.cat([-height, height * x / size], 1)
    return torch.where(size <= -r, v, edge)


# kind: prox of the conjugate of t g at v, found in another way than the entry itself
CONJUGATES = {
    "norm1": lambda v, t: v.clamp(-t, t),
    "norm2": lambda v, t: v / v.norm(dim=1, keepdim=True).clamp(min=t) * t,
    "group": lambda v, t: shrink_rows(v, t),
    "nuclear": clip_singular_values,
    "huber": lambda v, t: (v / (1 + 1 / (2 * t))).clamp(-2 * t * 0.7, 2 * t * 0.7),
    "total_variation": project_jumps,
    "norm_inf": lambda v, t: v - prox_largest_magnitude(v, t),
    "zero": lambda v, t: v,
    "nonnegative": lambda v, t: v.clamp(max=0),
    "box": lambda v, t: past_bounds(v, -0.2, 0.5),
    "simplex": lambda v, t: prox_largest(v, 1.5),
    "ball": lambda v, t: v * (1 - 0.8 / v.norm(dim=1, keepdim=True).clamp(min=0.8)),
    "norm1_ball": lambda v, t: prox_largest_magnitude(v, 0.8),
    "second_order_cone": lambda v, t: polar_second_order(v),
    "psd_cone": lambda v, t: negative_part(v),
    "symmetric": lambda v, t: (v - v.mT) / 2,
}


@pytest.mark.parametrize("kind", CONVEX)
def test_moreau_identity(kind):
    """v = prox of t g + prox of its conjugate."""
    shape, data, *_ = CASES[kind]
    for scale in (0.2, 1.0, 3.0):
        v, t = scale * draw(shape, 20), 0.6
        total = PROXIMABLE[kind].prox(v, torch.tensor(t, dtype=v.dtype), **data) + CONJUGATES[kind](v, t)
        torch.testing.assert_close(total, v, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", CONVEX)
def test_subgradients_by_moreau(kind):
    """p = v - prox(v) is a subgradient at prox(v): g(z) >= g(prox) + <p, z - prox> for all z."""
    shape, data, *_ = CASES[kind]
    entry, v, t = PROXIMABLE[kind], draw(shape, 30), torch.tensor(0.6, dtype=torch.float64)
    s = entry.prox(v, t, **data)
    others = entry.prox(draw(shape, 30, seed=1), t, **data)  # in the set where there is one
    left = entry.evaluate(others, t, data) - entry.evaluate(s, t, data)
    assert (left >= ((v - s) * (others - s)).reshape(30, -1).sum(1) - 1e-10).all()


@pytest.mark.parametrize("kind", ["norm1", "norm2", "group", "nuclear", "huber", "total_variation", "norm_inf"])
def test_gradients_in_v_and_t(kind):
    shape, data, *_ = CASES[kind]
    v = draw(shape, 2, seed=2).requires_grad_()
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda v, t: PROXIMABLE[kind].prox(v, t, **data), (v, t))


@pytest.mark.parametrize("kind", ["simplex", "ball", "norm1_ball", "second_order_cone", "psd_cone"])
def test_gradients_of_projections(kind):
    shape, data, *_ = CASES[kind]
    torch.autograd.gradcheck(lambda v: PROXIMABLE[kind].prox(v, **data), (draw(shape, 2, seed=2).requires_grad_(),))


def test_complex_entries_keep_their_phase():
    v = torch.tensor([3 + 4j, 0.3 + 0.4j], dtype=torch.complex128)
    expected = torch.tensor([2.4 + 3.2j, 0], dtype=torch.complex128)
    torch.testing.assert_close(soft_threshold(v, 1.0), expected)


def test_hard_threshold_minimizes_the_l0_objective():
    v, t = draw((50,), 1)[0], 0.5
    kept = hard_threshold(v, t)
    cost = lambda z: t * (z != 0) + (z - v).square() / 2  # noqa: E731
    assert (cost(kept) <= torch.minimum(cost(v), cost(torch.zeros_like(v)))).all()


def test_nan_stays_and_integers_meet_a_broken_threshold():
    v = torch.tensor([[float("nan"), 3.0, 0.1]])
    assert hard_threshold(v, 0.5).isnan().tolist() == [[True, False, False]]
    assert soft_threshold(v, 0.5).isnan().tolist() == [[True, False, False]]
    assert block_threshold(v, 0.5).isnan().all()
    assert torch.equal(soft_threshold(torch.tensor([3, -1]), 0.5), torch.tensor([2.5, -0.5]))


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_norms_neither_overflow_nor_vanish(scale):
    v = draw((5,))
    for kind, data in {"ball": {"radius": 0.8}, "second_order_cone": {}, "norm2": {}}.items():
        scaled = {name: scale * value for name, value in data.items()}
        expected = PROXIMABLE[kind].prox(v, 0.6, **data)
        torch.testing.assert_close(PROXIMABLE[kind].prox(scale * v, scale * 0.6, **scaled) / scale, expected)


def test_bare_maps_are_those_without_checks():
    v = draw((4, 3))
    for kind, entry in PROXIMABLE.items():
        natural = (
            v[:, :3] if CASES.get(kind, ((4,),))[0] == (3, 3) else v if kind in ("group", "nuclear") else v[..., 0]
        )
        data = CASES[kind][1] if kind in CASES else {}
        assert torch.equal(entry.bare(natural, 0.5, **data), entry.prox(natural, 0.5, **data))
