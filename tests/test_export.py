"""Rules in C decide like the rules, and say where they found no decision; torch.export where a rule allows it."""

import math
import shutil

import cvxpy as cp
import numpy as np
import pytest
import torch

import convexlearn as cl
from convexlearn.errors import CompileError, OptionError, ShapeError, SolverError
from convexlearn.networks import mlp

compiled = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("cc") is None, reason="needs cmake and a C compiler"
)


def controller():
    """A QP policy with a matrix and a scalar as context, tuned values, and a decision that is part of a variable."""
    u, z = cp.Variable((2, 3), name="u"), cp.Parameter((2, 3), name="z")
    price = cp.Parameter(name="price", nonneg=True)
    rho = cp.Parameter(name="rho", nonneg=True, value=0.3)
    goal = cp.sum_squares(u - z) + rho * cp.sum_squares(u) + price * cp.sum(u)
    problem = cp.Problem(cp.Minimize(goal), [cp.abs(u) <= 1, cp.sum(u) >= -2, cp.sum(z) + cp.sum(u) <= 4])
    rule = cl.ConvexRule(problem, context=[z, price], decision=[u, u[0, 1]], learn=[rho], on_failure="nan")
    rule.rho = 0.7
    return rule


def contexts(count):
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(count, 2, 3, dtype=torch.float64, generator=draw)
    return z, torch.rand(count, dtype=torch.float64, generator=draw)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("cvxpygen")
    folder = tmp_path_factory.mktemp("c")
    return cl.export_c(controller(), folder), folder


@compiled
def test_the_controller_in_c_reproduces_the_rule(built):
    comparison = built[0].compare(*contexts(100))
    assert comparison.failed == ()
    assert comparison.error < 1e-6
    assert comparison.samples == 100
    assert 0 < comparison.seconds < 0.1
    assert "per decision in C" in str(comparison)
    u, part = built[0](*contexts(4))
    assert u.shape == (4, 2, 3)
    assert torch.equal(part, u[:, 0, 1]) or torch.allclose(part, u[:, 0, 1], atol=1e-6)


@compiled
def test_every_solve_is_checked(built):
    z, price = contexts(3)
    z[1] = 3.0  # sum(z) = 18, and sum(u) >= -2: infeasible
    decisions, status = built[0].solve(z, price)
    assert status.tolist() == [0, 1, 0]
    assert decisions[0].isnan().flatten(1).all(1).tolist() == [False, True, False]
    with pytest.raises(SolverError, match=r"no solution for 1 samples: \[1\]"):
        built[0](z, price)
    assert built[0].compare(z, price).failed == (1,)
    expected = controller()(z, price)[0]
    torch.testing.assert_close(decisions[0][2], expected[2], rtol=1e-6, atol=1e-6)


@compiled
def test_the_header_says_what_goes_in_and_out(built):
    controller, folder = built
    header = (folder / "controller.h").read_text()
    assert "CONTROLLER_INPUTS 7" in header
    assert "CONTROLLER_OUTPUTS 7" in header
    with pytest.raises(ShapeError, match="context 'z'"):
        controller.solve(torch.zeros(1, 3, 2), torch.zeros(1))


@compiled
def test_two_controllers_in_one_process_even_from_one_folder(built):
    other = controller()
    other.rho = 3.0
    second = cl.export_c(other, built[1])
    assert second.compare(*contexts(10)).error < 1e-6
    assert built[0].compare(*contexts(10)).error < 1e-6


