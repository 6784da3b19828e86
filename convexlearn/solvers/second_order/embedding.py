"""The homogeneous embedding of a conic QP in lanes: residuals, Newton directions, steps (Goulart and Chen 2024).

Px + A'z + q tau = 0, Ax + s = b tau, q'x + b'z + x'Px/tau + kappa = 0 with (s, z) and (tau, kappa) complementary.
"""

from convexlearn.solvers.quadratic.layout import (
    ALPHA,
    DATA,
    DS,
    I_CI,
    I_CP,
    I_CS,
    MU,
    N_EQ,
    N_IN,
    N_K,
    N_PLUS,
    N_X,
    REG,
    REG_X,
    REG_Y,
    SOL,
    WD,
    C,
    D,
    R,
    S,
)
from convexlearn.solvers.quadratic.ldl import multiply, solve_factored
from convexlearn.solvers.quadratic.simd import full, helper, index, load, store, vmax, vmin
from convexlearn.solvers.second_order.jordan import divide, inverse_step, product, scale
from convexlearn.solvers.second_order.layout import (
    CONE_WORDS,
    DKAPPA,
    DTAU,
    ETA,
    FIX,
    GAP_TAU,
    I_CONE,
    KAPPA,
    N_CONE,
    N_HALF,
    N_ROW,
    PX,
    RHS,
    SPARE,
    TAU,
    TEMP,
    XPX,
    W,
)

TO_BOUNDARY = 0.99


@helper
def products(w, I, F, v, px, r):
    """px (n) = P x; r (N) = A'z in the first n slots, A x in the rows, 0 elsewhere; (x, z) lie in v."""
    n, cp, ci, cs, data = index(I, N_X), index(I, I_CP), index(I, I_CI), index(I, I_CS), index(I, DATA)
    for i in range(index(I, N_K)):
        store(F, r + i, full(w, 0.0))
    for i in range(n):
        store(F, px + i, full(w, 0.0))
    for j in range(n):
        x, curvature, pull = load(w, F, v + j), full(w, 0.0), full(w, 0.0)
        for e in range(index(I, cp + j), index(I, cp + j + 1)):
            i, a = index(I, ci + e), load(w, F, data + index(I, cs + e))
            if i >= n:
                pull = pull + a * load(w, F, v + i)
                store(F, r + i, load(w, F, r + i) + a * x)
            else:
                curvature = curvature + a * load(w, F, v + i)
                if i != j:
                    store(F, px + i, load(w, F, px + i) + a * x)
        store(F, px + j, load(w, F, px + j) + curvature)
        store(F, r + j, pull)


@helper
def dots(w, I, F, v):
    """q'x + b'z and 2 x'Px_now of the point v, where PX holds Px_now."""
    n, N, c, px = index(I, N_X), index(I, N_K), index(I, C), index(I, PX)
    total, curved = full(w, 0.0), full(w, 0.0)
    for i in range(N):
        total = total + load(w, F, c + i) * load(w, F, v + i)
    for i in range(n):
        curved = curved + load(w, F, px + i) * load(w, F, v + i)
    return total, 2.0 * curved


@helper
def solve_refined(w, I, F, b, repeats):
    """Overwrite the slots b (N) by the solution of the KKT system without the proximal terms."""
    N, plus, rhs, r, wd, reg = (
        index(I, N_K),
        index(I, N_PLUS),
        index(I, RHS),
        index(I, SPARE),
        index(I, WD),
        index(I, REG),
    )
    shift_x, shift_y = load(w, F, reg + REG_X), load(w, F, reg + REG_Y)
    if repeats > 0:
        for i in range(N):
            store(F, rhs + i, load(w, F, b + i))
    solve_factored(w, I, F, b)
    for _ in range(repeats):
        for i in range(N):
            shift = 0.0 - shift_x if i < plus else shift_y
            store(F, r + i, (load(w, F, wd + i) + shift) * load(w, F, b + i) - load(w, F, rhs + i))
        multiply(w, I, F, b, r)
        solve_factored(w, I, F, r)
        for i in range(N):
            store(F, b + i, load(w, F, b + i) - load(w, F, r + i))


@helper
def direction_to_tau(w, I, F, repeats):
    """FIX = K^-1 (-q, b): how x and z move with tau."""
    N, plus, c, fix = index(I, N_K), index(I, N_PLUS), index(I, C), index(I, FIX)
    for i in range(N):
        x = load(w, F, c + i)
        store(F, fix + i, x if i >= plus else 0.0 - x)
    solve_refined(w, I, F, fix, repeats)


