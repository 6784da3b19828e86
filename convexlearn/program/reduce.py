"""Program -> smaller BoxProgram: defined variables out, bounds folded, 1-norm epigraphs recognised."""

from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from convexlearn.parallel import block_of, run
from convexlearn.program.classify import Roles, classify
from convexlearn.program.elimination import Pivots, choose_pivots
from convexlearn.program.program import Program, Sparsity
from convexlearn.program.substitution import Substituted, Tape, substitute


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


Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # P, q, A, b of a Program, each (1 or B, .)
Pair = tuple[np.ndarray, np.ndarray]  # x (B, n) and z (B, m), or gradients to them
NO_SIGN = np.zeros((0, 0))
TAPE_SAMPLES = 4


@dataclass(frozen=True, eq=False)
class Reduction:
    """A program, its reduced form, and the exact maps between their data and solutions.

    Vectors travel packed: `restrict` gives rows [q, b, h, l, u, w, up, down] of lengths `widths`,
    `lift` takes rows [x, y, z, lower, upper, v] of lengths `dual_widths`; (up, down) are the
    right-hand sides of the rows of 1-norm epigraphs, in units of x and zero in the primal problem.

    The adjoint needs no derivative of the reduction: the optimality conditions of the full active
    set are linear, and are reduced and lifted by the same maps with (q, b) = (-dx, dz).
    """

    program: Program
    box: BoxProgram
    reduced: Substituted
    plan: np.ndarray
    coef: np.ndarray
    take_A: np.ndarray
    take_G: np.ndarray
    keep: np.ndarray
    widths: tuple[int, ...]
    dual_widths: tuple[int, ...]
    ends: tuple[int, ...] = field(init=False)
    dual_ends: tuple[int, ...] = field(init=False)
    block: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends", tuple(accumulate(self.widths)))
        object.__setattr__(self, "dual_ends", tuple(accumulate(self.dual_widths)))
        object.__setattr__(self, "block", block_of(self.program.A.nnz + self.program.P.nnz))

    def matrices(
        self, P: np.ndarray, A: np.ndarray, threads: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Stored entries (k, .) of the reduced P, A and G; k = 1 when P and A are shared."""
        tape = self.reduced.tape
        if tape is None:
            return P, A[:, self.take_A], A[:, self.take_G]
        out = np.empty((max(len(P), len(A)), tape.results))
        run(lambda i, j, _: _play(tape, P, A, out, range(i, j)), len(out), threads, self.block)
        quadratic = self.reduced.P.nnz
        constraints = out[:, quadratic:]
        return out[:, :quadratic], constraints[:, self.take_A], constraints[:, self.take_G]

    def restrict(self, data: Arrays, batch: int, *, sense: float = 1.0, threads: int | None = None) -> np.ndarray:
        """Packed vectors (B, sum(widths)) of the reduced program with (sense q, b)."""
        from convexlearn.program.reduction_kernels import restrict

        out = np.empty((batch, self.ends[-1]))
        run(lambda i, j, _: restrict(self.plan, self.coef, *data, sense, out, i, j), batch, threads, self.block)
        return out

    def restrict_adjoint(
        self, data: Arrays, upstream: Pair, sign: np.ndarray, threads: int | None = None
    ) -> np.ndarray:
        """Packed right-hand sides of the adjoint system from upstream gradients dx (B, n) and dz (B, m).

        sign: (B, 1-norms) signs of the solution's variables in 1-norms; (up - down) / 2 is then the
        upstream gradient of v where the sign is zero.
        """
        (P, _, A, _), (dx, dz) = data, upstream
        packed = self.restrict((P, dx, A, dz), len(dx), sense=-1.0, threads=threads)
        if len(self.box.absolute):
            packed[:, self.box.absolute] += sign * packed[:, self.ends[4] : self.ends[5]]
        return packed

    def lift(self, data: Arrays, packed: np.ndarray, *, ray: bool = False, threads: int | None = None) -> Pair:
        """x (B, n) and z (B, m) of the program from packed rows (B, sum(dual_widths)).

        ray: the rows are certificates of infeasibility or unboundedness, so q, b and Px count as zero.
        """
        return self._lift(data, packed, 1.0, NO_SIGN, ray, threads)

    def lift_adjoint(
        self, data: Arrays, packed: np.ndarray, upstream: Pair, sign: np.ndarray, threads: int | None = None
    ) -> Pair:
        """The adjoint (vx, vz) of the program from that of the reduced one; v is ignored."""
        (P, _, A, _), (dx, dz) = data, upstream
        return self._lift((P, dx, A, dz), packed, -1.0, sign, False, threads)

    def _lift(
        self, data: Arrays, packed: np.ndarray, sense: float, sign: np.ndarray, ray: bool, threads: int | None
    ) -> Pair:
        from convexlearn.program.reduction_kernels import lift

        batch = len(packed)
        x, z = np.empty((batch, self.program.n)), np.empty((batch, self.program.m))
        constants = (self.plan, self.coef, *data, sense, packed, sign, ray, x, z)
        run(lambda i, j, _: lift(*constants, i, j), batch, threads, self.block)
        return x, z

    def split(self, packed: np.ndarray) -> dict[str, np.ndarray]:
        """The vectors of `restrict` by name, contiguous: q, b, h, l, u, w, up, down."""
        parts = np.split(packed, self.ends[:-1], axis=1)
        return {k: np.ascontiguousarray(v) for k, v in zip(("q", "b", "h", "l", "u", "w", "up", "down"), parts)}

    def project(self, x: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Packed rows of the reduced solution from a full one (x, z): the left inverse of `lift`."""
        roles = self._parts()
        lower, upper = roles["LOWER_ROW"], roles["UPPER_ROW"]
        scale = np.abs(self.coef[: len(lower) + len(upper)])
        a = self.coef[len(scale) : len(scale) + len(roles["ABS_T"])]
        return np.concatenate(
            [
                x[:, self.keep],
                z[:, roles["EQUAL"]],
                z[:, roles["INEQUAL"]],
                z[:, lower] * scale[: len(lower)],
                z[:, upper] * scale[len(lower) :],
                (z[:, roles["ABS_UP"]] - z[:, roles["ABS_DOWN"]]) * a,
            ],
            axis=1,
        )

    def _parts(self) -> dict[str, np.ndarray]:
        return {name: self.plan[self.plan[i] : self.plan[i + 1]] for i, name in enumerate(PARTS)}


def _play(tape: Tape, P: np.ndarray, A: np.ndarray, out: np.ndarray, samples: range) -> None:
    """Results of a tape for some samples, a few at a time since the workspace is larger than the results."""
    from convexlearn.program.reduction_kernels import add_gram, play

    value = np.empty((min(TAPE_SAMPLES, len(samples)), tape.size))
    for first in samples[::TAPE_SAMPLES]:
        rows = value[: samples.stop - first]
        play(tape.ops, tape.scale, P, A, rows, first)
        for gram in tape.grams:
            add_gram(gram.left, gram.right, gram.position, gram.scale, rows)
        out[first : first + len(rows)] = rows[:, tape.size - tape.results :]


# Index lists of `plan`, in order; reduction_kernels numbers them.
PARTS = (
    *("PIVOT_ROW", "PIVOT_COL", "PIVOT_ENTRY", "POINTER", "ENTRY", "ENTRY_COL"),
    *("CHAIN_POINTER", "CHAIN", "CHAIN_COL", "DEFINED_COLS", "KEPT_ROWS"),
    *("P_ROW", "P_COL", "A_ROW", "A_COL", "KEEP", "EQUAL", "INEQUAL"),
    *("LOWER_ROW", "LOWER_COL", "UPPER_ROW", "UPPER_COL", "ABS_T", "ABS_X", "ABS_UP", "ABS_DOWN"),
)


def reduce(program: Program) -> Reduction:
    """Analyse a polyhedral program once; everything that follows is per data.

    Reductions apply only where the pattern and the fixed values prove them: variables defined by an
    equality row with a fixed coefficient, epigraph variables without cost pinned at their bound,
    single-variable rows as bounds, 1-norm epigraphs with a weight that must be nonnegative.
    """
    pivots = choose_pivots(program)
    reduced = substitute(program, pivots)
    roles = classify(program, pivots, reduced)
    gone = np.zeros(program.n, dtype=bool)
    gone[pivots.cols] = True
    gone[[a.t for a in roles.absolute]] = True
    keep = np.flatnonzero(~gone).astype(np.int32)
    box, take_A, take_G = _box(program, reduced, roles, keep)
    plan, coef = _plan(program, pivots, roles, keep)
    widths = (box.n, box.A.shape[0], box.G.shape[0], len(box.lower), len(box.upper))
    extra = (len(box.absolute),)
    return Reduction(program, box, reduced, plan, coef, take_A, take_G, keep, widths + 3 * extra, widths + extra)


def _box(
    program: Program, reduced: Substituted, roles: Roles, keep: np.ndarray
) -> tuple[BoxProgram, np.ndarray, np.ndarray]:
    number = np.full(program.n, -1, dtype=np.int32)
    number[keep] = np.arange(len(keep), dtype=np.int32)
    P = Sparsity(number[reduced.P.rows], number[reduced.P.cols], (len(keep), len(keep)))
    A, take_A = _rows(reduced.A, np.array(roles.equalities, dtype=np.int32), number)
    G, take_G = _rows(reduced.A, np.array(roles.inequalities, dtype=np.int32), number)
    lower, upper, absolute = (
        number[np.array(v, dtype=np.int32)]
        for v in ([b[0] for b in roles.lower], [b[0] for b in roles.upper], [a.x for a in roles.absolute])
    )
    return BoxProgram(len(keep), P, A, G, lower, upper, absolute), take_A, take_G


def _rows(A: Sparsity, rows: np.ndarray, number: np.ndarray) -> tuple[Sparsity, np.ndarray]:
    """Pattern of some rows, and the positions of their entries."""
    where = np.full(A.shape[0], -1, dtype=np.int32)
    where[rows] = np.arange(len(rows), dtype=np.int32)
    take = np.flatnonzero(where[A.rows] >= 0) if A.nnz else np.zeros(0, dtype=np.int64)
    shape = (len(rows), int(number.max(initial=-1)) + 1)
    return Sparsity(where[A.rows[take]], number[A.cols[take]], shape), take


def _plan(program: Program, pivots: Pivots, roles: Roles, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index lists (header and `PARTS`) and coefficients [lower, upper, a, c] for the compiled loops."""
    A, P = program.A, program.P
    order = np.argsort(A.rows, kind="stable")
    starts = np.searchsorted(A.rows[order], np.arange(program.m + 1))
    entries, own = [], []
    for row, col in zip(pivots.rows.tolist(), pivots.cols.tolist()):
        row_entries = order[starts[row] : starts[row + 1]]
        own.append(row_entries[A.cols[row_entries] == col])
        entries.append(row_entries[A.cols[row_entries] != col])
    pointer = np.cumsum([0, *(len(e) for e in entries)])
    others = np.concatenate([*entries, np.zeros(0, np.int64)]).astype(np.int64)
    defined, gone = np.zeros(program.n, dtype=bool), np.zeros(program.m, dtype=bool)
    defined[pivots.cols], gone[pivots.rows] = True, True
    chain = [e[defined[A.cols[e]]] for e in entries]  # definitions by variables that are themselves defined
    links = np.concatenate([*chain, np.zeros(0, np.int64)]).astype(np.int64)
    absolute = [[a.t for a in roles.absolute], [a.x for a in roles.absolute]]
    absolute += [[a.up for a in roles.absolute], [a.down for a in roles.absolute]]
    lists = [
        *(pivots.rows, pivots.cols, np.concatenate([*own, np.zeros(0, np.int64)]), pointer, others, A.cols[others]),
        *(np.cumsum([0, *(len(e) for e in chain)]), links, A.cols[links]),
        *(np.flatnonzero(defined[A.cols]), np.flatnonzero(~gone[A.rows])),
        *(P.rows, P.cols, A.rows, A.cols, keep, roles.equalities, roles.inequalities),
        *([b[1] for b in roles.lower], [b[0] for b in roles.lower]),
        *([b[1] for b in roles.upper], [b[0] for b in roles.upper], *absolute),
    ]
    arrays = [np.asarray(v, dtype=np.int32) for v in lists]
    header = len(PARTS) + 1 + np.cumsum([0, *(len(v) for v in arrays)])
    coef = [b[2] for b in roles.lower] + [b[2] for b in roles.upper]
    coef += [a.a for a in roles.absolute] + [a.c for a in roles.absolute]
    return np.concatenate([header.astype(np.int32), *arrays]), np.array(coef, dtype=np.float64)
