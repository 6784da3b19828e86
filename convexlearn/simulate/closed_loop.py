"""Closed loop: a rule acts on a plant that answers, step after step."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from convexlearn.checks import FUNCTION, GENERATOR, Check, checked, count, number, shown
from convexlearn.errors import MissingParameterError, OptionError, ShapeError
from convexlearn.failures import collect_failures
from convexlearn.randomness import make_generator
from convexlearn.rules.base import DecisionRule, as_rule
from convexlearn.simulate.base import Trajectory, not_finite, rows_of

BATCH_SIZE = 64
"""Number of rollouts when the caller names none."""

REASONS = (
    "the rule found no decision; soften its constraints, or give the rule on_failure='fallback'",
    "the decision is NaN or infinite; check the rule at the recorded context",
    "the state diverged; the rule does not stabilize the plant from there",
    "the cost is NaN or infinite; check stage_cost and terminal_cost",
    "the first state is NaN or infinite; correct initial, or leave that sample out",
    "the noise is NaN or infinite; correct what noise(batch, t, generator) gives, for instance recorded data",
    "the context is NaN or infinite; correct what observe(z, t, w) gives, or the rule's features",
)


INITIAL = Check(
    "a real tensor (n,), or a function (batch, generator) -> z_0 (batch, n)",
    lambda v: not v.is_complex() if isinstance(v, Tensor) else FUNCTION.fits(v),
)


@dataclass(frozen=True, eq=False)
class Rollout(Trajectory):
    """Trajectory of a closed loop: context and decision `(B, T, ...)`, state `(B, T + 1, ...)`, cost `(B, T)`.

    failed_at: `(B,)` the step at which a sample failed, T where none did. reason: `(B,)` which of REASONS.
    Rows of failed samples are finite, and the loop restarted from the first state after the failure.
    causes: by sample, the solver's status where the rule found no decision.
    """

    failed_at: Tensor = None  # type: ignore[assignment]
    reason: Tensor = None  # type: ignore[assignment]
    causes: tuple[str, ...] = ()

    def explain(self, labels: Sequence[int] | None = None) -> str:
        """One line per failed sample: where, why and what to do; `labels` are the samples' names.

        >>> step, failed = torch.tensor([3]), torch.tensor([True])
        >>> s = torch.zeros(1, 5, 1)
        >>> print(Rollout(s, s, failed=failed, failed_at=step, reason=torch.tensor([2])).explain())
        sample 0 failed at step 3: the state diverged; the rule does not stabilize the plant from there
        """
        if labels is not None and (not isinstance(labels, Sequence) or len(labels) < len(self)):
            raise OptionError(f"explain: labels must name all {len(self)} samples, got {shown(labels)}")
        lines = []
        for i in torch.nonzero(self.failed).flatten().tolist():
            cause = f"{self.causes[i]}: " if self.causes and self.causes[i] else ""
            name = i if labels is None else labels[i]
            step, reason = int(self.failed_at[i]), REASONS[int(self.reason[i])]
            lines.append(f"sample {name} failed at step {step}: {cause}{reason}")
        return "\n".join(lines)

    def select(self, samples: Tensor) -> "Rollout":
        """The rollouts of some samples only (a mask `(B,)` or indices)."""
        chosen = torch.arange(len(self))[rows_of("Rollout.select: samples", samples, len(self)).cpu()].tolist()
        causes = tuple(self.causes[i] for i in chosen) if self.causes else ()
        picked = super(Rollout, replace(self, causes=())).select(samples)
        return replace(picked, causes=causes)  # pyright: ignore[reportReturnType]


class ClosedLoop:
    """A plant z+ = f(z, u, w) under a rule, for `horizon` steps: the simulator of Examples 2 and 4.

    Each step t: x = observe(z, t, w), u = rule's decision for x, cost stage_cost(z, u), z+ = plant(z, u, w).
    All are torch functions, batch first, without randomness of their own:

    - `initial(batch, generator)` -> z_0, a tensor `(batch, ...)` or a tuple of them; or z_0 itself, a tensor
      `(n,)` that all rollouts start from.
    - `noise(batch, t, generator)` -> w_t, a tensor or tuple of tensors, batch first. The same w_t goes to
      `observe`, before the decision, and to `plant`, after it: a tuple holds process and observation noise.
      Without `noise`, w_t is a zero of shape ().
    - `observe(z, t, w)` -> x, a tensor, or a tuple for a rule of several contexts; by default x = z.
    - `stage_cost(z, u)` -> `(batch,)`; `terminal_cost(z_T)` -> `(batch,)`, added to the last stage's.

    All noise derives from the generator and is drawn in the same order whatever the rule does: the same
    seed gives two rules the same random numbers. Without generator the seed is 0. Gradients pass through
    the whole rollout; rules with memory keep it from step to step.

    A sample fails where the rule finds no decision, where decision, state or cost is NaN or infinite, or
    where an entry of the state exceeds `bound` in magnitude. It is marked, restarts from z_0, and passes
    no gradient. Where something infinite could reach the gradient of the others, the rollout is repeated
    with the randomness of a good sample in its place.

    >>> loop = ClosedLoop(
    ...     lambda z, u, w: z + u + w, 3, initial=torch.tensor([4.0]), stage_cost=lambda z, u: (z**2)[:, 0]
    ... )
    >>> loop(lambda x: -x / 2, 1).cost
    tensor([[16.,  4.,  1.]])
    """

    @checked(
        plant=FUNCTION,
        initial=INITIAL,
        noise=FUNCTION,
        observe=FUNCTION,
        stage_cost=FUNCTION,
        terminal_cost=FUNCTION,
        bound=number(above=0, infinite=True),
    )
    def __init__(
        self,
        plant: Callable[[Any, Any, Any], Any],
        horizon: int,
        *,
        initial: Any,
        noise: Callable[..., Any] | None = None,
        observe: Callable[..., Any] | None = None,
        stage_cost: Callable[..., Tensor],
        terminal_cost: Callable[..., Tensor] | None = None,
        bound: float = 1e8,
    ) -> None:
        if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
            raise OptionError(f"ClosedLoop: horizon must be a positive number of steps, got {horizon!r}")
        self.plant, self.horizon, self.bound = plant, horizon, bound
        self.initial, self.noise, self.observe = initial, noise, observe
        self.stage_cost, self.terminal_cost = stage_cost, terminal_cost

    @checked(batch_size=count(0), generator=GENERATOR)
    def __call__(self, rule: Any, batch_size: int | None = None, generator: torch.Generator | None = None) -> Rollout:
        """`batch_size` rollouts of the rule (default BATCH_SIZE)."""
        batch = BATCH_SIZE if batch_size is None else batch_size
        generator = make_generator(0, "closed loop") if generator is None else generator
        before = generator.get_state()
        run = _Run(self, as_rule(rule), batch, generator)
        poisoned = run.failed & run.poisonous
        if not torch.is_grad_enabled() or not bool(poisoned.any()) or bool(run.failed.all()):
            return run.rollout()
        source = torch.arange(batch, device=poisoned.device)
        source[poisoned] = torch.nonzero(~run.failed).flatten()[0]
        replay = torch.Generator(generator.device)
        replay.set_state(before)
        return run.rollout(_Run(self, as_rule(rule), batch, replay, source))

    def part(self, rule: Any, rows: Tensor, batch_size: int | None, generator: torch.Generator) -> Rollout:
        """The rollouts `rows` of the `batch_size` that a call gives: everybody's noise is drawn, theirs is kept."""
        batch = BATCH_SIZE if batch_size is None else batch_size
        twin = copy.copy(self)
        twin.initial = lambda few, generator: _take(self.start(batch, generator), rows)
        twin.noise = (
            None if self.noise is None else lambda few, t, generator: _take(self.draw(batch, t, generator), rows)
        )
        return twin(rule, len(rows), generator)

    def start(self, batch: int, generator: torch.Generator) -> Any:
        """First states z_0 of `batch` rollouts."""
        if isinstance(self.initial, Tensor):
            return self.initial.expand(batch, *self.initial.shape)
        z = self.initial(batch, generator)
        _check_parts(z, batch, "initial(batch, generator)")
        return z

    def draw(self, batch: int, t: int, generator: torch.Generator) -> Any:
        """Noise w_t of `batch` rollouts."""
        if self.noise is None:
            return None
        w = self.noise(batch, t, generator)
        for part in _parts(w, "noise"):
            _check_batch(part, batch, "noise(batch, t, generator)")
        return w


