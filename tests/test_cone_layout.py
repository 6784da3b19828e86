"""Elimination orders of KKT matrices with second-order cones, and the layout of their slots."""

import numpy as np
import pytest
from cone_families import family

from convexlearn.program.program import Cones
from convexlearn.solvers.quadratic.layout import NAMES
from convexlearn.solvers.quadratic.ordering import column_patterns, minimum_degree, symmetric_pattern
from convexlearn.solvers.second_order.layout import OWN, arrange, elimination_order, gram_matrices


def fill(pattern, order):
    return sum(len(c) for c in column_patterns(pattern, order))


def test_header_holds_what_the_offsets_say():
    program, _ = family(0, 5, Cones(zero=1, nonneg=2, soc=(3, 4)))
    plan = arrange(program)
    assert [plan.offset[name] for name in (*NAMES, *OWN)] == plan.header[: len(NAMES) + len(OWN)].tolist()
    n, m, k = program.n, program.m, 2
    assert plan.offset["N_K"] == n + m + 2 * k
    assert sorted(plan.header[plan.offset["I_PERM"] :][: n + m + 2 * k]) == list(range(n + m + 2 * k))
    table = plan.header[plan.offset["I_CONE"] :][: 5 * k].reshape(k, 5)
    entries = program.P.nnz + program.A.nnz
    np.testing.assert_array_equal(table[:, :3], [[3, 3, entries], [6, 4, entries + 3]])
    assert plan.state < plan.work


@pytest.mark.parametrize("stage", [-1, 1])
def test_stages_of_minimum_degree(stage):
    rng = np.random.default_rng(0)
    i, j = rng.integers(0, 30, size=(2, 60))
    pattern = symmetric_pattern(i, j, 30)
    group = np.arange(0, 30, 3)
    stages = np.zeros(30, dtype=np.int64)
    stages[group] = stage
    order = minimum_degree(pattern, stages)
    assert sorted(order) == list(range(30))
    edge = order[: len(group)] if stage < 0 else order[-len(group) :]
    assert set(edge) == set(group)


def test_rows_of_a_large_cone_come_before_its_low_rank_part():
    """A dense cone of 20 rows on 20 variables: eliminating its two extra unknowns first would couple all rows."""
    k = 20
    i = np.concatenate([np.repeat(np.arange(k), k), np.full(k, 2 * k), np.full(k, 2 * k + 1), np.full(k, 2 * k + 2)])
    j = np.concatenate([k + np.tile(np.arange(k), k), np.arange(k), np.arange(k), k + np.arange(k)])
    pattern = symmetric_pattern(i, j, 2 * k + 3)
    order, rows_first = elimination_order(pattern, np.arange(k), np.array([2 * k, 2 * k + 1]))
    assert rows_first
    assert set(order[:k]) == set(range(k))
    assert set(order[k : k + 2]) == {2 * k, 2 * k + 1}
    assert fill(pattern, order) < 0.9 * fill(pattern, minimum_degree(pattern))


def test_products_add_up_to_the_gram_matrix():
    program, data = family(1, 6, Cones(zero=1, nonneg=2, soc=(2, 15)), density=1.0, batch=1)
    gram = gram_matrices(program)
    entries = np.concatenate([data.P[0], data.A[0]])
    total = np.zeros(len(gram.rows))
    np.add.at(total, gram.products[:, 0], entries[gram.products[:, 1]] * entries[gram.products[:, 2]])
    assert gram.counts.tolist() == [0, len(total)]
    rows = program.A.dense(data.A)[0, 5:].numpy()
    np.testing.assert_allclose(total, (rows.T @ rows)[gram.rows, gram.cols], atol=1e-12)
