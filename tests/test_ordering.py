"""Elimination orders against elimination on the dense pattern."""

import numpy as np
import pytest
import scipy.sparse as sp

from convexlearn.solvers.quadratic.ordering import cheapest_order, column_patterns, minimum_degree, postorder
from convexlearn.solvers.quadratic.symbolic import elimination_order


def fill(pattern: np.ndarray, order: np.ndarray) -> int:
    """Entries of L below the diagonal, by elimination on the dense pattern."""
    graph = pattern[np.ix_(order, order)] != 0
    count = 0
    for j in range(len(order)):
        rows = j + 1 + np.flatnonzero(graph[j + 1 :, j])
        graph[np.ix_(rows, rows)] = True
        count += len(rows)
    return count


@pytest.mark.parametrize("density", [0.05, 0.2])
def test_ordering_beats_the_natural_one_and_predicts_fill(density):
    rng = np.random.default_rng(1)
    pattern = (rng.random((60, 60)) < density) | np.eye(60, dtype=bool)
    pattern |= pattern.T
    order = minimum_degree(sp.csr_array(pattern.astype(float)))
    np.testing.assert_array_equal(np.sort(order), np.arange(60))
    columns = column_patterns(sp.csr_array(pattern.astype(float)), order)
    assert sum(map(len, columns)) == fill(pattern, order) < fill(pattern, np.arange(60))
    post = order[postorder(columns)]
    assert fill(pattern, post) == fill(pattern, order)


def test_minimum_degree_has_no_fill_on_a_tree():
    parent = [max(0, (k - 1) // 2) for k in range(31)]
    pattern = np.eye(31)
    pattern[range(31), parent] = pattern[parent, range(31)] = 1
    columns = column_patterns(sp.csr_array(pattern), minimum_degree(sp.csr_array(pattern)))
    assert sum(map(len, columns)) == 30


def test_rows_of_a_dense_program_come_first():
    variables, inequalities, N = 12, 6, 20
    pattern = np.zeros((N, N))
    pattern[:variables] = pattern[:, :variables] = 1
    pattern += np.eye(N)
    order = elimination_order(sp.csr_array(pattern), inequalities)
    assert set(order[:inequalities].tolist()) == set(range(N - inequalities, N))
    # columns of the rows, then of the variables with the two equality rows, then those
    assert fill(pattern, order) == 6 * 12 + (13 + 2) * 12 // 2 + 1
    plain, number = cheapest_order(sp.csr_array(pattern), [None])
    assert number == 0
    assert fill(pattern, plain) > fill(pattern, order)
