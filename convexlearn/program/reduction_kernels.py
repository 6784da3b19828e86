"""Compiled loops of the reduction, up to `WIDTH` samples side by side: arrays (rows, samples).

Where samples share a matrix its entry is loaded once for all of them and the inner loop vectorizes.
`plan` holds index lists back to back; its first words say where each begins (`part`). Import this
module only when something is to be solved: it imports numba.
"""

import numpy as np

from convexlearn.program.compiled import entry, helper
from convexlearn.program.lane_kernels import LANES, add_eight, add_scaled, block_width, inlined

# numbers of the index lists in reduce.PARTS
(PIVOT_ROW, PIVOT_COL, PIVOT_ENTRY, POINTER, ENTRY, ENTRY_COL) = range(6)
(CHAIN_POINTER, CHAIN, CHAIN_COL, DEFINED_COLS, KEPT_ROWS) = range(6, 11)
(P_ROW, P_COL, A_ROW, A_COL, KEEP, EQUAL, INEQUAL) = range(11, 18)
(LOWER_ROW, LOWER_COL, UPPER_ROW, UPPER_COL, ABS_T, ABS_X, ABS_UP, ABS_DOWN) = range(18, 26)


@entry
def play(ops, scale, P, A, value, first):
    """Run a tape (see substitution.Tape) for samples first: into value (k, size)."""
    nP, nA = P.shape[1], A.shape[1]
    for k in range(len(value)):
        row = value[k]
        row[:nP] = P[first + k if P.shape[0] > 1 else 0]
        row[nP : nP + nA] = A[first + k if A.shape[0] > 1 else 0]
        row[nP + nA] = 1.0
        row[nP + nA + 1 :] = 0.0
        for i in range(len(scale)):
            row[ops[0, i]] += scale[i] * row[ops[1, i]] * row[ops[2, i]]


@entry
def add_gram(left, right, position, scale, value):
    """Add a substitution.Gram for every sample of value (k, size)."""
    rows, size = left.shape
    width, full = (size + LANES - 1) // LANES * LANES, (rows + 7) // 8 * 8
    D, E, G = np.zeros((size, full)), np.zeros((full, width)), np.empty(width)
    for k in range(len(value)):
        for p in range(rows):
            for i in range(size):
                D[i, p] = scale[p] * value[k, left[p, i]]
                E[p, i] = value[k, right[p, i]]
        e = 0
        for i in range(size):
            first = i // LANES * LANES
            G[first:] = 0.0
            for p in range(0, full, 8):
                scales = (
                    *(D[i, p], D[i, p + 1], D[i, p + 2], D[i, p + 3]),
                    *(D[i, p + 4], D[i, p + 5], D[i, p + 6], D[i, p + 7]),
                )
                for j in range(first, width, LANES):
                    add_eight(G, j, scales, E, p * width + j, width)
            for j in range(i, size):
                value[k, position[e]] += G[j]
                e += 1


@helper
def part(plan, which):
    """One index list."""
    return plan[plan[which] : plan[which + 1]]


@helper
def transpose_in(source, k, scale, out):
    """out (rows, samples) = scale * source[k:], where source is (1 or B, rows)."""
    for j in range(out.shape[1]):
        row = source[k + j if source.shape[0] > 1 else 0]
        for i in range(out.shape[0]):
            out[i, j] = scale * row[i]


@helper
def transpose_out(block, out, k):
    """out[k:] = block', where out is (B, rows)."""
    for j in range(block.shape[1]):
        row = out[k + j]
        for i in range(block.shape[0]):
            row[i] = block[i, j]


@inlined
def multiply_entry(values, k, e, i, c, factor, x, out):
    """out[i] += factor * (entry e of samples k:) * x[c]."""
    if values.shape[0] > 1:
        for j in range(out.shape[1]):
            out[i, j] += factor * values[k + j, e] * x[c, j]
    else:
        add_scaled(out, i, factor * values[0, e], x, c)


@helper
def multiply(values, k, rows, cols, factor, x, out):
    """`multiply_entry` at i = rows[e], c = cols[e] for all entries e."""
    for e in range(len(rows)):
        multiply_entry(values, k, e, rows[e], cols[e], factor, x, out)


@helper
def multiply_some(values, k, entries, rows, cols, factor, x, out):
    """`multiply` for some entries."""
    for e in entries:
        multiply_entry(values, k, e, rows[e], cols[e], factor, x, out)


@helper
def add_quadratic(rows, cols, P, k, x, g):
    """g += Px for upper triangles P."""
    for e in range(len(rows)):
        i, c = rows[e], cols[e]
        multiply_entry(P, k, e, i, c, 1.0, x, g)
        if i != c:
            multiply_entry(P, k, e, c, i, 1.0, x, g)


