"""anneal: cache_builder."""
