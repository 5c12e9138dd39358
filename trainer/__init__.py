"""anneal: trainer."""
