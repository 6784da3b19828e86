"""Compiled active-set methods for min 1/2 u'Hu + g'u + w'|u|, l <= u <= h with one small dense H for all samples.

Primal-dual active sets (Hintermueller, Ito, Kunisch 2003) first; coordinate descent with subspace
Newton steps, which decreases the objective monotonically, where those cycle and for 1-norms.
State of a variable: FREE, UPPER, LOWER, ZERO (of a 1-norm), PLUS or MINUS (nonzero in a 1-norm).
"""

import numpy as np

from convexlearn.program.compiled import helper
from convexlearn.program.lane_kernels import axpy
from convexlearn.program.reduction_kernels import part
from convexlearn.solvers.quadratic.small_dense_kernels import add_product, factor, null_vector, substitute

FREE, UPPER, LOWER, ZERO, PLUS, MINUS = 0, 1, -1, 2, 3, -3
TOLERANCE = 1e-11
PRIMAL_DUAL_STEPS = 25
DESCENT_ROUNDS = 60
FIRST_SWEEPS, LATER_SWEEPS = 24, 6  # every third over all variables, the others over those off zero


@helper
def is_free(state):
    """Whether the variable moves."""
    return state in (FREE, PLUS, MINUS)


@helper
def prepare(H, S, states, M, index):
    """Factor the free block of H, or, where fewer variables are pinned, the pinned block of S = H^-1.

    Returns (number of indices, whether S is used, the factorization's positive pivots: all of them, or it failed).
    """
    n, free = len(states), 0
    for i in range(n):
        free += is_free(states[i])
    inverse = S.shape[0] == n and 2 * free > n
    k = 0
    for i in range(n):
        if is_free(states[i]) != inverse:
            index[k] = i
            k += 1
    source = S if inverse else H
    for a in range(k):
        row = index[a]
        for e in range(a, k):
            M[a, e] = source[row, index[e]]
    return k, inverse, factor(M, k)


@helper
def apply(H, S, M, index, k, inverse, g, pinned, u, rho, work):
    """Solve Hu + g + rho = 0 with u = pinned at pinned variables and rho = 0 at free ones.

    `g` contains the slopes of the 1-norms; `pinned` is zero at free variables.
    """
    n = len(g)
    if inverse:
        u[:] = 0.0
        add_product(S, g, u)
        for i in range(n):
            u[i] = -u[i]
            rho[i] = 0.0
        for a in range(k):
            work[a] = u[index[a]] - pinned[index[a]]
        substitute(M, k, work)
        for a in range(k):
            i = index[a]
            rho[i] = work[a]
            axpy(u, 0, -work[a], S, i * n, n)
        for a in range(k):
            u[index[a]] = pinned[index[a]]
        return
    for i in range(n):
        rho[i] = -g[i]
        u[i] = pinned[i]
    for i in range(n):
        if pinned[i] != 0.0:
            axpy(rho, 0, -pinned[i], H, i * n, n)
    for a in range(k):
        work[a] = rho[index[a]]
    substitute(M, k, work)
    for a in range(k):
        i = index[a]
        u[i] = work[a]
        axpy(rho, 0, -work[a], H, i * n, n)
    for a in range(k):
        rho[index[a]] = 0.0


@helper
def refine(H, S, M, index, k, inverse, g, states, u, rho, work, more):
    """One step of iterative refinement; returns the largest residual before it."""
    n = len(g)
    residual, du, drho, zero = more[0], more[1], more[2], more[3]
    for i in range(n):
        residual[i] = g[i] + rho[i]
        zero[i] = 0.0
    add_product(H, u, residual)
    worst = 0.0
    for i in range(n):
        worst = max(worst, abs(residual[i]))
    apply(H, S, M, index, k, inverse, residual, zero, du, drho, work)
    for i in range(n):
        u[i] += du[i]
        rho[i] += drho[i]
    return worst


@helper
def set_pinned(states, lower, upper, pinned):
    """Values of the pinned variables, zero at the others."""
    for i in range(len(states)):
        pinned[i] = upper[i] if states[i] == UPPER else lower[i] if states[i] == LOWER else 0.0


