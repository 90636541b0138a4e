"""Settings of all tests: the same examples every time, no clock, and nothing left behind."""

from hypothesis import settings

settings.register_profile("book", deadline=None, derandomize=True, database=None)
settings.load_profile("book")
