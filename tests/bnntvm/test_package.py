"""Bundles: the C interface natively under AddressSanitizer, and for aarch64 and armv7 in the emulator."""

import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import bnntvm
from benchmarks.layers import Layer
from bnntvm.package import _tensors, check, package, package_c
from tests.emulation.userland import Userland

#: Every way to use the interface wrongly; the last line is printed when nothing surprised.
MISUSE = r"""
#include <bnn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define EXPECT(call, code) \
  do { int got = (call); if (got != (code)) { printf("%s: %d, %s\n", #call, got, bnn_error(net)); exit(1); } } while (0)
static bnn *net;
static int busy, failed;
static const char *folder;
static void *opens(void *unused) {
  for (int i = 0; i < 2; ++i) {
    bnn *mine;
    if (bnn_open(folder, &mine) || bnn_run(mine)) __atomic_add_fetch(&failed, 1, __ATOMIC_RELAXED);
    bnn_close(mine);
  }
  return unused;
}
static void *other(void *unused) {
  for (int i = 0; i < 200; ++i) {
    int status = bnn_run(net);
    if (status == BNN_BUSY) __atomic_add_fetch(&busy, 1, __ATOMIC_RELAXED);
    else if (status) __atomic_add_fetch(&failed, 1, __ATOMIC_RELAXED);
  }
  return unused;
}
int main(int count, char **words) {
  static float x[64 * 36], y[10];
  (void)count;
  EXPECT(bnn_open(words[1], 0), BNN_ARGUMENT);
  EXPECT(bnn_open(0, &net), BNN_ARGUMENT);
  EXPECT(bnn_run(net), BNN_ARGUMENT);
  bnn_close(net);
  EXPECT(bnn_open("/nonexistent", &net), BNN_FILE);
  EXPECT(bnn_input(net, 0, x, sizeof x), BNN_ARGUMENT);
  bnn_close(net);
  bnn_close(0);
  EXPECT(bnn_open(words[1], &net), BNN_OK);
  EXPECT(bnn_output(net, 0, y, sizeof y), BNN_ARGUMENT);
  EXPECT(bnn_input(net, 1, x, sizeof x), BNN_ARGUMENT);
  EXPECT(bnn_input(net, -1, x, sizeof x), BNN_ARGUMENT);
  EXPECT(bnn_input(net, 0, 0, sizeof x), BNN_ARGUMENT);
  EXPECT(bnn_input(net, 0, x, sizeof x - 4), BNN_SIZE);
  EXPECT(bnn_input(0, 0, x, sizeof x), BNN_ARGUMENT);
  EXPECT(bnn_input(net, 0, x, sizeof x), BNN_OK);
  EXPECT(bnn_run(net), BNN_OK);
  EXPECT(bnn_output(net, 0, y, 4), BNN_SIZE);
  EXPECT(bnn_output(net, 3, y, sizeof y), BNN_ARGUMENT);
  EXPECT(bnn_output(net, 0, y, sizeof y), BNN_OK);
  EXPECT(bnn_run(net), BNN_OK);
  pthread_t threads[3];
  for (int i = 0; i < 3; ++i) pthread_create(&threads[i], 0, other, 0);
  for (int i = 0; i < 3; ++i) pthread_join(threads[i], 0);
  if (failed) return printf("%d runs failed: %s\n", failed, bnn_error(net)), 1;
  bnn_close(net);
  folder = words[1];
  for (int i = 0; i < 3; ++i) pthread_create(&threads[i], 0, opens, 0);
  for (int i = 0; i < 3; ++i) pthread_join(threads[i], 0);
  if (failed) return printf("%d of 6 could not be opened\n", failed), 1;
  for (int i = 0; i < 3; ++i) {
    EXPECT(bnn_open(words[1], &net), BNN_OK);
    bnn_close(net);
  }
  puts("fine");
}
"""


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    constants = {"w": np.where(rng.random((64, 64, 3, 3)) < 0.5, -1, 1), "d": np.where(rng.random((64, 10)) < 0.5, -1, 1)}
    nodes = [
        helper.make_node("Sign", ["x"], ["s"]), helper.make_node("Conv", ["s", "w"], ["c"], pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["c"], ["g"]), helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("MatMul", ["f", "d"], ["y"]),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "network", [helper.make_tensor_value_info("x", 1, ["N", 64, 6, 6])], [helper.make_tensor_value_info("y", 1, ["N", 10])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 8
    return made


def bundle(model, target, folder, standalone=False):
    if standalone:
        return package_c(model, folder / "bundle", target)
    bnntvm.build(model, target).export(folder / "network.bnn")
    return package(folder / "network.bnn", folder / "bundle")


@pytest.fixture(scope="module")
def bundle_of(model, tmp_path_factory):
    """``bundle_of(target, standalone)``: a bundle that tests share and do not change."""
    return functools.cache(lambda target, standalone=False: bundle(model, target, tmp_path_factory.mktemp("bundle"), standalone))


@pytest.fixture(scope="module")
def native(bundle_of):
    return bundle_of("x86")


#: Target, whether the network is standalone C, compiler, emulator.
KINDS = [
    pytest.param("x86", False, "gcc", [], id="x86"), pytest.param("x86", True, "gcc", [], id="x86-standalone"),
    pytest.param("aarch64", False, "aarch64-linux-gnu-gcc", ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"], id="aarch64"),
    pytest.param("armv7", True, "arm-linux-gnueabihf-gcc", ["qemu-arm", "-L", "/usr/arm-linux-gnueabihf"], id="armv7"),
]  # fmt: skip


def compile_example(compiler, folder):
    command = [compiler, "-Wall", "-Wextra", "-Werror", str(folder / "example.c"), f"-I{folder}/include", f"-L{folder}/lib", "-lbnn"]
    subprocess.run([*command, "-Wl,-rpath,$ORIGIN/lib", "-o", str(folder / "example")], check=True)
    return str(folder / "example")


@pytest.mark.parametrize("target, standalone, compiler, emulator", KINDS)
def test_example_computes_what_the_module_does(model, bundle_of, target, standalone, compiler, emulator, tmp_path):
    folder = bundle_of(target, standalone)
    check(folder)
    x = np.random.default_rng(1).standard_normal((1, 64, 6, 6)).astype(np.float32)
    x.tofile(tmp_path / "x.bin")
    command = [*emulator, compile_example(compiler, folder), str(folder), str(tmp_path / "x.bin")]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.frombuffer(done.stdout, np.float32), bnntvm.build(model)(x)[0], rtol=1e-5)


def sources(folder):
    """What libbnn.so is compiled from, and how."""
    files = [str(p) for p in sorted(folder.glob("src/**/*.c"))]
    word = next((w for w in (folder / "network.txt").read_text().split("\n") if w.startswith("entry ")), "").split()[1]
    return [*files, f"-I{folder}/include", "-std=gnu11", "-ffp-contract=off", "-DBNN_NO_CHECK_FINITE", f'-DBNN_NETWORK="{word}"']


@pytest.mark.parametrize("target, standalone, compiler, emulator", KINDS)
def test_misuse(bundle_of, target, standalone, compiler, emulator, tmp_path):
    """Codes and messages; natively no memory errors nor undefined behaviour, and no leaks of standalone C (TVM's runtime keeps its own)."""
    folder = bundle_of(target, standalone)
    (tmp_path / "misuse.c").write_text(MISUSE)
    checks = [] if emulator else ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    command = [compiler, str(tmp_path / "misuse.c"), *sources(folder), "-g", "-O1", *checks, "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, "-o", str(tmp_path / "misuse"), "-ldl", "-lpthread"], check=True)
    settings = {"ASAN_OPTIONS": f"detect_leaks={int(standalone)}"}
    done = subprocess.run([*emulator, str(tmp_path / "misuse"), str(folder)], capture_output=True, text=True, env=os.environ | settings)
    assert done.returncode == 0 and done.stdout == "fine\n", done.stdout + done.stderr


@pytest.mark.parametrize("change, code, message", [
    ("altered", 3, "is not the file that was packaged"), ("missing", 3, "cannot be read"), ("machine", 4, "built for mips"),
    ("needs", 4, "this processor lacks avx9"), ("text", 3, "is damaged"), ("shape", 3, "network.txt is damaged"),
    ("short", 3, "network.txt is damaged"), ("runtime", 3, "libtvm_runtime.so is not the file that was packaged"),
])  # fmt: skip
def test_bundles_that_are_refused(native, tmp_path, change, code, message):
    folder = tmp_path / "bundle"
    subprocess.run(["cp", "-r", str(native), str(folder)], check=True)
    library, text = folder / "lib/network.so", folder / "network.txt"
    if change in ("altered", "runtime"):
        library = library if change == "altered" else folder / "lib/libtvm_runtime.so"
        data = bytearray(library.read_bytes())
        data[5000] ^= 1
        library.write_bytes(data)
    elif change == "missing":
        library.unlink()
    elif change == "short":
        text.write_text(text.read_text()[:40])
    elif change == "shape":
        text.write_text(text.read_text().replace("1 64 6 6", "1 64 1 1"))
    else:
        old = {"machine": "machine x86_64", "needs": "entry", "text": "input 2 32 4"}[change]
        new = {"machine": "machine mips", "needs": "needs avx9 entry", "text": "input 2 32 nine"}[change]
        described = text.read_text().partition("check ")[0].replace(old, new)
        text.write_text(described + f"check {hashlib.sha256(described.encode()).hexdigest()}\n")
    with pytest.raises(bnntvm.ArtefactError, match="network|runtime"):
        check(folder)
    done = subprocess.run([compile_example("gcc", folder), str(folder)], capture_output=True, text=True)
    assert done.returncode == code and message in done.stderr, done.stderr


@pytest.mark.parametrize(("batch", "entry"), [(1, "main_1_direct"), (3, "main")])
def test_entries(native, model, batch, entry, tmp_path):
    """A bundle for one image runs the network's direct function, any other the virtual machine."""
    folder = package(native.parent / "network.bnn", tmp_path / "bundle", batch=batch)
    lines = [line.split() for line in (folder / "network.txt").read_text().splitlines()]
    assert [line[1] for line in lines if line[0] == "entry"] == [entry]
    assert len([line for line in lines if line[0] == "workspace"]) == (batch == 1)
    np.save(tmp_path / "x.npy", np.random.default_rng(batch).standard_normal((3, batch, 64, 6, 6)).astype(np.float32))
    done = run_all(folder, tmp_path)
    assert done.returncode == 0, done.stderr
    module = bnntvm.build(model)
    for x, y in zip(np.load(tmp_path / "x.npy"), np.load(tmp_path / "y.npy"), strict=True):
        np.testing.assert_array_equal(y, module(x))


def test_a_workspace_that_is_too_small_is_noticed(native, tmp_path):
    folder = shutil.copytree(native, tmp_path / "bundle")
    text = (folder / "network.txt").read_text().partition("check ")[0]
    text = re.sub("workspace [0-9]+", "workspace 64", text)
    (folder / "network.txt").write_text(text + f"check {hashlib.sha256(text.encode()).hexdigest()}\n")
    np.save(tmp_path / "x.npy", np.ones((1, 1, 64, 6, 6), np.float32))
    done = run_all(folder, tmp_path)
    assert done.returncode == 1 and "Error: running the network failed: Invalid workspace" in done.stderr


@pytest.mark.parametrize("standalone", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_outputs_of_several_rows_an_image(standalone, batch, tmp_path):
    """What is as long as a multiple of the batch has its size in network.txt and network.h, and the room that it takes."""
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Reshape", ["r", "s"], ["y"])]
    infos = [helper.make_tensor_value_info("x", 1, ["N", 4, 6]), helper.make_tensor_value_info("y", 1, ["M", 6])]
    graph = helper.make_graph(nodes, "rows", infos[:1], infos[1:], [numpy_helper.from_array(np.array([-1, 6]), "s")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    module = bnntvm.build(model)
    assert module.outputs[0].shape == ("n * 4", 6)
    module.export(tmp_path / "network.bnn")
    folder = tmp_path / "bundle"
    package_c(model, folder, "x86", batch) if standalone else package(tmp_path / "network.bnn", folder, batch)
    assert f"BNN_OUTPUT_BYTES {{{batch * 4 * 6 * 4}}}" in (folder / "include/network.h").read_text()
    np.save(tmp_path / "x.npy", np.random.default_rng(batch).standard_normal((2, batch, 4, 6)).astype(np.float32))
    done = run_all(folder, tmp_path)
    assert done.returncode == 0, done.stderr
    for x, y in zip(np.load(tmp_path / "x.npy"), np.load(tmp_path / "y.npy"), strict=True):
        np.testing.assert_array_equal(y, module(x))


@pytest.mark.parametrize(("dim", "size"), [
    (7, 7), ("N", 3), ("n * 4", 12), ("n * T.int64(4)", 12), ("(n + 5) // 2", 4), ("n * 5 % 4 - 1", 2), ("rows", None), ("n / 2", None),
    ("n * m", None), ("max(n, 2)", None), ("n // 0", None), ("n *", None), ("'n'", None), ("", None), (None, None),
])  # fmt: skip
def test_sizes(dim, size):
    """Of outputs: a number, the batch by its name, or arithmetic on ``n``; anything else is refused."""
    manifest = {"inputs": [{"name": "x", "shape": ["N", 2], "dtype": "float32"}]}
    manifest["outputs"] = [{"name": "y", "shape": [dim], "dtype": "float32"}]
    if size is None:
        with pytest.raises(bnntvm.UnsupportedError, match="y, dimension"):
            _tensors(manifest, 3)
    else:
        assert _tensors(manifest, 3)["outputs"] == [(np.float32, [size])]


def run_all(folder, tmp_path):
    """Run a bundle on what x.npy holds, one after the other, in a process that has no runtime but the bundle's."""
    script = """
import sys, numpy as np
sys.path.insert(0, sys.argv[1])
import bnn
with bnn.Network() as network:
    np.save(sys.argv[3], [network.run({"x": x})["y"] for x in np.load(sys.argv[2])])
"""
    command = [sys.executable, "-c", script, str(folder), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    return subprocess.run(command, capture_output=True, text=True)


#: Runs the bundles ``argv[1:]`` on ones, all open at a time, and says what came of it.
TOGETHER = """
import importlib.util, sys, numpy as np
opened = []
for number, folder in enumerate(sys.argv[1:]):
    spec = importlib.util.spec_from_file_location(f"bundle_{number}", folder + "/bnn.py")
    bnn = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bnn)
    try:
        opened.append(bnn.Network(folder))
    except bnn.Error as error:
        print(error.code, error)
for network in opened + opened:
    print(network.run({"x": np.ones((1, 64, 6, 6), np.float32)})["y"].tobytes().hex())
"""


def run_together(folders, before=""):
    command = [sys.executable, "-c", before + TOGETHER, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_bundles_in_one_process(native, model, tmp_path):
    """They share a runtime: that of the first, or of the bnntvm or TVM that is at work there."""
    doubled = onnx.ModelProto.FromString(model.SerializeToString())
    doubled.graph.node[-1].output[0] = "half"
    doubled.graph.node.append(helper.make_node("Add", ["half", "half"], ["y"]))
    (tmp_path / "doubled").mkdir()
    folders = [native, bundle(doubled, "x86", tmp_path / "doubled")]
    once, twice = (bnntvm.build(m)(np.ones((1, 64, 6, 6), np.float32)).tobytes().hex() for m in (model, doubled))
    assert once != twice
    assert run_together(folders) == [once, twice] * 2
    assert run_together(folders, "import bnntvm.runtime\nbnntvm.runtime.ffi()\n") == [once, twice] * 2
    assert run_together(folders, "import tvm\n") == [once, twice] * 2


def test_the_caller_keeps_its_affinity(tmp_path):
    """TVM's pool of threads would move it to all processors."""
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) < 2:
        pytest.skip("there is one processor")
    bnntvm.build(Layer(256, 14).chain(1), threads=1).export(tmp_path / "network.bnn")
    folder = package(tmp_path / "network.bnn", tmp_path / "bundle")
    script = f"""
import os, sys
sys.path.insert(0, {str(folder)!r})
import bnn, numpy as np
with bnn.Network() as network:
    (info,) = network.inputs
    network.run({{info.name: np.ones(info.shape, np.float32)}})
print(sorted(os.sched_getaffinity(0)), len(os.listdir("/proc/self/task")))
"""
    limits = dict(preexec_fn=lambda: os.sched_setaffinity(0, processors[:1]))
    environment = os.environ | {"TVM_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, **limits)
    assert done.stdout == f"{processors[:1]} 2\n", done.stdout + done.stderr  # it and a worker


def test_another_runtime_in_the_process(native, tmp_path):
    """Two versions of the runtime would end the process: the second is refused."""
    folder = shutil.copytree(native, tmp_path / "bundle")
    library, text = folder / "lib/libtvm_runtime.so", folder / "network.txt"
    old, data = (hashlib.sha256(d).hexdigest() for d in (library.read_bytes(), library.read_bytes() + b" "))
    library.write_bytes(library.read_bytes() + b" ")
    described = text.read_text().partition("check ")[0].replace(old, data)
    text.write_text(described + f"check {hashlib.sha256(described.encode()).hexdigest()}\n")
    first, *others = run_together([native, folder])
    assert first.startswith("3 this process has loaded another libtvm_runtime.so, ") and str(native) in first
    assert len(others) == 2 and len(run_together([folder])) == 2


def test_same_artefact_same_bytes(native, tmp_path):
    """And the manifest lists every file but itself."""
    again = package(native.parent / "network.bnn", tmp_path / "another" / "name")
    first = {p.relative_to(again).as_posix(): p.read_bytes() for p in again.rglob("*") if p.is_file()}
    assert all((native / name).read_bytes() == data for name, data in first.items())
    files = json.loads((again / "manifest.json").read_text())["files"]
    assert set(files) == set(first) - {"manifest.json"}
    assert {"licenses/apache-tvm/LICENSE", "licenses/apache-tvm/tvm/NOTICE", "licenses/LICENSE", "include/bnn.h"} <= set(files)
    notices = json.loads((again / "manifest.json").read_text())["notices"]
    assert set(files) - set(notices) == {"network.txt", "lib/network.so", "include/network.h", "CMakeLists.txt"} | {
        name for name in files if name.startswith("licenses/")
    }
    assert all(text in files for notice in notices.values() for text in notice["texts"])


def test_standalone_bundles_that_are_refused(model, tmp_path):
    """The library of another network; another machine; a damaged description."""
    folder = package_c(model, tmp_path / "bundle", "x86")
    program, text = compile_example("gcc", folder), folder / "network.txt"
    described = text.read_text().partition("check ")[0]

    def refused(change):
        altered = change(described)
        text.write_text(altered + f"check {hashlib.sha256(altered.encode()).hexdigest()}\n")
        done = subprocess.run([program, str(folder)], capture_output=True, text=True)
        return done.returncode, done.stderr

    for old, new in (("entry ", "entry 0"), ("64 6 6", "64 1 1"), (" 1 64 6 6", " 0 64 6 6"), ("1 10", "1 11")):
        code, message = refused(lambda t, old=old, new=new: t.replace(old, new))
        assert code == 3 and "libbnn.so is not the one of the bundle" in message
    assert refused(lambda t: t.replace("machine x86_64", "machine arm")) == (4, "error 4: built for arm, this machine is x86_64\n")
    assert refused(lambda t: t) == (0, "")


def test_command_line_for_armv7(model, tmp_path):
    """An ONNX file becomes standalone C."""
    (tmp_path / "network.onnx").write_bytes(model.SerializeToString())
    command = [sys.executable, "-m", "bnntvm", "package", "network.onnx", "--target", "armv7", "-o", "bundle"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check(tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle/manifest.json").read_text())
    assert manifest["target"]["name"] == "armv7" and {"src/model/model.c", "src/standalone.c"} <= set(manifest["notices"])


def test_too_many_tensors_for_a_bundle(tmp_path):
    inputs = [helper.make_tensor_value_info(f"x{i}", 1, [2]) for i in range(65)]
    outputs = [helper.make_tensor_value_info("y", 1, [2])]
    graph = helper.make_graph([helper.make_node("Sum", [i.name for i in inputs], ["y"])], "sum", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    with pytest.raises(bnntvm.UnsupportedError, match="at most 64 inputs"):
        package_c(model, tmp_path / "bundle", "armv7")


def test_no_bundle_of_an_artefact_for_armv7_nor_into_a_full_folder(model, native, tmp_path):
    bnntvm.build(model, "armv7").export(tmp_path / "network.bnn")
    with pytest.raises(bnntvm.UnsupportedError, match="(?s)not published for arm.*package NET.onnx --target armv7.*export-c"):
        package(tmp_path / "network.bnn", tmp_path / "bundle")
    with pytest.raises(bnntvm.BnnError, match="not empty"):
        package(native.parent / "network.bnn", pathlib.Path(native))


def test_no_bundle_for_a_gpu(model, tmp_path):
    with pytest.raises(bnntvm.UnsupportedError, match="(?s)no bundle for sm_80.*bnntvm.load"):
        package_c(model, tmp_path / "bundle", "sm_80")
    assert not (tmp_path / "bundle").exists()


#: Runs the bundle ``argv[1]`` on ``x.npy`` with numpy and nothing else of Python's packages.
LOADER = """
import sys
sys.path[:0] = sys.argv[1:3]
import bnn, numpy as np
assert not [name for name in sys.modules if name.startswith(("tvm", "bnntvm"))]
x = np.load(sys.argv[3])
assert not bnn.check(sys.argv[1])
with bnn.Network(sys.argv[1]) as net:
    print(net.inputs, net.outputs)
    (y,) = net.run({"x": x}).values()
    again = net.run({"x": np.ascontiguousarray(x[..., ::-1])[..., ::-1]})["y"]
    assert (y == again).all()
    for feed, code in (({"z": x}, 1), ({"x": x[:, :1]}, 2), ({"x": x.astype(complex)}, 2)):
        try:
            net.run(feed)
        except bnn.Error as error:
            assert error.code == code, error
        else:
            raise SystemExit("no error")
np.save(sys.argv[4], y)
try:
    bnn.Network("/nonexistent")
except bnn.Error as error:
    assert error.code == 3
"""


def only_numpy(site, folder):
    """A folder of packages that has nothing but numpy."""
    folder.mkdir()
    for name in ("numpy", "numpy.libs"):
        if (pathlib.Path(site) / name).exists():
            (folder / name).symlink_to(pathlib.Path(site) / name)
    return folder


def run_loader(python, site, bundle, tmp_path):
    x = np.random.default_rng(1).standard_normal((1, 64, 6, 6)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    words = [str(bundle), str(only_numpy(site, tmp_path / "site")), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    done = subprocess.run([*python, "-I", "-S", "-c", LOADER, *words], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "x: float32[1, 64, 6, 6]" in done.stdout
    return x, np.load(tmp_path / "y.npy")


@pytest.mark.parametrize("standalone", [False, True])
def test_python_loader_needs_numpy_only(model, bundle_of, standalone, tmp_path):
    folder = bundle_of("x86", standalone)
    x, y = run_loader([sys.executable], pathlib.Path(np.__file__).parents[1], folder, tmp_path)
    np.testing.assert_allclose(y, bnntvm.build(model)(x), rtol=1e-5 if standalone else 0)  # C sums up pools in another order


def test_python_loader_on_emulated_arm(model, tmp_path):
    (tmp_path / "bundle").mkdir()
    made = bundle(model, "aarch64", tmp_path / "bundle")
    land = Userland(tmp_path, with_bnntvm=False)
    x, y = run_loader(land.python, land.site, made, tmp_path)
    np.testing.assert_allclose(y, bnntvm.build(model)(x), rtol=1e-5)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"inputs": []}'])
def test_python_loader_and_its_manifest(native, tmp_path, text):
    """A manifest that is missing or damaged is an error of the loader's own kind."""
    shutil.copytree(native, tmp_path / "bundle")
    (tmp_path / "bundle/manifest.json").unlink()
    if text is not None:
        (tmp_path / "bundle/manifest.json").write_text(text)
    spec = importlib.util.spec_from_file_location("loader_under_test", native / "bnn.py")
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    for use in (loader.Network, loader.check):
        with pytest.raises(loader.Error, match="manifest.json cannot be read") as caught:
            use(tmp_path / "bundle")
        assert caught.value.code == 3


def test_without_the_runtime(native, tmp_path):
    """It is smaller, says what is missing, and runs where the loader finds the runtime."""
    folder = package(native.parent / "network.bnn", tmp_path / "bundle", runtime=False)
    check(folder)
    assert not list(folder.glob("lib/libtvm*")) and not (folder / "licenses/apache-tvm").exists()
    command = [compile_example("gcc", folder), str(folder)]
    alone = subprocess.run(command, capture_output=True, text=True)
    assert alone.returncode == 3 and "libtvm_ffi.so" in alone.stderr
    there = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"LD_LIBRARY_PATH": str(native / "lib")})
    assert (there.returncode, there.stdout) == (0, "output 0: 40 bytes\n"), there.stderr


@pytest.mark.parametrize("standalone, step", [(False, 3 << 19), (True, 1 << 18)])
def test_running_out_of_memory(model, tmp_path, standalone, step):
    """Whatever the limit, the program ends with the interface's word: an error before the network runs, or its result."""
    if standalone:  # a tensor that is large beside the program
        model = onnx.ModelProto.FromString(model.SerializeToString())
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 64
    folder = bundle(model, "x86", tmp_path, standalone)
    program, codes = compile_example("gcc", folder), []
    for limit in range(3 << 20, (8 if standalone else 40) << 20, step):
        limits = dict(preexec_fn=lambda room=limit: resource.setrlimit(resource.RLIMIT_AS, (room, room)))
        done = subprocess.run([program, str(folder)], capture_output=True, text=True, **limits)
        assert done.returncode in (0, 3, 5, 7, 127), done  # 127: the program itself could not be loaded
        assert done.returncode in (0, 127) or f"error {done.returncode}: " in done.stderr
        codes.append(done.returncode)
    assert codes[-1] == 0 and (5 if standalone else 3) in codes, codes


def test_builds_with_cmake(native, tmp_path):
    if not shutil.which("cmake"):
        pytest.fail("cmake is missing: apt-get install cmake")
    for command in (["cmake", "-S", str(native), "-B", str(tmp_path)], ["cmake", "--build", str(tmp_path)]):
        subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([str(tmp_path / "example_cpp"), str(native)], capture_output=True, text=True)
    assert done.returncode == 0 and np.isfinite(float(done.stdout)), done.stderr
