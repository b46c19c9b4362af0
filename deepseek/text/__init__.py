"""Tokenizers and chat templates: text to token ids, and conversations to prompts."""
