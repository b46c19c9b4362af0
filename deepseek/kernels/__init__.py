"""Kernels by subject, each with a slow reference."""
