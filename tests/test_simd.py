"""The vector type against numpy, for one lane, several lanes and all operations."""

from pathlib import Path

import numpy as np
import pytest

from convexlearn.solvers.quadratic import simd
from convexlearn.solvers.quadratic.simd import (
    aligned,
    any_gt,
    full,
    get,
    half_power,
    index,
    kernel,
    load,
    power_of_two,
    put,
    store,
    vabs,
    vmax,
    vmin,
    where_gt,
)


@kernel
def arithmetic(w, F):
    x, y = load(w, F, 0), load(w, F, 1)
    store(F, 2, x + y * 2.0 - x / y)
    store(F, 3, vmin(x, y) + vmax(x, 0.5))
    store(F, 4, where_gt(x, y, vabs(x), full(w, -1.0)))
    store(F, 5, power_of_two(vabs(x)))
    store(F, 6, half_power(vabs(x)))
    return any_gt(x, 2.0)


@kernel
def elements(I, F):
    G = aligned(3, 8)
    put(G, 23, get(F, index(I, 1)))
    put(F, 0, get(G, 23) + index(I, 0))
    return G.ctypes.data % 64 + len(G)


@pytest.mark.parametrize("W", [1, 4, 8])
def test_operations_act_lane_by_lane(W):
    rng = np.random.default_rng(W)
    F = rng.normal(size=(7, W))
    x, y = F[0].copy(), F[1].copy()
    flat = F.reshape(-1)
    assert arithmetic((0,) * W, flat) == bool((x > 2).any())
    np.testing.assert_allclose(F[2], x + 2 * y - x / y, rtol=1e-14)
    np.testing.assert_array_equal(F[3], np.minimum(x, y) + np.maximum(x, 0.5))
    np.testing.assert_array_equal(F[4], np.where(x > y, np.abs(x), -1.0))
    np.testing.assert_array_equal(F[5], 2.0 ** np.floor(np.log2(np.abs(x))))
    ratio = F[6] * np.sqrt(np.abs(x))
    assert ((ratio >= 0.99) & (ratio <= 2.01)).all()
    np.testing.assert_array_equal(np.log2(F[6]), np.round(np.log2(F[6])))


def test_selection_does_not_spread_nan():
    F = np.zeros((7, 4))
    F[0], F[1] = [np.nan, 3.0, -1.0, 1.0], [1.0, 1.0, 1.0, np.nan]
    assert arithmetic((0,) * 4, F.reshape(-1))
    np.testing.assert_array_equal(F[4], [-1.0, 3.0, -1.0, -1.0])


def test_elements_and_alignment():
    F = np.array([0.0, 5.0])
    assert elements(np.array([7, 1], dtype=np.int32), F) == 24
    assert F[0] == 12.0


def test_cache_key_covers_every_file_with_compiled_code():
    folder = Path(simd.__file__).parent
    using = {p.name for p in folder.glob("*.py") if "quadratic.simd import" in p.read_text()}
    assert using <= set(simd.KERNEL_FILES)
    assert {"simd.py", "layout.py"} <= set(simd.KERNEL_FILES)
