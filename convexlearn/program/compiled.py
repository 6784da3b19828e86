"""numba decorators: helpers, and cached entry points that release the GIL. Importing this imports numba."""

from collections.abc import Callable
from typing import Any

from numba import njit


def helper(function: Callable) -> Any:
    """Compile a function that only compiled functions call."""
    return njit(error_model="numpy", no_cfunc_wrapper=True, no_cpython_wrapper=True)(function)


def entry(function: Callable) -> Any:
    """Compile a function that Python calls, without the GIL; cached on disk where a directory is writable."""
    options: dict[str, Any] = {"error_model": "numpy", "nogil": True, "no_cfunc_wrapper": True}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package directory nor the user's cache is writable
        return njit(**options)(function)
