"""numba decorators: helpers, and cached entry points that release the GIL. Importing this imports numba."""

import contextlib
import hashlib
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core import event

log = logging.getLogger(__name__)
njit: Any = numba.njit  # its annotations know fewer options than it takes

SUMMING = {"reassoc", "contract", "nsz"}


def helper(function: Callable) -> Any:
    """Compile a function that only compiled functions call.

    A call that passes arrays counts references to them (about 50 ns), so helpers contain their loops.
    """
    return njit(error_model="numpy", no_cfunc_wrapper=True, no_cpython_wrapper=True)(function)


def summing(function: Callable) -> Any:
    """A helper whose sums may be reordered, so that they vectorize; the order is fixed at compile time."""
    return njit(error_model="numpy", no_cfunc_wrapper=True, no_cpython_wrapper=True, fastmath=SUMMING)(function)


def entry(function: Callable) -> Any:
    """Compile a function that Python calls, without the GIL; cached on disk where a directory is writable."""
    options: dict[str, Any] = {"error_model": "numpy", "nogil": True, "no_cfunc_wrapper": True}
    try:
        dispatcher = njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package directory nor the user's cache is writable
        return njit(**options)(function)
    # numba's cache looks at the entry point's own file; a change in a helper's file must count too
    with contextlib.suppress(AttributeError):
        dispatcher._cache._cache_file._source_stamp = _source_digest()
    return dispatcher


@cache
def _source_digest() -> str:
    package = Path(__file__).parent.parent
    sources = [Path(__file__), *sorted(package.rglob("*_kernels.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


LONG = {
    "condense_kernels.condense": ("the matrices of the active-set solver", 5),
    "shared_kernels.forward": ("the active-set solver", 25),
    "shared_kernels.backward": ("the derivative of the active-set solver", 10),
    "quadratic.kernels.solve_range": ("the interior point", 20),
    "quadratic.kernels.adjoint_range": ("the derivative of the interior point", 3),
    "second_order.kernels.solve_range": ("the solver for second-order cones", 15),
}
"""Entry points that take seconds to compile: what they are, and about how many seconds."""


class _Announcement(event.Listener):
    """Says what is compiled rather than read from the cache, and for about how long, where it takes seconds."""

    def on_start(self, event: Any) -> None:
        function = event.data["dispatcher"].py_func
        name = f"{function.__module__}.{function.__name__}"
        for entry_point, (part, seconds) in LONG.items():
            if name.startswith("convexlearn.") and name.endswith(f".{entry_point}"):
                log.warning("compiling %s: about %d s, once per machine and version", part, seconds)

    def on_end(self, event: Any) -> None:
        """Nothing to say."""


event.register("numba:compile", _Announcement())
