"""Compiled checks and gradients on the original program, up to WIDTH samples side by side.

They use the program's own patterns and nothing of the reduction, so that a wrong reduction cannot
certify itself.
"""

import numpy as np

from convexlearn.program.compiled import entry, helper, summing
from convexlearn.program.lane_kernels import block_width
from convexlearn.program.reduction_kernels import add_quadratic, multiply, transpose_in


@helper
def residual_block(P_row, P_col, A_row, A_col, zero, P, A, k, q, b, x, z, out):
    """Relative KKT residuals out[k:] as solvers.base.polyhedral_residual defines them; all (rows, samples)."""
    n, m, width = x.shape[0], z.shape[0], x.shape[1]
    Px, Az, Ax = np.zeros((n, width)), np.zeros((n, width)), np.zeros((m, width))
    add_quadratic(P_row, P_col, P, k, x, Px)
    multiply(A, k, A_row, A_col, 1.0, x, Ax)
    multiply(A, k, A_col, A_row, 1.0, z, Az)
    worst = np.zeros((6, width))
    primal, dual, sign, gap, size_p, size_d = worst[0], worst[1], worst[2], worst[3], worst[4], worst[5]
    total = np.zeros(width)
    for i in range(m):
        for j in range(width):
            slack = b[i, j] - Ax[i, j]
            total[j] += slack + z[i, j]
            size_p[j] = max(size_p[j], abs(Ax[i, j]), abs(b[i, j]))
            if i < zero:
                primal[j] = max(primal[j], abs(slack))
            else:
                primal[j] = max(primal[j], -slack)
                sign[j] = max(sign[j], -z[i, j])
                gap[j] = max(gap[j], abs(slack * z[i, j]))
    for i in range(n):
        for j in range(width):
            value = Px[i, j] + q[i, j] + Az[i, j]
            total[j] += value + x[i, j]
            dual[j] = max(dual[j], abs(value))
            size_d[j] = max(size_d[j], abs(Px[i, j]), abs(q[i, j]), abs(Az[i, j]))
    for j in range(width):
        p, d = 1.0 + size_p[j], 1.0 + size_d[j]
        value = max(primal[j] / p, dual[j] / d, sign[j] / d, gap[j] / (p * d))
        out[k + j] = value if np.isfinite(total[j]) else np.inf


@summing
def summed_products(rows, cols, a, b, c, d, halved, out):
    """out[e] -= a_i'b_j + c_i'd_j with i, j = rows[e], cols[e], over the samples; halved: half of it where i = j."""
    for e in range(len(rows)):
        i, j = rows[e], cols[e]
        total = 0.0
        for k in range(a.shape[1]):
            total += a[i, k] * b[j, k] + c[i, k] * d[j, k]
        out[e] -= 0.5 * total if halved and i == j else total


@helper
def products(rows, cols, a, b, c, d, halved, out, first):
    """As `summed_products` per sample k, into out[first + k, e]."""
    for e in range(len(rows)):
        i, j = rows[e], cols[e]
        scale = -0.5 if halved and i == j else -1.0
        for k in range(a.shape[1]):
            out[first + k, e] = scale * (a[i, k] * b[j, k] + c[i, k] * d[j, k])


@helper
def gradient_block(P_row, P_col, A_row, A_col, k, x, z, vx, vz, gP, gA, block_P, block_A):
    """Gradients of the entries of P and A from solution (x, z) and adjoint (vx, vz), all (rows, samples).

    Into rows k: of gP and gA (B, .), or added to row block_P or block_A where that is >= 0.
    """
    if block_P >= 0:
        summed_products(P_row, P_col, vx, x, x, vx, True, gP[block_P])
    else:
        products(P_row, P_col, vx, x, x, vx, True, gP, k)
    if block_A >= 0:
        summed_products(A_row, A_col, z, vx, vz, x, False, gA[block_A])
    else:
        products(A_row, A_col, z, vx, vz, x, False, gA, k)


@helper
def adjoint_residual_block(P_row, P_col, A_row, A_col, P, A, k, minus_dx, dz, vx, vz, out):
    """out[k:] = |P vx + A'vz - dx| over the largest of the three terms and dz; all (rows, samples)."""
    n, m, width = vx.shape[0], vz.shape[0], vx.shape[1]
    Px, Az = np.zeros((n, width)), np.zeros((n, width))
    add_quadratic(P_row, P_col, P, k, vx, Px)
    multiply(A, k, A_col, A_row, 1.0, vz, Az)
    error, size = np.zeros(width), np.full(width, 1e-300)
    for i in range(n):
        for j in range(width):
            value = abs(Px[i, j] + Az[i, j] + minus_dx[i, j])
            error[j] = value if not value <= error[j] else error[j]  # a NaN stays
            size[j] = max(size[j], abs(Px[i, j]), abs(Az[i, j]), abs(minus_dx[i, j]))
    for i in range(m):
        for j in range(width):
            size[j] = max(size[j], abs(dz[i, j]))
    for j in range(width):
        out[k + j] = error[j] / size[j]


@entry
def residuals(P_row, P_col, A_row, A_col, zero, P, q, A, b, x, z, out, start, stop):
    """Relative KKT residuals out (B,) of samples start:stop."""
    n, m = x.shape[1], z.shape[1]
    k = start
    while k < stop:
        width = block_width(stop - k)
        bq, bx = np.empty((n, width)), np.empty((n, width))
        bb, bz = np.empty((m, width)), np.empty((m, width))
        transpose_in(q, k, 1.0, bq)
        transpose_in(b, k, 1.0, bb)
        transpose_in(x, k, 1.0, bx)
        transpose_in(z, k, 1.0, bz)
        residual_block(P_row, P_col, A_row, A_col, zero, P, A, k, bq, bb, bx, bz, out)
        k += width


@entry
def gradients(
    P_row, P_col, A_row, A_col, P, A, dx, dz, x, z, vx, vz, gP, gA, residual, block_P, block_A, start, stop
):  # fmt: skip
    """`gradient_block` and `adjoint_residual_block` of samples start:stop."""
    n, m = x.shape[1], z.shape[1]
    k = start
    while k < stop:
        width = block_width(stop - k)
        bx, bvx = np.empty((n, width)), np.empty((n, width))
        bz, bvz = np.empty((m, width)), np.empty((m, width))
        transpose_in(vx, k, 1.0, bvx)
        transpose_in(vz, k, 1.0, bvz)
        transpose_in(dx, k, -1.0, bx)
        transpose_in(dz, k, 1.0, bz)
        adjoint_residual_block(P_row, P_col, A_row, A_col, P, A, k, bx, bz, bvx, bvz, residual)
        transpose_in(x, k, 1.0, bx)
        transpose_in(z, k, 1.0, bz)
        gradient_block(P_row, P_col, A_row, A_col, k, bx, bz, bvx, bvz, gP, gA, block_P, block_A)
        k += width
