"""CVXPY problems as plain data, and back: every node is checked against a table, nothing is pickled."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import cvxpy as cp
import numpy as np
from cvxpy.atoms.affine.add_expr import AddExpression
from cvxpy.atoms.atom import Atom
from cvxpy.constraints.constraint import Constraint
from cvxpy.expressions.leaf import Leaf

from convexlearn.errors import FileError
from convexlearn.plain_data import Packer, Unpacker

LARGEST = 10**8
"""No expression has more entries than this."""

NODES, DEEPEST = 10**6, 300
"""Bounds on the tree of a problem, shared subexpressions counted each time, and on its depth."""

AXIS = {"axis": "axis", "keepdims": "keepdims"}


def _each(names: str, keywords: dict[str, str]) -> dict[str, dict[str, str]]:
    return dict.fromkeys(names.split(), keywords)


ARGUMENTS: dict[str, dict[str, str]] = {
    **_each("AddExpression DivExpression MulExpression multiply NegExpression Hstack Vstack Trace upper_tri", {}),
    **_each("conj convolve imag real kron hermitian_wrap nonneg_wrap nonpos_wrap nsd_wrap psd_wrap", {}),
    **_each("skew_symmetric_wrap symmetric_wrap abs dotsort entr exp kl_div log log1p logistic", {}),
    **_each("maximum minimum rel_entr xexp eye_minus_inv gen_lambda_max lambda_max log_det MatrixFrac", {}),
    **_each("normNuc one_minus_pos pf_eigenvalue QuadForm sigma_max tr_inv dist_ratio condition_number", {}),
    **_each("Sum norm1 norm_inf log_sum_exp max min Prod quad_over_lin", AXIS),
    **_each("Pnorm PnormApprox", {"p": "original_p", "max_denom": "max_denom", **AXIS}),
    **_each("GeoMean GeoMeanApprox", {"p": "p", "max_denom": "max_denom", **AXIS}),
    **_each("Power PowerApprox", {"p": "_p_orig", "max_denom": "max_denom"}),
    **_each("diag_mat diag_vec", {"k": "k"}),
    **_each("cumsum cummax cumprod", {"axis": "axis"}),
    "Concatenate": {"": "axis"},
    "Promote": {"shape": "promoted_shape"},
    "broadcast_to": {"shape": "broadcast_shape"},
    "gmatmul": {"A": "A"},
    "huber": {"M": "M"},
    "index": {"key": "_orig_key"},
    "lambda_sum_largest": {"k": "k"},
    "reshape": {"shape": "_shape", "order": "order"},
    "special_index": {"key": "key"},
    "sum_largest": {"k": "k", **AXIS},
    "transpose": {"axes": "axes"},
}
"""By atom: keyword of its constructor -> attribute that holds it ("" for a last positional one)."""

CONSTRAINTS: dict[str, dict[str, str]] = {
    **_each("Equality Inequality Zero NonNeg NonPos PSD ExpCone", {}),
    "SOC": {"axis": "axis"},
    "PowCone3D": {"alpha": "alpha"},
    "PowConeND": {"alpha": "alpha", "axis": "axis"},
}

LEAVES = {"Variable": cp.Variable, "Parameter": cp.Parameter}
SIGNS = ("nonneg", "nonpos", "pos", "neg", "complex", "imag", "symmetric", "diag", "PSD", "NSD", "hermitian")


def _classes(base: type, names: Any) -> dict[str, type]:
    """CVXPY's own classes of these names below `base`; user-made ones don't count."""
    found: dict[str, type] = {}
    queue = [base]
    while queue:
        cls = queue.pop()
        queue += cls.__subclasses__()
        if cls.__name__ in names and cls.__module__.startswith("cvxpy."):
            found[cls.__name__] = cls
    return found


ATOMS = _classes(Atom, ARGUMENTS)
CONES = _classes(Constraint, CONSTRAINTS)


class ProblemPacker:
    """Expressions, constraints and problems as a list of `nodes`, each after what it is made of."""

    def __init__(self, packer: Packer) -> None:
        self.packer = packer
        self.nodes: list[dict[str, Any]] = []
        self._known: dict[int, int] = {}
        self._duals: dict[int, list[int]] = {}
        self._kept: list[Any] = []  # ids stay unique while their objects live

    def pack(self, item: Any) -> dict[str, Any] | None:
        """`{"expression": k}`, `{"dual": [k, j]}` or `{"problem": ...}`; None for what is no part of CVXPY."""
        if isinstance(item, cp.Problem):
            sense = type(item.objective).__name__
            return {"problem": [sense, self._node(item.objective.args[0]), [self._node(c) for c in item.constraints]]}
        if isinstance(item, cp.Variable) and item.id in self._duals:
            return {"dual": self._duals[item.id]}
        return {"expression": self._node(item)} if isinstance(item, cp.Expression | Constraint) else None

    def verify(self, unpacker: "ProblemUnpacker") -> None:
        """Rebuild all nodes and compare each with its original; what CVXPY builds otherwise is a FileError."""
        unpacker.rebuild(self.nodes)
        for node, old, new in zip(self.nodes, self._kept, unpacker.items, strict=True):
            same = [id(unpacker.items[k]) for k in node.get("args", [])] == [id(arg) for arg in new.args]
            data = (None, None) if isinstance(old, Constraint | cp.Parameter) else (old.get_data(), new.get_data())
            if not same or not _equal(*data):
                raise FileError(f"CVXPY does not rebuild {str(old)[:80]} from its arguments; rewrite that expression")

    def _node(self, item: Any) -> int:
        if id(item) not in self._known:
            node = self._leaf(item) if isinstance(item, Leaf) else self._branch(item)
            self._known[id(item)] = len(self.nodes)
            self._kept.append(item)
            self.nodes.append({**node, "shape": list(item.shape)})
            if isinstance(item, Constraint):
                for k, dual in enumerate(item.dual_variables):
                    self._duals[dual.id] = [self._known[id(item)], k]
        return self._known[id(item)]

    def _branch(self, item: Any) -> dict[str, Any]:
        name = type(item).__name__
        table, classes = (CONSTRAINTS, CONES) if isinstance(item, Constraint) else (ARGUMENTS, ATOMS)
        if classes.get(name) is not type(item):
            raise FileError(
                f"the atom {type(item).__module__}.{name} in {str(item)[:80]} is not in the table of problem_file.py; "
                "rewrite it, or save the rule's state_dict and rebuild the rule from its own code"
            )
        args = [self._node(arg) for arg in item.args]
        keywords = {k: self.packer.pack(_kept(item, attr), f"{name}.{k}") for k, attr in table[name].items()}
        return {"atom": name, "args": args, "keywords": keywords}

    def _leaf(self, item: Any) -> dict[str, Any]:
        name = type(item).__name__
        if type(item) is cp.Constant:
            return {"atom": "Constant", "value": self.packer.pack(item.value, "a constant")}
        if LEAVES.get(name) is not type(item):
            raise FileError(f"a {type(item).__module__}.{name} cannot be saved, only variables, parameters, constants")
        attributes = {k: True for k in SIGNS if item.attributes[k] is not False and item.attributes[k] is not None}
        for k in ("boolean", "integer", "sparsity", "bounds"):
            value = item.sparse_idx if k == "sparsity" and item.attributes[k] else item.attributes[k]
            if value is not None and value is not False:
                attributes[k] = self.packer.pack(value, f"{item.name()}.{k}")
        value = self.packer.pack(item._value, item.name()) if isinstance(item, cp.Parameter) else None
        return {"atom": name, "name": item.name(), "attributes": attributes, "value": value}


class ProblemUnpacker:
    """Rebuilds nodes in their order; each is checked against the table and against the shape it had."""

    def __init__(self, unpacker: Unpacker) -> None:
        self.unpacker = unpacker
        self.items: list[Any] = []
        self._sizes: list[tuple[int, int]] = []  # of the tree below: nodes, depth
        unpacker.kinds |= {"expression": self._expression, "dual": self._dual, "problem": self._problem}

    def rebuild(self, nodes: Sequence[dict[str, Any]]) -> None:
        """All nodes of a file."""
        for node in nodes:
            name, shape = node["atom"], node["shape"]
            if not _sound(shape):
                raise FileError(f"an expression of shape {str(shape)[:80]} is no shape, or too large")
            item = self._leaf(name, node) if "args" not in node else self._branch(name, node)
            if list(item.shape) != shape:
                raise FileError(f"{name} has shape {list(item.shape)}, but the file says {shape}")
            self.items.append(item)

    def _branch(self, name: str, node: dict[str, Any]) -> Any:
        table, classes = (CONSTRAINTS, CONES) if name in CONSTRAINTS else (ARGUMENTS, ATOMS)
        if name not in classes:
            raise FileError(f"unknown atom '{str(name)[:80]}'")
        below = [self._sizes[k] for k in map(_number, node["args"])]
        self._grow(1 + sum(n for n, _ in below), 1 + max((d for _, d in below), default=0))
        args: list[Any] = [self.items[k] for k in node["args"]]
        if set(node["keywords"]) != set(table[name]):
            raise FileError(f"{name} takes {sorted(table[name])}, the file gives {sorted(node['keywords'])}")
        keywords = {k: self.unpacker.unpack(value) for k, value in node["keywords"].items()}
        if "shape" in keywords and not _sound(keywords["shape"]):
            raise FileError(f"{name} to the shape {str(keywords['shape'])[:80]}")
        build: Callable[..., Any] = classes[name]
        if name == "gmatmul":
            return build(keywords["A"], *args)
        last = [keywords.pop("")] if "" in keywords else []
        return build(args) if build is AddExpression else build(*args, *last, **keywords)

    def _leaf(self, name: str, node: dict[str, Any]) -> Any:
        self._grow(1, 1)
        if name == "Constant":
            value = self.unpacker.unpack(node["value"])
            if not isinstance(value, np.ndarray | float | int) and not hasattr(value, "tocsc"):
                raise FileError(f"a constant is an array of numbers, got {type(value).__name__}")
            return cp.Constant(value)
        if name not in LEAVES:
            raise FileError(f"unknown leaf '{str(name)[:80]}'")
        attributes = dict(node["attributes"])
        unknown = attributes.keys() - {*SIGNS, "boolean", "integer", "sparsity", "bounds"}
        if unknown or not isinstance(node["name"], str):
            raise FileError(f"{name} {str(node['name'])[:80]} has unknown attributes {sorted(unknown)}")
        given = {k: self.unpacker.unpack(v) for k, v in attributes.items()}
        bounds = given.pop("bounds", None)
        leaf = LEAVES[name](tuple(node["shape"]), name=node["name"], **given)
        if bounds is not None:  # as they were after CVXPY's own broadcasting
            leaf.bounds = leaf.attributes["bounds"] = list(bounds)
        value = self.unpacker.unpack(node["value"])
        if value is not None:
            plain = hasattr(value, "shape") or isinstance(value, float | int)
            if not isinstance(leaf, cp.Parameter) or not plain:
                raise FileError(f"the value of {node['name']} is a {type(value).__name__}")
            leaf._value = value  # pyright: ignore[reportAttributeAccessIssue]
            shape = (len(leaf.sparse_idx[0]),) if leaf.sparse_idx is not None else leaf.shape  # its entries alone
            if tuple(getattr(value, "shape", ())) != shape:
                raise FileError(f"the value of {node['name']} has shape {np.shape(value)}, expected {shape}")
        return leaf

    def _grow(self, nodes: int, depth: int) -> None:
        if nodes > NODES or depth > DEEPEST:
            raise FileError(f"the expression tree has more than {NODES} nodes or is more than {DEEPEST} deep")
        self._sizes.append((nodes, depth))

    def _expression(self, k: Any) -> Any:
        return self.items[_number(k)]

    def _dual(self, where: Any) -> Any:
        constraint, k = map(_number, where)
        return self.items[constraint].dual_variables[k]

    def _problem(self, payload: Any) -> Any:
        sense, objective, constraints = payload
        kinds = {"Minimize": cp.Minimize, "Maximize": cp.Maximize}
        return cp.Problem(kinds[sense](self._expression(objective)), [self._expression(k) for k in constraints])


def _kept(item: Any, attribute: str) -> Any:
    """What a constructor was given; GeoMean drops weights that are zero, and takes ones where it was given none."""
    value = getattr(item, attribute)
    if not hasattr(item, "_keep") or attribute != "p":
        return value
    if isinstance(value, list):
        return None
    weights = np.zeros(len(item._keep), value.dtype)
    weights[item._keep] = value
    return weights


def _equal(old: Any, new: Any) -> bool:
    if isinstance(old, list | tuple):
        return type(old) is type(new) and len(old) == len(new) and all(map(_equal, old, new))
    if isinstance(old, cp.Expression):
        return type(old) is type(new) and old.shape == new.shape
    return bool(np.array_equal(old, new)) if isinstance(old, np.ndarray) else bool(old == new)


def _number(k: Any) -> int:
    if type(k) is not int or k < 0:
        raise FileError(f"expected the number of an earlier node, got {str(k)[:80]}")
    return k


def _sound(shape: Any) -> bool:
    numbers = isinstance(shape, list | tuple) and all(type(n) is int and n >= 0 for n in shape)
    return numbers and len(shape) <= 32 and math.prod(shape) <= LARGEST
