"""A small vector language: Python functions that write kernels, compiled through LLVM.

A kernel is a Python function whose first argument is a `Kernel`, the others numbers that it gets
at run time (64-bit integers, mostly addresses).  Running that function once does not compute
anything: each `Value` operation appends an instruction to the kernel.  So a Python loop is unrolled
and a Python `if` chooses code, while `Kernel.loop` and `Kernel.when` are loops and branches of the
machine code.

    def add(k, x, y, n):                                       # x += y, n floats
        def body(i):
            k.store(k.load(F32.x16, x + 4 * i) + k.load(F32.x16, y + 4 * i), x + 4 * i)
        k.loop(n, body, step=16)

Vectors have 16 lanes on every processor; LLVM cuts them into the registers there are.  No operation
may be reordered, fused or approximated, so a kernel gives the same bits everywhere: sums over lanes
follow one tree, `fma` is one rounding also where it has to be computed in software, and `exp`,
`softplus` and `rint` are made of additions, multiplications and divisions.
"""

import math
import struct
from collections.abc import Callable

from llvmlite import ir

LANES = 16


class Type:
    """A scalar type; ``.x16``, ``.x(n)`` are vectors of it."""

    def __init__(self, llvm, size: int, lanes: int = 1):
        self.llvm, self.size, self.lanes = llvm, size, lanes

    def x(self, lanes: int) -> "Type":
        """The vector of ``lanes`` numbers of this type."""
        return Type(ir.VectorType(self.llvm, lanes), self.size, lanes)

    @property
    def x16(self) -> "Type":
        return self.x(LANES)


