"""Riccati and Lyapunov equations in discrete time: stationary, finite-horizon, batched, differentiable.

The plant is z+ = A z + B s + v, x = C z + w with v ~ N(0, V), w ~ N(0, W), and the stage cost
z'Qz + s'Rs (Eqs. 7 and 8 of the paper). All functions take leading batch dimensions, compute in
float64 and return the dtype of their arguments.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from convexlearn.errors import DomainError
from convexlearn.riccati_arguments import (
    as_mask,
    broadcast,
    check_definite,
    check_horizon,
    check_psd,
    common,
    control_model,
    element,
    filter_model,
    first,
    masks_of,
    number_text,
)

DOUBLINGS = 45
"""Spectral radii up to 1 - 1e-12 or so count as strictly stable: 2^45 steps bring A^k to rounding."""


class FilterGains(NamedTuple):
    """Kalman gains `(*batch, T, n, p)`, covariances `(*batch, T, n, n)` before and after each observation."""

    gain: Tensor
    prior: Tensor
    posterior: Tensor


def dlyap(A: Tensor, Q: Tensor) -> Tensor:
    """X `(*batch, n, n)` with X = A X A' + Q, by doubling; A must be strictly stable.

    Differentiable as often as wanted. Same convention as `scipy.linalg.solve_discrete_lyapunov`.

    >>> dlyap(torch.tensor([[0.5]]), torch.tensor([[3.0]]))
    tensor([[4.]])
    """
    dtype, (A, Q) = common("dlyap", {"A": (A, "nn"), "Q": (Q, "nn")})
    return _Lyapunov.apply(A, Q).to(dtype)  # pyright: ignore[reportOptionalMemberAccess]


def dare(A: Tensor, B: Tensor, Q: Tensor, R: Tensor) -> Tensor:
    """The stabilizing P `(*batch, n, n)` of P = Q + A'PA - A'PB (R + B'PB)^-1 B'PA.

    A `(*batch, n, n)`, B `(*batch, n, m)`, Q `(*batch, n, n)` PSD, R `(*batch, m, m)` positive definite.
    Forward: structure-preserving doubling (Chu, Fan, Lin, Wang 2004) and a Newton step; backward: one
    Lyapunov equation of the closed loop, differentiable again. z'Pz is the optimal cost from state z
    (Example 6 of the paper).

    >>> dare(*(torch.tensor([[value]]) for value in (1.0, 1.0, 1.0, 2.0)))
    tensor([[2.]])
    """
    return _dare((A, B, Q, R), ("A", "B", "Q", "R"))


def lqr_gain(A: Tensor, B: Tensor, Q: Tensor, R: Tensor) -> Tensor:
    """K `(*batch, m, n)` of the optimal control s = -K z (Eq. 12 of the paper); arguments as in `dare`.

    >>> lqr_gain(*(torch.tensor([[value]]) for value in (1.0, 1.0, 1.0, 2.0)))
    tensor([[0.5000]])
    """
    dtype, (A, B, Q, R) = common("lqr_gain", control_model(A, B, Q, R))
    return _gain(A, B, _symmetric(R), dare(A, B, Q, R)).to(dtype)


def filter_covariance(A: Tensor, C: Tensor, V: Tensor, W: Tensor) -> Tensor:
    """Stationary covariance `(*batch, n, n)` of the state given the observations before it."""
    dtype, (A, C, V, W) = common("filter_covariance", filter_model(A, C, V, W))
    return _dare((A.mT, C.mT, V, W), ("A", "C", "V", "W")).to(dtype)


def filter_gain(A: Tensor, C: Tensor, V: Tensor, W: Tensor) -> Tensor:
    """L `(*batch, n, p)` of the stationary Kalman filter: mean = prior + L (x - C prior), Eq. 11 of the paper.

    V `(*batch, n, n)` is the covariance of the process noise, W `(*batch, p, p)` that of the observation
    noise; L depends on their ratio only.

    >>> filter_gain(*(torch.tensor([[value]]) for value in (1.0, 1.0, 1.0, 2.0)))
    tensor([[0.5000]])
    """
    dtype, (A, C, V, W) = common("filter_gain", filter_model(A, C, V, W))
    return _update(filter_covariance(A, C, V, W), C, _symmetric(W))[0].to(dtype)


def lqr_recursion(
    A: Tensor, B: Tensor, Q: Tensor, R: Tensor, horizon: int, *, terminal: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gains K `(*batch, T, m, n)` and costs-to-go P `(*batch, T + 1, n, n)` of the finite horizon T.

    s_t = -K_t z_t minimizes the sum of z'Qz + s'Rs over t < T plus z_T' terminal z_T (default Q).

    >>> one = torch.ones(1, 1)
    >>> lqr_recursion(one, one, one, one, 2)[0].flatten()
    tensor([0.6000, 0.5000])
    """
    check_horizon(horizon)
    terminal = Q if terminal is None else terminal
    named = control_model(A, B, Q, R) | {"terminal": (terminal, "nn")}
    dtype, (A, B, Q, R, P) = common("lqr_recursion", named)
    Q, R, P = _symmetric(Q), _symmetric(R), _symmetric(P)
    check_psd("Q", Q)
    check_definite("R", R)
    check_psd("terminal", P)
    gains, costs = [], [P]
    for _ in range(horizon):
        K = _gain(A, B, R, P)
        F = A - B @ K
        P = _symmetric(Q + K.mT @ R @ K + F.mT @ P @ F)
        gains.append(K)
        costs.append(P)
    return torch.stack(gains[::-1], -3).to(dtype), torch.stack(costs[::-1], -3).to(dtype)


def kalman_recursion(
    A: Tensor,
    C: Tensor,
    V: Tensor,
    W: Tensor,
    covariance: Tensor,
    *,
    horizon: int,
    observed: Tensor | None = None,
) -> FilterGains:
    """Kalman gains and covariances of T steps from the covariance `(*batch, n, n)` before the first observation.

    observed: `(*batch, T, p)` False where an observation is missing. Joseph form, so that covariances stay
    positive definite. When nothing more is missing and the past is forgotten to rounding, and with it its
    gradient, the last gain is repeated.

    >>> one = torch.ones(1, 1)
    >>> kalman_recursion(one, one, one, one, one, horizon=2).gain.flatten()
    tensor([0.5000, 0.6000])
    """
    check_horizon(horizon)
    named = filter_model(A, C, V, W) | {"covariance": (covariance, "nn")}
    dtype, (A, C, V, W, P) = common("kalman_recursion", named)
    V, W, P = _symmetric(V), _symmetric(W), _symmetric(P)
    for name, matrix in (("V", V), ("W", W), ("covariance", P)):
        check_psd(name, matrix)
    complete, masks = masks_of(observed, horizon, W.shape[-1])
    if observed is not None:
        P = P.expand(*broadcast("kalman_recursion", P.shape[:-2], observed.shape[:-2]), *P.shape[-2:])
    memory = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    gains, priors, posteriors = [], [], []
    for t in range(horizon):
        L, posterior = _update(P, C, W, masks[t])
        gains.append(L)
        priors.append(P)
        posteriors.append(posterior)
        P = _symmetric(A @ posterior @ A.mT + V)
        if t >= complete:
            with torch.no_grad():
                memory = A @ (memory - L @ (C @ memory))
            if bool((memory.abs() < 1e-9).all()):
                break
    repeat = horizon - len(gains)
    stacked = (torch.stack(m + m[-1:] * repeat, -3).to(dtype) for m in (gains, priors, posteriors))
    return FilterGains(*stacked)


def kalman_update(P: Tensor, C: Tensor, W: Tensor, observed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gain L `(*batch, n, p)` and covariance after an observation, in Joseph form, from covariance P before it.

    observed: `(*batch, p)` False where the observation is missing; its column of L is zero.
    """
    if _fit(P, C, W, observed):
        return _update(P, C, W, observed)
    dtype, (P, C, W) = common("kalman_update", {"P": (P, "nn"), "C": (C, "pn"), "W": (W, "pp")})
    if observed is not None:
        observed = as_mask("kalman_update", observed, W.shape[-1])
        broadcast("kalman_update", P.shape[:-2], observed.shape[:-1])
    L, posterior = _update(P, C, W, observed)
    return L.to(dtype), posterior.to(dtype)


def _fit(P: Any, C: Any, W: Any, observed: Any) -> bool:
    """True for float64 matrices of one batch that fit, as filters have them at every step; what is not gets a look."""
    if not all(isinstance(M, Tensor) and M.dtype is torch.float64 and M.ndim >= 2 for M in (P, C, W)):
        return False
    batch, n, p = P.shape[:-2], P.shape[-1], W.shape[-1]
    there = observed is None or (isinstance(observed, Tensor) and observed.dtype is torch.bool)
    there = there and (observed is None or observed.shape == (*batch, p))
    return (
        there
        and n * p > 0
        and P.shape == (*batch, n, n)
        and all(M.shape in (shape, (*batch, *shape)) for M, shape in ((C, (p, n)), (W, (p, p))))
    )


def _update(P: Tensor, C: Tensor, W: Tensor, observed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`kalman_update` of matrices in float64 that fit each other."""
    if observed is not None:
        mask = observed.to(P.dtype)
        C = mask[..., None] * C
        W = mask[..., None] * W * mask[..., None, :] + torch.diag_embed(1 - mask)
    S = _symmetric(C @ P @ C.mT + W)
    L = torch.cholesky_solve(C @ P, check_definite("C P C' + W (innovation covariance)", S)).mT
    if observed is not None:
        L = L * observed[..., None, :].to(P.dtype)
    kept = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device) - L @ C
    return L, _symmetric(kept @ P @ kept.mT + L @ W @ L.mT)


def _dare(matrices: tuple[Tensor, Tensor, Tensor, Tensor], names: tuple[str, str, str, str]) -> Tensor:
    """`dare`, whose messages call the four matrices by `names`."""
    dtype, (A, B, Q, R) = common("the Riccati equation", dict(zip(names, zip(matrices, ("nn", "nm", "nn", "mm")))))
    P = _Riccati.apply(A, B, _symmetric(Q), _symmetric(R), names)
    return P.to(dtype)  # pyright: ignore[reportOptionalMemberAccess]


class _Riccati(torch.autograd.Function):
    """The stabilizing solution; K is optimal, so that its own change does not contribute to the gradient."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, Q: Tensor, R: Tensor, names: tuple[str, ...]) -> Tensor:
        P = _solve_riccati(A, B, Q, R, names)
        ctx.save_for_backward(A, B, R, P)
        return P

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        A, B, R, P = ctx.saved_tensors
        K = _gain(A, B, R, P)
        F = A - B @ K
        M = dlyap(F, _symmetric(gradients[0]))
        slope = 2 * P @ F @ M
        return slope, -slope @ K.mT, M, K @ M @ K.mT, None


class _Lyapunov(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, Q: Tensor) -> Tensor:
        X, ok = _double(A, Q)
        if not bool(ok.all()):
            i = first(~ok)
            raise DomainError(
                f"dlyap: A{element(ok, i)} has spectral radius {_radius(A[i]):.6g}, it must be less than 1 for "
                "the sum of A^k Q A'^k to converge; stabilize the system first, as with lqr_gain"
            )
        ctx.save_for_backward(A, X)
        return X

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        A, X = ctx.saved_tensors
        M = dlyap(A.mT, gradients[0])
        return M @ A @ X.mT + M.mT @ A @ X, M


def _double(A: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of A^k Q A'^k by doubling, and `(*batch,)` True where it converged."""
    X, n = Q, A.shape[-1]
    done = bad = torch.zeros(A.shape[:-2], dtype=torch.bool, device=A.device)
    for _ in range(DOUBLINGS):
        X = X + A @ X @ A.mT
        A = A @ A
        size = n * A.abs().amax((-2, -1))
        done, bad = size < 1e-10, ~(size < 1e100)
        if bool((done | bad).all()):
            break
    return X, done & torch.isfinite(X).all(-1).all(-1)


def _solve_riccati(A: Tensor, B: Tensor, Q: Tensor, R: Tensor, names: tuple[str, ...]) -> Tensor:
    check_psd(names[2], Q)
    factor = check_definite(names[3], R)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    Ak, G, H = A, B @ torch.cholesky_solve(B.mT, factor), Q
    for _ in range(DOUBLINGS):
        solved = torch.linalg.solve_ex(eye + G @ H, torch.cat([Ak, G], -1)).result
        step, spread = solved.split(A.shape[-1], -1)
        growth = _symmetric(Ak.mT @ H @ step)
        Ak, G, H = Ak @ step, _symmetric(G + Ak @ spread @ Ak.mT), H + growth
        small = growth.abs().amax((-2, -1)) <= 1e-15 * H.abs().amax((-2, -1))
        if bool((small | ~torch.isfinite(H).all(-1).all(-1)).all()):
            break
    finite = torch.isfinite(H).all(-1).all(-1)
    H = torch.where(finite[..., None, None], H, eye)
    P, ok = H, finite
    for _ in range(2):  # Newton, against the rounding of the doubling
        K = _gain(A, B, R, P)
        P, stable = _double((A - B @ K).mT, Q + K.mT @ R @ K)
        ok = ok & stable
        if not bool(ok.all()):
            _refuse_unstable(A, B, Q, ok, names)
        P = _symmetric(P)
    return P


def _refuse_unstable(A: Tensor, B: Tensor, Q: Tensor, ok: Tensor, names: tuple[str, ...]) -> None:
    """Say which eigenvalue of A cannot be stabilized, or does not show in the cost (Popov, Belevitch, Hautus)."""
    i = first(~ok)
    where = element(ok, i)
    a, b, q, dual = A[i], B[i], Q[i], names[1] == "C"
    for value in torch.linalg.eigvals(a):
        if value.abs() < 1 - 1e-9:
            continue
        shifted = a - value * torch.eye(len(a), dtype=value.dtype, device=a.device)
        scale = 1e-9 * max(1.0, float(a.abs().max()))
        if float(torch.linalg.svdvals(torch.cat([shifted, b.to(value.dtype)], 1)).min()) < scale:
            word, remedy = ("detectable", "observe") if dual else ("stabilizable", "actuate")
            raise DomainError(
                f"({names[0]}, {names[1]}) is not {word}{where}: {names[1]} does not reach the mode of A with "
                f"eigenvalue {number_text(value)}; {remedy} it, or remove it from the model"
            )
        if float(torch.linalg.svdvals(torch.cat([shifted, q.to(value.dtype)], 0)).min()) < scale:
            raise DomainError(
                f"the closed loop{where} is not strictly stable: {names[2]} does not weigh the mode of A with "
                f"eigenvalue {number_text(value)}; add a small multiple of the identity to {names[2]}"
            )
    raise DomainError(
        f"the Riccati equation has no solution with a strictly stable closed loop{where} (to rounding): check that "
        f"({names[0]}, {names[1]}) can be stabilized, and the scales of {names[2]} and {names[3]}"
    )


def _gain(A: Tensor, B: Tensor, R: Tensor, P: Tensor) -> Tensor:
    PB = P @ B
    return torch.cholesky_solve(PB.mT @ A, check_definite("R + B'PB", _symmetric(R + B.mT @ PB)))


def _symmetric(M: Tensor) -> Tensor:
    return (M + M.mT) / 2


def _radius(A: Tensor) -> float:
    return float(torch.linalg.eigvals(A.detach()).abs().max())
