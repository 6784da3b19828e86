"""From a CVXPY problem to a frozen, solver-ready program."""
