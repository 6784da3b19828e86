"""Compiled dual active sets (Goldfarb, Idnani 1983) for min 1/2 u'Hu + g'u, Cu <= d with H and C common to all samples.

Every point visited is the minimizer on its working set, with nonnegative multipliers, and violated rows enter one
by one. The working set's Gram matrix C_W H^-1 C_W' is kept factored as LL'. Matrices are those of `Rows`.
"""

from collections import namedtuple

import numpy as np

from convexlearn.program.compiled import helper, summing
from convexlearn.program.lane_kernels import axpy
from convexlearn.solvers.quadratic.small_dense_kernels import add_product

VIOLATION = 1e-12  # of a row, relative to the sizes of its terms: less counts as none
DEPENDENT = 1e-12  # of a row's curvature: with less it depends on the working set
TOUCHING = 1e-9  # a starting point's distance from a row, relative to its terms: rows that close are tried first
REFINEMENTS = 3
REFINED = 1e-15

Rows = namedtuple("Rows", ["H", "S", "C", "across", "T", "offset", "basic", "norm", "equality"])
"""H and S = H^-1 (n, n); C (rows, n), across = C', T = CS; offset: d = e - offset b (rows, equalities);
basic: the rows' coefficients of the basic variables (rows, equalities); norm: |c_p|_1 of each row;
equality: coefficients of the equalities (equalities, inner + basic)."""


@summing
def dot(A, i, B, k):
    """Product of row i of A and row k of B."""
    total = 0.0
    for j in range(A.shape[1]):
        total += A[i, j] * B[k, j]
    return total


@helper
def border(rows, L, working, count, p, y):
    """y with Ly = C_W H^-1 c_p; returns the curvature that is left of row p, 0 where it depends on the others."""
    full = dot(rows.C, p, rows.T, p)
    left = full
    for a in range(count):
        value = dot(rows.C, working[a], rows.T, p)
        for e in range(a):
            value -= L[a, e] * y[e]
        y[a] = value / L[a, a]
        left -= y[a] * y[a]
    return left if left > DEPENDENT * full else 0.0


@helper
def append(L, working, count, p, y, curvature):
    """Let row p into the working set; y and curvature are those of `border`."""
    for a in range(count):
        L[count, a] = y[a]
    L[count, count] = np.sqrt(curvature)
    working[count] = p


@helper
def remove(L, working, multipliers, count, q):
    """Take the row at place q out of the working set: rotations make L triangular again."""
    for i in range(q, count - 1):
        working[i], multipliers[i] = working[i + 1], multipliers[i + 1]
        for j in range(i + 2):
            L[i, j] = L[i + 1, j]
    for c in range(q, count - 1):
        a, b = L[c, c], L[c, c + 1]
        length = np.hypot(a, b)
        for i in range(c, count - 1):
            x, y = L[i, c], L[i, c + 1]
            L[i, c], L[i, c + 1] = (a * x + b * y) / length, (a * y - b * x) / length


@helper
def back_substitute(L, count, y, r):
    """r = L'^-1 y."""
    for a in range(count - 1, -1, -1):
        value = y[a]
        for e in range(a + 1, count):
            value -= L[e, a] * r[e]
        r[a] = value / L[a, a]


@helper
def forward_substitute(L, count, y):
    """y = L^-1 y."""
    for a in range(count):
        for e in range(a):
            y[a] -= L[a, e] * y[e]
        y[a] /= L[a, a]


@helper
def move(rows, step, z, u, slack):
    """Go from u by step z, and keep slack = d - Cu up to date."""
    for i in range(len(u)):
        u[i] += step * z[i]
        axpy(slack, 0, -step * z[i], rows.across, i * len(slack), len(slack))


