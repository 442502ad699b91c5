"""Networks that failed once: (check, seed, layers). ``python -m tests.fuzz --seeds S:S+1 --layers L --check C`` shows one."""

FOUND = [
    ("interpreter", 562, (1, 2, 3)),  # a factor that differs from pixel to pixel, before a max pool that is compared
]
