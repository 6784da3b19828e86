"""cvxpy.Problem -> smooth quadratic + terms with a proximal map, named and printed (Examples 5, 9, 10)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexlearn.affine_maps import AffineMap, LinearMap, affine_map
from convexlearn.convex_prox import ConvexProx
from convexlearn.domains import Domain
from convexlearn.errors import CompileError, MissingParameterError, ShapeError
from convexlearn.expression_text import pretty
from convexlearn.program.declaration import Declaration, value_of
from convexlearn.prox import PROXIMABLE
from convexlearn.split_instance import BoundTerm, Instance, Shape, bind_term
from convexlearn.terms import ProxTerm, Quadratic, Reader


@dataclass(frozen=True, eq=False)
class ParameterSlot:
    """A parameter of the problem that is not context: value, domain, and whether a rule trains it by default."""

    name: str
    value: Tensor
    domain: Domain
    learned: bool


@dataclass(frozen=True, eq=False)
class Split:
    """A convex problem as 1/2 |A z - y|^2 + q'z + sum of proximable terms over the stacked variables z.

    variables: their shapes, stacked in this order, each row by row. terms: those with a proximal map. groups: sets of
    terms that share entries of z, each with a ConvexProx where it has no closed form. declaration: a copy of
    the problem that was split. `str(split)` says all of it.
    """

    text: str
    variables: tuple[Shape, ...]
    context: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    parameters: Mapping[str, ParameterSlot]
    features: Any
    decisions: tuple[AffineMap, ...]
    single: bool
    quadratics: tuple[Quadratic, ...]
    linear: tuple[AffineMap, ...]
    terms: tuple[ProxTerm, ...]
    groups: tuple[tuple[tuple[int, ...], ConvexProx | None], ...]
    programs: Mapping[int, ConvexProx | None]
    declaration: Declaration

    @property
    def size(self) -> int:
        """Number of entries of z."""
        return sum(math.prod(v.shape) for v in self.variables)

    @property
    def convex(self) -> bool:
        """True when every proximal map is that of a convex function."""
        return all(t.kind == "program" or PROXIMABLE[t.kind].convex for t in self.terms)

    @property
    def L(self) -> float:
        """Largest eigenvalue of A'A, the Lipschitz constant of the smooth part's gradient, at the declared values."""
        return self.nominal().L.item()

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Split({self.text})"

    def __deepcopy__(self, memo: dict) -> "Split":
        return self

    def bind(self, *x: Tensor, values: Mapping[str, Tensor] | None = None) -> Instance:
        """The problem's numbers for contexts x `(B, ...)`, at the declared values or those in `values`."""
        contexts = self._contexts(x)
        like = _like(contexts, self.variables)
        flat: dict[str, Tensor] = {}
        for name, slot in self.parameters.items():
            value = slot.value if values is None or name not in values else values[name]
            flat[name] = value.to(
                device=like.device, dtype=like.dtype if value.is_complex() else like.real.dtype
            ).reshape(-1)
        for name, value in contexts.items():
            flat[name] = value.to(like if value.is_complex() else like.real).reshape(
                len(value), math.prod(self.shapes[name])
            )
        return Instance.of(self, len(next(iter(contexts.values()))), flat, like)

    def nominal(self) -> Instance:
        """The problem's numbers at the declared values and zero contexts, batch size 1; for start values."""
        complex_ = any(v.is_complex for v in self.variables)
        dtype = torch.complex128 if complex_ else torch.float64
        zeros = [torch.zeros(1, *self.shapes[name], dtype=dtype) for name in self.context]
        plain = replace(self, features=None)
        return plain.bind(*zeros)

    def varies_with_context(self) -> bool:
        """True when A depends on the context, so that step sizes differ between samples."""
        return any(b.name in self.context for part in self.quadratics for b in part.map.entries)

    def group_entries(self, group: tuple[int, ...]) -> Tensor:
        """Entries of z of the variables that a joint proximal map moves, in order."""
        touched = sorted(set().union(*(_support(self.terms[k]) for k in group)))
        starts, kept, start = set(touched), [], 0
        for v in self.variables:
            stop = start + math.prod(v.shape)
            if any(start <= k < stop for k in starts):
                kept.append(torch.arange(start, stop))
            start = stop
        return torch.cat(kept)

    def decide(self, z: Tensor, instance: Instance) -> Any:
        """Decisions `(B, ...)` at z `(B, n)`; a tuple for a list of decisions."""
        parts = []
        for mapped in self.decisions:
            s = mapped.matrix(instance.values, z)(z) + mapped.offset(instance.values, z)
            parts.append(s.reshape(len(z), *mapped.shape))
        return parts[0] if self.single else tuple(parts)

    def objective(self, z: Tensor, instance: Instance) -> Tensor:
        """Objective `(B,)` at z `(B, n)`, infinite beyond 1e-6 outside a constraint; a ConvexLayer's terms left out."""
        return instance.objective(z)

    def _contexts(self, x: tuple) -> dict[str, Tensor]:
        given = self.features(*x) if self.features is not None else x
        given = given if isinstance(given, tuple | list) else (given,)
        if len(given) != len(self.context):
            raise ShapeError(
                f"the problem has {len(self.context)} context parameters ({', '.join(self.context)}), "
                f"got {len(given)} values"
            )
        contexts = {}
        for name, value in zip(self.context, given):
            shape = self.shapes[name]
            if not isinstance(value, Tensor) or value.ndim != len(shape) + 1 or tuple(value.shape[1:]) != shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ShapeError(
                    f"context '{name}' must be a tensor of shape (B, {', '.join(map(str, shape))}), got {got}"
                )
            contexts[name] = value
        return contexts


