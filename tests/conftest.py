"""Settings for all tests: the same examples in every run, so that a failure is never a matter of luck."""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
