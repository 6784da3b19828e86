"""The adjoint of a block: one solve with the stored factor, refined, and the gradients of all data.

At an active set it is the derivative of the equality constrained problem that the set defines. Where a
constraint is weakly active this is the element of the generalized derivative that belongs to the set
the polish certified; where constraints are dependent or the solution is not unique, the part of the
upstream gradient along directions that the KKT conditions leave free is dropped (least squares).
"""

from convexlearn.solvers.quadratic.equilibrate import largest
from convexlearn.solvers.quadratic.layout import (
    COST,
    DATA,
    I_ABS,
    I_EI,
    I_EJ,
    I_LO,
    I_UP,
    KAPPA,
    N_ABS,
    N_ENTRY,
    N_K,
    N_LO,
    N_P,
    N_PLUS,
    N_UP,
    N_X,
    OK,
    OUT,
    PINNED,
    RATIO,
    REG,
    REG_X,
    REG_Y,
    SCALE,
    WD,
    C,
    D,
    R,
    Y,
)
from convexlearn.solvers.quadratic.ldl import multiply, solve_factored
from convexlearn.solvers.quadratic.simd import any_gt, full, helper, index, load, store, vabs, vmax, where_gt

REFINEMENTS = 5
ROUNDING = 1e-14
INCONSISTENT = 1e-6  # relative residual from which the upstream gradient is taken to have a free component


@helper
def scale_entries(w, I, F):
    """Apply SCALE and COST to the entries of P, A and G."""
    scale, data, ei, ej = index(I, SCALE), index(I, DATA), index(I, I_EI), index(I, I_EJ)
    nP, cost = index(I, N_P), load(w, F, index(I, COST))
    for e in range(index(I, N_ENTRY)):
        a = load(w, F, data + e) * load(w, F, scale + index(I, ei + e))
        a = a * load(w, F, scale + index(I, ej + e))
        store(F, data + e, a * cost if e < nP else a)


@helper
def limit_variable(I, j):
    """Variable of limit j: lower bounds, upper bounds, 1-norm weights."""
    lower, bounds = index(I, N_LO), index(I, N_LO) + index(I, N_UP)
    if j < lower:
        return index(I, index(I, I_LO) + j)
    if j < bounds:
        return index(I, index(I, I_UP) + j - lower)
    return index(I, index(I, I_ABS) + j - bounds)


@helper
def upstream(w, I, F):
    """Scale the gradient in C; fold its bound and 1-norm parts into x; Y = 0 but for held variables."""
    n, N, c, y, scale, ok = (
        index(I, N_X),
        index(I, N_K),
        index(I, C),
        index(I, Y),
        index(I, SCALE),
        load(w, F, index(I, OK)),
    )
    lower, limits = index(I, N_LO), index(I, N_LO) + index(I, N_UP) + index(I, N_ABS)
    cost, zero, ratio = load(w, F, index(I, COST)), full(w, 0.0), index(I, RATIO)
    for i in range(N):
        g = load(w, F, c + i) * load(w, F, scale + i)
        store(F, c + i, where_gt(ok, 0.5, g * cost if i < n else g, 0.0))
        store(F, y + i, zero)
    for j in range(limits):
        i, slope = limit_variable(I, j), load(w, F, ratio + j)
        g = where_gt(ok, 0.5, load(w, F, c + N + j) / load(w, F, scale + i), 0.0)
        store(F, c + N + j, g)
        if j < lower:
            g = 0.0 - g
        x, held = load(w, F, c + i), load(w, F, y + i)
        store(F, c + i, where_gt(slope, PINNED, x, x + slope * g))
        store(F, y + i, where_gt(slope, PINNED, g, held))


@helper
def adjoint_residual(w, I, F):
    """R = C - K Y with the diagonal, without the proximal terms, unmasked; returns its largest free entry."""
    plus, N, c, y, r, wd, reg = (
        index(I, N_PLUS),
        index(I, N_K),
        index(I, C),
        index(I, Y),
        index(I, R),
        index(I, WD),
        index(I, REG),
    )
    shift_x, shift_y = load(w, F, reg + REG_X), load(w, F, reg + REG_Y)
    for i in range(N):
        store(F, r + i, full(w, 0.0))
    multiply(w, I, F, y, r)
    worst = full(w, 0.0)
    for i in range(N):
        x, weight = load(w, F, r + i), load(w, F, wd + i)
        pinned = vabs(weight)
        diagonal = weight - shift_x if i < plus else weight + shift_y
        x = x + where_gt(pinned, PINNED, 0.0, diagonal) * load(w, F, y + i)
        x = load(w, F, c + i) - x
        store(F, r + i, x)
        worst = vmax(worst, where_gt(pinned, PINNED, 0.0, vabs(x)))
    return worst


