"""Where the time of a network goes: :func:`bnntvm.profile`.

probe.c   notes when each call of the virtual machine begins and ends
limits    kernels that do nothing but one thing as fast as the machine can
measure   runs both, where the network runs: here, or on a board; imports no compiler
profile   compiles the probe for the network's machine, and makes rows, a trace and a picture of what was measured
"""