def split(problem: Any, context: Any = None, decision: Any = None) -> Split:
    """Split a DPP problem, or a ConvexRule with its tuned values, into a smooth quadratic and proximable terms.

    context: parameters fed at call time; decision: a variable, an affine expression, or a list of them. Raises
    CompileError, naming the term, where that is impossible. Source: Eqs. 4, 13 and 14 of the paper.

    >>> import cvxpy as cp, numpy as np
    >>> s, x, H = cp.Variable(3, name="s"), cp.Parameter(2, name="x"), cp.Parameter((2, 3), name="H")
    >>> H.value, rho = np.array([[2, 0, 0], [0, 1, 0]]), cp.Parameter(nonneg=True, name="rho", value=0.1)
    >>> print(split(cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - H @ s) + rho * cp.norm1(s))), [x], s))
    smooth 1/2|Hs-x|^2 (L = 4) + rho |s|_1 [soft threshold]
    """
    if context is None and hasattr(problem, "layer"):
        return _split_rule(problem)
    if context is None or decision is None:
        raise MissingParameterError(
            "cl.split needs context and decision, as in cl.split(problem, context=[x], decision=s)"
        )
    context = list(context) if isinstance(context, list | tuple) else [context]
    outputs = list(decision) if isinstance(decision, list | tuple) else [decision]
    names = {p.name() for p in problem.parameters()}
    for p in context:
        if p.name() not in names:
            raise CompileError(f"context parameter '{p.name()}' is not in the problem; it has {sorted(names)}")
    declaration = Declaration.of(problem, problem.parameters(), outputs)
    fed = tuple(p.name() for p in context)
    return read_split(declaration, fed, isinstance(decision, list | tuple), None, {}, None)


def _split_rule(rule: Any) -> Split:
    values = {name: rule.value(name).detach() for name in rule._declared}
    features = getattr(rule, "features", None)
    return read_split(rule.layer._declaration, rule.context_names, not rule._single, features, values, rule.learned)


def read_split(
    declaration: Declaration, context: tuple[str, ...], many: bool, features: Any, values: dict, learned: Any
) -> Split:
    """The split of a declared problem at `values` of its parameters, by name; `learned`: those trained by default."""
    problem = declaration.problem
    _check(problem)
    variables = problem.variables()
    reader = Reader(variables)
    sense = 1 if type(problem.objective).__name__ == "Minimize" else -1
    goal = problem.objective.args[0] if sense > 0 else -problem.objective.args[0]
    found = [
        *reader.objective(goal),
        *(reader.constraint(c) for c in problem.constraints),
        *(t for v in variables for t in reader.attributes(v)),
    ]
    terms = merge_terms([t for t in found if isinstance(t, ProxTerm)])
    smooth = tuple(t for t in found if isinstance(t, Quadratic))
    linear = tuple(t for t in found if isinstance(t, AffineMap))
    groups = tuple((g, _group_prox(g, terms, variables)) for g in _overlaps(terms))
    programs = {k: _group_prox((k,), terms, variables) for k, t in enumerate(terms) if t.kind == "program"}
    result = Split(
        text="",
        variables=tuple(Shape(v.name(), tuple(v.shape), v.is_complex()) for v in variables),
        context=context,
        shapes={p.name(): tuple(p.shape) for p in problem.parameters()},
        parameters={p.name(): _slot(p, values, learned) for p in problem.parameters() if p.name() not in context},
        features=features,
        decisions=tuple(affine_map(o, variables) for o in declaration.outputs),
        single=not many,
        quadratics=smooth,
        linear=linear,
        terms=tuple(replace(t, source=(None, ())) for t in terms),
        groups=groups,
        programs=programs,
        declaration=declaration,
    )
    texts = [pretty_linear(e) for e in linear]
    described = replace(result, text=_describe(result, texts))
    described.__dict__.update({k: v for k, v in result.__dict__.items() if k == "_fixed_norm"})
    return described


