import cvxpy as cp
import numpy as np
import pytest
import torch
from scipy import sparse

from convexlearn.domains import EPSILON, Domain
from convexlearn.errors import DomainError, OptionError, ShapeError

SPARSE = (np.array([0, 1, 2]), np.array([1, 2, 0]))
L = torch.tensor([[1.0, 0.0, 0.0], [-0.5, 0.3, 0.0], [2.0, 0.1, 1e-2]], dtype=torch.float64)
POSITIVE = torch.tensor([[1e-6, 0.1, 3.0], [50.0, 1e-3, 1.0], [2.0, 7.0, 1e3]], dtype=torch.float64)
UNIT = torch.tensor([[0.1, 0.5, 0.9], [1e-6, 0.3, 1 - 1e-6], [0.2, 0.4, 0.6]], dtype=torch.float64)
SYMMETRIC = L + L.mT

CASES = {
    "unconstrained": ({}, L, "unconstrained"),
    "nonneg": ({"nonneg": True}, POSITIVE, "nonnegative"),
    "pos": ({"pos": True}, POSITIVE, "positive"),
    "nonpos": ({"nonpos": True}, -POSITIVE, "nonpositive"),
    "neg": ({"neg": True}, -POSITIVE, "negative"),
    "symmetric": ({"symmetric": True}, SYMMETRIC, "symmetric"),
    "PSD": ({"PSD": True}, L @ L.mT, "positive semidefinite"),
    "NSD": ({"NSD": True}, -L @ L.mT, "negative semidefinite"),
    "diag": ({"diag": True}, torch.diag(L[2]), "diagonal"),
    "nonneg diag": ({"nonneg": True, "diag": True}, torch.diag(POSITIVE[0]), "nonnegative, diagonal"),
    "sparse": ({"sparsity": SPARSE}, torch.diag(L[2]).roll(1, 1), "sparse with 3 entries"),
    "bounds": ({"bounds": [0, 1]}, UNIT, "between 0 and 1"),
    "array bounds": (
        {"bounds": [np.full((3, 3), -1.0), np.arange(9.0).reshape(3, 3) + 2]},
        UNIT,
        "between -1 and given arrays",
    ),
    "lower bound": ({"bounds": [-1, None]}, POSITIVE, "between -1 and inf"),
    "upper bound": ({"bounds": [-np.inf, 2000]}, POSITIVE, "between -inf and 2000"),
    "nonneg and bound": ({"nonneg": True, "bounds": [-1, 2e3]}, POSITIVE, "nonnegative, between -1 and 2000"),
}


@pytest.mark.parametrize("name", CASES)
def test_free_coordinates_are_a_bijection(name):
    attributes, value, words = CASES[name]
    domain = Domain.from_attributes((3, 3), attributes)
    back = domain.from_free(domain.to_free(value))
    torch.testing.assert_close(back, value, rtol=1e-12, atol=1e-12)
    assert domain.describe() == words
    assert domain.violation(value) <= 0
    domain.check("P", value)


@pytest.mark.parametrize("name", CASES)
def test_every_free_coordinate_gives_a_value_inside(name):
    attributes, value, _ = CASES[name]
    domain = Domain.from_attributes((3, 3), attributes)
    free = domain.to_free(torch.stack([value, value])).detach()
    generator = torch.Generator().manual_seed(0)
    free = 3 * torch.randn(free.shape, generator=generator, dtype=free.dtype)
    values = domain.from_free(free)
    assert values.shape == (2, 3, 3)
    assert (domain.violation(values) <= 0).all()
    assert torch.autograd.gradcheck(domain.from_free, free.requires_grad_())
    torch.testing.assert_close(domain.to_free(values), free, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["nonneg", "pos", "nonpos", "neg", "bounds", "lower bound", "upper bound"])
