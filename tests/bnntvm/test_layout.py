"""The folders keep their one direction: passes, schedules and targets meet in leaf modules only. The run time stands without a compiler."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LEAVES = {"bits", "digits", "errors", "graph", "levels", "ops", "pieces", "planes", "spec"}
RUN_TIME = ["__init__", "artefact", "errors", "module", "profiling/measure", "report", "runtime"]


def imports(path, package):
    """Absolute names of everything that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: 1 - node.level or None], *([base] if base else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def reaches(names, *packages):
    return sorted(name for name in names for package in packages if name == package or name.startswith(package + "."))


@pytest.mark.parametrize("path", files("passes") + files("schedules") + files("targets"), ids=lambda path: str(path.relative_to(ROOT)))
def test_one_direction(path):
    folder = path.relative_to(ROOT).parts[0]
    found = imports(path, f"bnntvm.{folder}")
    own = {"passes": {"passes"}, "schedules": {"schedules", "targets"}, "targets": {"targets"}}[folder]
    allowed = own | (LEAVES if folder != "targets" else {"errors", "spec"})
    inside = {name.split(".")[1] for name in found if name.startswith("bnntvm.") and len(name.split(".")) > 1}
    # "from bnntvm import spec" also yields the bare package, which is no import of anything that stands above
    assert inside <= allowed, f"{path.name} imports {sorted(inside - allowed)}"
    assert not reaches(found, "tests", "benchmarks", "onnx", "onnxruntime")


@pytest.mark.parametrize("name", RUN_TIME)
def test_run_time_imports_no_compiler(name):
    found = imports(ROOT / "bnntvm" / f"{name}.py", "bnntvm")
    assert not reaches(found, "tvm", "onnx", "bnntvm.build", "bnntvm.lower", "bnntvm.importer", "bnntvm.passes", "bnntvm.schedules")


def test_tutorials_use_the_public_api():
    for path in files("tutorials"):
        assert not [name for name in imports(path, "tutorials") if name.startswith(("bnntvm.", "tvm"))], path.name


def test_every_package_is_installed():
    listed = (ROOT / "pyproject.toml").read_text().partition("packages = [")[2].partition("]")[0]
    folders = {"bnntvm": "bnntvm", "passes": "bnntvm.passes", "schedules": "bnntvm.schedules", "targets": "bnntvm.targets"}
    for folder, name in folders.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / folder).parts
            assert f'"{".".join([name, *inner])}"' in listed