@helper
def worst_row(rows, d, slack, u, active, size):
    """The row outside the working set that is violated most, relative to its norm; -1 where none is."""
    largest, chosen, worst = 0.0, -1, 0.0
    for i in range(len(u)):
        largest = max(largest, abs(u[i]))
    for p in range(len(slack)):
        if slack[p] < 0.0 and active[p] == 0:
            scale = rows.norm[p]
            if -slack[p] > VIOLATION * (1e-3 * size + abs(d[p]) + scale * largest):
                violation = -slack[p] / scale if scale > 0.0 else np.inf
                if violation > worst:
                    chosen, worst = p, violation
    return chosen


@helper
def begin_at(rows, point, d, size, slack, u, L, working, multipliers, active, y):
    """Move u and slack to the rows that `point` touches and that have nonnegative multipliers; returns how many."""
    count, n, largest = 0, len(u), 0.0
    for i in range(n):
        largest = max(largest, abs(point[i]))
    for p in range(len(d)):
        value = 0.0
        for i in range(n):
            value += rows.C[p, i] * point[i]
        if count < n and abs(d[p] - value) <= TOUCHING * (1e-3 * size + abs(d[p]) + rows.norm[p] * largest):
            curvature = border(rows, L, working, count, p, y)
            if curvature > 0.0:
                append(L, working, count, p, y, curvature)
                count += 1
    while count > 0:
        for a in range(count):
            y[a] = -slack[working[a]]
        forward_substitute(L, count, y)
        back_substitute(L, count, y, multipliers)
        lowest = 0
        for a in range(count):
            lowest = a if multipliers[a] < multipliers[lowest] else lowest
        if multipliers[lowest] >= 0.0:
            break
        remove(L, working, multipliers, count, lowest)
        count -= 1
    for a in range(count):
        active[working[a]] = 1
        move(rows, -multipliers[a], rows.T[working[a]], u, slack)
    return count


@helper
def blocking(multipliers, r, count):
    """The place in the working set whose multiplier is the first to vanish along -r, -1 for none."""
    first, shortest = -1, np.inf
    for a in range(count):
        if r[a] > 0.0 and multipliers[a] / r[a] < shortest:
            first, shortest = a, multipliers[a] / r[a]
    return first


@helper
def enter(rows, p, slack, u, L, working, multipliers, active, count, vectors):
    """Satisfy row p, dropping rows that are in the way; returns the size of the working set, -1 where none can."""
    y, r, z = vectors[0], vectors[1], vectors[2]
    own = 0.0
    for _ in range(len(u) + len(slack)):
        curvature = border(rows, L, working, count, p, y)
        back_substitute(L, count, y, r)
        first = blocking(multipliers, r, count)
        dual = multipliers[first] / r[first] if first >= 0 else np.inf
        primal = max(-slack[p], 0.0) / curvature if curvature > 0.0 else np.inf
        step = min(dual, primal)
        if step == np.inf:
            return -1
        if curvature > 0.0:
            z[:] = rows.T[p]
            for a in range(count):
                axpy(z, 0, -r[a], rows.T, working[a] * len(u), len(u))
            move(rows, -step, z, u, slack)
        for a in range(count):
            multipliers[a] -= step * r[a]
        own += step
        if primal <= dual:
            append(L, working, count, p, y, curvature)
            multipliers[count] = own
            active[p] = 1
            return count + 1
        active[working[first]] = 0
        remove(L, working, multipliers, count, first)
        count -= 1
    return -1


@helper
def settle(rows, g, d, u, L, working, multipliers, count, vectors):
    """Solve Hu + g + C_W'multipliers = 0, C_W u = d_W to rounding, from an approximation, by refinement."""
    y, r, z, residual = vectors[0], vectors[1], vectors[2], vectors[3]
    n = len(u)
    for _ in range(REFINEMENTS):
        residual[:] = g
        add_product(rows.H, u, residual)
        size = worst = 0.0
        for i in range(n):
            size = max(size, abs(g[i]), abs(residual[i]))
        for a in range(count):
            axpy(residual, 0, multipliers[a], rows.C, working[a] * n, n)
        for i in range(n):
            worst = max(worst, abs(residual[i]))
        z[:] = 0.0
        add_product(rows.S, residual, z)
        for a in range(count):
            p = working[a]
            y[a] = -d[p]
            for i in range(n):
                y[a] += rows.C[p, i] * (u[i] - z[i])
        forward_substitute(L, count, y)
        back_substitute(L, count, y, r)
        for i in range(n):
            u[i] -= z[i]
        for a in range(count):
            multipliers[a] += r[a]
            axpy(u, 0, -r[a], rows.T, working[a] * n, n)
        if worst <= REFINED * size:
            break


