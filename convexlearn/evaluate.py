"""Evaluation: apply a rule in a simulation and average an objective; knows rules only by their contract."""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn

from convexlearn import distributed
from convexlearn.checks import SEED, count, require_that, shown
from convexlearn.errors import FailureWarning, OptionError, ShapeError, SolverError, listed
from convexlearn.failures import collect_failures
from convexlearn.objectives import Objective, blame, check_objective, judge
from convexlearn.randomness import isolated, make_generator
from convexlearn.rules.base import DecisionRule, as_rule, as_tuple
from convexlearn.simulate.base import FiniteSimulator, Trajectory, check_simulator, simulate

SAMPLES = 256
"""Number of trajectories that `evaluate` simulates by default, where the simulator has no length."""
FEW = 9
"""Number of contexts of the decision ahead of the clock; fewer may run in kernels for small batches."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Outcome of `evaluate`: `values` `(N,)` per sample, NaN for those in `failed`; and timing.

    >>> Evaluation(torch.tensor([1.0, 2.0, 3.0]), 0.0015)
    2 ± 0.577, 1.5 ms per decision (3 samples)
    """

    values: Tensor
    seconds_per_decision: float = math.nan
    failed: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.values, Tensor) or self.values.ndim != 1 or self.values.is_complex():
            raise ShapeError(f"Evaluation: values must be real numbers (N,), one per sample, got {shown(self.values)}")
        seconds, length = self.seconds_per_decision, len(self.values)
        if not isinstance(seconds, int | float) or seconds < 0:
            raise OptionError(f"Evaluation: seconds_per_decision must be a number, or NaN; got {shown(seconds)}")
        if not isinstance(self.failed, tuple) or not all(type(k) is int and 0 <= k < length for k in self.failed):
            raise OptionError(f"Evaluation: failed must be a tuple of samples below {length}, got {shown(self.failed)}")

    @property
    def mean(self) -> float:
        """Average over the samples that did not fail."""
        return self._valid().mean().item()

    @property
    def standard_error(self) -> float:
        """Standard deviation over the square root of the number of samples; NaN for a single sample."""
        valid = self._valid()
        return valid.std().item() / math.sqrt(len(valid)) if len(valid) > 1 else math.nan

    @property
    def median(self) -> float:
        """Median over the samples that did not fail, for costs whose mean a few samples dominate."""
        return self._valid().quantile(0.5).item() if len(self._valid()) else math.nan

    @property
    def median_error(self) -> float:
        """Standard error of the median, from the order statistics half a binomial deviation either side of it."""
        valid = self._valid().sort().values
        if len(valid) < 2:
            return math.nan
        half = math.sqrt(len(valid)) / 2
        low, high = (round(len(valid) / 2 + side * half - 0.5) for side in (-1, 1))
        return (valid[min(high, len(valid) - 1)] - valid[max(low, 0)]).item() / 2

    def __sub__(self, other: "Evaluation") -> "Evaluation":
        """The difference sample by sample, of two rules on common random numbers: its error is that of the pairs.

        Samples that failed in either are left out. Both must come from one simulator, `samples` and `seed`.

        >>> Evaluation(torch.tensor([1.0, 5.0])) - Evaluation(torch.tensor([0.0, 4.5]))
        0.75 ± 0.25, nan ms per decision (2 samples)
        """
        if not isinstance(other, Evaluation):
            raise OptionError(f"an Evaluation minus {shown(other)}: both must be evaluations")
        if len(self.values) != len(other.values):
            raise ShapeError(
                f"evaluations of {len(self.values)} and {len(other.values)} samples have no common random numbers; "
                "evaluate both rules with the same samples, batch_size and seed"
            )
        failed = tuple(sorted({*self.failed, *other.failed}))
        return Evaluation(self.values - other.values, failed=failed)

    @property
    def failures(self) -> int:
        """Number of failed samples, which `failed` names."""
        return len(self.failed)

    def _valid(self) -> Tensor:
        kept = torch.ones(len(self.values), dtype=torch.bool)
        kept[list(self.failed)] = False
        return self.values[kept].double()

    def __repr__(self) -> str:
        milliseconds = f"{1e3 * self.seconds_per_decision:.3g} ms per decision"
        failures = f", {self.failures} failed" if self.failed else ""
        mean = f"{self.mean:.4g} ± {self.standard_error:.3g}"
        return f"{mean}, {milliseconds} ({len(self.values)} samples{failures})"


