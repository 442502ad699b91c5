"""The demo runs and shows what it promises."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_demo():
    result = subprocess.run([sys.executable, ROOT / "tutorials" / "demo.py"], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    accuracy = float(re.search(r"held-out digits: ([\d.]+)%; same class as ONNX Runtime: 359 of 359", result.stdout)[1])
    assert accuracy >= 97
    assert len(re.findall(r"^/blocks.* Conv +binary +1x1", result.stdout, re.M)) == 3
    assert "compiler mapped: False" in result.stdout and "the same classes there: True" in result.stdout
    artefact, onnx = map(int, re.search(r"artefact (\d+) kB.*ONNX file (\d+) kB", result.stdout).groups())
    assert artefact < onnx
