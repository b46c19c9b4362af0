"""LSH attention, with time and memory linear in the number of tokens. Start with `attention.py`."""
