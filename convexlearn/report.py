"""Tables and plots of records and histories; functions return text or Axes, nothing is printed or shown."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convexlearn.checks import AXES, NAMES, PATH, Check, checked, count, instance, number, require_that, shown, word
from convexlearn.errors import OptionError, suggest
from convexlearn.extras import require

STYLES = ("plain", "markdown")

TEXTS = Check(
    "a list of texts",
    lambda v: isinstance(v, Sequence) and not isinstance(v, str) and all(isinstance(t, str) for t in v),
)
ROWS = Check("a list of lists of texts", lambda v: isinstance(v, Sequence) and all(map(TEXTS.fits, v)))

SIZE = Check(
    "two positive numbers, in inches",
    lambda v: isinstance(v, tuple | list) and len(v) == 2 and all(number(above=0).fits(n) for n in v),
)
HISTORY = Check("a list of dicts, one per step", lambda v: isinstance(v, Iterable) and not isinstance(v, str | Mapping))
FILE = Check("a path or an open file", lambda v: PATH.fits(v) or callable(getattr(v, "write", None)))

TINY = 1e-6  # smaller numbers are written with an exponent


REAL = Check("a number, or NaN", lambda v: isinstance(v, int | float | np.floating) and not isinstance(v, bool))
SECONDS = Check("seconds, or NaN", lambda v: REAL.fits(v) and not v < 0)


@dataclass(frozen=True)
class Estimate:
    """A mean over samples and its standard error, in the measure's unit."""

    mean: float
    standard_error: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mean", "standard_error"):
            require_that("Estimate", name, REAL, getattr(self, name))

    @checked(digits=count())
    def text(self, digits: int = 3) -> str:
        """The mean with as many decimals as make `digits` digits of the larger of mean and error.

        >>> Estimate(27.9183, 1.502).text(4), Estimate(0.00213, 0.0004).text(3), Estimate(2.4e-33, 3e-34).text(2)
        ('27.92 ± 1.50', '0.00213 ± 0.00040', '2.4e-33 ± 3.0e-34')
        """
        if 0 < max(abs(self.mean), abs(self.standard_error)) < TINY:
            return f"{self.mean:.{digits - 1}e} ± {self.standard_error:.{digits - 1}e}"
        decimals = _decimals(max(abs(self.mean), abs(self.standard_error)), digits)
        return f"{self.mean:.{decimals}f} ± {self.standard_error:.{decimals}f}"


ESTIMATES = Check(
    "a dict of Estimates by the measures' names",
    lambda v: isinstance(v, Mapping) and all(isinstance(k, str) and isinstance(e, Estimate) for k, e in v.items()),
)
COUNTS = Check(
    "a dict of numbers of entries by role", lambda v: isinstance(v, Mapping) and all(map(REAL.fits, v.values()))
)


@dataclass(frozen=True)
class Record:
    """One row of a comparison: a rule, its estimates by measure, its parameters by role, its speed.

    `parameters` counts trained entries by role ("objective", "hyper", "network").
    """

    name: str
    measures: Mapping[str, Estimate]
    parameters: Mapping[str, int] = field(default_factory=dict)
    seconds_per_decision: float | None = None

    def __post_init__(self) -> None:
        require_that("Record", "name", instance(str, "a text"), self.name)
        require_that("Record", "measures", ESTIMATES, self.measures)
        require_that("Record", "parameters", COUNTS, self.parameters)
        if self.seconds_per_decision is not None:
            require_that("Record", "seconds_per_decision", SECONDS, self.seconds_per_decision)

    def measure(self, name: str) -> Estimate:
        """The estimate of one measure; an unknown one is an OptionError."""
        if not isinstance(name, str) or name not in self.measures:
            raise OptionError(f"record '{self.name}' has no measure {name!r}; {suggest(name, self.measures)}")
        return self.measures[name]


RECORDS = Check(
    "a list of Records", lambda v: isinstance(v, Sequence) and all(isinstance(record, Record) for record in v)
)


@checked(records=RECORDS, style=word(STYLES), digits=count())
def table(records: Sequence[Record], style: str = "plain", digits: int = 4) -> str:
    """A table with one row per record: measures, parameters by role, milliseconds per decision.

    >>> print(table([Record("hand-set", {"mse": Estimate(0.5, 0.01)}, {"objective": 1}, 2e-3)]))
    rule      mse              objective  ms per decision
    --------  ---------------  ---------  ---------------
    hand-set  0.5000 ± 0.0100          1             2.00
    """
    measures = _union(record.measures for record in records)
    roles = [r for r in _union(record.parameters for record in records) if any(_count(x, r) for x in records)]
    header = ["rule", *measures, *roles, "ms per decision"]
    rows = [
        [
            record.name,
            *(record.measures[m].text(digits) if m in record.measures else "" for m in measures),
            *(str(_count(record, role)) for role in roles),
            _milliseconds(record.seconds_per_decision),
        ]
        for record in records
    ]
    left = 1 + len(measures)
    return format_table(header, rows, left, style)


