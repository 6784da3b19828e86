"""Rows of samples side by side as explicit LLVM vectors: numba does not vectorize loops over them by itself.

Blocks are arrays (rows, samples). `add_scaled` is the only hot operation on them: everything that multiplies with
a sparse matrix is made of it. `axpy` is the same for small dense matrices, one sample at a time. Import this
module only when something is to be solved.
"""

from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

from convexlearn.program.compiled import njit

WIDTH = 32
LANES = 8
ALL, SOME, ONE = (0,) * WIDTH, (0,) * LANES, (0,)  # a number of lanes travels as the length of a tuple
FLAGS = ("contract", "nsz")
intrinsic: Any = extending.intrinsic  # its result takes one argument less than the function it decorates


@intrinsic
def _add_combination(typing_context, w, out, i, scales, x, positions):
    """len(w) entries of `out` from position i += sum_k scales[k] * (those of x from positions[k]); unchecked."""

    def generate(context, builder, sig, args):
        vector = ir.VectorType(ir.DoubleType(), len(w))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), len(w)), [0] * len(w))
        undefined = ir.Constant(vector, ir.Undefined)

        def lanes(array: int, position: Any, kind: Any) -> Any:
            k = context.cast(builder, position, kind, types.intp)
            data = cgutils.create_struct_proxy(sig.args[array])(context, builder, args[array]).data
            return builder.bitcast(builder.gep(data, [k]), vector.as_pointer())

        target = lanes(1, args[2], sig.args[2])
        total = builder.load(target, align=8)
        for k in range(len(scales)):
            first = builder.insert_element(undefined, builder.extract_value(args[3], k), ir.Constant(ir.IntType(32), 0))
            scale = builder.shuffle_vector(first, undefined, zeros)
            source = lanes(4, builder.extract_value(args[5], k), sig.args[5][k])
            total = builder.fadd(total, builder.fmul(scale, builder.load(source, align=8), flags=FLAGS), flags=FLAGS)
        builder.store(total, target, align=8)
        return context.get_dummy_value()

    return types.void(w, out, i, types.UniTuple(types.float64, len(scales)), x, positions), generate


def inlined(function: Any) -> Any:
    """A helper whose body replaces its calls before compilation, so that no references to arrays are counted."""
    return njit(error_model="numpy", no_cfunc_wrapper=True, no_cpython_wrapper=True, inline="always")(function)


@inlined
def add_scaled(out, i, a, x, c):
    """out[i] += a x[c] for blocks (rows, samples) of one width."""
    width = out.shape[1]
    if width == WIDTH:
        _add_combination(ALL, out, i * WIDTH, (a,), x, (c * WIDTH,))
    elif width % LANES == 0:
        for j in range(0, width, LANES):
            _add_combination(SOME, out, i * width + j, (a,), x, (c * width + j,))
    else:
        for j in range(width):
            out[i, j] += a * x[c, j]


@inlined
def axpy(out, i, a, x, c, n):
    """n entries of `out` from flat position i += a times those of x from c; `out` and x are contiguous."""
    for j in range(0, n - LANES + 1, LANES):
        _add_combination(SOME, out, i + j, (a,), x, (c + j,))
    for j in range(n - n % LANES, n):
        _add_combination(ONE, out, i + j, (a,), x, (c + j,))


@inlined
def add_eight(out, i, scales, x, c, step):
    """LANES entries of `out` from flat position i += those of x from c, c + step, ..., times eight scales."""
    positions = (c, c + step, c + 2 * step, c + 3 * step, c + 4 * step, c + 5 * step, c + 6 * step, c + 7 * step)
    _add_combination(SOME, out, i, scales, x, positions)


@inlined
def block_width(remaining):
    """Samples in the next block: a multiple of LANES while there are so many."""
    width = min(WIDTH, remaining)
    return width if width <= LANES else width - width % LANES
