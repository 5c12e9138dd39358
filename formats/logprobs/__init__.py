"""What is known of a position: logprobs in, kept tokens, the tail's function and draws from the tail out."""
