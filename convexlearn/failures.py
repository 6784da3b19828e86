"""How a failed sample of a batch travels from a layer to the simulator without disturbing the others."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Failures:
    """Collects which samples failed while a simulator runs a rule."""

    masks: list[Tensor] = field(default_factory=list)
    outer: "Failures | None" = None
    causes: list[list[str]] = field(default_factory=list)
    refused: list[Tensor] = field(default_factory=list)

    def add(self, failed: Tensor) -> None:
        """Record a mask `failed` of the batch's shape, here and in the collectors around this one."""
        if bool(failed.any()):
            self.masks.append(failed.detach())
        if self.outer is not None:
            self.outer.add(failed)

    def name(self, causes: list[str]) -> None:
        """Record why samples failed, one text per sample, empty where it did not; here and around this one."""
        self.causes.append(causes)
        if self.outer is not None:
            self.outer.name(causes)

    def refuse(self, failed: Tensor) -> None:
        """Record samples whose context is no number; their gradient may be none either."""
        self.add(failed)
        around: Failures | None = self
        while around is not None:
            around.refused.append(failed.detach())
            around = around.outer

    def cause(self, sample: int, batch: int) -> str:
        """The first cause recorded for a sample of the batch; empty where none can be told."""
        for causes in self.causes:
            if batch and len(causes) % batch == 0:
                width = len(causes) // batch
                named = [text for text in causes[sample * width : (sample + 1) * width] if text]
                if named:
                    return named[0]
        return ""

    def mask(self, batch: int, device: torch.device | str = "cpu", *, refused: bool = False) -> Tensor:
        """`(batch,)` True where a sample failed (was refused) at least once; all if they cannot be told apart."""
        failed = torch.zeros(batch, dtype=torch.bool, device=device)
        for mask in self.refused if refused else self.masks:
            flat = mask.to(device).reshape(batch, -1) if batch and mask.numel() % batch == 0 else mask.any()
            failed |= flat.any(-1).to(device)
        return failed


_active: ContextVar[Failures | None] = ContextVar("convexlearn_failures", default=None)


@contextmanager
def collect_failures(*, apart: bool = False) -> Iterator[Failures]:
    """Within it, a layer whose policy is "raise" returns finite rows with zero gradient and records them.

    Simulators run rules inside it, so that one infeasible sample costs neither the batch nor the run. `apart`
    keeps what happens within from the collectors around it.
    """
    failures = Failures(outer=None if apart else _active.get())
    token = _active.set(failures)
    try:
        yield failures
    finally:
        _active.reset(token)


def collector() -> Failures | None:
    """The innermost active collector; None when failures shall be raised as usual."""
    return _active.get()
