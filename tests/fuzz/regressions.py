"""Networks that failed once: (check, seed, layers). ``python -m tests.fuzz --seeds S:S+1 --layers L --check C`` shows one.

Layers are named, so that new kinds of layers do not change these networks.
"""

FOUND = [
    # a dead channel that overflows at the largest numbers
    ("interpreter", 1146, "0:batch_norm,3:batch_norm,8:residual,10:family_layer"),
    # attention with a batch of any size
    ("build", 100009, "4:binary_convolution,8:attention"),
    # PACT's clip behind gains of several channels and signs: levels that only rounding errors of huge numbers reach
    ("interpreter", 200016, "0:scale,3:family_layer"),
    ("interpreter", 200320, "0:batch_norm,1:family_layer"),
    # a dense layer on every pixel of a batch of any size: kernels with a size among their operands
    ("build", 320028, "8:token_dense"),
    ("emulate", 320028, "8:token_dense"),
    ("emulate", 320031, "8:token_dense"),
    # a one-dimensional convolution of bytes
    ("build", 60021, "2:binary_convolution,20:family_layer"),
    # a plane whose source packed layers hide
    (
        "interpreter",
        21027,
        "0:crop,1:tied_batch_norm,2:family_layer,7:batch_norm,9:batch_norm,17:back,18:family_layer,19:dense,20:family_layer",
    ),
]
