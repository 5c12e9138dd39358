"""Examples in, `TokenRow`s (token ids and loss mask) out."""
