"""A whole decode step in one compiled function."""
