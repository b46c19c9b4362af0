"""The compiled runner: 8-bit weights, and a whole forward pass in one compiled function. Start with
`runner.py`.
"""
