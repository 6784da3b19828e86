"""Compiled passes of the condensed path: forward and backward of up to WIDTH samples in one call each.

`dense` holds the matrices [H, Kb, Ku, mixed, P_basic, H^-1 or nothing] back to back, `general` those of
polyhedral_kernels.Rows, [C, C', T, offset, basic, norm, equality], or None where all inequalities are boxes: numba then
compiles nothing of that method. `index` holds the lists (header as in reduction_kernels) inner, basic, lower, upper,
absolute. Columns of P_basic are in the order inner, basic.
"""

import numpy as np

from convexlearn.program.compiled import entry, helper
from convexlearn.program.lane_kernels import add_scaled, block_width
from convexlearn.program.reduction_kernels import (
    A_COL,
    A_ROW,
    P_COL,
    P_ROW,
    gather,
    lift_block,
    part,
    restrict_block,
    scatter,
    transpose_in,
    transpose_out,
)
from convexlearn.solvers.quadratic.active_set_kernels import LOWER, UPPER, fixed_sample, solve_sample
from convexlearn.solvers.quadratic.kkt_kernels import adjoint_residual_block, gradient_block, residual_block
from convexlearn.solvers.quadratic.polyhedral_kernels import Rows, fixed_rows, solve_rows

INNER, BASIC, LOWER_AT, UPPER_AT, ABSOLUTE_AT = range(5)


@helper
def matrices(index, dense):
    """H, its inverse (or nothing), Kb, Ku, mixed and P_basic."""
    n, rows = len(part(index, INNER)), len(part(index, BASIC))
    H, at = dense[: n * n].reshape(n, n), n * n
    Kb = dense[at : at + rows * rows].reshape(rows, rows)
    at += rows * rows
    Ku = dense[at : at + rows * n].reshape(rows, n)
    at += rows * n
    mixed = dense[at : at + rows * n].reshape(rows, n)
    at += rows * n
    P_basic = dense[at : at + rows * (n + rows)].reshape(rows, n + rows)
    at += rows * (n + rows)
    inverse = n if at < len(dense) else 0
    return H, dense[at:].reshape(inverse, n), Kb, Ku, mixed, P_basic


@helper
def general_rows(H, S, equalities, general):
    """The inequalities that `general` holds."""
    n = len(H)
    m = (len(general) - equalities * (n + equalities)) // (3 * n + 2 * equalities + 1)
    C, across, T = general[: m * n], general[m * n : 2 * m * n], general[2 * m * n : 3 * m * n]
    offset, rest = general[3 * m * n : m * (3 * n + equalities)], general[m * (3 * n + equalities) :]
    basic, norm, equality = (
        rest[: m * equalities],
        rest[m * equalities : m * equalities + m],
        rest[m * equalities + m :],
    )
    sides, shape = (offset.reshape(m, equalities), basic.reshape(m, equalities)), (equalities, n + equalities)
    return Rows(H, S, C.reshape(m, n), across.reshape(n, m), T.reshape(m, n), *sides, norm, equality.reshape(shape))


@helper
def multiply_dense(M, factor, x, x_rows, out, out_rows):
    """out[out_rows] += factor M x[x_rows] over the samples of a block."""
    for r in range(len(out_rows)):
        o = out_rows[r]
        for c in range(len(x_rows)):
            add_scaled(out, o, factor * M[r, c], x, x_rows[c])


@helper
def gradient(index, Ku, mixed, v):
    """g (size, samples) of the condensed problem: q_N + Ku'q_B + (P_NB + Ku'P_BB) Kb b."""
    inner, basic = part(index, INNER), part(index, BASIC)
    g, rows = np.empty((len(inner), v.shape[1])), len(basic)
    gather(inner, v, g, 0)
    if rows > 0:
        own = np.arange(len(inner)).astype(np.int32)
        b = np.arange(len(inner) + rows, len(inner) + 2 * rows).astype(np.int32)
        multiply_dense(Ku.T, 1.0, v, basic, g, own)
        multiply_dense(mixed.T, 1.0, v, b, g, own)
    return g


@helper
def right_sides(index, rows, v):
    """d (rows, samples) of the general inequalities: [h, -l, u] less what b contributes."""
    n, equal, m = len(rows.H), rows.offset.shape[1], len(rows.C)
    lower, upper = len(part(index, LOWER_AT)), len(part(index, UPPER_AT))
    d, at = np.empty((m, v.shape[1])), n + 2 * equal
    for i in range(m):
        sign = -1.0 if m - lower - upper <= i < m - upper else 1.0
        for j in range(v.shape[1]):
            d[i, j] = sign * v[at + i, j]
    if equal > 0:
        b = np.arange(n + equal, n + 2 * equal).astype(np.int32)
        multiply_dense(rows.offset, -1.0, v, b, d, np.arange(m).astype(np.int32))
    return d


