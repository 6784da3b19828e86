"""Gymnasium both ways: our plants as its environments, and its environments as our simulators."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexlearn.checks import FUNCTION, GENERATOR, checked, count, instance, require_that, shown
from convexlearn.errors import DomainError, OptionError, ShapeError
from convexlearn.extras import require
from convexlearn.failures import collect_failures
from convexlearn.inputs import as_tensor
from convexlearn.randomness import make_generator
from convexlearn.rules.base import as_rule
from convexlearn.simulate.base import Trajectory, not_finite
from convexlearn.simulate.closed_loop import BATCH_SIZE, ClosedLoop


@dataclass(frozen=True, eq=False)
class Episodes(Trajectory):
    """Trajectory of an environment: context and decision `(B, T, ...)`, cost `(B, T)` = minus the reward.

    length: `(B,)` steps until the episode ended, T where it did not; later costs are zero and later contexts
    repeat the last. The cost is data: no gradient passes through an environment.
    """

    length: Tensor = None  # type: ignore[assignment]


class EnvironmentRollouts:
    """A simulator that runs a rule in a Gymnasium environment, `batch_size` episodes side by side.

    make: the environment's name, as in "Pendulum-v1", or a function without arguments that makes one; every
    episode has an environment of its own, seeded from the generator. horizon: steps at most. observe: function
    of the batch of observations `(B, ...)`, a tensor in float64 (or a tuple or dict of them, as its space), giving
    the rule's context. act: function of the decisions `(B, ...)` giving the actions, `(B, ...)`; by default
    decisions are clipped to the bounds of a continuous action space, and the best score `(B, K)` is chosen of K
    discrete actions. Needs `pip install 'convexlearn[control]'`.

    >>> swing = EnvironmentRollouts("Pendulum-v1", 5)
    >>> swing(lambda x: -x[:, 1:2], 3).cost.shape
    torch.Size([3, 5])
    """

    @checked(observe=FUNCTION, act=FUNCTION)
    def __init__(
        self,
        make: str | Callable[[], Any],
        horizon: int,
        *,
        observe: Callable[[Any], Any] | None = None,
        act: Callable[[Tensor], Any] | None = None,
    ) -> None:
        if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
            raise OptionError(f"EnvironmentRollouts: horizon must be a positive number of steps, got {horizon!r}")
        library = _gymnasium()
        if isinstance(make, str):
            try:
                library.spec(make)
            except library.error.Error as error:
                raise OptionError(f"EnvironmentRollouts: make={make!r} is no environment: {error}") from error
        else:
            require_that("EnvironmentRollouts", "make", FUNCTION, make)
        self.make: Callable[[], Any] = (lambda: library.make(make)) if isinstance(make, str) else make
        self.horizon, self.observe, self.act = horizon, observe, act

    @checked(batch_size=count(), generator=GENERATOR)
    def __call__(self, rule: Any, batch_size: int | None = None, generator: torch.Generator | None = None) -> Episodes:
        """`batch_size` episodes of the rule (default BATCH_SIZE)."""
        return self.part(rule, None, batch_size, make_generator(0, "environment") if generator is None else generator)

    def part(self, rule: Any, rows: Tensor | None, batch_size: int | None, generator: torch.Generator) -> Episodes:
        """The episodes `rows` of the `batch_size` that a call gives; all of them for None."""
        batch = BATCH_SIZE if batch_size is None else batch_size
        if batch < 1:
            raise OptionError(f"EnvironmentRollouts: batch_size must be at least 1, got {batch}")
        drawn = torch.randint(2**31 - 1, (batch,), generator=generator, device=generator.device)
        seeds = (drawn if rows is None else drawn[rows.to(drawn.device)]).tolist()
        environments = [self.make() for _ in seeds]
        try:
            return self._run(as_rule(rule), environments, seeds)
        finally:
            for environment in environments:
                environment.close()

    def _run(self, rule: Any, environments: list[Any], seeds: list[int]) -> Episodes:
        batch, observations = len(seeds), [e.reset(seed=s)[0] for e, s in zip(environments, seeds)]
        length = torch.full((batch,), self.horizon)
        failed = torch.zeros(batch, dtype=torch.bool)
        contexts, decisions, costs, memory = [], [], [], None
        for t in range(self.horizon):
            x = _tensors(observations)
            x = x if self.observe is None else self.observe(x)
            if t == 0:
                memory = rule.start(x)
            with collect_failures() as failures:
                u, memory = rule.decide(x, memory)
            if not isinstance(u, Tensor) or u.ndim == 0 or len(u) != batch or u.is_complex():
                raise ShapeError(f"EnvironmentRollouts: the rule must decide (B, ...) with B = {batch}, got {shown(u)}")
            failed |= (length == self.horizon) & (failures.mask(batch) | not_finite(u, batch))
            actions = self._actions(u, environments[0].action_space)
            cost = torch.zeros(batch, dtype=torch.float64)
            for i, environment in enumerate(environments):
                if length[i] == self.horizon and not failed[i]:
                    observations[i], reward, ended, cut, _ = environment.step(actions[i])
                    cost[i] = -float(reward)
                    if ended or cut:
                        length[i] = t + 1
            contexts.append(x)
            decisions.append(torch.nan_to_num(u))
            costs.append(cost)
        return Episodes(
            _stack(contexts), torch.stack(decisions, 1), cost=torch.stack(costs, 1), failed=failed, length=length
        )

    def _actions(self, u: Tensor, space: Any) -> Any:
        """Actions of the space from decisions."""
        if self.act is not None:
            return self.act(u)
        values = torch.nan_to_num(u.detach()).cpu().numpy()
        spaces = _gymnasium().spaces
        if isinstance(space, spaces.Discrete):
            if values.ndim != 2 or values.shape[1] != space.n:
                raise ShapeError(
                    f"the environment has {space.n} actions; the rule must score them, (B, {space.n}), or give `act`; "
                    f"got decisions {tuple(values.shape)}"
                )
            return space.start + values.argmax(1)
        if not isinstance(space, spaces.Box):
            raise OptionError(f"EnvironmentRollouts: actions of the space {space} need the option act=")
        if values.shape[1:] != space.shape:
            raise ShapeError(f"the environment's actions have shape {space.shape}, the rule's {values.shape[1:]}")
        return np.clip(values, space.low, space.high).astype(space.dtype)


@checked(loop=instance(ClosedLoop, "a ClosedLoop"))
def environment(loop: ClosedLoop, limit: Any, observation_limit: Any = np.inf) -> Any:
    """The closed loop's plant as a `gymnasium.Env`: actions are inputs, the reward is minus the cost.

    limit: bounds of the input, numbers or vectors (low, high), or a vector `(m,)` for [-limit, limit]; the action
    space is that box. observation_limit: the same for the observation, numbers only where it has several parts.
    An episode is truncated after the loop's horizon, when the terminal cost is charged, and terminated where the
    state diverges or a reward is not finite; `info["state"]` holds the state. `reset(seed=s)` draws what the
    loop draws from one generator for batch size 1. Needs `pip install 'convexlearn[control]'`.

    >>> from convexlearn.simulate.plants import Pendulum
    >>> plant = Pendulum()
    >>> loop = ClosedLoop(plant, 200, initial=plant.initial, observe=plant.observe, stage_cost=plant.stage_cost)
    >>> env = environment(loop, torch.tensor([2.0]))
    >>> env.action_space
    Box(-2.0, 2.0, (1,), float64)
    """
    return _environment_class()(loop, limit, observation_limit)


@cache
def _environment_class() -> type:
    """PlantEnvironment; made when it is needed, since its base class is gymnasium's."""
    library = _gymnasium()

    class PlantEnvironment(library.Env):
        """A ClosedLoop as an environment; see `environment`."""

        metadata = {"render_modes": []}

        def __init__(self, loop: ClosedLoop, limit: Any, observation_limit: Any) -> None:
            self.loop = loop
            self.action_space = _box(limit, None, "limit")
            self.draws = torch.Generator().manual_seed(0)
            self._begin()
            self.observation_space = _space(_arrays(self._observe()), observation_limit)

        def _begin(self) -> None:
            self.t, self.z = 0, self.loop.start(1, self.draws)
            self.w = self._draw()

        def _draw(self) -> Any:
            w = self.loop.draw(1, self.t, self.draws)
            return _first(self.z).new_zeros(()) if w is None else w

        def _observe(self) -> Any:
            return self.z if self.loop.observe is None else self.loop.observe(self.z, self.t, self.w)

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
            """First observation and info; the same seed gives the same episode."""
            if seed is not None:
                require_that("environment", "seed", count(0), seed)
            super().reset(seed=seed)
            own = int(self.np_random.integers(2**63 - 1)) if seed is None else seed
            self.draws = torch.Generator().manual_seed(own)
            self._begin()
            return _arrays(self._observe()), {"state": _arrays(self.z)}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
            """Observation, reward, terminated, truncated, info."""
            given = as_tensor("action", action, "environment:")
            if tuple(given.shape) != self.action_space.shape or not bool(torch.isfinite(given).all()):
                wanted = f"finite, of shape {self.action_space.shape}"
                raise ShapeError(f"environment: action must be {wanted}, got {shown(action)}")
            u = given.to(_first(self.z).dtype)[None]
            with torch.no_grad():
                reward = -float(self.loop.stage_cost(self.z, u))
                following = self.loop.plant(self.z, u, self.w)
            lost = bool(not_finite(following, 1)) or any(p.abs().amax() > self.loop.bound for p in _flat(following))
            lost = lost or not np.isfinite(reward)
            self.z, self.t = self.z if lost else following, self.t + 1
            over = not lost and self.t >= self.loop.horizon
            if over and self.loop.terminal_cost is not None:
                reward -= float(self.loop.terminal_cost(self.z))
            self.w = self._draw()
            reward = reward if np.isfinite(reward) else -self.loop.bound
            return _arrays(self._observe()), reward, lost, over, {"state": _arrays(self.z)}

    return PlantEnvironment


