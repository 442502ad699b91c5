"""The passes, in order. This list is the one place where the order lives."""

from __future__ import annotations

from bnntvm.passes.binarise import Binarise
from bnntvm.passes.canonicalise import Canonicalise
from bnntvm.passes.fold_thresholds import FoldThresholds
from bnntvm.passes.fuse_epilogues import FuseEpilogues
from bnntvm.passes.layout import ChannelsLast
from bnntvm.passes.merge_siblings import MergeSiblings
from bnntvm.passes.propagate_bits import PropagateBits
from bnntvm.passes.scale_products import ScaleProducts
from bnntvm.passes.split_concats import SplitConcats
from bnntvm.passes.weight_only import WeightOnly


def passes(decisions, *, assume_nonzero=False, weight_tolerance=0.0):
    """All passes between the importer and lowering.

    Parameters
    ----------
    decisions : dict
        Filled by Binarise: layer name -> passes.binarise.Decision.
    """
    return [
        # one layout
        ChannelsLast(),
        # one form
        Canonicalise(),
        # which layers compute on bits
        Binarise(decisions, assume_nonzero, weight_tolerance),
        # which of the others keep their weights packed
        WeightOnly(decisions, weight_tolerance),
        # where the bits are made
        PropagateBits(),
        FoldThresholds(),
        Canonicalise(),
        # what is computed together
        ScaleProducts(),
        MergeSiblings(),
        SplitConcats(),
        FuseEpilogues(),
    ]


def optimise(mod, decisions, verifier=None, **options):
    """Run every pass on ``mod``; ``verifier`` (:class:`bnntvm.verify.Verifier`) checks what each of them makes."""
    for one in passes(decisions, **options):
        mod = one(mod)
        if verifier is not None:
            # Weights within a tolerance are changed on purpose: the network is another one from there on.
            changes = isinstance(one, (Binarise, WeightOnly)) and options.get("weight_tolerance", 0) > 0
            verifier.passed(type(one).__name__, mod, rebase=changes)
    return mod
