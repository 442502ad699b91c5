"""Networks that failed once: (check, seed, layers). ``python -m tests.fuzz --seeds S:S+1 --layers L --check C`` shows one."""

FOUND = []
