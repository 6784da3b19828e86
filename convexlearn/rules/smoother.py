"""Kalman smoother: the most likely states given all observations, missing ones included, fitted to data."""

from typing import Any

import torch
from torch import Tensor

from convexlearn.block_tridiagonal import solve
from convexlearn.checks import checked, word
from convexlearn.domains import Domain
from convexlearn.errors import DomainError, OptionError, ShapeError
from convexlearn.inputs import as_contexts
from convexlearn.rules.base import DecisionRule
from convexlearn.rules.kalman import declare_model

DECISIONS = ("state", "observation")


class KalmanSmoother(DecisionRule):
    """Smoothed states of z+ = A z + v, x = C z + w with v ~ N(0, V), w ~ N(0, W), from all observations.

    z minimizes sum_t |V^-1/2 (z_{t+1} - A z_t)|^2 + sum_t |W^-1/2 (x_t - C z_t)|^2, entries of x that are NaN
    being variables too, which weighs the known ones alone by the inverse of their covariance. A `(n, n)`,
    C `(p, n)`; V `(n, n)` and W `(p, p)` positive definite. All four are objective parameters and learned
    until `freeze`; the solution depends on the ratio of V and W only. x `(B, T, p)` -> z `(B, T, n)`, or with
    `decision="observation"` C z `(B, T, p)`, which fills the gaps of x.

    state `(n,)`, covariance `(n, n)`: mean and covariance of z_0 before the first observation; covariance None
    is no knowledge, so that the observations must determine the states. A step without observations passes on
    what its neighbours say.

    The optimality conditions are block tridiagonal; one factorization gives the states and their gradient,
    and serves the whole batch where the same entries are missing. Fit it with `tune` and `ProximalGradient`,
    as Barratt and Boyd do (Fitting a Kalman smoother to data, 2020; there V and W are called W and V).

    >>> one = torch.ones(1, 1)
    >>> KalmanSmoother(one, one, one, one)(torch.tensor([[[0.0], [torch.nan], [3.0]]])).flatten().detach()
    tensor([0.7500, 1.5000, 2.2500])
    """

    A: Tensor
    C: Tensor
    V: Tensor
    W: Tensor

    @checked(decision=word(DECISIONS))
    def __init__(
        self,
        A: Any,
        C: Any,
        V: Any,
        W: Any,
        *,
        state: Any = None,
        covariance: Any = None,
        decision: str = "state",
    ) -> None:
        super().__init__()
        self.output = decision
        declare_model(self, {"A": A, "C": C})
        self.learn("A", "C")
        n, p = self.C.shape[1], self.C.shape[0]
        for name, value, size in (("V", V, n), ("W", W, p)):
            self.declare_psd(name, value, size)
        if covariance is not None:
            self.declare_psd("covariance", covariance, n, learned=False)
            self.declare("state", torch.zeros(n).double() if state is None else state, Domain((n,)), learned=False)
            self.check_dimensions("state", 1)
        elif state is not None:
            raise OptionError("KalmanSmoother: state is a mean; give its covariance too")

    def forward(self, *x: Tensor) -> Tensor:
        """z `(B, T, n)`, or C z, for x `(B, T, p)` with NaN where an entry is missing: one decision for all times."""
        (sequence,) = as_contexts(type(self).__name__, x, most=1)
        observed, y = self._observations(sequence)
        diagonal, below, right = self._conditions(observed, y)
        z = solve(diagonal, below, right).to(sequence.dtype)
        return z if self.output == "state" else z @ self.C.to(z.dtype).mT

    def _conditions(self, observed: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Blocks of H and the right side of H z = r; the batch of H is that of `observed`, or 1 if all are alike."""
        A, C, V, W = (M.double() for M in (self.A, self.C, self.V, self.W))
        steps = y.shape[1]
        inverse_v = torch.cholesky_inverse(_definite("V", V))
        patterns = observed[:1] if len(observed) and bool((observed == observed[:1]).all()) else observed
        weights = _masked_inverse(W, patterns)  # (B or 1, T, p, p)
        gathered = C.mT @ weights
        diagonal = gathered @ C
        right = (gathered @ y[..., None])[..., 0]
        forward, backward = diagonal.new_ones(steps), diagonal.new_ones(steps)
        forward[-1] = backward[0] = 0
        diagonal = diagonal + forward[:, None, None] * (A.mT @ inverse_v @ A) + backward[:, None, None] * inverse_v
        below = (-inverse_v @ A).expand(len(diagonal), steps - 1, *A.shape)
        if "covariance" in self._declared:
            factor = _definite("covariance", self.value("covariance").double())
            prior = torch.cholesky_inverse(factor)
            first = torch.zeros(steps, dtype=y.dtype, device=y.device)
            first[0] = 1
            diagonal = diagonal + first[:, None, None] * prior
            right = right + first[:, None] * (prior @ self.value("state").double())
        return diagonal, below, right

    def _observations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, T, p)` True where an entry is known, and the entries with zeros elsewhere."""
        p = len(self.C)
        if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] != p:
            raise ShapeError(f"KalmanSmoother: x must have shape (B, T, {p}) with T > 0, got {tuple(x.shape)}")
        if bool(torch.isinf(x).any()):
            i, t, _ = torch.nonzero(torch.isinf(x))[0].tolist()
            raise DomainError(f"x is infinite in batch element {i} at time {t}; mark missing observations by NaN")
        missing = torch.isnan(x)
        return ~missing, torch.where(missing, 0.0, x).double()


def _masked_inverse(W: Tensor, observed: Tensor) -> Tensor:
    """`(B, T, p, p)`: inverse of W's rows and columns that are observed, zero elsewhere; once per distinct mask."""
    _definite("W", W)
    masks, which = torch.unique(observed.flatten(0, 1), dim=0, return_inverse=True)
    seen = masks.to(W)
    filled = seen[:, :, None] * W * seen[:, None, :] + torch.diag_embed(1 - seen)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(filled))
    return (inverse - torch.diag_embed(1 - seen))[which].unflatten(0, observed.shape[:2])


def _definite(name: str, M: Tensor) -> Tensor:
    """The Cholesky factor of M."""
    factor, info = torch.linalg.cholesky_ex(M)
    if bool(info > 0):
        lowest = float(torch.linalg.eigvalsh(M.detach())[0])
        raise DomainError(
            f"KalmanSmoother: {name} must be positive definite, but it has the eigenvalue {lowest:.6g}; "
            "add a small multiple of the identity"
        )
    return factor
