"""The vector type: W problems side by side, one per lane, as an explicit LLVM vector <W x double>.

Plain loops over lanes are not vectorized by numba, hence a numba type that maps to the vector. The
lane count travels as the type of a tuple argument `w = (0,) * W`, so one source serves every W. A
workspace F is a flat float64 array of slots; slot k holds the lanes F[k W : (k + 1) W]. Access is
unchecked: indices are validated in Python before a kernel is entered.
"""

import contextlib
import hashlib
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model

FLAGS = ("contract", "nsz")
njit: Any = numba.njit
intrinsic: Any = extending.intrinsic  # its result takes one argument less than the function it decorates
KERNEL_FILES = (
    *("layout.py", "simd.py", "ldl.py", "equilibrate.py", "newton.py", "interior_point.py", "certificates.py"),
    *("basis.py", "polish.py", "finish.py", "adjoint.py", "kernels.py"),
)


def helper(function: Callable) -> Any:
    """Compile a function that is called from compiled code only."""
    return njit(error_model="numpy", no_cfunc_wrapper=True, no_cpython_wrapper=True)(function)


def stage(function: Callable) -> Any:
    """A helper that is inlined before compilation: nested helpers would be optimized once per level."""
    return njit(error_model="numpy", no_cfunc_wrapper=True, no_cpython_wrapper=True, inline="always")(function)


def kernel(function: Callable) -> Any:
    """Compile an entry point that releases the GIL; cached on disk wherever a directory is writable."""
    options = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
    try:
        dispatcher = njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package directory nor the user's cache is writable
        return njit(**options)(function)
    # numba's cache looks at the entry point's own file; a change in a helper's file must count too
    with contextlib.suppress(AttributeError):
        dispatcher._cache._cache_file._source_stamp = _source_digest(Path(function.__code__.co_filename).parent)
    return dispatcher


def _source_digest(own: Path) -> str:
    """Digest of the files here and of those beside the entry point, where that is another folder."""
    folder = Path(__file__).parent
    others = [] if own == folder else sorted(own.glob("*.py"))
    sources = b"".join(path.read_bytes() for path in [*(folder / name for name in KERNEL_FILES), *others])
    return hashlib.sha256(sources).hexdigest()


class Vector(types.Type):
    """The numba type of W float64 lanes."""

    def __init__(self, W: int):
        self.W = W
        super().__init__(f"Vector{W}")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector):
        super().__init__(manager, vector, ir.VectorType(ir.DoubleType(), vector.W))


def _splat(context: Any, builder: Any, value: Any, numba_type: Any, W: int) -> Any:
    """All lanes equal to a scalar; a vector stays as it is."""
    if isinstance(numba_type, Vector):
        return value
    scalar = context.cast(builder, value, numba_type, types.float64)
    vector = ir.VectorType(ir.DoubleType(), W)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), W), [0] * W))


def _define_operator(op: Any, emit: Callable) -> None:
    """Make `op` work on vectors and on a vector with a scalar."""

    class Template(AbstractTemplate):
        key = op

        def generic(self, args: Any, kws: Any) -> Any:
            vectors = [a for a in args if isinstance(a, Vector)]
            return signature(vectors[0], *args) if len(args) == 2 and vectors else None

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pairs = zip(args, sig.args)
        return emit(builder, *[_splat(context, builder, x, t, sig.return_type.W) for x, t in pairs])

    register: Any = infer_global(op)
    register(Template)
    for left, right in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(op, left, right)(lower)


_define_operator(operator.add, lambda b, x, y: b.fadd(x, y, flags=FLAGS))
_define_operator(operator.sub, lambda b, x, y: b.fsub(x, y, flags=FLAGS))
_define_operator(operator.mul, lambda b, x, y: b.fmul(x, y, flags=FLAGS))
_define_operator(operator.truediv, lambda b, x, y: b.fdiv(x, y, flags=FLAGS))


def _slot(context: Any, builder: Any, array: tuple, index: tuple, W: int) -> Any:
    """Pointer to the lanes of a slot; `array` and `index` are (value, numba type)."""
    k = context.cast(builder, *index, types.intp)
    data = cgutils.create_struct_proxy(array[1])(context, builder, array[0]).data
    pointer = builder.gep(data, [builder.mul(k, ir.Constant(k.type, W))])
    return builder.bitcast(pointer, ir.VectorType(ir.DoubleType(), W).as_pointer())


@intrinsic
def load(typing_context, w, F, k):
    """The lanes of slot k of the workspace F."""
    vector = Vector(len(w))

    def generate(context, builder, sig, args):
        pointer = _slot(context, builder, (args[1], sig.args[1]), (args[2], sig.args[2]), vector.W)
        return builder.load(pointer, align=8)

    return vector(w, F, k), generate


@intrinsic
def store(typing_context, F, k, x):
    """Write the lanes x to slot k of the workspace F."""

    def generate(context, builder, sig, args):
        W = sig.args[2].W
        builder.store(args[2], _slot(context, builder, (args[0], sig.args[0]), (args[1], sig.args[1]), W), align=8)
        return context.get_dummy_value()

    return types.void(F, k, x), generate


