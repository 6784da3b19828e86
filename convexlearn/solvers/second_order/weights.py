"""The weight of every cone in the KKT matrix: Nesterov-Todd in the interior, the projection's derivative at the end.

A second-order cone's weight has eigenvalues `large` on c = (1, o)/sqrt 2, `small` on d = (1, -o)/sqrt 2 and
`middle` on all that is orthogonal to both, |o| = 1. The interior point has (large, small) = middle (g, 1/g).
The projection onto the cone at s - z has the derivative {1, 0, theta}, so that its Newton step has
weights {infinite, 0, theta/(1 - theta)}: inside the cone's dual all rows are pinned, inside its polar all
weights vanish.
"""

from convexlearn.solvers.quadratic.layout import (
    DATA,
    N_BORDER,
    N_ENTRY,
    N_EQ,
    N_IN,
    N_K,
    N_PLUS,
    N_X,
    PINNED,
    REG,
    REG_X,
    REG_Y,
    SOL,
    WD,
    S,
    Y,
)
from convexlearn.solvers.quadratic.ldl import factor
from convexlearn.solvers.quadratic.simd import full, helper, index, load, store, vmax, vmin, vsqrt, where_gt
from convexlearn.solvers.second_order.jordan import inner, scaling_point
from convexlearn.solvers.second_order.layout import (
    CONE_WORDS,
    ETA,
    GRAM,
    I_CONE,
    I_PRODUCT,
    N_CONE,
    N_HALF,
    N_PRODUCT,
    N_ROW,
    RATIO_SD,
    SLACK,
    W,
)

LARGEST = 1e18
STEEPEST = 1e12  # ratio of slack and multiplier on the boundary of a cone


@helper
def shifts(w, I, F):
    """WD = the proximal terms, and 1 and -1 for the unknowns e and f."""
    n, plus, N, wd, reg = index(I, N_X), index(I, N_PLUS), index(I, N_K), index(I, WD), index(I, REG)
    shift_x, shift_y = load(w, F, reg + REG_X), load(w, F, reg + REG_Y)
    last = plus + index(I, N_ROW)
    for i in range(N):
        weight = shift_x if i < plus else 0.0 - shift_y
        if n <= i and i < plus:
            weight = weight + 1.0
        elif i >= last:
            weight = weight - 1.0
        store(F, wd + i, weight)


@helper
def unit_weights(w, I, F):
    """The weights of the starting system: 1 for every inequality."""
    shifts(w, I, F)
    wd, border = index(I, WD) + index(I, N_PLUS), index(I, DATA) + index(I, N_ENTRY)
    for i in range(index(I, N_EQ), index(I, N_ROW)):
        store(F, wd + i, load(w, F, wd + i) - 1.0)
    for e in range(border, border + index(I, N_BORDER)):
        store(F, e, full(w, 0.0))


@helper
def interior_weights(w, I, F):
    """WD, U, V at the iterate S, SOL; the Nesterov-Todd points go to W and ETA."""
    shifts(w, I, F)
    plus, data, eta, point = index(I, N_PLUS), index(I, DATA), index(I, ETA), index(I, W)
    wd, s, z = index(I, WD) + plus, index(I, S), index(I, SOL) + plus
    for i in range(index(I, N_EQ), index(I, N_EQ) + index(I, N_IN)):
        ratio = vmin(load(w, F, s + i) / load(w, F, z + i), full(w, LARGEST))
        store(F, wd + i, load(w, F, wd + i) - ratio)
    for k in range(index(I, N_CONE)):
        at = index(I, I_CONE) + CONE_WORDS * k
        first, d, u = index(I, at), index(I, at + 1), data + index(I, at + 2)
        v, p = u + index(I, N_HALF), point + first
        scaling_point(w, F, s + first, z + first, p, eta + k, d)
        norm, w0 = vsqrt(inner(w, F, p, p, d)), load(w, F, p)
        middle = load(w, F, eta + k) * load(w, F, eta + k)
        excess = 2.0 * norm * (norm + w0)  # g - 1 with g = (w0 + |w1|)^2
        a, b = vsqrt(0.5 * middle * excess), vsqrt(0.5 * middle * excess / (1.0 + excess))
        inverse = 1.0 / vmax(norm, full(w, 1e-300))
        store(F, u, a)
        store(F, v, b)
        for i in range(1, d):
            direction = inverse * load(w, F, p + i)
            store(F, u + i, a * direction)
            store(F, v + i, 0.0 - b * direction)
        for i in range(first, first + d):
            store(F, wd + i, load(w, F, wd + i) - middle)