@helper
def minimize(rows, g, d, start, u, L, working, multipliers, active, slack, vectors):
    """One sample; returns (size of the working set, steps), steps -1 where it is infeasible or does not settle.

    start: (0 or n,), a point whose rows are tried first.
    """
    n, m = len(u), len(d)
    active[:] = 0
    u[:] = 0.0
    size = 0.0
    for p in range(m):
        if not d[p] > -np.inf:
            return 0, -1
        if d[p] < np.inf:
            size = max(size, abs(d[p]))
        slack[p] = d[p]
    vectors[2] = 0.0
    add_product(rows.S, g, vectors[2])
    move(rows, -1.0, vectors[2], u, slack)
    count = 0
    if len(start) > 0:
        count = begin_at(rows, start, d, size, slack, u, L, working, multipliers, active, vectors[0])
    for step in range(4 * (n + m)):
        p = worst_row(rows, d, slack, u, active, size)
        if p < 0:
            settle(rows, g, d, u, L, working, multipliers, count, vectors)
            return count, step + 1
        count = enter(rows, p, slack, u, L, working, multipliers, active, count, vectors)
        if count < 0:
            return 0, -1
    return 0, -1


@helper
def spread_multipliers(working, multipliers, count, j, out):
    """Column j of out (rows, samples): multipliers of the working set, zero elsewhere."""
    out[:, j] = 0.0
    for a in range(count):
        out[working[a], j] = multipliers[a]


@helper
def solve_rows(rows, g, d, begin, k, u, multipliers, states, steps):
    """Solve the samples of a block: u (n, samples), multipliers (rows, samples), working sets states[k:] (B, rows).

    steps[k:]: number of rows that entered plus one, or -1 where nothing settled. begin: (0 or B, n) starting points.
    """
    n, m = len(g), len(d)
    L, working, own = np.zeros((n + 1, n + 1)), np.empty(n + 1, np.int64), np.empty(n + 1)
    vectors, slack, gk, dk, uk = np.empty((4, n)), np.empty(m), np.empty(n), np.empty(m), np.empty(n)
    for j in range(g.shape[1]):
        gk[:], dk[:] = g[:, j], d[:, j]
        start = begin[k + j] if begin.shape[0] > 0 else gk[:0]
        count, steps[k + j] = minimize(rows, gk, dk, start, uk, L, working, own, states[k + j], slack, vectors)
        u[:, j] = uk
        spread_multipliers(working, own, count, j, multipliers)


@helper
def fixed_rows(rows, g, d, states, k, u, multipliers):
    """Linear systems Hu + g + C'multipliers = 0 with Cu = d on given working sets, multipliers zero elsewhere."""
    n, m = len(g), len(d)
    L, working, own = np.zeros((n + 1, n + 1)), np.empty(n + 1, np.int64), np.empty(n + 1)
    vectors, gk, dk, uk = np.empty((4, n)), np.empty(n), np.empty(m), np.empty(n)
    for j in range(g.shape[1]):
        gk[:], dk[:] = g[:, j], d[:, j]
        uk[:] = 0.0
        own[:] = 0.0
        count = 0
        for p in range(m):
            if states[k + j, p] != 0:
                curvature = border(rows, L, working, count, p, vectors[0])
                if curvature > 0.0:
                    append(L, working, count, p, vectors[0], curvature)
                    count += 1
        settle(rows, gk, dk, uk, L, working, own, count, vectors)
        u[:, j] = uk
        spread_multipliers(working, own, count, j, multipliers)