class _Run:
    """One simulation: what was recorded, and which samples failed where."""

    def __init__(
        self,
        loop: ClosedLoop,
        rule: DecisionRule,
        batch: int,
        generator: torch.Generator,
        source: Tensor | None = None,
    ) -> None:
        z = _take(loop.start(batch, generator), source)
        zero = _parts(z, "initial")[0].new_zeros(())
        self.loop, self.batch = loop, batch
        self.failed = torch.zeros(batch, dtype=torch.bool, device=zero.device)
        self.poisonous = torch.zeros_like(self.failed)  # NaN or infinite, which survives a product with zero
        self.failed_at = torch.full_like(self.failed, loop.horizon, dtype=torch.long)
        self.reason = torch.zeros_like(self.failed_at)
        self.causes = [""] * batch
        self.restart = _map(lambda part: torch.nan_to_num(part.detach(), nan=0.0, posinf=0.0, neginf=0.0), z)
        self.contexts, self.decisions, self.costs = [], [], []
        self.states = [self._settle(z, 0, 4)]
        memory, self.doing = None, ""

        def draw(t: int) -> Any:
            w = loop.draw(batch, t, generator)
            return zero if w is None else _take(w, source)

        for t in range(loop.horizon):
            try:
                memory = self._step(t, rule, memory, draw)
            except Exception as error:
                error.add_note(f"ClosedLoop: in {self.doing} at step {t}; the state is z {_shapes(self.states[-1])}")
                raise
        if loop.terminal_cost is not None:
            last = self._cost(loop.terminal_cost, loop.horizon - 1, self.states[-1])
            self.costs[-1] = self.costs[-1] + last

    def _step(self, t: int, rule: DecisionRule, memory: Any, draw: Callable[[int], Any]) -> Any:
        """Observe, decide, pay, move on; returns the rule's memory."""
        loop, z = self.loop, self.states[-1]
        self.doing = "noise(batch, t, generator)"
        w = draw(t)
        self.doing = "observe(z, t, w)"
        x = z
        if loop.observe is not None:
            x = loop.observe(z, t, w)
            _check_parts(x, self.batch, "observe(z, t, w)", real=False)
        self.doing = "the rule"
        if t == 0:
            memory = rule.start(x)
        with collect_failures() as failures:
            u, memory = rule.decide(x, memory)
        _check_parts(u, self.batch, "the rule's decision")
        if failures.masks:
            lost, refused = (failures.mask(self.batch, self.failed.device, refused=k) for k in (False, True))
            for i in torch.nonzero(lost & ~self.failed).flatten().tolist():
                self.causes[i] = failures.cause(i, self.batch)
            self.poisonous = self.poisonous | refused
            self._mark(refused, t, 6)
            self._mark(lost, t, 0)
        u = self._clean(u, t, 1)
        self.doing = f"stage_cost(z, u) with u {_shapes(u)}" if t == 0 else "stage_cost(z, u)"
        self.costs.append(self._cost(loop.stage_cost, t, z, u))
        self.doing = f"plant(z, u, w) with u {_shapes(u)}" if t == 0 else "plant(z, u, w)"
        following = loop.plant(z, u, w)
        if t == 0:
            self._check_state(following, z)
        self.contexts.append(x)
        self.decisions.append(u)
        self.states.append(self._settle(following, t, 2, w))
        return memory

    def rollout(self, again: "_Run | None" = None) -> Rollout:
        """What was recorded; `again` records the good samples without what the failed ones poisoned."""
        record = self._record()
        if bool(self.failed.any()):
            new = record if again is None else again._record()
            old = _map(torch.detach, record)
            record = old if bool(self.failed.all()) else _where(self.failed, old, new)
        x, u, z, cost = record
        return Rollout(x, u, z, None, cost, self.failed, self.failed_at, self.reason, tuple(self.causes))

    def _record(self) -> tuple[Any, Any, Any, Tensor]:
        """Context, decision, state and cost, time on axis 1."""
        states = _stack(self.states)
        x = _map(lambda part: part[:, :-1], states) if self.loop.observe is None else _stack(self.contexts)
        return x, _stack(self.decisions), states, torch.stack(self.costs, 1)

    def _settle(self, z: Any, t: int, reason: int, w: Any = ()) -> Any:
        """The state, with z_0 in place of rows that diverged, for `reason` or because the noise w is no number."""
        parts = _parts(z, "plant(z, u, w)")
        if not self.batch or all(float(_size(part).amax()) <= self.loop.bound for part in parts):
            return z
        bad = torch.zeros_like(self.failed)
        for part in parts:
            rows = part.detach().reshape(self.batch, part[:1].numel())
            bad = bad | ~(_size(rows) <= self.loop.bound).all(1)
        self.poisonous = self.poisonous | not_finite(z, self.batch).to(bad.device)
        noisy = [part for part in _parts(w, "noise") if part.ndim]
        self._mark(bad & not_finite(noisy, self.batch).to(bad.device), t, 5)
        self._mark(bad, t, reason)
        return _where(bad, self.restart, z)

    def _clean(self, value: Any, t: int, reason: int) -> Any:
        """Decision or cost, with zeros in place of rows that are not finite."""
        if all(math.isfinite(float(part.detach().sum())) for part in _parts(value, "the rule's decision")):
            return value
        bad = not_finite(value, self.batch).to(self.failed.device)
        self.poisonous = self.poisonous | bad
        self._mark(bad, t, reason)
        return _where(bad, _map(torch.zeros_like, value), value)

    def _cost(self, function: Callable[..., Tensor], t: int, *arguments: Any) -> Tensor:
        cost = function(*arguments)
        if not isinstance(cost, Tensor) or cost.shape != (self.batch,) or cost.is_complex():
            got = tuple(cost.shape) if isinstance(cost, Tensor) else type(cost).__name__
            name = "stage_cost(z, u)" if len(arguments) == 2 else "terminal_cost(z)"
            raise ShapeError(f"ClosedLoop: {name} must return one real number per sample, ({self.batch},), got {got}")
        return self._clean(cost, t, 3)

    def _mark(self, bad: Tensor, t: int, reason: int) -> None:
        new = bad & ~self.failed
        self.failed = self.failed | new
        self.failed_at = torch.where(new, t, self.failed_at)
        self.reason = torch.where(new, reason, self.reason)

    def _check_state(self, new: Any, old: Any) -> None:
        shapes = [[tuple(part.shape) for part in _parts(z, "plant(z, u, w)")] for z in (new, old)]
        if shapes[0] != shapes[1]:
            raise ShapeError(
                f"ClosedLoop: plant(z, u, w) must return a state of the shape of z, {shapes[1]}, got {shapes[0]}"
            )