def pretty_linear(mapped: AffineMap) -> str:
    """A linear term as text."""
    return mapped.text


def _slot(p: Any, values: dict, learned: Any) -> ParameterSlot:
    value = values.get(p.name(), value_of(p))
    if value is None:
        raise MissingParameterError(
            f"parameter '{p.name()}' is neither context nor has it a value; set {p.name()}.value, or add it to context"
        )
    value = value if isinstance(value, Tensor) else torch.as_tensor(np.array(value, dtype=np.result_type(value, float)))
    domain = Domain.from_attributes(p.shape, {k: v for k, v in p.attributes.items() if k != "complex"}, p.sparse_idx)
    return ParameterSlot(p.name(), value, domain, learned is None or p.name() in learned)


def _check(problem: Any) -> None:
    for v in problem.variables():
        if v.attributes["boolean"] or v.attributes["integer"]:
            raise CompileError(f"cannot split: variable '{v.name()}' is boolean or integer; a convex problem is needed")
    for term in [problem.objective, *problem.constraints]:
        if not term.is_dcp():
            raise CompileError(
                f"cannot split the term {term}: it is not convex (DCP); rewrite it or replace the prox slot"
            )
        if not term.is_dcp(dpp=True) and "QuadForm" not in str(term):
            raise CompileError(
                f"cannot split the term {term}: it is not affine in its parameters (DPP); declare one parameter for "
                "each product of parameters"
            )


def merge_terms(terms: list[ProxTerm]) -> list[ProxTerm]:
    """Boxes on the same entries become one; a nonnegative vector of fixed sum becomes a simplex."""
    boxes: dict[tuple, ProxTerm] = {}
    others = []
    for t in terms:
        linear = t.map.fixed
        if t.kind != "box" or linear is None or linear.index is None:
            others.append(t)
            continue
        key = tuple(linear.index.tolist())
        old = boxes.get(key)
        data = {side: [*(old.data[side] if old else []), *t.data[side]] for side in ("lower", "upper")}
        text = f"{old.text}, {t.text}" if old else t.text
        source = (None, (*(old.source[1] if old else ()), *t.source[1]))
        boxes[key] = replace(t, data=data, text=text, source=source)
    psd = {_support(t) for t in others if t.kind == "psd_cone"}
    others = [t for t in others if not (t.kind == "symmetric" and _support(t) in psd)]
    return _simplices(others, list(boxes.values()))


def _simplices(others: list[ProxTerm], boxes: list[ProxTerm]) -> list[ProxTerm]:
    for box in boxes:
        partner = next((t for t in others if _closes_simplex(t, box)), None)
        if partner is None:
            continue
        assert partner.map.fixed is not None
        total = partner.map.fixed.dense().sum().item() / box.map.rows
        data = {"radius": [(partner.map, -1 / total)]}
        source = (None, (*box.source[1], *partner.source[1]))
        simplex = replace(box, kind="simplex", data=data, text=f"{box.text}, {partner.text}", source=source)
        others = [simplex if t is partner else t for t in others]
        boxes = [b for b in boxes if b is not box]
    return [*others, *boxes]


def _closes_simplex(t: ProxTerm, box: ProxTerm) -> bool:
    """True when t says that the entries which `box` keeps nonnegative have a fixed sum."""
    if t.kind != "zero" or t.map.rows != 1 or t.map.fixed is None or box.data["upper"] or len(box.data["lower"]) != 1:
        return False
    bound = box.data["lower"][0].map
    row, index = t.map.fixed.dense()[0], box.map.fixed.index  # pyright: ignore
    zero = not bound.offsets and not bool(bound.constant.any())
    return zero and _support(t) == _support(box) and len(set(row[index].tolist())) == 1


