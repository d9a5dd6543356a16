"""Vectors of 16 floats as a type of numba: kernels written with it compile to vector code without LLVM guessing.

    x = vload(array, i)            # sixteen neighbours
    x = vgather(array, i, 3)       # array[i], array[i + 3], ...
    y = where(x > F(0), x * x + F(1), F(0))
    vstore(out, i, y)

Operators take vectors, numbers, or one of each; comparisons give a mask for `where`, `any_lane`, `&` and `|`. Numbers
in kernels are written F(2), float32: a bare 2.0 is float64, converted at every use.

LANES is chosen once, at import, by asking LLVM what registers this machine has: 16 with AVX-512, 8 with AVX, 4 with SSE
or NEON. Kernels work on any of these: what has a size of its own (a record of 16 floats, a block of 4x4 pixels) is a
multiple of it.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOptionalCall=false
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import config, types
from numba.core import cgutils
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

_FLOAT = ir.FloatType()
_INT = ir.IntType(32)


def _width() -> int:
    """Floats in the widest register of the CPU that numba compiles for (which NUMBA_CPU_NAME may set)."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    name = config.CPU_NAME or binding.get_host_cpu_name()
    features = config.CPU_FEATURES
    if features is None:
        features = "" if config.CPU_NAME else binding.get_host_cpu_features().flatten()
    module = ir.Module()
    floats = ir.VectorType(_FLOAT, 16)
    function = ir.Function(module, ir.FunctionType(floats, [floats, floats]), "add")
    builder = ir.IRBuilder(function.append_basic_block())
    builder.ret(builder.fadd(*function.args))
    machine = binding.Target.from_default_triple().create_target_machine(cpu=name, features=features)
    assembly = machine.emit_assembly(binding.parse_assembly(str(module)))
    return 16 if "zmm" in assembly else 8 if "ymm" in assembly else 4


LANES = _width()

_FLOATS = ir.VectorType(_FLOAT, LANES)
_INTS = ir.VectorType(_INT, LANES)
_BOOLS = ir.VectorType(ir.IntType(1), LANES)
# what LLVM may do beyond IEEE: fused and reordered sums, a reciprocal shared by divisions. NaN and infinity stay exact.
FAST = ("contract", "reassoc", "nsz", "arcp")


class Vector(types.Type):
    """LANES floats."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


class Mask(types.Type):
    """LANES booleans."""

    def __init__(self) -> None:
        super().__init__(name=f"mask{LANES}")


vector, mask = Vector(), Mask()


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, type_: Any) -> None:
        super().__init__(manager, type_, _FLOATS)


@register_model(Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager: Any, type_: Any) -> None:
        super().__init__(manager, type_, _BOOLS)


# ---------------------------------------------------------------- writing LLVM


def _constant(value: float) -> Any:
    return ir.Constant(_FLOATS, [float(np.float32(value))] * LANES)


def _integers(value: int) -> Any:
    return ir.Constant(_INTS, [value] * LANES)


def _call(builder: Any, name: str, *args: Any) -> Any:
    """An LLVM intrinsic that maps vectors to a vector."""
    kind = ir.FunctionType(_FLOATS, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f32"), args)


def _polynomial(builder: Any, x: Any, *coefficients: float) -> Any:
    """Horner's rule, highest power first. fmuladd, not fma: without an FMA unit the latter is a libm call per lane."""
    value = _constant(coefficients[0])
    for c in coefficients[1:]:
        value = _call(builder, "fmuladd", value, x, _constant(c))
    return value


def _shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, len(lanes)), lanes))


def _vector_of(builder: Any, type_: Any, value: Any) -> Any:
    """The value as a vector: a number is repeated in all lanes."""
    if type_ == vector:
        return value
    if type_ == types.float64:
        value = builder.fptrunc(value, _FLOAT)
    elif isinstance(type_, types.Integer):
        value = builder.sitofp(value, _FLOAT)
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    return _shuffle(builder, builder.insert_element(undefined, value, _INT(0)), undefined, [0] * LANES)


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def _load(builder: Any, address: Any) -> Any:
    value = builder.load(builder.bitcast(address, _FLOATS.as_pointer()))
    value.align = 4
    return value


def _store(builder: Any, value: Any, address: Any, stream: bool = False) -> None:
    """Past the cache if `stream`, which saves reading the line first; the address is then that of a whole vector."""
    store = builder.store(value, builder.bitcast(address, _FLOATS.as_pointer()))
    store.align = 4
    if stream:
        store.align = 4 * LANES
        store.set_metadata("nontemporal", builder.module.add_metadata([_INT(1)]))