@helper
def face_weights(w, I, F):
    """WD, U, V for the face that SLACK - RATIO_SD Y points to; pinned multipliers in Y become 0."""
    shifts(w, I, F)
    plus, data, t = index(I, N_PLUS), index(I, DATA), load(w, F, index(I, REG) + RATIO_SD)
    wd, s, z = index(I, WD) + plus, index(I, SLACK), index(I, Y) + plus
    pin, zero = full(w, 10 * PINNED), full(w, 0.0)
    for i in range(index(I, N_EQ), index(I, N_EQ) + index(I, N_IN)):
        inactive = where_gt(load(w, F, s + i), t * load(w, F, z + i), full(w, 1.0), 0.0)
        store(F, wd + i, where_gt(inactive, 0.5, 0.0 - pin, load(w, F, wd + i)))
        store(F, z + i, where_gt(inactive, 0.5, 0.0, load(w, F, z + i)))
    for k in range(index(I, N_CONE)):
        at = index(I, I_CONE) + CONE_WORDS * k
        first, d, u = index(I, at), index(I, at + 1), data + index(I, at + 2)
        v, e = u + index(I, N_HALF), index(I, WD) + index(I, N_X) + k
        square = zero
        for i in range(1, d):
            x = load(w, F, s + first + i) - t * load(w, F, z + first + i)
            square = square + x * x
        norm, v0 = vsqrt(square), load(w, F, s + first) - t * load(w, F, z + first)
        inside, polar = where_gt(norm, v0, zero, full(w, 1.0)), where_gt(norm, 0.0 - v0, zero, full(w, 1.0))
        face = where_gt(inside + polar, 0.5, zero, full(w, 1.0))
        middle = where_gt(face, 0.5, t * vmin((norm + v0) / (norm - v0), full(w, STEEPEST)), zero)
        a = where_gt(face, 0.5, full(w, 0.7071067811865476), zero)
        b = a * vsqrt(middle)
        inverse = 1.0 / vmax(norm, full(w, 1e-300))
        store(F, u, a)
        store(F, v, b)
        for i in range(1, d):
            direction = inverse * (load(w, F, s + first + i) - t * load(w, F, z + first + i))
            store(F, u + i, a * direction)
            store(F, v + i, 0.0 - b * direction)
        for i in range(first, first + d):
            weight = load(w, F, wd + i) - middle
            store(F, wd + i, where_gt(inside, 0.5, 0.0 - pin, weight))
            store(F, z + i, where_gt(inside, 0.5, 0.0, load(w, F, z + i)))
        store(F, e, where_gt(face, 0.5, load(w, F, e) - 1.0, load(w, F, e)))


@helper
def form_gram(w, I, F):
    """GRAM = A'A over the rows of each cone that has one, from the equilibrated A."""
    gram, data, products = index(I, GRAM), index(I, DATA), index(I, I_PRODUCT)
    for k in range(index(I, N_CONE)):
        at = index(I, I_CONE) + CONE_WORDS * k
        for g in range(index(I, at + 3), index(I, at + 3) + index(I, at + 4)):
            store(F, gram + g, full(w, 0.0))
    for p in range(index(I, N_PRODUCT)):
        g = gram + index(I, products + 3 * p)
        a, b = data + index(I, products + 3 * p + 1), data + index(I, products + 3 * p + 2)
        store(F, g, load(w, F, g) + load(w, F, a) * load(w, F, b))


@helper
def factor_weighted(w, I, F):
    """Factor K with WD, U, V as they are."""
    gram, wd = index(I, GRAM), index(I, WD) + index(I, N_PLUS)
    target = index(I, DATA) + index(I, N_ENTRY) + index(I, N_BORDER)
    for k in range(index(I, N_CONE)):
        at = index(I, I_CONE) + CONE_WORDS * k
        weight = load(w, F, wd + index(I, at))
        inverse = where_gt(0.0 - weight, PINNED, 0.0, -1.0 / weight)
        for g in range(index(I, at + 3), index(I, at + 3) + index(I, at + 4)):
            store(F, target + g, inverse * load(w, F, gram + g))
    factor(w, I, F)
