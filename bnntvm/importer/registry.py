"""Converters by domain and operator type.

A converter is ``convert(ctx, node, *args)``. ``args`` are the node's inputs in order, None for an omitted one, each a value as
:mod:`bnntvm.importer.values` describes; it returns the value of the node's first output, or a tuple with the values of several.

A package outside adds converters with an entry point of the group ``bnntvm.importer`` that names a module (or a callable) which registers
them when it is loaded (called).
"""

import importlib
import importlib.metadata
import pkgutil
from functools import cache

CONVERTERS = {}
#: Converters that know :class:`bnntvm.importer.values.Unfolded`; the others are given the windows as a tensor.
TAKES_WINDOWS = set()
ENTRY_POINTS = "bnntvm.importer"

#: Domain names that mean the same: the default domain has two spellings.
_ALIASES = {"ai.onnx": ""}


def converts(*op_types, domains=("",), windows=False):
    """Register the decorated function as the converter of ``op_types`` in ``domains``; ``windows``: it is one of TAKES_WINDOWS."""

    def register(function):
        if windows:
            TAKES_WINDOWS.add(function)
        for domain in domains:
            for op_type in op_types:
                CONVERTERS[_ALIASES.get(domain, domain), op_type] = function
        return function

    return register


def lookup(domain, op_type):
    """The converter of an operator, or None."""
    load_all()
    return CONVERTERS.get((_ALIASES.get(domain, domain), op_type))


def supported():
    """Names of the supported operators, ``domain::name`` outside the default domain, sorted."""
    load_all()
    return sorted(f"{domain}::{op_type}" if domain else op_type for domain, op_type in CONVERTERS)


@cache
def load_all():
    """Load every file of ``bnntvm.importer.converters``, then the entry points."""
    package = importlib.import_module("bnntvm.importer.converters")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        plugin = entry.load()
        if callable(plugin):
            plugin()
