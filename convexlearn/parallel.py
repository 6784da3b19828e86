"""Blocks of a batch on a thread pool of our own: results don't depend on the number of threads."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

BLOCK = 32  # samples per task; fixed, so that sums by block have one order

_pools: dict[int, ThreadPoolExecutor] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # a forked child has no threads of its parent


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count(batch: int) -> int:
    """Number of blocks of a batch."""
    return -(-batch // BLOCK)


def run(task: Callable[[int, int, int], object], batch: int, threads: int | None = None) -> None:
    """Call task(start, stop, block) for every block; on several threads if there are several blocks."""
    if batch <= BLOCK:
        task(0, batch, 0)
        return
    blocks = count(batch)
    ranges = [(b * BLOCK, min((b + 1) * BLOCK, batch), b) for b in range(blocks)]
    workers = min(cores() if threads is None else threads, blocks)
    if workers <= 1:
        for arguments in ranges:
            task(*arguments)
        return
    if workers not in _pools:
        _pools[workers] = ThreadPoolExecutor(workers - 1, thread_name_prefix="convexlearn")
    share = iter(ranges)

    def drain() -> None:
        while (arguments := next(share, None)) is not None:
            task(*arguments)

    others = [_pools[workers].submit(drain) for _ in range(workers - 1)]
    drain()
    for future in others:
        if not future.cancel():  # a thread that has not begun by now is not waited for
            future.result()
