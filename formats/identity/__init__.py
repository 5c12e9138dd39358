"""Whose numbers a cache holds: a model's or tokenizer's files in, fingerprints that can be compared out."""
