"""Property tests draw the same examples at every run, and a busy machine does not fail them."""

from hypothesis import settings

settings.register_profile("longreach", deadline=None, derandomize=True, database=None)
settings.load_profile("longreach")
