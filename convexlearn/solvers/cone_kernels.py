"""Projections on the exponential and the power cone, point by point, with the eigenvectors of their derivative.

A three-dimensional cone whose boundary is smooth at the projection s of a point p has the derivative
s s'/|s|^2 + t t' / (1 + d k): t is the tangent orthogonal to s, d = |p - s|, and k the curvature of the
boundary along t. With z = s - p, the rows of E are s/|s|, z/|z| and t; `slope` holds the eigenvalues of
the derivative of the projection on the dual cone at -p, and `rest` holds 1 - slope.
"""

import math

from convexlearn.program.compiled import entry, helper

STEPS = 200
FARTHEST = 700.0  # exp overflows beyond
STEEP = 100.0  # from this ratio on exp(-ratio) is nothing beside 1, and the cone's faces are planes


@helper
def plain(p, s, z, E, slope, rest, i, inside):
    """s = p (inside) or s = 0, with E the identity."""
    for k in range(3):
        s[i, k] = p[i, k] if inside else 0.0
        z[i, k] = 0.0 if inside else -p[i, k]
        slope[i, k] = 0.0 if inside else 1.0
        rest[i, k] = 1.0 - slope[i, k]
        for l in range(3):
            E[i, k, l] = 1.0 if k == l else 0.0


@helper
def axis(s, z, slope, rest, i, k, value, dual):
    """Coordinate k with projection `value`, z = `dual` and eigenvalue 0 where the value is free, else 1."""
    s[i, k], z[i, k] = value, dual
    slope[i, k] = 1.0 if dual > 0 or value == 0 else 0.0
    rest[i, k] = 1.0 - slope[i, k]


@helper
def direction(v, E, i, k):
    """Row k of E is v[i] scaled to length 1, without underflow; False where v[i] is zero."""
    largest = max(abs(v[i, 0]), abs(v[i, 1]), abs(v[i, 2]))
    if not largest > 0:
        return False
    x, y, z = v[i, 0] / largest, v[i, 1] / largest, v[i, 2] / largest
    length = math.sqrt(x * x + y * y + z * z)
    E[i, k, 0], E[i, k, 1], E[i, k, 2] = x / length, y / length, z / length
    return True


@helper
def curved(p, s, z, E, slope, rest, i):
    """Rows s/|s|, z/|z| and their cross product of E, with the eigenvalues of the first two.

    False, and the derivative of the nearest smooth point, where rounding leaves s or z zero.
    """
    if not direction(s, E, i, 0):
        plain(p, s, z, E, slope, rest, i, False)
        return False
    if not direction(z, E, i, 1):
        plain(p, s, z, E, slope, rest, i, True)
        return False
    size = 0.0
    for k in range(3):
        a, b = (k + 1) % 3, (k + 2) % 3
        E[i, 2, k] = E[i, 0, a] * E[i, 1, b] - E[i, 0, b] * E[i, 1, a]
        size += E[i, 2, k] ** 2
    for k in range(3):
        E[i, 2, k] /= math.sqrt(size)
    slope[i, 0], slope[i, 1] = 0.0, 1.0
    rest[i, 0], rest[i, 1] = 1.0, 0.0
    return True


@helper
def next_root(low, high, t, value, slope, last):
    """A Newton step that stays inside the bracket and at least halves the step before, else the bracket's middle."""
    trial = t - value / slope
    if low < trial < high and abs(trial - t) <= 0.5 * last:
        return trial
    return 0.5 * (low + high)


@helper
def exponential_point(x, y, t):
    """Ratio x/y of a boundary point, its slope in t, and the coefficients of s and z there, without cancellation.

    Both coefficients are positive between the ratios 1 - y/x and x/y; t runs from -inf at the first to inf.
    """
    up, down = 1.0 / (1.0 + math.exp(-t)), 1.0 / (1.0 + math.exp(t))
    if x > 0 and y > 0:
        low, high = 1.0 - y / x, x / y
        ratio, slope = low * down + high * up, (high - low) * up * down
        a, b = x * (high - low) * up, y * (high - low) * down
    elif y > 0:
        far = math.exp(-t)
        ratio, slope = x / y - far, far
        a, b = y + (ratio - 1.0) * x, y * far
    else:
        far = math.exp(t)
        ratio, slope = 1.0 - y / x + far, far
        a, b = x * far, x - ratio * y
    det = ratio * (ratio - 1.0) + 1.0
    return ratio, slope, a / det, b / det


@helper
def exponential_root(x, y, z):
    """The t whose boundary point has the mismatch 0 in the third coordinate."""
    low, high, t, last = -300.0, 300.0, 0.0, 600.0
    for _ in range(STEPS):
        ratio, dt, a, b = exponential_point(x, y, t)
        det = ratio * (ratio - 1.0) + 1.0
        up, down = math.exp(ratio), math.exp(-ratio)
        value = a * up - b * down - z
        da, db = (x - a * (2.0 * ratio - 1.0)) / det, (-y - b * (2.0 * ratio - 1.0)) / det
        if value > 0:
            high = t
        else:
            low = t
        trial = next_root(low, high, t, value, ((da + a) * up + (b - db) * down) * dt, last)
        last, t = abs(trial - t), trial
        if last <= 2e-16 * max(1.0, abs(t)):
            break
    return t


