"""C of an epilogue (:class:`bnntvm.spec.Epilogue`): what happens to one value of the anchor, channel ``c`` of pixel ``at``."""

from __future__ import annotations

from bnntvm import spec as sp

from .cwriter import TYPES, number, term, wrapping

_INFIX = {
    "add": "+", "subtract": "-", "multiply": "*", "divide": "/", "greater": ">", "greater_equal": ">=", "less": "<", "less_equal": "<=",
    "equal": "==", "not_equal": "!=", "logical_and": "&&", "logical_or": "||", "logical_xor": "!=",
}  # fmt: skip
_FUNCTIONS = {
    "abs": "bnn_abs", "sign": "bnn_sign", "sqrt": "bnn_sqrt", "exp": "bnn_exp", "log": "bnn_log", "tanh": "bnn_tanh",
    "sigmoid": "bnn_sigmoid", "erf": "bnn_erf", "floor": "bnn_floor", "ceil": "bnn_ceil", "round": "bnn_round", "power": "bnn_power",
    "maximum": "bnn_max", "minimum": "bnn_min",
}  # fmt: skip
#: Operators of integers that functions of floats stand for.
_INTEGERS = {
    "maximum": "({0} > {1} ? {0} : {1})", "minimum": "({0} < {1} ? {0} : {1})", "sign": "(({0} > 0) - ({0} < 0))",
    "floor": "{0}", "ceil": "{0}", "round": "{0}", "relu": "({0} > 0 ? {0} : 0)",
    "clip": "({0} < {1} ? {1} : {0} > {2} ? {2} : {0})",
}  # fmt: skip


class Epilogue:
    """Writes the statements of one epilogue.

    Parameters
    ----------
    epilogue : bnntvm.spec.Epilogue
    channels : int
    pixels : int
        Pixels of an image (1 for dense layers): ``at`` counts the pixels of all images, ``i`` images, ``pixel`` those of one image.
    anchor_dtype : str
    types : list of str
        C types of the inputs, then of the outputs.
    kept : int, optional
        The output of which only some rows are kept: its pixels lie at ``slot``.
    """

    def __init__(self, epilogue, channels, pixels, anchor_dtype, types, kept=None):
        self.epilogue, self.channels, self.pixels, self.kept = epilogue, channels, pixels, kept
        self.dtypes = {0: anchor_dtype}
        self.dtypes |= {1 + i: e.dtype for i, e in enumerate(epilogue.inputs)}
        self.dtypes |= {1 + len(epilogue.inputs) + i: s.dtype for i, s in enumerate(epilogue.steps)}
        names = [f"e{i}" for i in range(len(epilogue.inputs))] + [f"y{i}" for i in range(len(epilogue.outputs))]
        self.parameters = [f"{'const ' * (name[0] == 'e')}{kind} *{name}" for name, kind in zip(names, types)]

    @property
    def ignores_anchor(self):
        """Whether nothing depends on ``v0``."""
        return not any(0 in s.args for s in self.epilogue.steps) and all(o.value != 0 for o in self.epilogue.outputs)

    def before_channels(self, out):
        """What comes before the loop over the channels of a pixel."""
        for i, o in enumerate(self.epilogue.outputs):
            if o.kind == "bits":
                out(f"uint32_t word{i} = 0;")

    def per_channel(self, out):
        """All steps and stores for the anchor's value ``v0`` of channel ``c``."""
        if self.ignores_anchor:
            out("(void)v0;")
        for k, step in enumerate(self.epilogue.steps):
            kind = "int" if step.dtype == "bool" else TYPES[step.dtype]
            out(f"const {kind} v{1 + len(self.epilogue.inputs) + k} = {self.expression(step)};")
        for i, o in enumerate(self.epilogue.outputs):
            self.store(out, i, o)

    def store(self, out, i, output):
        value, at = self.value(output.value), "slot" if i == self.kept else "at"
        if output.kind == "tensor":
            out(f"y{i}[{term(at, self.channels)} + c] = {value};")
        elif output.kind == "planar":
            plane = f"({term('i', self.channels)} + c)"
            out(f"y{i}[{term(plane, self.pixels)} + pixel] = {value};")
        else:
            flip = f" ^ e{output.flip - 1}[c >> 5]" if output.flip else ""
            out(f"word{i} |= (uint32_t)({value} != 0) << (c & 31);")
            with out.block(f"if ((c & 31) == 31 || c == {self.channels - 1})"):
                out(f"y{i}[{term(at, sp.words(self.channels))} + (c >> 5)] = word{i}{flip};", f"word{i} = 0;")

    def value(self, ref, dtype="float32"):
        """A reference as an expression."""
        if isinstance(ref, float):
            return number(ref, dtype)
        if ref == 0 or ref > len(self.epilogue.inputs):
            return f"v{ref}"
        one, name = self.epilogue.inputs[ref - 1], f"e{ref - 1}"
        places = {"tensor": f"{term('at', self.channels)} + c", "channel": "c", "image": f"{term('i', self.channels)} + c", "pixel": "at"}
        if one.times > 1:
            size = self.channels // one.times
            return f"{name}[{term('at', size)} + c % {size}]"
        return f"{name}[{places[one.kind]}]"

    def kind(self, refs):
        """dtype in which a step computes: that of its operands that are no literals."""
        return next((self.dtypes[r] for r in refs if isinstance(r, int) and self.dtypes[r] != "bool"), "float32")

    def expression(self, step):
        kind = self.kind(step.args)
        a = [self.value(r, kind) for r in step.args]
        if step.op == "cast":
            return self.cast(a[0], self.dtypes.get(step.args[0], "float32"), step.dtype)
        if kind == "int32" and step.op in _INTEGERS:
            return _INTEGERS[step.op].format(*a)
        if kind == "int32" and step.op in ("add", "subtract", "multiply"):
            return wrapping(a[0], _INFIX[step.op], a[1], kind)
        if kind == "int32" and step.op in ("negative", "abs"):
            negative = wrapping("0", "-", a[0], kind)
            return negative if step.op == "negative" else f"({a[0]} < 0 ? {negative} : {a[0]})"
        if step.op in _INFIX:
            return f"{a[0]} {_INFIX[step.op]} {a[1]}"
        if step.op in _FUNCTIONS:
            return f"{_FUNCTIONS[step.op]}({', '.join(a)})"
        return {
            "negative": "-({0})", "logical_not": "!{0}", "rsqrt": "1.0f / bnn_sqrt({0})", "relu": "bnn_max({0}, 0.0f)",
            "clip": "bnn_min(bnn_max({0}, {1}), {2})", "where": "{0} ? {1} : {2}", "prelu": "{0} < 0 ? {0} * {1} : {0}",
        }[step.op].format(*a)  # fmt: skip

    @staticmethod
    def cast(value, source, target):
        if target == "bool":
            return f"{value} != 0"
        if source == "float32" and target == "int32":
            return f"bnn_int32({value})"
        return f"({TYPES[target]}){value}"
