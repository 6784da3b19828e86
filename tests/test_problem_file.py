"""CVXPY problems come back from plain data: every atom of the table, every attribute, and nothing beside them."""

import json

import cvxpy as cp
import numpy as np
import pytest
import scipy.sparse as sp

from convexlearn.errors import FileError
from convexlearn.plain_data import Packer, Unpacker
from convexlearn.program.declaration import value_of
from convexlearn.program.problem_file import ARGUMENTS, ATOMS, CONSTRAINTS, ProblemPacker, ProblemUnpacker

x, y = cp.Variable(3, name="x"), cp.Variable(3, name="y")
X, S = cp.Variable((3, 3), name="X"), cp.Variable((3, 3), name="S", PSD=True)
Z, t = cp.Variable((2, 2), name="Z", complex=True), cp.Variable(name="t", pos=True)
p = cp.Parameter(3, name="p", nonneg=True, value=np.array([0.5, 1.0, 2.0]))
M = cp.Parameter(name="M", nonneg=True, value=1.5)
eye = np.eye(3)

EXAMPLES = {
    "AddExpression": x + y + p + 1,
    "Concatenate": cp.concatenate([X, S], axis=1),
    "DivExpression": x / 2,
    "MulExpression": X @ x,
    "multiply": cp.multiply(p, x),
    "conj": cp.conj(Z),
    "convolve": cp.convolve(np.ones(2), x),
    "Hstack": cp.hstack([x, y, 1]),
    "Vstack": cp.vstack([x, y]),
    "imag": cp.imag(Z),
    "real": cp.real(Z),
    "kron": cp.kron(np.ones((2, 1)), X),
    "Trace": cp.trace(X),
    "NegExpression": -x,
    "upper_tri": cp.upper_tri(X),
    "hermitian_wrap": cp.atoms.affine.wraps.hermitian_wrap(Z),
    "nonneg_wrap": cp.atoms.affine.wraps.nonneg_wrap(x),
    "nonpos_wrap": cp.atoms.affine.wraps.nonpos_wrap(x),
    "nsd_wrap": cp.atoms.affine.wraps.nsd_wrap(X),
    "psd_wrap": cp.psd_wrap(X),
    "skew_symmetric_wrap": cp.atoms.affine.wraps.skew_symmetric_wrap(X),
    "symmetric_wrap": cp.atoms.affine.wraps.symmetric_wrap(X),
    "abs": cp.abs(x),
    "dotsort": cp.dotsort(x, np.array([1.0, 2.0, 3.0])),
    "entr": cp.entr(x),
    "exp": cp.exp(x),
    "kl_div": cp.kl_div(x, y),
    "log": cp.log(x),
    "log1p": cp.log1p(x),
    "logistic": cp.logistic(x),
    "maximum": cp.maximum(x, y, 0),
    "minimum": cp.minimum(x, y),
    "rel_entr": cp.rel_entr(x, y),
    "xexp": cp.xexp(x),
    "eye_minus_inv": cp.eye_minus_inv(0.1 * X),
    "gen_lambda_max": cp.gen_lambda_max(S, S + eye),
    "lambda_max": cp.lambda_max(S),
    "log_det": cp.log_det(S),
    "MatrixFrac": cp.matrix_frac(x, S),
    "normNuc": cp.normNuc(X),
    "one_minus_pos": cp.one_minus_pos(0.1 * x),
    "pf_eigenvalue": cp.pf_eigenvalue(X),
    "QuadForm": cp.quad_form(x, np.diag([1.0, 2.0, 3.0])),
    "sigma_max": cp.sigma_max(X),
    "tr_inv": cp.tr_inv(S),
    "dist_ratio": cp.dist_ratio(x, np.zeros(3), np.ones(3)),
    "condition_number": cp.condition_number(S),
    "Sum": cp.sum(X, axis=0, keepdims=True),
    "norm1": cp.norm1(X, axis=1, keepdims=True),
    "norm_inf": cp.norm_inf(X, axis=1, keepdims=True),
    "log_sum_exp": cp.log_sum_exp(X, axis=0),
    "max": cp.max(X, axis=0),
    "min": cp.min(X),
    "Prod": cp.prod(X, axis=0),
    "quad_over_lin": cp.quad_over_lin(x, t),
    "Pnorm": cp.pnorm(x, 3, approx=False),
    "PnormApprox": cp.pnorm(x, 2.5, approx=True),
    "GeoMean": cp.geo_mean(x, [1, 2, 0], approx=False),
    "GeoMeanApprox": cp.geo_mean(x, [1, 2, 0], approx=True) + cp.geo_mean(x),
    "Power": cp.power(x, 1.3, approx=False),
    "PowerApprox": cp.power(x, 1.3, approx=True),
    "diag_mat": cp.diag(X, 1),
    "diag_vec": cp.diag(x, -1),
    "cumsum": cp.cumsum(X, axis=1),
    "cummax": cp.cummax(X, axis=1),
    "cumprod": cp.cumprod(X, axis=1),
    "Promote": cp.promote(t, (2, 2)),
    "broadcast_to": cp.broadcast_to(x, (2, 3)),
    "gmatmul": cp.gmatmul(np.array([[1.0, 2.0]]), cp.Variable(2, name="q", pos=True)),
    "huber": cp.huber(x, M),
    "index": X[::-1, 1],
    "lambda_sum_largest": cp.lambda_sum_largest(S, 2),
    "reshape": cp.reshape(X, (9, 1), order="C"),
    "special_index": X[[0, 2], :],
    "sum_largest": cp.sum_largest(x, 2),
    "transpose": cp.transpose(X),
}


