"""What docs/comparison.md says that other layers do not do, shown on the layers themselves.

cvxpylayers with diffcp is installed; the tests of qpth, proxsuite, moreau, deepinv and neuromancer run where these are.
"""

import copy
import importlib.metadata
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import cvxpy as cp
import diffcp
import pytest
import torch
from cvxpylayers.torch import CvxpyLayer
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from convexlearn import ConvexLayer, Status
from convexlearn.errors import DomainError, SolverError

POINT = torch.tensor([1.0, 2.0], dtype=torch.float64)
MATRIX = torch.tensor([[1.1, 0.2], [-0.1, 0.9]], dtype=torch.float64)
NONE = torch.empty(0, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _ignore_warnings() -> Iterator[None]:
    """Warnings of other packages are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def least_squares(layer: Callable[..., Any], **options: Any) -> Any:
    """minimize |A x - b|^2 over x >= 0, as a layer of (A, b)."""
    x, b, A = cp.Variable(2), cp.Parameter(2), cp.Parameter((2, 2))
    return layer(cp.Problem(cp.Minimize(cp.sum_squares(A @ x - b)), [x >= 0]), [A, b], [x], **options)


def interval(layer: Callable[..., Any], **options: Any) -> Any:
    """The smallest z in [low, 1], as a layer of low."""
    z, low = cp.Variable(), cp.Parameter()
    return layer(cp.Problem(cp.Minimize(z), [z >= low, z <= 1]), [low], [z], **options)


def leaves() -> tuple[Tensor, Tensor]:
    return MATRIX.clone().requires_grad_(), POINT.clone().requires_grad_()


def test_cvxpylayers_loses_the_batch() -> None:
    lows = torch.tensor([0.0, 2.0], dtype=torch.float64)
    with pytest.raises(diffcp.SolverError) as error:
        interval(CvxpyLayer)(lows)
    assert "1" not in str(error.value)
    ours = interval(ConvexLayer)
    assert ours.solve(lows).status.tolist() == [Status.SOLVED, Status.INFEASIBLE]
    with pytest.raises(SolverError, match="sample 1 is INFEASIBLE"):
        ours(lows)


def test_cvxpylayers_gradcheck() -> None:
    theirs, ours = least_squares(CvxpyLayer), least_squares(ConvexLayer)
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda A, b: theirs(A, b)[0], leaves())
    assert torch.autograd.gradcheck(lambda A, b: ours(A, b)[0], leaves())


def test_cvxpylayers_has_no_second_derivatives() -> None:
    theirs, ours = least_squares(CvxpyLayer), least_squares(ConvexLayer)
    with pytest.raises((GradcheckError, RuntimeError)):
        torch.autograd.gradgradcheck(lambda A, b: theirs(A, b)[0], leaves(), atol=1e-2)
    assert torch.autograd.gradgradcheck(lambda A, b: ours(A, b)[0], leaves())


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.jacrev, torch.func.jacfwd])
def test_cvxpylayers_under_transforms(transform: Callable[..., Any]) -> None:
    given = POINT.expand(3, 2) if transform is torch.func.vmap else POINT
    theirs, ours = least_squares(CvxpyLayer), least_squares(ConvexLayer)
    with pytest.raises(RuntimeError):
        transform(lambda b: theirs(MATRIX, b)[0])(given)
    assert bool(torch.isfinite(transform(lambda b: ours(MATRIX, b)[0])(given)).all())


def test_cvxpylayers_is_not_compiled() -> None:
    theirs, ours = least_squares(CvxpyLayer), least_squares(ConvexLayer)
    with pytest.raises(Exception, match="as_proxy"):
        torch.compile(lambda A, b: theirs(A, b)[0], fullgraph=True, backend="eager")(MATRIX, POINT)
    compiled = torch.compile(lambda A, b: ours(A, b)[0], fullgraph=True, backend="eager")(MATRIX, POINT)
    assert torch.allclose(compiled, ours(MATRIX, POINT)[0])


def test_cvxpylayers_is_not_exported() -> None:
    with pytest.raises(RuntimeError, match="numpy"):
        torch.export.export(least_squares(CvxpyLayer), (MATRIX, POINT))
    exported = torch.export.export(least_squares(ConvexLayer), (MATRIX, POINT))
    assert torch.allclose(exported.module()(MATRIX, POINT)[0], least_squares(ConvexLayer)(MATRIX, POINT)[0])


def test_cvxpylayers_batch_shapes() -> None:
    theirs, ours = least_squares(CvxpyLayer), least_squares(ConvexLayer)
    for batch in ((2, 3), (0,)):
        with pytest.raises(ValueError, match="dimension"):
            theirs(MATRIX, POINT.expand(*batch, 2))
        assert ours(MATRIX, POINT.expand(*batch, 2))[0].shape == (*batch, 2)


def test_cvxpylayers_deepcopy() -> None:
    with pytest.raises(NotImplementedError):
        copy.deepcopy(least_squares(CvxpyLayer))
    assert copy.deepcopy(least_squares(ConvexLayer))(MATRIX, POINT)[0].shape == (2,)


def test_cvxpylayers_quad_form() -> None:
    x, c, P = cp.Variable(2), cp.Parameter(2), cp.Parameter((2, 2), PSD=True)
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, P) - c @ x))
    with pytest.raises(ValueError, match="DPP"):
        CvxpyLayer(problem, [P, c], [x])
    assert torch.allclose(ConvexLayer(problem, [P, c], [x])(torch.eye(2).double(), POINT)[0], POINT / 2)


def test_cvxpylayers_domains() -> None:
    x, weight = cp.Variable(2), cp.Parameter(2, nonneg=True, name="weight")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x) + weight @ cp.abs(x)))
    outside = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    with pytest.raises(Exception) as error:  # noqa: PT011
        CvxpyLayer(problem, [weight], [x])(outside)
    assert "weight" not in str(error.value)
    with pytest.raises(DomainError, match="'weight' must be nonnegative"):
        ConvexLayer(problem, [weight], [x])(outside)


def moreau(build: Callable[..., Any]) -> Any:
    pytest.importorskip("moreau")
    return build(CvxpyLayer, solver="MOREAU")


def test_moreau_answers_an_infeasible_sample() -> None:
    (z,) = moreau(interval)(torch.tensor([0.0, 2.0], dtype=torch.float64))
    assert bool(torch.isfinite(z).all())


def test_moreau_has_no_second_derivatives() -> None:
    layer = moreau(least_squares)
    (gradient,) = torch.autograd.grad(layer(MATRIX, b := POINT.clone().requires_grad_())[0].square().sum(), b,
                                      create_graph=True)  # fmt: skip
    hessian = torch.autograd.grad(gradient.sum(), b, allow_unused=True)[0] if gradient.requires_grad else None
    ours = least_squares(ConvexLayer)
    exact = torch.func.hessian(lambda b: ours(MATRIX, b)[0].square().sum())(POINT).sum(0)
    assert hessian is None or not torch.allclose(hessian, exact, rtol=1e-2)


def test_moreau_under_transforms() -> None:
    layer = moreau(least_squares)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda b: layer(MATRIX, b)[0])(POINT.expand(3, 2))


def qpth(p: Tensor, h: Tensor, Q: float = 1.0) -> Tensor:
    """minimize Q/2 z^2 + p z, -z <= h_1, z <= h_2."""
    pytest.importorskip("qpth")
    from qpth.qp import QPFunction

    G = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    return QPFunction(verbose=-1)(torch.full((1, 1), Q, dtype=torch.float64), p, G, h, NONE, NONE)


UNIT = torch.tensor([0.0, 1.0], dtype=torch.float64)


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64, requires_grad=True)


def test_qpth_refuses_linear_programs() -> None:
    with pytest.raises(RuntimeError, match="SPD"):
        qpth(one(1.0), UNIT, Q=0.0)


def test_qpth_answers_an_infeasible_sample() -> None:
    z = qpth(one(1.0), torch.tensor([[0.0, 1.0], [-2.0, 1.0]], dtype=torch.float64))
    assert bool(torch.isfinite(z).all())


def test_qpth_at_the_centre() -> None:
    p = one(-0.5)
    (gradient,) = torch.autograd.grad(qpth(p, UNIT).sum(), p)
    assert gradient.item() == pytest.approx(-0.2, abs=1e-6)  # the derivative of z = -p is -1
    p = one(-0.3)
    assert torch.autograd.gradcheck(lambda p: qpth(p, UNIT), (p,))


def test_qpth_has_no_second_derivatives() -> None:
    with pytest.raises((RuntimeError, GradcheckError)):
        torch.autograd.gradgradcheck(lambda p: qpth(p, UNIT).square(), (one(-0.3),))


def qplayer(p: Tensor, low: Tensor, high: Tensor, G: Tensor, **options: Any) -> Tensor:
    """minimize 1/2 z^2 + p z, low <= G z <= high."""
    pytest.importorskip("proxsuite")
    function = pytest.importorskip("proxsuite.torch.qplayer").QPFunction
    lead, Q = G.shape[:-2], torch.eye(1, dtype=torch.float64)
    A, b = torch.zeros(*lead, 0, 1, dtype=torch.float64), torch.zeros(*lead, 0, dtype=torch.float64)
    return function(**options)(Q.expand(*lead, 1, 1), p, A, b, G, low, high)[0]


SINGLE = torch.ones(1, 1, dtype=torch.float64)
LOW, HIGH = (torch.full((1,), v, dtype=torch.float64) for v in (0.0, 1.0))
TWO = torch.ones(2, 1, 1, dtype=torch.float64)
EMPTY = torch.tensor([[0.0], [2.0]], dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)


def test_qplayer_answers_an_infeasible_sample() -> None:
    z = qplayer(torch.ones(2, 1, dtype=torch.float64), *EMPTY, TWO)
    assert bool(torch.isfinite(z).all())


def test_qplayer_batched_constraints() -> None:
    with pytest.raises(ValueError, match="unpack"):
        qplayer(torch.ones(2, 1, dtype=torch.float64), *EMPTY, TWO, structural_feasibility=False)


def test_qplayer_has_no_second_derivatives() -> None:
    with pytest.raises(RuntimeError, match="requires grad"):
        torch.autograd.gradgradcheck(lambda p: qplayer(p, LOW, HIGH, SINGLE).square(), (one(-0.3),))


@pytest.mark.parametrize(
    "function", [lambda p: qpth(p, UNIT), lambda p: qplayer(p, LOW, HIGH, SINGLE)], ids=["qpth", "QPLayer"]
)
def test_qp_functions_under_transforms(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.vmap(function)(one(-0.3).detach().expand(3, 1))


@pytest.mark.parametrize(("module", "function"), [("qpth.qp", "QPFunction"), ("proxsuite.torch.qplayer", "QPFunction")])
def test_qpth_and_qplayer_take_matrices(module: str, function: str) -> None:
    found = getattr(pytest.importorskip(module), function)
    with pytest.raises(TypeError):
        found()(cp.Problem(cp.Minimize(cp.square(cp.Variable()))))


@pytest.mark.parametrize("package", ["deepinv", "neuromancer"])
def test_peers_without_cvxpy(package: str) -> None:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    sources = [file.read_text() for file in files if file.suffix == ".py" and file.parts[0] == package]
    assert len(sources) > 20
    assert not any("cvxpy" in text for text in sources)
