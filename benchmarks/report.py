"""Tables and a plot from the raw numbers of a run (the content of results.json)."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np

from .peers import FOR_WEIGHTS, SYSTEMS


def median(cell: dict | None) -> float | None:
    """Median of a cell in seconds; None where there is no figure."""
    return statistics.median(cell["seconds"]) if cell and cell["seconds"] else None


def shown(cell: dict | None, unit: float, digits: int) -> str:
    """Median and half the distance between the quartiles, or why there is none."""
    middle = median(cell)
    if middle is None:
        return "failed" if cell else "-"
    low, high = np.percentile(cell["seconds"], [25, 75])
    return f"{middle / unit:.{digits}f} ± {(high - low) / 2 / unit:.{digits}f}"


def ratio(cells: dict, slow: str, fast: str) -> float | None:
    """How many times faster ``fast`` is than ``slow``: the median of the rounds' ratios."""
    a, b = cells.get(slow), cells.get(fast)
    if median(a) is None or median(b) is None:
        return None
    return statistics.median(x / y for x, y in zip(a["seconds"], b["seconds"]))


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines]) + "\n"


def _of_kind(content: dict, kind: str) -> list[dict]:
    return [r for r in content["rows"] if r["kind"] == kind]


def _systems(rows: list[dict]) -> list[str]:
    """Systems with at least one figure or failure that is not a missing package, in their fixed order."""
    return [s for s in SYSTEMS if s != "limit" and any(s in r["cells"] and not missing(r["cells"][s]) for r in rows)]


def missing(cell: dict) -> bool:
    """Whether the system is not installed."""
    return cell["failure"].startswith(("ModuleNotFoundError", "ImportError"))


def _limit(row: dict) -> float | None:
    """Seconds that the binary multiply-accumulates of a row take at the limit of the core."""
    kernel = median(row["cells"].get("limit"))
    return kernel * row["macs"] / row["cells"]["limit"]["macs"] if kernel else None


def _kernels_limit(row: dict) -> float | None:
    """Seconds that a row takes if every kernel is at its limit."""
    return row["cells"].get("default", {}).get("limit_seconds") or None


def _share(row: dict, system: str) -> str:
    """Percent of the limit of all kernels that a system reaches."""
    limit, seconds = _kernels_limit(row), median(row["cells"].get(system))
    return f"{100 * limit / seconds:.0f} %" if limit and seconds else "-"


def _times(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}x"


def _compared(rows: list[dict], unit: float, digits: int, mean: bool) -> str:
    """Table of times with this project's lead over OpenVINO, and both leads over ONNX Runtime."""
    systems = _systems(rows)
    wanted = ("openvino", "bnntvm"), ("ort", "bnntvm"), ("ort", "openvino"), ("default", "bnntvm")
    pairs = [(a, b) for a, b in wanted if a in systems and b in systems]
    limits = any("limit" in r["cells"] for r in rows)
    header = [rows[0]["kind"], *[SYSTEMS[s].title for s in systems], *["limit of the binary layers"] * limits]
    reaching = [s for s in ("default", "bnntvm") if s in systems] if any(_kernels_limit(r) for r in rows) else []
    header += ["limit of all kernels", *[f"{s}, % of it" for s in reaching]] if reaching else []
    header += [f"{b} over {a}" for a, b in pairs]
    lines = []
    for row in rows:
        cells = row["cells"]
        times = [shown(cells.get(s), unit, digits) for s in systems]
        times += [f"{limit / unit:.{digits}f}" if (limit := _limit(row)) else "-"] * limits
        if reaching:
            times += [f"{limit / unit:.{digits}f}" if (limit := _kernels_limit(row)) else "-", *[_share(row, s) for s in reaching]]
        lines.append([row["name"], *times, *[_times(ratio(cells, a, b)) for a, b in pairs]])
    if mean and len(rows) > 1:
        means = []
        for a, b in pairs:
            known = [x for r in rows if (x := ratio(r["cells"], a, b))]
            means.append(_times(geometric_mean(known)) if known else "-")
        lines.append(["**geometric mean**", *[""] * (len(header) - 1 - len(pairs)), *means])
    return table(header, lines)