@helper
def define(plan, A, k, b, x, from_zero):
    """Fill in the eliminated variables of x from the others: x_v = (b_r - sum a_rj x_j) / a_rv.

    from_zero: the others are zero, so that only eliminated variables enter.
    """
    rows, cols, pivots = part(plan, PIVOT_ROW), part(plan, PIVOT_COL), part(plan, PIVOT_ENTRY)
    first = CHAIN_POINTER if from_zero else POINTER
    pointer, entries, others = part(plan, first), part(plan, first + 1), part(plan, first + 2)
    width = x.shape[1]
    for p in range(len(rows)):
        row, col, scale = rows[p], cols[p], 1.0 / A[0, pivots[p]]
        for j in range(width):
            x[col, j] = b[row, j]
        for f in range(pointer[p], pointer[p + 1]):
            e, c = entries[f], others[f]
            multiply_entry(A, k, e, col, c, -1.0, x, x)
        for j in range(width):
            x[col, j] *= scale


@helper
def price(plan, A, k, g, z):
    """Duals z_r = -g_v / a_rv of the eliminated rows; adds A'z to the gradient g, which vanishes at v."""
    rows, cols, pivots = part(plan, PIVOT_ROW), part(plan, PIVOT_COL), part(plan, PIVOT_ENTRY)
    pointer, entries, others = part(plan, POINTER), part(plan, ENTRY), part(plan, ENTRY_COL)
    width = g.shape[1]
    for p in range(len(rows) - 1, -1, -1):
        row, col, scale = rows[p], cols[p], -1.0 / A[0, pivots[p]]
        for j in range(width):
            z[row, j] = scale * g[col, j]
            g[col, j] = 0.0
        for f in range(pointer[p], pointer[p + 1]):
            e, c = entries[f], others[f]
            multiply_entry(A, k, e, c, row, 1.0, z, g)


@helper
def restrict_block(plan, coef, P, A, k, g, slack, out):
    """Rows [q, b, h, l, u, w, up, down] of out from g = q (n, samples) and slack = b (m, samples)."""
    pivots, keep = part(plan, PIVOT_COL), part(plan, KEEP)
    if len(pivots) > 0:
        c, z = np.zeros_like(g), np.empty_like(slack)
        define(plan, A, k, slack, c, True)
        add_quadratic(part(plan, P_ROW), part(plan, P_COL), P, k, c, g)
        price(plan, A, k, g, z)
        multiply_some(A, k, part(plan, DEFINED_COLS), part(plan, A_ROW), part(plan, A_COL), -1.0, c, slack)
    at = gather(keep, g, out, 0)
    at = gather(part(plan, EQUAL), slack, out, at)
    at = gather(part(plan, INEQUAL), slack, out, at)
    lower, upper = part(plan, LOWER_ROW), part(plan, UPPER_ROW)
    up, down, t = part(plan, ABS_UP), part(plan, ABS_DOWN), part(plan, ABS_T)
    bounds, pairs = len(lower) + len(upper), len(t)
    for j in range(out.shape[1]):
        for i in range(len(lower)):
            out[at + i, j] = slack[lower[i], j] / coef[i]
        for i in range(len(upper)):
            out[at + len(lower) + i, j] = slack[upper[i], j] / coef[len(lower) + i]
        for i in range(pairs):
            a, c_t = coef[bounds + i], coef[bounds + pairs + i]
            out[at + bounds + i, j] = g[t[i], j] * a / c_t
            out[at + bounds + pairs + i, j] = slack[up[i], j] / a
            out[at + bounds + 2 * pairs + i, j] = slack[down[i], j] / a


@helper
def gather(index, source, out, at):
    """out[at:] = source[index]; returns the next free row."""
    for i in range(len(index)):
        for j in range(out.shape[1]):
            out[at + i, j] = source[index[i], j]
    return at + len(index)


@helper
def scatter(index, source, at, out):
    """out[index] = source[at:]; returns the next row of the source."""
    for i in range(len(index)):
        for j in range(out.shape[1]):
            out[index[i], j] = source[at + i, j]
    return at + len(index)


@helper
def lift_block(plan, coef, P, A, k, q, b, s, sign, ray, x, z):
    """x (n, samples) and z (m, samples) from rows [x, y, z, lower, upper, v] of s, with q and b as data.

    Where sign (samples, 1-norms) is given, they solve the adjoint system with right-hand side
    (-q, b): v is then found from stationarity where sign = 0. Where ray, x is a direction and z a
    certificate: Px counts as zero, and q and b must be zero.
    """
    adjoint, absolute = sign.shape[0] > 0, part(plan, ABS_T)
    at = spread(plan, coef, s, x, z)
    if len(absolute) > 0:
        for j in range(x.shape[1]):
            if adjoint:
                adjoint_epigraphs(plan, coef, b, sign[k + j], x, j)
            else:
                epigraphs(plan, coef, q, s, at, x, z, j)
    define(plan, A, k, b, x, False)
    g = q.copy()
    if not ray:
        add_quadratic(part(plan, P_ROW), part(plan, P_COL), P, k, x, g)
    if adjoint and len(absolute) > 0:
        adjoint_multipliers(plan, coef, A, k, g, sign, z)
    finish(plan, A, k, g, z)


@helper
def finish(plan, A, k, g, z):
    """Duals of the eliminated rows, given those of all others; g enters as Px + q."""
    multiply_some(A, k, part(plan, KEPT_ROWS), part(plan, A_COL), part(plan, A_ROW), 1.0, z, g)
    price(plan, A, k, g, z)


