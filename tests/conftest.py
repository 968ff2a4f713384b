"""Settings for all tests."""

from hypothesis import settings

# A loaded machine is slow, and slowness is no failure.
settings.register_profile("srccore", deadline=None)
settings.load_profile("srccore")
