"""Evaluation of models and experts: loss, next lines, generated code, safety, comparisons."""
