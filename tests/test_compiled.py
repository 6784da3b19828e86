"""Announcements of compilations: every long entry point, by name, and none that comes from the cache."""

import importlib
import logging
from types import SimpleNamespace

import pytest

from convexlearn.program import compiled

KERNELS = {
    "condense_kernels": "convexlearn.solvers.quadratic.condense_kernels",
    "shared_kernels": "convexlearn.solvers.quadratic.shared_kernels",
    "quadratic.kernels": "convexlearn.solvers.quadratic.kernels",
    "second_order.kernels": "convexlearn.solvers.second_order.kernels",
}


def announced(dispatcher, caplog):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="convexlearn"):
        compiled._Announcement().on_start(SimpleNamespace(data={"dispatcher": dispatcher}))
    return caplog.messages


@pytest.mark.parametrize("name", compiled.LONG)
def test_every_long_entry_point_is_announced_by_its_name(name, caplog):
    module, function = name.rsplit(".", 1)
    (message,) = announced(getattr(importlib.import_module(KERNELS[module]), function), caplog)
    assert f"compiling {compiled.LONG[name][0]}: about {compiled.LONG[name][1]} s" in message


def test_nothing_else_is(caplog):
    @compiled.njit
    def forward(x):
        return x + 1

    assert announced(forward, caplog) == []
    with caplog.at_level(logging.WARNING):
        assert forward(1) == 2  # compiles here, but is not ours
    assert caplog.messages == []
