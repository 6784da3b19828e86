"""Second derivatives of projections against central differences of first ones."""

import pytest
import torch
from reference import close
from transform_cases import normal

from convexlearn.errors import OptionError
from convexlearn.program.program import Cones
from convexlearn.solvers.cones import split
from convexlearn.solvers.curvature import curvature, is_flat

CONES = Cones(zero=1, nonneg=2, soc=(3, 4))
SHAPE = (1, 2, (3, 4), 0)


def bilinear(v, a, b):
    """a'V(v)b of the projection on the dual cone, by the solvers' own derivative."""
    return (a.numpy() * split(CONES, v.numpy()).derivative(b.numpy())).sum(1)


@pytest.mark.parametrize("seed", range(4))
def test_second_order_cones(seed):
    v, a, b, direction = (normal(5, CONES.size, seed=10 * seed + k) for k in range(4))
    found = curvature(v[:, None], a[:, None], b[:, None], SHAPE, 0.0)[:, 0]
    step = 1e-6
    expected = (bilinear(v + step * direction, a, b) - bilinear(v - step * direction, a, b)) / (2 * step)
    close((found * direction).sum(1), torch.from_numpy(expected), 1e-6)
    for other in (curvature(v, b, a, SHAPE, 0.0), curvature(v, found * 0 + a, b, SHAPE, 0.0)):
        close(other, found)
    close((curvature(v, direction, b, SHAPE, 0.0) * a).sum(1), (found * direction).sum(1))


def test_inside_and_outside_of_the_cone_it_is_flat():
    v = torch.tensor([[0.0, 1.0, -1.0, 3.0, 1.0, 1.0, -3.0, 1.0, 1.0, 0.5]], dtype=torch.float64)
    assert not curvature(v, torch.ones_like(v), torch.ones_like(v), SHAPE, 0.0).any()


def test_smoothed_orthant():
    mu, step = 1e-2, 1e-5
    v, a, b = (normal(3, 2, seed=k) for k in range(3))
    slope = lambda u: a * b * 0.5 * (1 + u / (u * u + 4 * mu).sqrt())  # noqa: E731
    close(curvature(v, a, b, (0, 2, (), 0), mu), (slope(v + step) - slope(v - step)) / (2 * step), 1e-7)


def test_what_is_flat_and_what_is_not_available():
    assert is_flat((2, 3, (), 0), 0.0)
    assert not is_flat((2, 3, (), 0), 1e-3)
    assert not is_flat((0, 0, (3,), 0), 0.0)
    v = normal(1, 3)
    with pytest.raises(OptionError, match="write the problem with second-order cones"):
        curvature(v, v, v, (0, 0, (), 3), 0.0)
    with pytest.raises(OptionError, match="leave smoothing=0"):
        curvature(v, v, v, (0, 0, (3,), 0), 1e-3)
