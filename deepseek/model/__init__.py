"""The model. Start with `transformer.py`.

Tensors carry their shape as a suffix: B batch, T query length, S key length, D width, H heads, G
key/value heads, K head width, E experts, A active experts, N = B*T tokens, F expert width, V
vocabulary, M plugged modules.
"""
