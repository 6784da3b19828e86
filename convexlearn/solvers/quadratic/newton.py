"""The Newton system of the interior point: residuals, KKT diagonal, right-hand side, elimination of pairs.

Every inequality is a pair (s, z): a_j x + s_j = h_j, s_j, z_j >= 0. Order of the pairs: rows of G, lower
bounds (a = -e_i, h = -l_i), upper bounds, and for the 1-norm s+ = t - x and s- = t + x with
z+ + z- = w, the epigraph variable t eliminated. Only rows of G are rows of the KKT system; the others
are diagonal terms of the x block.
"""

from convexlearn.solvers.quadratic.layout import (
    BASE,
    DS,
    I_ABS,
    I_LO,
    I_UP,
    N_ABS,
    N_IN,
    N_K,
    N_LO,
    N_UP,
    N_X,
    ON,
    PENALTY_X,
    PENALTY_Y,
    PINNED,
    REG,
    REG_Y,
    SOL,
    WD,
    C,
    D,
    R,
    S,
)
from convexlearn.solvers.quadratic.ldl import multiply
from convexlearn.solvers.quadratic.simd import full, helper, index, load, store, vmin, where_gt

LARGEST_WEIGHT = 1e18


@helper
def affine_residual(w, I, F, v, r):
    """r = K v + (q, -b, -h) (N slots), K without its diagonal; plus quadratic penalties on x and -(y, z)."""
    n, N, c, reg = index(I, N_X), index(I, N_K), index(I, C), index(I, REG)
    penalty_x, penalty_y = load(w, F, reg + PENALTY_X), load(w, F, reg + PENALTY_Y)
    for i in range(n):
        store(F, r + i, load(w, F, c + i) + penalty_x * load(w, F, v + i))
    for i in range(n, N):
        store(F, r + i, 0.0 - load(w, F, c + i) - penalty_y * load(w, F, v + i))
    multiply(w, I, F, v, r)


@helper
def residuals(w, I, F):
    """R (n + rows + pairs): stationarity, equality rows and a x + s - h at the iterate."""
    n, N, sol, s, r, c, on = (
        index(I, N_X),
        index(I, N_K),
        index(I, SOL),
        index(I, S),
        index(I, R),
        index(I, C),
        index(I, ON),
    )
    inequalities, lower, upper, absolute = index(I, N_IN), index(I, N_LO), index(I, N_UP), index(I, N_ABS)
    o = N - inequalities
    z, rows = sol + o, r + o
    affine_residual(w, I, F, sol, r)
    for j in range(inequalities):
        store(F, rows + j, (load(w, F, rows + j) + load(w, F, s + j)) * load(w, F, on + j))
    for j in range(inequalities, inequalities + lower + upper):
        if j < inequalities + lower:
            sign, i = -1.0, index(I, index(I, I_LO) + j - inequalities)
        else:
            sign, i = 1.0, index(I, index(I, I_UP) + j - inequalities - lower)
        gap = sign * (load(w, F, sol + i) - load(w, F, c + o + j)) + load(w, F, s + j)
        store(F, rows + j, gap * load(w, F, on + j))
        store(F, r + i, load(w, F, r + i) + sign * load(w, F, z + j))
    first = inequalities + lower + upper
    for j in range(absolute):
        i = r + index(I, index(I, I_ABS) + j)
        v = load(w, F, z + first + j) - load(w, F, z + first + absolute + j)
        store(F, i, load(w, F, i) + v)
        store(F, rows + first + j, full(w, 0.0))
        store(F, rows + first + absolute + j, full(w, 0.0))
    base = index(I, BASE)
    for i in range(n):
        store(F, r + i, where_gt(load(w, F, base + i), PINNED, 0.0, load(w, F, r + i)))


@helper
def weights(w, I, F):
    """WD: the diagonal of the KKT matrix at the iterate, pairs eliminated."""
    n, N, wd, sol, s = index(I, N_X), index(I, N_K), index(I, WD), index(I, SOL), index(I, S)
    inequalities, lower, upper, absolute = index(I, N_IN), index(I, N_LO), index(I, N_UP), index(I, N_ABS)
    o = N - inequalities
    z, base, on = sol + o, index(I, BASE), index(I, ON)
    shift = load(w, F, index(I, REG) + REG_Y)
    for i in range(n):
        store(F, wd + i, load(w, F, base + i))
    for i in range(n, o):
        store(F, wd + i, 0.0 - shift)
    for j in range(inequalities):
        ratio = vmin(load(w, F, s + j) / load(w, F, z + j), full(w, LARGEST_WEIGHT))
        ratio = where_gt(load(w, F, on + j), 0.5, ratio + shift, full(w, 10 * PINNED))
        store(F, wd + o + j, 0.0 - ratio)
    for j in range(inequalities, inequalities + lower + upper):
        if j < inequalities + lower:
            i = wd + index(I, index(I, I_LO) + j - inequalities)
        else:
            i = wd + index(I, index(I, I_UP) + j - inequalities - lower)
        ratio = vmin(load(w, F, z + j) / load(w, F, s + j), full(w, LARGEST_WEIGHT))
        store(F, i, load(w, F, i) + ratio * load(w, F, on + j))
    first = inequalities + lower + upper
    for j in range(first, first + absolute):
        i = wd + index(I, index(I, I_ABS) + j - first)
        zp, zm = load(w, F, z + j), load(w, F, z + absolute + j)
        crossed = load(w, F, s + j) * zm + load(w, F, s + absolute + j) * zp
        ratio = vmin(4.0 * zp * zm / crossed, full(w, LARGEST_WEIGHT))
        store(F, i, load(w, F, i) + ratio * load(w, F, on + j))


