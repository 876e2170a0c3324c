"""Translates Python functions about integers and arrays to machine code.

Such a function is plain Python, and that is its reference.  Its numbers are int64 or float64, its
arrays numpy's.  What it may contain:

- assignments, ``if``, ``for`` over ``range``, ``while``, ``break``, ``continue``, ``return``;
- ``+ - * // % / << >> & | ^ ~``, comparisons, ``and``, ``or``, ``not``, ``a if c else b``;
- ``int``, ``float``, ``min``, ``max``, ``abs``, ``len``, ``math.sqrt``, ``math.floor``, ``shape``,
  and ``bit_length`` of integers that are not negative;
- calls of other such functions, and of one named ``prefetch`` that does nothing in Python;
- constants of modules, fields of NamedTuples, rows of arrays.

Both sides of ``and`` and ``or`` are computed, and give a truth value.  Integers must stay below
2^63, except for products of which only low bits are kept.  A function that returns a float says so
(``-> float``).  An index is not checked unless that is asked for, and a negative one does not count
from the end.

Arrays are told apart: what is written to one is taken not to change another.  So they must not
overlap, except for those that are fields of one name in NamedTuples of one class.
"""

import ast
import builtins
import ctypes
import inspect
import math
import operator
import textwrap
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

from bitbyte.kernels.native.machine import Processor

I1, I8, I64, F64 = ir.IntType(1), ir.IntType(8), ir.IntType(64), ir.DoubleType()
POINTER = ir.PointerType()
ELEMENTS = {
    "uint8": I8, "int16": ir.IntType(16), "int32": ir.IntType(32), "int64": I64, "float64": F64,
}  # fmt: skip
SIZES = {dtype: np.dtype(dtype).itemsize for dtype in ELEMENTS}
OPERATIONS = {  # (of Python, of LLVM for integers, for floats)
    ast.Add: (operator.add, "add", "fadd"), ast.Sub: (operator.sub, "sub", "fsub"),
    ast.Mult: (operator.mul, "mul", "fmul"), ast.Div: (operator.truediv, "", "fdiv"),
    ast.FloorDiv: (operator.floordiv, "", ""), ast.Mod: (operator.mod, "", ""),
    ast.LShift: (operator.lshift, "shl", ""), ast.RShift: (operator.rshift, "ashr", ""),
    ast.BitAnd: (operator.and_, "and_", ""), ast.BitOr: (operator.or_, "or_", ""),
    ast.BitXor: (operator.xor, "xor", ""),
}  # fmt: skip
COMPARISONS = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=",
}  # fmt: skip


class Variable(NamedTuple):
    """A place in memory, of which LLVM makes a register."""

    pointer: Any
    type: ir.Type


class View(NamedTuple):
    """An array, or a row of one.  ``dims`` are integers, those not known in advance of LLVM."""

    dtype: str
    name: str  # arrays of different names do not overlap
    pointer: Any
    dims: tuple


class Fields(NamedTuple):
    """A NamedTuple of other values."""

    names: tuple[str, ...]
    values: tuple


class Block(NamedTuple):
    """A NamedTuple of arrays that lie in one block of memory, at known places."""

    fields: tuple  # (name, name of the array, dtype, dims, first byte) of each
    pointer: Any


def _in_one_block(group: tuple) -> bool:
    """Whether all fields are arrays that lie in the memory of one other array."""
    bases = {id(getattr(field, "base", None)) for field in group}
    return bases != {id(None)} and len(bases) == 1


def take_apart(value: Any, name: str = "") -> tuple[Any, list[int]]:
    """(kind, numbers) of an argument: what code is made for, and what that code is given."""
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous and value.dtype.name in ELEMENTS, name
        kind = "array", value.dtype.name, name, (None,) * value.ndim
        return kind, [value.ctypes.data, *value.shape]
    if value is None:
        return ("constant", None), []
    if not isinstance(value, tuple):
        return "int", [int(value)]
    names: tuple[str, ...] = getattr(value, "_fields")  # noqa: B009
    if _in_one_block(value):
        start, owner = value[0].ctypes.data, type(value).__name__
        fields = tuple(
            (field, f"{owner}.{field}", a.dtype.name, a.shape, a.ctypes.data - start)
            for field, a in zip(names, value, strict=True)
        )
        return ("block", fields), [start]
    pairs = zip(names, value, strict=True)
    parts = [take_apart(part, f"{name}.{field}") for field, part in pairs]
    kinds = tuple(kind for kind, _ in parts)
    return ("fields", names, kinds), [n for _, numbers in parts for n in numbers]