@helper
def slopes(states, g, w, out):
    """g plus the slopes of the 1-norms at nonzero variables."""
    for i in range(len(g)):
        out[i] = g[i] + (w[i] if states[i] == PLUS else -w[i] if states[i] == MINUS else 0.0)


@helper
def correct(states, u, rho, lower, upper, w, tolerance, only_last):
    """Move every violated variable to its next state, or only the last one; returns how many were violated."""
    count, last, target = 0, -1, 0
    for i in range(len(u)):
        old = states[i]
        new = old
        if old == FREE:
            if u[i] > upper[i] + tolerance[0]:
                new = UPPER
            elif u[i] < lower[i] - tolerance[0]:
                new = LOWER
        elif old == UPPER and rho[i] < -tolerance[1]:
            new = FREE if upper[i] > lower[i] else LOWER
        elif old == LOWER and rho[i] > tolerance[1]:
            new = FREE if upper[i] > lower[i] else UPPER
        elif (old == PLUS and u[i] < -tolerance[0]) or (old == MINUS and u[i] > tolerance[0]):
            new = ZERO
        elif old == ZERO and abs(rho[i]) > w[i] + tolerance[1]:
            new = PLUS if rho[i] > 0 else MINUS
        if new != old:
            count += 1
            last, target = i, new
            if not only_last:
                states[i] = new
    if only_last and count > 0:
        states[last] = target
    return count


@helper
def primal_dual(H, S, g, bounds, states, u, rho, M, index, work, more, tolerance):
    """Primal-dual active-set steps; returns the number of steps, or -1 where they don't settle."""
    lower, upper, w = bounds[0], bounds[1], bounds[2]
    total, pinned = more[4], more[5]
    best, stalled = len(g) + 1, 0
    for step in range(PRIMAL_DUAL_STEPS):
        set_pinned(states, lower, upper, pinned)
        slopes(states, g, w, total)
        k, inverse, pivots = prepare(H, S, states, M, index)
        if pivots < k:
            return -1
        apply(H, S, M, index, k, inverse, total, pinned, u, rho, work)
        count = correct(states, u, rho, lower, upper, w, tolerance, stalled > 3)
        if count == 0:
            refine(H, S, M, index, k, inverse, total, states, u, rho, work, more)
            return step + 1
        stalled = 0 if count < best else stalled + 1
        best = min(best, count)
    return -1


@helper
def sweep(H, bounds, absolute, u, r, zeros_too):
    """One round of coordinate descent; r = Hu + g is kept up to date.

    Not `zeros_too`: only on variables that are not at zero in a 1-norm. Returns how many variables left or
    reached a bound, or zero in a 1-norm.
    """
    lower, upper, w = bounds[0], bounds[1], bounds[2]
    n, changes = len(u), 0
    for i in range(n):
        if absolute[i] and u[i] == 0.0 and (not zeros_too or abs(r[i]) <= w[i]):
            continue
        h = H[i, i]
        if not h > 0.0:
            continue
        goal = u[i] * h - r[i]
        if absolute[i]:
            goal = goal - w[i] if goal > w[i] else goal + w[i] if goal < -w[i] else 0.0
        goal = min(max(goal / h, lower[i]), upper[i])
        delta = goal - u[i]
        if delta != 0.0:
            if absolute[i]:
                changes += (u[i] == 0.0) != (goal == 0.0)
            else:
                changes += (lower[i] < u[i] < upper[i]) != (lower[i] < goal < upper[i])
            u[i] = goal
            axpy(r, 0, delta, H, i * n, n)
    return changes


@helper
def read_states(u, r, bounds, absolute, states):
    """States of a point: pinned where it sits at a bound, or at zero in a 1-norm."""
    for i in range(len(u)):
        if absolute[i]:
            states[i] = PLUS if u[i] > 0 else MINUS if u[i] < 0 else ZERO
        elif u[i] >= bounds[1, i] and r[i] <= 0.0:
            states[i] = UPPER
        elif u[i] <= bounds[0, i] and r[i] >= 0.0:
            states[i] = LOWER
        else:
            states[i] = FREE


