"""``bnntvm.export_c``: a network as portable C99 that needs nothing: no runtime, no allocator, no C library.

::

    NAME.h NAME.c NAME_weights.h NAME_weights.c bnn.h    the network: one function, NAME_run
    main.c NAME_test.h                                    an example that checks itself
    Makefile CMakeLists.txt cortex-m/                     how to compile it, also for Cortex-M under QEMU
    size.txt size.json                                    flash, RAM, and where every tensor lies

Files of this package: program (steps and tensors), collect (the passes' result as a program), kernels and epilogue (C of the
specifications), weights (how some are stored), tir (C of what no kernel family takes), rows (steps that are joined row by row), plan (the
workspace), emit (the network's files), example (the example and its test vectors), report (sizes).
"""

from .export import export_c

__all__ = ["export_c"]