@overload
def evaluate(
    rule: Any,
    simulator: Any,
    objective: Objective,
    *,
    samples: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> Evaluation: ...
@overload
def evaluate(
    rule: Any,
    simulator: Any,
    objective: Mapping[str, Objective],
    *,
    samples: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> dict[str, Evaluation]: ...
def evaluate(
    rule: Any,
    simulator: Any,
    objective: Any,
    *,
    samples: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> Any:
    """Judge `rule` in `simulator` by `objective` ("Evaluating a Decision Rule" in the paper).

    objective: Trajectory -> `(B,)`, or a dict of several, judged on the same simulation (gives a dict
    of Evaluations). `samples`: how many; by default all of a data set, SAMPLES trajectories otherwise;
    fewer than all are drawn by `seed`. `batch_size` bounds how many are simulated at a time. Time is
    spent in the rule only; one with a ConvexLayer makes its first decision, which may compile, for up to FEW
    contexts ahead of the clock. Failed samples are left out, counted and named in a FailureWarning; when
    over half of them fail, SolverError is raised. The rule is in eval mode meanwhile. Where torch.distributed is
    initialised, all processes must call it: each simulates its share of every batch, and all get the same result.

    >>> from convexlearn.objectives import squared_error
    >>> from convexlearn.simulate.pairs import Pairs
    >>> evaluate(nn.Identity(), Pairs(torch.zeros(4, 2), torch.ones(4, 2)), squared_error).mean
    2.0
    """
    for name, check, value in (
        ("samples", count(), samples),
        ("batch_size", count(), batch_size),
        ("seed", SEED, seed),
    ):
        if value is not None or name == "seed":
            require_that("evaluate", name, check, value)
    objectives = dict(objective) if isinstance(objective, Mapping) else {"": objective}
    check_simulator(simulator, "evaluate")
    for function in objectives.values():
        check_objective(function, "evaluate")
    timed = _TimedRule(as_rule(rule))
    values: dict[str, list[Tensor]] = {name: [] for name in objectives}
    failed: list[Tensor] = []
    named: list[int] = []
    reasons: list[str] = []
    odd: list[str] = []
    with torch.no_grad(), _eval_mode(timed), isolated(seed, "evaluate", devices=devices_of(timed)):
        for run in _simulations(timed, simulator, samples, batch_size, seed):
            for rows, lost, names, causes, culprits in distributed.gather(lambda run=run: _judged(*run(), objectives)):
                for name, row in rows.items():
                    values[name].append(row)
                failed.append(lost)
                named += names
                reasons += causes
                odd += culprits
    positions = torch.nonzero(torch.cat(failed)).flatten().tolist() if failed else []
    report_failures(named, sum(map(len, failed)), "evaluate", reasons, warn=distributed.first())
    if odd and distributed.first():
        warnings.warn(f"evaluate: {odd[0]}", FailureWarning, stacklevel=2)
    spent = distributed.gather(lambda: (timed.seconds, timed.decisions))
    decisions = sum(count for _, count in spent)
    seconds = sum(spell for spell, _ in spent) / decisions if decisions else math.nan
    results = {
        name: Evaluation(torch.cat(rows) if rows else torch.zeros(0), seconds, tuple(positions))
        for name, rows in values.items()
    }
    return results if isinstance(objective, Mapping) else results[""]


def _judged(trajectory: Trajectory | None, labels: Tensor, objectives: Mapping[str, Objective]) -> tuple[Any, ...]:
    """Values by objective, NaN for failed samples; which failed, their numbers, and why; what else is no number."""
    if trajectory is None:
        return {}, torch.zeros(0, dtype=torch.bool), [], [], []
    lost, rows, odd = trajectory.failed.cpu(), {}, []
    kept = trajectory.select(~trajectory.failed) if bool(lost.any()) else trajectory
    for name, function in objectives.items():
        row = judge(function, kept).cpu()
        odd.append(blame(function, kept, row, labels[~lost].tolist()))
        row = row if row.is_floating_point() else row.double()
        rows[name] = row.new_full((len(lost),), math.nan).masked_scatter(~lost, row)
    return rows, lost, labels[lost].tolist(), explanations(trajectory, labels), list(filter(None, odd))


def explanations(trajectory: Trajectory, labels: Tensor) -> list[str]:
    """A line per failed sample where the simulator can tell when and why it failed."""
    explain = getattr(trajectory, "explain", None)
    return explain(labels.tolist()).splitlines() if explain is not None and bool(trajectory.failed.any()) else []


def report_failures(
    named: list[int], total: int, where: str, reasons: Sequence[str] = (), *, warn: bool = True
) -> None:
    """Warn that some of `total` samples failed, naming them; raise SolverError when over half did."""
    if not named:
        return
    names = listed(named)
    message = f"{where}: {len(named)} of {total} samples failed: {names}"
    details = "".join(f"\n  {reason}" for reason in reasons[:3])
    if 2 * len(named) > total:
        raise SolverError(
            f"{message}; an average over fewer than half of the samples would mislead: check that the rule's "
            f"problem is feasible for these contexts (call the rule on one of them to see its status){details}"
        )
    if warn:
        warnings.warn(f"{message}; they are left out of the average{details}", FailureWarning, stacklevel=3)


def devices_of(module: nn.Module) -> tuple[torch.device, ...]:
    """The devices that a module's parameters and buffers are on."""
    tensors = [*module.parameters(), *module.buffers()]
    return tuple({tensor.device for tensor in tensors})


class _TimedRule(DecisionRule):
    """A rule that measures the time spent in it and counts its decisions."""

    def __init__(self, rule: DecisionRule) -> None:
        super().__init__()
        self.rule = rule
        self.seconds, self.decisions = 0.0, 0
        self.warm = not any(getattr(part, "compiles_when_called", False) for part in self.rule.modules())

    @property
    def recursive(self) -> bool:
        return self.rule.recursive

    def start(self, x: Any) -> Any:
        self._warm_up(self._first_decision, x)
        return self._time(0, self.rule.start, x)

    def decide(self, x: Any, memory: Any = None) -> tuple[Any, Any]:
        self._warm_up(self._first_decision, x)
        return self._time(len(as_tuple(x)[0]), self.rule.decide, x, memory)

    def forward(self, *x: Any) -> Any:
        steps = x[0].shape[1] if self.rule.recursive and x and x[0].ndim > 1 else 1
        self._warm_up(lambda few: self.rule(*(part[:, :2] if steps > 2 else part for part in as_tuple(few))), x)
        return self._time(len(x[0]) * steps if x else 0, self.rule, *x)

    def _first_decision(self, x: Any) -> None:
        self.rule.decide(x, self.rule.start(x))

    def _warm_up(self, decide: Callable[[Any], Any], x: Any) -> None:
        """Decide for a few of the contexts, once, and leave no trace of it: no random draw, failure or warning."""
        if self.warm:
            return
        self.warm = True
        with (
            isolated(0, "warm-up", devices=devices_of(self)),
            warnings.catch_warnings(action="ignore"),
            suppress(Exception),  # the decision that counts will raise it for all contexts
            collect_failures(apart=True),
        ):
            decide(tuple(part[:FEW] for part in x) if isinstance(x, tuple) else x[:FEW])

    def _time(self, decisions: int, function: Any, *arguments: Any) -> Any:
        cuda = any(isinstance(a, Tensor) and a.is_cuda for a in as_tuple(arguments[0])) if arguments else False
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        result = function(*arguments)
        if cuda:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - begin
        self.decisions += decisions
        return result


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    before = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in before.items():
            part.training = training


def _simulations(
    rule: Any, simulator: Any, samples: int | None, batch_size: int | None, seed: int
) -> Iterator[Callable[[], tuple[Trajectory | None, Tensor]]]:
    """Functions that simulate this process's share of a batch: its trajectory, if any, and the samples' numbers."""
    finite = isinstance(simulator, FiniteSimulator)
    order = torch.arange(len(simulator) if finite else samples or SAMPLES)
    if finite and samples is not None:
        if samples > len(order):
            raise OptionError(f"evaluate: samples={samples}, but {simulator!r} has {len(order)}")
        if samples < len(order):
            shuffled = torch.randperm(len(order), generator=make_generator(seed, "samples"))
            order = shuffled[:samples].sort().values
    for number, labels in enumerate(order.split(batch_size or max(1, len(order)))):
        part = simulator if not finite or len(labels) == len(simulator) else simulator.subset(labels)

        def run(part: Any = part, number: int = number, labels: Tensor = labels) -> tuple[Trajectory | None, Tensor]:
            rows, generator = distributed.share(len(labels)), make_generator(seed, "evaluate", number)
            if len(labels) and not len(rows):
                return None, rows
            return simulate(part, rule, rows, None if finite else len(labels), generator), labels[rows]

        yield run
