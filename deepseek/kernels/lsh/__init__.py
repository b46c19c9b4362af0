"""LSH attention in time and memory that grow as the number of tokens. Start with `attention.py`."""
