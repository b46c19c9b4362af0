"""GGUF files: a reader that checks every count, and their conversion to Hugging Face folders."""
