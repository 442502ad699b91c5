"""Networks trained with PyTorch minutes ago are built as they were exported."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
KINDS = {"bnn": r"binary", "dorefa": r"bitserial|int8", "ternary": r"binary|bitserial|int8"}


def test_three_networks_give_the_classes_that_torch_gives():
    command = [sys.executable, ROOT / "tutorials" / "train_torch.py", "--epochs", "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    for name, part in zip(KINDS, re.split(r"^(?=\w+: [\d.]+% of the test)", result.stdout, flags=re.M)[1:]):
        accuracy, same = re.match(rf"{name}: ([\d.]+)% of the test digits right; same class as PyTorch: (\d+) of 359", part).groups()
        assert float(accuracy) > 70 and int(same) >= 358, part
        assert len(re.findall(rf" Conv +({KINDS[name]}) ", part)) == 3, part