def _put_together(kind: Any, take: Callable[[ir.Type], Any]):
    """The value of a kind; ``take`` gives the next number of it."""
    if kind in ("int", "float"):
        return take(I64 if kind == "int" else F64)
    if kind[0] == "array":
        pointer = take(POINTER)
        dims = tuple(take(I64) if n is None else n for n in kind[3])
        return View(kind[1], kind[2], pointer, dims)
    if kind[0] == "block":
        return Block(kind[1], take(POINTER))
    if kind[0] == "fields":
        return Fields(kind[1], tuple(_put_together(inner, take) for inner in kind[2]))
    return kind[1]


class Compiled:
    """A function as machine code.  It works on arrays where they are, and returns nothing.

    Code is made for each kind of arguments and kept on disk; ``sources`` names all that it is made
    from, constants included.  Other threads may run meanwhile.  With ``checked``, code stops where
    an index is outside of its array.
    """

    def __init__(self, function: FunctionType, sources: str, checked: bool = False):
        self.function, self.sources, self.checked = function, sources, checked
        self.names = function.__code__.co_varnames[: function.__code__.co_argcount]
        self.entries: dict[tuple, tuple] = {}

    def __call__(self, *arguments) -> None:
        address, numbers = self.prepared(*arguments)
        operation = np.array([numbers.ctypes.data], np.int64)
        ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 2)(address)(operation.ctypes.data, 0)

    def prepared(self, *arguments) -> tuple[int, np.ndarray]:
        """(address of the code, numbers) for these arguments, see `Module.entry`."""
        missing = len(self.names) - len(arguments)
        arguments += (self.function.__defaults__ or ())[-missing:] if missing else ()
        parts = [take_apart(v, name) for v, name in zip(arguments, self.names, strict=True)]
        numbers = [n for _, numbers in parts for n in numbers]
        return self.entry(tuple(kind for kind, _ in parts)), np.array(numbers, np.int64)

    def entry(self, kinds: tuple) -> int:
        """Address of the code for these kinds of arguments."""
        if kinds not in self.entries:
            processor = Processor()
            sources = f"{self.function.__name__} {kinds} {self.checked} {self.sources}"
            engine = processor.load(sources, lambda: self.compiled(processor.target, kinds))
            self.entries[kinds] = engine.get_function_address("entry"), engine  # which owns it
        return self.entries[kinds][0]

    def compiled(self, target: llvm.TargetMachine, kinds: tuple) -> llvm.ModuleRef:
        module = Module(target.triple, str(target.target_data), self.checked)
        module.entry(self.function, kinds, "entry")
        made = llvm.parse_assembly(str(module.ir))
        made.verify()
        options = llvm.create_pipeline_tuning_options(3)
        options.loop_vectorization = options.slp_vectorization = True
        passes = llvm.create_pass_builder(target, options)
        passes.getModulePassManager().run(made, passes)
        return made