def again(*items):
    """Items through JSON; those of the same name keep what they share."""
    packer = Packer()
    problems = ProblemPacker(packer)
    packer.others = lambda value, where: problems.pack(value)
    packed = json.loads(json.dumps([packer.pack(item) for item in items]))
    nodes = json.loads(json.dumps(problems.nodes))
    problems.verify(ProblemUnpacker(Unpacker(packer.tensors)))
    unpacker = Unpacker(packer.tensors)
    ProblemUnpacker(unpacker).rebuild(nodes)
    return [unpacker.unpack(node) for node in packed]


def fill(expression, seed):
    """Values of all variables by name; positive, the PSD one positive definite."""
    rng = np.random.default_rng(seed)
    for leaf in sorted(expression.variables(), key=lambda v: v.name()):
        value = rng.uniform(0.2, 1.0, leaf.shape)
        if leaf.name() == "S":
            value = value @ value.T + np.eye(3)
        leaf.value = value + 1j * rng.uniform(size=leaf.shape) if leaf.is_complex() else value
    return expression.value


def test_every_atom_of_the_table_has_an_example():
    assert set(EXAMPLES) == set(ARGUMENTS) == set(ATOMS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_atom_comes_back_with_its_value_and_curvature(name):
    old = EXAMPLES[name]
    seen, queue = set(), [old]
    while queue:
        node = queue.pop()
        seen.add(type(node).__name__)
        queue += node.args
    assert name in seen
    (new,) = again(old)
    assert new.shape == old.shape
    assert (new.curvature, new.sign) == (old.curvature, old.sign)
    assert new.is_dcp(dpp=True) == old.is_dcp(dpp=True)
    assert new.is_dgp() == old.is_dgp()
    before, after = fill(old, 1), fill(new, 1)
    np.testing.assert_array_equal(after, before)
    assert np.isfinite(np.asarray(before)).all()


SPARSE = cp.Parameter((2, 2), name="a", sparsity=[(0, 1), (1, 0)])
SPARSE.value_sparse = sp.coo_array(([3.0, 2.0], ([0, 1], [1, 0])), shape=(2, 2))
LEAVES = [
    cp.Parameter(3, name="a", nonneg=True, value=np.ones(3)),
    cp.Parameter((2, 2), name="a", PSD=True, value=np.eye(2)),
    cp.Parameter((2, 2), name="a", symmetric=True),
    cp.Parameter((2, 2), name="a", diag=True, value=np.diag([1.0, 2.0])),
    cp.Parameter(2, name="a", bounds=[0, np.array([1.0, 2.0])], value=np.array([0.5, 1.5])),
    cp.Parameter((2, 3), name="a", sparsity=[(0, 1), (2, 0)]),
    SPARSE,
    cp.Variable(2, name="a", bounds=[None, 3.0]),
    cp.Variable(2, name="a", boolean=True),
    cp.Variable((2, 2), name="a", hermitian=True),
    cp.Variable((2, 2), name="a", NSD=True),
]


@pytest.mark.parametrize("leaf", LEAVES, ids=repr)
def test_a_leaf_keeps_name_attributes_and_value(leaf):
    (new,) = again(leaf)
    assert (new.name(), new.shape, new.is_complex()) == (leaf.name(), leaf.shape, leaf.is_complex())
    assert new.id != leaf.id
    for key, value in leaf.attributes.items():
        if key == "sparsity" and value:
            assert [i.tolist() for i in new.sparse_idx] == [i.tolist() for i in leaf.sparse_idx]
        else:
            assert str(new.attributes[key]) == str(value), key
    if isinstance(leaf, cp.Parameter):
        old, kept = value_of(leaf), value_of(new)
        assert np.array_equal(old, kept) if old is not None else kept is None


def test_problem_constraints_and_duals_share_their_leaves():
    u = cp.Variable(3, name="u")
    column, thirds = cp.reshape(u, (3, 1), order="F"), np.full((3, 1), 1 / 3)
    cones = [
        *(u == p, u <= 1, cp.SOC(t, u), cp.PSD(X + X.T), cp.ExpCone(u[0], u[1], u[2])),
        *(cp.PowCone3D(u[0], u[1], u[2], 0.3), cp.PowConeND(column, cp.hstack([t]), thirds)),
        *(cp.constraints.Zero(u), cp.constraints.NonNeg(u)),
    ]
    problem = cp.Problem(cp.Maximize(-cp.sum_squares(u - p)), cones)
    new, parameter, dual, expression = again(problem, p, cones[1].dual_variables[0], u[0])
    assert isinstance(new.objective, cp.Maximize)
    assert [type(c) for c in new.constraints] == [type(c) for c in cones]
    assert [str(c) for c in new.constraints] == [str(c) for c in cones]
    assert new.parameters() == [parameter]
    assert dual is new.constraints[1].dual_variables[0]
    assert expression.variables()[0] in new.variables()


def test_the_solution_is_the_same():
    A = np.random.default_rng(0).normal(size=(5, 3))
    v = cp.Variable(3, name="v")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(A @ v - 1) + M * cp.norm1(v)), [cp.sum(v) <= 0.3, v >= -1])
    (new,) = again(problem)
    assert new.solve(solver="CLARABEL") == problem.solve(solver="CLARABEL")
    np.testing.assert_array_equal(new.variables()[0].value, v.value)


