"""Which kernels keep registers in memory: ``python -m benchmarks.cuda_spills [sm_80 sm_90a] [--only NAME ...] [--default]``.

Compiles the kernels of :mod:`benchmarks.cuda_cases` and those that :mod:`benchmarks.cuda_prepare` has timed, without a device, and prints
what ptxas says of each that spills: bytes that a thread stores and loads, registers, and the schedule.
"""

from __future__ import annotations

import argparse
import sys


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architectures", nargs="*", default=["sm_80", "sm_90a"])
    parser.add_argument("--only", nargs="*", default=[""], help="what names begin with")
    parser.add_argument("--default", action="store_true", help="default schedules only")
    parser.add_argument("--all", action="store_true", help="print kernels that do not spill too")
    options = parser.parse_args(arguments)
    from bnntvm.targets import registry

    worst = 0
    for isa in map(registry.resolve, options.architectures):
        for name, schedule, function in kernels(isa, options.default):
            if name.startswith(tuple(options.only)):
                stored, line = _line(f"{isa.name} {name}", schedule, function, isa)
                worst = max(worst, stored)
                if stored or options.all:
                    print(line, flush=True)
    print(f"worst: {worst} bytes")
    return 0


def kernels(isa, default):
    """``(name, schedule, PrimFunc)``; names of cases end with the number of the schedule, 0 for the default."""
    from benchmarks import cuda_cases, cuda_prepare
    from bnntvm.schedules import families

    for case in cuda_cases.cases(isa):
        if not default or case.name.endswith("_0"):
            yield case.name, case.schedule, families.of(case.spec, isa).build(case.spec, case.schedule, isa)
    for entry, function in cuda_prepare.timed(isa):
        yield entry["name"], entry["schedule"], function


def _line(name, schedule, function, isa):
    import tvm

    from bnntvm.cuda import packing, toolchain
    from bnntvm.cuda.backend import device_target
    from bnntvm.schedules.cuda import pipeline

    with packing.source_kept():
        made = tvm.compile(tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")}), device_target(isa),
                           tir_pipeline=pipeline.NAME)  # fmt: skip
    found = [one for source in packing.source_of(made.mod) for one in toolchain.compile_source(source, isa.mcpu).usage.values()]
    numbers = ", ".join(f"{u.spill_store_bytes} stored, {u.spill_load_bytes} loaded, {u.registers} registers" for u in found)
    return max(u.spill_store_bytes for u in found), f"{name}: {numbers}; {schedule}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
