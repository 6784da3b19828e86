"""Workloads: each declares a fresh CVXPY problem per layer and draws its parameter tensors from a seed."""

from collections.abc import Callable
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from benchmarks import conic_reference
from convexlearn.problems import feasible_dispatch
from convexlearn.problems.power_grid import ieee30


@dataclass(frozen=True)
class Declared:
    """A CVXPY problem with the parameters a layer takes and the variables it returns, in order."""

    problem: cp.Problem
    parameters: list[cp.Parameter]
    variables: list[cp.Variable]


Layer = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Workload:
    """`declare()` makes a fresh problem, `values(batch)` the parameter tensors (float64, requiring gradient).

    `run(layer, values)` returns the decisions; by default one call of the layer. `standard(values)`
    returns (Q, p, G, h, A, b) of min 1/2 x'Qx + p'x, Gx <= h, Ax = b where peers need that form.
    `exact(*values)` returns the exact decisions under autograd where the reference for QPs and LPs can't.
    """

    name: str
    title: str
    declare: Callable[[], Declared]
    values: Callable[[int], list[Tensor]]
    batches: tuple[int, ...]
    run: Callable[[Layer, list[Tensor]], Tensor]
    standard: Callable[[list[Tensor]], tuple[Tensor, ...]] | None = None
    exact: Callable[..., Tensor] | None = None


def one_call(layer: Layer, values: list[Tensor]) -> Tensor:
    """The first output of one call."""
    return layer(*values)[0]


def _leaf(array: np.ndarray) -> Tensor:
    return torch.tensor(array, dtype=torch.float64, requires_grad=True)


def _stable(rng: np.random.Generator, n: int) -> np.ndarray:
    """A random matrix (n, n) of spectral radius 1."""
    A = rng.standard_normal((n, n))
    return A / np.abs(np.linalg.eigvals(A)).max()


def box_mpc(name: str, n: int, m: int, horizon: int, batches: tuple[int, ...]) -> Workload:
    """Box-constrained MPC with shared A, B, Qh, Ph and batched initial states; 2 N(0, I) each."""

    def declare() -> Declared:
        A, B = cp.Parameter((n, n), name="A"), cp.Parameter((n, m), name="B")
        Qh, Ph = cp.Parameter((n, n), name="Qh"), cp.Parameter((n, n), name="Ph")
        x0 = cp.Parameter(n, name="x0")
        u, x = cp.Variable((horizon, m)), cp.Variable((horizon + 1, n))
        cost = cp.sum_squares(Ph @ x[horizon])
        constraints = [x[0] == x0]
        for t in range(horizon):
            cost += 0.3 * cp.sum_squares(u[t]) + cp.sum_squares(Qh @ x[t])
            constraints += [x[t + 1] == A @ x[t] + B @ u[t], cp.norm_inf(u[t]) <= 0.5]
        return Declared(cp.Problem(cp.Minimize(cost), constraints), [A, B, Qh, Ph, x0], [u])

    def values(batch: int) -> list[Tensor]:
        rng = np.random.default_rng(0)
        A, B = _stable(rng, n), rng.standard_normal((n, m)) / np.sqrt(n)
        Qh = np.eye(n) + 0.1 * rng.standard_normal((n, n))
        Ph = 2 * np.eye(n) + 0.1 * rng.standard_normal((n, n))
        return [_leaf(v) for v in (A, B, Qh, Ph, 2 * rng.standard_normal((batch, n)))]

    title = f"box MPC n={n} m={m} T={horizon}"
    return Workload(name, title, declare, values, batches, one_call)


def lasso(name: str, rows: int, cols: int, batches: tuple[int, ...]) -> Workload:
    """0.5 |x - Hs|^2 + rho |s|_1 with H and rho shared, x batched measurements of sparse signals."""

    def declare() -> Declared:
        H, rho = cp.Parameter((rows, cols), name="H"), cp.Parameter(nonneg=True, name="rho")
        x, s = cp.Parameter(rows, name="x"), cp.Variable(cols)
        objective = 0.5 * cp.sum_squares(x - H @ s) + rho * cp.norm1(s)
        return Declared(cp.Problem(cp.Minimize(objective)), [H, rho, x], [s])

    def values(batch: int) -> list[Tensor]:
        rng = np.random.default_rng(1)
        H = rng.standard_normal((rows, cols)) / np.sqrt(rows)
        s = rng.standard_normal((batch, cols)) * (rng.random((batch, cols)) < 0.1)
        x = s @ H.T + 0.05 * rng.standard_normal((batch, rows))
        return [_leaf(v) for v in (H, np.array(0.1), x)]

    return Workload(name, f"lasso {rows}x{cols}", declare, values, batches, one_call)