def test_scalars(name):
    attributes = CASES[name][0]
    sign = -1 if name in ("nonpos", "neg") else 1
    domain = Domain.from_attributes((), attributes)
    value = torch.tensor(sign * 0.25, dtype=torch.float64)
    assert domain.from_free(domain.to_free(value)).item() == pytest.approx(sign * 0.25, rel=1e-12)


@pytest.mark.parametrize(
    ("attributes", "value", "start"),
    [
        ({"nonneg": True}, [0.0, 2.0], [2 * EPSILON, 2.0]),
        ({"nonneg": True}, [0.0, 0.0], [EPSILON, EPSILON]),
        ({"nonpos": True}, [0.0, -2.0], [-2 * EPSILON, -2.0]),
        ({"bounds": [0, 10]}, [0.0, 10.0], [10 * EPSILON, 10 - 10 * EPSILON]),
        ({"bounds": [1, np.inf]}, [1.0, 4.0], [1 + 4 * EPSILON, 4.0]),
    ],
)
def test_a_value_on_the_boundary_starts_inside(attributes, value, start):
    domain = Domain.from_attributes((2,), attributes)
    free = domain.to_free(torch.tensor(value, dtype=torch.float64)).requires_grad_()
    begin = domain.from_free(free)
    torch.testing.assert_close(begin.detach(), torch.tensor(start, dtype=torch.float64), rtol=1e-9, atol=0)
    (gradient,) = torch.autograd.grad(begin.sum(), free)
    assert (gradient.abs() > EPSILON / 10).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_singular_matrix_starts_inside(sign):
    domain = Domain.from_attributes((2, 2), {"PSD" if sign > 0 else "NSD": True})
    value = sign * torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    begin = domain.from_free(domain.to_free(value))
    eye = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(begin, value + sign * EPSILON * eye, rtol=1e-9, atol=1e-12)
    zero = domain.from_free(domain.to_free(0 * value))
    torch.testing.assert_close(zero, sign * EPSILON * eye, rtol=1e-9, atol=1e-12)


def test_equal_bounds_fix_the_entry():
    domain = Domain.from_attributes((2,), {"bounds": [np.array([1.0, 0.0]), np.array([1.0, 2.0])]})
    value = torch.tensor([1.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(domain.from_free(domain.to_free(value)), value, rtol=1e-12, atol=0)


def test_sparse_bounds_bind_their_entries_only():
    lower = sparse.coo_array((np.zeros(3), SPARSE), shape=(3, 3))
    domain = Domain.from_attributes((3, 3), {"sparsity": SPARSE, "bounds": [lower, None]})
    value = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)).roll(1, 1)
    torch.testing.assert_close(domain.from_free(domain.to_free(value)), value, rtol=1e-12, atol=0)
    assert domain.violation(-value) > 0


@pytest.mark.parametrize(
    ("attributes", "bad", "message"),
    [
        ({"nonneg": True}, [[1.0, 2.0], [3.0, -0.5]], r"'rho' must be nonnegative.*element 1 is -0.5 at entry 1"),
        ({"bounds": [0, 1]}, [[0.0, 1.0], [1.5, 0.0]], r"between 0 and 1.*element 1 is 1.5 at entry 0"),
        ({"neg": True}, [[1.0, -2.0], [-3.0, -0.5]], r"negative.*element 0 is 1 at entry 0"),
    ],
)
def test_a_violation_names_parameter_element_and_entry(attributes, bad, message):
    domain = Domain.from_attributes((2,), attributes)
    value = torch.tensor(bad, dtype=torch.float64)
    assert (domain.violation(value) > 0).sum() == 1
    with pytest.raises(DomainError, match=message):
        domain.check("rho", value)


def test_violation_leaves_room_for_finite_differences():
    domain = Domain.from_attributes((2,), {"nonneg": True})
    value = torch.tensor([[0.0, -9e-6], [0.0, -1.1e-5], [1e6, -1e-3]], dtype=torch.float64)
    assert (domain.violation(value) > 0).tolist() == [False, True, True]


