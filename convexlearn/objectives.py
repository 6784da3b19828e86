"""How a simulation is judged: each objective maps a Trajectory to one number per sample, `(B,)`.

`tune` and `evaluate` average over the samples (Eq. 16 of the paper). An objective with the attribute
`maximize` set to True is a utility: larger is better. A weighted sum is a lambda away:
`lambda t: squared_error(t) + 0.1 * cost(t)`.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convexlearn.errors import DomainError, MissingParameterError, OptionError, ShapeError, listed
from convexlearn.inputs import as_floating
from convexlearn.simulate.base import Trajectory, not_finite

Objective = Callable[[Trajectory], Tensor]


def squared_error(trajectory: Trajectory) -> Tensor:
    """|s_true - s|_2^2 `(B,)`, the sum over the decision's entries: the l2 loss of the paper.

    >>> t = Trajectory(torch.zeros(1, 2), torch.zeros(1, 2), target=torch.tensor([[3.0, 4.0]]))
    >>> squared_error(t), mean_squared_error(t), absolute_error(t)
    (tensor([25.]), tensor([12.5000]), tensor([7.]))
    """
    return _difference(trajectory, "squared_error").square().sum(-1)


def mean_squared_error(trajectory: Trajectory) -> Tensor:
    """|s_true - s|_2^2 / n `(B,)`, the mean over the decision's n entries."""
    return _difference(trajectory, "mean_squared_error").square().mean(-1)


def known_squared_error(trajectory: Trajectory) -> Tensor:
    """Mean of (s_true - s)^2 over the entries of the target that are known, not NaN, `(B,)`; zero where none is.

    >>> t = Trajectory(torch.zeros(1, 2), torch.zeros(1, 2), target=torch.tensor([[torch.nan, 4.0]]))
    >>> known_squared_error(t)
    tensor([16.])
    """
    difference = _difference(trajectory, "known_squared_error")
    known = ~torch.isnan(_flat(_target(trajectory, "known_squared_error").detach()))
    return torch.where(known, difference, 0.0).square().sum(-1) / known.sum(-1).clamp(min=1)


def absolute_error(trajectory: Trajectory) -> Tensor:
    """|s_true - s|_1 `(B,)`, the sum over the decision's entries."""
    return _difference(trajectory, "absolute_error").abs().sum(-1)


@dataclass(frozen=True)
class psnr:
    """Peak signal-to-noise ratio 10 log10(peak^2 / mean squared error) in dB, `(B,)`; larger is better.

    >>> t = Trajectory(torch.zeros(1, 2), torch.zeros(1, 2), target=torch.full((1, 2), 0.1))
    >>> psnr(peak=1.0)(t)
    tensor([20.])
    """

    peak: float = 1.0
    maximize = True
    __name__ = "psnr"

    def __post_init__(self) -> None:
        if not isinstance(self.peak, int | float) or isinstance(self.peak, bool) or not 0 < self.peak < math.inf:
            raise OptionError(f"psnr takes the positive peak value of the signal, as in psnr(1.0); got {self.peak!r}")

    def __call__(self, trajectory: Trajectory) -> Tensor:
        """Decibels `(B,)`; infinite where the decision is exact."""
        error = _difference(trajectory, "psnr").square().mean(-1)
        return 10 * torch.log10(self.peak**2 / error)


