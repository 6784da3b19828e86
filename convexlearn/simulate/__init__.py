"""Simulators: where a tuned rule must operate."""

from convexlearn.simulate import plants
from convexlearn.simulate.base import FiniteSimulator, Simulator, Trajectory
from convexlearn.simulate.closed_loop import ClosedLoop, Rollout
from convexlearn.simulate.pairs import Pairs

__all__ = ["ClosedLoop", "FiniteSimulator", "Pairs", "Rollout", "Simulator", "Trajectory", "plants"]