@helper
def spread(plan, coef, s, x, z):
    """Put the kept variables and the duals of kept rows in place; returns where v begins in s."""
    keep, lower, upper = part(plan, KEEP), part(plan, LOWER_ROW), part(plan, UPPER_ROW)
    x[:] = 0.0
    z[:] = 0.0
    at = scatter(keep, s, 0, x)
    at = scatter(part(plan, EQUAL), s, at, z)
    at = scatter(part(plan, INEQUAL), s, at, z)
    for i in range(len(lower)):
        for j in range(x.shape[1]):
            z[lower[i], j] = -s[at + i, j] / coef[i]
    at += len(lower)
    for i in range(len(upper)):
        for j in range(x.shape[1]):
            z[upper[i], j] = s[at + i, j] / coef[len(lower) + i]
    return at + len(upper)


@helper
def epigraphs(plan, coef, q, s, at, x, z, j):
    """t = (a/c) |x| and its rows' duals (q_t/c +- v/a) / 2."""
    t, xs, up, down = part(plan, ABS_T), part(plan, ABS_X), part(plan, ABS_UP), part(plan, ABS_DOWN)
    first = len(part(plan, LOWER_ROW)) + len(part(plan, UPPER_ROW))
    for i in range(len(t)):
        a, c, v = coef[first + i], coef[first + len(t) + i], s[at + i, j]
        x[t[i], j] = a / c * abs(x[xs[i], j])
        z[up[i], j] = max(0.5 * (q[t[i], j] / c + v / a), 0.0)
        z[down[i], j] = max(0.5 * (q[t[i], j] / c - v / a), 0.0)


@helper
def adjoint_epigraphs(plan, coef, b, sign, x, j):
    """The adjoint's t; b is the upstream gradient of z, `sign` (1-norms,) that of the solution."""
    t, xs, up, down = part(plan, ABS_T), part(plan, ABS_X), part(plan, ABS_UP), part(plan, ABS_DOWN)
    first = len(part(plan, LOWER_ROW)) + len(part(plan, UPPER_ROW))
    for i in range(len(t)):
        a, c = coef[first + i], coef[first + len(t) + i]
        if sign[i] > 0:
            x[t[i], j] = (a * x[xs[i], j] - b[up[i], j]) / c
        elif sign[i] < 0:
            x[t[i], j] = (-a * x[xs[i], j] - b[down[i], j]) / c
        else:
            x[t[i], j] = -0.5 * (b[up[i], j] + b[down[i], j]) / c


@helper
def adjoint_multipliers(plan, coef, A, k, g, sign, z):
    """The adjoint's multipliers of 1-norm rows: from t where x != 0, else from the residual at x."""
    t, xs, up, down = part(plan, ABS_T), part(plan, ABS_X), part(plan, ABS_UP), part(plan, ABS_DOWN)
    first = len(part(plan, LOWER_ROW)) + len(part(plan, UPPER_ROW))
    for i in range(len(t)):
        c = coef[first + len(t) + i]
        for j in range(g.shape[1]):
            z[up[i], j] = g[t[i], j] / c if sign[k + j, i] > 0 else 0.0
            z[down[i], j] = g[t[i], j] / c if sign[k + j, i] < 0 else 0.0
    residual = g.copy()
    finish(plan, A, k, residual, z)
    for i in range(len(t)):
        a, c = coef[first + i], coef[first + len(t) + i]
        for j in range(g.shape[1]):
            if sign[k + j, i] == 0:
                z[up[i], j] = 0.5 * (g[t[i], j] / c - residual[xs[i], j] / a)
                z[down[i], j] = 0.5 * (g[t[i], j] / c + residual[xs[i], j] / a)


@entry
def restrict(plan, coef, P, q, A, b, sense, out, start, stop):
    """Packed rows out (B, .) of samples start:stop from (sense * q, b)."""
    k = start
    while k < stop:
        width = block_width(stop - k)
        g, slack = np.empty((q.shape[1], width)), np.empty((b.shape[1], width))
        block = np.empty((out.shape[1], width))
        transpose_in(q, k, sense, g)
        transpose_in(b, k, 1.0, slack)
        restrict_block(plan, coef, P, A, k, g, slack, block)
        transpose_out(block, out, k)
        k += width


@entry
def lift(plan, coef, P, q, A, b, sense, packed, sign, ray, x, z, start, stop):
    """x (B, n) and z (B, m) of samples start:stop from packed rows, see `lift_block`; all or none are rays."""
    n, m = x.shape[1], z.shape[1]
    k = start
    while k < stop:
        width = block_width(stop - k)
        g, offset, s = np.zeros((n, width)), np.zeros((m, width)), np.empty((packed.shape[1], width))
        if not ray:
            transpose_in(q, k, sense, g)
            transpose_in(b, k, 1.0, offset)
        transpose_in(packed, k, 1.0, s)
        block_x, block_z = np.empty((n, width)), np.empty((m, width))
        lift_block(plan, coef, P, A, k, g, offset, s, sign, ray, block_x, block_z)
        transpose_out(block_x, x, k)
        transpose_out(block_z, z, k)
        k += width
