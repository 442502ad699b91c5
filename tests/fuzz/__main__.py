"""Fuzz from the command line.

python -m tests.fuzz --seeds 0:5000                 # importer, passes, interpreter
python -m tests.fuzz --seeds 0:500 --check build    # the compiled network
python -m tests.fuzz --seeds 0:100 --check emulate  # its kernels for ARM, under QEMU
python -m tests.fuzz --seeds 17:18 --save /tmp/17.onnx --layers 0,3,4
"""

import argparse
import sys
import time

import onnx

from tests.fuzz.check import CHECKS, minimise
from tests.fuzz.networks import generate, named, parse_layers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:100", help="first:last+1")
    parser.add_argument("--check", choices=CHECKS, default="interpreter")
    parser.add_argument("--layers", help="the layers to keep, comma separated: 3 or 3:batch_norm")
    parser.add_argument("--most", type=int, help="layers that are drawn for a network at most: small ones compile fast")
    parser.add_argument("--save", help="write the network's ONNX file here")
    parser.add_argument("--no-minimise", action="store_true")
    args = parser.parse_args()
    first, last = (int(v) for v in args.seeds.split(":"))
    layers = parse_layers(args.layers) if args.layers else None
    check, failed, start = CHECKS[args.check], 0, time.time()
    for seed in range(first, last):
        if seed > first and (seed - first) % 100 == 0:
            print(f"{seed - first} networks, {failed} failed, {time.time() - start:.0f} s", file=sys.stderr, flush=True)
        chosen = layers if args.most is None or layers else [number for number in generate(seed).layers if number < args.most]
        network = generate(seed, chosen)
        if args.save:
            onnx.save(network.model, args.save)
        failure = check(network)
        if failure is None:
            continue
        failed += 1
        kept = chosen
        if layers is None and not args.no_minimise:
            kept = minimise(seed, check, failure.kind)
            failure = check(generate(seed, kept)) or failure
        small = generate(seed, kept)
        print(f"seed {seed} layers {named(small)}\n  {failure}")
        print("".join(f"  {line}\n" for line in small.log), end="", flush=True)
    print(f"{last - first} networks, {failed} failed, {time.time() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
