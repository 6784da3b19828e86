"""Exceptions and warnings; each message names the culprit and the remedy."""

import difflib
from collections.abc import Iterable, Sequence

import diffcp


class ConvexLearnError(Exception):
    """Base class of the errors that convexlearn raises on its own account."""


class CompileError(ConvexLearnError, ValueError):
    """A CVXPY problem cannot be compiled; the message names the subexpression and a rewrite."""


class ShapeError(ConvexLearnError, ValueError):
    """A tensor has the wrong shape; the message names the parameter, expected and got."""


class DomainError(ConvexLearnError, ValueError):
    """A value lies outside its parameter's domain; the message names parameter and batch element."""


class MissingParameterError(ConvexLearnError, AttributeError, TypeError):
    """A parameter was given as None, or as something that is no tensor, array or number."""


class OptionError(ConvexLearnError, TypeError, ValueError):
    """An unknown option or an option value out of range; the message suggests the nearest valid one."""


class SolverError(ConvexLearnError, diffcp.SolverError):
    """A solver did not solve some samples; the message lists them with their statuses."""


class FileError(ConvexLearnError, ValueError):
    """A saved file is damaged or foreign, or an object holds what a file without code cannot."""


class NonFiniteError(ConvexLearnError, FloatingPointError):
    """A loss or gradient became NaN or inf; the message names the parameter and the step."""


class WorkerError(ConvexLearnError, RuntimeError):
    """Another process of a distributed run failed; the message names it."""


class ConvexLearnWarning(UserWarning):
    """Base class of the warnings of convexlearn."""


class InaccurateWarning(ConvexLearnWarning):
    """Some samples were solved to reduced accuracy only (Status.INACCURATE)."""


class LimitWarning(ConvexLearnWarning):
    """An iteration or time limit that the caller set stopped the solver; the iterate is returned."""


class AdjointWarning(ConvexLearnWarning):
    """The linear solve of a backward pass missed its tolerance; the gradient may be inaccurate."""


class FailureWarning(ConvexLearnWarning):
    """Failed samples were left out of an average or of a gradient step."""


class ZeroGradientWarning(ConvexLearnWarning):
    """Parameters that are trained have a gradient of exactly zero when tuning starts; the message names them."""


def suggest(word: object, valid: Iterable[str]) -> str:
    """A half sentence that names the nearest valid word, or lists them all.

    >>> suggest("tolerence", ["tolerance", "max_iterations"])
    "did you mean 'tolerance'?"
    """
    valid = sorted(valid)
    near = difflib.get_close_matches(str(word), valid, n=1)
    return f"did you mean '{near[0]}'?" if near else f"valid: {', '.join(valid) or '(none)'}"


def listed(indices: Sequence[int]) -> str:
    """The first ten of them, for a message.

    >>> listed([3, 5])
    '3, 5'
    """
    return ", ".join(map(str, indices[:10])) + (", ..." if len(indices) > 10 else "")


def check_options(given: Iterable[str], valid: Iterable[str], where: str) -> None:
    """Raise OptionError for the first name in `given` that is not in `valid`."""
    valid = set(valid)
    for name in given:
        if name not in valid:
            raise OptionError(f"{where}: unknown option '{name}'; {suggest(name, valid)}")
