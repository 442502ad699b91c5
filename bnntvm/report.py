"""What became of every layer of a network: kind, kernel, planes, sizes, and the reason where it stayed in float."""

from dataclasses import asdict, dataclass, fields

KINDS = ("binary", "bitserial", "int8", "weight-only", "float")
#: Kinds whose arithmetic, or at least whose weights, are low-bit.
LOW_BIT = frozenset(KINDS) - {"float"}
WIDTH = 140


@dataclass(frozen=True)
class Layer:
    """One Conv, ConvTranspose, Gemm or MatMul of the ONNX graph, whether it was fused with its neighbours or not.

    Attributes
    ----------
    node, output : str
        The ONNX node's name and the name of its first output.
    op : str
        Its ONNX operator.
    kind : str
        ``binary`` (one plane times one plane), ``bitserial`` (more planes), ``int8``, ``weight-only`` (packed weights, float data), or
        ``float``.
    reason : str
        Why the layer is not on bits; empty where it is.
    kernel : str
        The kernel that computes it; equal names share one piece of code.
    macs : int
        Multiply-accumulates for one element of the batch, padded taps counted.
    weight_bytes, float_bytes : int
        Bytes stored for its weights, and what the same weights take as float32.
    planes : str
        Bit planes as "activations x weights", e.g. "1x1"; empty for float.
    """

    node: str
    output: str
    op: str
    kind: str
    reason: str
    kernel: str
    macs: int
    weight_bytes: int
    float_bytes: int
    planes: str

    @classmethod
    def from_dict(cls, values):
        """A layer from a manifest's entry; keys that this version does not know are ignored."""
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        return cls(**{"reason": "", "kernel": "", "macs": 0, "weight_bytes": 0, "float_bytes": 0, "planes": "", **known})


@dataclass(frozen=True)
class Report:
    """The layers of a built network and what it takes to run it; ``print(report)`` shows it.

    Attributes
    ----------
    layers : tuple of Layer
        In the order of the ONNX graph.
    constants_bytes, code_bytes : int
        Stored constants (weights, thresholds, scales) and machine code.
    workspace_bytes : int
        Memory for intermediate results at batch 1, as planned.
    target : str
        What the network was built for.
    options : dict
        The build's options.
    """

    layers: tuple
    constants_bytes: int
    code_bytes: int
    workspace_bytes: int
    target: str
    options: dict

    @classmethod
    def from_manifest(cls, manifest):
        return cls(
            layers=tuple(Layer.from_dict(entry) for entry in manifest["layers"]),
            constants_bytes=manifest["constants_bytes"],
            code_bytes=manifest["code_bytes"],
            workspace_bytes=manifest["workspace_bytes"],
            target=manifest["target"]["name"],
            options=dict(manifest.get("options", {})),
        )

    def as_dict(self):
        """The same as plain data, for JSON."""
        return asdict(self) | {"layers": [asdict(layer) for layer in self.layers]}

    def __str__(self):
        table = _table(self.layers)
        parts = [table, *_notes(self.layers, table), _totals(self)]
        if self.options.get("assume_nonzero"):
            parts.append("assume_nonzero: a Sign whose input is exactly 0 gives +1 or -1 here, not 0.")
        if self.options.get("weight_tolerance"):
            parts.append(f"weight_tolerance {self.options['weight_tolerance']}: weights within it were taken as two-level.")
        return "\n".join(parts)


def human_bytes(count):
    """``count`` bytes as text with three significant digits: 999 B, 1.23 kB, 45.6 MB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return ""


def _human_macs(count):
    for unit in ("", " k", " M", " G"):
        if count < 999.5 or unit == " G":
            return f"{count:.3g}{unit}"
        count /= 1000
    return ""


_HEADS = ("layer", "op", "kind", "planes", "MACs", "float", "stored", "kernel", "why not on bits")
_RIGHT = {4, 5, 6}


def _table(layers):
    """The layers as lines of at most WIDTH characters; what is left of a line is the reason's, cut if need be."""
    rows = [_HEADS, *(_cells(layer) for layer in layers)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADS) - 1)]
    rest = WIDTH - sum(widths) - 2 * len(widths)
    lines = []
    for row in rows:
        cells = [cell.rjust(width) if i in _RIGHT else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        lines.append("  ".join([*cells, _head(row[-1], rest)]).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def _cells(layer):
    sizes = (_human_macs(layer.macs), human_bytes(layer.float_bytes), human_bytes(layer.weight_bytes))
    name, op, kernel, reason = map(_plain, (layer.node or layer.output, layer.op, layer.kernel, layer.reason))
    return (_tail(name, 36), op, layer.kind, layer.planes, *sizes, _head(kernel, 24), reason)


def _plain(text):
    """Text on one line without control characters: names come from a file."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def _head(text, width):
    return text if len(text) <= width else text[: width - 3] + "..."


def _tail(text, width):
    """The end of a long name, which tells layers apart."""
    return text if len(text) <= width else "..." + text[3 - width :]


def _notes(layers, table):
    """The reasons that the table cuts short, in full, each once, with the layers that it holds for."""
    reasons = {}
    for layer in layers:
        reason = _plain(layer.reason)
        if reason not in table:
            reasons.setdefault(reason, []).append(_plain(layer.node or layer.output))
    if not reasons:
        return []
    lines = ["", "why not on bits, in full:"]
    for reason, names in reasons.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"  {shown}: {reason}")
    return lines


def _totals(report):
    low = [layer for layer in report.layers if layer.kind in LOW_BIT]
    before, after = sum(layer.float_bytes for layer in report.layers), sum(layer.weight_bytes for layer in report.layers)
    macs, low_macs = sum(layer.macs for layer in report.layers), sum(layer.macs for layer in low)
    lines = [""]
    if not low:
        lines.append("no low-bit layer found: every layer runs in float32.")
    else:
        share = f", {low_macs / macs:.1%} of {_human_macs(macs)} MACs" if macs else ""
        lines.append(f"{len(low)} of {len(report.layers)} layers on low bits{share}")
    if after:
        lines.append(f"weights {human_bytes(before)} in float32, {human_bytes(after)} stored ({before / after:.1f}x smaller)")
    lines.append(
        f"constants {human_bytes(report.constants_bytes)}, code {human_bytes(report.code_bytes)}, "
        f"workspace {human_bytes(report.workspace_bytes)} at batch 1, target {report.target}"
    )
    return "\n".join(lines)
