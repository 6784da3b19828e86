"""A transmission grid in the DC approximation: lines, generators, loads and what flows, in MW; the IEEE 30-bus grid."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

ROUNDING = 1e-12
"""Distribution factors below this are zeros: lines that no other line can relieve."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Buses are numbered from 0, the first is the reference; powers in MW, costs quadratic p^2 + linear p in $/h.

    lines: (ends (m, 2), reactance (m,) in p.u., limit (m,) in MW). generators: bus (g,), largest (g,) in MW, from 0,
    quadratic (g,) in $/MW^2h, linear (g,) in $/MWh. loads: bus (k,) and demand (k,) in MW. base: MVA of one p.u.
    """

    base: float
    ends: np.ndarray
    reactance: np.ndarray
    limit: np.ndarray
    generator_bus: np.ndarray
    largest: np.ndarray
    quadratic: np.ndarray
    linear: np.ndarray
    load_bus: np.ndarray
    demand: np.ndarray

    @property
    def buses(self) -> int:
        """Number of buses."""
        return int(self.ends.max()) + 1

    @cached_property
    def incidence(self) -> np.ndarray:
        """`(m, buses)`: 1 where a line begins, -1 where it ends."""
        own = np.arange(len(self.ends))
        matrix = np.zeros((len(own), self.buses))
        matrix[own, self.ends[:, 0]] = 1.0
        matrix[own, self.ends[:, 1]] = -1.0
        return matrix

    @cached_property
    def flow_of_angle(self) -> np.ndarray:
        """`(m, buses)`: flow (MW) on each line per angle (rad) of each bus."""
        return (self.base / self.reactance)[:, None] * self.incidence

    def placed(self, buses: np.ndarray) -> np.ndarray:
        """`(buses, len(buses))`: from powers at these buses to powers at all buses."""
        return np.eye(self.buses)[:, buses]

    @cached_property
    def distribution(self) -> np.ndarray:
        """`(m, buses)`: power transfer distribution factors, flow per injection that the reference bus takes out."""
        balance = self.incidence.T @ self.flow_of_angle
        factors = np.zeros((len(self.ends), self.buses))
        factors[:, 1:] = np.linalg.solve(balance[1:, 1:], self.flow_of_angle[:, 1:].T).T
        return np.where(np.abs(factors) < ROUNDING, 0.0, factors)

    def constraints(self, p: Any, angle: Any, load: Any) -> list[Any]:
        """CVXPY constraints on generation p (MW) and angles (rad) for loads (MW): equalities first, then limits."""
        flow = self.flow_of_angle @ angle
        injection = self.placed(self.generator_bus) @ p - self.placed(self.load_bus) @ load
        return [
            injection == self.incidence.T @ flow,
            angle[0] == 0,
            cp.abs(flow) <= self.limit,
            p >= 0,
            p <= self.largest,
        ]

    def cost_of(self, p: Any) -> Any:
        """CVXPY expression of the cost of generation p, in $/h."""
        return self.quadratic @ cp.square(p) + self.linear @ p

    def cost(self, p: Tensor) -> Tensor:
        """Cost `(B,)` of generation `(B, g)`, in $/h."""
        return (p.square() * p.new_tensor(self.quadratic) + p * p.new_tensor(self.linear)).sum(-1)

    def excess(self, p: Tensor, load: Tensor) -> Tensor:
        """By how much (MW) generation `(B, g)` breaks each constraint, `(B, 1 + m + 2 g)`, zeros where it keeps it.

        Balance of the whole grid, line limits, upper and lower limits of generation. What is generated too much or
        too little is taken out or in at the reference bus.
        """
        factors = p.new_tensor(self.distribution)
        flow = p @ factors[:, self.generator_bus].mT - load @ factors[:, self.load_bus].mT
        balance = (p.sum(-1) - load.sum(-1)).abs()
        over = (flow.abs() - p.new_tensor(self.limit)).clamp(min=0)
        return torch.cat([balance[:, None], over, (p - p.new_tensor(self.largest)).clamp(min=0), (-p).clamp(min=0)], -1)


def ieee30() -> Grid:
    """The IEEE 30-bus grid with six generators: 189.2 MW of load, costs and limits of Ferrero and others (1997).

    Data: pglib_opf_case30_fsr of PGLib-OPF v18.06 (power-grid-lib), of which only what the DC approximation needs is
    kept. Copyright (c) 1997 by The Institute of Electrical and Electronics Engineers (IEEE), licensed under the
    Creative Commons Attribution 4.0 International license, https://creativecommons.org/licenses/by/4.0/. Grid and
    limits: Alsac, Stott, Optimal load flow with steady state security (1974). MATPOWER's case30 is the same grid with
    reactances rounded to two digits. Published least cost in the DC approximation: 565.21 $/h (PGLib-OPF).
    """
    lines, generators, loads = (_table(text) for text in (LINES, GENERATORS, LOADS))
    return Grid(
        base=100.0,
        ends=lines[:, :2].astype(int) - 1,
        reactance=lines[:, 2],
        limit=lines[:, 3],
        generator_bus=generators[:, 0].astype(int) - 1,
        largest=generators[:, 1],
        quadratic=generators[:, 2],
        linear=generators[:, 3],
        load_bus=loads[:, 0].astype(int) - 1,
        demand=loads[:, 1],
    )


def _table(text: str) -> np.ndarray:
    return np.array([row.split() for row in text.split(",")], dtype=float)


# from, to, reactance (p.u.), limit (MW)
LINES = """
1 2 .0575 130, 1 3 .1852 130, 2 4 .1737 65, 3 4 .0379 130, 2 5 .1983 130, 2 6 .1763 65, 4 6 .0414 90, 5 7 .116 70,
6 7 .082 130, 6 8 .042 32, 6 9 .208 65, 6 10 .556 32, 9 11 .208 65, 9 10 .11 65, 4 12 .256 65, 12 13 .14 65,
12 14 .2559 32, 12 15 .1304 32, 12 16 .1987 32, 14 15 .1997 16, 16 17 .1932 16, 15 18 .2185 16, 18 19 .1292 16,
19 20 .068 32, 10 20 .209 32, 10 17 .0845 32, 10 21 .0749 32, 10 22 .1499 32, 21 22 .0236 32, 15 23 .202 16,
22 24 .179 16, 23 24 .27 16, 24 25 .3292 16, 25 26 .38 16, 25 27 .2087 16, 28 27 .396 65, 27 29 .4153 16,
27 30 .6027 16, 29 30 .4533 16, 8 28 .2 32, 6 28 .0599 32"""

# bus, largest (MW), quadratic ($/MW^2h) and linear cost ($/MWh)
GENERATORS = """
1 80 .02 2, 2 80 .0175 1.75, 22 50 .0625 1, 27 55 .00834 3.25, 23 30 .025 3, 13 40 .025 3"""

# bus, demand (MW)
LOADS = """
2 21.7, 3 2.4, 4 7.6, 7 22.8, 8 30, 10 5.8, 12 11.2, 14 6.2, 15 8.2, 16 3.5, 17 9, 18 3.2, 19 9.5, 20 2.2, 21 17.5,
23 3.2, 24 8.7, 26 3.5, 29 2.4, 30 10.6"""
