"""What became of a layer, for the report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """What became of a layer.

    Attributes
    ----------
    kind : str
        "binary", "bitserial" or "float".
    reason : str
        Why it stayed float, or a remark.
    planes : str
        Activation planes x weight planes, for example "1x1".
    """

    kind: str
    reason: str = ""
    planes: str = ""
