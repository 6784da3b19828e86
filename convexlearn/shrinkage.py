"""Shrinkages that are no proximal maps: thresholds in units of the data, as unfolded networks learn them."""

from collections.abc import Callable

import torch
from torch import Tensor

from convexlearn.errors import ShapeError
from convexlearn.prox import PROXIMABLE
from convexlearn.prox_arguments import as_signal, as_weight, per_sample
from convexlearn.spectral import shrink_singular_values


def relative_singular_value_threshold(v: Tensor, t: Tensor | float) -> Tensor:
    """U (S - t s_1)_+ V^H of matrices v `(B, p, q)`, s_1 their largest singular value; t scalar or `(B, 1, 1)`.

    Source: CORONA, Solomon et al. 2019 (reference 37 of the paper), which keeps t below 0.4.

    >>> relative_singular_value_threshold(torch.diag(torch.tensor([4.0, 3.0]))[None], 0.5).round(decimals=4).abs()
    tensor([[[2., 0.],
             [0., 1.]]])
    """
    v = as_signal("relative_singular_value_threshold", v, (3,))
    t = torch.as_tensor(per_sample("relative_singular_value_threshold", t, v, "t"), dtype=v.real.dtype, device=v.device)
    return shrink_singular_values(v, t[..., 0, 0] if t.ndim >= 2 else t, relative=True)


def relative_soft_threshold(v: Tensor, t: Tensor | float) -> Tensor:
    """(1 - t m/|v|)_+ v entry by entry, real or complex: t in units of m, the mean of |v| over a sample's entries.

    >>> relative_soft_threshold(torch.tensor([[1.0, -3.0]]), 1.0)
    tensor([[ 0., -1.]])
    """
    v, t = _arguments("relative_soft_threshold", v, t)
    return PROXIMABLE["norm1"].bare(v, t * v.abs().mean(tuple(range(1, v.ndim)), keepdim=True))


def relative_power_threshold(v: Tensor, t: Tensor | float) -> Tensor:
    """(1 - t m/|v|^2)_+ v entry by entry, real or complex: m is the mean of |v|^2 over a sample's entries.

    Large entries pass almost unchanged, other than by a soft threshold. Source: CORONA, Solomon et al. 2019, which
    keeps t below 1.8.

    >>> relative_power_threshold(torch.tensor([[1.0, -3.0]]), 1.0)
    tensor([[ 0.0000, -1.3333]])
    """
    v, t = _arguments("relative_power_threshold", v, t)
    power = v.abs().square() if v.is_complex() else v.square()
    level = t * power.mean(tuple(range(1, v.ndim)), keepdim=True)
    above = ~(power <= level)  # NaN stays NaN
    return torch.where(above, v * (1 - level / torch.where(above, power, torch.ones_like(power))), torch.zeros_like(v))


def _arguments(name: str, v: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor | float]:
    v = as_signal(name, v)
    if v.ndim < 2:
        raise ShapeError(f"{name}: v must have shape (B, ...) with entries to average over, got {tuple(v.shape)}")
    return v, as_weight(name, t, v, v.shape)


SHRINKAGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relative_nuclear": relative_singular_value_threshold,
    "relative_norm1": relative_soft_threshold,
    "relative_power": relative_power_threshold,
}
"""Fillings of prox slots by name, beside the proximal maps of PROXIMABLE; without guarantees of convergence."""
