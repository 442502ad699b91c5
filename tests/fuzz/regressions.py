"""Networks that failed once: (check, seed, layers). ``python -m tests.fuzz --seeds S:S+1 --layers L --check C`` shows one."""

FOUND = [
    ("interpreter", 1146, (0, 3, 8, 10)),  # a dead channel that overflows at the largest numbers
    ("build", 100009, (4, 8)),  # attention with a batch of any size
    ("interpreter", 21027, (0, 1, 2, 7, 9, 17, 18, 19, 20)),  # a plane whose source packed layers hide
]
