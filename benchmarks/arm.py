"""Code for ARM without an ARM machine: what is counted and computed, not measured.

    python -m benchmarks.arm [loops] [layers] [families] [quicknet] [--target cortex-a72]

* ``loops``: instructions of the inner loop of binary layers per 128 binary MACs, read off the assembly, and its cycles by llvm-mca's model
  of the processor, beside those of nothing but eor, cnt and add.
* ``layers``: instructions per 128 binary MACs that whole layers execute, counted by a plugin of user-mode QEMU.
* ``families``: the same for kernels of all families, binary or not.
* ``quicknet``: the instructions of QuickNet, kernel by kernel, and a time estimated from them. The plugin counts how often each block of
  code is executed, llvm-mca says how many cycles a block takes when it follows itself; their product, summed up, over the clock is the
  time. Caches and branch prediction are taken for perfect. Beside it stands what Larq Compute Engine's authors measured on a Raspberry Pi
  4B (Cortex-A72 at 1.5 GHz, one thread): 45.0 ms.

Needs qemu-user, a cross compiler (gcc-aarch64-linux-gnu) or the ziglang wheel, and llvm (for llvm-mca) of Debian or Ubuntu.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys

import numpy as np

from benchmarks import arm_families
from bnntvm import spec as sp
from bnntvm.schedules import binary_conv2d, epilogue
from bnntvm.targets import registry
from tests.emulation.emulator import Program
from tests.emulation.network import Network

#: height and width, channels in and out
LAYERS = ((56, 64), (28, 128), (14, 256), (7, 512))
CLOCK_GHZ, LARQ_MS = 1.5, 45.0
_LABEL, _BRANCH = re.compile(r"^\s*(\.L\w+):"), re.compile(r"^\s*(?:b\.?\w*|cbn?z|tbn?z)\s.*?(\.L\w+)")


def innermost_loops(assembly):
    """Bodies of the loops without inner loops, as lists of instructions."""
    found, label, body = [], None, []
    for line in assembly.splitlines():
        if match := _LABEL.match(line):
            label, body = match[1], []
        elif re.match(r"^\s*[a-z]", line):
            body.append(line.strip())
            if (match := _BRANCH.match(line)) and match[1] == label:
                found.append(list(body))
    return found


def counting_loop(assembly, names=("cnt", "vcnt")):
    """The loop with the most instructions of these names, ``cnt`` by default, and how many."""
    loops = [(sum(line.split()[0].split(".")[0] in names for line in body), body) for body in innermost_loops(assembly)]
    count, body = max(loops, key=lambda item: item[0])
    return body, count


def cycles(body, isa):
    """Cycles of one pass through a loop, in llvm-mca's model of a processor; in that of a Cortex-A57 in 32-bit mode for ``armv7``."""
    text = "\n".join(line for line in body if not re.match(r"(b|bl|br|blr|cb\w+|tb\w+|b\.\w+|adrp?|ret)\b", line))
    if not text:
        return 1.0
    model = ["-mtriple=aarch64", f"-mcpu={isa.mcpu}"] if isa.machine == "aarch64" else ["-mtriple=armv7a", "-mcpu=cortex-a57"]
    command = ["llvm-mca", *model, "-iterations=200"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return int(re.search(r"Total Cycles:\s+(\d+)", done.stdout)[1]) / 200


def limit(pairs, isa):
    """A loop of ``pairs`` times eor, cnt and add, without loads."""
    body = []
    for i in range(pairs):
        if isa.machine == "arm":
            bits, sums = f"q{1 + i % 4}", f"q{8 + i % 8}"
            body += [f"veor {bits}, q0, q0", f"vcnt.8 {bits}, {bits}", f"vadd.i8 {sums}, {bits}, {sums}"]
            continue
        bits, sums = f"v{8 + i % 8}.16b", f"v{16 + i % 16}.16b"
        body += [f"eor {bits}, v0.16b, v1.16b", f"cnt {bits}, {bits}", f"add {sums}, {bits}, {sums}"]
    return body


def layer(size, channels):
    """A 3x3 convolution in a packed chain."""
    bits = sp.Epilogue((sp.EpilogueInput("channel", "int32"),), (sp.Step("greater_equal", (0, 1), "bool"),), (sp.Output("bits", 2),))
    return sp.BinaryConv2d(sp.Window(size, size, (3, 3), (1, 1), (1, 1, 1, 1)), channels, channels, epilogue=bits)


def program(spec, isa):
    """The layer's kernel and its schedule."""
    schedule = binary_conv2d.default_schedule(spec, isa)
    return Program(binary_conv2d.build(spec, schedule, isa), isa), schedule


def operands(spec, schedule, isa):
    """Random bits, weights and thresholds, and room for the result."""
    rng, window, channels = np.random.default_rng(0), spec.window, spec.in_channels
    data = epilogue.pack(rng.random((1, window.in_height, window.in_width, channels)) < 0.5)
    weights = epilogue.pack(rng.random((channels, 3, 3, channels)) < 0.5)
    packed = binary_conv2d.pack_weights(spec, schedule, isa, weights)
    return [data, packed, rng.integers(-9, 9, channels).astype("int32"), np.zeros_like(data)]


def loops(isa):
    """The report on inner loops."""
    print(f"inner loops for {isa.name}: instructions per 128 binary MACs; cycles by llvm-mca, theirs and those of eor, cnt and add alone")
    for size, channels in LAYERS:
        compiled, schedule = program(layer(size, channels), isa)
        body, pairs = counting_loop(compiled.assembly)
        cost, least = cycles(body, isa), cycles(limit(pairs, isa), isa)
        row = f"  3x3 {size}x{size}x{channels}: tile {schedule.pixels}x4, {len(body) / pairs:.3f} instructions"
        print(f"{row}, {cost / pairs:.3f} cycles, limit {least / pairs:.3f} ({cost / least - 1:+.1%})")


def layers(isa):
    """The report on whole layers."""
    print(f"whole layers for {isa.name}, instructions executed per 128 binary MACs (all MACs of the layer, padding included)")
    for size, channels in LAYERS:
        spec = layer(size, channels)
        compiled, schedule = program(spec, isa)
        count = compiled.instructions(operands(spec, schedule, isa))
        body, pairs = counting_loop(compiled.assembly)
        inner, whole = len(body) / pairs, count / (size * size * channels * channels * 9 / 128)
        print(f"  3x3 {size}x{size}x{channels}: {whole:.3f}, {whole / inner:.2f} x the inner loop")


def quicknet(isa):
    """The report on QuickNet."""
    from benchmarks import zoo

    network = Network(zoo.quicknet().SerializeToString(), isa.name)
    feed = {name: np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32) for name in network.inputs}
    network.run(feed, count=True)
    total, time_ms, rows = 0, 0.0, []
    for name, calls in network.counts.items():
        count = len(calls) * sum(instructions * times for (_, instructions), times in calls[0].items())
        spent = len(calls) * _block_cycles(network.program, calls[0], isa) / CLOCK_GHZ / 1e6
        total, time_ms = total + count, time_ms + spent
        rows.append((spent, f"  {name:<24} {len(calls)} x {count / len(calls) / 1e6:8.3f} {spent:8.2f}"))
    print(f"QuickNet for {isa.name}: calls, million instructions of each, estimated ms of all at {CLOCK_GHZ} GHz")
    for _, row in sorted(rows, reverse=True):
        print(row)
    print(f"  all: {total / 1e6:.1f} million instructions, estimated {time_ms:.1f} ms; Larq Compute Engine, measured: {LARQ_MS} ms")


def _block_cycles(compiled, blocks, isa):
    """Cycles of the blocks that a kernel executes; those of less than a thousandth of all instructions take one per instruction."""
    every = sum(instructions * times for (_, instructions), times in blocks.items())
    total = 0.0
    for (address, instructions), times in blocks.items():
        body = [compiled.disassembly.get(address + 4 * i, "nop") for i in range(instructions)]
        total += times * (instructions if instructions * times < every / 1000 else cycles(body, isa))
    return total


def main(arguments):
    """Print the reports that are asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reports = {"loops": loops, "layers": layers, "families": arm_families.report, "quicknet": quicknet}
    parser.add_argument("reports", nargs="*", choices=[[], *reports], metavar="report", help=", ".join(reports))
    parser.add_argument("--target", default="cortex-a72")
    options = parser.parse_args(arguments)
    isa = registry.resolve(options.target)
    for name in options.reports or reports:
        reports[name](isa)


if __name__ == "__main__":
    main(sys.argv[1:])
