"""Compiled condensation: eliminate basic variables from small dense matrices.

Plain loops instead of LAPACK: for these sizes they are as fast, and a threaded BLAS on a busy machine
can take a hundred times as long.
"""

import numpy as np

from convexlearn.program.compiled import entry, helper
from convexlearn.solvers.quadratic.small_dense_kernels import factor, substitute


@helper
def largest_row(M):
    """The largest sum of magnitudes of a row."""
    largest = 0.0
    for i in range(M.shape[0]):
        total = 0.0
        for j in range(M.shape[1]):
            total += abs(M[i, j])
        largest = max(largest, total)
    return largest


@helper
def add_matrix_product(scale, A, B, out):
    """out += scale A B."""
    for i in range(A.shape[0]):
        for k in range(A.shape[1]):
            a = scale * A[i, k]
            if a != 0.0:
                for j in range(B.shape[1]):
                    out[i, j] += a * B[k, j]


@helper
def swap_rows(M, i, k):
    """Exchange two rows."""
    for j in range(M.shape[1]):
        M[i, j], M[k, j] = M[k, j], M[i, j]


@helper
def invert(M, out, limit):
    """out = M^-1 by Gauss-Jordan with partial pivoting, M is overwritten; False where its condition exceeds limit."""
    n, size = len(M), largest_row(M)
    out[:] = 0.0
    for i in range(n):
        out[i, i] = 1.0
    for c in range(n):
        pivot = c
        for i in range(c + 1, n):
            if abs(M[i, c]) > abs(M[pivot, c]):
                pivot = i
        if not abs(M[pivot, c]) > 0.0:
            return False
        if pivot != c:
            swap_rows(M, c, pivot)
            swap_rows(out, c, pivot)
        scale = 1.0 / M[c, c]
        for j in range(n):
            M[c, j] *= scale
            out[c, j] *= scale
        for i in range(n):
            ratio = M[i, c]
            if i != c and ratio != 0.0:
                for j in range(n):
                    M[i, j] -= ratio * M[c, j]
                    out[i, j] -= ratio * out[c, j]
    return size * largest_row(out) < limit


@helper
def invert_positive(H, out, limit):
    """out = H^-1 of a symmetric H; False where it is not positive definite or its condition exceeds limit."""
    n, M, column = len(H), H.copy(), np.empty(len(H))
    if factor(M, n) < n:
        return False
    for c in range(n):
        column[:] = 0.0
        column[c] = 1.0
        substitute(M, n, column)
        for i in range(n):
            out[c, i] = column[i]
    for i in range(n):
        for j in range(i):
            out[i, j] = out[j, i] = 0.5 * (out[i, j] + out[j, i])
    return largest_row(H) * largest_row(out) < limit


@entry
def condense(P_row, P_col, P, A_row, A_col, A, sizes, limit, dense):
    """Fill `dense` (see shared_kernels) from the entries of P and A, numbered inner variables first.

    sizes: inner and basic variables, and 1 where the inverse of H is wanted. Returns 0 where the
    basic variables are a bad choice, 1 without the inverse, 2 with it.
    """
    n, rows = sizes[0], sizes[1]
    Q, equality = np.zeros((n + rows, n + rows)), np.zeros((rows, n + rows))
    for e in range(len(P_row)):
        Q[P_row[e], P_col[e]] = P[e]
        Q[P_col[e], P_row[e]] = P[e]
    H = dense[: n * n].reshape(n, n)
    H[:] = Q[:n, :n]
    at = n * n
    if rows > 0:
        for e in range(len(A_row)):
            equality[A_row[e], A_col[e]] = A[e]
        Kb = dense[at : at + rows * rows].reshape(rows, rows)
        at += rows * rows
        if not invert(equality[:, n:].copy(), Kb, limit):
            return 0
        Ku, mixed = dense[at : at + rows * n].reshape(rows, n), dense[at + rows * n : at + 2 * rows * n]
        Ku[:] = 0.0
        add_matrix_product(-1.0, Kb, equality[:, :n], Ku)
        to_inner = Q[n:, :n].copy()  # P_BN + P_BB Ku
        add_matrix_product(1.0, Q[n:, n:], Ku, to_inner)
        add_matrix_product(1.0, Q[:n, n:], Ku, H)
        add_matrix_product(1.0, Ku.T, to_inner, H)
        for i in range(n):
            for j in range(i):
                H[i, j] = H[j, i] = 0.5 * (H[i, j] + H[j, i])
        at += 2 * rows * n
        mixed[:] = 0.0
        add_matrix_product(1.0, Kb.T, to_inner, mixed.reshape(rows, n))
        dense[at : at + rows * (n + rows)].reshape(rows, n + rows)[:] = Q[n:]
        at += rows * (n + rows)
    if sizes[2] == 0:
        return 1
    return 2 if invert_positive(H, dense[at : at + n * n].reshape(n, n), limit) else 1


@entry
def condense_rows(E, equality, Kb, Ku, S, out):
    """Fill `out`, as shared_kernels reads it, from the inequalities E [u; x_B] <= e and the equalities, row by row."""
    (m, n), equal = (len(E), len(S)), len(Kb)
    out[:] = 0.0
    C, across = out[: m * n].reshape(m, n), out[m * n : 2 * m * n].reshape(n, m)
    T, rest = out[2 * m * n : 3 * m * n].reshape(m, n), out[3 * m * n :]
    offset, basic = rest[: m * equal].reshape(m, equal), rest[m * equal : 2 * m * equal].reshape(m, equal)
    norm, rest = rest[2 * m * equal : 2 * m * equal + m], rest[2 * m * equal + m :]
    rest.reshape(equal, n + equal)[:] = equality
    C[:], basic[:] = E[:, :n], E[:, n:]
    add_matrix_product(1.0, basic, Ku, C)
    add_matrix_product(1.0, basic, Kb, offset)
    across[:] = C.T
    add_matrix_product(1.0, C, S, T)
    for i in range(m):
        for j in range(n):
            norm[i] += abs(C[i, j])
