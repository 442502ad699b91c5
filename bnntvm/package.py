"""A folder with all that a device needs to run a network from C or C++: ``bnntvm package``.

::

    lib/network.so lib/libbnn.so lib/libtvm_ffi.so lib/libtvm_runtime.so
    include/bnn.h include/network.h     the C interface; sizes of this network's tensors
    src/                                what libbnn.so is compiled from
    example.c example.cpp CMakeLists.txt
    bnn.py                              the same for Python, with numpy and nothing else
    network.txt                         what bnn_open reads: machine, instructions, sha256 of libraries, tensors, its own sha256
    manifest.json                       the artefact's manifest, what has which licence, and the sha256 of every file
    licenses/                           their texts

Where TVM has no runtime for the machine (32-bit ARM), libbnn.so holds the network, as standalone C (:mod:`bnntvm.c99`), whose text is in
``src/model``.

The same artefact or model gives the same bytes, wherever and whenever it is packaged with the same compiler.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import operator
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile

import numpy as np

from bnntvm import artefact
from bnntvm.errors import ArtefactError, BnnError, TargetError, ToolchainError, UnsupportedError
from bnntvm.folders import new_folder
from bnntvm.linker import compiler_for, is_native
from bnntvm.targets import registry

_SOURCES = pathlib.Path(__file__).parent / "bundle"
_PLACES = {".h": "src", ".c": "src", "bnn.h": "include", "example.c": "."}
#: As in bundle.h.
_MOST_TENSORS, _MOST_DIMS = 64, 8
_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
_RUNTIME = {"tvm": ("apache-tvm", "lib/libtvm_runtime.so"), "tvm_ffi": ("apache-tvm-ffi", "lib/libtvm_ffi.so")}
#: Machine -> platform tag of the runtime's wheels.
_PLATFORMS = {"x86_64": "manylinux_2_28_x86_64", "aarch64": "manylinux_2_28_aarch64"}


def package(path, folder, batch=1, runtime=True):
    """Write the bundle of an artefact.

    Parameters
    ----------
    path : str or pathlib.Path
        A ``.bnn`` file, for any machine.
    folder : str or pathlib.Path
        Made; must not exist or be empty.
    batch : int
        Size of every dynamic dimension.
    runtime : bool
        Whether TVM's runtime libraries are part of it. Otherwise the device has to have them where its loader finds them.

    Returns
    -------
    pathlib.Path
        The folder.

    Raises
    ------
    BnnError
    """
    file, manifest, library_bytes = artefact.read(path, to_run=False)
    with file:
        isa = registry.resolve(manifest["target"].get("name"))
        if isa is None:
            raise TargetError("the artefact's target is unknown", where=str(path), why=str(manifest["target"].get("name")))
        refuse_gpus(isa)
        if not has_runtime(isa):
            raise UnsupportedError(
                f"no bundle of an artefact for {isa.name}",
                why=f"a run time that a bundle could carry is not published for {isa.machine}",
                hint=f"give the ONNX file: bnntvm package NET.onnx --target {isa.name} makes a bundle of standalone C, which needs none; "
                "bnntvm export-c writes the C alone",
            )
        library = os.pread(file.fileno(), library_bytes, 0)
    tensors = _tensors(manifest, batch)
    entry, workspace = "main_1" if batch == 1 and "main_1" in manifest.get("entries", ()) else "main", 0
    if entry in manifest.get("direct", {}).get("entries", ()):
        entry, workspace = f"{entry}_direct", manifest["direct"]["workspace_bytes"]
    with new_folder(folder, "the bundle") as folder:
        _write(folder / "lib/network.so", library)
        notices = _runtime(folder, isa, runtime)
        libraries = ["lib/network.so", *notices]
        _fill(folder, isa, tensors, ["tvm.c"])
        description = _description(isa, manifest["target"].get("needs", []), tensors, _contents(folder, libraries), entry, workspace)
        _write(folder / "network.txt", description)
        _write_manifest(folder, manifest, batch, notices | _own_license(folder))
    return folder


def refuse_gpus(isa):
    """Bundles are for processors: raise an UnsupportedError for anything else."""
    if isa.machine == "cuda":
        raise UnsupportedError(
            f"no bundle for {isa.name}", why="a bundle's interfaces have no memory of a GPU's",
            hint="copy the artefact of `bnntvm build` to a machine with the GPU and bnntvm installed, and use bnntvm.load",
        )  # fmt: skip


def has_runtime(isa):
    """Whether TVM publishes its runtime for the machine."""
    return isa.machine in _PLATFORMS


def package_c(model, folder, target, batch=1, **options):
    """Write the bundle of an ONNX network as standalone C.

    Parameters
    ----------
    model : str, path, bytes or onnx.ModelProto
    folder, batch
        As for :func:`package`.
    target : str
        As for :func:`bnntvm.build`.
    options
        Of :func:`bnntvm.export_c`: ``assume_nonzero``, ``weight_tolerance``.

    Returns
    -------
    pathlib.Path
        The folder.

    Raises
    ------
    BnnError
    """
    import bnntvm
    from bnntvm.importer import import_model

    isa, imported = registry.resolve(target), import_model(model)
    if isa is None:
        raise TargetError("unknown target", where=str(target), hint="bnntvm targets lists them")
    refuse_gpus(isa)
    sides = {"inputs": imported.inputs, "outputs": imported.outputs}
    manifest = {side: [{"name": i.name, "dtype": str(i.dtype), "shape": list(i.shape)} for i in infos] for side, infos in sides.items()}
    manifest |= {"bnntvm": bnntvm.__version__, "target": {"name": isa.name, "needs": []}}
    tensors = _tensors(manifest, batch)
    with tempfile.TemporaryDirectory(prefix="bnntvm-") as scratch, new_folder(folder, "the bundle") as folder:
        written = pathlib.Path(scratch, "model")
        bnntvm.export_c(model, written, batch=batch, vectors=False, **options)
        for name in _STANDALONE:
            _write(folder / "src/model" / name, (written / name).read_bytes())
        digest = hashlib.sha256(b"".join((folder / "src/model" / name).read_bytes() for name in _STANDALONE)).hexdigest()[:32]
        _write(folder / "src/network.c", _call(tensors).encode())
        _fill(folder, isa, tensors, ["standalone.c", "network.c", *(f"model/{n}" for n in _STANDALONE if n.endswith(".c"))], digest)
        _write(folder / "network.txt", _description(isa, [], tensors, {}, digest))
        _write_manifest(folder, manifest, batch, _own_license(folder))
    return folder


#: What of an exported network is compiled.
_STANDALONE = ("bnn.h", "model.h", "model.c", "model_weights.h", "model_weights.c")


def _call(tensors):
    """The C that hands the tensors of a handle to the exported function."""
    places = [f"{side}[{i}]" for side, word in (("in", "inputs"), ("out", "outputs")) for i in range(len(tensors[word]))]
    head = "void bnn_network_run(void *const *in, void *const *out)"
    return "\n".join([
        "/* The network's tensors, in the order of network.txt. */", '#include "model/model.h"', "",
        f'__attribute__((visibility("hidden"))) {head};', "",
        f"{head} {{", "  (void)in, (void)out;", f"  model_run({', '.join(places)});", "}", "",
    ])  # fmt: skip


def _tensors(manifest, batch):
    """Inputs and outputs as the compiled network takes them, lists of ``(dtype, shape)``."""
    names = {dim for info in manifest["inputs"] for dim in info["shape"] if not isinstance(dim, int)}
    tensors = {side: [_tensor(info, names, batch) for info in manifest[side]] for side in ("inputs", "outputs")}
    for side, those in tensors.items():
        if len(those) > _MOST_TENSORS or any(len(shape) > _MOST_DIMS for _, shape in those):
            raise UnsupportedError(
                f"bundles have at most {_MOST_TENSORS} {side} of at most {_MOST_DIMS} dimensions",
                why=f"there are {len(those)}, of {max(len(shape) for _, shape in those)} dimensions",
            )
    return tensors


def _fill(folder, isa, tensors, sources, network=None):
    """Headers, sources, library and examples. ``sources``: what runs the network; ``network``: the digest of standalone C."""
    _write(folder / "include/network.h", _header(tensors).encode())
    for name in ("bnn.h", "bundle.h", "bnn.c", "bnn.py", "example.c", "example.cpp", "CMakeLists.txt", sources[0]):
        place = _PLACES.get(name) or _PLACES.get(pathlib.Path(name).suffix, ".")
        _write(folder / place / name, (_SOURCES / name).read_bytes())
    _compile(folder, isa, ["bnn.c", *sources], network)


def _contents(folder, libraries):
    """Name -> contents of the libraries that are checked before they are loaded."""
    return {name: (folder / name).read_bytes() for name in libraries}


def _write_manifest(folder, manifest, batch, notices):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    digests = {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    manifest = manifest | {"batch": batch, "notices": notices, "files": digests}
    _write(folder / "manifest.json", (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())


def _write(path, data):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise BnnError("the bundle could not be written", where=str(path), why=error.strerror or str(error)) from error


def _tensor(info, names, batch):
    """``(dtype, shape)`` as the compiled network takes it: float16 inputs are float32. ``names``: those that the batch has."""
    dtype = np.dtype(np.float32 if info["dtype"] == "float16" else info["dtype"])
    return dtype, [batch if dim in names else _size(dim, batch, info["name"]) for dim in info["shape"]]


#: Arithmetic on the batch that dimensions of outputs are.
_ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod}


def _size(dim, batch, name):
    """The size of a dimension that is a number, or the text of arithmetic on the batch: "n * 4"."""

    def value(term):
        match term:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id="n"):
                return batch
            case ast.Call(func=ast.Attribute(attr="int64"), args=[own]):  # TVM's spelling of a number
                return value(own)
            case ast.BinOp(left=left, op=op, right=right):
                return _ARITHMETIC[type(op)](value(left), value(right))
        raise ValueError(ast.unparse(term))

    try:
        return dim if isinstance(dim, int) else value(ast.parse(dim, mode="eval").body)
    except (SyntaxError, TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise UnsupportedError(
            "the size of an output is not known before it is computed", where=f"{name}, dimension {dim!r}",
            hint="fix the batch in the model: python -m onnxruntime.tools.make_dynamic_shape_fixed",
        ) from error  # fmt: skip


def _bytes(dtype, shape):
    return dtype.itemsize * int(np.prod(shape, dtype=np.int64))


def _description(isa, needs, tensors, libraries, entry, workspace=0):
    """network.txt; its last line has the digest of those before it. ``workspace``: bytes, if the entry is a direct function."""
    lines = [f"machine {isa.machine}", *(f"needs {flag}" for flag in sorted(needs)), f"entry {entry}"]
    lines += [f"workspace {workspace}"] if workspace else []
    lines += [f"file {hashlib.sha256(data).hexdigest()} {name}" for name, data in libraries.items()]
    for side, word in (("inputs", "input"), ("outputs", "output")):
        for dtype, shape in tensors[side]:
            lines.append(" ".join(map(str, [word, _CODES[dtype.kind], dtype.itemsize * 8, len(shape), *shape])))
    text = ("\n".join(lines) + "\n").encode()
    return text + f"check {hashlib.sha256(text).hexdigest()}\n".encode()


def _header(tensors):
    sizes = {side: [_bytes(*tensor) for tensor in tensors[side]] for side in tensors}
    return "\n".join([
        "/* Sizes of this network's tensors, in the order of manifest.json. */",
        "#define BNN_INPUT_BYTES {" + ", ".join(map(str, sizes["inputs"])) + "}",
        "#define BNN_OUTPUT_BYTES {" + ", ".join(map(str, sizes["outputs"])) + "}",
        f"#define BNN_LARGEST_BYTES {max(sizes['inputs'] + sizes['outputs'])}", "",
    ])  # fmt: skip


def _runtime(folder, isa, wanted):
    """TVM's runtime libraries, if ``wanted``, of the installed packages or of the wheels for the other machine, and their licences.

    Returns
    -------
    dict
        For the manifest: library -> where it comes from, its licence, and the files with the texts.
    """
    found = {}
    for module, (name, library) in _RUNTIME.items() if wanted else ():
        if is_native(isa):
            root = pathlib.Path(importlib.util.find_spec(module).submodule_search_locations[0])
            data = (root / library).read_bytes()
            texts = {str(p): p.locate().read_bytes() for p in importlib.metadata.files(name) or [] if _is_notice(p.name)}
        else:
            with zipfile.ZipFile(_wheel(name, isa)) as wheel:
                data = wheel.read(f"{module}/{library}")
                texts = {n: wheel.read(n) for n in wheel.namelist() if _is_notice(n.rpartition("/")[2])}
        _write(folder / library, data)
        files = []
        for path, text in sorted(texts.items()):
            files.append(f"licenses/{name}/" + re.sub(r"^[^/]*\.dist-info/(licenses/)?", "", path))
            _write(folder / files[-1], text)
        version = importlib.metadata.version(name)
        found[library] = {"from": f"{name} {version} ({_PLATFORMS[isa.machine]})", "license": "Apache-2.0", "texts": files}
    return found


def _is_notice(name):
    return name.startswith(("LICENSE", "NOTICE"))


def _own_license(folder):
    """What this project wrote, and the headers of TVM, are under the same licence."""
    installed = [p.locate() for p in importlib.metadata.files("bnntvm") or [] if p.name == "LICENSE"]
    text = next(iter([*installed, pathlib.Path(__file__).parents[1] / "LICENSE"])).read_bytes()
    _write(folder / "licenses/LICENSE", text)
    ours = {"from": "bnntvm", "license": "Apache-2.0", "texts": ["licenses/LICENSE"]}
    theirs = {"include/tvm/ffi/c_api.h": "apache-tvm-ffi", "include/dlpack/dlpack.h": "dlpack"}
    known = [name for name in ("lib/libbnn.so", "include/bnn.h", "bnn.py", "example.c", "example.cpp") if (folder / name).exists()]
    known += sorted(p.relative_to(folder).as_posix() for p in (folder / "src").rglob("*") if p.is_file())
    return {name: ours for name in known} | {name: ours | {"from": source} for name, source in theirs.items() if (folder / name).exists()}


def _wheel(name, isa):
    """The wheel of the installed version for another machine, downloaded once."""
    version = importlib.metadata.version(name)
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "bnntvm", "wheels")
    pattern = f"{name.replace('-', '_')}-{version}-*{isa.machine}.whl"
    if not any(cache.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--platform"]
        command += [_PLATFORMS[isa.machine], "--dest", str(cache), f"{name}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BnnError(
                f"TVM's runtime for {isa.machine} could not be downloaded", where=f"{name} {version}", why=done.stderr.strip()[-300:],
                hint="pip has to work here, or put the wheel into " + str(cache),
            )  # fmt: skip
    return next(iter(sorted(cache.glob(pattern))))


def _compile(folder, isa, sources, network):
    """libbnn.so, the C interface."""
    compiler = compiler_for(isa)
    headers = pathlib.Path(importlib.util.find_spec("tvm_ffi").submodule_search_locations[0], "include")
    for header in ("tvm/ffi/c_api.h", "dlpack/dlpack.h") if network is None else ():
        _write(folder / "include" / header, (headers / header).read_bytes())
    # The folder's name would be found in the library: it is compiled from within.
    options = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-s", "-Wl,--build-id=none", "-Iinclude"]
    if network is not None:  # as :mod:`bnntvm.c99` says; bnn_input promises no look for NaN
        # Every network defines functions of the same names: those of this library call each other.
        options += ["-ffp-contract=off", "-Wl,-Bsymbolic", "-DBNN_NO_CHECK_FINITE", f'-DBNN_NETWORK="{network}"']
    for source in sources:
        options += ["-x", "c", f"src/{source}"]  # g++ takes the second of two for C++
    options += ["-o", "lib/libbnn.so", "-pthread", "-ldl"]
    (folder / "lib").mkdir(exist_ok=True)
    done = subprocess.run([*shlex.split(compiler), *options], cwd=folder, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise ToolchainError("libbnn.so could not be compiled", where=compiler, why=(done.stderr or done.stdout).strip()[-500:])


def check(folder):
    """Compare every file of a bundle with its manifest.

    Raises
    ------
    ArtefactError
        Naming the files that are missing or altered.
    """
    folder = pathlib.Path(folder)
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError("not a bundle", where=str(folder), why=f"manifest.json: {error}") from error
    wrong = [name for name, digest in files.items() if not _has_digest(folder / name, digest)]
    if wrong:
        raise ArtefactError("the bundle is damaged", where=str(folder), why="missing or altered: " + ", ".join(wrong), hint="package again")


def _has_digest(path, digest):
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest
