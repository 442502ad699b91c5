"""From a kernel to CUDA C++, PTX and machine code, without a device."""

import functools
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

import pytest
import tvm

from bnntvm.schedules.cuda import pipeline

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
#: As kernels are compiled for networks: nothing is contracted, flushed or approximated.
OPTIONS = ("-O3", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true", "-std=c++17")


def source(function, isa):
    """CUDA C++ of one kernel."""
    before = os.environ.get("TVM_COMPILE_FORCE_FALLBACK")
    os.environ["TVM_COMPILE_FORCE_FALLBACK"] = "1"
    try:
        target = tvm.target.Target({"kind": "cuda", "arch": isa.mcpu})
        library = tvm.compile(tvm.IRModule({"kernel": function}), target=target, tir_pipeline=pipeline.NAME)
    finally:
        os.environ.pop("TVM_COMPILE_FORCE_FALLBACK")
        if before is not None:
            os.environ["TVM_COMPILE_FORCE_FALLBACK"] = before
    return library.mod.imports[0].inspect_source("cuda")


@functools.lru_cache(maxsize=32)
def compiled(code, arch):
    """``(PTX, what ptxas says)`` of CUDA C++."""
    number = arch.removeprefix("sm_")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "kernel.cu")
        path.write_text(code)
        command = ["nvcc", *OPTIONS, f"-gencode=arch=compute_{number},code=sm_{number}", "--keep", f"--keep-dir={folder}",
                   "-Xptxas=-v", "-w", "-cubin", "-o", f"{folder}/kernel.cubin", path]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        ptx = pathlib.Path(folder, "kernel.ptx").read_text()
        keep = os.environ.get("BNNTVM_KEEP_CUBIN")
        if keep:
            shutil.copy(f"{folder}/kernel.cubin", keep)
            shutil.copy(path, keep + ".cu")
    return ptx, done.stderr


def usage(log):
    """Registers and bytes of spills, from what ptxas says of a kernel."""
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    return int(re.search(r"Used (\d+) registers", log)[1]), sum(spills), int(re.search(r"(\d+) bytes stack frame", log)[1])
