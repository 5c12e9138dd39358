"""Caches and finished models in; perplexities, KL, a table and a picture out."""
