import math

import gymnasium
import numpy as np
import pytest
import torch
from contracts import SimulatorContract
from gymnasium.utils.env_checker import check_env
from torch import nn

from convexlearn.errors import OptionError, ShapeError
from convexlearn.evaluate import evaluate
from convexlearn.objectives import cost
from convexlearn.riccati import lqr_gain
from convexlearn.rules.base import DecisionRule
from convexlearn.simulate.closed_loop import ClosedLoop
from convexlearn.simulate.gymnasium import EnvironmentRollouts, environment
from convexlearn.simulate.plants import (
    CartPole,
    LinearGaussian,
    Pendulum,
    SupplyChain,
    Vehicle,
    linearize,
    random_linear,
)

EYE = torch.eye(4, dtype=torch.float64)
PLANTS = {
    "linear": (LinearGaussian(*random_linear(0, 4, 2), V=0.25 * EYE), torch.ones(2)),
    "partial": (LinearGaussian(*random_linear(0, 4, 2), V=0.25 * EYE, C=EYE[:3], W=EYE[:3, :3]), torch.ones(2)),
    "vehicle": (Vehicle(), torch.tensor([2.0, 0.68])),
    "supply chain": (SupplyChain(), (torch.zeros(8), 2 * torch.ones(8))),
    "pendulum": (Pendulum(), torch.tensor([2.0])),
    "cart and pole": (CartPole(), torch.tensor([1.0])),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def loop_of(plant, horizon=20, **options):
    given = {key: getattr(plant, key) for key in ("noise", "observe") if hasattr(plant, key)}
    return ClosedLoop(plant, horizon, initial=plant.initial, stage_cost=plant.stage_cost, **given | options)


@pytest.mark.filterwarnings("ignore:.*Box observation space (m|maximum|minimum).*infinity")
@pytest.mark.filterwarnings("ignore:.*not having a spec")
@pytest.mark.filterwarnings("ignore:.*we recommend using a symmetric and normalized space")
@pytest.mark.parametrize("name", PLANTS)
def test_our_plants_pass_gymnasiums_checks(name):
    plant, limit = PLANTS[name]
    check_env(environment(loop_of(plant), limit), skip_render_check=True)


@pytest.mark.parametrize("name", PLANTS)
def test_an_environment_is_the_closed_loop_of_batch_one(name):
    plant, limit = PLANTS[name]
    loop = loop_of(plant, 10, terminal_cost=lambda z: z.square().sum(-1))
    env = environment(loop, limit)
    u = 0.1 * torch.ones(1, *env.action_space.shape, dtype=torch.float64)
    rollout = loop(lambda x: u, 1, generator(7))
    observation, info = env.reset(seed=7)
    for t in range(10):
        np.testing.assert_array_equal(observation, rollout.context[0, t])
        np.testing.assert_array_equal(info["state"], rollout.state[0, t])
        observation, reward, terminated, truncated, info = env.step(u[0].numpy())
        assert reward == pytest.approx(-rollout.cost[0, t].item(), rel=1e-12)
        assert (terminated, truncated) == (False, t == 9)


def test_several_observations_make_a_tuple_space():
    plant = PLANTS["linear"][0]
    loop = loop_of(plant, observe=lambda z, t, w: (z, z[:, :1] * 0 + t))
    env = environment(loop, torch.ones(2), 1e6)
    first, _ = env.reset(seed=0)
    assert first in env.observation_space
    assert [space.shape for space in env.observation_space] == [(4,), (1,)]


def test_a_diverging_plant_terminates_the_episode():
    loop = ClosedLoop(
        lambda z, u, w: torch.exp(z) * 100, 20, initial=torch.ones(1).double(), stage_cost=lambda z, u: z[:, 0]
    )
    env = environment(loop, torch.ones(1))
    env.reset(seed=0)
    outcomes = [env.step(np.zeros(1)) for _ in range(2)]
    assert [o[2] for o in outcomes] == [False, True]
    assert all(np.isfinite(o[0]).all() and math.isfinite(o[1]) for o in outcomes)


class TestEnvironmentRollouts(SimulatorContract):
    @pytest.fixture
    def simulator(self):
        return EnvironmentRollouts("Pendulum-v1", 6)

    @pytest.fixture
    def rule(self):
        return nn.Linear(3, 1).double()

    def test_gradients_pass(self, simulator, rule):
        """To the decisions; the environment itself is no torch function."""
        episodes = self.run(simulator, rule)
        assert not episodes.cost.requires_grad
        episodes.decision.square().sum().backward()
        assert rule.weight.grad.abs().sum() > 0


class Summing(DecisionRule):
    """A rule with memory."""

    def start(self, x):
        return torch.zeros_like(x[:, :1])

    def decide(self, x, memory):
        memory = memory + x[:, 1:2]
        return -memory, memory


@pytest.mark.parametrize("rule", [Summing(), lambda x: -x[:, 1:2]], ids=["memory", "no memory"])
def test_a_batched_rollout_equals_a_looped_one(rule):
    episodes = EnvironmentRollouts("Pendulum-v1", 12)(rule, 4, generator())
    seeds = torch.randint(2**31 - 1, (4,), generator=generator()).tolist()
    for i, seed in enumerate(seeds):
        env = gymnasium.make("Pendulum-v1")
        x, _ = env.reset(seed=seed)
        memory = torch.zeros(1, 1, dtype=torch.float64)
        for t in range(12):
            x = torch.as_tensor(x).double()[None]
            torch.testing.assert_close(episodes.context[i, t], x[0], rtol=0, atol=0)
            memory = memory + x[:, 1:2]
            u = -memory if isinstance(rule, Summing) else -x[:, 1:2]
            torch.testing.assert_close(episodes.decision[i, t], u[0])
            x, reward, *_ = env.step(u[0].clamp(-2, 2).numpy().astype(np.float32))
            assert episodes.cost[i, t] == -reward
        env.close()


def test_our_pendulum_is_gymnasiums():
    """Angles in Gymnasium's environment and in our plant, under the same torques."""
    env, plant = gymnasium.make("Pendulum-v1"), Pendulum()
    env.reset(seed=3)
    z = torch.tensor(env.unwrapped.state)[None]
    for t in range(20):
        u = torch.tensor([[2 * math.sin(t)]], dtype=torch.float64)
        reference = plant.stage_cost(z, u)
        z = plant(z, u, 0.0)
        _, reward, *_ = env.step(u[0].numpy())
        assert reward == pytest.approx(-reference.item(), rel=1e-6)
        np.testing.assert_allclose(env.unwrapped.state, z[0], rtol=1e-6)


def test_a_rule_made_with_our_plant_balances_gymnasiums_cart():
    """LQR from CartPole, in CartPole-v1: left or right by the sign of the input; 200 steps without falling."""
    plant = CartPole()
    A, B = linearize(plant, torch.zeros(4).double(), torch.zeros(1).double())
    K = lqr_gain(A, B, EYE, torch.ones(1, 1).double())
    balanced = EnvironmentRollouts("CartPole-v1", 200)
    scores = lambda x: torch.cat([x @ K.mT, -x @ K.mT], -1)  # noqa: E731
    episodes = balanced(scores, 3, generator())
    assert episodes.length.tolist() == [200, 200, 200]
    fallen = balanced(lambda x: torch.ones(len(x), 1).double() * torch.tensor([0.0, 1.0]).double(), 3, generator())
    assert (fallen.length < 30).all()
    for i, length in enumerate(fallen.length.tolist()):
        assert fallen.cost[i].sum() == -length
        assert (fallen.context[i, length:] == fallen.context[i, -1]).all()
    assert evaluate(scores, balanced, cost, samples=2).mean == -1.0


def test_mistakes_are_named():
    with pytest.raises(OptionError, match="horizon must be a positive number"):
        EnvironmentRollouts("Pendulum-v1", 0)
    with pytest.raises(ShapeError, match=r"the rule must score them, \(B, 2\), or give `act`; got decisions \(1, 1\)"):
        EnvironmentRollouts("CartPole-v1", 3)(lambda x: x[:, :1], 1)
    with pytest.raises(ShapeError, match=r"actions have shape \(1,\), the rule's \(3,\)"):
        EnvironmentRollouts("Pendulum-v1", 3)(lambda x: x, 1)
    with pytest.raises(OptionError, match="batch_size must be an integer of at least 1"):
        EnvironmentRollouts("Pendulum-v1", 3)(lambda x: x, 0)
    with pytest.raises(ShapeError, match="limit must hold one bound per entry"):
        environment(loop_of(Pendulum()), 2.0)
