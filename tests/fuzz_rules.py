"""Rules, filters, plants and simulators with sound inputs, beside those of fuzz_subjects."""

import tempfile
from collections.abc import Callable
from typing import Any

import cvxpy as cp
import torch
from fuzz_subjects import A, B, C, H, I, Subject, box, controller, lasso, normal
from torch import Tensor, nn

import convexlearn as cl
from convexlearn import networks, simulate
from convexlearn.rules.iterative import iterate_loss
from convexlearn.simulate import plants

R = I[:1, :1]
TAPS = torch.tensor([1.0, 0.5]).double()


class Correction(nn.Module):
    """A correction of a filter that keeps a memory."""

    def forward(self, signals: cl.GainSignals, mean: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """A tenth of the innovation."""
        return 0.1 * (signals.observation - signals.predicted), mean


def forecasting() -> cl.ConvexRule:
    """Model predictive control with a forecast as a second context."""
    return cl.mpc(A, B, I, R, 3, input_limit=0.5, forecast=torch.ones(2, 1))


def featured() -> cl.ConvexRule:
    """A rule of two decisions whose context passes through a function, and which gives NaN where it fails."""
    s, r, x = cp.Variable(4, name="s"), cp.Variable(name="r"), cp.Parameter(4, name="x")
    problem = cp.Problem(cp.Minimize(cp.sum_squares(s - x) + r**2), [r >= cp.norm(s, 1) - 1])
    return cl.ConvexRule(problem, [x], [s, r], features=torch.tanh, on_failure="nan")


def completed() -> cl.FeasibleRule:
    """A network that gives all but one entry, the equality the last one."""
    s, total = cp.Variable(3, name="s"), cp.Parameter(name="total")
    network = networks.mlp(1, 2).double()
    wish = nn.Sequential(nn.Unflatten(0, (-1, 1)), network)
    return cl.FeasibleRule(wish, [cp.sum(s) == total, s <= 5], s, [total], free=s[:2])


def loaded() -> cl.AffineRule:
    """A rule that was saved and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        cl.save(cl.AffineRule(H.mT, torch.zeros(6).double()), f"{folder}/rule.safetensors")
        return cl.load(f"{folder}/rule.safetensors")


def moments(rule: Any) -> Callable[..., tuple[Tensor, ...]]:
    """Means, gains and covariances as one tuple."""

    def call(*inputs: Any) -> tuple[Tensor, ...]:
        found = rule.moments(*inputs)
        return found.mean, *found.gains

    return call


def gain() -> Callable[..., Tensor]:
    """A recurrent gain at the first step."""
    network = cl.RecurrentGain(2, 2).double()
    return lambda x, before, predicted, prior, *means: network(
        cl.GainSignals(x, before, predicted, prior, prior, *means), None
    )[0]


def rollout() -> Callable[[Any], tuple[Tensor, ...]]:
    """States and costs of a closed loop by first states, NaN in failed rows."""
    plant = plants.LinearGaussian(A, B, V=I)
    rule = cl.LQR(A, B, I, R)

    def call(z: Any) -> tuple[Tensor, ...]:
        batch = len(z) if isinstance(z, Tensor) and z.ndim else 3
        loop = simulate.ClosedLoop(plant, 3, initial=lambda batch, generator: z, stage_cost=plant.stage_cost)
        found = loop(rule, batch)
        lost = found.failed[:, None]
        return torch.where(lost[..., None], torch.nan, found.state), torch.where(lost, torch.nan, found.cost)

    return call


def diagnosis() -> Callable[..., tuple[Tensor, ...]]:
    """What does not depend on the direction of the differences."""
    layer = box()

    def call(*inputs: Any) -> tuple[Tensor, ...]:
        found = cl.diagnose(layer, *inputs)
        return found.status, found.gap, found.weakly_active, found.margin

    return call


def vehicle() -> Callable[..., Tensor]:
    """The vehicle with its noise, new curvature and speed included."""

    def call(z: Any, u: Any, eps: Any) -> Tensor:
        rows = eps[:, 0] if isinstance(eps, Tensor) and eps.ndim == 2 else torch.zeros(3)
        always = torch.ones_like(rows, dtype=torch.bool)
        return plants.Vehicle()(z, u, plants.VehicleNoise(eps, always, rows, always, rows))

    return call


def portfolio() -> Callable[..., tuple[Tensor, ...]]:
    """A period of a portfolio whose wealth is one."""

    def call(weights: Any, u: Any, w: Any) -> tuple[Tensor, ...]:
        wealth = weights.new_ones(len(weights)) if isinstance(weights, Tensor) and weights.ndim else torch.ones(3)
        return tuple(simulate.Portfolio(trading=0.01)(simulate.Holdings(weights, wealth), u, w))

    return call


def filter_subjects() -> dict[str, Callable[[], Subject]]:
    """Makers of subjects by name: filters, smoothers and controllers from observations."""
    measured, driven = normal(3, 5, 2, seed=4), normal(3, 5, 1, seed=5)
    state, start = normal(3, 2, seed=6), normal(3, 2, 2, seed=7)
    start = start @ start.mT + I

    def kalman(**slots: Any) -> cl.KalmanFilter:
        return cl.KalmanFilter(A, B, C, I, I, **slots)

    def extended() -> cl.ExtendedKalmanFilter:
        return cl.ExtendedKalmanFilter(torch.sin, torch.clone, I, I)

    def rule(build: Callable[[], Any], *inputs: Tensor, **flags: Any) -> Callable[[], Subject]:
        return lambda: Subject(build(), inputs, gaps=True, **flags)

    everything = measured, driven, state, start
    return {
        "KalmanFilter inputs": rule(kalman, *everything, optional=True),
        "KalmanFilter.moments": rule(lambda: moments(kalman()), *everything, optional=True),
        "KalmanFilter gain": rule(lambda: kalman(gain=0.4 * I), measured, driven, state, optional=True),
        "KalmanFilter features": rule(
            lambda: kalman(features=lambda x: x[..., :2] + x[..., 2:]), normal(3, 5, 3), plain=True
        ),
        "KalmanFilter correction": rule(lambda: kalman(correction=Correction()), *everything, optional=True),
        "KalmanNet": rule(lambda: kalman(gain=cl.RecurrentGain(2, 2).double()), *everything[:3], optional=True),
        "ExtendedKalmanFilter state": rule(
            lambda: lambda x, z=None, P=None: extended()(x, None, z, P), measured, state, start, optional=True
        ),
        "ExtendedKalmanFilter.moments": rule(lambda: moments(extended()), measured),
        "KalmanSmoother observation": rule(
            lambda: cl.KalmanSmoother(A, C, I, I, covariance=I, decision="observation"), measured
        ),
        "OutputFeedback mpc": rule(lambda: cl.OutputFeedback(kalman(), controller()), measured[:, :2]),
        "LQG horizon": rule(lambda: cl.LQG(A, B, C, I, R, I, I, horizon=5, covariance=2 * I), measured),
    }


def plant_subjects() -> dict[str, Callable[[], Subject]]:
    """Makers of subjects by name: plants, their costs and observations, and simulators."""
    z, u = normal(3, 2, seed=21), normal(3, 1, seed=22)
    gaussian = plants.LinearGaussian(A, B, V=I, C=C, W=I, Q=I, R=R, limit=1.0)
    pendulum, cart, lorenz, road = plants.Pendulum(), plants.CartPole(), plants.Lorenz(), plants.Vehicle()
    chain, four, stock = plants.SupplyChain(), normal(3, 4, seed=23), normal(3, 8, seed=24)
    three, five = normal(3, 3, seed=25), 0.1 * normal(3, 5, seed=26)

    def call(function: Callable[..., Any], *inputs: Tensor, **flags: Any) -> Callable[[], Subject]:
        return lambda: Subject(function, inputs, leading=True, **flags)

    return {
        "Pendulum": call(pendulum, z, u, normal(3, 2)),
        "Pendulum.stage_cost": call(pendulum.stage_cost, z, u),
        "Pendulum.observe": call(lambda z: pendulum.observe(z, 0, 0.0), z),
        "CartPole": call(cart, four, u, normal(3, 4)),
        "CartPole.stage_cost": call(cart.stage_cost, four, u),
        "Lorenz": call(lambda z, w: lorenz(z, None, w), three, normal(3, 3), diverges=True),
        "Lorenz taylor": call(
            lambda z, w: plants.Lorenz(method="taylor")(z, None, w), three, normal(3, 3), diverges=True
        ),
        "Lorenz.rate": call(lorenz.rate, three),
        "Vehicle": call(vehicle(), five, z, three),
        "Vehicle.predict": call(road.predict, five, z),
        "Vehicle.stage_cost": call(road.stage_cost, five, z),
        "SupplyChain": call(chain, stock, normal(3, 8), four),
        "SupplyChain.stage_cost": call(chain.stage_cost, stock, normal(3, 8)),
        "LinearGaussian": call(gaussian, z, u, normal(3, 2)),
        "LinearGaussian.stage_cost": call(gaussian.stage_cost, z, u),
        "LinearGaussian.observe": call(lambda z: gaussian.observe(z, 0, plants.Noise(z)), z),
        "Portfolio": call(portfolio(), 0.1 * z, 0.1 * normal(3, 2), 1 + normal(3, 2).abs(), diverges=True),
        "Portfolio.cost": call(simulate.Portfolio(trading=0.01, shorting=0.1).cost, z, normal(3, 2)),
        "ClosedLoop": lambda: Subject(rollout(), (z,), diverges=True),
        "Pairs": lambda: Subject(lambda x: simulate.Pairs(x)(cl.AffineRule(H.mT)).decision, (normal(3, 4),)),
    }


def subjects() -> dict[str, Callable[[], Subject]]:
    """Makers of subjects by name."""
    x, blocks = normal(3, 4, seed=5), normal(3, 9)
    trellis = cl.Trellis(2, 2)
    small = 0.2 * normal(3, 2, seed=8)

    def rule(build: Callable[[], Any], *inputs: Tensor, **flags: Any) -> Callable[[], Subject]:
        return lambda: Subject(build(), inputs, **flags)

    def unfolded() -> cl.Unfolded:
        return cl.Unfolded(cl.ISTA(cl.split(lasso())), 3, untie=["step"])

    def channel(**options: Any) -> cl.SumProduct:
        return cl.SumProduct(cl.ChannelFactor(TAPS, 0.5), labels=trellis.labels, **options)

    return {
        **filter_subjects(),
        **plant_subjects(),
        "ConvexLayer.solve": rule(lambda: lambda *v: box().solve(*v).variables, x, x.abs() + 0.1, leading=True),
        "ConvexRule features": rule(featured, x, leading=True, plain=True),
        "FeasibleRule completion": rule(completed, normal(3), plain=True, leading=True, lengths=True),
        "mpc forecast": rule(forecasting, small, 0.1 * normal(3, 3, 1), leading=True),
        "diagnose": rule(diagnosis, x, x.abs() + 0.1, leading=True, tolerance=1e-6),
        "load": rule(loaded, x),
        "TreeRule hard": rule(lambda: cl.TreeRule(normal(4, 6), 4, depth=2).eval(), x),
        "TreeRule axis": rule(lambda: cl.TreeRule(normal(4, 6), 4, depth=2, splits="axis"), x),
        "TreeRule.leaf": rule(lambda: cl.TreeRule(normal(4, 6), 4, depth=2).leaf, x),
        "NeuralRule shape": rule(
            lambda: cl.NeuralRule(networks.mlp(4, 6).double(), shape=(2, 3)), x, plain=True, leading=True
        ),
        "LQR horizon": rule(lambda: cl.LQR(A, B, I, R, horizon=5), normal(3, 5, 2)),
        "Unfolded.iterates": rule(lambda: lambda *v: unfolded().iterates(*v).transpose(0, 1), x),
        "iterate_loss": rule(lambda: lambda x, s: iterate_loss(unfolded(), x, s), x, normal(3, 6)),
        "SumProduct labels": rule(channel, blocks, leading=True, lengths=True),
        "SumProduct.path": rule(lambda: channel().path, blocks, leading=True, lengths=True),
        "SumProduct taps": rule(channel, blocks, normal(3, 2), leading=True, lengths=True, optional=True),
        "ChannelFactor": rule(
            lambda: lambda *v: cl.ChannelFactor(TAPS, 0.5)(*v).unary,
            *(blocks, normal(3, 2)),
            leading=True,
            lengths=True,
            optional=True,
        ),
        "LearnedFactor.scores": rule(
            lambda: cl.LearnedFactor(networks.mlp(1, 4).double(), trellis).scores, blocks, leading=True, lengths=True
        ),
        "RecurrentGain": rule(gain, *(normal(3, 2, seed=k) for k in range(6))),
    }
