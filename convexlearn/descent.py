"""The gradient loop behind `tune`: steps, best weights, failures, checkpoints."""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from convexlearn import checkpoint as checkpoints
from convexlearn import distributed
from convexlearn.checks import number, require_that, shown
from convexlearn.errors import FailureWarning, NonFiniteError, OptionError, SolverError, ZeroGradientWarning
from convexlearn.evaluate import devices_of, evaluate, explanations, report_failures
from convexlearn.failures import collect_failures
from convexlearn.history import History
from convexlearn.objectives import Objective, blame, judge, maximizes
from convexlearn.optimizers import ProximalGradient
from convexlearn.randomness import isolated, make_generator
from convexlearn.rules.parameters import Role, role_of
from convexlearn.simulate.base import FiniteSimulator, Trajectory, simulate

BATCH_SIZE = 64
"""Number of trajectories per step by default, where the simulator has no length."""

Rate = float | Callable[[int], float]


class NonFiniteWarning(FailureWarning):
    """Tuning stopped at a loss or gradient that is NaN or infinite; earlier weights are restored."""


class _NotFinite(FloatingPointError):
    """A loss, gradient or parameter is NaN or infinite; an optimizer that tries points may catch it."""


@dataclass(frozen=True)
class Validation:
    simulator: Any
    objective: Objective
    interval: int


