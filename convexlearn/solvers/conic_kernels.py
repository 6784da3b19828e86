"""Compiled loops of the conic solver, one sample after the other: products, sparse LDL' and refined solves.

Entries of symmetric matrices are stored once; `ei`, `ej` are their positions. The factor of the
permuted matrix has columns lp, li, and rows rp with the column rk and the place rx of each entry.
"""

import numpy as np

from convexlearn.program.compiled import entry, helper

SHIFT = 1e-7  # makes the equilibrated matrix quasi-definite; refinement undoes it
EQUILIBRATIONS = 5
REFINEMENTS = 20
ROUNDING = 2e-16
NO_WORSE = 1.0 + 1e-6  # what lies in the null space stays as it is, while the rest gets its solution
CONSISTENT = 1e-9  # relative residual above which a right-hand side has no solution
PROJECTIONS = 3


@entry
def products(P_row, P_col, A_row, A_col, P, A, x, z, Px, Az, Ax):
    """Px += P x, Az += A'z, Ax += A x for x (B, n), z (B, m); P holds the upper triangle."""
    for k in range(len(x)):
        p, a = P[k if len(P) > 1 else 0], A[k if len(A) > 1 else 0]
        for e in range(len(P_row)):
            i, j = P_row[e], P_col[e]
            Px[k, i] += p[e] * x[k, j]
            if i != j:
                Px[k, j] += p[e] * x[k, i]
        for e in range(len(A_row)):
            i, j = A_row[e], A_col[e]
            Ax[k, i] += a[e] * x[k, j]
            Az[k, j] += a[e] * z[k, i]


@helper
def equilibrate(ei, ej, value, diagonal, scale, largest):
    """Symmetric scaling that brings the largest entry of every row near 1 (Ruiz, 2001)."""
    scale[:] = 1.0
    for _ in range(EQUILIBRATIONS):
        for i in range(len(scale)):
            largest[i] = abs(diagonal[i]) * scale[i] * scale[i]
        for e in range(len(ei)):
            i, j = ei[e], ej[e]
            size = abs(value[e]) * scale[i] * scale[j]
            largest[i] = max(largest[i], size)
            largest[j] = max(largest[j], size)
        for i in range(len(scale)):
            if largest[i] > 1e-12:
                scale[i] /= np.sqrt(largest[i])
    for i in range(len(scale)):
        scale[i] = min(max(scale[i], 1e-8), 1e8)


@helper
def eliminate(j, lp, li, rp, rk, rx, L, pivot, t):
    """Subtract from the dense column t what the columns before j contribute."""
    for r in range(rp[j], rp[j + 1]):
        k, first = rk[r], rx[r]
        factor = L[first] * pivot[k]
        for p in range(first, lp[k + 1]):
            t[li[p]] -= factor * L[p]


@entry
def factor(n, ei, ej, perm, kp, ki, ks, lp, li, rp, rk, rx, values, diagonals, scales, factors, pivots):
    """LDL' of every equilibrated and shifted matrix: columns L D in `factors`, inverse pivots, scales."""
    N = len(perm)
    t, largest = np.zeros(N), np.empty(N)
    for k in range(len(values)):
        value, diagonal, scale = values[k], diagonals[k], scales[k]
        L, pivot = factors[k], pivots[k]
        equilibrate(ei, ej, value, diagonal, scale, largest)
        for j in range(N):
            unknown = perm[j]
            sign = 1.0 if unknown < n else -1.0
            for p in range(lp[j], lp[j + 1]):
                t[li[p]] = 0.0
            t[j] = diagonal[unknown] * scale[unknown] ** 2 + sign * SHIFT
            for q in range(kp[j], kp[j + 1]):
                e = ks[q]
                t[ki[q]] += value[e] * scale[ei[e]] * scale[ej[e]]
            eliminate(j, lp, li, rp, rk, rx, L, pivot, t)
            pivot[j] = sign / (sign * t[j] if sign * t[j] > 0.1 * SHIFT else SHIFT)
            for p in range(lp[j], lp[j + 1]):
                L[p] = t[li[p]]


@helper
def substitute(perm, lp, li, L, pivot, t, y):
    """Overwrite y by the solution of the factored system."""
    N = len(perm)
    for j in range(N):
        t[j] = y[perm[j]]
    for j in range(N):
        x = t[j] * pivot[j]
        for p in range(lp[j], lp[j + 1]):
            t[li[p]] -= L[p] * x
    for j in range(N - 1, -1, -1):
        x = t[j]
        for p in range(lp[j], lp[j + 1]):
            x -= L[p] * t[li[p]]
        t[j] = x * pivot[j]
        y[perm[j]] = t[j]


@helper
def remaining(ei, ej, value, diagonal, scale, right, y, out):
    """out = right - K y for the equilibrated matrix without shift; returns its largest entry."""
    for i in range(len(y)):
        out[i] = right[i] - diagonal[i] * scale[i] ** 2 * y[i]
    for e in range(len(ei)):
        i, j = ei[e], ej[e]
        a = value[e] * scale[i] * scale[j]
        out[i] -= a * y[j]
        if i != j:
            out[j] -= a * y[i]
    worst = 0.0
    for i in range(len(y)):
        worst = max(worst, abs(out[i]))
    return worst


@helper
def refine(ei, ej, value, diagonal, scale, perm, lp, li, L, pivot, right, y, rest, step, t):
    """Iterative refinement from y = 0; returns the largest entry of what remains of `right`."""
    best, goal = 0.0, 0.0
    for i in range(len(y)):
        y[i], rest[i] = 0.0, right[i]
        best = max(best, abs(right[i]))
    goal = ROUNDING * best
    for count in range(REFINEMENTS):
        step[:] = rest
        substitute(perm, lp, li, L, pivot, t, step)
        for i in range(len(y)):
            y[i] += step[i]
        error = remaining(ei, ej, value, diagonal, scale, right, y, rest)
        if not error <= NO_WORSE * best:
            for i in range(len(y)):
                y[i] -= step[i]
            return remaining(ei, ej, value, diagonal, scale, right, y, rest)
        stalled = count > 1 and error > 0.5 * best
        best = min(best, error)
        if best <= goal or stalled:
            break
    return best


@entry
def solve(ei, ej, perm, lp, li, values, diagonals, scales, factors, pivots, rights, out, residuals):
    """Solve every factored system for rights (B, N); relative residuals (B,) of the equilibrated system.

    Where a right-hand side has no solution, what refinement (a proximal point method) leaves of it lies in
    the null space: it is dropped, which gives the least-squares solution of least norm.
    """
    N = len(perm)
    right, y, rest, step, t = np.empty(N), np.empty(N), np.empty(N), np.empty(N), np.empty(N)
    for k in range(len(values)):
        value, diagonal, scale = values[k], diagonals[k], scales[k]
        L, pivot, size, dropped = factors[k], pivots[k], 0.0, 0.0
        for i in range(N):
            right[i] = scale[i] * rights[k, i]
            size = max(size, abs(right[i]))
        worst = refine(ei, ej, value, diagonal, scale, perm, lp, li, L, pivot, right, y, rest, step, t)
        for _ in range(PROJECTIONS):
            if not worst > CONSISTENT * size:
                break
            dropped = max(dropped, worst)
            for i in range(N):
                right[i] -= rest[i]
            worst = refine(ei, ej, value, diagonal, scale, perm, lp, li, L, pivot, right, y, rest, step, t)
        residuals[k] = max(worst, dropped) / size if size > 0 else 0.0
        for i in range(N):
            out[k, i] = scale[i] * y[i]
