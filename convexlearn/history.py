"""The record of a tuning run."""

import json
import math
from typing import Any

from convexlearn.checks import AXES, require_that, shown
from convexlearn.errors import OptionError
from convexlearn.extras import require


class History(list[dict[str, Any]]):
    """One dict per step: "step", "loss", "gradient_norm", "failures", and "validation" where it was computed.

    The loss at index i belongs to the weights before update i + 1, the validation value to those after
    it. `best`: {"step", "value", "measure"} of the weights that were kept, "step" being the number of
    updates behind them (None when the last ones were kept); `start`: the validation value before the
    first update, if any; `stopped`: why the run ended before its last step, or ""; `seconds`: what the call of
    `tune` took. The representation is a summary; `list(history)` shows every step.

    >>> history = History([{"step": 0, "loss": 2.0}, {"step": 1, "loss": 1.0}])
    >>> history[-1]["loss"], history.column("loss")
    (1.0, [2.0, 1.0])
    >>> history
    History(2 steps, loss 2 first, 1 last)
    """

    best: dict[str, Any] | None = None
    start: float | None = None
    stopped: str = ""
    seconds: float = math.nan

    def __repr__(self) -> str:
        parts = [f"{len(self)} steps" + (f" in {self.seconds:.3g} s" if math.isfinite(self.seconds) else "")]
        losses = self.column("loss")
        if losses:
            parts.append(f"loss {losses[0]:.4g} first, {losses[-1]:.4g} last")
        if self.start is not None:
            parts.append(f"validation {self.start:.4g} at the start")
        if self.best is not None:
            parts.append(f"best {self.best['measure']} {self.best['value']:.4g} after {self.best['step']} steps")
        if self.stopped:
            parts.append(f"stopped: {self.stopped}")
        return f"History({', '.join(parts)})"

    def column(self, name: str) -> list[Any]:
        """The values of one column, steps without it left out."""
        if not isinstance(name, str):
            raise OptionError(f"History.column: name must be a text, got {shown(name)}")
        return [record[name] for record in self if name in record]

    def to_json(self) -> str:
        """Everything as a JSON text: {"records", "best", "start", "stopped"}."""
        return json.dumps(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Everything as a dict: {"records", "best", "start", "stopped"}."""
        return {"records": list(self), "best": self.best, "start": self.start, "stopped": self.stopped}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "History":
        """The inverse of `to_dict`."""
        keys = ("records", "best", "start", "stopped")
        if not isinstance(content, dict) or any(key not in content for key in keys):
            raise OptionError(f"History.from_dict: content must be a dict of {', '.join(keys)}, got {shown(content)}")
        records = content["records"]
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise OptionError(f"History.from_dict: records of content must be a list of dicts, got {shown(records)}")
        history = cls(records)
        history.best, history.start, history.stopped = content["best"], content["start"], content["stopped"]
        return history

    def plot(self, ax: Any = None) -> Any:
        """Draw loss and validation value over the steps into `ax`, or a new figure's; returns the Axes."""
        if ax is None:
            ax = require("matplotlib.figure", "plot", "a plot").Figure(layout="constrained").subplots()
        require_that("History.plot", "ax", AXES, ax)
        ax.plot(self.column("step"), self.column("loss"), label="loss")
        validated = [record for record in self if "validation" in record]
        if validated:
            steps = [record["step"] + 1 for record in validated]
            values = [record["validation"] for record in validated]
            if self.start is not None:
                steps, values = [0, *steps], [self.start, *values]
            ax.plot(steps, values, label="validation", marker=".")
        if self.best is not None:
            ax.axvline(self.best["step"], color="0.7", linestyle=":", label="best")
        ax.set_xlabel("step")
        ax.legend()
        return ax
