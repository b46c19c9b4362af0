"""Other products' APIs: their request bodies, translated into ours, and their layout of replies.

A dialect translates at the edge. Prompts, sampling, admission and streaming are those of
`/v1/chat/completions` and `/v1/completions`, so a dialect never computes anything.
"""
