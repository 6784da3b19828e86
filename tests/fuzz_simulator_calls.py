"""Arguments of simulators and plants, for the tests that give them unsound ones."""

from dataclasses import replace
from typing import Any

import torch
from fuzz_arguments import (
    Argument,
    Calling,
    calling,
    choice,
    count,
    fixed,
    function,
    number,
    seed,
    tensor,
    thing,
)
from fuzz_rule_calls import ROW, A, B, I, R, X, affine, normal
from torch import nn

import convexlearn as cl
from convexlearn import simulate
from convexlearn.simulate import plants


def pairs() -> simulate.Pairs:
    """Its data."""
    return simulate.Pairs(X, X[:, :2] + 1)


def loop(**changes: Any) -> simulate.ClosedLoop:
    """A linear plant."""
    given = {"initial": ROW, "stage_cost": lambda z, u: z.square().sum(-1), **changes}
    return simulate.ClosedLoop(lambda z, u, w: z @ A.mT + u @ B.mT + w, 3, **given)


def simulators() -> dict[str, Calling]:
    """Simulators, plants, and what they return."""
    prices = 1 + normal(9, 2).abs()
    scalar = torch.tensor(1.0)
    generator = Argument(torch.Generator().manual_seed(0), ("x", 3, object(), torch.ones(2)))
    taps = torch.tensor([1.0, 0.5]).double()
    plant = plants.Pendulum()
    swing = {"initial": plant.initial, "stage_cost": plant.stage_cost, "observe": plant.observe}
    pendulum = simulate.ClosedLoop(plant, 5, **swing)
    rollout = loop()(lambda z: -z[:, 1:], 3)
    found = {
        "Pairs": calling(
            simulate.Pairs,
            x=fixed(X, X[:2], scalar, word="x|contexts"),
            s=fixed(X, X[:2], scalar, optional=True, word="s|decisions"),
        ),
        "Pairs()": calling(
            pairs(), rule=function(affine(), nn.Linear), batch_size=count(2, 0, optional=True), generator=generator
        ),
        "Pairs.subset": calling(
            pairs().subset,
            indices=Argument(
                torch.tensor([0, 1]), (None, "x", 3.5, object(), torch.tensor([9]), torch.ones(2), torch.tensor([-9]))
            ),
        ),
        "Trajectory": calling(
            cl.Trajectory,
            context=fixed(X, X[:2], scalar, optional=True),
            decision=fixed(X, X[:2], scalar, word="decision|batch size"),
            state=fixed(X, X[:2], scalar, optional=True),
            target=fixed(X, X[:2], scalar, optional=True),
            cost=tensor(X, X[:2], scalar, finite=False, optional=True),
            failed=Argument(
                torch.zeros(4).bool(),
                ("x", 3, object(), torch.zeros(4), torch.zeros(3).bool(), torch.zeros(4, 2).bool()),
            ),
        ),
        "Trajectory.select": calling(
            cl.Trajectory(X, X).select,
            samples=Argument(
                torch.tensor([0, 1]), (None, "x", object(), torch.tensor([9]), torch.ones(2), torch.ones(3).bool())
            ),
        ),
        "Rollout.explain": calling(rollout.explain, labels=Argument([4, 5, 6], (3, object(), [1]), word="labels")),
        "ClosedLoop": calling(
            simulate.ClosedLoop,
            plant=function(lambda z, u, w: z),
            horizon=count(3),
            initial=Argument(ROW, (None, "x", 3, object(), {"x": 1}, [1.0], 1j * ROW)),
            noise=function(None, optional=True),
            observe=function(None, optional=True),
            stage_cost=function(lambda z, u: z.sum(-1)),
            terminal_cost=function(None, optional=True),
            bound=Argument(1e8, (None, "x", object(), -1.0, 0.0, float("nan"), True, 1j, torch.ones(2))),
        ),
        "ClosedLoop()": calling(
            loop(),
            rule=function(lambda z: -z[:, 1:], nn.Linear),
            batch_size=count(2, 0, optional=True),
            generator=generator,
        ),
        "ClosedLoop functions": calling(
            lambda **given: loop(**given)(lambda z: -z[:, 1:], 3),
            initial=Argument(
                lambda b, g: normal(b, 2),
                (
                    lambda b, g: None,
                    lambda b, g: "x",
                    lambda b, g: normal(2),
                    lambda b, g: 3.0,
                    lambda b, g: (),
                    lambda b, g: 1j * normal(b, 2),
                ),
            ),
            noise=Argument(
                lambda b, t, g: 0 * normal(b, 2), (lambda b, t, g: "x", lambda b, t, g: 3, lambda b, t, g: normal(2, 2))
            ),
            observe=Argument(
                lambda z, t, w: z, (lambda z, t, w: None, lambda z, t, w: "x", lambda z, t, w: z[0], lambda z, t, w: ())
            ),
            stage_cost=Argument(
                lambda z, u: z.sum(-1),
                (lambda z, u: None, lambda z, u: z, lambda z, u: 3.0, lambda z, u: 1j * z.sum(-1)),
            ),
            terminal_cost=Argument(lambda z: z.sum(-1), (lambda z: None, lambda z: z, lambda z: 3.0)),
        ),
        "ClosedLoop rule": calling(
            lambda rule, plant: simulate.ClosedLoop(plant, 2, initial=ROW, stage_cost=lambda z, u: z.sum(-1))(rule, 3),
            rule=Argument(
                lambda z: -z[:, 1:], (lambda z: None, lambda z: "x", lambda z: 3, lambda z: z[0], lambda z: ())
            ),
            plant=Argument(
                lambda z, u, w: z,
                (lambda z, u, w: None, lambda z, u, w: "x", lambda z, u, w: z[:, :1], lambda z, u, w: z[:1]),
            ),
        ),
        "Portfolio": calling(
            simulate.Portfolio, trading=number(0.1, least=0.0), shorting=number(0.1, least=0.0), interest=number(0.1)
        ),
        "Backtest": calling(
            simulate.Backtest,
            prices=tensor(prices, -prices, 0 * prices, prices[:1], torch.ones(9, 2).long()),
            horizon=count(3),
            stride=count(2, optional=True),
            lookback=count(1, 0),
            trading=number(0.1, least=0.0),
            shorting=number(0.1, least=0.0),
            interest=number(0.1),
            start=Argument(None, ("x", 3, object(), {"x": 1}, [["a"]], torch.ones(3), 1j * torch.ones(2))),
            stage_cost=function(lambda growth: 1 - growth),
            names=Argument(["a", "b"], (3, object(), ["a"], "x")),
        ),
        "Backtest()": calling(
            simulate.Backtest(prices, 3),
            rule=function(torch.zeros_like, nn.Linear),
            batch_size=count(1, 0, optional=True),
            generator=generator,
        ),
        "Backtest functions": calling(
            lambda **given: simulate.Backtest(prices, 3, **given)(torch.zeros_like),
            start=Argument(
                lambda rule: torch.zeros(2), (lambda rule: None, lambda rule: "x", lambda rule: torch.zeros(3))
            ),
            stage_cost=Argument(lambda g: 1 - g, (lambda g: None, lambda g: 3.0, lambda g: g[0])),
        ),
        "Channel": calling(
            simulate.Channel,
            taps=Argument(
                taps,
                (None, "x", 3, object(), 1j * taps, taps[:0], torch.tensor(1.0), torch.tensor([1, 2]), taps / 0 * 0),
            ),
            length=count(5),
            deviation=Argument(0.5, (None, "x", object(), -1.0, float("nan"), 1j, torch.ones(7))),
            noise=choice("gaussian", word="noise|deviation"),
            background=number(1.0, least=0.0),
            constellation=Argument((-1.0, 1.0), (None, "x", 3, object(), (), ("a", "b"), (float("nan"), 1.0))),
            drift=number(0.1, least=0.0),
            estimate=number(0.1, least=0.0, optional=True),
        ),
        "Channel()": calling(
            simulate.Channel(taps=taps, length=5, deviation=0.5),
            rule=function(torch.sign, nn.Linear),
            batch_size=count(2, 0, optional=True),
            generator=generator,
        ),
        "Channel.draw": calling(
            simulate.Channel(taps=taps, length=5, deviation=0.5).draw, batch=count(2, 0), generator=generator
        ),
        "decaying_taps": calling(
            simulate.decaying_taps,
            memory=count(3),
            decays=Argument([0.5], (None, "x", object(), {"x": 1}, [["a"], [1]], 1j * taps, float("nan"))),
        ),
        "random_linear": calling(plants.random_linear, seed=seed(), n=count(2), m=count(1)),
        "LinearGaussian": calling(
            plants.LinearGaussian,
            A=tensor(A, torch.ones(3, 3), word="A|B"),
            B=tensor(B, torch.ones(3, 1)),
            V=tensor(I, -I, torch.eye(3)),
            C=replace(tensor(I, torch.ones(2, 3), optional=True, word="C|W"), optional=False),
            W=tensor(I, -I, torch.eye(3), optional=True),
            start=tensor(I, -I, torch.eye(3), optional=True),
            limit=number(1.0, above=0.0, optional=True),
            Q=tensor(I, -I, torch.eye(3), optional=True),
            R=tensor(R, -R, torch.eye(3), optional=True),
        ),
        "Vehicle": calling(plants.Vehicle, step=number(0.2, above=0.0), wheelbase=number(2.8, above=0.0)),
        "SupplyChain": calling(plants.SupplyChain, moving=number(0.1), storing=number(0.1), revenue=number(1.3)),
        "Pendulum": calling(
            plants.Pendulum,
            step=number(0.05, above=0.0),
            gravity=number(10.0),
            mass=number(1.0, above=0.0),
            length=number(1.0, above=0.0),
            torque=number(2.0, above=0.0),
            speed=number(8.0, above=0.0),
        ),
        "CartPole": calling(
            plants.CartPole,
            step=number(0.02, above=0.0),
            gravity=number(9.8),
            cart=number(1.0, above=0.0),
            pole=number(0.1, above=0.0),
            half_length=number(0.5, above=0.0),
            force=number(10.0),
        ),
        "Lorenz": calling(
            plants.Lorenz,
            sigma=number(10.0),
            rho=number(28.0),
            beta=number(2.0),
            step=number(0.02, above=0.0),
            method=choice("taylor"),
            substeps=count(4),
            order=count(5),
        ),
        "linearize": calling(
            plants.linearize,
            plant=function(plant),
            z=tensor(ROW, torch.ones(2, 2), finite=False),
            u=tensor(ROW[:1], torch.ones(2, 2), finite=False),
        ),
        **{
            f"{name}.initial": calling(made.initial, batch=count(2, 0), generator=generator)
            for name, made in stochastic().items()
        },
        **{
            f"{name}.noise": calling(made.noise, batch=count(2, 0), t=Argument(0, ()), generator=generator)
            for name, made in stochastic().items()
            if hasattr(made, "noise")
        },
        "environment": calling(
            simulate.environment,
            loop=thing(pendulum, plant),
            limit=Argument(
                torch.tensor([2.0]),
                (None, "x", object(), {"x": 1}, 3.0, torch.tensor([-1.0]), (1.0, 2.0, 3.0), torch.tensor([torch.nan])),
            ),
            observation_limit=Argument(9.0, (None, "x", object(), {"x": 1}, torch.ones(7), -1.0, float("nan"))),
        ),
        "environment.step": calling(
            simulate.environment(pendulum, torch.tensor([2.0])).step,
            action=Argument([0.5], (None, "x", object(), {"x": 1}, [1.0, 2.0], [[1.0]], [float("nan")], 0.5, [1j])),
        ),
        "environment.reset": calling(
            simulate.environment(pendulum, torch.tensor([2.0])).reset, seed=Argument(3, ("x", 1.5, object(), -1, [3]))
        ),
        "EnvironmentRollouts": calling(
            simulate.EnvironmentRollouts,
            make=Argument("Pendulum-v1", (None, 3, object(), {"x": 1}, torch.ones(2), "Misspelt-v1")),
            horizon=count(2),
            observe=function(None, optional=True),
            act=function(None, optional=True),
        ),
        "EnvironmentRollouts()": calling(
            simulate.EnvironmentRollouts("Pendulum-v1", 2),
            rule=function(
                lambda x: x[:, :1], nn.Linear, lambda x: x, lambda x: None, lambda x: "x", lambda x: x[:1, :1]
            ),
            batch_size=count(2, optional=True),
            generator=generator,
        ),
    }
    return found


def stochastic() -> dict[str, Any]:
    """Plants that draw their first states."""
    gaussian = plants.LinearGaussian(A, B, V=I)
    return {
        "LinearGaussian": gaussian,
        "Vehicle": plants.Vehicle(),
        "SupplyChain": plants.SupplyChain(),
        "Pendulum": plants.Pendulum(),
        "CartPole": plants.CartPole(),
    }
