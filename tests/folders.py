"""Folders that go when the process does."""

import atexit
import os
import pathlib
import shutil
import tempfile


def of_process(prefix):
    """A new folder, removed at the end of this process (not of one that is forked from it)."""
    path, owner = pathlib.Path(tempfile.mkdtemp(prefix=prefix)), os.getpid()

    def remove():
        if os.getpid() == owner:
            shutil.rmtree(path, ignore_errors=True)

    atexit.register(remove)
    return path
