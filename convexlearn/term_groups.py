"""Which terms of a split act together: bounds that are one box, terms that share entries, maps known in closed form."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from convexlearn.prox import PROXIMABLE
from convexlearn.terms import ProxTerm


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
    psd = {support(t) for t in others if t.kind == "psd_cone"}
    others = [t for t in others if not (t.kind == "symmetric" and support(t) in psd)]
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
    return zero and support(t) == support(box) and len(set(row[index].tolist())) == 1


def support(t: ProxTerm) -> frozenset[int]:
    """Entries of z that the term depends on."""
    linear = t.map.fixed
    if linear is None:
        return frozenset(range(t.map.columns))
    if linear.index is not None:
        return frozenset(linear.index.tolist())
    matrix: Any = linear.matrix
    columns = matrix.coalesce().indices()[1] if matrix.is_sparse else matrix.nonzero()[:, 1]
    return frozenset(columns.tolist())


def overlaps(terms: Sequence[ProxTerm]) -> list[tuple[int, ...]]:
    """Sets of terms that are linked by common entries of z, in order of their first member."""
    groups: list[tuple[set[int], list[int]]] = []
    for k, t in enumerate(terms):
        entries, members = set(support(t)), [k]
        for old in [g for g in groups if g[0] & entries]:
            groups.remove(old)
            entries, members = entries | old[0], [*old[1], *members]
        groups.append((entries, members))
    return sorted(tuple(sorted(members)) for _, members in groups)


def closed_form(members: Sequence[ProxTerm]) -> bool:
    """True for one term with a tight or diagonal map, an affine set, or a separable term within a box."""
    selections = [t for t in members if t.map.fixed is not None and t.map.fixed.index is not None]
    if len(members) == 2 and len(selections) == 2:
        kinds = {t.kind: t for t in members}
        box, other = kinds.get("box"), next((t for t in members if t.kind in ("norm1", "norm0", "huber")), None)
        return box is not None and other is not None and support(box) >= support(other)
    (term,) = members if len(members) == 1 else (None,)
    if term is None or term.kind == "program" or term.map.fixed is None:
        return False
    if term.kind == "zero" or term.map.fixed.tight is not None:
        return True
    return PROXIMABLE[term.kind].separable and term.map.fixed.row_products is not None
