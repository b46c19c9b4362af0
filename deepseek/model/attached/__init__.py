"""Experts beside any causal language model of `transformers`. Start with `model.py`."""
