"""``bnntvm.export_c``: a network as portable C99 that needs nothing: no runtime, no allocator, no C library.

::

    NAME.h NAME.c NAME_weights.h NAME_weights.c bnn.h    the network: one function, NAME_run
    main.c NAME_test.h                                    an example that checks itself
    Makefile CMakeLists.txt cortex-m/                     how to compile it, also for Cortex-M under QEMU
    size.txt size.json                                    flash, RAM, and where every tensor lies

Files of this package: collect (the passes' result as a list of steps), kernels and epilogue (C of the specifications), tir (C of what no
kernel family takes), plan (the workspace), emit (the network's files), example (the example and its test vectors), report (sizes).
"""

from .export import export_c

__all__ = ["export_c"]