@helper
def recover(index, Kb, Ku, P_basic, rows, v, u, prices, s):
    """Fill rows [x, y] of s: x_B = Kb b + Ku u and y = -Kb'(P_B x + q_B + what `rows`, if any, contribute)."""
    inner, basic = part(index, INNER), part(index, BASIC)
    n, equal = len(inner) + len(basic), len(basic)
    s[: n + equal] = 0.0
    scatter(inner, u, 0, s)
    if equal > 0:
        every, sides = index[index[INNER] : index[LOWER_AT]], np.arange(n, n + equal).astype(np.int32)
        own = np.arange(equal).astype(np.int32)
        multiply_dense(Kb, 1.0, v, sides, s, basic)
        multiply_dense(Ku, 1.0, u, np.arange(len(inner)).astype(np.int32), s, basic)
        price = np.empty((equal, v.shape[1]))
        if rows is not None:
            gather(sides, v, price, 0)
            multiply_dense(rows.equality, -1.0, s, every, price, own)
            multiply_dense(Kb, 1.0, price, own, s, basic)
        gather(basic, v, price, 0)
        multiply_dense(P_basic, 1.0, s, every, price, own)
        if rows is not None:
            multiply_dense(rows.basic.T, 1.0, prices, np.arange(len(prices)).astype(np.int32), price, own)
        multiply_dense(Kb.T, -1.0, price, own, s, sides)
        if rows is not None:
            multiply_dense(rows.equality[:, len(inner) :].T, 1.0, s, sides, price, own)
            multiply_dense(Kb.T, -1.0, price, own, s, sides)


@helper
def multipliers(index, rho, s):
    """Fill rows [lower, upper, v] of s from rho = -(Hu + g): each part of rho goes to the bound of its sign."""
    lower, upper, absolute = part(index, LOWER_AT), part(index, UPPER_AT), part(index, ABSOLUTE_AT)
    at = len(s) - len(absolute) - len(upper) - len(lower)
    for j in range(rho.shape[1]):
        for i in range(len(lower)):
            s[at + i, j] = max(-rho[lower[i], j], 0.0)
        for i in range(len(upper)):
            s[at + len(lower) + i, j] = max(rho[upper[i], j], 0.0)
        for i in range(len(absolute)):
            s[at + len(lower) + len(upper) + i, j] = rho[absolute[i], j]


@helper
def adjoint_multipliers(index, rho, states, k, s):
    """As `multipliers`, each to the bound that the state names."""
    lower, upper, absolute = part(index, LOWER_AT), part(index, UPPER_AT), part(index, ABSOLUTE_AT)
    at = len(s) - len(absolute) - len(upper) - len(lower)
    s[at:] = 0.0
    for j in range(rho.shape[1]):
        for i in range(len(lower)):
            if states[k + j, lower[i]] == LOWER:
                s[at + i, j] = -rho[lower[i], j]
        for i in range(len(upper)):
            if states[k + j, upper[i]] == UPPER:
                s[at + len(lower) + i, j] = rho[upper[i], j]


@helper
def pin(index, v, states, k, pinned):
    """Right-hand sides of the pinned variables in the adjoint system, (size, samples)."""
    lower, upper, absolute = part(index, LOWER_AT), part(index, UPPER_AT), part(index, ABSOLUTE_AT)
    bounds, pairs = len(lower) + len(upper), len(absolute)
    at = len(v) - bounds - 3 * pairs
    for j in range(pinned.shape[1]):
        for i in range(len(lower)):
            if states[k + j, lower[i]] == LOWER:
                pinned[lower[i], j] = v[at + i, j]
        for i in range(len(upper)):
            if states[k + j, upper[i]] == UPPER:
                pinned[upper[i], j] = v[at + len(lower) + i, j]
        for i in range(pairs):
            pinned[absolute[i], j] = 0.5 * (v[at + bounds + pairs + i, j] - v[at + bounds + 2 * pairs + i, j])


