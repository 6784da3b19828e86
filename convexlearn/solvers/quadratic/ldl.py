"""Sparse LDL' of the regularized KKT matrix: numeric factor, solve and product in lanes.

K = [[P + diag, A', G'], [A, -diag, 0], [G, 0, -diag]] is quasi-definite, so every symmetric ordering
has a factorization with D of known signs (Vanderbei 1995). Stored is X = L D, with the inverse pivots.
"""

from convexlearn.solvers.quadratic.layout import (
    DATA,
    I_CI,
    I_CP,
    I_CS,
    I_EI,
    I_EJ,
    I_KI,
    I_KP,
    I_KS,
    I_LI,
    I_LP,
    I_PANEL,
    I_PERM,
    I_RC,
    I_RD,
    I_RK,
    I_RP,
    LX,
    N_BORDER,
    N_ENTRY,
    N_K,
    N_PLUS,
    N_X,
    PINNED,
    PIVOT,
    WD,
    T,
)
from convexlearn.solvers.quadratic.simd import full, helper, index, load, store, vabs, where_gt

SMALLEST_PIVOT = 1e-13  # below it the pivot's sign is rounding error
REPLACED_PIVOT = 1e-7
BOTH = 8  # added to the count of a group of columns that updates both columns of a pair


@helper
def subtract(w, I, F, lp, li, lx, pivot, t, k, distance, count):
    """Subtract from the dense column t what `count` columns from k contribute; t is indexed by row."""
    a = index(I, lp + k + 1) - distance
    i0 = li + a
    a += lx
    x0 = load(w, F, a) * load(w, F, pivot + k)
    if count == 1:
        for p in range(distance):
            i = t + index(I, i0 + p)
            store(F, i, load(w, F, i) - x0 * load(w, F, a + p))
        return
    b = lx + index(I, lp + k + 2) - distance
    x1 = load(w, F, b) * load(w, F, pivot + k + 1)
    if count == 2:
        for p in range(distance):
            i = t + index(I, i0 + p)
            store(F, i, load(w, F, i) - (x0 * load(w, F, a + p) + x1 * load(w, F, b + p)))
        return
    c = lx + index(I, lp + k + 3) - distance
    d = lx + index(I, lp + k + 4) - distance
    x2 = load(w, F, c) * load(w, F, pivot + k + 2)
    x3 = load(w, F, d) * load(w, F, pivot + k + 3)
    for p in range(distance):
        i = t + index(I, i0 + p)
        # sums that don't wait for the load of slot i, which was stored a few instructions ago
        first = x0 * load(w, F, a + p) + x1 * load(w, F, b + p)
        second = x2 * load(w, F, c + p) + x3 * load(w, F, d + p)
        store(F, i, load(w, F, i) - (first + second))


@helper
def subtract_both(w, I, F, lp, li, lx, pivot, t, u, k, distance, count):
    """`subtract` for two columns t, u at once: the entries of the columns from k are read once for both."""
    a = index(I, lp + k + 1) - distance
    i0 = li + a
    a += lx
    x0, y0 = load(w, F, a) * load(w, F, pivot + k), load(w, F, a + 1) * load(w, F, pivot + k)
    i = t + index(I, i0)
    if count == 1:
        store(F, i, load(w, F, i) - x0 * load(w, F, a))
        for p in range(1, distance):
            i, first = index(I, i0 + p), load(w, F, a + p)
            store(F, t + i, load(w, F, t + i) - x0 * first)
            store(F, u + i, load(w, F, u + i) - y0 * first)
        return
    b = lx + index(I, lp + k + 2) - distance
    x1, y1 = load(w, F, b) * load(w, F, pivot + k + 1), load(w, F, b + 1) * load(w, F, pivot + k + 1)
    if count == 2:
        store(F, i, load(w, F, i) - (x0 * load(w, F, a) + x1 * load(w, F, b)))
        for p in range(1, distance):
            i, first, second = index(I, i0 + p), load(w, F, a + p), load(w, F, b + p)
            store(F, t + i, load(w, F, t + i) - (x0 * first + x1 * second))
            store(F, u + i, load(w, F, u + i) - (y0 * first + y1 * second))
        return
    c = lx + index(I, lp + k + 3) - distance
    d = lx + index(I, lp + k + 4) - distance
    x2, y2 = load(w, F, c) * load(w, F, pivot + k + 2), load(w, F, c + 1) * load(w, F, pivot + k + 2)
    x3, y3 = load(w, F, d) * load(w, F, pivot + k + 3), load(w, F, d + 1) * load(w, F, pivot + k + 3)
    sums = (x0 * load(w, F, a) + x1 * load(w, F, b)) + (x2 * load(w, F, c) + x3 * load(w, F, d))
    store(F, i, load(w, F, i) - sums)
    for p in range(1, distance):
        i, first, second = index(I, i0 + p), load(w, F, a + p), load(w, F, b + p)
        third, fourth = load(w, F, c + p), load(w, F, d + p)
        store(F, t + i, load(w, F, t + i) - ((x0 * first + x1 * second) + (x2 * third + x3 * fourth)))
        store(F, u + i, load(w, F, u + i) - ((y0 * first + y1 * second) + (y2 * third + y3 * fourth)))


