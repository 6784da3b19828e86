"""Arguments of public constructors, functions and methods: sound ones, and what must be refused in their place."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

OMITTED = object()
"""In place of a sound value: the argument is left out, so that its default is taken."""


@dataclass(frozen=True, eq=False)
class Argument:
    """A sound value, and values each of which must be an error that names the argument.

    fresh: `value` is a function that makes the sound value, anew for every call. word: what the error calls the
    argument, by default its own name. optional: None is sound.
    """

    value: Any
    junk: tuple[Any, ...]
    fresh: bool = False
    word: str | None = None
    optional: bool = False

    def sound(self) -> Any:
        """The sound value."""
        return self.value() if self.fresh else self.value


@dataclass(frozen=True, eq=False)
class Calling:
    """A callable and its arguments by name. runs: sound arguments are tried, too, which takes little time."""

    call: Callable[..., Any]
    arguments: dict[str, Argument]
    runs: bool = True


def calling(call: Callable[..., Any], **arguments: Argument) -> Calling:
    """A Calling of keyword arguments."""
    return Calling(call, arguments)


NO_TENSORS = (None, "x", object(), {"x": 1}, [["a"], [1]], torch.sin)
NO_NUMBERS = (None, "x", object(), {"x": 1}, [1.0, 2.0], 1j, float("nan"), torch.ones(2), torch.sin)
NO_FUNCTIONS = (None, "x", 3, object(), {"x": 1}, torch.ones(2))


def _optional(junk: tuple[Any, ...], optional: bool) -> tuple[Any, ...]:
    return tuple(x for x in junk if x is not None) if optional else junk


def tensor(value: Tensor, *more: Any, optional: bool = False, finite: bool = True, word: str | None = None) -> Argument:
    """A real tensor whose shape is fixed by others: another dimension is refused, and NaN where it has to be finite."""
    return fixed(value, value.to(torch.complex128), *more, optional=optional, finite=finite, word=word)


def fixed(value: Tensor, *more: Any, optional: bool = False, finite: bool = False, word: str | None = None) -> Argument:
    """The same, real or complex."""
    junk = [*_optional(NO_TENSORS, optional), value[None, None], *more]
    if finite:
        first = torch.arange(value.numel()).reshape(value.shape) == 0
        junk += [torch.where(first, bad, value) for bad in (torch.nan, torch.inf)]
    return Argument(value, tuple(junk), word=word, optional=optional)


def count(value: int, least: int = 1, *, optional: bool = False, word: str | None = None) -> Argument:
    """An integer of at least `least`."""
    junk = (None, "x", "3", least - 1, -7, 1.5, True, object(), [3], float("nan"), torch.ones(2))
    return Argument(value, _optional(junk, optional), word=word, optional=optional)


def number(
    value: float,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    optional: bool = False,
    word: str | None = None,
) -> Argument:
    """A real number within bounds."""
    junk = [*_optional(NO_NUMBERS, optional), True]
    junk += [] if least is None else [least - 1, -torch.inf]
    junk += [] if above is None else [above, above - 1, -torch.inf]
    junk += [] if most is None else [most + 1, torch.inf]
    return Argument(value, tuple(junk), word=word, optional=optional)


def flag(value: bool) -> Argument:
    """True or False."""
    return Argument(value, (None, "no", "x", 3, object(), [], 0.0, torch.ones(2)))


def choice(value: str, *, optional: bool = False, word: str | None = None) -> Argument:
    """A word of a list."""
    junk = (None, "misspelt", "", 3, True, object(), [value], {"x": 1}, value.encode(), torch.ones(2))
    return Argument(value, _optional(junk, optional), word=word, optional=optional)


def seed(value: int = 0) -> Argument:
    """An integer from which all randomness derives."""
    return Argument(value, (None, "x", 1.5, True, object(), [3], torch.ones(2)))


def function(value: Any, *more: Any, optional: bool = False, word: str | None = None) -> Argument:
    """A function, left as it is."""
    return Argument(value, (*_optional(NO_FUNCTIONS, optional), *more), word=word, optional=optional)


def names(value: Any, *, optional: bool = False, word: str | None = None) -> Argument:
    """Names of a list that the owner knows."""
    return Argument(
        value, _optional((None, ["misspelt"], [3], [None], 3, object()), optional), word=word, optional=optional
    )


def thing(value: Any, *more: Any, optional: bool = False, word: str | None = None, fresh: bool = False) -> Argument:
    """An object of a class of its own."""
    junk = (None, "x", 3, object(), {"x": 1}, [1.0], torch.ones(2), nn.Linear, *more)
    return Argument(value, _optional(junk, optional), word=word, fresh=fresh, optional=optional)


def shape(value: tuple[int, ...], *more: Any, optional: bool = False) -> Argument:
    """A tuple of sizes."""
    return Argument(
        value, _optional((None, "x", 3.5, object(), (-1,), ("a",), (1.5,), *more), optional), optional=optional
    )


def path(value: Callable[[], Any], *, fresh: bool = True) -> Argument:
    """A file or folder."""
    return Argument(value, (None, 3, object(), ["x"], {"x": 1}, torch.ones(2), "a\0b"), fresh=fresh)
