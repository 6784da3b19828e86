"""Blocks of a batch on a thread pool of our own: results don't depend on the number of threads."""

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

BLOCK = 32  # samples per task; fixed by the program alone, so that sums by block have one order
HEAVY, FEW = 8000, 4  # from so many matrix entries per sample a task takes only a few samples

Task = Callable[[int, int, int], object]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def block_of(entries: int) -> int:
    """Samples per task for samples with so many matrix entries of their own."""
    return BLOCK if entries < HEAVY else FEW


def count(batch: int, block: int = BLOCK) -> int:
    """Number of blocks of a batch."""
    return -(-batch // block)


def _cpu_reader() -> Callable[[], int]:
    """A function that tells on which CPU the calling thread runs; -1 where the system doesn't say."""
    try:
        return ctypes.PyDLL(None).sched_getcpu
    except (AttributeError, OSError, TypeError):
        return lambda: -1


_cpu = _cpu_reader()


class _Help:
    """One thread's share in a run; whoever takes it first owns it: the thread, or the caller who needs it no more."""

    def __init__(self, task: Task, ranges: Iterator[tuple[int, int, int]]) -> None:
        self.task, self.ranges = task, ranges
        self.taken, self.done = threading.Lock(), threading.Lock()
        self.done.acquire()
        self.error: BaseException | None = None

    def __call__(self) -> None:
        if self.taken.acquire(blocking=False):
            try:
                drain(self.task, self.ranges)
            except BaseException as error:
                self.error = error
            self.done.release()

    def wait(self) -> None:
        """Return once the thread is done, at once where it has not begun."""
        if not self.taken.acquire(blocking=False):
            self.done.acquire()
            if self.error is not None:
                raise self.error


class _Pool:
    """Threads that wait for help to be asked; lighter than futures, which cost as much as a small batch."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[_Help] = SimpleQueue()
        self.places: dict[int, int] = {}  # thread -> CPU on which it helped last
        self.size = 0
        self.lock = threading.Lock()

    def ask(self, help_: _Help, size: int) -> None:
        """Queue a share for `size` threads."""
        if self.size < size:
            with self.lock:
                while self.size < size:
                    threading.Thread(target=self._serve, name=f"convexlearn-{self.size}", daemon=True).start()
                    self.size += 1
        self.queue.put(help_)

    def spread(self) -> None:
        """Move threads off the caller's CPU: after a busy spell Linux may wake them there, though others are idle."""
        own = _cpu()
        if own >= 0 and own in self.places.values():
            others = os.sched_getaffinity(0) - {own}
            for thread, place in list(self.places.items()):
                if place == own and others:
                    self.places[thread] = -1
                    with contextlib.suppress(OSError):
                        os.sched_setaffinity(thread, others)

    def _serve(self) -> None:
        own = threading.get_native_id()
        while True:
            help_ = self.queue.get()
            self.places[own] = _cpu()
            help_()


_pool = _Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.__init__)  # a forked child has no threads of its parent


def drain(task: Task, ranges: Iterator[tuple[int, int, int]]) -> None:
    """Do the blocks that are left; next() of an iterator is atomic."""
    for arguments in ranges:
        task(*arguments)


def run(task: Task, batch: int, threads: int | None = None, block: int = BLOCK) -> None:
    """Call task(start, stop, number) for every block; on several threads if there are several blocks."""
    if batch <= block:
        task(0, batch, 0)
        return
    blocks = count(batch, block)
    ranges = iter([(b * block, min((b + 1) * block, batch), b) for b in range(blocks)])
    others = min(cores() if threads is None else threads, blocks) - 1
    helps = [_Help(task, ranges) for _ in range(others)]
    _pool.spread()
    for help_ in helps:
        _pool.ask(help_, others)
    try:
        drain(task, ranges)
    finally:
        for help_ in helps:
            help_.wait()
