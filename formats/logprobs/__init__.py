"""What is known of a position: kept tokens with their logprobs, the tail's function, draws from the tail."""
