"""Splits and iterations step by step with sound inputs, and arguments that none of them can take."""

import math
from collections.abc import Callable
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from fuzz_functions import Function, maker
from fuzz_subjects import H, lasso, normal
from torch import Tensor, nn

import convexlearn as cl
from convexlearn.convex_prox import ConvexProx
from convexlearn.iterations.circulant import spectrum

NAN = math.nan
X, FRAMES = normal(3, 4, seed=41), normal(3, 4, 3, seed=42)
WEIGHT = normal(3, seed=43).abs() + 0.1
MATRIX = normal(3, 4, 3, seed=44)


def weighted() -> cl.Split:
    """Sparse recovery whose weight is context."""
    s, x, rho = cp.Variable(6), cp.Parameter(4, name="x"), cp.Parameter(nonneg=True, name="rho")
    return cl.split(cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - H.numpy() @ s) + rho * cp.norm1(s))), [x, rho], s)


def measured() -> cl.Split:
    """Sparse recovery whose matrix is context."""
    s, x, G = cp.Variable(3), cp.Parameter(4, name="x"), cp.Parameter((4, 3), name="G")
    return cl.split(cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - G @ s) + 0.3 * cp.norm1(s))), [x, G], s)


def bounded(kind: str) -> cl.Split:
    """Least squares in a set whose size is context: a box, a ball, a 1-norm ball, or a halfspace of a box."""
    s, x, size = cp.Variable(4), cp.Parameter(4, name="x"), cp.Parameter(name="size")
    sets = {
        "box": [s <= size, s >= -0.5],
        "ball": [cp.norm(s) <= size],
        "norm1_ball": [cp.norm1(s) <= size],
        "joint": [cp.abs(s) <= size, cp.sum(s) >= 0],
    }
    return cl.split(cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - s)), sets[kind]), [x, size], s)


def grouped(axis: int) -> cl.Split:
    """Group sparsity whose weight is context."""
    s, x, rho = cp.Variable((4, 3)), cp.Parameter((4, 3), name="x"), cp.Parameter(nonneg=True, name="rho")
    size = cp.sum(cp.norm(s, 2, axis=axis))
    return cl.split(cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - s) + rho * size)), [x, rho], s)


def steps(iteration: Any, count: int = 3) -> Callable[..., Tensor]:
    """The decision after some steps, and the core of the state."""

    def run(*x: Tensor) -> Tensor:
        instance = iteration.bind(*x)
        state = iteration.start(instance)
        for _ in range(count):
            state = iteration.step(state, instance)
        state = iteration.step(iteration.resume(iteration.core(state), instance), instance)
        return iteration.split.decide(iteration.decision(state), instance)

    return run


def iteration_functions() -> dict[str, Callable[[], Function]]:
    """splitting.py, split_instance.py, convex_prox.py, iterations/."""
    plain = cl.split(lasso())
    pursuit = cl.ADMM(cl.principal_component_pursuit((4, 3)))
    robust = cl.RobustPCA(cl.robust_pca((4, 3), 0.5, 0.1))
    z, t = cp.Variable(4), cp.Parameter(4, name="centre")
    program = ConvexProx(cp.norm(z - t, "inf"), [cp.sum(z) >= 0], [z])
    rough = 1e-5  # between two solves of a joint proximal map
    found = {
        f"{kind.__name__} {name}": maker(steps(kind(build())), *x, lengths=name == "weighted")
        for kind in (cl.ISTA, cl.FISTA, cl.ADMM, cl.PrimalDual)
        for name, build, x in (
            ("lasso", lambda: plain, (X,)),
            ("weighted", weighted, (X, WEIGHT)),
            ("measured", measured, (X, MATRIX)),
        )
    }
    for axis in (0, 1):
        split = grouped(axis)
        found[f"ISTA group {axis}"] = maker(steps(cl.ISTA(split)), FRAMES, WEIGHT, lengths=True)
        found[f"Split.objective group {axis}"] = maker(
            lambda z, x, t, split=split: split.objective(z, split.bind(x, t)),
            normal(3, 12, seed=46),
            FRAMES,
            WEIGHT,
            lengths=True,
        )
    for name in ("box", "ball", "norm1_ball"):
        found[f"ISTA {name}"] = maker(steps(cl.ISTA(bounded(name))), X, WEIGHT, lengths=True)
    return {
        **found,
        "ISTA joint": maker(steps(cl.ISTA(bounded("joint")), 1), X, WEIGHT, tolerance=rough, lengths=True),
        "AMP": maker(steps(cl.AMP(plain)), X),
        "LISTA": maker(steps(cl.ISTA(plain).free("W1", "W2")), X),
        "LISTA coupled": maker(steps(cl.ISTA(plain).free("W1")), X),
        "ADMM-Net": maker(steps(cl.ADMM(plain).free("W1", "W2")), X),
        "plug-and-play": maker(steps(cl.ADMM(plain).replace(prox="relative_norm1")), X),
        "RobustPCA": maker(lambda D: steps(robust)(D)[0], FRAMES),
        "principal component pursuit": maker(lambda D: steps(pursuit)(D)[1], FRAMES),
        "Split.objective": maker(lambda z, x: plain.objective(z, plain.bind(x)), normal(3, 6, seed=45), X),
        "Split.decide": maker(lambda z, x: plain.decide(z, plain.bind(x)), normal(3, 6, seed=45), X, gaps=True),
        "Instance.gradient": maker(lambda x: plain.bind(x).gradient(plain.bind(x).zeros()), X),
        "ConvexProx": maker(
            lambda v, t, c: program(v, t[:, None] if isinstance(t, Tensor) else t, centre=c),
            X, WEIGHT, X.flip(0), tolerance=rough, optional=(1,), leading=True, lengths=True,
        ),
    }  # fmt: skip


