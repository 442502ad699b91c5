"""A tracker and boards on this machine."""

import contextlib
import subprocess
import sys
import time

from bnntvm.remote.client import boards


@contextlib.contextmanager
def farm(commands=((sys.executable,),), key="test"):
    """("host:port" of a tracker, process of each board); ``commands``: what starts Python on each of them."""
    from tvm.rpc.tracker import Tracker

    tracker = Tracker("127.0.0.1", 9190, 19190, silent=True)
    address, processes = f"127.0.0.1:{tracker.port}", []
    try:
        for number, command in enumerate(commands):
            words = ["-m", "bnntvm", "rpc-server", "--tracker", address, "--key", key, "--host", "127.0.0.1", "--address", "127.0.0.1"]
            port = str(20000 + 1000 * number)
            processes.append(subprocess.Popen([*command, *words, "--port", port, "--silent"], cwd="/"))
        deadline = time.monotonic() + 300
        while len(boards(("127.0.0.1", tracker.port), key)) < len(commands):
            assert time.monotonic() < deadline and all(p.poll() is None for p in processes), "a board does not come up"
            time.sleep(0.1)
        yield address, processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
        tracker.terminate()
