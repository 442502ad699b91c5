"""What one core can do at most: kernels that never leave the registers.

``xor_popcount`` runs ``sum += popcount(sum ^ a)`` on independent vector accumulators: three instructions for every vector of binary MACs
(xor, popcount, add), as in the inner loop of a binary convolution, with no load and no store. Feeding the sum back into the xor keeps the
compiler from moving anything out of the loop. ``fma`` runs ``sum = sum * a + b`` in float32 in the same way.

From a shell: ``python -m benchmarks.limit`` prints both and the instructions of the inner loops.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Latency of xor + popcount + add is five cycles at one and a half cycles each, of an FMA four at half a cycle: twelve chains hide both,
# and with their operand they fit the 16 registers of AVX2.
ACCUMULATORS = 12
ITERATIONS = 200_000


@dataclass(frozen=True)
class LimitKernel:
    """A compiled register-resident kernel.

    Attributes
    ----------
    name : str
        ``xor_popcount`` or ``fma``.
    macs : int
        Multiply-accumulates of one call.
    call : callable
        Runs it once.
    assembly : str
        The whole function.
    """

    name: str
    macs: int
    call: Callable[[], None]
    assembly: str

    def inner_loop(self) -> Counter:
        """Instructions by mnemonic of the loop with most vector instructions: from a label to the jump back to it."""
        loops = re.findall(r"^(\.LBB\w+):\n((?:(?!\.LBB).*\n)*?)\tj\w+\t\1$", self.assembly, re.MULTILINE)
        counts = [Counter(re.findall(r"^\t([a-z]\w+)", body, re.MULTILINE)) for _, body in loops]
        return max(counts, key=lambda c: sum(n for op, n in c.items() if op.startswith("v")), default=Counter())

    def macs_per_second(self, seconds: float = 0.2) -> float:
        """Best rate of several calls; CPU time."""
        self.call()
        best, end = 0.0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.process_time()
            self.call()
            best = max(best, self.macs / (time.process_time() - start))
        return best


def vector_bits() -> int:
    """Width of the host's vector registers in bits."""
    flags = set(open("/proc/cpuinfo").read().split())
    return 512 if "avx512f" in flags else 256 if "avx2" in flags else 128


def host_target():
    """TVM target for exactly this processor."""
    import tvm
    from tvm.target import codegen

    return tvm.target.Target({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()})


def _build(name: str, dtype: str, lanes: int, step: Callable, macs_per_vector: int) -> LimitKernel:
    """Compile ``sum_i = step(sum_i, operand)`` in a loop over `ACCUMULATORS` vectors.

    Parameters
    ----------
    name : str
        Name of the kernel.
    dtype : str
        Element type of the vectors.
    lanes : int
        Elements of one vector.
    step : callable
        (sum, first operand, second operand) to the new sum; PrimExpr vectors.
    macs_per_vector : int
        What one step counts for.
    """
    import tvm
    from tvm import tirx

    def index(i: int):
        return [tirx.Ramp(tirx.IntImm("int64", i * lanes), tirx.IntImm("int64", 1), lanes)]

    operands = tirx.decl_buffer((2 * lanes,), dtype, "operands")
    output = tirx.decl_buffer((ACCUMULATORS * lanes,), dtype, "output")
    sums = tirx.decl_buffer((ACCUMULATORS * lanes,), dtype, "sums", scope="local")
    first, second = (tirx.BufferLoad(operands, index(i)) for i in range(2))
    a, b = tirx.Var("a", f"{dtype}x{lanes}"), tirx.Var("b", f"{dtype}x{lanes}")
    steps = [tirx.BufferStore(sums, step(tirx.BufferLoad(sums, index(i)), a, b), index(i)) for i in range(ACCUMULATORS)]
    first_pass, passes = (tirx.IntImm("int64", n) for n in (0, ITERATIONS))
    loop = tirx.For(tirx.Var("i", "int64"), first_pass, passes, tirx.ForKind.SERIAL, tirx.SeqStmt(steps))
    body = tirx.SeqStmt(
        [
            tirx.AllocBuffer(sums),
            tirx.Bind(a, first),
            tirx.Bind(b, second),
            *[tirx.BufferStore(sums, tirx.BufferLoad(output, index(i)), index(i)) for i in range(ACCUMULATORS)],
            loop,
            *[tirx.BufferStore(output, tirx.BufferLoad(sums, index(i)), index(i)) for i in range(ACCUMULATORS)],
        ]
    )
    function = tirx.PrimFunc([operands, output], body).with_attr("global_symbol", name).with_attr("tirx.noalias", True)
    module = tvm.compile(tvm.IRModule({name: function}), target=host_target())
    assembly = (module.mod if hasattr(module, "mod") else module).inspect_source("asm")
    rng = np.random.default_rng(0)
    if dtype == "float32":
        values = [np.full(2 * lanes, 0.5, dtype), rng.random(ACCUMULATORS * lanes).astype(dtype)]
    else:
        values = [rng.integers(0, 2**63, n, dtype=dtype) for n in (2 * lanes, ACCUMULATORS * lanes)]
    tensors = [tvm.runtime.tensor(v) for v in values]
    entry = module[name]
    return LimitKernel(name, macs_per_vector * ACCUMULATORS * ITERATIONS, lambda: entry(*tensors), assembly)


