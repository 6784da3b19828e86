"""Every proximal map of the table against CVXPY, and Moreau's identity."""

import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch

from convexlearn.prox import PROXIMABLE, hard_threshold, soft_threshold

TIGHT = {"tol_gap_abs": 1e-10, "tol_gap_rel": 1e-10, "tol_feas": 1e-10}

# kind: (shape, data, objective of z, constraints on z)
CASES = {
    "norm1": ((6,), {}, lambda z: cp.norm1(z), None),
    "norm2": ((6,), {}, lambda z: cp.norm(z, 2), None),
    "group": ((4, 3), {"axis": 1}, lambda z: cp.sum(cp.norm(z, 2, axis=1)), None),
    "nuclear": ((4, 3), {}, lambda z: cp.normNuc(z), None),
    "huber": ((6,), {"M": 0.7}, lambda z: cp.sum(cp.huber(z, 0.7)), None),
    "total_variation": ((8,), {}, lambda z: cp.tv(z), None),
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


def draw(shape, count=4, seed=0):
    return 1.5 * torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_convex_entry_is_tested():
    assert set(CASES) == {kind for kind, entry in PROXIMABLE.items() if entry.convex}
    assert "not convex" in PROXIMABLE["norm0"].text


@pytest.mark.parametrize("kind", CASES)
def test_equals_cvxpy(kind):
    shape, data, objective, constraints = CASES[kind]
    v, t = draw(shape), 0.6
    found = PROXIMABLE[kind].prox(v, torch.tensor(t, dtype=torch.float64), **data)
    z = cp.Variable(shape)
    for row, expected in zip(v.numpy(), found):
        goal = 0.5 * cp.sum_squares(z - row) + (0 if objective is None else t * objective(z))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "may be inaccurate" at these tolerances
            cp.Problem(cp.Minimize(goal), [] if constraints is None else constraints(z)).solve("CLARABEL", **TIGHT)
        np.testing.assert_allclose(expected.numpy(), z.value, atol=1e-6)


# the conjugates of the table's entries that are in the table themselves: v = prox_f(v) + prox_f*(v)
MOREAU = [
    ("norm1", {}, "box", lambda t: {"lower": -t, "upper": t}, (7,)),
    ("norm2", {}, "ball", lambda t: {"radius": t}, (7,)),
    ("norm_inf", {}, "norm1_ball", lambda t: {"radius": t}, (7,)),
]


@pytest.mark.parametrize(("kind", "data", "dual", "dual_data", "shape"), MOREAU)
def test_moreau_identity_with_the_conjugate(kind, data, dual, dual_data, shape):
    v, t = draw(shape, 20), 0.9
    total = PROXIMABLE[kind].prox(v, t, **data) + PROXIMABLE[dual].prox(v, None, **dual_data(t))
    torch.testing.assert_close(total, v, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["nonnegative", "second_order_cone", "psd_cone"])
def test_moreau_decomposition_of_cones(kind):
    """v = P_K(v) - P_K(-v) for a self-dual cone, the two parts orthogonal."""
    v = draw(CASES[kind][0], 20)
    v = (v + v.mT) / 2 if v.ndim == 3 else v
    plus, minus = PROXIMABLE[kind].prox(v), PROXIMABLE[kind].prox(-v)
    torch.testing.assert_close(plus - minus, v, rtol=0, atol=1e-10)
    assert (plus * minus).reshape(20, -1).sum(1).abs().max() < 1e-10


@pytest.mark.parametrize("kind", CASES)
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
