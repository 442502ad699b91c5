"""Kernel families: how each operator is computed. One family per file: specification, numpy reference, weight packing, TensorIR."""
