"""Program -> smaller BoxProgram: defined variables out, bounds folded, 1-norm epigraphs recognised."""

from dataclasses import dataclass

import numpy as np

from convexlearn.program.program import Sparsity


@dataclass(frozen=True, eq=False)
class BoxProgram:
    """Structure of: minimize 1/2 x'Px + q'x + w'|x| subject to Ax = b, Gx <= h, l <= x <= u.

    `P` stores the upper triangle. `lower`, `upper` and `absolute` list the variables (sorted, unique)
    that have a lower bound, an upper bound, a 1-norm weight w >= 0; the others have none. The data
    of a batch are contiguous float64 arrays P, q, w (len(absolute)), A, b, G, h, l (len(lower)),
    u (len(upper)), each (B, k), or (1, k) when all samples share it.
    """

    n: int
    P: Sparsity
    A: Sparsity
    G: Sparsity
    lower: np.ndarray
    upper: np.ndarray
    absolute: np.ndarray
