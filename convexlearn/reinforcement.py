"""Model-free reinforcement learning of a neural rule by stable-baselines3, as a baseline (Example 12 of the paper)."""

import inspect
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexlearn.checks import checked, count, shown, word
from convexlearn.errors import OptionError, check_options
from convexlearn.extras import require
from convexlearn.rules.base import DecisionRule

ALGORITHMS = ("A2C", "DDPG", "PPO", "SAC", "TD3")


class AgentRule(DecisionRule):
    """The deterministic policy of a trained agent: x `(B, n)` -> its action `(B, m)` within the action space.

    For evaluation: no gradient passes through it. Weights, those of the value function included, have the role
    NETWORK. `agent` is a trained algorithm of stable-baselines3.
    """

    def __init__(self, agent: Any) -> None:
        super().__init__()
        if not hasattr(agent, "policy") or isinstance(agent, type):
            raise OptionError(f"AgentRule: agent must be a trained algorithm of stable-baselines3, got {shown(agent)}")
        self.policy = agent.policy

    def forward(self, *x: Tensor) -> Tensor:
        """Actions in the dtype of x."""
        observation = x[0].detach().cpu().numpy().astype(self.policy.observation_space.dtype)
        if not len(observation):
            return x[0].new_zeros(0, *self.policy.action_space.shape)
        action, _ = self.policy.predict(observation, deterministic=True)
        return torch.as_tensor(np.asarray(action)).to(x[0])


@checked(steps=count(), algorithm=word(ALGORITHMS), seed=count(0))
def learn_by_reinforcement(
    environment: Any, *, steps: int, algorithm: str = "PPO", seed: int = 0, **options: Any
) -> AgentRule:
    """Train a network in a Gymnasium environment that shows it states and rewards, but neither model nor gradient.

    environment: with continuous observations and actions (one-dimensional boxes). steps: of the environment, in
    all. algorithm: one of ALGORITHMS. options: those of the algorithm, such as learning_rate, gamma, policy_kwargs.
    The global generators of torch, numpy and random, which the library seeds, are left as they were.
    Needs `pip install 'convexlearn[control]'`.
    """
    library = _library()
    if not isinstance(environment, require("gymnasium", "control", "reinforcement learning").Env):
        raise OptionError(f"learn_by_reinforcement: environment must be a gymnasium.Env, got {shown(environment)}")
    kind = getattr(library, algorithm)
    check_options(options, inspect.signature(kind.__init__).parameters, f"learn_by_reinforcement, {algorithm}")
    with _unchanged_generators():
        agent = kind("MlpPolicy", environment, seed=seed, device="cpu", **options)
        agent.learn(steps)
    return AgentRule(agent)


class _unchanged_generators:
    """Restores the states of the global generators on leaving."""

    def __enter__(self) -> None:
        import random

        self.states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002

    def __exit__(self, *error: Any) -> None:
        import random

        random.setstate(self.states[0])
        np.random.set_state(self.states[1])  # noqa: NPY002
        torch.set_rng_state(self.states[2])


def _library() -> ModuleType:
    return require("stable_baselines3", "control", "reinforcement learning")
