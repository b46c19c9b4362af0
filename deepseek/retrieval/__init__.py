"""Retrieval: find passages of a user's own text and add them to a prompt.

documents -> passages (`passages`) -> words (`words`) -> BM25 index (`index`) -> excerpts in the
prompt (`prompt`)
"""
