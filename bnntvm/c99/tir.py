"""C of TensorIR functions that no kernel family made: TVM's legalisation of single operators, as plain loops."""

from __future__ import annotations

import re

import numpy as np
import tvm
from tvm import s_tir, tirx

from .cwriter import TYPES, Writer, identifier, number, wrapping

_BINARY = {
    "Add": "+", "Sub": "-", "Mul": "*", "Div": "/", "EQ": "==", "NE": "!=", "LT": "<", "LE": "<=", "GT": ">", "GE": ">=", "And": "&&",
    "Or": "||", "BitwiseAnd": "&", "BitwiseOr": "|", "BitwiseXor": "^", "LShift": "<<", "RShift": ">>",
}  # fmt: skip
_FLOATS = {
    "exp": "exp", "log": "log", "sqrt": "sqrt", "tanh": "tanh", "sigmoid": "sigmoid", "erf": "erf", "floor": "floor", "ceil": "ceil",
    "round": "round", "nearbyint": "round", "trunc": "trunc", "fabs": "abs", "pow": "power",
}  # fmt: skip


class Unprintable(NotImplementedError):
    """Something in a function has no C here; the message names it."""


def flatten(prim):
    """A legalised function as loops over flat buffers."""
    name = str(prim.attrs["global_symbol"]) if prim.attrs and "global_symbol" in prim.attrs else "main"
    mod = tvm.IRModule({name: prim})
    passes = s_tir.transform, tirx.transform
    mod = tvm.transform.Sequential(
        [
            passes[0].LowerInitBlock(),
            passes[0].PlanAndUpdateBufferAllocationLocation(),
            passes[0].ConvertBlocksToOpaque(),
            passes[0].LowerMatchBuffer(),
            passes[0].LowerOpaqueBlock(),
            passes[1].FlattenBuffer(),
            passes[1].NarrowDataType(32),
            passes[1].StmtSimplify(),
            passes[1].RemoveNoOp(),
        ]
    )(mod)
    return next(iter(mod.functions.values()))