I1, I8, I16, I32, I64 = (Type(ir.IntType(n), max(1, n // 8)) for n in (1, 8, 16, 32, 64))
F32, F64 = Type(ir.FloatType(), 4), Type(ir.DoubleType(), 8)
ROUND_64 = 1.5 * 2**52  # the same of a float64
ROUND = 1.5 * 2**23  # added and subtracted, it rounds a float32 below 2^22 to an integer
# 2^x for x from -1/2 to 1/2: (2^x - 1) / x at Chebyshev nodes, times x, plus 1
EXP2 = 1.33813025e-3, 9.66636852e-3, 0.0555038101, 0.24022349, 0.693147181, 1.0


def _element(llvm):
    return llvm.element if isinstance(llvm, ir.VectorType) else llvm


def _constant(llvm: ir.Type, number: float) -> ir.Constant:
    """``number`` in every lane."""
    element = _element(llvm)
    if isinstance(element, ir.FloatType):
        number = struct.unpack("f", struct.pack("f", number))[0]  # what LLVM wants to read
    elif isinstance(element, ir.IntType):
        number = int(number)
    if isinstance(llvm, ir.VectorType):
        return ir.Constant(llvm, [ir.Constant(element, number)] * llvm.count)
    return ir.Constant(llvm, number)


class Value:
    """A scalar or vector in a kernel.  Numbers and scalars meet vectors in every lane."""

    def __init__(self, kernel: "Kernel", ir_value):
        self.kernel, self.ir = kernel, ir_value

    @property
    def is_float(self) -> bool:
        return isinstance(_element(self.ir.type), ir.FloatType | ir.DoubleType)

    def _pair(self, other: "Value | float") -> tuple["Value", "Value"]:
        """Both operands, of one type."""
        if not isinstance(other, Value):
            return self, Value(self.kernel, _constant(self.ir.type, other))
        here, there = (isinstance(v.ir.type, ir.VectorType) for v in (self, other))
        if here and not there:
            return self, other.splat(self.ir.type.count)
        if there and not here:
            return self.splat(other.ir.type.count), other
        assert self.ir.type == other.ir.type, f"{self.ir.type} meets {other.ir.type}"
        return self, other

    def _with(self, other: "Value | float", for_floats: str, for_ints: str) -> "Value":
        a, b = self._pair(other)
        name = for_floats if a.is_float else for_ints
        return Value(self.kernel, getattr(self.kernel.builder, name)(a.ir, b.ir))

    def __add__(self, other) -> "Value":
        return self._with(other, "fadd", "add")

    def __sub__(self, other) -> "Value":
        return self._with(other, "fsub", "sub")

    def __mul__(self, other) -> "Value":
        return self._with(other, "fmul", "mul")

    def __truediv__(self, other) -> "Value":
        return self._with(other, "fdiv", "")

    def __rsub__(self, other) -> "Value":
        return self.kernel.constant_like(self, other) - self

    def __rtruediv__(self, other) -> "Value":
        return self.kernel.constant_like(self, other) / self

    __radd__, __rmul__ = __add__, __mul__

    def __floordiv__(self, other) -> "Value":
        """Of integers that are not negative."""
        return self._with(other, "", "udiv")

    def __mod__(self, other) -> "Value":
        """Of integers that are not negative."""
        return self._with(other, "", "urem")

    def __and__(self, other) -> "Value":
        return self._with(other, "", "and_")

    def __or__(self, other) -> "Value":
        return self._with(other, "", "or_")

    def __xor__(self, other) -> "Value":
        return self._with(other, "", "xor")

    def __lshift__(self, other) -> "Value":
        return self._with(other, "", "shl")

    def __rshift__(self, other) -> "Value":
        """Arithmetic: copies the sign."""
        return self._with(other, "", "ashr")

    def unsigned_shift(self, n: int) -> "Value":
        """``>>`` that shifts in zeros."""
        return self._with(n, "", "lshr")

    def _compare(self, sign: str, other) -> "Value":
        a, b = self._pair(other)
        build = self.kernel.builder
        made = (build.fcmp_ordered if a.is_float else build.icmp_signed)(sign, a.ir, b.ir)
        return Value(self.kernel, made)

    def __lt__(self, other) -> "Value":
        return self._compare("<", other)

    def __gt__(self, other) -> "Value":
        return self._compare(">", other)

    def equals(self, other) -> "Value":
        return self._compare("==", other)

    def splat(self, lanes: int) -> "Value":
        """A scalar in every lane of a vector."""
        build, i32 = self.kernel.builder, ir.IntType(32)
        blank = ir.Constant(ir.VectorType(self.ir.type, lanes), ir.Undefined)
        first = build.insert_element(blank, self.ir, ir.Constant(i32, 0))
        zeros = ir.Constant(ir.VectorType(i32, lanes), [ir.Constant(i32, 0)] * lanes)
        return Value(self.kernel, build.shuffle_vector(first, blank, zeros))

    def lanes(self, *which: int) -> "Value":
        """A vector of the lanes named, in that order."""
        places = ir.Constant(ir.VectorType(ir.IntType(32), len(which)), list(which))
        return Value(self.kernel, self.kernel.builder.shuffle_vector(self.ir, self.ir, places))

    def lane(self, i: int) -> "Value":
        """The scalar in lane i."""
        place = ir.Constant(ir.IntType(32), i)
        return Value(self.kernel, self.kernel.builder.extract_element(self.ir, place))

    def to(self, kind: Type) -> "Value":
        """Converted: integers by sign extension or truncation, floats to integers towards 0."""
        n = self.ir.type.count if isinstance(self.ir.type, ir.VectorType) else 1
        target = ir.VectorType(kind.llvm, n) if n > 1 else kind.llvm
        build, into_float = self.kernel.builder, isinstance(kind.llvm, ir.FloatType | ir.DoubleType)
        if self.is_float and into_float:
            wider = isinstance(kind.llvm, ir.DoubleType)
            made = build.fpext(self.ir, target) if wider else build.fptrunc(self.ir, target)
        elif self.is_float:
            made = build.fptosi(self.ir, target)
        elif into_float:
            made = build.sitofp(self.ir, target)
        elif kind.llvm.width > _element(self.ir.type).width:
            made = build.sext(self.ir, target)
        else:
            made = build.trunc(self.ir, target)
        return Value(self.kernel, made)

    def bits(self, kind: Type) -> "Value":
        """The same bits as another type."""
        return Value(self.kernel, self.kernel.builder.bitcast(self.ir, kind.llvm))

    def fold(self, join: Callable[["Value", "Value"], "Value"]) -> "Value":
        """All lanes joined to a scalar, upper half onto lower half until one is left."""
        value, n = self, self.ir.type.count
        while n > 1:
            n //= 2
            value = join(value.lanes(*range(n)), value.lanes(*range(n, 2 * n)))
        return value.lane(0)

    def sum(self) -> "Value":
        return self.fold(lambda a, b: a + b)

    def max(self) -> "Value":
        return self.fold(maximum)


def select(condition: Value, yes: "Value | float", no: "Value | float") -> Value:
    """``yes`` where the condition holds, else ``no``, lane by lane."""
    if not isinstance(yes, Value):
        assert isinstance(no, Value)
        yes = condition.kernel.constant_like(no, yes)
    yes, no = yes._pair(no)
    if isinstance(yes.ir.type, ir.VectorType) and not isinstance(condition.ir.type, ir.VectorType):
        condition = condition.splat(yes.ir.type.count)
    made = condition.kernel.builder.select(condition.ir, yes.ir, no.ir)
    return Value(condition.kernel, made)


def maximum(a: Value, b: "Value | float") -> Value:
    a, b = a._pair(b)
    return select(a > b, a, b)


def minimum(a: Value, b: "Value | float") -> Value:
    a, b = a._pair(b)
    return select(a < b, a, b)


def magnitude(x: Value) -> Value:
    """The absolute value of a float32 vector."""
    kind = F32.x(x.ir.type.count)
    return (x.bits(I32.x(kind.lanes)) & 0x7FFFFFFF).bits(kind)


def fma(a: Value, b: "Value | float", c: "Value | float") -> Value:
    """a * b + c, rounded once."""
    a, b = a._pair(b)
    a, c = a._pair(c)
    a, b = a._pair(b)  # a may have become a vector
    if "simd128" in a.kernel.features:  # WebAssembly has none
        return _fma(a, b, c)
    return a.kernel.intrinsic("llvm.fma", a.ir.type, a, b, c)


def _fma(a: Value, b: Value, c: Value) -> Value:
    """`fma` without the instruction, by rounding to odd (Boldo and Melquiond, IEEE TC 57(4), 2008).

    Products of float32 are exact in float64; those of float64 are split into two numbers.
    """
    if _element(a.ir.type) == F32.llvm:
        product = a.to(F64) * b.to(F64)
        return _to_odd(*_two_sum(product, c.to(F64))).to(F32)
    product = a * b
    (high, low), (top, bottom) = _split(a), _split(b)
    rest = ((high * top - product) + high * bottom + low * top) + low * bottom
    later, tail = _two_sum(c, rest)
    total, error = _two_sum(product, later)
    return total + _to_odd(*_two_sum(tail, error))


def _two_sum(a: Value, b: Value) -> tuple[Value, Value]:
    """(a + b rounded, the rest): exact in float64 (Knuth)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def _split(a: Value) -> tuple[Value, Value]:
    """A float64 as two of 26 bits each (Veltkamp)."""
    large = a * (2.0**27 + 1)
    high = large - (large - a)
    return high, a - high


def _to_odd(total: Value, rest: Value) -> Value:
    """A float64 sum and its rest, rounded to the neighbor whose last bit is 1 if inexact."""
    wide = isinstance(total.ir.type, ir.VectorType)
    kind, double = (k.x(total.ir.type.count) if wide else k for k in (I64, F64))
    bits = total.bits(kind)
    away = ((bits ^ rest.bits(kind)) >> 63) | 1  # 1 if the rest has the sum's sign, else -1
    even = (bits & 1).equals(0)
    inexact = (rest > 0.0) | (rest < 0.0)
    moved = select(even & inexact, bits + away, bits)
    return moved.bits(double)


def sqrt(x: Value) -> Value:
    return x.kernel.intrinsic("llvm.sqrt", x.ir.type, x)


def rint(x: Value) -> Value:
    """The nearest integer, ties to even, of float32 below 2^22."""
    return (x + ROUND) - ROUND


def exp(x: Value) -> Value:
    """e^x in float32, relative error 2e-7; e^-87 below -87, e^88 above 88."""
    x = _clamped(x, -87.0, 88.0)
    n, power = _power_of_2(x * (1 / math.log(2)))
    r = x - n * 0.693359375  # ln 2 in two parts, the first with few bits
    r = r + n * 2.12194440e-4
    return _polynomial(r, 1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0) * power


def exp_float64(x: Value) -> Value:
    """e^x in float64 for x up to 0, relative error 4e-16; e^-700 below -700."""
    x = maximum(x.kernel.constant_like(x, -700.0), x)
    n = (x * (1 / math.log(2)) + ROUND_64) - ROUND_64
    r = x - n * 0.693147180369123816490  # ln 2 in two parts, the first with few bits
    r = r - n * 1.90821492927058770002e-10
    y = _polynomial(r, *(1 / math.factorial(i) for i in range(13, -1, -1)))
    return y * ((n.to(I64) + 1023) << 52).bits(F64.x(x.ir.type.count))


def exp2(x: Value) -> Value:
    """2^x in float32 for x up to 127, relative error 3e-7; 2^-126 below -126."""
    x = maximum(x.kernel.constant_like(x, -126.0), x)
    n, power = _power_of_2(x)
    return _polynomial(x - n, *EXP2) * power


def softplus(x: Value) -> Value:
    """log(1 + e^x) in float32, relative error 4e-7."""
    small = exp(0.0 - magnitude(x))
    s = small / (small + 2.0)  # log(1 + small) = 2 artanh(s), and s is at most 1/3
    series = _polynomial(s * s, *(1 / n for n in range(15, 0, -2)))
    return fma(s + s, series, maximum(x.kernel.constant_like(x, 0.0), x))


def silu(x: Value) -> Value:
    """x / (1 + e^-x)."""
    return x / (1.0 + exp(0.0 - x))


def _clamped(x: Value, low: float, high: float) -> Value:
    """Within the bounds; NaN stays NaN."""
    return minimum(x.kernel.constant_like(x, high), maximum(x.kernel.constant_like(x, low), x))


def _power_of_2(x: Value) -> tuple[Value, Value]:
    """(n, 2^n) for the integer n nearest to x, -126 to 127."""
    shifted = x + (ROUND + 127)  # its lowest bits are n + 127, the exponent of 2^n
    power = (shifted.bits(I32.x(x.ir.type.count)) << 23).bits(F32.x(x.ir.type.count))
    return shifted - (ROUND + 127), power


def _polynomial(x: Value, first: float, *rest: float) -> Value:
    """Coefficients from the highest power down."""
    y = x.kernel.constant_like(x, first)
    for c in rest:
        y = y * x + c
    return y


class Kernel:
    """Writes one function ``void name(int64 *args, int64 *context)``."""

    def __init__(self, module: ir.Module, name: str, features: frozenset[str]):
        pointer = ir.IntType(64).as_pointer()
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer] * 2), name)
        self.function.attributes.add("nounwind")
        self.builder = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.features = features

    def argument(self, i: int) -> Value:
        """The i-th number of the operation."""
        return self._number(self.function.args[0], i)

    def context(self, i: int) -> Value:
        """The i-th number that all operations of a call share; see `machine.Context`."""
        return self._number(self.function.args[1], i)

    def _number(self, array, i: int) -> Value:
        place = self.builder.gep(array, [ir.Constant(ir.IntType(64), i)])
        return Value(self, self.builder.load(place, typ=ir.IntType(64)))

    def constant(self, kind: Type, number: float) -> Value:
        """``number`` in every lane of a type."""
        return Value(self, _constant(kind.llvm, number))

    def constant_like(self, value: Value, number: float) -> Value:
        return Value(self, _constant(value.ir.type, number))

    def count(self, kind: Type = I32) -> Value:
        """The vector 0, 1, ..., 15."""
        places = [ir.Constant(kind.llvm, i) for i in range(LANES)]
        return Value(self, ir.Constant(ir.VectorType(kind.llvm, LANES), places))

    def load(self, kind: Type, address: Value) -> Value:
        """What lies at an address (any alignment)."""
        pointer = self.builder.inttoptr(address.ir, kind.llvm.as_pointer())
        return Value(self, self.builder.load(pointer, align=1, typ=kind.llvm))

    def store(self, value: Value, address: Value) -> None:
        pointer = self.builder.inttoptr(address.ir, value.ir.type.as_pointer())
        self.builder.store(value.ir, pointer, align=1)

    def prefetch(self, address: Value) -> None:
        """Ask for a cache line that is needed soon."""
        byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        pointer = self.builder.inttoptr(address.ir, byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        numbers = [ir.Constant(i32, n) for n in (0, 2, 1)]  # to read; keep in L2; data
        self.builder.call(self._declared("llvm.prefetch.p0", kind), [pointer, *numbers])

    def intrinsic(self, name: str, llvm: ir.Type, *operands: Value) -> Value:
        """An operation of LLVM that is overloaded by type, such as llvm.fma.v16f32."""
        element = _element(llvm)
        short = {"float": "f32", "double": "f64"}.get(str(element), str(element))
        lanes = f"v{llvm.count}" if isinstance(llvm, ir.VectorType) else ""
        kind = ir.FunctionType(llvm, [o.ir.type for o in operands])
        return self.call(f"{name}.{lanes}{short}", kind, *operands)

    def call(self, name: str, kind: ir.FunctionType, *operands: Value) -> Value:
        """An operation of one processor."""
        function = self._declared(name, kind)
        return Value(self, self.builder.call(function, [o.ir for o in operands]))

    def _declared(self, name: str, kind: ir.FunctionType):
        module = self.function.module
        return module.globals.get(name) or ir.Function(module, kind, name)

    def loop(
        self, stop: "Value | int", body: Callable, *carry: Value, start: "Value | int" = 0,
        step: int = 1,
    ):  # fmt: skip
        """``carry = body(i, *carry)`` for i = start, start + step, ... below stop; the last carry.

        The body returns a tuple, a single value, or nothing, as it was given.
        """
        i64, build = I64.llvm, self.builder
        first, end = (v.ir if isinstance(v, Value) else ir.Constant(i64, v) for v in (start, stop))
        before = build.block
        head, inside, after = (
            self.function.append_basic_block(name) for name in ("loop", "body", "after")
        )
        build.branch(head)
        build.position_at_end(head)
        index = build.phi(i64)
        index.add_incoming(first, before)
        held = [build.phi(c.ir.type) for c in carry]
        for phi, c in zip(held, carry, strict=True):
            phi.add_incoming(c.ir, before)
        build.cbranch(build.icmp_signed("<", index, end), inside, after)
        build.position_at_end(inside)
        made = body(Value(self, index), *(Value(self, phi) for phi in held))
        made = () if made is None else made if isinstance(made, tuple) else (made,)
        assert len(made) == len(carry), "a loop's body returns what it carries"
        index.add_incoming(build.add(index, ir.Constant(i64, step)), build.block)
        for phi, value in zip(held, made, strict=True):
            phi.add_incoming(value.ir, build.block)
        build.branch(head)
        build.position_at_end(after)
        result = tuple(Value(self, phi) for phi in held)
        return result[0] if len(result) == 1 else result

    def share(self, stop: Value, body: Callable, part: Value, parts: Value) -> None:
        """``body(i)`` for one of the parts that i = 0, 1, ... below stop are divided into."""
        self.loop(stop * (part + 1) // parts, body, start=stop * part // parts)

    def count_up(self, address: Value) -> Value:
        """Add 1 to the int64 at an address, which other threads may do too; returns what it was."""
        pointer = self.builder.inttoptr(address.ir, I64.llvm.as_pointer())
        return Value(self, self.builder.atomic_rmw("add", pointer, I64.llvm(1), "seq_cst"))

    def wait_for(self, address: Value, least: Value, meanwhile: Callable[[Value], None]) -> None:
        """Until the int64 there, which other threads change, is at least this.

        ``meanwhile(n)`` is done after the n-th look that was in vain.
        """
        build, function = self.builder, self.function
        look, again, after = (function.append_basic_block(n) for n in ("look", "again", "after"))
        before = build.block
        build.branch(look)
        build.position_at_end(look)
        n = build.phi(I64.llvm)
        n.add_incoming(I64.llvm(0), before)
        pointer = build.inttoptr(address.ir, I64.llvm.as_pointer())
        now = build.load_atomic(pointer, "acquire", 8, typ=I64.llvm)
        build.cbranch(build.icmp_signed("<", now, least.ir), again, after)
        build.position_at_end(again)
        meanwhile(Value(self, n))
        n.add_incoming(build.add(n, I64.llvm(1)), build.block)
        build.branch(look)
        build.position_at_end(after)

    def pause(self) -> None:
        """Tell the processor that this is a loop that waits."""
        if "sse2" in self.features:
            kind = ir.FunctionType(ir.VoidType(), [])
            self.builder.call(self._declared("llvm.x86.sse2.pause", kind), [])

    def call_at(self, address: Value) -> None:
        """Call a C function without arguments."""
        kind = ir.FunctionType(ir.VoidType(), [])
        self.builder.call(self.builder.inttoptr(address.ir, kind.as_pointer()), [])

    def when(self, condition: Value):
        """``with k.when(c):`` what happens only if c holds."""
        return self.builder.if_then(condition.ir)
