"""Second-order cones in lanes: Nesterov-Todd scaling, Jordan products, steps to the boundary.

A cone occupies `d` slots (v0, v1) with |v1| <= v0. Reference: Vandenberghe, The CVXOPT linear and
quadratic cone program solvers (2010).
"""

from convexlearn.solvers.quadratic.simd import full, helper, load, store, vmax, vsqrt

TINY = 1e-300


@helper
def inner(w, F, a, b, d):
    """v1'u1: the inner product without the first entries."""
    total = full(w, 0.0)
    for i in range(1, d):
        total = total + load(w, F, a + i) * load(w, F, b + i)
    return total


@helper
def determinant(w, F, a, d):
    """v0^2 - |v1|^2, at least TINY."""
    norm = vsqrt(inner(w, F, a, a, d))
    return vmax((load(w, F, a) - norm) * (load(w, F, a) + norm), full(w, TINY))


@helper
def scaling_point(w, F, s, z, point, eta, d):
    """The Nesterov-Todd point w (w0^2 - |w1|^2 = 1) and eta: W = eta [w0, w1'; w1, I + w1 w1'/(1 + w0)]."""
    root_s, root_z = vsqrt(determinant(w, F, s, d)), vsqrt(determinant(w, F, z, d))
    dot = inner(w, F, s, z, d) + load(w, F, s) * load(w, F, z)
    gamma = 0.5 / vsqrt(vmax(0.5 + 0.5 * dot / (root_s * root_z), full(w, TINY)))
    square = full(w, 0.0)
    for i in range(1, d):
        x = gamma * (load(w, F, s + i) / root_s - load(w, F, z + i) / root_z)
        square = square + x * x
        store(F, point + i, x)
    store(F, point, vsqrt(1.0 + square))
    store(F, eta, vsqrt(root_s / root_z))


@helper
def scale(w, F, point, eta, sign, v, out, d):
    """out = W v for sign 1; W^-1 v for sign -1, with 1/eta given as eta."""
    w0, v0 = load(w, F, point), load(w, F, v)
    dot = sign * inner(w, F, point, v, d)
    slope = sign * (v0 + dot / (1.0 + w0))
    store(F, out, eta * (w0 * v0 + dot))
    for i in range(1, d):
        store(F, out + i, eta * (load(w, F, v + i) + slope * load(w, F, point + i)))


@helper
def product(w, F, a, b, out, d):
    """out = a o b = (a'b, a0 b1 + b0 a1); out may be a or b."""
    a0, b0 = load(w, F, a), load(w, F, b)
    first = a0 * b0 + inner(w, F, a, b, d)
    for i in range(1, d):
        store(F, out + i, a0 * load(w, F, b + i) + b0 * load(w, F, a + i))
    store(F, out, first)


@helper
def divide(w, F, a, b, d):
    """b = the solution y of a o y = b, for a inside the cone."""
    a0 = load(w, F, a)
    first = (a0 * load(w, F, b) - inner(w, F, a, b, d)) / determinant(w, F, a, d)
    for i in range(1, d):
        store(F, b + i, (load(w, F, b + i) - first * load(w, F, a + i)) / a0)
    store(F, b, first)


@helper
def inverse_step(w, F, a, b, d):
    """1 / t for the largest t with a + t b in the cone, a inside; not positive where there is no limit."""
    root = 1.0 / vsqrt(determinant(w, F, a, d))
    a0, b0 = root * load(w, F, a), root * load(w, F, b)
    along = a0 * b0 - root * root * inner(w, F, a, b, d)
    slope = (along + b0) / (a0 + 1.0)
    square = full(w, 0.0)
    for i in range(1, d):
        x = root * (load(w, F, b + i) - slope * load(w, F, a + i))
        square = square + x * x
    return vsqrt(square) - along
