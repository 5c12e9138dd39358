"""anneal: formats."""
