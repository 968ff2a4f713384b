"""Settings for all tests."""

from hypothesis import settings

# On a busy machine, an example may take long; that is not a failure.
settings.register_profile("srccore", deadline=None)
settings.load_profile("srccore")