@helper
def adjoint_solve(w, I, F):
    """Y = solution of the KKT system for the upstream gradient C; R = its residual, unmasked."""
    N, c, y, r, d, wd = index(I, N_K), index(I, C), index(I, Y), index(I, R), index(I, D), index(I, WD)
    size = largest(w, F, c, N, full(w, 0.0))
    size = size + largest(w, F, y, N, full(w, 0.0)) + 1e-300
    repeat = 0
    while True:
        worst = adjoint_residual(w, I, F) / size
        if repeat == REFINEMENTS:
            # what refinement can't remove lies in the null space: drop it from C and start again
            drop = where_gt(worst, INCONSISTENT, full(w, 1.0), 0.0)
            if not any_gt(drop, 0.5):
                return
            for i in range(N):
                pinned, x = vabs(load(w, F, wd + i)), load(w, F, c + i)
                less = where_gt(pinned, PINNED, x, x - load(w, F, r + i))
                store(F, c + i, where_gt(drop, 0.5, less, x))
                store(
                    F, y + i, where_gt(drop, 0.5, where_gt(pinned, PINNED, load(w, F, y + i), 0.0), load(w, F, y + i))
                )
        elif repeat >= 2 * REFINEMENTS or not any_gt(worst, ROUNDING):
            return
        else:
            for i in range(N):
                pinned = vabs(load(w, F, wd + i))
                store(F, d + i, where_gt(pinned, PINNED, 0.0, load(w, F, r + i)))
            solve_factored(w, I, F, d)
            for i in range(N):
                x = load(w, F, y + i)
                store(F, y + i, where_gt(worst, ROUNDING, x + load(w, F, d + i), x))
        repeat += 1


@helper
def limit_gradients(w, I, F):
    """Gradients of l, u, w into C (after the first N) from the scaled adjoint Y and its residual R."""
    N, c, y, r, scale = index(I, N_K), index(I, C), index(I, Y), index(I, R), index(I, SCALE)
    lower, bounds, absolute = index(I, N_LO), index(I, N_LO) + index(I, N_UP), index(I, N_ABS)
    cost, ratio, kappa = load(w, F, index(I, COST)), index(I, RATIO), index(I, KAPPA)
    for j in range(bounds):
        i, slope = limit_variable(I, j), load(w, F, ratio + j)
        g, x = load(w, F, c + N + j), load(w, F, y + i)
        smooth = slope * (g + x) if j < lower else slope * (x - g)
        smooth = where_gt(slope, PINNED, load(w, F, r + i), smooth)
        store(F, c + N + j, smooth / (cost * load(w, F, scale + i)))
    for j in range(absolute):
        i = limit_variable(I, bounds + j)
        change = load(w, F, c + N + bounds + j) - load(w, F, y + i)
        store(F, c + N + bounds + j, load(w, F, kappa + j) * change * load(w, F, scale + i))


@helper
def data_gradients(w, I, F):
    """Gradients of all fields into DATA and C; Y becomes the adjoint in the caller's units."""
    n, N, c, y, out, scale = (
        index(I, N_X),
        index(I, N_K),
        index(I, C),
        index(I, Y),
        index(I, OUT),
        index(I, SCALE),
    )
    ei, ej, data, cost = index(I, I_EI), index(I, I_EJ), index(I, DATA), load(w, F, index(I, COST))
    ok = load(w, F, index(I, OK))
    limit_gradients(w, I, F)
    for i in range(N):
        x = load(w, F, y + i) * load(w, F, scale + i)
        x = where_gt(ok, 0.5, x if i < n else x / cost, 0.0)
        store(F, y + i, x)
        store(F, c + i, 0.0 - x if i < n else x)
    for j in range(index(I, N_LO) + index(I, N_UP) + index(I, N_ABS)):
        store(F, c + N + j, where_gt(ok, 0.5, load(w, F, c + N + j), 0.0))
    for e in range(index(I, N_ENTRY)):
        i, j = index(I, ei + e), index(I, ej + e)
        g = load(w, F, y + i) * load(w, F, out + j)
        if i != j:
            g = g + load(w, F, out + i) * load(w, F, y + j)
        store(F, data + e, where_gt(ok, 0.5, 0.0 - g, 0.0))