class Module:
    """Translated functions.  ``checked``: code stops where an index is outside of its array."""

    def __init__(self, triple: str, layout: str, checked: bool = False):
        self.ir, self.checked = ir.Module("bitbyte"), checked
        self.ir.triple, self.ir.data_layout = triple, layout
        self.functions: dict[tuple, ir.Function] = {}
        self.tags: dict[str, Any] = {}
        self.root = self.ir.add_metadata(["arrays"])

    def entry(self, function: Callable, kinds: Iterable, name: str) -> None:
        """``void name(int64 *operation, int64 *context)`` that runs the function.

        The operation's first number is the address of the numbers of all arguments, see
        `take_apart`.
        """
        pair = [I64.as_pointer()] * 2
        entry = ir.Function(self.ir, ir.FunctionType(ir.VoidType(), pair), name)
        build = ir.IRBuilder(entry.append_basic_block("entry"))
        numbers = build.inttoptr(build.load(entry.args[0], typ=I64), I64.as_pointer())
        places = iter(range(1 << 20))

        def take(kind: ir.Type):
            place = build.gep(numbers, [ir.Constant(I64, next(places))], source_etype=I64)
            number = build.load(place, typ=I64)
            return build.inttoptr(number, kind) if kind == POINTER else number

        arguments = [_put_together(kind, take) for kind in kinds]
        _Body(self, function, build).run(arguments)
        build.ret_void()

    def function(self, function: FunctionType, kinds: tuple, types: list[ir.Type]) -> ir.Function:
        """The translation of a function for these kinds of arguments."""
        key = function, kinds
        if key not in self.functions:
            result = ir.VoidType()
            if _returns(_tree(function)):
                result = F64 if function.__annotations__.get("return") is float else I64
            name = f"{function.__module__}.{function.__name__}.{len(self.functions)}"
            made = ir.Function(self.ir, ir.FunctionType(result, types), name)
            made.linkage = "internal"
            made.attributes.add("nounwind")
            self.functions[key] = made
            build, given = ir.IRBuilder(made.append_basic_block("entry")), iter(made.args)
            arguments = [_put_together(kind, lambda _: next(given)) for kind in kinds]
            value = _Body(self, function, build).run(arguments)
            assert (value is None) == isinstance(result, ir.VoidType), name
            build.ret_void() if value is None else build.ret(value)
        return self.functions[key]

    def tag(self, name: str):
        """What tells LLVM that arrays of other names are not concerned."""
        if name not in self.tags:
            zero = ir.Constant(I64, 0)
            kind = self.ir.add_metadata([name, self.root, zero])
            self.tags[name] = self.ir.add_metadata([kind, kind, zero])
        return self.tags[name]


def _tree(function: FunctionType) -> ast.FunctionDef:
    if function not in _trees:
        _trees[function] = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    return _trees[function]


_trees: dict[FunctionType, Any] = {}


def _returns(tree: ast.FunctionDef) -> bool:
    """Whether a function returns something."""
    return any(isinstance(node, ast.Return) and node.value for node in ast.walk(tree))


