"""Compute kernels by subject, each with a slow reference implementation."""