@helper
def direction(w, I, F, keep, repeats):
    """D, DS, DTAU, DKAPPA from residuals times `keep`, and the complementarity terms in DS and DKAPPA."""
    n, N, plus, m, reg = index(I, N_X), index(I, N_K), index(I, N_PLUS), index(I, N_ROW), index(I, REG)
    d, r, ds, fix, wd = index(I, D), index(I, R), index(I, DS), index(I, FIX), index(I, WD) + index(I, N_PLUS)
    tau, kappa, dkappa = load(w, F, reg + TAU), load(w, F, reg + KAPPA), load(w, F, reg + DKAPPA)
    for i in range(N):
        x = keep * load(w, F, r + i)
        if i < plus:
            store(F, d + i, x)
        else:
            store(F, d + i, load(w, F, ds + i - plus) - x if i < plus + m else x)
    solve_refined(w, I, F, d, repeats)
    straight, curved = dots(w, I, F, d)
    fixed, fixed_curved = dots(w, I, F, fix)
    above = keep * load(w, F, reg + GAP_TAU) - dkappa / tau + straight + curved / tau
    below = kappa / tau + load(w, F, reg + XPX) / (tau * tau) - fixed - fixed_curved / tau
    dtau = above / below
    for i in range(N):
        store(F, d + i, load(w, F, d + i) + dtau * load(w, F, fix + i))
    store(F, reg + DTAU, dtau)
    store(F, reg + DKAPPA, 0.0 - (dkappa + kappa * dtau) / tau)
    # ds = -(term + weight dz)
    shift = load(w, F, reg + REG_Y)
    for i in range(m):
        weight = load(w, F, wd + i) + shift
        step = weight * load(w, F, d + plus + i) - load(w, F, ds + i)
        store(F, ds + i, full(w, 0.0) if i < index(I, N_EQ) else step)
    low_rank_slacks(w, I, F, n, plus)


@helper
def low_rank_slacks(w, I, F, n, plus):
    """Add the part of ds that the unknowns e and f carry: U e + V f."""
    d, ds, m, data, half = index(I, D), index(I, DS), index(I, N_ROW), index(I, DATA), index(I, N_HALF)
    for k in range(index(I, N_CONE)):
        at = index(I, I_CONE) + CONE_WORDS * k
        first, size, u = index(I, at), index(I, at + 1), data + index(I, at + 2)
        e, f = load(w, F, d + n + k), load(w, F, d + plus + m + k)
        for i in range(size):
            step = e * load(w, F, u + i) + f * load(w, F, u + half + i)
            store(F, ds + first + i, load(w, F, ds + first + i) + step)


@helper
def predict(w, I, F):
    """Complementarity terms of the affine direction: s, and kappa tau."""
    s, ds, reg = index(I, S), index(I, DS), index(I, REG)
    for i in range(index(I, N_ROW)):
        store(F, ds + i, load(w, F, s + i))
    store(F, reg + DKAPPA, load(w, F, reg + KAPPA) * load(w, F, reg + TAU))


@helper
def correct(w, I, F, sigma):
    """Terms of the combined direction: s + W (l \\ ((W^-1 ds) o (W dz) - sigma mu e)) with l = W z."""
    s, z, ds, dz = index(I, S), index(I, SOL) + index(I, N_PLUS), index(I, DS), index(I, D) + index(I, N_PLUS)
    temp, reg, eta, m = index(I, TEMP), index(I, REG), index(I, ETA), index(I, N_ROW)
    center = sigma * load(w, F, reg + MU)
    for i in range(index(I, N_EQ), index(I, N_EQ) + index(I, N_IN)):
        second = load(w, F, ds + i) * load(w, F, dz + i) - center
        store(F, ds + i, load(w, F, s + i) + second / load(w, F, z + i))
    for k in range(index(I, N_CONE)):
        at = index(I, I_CONE) + CONE_WORDS * k
        i, d, eta_k = index(I, at), index(I, at + 1), load(w, F, eta + k)
        p, a, b = index(I, W) + i, temp + i, temp + m + i
        scale(w, F, p, 1.0 / eta_k, -1.0, ds + i, a, d)
        scale(w, F, p, eta_k, 1.0, dz + i, b, d)
        product(w, F, a, b, a, d)
        store(F, a, load(w, F, a) - center)
        scale(w, F, p, eta_k, 1.0, z + i, b, d)
        divide(w, F, b, a, d)
        scale(w, F, p, eta_k, 1.0, a, ds + i, d)
        for j in range(i, i + d):
            store(F, ds + j, load(w, F, ds + j) + load(w, F, s + j))
    product_tau = load(w, F, reg + DKAPPA) * load(w, F, reg + DTAU)
    store(F, reg + DKAPPA, load(w, F, reg + KAPPA) * load(w, F, reg + TAU) + product_tau - center)


@helper
def step_length(w, I, F):
    """ALPHA: the longest step to the boundary, at most 1 / TO_BOUNDARY."""
    s, z, ds, dz = index(I, S), index(I, SOL) + index(I, N_PLUS), index(I, DS), index(I, D) + index(I, N_PLUS)
    reg = index(I, REG)
    inverse = full(w, TO_BOUNDARY)
    for i in range(index(I, N_EQ), index(I, N_EQ) + index(I, N_IN)):
        inverse = vmax(inverse, (0.0 - load(w, F, ds + i)) / load(w, F, s + i))
        inverse = vmax(inverse, (0.0 - load(w, F, dz + i)) / load(w, F, z + i))
    for k in range(index(I, N_CONE)):
        at = index(I, I_CONE) + CONE_WORDS * k
        i, d = index(I, at), index(I, at + 1)
        inverse = vmax(inverse, inverse_step(w, F, s + i, ds + i, d))
        inverse = vmax(inverse, inverse_step(w, F, z + i, dz + i, d))
    inverse = vmax(inverse, (0.0 - load(w, F, reg + DTAU)) / load(w, F, reg + TAU))
    inverse = vmax(inverse, (0.0 - load(w, F, reg + DKAPPA)) / load(w, F, reg + KAPPA))
    store(F, reg + ALPHA, 1.0 / inverse)
    return vmin(1.0 / inverse, full(w, 1.0))
