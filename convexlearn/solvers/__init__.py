"""The table of solvers, and which one a program gets."""

from convexlearn.errors import OptionError, suggest
from convexlearn.program.program import Program
from convexlearn.solvers.base import Options, Solver
from convexlearn.solvers.conic import Conic
from convexlearn.solvers.diffcp import Diffcp
from convexlearn.solvers.quadratic.dense import Dense
from convexlearn.solvers.quadratic.solver import Quadratic

SOLVERS: dict[str, type[Solver]] = {s.name: s for s in (Quadratic, Dense, Conic, Diffcp)}

__all__ = ["SOLVERS", "Options", "Solver", "choose", "find"]


def find(solver: str | Solver) -> Solver:
    """The solver of a name (any case), or the Solver itself; OptionError lists the names."""
    if not isinstance(solver, str):
        if not isinstance(solver, Solver):
            raise OptionError(f"solver must be a name or a Solver, got {solver!r}; names: {', '.join(SOLVERS)}")
        return solver
    if solver.lower() not in SOLVERS:
        raise OptionError(f"unknown solver '{solver}'; {suggest(solver.lower(), SOLVERS)}")
    return SOLVERS[solver.lower()]()


def choose(program: Program) -> Solver:
    """The default: the quadratic solver for QPs and LPs, the conic solver for the other cones."""
    return Quadratic() if program.cones.polyhedral else Conic()
