"""How good a model or an expert is: losses, next lines, generated code, safety, and rivals side by
side.
"""
