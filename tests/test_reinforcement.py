import numpy as np
import pytest
import torch

from convexlearn.errors import OptionError
from convexlearn.evaluate import evaluate
from convexlearn.objectives import cost
from convexlearn.reinforcement import learn_by_reinforcement
from convexlearn.rules.base import Role
from convexlearn.simulate.closed_loop import ClosedLoop

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("stable_baselines3")

HORIZON = 10


class Scalar(gymnasium.Env):
    """z+ = z + u from a random z_0, reward -(z^2 + 0.1 u^2)."""

    observation_space = gymnasium.spaces.Box(-10.0, 10.0, (1,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.z, self.t = self.np_random.normal(size=1), 0
        return self.z.copy(), {}

    def step(self, action):
        reward = -float(self.z[0] ** 2 + 0.1 * action[0] ** 2)
        self.z, self.t = np.clip(self.z + action, -10, 10), self.t + 1
        return self.z.copy(), reward, False, self.t >= HORIZON, {}


def loop():
    def initial(batch, generator):
        return torch.randn(batch, 1, generator=generator, dtype=torch.float64)

    return ClosedLoop(
        lambda z, u, w: z + u, HORIZON, initial=initial,
        stage_cost=lambda z, u: z[:, 0].square() + 0.1 * u[:, 0].square(),
    )  # fmt: skip


@pytest.mark.parametrize("algorithm", ["PPO", "SAC"])
def test_agents_are_rules(algorithm):
    options = {"n_steps": 32, "batch_size": 16} if algorithm == "PPO" else {"learning_starts": 20}
    state = torch.get_rng_state()
    rules = [learn_by_reinforcement(Scalar(), steps=40, algorithm=algorithm, **options) for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    assert torch.equal(rules[0](x), rules[1](x))
    assert rules[0](x).shape == (7, 1)
    assert rules[0](x).dtype == torch.float64
    assert rules[0](x).abs().max() <= 1
    assert rules[0](x[:0]).shape == (0, 1)
    assert rules[0].count_parameters()[Role.NETWORK] > 100
    assert evaluate(rules[0], loop(), cost, samples=8).failures == 0


@pytest.mark.slow
def test_reinforcement_learns_to_control():
    """Model-free: it needs thousands of steps for what gradients through the simulator do in a few rollouts."""
    rule = learn_by_reinforcement(Scalar(), steps=10000, n_steps=200, batch_size=50, learning_rate=1e-3, gamma=0.9)
    idle = evaluate(lambda x: 0 * x, loop(), cost, samples=500).mean
    assert evaluate(rule, loop(), cost, samples=500).mean < 0.4 * idle


def test_mistakes_are_named():
    with pytest.raises(OptionError, match="did you mean 'PPO'"):
        learn_by_reinforcement(Scalar(), steps=10, algorithm="PP0")
    with pytest.raises(OptionError, match="steps must be an integer of at least 1"):
        learn_by_reinforcement(Scalar(), steps=0)
