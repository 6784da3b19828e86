"""Tuning: choose a rule's parameters by gradient steps through the simulation (Eq. 17 of the paper)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convexlearn.checkpoint import chosen
from convexlearn.checks import FLAG, FUNCTION, PATH, SEED, checked, count, number, optional, shown
from convexlearn.descent import Descent, NonFiniteWarning, Rate, Sampler, Validation
from convexlearn.errors import OptionError, suggest
from convexlearn.evaluate import SAMPLES
from convexlearn.history import History
from convexlearn.objectives import Objective, check_objective, objective_name
from convexlearn.rules.parameters import trainable
from convexlearn.simulate.base import FiniteSimulator, check_simulator

__all__ = ["History", "NonFiniteWarning", "tune"]

LEARNING_RATE = 1e-2

VALIDATION_INTERVAL = 25
"""At most this many steps pass between two validations."""

LearningRate = Rate | Mapping[str, Rate]


@checked(
    steps=count(0),
    batch_size=count(),
    patience=count(),
    clip=optional(number(above=0, infinite=True)),
    seed=SEED,
    regularizer=FUNCTION,
    callback=FUNCTION,
    progress=FLAG,
    checkpoint=PATH,
)
def tune(
    rule: nn.Module,
    simulator: Any,
    objective: Objective,
    *,
    steps: int,
    learning_rate: LearningRate = LEARNING_RATE,
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
    regularizer: Callable[[Any], Tensor] | None = None,
    batch_size: int | None = None,
    validation: Any = None,
    patience: int | None = None,
    clip: float | None = 1.0,
    seed: int = 0,
    progress: bool = True,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    checkpoint: str | Path | None = None,
) -> History:
    """Minimize the average objective over the simulator by `steps` gradient steps; trains `rule` in place.

    The rule is trained where `requires_grad` says so (see `DecisionRule.learn` and `freeze`). An objective
    with `maximize` is maximized: its loss is the negative.

    learning_rate: a number, a schedule step -> number, or {name: one of these} for parameters or
    submodules (others get 1e-2). optimizer: callable(param_groups) -> torch optimizer, Adam by default.
    regularizer: rule -> scalar, added to the loss. batch_size: samples per step; by default all of a data
    set, BATCH_SIZE trajectories of other simulators; data sets are shuffled anew in every epoch, a last
    incomplete batch is skipped.

    validation: a simulator, or a pair (simulator, objective), judged with always the same random numbers
    before the first step and so often that it costs about as much as tuning, at the latest every
    VALIDATION_INTERVAL steps. The best weights by validation are restored at the end; without validation
    those with the least loss when every step uses the whole data set, else the last ones. patience: stop
    after this many validations (losses) in a row without improvement. clip: bound on the gradient's norm.

    A loss or gradient that is NaN or infinite ends the run with the best (else the last good) weights, a
    NonFiniteWarning and `history.stopped`; at the very first step it raises NonFiniteError. Ctrl-C does
    the same without warning. Parameters without any influence when tuning starts are named in a ZeroGradientWarning.
    callback(record) is called after each step and may return True to stop.
    checkpoint: a file, written now and then, at the end, and when the run is interrupted; when it exists the
    run resumes from it, with the same result to the bit as without interruption; more `steps` continue a
    finished one.

    Where torch.distributed is initialised, all processes must call `tune` alike. Each simulates its share of every
    batch, gradients are averaged over all samples, and all processes end with the same weights: those of a single
    process but for rounding, which float32 training amplifies, unless the rule itself draws random numbers (dropout)
    or mixes samples (batch norm). Only the first process shows progress and writes files, callbacks are called in each;
    when a process fails, all end and the checkpoint remains.

    >>> from convexlearn.objectives import squared_error
    >>> from convexlearn.rules.affine import AffineRule
    >>> from convexlearn.simulate.pairs import Pairs
    >>> rule, x = AffineRule(torch.zeros(1, 1)), torch.ones(8, 1)
    >>> tune(rule, Pairs(x, 2 * x), squared_error, steps=200, learning_rate=0.1)[0]["loss"]
    4.0
    >>> round(rule.W.item(), 2)
    2.0
    """
    names = trainable(rule) if isinstance(rule, nn.Module) else {}
    if not names:
        raise OptionError("tune: the rule has no trainable parameter; choose some, as in rule.learn('rho')")
    check_simulator(simulator, "tune")
    check_objective(objective, "tune")
    if optimizer is not None and (not callable(optimizer) or isinstance(optimizer, torch.optim.Optimizer)):
        raise OptionError(f"tune: optimizer must be a class, such as torch.optim.SGD, got {optimizer!r}")
    groups, rates = _groups(rule, names, learning_rate)
    sampler = Sampler(simulator, batch_size, seed)
    optimization = (optimizer or torch.optim.Adam)(groups)
    if not isinstance(optimization, torch.optim.Optimizer):
        raise OptionError(f"tune: optimizer(groups) must make a torch optimizer, got {shown(optimization)}")
    descent = Descent(
        rule=rule,
        names=names,
        optimizer=optimization,
        rates=rates,
        sampler=sampler,
        objective=objective,
        regularizer=regularizer,
        validation=None if validation is None else _validation(validation, objective, sampler.size),
        patience=patience,
        clip=clip,
        seed=seed,
        callback=callback,
        path=chosen(checkpoint),
    )
    if patience is not None and descent.validation is None and not sampler.whole:
        raise OptionError("tune: patience needs a validation simulator, since the loss of a batch is random")
    if descent.path is not None:
        descent.configuration = _configuration(descent, learning_rate)
    return descent.run(steps, progress)


def _validation(validation: Any, objective: Objective, size: int) -> Validation:
    """`size`: samples per gradient step."""
    if isinstance(validation, tuple) and len(validation) != 2:
        raise OptionError(
            f"tune: validation must be a simulator or a pair (simulator, objective), got {shown(validation)}"
        )
    simulator, objective = validation if isinstance(validation, tuple) else (validation, objective)
    check_simulator(simulator, "tune, validation")
    check_objective(objective, "tune, validation")
    samples = len(simulator) if isinstance(simulator, FiniteSimulator) else SAMPLES
    return Validation(simulator, objective, min(max(1, round(samples / size)), VALIDATION_INTERVAL))


def _groups(
    rule: nn.Module, names: dict[str, nn.Parameter], learning_rate: LearningRate
) -> tuple[list[dict[str, Any]], list[Rate]]:
    """Parameter groups, one per learning rate, and their rates."""
    given = dict(learning_rate) if isinstance(learning_rate, Mapping) else {"": learning_rate}
    for name in given:
        if name and not any(_within(key, name) for key in names):
            known = {*names, *(key.rsplit(".", k)[0] for key in names for k in range(1, key.count(".") + 1))}
            raise OptionError(
                f"tune: learning_rate names '{name}', which is not trained; {suggest(name, known)} "
                "(rule.learn(name) makes a parameter trainable)"
            )
    members: dict[str, list[nn.Parameter]] = {}
    for key, parameter in names.items():
        matches = [name for name in given if name and _within(key, name)]
        members.setdefault(max(matches, key=len, default=""), []).append(parameter)
    rates = [given.get(name, LEARNING_RATE) for name in members]
    starts = []
    for name, rate in zip(members, rates):
        start = rate(0) if callable(rate) else rate
        if not number(least=0).fits(start):
            raise OptionError(f"tune: learning_rate{f' of {name!r}' if name else ''} must be >= 0, got {shown(start)}")
        starts.append(float(start))
    return [{"params": group, "lr": lr} for group, lr in zip(members.values(), starts)], rates


def _within(key: str, name: str) -> bool:
    return key == name or key.startswith(name + ".")


def _configuration(descent: Descent, learning_rate: LearningRate) -> dict[str, str]:
    """What a checkpoint must agree in to be resumed."""
    shapes = {name: tuple(parameter.shape) for name, parameter in descent.names.items()}
    rates = learning_rate.items() if isinstance(learning_rate, Mapping) else [("all", learning_rate)]
    defaults = {key: value for key, value in descent.optimizer.defaults.items() if key != "lr"}
    validation = descent.validation
    return {
        "rule": type(descent.rule).__name__,
        "parameters": str(shapes),
        "simulator": _describe(descent.sampler.simulator),
        "objective": objective_name(descent.objective),
        "learning_rate": str({name: _describe(rate) for name, rate in rates}),
        "optimizer": f"{type(descent.optimizer).__name__} {defaults}",
        "regularizer": _describe(descent.regularizer),
        "batch_size": str(descent.sampler.size),
        "validation": f"{_describe(validation.simulator)} {objective_name(validation.objective)}" if validation else "",
        "patience": str(descent.patience),
        "clip": str(descent.clip),
        "seed": str(descent.seed),
    }


def _describe(item: Any) -> str:
    """A text that is the same in another process."""
    if hasattr(item, "fingerprint"):
        return item.fingerprint()
    text = repr(item)
    return getattr(item, "__qualname__", type(item).__qualname__) if " at 0x" in text else text
