"""Values come back from JSON and tensors as they were; nothing else is accepted."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from convexlearn.errors import FileError
from convexlearn.plain_data import Packer, Unpacker

VALUES = [
    *(None, True, 3, -0.1, math.inf, -math.inf, "text", 1 + 2j, Fraction(2, 3), ..., slice(None, 3, -1)),
    *((1, [2, (3,)]), {"a": {"b": [None]}}, (), [], {}, torch.float32),
]
TENSORS = [
    torch.randn(2, 3, generator=torch.Generator().manual_seed(0)),
    torch.tensor([], dtype=torch.float64).reshape(0, 4),
    torch.tensor(1 + 2j, dtype=torch.complex128),
    torch.arange(6).reshape(2, 3).mT,
    torch.tensor([True, False]),
    torch.ones(3).expand(2, 3),
]


def through_json(value):
    packer = Packer()
    node = json.loads(json.dumps(packer.pack(value)))
    return Unpacker(packer.tensors).unpack(node)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_plain_values_come_back(value):
    again = through_json(value)
    assert again == value
    assert type(again) is type(value)


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda t: f"{t.dtype} {tuple(t.shape)}")
def test_tensors_and_arrays_come_back(tensor):
    again = through_json(tensor)
    assert again.dtype == tensor.dtype
    assert torch.equal(again, tensor)
    array = through_json(tensor.numpy())
    assert array.dtype == tensor.numpy().dtype
    assert np.array_equal(array, tensor.numpy())


def test_nan_comes_back():
    assert math.isnan(through_json(math.nan))


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "dia", "lil"])
def test_sparse_matrices_come_back(form):
    matrix = sp.random_array((5, 4), density=0.4, rng=np.random.default_rng(0)).asformat(form)
    again = through_json(matrix)
    assert again.shape == (5, 4)
    assert np.array_equal(again.toarray(), matrix.toarray())


@pytest.mark.parametrize("value", [object(), {1, 2}, {1: 2}, b"bytes", np.array([object()]), print, [[lambda: 0]]])
def test_what_is_not_plain_is_refused_by_name(value):
    with pytest.raises(FileError, match="the rule"):
        Packer().pack(value, "the rule")


HOSTILE = [
    *([1], {}, {"a": 1, "b": 2}, {"builtins.eval": "1"}, {"tensor": "9"}, {"tensor": [1]}, {"dtype": "load"}),
    *({"float": "1"}, {"slice": [1, 2, 3, 4]}, {"fraction": [1, 0]}, {"tuple": 3}, {"dict": []}),
    *({"sparse": ["csr", [2, 2], []]}, {"sparse": ["pickle", [2, 2], []]}, {"array": {"list": []}}),
]


@pytest.mark.parametrize("node", HOSTILE, ids=str)
def test_unknown_or_malformed_nodes_are_refused(node):
    with pytest.raises(FileError):
        Unpacker({}).unpack(node)


def test_endless_nesting_is_refused():
    node = 1
    for _ in range(500):
        node = {"tuple": [node]}
    with pytest.raises(FileError, match="nested more than"):
        Unpacker({}).unpack(node)


def test_a_sparse_matrix_with_indices_outside_is_refused():
    packer = Packer()
    parts = [packer.pack(np.array(v)) for v in ([1.0], [7], [0, 1, 1])]
    with pytest.raises(FileError, match="sparse"):
        Unpacker(packer.tensors).unpack({"sparse": ["csr", [2, 2], parts]})
