"""Several processes that tune or judge one rule: who computes which samples, and what all of them must know.

All of it is the identity where torch.distributed is not initialised, or has one process.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from convexlearn.errors import WorkerError


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def first() -> bool:
    """True in the process that prints and writes files."""
    return size() == 1 or dist.get_rank() == 0


def share(count: int) -> Tensor:
    """Which of `count` samples this process computes: contiguous parts in the order of the processes."""
    everything = torch.arange(count)
    return everything if size() == 1 else everything.tensor_split(size())[dist.get_rank()]


def gather(compute: Callable[[], Any]) -> list[Any]:
    """What `compute` returns in each process, by rank; it must be small, since it is pickled.

    When it raises somewhere, every process ends: that one with its own error, the others with a WorkerError.
    """
    if size() == 1:
        return [compute()]
    own, error = None, None
    try:
        own = compute()
    except Exception as problem:
        error = problem
    told: list[Any] = [None] * size()
    text = None if error is None else f"{type(error).__name__}: {error}"
    try:
        dist.all_gather_object(told, (own, text))
    except RuntimeError as lost:
        raise WorkerError(f"a worker is gone: {lost}") from (error or lost)
    if error is not None:
        raise error
    for rank, (_, text) in enumerate(told):
        if text is not None:
            raise WorkerError(f"worker {rank} failed: {text}")
    return [value for value, _ in told]


def from_first(compute: Callable[[], Any]) -> Any:
    """What `compute` returns in the first process, where alone it is called."""
    return gather(lambda: compute() if first() else None)[0]


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its sum over the processes, in the order of the ranks, so that all have the same bits.

    A parameter without gradient anywhere keeps none.
    """
    parameters = list(parameters)
    if size() == 1 or not parameters:
        return
    parts = [torch.zeros(2 * p.numel(), dtype=torch.float64) for p in parameters]
    for part, p in zip(parts, parameters):
        if p.grad is not None:
            flat = _real(p.grad).reshape(-1)
            part[: len(flat)] = flat.cpu()
    present = torch.tensor([float(p.grad is not None) for p in parameters], dtype=torch.float64)
    own = torch.cat([present, *parts])
    everyone = [torch.empty_like(own) for _ in range(size())]
    try:
        dist.all_gather(everyone, own)
    except RuntimeError as lost:
        raise WorkerError(f"a worker is gone: {lost}") from lost
    total = everyone[0]
    for other in everyone[1:]:
        total = total + other
    rows = total[len(parameters) :].split([len(part) for part in parts])
    for p, row, count in zip(parameters, rows, total[: len(parameters)].tolist()):
        if count:
            like = torch.zeros_like(p) if p.grad is None else p.grad
            real = _real(like)
            real.copy_(row[: real.numel()].reshape(real.shape))
            p.grad = like


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
