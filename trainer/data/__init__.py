"""A cache in, batches out: rows decoded, the tail taken at T, packed, shuffled and flattened."""
