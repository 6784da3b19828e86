"""Affine expressions of CVXPY as maps in torch."""

import cvxpy as cp
import numpy as np
import pytest
import torch

from convexlearn.affine_maps import affine_map
from convexlearn.errors import CompileError

RNG = np.random.default_rng(0)
H = cp.Parameter((3, 4), name="H", value=RNG.normal(size=(3, 4)))
P = cp.Parameter((2, 2), name="P", value=RNG.normal(size=(2, 2)))
x = cp.Parameter(3, name="x", value=RNG.normal(size=3))
s, M = cp.Variable(4, value=RNG.normal(size=4)), cp.Variable((2, 3), value=RNG.normal(size=(2, 3)))
C = RNG.normal(size=(3, 4))
EXPRESSIONS = {
    "parametric": x - H @ s, "fixed": x - C @ s, "left": P @ M, "transposed": M.T @ P + 1, "all": M, "slice": s[1:3],
    "sum": cp.sum(s), "right": M @ C, "stack": cp.hstack([s, cp.reshape(M, (6,), order="F")]), "kron": 2 * M[0] - x,
}  # fmt: skip


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_value_and_adjoint(name):
    expression = EXPRESSIONS[name]
    mapped = affine_map(expression, [s, M])
    values = {p.name(): torch.tensor(p.value.ravel()) for p in (H, P, x)}
    z = torch.tensor(np.concatenate([s.value, M.value.ravel()]))[None]
    linear = mapped.matrix(values, z)
    found = linear(z) + mapped.offset(values, z)
    np.testing.assert_allclose(found[0].numpy(), np.ravel(expression.value), atol=1e-14)
    v = torch.randn(2, mapped.rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(linear.adjoint(v), v @ linear.dense())
    batched = {name: torch.stack([value, 2 * value]) for name, value in values.items()}
    both = mapped.matrix(batched, z)(z.expand(2, -1)) + mapped.offset(batched, z)
    torch.testing.assert_close(both[0], found[0])


def test_structure_is_recognised():
    assert affine_map(3 * s, [s, M]).fixed.tight == pytest.approx(9)
    assert affine_map(s, [s]).fixed.is_identity
    assert affine_map(cp.sum(s), [s]).fixed.tight == pytest.approx(4)
    assert affine_map(C @ s, [s]).fixed.tight is None
    assert affine_map(cp.multiply(np.arange(1, 5), s), [s]).fixed.row_products.tolist() == pytest.approx([1, 4, 9, 16])


def test_a_large_sparse_map_is_read_quickly_and_applied_sparsely():
    L, S = cp.Variable((300, 20)), cp.Variable((300, 20))
    mapped = affine_map(L + S, [L, S])
    assert mapped.fixed.matrix.is_sparse
    assert mapped.fixed.norm_squared().item() == pytest.approx(2)


def test_other_expressions_are_refused():
    with pytest.raises(CompileError, match="as an affine expression"):
        affine_map(cp.abs(s), [s])
    with pytest.raises(CompileError, match="complex constants"):
        affine_map((1 + 2j) * s, [s])