def test_what_is_not_in_the_table_is_named():
    class Own(cp.atoms.elementwise.exp.exp):
        pass

    with pytest.raises(FileError, match=r"the atom .*Own in .* is not in the table"):
        again(Own(x))
    with pytest.raises(FileError, match="perspective"):
        again(cp.perspective(cp.square(t), cp.Variable(nonneg=True)))


def rebuilt(*nodes):
    return ProblemUnpacker(Unpacker({})).rebuild(nodes)


LEAF = {"atom": "Variable", "name": "x", "attributes": {}, "value": None, "shape": [3]}
REFUSED = [
    {**LEAF, "atom": "os.system"},
    {**LEAF, "atom": "CallbackParam"},
    {**LEAF, "name": 3},
    {**LEAF, "shape": [10**9, 10**9]},
    {**LEAF, "shape": [-1]},
    {**LEAF, "shape": "3"},
    {**LEAF, "attributes": {"__class__": 1}},
    {**LEAF, "value": 1.0},
    {"atom": "exp", "args": [0], "keywords": {}, "shape": [3]},
    {"atom": "exp", "args": [-1], "keywords": {}, "shape": [3]},
    {"atom": "Sum", "args": [], "keywords": {}, "shape": []},
]


@pytest.mark.parametrize("node", REFUSED, ids=str)
def test_hostile_nodes_are_refused(node):
    with pytest.raises((FileError, IndexError)):
        rebuilt(node)


@pytest.mark.parametrize(
    "node",
    [
        {"atom": "exp", "args": [0], "keywords": {"axis": 1}, "shape": [3]},
        {"atom": "exp", "args": [0], "keywords": {}, "shape": [4]},
        {"atom": "eval", "args": [0], "keywords": {}, "shape": [3]},
        {"atom": "SuppFuncAtom", "args": [0], "keywords": {}, "shape": [3]},
        {"atom": "Promote", "args": [0], "keywords": {"shape": {"tuple": [10**6, 10**6]}}, "shape": [3]},
    ],
    ids=str,
)
def test_hostile_branches_are_refused(node):
    with pytest.raises(FileError):
        rebuilt(LEAF, node)


def test_a_tree_that_doubles_is_refused():
    add = [{"atom": "multiply", "args": [k, k], "keywords": {}, "shape": [3]} for k in range(60)]
    with pytest.raises(FileError, match="nodes"):
        rebuilt(LEAF, *add)


def test_the_table_of_constraints_is_of_cvxpy():
    assert all(hasattr(cp.constraints, name) for name in CONSTRAINTS)
