"""Checks of arguments: what they take, what they refuse, and how they say it."""

import math

import numpy as np
import pytest
import torch

from convexlearn import checks
from convexlearn.checks import checked, count, number, optional, word
from convexlearn.errors import OptionError


class Owner:
    """A class with checked methods."""

    @checked(depth=count(), rate=optional(number(above=0)), kind=word(("dense", "sparse")), flag=checks.FLAG)
    def __init__(self, depth, *, rate=1.0, kind="dense", flag=False, start=None):
        self.depth, self.rate = depth, rate

    @checked(batch=count(0))
    def __call__(self, batch=None):
        return batch

    @classmethod
    @checked(seed=checks.SEED)
    def seeded(cls, seed):
        return cls(seed)


def test_the_message_names_owner_argument_remedy_and_value():
    with pytest.raises(OptionError, match=r"^Owner: depth must be an integer of at least 1, got 0$"):
        Owner(0)
    with pytest.raises(OptionError, match=r"^Owner: rate must be a number above 0 or None, got 'x'$"):
        Owner(1, rate="x")
    with pytest.raises(OptionError, match=r"one of 'dense', 'sparse', got 'dens'; did you mean 'dense'\?$"):
        Owner(1, kind="dens")
    with pytest.raises(OptionError, match=r"^Owner: batch must be an integer of at least 0 or None, got -1$"):
        Owner(1)(-1)
    with pytest.raises(OptionError, match=r"^Owner.seeded: seed must be an integer, got 1.5$"):
        Owner.seeded(1.5)


def test_errors_are_those_of_python_too():
    for kind in (TypeError, ValueError):
        with pytest.raises(kind):
            Owner("x")


def test_defaults_and_none():
    assert Owner(3).rate == 1.0
    assert Owner(3, rate=None).rate is None
    assert Owner(3)(None) is None
    with pytest.raises(TypeError, match="unexpected keyword argument 'dept'"):
        Owner(dept=3)


@pytest.mark.parametrize(
    ("check", "taken", "refused"),
    [
        (count(2), [2, 10**12], [1, True, 2.0, "2", None, np.int64(3), torch.tensor(3), math.nan]),
        (number(), [0, -1.5, np.float32(2), torch.tensor(3), np.array(1.0)], [math.nan, math.inf, True, 1j, "1", None]),
        (number(), [torch.tensor(1.0, requires_grad=True)], [torch.ones(1), torch.tensor(1j), torch.tensor(True)]),
        (number(least=0, below=1), [0, 0.5], [1, -1e-300, -math.inf]),
        (number(above=0, infinite=True), [1e-300, math.inf], [0.0, -math.inf, math.nan]),
        (checks.FLAG, [True, np.True_], [1, 0, "no", None, torch.tensor(True)]),
        (checks.SEED, [-1, 0, np.int32(3)], [True, 1.0, None, "0"]),
        (checks.FUNCTION, [torch.sin, torch.nn.ReLU()], [torch.nn.ReLU, torch.ones(1), None, "sin"]),
        (checks.SIZES, [(2, 3), [1], ()], [(0,), (1.0,), 3, "ab", (True,)]),
        (checks.PATH, ["a/b"], ["", ".", "a\0b", 3, None]),
        (checks.FOLDER, ["a/b", "."], ["", "a\0b", 3, None]),
        (checks.NAMES, [["a"], (), {"a"}], ["a", [1], None]),
        (word(("a", "b")), ["a"], ["c", 1, None, ["a"]]),
    ],
)
def test_what_checks_take_and_refuse(check, taken, refused):
    assert all(check.fits(value) for value in taken)
    assert not any(check.fits(value) for value in refused)


def test_long_values_are_shortened():
    assert checks.shown(torch.ones(2, 3)) == "a torch.float32 tensor (2, 3)"
    assert checks.shown(np.ones(2)) == "a float64 array (2,)"
    assert checks.shown(torch.tensor(1.5)) == "1.5"
    assert len(checks.shown(list(range(1000)))) == 80
