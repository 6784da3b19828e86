"""Entry points of the compiled solver: ranges of lane blocks, forward and adjoint."""

from convexlearn.solvers.quadratic.adjoint import adjoint_solve, data_gradients, scale_entries, upstream
from convexlearn.solvers.quadratic.basis import DROP_ENTRIES, DROPS, let_go, take_back
from convexlearn.solvers.quadratic.equilibrate import (
    apply_scaling,
    find_scaling,
    load_block,
    load_field,
    mark_absent,
)
from convexlearn.solvers.quadratic.finish import finish
from convexlearn.solvers.quadratic.interior_point import interior, restore, start
from convexlearn.solvers.quadratic.layout import (
    ACT,
    ACTIVE,
    CODE,
    COST,
    DATA,
    DONE,
    END,
    HAND_OVER,
    I_FIELD,
    ITERATIONS,
    LIMIT,
    N_ABS,
    N_EQ,
    N_IN,
    N_K,
    N_L,
    N_LO,
    N_PAIR,
    N_UP,
    N_X,
    OK,
    ON,
    OUT,
    PENALTY_X,
    PENALTY_Y,
    QUADRATIC_X,
    QUADRATIC_Y,
    REG,
    REG_X,
    REG_Y,
    REGULARIZATION,
    RESIDUAL,
    ROUNDS,
    SCALE,
    SMOOTHING,
    TARGET,
    TOLERANCE,
    UNIT,
    WARM,
    C,
    Y,
)
from convexlearn.solvers.quadratic.polish import guess, polish
from convexlearn.solvers.quadratic.simd import (
    aligned,
    any_gt,
    full,
    get,
    helper,
    index,
    kernel,
    load,
    put,
    stage,
    store,
    where_gt,
)

EVERYTHING = 0b111111111
ENTRIES = 0b000101001  # P, A and G
FLOOR = 1e-3
DROPPING = 3  # the attempt after those that solve


@helper
def reset(w, I, F, options):
    """Registers of a block before its solve."""
    reg, zero = index(I, REG), full(w, 0.0)
    for name in (ACTIVE, DONE, CODE, ITERATIONS, RESIDUAL):
        store(F, reg + name, zero)
    for j in range(index(I, N_PAIR)):
        store(F, index(I, ACT) + j, zero)
    for i in range(index(I, N_X) + index(I, N_EQ) + index(I, N_PAIR)):
        store(F, index(I, Y) + i, zero)
    store(F, reg + PENALTY_X, full(w, get(options, QUADRATIC_X)))
    store(F, reg + PENALTY_Y, full(w, get(options, QUADRATIC_Y)))
    store(F, reg + REG_X, full(w, get(options, REGULARIZATION) + get(options, QUADRATIC_X)))
    store(F, reg + REG_Y, full(w, get(options, REGULARIZATION) + get(options, QUADRATIC_Y)))


@helper
def load_warm(w, I, F, point, active, order, block):
    """Y (equilibrated) and ACT from earlier solutions (B, N + limits) and active sets (B, pairs)."""
    n, N, y, act, scale = index(I, N_X), index(I, N_K), index(I, Y), index(I, ACT), index(I, SCALE)
    pairs, cost = index(I, N_PAIR), load(w, F, index(I, COST))
    unit = load(w, F, index(I, UNIT))
    load_field(w, F, y, N, point, 0, order, block)
    load_field(w, F, act, pairs, active, 0, order, block)
    for i in range(N):
        x = load(w, F, y + i) / (unit * load(w, F, scale + i))
        store(F, y + i, x if i < n else x * cost)


