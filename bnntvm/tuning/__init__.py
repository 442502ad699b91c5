"""Autotuning: schedules that were measured instead of guessed, see :func:`bnntvm.tune`."""
