"""What there is to tune in a network: its distinct kernels, with real weights and constants to check candidates against."""

from __future__ import annotations

from tvm import relax

from bnntvm.graph import bindings, constant, dims, dtype, op_name
from bnntvm.importer import import_model
from bnntvm.lower import Lower
from bnntvm.pipeline import optimise
from bnntvm.schedules import families
from bnntvm.tuning.records import task_id
from bnntvm.tuning.task import Operand, Task, describe
from bnntvm.tuning.workload import family_name, key_of, rows_of

__all__ = ["Operand", "Task", "describe", "extract"]


class _Collector(Lower):
    """Lowers a network and notes what every kernel was called with."""

    def __init__(self, isa):
        super().__init__(isa)
        self.tasks, self.names = {}, {}  # by id; ids of what every kernel computes, by its name

    def call(self, spec, operands, types, weights, layer=None):
        family = families.of(spec, self.isa)
        shape = dims(operands[0])
        key = key_of(family, spec, rows_of(shape))
        name = task_id(key)
        if name not in self.tasks:
            seen = tuple(_operand(o, weights) for o in operands)
            outputs = tuple(Operand(_static(t.shape), str(t.dtype), growth=_growth(t.shape)) for t in types)
            self.tasks[name] = Task(name, key, family_name(family), spec, self.isa, seen, outputs)
        out = super().call(spec, operands, types, weights, layer)
        self.tasks[name].layers.append(layer or f"{family_name(family)} {len(self.tasks[name].layers)}")
        self.names.setdefault(self.cache[spec, self.choose(family, spec, self.isa, shape)][1].name, set()).add(name)
        return out


def _static(shape, images=1):
    return tuple(rows_of((extent,), images) for extent in shape)


def _growth(shape):
    """What every further image adds to the extents."""
    return tuple(two - one for one, two in zip(_static(shape), _static(shape, 2)))


def _operand(arg, weights):
    if arg is None:
        return Operand(weights.shape, str(weights.dtype), weights, True)
    array = None if isinstance(arg, relax.Var) else constant(arg)
    return Operand(_static(dims(arg)), dtype(arg), array, growth=_growth(dims(arg)))


def extract(model, isa, *, assume_nonzero=False, weight_tolerance=0.0):
    """The distinct kernels of a network.

    Parameters
    ----------
    model : str, path, bytes or onnx.ModelProto
    isa : Isa

    Returns
    -------
    list of Task
        In the order of the network.
    """
    imported = import_model(model)
    mod = optimise(imported.mod, {}, assume_nonzero=assume_nonzero, weight_tolerance=weight_tolerance)
    collector = _Collector(isa)
    # What a kernel reads in another order than it was made in leaves a transpose that nothing reads.
    main = relax.transform.DeadCodeElimination()(collector.run(mod))["main"]
    called = [b.value.args[0].name_hint for b in bindings(main) if op_name(b.value) == "relax.call_tir"]
    live = set().union(*(collector.names.get(kernel, ()) for kernel in called))
    return [task for name, task in collector.tasks.items() if name in live]