@helper
def descend(H, g, bounds, absolute, states, u, rho, M, index, work, more, tolerance):
    """Coordinate descent with subspace Newton steps; returns the number of rounds, or -1."""
    lower, upper, w = bounds[0], bounds[1], bounds[2]
    total, pinned, point, r = more[4], more[5], more[6], more[7]
    n, none = len(u), H[:0]
    for i in range(n):
        point[i] = min(max(point[i], lower[i]), upper[i])
        r[i] = g[i]
    add_product(H, point, r)
    for step in range(DESCENT_ROUNDS):
        changes = 0
        for turn in range(FIRST_SWEEPS if step == 0 else LATER_SWEEPS):
            if turn % 3 == 0:
                changes = 0
            changes += sweep(H, bounds, absolute, point, r, turn % 3 == 0)
            if turn % 3 == 2 and changes == 0:
                break
        read_states(point, r, bounds, absolute, states)
        k, inverse, pivots = prepare(H, none, states, M, index)
        while pivots < k and shed(H, bounds, states, M, index, pivots, point, r, work):
            k, inverse, pivots = prepare(H, none, states, M, index)
        if pivots < k:
            continue
        set_pinned(states, lower, upper, pinned)
        slopes(states, g, w, total)
        apply(H, none, M, index, k, inverse, total, pinned, u, rho, work)
        before = states.copy()
        if correct(states, u, rho, lower, upper, w, tolerance, False) == 0:
            refine(H, none, M, index, k, inverse, total, states, u, rho, work, more)
            return step + 1
        length = longest_step(before, point, u, lower, upper)
        for i in range(n):
            point[i] += length * (u[i] - point[i])
            r[i] = g[i]
        add_product(H, point, r)
    return -1


@helper
def shed(H, bounds, states, M, index, p, point, r, d):
    """Pin one free variable where the free block is singular; False where none is in the way.

    Along the null direction that pivot p shows the objective is linear: `point` and r = Hu + g follow it downhill to
    the first bound, or zero in a 1-norm.
    """
    null_vector(M, p, d)
    slope, length, first, target = 0.0, np.inf, -1, 0
    for a in range(p + 1):
        i = index[a]
        slope += d[a] * (r[i] + (bounds[2, i] if states[i] == PLUS else -bounds[2, i] if states[i] == MINUS else 0.0))
    sign = -1.0 if slope > 0.0 else 1.0
    for a in range(p + 1):
        i, along = index[a], sign * d[a]
        wall, state = (bounds[1, i], UPPER) if along > 0.0 else (bounds[0, i], LOWER)
        if states[i] != FREE:
            wall, state = (0.0, ZERO) if (states[i] == MINUS) == (along > 0.0) else (np.inf, ZERO)
        if along != 0.0 and abs(wall) < np.inf and (wall - point[i]) / along < length:
            length, first, target = max((wall - point[i]) / along, 0.0), i, state
    if first < 0:
        return False
    for a in range(p + 1):
        i = index[a]
        point[i] += sign * length * d[a]
        axpy(r, 0, sign * length * d[a], H, i * len(r), len(r))
    point[first] = bounds[1, first] if target == UPPER else bounds[0, first] if target == LOWER else 0.0
    states[first] = target
    return True


@helper
def longest_step(states, point, u, lower, upper):
    """How far from `point` to u no bound and no sign change is crossed, at most 1."""
    length = 1.0
    for i in range(len(u)):
        delta = u[i] - point[i]
        if states[i] == FREE and u[i] > upper[i]:
            length = min(length, (upper[i] - point[i]) / delta)
        elif states[i] == FREE and u[i] < lower[i]:
            length = min(length, (lower[i] - point[i]) / delta)
        elif (states[i] == PLUS and u[i] < 0.0) or (states[i] == MINUS and u[i] > 0.0):
            length = min(length, -point[i] / delta)
    return length