def _gymnasium() -> ModuleType:
    return require("gymnasium", "control", "an environment")


def _box(limit: Any, shape: tuple[int, ...] | None, name: str) -> Any:
    """A Box in float64 from (low, high), or from one symmetric limit."""
    pair = limit if isinstance(limit, tuple) else (None, limit)
    if len(pair) != 2:
        raise OptionError(f"environment: {name} is a pair (low, high) or one symmetric limit, got {limit!r}")
    high = as_tensor(name, pair[1], "environment:").double().numpy()
    low = -high if pair[0] is None else as_tensor(name, pair[0], "environment:").double().numpy()
    if not bool((low <= high).all()):
        raise DomainError(f"environment: {name} must have low <= high in every entry, without NaN; got {limit!r}")
    if shape is None:
        shape = np.broadcast_shapes(low.shape, high.shape)
        if shape == ():
            raise ShapeError(f"environment: {name} must hold one bound per entry, (m,), got the number {limit!r}")
    elif any(part.shape not in {(), shape} for part in (low, high)):
        raise ShapeError(f"environment: {name} must be numbers or of shape {shape}, got {low.shape} and {high.shape}")
    return _gymnasium().spaces.Box(np.broadcast_to(low, shape), np.broadcast_to(high, shape), dtype=np.float64)


