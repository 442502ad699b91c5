"""From CUDA C++ to machine code: both compilers, what ptxas says, and how the library carries it."""

import struct

import pytest
import tvm

import bnntvm
from bnntvm.build import _resolve
from bnntvm.cuda import packing, toolchain

SOURCE = """
extern "C" __global__ void __launch_bounds__(64) add_kernel(float* a, float* b, int64_t n) {
  __shared__ float tile[64];
  tile[threadIdx.x] = a[threadIdx.x] * b[threadIdx.x] + b[threadIdx.x];
  __syncthreads();
  if (threadIdx.x < n) a[threadIdx.x] = tile[63 - threadIdx.x];
}
"""
HEADER = "#ifndef __CUDACC_RTC__\n#include <cstdint>\n#endif\n"


def available(name):
    import shutil

    return shutil.which("nvcc") is not None if name == "nvcc" else toolchain.nvrtc_library() is not None


@pytest.mark.parametrize("compiler", ["nvcc", "nvrtc"])
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90a"])
def test_both_compilers(compiler, arch, monkeypatch):
    if not available(compiler):
        pytest.skip(f"{compiler} is not installed")
    monkeypatch.setenv(toolchain.CHOICE_VARIABLE, compiler)
    made = toolchain.compile_source(HEADER + SOURCE, arch)
    assert made.cubin[:4] == b"\x7fELF" and made.compiler == compiler and made.arch == arch
    usage = made.usage["add_kernel"]
    assert usage.registers > 0 and usage.shared_bytes >= 256 and usage.spill_load_bytes == usage.spill_store_bytes == 0


@pytest.mark.parametrize("compiler", ["nvcc", "nvrtc"])
def test_an_error_says_what_the_compiler_said(compiler, monkeypatch):
    if not available(compiler):
        pytest.skip(f"{compiler} is not installed")
    monkeypatch.setenv(toolchain.CHOICE_VARIABLE, compiler)
    with pytest.raises(bnntvm.ToolchainError, match="expected a declaration|does not name a type"):
        toolchain.compile_source("this is no code", "sm_80")


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(toolchain, "nvrtc_library", lambda: None)
    with pytest.raises(bnntvm.ToolchainError, match=r"no CUDA compiler[^$]*pip install 'bnntvm\[cuda\]'"):
        toolchain.compile_source(SOURCE, "sm_80")


def test_an_unknown_choice(monkeypatch):
    monkeypatch.setenv(toolchain.CHOICE_VARIABLE, "gcc")
    with pytest.raises(bnntvm.ToolchainError, match="no such CUDA compiler"):
        toolchain.compile_source(SOURCE, "sm_80")


def test_nothing_is_contracted_or_approximated():
    assert "--fmad=false" in toolchain.OPTIONS
    assert not any("fast_math" in option for option in toolchain.OPTIONS)


def test_what_ptxas_says():
    log = """ptxas info    : Compiling entry function 'a_kernel' for 'sm_80'
ptxas info    : Function properties for a_kernel
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compiling entry function 'b_kernel' for 'sm_80'
ptxas info    : Used 10 registers, used 0 barriers"""
    assert toolchain.parse_usage(log) == {"a_kernel": toolchain.Usage(40, 1024, 8, 4, 12), "b_kernel": toolchain.Usage(10)}


def _text(text):
    return struct.pack("<Q", len(text)) + text


def _blob(*modules):
    body = struct.pack("<3Q", 2, 0, len(modules)) + struct.pack("<Q", 0)
    body = struct.pack(f"<{2 + len(modules)}Q", 1 + len(modules), *([0] * (1 + len(modules)))) + struct.pack("<Q", 0)
    for kind, content in modules:
        body += _text(kind) + (b"" if kind == b"_lib" else _text(content))
    return struct.pack("<Q", len(body)) + body


def test_source_is_replaced_by_machine_code():
    table, source = b"table of functions", b"__global__ ..."
    before = _blob((b"relax.VMExecutable", b"bytes"), (b"_lib", b""), (b"cuda", _text(b"cuda") + table + _text(source)))
    after = packing.replaced(before, lambda text: b"\x7fELF" + text[:3], {source})
    assert after == _blob((b"relax.VMExecutable", b"bytes"), (b"_lib", b""), (b"cuda", _text(b"cubin") + table + _text(b"\x7fELF__g")))


def test_an_unknown_format_is_refused():
    blob = _blob((b"cuda", _text(b"cubin") + b"table" + _text(b"x")))
    with pytest.raises(bnntvm.UnsupportedError, match="another way"):
        packing.replaced(blob, bytes, {b"x"})
    with pytest.raises(bnntvm.UnsupportedError, match="another way"):
        packing.replaced(blob + b"more", bytes, {b"x"})


@pytest.mark.parametrize("compiler", ["nvcc", "nvrtc"])
def test_the_compiler_knows_its_architectures(compiler, monkeypatch):
    """Those with a row, and newer ones, are known; others are refused with the list, however they are spelled, before a network is read."""
    if not available(compiler):
        pytest.skip(f"{compiler} is not installed")
    monkeypatch.setenv(toolchain.CHOICE_VARIABLE, compiler)
    toolchain.check_arch("sm_80")
    toolchain.check_arch("sm_90a")
    for target in ("sm_79", {"kind": "cuda", "arch": "sm_199"}, tvm.target.Target({"kind": "cuda", "arch": "sm_199a"})):
        with pytest.raises(bnntvm.TargetError, match="(?s)does not know this architecture.*where: sm_.*sm_80.*sm_90.*newer CUDA toolkit"):
            bnntvm.build("there is no such model", target=target)


def test_an_architecture_that_only_the_compiler_knows(monkeypatch):
    """A newer one is compiled for CUDA cores; where the compiler does not tell, or there is none, its form decides."""
    monkeypatch.setattr(toolchain, "find_compiler", lambda: "nvcc")
    monkeypatch.setattr(toolchain, "known_architectures", lambda *_: (80, 90, 200))
    assert _resolve("sm_200f").mcpu == "sm_200f" and _resolve("sm_200").mma == ()
    with pytest.raises(bnntvm.TargetError, match="(?s)where: sm_150.*for sm_80, sm_90, sm_200"):
        _resolve("sm_150")
    for unknown in (lambda: monkeypatch.setattr(toolchain, "known_architectures", lambda *_: ()),
                    lambda: monkeypatch.setattr(toolchain, "find_compiler", lambda: None)):  # fmt: skip
        unknown()
        assert _resolve("sm_150").mma == ()
        with pytest.raises(bnntvm.TargetError, match="(?s)unknown target 'sm_99'.*sm_90, sm_89.*sm_100 or newer"):
            _resolve("sm_99")
