"""From an ONNX file to a folder of C."""

from __future__ import annotations

import importlib.resources
import pathlib

import bnntvm
from bnntvm.build import _last_line, _tolerance
from bnntvm.errors import BnnError, UnsupportedError
from bnntvm.folders import new_folder
from bnntvm.importer import import_model
from bnntvm.pipeline import optimise

from . import example, report
from .collect import collect
from .cwriter import comment, identifier
from .emit import Emitter
from .rows import join


def export_c(model, folder, *, name="model", batch=1, assume_nonzero=False, weight_tolerance=0.0, vectors=True):
    """Write an ONNX network as portable C99 that needs no library.

    Parameters
    ----------
    model : str, path, bytes or onnx.ModelProto
    folder : str or pathlib.Path
        Made; must not exist or be empty.
    name : str
        Prefix of the files and of everything that they define: a C identifier.
    batch : int
        Size of every dynamic dimension.
    assume_nonzero, weight_tolerance
        As for :func:`bnntvm.build`.
    vectors : bool
        Evaluate the network once in numpy, so that the example can check itself; large networks take their time.

    Returns
    -------
    bnntvm.c99.report.Report
        Sizes: flash, RAM; ``str()`` is the table.

    Raises
    ------
    BnnError
        An operator without C is an UnsupportedError that names it.
    """
    if not isinstance(name, str) or identifier(name) != name or not name or name.lower() in ("bnn", "main"):
        raise BnnError(f"{name!r} is no name for C", hint="letters, digits and underscores, no keyword; bnn and main are other files")
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise BnnError(f"batch must be a positive integer, not {batch!r}")
    tolerance, imported = _tolerance(weight_tolerance), import_model(model)
    where = f"{pathlib.Path(model).name}, " if isinstance(model, (str, pathlib.Path)) else ""
    try:
        mod = optimise(imported.mod, {}, assume_nonzero=bool(assume_nonzero), weight_tolerance=tolerance)
        program = collect(mod, batch)
        program.steps = join(program.steps)
        origin = f"{where}compiled by bnntvm {bnntvm.__version__}"
        source = Emitter(program, name, imported.inputs, imported.outputs, comment(origin)).source()
        source.files |= example.files(source, mod if vectors else None)
    except BnnError:
        raise
    except Exception as error:
        raise UnsupportedError(
            "the network could not be written as C", why=_last_line(error), hint="this is a gap in bnntvm: please report it with the model"
        ) from error
    with new_folder(folder, "the C files") as folder:
        for path, text in (source.files | _templates(source)).items():
            _write(folder / path, text)
        sizes = report.measure(source, program.steps, folder)
        _write(folder / "size.txt", f"{sizes}\n")
        _write(folder / "size.json", sizes.json())
    return sizes


def _templates(source):
    """Files that are the same for every network but for its name."""
    texts, root = {}, importlib.resources.files(__package__) / "templates"
    for path in ("bnn.h", "Makefile", "CMakeLists.txt", "cortex-m/startup.c", "cortex-m/mps2.ld"):
        texts[path] = root.joinpath(path).read_text().replace("@{name}", source.name)
    return texts


def _write(path, text):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BnnError("the C files could not be written", where=str(path), why=error.strerror or str(error)) from error
