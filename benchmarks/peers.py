"""The layers that are compared; each maker returns None where its package does not install."""

from collections.abc import Callable
from typing import Any

import torch
from cvxpylayers.torch import CvxpyLayer
from torch import Tensor

from benchmarks.reference import Exact
from benchmarks.workloads import Layer, Workload


def _cvxpylayer(workload: Workload, name: Any = None, **solver_args: Any) -> Layer:
    declared = workload.declare()
    return CvxpyLayer(declared.problem, declared.parameters, declared.variables, solver=name, solver_args=solver_args)


def convexlearn(workload: Workload) -> Layer:
    """This package with its defaults."""
    from convexlearn import ConvexLayer

    declared = workload.declare()
    return ConvexLayer(declared.problem, declared.parameters, declared.variables)


def diffcp_default(workload: Workload) -> Layer:
    """cvxpylayers as it comes."""
    return _cvxpylayer(workload)


def diffcp_scs(workload: Workload) -> Layer:
    """cvxpylayers with SCS at 1e-9 and the lsmr adjoint: slow and accurate."""
    return _cvxpylayer(workload, solve_method="SCS", eps=1e-9, max_iters=100_000, mode="lsmr")


def moreau(workload: Workload) -> Layer | None:
    """cvxpylayers with the Moreau interior point at 1e-10 and exact differentiation."""
    try:
        import moreau as package
    except ImportError:
        return None
    settings = package.IPMSettings(tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10, diff_method="exact")
    return _cvxpylayer(workload, "MOREAU", solver="ipm", ipm_settings=settings)


def moreau_default(workload: Workload) -> Layer | None:
    """cvxpylayers with the Moreau interior point as it comes."""
    try:
        import moreau as package  # noqa: F401
    except ImportError:
        return None
    return _cvxpylayer(workload, "MOREAU", solver="ipm")


def qpth(workload: Workload) -> Layer | None:
    """qpth's batched dense interior point, fed the standard form directly."""
    try:
        from qpth.qp import QPFunction
    except ImportError:
        return None
    if workload.standard is None:
        return None
    return _standard(workload, lambda *data: QPFunction(verbose=-1, eps=1e-12, maxIter=40)(*data))


def qplayer(workload: Workload) -> Layer | None:
    """proxsuite's QPLayer, fed the standard form directly; without a lower bound on Gx."""
    try:
        from proxsuite.torch.qplayer import QPFunction
    except ImportError:
        return None
    if workload.standard is None:
        return None

    def solve(Q: Tensor, p: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor) -> Tensor:
        return QPFunction(maxIter=1000)(Q, p, A, b, G, torch.full_like(h, -1e20), h)[0]

    return _standard(workload, solve)


def _standard(workload: Workload, solve: Callable[..., Tensor]) -> Layer:
    form = workload.standard
    assert form is not None
    return lambda *values: (solve(*form(list(values))),)


def exact(workload: Workload) -> Layer:
    """The reference of the error columns."""
    if (solution := workload.exact) is not None:
        return lambda *values: (solution(*values),)
    return _cvxpylayer(workload, Exact())


PEERS: dict[str, Callable[[Workload], Layer | None]] = {
    "convexlearn": convexlearn,
    "diffcp": diffcp_default,
    "diffcp SCS 1e-9": diffcp_scs,
    "Moreau 1e-10": moreau,
    "Moreau": moreau_default,
    "qpth": qpth,
    "QPLayer": qplayer,
}
CVXPYLAYERS = ("diffcp", "diffcp SCS 1e-9", "Moreau 1e-10", "Moreau")
