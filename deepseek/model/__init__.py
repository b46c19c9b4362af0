"""The model. Start with `transformer.py`.

Tensor names end in their shape: B batch, T query length, S key length, D width of the residual
stream, H query heads, G key/value heads, K head width, E routed experts, A active experts, N = B*T
tokens, F expert width, V vocabulary, M plugged expert modules.
"""