class Printer:
    """C of one flattened function.

    Attributes
    ----------
    scratch : list of (str, str, int)
        Name, dtype and number of elements of the memory it needs beyond its operands; these are parameters behind those.
    """

    def __init__(self, prim, results):
        self.prim, self.names, self.scratch, self.counters, self.out = prim, {}, [], set(), Writer()
        count = len(prim.params)
        for i, param in enumerate(prim.params):
            self.names[param] = f"x{i}" if i < count - results else f"y{i - count + results}"
        self.results, self.taken = results, set(self.names.values()) | {"n"}

    def write(self, name, title):
        """The function's text."""
        body = self.out
        body.depth = 1
        self.statement(self.prim.body)
        parameters = []
        for i, param in enumerate(self.prim.params):
            constant = "const " * (i < len(self.prim.params) - self.results)
            parameters.append(f"{constant}{TYPES[str(param.dtype)]} *{self.names[param]}")
        parameters += [f"{TYPES[kind]} *{scratch}" for scratch, kind, _ in self.scratch]
        head = Writer()
        head(f"/* {title}, as TVM writes it. */", f"static void {name}({', '.join(parameters)})", "{")
        used = set(re.findall(r"\w+", body.text()))
        head(*[f"    (void){self.names[param]};" for param in self.prim.params if self.names[param] not in used])
        return head.text() + body.text() + "}\n"

    # Statements

    def statement(self, node):
        kind = type(node).__name__
        method = getattr(self, f"_{kind.lower()}", None)
        if method is None:
            raise Unprintable(f"statement {kind}")
        method(node)

    def _seqstmt(self, node):
        for one in node.seq:
            self.statement(one)

    def _for(self, node):
        var = self.fresh(node.loop_var)
        self.counters.add(node.loop_var)
        low, extent = self.expr(node.min), self.expr(node.extent)
        stop = extent if low == "0" else f"{low} + {extent}"
        with self.out.block(f"for (int32_t {var} = {low}; {var} < {stop}; {var}++)"):
            self.statement(node.body)

    def _bufferstore(self, node):
        self.out(f"{self.element(node.buffer, node.indices)} = {self.expr(node.value)};")

    def _ifthenelse(self, node):
        with self.out.block(f"if ({self.bare(node.condition)})"):
            self.statement(node.then_case)
        if node.else_case is not None:
            with self.out.block("else"):
                self.statement(node.else_case)

    def _bind(self, node):
        value = self.bare(node.value)
        self.out(f"const {TYPES[str(node.var.ty.dtype)]} {self.fresh(node.var)} = {value};")

    def _declbuffer(self, node):
        source = node.data.args[0] if isinstance(node.data, tvm.ir.Call) else node.data  # tirx.buffer_data(buffer)
        if source not in self.names:
            raise Unprintable(f"memory {node.buffer.name}")
        self.names[node.buffer] = self.names[source]

    def _allocbuffer(self, node):
        buffer = node.buffer
        name = self.fresh(buffer)
        self.scratch.append((name, str(buffer.dtype), int(np.prod([int(d) for d in buffer.shape]))))

    def _attrstmt(self, node):
        self.statement(node.body)

    def _evaluate(self, node):
        if not isinstance(node.value, tirx.IntImm):
            raise Unprintable(f"call {node.value}")

    def fresh(self, var):
        name = identifier(var.name, self.taken)
        self.taken.add(name)
        self.names[var] = name
        return name

    # Expressions

    def element(self, buffer, indices):
        if len(indices) > 1:
            raise Unprintable(f"{len(indices)} indices")
        return f"{self.names[buffer]}[{self.bare(indices[0]) if len(indices) else '0'}]"

    def bare(self, node):
        """An expression without the parentheses around it."""
        text = self.expr(node)
        return text[1:-1] if _wrapped(text) else text

    def expr(self, node):
        kind, dtype = type(node).__name__, _dtype(node)
        if "x" in dtype:
            raise Unprintable(f"vector {dtype}")
        if isinstance(node, tirx.Var):
            return self.names[node]
        if kind in ("IntImm", "FloatImm"):
            return number(node.value, dtype)
        if kind == "TensorLoad":
            return self.element(node.source, node.indices)
        if kind in ("Add", "Sub", "Mul", "LShift") and np.dtype(dtype).kind in "iu" and self.reads_data(node):
            return wrapping(self.expr(node.a), _BINARY[kind], self.expr(node.b), dtype)
        if kind in _BINARY:
            return f"({self.expr(node.a)} {_BINARY[kind]} {self.expr(node.b)})"
        if kind in ("Min", "Max"):
            return self.extreme(kind, dtype, self.expr(node.a), self.expr(node.b))
        if kind in ("FloorDiv", "FloorMod"):
            return self.floor_divided(kind, node)
        if kind == "Mod":
            return f"({self.expr(node.a)} % {self.expr(node.b)})"
        if kind in ("Not", "BitwiseNot"):
            return f"({'!' if kind == 'Not' else '~'}{self.expr(node.a)})"
        if kind == "Let":
            return self.let(node)
        if kind == "Select":
            return f"({self.expr(node.condition)} ? {self.expr(node.true_value)} : {self.expr(node.false_value)})"
        if kind == "Cast":
            return self.cast(node, dtype)
        if kind == "Call":
            return self.call(node, dtype)
        raise Unprintable(f"expression {kind}")

    def let(self, node):
        """The value takes the name's place: it is written once for each use."""
        self.names[node.var] = self.expr(node.value)
        return self.expr(node.body)

    def extreme(self, kind, dtype, a, b):
        if dtype == "float32":
            return f"bnn_{kind.lower()}({a}, {b})"
        return f"({a} {'<' if kind == 'Min' else '>'} {b} ? {a} : {b})"

    def floor_divided(self, kind, node):
        """Both round down; C's operators do where nothing is negative."""
        a, b = self.expr(node.a), self.expr(node.b)
        if _dtype(node).startswith("u") or (self.counts(node.a) and self.counts(node.b)):
            return f"({a} {'/' if kind == 'FloorDiv' else '%'} {b})"
        if kind == "FloorDiv":
            return f"({a} / {b} - ({a} % {b} != 0 && ({a} < 0) != ({b} < 0)))"
        return f"(({a} % {b} + {b}) % {b})"

    def reads_data(self, node):
        """Whether an expression holds more than loop variables and constants, the parts of an index that cannot overflow."""
        if isinstance(node, tirx.Var):
            return node not in self.counters
        if type(node).__name__ in ("Add", "Sub", "Mul", "FloorDiv", "FloorMod", "Min", "Max"):
            return self.reads_data(node.a) or self.reads_data(node.b)
        return not isinstance(node, tirx.IntImm)

    def counts(self, node):
        """Whether an expression is made of loop variables and constants that are not negative, without subtraction."""
        if isinstance(node, tirx.Var):
            return node in self.counters
        if isinstance(node, tirx.IntImm):
            return node.value >= 0
        return type(node).__name__ in ("Add", "Mul", "FloorDiv", "FloorMod") and self.counts(node.a) and self.counts(node.b)

    def cast(self, node, dtype):
        value, source = self.expr(node.value), _dtype(node.value)
        if dtype == "bool":
            return f"({value} != 0)"
        if source == "float32" and np.dtype(dtype).kind in "iu":
            return f"(({TYPES[dtype]})bnn_{'int64' if np.dtype(dtype).itemsize == 8 or dtype == 'uint32' else 'int32'}({value}))"
        return f"(({TYPES[dtype]}){value})"

    def call(self, node, dtype):
        name = getattr(node.op, "name", str(node.op)).rsplit(".", 1)[-1]
        args = list(node.args)
        if name == "if_then_else":
            a, b, c = (self.expr(x) for x in args)
            return f"({a} ? {b} : {c})"
        if name == "rsqrt" and dtype == "float32":
            return f"(1.0f / bnn_sqrt({self.expr(args[0])}))"
        if name in _FLOATS and dtype == "float32":
            return f"bnn_{_FLOATS[name]}({', '.join(self.bare(a) for a in args)})"
        if name in ("isnan", "isinf"):
            value = self.expr(args[0])
            return f"({value} != {value})" if name == "isnan" else f"(bnn_abs({value}) == BNN_INFINITY)"
        raise Unprintable(f"function {name} of {dtype}")


def _dtype(node):
    return str(getattr(node, "dtype", None) or node.ty.dtype)


def _wrapped(text):
    """Whether the first parenthesis closes with the last character."""
    if not text.startswith("("):
        return False
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return i == len(text) - 1
    return False
