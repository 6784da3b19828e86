"""The thread pool: every block once, errors reach the caller, threads keep off the caller's CPU."""

import os
import threading

import pytest

from convexlearn import parallel


@pytest.mark.parametrize("batch", [0, 1, 31, 32, 33, 100])
@pytest.mark.parametrize("threads", [None, 1, 2, 3])
def test_every_sample_is_done_once(batch, threads):
    seen, lock = [], threading.Lock()

    def task(start, stop, number):
        with lock:
            seen.append((number, start, stop))

    parallel.run(task, batch, threads)
    expected = [(b, 32 * b, min(32 * b + 32, batch)) for b in range(max(1, parallel.count(batch)))]
    assert sorted(seen) == expected


def test_an_error_reaches_the_caller():
    def task(start, stop, number):
        if number == 3:
            raise ValueError("block 3")

    for _ in range(20):
        with pytest.raises(ValueError, match="block 3"):
            parallel.run(task, 200, 2)


def test_tasks_may_run_tasks():
    done = []
    parallel.run(lambda *_: parallel.run(lambda start, *_: done.append(start), 64, 2), 64, 2)
    assert sorted(done) == [0, 0, 32, 32]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_a_thread_is_moved_off_the_callers_cpu(monkeypatch):
    pool, moved = parallel._Pool(), []
    monkeypatch.setattr(parallel, "_cpu", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, cpus: moved.append((thread, cpus)))
    pool.places.update({11: 1, 12: 0})
    pool.spread()
    assert moved == [(11, {0, 2})]
    pool.spread()  # asked once; the thread reports its new place when it helps next
    assert len(moved) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1})
    pool.places[12] = 1
    pool.spread()
    assert len(moved) == 1
