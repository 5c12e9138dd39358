"""Token rows in, `TopKLogprobs` out, one object for each row, in order."""
