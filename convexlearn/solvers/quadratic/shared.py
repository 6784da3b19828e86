"""Matrices common to the batch: condense once to a small dense QP, then one active set per sample.

The equalities are solved for basic variables, x_B = Kb b + Ku u. Where these can be unbounded ones and all
inequalities are bounds, what remains is min 1/2 u'Hu + g'u + w'|u| over l <= u <= h with one H for the whole batch
(MPC: the inputs; lasso: the Gram matrix); else min 1/2 u'Hu + g'u over Cu <= d with one C as well (projections,
MPC with bounded states), for positive definite H. The adjoint solves the same linear systems on the active sets found.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.linalg

from convexlearn.parallel import count, run
from convexlearn.program.reduce import Arrays, BoxProgram, Pair, Reduction

LARGEST = 400  # dense factorizations per sample beyond this size cost more than sparse ones
LARGEST_ROWS = 20_000  # entries of C from which the interior point is faster
DENSER = 6  # entries of C for each that is stored from which the interior point, which stays sparse, is faster
SMALL = 100  # variables up to which dense active sets beat the sparse interior point; 1-norms always do
CONDITION = 1e10
NOTHING = np.zeros((0, 0))


@dataclass(frozen=True, eq=False)
class Condensed:
    """One dense QP for the batch in variables u = x[arrangement.inner] of the reduced program.

    values: bytes of the P and A it was made from. dense, general: matrices as shared_kernels reads them.
    lengths: of packed vectors and of packed solutions.
    """

    reduction: Reduction
    arrangement: "Arrangement"
    values: tuple[bytes, bytes]
    dense: np.ndarray
    general: np.ndarray | None
    lengths: tuple[int, int]

    @property
    def constants(self) -> tuple[np.ndarray | None, ...]:
        """What shared_kernels reads first."""
        return self.reduction.plan, self.reduction.coef, self.arrangement.index, self.dense, self.general

    def matches(self, P: np.ndarray, A: np.ndarray) -> bool:
        """Whether these are the matrices that were condensed, bit by bit."""
        return self.values[1] == A.tobytes() and self.values[0] == P.tobytes()


def condensable(box: BoxProgram) -> bool:
    """Whether the structure allows it: few variables beside the equalities, with curvature unless all is bounds."""
    if np.isin(box.absolute, np.concatenate([box.lower, box.upper])).any():
        return False
    size = box.n - box.A.shape[0]
    if not 0 < size <= LARGEST or not general(box):
        return 0 < size <= LARGEST
    flat = box.n - int(np.count_nonzero(box.P.rows == box.P.cols))  # more such variables than equalities: H is singular
    return not len(box.absolute) and flat <= box.A.shape[0] and _rows(box) * size <= LARGEST_ROWS


def worthwhile(box: BoxProgram) -> bool:
    """Whether the condensed problem of a condensable one is expected to be solved faster than the sparse one."""
    size = box.n - box.A.shape[0]
    if not general(box):
        return len(box.absolute) > 0 or size <= SMALL
    stored = box.P.nnz + box.A.nnz + box.G.nnz + len(box.lower) + len(box.upper)
    return size <= SMALL and _rows(box) * size <= DENSER * stored


def general(box: BoxProgram) -> bool:
    """Whether inequalities remain that are not bounds once the equalities are solved for unbounded variables."""
    return box.G.shape[0] > 0 or box.A.shape[0] > len(unbounded(box))


def _rows(box: BoxProgram) -> int:
    return box.G.shape[0] + len(box.lower) + len(box.upper)


@dataclass(frozen=True, eq=False)
class Arrangement:
    """Variables reordered to [inner, basic]: positions of P's and A's entries, and the kernels' index lists.

    rows: how many inequalities are treated as general ones, all or none.
    """

    inner: np.ndarray
    position: np.ndarray
    P_at: tuple[np.ndarray, np.ndarray]
    A_at: tuple[np.ndarray, np.ndarray]
    index: np.ndarray
    rows: int

    @classmethod
    def of(cls, box: BoxProgram, basic: np.ndarray, rows: int) -> "Arrangement":
        """Arrange for a choice of basic variables, as many as there are equalities."""
        inner = np.setdiff1d(np.arange(box.n), basic)
        position = np.empty(box.n, dtype=np.int64)
        position[inner] = np.arange(len(inner))
        position[basic] = np.arange(len(inner), box.n)
        lists = [inner, basic, position[box.lower], position[box.upper], position[box.absolute]]
        header = len(lists) + 1 + np.cumsum([0, *(len(v) for v in lists)])
        P_at = position[box.P.rows], position[box.P.cols]
        A_at = box.A.rows.astype(np.int64), position[box.A.cols]
        return cls(inner, position, P_at, A_at, np.concatenate([header, *lists]).astype(np.int32), rows)


def unbounded(box: BoxProgram) -> np.ndarray:
    """Variables without bounds and 1-norm weights."""
    held = np.zeros(box.n, dtype=bool)
    for listed in (box.lower, box.upper, box.absolute):
        held[listed] = True
    return np.flatnonzero(~held)


def arrange(box: BoxProgram, A: np.ndarray) -> Arrangement | None:
    """Basic variables for the values A (nnz,) of the equalities, by QR with pivoting where there is a choice.

    None where the variables that may be basic don't span the equalities.
    """
    rows, inequalities = box.A.shape[0], _rows(box) if general(box) else 0
    free = np.arange(box.n) if inequalities else unbounded(box)
    if len(free) > rows > 0:
        equality = np.zeros(box.A.shape)
        equality[box.A.rows, box.A.cols] = A
        _, order = scipy.linalg.qr(equality[:, free], mode="r", pivoting=True, check_finite=False)
        free = np.sort(free[order[:rows]])
    return Arrangement.of(box, free[:rows], inequalities) if len(free) >= rows else None


def condense(
    reduction: Reduction, P: np.ndarray, A: np.ndarray, arrangement: Arrangement | None = None
) -> Condensed | None:
    """Condense a program whose P and A (as ProgramData stores them, leading dimension 1) all samples share.

    `arrangement` is tried first. None where no variables that may be basic span the equalities.
    """
    box = reduction.box
    P_box, A_box, G_box = reduction.matrices(P, A)
    own = arrange(box, A_box[0]) if arrangement is None else arrangement
    dense = None if own is None else _condensed_matrices(box, own, P_box, A_box)
    general = _general_rows(box, own, A_box[0], G_box[0], dense) if own and own.rows and dense is not None else None
    if own is None or dense is None or (own.rows and general is None):
        return None if arrangement is None else condense(reduction, P, A)
    lengths = (reduction.ends[-1], reduction.dual_ends[-1])
    return Condensed(reduction, own, (P.tobytes(), A.tobytes()), dense, general, lengths)


def _condensed_matrices(box: BoxProgram, own: Arrangement, P: np.ndarray, A: np.ndarray) -> np.ndarray | None:
    """The matrices that shared_kernels reads, or None where the basic variables are a bad choice."""
    from convexlearn.solvers.quadratic.condense_kernels import condense

    n, rows, wanted = len(own.inner), box.A.shape[0], not len(box.absolute)
    dense = np.empty(n * n * (1 + wanted) + rows * (3 * n + 2 * rows))
    sizes = np.array([n, rows, wanted])
    found = condense(*own.P_at, P[0], *own.A_at, A[0], sizes, CONDITION, dense)
    if not found:
        return None
    return dense[: len(dense) - n * n] if wanted and found == 1 else dense


def _general_rows(
    box: BoxProgram, own: Arrangement, A: np.ndarray, G: np.ndarray, dense: np.ndarray
) -> np.ndarray | None:
    """The general inequalities as shared_kernels reads them, or None where H has no inverse."""
    from convexlearn.solvers.quadratic.condense_kernels import condense_rows

    n, equal = len(own.inner), box.A.shape[0]
    before = n * n + equal * (3 * n + 2 * equal)
    if len(dense) == before:
        return None
    E, equality, first = np.zeros((own.rows, box.n)), np.zeros((equal, box.n)), box.G.shape[0]
    equality[own.A_at] = A
    E[box.G.rows, own.position[box.G.cols]] = G
    for bounded, sign in ((box.lower, -1.0), (box.upper, 1.0)):
        E[first + np.arange(len(bounded)), own.position[bounded]] = sign
        first += len(bounded)
    Kb, Ku = np.split(dense[n * n : n * n + equal * (equal + n)], [equal * equal])
    out = np.empty(own.rows * (3 * n + 2 * equal + 1) + equality.size)
    condense_rows(E, equality, Kb.reshape(equal, equal), Ku.reshape(equal, n), dense[before:].reshape(n, n), out)
    return out


@dataclass(frozen=True, eq=False)
class SharedResult:
    """What the adjoint needs: the condensed problem, states (B, .) and signs (B, 1-norms) of the solution.

    states: of the variables, or 1 for the general inequalities of the working set.
    """

    condensed: Condensed
    states: np.ndarray
    sign: np.ndarray


class Settled(NamedTuple):
    """x (B, n), z (B, m), residual (B,) and steps (B,) on the original program, -1 where nothing settled."""

    x: np.ndarray
    z: np.ndarray
    residual: np.ndarray
    steps: np.ndarray
    result: SharedResult
    worst: float


def solve(
    condensed: Condensed, data: Arrays, batch: int, start: np.ndarray | None = None, threads: int | None = None
) -> Settled:
    """Solve a batch; start: (B, n) points of the original program whose active sets are tried first."""
    from convexlearn.solvers.quadratic import shared_kernels

    reduction = condensed.reduction
    program, inner = reduction.program, condensed.arrangement.inner
    begin = NOTHING if start is None else np.ascontiguousarray(start[:, reduction.keep[inner]])
    x, z = np.empty((batch, program.n)), np.empty((batch, program.m))
    residual, steps = np.empty(batch), np.empty(batch, dtype=np.int64)
    states = np.empty((batch, condensed.arrangement.rows or len(inner)), dtype=np.int8)
    constants = (*condensed.constants, *data, program.cones.zero, condensed.lengths, begin)
    constants = (*constants, x, z, residual, states, steps)
    worst: list[float] = []
    run(lambda first, last, _: worst.append(shared_kernels.forward(*constants, first, last)), batch, threads)
    return Settled(x, z, residual, steps, SharedResult(condensed, states, _signs(condensed, states)), max(worst))


def _signs(condensed: Condensed, states: np.ndarray) -> np.ndarray:
    """Signs (B, 1-norms) of the variables in 1-norms, zero where pinned at zero."""
    absolute = condensed.reduction.box.absolute
    if not len(absolute):
        return NOTHING
    own = states[:, condensed.arrangement.position[absolute]]
    return np.where(own == 3, 1.0, np.where(own == -3, -1.0, 0.0))


def adjoint(
    result: SharedResult, data: Arrays, solution: Pair, upstream: Pair, threads: int | None = None
) -> tuple[Arrays, np.ndarray]:
    """Gradients (P, q, A, b) of the data, those of P and A summed (1, .) unless they are given per sample.

    Second, the relative residuals (B,) of the adjoint system.
    """
    from convexlearn.solvers.quadratic import shared_kernels

    condensed, (x, z) = result.condensed, solution
    batch = len(x)
    vx, vz, residual = np.empty_like(x), np.empty_like(z), np.empty(batch)
    sums = len(data[0]) == 1, len(data[2]) == 1
    gP, gA = (np.zeros((count(batch) if s else batch, f.shape[1])) for s, f in zip(sums, (data[0], data[2])))
    constants = (*condensed.constants, data[0], data[2], condensed.lengths, condensed.reduction.box.absolute)
    constants = (*constants, *upstream, x, z, result.states, result.sign, vx, vz, gP, gA, residual)

    def task(first: int, last: int, block: int) -> None:
        shared_kernels.backward(*constants, block if sums[0] else -1, block if sums[1] else -1, first, last)

    run(task, batch, threads)
    gP, gA = (g.sum(0, keepdims=True) if s and len(g) > 1 else g for g, s in zip((gP, gA), sums))
    return (gP, vx, gA, vz), residual
