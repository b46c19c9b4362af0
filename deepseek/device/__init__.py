"""Where tensors live and in which precision they are computed: choice, memory, transfers.

Every command and function that computes takes `device` and `dtype`. `names.py` says what may be
written, `choose.py` resolves it, `memory.py` asks and explains the device's memory, `transfer.py`
copies to it.
"""
