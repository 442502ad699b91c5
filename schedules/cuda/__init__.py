"""Kernel families for NVIDIA GPUs, each under the name of its namesake for CPUs and with the same interface.

Kernels are TensorIR with explicit threads and barriers. What TensorIR cannot say is a device function with an executable description
(:mod:`.device`), so that :mod:`.emulate` can run every kernel as it stands. They are compiled by the pipeline of :mod:`.pipeline`.
"""
