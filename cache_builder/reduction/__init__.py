"""Logits of a chunk of positions in; kept tokens, tail nodes and tail draws out."""