@entry
def forward(
    plan, coef, index, dense, general, P, q, A, b, zero, lengths, begin, x, z, residual, states, steps, first, last
):
    """Solve samples first:last: x, z, residual on the original program, states and steps (-1: not settled).

    Returns the largest residual, infinite where a sample did not settle.

    lengths: rows of the packed vectors and of the packed solution. begin: (0 or B, size) starts. states: (B, size), or
    (B, inequalities) where these are general.
    """
    H, S, Kb, Ku, mixed, P_basic = matrices(index, dense)
    rows = None if general is None else general_rows(H, S, len(Kb), general)
    n, worst = len(H), 0.0
    no_sign = np.zeros((0, 0))
    k = first
    while k < last:
        width = block_width(last - k)
        bq, bb = np.empty((x.shape[1], width)), np.empty((z.shape[1], width))
        transpose_in(q, k, 1.0, bq)
        transpose_in(b, k, 1.0, bb)
        v, s = np.empty((lengths[0], width)), np.empty((lengths[1], width))
        restrict_block(plan, coef, P, A, k, bq.copy(), bb.copy(), v)
        g, u, rho = gradient(index, Ku, mixed, v), np.zeros((n, width)), np.zeros((n, width))
        prices = np.zeros((0 if general is None else len(rows.C), width))
        if general is not None:
            solve_rows(rows, g, right_sides(index, rows, v), begin, k, u, prices, states, steps)
        else:
            solve_sample(H, S, g, v, index, begin, k, u, rho, states, steps)
        recover(index, Kb, Ku, P_basic, rows, v, u, prices, s)
        if general is not None:
            s[len(s) - len(prices) :] = prices
        else:
            multipliers(index, rho, s)
        bx, bz = np.empty((x.shape[1], width)), np.empty((z.shape[1], width))
        lift_block(plan, coef, P, A, k, bq, bb, s, no_sign, False, bx, bz)
        a_rows, a_cols = part(plan, A_ROW), part(plan, A_COL)
        p_rows, p_cols = part(plan, P_ROW), part(plan, P_COL)
        residual_block(p_rows, p_cols, a_rows, a_cols, zero, P, A, k, bq, bb, bx, bz, residual)
        transpose_out(bx, x, k)
        transpose_out(bz, z, k)
        for j in range(width):
            if steps[k + j] < 0:
                residual[k + j] = np.inf
            worst = max(worst, residual[k + j])
        k += width
    return worst


@entry
def backward(
    plan, coef, index, dense, general, P, A, lengths, absolute, dx, dz, x, z, states, sign, vx, vz, gP, gA,
    residual, block_P, block_A, first, last,
):  # fmt: skip
    """The adjoint of samples first:last as (-vx, vz), its residuals, and the gradients of P and A (gradient_block).

    absolute: the reduced program's variables in 1-norms, sign (B, 1-norms) their signs.
    """
    H, S, Kb, Ku, mixed, P_basic = matrices(index, dense)
    rows = None if general is None else general_rows(H, S, len(Kb), general)
    n, pairs = len(H), len(absolute)
    k = first
    while k < last:
        width = block_width(last - k)
        bq, bb = np.empty((x.shape[1], width)), np.empty((z.shape[1], width))
        transpose_in(dx, k, -1.0, bq)
        transpose_in(dz, k, 1.0, bb)
        v, s = np.empty((lengths[0], width)), np.empty((lengths[1], width))
        restrict_block(plan, coef, P, A, k, bq.copy(), bb.copy(), v)
        for i in range(pairs):
            for j in range(width):
                v[absolute[i], j] += sign[k + j, i] * v[len(v) - 3 * pairs + i, j]
        g, u, rho = gradient(index, Ku, mixed, v), np.zeros((n, width)), np.zeros((n, width))
        prices = np.zeros((0 if general is None else len(rows.C), width))
        if general is not None:
            fixed_rows(rows, g, right_sides(index, rows, v), states, k, u, prices)
        else:
            pinned = np.zeros((n, width))
            pin(index, v, states, k, pinned)
            fixed_sample(H, S, g, pinned, states, k, u, rho)
        recover(index, Kb, Ku, P_basic, rows, v, u, prices, s)
        if general is not None:
            s[len(s) - len(prices) :] = prices
        else:
            adjoint_multipliers(index, rho, states, k, s)
        bvx, bvz = np.empty((x.shape[1], width)), np.empty((z.shape[1], width))
        lift_block(plan, coef, P, A, k, bq, bb, s, sign, False, bvx, bvz)
        transpose_out(bvz, vz, k)
        for j in range(width):
            for i in range(len(bvx)):
                vx[k + j, i] = -bvx[i, j]
        a_rows, a_cols = part(plan, A_ROW), part(plan, A_COL)
        p_rows, p_cols = part(plan, P_ROW), part(plan, P_COL)
        adjoint_residual_block(p_rows, p_cols, a_rows, a_cols, P, A, k, bq, bb, bvx, bvz, residual)
        transpose_in(x, k, 1.0, bq)
        transpose_in(z, k, 1.0, bb)
        gradient_block(p_rows, p_cols, a_rows, a_cols, k, bq, bb, bvx, bvz, gP, gA, block_P, block_A)
        k += width