def closed_loop(name: str, n: int, steps: int) -> Workload:
    """ADP policy min u'Ru + |S(Ax + Bu)|^2, |u| <= 0.1 rolled out on a noisy plant; gradients to S and x0."""
    rng = np.random.default_rng(2)
    A, B = _stable(rng, n), rng.standard_normal((n, n)) / np.sqrt(n)
    noise = 0.1 * rng.standard_normal((steps, n))
    plant = tuple(torch.tensor(m) for m in (A, B, noise))

    def declare() -> Declared:
        x, S = cp.Parameter(n, name="x"), cp.Parameter((n, n), name="S")
        u, y = cp.Variable(n), cp.Variable(n)
        cost = cp.quad_form(u, np.diag(np.linspace(0.1, 0.3, n))) + cp.sum_squares(S @ y)
        return Declared(cp.Problem(cp.Minimize(cost), [y == A @ x + B @ u, cp.abs(u) <= 0.1]), [S, x], [u])

    def values(batch: int) -> list[Tensor]:
        draw = np.random.default_rng(3)
        S = np.eye(n) + 0.1 * draw.standard_normal((n, n))
        return [_leaf(S), _leaf(draw.standard_normal(n) if batch == 1 else draw.standard_normal((batch, n)))]

    def run(layer: Layer, values: list[Tensor]) -> Tensor:
        A, B, noise = plant
        S, x = values
        decisions = []
        for w in noise:
            (u,) = layer(S, x)
            decisions.append(u)
            x = x @ A.T + u @ B.T + w
        return torch.stack(decisions, -2)

    return Workload(name, f"closed loop {steps} steps n=m={n}", declare, values, (1,), run)


def dense_qp(name: str, n: int, batches: tuple[int, ...]) -> Workload:
    """min 1/2 |Lx|^2 + q'x, Ax = b, Gx <= h with all data batched; n/5 equalities, n/2 inequalities."""
    p, m = n // 5, n // 2

    def declare() -> Declared:
        x, L, q = cp.Variable(n), cp.Parameter((n, n), name="L"), cp.Parameter(n, name="q")
        A, b = cp.Parameter((p, n), name="A"), cp.Parameter(p, name="b")
        G, h = cp.Parameter((m, n), name="G"), cp.Parameter(m, name="h")
        objective = 0.5 * cp.sum_squares(L @ x) + q @ x
        problem = cp.Problem(cp.Minimize(objective), [A @ x == b, G @ x <= h])
        return Declared(problem, [L, q, A, b, G, h], [x])

    def values(batch: int) -> list[Tensor]:
        rng = np.random.default_rng(4)
        L = np.eye(n) + 0.3 * rng.standard_normal((batch, n, n)) / np.sqrt(n)
        A, G = (rng.standard_normal((batch, k, n)) / np.sqrt(n) for k in (p, m))
        x = rng.standard_normal((batch, n))
        b = np.einsum("bij,bj->bi", A, x)
        h = np.einsum("bij,bj->bi", G, x) + rng.random((batch, m))
        return [_leaf(v) for v in (L, 3 * rng.standard_normal((batch, n)), A, b, G, h)]

    def standard(values: list[Tensor]) -> tuple[Tensor, ...]:
        L, q, A, b, G, h = values
        return L.mT @ L, q, G, h, A, b

    return Workload(name, f"dense QP n={n}", declare, values, batches, one_call, standard)


def markowitz(name: str, n: int, batches: tuple[int, ...], leverage: float = 1.6) -> Workload:
    """max mu'w, |F w|_2 <= sigma, 1'w = 1, |w|_1 <= 1.6 with batched mu; a second-order cone."""

    def declare() -> Declared:
        mu, F, w = cp.Parameter(n, name="mu"), cp.Parameter((n, n), name="F"), cp.Variable(n)
        sigma = cp.Parameter(nonneg=True, name="sigma")
        constraints = [cp.norm2(F @ w) <= sigma, cp.sum(w) == 1, cp.norm1(w) <= leverage]
        return Declared(cp.Problem(cp.Maximize(mu @ w), constraints), [mu, F, sigma], [w])

    def values(batch: int) -> list[Tensor]:
        rng = np.random.default_rng(5)
        F = np.diag(rng.uniform(0.5, 1.5, n)) + 0.1 * rng.standard_normal((n, n))
        return [_leaf(v) for v in (rng.standard_normal((batch, n)), F, np.array(0.4))]

    def exact(mu: Tensor, F: Tensor, sigma: Tensor) -> Tensor:
        return conic_reference.markowitz(mu, F, sigma, leverage)

    return Workload(name, f"Markowitz cone n={n}", declare, values, batches, one_call, exact=exact)


