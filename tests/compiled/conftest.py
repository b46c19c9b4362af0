"""The compiled step shares its work: each test runs on two threads."""

from two_threads import two_threads

__all__ = ["two_threads"]