@helper
def right_hand_side(w, I, F):
    """D (first N slots) from the residuals R and the complementarity targets in DS."""
    N, d, r, sol, s, c = (
        index(I, N_K),
        index(I, D),
        index(I, R),
        index(I, SOL),
        index(I, S),
        index(I, DS),
    )
    inequalities, lower, upper, absolute = index(I, N_IN), index(I, N_LO), index(I, N_UP), index(I, N_ABS)
    o = N - inequalities
    z = sol + o
    for i in range(N):
        store(F, d + i, 0.0 - load(w, F, r + i))
    for j in range(inequalities):
        i = d + o + j
        store(F, i, load(w, F, i) - load(w, F, c + j) / load(w, F, z + j))
    for j in range(inequalities, inequalities + lower + upper):
        if j < inequalities + lower:
            sign, i = 1.0, d + index(I, index(I, I_LO) + j - inequalities)
        else:
            sign, i = -1.0, d + index(I, index(I, I_UP) + j - inequalities - lower)
        push = (load(w, F, c + j) + load(w, F, z + j) * load(w, F, r + o + j)) / load(w, F, s + j)
        store(F, i, load(w, F, i) + sign * push)
    first = inequalities + lower + upper
    for j in range(first, first + absolute):
        i = d + index(I, index(I, I_ABS) + j - first)
        zp, zm = load(w, F, z + j), load(w, F, z + absolute + j)
        crossed = load(w, F, s + j) * zm + load(w, F, s + absolute + j) * zp
        push = 2.0 * (zm * load(w, F, c + j) - zp * load(w, F, c + absolute + j)) / crossed
        store(F, i, load(w, F, i) - push)


@helper
def recover(w, I, F):
    """ds into DS (over its targets) and dz of all pairs into D, from the solution D of the KKT system."""
    N, d, r, sol, s, c, on = (
        index(I, N_K),
        index(I, D),
        index(I, R),
        index(I, SOL),
        index(I, S),
        index(I, DS),
        index(I, ON),
    )
    inequalities, lower, upper, absolute = index(I, N_IN), index(I, N_LO), index(I, N_UP), index(I, N_ABS)
    o = N - inequalities
    z, dz = sol + o, d + o
    for j in range(inequalities):
        step = load(w, F, c + j) - load(w, F, s + j) * load(w, F, dz + j)
        store(F, c + j, step / load(w, F, z + j) * load(w, F, on + j))
    for j in range(inequalities, inequalities + lower + upper):
        if j < inequalities + lower:
            change = load(w, F, d + index(I, index(I, I_LO) + j - inequalities))
        else:
            change = 0.0 - load(w, F, d + index(I, index(I, I_UP) + j - inequalities - lower))
        ds = (change - load(w, F, r + o + j)) * load(w, F, on + j)
        store(F, dz + j, (load(w, F, c + j) - load(w, F, z + j) * ds) / load(w, F, s + j))
        store(F, c + j, ds)
    first = inequalities + lower + upper
    for j in range(first, first + absolute):
        k = j + absolute
        dx = load(w, F, d + index(I, index(I, I_ABS) + j - first))
        zp, zm, sp, sm = load(w, F, z + j), load(w, F, z + k), load(w, F, s + j), load(w, F, s + k)
        cp, cm, keep = load(w, F, c + j), load(w, F, c + k), load(w, F, on + j)
        crossed = sp * zm + sm * zp
        dv = (zm * cp - zp * cm + 2.0 * zp * zm * dx) / crossed * keep
        dt = (sm * cp + sp * cm + (sm * zp - sp * zm) * dx) / crossed
        store(F, dz + j, dv)
        store(F, dz + k, 0.0 - dv)
        store(F, c + j, (dt - dx) * keep)
        store(F, c + k, (dt + dx) * keep)
