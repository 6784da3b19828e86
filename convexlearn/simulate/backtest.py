"""Back-test: a trading rule acts on recorded prices, period after period, and pays its costs."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convexlearn.checks import FUNCTION, GENERATOR, Check, checked, count, number, require_that, shown
from convexlearn.errors import DomainError, MissingParameterError, OptionError, ShapeError
from convexlearn.inputs import as_tensor, check_noise, check_rows
from convexlearn.simulate.base import rows_of
from convexlearn.simulate.closed_loop import ClosedLoop, Rollout


class Holdings(NamedTuple):
    """State of a portfolio: weights `(B, n)` as shares of the wealth, and the wealth `(B,)` itself.

    What the weights leave of 1 is cash.
    """

    weights: Tensor
    wealth: Tensor


COST = number(least=0)
NAMES = Check("a list of names", lambda v: isinstance(v, Sequence) and not isinstance(v, str))
START = Check("weights (n,) or a function of the rule giving them", lambda v: isinstance(v, Tensor) or FUNCTION.fits(v))


@dataclass(frozen=True, kw_only=True)
class Portfolio:
    """The plant of multi-period trading: z = Holdings, u = trades `(B, n)` as shares of the wealth, w = returns.

    The weights after trade are v = weights + u. Trading costs `trading` |u|_1 and holding shorts costs `shorting`
    sum of (v)_-, both as shares of the wealth and taken from cash; cash earns `interest` per period and may be
    negative (borrowed at the same rate). Then every weight is multiplied by its gross return w `(B, n)`. A
    portfolio whose wealth falls to zero or below is ruined: its state is NaN, which a simulator reports.
    Source: Agrawal, Barratt, Boyd, Stellato, Learning convex optimization control policies, section 5.2.

    >>> z = Holdings(torch.tensor([[0.5, 0.5]]), torch.ones(1))
    >>> Portfolio(trading=0.01)(z, torch.tensor([[-0.5, 0.4]]), torch.tensor([[1.0, 2.0]])).wealth
    tensor([1.8910])
    """

    trading: float = 0.0
    shorting: float = 0.0
    interest: float = 0.0

    def __post_init__(self) -> None:
        for name, check in (("trading", COST), ("shorting", COST), ("interest", number())):
            require_that("Portfolio", name, check, getattr(self, name))

    def cost(self, weights: Tensor, trades: Tensor) -> Tensor:
        """Costs of trading and of short positions, `(B,)`, as shares of the wealth."""
        self._check(weights, trades)
        return self._cost(weights, trades)

    def _check(self, weights: Any, trades: Any, returns: Any = 0.0) -> None:
        n = weights.shape[-1] if isinstance(weights, Tensor) and weights.ndim else 1
        for name, value in (("weights", weights), ("u", trades)):
            check_rows("Portfolio", name, value, n)
            check_noise("Portfolio", value, weights)
        check_noise("Portfolio", returns, weights)

    def _cost(self, weights: Tensor, trades: Tensor) -> Tensor:
        shorts = (-(weights + trades)).clamp(min=0).sum(-1)
        return self.trading * trades.abs().sum(-1) + self.shorting * shorts

    def __call__(self, z: Holdings, u: Tensor, w: Tensor) -> Holdings:
        """Holdings after the trades u and the returns w."""
        if not isinstance(z, tuple) or len(z) != 2:
            raise MissingParameterError(f"Portfolio: z must be Holdings, got {shown(z)}")
        z = Holdings(*z)
        self._check(z.weights, u, w)
        if not isinstance(z.wealth, Tensor) or z.wealth.shape != z.weights.shape[:-1] or z.wealth.is_complex():
            raise ShapeError(f"Portfolio: wealth must be real, {tuple(z.weights.shape[:-1])}, got {shown(z.wealth)}")
        after = z.weights + u
        cash = 1 - after.sum(-1) - self._cost(z.weights, u)
        positions = after * w
        growth = (1 + self.interest) * cash + positions.sum(-1)
        growth = torch.where(growth > 0, growth, torch.nan)
        return Holdings(positions / growth[..., None], z.wealth * growth)


def growth(trajectory: Any) -> Tensor:
    """Gross return of the portfolio in every period of a rollout whose state is Holdings, `(B, T)`."""
    wealth = trajectory.state.wealth
    return wealth[:, 1:] / wealth[:, :-1]


def loss(growth: Tensor) -> Tensor:
    """1 - growth: the period's loss as a share of the wealth."""
    return 1 - growth