@dataclass(eq=False)
class Descent:
    """State of a run; everything random in step k derives from (seed, k)."""

    rule: nn.Module
    names: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    rates: list[Rate]
    sampler: "Sampler"
    objective: Objective
    regularizer: Callable[[Any], Tensor] | None
    validation: Validation | None
    patience: int | None
    clip: float | None
    seed: int
    callback: Callable[[dict[str, Any]], Any] | None
    path: Path | None
    configuration: dict[str, str] = field(default_factory=dict)
    history: History = field(default_factory=History)
    step: int = 0
    stale: int = 0
    warned: bool = False
    culprit: str = ""  # what made the last loss no number, where it is known
    idle: set[str] = field(default_factory=set)  # parameters without a gradient in the first step
    best: dict[str, Tensor] | None = None
    good: dict[str, Tensor] | None = None  # weights with finite loss and gradient
    current: dict[str, Tensor] | None = None  # weights after the last complete step
    next_save: float = 0.0
    settled: bool = False  # nothing of the state is half updated

    def run(self, steps: int, progress: bool) -> History:
        modes = {part: part.training for part in self.rule.modules()}
        self.current, begin = self.snapshot(), time.perf_counter()
        fallback = None
        try:
            self.begin()
            quiet = None if progress and distributed.first() else True
            with tqdm(total=steps, initial=self.step, disable=quiet) as bar:
                while self.step < steps and not self.history.stopped:
                    record = self.advance()
                    bar.set_postfix(loss=f"{record['loss']:.4g}", refresh=False)
                    bar.update()
            self.save()
            self.settled = False
            self.finish()
        except KeyboardInterrupt:
            self.history.stopped, fallback = f"interrupted after step {self.step}", self.current
            if self.settled:
                self.save()
        except _NotFinite as problem:
            fallback = self.good or self.current
            self.stop(str(problem))
        except BaseException:
            fallback = self.current
            if self.settled:
                self.save()
            raise
        finally:
            self.restore(self.best or fallback)
            self.optimizer.zero_grad()
            for part, training in modes.items():
                part.training = training
            self.history.seconds = time.perf_counter() - begin
        return self.history

    def begin(self) -> None:
        """Resume from the checkpoint, or judge and save the weights at the start."""
        path = self.path
        content = distributed.from_first(lambda: checkpoints.load(path, self.configuration)) if path else None
        if content is None:
            if self.validation is not None:
                self.history.start = self.validate()
                self.consider(self.history.start, "validation")
            self.save()
        else:
            self.restore(content["rule"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.history = History.from_dict(content["history"])
            self.step, self.stale, self.best = content["step"], content["stale"], content["best"]
            self.current = self.snapshot()
        self.settled = True

    def advance(self) -> dict[str, Any]:
        """One gradient step; one validation when due."""
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            value = rate(self.step) if callable(rate) else rate
            if value == value:  # one that is not finite ends the run below
                require_that(f"tune, step {self.step}", "learning_rate", number(least=0, infinite=True), value)
            group["lr"] = float(value)  # a numpy number could not be resumed
        records: list[dict[str, Any]] = []
        self.rule.train()
        self.optimizer.step(lambda: self.gradient(records))  # type: ignore[arg-type]  # LBFGS asks repeatedly
        record, self.good = records[0], self.current
        if self.validation is None and self.sampler.whole:
            self.consider(record["loss"], "loss")
        self.check_parameters()
        self.step, self.current = self.step + 1, self.snapshot()
        self.history.append(record)
        if self.validation is not None and self.step % self.validation.interval == 0:
            record["validation"] = self.validate()
            self.consider(record["validation"], "validation")
        if self.patience is not None and self.stale >= self.patience:
            self.history.stopped = f"no improvement in {self.stale} validations, after step {self.step}"
        self.settled = True
        callback, stop = self.callback, False
        if callback is not None:  # everywhere: it may call evaluate, in which all processes take part
            stop = any(distributed.gather(lambda: callback(record) is True))
        if stop and not self.history.stopped:
            self.history.stopped = f"stopped by the callback after step {self.step}"
        if time.monotonic() >= self.next_save:
            self.save()
        return record

    def finish(self) -> None:
        """Judge the last weights too, where that has not been done."""
        if self.validation is not None and self.history and "validation" not in self.history[-1]:
            self.history[-1]["validation"] = self.validate()
            self.consider(self.history[-1]["validation"], "validation")
        if self.validation is None and self.sampler.whole and self.history:
            self.rule.train()
            with torch.no_grad(), isolated(self.seed, "step", self.step, devices=devices_of(self.rule)):
                self.consider(self.total(self.loss()[0]) + self.penalty(), "loss")

    def gradient(self, records: list[dict[str, Any]]) -> Tensor:
        """Loss of the present step; leaves its clipped gradient in the parameters and adds to `records`."""
        self.optimizer.zero_grad()
        with torch.enable_grad(), isolated(self.seed, "step", self.step, devices=devices_of(self.rule)):
            loss, failures = self.loss()
            value, differentiable = self.total(loss), any(distributed.gather(lambda: loss.requires_grad))
            if not math.isfinite(value):
                self.check_parameters()
                raise _NotFinite(f"the loss became {value} while tuning {', '.join(self.names)}{self.culprit}")
            if not differentiable:
                trained = ", ".join(self.names)
                raise OptionError(
                    f"tune: the objective does not depend on the trainable parameters ({trained}); "
                    "check that rule and simulator are differentiable and run without no_grad or detach"
                )
            distributed.gather(lambda: loss.backward() if loss.requires_grad else None)
            distributed.sum_gradients(self.names.values())
        gradients = {name: p.grad for name, p in self.names.items() if p.grad is not None}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        if not math.isfinite(norm):
            culprit = next((n for n, g in gradients.items() if not bool(torch.isfinite(g).all())), "(overflow)")
            raise _NotFinite(f"the gradient of parameter '{culprit}' became NaN or infinite")
        if not records and self.step < 2:
            self.check_influence({name for name in self.names if name not in gradients or not gradients[name].any()})
        if self.clip is not None and norm > self.clip:
            for gradient in gradients.values():
                gradient.mul_(self.clip / norm)
        record = {"step": self.step, "loss": value + self.penalty(), "gradient_norm": norm, "failures": failures}
        records.append(record)
        self.settled = False  # the optimizer moves on
        return loss.detach() if distributed.size() == 1 else loss.detach().new_tensor(value)

    def check_influence(self, idle: set[str]) -> None:
        """Warn where nothing has a gradient in the first step, or declared parameters have none in the second either.

        One step without gradient is usual behind a weight that starts at zero, and several are in a deep network.
        """
        role = role_of(self.rule)
        stuck = {name for name in idle & self.idle if role(self.names[name]) is not Role.NETWORK}
        self.idle = idle if self.step == 0 else set()
        if self.step == 0 and len(idle) == len(self.names):
            stuck, self.idle = idle, set()
        if stuck and distributed.first():
            names = ", ".join(name for name in self.names if name in stuck)
            warnings.warn(
                f"tune, step {self.step}: the gradient of {names} is exactly zero, so the objective does not depend on "
                f"{'it' if len(stuck) == 1 else 'them'} here: a constraint that is inactive in all samples, decisions "
                "that are all at their bounds, a detach on the way, or a loss that is least already; start where there "
                "is an influence, smooth the decisions (solver_args={'smoothing': 1e-2}), or freeze what shall stay",
                ZeroGradientWarning,
                stacklevel=4,
            )

    def loss(self) -> tuple[Tensor, int]:
        """This process's share of the average objective over the step's samples that did not fail; how many did."""
        values: list[Tensor] = []

        def simulate() -> tuple[int, list[int], list[str], bool, str]:
            with collect_failures() as reported:
                trajectory, labels = self.sampler(self.rule, self.step)
            if trajectory is None:
                return 0, [], [], False, ""
            failed, culprit = trajectory.failed.cpu(), ""
            if not bool(failed.all()):
                sound = trajectory.select(~trajectory.failed) if bool(failed.any()) else trajectory
                values.append(judge(self.objective, sound))
                culprit = blame(self.objective, sound, values[0], labels[~failed].tolist())
            return len(failed), labels[failed].tolist(), explanations(trajectory, labels), bool(reported.masks), culprit

        shares = distributed.gather(simulate)
        self.culprit = next((f": {s[4]}" for s in shares if s[4]), "")
        total, lost = sum(s[0] for s in shares), [label for s in shares for label in s[1]]
        if lost:
            if len(lost) == total and not any(s[3] for s in shares):  # no solver is to blame
                self.check_parameters()
                raise _NotFinite(f"all decisions became NaN or infinite while tuning {', '.join(self.names)}")
            reasons = [reason for s in shares for reason in s[2]]
            warn = distributed.first() and not self.warned
            report_failures(lost, total, f"tune, step {self.step}", reasons, warn=warn)
            self.warned = True
        sign, parts = -1.0 if maximizes(self.objective) else 1.0, distributed.size()
        loss = sign * values[0].mean() * (len(values[0]) / (total - len(lost))) if values else torch.zeros(())
        return (loss if self.regularizer is None else loss + self.extra() / parts), len(lost)

    def extra(self) -> Tensor:
        """The regularizer's value, one real number."""
        value = self.regularizer(self.rule)  # pyright: ignore[reportOptionalCall]
        number_like = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
        if not number_like or (isinstance(value, Tensor) and value.is_complex()):
            raise OptionError(f"tune: regularizer(rule) must return one real number, got {shown(value)}")
        return value.reshape(()) if isinstance(value, Tensor) else torch.tensor(float(value))

    def total(self, loss: Tensor) -> float:
        """The sum of the processes' shares of a loss."""
        return sum(distributed.gather(loss.item))

    def penalty(self) -> float:
        """What a proximal optimizer adds to the loss without its gradient."""
        return self.optimizer.penalty() if isinstance(self.optimizer, ProximalGradient) else 0.0

    def validate(self) -> float:
        if self.validation is None:
            return math.nan
        simulator, objective = self.validation.simulator, self.validation.objective
        with collect_failures() as reported:
            try:
                return evaluate(self.rule, simulator, objective, seed=self.seed).mean
            except SolverError as error:
                if any(distributed.gather(lambda: bool(reported.masks))):
                    raise
                raise _NotFinite("decisions on the validation set became NaN or infinite") from error

    def consider(self, value: float, measure: str) -> None:
        """Keep the weights after the last complete step if `value` is the best so far."""
        sign = -1 if measure == "validation" and self.validation and maximizes(self.validation.objective) else 1
        best = self.history.best
        if math.isfinite(value) and (best is None or sign * value < sign * best["value"]):
            self.history.best = {"step": self.step, "value": value, "measure": measure}
            self.best, self.stale = self.current, 0
        else:
            self.stale += 1

    def check_parameters(self) -> None:
        for name, parameter in self.names.items():
            if not bool(torch.isfinite(parameter).all()):
                raise _NotFinite(f"parameter '{name}' became NaN or infinite")

    def stop(self, problem: str) -> None:
        remedy = "lower its learning_rate or clip, or check data and domain"
        message = f"tune, step {self.step}: {problem}; {remedy}"
        if self.step == 0:
            raise NonFiniteError(message)
        self.history.stopped = f"step {self.step}: {problem}"
        kept = (
            f"the best weights so far, of step {self.history.best['step']}," if self.history.best else "earlier weights"
        )
        if distributed.first():
            warnings.warn(f"{message} ({kept} are restored)", NonFiniteWarning, stacklevel=4)

    def snapshot(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.rule.state_dict().items()}

    def restore(self, weights: dict[str, Tensor] | None) -> None:
        if weights is not None:
            self.rule.load_state_dict(weights)

    def save(self) -> None:
        """Write the checkpoint, so seldom that it costs little; it holds what the next step depends on."""
        if self.path is None or not distributed.first():
            return
        begin = time.monotonic()
        history = self.history.to_dict()
        if not history["stopped"].startswith("no improvement"):
            history["stopped"] = ""
        content = {"rule": self.current, "optimizer": self.optimizer.state_dict(), "history": history}
        content |= {"step": self.step, "stale": self.stale, "best": self.best}
        checkpoints.save(self.path, content, self.configuration)
        self.next_save = time.monotonic() + 20 * (time.monotonic() - begin)


class Sampler:
    """The samples of step k: all of a data set, its k-th shuffled batch, or trajectories drawn for k."""

    def __init__(self, simulator: Any, batch_size: int | None, seed: int) -> None:
        self.simulator, self.seed = simulator, seed
        self.finite = isinstance(simulator, FiniteSimulator)
        self.count = len(simulator) if self.finite else 0
        if self.finite and not self.count:
            raise OptionError("tune: the simulator holds no samples")
        self.size = min(batch_size or self.count, self.count) if self.finite else batch_size or BATCH_SIZE
        self.whole = self.finite and self.size == self.count

    def __call__(self, rule: Any, step: int) -> tuple[Trajectory | None, Tensor]:
        """The trajectory of this process's share of them, if it has one, and their numbers."""
        generator = make_generator(self.seed, "tune", step)
        rows, simulator, labels = distributed.share(self.size), self.simulator, torch.arange(self.size)
        if self.finite and not self.whole:
            epoch, batch = divmod(step, self.count // self.size)
            order = torch.randperm(self.count, generator=make_generator(self.seed, "epoch", epoch))
            labels = order[batch * self.size : (batch + 1) * self.size]
            simulator = simulator.subset(labels)
        if not len(rows):
            return None, rows
        return simulate(simulator, rule, rows, None if self.finite else self.size, generator), labels[rows]
