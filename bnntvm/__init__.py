"""bnntvm: compiles binarised and low-bit ONNX networks into bit-packed XNOR-popcount code."""
