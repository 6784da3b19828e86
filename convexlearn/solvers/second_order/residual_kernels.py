"""Compiled optimality residuals on the original program, some samples side by side."""

import numpy as np

from convexlearn.program.compiled import entry, helper
from convexlearn.program.lane_kernels import block_width
from convexlearn.program.reduction_kernels import add_quadratic, multiply, transpose_in


@helper
def cone_block(first, d, s, z, violation, sign, gap):
    """Update the largest violations of a second-order cone by s and z, and of s o z = 0, all (rows, samples)."""
    for j in range(s.shape[1]):
        norm_s, norm_z, dot = 0.0, 0.0, s[first, j] * z[first, j]
        for i in range(first + 1, first + d):
            norm_s += s[i, j] * s[i, j]
            norm_z += z[i, j] * z[i, j]
            dot += s[i, j] * z[i, j]
            gap[j] = max(gap[j], abs(s[first, j] * z[i, j] + z[first, j] * s[i, j]))
        gap[j] = max(gap[j], abs(dot))
        violation[j] = max(violation[j], np.sqrt(norm_s) - s[first, j])
        sign[j] = max(sign[j], np.sqrt(norm_z) - z[first, j])


@helper
def residual_block(pattern, sizes, cones, P, A, k, q, b, x, z, out):
    """Relative KKT residuals out[k:]: see `residuals`; q, b, x, z are (rows, samples)."""
    P_row, P_col, A_row, A_col = pattern
    zero, nonneg = sizes
    n, m, width = x.shape[0], z.shape[0], x.shape[1]
    Px, Az, Ax, s = np.zeros((n, width)), np.zeros((n, width)), np.zeros((m, width)), np.empty((m, width))
    add_quadratic(P_row, P_col, P, k, x, Px)
    multiply(A, k, A_row, A_col, 1.0, x, Ax)
    multiply(A, k, A_col, A_row, 1.0, z, Az)
    worst = np.zeros((6, width))
    primal, dual, sign, gap, size_p, size_d = worst[0], worst[1], worst[2], worst[3], worst[4], worst[5]
    total = np.zeros(width)
    for i in range(m):
        for j in range(width):
            slack = b[i, j] - Ax[i, j]
            s[i, j] = slack
            total[j] += (0.0 if slack == np.inf else slack) + z[i, j]
            size_p[j] = max(size_p[j], abs(Ax[i, j]), 0.0 if slack == np.inf else abs(b[i, j]))
            if i < zero:
                primal[j] = max(primal[j], abs(slack))
            elif i < zero + nonneg:
                primal[j] = max(primal[j], -slack)
                sign[j] = max(sign[j], -z[i, j])
                gap[j] = max(gap[j], 0.0 if z[i, j] == 0.0 else abs(slack * z[i, j]))
    first = zero + nonneg
    for d in cones:
        cone_block(first, d, s, z, primal, sign, gap)
        first += d
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


@entry
def residuals(pattern, sizes, cones, P, q, A, b, x, z, out, start, stop):
    """Relative KKT residuals out (B,) of samples start:stop.

    The largest of stationarity, and the violation of s = b - Ax in K, z in K* and s o z = 0 (Jordan
    product); each over 1 plus the largest term that it is a difference of.
    """
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
        residual_block(pattern, sizes, cones, P, A, k, bq, bb, bx, bz, out)
        k += width
