"""What cl.split finds in a problem, and what it says."""

import pickle
import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch

import convexlearn as cl
from convexlearn.errors import CompileError, MissingParameterError, ShapeError

RNG = np.random.default_rng(0)
x, s = cp.Parameter(4, name="x"), cp.Variable(6, name="s")
H = cp.Parameter((4, 6), name="H", value=RNG.normal(size=(4, 6)))
rho = cp.Parameter(nonneg=True, name="rho", value=0.3)
w = cp.Parameter(6, nonneg=True, name="w", value=np.arange(6.0))
FIT = 0.5 * cp.sum_squares(x - H @ s)
LARGEST = np.linalg.norm(H.value, 2) ** 2


def parts(goal, *constraints):
    return cl.split(cp.Problem(cp.Minimize(goal), list(constraints)), context=[x], decision=s)


def test_the_lasso_as_printed():
    assert str(parts(FIT + rho * cp.norm1(s))) == f"smooth 1/2|Hs-x|^2 (L = {LARGEST:.4g}) + rho |s|_1 [soft threshold]"


TERMS = {
    "norm1": (rho * cp.norm1(s), []), "weighted": (w @ cp.abs(s), []), "inside": (cp.norm1(cp.multiply(w, s)), []),
    "norm2": (2 * cp.norm(s), []), "norm_inf": (rho * cp.norm(s, "inf"), []),
    "huber": (rho * cp.sum(cp.huber(s, 0.5)), []),
    "total_variation": (rho * cp.tv(s), []),
    "group": (rho * cp.sum(cp.norm(cp.reshape(s, (3, 2), order="C"), 2, axis=1)), []),
    "box": (0, [s >= -1, s <= 0.2]), "simplex": (0, [s >= 0, cp.sum(s) == 1]), "ball": (0, [cp.norm(s) <= 0.3]),
    "norm1_ball": (0, [cp.norm1(s) <= 0.3]), "zero": (0, [cp.sum(s) == 1, s[0] == s[1]]),
    "second_order_cone": (0, [cp.SOC(s[0], s[1:])]), "norm1 in a box": (rho * cp.norm1(s), [s >= -0.1, s <= 0.2]),
    "disjoint": (rho * cp.norm1(s[:3]), [s[3:] >= 0]), "linear": (cp.sum(s) + rho * cp.norm1(s), []),
    "orthogonal": (rho * cp.norm1(np.linalg.qr(RNG.normal(size=(6, 6)))[0] @ s), []),
    "maximum": (rho * cp.norm1(s) + 3, []),
}  # fmt: skip


@pytest.mark.parametrize("name", TERMS)
def test_the_product_prox_and_the_objective_equal_cvxpy(name):
    goal, constraints = TERMS[name]
    split = parts(FIT + goal, *constraints)
    if name == "zero":  # two affine sets on common entries are no single term
        assert "joint prox" in str(split)
    else:
        assert "ConvexLayer" not in str(split)
    instance = split.bind(torch.zeros(1, 4, dtype=torch.float64))
    v = torch.tensor(RNG.normal(size=(1, 6)))
    step = 0.4
    found = instance.prox(v, instance.thresholds(step), step)
    shift = 0 if name != "linear" else cp.sum(s)
    near = cp.Problem(cp.Minimize(step * (goal - shift) + 0.5 * cp.sum_squares(s - v[0].numpy())), constraints)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "may be inaccurate" at these tolerances
        near.solve(solver="CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    np.testing.assert_allclose(found[0].numpy(), s.value, atol=1e-6)
    x.value, s.value = np.zeros(4), found[0].numpy()
    if name not in ("maximum", "zero"):  # constants do not count
        assert instance.objective(found).item() == pytest.approx((FIT + goal).value, rel=1e-9, abs=1e-9)


def test_gradient_and_decision_follow_the_declaration():
    generator = torch.Generator().manual_seed(0)
    z, context = (torch.randn(3, n, generator=generator, dtype=torch.float64) for n in (6, 4))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(H @ s - x) + 0.25 * cp.sum_squares(s) + s[0]))
    split = cl.split(problem, context=[x], decision=[s[:2], 2 * s])
    instance = split.bind(context)
    matrix = torch.tensor(H.value)
    expected = 2 * (z @ matrix.mT - context) @ matrix + 0.5 * z
    expected[:, 0] += 1
    torch.testing.assert_close(instance.gradient(z), expected)
    first, second = split.decide(z, instance)
    torch.testing.assert_close(first, z[:, :2])
    torch.testing.assert_close(second, 2 * z)
    assert pytest.approx(2 * LARGEST + 0.5) == split.L


