"""Bundles: the C interface natively under AddressSanitizer, and for aarch64 in the emulator."""

import json
import pathlib
import subprocess

import numpy as np
import pytest
from onnx import helper, numpy_helper

import bnntvm
from bnntvm.package import check, package

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


def bundle(model, target, folder):
    bnntvm.build(model, target).export(folder / "network.bnn")
    return package(folder / "network.bnn", folder / "bundle")


@pytest.fixture(scope="module")
def native(model, tmp_path_factory):
    return bundle(model, "x86", tmp_path_factory.mktemp("native"))


def compile_example(compiler, folder):
    command = [compiler, "-Wall", "-Wextra", "-Werror", str(folder / "example.c"), f"-I{folder}/include", f"-L{folder}/lib", "-lbnn"]
    subprocess.run([*command, "-Wl,-rpath,$ORIGIN/lib", "-o", str(folder / "example")], check=True)
    return str(folder / "example")


@pytest.mark.parametrize("target, compiler, emulator", [
    ("x86", "gcc", []), ("aarch64", "aarch64-linux-gnu-gcc", ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]),
])  # fmt: skip
def test_example_computes_what_the_module_does(model, target, compiler, emulator, tmp_path, native):
    folder = native if target == "x86" else bundle(model, target, tmp_path)
    check(folder)
    x = np.random.default_rng(1).standard_normal((1, 64, 6, 6)).astype(np.float32)
    x.tofile(tmp_path / "x.bin")
    command = [*emulator, compile_example(compiler, folder), str(folder), str(tmp_path / "x.bin")]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.frombuffer(done.stdout, np.float32), bnntvm.build(model)(x)[0], rtol=1e-5)


def test_misuse_under_address_sanitizer(native, tmp_path):
    """Codes and messages, no memory errors, no leaks of the interface's own."""
    (tmp_path / "misuse.c").write_text(MISUSE)
    sources = [str(tmp_path / "misuse.c"), str(native / "src/bnn.c")]
    options = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", f"-I{native}/include", "-ldl", "-lpthread"]
    subprocess.run(["gcc", *sources, *options, "-o", str(tmp_path / "misuse")], check=True)
    done = subprocess.run([str(tmp_path / "misuse"), str(native)], capture_output=True, text=True, env={"ASAN_OPTIONS": "detect_leaks=0"})
    assert done.returncode == 0 and done.stdout == "fine\n", done.stdout + done.stderr


@pytest.mark.parametrize("change, code, message", [
    ("altered", 3, "is not the file that was packaged"), ("missing", 3, "cannot be read"), ("machine", 4, "built for mips"),
    ("needs", 4, "this processor lacks avx9"), ("text", 3, "is damaged"),
])  # fmt: skip
def test_bundles_that_are_refused(native, tmp_path, change, code, message):
    folder = tmp_path / "bundle"
    subprocess.run(["cp", "-r", str(native), str(folder)], check=True)
    library, text = folder / "lib/network.so", folder / "network.txt"
    if change == "altered":
        data = bytearray(library.read_bytes())
        data[5000] ^= 1
        library.write_bytes(data)
    elif change == "missing":
        library.unlink()
    else:
        old = {"machine": "machine x86_64", "needs": "entry", "text": "input 2 32 4"}[change]
        new = {"machine": "machine mips", "needs": "needs avx9 entry", "text": "input 2 32 nine"}[change]
        text.write_text(text.read_text().replace(old, new))
    with pytest.raises(bnntvm.ArtefactError, match="network"):
        check(folder)
    done = subprocess.run([compile_example("gcc", folder), str(folder)], capture_output=True, text=True)
    assert done.returncode == code and message in done.stderr, done.stderr


def test_same_artefact_same_bytes(native, tmp_path):
    """And the manifest lists every file but itself."""
    again = package(native.parent / "network.bnn", tmp_path / "another" / "name")
    first = {p.relative_to(again).as_posix(): p.read_bytes() for p in again.rglob("*") if p.is_file()}
    assert all((native / name).read_bytes() == data for name, data in first.items())
    files = json.loads((again / "manifest.json").read_text())["files"]
    assert set(files) == set(first) - {"manifest.json"}
    assert {"licenses/apache-tvm-LICENSE", "include/bnn.h", "CMakeLists.txt"} <= set(files)


def test_no_bundle_for_armv7_nor_into_a_full_folder(model, native, tmp_path):
    bnntvm.build(model, "armv7").export(tmp_path / "network.bnn")
    with pytest.raises(bnntvm.UnsupportedError, match="not published for arm"):
        package(tmp_path / "network.bnn", tmp_path / "bundle")
    with pytest.raises(bnntvm.BnnError, match="not empty"):
        package(native.parent / "network.bnn", pathlib.Path(native))
