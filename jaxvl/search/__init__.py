"""Indexes of what a run embeds, and search in them: lexical vectors by their words, dense ones by exact products.

Nothing of the package but the command line imports it.
"""
