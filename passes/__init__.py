"""Relax passes: what is rewritten. One pass per file; their order is in :mod:`bnntvm.pipeline`."""
