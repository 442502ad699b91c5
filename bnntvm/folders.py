"""Folders that are written whole or not at all: bundles and standalone C."""

from __future__ import annotations

import contextlib
import pathlib
import shutil

from .errors import BnnError


@contextlib.contextmanager
def new_folder(path, what):
    """A folder to fill; whatever ends that early leaves it as it was: empty, or not there.

    Parameters
    ----------
    path : str or pathlib.Path
        Made; must not exist or be empty.
    what : str
        What could not be written, for the message.

    Yields
    ------
    pathlib.Path

    Raises
    ------
    BnnError
    """
    folder = pathlib.Path(path)
    existed = folder.is_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise BnnError("the folder is not empty", where=str(folder), hint="give one that does not exist")
    except OSError as error:
        raise BnnError(f"{what} could not be written", where=str(folder), why=error.strerror or str(error)) from error
    try:
        yield folder
    except BaseException:
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if not existed:
            folder.rmdir()
        raise