class Backtest:
    """Trading on recorded prices: the simulator of multi-period portfolio rules, with costs.

    prices: `(N, n)`, positive, one row per period (a gross return is a row over the row before). The record is
    cut into windows of `horizon` periods that start every `stride` periods (default: `horizon`, no overlap); each
    window is one sample, so the simulator has a length. In each period the rule sees the weights `(B, n)`, and
    with `lookback` k also the gross returns of the k periods before `(B, k, n)`, never a later one; it answers
    with trades `(B, n)` as shares of the wealth. Costs are those of Portfolio. start: weights at the beginning,
    `(n,)`, or a function of the rule giving them; all cash by default. stage_cost: gross returns of the portfolio
    `(B, T)` -> cost `(B, T)`, by default the loss 1 - growth. names: of the assets, for messages.

    The state of the trajectory is Holdings, time on axis 1. Differentiable in the rule; a ruined portfolio or a
    failed decision is one failed sample.

    >>> prices = torch.tensor([[1.0, 1.0], [2.0, 1.0], [2.0, 3.0]])
    >>> Backtest(prices, 2, start=torch.tensor([0.5, 0.5]))(torch.zeros_like).state.wealth
    tensor([[1.0000, 1.5000, 2.5000]])
    """

    @checked(horizon=count(), stride=count(), lookback=count(0), start=START, stage_cost=FUNCTION, names=NAMES)
    def __init__(
        self,
        prices: Any,
        horizon: int,
        *,
        stride: int | None = None,
        lookback: int = 0,
        trading: float = 0.0,
        shorting: float = 0.0,
        interest: float = 0.0,
        start: Tensor | Callable[[Any], Tensor] | None = None,
        stage_cost: Callable[[Tensor], Tensor] = loss,
        names: Sequence[str] | None = None,
    ) -> None:
        prices = as_tensor("prices", prices, "Backtest:")
        self.returns = _returns(prices, names)
        self.plant = Portfolio(trading=trading, shorting=shorting, interest=interest)
        stride = horizon if stride is None else stride
        if lookback + horizon > len(self.returns):
            raise OptionError(
                f"Backtest: {len(prices)} prices give {len(self.returns)} returns, fewer than "
                f"lookback + horizon = {lookback + horizon}; shorten them or give a longer record"
            )
        if isinstance(start, Tensor):
            self._weights(start)
        self.horizon, self.stride, self.lookback = horizon, stride, lookback
        self.start, self.stage_cost = start, stage_cost
        self.starts = torch.arange(lookback, len(self.returns) - horizon + 1, stride)

    def __len__(self) -> int:
        return len(self.starts)

    def __repr__(self) -> str:
        n, plant = self.returns.shape[1], self.plant
        return (
            f"Backtest({len(self)} windows of {self.horizon} periods, {n} assets, lookback {self.lookback}, "
            f"trading {plant.trading}, shorting {plant.shorting})"
        )

    def fingerprint(self) -> str:
        """A checksum of prices and windows, by which a checkpoint knows them."""
        parts = [part.cpu().contiguous().numpy().tobytes() for part in (self.returns, self.starts)]
        return f"{self!r} {sum(zlib.crc32(part) for part in parts):x}"

    def subset(self, indices: Tensor) -> "Backtest":
        """The windows at `indices` (k,), in this order."""
        other = object.__new__(Backtest)
        other.__dict__.update(self.__dict__)
        rows = rows_of("Backtest.subset: indices", indices, len(self))
        other.starts = self.starts[rows.to(self.starts.device)]
        return other

    @checked(batch_size=count(0), generator=GENERATOR)
    def __call__(self, rule: Any, batch_size: int | None = None, generator: torch.Generator | None = None) -> Rollout:
        """All windows in order, or `batch_size` random ones without replacement."""
        if batch_size is not None:
            if not 0 <= batch_size <= len(self):
                raise OptionError(f"batch_size must lie between 0 and {len(self)} for {self}, got {batch_size}")
            return self.subset(torch.randperm(len(self), generator=generator)[:batch_size])(rule)
        loop = ClosedLoop(
            self.plant,
            self.horizon,
            initial=lambda batch, generator: self._first(rule),
            noise=lambda batch, t, generator: self.returns[self.starts + t],
            observe=self._observe,
            stage_cost=lambda z, u: z.wealth * 0,  # what a period brings is known only after it
        )
        rollout = loop(rule, len(self), torch.Generator())
        cost = self.stage_cost(growth(rollout))
        if not isinstance(cost, Tensor) or cost.shape[:1] != (len(self),) or cost.ndim > 2:
            wanted = f"({len(self)}, {self.horizon}) or ({len(self)},)"
            raise ShapeError(f"Backtest: stage_cost(growth) must return costs {wanted}, got {shown(cost)}")
        return replace(rollout, cost=cost)

    def _first(self, rule: Any) -> Holdings:
        n = self.returns.shape[1]
        if self.start is None:
            weights = self.returns.new_zeros(n)
        else:
            weights = self._weights(self.start if isinstance(self.start, Tensor) else self.start(rule))
        return Holdings(weights.expand(len(self), n), self.returns.new_ones(len(self)))

    def _weights(self, start: Any) -> Tensor:
        """Weights `(n,)` at the beginning, in the prices' dtype."""
        n, weights = self.returns.shape[1], as_tensor("start", start, "Backtest:").to(self.returns)
        if weights.shape != (n,):
            raise ShapeError(f"Backtest: start must hold a weight per asset, ({n},), got {tuple(weights.shape)}")
        return weights

    def _observe(self, z: Holdings, t: int, w: Any) -> Any:
        if not self.lookback:
            return z.weights
        past = self.starts[:, None] + torch.arange(t - self.lookback, t)
        return z.weights, self.returns[past]


def _returns(prices: Tensor, names: Sequence[str] | None) -> Tensor:
    """Gross returns `(N - 1, n)` of prices that are sound."""
    if prices.ndim != 2 or len(prices) < 2 or not prices.is_floating_point():
        got = f"{tuple(prices.shape)} of {prices.dtype}"
        raise ShapeError(f"Backtest: prices must be floating, (N, n) with one row per period and N > 1; got {got}")
    if names is not None and len(names) != prices.shape[1]:
        raise ShapeError(f"Backtest: {len(names)} names for {prices.shape[1]} assets")
    bad = torch.nonzero(~(torch.isfinite(prices) & (prices > 0)))
    if len(bad):
        row, column = bad[0].tolist()
        asset = names[column] if names is not None else f"number {column}"
        raise DomainError(
            f"Backtest: prices must be positive and finite, but asset {asset} has {prices[row, column].item()} in "
            f"period {row} ({len(bad)} such entries); drop the asset or the periods, or fill the gap"
        )
    return prices[1:] / prices[:-1]