@intrinsic
def full(typing_context, w, x):
    """All lanes equal to the scalar x."""
    vector = Vector(len(w))
    return vector(w, x), lambda context, builder, sig, args: _splat(context, builder, args[1], sig.args[1], vector.W)


def _select(typing_context, comparison, x, y, p, q):
    vector = next(t for t in (x, y, p, q) if isinstance(t, Vector))

    def generate(context, builder, sig, args):
        a, b, yes, no = (_splat(context, builder, v, t, vector.W) for v, t in zip(args, sig.args))
        return builder.select(builder.fcmp_ordered(comparison, a, b), yes, no)

    return vector(x, y, p, q), generate


@intrinsic
def where_gt(typing_context, x, y, p, q):
    """Lane by lane p where x > y, else q (also where x or y is NaN); no arithmetic, so NaN can't spread."""
    return _select(typing_context, ">", x, y, p, q)


@intrinsic
def vmin(typing_context, x, y):
    """Lane by lane x where x < y, else y."""
    vector = x if isinstance(x, Vector) else y

    def generate(context, builder, sig, args):
        a, b = (_splat(context, builder, v, t, vector.W) for v, t in zip(args, sig.args))
        return builder.select(builder.fcmp_ordered("<", a, b), a, b)

    return vector(x, y), generate


@intrinsic
def vmax(typing_context, x, y):
    """Lane by lane x where x > y, else y; NaN in y wins, so keep the accumulator in x to see NaN."""
    vector = x if isinstance(x, Vector) else y

    def generate(context, builder, sig, args):
        a, b = (_splat(context, builder, v, t, vector.W) for v, t in zip(args, sig.args))
        return builder.select(builder.fcmp_ordered(">", a, b), a, b)

    return vector(x, y), generate


def _unary_intrinsic(builder: Any, name: str, x: Any) -> Any:
    function = ir.FunctionType(x.type, [x.type])
    declared = cgutils.get_or_insert_function(builder.module, function, f"{name}.v{x.type.count}f64")
    return builder.call(declared, [x])


@intrinsic
def vabs(typing_context, x):
    """Lane by lane |x|."""
    return x(x), lambda context, builder, sig, args: _unary_intrinsic(builder, "llvm.fabs", args[0])


@intrinsic
def vsqrt(typing_context, x):
    """Lane by lane the square root; NaN below zero."""
    return x(x), lambda context, builder, sig, args: _unary_intrinsic(builder, "llvm.sqrt", args[0])


@intrinsic
def power_of_two(typing_context, x):
    """Lane by lane the largest power of two below x > 0: scaling by it is exact."""

    def generate(context, builder, sig, args):
        integers = ir.VectorType(ir.IntType(64), x.W)
        exponent = ir.Constant(integers, [0x7FF0000000000000] * x.W)
        return builder.bitcast(builder.and_(builder.bitcast(args[0], integers), exponent), args[0].type)

    return x(x), generate


@intrinsic
def half_power(typing_context, x):
    """Lane by lane a power of two within a factor 2 of 1/sqrt(x), x > 0 and normal: bit shifts, no division."""

    def generate(context, builder, sig, args):
        integers = ir.VectorType(ir.IntType(64), x.W)
        shift, bias = (ir.Constant(integers, [k] * x.W) for k in (52, 1023))
        exponent = builder.sub(builder.lshr(builder.bitcast(args[0], integers), shift), bias)
        half = builder.ashr(exponent, ir.Constant(integers, [1] * x.W))
        return builder.bitcast(builder.shl(builder.sub(bias, half), shift), args[0].type)

    return x(x), generate


@helper
def aligned(slots, W):
    """An uninitialized workspace of slots on a cache line boundary: vectors that straddle lines cost twice."""
    raw = np.empty(slots * W + 8)
    skip = (-(raw.ctypes.data >> 3)) % 8
    return raw[skip : skip + slots * W]


@intrinsic
def any_gt(typing_context, x, y):
    """True when x > y in some lane."""

    def generate(context, builder, sig, args):
        W = x.W
        mask = builder.fcmp_ordered(">", args[0], _splat(context, builder, args[1], sig.args[1], W))
        bits = builder.bitcast(mask, ir.IntType(W))
        return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))

    return types.boolean(x, y), generate


def _element(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    k = context.cast(builder, args[1], sig.args[1], types.intp)
    return builder.gep(cgutils.create_struct_proxy(sig.args[0])(context, builder, args[0]).data, [k])


@intrinsic
def index(typing_context, I, k):
    """I[k] of an integer array as intp, without wraparound or bounds check."""

    def generate(context, builder, sig, args):
        value = builder.load(_element(context, builder, sig, args))
        return context.cast(builder, value, sig.args[0].dtype, types.intp)

    return types.intp(I, k), generate


@intrinsic
def get(typing_context, a, k):
    """a[k] without wraparound or bounds check."""
    return a.dtype(a, k), lambda context, builder, sig, args: builder.load(_element(context, builder, sig, args))


@intrinsic
def put(typing_context, a, k, x):
    """a[k] = x without wraparound or bounds check."""

    def generate(context, builder, sig, args):
        value = context.cast(builder, args[2], sig.args[2], sig.args[0].dtype)
        builder.store(value, _element(context, builder, sig, args))
        return context.get_dummy_value()

    return types.void(a, k, x), generate
