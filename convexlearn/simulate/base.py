"""The contract of simulators: run a rule where it must operate, give back what happened."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from convexlearn.checks import shown
from convexlearn.errors import MissingParameterError, OptionError, ShapeError


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What a simulation recorded, batch first, time axis 1 where there is time.

    context: x `(B, ...)` or a tuple; decision: s `(B, ...)`; state: z; target: desired decision; cost:
    `(B, T)` stage costs or `(B,)`; failed: `(B,)` True for samples without a valid outcome (all False
    by default).

    >>> Trajectory(torch.ones(2, 3), torch.zeros(2, 1)).failed
    tensor([False, False])
    """

    context: Any
    decision: Any
    state: Any = None
    target: Any = None
    cost: Tensor | None = None
    failed: Tensor = None  # type: ignore[assignment]  # filled below

    def __post_init__(self) -> None:
        first = _first(self.decision)
        if first.ndim == 0:
            raise ShapeError("trajectory.decision is a number; expected the batch first, (B, ...)")
        if self.failed is None:
            failed = torch.zeros(len(first), dtype=torch.bool, device=first.device)
            object.__setattr__(self, "failed", failed)
        for name in ("context", "decision", "state", "target", "cost", "failed"):
            for part in _parts(getattr(self, name), f"trajectory.{name}"):
                if part.ndim == 0 or len(part) != len(first):
                    raise ShapeError(
                        f"trajectory.{name} has shape {tuple(part.shape)}, expected batch size {len(first)} first"
                    )

        if isinstance(self.cost, Tensor) and self.cost.is_complex():
            raise ShapeError(f"trajectory.cost must be real, got {self.cost.dtype}")
        if self.failed.dtype is not torch.bool or self.failed.ndim != 1:
            raise ShapeError(f"trajectory.failed must be a mask ({len(first)},) of bools, got {shown(self.failed)}")

    def __len__(self) -> int:
        return len(self.failed)

    def select(self, samples: Tensor) -> "Trajectory":
        """The trajectory of some samples only (a mask `(B,)` or indices)."""
        samples = rows_of("Trajectory.select: samples", samples, len(self))
        picked = {f.name: _map(getattr(self, f.name), lambda t: t[samples]) for f in fields(self)}
        return replace(self, **picked)


class Simulator(Protocol):
    """simulator(rule, batch_size, generator) -> Trajectory, differentiable in the rule.

    All randomness comes from the generator. `batch_size` None stands for the simulator's own choice.
    Rules run inside `failures.collect_failures()`, so that a failed sample is data, not an exception.
    """

    def __call__(
        self, rule: Any, batch_size: int | None = None, generator: torch.Generator | None = None
    ) -> Trajectory:
        """Simulate `batch_size` samples."""
        ...


def check_simulator(simulator: Any, where: str) -> None:
    """OptionError for data that are not a simulator yet."""
    if not callable(simulator) or isinstance(simulator, type | Tensor):
        raise OptionError(
            f"{where}: {type(simulator).__name__} is no simulator; give one, as Pairs(x, s) for contexts and targets, "
            "or a ClosedLoop for a plant"
        )


def simulate(simulator: Any, rule: Any, rows: Tensor, batch_size: int | None, generator: torch.Generator) -> Trajectory:
    """The trajectories `rows` of those that simulator(rule, batch_size, generator) gives, with the same numbers.

    A simulator may define `part(rule, rows, batch_size, generator)`, which draws for the whole batch and simulates
    these rows; a data set is asked for a subset, any other simulator for everything.
    """
    count = len(simulator) if isinstance(simulator, FiniteSimulator) else batch_size
    if torch.equal(rows, torch.arange(count or 0)):
        return simulator(rule, batch_size, generator)
    part = getattr(simulator, "part", None)
    if part is not None:
        return part(rule, rows, batch_size, generator)
    if isinstance(simulator, FiniteSimulator) and batch_size is None:
        return simulator.subset(rows)(rule, None, generator)
    return simulator(rule, batch_size, generator).select(rows)


@runtime_checkable
class FiniteSimulator(Protocol):
    """A simulator over a data set: `tune` shuffles it by epochs, `evaluate` runs through all of it."""

    def __call__(
        self, rule: Any, batch_size: int | None = None, generator: torch.Generator | None = None
    ) -> Trajectory:
        """Simulate all samples in order, or `batch_size` random ones without replacement."""
        ...

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def subset(self, indices: Tensor) -> "FiniteSimulator":
        """The simulator over these samples only, in this order."""
        ...


def rows_of(what: str, samples: Any, length: int) -> Tensor:
    """A mask `(length,)`, or numbers of samples in their range; anything else is an error that says `what`."""
    try:
        rows = samples if isinstance(samples, Tensor) else torch.as_tensor(samples)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MissingParameterError(f"{what} must be a mask or indices, got {shown(samples)}") from error
    if rows.dtype is torch.bool:
        fits = rows.shape == (length,)
    else:
        plain = not rows.is_floating_point() and not rows.is_complex() and rows.ndim <= 1
        fits = plain and bool(((rows >= -length) & (rows < length)).all())
    if not fits:
        raise ShapeError(f"{what} must be a mask ({length},) or indices below {length}, got {shown(samples)}")
    return rows


def _parts(value: Any, where: str = "a decision") -> list[Tensor]:
    """All tensors of a field: a tensor, a tuple or dict of tensors, or None."""
    if isinstance(value, Tensor):
        return [value]
    if value is None:
        return []
    if not isinstance(value, dict | tuple | list):
        raise MissingParameterError(f"{where} must be a tensor, or a tuple or dict of tensors; got {shown(value)}")
    return [part for item in (value.values() if isinstance(value, dict) else value) for part in _parts(item, where)]


def _first(value: Any) -> Tensor:
    parts = _parts(value)
    if not parts:
        raise MissingParameterError(f"a decision is a tensor or a tuple of tensors, batch first; got {shown(value)}")
    return parts[0]


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    if isinstance(value, tuple | list):
        parts = [_map(item, function) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)  # pyright: ignore[reportArgumentType]
    return value


def not_finite(value: Any, batch: int) -> Tensor:
    """`(B,)` True for the samples of a decision (tensor or tuple) with an entry that is NaN or infinite."""
    rows = [~torch.isfinite(part.detach()).reshape(batch, -1).all(-1) for part in _parts(value) if batch]
    return torch.stack(rows).any(0) if rows else torch.zeros(batch, dtype=torch.bool)