class _Body:
    """The translation of one function's body.

    A number is a value of LLVM (i64, double or, as a truth value, i1) or, where it is known in
    advance, of Python.  Variables are places in memory, of which LLVM makes registers.
    """

    def __init__(self, module: Module, function: FunctionType, build: ir.IRBuilder):
        self.module, self.function = module, function
        self.build: Any = build
        self.names: dict[str, Any] = {}  # what a name stands for, or the place of a variable
        self.loops: list[tuple] = []  # (where to continue, where to break to)
        self.result: Variable | None = None
        self.end: Any = None

    def run(self, arguments: list):
        """Append the body; the value it returns, or None."""
        tree = _tree(self.function)
        self.end = self.build.append_basic_block("end")
        for parameter, value in zip(tree.args.args, arguments, strict=True):
            self.bind(parameter.arg, value)
        self.block(tree.body)
        self.go(self.end)
        self.build.position_at_end(self.end)
        return self.get(self.result) if self.result else None

    # Statements

    def block(self, body: list[ast.stmt]) -> None:
        for node in body:
            if self.build.block.is_terminated:
                return
            method = getattr(self, f"do_{type(node).__name__.lower()}", None)
            if method is None:
                raise self.wrong(node, f"{type(node).__name__} cannot be translated")
            method(node)

    def wrong(self, node: ast.AST, why: str) -> SyntaxError:
        line = getattr(node, "lineno", 0) + self.function.__code__.co_firstlineno - 1
        return SyntaxError(f"{self.function.__code__.co_filename}:{line}: {why}")

    def go(self, block) -> None:
        if not self.build.block.is_terminated:
            self.build.branch(block)

    def do_expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.value(node.value)

    def do_pass(self, _node: ast.Pass) -> None:
        pass

    def do_assign(self, node: ast.Assign) -> None:
        value = self.value(node.value)
        for target in node.targets:
            self.assign(target, value)

    def do_augassign(self, node: ast.AugAssign) -> None:
        target = node.target
        if isinstance(target, ast.Subscript):
            place = self.place(target)
            more = self.value(node.value)
            self.store(place, self.operation(node, node.op, self.load(place), more))
            return
        now = self.value(target)
        self.assign(target, self.operation(node, node.op, now, self.value(node.value)))

    def assign(self, target: ast.expr, value) -> None:
        if isinstance(target, ast.Name):
            self.bind(target.id, value)
        elif isinstance(target, ast.Tuple):
            values = value.values if isinstance(value, Fields) else value
            for inner, part in zip(target.elts, values, strict=True):
                self.assign(inner, part)
        elif isinstance(target, ast.Subscript):
            self.store(self.place(target), value)
        else:
            raise self.wrong(target, "this cannot be assigned to")

    def bind(self, name: str, value) -> None:
        if not isinstance(value, ir.Value | int | float):
            if self.names.setdefault(name, value) is not value:
                raise self.wrong(_tree(self.function), f"{name} may be assigned to once")
            return
        value = self.number(value)
        if name not in self.names:
            self.names[name] = self.variable(value.type, name)
        self.set(self.names[name], value)

    def variable(self, kind: ir.Type, name: str) -> Variable:
        with self.build.goto_entry_block():
            return Variable(self.build.alloca(kind, name=name), kind)

    def get(self, variable: Variable):
        return self.build.load(variable.pointer, typ=variable.type)

    def set(self, variable: Variable, value) -> None:
        self.build.store(self.converted(value, variable.type), variable.pointer)

    def do_return(self, node: ast.Return) -> None:
        if node.value is not None:
            value = self.number(self.value(node.value))
            if self.result is None:
                self.result = self.variable(value.type, "result")
            self.set(self.result, value)
        self.go(self.end)

    def do_if(self, node: ast.If) -> None:
        test = self.truth(self.value(node.test))
        if isinstance(test, bool):
            self.block(node.body if test else node.orelse)
            return
        yes, no, after = (self.build.append_basic_block(name) for name in ("yes", "no", "after"))
        self.build.cbranch(test, yes, no)
        for block, body in ((yes, node.body), (no, node.orelse)):
            self.build.position_at_end(block)
            self.block(body)
            self.go(after)
        self.build.position_at_end(after)

    def do_while(self, node: ast.While) -> None:
        head, body, after = (
            self.build.append_basic_block(name) for name in ("while", "body", "after")
        )
        self.go(head)
        self.build.position_at_end(head)
        self.build.cbranch(self.known_truth(node.test), body, after)
        self.loop(node.body, body, head, after)

    def known_truth(self, test: ast.expr):
        truth = self.truth(self.value(test))
        return ir.Constant(I1, int(truth)) if isinstance(truth, bool) else truth

    def loop(self, body: list[ast.stmt], inside, again, after) -> None:
        self.build.position_at_end(inside)
        self.loops.append((again, after))
        self.block(body)
        self.loops.pop()
        self.go(again)
        self.build.position_at_end(after)

    def do_for(self, node: ast.For) -> None:
        call = node.iter
        assert isinstance(call, ast.Call) and self.value(call.func) is range, "range only"
        given = [self.value(argument) for argument in call.args]
        first, stop, step = {1: [0, *given, 1], 2: [*given, 1], 3: given}[len(given)]
        assert isinstance(step, int)
        count = self.variable(I64, "count")
        self.set(count, self.number(first))
        stop = self.number(stop)
        head, inside, again, after = (
            self.build.append_basic_block(name) for name in ("for", "body", "again", "after")
        )
        self.go(head)
        self.build.position_at_end(head)
        now = self.get(count)
        self.build.cbranch(
            self.build.icmp_signed("<" if step > 0 else ">", now, stop), inside, after
        )
        self.build.position_at_end(again)
        self.set(count, self.build.add(self.get(count), ir.Constant(I64, step)))
        self.build.branch(head)
        self.build.position_at_end(inside)
        self.assign(node.target, now)
        self.loop(node.body, self.build.block, again, after)

    def do_break(self, _node: ast.Break) -> None:
        self.build.branch(self.loops[-1][1])

    def do_continue(self, _node: ast.Continue) -> None:
        self.build.branch(self.loops[-1][0])

    # Expressions

    def value(self, node: ast.expr):
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self.named(node)
        if isinstance(node, ast.Attribute):
            return self.field(node, self.value(node.value), node.attr)
        if isinstance(node, ast.Subscript):
            base = self.value(node.value)
            if isinstance(base, tuple) and not isinstance(base, View):
                return base[self.value(node.slice)]
            return self.load(self.place(node))
        if isinstance(node, ast.Tuple):
            return tuple(self.value(part) for part in node.elts)
        if isinstance(node, ast.BinOp):
            return self.operation(node, node.op, self.value(node.left), self.value(node.right))
        if isinstance(node, ast.UnaryOp):
            return self.unary(node, self.value(node.operand))
        if isinstance(node, ast.BoolOp):
            return self.both(node, [self.truth(self.value(part)) for part in node.values])
        if isinstance(node, ast.Compare):
            return self.comparison(node)
        if isinstance(node, ast.IfExp):
            return self.choice(node)
        if isinstance(node, ast.Call):
            return self.call(node)
        raise self.wrong(node, f"{type(node).__name__} cannot be translated")

    def named(self, node: ast.Name):
        if node.id in self.names:
            known = self.names[node.id]
            return self.get(known) if isinstance(known, Variable) else known
        known = self.function.__globals__.get(node.id, getattr(builtins, node.id, None))
        if known is None:
            raise self.wrong(node, f"{node.id} is not known here")
        return known

    def field(self, node: ast.expr, base, name: str):
        if isinstance(base, Fields):
            return base.values[base.names.index(name)]
        if isinstance(base, Block):
            for field, array, dtype, dims, start in base.fields:
                if field == name:
                    return View(dtype, array, self.offset(base.pointer, start, I8), dims)
        if isinstance(base, View) and name == "shape":
            return base.dims
        if isinstance(base, View | Block):
            raise self.wrong(node, f"there is no field {name}")
        return getattr(base, name)  # of a module

    def offset(self, pointer, n, kind: ir.Type):
        n = ir.Constant(I64, n) if isinstance(n, int) else n
        return self.build.gep(pointer, [n], inbounds=True, source_etype=kind)

    def place(self, node: ast.Subscript) -> View:
        """The element, or row, that a subscript means; an element has no dims."""
        base, index = self.value(node.value), node.slice
        if not isinstance(base, View):
            raise self.wrong(node, "this is not an array")
        indices = index.elts if isinstance(index, ast.Tuple) else [index]
        at, rest = None, base.dims
        for one in indices:
            n, (dim, *rest) = self.number(self.value(one)), rest
            if self.module.checked:
                self.check(n, dim)
            at = n if at is None else self.build.add(self.build.mul(at, self.number(dim)), n)
        for dim in rest:
            at = self.build.mul(at, self.number(dim))
        pointer = self.offset(base.pointer, at, ELEMENTS[base.dtype])
        return View(base.dtype, base.name, pointer, tuple(rest))

    def check(self, n, dim) -> None:
        outside = self.build.icmp_unsigned(">=", n, self.number(dim))
        with self.build.if_then(outside, likely=False):
            kind = ir.FunctionType(ir.VoidType(), [])
            self.build.call(self.module.ir.declare_intrinsic("llvm.trap", (), kind), [])

    def load(self, place: View):
        if place.dims:
            return place
        kind = ELEMENTS[place.dtype]
        made = self.build.load(place.pointer, typ=kind, align=SIZES[place.dtype])
        made.set_metadata("tbaa", self.module.tag(place.name))
        if kind in (F64, I64):
            return made
        extend = self.build.zext if place.dtype.startswith("u") else self.build.sext
        return extend(made, I64)

    def store(self, place: View, value) -> None:
        kind = ELEMENTS[place.dtype]
        value = self.converted(self.number(value), F64 if kind == F64 else I64)
        if kind not in (F64, I64):
            value = self.build.trunc(value, kind)
        made = self.build.store(value, place.pointer, align=SIZES[place.dtype])
        made.set_metadata("tbaa", self.module.tag(place.name))

    def number(self, value: Any) -> Any:
        """An i64 or a double."""
        if isinstance(value, float):
            return ir.Constant(F64, value)
        if isinstance(value, int):
            return ir.Constant(I64, int(value))
        return self.build.zext(value, I64) if value.type == I1 else value

    def converted(self, value, kind: ir.Type):
        if value.type == kind:
            return value
        assert kind == F64, "a float cannot become an integer"
        return self.build.sitofp(value, F64)

    def pair(self, a, b) -> tuple:
        """Both numbers, of one type."""
        a, b = self.number(a), self.number(b)
        kind = F64 if F64 in (a.type, b.type) else I64
        return self.converted(a, kind), self.converted(b, kind)

    def truth(self, value: Any):
        """An i1, or a bool if it is known in advance."""
        if not isinstance(value, ir.Value):
            return bool(value)
        number = self.number(value)
        return self.build.icmp_signed("!=", number, self.number(0))

    def operation(self, node, op: ast.operator, a, b):
        python, *names = OPERATIONS[type(op)]
        if isinstance(a, int | float) and isinstance(b, int | float):
            return python(a, b)
        a, b = self.pair(a, b)
        if isinstance(op, ast.FloorDiv | ast.Mod) and a.type == I64:
            return self.floored(op, a, b)
        name = names[a.type == F64]
        if not name:
            raise self.wrong(node, "this cannot be done with integers, or with floats")
        return getattr(self.build, name)(a, b)

    def floored(self, op: ast.operator, a, b):
        """// or %, which round down in Python but towards 0 in machine code."""
        zero = self.number(0)
        # A division by 0, an error in Python, would end the process.
        b = self.build.select(self.build.icmp_signed("==", b, zero), self.number(1), b)
        rest = self.build.srem(a, b)
        signs = self.build.icmp_signed("<", self.build.xor(rest, b), zero)
        off = self.build.and_(self.build.icmp_signed("!=", rest, zero), signs)
        if isinstance(op, ast.Mod):
            return self.build.add(rest, self.build.select(off, b, zero))
        return self.build.sub(self.build.sdiv(a, b), self.build.zext(off, I64))

    def unary(self, node: ast.UnaryOp, value):
        if isinstance(node.op, ast.Not):
            truth = self.truth(value)
            return not truth if isinstance(truth, bool) else self.build.not_(truth)
        if not isinstance(value, ir.Value):
            return -value if isinstance(node.op, ast.USub) else ~value
        value = self.number(value)
        if isinstance(node.op, ast.Invert):
            return self.build.not_(value)
        return self.build.fneg(value) if value.type == F64 else self.build.neg(value)

    def both(self, node: ast.BoolOp, truths: list):
        known = [truth for truth in truths if isinstance(truth, bool)]
        wants_all = isinstance(node.op, ast.And)
        if any(truth != wants_all for truth in known):
            return not wants_all
        truths = [truth for truth in truths if not isinstance(truth, bool)]
        if not truths:
            return wants_all
        made = truths[0]
        for truth in truths[1:]:
            made = (self.build.and_ if wants_all else self.build.or_)(made, truth)
        return made

    def comparison(self, node: ast.Compare):
        values, truths = [self.value(part) for part in (node.left, *node.comparators)], []
        for op, a, b in zip(node.ops, values, values[1:], strict=False):
            if isinstance(op, ast.Is | ast.IsNot):
                truths.append((a is b) == isinstance(op, ast.Is))
                continue
            truths.append(self.compared(COMPARISONS[type(op)], a, b))
        return self.both(ast.BoolOp(ast.And(), []), truths)

    def compared(self, sign: str, a, b):
        a, b = self.pair(a, b)
        if a.type == I64:
            return self.build.icmp_signed(sign, a, b)
        return (self.build.fcmp_unordered if sign == "!=" else self.build.fcmp_ordered)(sign, a, b)

    def choice(self, node: ast.IfExp):
        test = self.truth(self.value(node.test))
        if isinstance(test, bool):
            return self.value(node.body if test else node.orelse)
        yes, no, after = (self.build.append_basic_block(name) for name in ("yes", "no", "after"))
        self.build.cbranch(test, yes, no)
        made = []
        for block, part in ((yes, node.body), (no, node.orelse)):
            self.build.position_at_end(block)
            made.append(self.number(self.value(part)))
            ends = self.build.block
            self.build.branch(after)
            made.append(ends)
        self.build.position_at_end(after)
        phi = self.build.phi(made[0].type)
        phi.add_incoming(made[0], made[1])
        phi.add_incoming(made[2], made[3])
        return phi

    def call(self, node: ast.Call):
        values = [self.value(part) for part in node.args]
        if isinstance(node.func, ast.Attribute) and node.func.attr == "bit_length":
            return self.bit_length(self.number(self.value(node.func.value)))
        function = self.value(node.func)
        if function in (int, np.int64, float):
            if not isinstance(values[0], ir.Value):
                return function(values[0])
            return self.converted(self.number(values[0]), F64 if function is float else I64)
        if function is len:
            return values[0].dims[0] if isinstance(values[0], View) else len(values[0])
        if function in (min, max, abs):
            return self.extreme(function, values)
        if function in (math.sqrt, math.floor):
            return self.rounded(function, values[0])
        if getattr(function, "__name__", "") == "prefetch":
            return self.prefetch(*values)
        if not isinstance(function, FunctionType):
            raise self.wrong(node, f"{function!r} cannot be called here")
        parts = [self.flat(value) for value in values]
        kinds = tuple(kind for kind, _ in parts)
        numbers = [number for _, numbers in parts for number in numbers]
        made = self.module.function(function, kinds, [number.type for number in numbers])
        return self.build.call(made, numbers)

    def extreme(self, function: Callable, values: list):
        if not any(isinstance(value, ir.Value) for value in values):
            return function(*values)
        if function is abs:
            number = self.number(values[0])
            values = [number, (self.build.fneg if number.type == F64 else self.build.neg)(number)]
        made = values[0]
        for value in values[1:]:
            a, b = self.pair(made, value)
            made = self.build.select(self.compared("<" if function is min else ">", a, b), a, b)
        return made

    def prefetch(self, array: View, at) -> None:
        """Ask for the cache line of array[at]."""
        i32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [POINTER, i32, i32, i32])
        function = self.module.ir.declare_intrinsic("llvm.prefetch", (POINTER,), kind)
        place = self.offset(array.pointer, at, ELEMENTS[array.dtype])
        numbers = [ir.Constant(i32, n) for n in (0, 3, 1)]  # to read; keep in all caches; data
        self.build.call(function, [place, *numbers])

    def bit_length(self, value):
        """Of a number that is not negative."""
        kind = ir.FunctionType(I64, [I64, I1])
        count = self.module.ir.declare_intrinsic("llvm.ctlz", (I64,), kind)
        zeros = self.build.call(count, [value, ir.Constant(I1, 0)])
        return self.build.sub(self.number(64), zeros)

    def rounded(self, function: Callable, value):
        name = f"llvm.{function.__name__}"
        made = self.build.call(self.module.ir.declare_intrinsic(name, (F64,)), [value])
        return made if function is math.sqrt else self.build.fptosi(made, I64)

    def flat(self, value) -> tuple[Any, list]:
        """(kind, numbers) of an argument for a translated function, as `take_apart`."""
        if isinstance(value, View):
            known = tuple(n if isinstance(n, int) else None for n in value.dims)
            dims = [n for n in value.dims if not isinstance(n, int)]
            return ("array", value.dtype, value.name, known), [value.pointer, *dims]
        if isinstance(value, Block):
            return ("block", value.fields), [value.pointer]
        if isinstance(value, Fields):
            parts = [self.flat(inner) for inner in value.values]
            kinds = tuple(kind for kind, _ in parts)
            return ("fields", value.names, kinds), [n for _, numbers in parts for n in numbers]
        if isinstance(value, ir.Value | int | float):
            number = self.number(value)
            return "float" if number.type == F64 else "int", [number]
        return ("constant", value), []