def _size(part: Tensor) -> Tensor:
    """Magnitudes; those of True and False, and of numbers without sign, are themselves."""
    return part.detach().abs() if part.is_floating_point() else part.detach().double().abs()


def _shapes(value: Any) -> str:
    shapes = [str(tuple(part.shape)) for part in _parts(value, "a value")]
    return shapes[0] if len(shapes) == 1 else f"({', '.join(shapes)})"


def _where(mask: Tensor, a: Any, b: Any) -> Any:
    if isinstance(b, Tensor):
        return torch.where(mask.reshape(-1, *[1] * (b.ndim - 1)), a, b)
    return _rebuilt(b, [_where(mask, left, right) for left, right in zip(a, b)])


def _take(value: Any, rows: Tensor | None) -> Any:
    return value if rows is None or value is None else _map(lambda part: part[rows], value)


def _stack(steps: list[Any]) -> Any:
    if isinstance(steps[0], Tensor):
        return torch.stack(steps, 1)
    return _rebuilt(steps[0], [_stack(list(parts)) for parts in zip(*steps)])


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    return function(value) if isinstance(value, Tensor) else _rebuilt(value, [_map(function, v) for v in value])


def _rebuilt(like: Any, parts: list[Any]) -> Any:
    """A tuple, or named tuple, of the same type as `like`."""
    return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)


def _parts(value: Any, where: str) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [part for item in value for part in _parts(item, where)]
    got = type(value).__name__
    raise MissingParameterError(f"ClosedLoop: {where} must give a tensor or a tuple of tensors, got {got}")


def _check_parts(value: Any, batch: int, where: str, *, real: bool = True) -> None:
    """Refuse what is no tensor or tuple of tensors `(batch, ...)`, or an empty one."""
    parts = _parts(value, where)
    if not parts:
        raise ShapeError(f"ClosedLoop: {where} must give a tensor or a tuple of tensors, got an empty tuple")
    for part in parts:
        _check_batch(part, batch, where)
        if real and part.is_complex():
            raise ShapeError(f"ClosedLoop: {where} must be real, got {part.dtype}")


def _check_batch(part: Tensor, batch: int, where: str) -> None:
    if part.ndim == 0 or len(part) != batch:
        raise ShapeError(f"ClosedLoop: {where} must have the batch first, ({batch}, ...), got {tuple(part.shape)}")
