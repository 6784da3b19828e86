"""Layers under PyTorch's transforms, on a QP, an LP with smoothing and a second-order cone program."""

import subprocess
import sys

import cvxpy as cp
import pytest
import torch
from reference import close
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from transform_cases import CASES, normal

from convexlearn import ConvexLayer, ConvexRule, Status
from convexlearn import layer as layer_module
from convexlearn.errors import DomainError, OptionError, SolverError
from convexlearn.failures import collect_failures
from convexlearn.layer_transforms import transformed

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script")  # PyTorch itself uses it


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]()


@pytest.fixture(scope="module")
def quadratic():
    return CASES["QP"]()


@pytest.fixture
def by_operators(monkeypatch):
    monkeypatch.setattr(layer_module, "transformed", lambda: True)


def total(case):
    """A scalar function of the parameters with curvature of its own."""
    return lambda *values: sum((v * v).sum() for v in case.function(*values))


def leaves(case):
    return tuple(v.clone().requires_grad_() for v in case.values)


def eager_gradient(function, values):
    values = tuple(v.clone().requires_grad_() for v in values)
    return torch.autograd.grad(function(*values), values)


class TestDerivatives:
    """Against finite differences, in both modes."""

    def test_gradcheck(self, case, by_operators):
        assert gradcheck(case.function, leaves(case), eps=case.step, atol=1e-5, check_forward_ad=True)

    def test_gradgradcheck(self, case, by_operators):
        options = {"check_fwd_over_rev": True, "check_rev_over_rev": True}
        assert gradgradcheck(case.function, leaves(case), eps=case.step, atol=1e-4, **options)

    def test_gradgradcheck_of_the_eager_layer(self, case):
        assert gradgradcheck(case.function, leaves(case), eps=case.step, atol=1e-4, fast_mode=True)

    def test_third_derivatives(self, case):
        direction = normal(*case.values[0].shape, seed=9)

        def second(t):
            moved = lambda s: total(case)(s, *case.values[1:])  # noqa: E731
            return jvp(lambda s: jvp(moved, (s,), (direction,))[1], (t,), (direction,))[1]

        step, t = 30 * case.step, case.values[0]
        found = jvp(second, (t,), (direction,))[1]
        expected = (second(t + step * direction) - second(t - step * direction)) / (2 * step)
        close(found, expected, 1e-4)


class TestFunctionTransforms:
    def test_vmap(self, case):
        for dims, values in (
            ((0, None, None), case.values),
            ((0, 0, 0), tuple(v.expand(2, *v.shape[k == 0 :]) for k, v in enumerate(case.values))),
        ):
            found, expected = vmap(case.function, in_dims=dims)(*values), case.function(*values)
            for ours, theirs in zip(found, expected):
                close(ours, theirs)

    def test_nested_vmap_over_different_parameters(self, case):
        batched, shared, number = case.values
        several = torch.stack([number, 1.1 * number, 1.2 * number])
        inner = vmap(case.function, in_dims=(0, None, None))
        found = vmap(inner, in_dims=(None, None, 0), out_dims=1)(batched, shared, several)
        for k in range(3):
            for ours, theirs in zip(found, case.function(batched, shared, several[k])):
                close(ours[:, k], theirs)

    def test_jacobians_in_both_modes(self, case):
        order = (0, 1, 2)
        reverse, forward = (f(case.function, argnums=order)(*case.values) for f in (jacrev, jacfwd))
        expected = torch.autograd.functional.jacobian(case.function, case.values)
        for k in range(len(expected)):
            for ours, others, theirs in zip(reverse[k], forward[k], expected[k]):
                assert theirs.abs().max() > 1e-5
                close(ours, theirs, 1e-7)
                close(others, theirs, 1e-7)

    def test_hessian(self, case):
        order = (0, 1, 2)
        found = hessian(total(case), argnums=order)(*case.values)
        again = jacrev(jacrev(total(case), argnums=order), argnums=order)(*case.values)
        expected = torch.autograd.functional.hessian(total(case), case.values)
        for i in order:
            for j in order:
                close(found[i][j], expected[i][j], 1e-5)
                close(again[i][j], expected[i][j], 1e-5)
                close(found[i][j].flatten(), found[j][i].permute(_swapped(found[j][i], case.values[j])).flatten(), 1e-5)

    def test_vmap_of_grad(self, case):
        batched, *shared = case.values
        found = vmap(grad(lambda v: total(case)(v, *shared)))(batched)
        close(found, eager_gradient(lambda v: total(case)(v, *shared), (batched,))[0], 1e-7)

    def test_dual_numbers(self, case):
        tangents = tuple(normal(*v.shape, seed=k) for k, v in enumerate(case.values))
        expected = jvp(case.function, case.values, tangents)[1]
        with forward_ad.dual_level():
            outputs = case.function(*(forward_ad.make_dual(v, t) for v, t in zip(case.values, tangents)))
            for output, theirs in zip(outputs, expected):
                close(forward_ad.unpack_dual(output).tangent, theirs)