@compiled
@pytest.mark.slow
def test_cones_by_ecos(tmp_path):
    pytest.importorskip("cvxpygen")
    s, x = cp.Variable(3, name="s"), cp.Parameter(3, name="x")
    problem = cp.Problem(cp.Minimize(cp.norm(s - x) + 0.5 * cp.sum(s)), [cp.norm(s) <= 1])
    rule = cl.ConvexRule(problem, [x], s)
    with pytest.raises(OptionError, match="solver='ECOS'"):
        cl.export_c(rule, tmp_path)
    comparison = cl.export_c(rule, tmp_path, solver="ecos").compare(contexts(50)[0][:, 0])
    assert comparison.failed == ()
    assert comparison.error < 2e-6  # the root of the duality gap that rounding allows
    with pytest.raises(SolverError, match="50 samples"):
        cl.export_c(rule, tmp_path, solver="ecos", max_iterations=1)(contexts(50)[0][:, 0])


def test_what_cannot_be_exported(tmp_path):
    pytest.importorskip("cvxpygen")
    with pytest.raises(OptionError, match="rule must be a ConvexRule"):
        cl.export_c(cl.AffineRule(torch.eye(2)), tmp_path)
    with pytest.raises(OptionError, match="did you mean 'OSQP'"):
        cl.export_c(controller(), tmp_path, solver="OSPQ")
    for wrong in ({"tolerance": 0.0}, {"max_iterations": 0}):
        with pytest.raises(OptionError, match=f"export_c: {next(iter(wrong))} must be"):
            cl.export_c(controller(), tmp_path, **wrong)
    S, x = cp.Variable((2, 2), PSD=True), cp.Parameter((2, 2), name="x", symmetric=True)
    rule = cl.ConvexRule(cp.Problem(cp.Minimize(cp.sum_squares(S - x))), [x], S)
    with pytest.raises(CompileError, match="plain array"):
        cl.export_c(rule, tmp_path, solver="ECOS")


def test_the_tuned_problem_goes_back_to_cvxpy():
    rule = controller()
    problem = rule.problem()
    z, price = contexts(1)
    named = {p.name(): p for p in problem.parameters()}
    named["z"].value, named["price"].value = z[0].numpy(), float(price)
    assert named["rho"].value == pytest.approx(0.7)
    problem.solve(solver="CLARABEL")
    expected = rule(z, price)[0][0].detach().numpy()
    np.testing.assert_allclose(problem.var_dict["u"].value, expected, atol=1e-6)


def lasso():
    s, x = cp.Variable(6, name="s"), cp.Parameter(4, name="x")
    H = np.random.default_rng(0).normal(size=(4, 6))
    rho = cp.Parameter(nonneg=True, name="rho", value=0.1)
    return cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - H @ s) + rho * cp.norm1(s))), x, s


def exportable():
    problem, x, s = lasso()
    split = cl.split(problem, [x], s)
    yield cl.AffineRule(torch.ones(2, 4, dtype=torch.float64))
    yield cl.NeuralRule(mlp(4, 2).double())
    yield cl.Unfolded(cl.ISTA(split), 4, untie=["step", "threshold"])
    yield cl.Unfolded(cl.ISTA(split).free("W1", "W2"), 3, untie=["W1", "W2", "threshold"])
    yield cl.ConvexRule(problem, [x], s)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")  # of torch.export itself
@pytest.mark.parametrize(
    "rule", list(exportable()), ids=lambda r: f"{type(r).__name__} {sum(p.numel() for p in r.parameters())}"
)
def test_torch_export_and_back(rule, tmp_path):
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = rule.eval()(-x)  # the first call fills what a rule keeps, such as step sizes
        torch.export.save(torch.export.export(rule, (x,)), tmp_path / "rule.pt2")
        again = torch.export.load(tmp_path / "rule.pt2").module()
        torch.testing.assert_close(again(-x), expected, rtol=1e-10, atol=1e-10)
    assert math.isfinite(float(again(x).sum()))


@compiled
def test_files_that_are_already_there_stay(tmp_path):
    pytest.importorskip("cvxpygen")
    (tmp_path / "thesis.tex").write_text("years of work")
    cl.export_c(controller(), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    (tmp_path / "other" / "c").mkdir(parents=True)
    with pytest.raises(OptionError, match="no exported controller is beside it"):
        cl.export_c(controller(), tmp_path / "other")
