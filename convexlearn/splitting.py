"""cvxpy.Problem -> smooth quadratic + terms with a proximal map, named and printed (Examples 5, 9, 10)."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from convexlearn.affine_maps import AffineMap, LinearMap, affine_map
from convexlearn.checks import shown
from convexlearn.convex_prox import ConvexProx
from convexlearn.domains import Domain
from convexlearn.errors import CompileError, MissingParameterError, OptionError, ShapeError, suggest
from convexlearn.expression_text import pretty
from convexlearn.inputs import as_floating
from convexlearn.program.declaration import Declaration, value_of
from convexlearn.prox import PROXIMABLE
from convexlearn.split_instance import BoundTerm, Instance, Shape, bind_term
from convexlearn.term_groups import closed_form, merge_terms, overlaps, support
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
        given = {} if values is None else self._values(values)
        self._check_domains({**contexts, **given})
        flat: dict[str, Tensor] = {}
        for name, slot in self.parameters.items():
            value = given.get(name, slot.value)
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
        touched = sorted(set().union(*(support(self.terms[k]) for k in group)))
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
        z = self._point(z, instance)
        for mapped in self.decisions:
            s = mapped.matrix(instance.values, z)(z) + mapped.offset(instance.values, z)
            parts.append(s.reshape(len(z), *mapped.shape))
        return parts[0] if self.single else tuple(parts)

    def objective(self, z: Tensor, instance: Instance) -> Tensor:
        """Objective `(B,)` at z `(B, n)`, infinite beyond 1e-6 outside a constraint; a ConvexLayer's terms left out."""
        z = self._point(z, instance)
        return instance.objective(z)

    def _point(self, z: Any, instance: Any) -> Tensor:
        """z `(B, n)`, in the dtype of the instance."""
        if not isinstance(instance, Instance):
            raise OptionError(f"split: instance must be what bind(x) returns, got {shown(instance)}")
        if not isinstance(z, Tensor) or not z.is_complex():
            z = as_floating("z", z, "split: point")
        if z.shape != (instance.batch, self.size):
            raise ShapeError(f"split: z must have shape ({instance.batch}, {self.size}), got {tuple(z.shape)}")
        if z.is_complex() and not instance.like.is_complex():
            raise ShapeError("split: z is complex, but the problem's variables are real")
        return z.to(instance.like.dtype)

    def _values(self, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Parameter values by name, in the shapes that are declared."""
        if not isinstance(values, Mapping):
            raise OptionError(f"split: values must map names of parameters to tensors, got {shown(values)}")
        found = {}
        for name, value in values.items():
            if name not in self.parameters:
                raise OptionError(f"split: no parameter '{name}'; {suggest(name, self.parameters)}")
            if not (isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())):
                value = as_floating(name, value)
            if tuple(value.shape) != self.shapes[name]:
                raise ShapeError(f"parameter '{name}' must have shape {self.shapes[name]}, got {tuple(value.shape)}")
            found[name] = value
        return found

    def _check_domains(self, given: Mapping[str, Tensor]) -> None:
        """DomainError for a value outside its parameter's domain; NaN is inside, and stays in its sample."""
        if torch.compiler.is_compiling():
            return
        domains = self.__dict__.get("_domains")
        if domains is None:
            declared = {p.name(): p for p in self.declaration.problem.parameters()}
            found = {name: _domain(p) for name, p in declared.items()}
            domains = self.__dict__["_domains"] = {name: domain for name, domain in found.items() if domain.checked}
        for name in domains.keys() & given.keys():
            with contextlib.suppress(RuntimeError):  # values cannot be read within vmap
                domains[name].check(name, given[name])

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
            if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
                value = as_floating(name, value, "context")
            if not isinstance(value, Tensor) or value.ndim != len(shape) + 1 or tuple(value.shape[1:]) != shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ShapeError(
                    f"context '{name}' must be a tensor of shape (B, {', '.join(map(str, shape))}), got {got}"
                )
            contexts[name] = value
        sizes = {name: len(value) for name, value in contexts.items()}
        if len(set(sizes.values())) > 1:
            raise ShapeError(f"contexts have different batch sizes: {sizes}")
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
    _check_arguments(problem, context, outputs)
    names = {p.name() for p in problem.parameters()}
    for p in context:
        if p.name() not in names:
            raise CompileError(f"context parameter '{p.name()}' is not in the problem; it has {sorted(names)}")
    declaration = Declaration.of(problem, problem.parameters(), outputs)
    fed = tuple(p.name() for p in context)
    return read_split(declaration, fed, isinstance(decision, list | tuple), None, {}, None)


def _check_arguments(problem: Any, context: list[Any], outputs: list[Any]) -> None:
    if not isinstance(problem, cp.Problem):
        raise OptionError(f"cl.split: problem must be a cvxpy.Problem or a ConvexRule, got {shown(problem)}")
    for kind, items, wanted in (("context", context, cp.Parameter), ("decision", outputs, cp.Expression)):
        wrong = [item for item in items if not isinstance(item, wanted)]
        if wrong or not items:
            raise OptionError(
                f"cl.split: {kind} must be a cvxpy.{wanted.__name__} or a list of them, got "
                f"{shown(wrong[0]) if wrong else 'an empty list'}"
            )
    if len({p.name() for p in context}) < len(context):
        raise OptionError(f"cl.split: context names a parameter twice: {[p.name() for p in context]}")


def _domain(p: Any) -> Domain:
    return Domain.from_attributes(p.shape, {k: v for k, v in p.attributes.items() if k != "complex"}, p.sparse_idx)


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
    groups = tuple((g, _group_prox(g, terms, variables)) for g in overlaps(terms))
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
    return ParameterSlot(p.name(), value, _domain(p), learned is None or p.name() in learned)


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
        name = next(name for name, value in contexts.items() if value.is_complex())
        raise ShapeError(
            f"context '{name}' is complex, but the problem's variables are real; declare them complex=True"
        )
    return torch.empty(0, dtype=dtype, device=next(iter(contexts.values())).device)


__all__ = ["BoundTerm", "Instance", "LinearMap", "Split", "bind_term", "pretty", "split"]