# ---------------------------------------------------------------- operators


def _operator(symbol: Any, result: Any, accepts: tuple[Any, ...], write: Callable[[Any, Any, Any], Any]) -> None:
    """Teach numba `a symbol b`, where one of both is a vector (or mask) and the other one too or a number."""
    own = accepts[0]

    @infer_global(symbol)
    class _Typing(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and any(isinstance(a, own) for a in args) and all(isinstance(a, accepts) for a in args):
                return signature(result, *args)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        a, b = (v if t == mask else _vector_of(builder, t, v) for t, v in zip(sig.args, args, strict=True))
        return write(builder, a, b)

    for other in accepts:
        lower_builtin(symbol, own, other)(lower)
        if other is not own:
            lower_builtin(symbol, other, own)(lower)


_NUMBERS = (Vector, types.Float, types.Integer)
for _symbol, _name in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
    (operator.iadd, "fadd"),
    (operator.isub, "fsub"),
    (operator.imul, "fmul"),
):
    _operator(_symbol, vector, _NUMBERS, lambda b, x, y, name=_name: getattr(b, name)(x, y, flags=FAST))
for _symbol, _name in ((operator.lt, "<"), (operator.le, "<="), (operator.gt, ">"), (operator.ge, ">=")):
    _operator(_symbol, mask, _NUMBERS, lambda b, x, y, name=_name: b.fcmp_ordered(name, x, y))  # a NaN is never true
for _symbol, _name in ((operator.and_, "and_"), (operator.or_, "or_")):
    _operator(_symbol, mask, (Mask,), lambda b, x, y, name=_name: getattr(b, name)(x, y))


