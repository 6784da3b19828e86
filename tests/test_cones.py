"""Projections and their derivatives: Moreau's decomposition characterises them, central differences check the slope."""

import numpy as np
import pytest

from convexlearn.program.program import Cones
from convexlearn.solvers.cones import groups, matrix_of, project, project_dual, psd_order, split, triangle_of

CONES = {
    "zero and nonnegative": Cones(zero=2, nonneg=3),
    "second-order": Cones(soc=(1, 2, 3, 5, 5)),
    "PSD": Cones(psd=(1, 2, 3, 3, 4)),
    "exponential": Cones(exp=2),
    "power": Cones(power=(0.5, 0.2, 0.9)),
    "all": Cones(zero=1, nonneg=2, soc=(3,), psd=(3,), exp=1, power=(0.3,)),
}


@pytest.fixture(params=CONES)
def cones(request):
    return CONES[request.param]


def points(cones, batch, spread=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((batch, cones.size)) * 10 ** rng.uniform(-spread, spread, (batch, cones.size))


def violation(cones, s, dual=False):
    """How far s (B, m) is outside the cone, or the dual cone, by its definition; relative to its size."""
    free, signed = s[:, : cones.zero], s[:, cones.zero : cones.zero + cones.nonneg]
    worst = [np.zeros(len(s)), (-signed).max(1, initial=0.0)]
    worst += [] if dual else [np.abs(free).max(1, initial=0.0)]
    for group in groups(cones)[1]:
        for k, rows in enumerate(group.rows):
            part = s[:, rows]
            worst.append(_outside(group, k, part, dual))
    return np.max(worst, 0) / np.abs(s).max(1).clip(min=1e-300)


def _outside(group, k, s, dual):
    if group.kind == "soc":
        return np.linalg.norm(s[:, 1:], axis=1) - s[:, 0]
    if group.kind == "psd":
        return -np.linalg.eigvalsh(matrix_of(s))[:, 0]
    if group.kind == "power":
        a = group.alpha[k]
        x, y = (s[:, 0] / a, s[:, 1] / (1 - a)) if dual else (s[:, 0], s[:, 1])
        height = x.clip(min=0) ** a * y.clip(min=0) ** (1 - a)
        return np.maximum(np.abs(s[:, 2]) - height, -np.minimum(x, y))
    x, y, z = s.T
    if dual:  # {(x, y, z): x < 0, -x exp(y/x) <= e z} and its closure {x = 0, y, z >= 0}
        with np.errstate(all="ignore"):
            curved = np.where(x < 0, -x * np.exp(np.clip(y / x - 1, -700, 700)) - z, np.maximum(-y, -z))
        return np.maximum(curved, x)
    with np.errstate(all="ignore"):
        curved = np.where(y > 0, y * np.exp(np.clip(x / y, -700, 700)) - z, np.maximum(x, -z))
    return np.maximum(curved, -y)


class TestDecomposition:
    @pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
    def test_parts_lie_in_their_cones_and_are_orthogonal(self, cones, spread):
        v = points(cones, 3000, spread)
        found = split(cones, v)
        size = np.abs(v).max(1, keepdims=True)
        np.testing.assert_allclose((found.dual - found.primal) / size, v / size, atol=2e-13)
        assert np.abs((found.dual * found.primal).sum(1) / size[:, 0] ** 2).max() < 1e-14
        assert violation(cones, found.primal).max() < 1e-12
        assert violation(cones, found.dual, dual=True).max() < 1e-12

    def test_projections_are_idempotent(self, cones):
        v = points(cones, 1000)
        size = np.abs(v).max(1, keepdims=True)
        for projection in (project, project_dual):
            once = projection(cones, v)
            np.testing.assert_allclose(projection(cones, once) / size, once / size, atol=1e-12)

    def test_known_points(self):
        half = np.sqrt(0.5)
        np.testing.assert_allclose(project(Cones(soc=(2,)), np.array([[0.0, 1.0]])), [[0.5, 0.5]], atol=1e-15)
        np.testing.assert_allclose(project(Cones(soc=(3,)), np.array([[-2.0, 1.0, 0.0]])), 0.0, atol=1e-15)
        swap = triangle_of(np.array([[[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]]]))
        half_ones = triangle_of(np.array([[[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]]))
        np.testing.assert_allclose(project(Cones(psd=(3,)), swap), half_ones, atol=1e-15)
        # alpha = 1/2: x y >= z^2 is a rotated second-order cone
        x, y, z = np.random.default_rng(1).standard_normal((3, 200))
        rotated = np.stack([half * (x + y), half * (x - y), np.sqrt(2) * z], 1)
        ball = project(Cones(soc=(3,)), rotated * [1, 1, 1])
        found = project(Cones(power=(0.5,)), np.stack([x, y, z], 1))
        inside = half * (x + y) >= np.hypot(half * (x - y), np.sqrt(2) * z)
        np.testing.assert_allclose(found[inside], np.stack([x, y, z], 1)[inside], atol=1e-14)
        np.testing.assert_allclose(ball[inside], rotated[inside], atol=1e-14)

    def test_faces_of_the_exponential_cone(self):
        found = project(Cones(exp=1), np.array([[-1.0, -2.0, 3.0], [-1.0, -2.0, -3.0], [0.0, 0.0, 1.0]]))
        np.testing.assert_array_equal(found, [[-1.0, 0.0, 3.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])


class TestDerivative:
    def test_agrees_with_central_differences(self, cones):
        v, h = points(cones, 400, 0.3), points(cones, 400, 0.0, seed=1)
        step = 1e-6
        expected = (split(cones, v + step * h).dual - split(cones, v - step * h).dual) / (2 * step)
        error = np.abs(split(cones, v).derivative(h) - expected).max(1)
        # a difference across a kink, or next to strong curvature, is no derivative
        assert np.quantile(error, 0.5) < 1e-8
        assert np.quantile(error, 0.95) < 1e-5

    def test_basis_is_orthonormal_and_slopes_add_up(self, cones):
        v, h = points(cones, 500, 3.0), points(cones, 500, 0.0, seed=1)
        found = split(cones, v)
        np.testing.assert_allclose(found.back(found.rotate(h)), h, atol=1e-12)
        np.testing.assert_allclose(np.square(found.rotate(h)).sum(1), np.square(h).sum(1), rtol=1e-12)
        np.testing.assert_allclose(found.slope + found.rest, 1.0, atol=1e-15)
        assert found.slope.min() >= 0
        assert found.rest.min() >= 0

    def test_is_homogeneous(self, cones):
        v = points(cones, 500)
        found = split(cones, v)
        size = np.abs(v).max(1, keepdims=True)
        np.testing.assert_allclose(found.derivative(v) / size, found.dual / size, atol=1e-12)

    @pytest.mark.parametrize("kind", ["zeros", "axes", "boundary"])
    def test_is_finite_where_the_projection_has_kinks(self, cones, kind):
        v = {
            "zeros": np.zeros((1, cones.size)),
            "axes": np.concatenate([np.eye(cones.size), -np.eye(cones.size)]),
            "boundary": split(cones, points(cones, 200)).dual,
        }[kind]
        found = split(cones, v)
        h = points(cones, len(v), 0.0)
        assert np.isfinite(found.derivative(h)).all()
        assert (np.linalg.norm(found.derivative(h), axis=1) <= np.linalg.norm(h, axis=1) * (1 + 1e-12)).all()

    @pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8])
    def test_edges_of_the_power_cone(self, alpha):
        """At (x, -y, 0) the third coordinate moves freely, partly or not, by the exponent of the second."""
        cones, step = Cones(power=(alpha,)), 1e-7
        v, h = -np.array([[2.0, -1.0, 0.0]]), np.array([[0.0, 0.0, 1.0]])
        expected = (split(cones, v + step * h).dual - split(cones, v - step * h).dual) / (2 * step)
        np.testing.assert_allclose(split(cones, v).derivative(h), expected, atol=5e-3)


def test_triangles():
    assert [psd_order(k * (k + 1) // 2) for k in range(1, 40)] == list(range(1, 40))
    G = np.random.default_rng(0).standard_normal((4, 5, 5))
    X = G + G.swapaxes(1, 2)
    np.testing.assert_allclose(matrix_of(triangle_of(X)), X, atol=1e-15)
    np.testing.assert_allclose(np.square(triangle_of(X)).sum(1), np.square(X).sum((1, 2)))


def test_rows_follow_the_program():
    count, found = groups(Cones(zero=1, nonneg=1, soc=(3, 2, 3), psd=(2,), exp=1, power=(0.4,)))
    assert count == 2
    assert [(g.kind, g.rows.tolist()) for g in found] == [
        ("soc", [[2, 3, 4], [7, 8, 9]]),
        ("soc", [[5, 6]]),
        ("psd", [[10, 11, 12]]),
        ("exp", [[13, 14, 15]]),
        ("power", [[16, 17, 18]]),
    ]