@checked(header=TEXTS, rows=ROWS, left=count(0), style=word(STYLES))
def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, style: str = "plain") -> str:
    """Aligned text, or a markdown table; the first `left` columns are flush left, the others right.

    >>> print(format_table(["a", "b"], [["x", "1"]], style="markdown"))
    | a | b |
    |:--|--:|
    | x | 1 |
    """
    for k, row in enumerate(rows):
        if len(row) != len(header):
            raise OptionError(f"format_table: rows must have {len(header)} cells as header, row {k} has {len(row)}")
    widths = [max(map(len, column)) for column in zip(header, *rows)]

    def line(cells: Sequence[str]) -> list[str]:
        return [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))]

    if style == "markdown":
        rule = [":" + "-" * (w + 1) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths)]
        body = ["| " + " | ".join(line(cells)) + " |" for cells in rows]
        return "\n".join(["| " + " | ".join(line(header)) + " |", "|" + "|".join(rule) + "|", *body])
    rule = ["-" * w for w in widths]
    return "\n".join("  ".join(line(cells)).rstrip() for cells in [header, rule, *rows])


@checked(records=RECORDS)
def to_json(records: Sequence[Record]) -> dict[str, dict[str, dict[str, float]]]:
    """{rule: {measure: {"mean": ..., "standard_error": ...}}}, ready for json.dump."""
    return {
        record.name: {
            name: {"mean": float(e.mean), "standard_error": float(e.standard_error)}
            for name, e in record.measures.items()
        }
        for record in records
    }


@checked(records=RECORDS, ax=AXES)
def plot_records(records: Sequence[Record], measure: str, ax: Any = None) -> Any:
    """Means with error bars of one standard error, one row per record; returns the Axes."""
    ax = new_axes() if ax is None else ax
    estimates = [record.measure(measure) for record in records]
    ax.errorbar(
        [e.mean for e in estimates],
        range(len(records)),
        xerr=[e.standard_error for e in estimates],
        fmt="o",
        capsize=3,
    )
    ax.set_yticks(range(len(records)), [record.name for record in records])
    ax.invert_yaxis()
    ax.set_xlabel(measure)
    ax.grid(axis="x", alpha=0.3)
    return ax


@checked(history=HISTORY, keys=NAMES, ax=AXES, label=instance(str, "a text"))
def plot_history(
    history: Iterable[Mapping[str, Any]], keys: Sequence[str] = (), ax: Any = None, label: str = ""
) -> Any:
    """Numbers of a tuning history against its steps, one line per key; returns the Axes.

    `history` holds one mapping per step, with the number of the step under "step"; `keys` defaults to
    all others that hold real numbers. Steps without a key (such as a validation skipped) are left out.
    """
    ax = new_axes() if ax is None else ax
    steps = list(history)
    for step in steps:
        if not isinstance(step, Mapping):
            raise OptionError(f"plot_history: history must hold a dict per step, got {shown(step)}")
    numeric = _union({k: 0 for k, v in step.items() if _is_number(v)} for step in steps)
    for key in keys:
        if steps and key not in numeric:
            raise OptionError(f"history has no number '{key}'; {suggest(key, numeric)}")
    for key in keys or [k for k in numeric if k != "step"]:
        points = [(step.get("step", i), step[key]) for i, step in enumerate(steps) if _is_number(step.get(key))]
        ax.plot(*zip(*points), label=f"{label}: {key}" if label else key) if points else None
    ax.set_xlabel("step")
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


@checked(rows=count(), columns=count(), size=SIZE)
def new_axes(rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.0, 4.0)) -> Any:
    """Axes on a new figure of `size` inches: one, or an array `(rows, columns)` of them.

    The figure belongs to no window and to no global list, so that nothing has to be closed.
    """
    figure = require("matplotlib.figure", "plot", "a plot").Figure(figsize=size, layout="constrained")
    return figure.subplots(rows, columns, squeeze=rows == columns == 1)


@checked(file=FILE, dpi=number(above=0))
def save(ax: Any, file: Any, dpi: int = 150) -> None:
    """Write the figure that `ax` belongs to; the suffix of `file` chooses the format."""
    require_that("save", "ax", AXES, ax)
    ax.figure.savefig(file, dpi=dpi)


def _decimals(size: float, digits: int) -> int:
    """Decimals that show `digits` significant digits of a number of this size."""
    if not 0 < size < float("inf"):
        return digits - 1
    exponent = int(f"{size:e}".split("e")[1])
    return max(0, digits - 1 - exponent)


def _union(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _count(record: Record, role: str) -> int:
    return record.parameters.get(role, 0)


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    most = 3 if seconds >= 1e-6 else 5
    return f"{1e3 * seconds:.{min(most, _decimals(1e3 * seconds, 3))}f}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