def xor_popcount() -> LimitKernel:
    """Binary MACs: one per bit of every xor."""
    from tvm import tirx

    bits = vector_bits()
    return _build("xor_popcount", "uint64", bits // 64, lambda s, a, b: s + tirx.popcount(s ^ a), bits)


def fma() -> LimitKernel:
    """float32 multiply-accumulates: one per lane of every FMA."""
    lanes = vector_bits() // 32
    return _build("fma", "float32", lanes, lambda s, a, b: s * a + b, lanes)


def stream(array: np.ndarray) -> Callable[[], None]:
    """Runs a kernel that reads all of an array (whole kilobytes of it), eight vectors at a time, and does nothing else with it."""
    import tvm
    from tvm import tirx

    lanes, chains = vector_bits() // 64, 8
    words = array.nbytes // 1024 * 128
    data, output = tirx.decl_buffer((words,), "uint64", "data"), tirx.decl_buffer((chains * lanes,), "uint64", "output")
    sums = tirx.decl_buffer((chains * lanes,), "uint64", "sums", scope="local")
    i = tirx.Var("i", "int64")

    def vector(buffer, start):
        return tirx.BufferLoad(buffer, [tirx.Ramp(start, tirx.IntImm("int64", 1), lanes)])

    def store(buffer, chain, value):
        return tirx.BufferStore(buffer, value, [tirx.Ramp(tirx.IntImm("int64", chain * lanes), tirx.IntImm("int64", 1), lanes)])

    places = [tirx.IntImm("int64", chain * lanes) for chain in range(chains)]
    steps = [store(sums, c, vector(sums, place) ^ vector(data, i * (chains * lanes) + place)) for c, place in enumerate(places)]
    loop = tirx.For(i, tirx.IntImm("int64", 0), tirx.IntImm("int64", words // (chains * lanes)), tirx.ForKind.SERIAL, tirx.SeqStmt(steps))
    begin = [store(sums, c, tirx.Broadcast(tirx.IntImm("uint64", 0), lanes)) for c in range(chains)]
    end = [store(output, c, vector(sums, place)) for c, place in enumerate(places)]
    body = tirx.SeqStmt([tirx.AllocBuffer(sums), *begin, loop, *end])
    function = tirx.PrimFunc([data, output], body).with_attr("global_symbol", "stream").with_attr("tirx.noalias", True)
    entry = tvm.compile(tvm.IRModule({"stream": function}), target=host_target())["stream"]
    values = np.frombuffer(array.tobytes(), np.uint64, words)
    tensors = [tvm.runtime.tensor(values), tvm.runtime.tensor(np.zeros(chains * lanes, np.uint64))]
    return lambda: entry(*tensors)


def main() -> int:
    """Print both limits of this core."""
    for kernel in (xor_popcount(), fma()):
        loop = ", ".join(f"{n} {op}" for op, n in kernel.inner_loop().most_common())
        print(f"{kernel.name:13} {kernel.macs_per_second(1.0) / 1e9:8.1f} G MAC/s    inner loop: {loop}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