def cross_entropy(trajectory: Trajectory) -> Tensor:
    """-log softmax(s)[s_true] `(B,)`: decisions are scores `(B, K)` or `(B, T, K)`, targets labels.

    Labels have shape `(B,)` or `(B, T)`; their losses are averaged over time.
    """
    scores, labels = _labelled(trajectory, "cross_entropy")
    chosen = torch.log_softmax(scores, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return -_flat(chosen).mean(-1)


def error_rate(trajectory: Trajectory) -> Tensor:
    """Share of wrong decisions `(B,)`: the zero-one loss of the paper, for scores or for labels.

    Not differentiable: for evaluation; tune on `cross_entropy`. NaN where a score is NaN.
    """
    target, decision = _target(trajectory, "error_rate"), _decision(trajectory, "error_rate")
    lost = torch.isnan(decision)
    if decision.shape != target.shape:
        scores, target = _labelled(trajectory, "error_rate")
        decision, lost = scores.argmax(-1), lost.any(-1)
    wrong = (decision != target).to(torch.get_default_dtype())
    return _flat(torch.where(lost, torch.nan, wrong)).mean(-1)


def accuracy(trajectory: Trajectory) -> Tensor:
    """Share of right decisions `(B,)`, 1 - `error_rate`; larger is better."""
    return 1 - error_rate(trajectory)


accuracy.maximize = True  # type: ignore[attr-defined]


def cost(trajectory: Trajectory) -> Tensor:
    """Mean of the recorded cost over time `(B,)`, for closed loops."""
    if _checked(trajectory, "cost").cost is None:
        raise MissingParameterError(
            "objective 'cost' needs trajectory.cost, but this simulator records none; use a simulator with "
            "a stage cost, or an objective that compares decisions with targets"
        )
    return _flat(as_floating("cost", trajectory.cost, "trajectory:")).mean(-1)


def maximizes(objective: Any) -> bool:
    """True for a utility, False for a loss or cost."""
    return bool(getattr(objective, "maximize", False))


def objective_name(objective: Any) -> str:
    """A name for messages and tables."""
    return getattr(objective, "__name__", type(objective).__name__)


def check_objective(objective: Any, where: str) -> None:
    """OptionError unless the objective can be called with a trajectory alone."""
    try:
        called = objective.forward if isinstance(objective, torch.nn.Module) else objective
        valid = callable(called) and inspect.signature(called).bind(None) is not None
    except TypeError:
        valid = False
    except ValueError:  # a builtin without signature
        valid = True
    if not valid or isinstance(objective, type):
        raise OptionError(
            f"{where}: the objective must be a function of a Trajectory alone that returns (B,), such as "
            f"objectives.squared_error or lambda run: (run.decision - run.target).square().mean(1); got {objective!r}"
        )


def judge(objective: Objective, trajectory: Trajectory) -> Tensor:
    """objective(trajectory), checked to be one number per sample, `(B,)`."""
    values = objective(trajectory)
    if not isinstance(values, Tensor) or values.shape != (len(trajectory),):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ShapeError(
            f"objective '{objective_name(objective)}' must return one number per sample, "
            f"shape ({len(trajectory)},), got {got}; sum or average over the other axes"
        )
    return as_floating(objective_name(objective), values, "the values of objective")


def _checked(trajectory: Trajectory, name: str) -> Trajectory:
    if not isinstance(trajectory, Trajectory):
        raise MissingParameterError(f"objective '{name}' takes a trajectory, got {type(trajectory).__name__}")
    return trajectory


def _decision(trajectory: Trajectory, name: str) -> Tensor:
    s = _checked(trajectory, name).decision
    return _batched(s, "decision", name)


def _batched(value: Any, kind: str, name: str) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim == 0:
        got = "a number" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ShapeError(
            f"objective '{name}' takes a {kind} that is a tensor (B, ...), got {got}; judge one part of a tuple, as in "
            "lambda run: (run.decision[0] - run.target[0]).square().mean(1)"
        )
    return value


def blame(objective: Objective, trajectory: Trajectory, values: Tensor, labels: Sequence[int]) -> str:
    """Which samples have a value that is no number, and in which of the trajectory's tensors; "" where all are fine.

    `labels`: the numbers of the samples for the message.

    >>> t = Trajectory(torch.zeros(2), torch.zeros(2), target=torch.tensor([0.0, torch.nan]))
    >>> blame(squared_error, t, squared_error(t), [4, 7]).partition(",")[0]
    "objective 'squared_error' is no number for samples 7"
    """
    odd, name = ~torch.isfinite(values.detach()), objective_name(objective)
    if not bool(odd.any()):
        return ""
    for field in ("target", "cost", "state", "context", "decision"):
        value = getattr(trajectory, field)
        rows = odd if value is None else odd & not_finite(value, len(trajectory)).to(odd.device)
        if value is not None and bool(rows.any()):
            known = ", or take known_squared_error, which skips unknown entries" if field == "target" else ""
            numbers = listed([labels[k] for k in rows.nonzero().flatten().tolist()])
            return (
                f"objective '{name}' is no number for samples {numbers}, "
                f"whose {field} holds NaN or inf; mend or leave out these samples, as in pairs.subset(indices){known}"
            )
    rows = torch.isnan(values.detach()).nonzero().flatten().tolist()
    return (
        f"objective '{name}' is NaN for samples {listed([labels[k] for k in rows])}, although their target, context, "
        "state, cost and decision are finite; it divides by zero or takes the root or logarithm of a negative number"
        if len(rows)
        else ""
    )


def _target(trajectory: Trajectory, name: str) -> Tensor:
    if _checked(trajectory, name).target is None:
        raise MissingParameterError(
            f"objective '{name}' compares decisions with targets, but this simulator has none; "
            "give targets, as in Pairs(x, s), or use an objective of context and decision alone"
        )
    return _batched(trajectory.target, "target", name)


def _flat(values: Tensor) -> Tensor:
    """All entries of a sample in a row, `(B, n)`; also for B = 0."""
    return values.reshape(len(values), math.prod(values.shape[1:]))


def _difference(trajectory: Trajectory, name: str) -> Tensor:
    """Decision minus target, flattened to `(B, n)`; its magnitude where one is complex, integers as numbers."""
    target, s = _target(trajectory, name), _decision(trajectory, name)
    if s.shape != target.shape:
        raise ShapeError(
            f"objective '{name}': decisions have shape {tuple(s.shape)}, targets {tuple(target.shape)}; they must agree"
        )
    numbers = torch.promote_types(s.dtype, target.dtype)
    if not (numbers.is_floating_point or numbers.is_complex):
        numbers = torch.get_default_dtype()
    s, target = s.to(numbers), target.to(numbers)
    difference = _flat(s - target)
    return difference.abs() if difference.is_complex() else difference


def _labelled(trajectory: Trajectory, name: str) -> tuple[Tensor, Tensor]:
    """Scores `(B, ..., K)` and labels `(B, ...)`, int64."""
    labels, scores = _target(trajectory, name), _decision(trajectory, name)
    if labels.is_floating_point() or labels.is_complex() or scores.ndim < 2 or scores.shape[:-1] != labels.shape:
        raise ShapeError(
            f"objective '{name}' takes scores (B, ..., K) and integer labels (B, ...), got decisions "
            f"{tuple(scores.shape)} and targets {tuple(labels.shape)} of {labels.dtype}"
        )
    outside = (labels < 0) | (labels >= scores.shape[-1])
    if not torch.compiler.is_compiling() and bool(outside.any()):
        place = tuple(torch.nonzero(outside)[0].tolist())
        raise DomainError(
            f"objective '{name}': the target of batch element {place[0]} is the label {labels[place].item()}, but "
            f"{scores.shape[-1]} scores stand for the labels 0 to {scores.shape[-1] - 1}"
        )
    return as_floating("decision", scores, f"objective '{name}':"), labels.long()