def _support(t: ProxTerm) -> frozenset[int]:
    """Entries of z that the term depends on."""
    linear = t.map.fixed
    if linear is None:
        return frozenset(range(t.map.columns))
    if linear.index is not None:
        return frozenset(linear.index.tolist())
    matrix: Any = linear.matrix
    columns = matrix.coalesce().indices()[1] if matrix.is_sparse else matrix.nonzero()[:, 1]
    return frozenset(columns.tolist())


def _overlaps(terms: Sequence[ProxTerm]) -> list[tuple[int, ...]]:
    """Sets of terms that are linked by common entries of z, in order of their first member."""
    groups: list[tuple[set[int], list[int]]] = []
    for k, t in enumerate(terms):
        support, members = set(_support(t)), [k]
        for old in [g for g in groups if g[0] & support]:
            groups.remove(old)
            support, members = support | old[0], [*old[1], *members]
        groups.append((support, members))
    return sorted(tuple(sorted(members)) for _, members in groups)


def _group_prox(group: tuple[int, ...], terms: Sequence[ProxTerm], variables: Sequence[Any]) -> ConvexProx | None:
    """A ConvexProx for terms that have no joint proximal map in closed form."""
    members = [terms[k] for k in group]
    if closed_form(members):
        return None
    objectives = [t.source[0] for t in members if t.source[0] is not None]
    constraints = [c for t in members for c in t.source[1]]
    ids = {v.id for part in [*objectives, *constraints] for v in part.variables()}
    own = [v for v in variables if v.id in ids]
    if any(v.is_complex() for v in own):
        return None
    return ConvexProx(sum(objectives) if objectives else None, constraints, own)


def closed_form(members: Sequence[ProxTerm]) -> bool:
    """True for one term with a tight or diagonal map, an affine set, or a separable term within a box."""
    selections = [t for t in members if t.map.fixed is not None and t.map.fixed.index is not None]
    if len(members) == 2 and len(selections) == 2:
        kinds = {t.kind: t for t in members}
        box, other = kinds.get("box"), next((t for t in members if t.kind in ("norm1", "norm0", "huber")), None)
        return box is not None and other is not None and _support(box) >= _support(other)
    (term,) = members if len(members) == 1 else (None,)
    if term is None or term.kind == "program" or term.map.fixed is None:
        return False
    if term.kind == "zero" or term.map.fixed.tight is not None:
        return True
    return PROXIMABLE[term.kind].separable and term.map.fixed.row_products is not None


def _describe(s: Split, linear: list[str]) -> str:
    parts = []
    if s.quadratics:
        L = "varies with the context" if s.varies_with_context() else f"L = {s.L:.4g}"
        parts.append(f"smooth {' + '.join(q.text for q in s.quadratics)} ({L})")
    parts += [f"linear {text}" for text in linear]
    joint = {k: prox is not None and len(group) > 1 for group, prox in s.groups for k in group}
    for k, t in enumerate(s.terms):
        how = "ConvexLayer" if t.kind == "program" else PROXIMABLE[t.kind].text
        parts.append(f"{t.text} [{how}{'; joint prox by a ConvexLayer' if joint[k] and t.kind != 'program' else ''}]")
    return " + ".join(parts)


def _like(contexts: Mapping[str, Tensor], variables: tuple[Shape, ...]) -> Tensor:
    """An empty tensor of the dtype and device of z; half precision, which factorizations lack, counts as single."""
    dtypes = [v.dtype for v in contexts.values()]
    floats = [d for d in dtypes if d.is_floating_point or d.is_complex] or [torch.get_default_dtype()]
    dtype = floats[0]
    for d in floats[1:]:
        dtype = torch.promote_types(dtype, d)
    dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    if any(v.is_complex for v in variables):
        dtype = dtype.to_complex()
    elif dtype.is_complex:
        raise ShapeError("a context is complex, but the problem's variables are real; declare them complex=True")
    return torch.empty(0, dtype=dtype, device=next(iter(contexts.values())).device)


__all__ = ["BoundTerm", "Instance", "LinearMap", "Split", "bind_term", "pretty", "split"]