def test_psd_violation_is_relative_to_the_matrix():
    domain = Domain.from_attributes((2, 2), {"PSD": True})
    base = torch.diag(torch.tensor([1e4, 0.0], dtype=torch.float64))
    shift = torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64))
    values = torch.stack([base - 5e-5 * shift, base - 2e-4 * shift, base, 0 * base])
    assert (domain.violation(values) > 0).tolist() == [False, True, False, False]
    with pytest.raises(DomainError, match=r"'P' must be positive semidefinite.*element 1.*eigenvalue -0.0002"):
        domain.check("P", values)


def test_symmetry_is_no_domain():
    value = torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)
    domain = Domain.from_attributes((2, 2), {"symmetric": True})
    assert domain.violation(value) <= 0
    assert torch.equal(domain.symmetrise(value), torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("attributes", [{"diag": True}, {"sparsity": ([0, 1], [0, 1])}])
def test_entries_off_the_pattern_are_outside(attributes):
    domain = Domain.from_attributes((2, 2), attributes)
    value = torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=torch.float64)
    with pytest.raises(DomainError, match=r"0\.5 at entry \(0, 1\)"):
        domain.check("D", value)


def test_empty_batch_and_empty_parameter():
    assert Domain.from_attributes((2,), {"nonneg": True}).violation(torch.zeros(0, 2)).shape == (0,)
    empty = Domain.from_attributes((0,), {"nonneg": True})
    assert empty.violation(torch.zeros(4, 0)).tolist() == [0, 0, 0, 0]
    assert empty.from_free(empty.to_free(torch.zeros(0))).shape == (0,)


@pytest.mark.parametrize(
    ("shape", "attributes", "error", "message"),
    [
        ((2,), {"integer": True}, OptionError, "'integer' has no differentiable domain"),
        ((2,), {"boolean": [(0,)]}, OptionError, "'boolean'.*bounds"),
        ((2,), {"nonnegative": True}, OptionError, "unknown option 'nonnegative'; did you mean"),
        ((2, 3), {"PSD": True}, ShapeError, "square"),
        ((2, 2), {"PSD": True, "diag": True}, OptionError, "one structure"),
        ((2,), {"nonneg": True, "bounds": [-2, -1]}, OptionError, "no value"),
    ],
)
def test_refused_attributes(shape, attributes, error, message):
    with pytest.raises(error, match=message):
        Domain.from_attributes(shape, attributes)


def test_parametric_bounds_are_refused():
    with pytest.raises(OptionError, match="as constraints"):
        Domain.from_attributes((), {"bounds": [cp.Parameter(), 1.0]})


def test_bounded_psd_cannot_be_learned():
    domain = Domain.from_attributes((2, 2), {"PSD": True, "nonneg": True})
    with pytest.raises(OptionError, match="learn a factor"):
        domain.to_free(torch.eye(2))


@pytest.mark.parametrize(
    "options",
    [
        {"nonneg": True},
        {"PSD": True},
        {"diag": True},
        {"bounds": [0, 1]},
        {"sparsity": [(0, 1), (1, 0)]},
        {"symmetric": True},
        {"bounds": [np.zeros((2, 2)), np.ones((2, 2))]},
    ],
)
def test_understands_cvxpy(options):
    parameter = cp.Parameter((2, 2), **options)
    domain = Domain.from_attributes(parameter.shape, parameter.attributes, parameter.sparse_idx)
    free = domain.to_free(torch.full((2, 2), 0.25, dtype=torch.float64))
    value = domain.from_free(torch.full_like(free, 0.3)).numpy()
    if "sparsity" in options:
        entries = sparse.coo_array((value[parameter.sparse_idx], parameter.sparse_idx), shape=(2, 2))
        parameter.value_sparse = entries
        assert np.array_equal(entries.toarray(), value)
    else:
        parameter.value = value  # CVXPY raises outside the domain
