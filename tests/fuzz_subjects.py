"""Public rules, layers and functions with sound inputs, for the tests that give them unsound ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import torch
from torch import Tensor, nn

import convexlearn as cl
from convexlearn import networks
from convexlearn.chain import best_path, log_marginals


@dataclass(frozen=True, eq=False)
class Subject:
    """A callable and sound inputs, float64 and batch first, three samples.

    gaps: NaN is a missing observation. leading: any number of leading dimensions is a batch. lengths: sizes other
    than the batch are free, too. plain: a torch network, whose errors are torch's.
    diverges: large inputs overflow. optional: all inputs but the first may be left out. tolerance: between two solves.
    """

    call: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    gaps: bool = False
    leading: bool = False
    lengths: bool = False
    plain: bool = False
    diverges: bool = False
    optional: bool = False
    tolerance: float = 1e-9


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal entries that `seed` determines."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


H = normal(4, 6, seed=1) / 2
A, B, C = torch.tensor([[1.0, 0.3], [0.0, 0.9]]).double(), torch.tensor([[0.0], [1.0]]).double(), torch.eye(2).double()
I = torch.eye(2, dtype=torch.float64)


def lasso() -> cl.ConvexRule:
    """A sparse recovery rule with a learned weight."""
    s, x = cp.Variable(6), cp.Parameter(4, name="x")
    rho = cp.Parameter(nonneg=True, name="rho", value=0.2)
    cost = 0.5 * cp.sum_squares(x - H.numpy() @ s) + rho * cp.norm1(s)
    return cl.ConvexRule(cp.Problem(cp.Minimize(cost)), [x], s)


def box() -> cl.ConvexLayer:
    """Projection on a box, with the bound and the centre as parameters."""
    y, t, u = cp.Variable(4), cp.Parameter(4, name="t"), cp.Parameter(4, name="u", nonneg=True)
    return cl.ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(y - t)), [cp.abs(y) <= u]), [t, u], [y])


def cone() -> cl.ConvexLayer:
    """Projection on a second-order cone program."""
    y, t = cp.Variable(4), cp.Parameter(4, name="t")
    return cl.ConvexLayer(cp.Problem(cp.Minimize(cp.sum_squares(y - t)), [cp.norm(y) <= 1]), [t], [y])


def entropy() -> cl.ConvexLayer:
    """Maximum entropy beside a linear cost."""
    y, t = cp.Variable(4), cp.Parameter(4, name="t")
    cost = t @ y - cp.sum(cp.entr(y))
    return cl.ConvexLayer(cp.Problem(cp.Minimize(cost), [cp.sum(y) == 1]), [t], [y])


def feasible() -> cl.FeasibleRule:
    """A network projected on a box, whose size is the context, within a halfspace."""
    s, size = cp.Variable(4, name="s"), cp.Parameter(4, name="size")
    return cl.FeasibleRule(networks.mlp(4, 4).double(), [cp.abs(s) <= size, cp.sum(s) >= 0], s, [size])


def deep_prior() -> cl.DeepPrior:
    """The latent of a small decoder, from two starts."""
    decoder = networks.mlp(2, 6, hidden=(5,), activation=nn.SiLU).double()
    return cl.DeepPrior(decoder, H, 2, restarts=2)


def controller() -> cl.ConvexRule:
    """Model predictive control of a double integrator with a limit."""
    return cl.mpc(A, B, I, I[:1, :1], 4, input_limit=0.5)


def images(seed: int = 2) -> Tensor:
    """Pictures `(3, 8, 8)`."""
    return normal(3, 8, 8, seed=seed)


def network(build: Callable[[], nn.Module]) -> nn.Module:
    """A network in float64."""
    return build().double()


def subjects() -> dict[str, Callable[[], Subject]]:
    """Makers of subjects by name."""
    states, measured = normal(3, 2, seed=3), normal(3, 5, 2, seed=4)
    x = normal(3, 4, seed=5)
    stable = 0.5 * normal(3, 2, 2, seed=6).tanh()
    definite = normal(3, 2, 2, seed=7)
    definite = definite @ definite.mT + torch.eye(2, dtype=torch.float64)
    potentials = normal(3, 7, 2, 2, seed=8)
    trellis = cl.Trellis(2, 2)

    def rule(build: Callable[[], Any], *inputs: Tensor, **flags: Any) -> Callable[[], Subject]:
        return lambda: Subject(build(), inputs, **flags)

    return {
        "ConvexLayer": rule(box, x, x.abs() + 0.1, leading=True),
        "ConvexLayer socp": rule(cone, x, leading=True),
        "ConvexLayer conic": rule(entropy, x, leading=True),
        "ConvexRule": rule(lasso, x, leading=True),
        "FeasibleRule": rule(feasible, x.abs() + 0.1, plain=True),
        "mpc": rule(controller, states, leading=True),
        "adp": rule(lambda: cl.adp(A, B, I[:1, :1], I, limit=0.5), states, leading=True),
        "AffineRule": rule(lambda: cl.AffineRule(H.mT, torch.zeros(6).double()), x),
        "TreeRule": rule(lambda: cl.TreeRule(normal(4, 6), 4, depth=2), x),
        "NeuralRule": rule(lambda: network(lambda: cl.NeuralRule(networks.mlp(4, 6))), x, plain=True, leading=True),
        "ISTA": rule(lambda: cl.Unfolded(cl.ISTA(cl.split(lasso())), 5), x),
        "FISTA": rule(lambda: cl.Unfolded(cl.FISTA(cl.split(lasso())), 5), x),
        "ADMM": rule(lambda: cl.Unfolded(cl.ADMM(cl.split(lasso())), 5), x),
        "PrimalDual": rule(lambda: cl.Unfolded(cl.PrimalDual(cl.split(lasso())), 5), x),
        "AMP": rule(lambda: cl.Unfolded(cl.AMP(cl.split(lasso())), 3), x),
        "Converged": rule(
            lambda: cl.Converged(cl.FISTA(cl.split(lasso())), tol=1e-8, max_iterations=3000), x, tolerance=1e-6
        ),
        "RobustPCA": rule(lambda: cl.Unfolded(cl.RobustPCA(cl.robust_pca((8, 8), 0.5, 0.1)), 3), images()),
        "DeepPrior": rule(deep_prior, x),
        "LQR": rule(lambda: cl.LQR(A, B, I, I[:1, :1]), states),
        "LQG": rule(lambda: cl.LQG(A, B, C, I, I[:1, :1], I, I), measured, gaps=True),
        "KalmanFilter": rule(lambda: cl.KalmanFilter(A, B, C, I, I), measured, gaps=True),
        "ExtendedKalmanFilter": rule(
            lambda: cl.ExtendedKalmanFilter(lambda z: torch.sin(z), lambda z: z, I, I), measured, gaps=True
        ),
        "KalmanSmoother": rule(lambda: cl.KalmanSmoother(A, C, I, I), measured, gaps=True),
        "OutputFeedback": rule(
            lambda: cl.OutputFeedback(cl.KalmanFilter(A, B, C, I, I), cl.LQR(A, B, I, I[:1, :1])), measured, gaps=True
        ),
        "SumProduct": rule(
            lambda: cl.SumProduct(cl.ChannelFactor([1.0, 0.5], 0.5)), normal(3, 9), leading=True, lengths=True
        ),
        "LearnedFactor": rule(
            lambda: network(lambda: cl.SumProduct(cl.LearnedFactor(networks.mlp(1, 4), trellis))),
            normal(3, 9),
            leading=True,
            lengths=True,
        ),
        "log_marginals": rule(lambda: log_marginals, potentials, leading=True),
        "best_path": rule(lambda: best_path, potentials, leading=True),
        "dare": rule(lambda: cl.dare, stable, normal(3, 2, 1), definite, definite[:, :1, :1], leading=True),
        "lqr_gain": rule(lambda: cl.lqr_gain, stable, normal(3, 2, 1), definite, definite[:, :1, :1], leading=True),
        "dlyap": rule(lambda: cl.dlyap, stable, definite, leading=True),
    }