def _swapped(block, first):
    """Order of the dimensions of a block of the Hessian, transposed."""
    k = first.dim()
    return (*range(k, block.dim()), *range(k))


class TestCompile:
    def test_fullgraph_values_and_gradients(self, case):
        compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")
        for ours, theirs in zip(compiled(*case.values), case.function(*case.values)):
            close(ours, theirs)
        function = lambda *values: sum((v * v).sum() for v in compiled(*values))  # noqa: E731
        for ours, theirs in zip(eager_gradient(function, case.values), eager_gradient(total(case), case.values)):
            close(ours, theirs)

    def test_transforms_inside(self, case):
        batched, *shared = case.values
        slope = vmap(grad(lambda v: total(case)(v, *shared)))
        along = lambda v: jvp(lambda u: total(case)(u, *shared), (v,), (torch.ones_like(v),))[1]  # noqa: E731
        for function in (slope, along):
            found = torch.compile(function, fullgraph=True, backend="aot_eager")(batched)
            close(found, function(batched))

    def test_dynamic_batch(self, quadratic):
        compiled = torch.compile(quadratic.function, fullgraph=True, backend="aot_eager", dynamic=True)
        for size in (2, 5, 7):
            values = normal(size, 3, seed=size), *quadratic.values[1:]
            for ours, theirs in zip(compiled(*values), quadratic.function(*values)):
                close(ours, theirs)

    def test_backward_uses_the_forward_pass_solution(self, quadratic, monkeypatch):
        solver, solved = type(quadratic.layer.solver), []
        original = solver.solve
        monkeypatch.setattr(solver, "solve", lambda *a, **k: solved.append(1) or original(*a, **k))
        compiled = torch.compile(quadratic.function, fullgraph=True, backend="aot_eager")
        eager_gradient(lambda *values: sum(v.sum() for v in compiled(*values)), quadratic.values)
        assert len(solved) == 1

    @pytest.mark.slow
    def test_inductor(self, quadratic):
        compiled = torch.compile(quadratic.function, fullgraph=True)
        function = lambda *values: sum((v * v).sum() for v in compiled(*values))  # noqa: E731
        found = eager_gradient(function, quadratic.values)
        for ours, theirs in zip(found, eager_gradient(total(quadratic), quadratic.values)):
            close(ours, theirs)

    def test_rule(self):
        s, x, rho = cp.Variable(3), cp.Parameter(3, name="x"), cp.Parameter(nonneg=True, name="rho", value=0.4)
        rule = ConvexRule(cp.Problem(cp.Minimize(cp.sum_squares(s - x) + rho * cp.norm1(s))), context=[x], decision=s)
        compiled = torch.compile(rule, fullgraph=True, backend="aot_eager")
        value = normal(4, 3)
        close(compiled(value), rule(value))
        close(*(torch.autograd.grad(f(value).square().sum(), rule.free["rho"])[0] for f in (compiled, rule)))