@helper
def inverse_pivot(w, F, d, weight, sign):
    """1/d, with a replacement where the known sign is lost, and 0 where the weight pins the unknown."""
    size = sign * d
    size = where_gt(size, SMALLEST_PIVOT, size, REPLACED_PIVOT)
    return where_gt(vabs(weight), PINNED, 0.0, sign / size)


@helper
def assemble(w, I, F, j, t):
    """The dense column t, indexed by row, becomes column j of K with its diagonal."""
    data, wd, lp, li = index(I, DATA), index(I, WD), index(I, I_LP), index(I, I_LI)
    kp, ki, ks, perm = index(I, I_KP), index(I, I_KI), index(I, I_KS), index(I, I_PERM)
    zero = full(w, 0.0)
    for p in range(index(I, lp + j), index(I, lp + j + 1)):
        store(F, t + index(I, li + p), zero)
    store(F, t + j, load(w, F, wd + index(I, perm + j)))
    for e in range(index(I, kp + j), index(I, kp + j + 1)):
        i = t + index(I, ki + e)
        store(F, i, load(w, F, i) + load(w, F, data + index(I, ks + e)))


@helper
def factor(w, I, F):
    """Left-looking LDL' of K with diagonal WD (N slots, original order) into LX and PIVOT, two columns at a time."""
    plus, N, wd, own = index(I, N_PLUS), index(I, N_K), index(I, WD), index(I, T)
    lp, li, lx, pivot = index(I, I_LP), index(I, I_LI), index(I, LX), index(I, PIVOT)
    rp, rk, rd, rc = index(I, I_RP), index(I, I_RK), index(I, I_RD), index(I, I_RC)
    perm, panel, other = index(I, I_PERM), index(I, I_PANEL), own + N
    for j in range(N):
        width = index(I, panel + j)
        t = own if width > 0 else other
        if width > 0:
            assemble(w, I, F, j, t)
        if width == 2:
            assemble(w, I, F, j + 1, other)
        for r in range(index(I, rp + j), index(I, rp + j + 1)):
            k, distance, count = index(I, rk + r), index(I, rd + r), index(I, rc + r)
            if count > BOTH:
                subtract_both(w, I, F, lp, li, lx, pivot, t, other, k, distance, count - BOTH)
            else:
                subtract(w, I, F, lp, li, lx, pivot, t, k, distance, count)
        unknown = index(I, perm + j)
        weight = load(w, F, wd + unknown)
        sign = 1.0 if unknown < plus else -1.0
        store(F, pivot + j, inverse_pivot(w, F, load(w, F, t + j), weight, sign))
        for p in range(index(I, lp + j), index(I, lp + j + 1)):
            store(F, lx + p, load(w, F, t + index(I, li + p)))


@helper
def solve_factored(w, I, F, b):
    """Overwrite the slots b (N, original order) by the solution; pinned unknowns become 0."""
    N, lp, li, lx = index(I, N_K), index(I, I_LP), index(I, I_LI), index(I, LX)
    pivot, perm, t = index(I, PIVOT), index(I, I_PERM), index(I, T)
    for j in range(N):
        store(F, t + j, load(w, F, b + index(I, perm + j)))
    for j in range(N):
        x = load(w, F, t + j) * load(w, F, pivot + j)
        for p in range(index(I, lp + j), index(I, lp + j + 1)):
            i = t + index(I, li + p)
            store(F, i, load(w, F, i) - load(w, F, lx + p) * x)
    for j in range(N - 1, -1, -1):
        x = load(w, F, t + j)
        for p in range(index(I, lp + j), index(I, lp + j + 1)):
            x = x - load(w, F, lx + p) * load(w, F, t + index(I, li + p))
        x = x * load(w, F, pivot + j)
        store(F, t + j, x)
        store(F, b + index(I, perm + j), x)


@helper
def multiply(w, I, F, v, r):
    """Add K v without the diagonal WD to the slots r (both N slots, original order)."""
    n, cp, ci, cs, data = index(I, N_X), index(I, I_CP), index(I, I_CI), index(I, I_CS), index(I, DATA)
    for j in range(n):
        x = load(w, F, v + j)
        total = full(w, 0.0)
        for e in range(index(I, cp + j), index(I, cp + j + 1)):
            i = index(I, ci + e)
            a = load(w, F, data + index(I, cs + e))
            total = total + a * load(w, F, v + i)
            if i != j:
                store(F, r + i, load(w, F, r + i) + a * x)
        store(F, r + j, load(w, F, r + j) + total)
    first = index(I, N_ENTRY)
    for e in range(first, first + index(I, N_BORDER)):
        i, j, a = index(I, index(I, I_EI) + e), index(I, index(I, I_EJ) + e), load(w, F, data + e)
        store(F, r + i, load(w, F, r + i) + a * load(w, F, v + j))
        store(F, r + j, load(w, F, r + j) + a * load(w, F, v + i))
