"""Simulators: where a tuned rule must operate."""

from convexlearn.simulate import plants
from convexlearn.simulate.backtest import Backtest, Holdings, Portfolio
from convexlearn.simulate.base import FiniteSimulator, Simulator, Trajectory
from convexlearn.simulate.channel import Channel, decaying_taps
from convexlearn.simulate.closed_loop import ClosedLoop, Rollout
from convexlearn.simulate.gymnasium import EnvironmentRollouts, Episodes, environment
from convexlearn.simulate.pairs import Pairs

__all__ = [
    "Backtest",
    "Channel",
    "ClosedLoop",
    "EnvironmentRollouts",
    "Episodes",
    "FiniteSimulator",
    "Holdings",
    "Pairs",
    "Portfolio",
    "Rollout",
    "Simulator",
    "Trajectory",
    "decaying_taps",
    "environment",
    "plants",
]