class TestFailures:
    @pytest.fixture
    def bounded(self):
        x, low, high = cp.Variable(), cp.Parameter(name="low"), cp.Parameter(nonneg=True, name="high")
        problem = cp.Problem(cp.Minimize(cp.square(x)), [x >= low, x <= high])
        return lambda policy, **more: ConvexLayer(problem, [low, high], [x], on_failure=policy, **more)

    low = torch.tensor([0.5, 3.0, -1.0], dtype=torch.float64)
    high = torch.tensor(2.0, dtype=torch.float64)

    def test_error_names_the_sample(self, bounded):
        layer = bounded("raise")
        with pytest.raises(SolverError, match="sample 1 is INFEASIBLE"):
            vmap(lambda v: layer(v, self.high)[0])(self.low)
        with pytest.raises(SolverError, match="sample 1 is INFEASIBLE"):
            torch.compile(layer, fullgraph=True, backend="aot_eager")(self.low, self.high)

    @pytest.mark.parametrize(("policy", "expected"), [("nan", torch.nan), ("fallback", 7.0)])
    def test_policies(self, bounded, policy, expected):
        layer = bounded(policy, **({"fallback": 7.0} if policy == "fallback" else {}))
        value = lambda v: layer(v, self.high)[0]  # noqa: E731
        found, slope = vmap(value)(self.low), vmap(grad(value))(self.low)
        assert found[[0, 2]].tolist() == pytest.approx([0.5, 0.0], abs=1e-9)
        assert found[1].isnan() if policy == "nan" else found[1] == expected
        close(slope, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))

    def test_statuses_without_raising(self, bounded):
        layer = bounded("raise")
        status = vmap(lambda v: layer.solve(v, self.high).status)(self.low)
        assert status.tolist() == [Status.SOLVED, Status.INFEASIBLE, Status.SOLVED]

    def test_second_derivatives_are_finite(self, bounded):
        layer = bounded("nan")
        found = vmap(hessian(lambda v: layer(v, self.high)[0] ** 2))(self.low)
        close(found, torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64))

    def test_simulators_collect_them(self, bounded):
        compiled = torch.compile(bounded("raise"), fullgraph=True, backend="aot_eager")
        with collect_failures() as failures:
            found = compiled(self.low, self.high)[0]
        assert found.tolist() == pytest.approx([0.5, 0.0, 0.0], abs=1e-9)
        assert failures.mask(3).tolist() == [False, True, False]

    def test_values_are_checked_at_run_time(self, bounded):
        compiled = torch.compile(bounded("raise"), fullgraph=True, backend="aot_eager")
        compiled(self.low[:1], self.high)
        with pytest.raises(DomainError, match="parameter 'high' must be nonnegative"):
            compiled(self.low[:1], -self.high)
        with pytest.raises(DomainError, match=r"parameter 'low' has a NaN.*element 1"):
            vmap(bounded("raise"), in_dims=(0, None))(torch.tensor([0.0, torch.nan]), self.high)


class TestExport:
    def test_loads_in_a_fresh_process(self, tmp_path):
        for name, make in CASES.items():
            case = make()
            batch = torch.export.Dim("batch", min=2, max=64)
            program = torch.export.export(case.layer, case.values, dynamic_shapes=(({0: batch}, None, None),))
            torch.export.save(program, tmp_path / f"{name}.pt2")
            larger = torch.cat([case.values[0], 1.1 * case.values[0]])
            inputs = case.values, (larger, *case.values[1:])
            torch.save([(given, case.function(*given)) for given in inputs], tmp_path / f"{name}.pt")
        (tmp_path / "names.pt").write_text("\n".join(CASES))
        code = (
            "import sys, pathlib, torch, convexlearn\n"
            "folder = pathlib.Path(sys.argv[1])\n"
            "for name in (folder / 'names.pt').read_text().split('\\n'):\n"
            "    module = torch.export.load(folder / f'{name}.pt2').module()\n"
            "    for given, expected in torch.load(folder / f'{name}.pt'):\n"
            "        for ours, theirs in zip(module(*given), expected):\n"
            "            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)\n"
            "            print('same')\n"
        )
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["same"] * 2 * (2 + 3 + 2)


def test_single_precision_under_vmap(quadratic):
    values = tuple(v.float() for v in quadratic.values)
    found = vmap(quadratic.function, in_dims=(0, None, None))(*values)
    assert found[0].dtype == torch.float32
    close(found[0], quadratic.function(*values)[0], 1e-6)


def test_geometric_programs():
    x, a = cp.Variable(pos=True), cp.Parameter(pos=True, name="a")
    layer = ConvexLayer(cp.Problem(cp.Minimize(a * x + 1 / x)), [a], [x], gp=True)
    value = torch.tensor(3.0, dtype=torch.float64)
    close(grad(lambda v: layer(v)[0])(value), -0.5 * value**-1.5, 1e-6)
    close(jacfwd(lambda v: layer(v)[0])(value), -0.5 * value**-1.5, 1e-6)


def test_what_cannot_be_differentiated_twice_says_so():
    X, C = cp.Variable((2, 2), symmetric=True), cp.Parameter((2, 2), symmetric=True, name="C")
    layer = ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(X - C)), [X >> 0]), [C], [X])
    value = torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    jacrev(lambda v: layer(v)[0])(value)
    with pytest.raises(OptionError, match="second derivatives through exponential, power and PSD"):
        hessian(lambda v: layer(v)[0].square().sum())(value)


def test_vectorized_jacobians_of_autograd_name_the_alternative(quadratic):
    with pytest.raises(OptionError, match=r"torch\.func\.jacrev"):
        torch.autograd.functional.jacobian(quadratic.function, quadratic.values, vectorize=True)


def test_eager_calls_do_not_use_the_operators(quadratic, monkeypatch):
    assert not transformed()
    monkeypatch.setattr(quadratic.layer, "_by_operators", None)
    leaf = quadratic.values[0].clone().requires_grad_()
    quadratic.function(leaf, *quadratic.values[1:])[0].sum().backward()
    assert leaf.grad is not None