def _space(observation: Any, limit: Any) -> Any:
    if isinstance(observation, tuple):
        return _gymnasium().spaces.Tuple([_space(part, limit) for part in observation])
    return _box(limit, observation.shape, "observation_limit")


def _flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [part for item in value for part in _flat(item)]


def _first(value: Any) -> Tensor:
    return _flat(value)[0]


def _arrays(value: Any) -> Any:
    """Sample 0 as numpy arrays in float64, of its own memory."""
    if isinstance(value, Tensor):
        return value[0].detach().cpu().double().numpy().copy()
    return tuple(_arrays(part) for part in value)


def _tensors(observations: list[Any]) -> Any:
    """Observations of a batch, stacked, in float64; a space's tuples and dicts stay such."""
    if isinstance(observations[0], dict):
        return {key: _tensors([o[key] for o in observations]) for key in observations[0]}
    if isinstance(observations[0], tuple):
        return tuple(_tensors(list(parts)) for parts in zip(*observations))
    return torch.as_tensor(np.stack([np.asarray(o) for o in observations])).double()


def _stack(steps: list[Any]) -> Any:
    if isinstance(steps[0], dict):
        return {key: _stack([s[key] for s in steps]) for key in steps[0]}
    if isinstance(steps[0], tuple):
        return tuple(_stack(list(parts)) for parts in zip(*steps))
    return torch.stack(steps, 1)
