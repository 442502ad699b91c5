"""Every error that a user of bnntvm can cause.

Each message says what happened, where (the ONNX node, the file, the input), why, and what to do about it. Anything that is not a
:class:`BnnError` is a bug in bnntvm.
"""


class BnnError(Exception):
    """Base of all errors that a user can cause.

    Parameters
    ----------
    what : str
        What happened, in one sentence.
    where : str, optional
        The place: a node, a file, an input.
    why : str, optional
        The cause.
    hint : str, optional
        What the user can do about it.
    """

    def __init__(self, what, *, where=None, why=None, hint=None):
        self.what, self.where, self.why, self.hint = what, where, why, hint
        parts = [what]
        if where:
            parts.append(f"where: {where}")
        if why:
            parts.append(f"why: {why}")
        if hint:
            parts.append(f"what to do: {hint}")
        super().__init__("\n  ".join(parts))

    def __reduce__(self):  # keyword-only arguments do not survive the default pickling (process pools)
        return _rebuild, (type(self), self.what, self.where, self.why, self.hint)


def _rebuild(kind, what, where, why, hint):
    return kind(what, where=where, why=why, hint=hint)


class ModelError(BnnError):
    """The ONNX model is not readable, not valid, or breaks a rule of the format."""


class UnsupportedError(BnnError):
    """The model is valid but uses an operator or a feature that bnntvm does not compile."""


class InputError(BnnError):
    """An array given to ``run`` has a wrong name, shape, dtype or content."""


class TargetError(BnnError):
    """The target is unknown, or this machine cannot run what was built for it."""


class ToolchainError(BnnError):
    """A C compiler or linker is missing or failed."""


class ArtefactError(BnnError):
    """A ``.bnn`` file is missing, corrupt, foreign, or could not be written."""
