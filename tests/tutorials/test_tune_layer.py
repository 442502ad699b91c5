"""The tutorial about tuning runs, with few trials on a small layer."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_tune_layer(tmp_path):
    command = [sys.executable, ROOT / "tutorials" / "tune_layer.py", "--trials", "6", "--channels", "32", "--size", "5"]
    result = subprocess.run([*command, "--database", tmp_path / "db"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    measured, failed = map(int, re.search(r"^(\d+) candidates measured, (\d+) failed", result.stdout, re.M).groups())
    assert measured + failed == 6 and measured >= 3
    assert re.search(r"^binary_conv2d 3x3 5x5 32-32 +\d+ +\d+ ", result.stdout, re.M)
    assert "equal results: True" in result.stdout
    assert (tmp_path / "db" / "search.png").read_bytes()[:4] == b"\x89PNG"
