"""The catalogue of declared problems, one a file; `entries()` lists them, `find(name)` gives one."""

from convexlearn.problems.catalogue import (
    Budget,
    Contender,
    ProblemEntry,
    Reference,
    Result,
    Study,
    entries,
    find,
)

__all__ = ["Budget", "Contender", "ProblemEntry", "Reference", "Result", "Study", "entries", "find"]