@entry
def project_exponential(p, s, z, E, slope, rest):
    """Project points p (N, 3) on closure{(x, y, z): y exp(x/y) <= z, y > 0}; all other arguments are results.

    Reference: Friberg, Projection onto the exponential cone: a univariate root-finding problem (2021).
    """
    for i in range(len(p)):
        x, y, h = p[i, 0], p[i, 1], p[i, 2]
        above = (y > 0 and y * math.exp(min(x / y, FARTHEST)) <= h) or (y == 0 and x <= 0 and h >= 0)
        if above or not math.isfinite(x + y + h):
            plain(p, s, z, E, slope, rest, i, True)
        elif (x > 0 and x * math.exp(min(y / x - 1.0, FARTHEST)) <= -h) or (x == 0 and y <= 0 and h <= 0):
            plain(p, s, z, E, slope, rest, i, False)
        elif x <= 0 and y <= 0:
            plain(p, s, z, E, slope, rest, i, True)
            axis(s, z, slope, rest, i, 1, 0.0, -y)
            axis(s, z, slope, rest, i, 2, max(h, 0.0), max(-h, 0.0))
        elif y > 0 and x < -STEEP * y:
            plain(p, s, z, E, slope, rest, i, True)
            axis(s, z, slope, rest, i, 2, max(h, 0.0), max(-h, 0.0))
        elif x > 0 and y < (1.0 - STEEP) * x:
            plain(p, s, z, E, slope, rest, i, False)
            axis(s, z, slope, rest, i, 2, max(h, 0.0), max(-h, 0.0))
        else:
            ratio, _, a, b = exponential_point(x, y, exponential_root(x, y, h))
            s[i, 0], s[i, 1], s[i, 2] = a * ratio, a, a * math.exp(ratio)
            z[i, 0], z[i, 1], z[i, 2] = -b, b * (ratio - 1.0), b * math.exp(-ratio)
            if curved(p, s, z, E, slope, rest, i):
                bend = b * (E[i, 2, 0] - ratio * E[i, 2, 1]) ** 2
                slope[i, 2], rest[i, 2] = bend / (a + bend), a / (a + bend)


@helper
def power_coordinate(x, product):
    """The root of u (u - x) = product that is positive, and u - x, without cancellation."""
    root = math.hypot(x, 2.0 * math.sqrt(product))
    if x >= 0:
        u = 0.5 * (x + root)
        return u, product / u if u > 0 else 0.0
    rest = 0.5 * (root - x)
    return product / rest, rest


@helper
def power_height(x, y, size, alpha):
    """Height r = size / (1 + exp(-t)) of the projection and size - r, by Newton steps on t in a bracket."""
    low, high, t, last, beta = -FARTHEST, FARTHEST, 0.0, 2 * FARTHEST, 1.0 - alpha
    for _ in range(STEPS):
        r, gap = size / (1.0 + math.exp(-t)), size / (1.0 + math.exp(t))
        u, du = power_coordinate(x, alpha * r * gap)
        v, dv = power_coordinate(y, beta * r * gap)
        value = alpha * math.log(u) + beta * math.log(v) - math.log(r)
        slope = (gap - r) * (alpha**2 / (u * (u + du)) + beta**2 / (v * (v + dv))) - 1.0 / r
        slope *= r * gap / size
        if value > 0:
            low = t
        else:
            high = t
        trial = next_root(low, high, t, value, slope, last)
        last, t = abs(trial - t), trial
        if last <= 2e-16 * max(1.0, abs(t)):
            break
    return size / (1.0 + math.exp(-t)), size / (1.0 + math.exp(t))


@helper
def power_plane(p, alpha, s, z, E, slope, rest, i):
    """A point (x, y, 0) with one negative coordinate, whose projection lies on an edge of the cone."""
    plain(p, s, z, E, slope, rest, i, True)
    k = 0 if p[i, 0] < 0 else 1
    own, other = -p[i, k], p[i, 1 - k]
    axis(s, z, slope, rest, i, k, 0.0, own)
    exponent = alpha if k == 0 else 1.0 - alpha
    if exponent > 0.5:
        slope[i, 2] = 1.0
    elif exponent == 0.5:
        slope[i, 2] = 2.0 * own / (other + 2.0 * own)
    rest[i, 2] = 1.0 - slope[i, 2]


@entry
def project_power(p, alpha, s, z, E, slope, rest):
    """Project points p (N, 3) on {(x, y, h): x^alpha y^(1 - alpha) >= |h|, x, y >= 0}, alpha (N,).

    Reference: Hien, Differential properties of Euclidean projection onto power cone (2015).
    """
    for i in range(len(p)):
        x, y, h, a = p[i, 0], p[i, 1], abs(p[i, 2]), alpha[i]
        above = x >= 0 and y >= 0 and x**a * y ** (1.0 - a) >= h
        if above or not math.isfinite(x + y + h):
            plain(p, s, z, E, slope, rest, i, True)
        elif x <= 0 and y <= 0 and (-x / a) ** a * (-y / (1.0 - a)) ** (1.0 - a) >= h:
            plain(p, s, z, E, slope, rest, i, False)
        elif h == 0:
            power_plane(p, a, s, z, E, slope, rest, i)
        else:
            r, gap = power_height(x, y, h, a)
            u, du = power_coordinate(x, a * r * gap)
            v, dv = power_coordinate(y, (1.0 - a) * r * gap)
            sign = 1.0 if p[i, 2] > 0 else -1.0
            s[i, 0], s[i, 1], s[i, 2] = u, v, sign * r
            z[i, 0], z[i, 1], z[i, 2] = du, dv, -sign * gap
            if curved(p, s, z, E, slope, rest, i):
                bend = gap * a * (1.0 - a) * r * (E[i, 2, 0] / u - E[i, 2, 1] / v) ** 2
                sharp = not bend < 1e300  # s is all but zero
                slope[i, 2], rest[i, 2] = 1.0 if sharp else bend / (1.0 + bend), 0.0 if sharp else 1.0 / (1.0 + bend)
