"""The catalogue: what a declared problem provides, and how its rules are tuned and judged."""

import importlib
import logging
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

import cvxpy as cp
from torch import Tensor, nn

from convexlearn.checks import FLAG, FUNCTION, SEED, count, require_that, shown
from convexlearn.errors import OptionError, suggest
from convexlearn.evaluate import Evaluation, evaluate
from convexlearn.objectives import Objective
from convexlearn.report import Estimate, Record, to_json
from convexlearn.rules.parameters import count_parameters
from convexlearn.simulate.base import FiniteSimulator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """How much tuning may cost: `steps` None stands for the numbers that the problem itself chooses."""

    steps: int | None = None
    seed: int = 0
    progress: bool = False

    def limit(self, steps: int) -> int:
        """The caller's number of steps, or else `steps`."""
        return steps if self.steps is None else self.steps


@dataclass(frozen=True)
class Contender:
    """A rule at its start values and how it is fitted, in place; `fit` returns a trace (History, Grid, ...) or None.

    `fit` is None for a rule that uses no data.
    """

    rule: nn.Module
    fit: Callable[[Any, Budget], Any] | None = None


@dataclass(frozen=True)
class Study:
    """A declared problem with its data drawn: the rules that compete, and the simulation that judges them.

    problem: the CVXPY problem, for display. contenders: by name, in the order of the table and of their
    fitting. test: the simulator, unseen by `fit` unless a contender is an oracle. measures: objectives by
    name. bounds: by measure, what no rule can beat on average, where that is known. samples: number of
    trajectories to judge on, where `test` has no length. medians: names of measures summed up by their
    median instead of their mean. simulators: by measure, another simulator than `test` to judge it in.
    """

    problem: cp.Problem
    contenders: Mapping[str, Contender]
    test: Any
    measures: Mapping[str, Objective]
    bounds: Mapping[str, float] = field(default_factory=dict)
    samples: int | None = None
    medians: Sequence[str] = ()
    simulators: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """The known answer: `text` says what holds after a full tuning, `misses` lists what does not."""

    text: str
    misses: Callable[["Result"], list[str]]


@dataclass(frozen=True)
class ProblemEntry:
    """One declared problem; a module in `problems/` that defines `ENTRY` is in the catalogue.

    source: Example or equation of the paper. shapes: of context, decision and parameters, with units.
    setting: frozen dataclass of the problem's own options at their defaults. build: (seed, setting) ->
    Study. figures: (result) -> {file name without suffix: Axes}. tables: (result) -> {title: text}, printed
    after the table of the rules.
    """

    name: str
    summary: str
    source: str
    shapes: str
    reference: Reference
    setting: Any
    build: Callable[[int, Any], Study]
    figures: Callable[["Result"], dict[str, Any]]
    tables: Callable[["Result"], dict[str, str]] = lambda result: {}

    def configure(self, **changes: Any) -> Any:
        """The setting with some options replaced; an unknown name is an OptionError.

        A text is converted to the type of the option's default, so that command lines can be passed on.
        """
        valid = {f.name: getattr(self.setting, f.name) for f in fields(self.setting)}
        for name in changes:
            if name not in valid:
                raise OptionError(f"{self.name} has no option '{name}'; {suggest(name, valid)}")
        values = {k: _parse(self.name, k, v, valid[k]) for k, v in changes.items()}
        return replace(self.setting, **values)

    def tune(
        self,
        seed: int = 0,
        steps: int | None = None,
        *,
        progress: bool = False,
        announce: Callable[[str], Any] = logger.info,
        **options: Any,
    ) -> "Result":
        """Fit every contender and judge it; `steps` replaces the gradient steps, `options` change the setting.

        `progress` shows a bar on terminals; `announce` gets one line before each fit.
        """
        for option, check, value in (
            ("seed", SEED, seed),
            ("progress", FLAG, progress),
            ("announce", FUNCTION, announce),
        ):
            require_that("tune", option, check, value)
        _check_steps(steps)
        study = self.build(seed, self.configure(**options))
        budget, traces = Budget(_check_steps(steps), seed, progress), {}
        for name, contender in study.contenders.items():
            if contender.fit is not None:
                announce(f"fitting: {name}")
                traces[name] = contender.fit(contender.rule, budget)
                if str(getattr(traces[name], "stopped", "")).startswith("interrupted"):
                    raise KeyboardInterrupt  # `tune` ends quietly, but the rules after this one are not wanted either
        announce("evaluating")
        return judge(self, study, seed, {n: t for n, t in traces.items() if t is not None})

    def evaluate(
        self, seed: int = 0, state: Mapping[str, Mapping[str, Tensor]] | None = None, **options: Any
    ) -> "Result":
        """Judge the contenders with the values in `state` (as from `Result.state`), or with their start values."""
        require_that("evaluate", "seed", SEED, seed)
        study = self.build(seed, self.configure(**options))
        if state is not None:
            load(study, state)
        return judge(self, study, seed, {})