def test_a_tuned_convex_rule_can_be_split():
    problem = cp.Problem(cp.Minimize(FIT + rho * cp.norm1(s)))
    rule = cl.ConvexRule(problem, context=[x], decision=s, learn=[rho], features=lambda x: 2 * x)
    rule.rho = 0.7
    split = cl.split(rule)
    assert split.parameters["rho"].value.item() == pytest.approx(0.7)
    assert [p.name for p in split.parameters.values() if p.learned] == ["rho"]
    context = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = cl.Converged(cl.FISTA(split), tol=1e-10)(context)
    torch.testing.assert_close(found, rule(context), rtol=0, atol=1e-6)


def test_the_matrix_may_be_context():
    problem = cp.Problem(cp.Minimize(FIT + rho * cp.norm1(s)))
    split = cl.split(problem, context=[x, H], decision=s)
    assert "varies with the context" in str(split)
    generator = torch.Generator().manual_seed(0)
    xs, Hs = (torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in ((4,), (4, 6)))
    found = cl.Converged(cl.ISTA(split), tol=1e-10)(xs, Hs)
    expected = cl.ConvexRule(problem, context=[x, H], decision=s)(xs, Hs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_pickles():
    split = parts(FIT + rho * cp.norm1(s), cp.sum(s) == 1)
    twin = pickle.loads(pickle.dumps(split))
    context = torch.ones(1, 4, dtype=torch.float64)
    outcomes = [cl.Converged(cl.FISTA(p), tol=1e-7, learn=[])(context) for p in (split, twin)]
    torch.testing.assert_close(*outcomes)


def test_what_cannot_be_split_is_named():
    b = cp.Variable(6, boolean=True, name="b")
    with pytest.raises(CompileError, match=r"cannot split: variable 'b' is boolean"):
        cl.split(cp.Problem(cp.Minimize(FIT), [s == b]), [x], s)
    with pytest.raises(CompileError, match=r"cannot split the term .*not convex"):
        parts(FIT + cp.sum(cp.sqrt(s)))
    with pytest.raises(CompileError, match="DPP"):
        parts(FIT + rho * rho * cp.norm1(s))
    d = cp.Variable((4, 4), diag=True, name="d")
    with pytest.raises(CompileError, match=r"'d' is diag"):
        cl.split(cp.Problem(cp.Minimize(cp.sum_squares(d @ x - 1))), [x], d)
    other = cp.Parameter(name="y")
    with pytest.raises(CompileError, match="'y' is not in the problem"):
        cl.split(cp.Problem(cp.Minimize(cp.norm1(s))), [other], s)
    with pytest.raises(MissingParameterError, match="needs context and decision"):
        cl.split(cp.Problem(cp.Minimize(FIT)))
    with pytest.raises(ShapeError, match=r"context 'x' must be a tensor of shape \(B, 4\)"):
        parts(FIT).bind(torch.ones(4, dtype=torch.float64))


def test_variables_attributes_are_terms():
    v = cp.Variable(4, nonneg=True, name="v")
    X = cp.Variable((2, 2), PSD=True, name="X")
    goal = cp.sum_squares(v - x) + cp.sum_squares(X)
    assert "box" in str(split := cl.split(cp.Problem(cp.Minimize(goal)), [x], [v, X]))
    assert "positive semidefinite cone" in str(split)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_objective_of_groups_is_that_of_each_sample(axis):
    s, x, rho = cp.Variable((4, 3)), cp.Parameter((4, 3), name="x"), cp.Parameter(nonneg=True, name="rho")
    size = cp.sum(cp.norm(s, 2, axis=axis))
    parts = cl.split(cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - s) + rho * size)), [x, rho], s)
    generator = torch.Generator().manual_seed(0)
    X, Z = (torch.randn(3, 4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64)
    found = parts.objective(Z.flatten(1), parts.bind(X, weights))
    expected = (X - Z).square().sum((1, 2)) / 2 + weights * Z.norm(dim=axis + 1).sum(1)
    torch.testing.assert_close(found, expected)
