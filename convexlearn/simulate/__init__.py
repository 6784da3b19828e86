"""Simulators: where a tuned rule must operate."""

from convexlearn.simulate.base import FiniteSimulator, Simulator, Trajectory
from convexlearn.simulate.pairs import Pairs

__all__ = ["FiniteSimulator", "Pairs", "Simulator", "Trajectory"]