@infer_global(operator.neg)
class _Negative(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        if args == (vector,):
            return signature(vector, vector)


@lower_builtin(operator.neg, Vector)
def _negate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return builder.fneg(args[0])


# ---------------------------------------------------------------- functions of vectors


def _function(name: str, count: int, write: Callable[..., Any], doc: str) -> Any:
    """A function of `count` vectors or numbers that gives a vector."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return write(builder, *(_vector_of(builder, t, v) for t, v in zip(sig.args, args, strict=True)))

    def one(typing: Any, a: Any) -> Any:
        return vector(a), generate

    def two(typing: Any, a: Any, b: Any) -> Any:
        return vector(a, b), generate

    def three(typing: Any, a: Any, b: Any, c: Any) -> Any:
        return vector(a, b, c), generate

    function = (one, two, three)[count - 1]
    function.__name__, function.__doc__ = name, doc
    return intrinsic(function)


def _exp2(b: Any, x: Any) -> Any:
    # 2^x = 2^n 2^f with n the nearest integer, |f| <= 1/2; 2^n is added to the exponent bits. The polynomial is the
    # minimax one for the relative error, 7.5e-8, to which float32 arithmetic adds
    n = _call(b, "nearbyint", x)
    power = _polynomial(
        b,
        b.fsub(x, n),
        1.3276471979301512e-3,
        9.67554133421011e-3,
        5.5507132735430245e-2,
        2.4022119723848634e-1,
        6.93146967064733e-1,
        1.000000071654682,
    )
    return b.bitcast(b.add(b.bitcast(power, _INTS), b.shl(b.fptosi(n, _INTS), _integers(23))), _FLOATS)


def _log(b: Any, x: Any) -> Any:
    # x = 2^n m with m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh(t), t = (m - 1) / (m + 1), by its series
    bits = b.bitcast(x, _INTS)
    n = b.ashr(b.sub(bits, _integers(0x3F3504F3)), _integers(23))  # 0x3F3504F3 are the bits of sqrt(1/2)
    m = b.bitcast(b.sub(bits, b.shl(n, _integers(23))), _FLOATS)
    t = b.fdiv(b.fsub(m, _constant(1.0)), b.fadd(m, _constant(1.0)))
    series = _polynomial(b, b.fmul(t, t), 2 / 9, 2 / 7, 2 / 5, 2 / 3, 2.0)
    return _call(b, "fmuladd", b.sitofp(n, _FLOATS), _constant(0.6931471805599453), b.fmul(series, t))


vsplat = _function("vsplat", 1, lambda b, x: x, "The number in all lanes.")
vabs = _function("vabs", 1, lambda b, x: _call(b, "fabs", x), "Absolute value.")
vsqrt = _function("vsqrt", 1, lambda b, x: _call(b, "sqrt", x), "Square root.")
vceil = _function("vceil", 1, lambda b, x: _call(b, "ceil", x), "Smallest integer not below.")
vfloor = _function("vfloor", 1, lambda b, x: _call(b, "floor", x), "Largest integer not above.")
vexp2 = _function("vexp2", 1, _exp2, "2^x for x in [-126, 127], anything beyond; relative error below 2.5e-7.")
vlog = _function("vlog", 1, _log, "ln(x) for positive normal x; relative error about 1e-7.")
vmin = _function("vmin", 2, lambda b, x, y: b.select(b.fcmp_ordered("<", x, y), x, y), "Smaller one; y if x is NaN.")
vmax = _function("vmax", 2, lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y), "Larger one; y if x is NaN.")
fma = _function("fma", 3, lambda b, x, y, z: _call(b, "fmuladd", x, y, z), "x * y + z.")


@intrinsic
def lane_column(typing: Any) -> Any:
    """0 1 2 3 0 1 2 3 ...: the column of each lane, four columns wide."""
    return vector(), lambda context, builder, sig, args: ir.Constant(_FLOATS, [float(i % 4) for i in range(LANES)])


@intrinsic
def lane_row(typing: Any) -> Any:
    """0 0 0 0 1 1 1 1 ...: the row of each lane, four columns wide."""
    return vector(), lambda context, builder, sig, args: ir.Constant(_FLOATS, [float(i // 4) for i in range(LANES)])


@intrinsic
def where(typing: Any, condition: Any, a: Any, b: Any) -> Any:
    """a in the lanes where the condition holds, b in the others; a and b are vectors or numbers."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        chosen = (_vector_of(builder, t, v) for t, v in zip(sig.args[1:], args[1:], strict=True))
        return builder.select(args[0], *chosen)

    return vector(mask, a, b), generate


@intrinsic
def any_lane(typing: Any, condition: Any) -> Any:
    """Whether the condition holds in one lane at least."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = ir.IntType(LANES)
        return builder.icmp_unsigned("!=", builder.bitcast(args[0], bits), bits(0))

    return types.boolean(mask), generate


@intrinsic
def lane_bits(typing: Any, condition: Any) -> Any:
    """An int64 whose bit k says whether the condition holds in lane k."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.zext(builder.bitcast(args[0], ir.IntType(LANES)), ir.IntType(64))

    return types.int64(mask), generate


@intrinsic
def lowest_bit(typing: Any, bits: Any) -> Any:
    """Number of the lowest bit that is set, of an int64 that is not 0."""
    return types.int64(types.int64), lambda context, builder, sig, args: builder.cttz(args[0], ir.IntType(1)(1))


@intrinsic
def count_bits(typing: Any, bits: Any) -> Any:
    """How many bits of an int64 are set."""
    return types.int64(types.int64), lambda context, builder, sig, args: builder.ctpop(args[0])


# ---------------------------------------------------------------- memory: flat C-contiguous arrays, bounds not checked


@intrinsic
def vload(typing: Any, array: Any, index: Any) -> Any:
    """array[index : index + LANES]."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _load(builder, _address(context, builder, sig.args[0], *args))

    return vector(array, types.intp), generate


def _storing(stream: bool) -> Any:
    def store(typing: Any, array: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = _vector_of(builder, sig.args[2], args[2])
            _store(builder, value, _address(context, builder, sig.args[0], *args[:2]), stream)
            return context.get_dummy_value()

        return types.void(array, types.intp, value), generate

    store.__name__ = "vstream" if stream else "vstore"
    store.__doc__ = "array[index : index + LANES] = value" + (
        ", past the cache, to an aligned address." * stream or "."
    )
    return intrinsic(store)


vstore, vstream = _storing(False), _storing(True)


def _picked(builder: Any, vectors: list[Any], places: list[tuple[int, int]]) -> Any:
    """The vector whose lane k is lane places[k][1] of vectors[places[k][0]]: one shuffle for each but the first."""
    result = vectors[0]
    lanes = [lane if v == 0 else 0 for v, lane in places]
    for number in range(1, len(vectors)):
        lanes = [LANES + lane if v == number else lanes[k] for k, (v, lane) in enumerate(places)]
        result = _shuffle(builder, result, vectors[number], lanes)
        lanes = list(range(LANES))
    return result


def _loading(count: int) -> Any:
    def load(typing: Any, array: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            array, index = args
            parts = []
            for j in range(count):
                address = _address(context, builder, sig.args[0], array, builder.add(index, ir.IntType(64)(j * LANES)))
                if isinstance(sig.args[0].dtype, types.Integer):
                    integers = ir.VectorType(context.get_value_type(sig.args[0].dtype), LANES)
                    part = builder.load(builder.bitcast(address, integers.as_pointer()))
                    part.align = 2
                    parts.append(builder.sitofp(part, _FLOATS))
                else:
                    parts.append(_load(builder, address))
            columns = [
                _picked(builder, parts, [divmod(k * count + column, LANES) for k in range(LANES)])
                for column in range(count)
            ]
            return context.make_tuple(builder, sig.return_type, columns)

        return types.UniTuple(vector, count)(array, types.intp), generate

    load.__name__ = f"load{count}"
    load.__doc__ = f"{count} vectors, lane k of number j is array[index + {count} * k + j], of float32 or integers."
    return intrinsic(load)


def _saving(count: int) -> Any:
    def save(typing: Any, array: Any, index: Any, values: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            array, index, values = args
            columns = [_vector_of(builder, sig.args[2][j], builder.extract_value(values, j)) for j in range(count)]
            for j in range(count):
                places = [divmod(j * LANES + k, count)[::-1] for k in range(LANES)]
                part = _picked(builder, columns, places)
                address = _address(context, builder, sig.args[0], array, builder.add(index, ir.IntType(64)(j * LANES)))
                if isinstance(sig.args[0].dtype, types.Integer):
                    integers = ir.VectorType(context.get_value_type(sig.args[0].dtype), LANES)
                    builder.store(
                        builder.fptosi(part, integers), builder.bitcast(address, integers.as_pointer())
                    ).align = 2
                else:
                    _store(builder, part, address)
            return context.get_dummy_value()

        return types.void(array, types.intp, values), generate

    save.__name__ = f"store{count}"
    save.__doc__ = f"array[index + {count} * k + j] = lane k of values[j], for an array of float32 or integers."
    return intrinsic(save)


# rows of a few numbers, one row to a lane: some shuffles instead of LANES loads for each vector
load2, load3, load4 = _loading(2), _loading(3), _loading(4)
store1, store2, store3, store4 = _saving(1), _saving(2), _saving(3), _saving(4)


@intrinsic
def vgather(typing: Any, array: Any, index: Any, stride: Any) -> Any:
    """Lane k is array[index + k * stride], of an array of float32 or integers."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, index, stride = args
        value = ir.Constant(_FLOATS, ir.Undefined)
        for k in range(LANES):
            x = builder.load(_address(context, builder, sig.args[0], array, index))
            if isinstance(sig.args[0].dtype, types.Integer):
                x = builder.sitofp(x, _FLOAT)
            value = builder.insert_element(value, x, _INT(k))
            index = builder.add(index, stride)
        return value

    return vector(array, types.intp, types.intp), generate


@intrinsic
def vscatter(typing: Any, array: Any, index: Any, stride: Any, value: Any) -> Any:
    """array[index + k * stride] = lane k, for an array of float32 or integers."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, index, stride, value = args
        value = _vector_of(builder, sig.args[3], value)
        for k in range(LANES):
            x = builder.extract_element(value, _INT(k))
            if isinstance(sig.args[0].dtype, types.Integer):
                x = builder.fptosi(x, context.get_value_type(sig.args[0].dtype))
            builder.store(x, _address(context, builder, sig.args[0], array, index))
            index = builder.add(index, stride)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, value), generate


@intrinsic
def prefetch(typing: Any, array: Any, index: Any) -> Any:
    """Ask for array[index] to be in the cache soon."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = builder.bitcast(_address(context, builder, sig.args[0], *args), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [address.type, _INT, _INT, _INT])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [address, _INT(0), _INT(3), _INT(1)])  # to read, to keep in all cache levels, data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


def _transposing(stream: bool) -> Any:
    def transpose(typing: Any, source: Any, index: Any, stride: Any, target: Any, start: Any, step: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            source, index, stride, target, start, step = args
            rows = []
            for _ in range(LANES):
                rows.append(_load(builder, _address(context, builder, sig.args[0], source, index)))
                index = builder.add(index, stride)
            for row in _transposed(builder, rows):
                _store(builder, row, _address(context, builder, sig.args[3], target, start), stream)
                start = builder.add(start, step)
            return context.get_dummy_value()

        return types.void(source, types.intp, types.intp, target, types.intp, types.intp), generate

    transpose.__name__ = "stream_transposed" if stream else "transpose"
    transpose.__doc__ = "target[start + step * k + j] = source[index + stride * j + k] for all j and k below LANES."
    return intrinsic(transpose)


transpose, stream_transposed = _transposing(False), _transposing(True)


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Swap the off-diagonal quarters of ever larger blocks: log2(LANES) rounds of shuffles of two rows."""
    half = 1
    while half < LANES:
        swapped = list(rows)
        for i in (i for i in range(LANES) if not i & half):
            upper, lower = rows[i], rows[i | half]
            first = [LANES + (k & ~half) if k & half else k for k in range(LANES)]
            second = [LANES + k if k & half else k | half for k in range(LANES)]
            swapped[i] = _shuffle(builder, upper, lower, first)
            swapped[i | half] = _shuffle(builder, upper, lower, second)
        rows, half = swapped, half * 2
    return rows


# ---------------------------------------------------------------- rows of four pixels

_QUAD = ir.VectorType(_FLOAT, 4)


def _load_quad(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    value = builder.load(builder.bitcast(_address(context, builder, array_type, array, index), _QUAD.as_pointer()))
    value.align = 4
    return value


def _store_quad(context: Any, builder: Any, value: Any, array_type: Any, array: Any, index: Any) -> None:
    address = builder.bitcast(_address(context, builder, array_type, array, index), _QUAD.as_pointer())
    builder.store(value, address).align = 4


@intrinsic
def copy_quad(typing: Any, source: Any, index: Any, target: Any, start: Any) -> Any:
    """target[start : start + 4] = source[index : index + 4]."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _store_quad(context, builder, _load_quad(context, builder, sig.args[0], *args[:2]), sig.args[2], *args[2:])
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp), generate


@intrinsic
def transpose_quads(typing: Any, source: Any, index: Any, stride: Any, target: Any, start: Any, step: Any) -> Any:
    """target[start + step * k + j] = source[index + stride * j + k] for all j and k below 4."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source, index, stride, target, start, step = args
        rows = []
        for _ in range(4):
            rows.append(_load_quad(context, builder, sig.args[0], source, index))
            index = builder.add(index, stride)
        pairs = [_shuffle(builder, rows[i], rows[i + 1], [k, k + 4, k + 1, k + 5]) for k in (0, 2) for i in (0, 2)]
        for low, high in (pairs[:2], pairs[2:]):
            for lanes in ([0, 1, 4, 5], [2, 3, 6, 7]):
                _store_quad(context, builder, _shuffle(builder, low, high, lanes), sig.args[3], target, start)
                start = builder.add(start, step)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), generate


@intrinsic
def store_sums(typing: Any, array: Any, index: Any, values: Any) -> Any:
    """array[index + j] = sum of the lanes of values[j] for j below 16, 0 where the tuple has fewer vectors.

    Transposing while adding: each round of shuffles also halves the number of vectors, 15 additions in all instead of
    a sum over lanes for each. Past the cache: `array` begins at a cache line, and `index` is a multiple of 16.
    """

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        rows = [builder.extract_value(args[2], j) for j in range(len(sig.args[2]))]
        rows += [_constant(0.0)] * (16 - len(rows))
        for j in range(0, 16, LANES):
            at = builder.add(args[1], ir.IntType(64)(j))
            _store(
                builder, _sums(builder, rows[j : j + LANES]), _address(context, builder, sig.args[0], args[0], at), True
            )
        return context.get_dummy_value()

    return types.void(array, types.intp, values), generate


def _sums(builder: Any, rows: list[Any]) -> Any:
    """One vector: lane j is the sum of the lanes of rows[j]."""
    of = [[j] * LANES for j in range(LANES)]  # of[i][k]: the row whose lanes are being summed in lane k of rows[i]
    half = LANES // 2
    while half:
        low = [s + k + other for s in range(0, LANES, 2 * half) for other in (0, LANES) for k in range(half)]
        high = [k + half for k in low]
        pairs = range(len(rows) // 2)
        after = len(rows) // 2
        of = [[(of[i] + of[i + after])[k] for k in low] for i in pairs]
        rows = [
            builder.fadd(
                _shuffle(builder, rows[i], rows[i + after], low),
                _shuffle(builder, rows[i], rows[i + after], high),
                flags=FAST,
            )
            for i in pairs
        ]
        half //= 2
    return _shuffle(builder, rows[0], rows[0], [of[0].index(j) for j in range(LANES)])