def entropy(name: str, n: int, m: int, batches: tuple[int, ...]) -> Workload:
    """min c'x + sum x log x, Ax = b with A shared, c and b batched; exponential cones."""

    def declare() -> Declared:
        x, c = cp.Variable(n), cp.Parameter(n, name="c")
        A, b = cp.Parameter((m, n), name="A"), cp.Parameter(m, name="b")
        return Declared(cp.Problem(cp.Minimize(c @ x - cp.sum(cp.entr(x))), [A @ x == b]), [c, A, b], [x])

    def values(batch: int) -> list[Tensor]:
        rng = np.random.default_rng(6)
        A, x = rng.standard_normal((m, n)) / np.sqrt(n), rng.random((batch, n))
        return [_leaf(v) for v in (rng.standard_normal((batch, n)), A, x @ A.T)]

    title = f"maximum entropy n={n} m={m}"
    return Workload(name, title, declare, values, batches, one_call, exact=conic_reference.maximum_entropy)


def correlation(name: str, order: int, batches: tuple[int, ...]) -> Workload:
    """min 1/2 |X - C|^2, X PSD with unit diagonal, C batched."""

    def declare() -> Declared:
        X, C = cp.Variable((order, order), symmetric=True), cp.Parameter((order, order), name="C")
        constraints = [X >> 0, cp.diag(X) == 1]
        return Declared(cp.Problem(cp.Minimize(0.5 * cp.sum_squares(X - C)), constraints), [C], [X])

    def values(batch: int) -> list[Tensor]:
        G = np.random.default_rng(7).standard_normal((batch, order, order))
        return [_leaf(0.5 * (G + G.transpose(0, 2, 1)))]

    title = f"nearest correlation of order {order}"
    return Workload(name, title, declare, values, batches, one_call, exact=conic_reference.nearest_correlation)


def dispatch(name: str, batches: tuple[int, ...], *, angles: bool) -> Workload:
    """Nearest feasible dispatch to a wished one, loads and wishes batched; by angles or by distribution factors."""
    grid = ieee30()

    def declare() -> Declared:
        p, wish = cp.Variable(len(grid.largest)), cp.Parameter(len(grid.largest), name="wish")
        load = cp.Parameter(len(grid.demand), name="load")
        if angles:
            constraints = grid.constraints(p, cp.Variable(grid.buses), load)
        else:
            flow = grid.distribution @ (grid.placed(grid.generator_bus) @ p - grid.placed(grid.load_bus) @ load)
            constraints = [cp.sum(p) == cp.sum(load), cp.abs(flow) <= grid.limit, p >= 0, p <= grid.largest]
        return Declared(cp.Problem(cp.Minimize(0.5 * cp.sum_squares(p - wish)), constraints), [wish, load], [p])

    def values(batch: int) -> list[Tensor]:
        served, *_ = feasible_dispatch.draw(0, feasible_dispatch.Setting(train=batch, test=1))
        noise = 10 * np.random.default_rng(8).standard_normal(served.s.shape)
        return [_leaf(v) for v in (served.s.numpy() + noise, served.x.numpy())]

    title = f"feasible dispatch, 30 buses, {'angles' if angles else 'distribution factors'}"
    return Workload(name, title, declare, values, batches, one_call)


WORKLOADS = {
    w.name: w
    for w in (
        box_mpc("W1", 4, 2, 10, (1, 128, 1024)),
        lasso("W3", 50, 100, (64,)),
        closed_loop("W5", 8, 100),
        markowitz("W6", 20, (64,)),
        entropy("entropy", 50, 10, (64,)),
        correlation("correlation", 8, (64,)),
        box_mpc("large-mpc", 12, 4, 30, (32,)),
        dense_qp("dense", 100, (8, 128)),
        dispatch("dispatch", (128,), angles=True),
        dispatch("dispatch-factors", (128,), angles=False),
    )
}
