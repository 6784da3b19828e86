"""Proximal maps and objectives with sound inputs, and arguments that none of them can take."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fuzz_subjects import Subject, normal
from torch import Tensor

import convexlearn as cl
from convexlearn import objectives, prox, shrinkage, spectral


@dataclass(frozen=True, eq=False)
class Function(Subject):
    """A Subject of whose inputs the first `complexes` may be complex, and those at `optional` None.

    batches: any number of leading dimensions is a batch.
    """

    complexes: int = 0
    optional: tuple[int, ...] = ()
    batches: bool = False


def maker(call: Any, *inputs: Tensor, **flags: Any) -> Callable[[], Function]:
    """A maker of a subject."""
    return lambda: Function(call, inputs, **flags)


NAN = math.nan
V, M, Q, POSITIVE = (
    normal(3, 6, seed=1),
    normal(3, 4, 5, seed=2),
    normal(3, 4, 4, seed=3),
    normal(3, 1, seed=4).abs() + 0.1,
)
T3 = POSITIVE[..., None]
ENTRIES = {"leading": True, "lengths": True}


def proximal_maps() -> dict[str, Callable[[], Function]]:
    """prox.py, shrinkage.py, spectral.py."""
    free = {**ENTRIES, "complexes": True}
    per_axis = {
        f"group_threshold {axis}": maker(
            lambda v, t, axis=axis: prox.group_threshold(v, t, axis=axis), M, T3, complexes=True, **ENTRIES
        )
        for axis in (0, 1)
    }
    values = {
        f"value of {kind}": maker(*value_of(kind), complexes=kind not in REAL, **ENTRIES) for kind in prox.PROXIMABLE
    }
    return {
        "soft_threshold": maker(prox.soft_threshold, V, POSITIVE, batches=True, **free),
        "hard_threshold": maker(prox.hard_threshold, V, POSITIVE, batches=True, **free),
        "block_threshold": maker(prox.block_threshold, V, POSITIVE, **free),
        "singular_value_threshold": maker(prox.singular_value_threshold, M, T3, **free),
        "huber_prox": maker(lambda v, t, m: prox.huber_prox(v, t, M=m), V, POSITIVE, POSITIVE + 1, **ENTRIES),
        "total_variation_prox": maker(prox.total_variation_prox, V, POSITIVE, **ENTRIES),
        "largest_entry_prox": maker(prox.largest_entry_prox, V, POSITIVE, **free),
        "project_zero": maker(prox.project_zero, V, **free, gaps=True),
        "project_nonnegative": maker(prox.project_nonnegative, V, **ENTRIES),
        "project_box": maker(lambda v, a, b: prox.project_box(v, lower=a, upper=b), V, -POSITIVE, POSITIVE, **ENTRIES),
        "project_simplex": maker(lambda v, r: prox.project_simplex(v, radius=r), V, POSITIVE, **ENTRIES),
        "project_ball": maker(lambda v, r: prox.project_ball(v, radius=r), V, POSITIVE, **free),
        "project_norm1_ball": maker(lambda v, r: prox.project_norm1_ball(v, radius=r), V, POSITIVE, **free),
        "project_second_order_cone": maker(prox.project_second_order_cone, V, lengths=True),
        "project_psd": maker(prox.project_psd, Q, complexes=True),
        "project_psd of the symmetric part": maker(lambda v: prox.project_psd(v, symmetric=False), Q, complexes=True),
        "symmetrise": maker(prox.symmetrise, Q, complexes=True),
        "relative_singular_value_threshold": maker(shrinkage.relative_singular_value_threshold, M, T3 / 4, **free),
        "relative_soft_threshold": maker(shrinkage.relative_soft_threshold, V, POSITIVE / 4, **free),
        "relative_power_threshold": maker(shrinkage.relative_power_threshold, V, POSITIVE / 4, **free),
        "shrink_singular_values": maker(spectral.shrink_singular_values, M, POSITIVE[:, 0], batches=True, **free),
        "positive_part": maker(spectral.positive_part, Q, batches=True, leading=True, complexes=True),
        **per_axis,
        **values,
    }


def value_of(kind: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """An entry of the table as a function; of an indicator, whether a point is outside, NaN where it is none."""
    entry, data = prox.PROXIMABLE[kind], DATA.get(kind, {})

    def value(v: Tensor) -> Tensor:
        found = entry.evaluate(v, torch.tensor(0.5), data)
        return (
            found
            if entry.value is not None
            else found.isinf().to(found) * torch.as_tensor(v).real.flatten(1).sum(1).detach()
        )

    return value, NATURAL.get(kind, V)


REAL = ("huber", "total_variation", "nonnegative", "box", "simplex", "second_order_cone")
NATURAL = {"group": M, "nuclear": M, "psd_cone": Q, "symmetric": Q}
DATA = {"box": {"lower": -0.5, "upper": 0.5}}


def run_of(**parts: Any) -> cl.Trajectory:
    """A trajectory with these parts, past the checks of Trajectory itself."""
    run = cl.Trajectory(V, V)
    for name, part in {"failed": torch.zeros(len(V), dtype=torch.bool), **parts}.items():
        object.__setattr__(run, name, part)
    return run


def judged(objective: Callable[[cl.Trajectory], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """An objective as a function of decision and target."""
    return lambda s, target: objective(run_of(decision=s, target=target))


def rows(s: Any) -> int:
    """The batch size of what may be no tensor."""
    return len(s) if isinstance(s, Tensor) and s.ndim else 3


def objective_functions() -> dict[str, Callable[[], Function]]:
    """objectives.py."""
    kinds = ("squared_error", "mean_squared_error", "known_squared_error", "absolute_error", "psnr")
    targets, labels = normal(3, 6, seed=5), torch.ones(6, dtype=torch.int64)
    series, sequence = normal(3, 4, 2, seed=6), torch.tensor([[1, 0, 1, 1]] * 6)
    found = {}
    for kind in kinds:
        objective = objectives.psnr(2.0) if kind == "psnr" else getattr(objectives, kind)
        flags = {"lengths": True, "leading": True, "complexes": 2, "gaps": kind == "known_squared_error"}
        found[kind] = maker(judged(objective), V, targets, **flags)
    for kind in ("cross_entropy", "error_rate", "accuracy"):
        objective = getattr(objectives, kind)
        found[kind] = maker(lambda s, f=objective: judged(f)(s, labels[: rows(s)]), V, lengths=True)
        found[f"{kind} over time"] = maker(
            lambda s, f=objective: judged(f)(s, sequence[: rows(s)]), series, lengths=True
        )
    found["cost"] = maker(lambda c: objectives.cost(run_of(cost=c)), normal(3, 4, seed=7), **ENTRIES)
    return found


def unsound_objectives() -> list[tuple[str, Callable[[], Any]]]:
    """Of objectives.py."""
    compared = [objectives.squared_error, objectives.mean_squared_error, objectives.known_squared_error]
    compared += [objectives.absolute_error, objectives.psnr(), objectives.error_rate, objectives.accuracy]
    compared += [objectives.cross_entropy]
    labels = torch.zeros(3, dtype=torch.int64)
    run = cl.Trajectory(V, V)
    wrong: list[Any] = [None, V, "x", 1.0, {"decision": V}]
    junk = [lambda t: 1.0, lambda t: None, lambda t: V, lambda t: V.sum(), lambda t: 1j * V[:, 0], lambda t: [1, 2, 3]]
    return [
        *[("trajectory", lambda f=f, t=t: f(t)) for f in (*compared, objectives.cost) for t in wrong],
        *[("targets", lambda f=f: f(run)) for f in compared],
        *[("decision", lambda f=f: f(cl.Trajectory(V, (V, V), target=V))) for f in compared],
        *[("target", lambda f=f: f(cl.Trajectory(V, V, target=(V, V)))) for f in compared],
        *[("targets", lambda f=f: f(cl.Trajectory(V, V, target=M))) for f in compared],
        *[("label", lambda f=f, k=k: judged(f)(V, labels + k)) for f in compared[-3:] for k in (-1, 6, 99)],
        ("labels", lambda: objectives.cross_entropy(cl.Trajectory(V, V, target=V[:, 0]))),
        ("labels", lambda: objectives.cross_entropy(cl.Trajectory(V, V[:, 0], target=labels))),
        ("cost", lambda: objectives.cost(run)),
        *[
            ("peak", lambda p=p: objectives.psnr(p))
            for p in (0.0, -1, "x", None, True, NAN, math.inf, 1j, torch.ones(2))
        ],
        *[("objective", lambda f=f: objectives.judge(f, run)) for f in junk],
        *[("objective", lambda f=f: objectives.check_objective(f, "tune")) for f in (None, "x", 1, V, dict, lambda: V)],
    ]


def unsound_proximal_arguments() -> list[tuple[str, Callable[[], Any]]]:
    """Of prox.py, shrinkage.py and spectral.py."""
    weighted = {
        prox.soft_threshold: V, prox.hard_threshold: V, prox.block_threshold: V, prox.huber_prox: V,
        prox.total_variation_prox: V, prox.largest_entry_prox: V, prox.group_threshold: M,
        prox.singular_value_threshold: M, shrinkage.relative_singular_value_threshold: M,
        shrinkage.relative_soft_threshold: V, shrinkage.relative_power_threshold: V,
    }  # fmt: skip
    weights = [-1.0, -1, "x", None, 1j, torch.tensor(-1.0), torch.tensor([0.1] * 7), torch.ones(2, 3, 6), 1j * POSITIVE]
    radii = [-1.0, "x", None, 1j, torch.tensor(-1.0), torch.tensor([0.1] * 7), 1j * POSITIVE]
    balls = (prox.project_ball, prox.project_simplex, prox.project_norm1_ball)
    one = torch.tensor(1.0)
    batched = (prox.block_threshold, prox.group_threshold, prox.largest_entry_prox, prox.singular_value_threshold)
    bounds = [(side, x) for side in ("lower", "upper") for x in ("x", None, 1j, torch.ones(7))]
    return [
        *[("t", lambda f=f, v=v, t=t: f(v, t)) for f, v in weighted.items() for t in weights],
        *[("radius", lambda f=f, r=r: f(V, radius=r)) for f in balls for r in radii],
        *[("M", lambda m=m: prox.huber_prox(V, 1.0, M=m)) for m in radii[:-2]],
        *[("axis", lambda a=a: prox.group_threshold(M, 1.0, axis=a)) for a in (2, -1, None, "x", 0.5, 1j)],
        *[("v", lambda f=f: f(one, 1.0)) for f in (*batched, shrinkage.relative_soft_threshold)],
        *[("v", lambda f=f, v=v: f(v, 1.0)) for f in batched[1::2] for v in (V, M[None])],
        *[("v", lambda f=f, v=v: f(v)) for f in (prox.project_psd, prox.symmetrise) for v in (V, M, Q[None])],
        *[("v", lambda v=v: prox.project_second_order_cone(v)) for v in (V[0], M)],
        *[("v", lambda v=v: prox.total_variation_prox(v, 1.0)) for v in (V[0], M)],
        *[(s, lambda s=s, x=x: prox.project_box(V, **{"lower": -1.0, "upper": 1.0, s: x})) for s, x in bounds],
        ("lower", lambda: prox.project_box(V, lower=1.0, upper=0.0)),
        *[("X", lambda X=X: spectral.positive_part(X)) for X in (V[0], M)],
        ("X", lambda: spectral.shrink_singular_values(V[0], 1.0)),
        ("t", lambda: spectral.shrink_singular_values(M, torch.ones(4))),
        ("v", lambda: prox.project_simplex(torch.zeros(2, 0))),
    ]  # fmt: skip
