"""The OpenAI-compatible server and its web page. Start with `app.py`."""