def unsound_iterations() -> list[tuple[str, Callable[[], Any]]]:
    """What to split, slots, states, values and shapes."""
    s, x, other = cp.Variable(4), cp.Parameter(4, name="x"), cp.Parameter(3, name="other")
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - s) + cp.norm1(s)))
    plain = cl.split(lasso())
    kinds = (cl.ISTA, cl.FISTA, cl.ADMM, cl.PrimalDual, cl.AMP, cl.RobustPCA)
    ista, admm = cl.ISTA(plain), cl.ADMM(plain)
    instance = plain.bind(X)
    numbers = ("x", None, 1j, NAN, math.inf, -1.0, 0.0, object(), [1.0, 2.0], torch.ones(7), nn.Linear(1, 1))
    junk = (None, "x", 3, object(), X)
    matrices = ("x", None, NAN, 1.0, torch.ones(6), torch.ones(6, 4) * NAN)
    wide = (torch.ones(6, 5), torch.ones(5, 4), torch.ones(1, 4))
    bad = [
        *[("problem", lambda p=p: cl.split(p, [x], s)) for p in junk],
        *[("context", lambda c=c: cl.split(problem, c, s)) for c in (None, "x", 3, s, [x, x], [None], [], [other])],
        *[("decision", lambda d=d: cl.split(problem, [x], d)) for d in (None, "x", 3, [], [None], [s, "x"])],
        *[("split", lambda k=k, v=v: k(v)) for k in kinds for v in (*junk, problem)],
        *[("slot", lambda k=k: k(plain, stepp=1.0)) for k in kinds[:-1]],
        *[("step", lambda v=v: ista.replace(step=v)) for v in numbers],
        *[("penalty", lambda v=v: admm.replace(penalty=v)) for v in numbers],
        *[("momentum", lambda v=v: cl.FISTA(plain, momentum=v)) for v in ("x", None, 1j, NAN, torch.ones(2))],
        *[("threshold", lambda v=v: ista.replace(threshold=v)) for v in ("x", None, 1j, NAN, -1.0, object())],
        *[("W1", lambda v=v: ista.replace(W1=v)) for v in matrices],
        *[("W1", lambda v=v: steps(ista.replace(W1=v))(X)) for v in wide],
        *[("W2", lambda v=v: steps(ista.replace(W2=v))(X)) for v in wide],
        *[("W2", lambda v=v: steps(admm.replace(W2=v))(X)) for v in wide],
        *[("prox", lambda v=v: ista.replace(prox=v)) for v in ("x", 3, 1.0, None, X)],
        *[("prox", lambda v=v: steps(ista.replace(prox=lambda z: v))(X)) for v in (None, "x", 3.0)],
        *[("prox", lambda v=v: ista.replace(prox=v)) for v in ("box", lambda: 1, lambda a, b, c: a, nn.ReLU)],
        *[("image", lambda v=v: ista.convolve("W1", image=v)) for v in ("ab", 5, (3,), (0, 2), (-2, -3), (1.5, 2))],
        *[("restart", lambda v=v: cl.FISTA(plain, restart=v)) for v in (None, "x", 1)],
        *[("k", lambda v=v: cl.FISTA(plain).initial("momentum", v)) for v in (None, "x", -1, 1.5)],
        *[("threshold", lambda v=v: steps(ista.replace(threshold=v))(X)) for v in (torch.ones(3), torch.ones(2, 2))],
        ("state", lambda: admm.step(ista.start(instance), instance)),
        ("state", lambda: ista.step(ista.resume(X, instance), instance)),
        ("state", lambda: ista.step(ista.start(plain.bind(X[:2])), instance)),
        *[("gram", lambda f=f: spectrum(f, (4,))) for f in (None, "x", 3)],
        *[("shape", lambda v=v: spectrum(lambda z: z, v)) for v in (None, "x", (0,), 3)],
        *[("sigma", lambda v=v: ista.replace(prox="norm1", sigma=v)) for v in ("x", None, NAN, -1.0, torch.ones(2, 2))],
        *[("slot", lambda n=n: ista.free(n)) for n in ("x", "step", None, 3)],
        *[("slot", lambda k=k, n=n: k(plain).initial(n)) for k in kinds[:-1] for n in ("x", None, 3)],
        *[("slot", lambda k=k: k(plain).step(k(plain).start(instance), instance, {"stepp": 1.0})) for k in kinds[:-1]],
        *[("instance", lambda k=k, v=v: k(plain).layer(v)) for k in kinds[:-1] for v in junk],
        *[("state", lambda k=k, v=v: k(plain).step(v, instance)) for k in kinds[:-1] for v in junk],
        *[("x", lambda v=v: plain.bind(v)) for v in (None, "x", 3.0, X[0], X[:, :3], X[None], 1j * X)],
        *[("context", lambda v=v: plain.bind(*v)) for v in ((), (X, X))],
        *[("rho", lambda v=v: weighted().bind(X, v)) for v in (WEIGHT[:2], WEIGHT[:, None], WEIGHT[0], -WEIGHT)],
        *[("rho", lambda v=v: plain.bind(X, values={"rho": v})) for v in ("x", None, 1j, torch.ones(2), -1.0)],
        *[("values", lambda v=v: plain.bind(X, values=v)) for v in ("x", 3, [1.0])],
        ("rhoo", lambda: plain.bind(X, values={"rhoo": torch.tensor(1.0)})),
        *[("z", lambda z=z: plain.objective(z, instance)) for z in (None, "x", X, X[0], torch.ones(2, 6))],
        *[("instance", lambda v=v: plain.objective(torch.ones(3, 6), v)) for v in junk],
    ]  # fmt: skip
    E = np.array([[1.0, 2.0, 0.0, 0.0], [3.0, 6.0, 0.0, 0.0]])
    twice = cl.split(cp.Problem(cp.Minimize(cp.sum_squares(x - s)), [E @ s == np.array([1.0, 3.0])]), [x], s)
    bad += [("equality", lambda k=k: steps(k(twice))(X)) for k in (cl.ISTA, cl.ADMM)]
    return [*bad, *unsound_programs(s, x), *unsound_pursuits()]


