"""NVIDIA GPUs: how a network is compiled for one (with TVM), and how it runs there (without TVM's compiler).

``toolchain`` turns CUDA C++ into machine code; ``plan`` gives a network's tensors memory; ``backend`` is what :mod:`bnntvm.build` asks
for all that is different on a GPU. At run time: ``driver`` is the part of the CUDA runtime that is called directly, ``runtime`` runs a
network, ``tensor`` is an array on the device.
"""
