"""Subjects and unsound arguments of the numeric half of the package, by name."""

from collections.abc import Callable
from typing import Any

from fuzz_algebra import algebra_functions, unsound_algebra
from fuzz_functions import Function, objective_functions, proximal_maps, unsound_objectives, unsound_proximal_arguments
from fuzz_iterations import iteration_functions, unsound_iterations
from fuzz_modules import module_functions, unsound_modules


def functions() -> dict[str, Callable[[], Function]]:
    """Makers of subjects by name."""
    return {
        **proximal_maps(),
        **objective_functions(),
        **module_functions(),
        **algebra_functions(),
        **iteration_functions(),
    }


def refused() -> dict[str, tuple[str, Callable[[], Any]]]:
    """Calls that must raise an error of ours whose message holds the word, by name."""
    cases = [
        *unsound_proximal_arguments(),
        *unsound_objectives(),
        *unsound_modules(),
        *unsound_algebra(),
        *unsound_iterations(),
    ]
    return {f"{k} {word}": (word, call) for k, (word, call) in enumerate(cases)}
