"""Retrieval: passages of a user's own text that are put into a prompt.

documents -> passages (`passages`) -> words (`words`) -> BM25 index (`index`) -> snippets before a
text (`prompt`)
"""
