"""What a constructor or function asks of its arguments, declared beside it; a refusal names owner, argument and value.

A check is what a value must be, in words, and a predicate. Only arguments that are given are checked, and None is
accepted where it is the default.
"""

import functools
import inspect
import math
from collections.abc import Callable, Collection
from os import PathLike
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from convexlearn.errors import OptionError, suggest

F = TypeVar("F", bound=Callable[..., Any])


class Check(NamedTuple):
    """What a value must be, in words, and whether one is that; `near`: a hint for a value that is not."""

    text: str
    fits: Callable[[Any], bool]
    near: Callable[[Any], str] = lambda value: ""


def checked(**checks: Check) -> Callable[[F], F]:
    """Decorate a function so that an argument that does not fit its check is an OptionError.

    >>> @checked(steps=count())
    ... def run(steps, rate=None):
    ...     return steps
    >>> run(0)
    Traceback (most recent call last):
    convexlearn.errors.OptionError: run: steps must be an integer of at least 1, got 0
    """

    def decorate(function: F) -> F:
        parameters = inspect.signature(function).parameters
        owner = function.__qualname__.removesuffix(".__init__").removesuffix(".__call__").rpartition("<locals>.")[2]
        order = [checks.get(name) for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        named, free = list(parameters), {name for name in checks if parameters[name].default is None}

        def refuse(name: str, check: Check, value: Any) -> None:
            if value is None and name in free:
                return
            none = " or None" if name in free else ""
            raise OptionError(f"{owner}: {name} must be {check.text}{none}, got {shown(value)}{check.near(value)}")

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            for k, (check, value) in enumerate(zip(order, args)):
                if check is not None and not check.fits(value):
                    refuse(named[k], check, value)
            for name, value in kwargs.items():
                if name in checks and not checks[name].fits(value):
                    refuse(name, checks[name], value)
            return function(*args, **kwargs)

        return wrapped  # type: ignore[return-value]

    return decorate


def require_that(owner: str, name: str, check: Check, value: Any) -> None:
    """OptionError unless `value` fits the check: for a dataclass's fields and where a decorator cannot stand.

    >>> require_that("Portfolio", "interest", number(), "x")
    Traceback (most recent call last):
    convexlearn.errors.OptionError: Portfolio: interest must be a number, got 'x'
    """
    if not check.fits(value):
        raise OptionError(f"{owner}: {name} must be {check.text}, got {shown(value)}{check.near(value)}")


def count(least: int = 1) -> Check:
    """An integer of at least `least`; True and False are none."""
    return Check(f"an integer of at least {least}", lambda v: type(v) is int and v >= least)


def number(
    *, least: float = -math.inf, above: float = -math.inf, below: float = math.inf, infinite: bool = False
) -> Check:
    """A real number, or a tensor of shape (): at least `least`, above `above`, below `below`; inf if `infinite`."""
    bounds = [("at least", least), ("above", above)]
    words = [f"{word} {bound:g}" for word, bound in bounds if bound > -math.inf]
    words += [f"below {below:g}"] if below < math.inf else []

    def fits(value: Any) -> bool:
        if type(value) is not float:
            if isinstance(value, Tensor | np.ndarray):
                if value.ndim or not _is_real(value):
                    return False
            elif isinstance(value, bool | np.complexfloating) or not isinstance(value, int | float | np.number):
                return False
        real = float(value.detach() if isinstance(value, Tensor) else value)
        inside = (least <= real and above < real < below) or (infinite and real == math.inf)
        return inside and (infinite or math.isfinite(real))

    return Check(" ".join(["a number", " and ".join(words)]).strip().replace("r at", "r of at"), fits)


def optional(check: Check) -> Check:
    """The same, or None, for an argument whose default is something else."""
    return Check(f"{check.text} or None", lambda v: v is None or check.fits(v), check.near)


def _is_real(value: Any) -> bool:
    """True for tensors and arrays of integers or real floating-point numbers."""
    if isinstance(value, Tensor):
        return not value.is_complex() and value.dtype is not torch.bool
    return value.dtype.kind in "iuf"


FLAG = Check("True or False", lambda v: isinstance(v, bool | np.bool_))

SEED = Check("an integer", lambda v: isinstance(v, int | np.integer) and not isinstance(v, bool))

FUNCTION = Check("a function or module", lambda v: callable(v) and not isinstance(v, type | Tensor))

SIZES = Check(
    "a tuple of positive integers",
    lambda v: isinstance(v, list | tuple) and all(type(k) is int and k > 0 for k in v),
)

FOLDER = Check("a path", lambda v: isinstance(v, str | PathLike) and str(v) != "" and "\0" not in str(v))

PATH = Check("a path", lambda v: isinstance(v, str | PathLike) and str(v) not in ("", ".") and "\0" not in str(v))

NAMES = Check(
    "a list of names", lambda v: isinstance(v, list | tuple | set | frozenset) and all(isinstance(n, str) for n in v)
)

GENERATOR = Check("a torch.Generator", lambda v: isinstance(v, torch.Generator))


AXES = Check("the Axes of a matplotlib figure", lambda v: callable(getattr(v, "errorbar", None)))


def word(valid: Collection[str]) -> Check:
    """One of these words."""
    listed = ", ".join(repr(name) for name in sorted(valid))

    def near(value: Any) -> str:
        hint = suggest(value, valid) if isinstance(value, str) else ""
        return f"; {hint}" if hint.startswith("did") else ""

    return Check(f"one of {listed}", lambda v: isinstance(v, str) and v in valid, near)


def instance(kind: type | tuple[type, ...], text: str) -> Check:
    """An object of these classes."""
    return Check(text, lambda v: isinstance(v, kind))


def shown(value: Any) -> str:
    """A value in a message: short, and a tensor or array by its shape where it has several entries.

    >>> shown(torch.ones(2, 3)), shown("x")
    ('a torch.float32 tensor (2, 3)', "'x'")
    """
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor {tuple(value.shape)}" if value.ndim else f"{value.item()!r}"
    if isinstance(value, np.ndarray):
        return f"a {value.dtype} array {value.shape}" if value.ndim else f"{value.item()!r}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
