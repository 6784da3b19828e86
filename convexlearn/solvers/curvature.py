"""Second derivatives of the projections on cones, in torch operations that can be differentiated again.

With v = z - s the optimality conditions read z = proj(v); V(v) is the derivative of proj, on the central
path (s_i z_i = mu) of its smoothed version. As a derivative of a gradient, that of V is symmetric in all
three directions.
"""

import torch
from torch import Tensor

from convexlearn.errors import OptionError

Shape = tuple[int, int, tuple[int, ...], int]


def is_flat(cones: Shape, smoothing: float) -> bool:
    """Whether V is piecewise constant: zero cones and orthants without smoothing."""
    return not cones[2] and not cones[3] and not smoothing


def curvature(v: Tensor, a: Tensor, b: Tensor, cones: Shape, smoothing: float) -> Tensor:
    """Gradient of a'V(v)b with respect to v, all (B, k, m); cones: (zero, nonneg, soc, rows of others).

    Reference for second-order cones: Fukushima, Luo, Tseng, Smoothing functions for second-order-cone
    complementarity problems (2001).
    """
    zero, nonneg, orders, rest = cones
    if rest:
        raise OptionError(
            "second derivatives through exponential, power and PSD cones are not available; use first derivatives, "
            "or write the problem with second-order cones"
        )
    if smoothing and orders:
        raise OptionError("second derivatives with smoothing need a QP or an LP; leave smoothing=0 here")
    signs = slice(zero, zero + nonneg)
    parts = [torch.zeros_like(v[..., :zero]), _orthant(v[..., signs], a[..., signs], b[..., signs], smoothing)]
    start = zero + nonneg
    for order in orders:
        parts.append(_second_order(*(w[..., start : start + order] for w in (v, a, b))))
        start += order
    return torch.cat(parts, -1)


def _orthant(v: Tensor, a: Tensor, b: Tensor, mu: float) -> Tensor:
    """V = (1 + v / sqrt(v^2 + 4 mu)) / 2, entry by entry."""
    return 2 * mu * (v * v + 4 * mu) ** -1.5 * a * b if mu else torch.zeros_like(v)


def _second_order(v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Cone |u| <= t; V is constant where v lies in the cone or in its polar."""
    t, u = v[..., :1], v[..., 1:]
    norm = (u * u).sum(-1, keepdim=True)
    outside = norm > t * t  # neither in the cone nor in its polar
    rho = torch.where(outside, norm, 1.0).sqrt()
    e, tau = u / rho, t / rho
    (a0, a1), (b0, b1) = ((w[..., :1], w[..., 1:]) for w in (a, b))
    ea, eb, ab = ((p * q).sum(-1, keepdim=True) for p, q in ((e, a1), (e, b1), (a1, b1)))
    tangential = ab - ea * eb
    w = b0 * a1 + a0 * b1 - tau * (eb * a1 + ea * b1)
    w = (w - e * (e * w).sum(-1, keepdim=True)) / rho - tau * tangential / rho * e
    return torch.where(outside, 0.5 * torch.cat([tangential / rho, w], -1), 0.0)