def unsound_programs(s: cp.Variable, x: cp.Parameter) -> list[tuple[str, Callable[[], Any]]]:
    """Of ConvexProx."""
    program, junk = ConvexProx(cp.norm1(s), [], [s]), (None, "x", 3, object(), X)
    return [
        *[("objective", lambda v=v: ConvexProx(v, [], [s])) for v in ("x", 3, X, -cp.norm1(s))],
        *[("constraints", lambda v=v: ConvexProx(None, v, [s])) for v in (None, 3, "x", [s], [None], s >= 0)],
        *[("variables", lambda v=v: ConvexProx(None, [], v)) for v in (None, 3, "x", [x], [None], s, [])],
        *[("v", lambda v=v: program(v, 1.0)) for v in (*junk[:-1], X[0], X[:, :3], 1j * X)],
        *[("t", lambda t=t: program(X, t)) for t in ("x", 0.0, -1.0, 1j, torch.ones(2), torch.ones(1, 3))],
    ]


def unsound_pursuits() -> list[tuple[str, Callable[[], Any]]]:
    """Of robust_pca and principal_component_pursuit."""
    shapes, weights = (None, "ab", (3,), (0, 2), (1.5, 2), 3, (2, 2, 2)), ("x", -1.0, NAN, 1j, torch.ones(2))
    return [
        *[("shape", lambda v=v: cl.robust_pca(v, 0.5, 0.1)) for v in shapes],
        *[("shape", lambda v=v: cl.principal_component_pursuit(v)) for v in shapes],
        *[("low_rank", lambda w=w: cl.robust_pca((2, 2), w, 0.1)) for w in (None, *weights)],
        *[("sparse", lambda w=w: cl.robust_pca((2, 2), 0.1, w)) for w in (None, *weights)],
        *[("weight", lambda w=w: cl.principal_component_pursuit((2, 2), w)) for w in weights],
    ]
