"""What became of every layer of a network: kind, kernel, planes, sizes, and the reason where it stayed in float."""

import io
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


def _table(layers):
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("layer", no_wrap=True)
    table.add_column("op", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("planes", no_wrap=True)
    table.add_column("MACs", no_wrap=True, justify="right")
    table.add_column("float", no_wrap=True, justify="right")
    table.add_column("stored", no_wrap=True, justify="right")
    table.add_column("kernel", no_wrap=True, overflow="ellipsis", max_width=26)
    table.add_column("why not on bits", no_wrap=True, overflow="ellipsis")
    for layer in layers:
        cells = (
            _tail(layer.node or layer.output, 36),
            layer.op,
            layer.kind,
            layer.planes,
            _human_macs(layer.macs),
            human_bytes(layer.float_bytes),
        )
        cells += (human_bytes(layer.weight_bytes), layer.kernel, layer.reason)
        table.add_row(*(_plain(str(cell)) for cell in cells))
    text = io.StringIO()
    Console(file=text, width=WIDTH, color_system=None, legacy_windows=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def _tail(name, width):
    """A name of at most ``width`` characters; of long ones the end is kept, which tells layers apart."""
    return name if len(name) <= width else "\N{HORIZONTAL ELLIPSIS}" + name[1 - width :]


def _plain(text):
    """Text that rich shows as it is, on one line (node names come from a file: no markup, no control characters)."""
    from rich.text import Text

    return Text("".join(c if c.isprintable() else "?" for c in text.replace("\n", " ")))


def _notes(layers, table):
    """The reasons that the table cuts short, in full, each once, with the layers that it holds for."""
    reasons = {}
    for layer in layers:
        if layer.reason not in table:
            reasons.setdefault(layer.reason, []).append(layer.node or layer.output)
    if not reasons:
        return []
    lines = ["", "why not on bits, in full:"]
    for reason, names in reasons.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"  {shown}: {' '.join(reason.split())}")
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
