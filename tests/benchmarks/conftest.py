"""The benchmarks are scripts beside the package, not installed with it: put the repository root on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