def _chains(rows: list[dict]) -> str:
    """Packed chains against the limit of the core."""
    systems = _systems(rows)
    header = ["one more layer in a packed chain", *[f"{SYSTEMS[s].title}, µs" for s in systems], "limit, µs"]
    header += [f"{s}, % of limit" for s in systems]
    header += ["bnntvm over openvino"] if {"bnntvm", "openvino"} <= set(systems) else []
    lines = []
    for row in rows:
        cells = row["cells"]
        kernel = median(cells.get("limit"))
        work = row["macs"] / cells["limit"]["macs"] if kernel else None
        limit = kernel * work if kernel else None
        parts = [f"{100 * work * r:.1f} %" if kernel and (r := ratio(cells, "limit", s)) else "-" for s in systems]
        line = [row["name"], *[shown(cells.get(s), 1e-6, 1) for s in systems], f"{limit * 1e6:.1f}" if limit else "-", *parts]
        lines.append(line + ([_times(ratio(cells, "openvino", "bnntvm"))] if len(header) > len(line) else []))
    return table(header, lines)


def _few_bits(rows: list[dict]) -> str:
    """Few-bit convolutions against ONNX Runtime in 8 bits, and against one bit each within a chain."""
    header = ["layer", "bnntvm", "ONNX Runtime fp32", "ONNX Runtime u8s8", "bnntvm over ort", "bnntvm over ort-u8s8"]
    header += ["one more in a chain", "on one bit each", "ratio"]
    lines = []
    for row in rows:
        cells = row["cells"]
        times = [shown(cells.get(name), 1e-6, 0) for name in ("bnntvm", "ort", "ort-u8s8", "bnntvm/chain", "bnntvm/binary")]
        leads = [_times(ratio(cells, peer, "bnntvm")) for peer in ("ort", "ort-u8s8")]
        lines.append([row["name"], *times[:3], *leads, *times[3:], _times(ratio(cells, "bnntvm/chain", "bnntvm/binary"))])
    return table(header, lines)


def _weights(rows: list[dict]) -> str:
    """Packed weights against float weights, against ONNX Runtime's packed weights, and against the time to read them."""
    systems = [s for s in ("bnntvm", "ort", *FOR_WEIGHTS) if any(s in r["cells"] for r in rows)]
    peers = [s for s in ("ort", "ort-2bit") if s in systems]
    header = ["layer", *[(SYSTEMS | FOR_WEIGHTS)[s].title for s in systems], *[f"bnntvm over {s}" for s in peers]]
    header += ["bnntvm / reading", "stored"]
    lines = []
    for row in rows:
        cells = row["cells"]
        leads = [_times(ratio(cells, s, "bnntvm")) for s in peers] + [_times(ratio(cells, "bnntvm", "stream"))]
        stored = cells["bnntvm"]["note"].rpartition(", ")[2] if median(cells.get("bnntvm")) else "-"
        lines.append([row["name"], *[shown(cells.get(s), 1e-6, 0) for s in systems], *leads, stored])
    return table(header, lines)


def _threads(rows: list[dict]) -> str:
    """One thread and two, wall time."""
    lines = []
    for row in rows:
        for system in sorted({name.split("/")[0] for name in row["cells"]}):
            one, two = row["cells"].get(f"{system}/1"), row["cells"].get(f"{system}/2")
            if one and missing(one):
                continue
            times = [shown(one, 1e-3, 2), shown(two, 1e-3, 2), _times(ratio(row["cells"], f"{system}/1", f"{system}/2"))]
            lines.append([f"{row['name']}, {SYSTEMS[system].title}", *times])
    return table(["network, wall time", "one thread, ms", "two threads, ms", "speed-up"], lines)


