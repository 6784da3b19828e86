"""Structures: what is encoded is decoded, bit by bit."""

import cvxpy as cp
import numpy as np
import pytest

from convexlearn import ConvexLayer
from convexlearn.program.program import ProgramData
from convexlearn.program.structure import decode, encode


def layer():
    X, t = cp.Variable((2, 2), PSD=True), cp.Variable(3)
    C, d = cp.Parameter((2, 2), PSD=True, name="C"), cp.Parameter((3, 3), diag=True, name="d")
    u = cp.Parameter(3, bounds=[0.1, [1.0, 2.0, np.inf]], name="u")
    cost = cp.sum_squares(X - C) + cp.norm2(d @ t - 1) + cp.sum(cp.exp(t)) + cp.sum_squares(t)
    return ConvexLayer(cp.Problem(cp.Minimize(cost), [t <= u]), [C, d, u], [X, t])


def test_round_trip():
    compiled = layer()._compiled
    found, solver = decode(encode(compiled, "conic").tensor)
    assert solver == "conic"
    assert (found.program.n, found.program.m) == (compiled.program.n, compiled.program.m)
    assert found.program.cones == compiled.program.cones
    for ours, theirs in zip((found.program.P, found.program.A), (compiled.program.P, compiled.program.A)):
        assert (ours.rows == theirs.rows).all()
        assert (ours.cols == theirs.cols).all()
    for name, fixed, expected in zip(ProgramData.FIELDS, found.program.fixed, compiled.program.fixed):
        assert (found.maps[name] != compiled.maps[name]).nnz == 0
        np.testing.assert_array_equal(fixed, expected)
    for ours, theirs in zip(found.parameters, compiled.parameters):
        assert (ours.name, ours.shape) == (theirs.name, theirs.shape)
        assert ours.domain.describe() == theirs.domain.describe()
        for bound in ("lower", "upper"):
            a, b = getattr(ours.domain, bound), getattr(theirs.domain, bound)
            assert (a is None) == (b is None)
            assert a is None or (a == b).all()


def test_digest_depends_on_the_solver():
    compiled = layer()._compiled
    assert encode(compiled, "conic").digest == encode(compiled, "conic").digest
    assert encode(compiled, "conic").digest != encode(compiled, "diffcp").digest


def test_other_versions_are_refused():
    tensor = encode(layer()._compiled, "conic").tensor.clone()
    tensor[2] += 1
    with pytest.raises(ValueError, match="export it anew"):
        decode(tensor)
