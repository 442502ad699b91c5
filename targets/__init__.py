"""Where code runs: instruction-set facts as data, one target per file."""
