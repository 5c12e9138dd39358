"""Numbers to bytes and back: `TopKLogprobs` of one row in, its payload out."""
