import pytest
from solver_contract import SolverContract

from convexlearn.errors import OptionError
from convexlearn.solvers import SOLVERS, Solver, find


@pytest.fixture(params=SOLVERS)
def solver_name(request):
    return request.param


class TestEverySolver(SolverContract):
    @pytest.fixture
    def solver(self, solver_name):
        return find(solver_name)


def test_table(solver_name):
    solver = find(solver_name.upper())
    assert isinstance(solver, Solver)
    assert solver.name == solver_name
    assert repr(solver) == f"<solver '{solver_name}'>"
    assert find(solver) is solver


def test_what_is_no_solver():
    with pytest.raises(OptionError, match="must be a name or a Solver"):
        find(3)  # pyright: ignore[reportArgumentType]