@helper
def fill_bounds(v, j, index, bounds, has_abs):
    """Bounds (3, n) = lower, upper, 1-norm weight of sample j; False where they are empty or not numbers."""
    lower, upper, absolute = part(index, 2), part(index, 3), part(index, 4)
    at = len(v) - len(lower) - len(upper) - 3 * len(absolute)
    bounds[0] = -np.inf
    bounds[1] = np.inf
    bounds[2] = 0.0
    valid = True
    for i in range(len(lower)):
        bounds[0, lower[i]] = v[at + i, j]
    at += len(lower)
    for i in range(len(upper)):
        bounds[1, upper[i]] = v[at + i, j]
    at += len(upper)
    for i in range(len(absolute)):
        bounds[2, absolute[i]] = v[at + i, j]
        has_abs[absolute[i]] = True
        valid = valid and v[at + i, j] >= 0.0
    for i in range(bounds.shape[1]):
        valid = valid and bounds[0, i] <= bounds[1, i] and bounds[0, i] < np.inf and bounds[1, i] > -np.inf
    return valid


@helper
def tolerances(g, bounds, tolerance):
    """Violations up to these count as none: of the bounds, and of the multipliers' signs."""
    size_g = size_b = 0.0
    for i in range(len(g)):
        size_g = max(size_g, abs(g[i]))
        for side in range(2):
            if abs(bounds[side, i]) < np.inf:
                size_b = max(size_b, abs(bounds[side, i]))
    tolerance[0] = TOLERANCE * (1e-3 + size_b)
    tolerance[1] = TOLERANCE * (1e-3 + size_g)


@helper
def guess_states(point, bounds, states):
    """States of a starting point: at the bounds it touches."""
    for i in range(len(point)):
        at_upper, at_lower = point[i] >= bounds[1, i], point[i] <= bounds[0, i]
        states[i] = UPPER if at_upper else LOWER if at_lower else FREE


@helper
def solve_sample(H, S, g, v, index, begin, k, u, rho, states, steps):
    """Solve the samples of a block; steps[k:] is the number of steps, or -1 where nothing settled.

    g, v (packed vectors), u and rho = -(Hu + g): (rows, samples). begin: (0 or B, n) points to start
    from. states: (B, n).
    """
    n = len(H)
    M, work, more = np.empty((n, n)), np.empty(n), np.empty((11, n))
    order, bounds = np.empty(n, np.int64), np.empty((3, n))
    has_abs, tolerance = np.zeros(n, np.bool_), np.empty(2)
    gk, uk, rk, point = more[8], more[9], more[10], more[6]
    for j in range(g.shape[1]):
        st = states[k + j]
        gk[:] = g[:, j]
        st[:] = FREE
        steps[k + j] = -1
        if not fill_bounds(v, j, index, bounds, has_abs):
            continue
        tolerances(gk, bounds, tolerance)
        point[:] = 0.0
        if begin.shape[0] > 0:
            point[:] = begin[k + j]
            guess_states(point, bounds, st)
        if len(part(index, 4)) == 0:
            steps[k + j] = primal_dual(H, S, gk, bounds, st, uk, rk, M, order, work, more, tolerance)
        if steps[k + j] < 0:
            steps[k + j] = descend(H, gk, bounds, has_abs, st, uk, rk, M, order, work, more, tolerance)
        for i in range(n):
            u[i, j] = uk[i]
            rho[i, j] = rk[i] + (bounds[2, i] if st[i] == PLUS else -bounds[2, i] if st[i] == MINUS else 0.0)


@helper
def fixed_sample(H, S, g, pinned, states, k, u, rho):
    """Linear systems Hu + g + rho = 0 on given active sets: rho = 0 where free, u = pinned elsewhere."""
    n = len(H)
    M, work, more, order = np.empty((n, n)), np.empty(n), np.empty((8, n)), np.empty(n, np.int64)
    gk, pk, uk, rk = more[4], more[5], more[6], more[7]
    for j in range(g.shape[1]):
        gk[:] = g[:, j]
        for i in range(n):
            pk[i] = 0.0 if is_free(states[k + j, i]) else pinned[i, j]
        count, inverse, pivots = prepare(H, S, states[k + j], M, order)
        if pivots < count:  # only where the sample was not solved
            continue
        apply(H, S, M, order, count, inverse, gk, pk, uk, rk, work)
        refine(H, S, M, order, count, inverse, gk, states[k + j], uk, rk, work, more)
        u[:, j] = uk
        rho[:, j] = rk
