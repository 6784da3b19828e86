"""A split problem with numbers in: gradient of the smooth part, proximal maps of the terms, objective."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convexlearn.affine_maps import AffineMap, LinearMap
from convexlearn.errors import CompileError
from convexlearn.prox import PROXIMABLE, Proximal
from convexlearn.terms import Bound, ProxTerm, Quadratic, Weight


@dataclass(frozen=True)
class Shape:
    """Name and shape of a variable within the stacked z."""

    name: str
    shape: tuple[int, ...]
    is_complex: bool


@dataclass(frozen=True, eq=False)
class BoundTerm:
    """weight * g(K z + b) with numbers: K `(rows, n)`, b `(rows,)` or `(B, rows)`, weight broadcastable against K z."""

    kind: str
    map: LinearMap
    offset: Tensor
    weight: Tensor
    scaled: bool
    shape: tuple[int, ...]
    data: Mapping[str, Any]
    program: Any = None

    @property
    def entry(self) -> Proximal:
        """The line of the table of proximal maps."""
        return PROXIMABLE[self.kind]

    def image(self, z: Tensor) -> Tensor:
        """K z + b `(B, rows)`."""
        return self.map(z) + self.offset

    def prox(self, u: Tensor, t: Any) -> Tensor:
        """Proximal map of t g at u `(B, rows)`, in the coordinates of K z + b."""
        if self.program is not None:
            return self.program(u - self.offset, t, **self.data) + self.offset
        natural = u.reshape(len(u), *self.shape)
        return self.entry.bare(natural, self.fit(t), **self.data).reshape(u.shape)

    def fit(self, t: Any) -> Any:
        """The threshold t, scalar, `(B, 1)`, or one per entry or group, shaped to act on the natural shape."""
        if not isinstance(t, Tensor) or t.ndim == 0 or t.numel() == 1:
            return t.reshape(()) if isinstance(t, Tensor) else t
        if t.ndim == 2 and t.shape[1] == 1:
            return t.reshape(len(t), *[1] * len(self.shape))
        if self.kind == "group":
            return t if t.ndim == 1 else t.unsqueeze(self.data.get("axis", 1) + 1)
        return t.reshape(*t.shape[:-1], *self.shape)

    def pull(self, z: Tensor, t: Any) -> Tensor:
        """Proximal map of t g(K . + b) at z `(B, n)`, for rows of K that are orthogonal, or for an affine set."""
        u = self.image(z)
        if self.map.is_identity and self.map.scale == 1.0:
            return self.prox(u, t) - self.offset
        products = self.map.row_products
        if products is None:
            return z - _least_norm(self.map.dense(), u)
        tight = self.map.tight
        scale = tight if tight is not None else products
        return z + self.map.adjoint((self.prox(u, t * scale) - u) / scale)


@dataclass(frozen=True, eq=False)
class Instance:
    """The numbers of a split problem for one batch: 1/2 |A z - y|^2 + q'z + sum of terms.

    A is None without a smooth part; y `(B, m)` or `(m,)`; q `(n,)` or `(B, n)` or None; L `()` or `(B, 1)`.
    values: flattened parameters and contexts by name.
    """

    split: Any
    batch: int
    values: Mapping[str, Tensor]
    like: Tensor
    A: LinearMap | None
    y: Tensor
    q: Tensor | None
    L: Tensor
    terms: tuple[BoundTerm, ...]

    @staticmethod
    def of(split: Any, batch: int, values: Mapping[str, Tensor], like: Tensor) -> "Instance":
        """Evaluate every map of the split at `values`."""
        A, y = _stack([_least_squares(part, values, like) for part in split.quadratics], like)
        q: Any = None
        for mapped in split.linear:
            row = mapped.matrix(values, like).dense().conj()
            row = row[..., 0, :].to(like)
            q = row if q is None else q + row
        terms = tuple(bind_term(t, values, like, split.programs.get(k)) for k, t in enumerate(split.terms))
        L = split_norm(split, A, like)
        return Instance(split, batch, values, like, A, y, q, L, terms)

    @property
    def y_shape(self) -> tuple[int, ...]:
        """Natural shape of y without batch: that of the expression in the only sum of squares, else flat."""
        parts = self.split.quadratics
        return parts[0].map.shape if len(parts) == 1 else (self.y.shape[-1],)

    def zeros(self) -> Tensor:
        """z = 0 `(B, n)`."""
        return self.like.new_zeros(self.batch, self.split.size)

    def gradient(self, z: Tensor) -> Tensor:
        """Gradient A^H(A z - y) + q of the smooth part, `(B, n)`."""
        total = torch.zeros_like(z) if self.A is None else self.A.adjoint(self.A(z) - self.y)
        return total if self.q is None else total + self.q

    def thresholds(self, step: Any) -> list[Any]:
        """step times the weight of each term; for indicators the step alone."""
        return [step * t.weight if t.scaled else step for t in self.terms]

    def prox(self, z: Tensor, thresholds: list[Any], step: Any) -> Tensor:
        """Proximal map of all terms together, over groups of terms on disjoint entries of z."""
        for group, program in self.split.groups:
            members = [self.terms[k] for k in group]
            if program is not None:
                z = self._joint(z, step, group, program)
            elif len(members) == 2:  # a separable term within a box
                first = 0 if members[0].kind != "box" else 1
                z = members[first].pull(z, thresholds[group[first]])
                z = members[1 - first].pull(z, step)
            elif members:
                z = members[0].pull(z, thresholds[group[0]])
        return z

    def _joint(self, z: Tensor, step: Any, group: tuple[int, ...], program: Any) -> Tensor:
        index = self.split.group_entries(group).to(z.device)
        named = {name: self._natural(name) for name in program.parameters}
        moved = program(z[:, index], step, **named)
        return z.index_copy(1, index, moved.to(z.dtype))

    def _natural(self, name: str) -> Tensor:
        value, shape = self.values[name], self.split.shapes[name]
        return value.reshape((*value.shape[:-1], *shape))

    def objective(self, z: Tensor) -> Tensor:
        """Objective `(B,)` at z `(B, n)`, terms without closed form left out."""
        total = z.real.new_zeros(len(z))
        if self.A is not None:
            total = total + (self.A(z) - self.y).abs().square().sum(-1) / 2
        if self.q is not None:
            total = total + (self.q.conj() * z).real.sum(-1)
        for part in self.split.linear:
            total = total + part.offset(self.values, z).reshape(-1).real
        for t in self.terms:
            if t.program is None:
                natural = t.image(z).reshape(len(z), *t.shape)
                total = total + t.entry.evaluate(natural, t.fit(t.weight), t.data)
        return total


def bind_term(term: ProxTerm, values: Mapping[str, Tensor], like: Tensor, program: Any = None) -> BoundTerm:
    """A term at parameter values."""
    data = {name: _datum(item, term.map, values, like) for name, item in term.data.items()}
    if term.kind == "box":
        unbounded = like.real.new_tensor(torch.inf)
        data = {"lower": data.get("lower", -unbounded), "upper": data.get("upper", unbounded)}
        for side, sign in (("lower", -1), ("upper", 1)):
            if isinstance(data[side], list):
                data[side] = sign * unbounded
        empty = data["lower"] > data["upper"]  # a box without points: the sample has no decision
        data["lower"] = torch.where(empty, torch.nan, data["lower"])
    if isinstance(radius := data.get("radius"), Tensor):
        data["radius"] = torch.where(radius < 0, torch.nan, radius)
    if program is not None:
        shapes = program.shapes
        data = {n: values[n].reshape((*values[n].shape[:-1], *shapes[n])) for n in program.parameters}
    return BoundTerm(
        term.kind, term.map.matrix(values, like), term.map.offset(values, like), _weight(term.weight, values, like),
        term.scaled, term.map.shape, data, program,
    )  # fmt: skip


def split_norm(split: Any, A: LinearMap | None, like: Tensor) -> Tensor:
    """L; where no parameter enters A it is computed once, in float64."""
    if A is None:
        return like.real.new_zeros(())
    norm = split.__dict__.get("_fixed_norm")
    if norm is None:
        if any(p.map.fixed is None or (p.weight is not None and p.weight.map.parameters) for p in split.quadratics):
            norm = A.norm_squared()
        else:
            exact = like.detach().to(torch.complex128 if like.is_complex() else torch.float64).new_zeros(1)
            parts = [_scaled(p.map.matrix({}, exact), _root(p, {}, exact), 1.0) for p in split.quadratics]
            stacked, _ = _stack([(part, exact) for part in parts], exact)
            assert stacked is not None
            norm = split.__dict__["_fixed_norm"] = stacked.norm_squared()
    norm = norm.to(like.real)
    return norm.reshape(-1, 1) if norm.ndim else norm


def _weight(weight: Weight | None, values: Mapping[str, Tensor], like: Tensor) -> Tensor:
    if weight is None:
        return like.real.new_ones(())
    value = weight.map.offset(values, like).real
    value = value.abs() if weight.absolute else value
    return value.squeeze(-1) if weight.map.rows == 1 and value.ndim == 1 else value


def _datum(item: Any, mapped: AffineMap, values: Mapping[str, Tensor], like: Tensor) -> Any:
    """A constant, a scalar per sample, or the tightest of several bounds."""
    if isinstance(item, AffineMap):
        value = item.offset(values, like).real
        return value.squeeze(-1) if value.ndim == 1 else value
    if isinstance(item, list) and item and isinstance(item[0], Bound):
        sides = []
        for bound in item:
            value = bound.map.offset(values, like).real / bound.scale
            shape = mapped.shape if bound.map.rows == mapped.rows else (1,) * len(mapped.shape)
            sides.append(value.reshape(*value.shape[:-1], *shape))
        upper = item[0].scale > 0
        total = sides[0]
        for other in sides[1:]:
            total = torch.minimum(total, other) if upper else torch.maximum(total, other)
        return total
    if isinstance(item, list) and item and isinstance(item[0], tuple):
        (part, factor) = item[0]
        value = factor * part.offset(values, like).real
        return value.squeeze(-1) if value.ndim == 1 else value[:, 0]
    return item


def _least_squares(part: Quadratic, values: Mapping[str, Tensor], like: Tensor) -> tuple[LinearMap, Tensor]:
    """A and y of 1/2 |A z - y|^2, the sign such that y is +x where x enters with coefficient one."""
    A, y = part.map.matrix(values, like), -part.map.offset(values, like)
    sign, root = -1.0 if part.flip else 1.0, _root(part, values, like)
    return _scaled(A, root, sign), sign * root * y


def _root(part: Quadratic, values: Mapping[str, Tensor], like: Tensor) -> Any:
    """Root of the weight of a sum of squares: a number, or a tensor `()` or `(B, 1)` where parameters enter."""
    if part.weight is None:
        return 1.0
    if not part.weight.map.parameters:
        return float(part.weight.map.constant.item()) ** 0.5
    return _weight(part.weight, values, like).sqrt()


def _scaled(A: LinearMap, root: Any, sign: float) -> LinearMap:
    """sign root A."""
    if isinstance(root, Tensor):
        return A.scaled(sign * (root.squeeze(-1) if root.ndim > 1 else root))
    return A if sign * root == 1.0 else A.scaled(sign * root)


def _stack(parts: list[tuple[LinearMap, Tensor]], like: Tensor) -> tuple[LinearMap | None, Tensor]:
    if len(parts) <= 1:
        return parts[0] if parts else (None, like.new_zeros(0))
    batch = max(
        max(A.dense().shape[0] if A.dense().ndim == 3 else 1, y.shape[0] if y.ndim == 2 else 1) for A, y in parts
    )
    lead = (batch,) if batch > 1 or any(y.ndim == 2 for _, y in parts) else ()
    matrices = [A.dense() for A, _ in parts]
    deep = any(M.ndim == 3 for M in matrices)
    matrix = torch.cat([M.expand(*lead, *M.shape[-2:]) if deep else M for M in matrices], -2)
    y = torch.cat([y.expand(*lead, y.shape[-1]) for _, y in parts], -1)
    return LinearMap((matrix.shape[-2], matrix.shape[-1]), matrix=matrix), y


def _least_norm(K: Tensor, u: Tensor) -> Tensor:
    """K'(K K')^-1 u."""
    gram = K @ K.mH
    factor = independent_factor(gram)
    return (torch.cholesky_solve(u.unsqueeze(-1), factor).squeeze(-1).unsqueeze(-2) @ K.conj()).squeeze(-2)


def independent_factor(gram: Tensor) -> Tensor:
    """The Cholesky factor of a Gram matrix `(..., k, k)` of constraints; CompileError where they are dependent."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots, sizes = (M.detach().diagonal(dim1=-2, dim2=-1).real for M in (factor, gram))
    rounding = 100 * torch.finfo(sizes.dtype).eps
    dependent = (failed != 0) | (pivots.square() <= rounding * sizes).any(-1)
    if bool((dependent & torch.isfinite(gram.detach()).all(-1).all(-1)).any()):
        raise CompileError("the equality constraints of the problem depend on each other; leave out some")
    return factor