def _remarks(content: dict) -> list[str]:
    """Missing packages, failures, outputs that differ."""
    lines, absent = [], set()
    for row in content["rows"]:
        for name, cell in row["cells"].items():
            where = f"{row['kind']} {row['name']}, {name}"
            if missing(cell):
                absent.add(f"{(SYSTEMS | FOR_WEIGHTS)[name.split('/')[0]].title} was left out: {cell['failure']}")
            elif cell["failure"]:
                lines.append(f"{where}: {cell['failure']}")
            elif cell["difference"] is not None and cell["difference"] > 1e-4 and not name.startswith("ort"):
                lines.append(f"{where}: output differs from ONNX Runtime's by {cell['difference']:.2g} of its largest magnitude")
    return sorted(absent) + lines


def markdown(content: dict) -> str:
    """The whole report."""
    facts = content["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    parts = [
        "# Benchmark results\n",
        f"{facts['date']}, {facts['cpu']} (family/model/stepping {facts['cpu family/model/stepping']}), "
        f"{facts['cores of the host']} cores, measured on core {facts['cores used'][0]}, load at start {facts['load at start']:.1f}; "
        f"{facts['rounds']} interleaved rounds; Python {facts['python']}, {versions}. "
        "Medians ± half the distance between the quartiles; CPU time unless it says wall time.\n",
    ]
    if rows := _of_kind(content, "layer"):
        parts += ["## Single layers, float in and float out, one thread, µs\n", _compared(rows, 1e-6, 0, mean=False)]
    if rows := _of_kind(content, "chain"):
        speeds = [r["cells"]["limit"]["macs"] / m / 1e9 for r in rows if (m := median(r["cells"].get("limit")))]
        rate = f" (limit: {statistics.median(speeds):.0f} G binary MACs a second)" if speeds else ""
        parts += [f"## Packed in, packed out, one thread{rate}\n", _chains(rows)]
    if rows := _of_kind(content, "network"):
        parts += ["## Whole networks, one image, one thread, ms\n", _compared(rows, 1e-3, 2, mean=True)]
    if rows := _of_kind(content, "bits"):
        parts += ["## Few bits, one thread, µs\n", _few_bits(rows)]
    if rows := _of_kind(content, "attention"):
        parts += ["## Products of two binary tensors, one thread, µs\n", _compared(rows, 1e-6, 0, mean=False)]
    if rows := _of_kind(content, "weights"):
        parts += ["## Packed weights, one thread, µs\n", _weights(rows)]
    if rows := _of_kind(content, "threads"):
        parts += ["## Two threads\n", _threads(rows)]
    if remarks := _remarks(content):
        parts += ["## Remarks\n", "".join(f"* {r}\n" for r in remarks)]
    return "\n".join(parts)


def plot(content: dict, path: Path) -> None:
    """Bars: how many times faster than ONNX Runtime fp32 every system is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [(kind, rows) for kind in ("layer", "network") if (rows := _of_kind(content, kind))]
    if not groups:
        return
    figure, axes = pyplot.subplots(len(groups), 1, figsize=(11, 4.2 * len(groups)), squeeze=False)
    for (kind, rows), axis in zip(groups, axes[:, 0]):
        systems = [s for s in _systems(rows) if s != "ort"]
        width = 0.8 / max(len(systems), 1)
        for i, system in enumerate(systems):
            heights = [ratio(r["cells"], "ort", system) or 0 for r in rows]
            bars = axis.bar(np.arange(len(rows)) + i * width, heights, width, label=SYSTEMS[system].title)
            axis.bar_label(bars, [f"{h:.1f}" if h else "" for h in heights], fontsize=7)
        axis.axhline(1, color="black", linewidth=0.8)
        middles = np.arange(len(rows)) + width * (len(systems) - 1) / 2
        axis.set_xticks(middles, [r["name"] for r in rows], rotation=20, ha="right", fontsize=8)
        axis.set_ylabel("times ONNX Runtime fp32")
        axis.set_title({"layer": "Single layers, float in and float out", "network": "Whole networks"}[kind] + ", one thread", fontsize=10)
        axis.legend(fontsize=8)
    figure.suptitle(f"{content['environment']['cpu']}, {content['environment']['date']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
