"""Eight numbers at once: what the kernels are written in, so that no compiler has to find it out.

Enters: rows of NumPy arrays. Leaves: operations of numba on eight lanes, `+ - * / & | ^ << >>` and comparisons among
them; the formats bf16 and fp16 by their bits. Invariants: an operation does in each lane what it does to one number,
and in fp32 rounds each step on its own; what lies beyond the end of a row is read as 0 and never written.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic
from numba.extending import lower_builtin, models, register_model, type_callable

from .kernel_compiler import INLINE

# untyped: a kernel calls an intrinsic without its first argument
intrinsic: Any = numba_intrinsic

LANES = 8
BF16, FP16, FP32 = 0, 1, 2


class Lanes(types.Type):
    """A vector of `count` elements: one register of the processor, or two."""

    def __init__(self, name: str, element: ir.Type, count: int = LANES):
        super().__init__(name)
        self.element, self.count = element, count


F32, F64 = Lanes("f32x8", ir.FloatType()), Lanes("f64x8", ir.DoubleType())
I32, BOOL = Lanes("i32x8", ir.IntType(32)), Lanes("boolx8", ir.IntType(1))
SUM = Lanes("f64x4", ir.DoubleType(), LANES // 2)


def _vector(element: ir.Type, count: int = LANES) -> ir.VectorType:
    return ir.VectorType(element, count)


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _vector(kind.element, kind.count))


def _operation(of: Callable, build: Callable, kinds: tuple[Lanes, ...], result: Lanes | None = None):
    """Let `of`(lanes, lanes) be `build`(builder)(left, right) for these kinds of lanes."""

    @type_callable(of)
    def _type(context):
        return lambda left, right: (result or left) if left in kinds and left == right else None

    for kind in kinds:

        @lower_builtin(of, kind, kind)
        def _lower(context, builder, sig, args):
            return build(builder)(*args)


def _compare(sign: str, kind: Lanes) -> Callable:
    name = "fcmp_ordered" if kind is F32 else "icmp_signed"
    return lambda builder: functools.partial(getattr(builder, name), sign)


for _of, _name in ((operator.add, "add"), (operator.sub, "sub"), (operator.mul, "mul"), (operator.truediv, "div")):
    _operation(_of, operator.attrgetter(f"f{_name}"), (F32, F64))
_operation(operator.add, operator.attrgetter("add"), (I32,))
_operation(operator.sub, operator.attrgetter("sub"), (I32,))
_operation(operator.lshift, operator.attrgetter("shl"), (I32,))
_operation(operator.rshift, operator.attrgetter("lshr"), (I32,))
for _of, _name in ((operator.and_, "and_"), (operator.or_, "or_"), (operator.xor, "xor")):
    _operation(_of, operator.attrgetter(_name), (I32, BOOL))
for _of, _name in ((operator.gt, ">"), (operator.ge, ">="), (operator.eq, "=="), (operator.ne, "!=")):
    for _kind in (F32, I32):
        _operation(_of, _compare(_name, _kind), (_kind,), BOOL)


def _splat(builder, value, kind: Lanes):
    one = builder.insert_element(ir.Constant(_vector(kind.element), ir.Undefined), value, ir.IntType(32)(0))
    order = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(one, one, order)


@intrinsic
def floats(typingctx, value):
    """One fp32 number in all lanes."""
    if value == types.float32:
        return F32(value), lambda context, builder, sig, args: _splat(builder, args[0], F32)


@intrinsic
def ints(typingctx, value):
    """One number of 32 bits in all lanes."""
    if isinstance(value, types.Integer):

        def build(context, builder, sig, args):
            return _splat(builder, context.cast(builder, args[0], value, types.int32), I32)

        return I32(value), build


@intrinsic
def nothing(typingctx):
    """A sum in fp64 at its beginning, four lanes."""
    return SUM(), lambda context, builder, sig, args: ir.Constant(_vector(SUM.element, SUM.count), None)


@intrinsic
def select(typingctx, condition, yes, no):
    if condition == BOOL and yes == no and isinstance(yes, Lanes):
        return yes(condition, yes, no), lambda context, builder, sig, args: builder.select(*args)


@intrinsic
def bits(typingctx, numbers):
    """The patterns of fp32 numbers."""
    if numbers == F32:
        return I32(F32), lambda context, builder, sig, args: builder.bitcast(args[0], _vector(I32.element))


@intrinsic
def numbers(typingctx, patterns):
    """The fp32 numbers of patterns."""
    if patterns == I32:
        return F32(I32), lambda context, builder, sig, args: builder.bitcast(args[0], _vector(F32.element))


@intrinsic
def wide(typingctx, narrow):
    """fp32 as fp64."""
    if narrow == F32:
        return F64(F32), lambda context, builder, sig, args: builder.fpext(args[0], _vector(F64.element))


@intrinsic
def byte_of(typingctx, conditions):
    """Eight conditions as the bits of a byte, the first the lowest."""
    if conditions == BOOL:
        return types.uint8(BOOL), lambda context, builder, sig, args: builder.bitcast(args[0], ir.IntType(8))


@intrinsic
def conditions_of(typingctx, byte):
    """The inverse of `byte_of`."""
    if isinstance(byte, types.Integer):

        def build(context, builder, sig, args):
            return builder.bitcast(context.cast(builder, args[0], byte, types.uint8), _vector(BOOL.element))

        return BOOL(byte), build


@intrinsic
def count(typingctx, conditions):
    """How many of eight conditions hold."""
    if conditions == BOOL:

        def build(context, builder, sig, args):
            return builder.zext(builder.ctpop(builder.bitcast(args[0], ir.IntType(8))), ir.IntType(64))

        return types.int64(BOOL), build


@intrinsic
def counted(typingctx, conditions):
    """-1 in the lanes whose condition holds, else 0."""
    if conditions == BOOL:
        return I32(BOOL), lambda context, builder, sig, args: builder.sext(args[0], _vector(I32.element))


@intrinsic
def plus_products(typingctx, so_far, a, b):
    """`so_far` + a·b of eight lanes, first of the lower four, then of the upper four; each step is rounded once.

    Of numbers that were fp32 a product is exact in fp64, so that the bits are those of a product and a sum.
    """
    if so_far == SUM and a == b == F64:

        def build(context, builder, sig, args):
            kind = _vector(SUM.element, SUM.count)
            fma = builder.module.declare_intrinsic("llvm.fma.v4f64", (), ir.FunctionType(kind, [kind] * 3))
            result = args[0]
            for first in (0, SUM.count):
                part = ir.Constant(ir.VectorType(ir.IntType(32), SUM.count), list(range(first, first + SUM.count)))
                x, y = (builder.shuffle_vector(lanes, lanes, part) for lanes in args[1:])
                result = builder.call(fma, [x, y, result])
            return result

        return SUM(SUM, F64, F64), build


@intrinsic
def total(typingctx, lanes):
    """The sum of all lanes, in halves."""
    if lanes in (SUM, I32):

        def build(context, builder, sig, args):
            add = builder.fadd if lanes == SUM else builder.add
            parts = [builder.extract_element(args[0], ir.IntType(32)(i)) for i in range(lanes.count)]
            while len(parts) > 1:
                half = len(parts) // 2
                parts = [add(a, b) for a, b in zip(parts[:half], parts[half:], strict=True)]
            return parts[0]

        return (types.float64 if lanes == SUM else types.int32)(lanes), build


def _place(context, builder, array_type, array, at, stop):
    """(pointer to the entry, whether eight lie before the stop, bytes before the stop)."""
    entries = context.make_array(array_type)(context, builder, array)
    left, size = builder.sub(stop, at), array_type.dtype.bitwidth // 8
    return builder.gep(entries.data, [at]), builder.icmp_signed(">=", left, left.type(LANES)), left, size


@intrinsic
def load(typingctx, array, at, stop):
    """Eight entries of a C-contiguous array from `at` on, counted in memory order; 0 from `stop` on, the row's end.

    16-bit patterns come as numbers of 32 bits.
    """
    kinds = {types.float32: F32, types.uint16: I32, types.uint32: I32}
    if not isinstance(array, types.Array) or array.layout != "C" or array.dtype not in kinds:
        return None
    kind = kinds[array.dtype]

    def build(context, builder, sig, args):
        pointer, whole, left, size = _place(context, builder, array, *args)
        stored = _vector(context.get_value_type(array.dtype))
        some = cgutils.alloca_once(builder, stored)
        with builder.if_else(whole, likely=True) as (then, otherwise):
            with then:
                full = builder.load(builder.bitcast(pointer, stored.as_pointer()), align=size)
                after_full = builder.block
            with otherwise:
                builder.store(ir.Constant(stored, None), some)
                cgutils.raw_memcpy(builder, some, pointer, left, size)
                part = builder.load(some)
                after_part = builder.block
        lanes = builder.phi(stored)
        lanes.add_incoming(full, after_full)
        lanes.add_incoming(part, after_part)
        return lanes if size == 4 else builder.zext(lanes, _vector(I32.element))

    return kind(array, types.int64, types.int64), build


@intrinsic
def store(typingctx, array, at, stop, lanes):
    """Write eight entries from `at`, those before `stop`; into uint16 the lower 16 bits of patterns."""
    kinds = {types.float32: F32, types.uint16: I32}
    if not isinstance(array, types.Array) or array.layout != "C" or kinds.get(array.dtype) != lanes:
        return None

    def build(context, builder, sig, args):
        pointer, whole, left, size = _place(context, builder, array, *args[:3])
        stored = _vector(context.get_value_type(array.dtype))
        value = args[3] if size == 4 else builder.trunc(args[3], stored)
        some = cgutils.alloca_once(builder, stored)
        with builder.if_else(whole, likely=True) as (then, otherwise):
            with then:
                builder.store(value, builder.bitcast(pointer, stored.as_pointer()), align=size)
            with otherwise:
                builder.store(value, some)
                cgutils.raw_memcpy(builder, pointer, some, left, size)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64, lanes), build


@njit(**INLINE)
def inside(left):
    """The byte whose bits stand for lanes before the end of a row, which has `left` entries left."""
    return 0xFF >> max(0, LANES - left)


@njit(**INLINE)
def size_of(x):
    """|x|."""
    return numbers(bits(x) & ints(0x7FFFFFFF))


@njit(**INLINE)
def difference(theta, theta_0):
    """θ - θ₀; +0 where they are equal, zeros of both signs too."""
    return select(theta == theta_0, floats(np.float32(0.0)), theta - theta_0)


@njit(**INLINE)
def widened(patterns, fmt):
    """16-bit patterns -> the same numbers in fp32. The exponents of fp16 differ by 112: a product with 2^112 is exact,
    and makes subnormal numbers normal."""
    if fmt == BF16:
        return numbers(patterns << ints(16))
    size = numbers((patterns & ints(0x7FFF)) << ints(13)) * floats(np.float32(2.0**112))
    special = select(patterns & ints(0x7C00) == ints(0x7C00), ints(0x7F800000), ints(0))
    return numbers(bits(size) | special | (patterns & ints(0x8000)) << ints(16))


@njit(**INLINE)
def pattern(x, fmt):
    """fp32 -> the patterns of the nearest 16-bit numbers, ties to even; NaN to one NaN.

    Below 2^-14 an fp16 number is a multiple of 2^-24, the last place of the numbers in 0.5..1: adding 0.5 rounds it.
    """
    whole = bits(x)
    size = whole & ints(0x7FFFFFFF)
    if fmt == BF16:
        rounded = (whole + ints(0x7FFF) + (whole >> ints(16) & ints(1))) >> ints(16)
        return select(size > ints(0x7F800000), ints(0x7FC0), rounded)
    normal = (size + ints(0xFFF) + (size >> ints(13) & ints(1)) - ints(0x38000000)) >> ints(13)
    small = bits(numbers(size) + floats(np.float32(0.5))) - ints(0x3F000000)
    large = select(size > ints(0x7F800000), ints(0x7E00), ints(0x7C00))
    found = select(size >= ints(0x47800000), large, select(size >= ints(0x38800000), normal, small))
    return found | (whole >> ints(16) & ints(0x8000))


@njit(**INLINE)
def snapped(x, fmt):
    """The nearest numbers of the format, as fp32. For differences: the sign of a 0 and NaN may be lost."""
    if fmt == FP32:
        return x
    whole = bits(x)
    if fmt == BF16:
        return numbers((whole + ints(0x7FFF) + (whole >> ints(16) & ints(1))) & ints(0xFFFF0000))
    normal = (whole + ints(0xFFF) + (whole >> ints(13) & ints(1))) & ints(0xFFFFE000)
    size = whole & ints(0x7FFFFFFF)
    half = floats(np.float32(0.75))  # numbers near it are multiples of 2^-24, of either sign of x
    small = select(ints(0x38800000) > size, bits(x + half - half), normal)
    return numbers(select(size > ints(0x477FEFFF), whole & ints(0x80000000) | ints(0x7F800000), small))
