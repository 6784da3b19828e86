"""Compiled linear algebra for one small dense symmetric matrix: factor, solve, multiply."""

from convexlearn.program.compiled import helper, summing
from convexlearn.program.lane_kernels import axpy

SINGULAR = 1e-13


@helper
def factor(M, k):
    """LDL' of the upper triangle of M[:k, :k] in place, row by row; returns how many pivots in turn are positive."""
    largest = 0.0
    for j in range(k):
        largest = max(largest, M[j, j])
    for j in range(k):
        pivot = M[j, j]
        if not pivot > SINGULAR * largest:
            return j
        for i in range(j + 1, k):
            ratio = M[j, i] / pivot
            if ratio != 0.0:
                axpy(M, i * M.shape[1] + i, -ratio, M, j * M.shape[1] + i, k - i)
    return k


@summing
def substitute(M, k, v):
    """v = (LDL')^-1 v."""
    for j in range(k):
        axpy(v, j + 1, -v[j] / M[j, j], M, j * M.shape[1] + j + 1, k - j - 1)
    for j in range(k - 1, -1, -1):
        total = 0.0
        for i in range(j + 1, k):
            total += M[j, i] * v[i]
        v[j] = (v[j] - total) / M[j, j]


@helper
def null_vector(M, p, d):
    """d[: p + 1] with M d = 0 for the leading block of a matrix whose factorization stopped at pivot p; d[p] = 1."""
    d[p] = 1.0
    for j in range(p - 1, -1, -1):
        total = M[j, p]
        for i in range(j + 1, p):
            total += M[j, i] * d[i]
        d[j] = -total / M[j, j]


@helper
def add_product(H, x, out):
    """out += H x for a symmetric H, by rows."""
    for i in range(len(x)):
        if x[i] != 0.0:
            axpy(out, 0, x[i], H, i * H.shape[1], len(x))
