"""The table of solvers, and which one a program gets."""

import logging

from convexlearn.errors import OptionError, suggest
from convexlearn.program.program import Program
from convexlearn.solvers.base import Options, Solver
from convexlearn.solvers.conic import Conic
from convexlearn.solvers.diffcp import Diffcp
from convexlearn.solvers.quadratic.dense import Dense
from convexlearn.solvers.quadratic.solver import Quadratic
from convexlearn.solvers.second_order.solver import SecondOrder

logger = logging.getLogger(__name__)

SOLVERS: dict[str, type[Solver]] = {s.name: s for s in (Quadratic, Dense, SecondOrder, Conic, Diffcp)}

LARGE = 20_000
"""Variables, rows and stored entries from which Clarabel's sparse factor is faster than lanes with one pattern."""

PEERS = ("CLARABEL", "CUCLARABEL", "CUOPT", "DIFFQCP", "ECOS", "MOREAU", "MPAX", "OSQP", "SCS")
"""Solvers of CVXPY and cvxpylayers whose names are accepted and stand for our own choice."""

__all__ = ["PEERS", "SOLVERS", "Options", "Solver", "choose", "find"]


def find(solver: str | Solver | None) -> Solver | None:
    """The solver of a name (any case), or the Solver itself; None for our own choice; OptionError lists the names."""
    if solver is None:
        return None
    if isinstance(solver, str) and solver.upper() in PEERS:
        logger.debug("solver '%s' of another package is not used; convexlearn chooses", solver)
        return None
    if not isinstance(solver, str):
        if not isinstance(solver, Solver):
            raise OptionError(f"solver must be a name or a Solver, got {solver!r}; names: {', '.join(SOLVERS)}")
        return solver
    if solver.lower() not in SOLVERS:
        raise OptionError(f"unknown solver '{solver}'; {suggest(solver.lower(), SOLVERS)}")
    return SOLVERS[solver.lower()]()


def choose(program: Program) -> Solver:
    """The default: quadratic for QPs and LPs, socp for second-order cones up to a size, conic for everything else."""
    if program.cones.polyhedral:
        return Quadratic()
    size = program.n + program.m + program.P.nnz + program.A.nnz
    return SecondOrder() if SecondOrder().supports(program) is None and size <= LARGE else Conic()
