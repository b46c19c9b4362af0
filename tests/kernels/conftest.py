"""Kernels are multi-threaded, so each test runs on two threads."""

from two_threads import two_threads

__all__ = ["two_threads"]
