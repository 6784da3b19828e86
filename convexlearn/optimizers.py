"""Torch optimizers beyond torch's own, for `tune`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convexlearn.checks import FUNCTION, checked, instance, number, shown
from convexlearn.errors import OptionError


class ProximalTerm(NamedTuple):
    """A penalty r(value) -> scalar, and its proximal map (value, step) -> argmin_v r(v) + |v - value|^2 / (2 step)."""

    penalty: Callable[[Tensor], Tensor]
    prox: Callable[[Tensor, float], Tensor]


class ProximalGradient(torch.optim.Optimizer):
    """Minimize loss(theta) + r(theta) by theta+ = prox(theta - step grad, step), with a step that adapts.

    A point that does not increase loss + r is accepted and the step grows by `grow`, one that does is refused
    and the step shrinks by `shrink`; a loss that is not finite is refused too. `lr` is the first step, or the unit
    of the adapting one where a schedule changes it. terms: by parameter, the convex r that the loss leaves
    out, acting on the free coordinates of learned parameters. `step` evaluates the closure twice; give
    `tune` the option `clip=None`, since a clipped gradient is no gradient.

    Source: Barratt and Boyd, Fitting a Kalman smoother to data (2020), section 5.

    >>> x = nn.Parameter(torch.tensor([3.0, 0.1]))
    >>> lasso = ProximalTerm(
    ...     lambda v: v.abs().sum(), lambda v, step: v.sign() * (v.abs() - step).clamp(min=0)
    ... )
    >>> optimizer = ProximalGradient([x], lr=1.0, terms={x: lasso})
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (x - 2).square().sum() / 2
    ...     loss.backward()
    ...     return loss
    >>> for _ in range(50):
    ...     loss = optimizer.step(closure)
    >>> x.data
    tensor([1., 1.])
    """

    @checked(
        lr=number(above=0),
        terms=instance(Mapping, "a dict of ProximalTerm by parameter"),
        grow=number(least=1),
        shrink=number(above=0, below=1),
    )
    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        *,
        terms: Mapping[nn.Parameter, ProximalTerm] | None = None,
        grow: float = 1.5,
        shrink: float = 0.5,
    ) -> None:
        try:
            params = [params] if isinstance(params, Tensor) else list(params)
            valid = bool(params) and all(isinstance(p, Tensor | Mapping | tuple) for p in params)
        except TypeError:
            valid = False
        if not valid:
            raise OptionError(f"ProximalGradient: params must be parameters or groups of them, got {shown(params)}")
        super().__init__(params, {"lr": lr, "scale": 1.0, "grow": grow, "shrink": shrink})
        if terms is not None and not all(isinstance(term, ProximalTerm) for term in terms.values()):
            raise OptionError("ProximalGradient: terms must map parameters to ProximalTerm(penalty, prox)")
        self.terms = {} if terms is None else dict(terms)
        mine = {id(p) for group in self.param_groups for p in group["params"]}
        if any(id(p) not in mine for p in self.terms):
            raise OptionError("ProximalGradient: terms has a parameter that is not optimized; name learned ones only")

    @checked(closure=FUNCTION)
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One trial; returns the loss before it."""
        loss = closure()
        before = float(loss.detach()) + self.penalty()
        old = [(p, p.detach().clone()) for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    self._move(p, group["lr"] * group["scale"])
        try:
            accepted = float(closure().detach()) + self.penalty() <= before
        except FloatingPointError:
            accepted = False
        for group in self.param_groups:
            group["scale"] *= group["grow"] if accepted else group["shrink"]
        if not accepted:
            with torch.no_grad():
                for p, value in old:
                    p.copy_(value)
        return loss

    def penalty(self) -> float:
        """r at the present values."""
        with torch.no_grad():
            return float(sum(float(term.penalty(p)) for p, term in self.terms.items()))

    def _move(self, p: nn.Parameter, step: float) -> None:
        if p.grad is not None:
            p.sub_(p.grad, alpha=step)
        if p in self.terms:
            p.copy_(self.terms[p].prox(p.detach(), step))