@dataclass(frozen=True)
class Result:
    """Outcome of tuning or evaluating an entry: one Record per rule, and traces of the fits by rule."""

    entry: ProblemEntry
    study: Study
    seed: int
    records: tuple[Record, ...]
    traces: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rules(self) -> dict[str, nn.Module]:
        """The fitted rules by name."""
        return {name: contender.rule for name, contender in self.study.contenders.items()}

    def record(self, name: str) -> Record:
        """The row of one rule."""
        rows = {record.name: record for record in self.records}
        if name not in rows:
            raise OptionError(f"{self.entry.name} has no rule '{name}'; {suggest(name, rows)}")
        return rows[name]

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Learned tensors by rule, for torch.save; loadable with weights_only=True."""
        return {name: dict(rule.state_dict()) for name, rule in self.rules.items()}

    def json(self) -> dict[str, Any]:
        """{"problem": ..., "seed": ..., "rules": {name: {measure: {"mean", "standard_error"}}}}."""
        return {"problem": self.entry.name, "seed": self.seed, "rules": to_json(self.records)}


def judge(entry: ProblemEntry, study: Study, seed: int, traces: Mapping[str, Any]) -> Result:
    """Evaluate every contender of a study by all measures, those of one simulator on one and the same simulation."""
    records = []
    for name, contender in study.contenders.items():
        results = _measured(study, contender.rule, seed)
        estimates = {
            m: Estimate(e.median, e.median_error) if m in study.medians else Estimate(e.mean, e.standard_error)
            for m, e in results.items()
        }
        counts = {role.value: n for role, n in count_parameters(contender.rule).items()}
        records.append(Record(name, estimates, counts, next(iter(results.values())).seconds_per_decision))
    return Result(entry, study, seed, tuple(records), traces)


def _measured(study: Study, rule: nn.Module, seed: int) -> dict[str, Evaluation]:
    """Evaluations by measure, in the order of the measures."""
    results: dict[str, Evaluation] = {}
    own = {m: f for m, f in study.measures.items() if m not in study.simulators}
    for simulator, measures in [(study.test, own), *((s, {m: study.measures[m]}) for m, s in study.simulators.items())]:
        samples = None if isinstance(simulator, FiniteSimulator) else study.samples
        results |= evaluate(rule, simulator, measures, samples=samples, seed=seed) if measures else {}
    return {m: results[m] for m in study.measures}


def load(study: Study, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Put saved values into the rules of a study; missing, unknown or misshapen ones are an OptionError."""
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Mapping) for k, v in state.items()
    ):
        raise OptionError(f"state must hold a dict of tensors per rule, as from Result.state(); got {shown(state)}")
    for name in study.contenders:
        if name not in state:
            raise OptionError(f"the saved state lacks the rule '{name}'; it holds {', '.join(state)}")
    for name in state:
        if name not in study.contenders:
            raise OptionError(f"no rule '{name}' here; {suggest(name, study.contenders)}")
        try:
            study.contenders[name].rule.load_state_dict(dict(state[name]))
        except RuntimeError as error:
            raise OptionError(f"the saved state of '{name}' does not fit: {error}") from error


@cache
def entries() -> dict[str, ProblemEntry]:
    """All entries by name: modules of `convexlearn.problems` that define ENTRY, in alphabetical order."""
    package = importlib.import_module("convexlearn.problems")
    modules = [
        importlib.import_module(f"{package.__name__}.{info.name}") for info in pkgutil.iter_modules(package.__path__)
    ]
    found = [module.ENTRY for module in modules if hasattr(module, "ENTRY")]
    return {entry.name: entry for entry in sorted(found, key=lambda entry: entry.name)}


def find(name: str) -> ProblemEntry:
    """The entry of that name, written with dashes or underscores.

    >>> find("sparse_recovery").name
    'sparse-recovery'
    """
    known = entries()
    if not isinstance(name, str):
        raise OptionError(f"a problem's name is a text, got {shown(name)}; see entries()")
    key = name.replace("_", "-").lower()
    if key not in known:
        near = suggest(key, known)
        listed = "" if near.startswith("valid") else f" (valid: {', '.join(known)})"
        raise OptionError(f"no problem '{name}' in the catalogue; {near}{listed}")
    return known[key]


def _check_steps(steps: int | None) -> int | None:
    if steps is not None:
        require_that("tune", "steps", count(), steps)
    return steps


def _parse(entry: str, name: str, value: Any, default: Any) -> Any:
    """`value`, converted to the type of `default` when it is a text."""
    if not isinstance(value, str) or isinstance(default, str):
        return value
    if isinstance(default, bool):
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if value.lower() in words:
            return words[value.lower()]
    else:
        try:
            return type(default)(value)
        except ValueError:
            pass
    raise OptionError(f"{entry}: option {name}={value} is no {type(default).__name__}")