@stage
def solve_block(w, I, F, options):
    """Warm polish, interior point with early hand-over to the polish, interior point to full accuracy.

    Polished lanes then let go of dependent constraints, one at a time.
    """
    reg, rowless = index(I, REG), index(I, N_EQ) + index(I, N_IN) == 0
    smoothing, limit = get(options, SMOOTHING), get(options, LIMIT)
    unit = load(w, F, index(I, UNIT))
    store(F, reg + TARGET, load(w, F, index(I, COST)) * smoothing / (unit * unit))
    rounds, fresh, attempt, opened = int(get(options, ROUNDS)), False, 1, full(w, 0.0)
    if get(options, WARM) > 0.5:
        attempt = 0
    drops = max(DROPS, DROP_ENTRIES // max(index(I, N_L), 1))
    for left in range(DROPPING + drops, 0, -1):
        if attempt == 1 or attempt == 2:
            if attempt == 1:
                start(w, I, F)
            store(F, reg + ACTIVE, open_lanes(w, I, F))
            tolerance = get(options, TOLERANCE)
            if smoothing == 0.0 and rounds > 0:  # lanes that the polish refused go as far as they can
                tolerance = get(options, HAND_OVER) if attempt == 1 else FLOOR * tolerance
            interior(w, I, F, tolerance, limit)
            restore(w, I, F)
            if smoothing > 0.0 or rounds == 0:
                break
            guess(w, I, F)
        fresh = polish(w, I, F, rounds if attempt < DROPPING else 1)
        if attempt < DROPPING:
            if not fresh and (attempt == 0 or (attempt == 1 and any_gt(open_lanes(w, I, F), 0.5))):
                attempt += 1
                continue
            attempt = DROPPING
            opened = where_gt(load(w, F, reg + CODE), 0.5, 0.0, load(w, F, reg + DONE))
        else:
            kept = take_back(w, I, F, opened)
            fresh = fresh and not any_gt(opened - kept, 0.5)
            opened = kept
        # bounds and kinks of different variables are independent; lanes opened in the last round would stay open
        if rowless or left == 1:
            break
        opened = let_go(w, I, F, opened)
        if not any_gt(opened, 0.5):
            break
    finish(w, I, F, fresh)


@helper
def open_lanes(w, I, F):
    """1 in lanes that are neither polished nor certified."""
    reg = index(I, REG)
    return (1.0 - load(w, F, reg + DONE)) * where_gt(load(w, F, reg + CODE), 0.5, 0.0, full(w, 1.0))


@helper
def unload(w, F, slot, count, a, order, block):
    """Write slots to the rows order[block W : (block + 1) W] of the array a (rows, count)."""
    W = len(w)
    for k in range(W):
        lane = W - 1 - k  # downwards: lanes that pad the last block repeat its last sample and must not win
        start = index(order, block * W + lane) * count
        at = slot * W + lane
        for i in range(count):
            put(a, start + i, get(F, at + i * W))


@stage
def report(w, I, F, out, info, active, order, block):
    """Solution, active set, and (code, iterations, residual, done) of the samples of a block."""
    length = index(I, N_K) + index(I, N_LO) + index(I, N_UP) + index(I, N_ABS)
    unload(w, F, index(I, OUT), length, out, order, block)
    unload(w, F, index(I, ACT), index(I, N_PAIR), active, order, block)
    unload(w, F, index(I, REG) + CODE, 4, info, order, block)


@kernel
def solve_range(w, I, fields, shared, order, first, last, options, point, active, out, info, found, state):
    """Solve blocks first..last-1; `point` and `active` are read when options[WARM] is set."""
    F = aligned(index(I, END), len(w))
    kept = index(I, DATA)
    for block in range(first, last):
        reset(w, I, F, options)
        load_block(w, I, F, fields, shared, order, block, EVERYTHING)
        mark_absent(w, I, F)
        if block == first or shared & ENTRIES != ENTRIES:
            find_scaling(w, I, F)
        apply_scaling(w, I, F)
        if get(options, WARM) > 0.5:
            load_warm(w, I, F, point, active, order, block)
        solve_block(w, I, F, options)
        report(w, I, F, out, info, found, order, block)
        for k in range(kept):
            store(state, block * kept + k, load(w, F, k))


@helper
def unload_gradients(w, I, F, shared, order, block, gradients, totals, chunk):
    """Rows of batched fields; shared fields are added, lane by lane, to row `chunk` of the totals."""
    data = index(I, DATA)
    row = chunk * (index(I, ON) - data)
    for f in range(9):
        slot, count = index(I, index(I, I_FIELD) + f), index(I, index(I, I_FIELD) + 9 + f)
        if (shared >> f) & 1:
            for i in range(slot, slot + count):
                store(totals, row + i, load(w, totals, row + i) + load(w, F, data + i))
        else:
            unload(w, F, data + slot, count, gradients[f], order, block)


@helper
def reset_adjoint(w, I, F, options, remaining):
    """Registers of a block before its adjoint; lanes from `remaining` on repeat a sample and are off."""
    reg = index(I, REG)
    store(F, reg + REG_X, full(w, get(options, REGULARIZATION)))
    store(F, reg + REG_Y, full(w, get(options, REGULARIZATION)))
    for lane in range(remaining, len(w)):
        put(F, index(I, OK) * len(w) + lane, 0.0)


@kernel
def adjoint_range(
    w, I, fields, shared, order, first, last, options, upper, state, gradients, totals, chunk, lam, batch
):
    """Adjoint of blocks first..last-1 for upstream gradients `upper` (B, N + limits), of lanes below the batch."""
    W = len(w)
    F = aligned(index(I, END), W)
    kept, c = index(I, DATA), index(I, C)
    length = index(I, ON) - c
    for block in range(first, last):
        for k in range(kept):
            store(F, k, load(w, state, block * kept + k))
        reset_adjoint(w, I, F, options, batch - block * W)
        load_block(w, I, F, fields, shared, order, block, ENTRIES)
        load_field(w, F, c, length, upper, 0, order, block)
        scale_entries(w, I, F)
        upstream(w, I, F)
        adjoint_solve(w, I, F)
        data_gradients(w, I, F)
        unload_gradients(w, I, F, shared, order, block, gradients, totals, chunk)
        if len(lam) > 0:
            unload(w, F, index(I, Y), index(I, N_K), lam, order, block)
